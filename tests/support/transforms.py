"""One training step of a norm whose batch is split over places, under each transformation that can split it.

The loss is the same everywhere: sum(out * cotangent) over the whole batch. Each place adds its own part of the sum.
Scale and bias are not split, and transformations differ in their gradients:

- shard_map: JAX sums gradients of replicated values over the mesh, so those of scale and bias are complete.
- shard_map without check_vma, pmap, vmap: each place gets the gradient of its own part; their sum is the gradient.
- jit, with automatic or explicit sharding: there is one loss, and gradients are complete.

The gradient of x is complete under all of them: a value affects the output of other places through the shared
statistics, and the backward pass of the norm sums these effects.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jbn


class Step(NamedTuple):
    """Results of a step; the new state has a first axis of places, or of size 1 if all places have one state."""

    out: Any
    new_state: jbn.State
    gradients: jbn.Params
    dx: Any


def step(params, state, x, mask, cotangent, *, norm=jbn.batch_norm, **options):
    """The norm's output, and the gradients of this place's part of the loss."""

    def forward(params, x):
        return norm(params, state, x, True, momentum=0.5, mask=mask, **options)

    out, backward, new_state = jax.vjp(forward, params, x, has_aux=True)
    gradients, dx = backward(cotangent)
    return Step(out, jax.tree.map(lambda leaf: leaf[None], new_state), gradients, dx)


def devices_of(axes, **options):
    """A mesh with these axes, by name and size."""
    count = math.prod(axes.values())
    return Mesh(np.array(jax.devices()[:count]).reshape(*axes.values()), tuple(axes), **options)


def named(axes):
    return {"axis_name": tuple(axes) if len(axes) > 1 else next(iter(axes))}


def under_shard_map(axes, *, check_vma=True, **options):
    split = P(tuple(axes))

    def one_device(*args):
        result = step(*args, **named(axes), **options)
        if check_vma:
            return result
        return result._replace(gradients=jax.lax.psum(result.gradients, tuple(axes)))

    mapped = jax.shard_map(
        one_device,
        mesh=devices_of(axes),
        in_specs=(P(), P(), split, split, split),
        out_specs=Step(split, split, P(), split),
        check_vma=check_vma,
    )
    return jax.jit(mapped)


def under_maps(axes, *, outermost, **options):
    function = functools.partial(step, **named(axes), **options)
    for name in reversed(axes):
        transform = outermost if name == next(iter(axes)) else jax.vmap
        function = transform(function, axis_name=name, in_axes=(None, None, 0, 0, 0))
    function = jax.jit(function) if outermost is jax.vmap else function

    def run(params, state, *split):
        def cut(array):
            return array.reshape(*axes.values(), -1, *array.shape[1:])

        result = function(params, state, *jax.tree.map(cut, split))
        places = tuple(range(len(axes)))
        return Step(
            result.out.reshape(split[0].shape),
            jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[len(axes) + 1 :]), result.new_state),
            jax.tree.map(lambda leaf: leaf.sum(places), result.gradients),
            result.dx.reshape(split[0].shape),
        )

    return run


def under_jit(axes, **options):
    split = NamedSharding(devices_of(axes), P(tuple(axes)))
    function = jax.jit(functools.partial(step, **options))
    return lambda params, state, *batch: function(params, state, *jax.device_put(batch, split))


def under_explicit_jit(axes, **options):
    mesh = devices_of(axes, axis_types=(AxisType.Explicit,) * len(axes))
    function = jax.jit(functools.partial(step, **options))

    def run(params, state, *batch):
        with jax.set_mesh(mesh):
            x, *others = jax.device_put(batch, NamedSharding(mesh, P(tuple(axes))))
            result = function(params, state, x, *others)
        assert jax.typeof(result.out) == jax.typeof(result.dx) == jax.typeof(x)
        assert jax.typeof(result.gradients.scale).sharding.spec == P(None)
        assert jax.typeof(result.new_state.mean).sharding.spec == P(None, None)
        return result

    return run


MAPPED = {
    "shard_map": under_shard_map,
    "shard_map, unchecked": functools.partial(under_shard_map, check_vma=False),
    "pmap": functools.partial(under_maps, outermost=jax.pmap),
    "vmap": functools.partial(under_maps, outermost=jax.vmap),
}
TRANSFORMS = {
    **MAPPED,
    "jit, automatic sharding": under_jit,
    "jit, explicit sharding": under_explicit_jit,
}
