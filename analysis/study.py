"""A run or its repeats with fit, prediction and score, each computed once and kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import cast

from analysis.prediction.advice import why_not_predicted
from analysis.prediction.predict import Method, Prediction, has_prediction, predict, read_prediction
from analysis.prediction.probe import Probe, probe, read_probe
from analysis.prediction.run_stability import StabilityAnswer
from analysis.prediction.score import Score, compare
from analysis.prediction.setting import RunSetting, last_update, whole
from analysis.profile.fit import StalenessFit
from analysis.profile.repeats import as_runs, fit_runs
from asgd.errors import InputError, UnreliableEstimateError
from asgd.problems.base import Problem
from asgd.problems.make import make_problem
from asgd.rundir.problem_record import check_problem
from asgd.rundir.reader import Run
from asgd.rundir.repeats import read_runs


class Study:
    """One run, or repeats of it, with its fit, prediction and score.

    >>> study = analysis.Study.open(run.path)
    >>> prediction, score = study.predict(paths=16)
    >>> score.closest in prediction.models
    True

    Parameters
    ----------
    path
        The directory of the run or of the repeats.
    runs
        One run, or repeats that differ only in the seed. Their tables are read at once, because
        tables of a running run that are read at different times do not match.

    Raises
    ------
    InputError
        There is no run, or two runs are not repeats of each other.
    """

    def __init__(self, path: str | Path, runs: Run | Sequence[Run]) -> None:
        self.path, self.runs = Path(path), as_runs(runs)
        for run in self.runs:
            # The losses first: the trace must cover all of them.
            if run.keeps_rows:
                _ = run.loss, run.trace, run.members, run.discarded, run.events
            else:
                _ = run.loss, run.staleness_counts, run.events
        self._made: tuple[Prediction, Score] | None = None
        self._refusal: str | None = None
        self._probe: Probe | None = None

    @classmethod
    def open(cls, path: str | Path | Run) -> Study:
        """Read the directory of a run or of repeats, or take a run.

        Raises
        ------
        InputError
            `path` is neither.
        """
        return cls(path.path, path) if isinstance(path, Run) else cls(path, read_runs(path))

    @property
    def run(self) -> Run:
        """The first repeat; figures of workers show this one."""
        return self.runs[0]

    @cached_property
    def whole(self) -> list[Run]:
        """The repeats that reached the last update of the longest one; only these are predicted."""
        return whole(self.runs)

    @cached_property
    def problem(self) -> Problem:
        """The problem of the runs, made once.

        Raises
        ------
        InputError
            See `asgd.make_problem`.
        """
        return make_problem(self.run.config)

    @property
    def fit(self) -> StalenessFit:
        """The staleness fit.

        Raises
        ------
        InputError
            A run recorded no update.
        UnreliableEstimateError
            The trace is too short; use `estimate` to get the fit all the same.
        """
        fit, error = self._fitted
        if error is not None:
            raise error
        return fit

    @property
    def estimate(self) -> StalenessFit:
        """The staleness fit, even if it is unreliable."""
        return self._fitted[0]

    @property
    def doubt(self) -> str | None:
        """Why the fit is unreliable; None if it is reliable."""
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
        """The prediction made by `predict`, else a stored one that matches the runs."""
        made = self._made or self._stored[0]
        return made and made[0]

    @property
    def score(self) -> Score | None:
        """The errors of the prediction; None without a prediction."""
        made = self._made or self._stored[0]
        return made and made[1]

    @property
    def missing(self) -> str | None:
        """Why there is no prediction; None if there is one."""
        if self._made or self._stored[0]:
            return None
        if self.probed is not None:
            return "only its stability was probed; `asgd predict` predicts the loss"
        return self._refusal or self._stored[1]

    @property
    def probed(self) -> Probe | None:
        """The probe made by `probe`, else a stored one."""
        if self._probe is None:
            self._probe = read_probe(self.path)
        return self._probe

    @property
    def stability(self) -> StabilityAnswer | None:
        """The stability by the prediction, else by the probe; None without both."""
        if self.prediction is not None:
            return self.prediction.settings.stability
        return self.probed.stability if self.probed is not None else None

    def probe(self, *, force: bool = False) -> Probe:
        """Probe the stability of the first run and keep the answer.

        Parameters
        ----------
        force
            Probe even if the problem has changed.

        Raises
        ------
        InputError
            The run evaluated no loss, or its problem has changed.
        UnreliableEstimateError
            The trace is too short for a fit, or no eigenvalue converged.
        """
        if self.run.loss.empty:
            raise InputError(f"{self.run.path}: holds no loss evaluation: expected one to probe")
        check_problem(self.run, self.problem, "predict", force=force)
        self._probe = probe(self.run, RunSetting.of(self.runs, self.fit, self.problem))
        return self._probe

    @cached_property
    def _stored(self) -> tuple[tuple[Prediction, Score] | None, str]:
        """The stored prediction and its score, or the reason why there is none."""
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
        except InputError as error:  # damaged, or made from other runs
            return None, str(error)

    def check_problem(self, task: str, *, force: bool = False) -> None:
        """Raise if the problem has changed since the run, see `asgd.rundir.problem_record`.

        The check passes if the problem cannot be loaded, for instance for a missing plug-in: the
        stored results can still be reported.

        Raises
        ------
        ProblemChangedError
            The problem has changed and `force` is False.
        """
        try:
            problem = self.problem
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
            As for `analysis.predict` and `analysis.compare`; an earlier prediction is kept.
        """
        prediction = predict(
            self.runs,
            paths=paths,
            models=models,
            method=method,
            seed=seed,
            fit=self.fit,
            problem=self.problem,
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
        """Predict and store unless a prediction or a probe exists.

        If that fails, `missing` says why.
        """
        if self.prediction is not None or self.probed is not None:
            return
        try:
            self.save()  # before the paths: an unwritable directory must fail early
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
            if self._probe:
                self._probe.save(self.path)


@contextmanager
def _writable() -> Iterator[None]:
    """Turn an `OSError` into advice on runs in read-only directories."""
    try:
        yield
    except PermissionError as error:
        raise InputError(
            f"{error.filename}: cannot be written ({error.strerror}): results are stored with "
            "their run; copy it to where you may write"
        ) from None
