"""GGUF files written byte by byte, so that every field can lie; and damaged copies of sound ones."""

import random
import struct
from collections.abc import Mapping, Sequence
from typing import Any

U32, STRING, ARRAY = 4, 8, 9


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def pair(key: str, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def u32(key: str, value: int) -> bytes:
    return pair(key, U32, struct.pack("<I", value))


def text(key: str, value: str) -> bytes:
    return pair(key, STRING, string(value))


def array(key: str, kind: int, count: int, values: bytes = b"") -> bytes:
    return pair(key, ARRAY, struct.pack("<IQ", kind, count) + values)


def tensor(name: str = "t", shape: Sequence[int] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def file(
    pairs: Sequence[bytes] = (),
    tensors: Sequence[bytes] | None = None,
    *,
    data: int = 128,
    version: int = 3,
    counts: Mapping[str, int] | None = None,
) -> bytes:
    """A sound file of one tensor, unless told otherwise; `counts` may lie about "pairs" and "tensors"."""
    pairs = [text("general.architecture", "llama"), *pairs]
    tensors = [tensor()] if tensors is None else tensors
    said: dict[str, Any] = {"pairs": len(pairs), "tensors": len(tensors), **(counts or {})}
    header = struct.pack("<4sIQQ", b"GGUF", version, said["tensors"], said["pairs"]) + b"".join(pairs) + b"".join(tensors)
    return header + b"\0" * (-len(header) % 32) + b"\0" * data


def mutant(sound: bytes, header_bytes: int, seed: int) -> bytes:
    """A damaged copy: bytes flipped, cut, doubled, or whole fields overwritten with what attackers choose."""
    chance = random.Random(seed)
    damaged = bytearray(sound)
    for _ in range(chance.choice((1, 1, 1, 2, 3, 8))):
        at = chance.randrange(4, max(5, min(header_bytes, len(damaged) - 1)))
        kind = chance.randrange(6)
        if kind == 0:
            damaged[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            damaged[at] = chance.randrange(256)
        elif kind == 2:
            width = chance.choice(("<I", "<Q"))
            nasty = (0, 1, 2, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1, len(sound), len(sound) + 1)
            field = struct.pack(width, chance.choice(nasty) % 2 ** (8 * struct.calcsize(width)))
            damaged[at : at + len(field)] = field
        elif kind == 3:
            del damaged[at : at + chance.randrange(1, 64)]
        elif kind == 4:
            piece = damaged[at : at + chance.randrange(1, 64)]
            damaged[at:at] = piece
        else:
            del damaged[chance.randrange(8, max(9, len(damaged))) :]
    return bytes(damaged)
