"""Tables with a row per item: CSV, Parquet, JSON lines. Their columns are named by the user."""

from __future__ import annotations

from pathlib import Path

from asgd.records.formats.base import Format, Part, files_of


def _table(name: str, what: str, *kinds: str) -> Format:
    def parts(source: Path) -> list[Part]:
        return [Part(path) for path in files_of(source, *kinds)]

    return Format(name, what, "updates", None, [], parts)


CSV = _table("csv", "comma- or tab-separated, with a header", ".csv", ".tsv")
PARQUET = _table("parquet", "Parquet files", ".parquet")
JSONL = _table("jsonl", "a JSON object a line; a.b is b within a", ".jsonl", ".ndjson")
