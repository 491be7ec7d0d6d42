"""A run or its repeats with their fit, prediction and score, each made once and kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import cast

from analysis.prediction.advice import why_not_predicted
from analysis.prediction.predict import Method, Prediction, has_prediction, predict, read_prediction
from analysis.prediction.score import Score, compare
from analysis.prediction.setting import last_update, whole
from analysis.profile.fit import StalenessFit
from analysis.profile.repeats import as_runs, fit_runs
from asgd.errors import InputError, UnreliableEstimateError
from asgd.problems import make_problem
from asgd.rundir.problem_record import check_problem
from asgd.rundir.reader import Run
from asgd.rundir.repeats import read_runs


class Study:
    """One run, or repeats of one, and what is found out about them.

    >>> study = analysis.Study.open(run.path)
    >>> prediction, score = study.predict(paths=16)
    >>> score.closest in prediction.models
    True

    Parameters
    ----------
    path
        The directory of the run or of the repeats.
    runs
        One run, or repeats that differ in the seed alone. Their tables are read now: those of a
        run at work, read one by one, would not fit together.

    Raises
    ------
    InputError
        There is no run, or two are not repeats of each other.
    """

    def __init__(self, path: str | Path, runs: Run | Sequence[Run]) -> None:
        self.path, self.runs = Path(path), as_runs(runs)
        for run in self.runs:
            # The losses first: the trace has to cover every one of them.
            _ = run.loss, run.trace, run.members, run.events
        self._made: tuple[Prediction, Score] | None = None
        self._refusal: str | None = None

    @classmethod
    def open(cls, path: str | Path) -> Study:
        """Read a run directory, or that of repeats.

        Raises
        ------
        InputError
            There is neither at `path`.
        """
        return cls(path, read_runs(path))

    @property
    def run(self) -> Run:
        """The run whose workers are shown, the first repeat."""
        return self.runs[0]

    @cached_property
    def whole(self) -> list[Run]:
        """The repeats that were not cut short of the furthest: those that can be predicted."""
        return whole(self.runs)

    @property
    def fit(self) -> StalenessFit:
        """The staleness fit.

        Raises
        ------
        InputError
            A run recorded no update.
        UnreliableEstimateError
            The trace is too short; `estimate` is what can be had of it.
        """
        fit, error = self._fitted
        if error is not None:
            raise error
        return fit

    @property
    def estimate(self) -> StalenessFit:
        """The staleness fit, also where it should not be relied on."""
        return self._fitted[0]

    @property
    def doubt(self) -> str | None:
        """Why the fit should not be relied on, None if it may be."""
        error = self._fitted[1]
        return None if error is None else str(error)

    @cached_property
    def _fitted(self) -> tuple[StalenessFit, UnreliableEstimateError | None]:
        try:
            return fit_runs(self.runs), None
        except UnreliableEstimateError as error:
            return cast(StalenessFit, error.estimate), error

    @property
    def prediction(self) -> Prediction | None:
        """The prediction made by `predict`, or else the one stored with the runs as they are."""
        made = self._made or self._stored[0]
        return made and made[0]

    @property
    def score(self) -> Score | None:
        """The errors of the prediction, None where there is none."""
        made = self._made or self._stored[0]
        return made and made[1]

    @property
    def missing(self) -> str | None:
        """Why there is no prediction, None where there is one."""
        if self._made or self._stored[0]:
            return None
        return self._refusal or self._stored[1]

    @cached_property
    def _stored(self) -> tuple[tuple[Prediction, Score] | None, str]:
        """The prediction stored with the runs and its score, or why it cannot be used."""
        if not has_prediction(self.path):
            return None, "no prediction is stored; `asgd predict` makes one"
        try:
            prediction = read_prediction(self.path)
            predicted, ended = int(prediction.curves["update"].max()), last_update(self.whole[0])
            if predicted != ended:
                return None, (
                    f"the stored prediction ends at update {predicted:,}, the run at {ended:,}; "
                    "`asgd predict` makes a new one"
                )
            return (prediction, compare(self.whole, prediction)), ""
        except InputError as error:  # damaged, or of other runs
            return None, str(error)

    def check_problem(self, task: str, *, force: bool = False) -> None:
        """Refuse runs whose problem has changed, see `asgd.rundir.problem_record`.

        Where the problem is not to be had, as a plug-in of somebody else's, nothing is said: what
        is stored can be reported on.

        Raises
        ------
        ProblemChangedError
            It has changed, and it is not `force` to go on all the same.
        """
        try:
            problem = make_problem(self.run.config)
        except InputError:
            return
        for run in self.runs:
            check_problem(run, problem, task, force=force)

    def predict(
        self,
        *,
        paths: int = 64,
        models: Sequence[str] | None = None,
        method: Method = "auto",
        seed: int | None = None,
        force: bool = False,
        announce: Callable[[float], None] | None = None,
        progress: Callable[[str, float], None] | None = None,
    ) -> tuple[Prediction, Score]:
        """Predict the loss curve with each model and score it; keep and return both.

        Parameters
        ----------
        paths, models, method, seed, force, announce, progress
            As for `analysis.predict`.

        Raises
        ------
        InputError, UnreliableEstimateError
            As for `analysis.predict` and `analysis.compare`; what was kept before stays.
        """
        prediction = predict(
            self.runs,
            paths=paths,
            models=models,
            method=method,
            seed=seed,
            fit=self.fit,
            force=force,
            announce=announce,
            progress=progress,
        )
        self._made = prediction, compare(self.whole, prediction)
        return self._made

    def predict_if_missing(
        self,
        *,
        paths: int = 64,
        force: bool = False,
        announce: Callable[[float], None] | None = None,
        progress: Callable[[str, float], None] | None = None,
    ) -> None:
        """Predict and store where no prediction is; where none can be had, `missing` says why."""
        if self.prediction is not None:
            return
        try:
            self.save()  # what cannot be stored is not worth the paths
            self.predict(paths=paths, force=force, announce=announce, progress=progress)
            self.save()
        except (InputError, UnreliableEstimateError) as error:
            self._refusal = why_not_predicted(error, self.runs)

    def save(self) -> None:
        """Store the fit, and the prediction if one was made, with the runs.

        Raises
        ------
        InputError
            The directory cannot be written to.
        UnreliableEstimateError
            The trace is too short for a fit.
        """
        with _writable():
            self.fit.save(self.path)
            if self._made:
                self._made[0].save(self.path)


@contextmanager
def _writable() -> Iterator[None]:
    """Say what to do about a run of somebody else's."""
    try:
        yield
    except PermissionError as error:
        raise InputError(
            f"{error.filename}: cannot be written ({error.strerror}): results are stored with "
            "their run; copy it to where you may write"
        ) from None
