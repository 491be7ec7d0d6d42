"""A record with its analysis, computed once and kept."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, cast

import pandas as pd

from analysis.profile.fit import StalenessFit
from analysis.records.fit import fit_record
from analysis.records.means import MeansProfile, profile_means
from analysis.records.split import split_of
from asgd.errors import UnreliableEstimateError
from asgd.records.columns import STEPS
from asgd.records.reader import Record, read_record
from asgd.rundir.files import replace_file
from asgd.seals import sealed_object

Profile = StalenessFit | MeansProfile


class RecordStudy:
    """A record with its fit, or with the profile of its means.

    Parameters
    ----------
    record
        The record.
    """

    def __init__(self, record: Record) -> None:
        self.record, self.path = record, record.path

    @classmethod
    def open(cls, path: str | Path) -> RecordStudy:
        """Read a record.

        Raises
        ------
        InputError
            There is none at `path`.
        """
        return cls(read_record(path))

    @property
    def profile(self) -> Profile:
        """The staleness fit, or the profile of the means.

        Raises
        ------
        InputError
            The record is empty.
        UnreliableEstimateError
            It is too short; use `estimate` to get the profile all the same.
        """
        found, error = self._profiled
        if error is not None:
            raise error
        return found

    @property
    def estimate(self) -> Profile:
        """The profile, even if it is unreliable."""
        return self._profiled[0]

    @property
    def doubt(self) -> str | None:
        """Why the profile is unreliable; None if it is reliable."""
        error = self._profiled[1]
        return None if error is None else str(error)

    @cached_property
    def _profiled(self) -> tuple[Profile, UnreliableEstimateError | None]:
        make = profile_means if self.record.about.rows == STEPS else fit_record
        try:
            return make(self.record), None
        except UnreliableEstimateError as error:
            return cast(Profile, error.estimate), error

    @property
    def workers(self) -> pd.DataFrame | None:
        """One row per worker, by its name; None if the workers are unknown."""
        fit = self.estimate
        table = fit.per_worker if isinstance(fit, StalenessFit) else None
        if table is None:
            return None
        names = {-1: "unknown", **dict(enumerate(self.record.about.workers))}
        return table.assign(worker=table["worker"].map(names)).rename(columns={"updates": "items"})

    def to_dict(self) -> dict[str, Any]:
        """Return the profile as JSON values."""
        about, profile, split = self.record.about, self.profile, split_of(self.record)
        return {
            "kind": about.kind,
            "format": about.format,
            "unit": about.unit,
            "unknown": about.unknown,
            "left_out_rows": about.left_out,
            "split": split and split.to_dict(),
            **profile.to_dict(),
        }

    def save(self) -> None:
        """Write `profile.json` into the record."""
        replace_file(self.path / "profile.json", sealed_object(self.to_dict()))
