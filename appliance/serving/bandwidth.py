"""How fast this machine's memory can be read, measured in a moment: the limit of decoding, whose share is a metric.

Measured by the server's process before a model is loaded, so that nothing competes for memory, once after each boot; takes
less than a third of a second and at most 128 MiB. Knows nothing of models.
"""

import contextlib
import json
import math
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from appliance import artifacts, device

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MIB = 1 << 20
SMALLEST_BYTES, LARGEST_BYTES = 32 * MIB, 96 * MIB
CACHES = 3  # the buffer is so many times larger than the last-level cache, as far as the limit allows
SECONDS = 0.15
MIN_PASSES, MAX_PASSES = 3, 15
CPU_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # proc_sys_kernel(5)
NAME = "bandwidth.json"
SCHEMA = 1


def remembered(threads: int, folder: Path) -> float:
    """As `measure`, or what was measured with as many threads since the machine was started, kept in `folder`."""
    path, boot = folder / NAME, device.read_text(BOOT_ID)
    key = {"schema": SCHEMA, "boot": boot, "threads": threads}
    with contextlib.suppress(OSError, ValueError):  # missing or damaged: it is made again
        table = json.loads(path.read_text(encoding="utf-8"))
        rate = table.pop("bytes_per_second") if isinstance(table, dict) and "bytes_per_second" in table else None
        if boot and table == key and isinstance(rate, float) and math.isfinite(rate) and rate > 0:
            return rate
    rate = measure(threads)
    with contextlib.suppress(OSError):  # a folder that cannot be written to only costs time at the next start
        artifacts.write_atomically(path, json.dumps({**key, "bytes_per_second": rate}) + "\n")
    return rate


def measure(threads: int, *, seconds: float = SECONDS, buffer_bytes: int | None = None) -> float:
    """Bytes per second that `threads` threads read together: the median of several passes over a large buffer."""
    import numpy as np  # a tenth of a second that most starts do not need

    size = buffer_bytes or min(LARGEST_BYTES, max(SMALLEST_BYTES, CACHES * last_level_cache_bytes()))
    buffer = np.ones(size // 8, dtype=np.int64)  # written, so that each page is its own
    parts = np.array_split(buffer, threads)
    with ThreadPoolExecutor(threads) as pool:
        _read_all(pool, parts)
        rates: list[float] = []
        end = time.monotonic() + seconds
        while len(rates) < MIN_PASSES or (time.monotonic() < end and len(rates) < MAX_PASSES):
            started = time.perf_counter()
            _read_all(pool, parts)
            rates.append(buffer.nbytes / (time.perf_counter() - started))
    return statistics.median(rates)


def last_level_cache_bytes(folder: Path = CPU_CACHES) -> int:
    """The largest cache of the first core; 0 where the kernel does not say."""
    sizes = [path.read_text().strip() for path in folder.glob("index*/size")]
    units = {"K": 1 << 10, "M": MIB}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=0)


def _read_all(pool: ThreadPoolExecutor, parts: "list[NDArray[np.int64]]") -> None:
    """Each thread reads its part: `sum` keeps up with memory, releases the lock, and starts no threads of its own."""
    list(pool.map(lambda part: part.sum(), parts))
