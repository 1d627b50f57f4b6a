"""Locks this process up before it reads a model file: no network, no programs, no files but those it was given.

`enter` is called once, early, in a child process with one thread, and cannot be undone. Two parts of Linux do it: a seccomp
filter (which system calls; https://docs.kernel.org/userspace-api/seccomp_filter.html) and Landlock (which files;
https://docs.kernel.org/userspace-api/landlock.html). What the running kernel lacks is reported, never passed over. Both need
no privilege, work inside containers, and only ever add to what a container forbids already. Pipes and sockets that are open
already keep working. Knows nothing of models.
"""

import ctypes
import os
import resource
import stat
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from msgspec import Struct

from appliance.serving import seccomp_filter

PR_SET_NO_NEW_PRIVS = 38
SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC = 1, 1
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446  # the same on every architecture
LANDLOCK_CREATE_RULESET_VERSION = 1
LANDLOCK_RULE_PATH_BENEATH = 1
MAX_OPEN_FILES = 1024

# Landlock's rights, by the bits of its API.
WRITE_FILE, READ_FILE, READ_DIR, REMOVE_DIR, REMOVE_FILE, MAKE_DIR, MAKE_REG = (1 << bit for bit in (1, 2, 3, 4, 5, 7, 8))
REFER, TRUNCATE, IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
READING = READ_FILE | READ_DIR
WRITING = READING | WRITE_FILE | REMOVE_DIR | REMOVE_FILE | MAKE_DIR | MAKE_REG | REFER | TRUNCATE
DEVICE = READING | WRITE_FILE | IOCTL_DEV
ON_FILES = READ_FILE | WRITE_FILE | TRUNCATE | IOCTL_DEV  # the other rights are about folders
RIGHTS_BY_ABI = ((1, (1 << 13) - 1), (2, REFER), (3, TRUNCATE), (5, IOCTL_DEV))
TCP_BIND_AND_CONNECT, TCP_ABI = 0b11, 4
ABSTRACT_SOCKETS_AND_SIGNALS, SCOPE_ABI = 0b11, 6

SYSTEM = ("/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/proc/self", "/sys/fs/cgroup")
MACHINE = ("/proc/meminfo", "/proc/cpuinfo", "/proc/stat", "/sys/devices/system", "/sys/kernel/mm/transparent_hugepage")
RANDOM = ("/dev/urandom", "/dev/random", "/dev/zero")
GPU_SYSTEM = ("/opt", "/etc", "/proc", "/sys")
GPU_DEVICES = ("nvidia*", "kfd", "dri", "shm")


class SandboxReport(Struct, frozen=True, kw_only=True):
    """What is in force. `missing` says in words what the kernel could not do."""

    seccomp: bool
    landlock_abi: int  # 0: not in force
    missing: tuple[str, ...] = ()

    @property
    def is_complete(self) -> bool:
        return not self.missing

    def __str__(self) -> str:
        landlock = f"Landlock (ABI {self.landlock_abi})" if self.landlock_abi else None
        parts = " and ".join(filter(None, ("seccomp" if self.seccomp else None, landlock))) or "nothing"
        return f"sandbox: {parts}" + "".join(f"; {each}" for each in self.missing)


def enter(
    readable: Iterable[Path],
    writable: Sequence[Path] = (),
    *,
    needs_gpu: bool = False,
    memory_bytes: int | None = None,
    cpu_seconds: int | None = None,
) -> SandboxReport:
    """Forbids this process everything but computing, and the files at or below these paths.

    What is `readable` must exist; a `writable` folder is made. The parts of the system that Python, llama.cpp and (with
    `needs_gpu`) a GPU's driver read stay readable. `memory_bytes` limits private memory, not mapped files. Threads that run
    already escape Landlock; that is reported.
    """
    for folder in writable:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _limit(memory_bytes, cpu_seconds, is_writing=bool(writable))
    libc = ctypes.CDLL(None, use_errno=True)
    _call(libc.prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    missing: list[str] = []
    landlock_abi = _restrict_files(libc, list(readable), writable, needs_gpu, missing)
    is_filtered = _filter_calls(libc, missing)
    return SandboxReport(seccomp=is_filtered, landlock_abi=landlock_abi, missing=tuple(missing))


def _limit(memory_bytes: int | None, cpu_seconds: int | None, *, is_writing: bool) -> None:
    _lower(resource.RLIMIT_CORE, 0)  # a core file would hold prompts
    _lower(resource.RLIMIT_NOFILE, MAX_OPEN_FILES)
    if not is_writing and not any(_is_file(descriptor) for descriptor in (1, 2)):
        _lower(resource.RLIMIT_FSIZE, 0)
    if memory_bytes is not None:
        _lower(resource.RLIMIT_DATA, memory_bytes)
    if cpu_seconds is not None:
        _lower(resource.RLIMIT_CPU, cpu_seconds)


def _lower(limit: int, value: int) -> None:
    _, hard = resource.getrlimit(limit)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(limit, (value, value))


def _is_file(descriptor: int) -> bool:
    """Whether it is a log that must go on growing."""
    try:
        return stat.S_ISREG(os.fstat(descriptor).st_mode)
    except OSError:  # closed
        return False


def _filter_calls(libc: ctypes.CDLL, missing: list[str]) -> bool:
    machine = os.uname().machine
    program = seccomp_filter.program(machine, os.getpid())
    if program is None:
        missing.append(f"no system call filter is known for {machine}: calls are not restricted")
        return False
    code = ctypes.create_string_buffer(program)
    address = _FilterProgram(len(program) // seccomp_filter.INSTRUCTION_BYTES, ctypes.addressof(code))
    number = seccomp_filter.SECCOMP_NUMBERS[machine]
    try:
        stray = _call(libc.syscall, number, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, ctypes.byref(address))
    except OSError as error:
        missing.append(f"the kernel takes no seccomp filter ({error.strerror}): calls are not restricted")
        return False
    if stray:
        missing.append(f"thread {stray} has a seccomp filter of its own: calls are not restricted")
    return not stray


def _restrict_files(
    libc: ctypes.CDLL, readable: Sequence[Path], writable: Sequence[Path], needs_gpu: bool, missing: list[str]
) -> int:
    try:
        abi = _call(libc.syscall, LANDLOCK_CREATE_RULESET, None, 0, LANDLOCK_CREATE_RULESET_VERSION)
    except OSError as error:
        missing.append(f"the kernel has no Landlock ({error.strerror}): files are protected by their owners and modes only")
        return 0
    handled = sum(rights for since, rights in RIGHTS_BY_ABI if abi >= since)
    net = TCP_BIND_AND_CONNECT if abi >= TCP_ABI else 0
    scoped = ABSTRACT_SOCKETS_AND_SIGNALS if abi >= SCOPE_ABI else 0
    attributes = _RulesetAttributes(handled, net, scoped)
    size = 8 * (3 if scoped else 2 if net else 1)  # an older kernel knows fewer fields
    ruleset = _call(libc.syscall, LANDLOCK_CREATE_RULESET, ctypes.byref(attributes), size, 0)
    try:
        for path, rights in _rules(readable, writable, needs_gpu):
            _allow(libc, ruleset, path, rights & handled)
        _call(libc.syscall, LANDLOCK_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)
    threads = len(list(Path("/proc/self/task").iterdir()))
    if threads > 1:
        missing.append(f"{threads - 1} threads were running already: Landlock does not hold for them")
    return abi


def _rules(readable: Sequence[Path], writable: Sequence[Path], needs_gpu: bool) -> Iterable[tuple[Path, int]]:
    yield from ((path, READING) for path in readable)
    yield from ((path, WRITING) for path in writable)
    python = {sys.prefix, sys.base_prefix, sys.exec_prefix, *(entry or str(Path.cwd()) for entry in sys.path)}
    system = [*sorted(python), *SYSTEM, *MACHINE, *RANDOM, *(GPU_SYSTEM if needs_gpu else ())]
    yield from ((Path(name), READING) for name in system if os.access(name, os.F_OK))
    yield Path("/dev/null"), DEVICE
    if needs_gpu:
        yield from (
            (path, DEVICE | (WRITING if path.is_dir() else 0)) for name in GPU_DEVICES for path in Path("/dev").glob(name)
        )


def _allow(libc: ctypes.CDLL, ruleset: int, path: Path, rights: int) -> None:
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            rights &= ON_FILES
        rule = _PathBeneath(rights, descriptor)
        _call(libc.syscall, LANDLOCK_ADD_RULE, ruleset, LANDLOCK_RULE_PATH_BENEATH, ctypes.byref(rule), 0)
    finally:
        os.close(descriptor)


class _FilterProgram(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))


class _RulesetAttributes(ctypes.Structure):
    _fields_ = (("handled_access_fs", ctypes.c_uint64), ("handled_access_net", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


def _call(function: object, *arguments: object) -> int:
    """A call into libc, which takes whole words; raises `OSError`."""
    assert callable(function)
    words = [ctypes.c_long(each) if isinstance(each, int) else each for each in arguments]
    result = int(function(*words))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
