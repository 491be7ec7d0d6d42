"""The model of the paper: independent geometric staleness."""

from __future__ import annotations

from analysis.models.blocks import PathModel
from analysis.models.sme_asgd import sme_asgd_paths
from analysis.prediction.exact import geometric_curve, is_linear
from analysis.prediction.kinds.base import Model
from analysis.prediction.lag_noise import DrawnReads
from analysis.prediction.loss_curve import LossCurve
from analysis.prediction.setting import RunSetting
from asgd.staleness.geometric import Geometric
from asgd.staleness.law import StalenessLaw


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
        return DrawnReads.independent(Geometric(setting.mu), setting.updates, seed)
