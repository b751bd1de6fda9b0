"""Train networks of other projects with their norm and with jbn's, for docs/explanation/other-networks.md.

    PYTHONPATH=tests python tests/studies/networks_of_others.py [PACKAGE ...]

Without names, it takes every package of `NETWORKS` that is installed. Their sources stay as they are: one name is
replaced, such as `flax.linen.BatchNorm`. Their own tests run with jbn's norm if pytest loads this file as a plugin:

    PYTHONPATH=tests python -m pytest -c /dev/null -p studies.networks_of_others FOLDER_WITH_THEIR_TESTS
"""

import contextlib
import functools
import importlib.metadata
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from support import networks_of_others as others

import jbn

BATCH_SIZE, COMMON_STEPS, STEPS = 32, 20, 200
OTHER_NAMES = {"scale": "weight", "mean": "running_mean", "var": "running_var", "count": "steps"}


class Network(NamedTuple):
    """A row of the table: the name that is replaced, its module, what replaces it, and options for either norm."""

    package: str
    module: str
    name: str
    norm: Callable[..., Any]
    case: Callable[..., others.Case]
    variant: str = ""
    options: Mapping[str, Any] | None = None

    @contextlib.contextmanager
    def replaced(self, by_ours):
        """Replace the name while the block runs, or only set the options."""
        module = importlib.import_module(self.module)
        norm = self.norm if by_ours else getattr(module, self.name)
        with mock.patch.object(module, self.name, functools.partial(norm, **self.options) if self.options else norm):
            yield


def renorm(*, warmup_steps=100_000, epsilon=0.001, **options):
    """`jbn.linen.BatchRenorm` with the arguments of the norm of sbx, whose bounds rise to 3 and 5 in one step."""
    rise = {"begin": warmup_steps - 1, "end": warmup_steps}
    bounds = {"r_max": jbn.renorm.r_max(3.0, **rise), "d_max": jbn.renorm.d_max(5.0, **rise)}
    return jbn.linen.BatchRenorm(epsilon=epsilon, **bounds, **options)


class NodeNorm(jbn.nnx.BatchNorm):
    """`jbn.nnx.BatchNorm` with the arguments of the norm of jraphx, which averages the unbiased variance."""

    def __init__(self, num_features, *, rngs):
        super().__init__(num_features, running_var="unbiased", rngs=rngs)

    def __call__(self, x, batch=None, **options):
        return super().__call__(x, **options)


LINEN = ("flax.linen", "BatchNorm", jbn.linen.BatchNorm)
CROSSQ = ("sbx-rl", "sbx.crossq.policies", "BatchRenorm", renorm)
NETWORKS = [
    Network("jax-resnet", *LINEN, others.jax_resnet),
    Network("audax", *LINEN, others.audax),
    Network("flaxmodels", "flaxmodels.resnet.ops", "BatchNorm", jbn.linen.BatchNorm, others.flaxmodels),
    Network("image-classification-jax", *LINEN, others.image_classification_jax),
    Network("scvi-tools", *LINEN, others.scvi),
    Network("jraphx", "jraphx.nn.models.basic_gnn", "BatchNorm", NodeNorm, others.jraphx),
    Network("avitai-artifex", "flax.nnx", "BatchNorm", jbn.nnx.BatchNorm, others.artifex),
    Network(*CROSSQ, functools.partial(others.sbx, warmup_steps=100_000), "as batch norm"),
    Network(*CROSSQ, functools.partial(others.sbx, warmup_steps=10), "corrected"),
    Network(
        *CROSSQ,
        functools.partial(others.sbx, warmup_steps=10, activation=jnp.tanh),
        "epsilon 1e-12",
        {"epsilon": 1e-12},
    ),
]


def installed():
    """The rows whose package is installed."""
    names = {distribution.name.lower() for distribution in importlib.metadata.distributions()}
    return [network for network in NETWORKS if network.package in names]


def pytest_configure():
    """Replace the names of all installed packages; pytest calls this if the file is loaded by `-p`."""
    for network in installed():
        setattr(importlib.import_module(network.module), network.name, network.norm)


def renamed(theirs, ours):
    """The values of their tree, with the names, shapes and dtypes of ours."""
    if not isinstance(ours, Mapping):
        values = jnp.asarray(theirs, ours.dtype)
        return jnp.broadcast_to(values.reshape(values.shape + (1,) * (ours.ndim - values.ndim)), ours.shape)
    return {name: renamed(theirs[name if name in theirs else OTHER_NAMES[name]], ours[name]) for name in ours}


def cast(tree, dtype):
    """Floats as the dtype, other arrays unchanged."""
    arrays = jax.tree.map(jnp.asarray, tree)
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, arrays)


def batch(case, number, dtype):
    rows = np.arange(number * BATCH_SIZE, (number + 1) * BATCH_SIZE) % len(case.data[0])
    return cast(tuple(part[rows] for part in case.data), dtype)


def trained(case, variables, numbers, dtype):
    """Train with Adam on the batches of these numbers."""
    params, stats = variables["params"], variables["batch_stats"]
    optimizer = optax.adam(1e-3)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for number in numbers:
        (_, stats), gradients = case.step(params, stats, batch(case, number, dtype))
        updates, state = update(gradients, state)
        params = optax.apply_updates(params, updates)
    return {"params": params, "batch_stats": stats}


def difference(theirs, ours):
    """The largest difference of two entries, in units of the largest entry of their leaf.

    Leaves below 1e-5 of the largest are left out: the gradient of a bias before a norm is 0, and only rounding is left.
    """
    pairs = list(zip(jax.tree.leaves(renamed(theirs, ours)), jax.tree.leaves(ours), strict=True))
    sizes = [max(jnp.abs(one).max(), jnp.abs(two).max()) for one, two in pairs]
    large = ((pair, size) for pair, size in zip(pairs, sizes, strict=True) if size > 1e-5 * max(sizes))
    return max(float(jnp.abs(one - two).max() / size) for (one, two), size in large)


def compared(network, dtype, steps):
    """Differences of loss, gradients and statistics in a step from a common state, and scores after more steps."""
    start, results, scores = {}, [], []
    for by_ours in (False, True):
        with network.replaced(by_ours):
            case = network.case(dtype)
            own = cast(case.variables, dtype)
            start = renamed(start, own) if by_ours else trained(case, own, range(COMMON_STEPS), dtype)
            given = start["params"], start["batch_stats"], batch(case, COMMON_STEPS, dtype)
            (loss, stats), gradients = case.step(*given)
            results.append((loss, gradients, stats))
            if steps:
                end = trained(case, start, range(COMMON_STEPS, COMMON_STEPS + steps), dtype)
                scores.append(float(case.score(end["params"], end["batch_stats"], case.tested)))
    return [difference(*pair) for pair in zip(*results, strict=True)], scores


def main():
    jax.config.update("jax_num_cpu_devices", 2)
    print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "jbn")))
    print(f"{'':42}{'float32':^25}{'float64':^25}   after {STEPS} steps\n{'':42}", end="")
    print(*(f"{name:>8}" for name in 2 * ("loss", "gradient", "stats") + ("theirs", "ours")))
    for network in installed():
        if len(sys.argv) == 1 or network.package in sys.argv[1:]:
            print(
                f"{network.package} {importlib.metadata.version(network.package)} {network.variant}".ljust(41), end=""
            )
            narrow, scores = compared(network, jnp.float32, STEPS)
            with jax.enable_x64(True):
                wide, _ = compared(network, jnp.float64, 0)
            print(*(f"{one:8.1e}" for one in narrow + wide), *(f"{one:8.4f}" for one in scores), flush=True)


if __name__ == "__main__":
    main()
