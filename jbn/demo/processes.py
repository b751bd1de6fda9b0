"""One run in several processes: connect them, list the devices of all, and send arrays from process 0 to all."""

import itertools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from jbn.demo.options import AUTOMATIC, OptionError, Options

Prepared = TypeVar("Prepared")


def join(options: Options) -> None:
    """Connect to the other processes, if there are any. Call this before the first use of JAX."""
    if options.coordinator is None:
        return
    address = None if options.coordinator == AUTOMATIC else options.coordinator
    try:
        jax.distributed.initialize(address, options.num_processes, options.process_id)
    except (RuntimeError, ValueError) as error:
        raise OptionError(
            f"--coordinator is {options.coordinator}, but the processes could not connect: {error}"
        ) from None


def writes() -> bool:
    """Whether this process is process 0, which looks at the network, prints and writes."""
    return jax.process_index() == 0


def chosen_devices(devices: int | None) -> list[Any]:
    """All devices, or the first `devices` of each process; devices of one process are adjacent."""
    ordered = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    grouped = itertools.groupby(ordered, key=lambda device: device.process_index)
    return [device for _, own in grouped for device in itertools.islice(own, devices)]


def own_copy(tree: Any) -> Any:
    """Copies of replicated arrays on one device of this process."""
    return jax.tree.map(lambda array: array.addressable_data(0), tree)


def from_writer(tree: Any) -> Any:
    """Send the NumPy arrays of process 0 to all processes, bit for bit. All pass arrays of the same shapes."""
    if jax.process_count() == 1:
        return tree
    sent = multihost_utils.broadcast_one_to_all(jax.tree.map(_bytes_of, tree))
    return jax.tree.map(lambda raw, own: np.asarray(raw).view(own.dtype).reshape(own.shape), sent, tree)


def agreed(prepare: Callable[[], Prepared]) -> Prepared | None:
    """Call `prepare` in process 0 and return its result; None in the others. An OptionError ends all processes."""
    prepared, refusal = None, None
    if writes():
        try:
            prepared = prepare()
        except OptionError as error:
            refusal = error
    refused = from_writer(np.array(refusal is not None))
    if refused:
        raise refusal or OptionError("process 0 did not start; its output says why.")
    return prepared


def _bytes_of(array: np.ndarray) -> np.ndarray:
    """The bytes of an array. The transport adds zeros to what it sends, which would change -0.0 to 0.0."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
