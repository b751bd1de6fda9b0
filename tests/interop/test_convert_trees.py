"""`split` and `join` change only the norms, and list all problems of a tree that cannot be converted."""

import jax
import numpy as np
import pytest
from support.refusals import Refused, assert_refused
from support.tolerances import assert_same_trees

import jbn
from jbn.convert import from_torch, join, split

ONE, TWO = np.ones(1, np.float32), np.ones(2, np.float32)
FLAX = {"scale": TWO, "mean": np.zeros(2, np.float32), "var": np.full(2, 3, np.float32)}
TORCH = {"running_mean": TWO, "running_var": TWO}
NESTED = {
    "places turned to strings": ("nnx", {"blocks": {"0": FLAX, "1": {"kernel": TWO}}}),
    "nothing but norms": ("nnx", {"blocks": {"0": FLAX, "1": FLAX}}),
    "places": ("nnx", {"blocks": {0: FLAX, 1: FLAX}}),
    "separators in keys": ("nnx", {"a/b": {"c": FLAX}, "a": {"d/e": {"f": FLAX}}}),
    "the norm alone": ("nnx", FLAX),
    "a checkpoint around it": (
        "torch",
        {"epoch": TWO, "model": {"a.bn.running_mean": TWO, "a.bn.running_var": TWO, "b": TWO}},
    ),
    "what is None": ("torch", {"bn.weight": None, "bn.bias": None, "bn.running_mean": TWO, "bn.running_var": TWO}),
    "mappings all the way": ("torch", {"a": {"bn": TORCH}, "b": {}}),
}


def without_counts(tree):
    """The tree without the entries that `join` adds for PyTorch."""
    if not isinstance(tree, dict):
        return tree
    return {
        name: without_counts(below) for name, below in tree.items() if not str(name).endswith("num_batches_tracked")
    }


def test_mappings_come_back_nested_as_they_were():
    for case, (library, tree) in NESTED.items():
        assert_same_trees(without_counts(join(*split(tree, library), library)), tree, case)


def test_what_is_given_stays_as_it_was():
    tree = {
        "params": {"norm": {"scale": TWO}, "dense": {"kernel": TWO}},
        "batch_stats": {"norm": {"mean": TWO, "var": TWO}},
    }
    copy = jax.tree.map(np.copy, tree)
    norms, rest = split(tree, "linen")
    kept = jax.tree.map(np.copy, rest)
    join(norms, rest, "linen")["params"]["dense"]["kernel"] = None
    assert_same_trees(tree, copy, "split")
    assert_same_trees(rest, kept, "join")


WRONG = {
    "missing": ({"bn.running_mean": TWO}, ["bn: `running_var` is missing"]),
    "missing the other": ({"bn.running_var": TWO}, ["bn: `running_mean` is missing"]),
    "extra": ({"bn.running_mean": TWO, "bn.running_var": TWO, "bn.gamma": TWO}, ["bn: `gamma` is extra"]),
    "misshaped": (
        {"a.running_mean": TWO, "a.running_var": ONE, "b.running_mean": TWO, "b.running_var": TWO, "b.weight": ONE},
        ["a: `running_var` has shape (1,), not (2,) as `running_mean`", "b: `weight` has shape (1,), not (2,)"],
    ),
    "a norm alone": (
        {**TORCH, "weight": np.ones(2, int), "bias": "heavy", "num_batches_tracked": np.ones(3)},
        [
            "`weight` has dtype int32, not a float one",
            "`bias` is a str, which cannot be converted to an array",
            "`num_batches_tracked` has shape (3,), not (2,) or ()",
        ],
    ),
}


def test_one_error_lists_all_that_is_wrong_with_each_norm():
    for case, (tree, messages) in WRONG.items():
        calls = [lambda tree=tree: split(tree, "torch")]
        calls += [lambda tree=tree: from_torch(tree)] if case == "a norm alone" else []
        for call in calls:
            with pytest.raises(ValueError, match="not those of a batch norm in PyTorch") as caught:
                call()
            assert [message for message in messages if message not in str(caught.value)] == [], case


NORM = jbn.init(2)
REFUSED = {
    "library": Refused(lambda: split({}, "mxnet"), ValueError, "library", "is 'mxnet'", "one of 'torch', 'keras'"),
    "only from": Refused(lambda: join({}, {}, "haiku"), ValueError, "library", "is 'haiku'", "'linen', 'nnx'"),
    "no tree": Refused(lambda: split([TWO], "torch"), TypeError, "tree", "is a list", "the mapping model.state_dict()"),
    "no norm in a tree": Refused(
        lambda: split({"weight": TWO}, "torch"), ValueError, "tree", "no batch norm of PyTorch", "`running_mean` and"
    ),
    "no norms": Refused(lambda: join([], {}, "torch"), TypeError, "norms", "is a list", "the norms that split returns"),
    "no rest": Refused(lambda: join({}, None, "nnx"), TypeError, "rest", "is a NoneType", "the tree without its norms"),
    "a number for a path": Refused(
        lambda: join({0: NORM}, {}, "torch"), TypeError, "norms", "the key 0", "paths as split returns them"
    ),
    "no pair at a path": Refused(
        lambda: join({"bn": None}, {}, "torch"), TypeError, "norms", "None at bn", "(Params, State)"
    ),
    "a pair of numbers at a path": Refused(
        lambda: join({"bn": (1, 2)}, {}, "torch"), TypeError, "norms", "(1, 2) at bn", "(Params, State)"
    ),
    "place taken": Refused(
        lambda: join({"bn": NORM}, {"bn.weight": 1}, "torch"), ValueError, "rest", "at bn.weight", "the tree without"
    ),
    "place taken above": Refused(
        lambda: join({"bn": NORM}, {"params": {"bn": TWO}}, "linen"),
        ValueError,
        "rest",
        "already has an entry at params/bn/scale",
        "the tree without",
    ),
    "a path of Flax": Refused(
        lambda: join({"block/bn": NORM}, {}, "torch"), ValueError, "norms", "has the path block/bn", "layer1.0.bn1"
    ),
    "a count for Keras": Refused(
        lambda: join({}, {}, "keras", with_count=True), ValueError, "with_count", "'keras'", "leave it out"
    ),
}


def test_trees_and_norms_of_another_kind_are_refused():
    assert_refused(REFUSED)
