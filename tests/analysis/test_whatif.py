"""The effects of a cap and of other numbers of samplers, compared with known limits."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import analysis
import asgd
from analysis.records.study import RecordStudy
from analysis.records.whatif import what_if, with_samplers
from asgd.__main__ import main
from asgd.arrays import Integers
from tests.support import logs

MU, N = 0.7, 4000
STALENESS = np.asarray(asgd.Geometric(MU).rvs(N, np.random.default_rng(4)))


def study(path: Path, staleness: Integers, **columns: object) -> RecordStudy:
    frame = pd.DataFrame({"staleness": staleness, **columns})
    return RecordStudy(asgd.from_frame(frame, path / "record"))


def test_constant_staleness_has_the_limits_of_a_constant_delay(tmp_path: Path) -> None:
    found = what_if(study(tmp_path, np.full(600, 7)), caps=[7])
    limit = 2.0 * np.sin(np.pi / 30.0)  # 2 sin(pi / (2 (2 D + 1))), of D = 7
    for value in (found.now.mean, found.now.mean_square, found.now.almost_sure):
        assert value == pytest.approx(limit / 2.0, rel=1e-6)
    half, twice = found.caps("samplers")
    # Half the samplers give staleness 3 or 4, at random; twice as many give exactly 14.
    assert 2.0 * np.sin(np.pi / 18.0) / 2 < half.mean_square < 2.0 * np.sin(np.pi / 14.0) / 2
    assert twice.mean_square == pytest.approx(np.sin(np.pi / 58.0), rel=1e-6)
    momentum = what_if(study(tmp_path / "b", np.full(600, 7)), caps=[7], momentum=0.9)
    assert momentum.now.mean_square == pytest.approx(0.01575 / 3.8, rel=1e-3)


def test_the_costs_of_a_cap_are_those_of_the_geometric_law(tmp_path: Path) -> None:
    found = what_if(study(tmp_path, STALENESS), caps=[1, 2, 4])
    for discard, pace in zip(found.caps("discard"), found.caps("pace"), strict=True):
        assert discard.cap is not None
        beyond = MU ** (discard.cap + 1)
        error = np.sqrt(beyond * (1.0 - beyond) / N)
        assert abs(discard.beyond - beyond) < 3.5 * error
        assert 0.6 * error < discard.beyond_error < 1.6 * error
        delay, scatter = 1.0 / (1.0 - MU), np.sqrt(MU) / (1.0 - MU) / np.sqrt(beyond * N)
        assert abs(pace.delay - delay) < 3.5 * scatter  # memoryless: the same for any cap
        lags, law = np.arange(200), asgd.Geometric(MU).pmf(np.arange(200))
        kept = np.where(lags <= discard.cap, law, 0.0) / (1.0 - beyond)
        cut = np.minimum(lags, discard.cap)
        for choice, values, share, items in (
            (discard, lags, kept, (1.0 - beyond) * N),
            (pace, cut, law, float(N)),
        ):
            mean = float(values @ share)
            spread = np.sqrt(float(values**2 @ share) - mean**2)
            assert abs(choice.mean_staleness - mean) < 3.5 * spread / np.sqrt(items)
    limits = analysis.stability_limits(asgd.Geometric(MU), independent=True)
    assert limits.mean_square is not None
    assert found.now.mean_square == pytest.approx(limits.mean_square.value / 2.0, rel=0.03)
    assert found.caps("discard")[0].gain > found.caps("discard")[2].gain > 1.0


@pytest.mark.parametrize(("workers", "factor"), [(4, 3 / 7), (16, 15 / 7)])
def test_other_numbers_of_memoryless_workers_have_their_law(workers: int, factor: float) -> None:
    rng, m = np.random.default_rng(workers), 100_000
    eight = np.asarray(asgd.Geometric(7 / 8).rvs(m, rng))
    found = with_samplers(eight, factor, rng)
    law = asgd.Geometric(1.0 - 1.0 / workers)
    share = np.bincount(found, minlength=40)[:40] / m
    pmf = law.pmf(np.arange(40))
    assert np.all(np.abs(share - pmf) < 4.5 * np.sqrt(pmf * (1.0 - pmf) / m))


def test_other_numbers_of_workers_in_turn_have_their_law() -> None:
    rng = np.random.default_rng(0)
    assert set(with_samplers(np.full(1000, 7), 3 / 7, rng)) == {3}
    assert set(with_samplers(np.full(1000, 7), 15 / 7, rng)) == {15}
    assert set(with_samplers(np.zeros(10, np.int64), 2.0, rng)) == {0}


def growth(law: np.ndarray, step: float, items: int) -> float:  # type: ignore[type-arg]
    """Return the growth of E x^2 if an update averages `items` gradients of independent lags."""
    size = len(law)
    mean = np.eye(size, k=-1)
    mean[0, 0] = 1.0
    mean[0] -= step * law
    square = np.eye(size)
    for _ in range(3000):
        moved = mean @ square @ mean.T
        spread = law @ np.diag(square) - law @ square @ law
        moved[0, 0] += step**2 * spread / items
        total = float(np.trace(moved))
        square = moved / total
    return total


def test_updates_that_average_items_lie_between_the_two_limits() -> None:
    law = np.array([0.4, 0.1, 0.1, 0.4])
    limits = analysis.stability_limits(asgd.Empirical(tuple(law)), independent=True)
    assert limits.mean_square is not None
    low, high = limits.mean_square.value, limits.mean.value
    assert growth(law, 0.995 * low, 1) < 1.0 < growth(law, 1.005 * low, 1)
    for items in (4, 64):
        assert growth(law, 1.005 * low, items) < 1.0 < growth(law, 1.005 * high, items)


def test_the_share_beyond_a_cap_is_given_by_worker(tmp_path: Path) -> None:
    slow = np.arange(N) % 4 == 0
    staleness = np.where(slow, STALENESS + 3, np.minimum(STALENESS, 2))
    worker = np.where(slow, "far", "near")
    found = what_if(study(tmp_path, staleness, worker=worker), caps=[2])
    assert found.workers is not None
    shares = found.workers.set_index("worker")["beyond 2"]
    assert shares.to_dict() == {"far": 1.0, "near": 0.0}
    assert found.workers["worker"].tolist() == ["far", "near"]


def test_default_caps_are_powers_of_two_that_some_items_exceed(tmp_path: Path) -> None:
    found = what_if(study(tmp_path, STALENESS))
    assert [choice.cap for choice in found.caps("pace")] == [1, 2, 4, 8, 16]
    short = what_if(study(tmp_path / "b", np.minimum(STALENESS, 3)))
    assert [choice.cap for choice in short.caps("pace")] == [1, 2]


def test_a_cap_of_two_is_answered_in_one_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asgd.from_frame(logs.frame(STALENESS), tmp_path / "record", columns=logs.COLUMNS)
    main(["whatif", str(tmp_path / "record"), "--cap", "2"])
    text = capsys.readouterr().out
    assert "The largest stable step is 0." in text
    assert "A cap of 2: discarding drops 3" in text
    assert "client 3" in text
    main(["whatif", str(tmp_path / "record"), "--cap", "2", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert [choice["kind"] for choice in found["choices"]] == [
        "now",
        "discard",
        "pace",
        "samplers",
        "samplers",
    ]
    assert found["choices"][0]["beyond"] is None


def test_a_cap_below_every_item_leaves_no_step_if_items_are_dropped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = study(tmp_path, np.full(600, 7)).path
    main(["whatif", str(path), "--cap", "2"])
    text = capsys.readouterr().out
    assert (
        "A cap of 2: discarding drops every item, and no step is left; pacing delays as many by "
        "5 updates (mean), and allows 2.96 times the step."  # sin(pi/10) / sin(pi/30)
    ) in text
    assert "nan" not in text
    main(["whatif", str(path), "--cap", "2", "--json"])
    discard, pace = json.loads(capsys.readouterr().out)["choices"][1:3]
    assert (discard["beyond"], discard["mean_square"], discard["gain"]) == (1.0, None, None)
    assert pace["mean_square"] == pytest.approx(np.sin(np.pi / 10.0), rel=1e-6)


def test_means_bound_the_share_beyond_a_cap_and_give_no_limit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asgd.import_log(logs.verl(tmp_path), tmp_path / "record")
    main(["whatif", str(tmp_path / "record"), "--cap", "1"])
    text = capsys.readouterr().out
    assert "A cap of 1: between 25 % and 75 % of the items are beyond it" in text
    assert "cannot be told from means" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cap", "-1"], "cap = -1: expected a whole number >= 0"),
        (["--momentum", "1"], "momentum = 1.0: expected a number in [0, 1)"),
    ],
)
def test_bad_options_are_refused(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asgd.from_frame(pd.DataFrame({"staleness": STALENESS + 2}), tmp_path / "record")
    with pytest.raises(SystemExit) as ended:
        main(["whatif", str(tmp_path / "record"), *words])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_run_is_sent_to_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["whatif", str(tmp_path)])
    assert ended.value.code == 2
    assert "`asgd plan`" in capsys.readouterr().err
