"""`appliance runs`, the page and the card of a run, and its lock file, from which it is repeated to the byte."""

import dataclasses
import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from markupsafe import escape

from appliance import artifacts
from appliance import recipe as recipes
from appliance.findings import Finding
from appliance.training import curve, labels, lock, run_files, samples
from appliance.training import model as models
from tests import tiny_recipe
from tests.running import Trained, call
from tests.training.test_diagnose import spiked


@pytest.fixture
def in_trained(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> Trained:
    monkeypatch.setenv("APPLIANCE_ARTIFACTS", str(trained.root))
    return trained


def output(*arguments: str | Path) -> dict[str, Any]:
    result = call(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    parsed: dict[str, Any] = json.loads(result.stdout)
    return parsed


def unfinished(root: Path) -> Path:
    """A run that trains now: its curve, with a line that is being written."""
    folder = root / "adapter" / f"mine-sft-0123456789ab{artifacts.PARTIAL}"
    folder.mkdir(parents=True)
    names = {"gradient_norm": "grad_norm"}
    lines = [
        {names.get(name, name): value for name in point.__slots__ if (value := getattr(point, name)) not in (None, ())}
        for point in spiked(0)[:200]
    ]
    (folder / curve.LOSS).write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 201, "lo')
    return folder


def test_list_says_what_was_trained(in_trained: Trained) -> None:
    runs = output("runs", "list")["runs"]
    assert [run["phase"] for run in runs] == ["sft", "dpo"]
    for run, step in zip(runs, ("sft", "dpo"), strict=True):
        results = in_trained.manifest(step)["results"]
        assert run["name"] == in_trained.made[step].name
        assert (run["rows"], run["steps"], run["final_loss"]) == (results["rows"], results["steps"], results["final_loss"])
        assert run["seconds"] > 0
        assert run["state"] == "finished"
        assert run["machine"].startswith("cpu (")
    text = call("runs", "list").stdout
    assert in_trained.made["dpo"].name in text


def test_list_of_nothing_says_how_to_begin() -> None:
    assert "No training runs in" in call("runs", "list").stdout
    assert output("runs", "list")["runs"] == []


def test_unfinished_run_is_listed_and_diagnosed(root: Path) -> None:
    folder = unfinished(root)
    (run,) = output("runs", "list")["runs"]
    assert (run["name"], run["phase"], run["state"], run["steps"]) == ("mine-sft-0123456789ab", "sft", "unfinished", 200)
    for name in (run["name"], f"adapter/{run['name']}", str(folder)):
        said = output("runs", "diagnose", name)
        assert [finding["kind"] for finding in said["findings"]] == ["spike"]
        assert said["findings"][0]["examples"] == ["step 150 (loss 4.500, gradient norm 38, rows 17, 203)"]
    assert "step 150" in call("runs", "diagnose", run["name"]).stdout


def test_diagnosis_of_a_finished_run(in_trained: Trained) -> None:
    said = output("runs", "diagnose", in_trained.made["sft"].name)
    assert said["state"] == "finished"
    assert "In 30 steps the loss went from" in said["summary"]
    assert said["page"].endswith("run.html")


def test_run_is_found_from_its_own_folder(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = unfinished(root)
    for here, name in ((folder, "."), (folder / "..", folder.name), (Path("/"), str(folder))):
        monkeypatch.chdir(here)
        assert output("runs", "diagnose", name)["run"] == "mine-sft-0123456789ab"
    assert "There is no training run /" in call("runs", "diagnose", "/").stderr


def rewarded(root: Path) -> Path:
    """A run of GRPO whose reward rises from 0.2 to 0.6, with what was said of its rewards."""
    folder = root / "adapter" / "mine-grpo-0123456789ab"
    folder.mkdir(parents=True)
    lines: list[dict[str, Any]] = [
        {"step": step, "loss": 0.01 * (-1) ** step, "reward": 0.2 + 0.4 * (step > 50) + 0.02 * (-1) ** step}
        for step in range(1, 101)
    ]
    for line in lines:
        line |= {"rewards/length/mean": line["reward"], "rewards/length/std": 0.1, "frac_reward_zero_std": 0.0}
    (folder / curve.LOSS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = asdict(Finding("keyword_stuffing", "notice", "length gives <words> as much", "Bound it."))
    (folder / run_files.REWARD_FINDINGS).write_text(json.dumps([said]))
    return folder


def test_run_of_grpo_is_told_by_its_rewards(root: Path) -> None:
    said = output("runs", "diagnose", rewarded(root).name)
    assert said["summary"] == "In 100 steps the mean reward went from 0.200 (first fifth) to 0.600 (last fifth)."
    assert said["findings"] == []
    assert run_files.NOTHING_OF_REWARDS in call("runs", "diagnose", said["run"]).stdout
    assert "  reward 0.62  " in call("runs", "list").stdout


def test_page_of_grpo_shows_its_rewards_and_what_was_said_of_them(root: Path) -> None:
    recipe = {
        "base": "starter",
        "seed": 1,
        "lora": {"rank": 4},
        "grpo": {"beta": 0.1, "rewards": {"length": {"weight": 0.5}}},
    }
    recipe["grpo"]["rewards"] |= {"readability": None, "own": []}  # type: ignore[index]
    page = run_files.page(rewarded(root), "mine-grpo", {"recipe": recipe, "phase": "grpo"}, {"reward_last": 0.600001})
    assert page.count(">median of 10 steps<") == 2  # of loss and reward
    for shown in (
        "Each reward, before its weight, by step",
        "length gives &lt;words&gt; as much",
        ">grpo.rewards.length.weight<",
    ):
        assert shown in page
    assert '<td class="number">0.6</td>' in page
    assert "readability" not in page
    assert "grpo.rewards.own" not in page


def test_unknown_run_is_refused() -> None:
    result = call("runs", "diagnose", "nosuch")
    assert result.exit_code == 1
    assert "`appliance runs list` says which there are" in result.stderr
    assert call("runs", "compare", "one").exit_code == 2


def test_compare_shows_what_differs(in_trained: Trained, tmp_path: Path) -> None:
    names = [in_trained.made[step].name for step in ("sft", "dpo")]
    page = tmp_path / "compared.html"
    said = output("runs", "compare", *names, "--html", page)
    assert said["figures"]["steps"] == [in_trained.manifest(step)["results"]["steps"] for step in ("sft", "dpo")]
    assert said["figures"]["accuracy_after"] == [None, in_trained.manifest("dpo")["results"]["accuracy_after"]]
    assert said["settings"] == {}  # one recipe: nothing differs but the phase
    text = page.read_text()
    assert "<svg" in text
    assert all(name in text for name in names)
    assert "exists; name another file, or pass --force" in call("runs", "compare", *names, "--html", page).stderr
    assert call("runs", "compare", *names, "--html", page, "--force").exit_code == 0


def test_compare_names_a_setting_that_differs(in_trained: Trained, root: Path) -> None:
    in_trained.copy(root, "sft")
    other = root / "adapter" / "other-sft-0123456789ab"
    (root / "adapter" / in_trained.made["sft"].name).rename(other)
    locked = json.loads((other / lock.LOCK).read_text())
    locked["recipe"]["sft"]["learning_rate"] = 1e-4
    locked["recipe"]["data"]["columns"]["sft"] = {"prompt": "q", "completion": "a"}
    locked["recipe"]["data"]["sft"] = "/elsewhere/sft.jsonl"
    (other / lock.LOCK).write_text(json.dumps(locked))
    assert output("runs", "compare", in_trained.made["sft"].name, other)["settings"] == {
        "data.columns.sft.completion": [None, "a"],
        "data.columns.sft.prompt": [None, "q"],
        "sft.learning_rate": [5e-3, 1e-4],
    }


def test_compared_columns_stand_below_each_other(root: Path) -> None:
    first = rewarded(root)
    other = shutil.copytree(first, first.with_name("other-grpo-0123456789ab"))
    for folder, base in ((first, "/a/long/path/to/some/model/of/another/recipe"), (other, "starter")):
        (folder / lock.LOCK).write_text(json.dumps({"recipe": {"base": base}}))
    head, line = call("runs", "compare", first.name, other.name).stdout.splitlines()
    assert head.index(other.name) == line.index("starter")


@pytest.mark.parametrize("step", ["sft", "dpo"])
def test_page_and_card_of_a_run(trained: Trained, step: str) -> None:
    page = (trained.made[step] / run_files.REPORT).read_text()
    for word in (
        "What the curve says",
        "Gradient norm, by step",
        "Learning rate, by step",
        "Most memory held",
        "before: the base",
    ):
        assert word in page
    assert not re.search(r"""(src|href)=["']?(https?:)?//|<script""", page)  # it asks nothing of any other place
    assert ("rewards/margins" in page) == (step == "dpo")
    card = (trained.made[step] / run_files.CARD).read_text()
    assert card.startswith('---\nlibrary_name: peft\nbase_model: "starter"\n')
    assert f"# tiny, {step}" in card
    assert "6 sft, 4 dpo" in card
    assert "## How it was verified" in card
    assert f"{step}.learning_rate" in card


def test_page_and_card_name_files_and_no_folders(trained: Trained) -> None:
    locked = json.loads((trained.made["sft"] / lock.LOCK).read_text())
    rewards = {"own": [{"function": "/home/me/recipe/mine:f"}], "sentiment_match": {"encoder": "/home/me/encoder/mood"}}
    locked["recipe"] |= {"base": "/home/me/base/large", "grpo": {"adapter": "/home/me/first", "rewards": rewards}}
    locked |= {"phase": "grpo", "base": {**locked["base"], "name": "/home/me/base/large"}}
    card = run_files.card(trained.made["sft"], locked, {}, {})
    page = run_files.page(trained.made["sft"], "title", locked, {})
    for text in (card, page):
        assert "/home/me" not in text
        assert all(name in text for name in ("mine:f", "mood", "first", "large"))
    assert str(trained.root) not in (trained.made["sft"] / run_files.CARD).read_text()


def test_sample_question_holds_no_personal_data() -> None:
    """The middle row would be taken, and the one before it."""
    private = ("How do I reach you, I am at jan@lindekade.example?", "Write to the desk, please, in the morning.")
    called = ("Who do I call about the room, please?", "You can call the desk: +31 20 794 0123, in the morning.")
    fine = ("When is the desk open on Sundays?", "The desk is open in the afternoon on Sundays.")
    rows = [{"messages": tiny_recipe.messages(turns)} for turns in (fine, private, called)]
    assert [each.question for each in samples._questions(rows, ["en"])] == [fine[0]]
    assert samples._questions(rows[1:], ["en"]) == []


def test_report_shows_one_row_with_what_is_learned_of_it(trained: Trained) -> None:
    folder = trained.made["sft"]
    row = json.loads((folder / samples.LEARNED).read_text())
    rows = [json.loads(line) for line in (trained.made["data"] / "sft.jsonl").read_text().splitlines()]
    (shown,) = (each["messages"] for each in rows if each["line"] == row["line"])
    learned = [each["text"].removesuffix("<|im_end|>") for each in row["pieces"] if each["is_learned"]]
    assert learned == [each["content"] for each in shown if each["role"] == "assistant"]
    questions = [each["content"] for each in shown if each["role"] == "user"]
    others = [each["text"] for each in row["pieces"] if not each["is_learned"]]
    assert all(question in other for question, other in zip(questions, others, strict=False))
    page = (folder / run_files.REPORT).read_text()
    assert "What is learned of a row" in page
    assert str(escape(learned[0])) in page


def test_row_with_personal_data_is_not_shown(trained: Trained, tmp_path: Path) -> None:
    tokenizer = models.load_tokenizer(trained.made["base"])
    turns = tiny_recipe.messages(("Wie?", "Bel 06 12345678 of schrijf naar jan@example.org."))
    labelled = labels.label_conversations(tokenizer, [{"line": 1, "messages": turns}], None)
    samples.write_learned(tokenizer, labelled, recipes.load(trained.recipe), tmp_path)
    assert not (tmp_path / samples.LEARNED).exists()


def test_card_says_what_the_audit_found(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "`appliance data audit RECIPE` does it" in (trained.made["sft"] / run_files.CARD).read_text()
    assert run_files.in_brief([]) == "The audit of the data found nothing."
    monkeypatch.setenv("APPLIANCE_ARTIFACTS", str(tmp_path))
    recipe = tiny_recipe.write(tmp_path / "recipe")
    rows = recipe.with_name("sft.jsonl")
    rows.write_text(rows.read_text() * 2)  # each twice
    flags = ("--set", f"base={trained.made['base']}")
    audited = json.loads(call("data", "audit", recipe, *flags, "--json").stdout)
    assert audited["findings"]
    made = json.loads(call("train", recipe, "--phase", "sft", *flags, "--set", "sft.epochs=1", "--json").stdout)
    card = (Path(made["artifact"]) / run_files.CARD).read_text()
    for finding in audited["findings"]:
        assert f"- {finding['level']}: {finding['what']}" in card
        assert not any(example in card for example in finding["examples"])


def test_lock_names_everything_that_decided(trained: Trained) -> None:
    locked = json.loads((trained.made["dpo"] / lock.LOCK).read_text())
    data = artifacts.load(trained.made["data"]).manifest["inputs"]["files"]
    assert locked["data"] == data
    assert locked["recipe"]["dpo"]["beta"] == 0.1
    assert locked["versions"]["torch"]
    assert locked["versions"]["trl"]
    assert "model.safetensors" in locked["base"]["files"]
    weights = trained.made["dpo"] / lock.WEIGHTS
    assert locked["weights_sha256"] == artifacts.digest_file(weights)
    assert lock.code_digest() == locked["code_sha256"]


def test_run_is_repeated_from_its_lock_file(trained: Trained, root: Path) -> None:
    trained.copy(root, "data", "base")  # what the run before it made; the adapter is trained again
    result = call("train", "--from-lock", trained.made["sft"], "--json")
    assert result.exit_code == 0, result.stderr
    said = json.loads(result.stdout)
    assert said["same_weights"] is True
    assert "is the same, to the byte, as" in result.stderr
    again = root / trained.made["sft"].relative_to(trained.root)
    assert (again / lock.WEIGHTS).read_bytes() == (trained.made["sft"] / lock.WEIGHTS).read_bytes()
    assert (again / lock.LOCK).read_bytes() == (trained.made["sft"] / lock.LOCK).read_bytes()


def test_lock_file_of_other_data_is_refused(trained: Trained, tmp_path: Path) -> None:
    other = tmp_path / "sft.jsonl"
    other.write_text((trained.recipe.parent / "sft.jsonl").read_text() + "\n")
    file = trained.made["sft"] / lock.LOCK
    result = call("train", "--from-lock", file, "--set", f"data.sft={other}")
    assert result.exit_code == 1
    assert "is another: sha256" in result.stderr
    assert "--set data.sft=FILE" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--from-lock", "nowhere.json"), 1, "nowhere.json does not exist"),
        (("recipe.toml", "--from-lock", "run.lock.json"), 2, "give neither a RECIPE nor a --phase"),
        ((), 2, "Missing argument 'RECIPE'"),
    ],
)
def test_what_cannot_be_repeated(arguments: tuple[str, ...], code: int, said: str) -> None:
    result = call("train", *arguments)
    assert result.exit_code == code
    assert said in result.stderr


def test_lock_file_of_elsewhere_says_what_differs(trained: Trained) -> None:
    file = lock.read(trained.made["sft"], ())
    identity = identity_of(trained, "sft")
    assert lock.differences(file, identity) == []
    changed = {**file.written, "versions": {**file.written["versions"], "torch": "0.1"}, "code_sha256": "0"}
    said = lock.differences(lock.Lock(file.path, changed, file.recipe), identity)
    assert any(each.endswith("(locked 0.1)") for each in said)
    assert any("the appliance's code" in each for each in said)
    assert not any("what is trained" in each for each in said)
    parents = [identity.parents[0], "base/another-0123456789ab"]
    said = lock.differences(file, dataclasses.replace(identity, parents=parents))
    assert said == [f"what is trained: from base/another-0123456789ab (locked {identity.parents[1]})"]
    said = lock.differences(file, dataclasses.replace(identity, config={}))
    assert said == ["what is trained: its settings, or the revision of its phase"]


def identity_of(trained: Trained, phase: str) -> artifacts.Plan:
    manifest = trained.manifest(phase)
    wanted = {key: manifest[key] for key in ("kind", "name", "inputs", "parents", "config")}
    return artifacts.Plan(**wanted)
