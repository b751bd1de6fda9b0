"""Programs that several tests run, compiled once for each shape."""

import functools
from typing import Any, NamedTuple

import jax

import jbn

OPTIONS = ("train", "epsilon", "feature_axis", "ghost_batch_size", "running_var", "activation", "dtype")
batch_norm = jax.jit(jbn.batch_norm, static_argnames=OPTIONS)


class Passes(NamedTuple):
    """Results of a norm in a training step: forward, and backward from a cotangent of the output."""

    out: jax.Array
    new_state: jbn.State
    gradients: jbn.Params
    dx: jax.Array


@functools.partial(jax.jit, static_argnames=OPTIONS)
def forward_and_backward(
    params: jbn.Params, state: jbn.State, x: Any, cotangent: Any, mask: Any = None, **options: Any
) -> Passes:
    """Both passes of a norm with momentum 0, whose new state holds only the batch."""

    def forward(params, x):
        return jbn.batch_norm(params, state, x, True, momentum=0.0, mask=mask, **options)

    out, backward, new_state = jax.vjp(forward, params, x, has_aux=True)
    return Passes(out, new_state, *backward(cotangent))
