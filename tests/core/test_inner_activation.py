"""jbn._activation: which activations have a derivative that is cheaper to repeat than to share."""

import jax
import jax.numpy as jnp
import pytest
from jax import nn

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


@pytest.mark.standard_promotion
def test_activations_made_of_a_few_additions_are_cheap():
    values = jax.ShapeDtypeStruct((4, 3), jnp.float32)
    found = {name for name, activation in (CHEAP | COSTLY).items() if closed(activation, values)[0].is_cheap}
    assert found == set(CHEAP)
