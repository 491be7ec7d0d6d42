"""The list of formats, and recognition of the format of a log."""

from __future__ import annotations

from pathlib import Path

from asgd.errors import InputError
from asgd.records.formats import metrics
from asgd.records.formats.base import Format
from asgd.records.formats.prime_rl import PRIME_RL
from asgd.records.formats.rollouts import ROLLOUTS
from asgd.records.formats.tables import CSV, JSONL, PARQUET

# Special formats are tried first: their files are tables too.
_SPECIAL = (PRIME_RL, ROLLOUTS)
_TABLES = (PARQUET, CSV, JSONL)
FORMATS: dict[str, Format] = {format.name: format for format in (*_TABLES, *_SPECIAL)}
NAMES = ("auto", *FORMATS, metrics.NAME)


def recognise(source: Path, *, means: bool) -> str:
    """Return the name of the format of a log.

    Parameters
    ----------
    source
        A file or a directory.
    means
        Whether the user named a column of means.

    Raises
    ------
    InputError
        There is no log, or none of a known format.
    """
    if not source.exists():
        raise InputError(f"{source}: no such file or directory")
    for format in _SPECIAL:
        if format.parts(source):
            return format.name
    if means or metrics.metrics_columns(source) is not None:
        return metrics.NAME
    for format in _TABLES:
        if format.parts(source):
            return format.name
    raise InputError(f"{source}: no log of a known format; --format takes {', '.join(NAMES)}")
