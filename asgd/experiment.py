"""Repeats of one run under other seeds, stored together.

config.json                   the configuration of all, `run.repeats` included
repeat-000, repeat-001, ...   a complete run directory each, of seed, seed + 1, ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from asgd.config import RunConfig, load_config
from asgd.errors import InputError
from asgd.trace import Run, default_path, make_directory, read_run, replace_file


def run_repeats(
    config: RunConfig,
    out: str | Path | None,
    run_one: Callable[[RunConfig, Path], object],
) -> Path:
    """Run a configuration as often as `run.repeats` says and return the directory.

    Parameters
    ----------
    config
        The run. Without repeats `run_one` is called once, for `out` itself.
    out
        The directory, which must not hold anything yet; default
        `runs/<kind of problem>-<date>-<time>`.
    run_one
        Makes one run directory.

    Raises
    ------
    InputError
        The directory cannot be used.
    """
    out = Path(out) if out is not None else default_path(config)
    if config.run.repeats == 1:
        run_one(config, out)
        return out
    make_directory(out)
    replace_file(out / "config.json", config.to_json().encode())
    for repeat, one in enumerate(_repeats(config)):
        run_one(one, out / f"repeat-{repeat:03d}")
    return out


def read_runs(path: str | Path) -> list[Run]:
    """Open the repeats of an experiment, or a single run as a list of one.

    Raises
    ------
    InputError
        There is neither at `path`.
    """
    path = Path(path)
    if (path / "config.json").is_file() and load_config(path / "config.json").run.repeats > 1:
        runs = [read_run(one.parent) for one in sorted(path.glob("repeat-*/config.json"))]
        if not runs:
            raise InputError(f"{path}: an experiment without a repeat")
        return runs
    return [read_run(path)]


def _repeats(config: RunConfig) -> Iterator[RunConfig]:
    for repeat in range(config.run.repeats):
        settings = msgspec.structs.replace(config.run, seed=config.run.seed + repeat, repeats=1)
        yield msgspec.structs.replace(config, run=settings)
