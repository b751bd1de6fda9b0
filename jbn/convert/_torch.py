"""Conversion of one norm from and to PyTorch."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jbn._core.state import Params, State
from jbn.convert._names import Names, check_norm, read_one, written_to_numpy

TORCH = Names("PyTorch", "weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def from_torch(entries: Mapping[str, Any], *, count: int | None = None) -> tuple[Params, State]:
    """Convert a PyTorch norm to Params and State.

    scale = weight,  bias = bias,  mean = running_mean,  var = running_var,  count = num_batches_tracked

    Args:
        entries: `state_dict()` of a norm: tensors or arrays of shape (C,); `weight` and `bias` only if it is affine.
        count: number of updates of every feature. It replaces `num_batches_tracked`; without either, the count is 0.

    Returns:
        Params and State, as copies. `jbn.batch_norm(..., feature_axis=1, momentum=jbn.momentum.from_torch(0.1),
        running_var="unbiased")` has the defaults of PyTorch.

    Raises:
        TypeError: entries is not a mapping, or count is not an int.
        ValueError: entries are missing, extra or misshaped; the error lists them.

    Example:
        >>> import numpy as np
        >>> import jbn
        >>> entries = {"running_mean": np.float32([3]), "running_var": np.float32([4]), "num_batches_tracked": 7}
        >>> params, state = jbn.convert.from_torch(entries)
        >>> print(state.mean, state.var, state.count)
        [3.] [4.] [7.]

    Source:
        PyTorch, torch.nn.BatchNorm2d.
    """
    return read_one(TORCH, entries, count)


def to_torch(params: Params, state: State) -> dict[str, np.ndarray]:
    """Convert Params and State to the `state_dict` of a PyTorch norm; the inverse of `from_torch`.

    weight = scale,  bias = bias,  running_mean = mean,  running_var = var,  num_batches_tracked = max(count)

    Args:
        params: scale and bias. If only one is None, it is written as ones or zeros, since PyTorch has both or neither.
        state: running mean, variance and count. PyTorch has one count for all features: the largest, rounded up.

    Returns:
        Writable NumPy arrays, bfloat16 as float32, under PyTorch's names; `torch.tensor` converts them to tensors.

    Raises:
        TypeError: params is not a Params, or state is not a State.

    Example:
        >>> import jbn
        >>> sorted(jbn.convert.to_torch(*jbn.init(2)))
        ['bias', 'num_batches_tracked', 'running_mean', 'running_var', 'weight']

    Source:
        PyTorch, torch.nn.BatchNorm2d.
    """
    check_norm(params, state)
    scale, bias = params
    if scale is None and bias is not None:
        scale = jnp.ones_like(bias)
    if bias is None and scale is not None:
        bias = jnp.zeros_like(scale)
    arrays = written_to_numpy(TORCH, Params(scale, bias), state)
    updates = 0 if state.count is None else np.ceil(np.max(state.count, initial=0))
    return {**arrays, "num_batches_tracked": np.array(updates, np.int64)}
