"""The NNX module under transformations: one update for each call, and sharing over the right devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from support import reference
from support.nnx_norms import applied, arrays, assert_states_close, images, made
from support.tolerances import assert_close

import jbn


class Block(nnx.Module):
    """Linear, norm and relu, with the input added so that blocks can be stacked."""

    def __init__(self, rngs, **options):
        self.linear = nnx.Linear(3, 3, use_bias=False, kernel_init=nnx.initializers.normal(1.0), rngs=rngs)
        self.norm = jbn.nnx.BatchNorm(3, momentum=0.5, rngs=rngs, **options)

    def __call__(self, x):
        return x + nnx.relu(self.norm(self.linear(x)))


def loss(model, x):
    return jnp.sum(model(x) ** 2) / 100


def gradient_and_state(function, x):
    """The gradients of a fresh model, and its state after one step."""
    model = Block(nnx.Rngs(0))
    gradient = function(model, x)
    return nnx.to_pure_dict(gradient), arrays(model)


def functional(model, x):
    """The same with nnx.split, nnx.merge and plain jax."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradient(params, rest, x):
        merged = nnx.merge(graph, params, rest, copy=True)
        return loss(merged, x), nnx.state(merged, nnx.BatchStat)

    result, statistics = gradient(params, rest, x)
    nnx.update(model, statistics)
    return result


def test_transformations_update_once(rng):
    x = images(rng)
    kernel = np.asarray(Block(nnx.Rngs(0)).linear.kernel[...], np.float64)
    mean, var = reference.update(0, 1, reference.batch_norm(x @ kernel), 0.5)
    transformed = {
        "eager": nnx.grad(loss),
        "jit": nnx.jit(nnx.grad(loss)),
        "jit of remat": nnx.jit(nnx.grad(lambda model, x: nnx.remat(loss)(model, x))),
        "split and merge": functional,
    }
    results = {name: gradient_and_state(function, x) for name, function in transformed.items()}
    for gradient, state in results.values():
        assert_states_close(gradient, results["eager"][0], condition=10)
        assert_close(state["norm"]["mean"], mean, scale=1)
        assert_close(state["norm"]["var"], var)


def stacked(seeds, **options):
    """Blocks stacked along a new first axis of every variable."""
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    return nnx.vmap(lambda key: Block(nnx.Rngs(key), **options))(keys)


def one_of(model, index):
    graph, state = nnx.split(model)
    return nnx.merge(graph, jax.tree.map(lambda leaf: leaf[index], state))


def test_scan_updates_each_layer_once(rng):
    x = images(rng)
    model = stacked(range(3))
    layers = [one_of(model, i) for i in range(3)]
    run = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    gradient = nnx.jit(nnx.grad(lambda model, x: jnp.sum(run(x, model) ** 2) / 100))(model, x)

    def unrolled(layers, x):
        for layer in layers:
            x = layer(x)
        return jnp.sum(x**2) / 100

    expected = nnx.jit(nnx.grad(unrolled))(nnx.List(layers), x)
    for i in range(3):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], nnx.to_pure_dict(gradient))
        assert_states_close(one, nnx.to_pure_dict(expected)[i], condition=100)
        assert_states_close(arrays(one_of(model, i)), arrays(layers[i]), condition=100)


def test_vmap_over_models_of_their_own(rng):
    x = np.stack([images(rng), images(rng) + 5])
    model = stacked(range(2))
    layers = [one_of(model, i) for i in range(2)]
    out = nnx.jit(nnx.vmap(lambda model, x: model(x)))(model, x)
    for i, layer in enumerate(layers):
        assert_close(out[i], applied(layer, x[i]))
        assert_states_close(arrays(one_of(model, i)), arrays(layer))


def test_vmap_over_the_batch_shares_statistics(rng):
    x = images(rng)
    norm = made(jbn.nnx, momentum=0.0, axis_name="batch")
    out = nnx.jit(nnx.vmap(lambda norm, x: norm(x), in_axes=(None, 0), axis_name="batch"))(norm, x)
    expected = reference.batch_norm(x)
    assert_close(out, expected.out)
    assert_close(norm.var[...], expected.var)


@pytest.mark.devices(4)
@pytest.mark.parametrize("groups", [None, [[0, 1], [2, 3]]])
def test_shard_map_shares_statistics(rng, groups):
    mesh = Mesh(np.array(jax.devices()[:4]), ("devices",))
    x = images(rng, batch=8)
    graph, state = nnx.split(made(jbn.nnx, axis_name="devices", axis_index_groups=groups))
    spec = P("devices")
    shared = jax.shard_map(lambda x: nnx.merge(graph, state, copy=True)(x), mesh=mesh, in_specs=spec, out_specs=spec)
    out = jax.jit(shared)(x)
    for part in np.split(np.arange(8), 1 if groups is None else 2):
        assert_close(out[part], reference.batch_norm(x[part]).out)


def test_shapes_without_arrays():
    model = nnx.eval_shape(lambda: Block(nnx.Rngs(0)))
    assert isinstance(model.norm.mean.get_value(), jax.ShapeDtypeStruct)
    out = nnx.eval_shape(lambda x: Block(nnx.Rngs(0))(x), jax.ShapeDtypeStruct((5, 3), jnp.float32))
    assert out.shape == (5, 3)


def test_gradient_accumulation_updates_once_a_microbatch(rng):
    """Four microbatches in each step, under jit: together, k updates keep `momentum` of the old value."""
    batches = np.stack([images(rng) for _ in range(4)])
    norm = made(jbn.nnx, momentum=jbn.momentum.per_microbatch(0.5, 4))

    @nnx.jit
    def accumulated(norm, batches):
        gradients = [nnx.grad(lambda norm, x: jnp.sum(norm(x) ** 3))(norm, x) for x in batches]
        return jax.tree.map(lambda *leaves: sum(leaves), *gradients)

    gradient = accumulated(norm, batches)
    mean, var = 0.0, 1.0
    for batch in batches:
        mean, var = reference.update(mean, var, reference.batch_norm(batch), 0.5**0.25)
    assert_close(norm.mean[...], mean)
    assert_close(norm.var[...], var)
    expected = sum(np.sum(reference.batch_norm(batch).out ** 2 * 3, axis=(0, 1)) for batch in batches)
    assert_close(gradient["bias"][...], expected)


def test_an_optimizer_trains_a_model_and_its_statistics(rng):
    model = Block(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        value, gradient = nnx.value_and_grad(loss)(model, x)
        optimizer.update(model, gradient)
        return value

    x = images(rng)
    losses = [float(step(model, optimizer, x)) for _ in range(5)]
    assert losses[-1] < losses[0]
    assert np.all(model.norm.mean[...] != 0)
