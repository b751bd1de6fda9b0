"""The training output and its derivatives in every mode."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals
from jax.test_util import check_grads
from support import reference
from support.inputs import LAYOUTS, LOW_PRECISION, ill_conditioned
from support.tolerances import assert_close, assert_rounded

import jbn

OPTIONS = {
    "plain": {},
    "masked": {"mask": np.array([True, False, True, True, True, False, True, True])},
    "relu": {"activation": jax.nn.relu},
    "gelu, masked": {
        "activation": jax.nn.gelu,
        "mask": np.array([True, True, True, True, True, False, True, True]),
    },
    "ghost": {"ghost_batch_size": 4},
    "ghost, tanh, masked": {
        "ghost_batch_size": 4,
        "activation": jnp.tanh,
        "mask": np.array([True, False, True, True, True, True, True, False]),
    },
}


@functools.partial(jax.jit, static_argnames=("feature_axis", "activation"))
def forward_and_backward(params, state, x, cotangent, mask=None, feature_axis=-1, activation=None):
    def forward(params, x):
        return jbn.batch_norm(
            params, state, x, True, momentum=0.0, mask=mask, feature_axis=feature_axis, activation=activation
        )

    out, backward, new_state = jax.vjp(forward, params, x, has_aux=True)
    return out, new_state, *backward(cotangent)


@pytest.mark.parametrize(("shape", "feature_axis"), LAYOUTS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_forward_and_backward_of_every_layout(x64, rng, shape, feature_axis, masked, dtype):
    x, cotangent = (rng.normal(size=shape).astype(dtype) * 2 + 3 for _ in range(2))
    feature = reference.feature_axes(feature_axis, x.ndim)
    features = tuple(shape[axis] for axis in feature)
    mask = rng.random([n for axis, n in enumerate(shape) if axis not in feature]) < 0.7 if masked else None
    params = jbn.Params(*(rng.normal(size=features).astype(dtype) for _ in range(2)))
    _, state = jbn.init(features, dtype)
    expected = reference.batch_norm(x, *params, cotangent, feature_axis=feature_axis, mask=mask)
    out, new_state, gradients, dx = forward_and_backward(params, state, x, cotangent, mask, feature_axis=feature_axis)
    assert out.dtype == dx.dtype == dtype
    assert_close(new_state.mean, expected.mean, dtype, scale=10)
    assert_close(new_state.var, expected.var, dtype)
    assert_close(out, expected.out, dtype, scale=10)
    assert_close(dx, expected.dx, dtype, scale=10)
    assert_close(gradients.scale, expected.dscale, dtype, scale=np.abs(cotangent).sum())
    assert_close(gradients.bias, expected.dbias, dtype, scale=np.abs(cotangent).sum())


@pytest.mark.parametrize("case", ["plain", "first row far", "second row far", "masked", "masked, first valid row far"])
@pytest.mark.parametrize("ratio", [0, 1, 1e2, 1e3, 1e4, 1e5])
@pytest.mark.parametrize("rows", [1024, 2**18])
def test_output_and_gradient_keep_their_digits_at_any_mean(rng, rows, ratio, case):
    x, mask = ill_conditioned(rng, rows, ratio, case)
    cotangent = rng.normal(size=x.shape).astype(np.float32)
    expected = reference.batch_norm(x, cotangent=cotangent, mask=mask)
    out, state, _, dx = forward_and_backward(*jbn.init(4), x, cotangent, mask)
    np.testing.assert_allclose(state.var, expected.var, rtol=1e-5)
    np.testing.assert_allclose(out, expected.out, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx, expected.dx, rtol=0, atol=1e-5 * np.max(np.abs(expected.dx)))


@pytest.mark.parametrize("value", [1e4, 1e7, 0.1, -3e-5])
@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_constant_channel_gives_exactly_the_bias(value, rows):
    params = jbn.Params(scale=jnp.array([2.0, -3.0]), bias=jnp.array([0.7, -0.1]))
    x = jnp.full((rows, 2), value)
    out, state = jax.jit(functools.partial(jbn.batch_norm, train=True, momentum=0.0))(params, jbn.init(2)[1], x)
    np.testing.assert_array_equal(out, np.broadcast_to(params.bias, (rows, 2)))
    np.testing.assert_array_equal(state.var, [0, 0])
    np.testing.assert_array_equal(state.mean, np.full(2, value, np.float32))


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@pytest.mark.parametrize("activation", [None, jax.nn.relu])
def test_half_precision_is_off_by_one_rounding(rng, dtype, activation):
    x = jnp.asarray(rng.normal(size=(512, 3)) * 4 + 50).astype(dtype)
    cotangent = jnp.asarray(rng.normal(size=(512, 3))).astype(dtype)
    params = jbn.Params(scale=jnp.array([1.5, -0.5, 2.0]), bias=jnp.array([0.1, 0.2, -0.3]))
    exact_x, exact_cotangent = (np.asarray(a.astype(jnp.float32), np.float64) for a in (x, cotangent))
    expected = reference.batch_norm(exact_x, *params)
    if activation is not None:
        exact_cotangent = exact_cotangent * (expected.out > 0)
    expected = reference.batch_norm(exact_x, *params, exact_cotangent)
    out, state, _, dx = forward_and_backward(params, jbn.init(3)[1], x, cotangent, activation=activation)
    assert out.dtype == dx.dtype == dtype
    assert_rounded(out, expected.out if activation is None else np.maximum(expected.out, 0), dtype)
    assert_rounded(dx, expected.dx, dtype)
    np.testing.assert_allclose(state.var, expected.var, rtol=1e-5)


def test_large_float16_values_stay_finite(rng):
    x = jnp.asarray(rng.choice([60000.0, 59904.0, -60000.0], size=(64, 2))).astype(jnp.float16)
    expected = reference.batch_norm(np.asarray(x, np.float64))
    out, state, _, dx = forward_and_backward(*jbn.init(2), x, jnp.ones_like(x))
    assert_rounded(out, expected.out, "float16")
    assert bool(jnp.all(jnp.isfinite(dx)))
    np.testing.assert_allclose(state.var, expected.var, rtol=1e-5)


def test_result_dtype_is_free():
    x = jnp.linspace(-1, 1, 12).reshape(6, 2)
    for train in (True, False):
        out, state = jbn.batch_norm(*jbn.init(2), x, train, dtype=jnp.bfloat16)
        assert out.dtype == jnp.bfloat16
        assert state.mean.dtype == jnp.float32


@pytest.fixture
def small(x64, rng):
    params = jbn.Params(scale=jnp.asarray(rng.normal(size=3)), bias=jnp.asarray(rng.normal(size=3)))
    return params, jbn.init(3, jnp.float64)[1], jnp.asarray(rng.normal(size=(8, 3)) * 2 + 1)


def pair(state, options):
    """Ours and the plain formula, as functions of params and x to something curved."""
    plain_options = {key: value for key, value in options.items() if key != "ghost_batch_size"}
    groups = 2 if "ghost_batch_size" in options else 1

    def ours(params, x):
        return jnp.sin(2 * jbn.batch_norm(params, state, x, True, **options)[0])

    def plain(params, x):
        return jnp.sin(2 * reference.plain(params, x, groups=groups, **plain_options))

    return ours, plain


def scalar(function):
    return lambda params, x: jnp.sum(function(params, x) * jnp.cos(jnp.arange(24.0).reshape(8, 3)))


MODES = {
    "value": lambda f: f,
    "grad": lambda f: jax.grad(scalar(f), argnums=(0, 1)),
    "jvp": lambda f: lambda p, x: jax.jvp(f, (p, x), (jax.tree.map(jnp.cos, p), jnp.sin(x))),
    "jvp of params": lambda f: lambda p, x: jax.jvp(lambda p: f(p, x), (p,), (jax.tree.map(jnp.cos, p),)),
    "jacfwd": lambda f: jax.jacfwd(f, argnums=(0, 1)),
    "hessian": lambda f: jax.hessian(scalar(f), argnums=(0, 1)),
    "jacrev of jacrev": lambda f: jax.jacrev(jax.jacrev(scalar(f), argnums=(0, 1)), argnums=(0, 1)),
    "jvp of grad": lambda f: (
        lambda p, x: jax.jvp(lambda x: jax.grad(scalar(f), argnums=(0, 1))(p, x), (x,), (jnp.sin(x),))
    ),
    "vmap of grad": lambda f: (
        lambda p, x: jax.vmap(jax.grad(scalar(f), argnums=(0, 1)), in_axes=(None, 0))(p, jnp.stack([x, 2 * x - 1]))
    ),
    "remat": lambda f: jax.grad(jax.checkpoint(scalar(f)), argnums=(0, 1)),
    "scan": lambda f: jax.grad(
        lambda p, x: jnp.sum(jax.lax.scan(lambda h, _: (f(p, h) + h, None), x, length=3)[0] ** 2), argnums=(0, 1)
    ),
    "scan of remat": lambda f: jax.grad(
        lambda p, x: jnp.sum(jax.lax.scan(jax.checkpoint(lambda h, _: (f(p, h) + h, None)), x, length=3)[0] ** 2),
        argnums=(0, 1),
    ),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_every_mode_equals_plain_autodiff(small, mode, options):
    params, state, x = small
    ours, plain = pair(state, options)
    for actual, expected in zip(
        *(jax.tree.leaves(jax.jit(mode(function))(params, x)) for function in (ours, plain)), strict=True
    ):
        np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_check_grads(small, options):
    params, state, x = small
    check_grads(jax.jit(pair(state, options)[0]), (params, x), order=2, modes=("fwd", "rev"))


@pytest.mark.parametrize("scale", [None, np.array([1.5, -2.0, 0.5])])
@pytest.mark.parametrize("bias", [None, np.array([0.5, 0.0, -1.0])])
def test_params_may_be_none(small, scale, bias):
    _, state, x = small
    params = jbn.Params(*(None if a is None else jnp.asarray(a) for a in (scale, bias)))
    ours, plain = pair(state, {})
    actual, expected = (jax.jit(jax.hessian(scalar(f), argnums=(0, 1)))(params, x) for f in (ours, plain))
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"ghost_batch_size": 4}, {"mask": OPTIONS["masked"]["mask"]}])
def test_captured_values_of_the_activation_are_differentiated(small, options):
    params, state, x = small
    slope = jnp.array([0.1, 0.2, 0.3])

    def through(norm):
        def loss(slope, params, x):
            def prelu(y):
                return jnp.where(y > 0, y, y * slope.reshape((1,) * (y.ndim - 1) + (3,)))

            return jnp.sum(jnp.sin(norm(params, x, prelu)))

        return loss

    ours = through(lambda p, x, act: jbn.batch_norm(p, state, x, True, activation=act, **options)[0])
    ghost = {"groups": 2} if "ghost_batch_size" in options else {}
    mask = {"mask": options["mask"]} if "mask" in options else {}
    plain = through(lambda p, x, act: reference.plain(p, x, activation=act, **ghost, **mask))
    for derivative in (jax.grad, jax.jacfwd, jax.hessian):
        actual, expected = (jax.jit(derivative(f, argnums=(0, 1, 2)))(slope, params, x) for f in (ours, plain))
        for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, e, rtol=1e-10, atol=1e-10)
    by_slope = jax.vmap(jax.grad(ours), in_axes=(0, None, None))(jnp.stack([slope, 2 * slope]), params, x)
    np.testing.assert_allclose(by_slope[1], jax.grad(plain)(2 * slope, params, x), rtol=1e-10, atol=1e-10)


def test_activation_may_choose_by_a_captured_integer(small):
    params, state, x = small

    def norm(threshold, x):
        return jbn.batch_norm(params, state, x, True, activation=lambda y: jnp.where(y > threshold, y, 0.0))[0]

    gradient = jax.grad(lambda threshold, x: jnp.sum(norm(threshold.astype(jnp.float64), x) ** 3), argnums=1)
    each = jnp.array([0, 1])
    together = jax.jit(jax.vmap(gradient, in_axes=(0, None)))(each, x)
    for threshold, actual in zip(each, together, strict=True):
        np.testing.assert_allclose(actual, gradient(threshold, x), rtol=1e-10, atol=1e-10)


def residuals(function, *args):
    """The arrays that stay alive between the forward and the backward pass."""
    return jax.tree.leaves(jax.eval_shape(lambda *args: jax.vjp(function, *args)[1], *args))


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("options", [{}, {"mask": np.arange(256) < 200}, {"ghost_batch_size": 64}])
def test_only_the_input_is_kept_for_the_backward_pass(train, options, capsys):
    x = jnp.ones((256, 16), jnp.bfloat16)
    params, state = jbn.init(16)

    def norm(params, x):
        out = jbn.batch_norm(params, state, x, train, activation=jax.nn.relu, **options)[0]
        return jnp.sum(out.astype(jnp.float32))

    kept = residuals(norm, params, x)
    large = [aval for aval in kept if aval.size >= x.size]
    assert [(aval.size, aval.dtype) for aval in large] == [(x.size, jnp.bfloat16)]
    groups = 256 // options.get("ghost_batch_size", 256)
    vectors = sum(aval.size * aval.dtype.itemsize for aval in kept) - x.nbytes
    assert vectors <= 6 * groups * 16 * 4 + 256 + 64, kept
    print_saved_residuals(norm, params, x)
    assert [line.split("[")[0] for line in capsys.readouterr().out.splitlines() if "bf16[" in line] == ["bf16"]


def test_an_input_that_is_not_differentiated_costs_no_zeros():
    x = jnp.ones((256, 16), jnp.bfloat16)
    params, state = jbn.init(16)
    kept = residuals(lambda x, params: jbn.batch_norm(params, state, jax.lax.stop_gradient(x), True)[0], x, params)
    assert sum(aval.size == x.size for aval in kept) == 1


def test_statistics_are_not_differentiated(small):
    params, state, x = small

    def remembered(params, x, state):
        new_state = jbn.batch_norm(params, state, x, True, momentum=0.5)[1]
        return jnp.sum(new_state.mean) + jnp.sum(new_state.var)

    mean_and_var = (state.mean, state.var)
    gradients = jax.grad(lambda p, x, s: remembered(p, x, state._replace(mean=s[0], var=s[1])), argnums=(0, 1, 2))(
        params, x, mean_and_var
    )
    for leaf in jax.tree.leaves(gradients):
        np.testing.assert_array_equal(leaf, np.zeros_like(leaf))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_constant_channel_has_a_finite_gradient(x64, dtype):
    x = jnp.full((8, 2), 3.0, dtype)
    cotangent = np.arange(16).reshape(8, 2).astype(dtype)
    dx = jax.vjp(lambda x: jbn.batch_norm(*jbn.init(2, dtype), x, True)[0], x)[1](cotangent)[0]
    expected = reference.batch_norm(x, cotangent=cotangent).dx
    assert_close(dx, expected, dtype)


OUTSIDE = {
    "jit": lambda layer: jax.jit(layer),
    "remat": lambda layer: jax.checkpoint(layer),
    "scan": lambda layer: lambda x, kept: jax.lax.scan(lambda h, k: (layer(h, k), None), x, kept[None])[0],
    "vmap": lambda layer: lambda x, kept: jax.vmap(layer, in_axes=(None, 0))(x, kept[None])[0],
    "cond": lambda layer: lambda x, kept: jax.lax.cond(x[0, 0] < 1e9, layer, lambda x, kept: x, x, kept),
    "jit of remat": lambda layer: jax.jit(jax.checkpoint(layer)),
}


@pytest.mark.parametrize("outside", OUTSIDE.values(), ids=OUTSIDE)
@pytest.mark.parametrize("options", [{}, {"ghost_batch_size": 8}])
def test_activation_captures_what_cannot_be_differentiated(small, outside, options):
    params, state, x = small
    kept = jnp.arange(24).reshape(8, 3) % 3 > 0

    def through(norm):
        return lambda x, kept: norm(params, x, lambda y: jnp.where(kept, y, 0.0) * jnp.cos(y))

    ours = through(lambda p, x, act: jbn.batch_norm(p, state, x, True, activation=act, **options)[0])
    plain = through(lambda p, x, act: reference.plain(p, x, activation=act))
    for derivative in (jax.grad, jax.jacfwd):
        actual, expected = (derivative(lambda x, f=f: jnp.sum(outside(f)(x, kept) ** 3))(x) for f in (ours, plain))
        np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-10)


def test_activation_captures_a_key(small):
    params, state, x = small

    def dropout(key, x):
        def activation(y):
            return jnp.where(jax.random.bernoulli(key, 0.5, y.shape), y, 0.0)

        return jnp.sum(jbn.batch_norm(params, state, x, True, activation=activation)[0] ** 3)

    key = jax.random.key(0)
    outer = jax.grad(lambda x: jax.jit(dropout)(key, x))(x)
    np.testing.assert_allclose(outer, jax.jit(jax.grad(dropout, argnums=1))(key, x), rtol=1e-10)
