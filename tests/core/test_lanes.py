"""Statistics shared over the lanes of vmap, on one device."""

import functools

import jax
import numpy as np
import pytest
from support import reference
from support.tolerances import assert_close

import jbn


def test_one_example_a_lane_is_normalized_by_the_batch_of_all_lanes(rng):
    x = rng.normal(size=(16, 3)).astype(np.float32) + 100
    params, state = jbn.init(3)

    @functools.partial(jax.vmap, axis_name="batch", out_axes=(0, None, None))
    def norm_and_moments(x):
        out, new_state = jbn.batch_norm(params, state, x, True, momentum=0.0, axis_name="batch")
        return out, new_state, jbn.moments(x, axis_name="batch")

    out, new_state, batch = jax.jit(norm_and_moments)(x)
    expected = reference.batch_norm(x)
    assert_close(out, expected.out)
    assert_close(new_state.var, expected.var)
    assert_close(batch.mean, expected.mean)
    np.testing.assert_array_equal(batch.count, np.full(3, 16))


def test_one_example_a_lane_may_be_masked(rng):
    """Masks of examples, and masks that differ between features."""
    x = rng.normal(size=(16, 3)).astype(np.float32) + 100
    params, state = jbn.init(3)
    norm = jax.vmap(lambda x, m: jbn.batch_norm(params, state, x, True, mask=m, axis_name="batch"), axis_name="batch")
    for mask in (rng.random((16, 1)) < 0.5, rng.random((16, 3)) < 0.5):
        given = mask[:, 0] if mask.shape[1] == 1 else mask
        out, _ = jax.jit(norm)(np.where(mask, x, np.float32(np.nan)), given)
        assert_close(out, reference.batch_norm(x, mask=mask).out)


@jax.jit
@functools.partial(jax.vmap, axis_name="lanes")
def moments_of_lanes(x, mask):
    return jbn.moments(x, mask=mask, axis_name="lanes")


@pytest.mark.parametrize("lanes", [4, 32])
def test_a_large_variance_does_not_overflow_over_many_lanes(lanes):
    x = np.broadcast_to(np.float32([[-4e18], [4e18]]), (lanes, 2, 3))
    assert_close(moments_of_lanes(x, np.ones((lanes, 2), bool)).var[0], np.full(3, 1.6e37))


@pytest.mark.parametrize(
    ("lanes", "center", "spread"),
    [(4, 1e20, 1e-6), (32, 1e20, 1e-6), (4, -1e5, 1e-5), (32, -1e5, 1e-5), (4, 1e25, 0), (32, 1e24, 0)],
)
def test_an_empty_lane_beside_lanes_far_from_zero_changes_nothing(rng, lanes, center, spread):
    """The empty lane has mean 0, and the square of its distance to the other means may overflow."""
    x = (center * (1 + spread * rng.normal(size=(lanes, 10, 3)))).astype(np.float32)
    mask = np.broadcast_to(np.arange(lanes)[:, None] > 0, (lanes, 10))
    found = jax.tree.map(lambda leaf: leaf[-1], moments_of_lanes(x, mask))
    expected = reference.batch_norm(x[1:])
    assert_close(found.mean, expected.mean)
    assert_close(found.var, expected.var, scale=(2.0**-24 * center) ** 2)


def test_a_named_lane_inside_an_unnamed_one_shares_statistics_by_name_only(rng):
    """Each unnamed lane has its own statistics, shared over its named lanes."""
    x = rng.normal(size=(10, 5, 6)).astype(np.float32)
    params, state = jbn.init(5)
    inner = jax.vmap(
        lambda x: jbn.batch_norm(params, state, x, True, momentum=0.0, axis_name="batch"),
        axis_name="batch",
        in_axes=1,
        out_axes=(1, None),
    )
    out, new_state = jax.jit(jax.vmap(inner))(x)
    assert new_state.mean.shape == new_state.var.shape == (10, 5)
    for lane in range(10):
        expected = reference.batch_norm(x[lane], feature_axis=0)
        assert_close(out[lane], expected.out, scale=5)
        assert_close(new_state.var[lane], expected.var)


def test_one_example_in_one_lane_gives_the_bias_and_no_gradient_but_of_it(rng):
    """Up to the rounding of terms that cancel: cotangent / sqrt(epsilon), since the variance is 0."""
    x, cotangent = rng.normal(size=(2, 1, 5)).astype(np.float32)
    params, state = jbn.init(5)

    def lanes(params, x):
        return jax.vmap(lambda x: jbn.batch_norm(params, state, x, True, axis_name="d")[0], axis_name="d")(x)

    out, backward = jax.vjp(lanes, params, x)
    (dscale, dbias), dx = backward(cotangent)
    np.testing.assert_array_equal(out, np.zeros((1, 5)))
    np.testing.assert_array_equal(dbias, cotangent[0])
    for gradient in (dscale, dx):
        assert_close(gradient, np.zeros_like(gradient), scale=np.max(np.abs(cotangent)) / 1e-5**0.5)
