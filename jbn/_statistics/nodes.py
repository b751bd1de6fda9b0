"""Finding the nodes of a tree that hold the statistics of a norm, by the names of their leaves."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

FIELDS = ("mean", "var", "count")
OF_NORMS = (*FIELDS, "scale", "bias")
COLLECTIONS = ("params", "batch_stats")
Path = tuple[Any, ...]
Statistics = Mapping[Path, Mapping[str, Any]]
"""Some of `mean`, `var` and `count`, by the path of their node."""


class Forest(NamedTuple):
    """A flattened tree: its leaves, its structure, and the places of each node's statistics in the leaves."""

    leaves: list[Any]
    structure: Any
    nodes: dict[Path, dict[str, int]]

    def at(self, path: Path) -> dict[str, Any]:
        """The statistics of a node, by name."""
        return {field: self.leaves[place] for field, place in self.nodes[path].items()}

    def replaced(self, values: Statistics) -> Any:
        """The tree with new statistics in some of its nodes."""
        leaves = list(self.leaves)
        for path, fields in values.items():
            for field, value in fields.items():
                leaves[self.nodes[path][field]] = value
        return self.structure.unflatten(leaves)


def find(tree: Any, name: str) -> Forest:
    """Find every node with a float `mean` and `var`, and its `count` if it has one, of jbn, Linen or NNX.

    Raises:
        ValueError: the tree, called `name` in the message, has no such node.
    """
    nodes = places(tree)
    if not nodes:
        raise ValueError(f"{name} holds no statistics: expected a tree with nodes that have float `mean` and `var`.")
    return Forest(*jax.tree.flatten(tree), nodes)


def places(tree: Any) -> dict[Path, dict[str, int]]:
    """The places of each node's statistics in the leaves of a tree; empty for a tree without statistics."""
    found: dict[Path, dict[str, int]] = {}
    for place, (path, leaf) in enumerate(jax.tree_util.tree_flatten_with_path(tree)[0]):
        # A variable of NNX is a node with one leaf, its value.
        path = path[:-1] if path and _name(path[-1]) == "value" else path
        field = _name(path[-1]) if path else ""
        if field in FIELDS and _is_of(jnp.number if field == "count" else jnp.inexact, leaf):
            found.setdefault(path[:-1], {})[field] = place
    return {path: fields for path, fields in found.items() if {"mean", "var"} <= fields.keys()}


def _is_of(kind: Any, leaf: Any) -> bool:
    """Whether a leaf is an array or number with a dtype of this kind."""
    try:
        return jnp.issubdtype(jnp.result_type(leaf), kind)
    except TypeError:  # for strings and arrays of other libraries
        return False


def shown(path: Path) -> str:
    """The path of a node as text: its keys joined by slashes."""
    return "/".join(map(_name, path))


def _name(key: Any) -> str:
    return jax.tree_util.keystr((key,), simple=True)


def incomplete(tree: Any, norm: re.Pattern[str]) -> dict[Path, list[str]]:
    """The variables that are missing from the nodes of norms, by path.

    These are a `mean` or `var` if only the other is there, a `count` if most other norms have one, and both `mean` and
    `var` if there is only a scale or bias in a node with a name that `norm` matches, and no other node has its
    statistics. Copies of the params, as in the state of an optimizer, are left out.
    """
    members: dict[Path, set[str]] = {}
    for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]:
        path = path[:-1] if path and _name(path[-1]) == "value" else path
        members.setdefault(path[:-1], set()).add(_name(path[-1]) if path else "")
    statistics = {path: names for path, names in members.items() if names & {"mean", "var"} and names <= set(OF_NORMS)}
    counted = sum("count" in names for names in statistics.values()) > len(statistics) / 2
    missing = {
        path: [field for field in FIELDS if field not in names and (field != "count" or counted)]
        for path, names in statistics.items()
    }
    known = {_in_model(path)[0] for path, names in members.items() if path in statistics or {"mean", "var"} <= names}
    alone = [path for path, names in members.items() if path and names and names <= {"scale", "bias"}]
    # The params come first; their copies are then known.
    for path in sorted(alone, key=lambda path: len(_in_model(path))):
        if norm.search(_name(path[-1])) and known.isdisjoint(_in_model(path)):
            missing[path] = ["mean", "var"]
            known.add(_in_model(path)[0])
    return {path: fields for path, fields in missing.items() if fields}


def _in_model(path: Path) -> list[tuple[str, ...]]:
    """The paths that a node may have in its model: what follows a collection of Flax, or else every end of its path."""
    names = tuple(map(_name, path))
    starts = [place + 1 for place, name in enumerate(names) if name in COLLECTIONS][-1:]
    return [names[start:] for start in starts or (*range(1, len(names)), 0)]
