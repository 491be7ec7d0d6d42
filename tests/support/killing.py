"""Kills the code under test at one of its file operations."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from typing import Any

import pytest


class _KilledError(BaseException):
    """Stands for SIGKILL: no code catches it."""


@contextmanager
def killed_at(operation: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Stop the block before its file operation of this number.

    File operations are replacing, removing and syncing a file, counted from 0. The list that is
    yielded then has the number; it stays empty if the block ends before.
    """
    operations, killed = count(), list[int]()

    def operate(real: Any, *arguments: Any, **keywords: Any) -> Any:
        if next(operations) == operation:
            killed.append(operation)
            raise _KilledError
        return real(*arguments, **keywords)

    with monkeypatch.context() as patch:
        for name in ("replace", "unlink", "fsync"):
            real = getattr(os, name)
            patch.setattr(os, name, lambda *a, real=real, **k: operate(real, *a, **k))
        with suppress(_KilledError):
            yield killed
