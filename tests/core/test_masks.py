"""Masked values have no effect whatever they hold; their output and gradient are 0."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import reference
from support.programs import batch_norm, forward_and_backward
from support.refusals import Refused, assert_refused, partly
from support.tolerances import assert_close, assert_moments, assert_same

import jbn

POISONS = [np.nan, np.inf, -np.inf, 1e30]
OPTIONS = {"plain": {}, "exp": {"activation": jnp.exp}, "ghost": {"ghost_batch_size": 4}}
PARAMS, STATE = jbn.init(3)
X = np.ones((8, 16, 3), np.float32)
norm = partly(jbn.batch_norm, params=PARAMS, state=STATE, x=X, train=True)
normalize = partly(jbn.normalize, params=PARAMS, state=STATE, x=X)
moments = partly(jbn.moments, x=X)
jitted_moments = jax.jit(jbn.moments, static_argnames="feature_axis")
REFUSED = {
    "a text": Refused(norm(mask="abc"), TypeError, "mask", "a str, which cannot be", "expected a boolean one"),
    "floats": Refused(
        norm(mask=np.ones((8, 16), np.float32)), TypeError, "mask", "has dtype float32", "use mask.astype(bool)"
    ),
    "another shape": Refused(
        norm(mask=np.ones((8, 3), bool)), ValueError, "mask", "has shape (8, 3)", "expected (8, 16) or (8, 16, 3)"
    ),
    "of examples": Refused(
        normalize(mask=np.ones(8, bool)), ValueError, "mask", "shape (8,)", "Any axis may also have"
    ),
    "of another feature axis": Refused(
        moments(mask=np.ones((8, 3, 16), bool)), ValueError, "mask", "shape (8, 3, 16)", "or (8, 16, 3). Any axis"
    ),
    "of features": Refused(
        norm(x=X[:, 0], mask=np.ones(3, bool)), ValueError, "mask", "has shape (3,)", "expected (8,) or (8, 3)"
    ),
}


def test_masks_of_another_shape_or_dtype_are_refused():
    assert_refused(REFUSED, also_traced=True)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_masked_rows_give_output_0_and_gradient_0_whatever_they_hold(debug_nans, rng, options):
    params = jbn.Params(*rng.normal(size=(2, 3)).astype(np.float32))
    _, state = jbn.init(3)
    mask = np.array([True, False, True, True, False, True, True, True])
    clean, cotangent = rng.normal(size=(2, 8, 5, 3)).astype(np.float32)
    clean[~mask] = 0

    def everything(fill):
        x, cotangents = (np.where(mask[:, None, None], array, np.float32(fill)) for array in (clean, cotangent))
        passes = forward_and_backward(params, state, x, cotangents, mask[:, None], **options)
        return passes, batch_norm(params, passes.new_state, x, False, mask=mask[:, None])[0]

    expected = everything(0)
    for poison in POISONS:
        assert_same(everything(poison), expected)
    passes, inferred = expected
    for array in (passes.out, passes.dx, inferred):
        np.testing.assert_array_equal(array[~mask], np.zeros_like(array[~mask]))
        assert np.all(np.asarray(array[mask]) != 0)


@pytest.mark.parametrize("activation", [None, jax.nn.relu, jax.nn.silu])
def test_masked_values_of_a_shortcut_do_nothing_whatever_they_hold(debug_nans, rng, activation):
    """The masks differ between features. `test_derivatives.py` tests the gradients of valid values."""
    (params, state), mask = jbn.init(3), rng.random((8, 3)) < 0.6
    x, shortcut, cotangent = rng.normal(size=(3, 8, 3)).astype(np.float32)

    @jax.jit
    def passes(shortcut):
        options = {"mask": mask, "activation": activation}
        out, backward = jax.vjp(
            lambda *given: jbn.batch_norm(params, state, given[0], True, shortcut=given[1], **options)[0], x, shortcut
        )
        inferred = jbn.normalize(params, state, x, shortcut=shortcut, **options)
        return out, inferred, *backward(cotangent)

    expected = passes(np.where(mask, shortcut, np.float32(0)))
    for poison in POISONS:
        assert_same(passes(np.where(mask, shortcut, np.float32(poison))), expected)
    for array in expected:
        assert not np.asarray(array)[~mask].any()


def signed_root(y):
    """Its slope is infinite at 0, and masked values are near 0."""
    return jnp.sign(y) * jnp.sqrt(jnp.abs(y))


@pytest.mark.parametrize("train", [True, False], ids=["training", "inference"])
def test_an_infinite_slope_in_a_masked_place_does_nothing(debug_nans, rng, train):
    params, state = jbn.init(3)
    mask = np.array([False, True, True, False, True, True])
    x = rng.normal(size=(6, 3)).astype(np.float32)

    def gradients(x, **options):
        def loss(params, x):
            return jbn.batch_norm(params, state, x, train, activation=signed_root, **options)[0].sum()

        return jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x)

    of_params, of_x = gradients(x, mask=mask)
    params_alone, x_alone = gradients(x[mask])
    for actual, expected in zip((*of_params, of_x[mask]), (*params_alone, x_alone), strict=True):
        assert_close(actual, expected, condition=16)
    np.testing.assert_array_equal(of_x[~mask], 0)


def test_an_infinite_slope_in_a_masked_place_does_nothing_to_second_derivatives(x64):
    """The masked value is at the mean, and with bias 0 the activation is taken at 0."""
    x, (params, state) = jnp.array([[-1.0], [1.0], [0.0]]), jbn.init(1, jnp.float64)

    def curvature(x, **options):
        def loss(params, x):
            return jnp.sum(jbn.batch_norm(params, state, x, True, activation=signed_root, **options)[0] ** 3)

        slope = jax.grad(lambda params, x: jax.grad(loss)(params, x).bias.sum(), argnums=(0, 1))
        return jax.jit(slope)(params, x)

    (of_params, of_x), (params_alone, x_alone) = curvature(x, mask=np.array([True, True, False])), curvature(x[:2])
    for actual, expected in zip((*of_params, of_x[:2]), (*params_alone, x_alone), strict=True):
        assert_close(actual, expected, "float64", condition=16)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_masked_nan_stays_out_of_eager_gradients(dtype):
    params, state = jbn.init(3)
    mask = jnp.array([True, True, True, False, True, False])
    x = np.arange(18, dtype=np.float32).reshape(6, 3)
    x[3] = np.nan
    x = jnp.asarray(x.astype(jnp.dtype(dtype)))
    with jax.debug_nans(True):
        gradient = jax.grad(lambda x: jnp.sum(jbn.batch_norm(params, state, x, True, mask=mask, shortcut=x)[0] ** 3))(x)
    np.testing.assert_array_equal(gradient[3], jnp.zeros(3, dtype))


@pytest.mark.parametrize("rows", [0, 4], ids=["no rows", "all masked"])
@pytest.mark.parametrize(
    "options",
    [{}, {"ghost_batch_size": 2}, {"running_var": "unbiased"}, {"running_var": "total"}],
    ids=["plain", "ghost", "unbiased", "total"],
)
def test_nothing_valid_gives_0_and_leaves_the_state(debug_nans, rng, rows, options):
    params, state = jbn.Params(*rng.normal(size=(2, 3)).astype(np.float32)), jbn.init(3)[1]
    state = state._replace(mean=rng.normal(size=3).astype(np.float32), count=np.full(3, 5, np.float32))
    x, cotangent = np.full((rows, 2, 3), np.nan, np.float32), np.ones((rows, 2, 3), np.float32)
    mask = np.zeros((rows, 2), bool) if rows else None
    found = forward_and_backward(params, state, x, cotangent, mask, activation=jnp.exp, **options)
    assert_same(found.new_state, state)
    for array in jax.tree.leaves((found.out, found.gradients, found.dx)):
        np.testing.assert_array_equal(array, np.zeros_like(array))


def test_axes_of_size_1_repeat_the_mask(rng):
    x = rng.normal(size=(6, 4, 5, 3)).astype(np.float32)
    for shape in ((1, 4, 1), (6, 4, 5, 1), (6, 1, 1, 3)):
        mask = rng.random(shape) < 0.7
        expected = reference.batch_norm(x, mask=mask if mask.ndim == 4 else mask[..., None])
        out, state = batch_norm(*jbn.init(3), x, True, momentum=0.0, mask=mask)
        assert_close(out, expected.out, scale=5)
        assert_close(state.var, expected.var)


@pytest.mark.parametrize("feature_axis", [-1, 1])
def test_a_mask_by_feature_masks_each_feature_alone(debug_nans, rng, feature_axis):
    """Missing values in a table. Feature 0 has all values, 1 some, 2 two, and 3 none, so feature 3 keeps its state."""
    x, cotangent = rng.normal(size=(2, 12, 5, 4)).astype(np.float32) + 3
    mask = rng.random(x.shape) < [1, 0.6, 0, 0]
    mask[7, 2:4, 2] = True
    x[~mask] = np.nan
    x, cotangent, mask = (np.moveaxis(array, -1, feature_axis) for array in (x, cotangent, mask))
    params, state = jbn.Params(*rng.normal(size=(2, 4)).astype(np.float32)), jbn.init(4)[1]
    found = forward_and_backward(params, state, x, cotangent, mask, feature_axis=feature_axis)
    expected = reference.batch_norm(x, *params, cotangent, feature_axis=feature_axis, mask=mask)
    assert_close(found.out, expected.out, scale=5)
    assert_close(found.dx, expected.dx, scale=5)
    for gradient, value in zip(found.gradients, (expected.dscale, expected.dbias), strict=True):
        assert_close(gradient, value, scale=np.abs(cotangent).sum())
    for array in (found.out, found.dx):
        assert not np.asarray(array)[~mask].any()
    valid = expected.count > 0
    np.testing.assert_array_equal(found.new_state.count, valid)
    assert_close(found.new_state.mean, np.where(valid, expected.mean, state.mean))
    assert_close(found.new_state.var, np.where(valid, expected.var, state.var))
    assert_moments(jitted_moments(x, feature_axis=feature_axis, mask=mask), expected, np.nan_to_num(x))


PADDINGS = {
    "left padding": lambda rng, position, lengths: position >= 50 - lengths,
    "right padding": lambda rng, position, lengths: position < lengths,
    "scattered": lambda rng, position, lengths: rng.random((6, 50)) < 0.2,
    "one value": lambda rng, position, lengths: (position == 17) & (np.arange(6)[:, None] == 3),
    "last value": lambda rng, position, lengths: (position == 49) & (np.arange(6)[:, None] == 5),
}


def test_padding_of_any_layout_is_exact_far_from_zero(rng):
    for name, layout in PADDINGS.items():
        x = (rng.normal(size=(6, 50, 3)) + 1e4).astype(np.float32)
        mask = layout(rng, np.arange(50), rng.integers(1, 50, size=(6, 1)))
        x[~mask] = np.nan
        expected = reference.batch_norm(x, mask=mask)
        _, state = batch_norm(*jbn.init(3), x, True, momentum=0.0, mask=mask)
        np.testing.assert_allclose(state.mean, expected.mean, rtol=1e-7, err_msg=name)
        np.testing.assert_allclose(state.var, expected.var, rtol=1e-5, err_msg=name)


def test_masks_beside_features_in_between(rng):
    for feature_axis in ((0, 2), (1, 3), 2):
        x = (rng.normal(size=(4, 5, 3, 6)) + 1e4).astype(np.float32)
        feature = reference.feature_axes(feature_axis, 4)
        mask = rng.random([n for axis, n in enumerate(x.shape) if axis not in feature]) < 0.5
        x[~np.broadcast_to(np.expand_dims(mask, feature), x.shape)] = np.nan
        expected = reference.batch_norm(x, feature_axis=feature_axis, mask=mask)
        found = jitted_moments(x, feature_axis=feature_axis, mask=mask)
        np.testing.assert_allclose(found.var, expected.var, rtol=1e-5)


def test_a_mask_changes_no_valid_value_at_inference(rng):
    x = rng.normal(size=(6, 4, 3)).astype(np.float32)
    normalize = jax.jit(jbn.normalize)
    whole = normalize(*jbn.init(3), x)
    for shape in ((6, 4), (6, 4, 3)):
        mask = rng.random(shape) < 0.6
        masked = np.asarray(normalize(*jbn.init(3), x, mask=mask))
        np.testing.assert_array_equal(masked[mask], whole[mask])
        assert not masked[~mask].any()
