"""Preparation of a tree before `split`: renaming, leaving out and squeezing leaves."""

import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jbn.convert._places import FLAT, key_of, separator_of

Rename = Callable[[str], str] | Mapping[str, str]
MAPPINGS = ("torch", "keras", "linen", "nnx")
"""Libraries with trees that are mappings."""


def prepared(tree: Any, library: str, rename: Rename | None, ignore: str | Sequence[str]) -> Any:
    """The tree with renamed paths and without the ignored leaves."""
    patterns = (ignore,) if isinstance(ignore, str) else ignore
    if not isinstance(patterns, Sequence) or any(not isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"`ignore` is {ignore!r}: expected patterns of paths, each a str such as '*/ema'.")
    if rename is None and not patterns:
        return tree
    if library not in MAPPINGS or not isinstance(tree, Mapping):
        raise ValueError(
            f"`rename` and `ignore` are for mappings of {', '.join(MAPPINGS)}, but `library` is {library!r} and "
            f"`tree` is a {type(tree).__name__}: change its paths first."
        )
    separator = separator_of(library)
    if isinstance(rename, Mapping):
        _check_parts(rename, tree, separator)
    result: dict[Any, Any] = {}
    taken: dict[tuple[Any, ...], str] = {}
    for keys, leaf in _leaves(tree):
        old = separator.join(map(str, keys))
        if any(fnmatch.fnmatchcase(old, pattern) for pattern in patterns):
            continue
        new = _renamed(old, rename, separator)
        parts = (new,) if library in FLAT else new.split(separator)
        place = keys if new == old else tuple(key_of(part, library) for part in parts)
        if place in taken:
            raise ValueError(f"`rename` maps both {taken[place]} and {old} to {new}: expected a path for each.")
        taken[place] = old
        _put(result, place, leaf, old)
    return result


def squeezed(entries: Mapping[str, Any], counter: str | None) -> dict[str, Any]:
    """Arrays without axes of size 1, as in (1, 1, 1, C) and (C, 1, 1); an array of a single feature keeps one axis."""
    return {name: _squeezed(value, () if name == counter else (1,)) for name, value in entries.items()}


def _squeezed(value: Any, of_one: tuple[int, ...]) -> Any:
    """The array without axes of size 1; `of_one` is the resulting shape of a single value."""
    if 1 not in getattr(value, "shape", ()):
        return value
    value = value[...] if hasattr(value, "get_value") else value
    return value.reshape(tuple(size for size in value.shape if size != 1) or of_one)


def _leaves(tree: Mapping[Any, Any], above: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*above, key))
        else:
            yield (*above, key), value


def _renamed(path: str, rename: Rename | None, separator: str) -> str:
    """The new path, by a function of the path or by a mapping of its parts."""
    if rename is None:
        return path
    if isinstance(rename, Mapping):
        parts = (rename.get(part, part) for part in path.split(separator))
        return separator.join(part for part in parts if part)
    if not callable(rename):
        raise TypeError(
            f"`rename` is {rename!r}: expected a function from path to path, or a mapping from parts of paths to "
            "other parts, such as {'gamma': 'scale'}."
        )
    new = rename(path)
    if not isinstance(new, str):
        raise TypeError(f"`rename` gives {new!r} for {path}: expected a path, a str.")
    return new


def _check_parts(rename: Mapping[str, str], tree: Mapping[Any, Any], separator: str) -> None:
    """Check that each key of a mapping is a complete part of some path, and each value a str."""
    if any(not isinstance(value, str) for value in rename.values()):
        raise TypeError(f"`rename` is {dict(rename)!r}: expected a str for each part, or '' to drop it.")
    parts = {part for keys, _ in _leaves(tree) for part in separator.join(map(str, keys)).split(separator)}
    if unknown := [key for key in rename if key not in parts]:
        raise ValueError(
            f"`rename` has {', '.join(map(repr, unknown))}, which no path has between its separators {separator!r}: "
            f"expected complete parts such as {', '.join(map(repr, sorted(parts)[:5]))}. For other changes give a "
            "function, such as lambda path: path.removeprefix('module.')."
        )


def _put(tree: dict[Any, Any], place: tuple[Any, ...], leaf: Any, old: str) -> None:
    """Insert a leaf at its place in nested dicts."""
    *above, last = place
    for key in above:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise ValueError(f"`rename` puts {old} below another leaf: expected a path of its own.")
    if last in tree:
        raise ValueError(f"`rename` puts {old} where other leaves are: expected a path of its own.")
    tree[last] = leaf
