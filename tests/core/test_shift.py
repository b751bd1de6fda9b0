"""Which rows the moments are taken about: a wrong choice would be seen as lost digits only, and only for some data."""

import jax.numpy as jnp
import numpy as np
import pytest

from jbn._shift import shift_row


def median_at(x, places, reduced):
    """The median of the rows at these places on the reduced axes."""
    moved = np.moveaxis(x, reduced, range(len(reduced)))
    return np.median([moved[place] for place in places], axis=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize(
    ("shape", "reduced", "places"),
    [
        ((5, 8, 3), (0, 1), [(0, 2), (0, 4), (0, 6)]),
        ((5, 8, 4, 3), (0, 1, 2), [(0, 2, 1), (0, 4, 2), (0, 6, 3)]),
        ((5, 3, 2, 3), (0, 1, 2), [(0, 0, 0), (0, 1, 1), (0, 2, 1)]),
        ((5, 2, 3), (0, 1), [(0, 0), (1, 0), (2, 0)]),
        ((2, 2, 3), (0, 1), [(0, 0), (1, 0), (1, 0)]),
        ((1, 1, 3), (0, 1), [(0, 0), (0, 0), (0, 0)]),
        ((7, 3), (0,), [(0,), (1,), (2,)]),
        ((4, 3, 8), (0, 2), [(0, 2), (0, 4), (0, 6)]),
        ((3, 4, 9), (1, 2), [(0, 2), (0, 4), (0, 6)]),
        ((2, 3, 4, 5), (1, 3), [(0, 1), (0, 2), (0, 3)]),
    ],
)
def test_rows_at_the_quarters_of_the_first_example(rng, x64, shape, reduced, places, dtype):
    x = rng.permutation(np.prod(shape)).reshape(shape)
    row = shift_row(jnp.asarray(x, dtype), None, reduced, jnp.ones(()))
    assert row.dtype == dtype
    assert row.shape == tuple(1 if axis in reduced else size for axis, size in enumerate(shape))
    np.testing.assert_array_equal(np.squeeze(row, reduced), median_at(x, places, reduced))


@pytest.mark.parametrize(
    ("valid", "chosen"),
    [
        ([0, 1, 4, 5, 8, 9], [0, 4, 8]),
        ([1, 2, 5, 6, 9, 10], [1, 5, 9]),
        ([3], [3, 3, 3]),
        ([11], [11, 11, 11]),
        ([2, 7], [2, 7, 2]),
        ([5, 6, 7], [5, 5, 5]),
        (range(12), [0, 4, 8]),
    ],
)
@pytest.mark.parametrize("shape", [(12,), (3, 4), (2, 3, 2)])
def test_the_next_valid_rows_from_each_third_on(rng, shape, valid, chosen):
    x = rng.permutation(12 * 2).reshape(*shape, 2).astype(np.float32)
    mask = np.zeros(12, bool)
    mask[list(valid)] = True
    x.reshape(12, 2)[~mask] = np.nan
    reduced = tuple(range(len(shape)))
    row = shift_row(jnp.asarray(x), jnp.asarray(mask.reshape(*shape, 1)), reduced, jnp.float32(len(valid)))
    np.testing.assert_array_equal(np.squeeze(row, reduced), np.median(x.reshape(12, 2)[chosen], axis=0))


def test_nothing_valid_and_nothing_to_reduce():
    x = jnp.arange(6.0).reshape(3, 2) + 1
    nothing = jnp.zeros((3, 1), bool)
    np.testing.assert_array_equal(shift_row(x, nothing, (0,), jnp.float32(0)), np.zeros((1, 2)))
    np.testing.assert_array_equal(shift_row(x, None, (), jnp.float32(1)), x)
    some = jnp.array([[True, False], [False, True], [True, True]])
    np.testing.assert_array_equal(shift_row(x, some, (), jnp.float32(1)), np.where(some, x, 0))
