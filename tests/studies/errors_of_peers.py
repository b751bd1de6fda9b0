"""Print the largest errors of the batch norms of several libraries, for docs/guarantees.md.

pip install -e ".[demo,peers]" && python tests/studies/errors_of_peers.py
"""

import functools
import importlib.metadata
import os

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import jbn
from jbn.bench.layers import LAYERS

LIBRARIES = ("jbn", "linen", "linen-2pass", "haiku", "equinox", "keras", "torch")
VERSIONS = ("jax", "flax", "dm-haiku", "equinox", "keras", "torch")


def output(library, x, mask=None, scale=None):
    """The output in training."""
    if library == "torch":
        import torch

        return torch.nn.BatchNorm1d(x.shape[-1])(torch.as_tensor(x)).detach().numpy()
    layer, features = LAYERS[library](), x.shape[-1]
    scale = jnp.ones(features) if scale is None else scale
    return layer.train(scale, jnp.zeros(features), layer.state(features), jnp.asarray(x), mask, None)[0]


def far_from_0(library, mean):
    """N(mean, 1), 20 batches of 1,024 values of each of 8 features, float32."""
    errors = []
    for x in np.random.default_rng(0).normal(mean, 1, (20, 1024, 8)).astype(np.float32):
        wide = x.astype(np.float64)
        right = (wide - wide.mean(0)) / np.sqrt(wide.var(0) + 1e-5)
        errors.append(np.abs(output(library, x) - right).max())
    return np.max(errors)


def nan_in_padding(library):
    """Gradient of the scale with a NaN in a row that the mask leaves out."""
    x = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    x[-1] = np.nan
    mask = jnp.arange(8)[:, None] < 7

    def loss(scale):
        return jnp.sum(jnp.where(mask, output(library, x, mask, scale), 0) ** 2)

    valid = x[:7].astype(np.float64)
    right = 2 * 7 * valid.var(0) / (valid.var(0) + 1e-5)
    return np.abs(jax.grad(loss)(jnp.ones(3)) - right).max()


def uneven_devices(library):
    """Running mean, at momentum 0, of values 0 and 4 4 4 on two devices with one and three valid rows, 3 in all."""
    from flax import linen

    module = {"jbn": jbn.linen.BatchNorm, "linen": linen.BatchNorm}[library]
    norm = module(use_running_average=False, momentum=0.0, axis_name="devices")
    x = jnp.array([0.0, 9, 9, 4, 4, 4])[:, None]
    mask = jnp.array([True, False, False, True, True, True])[:, None]
    variables = jax.tree.map(jnp.asarray, module(use_running_average=False).init(jax.random.key(0), x))

    mesh = jax.make_mesh((2,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P("devices"), out_specs=P())
    def mean(x, mask):
        new = norm.apply(variables, x, mask=mask, mutable="batch_stats")[1]
        return new["batch_stats"]["mean"]

    return abs(float(mean(x, mask)[0]) - 3)


ROWS = {
    "mean/sd 1e3": functools.partial(far_from_0, mean=1e3),
    "mean/sd 1e4": functools.partial(far_from_0, mean=1e4),
    "mean/sd 1e5": functools.partial(far_from_0, mean=1e5),
    "NaN in padding": nan_in_padding,
    "uneven devices": uneven_devices,
}
TAKEN = {"NaN in padding": ("jbn", "linen", "linen-2pass", "keras"), "uneven devices": ("jbn", "linen")}


def main():
    os.environ["KERAS_BACKEND"] = "jax"
    jax.config.update("jax_num_cpu_devices", 2)
    print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in VERSIONS))
    print(f"{'':16}", *(f"{library:>12}" for library in LIBRARIES))
    for name, measured in ROWS.items():
        cells = [f"{measured(one):12.2g}" if one in TAKEN.get(name, LIBRARIES) else f"{'':12}" for one in LIBRARIES]
        print(f"{name:16}", *cells, flush=True)


if __name__ == "__main__":
    main()
