"""Trees from checkpoints of orbax and flax.serialization, checked against what is expected before they are used."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import serialization


def restore(path: str | Path, target: Any) -> Any:
    """A tree from a checkpoint, bit for bit, once its paths, shapes and dtypes are found to be those of `target`.

    restore(saved(tree), tree) = tree

    Neither format keeps the types of jbn: both write `Params` and `State` as dicts, and the target brings them back.

    Args:
        path: a directory that `orbax.checkpoint.StandardCheckpointer` wrote, or a file with the bytes of
            `flax.serialization.to_bytes`.
        target: a tree of the expected structure, of arrays or of what `jax.eval_shape` gives. From orbax, arrays come
            with its shardings.

    Returns:
        The tree, of the structure of `target`, its leaves as they were saved.

    Raises:
        FileNotFoundError: there is nothing at `path`.
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
    path = Path(path).absolute()
    if not path.exists():
        raise FileNotFoundError(f"`path` is {path}, where there is nothing.")
    opened = _opened_orbax if path.is_dir() else _opened_bytes
    stored, load = _whole(path, lambda: opened(path))
    different = _differences(stored, target)
    if different:
        listed = "\n  ".join(different)
        raise ValueError(f"the checkpoint at `path` {path} is not one of `target`:\n  {listed}")
    return _whole(path, lambda: load(target))


def _opened_orbax(path: Path) -> tuple[Any, Callable[[Any], Any]]:
    """What the checkpoint says that it holds, and the way to load it."""

    def load(target: Any) -> Any:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(path, target)

    with ocp.StandardCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(path).item_metadata
    if metadata is None:
        raise ValueError("it has no metadata of orbax")
    return metadata.tree, load


def _opened_bytes(path: Path) -> tuple[Any, Callable[[Any], Any]]:
    stored: Any = serialization.msgpack_restore(path.read_bytes())
    return stored, lambda target: serialization.from_state_dict(target, stored)


def _whole(path: Path, read: Callable[[], Any]) -> Any:
    """What `read` gives, or one error for the many kinds that damaged files raise in the libraries that read them."""
    try:
        return read()
    except Exception as error:
        reason = str(error).partition("\n")[0][:200]
        raise ValueError(
            f"`path` {path} holds no whole checkpoint ({type(error).__name__}: {reason}): expected a directory that "
            "orbax wrote, or a file with the bytes of flax.serialization.to_bytes."
        ) from None


def _differences(stored: Any, target: Any) -> list[str]:
    """Leaves of one tree that the other has not, or has in another shape or dtype."""
    given, expected = _leaves(stored), _leaves(target)
    found = [f"{path} is missing" for path in expected if path not in given]
    found += [f"{path} is extra" for path in given if path not in expected]
    for path, leaf in expected.items():
        if path in given:
            for what, a, e in zip(("shape", "dtype"), _described(given[path]), _described(leaf), strict=True):
                if a != e and e is not None:
                    found.append(f"{path} has {what} {a}, not {e}")
    return found


def _leaves(tree: Any) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _described(leaf: Any) -> tuple[tuple[int, ...], Any]:
    """Shape and dtype; Python's numbers have no dtype of their own."""
    return tuple(np.shape(leaf) if np.isscalar(leaf) else leaf.shape), getattr(leaf, "dtype", None)
