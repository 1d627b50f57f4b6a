"""How much memory a merge of wide embeddings takes, in a process of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from benchmarks import processes
from convert import safetensors_file
from tests.running import environment

TOKENS, WIDTH, RANK = 152_000, 1024, 16
MATRIX_BYTES = 2 * TOKENS * WIDTH
EMBEDDINGS, HEAD, LAYER = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.self_attn.q_proj.weight"


def write(file: Path, shapes: Mapping[str, Sequence[int]], dtype: str) -> None:
    """Tensors of random bytes; numbers do not matter here."""

    def content(_name: str, shape: Sequence[int]) -> Iterator[bytes]:
        width = safetensors_file.ELEMENT_BYTES[dtype] * shape[1]
        for _ in range(shape[0]):
            yield os.urandom(16) * (width // 16)

    safetensors_file.write(file, {name: (dtype, shape) for name, shape in shapes.items()}, content)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["F32", "BF16"], ids=["saved in 32 bits", "saved in 16 bits"])
@pytest.mark.parametrize("is_lora", [False, True], ids=["trained whole", "LoRA on them"])
def test_wide_embeddings_are_never_held(root: Path, tmp_path: Path, dtype: str, is_lora: bool) -> None:
    """The promise is 1.5 GB and the largest tensor; held whole, torch and two copies would take over 800 MB already."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    (base / "config.json").write_text("{}")
    whole = {EMBEDDINGS: (TOKENS, WIDTH), HEAD: (TOKENS, WIDTH)}
    write(base / "model.safetensors", {**whole, LAYER: (WIDTH, WIDTH)}, "BF16")
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 16}))
    stem = "base_model.model." + LAYER.removesuffix(".weight")
    shapes: dict[str, Sequence[int]] = {f"{stem}.lora_A.weight": (RANK, WIDTH), f"{stem}.lora_B.weight": (WIDTH, RANK)}
    for name in whole:
        stem = "base_model.model." + name.removesuffix(".weight")
        if is_lora:
            shapes |= {f"{stem}.base_layer.weight": (TOKENS, WIDTH)}
            kind = ("_embedding_A", "_embedding_B") if name == EMBEDDINGS else ("_A.weight", "_B.weight")
            into, out = (TOKENS, WIDTH) if name == EMBEDDINGS else (WIDTH, TOKENS)
            shapes |= {f"{stem}.lora{kind[0]}": (RANK, into), f"{stem}.lora{kind[1]}": (out, RANK)}
        else:
            shapes |= {f"{stem}.weight": (TOKENS, WIDTH)}
    write(adapter / "adapter_model.safetensors", shapes, dtype)
    command = [sys.executable, "-m", "convert.merge", str(adapter), "--base", str(base)]
    with subprocess.Popen(
        command, env=environment(root), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        peak = 0
        while process.poll() is None:
            peak = max(peak, processes.anonymous_now(process.pid))
        assert process.returncode == 0, process.communicate()[1]
    assert (next(root.glob("merged/*/model.safetensors"))).stat().st_size > 2 * MATRIX_BYTES
    assert peak < 1_500_000_000 + MATRIX_BYTES
    assert peak < 600_000_000, f"{peak / 1e6:.0f} MB"
