"""The importance matrix: mean squares of what each matrix is given, by languages in equal parts, in llama.cpp's format."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from appliance import artifacts
from appliance.errors import ModelFileError
from convert import conversations, imatrix, quantizer
from convert.gguf_model import GgufModel
from convert.mapped_model import MappedModel
from tests.running import Trained, call

IDS = list(range(3, 60))


def test_squares_are_those_of_the_inputs(trained: Trained) -> None:
    """Against a forward pass that keeps the inputs of two matrices, one before and one inside the feed-forward part."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(trained.made["merge"], dtype=torch.float32).eval()
    kept: dict[str, Any] = {}
    for name, path in (("blk.1.attn_q.weight", "self_attn.q_proj"), ("blk.1.ffn_down.weight", "mlp.down_proj")):
        module = model.model.layers[1].get_submodule(path)
        module.register_forward_pre_hook(lambda _module, inputs, name=name: kept.update({name: inputs[0][0]}))
    with torch.inference_mode():
        model(input_ids=torch.tensor([IDS]))
    found = imatrix.collect(MappedModel(trained.made["merge"]), [IDS[:20], IDS])
    with torch.inference_mode():
        both = {name: [each] for name, each in kept.items()}
        model(input_ids=torch.tensor([IDS[:20]]))
    assert len(found) == 14
    for name, (inputs,) in both.items():
        expected = inputs.square().sum(dim=0) + kept[name].square().sum(dim=0)
        np.testing.assert_allclose(found[name].squares, expected.numpy(), rtol=1e-4)
        assert found[name].tokens == 77


@pytest.mark.usefixtures("root")
def test_command_reads_every_language_alike(trained: Trained) -> None:
    rows = trained.made["data"] / "sft.jsonl"
    arguments = ("--conversations", rows, "--language", "nl", "--language", "en", "--tokens", "256")
    output = json.loads(call("convert", "imatrix", trained.made["merge"], *arguments, "--json").stdout)
    made = artifacts.load(Path(output["artifact"]))
    tokens = made.results["tokens"]
    assert tokens.keys() == {"nl", "en"}
    assert all(30 < count <= 128 for count in tokens.values())
    reader = gguf.GGUFReader(output["file"])
    assert {each.name for each in reader.tensors if each.name.startswith("blk.0.attn_q")} == {
        "blk.0.attn_q.weight.in_sum2",
        "blk.0.attn_q.weight.counts",
    }
    for key in ("general.type", "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"):
        assert reader.get_field(key) is not None
    means = imatrix.read(Path(output["file"]))
    widths = {each.name: int(each.shape[0]) for each in gguf.GGUFReader(trained.full).tensors if len(each.shape) == 2}
    assert {name: len(each) for name, each in means.items()} == {name: widths[name] for name in means}
    again = json.loads(call("convert", "imatrix", trained.made["merge"], *arguments, "--json").stdout)
    assert again["state"] == "unchanged"


def test_quantizer_takes_it_and_errors_shrink_where_it_says(trained: Trained, tmp_path: Path) -> None:
    """Columns that matter are kept closer, at the price of the others: the weighted error falls."""
    sums = imatrix.collect(MappedModel(trained.made["merge"]), [IDS])
    means = {name: each.means for name, each in sums.items()}
    errors = {}
    for name, importance in (("without", {}), ("with", means)):
        target = tmp_path / f"{name}.gguf"
        quantizer.quantize_file(trained.full, target, quantizer.Settings(type="Q4_K_S", imatrix=importance))
        errors[name] = weighted_error(trained.full, target, means)
    assert errors["with"] < 0.97 * errors["without"]


def weighted_error(full: Path, quantized: Path, means: dict[str, Any]) -> float:
    exact = {each.name: each for each in gguf.GGUFReader(full).tensors}
    total = 0.0
    for each in gguf.GGUFReader(quantized).tensors:
        if each.name in means:
            found = gguf.quants.dequantize(each.data, each.tensor_type)
            wanted = gguf.quants.dequantize(exact[each.name].data, exact[each.name].tensor_type)
            total += float((((found - wanted) ** 2) * means[each.name]).sum())
    return total


def test_types_that_need_it_say_so(trained: Trained, root: Path) -> None:
    result = call("convert", "quantize", trained.full, "--type", "IQ2_XS")
    assert result.exit_code == 1
    assert "imatrix" in result.stderr
    assert not list(root.rglob("*.gguf"))
    rows = trained.made["data"] / "sft.jsonl"
    made = json.loads(call("convert", "imatrix", trained.made["merge"], "--conversations", rows, "--json").stdout)
    result = call("convert", "quantize", trained.full, "--type", "IQ2_XS", "--imatrix", made["artifact"], "--json")
    assert result.exit_code == 0, result.stderr
    output = json.loads(result.stdout)
    manifest = artifacts.load(Path(output["artifact"])).manifest
    assert f"report/{Path(made['artifact']).name}" in manifest["parents"]
    with GgufModel(Path(output["file"]), context_tokens=64) as model:
        assert np.isfinite(model.logits(IDS)).all()


@pytest.mark.parametrize("content", [b"", b"GGUF and garbage", None])
def test_what_is_no_importance_matrix_is_refused(trained: Trained, tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "imatrix.gguf"
    path.write_bytes(trained.full.read_bytes() if content is None else content)
    with pytest.raises(ModelFileError, match="importance matrix"):
        imatrix.read(path)


def test_calibration_takes_rows_from_all_over_a_language(trained: Trained) -> None:
    rows = conversations.read(trained.made["data"] / "sft.jsonl")
    groups = {"nl": rows * 8, "en": rows[:2]}
    chosen = imatrix.calibration_text(trained.made["merge"], groups, 400)
    assert 100 < sum(map(len, chosen["nl"])) <= 200
    assert sum(map(len, chosen["en"])) <= 200
    assert len({tuple(ids) for ids in chosen["nl"]}) > 2
