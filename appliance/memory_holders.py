"""Who holds the memory that is not free: of the machine, from /proc; of a card, from the NVIDIA driver."""

import os
from pathlib import Path

from appliance.device import PROC, read_text


def own_bytes(proc: Path = PROC) -> int:
    """What this process holds of its own; mapped files do not count."""
    return _held(proc / str(os.getpid())) or 0


def largest(proc: Path = PROC) -> str | None:
    """The other process that holds the most: `python (process 4242, 3,120 MiB)`; None where none can be seen."""
    own = os.getpid()
    held = {
        int(folder.name): size
        for folder in proc.iterdir()
        if folder.name.isdecimal() and int(folder.name) != own and (size := _held(folder))
    }
    if not held:
        return None
    number = max(held, key=lambda each: held[each])
    name = (read_text(proc / str(number) / "comm") or "?").strip()
    return f"{name} (process {number}, {held[number] >> 20:,} MiB)"


def _held(folder: Path) -> int | None:
    """Of one process; None for one that has ended, or belongs to the kernel."""
    for line in (read_text(folder / "status") or "").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    return None
