"""Momentum schedules: their averages and precision, and the momenta that are refused."""

import copy
import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
from support.refusals import Refused, assert_refused, jitted, partly

import jbn


def averaged(schedule, values):
    """The moving average of values from the initial value 1e6, and the remaining weight of the initial value."""
    average, left = 1e6, 1.0
    for count, value in enumerate(values):
        kept = float(schedule(np.int32(count)))
        average = kept * average + (1 - kept) * value
        left *= kept
    return average, left


def test_cumulative_is_the_plain_average(rng):
    values = rng.normal(size=50)
    average, left = averaged(jbn.momentum.cumulative(), values)
    np.testing.assert_allclose(average, values.mean(), atol=1e-6)
    assert left == 0


def test_warmup_is_the_plain_average_until_it_is_warm(rng):
    values = rng.normal(size=20)
    for steps in (1, 5, 10):
        average, _ = averaged(jbn.momentum.warmup(0.9), values[:steps])
        np.testing.assert_allclose(average, values[:steps].mean(), atol=1e-6)
    assert float(jbn.momentum.warmup(0.9)(1000)) == np.float32(0.9)


def test_debiased_is_adam_s_correction(rng):
    values = rng.normal(size=30)
    for momentum in (0.5, 0.9, 0.999):
        ema = optax.ema(momentum, debias=True)
        state = ema.init(jnp.zeros(()))
        with jax.numpy_dtype_promotion("standard"):
            for value in values:
                expected, state = ema.update(np.float32(value), state)
        average, _ = averaged(jbn.momentum.debiased(momentum), values)
        np.testing.assert_allclose(average, expected, rtol=1e-4, err_msg=f"momentum {momentum}")


def test_debiased_is_precise_near_one():
    for momentum in (0.5, 0.99, 1 - 1e-6, 1 - 1e-9):
        log = np.log(np.longdouble(momentum))
        for count in (0, 1, 10, 10**6):
            expected = float(momentum * np.expm1(count * log) / np.expm1((count + 1) * log))
            found = float(jbn.momentum.debiased(momentum)(count))
            np.testing.assert_allclose(found, expected, rtol=3e-7, err_msg=f"momentum {momentum}, count {count}")


def test_debiased_of_0_keeps_nothing_and_of_1_is_cumulative():
    for count in (0, 1, 7):
        assert float(jbn.momentum.debiased(0)(count)) == 0
        np.testing.assert_allclose(float(jbn.momentum.debiased(1)(count)), count / (count + 1))


def test_per_microbatch_keeps_the_same_share_by_all_updates():
    np.testing.assert_allclose(jbn.momentum.per_microbatch(0.9, 4) ** 4, 0.9)
    assert jbn.momentum.per_microbatch(0.9, 1) == 0.9


def test_from_torch_is_the_other_share_and_none_is_cumulative():
    assert jbn.momentum.from_torch(0.1) == 0.9
    assert float(jbn.momentum.from_torch(None)(1)) == 0.5


def test_schedules_take_any_count():
    for schedule in (jbn.momentum.cumulative(), jbn.momentum.warmup(0.9), jbn.momentum.debiased(0.9)):
        expected, under_jit = schedule(2), jax.jit(schedule)
        for count in (2, jnp.int32(2), jnp.float32(2), np.int64(2)):
            np.testing.assert_allclose(schedule(count), expected)
            np.testing.assert_allclose(under_jit(count), expected)


SCHEDULES_AS_VALUES = {
    "jbn.momentum.cumulative()": jbn.momentum.cumulative,
    "jbn.momentum.warmup(0.9)": functools.partial(jbn.momentum.warmup, 0.9),
    "jbn.momentum.debiased(0.99)": functools.partial(jbn.momentum.debiased, 0.99),
    "jbn.renorm.r_max(3.0, begin=10, end=20)": functools.partial(jbn.renorm.r_max, 3, begin=10, end=20),
    "jbn.renorm.d_max(5.0, begin=10, end=20)": functools.partial(jbn.renorm.d_max, 5, begin=10, end=20),
}


def test_schedules_are_values():
    """Schedules from equal arguments are equal, also after pickle, copy or eval of their repr: models compare them."""
    made = {shown: make() for shown, make in SCHEDULES_AS_VALUES.items()}
    for shown, schedule in made.items():
        assert repr(schedule) == shown
        copies = [SCHEDULES_AS_VALUES[shown](), eval(shown, {"jbn": jbn}), copy.deepcopy(schedule)]
        for other in (*copies, pickle.loads(pickle.dumps(schedule))):
            assert other == schedule and hash(other) == hash(schedule)
    assert len(set(made.values())) == len(made)
    assert jbn.momentum.warmup(0.9) != jbn.momentum.warmup(0.8)
    assert jbn.renorm.r_max(5.0, begin=10, end=20) != made["jbn.renorm.d_max(5.0, begin=10, end=20)"]


def test_scalars_of_numpy_and_jax_are_turned_into_numbers():
    """A schedule from such a scalar equals the one from a Python number, so programs are not compiled again."""
    made = {
        jbn.momentum.warmup(0.5): jbn.momentum.warmup,
        jbn.momentum.debiased(0.5): jbn.momentum.debiased,
        jbn.renorm.r_max(2.5, begin=10, end=20): functools.partial(jbn.renorm.r_max, begin=10, end=np.int64(20)),
        jbn.renorm.d_max(2.5, begin=10, end=20): functools.partial(jbn.renorm.d_max, begin=np.int32(10), end=20),
    }
    for expected, make in made.items():
        number = 0.5 if "momentum" in repr(expected) else 2.5
        for scalar in (np.float32(number), np.array(number), jnp.float32(number)):
            assert make(scalar) == expected and repr(make(scalar)) == repr(expected)
            assert hash(make(scalar)) == hash(expected)


def by_a_condition(count):
    return 2 if count < 9 else 3


class Unhashable:
    """A schedule with __eq__ but no __hash__, like a dataclass that is not frozen."""

    def __call__(self, count):
        return 0.5

    def __eq__(self, other):
        return isinstance(other, Unhashable)


PARAMS, STATE = jbn.init(3)
MOMENTS = jbn.Moments(np.zeros(3, np.float32), np.ones(3, np.float32), np.full(3, 8, np.float32))
norm = partly(jbn.batch_norm, params=PARAMS, state=STATE, x=np.ones((8, 16, 3), np.float32), train=True)
renorm = partly(jbn.batch_renorm, params=PARAMS, state=STATE, x=np.ones((8, 16, 3), np.float32), train=True)
update = partly(jbn.update, state=STATE, moments=MOMENTS)
MOMENTA = {
    "above 1": Refused(norm(momentum=1.01), ValueError, "momentum", "is 1.01", "see jbn.momentum.from_torch"),
    "above 1 in renorm": Refused(renorm(momentum=2.0), ValueError, "momentum", "is 2.0", "expected a number in [0, 1]"),
    "above 1 at inference": Refused(
        norm(momentum=1.01, train=False), ValueError, "momentum", "is 1.01", "expected a number in [0, 1]"
    ),
    "negative": Refused(update(momentum=-0.1), ValueError, "momentum", "is -0.1", "expected a number in [0, 1]"),
    "None": Refused(norm(momentum=None), TypeError, "momentum", "is None", "such as jbn.momentum.warmup(0.99)"),
    "a text": Refused(norm(momentum="0.9"), TypeError, "momentum", "is '0.9'", "a function count -> momentum"),
    "a key": Refused(
        norm(momentum=jax.random.key(0)), TypeError, "momentum", "key<fry>", "expected a number in [0, 1]"
    ),
    "uncalled": Refused(
        update(momentum=jbn.momentum.warmup), TypeError, "momentum", "momentum.warmup itself", "call it"
    ),
    "uncalled, without arguments": Refused(
        update(momentum=jbn.momentum.cumulative), TypeError, "momentum", "jbn.momentum.cumulative itself", "call it"
    ),
    "gives channels": Refused(
        update(momentum=lambda count: np.ones(3)), TypeError, "momentum", "returns array([1., 1., 1.])", "to a number"
    ),
    "gives None": Refused(
        update(momentum=lambda count: None),
        TypeError,
        "momentum",
        "returns None",
        "the count of updates, an int32 scalar",
    ),
    "gives a text": Refused(
        update(momentum=lambda count: "0.9"), TypeError, "momentum", "returns '0.9'", "to a number"
    ),
    "without a count": Refused(
        update(momentum=lambda: 0.9), TypeError, "momentum", "takes 0 positional", "count of updates"
    ),
    "by a Python condition": Refused(
        norm(momentum=by_a_condition),
        TypeError,
        "momentum",
        "boolean conversion",
        "Use jnp.where or jax.lax.cond instead of",
    ),
    "by NumPy": Refused(
        update(momentum=lambda count: np.float32(count) / 9),
        TypeError,
        "momentum",
        "fails on a traced",
        "and jnp instead of math",
    ),
    "of a statistic without a count": Refused(
        norm(state=STATE._replace(count=None), momentum=jbn.momentum.warmup(0.9)),
        ValueError,
        "state.count",
        "is None, but `momentum` is a schedule",
        "expected an array like `state.mean`",
    ),
    "without a hash": Refused(
        norm(momentum=Unhashable()), TypeError, "momentum", "which is not hashable", "a frozen dataclass"
    ),
    "traced, one for each feature": Refused(
        jitted(norm(), momentum=np.ones(3, np.float32)), TypeError, "momentum", "a traced float32[3]", "of shape ()"
    ),
    "traced and complex": Refused(
        jitted(norm(), momentum=np.complex64(1j)), TypeError, "momentum", "a traced complex64[]", "expected a number"
    ),
}
SCHEDULES = {
    "traced warmup": Refused(
        jitted(jbn.momentum.warmup, momentum=0.9), TypeError, "momentum", "is traced", "bound before jit"
    ),
    "warmup to 2": Refused(
        lambda: jbn.momentum.warmup(2), ValueError, "momentum", "is 2.0", "expected a number in [0, 1]"
    ),
    "warmup to nan": Refused(
        lambda: jbn.momentum.warmup(np.nan), ValueError, "momentum", "is nan", "expected a number in [0, 1]"
    ),
    "debiased text": Refused(lambda: jbn.momentum.debiased("a"), TypeError, "momentum", "is 'a'", "a number in [0, 1]"),
    "debiased above 1": Refused(
        lambda: jbn.momentum.debiased(1.1), ValueError, "momentum", "is 1.1", "expected a number in [0, 1]"
    ),
    "PyTorch's -1": Refused(
        lambda: jbn.momentum.from_torch(-1), ValueError, "momentum", "is -1", "share of the new value"
    ),
    "no microbatch": Refused(
        lambda: jbn.momentum.per_microbatch(0.9, 0), ValueError, "microbatches", "is 0", "an int of at least 1"
    ),
    "half a microbatch": Refused(
        lambda: jbn.momentum.per_microbatch(0.9, 0.5), ValueError, "microbatches", "is 0.5", "an int of at least 1"
    ),
    "microbatches of a momentum above 1": Refused(
        lambda: jbn.momentum.per_microbatch(1.1, 2), ValueError, "momentum", "is 1.1", "expected a number in [0, 1]"
    ),
}


def test_impossible_momenta_are_refused():
    assert_refused(MOMENTA, also_traced=True)


def test_impossible_schedules_are_refused():
    assert_refused(SCHEDULES)
