"""Memory that was freed goes back to the system."""

import subprocess
import sys

from appliance.serving.heap import INTERVAL_SECONDS, Heap

# Frees all but the last of many blocks: glibc keeps what lies below it.
FRAGMENTED = """
import ctypes, sys
from pathlib import Path
from appliance.serving.heap import INTERVAL_SECONDS, Heap

def anonymous():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))

c = ctypes.CDLL(None)
c.malloc.restype, c.malloc.argtypes, c.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
now = 0.0
heap = Heap(lambda: now)
blocks = [c.malloc(100_000) for _ in range(400)]
for block in blocks:
    ctypes.memset(block, 1, 100_000)
full = anonymous()
for block in blocks[:-1]:
    c.free(block)
freed = anonymous()
heap.use()
now = INTERVAL_SECONDS
assert heap.trim_in_time()
print(full, freed, anonymous())
"""


def test_freed_memory_is_given_back() -> None:
    output = subprocess.run([sys.executable, "-c", FRAGMENTED], check=True, capture_output=True, text=True).stdout
    full, freed, trimmed = map(int, output.split())
    assert freed > full - 4_000, "the C library gave it back by itself: nothing was tried"
    assert trimmed < full - 35_000


def test_not_more_often_than_once_in_a_while_and_only_after_work() -> None:
    now = 100.0
    heap = Heap(lambda: now)
    assert heap.seconds_left is None
    heap.use()
    assert heap.seconds_left == INTERVAL_SECONDS
    assert not heap.trim_in_time()
    now += INTERVAL_SECONDS
    assert heap.seconds_left == 0
    assert heap.trim_in_time()
    now += 2 * INTERVAL_SECONDS
    assert not heap.trim_in_time()
    assert heap.seconds_left is None
    heap.use()
    assert heap.trim_in_time()
