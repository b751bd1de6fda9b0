"""What the Linen and the NNX modules have in common: the core's calls by attributes, and the options refused."""

from typing import Any

import jax

from jbn import _arguments
from jbn._core.batch_norm import batch_norm
from jbn._core.batch_renorm import batch_renorm
from jbn._core.state import Params, State

BOUNDS = ("r_max", "d_max")
NOT_NEEDED = {
    "use_fast_variance": "jbn's variance is exact at the speed of the fast one, so that there is nothing to choose",
    "force_float32_reductions": "jbn reduces in float32 at least, whatever the dtype of its input",
    "promote_dtype": "jbn normalizes in float32 at least, and `dtype` is the dtype of the result",
}


def refuse_not_needed(**given: Any) -> None:
    """Options of Flax that would have nothing to do are refused, rather than taken and ignored."""
    for name, value in given.items():
        if value is not None:
            raise TypeError(f"`{name}` is {value!r}, but it is not needed: {NOT_NEEDED[name]}. Leave it out.")


def check_dtypes(**given: Any) -> None:
    """Dtypes of result and parameters."""
    for name, dtype in given.items():
        _arguments.checked_dtype(dtype, None, name)


def reads_count(module: Any) -> bool:
    """Whether an attribute of the module is a schedule."""
    return any(callable(getattr(module, name, None)) for name in ("momentum", *BOUNDS))


def checked_call(module: Any, x: Any, use_running_average: Any) -> tuple[jax.Array, tuple[int, ...]]:
    """The input as an array, and the shape of its features."""
    if use_running_average is None:
        raise ValueError("`use_running_average` is given neither at construction nor at the call: give True or False.")
    _arguments.check_train(use_running_average, "use_running_average", true="running", false="batch")
    x = _arguments.checked_input(x)
    return x, _arguments.checked_axes(module.axis, x.ndim, "axis").features(x.shape)


def apply(
    module: Any,
    params: Params,
    state: State,
    inputs: dict[str, Any],
    train: bool,
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
    check_shapes(module, x, axes.features(x.shape), **state._asdict(), **params._asdict())
    if train:
        for name, vector in state._asdict().items():
            if vector is not None:
                _arguments.checked_state_dtype(f"{name}.dtype", vector.dtype)
    return call(
        params,
        state,
        train=train and not (initializing and not axes.reduced),
        momentum=module.momentum,
        epsilon=module.epsilon,
        feature_axis=module.axis,
        running_var=module.running_var,
        activation=module.activation,
        dtype=dtype,
        **inputs,
        **optional,
    )


def check_shapes(module: Any, x: jax.Array, features: tuple[int, ...], **variables: Any) -> None:
    """Variables, loaded or initialized, fit the input."""
    for name, vector in variables.items():
        if vector is not None and vector.shape != features:
            mend = "; jbn.upgrade(tree) gives each feature of older statistics its count" if name == "count" else ""
            raise ValueError(
                f"`{name}` has shape {vector.shape}: expected {features}, as x of shape {x.shape} has it on `axis` "
                f"{module.axis}{mend}."
            )
