"""A directory without locks: the kernel refuses `flock` on its files, as some NFS mounts do.

    python tests/support/lockless.py DIRECTORY COMMAND ...

A filter of system calls (seccomp) stops every `flock` of the command and its descendants. This
process looks up the file and lets the call continue or fail with ENOLCK. Nothing else changes. The
filter needs no privileges; the exit status is that of the command.
"""

from __future__ import annotations

import array
import ctypes
import errno
import fcntl
import os
import platform
import select
import signal
import socket
import struct
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

_FLOCK = {"x86_64": (0xC000003E, 73), "aarch64": (0xC00000B7, 32)}  # architecture, system call
_SECCOMP = {"x86_64": 317, "aarch64": 277}
_NO_NEW_PRIVILEGES = 38
_SET_FILTER, _WITH_LISTENER = 1, 8
_ASK, _ALLOW = 0x7FC00000, 0x7FFF0000
_RECEIVE, _ANSWER = 0xC0502100, 0xC0182101
_QUESTION, _REPLY = struct.Struct("=QIIiIQ6Q"), struct.Struct("=QqiI")
_GO_ON = 1


def without_locks(directory: Path, *command: str | Path) -> list[str]:
    """Return the command line that starts a command for which a directory has no locks."""
    return [sys.executable, __file__, str(directory), *map(str, command)]


def _filter() -> bytes:
    """Return the program that asks about `flock` and allows all else."""
    architecture, flock = _FLOCK[platform.machine()]
    load, jump, end = 0x20, 0x15, 0x06
    steps = [
        (load, 0, 0, 4),  # the architecture
        (jump, 0, 3, architecture),
        (load, 0, 0, 0),  # the system call
        (jump, 0, 1, flock),
        (end, 0, 0, _ASK),
        (end, 0, 0, _ALLOW),
    ]
    return b"".join(struct.pack("=HBBI", *step) for step in steps)


def _install() -> int:
    """Install the filter for this process and return the descriptor on which it asks."""
    libc = ctypes.CDLL(None, use_errno=True)
    content = ctypes.create_string_buffer(_filter(), len(_filter()))
    program = struct.pack("@HP", len(_filter()) // 8, ctypes.addressof(content))
    if libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")
    number = _SECCOMP[platform.machine()]
    asks = libc.syscall(number, _SET_FILTER, _WITH_LISTENER, program)
    if asks < 0:
        raise OSError(ctypes.get_errno(), "seccomp")
    return int(asks)


def _answer(asks: int, directory: str) -> None:
    """Answer one question."""
    question = array.array("B", bytes(_QUESTION.size))
    fcntl.ioctl(asks, _RECEIVE, question)
    number, pid, _, _, _, _, file, *_ = _QUESTION.unpack(question)
    try:
        path = os.readlink(f"/proc/{pid}/fd/{file}")
    except OSError:
        path = ""
    refused = path.startswith(f"{directory}/")
    reply = (number, 0, -errno.ENOLCK, 0) if refused else (number, 0, 0, _GO_ON)
    fcntl.ioctl(asks, _ANSWER, _REPLY.pack(*reply))


def _pass_on(child: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(child, number)


def _run(directory: str, command: Sequence[str]) -> int:
    ours, theirs = socket.socketpair()
    child = os.fork()
    if not child:
        asks = _install()
        socket.send_fds(theirs, [b"."], [asks])
        os.close(asks)
        os.execvp(command[0], command)
    theirs.close()
    _, [asks], _, _ = socket.recv_fds(ours, 1, 1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: _pass_on(child, number))
    waiting = select.poll()
    waiting.register(asks, select.POLLIN)
    while waiting.poll()[0][1] & select.POLLIN:  # otherwise no process has the filter any more
        with suppress(OSError):  # the process that asked has died
            _answer(asks, directory)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    status = _run(os.path.realpath(sys.argv[1]), sys.argv[2:])
    sys.exit(status if status >= 0 else 128 - status)
