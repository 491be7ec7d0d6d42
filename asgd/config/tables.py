"""The tables of a configuration: typed, frozen and validated, with their defaults.

A configuration is a TOML file with the tables `[problem]`, `[data]`, `[optimizer]`, `[cluster]`,
`[cluster.compute_time]`, `[simulation]`, `[run]` and `[metrics]`. An error message names the key,
the value and the accepted values.
"""

from __future__ import annotations

import itertools
import json
from typing import Annotated, Any, Literal

import msgspec

from asgd.config.defects import explained
from asgd.config.policy import check_policy
from asgd.config.rules import LOCAL_KEYS, RULE_KEYS, check_local, check_local_rule, left_out
from asgd.errors import did_you_mean

Positive = Annotated[float, msgspec.Meta(gt=0)]
NonNegative = Annotated[float, msgspec.Meta(ge=0)]
Count = Annotated[int, msgspec.Meta(ge=1)]
Share = Annotated[float, msgspec.Meta(ge=0, lt=1)]
LeaseKind = Literal["flock", "file"]

SCALAR_KINDS = ("quadratic", "quartic", "double_well")
LINEAR_KINDS = {"least_squares": "diabetes", "logistic": "breast_cancer", "softmax": "digits"}
MOST_WORKERS = 512  # limit for resizing a run; a larger request is probably a mistake
_PROBLEM_KEYS = {
    "quadratic": ("curvature", "noise", "initial"),
    "quartic": ("noise", "initial"),
    "double_well": ("noise", "initial"),
    **dict.fromkeys(LINEAR_KINDS, ("dataset", "l2")),
}


class _Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of the configuration file; unknown keys are refused."""


class ProblemConfig(_Table, frozen=True):
    """The problem to minimise.

    `kind` is a built-in problem or a plug-in `"package.module:factory"`; the factory is called with
    the entries of `options`. `curvature`, `noise` and `initial` belong to the one-dimensional
    problems, `dataset` and `l2` to the linear models. A run of any problem starts from the
    parameters in the file `initial_from`, as `asgd export` writes it.
    """

    kind: str = "softmax"
    dataset: str | None = None
    l2: NonNegative | None = None
    curvature: Positive | None = None
    noise: NonNegative | None = None
    initial: float | None = None
    options: dict[str, Any] = {}
    initial_from: str | None = None

    @property
    def is_plugin(self) -> bool:
        """Whether `kind` names a user-defined factory."""
        return _names_code(self.kind)

    def __post_init__(self) -> None:
        accepted = _PROBLEM_KEYS.get(self.kind, ("options",) if self.is_plugin else None)
        if accepted is None:
            kinds, hint = ", ".join(_PROBLEM_KEYS), did_you_mean(self.kind, _PROBLEM_KEYS)
            raise ValueError(
                f'kind = {self.kind!r}: {hint}expected {kinds} or "package.module:factory"'
            )
        for key in self.__struct_fields__[1:]:
            if key not in (*accepted, "initial_from") and getattr(self, key) not in (None, {}):
                takes = ", ".join(accepted)
                raise ValueError(
                    f"{key} does not belong to kind {self.kind!r}, which takes {takes}"
                )
        if self.dataset not in (None, LINEAR_KINDS.get(self.kind)):
            raise ValueError(
                f"dataset = {self.dataset!r}: kind {self.kind!r} takes {LINEAR_KINDS[self.kind]!r}"
            )


class DataConfig(_Table, frozen=True):
    """Which samples a worker draws, and how.

    With `shards = "shared"`, every worker draws from all samples. Otherwise each initial worker
    draws from its own part, and the sizes of the parts differ by at most one sample. `"partition"`
    divides the samples at random, `"by_label"` in the order of their classes. With `"dirichlet"`,
    the shares of the classes in each part follow a Dirichlet law; the smaller `alpha`, the more
    the parts differ. See `asgd.shards`.

    With `sampling = "replacement"`, a batch is drawn independently of all others. With `"epoch"`,
    the workers together use every sample once per epoch, in a new random order each time; if the
    samples are divided, each part has its own epochs. See `asgd.epochs`.
    """

    shards: Literal["shared", "partition", "by_label", "dirichlet"] = "shared"
    alpha: Annotated[float, msgspec.Meta(ge=1e-6, le=1e6)] | None = None
    sampling: Literal["replacement", "epoch"] = "replacement"

    def __post_init__(self) -> None:
        if self.shards == "dirichlet" and self.alpha is None:
            raise ValueError("shards = 'dirichlet' needs alpha: expected a number > 0")
        if self.shards != "dirichlet" and self.alpha is not None:
            raise ValueError(
                f"alpha = {self.alpha:g} does not belong to shards = {self.shards!r}: expected it "
                "with shards = 'dirichlet' alone"
            )


def _names_code(value: str) -> bool:
    """Whether a value has the form "package.module:name"."""
    module, colon, _ = value.partition(":")
    return bool(colon) and all(name.isidentifier() for name in module.split("."))


class LearningRateSchedule(_Table, frozen=True):
    """Changes of the learning rate: it is `values[i]` from update `at[i]` on."""

    at: list[Count] = []
    values: list[Positive] = []

    def __post_init__(self) -> None:
        _check_changes(self.at, self.values)


class BatchSchedule(_Table, frozen=True):
    """Changes of the batch size: it is `values[i]` for snapshots of version `at[i]` and later.

    The server sends the batch size together with the snapshot.
    """

    at: list[Count] = []
    values: list[Count] = []

    def __post_init__(self) -> None:
        _check_changes(self.at, self.values)


def _check_changes(at: list[int], values: list[Any]) -> None:
    if len(at) != len(values):
        raise ValueError(f"at has {len(at)} entries, values has {len(values)}: expected equal")
    if any(later <= earlier for earlier, later in itertools.pairwise(at)):
        raise ValueError(f"at = {at}: expected increasing update numbers")


class OptimizerConfig(_Table, frozen=True):
    """The update rule, the learning rate and the batch size (samples per gradient).

    `rule` is one of `asgd.config.rules.RULES` or your own, `"package.module:Name"`, which is called
    with the entries of `options`. `momentum` is the factor of `"momentum"` (the heavy ball),
    `"nesterov"` and `"corrected_momentum"`; `RULES` has the other keys. Gradients longer than
    `clip_norm` are clipped to that length. `learning_rate` and `batch_size` are initial values,
    which the schedules change.

    With `local_steps` H, a worker makes H steps of its own from its snapshot by `local_rule`, with
    `local_learning_rate` and a batch each, and pushes the difference; `rule` applies it like a
    gradient, with `learning_rate`, which is then 1 by default. `local_options` are the keys of
    `local_rule`. `local_state` says whether its momentum or moments are kept from one snapshot to
    the next ("keep") or begin as zeros at each ("reset", the default).
    """

    rule: str = "sgd"
    learning_rate: Positive = 0.05
    batch_size: Count = 16
    momentum: Share | None = None
    beta1: Share | None = None
    beta2: Share | None = None
    epsilon: Positive | None = None
    weight_decay: NonNegative | None = None
    exponent: NonNegative | None = None
    cap: Positive | None = None
    compensation: NonNegative | None = None
    options: dict[str, Any] = {}
    clip_norm: Positive | None = None
    local_steps: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] | None = None
    local_rule: str | None = None
    local_learning_rate: Positive | None = None
    local_options: dict[str, Any] = {}
    local_state: Literal["reset", "keep"] = "reset"
    learning_rate_schedule: LearningRateSchedule = LearningRateSchedule()
    batch_schedule: BatchSchedule = BatchSchedule()

    @property
    def is_own_rule(self) -> bool:
        """Whether `rule` names a user-defined rule."""
        return _names_code(self.rule)

    @property
    def gradients_per_push(self) -> int:
        """Gradients that a worker computes for each push: H local steps, else 1."""
        return self.local_steps or 1

    @property
    def _local_rule(self) -> str:
        return "sgd" if self.local_rule is None else self.local_rule

    @property
    def local(self) -> OptimizerConfig | None:
        """The optimizer of the local steps; None without local steps."""
        if self.local_steps is None:
            return None
        rule, options = self._local_rule, self.local_options
        given = {"options": options} if _names_code(rule) else options
        return OptimizerConfig(rule=rule, learning_rate=self.local_learning_rate or 1.0, **given)

    def __post_init__(self) -> None:
        given = {key: getattr(self, key) for key in RULE_KEYS}
        defaults: dict[str, Any] = left_out(self.rule, self.is_own_rule, given)
        local = {key: getattr(self, key) for key in ("local_steps", *LOCAL_KEYS)}
        check_local(self.rule, max([self.batch_size, *self.batch_schedule.values]), local)
        if self.local_steps is not None:
            defaults |= _resolved_local(self._local_rule, self.local_options)
        for key, default in defaults.items():
            msgspec.structs.force_setattr(self, key, default)


def _resolved_local(rule: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return the rule of the local steps and its options, with their defaults filled in.

    Raises
    ------
    ValueError
        There is no such rule for local steps, or it does not take an option.
    """
    if not _names_code(rule):
        keys = check_local_rule(rule, options)
        try:
            optimizer = msgspec.convert({"rule": rule, **options}, OptimizerConfig)
        except msgspec.ValidationError as error:
            reason = explained(str(error), options, OptimizerConfig)
            raise ValueError(f"local_options.{reason}") from None
        options = {key: getattr(optimizer, key) for key in keys}
    return {"local_rule": rule, "local_options": options}


class ComputeTimeConfig(_Table, frozen=True):
    """Time added to every gradient computation, in seconds; a list has one mean per worker.

    `variation` is the coefficient of variation (standard deviation over mean) of the gamma and
    lognormal laws.
    """

    law: Literal["none", "constant", "exponential", "gamma", "lognormal"] = "none"
    mean: Positive | list[Positive] = 0.010
    variation: Positive = 0.5


class ClusterConfig(_Table, frozen=True):
    """The workers, the order in which the server applies their gradients, and the transport.

    `mode = "async"` applies each gradient as it arrives; `"sync"` waits for all workers and applies
    the mean of their gradients; `"bounded"` keeps staleness at `max_staleness` or below: workers
    that are too far ahead wait, and gradients due at the same update are applied as their mean;
    `"buffered"` applies the mean of the next `gradients_per_update` gradients, whatever their
    staleness, and no worker waits. In mode sync, `gradients_per_update` ends a round with the
    fastest workers' gradients; the `late` ones are discarded, or kept for the round in which they
    arrive. In the modes async and buffered a gradient whose staleness is above `discard_above` is
    discarded, and its worker starts again from the newest snapshot; see `asgd.policy`.
    `schedule = "free"` applies gradients as they arrive; `"uniform"` draws the next worker
    uniformly and waits for its gradient, which makes staleness exactly geometric.
    A worker is considered dead if its gradient takes longer than `worker_timeout` seconds and
    longer than 20 times its mean compute time.
    `transport` is "ray" (a call per gradient), "tcp", "shm" (shared memory for workers on the
    server's node, tcp for the others) or "auto". Messages carry vectors in the precision of the
    parameters, never a higher one; `wire_dtype` "float32" or "bfloat16" rounds them on the way.
    `compression = "top_k"` sends the largest entries of a gradient, a `compression_share` of all
    (default 0.01), `"int8"` 8 bits for each; the worker adds the rest to its next gradient, see
    `asgd.compression`.

    Only one launcher and its newest server write the run directory. `lease = "flock"` ensures this
    by file locks, `"file"` by heartbeat files on file systems without locks.

    Ray gives each worker `gpus_per_worker` accelerators, a fraction below 1 or a whole number; with
    0, neither the workers nor the evaluation of the loss see one. A worker computes on
    `threads_per_worker` threads. `workers_per_process` workers share a process and its problem:
    they compute one gradient at a time, but wait at the same time, so many workers that mostly
    wait take little memory.
    """

    workers: Annotated[int, msgspec.Meta(ge=1, le=100_000)] = 4
    mode: Literal["async", "bounded", "sync", "buffered"] = "async"
    max_staleness: Annotated[int, msgspec.Meta(ge=0)] = 8
    gradients_per_update: Annotated[int, msgspec.Meta(ge=1, le=100_000)] | None = None
    late: Literal["discard", "keep"] = "discard"
    discard_above: Annotated[int, msgspec.Meta(ge=0)] | None = None
    schedule: Literal["free", "uniform"] = "free"
    worker_timeout: Positive = 60.0
    transport: Literal["auto", "ray", "tcp", "shm"] = "auto"
    wire_dtype: Literal["auto", "float64", "float32", "bfloat16"] = "auto"
    compression: Literal["none", "top_k", "int8"] = "none"
    compression_share: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    lease: LeaseKind = "flock"
    gpus_per_worker: NonNegative = 0.0
    threads_per_worker: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 1
    workers_per_process: Annotated[int, msgspec.Meta(ge=1, le=MOST_WORKERS)] = 1
    compute_time: ComputeTimeConfig = ComputeTimeConfig()

    def __post_init__(self) -> None:
        if self.gpus_per_worker > 1 and self.gpus_per_worker != int(self.gpus_per_worker):
            raise ValueError(
                f"gpus_per_worker = {self.gpus_per_worker:g}: expected a whole number, or a "
                "fraction below 1"
            )
        if self.gpus_per_worker and self.workers_per_process > 1:
            raise ValueError(
                f"gpus_per_worker = {self.gpus_per_worker:g} does not go with workers_per_process "
                f"= {self.workers_per_process}, as a process computes one gradient at a time: "
                "expected gpus_per_worker = 0 or workers_per_process = 1"
            )
        mean = self.compute_time.mean
        if isinstance(mean, list) and len(mean) != self.workers:
            raise ValueError(
                f"compute_time.mean has {len(mean)} values: expected one, or {self.workers}, "
                "one per worker"
            )
        if self.compression == "top_k" and self.compression_share is None:
            msgspec.structs.force_setattr(self, "compression_share", 0.01)
        if self.compression != "top_k" and self.compression_share is not None:
            raise ValueError(
                f"compression_share = {self.compression_share:g} does not belong to compression = "
                f"{self.compression!r}: expected it with compression = 'top_k' alone"
            )
        if self.schedule == "uniform" and self.mode != "async":
            raise ValueError(f'schedule = "uniform" needs mode = "async", not {self.mode!r}')
        check_policy(
            self.mode,
            self.schedule,
            self.workers,
            several=self.gradients_per_update,
            late=self.late,
            discard_above=self.discard_above,
        )


class SimulationConfig(_Table, frozen=True):
    """Times and staleness for `asgd simulate`, which cannot measure them.

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
    """Length, seed, evaluation interval (in updates), durability and limits of a run.

    A real run saves a checkpoint every `checkpoint_every` updates. With `durability = "log"`, the
    server also writes every update to a write-ahead log before it answers, so no update is lost if
    the server is killed; with `"checkpoint"`, the updates since the last checkpoint are lost.
    `"auto"` means `"log"` for at most 1000 parameters.

    The run fails after more than `max_bad_gradients` gradients that are not finite or have the
    wrong shape, or if the loss is not finite or exceeds `divergence_factor` times the larger of the
    first loss and 1. `repeats` is the number of runs, with seeds `seed`, `seed` + 1, ..., that are
    stored together.

    The run ends early, with success, at the first evaluated loss not above `target_loss`, or
    `max_seconds` (virtual in a simulation) after the first snapshot.

    If evaluating the losses takes longer than training, the updates wait. With
    `evaluations = "skip"` they do not: the run skips losses, and records which.

    `record = "updates"` keeps a row for each update. With `"counts"`, a real run keeps exact counts
    of staleness by time and worker instead, for 1000 times less disk; see `asgd.rundir.counts`.
    """

    updates: Annotated[int, msgspec.Meta(ge=1, le=10**9)] = 5000
    seed: Annotated[int, msgspec.Meta(ge=0)] = 0
    eval_every: Count = 25
    evaluations: Literal["all", "skip"] = "all"
    record: Literal["updates", "counts"] = "updates"
    checkpoint_every: Count = 1000
    durability: Literal["auto", "log", "checkpoint"] = "auto"
    max_bad_gradients: Annotated[int, msgspec.Meta(ge=0)] = 10
    divergence_factor: Positive = 1e6
    target_loss: float | None = None
    max_seconds: Positive | None = None
    repeats: Count = 1


class MetricsConfig(_Table, frozen=True):
    """Dashboards of a real run; none by default.

    `tensorboard` writes event files into `tensorboard/` of the run directory. `prometheus` adds the
    run to the metrics page of Ray. If we start Ray, the page is on 127.0.0.1 at `port`, where 0
    means any free port. The event `metrics` in `events.jsonl` contains its address.
    """

    tensorboard: bool = False
    prometheus: bool = False
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 0

    @property
    def page(self) -> int | None:
        """Port of the metrics page, which needs no password; None without a page."""
        return self.port if self.prometheus else None


class RunConfig(_Table, frozen=True):
    """The configuration of a run: each attribute is a table, and its attributes are the keys."""

    problem: ProblemConfig = ProblemConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    cluster: ClusterConfig = ClusterConfig()
    simulation: SimulationConfig = SimulationConfig()
    run: RunSettings = RunSettings()
    metrics: MetricsConfig = MetricsConfig()

    def __post_init__(self) -> None:
        steps = self.optimizer.gradients_per_push
        if self.data.sampling == "epoch" and steps > 1:
            raise ValueError(
                f"optimizer.local_steps = {steps} does not go with data.sampling = 'epoch', which "
                "hands out the samples of one batch: expected data.sampling = 'replacement'"
            )
        compression, rule = self.cluster.compression, self.optimizer.rule
        if compression != "none" and rule == "delay_compensated":
            raise ValueError(
                f"cluster.compression = {compression!r} does not go with optimizer.rule = "
                f"{rule!r}, which compensates gradients: expected cluster.compression = 'none' or "
                "another rule"
            )

    def to_json(self) -> str:
        """Return the resolved configuration as JSON text."""
        return json.dumps(msgspec.to_builtins(self), indent=2) + "\n"
