"""merge gives the moments of the whole batch from the moments of its parts."""

import jax
import jax.numpy as jnp
import numpy as np
from support import reference
from support.refusals import Refused, assert_refused
from support.tolerances import UNIT, allowed, assert_close, assert_moments

import jbn

MOMENTS = jbn.Moments(np.zeros(3, np.float32), np.ones(3, np.float32), np.full(3, 8, np.float32))
TWO = np.ones(2, np.float32)
REFUSED = {
    "no moments": Refused(lambda: jbn.merge(), ValueError, "merge", "got no moments", "at least one jbn.Moments"),
    "a list": Refused(lambda: jbn.merge([MOMENTS]), TypeError, "moments", "is a list", "jbn.Moments(mean, var"),
    "other features": Refused(
        lambda: jbn.merge(MOMENTS, MOMENTS._replace(mean=TWO)), ValueError, "moments", "[(3,), (2,)]", "one shape for"
    ),
    "no count": Refused(
        lambda: jbn.merge(MOMENTS, MOMENTS._replace(count=None)), TypeError, "moments.count", "is None", "of shape (3,)"
    ),
    "one count for all features": Refused(
        lambda: jbn.merge(MOMENTS._replace(count=np.float32(8))), ValueError, "moments.count", "has shape ()", "(3,)"
    ),
    "variances of other features": Refused(
        lambda: jbn.merge(MOMENTS._replace(var=TWO)), ValueError, "moments.var", "has shape (2,)", "expected (3,)"
    ),
}


def test_what_is_no_moments_is_refused():
    assert_refused(REFUSED)


def test_the_union_of_parts_is_the_whole_in_any_order(rng):
    """The variance may be off by twice the rounding error of the means of the parts, in standard deviations."""
    center = np.array([1, 10, 1e3, 1e4])
    x = (rng.normal(size=(100, 4)) + center).astype(np.float32)
    expected = reference.batch_norm(x)

    @jax.jit
    def unions(x):
        one, two, three, four = (jbn.moments(part) for part in jnp.split(x, [1, 20, 50]))
        merge = jbn.merge
        return merge(one, two, three, four), merge(four, three, two, one), merge(merge(one, two), merge(three, four))

    for union in unions(x):
        np.testing.assert_array_equal(union.count, np.full(4, 100))
        for feature in range(4):
            assert_close(union.mean[feature], expected.mean[feature])
            rounded_means = 2 * UNIT["float32"] * center[feature]
            np.testing.assert_allclose(
                union.var[feature], expected.var[feature], rtol=allowed("float32") + rounded_means
            )


def test_the_union_is_exact_in_float64(x64, rng):
    x = rng.normal(size=(60, 2, 3)) + 10
    parts = jax.jit(lambda x: [jbn.moments(part, feature_axis=(1, 2)) for part in jnp.split(x, [7, 8])])(x)
    union = jax.jit(jbn.merge)(*parts)
    assert_moments(union, reference.batch_norm(x, feature_axis=(1, 2)), x, "float64")


def test_empty_parts_do_nothing(rng):
    x = rng.normal(size=(10, 3)).astype(np.float32)
    batch, nothing = jbn.moments(x), jbn.moments(x[:0])
    assert_moments(jbn.merge(nothing, batch, nothing), batch, x)
    unknown = jbn.Moments(jnp.full(3, jnp.nan), jnp.full(3, -jnp.inf), jnp.zeros(3))
    assert_moments(jbn.merge(unknown, batch), batch, x)


def test_empty_parts_do_nothing_far_from_zero(rng):
    """The mean of an empty part is 0, and the square of its distance to the others overflows."""
    x = (1e20 * (1 + 1e-6 * rng.normal(size=(7, 3)))).astype(np.float32)
    nothing = jbn.Moments(*jnp.zeros((3, 3)))
    for merged in jax.jit(lambda x: (jbn.merge(nothing, jbn.moments(x)), jbn.merge(jbn.moments(x), nothing)))(x):
        assert_close(merged.var, reference.batch_norm(x).var)


def test_rounding_makes_no_variance_negative(rng):
    """The parts of each feature have one value, whose distance to the computed center is a few roundings."""
    value = rng.uniform(500, 1000, 4000).astype(np.float32)
    counts = rng.integers(1, 100, (10, 4000)).astype(np.float32)
    var = jbn.merge(*(jbn.Moments(value, 0 * value, count) for count in counts)).var
    assert bool(jnp.all((var >= 0) & (var < 1e-12)))


def test_each_feature_has_a_count_of_its_own(rng):
    """Masks that differ between features: one feature has no value in one part, and one has none at all."""
    x = (rng.normal(size=(40, 3)) + 3).astype(np.float32)
    mask = rng.random(x.shape) < 0.5
    mask[:20, 1] = mask[:, 2] = False
    union = jbn.merge(*(jbn.moments(x[part], mask=mask[part]) for part in (slice(20), slice(20, 40))))
    assert_moments(union, reference.batch_norm(x, mask=mask), x)
