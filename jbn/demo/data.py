"""The handwritten digits of scikit-learn: 1797 real images of 8 x 8 pixels, which the package contains."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

Array = jax.Array | np.ndarray


class Examples(NamedTuple):
    """Images, float32 of shape (n, 8, 8, 1) with values in [0, 1], and labels, int32 of shape (n,)."""

    images: Array
    labels: Array


class Digits(NamedTuple):
    """The training set and the held-out set (20% of the images). The split is the same for every seed."""

    train: Examples
    held_out: Examples


def load() -> Digits:
    """Load all digits and split them; both sets have the same share of each label."""
    pixels, targets = load_digits(return_X_y=True)
    images = np.asarray(pixels, np.float32).reshape(-1, 8, 8, 1) / 16
    labels = np.asarray(targets, np.int32)
    split = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    train, held_out = (Examples(images[chosen], labels[chosen]) for chosen in split)
    return Digits(train, held_out)


def batches(examples: Examples, size: int, seed: int, share: tuple[int, int] = (0, 1)) -> Iterator[Examples]:
    """Yield batches without end, in an order that the seed determines.

    Each epoch visits each example at most once: it drops a last batch that is too short. `share` is (index, number of
    parts): the part of each batch of `size` examples that this process loads.
    """
    which, parts = share
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(examples.labels))
        for start in range(0, len(order) - size + 1, size):
            chosen = np.split(order[start : start + size], parts)[which]
            yield Examples(examples.images[chosen], examples.labels[chosen])
