"""The interface of a model of the loss curve.

A model has up to three methods: an ensemble of simulated paths, always; exact moments for linear
gradients; one mean path with linear noise around it, (F1).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from analysis.models.blocks import PathModel
from analysis.prediction.lag_noise import DrawnReads
from analysis.prediction.linear_noise import linear_noise
from analysis.prediction.loss_curve import LossCurve
from analysis.prediction.setting import RunSetting
from asgd.errors import InputError
from asgd.staleness.law import StalenessLaw

OnProgress = Callable[[int, int], None]


class Model(ABC):
    """A model of the loss curve of a run.

    Attributes
    ----------
    name
        Name in code, options and files.
    label
        Name in tables and figures.
    replays
        Whether the model uses the recorded reads. Such a model supports any update rule, any policy
        of the server, and batches that are not independent draws.
    measured
        Whether it uses the measured law or reads, instead of assuming a law.
    has_fast
        Whether it has a mean path for `fast`.
    """

    name: str
    label: str
    replays = False
    measured = True
    has_fast = True

    def label_for(self, setting: RunSetting) -> str:
        """Return the label, made more precise by the setting."""
        return self.label

    def is_default(self, setting: RunSetting) -> bool:
        """Return whether the model is used if none is asked for."""
        return False

    @abstractmethod
    def path_model(self, setting: RunSetting, seed: int) -> PathModel:
        """Return the paths to simulate.

        Parameters
        ----------
        seed
            Seed of random numbers that all paths share, if any.
        """

    def has_exact(self, setting: RunSetting) -> bool:
        """Return whether `exact` can compute this setting in memory."""
        return False

    def exact(self, setting: RunSetting, seed: int) -> LossCurve:
        """Return the curve from exact moments.

        Parameters
        ----------
        seed
            Seed of drawn reads, if any, and of the draws for the quantiles.

        Raises
        ------
        InputError
            The model has no exact moments for this setting.
        """
        raise InputError(f"model = {self.name!r}: expected one with exact moments")

    def fast_law(self, setting: RunSetting) -> StalenessLaw:
        """Return the staleness law of the mean path of `fast`.

        Raises
        ------
        InputError
            The model has no mean path.
        """
        raise InputError(f"method = 'fast': expected 'auto' or 'simulate' for {self.name}")

    def fast_reads(self, setting: RunSetting, seed: int) -> DrawnReads | None:
        """Return drawn reads for the lag noise of `fast`; None if there is none."""
        return None

    def fast(self, setting: RunSetting, seed: int, progress: OnProgress | None = None) -> LossCurve:
        """Return the curve of one mean path with linear noise around it, (F1) to (F3).

        Raises
        ------
        InputError
            The model has no mean path, or the setting has a schedule or several starts.
        """
        law = self.fast_law(setting)
        if setting.starts > 1:
            raise InputError(
                "method = 'fast': expected 'auto' or 'simulate' for repeats that start at "
                "different points"
            )
        if not setting.steady:
            raise InputError("method = 'fast': expected 'auto' or 'simulate' with schedules")
        return linear_noise(
            setting.problem,
            float(setting.learning_rate),
            law,
            seed,
            batch_size=int(setting.batch_size),
            initial=setting.initial,
            record=setting.record,
            reads=self.fast_reads(setting, seed),
            dtype=setting.dtype,
            progress=progress,
        )
