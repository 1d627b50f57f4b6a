"""A base stored in 16 bits is trained in bfloat16 where the CPU has it, and goes on in it; adapters stay in 32 bits."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from appliance import artifacts, device
from appliance.errors import ArtifactError
from appliance.training import layout, loop, rungs
from appliance.training import model as models
from tests.running import Trained, call


@pytest.fixture(scope="module")
def half(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The starter, as a model that was published in 16 bits."""
    folder = tmp_path_factory.mktemp("half") / "base"
    shutil.copytree(trained.made["base"], folder, ignore=shutil.ignore_patterns(artifacts.MANIFEST))
    file = folder / "model.safetensors"
    save_file({name: each.to(torch.bfloat16) for name, each in load_file(file).items()}, file, {"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "dtype": "bfloat16"}))
    return folder


@pytest.fixture
def bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU that multiplies in it; others compute the same, slowly."""
    monkeypatch.setattr(models, "has_bfloat16", lambda: True)


def train(trained: Trained, base: Path, root: Path, *more: str) -> tuple[dict[str, Any], Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("APPLIANCE_ARTIFACTS", str(root))
        flags = ("--phase", "sft", "--set", f"base={base}", "--set", "sft.epochs=3", "--json")
        result = call("train", trained.recipe, *flags, *more)
    assert result.exit_code == 0, result.stderr
    folder = Path(json.loads(result.stdout)["artifact"])
    return artifacts.load(folder).results, folder


def test_type_is_the_bases_where_the_cpu_has_it(trained: Trained, half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "cpu_features", lambda: frozenset({"avx512f", "avx512_bf16"}))
    assert models.weight_type(half) == "bfloat16"
    assert models.weight_type(trained.made["base"]) == "float32"
    monkeypatch.setattr(device, "cpu_features", lambda: frozenset({"avx512f"}))
    assert models.weight_type(half) == "float32"


@pytest.mark.usefixtures("bfloat16")
@pytest.mark.parametrize("rung", [rung.name for rung in rungs.CPU if not rung.gives_back])
def test_learns_as_in_32_bits(trained: Trained, half: Path, tmp_path: Path, rung: str) -> None:
    found, folder = train(trained, half, tmp_path / "half", "--set", f"memory.rung={rung}")
    assert found["weights"] == "bfloat16"
    assert {each.dtype for each in load_file(folder / "adapter_model.safetensors").values()} == {torch.float32}
    whole, _ = train(trained, trained.made["base"], tmp_path / "whole", "--set", f"memory.rung={rung}")
    assert whole["weights"] == "float32"
    assert found["final_loss"] == pytest.approx(whole["final_loss"], rel=0.1)
    assert found["final_loss"] < found["first_loss"] / 2


@pytest.mark.usefixtures("bfloat16")
def test_repeated_to_the_bit(trained: Trained, half: Path, tmp_path: Path) -> None:
    folders = [train(trained, half, tmp_path / name)[1] for name in ("first", "second")]
    first, second = ((folder / "adapter_model.safetensors").read_bytes() for folder in folders)
    assert first == second


def test_is_not_continued_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout.remember(tmp_path / loop.CHECKPOINTS, rungs.ladder(has_card=False, weights="bfloat16")[0])
    monkeypatch.setattr(models, "has_bfloat16", lambda: True)
    assert layout.remembered(tmp_path / loop.CHECKPOINTS).weights == "bfloat16"
    monkeypatch.setattr(models, "has_bfloat16", lambda: False)
    with pytest.raises(ArtifactError, match=r"was begun as 'lora' in bfloat16, on another device"):
        layout.remembered(tmp_path / loop.CHECKPOINTS)
