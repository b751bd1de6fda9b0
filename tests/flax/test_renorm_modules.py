"""BatchRenorm of Linen and NNX: `jbn.batch_renorm` on the variables of a module."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.refusals import Refused, assert_refused

import jbn

BOUNDS = [{}, {"r_max": 1.5, "d_max": 0.2}]
START = {"mean": jnp.full(3, 2.0), "var": jnp.full(3, 2.0)}


def batch(rng):
    return (rng.normal(size=(8, 3)) * 2 + 3).astype(np.float32)


@pytest.mark.parametrize("bounds", BOUNDS, ids=["schedules", "numbers"])
def test_linen_gives_what_the_core_gives(rng, bounds):
    x = batch(rng)
    norm = jbn.linen.BatchRenorm(use_running_average=False, **bounds)
    variables = norm.init(jax.random.key(0), x)
    assert set(variables["batch_stats"]) == ({"mean", "var"} if bounds else {"mean", "var", "count"})
    start = {**variables["batch_stats"], **START}
    out, updated = norm.apply({**variables, "batch_stats": start}, x, mutable=["batch_stats"])
    state = jbn.State(start["mean"], start["var"], start.get("count", jnp.zeros(3)))
    expected, new_state = jbn.batch_renorm(jbn.Params(**variables["params"]), state, x, True, **bounds)
    np.testing.assert_array_equal(out, expected)
    for name, value in updated["batch_stats"].items():
        np.testing.assert_array_equal(value, getattr(new_state, name))


@pytest.mark.parametrize("bounds", BOUNDS, ids=["schedules", "numbers"])
def test_nnx_gives_what_the_core_gives(rng, bounds):
    x = batch(rng)
    norm = jbn.nnx.BatchRenorm(3, rngs=nnx.Rngs(0), momentum=0.99, **bounds)
    assert (norm.count is None) == bool(bounds)
    norm.mean[...], norm.var[...] = START["mean"], START["var"]
    if norm.count is not None:
        norm.count[...] = 1.0
    state = jbn.State(**START, count=jnp.ones(3))
    params = jbn.Params(norm.scale[...], norm.bias[...])
    out = norm(x)
    expected, new_state = jbn.batch_renorm(params, state, x, True, momentum=0.99, **bounds)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(norm.var[...], new_state.var)
    inference = norm(x, use_running_average=True)
    np.testing.assert_array_equal(inference, jbn.normalize(params, new_state, x))


def with_a_bound_set_later():
    norm = jbn.nnx.BatchRenorm(3, r_max=2.0, d_max=1.0, rngs=nnx.Rngs(0))
    norm.r_max = jbn.renorm.r_max()
    return norm(np.ones((4, 3), np.float32))


def test_a_module_made_for_numbers_takes_no_schedule_later():
    row = Refused(with_a_bound_set_later, ValueError, "momentum", "a bound is a schedule", "Give the schedule at")
    assert_refused({"r_max": row})
