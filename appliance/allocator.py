"""What a process's memory allocator keeps of what was freed, and tcmalloc, which keeps least and is fastest.

A training step frees thousands of tensors of all sizes. glibc's allocator cannot put most of them together again; told to
give each back to the system, it takes up to twice the time, since every page is then cleared anew. Figures:
docs/decisions.md.
"""

import ctypes
import ctypes.util
import os
from collections.abc import Mapping
from pathlib import Path

from appliance.device import PROC, read_text

TCMALLOC = "tcmalloc_minimal"  # of gperftools; Debian's package is libtcmalloc-minimal4
PRELOAD = "LD_PRELOAD"
# Kept beside what lives, of the most that a step holds: measured, for weights in 32 and in 16 bits.
KEPT_BY_TCMALLOC = 0.05
KEPT_BY_GLIBC: Mapping[str, float] = {"float32": 1.1, "bfloat16": 0.55}
MMAP_THRESHOLD, GIVEN_BACK_BYTES = -3, 128 << 10  # mallopt(3)


def is_tcmalloc(proc: Path = PROC) -> bool:
    """Whether this process allocates by it."""
    return "tcmalloc" in (read_text(proc / "self/maps") or "")


def kept_share(weights: str) -> float:
    """Of the most that a step holds, for weights of this type."""
    return KEPT_BY_TCMALLOC if is_tcmalloc() else KEPT_BY_GLIBC[weights]


def preloaded(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment with tcmalloc for a process to come, where this machine has it."""
    name = ctypes.util.find_library(TCMALLOC)
    if name is None or "tcmalloc" in environment.get(PRELOAD, ""):
        return dict(environment)
    return {**environment, PRELOAD: os.pathsep.join(filter(None, (name, environment.get(PRELOAD))))}


def release() -> None:
    """Gives back at once what was freed, after something that took much and will not come again."""
    release_free = getattr(ctypes.CDLL(None), "MallocExtension_ReleaseFreeMemory", None)
    if release_free is not None:
        release_free()


def give_back() -> None:
    """Has glibc give each freed block of 128 KiB or more back to the system at once; tcmalloc is left as it is."""
    libc = ctypes.CDLL(None)
    if not is_tcmalloc() and hasattr(libc, "mallopt"):  # not in musl
        libc.mallopt(MMAP_THRESHOLD, GIVEN_BACK_BYTES)
