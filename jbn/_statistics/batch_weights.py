"""The weight of a batch in a calibration, for each feature of each norm."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jbn._statistics.faults import named
from jbn._statistics.nodes import Forest, Path, shown

WEIGHTS = (
    "expected a number of at least 0, or a tree like `state` with one array of weights in place of each norm, with a "
    "weight for each feature"
)


def weights_by_feature(
    batch: Any, number: int, weights: Callable[[Any], Any] | None, forest: Forest, chosen: list[Path]
) -> dict[Path, np.ndarray]:
    """The weight of the batch for each feature of each node: the result of `weights`, or the number of examples."""
    given = _examples(batch, number) if weights is None else weights(batch)
    leaves = {shown(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(given)[0]}
    if extra := leaves.keys() - {"", *map(shown, forest.nodes)}:
        raise ValueError(f"`weights` gives batch {number} a weight at {min(extra)}, which is not a norm: {WEIGHTS}.")
    one = np.ndim(leaves.get("", ())) == 0
    found = {}
    for path in chosen:
        weight = given if one else leaves.get(shown(path))
        features = np.shape(forest.at(path)["mean"])
        try:
            array = np.asarray(weight, np.float64)
        except (TypeError, ValueError, OverflowError):
            array = np.array(np.nan)
        if array.shape not in ((), features) or not (np.isfinite(array) & (array >= 0)).all():
            where = "" if one else f" at {named(path)}"
            raise ValueError(
                f"`weights` gives {weight!r}{where} for batch {number}: {WEIGHTS}, here of shape {features}."
            )
        found[path] = np.broadcast_to(array, features)
    return found


def _examples(batch: Any, number: int) -> int:
    """The number of examples in a batch: the size of the leading axis of all its arrays."""
    sizes = sorted({np.shape(leaf)[0] for leaf in jax.tree.leaves(batch) if np.ndim(leaf)})
    if len(sizes) != 1:
        what = f"has arrays with leading axes of sizes {sizes}" if sizes else "has no array with a leading axis"
        raise ValueError(
            f"`batches` yielded batch {number}, which {what}: expected one size, the number of examples. Give "
            "`weights`, a function from a batch to its weight."
        )
    return sizes[0]
