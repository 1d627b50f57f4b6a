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

import numpy
import pytest

from convert.gguf_model import GgufModel
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


@pytest.mark.parametrize("trained_on", ["16-bit", "nf4"])
@pytest.mark.parametrize("is_root", [False, True], ids=["LoRA", "rsLoRA"])
def test_served_as_trained(base: Base, tmp_path: Path, is_root: bool, trained_on: str) -> None:
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
    found = report["results"]["F16"]
    assert report["results"]["tokens"]["mismatches"] == 0
    assert found["disagreements"] == 0  # greedy text is the same, but where two tokens are as likely
    assert found["steps"] - found["ties"] > 10
    served = logits(made["file"], IDS)
    assert distance(served, logits(base.full, IDS)) > 0.3  # the adapter matters
    if trained_on == "16-bit":  # with four bits the merged model has other base weights than the file below the adapter
        assert distance(served, adapters.live_logits(base.folder, adapter, IDS)) < 0.05
        switched = output(call("convert", "adapter", adapter, "--base", base.folder, "--json"))["file"]
        assert distance(logits(base.full, IDS, switched), served) < 0.05
