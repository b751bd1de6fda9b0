"""Tolerances by dtype: units of rounding times the condition of the computation."""

import jax
import numpy as np

UNIT = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24, "float64": 2.0**-53}
# A sum of n terms, added pairwise, is off by about log2(n) units. Each result needs a handful of such sums.
SUM = 64
# In each of a few products, values below the smallest normal float32 may be flushed to 0.
FLUSHED = 64 * 2.0**-126


def allowed(dtype: str, condition: float = 1.0) -> float:
    """Relative error of a result made of a few sums in `dtype`, whose inputs are amplified by `condition`."""
    return SUM * UNIT[dtype] * condition


def assert_close(actual, expected, dtype: str = "float32", condition: float = 1.0, scale: float = 0.0) -> None:
    """Each entry is within the allowed error, relative to itself and to the largest term, an entry or `scale`."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    if expected.size:
        bound = allowed(dtype, condition)
        largest = max(np.max(np.abs(expected)), scale)
        np.testing.assert_allclose(actual, expected, rtol=bound, atol=bound * largest)


def assert_rounded(actual, expected, dtype: str, statistics: float = 1e-5) -> None:
    """Each entry is within one rounding of `dtype`, and within an error from the statistics."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    np.testing.assert_allclose(actual, expected, rtol=UNIT[dtype] + statistics, atol=statistics)


def assert_same_trees(actual, expected, case: str = "") -> None:
    """The trees have the same structure, and their leaves are bit-equal and of the same dtype."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected), case
    assert_same(actual, expected, case)


def assert_same(actual, expected, case: str = "") -> None:
    """The leaves are bit-equal and of the same dtype."""
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.asarray(a).dtype == np.asarray(e).dtype, (case, a, e)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(e), err_msg=case)


def assert_moments(actual, expected, x, dtype: str = "float32") -> None:
    """Compare mean, variance and count; the error of the mean is relative to the largest value of x."""
    largest = np.max(np.abs(np.asarray(x, np.float64)), initial=0)
    assert_close(actual.mean, expected.mean, dtype, scale=largest)
    assert_close(actual.var, expected.var, dtype)
    np.testing.assert_array_equal(actual.count, expected.count)
