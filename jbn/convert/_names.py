"""What other libraries call the arrays of a batch norm, and the checks of what a mapping holds of them."""

import operator
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jbn._arguments import check_type
from jbn._moments import arithmetic_dtype
from jbn._state import Params, State

Norm = tuple[Params, State]


class Names(NamedTuple):
    """A library's names for the arrays of a norm."""

    library: str
    scale: str
    bias: str
    mean: str
    var: str
    counter: str | None

    def known(self) -> list[str]:
        """The names that a norm may have."""
        return [name for name in self[1:] if name is not None]


def read_one(names: Names, entries: Mapping[str, Any], count: int | None) -> Norm:
    """The norm that a mapping holds, or an error that lists what keeps it from being one."""
    norms, found = read_all(names, {"": entries}, count)
    refuse(names.library, found)
    return norms[""]


def read_all(
    names: Names, nodes: Mapping[str, Mapping[str, Any]], count: int | None
) -> tuple[dict[str, Norm], list[str]]:
    """The norms that mappings hold, and what keeps the others from being one."""
    count = checked_count(count)
    norms, found = {}, []
    for where, entries in nodes.items():
        arrays, problems = _arrays(entries)
        problems += _problems(names, arrays)
        found += [f"{where}: {problem}" if where else problem for problem in problems]
        if not problems:
            norms[where] = _norm(names, arrays, count)
    return norms, found


def refuse(library: str, found: list[str]) -> None:
    """One error for all that was found."""
    if found:
        listed = "\n  ".join(found)
        raise ValueError(f"the arrays are not those of batch norm in {library}:\n  {listed}")


def checked_count(count: Any) -> int | None:
    """A starting count that was given."""
    if count is None:
        return None
    try:
        number = operator.index(count)
    except TypeError:
        raise TypeError(f"`count` is {count!r}: expected an int, the updates that the averages stand for.") from None
    if number < 0:
        raise ValueError(f"`count` is {number}: expected at least 0, the updates that the averages stand for.")
    return number


def as_array(value: Any) -> jax.Array:
    """A jax array; a copy, where the source is memory that its owner goes on writing to."""
    if isinstance(value, jax.Array):
        return value
    if hasattr(value, "get_value"):  # a variable of NNX
        return jnp.asarray(value[...])
    if hasattr(value, "detach"):  # a tensor of PyTorch
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":  # which NumPy does not have
            return jnp.array(jnp.from_dlpack(value), copy=True)
    return jnp.array(np.asarray(value), copy=True)


def check_norm(params: Any, state: Any) -> None:
    """What is written out is jbn's."""
    check_type("params", params, Params)
    check_type("state", state, State)


def written(names: Names, params: Params, state: State) -> dict[str, jax.Array]:
    """The arrays of a norm by a library's names, without the count."""
    values = {names.scale: params.scale, names.bias: params.bias, names.mean: state.mean, names.var: state.var}
    return {name: value for name, value in values.items() if value is not None}


def written_to_numpy(names: Names, params: Params, state: State) -> dict[str, np.ndarray]:
    """Copies, since NumPy's view of a jax array is read-only."""
    return {name: np.array(value) for name, value in written(names, params, state).items()}


def _arrays(entries: Mapping[str, Any]) -> tuple[dict[str, jax.Array], list[str]]:
    """The entries as arrays, without those that are None, and those that make no array."""
    arrays, problems = {}, []
    for name, value in entries.items():
        if value is None:
            continue
        try:
            arrays[name] = as_array(value)
        except (TypeError, ValueError):
            problems.append(f"`{name}` is a {type(value).__name__}, which makes no array")
    return arrays, problems


def _problems(names: Names, arrays: Mapping[str, jax.Array]) -> list[str]:
    """What keeps arrays from being a norm, each in a few words."""
    found = [f"`{name}` is missing" for name in (names.mean, names.var) if name not in arrays]
    shape = arrays[names.mean].shape if names.mean in arrays else None
    for name, leaf in arrays.items():
        if name not in names.known():
            found.append(f"`{name}` is extra; a norm has {', '.join(names.known())}")
        elif name == names.counter:
            # Norms that are stacked by layer have a count each.
            if leaf.shape and shape is not None and leaf.shape != shape[: min(leaf.ndim, len(shape) - 1)]:
                found.append(f"`{name}` has shape {leaf.shape}, not ()")
        elif not jnp.issubdtype(leaf.dtype, jnp.floating):
            found.append(f"`{name}` has dtype {leaf.dtype.name}, not a float one")
        elif shape is not None and leaf.shape != shape:
            found.append(f"`{name}` has shape {leaf.shape}, not {shape} as `{names.mean}`")
    return found


def _norm(names: Names, arrays: Mapping[str, jax.Array], count: int | None) -> Norm:
    """The norm of arrays in which no problem was found."""
    stored = arrays.get(names.counter or "", 0)
    mean, var = (arrays[name] for name in (names.mean, names.var))
    # Half precision is exact in float32, and running statistics lose small updates without it.
    mean, var = (leaf.astype(arithmetic_dtype(leaf)) for leaf in (mean, var))
    number = jnp.asarray(stored if count is None else count).astype(jnp.int32)
    return Params(arrays.get(names.scale), arrays.get(names.bias)), State(mean, var, number)
