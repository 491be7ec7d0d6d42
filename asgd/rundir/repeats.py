"""Repeats of a run with different seeds, stored in one directory.

config.json                   the configuration of all, `run.repeats` included
repeat-000, repeat-001, ...   a complete run directory each, of seed, seed + 1, ...
lock                          held by the process that makes them, which it names
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec

from asgd.config.make import load_config
from asgd.config.tables import RunConfig
from asgd.errors import InputError
from asgd.problems.make import make_problem
from asgd.rundir.alive import read_heartbeat
from asgd.rundir.claims import PROBE, HeldError, check_locks, held_alone
from asgd.rundir.counts import counted_updates
from asgd.rundir.files import check_no_links, make_directory, replace_file
from asgd.rundir.problem_record import check_problem
from asgd.rundir.reader import Run, as_path, read_run
from asgd.rundir.writer import default_path


def run_repeats(
    config: RunConfig,
    out: str | Path | None,
    run_one: Callable[[RunConfig, Path], object],
) -> Path:
    """Run a configuration `run.repeats` times and return the directory.

    Parameters
    ----------
    config
        The run. Without repeats, `run_one` is called once with `out`.
    out
        The directory, which must be empty or missing; default
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
    check_locks(out, config.cluster.lease)
    make_directory(out)
    with _held(out, config):
        if (out / "config.json").exists():
            raise InputError(f"{out}: exists and is not empty; choose another --out")
        replace_file(out / "config.json", config.to_json().encode())
        for one, path in _repeats(config, out):
            run_one(one, path)
    return out


@contextmanager
def unfinished_repeats(
    path: str | Path, *, force: bool = False
) -> Iterator[list[tuple[Path, RunConfig | None]]]:
    """Yield the missing and unfinished repeats of an experiment of real runs.

    The block holds the experiment's lock, so no other process works on the repeats.

    Parameters
    ----------
    path
        The experiment, or a single run, which is then yielded itself.
    force
        Continue even if the problem has changed.

    Yields
    ------
    list
        The directory of each repeat, and its configuration if the repeat must start over. The
        files of a repeat that ended before its first recorded update are removed.

    Raises
    ------
    InputError
        There is nothing to complete at `path`, another process works on it, something else is in
        the place of a repeat, or the problem has changed.
    """
    path = as_path(path)
    config = _experiment(path)
    if config is None:
        yield [(path, None)]
        return
    with _held(path, config):
        found = _unfinished(config, path)
        _check_problem(config, path, found, force)
        for directory, fresh in found:
            if fresh is not None and directory.exists():
                shutil.rmtree(directory)
        yield found


def _unfinished(config: RunConfig, path: Path) -> list[tuple[Path, RunConfig | None]]:
    found: list[tuple[Path, RunConfig | None]] = []
    for one, directory in _repeats(config, path):
        if not any(directory.glob("trace/part-*")) and not counted_updates(directory):
            _check_no_loss(one, directory)
            found.append((directory, one))
            continue
        run = read_run(directory)
        if run.config != one:
            raise _not_a_repeat(directory)
        if not (directory / "checkpoints").is_dir():
            raise InputError(f"{path}: a simulated run; only real runs can be resumed")
        if run.state != "finished":
            found.append((directory, None))
    if not found:
        raise InputError(f"{path}: every repeat is finished")
    return found


def _check_problem(
    config: RunConfig, path: Path, found: list[tuple[Path, RunConfig | None]], force: bool
) -> None:
    """Check that new repeats will have the same problem as the existing ones."""
    new = {directory for directory, fresh in found if fresh is not None}
    there = [directory for _, directory in _repeats(config, path) if directory not in new]
    if new and there:
        problem = make_problem(config)
        for directory in there:
            check_problem(read_run(directory), problem, "resume", force=force)


def _check_no_loss(config: RunConfig, directory: Path) -> None:
    """Check that the directory of a repeat is missing or may be removed.

    Raises
    ------
    InputError
        It is not such a repeat, or the repeat is running.
    """
    if not os.path.lexists(directory):
        return
    if directory.is_symlink() or not directory.is_dir():
        raise _not_a_repeat(directory)
    life = read_heartbeat(directory)
    if life is not None and life.presence in ("here", "elsewhere"):
        raise InputError(f"{directory}: is being written by process {life.pid} on {life.host}")
    if (directory / "config.json").is_file():
        ours = load_config(directory / "config.json") == config
    else:  # files created before the configuration
        names = {file.name for file in directory.iterdir() if not file.name.endswith(PROBE)}
        ours = names <= {"trace", ".config.json.tmp"}
    if not ours:
        raise _not_a_repeat(directory)


def _not_a_repeat(directory: Path) -> InputError:
    return InputError(f"{directory}: is not a repeat of {directory.parent}/config.json")


@contextmanager
def _held(path: Path, config: RunConfig) -> Iterator[None]:
    """Hold an experiment during the block.

    The file of a lock is not removed, because another process may already be waiting for it.

    Raises
    ------
    InputError
        Another process holds it.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(held_alone(path / "lock", config.cluster.lease))
        except HeldError as error:
            raise InputError(f"{path}: is being written by {error.holder}".rstrip()) from None
        yield


def as_run(run: Run | str | Path) -> Run:
    """Return a run unchanged, or open the run in a directory.

    Raises
    ------
    InputError
        The argument is not a run, or there is no run in the directory.
    """
    if isinstance(run, str | Path):
        return read_run(run)
    if not isinstance(run, Run):
        raise InputError(f"run = {type(run).__name__}: expected a run or its directory")
    return run


def read_runs(path: str | Path) -> list[Run]:
    """Open the repeats of an experiment, or a single run as a list of one.

    Raises
    ------
    InputError
        There is neither at `path`.
    """
    path = as_path(path)
    if _experiment(path) is not None:
        check_no_links(path)
        runs = [read_run(one.parent) for one in sorted(path.glob("repeat-*/config.json"))]
        if not runs:
            raise InputError(f"{path}: contains no repeats")
        return runs
    return [read_run(path)]


def _experiment(path: Path) -> RunConfig | None:
    """Return the configuration of an experiment, None if `path` is not one."""
    if not (path / "config.json").is_file():
        return None
    config = load_config(path / "config.json")
    return config if config.run.repeats > 1 else None


def _repeats(config: RunConfig, path: Path) -> Iterator[tuple[RunConfig, Path]]:
    """Yield the configuration and the directory of each repeat."""
    for repeat in range(config.run.repeats):
        settings = msgspec.structs.replace(config.run, seed=config.run.seed + repeat, repeats=1)
        yield msgspec.structs.replace(config, run=settings), path / f"repeat-{repeat:03d}"
