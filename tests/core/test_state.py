"""The state: init, update and unset, and what a state keeps."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import reference
from support.refusals import Refused, assert_refused, partly
from support.tolerances import assert_close, assert_same

import jbn

STATE = jbn.init(3)[1]
MOMENTS = jbn.Moments(np.zeros(3, np.float32), np.ones(3, np.float32), np.float32(8))
HALF = jbn.State(jnp.zeros(3, jnp.bfloat16), jnp.ones(3, jnp.bfloat16), jnp.zeros(3))
update = partly(jbn.update, state=STATE, moments=MOMENTS)
REFUSED = {
    "init of a float": Refused(lambda: jbn.init(2.0), TypeError, "features", "is 2.0", "an int or a sequence"),
    "init of a flag": Refused(lambda: jbn.init(True), TypeError, "features", "is True", "an int or a sequence"),
    "init of a text": Refused(lambda: jbn.init("ab"), TypeError, "features", "is 'ab'", "an int or a sequence"),
    "init of less than 0": Refused(lambda: jbn.init((3, -1)), ValueError, "features", "is (3, -1)", "sizes of at"),
    "init in half precision": Refused(
        lambda: jbn.init(3, jnp.bfloat16), TypeError, "dtype", "is bfloat16", "expected float32 or float64"
    ),
    "no statistics to unset": Refused(
        lambda: jbn.unset({"mean": "imagenet", "var": [1.0]}), ValueError, "tree", "no statistics", "float `mean` and"
    ),
    "update of moments": Refused(
        update(state=MOMENTS), TypeError, "state", "is a Moments", "jbn.State(mean, var, count)"
    ),
    "update by a state": Refused(
        update(moments=STATE), TypeError, "moments", "is a State", "jbn.Moments(mean, var, count"
    ),
    "update by other features": Refused(
        update(state=jbn.init(2)[1]), ValueError, "moments.mean", "has shape (3,)", "expected (2,), the shape of"
    ),
    "update of a list": Refused(
        update(state=STATE._replace(mean=[0.0] * 3)), TypeError, "state.mean", "[0.0, 0.0, 0.0]", "a numeric array"
    ),
    "update in half precision": Refused(
        update(state=HALF), TypeError, "state.mean.dtype", "is bfloat16", "expected float32 or float64"
    ),
    "update by many momenta": Refused(
        update(momentum=np.ones(3)), TypeError, "momentum", "is array([1., 1., 1.])", "expected a number in [0, 1]"
    ),
}


def batch(rng, rows=16, features=3):
    return jbn.moments((rng.normal(size=(rows, features)) * 2 + 3).astype(np.float32))


def test_bad_arguments_are_refused():
    assert_refused(REFUSED, also_traced=True)


def test_a_new_state_has_mean_0_and_variance_1_and_no_updates():
    params, state = jbn.init((2, 3))
    for leaf, expected in zip((*params, *state), (1, 0, 0, 1, 0), strict=True):
        np.testing.assert_array_equal(leaf, np.full_like(leaf, expected))
    assert params.scale.shape == state.var.shape == (2, 3)
    assert state.count.dtype == jnp.int32


@pytest.mark.parametrize("copied", [lambda value: pickle.loads(pickle.dumps(value)), copy.deepcopy])
def test_copies_of_params_and_state_are_the_same(copied):
    pair = jbn.Params(None, jnp.ones(3)), STATE
    assert jax.tree.structure(copied(pair)) == jax.tree.structure(pair)
    assert_same(copied(pair), pair)


def test_a_state_of_two_dtypes_takes_that_of_its_mean(x64, rng):
    state = jbn.State(jnp.zeros(3, jnp.float32), jnp.ones(3, jnp.float64), jnp.zeros(3))
    moments = batch(rng)
    new = jbn.update(state, moments, momentum=0)
    assert new.mean.dtype == new.var.dtype == jnp.float32
    assert_close(new.var, moments.var)


def test_an_averaged_count_is_rounded(rng):
    """An average of states, of two counts of 1 or of rounded weights, trains on under a schedule."""
    moments = batch(rng)
    for count, expected in ((1.0, 2), (2.9999998, 4), (3.0000002, 4), (2.5, 3)):
        averaged = STATE._replace(count=jnp.float32(count))
        new = jbn.update(averaged, moments, momentum=jbn.momentum.cumulative())
        assert new.count.dtype == jnp.int32
        assert int(new.count) == expected


@pytest.mark.parametrize("momentum", [0.999, 0.9999])
def test_update_with_a_momentum_near_one_loses_nothing(rng, momentum):
    state, mean, var = STATE, np.zeros(3), np.ones(3)
    rounded = np.float64(np.float32(momentum))
    step = jax.jit(lambda s, b: jbn.update(s, b, momentum=momentum))
    for _ in range(50):
        x = (rng.normal(size=(16, 3)) * 2 + 3).astype(np.float32)
        state = step(state, jbn.moments(x))
        mean, var = reference.update(mean, var, reference.batch_norm(x), rounded)
    assert_close(state.mean, mean, scale=1)
    assert_close(state.var, var, scale=1)


def test_a_cumulative_average_keeps_its_digits_from_a_far_start(rng):
    start, moments = jbn.State(jnp.full(1, 1e8), jnp.ones(1), jnp.zeros(3)), batch(rng, features=1)
    state = jbn.update(start, moments, momentum=jbn.momentum.cumulative())
    assert_close(state.mean, moments.mean)


@pytest.mark.parametrize("running_var", ["biased", "unbiased", "total"])
def test_unset_statistics_take_the_next_batch_whole(debug_nans, rng, running_var):
    moments = batch(rng)
    new = jax.jit(lambda s: jbn.update(s, moments, running_var=running_var))(jbn.unset(STATE))
    assert_same(new[:2], moments[:2])
    assert int(new.count) == 1


def test_unset_survives_averaging_and_is_loud():
    averaged = jax.tree.map(lambda a, b: (a + b) / 2, jbn.unset(STATE), STATE)
    assert bool(jnp.all(jnp.isneginf(averaged.var)))
    assert bool(jnp.all(jnp.isnan(jbn.normalize(jbn.init(3)[0], averaged, jnp.ones((2, 3))))))


def test_unset_marks_every_node_of_statistics_and_nothing_else():
    _, state = jbn.init(2)
    tree = {
        "ours": state._replace(count=jnp.int32(3)),
        "linen": {"mean": jnp.ones(2), "var": jnp.ones(2)},
        "other": {"mean": jnp.ones(2), "step": jnp.int32(4)},
        "table": {"mean": jnp.ones(2, jnp.int32), "var": jnp.ones(2, jnp.int32)},
    }
    marked = jbn.unset(tree)
    np.testing.assert_array_equal(marked["ours"].mean, [0, 0])
    assert int(marked["ours"].count) == 0
    for node in (marked["ours"].var, marked["linen"]["var"]):
        np.testing.assert_array_equal(node, [-np.inf, -np.inf])
    for name in ("other", "table"):
        assert_same(marked[name], tree[name])


def test_one_value_has_no_unbiased_variance(rng):
    for running_var, rows, moves in (("unbiased", 1, 0), ("unbiased", 2, 1), ("biased", 1, 1), ("total", 1, 1)):
        for start in (STATE, jbn.unset(STATE)):
            new = jbn.update(start, batch(rng, rows), running_var=running_var)
            assert int(new.count) == moves, (running_var, rows)
            if not moves:
                assert_same(new.var, start.var)


def test_a_new_state_that_would_overflow_is_not_taken():
    _, state = jbn.init(1)
    far = jbn.Moments(jnp.full(1, 1e30), jnp.ones(1), jnp.float32(8))
    assert_same(jbn.update(state, far, running_var="total"), state)


SCHEDULES = {
    "number": 0.75,
    "cumulative": jbn.momentum.cumulative(),
    "warmup": jbn.momentum.warmup(0.75),
    "debiased": jbn.momentum.debiased(0.75),
    "optax": optax.linear_schedule(0.2, 0.9, 5),
    "optax joined": optax.join_schedules([optax.constant_schedule(0.0), optax.constant_schedule(0.9)], [1]),
    "above one": lambda count: 1.5,
}


@pytest.mark.standard_promotion
def test_every_schedule_gives_the_momentum_of_the_count_under_jit(rng):
    @jax.jit
    def step(states, moments):
        return {name: jbn.update(states[name], moments, momentum=m) for name, m in SCHEDULES.items()}

    states = dict.fromkeys(SCHEDULES, STATE)
    expected = dict.fromkeys(SCHEDULES, (np.zeros(3), np.ones(3)))
    for count in range(8):
        moments = batch(rng)
        states = step(states, moments)
        for name, momentum in SCHEDULES.items():
            kept = min(1.0, float(momentum(jnp.int32(count)) if callable(momentum) else momentum))
            mean, var = (
                kept * old + (1 - kept) * np.asarray(new, np.float64)
                for old, new in zip(expected[name], moments[:2], strict=True)
            )
            expected[name] = mean, var
            assert_close(states[name].mean, mean, scale=4)
            assert_close(states[name].var, var, scale=4)
    assert all(int(state.count) == 8 for state in states.values())


def test_a_traced_momentum_is_clipped(rng):
    moments = batch(rng)
    traced = jax.jit(lambda m: jbn.update(STATE, moments, momentum=m))
    for value, clipped in ((-0.5, 0.0), (0.25, 0.25), (1.5, 1.0)):
        assert_close(traced(value).mean, jbn.update(STATE, moments, momentum=clipped).mean)


def test_the_count_is_exact_beyond_what_float32_can_count_and_ends_at_the_largest_int32(rng):
    moments = batch(rng)
    for count, expected in ((2**24 + 1, 2**24 + 2), (2**31 - 1, 2**31 - 1)):
        new = jbn.update(STATE._replace(count=jnp.int32(count)), moments)
        assert int(new.count) == expected
        assert (np.asarray(new.mean) != 0).all()


@pytest.mark.parametrize("field", ["mean", "var"])
def test_a_faulty_batch_is_not_taken_beside_a_faulty_state(rng, field):
    """A batch that is not finite in a feature that is lost already is faulty all the same."""
    faulty = STATE._replace(mean=jnp.array([0.0, jnp.nan, 0.0]))
    good = batch(rng)
    bad = good._replace(**{field: getattr(good, field).at[1].set(jnp.nan)})
    assert_same(jbn.update(faulty, bad), faulty)


def test_a_fault_in_one_feature_of_the_state_stays_there(rng):
    moments = batch(rng)
    faulty = STATE._replace(mean=jnp.array([0.0, jnp.nan, 0.0]), var=jnp.array([1.0, 1.0, jnp.inf]))
    new, expected = (jbn.update(state, moments, momentum=0.5) for state in (faulty, STATE))
    np.testing.assert_array_equal(new.mean, [expected.mean[0], np.nan, 0])
    np.testing.assert_array_equal(new.var, [expected.var[0], 1, np.inf])
    assert int(new.count) == 1


def test_update_is_not_differentiated(rng):
    moments = batch(rng)

    def remembered(momentum, state, moments):
        new = jbn.update(state, moments, momentum=momentum, running_var="total")
        return jnp.sum(new.mean) + jnp.sum(new.var)

    for leaf in jax.tree.leaves(jax.grad(remembered, argnums=(0, 2))(0.9, STATE, moments)):
        np.testing.assert_array_equal(leaf, np.zeros_like(leaf))
