"""The names of a norm's arrays in other libraries, and checks of mappings that hold these arrays."""

import operator
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jbn._arguments import check_type
from jbn._core.state import Params, State
from jbn._dtypes import arithmetic_dtype
from jbn._statistics.upgrade import for_each_feature

Norm = tuple[Params, State]
LARGEST = 2**31 - 1
ONE_AXIS = ("PyTorch", "Keras")
"""Libraries with norms that have one feature axis."""


class Names(NamedTuple):
    """The names of a norm's arrays in a library."""

    library: str
    scale: str
    bias: str
    mean: str
    var: str
    counter: str | None

    def known(self) -> list[str]:
        """The names of arrays that a norm may have."""
        return [name for name in self[1:] if name is not None]


def read_one(names: Names, entries: Mapping[str, Any], count: int | None) -> Norm:
    """The norm in a mapping, or an error that lists all problems."""
    check_mapping("entries", entries, f"the arrays of one norm with the names {', '.join(names.known())}")
    norms, found = read_all(names, {"": entries}, count)
    refuse(names.library, found)
    return norms[""]


def read_all(
    names: Names, nodes: Mapping[str, Mapping[str, Any]], count: int | None
) -> tuple[dict[str, Norm], list[str]]:
    """The norms in these mappings, and the problems of all others."""
    count = checked_count(count)
    norms, found = {}, []
    for where, entries in nodes.items():
        arrays, problems = _arrays(names, entries)
        problems += _problems(names, arrays)
        found += [f"{where}: {problem}" if where else problem for problem in problems]
        if not problems:
            norms[where] = _norm(names, arrays, count)
    return norms, found


def refuse(library: str, found: list[str]) -> None:
    """Raise one error for all problems that were found."""
    if found:
        listed = "\n  ".join(found)
        raise ValueError(f"the arrays are not those of a batch norm in {library}:\n  {listed}")


def check_mapping(name: str, value: Any, expected: str) -> None:
    """Check that the value is a mapping, not the layer or model that it comes from."""
    if not isinstance(value, Mapping):
        raise TypeError(f"`{name}` is a {type(value).__name__}: expected a mapping, {expected}.")


def checked_count(count: Any) -> int | None:
    """The count as an int, or None if it is not given."""
    if count is None:
        return None
    try:
        number = operator.index(count)
    except TypeError:
        raise TypeError(f"`count` is {count!r}: expected an int, the number of updates of every feature.") from None
    if not 0 <= number <= LARGEST:
        raise ValueError(f"`count` is {number}: expected 0 to {LARGEST}, the number of updates of every feature.")
    return number


def check_norm(params: Any, state: Any) -> None:
    """Check the types of Params and State."""
    check_type("params", params, Params)
    check_type("state", state, State)


def written(names: Names, params: Params, state: State) -> dict[str, jax.Array]:
    """The arrays of a norm under the names of a library, without the count."""
    values = {names.scale: params.scale, names.bias: params.bias, names.mean: state.mean, names.var: state.var}
    return {name: value for name, value in values.items() if value is not None}


def written_to_numpy(names: Names, params: Params, state: State) -> dict[str, np.ndarray]:
    """The same as writable NumPy copies; bfloat16, which NumPy lacks, becomes float32."""
    arrays = {name: np.array(value) for name, value in written(names, params, state).items()}
    return {name: leaf.astype(np.float32) if leaf.dtype == jnp.bfloat16 else leaf for name, leaf in arrays.items()}


def as_array(value: Any) -> jax.Array:
    """The value as a jax array; arrays of other libraries are copied, since their owner may change them later."""
    value = _unwrapped(value)
    if isinstance(value, jax.Array):
        return value
    if str(getattr(value, "dtype", "")) == "torch.bfloat16":  # NumPy has no bfloat16
        return jnp.array(jnp.from_dlpack(value.contiguous()), copy=True)
    value = np.asarray(value)
    if value.dtype == np.float64 and jax.dtypes.canonicalize_dtype(value.dtype) != value.dtype:
        raise ValueError("is float64, which jax truncates to float32: convert it first, or turn on jax_enable_x64")
    return jnp.array(value, copy=True)


def _unwrapped(value: Any) -> Any:
    """The array in an NNX variable, or a PyTorch tensor on the CPU without its autograd graph."""
    if hasattr(value, "get_value"):
        return value[...]
    return value.detach().cpu() if hasattr(value, "detach") else value


def _arrays(names: Names, entries: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The entries as arrays, without those that are None, and the problems: entries missing or not convertible."""
    entries = {name: value for name, value in entries.items() if value is not None}
    arrays, problems = {}, [f"`{name}` is missing" for name in (names.mean, names.var) if name not in entries]
    for name, value in entries.items():
        try:
            arrays[name] = _updates(value) if name == names.counter else as_array(value)
        except ValueError as error:
            problems.append(f"`{name}` {error}")
        except (TypeError, RuntimeError):  # PyTorch tensors without data raise RuntimeError
            hint = ": unbox it with flax.linen.meta.unbox" if hasattr(value, "unbox") else ""
            problems.append(f"`{name}` is a {type(value).__name__}, which cannot be converted to an array{hint}")
    return arrays, problems


def _updates(value: Any) -> jax.Array:
    """A stored count: one for the norm, one for each norm of a stack, or one for each feature."""
    value = _unwrapped(value)
    if isinstance(value, Tracer):
        return value
    number = np.asarray(value)
    if not (np.all(np.isfinite(number)) and np.all(number >= 0)):
        raise ValueError(f"is {number}, which is not a number of updates")
    return jnp.asarray(number.astype(np.float32))


def _problems(names: Names, arrays: Mapping[str, jax.Array]) -> list[str]:
    """The reasons why arrays are not a norm, each in a few words."""
    found = []
    shape = arrays[names.mean].shape if names.mean in arrays else None
    for name, leaf in arrays.items():
        if name not in names.known():
            found.append(
                f"`{name}` is extra; a norm has {', '.join(names.known())}; see `rename` and `ignore` of split"
            )
        elif name == names.counter:
            # The count is one for each feature, one for each norm of a stack, or one for the norm.
            if shape is not None and leaf.shape != shape[: leaf.ndim]:
                found.append(f"`{name}` has shape {leaf.shape}, not {shape} or ()")
        elif not jnp.issubdtype(leaf.dtype, jnp.floating if name == names.var else jnp.inexact):
            found.append(f"`{name}` has dtype {leaf.dtype.name}, not a float one")
        elif len(leaf.shape) > 1 and 1 in leaf.shape and names.library in ONE_AXIS:
            found.append(
                f"`{name}` has shape {leaf.shape}, not one axis of features; squeeze=True drops axes of size 1"
            )
        elif shape is not None and leaf.shape != shape:
            hint = "; squeeze=True drops axes of size 1" if 1 in leaf.shape + shape else ""
            found.append(f"`{name}` has shape {leaf.shape}, not {shape} as `{names.mean}`{hint}")
    return found


def _norm(names: Names, arrays: Mapping[str, jax.Array], count: int | None) -> Norm:
    """The norm from arrays without problems."""
    stored = arrays.get(names.counter or "", 0)
    mean, var = (arrays[name] for name in (names.mean, names.var))
    # The cast from half precision to float32 is exact, and half precision would lose small updates.
    mean, var = (leaf.astype(arithmetic_dtype(leaf.dtype)) for leaf in (mean, var))
    updates = jnp.asarray(stored if count is None else count, jnp.float32)
    return Params(arrays.get(names.scale), arrays.get(names.bias)), State(mean, var, for_each_feature(updates, mean))
