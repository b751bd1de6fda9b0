"""The same training steps and gradients of one norm in eager PyTorch, with channels last and autocast to bfloat16."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jbn.bench import networks
from jbn.bench.programs import Program
from jbn.bench.torch_programs import device, norm, placed, wait


def step_program(network: networks.MLP | networks.ResNet, inputs: list[jax.Array]) -> Program:
    """A training step for the PyTorch counterpart of a Flax network: loss, gradients, statistics and optimizer."""
    import torch

    made = network_of(network, inputs[0].shape[-1]).to(device(), memory_format=torch.channels_last)
    descent = torch.optim.SGD(made.parameters(), lr=0.1, momentum=0.9)
    held = [placed(np.asarray(x, np.float32), True) for x in inputs]
    narrow = inputs[0].dtype == jnp.bfloat16

    def run(number: int) -> Any:
        descent.zero_grad()
        with torch.autocast(device().type, torch.bfloat16, enabled=narrow):
            out = made(held[number % len(held)])
        loss = (out.float() - 1).square().mean()
        loss.backward()
        descent.step()
        return loss.detach()

    return Program(lambda number: number, run, wait)


def eager_program(argnums: tuple[int, ...], inputs: list[jax.Array]) -> Program:
    """Value and gradients with respect to the parameters, or to the parameters and x."""
    import torch

    layer = norm(inputs[0].shape[-1], 2)
    held = [placed(np.asarray(x), True).requires_grad_(1 in argnums) for x in inputs]

    def run(number: int) -> Any:
        x = held[number % len(held)]
        loss = layer(x).square().mean()
        return loss, torch.autograd.grad(loss, [*layer.parameters(), x][: 2 + (1 in argnums)])

    return Program(lambda number: number, run, wait)


def network_of(network: networks.MLP | networks.ResNet, inputs: int) -> Any:
    """The PyTorch module with the same layers as a Flax network."""
    return _mlp(network, inputs) if isinstance(network, networks.MLP) else _resnet(network)


def _mlp(network: networks.MLP, inputs: int) -> Any:
    from torch import nn

    layers: list[Any] = []
    for _ in range(3):
        layers += [nn.Linear(inputs, network.width), norm(network.width, 2), nn.ReLU()]
        inputs = network.width
    return nn.Sequential(*layers, nn.Linear(inputs, 1))


def _resnet(network: networks.ResNet) -> Any:
    from torch import nn

    layers = [*_conv_norm(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for stage, blocks in enumerate(network.blocks):
        for block in range(blocks):
            layers.append(_block(inputs, 64 * 2**stage, 2 if stage and not block else 1))
            inputs = 256 * 2**stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000))


def _block(inputs: int, width: int, stride: int) -> Any:
    from torch import nn

    layers = [*_conv_norm(inputs, width, 1), nn.ReLU(), *_conv_norm(width, width, 3, stride), nn.ReLU()]
    residual = nn.Sequential(*layers, *_conv_norm(width, 4 * width, 1))
    shortcut = nn.Identity() if inputs == 4 * width else nn.Sequential(*_conv_norm(inputs, 4 * width, 1, stride))
    return _join()(residual, shortcut)


@functools.cache
def _join() -> Any:
    """The class that joins residual and shortcut; defined here because torch may not be installed."""
    from torch import nn

    class Join(nn.Module):
        def __init__(self, residual: Any, shortcut: Any) -> None:
            super().__init__()
            self.residual, self.shortcut = residual, shortcut

        def forward(self, x: Any) -> Any:
            return nn.functional.relu(self.residual(x) + self.shortcut(x))

    return Join


def _conv_norm(inputs: int, features: int, size: int, stride: int = 1) -> list[Any]:
    from torch import nn

    return [nn.Conv2d(inputs, features, size, stride, size // 2, bias=False), norm(features, 4)]
