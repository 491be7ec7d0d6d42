"""The model that ignores asynchrony."""

from __future__ import annotations

from analysis.models.blocks import PathModel
from analysis.models.sme_sgd import native_sgd_paths
from analysis.prediction.exact import geometric_curve, is_linear
from analysis.prediction.kinds.base import Model
from analysis.prediction.loss_curve import LossCurve
from analysis.prediction.setting import RunSetting
from asgd.staleness.geometric import Geometric
from asgd.staleness.law import StalenessLaw


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
