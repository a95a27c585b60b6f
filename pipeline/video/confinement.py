"""Confinement of a decoding process: what a video that took over FFmpeg can still do there.

The process gives up, for ever and before it sees the first byte of a video:

- every system call but those that decoding an open file takes (seccomp, a list of what is allowed). There is no new
  program, process or thread, no socket and so no network, no signal, limit or priority of another process, no memory
  that RLIMIT_DATA does not count, no change of permissions, owners, times or attributes, and no opening to write;
- opening any file outside of the interpreter's and the system's libraries to read (landlock). It is handed the video as
  an open descriptor;
- privileges of programs (no_new_privs), core dumps, more memory, and files beyond what an answer needs (rlimits, which
  it cannot lift, not even as root).

A call that is not listed is answered with an error and never kills. Calls since Linux 5.1 get ENOSYS, as on an older
kernel, for which libraries fall back; older ones get EPERM. Newer libraries on newer kernels therefore work as they do
on older kernels.

Everything is done with ctypes and without privileges. Where the kernel lacks a part, the others still hold.

Sources: linux/seccomp.h, linux/bpf_common.h, linux/landlock.h, and the system call tables of x86-64 and of the generic
ABI (aarch64).
"""

from __future__ import annotations

import ctypes
import importlib
import os
import platform
import resource
import struct
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 4, 38, 22, 2
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_EPERM, _EAGAIN, _ENOSYS = _ERRNO | 1, _ERRNO | 11, _ERRNO | 38
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16
"""Offsets in struct seccomp_data; arguments are 64 bits, low half first."""

_FIRST_UNIFIED = 424
"""System calls from this number on came with Linux 5.1 or later, and have the same number everywhere."""

_ANONYMOUS, _SHARED_OR_DROPPABLE, _GROWS_DOWN = 0x20, 0x09, 0x100
"""Flags of mappings. RLIMIT_DATA counts neither anonymous ones that are shared or droppable, nor those that grow."""
_ADVICE = (0, 1, 2, 3, 4, 8, 9, 10, 14, 15, 16, 17)
"""Advice for madvise; with others root could make the memory of libraries that others use fail (MADV_HWPOISON)."""
_TO_WRITE = 0o3 | 0o100 | 0o1000 | 0o20000000
"""O_WRONLY, O_RDWR, O_CREAT, O_TRUNC and O_TMPFILE."""
_IOCTLS = (0x5401, 0x5450, 0x5451)
"""TCGETS, FIONCLEX and FIOCLEX; others can send signals (FIOSETOWN) or type into a terminal (TIOCSTI)."""
_FCNTLS = (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030, 1034)
"""Copies of descriptors, their flags, locks and seals; F_SETOWN and F_SETSIG would send signals to other processes."""
_PRCTLS = (15, 16)
"""PR_SET_NAME and PR_GET_NAME; PR_SET_PDEATHSIG would let the process outlive its parent."""


@dataclass(frozen=True)
class _Calls:
    """System calls of an architecture."""

    architecture: int
    allowed: tuple[int, ...]
    signals: tuple[int, ...]
    """Calls whose first argument must be this process's id."""
    prlimit: int
    """Only to read limits of this process."""
    opening: tuple[tuple[int, int], ...]
    """Calls that open files, and which argument holds the flags."""
    clone: int
    mmap: int
    madvise: int
    fcntl: int
    ioctl: int
    prctl: int


_CALLS = {
    # read write close stat fstat lstat poll lseek, mprotect munmap brk rt_sigaction rt_sigprocmask rt_sigreturn,
    # pread64 pwrite64 readv writev access pipe select sched_yield mremap msync mincore, dup dup2 pause nanosleep
    # getitimer alarm setitimer getpid, sendto recvfrom recvmsg shutdown getsockname getpeername getsockopt, exit uname
    # flock fsync fdatasync getdents getcwd readlink, gettimeofday getrlimit getrusage sysinfo times, getuid getgid
    # geteuid getegid getppid getpgrp getgroups getresuid getresgid getpgid getsid, rt_sigpending rt_sigtimedwait
    # rt_sigsuspend sigaltstack statfs fstatfs sched_getparam sched_getscheduler sched_get_priority_max and _min,
    # arch_prctl gettid futex sched_getaffinity getdents64 set_tid_address restart_syscall fadvise64, clock_gettime
    # clock_getres clock_nanosleep exit_group epoll_wait epoll_ctl newfstatat readlinkat faccessat pselect6 ppoll
    # set_robust_list get_robust_list epoll_pwait eventfd2 epoll_create1 dup3 pipe2 preadv pwritev getcpu getrandom
    # membarrier statx rseq
    "x86_64": _Calls(
        architecture=0xC000003E,
        allowed=(
            0, 1, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13, 14, 15, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 32, 33, 34,
            35, 36, 37, 38, 39, 44, 45, 47, 48, 51, 52, 55, 60, 63, 73, 74, 75, 78, 79, 89, 96, 97, 98, 99, 100, 102,
            104, 107, 108, 110, 111, 115, 118, 120, 121, 124, 127, 128, 130, 131, 137, 138, 143, 145, 146, 147, 158,
            186, 202, 204, 217, 218, 219, 221, 228, 229, 230, 231, 232, 233, 262, 267, 269, 270, 271, 273, 274, 281,
            290, 291, 292, 293, 295, 296, 309, 318, 324, 332, 334,
        ),
        signals=(62, 234),  # kill tgkill
        prlimit=302,
        opening=((2, 1), (257, 2)),  # open openat
        clone=56,
        mmap=9,
        madvise=28,
        fcntl=72,
        ioctl=16,
        prctl=157,
    ),
    # getcwd eventfd2 epoll_create1 epoll_ctl epoll_pwait dup dup3 flock statfs fstatfs faccessat close pipe2 getdents64
    # lseek read write readv writev pread64 pwrite64 preadv pwritev pselect6 ppoll readlinkat newfstatat fstat fsync
    # fdatasync exit exit_group set_tid_address futex set_robust_list get_robust_list nanosleep getitimer setitimer
    # clock_gettime clock_getres clock_nanosleep sched_getscheduler sched_getparam sched_getaffinity sched_yield
    # sched_get_priority_max and _min restart_syscall sigaltstack rt_sig* getresuid getresgid times getpgid getsid
    # getgroups uname getrlimit getrusage getcpu gettimeofday getpid getppid getuid geteuid getgid getegid gettid
    # sysinfo getsockname getpeername sendto recvfrom getsockopt shutdown recvmsg brk munmap mremap fadvise64 mprotect
    # msync mincore getrandom membarrier statx rseq
    "aarch64": _Calls(
        architecture=0xC00000B7,
        allowed=(
            17, 19, 20, 21, 22, 23, 24, 32, 43, 44, 48, 57, 59, 61, 62, 63, 64, 65, 66, 67, 68, 69, 70, 72, 73, 78, 79,
            80, 82, 83, 93, 94, 96, 98, 99, 100, 101, 102, 103, 113, 114, 115, 120, 121, 123, 124, 125, 126, 128, 132,
            133, 134, 135, 136, 137, 139, 148, 150, 153, 155, 156, 158, 160, 163, 165, 168, 169, 172, 173, 174, 175,
            176, 177, 178, 179, 204, 205, 206, 207, 209, 210, 212, 214, 215, 216, 223, 226, 227, 232, 278, 283,
            291, 293,
        ),
        signals=(129, 131),
        prlimit=261,
        opening=((56, 2),),
        clone=220,
        mmap=222,
        madvise=233,
        fcntl=25,
        ioctl=29,
        prctl=167,
    ),
}  # fmt: skip


def confine(
    ruleset: int | None, *, max_file_bytes: int | None = None, max_memory_bytes: int | None = None
) -> list[str]:
    """Give up everything that decoding an open file does not need. Threads that run already are not confined.

    Args:
        ruleset: descriptor of `ruleset_of`, which is closed here.
        max_file_bytes: largest size to which the process may write a file; None for no limit.
        max_memory_bytes: memory that the process may allocate (RLIMIT_DATA); None for no limit.

    Returns:
        The parts that this system lacks: "no_new_privs", "landlock", "seccomp".
    """
    libc = ctypes.CDLL(None, use_errno=True)
    missing = []
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    most = _MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_OPEN_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # pipes and sockets hold memory too
    most = _soft_limit(resource.RLIMIT_STACK, _MAX_STACK_BYTES)  # unlimited on many clusters, and not in RLIMIT_DATA
    resource.setrlimit(resource.RLIMIT_STACK, (most, most))
    if max_memory_bytes is not None:
        # RLIMIT_DATA counts neither mappings that are only read nor their page tables, 2 GiB for each TiB
        most = _soft_limit(resource.RLIMIT_AS, _address_space() + max_memory_bytes + _MAX_READ_BYTES)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    if max_file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        return ["no_new_privs", "landlock", "seccomp"]  # the others need it
    libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    if ruleset is None or libc.syscall(_RESTRICT_SELF, ruleset, 0):
        missing.append("landlock")
    if ruleset is not None:
        os.close(ruleset)
    if max_memory_bytes is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (max_memory_bytes, max_memory_bytes))
    if not _filter_calls(libc):
        missing.append("seccomp")
    return missing


_MAX_OPEN_FILES = 64
_MAX_STACK_BYTES = 64 << 20
_MAX_READ_BYTES = 2 << 30
"""Address space beside the memory that the process may allocate: libraries that are loaded later."""


def _soft_limit(kind: int, most: int) -> int:
    """The present limit of this process, or another one that is lower."""
    now = resource.getrlimit(kind)[0]
    return most if now == resource.RLIM_INFINITY else min(now, most)


def _address_space() -> int:
    """Size of this process's address space in bytes; 1 TiB where the system does not tell."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        return 1 << 40


_PACKAGES = ("vidshard", "vidshard.pipeline", "vidshard.schemas")


def library_paths() -> list[str]:
    """Folders of the interpreter, of installed packages and of the system's libraries, and devices without content."""
    found = [sys.prefix, sys.base_prefix, sys.exec_prefix, *sysconfig.get_paths().values()]
    found += [path for path in sys.path if path.endswith(("-packages", ".zip", "lib-dynload"))]
    found += [path for room in _PACKAGES for path in importlib.import_module(room).__path__]  # an editable install's
    found += ["/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/dev/null", "/dev/urandom", "/dev/zero"]
    found += ["/proc/meminfo", "/proc/cpuinfo"]
    found += ["/sys/devices/system/cpu"]
    return sorted({os.path.realpath(path) for path in found if path and os.path.realpath(path) != "/"})


# landlock

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_GET_VERSION, _PATH_BENEATH = 1, 1
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_FIRST_RIGHTS = (1 << 13) - 1
"""Rights of version 1: execute, write, read, remove and make everything. Later versions add one bit each."""


def ruleset_of(readable: Iterable[str]) -> int | None:
    """Make the rules of landlock that let nothing be opened but folders and files to read; it takes 10 ms.

    Returns:
        A descriptor for `confine`; None where the kernel lacks landlock.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    version = libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _GET_VERSION)
    if version < 1:
        return None
    rights = _FIRST_RIGHTS | (1 << 13 if version >= 2 else 0) | (1 << 14 if version >= 3 else 0)
    attributes = struct.pack("<Q", rights)
    ruleset: int = libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    if ruleset < 0:
        return None
    for path in readable:
        _allow_reading(libc, ruleset, path)
    return ruleset


def _allow_reading(libc: ctypes.CDLL, ruleset: int, path: str) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return  # it is not there, so it need not be readable
    try:
        rights = _READ_FILE | (_READ_DIR if os.path.isdir(path) else 0)
        libc.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, struct.pack("<Qi", rights, fd), 0)
    finally:
        os.close(fd)


# seccomp


def _filter_calls(libc: ctypes.CDLL) -> bool:
    calls = _CALLS.get(platform.machine())
    if calls is None or sys.maxsize < 2**32:
        return False
    program = b"".join(struct.pack("<HBBI", *step) for step in _program(calls, os.getpid()))
    code = ctypes.create_string_buffer(program, len(program))

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_void_p))

    filter_ = Program(len(program) // 8, ctypes.addressof(code))
    return not libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(filter_), 0, 0)


def _program(calls: _Calls, pid: int) -> Sequence[tuple[int, int, int, int]]:
    """Steps of the filter: (operation, steps to skip if true, if false, operand)."""
    steps = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, calls.architecture),
        (_RETURN, 0, 0, _EPERM),
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, 0x40000000),  # the x32 ABI, with numbers of its own
        (_RETURN, 0, 0, _EPERM),
    ]
    for first, last in _intervals(calls.allowed):
        steps += [(_AT_LEAST, 0, 2, first), (_AT_LEAST, 1, 0, last + 1), (_RETURN, 0, 0, _ALLOW)]
    for number in calls.signals:
        steps += _only(number, _argument(0, {pid}))
    steps += _only(calls.prlimit, _argument(0, {0, pid}) + _argument(2, {0}))
    for number, place in calls.opening:
        steps += _only(number, _without(place, _TO_WRITE))
    steps += _only(calls.fcntl, _argument(1, _FCNTLS, low_half=True))
    steps += _only(calls.ioctl, _argument(1, _IOCTLS, low_half=True))
    steps += _only(calls.prctl, _argument(0, _PRCTLS, low_half=True))
    steps += _only(calls.madvise, _argument(2, _ADVICE, low_half=True))
    uncounted: _Steps = [(_ANY_BIT, 0, 2, _ANONYMOUS), (_ANY_BIT, 0, 1, _SHARED_OR_DROPPABLE), (_RETURN, 0, 0, _EPERM)]
    steps += _only(calls.mmap, _without(3, _GROWS_DOWN) + uncounted)
    return [
        *steps,
        (_EQUAL, 0, 1, calls.clone),
        (_RETURN, 0, 0, _EAGAIN),  # as where there are too many threads
        (_AT_LEAST, 0, 1, _FIRST_UNIFIED),
        (_RETURN, 0, 0, _ENOSYS),
        (_RETURN, 0, 0, _EPERM),
    ]


_Steps = list[tuple[int, int, int, int]]


def _only(number: int, checks: _Steps) -> _Steps:
    """Allow a call that passes checks, each of which returns EPERM or goes on."""
    return [(_EQUAL, 0, len(checks) + 1, number), *checks, (_RETURN, 0, 0, _ALLOW)]


def _argument(place: int, values: Iterable[int], *, low_half: bool = False) -> _Steps:
    """Check that an argument is one of some values below 2**32; ``low_half`` where the kernel looks at 32 bits."""
    allowed = sorted(set(values))
    steps: _Steps = []
    if not low_half:
        steps += [(_LOAD, 0, 0, _ARGUMENTS + 8 * place + 4), (_EQUAL, 1, 0, 0), (_RETURN, 0, 0, _EPERM)]
    steps.append((_LOAD, 0, 0, _ARGUMENTS + 8 * place))
    steps += [(_EQUAL, len(allowed) - at, 0, value) for at, value in enumerate(allowed)]
    return [*steps, (_RETURN, 0, 0, _EPERM)]


def _without(place: int, bits: int) -> _Steps:
    """Check that an argument has none of some bits, and leave it loaded."""
    return [(_LOAD, 0, 0, _ARGUMENTS + 8 * place), (_ANY_BIT, 0, 1, bits), (_RETURN, 0, 0, _EPERM)]


def _intervals(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Runs of consecutive numbers: the first and the last of each."""
    found: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if found and found[-1][1] == number - 1:
            found[-1] = found[-1][0], number
        else:
            found.append((number, number))
    return found
