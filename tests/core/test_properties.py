"""Properties of a norm for any input: hypothesis searches for counterexamples and shrinks them.

    pytest tests/core/test_properties.py --hypothesis-profile thorough -n 0

draws 2,000 examples of each property, with more shapes. `free_shapes` draws 200, with arbitrary shapes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from support import reference
from support.bounds import assert_within, condition, mean_bound, out_bound, var_bound
from support.drawing import (
    LAST_COUNT,
    MOMENTA,
    RUNNING_VAR,
    Batch,
    arithmetic,
    arrays,
    batches,
    few,
    layouts,
    next_count,
    norms,
)
from support.programs import Passes
from support.tolerances import FLUSHED, SUM, UNIT, assert_same

import jbn

CLOSED = functools.partial(jbn.batch_renorm, r_max=1, d_max=0)
FREE = functools.partial(jbn.batch_renorm, r_max=np.inf, d_max=np.inf)


@functools.partial(jax.jit, static_argnames=("norm", "feature_axis", "running_var", "epsilon"))
def forward(params, state, x, mask, momentum, *, norm, **static):
    return norm(params, state, x, True, mask=mask, momentum=momentum, **static)


def trained(params, state, batch, *, momentum=0.99, norm=jbn.batch_norm, running_var="biased", epsilon=1e-5):
    """Output and new state. All properties pass the same arguments, so they share the compiled programs."""
    momentum = np.asarray(momentum, state.mean.dtype)
    static = {"feature_axis": batch.feature_axis, "running_var": running_var, "epsilon": epsilon}
    return forward(params, state, batch.x, batch.mask, momentum, norm=norm, **static)


@functools.partial(jax.jit, static_argnames="feature_axis")
def forward_and_backward(params, state, x, mask, cotangent, feature_axis):
    def norm(params, x):
        return jbn.batch_norm(params, state, x, True, feature_axis=feature_axis, mask=mask)

    out, backward, new_state = jax.vjp(norm, params, x, has_aux=True)
    return Passes(out, new_state, *backward(cotangent))


def differentiated(params, state, batch, cotangent):
    return forward_and_backward(params, state, batch.x, batch.mask, cotangent, batch.feature_axis)


@functools.partial(jax.jit, static_argnames="feature_axis")
def inference(params, state, x, mask, feature_axis):
    return jbn.batch_norm(params, state, x, False, feature_axis=feature_axis, mask=mask)


def inferred(params, state, batch):
    return inference(params, state, batch.x, batch.mask, batch.feature_axis)


def by_formula(batch, params, cotangent=None, epsilon=1e-5):
    options = {"feature_axis": batch.feature_axis, "mask": batch.mask, "epsilon": epsilon}
    return reference.batch_norm(batch.x, *params, cotangent, **options)


@pytest.mark.parametrize("dtypes", [("float32", "bfloat16", "float16"), ("float64",)], ids=["32 bits", "64 bits"])
@given(data=st.data(), momentum=MOMENTA, running_var=RUNNING_VAR)
def test_output_and_state_are_those_of_the_formula(dtypes, data, momentum, running_var):
    batch = data.draw(batches(dtypes))
    assume(batch.fits())
    dtype, precision = arithmetic(batch)
    params, state = data.draw(norms(batch.features, dtype, scale=np.max(batch.spread(), initial=0)))
    momentum = np.asarray(momentum, dtype)
    with precision:
        out, new_state = trained(params, state, batch, momentum=momentum, running_var=running_var)
    expected = by_formula(batch, params)
    assert out.dtype == batch.x.dtype and new_state.mean.dtype == dtype
    assert_within(out, expected.out, out_bound(batch, params, expected, dtype))
    moves = expected.count > (running_var == "unbiased")
    between = (
        (np.abs(expected.mean - state.mean) + batch.spread()) ** 2 if running_var == "total" else 0 * expected.mean
    )
    assume(np.all(between < np.finfo(dtype).max / 4))
    with np.errstate(invalid="ignore", divide="ignore"):
        updated = reference.update(*map(np.float64, state[:2]), expected, float(momentum), running_var)
    mean, var = (np.where(moves, new, old) for new, old in zip(updated, state[:2], strict=True))
    np.testing.assert_array_equal(new_state.count, np.where(moves, next_count(state.count), state.count))
    assert_within(new_state.mean, mean, mean_bound(batch, expected, state.mean, dtype=dtype))
    assert_within(new_state.var, var, var_bound(batch, state.var, 2 * expected.var, between, dtype=dtype))
    for new, old in zip(new_state, state, strict=True):
        np.testing.assert_array_equal(np.asarray(new)[~moves], old[~moves])


@given(data=st.data())
def test_gradients_are_those_of_the_formula(data):
    batch = data.draw(batches(("float32",)))
    assume(batch.fits())
    params, state = data.draw(norms(batch.features))
    cotangent = data.draw(arrays(batch.x.shape))
    found = differentiated(params, state, batch, cotangent)
    expected = by_formula(batch, params, cotangent)
    t = 1 + condition(batch, expected) ** 2
    largest = np.max(np.abs(cotangent), initial=0)
    rstd = batch.over_x(1 / np.sqrt(expected.var + 1e-5))
    scale = np.abs(batch.over_x(params.scale))
    # The factor of x - mean may be flushed to 0, too.
    flushed = FLUSHED * (1 + (1 + rstd) * largest + batch.over_x(batch.spread())) * t
    assert_within(found.dx, expected.dx, SUM * UNIT["float32"] * scale * rstd * largest * t**2 + flushed)
    per_value = SUM * UNIT["float32"] * largest * np.maximum(expected.count, 1) + FLUSHED
    assert_within(found.gradients.bias, expected.dbias, per_value)
    assert_within(found.gradients.scale, expected.dscale, per_value * np.squeeze(t, batch.reduced))


@given(data=st.data())
def test_the_order_of_examples_does_not_matter(data):
    batch = data.draw(batches())
    assume(batch.fits())
    params, state = data.draw(norms(batch.features))
    axis = data.draw(st.sampled_from(batch.reduced))
    order = np.array(data.draw(st.permutations(range(batch.x.shape[axis]))), int)
    mask = None
    if batch.mask is not None:
        mask = np.take(batch.mask, order, axis if batch.mask.ndim == batch.x.ndim else batch.reduced.index(axis))
    out, new_state = trained(params, state, batch)
    other = batch._replace(x=np.take(batch.x, order, axis), mask=mask)
    permuted, permuted_state = trained(params, state, other)
    expected = by_formula(batch, params)
    bound = 2 * out_bound(batch, params, expected)
    assert_within(permuted, np.take(np.float64(out), order, axis), np.take(bound, order, axis))
    assert_within(permuted_state.mean, new_state.mean, 2 * mean_bound(batch, expected, state.mean))
    assert_within(permuted_state.var, new_state.var, 2 * var_bound(batch, state.var))
    np.testing.assert_array_equal(permuted_state.count, new_state.count)


@given(data=st.data(), power=few(st.sampled_from([-8, 5]), st.integers(-8, 8)), sign=st.sampled_from([-1, 1]))
def test_the_scale_of_the_input_does_not_matter(data, power, sign):
    """Scaling by a power of two does not round, and epsilon is scaled too."""
    batch = data.draw(batches(("float32",)))
    scaled = batch._replace(x=batch.x * np.float32(sign * 2.0**power))
    assume(batch.fits() and scaled.fits())
    params, state = data.draw(norms(batch.features))
    out, _ = trained(params, state, batch)
    expected = by_formula(batch, params)
    params = params._replace(scale=sign * params.scale)
    again, _ = trained(params, state, scaled, epsilon=1e-5 * 4.0**power)
    assert_within(again, out, 2 * out_bound(batch, params, expected))


@given(data=st.data(), offset=st.integers(-(2**23), 2**23))
def test_the_offset_of_the_input_does_not_matter(data, offset):
    """Adding whole numbers does not round, so the bound does not depend on the offset."""
    shape, feature_axis, _ = data.draw(layouts(("float32",)).filter(lambda layout: 0 not in layout[0]))
    batch = Batch(np.rint(data.draw(arrays(shape, bound=64))), feature_axis, None)
    params, state = data.draw(norms(batch.features))
    out, _ = trained(params, state, batch)
    moved, new_state = trained(params, state, batch._replace(x=batch.x + np.float32(offset)))
    expected = by_formula(batch, params)
    assert_within(moved, out, 2 * out_bound(batch, params, expected))
    var = 0.99 * np.float64(state.var) + 0.01 * expected.var
    assert_within(new_state.var, var, var_bound(batch, state.var))


@given(data=st.data(), filler=st.sampled_from([np.nan, np.inf, -np.inf, 0, 3e38]))
def test_what_is_masked_may_hold_anything(data, filler):
    batch = data.draw(batches(masked=True))
    params, state = data.draw(norms(batch.features))
    cotangent = data.draw(arrays(batch.x.shape)).astype(batch.x.dtype)
    with np.errstate(over="ignore"):
        filled = batch._replace(x=np.where(batch.valid, batch.x, np.asarray(filler, batch.x.dtype)))
    found = differentiated(params, state, batch, cotangent)
    assert_same(differentiated(params, state, filled, cotangent), found)
    assert_same(trained(params, state, filled), trained(params, state, batch))
    assert not np.asarray(found.out)[~batch.valid].any()
    assert not np.asarray(found.dx)[~batch.valid].any()


@given(data=st.data(), running_var=RUNNING_VAR)
def test_what_does_not_fit_is_loud_and_leaves_the_state_of_its_feature(data, running_var):
    """Squares overflow float32 near 1e19, and sums and differences near 1e38."""
    batch = data.draw(batches(("float32", "bfloat16"), smallest=15, largest=38))
    params, state = data.draw(norms(batch.features))
    out, new_state = trained(params, state, batch, running_var=running_var)
    out, expected = np.float64(out), by_formula(batch, params)
    assert all(np.isfinite(leaf).all() for leaf in new_state)
    correct = np.abs(out - expected.out) <= out_bound(batch, params, expected)
    assert (correct | ~np.isfinite(out)).all()
    silent = np.isfinite(out).all(batch.reduced)
    kept = np.all([new == old for new, old in zip(new_state, state, strict=True)], 0)
    assert (silent | kept).all()
    if batch.fits():
        assert silent.all()
        assert running_var != "biased" or (kept <= (expected.count == 0)).all() or LAST_COUNT in state.count
    with np.errstate(invalid="ignore", divide="ignore"):
        mean, var = reference.update(*map(np.float64, state[:2]), expected, 0.99, running_var)
    np.testing.assert_array_equal(new_state.count, np.where(kept, state.count, next_count(state.count)))
    between = (expected.mean - state.mean) ** 2 if running_var == "total" else 0 * mean
    moved = [np.where(kept, old, new) for new, old in zip((mean, var), state[:2], strict=True)]
    assert_within(new_state.mean, moved[0], mean_bound(batch, expected, state.mean))
    assert_within(new_state.var, moved[1], var_bound(batch, state.var, between))


@given(data=st.data(), fault=st.sampled_from([np.nan, np.inf, -np.inf]))
def test_a_fault_stays_in_its_feature_whose_state_it_leaves(data, fault):
    shape, feature_axis, _ = data.draw(layouts(("float32",)).filter(lambda layout: 0 not in layout[0]))
    batch = Batch(data.draw(arrays(shape)), feature_axis, None)
    params, state = data.draw(norms(batch.features))
    place = tuple(data.draw(st.integers(0, size - 1)) for size in shape)
    faulty = batch.x.copy()
    faulty[place] = fault
    out, clean_state = trained(params, state, batch)
    loud, new_state = trained(params, state, batch._replace(x=faulty))
    key = tuple(slice(None) if axis in batch.reduced else index for axis, index in enumerate(place))
    of_the_fault = np.zeros(shape, bool)
    of_the_fault[key] = True
    assert np.isnan(np.asarray(loud)[of_the_fault]).all()
    np.testing.assert_array_equal(np.asarray(loud)[~of_the_fault], np.asarray(out)[~of_the_fault])
    lost = of_the_fault.any(batch.reduced)
    assert_same(new_state, jax.tree.map(lambda new, old: np.where(lost, old, new), clean_state, state))


@given(data=st.data())
def test_training_does_not_see_the_state_and_inference_leaves_it(data):
    batch = data.draw(batches())
    params, state = data.draw(norms(batch.features))
    _, other = data.draw(norms(batch.features, scale=1e3))
    assert_same(trained(params, state, batch)[0], trained(params, other, batch)[0])
    out, same = inferred(params, state, batch)
    assert_same(same, state)
    x, mean, var, scale, bias = (
        np.asarray(batch.x, np.float64),
        *map(batch.over_x, (state.mean, state.var, *params)),
    )
    rstd = 1 / np.sqrt(var + 1e-5)
    expected = np.where(batch.valid, (x - mean) * rstd * scale + bias, 0)
    terms = (np.abs(x) + np.abs(mean)) * rstd * np.abs(scale) + np.abs(bias)
    unit = UNIT[batch.x.dtype.name] + 8 * UNIT["float32"]
    representable = np.abs(expected) < float(jnp.finfo(batch.x.dtype).max) / 2
    bound = np.where(representable, unit * terms + 2.0**-24, np.inf)
    assert_within(np.nan_to_num(np.float64(out)), expected, bound)


@given(data=st.data())
def test_renormalization_without_bounds_trains_as_it_infers(data):
    batch = data.draw(batches(("float32",), largest=6))
    scale = np.max(batch.spread(), initial=1e-3)
    params, state = data.draw(norms(batch.features, scale=scale))
    state = state._replace(var=state.var + np.float32(scale**2))
    out, new_state = trained(params, state, batch, norm=FREE)
    expected, _ = inferred(params, state, batch)
    t = condition(batch, by_formula(batch, params))
    rstd = batch.over_x(1 / np.sqrt(np.float64(state.var) + 1e-5))
    largest = np.max(np.abs(np.float64(batch.x)), axis=batch.reduced, where=batch.valid, initial=0)
    reach, gain = batch.over_x(np.maximum(largest, np.abs(state.mean))), np.abs(batch.over_x(params.scale)) * rstd
    bound = SUM * UNIT["float32"] * (gain * reach * (1 + t**2) + np.abs(batch.over_x(params.bias)))
    # The factor of x - mean, which is the gain, may be flushed to 0.
    assert_within(out, expected, bound + FLUSHED * (1 + gain + 2 * reach))
    assert_same(new_state, trained(params, state, batch)[1])


@given(data=st.data())
def test_renormalization_with_closed_bounds_is_batch_norm(data):
    batch = data.draw(batches())
    params, state = data.draw(norms(batch.features))
    assert_same(trained(params, state, batch, norm=CLOSED), trained(params, state, batch))
