"""Equinox's batch norm: a layer, and its statistics in a state that the layer indexes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jbn._state import Params, State
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
        count: the updates made so far, instead of the counter of mode "batch"; mode "ema" does not count.

    Returns:
        Params and State. A norm that was never updated comes unset in mode "ema" (see `jbn.unset`), and as mean 0 and
        variance 1 in mode "batch".

    Raises:
        TypeError: layer is no `equinox.nn.BatchNorm` with modes, or count is no int.

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
        [3.] [4.] 1

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
    entries = {"weight": layer.weight, "bias": layer.bias}
    if layer.mode == "ema":
        mean, var = state.get(layer.ema_state_index)
        first = state.get(layer.ema_first_time_index)
        return {**entries, "mean": jnp.where(first, 0, mean), "var": jnp.where(first, -jnp.inf, var)}
    counter = state.get(layer.batch_counter)
    hidden_mean, hidden_var = state.get(layer.batch_state_index)
    mean, var = _without_start(hidden_mean, hidden_var, layer.momentum, counter)
    return {**entries, "mean": mean, "var": var, "counter": counter}


def _without_start(hidden_mean: Any, hidden_var: Any, momentum: float, counter: Any) -> tuple[jax.Array, jax.Array]:
    """The averages of the batches alone, in float64, since the start may be most of what is hidden."""
    if counter == 0:
        return hidden_mean, hidden_var
    left = np.float64(np.float32(momentum)) ** np.asarray(counter)
    mean = np.asarray(hidden_mean, np.float64) / (1 - left)
    var = np.maximum(np.asarray(hidden_var, np.float64) - left, 0) / (1 - left)
    return jnp.asarray(mean.astype(hidden_mean.dtype)), jnp.asarray(var.astype(hidden_var.dtype))
