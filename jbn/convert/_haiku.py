"""Haiku's batch norm: parameters of the rank of the input, and averages kept by modules of their own."""

from collections.abc import Mapping
from typing import Any

from jbn._core.state import Params, State
from jbn.convert._names import Names, as_array, check_mapping, read_one

HAIKU = Names("Haiku", "scale", "offset", "mean_ema.average", "var_ema.average", "counter")
AVERAGES = ("mean_ema", "var_ema")


def from_haiku(entries: Mapping[str, Any], *, count: int | None = None) -> tuple[Params, State]:
    """jbn's norm from a Haiku one.

    scale = scale,  bias = offset,  mean = mean_ema.average,  var = var_ema.average,  count = counter

    Args:
        entries: `scale` and `offset` as in Haiku's params, and `mean_ema` and `var_ema`, the mappings of `hidden`,
            `average`, `counter` in its state. `split((params, state), "haiku")` finds them by itself.
        count: the updates of every feature so far, instead of `counter`.

    Returns:
        Params and State, without the axes of size 1, which Haiku keeps for those that it reduces. Training goes on as
        Haiku's does with `momentum=jbn.momentum.debiased(decay_rate)`.

    Raises:
        TypeError: entries is no mapping, or count is no int.
        ValueError: entries are missing, extra or misshaped; the error lists them.

    Example:
        >>> import numpy as np
        >>> import jbn
        >>> def ema(value):
        ...     return {"hidden": np.float32([[value / 2]]), "average": np.float32([[value]]), "counter": 1}
        >>> params, state = jbn.convert.from_haiku({"mean_ema": ema(3), "var_ema": ema(4)})
        >>> print(state.mean, state.var, state.count)
        [3.] [4.] [1.]

    Source:
        Haiku, hk.BatchNorm and hk.ExponentialMovingAverage.
    """
    check_mapping("entries", entries, "with mean_ema and var_ema, as in Haiku's state")
    return read_one(HAIKU, flattened(entries), count)


def flattened(entries: Mapping[str, Any]) -> dict[str, Any]:
    """One level of arrays of the feature shape."""
    flat = {name: value for name, value in entries.items() if name not in AVERAGES}
    for name in AVERAGES:
        average = entries.get(name, {})
        check_mapping(f"entries[{name!r}]", average, "the hidden, average and counter of Haiku's state")
        if "average" in average:
            flat[f"{name}.average"] = average["average"]
    flat = {name: _squeezed(value) for name, value in flat.items()}
    return {**flat, "counter": entries.get("mean_ema", {}).get("counter")}


def _squeezed(value: Any) -> Any:
    """Without the axes of size 1, which stand for those that are reduced; a single feature keeps one."""
    try:
        array = as_array(value)
    except (TypeError, ValueError):
        return value
    return array.reshape([size for size in array.shape if size != 1] or [1])
