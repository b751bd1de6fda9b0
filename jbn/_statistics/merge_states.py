"""One state from those of replicas that trained without sharing their statistics."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from jbn import _arguments
from jbn._core.moments import ShiftedMoments, mean_of, merge_stacked
from jbn._core.state import State


def merge_states(*states: State, weights: Sequence[ArrayLike] | None = None) -> State:
    """The running statistics of replicas as those of one population, by the law of total variance.

    mean = sum(w_i * mean_i),  var = sum(w_i * (var_i + (mean_i - mean)**2)),  w = weights / sum(weights)

    The average of the variances alone would lose the spread of the means.

    Args:
        *states: running statistics of one feature shape; one that is unset in a feature says nothing about it.
        weights: a number of at least 0 for each state, as the examples that it saw; None weighs them the same. A state
            of weight 0 changes nothing but the count, whatever it holds.

    Returns:
        State of the same shape, not differentiated; `count` is the largest one of each feature. What is unset in all
        states stays so.

    Raises:
        TypeError: something that is no State, or weights that are no numbers.
        ValueError: no states, states of different shapes, or weights that do not fit.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import jbn
        >>> left, right = (jbn.State(jnp.array([m]), jnp.array([1.0]), jnp.array([9.0])) for m in (0.0, 4.0))
        >>> state = jbn.merge_states(left, right)
        >>> print(state.mean, state.var, state.count)
        [2.] [5.] [9.]

        Whole models, and replicas that are stacked along a first axis, as pmap leaves them:

        >>> models = [{"stem": left}, {"stem": right}]
        >>> is_state = lambda node: isinstance(node, jbn.State)
        >>> print(jax.tree.map(lambda *states: jbn.merge_states(*states), *models, is_leaf=is_state)["stem"].var)
        [5.]
        >>> stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), left, right)
        >>> print(jbn.merge_states(*map(jbn.State._make, zip(*stacked))).var)
        [5.]

    Source:
        Chan, Golub and LeVeque, Updating Formulae and a Pairwise Algorithm for Computing Sample Variances, 1979.
    """
    dtype = _checked_dtype(states)
    mean, var = (jnp.stack([jnp.asarray(state[field]).astype(dtype) for state in states]) for field in (0, 1))
    weight = _checked_weights(weights, len(states), dtype).reshape(-1, *[1] * (mean.ndim - 1))
    weight = jnp.where(jnp.isneginf(var), jnp.zeros((), dtype), weight)
    mean, var = (jnp.where(weight > 0, leaf, jnp.zeros((), dtype)) for leaf in (mean, var))
    merged = merge_stacked(ShiftedMoments(shift=mean, offset=None, var=var, count=weight))
    known = merged.count > 0
    state = State(
        mean=jnp.where(known, mean_of(merged), jnp.zeros((), dtype)),
        var=jnp.where(known, merged.var, jnp.full((), -jnp.inf, dtype)),
        count=jnp.max(jnp.stack([jnp.asarray(state.count) for state in states]), axis=0),
    )
    return jax.lax.stop_gradient(state)


def _checked_dtype(states: tuple[Any, ...]) -> Any:
    """The wider of the states' dtypes."""
    if not states:
        raise ValueError("`merge_states` got no states: expected at least one jbn.State.")
    for number, state in enumerate(states):
        name = f"states[{number}]"
        _arguments.check_type(name, state, State)
        _arguments.check_vectors(name, state, np.shape(states[0].mean), "the shape of `states[0].mean`")
        _arguments.check_state_dtype(state, name)
    return max((jnp.result_type(leaf) for state in states for leaf in state[:2]), key=lambda dtype: dtype.itemsize)


def _checked_weights(weights: Any, states: int, dtype: Any) -> jax.Array:
    """One weight a state, relative to the largest, so that counts of any size can be given."""
    if weights is None:
        return jnp.ones(states, dtype)
    expected = f"expected {states} numbers of at least 0, not all 0, one for each state"
    try:
        values = list(weights)
        traced = any(isinstance(value, Tracer) for value in values)
        known = None if traced else np.array([float(value) for value in values if not isinstance(value, str)])
    except (TypeError, ValueError, OverflowError):
        raise TypeError(f"`weights` is {weights!r}: {expected}.") from None
    if isinstance(weights, Mapping) or len(values) != states or any(np.shape(value) for value in values):
        raise ValueError(f"`weights` is {weights!r}: {expected}.")
    if known is None:
        array = jnp.stack([jnp.asarray(value).astype(dtype) for value in values])
        return array / jnp.max(array)
    if len(known) != states or not (np.isfinite(known).all() and (known >= 0).all() and known.any()):
        raise ValueError(f"`weights` is {weights!r}: {expected}.")
    return jnp.asarray(known / known.max(), dtype)
