"""Which rows the moments are taken about: a wrong choice would be seen as lost digits only, and only for some data."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jbn._shift import shift_row

compiled_row = jax.jit(shift_row, static_argnames="reduced")


def median_at(x, places, reduced):
    """The median of the rows at these places on the reduced axes."""
    moved = np.moveaxis(x, reduced, range(len(reduced)))
    return np.median([moved[place] for place in places], axis=0)


ROWS = [
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
]


def assert_row(rng, shape, reduced, places, dtype="float32"):
    x = rng.permutation(np.prod(shape)).reshape(shape)
    row = compiled_row(x.astype(dtype), None, reduced=reduced, count=np.float32(1))
    assert row.dtype == dtype
    assert row.shape == tuple(1 if axis in reduced else size for axis, size in enumerate(shape))
    np.testing.assert_array_equal(np.squeeze(row, reduced), median_at(x, places, reduced), err_msg=f"{shape} {dtype}")


def test_without_a_mask_rows_are_at_the_quarters_of_the_first_example(rng):
    """Or of the first three examples, where an example has fewer than three rows."""
    for shape, reduced, places in ROWS:
        assert_row(rng, shape, reduced, places)


def test_rows_of_every_dtype_are_exact(rng, x64):
    """bfloat16 by its bits, where the program is for a CPU."""
    for dtype in ("bfloat16", "float16", "float64"):
        for shape, reduced, places in (ROWS[0], ROWS[3], ROWS[7]):
            assert_row(rng, shape, reduced, places, jnp.dtype(dtype))


CHOSEN = [
    ([0, 1, 4, 5, 8, 9], [0, 4, 8]),
    ([1, 2, 5, 6, 9, 10], [1, 5, 9]),
    ([3], [3, 3, 3]),
    ([11], [11, 11, 11]),
    ([2, 7], [2, 7, 2]),
    ([5, 6, 7], [5, 5, 5]),
    (range(12), [0, 4, 8]),
]


def test_with_a_mask_rows_are_the_next_valid_ones_from_each_third_on(rng):
    for shape in ((12,), (3, 4), (2, 3, 2)):
        for valid, chosen in CHOSEN:
            x = rng.permutation(12 * 2).reshape(12, 2).astype(np.float32)
            mask = np.isin(range(12), valid)
            x[~mask] = np.nan
            reduced = tuple(range(len(shape)))
            row = compiled_row(
                x.reshape(*shape, 2), mask.reshape(*shape, 1), reduced=reduced, count=np.float32(len(valid))
            )
            expected = np.median(x[chosen], axis=0)
            np.testing.assert_array_equal(np.squeeze(row, reduced), expected, err_msg=f"{shape}, {list(valid)}")


def test_where_nothing_is_valid_the_row_is_zero():
    x = np.arange(6, dtype=np.float32).reshape(3, 2) + 1
    row = compiled_row(x, np.zeros((3, 1), bool), reduced=(0,), count=np.float32(0))
    np.testing.assert_array_equal(row, np.zeros((1, 2)))


def test_where_nothing_is_reduced_the_row_is_the_data():
    x = np.arange(6, dtype=np.float32).reshape(3, 2) + 1
    row = functools.partial(compiled_row, reduced=(), count=np.float32(1))
    some = np.array([[True, False], [False, True], [True, True]])
    np.testing.assert_array_equal(row(x, None), x)
    np.testing.assert_array_equal(row(x, some), np.where(some, x, 0))
