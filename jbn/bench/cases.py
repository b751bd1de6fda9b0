"""What is measured of programs compiled apart: shapes, dtypes, and which programs of them."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

MODES = ("inference", "forward", "backward", "forward+backward")
LEAST_PASSES = {"inference": 2, "forward": 3, "backward": 5, "forward+backward": 8}
"""Reads and writes of an array like x that no program can do without, where it fits in no cache: the forward pass reads
x for its moments, reads it again and writes the output; the backward pass reads x and the cotangent for two sums, reads
both again and writes the gradient."""


class Case(NamedTuple):
    """A batch, and what is done with it."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    relu: bool = False
    masked: bool = False
    modes: tuple[str, ...] = MODES

    @property
    def label(self) -> str:
        """How the report calls it."""
        return f"{self.name} {'x'.join(map(str, self.shape))} {self.dtype}"

    @property
    def size(self) -> int:
        """Bytes of x."""
        return int(np.prod(self.shape)) * jnp.dtype(self.dtype).itemsize


class Chain(NamedTuple):
    """Layers of matmul, norm and relu, forward and backward in one program."""

    name: str
    rows: int
    width: int
    layers: int
    scan: bool
    dtype: str

    @property
    def label(self) -> str:
        """How the report calls it."""
        return f"{self.name} {self.layers}x{self.rows}x{self.width} {self.dtype}"

    @property
    def size(self) -> int:
        """Bytes of a layer's input."""
        return self.rows * self.width * jnp.dtype(self.dtype).itemsize


STAGES = ((56, 64), (56, 256), (28, 128), (14, 1024), (7, 2048))
DTYPES = ("float32", "bfloat16")


def all_cases(on_cpu: bool) -> list[Any]:
    """The cases of a whole run; a CPU is given smaller batches."""
    images = 32 if on_cpu else 128
    found: list[Any] = []
    for dtype in DTYPES:
        for size, features in STAGES:
            shape = (images, size, size, features)
            found += [Case("conv", shape, dtype), Case("conv-relu", shape, dtype, relu=True, modes=MODES[1:])]
        found.append(Case("dense", (4096, 1024), dtype))
        found.append(Case("masked sequence", (64, 512, 256), dtype, masked=True, modes=MODES[1:]))
        found += [Chain(name, 4096, 512, 8, name == "scanned", dtype) for name in ("unrolled", "scanned")]
    return found


def quick_cases() -> list[Any]:
    """A few small ones, for a first look."""
    shape = (8, 56, 56, 64)
    return [
        Case("conv", shape),
        Case("conv-relu", shape, relu=True, modes=("forward+backward",)),
        Case("conv", shape, "bfloat16", modes=("forward", "backward")),
        Case("masked sequence", (16, 256, 256), masked=True, modes=("forward+backward",)),
        Chain("scanned", 1024, 256, 8, True, "float32"),
    ]
