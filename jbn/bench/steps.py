"""What people run: the first step and each later step of training, in one program, and gradients of one norm outside
of jit.

A step is loss, gradients, new statistics and optimizer in one jit. Every norm stands in the same network, compiled from
the same lines; steps are timed in turn on the same inputs.
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
"""Of which the least counts, since they can only be disturbed; slow ones are taken once."""
PEERS = ("jbn", "linen", "nnx", "torch-last")
SMALL = (2, 1)
"""Blocks of the small ResNet: with both kinds of shortcut."""


class Step(NamedTuple):
    """A training step of a network on a batch of a shape."""

    name: str
    network: Callable[[Norm], Any]
    shape: tuple[int, ...]
    dtype: str

    @property
    def label(self) -> str:
        """How the report calls it."""
        return f"{self.name} {'x'.join(map(str, self.shape))} {self.dtype}"

    @property
    def masked(self) -> bool:
        """Whether its examples differ in length."""
        return len(self.shape) == 3


def all_cases(on_cpu: bool) -> list[Any]:
    """Those of a whole run; small ones for a CPU."""
    if on_cpu:
        found = [_resnet50((4, 64, 64, 3), "float32"), _small_resnet("bfloat16"), _mlp(1024, "float32")]
        sequences = (32, 128, 64)
    else:
        found = [_resnet50((128, 224, 224, 3), dtype) for dtype in DTYPES] + [_mlp(2048, "float32")]
        sequences = (128, 512, 64)
    found += [made for dtype in DTYPES for made in (_mlp(256, dtype), _sequences(sequences, dtype))]
    return [*found, *eager.CASES]


def quick_cases() -> list[Any]:
    """A few small ones, for a first look."""
    return [
        _mlp(256, "float32"),
        _small_resnet("float32"),
        _sequences((32, 128, 64), "float32"),
        *eager.CASES,
    ]


def work(steps: Sequence[Any]) -> int:
    """How often `run` ticks."""
    return sum(1 + (1 + len(NORMS) * FIRST_STEPS) * isinstance(step, Step) for step in steps)


def run(steps: Sequence[Any], peers: Collection[str], rounds: int, tick: Callable[[str], Any]) -> Iterator[Record]:
    """The records, one by one; what is done next is told to `tick`."""
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
    """Seconds to trace, to lower and to compile, each time as if nothing had been traced before; and what they give.

    That is the compiled programs, with the parameters, statistics and memory of the optimizer to begin with: jbn's
    variables are those of Flax.
    """
    seconds: dict[str, list[tuple[float, ...]]] = {name: [] for name in names}
    compiled = {}
    variables = jax.jit(step.network(NORMS["linen"]).init)(jax.random.key(0), *batch)
    held = variables["params"], variables["batch_stats"], _descent().init(variables["params"])
    # Not counted: on a GPU, XLA tries its kernels for the convolutions here, and remembers which are fast.
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
    """Seconds to trace, to lower and to compile a step of the network, and the compiled program."""
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
    """(parameters, statistics, memory, *batch) -> the same three anew, and the loss"""

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
    """At a rate that no step had before, or JAX's cache of compiled programs on disk might have this one."""
    return optax.sgd(0.1 * (1 + 1e-3 * np.random.default_rng().random()), momentum=0.9)


def _batch(step: Step, seed: int) -> list[jax.Array]:
    """Normal data; and for sequences their mask, by lengths between a half and all."""
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
