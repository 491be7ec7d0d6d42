"""The command line: what it prints, and its exit status for unusable input."""

import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from asgd.__main__ import cli, main
from asgd.config.make import make_config
from asgd.rundir.alive import heartbeat
from asgd.rundir.reader import read_run
from asgd.rundir.writer import RunWriter

CONFIG = """
[problem]
kind = "quadratic"

[cluster]
workers = 4
schedule = "uniform"

[run]
updates = 800
eval_every = 20
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(CONFIG, encoding="utf-8")
    return path


def asgd(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Run the command line; return exit status, standard output and standard error."""
    status = 0
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as request:
        status = int(request.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_simulate_profile_predict_report(
    capsys: pytest.CaptureFixture[str], config: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    status, printed, errors = asgd(capsys, "simulate", config, "--out", out)
    assert (status, printed.strip(), errors) == (0, str(out), "")
    assert read_run(out).state == "finished"

    status, printed, _ = asgd(capsys, "profile", out)
    assert status == 0
    assert "The geometric law holds" in printed
    assert json.loads((out / "profile.json").read_text())["grade"] == "holds"

    status, printed, _ = asgd(capsys, "predict", out, "--paths", 50, "--json")
    assert status == 0
    assert json.loads(printed)["scores"]["sme_law"]["relative_error"] < 1.0

    figures = tmp_path / "figures"
    status, printed, _ = asgd(capsys, "report", out, "--figures", figures)
    assert status == 0
    page = Path(printed.strip()).read_text(encoding="utf-8")
    assert page.count("<figure") == len(list(figures.glob("*.svg"))) > 5


def test_predict_gives_intervals_over_repeats(
    capsys: pytest.CaptureFixture[str], config: Path, tmp_path: Path
) -> None:
    short = ("--set", "run.repeats=8", "--set", "run.updates=100")
    asgd(capsys, "simulate", config, "--out", tmp_path / "eight", *short)
    asgd(capsys, "simulate", config, "--out", tmp_path / "one", *short[2:])
    status, printed, _ = asgd(capsys, "predict", tmp_path / "eight", "--json")
    assert status == 0
    scores = json.loads(printed)["scores"]["sme_law"]
    for error in ("relative_error", "coverage", "crps"):
        assert scores[f"{error}_low"] <= scores[error] <= scores[f"{error}_high"]
    _, printed, _ = asgd(capsys, "predict", tmp_path / "eight")
    assert "95 % intervals over 8 repeats" in printed
    _, printed, _ = asgd(capsys, "predict", tmp_path / "one")
    assert "interval" not in printed


def test_profile_puts_several_runs_side_by_side(
    capsys: pytest.CaptureFixture[str], config: Path, tmp_path: Path
) -> None:
    places = [tmp_path / f"p{workers}" for workers in (2, 4)]
    for workers, place in zip((2, 4), places, strict=True):
        asgd(capsys, "simulate", config, "--out", place, "--set", f"cluster.workers={workers}")
    status, printed, _ = asgd(capsys, "profile", *places)
    assert status == 0
    heads, _, *rows = printed.splitlines()[-4:]
    at = heads.split().index("mu_expected") + 1  # the column of run names has no head
    assert [row.split()[0] for row in rows] == [str(place) for place in places]
    assert [row.split()[at] for row in rows] == ["0.5", "0.75"]


@pytest.mark.slow
def test_output_of_a_problem_goes_to_standard_error(
    capsys: pytest.CaptureFixture[str], config: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    problem = (
        "--set",
        "problem.kind=tests.support.plugins:bowl",
        "--set",
        "problem.options.fault=print",
    )
    status, printed, errors = asgd(capsys, "simulate", config, *problem, "--out", out)
    assert (status, printed) == (0, f"{out}\n")
    assert "printed by the problem" in errors
    for command in (("predict", out, "--paths", 4), ("plan", out / "config.json")):
        status, printed, errors = asgd(capsys, *command, "--json")
        assert (status, printed.count("\n")) == (0, 1)
        assert isinstance(json.loads(printed), dict)
        assert "printed by the problem" in errors


def test_profile_prints_one_json_object(
    capsys: pytest.CaptureFixture[str], config: Path, tmp_path: Path
) -> None:
    asgd(capsys, "simulate", config, "--out", tmp_path / "run")
    status, printed, _ = asgd(capsys, "profile", tmp_path / "run", "--json")
    assert status == 0
    assert json.loads(printed)["workers"] == 4
    assert json.loads(printed)["queue"] is None
    both = (tmp_path / "run", tmp_path / "run")
    status, printed, _ = asgd(capsys, "profile", *both, "--json")
    assert status == 0
    assert [found["run"] for found in json.loads(printed)["runs"]] == [str(path) for path in both]


def test_profile_says_whether_workers_wait_for_one_another(
    capsys: pytest.CaptureFixture[str], config: Path, tmp_path: Path
) -> None:
    free = ("--set", "cluster.schedule=free", "--set", "run.updates=400")
    asgd(capsys, "simulate", config, "--out", tmp_path / "run", *free)
    status, printed, _ = asgd(capsys, "profile", tmp_path / "run")
    assert status == 0
    assert "Independent cycles explain the staleness: distance 0.0" in printed
    status, printed, _ = asgd(capsys, "profile", tmp_path / "run", "--json")
    assert json.loads(printed)["queue"]["holds"] is True


def test_predict_by_the_fast_method(
    capsys: pytest.CaptureFixture[str], config: Path, tmp_path: Path
) -> None:
    asgd(capsys, "simulate", config, "--out", tmp_path / "run")
    options = ("--method", "fast", "--seed", 5, "--json")
    status, printed, _ = asgd(capsys, "predict", tmp_path / "run", *options)
    found = json.loads(printed)
    assert (status, found["method"], found["seed"]) == (0, "fast", 5)
    assert "replay" not in found["models"]
    status, _, errors = asgd(capsys, "predict", tmp_path / "run", "--method", "slow")
    assert status == 2
    assert "'auto', 'simulate', 'fast'" in errors


def test_hostile_names_and_reasons_are_shown_escaped(
    capsys: pytest.CaptureFixture[str], config: Path, tmp_path: Path
) -> None:
    out = tmp_path / os.fsdecode(b"a\x1b[2J\xe9\nb")
    asgd(capsys, "simulate", config, "--out", tmp_path / "plain")
    (tmp_path / "plain").rename(out)
    RunWriter(out).event("failed", reason="no \x1b[31mreason\nat all")
    RunWriter(out).event("worker_lost", worker=1, reason="later")
    (out / "profile.json").write_text("[]", encoding="utf-8")
    status, printed, _ = asgd(capsys, "runs", tmp_path)
    assert status == 0
    assert r"a\x1b[2J\xe9\x0ab" in printed
    assert printed.count("\n") == 2
    status, printed, _ = asgd(capsys, "status", out)
    assert status == 0
    assert r"failed: no \x1b[31mreason\x0aat all" in printed
    status, _, errors = asgd(capsys, "profile", tmp_path / "no\x1b[2Jrun\n")
    assert (status, errors.count("\n")) == (2, 1)
    assert "\x1b" not in errors


def test_resolved_configuration_of_a_run_reruns_it(
    capsys: pytest.CaptureFixture[str], config: Path, tmp_path: Path
) -> None:
    asgd(capsys, "simulate", config, "--out", tmp_path / "one", "--set", "run.seed=5")
    status, _, _ = asgd(
        capsys, "simulate", tmp_path / "one" / "config.json", "--out", tmp_path / "two"
    )
    assert status == 0
    one, two = read_run(tmp_path / "one"), read_run(tmp_path / "two")
    assert one.trace.equals(two.trace)
    assert one.loss.equals(two.loss)


@pytest.mark.parametrize("command", ["run", "simulate"])
@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("optimizer.learning_rate=-1", ("optimizer.learning_rate", "-1", "> 0")),
        ("cluster.workers=0", ("cluster.workers", "0", ">= 1")),
        ("cluster.worker=3", ("cluster.worker", "workers")),
        ("problem.kind=resnet", ("resnet", "softmax")),
        ("problem.kind=no_such_module:factory", ("no_such_module",)),
    ],
)
def test_unusable_configurations_exit_with_2_and_write_nothing(
    capsys: pytest.CaptureFixture[str],
    config: Path,
    tmp_path: Path,
    command: str,
    override: str,
    parts: tuple[str, ...],
) -> None:
    out = tmp_path / "run"
    status, printed, errors = asgd(capsys, command, config, "--set", override, "--out", out)
    assert status == 2
    assert printed == ""
    assert errors.count("\n") == 1
    for part in parts:
        assert part in errors
    assert not out.exists()


def test_missing_files_and_directories_exit_with_2(
    capsys: pytest.CaptureFixture[str], config: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    for arguments in (
        ("run", tmp_path / "nowhere.toml"),
        ("simulate", config, "--out", tmp_path / "file" / "run"),
        ("run", config, "--out", tmp_path / "file" / "run"),
        ("profile", tmp_path),
        ("predict", tmp_path / "nowhere"),
        ("report", tmp_path),
    ):
        status, printed, errors = asgd(capsys, *arguments)
        assert (status, printed) == (2, "")
        assert errors.count("\n") == 1
        assert "Traceback" not in errors


def test_a_run_too_short_to_fit_exits_with_2(
    capsys: pytest.CaptureFixture[str], config: Path, tmp_path: Path
) -> None:
    asgd(capsys, "simulate", config, "--out", tmp_path / "run", "--set", "run.updates=30")
    status, _, errors = asgd(capsys, "profile", tmp_path / "run")
    assert status == 2
    assert "expected at least" in errors


def test_help_imports_nothing_heavy() -> None:
    heavy = {"ray", "scipy", "matplotlib", "pandas", "sklearn", "numpy"}
    code = (
        "import sys\nfrom asgd.__main__ import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        f"print(sorted({heavy!r} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == "[]"
    assert "simulate" in done.stdout


@pytest.mark.slow
def test_a_report_needs_no_home_directory_and_prints_no_warning(
    capsys: pytest.CaptureFixture[str], config: Path, tmp_path: Path
) -> None:
    run = asgd(capsys, "simulate", config, "--out", tmp_path / "run")[1].strip()
    environment = {**os.environ, "HOME": "/dev/null", "TMPDIR": str(tmp_path)}
    for place in ("MPLCONFIGDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        environment.pop(place, None)
    done = subprocess.run(
        [sys.executable, "-m", "asgd", "report", run, "--paths", "8"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stderr == ""


def test_other_warnings_of_matplotlib_are_shown(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    asgd(capsys, "--help")
    logger = logging.getLogger("matplotlib")
    logger.warning("mkdir -p failed for path %s: %s", "/dev/null", "no directory")
    logger.warning("Bad value in file %r", "matplotlibrc")
    assert caplog.messages == ["Bad value in file 'matplotlibrc'"]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("predict",), "asgd predict --help"),
        (("predcit", "runs/x"), "did you mean predict?"),
        (("no-such-command",), "expected init, run"),
        (("predict", "x", "--path", "3"), "--paths"),
        (("predict", "x", "--paths", "1"), "2<=x<="),
        (("completion", "csh"), "'bash', 'zsh', 'fish'"),
        (("--versoin",), "Did you mean '--version'? `asgd --help`"),
        (("simulate", "nowhere.toml"), "nowhere.toml: no such file; `asgd init` writes"),
        (("plan", "nowhere"), "nowhere: no such file; `asgd init` writes"),
    ],
)
def test_usage_errors_exit_with_2_and_name_the_remedy(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], part: str
) -> None:
    status, printed, errors = asgd(capsys, *arguments)
    assert (status, printed) == (2, "")
    assert part in errors
    assert errors.count("\n") == 1


def test_every_command_has_help_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    status, overview, _ = asgd(capsys, "--help")
    assert status == 0
    for name in cli.commands:
        assert re.search(rf"^  {name} ", overview, re.MULTILINE)
        status, text, _ = asgd(capsys, name, "--help")
        assert status == 0
        assert re.search(rf"^  .*asgd {name}\b", text.split("Options:")[0], re.MULTILINE)
    assert asgd(capsys, "--version")[0] == 0


def test_starter_configuration_is_the_default_and_every_key_in_it_works(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "new" / "first.toml"
    assert asgd(capsys, "init", path) == (0, f"{path}\n", "")
    text = path.read_text(encoding="utf-8")
    data = tomllib.loads(text)
    uncommented = re.sub(r"^# (?=[a-z_]+ = )", "", text, flags=re.MULTILINE)
    assert len(tomllib.loads(uncommented)["cluster"]) > len(data["cluster"])
    everything = tomllib.loads(uncommented)
    assert everything["problem"].pop("options") == {}
    assert make_config(everything) == make_config(data)
    status, _, errors = asgd(capsys, "init", path)
    assert status == 2
    assert "exists" in errors


def test_runs_and_status(capsys: pytest.CaptureFixture[str], config: Path, tmp_path: Path) -> None:
    asgd(capsys, "simulate", config, "--out", tmp_path / "runs" / "one")
    asgd(capsys, "simulate", config, "--out", tmp_path / "runs" / "two", "--set", "run.repeats=2")
    broken = tmp_path / "runs" / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{", encoding="utf-8")
    (broken / "events.jsonl").write_text("", encoding="utf-8")
    status, printed, _ = asgd(capsys, "runs", tmp_path / "runs", "--json")
    assert status == 0
    found = json.loads(printed)["runs"]
    states = {Path(row["run"]).name: row["state"] for row in found}
    assert states == {
        "broken": "unreadable",
        "one": "finished",
        "repeat-000": "finished",
        "repeat-001": "finished",
    }
    trace = read_run(tmp_path / "runs" / "one").trace
    row = next(row for row in found if row["run"].endswith("one"))
    assert (row["updates"], row["of"], row["workers"]) == (800, 800, 4)
    assert row["mean_staleness"] == pytest.approx(trace["staleness"].mean())

    status, printed, _ = asgd(capsys, "runs", tmp_path / "runs")
    assert status == 0
    assert len(printed.splitlines()) == 6
    assert f"{broken}/config.json: not a valid configuration file" in printed.splitlines()[-1]

    RunWriter(tmp_path / "runs" / "one").event("worker_lost", worker=2)
    status, printed, _ = asgd(capsys, "status", tmp_path / "runs" / "one")
    assert status == 0
    assert "800 of 800" in printed
    assert "worker lost: worker 2" in printed
    status, printed, _ = asgd(capsys, "status", tmp_path / "runs" / "one", "--json")
    assert sum(json.loads(printed)["by_worker"].values()) == 800


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script(capsys: pytest.CaptureFixture[str], shell: str) -> None:
    status, printed, errors = asgd(capsys, "completion", shell)
    assert (status, errors) == (0, "")
    assert "_ASGD_COMPLETE" in printed


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("environment.json", None),
        ("environment.json", b""),
        ("events.jsonl", b'\xff\n{"event": "finish"}\n'),
        ("events.jsonl", b'3\n{"event": "finish"}\n'),
        ("trace/part-000000000000.parquet", None),
    ],
)
def test_damaged_runs_are_refused_in_one_line(
    capsys: pytest.CaptureFixture[str],
    config: Path,
    tmp_path: Path,
    name: str,
    damage: bytes | None,
) -> None:
    out = tmp_path / "run"
    asgd(capsys, "simulate", config, "--out", out)
    asgd(capsys, "predict", out, "--paths", 4)
    if damage is None:
        (out / name).unlink()
    else:
        (out / name).write_bytes(damage)
    status, _, errors = asgd(capsys, "report", out)
    assert status == 2
    assert errors.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("damage", [b"[]", b"{}"])
def test_a_report_replaces_a_damaged_prediction(
    capsys: pytest.CaptureFixture[str], config: Path, tmp_path: Path, damage: bytes
) -> None:
    out = tmp_path / "run"
    asgd(capsys, "simulate", config, "--out", out)
    asgd(capsys, "predict", out, "--paths", 4)
    stored = json.loads((out / "prediction.json").read_bytes())
    (out / "prediction.json").write_bytes(damage)
    assert asgd(capsys, "report", out, "--paths", 4)[0] == 0
    assert json.loads((out / "prediction.json").read_bytes()) == stored


def test_the_first_missing_update_is_named(
    capsys: pytest.CaptureFixture[str], config: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    asgd(capsys, "simulate", config, "--out", out)
    trace = read_run(out).trace
    RunWriter(out).trace({name: trace[name].to_numpy()[:100] for name in trace})
    RunWriter(out).trace({name: trace[name].to_numpy()[200:] for name in trace})
    status, _, errors = asgd(capsys, "profile", out)
    assert status == 2
    assert "update 100 is missing" in errors


def test_a_directory_with_the_name_of_a_temporary_file_is_named(
    capsys: pytest.CaptureFixture[str], config: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    asgd(capsys, "simulate", config, "--out", out)
    (out / ".profile.json.tmp").mkdir()
    status, _, errors = asgd(capsys, "profile", out)
    assert status == 2
    assert ".profile.json.tmp" in errors


def test_a_problem_that_raises_later_fails_the_simulation(
    capsys: pytest.CaptureFixture[str], config: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    plain = tmp_path / "plain.toml"
    plain.write_text(
        '[problem]\nkind = "tests.support.plugins:bowl"\noptions = { fault = "raise" }\n'
    )
    status, _, errors = asgd(capsys, "simulate", plain, "--out", out)
    assert status == 1
    assert "ZeroDivisionError" in errors
    assert errors.count("\n") == 1
    assert read_run(out).state == "failed"


def test_plan_marks_the_fastest_choice(
    capsys: pytest.CaptureFixture[str], config: Path, tmp_path: Path
) -> None:
    options = ("--workers", "1,2", "--learning-rate", "0.02,9", "--updates", 60)
    status, printed, errors = asgd(capsys, "plan", config, *options)
    assert (status, errors) == (0, "")
    assert printed.count("\n*") == 1
    assert printed.count("unstable") == 2
    assert "Best: " in printed
    status, printed, _ = asgd(capsys, "plan", config, *options, "--json")
    found = json.loads(printed)
    assert status == 0
    assert found["rows"][found["best"]]["stable"] is True
    assert [row["workers"] for row in found["rows"]] == [1, 1, 2, 2]

    asgd(capsys, "simulate", config, "--out", tmp_path / "run")
    free = ("--set", "cluster.schedule=free", "--set", "run.updates=100")
    asgd(capsys, "simulate", config, "--out", tmp_path / "free", *free)
    status, printed, _ = asgd(capsys, "plan", tmp_path / "free", "--workers", 2)
    assert status == 0
    assert f"the cycles measured in {tmp_path / 'free'}" in printed
    assert "repeats" not in printed
    twice = ("--set", "run.repeats=2")
    asgd(capsys, "simulate", config, "--out", tmp_path / "twice", *free, *twice)
    status, printed, _ = asgd(capsys, "plan", tmp_path / "twice", "--workers", 2)
    assert status == 0
    assert "Only the first of 2 repeats was used." in printed
    for arguments, part in (
        ((tmp_path / "run",), "wait for each other"),
        (
            (tmp_path / "free", "--set", "run.updates=1"),
            "--set run.updates=1: expected a configuration",
        ),
        ((config, "--workers", "1,,2"), "expected numbers such as 2,4,8"),
        ((config, "--learning-rate", "-1"), "learning_rate = -1.0: expected"),
        ((tmp_path / "nowhere",), "no such file"),
    ):
        status, _, errors = asgd(capsys, "plan", *arguments)
        assert status == 2
        assert part in errors
        assert errors.count("\n") == 1


def test_status_tells_a_dead_run_from_a_live_one(
    capsys: pytest.CaptureFixture[str], config: Path, tmp_path: Path
) -> None:
    out = tmp_path / "runs" / "one"
    asgd(capsys, "simulate", config, "--out", out)
    events = out / "events.jsonl"
    events.write_text(events.read_text(encoding="utf-8").splitlines()[0] + "\n", encoding="utf-8")

    def state() -> tuple[str, str]:
        found = json.loads(asgd(capsys, "status", out, "--json")[1])
        (row,) = json.loads(asgd(capsys, "runs", out.parent, "--json")[1])["runs"]
        assert (row["state"], row["detail"][:20]) == (found["state"], found["detail"][:20])
        return found["state"], found["detail"]

    assert state() == ("unfinished", "there is no heartbeat")
    with heartbeat(out):
        name, detail = state()
        assert name == "running"
        assert f"process {os.getpid()} on " in detail
        sign = json.loads((out / "alive").read_text(encoding="utf-8"))
    (out / "alive").write_text(json.dumps({**sign, "pid": 1}), encoding="utf-8")
    name, detail = state()
    assert name == "stopped"
    assert "the process ended without a message" in detail
    (out / "alive").write_text(json.dumps({"host": "far-away", "pid": 1}), encoding="utf-8")
    name, detail = state()
    assert name == "running"
    assert "this host cannot tell more" in detail
    os.utime(out / "alive", (0.0, 0.0))
    assert state()[0] == "unknown"
    RunWriter(out).event("failed", reason="no power")
    assert state() == ("failed", "no power")


def test_the_message_of_a_diverged_run_names_a_stable_learning_rate(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path, out = tmp_path / "wild.toml", tmp_path / "run"
    path.write_text(
        '[problem]\nkind = "least_squares"\n[optimizer]\nlearning_rate = 2.0\n'
        "[run]\nupdates = 300\n",
        encoding="utf-8",
    )
    status, _, errors = asgd(capsys, "simulate", path, "--out", out)
    assert status == 1
    assert errors.count("\n") == 1
    assert errors.startswith("asgd: the run diverged: loss ")
    limit = re.search(r"the largest stable learning rate is (0\.\d+), and single runs", errors)
    assert limit is not None
    stable = str(float(limit[1]) / 2)
    halved = ("--set", f"optimizer.learning_rate={stable}")
    assert asgd(capsys, "simulate", path, "--out", tmp_path / "calm", *halved)[0] == 0
    status, printed, _ = asgd(capsys, "report", out)
    assert status == 0
    page = Path(printed.strip()).read_text(encoding="utf-8")
    assert f"is {limit[1]}" in page


def test_no_command_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    status, printed, errors = asgd(capsys)
    assert (status, printed) == (2, "")
    assert errors.startswith("Usage: asgd ")


def test_a_closed_standard_output_ends_the_command_silently(tmp_path: Path) -> None:
    code = "import sys; from asgd.__main__ import main; sys.stdin.read(); main(['--help'])"
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == b""
        assert process.wait() == 1


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("optimizer=3", "optimizer is a table with the keys rule, learning_rate"),
        ("workers=3", "did you mean cluster.workers?"),
        ("run.updates", "--set run.updates: expected table.key=value\n"),
        ("problem.kind=:x", '"package.module:factory"'),
        ("cluster.workers=100000000", "<= 100000"),
    ],
)
def test_a_refused_override_names_the_remedy(
    capsys: pytest.CaptureFixture[str], config: Path, override: str, part: str
) -> None:
    status, _, errors = asgd(capsys, "simulate", config, "--set", override)
    assert status == 2
    assert part in errors
    assert "frozen" not in errors
    assert errors.count("\n") == 1


@contextmanager
def no_rights() -> Iterator[None]:
    """Run the block as another user, without write permission, if root runs the tests."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.slow
def test_a_report_on_a_run_of_another_user_goes_to_another_directory(
    capsys: pytest.CaptureFixture[str], config: Path, tmp_path: Path
) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as shared:  # only the owner can read pytest's
        out = Path(shared, "run")
        asgd(capsys, "simulate", config, "--out", out, "--set", "run.updates=300")
        asgd(capsys, "report", out, "--paths", 4, "-o", tmp_path / "all-is-imported.html")
        for stored in ("profile.json", "prediction.json", "prediction.parquet"):
            (out / stored).unlink()
        own = Path(shared, "own")
        own.mkdir()
        for path, mode in ((Path(shared), 0o755), (own, 0o777), (out, 0o555)):
            path.chmod(mode)
        with no_rights():
            status, printed, errors = asgd(capsys, "profile", out)
            assert (status, printed, errors.count("\n")) == (2, "", 1)
            assert f"{out}/profile.json: cannot be written" in errors
            assert "copy it to where you may write" in errors
            status, printed, errors = asgd(capsys, "report", out, "-o", own / "page.html")
            assert (status, printed, errors) == (0, f"{own}/page.html\n", "")
        assert "copy it to where you may write" in (own / "page.html").read_text("utf-8")
        (out / "trace").chmod(0)
        with no_rights():
            status, _, errors = asgd(capsys, "profile", out)
        assert (status, errors) == (2, f"asgd: {out}/trace: cannot be read (Permission denied)\n")
        for path in (out, out / "trace"):
            path.chmod(0o755)
