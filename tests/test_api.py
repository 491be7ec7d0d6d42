"""The public names of the packages: there, documented, typed, and light to import."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGES = ("asgd", "cluster", "analysis")
NAMES = [
    (package, name)
    for package in PACKAGES
    for name in sorted(importlib.import_module(package).__all__)
]


@pytest.mark.parametrize(("package", "name"), NAMES)
def test_public_names_are_documented_and_typed(package: str, name: str) -> None:
    module = importlib.import_module(package)
    thing = getattr(module, name)
    assert name in dir(module)
    assert thing.__doc__
    if inspect.isfunction(thing):
        missing = [
            parameter.name
            for parameter in inspect.signature(thing).parameters.values()
            if parameter.annotation is inspect.Parameter.empty
        ]
        assert not missing
        assert "return" in thing.__annotations__


def test_a_type_checker_sees_the_same_names() -> None:
    for package in PACKAGES:
        module = importlib.import_module(package)
        source = Path(str(module.__file__)).read_text(encoding="utf-8")
        for name in module.__all__:
            assert f" import {name} as {name}\n" in source, f"{package}.{name}"
        assert source.count(" as ") == len(module.__all__) == len(set(module.__all__))


def test_a_function_is_not_hidden_by_the_module_of_its_name() -> None:
    code = (
        "import analysis.sme_law, analysis.sme_sgd, analysis.sme_replay\n"
        "from analysis import sme_law, sme_sgd, sme_replay\n"
        "assert all(map(callable, (sme_law, sme_sgd, sme_replay, analysis.sme_law)))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=True)


def test_an_unknown_name_is_an_attribute_error() -> None:
    for package in PACKAGES:
        with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'no_such'"):
            importlib.import_module(package).__getattr__("no_such")
