"""Flax's batch norms, Linen and NNX, its own and jbn's: one norm in and out."""

from collections.abc import Mapping
from typing import Any

import jax

from jbn._core.state import Params, State
from jbn.convert._names import Names, check_mapping, check_norm, read_one, written

FLAX = Names("Flax", "scale", "bias", "mean", "var", "count")
LINEN = {"params": ("scale", "bias"), "batch_stats": ("mean", "var", "count")}


def from_linen(variables: Mapping[str, Mapping[str, Any]], *, count: int | None = None) -> tuple[Params, State]:
    """jbn's norm from the variables of a Flax Linen one, Flax's own or `jbn.linen.BatchNorm`.

    scale, bias from `params`;  mean, var, and count where there is one, from `batch_stats`

    Args:
        variables: `{"params": {"scale", "bias"}, "batch_stats": {"mean", "var"}}`.
        count: the updates of every feature so far, instead of stored ones, which are 0 where they are missing.

    Returns:
        Params and State, of the same arrays.

    Raises:
        TypeError: something that is no mapping, or count is no int.
        ValueError: entries are missing, extra or misshaped; the error lists them.

    Example:
        >>> import jax.numpy as jnp
        >>> import jbn
        >>> params, state = jbn.convert.from_linen({"batch_stats": {"mean": jnp.zeros(2), "var": jnp.ones(2)}})
        >>> print(params.scale, state.var)
        None [1. 1.]

    Source:
        Flax, flax.linen.BatchNorm.
    """
    check_mapping("variables", variables, "with params and batch_stats")
    extra = [f"`{name}` is extra" for name in variables if name not in LINEN]
    if extra:
        raise ValueError(f"`variables` are not those of one norm, params and batch_stats: {', '.join(extra)}.")
    for name, collection in variables.items():
        check_mapping(f"variables[{name!r}]", collection, "the arrays of one norm")
    return read_one(FLAX, {**variables.get("params", {}), **variables.get("batch_stats", {})}, count)


def to_linen(params: Params, state: State, *, with_count: bool = False) -> dict[str, dict[str, jax.Array]]:
    """The variables of a Flax Linen norm from jbn's norm; the inverse of `from_linen`.

    `params` with scale and bias;  `batch_stats` with mean and var

    Args:
        params: scale and bias; one that is None is left out.
        state: running mean, variance and count.
        with_count: whether `batch_stats` has the count too, which `jbn.linen.BatchNorm` with a schedule reads.

    Returns:
        The same arrays by Flax's names.

    Raises:
        TypeError: params or state is not jbn's.

    Example:
        >>> import jbn
        >>> variables = jbn.convert.to_linen(*jbn.init(2))
        >>> {collection: sorted(arrays) for collection, arrays in variables.items()}
        {'params': ['bias', 'scale'], 'batch_stats': ['mean', 'var']}

    Source:
        Flax, flax.linen.BatchNorm.
    """
    flat = to_nnx(params, state, with_count=with_count)
    collections = {name: {field: flat[field] for field in fields if field in flat} for name, fields in LINEN.items()}
    return {name: arrays for name, arrays in collections.items() if arrays}


def from_nnx(entries: Mapping[str, Any], *, count: int | None = None) -> tuple[Params, State]:
    """jbn's norm from the state of a Flax NNX one, Flax's own or `jbn.nnx.BatchNorm`.

    scale, bias, mean, var, and count where there is one

    Args:
        entries: `nnx.state(layer)`, or arrays by the same names.
        count: the updates of every feature so far, instead of stored ones, which are 0 where they are missing.

    Returns:
        Params and State, of the same arrays.

    Raises:
        TypeError: something that is no mapping, or count is no int.
        ValueError: entries are missing, extra or misshaped; the error lists them.

    Example:
        >>> from flax import nnx
        >>> import jbn
        >>> params, state = jbn.convert.from_nnx(nnx.state(nnx.BatchNorm(2, rngs=nnx.Rngs(0))))
        >>> print(params.scale, state.var)
        [1. 1.] [1. 1.]

    Source:
        Flax, flax.nnx.BatchNorm.
    """
    return read_one(FLAX, entries, count)


def to_nnx(params: Params, state: State, *, with_count: bool = False) -> dict[str, jax.Array]:
    """The arrays of a Flax NNX norm from jbn's norm; the inverse of `from_nnx`.

    scale, bias, mean, var

    Args:
        params: scale and bias; one that is None is left out.
        state: running mean, variance and count.
        with_count: whether to give the count too, which `jbn.nnx.BatchNorm` with a schedule reads.

    Returns:
        The same arrays by Flax's names, for `nnx.update(layer, arrays)`.

    Raises:
        TypeError: params or state is not jbn's.

    Example:
        >>> import jbn
        >>> sorted(jbn.convert.to_nnx(*jbn.init(2)))
        ['bias', 'mean', 'scale', 'var']

    Source:
        Flax, flax.nnx.BatchNorm.
    """
    check_norm(params, state)
    arrays = written(FLAX, params, state)
    return arrays if state.count is None or not with_count else {**arrays, "count": state.count}
