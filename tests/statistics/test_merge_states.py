"""One state from those of replicas: the statistics of all their examples together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.tolerances import assert_close

import jbn


def seen(x):
    """A state that holds exactly the statistics of these examples."""
    state = jbn.update(jbn.unset(jbn.init(x.shape[-1])[1]), jbn.moments(x))
    return state._replace(count=jnp.int32(len(x)))


@pytest.mark.parametrize("center", [0, 1e4])
def test_replicas_that_saw_parts_know_the_whole(rng, center):
    sizes = (5, 1, 300)
    parts = [(rng.normal(size=(size, 3)) + center + 7 * size % 5).astype(np.float32) for size in sizes]
    merged = jbn.merge_states(*map(seen, parts), weights=sizes)
    whole = np.concatenate(parts).astype(np.float64)
    assert_close(merged.mean, whole.mean(0))
    # The state holds rounded means, half a unit in the last place off.
    np.testing.assert_allclose(merged.var, whole.var(0), rtol=1e-5, atol=(2.0**-24 * max(center, 1)) * 10)
    assert int(merged.count) == 300


def test_averaged_variances_lose_the_spread_of_the_means():
    far = [jbn.State(jnp.full(2, mean), jnp.ones(2), jnp.int32(4)) for mean in (-3.0, 3.0)]
    np.testing.assert_array_equal(jbn.merge_states(*far).var, [10, 10])
    np.testing.assert_array_equal(np.mean([state.var for state in far], axis=0), [1, 1])


def test_weights_count_relative_to_each_other():
    left, right = (jbn.State(jnp.array([mean]), jnp.array([1.0]), jnp.int32(0)) for mean in (0.0, 4.0))
    for scale in (1e-300, 1e-44, 1, 1e38, 1e300):
        merged = jbn.merge_states(left, right, weights=[3 * scale, scale])
        assert_close(merged.mean, [1])
        assert_close(merged.var, [4])
    only = jbn.merge_states(left._replace(mean=jnp.array([jnp.nan])), right, weights=[0, 5_000_000_000])
    np.testing.assert_array_equal([only.mean, only.var], [[4], [1]])


def test_unset_features_say_nothing():
    _, state = jbn.init(2)
    known = state._replace(mean=jnp.array([3.0, 5.0]), var=jnp.array([2.0, -jnp.inf]), count=jnp.int32(7))
    merged = jbn.merge_states(jbn.unset(state), known, weights=[0.9, 0.1])
    assert_close(merged.mean, [3, 0])
    assert_close(merged.var[0], 2)
    assert merged.var[1] == -np.inf
    assert int(merged.count) == 7
    again = jbn.update(merged, jbn.moments(jnp.array([[1.0, 2.0], [1.0, 4.0]])), momentum=0.5)
    assert_close(again.var, [1, 1])


def test_a_fault_stays_one():
    _, state = jbn.init(2)
    fault = state._replace(mean=jnp.array([jnp.nan, 0.0]))
    merged = jbn.merge_states(state, fault)
    np.testing.assert_array_equal(np.isfinite(merged.mean), [False, True])
    np.testing.assert_array_equal(np.isfinite(merged.var), [False, True])


def test_one_state_and_equal_ones_come_back_bit_for_bit(rng):
    state = seen(rng.normal(size=(9, 4)).astype(np.float32) + 100)
    for merged in (jbn.merge_states(state), jbn.merge_states(state, state, state, state)):
        for leaf, expected in zip(merged, state, strict=True):
            np.testing.assert_array_equal(leaf, expected)
            assert leaf.dtype == expected.dtype


def test_transforms_and_shapes(rng):
    states = [seen(rng.normal(size=(6, 3)).astype(np.float32)) for _ in range(3)]
    weights = jnp.array([1, 2, 3])
    expected = jbn.merge_states(*states, weights=[1, 2, 3])
    merged = jax.jit(lambda states, weights: jbn.merge_states(*states, weights=weights))(states, weights)
    assert_close(merged.var, expected.var)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    both = jax.vmap(lambda a: jbn.merge_states(a, a))(stacked)
    assert_close(both.var, stacked.var)
    grid = jbn.init((2, 3))[1]
    assert jbn.merge_states(grid, grid).var.shape == (2, 3)
    gradient = jax.grad(lambda mean: jbn.merge_states(states[0]._replace(mean=mean), states[1]).var.sum())
    np.testing.assert_array_equal(gradient(states[0].mean), 0)


def test_the_wider_dtype(x64):
    narrow, wide = jbn.init(2)[1], jbn.init(2, "float64")[1]
    assert jbn.merge_states(narrow, wide).mean.dtype == jnp.float64
    assert jbn.merge_states(narrow, narrow).var.dtype == jnp.float32


STATE = jbn.init(2)[1]
REFUSED = {
    "no states": ((), None, ValueError, "got no states"),
    "a list": (([STATE, STATE],), None, TypeError, r"`states\[0\]` is a list: expected jbn.State"),
    "shapes": ((STATE, jbn.init(3)[1]), None, ValueError, r"`states\[1\].mean` has shape \(3,\): expected \(2,\)"),
    "half": ((STATE._replace(var=jnp.ones(2, "float16")),), None, TypeError, "float16"),
    "number of weights": ((STATE, STATE), [1], ValueError, "expected 2 numbers of at least 0"),
    "negative": ((STATE, STATE), [1, -1], ValueError, r"`weights` is \[1, -1\]"),
    "all 0": ((STATE, STATE), [0, 0], ValueError, "not all 0"),
    "nan": ((STATE,), [float("nan")], ValueError, "nan"),
    "words": ((STATE,), ["1"], ValueError, "`weights` is"),
    "a mapping": ((STATE,), {0: 1}, ValueError, "`weights` is"),
    "too large": ((STATE,), [10**400], TypeError, "`weights` is"),
    "no sequence": ((STATE,), 3, TypeError, "`weights` is 3"),
    "matrix": ((STATE, STATE), np.ones((2, 2)), TypeError, "one for each state"),
}


@pytest.mark.parametrize(("states", "weights", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(states, weights, error, message):
    with pytest.raises(error, match=message):
        jbn.merge_states(*states, weights=weights)
