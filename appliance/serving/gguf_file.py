"""A look at a GGUF file before llama.cpp maps it: missing, truncated and foreign files are named in words.

Reads the header, the metadata's lengths and the tensor table; no tensor data. Format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. llama.cpp checks the rest (types, shapes, last tensor's end).
"""

import mmap
import struct
from pathlib import Path

from appliance.errors import ModelFileError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
STRING, ARRAY = 8, 9
SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
MAX_DIMENSIONS = 4


def check(path: Path) -> None:
    """Raises `ModelFileError` when `path` is no GGUF file or ends before its tensors do."""
    try:
        with path.open("rb") as stream:
            if stream.read(len(MAGIC)) != MAGIC:
                raise ModelFileError(f"{path} is no GGUF file: it does not begin with 'GGUF'. Name a .gguf model.")
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as view:
                _check_layout(path, view)
    except FileNotFoundError:
        raise ModelFileError(f"{path} does not exist; `appliance models list` shows what there is.") from None
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {error.strerror}.") from error


def _check_layout(path: Path, view: mmap.mmap) -> None:
    reader = _Reader(view)
    remedy = "copy it again, or make it again with `appliance run RECIPE`."
    try:
        version, tensors, pairs = reader.take("<IQQ")
        if version not in VERSIONS:
            supported = " and ".join(map(str, VERSIONS))
            raise ModelFileError(f"{path} is GGUF version {version}; this server reads versions {supported}.")
        alignment = DEFAULT_ALIGNMENT
        for _ in range(pairs):
            key = reader.string()
            (kind,) = reader.take("<I")
            if key == b"general.alignment" and kind == 4:
                (alignment,) = reader.take("<I")
            else:
                reader.skip_value(kind)
        last_offset = max((reader.tensor_offset() for _ in range(tensors)), default=0)
    except (struct.error, EOFError):
        raise ModelFileError(f"{path} is truncated: its {len(view)} bytes end inside the header; {remedy}") from None
    except (KeyError, RecursionError):
        raise ModelFileError(f"{path} is corrupt: byte {reader.at} of its header makes no sense; {remedy}") from None
    needed = -(-reader.at // max(alignment, 1)) * alignment + last_offset
    if tensors == 0:
        raise ModelFileError(f"{path} holds no tensors (a vocabulary only); name a model with weights.")
    if len(view) <= needed:
        raise ModelFileError(f"{path} is truncated: {len(view)} bytes, its last tensor begins at {needed}; {remedy}")


class _Reader:
    """Walks a GGUF header; raises `struct.error`, `EOFError` or `KeyError` where it makes no sense."""

    def __init__(self, view: mmap.mmap) -> None:
        self._view = view
        self.at = len(MAGIC)

    def take(self, layout: str) -> tuple[int, ...]:
        values = struct.unpack_from(layout, self._view, self.at)
        self.at += struct.calcsize(layout)
        return values

    def string(self) -> bytes:
        (length,) = self.take("<Q")
        start = self.at
        self._skip(length)
        return self._view[start : self.at]

    def skip_value(self, kind: int) -> None:
        if kind == STRING:
            self._skip(self.take("<Q")[0])
        elif kind == ARRAY:
            self._skip_array()
        else:
            self._skip(SCALAR_BYTES[kind])

    def tensor_offset(self) -> int:
        """Skips one entry of the tensor table; returns where its data begins, from the start of all data."""
        self.string()
        (dimensions,) = self.take("<I")
        if dimensions > MAX_DIMENSIONS:
            raise KeyError(dimensions)
        self.take(f"<{dimensions}QI")
        return self.take("<Q")[0]

    def _skip_array(self) -> None:
        kind, count = self.take("<IQ")
        if kind in SCALAR_BYTES:
            self._skip(SCALAR_BYTES[kind] * count)
            return
        if kind not in (STRING, ARRAY):
            raise KeyError(kind)
        for _ in range(count):  # every round moves on by 8 bytes or more, or raises at the end of the file
            self.skip_value(kind)

    def _skip(self, count: int) -> None:
        self.at += count
        if self.at > len(self._view):
            raise EOFError
