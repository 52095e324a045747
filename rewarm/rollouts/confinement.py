"""Takes a process's rights away for good: it may compute, and read the files of Python, and nothing else.

Two mechanisms of the Linux kernel that need no privileges and no packages. A seccomp filter lists the system
calls that are left; every other one fails with EPERM: starting programs and processes, sockets, signals to
others, writing, making, renaming or removing files, tracing, memory of other processes. Landlock, where the
kernel has it, limits the reading of files to given folders. Neither can be undone, by this process or by what
it could start.
"""

import ctypes
import os
import platform
import socket
import struct
import sys
from collections.abc import Callable, Iterable
from typing import Any

_X86 = {
    "read": 0, "write": 1, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7, "lseek": 8,
    "mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14,
    "rt_sigreturn": 15, "pread64": 17, "readv": 19, "access": 21, "select": 23, "sched_yield": 24,
    "mremap": 25, "madvise": 28, "nanosleep": 35, "getpid": 39, "exit": 60, "uname": 63, "getcwd": 79,
    "readlink": 89, "gettimeofday": 96, "getrusage": 98, "sysinfo": 99, "times": 100, "getuid": 102,
    "getgid": 104, "geteuid": 107, "getegid": 108, "sigaltstack": 131, "gettid": 186, "futex": 202,
    "sched_getaffinity": 204, "getdents64": 217, "restart_syscall": 219, "clock_gettime": 228,
    "clock_getres": 229, "clock_nanosleep": 230, "exit_group": 231, "newfstatat": 262,
    "readlinkat": 267, "faccessat": 269, "ppoll": 271, "getrandom": 318, "statx": 332,
    "faccessat2": 439,
}  # fmt: skip
_ARM = {
    "getcwd": 17, "faccessat": 48, "close": 57, "getdents64": 61, "lseek": 62, "read": 63,
    "write": 64, "readv": 65, "pread64": 67, "ppoll": 73, "readlinkat": 78, "newfstatat": 79,
    "fstat": 80, "exit": 93, "exit_group": 94, "futex": 98, "nanosleep": 101, "clock_gettime": 113,
    "clock_getres": 114, "clock_nanosleep": 115, "sched_getaffinity": 123, "sched_yield": 124,
    "restart_syscall": 128, "sigaltstack": 132, "rt_sigaction": 134, "rt_sigprocmask": 135,
    "rt_sigreturn": 139, "times": 153, "uname": 160, "getrusage": 165, "gettimeofday": 169,
    "getpid": 172, "getuid": 174, "geteuid": 175, "getgid": 176, "getegid": 177, "gettid": 178,
    "sysinfo": 179, "brk": 214, "munmap": 215, "mremap": 216, "mmap": 222, "mprotect": 226,
    "madvise": 233, "getrandom": 278, "statx": 291, "faccessat2": 439,
}  # fmt: skip

ALLOWED = {"x86_64": _X86, "aarch64": _ARM}
"""System calls that are left, with their numbers, by machine; `open` and `openat` are left for reading."""

_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_OPENS = {"x86_64": {2: 1, 257: 2}, "aarch64": {56: 2}}  # number of the call -> which argument has the flags
# On aarch64 the flags of open have the values of asm-generic but for O_DIRECTORY and the like, not used here.
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06  # instructions of classic BPF
_PERMIT, _KILL, _REFUSE = 0x7FFF0000, 0x80000000, 0x00050001  # the last: EPERM
_SET_NO_NEW_PRIVS, _SET_SECCOMP, _FILTER_MODE = 38, 22, 2
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_ENFORCE = 444, 445, 446
_READ_FILE, _READ_FOLDER = 1 << 2, 1 << 3


class NoConfinementError(RuntimeError):
    """This system cannot take a process's rights away."""


def confine(readable: Iterable[str]) -> bool:
    """Take this process's rights away for good.

    The process must have a single thread: others would keep theirs.

    Args:
        readable: Files and folders that may still be read, where the kernel has Landlock.

    Returns:
        Whether reading is limited to those. If not, every file that the user may read can still be read, but
        nothing of it can be written or sent anywhere but through the files that are open already.

    Raises:
        NoConfinementError: If the system is not Linux on x86-64 or aarch64, the kernel refuses the filter, or
            the filter does not hold when it is tried.

    Source: Linux, Documentation/userspace-api/seccomp_filter.rst and landlock.rst.   Differs: nothing.
    """
    machine = platform.machine()
    if sys.platform != "linux" or machine not in ALLOWED:
        raise NoConfinementError(
            f"the system is {sys.platform} on {machine}, must be Linux on x86-64 or aarch64"
        )
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise NoConfinementError(f"the kernel refuses PR_SET_NO_NEW_PRIVS: {os.strerror(ctypes.get_errno())}")
    limited = _limit_reading(libc, readable)
    program = filter_program(machine)
    code = ctypes.create_string_buffer(program, len(program))
    header = ctypes.create_string_buffer(struct.pack("HP", len(program) // 8, ctypes.addressof(code)))
    if libc.prctl(_SET_SECCOMP, _FILTER_MODE, header, 0, 0):
        raise NoConfinementError(f"the kernel refuses a seccomp filter: {os.strerror(ctypes.get_errno())}")
    _try()
    return limited


def filter_program(machine: str) -> bytes:
    """Return the seccomp filter as classic BPF, 8 bytes per instruction.

    Args:
        machine: A key of `ALLOWED`.
    """

    def step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("HBBI", code, if_true, if_false, value)

    # struct seccomp_data: the number of the call at 0, the machine at 4, arguments of 8 bytes from 16 on.
    program = step(_LOAD, 4) + step(_EQUAL, _AUDIT_ARCH[machine], 1) + step(_RETURN, _KILL) + step(_LOAD, 0)
    for number in ALLOWED[machine].values():
        program += step(_EQUAL, number, 0, 1) + step(_RETURN, _PERMIT)
    for number, flags in _OPENS[machine].items():
        program += step(_EQUAL, number, 0, 4) + step(_LOAD, 16 + 8 * flags)
        program += step(_ANY_BIT, _WRITING, 0, 1) + step(_RETURN, _REFUSE) + step(_RETURN, _PERMIT)
    return program + step(_RETURN, _REFUSE)


def _limit_reading(libc: ctypes.CDLL, readable: Iterable[str]) -> bool:
    """Let only these files and folders be read, with Landlock; False if the kernel has none."""
    version = libc.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return False
    files = 0x1FFF | (version >= 2) << 13 | (version >= 3) << 14 | (version >= 5) << 15
    handled = struct.pack("QQQ", files, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    rules = libc.syscall(_LANDLOCK_CREATE, handled, ctypes.c_size_t(size), 0)
    if rules < 0:
        return False
    for path in readable:
        try:
            place = os.open(path, getattr(os, "O_PATH", 0) | os.O_CLOEXEC)
        except OSError:
            continue  # not there, so nothing to read
        rights = _READ_FILE | _READ_FOLDER if os.path.isdir(path) else _READ_FILE
        libc.syscall(_LANDLOCK_ADD, rules, 1, struct.pack("=Qi", rights, place), 0)
        os.close(place)
    enforced = libc.syscall(_LANDLOCK_ENFORCE, rules, 0) == 0
    os.close(rules)
    return enforced


def _try() -> None:
    attempts: dict[str, Callable[[], Any]] = {
        "start a process": os.fork,
        "open a socket": socket.socket,
        "signal a process": lambda: os.kill(os.getpid(), 0),
        "write a file": lambda: os.open(os.devnull, os.O_WRONLY),
        "remove a file": lambda: os.unlink("/nowhere"),
    }
    for what, attempt in attempts.items():
        try:
            started = attempt()
        except PermissionError:
            continue
        except OSError:
            pass
        if what == "start a process" and started == 0:
            os._exit(1)
        raise NoConfinementError(f"the seccomp filter does not hold: the process can still {what}")
