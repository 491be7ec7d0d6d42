"""The report: its words, figures and tables in one file; markup from a run is escaped."""

from __future__ import annotations

import csv
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

import msgspec
import numpy as np
import pandas as pd
import pytest

from analysis.exact.limits import Verdict
from analysis.prediction.model import LABELS
from analysis.prediction.predict import Prediction, has_prediction, read_prediction
from analysis.prediction.score import compare
from analysis.profile.fitting import fit_run, fit_staleness
from analysis.report.activity import events_table, timeline, workers_table
from analysis.report.clock import clock_of, seconds_waited
from analysis.report.comparison import (
    common_target,
    compare_runs,
    comparison_headline,
    comparison_verdict,
    labels,
)
from analysis.report.headline import headline
from analysis.report.judgement import verdict
from analysis.report.pictures import Picture, transient
from analysis.report.tables import aligned_numbers, page_table, plain_number
from analysis.report.write import write_report
from analysis.study import Study
from asgd.__main__ import main
from asgd.config.make import make_config
from asgd.errors import DivergedError, InputError
from asgd.rundir.reader import Run, read_run
from asgd.rundir.repair import cut_back
from asgd.rundir.repeats import read_runs, run_repeats
from asgd.rundir.writer import RunWriter
from asgd.simulation.simulate import simulate
from tests.support.reports import HOSTILE, Reports, predicted, simulated_run


class Page(HTMLParser):
    """The elements of a page. Asserts that each end tag closes the last open element."""

    VOID = ("meta", "link", "input", "br", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_report_of_one_run_answers_questions_in_order(reports: Reports) -> None:
    text = reports.text("one")
    questions = re.findall(r"<dt>(.*?)</dt>", text)
    assert questions[:5] == [
        "What was run",
        "Who contributed",
        "How stale",
        "Which law",
        "How well predicted",
    ]
    assert questions[-1] == "What to try"
    heads = re.findall(r"<h2>(.*?)</h2>", text)
    assert heads == [
        "Observed and predicted loss",
        "Errors of each model",
        "Staleness",
        "Workers",
        "Events",
        "Configuration",
        "Environment",
        "Reproduce",
    ]
    assert "300 updates by 4 workers" in text


def test_report_without_a_prediction_says_why(reports: Reports) -> None:
    text = reports.text("unpredicted")
    facts = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", text))
    assert facts["How well predicted"].startswith("Not predicted: staleness fit: 38 updates after")
    assert facts["Which law"].startswith("Too short to tell: ")
    assert facts["How stale"].startswith("Staleness is 0: ")
    assert "40 updates by 1 worker in" in facts["What was run"]
    assert "failed: no reason &lt;script&gt;" in facts["What was run"]
    heads = re.findall(r"<h2>(.*?)</h2>", text)
    assert heads[:3] == ["Observed loss", "Staleness", "Workers"]
    assert 'type="checkbox"' not in text
    assert "asgd predict" not in text.split("<h2>Reproduce</h2>")[1]


def test_several_runs_are_compared_in_words_tables_and_figures(reports: Reports) -> None:
    text = reports.text("several").split('<section class="run"')[0]
    questions = re.findall(r"<dt>(.*?)</dt>", text)
    assert questions == [
        "What was run",
        "How stale",
        "Which law",
        "How well predicted",
        "Stable or not",
        "How fast",
        "What to try",
    ]
    assert re.findall(r'<figure id="([^"]*)"', text) == [
        "runs-loss",
        "runs-target",
        "runs-mu",
        "runs-staleness",
        "runs-errors",
        "runs-speed",
    ]
    names = re.findall(r'aria-label="([^"]* side by side)"', text)
    assert names == ["runs side by side", "errors side by side"]


@pytest.mark.parametrize(
    ("margins", "verdicts", "stability", "advice"),
    [
        (
            (2.0, 1.5),
            ("stable", "stable"),
            "No run is above the limit of the mean square. ",
            "Take the settings of p4: it was the fastest to the target, and is stable.",
        ),
        (
            (2.0, 0.5),
            ("stable", "diverges"),
            "Unstable, above the almost-sure limit or by diverging paths: p4. ",
            "Take the settings of p2: of the stable runs it was the fastest to the target; p4 was "
            "faster but is unstable: it needs",
        ),
        (
            (2.0, 0.9),
            ("stable", "heavy tail"),
            "Heavy tail, above the limit of the mean square or by a few diverging paths: p4. ",
            "Take the settings of p2: of the stable runs it was the fastest to the target; p4 was "
            "faster but is heavy-tailed: it needs",
        ),
        (
            (0.9, 0.5),
            ("heavy tail", "diverges"),
            "Unstable, above the almost-sure limit or by diverging paths: p4. Heavy tail, above "
            "the limit of the mean square or by a few diverging paths: p2. ",
            "Lower the learning rate: every run is unstable or has a heavy tail.",
        ),
        (
            (np.inf, np.inf),
            (None, None),
            None,
            "Take the settings of p4: it was the fastest to the target.",
        ),
    ],
)
def test_a_comparison_names_the_limit_that_each_run_exceeds(
    reports: Reports,
    margins: tuple[float, float],
    verdicts: tuple[Verdict | None, Verdict | None],
    stability: str | None,
    advice: str,
) -> None:
    fits = [fit_run(run) for run in reports.runs]
    compared = compare_runs(["p2", "p4"], reports.runs, fits, [None, None])
    assert compared.models == []
    table = compared.table.assign(seconds_to_target=[2.0, 1.0])
    compared = replace(compared, table=table, clock="real")
    facts = dict(comparison_headline(reports.runs, fits, compared, margins, verdicts))
    assert facts.get("Stable or not", "").startswith(stability or "")
    assert ("Stable or not" in facts) == (stability is not None)
    assert facts["What to try"].startswith(advice)
    assert facts["How well predicted"] == "No model was computed for every run."
    virtual = replace(compared, clock="simulated")
    said = dict(comparison_headline(reports.runs, fits, virtual, margins, verdicts))["What to try"]
    assert ("in virtual time" in said) == ("fastest" in said)


@pytest.mark.parametrize(
    ("updates", "advice"),
    [
        ([90, 40], "Take the settings of p4: it took the fewest updates to the target, and is"),
        ([45, 40], "All runs took about as many updates to the target: take the real run that"),
    ],
)
def test_runs_on_different_clocks_are_never_ranked_in_seconds(
    reports: Reports, updates: list[int], advice: str
) -> None:
    fits = [fit_run(run) for run in reports.runs]
    compared = compare_runs(["p2", "p4"], reports.runs, fits, [None, None])
    table = compared.table.assign(seconds_to_target=[1e-9, 9.0], updates_to_target=updates)
    mixed = replace(compared, table=table, clock="mixed")
    facts = dict(comparison_headline(reports.runs, fits, mixed, (2.0, 2.0), ("stable", "stable")))
    assert facts["What to try"].startswith(advice)
    assert "are compared in updates." in facts["How fast"]
    assert " s;" not in facts["How fast"]


def as_real(run: Run, path: Path) -> Run:
    """Return a copy of a simulated run with the events of a real one, 20 s from start to end."""
    shutil.copytree(run.path, path)
    lines = [
        {"event": "start", "time": 1000.0},
        {"event": "worker_joined", "time": 1014.0, "worker": 0, "update": 0},
        {"event": "finish", "time": 1020.0},
    ]
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    (path / "events.jsonl").write_text(text, encoding="utf-8")
    return read_run(path)


def test_a_real_and_a_simulated_run_side_by_side(reports: Reports, tmp_path: Path) -> None:
    real = as_real(reports.runs[0], tmp_path / "real")
    assert [clock_of(run) for run in (real, reports.runs[1])] == ["real", "simulated"]
    page = write_report([real.path, reports.runs[1].path], tmp_path / "mixed.html")
    text = page.read_text("utf-8")
    compared = text.split('<section class="run"')[0]
    assert "1 real and 1 simulated runs" in compared
    assert "updates to target" in compared
    for absent in ("seconds to target", "updates/s", "runs-speed", "time (s)"):
        assert absent not in compared
    for badge in ("real", "simulated"):
        assert text.count(f'<span class="badge {badge}">{badge}</span>') == 2  # list and section
    assert "The whole command took 20 s, with starting the processes" in text
    assert "s of virtual time" in text


def test_the_wait_of_a_restored_run_is_unknown(reports: Reports, tmp_path: Path) -> None:
    run = as_real(reports.runs[0], tmp_path / "real")
    assert seconds_waited(run) == 20.0
    RunWriter(run.path).event("server_restored", to_version=3)
    assert seconds_waited(read_run(run.path)) is None


@pytest.mark.parametrize(
    ("error", "scatter", "said"),
    [
        (0.005, 0.005, "Predicted within chance by the SME with the measured law: error 0.5 %, "),
        (0.012, 0.005, "Predicted within chance by"),  # allowed, because points are correlated
        (0.02, 0.005, "Predicted closely, but not within chance, by the SME with the measured"),
        (0.10, 0.005, "Predicted roughly, but not within chance"),
        (0.20, 0.005, "Predicted badly, but not within chance"),
        (0.20, 0.300, "The scatter is large: repeat the run."),
        (0.02, None, "Predicted closely by the SME with the measured law: error 2 %."),
    ],
)
def test_the_verdict_compares_the_error_with_the_scatter(
    reports: Reports, error: float, scatter: float | None, said: str
) -> None:
    run = reports.runs[1]
    prediction = with_turns(read_prediction(run.path), "by law")
    score = compare(run, prediction)
    models = {n: replace(m, relative_error=0.9 * error) for n, m in score.models.items()}
    models["sme_law"] = replace(models["sme_law"], relative_error=error)
    parts = pd.DataFrame({"error": [error], "noise": [scatter]}, index=["sampling noise"])
    parts = parts.iloc[:0] if scatter is None else parts
    assert said in verdict(run, prediction, replace(score, models=models, parts=parts))
    models["sme_sgd"] = replace(models["sme_sgd"], relative_error=0.5)
    found = verdict(run, prediction, replace(score, models=models, parts=parts))
    assert ("Without staleness the error would be 50 %." in found) == (scatter is not None)


def test_the_report_of_a_diverged_run_names_a_stable_rate(tmp_path: Path) -> None:
    tables = {"problem": {"kind": "least_squares"}, "optimizer": {"learning_rate": 8.0}}
    with pytest.raises(DivergedError):
        simulate(make_config(tables), tmp_path / "run")
    text = write_report(tmp_path / "run").read_text("utf-8")
    assert ">Diverged: a learning rate of 8 is too large for this staleness.<" in text
    facts = dict(re.findall(r"<dt>(.*?)</dt>\s*<dd>(.*?)</dd>", text, re.DOTALL))
    assert "the largest stable learning rate is 0." in facts["What to try"]
    assert "Worker" not in facts["What to try"]  # ten updates are too few to judge workers
    assert "largest stable" not in facts["How well predicted"]


@pytest.mark.parametrize(
    ("errors", "scatter", "said", "closest"),
    [
        ((0.02, 0.03), 0.02, "within chance in every run: error 2 % to 3 %, scatter 2 %.", "none,"),
        ((0.02, 0.2), 0.02, "within chance in 1 of 2 runs: error 2 % to 20 %, scatter", "SME with"),
        ((0.2, 0.2), 0.005, "within chance in no run: error 20 %, scatter 0.5 %.", "SME with"),
        ((0.02, 0.03), None, "Predicted with an error of 2 % to 3 %.", "SME with"),
    ],
)
def test_the_verdict_on_several_runs_considers_their_scatter(
    reports: Reports, errors: tuple[float, ...], scatter: float | None, said: str, closest: str
) -> None:
    run, scores = reports.runs[1], []
    score = compare(run, read_prediction(run.path))
    for error in errors:
        far = 1.2 * error + 0.005  # the error of the other models
        models = {n: replace(m, relative_error=far) for n, m in score.models.items()}
        models["sme_law"] = replace(models["sme_law"], relative_error=error)
        parts = pd.DataFrame({"error": [error], "noise": [scatter]}, index=["sampling noise"])
        scores.append(replace(score, models=models, parts=parts if scatter else parts.iloc[:0]))
    assert said in comparison_verdict(scores)
    assert comparison_verdict([*scores, None]) == "Predicted are 2 of 3 runs."
    compared = compare_runs(["a", "b"], [run, run], [fit_run(run)] * 2, scores)
    facts = comparison_headline([run, run], [fit_run(run)] * 2, compared, [2.0] * 2, [None] * 2)
    assert f"Closest: {closest}" in dict(facts)["How well predicted"]


def test_workers_that_contributed_nothing_are_named(reports: Reports) -> None:
    run = reports.runs[1]
    workers, events = workers_table(run), events_table(run).iloc[:0]

    def said(table: pd.DataFrame) -> str:
        facts = headline([run], fit_run(run), None, None, table, events, missing="no")
        return dict(facts)["Who contributed"]

    even = workers.assign(share=0.25)
    assert said(even) == "4 workers, 25 % of the gradients each."
    assert said(even.iloc[[0, 2]]).endswith(
        "2 workers, 25 % of the gradients each; none by worker 1, 3."
    )


def test_the_page_explains_the_length_of_the_start_up(reports: Reports) -> None:
    run, text = reports.runs[1], reports.text("one")
    fit = fit_run(run)
    last = int(run.trace.loc[run.trace["read_version"] == 0, "update"].iloc[-1])
    assert f"Start-up: {fit.start_up} of 300 updates, dropped up to the last update" in text
    assert f"Here the last gradient computed on version 0 was update {last}, by worker" in text


def test_terms_are_explained_where_they_are_first_used(reports: Reports) -> None:
    text = reports.text("one")
    assert 0 < text.index("continuous ranked probability score") < text.index("CRPS</th>")
    hung = text.index("Measured counts hung from the")
    assert "The top of each bar is the count under the law" in text[hung : hung + 200]
    several = reports.text("several")
    assert several.index("each staleness is mu times as likely") < several.index(">mu</th>")


def test_a_short_fall_of_the_loss_has_a_figure_of_its_own(tmp_path: Path) -> None:
    run = simulated_run(tmp_path / "run", updates=600)
    loss = pd.DataFrame({"update": np.arange(0, 601, 10)})
    loss["loss"] = np.exp(-loss["update"] / 20) + 0.01
    assert transient([with_loss(run, loss)]) == 120
    loss["loss"] = 2.0 - loss["update"] / 600
    assert transient([with_loss(run, loss)]) is None


def with_loss(run: Run, loss: pd.DataFrame) -> Run:
    """Return a run with other losses."""
    changed = Run(run.path, run.config)
    changed.__dict__["loss"] = loss
    return changed


def with_turns(stored: Prediction, turns: Literal["by law", "recorded"]) -> Prediction:
    """Return a prediction whose settings name other turns for "sme_law"."""
    label = "SME with recorded turns" if turns == "recorded" else LABELS["sme_law"]
    law = msgspec.structs.replace(stored.settings.models["sme_law"], label=label)
    models = {**stored.settings.models, "sme_law": law}
    return replace(
        stored, settings=msgspec.structs.replace(stored.settings, turns=turns, models=models)
    )


def test_models_that_are_alike_are_not_ranked(reports: Reports) -> None:
    run = reports.runs[1]
    stored = read_prediction(run.path)
    prediction = with_turns(stored, "by law")
    score = compare(run, prediction)

    def said(*errors: float) -> str:
        models = {
            name: replace(model, relative_error=error)
            for (name, model), error in zip(score.models.items(), errors, strict=True)
        }
        events = events_table(run).iloc[:0]
        scored = replace(score, models=models)
        facts = headline([run], fit_run(run), prediction, scored, workers_table(run), events)
        return dict(facts)["How well predicted"]

    assert "Closest: SME with the measured law; its" in said(0.3, 0.2, 0.1)
    assert "Closest: SME-ASGD (geometric fit) and SME with the measured law; their" in said(
        0.3, 0.105, 0.1
    )
    assert "Closest: none, they are alike" in said(0.1, 0.1, 0.1)
    noise = pd.DataFrame({"error": 0.1, "noise": 0.05}, index=["sampling noise"])
    score = replace(score, parts=noise)
    text = said(0.14, 0.12, 0.1)
    assert "The scatter of a single run alone causes about 5 %. " in text
    assert "Closest: none, they differ by less than that scatter; their 90 % bands hold" in text
    assert "Closest: SME-ASGD (geometric fit) and SME with the measured law;" in said(
        0.2, 0.14, 0.1
    )


@pytest.mark.slow
def test_recorded_turns_are_not_called_the_law(reports: Reports, tmp_path: Path) -> None:
    """Neither on the page nor in the figures; the headline names the recorded turns."""
    paths = [shutil.copytree(run.path, tmp_path / run.path.name) for run in reports.runs]
    for path in paths:
        with_turns(read_prediction(path), "recorded").save(path)
    page = write_report(paths, tmp_path / "both.html", tmp_path / "figures")
    texts = [page, *(tmp_path / "figures").glob("*.svg")]
    assert not [path for path in texts if "SME with the measured law" in path.read_text("utf-8")]
    run, prediction = read_run(paths[0]), read_prediction(paths[0])
    score, fit = compare(run, prediction), fit_staleness(np.tile([2, 3, 4, 3], 100))
    assert fit.grade == "rejected"
    models = {
        name: replace(score.models["sme_law"], relative_error=error)
        for name, error in (("sme_asgd", 0.1), ("sme_law", 0.01), ("law_pool", 0.02))
    }
    score = replace(score, models=models, labels={**LABELS, **score.labels})
    events = events_table(run).iloc[:0]
    said = dict(headline([run], fit, prediction, score, workers_table(run), events))
    assert "Closest: SME with recorded turns; its" in said["How well predicted"]
    assert "predict with" not in said["Which law"]
    assert "so the prediction uses the recorded turns." in said["Which law"]
    assert "It takes the staleness, not the loss, from the run" in said["How well predicted"]
    assert (
        "The recorded turns of the workers are needed: error 1 % against 10 % with the geometric "
        "law, 2 % with the measured law." in said["What to try"]
    )


def cut_short(path: Path) -> None:
    """Make a run look interrupted after 150 updates."""
    cut_back(path, 150)
    RunWriter(path).event("interrupted")


def test_repeats_cut_short_are_left_out_and_counted(tmp_path: Path) -> None:
    tables = {
        "problem": {"kind": "quadratic"},
        "run": {"updates": 300, "eval_every": 20, "repeats": 3},
    }
    place = run_repeats(make_config(tables), tmp_path / "repeats", simulate)
    whole, short = read_runs(place)[1:], read_runs(place)[0]
    cut_short(short.path)
    write_report(predicted(place))
    prediction = read_prediction(place)
    assert prediction.curves["update"].max() == 300
    assert compare(whole, prediction).repeats == 2
    page = (place / "report.html").read_text("utf-8")
    assert "1 repeat ended before update 300 and is left out of prediction and score." in page
    assert "the mean of 2 runs" in page
    assert re.search(
        r'relative error" data-value="[\d.e-]+">[\d.]+\xa0% <span class="range">\(', page
    )
    assert "In brackets: 95\xa0% intervals over the repeats" in page


@pytest.mark.slow
def test_an_unfinished_run_is_reported_as_it_was_read(tmp_path: Path) -> None:
    run = simulated_run(tmp_path / "run")
    work = tmp_path / "work"
    shutil.copytree(run.path, work)
    cut_short(work)
    study = Study.open(work)
    shutil.rmtree(work)
    shutil.copytree(run.path, work)  # the run has continued
    prediction, _ = study.predict(paths=8)
    study.save()
    assert prediction.curves["update"].max() == 150
    page = write_report(study).read_text("utf-8")
    assert "150 updates by 4 workers" in page
    assert "Mean error against the observed loss" in page
    assert "300 updates by 4 workers" in write_report(predicted(work)).read_text("utf-8")


def test_a_prediction_of_a_run_that_has_continued_is_made_again(tmp_path: Path) -> None:
    run = simulated_run(tmp_path / "run")
    shutil.copytree(run.path, tmp_path / "cut")
    cut_short(tmp_path / "cut")
    predicted(tmp_path / "cut")
    for kind in ("json", "parquet"):
        shutil.copy(tmp_path / "cut" / f"prediction.{kind}", run.path)
    page = write_report(run.path).read_text("utf-8")
    assert "Not predicted: the stored prediction ends at update 150, the run at 300" in page
    page = write_report(predicted(run.path)).read_text("utf-8")
    assert "Not predicted" not in page
    assert read_prediction(run.path).curves["update"].max() == 300


def test_a_prediction_that_cannot_be_scored_is_not_stored(tmp_path: Path) -> None:
    """The repeats were evaluated at different updates; the report is written and says so."""
    tables = {
        "problem": {"kind": "quadratic"},
        "run": {"updates": 300, "eval_every": 20, "repeats": 2},
    }
    place = run_repeats(make_config(tables), tmp_path / "repeats", simulate)
    runs = read_runs(place)
    loss = runs[1].loss.drop(index=3)
    writer = RunWriter(runs[1].path)
    writer.loss({name: column.to_numpy() for name, column in loss.items()})
    writer.event("loss_damaged", file="loss.parquet/_damaged-000000000060.parquet")
    with pytest.raises(InputError, match="has no loss at update 60"):
        Study.open(place).predict(paths=8)
    page = write_report(predicted(place)).read_text("utf-8")
    assert not has_prediction(place)
    assert "has no loss at update 60" in page


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0.0, "0"),
        (4.93e-305, "0"),
        (1500.0, "1,500"),
        (0.123456, "0.1235"),
        (54321.6, "54,322"),
        (6.1234e12, "6.123e+12"),
        (np.inf, "inf"),
    ],
)
def test_plain_numbers(number: float, text: str) -> None:
    assert plain_number(number) == text


@pytest.mark.parametrize(
    ("numbers", "texts"),
    [
        ([], []),
        ([3.0, 12.0, 5.0], ["3", "12", "5"]),
        ([6.7361, 7.08, 10.0], ["6.74", "7.08", "10.00"]),
        ([0.175, 0.005], ["0.175", "0.005"]),
        ([56.0, 0.0912], ["56.000", "0.091"]),
        ([1.0, 5432.16], ["1.0", "5,432.2"]),
        ([0.0, -1e-300, 4.769], ["0.000", "0.000", "4.769"]),
        ([1e-5, 123.4], ["1e-05", "123.4"]),
        ([np.inf, 0.5, 3.0], ["inf", "0.5", "3"]),
        ([1.5, 2e12], ["1.5", "2e+12"]),
    ],
)
def test_numbers_of_a_column_have_the_same_decimals(numbers: list[float], texts: list[str]) -> None:
    assert aligned_numbers(numbers) == texts


def test_ranges_stand_beside_the_number_that_sorts() -> None:
    table = pd.DataFrame({"error": [0.125, 0.5, np.nan]})
    ranges = [(0.0, 0.25), (np.nan, 1.0), ()]
    cells = [row[0] for row in page_table("t", table, ["error"], {"error": ranges})["rows"]]
    assert cells == [
        {"text": "12.5\xa0%", "value": "0.125", "range": "(0.0 to 25.0\xa0%)"},
        {"text": "50.0\xa0%", "value": "0.5"},
        {"text": "", "value": ""},
    ]


@pytest.mark.parametrize(
    ("values", "ranges", "shown"),
    [
        (
            [0.0012, 0.0040],
            [(0.0008, 0.0016), (0.0010, 1.5)],
            ["0.12 (0.08 to 0.16)", "0.40 (0.10 to 150)"],
        ),
        ([0.12], [(0.114, 0.126)], ["12.0 (11.4 to 12.6)"]),
        ([0.12], [(0.11, 0.13)], ["12 (11 to 13)"]),
        (
            [1e-7, 1.234],
            [(0.5e-7, 2e-7), (1.0, np.inf)],
            ["1e-05 (5e-06 to 2e-05)", "123 (100 to inf)"],
        ),
    ],
)
def test_a_wide_range_takes_no_digits_from_the_numbers(
    values: list[float], ranges: list[tuple[float, float]], shown: list[str]
) -> None:
    table = pd.DataFrame({"error": values})
    rows = page_table("t", table, ["error"], {"error": ranges})["rows"]
    texts = [f"{cell['text']} {cell['range']}" for (cell,) in rows]
    assert [text.replace("\xa0%", "") for text in texts] == shown


def test_page_is_well_formed_and_needs_no_network(reports: Reports) -> None:
    text = reports.text("several")
    page = Page(text)
    assert page.open == []
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    figures = [attributes for tag, attributes in page.tags if attributes.get("class") == "plot"]
    assert len(figures) == text.count("<figure") > 10
    assert all(attributes["role"] == "img" and attributes["aria-label"] for attributes in figures)
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href"):
            value = attributes.get(name)
            assert value is None or value == "data:," or value[1:] in ids
    assert not re.search(r"url\((?!#)|@import|https?://(?!www\.w3\.org/)", text)
    assert len(text) < 3e6


def test_markup_from_a_run_is_escaped(reports: Reports) -> None:
    text = reports.text("hostile")
    assert "&lt;script&gt;window.hacked" in text
    assert HOSTILE not in text
    page = Page(text)
    assert page.open == []
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert not [attributes for _, attributes in page.tags if "onerror" in attributes]
    kinds = {attributes.get("type") for tag, attributes in page.tags if tag == "script"}
    assert kinds == {None, "application/json"}
    assert [tag for tag, attributes in page.tags if tag == "script" and not attributes] == [
        "script"
    ]


@pytest.mark.parametrize(
    ("factor", "verdict", "momentum", "said", "unsaid"),
    [
        (0.5, "diverges", 0.0, "below 0.025, or take at most 3 workers.", "margin for more"),
        (0.5, "diverges", 0.9, "0.025, or take one worker. Less momentum raises", "excursions"),
        (0.9, "heavy tail", 0.0, "until then rare excursions dominate every", "momentum"),
        (1.4, "stable", 0.0, "do not raise it", "margin for more"),
        (9.0, "stable", 0.0, "", "do not raise it"),
        (9.0, "diverges", 0.0, "Paths diverge below the limits: take a smaller", "margin for more"),
        (1.4, "heavy tail", 0.0, "Paths diverge below the limits: take a", "do not raise it"),
        (None, "diverges", 0.0, "Paths diverge: take a smaller", "below the limits"),
        (None, None, 0.0, "", "do not raise it"),
    ],
)
def test_advice_depends_on_the_limit_of_stability(
    reports: Reports,
    factor: float | None,
    verdict: str | None,
    momentum: float,
    said: str,
    unsaid: str,
) -> None:
    run = reports.runs[1]
    stored = read_prediction(run.path)
    limit = None if factor is None else 0.05 * factor
    stored_answer = stored.settings.stability
    stability = msgspec.structs.replace(
        stored_answer,
        sentence="",
        factor=factor,
        verdict=verdict,
        largest_stable_learning_rate=limit,
        start=replace(stored_answer.start, momentum=momentum),
    )
    settings = msgspec.structs.replace(stored.settings, stability=stability)
    prediction = replace(stored, settings=settings)
    score = compare(run, prediction)
    events = events_table(run).iloc[:0]
    facts = headline([run], fit_run(run), prediction, score, workers_table(run), events)
    advice = dict(facts)["What to try"]
    assert said in advice
    assert unsaid not in advice


def test_events_are_reported(reports: Reports) -> None:
    text = reports.text("hostile")
    assert "Check the events: worker lost (1)" in text
    assert "Dashed: events." in text


def test_every_figure_as_svg_and_csv(reports: Reports) -> None:
    text, directory = reports.text("several"), reports.figures
    names = re.findall(r'<figure id="([^"]*)"', text)
    assert sorted(path.stem for path in directory.glob("*.svg")) == sorted(names)
    for name in names:
        ElementTree.parse(directory / f"{name}.svg")
        with (directory / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))
        assert len(rows) > 1
        assert all(len(row) == len(rows[0]) for row in rows)
    assert "var(--" not in (directory / "run1-loss.svg").read_text(encoding="utf-8")


def test_names_are_no_formulas_in_a_spreadsheet(tmp_path: Path) -> None:
    """A run directory may have a name that a spreadsheet would execute as a formula."""
    names = ["=HYPERLINK(1)", "+1+1", "-2+3", "@SUM(1)", "\t=1", "runs/p4"]
    table = pd.DataFrame({"=run": names, "loss": [-1.5, np.nan, 2.0, 0.0, -3.0, 1e-9]})
    Picture("figure", "", "", "", table, None).save(tmp_path)
    with (tmp_path / "figure.csv").open(encoding="utf-8", newline="") as file:
        head, *rows = csv.reader(file)
    assert head == ["'=run", "loss"]
    assert [row[0] for row in rows] == [*(f"'{name}" for name in names[:-1]), "runs/p4"]
    assert [float(row[1] or "nan") for row in rows] == pytest.approx(table["loss"], nan_ok=True)


def test_metrics_of_the_problem_are_drawn_and_named(tmp_path: Path) -> None:
    run = simulated_run(tmp_path / "run", kind="tests.support.plugins:measured")
    page = write_report([run.path], tmp_path / "report.html", tmp_path / "figures")
    text = page.read_text(encoding="utf-8")
    last = run.metrics.iloc[-1]
    assert f"At the end: distance {last['distance']:.4g}, =first {last['=first']:.4g}." in text
    assert f"distance beside the loss; at the end {last['distance']:.4g}." in text
    table = pd.read_csv(tmp_path / "figures" / "metric-1.csv")
    assert list(table) == ["update", "'=first"]
    np.testing.assert_allclose(table["'=first"], run.metrics["=first"])


def test_values_at_the_pointer_are_those_of_the_run(reports: Reports) -> None:
    text = reports.text("one")
    found = re.search(r'id="loss-values">(.*?)</script>', text)
    assert found is not None
    values = json.loads(found[1])
    observed = next(series for series in values["series"] if series["label"] == "observed")
    loss = reports.runs[1].loss
    assert values["x"] == loss["update"].tolist()
    np.testing.assert_allclose(observed["y"], loss["loss"], rtol=1e-5)


def test_a_report_that_cannot_be_written_is_refused(reports: Reports, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(InputError, match="cannot be written"):
        write_report([reports.runs[0].path], tmp_path / "file" / "report.html")


def test_activity_adds_up(reports: Reports) -> None:
    run = reports.runs[1]
    course, workers = timeline(run, bins=10), workers_table(run)
    widths = 2 * course["seconds"].iloc[0]
    assert (course["updates_per_second"] * widths).sum() == pytest.approx(300)
    assert course["update"].iloc[-1] == 300
    assert workers["updates"].sum() == 300
    mean = (workers["updates"] * workers["staleness_mean"]).sum() / 300
    assert mean == pytest.approx(run.trace["staleness"].mean())


def test_workers_table_says_how_each_worker_joined_last(tmp_path: Path) -> None:
    run = simulated_run(tmp_path / "run")
    assert set(workers_table(run)["transport"]) == {""}
    writer = RunWriter(run.path)
    for worker, transport in ((0, "tcp"), (1, "shm"), (0, "shm"), (2, "tcp")):
        writer.event("worker_joined", worker=worker, transport=transport, update=0)
    assert workers_table(read_run(run.path))["transport"].tolist()[:3] == ["shm", "shm", "tcp"]


def test_events_are_placed_by_their_update(tmp_path: Path) -> None:
    run = simulated_run(tmp_path / "run")
    writer = RunWriter(run.path)
    writer.event("worker_lost", worker=2, update=100, reason="gone")
    table = events_table(read_run(run.path))
    assert table["event"].tolist() == ["start", "problem", "finish", "worker_lost"]
    assert table["seconds"].iloc[3] == run.trace["applied_seconds"].iloc[100]
    assert table["details"].iloc[3] == "reason gone"
    assert table["incident"].tolist() == [False, False, False, True]


def test_events_without_an_update_are_placed_among_those_with_one(tmp_path: Path) -> None:
    run = simulated_run(tmp_path / "run")
    applied = run.trace["applied_seconds"]
    known, late = 1000.0 + float(applied.iloc[100]), 1000.0 + float(applied.iloc[-1]) + 3.0
    events = [
        {"event": "start", "time": 999.0},
        {"event": "connection_lost", "time": known - 0.1},
        {"event": "worker_lost", "time": known, "update": 100},
        {"event": "finish", "time": late},
    ]
    lines = "".join(f"{json.dumps(event)}\n" for event in events)
    (run.path / "events.jsonl").write_text(lines, encoding="utf-8")
    seconds = events_table(read_run(run.path))["seconds"]
    assert seconds[1] == pytest.approx(seconds[2] - 0.1, abs=1e-6)
    assert seconds[3] == applied.iloc[-1]


def test_events_around_a_pause_are_placed_where_the_run_paused(tmp_path: Path) -> None:
    run = simulated_run(tmp_path / "run")
    applied = run.trace["applied_seconds"].to_numpy()
    lost, cut, end = (float(applied[update]) for update in (100, 150, -1))
    interrupted = 1000.0 + cut - 0.01
    events = [
        {"event": "start", "time": 999.0},
        {"event": "worker_lost", "time": 1000.0 + lost, "update": 100},
        {"event": "interrupted", "time": interrupted},
        {"event": "connection_refused", "time": interrupted + 50.0},  # nothing was applied then
        {"event": "server_restored", "time": interrupted + 90.0, "to_version": 150},
        {"event": "worker_joined", "time": interrupted + 95.0, "update": 150},
        {"event": "connection_lost", "time": interrupted + 95.1},
        {"event": "finish", "time": interrupted + 99.0 + end},
    ]
    lines = "".join(f"{json.dumps(event)}\n" for event in events)
    (run.path / "events.jsonl").write_text(lines, encoding="utf-8")
    seconds = events_table(read_run(run.path))["seconds"]
    expected = [0.0, lost, cut - 0.01, cut, cut, cut, cut + 0.1, end]
    np.testing.assert_allclose(seconds, expected, atol=1e-6)


def test_common_target_is_reached_by_all(reports: Reports) -> None:
    runs = reports.runs
    target = common_target([run.loss for run in runs])
    assert all(run.loss["loss"].min() <= target < run.loss["loss"].iloc[0] for run in runs)
    assert labels([run.path for run in runs]) == ["p2", "p4"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "{run}", "-o", "{here}"], "is a directory; name a file, such as {here}/report"),
        (["report", "{run}", "--figures", "{run}/config.json"], "config.json: cannot be written"),
        (["report", "{run}", "--paths", "100000000"], "not in the range 2<=x<=1000000"),
        (["predict", "{run}", "--paths", "100000000"], "not in the range 2<=x<=1000000"),
    ],
)
def test_impossible_arguments_are_refused_before_any_work(
    reports: Reports,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    run = tmp_path / "run"
    shutil.copytree(reports.runs[1].path, run)
    (run / "prediction.json").unlink()
    with pytest.raises(SystemExit) as exit_:
        main([argument.format(run=run, here=tmp_path) for argument in arguments])
    assert exit_.value.code == 2
    assert message.format(here=tmp_path) in capsys.readouterr().err
    assert not (run / "prediction.json").exists()
