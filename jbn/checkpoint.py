"""Functions that read checkpoints of orbax and flax.serialization, with or without a target tree to check against."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import serialization
from jax.sharding import AbstractMesh, SingleDeviceSharding

from jbn._statistics import nodes
from jbn._statistics.upgrade import fits, for_each_feature

NUMBERS = bool | int | float | complex
ORBAX_MARK = "_METADATA"
Leaves = dict[tuple[str, ...], Any]


def restore(path: str | Path, target: Any) -> Any:
    """Restore a tree from a checkpoint bit for bit, after a check that paths, shapes and dtypes match `target`.

    tree = restore(saved(tree), tree)

    Both formats store `Params` and `State` as dicts, and `restore` returns them with the types of `target`. A
    checkpoint of jbn 0.1 has one count for all features of a norm. If the target has one for each feature, the count is
    converted as in `jbn.upgrade`.

    Args:
        path: a directory that `orbax.checkpoint.StandardCheckpointer` wrote (`step/default` in the directory of a
            `CheckpointManager`), or a file with the bytes of `flax.serialization.to_bytes`.
        target: a tree of the expected structure, with arrays or the result of `jax.eval_shape`. Arrays from orbax get
            the shardings of the target.

    Returns:
        The tree, with the structure of `target` and jax arrays. A leaf is a NumPy array if the target of an orbax
        checkpoint has one there, or if its dtype has 64 bits and `jax_enable_x64` is off.

    Raises:
        FileNotFoundError: nothing exists at `path`.
        PermissionError: `path` is not readable.
        TypeError: `path` is not a path, or `target` has a leaf that is neither an array nor a number. Convert random
            keys with `jax.random.key_data`.
        ValueError: the file is truncated or not a checkpoint, or its tree does not match. The error lists what is
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
        The formats of orbax and Flax.
    """
    path, expected = _existing(path), _checked_target(target)
    opened = _opened_orbax if path.is_dir() else _opened_bytes
    stored, load = _whole(path, lambda: opened(path))
    old = _old_counts(target, expected, stored)
    _check_same(path, stored | {where: expected[where] for where in old}, expected)
    loaded = _whole(path, lambda: load(expected | old))
    loaded |= {where: _raised(loaded[where], expected[where], placed=path.is_dir()) for where in old}
    # The loaded leaves are checked too, since orbax casts to the requested shapes and dtypes.
    _check_same(path, loaded, expected)
    return jax.tree.structure(target).unflatten([loaded[where] for where in expected])


def read(path: str | Path) -> Any:
    """Read the tree of a checkpoint without a target, as nested dicts of NumPy arrays.

    Args:
        path: a directory that orbax wrote, or a file with the bytes of `flax.serialization.to_bytes`.

    Returns:
        The tree.

    Raises:
        FileNotFoundError: nothing exists at `path`.
        TypeError: `path` is not a path.
        ValueError: the file is truncated or not a checkpoint.

    Example:
        >>> import tempfile, pathlib
        >>> from flax import serialization
        >>> import jbn
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "norm.msgpack"
        >>> written = file.write_bytes(serialization.to_bytes(jbn.init(2)[1]))
        >>> print(jbn.checkpoint.read(file)["var"])
        [1. 1.]

    Source:
        The formats of orbax and Flax.
    """
    path = _existing(path)
    return _whole(
        path, lambda: _read_orbax(path) if path.is_dir() else serialization.msgpack_restore(path.read_bytes())
    )


def latest(path: str | Path) -> Path:
    """Find the latest checkpoint in a folder, such as the directory of an orbax CheckpointManager.

    Args:
        path: a checkpoint, which is returned, or a folder. `latest` searches the subfolder `checkpoints` or, without
            one, the subfolder with the highest number. A folder without such subfolders must contain exactly one
            checkpoint.

    Returns:
        Path of the checkpoint.

    Raises:
        FileNotFoundError: nothing exists at `path`.
        TypeError: `path` is not a path.
        ValueError: the folder that was searched has no checkpoint, or several.

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
        The directory layout of orbax.
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
        raise ValueError(f"`path` is {path}, a folder with {len(items)} checkpoints of orbax ({found}): give one.")
    return items[0]


def _existing(path: Any) -> Path:
    """The absolute path of an existing file or directory."""
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"`path` is a {type(path).__name__}: expected the path of a file or directory.")
    path = Path(path).absolute()
    if not path.exists():
        raise FileNotFoundError(f"`path` is {path}, which does not exist: expected a file or directory.")
    return path


def _read_orbax(path: Path) -> Any:
    """The tree with NumPy arrays, of the shapes and dtypes in its metadata."""
    with ocp.StandardCheckpointer() as checkpointer:
        metadata = _metadata(checkpointer, path)
        numpy = jax.tree.map(lambda leaf: leaf if isinstance(leaf, NUMBERS) else np.zeros(*_described(leaf)), metadata)
        return checkpointer.restore(path, numpy)


def _metadata(checkpointer: ocp.StandardCheckpointer, path: Path) -> Any:
    metadata = checkpointer.metadata(path).item_metadata
    if metadata is None:
        raise ValueError("it has no orbax metadata; in the directory of a CheckpointManager, give step/default")
    return metadata.tree


def _opened_orbax(path: Path) -> tuple[Leaves, Callable[[Leaves], Leaves]]:
    """The leaves in the metadata of a checkpoint, and a function that loads them."""
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
    """The result of `read`; the many kinds of exceptions that damaged files cause become one ValueError."""
    try:
        return read()
    except PermissionError:
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0][:200]
        raise ValueError(
            f"`path` {path} is not a complete checkpoint ({type(error).__name__}: {reason}): expected a directory that "
            "orbax wrote, or a file with the bytes of flax.serialization.to_bytes."
        ) from None


def _check_same(path: Path, given: Leaves, expected: Leaves) -> None:
    """Raise an error that lists all leaves that are missing, extra, or of another shape or dtype."""
    found = [f"{_shown(where)} is missing" for where in expected if where not in given]
    found += [f"{_shown(where)} is extra" for where in given if where not in expected]
    for where, leaf in expected.items():
        if where in given:
            (shape, dtype), (expected_shape, expected_dtype) = _described(given[where]), _described(leaf)
            if shape != expected_shape:
                found.append(f"{_shown(where)} has shape {shape}, not {expected_shape}")
            # For Python numbers only the kind must agree: bool, int or float.
            same = dtype.kind == expected_dtype.kind if isinstance(leaf, NUMBERS) else dtype == expected_dtype
            if not same:
                found.append(f"{_shown(where)} has dtype {dtype}, not {expected_dtype}")
    if found:
        listed = "\n  ".join(found)
        end = _levels(given, expected)
        raise ValueError(f"the checkpoint at `path` {path} does not match `target`{end}\n  {listed}")


def _levels(given: Leaves, expected: Leaves) -> str:
    """The end of the first line of an error, which says if only one of the trees has the level `value` of nnx.state."""
    state, pure = "nnx.state(model)", "nnx.to_pure_dict(nnx.state(model))"
    for name, longer, shorter, saved in (("checkpoint", given, expected, state), ("target", expected, given, pure)):
        if any(where[-1:] == ("value",) and where[:-1] in shorter for where in longer):
            reason = f"the checkpoint was saved from {saved}. Pass {saved} as the target."
            return f". The {name} has one more level, `value`: {reason}"
    return ":"


def _old_counts(target: Any, expected: Leaves, stored: Leaves) -> Leaves:
    """Shape and dtype of the counts of jbn 0.1: one for a norm or for each norm of a stack, float32 if averaged."""
    wheres, old = list(expected), {}
    for fields in nodes.places(target).values():
        where = wheres[fields.get("count", fields["mean"])]
        if "count" not in fields or where not in stored:
            continue
        (shape, dtype), wanted = _described(stored[where]), _described(expected[where])
        features, _ = _described(expected[wheres[fields["mean"]]])
        is_old = dtype == np.int32 or (dtype == np.float32 and shape != features)
        if is_old and wanted == (features, np.float32) and fits(shape, features):
            old[where] = jax.ShapeDtypeStruct(shape, dtype)
    return old


def _raised(count: Any, leaf: Any, placed: bool) -> Any:
    """A count of jbn 0.1 for each feature; if `placed`, with the sharding and array type of the target's leaf."""
    raised = for_each_feature(jnp.asarray(count), leaf)
    if not placed:
        return raised
    if isinstance(leaf, np.ndarray):
        return np.asarray(raised)
    return raised if leaf.sharding is None else jax.device_put(raised, leaf.sharding)


def _checked_target(target: Any) -> Leaves:
    """The leaves of the target, each checked to be an array or a number."""
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
    """The leaves of a tree by their paths, in which fields, keys and indices are all strings."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {tuple(jax.tree_util.keystr((key,), simple=True) for key in path): leaf for path, leaf in leaves}


def _described(leaf: Any) -> tuple[tuple[int, ...], Any]:
    """The shape and dtype of a leaf."""
    if isinstance(leaf, NUMBERS):
        return (), np.asarray(leaf).dtype
    return tuple(leaf.shape), leaf.dtype


def _abstract(leaf: Any) -> Any:
    """A description of a leaf for orbax; without a sharding, orbax requires the devices that wrote the checkpoint."""
    if isinstance(leaf, NUMBERS | np.ndarray | jax.Array):
        return leaf
    if not _has_jax(leaf.dtype) or isinstance(leaf, np.generic):
        return np.zeros(leaf.shape, leaf.dtype)
    # On an explicit mesh, jax.eval_shape gives an abstract mesh, which names no devices.
    named = leaf.sharding is not None and not isinstance(getattr(leaf.sharding, "mesh", None), AbstractMesh)
    sharding = leaf.sharding if named else SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _has_jax(dtype: Any) -> bool:
    """Whether jax supports the dtype; 64-bit dtypes must be enabled."""
    return jax.dtypes.canonicalize_dtype(dtype) == dtype


def _as_jax(leaf: Any) -> Any:
    """A jax array with the same bits if jax supports the dtype; Python numbers are returned unchanged."""
    return jnp.asarray(leaf) if isinstance(leaf, np.ndarray | np.generic) and _has_jax(leaf.dtype) else leaf
