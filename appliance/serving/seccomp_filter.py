"""The list of system calls that a process which reads a model file may not make, as a program for the kernel's BPF machine.

Everything else is allowed: Python, threads and a GPU's driver need much that differs between versions. A forbidden call
fails with EPERM ("operation not permitted"), so that code which can do without goes on. Does not know how it is installed.
Instructions: <linux/bpf_common.h>, <linux/seccomp.h>. Numbers: the kernel's syscall tables.
"""

import errno
import struct
from collections.abc import Mapping, Sequence

INSTRUCTION_BYTES = 8
SECCOMP_NUMBERS: Mapping[str, int] = {"x86_64": 317, "aarch64": 277}
AUDIT_ARCHITECTURES: Mapping[str, int] = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
NUMBER_AT, ARCHITECTURE_AT, ARGUMENTS_AT = 0, 4, 16  # in struct seccomp_data

LOAD, AND, RETURN = 0x20, 0x54, 0x06
IF_EQUAL, IF_AT_LEAST, IF_ANY_BIT = 0x15, 0x35, 0x45
ALLOW, KILL_PROCESS, ERROR = 0x7FFF0000, 0x80000000, 0x00050000
X32_CALLS = 0x40000000  # a second set of numbers for the same calls on x86-64
CLONE_THREAD = 0x00010000
AF_UNIX, SOCK_STREAM, SOCKET_TYPES = 1, 1, 0xF
TIOCSTI, TIOCLINUX = 0x5412, 0x541C  # typing into the terminal

# name: (x86_64, aarch64); None where the architecture has no such call.
FORBIDDEN: Mapping[str, tuple[int | None, int | None]] = {
    # network: what is connected already stays usable
    **{"socket": (41, 198), "connect": (42, 203), "accept": (43, 202), "accept4": (288, 242), "bind": (49, 200)},
    "listen": (50, 201),
    # other programs and processes
    **{"fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281), "ptrace": (101, 117)},
    **{"process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "process_madvise": (440, 440), "kcmp": (312, 272)},
    **{"pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "pidfd_send_signal": (424, 424), "tkill": (200, 130)},
    **{"rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240), "unshare": (272, 97), "setns": (308, 268)},
    # files, behind Landlock's back
    **{"open_by_handle_at": (304, 265), "name_to_handle_at": (303, 264), "mknod": (133, None), "mknodat": (259, 33)},
    **{"chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None)},
    **{"fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54), "setxattr": (188, 5), "lsetxattr": (189, 6)},
    **{"fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16)},
    **{"mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "open_tree": (428, 428)},
    **{"move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433)},
    **{"mount_setattr": (442, 442), "quotactl": (179, 60), "quotactl_fd": (443, 443), "acct": (163, 89)},
    # parts of the kernel with a history of holes
    **{"bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425)},
    **{"io_uring_enter": (426, 426), "io_uring_register": (427, 427), "add_key": (248, 217), "request_key": (249, 218)},
    **{"keyctl": (250, 219), "lookup_dcookie": (212, 18), "modify_ldt": (154, None), "vmsplice": (278, 75)},
    # the machine itself
    **{"kexec_load": (246, 104), "kexec_file_load": (320, 294), "init_module": (175, 105), "finit_module": (313, 273)},
    **{"delete_module": (176, 106), "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225), "syslog": (103, 116)},
    **{"settimeofday": (164, 170), "clock_settime": (227, 112), "adjtimex": (159, 171), "clock_adjtime": (305, 266)},
    **{"sethostname": (170, 161), "setdomainname": (171, 162), "personality": (135, 92), "iopl": (172, None)},
    "ioperm": (173, None),
}
CLONE, CLONE3, SOCKETPAIR = (56, 220), (435, 435), (53, 199)
KILL, TGKILL, IOCTL, SENDTO = (62, 129), (234, 131), (16, 29), (44, 206)

Instruction = tuple[int, int, int, int]  # operation, instructions to skip when true, when false, operand


def program(machine: str, pid: int) -> bytes | None:
    """The filter for the process `pid`; None for an architecture whose numbers are not known."""
    if machine not in AUDIT_ARCHITECTURES:
        return None
    column = list(AUDIT_ARCHITECTURES).index(machine)
    code: list[Instruction] = [
        (LOAD, 0, 0, ARCHITECTURE_AT),
        (IF_EQUAL, 1, 0, AUDIT_ARCHITECTURES[machine]),
        (RETURN, 0, 0, KILL_PROCESS),
        (LOAD, 0, 0, NUMBER_AT),
    ]
    if machine == "x86_64":
        code += [(IF_AT_LEAST, 0, 1, X32_CALLS), _fail()]
    for numbers, body in _conditions(pid):
        code += [(IF_EQUAL, 0, len(body), numbers[column]), *body]
    forbidden = [numbers[column] for numbers in FORBIDDEN.values() if numbers[column] is not None]
    for left, number in zip(range(len(forbidden), 0, -1), forbidden, strict=True):
        assert number is not None
        code.append((IF_EQUAL, left, 0, number))
    code += [_allow(), _fail()]
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in code)


def _conditions(pid: int) -> Sequence[tuple[tuple[int, int], Sequence[Instruction]]]:
    """Calls that are allowed with some arguments only. Each body decides."""
    own_process = [_load(0), (IF_EQUAL, 1, 0, pid), _fail(), _allow()]
    return (
        (CLONE, [_load(0), (IF_ANY_BIT, 1, 0, CLONE_THREAD), _fail(), _allow()]),  # threads, not processes
        (CLONE3, [_fail(errno.ENOSYS)]),  # its flags lie where no filter can look; libc then takes clone
        (
            SOCKETPAIR,
            [_load(0), (IF_EQUAL, 0, 3, AF_UNIX), _load(1), (AND, 0, 0, SOCKET_TYPES), (IF_EQUAL, 1, 0, SOCK_STREAM)]
            + [_fail(), _allow()],
        ),
        (KILL, own_process),
        (TGKILL, own_process),
        (IOCTL, [_load(1), (IF_EQUAL, 2, 0, TIOCSTI), (IF_EQUAL, 1, 0, TIOCLINUX), _allow(), _fail()]),
        (SENDTO, [_load(4), (IF_EQUAL, 0, 2, 0), _load_high(4), (IF_EQUAL, 1, 0, 0), _fail(), _allow()]),  # no new address
    )


def _load(argument: int) -> Instruction:
    """The low half of an argument: both architectures are little-endian."""
    return (LOAD, 0, 0, ARGUMENTS_AT + 8 * argument)


def _load_high(argument: int) -> Instruction:
    return (LOAD, 0, 0, ARGUMENTS_AT + 8 * argument + 4)


def _allow() -> Instruction:
    return (RETURN, 0, 0, ALLOW)


def _fail(number: int = errno.EPERM) -> Instruction:
    return (RETURN, 0, 0, ERROR | number)
