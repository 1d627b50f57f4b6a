"""Kills a process at every moment at which it touches a folder: `moments`."""

import itertools
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path


def moments(folder: Path, work: Callable[[], object]) -> Iterator[int]:
    """Runs `work` in a child that gets SIGKILL just before its first file operation in `folder`; then before its second,
    and so on, until a child ends by itself. Yields after each death; what a child did stays, until the caller mends it.
    """
    for number in itertools.count(1):
        child = os.fork()
        if child == 0:
            _die_before(number, str(folder))
            work()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            return
        assert os.WTERMSIG(status) == signal.SIGKILL
        yield number


def _die_before(number: int, folder: str) -> None:
    left = number

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        is_file_operation = event == "open" or event.startswith(("os.", "shutil."))
        if is_file_operation and any(isinstance(each, str | Path) and str(each).startswith(folder) for each in arguments):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
