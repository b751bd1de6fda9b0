"""Train the demo's network for hours, and check its running statistics all the way.

    python tests/studies/long_run.py --minutes 90 --out long-run

Each phase (float32, bfloat16, masks, eight devices with masks) trains a network of its own for an equal share of the
time, and is killed and resumed twice. At the end of a cycle of steps the learning rate is 0, so that the parameters
keep their values. The distance of the statistics from those of the population must then obey the law of the moving
average of independent batches. The script exits with 1 if a check fails.
"""

import argparse
import functools
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

MOMENTUM, BATCH, DRAWS = 0.98, 64, 128
MOVING, RESTING, CYCLES_KEPT = 250, 350, 2
"""Steps of a cycle; 0.98 ** 350 = 8e-4 of the statistics before the rest is left after it. Cycles per checkpoint."""
OTHER_SEEDS = 2**31
"""Seeds of batches that no step trains on."""
FARTHEST = 7.0
"""Standard deviations that no entry of the statistics may be away from the population."""


class Phase(NamedTuple):
    dtype: str = "float32"
    masked: bool = False
    devices: int = 1


PHASES = {
    "float32": Phase(),
    "bfloat16": Phase(dtype="bfloat16"),
    "masks": Phase(masked=True),
    "eight devices, masks": Phase(masked=True, devices=8),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=90)
    parser.add_argument("--out", type=Path, default=Path("long-run"))
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.phase:
        return train(arguments.phase, arguments.out)
    for name in PHASES:
        train_and_kill(name, arguments.out, arguments.minutes * 60 / len(PHASES))
    sys.exit(not all([report(name, arguments.out) for name in PHASES]))


def train_and_kill(name: str, out: Path, seconds: float) -> None:
    """Run a phase in three processes of equal time, each killed; each continues from the last checkpoint."""
    flags = f"--xla_force_host_platform_device_count={PHASES[name].devices}"
    for _ in range(3):
        command = [sys.executable, __file__, "--out", str(out), "--phase", name]
        process = subprocess.Popen(command, env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"})
        try:
            process.wait(seconds / 3)
            sys.exit(f"{name}: the process ended on its own, with {process.returncode}")
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()


def train(name: str, out: Path) -> None:
    """Train from the last checkpoint without end, and append a line of JSON to the phase's file after each cycle."""
    import jax
    import optax
    from flax import serialization
    from jax.sharding import Mesh

    import jbn
    from jbn.demo import data, model

    phase, file = PHASES[name], out / f"{name}.msgpack"
    step = make_step(phase, Mesh(np.array(jax.devices()), ("devices",)))
    draw = make_draw(phase)
    examples = data.load()
    params, state = model.init(jax.random.key(0))
    run: Any = (np.zeros((), np.int32), params, state, optax.scale_by_adam().init(params))
    run = jbn.checkpoint.restore(file, run) if file.exists() else run
    done, loss = int(run[0]), np.nan
    while True:
        for number in range(done + 1, done + MOVING + RESTING + 1):
            rate = 1e-3 if (number - 1) % (MOVING + RESTING) < MOVING else 0.0
            # XLA's collectives on virtual devices can wait for each other when several steps are in flight.
            run, loss = jax.block_until_ready(step(run, rate, *batch(examples.train, phase, number)))
        done = int(run[0])
        found = {"step": done, "loss": float(loss), **measured(run, phase, draw, examples.train)}
        found["held_out"] = float(accuracy(run, examples.held_out))
        with (out / f"{name}.jsonl").open("a") as lines:
            lines.write(json.dumps(found) + "\n")
        if done // (MOVING + RESTING) % CYCLES_KEPT == 0:
            file.with_suffix(".new").write_bytes(serialization.to_bytes(jax.device_get(run)))
            file.with_suffix(".new").replace(file)


def batch(examples: Any, phase: Phase, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images, labels and mask of the batch of a step: independent draws, of which a mask may leave out most."""
    rng = np.random.default_rng(number)
    chosen = rng.integers(len(examples.labels), size=BATCH)
    images, mask = examples.images[chosen], np.ones(BATCH, bool)
    if phase.masked:
        # Batches and shards are ragged, and some shards of a device are empty.
        mask = np.concatenate([np.arange(8) < count for count in rng.integers(0, 9, 8)])
        mask[rng.integers(BATCH)] = True
        images = np.where(mask[:, None, None, None], images, np.float32(1000.0))
    return images, examples.labels[chosen], mask


def make_step(phase: Phase, mesh: Any) -> Any:
    """One compiled step of Adam on the mean loss over the valid examples of all devices."""
    import jax
    import jax.numpy as jnp
    import optax
    from jax.sharding import PartitionSpec as P

    def loss(params, state, images, labels, mask):
        logits, state = forward(phase, params, state, images, mask, "devices")
        losses = jnp.where(mask, optax.softmax_cross_entropy_with_integer_labels(logits, labels), 0)
        return jax.lax.psum(losses.sum(), "devices") / jax.lax.psum(mask.sum(), "devices"), state

    def step(run, rate, images, labels, mask):
        number, params, state, memory = run
        (value, state), gradients = jax.value_and_grad(loss, has_aux=True)(params, state, images, labels, mask)
        updates, memory = optax.scale_by_adam().update(gradients, memory)
        params = jax.tree.map(lambda leaf, update: leaf - rate * update, params, updates)
        return (number + 1, params, state, memory), value

    split = P("devices")
    sharded = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(), split, split, split), out_specs=P())
    return jax.jit(sharded, donate_argnums=0)


def forward(phase: Phase, params: Any, state: Any, images: Any, mask: Any, axis_name: str | None) -> Any:
    """Logits, and the new statistics; convolutions in the dtype of the phase."""
    import jax
    import jax.numpy as jnp

    import jbn
    from jbn.demo import model

    norm = functools.partial(jbn.batch_norm, momentum=MOMENTUM, axis_name=axis_name)
    if phase.masked:
        norm = functools.partial(norm, mask=mask[:, None, None])
    cast = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf.astype(phase.dtype) if path[-1] == jax.tree_util.DictKey("kernel") else leaf, params
    )
    return model.apply(cast, state, jnp.asarray(images, phase.dtype), True, norm)


def make_draw(phase: Phase) -> Any:
    """The moments of one batch in each norm, on one device."""
    import jax

    import jbn

    return jax.jit(lambda params, state, images, mask: forward(phase, params, jbn.unset(state), images, mask, None)[1])


def measured(run: Any, phase: Phase, draw: Any, examples: Any) -> dict[str, Any]:
    """What is checked after a cycle: counts, bits on each device, finiteness, distance from the population, memory."""
    import jax

    copies = [
        jax.tree.map(lambda leaf, at=at: np.asarray(leaf.addressable_data(at)), run) for at in range(phase.devices)
    ]
    leaves = [jax.tree.leaves(copy) for copy in copies]
    _, params, state, _ = copies[0]
    norms = jax.tree.leaves(state, is_leaf=lambda node: hasattr(node, "count"))
    drawn = [batch(examples, phase, OTHER_SEEDS + number) for number in range(DRAWS)]
    distance = distances(norms, [draw(params, state, images, mask) for images, _, mask in drawn])
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "digest": sorted({hashlib.sha256(b"".join(leaf.tobytes() for leaf in each)).hexdigest() for each in leaves}),
        "counts": sorted({float(count) for norm in norms for count in norm.count}),
        "finite": all(bool(np.isfinite(leaf).all()) for leaf in leaves[0]),
        "farthest": float(np.abs(distance).max()),
        "mean square": float(np.mean(distance**2)),
        "resident MiB": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20,
        "live arrays": len(jax.live_arrays()),
        "cpu seconds": usage.ru_utime + usage.ru_stime,
        "process": os.getpid(),
    }


def distances(norms: list[Any], moments: list[Any]) -> np.ndarray:
    """Distance of each running mean and variance from the population, in standard deviations by the law.

    The moments of DRAWS batches give the statistics of the population and the spread of a batch. The running
    statistics have the noise of an average of `effective_batches` batches. Features that do not vary are left out.
    """
    import jax

    from jbn.diagnostics import effective_batches

    running = np.concatenate([values for norm in norms for values in (norm.mean, norm.var)])
    drawn = [[leaf for at, leaf in enumerate(jax.tree.leaves(each)) if at % 3 < 2] for each in moments]
    of_draws = np.array([np.concatenate(each) for each in drawn])
    spread = of_draws.std(0, ddof=1) * np.sqrt(1 / effective_batches(MOMENTUM) + 1 / DRAWS)
    return (running - of_draws.mean(0))[spread > 0] / spread[spread > 0]


def accuracy(run: Any, held_out: Any) -> Any:
    """Accuracy in inference on the held-out digits."""
    import jax

    from jbn.demo.step import evaluate

    _, params, state, _ = jax.device_get(run)
    return evaluate(params, state, held_out, train=False).accuracy


def report(name: str, out: Path) -> bool:
    """Print what a phase showed, and return whether every check held."""
    cycles = [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
    processes: dict[int, list[Any]] = {}
    digests: dict[int, set[str]] = {}
    for cycle in cycles:
        processes.setdefault(cycle["process"], []).append(cycle)
        digests.setdefault(cycle["step"], set()).update(cycle["digest"])
    runs = list(processes.values())
    growth = max(run[-1]["resident MiB"] / run[min(1, len(run) - 1)]["resident MiB"] for run in runs)
    farthest = max(cycle["farthest"] for cycle in cycles)
    checks = {
        "killed and resumed twice": len(runs) >= 3 and all(run[0]["step"] > MOVING + RESTING for run in runs[1:]),
        "all devices and repeated steps have the same bits": all(len(found) == 1 for found in digests.values()),
        "counts exact": all(cycle["counts"] == [cycle["step"]] for cycle in cycles),
        "finite": all(cycle["finite"] for cycle in cycles),
        "statistics within the law": farthest < FARTHEST,
        "memory does not grow": growth < 1.05,
        "arrays do not pile up": all(len({cycle["live arrays"] for cycle in run}) == 1 for run in runs),
    }
    minutes = sum(run[-1]["cpu seconds"] for run in runs) / 60
    squares = np.mean([cycle["mean square"] for cycle in cycles])
    print(f"{name}: {cycles[-1]['step']} steps, {minutes:.0f} CPU minutes, held out {cycles[-1]['held_out']:.1%}")
    print(f"  {len(cycles)} cycles, {len(cycles) - len(digests)} of them repeated after a kill")
    print(f"  distance from the population: mean square {squares:.2f}, farthest {farthest:.1f} standard deviations")
    print(f"  memory of a process, last cycle over second: {growth:.3f}")
    for check, held in checks.items():
        print(f"  {'ok' if held else 'FAILED'}: {check}")
    return all(checks.values())


if __name__ == "__main__":
    main()
