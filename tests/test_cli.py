"""The command line, in process: what it prints, and the exit status of unusable input."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from asgd.__main__ import main
from asgd.trace import read_run

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

    status, printed, _ = asgd(capsys, "report", out)
    assert status == 0
    page = Path(printed.strip()).read_text(encoding="utf-8")
    assert page.count("<svg") == 3
    loads = re.findall(r"""(?:src|href)=["'](?!#)|url\((?!#)|@import|<script|<link""", page)
    assert loads == []


def test_profile_prints_one_json_object(
    capsys: pytest.CaptureFixture[str], config: Path, tmp_path: Path
) -> None:
    asgd(capsys, "simulate", config, "--out", tmp_path / "run")
    status, printed, _ = asgd(capsys, "profile", tmp_path / "run", "--json")
    assert status == 0
    assert json.loads(printed)["workers"] == 4


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


def test_usage_errors_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert asgd(capsys, "predict")[0] == 2
    assert asgd(capsys, "no-such-command")[0] == 2
    assert asgd(capsys, "--version")[0] == 0
