"""The bytes in which llama.cpp gives away the cells of a sequence and takes them back: checked, cut, joined and moved.

Layout, little-endian (commit 0c1e57098: `llama_context::state_seq_get_data`, `llama_kv_cache::state_write`): magic u32,
sequence i32, streams u32; then for each stream the number of cells u32, and where it is not 0: for each cell its position
i32, sequences u32, what some models keep beside it, sequence i32; whether values are transposed u32, layers u32; for each
layer of keys, then of values, their type i32, the bytes of a cell u64, and the cells one behind the other.
"""

import dataclasses
import struct
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from appliance.serving.decoder import SavedCells, SavedPart, SnapshotRefused
from appliance.serving.llama.rope import Keys, Rotation

_FRONT = struct.Struct("<IiI")  # magic, sequence, streams
_COUNT = struct.Struct("<I")
_LAYERS = struct.Struct("<II")
_ROWS = struct.Struct("<iQ")
PLAIN_CELL_BYTES = 12  # of position, number of sequences, sequence
POSITION_BYTES = 4  # the first of them
F16 = 1  # ggml_type
EXTRA_CELL_BYTES = (0, 8, 12)  # llama_kv_cell_ext, of models with positions in two dimensions

Bytes = npt.NDArray[np.uint8]
Chosen = slice | npt.NDArray[np.intp]


@dataclasses.dataclass(frozen=True, slots=True)
class _Rows:
    """The keys or the values of one layer: `width` bytes a cell, the first at `start`."""

    type: int
    width: int
    start: int


@dataclasses.dataclass(frozen=True, slots=True)
class _Layout:
    data: Bytes
    streams: int
    cells: int
    cell_start: int
    cell_width: int
    layers: int
    rows: Sequence[_Rows]

    @property
    def positions(self) -> npt.NDArray[np.int32]:
        return self.of_cells[:, :4].copy().view(np.int32)[:, 0]

    @property
    def of_cells(self) -> Bytes:
        return self._table(self.cell_start, self.cell_width)

    def table(self, rows: _Rows) -> Bytes:
        return self._table(rows.start, rows.width)

    def chosen(self, start: int, end: int) -> Chosen:
        """Where the cells of these positions lie, in order. Raises `SnapshotRefused` where one is missing."""
        positions = self.positions
        order = np.argsort(positions, kind="stable")
        wanted = order[(positions[order] >= start) & (positions[order] < end)]
        if not np.array_equal(positions[wanted], np.arange(start, end)):
            raise SnapshotRefused(f"Saved cells do not hold each of the positions {start} to {end - 1} once.")
        first = int(wanted[0]) if len(wanted) else 0
        is_run = np.array_equal(wanted, np.arange(first, first + len(wanted)))
        return slice(first, first + len(wanted)) if is_run else wanted

    def _table(self, start: int, width: int) -> Bytes:
        return self.data[start : start + self.cells * width].reshape(self.cells, width)


def check(cells: SavedCells, tokens: int, cell_bytes: int, kv_type: int) -> None:
    """Raises `SnapshotRefused` unless these are the cells of positions 0 to `tokens` - 1, of such a size and type."""
    layout = _layout(cells)
    layout.chosen(0, tokens)
    found = sum(rows.width for rows in layout.rows)
    if layout.cells != tokens or found != cell_bytes or any(rows.type != kv_type for rows in layout.rows):
        raise SnapshotRefused(
            f"{layout.cells} saved cells of {found} bytes, where {tokens} of {cell_bytes} are expected, or of another type."
        )


def is_whole(part: SavedPart) -> bool:
    """Whether nothing but the part is saved there."""
    return part.start == 0 and _layout(part.cells).cells == part.end


def can_be_taken(part: SavedPart, streams: int, most_cells: int) -> bool:
    """Whether a memory of so many streams takes the cells as they are; what is behind the part is taken then, too.

    A copy of the part alone is made where that is much.
    """
    if part.start > 0:
        return False
    layout = _layout(part.cells)
    return layout.streams == streams and part.end <= layout.cells <= min(most_cells, part.end + part.end // 4)


def join(parts: Sequence[SavedPart], streams: int, rotation: Rotation | None = None, buffer: Bytes | None = None) -> Bytes:
    """The cells of all parts, one behind the other from where the first begins, for a memory of so many streams.

    What was computed at other positions is moved. The result is at the beginning of the `buffer`, if that is large enough.
    Raises `SnapshotRefused` where the parts do not go together, or where there is no `rotation` to move them by.
    """
    layouts = [_layout(part.cells) for part in parts]
    chosen = [layout.chosen(part.start, part.end) for layout, part in zip(layouts, parts, strict=True)]
    first = layouts[0]
    kinds = {(each.cell_width, each.layers, tuple((rows.type, rows.width) for rows in each.rows)) for each in layouts}
    if len(kinds) > 1:
        raise SnapshotRefused("Saved cells of different models or types cannot be joined.")
    distances = _distances(parts)
    if any(distances) and (rotation is None or not _can_move(first)):
        raise SnapshotRefused("Saved cells of this model cannot be moved to other positions.")
    count = sum(part.end - part.start for part in parts)
    heads = len(first.rows) * _ROWS.size
    size = _FRONT.size + 4 * streams + _LAYERS.size + heads
    size += count * (first.cell_width + sum(rows.width for rows in first.rows))
    out = _Writer(size, buffer)
    magic, _, _ = _FRONT.unpack_from(first.data.data)
    out.write(_FRONT.pack(magic, 0, streams) + _COUNT.pack(count))
    for part, distance, layout, cells in zip(parts, distances, layouts, chosen, strict=True):
        placed = out.copy(layout.of_cells, cells)
        positions = np.arange(part.start, part.end, dtype=np.int32) + np.int32(distance)
        placed[:, :POSITION_BYTES] = positions.view(np.uint8).reshape(-1, POSITION_BYTES)
    out.write(_LAYERS.pack(0, first.layers))
    moved: list[tuple[Keys, int]] = []
    for number, rows in enumerate(first.rows):
        out.write(_ROWS.pack(rows.type, rows.width))
        for distance, layout, cells in zip(distances, layouts, chosen, strict=True):
            placed = out.copy(layout.table(layout.rows[number]), cells)
            if distance and number < first.layers:
                moved.append((placed.view(np.float16), distance))
    out.write(bytes(4 * (streams - 1)))
    if rotation is not None and moved:
        rotation.turn_all(moved)
    return out.data


def most_bytes(cells: int, streams: int, cell_bytes: int, layers: int) -> int:
    """Of what `join` gives for so many cells."""
    return _FRONT.size + 4 * streams + _LAYERS.size + 2 * layers * _ROWS.size + cells * (PLAIN_CELL_BYTES + cell_bytes)


def keys(cells: SavedCells) -> Sequence[Keys]:
    """Copies of the keys of each layer, in the order of their cells. Raises `SnapshotRefused` where they are not f16."""
    layout = _layout(cells)
    if not _can_move(layout):
        raise SnapshotRefused("its keys are kept in another type than f16 (kv_type)")
    return [layout.table(rows).view(np.float16).copy() for rows in layout.rows[: layout.layers]]


def _distances(parts: Sequence[SavedPart]) -> Sequence[int]:
    """How far each part has to be moved."""
    found, at = [], parts[0].start
    for part in parts:
        found.append(at - part.start)
        at += part.end - part.start
    return found


def _can_move(layout: _Layout) -> bool:
    return layout.cell_width == PLAIN_CELL_BYTES and all(rows.type == F16 for rows in layout.rows[: layout.layers])


class _Writer:
    def __init__(self, size: int, buffer: Bytes | None) -> None:
        if buffer is None or len(buffer) < size:
            buffer = np.empty(size, dtype=np.uint8)
        self.data: Bytes = buffer[:size]
        self._at = 0

    def write(self, data: bytes) -> None:
        self.data[self._at : self._at + len(data)] = np.frombuffer(data, np.uint8)
        self._at += len(data)

    def copy(self, table: Bytes, chosen: Chosen) -> Bytes:
        """Returns the copy, which may be changed."""
        rows = table[chosen]
        placed = self.data[self._at : self._at + rows.size].reshape(rows.shape)
        placed[:] = rows
        self._at += rows.size
        return placed


def _layout(cells: SavedCells) -> _Layout:
    data = memoryview(cells)
    try:
        _, _, streams = _FRONT.unpack_from(data)
        at, stream, count = _FRONT.size, 0, 0
        while not count and stream < streams:
            (count,) = _COUNT.unpack_from(data, at)
            at, stream = at + _COUNT.size, stream + 1
        end = len(data) - _COUNT.size * (streams - stream)
        for extra in EXTRA_CELL_BYTES:
            if count and (found := _rows(data, at, end, count, PLAIN_CELL_BYTES + extra)) is not None:
                layers, rows = found
                return _Layout(np.frombuffer(data, np.uint8), streams, count, at, PLAIN_CELL_BYTES + extra, layers, rows)
    except struct.error:
        pass
    raise SnapshotRefused(f"{len(data)} bytes are not the saved cells of one sequence, as this llama.cpp writes them.")


def _rows(data: memoryview, at: int, end: int, count: int, cell_width: int) -> tuple[int, list[_Rows]] | None:
    """The number of layers and what is kept for each, if cells of this width lead exactly to the end."""
    at += count * cell_width
    if at + _LAYERS.size > end:
        return None
    is_transposed, layers = _LAYERS.unpack_from(data, at)
    at += _LAYERS.size
    found: list[_Rows] = []
    while not is_transposed and at + _ROWS.size <= end and len(found) < 2 * layers:
        kind, width = _ROWS.unpack_from(data, at)
        found.append(_Rows(kind, width, at + _ROWS.size))
        at += _ROWS.size + count * width
    return (layers, found) if at == end and len(found) >= layers > 0 else None
