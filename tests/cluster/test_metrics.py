"""Metrics, as read by TensorBoard from its files and by Prometheus from the page of Ray."""

from __future__ import annotations

import importlib.util
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from asgd.config.make import make_config
from asgd.config.tables import MetricsConfig
from asgd.errors import InputError
from asgd.progress import Progress
from asgd.rundir.reader import read_run
from cluster.launch import run
from cluster.metrics import TENSORBOARD, Evaluated, Metrics, Readings, TensorBoard, check_metrics

SHOWN = ("loss", "metric", "gradient_norm", "staleness_recent", "staleness_count", "updates_total")
SCALARS = ["gradient_norm", "loss", "staleness/mean", "staleness/recent", "updates_per_second"]


def trace(first: int, staleness: list[int], norm: float = 1.0) -> dict[str, np.ndarray]:
    update = np.arange(first, first + len(staleness))
    return {
        "update": update,
        "staleness": np.array(staleness, dtype=np.int64),
        "gradient_norm": norm * (1.0 + update),
    }


def read(directory: Path) -> EventAccumulator:
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0, "histograms": 0})
    return events.Reload()


def test_readings_do_not_depend_on_how_the_trace_is_cut() -> None:
    rng = np.random.default_rng(0)
    staleness, at = rng.integers(0, 9, 40).tolist(), (0, 15, 30)
    losses = [Evaluated(update, update / 10, 1.0 / (1 + update)) for update in at]
    whole = Readings().take(trace(0, staleness), losses)
    assert [reading.update for reading in whole] == [0, 15, 30]
    assert whole[1].staleness_recent == pytest.approx(np.mean(staleness[:15]))
    assert whole[2].staleness_recent == pytest.approx(np.mean(staleness[15:30]))
    assert whole[2].staleness_mean == pytest.approx(np.mean(staleness[:30]))
    assert whole[2].gradient_norm == pytest.approx(np.mean(np.arange(15, 30) + 1))
    assert whole[2].updates_per_second == pytest.approx(10)
    pieces, parts = Readings(), []
    for first in range(0, 40, 8):
        last = first + 8
        due = [row for row in losses if first < row[0] <= last or row[0] == first == 0]
        parts += pieces.take(trace(first, staleness[first:last]), due)
    np.testing.assert_equal([vars(r) for r in parts], [vars(r) for r in whole])


# A recorder never closes its file: its process ends with the run.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_recovered_run_hides_its_lost_updates(tmp_path: Path) -> None:
    lost = TensorBoard(tmp_path / TENSORBOARD, epoch=1)
    first = Metrics([lost])
    first.show(trace(0, [3, 1, 2, 0]), [Evaluated(k, float(k), 9.0) for k in range(5)])
    again = TensorBoard(tmp_path / TENSORBOARD, epoch=2, known=2)
    second = Metrics([again])
    second.show(trace(2, [5, 5]), [Evaluated(3, 3.0, 7.0), Evaluated(4, 4.0, 7.0)])
    events = read(tmp_path / TENSORBOARD)
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [
        (0, 9.0),
        (1, 9.0),
        (2, 9.0),
        (3, 7.0),
        (4, 7.0),
    ]
    (shown,) = events.Histograms("staleness")
    assert shown.step == 4
    assert shown.histogram_value.num == 2
    assert shown.histogram_value.sum == 10


class _Scraped(Exception):
    """The page has been read, so the run may end."""


def test_readers_see_a_real_run(shared_ray: None, tmp_path: Path) -> None:
    config = make_config(
        {
            "problem": {"kind": "tests.support.plugins:measured"},
            "optimizer": {"learning_rate": 0.01},
            "cluster": {"workers": 2, "compute_time": {"law": "constant", "mean": 0.002}},
            "run": {"updates": 1_000_000, "eval_every": 50},
            "metrics": {"tensorboard": True, "prometheus": True},
        }
    )
    pages: list[str] = []

    def scrape(_: Progress) -> None:
        """Read the page as Prometheus does; end the run when the page is complete."""
        events = [e for e in read_run(tmp_path / "run").events if e["event"] == "metrics"]
        if not events:  # the recorder is still starting
            return
        (url,) = [event["url"] for event in events]
        assert url.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(url, timeout=30) as answer:
            page = answer.read().decode()
        # Ray publishes metrics one by one.
        if all(f"ray_asgd_{name}" in page for name in (*SHOWN, "updates_per_second")):
            pages.append(page)
            raise _Scraped

    with pytest.raises(_Scraped):
        run(config, tmp_path / "run", progress=scrape)
    record = read_run(tmp_path / "run")
    families = text_string_to_metric_families(pages[0])
    samples = {s.name: s.value for f in families for s in f.samples if s.labels.get("run") == "run"}
    assert samples["ray_asgd_loss"] in record.loss["loss"].to_numpy()
    assert 0 <= samples["ray_asgd_staleness_recent"] < 3
    assert 0 < samples["ray_asgd_updates_total"] <= len(record.trace)
    assert samples["ray_asgd_staleness_count"] == samples["ray_asgd_updates_total"]
    assert samples["ray_asgd_gradient_norm"] > 0
    assert samples["ray_asgd_metric"] in record.metrics.to_numpy()
    assert samples["ray_asgd_updates_per_second"] > 0

    events = read(tmp_path / "run" / TENSORBOARD)
    # TensorBoard takes letters, digits and few signs.
    metrics = [f"metrics/{name.replace('=', '_')}" for name in record.metrics]
    assert sorted(events.Tags()["scalars"]) == sorted([*SCALARS, *metrics])
    shown = [event.value for event in events.Scalars("metrics/distance")]
    np.testing.assert_allclose(shown, record.metrics["distance"], rtol=1e-6)
    loss = events.Scalars("loss")
    assert [event.step for event in loss] == record.loss["update"].tolist()
    np.testing.assert_allclose([event.value for event in loss], record.loss["loss"], rtol=1e-6)
    mean = events.Scalars("staleness/mean")[-1]
    assert mean.value == pytest.approx(record.trace["staleness"][: mean.step].mean(), rel=1e-6)
    counted = [event.histogram_value.num for event in events.Histograms("staleness")]
    assert sum(counted) == len(record.trace)


@pytest.mark.parametrize("name", ["tensorboard", "prometheus"])
def test_a_missing_package_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_metrics(MetricsConfig(**{name: True}))
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    check_metrics(MetricsConfig())
    with pytest.raises(InputError, match=rf'metrics\.{name} = true: .*"\.\[{name}\]"'):
        check_metrics(MetricsConfig(**{name: True}))
