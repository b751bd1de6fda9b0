"""Hypothesis strategies for batches of any layout, dtype, scale and offset, for masks, and for norms.

Each new shape or dtype is compiled, so shapes come from a table, and everything else is arbitrary. The profile `quick`
takes a few shapes, `thorough` the full table in each dtype, and `free_shapes` draws arbitrary shapes.
"""

from typing import NamedTuple

import jax
import ml_dtypes
import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

import jbn
from support import reference
from support.inputs import LAYOUTS
from support.tolerances import UNIT

TABLE = [
    *LAYOUTS,
    *[((rows, 2), -1) for rows in (1, 2, 3, 5, 8, 33)],
    ((1, 1), 0),
    ((6, 1), -1),
    ((9,), ()),
    ((1, 4, 2), -1),
    ((4, 1, 2), 1),
    ((2, 3, 4), (0, 2)),
    ((2, 2, 1, 3, 2), (1, 4)),
    ((2, 1, 2, 2, 2, 3), -1),
    ((2, 2, 1, 2, 2, 1, 2), 3),
    ((0, 3), -1),
    ((3, 0), -1),
    ((2, 0, 3), -1),
]
QUICK = {
    "float32": [((7, 3), -1), ((3, 7), 0), ((1, 2), -1), ((0, 3), -1), ((2, 2, 1, 3, 2), (1, 4))],
    "bfloat16": [((33, 2), -1)],
    "float16": [((4, 3, 5), 1)],
    "float64": [((7, 3), -1), ((2, 2, 1, 3, 2), (1, 4))],
}
"""Odd sizes, features first, one row, no row, many rows, high rank, two feature axes."""
FLOATS = {"float32": np.float32, "float64": np.float64, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
LAST_COUNT = 2**24
MOMENTA = st.one_of(st.sampled_from([0.0, 0.5, 0.99, 1.0]), st.floats(0, 1))
COUNTS = st.one_of(st.integers(0, 99), st.integers(0, LAST_COUNT), st.just(LAST_COUNT))
"""A float32 count stays at 2**24 when it gets there."""
RUNNING_VAR = st.sampled_from(["biased", "unbiased", "total"])


class Batch(NamedTuple):
    x: np.ndarray
    feature_axis: int | tuple[int, ...]
    mask: np.ndarray | None
    rounding: float = 0.0
    """How far a computed center may be outside the range of the values, relative to the values."""

    @property
    def reduced(self):
        feature = reference.feature_axes(self.feature_axis, self.x.ndim)
        return tuple(axis for axis in range(self.x.ndim) if axis not in feature)

    @property
    def valid(self):
        """The mask with the shape of x."""
        if self.mask is None:
            return np.ones(self.x.shape, bool)
        by_feature = self.mask.ndim == self.x.ndim
        feature = () if by_feature else reference.feature_axes(self.feature_axis, self.x.ndim)
        return np.broadcast_to(np.expand_dims(self.mask, feature), self.x.shape)

    @property
    def features(self):
        return tuple(size for axis, size in enumerate(self.x.shape) if axis not in self.reduced)

    def over_x(self, vector):
        """A vector of the features with the rank of x."""
        return np.expand_dims(np.asarray(vector, np.float64), self.reduced)

    def spread(self):
        """The largest valid value of each feature minus the smallest: no center is further from a value."""
        x = np.asarray(self.x, np.float64)
        highest = np.max(x, axis=self.reduced, where=self.valid, initial=-np.inf)
        lowest = np.min(x, axis=self.reduced, where=self.valid, initial=np.inf)
        highest, lowest = (np.where(highest < lowest, 0, end) for end in (highest, lowest))
        return highest - lowest + self.rounding * np.maximum(np.abs(highest), np.abs(lowest))

    def fits(self):
        """Whether sums of squared deviations are within the range of the arithmetic."""
        largest = np.finfo(np.float64 if self.x.dtype == np.float64 else np.float32).max
        with np.errstate(over="ignore"):
            return bool(np.all(self.spread() ** 2 * max(self.x.size, 1) < largest / 4))


@st.composite
def _free_layouts(draw):
    shape = draw(st.lists(st.integers(0, 5), min_size=1, max_size=5).map(tuple))
    axes = draw(st.sets(st.integers(0, len(shape) - 1), max_size=len(shape) - 1).map(lambda axes: tuple(sorted(axes))))
    return shape, draw(st.sampled_from([axes, axes[0]])) if len(axes) == 1 else axes


def few(quickly, otherwise):
    """The first strategy in the profile `quick`, which has no time to compile many programs."""
    return st.deferred(lambda: quickly if settings.get_current_profile_name() == "quick" else otherwise)


def layouts(dtypes):
    """Shape, feature axis and dtype."""
    quick = st.sampled_from([(*layout, dtype) for dtype in dtypes for layout in QUICK[dtype]])
    shapes_are_free = settings.get_current_profile_name() == "free_shapes"
    drawn = _free_layouts() if shapes_are_free else st.sampled_from(TABLE)
    return few(quick, st.builds(lambda layout, dtype: (*layout, dtype), drawn, st.sampled_from(dtypes)))


def arrays(shape, bound=4):
    """Arrays that shrink to simple ones, and random ones of a seed."""
    elements = st.floats(-bound, bound, width=32, allow_subnormal=False)
    seeded = st.integers(0, 2**32 - 1).map(
        lambda seed: np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    )
    return st.one_of(npst.arrays(np.float32, shape, elements=elements), seeded)


@st.composite
def batches(draw, dtypes=("float32", "bfloat16", "float16"), smallest=-30, largest=15, masked=None):
    """Values with a scale of 10**smallest to 10**largest, and offsets of up to a million times the scale."""
    shape, feature_axis, dtype = draw(layouts(dtypes))
    dtype = FLOATS[dtype]
    limits = ml_dtypes.finfo(dtype)
    scale = 10.0 ** draw(st.integers(smallest, largest))
    offset = scale * draw(st.sampled_from([0, 0, 1, -3, 1e2, -1e4, 1e6]))
    x = np.asarray(draw(arrays(shape)), np.float64) * scale + offset
    x = np.clip(x, float(limits.min), float(limits.max)).astype(dtype)
    batch = Batch(x, feature_axis, None)
    if draw(st.booleans()) if masked is None else masked:
        by_feature = draw(few(st.just(dtype == np.float32), st.booleans()))
        mask = draw(npst.arrays(bool, shape if by_feature else [shape[axis] for axis in batch.reduced]))
        # With a mask, sums are taken about a rounded mean.
        batch = batch._replace(mask=mask, rounding=4 * UNIT["float64" if dtype == np.float64 else "float32"])
    return batch


@st.composite
def norms(draw, features, dtype="float32", scale=1.0):
    """Params and running statistics of the features."""
    params = jbn.Params(*(draw(arrays(features)).astype(dtype) for _ in range(2)))
    mean = (draw(arrays(features)) * np.float64(scale)).astype(dtype)
    var = (np.abs(draw(arrays(features))) * np.float64(scale) ** 2).astype(dtype)
    return params, jbn.State(mean, var, np.full(features, draw(COUNTS), np.float32))


def next_count(count):
    """The count after an update."""
    return np.minimum(count + 1, np.float32(LAST_COUNT))


def arithmetic(batch):
    """The arithmetic dtype of a batch, and a context in which JAX allows it."""
    double = batch.x.dtype == np.float64
    return ("float64" if double else "float32"), jax.enable_x64(double)
