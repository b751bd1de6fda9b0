"""The activation that follows a norm, taken apart: what it captures, and whether its derivative is cheap."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    # jax.extend loads Pallas, which takes longer than all of jbn: it is imported where it is used.
    from jax.extend.core import ClosedJaxpr, Jaxpr

Activation = Callable[[jax.Array], jax.Array]

CHEAP = {
    *("abs", "add", "and", "broadcast_in_dim", "clamp", "convert_element_type", "copy", "custom_jvp_call", "div", "eq"),
    *("ge", "gt", "integer_pow", "jit", "le", "lt", "max", "min", "mul", "ne", "neg", "not", "or", "pjit", "select_n"),
    *("sign", "square", "stop_gradient", "sub"),
}


class ClosedActivation(NamedTuple):
    """An elementwise function of an array and of the values that it captures."""

    program: "Jaxpr"
    is_cheap: bool
    """Whether nothing in it costs more than a few additions, as in relu, leaky_relu and hard_swish."""

    def __call__(self, y: jax.Array, *captured: jax.Array) -> jax.Array:
        from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

        return jaxpr_as_fun(ClosedJaxpr(self.program, captured))(y)[0]


def closed(activation: Any, before: jax.ShapeDtypeStruct) -> tuple[ClosedActivation, list[jax.Array]]:
    """An activation for values of this type, with the values that it captures as arguments, and those values."""
    program = _traced(activation, before)
    return ClosedActivation(program.jaxpr, _is_cheap(program.jaxpr)), list(program.consts)


def _traced(activation: Any, before: jax.ShapeDtypeStruct) -> "ClosedJaxpr":
    """The activation as a program, which must be elementwise."""
    expected = "expected an elementwise function of jax, whose result is a float array of the same shape: jax.nn.relu"
    if not callable(activation):
        raise TypeError(f"`activation` is {activation!r}: {expected}.")
    try:
        # make_jaxpr rather than closure_convert, which leaves captured integers, booleans and keys inside.
        program, after = jax.make_jaxpr(lambda y: activation(y), return_shape=True)(before)
    except (TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise TypeError(f"`activation` is {activation!r}, which fails on a trace ({reason}): {expected}.") from error
    if getattr(after, "shape", None) != before.shape or not jnp.issubdtype(after.dtype, jnp.floating):
        raise ValueError(f"`activation` turns {before.dtype.name}{list(before.shape)} into {after}: {expected}.")
    return program


def _is_cheap(program: "Jaxpr") -> bool:
    """Whether all that the program calls is in CHEAP, and so on within."""
    from jax.extend.core import ClosedJaxpr

    values = [value for equation in program.eqns for value in equation.params.values()]
    inner = [value.jaxpr for value in values if isinstance(value, ClosedJaxpr)]
    return all(equation.primitive.name in CHEAP for equation in program.eqns) and all(map(_is_cheap, inner))
