"""The merged model computes what the base with its adapter computes; what cannot be merged exactly is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from appliance.artifacts import PARTIAL
from appliance.recipe import Starter
from appliance.training import starter
from convert import lora
from convert import merge as merging
from convert.lora import Adapter, Change
from tests.convert import small_merge
from tests.convert.small_merge import edit_json, load, logits, make_adapter, merged
from tests.running import Trained, call


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_merge.write_base(tmp_path_factory.mktemp("models") / "base")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"r": 1, "lora_alpha": 32},
        {"target_modules": ["q_proj", "down_proj"]},
        {"use_dora": True},
        {"use_dora": True, "use_rslora": True},
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 8}},
        {"alpha_pattern": {"q_proj": 32, "layers.1.mlp.up_proj": 1}, "use_rslora": True},
    ],
    ids=["lora", "rslora", "rank 1", "few modules", "dora", "rsdora", "ranks", "alphas"],
)
def test_merged_equals_adapter(base: Path, root: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    with_adapter = logits(make_adapter(base, tmp_path / "adapter", **settings))
    without = logits(load(base))
    found = logits(load(merged(root, tmp_path / "adapter", base)))
    assert (found - with_adapter).abs().max() < 1e-5
    assert (found - without).abs().max() > 0.1


def test_trained_adapter_merged_equals_adapter(trained: Trained) -> None:
    from peft import PeftModel

    model = PeftModel.from_pretrained(load(trained.made["base"]), trained.made["dpo"]).eval()
    assert (logits(load(trained.made["merge"])) - logits(model)).abs().max() < 1e-5


@pytest.mark.parametrize("is_transposed", [False, True])
def test_half_precision_is_rounded_once(tmp_path: Path, is_transposed: bool) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    torch.manual_seed(3)
    weight, a, b = torch.randn(6, 5).half(), torch.randn(2, 5), torch.randn(6, 2)
    stored = weight.T.contiguous() if is_transposed else weight
    save_file({"w.weight": stored, "other": weight.clone()}, tmp_path / "in.safetensors", metadata={"format": "pt"})
    adapter = Adapter({"w.weight": Change(a, b, 0.7, is_transposed=is_transposed)}, {})
    merging.merge_shard(tmp_path / "in.safetensors", tmp_path / "out.safetensors", adapter)
    tensors = load_file(tmp_path / "out.safetensors")
    found = tensors["w.weight"].T if is_transposed else tensors["w.weight"]
    expected = (weight.double() + 0.7 * (b.double() @ a.double())).float().half()
    assert (found - expected).abs().max() <= 2**-10
    assert found.dtype == torch.float16
    assert torch.equal(tensors["other"], weight)
    with safe_open(tmp_path / "out.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_rows_in_pieces_are_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    torch.manual_seed(4)
    weight, change = torch.randn(37, 5).bfloat16(), Change(torch.randn(2, 5), torch.randn(37, 2), 0.5, torch.rand(37))
    whole = torch.cat(list(lora.merged_rows(weight, change)))
    monkeypatch.setattr(lora, "ROWS_BYTES", 4 * 5 * 4)
    pieces = list(lora.merged_rows(weight, change))
    assert len(pieces) == 10
    assert torch.equal(torch.cat(pieces), whole)


@pytest.mark.parametrize("shape", [(37, 5), (37,), ()])
def test_what_replaces_a_weight_comes_in_rows(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]) -> None:
    import torch

    tensor = torch.randn(shape)
    monkeypatch.setattr(lora, "ROWS_BYTES", 4 * 5 * 4)
    pieces = list(lora.rows_as(tensor, torch.bfloat16))
    assert len(pieces) == (10 if len(shape) == 2 else 1)
    assert torch.equal(torch.cat(pieces).reshape(shape), tensor.bfloat16())


def test_shards_are_merged_one_by_one(base: Path, root: Path, tmp_path: Path) -> None:
    sharded = tmp_path / "sharded"
    shutil.copytree(base, sharded, ignore=shutil.ignore_patterns("*.safetensors"))
    load(base).save_pretrained(sharded, max_shard_size="150KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    expected = logits(make_adapter(base, tmp_path / "adapter"))
    folder = merged(root, tmp_path / "adapter", sharded)
    assert (folder / "model.safetensors.index.json").exists()
    assert (logits(load(folder)) - expected).abs().max() < 1e-5


def test_everything_else_of_the_base_survives(trained: Trained) -> None:
    base, made = trained.made["base"], trained.made["merge"]
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "config.json"):
        assert (made / name).read_bytes() == (base / name).read_bytes(), name
    ours = {"manifest.json", "README.md", "training_template.jinja", "loss.jsonl", "loss.png"}
    assert {each.name for each in made.iterdir()} == {each.name for each in base.iterdir()} - ours | {"manifest.json"}
    assert trained.manifest("merge")["results"]["merged_weights"] == 14  # two layers of seven


def edit(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "adapter_config.json", **changes)


def truncate(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def unpaired(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "adapter_model.safetensors")
    tensors.pop(next(name for name in tensors if "lora_B" in name))
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (edit(use_dora=True), "use_dora is True, which its tensors do not bear out"),
        (edit(fan_in_fan_out=True), "has another shape"),
        (edit(layer_replication=[[0, 2]]), "whose layers are repeated (layer_replication)"),
        (edit(alora_invocation_tokens=[1]), "it is active in part of a text only"),
        (edit(lora_alpha=None), "lora_alpha is None, which is no number"),
        (lambda folder: (folder / "adapter_config.json").write_text("[]"), "is damaged"),
        (edit(peft_type="IA3"), "it is of type 'IA3', not LORA"),
        (edit(init_lora_weights="pissa_niter_4"), "path_initial_model_for_weight_conversion"),
        (truncate, "is damaged"),
        (unpaired, "without its other factor"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "is no adapter"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "is damaged"),
    ],
)
def test_unmergeable_adapter_is_refused(
    base: Path, root: Path, tmp_path: Path, change: Callable[[Path], None], said: str
) -> None:
    make_adapter(base, tmp_path / "adapter")
    change(tmp_path / "adapter")
    result = call("convert", "merge", tmp_path / "adapter", "--base", base)
    assert result.exit_code == 1, result.stderr
    assert said in result.stderr
    assert not list(root.rglob("*.safetensors"))


def test_another_base_is_refused(base: Path, root: Path, tmp_path: Path) -> None:
    make_adapter(base, tmp_path / "adapter")
    tokenizer = starter.make_tokenizer(["woorden"], 512)
    wider = Starter(layers=2, hidden=128, feed_forward=96, heads=2, head_width=32)
    starter.save(starter.make_model(wider, tokenizer), tokenizer, tmp_path / "wider")
    flatter = Starter(layers=1, hidden=64, feed_forward=96, heads=2, head_width=32)
    starter.save(starter.make_model(flatter, tokenizer), tokenizer, tmp_path / "flatter")
    down, gate = (f"model.layers.{layer}.mlp.{name}_proj.weight" for layer, name in ((0, "down"), (1, "gate")))
    expected = {
        "wider": (f"{down} has another shape: (128, 96) in the base, (64, 96) in the adapter", "; and 9 more"),
        "flatter": (f"{gate} (96, 64), which the base does not have", "; and 2 more"),
        "nothing": ("does not exist",),
    }
    for name, said in expected.items():
        result = call("convert", "merge", tmp_path / "adapter", "--base", tmp_path / name)
        assert result.exit_code == 1
        assert [each for each in said if each not in result.stderr] == [], result.stderr
    assert not list(root.rglob("manifest.json"))
    assert not list(root.rglob(f"*{PARTIAL}"))


def test_adapter_of_another_base_of_the_same_shape_is_refused(trained: Trained, root: Path, tmp_path: Path) -> None:
    twin = tmp_path / "twin"
    shutil.copytree(trained.made["base"], twin, ignore=shutil.ignore_patterns("manifest.json"))
    result = call("convert", "merge", trained.made["dpo"], "--base", twin)
    assert result.exit_code == 1
    assert "was trained on" in result.stderr
    assert not list(root.rglob("manifest.json"))


def test_second_time_nothing_is_done(base: Path, root: Path, tmp_path: Path) -> None:
    make_adapter(base, tmp_path / "adapter")
    arguments = ("convert", "merge", tmp_path / "adapter", "--base", base, "--json")
    states = [json.loads(call(*arguments, *extra).stdout)["state"] for extra in (("--dry-run",), (), (), ("--dry-run",))]
    assert states == ["to make", "made", "unchanged", "unchanged"]
    assert len(list(root.glob("merged/*/manifest.json"))) == 1


@pytest.mark.usefixtures("root")
def test_other_conversations_make_another_merge(base: Path, tmp_path: Path) -> None:
    """Of the same folder, too: both ways of merging are compared on them."""
    make_adapter(base, tmp_path / "adapter")
    for name in ("one.jsonl", "two.jsonl"):
        (tmp_path / name).write_text("")
    arguments = ("convert", "merge", tmp_path / "adapter", "--base", base, "--trained-on", "nf4", "--dry-run", "--json")
    made = {
        json.loads(call(*arguments, "--conversations", tmp_path / name).stdout)["artifact"]
        for name in ("one.jsonl", "two.jsonl")
    }
    assert len(made) == 2


def drop_shard(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[1].unlink()


def cut_shard(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-7])


def quantized_already(folder: Path) -> None:
    path = folder / "config.json"
    settings = {
        **json.loads(path.read_text()),
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    }
    path.write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (drop_shard, "shards are missing); fetch the model again"),
        (cut_shard, "its header promises"),
        (quantized_already, "is quantized already (bitsandbytes)"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("{}"), "cannot be read"),
    ],
)
def test_unusable_base_is_refused(base: Path, root: Path, tmp_path: Path, change: Callable[[Path], None], said: str) -> None:
    make_adapter(base, tmp_path / "adapter")
    sharded = tmp_path / "sharded"
    shutil.copytree(base, sharded, ignore=shutil.ignore_patterns("*.safetensors"))
    load(base).save_pretrained(sharded, max_shard_size="150KB")
    change(sharded)
    result = call("convert", "merge", tmp_path / "adapter", "--base", sharded)
    assert result.exit_code == 1, result.stderr
    assert said in result.stderr
    assert not list(root.rglob("*.safetensors"))
