"""Records from logs of other systems: they keep the staleness and count unusable rows."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import asgd
from analysis.records.split import split_of
from asgd.__main__ import main
from asgd.records.columns import ITEM_COLUMNS, NO_PUBLICATION
from asgd.records.reader import findings, summary
from asgd.rundir.tables import write_table
from tests.support import logs

STALENESS = np.random.default_rng(5).geometric(0.3, 880) - 1


@pytest.mark.parametrize("name", logs.ITEMS)
def test_every_format_keeps_the_staleness(name: str, tmp_path: Path) -> None:
    write, columns = logs.ITEMS[name]
    record = asgd.import_log(write(tmp_path, STALENESS), tmp_path / "record", columns=columns)
    items = record.items
    assert record.about.format == name.split()[0]
    assert items["staleness"].tolist() == STALENESS.tolist()
    assert np.all(np.diff(items["update"]) >= 0)
    assert record.state == "finished"
    assert findings(record) == []
    if "worker" in columns:
        assert record.about.workers == [f"client {i}" for i in range(4)]
        assert items["worker"].tolist() == [i % 4 for i in range(len(STALENESS))]
    if "loss" in columns:
        assert items["loss"].iloc[1] == pytest.approx(0.5)
    assert not list(tmp_path.glob(".*"))


def test_prime_rl_has_steps_and_the_split_in_flight(tmp_path: Path) -> None:
    record = asgd.import_log(logs.prime_rl(tmp_path, STALENESS), tmp_path / "record")
    items = record.items
    assert items["in_flight"].tolist() == (STALENESS - STALENESS // 2).tolist()
    assert items["update"].tolist() == [1000 + i // logs.EACH for i in range(len(STALENESS))]
    assert record.about.unit == "steps"
    assert NO_PUBLICATION in record.about.unknown
    assert record.about.notes == ["110 steps have several files, read as one step each."]
    assert summary(record)["steps"] == 110


def test_rollouts_have_staleness_in_flight_only(tmp_path: Path) -> None:
    record = asgd.import_log(logs.rollouts(tmp_path, STALENESS), tmp_path / "record")
    assert record.items["in_flight"].tolist() == STALENESS.tolist()
    assert "in flight only" in record.about.unknown[0]


@pytest.mark.parametrize("name", logs.MEANS)
def test_means_of_every_system_are_recognised(name: str, tmp_path: Path) -> None:
    record = asgd.import_log(logs.MEANS[name](tmp_path), tmp_path / "record")
    steps = record.steps
    assert record.about.format == "metrics"
    assert record.about.notes == [f"Read as {name.split()[0]}."] or name == "prime-rl metrics"
    assert steps["step"].tolist() == list(range(60))
    assert steps["mean"].mean() == pytest.approx(1.5)
    assert record.items.empty
    if name in ("verl", "prime-rl metrics"):
        assert set(steps["max"]) == {3.0}
    assert "none is fitted" in record.about.unknown[0]


def test_means_are_found_beside_other_files(tmp_path: Path) -> None:
    trial = tmp_path / "trial"
    trial.mkdir()
    logs.rllib_json(trial)
    logs.rllib_csv(trial)
    (trial / "params.json").write_text('{\n  "lr": 0.1\n}\n', encoding="utf-8")
    record = asgd.import_log(trial, tmp_path / "record")
    assert record.steps["step"].tolist() == list(range(60))
    columns = {
        "step": "training_iteration",
        "mean": "learners/default_policy/diff_num_grad_updates_vs_sampler_policy",
    }
    named = asgd.import_log(trial, tmp_path / "named", columns=columns)
    assert named.steps["mean"].tolist() == record.steps["mean"].tolist()


def test_several_columns_of_means_are_refused(tmp_path: Path) -> None:
    key = "diff_num_grad_updates_vs_sampler_policy"
    row = {"training_iteration": 1, "learners": {"a": {key: 1.0}, "b": {key: 2.0}}}
    (tmp_path / "result.json").write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(asgd.InputError, match="choose one by --columns mean="):
        asgd.import_log(tmp_path / "result.json", tmp_path / "record")


def test_a_record_is_no_run(tmp_path: Path) -> None:
    record = asgd.import_log(
        logs.csv(tmp_path, STALENESS), tmp_path / "record", columns=logs.COLUMNS
    )
    with pytest.raises(asgd.InputError, match="has no parameters; expected a run"):
        asgd.read_run(record.path)
    with pytest.raises(asgd.InputError, match=r"not a record \(no record.json\)"):
        asgd.read_record(tmp_path)


def test_a_frame_becomes_a_record(tmp_path: Path) -> None:
    record = asgd.from_frame(logs.frame(STALENESS), tmp_path / "r", columns=logs.COLUMNS)
    assert record.items["staleness"].tolist() == STALENESS.tolist()
    assert "880 items, mean staleness" in repr(record)
    plain = pd.DataFrame({"staleness": [0, 1, 1, 2]})
    assert asgd.from_frame(plain, tmp_path / "p").items["update"].tolist() == [0, 1, 2, 3]


def imported(tmp_path: Path, rows: list[dict[str, object]], **options: object) -> asgd.Record:
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return asgd.import_log(path, tmp_path / "record", **options)  # type: ignore[arg-type]


def test_unknown_versions_are_refused_or_counted_never_zero(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"update": i, "read_version": i} for i in range(20)]
    rows[3]["read_version"] = None
    rows[4]["read_version"] = -1
    del rows[5]["read_version"]
    rows[6]["read_version"] = float("nan")
    rows[9]["read_version"] = 12
    with pytest.raises(asgd.InputError, match=r"4 of 20 rows without a version \(first: row 4, in"):
        imported(tmp_path, rows)
    assert not (tmp_path / "record").exists()
    record = imported(tmp_path, rows, leave_out=True)
    assert record.about.left_out == {
        "without a version": 4,
        "with a version later than the update": 1,
    }
    assert record.items["update"].tolist() == [0, 1, 2, 7, 8, *range(10, 20)]


def test_versions_that_run_backwards_are_counted_separately(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"update": 9, "read_version": 5, "end_version": end} for end in (7, 4, 10, None, 9)
    ]
    with pytest.raises(asgd.InputError, match="1 of 5 rows with an end before the start"):
        imported(tmp_path, rows)
    record = imported(tmp_path, rows, leave_out=True)
    assert record.about.left_out == {
        "with an end before the start": 1,
        "with a version later than the update": 1,
    }
    assert record.items["in_flight"].tolist() == [2, -1, 4]
    assert set(record.items["in_publication"]) == {-1}
    assert record.about.unknown == [NO_PUBLICATION]


def test_a_table_without_the_update_is_in_flight_only(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"read_version": 3, "end_version": end} for end in (3, 5, 2)]
    record = imported(tmp_path, rows, leave_out=True)
    assert record.items["staleness"].tolist() == [0, 2]
    assert record.about.left_out == {"with an end before the start": 1}
    assert "in flight only" in record.about.unknown[0]
    assert str(split_of(record)) == (
        "Mean staleness of all 2 items, 1 update: 1 in flight (while it was computed)."
    )


@pytest.mark.parametrize(
    "stored",
    [
        {"in_flight_only": True, "unknown": ["In other words."]},
        {  # records are older than the flag
            "unknown": [
                "How long an item waited until it was used: this is the staleness in flight only, "
                "when the item was ready; that of the update is larger."
            ]
        },
    ],
    ids=["flag", "sentence"],
)
def test_staleness_in_flight_only_has_no_queue(stored: dict[str, object], tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"read_version": 3, "end_version": end} for end in (3, 5)]
    about = imported(tmp_path, rows).path / "record.json"
    found = json.loads(about.read_text("utf-8"))
    del found["in_flight_only"]
    about.write_text(json.dumps(found | stored), encoding="utf-8")
    split = split_of(asgd.read_record(about.parent))
    assert split is not None
    assert (split.flight, split.queue) == (1.0, None)


# Versions at read, start, end and update; staleness in publication and in flight, or the refusal.
VERSIONS = {
    "all parts": ((2, 3, 7, 15), (1, 4)),
    "no part": ((5, 5, 5, 5), (0, 0)),
    "start not known": ((2, None, 7, 15), (-1, -1)),
    "start not known, as -1": ((2, -1, 7, 15), (-1, -1)),
    "end not known": ((2, 3, None, 15), (1, -1)),
    "start before the read": ((4, 3, 7, 15), "with a start before the version that was read"),
    "end before the start": ((2, 6, 5, 15), "with an end before the start"),
    "start after the update": ((2, 16, None, 15), "with a version later than the update"),
    "end after the update": ((2, None, 16, 15), "with a version later than the update"),
}


@pytest.mark.parametrize("case", VERSIONS)
def test_publication_flight_and_queue_are_distinguished(case: str, tmp_path: Path) -> None:
    versions, expected = VERSIONS[case]
    keys = ("read_version", "start_version", "end_version", "update")
    good = dict(zip(keys, (0, 0, 0, 0), strict=True))
    rows: list[dict[str, object]] = [dict(good), dict(zip(keys, versions, strict=True))]
    if isinstance(expected, str):
        with pytest.raises(asgd.InputError, match=rf"1 of 2 rows {expected} \(first: row 2, in"):
            imported(tmp_path, rows)
    record = imported(tmp_path, rows, leave_out=True)
    assert findings(record) == []
    assert record.about.unknown == []
    found = record.items[["in_publication", "in_flight"]].to_numpy().tolist()
    if isinstance(expected, str):
        assert record.about.left_out == {expected: 1}
        assert found == [[0, 0]]
    else:
        assert record.about.left_out == {}
        assert found == [[0, 0], list(expected)]


def test_the_split_has_the_means_of_its_parts(tmp_path: Path) -> None:
    """The parts have known means; one item in five lacks its end."""
    update = 100 + np.arange(500)
    start, end = update - 7, update - 3
    read = start - np.where(update % 2, 1, 2)
    frame = pd.DataFrame(
        {"update": update, "read_version": read, "start_version": start, "end_version": end}
    )
    frame.loc[frame.index % 5 == 0, "end_version"] = np.nan
    split = split_of(asgd.from_frame(frame, tmp_path / "r"))
    assert split is not None
    assert (split.publication, split.flight, split.queue, split.staleness) == (1.5, 4, 3, 8.5)
    assert str(split) == (
        "Mean staleness of 400 of 500 items, 8.5 updates: 1.5 in publication (before an item was "
        "begun), 4 in flight (while it was computed), 3 in the queue (until it was used)."
    )
    begun = split_of(asgd.from_frame(frame.drop(columns="end_version"), tmp_path / "begun"))
    assert begun is not None
    assert (begun.publication, begun.flight, begun.queue, begun.known) == (1.5, None, None, 500)
    assert "1.5 in publication (before an item was begun), 7 in flight or in the queue" in str(
        begun
    )
    # Means have rounding errors, but without a queue its part must be exactly 0.
    lag = pd.DataFrame({"update": [9] * 10, "read_version": [6, *[9] * 9]})
    empty = lag.assign(start_version=[7, *[9] * 9], end_version=9)
    queueless = split_of(asgd.from_frame(empty, tmp_path / "empty"))
    assert queueless is not None
    assert queueless.queue == 0.0
    plain = asgd.from_frame(frame[["update", "read_version"]], tmp_path / "plain")
    assert split_of(plain) is None


@pytest.mark.parametrize("name", ["log.csv", "log.jsonl"])
def test_an_empty_file_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    with pytest.raises(asgd.InputError, match=rf"{name}: empty$"):
        asgd.import_log(tmp_path / name, tmp_path / "record")


def test_a_restart_begins_another_session(tmp_path: Path) -> None:
    numbers = [*range(5), *range(2, 6), *range(3)]
    rows: list[dict[str, object]] = [{"update": i, "staleness": 0} for i in numbers]
    record = imported(tmp_path, rows)
    assert record.items["update"].tolist() == list(range(12))
    assert record.items["session"].tolist() == [0] * 5 + [1] * 4 + [2] * 3
    assert "falls from 4 to 2" in record.about.notes[0]
    assert "falls from 5 to 0" in record.about.notes[1]


def test_a_restart_of_means_begins_another_session(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"n": i, "lag": 1.5} for i in (0, 1, 2, 1, 2)]
    record = imported(tmp_path, rows, columns={"step": "n", "mean": "lag"})
    assert record.steps["step"].tolist() == [0, 1, 2, 3, 4]
    assert record.steps["session"].tolist() == [0, 0, 0, 1, 1]


def test_rows_out_of_order_are_refused(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"update": i % 7, "staleness": 0} for i in range(200)]
    with pytest.raises(asgd.InputError, match="smaller update than the row before: sort the rows"):
        imported(tmp_path, rows)


def test_a_repeated_item_is_counted(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"update": i // 2, "staleness": 0, "item": f"a{i}"} for i in range(10)
    ]
    rows.insert(4, rows[3])
    with pytest.raises(asgd.InputError, match="1 of 11 rows of an item that was there before"):
        imported(tmp_path, rows)
    assert len(imported(tmp_path, rows, leave_out=True).items) == 10


def test_an_unfinished_last_line_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"staleness": 1}\n{"staleness": 2}\n{"stal', encoding="utf-8")
    assert asgd.import_log(path, tmp_path / "record").items["staleness"].tolist() == [1, 2]


BAD = {
    "nothing there": (None, {}, "no such file or directory"),
    "no columns": ("a,b\n1,2\n", {}, "it has a, b: name yours"),
    "misspelt": ("lag\n1\n", {"staleness": "lga"}, "no column lga for staleness; did you mean lag"),
    "unknown key": (
        "lag\n1\n",
        {"stale": "lag"},
        "columns.stale: unknown key; did you mean staleness",
    ),
    "text": ("lag\none\n", {"staleness": "lag"}, "conversion error"),
    "a mean": (
        "lag\n1.5\n",
        {"staleness": "lag"},
        "staleness = 1.5: expected a whole number; means per step",
    ),
    "empty": ("lag\n", {"staleness": "lag"}, "no row that can be used"),
    "no text": ("", {}, "empty$"),
    "huge": ("lag\n1e300\n", {"staleness": "lag"}, "expected a whole number"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_log_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    text, columns, message = BAD[case]
    path = tmp_path / "log.csv"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(asgd.InputError, match=message) as refused:
        asgd.import_log(path, tmp_path / "record", columns=columns)
    assert "\n" not in str(refused.value)
    assert {file.name for file in tmp_path.iterdir()} <= {"log.csv"}


# Logs of means: a row after a good one, and the message.
BAD_MEANS = {
    "not UTF-8": (b"8,\xff\n", "cannot be read ('utf-8' codec can't decode byte 0xff"),
    "long field": (b"8," + b"1" * 200_000 + b"\n", "cannot be read (field larger than field limit"),
    "a fraction": (b"1.7,1\n", "row 2: step = 1.7: expected a whole number"),
    "no number": (b"8,one\n", "row 2: 'one': expected a number"),
    "infinite": (b"inf,1\n", "row 2: step = inf: expected a whole number"),
    "huge": (b"1e300,1\n", "row 2: step = 1e+300: expected a whole number"),
}


@pytest.mark.parametrize("case", BAD_MEANS)
def test_a_bad_log_of_means_is_refused_in_one_line_with_status_2(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row, message = BAD_MEANS[case]
    path = tmp_path / "means.csv"
    path.write_bytes(b"step,lag\n0,1.5\n" + row)
    options = ["--columns", "step=step,mean=lag", "--out", str(tmp_path / "record")]
    with pytest.raises(SystemExit) as ended:
        main(["import", str(path), *options])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert f"{path}: {message}" in said
    assert said.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["means.csv"]


def test_a_quoted_column_name_may_have_a_comma(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text('"lag, of 4","the ""id""",n\n0,a,7\n2,b,8\n', "utf-8")
    (tmp_path / "log.tsv").write_text('"lag, of 4"\t"the\t""id"""\n0\ta\n2\tb\n', "utf-8")
    columns = ["--columns", '"staleness=lag, of 4",worker=the "id",update=n']
    main(["import", str(tmp_path / "log.csv"), *columns, "--out", str(tmp_path / "csv")])
    record = asgd.read_record(tmp_path / "csv")
    assert record.items["staleness"].tolist() == [0, 2]
    assert record.about.workers == ["a", "b"]
    given = {"staleness": "lag, of 4", "worker": 'the\t"id"'}
    record = asgd.import_log(tmp_path / "log.tsv", tmp_path / "tsv", columns=given)
    assert record.about.workers == ["a", "b"]
    (tmp_path / "means.csv").write_text('"step, of it",lag\n5,1.5\n', "utf-8")
    given = {"step": "step, of it", "mean": "lag"}
    record = asgd.import_log(tmp_path / "means.csv", tmp_path / "means", columns=given)
    assert record.steps["step"].tolist() == [5]


def test_other_bad_sources_are_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 but no more")
    (tmp_path / "log.jsonl").write_text("{}\nno json\n{}\n", encoding="utf-8")
    (tmp_path / "bad.csv.gz").write_bytes(gzip.compress(b"staleness\n1\n" * 999)[:40])
    folder = tmp_path / "twice"
    folder.mkdir()
    (folder / "log.csv").write_text("staleness\n1\n", encoding="utf-8")
    (folder / "log.csv.gz").write_bytes(gzip.compress(b"staleness\n1\n"))
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("broken.parquet", "cannot be read"),
        ("log.jsonl", "line 2"),
        ("bad.csv.gz", "cannot be read"),
        ("twice", "which is the same file"),
        ("empty", "no log of a known format"),
    ):
        with pytest.raises(asgd.InputError, match=message):
            asgd.import_log(tmp_path / name, tmp_path / "record")
    with pytest.raises(asgd.InputError, match="format = 'xml': expected one of auto, parquet"):
        asgd.import_log(folder, tmp_path / "record", format="xml")


def test_a_directory_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    path = logs.csv(tmp_path, STALENESS)
    with pytest.raises(asgd.InputError, match="exists and is not empty"):
        asgd.import_log(path, tmp_path, columns=logs.COLUMNS)
    assert [file.name for file in tmp_path.iterdir()] == ["log.csv"]


def test_damage_is_found(tmp_path: Path) -> None:
    record = asgd.import_log(
        logs.csv(tmp_path, STALENESS), tmp_path / "record", columns=logs.COLUMNS
    )
    part = next((record.path / "items").iterdir())
    content = bytearray(part.read_bytes())
    content[100] ^= 1
    part.write_bytes(content)
    assert len(findings(record)) == 1
    about = record.path / "record.json"
    about.write_text(about.read_text("utf-8").replace("updates", "versions"), encoding="utf-8")
    assert "has changed since the record was made" in findings(record)[1]


def rewritten(record: asgd.Record, types: dict[str, type], **changed: object) -> None:
    """Replace the items of a record, with valid digests."""
    columns = {name: record.items[name].to_numpy() for name in types} | changed
    part = next((record.path / "items").iterdir())
    write_table(part, columns, types)


def test_a_record_without_a_column_is_refused_in_one_line(tmp_path: Path) -> None:
    record = asgd.from_frame(logs.frame(STALENESS), tmp_path / "r", columns=logs.COLUMNS)
    types = {name: kind for name, kind in ITEM_COLUMNS.items() if name != "in_publication"}
    rewritten(record, types)
    for read in (lambda: record.items, lambda: summary(record), lambda: split_of(record)):
        with pytest.raises(asgd.InputError, match=r"expected the columns .* in_publication") as no:
            read()
        assert "\n" not in str(no.value)


@pytest.mark.parametrize(
    ("parts", "what"),
    [
        ({"in_publication": -2}, "in_publication -2 is negative"),
        ({"in_flight": -2}, "in_flight -2 is negative"),
        ({"in_publication": 30, "in_flight": 40}, "staleness 0 is less than its parts"),
    ],
)
def test_impossible_parts_are_found(parts: dict[str, int], what: str, tmp_path: Path) -> None:
    frame = logs.frame(np.arange(60) % 2)
    record = asgd.from_frame(frame, tmp_path / "r", columns=logs.COLUMNS)
    whole = {name: np.full(60, value) for name, value in parts.items()}
    rewritten(record, dict(ITEM_COLUMNS), **whole)
    assert findings(record) == [f"{record.path / 'items'}: row 0: {what}"]
