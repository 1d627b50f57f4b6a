"""Opens the parts of a portable llama.cpp: a library for this CPU, and one for a card where its driver is.

Such a build (GGML_BACKEND_DL) computes nothing until it is told where they lie, which the Python package never does.
"""

import functools
from pathlib import Path
from typing import Any


@functools.cache  # told twice, every device would be there twice
def load(llama_cpp: Any) -> None:
    """Once per process, before `llama_backend_init`; `llama_cpp` is the module of C functions. Other builds need nothing."""
    folder = Path(llama_cpp.__file__).parent / "lib"
    if any(folder.glob("libggml-cpu-*.so")):
        llama_cpp._lib.ggml_backend_load_all_from_path(str(folder).encode())
