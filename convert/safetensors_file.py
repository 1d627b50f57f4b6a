"""A safetensors file written tensor by tensor, so that memory never holds a whole shard.

The format is eight bytes of header length, a JSON header of `{name: {dtype, shape, data_offsets}}`, and the data in the
order of its offsets (the README of github.com/huggingface/safetensors). Reading is the library's: `safe_open` maps the file.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appliance.errors import ModelFileError

LENGTH_BYTES = 8
ALIGNMENT_BYTES = 8
FROM_TORCH = {"format": "pt"}  # transformers reads no file that does not say so
LARGEST_HEADER_BYTES = 100_000_000  # the library's own limit
COPIED_BYTES = 1 << 24
# Bytes of an element, by the format's name of its type; all that transformers writes for weights.
ELEMENT_BYTES = {
    "F64": 8,
    "I64": 8,
    "F32": 4,
    "I32": 4,
    "BF16": 2,
    "F16": 2,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file: its type by the format's name, its shape, and where its bytes lie in the file."""

    dtype: str
    shape: Sequence[int]
    start: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says about itself; tensors in the order of their bytes."""

    tensors: Mapping[str, Entry]
    metadata: Mapping[str, str]


def read_header(path: Path) -> Header:
    """Raises `ModelFileError` for a file that is cut short or is none."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(LENGTH_BYTES), "little")
        if size < LENGTH_BYTES or not 0 < length <= min(LARGEST_HEADER_BYTES, size - LENGTH_BYTES):
            raise ModelFileError(f"{path} is no whole safetensors file ({size} bytes); fetch it again.")
        try:
            table: dict[str, Any] = json.loads(stream.read(length))
            metadata = table.pop("__metadata__", {})
            begin = LENGTH_BYTES + length
            entries = {
                name: Entry(each["dtype"], each["shape"], begin + each["data_offsets"][0], _extent(each["data_offsets"]))
                for name, each in table.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelFileError(f"{path} has a header that cannot be read ({error}); fetch the file again.") from error
    end = max((each.start + each.size_bytes for each in entries.values()), default=begin)
    if end != size:
        raise ModelFileError(f"{path} has {size} bytes, its header promises {end}; fetch the file again.")
    for name, each in entries.items():
        if each.dtype not in ELEMENT_BYTES:
            raise ModelFileError(f"{path}: {name} is of type {each.dtype}; only {', '.join(ELEMENT_BYTES)} are read.")
        if ELEMENT_BYTES[each.dtype] * math.prod(each.shape) != each.size_bytes:
            raise ModelFileError(f"{path}: {name} has {each.size_bytes} bytes, not what its shape {each.shape} needs.")
    return Header(dict(sorted(entries.items(), key=lambda item: item[1].start)), metadata)


def rewrite(
    source: Path, target: Path, shapes: Mapping[str, Sequence[int]], change: Callable[[str], Iterable[bytes] | None]
) -> None:
    """Writes `source` again with some of its tensors changed.

    `change` gives a tensor's new bytes, in pieces, or None for one that stays; types stay, shapes are those of the source
    unless `shapes` has another.
    """
    header = read_header(source)
    tensors = {name: (entry.dtype, shapes.get(name, entry.shape)) for name, entry in header.tensors.items()}
    with source.open("rb") as old:

        def content(name: str, _shape: Sequence[int]) -> Iterable[bytes]:
            changed = change(name)
            return _pieces(old, header.tensors[name]) if changed is None else changed

        write(target, tensors, content, header.metadata)


def write(
    target: Path,
    tensors: Mapping[str, tuple[str, Sequence[int]]],
    content: Callable[[str, Sequence[int]], Iterable[bytes]],
    metadata: Mapping[str, str] = FROM_TORCH,
) -> None:
    """Writes tensors of given types and shapes, in this order; `content` gives the bytes of each, in pieces."""
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        size = ELEMENT_BYTES[dtype] * math.prod(shape)
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT_BYTES)
    with target.open("wb") as file:
        file.write(len(text).to_bytes(LENGTH_BYTES, "little") + text)
        begin = file.tell()
        for name, (_, shape) in tensors.items():
            for piece in content(name, shape):
                file.write(piece)
            if file.tell() != begin + table[name]["data_offsets"][1]:
                raise ModelFileError(f"{target}: {name} came out with another size than its shape {list(shape)}.")


def _pieces(stream: Any, entry: Entry) -> Iterable[bytes]:
    stream.seek(entry.start)
    left = entry.size_bytes
    while left:
        piece = stream.read(min(left, COPIED_BYTES))
        left -= len(piece)
        yield piece


def _extent(offsets: Sequence[int]) -> int:
    begin, end = offsets
    if not 0 <= begin <= end:
        raise ValueError(f"data_offsets {begin}, {end}")
    return end - begin
