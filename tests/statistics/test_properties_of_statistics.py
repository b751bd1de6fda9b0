"""Properties of moments, states and schedules for any input; test_properties.py says how to draw more examples."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st
from support import reference
from support.drawing import MOMENTA, RUNNING_VAR, Batch, arrays, batches, next_count, norms
from support.tolerances import FLUSHED, SUM, UNIT

import jbn

merge = jax.jit(jbn.merge)
merge_states = jax.jit(lambda *states, weights: jbn.merge_states(*states, weights=weights))
moments = jax.jit(jbn.moments, static_argnames="feature_axis")
update = jax.jit(jbn.update, static_argnames="running_var")
FLOAT = SUM * UNIT["float32"]
COUNTS = st.one_of(st.integers(0, 3), st.integers(0, 2**24), st.floats(1, 1e30))


@st.composite
def parts(draw, number, features=(3,)):
    """Moments of one scale with counts that differ widely; moments of count 0 may hold anything."""
    scale = 10.0 ** draw(st.integers(-15, 15))
    drawn = []
    for _ in range(number):
        count = np.float32(draw(st.tuples(*[COUNTS] * 3)))
        mean = (draw(arrays(features)) * scale).astype(np.float32)
        var = (np.abs(draw(arrays(features))) * scale**2).astype(np.float32)
        faulty = (count == 0) & draw(st.booleans())
        drawn.append(jbn.Moments(np.where(faulty, np.float32(np.nan), mean), var, count))
    return drawn


def of_the_union(parts):
    """Mean, variance and count by the definition, in float64."""
    parts = [[np.asarray(leaf, np.float64) for leaf in part] for part in parts]
    known = [[np.where(count > 0, leaf, 0) for leaf in (mean, var, count)] for mean, var, count in parts]
    total = sum(count for _, _, count in known)
    share = [count / np.maximum(total, 1e-300) for _, _, count in known]
    mean = sum(one * part for one, (part, _, _) in zip(share, known, strict=True))
    var = sum(one * (own + (part - mean) ** 2) for one, (part, own, _) in zip(share, known, strict=True))
    return mean, var, total


def assert_moments(actual, expected, parts):
    """Means agree within a few units of the largest mean, variances of the largest variance and squared distance."""
    largest = max(np.max(np.abs(part.mean), where=part.count > 0, initial=0) for part in parts)
    widest = max(np.max(np.asarray(part.var, np.float64), where=part.count > 0, initial=0) for part in parts)
    widest = max(widest, np.float64(largest) ** 2)
    np.testing.assert_allclose(actual[0], expected[0], rtol=0, atol=FLOAT * largest + FLUSHED)
    np.testing.assert_allclose(actual[1], expected[1], rtol=0, atol=FLOAT * widest + FLUSHED)
    np.testing.assert_allclose(actual[2], expected[2], rtol=FLOAT)


@given(data=st.data())
def test_merge_is_the_union_in_any_order_and_grouping(data):
    a, b, c = three = data.draw(parts(3))
    expected = of_the_union(three)
    for merged in (merge(a, b, c), merge(c, a, b), merge(merge(a, b), c), merge(a, merge(b, c))):
        assert_moments(merged, expected, three)
    np.testing.assert_array_equal(merge(a, b).count, merge(b, a).count)


@given(data=st.data())
def test_merge_of_parts_is_the_whole(data):
    batch = data.draw(batches(("float32",)).filter(lambda batch: len(batch.reduced) > 0))
    assume(batch.fits())
    axis = data.draw(st.sampled_from(batch.reduced))
    cut = data.draw(st.integers(0, batch.x.shape[axis]))
    masks = [None, None]
    if batch.mask is not None:
        by_feature = batch.mask.ndim == batch.x.ndim
        masks = np.split(batch.mask, [cut], axis if by_feature else batch.reduced.index(axis))
    cut_in_two = zip(np.split(batch.x, [cut], axis), masks, strict=True)
    merged = merge(*(moments(x, feature_axis=batch.feature_axis, mask=mask) for x, mask in cut_in_two))
    expected = reference.batch_norm(batch.x, feature_axis=batch.feature_axis, mask=batch.mask)
    np.testing.assert_array_equal(merged.count, expected.count)
    assert_merged(merged, expected, batch)


def assert_merged(merged, expected, batch):
    """Means of parts are rounded before they are subtracted, which adds an error to the variance."""
    spread = batch.spread()
    rounding = UNIT["float32"] * (np.abs(expected.mean) + spread)
    assert (np.abs(np.float64(merged.mean) - expected.mean) <= SUM * rounding + FLUSHED).all()
    bound = FLOAT * spread**2 + 4 * rounding * (spread + rounding) + FLUSHED
    assert (np.abs(np.float64(merged.var) - expected.var) <= bound).all()


def has_values(batch, running_var):
    """Whether a feature has enough values for its variance; counts of averaged moments may be fractions."""
    return batch.count >= 2 if running_var == "unbiased" else batch.count > 0


@given(data=st.data(), momentum=MOMENTA, running_var=RUNNING_VAR)
def test_an_update_stays_between_old_and_batch(data, momentum, running_var):
    (batch,) = data.draw(parts(1))
    _, state = data.draw(norms((3,), scale=10.0 ** data.draw(st.integers(-15, 15))))
    new = update(state, batch, momentum=np.float32(momentum), running_var=running_var)
    moves = has_values(batch, running_var) & np.isfinite(batch.mean)
    jax.tree.map(lambda a, e: np.testing.assert_array_equal(a[~moves], e[~moves]), new, state)
    state, new, batch = (jax.tree.map(lambda leaf: np.asarray(leaf)[moves], part) for part in (state, new, batch))
    np.testing.assert_array_equal(new.count, next_count(state.count))
    rounding = FLOAT * np.maximum(np.abs(state.mean), np.abs(batch.mean)) + FLUSHED
    assert (new.mean >= np.minimum(state.mean, batch.mean) - rounding).all()
    assert (new.mean <= np.maximum(state.mean, batch.mean) + rounding).all()
    taken = batch.var * (batch.count / np.maximum(batch.count - 1, 1)) if running_var == "unbiased" else batch.var
    between = np.square(batch.mean - state.mean) / 4 if running_var == "total" else 0
    rounding = FLOAT * (np.maximum(state.var, taken) + between) + FLUSHED
    assert (new.var >= np.minimum(state.var, taken) - rounding).all() and (new.var >= 0).all()
    assert (new.var <= np.maximum(state.var, taken) + between + rounding).all()


@given(data=st.data(), momentum=MOMENTA, running_var=RUNNING_VAR)
def test_what_is_unset_becomes_the_batch(data, momentum, running_var):
    (batch,) = data.draw(parts(1))
    _, state = data.draw(norms((3,)))
    fresh = jbn.unset(state)
    new = update(fresh, batch, momentum=np.float32(momentum), running_var=running_var)
    moves = has_values(batch, running_var) & np.isfinite(batch.mean)
    for leaf, taken, before in zip(new, batch._replace(count=1), fresh, strict=True):
        # Equal bit for bit, except values that the arithmetic flushes to 0.
        expected = np.where(moves, taken, before)
        np.testing.assert_array_equal(leaf, np.where(np.abs(expected) < np.finfo(np.float32).tiny, 0, expected))
    jax.tree.map(np.testing.assert_array_equal, jbn.unset(fresh), fresh)


@given(data=st.data())
def test_merged_states_are_one_population(data):
    """The law of total variance holds in any order and unit of the weights; unset states have no effect."""
    scale = 10.0 ** data.draw(st.integers(-15, 15))
    states = [data.draw(norms((3,), scale=scale))[1] for _ in range(3)]
    weights = [data.draw(st.integers(1, 2**20)) for _ in states]
    as_moments = [
        jbn.Moments(state.mean, state.var, np.full(3, weight)) for state, weight in zip(states, weights, strict=True)
    ]
    expected = of_the_union(as_moments)
    unset = jbn.unset(states[0])
    for order, unit in (((0, 1, 2), 1), ((2, 0, 1), 1), ((0, 1, 2), 1e-3)):
        merged = merge_states(
            *(states[i] for i in order), unset, weights=[np.float32(weights[i] * unit) for i in order] + [np.float32(9)]
        )
        assert_moments((merged.mean, merged.var, 1), (*expected[:2], 1), as_moments)
        np.testing.assert_array_equal(merged.count, np.max([state.count for state in states], axis=0))


@given(data=st.data(), number=st.integers(1, 5))
def test_a_cumulative_total_is_the_merge(data, number):
    values = [data.draw(arrays((4, 3))) + np.float32(data.draw(st.sampled_from([0, 100]))) for _ in range(number)]
    each = [moments(x) for x in values]
    state = jbn.unset(jbn.init(3)[1])
    for batch in each:
        kept = jbn.momentum.cumulative()(state.count[0])
        state = update(state, batch, momentum=jnp.float32(kept), running_var="total")
    assert_moments((state.mean, state.var, state.count * 4), of_the_union(each), each)
    assert_moments(merge(*each), of_the_union(each), each)


@given(momentum=st.floats(0, 1, exclude_max=True), values=st.lists(st.floats(-4, 4), min_size=1, max_size=30))
def test_a_debiased_average_is_that_of_adam(momentum, values):
    """The average from 0, divided by its total weight, step by step in float64."""
    schedule = jbn.momentum.debiased(momentum)
    average, gathered, debiased = 0.0, 0.0, 0.0
    for count, value in enumerate(values):
        kept = float(schedule(count))
        debiased = kept * debiased + (1 - kept) * value
        average = momentum * average + (1 - momentum) * value
        gathered = momentum * gathered + (1 - momentum)
        # Each step adds the float32 rounding of its momentum times the size of the update.
        assert abs(debiased - average / gathered) <= (count + 1) * 8 * UNIT["float32"] * 8


@given(momentum=st.floats(0, 1), count=st.integers(0, 2**31 - 1))
def test_schedules_are_shares_that_end_at_the_momentum(momentum, count):
    average, warm, debiased = (
        float(schedule(count))
        for schedule in (jbn.momentum.cumulative(), jbn.momentum.warmup(momentum), jbn.momentum.debiased(momentum))
    )
    assert abs(average - count / (count + 1)) <= 4 * UNIT["float32"]
    assert abs(warm - min(np.float32(momentum), np.float32(average))) <= FLUSHED
    assert 0 <= debiased <= np.float32(momentum) * (1 + 4 * UNIT["float32"])
    # An unbiased average weighs its past at most as much as the plain average does.
    assert debiased <= average * (1 + 8 * UNIT["float32"])
    later = float(jbn.momentum.debiased(momentum)(min(count + 1, 2**31 - 1)))
    assert later >= debiased * (1 - 8 * UNIT["float32"])


@given(momentum=st.floats(0, 1), microbatches=st.integers(1, 64))
def test_microbatches_weigh_as_their_batch(momentum, microbatches):
    kept = jbn.momentum.per_microbatch(momentum, microbatches)
    np.testing.assert_allclose(kept**microbatches, momentum, rtol=1e-13 * microbatches, atol=1e-300)
    assert jbn.momentum.from_torch(momentum) == 1 - momentum


@functools.partial(jax.jit, static_argnames="feature_axis")
def inferred(params, state, kernel, bias, x, feature_axis):
    """A dense layer and the norm after it, and the folded layer."""
    folded, offset = jbn.fold(params, state, kernel, bias)
    return jbn.normalize(params, state, x @ kernel + bias[None], feature_axis=feature_axis), x @ folded + offset[None]


@given(data=st.data())
def test_a_folded_layer_is_layer_and_norm(data):
    params, state = data.draw(norms((3,)))
    kernel, bias, x = (data.draw(arrays(shape)) for shape in ((2, 3), (3,), (4, 2)))
    apart, folded = inferred(params, state, kernel, bias, x, feature_axis=-1)
    slope = np.abs(params.scale) / np.sqrt(np.float64(state.var) + 1e-5)
    terms = (np.abs(x) @ np.abs(kernel) + np.abs(bias) + np.abs(state.mean)) * slope + np.abs(params.bias)
    assert (np.abs(np.float64(apart) - np.float64(folded)) <= 8 * UNIT["float32"] * terms + FLUSHED).all()


@given(data=st.data(), library=st.sampled_from(["torch", "keras", "linen", "nnx"]))
def test_conversions_there_and_back_change_no_bit(data, library):
    params, state = data.draw(norms((3,)))
    there = getattr(jbn.convert, f"to_{library}")(params, state)
    back = getattr(jbn.convert, f"from_{library}")(there)
    jax.tree.map(np.testing.assert_array_equal, back[0], params)
    jax.tree.map(np.testing.assert_array_equal, back[1][:2], state[:2])


@functools.partial(jax.jit, static_argnames="feature_axis")
def one_step(state, x, feature_axis=-1):
    params, _ = jbn.init(state.mean.shape)
    return jbn.batch_norm(params, state, x, True, feature_axis=feature_axis)[1]


@given(data=st.data(), sizes=st.lists(st.sampled_from([1, 2, 5]), min_size=1, max_size=4))
def test_calibration_gives_the_moments_of_all_batches(data, sizes):
    offset = data.draw(st.sampled_from([0, 1e3]))
    each = [(data.draw(arrays((size, 3))) + offset).astype(np.float32) for size in sizes]
    _, state = data.draw(norms((3,)))
    population = jbn.calibrate(one_step, state, each)
    whole = Batch(np.concatenate(each), -1, None)
    expected = reference.batch_norm(whole.x)
    np.testing.assert_array_equal(population.count, np.full(3, len(sizes)))
    assert_merged(population, expected, whole)
