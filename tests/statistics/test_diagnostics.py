"""The laws of the moving average against Monte Carlo through jbn's own update, and the health of planted faults."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import jbn
from jbn import diagnostics

REPLICAS = 8192
MEAN, SD = 3.0, 2.0
LAWS = {
    "slow": (0.99, 60, 4),
    "fast": (0.8, 60, 4),
    "few": (0.9, 3, 2),
    "one value": (0.95, 40, 1),
    "warmup": (jbn.momentum.warmup(0.9), 40, 4),
    "debiased": (jbn.momentum.debiased(0.95), 25, 4),
    "cumulative": (jbn.momentum.cumulative(), 20, 8),
}


@functools.lru_cache
def running(case, running_var, distance=1.5, start_var=0.5):
    """Mean and variance of many replicas, a feature each, in units of the population's standard deviation."""
    momentum, steps, batch_size = LAWS[case]
    x = np.random.default_rng(7).normal(MEAN, SD, (steps, batch_size, REPLICAS)).astype(np.float32)
    start = jbn.State(
        jnp.full(REPLICAS, MEAN + distance * SD), jnp.full(REPLICAS, start_var * SD**2), jnp.zeros((), jnp.int32)
    )

    def step(state, x):
        return jbn.update(state, jbn.moments(x), momentum=momentum, running_var=running_var), None

    state, _ = jax.jit(lambda start, x: jax.lax.scan(step, start, x))(start, x)
    assert int(state.count) == steps
    mean, var = (np.asarray(leaf, np.float64) for leaf in state[:2])
    return (mean - MEAN) / SD, var / SD**2


def assert_expected(samples, expected, rounding=1e-5):
    """The mean of the samples within 4 standard errors."""
    assert len(samples) >= 4000
    assert abs(samples.mean() - expected) <= 4 * samples.std() / math.sqrt(len(samples)) + rounding


@pytest.mark.parametrize("case", LAWS)
def test_error_of_the_mean(case):
    mean, _ = running(case, "biased")
    assert_expected(mean**2, diagnostics.expected_error(*LAWS[case], distance=1.5))
    assert_expected(mean, 1.5 * diagnostics.initial_weight(*LAWS[case][:2]))


@pytest.mark.parametrize("case", LAWS)
def test_effective_batches_is_the_noise_of_so_many(case):
    momentum, steps, batch_size = LAWS[case]
    mean, _ = running(case, "biased")
    noise = mean - 1.5 * diagnostics.initial_weight(momentum, steps)
    gathered = 1 - diagnostics.initial_weight(momentum, steps)
    effective = diagnostics.effective_batches(momentum, steps)
    assert_expected(noise**2, gathered**2 / (effective * batch_size))


@pytest.mark.parametrize("running_var", ["biased", "unbiased", "total"])
@pytest.mark.parametrize("case", LAWS)
def test_bias_and_spread_of_the_variance(case, running_var):
    momentum, steps, batch_size = LAWS[case]
    if running_var == "unbiased" and batch_size == 1:
        with pytest.raises(ValueError, match="`batch_size` is 1: expected an int of at least 2"):
            diagnostics.expected_variance(momentum, steps, batch_size, running_var=running_var)
        return
    _, var = running(case, running_var)
    law = diagnostics.expected_variance(
        momentum, steps, batch_size, running_var=running_var, distance=1.5, start_var=0.5
    )
    assert_expected(var - 1, law.bias)
    assert_expected((var - 1 - law.bias) ** 2, law.spread**2)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("steps", [0, 1, 7, 500])
def test_closed_forms_are_the_sums(momentum, steps):
    weights = diagnostics.average_weights(momentum, steps)
    np.testing.assert_allclose(weights.start + weights.batches.sum(), 1, rtol=1e-12)
    np.testing.assert_allclose(diagnostics.initial_weight(momentum, steps), weights.start, rtol=1e-12)
    squares = (weights.batches**2).sum()
    effective = weights.batches.sum() ** 2 / squares if squares else 0
    np.testing.assert_allclose(diagnostics.effective_batches(momentum, steps), effective, rtol=1e-10)
    np.testing.assert_allclose(
        diagnostics.expected_error(momentum, steps, 4, 2.0), 4 * weights.start**2 + squares / 4, rtol=1e-10
    )


def test_weights_are_those_of_the_update():
    schedule = jbn.momentum.warmup(0.7)
    weights = diagnostics.average_weights(schedule, 9)
    value = np.eye(10)[0]
    for t in range(9):
        kept = float(schedule(t))
        value = kept * value + (1 - kept) * np.eye(10)[t + 1]
    np.testing.assert_allclose([weights.start, *weights.batches], value, rtol=1e-6, atol=1e-12)


def test_limits():
    assert diagnostics.half_life(0.0) == 0
    assert diagnostics.half_life(1.0) == math.inf
    np.testing.assert_allclose(0.97 ** diagnostics.half_life(0.97), 0.5)
    np.testing.assert_allclose(diagnostics.effective_batches(0.99), diagnostics.effective_batches(0.99, 10_000))
    assert diagnostics.effective_batches(1.0) == 0
    np.testing.assert_allclose(diagnostics.effective_batches(1 - 1e-12, 50), 50, rtol=1e-3)


@pytest.mark.parametrize("steps", [1, 10, 1000, 10**6])
@pytest.mark.parametrize("batch_size", [1, 32, 4096])
@pytest.mark.parametrize("distance", [1e-3, 0.3, 10.0])
def test_best_momentum_against_a_dense_grid(steps, batch_size, distance):
    best = diagnostics.best_momentum(steps, batch_size, distance)
    lowest = diagnostics.expected_error(best, steps, batch_size, distance)
    others = [
        diagnostics.expected_error(1 - rate, steps, batch_size, distance) for rate in np.geomspace(1e-12, 1, 20_000)
    ]
    assert lowest <= min(others) * (1 + 1e-9)
    assert diagnostics.best_momentum(steps, batch_size, 0.0) == 1.0


REFUSED = {
    "momentum": (lambda: diagnostics.initial_weight(1.5, 3), ValueError, "`momentum` is 1.5"),
    "steps": (lambda: diagnostics.initial_weight(0.5, -1), ValueError, "`steps` is -1: expected an int of at least 0"),
    "steps of a kind": (lambda: diagnostics.average_weights(0.5, 1.5), TypeError, "`steps` is 1.5"),
    "no steps": (lambda: diagnostics.best_momentum(0, 32), ValueError, "`steps` is 0: expected an int of at least 1"),
    "batch": (lambda: diagnostics.expected_error(0.5, 1, 0), ValueError, "`batch_size` is 0"),
    "distance": (lambda: diagnostics.expected_error(0.5, 1, 1, math.nan), ValueError, "`distance` is nan"),
    "distance of a kind": (lambda: diagnostics.best_momentum(1, 1, "far"), TypeError, "`distance` is 'far'"),
    "schedule": (lambda: diagnostics.effective_batches(jbn.momentum.cumulative()), TypeError, "`steps` is None"),
    "rule": (
        lambda: diagnostics.expected_variance(0.5, 1, 2, running_var="both"),
        ValueError,
        "`running_var` is 'both'",
    ),
    "other norms": (
        lambda: diagnostics.compare({"a": jbn.init(2)[1]}, {"b": jbn.init(2)[1]}),
        ValueError,
        "only one of them has 'a', 'b'",
    ),
    "other shapes": (lambda: diagnostics.compare(jbn.init(2)[1], jbn.init(3)[1]), ValueError, "expected one shape"),
    "nothing": (lambda: diagnostics.health({"a": 1}), ValueError, "`tree` holds no statistics"),
}


@pytest.mark.parametrize(("call", "kind", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals(call, kind, message):
    with pytest.raises(kind) as error:
        call()
    assert message in str(error.value)


def test_compare_says_what_inference_does(rng):
    """The output with the running statistics is ratio * right + shift, and the error its root mean square."""
    x = rng.normal(size=(4096, 3)) * [1, 2, 3] + [0, 5, -5]
    params, state = jbn.init(3)
    state = jbn.State(jnp.array([0.5, 0.0, -5.0]), jnp.array([1.0, 1.0, 36.0]), jnp.int32(9))
    population = jbn.State(*(jnp.float32(leaf) for leaf in (x.mean(0), x.var(0))), jnp.int32(9))
    table = diagnostics.compare({"norm": state}, {"norm": population})
    x = x.astype(np.float32)
    wrong, right = (np.asarray(jbn.normalize(params, each, x), np.float64) for each in (state, population))
    errors = [row[2] for row in table.rows]
    assert errors == sorted(errors, reverse=True)
    for norm, channel, error, shift, ratio, *_ in table.rows:
        assert norm == "norm"
        np.testing.assert_allclose(wrong[:, channel], ratio * right[:, channel] + shift, atol=1e-4)
        root_mean_square = np.sqrt(np.mean((wrong[:, channel] - right[:, channel]) ** 2))
        np.testing.assert_allclose(error, root_mean_square, rtol=1e-3)
    broken = state._replace(var=jnp.array([jnp.nan, -jnp.inf, 1.0]))
    assert [row[2] for row in diagnostics.compare(broken, population).rows[:2]] == [math.inf, math.inf]


def test_features_of_several_axes():
    _, state = jbn.init((2, 3))
    table = diagnostics.compare(state, state)
    assert [row[1] for row in table.rows] == [(i, j) for i in range(2) for j in range(3)]
    assert "(1, 2)" in str(table)


def row_of(table, norm):
    (row,) = [dict(zip(table.columns, row, strict=True)) for row in table.rows if row[0] == norm]
    return row


def test_health_finds_each_planted_fault():
    good = jbn.State(jnp.full(3, 0.5), jnp.full(3, 2.0), jnp.int32(50))
    tree = {
        "good": good,
        "nan": good._replace(mean=jnp.array([0.5, jnp.nan, jnp.inf])),
        "negative": good._replace(var=jnp.array([2.0, -1.0, 2.0])),
        "unset": jbn.unset(good),
        "dead": good._replace(var=jnp.array([0.0, 1e-12, 2.0])),
        "behind": good._replace(count=jnp.int32(20)),
        "untouched": jbn.init(3)[1]._replace(count=jnp.int32(50)),
        "no var": {"mean": good.mean, "count": good.count},
        "no count": {"mean": good.mean, "var": good.var},
    }
    table = diagnostics.health(tree)
    faults = {
        "nan": {"not finite": 2},
        "negative": {"not finite": 1},
        "unset": {"unset": 3, "stale": "0 of 50 updates"},
        "dead": {"dead": 2},
        "behind": {"stale": "20 of 50 updates"},
        "untouched": {"stale": "never updated"},
        "no var": {"missing": "var"},
        "no count": {"missing": "count"},
    }
    for norm in tree:
        found = {fault: value for fault, value in row_of(table, norm).items() if fault in FAULTS and value}
        assert found == faults.get(norm, {}), norm
    population = jax.tree.map(lambda leaf: leaf, {"good": good._replace(mean=jnp.array([0.5, 5.0, 0.5]))})
    assert row_of(diagnostics.health({"good": good}, population), "good")["far"] == 1
    started = diagnostics.health({"good": good}, momentum=0.99)
    assert row_of(started, "good")["stale"] == "61% is still the start"
    assert row_of(diagnostics.health({"good": good}, momentum=0.5), "good")["stale"] is None


FAULTS = ("dead", "unset", "not finite", "far", "stale", "missing")


def test_health_of_flax_models(rng):
    x = rng.normal(size=(8, 3)).astype(np.float32)

    class Model(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.LayerNorm()(jbn.linen.BatchNorm(use_running_average=False)(jbn.linen.BatchNorm(False)(x)))

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        variables = Model().init(jax.random.key(0), x)
        stats = Model().apply(variables, x, mutable=["batch_stats"])[1]["batch_stats"]
    whole = diagnostics.health({"params": variables["params"], "batch_stats": stats})
    assert [row_of(whole, f"batch_stats/BatchNorm_{i}")["missing"] for i in range(2)] == [None, None]
    del stats["BatchNorm_1"]
    partial = diagnostics.health({"params": variables["params"], "batch_stats": stats})
    assert row_of(partial, "params/BatchNorm_1")["missing"] == "mean, var"
    model = nnx.Sequential(jbn.nnx.BatchNorm(3, momentum=jbn.momentum.warmup(0.9), rngs=nnx.Rngs(0)))
    model(x)
    (row,) = diagnostics.health(nnx.state(model)).rows
    assert row[:6] == ("layers/0", 3, 1, 0, 0, 0)


def test_tables_are_plain_data_and_print_well():
    table = diagnostics.compare(jbn.init(30)[1], jbn.init(30)[1])
    for row in table.rows:
        assert {type(value) for value in row} <= {str, int, float}
    lines = str(table).splitlines()
    assert len(lines) == 22
    assert lines[-1] == "... and 10 more"
    assert len({len(line) for line in lines[:-1]}) == 1
    assert table.text(rows=2).count("\n") == 3


def test_health_of_statistics_that_do_not_fit_each_other():
    table = diagnostics.health({"mean": jnp.zeros(3), "var": jnp.ones(2)})
    assert row_of(table, "")["not finite"] == 3
