"""Every norm of a model at once: taken out of a tree by library, and put back."""

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
"""Fewer scales than this may be of at most 0 by chance."""
NOT_POSITIVE = 0.25
"""The share of scales of at most 0 from which those of a norm lie around 0."""


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
    """Every batch norm of a model, converted, and the rest of the tree as it was.

    norms, rest = split(tree, library)

    Args:
        tree: "torch": `model.state_dict()`. "keras": `{v.path: v for v in model.variables}`, where layers of one name
            would share a path: name them. "linen": variables, without boxes. "nnx": `nnx.state(model)` or a nested
            mapping of its arrays. "haiku": `(params, state)`. "equinox": `(model, state)`.
        library: "torch", "keras", "linen", "nnx", "haiku" or "equinox".
        count: the updates that the averages of every feature stand for, instead of those that the tree holds, which
            are 0 where it does not count. A momentum schedule goes on from there.
        rename: for mappings in which a project has names of its own, in the rest too: a function from the path of a
            leaf to another, as `lambda path: path.removeprefix("module.")`, or a mapping from a part of a path, between
            separators, to another, as `{"gamma": "scale"}`; an empty one drops the part.
        ignore: patterns of the paths of leaves to leave out, such as `"*/bn/steps"`; `*` stands for any characters.
        squeeze: drop axes of size 1 of the norms' arrays, as in shapes (1, 1, 1, C) and (C, 1, 1).
        scale_offset: added to every scale, in float32 at least; 1.0 for projects that store gamma - 1. If it is 0 and
            the scales of all norms lie around 0, a UserWarning says that they may be stored so.

    Returns:
        Params and State by the path of the norm, with the library's own separator: `norms["layer1.0.bn1"]`,
        `norms["Block_0/BatchNorm_0"]`. The tree without their arrays, in dicts, which may have become empty, and with
        the counts of Flax, which say where `join` shall put them; for Equinox, the model with None in their places.
        Arrays of JAX are handed over as they are, others are copied; half-precision statistics come as float32.

    Raises:
        TypeError: tree is not of the kind that the library needs, count is no int, or an option of another kind.
        ValueError: unknown library, no batch norm in the tree, or entries that are missing, extra or misshaped; the
            error lists them all. What looks like a batch norm and is none is to be ignored.

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
            f"`tree` holds no batch norm of {names.library}: expected `{names.mean}` and `{names.var}` somewhere in "
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
    """The tree of a model from its norms and the rest; the inverse of `split`.

    join(*split(tree, library), library) = tree, but for half-precision statistics and NumPy's lack of bfloat16, which
    come back as float32, for PyTorch's `num_batches_tracked`, which is written where there was none too, and for what
    the options of `split` changed

    Args:
        norms: Params and State by the path of the norm, as `split` gives them.
        rest: the tree without them; it is not changed.
        library: "torch", "keras", "linen" or "nnx".
        with_count: "linen" and "nnx": store the count, which jbn's modules with a momentum schedule read, also where
            the tree had none.

    Returns:
        The tree, of dicts; the arrays of the norms in NumPy for PyTorch, whose `load_state_dict` takes
        `{name: torch.as_tensor(array) for name, array in tree.items()}`, and for Keras.

    Raises:
        TypeError: something that is no Params or State.
        ValueError: unknown library, or a norm whose place in `rest` is taken.

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
    check_mapping("norms", norms, "the norms that split gave, by their paths")
    check_mapping("rest", rest, "the tree without its norms")
    tree = copied(rest)
    for where, norm in norms.items():
        if not isinstance(where, str):
            raise TypeError(f"`norms` has the key {where!r}: expected paths such as split gives, each a str.")
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
    """The parameters with a number added to the scale, in float32 at least: half precision is finer near 0."""
    scale = params.scale
    return params if scale is None else params._replace(scale=scale.astype(arithmetic_dtype(scale.dtype)) + offset)


def _warn_of_scales(scales: list[jax.Array]) -> None:
    """Scales are mostly positive, but for norms that start from 0, as at the end of residual branches."""
    if any(isinstance(scale, Tracer) for scale in scales) or sum(scale.size for scale in scales) < ENOUGH:
        return
    if all(scale.size and np.mean(np.asarray(scale) <= 0) >= NOT_POSITIVE for scale in scales):
        warnings.warn(
            f"the scales of all {len(scales)} norms lie around 0, as if they were gamma - 1: if so, give "
            "scale_offset=1.0.",
            stacklevel=3,
        )


def _check_library(library: Any, known: tuple[str, ...]) -> None:
    if library not in known:
        raise ValueError(f"`library` is {library!r}: expected one of {', '.join(map(repr, known))}.")
