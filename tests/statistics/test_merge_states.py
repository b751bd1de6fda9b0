"""Merged statistics of replicas: those of all their examples together."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from support.refusals import Refused, assert_refused
from support.tolerances import assert_close

import jbn
from jbn._statistics import nodes

RNGS = [nnx.Rngs(seed) for seed in range(2)]
STATE = jbn.init(3)[1]
HALF = STATE._replace(var=STATE.var.astype("bfloat16"))


def seen(x):
    """A state that holds exactly the statistics of these examples."""
    mean, var = x.mean(0, dtype=np.float64), x.var(0, dtype=np.float64)
    return jbn.State(np.float32(mean), np.float32(var), np.full(mean.shape, len(x), np.float32))


def known(mean, var, count=0):
    """The same mean and variance of every feature."""
    return jbn.State(jnp.full(3, mean, jnp.float32), jnp.full(3, var, jnp.float32), jnp.full(3, count, jnp.float32))


@pytest.mark.parametrize("center", [0, 1e4])
def test_replicas_that_saw_parts_know_the_whole(rng, center):
    sizes = (5, 1, 300)
    parts = [(rng.normal(size=(size, 3)) + center + 7 * size % 5).astype(np.float32) for size in sizes]
    merged = jbn.merge_states(*map(seen, parts), weights=sizes)
    whole = np.concatenate(parts).astype(np.float64)
    assert_close(merged.mean, whole.mean(0))
    # The state holds means that are rounded by half a unit in the last place.
    np.testing.assert_allclose(merged.var, whole.var(0), rtol=1e-5, atol=(2.0**-24 * max(center, 1)) * 10)
    np.testing.assert_array_equal(merged.count, [300, 300, 300])


def test_averaged_variances_lose_the_spread_of_the_means():
    far = [known(mean, 1.0) for mean in (-3.0, 3.0)]
    np.testing.assert_array_equal(jbn.merge_states(*far).var, [10, 10, 10])
    np.testing.assert_array_equal(np.mean([state.var for state in far], axis=0), [1, 1, 1])


def test_weights_count_relative_to_each_other():
    left, right = known(0.0, 1.0), known(4.0, 1.0)
    for scale in (1e-300, 1e-44, 1, 1e38, 1e300):
        merged = jbn.merge_states(left, right, weights=[3 * scale, scale])
        assert_close(merged.mean, [1, 1, 1])
        assert_close(merged.var, [4, 4, 4])
    only = jbn.merge_states(known(jnp.nan, 1.0), right, weights=[0, 5_000_000_000])
    np.testing.assert_array_equal([only.mean, only.var], [[4] * 3, [1] * 3])


def test_unset_features_say_nothing():
    half_known = known(3.0, 2.0, 7)._replace(var=jnp.array([2.0, 2.0, -jnp.inf]), count=jnp.array([7.0, 5.0, 0.0]))
    merged = jbn.merge_states(jbn.unset(STATE), half_known, weights=[0.9, 0.1])
    assert_close(merged.mean, [3, 3, 0])
    assert_close(merged.var[:2], [2, 2])
    assert merged.var[2] == -np.inf
    np.testing.assert_array_equal(merged.count, [7, 5, 0])
    again = jbn.update(merged, jbn.moments(np.float32([[1, 1, 2], [1, 1, 4]])), momentum=0.5)
    assert_close(again.var, [1, 1, 1])


def test_a_replica_that_saw_no_value_says_nothing_beside_one_that_did():
    """Its mean 0 and variance 1 are those of jbn.init. Where no replica was updated, they stay."""
    updated = known(100.0, 2.0, 50)._replace(count=jnp.array([50.0, 50.0, 0.0]))
    for replicas in ((STATE, updated), (updated, STATE)):
        merged = jbn.merge_states(*replicas)
        assert_close(merged.mean, [100, 100, 50])
        assert_close(merged.var[:2], [2, 2])
    np.testing.assert_array_equal(jbn.merge_states(STATE, STATE).var, [1, 1, 1])
    np.testing.assert_array_equal(jbn.merge_states(STATE, updated, weights=[1, 0]).var, [1, 1, 1])


def assert_same_types(tree, expected):
    assert [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)] == [
        (leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(expected)
    ]


def test_a_fault_stays_one():
    fault = STATE._replace(mean=jnp.array([jnp.nan, 0.0, 0.0]))
    merged = jbn.merge_states(STATE, fault)
    np.testing.assert_array_equal(np.isfinite(merged.mean), [False, True, True])
    np.testing.assert_array_equal(np.isfinite(merged.var), [False, True, True])


def test_one_state_and_two_equal_ones_come_back_bit_for_bit(rng):
    state = seen(rng.normal(size=(9, 3)).astype(np.float32) + 100)
    for merged in (jbn.merge_states(state), jbn.merge_states(state, state)):
        for leaf, expected in zip(merged, state, strict=True):
            np.testing.assert_array_equal(leaf, expected)
            assert leaf.dtype == expected.dtype


def test_it_works_under_jit_and_vmap_and_has_gradient_zero(rng):
    states = [seen(rng.normal(size=(6, 3)).astype(np.float32)) for _ in range(3)]
    expected = jbn.merge_states(*states, weights=[1, 2, 3])

    @jax.jit
    def merge(states, weights):
        return jbn.merge_states(*states, weights=weights)

    assert_close(merge(states, jnp.array([1, 2, 3])).var, expected.var)
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *states)
    both = jax.jit(jax.vmap(lambda a: jbn.merge_states(a, a)))(stacked)
    assert_close(both.var, stacked.var)
    gradient = jax.jit(jax.grad(lambda mean: merge([states[0]._replace(mean=mean), *states[1:]], None).var.sum()))
    np.testing.assert_array_equal(gradient(states[0].mean), 0)


def test_the_result_has_the_shape_and_the_wider_dtype_of_the_states(x64):
    narrow, wide = jbn.init((2, 3))[1], jbn.init((2, 3), "float64")[1]
    for states, dtype in (((narrow, wide), jnp.float64), ((narrow, narrow), jnp.float32)):
        merged = jax.eval_shape(jbn.merge_states, *states)
        assert [leaf.dtype for leaf in merged[:2]] == [dtype, dtype]
        assert merged.var.shape == (2, 3)


class Model(linen.Module):
    @linen.compact
    def __call__(self, x):
        for _ in range(2):
            x = jbn.linen.BatchNorm(use_running_average=False)(linen.Dense(3)(x))
        return x


@pytest.mark.standard_promotion
def test_whole_models_are_merged_and_the_rest_is_that_of_the_first(rng):
    """Linen variables, the state of an NNX model, and dicts of states with other leaves."""
    linens = [Model().init(jax.random.key(seed), np.ones((2, 3))) for seed in range(2)]
    nnxs = [
        nnx.state(nnx.Sequential(nnx.Linear(3, 3, rngs=rngs), *(jbn.nnx.BatchNorm(3, rngs=rngs) for _ in range(2))))
        for rngs in RNGS
    ]
    dicts = [{"norm": jbn.init(3)[1], "other": jbn.init(3)[1], "steps": seed, "name": "a"} for seed in range(2)]
    states = [seen(rng.normal(size=(9, 3)).astype(np.float32)) for _ in range(2)]
    expected = jbn.merge_states(*states, weights=[1, 2])
    for trees in (linens, nnxs, dicts):
        filled = []
        for tree, state in zip(trees, states, strict=True):
            forest = nodes.find(tree, "a tree")
            values = {path: {field: state._asdict()[field] for field in forest.nodes[path]} for path in forest.nodes}
            filled.append(forest.replaced(values))
        merged = jbn.merge_states(*filled, weights=[1, 2])
        assert jax.tree.structure(merged) == jax.tree.structure(filled[0])
        found, first = nodes.find(merged, "it"), nodes.find(filled[0], "the first")
        assert len(found.nodes) == 2
        for path in found.nodes:
            for field, leaf in found.at(path).items():
                np.testing.assert_array_equal(leaf, expected._asdict()[field])
        kept = found.replaced({path: first.at(path) for path in first.nodes})
        assert all(jax.tree.leaves(jax.tree.map(np.array_equal, kept, filled[0])))


def test_averages_of_trees_train_on(rng):
    """Averages by optax in scan and cond, by pmean, and by hand keep every dtype and shape."""
    params, start = jbn.init(3)
    batches = jnp.asarray(rng.normal(size=(5, 8, 3)), jnp.float32)

    def trained(carry, x):
        state, target = carry
        _, state = jbn.batch_norm(params, state, x, True, momentum=jbn.momentum.warmup(0.9))
        moved = optax.incremental_update(state, target, 0.1)
        target = jax.lax.cond(state.count[0] > 2, lambda: moved, lambda: target)
        return (state, target), None

    (state, target), _ = jax.lax.scan(trained, (start, start), batches)
    assert_close(target.count, np.full(3, 0.1 * (3 * 0.81 + 4 * 0.9 + 5)))
    replicas = jax.tree.map(lambda *leaves: jnp.stack(leaves), state, target)
    mean = jax.vmap(lambda state: jax.lax.pmean(state, "replicas"), axis_name="replicas")(replicas)
    by_hand = jax.tree.map(lambda a, b: (a + b) / 2, state, target)
    for average in (target, by_hand, jax.tree.map(lambda leaf: leaf[0], mean)):
        assert_same_types(average, start)
        (again, _), _ = trained((average, average), batches[0])
        assert_same_types(again, start)
        np.testing.assert_array_equal(again.count, average.count + 1)


def test_real_and_complex_statistics_of_any_width_lose_nothing(x64):
    real = jbn.State(np.zeros(1), np.ones(1), np.full(1, 3, np.int32))
    other = jbn.State(np.complex64([4j]), np.ones(1, np.float32), np.float32([4.5]))
    for trees in ((real, other), (other, real)):
        merged = jbn.merge_states(*trees)
        np.testing.assert_array_equal(merged.mean, [2j])
        np.testing.assert_array_equal(merged.var, [5])
        np.testing.assert_array_equal(merged.count, [4.5])


def merging(*trees, **weights):
    return lambda: jbn.merge_states(*trees, **weights)


REFUSED = {
    "no trees": Refused(merging(), ValueError, "merge_states", "got no trees", "such as a jbn.State"),
    "a forgotten star": Refused(
        merging([STATE, STATE]), ValueError, "merge_states", "got one tree, a list of 2", "merge_states(*trees)"
    ),
    "no statistics": Refused(merging(STATE, [1.0]), ValueError, "trees[1]", "no statistics", "float `mean` and `var`"),
    "other norms": Refused(
        merging({"a": STATE, "b": STATE}, {"a": STATE, "c": STATE}),
        ValueError,
        "trees[1]",
        "different norms",
        "has b, c.",
    ),
    "other features": Refused(
        merging({"stem": STATE}, {"stem": jbn.init(2)[1]}),
        ValueError,
        "trees[1]",
        "at stem has `mean` of shape (2,)",
        "expected (3,)",
    ),
    "no count": Refused(
        merging(STATE._asdict(), {"mean": STATE.mean, "var": STATE.var}),
        ValueError,
        "trees[1]",
        "at the root has mean, var",
        "expected count, mean, var",
    ),
    "half precision": Refused(
        merging(STATE, HALF), TypeError, "trees[1]", "has `var` in bfloat16", "expected float32 or float64"
    ),
    "too few weights": Refused(
        merging(STATE, STATE, weights=[1]), ValueError, "weights", "is [1]", "2 numbers of at least 0"
    ),
    "negative weights": Refused(
        merging(STATE, STATE, weights=[1, -1]), ValueError, "weights", "is [1, -1]", "of at least 0"
    ),
    "weights of 0": Refused(merging(STATE, STATE, weights=[0, 0]), ValueError, "weights", "is [0, 0]", "not all 0"),
    "nan": Refused(merging(STATE, weights=[float("nan")]), ValueError, "weights", "is [nan]", "of at least 0"),
    "words": Refused(merging(STATE, weights=["1"]), ValueError, "weights", "is ['1']", "1 numbers of at least 0"),
    "a mapping": Refused(merging(STATE, weights={0: 1}), ValueError, "weights", "is {0: 1}", "one for each tree"),
    "too large": Refused(merging(STATE, weights=[10**400]), TypeError, "weights", "is [1000", "one for each tree"),
    "a number": Refused(merging(STATE, weights=3), TypeError, "weights", "is 3", "one for each tree"),
    "a matrix": Refused(
        merging(STATE, STATE, weights=np.ones((2, 2))), TypeError, "weights", "array([[1., 1.]", "one for each tree"
    ),
}


def test_errors_name_the_argument_and_say_how_to_mend_it():
    assert_refused(REFUSED)
