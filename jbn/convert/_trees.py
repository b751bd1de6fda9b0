"""Conversion of every norm of a model: split from the tree of a library, and joined again."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from jbn._arguments import check_flag, is_number
from jbn._core.state import Params, State
from jbn._dtypes import arithmetic_dtype
from jbn.convert._names import check_mapping, read_all, refuse
from jbn.convert._places import FINDERS, TREES, copied, find, insert, leaves_of
from jbn.convert._prepare import Rename, prepared, squeezed

ENOUGH = 16
"""Fewer scales than this may be at most 0 by chance."""
NOT_POSITIVE = 0.25
"""The share of scales of at most 0 from which the scales of a norm are said to lie around 0."""


def split(
    tree: Any,
    library: str,
    *,
    count: int | None = None,
    rename: Rename | None = None,
    ignore: str | Sequence[str] = (),
    squeeze: bool = False,
    scale_offset: float = 0.0,
) -> tuple[dict[str, tuple[Params, State]], Any]:
    """Split a model into its batch norms, as Params and State, and the rest of the tree.

    norms, rest = split(tree, library)

    Args:
        tree: "torch": `model.state_dict()`. "keras": `{v.path: v for v in model.variables}`; give each layer a name of
            its own, since layers with the same name share a path. "linen": variables, without boxes. "nnx":
            `nnx.state(model)` or a nested mapping of its arrays. "haiku": `(params, state)`. "equinox":
            `(model, state)`.
        library: "torch", "keras", "linen", "nnx", "haiku" or "equinox".
        count: number of updates of every feature. It replaces the counts in the tree; without either, the count is 0. A
            momentum schedule continues from it.
        rename: changes paths that differ from the library's; the rest has the new paths too. For trees that are
            mappings only. It is a function from the path of a leaf to its new path, such as `lambda path:
            path.removeprefix("module.")`, or a mapping from parts of a path between separators to new parts, such as
            `{"gamma": "scale"}`; "" drops the part.
        ignore: patterns for the paths of leaves to leave out, such as `"*/bn/steps"`; `*` matches any characters.
        squeeze: drop axes of size 1 from the arrays of norms, as in shapes (1, 1, 1, C) and (C, 1, 1).
        scale_offset: number added to every scale, in float32 at least; 1.0 for projects that store gamma - 1. If it is
            0 and the scales of all norms lie around 0, a UserWarning says that they may be stored as gamma - 1.

    Returns:
        Params and State by the path of the norm, with the separator of the library, as in `norms["layer1.0.bn1"]` and
        `norms["Block_0/BatchNorm_0"]`, and the rest: the tree without the arrays of norms. The rest consists of dicts,
        some of which may be empty, and keeps the counts of Flax, which tell `join` where to store counts. For Equinox
        it is the model with None in place of each norm. In the norms, JAX arrays are unchanged, others are copied, and
        statistics in half precision become float32. The rest has the arrays of the tree itself: tensors of PyTorch
        share their memory with the model.

    Raises:
        TypeError: tree is not of the kind that the library needs, count is not an int, or an option has the wrong type.
        ValueError: the library is unknown, the tree has no batch norm, or entries are missing, extra or misshaped. The
            error lists all of them. Use `ignore` for entries that only look like a batch norm.

    Example:
        >>> import numpy as np
        >>> import jbn
        >>> one = np.ones(2, np.float32)
        >>> state_dict = {"conv.weight": one, "bn.running_mean": one, "bn.running_var": one}
        >>> norms, rest = jbn.convert.split(state_dict, "torch")
        >>> print(list(norms), list(rest), norms["bn"][1].mean)
        ['bn'] ['conv.weight'] [1. 1.]

    Source:
        jbn's own convention.
    """
    _check_library(library, tuple(FINDERS))
    offset = _checked_offset(scale_offset)
    names, nodes, rest = find(prepared(tree, library, rename, ignore), library)
    if not nodes:
        raise ValueError(
            f"`tree` has no batch norm of {names.library}: expected `{names.mean}` and `{names.var}` in "
            f"{TREES[library]}."
        )
    check_flag("squeeze", squeeze, "drop axes of size 1", "keep them")
    nodes = {where: squeezed(entries, names.counter) for where, entries in nodes.items()} if squeeze else nodes
    norms, problems = read_all(names, nodes, count)
    refuse(names.library, problems)
    if offset == 0:
        _warn_of_scales([params.scale for params, _ in norms.values() if params.scale is not None])
        return norms, rest
    return {where: (_moved(params, offset), state) for where, (params, state) in norms.items()}, rest


def join(norms: Mapping[str, tuple[Params, State]], rest: Any, library: str, *, with_count: bool = False) -> Any:
    """Put converted norms back into the tree of a model; the inverse of `split`.

    tree = join(*split(tree, library), library)

    There are three exceptions. Statistics in half precision, and bfloat16 arrays that pass through NumPy, come back as
    float32. PyTorch's `num_batches_tracked` is always written. Changes that options of `split` made are not undone.

    Args:
        norms: Params and State by the path of the norm, as `split` returns them.
        rest: the tree without the norms; it is not changed.
        library: "torch", "keras", "linen" or "nnx".
        with_count: for "linen" and "nnx": store the count, which jbn's modules with a momentum schedule read, even if
            the tree had none.

    Returns:
        The tree, as dicts. The arrays of norms are NumPy arrays for Keras and for PyTorch, where `load_state_dict`
        accepts `{name: torch.as_tensor(array) for name, array in tree.items()}`.

    Raises:
        TypeError: norms or rest is not a mapping, or a norm is not a pair of Params and State.
        ValueError: the library is unknown, a path is not one of the library, or `rest` already has an entry there.

    Example:
        >>> import jbn
        >>> variables = jbn.convert.join({"Block_0/BatchNorm_0": jbn.init(2)}, {}, "linen")
        >>> sorted(variables["batch_stats"]["Block_0"]["BatchNorm_0"])
        ['mean', 'var']

    Source:
        jbn's own convention.
    """
    _check_library(library, ("torch", "keras", "linen", "nnx"))
    if with_count and library not in ("linen", "nnx"):
        raise ValueError(f"`with_count` is for linen and nnx, but `library` is {library!r}: leave it out.")
    check_mapping("norms", norms, "the norms that split returns, by their paths")
    check_mapping("rest", rest, "the tree without its norms")
    tree = copied(rest)
    for where, norm in norms.items():
        if not isinstance(where, str):
            raise TypeError(f"`norms` has the key {where!r}: expected paths as split returns them, each a str.")
        if library == "torch" and "/" in where:
            raise ValueError(
                f"`norms` has the path {where}, with the separator of Flax and Keras: expected paths of PyTorch, such "
                "as layer1.0.bn1, and in `rest` the other arrays by such paths."
            )
        if [type(part) for part in (norm if isinstance(norm, tuple) else ())] != [Params, State]:
            raise TypeError(f"`norms` has {norm!r} at {where}: expected (Params, State).")
        for path, leaf in leaves_of(where, *norm, library).items():
            insert(tree, path, leaf, library, with_count)
    return tree


def _checked_offset(offset: Any) -> float:
    if not is_number(offset) or not np.isfinite(float(offset)):
        raise TypeError(f"`scale_offset` is {offset!r}: expected a number, 1.0 for scales stored as gamma - 1.")
    return float(offset)


def _moved(params: Params, offset: float) -> Params:
    """The parameters with the offset added to the scale, in float32 at least, since half precision is finer near 0."""
    scale = params.scale
    return params if scale is None else params._replace(scale=scale.astype(arithmetic_dtype(scale.dtype)) + offset)


def _warn_of_scales(scales: list[jax.Array]) -> None:
    """Warn if the scales look like gamma - 1; usually scales are positive, except in norms that start from 0."""
    if any(isinstance(scale, Tracer) for scale in scales) or sum(scale.size for scale in scales) < ENOUGH:
        return
    if all(scale.size and np.mean(np.asarray(scale) <= 0) >= NOT_POSITIVE for scale in scales):
        warnings.warn(
            f"The scales of all {len(scales)} norms lie around 0 and may be stored as gamma - 1. If so, pass "
            "scale_offset=1.0.",
            stacklevel=3,
        )


def _check_library(library: Any, known: tuple[str, ...]) -> None:
    if library not in known:
        raise ValueError(f"`library` is {library!r}: expected one of {', '.join(map(repr, known))}.")
