"""Records of other systems on the command line: `asgd import`, checks, and tables of records."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from asgd.console.options import PATH, json_option, out_option, quiet_option
from asgd.console.output import Command, print_json, say
from asgd.counted import counted
from asgd.errors import InputError
from asgd.printable import printable

if TYPE_CHECKING:
    from asgd.records.columns import About


@click.command(cls=Command, name="import")
@click.argument("source", type=PATH)
@click.option("--format", default="auto", show_default=True, help="Of the log, one of these.")
@click.option("--columns", default="", metavar="OURS=THEIRS,...", help="Names of its columns.")
@click.option("--unit", help="Staleness counts updates, versions or steps.  [default: by format]")
@click.option("--leave-out", is_flag=True, help="Leave out and count rows that cannot be used.")
@out_option
@json_option
@quiet_option
def import_log(
    source: Path,
    format: str,
    columns: str,
    unit: Any,
    leave_out: bool,
    out: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Make a record of staleness from the log of another system.

    SOURCE is a file or a directory of them, compressed or not. `asgd status`, `runs`, `profile`,
    `whatif`, `report` and `verify` take the record.

    \b
    csv, parquet, jsonl  a row per item that was used
    prime-rl             its rollouts/step_N/train/effective/traces.jsonl
    rollouts             items with head_version and tail_version, as AReaL's
    metrics              means per step: verl, prime-rl, RLlib, or named columns

    Columns of items are update, read_version, start_version, end_version, staleness, worker, item
    (its name), samples, loss, seconds; of means step, mean, max, min, items, loss. Quotes hold a
    name with a comma together: --columns '"staleness=lag, mean",worker=client_id'.

    \b
    asgd import clients.csv --columns worker=client_id,update=total_agg,staleness=lag
    asgd import outputs/run1 --out runs/theirs
    """
    from asgd.console.live import Bar
    from asgd.records.importing import import_log as import_it

    with Bar("import", 1, quiet) as bar:
        record = import_it(
            source,
            out,
            format=format,
            columns=_columns(columns),
            unit=unit,
            leave_out=leave_out,
            progress=bar.whole,
        )
    if as_json:
        from asgd.records.reader import summary

        print_json(summary(record))
        return
    about = record.about
    say(printable(str(record.path)))
    read = ", ".join(f"{ours}={theirs}" for ours, theirs in about.columns.items())
    click.echo(printable(f"read as {about.format}, in {about.unit}: {read}"), err=True)
    for sentence in sentences(record.about):
        click.echo(printable(sentence), err=True)


def verify_record(path: Path, as_json: bool) -> None:
    """Check a record and print its faults; exit with status 1 if there are any."""
    from asgd.records.reader import findings, read_record

    record = read_record(path)
    found = findings(record)
    if as_json:
        print_json({"runs": [{"run": str(path), "findings": found, "checked": "files, tables"}]})
    else:
        for finding in found or [f"{path}: no faults: a record has no parameters to replay"]:
            say(printable(finding))
    if found:
        raise click.exceptions.Exit(1)


def sentences(about: About) -> list[str]:
    """Return the left-out rows, the notes and the unknown facts of a record, as sentences."""
    from asgd.records.columns import left_out_rows

    left_out = [f"Left out: {rows}." for rows in left_out_rows(about.left_out)]
    return [*left_out, *about.notes, *(f"Not known: {text}" for text in about.unknown)]


def _columns(text: str) -> dict[str, str]:
    found = {}
    try:
        parts = next(csv.reader([text], skipinitialspace=True), [])
    except csv.Error as error:
        raise InputError(f"--columns {text!r}: {error}") from None
    for part in filter(None, parts):
        ours, separator, theirs = part.partition("=")
        if not separator or not theirs.strip():
            raise InputError(f"--columns {part}: expected ours=theirs, such as worker=client_id")
        found[ours.strip()] = theirs.strip()
    return found


def record_rows(directory: Path) -> list[dict[str, Any]]:
    """Return the summary of each record in a directory, or the reason why it cannot be read."""
    from asgd.errors import AsgdError
    from asgd.records.reader import find_records, read_record, summary

    rows = []
    for path in find_records(directory):
        try:
            rows.append(summary(read_record(path)))
        except AsgdError as error:
            rows.append({"run": str(path), "state": "unreadable", "reason": str(error)})
    return rows


def record_table(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the summary of a record as a table of names and values."""
    from asgd.records.columns import left_out_rows

    stale, recent = found["mean_staleness"], found["recent_staleness"]
    last = (
        "none yet"
        if stale is None
        else (f"{counted(f'{stale:.4g}', found['unit'])} mean, {recent:.4g} over the last tenth")
    )
    steps = f" of {counted(found['steps'], 'steps')}" if found["steps"] != found["rows"] else ""
    workers = "not known" if found["workers"] is None else f"{found['workers']:,}"
    return [
        ("record", f"{found['run']}, {found['kind']}, {found['format']}"),
        ("state", found["state"]),
        ("source", found["source"]),
        (found["table"], f"{found['rows']:,}{steps}"),
        ("staleness", last),
        ("workers", workers),
        ("loss", "none" if found["loss"] is None else f"{found['loss']:.4g}"),
        *(("left out", rows) for rows in left_out_rows(found["left_out"])),
        *(("note", text) for text in found["notes"]),
        *(("not known", text) for text in found["unknown"]),
    ]


def in_runs_table(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return summaries of records as rows of the table of runs."""
    return [
        row
        if row["state"] == "unreadable"
        else {
            **row,
            "problem": f"{row['kind']}: {row['format']}",
            "workers": row["workers"] or "",
            "updates": counted(row["rows"], row["table"]),
            "of": None,
            "updates_per_second": None,
        }
        for row in rows
    ]
