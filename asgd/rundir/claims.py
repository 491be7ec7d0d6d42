"""Exclusive use of a path by one process, by locks or, on file systems without them, by claims.

A claim is a heartbeat file beside the path. A process first makes its own claim and then looks for
others, so of two that begin at once, at least one sees the other. A claim ends when its process
withdraws it or dies, or is silent for 30 s. Other processes remove a claim that has ended; its
process stops when it finds the claim missing.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from asgd.config.tables import LeaseKind
from asgd.errors import InputError, RunFailedError
from asgd.rundir.alive import SILENT_SECONDS, Heartbeat, read_signs, signs
from asgd.rundir.files import NoLocksError, locked

PROBE = ".lock.tmp"  # how the names of the files end by which `check_locks` tries the locks
_POLL_SECONDS = 0.05
_UNREADABLE = Heartbeat("elsewhere", "an unknown host", 0, 0.0)


class LeaseLostError(RunFailedError):
    """Another process has taken over the run directory."""


class HeldError(InputError):
    """Another process holds the path.

    Attributes
    ----------
    holder
        That process in words, "" if unknown.
    """

    def __init__(self, path: Path, holder: str) -> None:
        self.holder = holder
        super().__init__(f"{path}: is held by {holder or 'another process'}")


def check_locks(directory: Path, lease: LeaseKind) -> None:
    """Refuse a file system without the locks of `lease`; the directory need not exist.

    Raises
    ------
    NoLocksError
        There are none.
    """
    if lease == "file":
        return
    place = next(one for one in (directory, *directory.absolute().parents) if one.is_dir())
    probe = place / f".{secrets.token_hex(8)}{PROBE}"
    try:
        with locked(probe, "x", wait=False):
            probe.unlink()
    except NoLocksError as error:
        probe.unlink()
        raise NoLocksError(directory, error.reason) from None
    except OSError:  # making the directory fails too, with a better message
        return


@contextmanager
def held_alone(path: Path, lease: LeaseKind) -> Iterator[Callable[[], None]]:
    """Hold a path during the block, as the only process.

    Parameters
    ----------
    path
        The file of the lock; claims are beside it.
    lease
        "flock" or "file", see `asgd.config.tables.ClusterConfig`.

    Yields
    ------
    Callable
        Raises `LeaseLostError` if another process has taken over, which can happen to a claim only.

    Raises
    ------
    HeldError
        Another process holds the path, or claims it at the same time.
    NoLocksError
        The file system has no locks.
    OSError
        No file can be made.
    """
    with ExitStack() as stack:
        if lease == "file":
            own = stack.enter_context(claimed(path))
            rival = settle(path, own)
            if rival is not None:
                raise HeldError(path, f"process {rival.pid} on {rival.host}")
            yield lambda: _check(path, own)
            return
        try:
            file = stack.enter_context(locked(path, wait=False))
        except BlockingIOError:
            holder = path.read_text(encoding="utf-8", errors="replace").strip()
            raise HeldError(path, holder and f"process {holder}") from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield lambda: None


@contextmanager
def claimed(path: Path) -> Iterator[Path]:
    """Claim a path during the block, even if others claim it too; yield the file of the claim."""
    own = path.with_name(f"{path.name}-{secrets.token_hex(8)}")
    with signs(own):
        yield own


def settle(path: Path, own: Path | None = None, *, wait: bool = False) -> Heartbeat | None:
    """Remove the claims on a path that have ended; return the heartbeat of one that has not.

    Parameters
    ----------
    path
        The path.
    own
        A claim of the caller.
    wait
        Return only when no claim of others is left.

    Returns
    -------
    Heartbeat
        The heartbeat of the first other process found alive; None if there is none.
    """
    seen: dict[Path, tuple[float, float]] = {}  # last heartbeat of each, when first seen
    while True:
        left = False
        for claim in path.parent.glob(f"{path.name}-*"):
            sign = None if claim == own else _read(claim)
            if sign is None:
                continue
            now = time.monotonic()
            beat, since = seen.setdefault(claim, (sign.beat, now))
            moved = beat != sign.beat
            if moved:
                seen[claim] = sign.beat, now
            here = sign.presence == "here"
            # By the clock of this process alone: clocks of other hosts may differ.
            if sign.presence == "gone" or not (here or moved or now < since + SILENT_SECONDS):
                claim.unlink(missing_ok=True)
            elif not wait and (here or moved):
                return sign
            else:
                left = True
        if not left:
            return None
        time.sleep(_POLL_SECONDS)


def _read(claim: Path) -> Heartbeat | None:
    """Return the heartbeat of a claim, None if the claim was withdrawn."""
    try:
        return read_signs(claim)
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return _UNREADABLE


def _check(path: Path, own: Path) -> None:
    if _read(own) is None:
        raise LeaseLostError(f"{path.parent}: another process has taken over")
