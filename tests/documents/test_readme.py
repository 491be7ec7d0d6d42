"""Documents: their code blocks run in order in an empty directory, and their links have targets.

Python blocks of a page share one namespace and run as they are. Commands of `asgd` run in this
process, with few paths, on the configuration that `asgd init` writes, edited to be quick. Slow
commands and commands of other tools are only checked, see `NOT_RUN` and `check_command`; any other
command fails the test.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import matplotlib
import msgspec
import pytest

from asgd.__main__ import cli, main
from asgd.config.make import make_config
from asgd.config.tables import RunConfig
from asgd.records.columns import RECORD_TABLES
from asgd.rundir.columns import COUNT_COLUMNS, COUNTS, TABLES
from tests.support.documents import ROOT, anchors, links, pages

PAGES = pages()
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SAVED = re.compile(r"\n+Saved as `(\w+\.py)`")

# Changes of the starter configuration and options of commands, so that the test is quick.
EDITS = {
    'kind = "softmax"': 'kind = "quadratic"',
    "learning_rate = 0.3": "learning_rate = 0.05",
    "updates = 2000": "updates = 200",
}
FEWER = {"predict": ["--paths", "8"], "report": ["--paths", "8"]}
# Commands of asgd that are only parsed, and why.
NOT_RUN = {
    "demo": "a minute; its parts run here",
    "completion": "writes for a shell",
    "workers": "needs an unfinished run, as in tests/cluster/test_elastic.py",
}


def blocks(page: Path) -> list[tuple[str, str, str | None]]:
    """Return language and text of each fenced block, and the name of the file to save it as."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        saved = SAVED.match(text, match.end())
        found.append((match[1], match[2], saved[1] if saved else None))
    return found


def with_blocks() -> list[object]:
    """Return the pages that have blocks; those that start real processes are marked."""
    found: list[object] = []
    for page in PAGES:
        text = "".join(text for _, text, _ in blocks(page))
        if "import torch" in text and find_spec("torch") is None:
            skipped = pytest.mark.skip("PyTorch is not installed")
            found.append(pytest.param(page, False, marks=skipped, id=str(page.relative_to(ROOT))))
            continue
        real = "asgd run " in text or "cluster.run(" in text
        marks = [pytest.mark.ray] if real else []
        if text:
            found.append(pytest.param(page, real, marks=marks, id=str(page.relative_to(ROOT))))
    return found


def commands(block: str) -> list[list[str]]:
    """Return the words of each command, without comments."""
    lines = block.replace("\\\n", " ").replace(" && ", "\n").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def run_asgd(words: list[str]) -> None:
    """Run a command of asgd, or only parse it."""
    if words[0] in NOT_RUN or "--address" in words:  # a cluster: tests/cluster/test_hosts.py
        cli.commands[words[0]].make_context(words[0], words[1:])
        return
    status = 0
    try:
        main(words + FEWER.get(words[0], []))
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
    """Check a command of another program without running it, by the files and options it names."""
    program, arguments = Path(words[0]).name, words[1:]
    if words[0].startswith("scripts/"):
        assert os.access(ROOT / words[0], os.X_OK), words[0]
        subprocess.run(["sh", "-n", str(ROOT / words[0])], check=True)
    elif program == "pip":
        extras = re.findall(r"\w+", "".join(re.findall(r"\[(.*)\]", arguments[-1])))
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        assert set(extras) <= set(project["optional-dependencies"])
    elif program in ("python", "export"):
        pass  # tests/documents/test_commands.py, tests/cluster/test_hosts.py
    elif program in ("ray", "kubectl"):
        # tests/documents/test_deploy.py checks their files; a command of asgd is parsed here.
        assert all((ROOT / name).exists() for name in arguments if name.endswith(".yaml"))
        for ours in (shlex.split(name) for name in arguments if name.startswith("asgd ")):
            cli.commands[ours[1]].make_context(ours[1], ours[2:])
    else:
        raise AssertionError(f"{shlex.join(words)}: say here how it is checked")


@pytest.mark.parametrize(("page", "real"), with_blocks())
def test_code_blocks_run(
    page: Path,
    real: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    if real:
        request.getfixturevalue("shared_ray")
    matplotlib.use("agg")
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    names: dict[str, object] = {}
    plugin = False
    for language, text, saved in blocks(page):
        plugin = plugin or saved is not None
        if saved is not None:
            Path(saved).write_text(text, encoding="utf-8")
            monkeypatch.delitem(sys.modules, Path(saved).stem, raising=False)
        if language == "python":
            if plugin:  # the shared Ray cannot import from this directory
                text = text.replace("cluster.run(", "asgd.simulate(")
            exec(compile(text, f"{page.name}", "exec"), names)
        elif language == "toml":
            make_config(tomllib.loads(text))
        for words in commands(text) if language == "sh" else ():
            if Path(words[0]).name == "asgd":
                run_asgd(words[1:])
            else:
                check_command(words)
    assert "Traceback" not in capfd.readouterr().err


def test_links_have_a_target() -> None:
    broken = []
    for page in PAGES:
        for target in links(page):
            path, _, anchor = target.partition("#")
            file = (page.parent / path) if path else page
            if not file.exists() or (anchor and anchor not in anchors(file)):
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert not broken


def test_every_page_is_in_the_index() -> None:
    readme = ROOT / "README.md"
    linked = {(ROOT / target.partition("#")[0]).resolve() for target in links(readme)}
    assert set(PAGES) - {readme} <= linked


def section(page: Path, title: str) -> str:
    """Return the text under a title of a page, up to the next title."""
    text = page.read_text(encoding="utf-8")
    start = text.index(f"\n## {title}\n")
    return text[start : text.find("\n## ", start + 1)]


def rows(text: str) -> list[list[str]]:
    """Return the cells of each row of the tables in a text, without the headings."""
    lines = re.findall(r"^\| (.*) \|$", text, re.MULTILINE)
    return [re.split(r"(?<!\\) \| ", line) for line in lines][1:]


def test_the_maps_of_packages_name_their_files() -> None:
    for folder, content in rows(section(ROOT / "README.md", "Packages")):
        place = ROOT / folder.strip("`/")
        named = re.findall(r"`([\w./]+)`", content)
        assert [name for name in named if not (place / name).exists()] == []
        rooms = {file.parent.name for file in place.glob("*/__init__.py")}
        assert rooms <= {name.strip("/") for name in named}
    page = ROOT / "cluster" / "README.md"
    named = re.findall(r"`([\w.]+(?:/|\.py))`", page.read_text("utf-8").split("\n## ")[0])
    there = {file.name for file in page.parent.glob("*") if file.suffix == ".py" or file.is_dir()}
    assert {name.strip("/") for name in named} == there - {"__init__.py", "__pycache__"}


def test_every_command_is_in_the_table() -> None:
    named = [row[0] for row in rows(section(ROOT / "README.md", "Commands"))]
    assert set(re.findall(r"`asgd (\w+)", " ".join(named))) == set(cli.commands)


@pytest.mark.parametrize("table", [*TABLES, COUNTS])
def test_the_columns_of_a_run_are_those_documented(table: str) -> None:
    page = ROOT / "asgd" / "rundir" / "README.md"
    columns = [name.strip("`") for name, _ in rows(section(page, table) + "\n")]
    assert columns == list({**TABLES, COUNTS: COUNT_COLUMNS}[table])


@pytest.mark.parametrize("table", RECORD_TABLES)
def test_the_columns_of_a_record_are_those_documented(table: str) -> None:
    page = ROOT / "asgd" / "records" / "README.md"
    columns = [name.strip("`") for name, _ in rows(section(page, table) + "\n")]
    assert columns == list(RECORD_TABLES[table])


def test_every_key_of_the_configuration_is_documented() -> None:
    text = (ROOT / "asgd" / "CONFIGURATION.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`\[?([\w.]+)\]?`", text))

    def keys(table: type[msgspec.Struct], name: str) -> set[str]:
        missing = set()
        for field in msgspec.structs.fields(table):
            inner = field.type
            if field.name in ("learning_rate_schedule", "batch_schedule"):
                inner = None
            if isinstance(inner, type) and issubclass(inner, msgspec.Struct):
                missing |= keys(inner, f"{name}{field.name}.")
            elif field.name not in named:
                missing.add(f"{name}{field.name}")
        return missing

    assert keys(RunConfig, "") == set()
