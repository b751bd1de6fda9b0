"""Equinox's batch norm: a layer, and its statistics in a state that the layer indexes."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from jbn._core.state import Params, State
from jbn.convert._names import Names, read_one

EQUINOX = Names("Equinox", "weight", "bias", "mean", "var", "counter")


def from_equinox(layer: Any, state: Any, *, count: int | None = None) -> tuple[Params, State]:
    """jbn's norm from an Equinox one, in either mode.

    "ema":    mean, var as stored.
    "batch":  mean = hidden_mean / (1 - m**t),  var = (hidden_var - m**t) / (1 - m**t),  with momentum m and counter t

    In mode "batch" the hidden variance starts from 1 and the hidden mean from 0. Equinox's own inference divides both
    by 1 - m**t, which leaves m**t / (1 - m**t) too much in the variance: 9.5 after ten steps at momentum 0.99. Here
    the start is taken out of both.

    Args:
        layer: an `equinox.nn.BatchNorm`.
        state: the `equinox.nn.State` that holds its statistics.
        count: the updates of every feature so far, instead of the counter of mode "batch"; mode "ema" does not count.

    Returns:
        Params and State. A norm that was never updated comes unset in mode "ema" (see `jbn.unset`), and as mean 0 and
        variance 1 in mode "batch".

    Raises:
        TypeError: layer is no `equinox.nn.BatchNorm` with modes, or count is no int.
        ValueError: layer is a stack of norms, state is that of another layer, or count is negative.

    Example:
        >>> from types import SimpleNamespace
        >>> import numpy as np
        >>> import jbn
        >>> layer = SimpleNamespace(
        ...     mode="batch", momentum=0.5, weight=None, bias=None, batch_counter=0, batch_state_index=1
        ... )
        >>> stored = {0: 1, 1: (np.float32([1.5]), np.float32([2.5]))}  # half the start, half of mean 3, variance 4
        >>> _, state = jbn.convert.from_equinox(layer, stored)
        >>> print(state.mean, state.var, state.count)
        [3.] [4.] [1.]

    Source:
        Equinox, equinox.nn.BatchNorm.
    """
    return read_one(EQUINOX, entries_of(layer, state), count)


def is_norm(node: Any) -> bool:
    """Whether this is a batch norm, known by what it has rather than by an import."""
    return hasattr(node, "batch_state_index") and hasattr(node, "momentum") and hasattr(node, "mode")


def entries_of(layer: Any, state: Any) -> dict[str, Any]:
    """The arrays of a layer by name, and what they mean."""
    if not is_norm(layer):
        raise TypeError(
            f"`layer` is a {type(layer).__name__}: expected an equinox.nn.BatchNorm with mode ema or batch."
        )
    if not hasattr(state, "get"):
        raise TypeError(f"`state` is a {type(state).__name__}: expected the equinox.nn.State of the layer.")
    entries = {"weight": layer.weight, "bias": layer.bias}
    if layer.mode == "ema":
        mean, var = _stored(state, layer.ema_state_index)
        first = _scalar(_stored(state, layer.ema_first_time_index))
        return {**entries, "mean": jnp.where(first, 0, mean), "var": jnp.where(first, -jnp.inf, var)}
    counter = _scalar(_stored(state, layer.batch_counter))
    hidden_mean, hidden_var = _stored(state, layer.batch_state_index)
    # Before the first batch nothing is hidden behind the start, which is then what there is.
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
        raise ValueError("`state` has nothing of `layer`: expected the equinox.nn.State that was made with it.")
    return value


def _scalar(value: Any) -> jax.Array:
    """A counter or flag of one layer."""
    value = jnp.asarray(value)
    if value.ndim:
        raise ValueError(f"`layer` is a stack of {value.shape} norms: convert one at a time, by jax.vmap or indexing.")
    return value
