"""The sandbox, tried out in child processes: what is forbidden fails, what an engine needs works, what lacks is told."""

import json
import os
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from appliance.serving import seccomp_filter
from tests import tiny_gguf

SOURCE = Path(__file__).parents[2]
# The child: `attempts` maps a name to "ok" or the exception's class.
PRELUDE = f"""
import ctypes, json, os, signal, socket, subprocess, sys, threading
from pathlib import Path
sys.path.insert(0, {str(SOURCE)!r})
from appliance.serving import sandbox, seccomp_filter
given, folder, hidden = map(Path, sys.argv[1:])
attempts = {{}}
def attempt(name, action):
    try:
        action()
        attempts[name] = "ok"
    except BaseException as error:
        attempts[name] = type(error).__name__
def done(report):
    told = {{"attempts": attempts, "abi": report.landlock_abi, "seccomp": report.seccomp, "missing": report.missing}}
    print(json.dumps(told), flush=True)
"""
EVERYTHING = """
ours, theirs = socket.socketpair()
held = open(hidden, "rb")
report = sandbox.enter([given], [folder])
def talk():
    ours.send(b"a"); theirs.sendmsg([b"b"])
    assert theirs.recv(1) == b"a" and ours.recvmsg(1)[0] == b"b"
def thread():
    one = threading.Thread(target=sum, args=([1],)); one.start(); one.join()
def write(path):
    path.write_text("x"); path.rename(path.with_name("renamed")); path.with_name("renamed").unlink()
attempt("inherited socket", talk)
attempt("event loop's socket pair", lambda: socket.socketpair())
attempt("threads", thread)
attempt("file opened before", held.read)
attempt("given file", given.read_bytes)
attempt("write in folder", lambda: write(folder / "new"))
attempt("subfolder", lambda: (folder / "sub").mkdir())
attempt("import", lambda: __import__("ctypes.util"))
attempt("/dev/null", lambda: Path("/dev/null").write_bytes(b"x"))
attempt("own status", lambda: Path("/proc/self/status").read_bytes())
attempt("meminfo", lambda: Path("/proc/meminfo").read_bytes())
attempt("signal to itself", lambda: os.kill(os.getpid(), 0))
attempt("TCP socket", lambda: socket.socket())
attempt("UDP socket", lambda: socket.socket(type=socket.SOCK_DGRAM))
attempt("unix socket", lambda: socket.socket(socket.AF_UNIX))
attempt("datagram pair", lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM))
attempt("send to an address", lambda: ours.sendto(b"x", str(folder / "s")))
attempt("fork", os.fork)
attempt("program", lambda: subprocess.run(["/bin/true"]))
attempt("exec", lambda: os.execv("/bin/true", ["true"]))
attempt("signal to the parent", lambda: os.kill(os.getppid(), 0))
attempt("chmod", lambda: given.chmod(0o600))
attempt("mknod", lambda: os.mknod(folder / "node"))
attempt("type into the terminal", lambda: __import__("fcntl").ioctl(0, 0x5412, b"x"))
attempt("F hidden file", hidden.read_bytes)
attempt("F hidden folder", lambda: list(hidden.parent.iterdir()))
attempt("F write the given file", lambda: given.write_bytes(b"x"))
attempt("F write beside it", lambda: (given.parent / "new").write_text("x"))
attempt("F passwords", lambda: Path("/etc/passwd").read_bytes())
attempt("F other processes", lambda: Path("/proc/1/cmdline").read_bytes())
attempt("F environment of the parent", lambda: Path(f"/proc/{os.getppid()}/environ").read_bytes())
attempt("F home", lambda: list(Path("/").iterdir()))
done(report)
"""
WORKS = ("inherited socket", "event loop's socket pair", "threads", "file opened before", "given file", "write in folder")
WORKS += ("subfolder", "import", "/dev/null", "own status", "meminfo", "signal to itself")


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path, Path]:
    given, folder, hidden = tmp_path / "given" / "model.gguf", tmp_path / "cache", tmp_path / "hidden" / "secret"
    for file in (given, hidden):
        file.parent.mkdir()
        file.write_bytes(b"content")
    return given, folder, hidden


def in_child(code: str, places: tuple[Path, Path, Path], **options: Any) -> Any:
    command = [sys.executable, "-c", PRELUDE + code, *map(str, places)]
    done = subprocess.run(
        command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60, check=False, **options
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check_everything(told: Any) -> None:
    assert told["seccomp"], told["missing"]
    for name, outcome in told["attempts"].items():
        if name in WORKS:
            assert outcome == "ok", name
        elif not name.startswith("F ") or told["abi"]:
            assert outcome in ("PermissionError", "OSError"), name
    assert told["abi"] or any("Landlock" in each for each in told["missing"])


def test_only_what_an_engine_needs(places: tuple[Path, Path, Path]) -> None:
    told = in_child(EVERYTHING, places)
    check_everything(told)
    assert (places[1].stat().st_mode & 0o777) == 0o700
    assert places[0].read_bytes() == b"content"


def test_as_an_ordinary_user() -> None:
    """Needs no privilege, which is also how it is in a container that runs as nobody."""
    if os.geteuid() != 0:
        pytest.skip("the tests run as an ordinary user anyway")
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        place.chmod(0o755)
        places = (place / "given", place / "cache", place / "hidden" / "secret")
        for file in (places[0], places[2]):
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(b"content")
        places[1].mkdir()
        places[1].chmod(0o777)
        loaded_first = "import msgspec, fcntl, ctypes.util\nos.setresuid(65534, 65534, 65534)\n"
        check_everything(in_child(loaded_first + EVERYTHING, places))


def test_twice_and_inside_a_process_that_may_gain_no_privileges(places: tuple[Path, Path, Path]) -> None:
    told = in_child("sandbox.enter([given, hidden], [folder])\n" + EVERYTHING, places)
    check_everything(told)


REFUSE = """
def refuse(number, error):
    call = seccomp_filter
    steps = [(call.LOAD, 0, 0, call.NUMBER_AT), (call.IF_EQUAL, 0, 1, number), call._fail(error), call._allow()]
    code = ctypes.create_string_buffer(b"".join(__import__("struct").pack("<HBBI", *step) for step in steps))
    program = sandbox._FilterProgram(len(steps), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    sandbox._call(libc.prctl, 38, 1, 0, 0, 0)
    sandbox._call(libc.syscall, call.SECCOMP_NUMBERS[os.uname().machine], 1, 0, ctypes.byref(program))
"""


def test_kernel_without_landlock_is_told_and_calls_are_filtered_all_the_same(places: tuple[Path, Path, Path]) -> None:
    told = in_child(REFUSE + "refuse(444, 38)\n" + EVERYTHING, places)
    check_everything(told)
    assert told["abi"] == 0
    assert told["missing"] == [
        "the kernel has no Landlock (Function not implemented): files are protected by their owners and modes only"
    ]


def test_kernel_without_seccomp_is_told(places: tuple[Path, Path, Path]) -> None:
    code = "refuse(seccomp_filter.SECCOMP_NUMBERS[os.uname().machine], 22)\ndone(sandbox.enter([given]))"
    told = in_child(REFUSE + code, places)
    assert not told["seccomp"]
    assert "the kernel takes no seccomp filter (Invalid argument): calls are not restricted" in told["missing"]


def test_threads_that_escape_are_told(places: tuple[Path, Path, Path]) -> None:
    code = "threading.Thread(target=signal.pause, daemon=True).start()\ndone(sandbox.enter([given]))\nos._exit(0)"
    told = in_child(code, places)
    assert told["seccomp"]
    assert not told["abi"] or told["missing"] == ["1 threads were running already: Landlock does not hold for them"]


def test_limits(places: tuple[Path, Path, Path]) -> None:
    code = """
import resource
report = sandbox.enter([given], memory_bytes=1 << 28, cpu_seconds=7)
attempt("memory", lambda: bytearray(1 << 29))
attempt("little memory", lambda: bytearray(1 << 20))
for name in ("CORE", "FSIZE", "CPU", "NOFILE"):
    attempts[name] = resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))[1]
done(report)
"""
    attempts = in_child(code, places)["attempts"]
    assert attempts["memory"] == "MemoryError"
    assert attempts["little memory"] == "ok"
    assert [attempts[name] for name in ("CORE", "FSIZE", "CPU")] == [0, 0, 7]
    assert attempts["NOFILE"] <= 1024


def test_a_log_file_goes_on_growing(places: tuple[Path, Path, Path], tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("wb") as stream:
        command = [sys.executable, "-c", PRELUDE + "sandbox.enter([given])\nos.write(2, b'still here')", *map(str, places)]
        subprocess.run(command, stderr=stream, timeout=60, check=True)
    assert log.read_bytes() == b"still here"


def test_what_is_missing_on_disk_is_an_error(places: tuple[Path, Path, Path]) -> None:
    code = "attempt('enter', lambda: sandbox.enter([given.with_name('none')]))\nprint(json.dumps(attempts))"
    assert in_child(code, places) == {"enter": "FileNotFoundError"}


def test_llama_computes_inside(places: tuple[Path, Path, Path]) -> None:
    given = tiny_gguf.write(places[0])
    code = """
report = sandbox.enter([given])
from appliance.serving.llama import Model
attempt("load", lambda: Model(given, is_mapped=True, is_repacked=True))
attempt("load unmapped", lambda: Model(given, is_mapped=False, is_repacked=False))
done(report)
"""
    told = in_child(code, (given, *places[1:]))
    assert told["attempts"] == {"load": "ok", "load unmapped": "ok"}


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_filter_judges_every_call_as_meant(machine: str) -> None:
    """The program, run by a small machine of our own, for both architectures."""
    program = seccomp_filter.program(machine, 4242)
    assert program is not None
    assert len(program) < 4096 * seccomp_filter.INSTRUCTION_BYTES
    column = list(seccomp_filter.AUDIT_ARCHITECTURES).index(machine)
    architecture = seccomp_filter.AUDIT_ARCHITECTURES[machine]
    forbidden = {numbers[column] for numbers in seccomp_filter.FORBIDDEN.values()} - {None}
    special = {each[column] for each in (seccomp_filter.CLONE, seccomp_filter.CLONE3, seccomp_filter.SOCKETPAIR)}
    special |= {each[column] for each in (seccomp_filter.KILL, seccomp_filter.TGKILL, seccomp_filter.SENDTO)}
    assert not forbidden & special

    def judge(number: int, *arguments: int, architecture: int = architecture) -> int:
        return run_filter(program, number, architecture, arguments)

    for number in range(600):
        if number in forbidden:
            assert judge(number) == seccomp_filter.ERROR | 1, number
        elif number not in special:
            assert judge(number) == seccomp_filter.ALLOW, number
    clone, clone3, pair = seccomp_filter.CLONE[column], seccomp_filter.CLONE3[column], seccomp_filter.SOCKETPAIR[column]
    assert judge(clone, 0x3D0F00) == seccomp_filter.ALLOW
    assert judge(clone, 0x11) == judge(clone, 0x10000011 & ~0x10000) == seccomp_filter.ERROR | 1
    assert judge(clone3, 0) == seccomp_filter.ERROR | 38
    assert judge(pair, 1, 1 | 0o2000000, 0) == seccomp_filter.ALLOW
    assert judge(pair, 1, 2, 0) == judge(pair, 2, 1, 0) == seccomp_filter.ERROR | 1
    for number in (seccomp_filter.KILL[column], seccomp_filter.TGKILL[column]):
        assert judge(number, 4242, 9) == seccomp_filter.ALLOW
        assert judge(number, 1, 9) == judge(number, 2**64 - 1, 9) == seccomp_filter.ERROR | 1
    sendto = seccomp_filter.SENDTO[column]
    assert judge(sendto, 3, 0, 1, 0, 0, 0) == seccomp_filter.ALLOW
    assert (
        judge(sendto, 3, 0, 1, 0, 0x7F0000000010, 16) == judge(sendto, 3, 0, 1, 0, 1 << 40, 16) == seccomp_filter.ERROR | 1
    )
    ioctl = seccomp_filter.IOCTL[column]
    assert judge(ioctl, 0, 0x5413) == seccomp_filter.ALLOW
    assert judge(ioctl, 0, 0x5412) == judge(ioctl, 0, 0x541C) == seccomp_filter.ERROR | 1
    assert judge(0, architecture=0x40000003) == seccomp_filter.KILL_PROCESS
    if machine == "x86_64":
        assert judge(0x40000000 | 0) == judge(0x40000000 | 41) == seccomp_filter.ERROR | 1


def test_other_architectures_have_no_filter() -> None:
    assert seccomp_filter.program("riscv64", 1) is None


def run_filter(program: bytes, number: int, architecture: int, arguments: tuple[int, ...]) -> int:
    data = struct.pack("<IIQ6Q", number, architecture, 0, *arguments, *[0] * (6 - len(arguments)))
    accumulator, at = 0, 0
    while True:
        operation, if_true, if_false, operand = struct.unpack_from("<HBBI", program, at * seccomp_filter.INSTRUCTION_BYTES)
        at += 1
        if operation == seccomp_filter.LOAD:
            (accumulator,) = struct.unpack_from("<I", data, operand)
        elif operation == seccomp_filter.AND:
            accumulator &= operand
        elif operation == seccomp_filter.RETURN:
            return int(operand)
        else:
            conditions = {
                seccomp_filter.IF_EQUAL: accumulator == operand,
                seccomp_filter.IF_AT_LEAST: accumulator >= operand,
                seccomp_filter.IF_ANY_BIT: bool(accumulator & operand),
            }
            at += if_true if conditions[operation] else if_false
