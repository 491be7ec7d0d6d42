"""`asgd verify` finds nothing in a good run, and finds each kind of damage."""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from analysis.prediction.predict import predict
from analysis.study import Study
from asgd.arrays import Array
from asgd.config.make import make_config
from asgd.config.tables import ProblemConfig
from asgd.problems.base import Indices
from asgd.problems.scalar import Quadratic
from asgd.rundir.columns import TABLES
from asgd.rundir.problem_record import ProblemRecord
from asgd.rundir.reader import read_run
from asgd.rundir.tables import write_table
from asgd.rundir.writer import RunWriter
from asgd.simulation.replay import replay
from asgd.simulation.simulate import simulate
from cluster.storage.verify import verify
from tests.asgd.test_cli import asgd
from tests.support.machine import Machine, configure

Damage = Callable[[Path], None]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a finished run of a server and its workers, whose tables have two parts."""
    machine = Machine(tmp_path_factory.mktemp("verify") / "run", configure(workers=3))
    machine.work(40)
    machine.work(60)
    machine.writer.event("finish")
    return machine.path


@pytest.fixture
def run(good: Path, tmp_path: Path) -> Path:
    shutil.copytree(good, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize(
    "tables",
    [
        {"problem": {"kind": "softmax"}, "cluster": {"workers": 3}},
        {"problem": {"kind": "quadratic"}, "simulation": {"staleness": "geometric"}},
        {
            "problem": {"kind": "least_squares"},
            "optimizer": {"rule": "momentum", "learning_rate": 0.01, "clip_norm": 0.1},
        },
    ],
)
def test_a_simulated_run_has_no_findings(
    tables: dict[str, dict[str, object]], tmp_path: Path
) -> None:
    path = simulate(make_config(tables | {"run": {"updates": 130}}), tmp_path / "run")
    verdict = verify(read_run(path))
    assert verdict.findings == []
    assert verdict.checked == "130 updates, 7 losses, 0 checkpoints; a replay agrees"


@pytest.mark.parametrize("mode", ["async", "sync"])
def test_a_run_that_lost_a_server_has_no_findings(mode: str, tmp_path: Path) -> None:
    machine = Machine(tmp_path / "run", configure(workers=3, durability="log", mode=mode))
    machine.work(30)
    machine.crowd.die(1)
    machine.crowd.join(1)
    machine.restart()
    machine.work(60)
    verdict = verify(read_run(machine.path))
    assert verdict.findings == []
    assert "60 updates, 7 losses, 2 checkpoints; a replay agrees" in verdict.checked


class Reusing(Quadratic):
    """Returns every gradient in the same memory, as a problem may."""

    memory = np.empty(1)

    def gradient(self, x: Array, indices: Indices | None = None) -> Array:
        self.memory[:] = super().gradient(x, indices)
        return self.memory


def test_a_replay_of_means_takes_gradients_that_share_memory(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "run", configure(3, 30, mode="sync"))
    machine.work(30)
    run = read_run(machine.path)
    *_, expected = replay(run, Quadratic())
    *_, last = replay(run, Reusing())
    np.testing.assert_array_equal(last.parameters, expected.parameters)


def test_a_good_run_gets_one_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, printed, errors = asgd(capsys, "verify", run)
    assert (status, errors, printed.count("\n")) == (0, "", 1)
    assert printed.startswith(f"{run}: no faults: 60 updates")


def test_losses_that_were_set_aside_are_mentioned(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "run", configure(durability="log"))
    machine.work(30)
    part = min((machine.path / "loss.parquet").glob("part-*"))
    part.write_bytes(part.read_bytes()[:-20])
    machine.restart()
    machine.work(60)
    verdict = verify(read_run(machine.path))
    assert verdict.findings == []
    assert "1 damaged or missing part of losses named in the events; a replay" in verdict.checked


PLUGIN = """
class Mine:
    dim, n_samples = 2, 4
    def initial_point(self, rng): return [1.0, 2.0]
    def loss(self, x): return float(SIZE * (x @ x))
    def gradient(self, x, indices): return GRADIENT
mine = Mine
"""


def test_a_plugin_is_replayed_where_it_can_be_imported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def write_plugin(size: str, gradient: str) -> None:
        importlib.invalidate_caches()
        monkeypatch.delitem(sys.modules, "replayed_plugin", raising=False)
        text = PLUGIN.replace("SIZE", size).replace("GRADIENT", gradient)
        Path("replayed_plugin.py").write_text(text, encoding="utf-8")
        shutil.rmtree("__pycache__", ignore_errors=True)

    def verified() -> tuple[int, str]:
        status, printed, errors = asgd(capsys, "verify", "run")
        assert (errors, printed.count("\n")) == ("", 1)
        return status, printed

    write_plugin("1", "2 * x")
    problem = {"kind": "replayed_plugin:mine"}
    config = configure(workers=2)
    machine = Machine(
        tmp_path / "run", msgspec.structs.replace(config, problem=ProblemConfig(**problem))
    )
    ProblemRecord.of(machine.crowd.problem, config.run.seed).note(machine.writer)
    machine.work(60)
    assert verified() == (
        0,
        "run: no faults: 60 updates, 7 losses, 1 checkpoints; a replay agrees\n",
    )
    write_plugin("1", "2 * x if x @ x > 4 else 1 / 0")
    status, printed = verified()
    assert status == 0
    assert "; not replayed (the user's code raised after update " in printed
    write_plugin("3", "6 * x")
    status, printed = verified()
    assert status == 1
    assert printed.startswith(
        "run: the problem has changed since the run began: f(x_0) is 15, was 5"
    )
    Path("replayed_plugin.py").unlink()
    monkeypatch.delitem(sys.modules, "replayed_plugin")
    status, printed = verified()
    assert status == 0
    assert "; not replayed (problem.kind = 'replayed_plugin:mine': " in printed


def flip(name: str) -> Damage:
    def damage(run: Path) -> None:
        path = sorted(run.glob(name))[0]
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    return damage


def remove(name: str) -> Damage:
    return lambda run: sorted(run.glob(name))[-1].unlink()


def write(table: str, name: str, value: float) -> Damage:
    """Write a table again, in one part with a valid digest, with one number changed."""

    def damage(run: Path) -> None:
        frame = getattr(read_run(run), "loss" if "loss" in table else table)
        path = sorted(run.glob(f"{table}/part-*"))[0]
        for part in run.glob(f"{table}/part-*"):
            part.unlink()
        columns = {key: column.to_numpy().copy() for key, column in frame.items()}
        columns[name][3] = value
        write_table(path, columns, TABLES[table])

    return damage


def replace(name: str, old: bytes, new: bytes) -> Damage:
    def damage(run: Path) -> None:
        assert old in (run / name).read_bytes()
        (run / name).write_bytes((run / name).read_bytes().replace(old, new, 1))

    return damage


def event(kind: str, **fields: int) -> Damage:
    return lambda run: RunWriter(run).event(kind, **fields)


DAMAGES = {
    "a bit of the trace": (flip("trace/part-*"), "trace/part-000000000000.parquet: cannot be read"),
    "a bit of a loss": (flip("loss.parquet/part-*"), "part-000000000000.parquet: cannot be read"),
    "a bit of a checkpoint": (flip("checkpoints/checkpoint-*"), "its checksum does not match"),
    "the end of the trace": (remove("trace/part-*"), "40 updates, but the finished run made 60"),
    "the end of the losses": (remove("loss.parquet/part-*"), "the loss after update 50 is missing"),
    "the environment": (remove("environment.json"), "environment.json: cannot be read"),
    "the configuration": (
        replace("config.json", b'"learning_rate": 0.05', b'"learning_rate": 0.06'),
        "config.json: has changed since the run began",
    ),
    "the lease": (
        replace("checkpoints/lease", b"0", b"\xff"),
        "lease: is damaged: expected the number",
    ),
    "the profile": (lambda run: (run / "profile.json").write_text("[]"), "expected an object"),
    "the profile's digest": (
        lambda run: (run / "profile.json").write_text("{}"),
        "profile.json: has no digest",
    ),
    "an event's check": (
        replace("events.jsonl", b', "check": ', b', "chalk": '),
        "has no check",
    ),
    "an event": (replace("events.jsonl", b'"finish"', b"finish"), "events.jsonl: line "),
    "a gradient twice": (
        write("trace", "sequence", 9),
        "was applied, discarded or reported twice, or never",
    ),
    "a gradient lost": (event("gradient_lost", worker=0, sequence=99), "or reported twice, or"),
    "a norm": (
        write("trace", "gradient_norm", 0.5),
        "the norm of the gradient of a replay differs: ",
    ),
    "a loss": (write("loss.parquet", "loss", 7.5), "the loss of a replay differs: "),
    "a time": (write("loss.parquet", "seconds", 30.5), "the loss after update 30 has another time"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found(name: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, finding = DAMAGES[name]
    damage(run)
    status, printed, errors = asgd(capsys, "verify", run)
    assert (status, errors) == (1, "")
    assert finding in printed


@pytest.mark.parametrize("name", ["events.jsonl", "profile.json", "prediction.json"])
def test_a_bit_flipped_anywhere_in_a_small_file_is_found(name: str, tmp_path: Path) -> None:
    """Inside a number or a word, the text stays valid JSON, so only its check shows the flip."""
    tables = {"problem": {"kind": "quadratic"}, "run": {"updates": 300}}
    study = Study.open(simulate(make_config(tables), tmp_path / "run"))
    study.fit.save(study.path)
    predict(study.run, models=["sme_sgd"], paths=4).save(study.path)
    path = study.path / name
    content, rng = path.read_bytes(), np.random.default_rng(0)
    assert verify(read_run(study.path), replayed=False).findings == []
    for place in rng.choice(len(content) - 1, size=60, replace=False):
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        assert verify(read_run(study.path), replayed=False).findings, (place, damaged[place])


def test_the_last_state_of_a_simulated_run_is_checked(tmp_path: Path) -> None:
    tables = {"problem": {"kind": "quadratic"}, "run": {"updates": 60}}
    for seed in (0, 1):
        tables["run"]["seed"] = seed
        simulate(make_config(tables), tmp_path / str(seed))
    run = tmp_path / "0"
    assert verify(read_run(run)).findings == []
    shutil.copy(tmp_path / "1" / "parameters.bin", run)
    (finding,) = verify(read_run(run)).findings
    assert finding == f"{run}: after update 60 the parameters of a replay differ"
    flip("parameters.bin")(run)
    (finding,) = verify(read_run(run), replayed=False).findings
    assert finding == f"{run}/parameters.bin: its checksum does not match its content"


def test_parameters_that_differ_from_those_of_a_replay_are_found(run: Path) -> None:
    """The checkpoint is intact, but belongs to another run."""
    other = Machine(run.parent / "other", configure(workers=2))
    other.work(60)
    for path in (other.path / "checkpoints").glob("checkpoint-*"):
        shutil.copy(path, run / "checkpoints")
    (finding,) = verify(read_run(run)).findings
    assert finding.endswith("the parameters of a replay differ")
    assert verify(read_run(run), replayed=False).findings == []
