"""Repeats of one run under other seeds, stored together.

config.json                   the configuration of all, `run.repeats` included
repeat-000, repeat-001, ...   a complete run directory each, of seed, seed + 1, ...
"""

from __future__ import annotations

import shutil
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
    for one, path in _repeats(config, out):
        run_one(one, path)
    return out


def unfinished_repeats(path: str | Path) -> list[tuple[Path, RunConfig | None]]:
    """Return the repeats of an experiment of real runs that are missing or were cut short.

    Parameters
    ----------
    path
        The experiment; of a single run, it is the run itself that is returned.

    Returns
    -------
    list
        The directory of each and, where it is to be made anew, its configuration. What a repeat
        left that was cut short before its first update on record is removed.

    Raises
    ------
    InputError
        There is nothing to complete at `path`, or something else is in a repeat's place.
    """
    path = Path(path)
    config = _experiment(path)
    if config is None:
        return [(path, None)]
    found: list[tuple[Path, RunConfig | None]] = []
    for one, directory in _repeats(config, path):
        if not any(directory.glob("trace/part-*")):
            found.append((directory, one))
            continue
        run = read_run(directory)
        if run.config != one:
            raise InputError(f"{directory}: is no repeat of {path}/config.json")
        if not (directory / "checkpoints").is_dir():
            raise InputError(f"{path}: not runs of workers and a server; only these are resumed")
        if run.state != "finished":
            found.append((directory, None))
    if not found:
        raise InputError(f"{path}: every repeat is finished")
    for directory, anew in found:
        if anew is not None:
            shutil.rmtree(directory, ignore_errors=True)
    return found


def read_runs(path: str | Path) -> list[Run]:
    """Open the repeats of an experiment, or a single run as a list of one.

    Raises
    ------
    InputError
        There is neither at `path`.
    """
    path = Path(path)
    if _experiment(path) is not None:
        runs = [read_run(one.parent) for one in sorted(path.glob("repeat-*/config.json"))]
        if not runs:
            raise InputError(f"{path}: an experiment without a repeat")
        return runs
    return [read_run(path)]


def _experiment(path: Path) -> RunConfig | None:
    """Return the configuration of an experiment, None if there is none at `path`."""
    if not (path / "config.json").is_file():
        return None
    config = load_config(path / "config.json")
    return config if config.run.repeats > 1 else None


def _repeats(config: RunConfig, path: Path) -> Iterator[tuple[RunConfig, Path]]:
    """Yield the configuration and the directory of each repeat."""
    for repeat in range(config.run.repeats):
        settings = msgspec.structs.replace(config.run, seed=config.run.seed + repeat, repeats=1)
        yield msgspec.structs.replace(config, run=settings), path / f"repeat-{repeat:03d}"
