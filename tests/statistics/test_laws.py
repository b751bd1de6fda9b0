"""The laws of the moving average, against Monte Carlo through jbn's own update and against sums and grids."""

import functools
import itertools
import math

import jax
import numpy as np
import pytest
from support.refusals import Refused, assert_refused, jitted

import jbn
from jbn import diagnostics

REPLICAS = 8192
MEAN, SD = 3.0, 2.0
DISTANCE, START_VAR = 1.5, 0.5
RULES = ("biased", "unbiased", "total")
LAWS = {
    "slow": (0.99, 60, 4),
    "few": (0.9, 3, 2),
    "one value": (0.95, 40, 1),
    "below a half": (0.4, 20, 4),
    "warmup": (jbn.momentum.warmup(0.9), 40, 4),
    "debiased": (jbn.momentum.debiased(0.95), 25, 4),
    "cumulative": (jbn.momentum.cumulative(), 20, 8),
}
every_law = pytest.mark.parametrize("case", LAWS)


@functools.cache
def running(case):
    """Running mean and variance of many replicas by rule, one feature each, in units of the population's deviation."""
    momentum, steps, batch_size = LAWS[case]
    x = np.random.default_rng(7).normal(MEAN, SD, (steps, batch_size, REPLICAS)).astype(np.float32)
    mean, var = np.full((2, REPLICAS), [[MEAN + DISTANCE * SD], [START_VAR * SD**2]], np.float32)
    start = dict.fromkeys(RULES, jbn.State(mean, var, np.zeros(REPLICAS, np.float32)))

    def step(states, x):
        batch = jbn.moments(x)
        new = {rule: jbn.update(states[rule], batch, momentum=momentum, running_var=rule) for rule in RULES}
        return new, None

    states, _ = jax.jit(lambda start, x: jax.lax.scan(step, start, x))(start, x)
    # The unbiased variance of one value is undefined, so there is no update.
    assert (states["unbiased"].count == (steps if batch_size > 1 else 0)).all()
    assert (states["total"].count == steps).all()
    return {
        rule: ((np.asarray(state.mean, np.float64) - MEAN) / SD, np.asarray(state.var, np.float64) / SD**2)
        for rule, state in states.items()
    }


def assert_expected(samples, expected, rounding=1e-5):
    """Check that the mean of the samples is within 4 standard errors of the expectation."""
    assert len(samples) >= 4000
    assert abs(samples.mean() - expected) <= 4 * samples.std() / math.sqrt(len(samples)) + rounding


@every_law
def test_error_of_the_mean(case):
    mean, _ = running(case)["biased"]
    assert_expected(mean**2, diagnostics.expected_error(*LAWS[case], distance=DISTANCE))
    assert_expected(mean, DISTANCE * diagnostics.initial_weight(*LAWS[case][:2]))


@every_law
def test_effective_batches_is_the_noise_of_so_many(case):
    momentum, steps, batch_size = LAWS[case]
    mean, _ = running(case)["biased"]
    noise = mean - DISTANCE * diagnostics.initial_weight(momentum, steps)
    gathered = 1 - diagnostics.initial_weight(momentum, steps)
    effective = diagnostics.effective_batches(momentum, steps)
    assert_expected(noise**2, gathered**2 / (effective * batch_size))


@every_law
def test_bias_and_spread_of_the_variance(case):
    for rule in ("biased", "total") if LAWS[case][2] == 1 else RULES:
        _, var = running(case)[rule]
        law = diagnostics.expected_variance(*LAWS[case], DISTANCE, running_var=rule, start_var=START_VAR)
        assert_expected(var - 1, law.bias)
        assert_expected((var - 1 - law.bias) ** 2, law.spread**2)


def test_closed_forms_are_the_sums():
    for momentum, steps in itertools.product([0.0, 0.5, 0.99, 1.0], [0, 1, 7, 500]):
        weights = diagnostics.average_weights(momentum, steps)
        squares = (weights.batches**2).sum()
        effective = weights.batches.sum() ** 2 / squares if squares else 0
        error = 4 * weights.start**2 + squares / 4
        found = [
            weights.start + weights.batches.sum(),
            diagnostics.initial_weight(momentum, steps),
            diagnostics.effective_batches(momentum, steps),
            diagnostics.expected_error(momentum, steps, 4, 2.0),
        ]
        expected = [1, weights.start, effective, error]
        np.testing.assert_allclose(found[:2], expected[:2], rtol=1e-12, err_msg=f"{momentum}, {steps}")
        np.testing.assert_allclose(found[2:], expected[2:], rtol=1e-10, err_msg=f"{momentum}, {steps}")


def test_weights_are_those_of_the_update():
    schedule = jbn.momentum.warmup(0.7)
    weights = diagnostics.average_weights(schedule, 9)
    value = np.eye(10)[0]
    for t in range(9):
        kept = float(schedule(t))
        value = kept * value + (1 - kept) * np.eye(10)[t + 1]
    np.testing.assert_allclose([weights.start, *weights.batches], value, rtol=1e-6, atol=1e-12)


def test_limits_of_half_life_and_effective_batches():
    assert diagnostics.half_life(0.0) == 0
    assert diagnostics.half_life(1.0) == math.inf
    np.testing.assert_allclose(0.97 ** diagnostics.half_life(0.97), 0.5)
    np.testing.assert_allclose(diagnostics.effective_batches(0.99), diagnostics.effective_batches(0.99, 10_000))
    assert diagnostics.effective_batches(1.0) == 0
    np.testing.assert_allclose(diagnostics.effective_batches(1 - 1e-12, 50), 50, rtol=1e-3)


def test_best_momentum_against_a_dense_grid():
    for steps, batch_size, distance in [
        *itertools.product([1, 10**6], [1, 4096], [1e-3, 10.0]),
        (10, 32, 0.3),
        (1000, 32, 0.3),
    ]:
        best = diagnostics.best_momentum(steps, batch_size, distance)
        lowest = diagnostics.expected_error(best, steps, batch_size, distance)
        others = [
            diagnostics.expected_error(1 - rate, steps, batch_size, distance) for rate in np.geomspace(1e-12, 1, 20_000)
        ]
        assert lowest <= min(others) * (1 + 1e-9), (steps, batch_size, distance)
        assert diagnostics.best_momentum(steps, batch_size, 0.0) == 1.0


NAN = float("nan")
REFUSED = {
    "momentum": Refused(
        lambda: diagnostics.initial_weight(1.5, 3), ValueError, "momentum", "is 1.5", "a number in [0, 1]"
    ),
    "momentum traced": Refused(
        jitted(diagnostics.half_life, momentum=0.9), TypeError, "momentum", "is traced", "such as 0.99, bound before"
    ),
    "steps": Refused(lambda: diagnostics.initial_weight(0.5, -1), ValueError, "steps", "is -1", "an int of at least 0"),
    "steps a float": Refused(
        lambda: diagnostics.average_weights(0.5, 1.5), TypeError, "steps", "is 1.5", "an int of at"
    ),
    "no steps": Refused(lambda: diagnostics.best_momentum(0, 32), ValueError, "steps", "is 0", "an int of at least 1"),
    "steps of a schedule": Refused(
        lambda: diagnostics.effective_batches(jbn.momentum.cumulative()),
        TypeError,
        "steps",
        "is None",
        "give the number of updates, an int",
    ),
    "batch size": Refused(
        lambda: diagnostics.expected_error(0.5, 1, 0), ValueError, "batch_size", "is 0", "an int of at least 1"
    ),
    "one unbiased value": Refused(
        lambda: diagnostics.expected_variance(0.95, 40, 1, running_var="unbiased"),
        ValueError,
        "batch_size",
        "is 1",
        "expected an int of at least 2",
    ),
    "distance": Refused(
        lambda: diagnostics.best_momentum(1, 1, NAN), ValueError, "distance", "is nan", "a finite number"
    ),
    "distance a text": Refused(
        lambda: diagnostics.best_momentum(1, 1, "far"), TypeError, "distance", "is 'far'", "a number of at least 0"
    ),
    "rule": Refused(
        lambda: diagnostics.expected_variance(1, 1, 2, running_var=3), ValueError, "running_var", "is 3", "'biased'"
    ),
}


def test_errors_name_the_argument_and_say_how_to_mend_it():
    assert_refused(REFUSED)
