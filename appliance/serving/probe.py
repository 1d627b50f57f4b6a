"""Loads a foreign GGUF file in a locked-up child process first: llama.cpp trusts it, and ends its process over some.

`check` is the entry; `python -m appliance.serving.probe FD PATH [BASE]` is the child. A file that crashes, hangs, takes more
memory or time than it may, or is refused by llama.cpp is a `ModelFileError` in words. A file with a manifest needs no probe:
its sha256 says that it is what the converter wrote. The child also reads every weight once, which the real load then finds
in the page cache.
"""

import math
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
from msgspec import Struct

import appliance
from appliance import config
from appliance.errors import ApplianceError, EnvironmentIncomplete, ModelFileError
from appliance.serving import gguf_file, sandbox
from appliance.serving.sandbox import SandboxReport

TIMEOUT_SECONDS = 600.0  # eight gigabytes from a slow disk
SPARE_MEMORY_BYTES = 2 << 30
CPU_SECONDS, CPU_BYTES_PER_SECOND = 60, 20_000_000
MAX_VERDICT_BYTES = 1 << 16
CONTEXT_TOKENS = 64
NO_GPU = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "ROCR_VISIBLE_DEVICES": ""}
REMEDY = "Copy it again or name another model."


class Verdict(Struct, frozen=True, kw_only=True):
    """What the child says: what is wrong with the file, if anything, and how well it was locked up."""

    problem: str | None
    sandbox: SandboxReport


def check(path: Path, base: Path | None = None, *, timeout_seconds: float = TIMEOUT_SECONDS) -> SandboxReport:
    """Raises `ModelFileError` unless the file can be loaded and computes one token. An adapter needs its `base`, a model.

    Returns what held the child back while it tried.
    """
    files = [path] if base is None else [path, base]
    _require_kinds(path, base)
    receiver, sender = os.pipe()
    try:
        child = _start(files, sender)
        os.close(sender)
        try:
            said = _read(receiver, time.monotonic() + timeout_seconds)
        finally:
            child.kill()
            code = child.wait()
    finally:
        os.close(receiver)
    if said is None:
        raise ModelFileError(f"{path} does not load within {timeout_seconds:g} s. {REMEDY}")
    try:
        verdict = msgspec.json.decode(said, type=Verdict)
    except msgspec.DecodeError:
        if said:
            raise ModelFileError(f"{path} is damaged: the process that loaded it talks nonsense. {REMEDY}") from None
        raise _death(path, code) from None
    if verdict.problem is not None:
        raise ModelFileError("".join(each if each.isprintable() else "?" for each in verdict.problem))
    return verdict.sandbox


def _require_kinds(path: Path, base: Path | None) -> None:
    if base is None:
        gguf_file.check(path)
        return
    header = gguf_file.read_metadata(path)
    if not header.is_adapter:
        raise ModelFileError(f"{path} is a {header.kind}, not an adapter; name the GGUF file of a LoRA.")
    known = gguf_file.check(base).architecture
    if header.architecture != known:
        raise ModelFileError(
            f"{path} is an adapter for {header.architecture!r}, but {base} is of the architecture {known!r}."
        )


def _start(files: Sequence[Path], sender: int) -> "subprocess.Popen[bytes]":
    source = str(Path(appliance.__file__).parents[1])
    path = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))
    return subprocess.Popen(
        [sys.executable, "-m", "appliance.serving.probe", str(sender), *map(str, files)],
        pass_fds=[sender],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,  # ggml's last words help nobody
        env={**config.quiet_environment(), **NO_GPU, "PYTHONPATH": path},
    )


def _read(receiver: int, deadline: float) -> bytes | None:
    """What the child writes until it closes its end, or dies; None when it takes too long."""
    said = b""
    with selectors.DefaultSelector() as selector:
        selector.register(receiver, selectors.EVENT_READ)
        while selector.select(max(0.0, deadline - time.monotonic())):
            piece = os.read(receiver, MAX_VERDICT_BYTES)
            said += piece
            if not piece or len(said) > MAX_VERDICT_BYTES:
                return said
    return None


def _death(path: Path, code: int) -> ApplianceError:
    """What the exit code of a child says that ended without a word."""
    if code == -signal.SIGILL:
        return EnvironmentIncomplete(
            "This CPU lacks instructions that llama.cpp was compiled for; use an image or a build for every x86-64 CPU."
        )
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        return ModelFileError(f"{path} costs more computing time or memory to load than a model of its size may. {REMEDY}")
    return ModelFileError(f"{path} is damaged: llama.cpp crashes over it ({_name(code)}). {REMEDY}")


def _name(code: int) -> str:
    return signal.Signals(-code).name if -code in set(signal.Signals) else f"exit code {code}"


def main() -> None:
    """The child. It has nothing but the files, and says one thing."""
    sender, files = int(sys.argv[1]), [Path(each) for each in sys.argv[2:]]
    size = sum(each.stat().st_size for each in files)
    report = sandbox.enter(
        files,
        memory_bytes=size + SPARE_MEMORY_BYTES,
        cpu_seconds=CPU_SECONDS + math.ceil(size / CPU_BYTES_PER_SECOND),
    )
    try:
        _load(*files)
        problem = None
    except ApplianceError as error:
        problem = str(error)
    os.write(sender, msgspec.json.encode(Verdict(problem=problem, sandbox=report))[:MAX_VERDICT_BYTES])


def _load(path: Path, base: Path | None = None) -> None:
    """Loads the file and computes one token. Raises `ModelFileError` or `EnvironmentIncomplete`."""
    from appliance.serving.decoder import Adapter, Feed
    from appliance.serving.engine_settings import EngineSettings
    from appliance.serving.llama import Context, Model, PoolingContext
    from appliance.serving.requests import SamplingSettings

    model = Model(base or path, is_mapped=True, is_repacked=False)
    name = "probed"
    settings = EngineSettings(
        name=name,
        model_path=str(base or path),
        sha256="",
        made_at=0,
        kind=model.kind,
        adapters={} if base is None else {name: str(path)},
        slots=1,
        context_tokens=CONTEXT_TOKENS,
        threads_decode=1,
        threads_prefill=1,
        kv_type="f16",
        is_mapped=True,
        is_repacked=False,
        queue_requests=0,
        queue_tokens=CONTEXT_TOKENS,
        is_speculating=False,
    )
    if model.kind == "embedding":
        PoolingContext(model, settings).embed([(0,)])
    elif model.kind == "rerank":
        PoolingContext(model, settings).score([(0,)])
    else:
        context = Context(model, settings)
        context.start(0, SamplingSettings(), None, None)
        context.decode([Feed(0, (0,), 0, True)], None if base is None else Adapter(name, 1.0))


if __name__ == "__main__":
    main()
