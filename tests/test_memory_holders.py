"""Who holds the memory: read from a made-up /proc, and from the real one."""

import os
from pathlib import Path

from appliance import memory_holders


def process(proc: Path, number: int, name: str, held_kib: int | None) -> None:
    folder = proc / str(number)
    folder.mkdir()
    (folder / "comm").write_text(f"{name}\n")
    held = "" if held_kib is None else f"RssAnon:\t{held_kib} kB\n"
    (folder / "status").write_text(f"Name:\t{name}\n{held}")


def test_names_who_holds_the_most(tmp_path: Path) -> None:
    process(tmp_path, os.getpid(), "me", 9_000_000)
    process(tmp_path, 424242, "firefox", 3_194_880)
    process(tmp_path, 17, "sshd", 2_000)
    process(tmp_path, 2, "kthreadd", None)
    (tmp_path / "meminfo").write_text("")
    assert memory_holders.largest(tmp_path) == "firefox (process 424242, 3,120 MiB)"
    assert memory_holders.own_bytes(tmp_path) == 9_000_000 << 10


def test_nobody_else_is_seen(tmp_path: Path) -> None:
    assert memory_holders.largest(tmp_path) is None


def test_this_process_holds_something() -> None:
    assert memory_holders.own_bytes() > 1 << 20
