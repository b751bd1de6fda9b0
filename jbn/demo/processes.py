"""Several processes, each with devices of its own, as one run: joining, the devices of all, the one that writes."""

import itertools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from jbn.demo.options import AUTOMATIC, OptionError, Options

Prepared = TypeVar("Prepared")


def join(options: Options) -> None:
    """Connect to the other processes, if the run has any; before jax is first used."""
    if options.coordinator is None:
        return
    address = None if options.coordinator == AUTOMATIC else options.coordinator
    try:
        jax.distributed.initialize(address, options.num_processes, options.process_id)
    except (RuntimeError, ValueError) as error:
        raise OptionError(f"--coordinator is {options.coordinator}, where no run could be joined: {error}") from None


def writes() -> bool:
    """Whether this process is the one that looks, prints and writes."""
    return jax.process_index() == 0


def chosen_devices(devices: int | None) -> list[Any]:
    """All devices, or so many of each process, those of one process side by side."""
    ordered = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    grouped = itertools.groupby(ordered, key=lambda device: device.process_index)
    return [device for _, own in grouped for device in itertools.islice(own, devices)]


def own_copy(tree: Any) -> Any:
    """Arrays that all devices hold, as arrays of one device of this process."""
    return jax.tree.map(lambda array: array.addressable_data(0), tree)


def from_writer(tree: Any) -> Any:
    """The writing process's NumPy arrays, bit for bit, in every process, whose own have the same shapes."""
    if jax.process_count() == 1:
        return tree
    sent = multihost_utils.broadcast_one_to_all(jax.tree.map(_bytes_of, tree))
    return jax.tree.map(lambda raw, own: np.asarray(raw).view(own.dtype).reshape(own.shape), sent, tree)


def agreed(prepare: Callable[[], Prepared]) -> Prepared | None:
    """What the writing process prepares, and None in the others; its refusal ends them all."""
    prepared, refusal = None, None
    if writes():
        try:
            prepared = prepare()
        except OptionError as error:
            refusal = error
    refused = from_writer(np.array(refusal is not None))
    if refused:
        raise refusal or OptionError("process 0 refused to start, and says why.")
    return prepared


def _bytes_of(array: np.ndarray) -> np.ndarray:
    """Bytes, since the transport adds zeros, which would turn -0.0 to 0.0."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
