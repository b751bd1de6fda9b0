"""Shapes, dtypes and inputs that several test modules share."""

import numpy as np

LAYOUTS = [
    ((7, 3), -1),
    ((3, 7), 0),
    ((4, 5, 3), -1),
    ((4, 3, 5), 1),
    ((2, 3, 4, 5), -1),
    ((2, 5, 3, 4), 1),
    ((2, 3, 2, 3, 4), -1),
    ((2, 4, 3, 2, 3), 1),
    ((3, 2, 4, 5), (1, 3)),
    ((3, 2, 4, 5), (-1, 0)),
    ((1, 1, 9, 2), -1),
]
LOW_PRECISION = ["bfloat16", "float16"]
FAR = 1e3


def ill_conditioned(rng, rows, ratio, case):
    """Input of spread 1 about the mean `ratio`; in masked cases, a mask of one in a hundred rows, and NaN elsewhere."""
    x = (rng.normal(size=(rows, 4)) + ratio).astype(np.float32)
    mask = None
    if "masked" in case:
        mask = rng.random(rows) < 0.01
        x[~mask] = np.nan
    if "first row" in case:
        x[0] += FAR
    if "second row" in case:
        x[1] += FAR
    if "first valid row" in case:
        x[np.flatnonzero(mask)[0]] += FAR
    return x, mask
