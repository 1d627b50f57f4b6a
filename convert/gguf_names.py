"""llama.cpp's own Python packages, of the pinned source distribution: the GGUF format, and how tensors are named in it.

An installed `gguf` may be older than the converter (PyPI's 0.19.0 lacks architectures that the pinned one has), so the two
are kept apart: the pinned packages are in the table of modules only while they are imported or asked.
"""

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

from convert import llama_cpp_source

PACKAGES = ("gguf", "conversion")
_pinned: dict[str, ModuleType] = {}


def gguf_package() -> Any:
    """The pinned `gguf` package, which reads and writes files."""
    with _importing():
        return importlib.import_module("gguf")


def tensor_names(settings: Mapping[str, Any]) -> Callable[[str], str | None]:
    """How the converter names tensors of a model with these settings: `model.layers.0.mlp.up_proj.weight` is
    `blk.0.ffn_up.weight`. Like the converter, it passes over where a multimodal model keeps its language model.
    """
    text = settings.get("text_config") or {}
    layers = next(
        int(table[key])
        for table in (text, settings)
        for key in ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
        if table.get(key)
    )
    with _importing():
        gguf, conversion = map(importlib.import_module, PACKAGES)
        architecture = conversion.get_model_architecture(dict(settings), conversion.ModelType.TEXT)
        table = gguf.get_tensor_name_map(conversion.get_model_class(architecture).model_arch, layers)
    return lambda name: table.get_name(name.replace("language_model.", ""), try_suffixes=(".weight", ".bias"))


@contextlib.contextmanager
def _importing() -> Iterator[None]:
    """Imports find the pinned packages inside, and what is installed afterwards."""
    folder = llama_cpp_source.converter_dir()
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in PACKAGES}
    path = list(sys.path)
    sys.path[:0] = [str(folder), str(folder / "gguf-py")]
    sys.modules.update(_pinned)
    try:
        yield
    finally:
        sys.path[:] = path
        found = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in PACKAGES}
        _pinned.update(found)
        for name in found:
            del sys.modules[name]
        sys.modules.update(kept)
