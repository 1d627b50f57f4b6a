"""`appliance data split`: near-duplicates never cross, every language and topic has its share, no row is lost or changed."""

import json
import shlex
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from appliance.data import check, duplicates, split
from appliance.data.texts import Text
from appliance.errors import DataError
from appliance.text.words import normal
from tests import tiny_recipe
from tests.data import planted
from tests.data.test_audit import REWARDED
from tests.running import call

LETTERS = "abcdefghij klmnopqrstuvwxyz éł أبت"


def shingles(text: str) -> set[str]:
    padded = f" {normal(text)} "
    return {padded[start : start + 5] for start in range(max(1, len(padded) - 4))}


def similarity(one: str, other: str) -> float:
    both, all_ = shingles(one) & shingles(other), shingles(one) | shingles(other)
    return len(both) / len(all_)


@st.composite
def families(draw: st.DrawFn) -> list[Text]:
    """Rows some of which are others with a word more, in another case, or with the same question."""
    texts = draw(st.lists(st.text(LETTERS, min_size=40, max_size=90), min_size=4, max_size=12, unique_by=normal))
    asked = list(texts)
    for text in texts:
        changes = (f"{text} x", text.upper(), f"{text}!", f"x {text}")
        asked += draw(st.lists(st.sampled_from(changes), max_size=3))
    asked = draw(st.permutations(asked))
    return [Text("sft", "sft.jsonl", line, each, each, f"answer {line}") for line, each in enumerate(asked, 1)]


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(families(), st.sampled_from([0.1, 0.3, 0.5]), st.integers(0, 5))
def test_near_duplicates_never_cross(rows: list[Text], share: float, seed: int) -> None:
    try:
        (part,) = split.divide({"sft": rows}, ["en", "nl"], share, seed)
    except DataError:  # all of them may be alike
        return
    held = [row for row, is_held in zip(rows, part.is_heldout, strict=True) if is_held]
    trained = [row for row, is_held in zip(rows, part.is_heldout, strict=True) if not is_held]
    assert len(held) + len(trained) == len(rows)
    # What is a little under the limit in truth may be estimated over it, and the other way round.
    assert all(similarity(one.asked, other.asked) < 0.8 for one in held for other in trained)
    assert part.leak == duplicates.Leak(0, 0)


def test_an_instruction_that_many_rows_share_does_not_join_them() -> None:
    writer = planted.Writer(3)
    prompts = [
        f"Write one sentence for the guests of our house about this subject: {each}" for each in ("bed", "view", "tea")
    ]
    asked = [prompts[number % 3] for number in range(120)]
    answers = [writer.two(planted.ENGLISH) for _ in asked]
    answers[60] = answers[0]
    rows = [Text("sft", "sft.jsonl", line, q, q, a) for line, (q, a) in enumerate(zip(asked, answers, strict=True), 1)]
    (part,) = split.divide({"sft": rows}, ["en", "nl"], 0.2, 1)
    assert part.heldout_rows == pytest.approx(24, abs=3)
    assert part.is_heldout[0] == part.is_heldout[60]
    assert part.leak == duplicates.Leak(0, 0)
    likeness = duplicates.compare(rows)
    assert len(set(likeness.groups.tolist())) == 119
    assert likeness.questions.distinct == 3


def test_likeness_is_found_among_many() -> None:
    """More texts in one bucket than are compared with each other."""
    texts = [f"Waar kan ik in deze stad vannacht slapen als ik geen geld heb, meneer {number}?" for number in range(200)]
    other = ["Hoe laat gaat de bakker om de hoek op zondag open?"]
    alike = duplicates.alike([*texts, *other])
    rows = [Text("sft", "f", line, text, text, "") for line, text in enumerate([*texts, *other])]
    groups = duplicates.compare(rows).groups.tolist()
    assert len(set(groups[:200])) == 1
    assert groups[200] != groups[0]
    assert alike.distinct == 201


def test_split_is_stratified(tmp_path: Path) -> None:
    rows = planted.clean(rows=400)
    for number in range(0, 400, 4):  # half of the rows of one language, a topic of their own
        rows.ask(number, f"{rows.said(number, 0)} De treinkaartjes, het perron en het station.")
    output = json.loads(call("data", "split", rows.write(tmp_path), "--validation", "0.2", "--json").stdout)
    for kind, count in (("sft", 400), ("dpo", 200)):
        figures = output["figures"][kind]
        assert abs(figures["validation_rows"] - 0.2 * count) <= 2
        for name, stratum in figures["strata"].items():
            assert abs(stratum["validation"] - 0.2 * stratum["rows"]) <= 2, name
    assert any("station" in name or "perron" in name for name in output["figures"]["sft"]["strata"])


def test_leak_of_a_random_split_is_shown_beside(tmp_path: Path) -> None:
    rows = planted.clean()
    planted._near_copies(rows)
    result = call("data", "split", rows.write(tmp_path), "--json")
    sft = json.loads(result.stdout)["figures"]["sft"]
    assert sft["leak"] == {"exact": 0, "near": 0}
    assert 0.05 < sft["random_leak"]["near"] < 0.25
    assert "a random one" in result.stderr


def test_same_question_of_a_triplet_stays_with_its_conversation(tmp_path: Path) -> None:
    rows = planted.clean()
    for number, triplet in enumerate(rows.dpo):
        triplet["prompt"] = rows.said(2 * number, 0)
    files = json.loads(call("data", "split", rows.write(tmp_path), "--validation", "0.3", "--json").stdout)["files"]
    lines = {name: [json.loads(line) for line in Path(path).read_text().splitlines()] for name, path in files.items()}
    held = {row["messages"][0]["content"] for row in lines["sft.validation"]}
    assert held.isdisjoint(row["prompt"] for row in lines["dpo.train"])
    assert held.isdisjoint(row["messages"][0]["content"] for row in lines["sft.train"])


def test_prompt_for_rewards_stays_with_its_conversation(tmp_path: Path) -> None:
    rows = planted.clean()
    path = rows.write(tmp_path, REWARDED)
    prompts = [
        {"prompt": rows.said(number, 0), "reference": rows.said(number, 1), "aspect": "balie"} for number in range(0, 80, 2)
    ]
    tiny_recipe.write_lines(tmp_path / "grpo.jsonl", prompts)
    result = call("data", "split", path, "--validation", "0.3", "--json")
    files = json.loads(result.stdout)["files"]
    lines = {name: [json.loads(line) for line in Path(path).read_text().splitlines()] for name, path in files.items()}
    held = {row["messages"][0]["content"] for row in lines["sft.validation"]}
    assert held.isdisjoint(row["prompt"] for row in lines["grpo.train"])
    assert sorted(lines["grpo.train"] + lines["grpo.validation"], key=str) == sorted(prompts, key=str)
    said = call("data", "split", path, "--validation", "0.3").stdout
    assert 'grpo = "grpo.train.jsonl"' in said


def test_prompts_all_alike_are_divided_by_their_references(tmp_path: Path) -> None:
    """Labels repeat, as instructions do; read again, a row has the columns that it had."""
    path = planted.clean().write(tmp_path, REWARDED.replace("grpo.jsonl", "grpo.txt"))
    writer = planted.Writer(3)
    (tmp_path / "grpo.txt").write_text("".join(f"__label__LAGE:positiv {writer.two(planted.DUTCH)}\n" for _ in range(30)))
    result = json.loads(call("data", "split", path, "--json").stdout)
    assert result["figures"]["grpo"]["validation_rows"] == 3
    train = Path(result["files"]["grpo.train"])
    sets = ("--set", f"data.grpo={train}", "--json")
    artifacts = [json.loads(call("data", "check", path, *more).stdout)["artifact"] for more in (("--json",), sets)]
    first, again = ([row["columns"] for row in check.read_rows(Path(each), "grpo")] for each in artifacts)
    assert len(again) == 27
    assert all(row in first for row in again)
    assert again[0]["polarities"] == "positiv"


def test_rows_are_written_as_they_were_read(tmp_path: Path) -> None:
    rows = planted.clean()
    rows.sft[6]["messages"][0]["role"] = " user"
    rows.dpo[6]["language"] = "nl"
    path = rows.write(tmp_path)
    source = (tmp_path / "sft.jsonl").read_bytes()
    (tmp_path / "sft.jsonl").write_bytes(b"\xef\xbb\xbf" + source.replace(b"\n", b"\r\n") + b"\nnonsense\n")
    result = call("data", "split", path, "--json")
    files = json.loads(result.stdout)["files"]
    for kind in ("sft", "dpo"):
        written = [Path(files[f"{kind}.{part}"]).read_text().splitlines() for part in ("train", "validation")]
        expected = source.decode().splitlines() if kind == "sft" else (tmp_path / "dpo.jsonl").read_text().splitlines()
        assert Counter(written[0] + written[1]) == Counter(expected)
        assert written[0] == [line for line in expected if line in set(written[0])]  # in their order
    assert "in neither file: 1 that" in result.stderr


def _pairs(words: str, rows: int) -> list[dict[str, str]]:
    writer = planted.Writer(7)
    return [{"vraag": writer.sentence(words), "antwoord": writer.two(words), "bron": "balie"} for _ in range(rows)]


@pytest.mark.parametrize("kind", ["one line", "comma separated", "labels"])
def test_files_that_are_no_json_lines_keep_their_columns(tmp_path: Path, kind: str) -> None:
    pairs = _pairs(planted.DUTCH, 30)
    recipe = planted.RECIPE.replace('phases = ["sft", "dpo"]', 'phases = ["sft"]')
    columns = '\n[data.columns.sft]\nprompt = "vraag"\ncompletion = "antwoord"\n'
    if kind == "one line":
        name, text = "sft.json", json.dumps(pairs)
    elif kind == "comma separated":
        name = "sft.csv"
        text = "vraag,antwoord,bron\n" + "".join(f"{','.join(pair.values())}\n" for pair in pairs)
    else:
        name, columns = "sft.txt", ""
        text = "".join(f"__label__{pair['vraag'][:12].replace(' ', '_')}:positive {pair['antwoord']}\n" for pair in pairs)
    path = planted.clean().write(tmp_path, recipe.replace('sft = "sft.jsonl"', f'sft = "{name}"') + columns)
    (tmp_path / name).write_text(text)
    files = json.loads(call("data", "split", path, "--validation", "0.2", "--json").stdout)["files"]
    written = [json.loads(line) for file in files.values() for line in Path(file).read_text().splitlines()]
    if kind == "labels":
        assert sorted(row["messages"][1]["content"] for row in written) == sorted(pair["antwoord"] for pair in pairs)
    else:
        assert sorted(written, key=str) == sorted(pairs, key=str)
    halves = f"data.sft={files['sft.train']}", f"data.heldout={files['sft.validation']}"
    again = json.loads(call("data", "check", path, "--json", "--set", halves[0], "--set", halves[1]).stdout)
    assert sum(again["results"]["rows"][name] for name in ("sft", "heldout")) == 30


def test_what_it_says_to_type_next_can_be_typed(tmp_path: Path) -> None:
    path = planted.clean().write(tmp_path / "my recipe")
    result = call("data", "split", path)
    assert 'sft = "sft.train.jsonl"\nheldout = "sft.validation.jsonl"\ndpo = "dpo.train.jsonl"' in result.stdout
    *_, command = result.stdout.strip().splitlines()
    _, _, *arguments = shlex.split(command)
    assert command.startswith("appliance run ")
    checked = json.loads(call("data", "check", *arguments, "--json").stdout)
    assert checked["results"]["rows"]["sft"] + checked["results"]["rows"]["heldout"] == 80
    audited = json.loads(call("data", "audit", *arguments, "--json").stdout)
    assert "heldout_leaks" not in {finding["kind"] for finding in audited["findings"]}


def test_nothing_is_overwritten_in_silence(tmp_path: Path, root: Path) -> None:
    path = planted.clean().write(tmp_path)
    assert json.loads(call("data", "split", path, "--dry-run", "--json").stdout)["state"] == "to make"
    assert not (tmp_path / "sft.train.jsonl").exists()
    assert not root.exists()
    assert json.loads(call("data", "split", path, "--json").stdout)["state"] == "made"
    assert json.loads(call("data", "split", path, "--json").stdout)["state"] == "unchanged"
    before = (tmp_path / "sft.train.jsonl").read_bytes()
    refused = call("data", "split", path, "--seed", "1")
    assert refused.exit_code == 1
    assert "sft.train.jsonl" in refused.stderr
    assert "--force replaces them" in refused.stderr
    assert (tmp_path / "sft.train.jsonl").read_bytes() == before
    assert json.loads(call("data", "split", path, "--seed", "1", "--force", "--json").stdout)["state"] == "made"
    assert (tmp_path / "sft.train.jsonl").read_bytes() != before


def test_recipe_that_holds_rows_out_is_refused(tmp_path: Path) -> None:
    rows = planted.clean()
    rows.heldout = rows.sft[:1]
    result = call("data", "split", rows.write(tmp_path))
    assert result.exit_code == 2
    assert "data.heldout is" in result.stderr


def test_rows_all_alike_cannot_be_divided(tmp_path: Path) -> None:
    turns = [("Waar is de balie van het opvanghuis?", f"Antwoord {number}.") for number in range(20)]
    path = tiny_recipe.write(tmp_path)
    tiny_recipe.write_lines(tmp_path / "sft.jsonl", [{"messages": tiny_recipe.messages(each)} for each in turns])
    result = call("data", "split", path, "--set", 'phases=["sft"]')
    assert result.exit_code == 1
    assert "near-duplicates stay together" in result.stderr
    assert not list(tmp_path.glob("*.train.jsonl"))


def test_files_of_one_name_in_two_folders(tmp_path: Path) -> None:
    path = planted.clean().write(tmp_path)
    for name in ("sft", "dpo"):
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}.jsonl").rename(tmp_path / name / "rows.jsonl")
    sets = [part for name in ("sft", "dpo") for part in ("--set", f"data.{name}={tmp_path / name / 'rows.jsonl'}")]
    files = json.loads(call("data", "split", path, *sets, "--json").stdout)["files"]
    assert sorted(Path(each).name for each in files.values()) == [
        f"{kind}.{part}.jsonl" for kind in ("dpo", "sft") for part in ("train", "validation")
    ]


@pytest.mark.parametrize("share", ["0", "0.6", "-1"])
def test_share_is_checked(tmp_path: Path, share: str) -> None:
    assert call("data", "split", planted.clean().write(tmp_path), "--validation", share).exit_code == 2
