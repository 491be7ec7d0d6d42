"""The largest stable learning rate of the mean under a staleness law.

On a mode of curvature a the mean obeys x_{k+1} = x_k - h sum_l w_l x_{k-l} with h = eta a. Its
factors per update are the roots of z - 1 + h W(1/z), W(s) = sum_l w_l s^l; the mean is stable if
all of them lie inside the unit circle. Laws can be thousands of updates long, so everything here
works on circles by FFT instead of on the L x L companion matrix. Ours.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from asgd.arrays import Array
from asgd.errors import InputError
from asgd.staleness.geometric import ConstantPlusGeometric, Geometric
from asgd.staleness.law import StalenessLaw

Complex = npt.NDArray[np.complex128]

# A polynomial of degree L turns at most L times along a circle: sixteen points per turn follow its
# argument, and the minimum locates a root of a short law.
_POINTS_PER_TURN = 16
_FEWEST_POINTS = 2**14
# Mass of the law cut off for counting roots, and for refining the largest. The second is small: a
# double root moves by the square root of the cut, and a factor r divides the cut by r^L.
_TAIL, _FINE_TAIL = 1e-9, 1e-24
# Share of its limit up to which a fixed order is taken to be stable.
_WITHIN = 0.97
# Relative error of the radius from counting; length of a refinement step that leads to another
# root; number of steps.
_NEAR, _FAR, _STEPS = 0.02, 0.1, 6


def max_stable_learning_rate(
    law: StalenessLaw,
    curvature: float,
    *,
    momentum: float = 0.0,
    staleness_aware: bool = False,
) -> float:
    """Return the smallest learning rate at which the mean of a mode no longer decays.

    >>> analysis.max_stable_learning_rate(asgd.Geometric(0.75), curvature=2.0)
    7.0

    Single runs need not decay up to this rate: see `analysis.stability_limits`. Boundary locus: on
    the unit circle h = (1 - z)(1 - beta/z) / W(1/z) must be real and positive; at the smallest such
    h the first root leaves the disc. Closed forms over the curvature: geometric
    2 (1 + mu) / (1 - mu), constant delay D 2 sin(pi / (2 (2 D + 1))), heavy ball with geometric law
    min{(1 - beta)(1 - beta mu) / (beta mu), 2 (1 + beta)(1 + mu) / (1 - mu)}.

    Parameters
    ----------
    law
        Staleness law.
    curvature
        Largest eigenvalue of the Hessian, > 0.
    momentum
        beta of the heavy ball, in [0, 1).
    staleness_aware
        Whether the step is eta / (1 + tau); w_l / (1 + l) then replaces w_l.

    Raises
    ------
    InputError
        The curvature is not positive, or the momentum is outside [0, 1).
    """
    if not curvature > 0:
        raise InputError(f"curvature = {curvature}: expected a positive number")
    if not 0.0 <= momentum < 1.0:
        raise InputError(f"momentum = {momentum}: expected a number in [0, 1)")
    if isinstance(law, Geometric) and not (staleness_aware and momentum):
        return _geometric(law.mu, momentum, staleness_aware) / curvature
    if isinstance(law, ConstantPlusGeometric) and law.mu == momentum == 0.0:
        divided = 1.0 + law.offset * staleness_aware
        return float(divided * 2.0 * np.sin(np.pi / (2.0 * (2.0 * law.offset + 1.0)))) / curvature
    weights = law.weights(law.support_length())
    if staleness_aware:
        weights = weights / np.arange(1, len(weights) + 1)
    return _boundary_locus(weights, momentum) / curvature


def most_workers(step: float, momentum: float = 0.0, fewer_than: int = 513) -> int:
    """Return the most workers that are stable whatever their compute times, 0 if not even one is.

    Takes the limit of a fixed order of turns: no other server of as many workers that we simulated
    has a lower one.

    Parameters
    ----------
    step
        Learning rate times curvature.
    momentum
        beta of the heavy ball, in [0, 1).
    fewer_than
        The answer is below it.
    """

    def stable(workers: int) -> bool:
        order = ConstantPlusGeometric(workers - 1)
        return step < _WITHIN * max_stable_learning_rate(order, 1.0, momentum=momentum)

    low, high = 0, fewer_than
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if stable(middle) else (low, middle)
    return low


def _geometric(mu: float, momentum: float, staleness_aware: bool) -> float:
    """Return the limit for geometric staleness: the minimum over exits at z = -1 and elsewhere.

    With step eta / (1 + tau), without momentum, 2 mu / ((1 - mu) log(1 + mu)). Ours.
    """
    if staleness_aware:
        return float(2.0 * mu / ((1.0 - mu) * np.log1p(mu))) if mu else 2.0
    alternating = 2.0 * (1.0 + momentum) * (1.0 + mu) / (1.0 - mu)
    if not momentum * mu:
        return alternating
    return min((1.0 - momentum) * (1.0 - momentum * mu) / (momentum * mu), alternating)


def _boundary_locus(weights: Array, momentum: float = 0.0) -> float:
    """Return the smallest h > 0 with a root of (z - 1)(1 - beta/z) + h W(1/z) on the circle."""
    from scipy.optimize import brentq

    lags = np.arange(len(weights))

    def own(theta: Any) -> Any:
        return (1.0 - np.exp(1j * theta)) * (1.0 - momentum * np.exp(-1j * theta))

    def product(theta: float) -> complex:
        return complex(own(theta) * (np.exp(1j * theta * lags) @ weights))

    def step(theta: float) -> float:
        """Return h, or infinity where W vanishes, so that no h has a root there."""
        away, read = own(theta), np.exp(-1j * theta * lags) @ weights
        real = abs((away * np.conj(read)).imag) < 1e-6 * abs(away) * abs(read)
        return float(np.real(away / read)) if abs(read) > 1e-12 and real else np.inf

    points = circle_points(len(weights))
    angle = np.linspace(0.0, np.pi, points // 2 + 1)
    read = np.fft.rfft(weights, points)
    locus = own(angle) * np.conj(read)
    locus[-1] = locus[-1].real  # z = -1 lies on the real axis up to rounding
    crossing = np.flatnonzero(locus.imag[:-1] * locus.imag[1:] < 0)
    crossing = crossing[(locus.real[crossing] > 0) | (locus.real[crossing + 1] > 0)]
    found = [step(np.pi)]
    estimate = np.abs(locus[crossing]) / np.abs(read[crossing]) ** 2
    for i in crossing[estimate < 1.1 * min(estimate, default=0.0)]:
        ends = angle[i], angle[i + 1]
        sides = [product(end).imag for end in ends]
        if sides[0] * sides[1] > 0:  # a root at an end: its sign is that of a rounding error
            theta = ends[int(np.argmin(np.abs(sides)))]
        else:
            theta = brentq(lambda t: product(t).imag, *ends, xtol=1e-15)
        found.append(step(theta))
    return min(h for h in found if h > 0)


def spectral_radius(
    law: StalenessLaw, step: float, *, momentum: float = 0.0, staleness_aware: bool = False
) -> float:
    """Return the mean's slowest factor per update: the largest modulus of the roots.

    Bisection on the radius; the argument principle (one FFT of the law) counts the roots inside. A
    final refinement also handles a double root.

    Parameters
    ----------
    law
        Staleness law.
    step
        h, learning rate times curvature, >= 0.
    momentum, staleness_aware
        As in `max_stable_learning_rate`.

    Returns
    -------
    float
        Below one: stable. Accurate to 1e-6 if it exceeds the decay rate of the law's tail;
        otherwise about that rate.
    """
    if not step >= 0:
        raise InputError(f"step = {step}: expected learning rate times curvature >= 0")
    rule = momentum, staleness_aware
    polynomial = _polynomial(law, step, *rule, _TAIL)
    low, high = 0.0, 1.0 + momentum + step
    while high - low > 1e-6 * max(1.0, low):
        middle = (low + high) / 2
        values = _on_circle(_scaled(polynomial, middle))
        values = np.where(values == 0, np.finfo(float).tiny, values)  # a root on the circle
        turns = np.angle(np.roll(values, -1) / values).sum() / (2.0 * np.pi)
        inside = round(float(turns)) == len(polynomial) - 1
        low, high = (low, middle) if inside else (middle, high)
    radius = (low + high) / 2
    values = _on_circle(_scaled(polynomial, radius))
    z = complex(np.exp(2j * np.pi * np.argmin(np.abs(values)) / len(values)))
    return radius * _polish(_scaled(_polynomial(law, step, *rule, _FINE_TAIL), radius), z)


def _polynomial(
    law: StalenessLaw, step: float, momentum: float, staleness_aware: bool, tail: float
) -> Array:
    """Return z^{L-2} ((z - 1)(z - beta) + h z W(1/z)), lowest power first; the law is cut off."""
    weights = law.weights(max(2, law.support_length(tail)))
    if staleness_aware:
        weights = weights / np.arange(1, len(weights) + 1)
    polynomial = np.append(step * weights[::-1], 0.0)
    polynomial[-3:] += momentum, -1.0 - momentum, 1.0
    return polynomial


def _scaled(polynomial: Array, radius: float) -> Array:
    """Return p_i radius^i, scaled to a largest value of one; its roots are divided by radius."""
    with np.errstate(divide="ignore"):
        logs = np.log(np.abs(polynomial)) + np.arange(len(polynomial)) * np.log(radius)
    return np.asarray(np.sign(polynomial) * np.exp(logs - logs.max()))


def _on_circle(polynomial: Array) -> Complex:
    return np.fft.ifft(polynomial, circle_points(len(polynomial)), norm="forward")


def _polish(polynomial: Array, z: complex) -> float:
    """Return the largest modulus, near one, of the two roots next to z; one if there is none.

    Each step goes to a root of the parabola with the polynomial's value and first two derivatives.
    Unlike Newton's method this works near a double root.
    """
    powers = np.arange(len(polynomial))

    def moves(root: complex) -> list[complex]:
        terms = polynomial * root**powers
        value, slope, bend = terms.sum(), powers @ terms, (powers * (powers - 1)) @ terms
        fork = np.sqrt(slope**2 - 2.0 * value * bend + 0j)
        below = sorted((slope - fork, slope + fork), key=abs)
        return [complex(-2.0 * value / one) if one else 0j for one in below]

    found = []
    for first in moves(z):
        if abs(first) > _FAR:
            continue
        root = z * (1.0 + first)
        for _ in range(_STEPS):
            root *= 1.0 + moves(root)[1]  # the nearer one
            if not abs(abs(root) - 1.0) < _FAR:
                break  # where the slope vanishes, a step may lead anywhere
        if abs(abs(root) - 1.0) < _NEAR:
            found.append(float(abs(root)))
    return max(found, default=1.0)


def circle_points(degree: int) -> int:
    """Return how many points of a circle resolve a polynomial of this degree, a power of two."""
    wanted = max(_POINTS_PER_TURN * degree, _FEWEST_POINTS)
    return 1 << (wanted - 1).bit_length()
