"""Every command of this project in a document or in the log is still valid.

Nothing runs. The file must exist, the command of `asgd` must have the options, the script must
contain the options, and a test must match the word after `-k`.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from asgd.__main__ import cli
from tests.support.documents import ROOT, pages

TICKED = re.compile(r"`([^`]+)`")
FENCE = re.compile(r"^```(?:sh)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FOLDERS = "tests|scripts|asgd(?!/scripts/)|cluster|analysis"  # a clone on a cluster is called asgd
PATH = re.compile(rf"(?<![\w./-])(?:{FOLDERS})/[\w./-]+\.(?:py|toml|md|yaml)")
TEST = re.compile(r"`(test_\w+)`")
STARTS = re.compile(
    r"(?:\.venv/bin/python |(?:\.venv/bin/)?asgd |pytest |scripts/|tests/|bench_\w+(?:\.py)? )"
)
EVERY_TEST = {file: file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("*.py")}


def commands(page: Path) -> list[str]:
    """Return the commands of this project in the text and in the shell blocks of a page."""
    text = page.read_text(encoding="utf-8")
    lines = "\n".join(FENCE.findall(text)).replace("\\\n", " ").splitlines()
    for line in lines:
        if "'asgd " in line:
            lines.append(line.split("'")[1])
    ticked = (" ".join(match.split()) for match in TICKED.findall(FENCE.sub("", text)))
    parts = [part.strip() for line in (*lines, *ticked) for part in line.split(" && ")]
    found = [re.sub(r"^[A-Z]+=\S+ ", "", part) for part in parts]
    return [line for line in found if STARTS.match(line)]


def wrong_with_asgd(words: list[str]) -> str | None:
    """Return what is wrong with the words after `asgd`."""
    name = next((word for word in words if not word.startswith("-")), None)
    command: click.Command = cli
    if name in cli.commands:
        command = cli.commands[name]
    elif name is not None and name not in ("COMMAND", "..."):
        return f"no command {name}"
    context = click.Context(command, help_option_names=["-h", "--help"])
    known = {option for each in command.get_params(context) for option in each.opts}
    known |= {option for each in command.get_params(context) for option in each.secondary_opts}
    options = {word.split("=")[0] for word in words if word.startswith("-")}
    return f"no option {options - known}" if options - known else None


def wrong_with_tests(words: list[str]) -> str | None:
    """Return what is wrong with the words after `pytest` or `scripts/test`."""
    files = [ROOT / word for word in words if word.startswith("tests/")]
    missing = [file for file in files if not file.exists()]
    if missing:
        return f"no file {missing}"
    if "-k" in words:
        word = words[words.index("-k") + 1]
        texts = [EVERY_TEST[file] for file in files or EVERY_TEST]
        if not any(re.search(rf"(?:def test_|\btest_)\w*{word}", text) for text in texts):
            return f"no test of {word}"
    return None


def wrong_with_script(words: list[str]) -> str | None:
    """Return what is wrong with a script and its arguments."""
    script = ROOT / words[0]
    if not script.exists():
        return f"no file {words[0]}"
    text = "" if script.is_dir() else script.read_bytes().decode("utf-8", "replace")
    options = {word.split("=")[0] for word in words[1:] if word.startswith("--")}
    unknown = {option for option in options if option not in text}
    return f"{words[0]} has no option {unknown}" if unknown else None


def wrong_with(command: str) -> str | None:
    """Return what is wrong with a command; None if it is valid."""
    words = shlex.split(command, comments=True)
    program = words[0].removeprefix(".venv/bin/")
    if program == "asgd":
        return wrong_with_asgd(words[1:])
    if program == "python" and words[1] == "-c":
        return None
    if program == "python":
        words = words[1:]
        if words[0] == "-m" and words[1] != "pytest":
            words = [words[1].replace(".", "/") + ".py", *words[2:]]
        elif words[0] == "-m":
            program, words = "pytest", words[1:]
    if program == "pytest" or words[0] == "scripts/test":
        return wrong_with_tests(words[1:])
    if program.startswith("bench_"):
        words[0] = f"scripts/{program.removesuffix('.py')}.py"
    if "*" in words[0]:
        return None if any(ROOT.glob(words[0])) else f"no file {words[0]}"
    return wrong_with_script(words)


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_valid(page: Path) -> None:
    wrong = {command: wrong_with(command) for command in commands(page)}
    assert {command: why for command, why in wrong.items() if why} == {}


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_named_files_and_tests_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    files = {name for name in PATH.findall(text) if not (ROOT / name).exists()}
    files -= {name for name in files if (page.parent / name).exists()}
    tests = {
        name
        for name in TEST.findall(text)
        if not any(f"def {name}(" in each for each in EVERY_TEST.values())
    }
    assert (files, tests) == (set(), set())


def test_an_invalid_command_is_found() -> None:
    assert wrong_with("asgd train run.toml") == "no command train"
    assert wrong_with("asgd predict runs/x --speed 3") == "no option {'--speed'}"
    assert wrong_with("scripts/bench_server.py --fulll")
    assert wrong_with("scripts/test tests/test_x.py")
    assert wrong_with("pytest tests/analysis/test_limits.py -k nonsense")
    assert wrong_with(".venv/bin/python -m scripts.bench_nothing")
