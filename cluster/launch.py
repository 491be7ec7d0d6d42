"""Launches runs: starts Ray and the actors, watches them, and always shuts down."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from ray.exceptions import RayError

from asgd.config.make import Configuration, as_config, load_config
from asgd.config.tables import RunConfig
from asgd.errors import AsgdError, InputError, RunFailedError
from asgd.problems.base import Problem, starting_point
from asgd.problems.make import make_problem
from asgd.progress import CallbackError, Progress
from asgd.rules.make import make_local_rule, make_rule
from asgd.rundir.alive import heartbeat, is_at_work
from asgd.rundir.changes import change_settings
from asgd.rundir.checkpoint import CHECKPOINTS
from asgd.rundir.claims import LeaseLostError, check_locks
from asgd.rundir.files import describe_os_error, is_gone
from asgd.rundir.problem_record import ProblemRecord, check_problem
from asgd.rundir.reader import read_run
from asgd.rundir.repeats import run_repeats, unfinished_repeats
from asgd.rundir.writer import RunWriter, default_path
from asgd.shards import Shards
from cluster.actors import UserError
from cluster.local_ray.causes import cause_of
from cluster.local_ray.session import check_address, ray_session
from cluster.local_ray.vitals import failure_recorded, guard_of_process, ray_death
from cluster.memory import check_memory
from cluster.metrics import check_metrics
from cluster.storage.lease import only_launcher
from cluster.storage.recovery import check_rule, reached_version
from cluster.team import take_requests
from cluster.watch import supervise

Watcher = Callable[[Progress], None]
Observe = Callable[[Path], AbstractContextManager[Watcher | None]]


def run(
    config: Configuration,
    out: str | Path | None = None,
    address: str | None = None,
    progress: Watcher | None = None,
    *,
    observe: Observe | None = None,
) -> Path:
    """Run asynchronous SGD on Ray and return the run directory.

    >>> path = cluster.run({"problem": {"kind": "quadratic"}, "run": {"updates": 100}})
    >>> len(asgd.read_run(path).trace)
    100

    Parameters
    ----------
    config
        The run. With `run.repeats` the directory contains a run per repeat, see
        `asgd.rundir.repeats`; all repeats share one Ray.
    out
        The run directory, which must be empty or not exist; default
        `runs/<kind of problem>-<date>-<time>`.
    address
        A running Ray cluster to join; default: start Ray on this machine and stop it at the end.
    progress
        Called a few times a second. An exception from it ends the run as failed and propagates.
    observe
        In place of `progress`: called with the directory of each run, it returns a context manager
        that provides the `progress` of this run.

    Raises
    ------
    InputError
        The configuration, the directory or the address cannot be used; nothing was started.
    RunFailedError
        The run ended early; its directory is readable.
    KeyboardInterrupt
        Ctrl-C; the directory is readable and records the interrupt.
    """
    config = as_config(config)
    out = default_path(config) if out is None else Path(out)
    check_locks(out, config.cluster.lease)
    launcher = _Launcher(address, observe or (lambda _: nullcontext(progress)))
    with launcher.ray_of_repeats(config) if config.run.repeats > 1 else nullcontext():
        return run_repeats(config, out, launcher.start)


def resume(
    path: str | Path,
    address: str | None = None,
    progress: Watcher | None = None,
    *,
    force: bool = False,
    changes: Sequence[str] = (),
    observe: Observe | None = None,
) -> Path:
    """Continue an unfinished run from its newest good checkpoint.

    >>> path = cluster.run({"problem": {"kind": "quadratic"}, "run": {"updates": 100}})
    >>> len(asgd.read_run(cluster.resume(path, changes=["run.updates=150"])).trace)
    150

    Parameters
    ----------
    path
        The run directory, with its configuration. If it contains repeats, missing ones are started
        and unfinished ones are continued.
    address, progress, observe
        As for `run`.
    force
        Continue even if the problem has changed, see `asgd.rundir.problem_record`.
    changes
        Entries `"table.key=value"` for `run.updates`, `run.target_loss`, `run.max_seconds`,
        `optimizer.learning_rate` and `optimizer.batch_size`, valid from here on; with them a
        finished run can continue too. Not for repeats, which must stay alike.

    Raises
    ------
    InputError
        There is no such run, it has finished or is still running, its problem has changed, or a
        change is impossible.
    RunFailedError, KeyboardInterrupt
        As for `run`.
    """
    launcher = _Launcher(address, observe or (lambda _: nullcontext(progress)))
    if changes and load_config(Path(path) / "config.json").run.repeats > 1:
        raise InputError(f"{path}: repeats of a run must stay alike: expected no changes (--set)")
    with unfinished_repeats(path, force=force) as left, ExitStack() as stack:
        if len(left) > 1:
            config = load_config(Path(path) / "config.json")
            stack.enter_context(launcher.ray_of_repeats(config))
        for directory, missing in left:
            if missing is None:
                launcher.resume(directory, force, changes)
            else:
                launcher.start(missing, directory)
    return Path(path)


@dataclass(frozen=True)
class _Launcher:
    """Starts and continues single runs on the Ray at an address, each with its own observer."""

    address: str | None
    observe: Observe

    def ray_of_repeats(self, config: RunConfig) -> AbstractContextManager[None]:
        """Provide one Ray for all repeats: a `ray_session` inside another starts nothing."""
        return self._ray(config, self._checked_problem(config))

    def start(self, config: RunConfig, path: Path) -> None:
        """Start a run."""
        problem = self._checked_problem(config)
        record = ProblemRecord.of(problem, config.run.seed)
        with guard_of_process(), failure_recorded(path, new=True):
            writer = RunWriter.create(path, config)
            with only_launcher(path / CHECKPOINTS, config.cluster.lease) as writer.check:
                self._launch(config, problem, writer, record)

    def resume(self, path: Path, force: bool, changes: Sequence[str]) -> None:
        """Continue a run."""
        found = read_run(path)
        if not (path / CHECKPOINTS).is_dir():
            raise InputError(f"{path}: a simulated run; only real runs can be resumed")
        if found.state == "finished" and not changes:
            raise InputError(
                f"{path}: the run is finished; --set run.updates=N asks for more updates"
            )
        problem = self._checked_problem(found.config)
        check_problem(found, problem, "resume", force=force)
        check_rule(path, make_rule(found.config))
        lease = load_config(path / "config.json", changes).cluster.lease
        if lease != found.config.cluster.lease and is_at_work(path):
            raise InputError(f"{path}: the run is still running")
        with (
            guard_of_process(),
            only_launcher(path / CHECKPOINTS, lease) as check,
            failure_recorded(path),
        ):
            for _ in take_requests(path):
                pass  # the requester of an old request no longer waits for an answer
            config = change_settings(path, changes, reached_version(path))
            self._launch(config, problem, RunWriter(path, check))

    def _checked_problem(self, config: RunConfig) -> Problem:
        """Check the input before anything is created, and return the problem."""
        check_metrics(config.metrics)
        problem, rule = make_problem(config), make_rule(config)
        make_local_rule(config)
        Shards.of(config, problem)  # refuses impossible parts
        check_address(self.address)
        if self.address is None:
            check_memory(config, problem, rule)
        return problem

    def _ray(self, config: RunConfig, problem: Problem) -> AbstractContextManager[None]:
        # Space for every worker's snapshot and gradient, and for records in flight.
        vectors = 4 * (config.cluster.workers + 8)
        store = 100_000_000 + vectors * problem.dim * problem.dtype.itemsize
        return ray_session(self.address, store, config.metrics.page)

    def _launch(
        self,
        config: RunConfig,
        problem: Problem,
        writer: RunWriter,
        record: ProblemRecord | None = None,
    ) -> None:
        """Run until the last update; a new run also writes the `record` of its problem."""
        end, failure = _End(writer), None
        try:
            with (
                self.observe(writer.path) as progress,
                end.noted(),  # also records a failed start of Ray
                heartbeat(writer.path),
                self._ray(config, problem),
                end.noted(),  # before Ray's shutdown, which may fail too
            ):
                if record is not None:
                    record.note(writer)
                initial = starting_point(problem, config.run.seed)
                goal = supervise(
                    config, initial, problem.n_samples, writer, progress, resumed=record is None
                )
                writer.event("finish", **({} if goal is None else {"reason": goal}))
        except CallbackError as error:
            failure = error.raised
        if failure is not None:  # raised outside the handler, so that its `__context__` stays empty
            raise failure


class _End:
    """Writes the event that ends a run, once."""

    def __init__(self, writer: RunWriter) -> None:
        self._writer = writer
        self._noted = False

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note the exception that ends the block.

        Raises
        ------
        RunFailedError
            Replaces all exceptions except interrupts and those of the caller's callback.
        """
        try:
            yield
        except (
            KeyboardInterrupt,
            SystemExit,
            BrokenPipeError,
        ):  # BrokenPipeError: stdout is closed
            self._note("interrupted")
            raise
        except CallbackError as error:
            self._note("failed", reason=f"the progress callback: {error}")
            raise
        except Exception as error:
            failure = _failure(self._writer.path, error)
            self._note("failed", reason=str(failure))
            if failure is error:
                raise
            raise failure from error

    def _note(self, kind: str, **fields: str) -> None:
        if not self._noted:
            self._noted = True
            # On a full disk this fails as well, and the run may be another launcher's: the first
            # error is the one to show.
            with contextlib.suppress(OSError, LeaseLostError):
                self._writer.event(kind, **fields)


def _failure(path: Path, error: Exception) -> RunFailedError:
    if isinstance(error, RunFailedError) and error.run is not None:
        return error
    if is_gone(path):  # the cause of the other errors
        failure = RunFailedError(describe_os_error(path, OSError()))
    elif isinstance(error, RunFailedError):
        failure = error
    else:
        failure = RunFailedError(_reason(path, error))
    failure.run = path
    return failure


def _reason(path: Path, error: Exception) -> str:
    """Describe in one line the exception that ended a run."""
    if isinstance(error, RayError):
        return ray_death() or cause_of(error)
    if isinstance(error, OSError):
        return describe_os_error(path, error)
    if isinstance(error, AsgdError):
        return str(error)
    return UserError.describe(error).message
