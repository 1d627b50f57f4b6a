"""Foreign files in a locked-up child: sound ones pass, every way to fail is a `ModelFileError` in words."""

import os
import struct
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import gguf
import numpy as np
import pytest

from appliance.errors import EnvironmentIncomplete, ModelFileError
from appliance.serving import gguf_file, probe
from tests import tiny_gguf
from tests.serving.gguf_bytes import mutant

PYTHON = sys.executable


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf.write(tmp_path_factory.mktemp("model") / "tiny.gguf")


def adapter(path: Path, *, architecture: str = "qwen3", width: int = tiny_gguf.HIDDEN, is_adapter: bool = True) -> Path:
    """A LoRA of rank 4 for the queries of the first layer of the tiny model."""
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_type("adapter" if is_adapter else "model")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 8.0)
    rows = tiny_gguf.HEADS * tiny_gguf.HEAD_WIDTH
    writer.add_tensor("blk.0.attn_q.weight.lora_a", np.zeros((4, width), dtype=np.float32))
    writer.add_tensor("blk.0.attn_q.weight.lora_b", np.zeros((rows, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def stand_in(monkeypatch: pytest.MonkeyPatch, folder: Path, code: str) -> None:
    """Lets the child run other code than the probe's: FD is its pipe, PATH the file."""
    script = folder / "child.py"
    script.write_text(f"import os, sys, time, signal\nFD, PATH = int(sys.argv[3]), sys.argv[4]\n{textwrap.dedent(code)}")
    launcher = folder / "python"
    launcher.write_text(f'#!/bin/sh\nexec "{PYTHON}" "{script}" "$@"\n')
    launcher.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(launcher))


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_sound_model_passes_and_was_locked_up(tiny: Path) -> None:
    before = open_files()
    report = probe.check(tiny)
    assert report.seccomp
    assert report.landlock_abi or report.missing
    assert open_files() == before


def test_file_that_crashes_llama(tiny: Path, tmp_path: Path) -> None:
    """Two tokens of the same text are a failed assertion in llama.cpp, which ends the process."""
    doubled = tmp_path / "doubled.gguf"
    length = struct.pack("<Q", 1)
    doubled.write_bytes(tiny.read_bytes().replace(length + b"A", length + b"B", 1))
    gguf_file.check(doubled)
    with pytest.raises(ModelFileError, match=r"doubled\.gguf is damaged: llama\.cpp crashes over it \(SIGABRT\)"):
        probe.check(doubled)


def test_file_that_llama_refuses(tiny: Path, tmp_path: Path) -> None:
    strange = tmp_path / "strange.gguf"
    strange.write_bytes(tiny.read_bytes().replace(b"qwen3", b"qwenX"))
    with pytest.raises(ModelFileError, match=r"strange\.gguf cannot be loaded: .*qwenX"):
        probe.check(strange)


def test_damage_that_a_header_shows_starts_no_child(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny.read_bytes()[:-1])
    for path, said in ((cut, "is truncated"), (tmp_path / "none.gguf", "does not exist"), (tmp_path, "no regular file")):
        with pytest.raises(ModelFileError, match=said):
            probe.check(path)


def test_adapters(tiny: Path, tmp_path: Path) -> None:
    sound = adapter(tmp_path / "sound.gguf")
    assert probe.check(sound, base=tiny).seccomp
    with pytest.raises(ModelFileError, match="cannot be used as an adapter"):
        probe.check(adapter(tmp_path / "wide.gguf", width=96), base=tiny)


def test_adapters_and_models_are_not_mixed_up(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent")
    sound = adapter(tmp_path / "sound.gguf")
    with pytest.raises(ModelFileError, match="is a LoRA adapter, not a model"):
        probe.check(sound)
    with pytest.raises(ModelFileError, match="is a LoRA adapter, not a model"):
        probe.check(sound, base=sound)
    with pytest.raises(ModelFileError, match="is a model, not an adapter"):
        probe.check(tiny, base=tiny)
    with pytest.raises(ModelFileError, match="is an adapter for 'llama'"):
        probe.check(adapter(tmp_path / "llama.gguf", architecture="llama"), base=tiny)


def test_hang(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note = tmp_path / "pid"
    stand_in(monkeypatch, tmp_path, f"open({str(note)!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)")
    before = open_files()
    with pytest.raises(ModelFileError, match="does not load within 1 s"):
        probe.check(tiny, timeout_seconds=1.0)
    assert open_files() == before
    with pytest.raises(ProcessLookupError):
        os.kill(int(note.read_text()), 0)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", r"crashes over it \(SIGSEGV\)"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "more computing time or memory"),
        ("os.kill(os.getpid(), signal.SIGXCPU)", "more computing time or memory"),
        ("sys.exit(3)", r"crashes over it \(exit code 3\)"),
        ("os.write(FD, b'{\"problem\": 5}')", "talks nonsense"),
        ("os.write(FD, b'all is well')", "talks nonsense"),
        ("os.write(FD, b'x' * 60000); os.write(FD, b'x' * 60000)", "talks nonsense"),
        (
            'os.write(FD, b\'{"problem": "\\\\u001b[31m\\\\nbad", "sandbox": {"seccomp": true, "landlock_abi": 0}}\')',
            r"^\?\[31m\?bad$",
        ),
    ],
)
def test_ways_to_die(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, said: str) -> None:
    stand_in(monkeypatch, tmp_path, code)
    with pytest.raises(ModelFileError, match=said):
        probe.check(tiny)


def test_processor_that_is_too_old_is_not_the_file_s_fault(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, tmp_path, "os.kill(os.getpid(), signal.SIGILL)")
    with pytest.raises(EnvironmentIncomplete, match="This CPU lacks instructions"):
        probe.check(tiny)


def test_child_is_limited_in_time_and_memory(tiny: Path) -> None:
    """The real child's own set-up, with other work than llama.cpp's."""
    code = """
    import os, resource, sys
    from appliance.serving import probe
    def load(*files):
        limits = [resource.getrlimit(each)[0] for each in (resource.RLIMIT_DATA, resource.RLIMIT_CPU, resource.RLIMIT_FSIZE)]
        raise probe.ModelFileError(f"{limits} {open(files[0], 'rb').read(4)}")
    probe._load = load
    probe.main()
    """
    receiver, sender = os.pipe()
    command = [PYTHON, "-c", textwrap.dedent(code), str(sender), str(tiny)]
    quiet = subprocess.DEVNULL
    subprocess.run(command, pass_fds=[sender], stdout=quiet, stderr=quiet, timeout=60, check=True)
    os.close(sender)
    said = os.read(receiver, 4096).decode()
    os.close(receiver)
    size = tiny.stat().st_size
    assert f"[{size + probe.SPARE_MEMORY_BYTES}, {probe.CPU_SECONDS + 1}, 0] b'GGUF'" in said


@pytest.mark.slow
def test_mutants_never_do_worse_than_an_error(tiny: Path, tmp_path: Path) -> None:
    sound, header_bytes = tiny.read_bytes(), gguf_file.read_metadata(tiny).data_start
    damaged, ends = tmp_path / "mutant.gguf", {"passed": 0, "refused": 0, "header": 0, "hung": 0}
    deadline = time.monotonic() + 120.0
    for seed in range(100_000, 101_500):
        damaged.write_bytes(mutant(sound, header_bytes, seed))
        try:
            gguf_file.check(damaged)
        except ModelFileError:
            ends["header"] += 1
            continue
        if time.monotonic() > deadline:
            break
        try:
            probe.check(damaged, timeout_seconds=60.0)
            ends["passed"] += 1
        except ModelFileError as error:
            ends["hung" if "does not load within" in str(error) else "refused"] += 1
    assert min(ends["passed"], ends["refused"], ends["header"]) > 0, ends
    assert ends["hung"] == 0
