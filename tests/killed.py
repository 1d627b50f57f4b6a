"""Kills a process at every moment at which it touches a folder: `moments`; or where the work itself says so: `dies`."""

import itertools
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path


def moments(folder: Path, work: Callable[[], object]) -> Iterator[int]:
    """Runs `work` in a child that gets SIGKILL just before its first file operation in `folder`; then before its second,
    and so on, until a child ends by itself. Yields after each death; what a child did stays, until the caller mends it.
    """
    for number in itertools.count(1):
        if not dies(_until, number, str(folder), work):
            return
        yield number


def dies(work: Callable[..., object], *arguments: object) -> bool:
    """Whether a child that does the work ends by SIGKILL; otherwise it must have succeeded."""
    child = os.fork()
    if child == 0:
        try:
            work(*arguments)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0
        return False
    assert os.WTERMSIG(status) == signal.SIGKILL
    return True


def now(is_moment: bool = True) -> None:
    if is_moment:
        os.kill(os.getpid(), signal.SIGKILL)


def _until(number: int, folder: str, work: Callable[[], object]) -> None:
    _die_before(number, folder)
    work()


def _die_before(number: int, folder: str) -> None:
    left = number

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        is_file_operation = event == "open" or event.startswith(("os.", "shutil."))
        if is_file_operation and any(isinstance(each, str | Path) and str(each).startswith(folder) for each in arguments):
            left -= 1
            now(left == 0)

    sys.addaudithook(hook)
