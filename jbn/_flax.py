"""Code that the Linen and NNX modules share: the mode of a call, its checks, and the call of the core."""

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
    """How a call uses statistics."""

    train: bool
    """Whether it normalizes by the batch statistics instead of the running statistics."""
    updates: bool
    """Whether it updates the running statistics."""


TRAINING = Mode(train=True, updates=True)


def checked_mode(module: Any, use_running_average: Any, update_statistics: Any) -> Mode:
    """The mode of a call; its arguments override the attributes of the module, and `frozen` overrides both."""
    updates = module.update_statistics if update_statistics is None else update_statistics
    for name, flag, true, false in (
        ("frozen", module.frozen, "always normalize by the running statistics", "follow `use_running_average`"),
        ("update_statistics", updates, "update the running statistics in training", "leave them unchanged"),
    ):
        _arguments.check_flag(name, flag, true, false)
    if module.frozen:
        return Mode(train=False, updates=False)
    if use_running_average is None:
        raise ValueError("`use_running_average` is given neither at construction nor at the call: give True or False.")
    _arguments.check_flag("use_running_average", use_running_average, "running statistics", "batch statistics")
    return Mode(train=not use_running_average, updates=bool(updates) and not use_running_average)


def check_dtypes(**given: Any) -> None:
    """Check the dtypes of the result and of the parameters."""
    for name, dtype in given.items():
        _dtypes.checked_dtype(dtype, None, name)


def reads_count(module: Any, mode: Mode = TRAINING) -> bool:
    """Whether a call in this mode evaluates a schedule, of the momentum in an update or of a bound in training."""
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
    """Call `batch_norm`, or `batch_renorm` if the module has bounds, with the attributes of the module as options.

    Initialization takes a batch of any size outside of any mapped axis, so it skips the options that depend on them.
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
    """Check that the mean is complex if and only if x is; Flax's own modules start from a real mean for complex x."""
    if is_complex(state.mean) != is_complex(x):
        wanted = _dtypes.arithmetic_dtype(x.dtype).name
        raise TypeError(
            f"`mean` has dtype {state.mean.dtype.name}, but x has dtype {x.dtype.name}: expected {wanted}. Convert a "
            f"loaded mean with mean.astype(jnp.{wanted}). For complex x, make an NNX module with dtype=jnp.complex64."
        )


def _widened(state: State) -> State:
    """The statistics in a dtype that training accepts, for a call that does not update them."""
    return jax.tree.map(lambda leaf: leaf.astype(_dtypes.arithmetic_dtype(leaf.dtype)), state)


def _check_state_dtype(state: State) -> None:
    """Refuse statistics in half precision, which loses small updates; the usual cause is a cast of a whole model."""
    for name, vector in state._asdict().items():
        if vector is not None and not _dtypes.is_state_dtype(vector.dtype):
            raise TypeError(
                f"`{name}` has dtype {vector.dtype.name}: expected {' or '.join(_dtypes.STATE_DTYPES)} in training, "
                "since half precision loses small updates. If a whole model was cast, cast only the parameters, or "
                "cast the statistics back: jax.tree.map(lambda leaf: leaf.astype(jnp.float32), statistics)."
            )


def _as_flax_has_it(mask: Any, shape: Sequence[int], axes: Axes) -> Any:
    """The mask; one that fits only when aligned with the last axes of x, as Flax aligns it, gets the rank of x."""
    given = mask.shape if isinstance(mask, np.ndarray | jax.Array) and mask.dtype == np.bool_ else ()
    short, last = [shape[axis] for axis in axes.reduced], list(shape[len(shape) - len(given) :])
    if not given or len(given) >= len(shape) or _arguments.fits(given, short) or not _arguments.fits(given, last):
        return mask
    return jnp.expand_dims(mask, range(len(shape) - len(given)))


def check_shapes(module: Any, x: jax.Array, features: tuple[int, ...], **variables: Any) -> None:
    """Check that the variables, loaded or initialized, fit the input."""
    for name, vector in variables.items():
        if vector is not None and vector.shape != features:
            raise ValueError(
                f"`{name}` has shape {vector.shape}: expected {features}, the features of x of shape {x.shape} on "
                f"`axis` {module.axis}{of_fitting_axis(x, vector.shape)}{_arguments.of_upgrade(name)}."
            )


def of_fitting_axis(x: jax.Array, features: tuple[int, ...]) -> str:
    """The advice for an input with its features on another axis, to append to a message; empty if none fits."""
    fitting = _arguments.fitting_axis(x.shape, features)
    return "" if fitting is None else f". With axis={fitting}, x fits"
