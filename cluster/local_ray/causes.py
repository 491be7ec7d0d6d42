"""Describes Ray's exceptions in one line."""

from __future__ import annotations

import re

from ray.exceptions import (
    ActorUnschedulableError,
    NodeDiedError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
)

_MEMORY = re.compile(r"was (\S+ used / \S+ limit)")
_STATUS = re.compile(r"Worker exits with an exit code (\d+)")
_IN_CONSTRUCTOR = "because of an error raised in its creation task"
_TRACEBACK = re.compile(r"\n(?=\S)")  # a line without indentation begins another part

# Ray cannot tell a crash from SIGKILL, by which the kernel frees memory.
_DIED = "its process died: killed (by the kernel, if memory ran out; see `dmesg`) or crashed"


def cause_of(error: BaseException) -> str:
    """Describe in one line why an actor died or a call failed.

    Parameters
    ----------
    error
        The exception raised by `ray.get`.
    """
    text = str(error)
    if isinstance(error, OutOfMemoryError):
        found = _MEMORY.search(text)
        much = f": {found[1]} on its node" if found else ""
        return f"out of memory: Ray's memory monitor killed its process{much}"
    if isinstance(error, RayTaskError):
        cause = error.cause
        return _in_a_line(f"{type(cause).__name__}: {cause}") if cause else _last_part(text)
    if _IN_CONSTRUCTOR in text:
        return _last_part(text)
    if isinstance(error, ActorUnschedulableError | NodeDiedError) or "its node has died" in text:
        return "its node is gone"
    if isinstance(error, RayActorError):
        status = _STATUS.search(text)
        return f"its process exited with status {status[1]}" if status else _DIED
    return _in_a_line(text)


def _last_part(text: str) -> str:
    """Return the exception, with its type, at the end of a traceback."""
    parts = [part for part in _TRACEBACK.split(text.strip()) if part]
    named = [number for number, part in enumerate(parts) if re.match(r"[\w.]+(:|$)", part)]
    return _in_a_line(" ".join(parts[named[-1] :] if named else parts[-1:]))


def _in_a_line(text: str) -> str:
    return " ".join(text.split())
