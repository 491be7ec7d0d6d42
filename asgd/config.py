"""The whole configuration: typed, frozen, validated. Every default lives here.

A configuration is a TOML file with the tables `[problem]`, `[optimizer]`, `[cluster]`,
`[cluster.compute_time]`, `[simulation]`, `[run]` and `[metrics]`. Whatever cannot be used is
refused with the key, the value and what would be accepted.
"""

from __future__ import annotations

import codecs
import itertools
import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np

from asgd.config_defects import (
    did_you_mean,
    explained,
    missing_table,
    refuse_infinite,
    refuse_unknown_keys,
)
from asgd.errors import InputError
from asgd.stored_json import check_plain, parse_json

Positive = Annotated[float, msgspec.Meta(gt=0)]
NonNegative = Annotated[float, msgspec.Meta(ge=0)]
Count = Annotated[int, msgspec.Meta(ge=1)]

SCALAR_KINDS = ("quadratic", "quartic", "double_well")
LINEAR_KINDS = {"least_squares": "diabetes", "logistic": "breast_cancer", "softmax": "digits"}
MOST_WORKERS = 512  # of a run that is resized: a larger request is taken for a mistake
_PROBLEM_KEYS = {
    "quadratic": ("curvature", "noise", "initial"),
    "quartic": ("noise", "initial"),
    "double_well": ("noise", "initial"),
    **dict.fromkeys(LINEAR_KINDS, ("dataset", "l2")),
}


class _Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of the configuration file."""


class ProblemConfig(_Table, frozen=True):
    """What is minimised.

    `kind` is one of the built-in problems or a plug-in `"package.module:factory"`, which is called
    with the entries of `options`. `curvature`, `noise` and `initial` belong to the one-dimensional
    problems, `dataset` and `l2` to the linear models.
    """

    kind: str = "softmax"
    dataset: str | None = None
    l2: NonNegative | None = None
    curvature: Positive | None = None
    noise: NonNegative | None = None
    initial: float | None = None
    options: dict[str, Any] = {}

    @property
    def is_plugin(self) -> bool:
        """Whether `kind` names a user's own factory."""
        module, colon, _ = self.kind.partition(":")
        return bool(colon) and all(name.isidentifier() for name in module.split("."))

    def __post_init__(self) -> None:
        accepted = _PROBLEM_KEYS.get(self.kind, ("options",) if self.is_plugin else None)
        if accepted is None:
            kinds, hint = ", ".join(_PROBLEM_KEYS), did_you_mean(self.kind, _PROBLEM_KEYS)
            raise ValueError(
                f'kind = {self.kind!r}: {hint}expected {kinds} or "package.module:factory"'
            )
        for key in self.__struct_fields__[1:]:
            if key not in accepted and getattr(self, key) not in (None, {}):
                takes = ", ".join(accepted)
                raise ValueError(
                    f"{key} does not belong to kind {self.kind!r}, which takes {takes}"
                )
        if self.dataset not in (None, LINEAR_KINDS.get(self.kind)):
            raise ValueError(
                f"dataset = {self.dataset!r}: kind {self.kind!r} takes {LINEAR_KINDS[self.kind]!r}"
            )


class LearningRateSchedule(_Table, frozen=True):
    """Learning rates from given update numbers on: `values[i]` from update `at[i]`."""

    at: list[Count] = []
    values: list[Positive] = []

    def __post_init__(self) -> None:
        _check_changes(self.at, self.values)


class BatchSchedule(_Table, frozen=True):
    """Batch sizes from given versions on: `values[i]` for snapshots of version `at[i]` and later.

    A worker learns its batch size together with its snapshot.
    """

    at: list[Count] = []
    values: list[Count] = []

    def __post_init__(self) -> None:
        _check_changes(self.at, self.values)


def _check_changes(at: list[int], values: list[Any]) -> None:
    if len(at) != len(values):
        raise ValueError(f"at has {len(at)} entries and values {len(values)}: expected as many")
    if any(later <= earlier for earlier, later in itertools.pairwise(at)):
        raise ValueError(f"at = {at}: expected growing update numbers")


class OptimizerConfig(_Table, frozen=True):
    """How a gradient changes the parameters. `batch_size` is in samples per gradient.

    `rule = "momentum"` is the heavy ball with factor `momentum`; `"staleness_aware"` divides the
    learning rate by 1 + staleness. A gradient longer than `clip_norm` is cut to that length. The
    schedules change what `learning_rate` and `batch_size` start with.
    """

    rule: Literal["sgd", "momentum", "staleness_aware"] = "sgd"
    learning_rate: Positive = 0.05
    batch_size: Count = 16
    momentum: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.9
    clip_norm: Positive | None = None
    learning_rate_schedule: LearningRateSchedule = LearningRateSchedule()
    batch_schedule: BatchSchedule = BatchSchedule()


class ComputeTimeConfig(_Table, frozen=True):
    """Time added to every gradient computation, in seconds; lists give one value per worker.

    `variation` is the coefficient of variation (standard deviation over mean) of the gamma and
    lognormal laws.
    """

    law: Literal["none", "constant", "exponential", "gamma", "lognormal"] = "none"
    mean: Positive | list[Positive] = 0.010
    variation: Positive = 0.5


class ClusterConfig(_Table, frozen=True):
    """The workers, the order in which the server applies their gradients, and how these travel.

    `mode = "async"` applies each gradient as it comes; `"sync"` waits for all workers and applies
    the mean of their gradients; `"bounded"` keeps staleness at `max_staleness` or below: whoever
    is ahead waits, and gradients that fall due at the same update are applied as their mean.
    `schedule = "free"` applies gradients as they arrive; `"uniform"` draws the next worker
    uniformly and waits for its gradient, which makes staleness exactly geometric.
    A worker that owes a gradient for longer than `worker_timeout` seconds and 20 times its mean
    compute time is taken for dead.
    `transport` is "ray" (a call per gradient), "tcp", "shm" (shared memory for workers on the
    server's node, tcp for the others) or "auto". Vectors travel in `wire_dtype`; the server's
    parameters are float64 under both.
    """

    workers: Annotated[int, msgspec.Meta(ge=1, le=100_000)] = 4
    mode: Literal["async", "bounded", "sync"] = "async"
    max_staleness: Annotated[int, msgspec.Meta(ge=0)] = 8
    schedule: Literal["free", "uniform"] = "free"
    worker_timeout: Positive = 60.0
    transport: Literal["auto", "ray", "tcp", "shm"] = "auto"
    wire_dtype: Literal["float64", "float32"] = "float64"
    compute_time: ComputeTimeConfig = ComputeTimeConfig()

    def __post_init__(self) -> None:
        mean = self.compute_time.mean
        if isinstance(mean, list) and len(mean) != self.workers:
            raise ValueError(
                f"compute_time.mean has {len(mean)} values: expected one, or {self.workers}, "
                "one per worker"
            )
        if self.schedule == "uniform" and self.mode != "async":
            raise ValueError(f'schedule = "uniform" needs mode = "async", not {self.mode!r}')


class SimulationConfig(_Table, frozen=True):
    """Virtual time only: what `asgd simulate` cannot measure and has to be told.

    `staleness = "server"` simulates the parameter server event by event; the name of a law draws
    each staleness independently from it, with mean `mean_staleness` (default workers - 1).
    `gradient_time`, `message_time` (one way) and `service_time` (server, per update) are seconds.
    """

    staleness: Literal["server", "geometric", "poisson", "constant"] = "server"
    mean_staleness: NonNegative | None = None
    gradient_time: NonNegative = 1e-3
    message_time: NonNegative = 0.0
    service_time: NonNegative = 0.0


class RunSettings(_Table, frozen=True):
    """How long, from which seed, how often the loss is evaluated (in updates), when to give up.

    Every `checkpoint_every` updates a real run saves the state it can be continued from. With
    `durability = "log"` every update is also written to a file before its answer leaves the
    server, and a killed server loses none; with `"checkpoint"` it loses those since the last one.
    `"auto"` logs up to 1000 parameters.

    More than `max_bad_gradients` gradients that are not finite or have the wrong shape end the
    run; so does a loss that is not finite or above `divergence_factor` times the first one (or
    times one, where the first is smaller). `repeats` runs as many seeds, `seed`, `seed` + 1, ...,
    and stores them together.
    """

    updates: Annotated[int, msgspec.Meta(ge=1, le=10**9)] = 5000
    seed: Annotated[int, msgspec.Meta(ge=0)] = 0
    eval_every: Count = 25
    checkpoint_every: Count = 1000
    durability: Literal["auto", "log", "checkpoint"] = "auto"
    max_bad_gradients: Annotated[int, msgspec.Meta(ge=0)] = 10
    divergence_factor: Positive = 1e6
    repeats: Count = 1


class MetricsConfig(_Table, frozen=True):
    """Where else a real run shows how it stands; nowhere by default.

    `tensorboard` writes event files into `tensorboard/` of the run directory. `prometheus` adds the
    run to the metrics page of its Ray; a Ray of our own opens that page on 127.0.0.1 at `port`, 0
    for any free one. The event `metrics` in `events.jsonl` names it.
    """

    tensorboard: bool = False
    prometheus: bool = False
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 0

    @property
    def page(self) -> int | None:
        """Port of the page, None without one: whoever reaches it can read it."""
        return self.port if self.prometheus else None


class RunConfig(_Table, frozen=True):
    """A whole run."""

    problem: ProblemConfig = ProblemConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    cluster: ClusterConfig = ClusterConfig()
    simulation: SimulationConfig = SimulationConfig()
    run: RunSettings = RunSettings()
    metrics: MetricsConfig = MetricsConfig()

    def to_json(self) -> str:
        """Return the resolved configuration as JSON text."""
        return json.dumps(msgspec.to_builtins(self), indent=2) + "\n"


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a configuration from a TOML file, or from the `config.json` of a run.

    Parameters
    ----------
    path
        The file.
    overrides
        Entries `"table.key=value"`; the value is read as TOML, else taken as a string.

    Raises
    ------
    InputError
        The file cannot be read or the configuration cannot be used.
    """
    path = Path(path)
    try:
        text = _read_text(path)
        data = parse_json(text) if path.suffix == ".json" else _parse_toml(text)
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such file; `asgd init` writes a configuration to start from"
        ) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except ValueError as error:  # JSON, TOML and UTF-8 errors all derive from it
        raise InputError(f"{path}: not a valid configuration file: {error}") from None
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected tables such as [problem], got {type(data).__name__}")
    for entry in overrides:
        _override(data, entry)
    return make_config(data)


def _parse_toml(text: str) -> dict[str, Any]:
    try:
        data = tomllib.loads(text)
    except RecursionError:
        raise ValueError("tables or lists nested too deeply") from None
    check_plain(data)
    return data


def _read_text(path: Path) -> str:
    """Read a file of UTF-8, with or without the mark in front that editors of Windows write.

    Raises
    ------
    OSError, ValueError
        It cannot be read, or is not of UTF-8.
    """
    content = path.read_bytes()
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in content[:2]:
        raise ValueError("its encoding is UTF-16; save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line} is not UTF-8; save it as UTF-8") from None


def make_config(data: Mapping[str, Any] | None = None) -> RunConfig:
    """Build a configuration from nested mappings, filling in every default.

    Raises
    ------
    InputError
        An unknown key, a wrong type or an impossible value.
    """
    if data is not None and not isinstance(data, Mapping):
        raise InputError(f"configuration: {type(data).__name__}; expected nested mappings")
    data = {key: _plain(value) for key, value in (data or {}).items()}
    refuse_unknown_keys(RunConfig, data)
    refuse_infinite(data)
    try:
        config = msgspec.convert(data, RunConfig)
    except msgspec.ValidationError as error:
        raise InputError(explained(str(error), data, RunConfig)) from None
    return msgspec.structs.replace(config, problem=_resolve_problem(config.problem))


Configuration = RunConfig | Mapping[str, Any] | str | Path


def as_config(config: Configuration) -> RunConfig:
    """Return a configuration as it is, built from a mapping, or read from a file.

    Raises
    ------
    InputError
        It is none of these, or cannot be used.
    """
    if isinstance(config, RunConfig):
        return config
    if isinstance(config, str | Path):
        return load_config(config)
    return make_config(config)


def _plain(value: Any) -> Any:
    """Return a value as TOML would give it: NumPy's numbers and arrays as Python's."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else value


def _override(data: dict[str, Any], entry: str) -> None:
    key, separator, text = entry.partition("=")
    names = [name.strip() for name in key.split(".")]
    if not separator or len(names) < 2 or not all(names):
        hint = missing_table(names[-1], RunConfig) if len(names) < 2 else ""
        raise InputError(f"--set {entry}: expected table.key=value{hint}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    table = data
    for name in names[:-1]:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise InputError(f"--set {entry}: {name} is a value, not a table")
    table[names[-1]] = value


def _resolve_problem(problem: ProblemConfig) -> ProblemConfig:
    """Fill in the defaults that depend on the kind of problem."""
    if problem.kind in SCALAR_KINDS:
        defaults: dict[str, Any] = {"noise": 2.0, "initial": 1.0}
        if problem.kind == "quadratic":
            defaults["curvature"] = 2.0
    elif problem.kind in LINEAR_KINDS:
        defaults = {"dataset": LINEAR_KINDS[problem.kind], "l2": 1e-3}
    else:
        defaults = {}
    missing = {key: value for key, value in defaults.items() if getattr(problem, key) is None}
    return msgspec.structs.replace(problem, **missing)
