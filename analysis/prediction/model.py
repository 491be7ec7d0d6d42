"""The models that predict the loss curve of a run: a class for each, and their list.

A model has up to three methods: an ensemble of simulated paths, which every model has; exact
moments for linear gradients; one mean path with linear noise around it, (F1).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import cast

import numpy as np

from analysis.exact.given_reads import (
    fits,
    independent_reads,
    live_snapshots,
    pool_reads,
    recorded_reads,
    turn_reads,
)
from analysis.exact.moments import Closure
from analysis.models.ensemble import Ensemble, PathOptions
from analysis.models.recorded_turns import RecordedTurns, ResampledTurns
from analysis.models.replay import sme_replay
from analysis.models.sme_asgd import sme_asgd
from analysis.models.sme_law import sme_law
from analysis.models.sme_sgd import sme_sgd
from analysis.prediction.exact import drawn_sequences, geometric_curve, given_reads, is_linear
from analysis.prediction.linear_noise import lag_amplification, linear_noise
from analysis.prediction.loss_curve import SCORED_LEVELS, LossCurve
from analysis.prediction.run_stability import leading_curvatures
from analysis.prediction.setting import RunSetting, Setting
from asgd.errors import InputError, UnreliableEstimateError
from asgd.staleness import Geometric, StalenessLaw
from asgd.streams import stream

OnProgress = Callable[[int, int], None]

# Amplification of noise by random lags up to which the fast method is accepted. On a tanh network
# its loss is up to 9 % off at 1.07, 18 % at 1.15 and 26 % at 1.6, early, where the mean path moves.
LARGEST_AMPLIFICATION = 1.07


class Model(ABC):
    """A model of the loss curve of a run.

    Attributes
    ----------
    name
        Name in code, options and files.
    label
        Name in tables and figures.
    takes_rule
        Whether the model supports update rules other than plain SGD.
    has_fast
        Whether it has a mean path for `fast`.
    """

    name: str
    label: str
    takes_rule = False
    has_fast = True

    def label_for(self, setting: RunSetting) -> str:
        """Return the label, made more precise by the setting."""
        return self.label

    def is_default(self, setting: RunSetting) -> bool:
        """Return whether the model is used if none is asked for."""
        return False

    @abstractmethod
    def simulate(
        self, setting: RunSetting, paths: int, seed: int, progress: OnProgress | None = None
    ) -> Ensemble:
        """Return an ensemble of paths, recorded at the updates of the setting."""

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
        raise InputError(f"method = 'fast': has no {self.name}; expected 'auto' or 'simulate'")

    def fast(self, setting: RunSetting, seed: int, progress: OnProgress | None = None) -> LossCurve:
        """Return the curve of one mean path with linear noise around it, (F1).

        Raises
        ------
        InputError
            The model has no mean path, or the setting has a schedule.
        """
        law = self.fast_law(setting)
        if not setting.steady:
            raise InputError("method = 'fast': takes no schedules; expected 'auto' or 'simulate'")
        return linear_noise(
            setting.problem,
            float(setting.learning_rate),
            law,
            seed,
            batch_size=int(setting.batch_size),
            initial=setting.initial,
            record=setting.record,
            dtype=setting.dtype,
            progress=progress,
        )


class WithoutStaleness(Model):
    """SME-SGD of Li, Tai and E, (S6): the baseline that ignores asynchrony."""

    name, label = "sme_sgd", "SME-SGD (no staleness)"

    def is_default(self, setting: RunSetting) -> bool:
        """Return True under plain SGD."""
        return setting.rule is None

    def simulate(
        self, setting: RunSetting, paths: int, seed: int, progress: OnProgress | None = None
    ) -> Ensemble:
        """Return an ensemble of the native scheme."""
        return sme_sgd(
            setting.problem,
            setting.learning_rate,
            setting.updates,
            paths,
            seed,
            native=True,
            batch_size=setting.batch_size,
            **_path_options(setting, progress),
        )

    def has_exact(self, setting: RunSetting) -> bool:
        """Return whether gradients are linear."""
        return is_linear(setting)

    def exact(self, setting: RunSetting, seed: int) -> LossCurve:
        """Return the curve of geometric staleness with mu = 0."""
        return geometric_curve(setting, 0.0, "iid", seed)

    def fast_law(self, setting: RunSetting) -> StalenessLaw:
        """Return the law without staleness."""
        return Geometric(0.0)


class GeometricStaleness(Model):
    """SME-ASGD of An, Lu and Ying, (S1) to (S3), with the geometric fit of the run."""

    name, label = "sme_asgd", "SME-ASGD (geometric fit)"

    def is_default(self, setting: RunSetting) -> bool:
        """Return True under plain SGD with stale gradients."""
        return setting.rule is None and not setting.synchronous

    def simulate(
        self, setting: RunSetting, paths: int, seed: int, progress: OnProgress | None = None
    ) -> Ensemble:
        """Return an ensemble of the native scheme, (S5)."""
        return sme_asgd(
            setting.problem,
            setting.learning_rate,
            setting.mu,
            setting.updates,
            paths,
            seed,
            batch_size=setting.batch_size,
            **_path_options(setting, progress),
        )

    def has_exact(self, setting: RunSetting) -> bool:
        """Return whether gradients are linear."""
        return is_linear(setting)

    def exact(self, setting: RunSetting, seed: int) -> LossCurve:
        """Return the curve of independent geometric staleness."""
        return geometric_curve(setting, setting.mu, "iid", seed)

    def fast_law(self, setting: RunSetting) -> StalenessLaw:
        """Return the geometric fit."""
        return Geometric(setting.mu)


class MeasuredLaw(Model):
    """The SME of the measured staleness law, (G1), with a closure of its noise.

    Parameters
    ----------
    name, label
        As for every model.
    closure
        How the lags of different updates depend on each other. None: the closure of the run, and
        for "pool" its recorded turns if they come in spells, (P3).
    """

    def __init__(self, name: str, label: str, closure: Closure | None = None) -> None:
        self.name, self.label, self._closure = name, label, closure

    def label_for(self, setting: RunSetting) -> str:
        """Return the label; it differs if recorded turns replace the law."""
        return self.label if self._turns(setting) is None else "SME with recorded turns"

    def is_default(self, setting: RunSetting) -> bool:
        """Return True for the closure of the run, under plain SGD with stale gradients."""
        return self._closure is None and setting.rule is None and not setting.synchronous

    def simulate(
        self, setting: Setting, paths: int, seed: int, progress: OnProgress | None = None
    ) -> Ensemble:
        """Return an ensemble of (G1), (P2) or (P3)."""
        closure = self._closure or setting.closure
        return sme_law(
            setting.problem,
            setting.learning_rate,
            setting.law,
            setting.updates,
            paths,
            seed,
            closure=closure,
            workers=setting.workers if closure == "pool" else None,
            turns=self._turns(setting),
            batch_size=setting.batch_size,
            **_path_options(setting, progress),
        )

    def has_exact(self, setting: Setting) -> bool:
        """Return whether gradients are linear and the live snapshots fit into memory.

        For closure "sampling" moments close only for the geometric law.
        """
        if not is_linear(setting):
            return False
        if isinstance(setting.law, Geometric):
            return True
        if (self._closure or setting.closure) == "sampling":
            return False
        slots, dim = self._slots(setting), setting.problem.dim
        return fits(slots, drawn_sequences(slots, dim), dim)

    def exact(self, setting: Setting, seed: int) -> LossCurve:
        """Return the curve from moments.

        Exact for independent geometric staleness and for the pool of memoryless workers; for other
        laws exact given the reads, and averaged over a few drawn sequences of reads.
        """
        closure, law, dim = self._closure or setting.closure, setting.law, setting.problem.dim
        if isinstance(law, Geometric):
            mu = 1 - 1 / setting.workers if closure == "pool" else law.mu
            return geometric_curve(setting, mu, closure, seed)
        if closure == "sampling":
            raise InputError(f"closure = {closure!r} of {law}: expected pool or iid")
        rng, turns = stream(seed, f"reads/{closure}"), self._turns(setting)
        runs = drawn_sequences(self._slots(setting), dim)
        if closure == "iid":
            reads = independent_reads(law, setting.updates, runs, rng)
        elif turns is not None:
            reads = turn_reads(ResampledTurns(turns, runs, rng), runs)
        else:
            reads = pool_reads(law, setting.workers, runs, rng)
        return given_reads(setting, reads, seed, drawn=True)

    def fast_law(self, setting: Setting) -> StalenessLaw:
        """Return the measured law."""
        return setting.law

    def fast(self, setting: RunSetting, seed: int, progress: OnProgress | None = None) -> LossCurve:
        """Return the curve of one mean path with linear noise around it, (F1).

        Raises
        ------
        UnreliableEstimateError
            Each snapshot is used once and random lags matter, which (F1) omits. The error carries
            the curve.
        """
        curve = super().fast(setting, seed, progress)
        if (self._closure or setting.closure) != "pool" or curve.unstable_from is not None:
            return curve
        points = [setting.initial, *([curve.end] if np.isfinite(curve.end).all() else [])]
        top = max(float(leading_curvatures(setting.problem, point)[0]) for point in points)
        if top <= 0:
            return curve
        step, rng = float(setting.learning_rate) * top, stream(seed, "lag amplification")
        amplified = lag_amplification(setting.pool_law, setting.workers, step, rng)
        if not amplified <= LARGEST_AMPLIFICATION:
            raise UnreliableEstimateError(
                f"method 'fast', {self.label}: random lags make noise {amplified:.3g} times what "
                "its linear theory says, which knows nothing of them; accepted here: 'auto', "
                "'simulate'",
                curve,
            )
        return curve

    def _turns(self, setting: Setting) -> RecordedTurns | None:
        return setting.turns if self._closure is None else None

    def _slots(self, setting: Setting) -> int:
        """Return the number of snapshots that a sequence of drawn reads keeps."""
        if (self._closure or setting.closure) == "iid":
            return min(setting.law.support_length(), setting.updates + 1)
        turns = self._turns(setting)
        return setting.workers if turns is None else turns.workers


class Replay(Model):
    """(G1) with the measured sequence of staleness; the only model for every update rule."""

    name, label = "replay", "replay of the measured staleness"
    takes_rule, has_fast = True, False

    def is_default(self, setting: RunSetting) -> bool:
        """Return True for every run."""
        return True

    def simulate(
        self, setting: RunSetting, paths: int, seed: int, progress: OnProgress | None = None
    ) -> Ensemble:
        """Return an ensemble; several runs share the paths."""
        return sme_replay(
            setting.problem,
            setting.learning_rate,
            setting.staleness,
            paths,
            seed,
            updates=setting.updates,
            rule=setting.rule,
            batch_size=setting.batch_size,
            **_path_options(setting, progress),
        )

    def has_exact(self, setting: RunSetting) -> bool:
        """Return whether gradients are linear and the live snapshots fit into memory."""
        if not is_linear(setting) or setting.rule is not None:
            return False
        live = [live_snapshots(tau[: setting.updates]) for tau in setting.staleness]
        return fits(max(live) + 1, len(live), setting.problem.dim)

    def exact(self, setting: RunSetting, seed: int) -> LossCurve:
        """Return the curve from the moments given the reads of each run."""
        reads = recorded_reads([tau[: setting.updates] for tau in setting.staleness])
        return given_reads(setting, reads, seed)


def _path_options(setting: Setting, progress: OnProgress | None) -> PathOptions:
    return cast(
        PathOptions,
        {
            "dtype": setting.dtype,
            "initial": setting.initial,
            "record": setting.record,
            "quantile_levels": SCORED_LEVELS,
            "progress": progress,
        },
    )


LAW = MeasuredLaw("sme_law", "SME with the measured law")

MODELS: dict[str, Model] = {
    model.name: model
    for model in (
        WithoutStaleness(),
        GeometricStaleness(),
        LAW,
        Replay(),
        MeasuredLaw("law_pool", "measured law, each snapshot used once", "pool"),
        MeasuredLaw("law_iid", "measured law, independent lags", "iid"),
        MeasuredLaw("law_sampling", "measured law, no lag noise", "sampling"),
    )
}

LABELS = {name: model.label for name, model in MODELS.items()}
