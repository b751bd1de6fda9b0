"""Properties of batches whose statistics come from their parts, or from one part, for any values.

`test_properties.py` says how to draw more examples.
"""

import functools

import jax
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P
from support import reference
from support.bounds import assert_within, mean_bound, out_bound, var_bound
from support.drawing import Batch, arrays, few, norms
from support.tolerances import UNIT, assert_same

import jbn

batch_norm = jax.jit(jbn.batch_norm, static_argnames=("train", "feature_axis", "ghost_batch_size"))


@given(data=st.data(), rows=few(st.just(4), st.integers(1, 9)))
def test_a_masked_batch_is_the_batch_of_what_is_valid(data, rows):
    x = data.draw(arrays((rows, 3))) * np.float32(2) + np.float32(data.draw(st.sampled_from([0, 1e3])))
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows)))
    params, state = data.draw(norms((3,)))
    out, new_state = batch_norm(params, state, x, True, mask=mask)
    alone, alone_state = batch_norm(params, state, x[mask], True)
    batch = Batch(x[mask], -1, None, rounding=4 * UNIT["float32"])  # of the mean about which masked sums are taken
    expected = reference.batch_norm(x[mask], *params)
    assert_within(np.asarray(out)[mask], alone, 2 * out_bound(batch, params, expected))
    assert_within(new_state.mean, alone_state.mean, 2 * mean_bound(batch, expected, state.mean))
    assert_within(new_state.var, alone_state.var, 2 * var_bound(batch, state.var))
    np.testing.assert_array_equal(new_state.count, alone_state.count)


def one_place(params, state, x, mask):
    return jbn.batch_norm(params, state, x, True, mask=mask, axis_name="places")


@functools.cache
def on_lanes(number):
    mapped = jax.vmap(one_place, in_axes=(None, None, 0, 0), out_axes=(0, None), axis_name="places")

    @jax.jit
    def lanes(params, state, x, mask):
        out, new_state = mapped(params, state, x.reshape(number, -1, *x.shape[1:]), mask.reshape(number, -1))
        return out.reshape(x.shape), new_state

    return lanes


@functools.cache
def on_devices(number):
    mesh = jax.make_mesh((number,), ("places",), axis_types=(jax.sharding.AxisType.Auto,))
    split = P("places")
    return jax.jit(
        jax.shard_map(one_place, mesh=mesh, in_specs=(P(), P(), split, split), out_specs=(split, P())),
    )


def assert_shared_as_one(data, norm_on, number, rows):
    """The norm over `number` places with `rows` rows each equals the norm of the whole batch."""
    scale, offset = 10.0 ** data.draw(st.integers(-15, 15)), data.draw(st.sampled_from([0, 1, 1e4, 1e22]))
    x = ((np.float64(data.draw(arrays((number * rows, 2)))) + offset) * scale).astype(np.float32)
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=len(x), max_size=len(x))))
    params, state = data.draw(norms((2,), scale=scale))
    # With a mask or with many parts, sums are taken about a rounded mean.
    batch = Batch(x, -1, mask, rounding=4 * UNIT["float32"])
    assume(batch.fits())
    out, new_state = norm_on(number)(params, state, x, mask)
    expected = reference.batch_norm(x, *params, mask=mask)
    assert_within(out, expected.out, out_bound(batch, params, expected))
    if not mask.any():
        assert_same(new_state, state)
        return
    mean, var = reference.update(*map(np.float64, state[:2]), expected, 0.99)
    assert_within(new_state.mean, mean, mean_bound(batch, expected, state.mean))
    assert_within(new_state.var, var, var_bound(batch, state.var))


def places_and_rows(*numbers):
    every = st.tuples(st.sampled_from(numbers), st.sampled_from([1, 3]))
    return few(st.sampled_from([(numbers[0], 3), (numbers[-1], 1)]), every)


@given(data=st.data(), places=places_and_rows(2, 5, 20))
def test_a_batch_shared_over_lanes_is_the_whole_batch(data, places):
    assert_shared_as_one(data, on_lanes, *places)


@pytest.mark.devices(8)
@given(data=st.data(), places=places_and_rows(4, 8))
def test_a_batch_shared_over_devices_is_the_whole_batch(data, places):
    assert_shared_as_one(data, on_devices, *places)


GHOSTS = [
    *(((6, 2), -1, size) for size in (1, 2, 3)),
    *(((4, 3, 2), -1, size) for size in (1, 2)),
    *(((4, 2, 3), 1, size) for size in (1, 2)),
    *(((2, 5, 2), (1, 2), size) for size in (1, 2)),
]


@given(data=st.data(), case=few(st.sampled_from([GHOSTS[2], GHOSTS[6], GHOSTS[7]]), st.sampled_from(GHOSTS)))
def test_ghost_batches_are_batches_of_their_own(data, case):
    shape, feature_axis, size = case
    x = data.draw(arrays(shape)) + np.float32(data.draw(st.sampled_from([0, 1e3])))
    whole = Batch(x, feature_axis, None)
    params, state = data.draw(norms(whole.features))
    out, new_state = batch_norm(params, state, x, True, feature_axis=feature_axis, ghost_batch_size=size)
    for start in range(0, len(x), size):
        part = Batch(x[start : start + size], feature_axis, None)
        expected = reference.batch_norm(part.x, *params, feature_axis=feature_axis)
        assert_within(out[start : start + size], expected.out, out_bound(part, params, expected))
    expected = reference.batch_norm(x, feature_axis=feature_axis)
    mean, var = reference.update(*map(np.float64, state[:2]), expected, 0.99)
    assert_within(new_state.mean, mean, mean_bound(whole, expected, state.mean))
    assert_within(new_state.var, var, var_bound(whole, state.var))
