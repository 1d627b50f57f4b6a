"""GGUF files with one thing changed in place: what verification must find."""

import shutil
from pathlib import Path

import gguf
import numpy as np


def template(file: Path, old: str, new: str) -> None:
    """Replaces a part of the chat template by one of the same length."""
    text(file, "tokenizer.chat_template", old, new)


def text(file: Path, key: str, old: str, new: str) -> None:
    """Replaces a part of a text by one of the same length."""
    value = _open(file).get_field(key)
    assert value is not None
    found = value.parts[value.data[0]]
    changed = bytes(found).replace(old.encode(), new.encode())
    assert len(changed) == len(found)
    assert changed != bytes(found)
    found[:] = np.frombuffer(changed, dtype=np.uint8)


def number(file: Path, key: str, value: int) -> None:
    field = _open(file).get_field(key)
    assert field is not None
    assert field.parts[field.data[0]][0] != value
    field.parts[field.data[0]][0] = value


def tensor(file: Path, name: str) -> None:
    """Turns the sign of a tensor."""
    (found,) = [each for each in _open(file).tensors if each.name == name]
    found.data[:] = -found.data


def scaled(file: Path, name: str, factor: float) -> None:
    """Makes a 16-bit tensor a little larger."""
    (found,) = [each for each in _open(file).tensors if each.name == name]
    found.data[:] = (found.data.astype(np.float32) * factor).astype(found.data.dtype)


def turned(file: Path, name: str) -> None:
    """Puts the rows of a tensor in another order."""
    (found,) = [each for each in _open(file).tensors if each.name == name]
    found.data[:] = found.data[::-1].copy()


def token(file: Path, text: str) -> None:
    """Changes the last letter of a token in the vocabulary."""
    value = _open(file).get_field("tokenizer.ggml.tokens")
    assert value is not None
    (part,) = [value.parts[index] for index in value.data if bytes(value.parts[index]) == text.encode()]
    part[-1] += 1


def control(file: Path, text: str) -> None:
    """Declares a word of the vocabulary a control token, which is found as before and never written."""
    reader = _open(file)
    tokens, kinds = (reader.get_field(f"tokenizer.ggml.{key}") for key in ("tokens", "token_type"))
    assert tokens is not None
    assert kinds is not None
    (place,) = [place for place, index in enumerate(tokens.data) if bytes(tokens.parts[index]) == text.encode()]
    kinds.parts[kinds.data[place]][0] = gguf.TokenType.CONTROL


def copy(file: Path, folder: Path) -> Path:
    """A copy without a manifest, in a folder of its own."""
    folder.mkdir(parents=True)
    return Path(shutil.copy(file, folder))


def _open(file: Path) -> gguf.GGUFReader:
    return gguf.GGUFReader(file, "r+")
