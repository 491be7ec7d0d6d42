"""The model with the measured staleness of every update."""

from __future__ import annotations

from analysis.exact.given_reads import fits, live_snapshots, recorded_reads
from analysis.models.blocks import PathModel
from analysis.models.push_replay import push_replay_paths
from analysis.models.replay import replay_paths
from analysis.prediction.exact import given_reads, is_linear
from analysis.prediction.kinds.base import Model
from analysis.prediction.loss_curve import LossCurve
from analysis.prediction.setting import RunSetting


class Replay(Model):
    """(G1) with the measured sequence of staleness; the only model for every rule and data."""

    name, label = "replay", "replay of the measured staleness"
    replays, has_fast = True, False

    def is_default(self, setting: RunSetting) -> bool:
        """Return True for every run."""
        return True

    def path_model(self, setting: RunSetting, seed: int) -> PathModel:
        """Return the replay; several runs share the paths."""
        if setting.pushes is not None and setting.rule is not None:
            return push_replay_paths(setting.descent, setting.pushes, setting.rule, setting.batches)
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
