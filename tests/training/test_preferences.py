"""What DPO, KTO and ORPO learn from, that each continues the adapter of SFT, and what length alone explains."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from appliance import artifacts
from appliance import recipe as recipes
from appliance.data.check import read_rows
from appliance.errors import RecipeError
from appliance.training import adapters, judgements, kto, loop, orpo, preferences, rungs
from appliance.training import model as models
from appliance.training.labels import IGNORED
from appliance.training.model import Base
from appliance.training.preferences import Pair, Score, Triplets
from tests import tiny_recipe
from tests.running import Trained, call

JUDGED = [
    {"prompt": prompt, "completion": text, "label": is_good}
    for prompt, chosen, rejected in tiny_recipe.PREFERENCES
    for text, is_good in ((chosen, True), (rejected, False))
]


def pair(line: int, chosen: int, rejected: int) -> Pair:
    return Pair(line, [1], [2] * chosen, [3] * rejected, chosen > rejected, chosen < rejected)


@pytest.mark.parametrize(
    ("lengths", "longer", "by_length", "shorter"),
    [
        ([(4, 2), (4, 2), (4, 2), (2, 4)], 0.75, 0.75, {"accuracy_shorter_before": 1.0, "accuracy_shorter_after": 0.0}),
        ([(2, 4), (2, 4), (2, 4), (4, 2)], 0.25, 0.75, {"accuracy_shorter_before": 1 / 3, "accuracy_shorter_after": 2 / 3}),
        ([(4, 2), (3, 2), (2, 1), (3, 3)], 0.75, 0.75, {}),
    ],
)
def test_what_length_alone_explains(
    lengths: Sequence[tuple[int, int]], longer: float, by_length: float, shorter: dict[str, float]
) -> None:
    """Before, the model prefers the chosen answer of the last triplet only; after, of the first two."""
    pairs = [pair(line, *each) for line, each in enumerate(lengths)]

    def scores(preferred: Sequence[int]) -> list[Score]:
        per_token = [(-1.0, -2.0) if i in preferred else (-2.0, -1.0) for i in range(4)]
        return [Score(a * len(p.chosen), b * len(p.rejected)) for (a, b), p in zip(per_token, pairs, strict=True)]

    before = (0,) if shorter.get("accuracy_shorter_before") == 1 / 3 else (3,)
    results = preferences.compare(pairs, scores(before), scores((0, 1)))
    assert results["chosen_longer"] == longer
    assert results["accuracy_by_length"] == by_length
    assert {key: value for key, value in results.items() if "shorter" in key} == pytest.approx(shorter)
    said = Triplets([{}] * 4, pairs).said(results)
    assert f"length alone: {by_length:.0%}" in said
    assert ("where the chosen one is shorter" in said) == bool(shorter)


def test_neighbours_of_kto_are_of_different_prompts() -> None:
    triplets = [{"prompt": [], "chosen": f"good {i}", "rejected": f"bad {i}", "line": i} for i in range(9)]
    rows = kto.order(triplets, 1)
    assert sorted(row["completion"] for row in rows) == sorted(
        each[key] for each in triplets for key in ("chosen", "rejected")
    )
    assert all(row["label"] == row["completion"].startswith("good") for row in rows)
    batches = [rows[start : start + 4] for start in range(0, 16, 4)]
    assert all(len({row["line"] for row in batch}) == 4 for batch in batches)
    assert all(len({row["label"] for row in batch}) == 2 for batch in batches)
    assert rows == kto.order(triplets, 1) != kto.order(triplets, 2)


def test_orpo_is_given_the_checked_tokens(trained: Trained, root: Path) -> None:
    """And learns the chosen answer alone, whatever the prompt."""
    import torch

    recipe = recipes.load(trained.recipe, ['phases=["sft", "orpo"]', "orpo.beta=0.0", "orpo.max_tokens=256"])
    base = Base(trained.made["base"], "")
    tokenizer = models.load_tokenizer(base.path)
    triplets = preferences.read_checked(tokenizer, trained.made["data"], recipe, "orpo")
    loop.prepare()
    model = adapters.continued(base, trained.made["sft"], rungs.CPU[0])
    trainer = orpo.trainer(model, tokenizer, triplets, recipe, root, rungs.CPU[0])
    rows = [trainer.train_dataset[i] for i in (0, 2)]
    for row, each in zip(rows, (triplets.pairs[0], triplets.pairs[2]), strict=True):
        assert row["chosen_input_ids"] == [*each.prompt, *each.chosen]
        assert row["rejected_labels"] == [*[IGNORED] * len(each.prompt), *each.rejected]
    batch = trainer.data_collator(rows)
    with torch.no_grad():
        loss = float(trainer.compute_loss(model, batch))
        sums = [preferences.log_probability(model, each.prompt, each.chosen) for each in triplets.pairs[::2][:2]]
    tokens = sum(len(each.chosen) for each in triplets.pairs[::2][:2])
    assert loss == pytest.approx(-sum(sums) / tokens, rel=1e-4)
    frozen = [name for name, value in model.named_parameters() if ".ref." in name and not value.requires_grad]
    assert frozen
    assert not any(".ref." in name and value.requires_grad for name, value in model.named_parameters())


def made(root: Path, trained: Trained, phase: str, *sets: str) -> tuple[Path, str]:
    trained.copy(root, "data", "base")
    every = (
        f'phases=["sft", "{phase}"]',
        f"{phase}.epochs=6",
        f"{phase}.learning_rate=1e-3",
        f"{phase}.max_tokens=256",
        *sets,
    )
    flags = [flag for each in every for flag in ("--set", each)]
    sft = call("train", trained.recipe, "--phase", "sft", *flags)
    assert sft.exit_code == 0, sft.stderr
    result = call("train", trained.recipe, "--phase", phase, *flags, "--json")
    assert result.exit_code == 0, result.stderr
    return Path(json.loads(result.stdout)["artifact"]), result.stderr


@pytest.mark.parametrize("phase", ["kto", "orpo"])
def test_phase_continues_the_adapter_of_sft_and_prefers_the_chosen_answers(trained: Trained, root: Path, phase: str) -> None:
    folder, said = made(root, trained, phase)
    artifact = artifacts.load(folder)
    sft = next(name for name in artifact.manifest["parents"] if "-sft-" in name)
    results = artifact.results
    # ORPO moves odds by the token, and this counts whole answers.
    assert results["reward_accuracy"] >= {"kto": 1.0, "orpo": 0.75}[phase]
    assert results["margin_after_nats"] > results["margin_before_nats"]
    assert f"{phase}: chosen answer preferred in" in said
    assert "length alone: " in said
    lines = [json.loads(line) for line in (folder / loop.LOSS).read_text().splitlines()]
    assert all(line["rows"] and set(line["rows"]) <= {1, 2, 3, 4} for line in lines)
    if phase == "kto":
        assert lines[0]["loss"] == pytest.approx(0.5, abs=1e-3), "it does not start at its reference"
    assert (root / sft / "adapter_config.json").is_file()
    assert {each.name for each in folder.iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "README.md", "manifest.json"),
        *("loss.jsonl", "loss.png", "samples.json", "run.html", "run.lock.json"),
    }
    # What it was before, by the adapter of SFT on disk.
    tokenizer = models.load_tokenizer(trained.made["base"])
    pairs = preferences.tokenize(tokenizer, read_rows(trained.made["data"], "dpo"))
    model = adapters.continued(Base(trained.made["base"], ""), root / sft, rungs.CPU[0])
    before = preferences.score(model, pairs)
    assert preferences.compare(pairs, before, before)["margin_after_nats"] == pytest.approx(
        results["margin_before_nats"], abs=1e-4
    )


def test_kto_learns_from_judged_answers(trained: Trained, root: Path, tmp_path: Path) -> None:
    path = tiny_recipe.write(tmp_path / "judged", tiny_recipe.RECIPE.replace('dpo = "dpo.jsonl"', 'kto = "kto.jsonl"'))
    tiny_recipe.write_lines(path.parent / "kto.jsonl", JUDGED)
    base = trained.made["base"]
    sets = (
        f"base={base}",
        'phases=["sft", "kto"]',
        "sft.epochs=2",
        "kto.epochs=4",
        "kto.learning_rate=1e-3",
        "kto.accumulate=1",
    )
    flags = [flag for each in sets for flag in ("--set", each)]
    result = call("train", path, *flags)
    assert result.exit_code == 0, result.stderr
    (manifest,) = root.glob(f"adapter/*-kto-*/{artifacts.MANIFEST}")
    results = artifacts.load(manifest.parent).results
    assert results["rows"] == len(JUDGED)
    assert results["reward_accuracy"] == 1.0
    assert results["good_gain_nats"] > results["bad_gain_nats"]
    assert "wanted answers became likelier by" in result.stderr
    assert math.isclose(results["first_loss"], 0.5, abs_tol=1e-3)


def test_wanted_answers_are_held_against_unwanted_ones() -> None:
    rows = [{"label": label} for label in (True, False, True, False)]
    results = judgements.Judged(rows, []).compare([-1.0] * 4, [-0.5, -0.75, -1.0, -2.0])
    assert results == {"good_gain_nats": 0.25, "bad_gain_nats": -0.375, "reward_accuracy": 0.75}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([row for row in JUDGED if row["label"]], "all 4 answers have one label"),
        ([*JUDGED, {"prompt": "x", "completion": "desk " * 300, "label": True}], "kto.jsonl line 9: "),
    ],
)
def test_judged_answers_that_cannot_be_used_are_said_before_sft(
    trained: Trained, root: Path, tmp_path: Path, rows: Any, said: str
) -> None:
    path = tiny_recipe.write(tmp_path / "judged", tiny_recipe.RECIPE.replace('dpo = "dpo.jsonl"', 'kto = "kto.jsonl"'))
    tiny_recipe.write_lines(path.parent / "kto.jsonl", rows)
    sets = (f"base={trained.made['base']}", 'phases=["sft", "kto"]', "kto.max_tokens=256")
    result = call("train", path, "--phase", "sft", *[flag for each in sets for flag in ("--set", each)])
    assert result.exit_code == 1, result.stderr
    assert said in result.stderr
    assert not list(root.glob("adapter/*"))


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (['phases=["sft", "dpo", "kto"]'], "dpo and kto learn the same in different ways"),
        (['phases=["sft", "orpo"]', "data.kto=x.jsonl"], None),
        (['phases=["sft", "kto"]', "data.kto=x.jsonl"], "data.kto: KTO learns from this file or from the triplets"),
        (['phases=["sft", "kto"]', "kto.batch_rows=1"], "kto.batch_rows: 1 is out of range"),
        (['phases=["sft", "orpo"]', "orpo.max_tokens=300"], "orpo.max_tokens: 300 exceeds starter.context_tokens"),
        (['phases=["sft", "grpo", "orpo"]'], "they run in the order sft, orpo, grpo"),
    ],
)
def test_contradictions(trained: Trained, sets: list[str], said: str | None) -> None:
    limits = ["dpo.max_tokens=256", "kto.max_tokens=256", "orpo.max_tokens=256", *sets]
    if said is None:
        assert recipes.load(trained.recipe, limits).triplets is not None
        return
    with pytest.raises(RecipeError) as caught:
        recipes.load(trained.recipe, limits)
    assert said in str(caught.value)


def test_kto_needs_two_answers_in_each_process(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipes.load(
        trained.recipe, ['phases=["sft", "kto"]', "kto.max_tokens=256", "kto.batch_rows=2", "kto.accumulate=1"]
    )
    kto.check(recipe)
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(RecipeError, match=r"leaves each of 2 processes 1 answer at a time.*raise it to 4"):
        kto.check(recipe)


def test_judged_rows_are_given_with_their_lines() -> None:
    row = {"prompt": [{"role": "user", "content": "?"}], "completion": "!", "label": False, "line": 7}
    assert judgements.conversational(row) == {**row, "completion": [{"role": "assistant", "content": "!"}]}
