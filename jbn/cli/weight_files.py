"""Read the running statistics in files of weights that NumPy, safetensors, PyTorch or Keras wrote."""

import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jbn.convert._flax import FLAX
from jbn.convert._keras import KERAS
from jbn.convert._torch import TORCH
from jbn.diagnostics._health import BATCH_NORM

NAMES = [
    {name: field for name, field in ((names.mean, "mean"), (names.var, "var"), (names.counter, "count")) if name}
    for names in (TORCH, KERAS, FLAX)
]
"""Names of the statistics of a norm in PyTorch, Keras and Flax."""
PLACES = re.compile(r"(.*?)/?vars/(\d+)$")
"""Keras numbers the variables of a layer in `.weights.h5`: gamma, beta, moving mean and moving variance."""
Arrays = dict[str, Any]


def reads(path: Path) -> bool:
    """Whether the suffix of the name is that of a file of weights."""
    return path.suffix.lower() in READERS


def statistics(path: Path) -> dict[str, dict[str, Any]]:
    """Read mean, variance and count of each norm in a file into a dict from the path of the norm.

    Raises:
        ModuleNotFoundError: the package that reads this file type is not installed.
        ValueError: the file is damaged, or holds no norm.
    """
    read = READERS[path.suffix.lower()]
    try:
        arrays = read(path)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # each library raises errors of its own for a damaged file
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"it is not a complete {path.suffix} file ({type(error).__name__}: {reason})") from None
    norms: dict[str, dict[str, Any]] = {}
    for name, array in _by_name(arrays).items():
        node, _, field = name.rpartition("/")
        norms.setdefault(node, {})[field] = array
    if not any({"mean", "var"} <= norm.keys() for norm in norms.values()):
        half = f", only some statistics of {', '.join(norms)}" if norms else ""
        looked_for = " or ".join(f"{', '.join(names)}" for names in NAMES)
        raise ValueError(f"it has no complete norm{half}: expected arrays named {looked_for}")
    return norms


def _by_name(arrays: Arrays) -> Arrays:
    """Select the statistics among the arrays, and name them norm/mean, norm/var and norm/count."""
    found: Arrays = {}
    layers: dict[str, dict[int, Any]] = {}
    for path, array in arrays.items():
        path = path.removesuffix(":0")
        node, _, name = re.sub(r"\.(?=[^./]*$)", "/", path).rpartition("/")
        if numbered := PLACES.fullmatch(path):
            layers.setdefault(numbered[1], {})[int(numbered[2])] = array
        for names in NAMES:
            if name in names:
                _add(found, f"{node}/{names[name]}", array)
    for layer, variables in layers.items():
        if (
            BATCH_NORM.search(layer.rpartition("/")[2])
            and len(variables) >= 2
            and len({np.shape(one) for one in variables.values()}) == 1
        ):
            *_, mean, var = (variables[place] for place in sorted(variables))
            _add(found, f"{layer}/mean", mean)
            _add(found, f"{layer}/var", var)
    return found


def _add(found: Arrays, path: str, array: Any) -> None:
    if path in found:
        raise ValueError(f"it has two norms at {path.rpartition('/')[0] or 'the root'}, with names of two libraries")
    found[path] = array


def _is_wanted(path: str) -> bool:
    """Whether the name can be that of a statistic; other arrays are not read."""
    name = re.split(r"[/.]", path.removesuffix(":0"))[-1]
    return any(name in names for names in NAMES) or PLACES.fullmatch(path) is not None


def _flat(tree: Any, above: str = "") -> Arrays:
    """A flat dict from paths to the arrays in nested mappings."""
    found: Arrays = {}
    for key, value in tree.items() if isinstance(tree, Mapping) else ():
        path = f"{above}{key}"
        found |= _flat(value, f"{path}/") if isinstance(value, Mapping) else {path: value}
    return {path: value for path, value in found.items() if hasattr(value, "shape") or isinstance(value, int | float)}


def _read_npz(path: Path) -> Arrays:
    """Read without pickle, because a pickle can run code."""
    if not zipfile.is_zipfile(path):
        raise ValueError("not a zip file")
    with np.load(path, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files if _is_wanted(name)}


def _read_safetensors(path: Path) -> Arrays:
    try:
        from safetensors import safe_open
    except ModuleNotFoundError:
        raise _needed("safetensors", path) from None
    # The NumPy framework of safetensors cannot read bfloat16.
    with safe_open(path, framework="flax") as stored:
        names = [name for name in stored.keys() if _is_wanted(name)]  # noqa: SIM118  this is not a mapping
        return {name: stored.get_tensor(name) for name in names}


def _read_torch(path: Path) -> Arrays:
    """Read only tensors and plain containers, so that no code in the file runs."""
    try:
        import torch
    except ModuleNotFoundError:
        raise _needed("torch", path) from None
    stored = _flat(torch.load(path, map_location="cpu", weights_only=True))
    return {name: value.float().numpy() if hasattr(value, "numpy") else value for name, value in stored.items()}


def _read_keras(path: Path) -> Arrays:
    try:
        import h5py
    except ModuleNotFoundError:
        raise _needed("h5py", path) from None
    found: Arrays = {}
    with h5py.File(path, "r") as file:
        file.visititems(lambda name, item: found.update({name: item}) if isinstance(item, h5py.Dataset) else None)
        return {name: item[()] for name, item in found.items() if _is_wanted(name)}


def _needed(package: str, path: Path) -> ModuleNotFoundError:
    return ModuleNotFoundError(f"{path.suffix} files need {package}, which is not installed: pip install {package}")


READERS: dict[str, Callable[[Path], Arrays]] = {
    ".npz": _read_npz,
    ".safetensors": _read_safetensors,
    **dict.fromkeys((".pt", ".pth"), _read_torch),
    **dict.fromkeys((".h5", ".hdf5"), _read_keras),
}
"""The reader for each suffix of a file name."""
