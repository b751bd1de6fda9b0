"""Conversion from Haiku, where parameters have the rank of the input and submodules store the averages."""

from collections.abc import Mapping
from typing import Any

from jbn._core.state import Params, State
from jbn.convert._names import Names, as_array, check_mapping, read_one

HAIKU = Names("Haiku", "scale", "offset", "mean_ema.average", "var_ema.average", "counter")
AVERAGES = ("mean_ema", "var_ema")


def from_haiku(entries: Mapping[str, Any], *, count: int | None = None) -> tuple[Params, State]:
    """Convert a Haiku norm to Params and State.

    scale = scale,  bias = offset,  mean = mean_ema.average,  var = var_ema.average,  count = counter

    Args:
        entries: `scale` and `offset` from Haiku's params, and `mean_ema` and `var_ema` from its state, each a mapping
            with `hidden`, `average` and `counter`. `split((params, state), "haiku")` finds them in a model.
        count: number of updates of every feature. It replaces `counter`.

    Returns:
        Params and State, without the axes of size 1 that Haiku keeps for the reduced axes. To continue training as in
        Haiku, use `momentum=jbn.momentum.debiased(decay_rate)`.

    Raises:
        TypeError: entries is not a mapping, or count is not an int.
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
    """The entries as one flat mapping of arrays of the feature shape."""
    flat = {name: value for name, value in entries.items() if name not in AVERAGES}
    for name in AVERAGES:
        average = entries.get(name, {})
        check_mapping(f"entries[{name!r}]", average, "the hidden, average and counter of Haiku's state")
        if "average" in average:
            flat[f"{name}.average"] = average["average"]
    flat = {name: _squeezed(value) for name, value in flat.items()}
    return {**flat, "counter": entries.get("mean_ema", {}).get("counter")}


def _squeezed(value: Any) -> Any:
    """The array without axes of size 1, which stand for the reduced axes; a single feature keeps one axis."""
    try:
        array = as_array(value)
    except (TypeError, ValueError):
        return value
    return array.reshape([size for size in array.shape if size != 1] or [1])
