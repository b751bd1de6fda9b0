"""Conversion from Equinox, where a layer indexes its statistics in a separate state."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from jbn._core.state import Params, State
from jbn.convert._names import Names, read_one

EQUINOX = Names("Equinox", "weight", "bias", "mean", "var", "counter")


def from_equinox(layer: Any, state: Any, *, count: int | None = None) -> tuple[Params, State]:
    """Convert an Equinox norm, in either mode, to Params and State.

    Mode "ema" stores mean and variance, which are used unchanged. In mode "batch":

    mean = hidden_mean / (1 - m**t),  var = (hidden_var - m**t) / (1 - m**t)

    m is the momentum and t the counter. The hidden variance starts from 1 and the hidden mean from 0. Equinox's own
    inference divides both by 1 - m**t, which leaves the variance too large by m**t / (1 - m**t): 9.5 after ten steps at
    momentum 0.99. The equations here remove the initial values from both.

    Args:
        layer: an `equinox.nn.BatchNorm`.
        state: the `equinox.nn.State` that holds its statistics.
        count: number of updates of every feature. It replaces the counter of mode "batch"; mode "ema" has none.

    Returns:
        Params and State. A norm that was never updated gives unset statistics in mode "ema" (see `jbn.unset`), and mean
        0 and variance 1 in mode "batch".

    Raises:
        TypeError: layer is not an `equinox.nn.BatchNorm` with modes, or count is not an int.
        ValueError: layer is a stack of norms, state belongs to another layer, or count is negative.

    Example:
        >>> from types import SimpleNamespace
        >>> import numpy as np
        >>> import jbn
        >>> layer = SimpleNamespace(
        ...     mode="batch", momentum=0.5, weight=None, bias=None, batch_counter=0, batch_state_index=1
        ... )
        >>> stored = {0: 1, 1: (np.float32([1.5]), np.float32([2.5]))}  # half initial, half mean 3 and variance 4
        >>> _, state = jbn.convert.from_equinox(layer, stored)
        >>> print(state.mean, state.var, state.count)
        [3.] [4.] [1.]

    Source:
        Equinox, equinox.nn.BatchNorm.
    """
    return read_one(EQUINOX, entries_of(layer, state), count)


def is_norm(node: Any) -> bool:
    """Whether this is a batch norm, recognized by its attributes because Equinox is not imported."""
    return hasattr(node, "batch_state_index") and hasattr(node, "momentum") and hasattr(node, "mode")


def entries_of(layer: Any, state: Any) -> dict[str, Any]:
    """The parameters and statistics of a layer, by name."""
    if not is_norm(layer):
        raise TypeError(
            f"`layer` is a {type(layer).__name__}: expected an equinox.nn.BatchNorm with mode ema or batch."
        )
    if not hasattr(state, "get"):
        raise TypeError(f"`state` is a {type(state).__name__}: expected the equinox.nn.State of `layer`.")
    entries = {"weight": layer.weight, "bias": layer.bias}
    if layer.mode == "ema":
        mean, var = _stored(state, layer.ema_state_index)
        first = _scalar(_stored(state, layer.ema_first_time_index))
        return {**entries, "mean": jnp.where(first, 0, mean), "var": jnp.where(first, -jnp.inf, var)}
    counter = _scalar(_stored(state, layer.batch_counter))
    hidden_mean, hidden_var = _stored(state, layer.batch_state_index)
    # Before the first batch the hidden values are the initial values, which are returned unchanged.
    log = math.log(layer.momentum) if layer.momentum else -math.inf
    power = jnp.maximum(counter, 1).astype(hidden_var.dtype) * log
    left, gathered = (jnp.where(counter > 0, *both) for both in ((jnp.exp(power), 0), (-jnp.expm1(power), 1)))
    mean, var = hidden_mean / gathered, jnp.maximum(hidden_var - left, 0) / gathered
    return {**entries, "mean": mean, "var": var, "counter": counter}


def _stored(state: Any, index: Any) -> Any:
    try:
        value = state.get(index)
    except KeyError:
        value = None
    if value is None:
        raise ValueError("`state` has no statistics of `layer`: expected the equinox.nn.State that was made with it.")
    return value


def _scalar(value: Any) -> jax.Array:
    """A counter or flag, checked to be that of one layer."""
    value = jnp.asarray(value)
    if value.ndim:
        raise ValueError(
            f"`layer` is a stack of {value.shape} norms: convert each norm separately, with jax.vmap or indexing."
        )
    return value
