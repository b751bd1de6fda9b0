"""The Linen module: Flax's variables, calls and dtypes, jbn's numbers, and its errors."""

import functools
import itertools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from support.refusals import Refused, assert_refused
from support.tolerances import assert_close

import jbn

KEY = jax.random.key(0)
MATRIX = np.ones((8, 3), np.float32)
SCHEDULE = jbn.momentum.cumulative()
OPTIONS = {
    "defaults": {},
    "first axis": {"axis": 1},
    "two axes": {"axis": (1, -1)},
    "no scale": {"use_scale": False},
    "no bias": {"use_bias": False},
    "neither": {"use_scale": False, "use_bias": False},
    "half-precision parameters": {"param_dtype": jnp.bfloat16},
    "drawn parameters": {"scale_init": nn.initializers.normal(), "bias_init": nn.initializers.normal()},
}


def images(rng, batch=6):
    return (rng.normal(size=(batch, 4, 3)) * 2 + 1).astype(np.float32)


def trained(norm, variables, x, **call):
    out, updated = norm.apply(variables, x, use_running_average=False, mutable=["batch_stats"], **call)
    return out, {**variables, **updated}


@pytest.mark.standard_promotion
def test_variables_are_those_of_flax(rng):
    x, different = images(rng), []
    for name, options in OPTIONS.items():
        ours, flaxs = (
            module(use_running_average=False, **options).init(KEY, x) for module in (jbn.linen.BatchNorm, nn.BatchNorm)
        )
        alike = jax.tree.map(lambda a, e: a.dtype == e.dtype and np.array_equal(a, e), ours, flaxs)
        different += [] if all(jax.tree.leaves(alike)) else [name]
    assert different == []


@pytest.mark.standard_promotion
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_steps_are_those_of_flax(rng, options):
    ours, flaxs = (
        jbn.linen.BatchNorm(momentum=0.8, **options),
        nn.BatchNorm(momentum=0.8, use_fast_variance=False, **options),
    )
    variables = flaxs.init(KEY, images(rng), use_running_average=False)
    for masked in (False, False, True, True):
        x, mask = images(rng), None
        if masked:
            mask = rng.random((6, 1, 1) if "axis" in options else (6, 4, 1)) < 0.6
        (out, ours_next), (expected, variables) = (trained(norm, variables, x, mask=mask) for norm in (ours, flaxs))
        valid = np.broadcast_to(True if mask is None else mask, x.shape)
        assert out.dtype == expected.dtype
        assert_close(np.where(valid, out, 0), np.where(valid, expected, 0))
        assert np.all(np.asarray(out)[~valid] == 0)
        for a, e in zip(jax.tree.leaves(ours_next), jax.tree.leaves(variables), strict=True):
            assert_close(a, e)
        a, e = (norm.apply(variables, x, use_running_average=True) for norm in (ours, flaxs))
        assert_close(a, e)


@pytest.mark.standard_promotion
def test_a_mask_that_only_flax_can_place_is_taken_as_flax_does(rng):
    """It is aligned with the last axes, as a mask of features; a mask that fits the examples masks examples."""
    x, norm = images(rng), jbn.linen.BatchNorm(momentum=0.0)
    variables = norm.init(KEY, x, use_running_average=False)
    for mask, whole in ((np.array([True, False, True]), (1, 1, 3)), (rng.random((6, 4)) < 0.6, (6, 4, 1))):
        out, _ = trained(norm, variables, x, mask=mask)
        np.testing.assert_array_equal(out, trained(norm, variables, x, mask=mask.reshape(whole))[0])


@pytest.mark.standard_promotion
def test_dtype_of_the_result_is_that_of_flax():
    """For every dtype of input, parameters and result, with and without parameters, in training and inference."""
    cases = itertools.product(
        ["float32", "bfloat16", "float16"],
        ["float32", "bfloat16"],
        [None, "float32", "bfloat16"],
        [True, False],
        [True, False],
    )

    def dtype_of(module, x_dtype, param_dtype, dtype, affine, average):
        norm = module(average, dtype=dtype, param_dtype=param_dtype, use_scale=affine, use_bias=affine)
        return jax.eval_shape(norm.init_with_output, KEY, jax.ShapeDtypeStruct((6, 3), x_dtype))[0].dtype

    assert [case for case in cases if dtype_of(jbn.linen.BatchNorm, *case) != dtype_of(nn.BatchNorm, *case)] == []


def test_options_reach_the_function(rng):
    x, call = images(rng), dict(mask=rng.random((6, 4)) < 0.7, shortcut=images(rng))
    options = dict(momentum=jbn.momentum.warmup(0.9), epsilon=1e-2, running_var="total", ghost_batch_size=3)
    shown = dict(activation=jax.nn.relu, dtype=jnp.float16)
    norm = jbn.linen.BatchNorm(**shown, **options)
    variables = jax.eval_shape(functools.partial(norm.init, use_running_average=False), KEY, x)
    assert jax.tree.structure(variables["batch_stats"]) == jax.tree.structure(jbn.init(3)[1]._asdict())
    start = {"params": jbn.init(3)[0]._asdict(), "batch_stats": jbn.init(3)[1]._asdict()}
    out, variables = jax.jit(functools.partial(trained, norm))(start, x, **call)
    norm_itself = jax.jit(functools.partial(jbn.batch_norm, train=True, **shown, **options))
    expected, state = norm_itself(*jbn.init(3), x=x, **call)
    np.testing.assert_array_equal(out, expected)
    jax.tree.map(assert_close, variables["batch_stats"], state._asdict())


@pytest.mark.parametrize("options", [{"momentum": SCHEDULE}, {"axis_name": "devices"}])
def test_initialization_does_not_update(rng, options):
    """It needs neither the mapped axis nor a batch size that is divisible by the ghost batch size."""
    norm = jbn.linen.BatchNorm(use_running_average=False, ghost_batch_size=4, **options)
    _, state = jbn.init(3)
    stored = norm.init(KEY, images(rng))["batch_stats"]
    assert set(stored) == ({"mean", "var", "count"} if "momentum" in options else {"mean", "var"})
    for name, value in stored.items():
        np.testing.assert_array_equal(value, getattr(state, name))


def test_initialization_on_one_example_without_a_batch_axis():
    norm = jbn.linen.BatchNorm(use_running_average=False, axis_name="batch")
    assert jax.eval_shape(norm.init, KEY, jnp.ones(3))["batch_stats"]["mean"].shape == (3,)


def test_a_schedule_goes_on_from_its_count(rng):
    norm = jbn.linen.BatchNorm(momentum=SCHEDULE)
    variables = norm.init(KEY, images(rng), use_running_average=False)
    batches = [images(rng) for _ in range(3)]
    for x in batches:
        _, variables = trained(norm, variables, x)
    np.testing.assert_array_equal(variables["batch_stats"]["count"], np.full(3, 3, np.float32))
    assert_close(variables["batch_stats"]["mean"], np.mean(batches, axis=(0, 1, 2), dtype=np.float64))


def test_statistics_without_a_count_serve_and_train_on_once_they_are_given_one(rng):
    x, norm = images(rng), jbn.linen.BatchNorm(momentum=SCHEDULE)
    variables = jbn.linen.BatchNorm(use_running_average=False).init(KEY, x)
    norm.apply(variables, x, use_running_average=True)
    norms, rest = jbn.convert.split(variables, "linen", count=10)
    _, variables = trained(norm, jbn.convert.join(norms, rest, "linen", with_count=True), x)
    assert_close(variables["batch_stats"]["mean"], x.mean((0, 1), dtype=np.float64) / 11)


@pytest.mark.standard_promotion
def test_statistics_in_half_precision_serve(rng):
    x, norm = images(rng), jbn.linen.BatchNorm(use_running_average=True)
    variables = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), norm.init(KEY, x))
    variables["batch_stats"]["mean"] = jnp.full(3, 1.5, jnp.bfloat16)
    assert_close(norm.apply(variables, x), (x - np.float64(1.5)) / np.sqrt(1 + 1e-5))


def test_statistics_that_may_not_change_are_refused_as_in_flax(rng):
    norm = jbn.linen.BatchNorm(use_running_average=False)
    variables = norm.init(KEY, images(rng))
    with pytest.raises(flax.errors.ModifyScopeVariableError):
        norm.apply(variables, images(rng))


def call(x=MATRIX, flag=None, **options):
    return jbn.linen.BatchNorm(**{"use_running_average": False, **options}).init(KEY, x, flag)


def applied(x=MATRIX, module=jbn.linen.BatchNorm, dtype=np.float32, count=None, **options):
    """Apply a norm to existing variables, without a count unless it is given."""
    statistics = {"mean": jnp.zeros(3, dtype), "var": jnp.ones(3, dtype)}
    statistics |= {} if count is None else {"count": count}
    variables = {"params": {"scale": np.ones(3), "bias": np.zeros(3)}, "batch_stats": statistics}
    return module(use_running_average=False, **options).apply(variables, x, mutable=["batch_stats"])


REFUSED = {
    "a number for a flag": Refused(
        lambda: call(use_running_average=1),
        TypeError,
        "use_running_average",
        "is 1",
        "True (running statistics) or False",
    ),
    "traced flag": Refused(
        lambda: jax.jit(lambda flag: call(use_running_average=None, flag=flag))(True),
        TypeError,
        "use_running_average",
        "is traced",
        "static_argnames='use_running",
    ),
    "axis": Refused(
        lambda: call(axis=3), ValueError, "axis", "3 is out of range for x of 2 dimensions", "expected -2 to 1"
    ),
    "integers": Refused(
        lambda: call(x=MATRIX.astype(np.int32)), TypeError, "x", "has dtype int32", "x.astype(jnp.float32)"
    ),
    "dtype": Refused(lambda: call(dtype=jnp.int32), TypeError, "dtype", "is int32", "expected one of float32, float64"),
    "dtype of parameters": Refused(
        lambda: call(param_dtype="foo"), TypeError, "param_dtype", "is 'foo'", "expected one of float32, float64"
    ),
    "features": Refused(
        lambda: applied(x=np.ones((8, 4), np.float32)),
        ValueError,
        "mean",
        "has shape (3,)",
        "expected (4,), the features of x of shape (8, 4)",
    ),
    "a schedule without a count": Refused(
        lambda: applied(momentum=SCHEDULE), ValueError, "batch_stats", "no `count`", "jbn.convert.split"
    ),
    "bounds without a count": Refused(
        lambda: applied(module=jbn.linen.BatchRenorm),
        ValueError,
        "batch_stats",
        "no `count`, which a schedule reads",
        "use numbers instead of schedules",
    ),
    "one count for all features": Refused(
        lambda: applied(momentum=SCHEDULE, count=jnp.int32(7)), ValueError, "count", "has shape ()", "jbn.upgrade(tree)"
    ),
    "half-precision statistics": Refused(
        lambda: applied(dtype=jnp.bfloat16), TypeError, "mean", "has dtype bfloat16", "cast only the parameters"
    ),
}


def test_errors_name_the_attribute_and_say_how_to_mend_it():
    assert_refused(REFUSED)
