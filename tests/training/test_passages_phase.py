"""The phase that learns to answer over documents read apart: it comes nearer to ordinary reading, which stays as it was."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from appliance import artifacts
from appliance import recipe as recipes
from appliance.errors import RecipeError
from appliance.training import (
    adapters,
    blocks,
    choice,
    conversations,
    divergence_head,
    layout,
    loop,
    passages,
    rungs,
    starter,
)
from appliance.training import model as models
from appliance.training.fit import Device
from appliance.training.labels import LabelledRow
from tests import tiny_recipe
from tests.running import call, run
from tests.training.test_labels import TEXTS
from tests.training.test_resume import interrupt  # noqa: F401  (a fixture)
from tests.training.test_sft_dpo import assert_learned_the_same

PLACES = {"balie": "Lindekade 3", "kat": "brug", "hond": "Lindekade 7", "tuin": "kade 9"}
RECIPE = (
    tiny_recipe.RECIPE.replace("epochs = 10\nlearning_rate = 5e-3", "epochs = 2\nlearning_rate = 1e-3")
    .replace(
        "[quantize]",
        """[passages]
epochs = 12
learning_rate = 5e-3
batch_rows = 2
accumulate = 1
max_tokens = 256
checkpoint_steps = 5

[quantize]""",
    )
    .replace('languages = ["nl", "en"]', 'languages = ["nl", "en"]\nphases = ["sft", "passages"]')
)


def rows(*moved: int) -> list[dict[str, Any]]:
    """Each thing is where its document says; by `moved`, the documents say it of one another."""
    found = []
    for by in moved:
        names = list(PLACES)
        told = {name: PLACES[names[(at + by) % len(names)]] for at, name in enumerate(names)}
        for at, name in enumerate(names):
            pair = (name, names[(at + 1) % len(names)])
            documents = [{"id": each, "text": f"De {each} is aan de {told[each]}."} for each in pair]
            turns = tiny_recipe.messages((f"Waar is de {name}?", f"Aan de {told[name]}."))
            found.append({"messages": turns, "documents": documents})
    return found


def noisy_base(folder: Path) -> Path:
    """A base that looks at everything, and so minds what it does not see: large random weights."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = starter.make_tokenizer(TEXTS, 512)
    sizes = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
    }
    more = {"num_hidden_layers": 4, "initializer_range": 0.12, "eos_token_id": tokenizer.eos_token_id}
    config = Qwen3Config(vocab_size=len(tokenizer), tie_word_embeddings=False, **sizes, **more)
    torch.manual_seed(1)
    starter.save(Qwen3ForCausalLM(config), tokenizer, folder)
    return folder


class Apart:
    """A recipe with the phase, trained on such a base."""

    def __init__(self, folder: Path) -> None:
        base = noisy_base(folder / "base")
        self.recipe = tiny_recipe.write(folder / "recipe", RECIPE)
        plain = [{"messages": tiny_recipe.messages(each)} for each in tiny_recipe.CONVERSATIONS]
        tiny_recipe.write_lines(folder / "recipe" / "sft.jsonl", [*plain, *rows(0, 1)])
        heldout = tiny_recipe.write_lines(folder / "recipe" / "heldout.jsonl", [*rows(2), plain[0] | {"documents": []}])
        heldout.write_text("\n".join(heldout.read_text().splitlines()[:4]) + "\n")
        self.sets = ["--set", f"base={base}", "--set", f"data.heldout={heldout}"]
        self.root = folder / "artifacts"
        done = run(self.root, "train", self.recipe, *self.sets, "--json")
        assert done.returncode == 0, done.stderr
        self.said = done.stderr
        self.made = Path(json.loads(done.stdout)["artifact"])
        (self.sft,) = [each.parent for each in self.root.glob("adapter/tiny-sft-*/manifest.json")]
        (self.dataset,) = [each.parent for each in self.root.glob("dataset/*/manifest.json")]
        self.base = models.locate(str(base), self.root)


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Apart:
    return Apart(tmp_path_factory.mktemp("apart"))


@pytest.fixture
def again(apart: Apart, root: Path) -> list[str | Path]:
    """The command that trains the phase once more, with the SFT adapter of before."""
    for made in (apart.sft, apart.dataset):
        shutil.copytree(made, root / made.parent.name / made.name)
    return ["train", apart.recipe, "--phase", "passages", *apart.sets]


def read(apart: Apart) -> tuple[Any, conversations.Conversations]:
    recipe = recipes.load(apart.recipe, [each for each in apart.sets if each != "--set"])
    return recipe, conversations.read_documents(recipe, apart.dataset, apart.base)


def student(apart: Apart) -> Any:
    model = adapters.continued(apart.base, apart.sft, rungs.CPU[0])
    adapters.copy_as_reference(model)
    divergence_head.install(model)
    return model


def test_documents_read_apart_say_more_of_what_ordinary_reading_says(apart: Apart) -> None:
    manifest = artifacts.load(apart.made).manifest
    results = manifest["results"]
    assert (results["rows"], results["measured_rows"], results["heldout_measured_rows"]) == (8, 8, 4)
    assert results["kl_before"] > 0.1
    assert results["kl_after"] < results["kl_before"] / 5
    assert results["top1_after"] >= results["top1_before"]
    assert results["kl_exact"] < results["kl_before"] / 5
    assert results["is_taken_back"] is False
    ids = [artifacts.identity(each) for each in (apart.dataset, apart.base.path, apart.sft)]
    assert manifest["parents"] == ids
    assert manifest["config"]["passages"]["epochs"] == 12
    assert f"{results['kl_before']:.4f} before, {results['kl_after']:.4f} after" in apart.said
    points = [json.loads(line) for line in (apart.made / loop.LOSS).read_text().splitlines()]
    assert points[0]["divergence"] > points[-1]["divergence"]
    assert {line for point in points for line in point["rows"]} == set(range(7, 15))  # those that have documents
    assert points[-1]["num_tokens"] > 12 * results["tokens"]


def test_what_gains_nothing_is_taken_back(apart: Apart, root: Path, again: list[str | Path]) -> None:
    done = run(root, *again, "--set", "passages.learning_rate=1.0", "--set", "passages.epochs=1", "--json")
    assert done.returncode == 0, done.stderr
    made = Path(json.loads(done.stdout)["artifact"])
    results = artifacts.load(made).results
    assert results["is_taken_back"] is True
    assert results["heldout_kl_after"] > results["heldout_kl_before"]
    assert "the adapter stays as it came" in done.stderr
    weights, before = (load_file(folder / "adapter_model.safetensors") for folder in (made, apart.sft))
    assert weights.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in weights.items())


@pytest.mark.parametrize(
    ("share", "heldout", "has_gained"),
    [
        (0.5, {}, True),
        (1.0, {}, False),
        (0.5, {"kl_before": 0.1, "kl_after": 0.2, "kl_exact": 0.0, "measured_rows": 4}, False),
    ],
)
def test_gain_is_of_both_ways_of_reading(share: float, heldout: dict[str, float], has_gained: bool) -> None:
    results = {"kl_before": 0.10, "kl_after": 0.05, "kl_exact": 0.06, "measured_rows": 8}
    results |= {f"heldout_{name}": value for name, value in heldout.items()}
    assert passages.has_gained(results, share) == has_gained


def test_it_leaves_what_a_person_needs(apart: Apart) -> None:
    names = {each.name for each in apart.made.iterdir()}
    assert names == {
        *("adapter_config.json", "adapter_model.safetensors", "README.md", "manifest.json"),
        *("loss.jsonl", "loss.png", "samples.json", "run.html", "run.lock.json"),
    }
    (sample,) = json.loads((apart.made / "samples.json").read_text())
    assert sample["documents"] == [sample["question"].split()[-1].rstrip("?"), *sample["documents"][1:]]
    page = (apart.made / "run.html").read_text()
    assert f"over the documents {', '.join(sample['documents'])}" in page
    assert "kl_after" in page
    assert "tiny, passages" in (apart.made / "README.md").read_text()


def test_figures_are_those_of_the_adapters_on_disk(apart: Apart) -> None:
    """Computed again in another way: two models, whole logits, the mask written out."""
    from peft import PeftModel

    def logits(adapter: Path, row: LabelledRow, *, is_apart: bool) -> torch.Tensor:
        model = PeftModel.from_pretrained(models.load_model(apart.base.path), adapter).eval()
        count = len(row.input_ids)
        sees = torch.ones(count, count).tril().bool()
        if is_apart:
            for start, end in zip((0, *row.bounds), row.bounds, strict=False):
                sees[start:end, :start] = False
        with torch.no_grad():
            found = model(input_ids=torch.tensor([row.input_ids]), attention_mask=sees[None, None]).logits[0]
        wanted = [at for at in range(count - 1) if row.labels[at + 1] != -100]
        return torch.log_softmax(found[wanted], -1)

    _, found = read(apart)
    sums, tokens = {"before": 0.0, "after": 0.0, "exact": 0.0}, 0
    for row in found.labelled:
        taught = logits(apart.sft, row, is_apart=False)
        for name, adapter, is_apart in (
            ("before", apart.sft, True),
            ("after", apart.made, True),
            ("exact", apart.made, False),
        ):
            said = logits(adapter, row, is_apart=is_apart)
            sums[name] += float((taught.exp() * (taught - said)).sum())
        tokens += len(taught)
    results = artifacts.load(apart.made).results
    for name, total in sums.items():
        assert results[f"kl_{name}"] == pytest.approx(total / tokens, rel=1e-3, abs=1e-6)


def test_it_begins_with_the_adapter_that_it_continues(apart: Apart) -> None:
    """The student is the teacher as long as nothing is learned, and where there is nothing to read apart."""
    _, found = read(apart)
    model = student(apart).eval()
    row = found.labelled[0]
    for bounds, is_same in (((), True), ((0, row.bounds[0]), True), (row.bounds, False)):
        numbers = blocks.of_row(len(row.input_ids), bounds)
        batch = {"input_ids": row.input_ids, "labels": row.labels, passages.BLOCKS: numbers}
        _, divergence, _, agrees = passages.distil(model, model, {key: torch.tensor([each]) for key, each in batch.items()})
        assert (float(divergence.max()) < 1e-6) == is_same
        assert agrees.all() or not is_same
    results = artifacts.load(apart.made).results
    assert passages.measure(model, found.labelled)["kl_after"] == pytest.approx(results["kl_before"], rel=1e-4)


def test_rows_of_a_batch_learn_as_each_by_itself(apart: Apart) -> None:
    _, found = read(apart)
    model = student(apart)
    losses = []
    for chosen in (found.labelled[:3], *([row] for row in found.labelled[:3])):
        columns = [
            {
                "input_ids": row.input_ids,
                "labels": row.labels,
                passages.BLOCKS: blocks.of_row(len(row.input_ids), row.bounds),
            }
            for row in chosen
        ]
        each, *_ = passages.distil(model, model, passages.collate(columns, 0), sft_weight=0.5)
        losses.append(each.detach())
    torch.testing.assert_close(losses[0], torch.cat(losses[1:]), rtol=1e-4, atol=1e-5)


def test_the_teacher_drops_nothing_out_and_is_not_trained(apart: Apart, tmp_path: Path) -> None:
    recipe, found = read(apart)
    model = student(apart)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    loop.prepare()
    trainer = passages.trainer(model, found.tokenizer, found.labelled, recipe, tmp_path, rungs.CPU[0])
    layout.settle(trainer, rungs.CPU[0])
    divergence_head.install(model)
    before = {name: value.clone() for name, value in model.named_parameters() if f".{adapters.REFERENCE}." in name}
    assert before
    trainer.train()
    assert all(torch.equal(value, model.get_parameter(name)) for name, value in before.items())
    assert not any(model.get_parameter(name).requires_grad for name in before)


def test_resumed_equals_uninterrupted(
    apart: Apart,
    again: list[str | Path],
    interrupt: Callable[[int], None],  # noqa: F811
) -> None:
    interrupt(10)
    assert call(*again).exit_code == 130
    result = call(*again, "--resume", "--json")
    assert result.exit_code == 0, result.stderr
    assert "passages: continuing after step 10" in result.stderr
    made = Path(json.loads(result.stdout)["artifact"])
    assert made.name == apart.made.name
    name = "adapter_model.safetensors"
    assert (made / name).read_bytes() == (apart.made / name).read_bytes()
    assert artifacts.load(made).results == artifacts.load(apart.made).results


def test_eight_rows_one_by_one_are_a_step_of_eight(again: list[str | Path]) -> None:
    made = []
    for batch_rows, accumulate in ((1, 8), (8, 1)):
        sets = [f"passages.batch_rows={batch_rows}", f"passages.accumulate={accumulate}", "passages.epochs=4"]
        result = call(*again, *(part for each in sets for part in ("--set", each)), "--json")
        assert result.exit_code == 0, result.stderr
        made.append(Path(json.loads(result.stdout)["artifact"]))
    assert_learned_the_same(*made)


def test_rows_without_documents_are_refused_before_the_first_phase(apart: Apart, tmp_path: Path, root: Path) -> None:
    recipe = tiny_recipe.write(tmp_path / "recipe", RECIPE)
    result = call("train", recipe, "--phase", "sft", "--set", f"base={apart.base.path}")
    assert result.exit_code == 1
    assert "sft.jsonl: none of its 6 rows has documents, from which the phase 'passages' learns" in result.stderr
    assert not list(root.glob("adapter/*/*.safetensors"))


def test_too_long_rows_are_refused(again: list[str | Path], root: Path) -> None:
    result = call(*again, "--set", "passages.max_tokens=64")
    assert result.exit_code == 1
    assert "Longer than passages.max_tokens = 64" in result.stderr
    assert "sft.jsonl line 7: " in result.stderr
    assert not list(root.glob("adapter/tiny-passages-*/*.safetensors"))


def test_plan_knows_the_phase(apart: Apart, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APPLIANCE_ARTIFACTS", str(apart.root))
    result = call("plan", apart.recipe, *apart.sets, "--json")
    assert result.exit_code == 0, result.stderr
    found = {each["phase"]: each for each in json.loads(result.stdout)["phases"]}
    assert found["passages"]["rows"] == 2
    assert found["passages"]["micro_steps"] == 12 * (8 + 4) // 2
    assert found["passages"]["chosen"] == "lora"
    plain = call("plan", apart.recipe, *apart.sets, "--vram", "4GiB", "--json")
    names = {each["phase"]: [rung["name"] for rung in each["rungs"]] for each in json.loads(plain.stdout)["phases"]}
    assert names["passages"] == ["lora", "qlora", "qlora-inputs"] == names["sft"][:3]


def test_rungs_whose_head_is_in_memory_are_refused(apart: Apart, monkeypatch: pytest.MonkeyPatch) -> None:
    gib = 1 << 30
    card = Device(on_card=True, weights="bfloat16", available_bytes=4 * gib, available_memory_bytes=16 * gib)
    monkeypatch.setattr(choice, "now", lambda _: card)
    recipe, found = read(apart)
    streamed = recipes.load(apart.recipe, ["memory.rung=streamed"])
    work = choice.of_passages(recipe, found.labelled)
    with pytest.raises(
        RecipeError, match=r"'streamed' is none of this device's, with the whole head there.*: lora, qlora, qlora-inputs"
    ):
        choice.choose(streamed, apart.base, work, None)
