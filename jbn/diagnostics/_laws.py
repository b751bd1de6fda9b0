"""The laws of the moving average: its weights, and the expected error of a running mean."""

import math
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jbn import momentum as schedules
from jbn._scheduled import checked_momentum
from jbn.momentum import Schedule

GRID = 600
SMALLEST_RATE = 1e-12


class AverageWeights(NamedTuple):
    """Weights of the initial value and of each batch in a moving average.

    average = start * initial_value + sum(batches * statistics)

    Attributes:
        start: weight of the initial value.
        batches: float64 array with the weight of each batch, in the order of the updates. Together with `start`, the
            weights sum to 1.

    Example:
        >>> import jbn
        >>> weights = jbn.diagnostics.average_weights(0.5, 3)
        >>> print(weights.start, weights.batches)
        0.125 [0.125 0.25  0.5  ]
    """

    start: float
    batches: np.ndarray


def average_weights(momentum: float | Schedule, steps: int) -> AverageWeights:
    """Weights of the initial value and of each batch after a number of updates.

    start = prod(m_t),  batches_t = (1 - m_t) * prod(m_s)

    m_t is the momentum of update t. The first product runs over all updates, the second over the updates s after t.

    Args:
        momentum: share of the old value kept at an update, or a schedule from the count of updates to it.
        steps: number of updates, an int of at least 0.

    Returns:
        AverageWeights, in float64.

    Raises:
        TypeError: momentum is neither a number nor a function, or steps is not an int.
        ValueError: momentum is outside [0, 1], or steps is negative.

    Example:
        >>> import jbn
        >>> print(jbn.diagnostics.average_weights(jbn.momentum.cumulative(), 4).batches.round(3))
        [0.25 0.25 0.25 0.25]

    Source:
        The update, new = m * old + (1 - m) * batch, written out; Roberts, Control Chart Tests Based on Geometric
        Moving Averages, 1959.
    """
    kept = momenta(momentum, steps)
    later = np.concatenate([np.cumprod(kept[::-1])[::-1], [1.0]])
    return AverageWeights(float(later[0]), (1 - kept) * later[1:])


def initial_weight(momentum: float | Schedule, steps: int) -> float:
    """Weight of the initial mean 0 and variance 1 in the running statistics.

    weight = prod(m_t)

    m_t is the momentum of update t. For a constant momentum the weight is momentum ** steps.

    Args:
        momentum: share of the old value kept at an update, or a schedule from the count of updates to it.
        steps: number of updates, an int of at least 0.

    Returns:
        The weight, in [0, 1].

    Raises:
        TypeError: momentum is neither a number nor a function, or steps is not an int.
        ValueError: momentum is outside [0, 1], or steps is negative.

    Example:
        >>> import jbn
        >>> print(f"{jbn.diagnostics.initial_weight(0.99, 200):.3f}")
        0.134

    Source:
        The update, new = m * old + (1 - m) * batch, written out.
    """
    if callable(momentum):
        return average_weights(momentum, steps).start
    return checked_momentum("momentum", momentum) ** checked_count("steps", steps)


def half_life(momentum: float) -> float:
    """Number of updates after which an old value keeps half of its weight.

    half_life = log(1/2) / log(momentum)

    Args:
        momentum: share of the old value kept at an update, in [0, 1].

    Returns:
        Number of updates, not rounded; inf for momentum 1.

    Raises:
        TypeError: momentum is not a number.
        ValueError: momentum is outside [0, 1].

    Example:
        >>> import jbn
        >>> print(f"{jbn.diagnostics.half_life(0.99):.1f}")
        69.0

    Source:
        momentum ** half_life = 1/2.
    """
    kept = checked_momentum("momentum", momentum)
    if kept in (0.0, 1.0):
        return math.inf if kept else 0.0
    return math.log(0.5) / math.log(kept)


def effective_batches(momentum: float | Schedule, steps: int | None = None) -> float:
    """Number of batches whose plain average would be as noisy as the moving average without its initial value.

    effective_batches = sum(w)**2 / sum(w**2)

    w are the weights of the batches, which are divided by their sum to leave out the initial value. For a constant
    momentum m this is

    effective_batches = (1 + m)/(1 - m) * (1 - m**steps)/(1 + m**steps)

    and it tends to (1 + m)/(1 - m) as the number of steps grows.

    Args:
        momentum: share of the old value kept at an update, or a schedule from the count of updates to it.
        steps: number of updates, an int of at least 0; None gives the limit for many updates, if momentum is a number.

    Returns:
        Number of batches, not rounded; 0 if no batch has a weight. The initial value is not counted.

    Raises:
        TypeError: momentum is neither a number nor a function, or steps is not an int, or is None with a schedule.
        ValueError: momentum is outside [0, 1], or steps is negative.

    Example:
        >>> import jbn
        >>> print(f"{jbn.diagnostics.effective_batches(0.99):.0f}", jbn.diagnostics.effective_batches(0.0, 10))
        199 1.0

    Source:
        Kish, Survey Sampling, 1965, for the effective size of a weighted sample.
    """
    if steps is None:
        if callable(momentum):
            raise TypeError("`steps` is None, but `momentum` is a schedule: give the number of updates, an int.")
        kept = checked_momentum("momentum", momentum)
        return (1 + kept) / (1 - kept) if kept < 1 else 0.0
    squares = power_sum(momentum, steps, 2)
    return power_sum(momentum, steps, 1) ** 2 / squares if squares else 0.0


def expected_error(momentum: float | Schedule, steps: int, batch_size: int, distance: float = 1.0) -> float:
    """Expected squared error of a running mean, in units of the population variance.

    error = start**2 * distance**2 + sum(w**2) / batch_size

    start and w are the weights of the initial value and of the batches. For a constant momentum m this is

    error = m**(2*steps) * distance**2 + (1 - m)/(1 + m) * (1 - m**(2*steps)) / batch_size

    The first term is squared bias, the second is noise. A larger momentum raises the bias and lowers the noise. The
    values are assumed to be independent and from one population. Drift of the activations in training is not included.

    Args:
        momentum: share of the old value kept at an update, or a schedule from the count of updates to it.
        steps: number of updates, an int of at least 0.
        batch_size: number of independent values in the mean of a batch, an int of at least 1.
        distance: distance of the initial mean from the population mean, in standard deviations.

    Returns:
        The expectation of (running mean - population mean)**2 / population variance.

    Raises:
        TypeError: momentum is neither a number nor a function, or steps or batch_size is not an int.
        ValueError: an argument is out of range.

    Example:
        >>> import jbn
        >>> print([round(jbn.diagnostics.expected_error(m, 200, 32), 4) for m in (0.9, 0.99, 0.999)])
        [0.0016, 0.0181, 0.6702]

    Source:
        Lucas and Saccucci, Exponentially Weighted Moving Average Control Schemes, 1990, for the variance of the
        average; the bias is `initial_weight` times the distance.
    """
    size, start = checked_count("batch_size", batch_size, 1), checked_size("distance", distance)
    return initial_weight(momentum, steps) ** 2 * start**2 + power_sum(momentum, steps, 2) / size


def best_momentum(steps: int, batch_size: int, distance: float = 1.0) -> float:
    """The constant momentum that minimizes the expected error of the running mean.

    best_momentum = argmin(expected_error(m, steps, batch_size, distance))

    Args:
        steps: number of updates, an int of at least 1.
        batch_size: number of independent values in the mean of a batch, an int of at least 1.
        distance: distance of the initial mean from the population mean, in standard deviations.

    Returns:
        A momentum in [0, 1]; 1 if the distance is 0.

    Raises:
        TypeError: steps or batch_size is not an int.
        ValueError: an argument is out of range.

    Example:
        >>> import jbn
        >>> print(f"{jbn.diagnostics.best_momentum(1000, 32):.4f}")
        0.9941

    Source:
        `expected_error`, minimized on a grid of 1 - m and then near the best grid point by Brent's method.
    """
    from scipy.optimize import minimize_scalar

    steps, size = checked_count("steps", steps, 1), checked_count("batch_size", batch_size, 1)
    if checked_size("distance", distance) == 0:
        return 1.0

    def error(log_rate: float) -> float:
        return expected_error(1 - math.exp(log_rate), steps, size, distance)

    grid = np.linspace(math.log(SMALLEST_RATE), 0.0, GRID)
    best = min(range(GRID), key=lambda place: error(grid[place]))
    around = grid[max(best - 1, 0)], grid[min(best + 1, GRID - 1)]
    found = minimize_scalar(error, bounds=around, method="bounded", options={"xatol": 1e-9}).x
    return 1 - math.exp(min((found, grid[best]), key=error))


def momenta(momentum: Any, steps: int) -> np.ndarray:
    """The momentum of each update, in float64; values of a schedule are rounded as in training."""
    steps = checked_count("steps", steps)
    if not callable(momentum):
        return np.full(steps, checked_momentum("momentum", momentum))
    at = jax.vmap(lambda count: schedules.at(momentum, count, jnp.float32))
    return np.asarray(at(jnp.arange(steps, dtype=jnp.int32)), np.float64)


def power_sum(momentum: Any, steps: int, power: int) -> float:
    """Sum of w ** power over the weights w of the batches.

    sum(w**power) = (1 - m)**power * (1 - m**(power*steps)) / (1 - m**power)
    """
    if callable(momentum):
        return float(np.sum(average_weights(momentum, steps).batches ** power))
    kept, steps = checked_momentum("momentum", momentum), checked_count("steps", steps)
    if steps == 0 or kept == 1:
        return 0.0
    if kept == 0:
        return 1.0
    log = math.log(kept)
    return (1 - kept) ** power * math.expm1(power * steps * log) / math.expm1(power * log)


def written(momentum: float) -> str:
    """A momentum as text, with enough digits to tell it from 1."""
    digits = 4 if momentum == 1 else 2 - math.floor(math.log10(1 - momentum))
    return f"{momentum:.{digits}f}".rstrip("0").rstrip(".")


def checked_count(name: str, value: Any, least: int = 0) -> int:
    """The value as an int, at least `least`."""
    try:
        count = operator.index(value)
    except TypeError:
        raise TypeError(f"`{name}` is {value!r}: expected an int of at least {least}.") from None
    if count < least:
        raise ValueError(f"`{name}` is {count}: expected an int of at least {least}.")
    return count


def checked_size(name: str, value: Any) -> float:
    """The value as a finite number of at least 0."""
    try:
        size = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"`{name}` is {value!r}: expected a number of at least 0.") from None
    if not 0 <= size < math.inf:
        raise ValueError(f"`{name}` is {size}: expected a finite number of at least 0.")
    return size
