"""Real runs: the record, the law of staleness, failures, interruptions, and the clean-up."""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from ray._private import worker as ray_worker
from ray.exceptions import RayError

from analysis.profile.fitting import fit_run
from analysis.profile.queueing import measured_cycles, queue_staleness
from asgd.__main__ import main
from asgd.config.make import make_config
from asgd.config.tables import RunConfig
from asgd.console.live import LiveRun
from asgd.draws import WorkerDraws
from asgd.errors import DivergedError, InputError, RunFailedError
from asgd.problems.make import make_problem
from asgd.progress import Progress
from asgd.rundir.columns import SHARED
from asgd.rundir.reader import Run, describe_state, read_run
from asgd.rundir.writer import RunWriter
from asgd.simulation.simulate import simulate
from asgd.staleness.geometric import Geometric
from asgd.staleness.law import StalenessLaw
from asgd.streams import stream
from asgd.verify import record_findings
from cluster import resume, run
from cluster.storage.verify import verify
from tests.analysis.test_queueing import noise
from tests.support.invariants import check_trace
from tests.support.processes import DEFAULT_SIGNALS, listeners, parts, processes_in

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]


def configure(problem: dict[str, Any], updates: int, seed: int = 0, **cluster: Any) -> RunConfig:
    return make_config(
        {
            "problem": problem,
            "optimizer": {"learning_rate": 0.05, "batch_size": 4},
            "cluster": cluster,
            "run": {"updates": updates, "seed": seed, "eval_every": 25},
        }
    )


@pytest.mark.usefixtures("shared_ray")
def test_one_worker_is_serial_sgd_to_the_last_bit(tmp_path: Path) -> None:
    config = configure({"kind": "softmax"}, updates=120, seed=3, workers=1)
    result = read_run(run(config, tmp_path / "run"))
    check_trace(result)

    problem = make_problem(config)
    draws = WorkerDraws(config, problem)
    x = problem.initial_point(stream(3, "initial"))
    norms, losses = [], [problem.loss(x)]
    for update in range(120):
        gradient = problem.gradient(x, draws.batch(0, update, 4))
        x = x - 0.05 * gradient
        norms.append(np.sqrt(gradient @ gradient))
        if (update + 1) % 25 == 0 or update == 119:
            losses.append(problem.loss(x))
    np.testing.assert_array_equal(result.trace["gradient_norm"], norms)
    np.testing.assert_array_equal(result.trace["staleness"], 0)
    # BLAS may add up 1797 samples in another order on another number of threads.
    np.testing.assert_allclose(result.loss["loss"], losses, rtol=1e-13)


@pytest.mark.usefixtures("shared_ray")
def test_uniform_schedule_is_geometric_and_equals_the_simulation(tmp_path: Path) -> None:
    config = configure({"kind": "quadratic"}, updates=5000, workers=4, schedule="uniform")
    real = read_run(run(config, tmp_path / "real"))
    check_trace(real)
    staleness = real.trace["staleness"]
    assert np.mean(staleness == 0) == pytest.approx(0.25, abs=0.02)
    assert total_variation(staleness.to_numpy(), Geometric(0.75)) < 0.03

    simulated = read_run(simulate(config, tmp_path / "simulated"))
    for column in ("worker", "sequence", "read_version", "gradient_norm"):
        np.testing.assert_array_equal(real.trace[column], simulated.trace[column])
    np.testing.assert_array_equal(real.loss["loss"], simulated.loss["loss"])


@pytest.mark.usefixtures("shared_ray")
@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [("target_loss", 0.4, "reached run.target_loss = 0.4"), ("max_seconds", 0.5, "have passed")],
)
def test_run_ends_early_with_success_and_all_of_its_record(
    tmp_path: Path, key: str, value: float, reason: str
) -> None:
    config = configure({"kind": "logistic"}, updates=50_000_000, workers=2)
    settings = msgspec.structs.replace(config.run, **{key: value})
    result = read_run(run(msgspec.structs.replace(config, run=settings), tmp_path / "run"))
    check_trace(result)
    assert result.state == "finished"
    assert result.ended_early is not None
    assert result.ended_early.endswith(reason)
    end = len(result.trace)
    assert 0 < end < 50_000_000
    assert result.loss["update"].iloc[-1] == end
    assert result.parameters_update == end
    assert result.loss["loss"].iloc[-1] == make_problem(config).loss(result.parameters)
    assert not verify(result, replayed=False).findings
    if key == "max_seconds":
        assert result.trace["applied_seconds"].iloc[-1] >= 0.4
    else:
        assert (result.loss["loss"] <= 0.4).any()


@pytest.mark.usefixtures("shared_ray")
def test_bounded_staleness_is_reached_and_never_exceeded(tmp_path: Path) -> None:
    cluster = {"workers": 3, "mode": "bounded", "max_staleness": 1}
    result = read_run(run(configure({"kind": "quadratic"}, 200, **cluster), tmp_path / "run"))
    assert result.state == "finished"
    assert set(result.trace["staleness"]) == {0, 1}
    shared = result.trace[result.trace["worker"] == SHARED]
    assert len(shared) > 0
    sizes = result.members.groupby("update")["batch_size"].sum()
    np.testing.assert_array_equal(sizes.index, shared["update"])
    np.testing.assert_array_equal(sizes, shared["batch_size"])
    check_every_gradient_is_accounted_for(result)


@pytest.mark.usefixtures("shared_ray")
def test_without_delay_staleness_is_concentrated_near_its_mean(tmp_path: Path) -> None:
    shown: list[Progress] = []
    # Calls of Ray cost every worker the same. Over shared memory, an update takes less than a time
    # slice, so on a busy machine the scheduler decides which worker is next.
    config = configure({"kind": "least_squares"}, updates=1200, workers=4, transport="ray")
    result = read_run(run(config, tmp_path / "run", progress=shown.append))
    check_trace(result)
    staleness = result.trace["staleness"]
    # Every update ages the P - 1 snapshots that it does not use, including those held at the end.
    held = 1200 - (result.trace.groupby("worker")["update"].max() + 1)
    assert staleness.sum() + held.sum() == 3 * 1200
    assert staleness.var() < 6.0  # the geometric law of this mean has 12
    assert (shown[-1].update, shown[-1].updates) == (1200, 1200)
    assert shown[-1].mean_staleness == pytest.approx(staleness.mean())
    assert shown[-1].loss == result.loss["loss"].iloc[-1]


@pytest.mark.slow
@pytest.mark.usefixtures("shared_ray")
def test_exponential_compute_times_give_nearly_the_geometric_law_and_the_queue_law(
    tmp_path: Path,
) -> None:
    compute_time = {"law": "exponential", "mean": 0.1}
    config = configure({"kind": "quadratic"}, 1600, workers=4, compute_time=compute_time)
    result = read_run(run(config, tmp_path / "run"))
    check_trace(result)
    staleness = result.trace["staleness"].to_numpy()
    mean = float(staleness.mean())
    # Chance alone contributes 0.4 sum_l sqrt(w_l / 1600) = 0.037.
    assert total_variation(staleness, Geometric(mean / (1 + mean))) < 0.08
    # A busy machine only makes it larger, so the bound is the mean less four standard errors.
    assert result.trace["compute_seconds"].mean() > 0.1 * (1 - 4 / np.sqrt(1600))
    fit, law = fit_run(result), queue_staleness(measured_cycles(result))
    assert fit.conservation is not None
    assert fit.conservation.holds
    # 0.02 beside the sampling noise: the cycles of a loaded machine are not independent
    distance = total_variation(fit.sample.staleness, law)
    assert distance < noise(law, len(fit.sample.staleness)) + 0.02


def total_variation(staleness: np.ndarray[Any, Any], law: StalenessLaw) -> float:
    """Return the total variation distance of a sample to a law."""
    observed = np.bincount(staleness) / len(staleness)
    expected = law.pmf(np.arange(len(observed)))
    return float(0.5 * (np.abs(observed - expected).sum() + 1.0 - expected.sum()))


@pytest.mark.slow
@pytest.mark.usefixtures("shared_ray")
@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        (
            "raise",
            RunFailedError,
            "worker 0: ZeroDivisionError: the user's own mistake (.*gins.py:",
        ),
        (
            "loss",
            RunFailedError,
            "be evaluated: ArithmeticError: no loss below 0.9 (.*ins.py:",
        ),
        ("nan", RunFailedError, "11 gradients were refused; .* worker 0 .*: not finite; lower"),
        ("grow", DivergedError, "the run diverged: loss .*, 1 at the start; learning_rate = 0.05"),
        ("soar", DivergedError, "the run diverged: loss .*, 1 at the start; learning_rate = 0.05"),
    ],
)
def test_a_run_that_cannot_continue_ends_with_one_line(
    tmp_path: Path, fault: str, error: type[RunFailedError], message: str
) -> None:
    problem = {"kind": "tests.support.plugins:bowl", "options": {"fault": fault}}
    config = configure(problem, updates=10**6, workers=1)
    with pytest.raises(error, match=message.replace("(", r"\(")) as raised:
        run(config, tmp_path / "run")
    assert "\n" not in str(raised.value)
    result = read_run(tmp_path / "run")
    assert result.state == "failed"
    assert result.events[-1]["reason"] == str(raised.value)
    if fault == "raise":
        (*_, last) = [event for event in result.events if event["event"] == "worker_lost"]
        assert "; given up after 5 failures in a row, " in last["reason"]
    assert len(result.trace) > 0
    np.testing.assert_array_equal(result.trace["update"], np.arange(len(result.trace)))


@pytest.mark.slow
@pytest.mark.usefixtures("shared_ray")
@pytest.mark.parametrize("transport", ["shm", "ray"])
def test_a_slow_loss_slows_the_run_down_but_does_not_block_it(
    tmp_path: Path, transport: str
) -> None:
    problem = {"kind": "tests.support.plugins:bowl", "options": {"fault": "slow loss"}}
    config = configure(problem, updates=10**6, workers=2, transport=transport)
    settings = msgspec.structs.replace(config.run, eval_every=1)
    config = msgspec.structs.replace(config, run=settings)
    shown: list[Progress] = []

    def interrupt(progress: Progress) -> None:
        shown.append(progress)
        if progress.evaluating and progress.update > 60:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "run", progress=interrupt)
    result = read_run(tmp_path / "run")
    assert result.state == "interrupted"
    # At most the losses of a second, and the updates until the next poll of the launcher.
    assert len(result.trace) - shown[-1].update < 50
    np.testing.assert_array_equal(result.loss["update"], np.arange(len(result.trace) + 1))
    check_every_gradient_is_accounted_for(result)


@pytest.mark.usefixtures("shared_ray")
def test_losses_are_skipped_if_there_is_no_time(tmp_path: Path) -> None:
    problem = {"kind": "tests.support.plugins:bowl", "options": {"fault": "slow loss"}}
    config = configure(problem, updates=3000, workers=2, transport="shm")
    settings = msgspec.structs.replace(config.run, eval_every=1, evaluations="skip")
    config = msgspec.structs.replace(config, run=settings)
    shown: list[Progress] = []
    result = read_run(run(config, tmp_path / "run", progress=shown.append))
    assert result.state == "finished"
    assert not any(progress.evaluating for progress in shown if progress.update < 3000)
    losses, skipped = result.loss["update"], result.skipped["update"]
    assert {0, 3000} <= set(losses)
    assert sorted([*losses, *skipped]) == list(range(3001))
    assert len(skipped) > 2000
    assert not record_findings(result)
    check_every_gradient_is_accounted_for(result)


@pytest.mark.slow
@pytest.mark.usefixtures("shared_ray")
def test_a_hanging_loss_delays_neither_updates_nor_an_interrupt(tmp_path: Path) -> None:
    out, until = tmp_path / "run", tmp_path / "until"
    options = {"fault": "hanging loss", "until": str(until)}
    config = configure({"kind": "tests.support.plugins:bowl", "options": options}, 10**6, workers=2)
    settings = msgspec.structs.replace(config.run, evaluations="skip")
    config = msgspec.structs.replace(config, run=settings)
    interrupted: list[float] = []

    def interrupt(progress: Progress) -> None:
        if progress.update > 5000:  # with evaluations = "all", not even 100
            interrupted.append(time.monotonic())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, out, progress=interrupt)
    assert time.monotonic() - interrupted[0] < 20.0  # 3 s on a machine that does nothing else
    result = read_run(out)
    assert len(result.trace) > 5000
    losses, skipped = result.loss["update"], result.skipped["update"]
    assert not set(losses) & set(skipped)
    until.touch()
    updates = len(result.trace) + 100
    result = read_run(resume(out, changes=[f"run.updates={updates}"]))
    assert result.state == "finished"
    losses, skipped = result.loss["update"], result.skipped["update"]
    due = sorted({*range(0, updates, 25), updates})
    assert sorted([*losses, *skipped]) == due
    np.testing.assert_array_equal(result.trace["update"], np.arange(updates))


@pytest.mark.slow
@pytest.mark.usefixtures("shared_ray")
def test_interrupt_does_not_wait_for_a_loss_that_takes_minutes(tmp_path: Path) -> None:
    out, until = tmp_path / "run", tmp_path / "until"
    options = {"fault": "hanging loss", "until": str(until)}
    problem = {"kind": "tests.support.plugins:bowl", "options": options}
    config = configure(problem, 2000, workers=2)
    # Without the log, missing updates are made again from the checkpoint alone.
    settings = msgspec.structs.replace(config.run, durability="checkpoint", checkpoint_every=10)
    config = msgspec.structs.replace(config, run=settings)
    shown: list[Progress] = []
    interrupted: list[float] = []

    def interrupt(progress: Progress) -> None:
        shown.append(progress)
        hanging = (
            progress.update == shown[len(shown) // 2].update
        )  # no update in half of the reports
        if progress.update and progress.evaluating and hanging:
            interrupted.append(time.monotonic())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, out, progress=interrupt)
    assert time.monotonic() - interrupted[0] < 20.0  # 3 s on a machine that does nothing else
    result = read_run(out)
    assert result.state == "interrupted"
    assert 0 < shown[-1].update <= len(result.trace)
    assert len(result.loss) < len(result.trace) // 25
    until.touch()
    result = read_run(resume(out))
    assert result.state == "finished"
    np.testing.assert_array_equal(result.trace["update"], np.arange(2000))
    assert not result.trace.duplicated(["worker", "sequence"]).any()
    np.testing.assert_array_equal(result.loss["update"], np.arange(0, 2001, 25))


@pytest.mark.slow
@pytest.mark.usefixtures("shared_ray")
@pytest.mark.parametrize(
    "raised", [ZeroDivisionError("mine"), RunFailedError("mine"), RayError("mine")]
)
def test_an_exception_of_the_progress_callback_is_raised_unchanged(
    tmp_path: Path, raised: Exception
) -> None:
    def fail(progress: Progress) -> None:
        raise raised

    with pytest.raises(type(raised)) as caught:
        run(configure({"kind": "softmax"}, updates=10**6, workers=1), tmp_path / "r", progress=fail)
    assert caught.value is raised
    result = read_run(tmp_path / "r")
    assert (result.state, result.failure) == (
        "failed",
        f"the progress callback: {type(raised).__name__}: mine",
    )


@pytest.mark.usefixtures("shared_ray")
def test_an_event_that_cannot_be_written_ends_the_run_with_one_line(tmp_path: Path) -> None:
    out = tmp_path / "run"
    events, aside = out / "events.jsonl", tmp_path / "events.jsonl"

    def obstruct(progress: Progress) -> None:
        if progress.update and not aside.exists():
            events.rename(aside)
            events.mkdir()
            (out / "request-1.json").write_text('{"workers": 2}', encoding="utf-8")

    config = configure({"kind": "quadratic"}, updates=10**6, workers=1)
    with pytest.raises(RunFailedError, match=r"events.jsonl: cannot be used \(Is a dir") as raised:
        run(config, out, progress=obstruct)
    assert raised.value.run == out


@pytest.mark.usefixtures("shared_ray")
def test_problem_that_cannot_be_recorded_ends_the_run_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = RunWriter.sync

    def obstruct(writer: RunWriter) -> None:
        sync(writer)
        (writer.path / "events.jsonl").unlink()
        (writer.path / "events.jsonl").mkdir()

    monkeypatch.setattr(RunWriter, "sync", obstruct)
    config = configure({"kind": "quadratic"}, updates=10, workers=1)
    for make, name in ((run, "real"), (simulate, "simulated")):
        with pytest.raises(RunFailedError, match=r"cannot be used \(Is a directory"):
            make(config, tmp_path / name)
    assert (tmp_path / "real" / "checkpoints" / "lock").exists()  # the launcher had locked the run


@pytest.mark.usefixtures("shared_ray")
@pytest.mark.parametrize("removed", [False, True])
def test_a_directory_moved_or_removed_during_the_run_is_named(
    tmp_path: Path,
    removed: bool,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    out, moved = tmp_path / "run", tmp_path / "moved"

    def take_away(live: LiveRun, progress: Progress) -> None:
        if any(out.glob("trace/part-*")):
            out.rename(moved)
            if removed:
                shutil.rmtree(moved)

    monkeypatch.setattr(LiveRun, "__call__", take_away)
    (tmp_path / "c.toml").write_text("problem.kind = 'softmax'\nrun.updates = 1000000\n")
    with pytest.raises(SystemExit) as ended:
        main(["run", str(tmp_path / "c.toml"), "--out", str(out), "--quiet"])
    assert ended.value.code == 1
    message = f"asgd: {out}: was removed, moved or unmounted during the run\n"
    assert capfd.readouterr() == ("", message)
    assert not out.exists()
    assert moved.exists() is not removed
    if not removed:
        assert len(read_run(moved).trace) > 0


BECOMES_READ_ONLY = """
import os, subprocess, sys
from analysis.profile.fitting import fit_run
from analysis.profile.queueing import measured_cycles, queue_staleness
from asgd.__main__ import main
from asgd.console.live import LiveRun

out = sys.argv[-1]

def shut(live, progress):
    shut_out = out + "-shut"
    if progress.update and not os.path.exists(shut_out):
        # Prepared beside it, because a mount with a file open for writing cannot be remounted.
        os.mkdir(shut_out)
        subprocess.run(["mount", "--bind", out, shut_out], check=True)
        subprocess.run(["mount", "-o", "remount,ro,bind", shut_out], check=True)
        subprocess.run(["mount", "--move", shut_out, out], check=True)

LiveRun.__call__ = shut
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_directory_that_becomes_read_only_is_named(tmp_path: Path) -> None:
    unshare = ["unshare", "-m"]
    if os.geteuid() or subprocess.run([*unshare, "true"], check=False).returncode:
        pytest.skip("needs root and unshare -m")
    (tmp_path / "c.toml").write_text("problem.kind = 'quadratic'\nrun.updates = 1000000000\n")
    arguments = ["run", tmp_path / "c.toml", "--out", tmp_path / "run"]
    child = subprocess.run(
        [*unshare, sys.executable, "-c", BECOMES_READ_ONLY, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert child.returncode == 1
    assert re.fullmatch(r"asgd: \S+/run/\S+: cannot be used \(Read-only .*\)\n", child.stderr)


@pytest.mark.usefixtures("shared_ray")
@pytest.mark.parametrize(
    ("mode", "transport", "fault", "after", "timeout", "reason"),
    [
        ("async", "ray", "exit", 80, 60.0, "its process died"),
        ("sync", "tcp", "hang", 160, 5.0, "silent for"),
    ],
)
def test_a_run_continues_without_a_lost_worker_until_it_returns(
    tmp_path: Path,
    mode: str,
    transport: str,
    fault: str,
    after: int,
    timeout: float,
    reason: str,
) -> None:
    problem = {"kind": "tests.support.plugins:bowl", "options": {"fault": fault, "after": after}}
    cluster = {"mode": mode, "transport": transport, "worker_timeout": timeout}
    config = configure(problem, 300, workers=2, **cluster)
    result = read_run(run(config, tmp_path / "run"))
    assert result.state == "finished"
    trace = result.trace
    np.testing.assert_array_equal(trace["update"], np.arange(300))
    np.testing.assert_array_equal(trace["staleness"], trace["update"] - trace["read_version"])
    lost = [event for event in result.events if event["event"] == "worker_lost"]
    assert lost
    assert all(event["reason"].startswith(reason) for event in lost)
    # The first is lost during the run; the loss of another may be noticed after the last update.
    assert 0 < lost[0]["update"] < 300
    assert all(event["update"] <= 300 for event in lost)
    joined = [event["worker"] for event in result.events if event["event"] == "worker_joined"]
    assert len(joined) > 2
    check_every_gradient_is_accounted_for(result)


def check_every_gradient_is_accounted_for(result: Run) -> None:
    """Assert that each gradient of each worker was applied once or reported as lost."""
    applied = [
        *zip(result.trace["worker"], result.trace["sequence"], strict=True),
        *zip(result.members["worker"], result.members["sequence"], strict=True),
    ]
    lost = [(e["worker"], e["sequence"]) for e in result.events if e["event"] == "gradient_lost"]
    for worker in range(result.config.cluster.workers):
        known = sorted(s for w, s in [*applied, *lost] if w == worker)
        assert known == list(range(len(known)))


def test_directory_in_use_is_refused_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="not empty"):
        run(configure({"kind": "quadratic"}, updates=10), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


JOIN_SCRIPT = """
import json, os, sys
from asgd.config.make import make_config
from cluster import resume, run
before = dict(os.environ)
run(make_config(json.loads(sys.argv[3])), sys.argv[1], address=sys.argv[2])
assert dict(os.environ) == before
"""


@pytest.fixture
def running_cluster() -> Iterator[tuple[str, dict[str, str]]]:
    """Provide the address of a cluster of somebody else, and the environment for joining it."""
    tmp = tempfile.mkdtemp(prefix="a-", dir="/tmp")
    with socket.create_server(("", 0)) as free:
        address = f"{socket.gethostbyname(socket.gethostname())}:{free.getsockname()[1]}"
    host, port = address.split(":")
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "5" * 64}
    command = f"start --head --block --node-ip-address={host} --port={port} --num-cpus=1"
    head = subprocess.Popen(
        [
            Path(sys.executable).with_name("ray"),
            *command.split(),
            "--include-dashboard=false",
            f"--temp-dir={tmp}",
        ],
        env={**environment, "RAY_USAGE_STATS_ENABLED": "0"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while head.poll() is None:
        with contextlib.suppress(OSError):
            socket.create_connection((host, int(port))).close()
            break
    yield address, environment
    head.terminate()
    head.wait(60)
    shutil.rmtree(tmp, ignore_errors=True)


@pytest.mark.slow
def test_two_runs_join_a_cluster_and_leave_the_environment_unchanged(
    tmp_path: Path, running_cluster: tuple[str, dict[str, str]]
) -> None:
    address, environment = running_cluster
    config = configure({"kind": "quadratic"}, updates=100, workers=2)
    for number in (1, 2):
        out = tmp_path / f"run{number}"
        child = subprocess.run(
            [sys.executable, "-c", JOIN_SCRIPT, str(out), address, config.to_json()],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert (child.returncode, child.stderr) == (0, "")
        check_trace(read_run(out))


def test_too_little_memory_is_refused_before_anything_starts(tmp_path: Path) -> None:
    config = configure({"kind": "tests.support.plugins:wide"}, updates=10, workers=100_000)
    with pytest.raises(
        InputError,
        match=r"with 100,000 parameters in float64 their .* take \d+\.\d GB, .* are free",
    ):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere", "ray://127.0.0.1:10001"])
def test_address_without_a_cluster_is_refused(tmp_path: Path, address: str) -> None:
    with pytest.raises(InputError, match="--address"):
        run(configure({"kind": "quadratic"}, updates=10), tmp_path / "run", address=address)
    assert not (tmp_path / "run").exists()


SCRIPT = """
import json, os, signal, sys
from asgd.config.make import make_config
from cluster import resume, run

def state():
    mask = os.umask(0)
    os.umask(mask)
    return dict(os.environ), mask, signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)

def show(progress):
    if progress.update and not os.path.exists(sys.argv[2]):
        with open(sys.argv[2] + ".tmp", "w") as file:
            print(os.getpid(), file=file)
        os.rename(sys.argv[2] + ".tmp", sys.argv[2])

before = state()
try:
    run(make_config(json.loads(sys.argv[3])), sys.argv[1], progress=show)
finally:
    assert state() == before, (state(), before)
"""


class Subprocess:
    """A run in its own process, with its home and temporary directory under `tmp`."""

    def __init__(self, tmp: Path, updates: int, before: Sequence[str] = (), **problem: Any) -> None:
        self.out, self.tmp, self.running = tmp / "out", tmp / "t", tmp / "running"
        self.tmp.mkdir()
        self.home = tmp / "home"
        self.home.mkdir()
        config = configure(problem, updates, workers=2)
        arguments = [str(self.out), str(self.running), config.to_json()]
        self.process = subprocess.Popen(
            [*DEFAULT_SIGNALS, *before, sys.executable, "-W", "error", "-c", SCRIPT, *arguments],
            cwd=ROOT,
            env={**os.environ, "TMPDIR": str(self.tmp), "HOME": str(self.home)},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def wait_for(self, condition: Callable[[], object]) -> None:
        """Return when the condition holds, or the process has ended."""
        while not condition() and self.process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.02)

    def processes(self) -> set[int]:
        """Return the processes that have files of this run open."""
        return processes_in(self.tmp)

    def finish(self) -> str:
        """Wait for the end, check that nothing is left, and return standard error."""
        _, errors = self.process.communicate(timeout=120)
        assert not self.processes()
        assert not list(self.tmp.iterdir())
        assert not list(self.home.iterdir())  # such as Ray's file with a token
        return errors


def shared_memory() -> set[str]:
    """Return the shared memory of this machine without the semaphores of Python processes."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith("sem.mp-")}


@pytest.fixture
def launch() -> Iterator[Callable[..., Subprocess]]:
    """Launch runs as processes, which never outlive the test."""
    shm = shared_memory()
    # The path of a Unix socket has 107 bytes at most: pytest's own directories are too long.
    tmp = Path(tempfile.mkdtemp(prefix="a-", dir="/tmp"))
    children: list[Subprocess] = []

    def start(updates: int, before: Sequence[str] = (), **problem: Any) -> Subprocess:
        children.append(Subprocess(tmp, updates, before, **problem))
        return children[-1]

    yield start
    for child in children:
        for pid in child.processes() | (
            {child.process.pid} if child.process.poll() is None else set()
        ):
            os.kill(pid, signal.SIGKILL)
        child.process.communicate()
    shutil.rmtree(tmp, ignore_errors=True)
    assert shared_memory() <= shm


def test_nothing_is_left_after_success(launch: Callable[..., Subprocess]) -> None:
    child = launch(updates=60, kind="quadratic")
    assert child.finish() == ""
    assert child.process.returncode == 0
    check_trace(read_run(child.out))


@pytest.mark.slow
def test_nothing_is_left_after_failure(launch: Callable[..., Subprocess]) -> None:
    options = {"fault": "raise"}
    child = launch(updates=10**6, kind="tests.support.plugins:bowl", options=options)
    assert "the user's own mistake" in child.finish()
    assert child.process.returncode == 1
    assert read_run(child.out).state == "failed"


@pytest.mark.slow
@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_nothing_is_left_after_interruption(
    launch: Callable[..., Subprocess], which: signal.Signals
) -> None:
    child = launch(updates=10**6, kind="quadratic")
    child.wait_for(child.running.exists)
    found = listeners(child.processes() | {child.process.pid})
    assert found
    for address, port in found:
        assert (getattr(address, "ipv4_mapped", None) or address).is_loopback, found
        assert not shows_a_page(port)
    os.killpg(child.process.pid, which)  # as a terminal or a supervisor does
    child.finish()
    assert child.process.returncode == (1 if which == signal.SIGTERM else -signal.SIGINT)
    result = read_run(child.out)
    assert result.state == "interrupted"
    assert len(result.trace) > 0
    np.testing.assert_array_equal(result.trace["update"], np.arange(len(result.trace)))


BREAK_IN = """
import contextlib, os, socket, sys

os.setgroups([])
os.setgid(65534)
os.setuid(65534)
ray, sockets = sys.argv[1:3]
for attempt in (
    lambda: os.listdir(ray),
    lambda: os.rename(sockets, sockets + "-of-mine"),
    lambda: open(f"{ray}/planted", "w"),
    lambda: socket.socket(socket.AF_UNIX).connect(f"{sockets}/raylet"),
):
    with contextlib.suppress(PermissionError):
        print("got in:", attempt())
"""


@pytest.mark.usefixtures("shared_ray")
def test_nobody_else_gets_into_the_directory_of_an_active_run(tmp_path: Path) -> None:
    """If other users could replace the sockets, workers would connect to theirs."""
    tried: list[str] = []

    def break_in(progress: Progress) -> None:
        if tried:
            return
        ray = Path(ray_worker._global_node.get_temp_dir_path())
        sockets = Path(ray_worker._global_node.get_sockets_dir_path())
        assert (sockets / "raylet").is_socket()
        assert len(str(sockets / "plasma_store")) <= 107
        assert ray.parent.stat().st_mode & 0o777 == 0o700
        if os.getuid() != 0:
            pytest.skip("only root can try as another user")
        command = [sys.executable, "-I", "-c", BREAK_IN, ray, sockets]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/")
        tried.append(done.stdout)

    config = configure({"kind": "quadratic"}, updates=60, workers=2)
    run(config, tmp_path / "run", progress=break_in)
    assert tried == [""]


@pytest.mark.slow
def test_nothing_is_left_of_a_killed_driver(launch: Callable[..., Subprocess]) -> None:
    child = launch(updates=10**6, kind="quadratic")
    child.wait_for(child.running.exists)
    (found,) = parts(child.process.pid, "guard")
    guard = os.pidfd_open(found)
    os.killpg(child.process.pid, signal.SIGKILL)
    assert select.select([guard], [], [], 60)[0]  # it has cleaned up
    os.close(guard)
    child.finish()
    assert child.process.returncode == -signal.SIGKILL
    result = read_run(child.out)
    assert result.state == "failed"
    assert result.failure == f"the launcher, process {child.process.pid}, was killed or crashed"
    assert describe_state(result) == ("failed", result.failure)


def test_the_kill_of_a_launcher_before_ray_starts_is_recorded(
    launch: Callable[..., Subprocess],
) -> None:
    child = launch(updates=10**6, kind="quadratic")
    events = child.out / "events.jsonl"
    while not (events.exists() and events.read_bytes().endswith(b"\n")):  # one whole event
        os.sched_yield()
    os.killpg(child.process.pid, signal.SIGKILL)
    child.finish()  # when its guard ends too
    assert read_run(child.out).failure == (
        f"the launcher, process {child.process.pid}, was killed or crashed"
    )


def test_a_run_reports_the_death_of_its_ray(launch: Callable[..., Subprocess]) -> None:
    child = launch(updates=10**6, kind="quadratic")
    child.wait_for(child.running.exists)
    (raylet,) = parts(child.process.pid, "raylet")
    os.kill(raylet, signal.SIGKILL)
    assert child.finish().endswith("RunFailedError: Ray's raylet was killed (Killed)\n")
    assert child.process.returncode == 1
    result = read_run(child.out)
    assert (result.state, result.failure) == ("failed", "Ray's raylet was killed (Killed)")
    np.testing.assert_array_equal(result.trace["update"], np.arange(len(result.trace)))
    events = [event["event"] for event in result.events]
    assert events.count("failed") == 1


@pytest.mark.slow
def test_a_run_reports_that_ray_could_not_start(launch: Callable[..., Subprocess]) -> None:
    child = launch(updates=10**6, before=["prlimit", "--fsize=50000000"], kind="quadratic")
    assert "Ray could not be started: Ray's raylet was killed (File size limit" in child.finish()
    assert child.process.returncode == 1
    result = read_run(child.out)
    assert result.state == "failed"
    assert str(result.failure).endswith("exceeded; see `ulimit -f`)")


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGHUP])
def test_nothing_is_left_after_interruption_of_the_start(
    launch: Callable[..., Subprocess], which: signal.Signals
) -> None:
    child = launch(updates=10**6, kind="quadratic")
    child.wait_for(lambda: child.processes() - {child.process.pid})
    os.killpg(child.process.pid, which)
    child.finish()
    assert child.process.returncode != 0
    assert read_run(child.out).state == "interrupted"


def shows_a_page(port: int) -> bool:
    """Return whether a request without a token gets a page on Ray or the run."""
    # Long enough for a header of the data plane, which would wait for the rest of a shorter one.
    request = b"GET /metrics HTTP/1.0\r\nHost: 127.0.0.1\r\nUser-Agent: a stranger's\r\n\r\n"
    with (
        contextlib.suppress(ConnectionError),
        socket.create_connection(("127.0.0.1", port), 10) as asked,
    ):
        asked.sendall(request)
        return asked.recv(64).split(b"\r\n")[0].endswith(b" 200 OK")
    return False
