"""Which activations have a derivative that is cheaper to repeat than to share, and that a GPU alone repeats it."""

import jax
import jax.numpy as jnp
import pytest
from jax import nn

import jbn
from jbn._activation import closed

SLOPE = jnp.full(3, 0.1)
CHEAP = {
    "relu": nn.relu,
    "relu6": nn.relu6,
    "leaky_relu": nn.leaky_relu,
    "hard_swish": nn.hard_swish,
    "captured slope": lambda y: jnp.where(y > 0, y, SLOPE * y),
}
COSTLY = {"gelu": nn.gelu, "silu": nn.silu, "softplus": nn.softplus, "elu": nn.elu, "tanh": jnp.tanh}


@pytest.mark.parametrize("name", CHEAP | COSTLY)
def test_cost(name):
    with jax.numpy_rank_promotion("allow"):
        activation, _ = closed((CHEAP | COSTLY)[name], jax.ShapeDtypeStruct((4, 3), jnp.float32))
    assert activation.is_cheap == (name in CHEAP)


@pytest.mark.parametrize(
    ("activation", "platform", "barriers"),
    [(nn.relu, "cuda", 2), (nn.relu, "cpu", 0), (nn.relu, "tpu", 0), (nn.gelu, "cuda", 0), (None, "cuda", 0)],
)
def test_repeated_on_a_gpu_alone(activation, platform, barriers):
    params, state = jbn.init(3)

    def loss(x):
        return jnp.sum(jbn.batch_norm(params, state, x, True, activation=activation)[0] ** 2)

    program = jax.jit(jax.grad(loss)).trace(jnp.ones((8, 3))).lower(lowering_platforms=(platform,)).as_text()
    assert program.count("optimization_barrier") == barriers
