"""GRPO continues the adapter before it and raises the reward; resuming and refusals are those of every phase."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from appliance import artifacts
from appliance import recipe as recipes
from appliance.artifacts import digest_of
from appliance.errors import RecipeError
from appliance.training import adapters, grpo, lock, loop, prompts, run_files, rungs
from appliance.training.rewards import reward as rewarding
from appliance.training.rewards.reward import Reward
from tests import tiny_recipe
from tests.running import call, run
from tests.training.test_resume import kill_at_random

RECIPE = (
    tiny_recipe.RECIPE.replace('dpo = "dpo.jsonl"\n', 'grpo = "grpo.jsonl"\n')
    .replace('languages = ["nl", "en"]', 'languages = ["nl", "en"]\nphases = ["sft", "grpo"]')
    # What is learned by heart is answered in one way, and a group of equal answers has no spread.
    .replace("[sft]\nepochs = 10", "[sft]\nepochs = 3")
    + """
[grpo]
epochs = 10
learning_rate = 3e-3
batch_rows = 8
accumulate = 2
answers = 8
answer_tokens = 16
max_tokens = 128
beta = 0.01
checkpoint_steps = 5

[grpo.rewards.length]
weight = 0.1
least_words = 1
most_words = 100

[[grpo.rewards.own]]
function = "mine:many_e"
"""
)
MINE = """
def many_e(completions, wanted, **_):
    texts = [each[0]["content"].lower() for each in completions]
    return [text.count(letter) / (2 + len(text)) for text, letter in zip(texts, wanted, strict=True)]
"""
ROWS = [
    {"prompt": tiny_recipe.messages(turns[:1]), "reference": turns[1], "wanted": "e"} for turns in tiny_recipe.CONVERSATIONS
]


def write(folder: Path, recipe: str = RECIPE, mine: str = MINE) -> Path:
    path = tiny_recipe.write(folder, recipe)
    tiny_recipe.write_lines(folder / "grpo.jsonl", ROWS)
    (folder / "mine.py").write_text(mine)
    return path


@dataclasses.dataclass(frozen=True, slots=True)
class Tuned:
    root: Path
    recipe: Path
    grpo: Path
    said: str

    def copy(self, root: Path, *, with_grpo: bool = False) -> None:
        """All artifacts but those of GRPO; a test may change them."""
        ignored = () if with_grpo else ("tiny-grpo-*",)
        shutil.copytree(self.root, root, ignore=shutil.ignore_patterns(*ignored))

    def results(self) -> dict[str, Any]:
        return dict(artifacts.load(self.grpo).results)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    """The tiny recipe trained by SFT and GRPO; nobody may change it."""
    folder = tmp_path_factory.mktemp("tuned")
    root, path = folder / "artifacts", write(folder / "recipe")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("APPLIANCE_ARTIFACTS", str(root))
        steps = (("data", "check", path), *(("train", path, "--phase", phase) for phase in ("base", "sft", "grpo")))
        for step in steps:
            result = call(*step, "--json")
            assert result.exit_code == 0, result.stderr
    return Tuned(root, path, Path(json.loads(result.stdout)["artifact"]), result.stderr)


def curve(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / loop.LOSS).read_text().splitlines()]


def weights(folder: Path) -> dict[str, str]:
    from safetensors.torch import load_file

    return {key: digest_of(value.tolist()) for key, value in load_file(folder / "adapter_model.safetensors").items()}


def test_reward_rises(tuned: Tuned) -> None:
    results = tuned.results()
    assert results["steps"] == 30  # 10 times 6 prompts, two a step
    assert results["reward_last"] > 1.3 * results["reward_first"]
    own = results["rewards"]["mine:many_e"]
    assert own["last"] > 1.5 * own["first"]
    assert 0 <= results["flat_groups"] < 0.5
    assert results["reward_spread"] > 0


def test_curve_has_each_reward(tuned: Tuned) -> None:
    points = curve(tuned.grpo)
    assert [point["step"] for point in points] == list(range(1, 31))
    names = {"reward", "reward_std", "frac_reward_zero_std", "rewards/length/mean", "rewards/mine:many_e/std", "kl"}
    assert all(names <= point.keys() for point in points)
    whole = points[0]["rewards/mine:many_e/mean"] + 0.1 * points[0]["rewards/length/mean"]
    assert points[0]["reward"] == pytest.approx(whole, abs=1e-5)
    assert (tuned.grpo / "reward.png").read_bytes().startswith(b"\x89PNG")


def test_artifact_holds_one_adapter_and_no_checkpoint(tuned: Tuned) -> None:
    assert {each.name for each in tuned.grpo.iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "README.md", "manifest.json"),
        *("loss.jsonl", "loss.png", "reward.png", "samples.json", grpo.FINDINGS, run_files.REPORT, lock.LOCK),
    }
    findings = json.loads((tuned.grpo / grpo.FINDINGS).read_text())
    assert len(findings) == tuned.results()["findings"]


def test_it_starts_from_the_adapter_of_sft(tuned: Tuned) -> None:
    """As it is before the first step, by hash; what is kept is another."""
    from appliance.training.model import Base

    sft, base = (next(path for path in tuned.root.glob(each) if path.is_dir()) for each in ("adapter/tiny-sft-*", "base/*"))
    model = adapters.continued(Base(base, ""), sft, rungs.CPU[0])
    loaded = {
        key.replace(".default.", "."): digest_of(value.detach().tolist())
        for key, value in model.named_parameters()
        if ".default." in key
    }
    assert loaded == weights(sft) != weights(tuned.grpo)
    parents = artifacts.load(tuned.grpo).manifest["parents"]
    assert parents[1:] == [f"base/{base.name}", f"adapter/{sft.name}"]


def test_each_phase_starts_from_the_adapter_of_the_one_before(
    tuned: Tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SFT, DPO, GRPO: what is loaded, by hash, is what was saved, and each phase changes it."""
    text = RECIPE.replace('phases = ["sft", "grpo"]', 'phases = ["sft", "dpo", "grpo"]')
    path = write(tmp_path / "recipe", text.replace('sft = "sft.jsonl"', 'sft = "sft.jsonl"\ndpo = "dpo.jsonl"'))
    loaded: list[dict[str, str]] = []
    real = adapters.continued

    def watched(*arguments: Any) -> Any:
        model = real(*arguments)
        own = {key: value for key, value in model.named_parameters() if ".default." in key}
        loaded.append({key.replace(".default.", "."): digest_of(value.detach().tolist()) for key, value in own.items()})
        return model

    monkeypatch.setattr(adapters, "continued", watched)
    made = {}
    epochs = [part for phase in ("sft", "dpo", "grpo") for part in ("--set", f"{phase}.epochs=1")]
    for phase in ("sft", "dpo", "grpo"):
        base = next(tuned.root.glob("base/*"))
        result = call("train", path, "--phase", phase, "--set", f"base={base}", *epochs, "--json")
        assert result.exit_code == 0, result.stderr
        made[phase] = Path(json.loads(result.stdout)["artifact"])
    assert loaded == [weights(made["sft"]), weights(made["dpo"])]
    assert len({digest_of(weights(folder)) for folder in made.values()}) == 3
    for phase, before in (("dpo", "sft"), ("grpo", "dpo")):
        assert artifacts.load(made[phase]).manifest["parents"][-1] == f"adapter/{made[before].name}"


def test_pipeline_trains_it_after_the_others(tuned: Tuned) -> None:
    result = call("run", tuned.recipe, "--dry-run", "--json")
    assert result.exit_code == 0, result.stderr
    steps = [step["step"] for step in json.loads(result.stdout)["steps"]]
    assert steps[steps.index("sft") :][:3] == ["sft", "grpo", "merge"]


def test_first_loss_is_that_of_equal_models(tuned: Tuned) -> None:
    """The policy is its own reference at the first step, so nothing draws it back."""
    assert curve(tuned.grpo)[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert curve(tuned.grpo)[-1]["kl"] > 0.001


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes the first run end as by Ctrl-C right after the checkpoint of a step."""
    real = loop._callback

    def at(step: int) -> None:
        def stopping(*arguments: Any) -> Any:
            watch = real(*arguments)
            save = watch.on_save

            def on_save(args: Any, state: Any, control: Any, **others: Any) -> None:
                save(args, state, control, **others)
                if state.global_step == step:
                    monkeypatch.setattr(loop, "_callback", real)
                    raise KeyboardInterrupt

            watch.on_save = on_save
            return watch

        monkeypatch.setattr(loop, "_callback", stopping)

    return at


def test_resumed_equals_uninterrupted(tuned: Tuned, root: Path, interrupt: Callable[[int], None]) -> None:
    """In the middle of an epoch: answers are sampled, so that chance must go on where it was."""
    tuned.copy(root)
    interrupt(10)
    assert call("train", tuned.recipe, "--phase", "grpo").exit_code == 130
    refused = call("train", tuned.recipe, "--phase", "grpo")
    assert refused.exit_code == 1
    assert "pass --resume, or --restart" in refused.stderr
    resumed = call("train", tuned.recipe, "--phase", "grpo", "--resume")
    assert resumed.exit_code == 0, resumed.stderr
    assert "continuing after step 10" in resumed.stderr
    again = root / tuned.grpo.relative_to(tuned.root)
    for name in ("adapter_model.safetensors", "samples.json", grpo.FINDINGS, "reward.png"):
        assert (again / name).read_bytes() == (tuned.grpo / name).read_bytes(), name
    keys = ("step", "loss", "reward", "reward_std", "kl")
    pairs = [[[point[key] for key in keys] for point in curve(folder)] for folder in (again, tuned.grpo)]
    assert pairs[0] == pairs[1]
    assert artifacts.load(again).results == tuned.results()


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed_equals_uninterrupted(tuned: Tuned, root: Path) -> None:
    tuned.copy(root)
    arguments = (tuned.recipe, "--phase", "grpo")
    moments = kill_at_random(root, root / "adapter" / f"{tuned.grpo.name}{artifacts.PARTIAL}", 30, *arguments)
    resumed = run(root, "train", *arguments, "--resume")
    assert resumed.returncode == 0, (moments, resumed.stderr)
    again = root / tuned.grpo.relative_to(tuned.root)
    assert (again / lock.WEIGHTS).read_bytes() == (tuned.grpo / lock.WEIGHTS).read_bytes(), moments
    assert artifacts.load(again).results == tuned.results()


def test_second_round_continues_its_own_adapter(tuned: Tuned, root: Path) -> None:
    tuned.copy(root, with_grpo=True)
    first = root / tuned.grpo.relative_to(tuned.root)
    sets = ("--set", f"grpo.adapter={first}", "--set", "grpo.epochs=2")
    result = call("train", tuned.recipe, "--phase", "grpo", *sets, "--json")
    assert result.exit_code == 0, result.stderr
    second = artifacts.load(Path(json.loads(result.stdout)["artifact"]))
    assert second.path != first
    assert second.manifest["parents"][-1] == f"adapter/{first.name}"
    # It begins where the first round ended, not where that began.
    assert second.results["reward_first"] > 1.2 * tuned.results()["reward_first"]
    assert curve(second.path)[0]["kl"] == pytest.approx(0, abs=1e-5)


def test_repeated_from_its_lock_file(tuned: Tuned, root: Path, tmp_path: Path) -> None:
    """To the byte, with the rewards and the adapter that were locked, and with no others."""
    tuned.copy(root, with_grpo=True)
    locked = json.loads((tuned.grpo / lock.LOCK).read_text())
    recipe = tmp_path / "recipe"
    shutil.copytree(tuned.recipe.parent, recipe)
    sft = next(root.glob(f"adapter/tiny-sft-*/{lock.WEIGHTS}")).parent
    sets = [
        f"grpo.adapter={sft}",
        f"grpo.rewards.own=[{{function='{recipe}/mine:many_e'}}]",
    ]
    arguments = [part for each in sets for part in ("--set", each)]
    made = call("train", recipe / "recipe.toml", "--phase", "grpo", *arguments, "--set", "grpo.epochs=1", "--json")
    assert made.exit_code == 0, made.stderr
    folder = Path(json.loads(made.stdout)["artifact"])
    written = json.loads((folder / lock.LOCK).read_text())
    assert written["rewards"]["mine:many_e"] == locked["rewards"]["mine:many_e"]
    assert written["adapter"] == artifacts.digest_file(sft / lock.WEIGHTS)
    assert "adapter" not in locked

    again = call("train", "--from-lock", folder, "--dry-run", "--json")
    assert again.exit_code == 0, again.stderr
    assert "differs here" not in again.stderr
    assert json.loads(again.stdout)["state"] == "unchanged"
    changed = call("train", "--from-lock", folder, "--dry-run", "--set", "grpo.beta=0.5")
    assert "differs here: what is trained: its settings" in changed.stderr
    (recipe / "mine.py").write_text(f"{MINE}\n# another\n")
    other = call("train", "--from-lock", folder, "--dry-run", "--set", f"grpo.adapter={tuned.grpo}")
    assert other.exit_code == 1
    assert "grpo.rewards.mine:many_e has function mine:many_e@" in other.stderr
    assert f"{tuned.grpo} is another: sha256" in other.stderr


def test_adapter_of_another_base_is_refused(tuned: Tuned, root: Path, tmp_path: Path) -> None:
    tuned.copy(root, with_grpo=True)
    other = root / "adapter" / "tiny-grpo-000000000000"
    shutil.copytree(root / tuned.grpo.relative_to(tuned.root), other)
    manifest = json.loads((other / artifacts.MANIFEST).read_text())
    manifest["parents"][1] = "base/another-000000000000"
    (other / artifacts.MANIFEST).write_text(json.dumps(manifest))
    for adapter, said in ((other, "was trained on another base"), (tmp_path, "is no adapter")):
        result = call("train", tuned.recipe, "--phase", "grpo", "--set", f"grpo.adapter={adapter}")
        assert result.exit_code == 1
        assert said in result.stderr


FIRST_ROW = """
def many_e(completions, reference, **_):
    words = set(reference[0].split())
    return [len(words & set(each[0]["content"].split())) / len(words) for each in completions]
"""


def test_known_mistake_is_refused_before_sft(tuned: Tuned, root: Path, tmp_path: Path) -> None:
    """A reward that holds all answers against the first row costs no hour of SFT."""
    tuned.copy(root)
    result = call("train", write(tmp_path / "again", mine=FIRST_ROW), "--phase", "sft", "--set", "sft.epochs=99")
    assert result.exit_code == 4, result.stderr
    assert "mine:many_e: " in result.stderr
    assert "as `answer[0]` does" in result.stderr


def test_too_long_prompt_is_said_before_sft(tuned: Tuned, root: Path) -> None:
    tuned.copy(root)
    result = call("train", tuned.recipe, "--phase", "sft", "--set", "grpo.max_tokens=20", "--set", "sft.epochs=99")
    assert result.exit_code == 1
    assert "grpo.jsonl line 1: " in result.stderr
    assert "an answer of 16 included, grpo.max_tokens = 20" in result.stderr


def test_another_text_of_a_reward_is_another_adapter(tuned: Tuned, tmp_path: Path) -> None:
    def planned(folder: str, mine: str) -> str:
        result = call("train", write(tmp_path / folder, mine=mine), "--phase", "grpo", "--dry-run", "--json")
        return str(json.loads(result.stdout)["artifact"])

    assert Path(planned("same", MINE)).name == tuned.grpo.name  # wherever the recipe lies
    assert planned("other", f"{MINE}\n") != planned("same", MINE)


def test_reward_reads_the_tokens(tuned: Tuned) -> None:
    """TRL's own text is what a tokenizer's parser leaves of an answer: without its thinking."""
    from appliance.training import model as models

    tokenizer = models.load_tokenizer(next(tuned.root.glob("base/*")))
    rows = rewarding.prompts([{"line": 1, "prompt": [], "reference": "a"}])
    score = grpo._function(
        Reward("itself", 1.0, lambda asked: [float("desk" in each.text) for each in asked]), rows, tokenizer
    )
    ids = tokenizer("the desk")["input_ids"]
    assert score(completions=[[{"content": "parsed"}]], completion_ids=[ids], row=[0]) == [1.0]


def test_every_prompt_comes_once_an_epoch() -> None:
    places = prompts.order(10, epochs=3, per_step=4, seed=7)
    assert len(places) == 32
    assert all(sorted(places[start : start + 10]) == list(range(10)) for start in (0, 10, 20))
    assert places[:10] != places[10:20]
    assert prompts.order(2, epochs=1, per_step=5, seed=7)[:2] in ([0, 1], [1, 0])
    assert len(prompts.order(2, epochs=1, per_step=5, seed=7)) == 5
    assert prompts.order(10, epochs=3, per_step=4, seed=7) == places


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (["grpo.answers=5"], "grpo.answers: a step of grpo.batch_rows = 8 times grpo.accumulate = 2 answers holds no whole"),
        (["grpo.answer_tokens=128"], "leaves no room for a prompt in grpo.max_tokens"),
        (['phases=["sft","grpo","dpo"]', "data.dpo=x"], "phases: they run in the order sft, dpo, grpo"),
        (["grpo.rewards.length.least_words=101"], "grpo.rewards.length.least_words: 101 exceeds most_words = 100"),
        (['grpo.rewards.own=[{function="a/mine:f"},{function="b/mine:f"}]'], "names mine:f twice, also if in two folders"),
        (["grpo.warmup_ratio=1.0"], "grpo.warmup_ratio: 1.0 is out of range"),
        (["sft.warmup_ratio=1.0"], "sft.warmup_ratio: 1.0 is out of range"),
        (["grpo.rewards.sentiment_match.weight=1"], "grpo.rewards.sentiment_match.encoder: missing"),
        (["grpo.rewards.lenght.weight=1"], "grpo.rewards.lenght: unknown key; did you mean 'length'?"),
        (["grpo.rewards.boolean_syntax.dialect=sql"], "'sql' is not one of 'lucene', 'pubmed', 'ovid'"),
        (["grpo.rewards.length.weight=0", "grpo.rewards.own=[]"], "grpo.rewards: names none with a weight"),
    ],
)
def test_recipe_that_contradicts_itself(tmp_path: Path, sets: list[str], said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipes.load(write(tmp_path), sets)
    assert said in str(caught.value)


def test_paths_of_rewards_are_relative_to_the_recipe(tmp_path: Path) -> None:
    text = f'{RECIPE}\n[grpo.rewards.sentiment_match]\nencoder = "mood"\n'
    loaded = recipes.load(write(tmp_path / "here", text))
    assert loaded.grpo.rewards.sentiment_match is not None
    assert loaded.grpo.rewards.sentiment_match.encoder == tmp_path / "here" / "mood"
    assert loaded.grpo.rewards.own[0].function == tmp_path / "here" / "mine:many_e"


def test_prompts_are_missing(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"data\.grpo: missing, and phases names 'grpo'"):
        recipes.load(write(tmp_path, RECIPE.replace('grpo = "grpo.jsonl"\n', "")))
