"""Imported by the server process of `quick_converter` alone: what llama.cpp's converters import, found in their folder."""

import importlib
import sys

from convert import llama_cpp_source

_FOLDER = llama_cpp_source.converter_dir()
sys.path[:0] = [str(_FOLDER), str(_FOLDER / "gguf-py")]
importlib.import_module("conversion.llama")
