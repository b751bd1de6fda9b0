"""The same programs in eager PyTorch, with its own kernels."""

from typing import Any

import jax
import numpy as np

from jbn.bench.cases import Case, Chain
from jbn.bench.data import EPSILON, Batch
from jbn.bench.layers import MOMENTUM
from jbn.bench.programs import Program


def layer_program(case: Case, mode: str, given: list[Batch], channels_last: bool) -> Program:
    """One mode of a case. PyTorch has no masked batch norm."""
    import torch

    layer = norm(case.shape[-1], len(case.shape)).train(mode != "inference")
    layer.weight.data, layer.bias.data = (_tensor(array) for array in given[0][3:])
    held = [[placed(array, channels_last) for array in batch[:2]] for batch in given]

    def forward(number: int) -> Any:
        x = held[number % len(held)][0].requires_grad_(mode != "inference")
        out = layer(x)
        return x, torch.relu(out) if case.relu else out

    def gradient(x: Any, out: Any, number: int) -> Any:
        return torch.autograd.grad(out, [layer.weight, layer.bias, x], held[number % len(held)][1])

    def inferred(number: int) -> Any:
        with torch.no_grad():
            return forward(number)[1]

    def both(number: int) -> Any:
        x, out = forward(number)
        return out, None, gradient(x, out, number)

    if mode == "backward":
        return Program(lambda number: (*forward(number), number), lambda given: gradient(*given), wait)
    run = {"inference": inferred, "forward": forward, "forward+backward": both}[mode]
    return Program(lambda number: number, run, wait)


def chain_program(chain: Chain) -> Program:
    """The gradient of a chain of layers."""
    import torch

    dtype = getattr(torch, chain.dtype)
    made = torch.Generator().manual_seed(0)
    weights = torch.randn(chain.layers, chain.width, chain.width, generator=made) / chain.width**0.5
    weights = weights.to(device(), dtype).requires_grad_()
    inputs = [torch.randn(chain.rows, chain.width, generator=made).to(device(), dtype) for _ in range(2)]
    norms = [norm(chain.width, 2) for _ in range(chain.layers)]

    def run(number: int) -> Any:
        x = inputs[number % len(inputs)]
        for weight, layer in zip(weights, norms, strict=True):
            x = torch.relu(layer(x @ weight))
        return torch.autograd.grad(x.float().square().mean(), weights)

    return Program(lambda number: number, run, wait)


def in_numpy(result: Any) -> Any:
    """Convert tensors to float64 arrays with channels last."""
    import torch

    def converted(leaf: Any) -> Any:
        array = leaf.detach().double().cpu().numpy()
        return np.moveaxis(array, 1, -1) if array.ndim > 1 else array

    return jax.tree.map(converted, result, is_leaf=lambda leaf: isinstance(leaf, torch.Tensor))


def description() -> str:
    """Version, device and number of threads of PyTorch."""
    import torch

    return f"torch {torch.__version__} on {device().type}, {torch.get_num_threads()} threads"


def norm(features: int, rank: int) -> Any:
    """The batch norm module of PyTorch for input of this rank."""
    import torch

    kinds = {2: torch.nn.BatchNorm1d, 3: torch.nn.BatchNorm1d, 4: torch.nn.BatchNorm2d}
    return kinds[rank](features, EPSILON, 1 - MOMENTUM, device=device())


def device() -> Any:
    """The device of PyTorch: a GPU if JAX also uses one."""
    import torch

    on_gpu = jax.default_backend() == "gpu" and torch.cuda.is_available()
    return torch.device("cuda" if on_gpu else "cpu")


def _tensor(array: np.ndarray) -> Any:
    """A tensor of the dtype of the array; bfloat16 is converted through float32, which is exact."""
    import torch

    return torch.tensor(array.astype(np.float32)).to(device(), getattr(torch, array.dtype.name))


def placed(array: np.ndarray, channels_last: bool) -> Any:
    """A tensor with channels as the second axis, stored in memory with channels last or first."""
    import torch

    tensor = torch.movedim(_tensor(array), -1, 1)
    if channels_last and tensor.ndim == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor if channels_last else tensor.contiguous()


def wait(result: Any) -> None:
    """Wait until the GPU has finished all work."""
    if device().type == "cuda":
        import torch

        torch.cuda.synchronize()
