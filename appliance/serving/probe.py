"""Loads a foreign GGUF file in a child process first: llama.cpp ends its process over some damaged files.

A file with a manifest needs no probe: its sha256 says that it is what the converter wrote. The child also reads every
weight once, which the real load then finds in the page cache.
"""

import contextlib
import multiprocessing
import os
import resource
from multiprocessing.connection import Connection
from pathlib import Path

from appliance.errors import ApplianceError, ModelFileError

TIMEOUT_SECONDS = 600.0  # eight gigabytes from a slow disk


def check(path: Path) -> None:
    """Raises `ModelFileError` when loading the file and computing one token fails, crashes or hangs."""
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    child = spawn.Process(target=_load, args=(path, sender), daemon=True)
    child.start()
    sender.close()
    try:
        said: str | None = None
        with contextlib.suppress(EOFError):  # it died without a word
            said = str(receiver.recv()) if receiver.poll(TIMEOUT_SECONDS) else "it did not load in time"
    finally:
        child.kill()
        child.join()
        receiver.close()
    if said is None:
        raise ModelFileError(f"{path} is damaged: llama.cpp crashes over it. Copy it again or name another model.")
    if said:
        raise ModelFileError(said)


def _load(path: Path, sender: Connection) -> None:
    """Runs in the child: sends "" when the model works, else what is wrong with it."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # ggml's last words help nobody
    from appliance.serving.engine import SamplingSettings
    from appliance.serving.llama import Context, Model
    from appliance.serving.scheduler import Feed

    try:
        context = Context(Model(path, repack=False), slots=1, context_tokens=64, threads=1)
        context.start(0, SamplingSettings())
        context.decode([Feed(0, (0,), 0, True)])
        sender.send("")
    except ApplianceError as error:
        sender.send(str(error))
