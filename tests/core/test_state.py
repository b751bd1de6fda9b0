"""The state: init, update and unset, copies and dtypes."""

import copy
import functools
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
MOMENTS = jbn.Moments(np.zeros(3, np.float32), np.ones(3, np.float32), np.full(3, 8, np.float32))
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
    "update of a count in half precision": Refused(
        update(state=STATE._replace(count=jnp.zeros(3, jnp.bfloat16))),
        TypeError,
        "state.count.dtype",
        "is bfloat16",
        "expected float32 or",
    ),
    "update of one count for all features": Refused(
        update(state=STATE._replace(count=jnp.float32(7))),
        ValueError,
        "state.count",
        "has shape (): expected (3,)",
        "jbn.upgrade(tree)",
    ),
    "update by a schedule without a count": Refused(
        update(state=STATE._replace(count=None), momentum=jbn.momentum.cumulative()),
        ValueError,
        "state.count",
        "is None",
        "expected an array like `state.mean`",
    ),
    "update by one count for all features": Refused(
        update(moments=MOMENTS._replace(count=np.float32(8))),
        ValueError,
        "moments.count",
        "has shape ()",
        "expected (3,)",
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
    assert state.count.shape == (2, 3)
    assert jbn.init(3, jnp.float32)[1].count.dtype == jnp.float32


@pytest.mark.parametrize("copied", [lambda value: pickle.loads(pickle.dumps(value)), copy.deepcopy])
def test_copies_of_params_and_state_are_the_same(copied):
    pair = jbn.Params(None, jnp.ones(3)), STATE
    assert jax.tree.structure(copied(pair)) == jax.tree.structure(pair)
    assert_same(copied(pair), pair)


@pytest.mark.parametrize(("mean", "var"), [("float32", "float64"), ("float64", "float32")])
def test_a_state_of_two_dtypes_keeps_them(x64, rng, mean, var):
    state = jbn.State(jnp.zeros(3, mean), jnp.ones(3, var), jnp.zeros(3))
    moments = batch(rng)
    new = jbn.update(state, moments, momentum=0)
    assert (new.mean.dtype, new.var.dtype) == (mean, var)
    assert_close(new.var, moments.var)
    beyond_float32 = moments._replace(var=jnp.full(3, 1e200))
    assert bool(jnp.all(jnp.isfinite(jbn.update(new, beyond_float32, momentum=0).var)))


def test_a_schedule_sees_an_averaged_count_rounded_up(rng):
    """Averages of states, also with rounded weights, can be trained further under a schedule."""
    moments, counts = batch(rng), np.float32([1.0, 2.5, 2.9999998])
    new = jbn.update(STATE._replace(count=counts), moments, momentum=lambda count: count.astype(jnp.float32) / 4)
    assert_close(new.mean, np.float64(moments.mean) * [3 / 4, 1 / 4, 1 / 4])
    np.testing.assert_array_equal(new.count, counts + 1)


def test_a_schedule_sees_one_int32_scalar(rng):
    """So interpolating optax schedules, lax.cond and tables work in a schedule, for any feature shape."""
    seen, table = [], jnp.array([0.0, 0.5, 1.0])

    def schedule(count):
        seen.append((count.shape, count.dtype.name))
        return jax.lax.cond(count > 2, lambda: jnp.float32(1), lambda: table[count])

    moments = jbn.moments(rng.normal(size=(8, 2, 2)).astype(np.float32), feature_axis=(1, 2))
    start = jbn.init((2, 2))[1]._replace(count=np.float32([[0, 1], [2, 9]]))
    new = jbn.update(start, moments, momentum=schedule)
    assert set(seen) == {((), "int32")}
    assert_close(new.mean, np.float64(moments.mean) * [[1, 0.5], [0, 0]])


def test_averages_of_states_inside_a_loop_keep_their_dtypes_and_train_on(rng):
    """Averages for a target network by optax, and over replicas by pmean, with a schedule that reads the count."""
    batches = rng.normal(size=(5, 2, 16, 3)).astype(np.float32) + 3
    step = functools.partial(jbn.update, momentum=jbn.momentum.cumulative())

    def step_and_average(state, x):
        return jax.lax.pmean(step(state, jbn.moments(x)), "replicas")

    def body(carry, x):
        replicas, target = carry
        replicas = jax.vmap(step_and_average, axis_name="replicas")(replicas, x)
        target = optax.incremental_update(jax.tree.map(lambda leaf: leaf[0], replicas), target, 0.25)
        return (replicas, target), None

    start = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), STATE)
    (replicas, target), _ = jax.jit(lambda carry: jax.lax.scan(body, carry, batches))((start, STATE))
    means = np.float64(batches).mean((1, 2))
    averages = np.cumsum(means, 0) / np.arange(1, 6)[:, None]
    expected, count = np.zeros(3), 0.0
    for number, average in enumerate(averages, 1):
        expected, count = 0.75 * expected + 0.25 * average, 0.75 * count + 0.25 * number
    assert_close(replicas.mean[0], averages[-1])
    assert_close(target.mean, expected)
    assert_close(target.count, np.full(3, count))
    kept, moments = np.ceil(count) / (np.ceil(count) + 1), batch(rng)
    assert_close(step(target, moments).mean, kept * expected + (1 - kept) * np.float64(moments.mean))


@pytest.mark.parametrize("momentum", [0.999, 0.9999])
def test_update_with_a_momentum_near_one_loses_nothing(rng, momentum):
    state, mean, var = STATE, np.zeros(3), np.ones(3)
    step = jax.jit(lambda s, b: jbn.update(s, b, momentum=momentum))
    first = jbn.moments(np.ones((4, 3), np.float32))
    assert_close(step(state, first).mean, np.full(3, 1 - momentum))  # not by 1 - float32(momentum)
    for _ in range(50):
        x = (rng.normal(size=(16, 3)) * 2 + 3).astype(np.float32)
        state = step(state, jbn.moments(x))
        mean, var = reference.update(mean, var, reference.batch_norm(x), momentum)
    assert_close(state.mean, mean, scale=1)
    assert_close(state.var, var, scale=1)


def test_a_scheduled_average_keeps_its_digits_beside_a_far_start_or_batch(rng):
    near, far = batch(rng, features=1), jbn.Moments(jnp.full(1, 1e8), jnp.ones(1), jnp.ones(1))
    for start, moments, schedule in ((far, near, lambda _: 0.0), (near, far, lambda _: 1.0)):
        assert_close(jbn.update(jbn.State(*start), moments, momentum=schedule).mean, near.mean)


@pytest.mark.parametrize("running_var", ["biased", "unbiased", "total"])
def test_unset_statistics_take_the_next_batch_whole(debug_nans, rng, running_var):
    moments = batch(rng)
    new = jax.jit(lambda s: jbn.update(s, moments, running_var=running_var))(jbn.unset(STATE))
    assert_same(new[:2], moments[:2])
    np.testing.assert_array_equal(new.count, np.ones(3))


def test_unset_survives_averaging_and_is_loud():
    averaged = jax.tree.map(lambda a, b: (a + b) / 2, jbn.unset(STATE), STATE)
    assert bool(jnp.all(jnp.isneginf(averaged.var)))
    assert bool(jnp.all(jnp.isnan(jbn.normalize(jbn.init(3)[0], averaged, jnp.ones((2, 3))))))


def test_unset_marks_every_node_of_statistics_and_nothing_else():
    _, state = jbn.init(2)
    tree = {
        "ours": state._replace(count=jnp.full(2, 3.0)),
        "linen": {"mean": jnp.ones(2), "var": jnp.ones(2)},
        "other": {"mean": jnp.ones(2), "step": jnp.int32(4)},
        "table": {"mean": jnp.ones(2, jnp.int32), "var": jnp.ones(2, jnp.int32)},
    }
    marked = jbn.unset(tree)
    np.testing.assert_array_equal(marked["ours"].mean, [0, 0])
    np.testing.assert_array_equal(marked["ours"].count, [0, 0])
    for node in (marked["ours"].var, marked["linen"]["var"]):
        np.testing.assert_array_equal(node, [-np.inf, -np.inf])
    for name in ("other", "table"):
        assert_same(marked[name], tree[name])


@pytest.mark.parametrize(("running_var", "fewest"), [("biased", 1), ("total", 1), ("unbiased", 2)])
def test_fewer_values_than_a_variance_needs_move_nothing(rng, running_var, fewest):
    for start in (STATE, jbn.unset(STATE)):
        assert_same(jbn.update(start, batch(rng, fewest - 1), running_var=running_var), start)
        moved = jbn.update(start, batch(rng, fewest), running_var=running_var)
        np.testing.assert_array_equal(moved.count, np.ones(3))


def test_statistics_move_without_a_count(rng):
    moments = batch(rng)
    new = jbn.update(STATE._replace(count=None), moments)
    assert new.count is None
    assert_close(new.mean, 0.01 * np.float64(moments.mean))
    assert_close(new.var, 0.99 + 0.01 * np.float64(moments.var))


def test_features_with_one_value_keep_their_state_under_unbiased_and_the_others_move():
    """A feature with two values moves to their unbiased variance, of the set as of the unset state."""
    moments = jbn.Moments(*np.float32([[5, 6, 7], [0, 4, 0], [1, 2, 0]]))
    for start in (STATE, jbn.unset(STATE)):
        new = jbn.update(start, moments, momentum=0.5, running_var="unbiased")
        var = 4 if np.isneginf(start.var[1]) else 0.5 * 1 + 0.5 * (4 * 2 / 1)
        np.testing.assert_array_equal(new.mean, [start.mean[0], 6 if var == 4 else 3, start.mean[2]])
        np.testing.assert_array_equal(new.var, [start.var[0], var, start.var[2]])
        np.testing.assert_array_equal(new.count, [0, 1, 0])


def test_a_feature_whose_new_statistics_would_overflow_keeps_its_own():
    far = jbn.Moments(jnp.array([1e30, 2, 3]), jnp.ones(3), jnp.full(3, 8.0))
    new = jbn.update(STATE, far, momentum=0.5, running_var="total")
    np.testing.assert_array_equal(new.mean, [0, 1, 1.5])
    np.testing.assert_array_equal(new.var, [1, 2, 3.25])
    np.testing.assert_array_equal(new.count, [0, 1, 1])


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
    for state in states.values():
        np.testing.assert_array_equal(state.count, np.full(3, 8))


def test_a_traced_momentum_is_clipped(rng):
    moments = batch(rng)
    traced = jax.jit(lambda m: jbn.update(STATE, moments, momentum=m))
    for value, clipped in ((-0.5, 0.0), (0.25, 0.25), (1.5, 1.0)):
        assert_close(traced(value).mean, jbn.update(STATE, moments, momentum=clipped).mean)


def test_the_count_stays_at_the_last_whole_number_that_float32_can_count_to_and_the_state_moves(rng):
    moments, last = batch(rng), 2**24
    new = jbn.update(STATE._replace(count=jnp.array([last - 1.0, last, 0])), moments)
    np.testing.assert_array_equal(new.count, [last, last, 1])
    assert (np.asarray(new.mean) != 0).all()


@pytest.mark.parametrize("field", ["mean", "var"])
def test_a_feature_that_is_not_finite_keeps_its_state_and_the_others_move(rng, field):
    """Also if another feature of the state is not finite already: that feature does not change."""
    good = batch(rng)
    bad = good._replace(**{field: getattr(good, field).at[1].set(jnp.nan)})
    for start in (STATE, STATE._replace(mean=jnp.array([jnp.nan, 0.0, 0.0]), var=jnp.array([1.0, 1.0, jnp.inf]))):
        new = jbn.update(start, bad, momentum=0.5)
        moves = np.isfinite(start.mean) & np.isfinite(start.var) & [True, False, True]
        for old, other, value in zip(start[:2], good[:2], new[:2], strict=True):
            np.testing.assert_array_equal(value[~moves], old[~moves])
            assert_close(value[moves], (0.5 * np.float64(old) + 0.5 * np.float64(other))[moves])
        np.testing.assert_array_equal(new.count, moves)


def test_update_is_not_differentiated(rng):
    moments = batch(rng)

    def remembered(momentum, state, moments):
        new = jbn.update(state, moments, momentum=momentum, running_var="total")
        return jnp.sum(new.mean) + jnp.sum(new.var)

    for leaf in jax.tree.leaves(jax.grad(remembered, argnums=(0, 2))(0.9, STATE, moments)):
        np.testing.assert_array_equal(leaf, np.zeros_like(leaf))
