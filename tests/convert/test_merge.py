"""The merged model computes what the base with its adapter computes; what cannot be merged exactly is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from appliance import artifacts
from appliance.artifacts import PARTIAL
from appliance.recipe import Starter
from appliance.training import starter
from convert import lora
from convert import merge as merging
from convert.lora import Adapter, Change
from tests.running import Trained, call

SHAPE = Starter(layers=2, hidden=64, feed_forward=96, heads=2, head_width=32, context_tokens=64)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    folder = tmp_path_factory.mktemp("models") / "base"
    tokenizer = starter.make_tokenizer(["een paar woorden voor de woordenlijst"], 512)
    torch.manual_seed(1)
    starter._save(starter.make_model(SHAPE, tokenizer), tokenizer, folder)
    return folder


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32", local_files_only=True).eval()


def make_adapter(base: Path, folder: Path, **settings: Any) -> Any:
    """A LoRA adapter with random factors, saved; returns base and adapter as PEFT runs them."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(2)
    options = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **settings}
    model = get_peft_model(load(base), LoraConfig(**options))
    for name, value in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.3)
    model.save_pretrained(folder)
    return model.eval()


def logits(model: Any) -> Any:
    import torch

    ids = torch.arange(3, 43)[None]
    with torch.inference_mode():
        return model(input_ids=ids).logits


def merged(root: Path, adapter: Path, base: Path) -> Path:
    result = call("convert", "merge", adapter, "--base", base, "--json")
    assert result.exit_code == 0, result.stderr
    folder = Path(json.loads(result.stdout)["artifact"])
    assert folder.parent.parent == root
    return folder


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


def test_trained_embeddings_and_added_tokens_survive(base: Path, root: Path, tmp_path: Path) -> None:
    """As PEFT saves them: whole tensors of other shapes, beside a tokenizer that has the new tokens."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer

    untied = copied_untied(base, tmp_path / "untied")
    tokenizer = AutoTokenizer.from_pretrained(untied)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|bed|>", "<|meal|>"]})
    torch.manual_seed(5)
    model = load(untied)
    model.resize_token_embeddings(len(tokenizer))
    options = {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    for name, value in adapted.named_parameters():
        if value.requires_grad:
            torch.nn.init.normal_(value, std=0.1)
            assert name
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    folder = merged(root, tmp_path / "adapter", untied)
    found = load(folder)
    assert found.config.vocab_size == len(tokenizer)
    assert (logits(found) - logits(adapted.eval())).abs().max() < 1e-5
    assert AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<|meal|>") == len(tokenizer) - 1
    results = artifacts.load(folder).results
    assert (results["merged_weights"], results["replaced_weights"]) == (2, 2)


@pytest.mark.parametrize("more", [0, 3], ids=["trained", "added tokens"])
def test_tied_embeddings_that_stay_tied_are_merged(base: Path, root: Path, tmp_path: Path, more: int) -> None:
    """PEFT saves such a matrix twice, under the name of the head too."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(6)
    model = load(base)
    if more:
        model.resize_token_embeddings(model.config.vocab_size + more)
    options = {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    trained = [value for value in adapted.parameters() if value.requires_grad]
    for value in trained:
        torch.nn.init.normal_(value, std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    found = load(merged(root, tmp_path / "adapter", base))
    assert found.lm_head.weight is found.model.embed_tokens.weight
    assert (logits(found) - logits(adapted.eval())).abs().max() < 1e-5


def copied_untied(base: Path, folder: Path) -> Path:
    import torch

    model = load(base)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(base / name, folder)
    return folder


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_what_is_tied_cannot_be_changed_on_one_side(base: Path, root: Path, tmp_path: Path, target: str) -> None:
    make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=[target])
    result = call("convert", "merge", tmp_path / "adapter", "--base", base)
    assert result.exit_code == 1
    assert "tie_word_embeddings" in result.stderr
    assert not list(root.rglob("*.safetensors"))


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
    def apply(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return apply


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
    starter._save(starter.make_model(wider, tokenizer), tokenizer, tmp_path / "wider")
    flatter = Starter(layers=1, hidden=64, feed_forward=96, heads=2, head_width=32)
    starter._save(starter.make_model(flatter, tokenizer), tokenizer, tmp_path / "flatter")
    for name, said in (("wider", "has another shape"), ("flatter", "which"), ("nothing", "does not exist")):
        result = call("convert", "merge", tmp_path / "adapter", "--base", tmp_path / name)
        assert result.exit_code == 1
        assert said in result.stderr
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
