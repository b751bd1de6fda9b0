import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import reference
from support.tolerances import assert_close

import jbn


def batch(rng, rows=16, features=3):
    return jbn.moments((rng.normal(size=(rows, features)) * 2 + 3).astype(np.float32))


def test_init():
    params, state = jbn.init((2, 3))
    for leaf, expected in zip((*params, *state), (1, 0, 0, 1, 0), strict=True):
        np.testing.assert_array_equal(leaf, np.full_like(leaf, expected))
    assert params.scale.shape == state.var.shape == (2, 3)
    assert state.count.dtype == jnp.int32


def test_state_keeps_its_dtype(x64, rng):
    x = rng.normal(size=(8, 3))
    for state_dtype in ("float32", "float64"):
        for x_dtype in ("float32", "float64", "bfloat16"):
            params, state = jbn.init(3, state_dtype)
            _, state = jbn.batch_norm(params, state, jnp.asarray(x).astype(x_dtype), True)
            assert state.mean.dtype == state.var.dtype == state_dtype
            assert state.count.dtype == jnp.int32


@pytest.mark.parametrize("count", [2.9999998, 3.0000002, 2.5])
def test_an_averaged_count_is_rounded(rng, count):
    _, state = jbn.init(3)
    new = jbn.update(state._replace(count=jnp.float32(count)), batch(rng))
    assert int(new.count) == round(count) + 1


def test_a_state_of_two_dtypes_takes_that_of_its_mean(x64, rng):
    state = jbn.State(jnp.zeros(3, jnp.float32), jnp.ones(3, jnp.float64), jnp.int32(0))
    new = jbn.update(state, batch(rng), momentum=0)
    assert new.mean.dtype == new.var.dtype == jnp.float32
    assert_close(new.var, batch(np.random.default_rng(0)).var)


def test_averaged_state_with_a_float_count_works(rng):
    _, state = jbn.init(3)
    states = [jbn.update(state, batch(rng)) for _ in range(2)]
    averaged = jax.tree.map(lambda *leaves: sum(leaf.astype(jnp.float32) for leaf in leaves) / 2, *states)
    new = jbn.update(averaged, batch(rng), momentum=jbn.momentum.cumulative())
    assert new.count.dtype == jnp.int32
    assert int(new.count) == 2


@pytest.mark.parametrize("momentum", [0.999, 0.9999])
def test_update_with_a_momentum_near_one_loses_nothing(rng, momentum):
    _, state = jbn.init(3)
    mean, var = np.zeros(3), np.ones(3)
    rounded = np.float64(np.float32(momentum))
    update = jax.jit(lambda s, b: jbn.update(s, b, momentum=momentum))
    for _ in range(50):
        x = (rng.normal(size=(16, 3)) * 2 + 3).astype(np.float32)
        state = update(state, jbn.moments(x))
        mean, var = reference.update(mean, var, reference.batch_norm(x), rounded)
    assert_close(state.mean, mean, scale=1)
    assert_close(state.var, var, scale=1)


def test_cumulative_average_keeps_its_digits(rng):
    start = jbn.State(jnp.full(1, 1e8), jnp.ones(1), jnp.int32(0))
    state = jbn.update(start, batch(rng, features=1), momentum=jbn.momentum.cumulative())
    assert_close(state.mean, batch(np.random.default_rng(0), features=1).mean)


@pytest.mark.parametrize("running_var", ["biased", "unbiased", "total"])
def test_unset_statistics_take_the_next_batch_whole(debug_nans, rng, running_var):
    _, state = jbn.init(3)
    moments = batch(rng)
    new = jax.jit(lambda s: jbn.update(s, moments, running_var=running_var))(jbn.unset(state))
    np.testing.assert_array_equal(new.mean, moments.mean)
    np.testing.assert_array_equal(new.var, moments.var)
    assert int(new.count) == 1


def test_unset_survives_averaging_and_is_loud(rng):
    params, state = jbn.init(3)
    averaged = jax.tree.map(lambda a, b: (a + b) / 2, jbn.unset(state), state)
    assert bool(jnp.all(jnp.isneginf(averaged.var)))
    assert bool(jnp.all(jnp.isnan(jbn.normalize(params, averaged, jnp.ones((2, 3))))))


def test_unset_marks_every_node_of_a_tree():
    _, state = jbn.init(2)
    tree = {
        "ours": state._replace(count=jnp.int32(3)),
        "linen": {"mean": jnp.ones(2), "var": jnp.ones(2)},
        "other": {"mean": jnp.ones(2), "step": jnp.int32(4)},
    }
    marked = jbn.unset(tree)
    np.testing.assert_array_equal(marked["ours"].mean, [0, 0])
    assert int(marked["ours"].count) == 0
    for node in (marked["ours"].var, marked["linen"]["var"]):
        np.testing.assert_array_equal(node, [-np.inf, -np.inf])
    assert marked["other"] is not None
    np.testing.assert_array_equal(marked["other"]["mean"], [1, 1])
    assert int(marked["other"]["step"]) == 4
    for nothing in ({"a": jnp.ones(2)}, jnp.ones(2), {}):
        with pytest.raises(ValueError, match="holds no statistics"):
            jbn.unset(nothing)


@pytest.mark.parametrize(
    ("running_var", "rows", "moves"), [("unbiased", 1, 0), ("unbiased", 2, 1), ("biased", 1, 1), ("total", 1, 1)]
)
def test_one_value_has_no_unbiased_variance(rng, running_var, rows, moves):
    _, state = jbn.init(3)
    for start in (state, jbn.unset(state)):
        new = jbn.update(start, batch(rng, rows), running_var=running_var)
        assert int(new.count) == moves
        if not moves:
            np.testing.assert_array_equal(new.var, start.var)


def test_overflow_of_the_new_state_is_guarded():
    _, state = jbn.init(1)
    far = jbn.Moments(jnp.full(1, 1e30), jnp.ones(1), jnp.float32(8))
    new = jbn.update(state, far, running_var="total")
    np.testing.assert_array_equal(new.mean, state.mean)
    assert int(new.count) == 0


SCHEDULES = {
    "number": 0.75,
    "cumulative": jbn.momentum.cumulative(),
    "warmup": jbn.momentum.warmup(0.75),
    "debiased": jbn.momentum.debiased(0.75),
    "optax": optax.linear_schedule(0.2, 0.9, 5),
    "optax joined": optax.join_schedules([optax.constant_schedule(0.0), optax.constant_schedule(0.9)], [1]),
    "above one": lambda count: 1.5,
}


@pytest.mark.parametrize("momentum", SCHEDULES.values(), ids=SCHEDULES)
def test_every_schedule_under_jit_with_a_traced_count(rng, momentum):
    _, state = jbn.init(3)
    mean, var = np.zeros(3), np.ones(3)
    step = jax.jit(lambda s, b: jbn.update(s, b, momentum=momentum))
    with jax.numpy_dtype_promotion("standard"):
        for count in range(8):
            moments = batch(rng)
            state = step(state, moments)
            kept = min(1.0, float(momentum(jnp.int32(count)) if callable(momentum) else momentum))
            mean = kept * mean + (1 - kept) * np.asarray(moments.mean, np.float64)
            var = kept * var + (1 - kept) * np.asarray(moments.var, np.float64)
            assert_close(state.mean, mean, scale=4)
            assert_close(state.var, var, scale=4)
    assert int(state.count) == 8


@pytest.mark.parametrize("value", [-0.5, 0.25, 1.5])
def test_traced_momentum_is_clipped(rng, value):
    _, state = jbn.init(3)
    moments = batch(rng)
    actual = jax.jit(lambda m: jbn.update(state, moments, momentum=m))(value)
    expected = jbn.update(state, moments, momentum=min(max(value, 0.0), 1.0))
    assert_close(actual.mean, expected.mean)


def test_update_refuses_other_shapes(rng):
    with pytest.raises(
        ValueError, match=r"`moments.mean` has shape \(3,\): expected \(2,\), the shape of `state.mean`"
    ):
        jbn.update(jbn.init(2)[1], batch(rng))


def test_count_is_exact_beyond_what_float32_can_count(rng):
    _, state = jbn.init(3)
    late = state._replace(count=jnp.int32(2**24 + 1))
    assert int(jbn.update(late, batch(rng)).count) == 2**24 + 2


def test_count_ends_at_the_largest_int32(rng):
    _, state = jbn.init(3)
    last = state._replace(count=jnp.int32(2**31 - 1))
    new = jbn.update(last, batch(rng))
    assert int(new.count) == 2**31 - 1
    assert (np.asarray(new.mean) != 0).all()


@pytest.mark.parametrize("field", ["mean", "var"])
def test_a_faulty_batch_is_refused_beside_a_faulty_state(rng, field):
    """What is wrong in a feature that is lost anyway tells of the batch."""
    _, state = jbn.init(3)
    faulty = state._replace(mean=jnp.array([0.0, jnp.nan, 0.0]))
    good = batch(rng)
    bad = good._replace(**{field: getattr(good, field).at[1].set(jnp.nan)})
    jax.tree.map(np.testing.assert_array_equal, jbn.update(faulty, bad), faulty)


def test_a_fault_in_one_feature_stays_there(rng):
    _, state = jbn.init(3)
    faulty = state._replace(mean=jnp.array([0.0, jnp.nan, 0.0]), var=jnp.array([1.0, 1.0, jnp.inf]))
    new = jbn.update(faulty, batch(rng), momentum=0.5)
    expected = jbn.update(state, batch(np.random.default_rng(0)), momentum=0.5)
    np.testing.assert_array_equal(new.mean, [expected.mean[0], np.nan, 0])
    np.testing.assert_array_equal(new.var, [expected.var[0], 1, np.inf])
    assert int(new.count) == 1


def test_nothing_is_differentiated(rng):
    _, state = jbn.init(3)
    moments = batch(rng)

    def remembered(momentum, state, moments):
        new = jbn.update(state, moments, momentum=momentum, running_var="total")
        return jnp.sum(new.mean) + jnp.sum(new.var)

    gradients = jax.grad(remembered, argnums=(0, 2))(0.9, state, moments)
    for leaf in jax.tree.leaves(gradients):
        np.testing.assert_array_equal(leaf, np.zeros_like(leaf))


def test_unset_leaves_integers_alone():
    tree = {"table": {"mean": jnp.ones(2, jnp.int32), "var": jnp.ones(2, jnp.int32)}, "norm": jbn.init(2)[1]}
    np.testing.assert_array_equal(jbn.unset(tree)["table"]["var"], [1, 1])
