"""The NNX module: Flax's variables, calls and dtypes, jbn's numbers, and its errors."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import reference
from support.nnx_norms import applied, arrays, assert_states_close, images, made
from support.refusals import Refused, assert_refused
from support.tolerances import assert_close

import jbn

MATRIX = np.ones((8, 3), np.float32)
SCHEDULE = jbn.momentum.cumulative()
OPTIONS = {
    "defaults": {},
    "first axis": {"axis": 1},
    "no scale": {"use_scale": False},
    "no bias": {"use_bias": False},
    "neither": {"use_scale": False, "use_bias": False},
    "half-precision parameters": {"param_dtype": jnp.bfloat16},
    "drawn parameters": {"scale_init": nnx.initializers.normal(), "bias_init": nnx.initializers.normal()},
    "metadata": {"scale_metadata": {"tag": "s"}, "bias_metadata": {"tag": "b"}},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_variables_are_those_of_flax(options):
    ours, flaxs = (nnx.state(made(module, **options)) for module in (jbn.nnx, nnx))
    # The structure includes the paths, Variable types and metadata.
    assert jax.tree.structure(ours) == jax.tree.structure(flaxs)
    for a, e in zip(jax.tree.leaves(ours), jax.tree.leaves(flaxs), strict=True):
        assert a.dtype == e.dtype
        np.testing.assert_array_equal(a, e)


@pytest.mark.standard_promotion
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_steps_are_those_of_flax(rng, options):
    ours = made(jbn.nnx, momentum=0.8, **options)
    flaxs = made(nnx, momentum=0.8, use_fast_variance=False, **options)
    for masked in (False, False, True, True):
        x, mask = images(rng), None
        if masked:
            mask = rng.random((6, 1, 3) if "axis" in options else (6, 3, 1)) < 0.6
        out, expected = ours(x, mask=mask), flaxs(x, mask=mask)
        valid = np.broadcast_to(True if mask is None else mask, x.shape)
        assert out.dtype == expected.dtype
        assert_close(np.where(valid, out, 0), np.where(valid, expected, 0))
        assert np.all(np.asarray(out)[~valid] == 0)
        assert_states_close(arrays(ours), arrays(flaxs))
        assert_close(ours(x, use_running_average=True), flaxs(x, use_running_average=True))


@pytest.mark.standard_promotion
def test_dtype_of_the_result_is_that_of_flax():
    """For every dtype of input, parameters and result, with and without parameters, in training and inference."""
    cases = itertools.product(
        map(jnp.dtype, ["float32", "bfloat16", "float16"]),
        map(jnp.dtype, ["float32", "bfloat16"]),
        [None, jnp.dtype("float32"), jnp.dtype("bfloat16")],
        [True, False],
        [True, False],
    )

    def dtype_of(module, x_dtype, param_dtype, dtype, affine, average):
        options = dict(use_running_average=average, dtype=dtype, param_dtype=param_dtype)
        call = functools.partial(made, module, use_scale=affine, use_bias=affine, **options)
        return nnx.eval_shape(lambda x: call()(x), jax.ShapeDtypeStruct((6, 3), x_dtype)).dtype

    assert [case for case in cases if dtype_of(jbn.nnx, *case) != dtype_of(nnx, *case)] == []


def test_inference_in_half_precision_keeps_the_statistics_in_float32(rng):
    """Flax casts them to `dtype`, and then half a unit of a mean of 100 is a quarter of a standard deviation."""
    x = images(rng) / 2 + 100
    norm = made(jbn.nnx, dtype=jnp.bfloat16)
    norm.mean[...] = jnp.full(3, 100.3)
    expected = reference.inference(x, norm.mean[...], np.ones(3), np.ones(3), np.zeros(3))
    np.testing.assert_allclose(np.asarray(norm(x, use_running_average=True), np.float64), expected, atol=0.02)


def test_options_reach_the_function(rng):
    x, call = images(rng), dict(mask=rng.random((6, 3)) < 0.7, shortcut=images(rng))
    options = dict(momentum=jbn.momentum.warmup(0.9), epsilon=1e-2, running_var="total", ghost_batch_size=3)
    shown = dict(activation=jax.nn.relu, dtype=jnp.float16)
    norm = made(jbn.nnx, **shown, **options)
    out = nnx.jit(lambda norm, x: norm(x, **call))(norm, x)
    expected, state = jax.jit(lambda x: jbn.batch_norm(*jbn.init(3), x, True, **call, **shown, **options))(x)
    np.testing.assert_array_equal(out, expected)
    for name, value in state._asdict().items():
        assert_close(getattr(norm, name)[...], value)


def test_features_on_two_axes(rng):
    x = rng.normal(size=(6, 2, 5, 3)).astype(np.float32)
    norm = jbn.nnx.BatchNorm((2, 3), axis=(-1, 1), rngs=nnx.Rngs(0))
    assert_close(applied(norm, x), reference.batch_norm(x, feature_axis=(1, 3)).out)
    assert norm.mean[...].shape == (2, 3)


def test_train_and_eval_switch(rng):
    x, norm = images(rng), made(jbn.nnx)
    norm.eval()
    np.testing.assert_array_equal(norm(x), norm(x, use_running_average=True))
    np.testing.assert_array_equal(norm.mean[...], np.zeros(3))
    norm.train()
    norm(x)
    assert np.all(norm.mean[...] != 0)
    norm.set_view(use_running_average=True)
    norm.set_view()
    assert norm.use_running_average is True


def test_a_schedule_counts(rng):
    norm = made(jbn.nnx, momentum=SCHEDULE)
    batches = [images(rng) for _ in range(3)]
    for x in batches:
        norm(x)
    np.testing.assert_array_equal(norm.count[...], np.full(3, 3, np.float32))
    assert_close(norm.mean[...], np.mean(batches, axis=(0, 1, 2), dtype=np.float64))
    assert made(jbn.nnx).count is None


def call(x=MATRIX, flag=None, mask=None, **options):
    return made(jbn.nnx, **options)(x, flag, mask=mask)


def with_a_schedule_set_later():
    norm = made(jbn.nnx)
    norm.momentum = SCHEDULE
    return norm(MATRIX)


def with_one_count():
    norm = made(jbn.nnx, momentum=SCHEDULE)
    norm.count.set_value(jnp.int32(7))
    return norm(MATRIX)


def vector_of_2(key, shape, dtype):
    return jnp.ones(2, dtype)


REFUSED = {
    "no flag": Refused(
        lambda: call(use_running_average=None),
        ValueError,
        "use_running_average",
        "given neither at construction nor",
        "give True or False",
    ),
    "traced flag": Refused(
        lambda: jax.jit(lambda flag: call(flag=flag))(True),
        TypeError,
        "use_running_average",
        "is traced",
        "static_argnames='use_running",
    ),
    "mask": Refused(
        lambda: call(mask=np.ones(5, bool)), ValueError, "mask", "has shape (5,)", "expected (8,) or (8, 3)"
    ),
    "momentum": Refused(lambda: call(momentum=2), ValueError, "momentum", "is 2.0", "expected a number in [0, 1]"),
    "dtype": Refused(lambda: call(dtype=jnp.int32), TypeError, "dtype", "is int32", "expected one of float32, float64"),
    "dtype of parameters": Refused(
        lambda: call(param_dtype="foo"), TypeError, "param_dtype", "is 'foo'", "expected one of float32, float64"
    ),
    "unbound axis": Refused(
        lambda: call(axis_name="d"), NameError, "axis_name", "is 'd'", "call inside jax.shard_map, jax.vmap"
    ),
    "features": Refused(
        lambda: call(x=np.ones((3, 4), np.float32)),
        ValueError,
        "x",
        "has features (4,)",
        "expected features (3,). With axis=0, x fits",
    ),
    "initializer": Refused(
        lambda: call(bias_init=vector_of_2),
        ValueError,
        "bias",
        "has shape (2,)",
        "expected (3,), the features of x of shape (8, 3) on `axis` -1",
    ),
    "number of features": Refused(
        lambda: call(num_features=5.0), TypeError, "num_features", "is 5.0", "an int or a sequence of ints"
    ),
    "a key for rngs": Refused(
        lambda: call(rngs=jax.random.key(0)),
        TypeError,
        "rngs",
        "is a PRNGKeyArray without a stream `params`",
        "expected nnx.Rngs(0)",
    ),
    "rngs of dropout": Refused(
        lambda: call(rngs=nnx.Rngs(dropout=0)), TypeError, "rngs", "a Rngs without a stream `params`", "nnx.Rngs(0)"
    ),
    "one count for all features": Refused(
        with_one_count, ValueError, "count", "has shape ()", "jbn.upgrade(tree) gives each feature"
    ),
    "a schedule set later": Refused(
        with_a_schedule_set_later, ValueError, "momentum", "has no `count`", "Give the schedule at construction"
    ),
}


def test_errors_name_the_argument_and_say_how_to_mend_it():
    assert_refused(REFUSED)
