"""The places of batch norm arrays in the trees of each library."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from jbn._core.state import Params, State
from jbn.convert._equinox import EQUINOX, entries_of, is_norm
from jbn.convert._flax import FLAX, LINEN, to_linen, to_nnx
from jbn.convert._haiku import AVERAGES, HAIKU, flattened
from jbn.convert._keras import KERAS, to_keras
from jbn.convert._names import Names, check_mapping
from jbn.convert._torch import TORCH, to_torch

Nodes = dict[str, dict[str, Any]]
Found = tuple[Names, Nodes, Any]
FLAT = {"torch": (".", to_torch), "keras": ("/", to_keras)}
TREES = {
    "torch": "the mapping model.state_dict()",
    "keras": "the mapping {v.path: v for v in model.variables}",
    "linen": "the mapping of variables, with params and batch_stats",
    "nnx": "the mapping nnx.state(model)",
    "haiku": "the pair (params, state)",
    "equinox": "the pair (model, state)",
}


def find(tree: Any, library: str) -> Found:
    """The names of a library, the arrays of each norm in a tree by path, and the tree without them."""
    pair = library in ("haiku", "equinox")
    if not (isinstance(tree, tuple) and len(tree) == 2 if pair else isinstance(tree, Mapping)):
        raise TypeError(f"`tree` is a {type(tree).__name__}: for {library!r} expected {TREES[library]}.")
    return FINDERS[library](tree)


def _find_flat(names: Names, separator: str, tree: Mapping[str, Any]) -> Found:
    """Find nodes with a mean or a variance; a node with only one is found too, so that it is reported."""
    nodes = {
        node: entries
        for node, entries in _by_node(tree, separator).items()
        if names.mean in entries or names.var in entries
    }
    return names, nodes, _without(tree, nodes, separator)


def _find_linen(tree: Mapping[str, Any]) -> Found:
    for name in LINEN:
        if not isinstance(tree.get(name, {}), Mapping):
            raise TypeError(f"`tree` has a {type(tree[name]).__name__} at {name}: expected a mapping.")
    params, statistics = (_by_node(tree.get(name, {}), "/") for name in LINEN)
    # Both are required, since other collections may hold a `mean`.
    nodes = {
        node: {**params.get(node, {}), **entries}
        for node, entries in statistics.items()
        if {"mean", "var"} <= entries.keys()
    }
    return FLAX, nodes, {key: _without(value, nodes, "/") if key in LINEN else value for key, value in tree.items()}


def _find_nnx(tree: Mapping[str, Any]) -> Found:
    nodes = {node: entries for node, entries in _by_node(tree, "/").items() if {"mean", "var"} <= entries.keys()}
    return FLAX, nodes, _without(tree, nodes, "/")


def _find_haiku(tree: tuple[Mapping[str, Any], Mapping[str, Any]]) -> Found:
    params, state = tree
    for name, mapping in (("params", params), ("state", state)):
        check_mapping(name, mapping, f"in {TREES['haiku']}")
    nodes: Nodes = {}
    for path, value in state.items():
        node, _, name = path.rpartition("/~/")
        if name in AVERAGES:
            nodes.setdefault(node, dict(params.get(node, {})))[name] = value
    others = {path: value for path, value in state.items() if path.rpartition("/~/")[2] not in AVERAGES}
    rest = {path: value for path, value in params.items() if path not in nodes}
    return HAIKU, {node: flattened(entries) for node, entries in nodes.items()}, (rest, others)


def _find_equinox(tree: tuple[Any, Any]) -> Found:
    model, state = tree
    leaves, structure = jax.tree_util.tree_flatten_with_path(model, is_leaf=is_norm)
    nodes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): entries_of(leaf, state)
        for path, leaf in leaves
        if is_norm(leaf)
    }
    return EQUINOX, nodes, (structure.unflatten([None if is_norm(leaf) else leaf for _, leaf in leaves]), state)


FINDERS: dict[str, Callable[[Any], Found]] = {
    "torch": functools.partial(_find_flat, TORCH, "."),
    "keras": functools.partial(_find_flat, KERAS, "/"),
    "linen": _find_linen,
    "nnx": _find_nnx,
    "haiku": _find_haiku,
    "equinox": _find_equinox,
}


def leaves_of(where: str, params: Params, state: State, library: str) -> dict[str, Any]:
    """The arrays of a norm, by their paths in the tree of a library."""
    if library in FLAT:
        separator, write = FLAT[library]
        return {_joined(where, name, separator): leaf for name, leaf in write(params, state).items()}
    if library == "nnx":
        arrays = to_nnx(params, state, with_count=True)
        return {_joined(where, name, "/"): leaf for name, leaf in arrays.items()}
    variables = to_linen(params, state, with_count=True)
    return {
        _joined(_joined(collection, where, "/") if where else collection, name, "/"): leaf
        for collection, arrays in variables.items()
        for name, leaf in arrays.items()
    }


def insert(tree: dict[Any, Any], path: str, leaf: Any, library: str, with_count: bool) -> None:
    """Insert a leaf into a tree of dicts, in existing dicts as far as they follow the path.

    An occupied place is an error. Flax's count replaces a count that is there; otherwise it is inserted only if
    `with_count` is True.
    """
    separator = separator_of(library)
    node, left = _furthest(tree, path, separator)
    *above, name = [left] if library in FLAT else left.split(separator)
    counter = library not in FLAT and name == FLAX.counter
    if counter and not with_count and name not in node:
        return
    for part in above:
        node = node.setdefault(key_of(part, library), {})
        if not isinstance(node, dict):
            break
    if not isinstance(node, dict) or (node.get(name) is not None and not counter):
        raise ValueError(f"`rest` already has an entry at {path}: expected the tree without its norms.")
    node[name] = leaf


def separator_of(library: str) -> str:
    """The separator between the parts of a path."""
    return FLAT[library][0] if library in FLAT else "/"


def key_of(part: str, library: str) -> str | int:
    """The key for a part of a new path; in NNX, a number is an index into a sequence."""
    return int(part) if library == "nnx" and part.isdigit() else part


def _furthest(node: dict[Any, Any], path: str, separator: str) -> tuple[dict[Any, Any], str]:
    """The innermost existing mapping on a path, and the rest of the path from there."""
    ends = [(node, path)]
    for key, below in node.items():
        if isinstance(below, dict) and path.startswith(f"{key}{separator}"):
            ends.append(_furthest(below, path.removeprefix(f"{key}{separator}"), separator))
    return min(ends, key=lambda end: len(end[1]))


def copied(tree: Mapping[Any, Any]) -> dict[Any, Any]:
    """The same leaves in new dicts."""
    return {key: copied(value) if isinstance(value, Mapping) else value for key, value in tree.items()}


def _by_node(tree: Mapping[Any, Any], separator: str) -> Nodes:
    """The leaves of a tree, by the path of their node and then by name."""
    nodes: Nodes = {}
    for where, leaf in _leaves(tree, separator):
        node, _, name = where.rpartition(separator)
        nodes.setdefault(node, {})[name] = leaf
    return nodes


def _leaves(tree: Mapping[Any, Any], separator: str, above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        where = _joined(above, key, separator)
        if isinstance(value, Mapping):
            yield from _leaves(value, separator, where)
        else:
            yield where, value


def _without(tree: Mapping[Any, Any], nodes: Nodes, separator: str, above: str = "") -> dict[Any, Any]:
    """The tree without the arrays of some nodes.

    Mappings are kept, so that `join` finds each place again. Counts of Flax are kept to show where one was stored.
    """
    kept: dict[Any, Any] = {}
    for key, value in tree.items():
        where = _joined(above, key, separator)
        if isinstance(value, Mapping):
            kept[key] = _without(value, nodes, separator, where)
        elif where.rpartition(separator)[0] not in nodes or value is None or key == FLAX.counter:
            kept[key] = value
    return kept


def _joined(above: str, key: Any, separator: str) -> str:
    return f"{above}{separator}{key}" if above else str(key)
