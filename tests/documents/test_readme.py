"""Documents: their code blocks run, in order, in an empty directory; their links lead somewhere.

Python blocks share one namespace and run as they are. Commands of `asgd` run in this process, on
the configuration that `asgd init` writes, edited to be quick. What takes minutes, or is a command
of another tool, is checked as far as it is cheap, as `NOT_RUN` and `check_command` say; a command
that neither of them knows fails.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import matplotlib
import pytest

from asgd.__main__ import cli, main

ROOT = Path(__file__).parents[2]
PAGES = sorted(path for pattern in ("README.md", "[a-z]*/*.md") for path in ROOT.glob(pattern))
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SAVED = re.compile(r"\n+Saved as `(\w+\.py)`")

# What the reader of this test changes in the starter configuration.
EDITS = {
    'kind = "softmax"': 'kind = "least_squares"',
    "learning_rate = 0.3": "learning_rate = 0.05",
    "updates = 2000": "updates = 200",
}
# Commands of asgd that are parsed only, and why.
NOT_RUN = {
    "demo": "a minute; its parts run here",
    "completion": "writes for a shell",
    "workers": "needs a run at work, as in tests/cluster/test_elastic.py",
}


def blocks(page: Path) -> list[tuple[str, str, str | None]]:
    """Return language and text of each fenced block, and the file it is to be saved as."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        saved = SAVED.match(text, match.end())
        found.append((match[1], match[2], saved[1] if saved else None))
    return found


def commands(block: str) -> list[list[str]]:
    """Return the words of each command, without comments."""
    lines = block.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def run_asgd(words: list[str]) -> None:
    """Run a command of asgd, or parse it only."""
    if words[0] in NOT_RUN:
        cli.commands[words[0]].make_context(words[0], words[1:])
        return
    status = 0
    try:
        main(words)
    except SystemExit as ended:
        status = int(ended.code or 0)
    assert status == 0, f"asgd {shlex.join(words)}"
    if words[0] == "init":
        starter = Path(words[1])
        text = starter.read_text(encoding="utf-8")
        for old, new in EDITS.items():
            assert old in text
            text = text.replace(old, new)
        starter.write_text(text, encoding="utf-8")


def check_command(words: list[str]) -> None:
    """Check what another program is asked to do: its file is there and takes these options."""
    program, arguments = Path(words[0]).name, words[1:]
    if words[0].startswith("scripts/"):
        assert os.access(ROOT / words[0], os.X_OK), words[0]
        subprocess.run(["sh", "-n", str(ROOT / words[0])], check=True)
    elif program == "pip":
        extra = re.search(r"\[(\w+)\]", arguments[-1])
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        assert extra is None or extra[1] in project["optional-dependencies"]
    elif program == "python" and arguments[:2] == ["-m", "pytest"]:
        assert all((ROOT / name).exists() for name in arguments[2:] if name[0] != "-")
    elif program == "python":
        usage = subprocess.run(
            [sys.executable, str(ROOT / arguments[0]), "--help"],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        )
        for option in arguments[1:]:
            assert not option.startswith("-") or option in usage.stdout, shlex.join(words)
    elif program in ("ray", "kubectl"):
        # Their files are checked by tests/documents/test_deploy.py; a command of ours is parsed.
        assert all((ROOT / name).exists() for name in arguments if name.endswith(".yaml"))
        for ours in (shlex.split(name) for name in arguments if name.startswith("asgd ")):
            cli.commands[ours[1]].make_context(ours[1], ours[2:])
    else:
        raise AssertionError(f"{shlex.join(words)}: say here how it is checked")


@pytest.mark.usefixtures("shared_ray")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_blocks_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    matplotlib.use("agg")
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    checked, names = set(), {}
    for language, text, saved in blocks(page):
        if saved is not None:
            Path(saved).write_text(text, encoding="utf-8")
            monkeypatch.delitem(sys.modules, Path(saved).stem, raising=False)
        if language == "python":
            exec(compile(text, f"{page.name}", "exec"), names)
        for words in commands(text) if language == "sh" else ():
            if Path(words[0]).name == "asgd":
                run_asgd(words[1:])
            elif tuple(words[:2]) not in checked:
                checked.add(tuple(words[:2]))
                check_command(words)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([\w./-]+)\)", text):
        assert (page.parent / target).exists(), target


def test_files_named_in_the_map_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    folder = ROOT
    for row in re.findall(r"^\| (.*?) \|", text[text.index("## Files") :], re.MULTILINE):
        names = re.findall(r"`([\w./]+)`", row)
        if row.startswith("**"):
            folder = ROOT / names[0]
            continue
        if not names:
            break
        for name in names:
            assert (folder / name).exists(), f"{folder.name}/{name}"
