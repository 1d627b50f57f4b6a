"""The kernel's page cache, for starts with a cold disk: drops a file from it and says how much of it is there."""

import ctypes
import mmap
import os
from pathlib import Path


def drop(path: Path) -> None:
    """Asks for the file's pages to be dropped; those that any process has mapped stay, which `cached_ratio` tells."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # a page that was not written yet cannot be dropped
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def cached_ratio(path: Path) -> float:
    """The share of the file's pages that are in memory, by mincore(2)."""
    size = path.stat().st_size
    pages = -(-size // mmap.PAGESIZE)
    library = ctypes.CDLL(None, use_errno=True)
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), size, access=mmap.ACCESS_COPY) as mapped:
        start = ctypes.c_char.from_buffer(mapped)
        try:
            states = (ctypes.c_ubyte * pages)()
            if library.mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(size), states):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
        finally:
            del start  # the map cannot be closed while something points into it
        return sum(state & 1 for state in states) / pages
