"""Complex input: the mean is complex, and the variance is the mean of |x - mean|**2."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from support.refusals import Refused, assert_refused
from support.tolerances import assert_close

import jbn

FEATURES = 3


def drawn(rng, *shape, mean=0.0):
    return (rng.normal(size=shape) + 1j * rng.normal(size=shape) * 2 + mean).astype(np.complex64)


def split(array):
    array = np.asarray(array)
    return np.stack([array.real, array.imag])


def formula(x, mask=None, epsilon=1e-5):
    """Normalized x and its moments in complex128, reduced over all axes except the last."""
    x = np.asarray(x, np.complex128)
    weight = np.ones(x.shape) if mask is None else np.broadcast_to(mask, x.shape).astype(float)
    axes = tuple(range(x.ndim - 1))
    count = weight.sum(axes)
    mean = (weight * x).sum(axes) / count
    var = (weight * np.abs(x - mean) ** 2).sum(axes) / count
    return (x - mean) / np.sqrt(var + epsilon) * weight, jbn.Moments(mean, var, count)


def assert_complex_close(actual, expected, **bounds):
    assert_close(split(actual), split(expected), **bounds)


def modulus_relu(y):
    """A relu of the modulus, which keeps the phase."""
    size = jnp.abs(y)
    return y * (jax.nn.relu(size - 0.5) / (size + 1e-3)).astype(y.dtype)


@pytest.mark.parametrize("mean", [0.0, 1e4 - 3e4j])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_output_and_state_are_those_of_the_formula(rng, masked, mean):
    x = drawn(rng, 16, 5, FEATURES, mean=mean)
    mask = rng.random((16, 5, 1)) < 0.7 if masked else None
    params = jbn.Params(drawn(rng, FEATURES), drawn(rng, FEATURES))
    _, state = jbn.init(FEATURES, jnp.complex64)
    out, new = jbn.batch_norm(params, state, x, True, momentum=0.75, running_var="total", mask=mask)
    xhat, moments = formula(x, mask)
    valid = 1 if mask is None else mask
    assert_complex_close(out, (xhat * params.scale + params.bias) * valid)
    assert_complex_close(new.mean, 0.25 * moments.mean)
    assert_close(new.var, 0.75 + 0.25 * moments.var + 0.75 * 0.25 * np.abs(moments.mean) ** 2)
    assert [leaf.dtype for leaf in new] == [jnp.complex64, jnp.float32, jnp.float32]
    mean, var = (np.asarray(leaf) for leaf in new[:2])
    expected = (x - mean) / np.sqrt(var + 1e-5) * params.scale + params.bias
    assert_complex_close(jbn.normalize(params, new, x), expected)


@pytest.mark.parametrize("options", [{}, {"ghost_batch_size": 4}, {"axis_name": "lanes"}], ids=str)
def test_moments_of_parts_are_those_of_the_whole(rng, options):
    x = drawn(rng, 2, 8, FEATURES, mean=100j)
    start = jbn.init(FEATURES, jnp.complex64)
    step = functools.partial(jbn.batch_norm, *start, train=True, momentum=0.0, **options)
    if "axis_name" in options:
        _, state = jax.vmap(lambda x: step(x=x), axis_name="lanes")(x)
        state = jax.tree.map(lambda leaf: leaf[0], state)
    else:
        _, state = step(x=x.reshape(16, FEATURES))
    _, moments = formula(x)
    assert_complex_close(state.mean, moments.mean)
    assert_close(state.var, moments.var)
    merged = jbn.merge(*(jbn.moments(part) for part in x))
    assert_complex_close(merged.mean, moments.mean)
    assert_close(merged.var, moments.var)


def test_calibration_and_diagnostics_take_complex_statistics(rng):
    x = drawn(rng, 2, 8, FEATURES, mean=3j)
    params, start = jbn.init(FEATURES, jnp.complex64)

    def step(state, x):
        return jbn.batch_norm(params, state, x, True)[1]

    found = jbn.calibrate(step, start, x)
    _, moments = formula(x)
    assert_complex_close(found.mean, moments.mean)
    assert_close(found.var, moments.var)
    merged = jbn.merge_states(*(jbn.calibrate(step, start, [part]) for part in x))
    assert_complex_close(merged.mean, moments.mean)
    assert_close(merged.var, moments.var)
    (row,) = jbn.diagnostics.health(found, found).rows
    assert not jbn.diagnostics.is_faulty(row)
    assert all(error == 0 for _, _, error, *_ in jbn.diagnostics.compare(found, found).rows)


def plain(scale, bias, x, shortcut, activation):
    """The formula in jax.numpy, for automatic differentiation."""
    axes = tuple(range(x.ndim - 1))
    mean = jnp.mean(x, axes)
    var = jnp.mean(jnp.real((x - mean) * jnp.conj(x - mean)), axes)
    return activation((x - mean) / jnp.sqrt(var + 1e-5).astype(x.dtype) * scale + bias + shortcut)


@pytest.mark.standard_promotion
@pytest.mark.parametrize("activation", [None, modulus_relu], ids=["plain", "activation"])
@pytest.mark.parametrize("kind", ["complex", "real"])
def test_derivatives_are_those_of_the_formula(rng, x64, kind, activation):
    """Forward and reverse mode in complex128, with complex scale and bias, or real ones as in Flax."""
    x, shortcut, x_t, weight = (drawn(rng, 6, FEATURES).astype(np.complex128) for _ in range(4))
    scale, bias = (drawn(rng, FEATURES).astype(np.complex128) for _ in range(2))
    scale, bias = (scale, bias) if kind == "complex" else (scale.real, bias.real)
    _, state = jbn.init(FEATURES, jnp.complex128)

    def ours(scale, bias, x, shortcut):
        options = {"shortcut": shortcut, "activation": activation}
        return jbn.batch_norm(jbn.Params(scale, bias), state, x, True, **options)[0]

    def theirs(scale, bias, x, shortcut):
        return plain(scale, bias, x, shortcut, activation or (lambda y: y))

    def loss(function, *arguments):
        return jnp.sum(jnp.real(function(*arguments) * weight) ** 3)

    primals, tangents = (scale, bias, x, shortcut), (scale, bias, x_t, x_t)
    for actual, expected in zip(*(jax.jvp(one, primals, tangents) for one in (ours, theirs)), strict=True):
        assert_complex_close(actual, expected, dtype="float64", condition=16)
    both = (jax.grad(functools.partial(loss, one), argnums=(0, 1, 2, 3))(*primals) for one in (ours, theirs))
    for actual, expected in zip(*both, strict=True):
        assert actual.dtype == expected.dtype
        assert_complex_close(actual, expected, dtype="float64", condition=64)


@pytest.mark.standard_promotion
@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.complex64])
def test_modules_give_what_flax_gives_and_their_statistics_keep_their_dtypes(rng, param_dtype):
    x = drawn(rng, 8, 4, FEATURES, mean=1 + 2j)
    ours, flaxs = (
        module(use_running_average=False, param_dtype=param_dtype) for module in (jbn.linen.BatchNorm, nn.BatchNorm)
    )
    variables, theirs = (norm.init(jax.random.key(0), x) for norm in (ours, flaxs))
    structure = jax.tree.map(lambda leaf: leaf.dtype, variables)
    for _ in range(2):
        out, updated = ours.apply(variables, x, mutable=["batch_stats"])
        expected, flaxs_updated = flaxs.apply(theirs, x, mutable=["batch_stats"])
        variables, theirs = {**variables, **updated}, {**theirs, **flaxs_updated}
        assert out.dtype == expected.dtype
        assert_complex_close(out, expected)
        jax.tree.map(assert_complex_close, variables["batch_stats"], theirs["batch_stats"])
    assert jax.tree.map(lambda leaf: leaf.dtype, variables) == structure
    norm = jbn.nnx.BatchNorm(FEATURES, dtype=jnp.complex64, param_dtype=param_dtype, rngs=nnx.Rngs(0))
    assert_complex_close(norm(x), expected)
    assert norm.mean[...].dtype == jnp.complex64


def call(x=None, init_dtype=jnp.complex64, function=jbn.batch_norm, **options):
    x = np.ones((4, FEATURES), np.complex64) if x is None else x
    return function(*jbn.init(FEATURES, init_dtype), x, True, **options)


REAL = np.ones((4, FEATURES), np.float32)
REFUSED = {
    "real statistics": Refused(
        lambda: call(init_dtype=jnp.float32), TypeError, "state.mean", "float32", "jbn.init(features, jnp.complex64)"
    ),
    "complex statistics": Refused(
        lambda: call(x=REAL),
        TypeError,
        "state.mean",
        "complex64",
        "a float dtype. Create it with jbn.init(features, jnp.float32)",
    ),
    "complex scale": Refused(
        lambda: jbn.batch_norm(jbn.init(FEATURES, jnp.complex64)[0], jbn.init(FEATURES)[1], REAL, True),
        TypeError,
        "params.scale",
        "complex64",
        "expected a float dtype",
    ),
    "a real result": Refused(
        lambda: call(dtype=jnp.float32), TypeError, "dtype", "is float32, but x has complex64", "one of complex64"
    ),
    "a real shortcut": Refused(
        lambda: call(shortcut=REAL), TypeError, "shortcut", "has dtype float32", "expected one of complex64"
    ),
    "complex variance": Refused(
        lambda: jbn.update(
            jbn.init(FEATURES, jnp.complex64)[1],
            jbn.Moments(*(jnp.ones(FEATURES, kind) for kind in ("complex64", "complex64", "float32"))),
        ),
        TypeError,
        "moments.var",
        "has dtype complex64",
        "expected a float dtype",
    ),
    "batch renorm": Refused(
        lambda: call(function=jbn.batch_renorm), TypeError, "x", "has dtype complex64", "jbn.batch_norm takes complex"
    ),
    "a real module": Refused(
        lambda: jbn.nnx.BatchNorm(FEATURES, rngs=nnx.Rngs(0))(np.ones((4, FEATURES), np.complex64)),
        TypeError,
        "mean",
        "has dtype float32, but x has dtype complex64",
        "For complex x, make an NNX module with dtype=jnp.complex64",
    ),
    "Flax's start": Refused(
        lambda: jbn.linen.BatchNorm(False).apply(
            jbn.linen.BatchNorm(False).init(jax.random.key(0), REAL), REAL.astype(np.complex64), mutable=["batch_stats"]
        ),
        TypeError,
        "mean",
        "has dtype float32, but x has dtype complex64",
        "mean.astype(jnp.complex64)",
    ),
}


@pytest.mark.standard_promotion
def test_complex_and_real_do_not_mix():
    assert_refused(REFUSED)
