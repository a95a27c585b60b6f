"""Confinement of a decoding process: what a video that took over FFmpeg can still do there.

The process gives up, for ever and before it sees the first byte of a video:

- new programs and processes, signals to others, their limits and priorities, tracing, namespaces, modules and mounts
  (seccomp);
- new sockets, and with them every network (seccomp);
- memory that RLIMIT_DATA does not count: memory files, System V and anonymous shared memory (seccomp);
- permissions, owners, times and attributes of files, which landlock leaves alone (seccomp);
- opening files to write, making and removing them, and opening any file outside of the interpreter's and the system's
  libraries to read (landlock). It is handed the video as an open descriptor;
- privileges of programs it could start (no_new_privs), core dumps, and files beyond what an answer needs (rlimits).

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
_ALLOW, _REFUSE, _ABSENT = 0x7FFF0000, 0x00050000 | 1, 0x00050000 | 38  # EPERM; ENOSYS, for which libraries fall back
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _FIRST, _FIRST_HIGH, _SECOND, _FOURTH = 0, 4, 16, 20, 24, 40
"""Offsets in struct seccomp_data; arguments are 64 bits, low half first."""
_CLONE_THREAD = 0x00010000
_MAP_ANONYMOUS, _MAP_SHARED_OR_DROPPABLE, _MAP_GROWSDOWN = 0x20, 0x09, 0x100

_IOCTLS = (0x5401, 0x5450, 0x5451)
"""TCGETS, FIONCLEX and FIOCLEX; others can send signals (FIOSETOWN) or type into a terminal (TIOCSTI)."""
_FCNTLS = (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030, 1034)
"""Copies of descriptors, their flags, locks and seals; F_SETOWN and F_SETSIG would send signals to other processes."""


@dataclass(frozen=True)
class _Calls:
    """System calls of an architecture."""

    architecture: int
    refused: tuple[int, ...]
    absent: tuple[int, ...]
    clone: int
    only_self: tuple[int, ...]
    """Calls whose first argument must be this process's id, or 0."""
    mmap: int
    fcntl: int
    ioctl: int


_SHARED = (424, 425, 426, 427, 428, 429, 430, 431, 432, 433, 434, 438, 440, 442, 447, 448, 452, 463, 466, 469)
"""pidfd_send_signal, io_uring_*, open_tree, move_mount, fsopen, fsconfig, fsmount, fspick, pidfd_open, pidfd_getfd,
process_madvise, mount_setattr, memfd_secret, process_mrelease, fchmodat2, setxattrat, removexattrat, file_setattr: the
same numbers everywhere."""

_CALLS = {
    # execve execveat fork vfork ptrace tkill rt_sigqueueinfo rt_tgsigqueueinfo process_vm_readv process_vm_writev bpf
    # perf_event_open userfaultfd unshare setns mount umount2 chroot pivot_root keyctl add_key request_key
    # open_by_handle_at init_module finit_module delete_module reboot syslog acct settimeofday clock_settime sethostname
    # iopl ioperm kexec_load kexec_file_load swapon swapoff socket connect bind listen accept accept4; memfd_create
    # shmget shmat shmctl semget semop semctl semtimedop msgget msgsnd msgrcv msgctl mq_open mq_unlink socketpair;
    # chmod fchmod fchmodat chown fchown lchown fchownat utime utimes futimesat utimensat, set and remove of xattr,
    # truncate ftruncate fallocate; setpriority ioprio_set sched_set* migrate_pages move_pages setpgid setsid
    # personality kcmp fanotify_init quotactl
    "x86_64": _Calls(
        architecture=0xC000003E,
        refused=(
            59, 322, 57, 58, 101, 200, 129, 297, 310, 311, 321, 298, 323, 272, 308, 165, 166, 161, 155, 250, 248, 249,
            304, 175, 313, 176, 169, 103, 163, 164, 227, 170, 172, 173, 246, 320, 167, 168, 41, 42, 49, 50, 43, 288,
            319, 29, 30, 31, 64, 65, 66, 220, 68, 69, 70, 71, 240, 241, 53,
            90, 91, 268, 92, 93, 94, 260, 132, 235, 261, 280, 188, 189, 190, 197, 198, 199, 76, 77, 285,
            141, 251, 142, 144, 203, 314, 256, 279, 109, 112, 135, 312, 300, 179, *_SHARED,
        ),
        absent=(435,),
        clone=56,
        only_self=(62, 234, 302),  # kill tgkill prlimit64
        mmap=9,
        fcntl=72,
        ioctl=16,
    ),
    "aarch64": _Calls(
        architecture=0xC00000B7,
        refused=(
            221, 281, 117, 130, 138, 240, 270, 271, 280, 241, 282, 97, 268, 40, 39, 51, 41, 219, 217, 218, 265, 105,
            273, 106, 142, 116, 89, 170, 112, 161, 104, 294, 224, 225, 198, 203, 200, 201, 202, 242,
            279, 194, 196, 195, 190, 193, 191, 192, 186, 189, 188, 187, 180, 181, 199,
            52, 53, 55, 54, 88, 5, 6, 7, 14, 15, 16, 45, 46, 47,
            140, 30, 118, 119, 122, 274, 238, 239, 154, 157, 92, 272, 262, 60, *_SHARED,
        ),
        absent=(435,),
        clone=220,
        only_self=(129, 131, 261),
        mmap=222,
        fcntl=25,
        ioctl=29,
    ),
}  # fmt: skip


def confine(readable: Iterable[str] | None = None, *, max_file_bytes: int | None = None) -> list[str]:
    """Give up everything that decoding an open file does not need. Threads that run already are not confined.

    Args:
        readable: folders and files that may still be opened to read; None for those of `library_paths`.
        max_file_bytes: largest size to which the process may write a file; None for no limit.

    Returns:
        The parts that this system lacks: "no_new_privs", "landlock", "seccomp".
    """
    libc = ctypes.CDLL(None, use_errno=True)
    missing = []
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    most = _MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_OPEN_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # pipes and sockets hold memory too
    if max_file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        return ["no_new_privs", "landlock", "seccomp"]  # the others need it
    libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    if not _restrict_files(libc, library_paths() if readable is None else readable):
        missing.append("landlock")
    if not _filter_calls(libc):
        missing.append("seccomp")
    return missing


_MAX_OPEN_FILES = 64

_PACKAGES = ("vidshard", "vidshard.pipeline", "vidshard.schemas")


def library_paths() -> list[str]:
    """Folders of the interpreter, of installed packages and of the system's libraries, and devices without content."""
    found = [sys.prefix, sys.base_prefix, sys.exec_prefix, *sysconfig.get_paths().values()]
    found += [path for path in sys.path if path.endswith(("-packages", ".zip", "lib-dynload"))]
    found += [path for room in _PACKAGES for path in importlib.import_module(room).__path__]  # an editable install's
    found += ["/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/dev/null", "/dev/urandom", "/dev/zero"]
    found += ["/proc/self/status", "/proc/self/maps", "/proc/self/statm", "/proc/meminfo", "/proc/cpuinfo"]
    found += ["/sys/devices/system/cpu"]
    return sorted({os.path.realpath(path) for path in found if path and os.path.realpath(path) != "/"})


# landlock

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_GET_VERSION, _PATH_BENEATH = 1, 1
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_FIRST_RIGHTS = (1 << 13) - 1
"""Rights of version 1: execute, write, read, remove and make everything. Later versions add one bit each."""


def _restrict_files(libc: ctypes.CDLL, readable: Iterable[str]) -> bool:
    version = libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _GET_VERSION)
    if version < 1:
        return False
    rights = _FIRST_RIGHTS | (1 << 13 if version >= 2 else 0) | (1 << 14 if version >= 3 else 0)
    attributes = struct.pack("<Q", rights)
    ruleset = libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    if ruleset < 0:
        return False
    try:
        for path in readable:
            _allow_reading(libc, ruleset, path)
        return not libc.syscall(_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)


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
        (_RETURN, 0, 0, _REFUSE),
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, 0x40000000),  # the x32 ABI, with numbers of its own
        (_RETURN, 0, 0, _REFUSE),
    ]
    for number in calls.refused:
        steps += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _REFUSE)]
    for number in calls.absent:
        steps += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ABSENT)]
    steps += [
        (_EQUAL, 0, 4, calls.clone),
        (_LOAD, 0, 0, _FIRST),
        (_ANY_BIT, 1, 0, _CLONE_THREAD),
        (_RETURN, 0, 0, _REFUSE),
        (_RETURN, 0, 0, _ALLOW),
    ]
    for number in calls.only_self:
        steps += [
            (_EQUAL, 0, 7, number),
            (_LOAD, 0, 0, _FIRST_HIGH),
            (_EQUAL, 0, 3, 0),
            (_LOAD, 0, 0, _FIRST),
            (_EQUAL, 2, 0, pid),
            (_EQUAL, 1, 0, 0 if number in (302, 261) else pid),
            (_RETURN, 0, 0, _REFUSE),
            (_RETURN, 0, 0, _ALLOW),
        ]
    for number, commands in ((calls.fcntl, _FCNTLS), (calls.ioctl, _IOCTLS)):
        steps += [(_EQUAL, 0, len(commands) + 3, number), (_LOAD, 0, 0, _SECOND)]
        steps += [(_EQUAL, len(commands) - place, 0, command) for place, command in enumerate(commands)]
        steps += [(_RETURN, 0, 0, _REFUSE), (_RETURN, 0, 0, _ALLOW)]
    steps += [
        (_EQUAL, 0, 6, calls.mmap),
        (_LOAD, 0, 0, _FOURTH),
        (_ANY_BIT, 2, 0, _MAP_GROWSDOWN),
        (_ANY_BIT, 0, 2, _MAP_ANONYMOUS),
        (_ANY_BIT, 0, 1, _MAP_SHARED_OR_DROPPABLE),
        (_RETURN, 0, 0, _REFUSE),
        (_RETURN, 0, 0, _ALLOW),
    ]
    return [*steps, (_RETURN, 0, 0, _ALLOW)]
