"""What the Linen and the NNX modules share: which statistics a call uses, and the core's calls by attributes."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jbn import _arguments, _dtypes
from jbn._arguments import Axes
from jbn._complex import is_complex
from jbn._core.batch_norm import batch_norm
from jbn._core.batch_renorm import batch_renorm
from jbn._core.state import Params, State

BOUNDS = ("r_max", "d_max")


class Mode(NamedTuple):
    """What a call does with statistics."""

    train: bool
    """normalizes by the batch's, in place of the running ones"""
    updates: bool
    """moves the running ones towards the batch's"""


TRAINING = Mode(train=True, updates=True)


def checked_mode(module: Any, use_running_average: Any, update_statistics: Any) -> Mode:
    """The mode of a call: its own arguments go before those of the module, and `frozen` before all."""
    updates = module.update_statistics if update_statistics is None else update_statistics
    for name, flag, true, false in (
        ("frozen", module.frozen, "normalize by the running statistics, whatever else is said", "do not"),
        ("update_statistics", updates, "update the running statistics in training", "leave them as they are"),
    ):
        _arguments.check_flag(name, flag, true, false)
    if module.frozen:
        return Mode(train=False, updates=False)
    if use_running_average is None:
        raise ValueError("`use_running_average` is given neither at construction nor at the call: give True or False.")
    _arguments.check_flag("use_running_average", use_running_average, "running statistics", "batch statistics")
    return Mode(train=not use_running_average, updates=bool(updates) and not use_running_average)


def check_dtypes(**given: Any) -> None:
    """Dtypes of result and parameters."""
    for name, dtype in given.items():
        _dtypes.checked_dtype(dtype, None, name)


def reads_count(module: Any, mode: Mode = TRAINING) -> bool:
    """Whether a call in this mode asks a schedule: momentum moves statistics, bounds correct the output."""
    names = (*(("momentum",) if mode.updates else ()), *(BOUNDS if mode.train else ()))
    return any(callable(getattr(module, name, None)) for name in names)


def checked_call(module: Any, x: Any) -> tuple[jax.Array, tuple[int, ...]]:
    """The input as an array, and the shape of its features."""
    x = _arguments.checked_input(x)
    return x, _arguments.checked_axes(module.axis, x.ndim, "axis").features(x.shape)


def apply(
    module: Any,
    params: Params,
    state: State,
    inputs: dict[str, Any],
    mode: Mode,
    dtype: Any,
    *,
    initializing: bool = False,
) -> tuple[jax.Array, State]:
    """`batch_norm`, or `batch_renorm` where it has bounds, with the options that a module holds as attributes.

    What a module is initialized with says nothing of training: any batch will do, outside of any mapped axis.
    """
    optional: dict[str, Any] = {name: getattr(module, name) for name in BOUNDS if hasattr(module, name)}
    call = batch_renorm if optional else batch_norm
    if not initializing:
        names = ("axis_name", "axis_index_groups", "ghost_batch_size")
        optional.update({name: getattr(module, name) for name in names})
    x = inputs["x"]
    axes = _arguments.checked_axes(module.axis, x.ndim, "axis")
    inputs = {**inputs, "mask": _as_flax_has_it(inputs["mask"], x.shape, axes)}
    check_shapes(module, x, axes.features(x.shape), **state._asdict(), **params._asdict())
    _check_kind(state, x)
    if mode.updates:
        _check_state_dtype(state)
    elif mode.train:
        state = _widened(state)
    return call(
        params,
        state,
        train=mode.train and not (initializing and not axes.reduced),
        momentum=module.momentum if mode.updates or initializing else 0.0,
        epsilon=module.epsilon,
        feature_axis=module.axis,
        running_var=module.running_var,
        activation=module.activation,
        dtype=dtype,
        **inputs,
        **optional,
    )


def _check_kind(state: State, x: jax.Array) -> None:
    """Flax's modules start from a real mean for complex x too."""
    if is_complex(state.mean) != is_complex(x):
        wanted = _dtypes.arithmetic_dtype(x.dtype).name
        raise TypeError(
            f"`mean` has dtype {state.mean.dtype.name}, but x has dtype {x.dtype.name}: expected {wanted}. Convert a "
            f"loaded one by mean.astype(jnp.{wanted}); an NNX module is made for complex x by dtype=jnp.complex64."
        )


def _widened(state: State) -> State:
    """Statistics that are read and not updated, in a dtype that training takes."""
    return jax.tree.map(lambda leaf: leaf.astype(_dtypes.arithmetic_dtype(leaf.dtype)), state)


def _check_state_dtype(state: State) -> None:
    """Half precision would lose the updates; what it came from is mostly a cast of a whole model."""
    for name, vector in state._asdict().items():
        if vector is not None and not _dtypes.is_state_dtype(vector.dtype):
            raise TypeError(
                f"`{name}` has dtype {vector.dtype.name}: expected {' or '.join(_dtypes.STATE_DTYPES)} in training, "
                "since small updates are lost in half precision. Where a whole model was cast, cast the parameters "
                "alone, or cast the statistics back: jax.tree.map(lambda leaf: leaf.astype(jnp.float32), statistics)."
            )


def _as_flax_has_it(mask: Any, shape: Sequence[int], axes: Axes) -> Any:
    """A mask that Flax would broadcast from the last axis on, with the rank of x, where it fits in no other way."""
    given = mask.shape if isinstance(mask, np.ndarray | jax.Array) and mask.dtype == np.bool_ else ()
    short, last = [shape[axis] for axis in axes.reduced], list(shape[len(shape) - len(given) :])
    if not given or len(given) >= len(shape) or _arguments.fits(given, short) or not _arguments.fits(given, last):
        return mask
    return jnp.expand_dims(mask, range(len(shape) - len(given)))


def check_shapes(module: Any, x: jax.Array, features: tuple[int, ...], **variables: Any) -> None:
    """Variables, loaded or initialized, fit the input."""
    for name, vector in variables.items():
        if vector is not None and vector.shape != features:
            raise ValueError(
                f"`{name}` has shape {vector.shape}: expected {features}, as x of shape {x.shape} has it on `axis` "
                f"{module.axis}{_arguments.of_upgrade(name)}."
            )
