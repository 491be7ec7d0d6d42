"""Analysis of records: a known law is recovered, items of a step are a cluster, all commands."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import asgd
from analysis.profile.fit import StalenessFit
from analysis.records.course import staleness_course
from analysis.records.fit import fit_record
from analysis.records.means import profile_means
from analysis.records.study import RecordStudy
from asgd.__main__ import main
from asgd.errors import UnreliableEstimateError
from tests.support import logs

MU = 0.7
N = 4000
STALENESS = np.asarray(asgd.Geometric(MU).rvs(N, np.random.default_rng(11)))


def run(*words: object) -> None:
    main([str(word) for word in words])


def test_a_record_of_one_item_is_too_short_without_a_warning(tmp_path: Path) -> None:
    record = asgd.from_frame(logs.frame(STALENESS[:1]), tmp_path / "r", columns=logs.COLUMNS)
    with pytest.raises(UnreliableEstimateError, match="1 item after a start-up of 0"):
        fit_record(record)


@pytest.mark.parametrize("name", logs.ITEMS)
def test_a_known_law_is_recovered_from_every_format(name: str, tmp_path: Path) -> None:
    write, columns = logs.ITEMS[name]
    record = asgd.import_log(write(tmp_path, STALENESS), tmp_path / "record", columns=columns)
    fit = fit_record(record)
    kept = len(fit.sample.staleness)
    error = (1.0 - MU) * np.sqrt(MU / kept)  # of the maximum-likelihood estimate
    assert kept > 0.9 * N
    assert abs(fit.mu - MU) < 3.0 * error
    assert fit.grade == "holds"
    assert fit.conservation is None


def test_items_of_one_step_are_one_cluster(tmp_path: Path) -> None:
    """The rate differs little between steps: hardly visible in items, but large for the mean."""
    steps, each, rate, spread = 600, 128, 2.0, 0.15
    rng = np.random.default_rng(3)
    rates = rate + spread * rng.choice([-1.0, 1.0], steps)
    stale = rng.poisson(np.repeat(rates, each))
    update = np.repeat(500 + np.arange(steps), each)
    frame = logs.frame(stale).assign(total_agg=update, version=update - stale)
    fit = fit_record(asgd.from_frame(frame, tmp_path / "record", columns=logs.COLUMNS))
    kept = len(fit.sample.staleness)
    expected = kept * (rate + spread**2) / (rate + each * spread**2)
    # The variance from blocks of b of m items has relative error sqrt(4/3 b/m); three are allowed.
    scatter = 3.0 * np.sqrt(4.0 / 3.0 * fit.sample.block / kept)
    assert expected * (1.0 + scatter) < 0.9 * kept  # independent items would not pass
    assert expected / (1.0 + scatter) < fit.effective_size < expected * (1.0 + scatter)
    low, high = fit.laws["poisson"].confidence_interval()["rate"]
    width = 2 * 1.96 * np.sqrt((rate + spread**2) / expected)
    assert width / np.sqrt(1.0 + scatter) < high - low < width * np.sqrt(1.0 + scatter) * 1.1


def test_few_steps_are_too_few_with_any_number_of_items(tmp_path: Path) -> None:
    update = np.repeat(np.arange(29), 40)
    frame = pd.DataFrame({"update": update, "staleness": np.arange(len(update)) % 3})
    with pytest.raises(UnreliableEstimateError, match="of them effectively independent"):
        fit_record(asgd.from_frame(frame, tmp_path / "record"))


def test_p_minus_one_is_checked_only_where_snapshots_are_used_once(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    worker = rng.integers(0, 6, 4000)
    read, last = np.zeros(4000, np.int64), np.zeros(6, np.int64)
    for update, who in enumerate(worker):
        read[update], last[who] = last[who], update + 1
    frame = logs.frame(np.arange(4000) - read).assign(
        total_agg=np.arange(4000), version=read, client_id=worker
    )
    fit = fit_record(asgd.from_frame(frame, tmp_path / "server", columns=logs.COLUMNS))
    assert fit.workers == 6
    assert fit.conservation is not None
    assert fit.conservation.holds
    shared = asgd.from_frame(logs.frame(STALENESS), tmp_path / "shared", columns=logs.COLUMNS)
    assert fit_record(shared).conservation is None


def test_sentences_name_the_unit_and_the_items(tmp_path: Path) -> None:
    record = asgd.import_log(logs.prime_rl(tmp_path, STALENESS[:640]), tmp_path / "record")
    text = str(fit_record(record))
    assert "items of " in text
    assert " steps, as good as " in text
    assert " % of items have staleness 0" in text
    assert "predict" not in text
    study = RecordStudy(record)
    assert isinstance(study.profile, StalenessFit)
    assert study.workers is None


def test_items_that_share_an_update_are_items_of_steps_in_any_unit(
    tmp_path: Path,
) -> None:
    update = np.arange(640) // 4
    table = pd.DataFrame({"update": update, "staleness": np.minimum(STALENESS[:640], update)})
    columns = {"update": "update", "staleness": "staleness"}
    asgd.from_frame(table, tmp_path / "record", columns=columns, unit="versions")
    run("report", tmp_path / "record")
    page = (tmp_path / "record" / "report.html").read_text(encoding="utf-8")
    assert "640 items of 160 steps, imported" in page
    assert "Staleness in versions." in page


def test_means_give_a_mean_bounds_and_drift_and_no_law(tmp_path: Path) -> None:
    profile = profile_means(asgd.import_log(logs.verl(tmp_path), tmp_path / "record"))
    assert abs(profile.mean - 1.5) < 3.0 * max(profile.standard_error, 1e-9)
    assert (profile.smallest, profile.largest, profile.drifts) == (0.0, 3.0, False)
    assert profile.beyond(1) == pytest.approx(((1.5 - 1) / (3 - 1), 1.5 / 2))
    assert profile.beyond(3) == (0.0, 0.0)
    assert "No law can be fitted from means" in str(profile)
    with pytest.raises(asgd.InputError, match="no law can be fitted"):
        fit_record(asgd.read_record(tmp_path / "record"))
    with pytest.raises(UnreliableEstimateError, match="5 steps"):
        profile_means(asgd.import_log(logs.verl(tmp_path, 5), tmp_path / "short"))


def test_means_are_weighted_by_their_items_and_drift_is_seen(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    rows = [
        {"step": i, "mean": (3.0 if i % 2 else 1.0) + 0.01 * rng.normal(), "items": 1 + 2 * (i % 2)}
        for i in range(100)
    ]
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    columns = {"step": "step", "mean": "mean", "items": "items"}
    found = profile_means(asgd.import_log(path, tmp_path / "weighted", columns=columns))
    assert found.weighted
    assert found.mean == pytest.approx(2.5, abs=0.01)
    for row in rows[50:]:
        row["mean"] += 1.0
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert profile_means(asgd.import_log(path, tmp_path / "drift", columns=columns)).drifts


SHORT = STALENESS[:480]


@pytest.mark.parametrize("name", [*logs.ITEMS, *logs.MEANS])
def test_every_format_goes_from_import_to_report(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if name in logs.MEANS:
        source, columns = logs.MEANS[name](tmp_path), dict[str, str]()
    else:
        write, columns = logs.ITEMS[name]
        source = write(tmp_path, SHORT)
    record = tmp_path / "runs" / "theirs"
    words = ["--columns", ",".join(f"{a}={b}" for a, b in columns.items())] if columns else []
    run("import", source, "--out", record, *words)
    assert capsys.readouterr().out == f"{record}\n"
    run("status", record)
    assert "staleness" in capsys.readouterr().out
    run("runs", tmp_path / "runs")
    count = "steps" if name in logs.MEANS else "items"
    assert re.search(rf" [\d,]+ {count} ", capsys.readouterr().out)
    run("runs", tmp_path / "runs", "--json")
    assert json.loads(capsys.readouterr().out)["runs"][0]["state"] == "finished"
    run("profile", record, "--json")
    profile = json.loads(capsys.readouterr().out)
    assert (profile["law"] is None) == (name in logs.MEANS)
    assert profile["unknown"] == asgd.read_record(record).about.unknown
    run("verify", record)
    assert "no faults" in capsys.readouterr().out
    run("report", record, "--figures", tmp_path / "figures")
    page = (record / "report.html").read_text(encoding="utf-8")
    assert "no loss is predicted" in page
    axis = "steps" if name in (*logs.MEANS, "prime-rl") else asgd.read_record(record).about.unit
    assert f"Staleness over the {axis} of the record" in page
    if name == "prime-rl":
        assert re.search(r"[\d,]+ items of [\d,]+ steps", page)
    assert ("Logged loss" in page) == (name in ("csv", "verl", "RLlib json"))
    assert (tmp_path / "figures" / "staleness-course.svg").exists()


def test_the_course_does_not_split_the_items_of_a_step(tmp_path: Path) -> None:
    record = asgd.import_log(logs.prime_rl(tmp_path, SHORT), tmp_path / "record")
    course = staleness_course(record)  # 60 steps of 8 items: fewer than its parts
    assert course["update"].tolist() == list(range(1000, 1060))
    assert course["mean"].tolist() == SHORT.reshape(60, 8).mean(axis=1).tolist()
    long = asgd.from_frame(logs.frame(STALENESS), tmp_path / "long", columns=logs.COLUMNS)
    course = staleness_course(long)
    assert len(course) == 100
    assert course["mean"].mean() == pytest.approx(STALENESS.mean())


def test_the_caption_names_a_band_only_if_one_is_known(tmp_path: Path) -> None:
    asgd.import_log(logs.rllib_json(tmp_path), tmp_path / "rllib")
    asgd.import_log(logs.verl(tmp_path), tmp_path / "verl")
    for name, caption in (("rllib", "Mean staleness."), ("verl", "smallest to largest.")):
        run("report", tmp_path / name)
        page = (tmp_path / name / "report.html").read_text(encoding="utf-8")
        assert caption in page
        assert ("smallest to largest" in page) == (name == "verl")


def test_a_hostile_log_cannot_write_into_the_page(tmp_path: Path) -> None:
    hostile = "<script>window.hacked = 1</script>"
    frame = logs.frame(SHORT).assign(client_id=hostile)
    asgd.from_frame(frame, tmp_path / "record", columns=logs.COLUMNS)
    run("report", tmp_path / "record")
    page = (tmp_path / "record" / "report.html").read_text(encoding="utf-8")
    assert hostile not in page
    assert "&lt;script&gt;window.hacked" in page


def test_a_report_of_a_record_and_a_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asgd.from_frame(logs.frame(SHORT), tmp_path / "record", columns=logs.COLUMNS)
    with pytest.raises(SystemExit) as ended:
        main(["report", str(tmp_path / "record"), str(tmp_path / "run")])
    assert ended.value.code == 2
    assert "expected it alone" in capsys.readouterr().err
