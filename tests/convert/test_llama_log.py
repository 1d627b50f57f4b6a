"""llama.cpp keeps a pointer to its log function: what quantizing leaves behind must be no dead one."""

import subprocess
import sys
from pathlib import Path

from tests import tiny_gguf

PROGRAM = """
import gc, sys
from pathlib import Path
from convert.quantizer import Settings, quantize_file
source, target = map(Path, sys.argv[1:])
quantize_file(source, target, Settings(type="Q8_0"))
gc.collect()
waste = [bytearray(100) for _ in range(100_000)]
from llama_cpp import llama_cpp as c
assert c.llama_model_load_from_file(str(source).encode(), c.llama_model_default_params())
"""


def test_a_model_can_be_loaded_after_one_was_quantized(tmp_path: Path) -> None:
    source = tiny_gguf.write(tmp_path / "tiny.gguf")
    command = [sys.executable, "-c", PROGRAM, str(source), str(tmp_path / "small.gguf")]
    assert subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode == 0
