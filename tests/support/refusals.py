"""Bad input: calls that raise an error, and what its message must contain."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

TRACED = ("params", "state", "x", "mask", "shortcut", "moments", "kernel", "bias")
"""The arguments that are traced when a call is made inside a transformation."""


class Refused(NamedTuple):
    """A call, its error, and parts of the message: the argument in backticks, what it got, and how to fix it."""

    call: Callable[[], Any]
    error: type[Exception]
    argument: str
    given: str
    advice: str


def partly(function, **usual):
    """The function, to be called with some of these arguments replaced."""
    return lambda **given: functools.partial(function, **{**usual, **given})


def jitted(call, **traced):
    """The call inside jit, with these arguments traced."""
    return lambda: jax.jit(lambda traced: call(**traced))(traced)


def under_eval_shape(call, arrays):
    return jax.eval_shape(lambda arrays: call(**arrays), arrays)


def under_vmap(call, arrays):
    def mapped(arrays):
        stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), arrays)
        return jax.vmap(lambda arrays: call(**arrays), axis_size=2)(stacked)

    return jax.eval_shape(mapped, arrays)


def under_shard_map(call, arrays):
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    mapped = jax.shard_map(lambda arrays: call(**arrays), mesh=mesh, in_specs=P(), out_specs=P())
    return jax.eval_shape(mapped, arrays)


def can_be_traced(value):
    leaves = jax.tree.leaves(value)
    return all(isinstance(leaf, jax.Array | np.ndarray | np.generic) and leaf.dtype != object for leaf in leaves)


def faults(call, error, parts):
    """Differences between the error of a call and the expected one."""
    try:
        call()
    except Exception as raised:
        if type(raised) is not error:
            return [f"expected {error.__name__}, got {raised!r}"]
        return [f"{part!r} is not in: {raised}" for part in parts if part not in str(raised)]
    return ["nothing is raised"]


def assert_refused(rows: Mapping[str, Refused], *, also_traced: bool = False) -> None:
    """Each call fails as its row says. `also_traced` also calls each `functools.partial` with traced arrays."""
    found = []
    for name, row in rows.items():
        parts = (f"`{row.argument}`", row.given, row.advice)
        found += [f"{name}: {fault}" for fault in faults(row.call, row.error, parts)]
        if not (also_traced and isinstance(row.call, functools.partial)):
            continue
        arrays = {key: value for key, value in row.call.keywords.items() if key in TRACED and can_be_traced(value)}
        for transformed in (under_eval_shape, under_vmap, under_shard_map):
            # `given` is left out, since the message may show a tracer instead.
            call = functools.partial(transformed, row.call, arrays)
            found += [f"{name}, {transformed.__name__}: {fault}" for fault in faults(call, row.error, parts[::2])]
    assert not found, "\n".join(found)
