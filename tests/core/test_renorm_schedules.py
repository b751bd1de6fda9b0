"""Bounds of batch renormalization: numbers, traced values, and schedules of the count of updates."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
from support.refusals import Refused, assert_refused, jitted, partly
from support.renorm import CLOSED, case, corrected
from support.tolerances import assert_close

import jbn


def test_default_bounds_are_those_published():
    """1 and 0 for 5,000 updates, then 3 at 40,000 and 5 at 25,000 (Ioffe 2017, section 4.2), compared with optax."""
    r_max, d_max = jbn.renorm.r_max(), jbn.renorm.d_max()
    expected_r = optax.linear_schedule(1.0, 3.0, 35_000, 5_000)
    expected_d = optax.linear_schedule(0.0, 5.0, 20_000, 5_000)
    with jax.numpy_dtype_promotion("standard"):
        for count in (0, 4_999, 5_000, 5_001, 17_000, 25_000, 39_999, 40_000, 2**31 - 1):
            assert_close(r_max(jnp.int32(count)), expected_r(count))
            assert_close(d_max(jnp.int32(count)), expected_d(count), scale=5)
    defaults = inspect.signature(jbn.batch_renorm).parameters
    assert float(defaults["r_max"].default(22_500)) == 2
    assert float(defaults["d_max"].default(15_000)) == 2.5


def test_a_bound_may_rise_from_the_first_update_on_for_more_updates_than_int32_holds():
    assert float(jbn.renorm.r_max(3.0, begin=0, end=2**31)(jnp.int32(2**30))) == 2
    assert float(jbn.renorm.d_max(3.0, begin=2**31, end=2**32)(jnp.int32(2**30))) == 0


def test_bounds_follow_the_count(rng):
    params, state, x = case(rng, (8, 3))
    schedules = {"r_max": jbn.renorm.r_max(2.0, begin=10, end=20), "d_max": jbn.renorm.d_max(1.0, begin=10, end=20)}
    renormed = jax.jit(lambda state: jbn.batch_renorm(params, state, x, True, **schedules)[0])
    for count, r_max, d_max in ((10, 1, 0), (12, 1.2, 0.2), (999, 2, 1)):
        expected = corrected(params, state, x, r_max=r_max, d_max=d_max)
        assert_close(renormed(state._replace(count=jnp.full(3, float(count)))), expected.out, scale=3)


def test_each_feature_has_the_bound_of_its_own_count(rng):
    params, state, x = case(rng, (8, 3))
    state = state._replace(count=np.float32([10, 12, 999]))
    schedules = {"r_max": jbn.renorm.r_max(2.0, begin=10, end=20), "d_max": jbn.renorm.d_max(1.0, begin=10, end=20)}
    bounds = {"r_max": np.array([1, 1.2, 2]), "d_max": np.array([0, 0.2, 1])}
    out, _ = jax.jit(lambda state: jbn.batch_renorm(params, state, x, True, **schedules))(state)
    assert_close(out, corrected(params, state, x, **bounds).out, scale=3)


def test_traced_and_scheduled_bounds_that_allow_nothing_are_closed(rng):
    params, state, x = case(rng, (8, 3))
    expected = corrected(params, state, x, **CLOSED).out

    @jax.jit
    def traced(r_max, d_max):
        return jbn.batch_renorm(params, state, x, True, r_max=r_max, d_max=d_max)[0]

    @jax.jit
    def scheduled(r_max, d_max):
        return jbn.batch_renorm(params, state, x, True, r_max=lambda _: r_max, d_max=lambda _: d_max)[0]

    for renormed in (traced, scheduled):
        for r_max, d_max in ((0.5, 0.0), (-3.0, -3.0)):
            assert_close(renormed(r_max, d_max), expected, scale=3)
    assert_close(traced(1.2, 0.2), corrected(params, state, x, r_max=1.2, d_max=0.2).out, scale=3)


def by_a_condition(count):
    return 2 if count < 9 else 3


PARAMS, STATE = jbn.init(3)
renorm = partly(jbn.batch_renorm, params=PARAMS, state=STATE, x=np.ones((8, 16, 3), np.float32), train=True)
BOUNDS = {
    "r_max below 1": Refused(renorm(r_max=0.5), ValueError, "r_max", "is 0.5", "of at least 1; inf means no bound"),
    "d_max negative": Refused(renorm(d_max=-1), ValueError, "d_max", "is -1.0", "expected a number of at least 0"),
    "r_max nan": Refused(renorm(r_max=np.nan), ValueError, "r_max", "is nan", "inf means no bound"),
    "d_max a text": Refused(renorm(d_max="5"), TypeError, "d_max", "is '5'", "such as jbn.renorm.d_max()"),
    "r_max None": Refused(renorm(r_max=None), TypeError, "r_max", "is None", "such as jbn.renorm.r_max()"),
    "r_max at inference": Refused(
        renorm(r_max=0.5, train=False), ValueError, "r_max", "is 0.5", "expected a number of at least 1"
    ),
    "d_max at inference": Refused(
        renorm(d_max="5", train=False), TypeError, "d_max", "is '5'", "expected a number of at least 0"
    ),
    "uncalled": Refused(renorm(r_max=jbn.renorm.r_max), TypeError, "r_max", "jbn.renorm.r_max itself", "call it, as"),
    "the other's": Refused(
        renorm(r_max=jbn.renorm.d_max), TypeError, "r_max", "renorm.d_max itself", "as in jbn.renorm.d_max(...)"
    ),
    "gives channels": Refused(
        renorm(d_max=lambda count: np.ones(3)), TypeError, "d_max", "returns array(", "to a number"
    ),
    "by a Python condition": Refused(
        renorm(r_max=by_a_condition),
        TypeError,
        "r_max",
        "boolean conversion",
        "Use jnp.where or jax.lax.cond instead of `if`",
    ),
}
SCHEDULES = {
    "limit below 1": Refused(lambda: jbn.renorm.r_max(0.5), ValueError, "limit", "is 0.5", "a number of at least 1"),
    "limit negative": Refused(lambda: jbn.renorm.d_max(-1.0), ValueError, "limit", "is -1.0", "of at least 0"),
    "limit a text": Refused(lambda: jbn.renorm.d_max("a"), TypeError, "limit", "is 'a'", "a number of at least 0"),
    "limit infinite": Refused(
        lambda: jbn.renorm.d_max(np.inf), ValueError, "limit", "is inf", "For no bound, pass d_max=inf"
    ),
    "limit traced": Refused(
        jitted(jbn.renorm.r_max, limit=3.0), TypeError, "limit", "is traced", "a Python number such as 3.0"
    ),
    "begin a float": Refused(
        lambda: jbn.renorm.r_max(begin=0.5), TypeError, "begin", "is 0.5", "expected counts of updates, ints"
    ),
    "end at begin": Refused(
        lambda: jbn.renorm.d_max(begin=3, end=3), ValueError, "begin", "is 3 and `end` 3", "0 <= begin < end"
    ),
}


def test_impossible_bounds_are_refused():
    assert_refused(BOUNDS, also_traced=True)


def test_impossible_schedules_of_bounds_are_refused():
    assert_refused(SCHEDULES)
