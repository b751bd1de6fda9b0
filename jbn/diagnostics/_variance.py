"""The expected error of a running variance, for each rule that averages it."""

import math
from typing import NamedTuple

from jbn._core.state import init
from jbn._scheduled import checked_average
from jbn.diagnostics._laws import checked_count, checked_size, initial_weight, power_sum
from jbn.momentum import Schedule


class VarianceError(NamedTuple):
    """Expected error of a running variance, in units of the population variance.

    Attributes:
        bias: expectation of the running variance minus the population variance.
        spread: standard deviation of the running variance.

    Example:
        >>> import jbn
        >>> print(jbn.diagnostics.expected_variance(0.0, 1, 4).bias)
        -0.25
    """

    bias: float
    spread: float


def expected_variance(
    momentum: float | Schedule,
    steps: int,
    batch_size: int,
    distance: float = 1.0,
    *,
    running_var: str = "biased",
    start_var: float = 1.0,
) -> VarianceError:
    """Bias and spread of the running variance for a given `running_var`.

    For "biased":

    bias = W*(v0 - 1) - (1 - W)/n,  spread**2 = p_2 * 2*(n - 1)/n**2

    For "unbiased":

    bias = W*(v0 - 1),  spread**2 = p_2 * 2/(n - 1)

    For "total":

    bias = W*(v0 - 1) + W*(1 - W)*distance**2 - p_2/n
    spread**2 = p_2 * 2*(n - 1)/n**2 + 2/n**2 * (p_2 - 2*p_3 + p_2**2) + 4/n * W**2 * distance**2 * p_2

    W is the weight of the initial value, w are the weights of the batches, p_k is sum(w**k), n is the batch size and v0
    is `start_var`. The equations hold for independent, normally distributed values from one population.

    Args:
        momentum: share of the old value kept at an update, or a schedule from the count of updates to it.
        steps: number of updates, an int of at least 0.
        batch_size: n, the number of independent values in the variance of a batch, an int of at least 1, or of at least
            2 for "unbiased".
        distance: distance of the initial mean from the population mean, in standard deviations; used by "total" only.
        running_var: the rule, "biased", "unbiased" or "total" (see `jbn.update`).
        start_var: the initial variance, in units of the population variance.

    Returns:
        VarianceError(bias, spread), in units of the population variance.

    Raises:
        TypeError: momentum is neither a number nor a function, or steps or batch_size is not an int.
        ValueError: an argument is out of range, or running_var is unknown.

    Example:
        >>> import jbn
        >>> for rule in ("biased", "unbiased", "total"):
        ...     bias, spread = jbn.diagnostics.expected_variance(0.99, 2000, 2, running_var=rule)
        ...     print(f"{rule:<8} {bias:+.4f} {spread:.4f}")
        biased   -0.5000 0.0501
        unbiased +0.0000 0.1003
        total    -0.0025 0.0707

    Source:
        Casella and Berger, Statistical Inference, 2002, theorem 5.3.1, for the variance of the variance of a normal
        sample. "total" is the weighted variance of all values about their weighted mean; its part between batches is a
        quadratic form of normal variables.
    """
    checked_average(momentum, running_var, init(())[1], train=False)
    n = checked_count("batch_size", batch_size, 2 if running_var == "unbiased" else 1)
    far, initial = checked_size("distance", distance), checked_size("start_var", start_var)
    start = initial_weight(momentum, steps)
    p2, p3 = (power_sum(momentum, steps, power) for power in (2, 3))
    from_start = start * (initial - 1)
    within = p2 * 2 * (n - 1) / n**2
    if running_var == "biased":
        return VarianceError(from_start - (1 - start) / n, math.sqrt(within))
    if running_var == "unbiased":
        return VarianceError(from_start, math.sqrt(p2 * 2 / (n - 1)))
    bias = from_start + start * (1 - start) * far**2 - p2 / n
    between = 2 / n**2 * (p2 - 2 * p3 + p2**2) + 4 / n * start**2 * far**2 * p2
    return VarianceError(bias, math.sqrt(within + between))
