"""The models that predict the loss curve of a run: a class for each, and their list.

A model has up to three methods: an ensemble of simulated paths, which every model has; exact
moments for linear gradients; one mean path with linear noise around it, (F1).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence

from analysis.exact.given_reads import (
    Reads,
    fits,
    independent_reads,
    live_snapshots,
    pool_reads,
    recorded_reads,
    turn_reads,
)
from analysis.exact.moments import Closure
from analysis.models.blocks import PathModel
from analysis.models.ensemble import Ensemble, run_ensembles
from analysis.models.local_replay import local_replay_paths
from analysis.models.recorded_turns import RecordedTurns, ResampledTurns
from analysis.models.replay import replay_paths
from analysis.models.sme_asgd import sme_asgd_paths
from analysis.models.sme_law import sme_law_paths
from analysis.models.sme_sgd import native_sgd_paths
from analysis.models.turns import START_UP
from analysis.prediction.exact import drawn_sequences, geometric_curve, given_reads, is_linear
from analysis.prediction.lag_noise import DrawnReads, servers
from analysis.prediction.linear_noise import linear_noise
from analysis.prediction.loss_curve import SCORED_LEVELS, LossCurve
from analysis.prediction.setting import RunSetting, Setting
from asgd.errors import InputError
from asgd.staleness.geometric import Geometric
from asgd.staleness.law import StalenessLaw
from asgd.streams import stream

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
        Whether the model takes the recorded reads, so that any update rule, any choice of
        gradients and batches that are no independent draws go with it.
    measured
        Whether it takes the measured law or reads, instead of assuming a law.
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
        """Return what `simulate` simulates.

        Parameters
        ----------
        seed
            Of random numbers that all paths share, if any.
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
        raise InputError(f"method = 'fast' has no {self.name}: expected 'auto' or 'simulate'")

    def fast_reads(self, setting: RunSetting, seed: int) -> DrawnReads | None:
        """Return drawn reads for the lag noise of `fast`; None if there is none."""
        return None

    def fast(self, setting: RunSetting, seed: int, progress: OnProgress | None = None) -> LossCurve:
        """Return the curve of one mean path with linear noise around it, (F1) to (F3).

        Raises
        ------
        InputError
            The model has no mean path, or the setting has a schedule.
        """
        law = self.fast_law(setting)
        if not setting.steady:
            raise InputError("method = 'fast' takes no schedules: expected 'auto' or 'simulate'")
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


class WithoutStaleness(Model):
    """SME-SGD of Li, Tai and E, (S6): the baseline that ignores asynchrony."""

    name, label = "sme_sgd", "SME-SGD (no staleness)"
    measured = False

    def is_default(self, setting: RunSetting) -> bool:
        """Return True under plain SGD with independent batches."""
        return setting.plain

    def path_model(self, setting: RunSetting, seed: int) -> PathModel:
        """Return the native scheme."""
        return native_sgd_paths(setting.descent)

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
    measured = False

    def is_default(self, setting: RunSetting) -> bool:
        """Return True under plain SGD with stale gradients."""
        return setting.plain and not setting.synchronous

    def path_model(self, setting: RunSetting, seed: int) -> PathModel:
        """Return the native scheme, (S5)."""
        return sme_asgd_paths(setting.descent, setting.mu)

    def has_exact(self, setting: RunSetting) -> bool:
        """Return whether gradients are linear."""
        return is_linear(setting)

    def exact(self, setting: RunSetting, seed: int) -> LossCurve:
        """Return the curve of independent geometric staleness."""
        return geometric_curve(setting, setting.mu, "iid", seed)

    def fast_law(self, setting: RunSetting) -> StalenessLaw:
        """Return the geometric fit."""
        return Geometric(setting.mu)

    def fast_reads(self, setting: RunSetting, seed: int) -> DrawnReads | None:
        """Return independent lags of the geometric fit."""
        return _independent(Geometric(setting.mu), setting.updates, seed)


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
        return self._closure is None and setting.plain and not setting.synchronous

    def path_model(self, setting: Setting, seed: int) -> PathModel:
        """Return (G1), (P2) or (P3)."""
        closure = self._closure or setting.closure
        return sme_law_paths(
            setting.descent,
            setting.law,
            seed,
            closure=closure,
            workers=setting.workers if closure == "pool" else None,
            turns=self._turns(setting),
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
        runs = drawn_sequences(self._slots(setting), dim)
        reads = self._reads(setting, setting.updates, runs, seed)
        return given_reads(setting, reads, seed, drawn=True)

    def fast_law(self, setting: Setting) -> StalenessLaw:
        """Return the measured law."""
        return setting.law

    def fast_reads(self, setting: Setting, seed: int) -> DrawnReads | None:
        """Return reads of the closure, recorded turns included."""
        closure, updates = self._closure or setting.closure, setting.updates
        if closure == "sampling":
            return None
        if closure == "iid":
            return _independent(setting.law, updates, seed)
        start_up = START_UP * setting.workers
        reads = self._reads(setting, updates + start_up, servers(setting.workers), seed)
        return DrawnReads.of(reads, updates, start_up)

    def _reads(self, setting: Setting, updates: int, runs: int, seed: int) -> Reads:
        closure, turns = self._closure or setting.closure, self._turns(setting)
        rng = stream(seed, f"reads/{closure}")
        if closure == "iid":
            return independent_reads(setting.law, updates, runs, rng)
        if turns is not None:
            return turn_reads(ResampledTurns(turns, runs, rng), runs)
        return pool_reads(setting.pool_law, setting.workers, runs, rng)

    def _turns(self, setting: Setting) -> RecordedTurns | None:
        return setting.turns if self._closure is None else None

    def _slots(self, setting: Setting) -> int:
        """Return the number of snapshots that a sequence of drawn reads keeps."""
        if (self._closure or setting.closure) == "iid":
            return min(setting.law.support_length(), setting.updates + 1)
        turns = self._turns(setting)
        return setting.workers if turns is None else turns.workers


class Replay(Model):
    """(G1) with the measured sequence of staleness; the only model for every rule and data."""

    name, label = "replay", "replay of the measured staleness"
    replays, has_fast = True, False

    def is_default(self, setting: RunSetting) -> bool:
        """Return True for every run."""
        return True

    def path_model(self, setting: RunSetting, seed: int) -> PathModel:
        """Return the replay; several runs share the paths."""
        if setting.local is not None and setting.rule is not None:
            return local_replay_paths(setting.descent, setting.local, setting.rule, setting.batches)
        return replay_paths(setting.descent, setting.staleness, setting.rule, setting.batches)

    def has_exact(self, setting: RunSetting) -> bool:
        """Return whether gradients are linear and the live snapshots fit into memory."""
        if not is_linear(setting) or not setting.plain or setting.staleness[0].ndim > 1:
            return False
        live = [live_snapshots(tau[: setting.updates]) for tau in setting.staleness]
        return fits(max(live) + 1, len(live), setting.problem.dim)

    def exact(self, setting: RunSetting, seed: int) -> LossCurve:
        """Return the curve from the moments given the reads of each run."""
        reads = recorded_reads([tau[: setting.updates] for tau in setting.staleness])
        return given_reads(setting, reads, seed)


def simulate(
    models: Sequence[PathModel],
    setting: Setting,
    paths: int,
    seed: int,
    progress: OnProgress | None = None,
) -> list[Ensemble]:
    """Return ensembles of paths that advance together, recorded at the updates of the setting."""
    return run_ensembles(
        models,
        setting.problem,
        setting.updates,
        paths,
        seed,
        dtype=setting.dtype,
        initial=setting.initial,
        record=setting.record,
        quantile_levels=SCORED_LEVELS.tolist(),
        progress=progress,
        moments=False,
    )


def _independent(law: StalenessLaw, updates: int, seed: int) -> DrawnReads:
    start_up = min(law.support_length(), updates)
    rng = stream(seed, "reads/iid")
    reads = independent_reads(law, updates + start_up, servers(start_up), rng)
    return DrawnReads.of(reads, updates, start_up)


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


def without_replays(names: Iterable[str]) -> list[str]:
    """Return the models that are not given the order of the staleness."""
    return [name for name in names if name not in MODELS or not MODELS[name].replays]
