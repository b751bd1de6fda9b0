"""Scikit-learn's handwritten digits: 1797 real images of 8 x 8 pixels, shipped with the package."""

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
    """The training set and the held-out fifth, the same for every seed."""

    train: Examples
    held_out: Examples


def load() -> Digits:
    """All digits, split in two with the same share of each label."""
    pixels, targets = load_digits(return_X_y=True)
    images = np.asarray(pixels, np.float32).reshape(-1, 8, 8, 1) / 16
    labels = np.asarray(targets, np.int32)
    split = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    train, held_out = (Examples(images[chosen], labels[chosen]) for chosen in split)
    return Digits(train, held_out)


def batches(examples: Examples, size: int, seed: int, share: tuple[int, int] = (0, 1)) -> Iterator[Examples]:
    """Batches without end, an example once an epoch, in an order fixed by the seed; a short last batch is left out.

    `share` is (which, of how many): the part of each batch of `size` examples that one process loads.
    """
    which, parts = share
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(examples.labels))
        for start in range(0, len(order) - size + 1, size):
            chosen = np.split(order[start : start + size], parts)[which]
            yield Examples(examples.images[chosen], examples.labels[chosen])
