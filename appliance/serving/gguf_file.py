"""The header of a GGUF file, read without llama.cpp: what the model is, its tensors, and whether all of them are there.

Missing, truncated, foreign and corrupt files are named in words. A hostile file costs bounded time and memory: counts are
limited, long values are skipped, nothing is mapped. No tensor data is read. Knows nothing of how a model is run.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; the checks are those of llama.cpp's `gguf.cpp`, and more.
"""

import dataclasses
import os
import stat
import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from appliance.errors import ModelFileError
from appliance.gguf_types import ARRAY, BOOL, FILE_TYPES, SCALARS, STRING, TENSOR_TYPES

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
ADAPTER = "adapter"
MAX_PAIRS = MAX_TENSORS = 1 << 16
MAX_KEY_BYTES = 1024
MAX_TENSOR_NAME_BYTES = 63
MAX_DIMENSIONS = 4
MAX_HEADER_BYTES = 1 << 29
MAX_STRINGS = 1 << 22  # in all arrays together: tokens and merges of the largest vocabularies are a tenth of it
KEPT_STRING_BYTES = 1 << 20  # longer ones are skipped: embedded tokenizers, never a chat template
KEPT_BYTES = 1 << 24  # of all strings together
KEPT_NUMBERS = 1024  # in one array: a number per layer
KEPT_NUMBERS_IN_ALL = 1 << 18
MAX_COUNT = (1 << 31) - 1
MAX_LAYERS = 512

PoolingType = Literal["none", "mean", "cls", "last", "rank"]
POOLING_TYPES: tuple[PoolingType, ...] = ("none", "mean", "cls", "last", "rank")


@dataclasses.dataclass(frozen=True, slots=True)
class Skipped:
    """A value that was not kept: an array of strings, a long array of numbers, or a long string (`length` in bytes)."""

    kind: str
    length: int


Value = str | int | float | bool | tuple[int | float | bool, ...] | Skipped


@dataclasses.dataclass(frozen=True, slots=True)
class Tensor:
    """One entry of the tensor table; the first dimension is the length of a row. `offset` counts from `data_start`."""

    name: str
    type: str
    shape: tuple[int, ...]
    size_bytes: int
    offset: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GgufHeader:
    """What a GGUF file says of itself. Counts are 0 where the file does not tell."""

    version: int
    architecture: str
    name: str
    kind: str  # general.type: "model", "adapter", ...
    file_type: int | None
    quantization: str  # by the file type, else the type that most bytes have
    block_count: int
    context_length: int
    embedding_length: int
    head_counts: tuple[int, ...]  # one per layer
    kv_head_counts: tuple[int, ...]  # one per layer; 0 where a layer has no attention
    key_length: int  # of one head
    value_length: int
    vocabulary_tokens: int
    pooling_type: PoolingType | None
    has_chat_template: bool
    values: Mapping[str, Value]
    tensors: tuple[Tensor, ...]
    data_start: int
    size_bytes: int  # of the file

    @property
    def is_adapter(self) -> bool:
        return self.kind == ADAPTER

    @property
    def tensor_bytes(self) -> int:
        return sum(tensor.size_bytes for tensor in self.tensors)

    @property
    def tensor_bytes_by_type(self) -> Mapping[str, int]:
        return _bytes_by_type(self.tensors)


def check(path: Path) -> GgufHeader:
    """As `read_metadata`, of a model; raises `ModelFileError` for an adapter, which is none by itself."""
    header = read_metadata(path)
    if header.is_adapter:
        raise ModelFileError(
            f"{path} is a LoRA adapter, not a model; name its base as the model, and this file in adapters."
        )
    return header


def read_metadata(path: Path) -> GgufHeader:
    """Raises `ModelFileError` when `path` is no GGUF file, is corrupt, or ends before its tensors do."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO would wait for a writer
    except FileNotFoundError:
        raise ModelFileError(f"{path} does not exist; `appliance models list` shows what there is.") from None
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {error.strerror}.") from error
    try:
        return _read(path, descriptor)
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {error.strerror}.") from error
    finally:
        os.close(descriptor)


class _Truncated(Exception):
    """The file ends inside its header."""


class _Corrupt(Exception):
    """The header makes no sense, in these words."""


def _read(path: Path, descriptor: int) -> GgufHeader:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise ModelFileError(f"{path} cannot be read: it is no regular file. Name a .gguf model.")
    if os.pread(descriptor, len(MAGIC), 0) != MAGIC:
        raise ModelFileError(f"{path} is no GGUF file: it does not begin with 'GGUF'. Name a .gguf model.")
    reader = _Reader(descriptor, status.st_size)
    remedy = "copy it again, or make it again with `appliance run RECIPE`."
    try:
        version, tensor_count, pair_count = reader.take(_OPENING)
        if version not in VERSIONS:
            endian = " (or its bytes are in big-endian order)" if version & 0xFFFF == 0 else ""
            supported = " and ".join(map(str, VERSIONS))
            raise ModelFileError(f"{path} is GGUF version {version}{endian}; this server reads versions {supported}.")
        values = _read_pairs(reader, pair_count)
        tensors = tuple(_read_tensors(reader, tensor_count, _alignment(values)))
        header = _header(version, values, tensors, reader.at, status.st_size)
    except _Truncated:
        raise ModelFileError(f"{path} is truncated: its {status.st_size} bytes end inside the header; {remedy}") from None
    except _Corrupt as error:
        raise ModelFileError(f"{path} is corrupt: {error} (about byte {reader.at} of its header); {remedy}") from None
    if not tensors:
        raise ModelFileError(f"{path} holds no tensors (a vocabulary only); name a model with weights.")
    needed = header.data_start + max(tensor.offset + tensor.size_bytes for tensor in tensors)
    if status.st_size < needed:
        raise ModelFileError(f"{path} is truncated: {status.st_size} bytes, its last tensor ends at {needed}; {remedy}")
    return header


_OPENING = struct.Struct("<IQQ")
_U32, _U64, _ARRAY = struct.Struct("<I"), struct.Struct("<Q"), struct.Struct("<IQ")
_LAYOUTS = {kind: struct.Struct(f"<{letter}") for kind, (_, letter) in SCALARS.items()}
_LAYOUTS[BOOL] = struct.Struct("<B")


class _Reader:
    """Walks a header from byte to byte; raises `_Truncated` at the end of the file."""

    WINDOW_BYTES = 1 << 20

    def __init__(self, descriptor: int, size_bytes: int) -> None:
        self._descriptor, self._size = descriptor, size_bytes
        self._window, self._start = b"", 0
        self._strings_left, self._kept_left, self._numbers_left = MAX_STRINGS, KEPT_BYTES, KEPT_NUMBERS_IN_ALL
        self.at = len(MAGIC)

    def take(self, layout: struct.Struct) -> tuple[Any, ...]:
        start = self._claim(layout.size)  # may renew the window
        return layout.unpack_from(self._window, start)

    def text(self, limit: int) -> str:
        """A short string that must be there whole."""
        (length,) = self.take(_U64)
        if length > limit:
            raise _Corrupt(f"a name of {length} bytes, the limit is {limit}")
        return self._text(length)

    def value(self, kind: int) -> Value:
        if kind == STRING:
            (length,) = self.take(_U64)
            if length <= min(KEPT_STRING_BYTES, self._kept_left):
                self._kept_left -= length
                return self._text(length)
            self._skip(length)
            return Skipped("string", length)
        if kind == ARRAY:
            return self._array()
        return self._number(kind)

    def _array(self) -> Value:
        kind, count = self.take(_ARRAY)
        if kind == STRING:
            self._strings_left -= count
            if self._strings_left < 0:
                raise _Corrupt(f"an array of {count} strings, the limit is {MAX_STRINGS} in all")
            self._skip_strings(count)
            return Skipped("string", count)
        if kind not in SCALARS:
            raise _Corrupt(f"an array of values of the unknown type {kind}")
        if count <= min(KEPT_NUMBERS, self._numbers_left):
            self._numbers_left -= count
            return tuple(self._number(kind) for _ in range(count))
        self._skip(count * _LAYOUTS[kind].size)
        return Skipped(SCALARS[kind][0], count)

    def _number(self, kind: int) -> int | float | bool:
        if kind not in SCALARS:
            raise _Corrupt(f"a value of the unknown type {kind}")
        number: int | float = self.take(_LAYOUTS[kind])[0]
        return number != 0 if kind == BOOL else number

    def _text(self, length: int) -> str:
        start = self._claim(length)
        return self._window[start : start + length].decode(errors="replace")

    def _skip(self, count: int) -> None:
        self.at += count
        if self.at > self._size:
            raise _Truncated
        if self.at > MAX_HEADER_BYTES:
            raise _Corrupt(f"a header of more than {MAX_HEADER_BYTES >> 20} MiB")

    def _skip_strings(self, count: int) -> None:
        """A vocabulary and its merges are 300,000 of them: calls for each would be most of what reading a header takes."""
        at, limit = self.at, min(self._size, MAX_HEADER_BYTES)
        length_at, prefix = _U64.unpack_from, _U64.size
        window, start = self._window, self._start
        for _ in range(count):
            if not start <= at <= start + len(window) - prefix:
                self.at = at
                self._claim(prefix)
                window, start = self._window, self._start
            at += prefix + length_at(window, at - start)[0]
            if at > limit:
                break
        self._skip(at - self.at)

    def _claim(self, count: int) -> int:
        """Moves on by `count` bytes; returns where in the window they begin."""
        begin = self.at
        self._skip(count)
        if begin < self._start or self.at > self._start + len(self._window):
            self._window = os.pread(self._descriptor, max(count, self.WINDOW_BYTES), begin)
            self._start = begin
            if len(self._window) < count:  # somebody shortens the file while it is read
                raise _Truncated
        return begin - self._start


def _read_pairs(reader: _Reader, count: int) -> dict[str, Value]:
    if count > MAX_PAIRS:
        raise _Corrupt(f"{count} metadata values, the limit is {MAX_PAIRS}")
    values: dict[str, Value] = {}
    for _ in range(count):
        key = reader.text(MAX_KEY_BYTES)
        if not key or key in values:
            raise _Corrupt(f"the metadata key {key[:80]!r} is empty or there twice")
        values[key] = reader.value(reader.take(_U32)[0])
    return values


def _read_tensors(reader: _Reader, count: int, alignment: int) -> Iterator[Tensor]:
    if count > MAX_TENSORS:
        raise _Corrupt(f"{count} tensors, the limit is {MAX_TENSORS}")
    names = set()
    for _ in range(count):
        tensor = _read_tensor(reader)
        if tensor.name in names:
            raise _Corrupt(f"the tensor {tensor.name!r} is there twice")
        if tensor.offset % alignment:
            raise _Corrupt(f"the tensor {tensor.name!r} begins at {tensor.offset}, no multiple of {alignment}")
        names.add(tensor.name)
        yield tensor


def _read_tensor(reader: _Reader) -> Tensor:
    name = reader.text(MAX_TENSOR_NAME_BYTES)
    (dimensions,) = reader.take(_U32)
    if dimensions > MAX_DIMENSIONS:
        raise _Corrupt(f"the tensor {name!r} has {dimensions} dimensions, the limit is {MAX_DIMENSIONS}")
    shape = tuple(reader.take(_U64)[0] for _ in range(dimensions))
    kind, offset = reader.take(_ARRAY)
    if kind not in TENSOR_TYPES:
        raise _Corrupt(f"the tensor {name!r} is of the unknown type {kind}")
    type_name, block_values, block_bytes = TENSOR_TYPES[kind]
    elements = 1
    for length in shape:
        elements *= length
    row = shape[0] if shape else 1
    if elements == 0 or elements > 1 << 62 or row % block_values:
        raise _Corrupt(f"the tensor {name!r} of type {type_name} has the impossible shape {shape}")
    return Tensor(name, type_name, shape, elements // block_values * block_bytes, offset)


def _alignment(values: Mapping[str, Value]) -> int:
    alignment = values.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise _Corrupt(f"general.alignment is {alignment!r}, no power of 2")
    return alignment


def _header(version: int, values: Mapping[str, Value], tensors: tuple[Tensor, ...], end: int, size_bytes: int) -> GgufHeader:
    said = _Values(values)
    alignment = _alignment(values)
    architecture = said.text("general.architecture")
    if not architecture:
        raise _Corrupt("general.architecture is missing")
    if (parts := said.count("split.count")) > 1:
        raise _Corrupt(f"it is one of {parts} parts; join them with `llama-gguf-split --merge`")
    layers = said.count(f"{architecture}.block_count", MAX_LAYERS)
    width = said.count(f"{architecture}.embedding_length")
    heads = said.per_layer(f"{architecture}.attention.head_count", layers)
    head_width = width // max(heads) if any(heads) else 0
    file_type = said.count("general.file_type") if "general.file_type" in values else None
    pooling = said.count(f"{architecture}.pooling_type") if f"{architecture}.pooling_type" in values else None
    if pooling is not None and pooling >= len(POOLING_TYPES):
        raise _Corrupt(f"{architecture}.pooling_type is {pooling}, not from 0 to {len(POOLING_TYPES) - 1}")
    by_type = _bytes_by_type(tensors)
    return GgufHeader(
        version=version,
        architecture=architecture,
        name=said.text("general.name"),
        kind=said.text("general.type") or "model",
        file_type=file_type,
        quantization=FILE_TYPES.get(-1 if file_type is None else file_type)
        or max(by_type, key=by_type.__getitem__, default=""),
        block_count=layers,
        context_length=said.count(f"{architecture}.context_length"),
        embedding_length=width,
        head_counts=heads,
        kv_head_counts=said.per_layer(f"{architecture}.attention.head_count_kv", layers, heads),
        key_length=said.count(f"{architecture}.attention.key_length") or head_width,
        value_length=said.count(f"{architecture}.attention.value_length") or head_width,
        vocabulary_tokens=said.length("tokenizer.ggml.tokens") or said.count(f"{architecture}.vocab_size"),
        pooling_type=None if pooling is None else POOLING_TYPES[pooling],
        has_chat_template="tokenizer.chat_template" in values,
        values=values,
        tensors=tensors,
        data_start=-(-end // alignment) * alignment,
        size_bytes=size_bytes,
    )


class _Values:
    """Metadata by key, with the type that the key must have."""

    def __init__(self, values: Mapping[str, Value]) -> None:
        self._values = values

    def text(self, key: str) -> str:
        value = self._values.get(key, "")
        if not isinstance(value, str):
            raise _Corrupt(f"{key} is {value!r}, no text")
        return value

    def count(self, key: str, limit: int = MAX_COUNT) -> int:
        return _count(key, self._values.get(key, 0), limit)

    def length(self, key: str) -> int:
        """The number of elements of an array."""
        value = self._values.get(key, ())
        return value.length if isinstance(value, Skipped) else len(value) if isinstance(value, tuple) else 0

    def per_layer(self, key: str, layers: int, default: Sequence[int] = ()) -> tuple[int, ...]:
        """A number for each layer, which the file gives once for all or one by one."""
        value = self._values.get(key)
        if value is None:
            return tuple(default) or (0,) * layers
        if not isinstance(value, tuple):
            return (_count(key, value, MAX_COUNT),) * layers
        if len(value) < layers:
            raise _Corrupt(f"{key} has {len(value)} numbers for {layers} layers")
        return tuple(_count(key, each, MAX_COUNT) for each in value[:layers])


def _count(key: str, value: Value, limit: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= limit:
        raise _Corrupt(f"{key} is {str(value)[:80]}, no whole number from 0 to {limit}")
    return value


def _bytes_by_type(tensors: Sequence[Tensor]) -> Mapping[str, int]:
    by_type: Counter[str] = Counter()
    for tensor in tensors:
        by_type[tensor.type] += tensor.size_bytes
    return by_type
