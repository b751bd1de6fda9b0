"""Conversion of one norm from and to Flax Linen and NNX, for the modules of Flax and of jbn."""

from collections.abc import Mapping
from typing import Any

import jax

from jbn._core.state import Params, State
from jbn.convert._names import Names, check_mapping, check_norm, read_one, written

FLAX = Names("Flax", "scale", "bias", "mean", "var", "count")
LINEN = {"params": ("scale", "bias"), "batch_stats": ("mean", "var", "count")}


def from_linen(variables: Mapping[str, Mapping[str, Any]], *, count: int | None = None) -> tuple[Params, State]:
    """Convert the variables of `flax.linen.BatchNorm` or `jbn.linen.BatchNorm` to Params and State.

    `scale` and `bias` come from `params`; `mean`, `var` and `count`, if there is one, come from `batch_stats`.

    Args:
        variables: `{"params": {"scale", "bias"}, "batch_stats": {"mean", "var"}}`.
        count: number of updates of every feature. It replaces the stored count; without either, the count is 0.

    Returns:
        Params and State, with the same arrays.

    Raises:
        TypeError: variables or a collection is not a mapping, or count is not an int.
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
        raise ValueError(f"`variables` has more than the params and batch_stats of one norm: {', '.join(extra)}.")
    for name, collection in variables.items():
        check_mapping(f"variables[{name!r}]", collection, "the arrays of one norm")
    return read_one(FLAX, {**variables.get("params", {}), **variables.get("batch_stats", {})}, count)


def to_linen(params: Params, state: State, *, with_count: bool = False) -> dict[str, dict[str, jax.Array]]:
    """Convert Params and State to the variables of a Flax Linen norm; the inverse of `from_linen`.

    `scale` and `bias` go to `params`; `mean` and `var` go to `batch_stats`.

    Args:
        params: scale and bias; None is left out.
        state: running mean, variance and count.
        with_count: True adds `count` to `batch_stats`, which `jbn.linen.BatchNorm` with a schedule reads.

    Returns:
        The same arrays, under Flax's names.

    Raises:
        TypeError: params is not a Params, or state is not a State.

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
    """Convert the state of `flax.nnx.BatchNorm` or `jbn.nnx.BatchNorm` to Params and State.

    The entries are `scale`, `bias`, `mean`, `var` and, if there is one, `count`.

    Args:
        entries: `nnx.state(layer)`, or a mapping of arrays with the same names.
        count: number of updates of every feature. It replaces the stored count; without either, the count is 0.

    Returns:
        Params and State, with the same arrays.

    Raises:
        TypeError: entries is not a mapping, or count is not an int.
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
    """Convert Params and State to the arrays of a Flax NNX norm; the inverse of `from_nnx`.

    The names are `scale`, `bias`, `mean` and `var`.

    Args:
        params: scale and bias; None is left out.
        state: running mean, variance and count.
        with_count: True adds `count`, which `jbn.nnx.BatchNorm` with a schedule reads.

    Returns:
        The same arrays, under Flax's names, for `nnx.update(layer, arrays)`.

    Raises:
        TypeError: params is not a Params, or state is not a State.

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
