"""Random weights, written straight in the layouts that llama.cpp reads: nothing is computed in floats and then quantized.

Each matrix has mean 0 and the standard deviation that was asked for. Layouts: `ggml-common.h` of the pinned llama.cpp. Knows
nothing of models.
"""

from collections.abc import Callable, Iterator, Mapping

import numpy as np

Bytes = np.ndarray  # of uint8, (blocks, bytes of a block)
PIECE_VALUES = 1 << 23


def pieces(kind: str, values: int, deviation: float, random: np.random.Generator) -> Iterator[np.ndarray]:
    """`values` numbers of ggml's type `kind`, in pieces that take little memory. `values` is a multiple of 256."""
    for start in range(0, values, PIECE_VALUES):
        yield _KINDS[kind](min(PIECE_VALUES, values - start), deviation, random)


def _f16(values: int, deviation: float, random: np.random.Generator) -> np.ndarray:
    return (random.standard_normal(values, dtype=np.float32) * np.float32(deviation)).astype(np.float16)


def _q8_0(values: int, deviation: float, random: np.random.Generator) -> Bytes:
    """d (f16), then 32 signed bytes."""
    blocks = _noise(values // 32, 34, random)
    _put_half(blocks, 0, deviation / _uniform_deviation(256))
    return blocks


def _q4_0(values: int, deviation: float, random: np.random.Generator) -> Bytes:
    """d (f16), then 32 times 4 bits that mean -8 to 7; the sign of d changes, or all weights together would lean."""
    blocks = _noise(values // 32, 18, random)
    signs = _signs(len(blocks), random)
    _put_half(blocks, 0, signs * deviation / _uniform_deviation(16))
    return blocks


def _q4_k(values: int, deviation: float, random: np.random.Generator) -> Bytes:
    """d and dmin (f16), 8 scales and 8 minima of 6 bits in 12 bytes, then 256 times 4 bits: d x scale x q - dmin x minimum.

    Each minimum is its scale, and dmin is 7.5 x d, the mean of q: so the mean is 0.
    """
    blocks = _noise(values // 256, 144, random)
    scales = random.integers(32, 64, (len(blocks), 8), dtype=np.uint8)
    low, high = scales[:, :4], scales[:, 4:]
    blocks[:, 4:8] = blocks[:, 8:12] = low | (high >> 4 << 6)
    blocks[:, 12:16] = (high & 15) | (high & 15) << 4
    unit = deviation / (_uniform_deviation(16) * _root_mean_square(32, 63))
    _put_half(blocks, 0, unit)
    _put_half(blocks, 2, 7.5 * unit)
    return blocks


def _q6_k(values: int, deviation: float, random: np.random.Generator) -> Bytes:
    """256 times 6 bits that mean -32 to 31, 16 scales (signed bytes), then d (f16)."""
    blocks = _noise(values // 256, 210, random)
    scales = random.integers(64, 128, (len(blocks), 16), dtype=np.int8) * _signs((len(blocks), 16), random)
    blocks[:, 192:208] = scales.astype(np.int8).view(np.uint8)
    _put_half(blocks, 208, deviation / (_uniform_deviation(64) * _root_mean_square(64, 127)))
    return blocks


def _noise(blocks: int, block_bytes: int, random: np.random.Generator) -> Bytes:
    words = random.integers(0, 1 << 64, -(-blocks * block_bytes // 8), dtype=np.uint64)
    return words.view(np.uint8)[: blocks * block_bytes].reshape(blocks, block_bytes)


def _put_half(blocks: Bytes, start: int, value: float | np.ndarray) -> None:
    halves = np.broadcast_to(np.asarray(value, dtype="<f2"), len(blocks))
    blocks[:, start : start + 2] = np.ascontiguousarray(halves).view(np.uint8).reshape(-1, 2)


def _signs(shape: int | tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    return random.integers(0, 2, shape, dtype=np.int8) * 2 - 1


def _uniform_deviation(steps: int) -> float:
    return float(((steps**2 - 1) / 12) ** 0.5)


def _root_mean_square(first: int, last: int) -> float:
    return float(np.sqrt(np.mean(np.arange(first, last + 1, dtype=np.float64) ** 2)))


_KINDS: Mapping[str, Callable[[int, float, np.random.Generator], np.ndarray]] = {
    "F16": _f16,
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_K": _q4_k,
    "Q6_K": _q6_k,
}
