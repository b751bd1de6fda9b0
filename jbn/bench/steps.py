"""Measure the first and the later steps of training, and gradients of one norm outside jit.

A step computes loss, gradients, new running statistics and the optimizer update in one jitted function. All norms are
in the same network, built by the same code. The steps are timed in turn on the same inputs.
"""

import functools
import itertools
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jbn.bench import eager, torch_steps
from jbn.bench.cases import DTYPES
from jbn.bench.counts import count
from jbn.bench.eager import Eager
from jbn.bench.networks import MLP, NORMS, Norm, ResNet, Sequences
from jbn.bench.programs import on_buffers
from jbn.bench.run import Record
from jbn.bench.timing import LONGEST, measure

FIRST_STEPS = 3
"""Repetitions of the first step; slow networks have fewer. The report uses the shortest: other work only adds time."""
PEERS = ("jbn", "linen", "nnx", "torch-last")
SMALL = (2, 1)
"""Blocks per stage of the small ResNet, with both kinds of shortcut."""


class Step(NamedTuple):
    """A training step of a network on batches of one shape."""

    name: str
    network: Callable[[Norm], Any]
    shape: tuple[int, ...]
    dtype: str

    @property
    def label(self) -> str:
        """Its name in the report."""
        return f"{self.name} {'x'.join(map(str, self.shape))} {self.dtype}"

    @property
    def masked(self) -> bool:
        """Whether the examples are sequences of different lengths, with a mask."""
        return len(self.shape) == 3


def all_cases(on_cpu: bool) -> list[Any]:
    """All cases; on a CPU with smaller networks and batches."""
    if on_cpu:
        found = [_resnet50((4, 64, 64, 3), "float32"), _small_resnet("bfloat16"), _mlp(1024, "float32")]
        sequences = (32, 128, 64)
    else:
        found = [_resnet50((128, 224, 224, 3), dtype) for dtype in DTYPES] + [_mlp(2048, "float32")]
        sequences = (128, 512, 64)
    found += [made for dtype in DTYPES for made in (_mlp(256, dtype), _sequences(sequences, dtype))]
    return [*found, *eager.CASES]


def quick_cases() -> list[Any]:
    """A few small cases for a first impression."""
    return [
        _mlp(256, "float32"),
        _small_resnet("float32"),
        _sequences((32, 128, 64), "float32"),
        *eager.CASES,
    ]


def work(steps: Sequence[Any]) -> int:
    """The number of calls of `tick` in `run`."""
    return sum(1 + (1 + len(NORMS) * FIRST_STEPS) * isinstance(step, Step) for step in steps)


def run(steps: Sequence[Any], peers: Collection[str], rounds: int, tick: Callable[[str], Any]) -> Iterator[Record]:
    """Yield the records one by one; call `tick` with the label of the next measurement."""
    for step in steps:
        if isinstance(step, Eager):
            tick(step.label)
            yield Record(step.label, "eager gradient", measure(eager.programs(step, peers), rounds), {}, {}, {})
            continue
        names = [name for name in NORMS if name != "linen" or name in peers]
        batches = [_batch(step, seed) for seed in range(2)]
        first, compiled, held = first_steps(step, names, batches[0], tick)
        tick(step.label)
        found = {
            name: on_buffers(program, [(*held, *batch) for batch in batches]) for name, program in compiled.items()
        }
        if "torch-last" in peers and not step.masked:
            network = step.network(NORMS["linen"])
            found["torch-last"] = torch_steps.step_program(network, [batch[0] for batch in batches])
        counts = {name: count(program, 2**20) for name, program in compiled.items()}
        yield Record(step.label, "training step", measure(found, rounds), counts, {}, {}, first=first)


def first_steps(
    step: Step, names: Sequence[str], batch: Sequence[jax.Array], tick: Callable[[str], Any]
) -> tuple[dict[str, list[tuple[float, ...]]], dict[str, Any], tuple[Any, ...]]:
    """Measure seconds to trace, to lower and to compile a step with empty caches, for each norm.

    Also returns the compiled programs, and the initial parameters, statistics and optimizer state. All norms share
    them, because jbn has the same variables as Flax.
    """
    seconds: dict[str, list[tuple[float, ...]]] = {name: [] for name in names}
    compiled = {}
    variables = jax.jit(step.network(NORMS["linen"]).init)(jax.random.key(0), *batch)
    held = variables["params"], variables["batch_stats"], _descent().init(variables["params"])
    # A warm-up that is not counted: on a GPU, XLA tunes the kernels of the convolutions here and caches the result.
    tick(f"{step.label}, warm-up")
    _first_step(step.network(NORMS["linen"]), held, batch)
    start = time.perf_counter()
    for turn, name in itertools.product(range(FIRST_STEPS), names):
        tick(f"{step.label}, first step of {name}")
        if turn == 0 or time.perf_counter() - start < LONGEST:
            found, compiled[name] = _first_step(step.network(NORMS[name]), held, batch)
            seconds[name].append(found)
    return seconds, compiled, held


def _first_step(network: Any, held: Sequence[Any], batch: Sequence[jax.Array]) -> tuple[tuple[float, ...], Any]:
    """Seconds to trace, to lower and to compile a training step, and the compiled program."""
    jax.clear_caches()
    times = [time.perf_counter()]
    traced = jax.jit(training_step(network, _descent())).trace(*held, *batch)
    times.append(time.perf_counter())
    lowered = traced.lower()
    times.append(time.perf_counter())
    compiled = lowered.compile()
    times.append(time.perf_counter())
    return tuple(np.diff(times).tolist()), compiled


def training_step(network: Any, descent: optax.GradientTransformation) -> Callable[..., Any]:
    """Build the step: (parameters, statistics, optimizer state, *batch) -> the same three, updated, and the loss."""

    def loss(params: Any, statistics: Any, batch: Any) -> Any:
        variables = {"params": params, "batch_stats": statistics}
        out, new = network.apply(variables, *batch, mutable=["batch_stats"])
        return jnp.mean(jnp.square(out.astype(jnp.float32) - 1)), new["batch_stats"]

    def step(params: Any, statistics: Any, memory: Any, *batch: Any) -> Any:
        (value, new), gradients = jax.value_and_grad(loss, has_aux=True)(params, statistics, batch)
        updates, memory = descent.update(gradients, memory, params)
        return optax.apply_updates(params, updates), new, memory, value

    return step


def _descent() -> optax.GradientTransformation:
    """An optimizer with a random learning rate, so that no program in JAX's cache on disk can match."""
    return optax.sgd(0.1 * (1 + 1e-3 * np.random.default_rng().random()), momentum=0.9)


def _batch(step: Step, seed: int) -> list[jax.Array]:
    """Normal data; for sequences also a mask, with lengths between half and all of the time steps."""
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.standard_normal(step.shape, np.float32) + 1, step.dtype)
    if not step.masked:
        return [x]
    examples, length, _ = step.shape
    lengths = rng.integers(length // 2, length + 1, (examples, 1))
    return [x, jnp.asarray(np.arange(length) < lengths)[..., None]]


def _resnet50(shape: tuple[int, ...], dtype: str) -> Step:
    return Step("resnet50", ResNet, shape, dtype)


def _small_resnet(dtype: str) -> Step:
    return Step("small resnet", functools.partial(ResNet, blocks=SMALL), (8, 64, 64, 3), dtype)


def _mlp(width: int, dtype: str) -> Step:
    return Step("mlp", functools.partial(MLP, width=width), (256, width), dtype)


def _sequences(shape: tuple[int, ...], dtype: str) -> Step:
    return Step("masked sequences", functools.partial(Sequences, width=128), shape, dtype)
