import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jbn


def averaged(schedule, values):
    """The moving average of values, from a start of 1e6, and the share of that start that is left."""
    average, left = 1e6, 1.0
    for count, value in enumerate(values):
        kept = float(schedule(jnp.int32(count)))
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


@pytest.mark.parametrize("momentum", [0.5, 0.9, 0.999])
def test_debiased_is_adam_s_correction(rng, momentum):
    values = rng.normal(size=30)
    ema = optax.ema(momentum, debias=True)
    state = ema.init(jnp.zeros(()))
    with jax.numpy_dtype_promotion("standard"):
        for value in values:
            expected, state = ema.update(jnp.float32(value), state)
    np.testing.assert_allclose(averaged(jbn.momentum.debiased(momentum), values)[0], expected, rtol=1e-4)


@pytest.mark.parametrize("momentum", [0.5, 0.99, 1 - 1e-6, 1 - 1e-9])
@pytest.mark.parametrize("count", [0, 1, 10, 10**6])
def test_debiased_is_precise_near_one(momentum, count):
    log = np.log(np.longdouble(momentum))
    expected = momentum * np.expm1(count * log) / np.expm1((count + 1) * log)
    np.testing.assert_allclose(float(jbn.momentum.debiased(momentum)(count)), float(expected), rtol=3e-7)


def test_debiased_at_the_ends():
    for count in (0, 1, 7):
        assert float(jbn.momentum.debiased(0)(count)) == 0
        np.testing.assert_allclose(float(jbn.momentum.debiased(1)(count)), count / (count + 1))


def test_per_microbatch_keeps_the_same_share():
    np.testing.assert_allclose(jbn.momentum.per_microbatch(0.9, 4) ** 4, 0.9)
    assert jbn.momentum.per_microbatch(0.9, 1) == 0.9
    with pytest.raises(ValueError, match="`microbatches` is 0"):
        jbn.momentum.per_microbatch(0.9, 0)


def test_from_torch():
    assert jbn.momentum.from_torch(0.1) == 0.9
    assert float(jbn.momentum.from_torch(None)(1)) == 0.5


@pytest.mark.parametrize("make", [jbn.momentum.warmup, jbn.momentum.debiased, jbn.momentum.from_torch])
@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_numbers_outside_the_range_are_refused(make, value):
    with pytest.raises(ValueError, match=r"expected a number in \[0, 1\]"):
        make(value)


def test_schedules_take_any_count():
    for schedule in (jbn.momentum.cumulative(), jbn.momentum.warmup(0.9), jbn.momentum.debiased(0.9)):
        for count in (2, jnp.int32(2), jnp.float32(2), np.int64(2)):
            np.testing.assert_allclose(jax.jit(schedule)(count), schedule(2))
