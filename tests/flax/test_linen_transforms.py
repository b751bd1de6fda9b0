"""The Linen module under transformations: one update for each call, and sharing over the right devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from support import reference
from support.tolerances import assert_close

import jbn

KEY = jax.random.key(0)


def images(rng, batch=6):
    return (rng.normal(size=(batch, 4, 3)) * 2 + 1).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def initialized(module, x):
    return module.init(KEY, x)


class Block(nn.Module):
    """Dense, norm and relu, with the input added so that blocks can be stacked."""

    norm: type[nn.Module] = jbn.linen.BatchNorm

    @nn.compact
    def __call__(self, x):
        y = nn.Dense(x.shape[-1], use_bias=False, kernel_init=nn.initializers.normal(1.0))(x)
        return x + nn.relu(self.norm(use_running_average=False, momentum=0.5)(y))


LAYERS = 3


class Repeated(nn.Module):
    """A block scanned LAYERS times: variables stacked by layer, or one block in the carry."""

    shared: bool = False

    @nn.compact
    def __call__(self, x):
        stacked = {} if self.shared else {"params": 0, "batch_stats": 0}
        scan = nn.scan(
            lambda block, x: (block(x), None),
            variable_axes=stacked,
            variable_broadcast="params" if self.shared else False,
            variable_carry="batch_stats" if self.shared else False,
            split_rngs={"params": not self.shared},
            length=LAYERS,
        )
        return scan(Block(name="one"), x)[0]


class Unrolled(nn.Module):
    """The same blocks in a Python loop."""

    shared: bool = False

    @nn.compact
    def __call__(self, x):
        one = Block(name="one") if self.shared else None
        for layer in range(LAYERS):
            x = (one or Block(name=f"layer{layer}"))(x)
        return x


@functools.partial(jax.jit, static_argnums=0)
def gradients_and_statistics(module, variables, x):
    def loss(params):
        out, updated = module.apply({**variables, "params": params}, x, mutable=["batch_stats"])
        return jnp.sum(out**2) / 100, updated["batch_stats"]

    return jax.grad(loss, has_aux=True)(variables["params"])


def test_jit_and_remat_update_once(rng):
    x = images(rng)
    variables = initialized(Block(), x)
    plain = gradients_and_statistics(Block(), variables, x)
    hidden = x.astype(np.float64) @ np.asarray(variables["params"]["Dense_0"]["kernel"], np.float64)
    mean, var = reference.update(0, 1, reference.batch_norm(hidden), 0.5)
    assert_close(plain[1]["BatchNorm_0"]["mean"], mean, scale=1)
    assert_close(plain[1]["BatchNorm_0"]["var"], var)
    for transform in (nn.jit, nn.remat, lambda block: nn.remat(nn.jit(block))):
        transformed = gradients_and_statistics(transform(Block)(), variables, x)
        for a, e in zip(jax.tree.leaves(transformed), jax.tree.leaves(plain), strict=True):
            assert_close(a, e, condition=10)


@pytest.mark.parametrize("shared", [False, True])
def test_scan_updates_each_layer_once(rng, shared):
    x = images(rng)
    scanned, unrolled = Repeated(shared), Unrolled(shared)
    variables = parts = initialized(unrolled if shared else scanned, x)
    if not shared:
        parts = {
            kind: {f"layer{i}": jax.tree.map(lambda leaf, i=i: leaf[i], tree["one"]) for i in range(LAYERS)}
            for kind, tree in variables.items()
        }
    many, one_by_one = (
        gradients_and_statistics(module, given, x) for module, given in ((scanned, variables), (unrolled, parts))
    )
    for a, e in zip(many, one_by_one, strict=True):
        layers = [e["one"]] if shared else [e[f"layer{i}"] for i in range(LAYERS)]
        expected = e["one"] if shared else jax.tree.map(lambda *leaves: np.stack(leaves), *layers)
        jax.tree.map(functools.partial(assert_close, condition=100), a["one"], expected)


def test_vmap_over_models_of_their_own(rng):
    x = np.stack([images(rng), images(rng) + 5])
    axes = {"params": 0, "batch_stats": 0}
    mapped = nn.vmap(Block, variable_axes=axes, split_rngs={"params": True})()
    variables = initialized(mapped, x)
    _, statistics = gradients_and_statistics(mapped, variables, x)
    for i in range(2):
        one = jax.tree.map(lambda leaf, i=i: np.asarray(leaf)[i], variables)
        _, expected = gradients_and_statistics(Block(), one, x[i])
        jax.tree.map(lambda a, e, i=i: assert_close(a[i], e), statistics, expected)


def test_vmap_over_the_batch_shares_statistics(rng):
    x = images(rng)
    shared = {"params": None, "batch_stats": None}
    lanes = nn.vmap(
        functools.partial(jbn.linen.BatchNorm, axis_name="batch"),
        variable_axes=shared,
        split_rngs={"params": False},
        axis_name="batch",
    )(momentum=0.0, use_running_average=False)
    variables = initialized(lanes, x)
    out, updated = jax.jit(lambda x: lanes.apply(variables, x, mutable=["batch_stats"]))(x)
    expected = reference.batch_norm(x)
    assert_close(out, expected.out)
    assert_close(updated["batch_stats"]["var"], expected.var)


@pytest.mark.devices(4)
@pytest.mark.parametrize("groups", [None, [[0, 1], [2, 3]]])
def test_shard_map_shares_statistics(rng, groups):
    mesh = Mesh(np.array(jax.devices()[:4]), ("devices",))
    norm = jbn.linen.BatchNorm(momentum=0.0, use_running_average=False, axis_name="devices", axis_index_groups=groups)
    x = images(rng, batch=8)
    variables = norm.init(KEY, images(rng))
    spec = P("devices")
    shared = jax.shard_map(
        lambda x: norm.apply(variables, x, mutable=["batch_stats"])[0], mesh=mesh, in_specs=spec, out_specs=spec
    )
    out = jax.jit(shared)(x)
    for part in np.split(np.arange(8), 1 if groups is None else 2):
        assert_close(out[part], reference.batch_norm(x[part]).out)


def test_gradient_accumulation_updates_once_a_microbatch(rng):
    """A scan that carries the statistics over microbatches: together, k updates keep `momentum` of the old value."""
    x = np.stack([images(rng) for _ in range(4)])
    norm = jbn.linen.BatchNorm(use_running_average=False, momentum=jbn.momentum.per_microbatch(0.5, 4))
    variables = norm.init(KEY, x[0])

    def microbatch(carry, x):
        gradient, statistics = carry

        def loss(params):
            out, updated = norm.apply({"params": params, "batch_stats": statistics}, x, mutable=["batch_stats"])
            return jnp.sum(out**3), updated["batch_stats"]

        more, statistics = jax.grad(loss, has_aux=True)(variables["params"])
        return (jax.tree.map(jnp.add, gradient, more), statistics), None

    start = (jax.tree.map(jnp.zeros_like, variables["params"]), variables["batch_stats"])
    (gradient, statistics), _ = jax.jit(lambda: jax.lax.scan(microbatch, start, x))()
    mean, var = 0.0, 1.0
    for batch in x:
        mean, var = reference.update(mean, var, reference.batch_norm(batch), 0.5**0.25)
    assert_close(statistics["mean"], mean)
    assert_close(statistics["var"], var)
    expected = sum(np.sum(reference.batch_norm(batch).out ** 2 * 3, axis=(0, 1)) for batch in x)
    assert_close(gradient["bias"], expected)
