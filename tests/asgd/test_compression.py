"""Compressed gradients: what is kept, what the residual holds, and runs in virtual time."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asgd.arrays import Array, converted, number_type
from asgd.compression import BLOCK, Compression, ErrorFeedback, Int8, TopK
from asgd.config.make import make_config
from asgd.config.tables import RunConfig
from asgd.draws import WorkerDraws
from asgd.errors import InputError
from asgd.local_steps import LocalSteps, Pushes, PushRule
from asgd.problems.base import starting_point
from asgd.problems.make import make_problem
from asgd.rundir.reader import Run, read_run
from asgd.simulation.simulate import simulate
from asgd.verify import record_findings, replay_findings

TOP: dict[str, Any] = {"compression": "top_k", "compression_share": 0.1}
ALL: dict[str, Any] = {"compression": "top_k", "compression_share": 1.0}
BYTES: dict[str, Any] = {"compression": "int8"}
each = pytest.mark.parametrize("compression", [TopK(0.05), TopK(0.5), Int8()], ids=str)
precisions = pytest.mark.parametrize("dtype", ["float64", "float32"])


def configure(cluster: dict[str, Any], **tables: Any) -> RunConfig:
    return make_config(
        {
            "problem": tables.pop("problem", {"kind": "logistic"}),
            "optimizer": {"batch_size": 3, **tables.pop("optimizer", {})},
            "cluster": {"workers": 4, "compute_time": {"law": "exponential"}, **cluster},
            "run": {"updates": 160, "eval_every": 40},
            **tables,
        }
    )


def finished(config: RunConfig, path: Path) -> Run:
    return read_run(simulate(config, path))


def findings(run: Run) -> list[str]:
    last = {len(run.trace): run.parameters}
    return [*record_findings(run), *replay_findings(run, last)]


def drawn(seed: int, shape: tuple[int, ...], dtype: str) -> Array:
    """Return numbers of many magnitudes, some of them zero or equal."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape) * 10.0 ** rng.integers(-5, 5, size=shape)
    values[rng.random(shape) < 0.2] = 0.0
    values[rng.random(shape) < 0.2] = -3.0
    return values.astype(dtype)


# --- the compressions ---


@precisions
@pytest.mark.parametrize("dim", [1, 7, 1000])
@pytest.mark.parametrize("share", [1e-6, 0.05, 0.5, 1.0])
def test_the_largest_entries_are_kept_and_of_equal_ones_the_first(
    share: float, dim: int, dtype: str
) -> None:
    kept = min(dim, max(1, round(share * dim)))
    assert TopK(share).kept(dim) == kept
    for seed in range(20):
        vector = drawn(seed, (dim,), dtype)
        order = np.lexsort((np.arange(dim), -np.abs(vector)))
        expected = np.zeros_like(vector)
        expected[order[:kept]] = vector[order[:kept]]
        found = TopK(share).compressed(vector)
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == vector.dtype


@precisions
@pytest.mark.parametrize("dim", [1, BLOCK, 2 * BLOCK + 3])
def test_each_block_is_rounded_to_multiples_of_the_smallest_scale(dim: int, dtype: str) -> None:
    for seed in range(20):
        vector = drawn(seed, (dim,), dtype)
        vector *= vector.dtype.type(2.0 ** (seed - 10))
        found = Int8().compressed(vector)
        assert found.dtype == vector.dtype
        for at in range(0, dim, BLOCK):
            block, rounded = vector[at : at + BLOCK].astype(float), found[at : at + BLOCK]
            largest = np.abs(block).max()
            if largest == 0.0:
                assert not rounded.any()
                continue
            scale = 2.0 ** np.ceil(np.log2(largest / 127))
            assert 63.5 < largest / scale <= 127
            np.testing.assert_array_equal(rounded, np.rint(block / scale) * scale)


@each
@precisions
def test_a_compressed_vector_is_its_own_compression(compression: Compression, dtype: str) -> None:
    for seed in range(20):
        once = compression.compressed(drawn(seed, (700,), dtype))
        np.testing.assert_array_equal(compression.compressed(once), once)
        assert not np.signbit(once[once == 0.0]).any()


@each
@precisions
def test_vectors_of_several_paths_are_compressed_one_by_one(
    compression: Compression, dtype: str
) -> None:
    vectors = drawn(3, (5, 700), dtype)
    one_by_one = np.stack([compression.compressed(vector) for vector in vectors])
    np.testing.assert_array_equal(compression.compressed(vectors), one_by_one)


@each
@precisions
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_so(compression: Compression, dtype: str, wrong: float) -> None:
    """The server refuses it; a residual would hide it."""
    vector = drawn(1, (700,), dtype)
    vector[[3, 500]] = wrong
    feedback = ErrorFeedback(compression)
    assert not np.isfinite(feedback.sent(0, 0, vector)).all()
    assert np.isfinite(feedback.sent(0, 2, drawn(2, (700,), dtype))).all()  # refused, so reset


@precisions
@pytest.mark.parametrize("size", ["smallest", "largest"])
def test_the_ends_of_the_range_are_compressed(dtype: str, size: str) -> None:
    limits = np.finfo(dtype)
    numbers = {"smallest": limits.smallest_subnormal, "largest": limits.max / 2}[size]
    vector = drawn(4, (700,), dtype)
    vector = np.clip(vector, -1, 1) * numbers
    found = Int8().compressed(vector)
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(Int8().compressed(found), found)
    assert np.abs(found - vector).max() <= max(np.abs(vector).max() / 127, limits.tiny)


# --- error feedback ---


@each
@precisions
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), wire=st.sampled_from(["float64", "float32", "bfloat16"]))
def test_what_is_sent_and_the_residual_are_what_was_to_be_sent(
    compression: Compression, dtype: str, seed: int, wire: str
) -> None:
    """Exactly: with gradients whose sums are not rounded, nothing at all is lost."""

    def rounded(vector: Array) -> Array:
        return converted(converted(vector, number_type(wire)), vector.dtype)

    rng = np.random.default_rng(seed)
    feedback = ErrorFeedback(compression, rounded)
    total = np.zeros(40)
    sent = np.zeros(40)
    for sequence in range(6):
        gradient = rng.integers(-1000, 1000, 40).astype(dtype) / 64
        total += gradient
        message = feedback.sent(7, sequence, gradient)
        np.testing.assert_array_equal(message, rounded(message))
        sent += message
        _, residual = feedback._residuals[7]
        np.testing.assert_array_equal(sent + residual, total)


@each
@precisions
def test_the_residual_is_not_rounded(compression: Compression, dtype: str) -> None:
    for seed in range(5):
        vector = drawn(seed, (300,), dtype)
        feedback = ErrorFeedback(compression)
        sent = feedback.sent(0, 0, vector)
        _, residual = feedback._residuals[0]
        for whole, part, rest in zip(vector, sent, residual, strict=True):
            assert Fraction(float(whole)) == Fraction(float(part)) + Fraction(float(rest))


@each
def test_a_missing_number_resets_the_residual_of_its_worker_alone(
    compression: Compression,
) -> None:
    feedback = ErrorFeedback(compression)
    vectors = [drawn(seed, (300,), "float64") for seed in range(3)]
    for worker in (0, 1):
        feedback.sent(worker, 0, vectors[0])
    residual = feedback._residuals[1][1]
    assert residual.any()
    np.testing.assert_array_equal(
        feedback.sent(0, 2, vectors[1]), compression.compressed(vectors[1])
    )
    np.testing.assert_array_equal(
        feedback.sent(1, 1, vectors[1]), compression.compressed(vectors[1] + residual)
    )


# --- runs in virtual time ---


SINGLE = {"kind": "tests.support.plugins:single", "options": {"dim": 3, "dtype": "float32"}}


@pytest.mark.parametrize(
    ("problem", "cluster"),
    [
        ({"kind": "quadratic"}, {}),
        ({"kind": "quadratic"}, {"mode": "sync"}),
        ({"kind": "logistic"}, {"workers": 1}),
        (SINGLE, {"workers": 1}),
    ],
    ids=str,
)
def test_all_entries_are_no_compression(
    tmp_path: Path, problem: dict[str, Any], cluster: dict[str, Any]
) -> None:
    whole = finished(configure(cluster, problem=problem), tmp_path / "whole")
    kept = finished(configure(cluster | ALL, problem=problem), tmp_path / "all")
    np.testing.assert_array_equal(kept.parameters, whole.parameters)
    assert kept.loss.equals(whole.loss)
    assert kept.trace.equals(whole.trace)


SETTINGS: list[dict[str, Any]] = [
    {},
    {"wire_dtype": "bfloat16"},
    {"schedule": "uniform"},
    {"mode": "sync"},
    {"discard_above": 2},
    {"mode": "buffered", "gradients_per_update": 3, "discard_above": 1},
    {"mode": "sync", "gradients_per_update": 2, "late": "keep"},
]


@pytest.mark.parametrize("compression", [TOP, BYTES], ids=lambda one: one["compression"])
@pytest.mark.parametrize("cluster", SETTINGS, ids=str)
def test_a_simulated_run_verifies(
    tmp_path: Path, cluster: dict[str, Any], compression: dict[str, Any]
) -> None:
    run = finished(configure(cluster | compression), tmp_path / "run")
    assert findings(run) == []
    resets = [event for event in run.events if event["event"] == "state_reset"]
    assert len(resets) == len(run.discarded)
    assert bool(resets) == ("discard_above" in cluster)
    assert make_config(json.loads((run.path / "config.json").read_text())) == run.config


TABLES: list[dict[str, Any]] = [
    {"optimizer": {"rule": "adam", "learning_rate": 0.01, "clip_norm": 0.5}},
    {"optimizer": {"local_steps": 3, "local_learning_rate": 0.02}},
    {
        "optimizer": {
            "local_steps": 3,
            "local_learning_rate": 0.02,
            "local_rule": "momentum",
            "local_state": "keep",
        }
    },
    {"optimizer": {"batch_schedule": {"at": [60], "values": [5]}}},
    {"data": {"sampling": "epoch"}},
    {"simulation": {"staleness": "geometric"}},
    {"problem": SINGLE},
]


@pytest.mark.parametrize("compression", [TOP, BYTES], ids=lambda one: one["compression"])
@pytest.mark.parametrize("tables", TABLES, ids=str)
def test_rules_local_steps_and_epochs_verify(
    tmp_path: Path, tables: dict[str, Any], compression: dict[str, Any]
) -> None:
    run = finished(configure(compression, **tables), tmp_path / "run")
    assert findings(run) == []
    assert run.loss["loss"].iloc[-1] < run.loss["loss"].iloc[0]


def test_a_push_by_hand() -> None:
    """The residual is added, and push 2 is missing, and the residual with it."""
    config = configure({"compression": "int8", "wire_dtype": "bfloat16"})
    problem = make_problem(config)
    draws = WorkerDraws(config, problem)
    pushes, start = Pushes(config, problem, draws), starting_point(problem, 0)
    residual = np.zeros_like(start)
    for sequence in (0, 1, 3):
        if sequence == 3:
            residual[:] = 0.0
        whole = problem.gradient(start, draws.batch(1, sequence, 3)) + residual
        scale = 2.0 ** np.ceil(np.log2(np.abs(whole).max() / 127))  # one block
        expected = np.rint(whole / scale) * scale
        residual = whole - expected
        np.testing.assert_array_equal(pushes.push(1, sequence, start, 3), expected)
        start = np.round(16 * (start - 5 * expected)) / 16  # as bfloat16 has it


def test_compressed_steps_reach_the_minimum_that_whole_ones_reach(tmp_path: Path) -> None:
    """One of 31 entries a time; without the residual, most would never be moved."""
    problem = {"kind": "logistic", "l2": 0.1}
    tables: dict[str, Any] = {"optimizer": {"learning_rate": 0.1, "batch_size": 400}}
    long = {"run": {"updates": 3000, "eval_every": 3000}}
    final = {}
    for share in (1.0, 1 / 31):
        cluster = {"workers": 2, "compression": "top_k", "compression_share": share}
        config = make_config({"problem": problem, "cluster": cluster, **tables, **long})
        final[share] = finished(config, tmp_path / str(share)).loss["loss"].iloc[-1]
    assert final[1 / 31] == pytest.approx(final[1.0], rel=2e-3)


def test_sgd_on_the_sum_of_compressed_gradients_is_a_residual_away_from_plain_sgd() -> None:
    """With one worker, x - eta (g + ...) differs from plain SGD by eta e, at any time."""
    rng = np.random.default_rng(8)
    feedback = ErrorFeedback(TopK(0.1))
    x = plain = np.zeros(50)
    for sequence in range(300):
        gradient = rng.standard_normal(50)
        plain = plain - 0.1 * gradient
        x = x - 0.1 * feedback.sent(0, sequence, gradient)
    _, residual = feedback._residuals[0]
    np.testing.assert_allclose(x - plain, 0.1 * residual, rtol=1e-10, atol=1e-13)
    assert np.abs(residual).max() < 30  # ten gradients, not three hundred


# --- memory, refusals ---


def test_vectors_that_a_rule_of_pushes_holds_are_counted() -> None:
    feedback = ErrorFeedback(Int8())
    local = LocalSteps.of(configure({}, optimizer={"local_steps": 2, "local_learning_rate": 0.1}))
    assert PushRule(None, None).vectors(7) == 0
    assert PushRule(None, feedback).vectors(7) == PushRule(None, feedback).vectors(0) + 7
    assert PushRule(local, feedback).vectors(7) >= PushRule(None, feedback).vectors(7)


@pytest.mark.parametrize(
    ("cluster", "optimizer", "message"),
    [
        ({"compression": "zip"}, {}, r"cluster.compression = 'zip': expected "),
        (
            {"compression_share": 0.1},
            {},
            r"compression_share = 0.1 does not belong to compression = 'none': expected it with",
        ),
        (
            BYTES | {"compression_share": 0.1},
            {},
            r"compression_share = 0.1 does not belong to compression = 'int8': expected it with",
        ),
        (TOP | {"compression_share": 0.0}, {}, r"cluster.compression_share = 0.0: expected "),
        (TOP | {"compression_share": 1.5}, {}, r"cluster.compression_share = 1.5: expected "),
        (
            BYTES,
            {"rule": "delay_compensated"},
            r"cluster.compression = 'int8' does not go with optimizer.rule = 'delay_compensated'",
        ),
    ],
)
def test_keys_that_do_not_go_together_are_refused(
    cluster: dict[str, Any], optimizer: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as refused:
        configure(cluster, optimizer=optimizer)
    assert "\n" not in str(refused.value)


def test_a_hundredth_is_kept_by_default() -> None:
    assert configure({"compression": "top_k"}).cluster.compression_share == 0.01
    assert configure({}).cluster.compression_share is None
