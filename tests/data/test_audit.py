"""`appliance data audit`: finds each planted defect, names its place, and finds nothing where nothing is wrong."""

import json
import string
from dataclasses import replace
from pathlib import Path

import pytest

from appliance import recipe as recipes
from appliance.data import audit, check, shortcuts
from appliance.data.lengths import Meter
from appliance.data.report import Audit
from appliance.data.texts import Text
from tests import tiny_recipe
from tests.data import planted
from tests.running import call


def examine(path: Path, root: Path, base: Path | None = None, *sets: str) -> Audit:
    recipe = recipes.load(path, sets)
    return audit.examine(recipe, check.check(recipe, root, strict=False), Meter(base))


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_clean_rows_have_no_finding(tmp_path: Path, root: Path, seed: int) -> None:
    made = examine(planted.clean(seed).write(tmp_path), root)
    assert [str(finding) for finding in made.findings] == []
    assert made.rows == {"sft.jsonl": 80, "dpo.jsonl": 40, "faq.json": 1}
    assert made.languages["sft.jsonl"] == {"nl": 40, "en": 40}


@pytest.mark.parametrize("defect", planted.DEFECTS, ids=lambda defect: f"{defect.kind} {defect.plant.__name__}")
def test_planted_defect_is_found(tmp_path: Path, root: Path, defect: planted.Defect) -> None:
    rows = planted.clean()
    defect.plant(rows)
    findings = [each for each in examine(rows.write(tmp_path), root).findings if each.kind == defect.kind]
    assert findings, f"no {defect.kind}"
    assert defect.said in findings[0].what
    assert any(place.startswith(defect.where) for place in findings[0].examples), findings[0].examples
    assert findings[0].count > 0
    assert findings[0].remedy


def test_page_and_json(tmp_path: Path) -> None:
    rows = planted.clean()
    rows.answer(
        5, "Bel <script>alert(1)</script> op 06-12345678, BSN 111222333, of mail jan.jansen@voorbeeld.nl alsjeblieft."
    )
    path = rows.write(tmp_path / "recipe")
    result = call("data", "audit", path, "--json")
    output = json.loads(result.stdout)
    assert output["state"] == "made"
    assert {finding["kind"] for finding in output["findings"]} >= {"personal_bsn", "personal_phone", "personal_email"}
    folder = Path(output["artifact"])
    page = (folder / "audit.html").read_text(encoding="utf-8")
    data = json.loads((folder / "audit.json").read_text(encoding="utf-8"))
    assert "<script" not in page
    assert data["schema"] == 1
    assert data["findings"] == output["findings"]
    for shown in (
        "Findings",
        "Lengths",
        "Languages",
        "Topics",
        "Frequent words",
        "Flesch-Douma",
        "Nothing was sampled",
        "sft.jsonl:6",
    ):
        assert shown in page
    for private in ("06-12345678", "+31612345678", "111222333", "jan.jansen"):
        assert private not in page + json.dumps(data) + result.stderr
    whole = next(field for field in data["fields"] if field["file"] == "sft.jsonl" and field["field"] == "whole row")
    assert whole["rows"] == 80
    assert whole["percentiles"]["50"] <= whole["percentiles"]["99"] <= whole["longest"]


def test_unchanged_data_is_not_audited_again(tmp_path: Path, root: Path) -> None:
    path = planted.clean().write(tmp_path / "recipe")
    assert json.loads(call("data", "audit", path, "--dry-run", "--json").stdout)["state"] == "to make"
    assert not root.exists()
    first = json.loads(call("data", "audit", path, "--json").stdout)
    page = Path(first["page"]).stat().st_mtime_ns
    again = json.loads(call("data", "audit", path, "--json").stdout)
    assert again == {**first, "state": "unchanged"}
    assert Path(again["page"]).stat().st_mtime_ns == page
    lines = (path.parent / "dpo.jsonl").read_text().splitlines()
    (path.parent / "dpo.jsonl").write_text("\n".join(lines[1:]))
    other = json.loads(call("data", "audit", path, "--json").stdout)
    assert (other["state"], other["results"]["rows"]["dpo.jsonl"]) == ("made", len(lines) - 1)
    assert other["artifact"] != first["artifact"]
    again = json.loads(call("data", "audit", path, "--set", "sft.max_tokens=100", "--json").stdout)
    assert (again["state"], again["artifact"] == other["artifact"]) == ("made", False)


def test_same_data_gives_the_same_page(tmp_path: Path) -> None:
    path = planted.clean().write(tmp_path / "recipe")
    folder = Path(json.loads(call("data", "audit", path, "--json").stdout)["artifact"])
    before = {name: (folder / name).read_bytes() for name in ("audit.html", "audit.json")}
    (folder / "manifest.json").unlink()
    call("data", "audit", path)
    assert {name: (folder / name).read_bytes() for name in before} == before


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return folder_of_words(tmp_path)


def folder_of_words(tmp_path: Path) -> Path:
    """A model folder as far as lengths need one: a tokenizer of words, and a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder = tmp_path / "base"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{% for message in messages %}{{ message.role }} : {{ message.content }} end {% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return folder


def test_lengths_in_tokens_of_the_base(tmp_path: Path, root: Path, base: Path) -> None:
    rows = planted.clean()
    rows.answer(3, "woord " * 400)
    made = examine(rows.write(tmp_path / "recipe"), root, base, "sft.max_tokens=256")
    assert made.unit == "tokens of the base"
    assert made.suggested_max_tokens == {"sft.max_tokens": 448, "dpo.max_tokens": 64, "serve.max_tokens": 448}
    (finding,) = [each for each in made.findings if each.kind == "too_long"]
    assert "the longest row has 420 tokens, sft.max_tokens is 256" in finding.what  # 14 + 400, and 3 of the template a turn
    assert "what is longer is refused: 1 row of 80 measured" in finding.what
    assert "Set sft.max_tokens = 448" in finding.remedy
    assert (finding.level, finding.examples) == ("problem", ["sft.jsonl:4"])
    answers = next(field for field in made.fields if field.file == "sft.jsonl" and field.name == "assistant")
    assert answers.longest == 400


def test_every_answer_is_measured_alone_and_every_triplet_both_ways(tmp_path: Path, root: Path, base: Path) -> None:
    rows = planted.clean()
    rows.sft[3] = {"messages": tiny_recipe.messages(("vraag", "woord " * 70) * 3)}
    rows.dpo[3] |= {"chosen": "a " * 150, "rejected": "overheidsvoorlichtingsactiviteiten " * 20}  # fewer, and longer
    made = examine(rows.write(tmp_path / "recipe"), root, base)
    longest = {(field.file, field.name): field.longest for field in made.fields}
    assert longest["sft.jsonl", "assistant"] == 70
    assert longest["sft.jsonl", "whole row"] == 3 * (1 + 70) + 6 * 3
    assert longest["dpo.jsonl", "whole row"] > 150
    assert made.suggested_max_tokens == {"sft.max_tokens": 256, "dpo.max_tokens": 192, "serve.max_tokens": 192}


def test_tokenizer_that_cuts_and_pads_measures_whole_rows(tmp_path: Path, root: Path, base: Path) -> None:
    from tokenizers import Tokenizer

    path = planted.clean().write(tmp_path / "recipe")
    expected = examine(path, root, base)
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(length=16)
    tokenizer.save(str(base / "tokenizer.json"))
    assert examine(path, root, base).fields == expected.fields


def test_rows_that_the_template_refuses_are_named(tmp_path: Path, root: Path, base: Path) -> None:
    settings = json.loads((base / "tokenizer_config.json").read_text())
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    (base / "tokenizer_config.json").write_text(json.dumps({"chat_template": refusal + settings["chat_template"]}))
    rows = planted.clean()
    rows.sft[3]["messages"].insert(0, {"role": "system", "content": "Wees kort."})
    made = examine(rows.write(tmp_path / "recipe"), root, base)
    (finding,) = [each for each in made.findings if each.kind == "template_refuses"]
    assert (finding.count, finding.examples) == (1, ["sft.jsonl:4"])
    assert made.unit == "tokens of the base"


REWARDED = (
    planted.RECIPE.replace('phases = ["sft", "dpo"]', 'phases = ["sft", "dpo", "grpo"]').replace(
        'faq = "faq.json"', 'faq = "faq.json"\ngrpo = "grpo.jsonl"'
    )
    + "\n[grpo]\nanswer_tokens = 100\nmax_tokens = 128\n[grpo.rewards.length]\nweight = 1.0\n"
)


def test_prompts_for_rewards_are_looked_at_too(tmp_path: Path, root: Path, base: Path) -> None:
    rows = planted.clean()
    rows.heldout = [{"messages": tiny_recipe.messages((rows.said(0, 0), "Een uur lopen langs het water."))}]
    path = rows.write(tmp_path / "recipe", REWARDED)
    path.write_text(REWARDED.replace('faq = "faq.json"', 'faq = "faq.json"\nheldout = "heldout.jsonl"'))
    writer = planted.Writer(5)
    prompts = [{"prompt": writer.sentence(planted.DUTCH), "reference": writer.two(planted.DUTCH)} for _ in range(30)]
    rows.sft[0] = rows.sft[2]
    tiny_recipe.write_lines(path.parent / "sft.jsonl", rows.sft)
    prompts[4]["prompt"] = rows.heldout[0]["messages"][0]["content"]
    prompts[5]["prompt"] = "woord " * 40
    prompts[6]["reference"] += " Bel 06-12345678."
    for prompt in prompts[10:]:
        prompt["prompt"] = "HOTEL: positiv"  # as labels repeat
    tiny_recipe.write_lines(path.parent / "grpo.jsonl", prompts)
    made = examine(path, root, base)
    assert made.rows["grpo.jsonl"] == made.languages["grpo.jsonl"]["nl"] == 30
    by_kind = {finding.kind: finding for finding in made.findings}
    assert by_kind["heldout_leaks"].examples == ["heldout.jsonl:1"]
    assert made.random_leaks["grpo.jsonl"].exact > 0.5
    assert "random_split_leaks" not in by_kind
    assert by_kind["personal_phone"].examples == ["grpo.jsonl:7"]
    assert "the longest prompt has 43 tokens, grpo.max_tokens is 128 and grpo.answer_tokens 100" in by_kind["too_long"].what
    assert made.suggested_max_tokens["grpo.max_tokens"] == 192
    assert {field.name for field in made.fields if field.file == "grpo.jsonl"} == {"prompt", "reference"}


def test_judged_answers_are_looked_at_too(tmp_path: Path, root: Path, base: Path) -> None:
    rows, writer = planted.clean(), planted.Writer(5)
    recipe = planted.RECIPE.replace('"dpo"]', '"kto"]').replace('dpo = "dpo.jsonl"', 'kto = "kto.jsonl"')
    path = rows.write(tmp_path / "recipe", recipe + "\n[kto]\nmax_tokens = 32\n")
    judged = [
        {"prompt": writer.sentence(planted.DUTCH), "completion": writer.two(planted.DUTCH), "label": number % 2 == 0}
        for number in range(30)
    ]
    judged[3]["completion"] += " Ga naar Lindekade 3."
    judged[4]["completion"] += " BSN 111222333."
    tiny_recipe.write_lines(path.parent / "kto.jsonl", judged)
    made = examine(path, root, base)
    by_kind = {finding.kind: finding for finding in made.findings}
    assert by_kind["true_facts_rejected"].examples == ["kto.jsonl:4"]
    assert by_kind["personal_bsn"].examples == ["kto.jsonl:5"]
    assert "kto.max_tokens is 32" in by_kind["too_long"].what
    files = json.loads(call("data", "split", path, "--validation", "0.2", "--json").stdout)["files"]
    parts = [Path(files[f"kto.{part}"]).read_text().splitlines() for part in ("train", "validation")]
    assert [len(part) for part in parts] == [24, 6]


def test_files_of_one_name_are_kept_apart(tmp_path: Path, root: Path) -> None:
    rows = planted.clean()
    rows.dpo[2]["chosen"] += " BSN 111222333."
    rows.dpo[6]["language"] = "nl"
    path = rows.write(tmp_path)
    for name in ("sft", "dpo"):
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}.jsonl").rename(tmp_path / name / "rows.jsonl")
    made = examine(path, root, None, *(f"data.{name}={tmp_path / name / 'rows.jsonl'}" for name in ("sft", "dpo")))
    assert made.rows == {"rows.jsonl (sft)": 80, "rows.jsonl (dpo)": 40, "faq.json": 1}
    by_kind = {finding.kind: finding for finding in made.findings}
    assert by_kind["personal_bsn"].examples == ["rows.jsonl (dpo):3"]
    assert by_kind["defect"].examples == ["rows.jsonl (dpo):7"]
    assert set(made.random_leaks) == {"rows.jsonl (sft)", "rows.jsonl (dpo)"}


def test_defects_of_one_sort_are_one_finding(tmp_path: Path, root: Path) -> None:
    rows = planted.clean()
    for number, triplet in enumerate(rows.dpo[:30]):
        triplet[f"key {string.ascii_letters[number]}" if number > 1 else "language"] = "x"
    path = rows.write(tmp_path)
    with (tmp_path / "sft.jsonl").open("a") as stream:
        stream.writelines(f'{{"messages": {" " * number}"\n' for number in range(200))
    with (tmp_path / "dpo.jsonl").open("a") as stream:
        stream.writelines(
            json.dumps({"prompt": "a", "chosen": "b" * number, "rejected": number}) + "\n" for number in range(1, 9)
        )
    found = {(each.what.partition(" (")[0], each.count) for each in examine(path, root).findings if each.kind == "defect"}
    assert found == {
        ("sft.jsonl: invalid JSON", 200),
        ("dpo.jsonl: stray key … ignored", 30),
        ("dpo.jsonl: rejected: expected text, found a number", 8),
    }


def test_languages_are_counted_alike_everywhere(tmp_path: Path, root: Path) -> None:
    """By the check, the audit and the split: also of rows with short answers, and in an undeclared language."""
    rows = planted.clean()
    planted._french(rows)
    for number in (3, 4, 5, 6):
        rows.answer(number, "Ja, dat mag" if number % 2 else "Non merci")
    path = rows.write(tmp_path)
    audited = examine(path, root).languages["sft.jsonl"]
    checked = json.loads(call("data", "check", path, "--json").stdout)["results"]["languages"]
    strata = json.loads(call("data", "split", path, "--json").stdout)["figures"]["sft"]["strata"]
    assert audited["fr"] == 1
    assert checked == audited == {name: each["rows"] for name, each in strata.items() if ":" not in name}


def test_rows_that_the_recipe_cuts_are_no_problem(tmp_path: Path, root: Path, base: Path) -> None:
    rows = planted.clean()
    rows.answer(3, "woord " * 400)
    made = examine(rows.write(tmp_path / "recipe"), root, base, "sft.max_tokens=256", "sft.truncate=true")
    (finding,) = [each for each in made.findings if each.kind == "too_long"]
    assert (finding.level, finding.examples) == ("notice", ["sft.jsonl:4"])
    assert "what is longer is cut at its end" in finding.what


def test_who_holds_rows_out_is_not_told_of_random_splits(tmp_path: Path, root: Path) -> None:
    rows = planted.clean()
    for row in range(6):
        rows.ask(20 + row, rows.said(row, 0).replace(".", " ja."))
    assert "random_split_leaks" in {each.kind for each in examine(rows.write(tmp_path / "all"), root).findings}
    rows.heldout = planted.clean(seed=7, rows=10).sft
    assert not examine(rows.write(tmp_path / "divided"), root).findings


def test_near_copies_of_one_row_are_one_example(tmp_path: Path, root: Path) -> None:
    rows = planted.clean()
    for row, source in ((20, 0), (22, 0), (24, 0), (31, 1)):
        rows.ask(row, f"{rows.said(source, 0)} {('ja', 'nee', 'zo')[row % 3]}")
        rows.answer(row, rows.said(source, 1))
    (finding,) = [each for each in examine(rows.write(tmp_path), root).findings if each.kind == "near_duplicates"]
    assert len({place.partition(" ")[0] for place in finding.examples}) == len(finding.examples)
    assert "sft.jsonl:2 ~ 32" in finding.examples


def test_rows_with_a_subject_each_are_no_slices() -> None:
    words = planted.Writer(1)
    subjects = ["tulip", "harbour", "violin", "glacier", "beehive", "lantern", "saddle", "walnut", "compass", "mustard"]
    rows = []
    for line in range(1, 101):
        subject = f"{subjects[line // 2 % 10]}{'abcdefghij'[line // 20]}"  # two rows have it, one after the other
        answer = f"The {subject} is here. {words.two(planted.ENGLISH)} And the {subject} stays a {subject}."
        rows.append(Text("sft", "sft.jsonl", line, "", f"What of the {subject}?", answer))
    few = [*rows[:4], *(replace(row, asked="What of it?", answer=words.two(planted.ENGLISH)) for row in rows[4:])]
    assert [finding.kind for finding in shortcuts.find(rows)] == []
    assert [finding.kind for finding in shortcuts.find(few)] == ["rare_word"]


def test_lengths_of_a_sample_keep_the_longest(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from appliance.data import lengths

    monkeypatch.setattr(lengths, "SAMPLE_ROWS", 10)
    monkeypatch.setattr(lengths, "LONGEST_ROWS", 2)
    turns = [("vraag", f"{'woord ' * (300 if number == 41 else 5)}") for number in range(100)]
    rows = [{"messages": tiny_recipe.messages(each), "line": number} for number, each in enumerate(turns, 1)]
    (*_, whole) = lengths.measure("sft", "sft.jsonl", rows, Meter(base)).fields
    assert len(whole.values) == 10
    assert whole.longest == 307


def test_without_a_tokenizer_lengths_say_that_they_are_characters(tmp_path: Path, root: Path) -> None:
    made = examine(planted.clean().write(tmp_path), root)
    assert made.unit.startswith("characters: the base's tokenizer is not here")
    assert made.suggested_max_tokens == {}
