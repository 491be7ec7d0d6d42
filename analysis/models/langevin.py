"""Kinetic Langevin equations: SME-ASGD for linear gradients, (L1), and SME-MSGD, (L4).

Both are dX = Q dt, dQ = -grad f(X) dt - friction Q dt + amplitude Sigma^{1/2} dB. The state is the
displacement v = dt Q of one update, because it needs no rescaling when the step changes.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Unpack

import numpy as np

from analysis.models.descent import Descent, DescentBlock
from analysis.models.ensemble import Ensemble, PathOptions, PerUpdate, run_ensemble
from analysis.models.noise import SNAPSHOTS, NoiseKind
from analysis.models.sme_asgd import SmeAsgd
from asgd.arguments import count, number
from asgd.arrays import Array
from asgd.problems.base import Problem
from asgd.streams import Seed


class SmeMsgd(DescentBlock):
    """A block of paths of (L4) in steps of dt'/J, semi-implicit (An, Lu, Ying, section 2.1).

        v' = (1 - (1-zeta)/J) v - (eta/J) grad f(X) - (eta/sqrt(J)) (S(X)/b)^{1/2} z
        X' = X + v'/J

    For J = 1 this is momentum SGD with Gaussian noise.

    Attributes
    ----------
    strong_order, weak_order
        Orders in dt'/J towards (L4). The noise enters Q and depends only on X, so Euler's scheme
        equals Milstein's.
    """

    strong_order = 1.0
    weak_order = 1.0

    def __init__(
        self,
        descent: Descent,
        momentum: float,
        x: Array,
        rng: np.random.Generator,
        *,
        substeps: int = 1,
    ) -> None:
        super().__init__(descent, x, rng)
        self.substeps, self.retention = substeps, 1 - (1 - momentum) / substeps
        self.v = np.zeros_like(x)

    def step(self, k: int) -> None:
        """Advance one update: J steps of length dt'/J."""
        eta = self.learning_rate[k] / self.substeps
        amplitude = eta * math.sqrt(self.substeps / self.batch_size[k])
        for _ in range(self.substeps):
            gradient, noise = self.problem.gradient_and_noise(self.x, self.rng)
            self.v *= self.retention
            self.v -= eta * gradient
            self.v -= amplitude * noise
            self.x += self.v / self.substeps


class SmeLangevin(SmeAsgd):
    """A block of paths of (L1) in steps of dt/J, with X by (L3) (An, Lu, Ying, section 2.1).

    The expected read M follows momentum SGD with zeta = mu and eta' = (1-mu) eta; the iterate is
    X = M + r sqrt(eta/(1-mu)) Q = M + r/(1-mu) v with the retention r = 1 - (1-mu)/J of one step:
    r is the mu of (L3) for J = 1, and 1 in the continuous equation (ours). Sigma is that of
    SME-ASGD along X. For linear gradients X equals that of `SmeAsgd`, path by path, for every J.

    Attributes
    ----------
    strong_order, weak_order
        Orders in dt/J towards (L1), those of `SmeAsgd`.
    """

    def __init__(
        self,
        descent: Descent,
        mu: float,
        x: Array,
        rng: np.random.Generator,
        *,
        expected_read: bool = False,
        **scheme: Any,
    ) -> None:
        super().__init__(descent, mu, x, rng, **scheme)
        self.mu, self.expected_read = mu, expected_read
        self.m, self.v = x, np.zeros_like(x)

    def step(self, k: int) -> None:
        """Advance one update: J steps of length dt/J."""
        eta = (1 - self.mu) * self.learning_rate[k] / self.substeps
        amplitude = eta * math.sqrt(self.substeps)
        for _ in range(self.substeps):
            self.v *= self.retention
            self.noise.kick(self.v, self.g, self.batch_size[k], eta, amplitude)
            self.m += self.v / self.substeps
            self.noise.absorb(self._iterate(), self.g)
            # absorb moved g towards the gradient at the iterate; (L1) has the gradient at M
            self.g[:] = self.problem.gradient(self.m)

    def position(self) -> Array:
        """Return X, or M if `expected_read`, shape (paths, d)."""
        return self.m if self.expected_read else self._iterate()

    def _iterate(self) -> Array:
        return self.m + self.retention / (1 - self.mu) * self.v


def sme_msgd(
    problem: Problem,
    learning_rate: PerUpdate,
    momentum: float,
    updates: int,
    paths: int,
    seed: Seed,
    *,
    batch_size: PerUpdate = 1,
    substeps: int = 1,
    **options: Unpack[PathOptions],
) -> Ensemble:
    """Simulate SME-MSGD, (L4), the modified equation of momentum SGD.

    With `momentum` = mu and learning rate (1-mu) eta it has the time step, friction, temperature
    and stationary law of (L1) (Proposition 2).

    Arguments that are not listed are those of `sme_asgd`.

    Parameters
    ----------
    learning_rate
        eta', a number or one for each update.
    momentum
        zeta in v' = zeta v - eta' grad f, in [0, 1).
    substeps
        1 is momentum SGD with Gaussian noise; large J approaches the continuous equation.

    Raises
    ------
    InputError
        If an argument is invalid.
    """
    number(momentum, "momentum", least=0.0, below=1.0)
    descent = Descent.of(problem, learning_rate, batch_size, updates)
    block = partial(SmeMsgd, descent, momentum, substeps=count(substeps, "substeps"))
    return run_ensemble(block, problem, updates, paths, seed, "sme_msgd", 4, **options)


def sme_langevin(
    problem: Problem,
    learning_rate: PerUpdate,
    mu: float,
    updates: int,
    paths: int,
    seed: Seed,
    *,
    batch_size: PerUpdate = 1,
    noise: NoiseKind = "auto",
    substeps: int = 1,
    lag_noise: bool = True,
    expected_read: bool = False,
    **options: Unpack[PathOptions],
) -> Ensemble:
    """Simulate SME-ASGD in the form for linear gradients, (L1) with (L3); see `SmeLangevin`.

    Arguments that are not listed are those of `sme_asgd`.

    Parameters
    ----------
    lag_noise
        False omits the random choice of the lag: Sigma = s^2 I for additive noise, as (L2) and
        Proposition 2 assume.
    expected_read
        True returns statistics of the expected read M instead of the iterate X.

    Raises
    ------
    InputError
        If an argument is invalid.
    """
    block = partial(
        SmeLangevin,
        Descent.of(problem, learning_rate, batch_size, updates),
        number(mu, "mu", least=0.0, below=1.0),
        noise=noise,
        substeps=count(substeps, "substeps"),
        lag_noise=lag_noise,
        expected_read=expected_read,
    )
    return run_ensemble(
        block, problem, updates, paths, seed, "sme_langevin", 2 * SNAPSHOTS + 6, **options
    )
