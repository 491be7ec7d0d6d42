"""Configurations: defaults, overrides, and one-line refusals of unusable values."""

import json
from pathlib import Path

import pytest

from asgd.config.make import load_config, make_config
from asgd.errors import InputError


def write(directory: Path, text: str) -> Path:
    path = directory / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_depend_on_the_kind_of_problem() -> None:
    assert make_config().problem.dataset == "digits"
    assert make_config({"problem": {"kind": "quadratic"}}).problem.curvature == 2.0
    assert make_config({"problem": {"kind": "quartic"}}).problem.curvature is None


def test_resolved_configuration_reads_back_equal(tmp_path: Path) -> None:
    config = make_config({"cluster": {"workers": 2, "compute_time": {"mean": [0.1, 0.2]}}})
    path = tmp_path / "config.json"
    path.write_text(config.to_json(), encoding="utf-8")
    assert load_config(path) == config


def test_overrides_are_read_as_toml_or_text(tmp_path: Path) -> None:
    path = write(tmp_path, "[problem]\nkind = 'logistic'\n")
    config = load_config(
        path, ["problem.l2=1e-2", "problem.kind=softmax", "cluster.compute_time.law=gamma"]
    )
    assert config.problem.l2 == 1e-2
    assert config.problem.kind == "softmax"
    assert config.cluster.compute_time.law == "gamma"


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        ({"optimizer": {"learning_rate": -1}}, ("optimizer.learning_rate", "-1", "> 0")),
        ({"optimizer": {"learning_rate": "fast"}}, ("learning_rate = 'fast': expected a number",)),
        ({"optimizer": {"learning_rate": float("inf")}}, ("learning_rate", "inf", "finite")),
        ({"optimizer": {"learning_rat": 1}}, ("learning_rat", "did you mean learning_rate")),
        ({"optimiser": {}}, ("optimiser", "did you mean optimizer")),
        ({"problem": {"kind": "softmx"}}, ("kind = 'softmx'", "did you mean softmax", "quartic")),
        ({"cluster": {"workers": 0}}, ("cluster.workers", "0", ">= 1")),
        ({"cluster": {"workers": True}}, ("cluster.workers = True: expected a whole number",)),
        ({"cluster": {"schedule": "fair"}}, ("cluster.schedule", "'fair'", "free, uniform")),
        ({"cluster": {"compute_time": {"mean": [0.1, 0.2]}}}, ("2 values", "4")),
        ({"run": {"max_seconds": 0}}, ("run.max_seconds = 0", "> 0")),
        ({"run": {"target_loss": 0.1, "repeats": 2}}, ("run.target_loss = 0.1", "repeats = 2")),
        ({"cluster": {"compute_time": {"mean": [1, -2, 1, 1]}}}, ("mean[1]", "-2", "> 0")),
        (
            {"cluster": {"compute_time": {"mean": "1"}}},
            ("mean = '1': expected a number or a list",),
        ),
        ({"metrics": {"prometheus": 1}}, ("prometheus = 1: expected true or false",)),
        ({"cluster": 3}, ("cluster", "3", "table")),
        ({"run": {"updates": 1.5}}, ("run.updates = 1.5: expected a whole number",)),
        ({"problem": {"kind": "resnet"}}, ("'resnet'", "softmax", "package.module:factory")),
        ({"problem": {"kind": "quadratic", "l2": 1}}, ("l2", "quadratic", "curvature")),
        ({"problem": {"kind": "softmax", "dataset": "iris"}}, ("'iris'", "'digits'")),
    ],
)
def test_unusable_values_are_refused_in_one_line(
    data: dict[str, object], parts: tuple[str, ...]
) -> None:
    with pytest.raises(InputError) as refusal:
        make_config(data)
    message = str(refusal.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize("entry", ["workers=3", "cluster.workers", "=3", "run.seed.deep=1"])
def test_malformed_overrides_are_refused(tmp_path: Path, entry: str) -> None:
    path = write(tmp_path, "[run]\nseed = 3\n")
    with pytest.raises(InputError, match="--set"):
        load_config(path, [entry])


@pytest.mark.parametrize("content", [b"[run\n", b"\xff\xfe", b"run = 3\n"])
def test_a_file_without_a_configuration_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(content)
    with pytest.raises(InputError):
        load_config(path)


def test_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.toml"):
        load_config(tmp_path / "nowhere.toml")


TEXT = '[problem]\nkind = "quadratic"\n# Läufe\n[run]\nseed = 3\n'


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_file_of_a_windows_editor_is_read(tmp_path: Path, encoding: str, newline: str) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(TEXT.replace("\n", newline).encode(encoding))
    assert load_config(path).run.seed == 3
    path = tmp_path / "config.json"
    path.write_bytes(make_config().to_json().replace("\n", newline).encode(encoding))
    assert load_config(path) == make_config()


@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        ("utf-16", "its encoding is UTF-16; save it as UTF-8"),
        ("utf-16-le", "its encoding is UTF-16; save it as UTF-8"),
        ("utf-16-be", "its encoding is UTF-16; save it as UTF-8"),
        ("cp1252", "line 3 is not UTF-8; save it as UTF-8"),
    ],
)
def test_another_encoding_is_named(tmp_path: Path, encoding: str, message: str) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(TEXT.encode(encoding))
    with pytest.raises(InputError, match=f"not a valid configuration file: {message}$"):
        load_config(path)


def test_record_of_an_earlier_version_may_contain_an_unused_momentum(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"optimizer": {"rule": "sgd", "momentum": 0.5}}))
    assert load_config(path) == make_config({"optimizer": {"rule": "sgd"}})
    path.write_text(json.dumps({"optimizer": {"rule": "momentum", "momentum": 0.5}}))
    assert load_config(path).optimizer.momentum == 0.5
    assert load_config(path, ["optimizer.rule=sgd"]).optimizer.momentum is None
    with pytest.raises(InputError, match=r"momentum = 0\.7 does not belong to rule = 'sgd'"):
        load_config(path, ["optimizer.rule=sgd", "optimizer.momentum=0.7"])
    path.write_text(json.dumps({"optimizer": {"rule": ["sgd"], "momentum": 0.5}}))
    with pytest.raises(InputError, match=r"optimizer\.rule"):
        load_config(path)
