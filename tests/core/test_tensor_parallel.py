"""Features split over devices: parameters and statistics are split too, and features send nothing to each other."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from support.compilation import compiled
from support.tolerances import assert_close
from support.transforms import devices_of

import jbn

pytestmark = pytest.mark.devices(8)

FEATURES = 8
GROUPS = [[0, 1], [2, 3]]
SPLIT, WHOLE = P("model"), P("data", None, "model")
REPLICAS = re.compile(r"replica_groups=(\{\{.*?\}\}|\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?|mesh\[.*?\] ?\{.*?\})")


def drawn(rng, examples=16):
    """Parameters, running statistics, a batch far from 0, and a mask of the shape of x."""
    params = jbn.Params(*(jnp.asarray(rng.normal(size=FEATURES), jnp.float32) for _ in range(2)))
    state = jbn.State(jnp.arange(8.0), jnp.arange(1.0, 9.0), jnp.full(FEATURES, 3.0))
    x = jnp.asarray(rng.normal(size=(examples, 5, FEATURES)) + 100, jnp.float32)
    mask = jnp.asarray(rng.random((examples, 5, FEATURES)) < 0.7)
    return params, state, x, mask


def step(params, state, x, mask, **options):
    """Output, new statistics, and gradients in parameters and x."""

    def loss(params, x):
        out, new = jbn.batch_norm(params, state, x, True, mask=mask, activation=jax.nn.silu, **options)
        return jnp.sum(jnp.sin(out)), (out, new)

    gradients, (out, new) = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)
    return out, new, gradients


def mapped(mesh, masked, groups):
    """The step inside shard_map with check_vma."""
    specs = SPLIT, SPLIT, WHOLE, WHOLE if masked else P()
    out_specs = WHOLE, P("data", "model") if groups else SPLIT, (SPLIT, WHOLE)

    def local(params, state, x, mask):
        out, new, gradients = step(params, state, x, mask, axis_name="data", axis_index_groups=groups)
        # The statistics of groups differ over the axis, so they get an axis of their own.
        return out, jax.tree.map(lambda leaf: leaf[None], new) if groups else new, gradients

    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=out_specs)


def replicas(text):
    """The groups of devices of each collective in a compiled program, from the three notations of XLA."""
    for written in REPLICAS.findall(text):
        if written.startswith("{"):
            yield from ([int(device) for device in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", written))
        elif written.startswith("mesh"):
            sizes, joined = re.findall(r"'(\w+)'=(\d+)", written), re.findall(r"'(\w+)'(?!=)", written)
            devices = np.arange(8).reshape([int(size) for _, size in sizes])
            axes = [place for place, (name, _) in enumerate(sizes) if name in joined]
            size = math.prod(devices.shape[axis] for axis in axes)
            yield from np.moveaxis(devices, axes, range(-len(axes), 0)).reshape(-1, size).tolist()
        else:
            shape, grid, order = re.fullmatch(r"\[(.*?)\]<=\[(.*?)\](?:T\((.*)\))?", written).groups()
            devices = np.arange(8).reshape([int(size) for size in grid.split(",")])
            devices = devices.transpose([int(axis) for axis in order.split(",")]) if order else devices
            yield from devices.reshape([int(size) for size in shape.split(",")]).tolist()


def assert_nothing_is_sent_between_features(text, mesh):
    joined = list(replicas(text))
    assert joined, "statistics are shared over the examples"
    size = mesh.shape["model"]
    assert all(len({device % size for device in group}) == 1 for group in joined), joined


def assert_trees_close(actual, expected):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert_close(a, e, condition=8)


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("kind", ["shard_map", "automatic"])
def test_features_of_a_device_are_its_own(rng, kind, masked):
    mesh = devices_of({"data": 2, "model": 4})
    params, state, x, mask = drawn(rng)
    mask = mask if masked else None
    expected = compiled(step)(params, state, x, mask)
    places = NamedSharding(mesh, SPLIT), NamedSharding(mesh, SPLIT), *[NamedSharding(mesh, WHOLE)] * (1 + masked)
    placed = jax.device_put((params, state, x, mask)[: 3 + masked], places)
    placed = (*placed, *[None] * (not masked))
    function = mapped(mesh, masked, None) if kind == "shard_map" else step
    program = compiled(function).lower(*placed).compile()
    found = program(*placed)
    assert_trees_close(found, expected)
    for vector in jax.tree.leaves((found[1], found[2][0])):
        assert vector.sharding.is_equivalent_to(NamedSharding(mesh, SPLIT), 1)
    assert_nothing_is_sent_between_features(program.as_text(), mesh)


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_groups_of_examples_share_the_features_of_their_device(rng, masked):
    mesh = devices_of({"data": 4, "model": 2})
    params, state, x, mask = drawn(rng)
    mask = mask if masked else None
    program = compiled(mapped(mesh, masked, GROUPS)).lower(params, state, x, mask).compile()
    out, new, (of_params, of_x) = program(params, state, x, mask)
    halves = [
        compiled(step)(params, state, x[half], mask if mask is None else mask[half])
        for half in (slice(0, 8), slice(8, 16))
    ]
    assert_trees_close(out, jnp.concatenate([half[0] for half in halves]))
    for place, half in enumerate((0, 0, 1, 1)):
        assert_trees_close(jax.tree.map(lambda leaf, place=place: leaf[place], new), halves[half][1])
    assert_trees_close(of_params, jax.tree.map(jnp.add, halves[0][2][0], halves[1][2][0]))
    assert_trees_close(of_x, jnp.concatenate([half[2][1] for half in halves]))
    assert_nothing_is_sent_between_features(program.as_text(), mesh)
