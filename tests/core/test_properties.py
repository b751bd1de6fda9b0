"""What holds of `batch_norm` for any input: hypothesis looks for one that breaks it, and shrinks it.

    pytest tests/test_properties.py --hypothesis-profile thorough -n 0

draws 2,000 examples of each property, `free_shapes` 200 whose shapes are free too.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P
from support import reference
from support.drawing import MOMENTA, RUNNING_VAR, TABLE, Batch, arithmetic, arrays, batches, next_count, norms
from support.tolerances import FLUSHED, SUM, UNIT

import jbn

STATIC = ("train", "feature_axis", "running_var", "ghost_batch_size", "epsilon", "activation")
batch_norm = jax.jit(jbn.batch_norm, static_argnames=STATIC)
batch_renorm = jax.jit(jbn.batch_renorm, static_argnames=STATIC)
closed = jax.jit(functools.partial(jbn.batch_renorm, r_max=1, d_max=0), static_argnames=STATIC)
normalize = jax.jit(jbn.normalize, static_argnames=("feature_axis",))


@functools.partial(jax.jit, static_argnames="feature_axis")
def gradients(params, state, x, cotangent, feature_axis, mask):
    _, backward = jax.vjp(
        lambda params, x: jbn.batch_norm(params, state, x, True, feature_axis=feature_axis, mask=mask)[0], params, x
    )
    return backward(cotangent)


def condition(batch, expected, epsilon=1e-5):
    """How far out the shift can be, being a value of the data, in standard deviations, with the rank of x."""
    return batch.over_x(batch.spread() / np.sqrt(expected.var + epsilon))


def assert_within(actual, expected, bound):
    """NumPy's test takes no arrays of bounds."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    bound = np.broadcast_to(bound, expected.shape)
    wrong = ~(np.abs(actual - expected) <= bound)
    assert actual.shape == expected.shape
    assert not wrong.any(), (actual[wrong][:3], expected[wrong][:3], bound[wrong][:3])


def out_bound(batch, params, expected, dtype, epsilon=1e-5):
    """Sums about a shift that is t standard deviations away lose t units of the mean and t**2 of the variance."""
    t = condition(batch, expected, epsilon)
    rstd = 1 / np.sqrt(batch.over_x(expected.var) + epsilon)
    with np.errstate(invalid="ignore"):
        centered = np.abs(np.where(batch.valid, np.float64(batch.x) - batch.over_x(expected.mean), 0))
    scale, bias = (batch.over_x(np.abs(np.float64(vector))) for vector in params)
    result = batch.x.dtype.name
    low = UNIT[result] * np.abs(expected.out) + 2.0**-24 if result != dtype else 0
    if dtype == "float64":
        # The reference rounds the mean too.
        t = t + batch.over_x(np.abs(expected.mean)) * rstd
    flushed = FLUSHED * (1 + scale * rstd + centered)
    return SUM * UNIT[dtype] * (scale * (t + centered * rstd * t**2) + bias) + flushed + low


def mean_bound(batch, expected, dtype, *others):
    largest = np.max([np.abs(expected.mean), *map(np.abs, others)], axis=0)
    return SUM * UNIT[dtype] * (largest + batch.spread()) + FLUSHED


def var_bound(batch, dtype, *others):
    largest = np.max([batch.spread() ** 2, *others], axis=0)
    # The reference computes in float64 too, and rounds the mean.
    rounding = SUM * UNIT["float64"] * np.max(np.abs(np.float64(batch.x)), where=batch.valid, initial=0)
    return SUM * UNIT[dtype] * largest + rounding**2 + FLUSHED


@pytest.mark.parametrize("dtypes", [("float32", "bfloat16", "float16"), ("float64",)], ids=["32 bits", "64 bits"])
@given(data=st.data(), momentum=MOMENTA, running_var=RUNNING_VAR)
def test_output_and_state_are_those_of_the_formula(dtypes, data, momentum, running_var):
    batch = data.draw(batches(dtypes))
    assume(batch.fits())
    dtype, precision = arithmetic(batch)
    params, state = data.draw(norms(batch.features, dtype, scale=np.max(batch.spread(), initial=0)))
    with precision:
        momentum = np.asarray(momentum, dtype)
        options = {"feature_axis": batch.feature_axis, "mask": batch.mask}
        out, new_state = batch_norm(params, state, batch.x, True, momentum=momentum, running_var=running_var, **options)
    expected = reference.batch_norm(batch.x, *params, **options)
    assert out.dtype == batch.x.dtype and new_state.mean.dtype == dtype
    assert_within(out, expected.out, out_bound(batch, params, expected, dtype))
    if expected.count <= (running_var == "unbiased"):
        assert_same(new_state, state)
        return
    between = (
        (np.abs(expected.mean - state.mean) + batch.spread()) ** 2 if running_var == "total" else 0 * expected.mean
    )
    assume(np.all(between < np.finfo(dtype).max / 4))
    mean, var = reference.update(*map(np.float64, state[:2]), expected, float(momentum), running_var)
    assert new_state.count == next_count(state.count)
    assert_within(new_state.mean, mean, mean_bound(batch, expected, dtype, state.mean))
    assert_within(new_state.var, var, var_bound(batch, dtype, state.var, 2 * expected.var, between))


def assert_same(actual, expected):
    """Bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@given(data=st.data())
def test_gradients_are_those_of_the_formula(data):
    batch = data.draw(batches(("float32",)))
    assume(batch.fits())
    params, state = data.draw(norms(batch.features))
    cotangent = data.draw(arrays(batch.x.shape))
    found, dx = gradients(params, state, batch.x, cotangent, batch.feature_axis, batch.mask)
    expected = reference.batch_norm(batch.x, *params, cotangent, feature_axis=batch.feature_axis, mask=batch.mask)
    t = 1 + condition(batch, expected) ** 2
    largest = np.max(np.abs(cotangent), initial=0)
    rstd = batch.over_x(1 / np.sqrt(expected.var + 1e-5))
    scale = np.abs(batch.over_x(params.scale))
    flushed = FLUSHED * (1 + (1 + rstd) * largest) * t
    assert_within(dx, expected.dx, SUM * UNIT["float32"] * scale * rstd * largest * t**2 + flushed)
    per_value = SUM * UNIT["float32"] * largest * expected.count + FLUSHED
    assert_within(found.bias, expected.dbias, per_value)
    assert_within(found.scale, expected.dscale, per_value * np.squeeze(t, batch.reduced))


@given(data=st.data())
def test_the_order_of_examples_does_not_matter(data):
    batch = data.draw(batches())
    assume(batch.fits())
    params, state = data.draw(norms(batch.features))
    axis = data.draw(st.sampled_from(batch.reduced))
    order = np.array(data.draw(st.permutations(range(batch.x.shape[axis]))), int)
    mask = None if batch.mask is None else np.take(batch.mask, order, batch.reduced.index(axis))
    out, new_state = batch_norm(params, state, batch.x, True, feature_axis=batch.feature_axis, mask=batch.mask)
    permuted, permuted_state = batch_norm(
        params, state, np.take(batch.x, order, axis), True, feature_axis=batch.feature_axis, mask=mask
    )
    expected = reference.batch_norm(batch.x, *params, feature_axis=batch.feature_axis, mask=batch.mask)
    bound = 2 * out_bound(batch, params, expected, "float32")
    assert_within(permuted, np.take(np.float64(out), order, axis), np.take(bound, order, axis))
    assert_within(permuted_state.mean, new_state.mean, 2 * mean_bound(batch, expected, "float32", state.mean))
    assert_within(permuted_state.var, new_state.var, 2 * var_bound(batch, "float32", state.var))
    assert permuted_state.count == new_state.count


@given(data=st.data(), power=st.integers(-8, 8), sign=st.sampled_from([-1, 1]))
def test_the_scale_of_the_input_does_not_matter(data, power, sign):
    """A power of two rounds nothing, and epsilon is scaled with it."""
    batch = data.draw(batches(("float32",)))
    factor = np.float32(sign * 2.0**power)
    scaled = batch._replace(x=batch.x * factor)
    epsilon = 2.0**-17
    assume(batch.fits() and scaled.fits())
    params, state = data.draw(norms(batch.features))
    options = {"feature_axis": batch.feature_axis, "mask": batch.mask}
    out, _ = batch_norm(params, state, batch.x, True, epsilon=epsilon, **options)
    params = params._replace(scale=sign * params.scale)
    again, _ = batch_norm(params, state, scaled.x, True, epsilon=epsilon * 4.0**power, **options)
    expected = reference.batch_norm(batch.x, *params, epsilon=epsilon, **options)
    assert_within(again, out, 2 * out_bound(batch, params, expected, "float32", epsilon))


@given(data=st.data(), offset=st.integers(-(2**23), 2**23))
def test_the_offset_of_the_input_does_not_matter(data, offset):
    """Between whole numbers it rounds nothing, so that the bound knows nothing of it."""
    shape, feature_axis = data.draw(st.sampled_from([layout for layout in TABLE if 0 not in layout[0]]))
    x = np.rint(data.draw(arrays(shape, bound=64)))
    batch = Batch(x, feature_axis, None)
    params, state = data.draw(norms(batch.features))
    out, _ = batch_norm(params, state, x, True, feature_axis=feature_axis)
    moved, new_state = batch_norm(params, state, x + np.float32(offset), True, feature_axis=feature_axis)
    expected = reference.batch_norm(x, *params, feature_axis=feature_axis)
    assert_within(moved, out, 2 * out_bound(batch, params, expected, "float32"))
    assert_within(
        new_state.var, 0.99 * np.float64(state.var) + 0.01 * expected.var, var_bound(batch, "float32", state.var)
    )


@given(data=st.data(), filler=st.sampled_from([np.nan, np.inf, -np.inf, 0, 3e38]))
def test_what_is_masked_may_hold_anything(data, filler):
    batch = data.draw(batches().filter(lambda batch: batch.mask is not None))
    params, state = data.draw(norms(batch.features))
    options = {"feature_axis": batch.feature_axis, "mask": batch.mask}
    with np.errstate(over="ignore"):
        filled = np.where(batch.valid, batch.x, np.asarray(filler, batch.x.dtype))
    result = batch_norm(params, state, batch.x, True, **options)
    assert_same(batch_norm(params, state, filled, True, **options), result)
    assert not np.asarray(result[0])[~batch.valid].any()
    cotangent = data.draw(arrays(batch.x.shape)).astype(batch.x.dtype)
    found = gradients(params, state, batch.x, cotangent, **options)
    assert_same(gradients(params, state, filled, cotangent, **options), found)
    assert not np.asarray(found[1])[~batch.valid].any()


@given(data=st.data(), rows=st.integers(1, 9))
def test_a_masked_batch_is_the_batch_of_what_is_valid(data, rows):
    x = data.draw(arrays((rows, 3))) * np.float32(2) + np.float32(data.draw(st.sampled_from([0, 1e3])))
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows)))
    params, state = data.draw(norms((3,)))
    out, new_state = batch_norm(params, state, x, True, mask=mask)
    alone, alone_state = batch_norm(params, state, x[mask], True)
    batch = Batch(x[mask], -1, None)
    expected = reference.batch_norm(x[mask], *params)
    assert_within(np.asarray(out)[mask], alone, 2 * out_bound(batch, params, expected, "float32"))
    assert_within(new_state.mean, alone_state.mean, 2 * mean_bound(batch, expected, "float32", state.mean))
    assert_within(new_state.var, alone_state.var, 2 * var_bound(batch, "float32", state.var))
    assert new_state.count == alone_state.count


def places_of(places):
    """A step over places along the axis "places": lanes of vmap, or devices of shard_map."""
    kind, number = places

    def one_place(params, state, x, mask):
        return jbn.batch_norm(params, state, x, True, mask=mask, axis_name="places")

    if kind == "devices":
        mesh = jax.make_mesh((number,), ("places",), axis_types=(jax.sharding.AxisType.Auto,))
        split = P("places")
        return jax.jit(
            jax.shard_map(one_place, mesh=mesh, in_specs=(P(), P(), split, split), out_specs=(split, P())),
        )
    mapped = jax.vmap(one_place, in_axes=(None, None, 0, 0), out_axes=(0, None), axis_name="places")

    @jax.jit
    def lanes(params, state, x, mask):
        out, new_state = mapped(params, state, x.reshape(number, -1, *x.shape[1:]), mask.reshape(number, -1))
        return out.reshape(x.shape), new_state

    return lanes


PLACES = [("lanes", 2), ("lanes", 5), ("lanes", 20), ("devices", 4), ("devices", 8)]
SHARED = {places: places_of(places) for places in PLACES}


@given(data=st.data(), places=st.sampled_from(PLACES), rows=st.sampled_from([1, 3]))
def test_a_shared_batch_is_the_whole_batch(data, places, rows):
    scale, offset = 10.0 ** data.draw(st.integers(-15, 15)), data.draw(st.sampled_from([0, 1, 1e4, 1e22]))
    x = ((np.float64(data.draw(arrays((places[1] * rows, 2)))) + offset) * scale).astype(np.float32)
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=len(x), max_size=len(x))))
    params, state = data.draw(norms((2,), scale=scale))
    # The parts of many places are summed about a rounded mean.
    batch = Batch(x, -1, mask, rounding=4 * UNIT["float32"] * (places[1] > 16))
    assume(batch.fits())
    out, new_state = SHARED[places](params, state, x, mask)
    expected = reference.batch_norm(x, *params, mask=mask)
    assert_within(out, expected.out, out_bound(batch, params, expected, "float32"))
    if not mask.any():
        assert_same(new_state, state)
        return
    mean, var = reference.update(*map(np.float64, state[:2]), expected, 0.99)
    assert_within(new_state.mean, mean, mean_bound(batch, expected, "float32", state.mean))
    assert_within(new_state.var, var, var_bound(batch, "float32", state.var))


@given(data=st.data(), running_var=RUNNING_VAR)
def test_what_does_not_fit_is_loud_and_leaves_the_state(data, running_var):
    """Near 1e19 squares leave the range of float32, near 1e38 sums and differences do."""
    batch = data.draw(batches(("float32", "bfloat16"), smallest=15, largest=38))
    params, state = data.draw(norms(batch.features))
    options = {"feature_axis": batch.feature_axis, "mask": batch.mask}
    out, new_state = batch_norm(params, state, batch.x, True, running_var=running_var, **options)
    assert all(np.isfinite(leaf).all() for leaf in new_state)
    if batch.fits():
        assert np.isfinite(np.float32(out)).all()
    elif not np.isfinite(np.float32(out)).all():
        assert_same(new_state, state)
    expected = reference.batch_norm(batch.x, *params, **options)
    correct = np.abs(np.float64(out) - expected.out) <= out_bound(batch, params, expected, "float32")
    assert (correct | ~np.isfinite(np.float32(out))).all()
    kept = all(np.array_equal(*leaves) for leaves in zip(new_state, state, strict=True))
    if not kept or (batch.fits() and running_var == "biased" and expected.count):
        assert new_state.count == next_count(state.count)
        mean, var = reference.update(*map(np.float64, state[:2]), expected, 0.99, running_var)
        assert_within(new_state.mean, mean, mean_bound(batch, expected, "float32", state.mean))
        between = (expected.mean - state.mean) ** 2 if running_var == "total" else 0 * mean
        assert_within(new_state.var, var, var_bound(batch, "float32", state.var, between))


@given(data=st.data(), fault=st.sampled_from([np.nan, np.inf, -np.inf]))
def test_a_fault_stays_in_its_feature_and_leaves_the_state(data, fault):
    layouts = [((5, 3), -1), ((2, 4, 2), 1), ((3, 2, 2, 2), (1, 3))]
    shape, feature_axis = data.draw(st.sampled_from(layouts))
    batch = Batch(data.draw(arrays(shape)), feature_axis, None)
    params, state = data.draw(norms(batch.features))
    place = tuple(data.draw(st.integers(0, size - 1)) for size in shape)
    faulty = batch.x.copy()
    faulty[place] = fault
    out, _ = batch_norm(params, state, batch.x, True, feature_axis=feature_axis)
    loud, new_state = batch_norm(params, state, faulty, True, feature_axis=feature_axis)
    assert_same(new_state, state)
    key = tuple(slice(None) if axis in batch.reduced else index for axis, index in enumerate(place))
    of_the_fault = np.zeros(shape, bool)
    of_the_fault[key] = True
    assert np.isnan(np.asarray(loud)[of_the_fault]).all()
    np.testing.assert_array_equal(np.asarray(loud)[~of_the_fault], np.asarray(out)[~of_the_fault])


@given(data=st.data())
def test_training_does_not_see_the_state_and_inference_leaves_it(data):
    batch = data.draw(batches())
    params, state = data.draw(norms(batch.features))
    _, other = data.draw(norms(batch.features, scale=1e3))
    options = {"feature_axis": batch.feature_axis, "mask": batch.mask}
    assert_same(
        batch_norm(params, state, batch.x, True, **options)[0], batch_norm(params, other, batch.x, True, **options)[0]
    )
    out, same = batch_norm(params, state, batch.x, False, **options)
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


@given(data=st.data(), layout=st.sampled_from([((6, 2), -1), ((4, 3, 2), -1), ((4, 2, 3), 1), ((2, 5, 2), (1, 2))]))
def test_ghost_batches_are_batches_of_their_own(data, layout):
    shape, feature_axis = layout
    size = data.draw(st.sampled_from([size for size in (1, 2, 3) if shape[0] % size == 0]))
    x = data.draw(arrays(shape)) + np.float32(data.draw(st.sampled_from([0, 1e3])))
    params, state = data.draw(norms(Batch(x, feature_axis, None).features))
    out, new_state = batch_norm(params, state, x, True, feature_axis=feature_axis, ghost_batch_size=size)
    for start in range(0, len(x), size):
        part = Batch(x[start : start + size], feature_axis, None)
        expected = reference.batch_norm(part.x, *params, feature_axis=feature_axis)
        assert_within(out[start : start + size], expected.out, out_bound(part, params, expected, "float32"))
    whole, expected = Batch(x, feature_axis, None), reference.batch_norm(x, feature_axis=feature_axis)
    mean, var = reference.update(*map(np.float64, state[:2]), expected, 0.99)
    assert_within(new_state.mean, mean, mean_bound(whole, expected, "float32", state.mean))
    assert_within(new_state.var, var, var_bound(whole, "float32", state.var))


@given(data=st.data())
def test_renormalization_without_bounds_trains_as_it_infers(data):
    batch = data.draw(batches(("float32",), largest=6))
    scale = np.max(batch.spread(), initial=1e-3)
    params, state = data.draw(norms(batch.features, scale=scale))
    state = state._replace(var=state.var + np.float32(scale**2))
    options = {"feature_axis": batch.feature_axis, "mask": batch.mask}
    free = np.float32(np.inf)
    out, new_state = batch_renorm(params, state, batch.x, True, r_max=free, d_max=free, **options)
    expected = normalize(params, state, batch.x, **options)
    t = condition(batch, reference.batch_norm(batch.x, **options))
    rstd = batch.over_x(1 / np.sqrt(np.float64(state.var) + 1e-5))
    largest = np.max(np.abs(np.float64(batch.x)), axis=batch.reduced, where=batch.valid, initial=0)
    reach = batch.over_x(np.maximum(largest, np.abs(state.mean))) * rstd
    bound = SUM * UNIT["float32"] * (np.abs(batch.over_x(params.scale)) * reach * (1 + t**2))
    assert_within(out, expected, bound + SUM * UNIT["float32"] * np.abs(batch.over_x(params.bias)))
    assert_same(new_state, batch_norm(params, state, batch.x, True, **options)[1])


@given(data=st.data())
def test_renormalization_with_closed_bounds_is_batch_norm(data):
    batch = data.draw(batches())
    params, state = data.draw(norms(batch.features))
    options = {"feature_axis": batch.feature_axis, "mask": batch.mask}
    assert_same(closed(params, state, batch.x, True, **options), batch_norm(params, state, batch.x, True, **options))
