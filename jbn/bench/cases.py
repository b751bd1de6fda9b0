"""The cases of `jbn bench --apart`: shapes, dtypes and programs, each program compiled separately."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

MODES = ("inference", "forward", "backward", "forward+backward")
LEAST_PASSES = {"inference": 2, "forward": 3, "backward": 5, "forward+backward": 8}
"""The least number of passes (reads or writes of an array as large as x) if x does not fit in a cache. The forward pass
reads x for the moments, reads x again and writes the output. The backward pass reads x and the cotangent for two sums,
reads both again and writes the gradient."""


class Case(NamedTuple):
    """The shape and dtype of a batch, and the programs to run on it."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    relu: bool = False
    masked: bool = False
    modes: tuple[str, ...] = MODES

    @property
    def label(self) -> str:
        """Its name in the report."""
        return f"{self.name} {'x'.join(map(str, self.shape))} {self.dtype}"

    @property
    def size(self) -> int:
        """Size of x in bytes."""
        return int(np.prod(self.shape)) * jnp.dtype(self.dtype).itemsize


class Chain(NamedTuple):
    """Several layers of matmul, norm and relu, with forward and backward pass in one program."""

    name: str
    rows: int
    width: int
    layers: int
    scan: bool
    dtype: str

    @property
    def label(self) -> str:
        """Its name in the report."""
        return f"{self.name} {self.layers}x{self.rows}x{self.width} {self.dtype}"

    @property
    def size(self) -> int:
        """Size of the input of a layer in bytes."""
        return self.rows * self.width * jnp.dtype(self.dtype).itemsize


STAGES = ((56, 64), (56, 256), (28, 128), (14, 1024), (7, 2048))
DTYPES = ("float32", "bfloat16")


def all_cases(on_cpu: bool) -> list[Any]:
    """All cases; on a CPU with smaller batches."""
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
    """A few small cases for a first impression."""
    shape = (8, 56, 56, 64)
    return [
        Case("conv", shape),
        Case("conv-relu", shape, relu=True, modes=("forward+backward",)),
        Case("conv", shape, "bfloat16", modes=("forward", "backward")),
        Case("masked sequence", (16, 256, 256), masked=True, modes=("forward+backward",)),
        Chain("scanned", 1024, 256, 8, True, "float32"),
    ]
