"""The backward pass stores only the input, and vectors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals

import jbn


def residuals(function, *args):
    """The arrays that the forward pass stores for the backward pass."""
    return jax.tree.leaves(jax.eval_shape(lambda *args: jax.vjp(function, *args)[1], *args))


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"mask": np.arange(256) < 200}, {"ghost_batch_size": 64}], ids=["plain", "masked", "ghost"]
)
def test_only_the_input_is_kept_for_the_backward_pass_in_its_own_dtype(train, options, capsys):
    x = jnp.ones((256, 16), jnp.bfloat16)
    params, state = jbn.init(16)

    def norm(params, x):
        out = jbn.batch_norm(params, state, x, train, activation=jax.nn.relu, **options)[0]
        return jnp.sum(out.astype(jnp.float32))

    kept = residuals(norm, params, x)
    assert [(a.size, a.dtype) for a in kept if a.size >= x.size] == [(x.size, jnp.bfloat16)]
    groups = 256 // options.get("ghost_batch_size", 256)
    vectors = sum(aval.size * aval.dtype.itemsize for aval in kept) - x.nbytes
    assert vectors <= 6 * groups * 16 * 4 + 256 + 64, kept
    print_saved_residuals(norm, params, x)
    assert [line.split("[")[0] for line in capsys.readouterr().out.splitlines() if "bf16[" in line] == ["bf16"]


def test_an_input_that_is_not_differentiated_costs_no_zeros():
    x = jnp.ones((256, 16), jnp.bfloat16)
    params, state = jbn.init(16)
    kept = residuals(lambda x, params: jbn.batch_norm(params, state, jax.lax.stop_gradient(x), True)[0], x, params)
    assert sum(aval.size == x.size for aval in kept) == 1
