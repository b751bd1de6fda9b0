"""Conversion of one norm from and to Keras."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jbn._core.state import Params, State
from jbn.convert._names import Names, check_norm, read_one, written_to_numpy

KERAS = Names("Keras", "gamma", "beta", "moving_mean", "moving_variance", None)


def from_keras(entries: Mapping[str, Any], *, count: int | None = None) -> tuple[Params, State]:
    """Convert a Keras norm to Params and State.

    scale = gamma,  bias = beta,  mean = moving_mean,  var = moving_variance

    Args:
        entries: `{v.name: v for v in layer.variables}`: variables or arrays of shape (C,).
        count: number of updates of every feature; None means 0, since Keras does not count updates.

    Returns:
        Params and State, as copies. The default epsilon of Keras is 1e-3, not 1e-5.

    Raises:
        TypeError: entries is not a mapping, or count is not an int.
        ValueError: entries are missing, extra or misshaped; the error lists them.

    Example:
        >>> import numpy as np
        >>> import jbn
        >>> entries = {"moving_mean": np.float32([3]), "moving_variance": np.float32([4])}
        >>> params, state = jbn.convert.from_keras(entries, count=1000)
        >>> print(state.mean, state.var, state.count)
        [3.] [4.] [1000.]

    Source:
        Keras, keras.layers.BatchNormalization.
    """
    return read_one(KERAS, entries, count)


def to_keras(params: Params, state: State) -> dict[str, np.ndarray]:
    """Convert Params and State to the variables of a Keras norm; the inverse of `from_keras`.

    gamma = scale,  beta = bias,  moving_mean = mean,  moving_variance = var

    Args:
        params: scale and bias; None is left out.
        state: running mean and variance; the count is left out.

    Returns:
        Writable NumPy arrays, bfloat16 as float32, under Keras' names:
        `for v in layer.variables: v.assign(arrays[v.name])`.

    Raises:
        TypeError: params is not a Params, or state is not a State.

    Example:
        >>> import jbn
        >>> sorted(jbn.convert.to_keras(*jbn.init(2)))
        ['beta', 'gamma', 'moving_mean', 'moving_variance']

    Source:
        Keras, keras.layers.BatchNormalization.
    """
    check_norm(params, state)
    return written_to_numpy(KERAS, params, state)
