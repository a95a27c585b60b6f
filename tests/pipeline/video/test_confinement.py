"""The filter of system calls, run step by step: what it answers on each architecture, this machine's or another."""

from __future__ import annotations

import struct

import pytest

from vidshard.pipeline.video.confinement import _CALLS, _program

PID = 4711
ALLOWED, EPERM, EAGAIN, ENOSYS = 0x7FFF0000, 0x00050001, 0x0005000B, 0x00050026

# Calls by name, from the tables of Linux: x86-64, and the generic ABI that aarch64 has.
NUMBERS = {
    "x86_64": {
        "read": 0, "write": 1, "close": 3, "mprotect": 10, "munmap": 11, "futex": 202, "getrandom": 318, "statx": 332,
        "recvmsg": 47, "exit_group": 231, "rt_sigreturn": 15, "socket": 41, "socketpair": 53, "connect": 42,
        "sendmsg": 46, "execve": 59, "execveat": 322, "fork": 57, "vfork": 58, "clone": 56, "clone3": 435,
        "ptrace": 101, "kill": 62, "tgkill": 234, "tkill": 200, "openat": 257, "openat2": 437, "unlinkat": 263,
        "renameat2": 316, "prlimit64": 302, "setrlimit": 160, "mmap": 9, "madvise": 28, "memfd_create": 319,
        "shmget": 29, "prctl": 157, "fcntl": 72, "ioctl": 16, "io_uring_setup": 425, "bpf": 321, "mount": 165,
        "setns": 308, "unshare": 272, "process_vm_readv": 310, "pidfd_open": 434, "fchmod": 91, "ftruncate": 77,
        "landlock_restrict_self": 446, "seccomp": 317, "setuid": 105, "keyctl": 250, "personality": 135,
    },
    "aarch64": {
        "read": 63, "write": 64, "close": 57, "mprotect": 226, "munmap": 215, "futex": 98, "getrandom": 278,
        "statx": 291, "recvmsg": 212, "exit_group": 94, "rt_sigreturn": 139, "socket": 198, "socketpair": 199,
        "connect": 203, "sendmsg": 211, "execve": 221, "execveat": 281, "clone": 220, "clone3": 435, "ptrace": 117,
        "kill": 129, "tgkill": 131, "tkill": 130, "openat": 56, "openat2": 437, "unlinkat": 35, "renameat2": 276,
        "prlimit64": 261, "setrlimit": 164, "mmap": 222, "madvise": 233, "memfd_create": 279, "shmget": 194,
        "prctl": 167, "fcntl": 25, "ioctl": 29, "io_uring_setup": 425, "bpf": 280, "mount": 40, "setns": 268,
        "unshare": 97, "process_vm_readv": 270, "pidfd_open": 434, "fchmod": 52, "ftruncate": 46,
        "landlock_restrict_self": 446, "seccomp": 277, "setuid": 146, "keyctl": 219, "personality": 92,
    },
}  # fmt: skip

ALWAYS = ("read", "write", "close", "mprotect", "munmap", "futex", "getrandom", "statx", "recvmsg", "exit_group")
OLD = (
    "socket", "socketpair", "connect", "sendmsg", "execve", "execveat", "fork", "vfork", "ptrace", "tkill", "unlinkat",
    "renameat2", "setrlimit", "memfd_create", "shmget", "bpf", "mount", "setns", "unshare", "process_vm_readv",
    "fchmod", "ftruncate", "seccomp", "setuid", "keyctl", "personality",
)  # fmt: skip
NEW = ("clone3", "openat2", "io_uring_setup", "pidfd_open", "landlock_restrict_self")


def answer(machine: str, name: str | int, *arguments: int, architecture: int | None = None) -> int:
    """Answer of an architecture's filter to a call."""
    calls = _CALLS[machine]
    number = NUMBERS[machine][name] if isinstance(name, str) else name
    given = [argument & (2**64 - 1) for argument in (*arguments, *[0] * (6 - len(arguments)))]
    data = struct.pack("<IIQ6Q", number, calls.architecture if architecture is None else architecture, 0, *given)
    steps = list(_program(calls, PID))
    assert len(steps) < 4096
    value, at = 0, 0
    while True:
        operation, if_true, if_false, operand = steps[at]
        assert 0 <= if_true < 256
        assert 0 <= if_false < 256
        at += 1
        match operation:
            case 0x20:
                [value] = struct.unpack_from("<I", data, operand)
            case 0x06:
                return operand
            case 0x15:
                at += if_true if value == operand else if_false
            case 0x35:
                at += if_true if value >= operand else if_false
            case 0x45:
                at += if_true if value & operand else if_false
            case _:
                raise AssertionError(operation)


@pytest.mark.parametrize("machine", NUMBERS)
def test_each_call_has_its_answer(machine: str) -> None:
    numbers = NUMBERS[machine]
    assert {answer(machine, name) for name in ALWAYS} == {ALLOWED}
    assert {answer(machine, name) for name in OLD if name in numbers} == {EPERM}
    assert {answer(machine, name) for name in NEW} == {ENOSYS}
    assert answer(machine, "clone", 0x11) == answer(machine, "clone", 0x3D0F00) == EAGAIN
    assert {answer(machine, number) for number in (500, 1000, 0x3FFFFFFF)} == {ENOSYS}
    assert {answer(machine, number) for number in (0x40000000, 0x40000001, 0xFFFFFFFF)} == {EPERM}
    assert answer(machine, "read", architecture=0x40000003) == EPERM  # 32-bit calls have other numbers


@pytest.mark.parametrize("machine", NUMBERS)
def test_arguments_decide_where_a_call_is_half_harmless(machine: str) -> None:
    for name in ("kill", "tgkill"):
        assert answer(machine, name, PID, 6) == ALLOWED
        for other in (PID + 1, 1, 0, -1, -PID, PID + (1 << 32)):
            assert answer(machine, name, other, 9) == EPERM
    assert answer(machine, "prlimit64", 0, 2, 0, 99) == answer(machine, "prlimit64", PID, 2, 0, 99) == ALLOWED
    for arguments in ((1, 2, 0, 99), (0, 2, 99, 0), (0, 2, 1 << 40, 0), (PID, 2, 99, 99)):
        assert answer(machine, "prlimit64", *arguments) == EPERM
    for flags in (0, 0o2000000, 0o100000 | 0o2000000):
        assert answer(machine, "openat", -100, 99, flags) == ALLOWED
    for flags in (1, 2, 3, 0o100, 0o1000, 0o20200000, 0o2000002):
        assert answer(machine, "openat", -100, 99, flags) == EPERM
    for flags in (0x22, 0x02, 0x01, 0x20022, 0x4022):
        assert answer(machine, "mmap", 0, 4096, 3, flags) == ALLOWED
    for flags in (0x21, 0x23, 0x28, 0x122, 0x102):
        assert answer(machine, "mmap", 0, 4096, 3, flags) == EPERM
    assert answer(machine, "madvise", 0, 4096, 4) == ALLOWED
    assert answer(machine, "madvise", 0, 4096, 100) == answer(machine, "madvise", 0, 4096, 101) == EPERM
    assert answer(machine, "prctl", 15, 99) == ALLOWED
    assert {answer(machine, "prctl", option) for option in (1, 4, 22, 24, 35, 38, 0x59616D61)} == {EPERM}
    assert answer(machine, "fcntl", 3, 1) == ALLOWED
    assert {answer(machine, "fcntl", 3, command) for command in (8, 10, 15, 1024, 1026, 1031)} == {EPERM}
    assert answer(machine, "ioctl", 3, 0x5401) == ALLOWED
    assert {answer(machine, "ioctl", 3, request) for request in (0x5412, 0x8901, 0x541B, 0x5421)} == {EPERM}
