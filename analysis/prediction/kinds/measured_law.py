"""The models of the measured staleness law, one for each closure of its noise."""

from __future__ import annotations

from analysis.exact.given_reads import Reads, fits, independent_reads, pool_reads, turn_reads
from analysis.exact.moments import Closure
from analysis.models.blocks import PathModel
from analysis.models.recorded_turns import RecordedTurns, ResampledTurns
from analysis.models.sme_law import sme_law_paths
from analysis.models.turns import START_UP
from analysis.prediction.exact import drawn_sequences, geometric_curve, given_reads, is_linear
from analysis.prediction.kinds.base import Model
from analysis.prediction.lag_noise import DrawnReads, servers
from analysis.prediction.loss_curve import LossCurve
from analysis.prediction.setting import RunSetting, Setting
from asgd.errors import InputError
from asgd.staleness.geometric import Geometric
from asgd.staleness.law import StalenessLaw
from asgd.streams import stream


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
            return DrawnReads.independent(setting.law, updates, seed)
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
