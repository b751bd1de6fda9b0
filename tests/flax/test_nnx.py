"""The NNX module: Flax's variables and calls, jbn's numbers, each update made once under every transformation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from support import reference
from support.tolerances import assert_close

import jbn

OPTIONS = {
    "defaults": {},
    "first axis": {"axis": 1},
    "no scale": {"use_scale": False},
    "no bias": {"use_bias": False},
    "neither": {"use_scale": False, "use_bias": False},
    "half-precision parameters": {"param_dtype": jnp.bfloat16},
    "drawn parameters": {"scale_init": nnx.initializers.normal(), "bias_init": nnx.initializers.normal()},
    "metadata": {"scale_metadata": {"tag": "s"}, "bias_metadata": {"tag": "b"}},
}


def images(rng, batch=6, dtype=np.float32):
    return (rng.normal(size=(batch, 3, 3)) * 2 + 1).astype(dtype)


def made(module, **options):
    return module.BatchNorm(**{"num_features": 3, "rngs": nnx.Rngs(0), **options})


def arrays(model):
    return nnx.to_pure_dict(nnx.state(model))


def assert_states_close(actual, expected, **bounds):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert_close(a, e, **bounds)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_variables_are_those_of_flax(options):
    ours, flaxs = (nnx.state(made(module, **options)) for module in (jbn.nnx, nnx))
    assert jax.tree.structure(ours) == jax.tree.structure(flaxs)
    for a, e in zip(jax.tree.leaves(ours), jax.tree.leaves(flaxs), strict=True):
        assert a.dtype == e.dtype
        np.testing.assert_array_equal(a, e)


@pytest.mark.standard_promotion
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("masked", [False, True])
def test_steps_are_those_of_flax(rng, options, masked):
    ours = made(jbn.nnx, momentum=0.8, **options)
    flaxs = made(nnx, momentum=0.8, use_fast_variance=False, **options)
    for _ in range(4):
        x, mask = images(rng), None
        if masked:
            mask = rng.random((6, 1, 3) if "axis" in options else (6, 3, 1)) < 0.6
        out, expected = ours(x, mask=mask), flaxs(x, mask=mask)
        valid = np.broadcast_to(True if mask is None else mask, x.shape)
        assert out.dtype == expected.dtype
        assert_close(np.where(valid, out, 0), np.where(valid, expected, 0))
        assert np.all(np.asarray(out)[~valid] == 0)
        assert_states_close(arrays(ours), arrays(flaxs))
        assert_close(ours(x, use_running_average=True), flaxs(x, use_running_average=True))


@pytest.mark.standard_promotion
@pytest.mark.parametrize("x_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_dtype_of_the_result_is_that_of_flax(rng, x_dtype, param_dtype, dtype):
    x = images(rng).astype(x_dtype)
    dtype = None if dtype is None else jnp.dtype(dtype)
    for affine in (True, False):
        options = dict(dtype=dtype, param_dtype=jnp.dtype(param_dtype), use_scale=affine, use_bias=affine)
        for average in (True, False):
            ours, flaxs = (made(module, use_running_average=average, **options)(x) for module in (jbn.nnx, nnx))
            assert ours.dtype == flaxs.dtype


def test_inference_in_half_precision_keeps_the_statistics_in_float32(rng):
    """Flax casts them to `dtype`: half a unit of a mean of 100 is a quarter of a standard deviation."""
    x = (rng.normal(size=(512, 3)) + 100.3).astype(np.float32)
    norm = made(jbn.nnx, momentum=0.0, dtype=jnp.bfloat16)
    norm(x)
    expected = reference.batch_norm(x).out
    np.testing.assert_allclose(np.asarray(norm(x, use_running_average=True), np.float64), expected, atol=0.02)


def test_options_reach_the_function(rng):
    x, mask = images(rng), rng.random((6, 3)) < 0.7
    options = dict(momentum=jbn.momentum.warmup(0.9), epsilon=1e-2, running_var="total", ghost_batch_size=3)
    norm = made(jbn.nnx, activation=jax.nn.relu, dtype=jnp.float16, **options)
    out = norm(x, mask=mask)
    expected, state = jbn.batch_norm(
        *jbn.init(3), x, True, mask=mask, activation=jax.nn.relu, dtype=jnp.float16, **options
    )
    np.testing.assert_array_equal(out, expected)
    for name, value in state._asdict().items():
        np.testing.assert_array_equal(getattr(norm, name)[...], value)


def test_features_on_two_axes(rng):
    x = rng.normal(size=(6, 2, 5, 3)).astype(np.float32)
    norm = jbn.nnx.BatchNorm((2, 3), axis=(-1, 1), rngs=nnx.Rngs(0))
    assert_close(norm(x), reference.batch_norm(x, feature_axis=(1, 3)).out)
    assert norm.mean[...].shape == (2, 3)


def test_train_and_eval_switch(rng):
    x, norm = images(rng), made(jbn.nnx)
    norm.eval()
    np.testing.assert_array_equal(norm(x), norm(x, use_running_average=True))
    np.testing.assert_array_equal(norm.mean[...], np.zeros(3))
    norm.train()
    norm(x)
    assert np.all(norm.mean[...] != 0)
    norm.set_view(use_running_average=True)
    norm.set_view()
    assert norm.use_running_average is True


def test_a_schedule_counts(rng):
    norm = made(jbn.nnx, momentum=jbn.momentum.cumulative())
    batches = [images(rng) for _ in range(3)]
    for x in batches:
        norm(x)
    assert int(norm.count[...]) == 3
    assert_close(norm.mean[...], np.mean(batches, axis=(0, 1, 2), dtype=np.float64))
    assert made(jbn.nnx).count is None


REFUSED = {
    "fast variance": (dict(use_fast_variance=False), TypeError, "`use_fast_variance` is False.*not needed"),
    "promotion": (dict(promote_dtype=print), TypeError, "`promote_dtype` is .*not needed"),
    "axis": (dict(axis=3), ValueError, "`axis` 3 is out of range"),
    "momentum": (dict(momentum=2.0), ValueError, "`momentum` is 2.0"),
    "flag": (dict(use_running_average=None), ValueError, "`use_running_average` is given neither at construction nor"),
    "number of features": (dict(num_features=5.0), TypeError, "`num_features` is 5.0"),
    "dtype": (dict(dtype=jnp.int32), TypeError, "`dtype` is int32: expected one of float32"),
    "dtype of parameters": (dict(param_dtype="foo"), TypeError, "`param_dtype` is 'foo'"),
    "initializer": (
        dict(bias_init=lambda key, shape, dtype: jnp.zeros((2,), dtype)),
        ValueError,
        "`bias` has shape \\(2,\\): expected \\(3,\\), as x of shape \\(4, 3\\) has it on `axis` -1",
    ),
    "features": (dict(axis=0), ValueError, "has features \\(4,\\) on `axis` 0, but `num_features` is 3"),
}


@pytest.mark.parametrize(("options", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals(options, error, message):
    with pytest.raises(error, match=message):
        made(jbn.nnx, **options)(jnp.ones((4, 3)))


def test_a_schedule_set_later_is_refused():
    norm = made(jbn.nnx)
    norm.momentum = jbn.momentum.cumulative()
    with pytest.raises(ValueError, match=r"`momentum` or a bound is a schedule.*has no `count`"):
        norm(jnp.ones((4, 3)))


class Block(nnx.Module):
    """Linear, norm and relu, with the input added so that blocks can be stacked."""

    def __init__(self, rngs, **options):
        self.linear = nnx.Linear(3, 3, use_bias=False, kernel_init=nnx.initializers.normal(1.0), rngs=rngs)
        self.norm = jbn.nnx.BatchNorm(3, momentum=0.5, rngs=rngs, **options)

    def __call__(self, x):
        return x + nnx.relu(self.norm(self.linear(x)))


def loss(model, x):
    return jnp.sum(model(x) ** 2) / 100


def gradient_and_state(function, seed, x):
    """The gradients of a fresh model, and its state after one step."""
    model = Block(nnx.Rngs(seed))
    gradient = function(model, x)
    return nnx.to_pure_dict(gradient), arrays(model)


def functional(model, x):
    """By split and merge, and plain jax."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradient(params, rest, x):
        merged = nnx.merge(graph, params, rest, copy=True)
        return loss(merged, x), nnx.state(merged, nnx.BatchStat)

    result, statistics = gradient(params, rest, x)
    nnx.update(model, statistics)
    return result


TRANSFORMED = {
    "jit": nnx.jit(nnx.grad(loss)),
    "remat": nnx.grad(lambda model, x: nnx.remat(loss)(model, x)),
    "jit of remat": nnx.jit(nnx.grad(lambda model, x: nnx.remat(loss)(model, x))),
    "split and merge": functional,
}


@pytest.mark.parametrize("transformed", TRANSFORMED.values(), ids=TRANSFORMED)
def test_transformations_update_once(rng, transformed):
    x = images(rng)
    assert_states_close(gradient_and_state(transformed, 0, x), gradient_and_state(nnx.grad(loss), 0, x), condition=10)


def test_one_step_moves_the_statistics_once(rng):
    x = images(rng)
    model = Block(nnx.Rngs(0))
    before = reference.batch_norm(x @ np.asarray(model.linear.kernel[...]))
    nnx.grad(loss)(model, x)
    mean, var = reference.update(0, 1, before, 0.5)
    assert_close(model.norm.mean[...], mean)
    assert_close(model.norm.var[...], var)


def stacked(seeds, **options):
    """Blocks along a new first axis of every variable."""
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    return nnx.vmap(lambda key: Block(nnx.Rngs(key), **options))(keys)


def one_of(model, index):
    graph, state = nnx.split(model)
    return nnx.merge(graph, jax.tree.map(lambda leaf: leaf[index], state))


def test_scan_updates_each_layer_once(rng):
    x = images(rng)
    model = stacked(range(4))
    layers = [one_of(model, i) for i in range(4)]
    run = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    gradient = nnx.jit(nnx.grad(lambda model, x: jnp.sum(run(x, model) ** 2) / 100))(model, x)

    def unrolled(layers, x):
        for layer in layers:
            x = layer(x)
        return jnp.sum(x**2) / 100

    expected = nnx.grad(unrolled)(nnx.List(layers), x)
    for i in range(4):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], nnx.to_pure_dict(gradient))
        assert_states_close(one, nnx.to_pure_dict(expected)[i], condition=100)
        assert_states_close(arrays(one_of(model, i)), arrays(layers[i]), condition=100)


def test_vmap_over_models_of_their_own(rng):
    x = np.stack([images(rng), images(rng) + 5])
    model = stacked(range(2))
    layers = [one_of(model, i) for i in range(2)]
    out = nnx.vmap(lambda model, x: model(x))(model, x)
    for i, layer in enumerate(layers):
        assert_close(out[i], layer(x[i]))
        assert_states_close(arrays(one_of(model, i)), arrays(layer))


def test_vmap_over_the_batch_shares_statistics(rng):
    x = images(rng)
    norm = made(jbn.nnx, momentum=0.0, axis_name="batch")
    out = nnx.vmap(lambda norm, x: norm(x), in_axes=(None, 0), axis_name="batch")(norm, x)
    expected = reference.batch_norm(x)
    assert_close(out, expected.out)
    assert_close(norm.var[...], expected.var)


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
    """Four microbatches a step, under jit: k updates that together keep `momentum` of the start."""
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


def test_a_training_loop_with_an_optimizer(rng):
    optax = pytest.importorskip("optax")
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


@pytest.mark.parametrize("bounds", [{}, {"r_max": 1.5, "d_max": 0.2}])
def test_renorm_is_the_core_s(rng, bounds):
    x = (rng.normal(size=(8, 3)) * 2 + 3).astype(np.float32)
    norm = jbn.nnx.BatchRenorm(3, rngs=nnx.Rngs(0), momentum=0.9, **bounds)
    assert (norm.count is None) == bool(bounds)
    norm.mean[...], norm.var[...] = jnp.full(3, 2.0), jnp.full(3, 2.0)
    state = jbn.State(norm.mean[...], norm.var[...], jnp.int32(0))
    params = jbn.Params(norm.scale[...], norm.bias[...])
    out = norm(x)
    expected, new_state = jbn.batch_renorm(params, state, x, True, momentum=0.9, **bounds)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(norm.var[...], new_state.var)
    inference = norm(x, use_running_average=True)
    np.testing.assert_array_equal(inference, jbn.normalize(params, new_state, x))


def test_renorm_made_for_numbers_takes_no_schedule_later():
    norm = jbn.nnx.BatchRenorm(3, r_max=2.0, d_max=1.0, rngs=nnx.Rngs(0))
    norm.r_max = jbn.renorm.r_max()
    with pytest.raises(ValueError, match="`momentum` or a bound is a schedule"):
        norm(jnp.ones((4, 3)))
