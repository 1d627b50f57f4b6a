"""Moves keys from the positions where they were computed to others: rotary embeddings turn by an angle for each position.

Llama.cpp's own shift turns every cell of the whole memory, those of other answers too; here only the cells that are moved
are turned, on the way into memory. Source: Su et al. 2021, https://arxiv.org/abs/2104.09864; which models turn which values
is llama.cpp's `build_rope_shift` (commit 0c1e57098). What of it is not done here (YaRN, several dimensions, other types
than f16) is refused, and `check` proves the rest for the model at hand.
"""

import concurrent.futures
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from llama_cpp import llama_cpp as c

from appliance.serving.decoder import SnapshotRefused
from appliance.serving.gguf_file import GgufHeader

FACTORS = "rope_freqs.weight"  # Llama 3's: each frequency is divided by one
DEFAULT_BASE = 10_000.0
CELLS_AT_ONCE = 256  # fewer cost more in calls of numpy, more do not stay in a core's cache
# Root mean square of the difference, of that of the keys. Rounding comes to 0.07 in a random 0.6B in four bits, where each
# layer rounds what the one before made of it; frequencies that are wrong by 1 in 2,000 to 0.21 at a distance of 2,000.
TOLERANCE = 0.12
# The same of each pair of values in the first layer, which depends on token and position alone: 0.0003 for all of them.
FIRST_TOLERANCE = 0.01

Keys = npt.NDArray[np.float16]


@dataclass(frozen=True, slots=True, eq=False)
class Rotation:
    """Of keys with heads of `width` values; `frequencies` are radians a position, one for each pair of values turned."""

    width: int
    frequencies: npt.NDArray[np.float64]
    is_interleaved: bool  # pairs are neighbours; else the first half of the values turned goes with the second
    threads: int = 1

    def worst_pair(self, moved: Keys, there: Keys) -> float:
        """How much the pair differs that differs most: root mean square of the difference, of that of its values."""
        pairs = len(self.frequencies)
        sums = []
        for keys in (moved.astype(np.float32) - there.astype(np.float32), there.astype(np.float32)):
            heads = keys.reshape(-1, self.width)[:, : 2 * pairs]
            each = heads.reshape(-1, pairs, 2) if self.is_interleaved else heads.reshape(-1, 2, pairs).swapaxes(1, 2)
            sums.append(np.square(each).sum(axis=(0, 2)))
        different, whole = sums
        return float(np.sqrt(different / np.maximum(whole, np.finfo(np.float32).tiny)).max())

    def turn_all(self, moved: Sequence[tuple[Keys, int]]) -> None:
        """`turn` for each; numpy lets other threads compute meanwhile."""
        with concurrent.futures.ThreadPoolExecutor(self.threads, "rotation") as pool:
            for _ in pool.map(lambda each: self.turn(*each), moved):
                pass

    def turn(self, keys: Keys, by: int) -> None:
        """Moves keys (cells, heads x width), in place, by so many positions."""
        angles = by * self.frequencies
        cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        pairs = len(angles)
        heads = keys.reshape(len(keys), -1, self.width)
        for start in range(0, len(heads), CELLS_AT_ONCE):
            turned = heads[start : start + CELLS_AT_ONCE, :, : 2 * pairs]
            values = turned.astype(np.float32)
            if self.is_interleaved:
                one, two = values[..., 0::2], values[..., 1::2]
            else:
                one, two = values[..., :pairs], values[..., pairs:]
            first, second = one * cos - two * sin, one * sin + two * cos
            one[...], two[...] = first, second
            turned[...] = values


def of(header: GgufHeader, path: Path, rope_type: int, threads: int) -> Rotation:
    """As the model turns its keys. Raises `SnapshotRefused` with the reason where that is not known here."""
    if rope_type not in (c.LLAMA_ROPE_TYPE_NORM, c.LLAMA_ROPE_TYPE_NEOX):
        raise SnapshotRefused(f"its positions are of a kind ({rope_type}) that cannot be moved here")
    values, architecture = header.values, header.architecture
    scaling = values.get(f"{architecture}.rope.scaling.type", "linear")  # as llama.cpp takes it
    if scaling not in ("none", "linear"):
        raise SnapshotRefused(f"its positions are scaled ({scaling}), and cannot be moved here")
    turned = _number(values.get(f"{architecture}.rope.dimension_count"), header.key_length)
    base = _number(values.get(f"{architecture}.rope.freq_base"), DEFAULT_BASE)
    factor = 1.0
    if scaling == "linear":
        named = values.get(f"{architecture}.rope.scaling.factor", values.get(f"{architecture}.rope.scale_linear"))
        factor = _number(named, 1.0)
    frequencies = base ** (-np.arange(0, int(turned), 2) / turned) / (factor or 1.0)
    factors = _factors(header, path)
    if factors is not None:
        if factors.shape != frequencies.shape:
            raise SnapshotRefused(f"it has {len(factors)} factors for {len(frequencies)} frequencies")
        frequencies = frequencies / factors
    is_interleaved = rope_type == c.LLAMA_ROPE_TYPE_NORM
    return Rotation(header.key_length, frequencies, is_interleaved=is_interleaved, threads=threads)


def check(rotation: Rotation, keys_at: Callable[[int], Sequence[Keys]], distance: int) -> None:
    """Holds moved keys against computed ones; `keys_at(position)` are those of a text from there on, layer by layer.

    Raises `SnapshotRefused` where they differ by more than rounding.
    """
    for layer, (moved, there) in enumerate(zip(keys_at(0), keys_at(distance), strict=True)):
        if moved.shape[1] % rotation.width:
            raise SnapshotRefused(f"its keys of layer {layer} have {moved.shape[1]} values, no multiple of {rotation.width}")
        rotation.turn(moved, distance)
        if not layer and (worst := rotation.worst_pair(moved, there)) > FIRST_TOLERANCE:
            raise SnapshotRefused(f"a pair of values in its first layer differs by {worst:.1%} where it was moved")
        off = _size(moved.astype(np.float32) - there.astype(np.float32)) / (_size(there.astype(np.float32)) or 1.0)
        if not off <= TOLERANCE:
            raise SnapshotRefused(f"keys of layer {layer} that were moved differ by {off:.0%} from those computed there")


def _size(values: npt.NDArray[np.float32]) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def _number(value: object, default: float) -> float:
    return float(value) if isinstance(value, int | float) else float(default)


def _factors(header: GgufHeader, path: Path) -> npt.NDArray[np.float32] | None:
    for tensor in header.tensors:
        if tensor.name == FACTORS:
            with path.open("rb") as file:
                file.seek(header.data_start + tensor.offset)
                return np.frombuffer(file.read(tensor.size_bytes), "<f4")
    return None
