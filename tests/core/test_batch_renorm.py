"""Batch renormalization: output, clipping and derivatives, and a comparison with Keras where Keras is right."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import reference
from support.compilation import compiled
from support.programs import Passes
from support.renorm import CLOSED, FREE, case, corrected
from support.tolerances import UNIT, assert_close, assert_rounded, assert_same
from support.transforms import TRANSFORMS

import jbn

LAYOUTS = [((7, 3), -1), ((4, 3, 5), 1), ((3, 2, 4, 5), (1, 3))]
CLIPPED = {"r_max": 1.5, "d_max": 0.2}
MASK = np.array([True, False, True, True, False, True, True, True])
STATIC = ("r_max", "d_max", "epsilon", "feature_axis", "ghost_batch_size", "running_var", "activation", "dtype")


def step(norm, params, state, x, cotangent, mask=None, **options):
    def forward(params, x):
        return norm(params, state, x, True, mask=mask, **options)

    out, backward, new_state = jax.vjp(forward, params, x, has_aux=True)
    return Passes(out, new_state, *backward(cotangent.astype(out.dtype)))


renormed = jax.jit(functools.partial(step, jbn.batch_renorm), static_argnames=STATIC)
normed = jax.jit(functools.partial(step, jbn.batch_norm), static_argnames=STATIC)
inferred = jax.jit(jbn.normalize, static_argnames="feature_axis")


def assert_corrected(found, expected, state):
    """A step equals the formula."""
    assert_close(found.out, expected.out, scale=3)
    assert_close(found.dx, expected.dx, scale=3)
    assert_close(found.gradients.scale, expected.dscale, scale=10)
    assert_close(found.gradients.bias, expected.dbias, scale=10)
    mean, var = reference.update(state.mean, state.var, expected, np.float64(np.float32(0.99)))
    assert_close(found.new_state.mean, mean)
    assert_close(found.new_state.var, var)


@pytest.mark.parametrize(("shape", "feature_axis"), LAYOUTS)
def test_output_gradients_and_state_are_those_of_the_formula(rng, shape, feature_axis):
    params, state, x = case(rng, shape, feature_axis)
    cotangent = rng.normal(size=shape).astype(np.float32)
    options = [{**CLIPPED, "epsilon": 1e-5}, {**FREE, "epsilon": 1e-5}]
    if shape == LAYOUTS[0][0]:
        options.append({"r_max": 3.0, "d_max": 5.0, "epsilon": 0.5})
    for given in options:
        found = renormed(params, state, x, cotangent, feature_axis=feature_axis, **given)
        assert_corrected(found, corrected(params, state, x, cotangent, feature_axis=feature_axis, **given), state)


def test_unclipped_training_is_inference_with_the_state_before(rng):
    for shape, feature_axis in LAYOUTS:
        for mean in (3.0, 1e4):
            params, state, x = case(rng, shape, feature_axis, mean)
            found = renormed(params, state, x, x, feature_axis=feature_axis, epsilon=1e-5, **FREE)
            assert_close(found.out, inferred(params, state, x, feature_axis=feature_axis), scale=4)


OPTIONS = {
    "plain": {},
    "masked, total": {"mask": MASK, "running_var": "total"},
    "ghost, relu": {"ghost_batch_size": 4, "activation": jax.nn.relu},
    "bfloat16": {"dtype": jnp.bfloat16},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_without_correction_it_is_batch_norm(rng, options):
    """With r_max=1 and d_max=0 (bit-equal), with the default bounds at count 7, and with an unset state."""
    params, state, x = case(rng, (8, 3), mean=1e4)
    cotangent = rng.normal(size=x.shape).astype(np.float32)
    plain = normed(params, state, x, cotangent, **options)
    assert_same(renormed(params, state, x, cotangent, **options, **CLOSED), plain)
    # The compiler does not know that r = 1 and d = 0 here. It may fuse them with other arithmetic and round once more.
    close = functools.partial(assert_close, dtype="bfloat16" if "dtype" in options else "float32", scale=3)
    jax.tree.map(close, renormed(params, state, x, cotangent, **options), plain)
    unset = jbn.unset(state)._replace(count=np.full(3, 50_000, np.float32))
    plain = normed(params, unset, x, cotangent, **options)
    jax.tree.map(close, renormed(params, unset, x, cotangent, **options), plain)


def test_outside_of_jit_closed_bounds_are_batch_norm(rng):
    params, state, x = case(rng, (8, 3), mean=1e4)
    closed = step(jbn.batch_renorm, params, state, x, jnp.asarray(x), **CLOSED)
    assert_same(closed, step(jbn.batch_norm, params, state, x, jnp.asarray(x)))


def test_masked_values_do_nothing(rng):
    params, state, x = case(rng, (8, 3))
    cotangent = rng.normal(size=x.shape).astype(np.float32)
    found = renormed(params, state, np.where(MASK[:, None], x, np.float32(np.nan)), cotangent, MASK, **FREE)
    np.testing.assert_array_equal(found.out[~MASK], np.zeros((2, 3)))
    np.testing.assert_array_equal(found.dx[~MASK], np.zeros((2, 3)))
    assert_corrected(found, corrected(params, state, x, cotangent, mask=MASK, **FREE), state)


def test_nothing_valid_gives_zeros_and_leaves_the_state():
    params, state = jbn.init(3)
    for x in (np.zeros((0, 3), np.float32), np.full((4, 3), np.nan, np.float32)):
        found = renormed(params, state, x, np.zeros_like(x), np.zeros(len(x), bool), **FREE)
        np.testing.assert_array_equal(found.out, np.zeros(x.shape))
        assert_same(found.new_state, state)


def test_unset_features_are_not_corrected_and_the_others_are(debug_nans, rng):
    params, state, x = case(rng, (8, 3))
    known = np.array([True, False, True])
    partly = state._replace(mean=state.mean * known, var=np.where(known, state.var, np.float32(-np.inf)))
    out = renormed(params, partly, x, x, **FREE).out
    assert_close(out[:, 1], reference.batch_norm(x, *params).out[:, 1])
    assert_close(out[:, 0], inferred(params, state, x, feature_axis=-1)[:, 0], scale=4)


def test_an_infinite_variance_is_loud_and_a_huge_one_is_corrected():
    params, state = jbn.init(1)
    x = np.float32([[-1e14], [1e14]])
    far = renormed(params, state._replace(var=jnp.array([1e-10])), x, x, **FREE)
    assert_close(far.out, x / np.sqrt(1e-10 + 1e-5))
    fault = renormed(params, state._replace(var=jnp.array([jnp.inf])), x, x, **FREE)
    assert bool(jnp.all(jnp.isnan(fault.out)))


def test_state_and_bounds_are_not_differentiated(rng):
    params, state, x = case(rng, (8, 3))

    def loss(mean, var, r_max):
        out, _ = jbn.batch_renorm(params, jbn.State(mean, var, state.count), x, True, r_max=r_max, d_max=2.0)
        return jnp.sum(jnp.sin(out))

    for gradient in jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(state.mean, state.var, 2.0):
        np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


def test_every_derivative_is_that_of_the_formula(rng):
    """Compared with automatic differentiation of the formula, with r and d under stop_gradient."""
    params, state, x = case(rng, (6, 2))

    def plain(x):
        mean, var = x.mean(0, keepdims=True), x.var(0, keepdims=True)
        sd = jnp.sqrt(state.var + 1e-5)[None]
        r, d = jax.lax.stop_gradient((jnp.sqrt(var + 1e-5) / sd, (mean - state.mean[None]) / sd))
        xhat = (x - mean) * jax.lax.rsqrt(var + 1e-5)
        return jnp.sum(jnp.sin((xhat * r + d) * params.scale[None] + params.bias[None]))

    def ours(x):
        return jnp.sum(jnp.sin(jbn.batch_renorm(params, state, x, True, **FREE)[0]))

    @functools.partial(compiled, static_argnums=0)
    def derivatives(f, x, direction):
        return {
            "jvp": jax.jvp(f, (x,), (direction,))[1],
            "hessian": jax.hessian(f)(x),
            "vmap": jax.vmap(jax.grad(f))(jnp.stack([x, x + direction])),
            "remat": jax.grad(jax.checkpoint(f))(x),
        }

    direction = rng.normal(size=x.shape).astype(np.float32)
    found, expected = (derivatives(f, x, direction) for f in (ours, plain))
    for name in found:
        try:
            assert_close(found[name], expected[name], condition=4, scale=1)
        except AssertionError as error:
            raise AssertionError(name) from error


@pytest.mark.parametrize(
    "transform",
    [pytest.param(name, marks=() if name == "vmap" else pytest.mark.devices(8)) for name in TRANSFORMS],
)
def test_shared_over_places_it_is_that_of_one_batch(rng, transform):
    params, state, x = case(rng, (16, 3))
    cotangent = rng.normal(size=x.shape).astype(np.float32)
    mask = np.arange(16) % 8 != 3
    bounds = {"r_max": 1.2, "d_max": 0.1}
    run = TRANSFORMS[transform]({"d": 8}, norm=jbn.batch_renorm, **bounds)
    found = run(params, state, x, mask, cotangent)
    expected = corrected(params, state, x, cotangent, mask=mask, **bounds)
    assert_close(found.out, expected.out, scale=3)
    assert_close(found.dx, expected.dx, scale=3)
    assert_close(found.gradients.scale, expected.dscale, scale=10)
    assert_close(found.gradients.bias, expected.dbias, scale=10)
    mean, var = reference.update(state.mean, state.var, expected, 0.5)
    for place in range(found.new_state.mean.shape[0]):
        assert_close(found.new_state.mean[place], mean)
        assert_close(found.new_state.var[place], var)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_input_is_rounded_once(rng, dtype):
    params, state, x = case(rng, (32, 3))
    low = np.asarray(x, jnp.dtype(dtype))
    cotangent = rng.normal(size=x.shape).astype(dtype)
    found = renormed(params, state, low, cotangent, **CLIPPED)
    expected = corrected(params, state, low, cotangent, **CLIPPED)
    assert found.out.dtype == found.dx.dtype == low.dtype
    assert_rounded(found.out, expected.out, dtype)
    assert_rounded(found.dx, expected.dx, dtype)
    assert found.new_state.mean.dtype == jnp.float32


@pytest.mark.parametrize(("of_x", "of_state"), [("float64", "float64"), ("float64", "float32"), ("float32", "float64")])
def test_bounds_are_as_precise_as_the_state(x64, rng, of_x, of_state):
    params, state, x = case(rng, (8, 3))
    x, state = x.astype(of_x), jbn.State(*(array.astype(of_state) for array in state))
    bounds = {"r_max": float(np.asarray(1.2, of_state)), "d_max": float(np.asarray(0.1, of_state))}
    out, _ = jbn.batch_renorm(params, state, jnp.asarray(x), True, **bounds)
    assert out.dtype == of_x
    assert_close(out, corrected(params, state, x, **bounds).out, dtype=of_x, scale=3)


@pytest.mark.needs("keras")
@pytest.mark.parametrize(("bounds", "masked"), [((1.5, 0.2), True), ((3.0, 5.0), False)])
def test_one_step_equals_that_of_keras(rng, bounds, masked):
    """From one state, since the running statistics then differ: Keras averages standard deviations, jbn variances."""
    import keras

    params, state, x = case(rng, (8, 5, 3))
    mask = rng.random((8, 5)) < 0.7 if masked else None
    valid = np.ones((8, 5), bool) if mask is None else mask
    r_max, d_max = bounds
    clipping = {"rmax": r_max, "rmin": 1 / r_max, "dmax": d_max}
    layer = keras.layers.BatchNormalization(epsilon=1e-5, renorm=True, renorm_clipping=clipping, renorm_momentum=0.9)
    layer.build(x.shape)
    values = {"gamma": params.scale, "beta": params.bias, "renorm_mean": state.mean}
    values["renorm_stddev"] = np.sqrt(state.var + 1e-5)
    start = [values.get(v.name, v.value) for v in layer.trainable_variables]
    fixed = [values.get(v.name, v.value) for v in layer.non_trainable_variables]

    def keras_loss(trainable, x):
        out, moved = layer.stateless_call(list(trainable), fixed, x, training=True, mask=mask)
        return jnp.sum(jnp.sin(out) * valid[..., None]), (out, moved)

    def jbn_loss(params, x):
        out, new_state = jbn.batch_renorm(params, state, x, True, r_max=r_max, d_max=d_max, momentum=0.9, mask=mask)
        return jnp.sum(jnp.sin(out)), (out, new_state)

    def differentiated(loss, params):
        (_, results), gradients = compiled(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, x)
        return *results, *gradients

    theirs, moved, their_gradients, their_dx = differentiated(keras_loss, start)
    ours, new_state, gradients, dx = differentiated(jbn_loss, params)
    # Keras adds 1e-7 to the count of valid values.
    condition = 1 if mask is None else 1e-7 / UNIT["float32"]
    assert_close(ours[valid], np.asarray(theirs)[valid], condition=4 * condition, scale=3)
    assert_close(dx[valid], np.asarray(their_dx)[valid], condition=4 * condition, scale=3)
    for own, their in zip(gradients, their_gradients, strict=True):
        assert_close(own, their, condition=4 * condition, scale=10)
    names = [v.name for v in layer.non_trainable_variables]
    assert_close(new_state.mean, moved[names.index("renorm_mean")], condition=condition)
