"""The families that users name, each from a base and an adapter to a verified file: merged, converted, compared.

For each of LoRA and rsLoRA, trained on 16 bits and on four: tokens, chat template, logits and greedy text are those of the
merged model (`appliance convert verify` fails otherwise, tests/convert/test_verify.py). What is served is what PEFT
computes, and an adapter that is switched on at run time gives what the merged model gives.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest

from convert import imatrix, pre_tokenizer, quantizer
from convert.gguf_model import GgufModel
from convert.mapped_model import MappedModel
from tests.convert import adapters, families, quick_converter
from tests.convert.families import FAMILIES, Family
from tests.running import call

CONVERSATIONS = (
    ("Waar is de balie?", "De balie is aan de Lindekade 3, naast de brug."),
    ("Where is the desk?", "The desk is at Lindekade 3.\n\nIt is next to the bridge.", "When?", "From 9:00 to 16:30."),
    ("Gdzie jest recepcja? 你好 🦙", "Recepcja jest przy Lindekade 3, obok mostu."),
)
IDS = range(20, 60)


@dataclass(frozen=True, slots=True)
class Base:
    """A model of a family, with its 16-bit file and conversations."""

    family: Family
    folder: Path
    full: Path
    rows: Path
    root: Path


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quick_converter.install(monkeypatch)


@pytest.fixture(scope="module", params=FAMILIES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Base]:
    family = FAMILIES[request.param]
    root = tmp_path_factory.mktemp("family")
    folder = families.write_model(family, root / "models" / request.param.replace(" ", "-"))
    rows = root / "rows" / "sft.jsonl"
    rows.parent.mkdir()
    messages = [
        [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(turns)]
        for turns in CONVERSATIONS
    ]
    rows.write_text("".join(json.dumps({"messages": each}) + "\n" for each in messages))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("APPLIANCE_ARTIFACTS", str(root / "artifacts"))
        quick_converter.install(patch)
        yield Base(family, folder, output(call("convert", "gguf", folder, "--json"))["file"], rows, root / "artifacts")


def output(result: Any) -> dict[str, Any]:
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return {**found, **{key: Path(found[key]) for key in ("artifact", "file") if key in found}}


def logits(file: Path, ids: Sequence[int], adapter: Path | None = None) -> Any:
    with GgufModel(file, context_tokens=max(64, len(ids))) as model:
        if adapter is not None:
            adapters.switch_on(model, adapter)
        return model.logits(ids)


def distance(found: Any, expected: Any) -> float:
    """The largest difference of logits at any position, in standard deviations of that position's."""
    return float((numpy.abs(found - expected).max(axis=1) / expected.std(axis=1)).max())


def require_importance(merged: Path, full: Path, target: Path) -> None:
    """An importance matrix has every matrix of the layers, by the file's names and widths, and llama.cpp takes it."""
    sums = imatrix.collect(MappedModel(merged), [list(IDS)])
    matrices = [each for each in gguf.GGUFReader(full).tensors if each.name.startswith("blk.") and len(each.shape) == 2]
    assert {name: len(each.squares) for name, each in sums.items()} == {each.name: int(each.shape[0]) for each in matrices}
    means = {name: each.means for name, each in sums.items()}
    quantizer.quantize_file(full, target, quantizer.Settings(type="Q4_K_M", imatrix=means))
    types = {each.name: each.tensor_type for each in gguf.GGUFReader(target).tensors}
    assert gguf.GGMLQuantizationType.Q4_K in types.values()
    found = logits(target, IDS)
    assert numpy.isfinite(found).all()
    assert distance(found, logits(full, IDS)) < 5  # not another model


@pytest.mark.parametrize("trained_on", ["16-bit", "nf4"])
@pytest.mark.parametrize("is_root", [False, True], ids=["LoRA", "rsLoRA"])
def test_served_as_trained(
    base: Base, tmp_path: Path, capsys: pytest.CaptureFixture[str], is_root: bool, trained_on: str
) -> None:
    adapter = adapters.write(base.folder, tmp_path / "adapter", base.family.targets, use_rslora=is_root)
    options = ("--trained-on", trained_on, *(("--conversations", base.rows) if trained_on == "nf4" else ()))
    merged = output(call("convert", "merge", adapter, "--base", base.folder, "--json", *options))["artifact"]
    made = output(call("convert", "gguf", merged, "--json"))
    assert made["file"].is_file()
    manifest = json.loads((made["artifact"] / "manifest.json").read_text())
    assert manifest["results"]["pre_tokenizer"] == base.family.pre_tokenizer
    limits = ("--prompts", "3", "--answer-tokens", "16")
    report = output(
        call("convert", "verify", made["file"], "--merged", merged, "--conversations", base.rows, "--json", *limits)
    )
    found, compared = report["results"]["F16"], report["results"]["tokens"]
    assert compared["mismatches"] == 0
    assert (compared["matrices"] > 0, compared["vectors"] > 0, compared["not_compared"]) == (True, True, 0)
    assert compared["combining_marks_left_out"] == (base.family.pre_tokenizer in pre_tokenizer.PART_MARKS)
    assert found["disagreements"] == 0  # greedy text is the same, but where two tokens are as likely
    assert found["steps"] - found["ties"] > 10
    served = logits(made["file"], IDS)
    assert distance(served, logits(base.full, IDS)) > 0.3  # the adapter matters
    if trained_on == "16-bit" and not is_root:
        require_importance(merged, made["file"], tmp_path / "Q4_K_M.gguf")
        assert "no importance for" not in capsys.readouterr().err
    if trained_on == "16-bit":  # with four bits the merged model has other base weights than the file below the adapter
        assert distance(served, adapters.live_logits(base.folder, adapter, IDS)) < 0.05
        switched = output(call("convert", "adapter", adapter, "--base", base.folder, "--json"))["file"]
        assert distance(logits(base.full, IDS, switched), served) < 0.05
