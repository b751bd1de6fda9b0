"""Trees from checkpoints of orbax and flax.serialization, checked against what is expected, or as they are stored."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import serialization

from jbn._statistics import nodes
from jbn._statistics.upgrade import for_each_feature

NUMBERS = bool | int | float | complex
ORBAX_MARK = "_METADATA"
Leaves = dict[tuple[str, ...], Any]


def restore(path: str | Path, target: Any) -> Any:
    """A tree from a checkpoint, bit for bit, once its paths, shapes and dtypes are found to be those of `target`.

    restore(saved(tree), tree) = tree

    Neither format keeps the types of jbn: both write `Params` and `State` as dicts, and the target brings them back. A
    count that jbn 0.1 wrote, one for all features of a norm, is raised as by `jbn.upgrade` where the target has one for
    each feature.

    Args:
        path: a directory that `orbax.checkpoint.StandardCheckpointer` wrote, which in a `CheckpointManager`'s is
            `step/default`, or a file with the bytes of `flax.serialization.to_bytes`.
        target: a tree of the expected structure, of arrays or of what `jax.eval_shape` gives. From orbax, arrays come
            with the shardings that it has.

    Returns:
        The tree, of the structure of `target`, of jax arrays; NumPy's where orbax's target has them, or where jax has
        not turned 64 bits on.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        PermissionError: it may not be read.
        TypeError: path is no path, or target has a leaf that is no array and no number; random keys go by
            `jax.random.key_data`.
        ValueError: the checkpoint is cut off or no checkpoint, or it is of another tree; the error lists what is
            missing, extra or misshaped.

    Example:
        >>> import tempfile, pathlib
        >>> from flax import serialization
        >>> import jbn
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "norm.msgpack"
        >>> written = file.write_bytes(serialization.to_bytes(jbn.init(2)))
        >>> params, state = jbn.checkpoint.restore(file, jbn.init(2))
        >>> print(state.var)
        [1. 1.]

    Source:
        orbax and Flax, whose formats these are.
    """
    path, expected = _existing(path), _checked_target(target)
    opened = _opened_orbax if path.is_dir() else _opened_bytes
    stored, load = _whole(path, lambda: opened(path))
    old = _old_counts(target, expected, stored)
    _check_same(path, stored | {where: expected[where] for where in old}, expected)
    loaded = _whole(path, lambda: load(expected | old))
    loaded |= {where: _raised(loaded[where], expected[where], placed=path.is_dir()) for where in old}
    # What was loaded too, since orbax casts to what it is asked for.
    _check_same(path, loaded, expected)
    return jax.tree.structure(target).unflatten([loaded[where] for where in expected])


def read(path: str | Path) -> Any:
    """The tree of a checkpoint as it is stored, without a target: nested dicts of NumPy arrays.

    Args:
        path: a directory that orbax wrote, or a file with the bytes of `flax.serialization.to_bytes`.

    Returns:
        The tree.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        TypeError: path is no path.
        ValueError: the checkpoint is cut off or no checkpoint.

    Example:
        >>> import tempfile, pathlib
        >>> from flax import serialization
        >>> import jbn
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "norm.msgpack"
        >>> written = file.write_bytes(serialization.to_bytes(jbn.init(2)[1]))
        >>> print(jbn.checkpoint.read(file)["var"])
        [1. 1.]

    Source:
        orbax and Flax, whose formats these are.
    """
    path = _existing(path)
    return _whole(
        path, lambda: _read_orbax(path) if path.is_dir() else serialization.msgpack_restore(path.read_bytes())
    )


def latest(path: str | Path) -> Path:
    """The checkpoint in a folder: itself, or the last step, and the item, of orbax's CheckpointManager.

    Args:
        path: a checkpoint, or a folder that holds one in a folder `checkpoints`, in its highest number, or as its only
            item.

    Returns:
        Its path.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        TypeError: path is no path.
        ValueError: the folder holds no checkpoint, or several items.

    Example:
        >>> import tempfile, pathlib
        >>> import orbax.checkpoint as ocp
        >>> import jbn
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> with ocp.StandardCheckpointer() as checkpointer:
        ...     for step in (9, 10):
        ...         checkpointer.save(folder / str(step) / "default", jbn.init(2))
        >>> print(jbn.checkpoint.latest(folder).relative_to(folder))
        10/default

    Source:
        orbax, whose layout this is.
    """
    path = _existing(path)
    if path.is_file() or (path / ORBAX_MARK).exists():
        return path
    if (path / "checkpoints").is_dir():
        return latest(path / "checkpoints")
    steps = [folder for folder in path.iterdir() if folder.is_dir() and folder.name.isdigit()]
    if steps:
        return latest(max(steps, key=lambda folder: int(folder.name)))
    items = [folder for folder in path.iterdir() if (folder / ORBAX_MARK).exists()]
    if len(items) != 1:
        found = ", ".join(sorted(item.name for item in items)) or "none"
        raise ValueError(f"`path` is {path}, a folder with {len(items)} checkpoints of orbax ({found}): name one.")
    return items[0]


def _existing(path: Any) -> Path:
    """The absolute path of something that is there."""
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"`path` is a {type(path).__name__}: expected the path of a file or directory.")
    path = Path(path).absolute()
    if not path.exists():
        raise FileNotFoundError(f"`path` is {path}, where there is nothing: expected a file or directory.")
    return path


def _read_orbax(path: Path) -> Any:
    """The tree with NumPy arrays in the shapes that it says that it has."""
    with ocp.StandardCheckpointer() as checkpointer:
        metadata = _metadata(checkpointer, path)
        numpy = jax.tree.map(lambda leaf: leaf if isinstance(leaf, NUMBERS) else np.zeros(*_described(leaf)), metadata)
        return checkpointer.restore(path, numpy)


def _metadata(checkpointer: ocp.StandardCheckpointer, path: Path) -> Any:
    metadata = checkpointer.metadata(path).item_metadata
    if metadata is None:
        raise ValueError("it has no metadata of orbax; in a CheckpointManager's directory give step/default")
    return metadata.tree


def _opened_orbax(path: Path) -> tuple[Leaves, Callable[[Leaves], Leaves]]:
    """What the checkpoint says that it holds, and the way to load it."""
    with ocp.StandardCheckpointer() as checkpointer:
        metadata = _metadata(checkpointer, path)
    structure, stored = jax.tree.structure(metadata), _leaves(metadata)

    def load(expected: Leaves) -> Leaves:
        target = structure.unflatten([_abstract(expected[where]) for where in stored])
        with ocp.StandardCheckpointer() as checkpointer:
            return _leaves(checkpointer.restore(path, target))

    return stored, load


def _opened_bytes(path: Path) -> tuple[Leaves, Callable[[Leaves], Leaves]]:
    stored = _leaves(serialization.msgpack_restore(path.read_bytes()))
    return stored, lambda _: {where: _as_jax(leaf) for where, leaf in stored.items()}


def _whole(path: Path, read: Callable[[], Any]) -> Any:
    """What `read` gives, or one error for the many kinds that damaged files raise in the libraries that read them."""
    try:
        return read()
    except PermissionError:
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0][:200]
        raise ValueError(
            f"`path` {path} holds no whole checkpoint ({type(error).__name__}: {reason}): expected a directory that "
            "orbax wrote, or a file with the bytes of flax.serialization.to_bytes."
        ) from None


def _check_same(path: Path, given: Leaves, expected: Leaves) -> None:
    """No leaf of one tree that the other has not, or has in another shape or dtype."""
    found = [f"{_shown(where)} is missing" for where in expected if where not in given]
    found += [f"{_shown(where)} is extra" for where in given if where not in expected]
    for where, leaf in expected.items():
        if where in given:
            (shape, dtype), (expected_shape, expected_dtype) = _described(given[where]), _described(leaf)
            if shape != expected_shape:
                found.append(f"{_shown(where)} has shape {shape}, not {expected_shape}")
            # Of Python's numbers only the kind is said: bool, int or float.
            same = dtype.kind == expected_dtype.kind if isinstance(leaf, NUMBERS) else dtype == expected_dtype
            if not same:
                found.append(f"{_shown(where)} has dtype {dtype}, not {expected_dtype}")
    if found:
        listed = "\n  ".join(found)
        raise ValueError(f"the checkpoint at `path` {path} is not one of `target`:\n  {listed}")


def _old_counts(target: Any, expected: Leaves, stored: Leaves) -> Leaves:
    """Shape and dtype of the counts of jbn 0.1, int32: one for all features of a norm, one for each norm of a stack."""
    wheres, old = list(expected), {}
    for fields in nodes.places(target).values():
        where = wheres[fields.get("count", fields["mean"])]
        if "count" not in fields or where not in stored:
            continue
        (shape, dtype), wanted = _described(stored[where]), _described(expected[where])
        features, _ = _described(expected[wheres[fields["mean"]]])
        if dtype == np.int32 and wanted == (features, np.float32) and shape == features[: len(shape)]:
            old[where] = jax.ShapeDtypeStruct(shape, dtype)
    return old


def _raised(count: Any, leaf: Any, placed: bool) -> Any:
    """A count of jbn 0.1 for each feature, where and of the kind that the target has it if arrays are placed so."""
    raised = for_each_feature(jnp.asarray(count), leaf)
    if not placed:
        return raised
    if isinstance(leaf, np.ndarray):
        return np.asarray(raised)
    return raised if leaf.sharding is None else jax.device_put(raised, leaf.sharding)


def _checked_target(target: Any) -> Leaves:
    """The leaves of the target, each an array or a number."""
    expected = _leaves(target)
    for where, leaf in expected.items():
        if not isinstance(leaf, jax.ShapeDtypeStruct | np.ndarray | np.generic | jax.Array | NUMBERS):
            raise TypeError(f"`target` has a {type(leaf).__name__} at {_shown(where)}: expected arrays.")
        if not isinstance(leaf, NUMBERS) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise TypeError(f"`target` has a random key at {_shown(where)}: save and restore jax.random.key_data(key).")
    return expected


def _shown(where: tuple[str, ...]) -> str:
    return "/".join(where) or "the tree itself"


def _leaves(tree: Any) -> Leaves:
    """The leaves of a tree by their paths, in which a field, a key and a place are all the same."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {tuple(jax.tree_util.keystr((key,), simple=True) for key in path): leaf for path, leaf in leaves}


def _described(leaf: Any) -> tuple[tuple[int, ...], Any]:
    """Shape and dtype."""
    if isinstance(leaf, NUMBERS):
        return (), np.asarray(leaf).dtype
    return tuple(leaf.shape), leaf.dtype


def _abstract(leaf: Any) -> Any:
    """What orbax needs to know of a leaf: without a sharding it would ask for the devices that wrote the checkpoint."""
    if isinstance(leaf, NUMBERS | np.ndarray | jax.Array):
        return leaf
    if not _has_jax(leaf.dtype) or isinstance(leaf, np.generic):
        return np.zeros(leaf.shape, leaf.dtype)
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _has_jax(dtype: Any) -> bool:
    """Whether jax has the dtype, which for 64 bits is to be turned on."""
    return jax.dtypes.canonicalize_dtype(dtype) == dtype


def _as_jax(leaf: Any) -> Any:
    """A jax array of the same bits, where jax has the dtype; Python's numbers stay as they are."""
    return jnp.asarray(leaf) if isinstance(leaf, np.ndarray | np.generic) and _has_jax(leaf.dtype) else leaf
