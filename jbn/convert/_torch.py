"""PyTorch's batch norm: one norm in and out."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jbn._core.state import Params, State
from jbn.convert._names import Names, check_norm, read_one, written_to_numpy

TORCH = Names("PyTorch", "weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def from_torch(entries: Mapping[str, Any], *, count: int | None = None) -> tuple[Params, State]:
    """jbn's norm from a PyTorch one.

    scale = weight,  bias = bias,  mean = running_mean,  var = running_var,  count = num_batches_tracked

    Args:
        entries: a norm's `state_dict()`: tensors or arrays of shape (C,); `weight` and `bias` only if it is affine.
        count: the updates of every feature so far, instead of `num_batches_tracked`, which is 0 where it is missing.

    Returns:
        Params and State, copies. PyTorch's defaults are those of `jbn.batch_norm(..., feature_axis=1,
        momentum=jbn.momentum.from_torch(0.1), running_var="unbiased")`.

    Raises:
        TypeError: entries is no mapping, or count is no int.
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
    """A PyTorch norm's `state_dict` from jbn's norm; the inverse of `from_torch`.

    weight = scale,  bias = bias,  running_mean = mean,  running_var = var,  num_batches_tracked = max(count)

    Args:
        params: scale and bias; where only one is None it is written as ones or zeros, since PyTorch has both or none.
        state: running mean, variance and count; PyTorch has one count for all features, the largest, rounded up.

    Returns:
        Writable NumPy arrays, bfloat16 as float32, by PyTorch's names; `torch.tensor` makes tensors of them.

    Raises:
        TypeError: params or state is not jbn's.

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
