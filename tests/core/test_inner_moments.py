"""jbn._core.moments: the value about which sums are taken. A wrong one loses digits, but only for some data."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from support import reference
from support.tolerances import SUM, UNIT

import jbn
from jbn._core import for_xla
from jbn._core.moments import _about_zero_first, near_the_data

ROWS = [
    # Shape, reduced axes, and the positions of the three rows on them.
    ((5, 8, 3), (0, 1), [(0, 2), (0, 4), (0, 6)]),
    ((5, 8, 4, 3), (0, 1, 2), [(0, 2, 0), (0, 4, 0), (0, 6, 0)]),
    ((5, 2, 3, 3), (0, 1, 2), [(0, 0, 0), (0, 0, 1), (0, 0, 2)]),
    ((5, 2, 3), (0, 1), [(1, 0), (2, 0), (3, 0)]),
    ((2, 2, 3), (0, 1), [(0, 0), (1, 0), (1, 0)]),
    ((1, 1, 3), (0, 1), [(0, 0), (0, 0), (0, 0)]),
    ((7, 3), (0,), [(1,), (3,), (5,)]),
    ((4, 3, 8), (0, 2), [(0, 2), (0, 4), (0, 6)]),
    ((3, 4, 9), (1, 2), [(0, 2), (0, 4), (0, 6)]),
    ((2, 3, 4, 5), (1, 3), [(0, 1), (0, 2), (0, 3)]),
]


def median_of_rows(x, reduced, places):
    moved = np.moveaxis(x, reduced, range(len(reduced)))
    return np.median([moved[place] for place in places], axis=0)


def test_the_value_near_the_data_is_the_median_of_three_rows_of_the_first_example(rng):
    """The rows are at the quarters of the first reduced axis of size 3 or more, or else in three examples."""
    for dtype in ("float32", "bfloat16"):
        for shape, reduced, places in ROWS if dtype == "float32" else ROWS[::4]:
            x = rng.permutation(np.prod(shape)).reshape(shape)
            row = jax.jit(functools.partial(near_the_data, reduced=reduced))(jnp.asarray(x, dtype))
            assert row.dtype == jnp.float32
            np.testing.assert_array_equal(row, median_of_rows(x, reduced, places), err_msg=f"{shape} {dtype}")


def test_where_nothing_is_reduced_the_value_is_the_data():
    x = np.arange(6, dtype=np.float32).reshape(3, 2)
    np.testing.assert_array_equal(near_the_data(jnp.asarray(x), ()), x)


@pytest.mark.parametrize(
    ("shape", "reduced", "places"),
    [((8, 3), (0, 1), [(0, 2), (0, 4), (0, 6)]), ((2, 3), (0, 1), [(0, 0), (1, 0), (2, 0)]), ((3,), (0,), [0, 1, 2])],
)
def test_of_a_batch_of_unknown_size_the_rows_are_of_the_first_examples(rng, shape, reduced, places):
    (size,) = export.symbolic_shape("b")
    row = export.export(jax.jit(functools.partial(near_the_data, reduced=reduced)))
    exported = row(jax.ShapeDtypeStruct((size, *shape), jnp.float32))
    for size in (1, 5):
        x = rng.normal(size=(size, *shape)).astype(np.float32)
        held = [np.minimum(place, np.subtract(x.shape[: len(reduced)], 1)) for place in map(np.atleast_1d, places)]
        np.testing.assert_array_equal(exported.call(x), median_of_rows(x, reduced, [tuple(place) for place in held]))


ROWS_READ = np.array([1, 2, 3]) * 2**14


@pytest.mark.parametrize("center", [0, 1e3])
def test_outliers_placed_against_the_rows_that_are_read_cost_no_more_than_the_guarantee(rng, center):
    """An outlier in one of three rows costs nothing. Two on one side cost a variance error of about u * (1 + N / 2)."""
    rows = 2**16
    moments = jax.jit(jbn.moments)
    clean = rng.normal(size=(rows, 1)) + center
    for distance in (10, 1e3, 1e5):
        for count, guaranteed in ((1, SUM), (2, 4 * (1 + rows / 2))):
            x = clean.copy()
            x[ROWS_READ[:count]] += distance
            x = x.astype(np.float32)
            expected = reference.batch_norm(x).var
            error = np.abs(moments(x).var / expected - 1)
            assert error < guaranteed * UNIT["float32"], (distance, count, error)


@pytest.fixture(scope="module")
def asked_afterwards():
    """Moments in the form for a TPU, which tests for lost digits afterwards, on any platform."""
    with for_xla.forms("tpu"):
        yield jax.jit(jbn.moments)


FAR = {
    **{f"mean/sd {ratio:g}": lambda x, ratio=ratio: x + ratio for ratio in (0, 10, 1e2, 1e3, 1e4, 1e5)},
    "first row far": lambda x: x + 1e4 + 1e3 * (np.arange(len(x)) == 0),
    "half of the rows far": lambda x: x + 1e4 * (np.arange(len(x)) % 2),
    "huge": lambda x: 1e15 * x + 1e20,
    "tiny": lambda x: 1e-15 * x + 1e-10,
    "squares overflow": lambda x: 2.2e17 * (x + 1.4),
    "constant": lambda x: 0 * x + 7,
    "one value not finite": lambda x: np.where(np.arange(len(x)) == 5, np.nan, x),
}


@pytest.mark.parametrize("case", FAR)
def test_sums_about_0_are_taken_again_where_they_lost_digits(rng, asked_afterwards, case):
    """The other feature loses no digits."""
    x = rng.normal(size=(4096, 2))
    x[:, 0] = FAR[case](x[:, 0])
    x = x.astype(np.float32)
    found, expected = asked_afterwards(x), reference.batch_norm(x)
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(found.var, expected.var, rtol=1e-5)


def test_sums_about_0_that_lost_no_digits_are_kept(rng):
    """One feature is constantly 0, as after a dead relu."""
    x = np.float32([0, 1]) * rng.normal(size=(4096, 2)).astype(np.float32)
    shift, _, _ = jax.jit(functools.partial(_about_zero_first, (0,), np.float32(4096)))(x)
    np.testing.assert_array_equal(shift, [0, 0])
