"""Run directories with damaged files: each command works, or refuses them in one line."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from analysis import fit_run, predict
from analysis.prediction.predict import _COLUMNS, read_prediction
from analysis.report.activity import events_table, workers_table
from asgd.config.make import make_config
from asgd.errors import AsgdError
from asgd.problems.make import make_problem
from asgd.rundir.events import in_words, incidents, team_sizes
from asgd.rundir.problem_record import ProblemRecord, check_problem
from asgd.rundir.reader import describe_state, read_run
from asgd.rundir.repeats import unfinished_repeats
from asgd.rundir.tables import write_table
from asgd.simulation.simulate import simulate
from asgd.stored_json import parse_json
from cluster.team import Team
from tests.asgd.test_cli import asgd
from tests.support.machine import Machine


def unfinished(path: Path) -> None:
    with unfinished_repeats(path):
        pass


def same_problem(path: Path) -> None:
    run = read_run(path)
    check_problem(run, make_problem(run.config), "resume")


ONE = object()  # stands for the path of run `one` in a command
Words = tuple[object, ...]
Changed = Callable[[str, st.DataObject], Path]

HALF = rb'{"event": "failed", "reason": "\ud800", "host": "\ud800", "pid": 1}'
DEEP = b"[" * 100_000 + b"]" * 100_000
HUGE = b"9" * 5000
FILES = (
    "config.json",
    "environment.json",
    "events.jsonl",
    "alive",
    "profile.json",
    "prediction.json",
)
READ: list[Callable[[Path], object]] = [
    lambda path: read_prediction(path).table(),
    lambda path: json.dumps(read_run(path).environment).encode(),
    lambda path: events_table(read_run(path)).to_string().encode(),
    lambda path: workers_table(read_run(path)),
    lambda path: team_sizes(read_run(path).events, 4, 400),
    lambda path: [in_words(event) for event in incidents(read_run(path).events)],
    lambda path: describe_state(read_run(path)),
    lambda path: Team(read_run(path).config, read_run(path).events),
    unfinished,
    same_problem,
]

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**40), 10**40)
    | st.floats()
    | st.text(st.characters(codec=None), max_size=5)  # with unpaired surrogates
    | st.sampled_from(["server_restored", "worker_joined", "finish", "here"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make an interrupted run `one` with profile and prediction, and a finished run `two`."""
    base = tmp_path_factory.mktemp("odd") / "runs"
    every = {"eval_every": 50, "checkpoint_every": 100, "durability": "log"}
    tables = {"problem": {"kind": "quadratic"}, "cluster": {"workers": 2}}
    simulate(make_config(tables | {"run": {"updates": 100}}), base / "two")
    config = make_config(tables | {"run": {"updates": 400, **every}})
    machine = Machine(base / "one", config)
    machine.work(250)
    run = read_run(machine.path)
    ProblemRecord.of(machine.crowd.problem, run.config.run.seed).note(machine.writer)
    fit_run(run).save(run.path)
    predict(run, method="fast").save(run.path)
    events = [
        {"event": "worker_lost", "time": 2.0, "worker": 1, "update": 30, "reason": "killed"},
        {"event": "worker_joined", "time": 3.0, "worker": 1, "update": 40, "transport": "tcp"},
        {"event": "server_restored", "time": 4.0, "to_version": 50, "sequences": {"1": 3}},
        {"event": "workers_changed", "time": 5.0, "after": 2, "workers": [0, 1]},
        {"event": "gradient_lost", "time": 6.0, "worker": 1, "update": 99, "sequence": 77},
        {"event": "interrupted", "time": 7.0},
    ]
    with (base / "one" / "events.jsonl").open("a") as file:
        file.writelines(json.dumps(event) + "\n" for event in events)
    (base / "one" / "alive").write_text(json.dumps({"host": "far", "pid": 1}))
    return base


def check(capsys: pytest.CaptureFixture[str], base: Path) -> None:
    """Assert that fast commands on run `one` succeed, or refuse it in one line.

    Of the slow commands, see `check_whole`, only the functions that read files are called.
    """
    for command, place in (("status", base / "one"), ("runs", base)):
        status, printed, errors = asgd(capsys, command, place)
        assert status in (0, 2), (command, errors)
        assert errors.count("\n") == (status == 2), (command, errors)
    assert status == 0
    assert any("two" in line and "finished" in line for line in printed.splitlines())
    for read in READ:
        with suppress(AsgdError):
            read(base / "one")


# The commands that read each file. `asgd run` stops at the search for Ray; `check_whole` therefore
# resumes the run without Ray too.
PROFILE: Words = ("profile", ONE)
PREDICT: Words = ("predict", ONE, "--method", "fast")
REPORT: Words = ("report", ONE, "--paths", 2)
PLAN: Words = ("plan", ONE, "--workers", 2, "--updates", 20)
VERIFY: Words = ("verify", ONE)
RESUME: Words = ("run", "--resume", ONE, "--address", "127.0.0.1:1")
WHOLE: dict[str, list[Words]] = {
    "config.json": [PROFILE, PREDICT, REPORT, PLAN, VERIFY, RESUME],
    "environment.json": [REPORT, VERIFY],
    "events.jsonl": [PROFILE, PREDICT, REPORT, PLAN, VERIFY, RESUME],
    "alive": [RESUME],
    "profile.json": [PROFILE, REPORT, VERIFY],
    "prediction.json": [REPORT, VERIFY],
}


def check_whole(capsys: pytest.CaptureFixture[str], base: Path, name: str) -> None:
    """Assert that commands that read a file of run `one` succeed, or refuse it in one line."""
    for command in WHOLE[name]:
        words = [base / "one" if word is ONE else word for word in command]
        status, printed, errors = asgd(capsys, *words)
        found = command == VERIFY and status == 1 and printed
        assert found or status in (0, 2), (command, errors)
        assert errors.count("\n") == (status == 2), (command, errors)
    with suppress(AsgdError):
        Machine(base / "one", read_run(base / "one").config, left=True)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"null",
        b'"\\ud800"',
        HALF,
        DEEP,
        b'{"a": ' * 100_000,
        HUGE,
        b'{"event": ' + HUGE + b"}",
    ],
    ids=[
        "empty",
        "list",
        "null",
        "surrogate",
        "surrogate inside",
        "deep",
        "deep tables",
        "huge",
        "huge inside",
    ],
)
def test_commands_survive_other_contents(
    capsys: pytest.CaptureFixture[str], good: Path, tmp_path: Path, name: str, content: bytes
) -> None:
    shutil.copytree(good, tmp_path / "runs")
    (tmp_path / "runs" / "one" / name).write_bytes(content)
    check(capsys, tmp_path / "runs")


@pytest.mark.parametrize(
    "name", [*FILES, "parameters.bin", "loss.parquet/part-000000000000.parquet"]
)
def test_commands_survive_a_file_of_a_terabyte(
    capsys: pytest.CaptureFixture[str], good: Path, tmp_path: Path, name: str
) -> None:
    shutil.copytree(good, tmp_path / "runs")
    place = tmp_path / "runs" / "one"
    (place / name).touch()
    os.truncate(place / name, 2**40)
    status, printed, errors = asgd(capsys, "verify", place)
    assert (status, errors) == (1, "") if name != "config.json" else (2, errors)
    assert name == "alive" or f"{place / name}: " in printed + errors
    check(capsys, tmp_path / "runs")


def test_a_directory_in_the_place_of_the_events_is_named(
    capsys: pytest.CaptureFixture[str], good: Path, tmp_path: Path
) -> None:
    shutil.copytree(good, tmp_path / "runs")
    (tmp_path / "runs" / "one" / "events.jsonl").unlink()
    (tmp_path / "runs" / "one" / "events.jsonl").mkdir()
    status, printed, _ = asgd(capsys, "runs", tmp_path / "runs")
    assert status == 0
    assert "events.jsonl: cannot be read (Is a directory)" in printed


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (DEEP, "nested too deeply"),
        (b"[" * 70 + b"]" * 70, "nested too deeply"),
        (b'{"a": [9223372036854775809]}', "an integer beyond 64 bits"),
        (HALF, "surrogates not allowed"),
    ],
)
def test_json_that_no_run_writes_is_refused(text: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_json(text)
    assert parse_json(b'{"a": [1, 9223372036854775807, 1.5, "x"]}')["a"][1] == 2**63 - 1


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of each value inside a JSON value."""
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    return [path, *(place for key, one in inner for place in places(one, (*path, key)))]


def put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    value[path[0]] = put(value[path[0]], path[1:], new)
    return value


def with_one_other_value(good: Path, base: Path, name: str, data: st.DataObject) -> Path:
    """Copy the runs, and replace one value in a file of run `one`."""
    shutil.copytree(good, base / "runs")
    path = base / "runs" / "one" / name
    lines = path.read_text().splitlines() if name == "events.jsonl" else [path.read_text()]
    number = data.draw(st.integers(0, len(lines) - 1))
    content = json.loads(lines[number])
    for check in ("check", "sha256"):  # a wrong checksum is refused before the text is read
        if isinstance(content.get(check), str):
            del content[check]
    place = data.draw(st.sampled_from(places(content)))
    lines[number] = json.dumps(put(content, place, data.draw(values)))
    path.write_text("\n".join(lines) + "\n")
    return base / "runs"


def drawn(examples: int) -> settings:
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )


@pytest.fixture
def changed(good: Path, tmp_path_factory: pytest.TempPathFactory) -> Changed:
    """Return a function that copies the runs and replaces one value in a file of run `one`."""
    return lambda name, data: with_one_other_value(
        good, tmp_path_factory.mktemp("drawn"), name, data
    )


@pytest.mark.parametrize("name", FILES)
@drawn(12)
@given(data=st.data())
def test_commands_survive_another_value(
    capsys: pytest.CaptureFixture[str], changed: Changed, name: str, data: st.DataObject
) -> None:
    check(capsys, changed(name, data))


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
@drawn(2)
@given(data=st.data())
def test_slow_commands_survive_another_value(
    capsys: pytest.CaptureFixture[str], changed: Changed, name: str, data: st.DataObject
) -> None:
    check_whole(capsys, changed(name, data), name)


@pytest.mark.parametrize(
    "change",
    [
        lambda curves: curves.assign(update=-1),
        lambda curves: curves.assign(loss_mean=np.nan, loss_std=np.nan),
        lambda curves: curves.iloc[:0],
        lambda curves: curves.assign(model="sme_law"),
        lambda curves: curves.iloc[:3],
    ],
)
def test_commands_survive_odd_curves(
    capsys: pytest.CaptureFixture[str], good: Path, tmp_path: Path, change: Any
) -> None:
    shutil.copytree(good, tmp_path / "runs")
    run = tmp_path / "runs" / "one"
    curves: pd.DataFrame = change(read_prediction(run).curves)
    columns = {name: curves[name].to_numpy() for name in _COLUMNS}
    write_table(run / "prediction.parquet", columns, _COLUMNS)
    check(capsys, tmp_path / "runs")
