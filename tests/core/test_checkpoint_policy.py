"""jax.checkpoint with jbn's policy: what is stored, and that nothing expensive runs twice."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import jbn

EXPENSIVE = ("conv_general_dilated", "dot_general", "reduce_sum", "psum", "psum_invariant", "all_gather")
PARAMS, STATE = jbn.init(4)
X = jnp.ones((8, 6, 6, 4))
KERNELS = jnp.ones((2, 3, 3, 4, 4))


def block(kernels, x, axis_name=None):
    """Convolution, norm and relu, twice."""
    states = []
    for kernel in kernels:
        y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x, state = jbn.batch_norm(PARAMS, STATE, y, True, activation=jax.nn.relu, axis_name=axis_name)
        states.append(state)
    return x, states


def loss(block, kernels, x):
    out, states = block(kernels, x)
    return jnp.mean(out**3), states


def checkpointed(block):
    return jax.checkpoint(block, policy=jbn.checkpoint_policy)


def counted(program):
    """How often each expensive primitive occurs in a program and in everything that it calls."""
    found = collections.Counter(e.primitive.name for e in program.eqns if e.primitive.name in EXPENSIVE)
    for equation in program.eqns:
        for value in jax.tree.leaves(list(equation.params.values())):
            if hasattr(inner := getattr(value, "jaxpr", value), "eqns"):
                found += counted(inner)
    return found


def gradient(block):
    return jax.grad(functools.partial(loss, block), argnums=(0, 1), has_aux=True)


def test_nothing_expensive_runs_twice():
    plain, under = (counted(jax.make_jaxpr(gradient(b))(KERNELS, X).jaxpr) for b in (block, checkpointed(block)))
    assert plain["conv_general_dilated"] == 6
    assert under == plain
    everything = counted(jax.make_jaxpr(gradient(jax.checkpoint(block)))(KERNELS, X).jaxpr)
    assert everything["conv_general_dilated"] > plain["conv_general_dilated"]
    assert everything["reduce_sum"] > plain["reduce_sum"]


@pytest.mark.devices(8)
def test_no_collective_runs_twice():
    mesh = jax.make_mesh((8,), ("i",), axis_types=(AxisType.Auto,))
    shared = functools.partial(block, axis_name="i")

    def program(block):
        specs = PartitionSpec(), PartitionSpec("i")
        sharded = jax.shard_map(gradient(block), mesh=mesh, in_specs=specs, out_specs=(specs, PartitionSpec()))
        return counted(jax.make_jaxpr(sharded)(KERNELS, X).jaxpr)

    plain, under, everything = map(program, (shared, checkpointed(shared), jax.checkpoint(shared)))
    assert sum(plain[name] for name in EXPENSIVE[3:]) >= 4
    assert under == plain
    assert sum(everything[name] for name in EXPENSIVE[3:]) > sum(plain[name] for name in EXPENSIVE[3:])


def test_outputs_of_activations_are_not_kept(rng):
    """The next convolution reads the output of the first of two layers. Without the policy, that output is stored."""
    args = (rng.normal(size=shape.shape).astype(np.float32) for shape in (KERNELS, X))
    kernels, x = map(jnp.asarray, args)

    def kept(block):
        """The number of different arrays of the size of x; equal ones are in memory once in one program."""
        _, backward, _ = jax.vjp(functools.partial(loss, block), kernels, x, has_aux=True)
        return len({np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(backward) if leaf.shape == x.shape})

    assert kept(checkpointed(block)) == kept(block) - 1


def assert_close_to_largest(ours, right):
    for a, e in zip(jax.tree.leaves(ours), jax.tree.leaves(right), strict=True):
        assert float(jnp.max(jnp.abs(a - e))) <= 1e-5 * float(jnp.max(jnp.abs(e)))


def test_numbers_are_the_same_under_the_policy(rng):
    x = jnp.asarray(rng.normal(2, 3, X.shape), jnp.float32)
    kernels = jnp.asarray(rng.normal(size=KERNELS.shape), jnp.float32)
    plain, under = (jax.jit(gradient(b))(kernels, x) for b in (block, checkpointed(block)))
    assert_close_to_largest(under, plain)
