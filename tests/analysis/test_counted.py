"""Fits from counts: the estimates of fits from rows, and intervals and tests as good as theirs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis import fit_run, fit_staleness
from analysis.profile.counted_series import CountedSeries
from analysis.profile.work import work_by_worker
from asgd import Geometric
from asgd.config.make import make_config
from asgd.errors import NoRowsError, UnreliableEstimateError
from asgd.rundir.reader import Run, read_run
from asgd.simulation.simulate import simulate
from tests.asgd.test_cli import asgd

UPDATES = 130_000


def made(path: Path, record: str, updates: int = UPDATES, **tables: dict[str, Any]) -> Run:
    run = {"updates": updates, "eval_every": 50_000, "record": record}
    config = {"problem": {"kind": "quadratic"}, "cluster": {"workers": 5}, "run": run, **tables}
    return read_run(simulate(make_config(config), path))


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run]:
    """The same run, once as rows and once as counts."""
    place = tmp_path_factory.mktemp("runs")
    times = {"law": "gamma", "mean": [0.01, 0.01, 0.01, 0.012, 0.02]}
    cluster = {"workers": 5, "compute_time": times}
    rows, counts = (
        made(place / record, record, cluster=cluster) for record in ("updates", "counts")
    )
    return rows, counts


def test_laws_from_counts_are_those_from_rows(both: tuple[Run, Run]) -> None:
    rows, counts = both
    found = fit_run(counts)
    trace = rows.trace
    expected = fit_staleness(trace["staleness"], 5, trace["worker"], start_up=found.start_up)
    assert found.start_up % counts.staleness_counts.span == 0
    assert 0 < found.start_up <= UPDATES // 2
    assert found.laws.keys() == expected.laws.keys()
    for name, fit in expected.laws.items():
        assert found.laws[name].law == fit.law
        for number in ("llf", "aic", "bic", "tv"):
            assert getattr(found.laws[name], number) == getattr(fit, number)
    pd.testing.assert_series_equal(found.counts, expected.counts)
    pd.testing.assert_frame_equal(found.per_worker, expected.per_worker, check_dtype=False)
    assert found.recommended == expected.recommended
    assert found.grade == expected.grade
    assert found.workers == expected.workers == 5
    assert found.conservation is not None
    assert found.conservation.holds
    assert found.drift.distance == pytest.approx(expected.drift.distance, abs=0.003)
    np.testing.assert_allclose(found.drift.parts["mean"], expected.drift.parts["mean"], atol=0.05)


def test_intervals_from_counts_are_as_wide_as_from_rows(both: tuple[Run, Run]) -> None:
    """A standard error from n blocks is uncertain by about 1/sqrt(2n); here n is about 60."""
    rows, counts = both
    found, expected = fit_run(counts), fit_run(rows)
    assert found.sample.blocks > 15
    for name, key in (("negative_binomial", "mu"), ("geometric_mixture", "mus")):
        widths = [
            np.mean(np.subtract(*fit.laws[name].confidence_interval()[key][::-1]))
            for fit in (found, expected)
        ]
        assert widths[0] == pytest.approx(widths[1], rel=0.5)
    assert found.shape.zeros_error == pytest.approx(expected.shape.zeros_error, rel=0.5)


@pytest.mark.parametrize("seed", range(3))
def test_a_true_law_is_not_rejected_and_covered(tmp_path: Path, seed: int) -> None:
    config = {"simulation": {"staleness": "geometric", "mean_staleness": 4.0}}
    run = {"updates": 110_000, "eval_every": 50_000, "record": "counts", "seed": seed}
    path = simulate(make_config({"problem": {"kind": "quadratic"}, "run": run, **config}), tmp_path)
    fit = fit_run(path)
    assert fit.grade == "holds"
    assert fit.laws["negative_binomial"].pvalue > 0.01
    assert fit.laws["poisson"].pvalue <= 0.01
    low, high = fit.laws["geometric"].confidence_interval(0.999)["mu"]
    assert low <= 0.8 <= high
    error = (high - low) / (2.0 * 3.29)
    assert error == pytest.approx(0.2 * np.sqrt(0.8 / fit.sample.size), rel=0.4)
    assert fit.effective_size == pytest.approx(fit.sample.size, rel=0.6)


def test_a_series_gets_the_law_without_more_scatter(both: tuple[Run, Run]) -> None:
    """All quantiles are used once, so the histogram of the whole has none at all."""
    sample = CountedSeries.of_run(both[1]).sample
    law = Geometric(0.8)
    cells = sample.with_law(law, np.random.default_rng(0))
    found = cells.chosen(np.arange(cells.number))
    assert found.updates.sum() == sample.cells * sample.span
    off = found.updates / found.updates.sum() - law.pmf(found.staleness)
    assert np.abs(off).max() < 2.0 / found.updates.sum()


def test_stragglers_policies_and_short_runs(tmp_path: Path) -> None:
    cluster = {"workers": 4, "mode": "buffered", "gradients_per_update": 3, "discard_above": 4}
    runs = [
        made(tmp_path / record, record, 40_000, cluster=cluster) for record in ("updates", "counts")
    ]
    pd.testing.assert_frame_equal(*map(work_by_worker, runs), check_dtype=False)
    rows, counts = map(fit_run, runs)
    assert counts.nouns == rows.nouns
    assert counts.workers is None
    assert counts.sample.size + counts.start_up == rows.sample.size + rows.start_up == 120_000
    assert counts.mu == pytest.approx(rows.mu, abs=0.01)
    short = made(tmp_path / "short", "counts", 20_000)
    with pytest.raises(UnreliableEstimateError, match="of them effectively independent"):
        fit_run(short)


def test_commands_on_counts(
    both: tuple[Run, Run], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rows, counts = both
    status, said, _ = asgd(capsys, "profile", counts.path, "--json", "-q")
    assert status == 0
    assert json.loads(said)["law"] == fit_run(counts).recommended.to_dict()
    status, said, _ = asgd(capsys, "profile", counts.path, rows.path, "-q")
    assert status == 0
    assert 'run.record = "counts" keeps no rows, so start-up and intervals' in said
    for command in ("predict", "report", "plan"):
        status, _, said = asgd(capsys, command, counts.path, *["-q"])
        assert status == 2
        assert str(NoRowsError(counts.path)) in said
        assert said.count("\n") == 1
