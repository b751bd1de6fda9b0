"""Models of other libraries, trained there, predict and train on the same in jbn; and arrays come back bit for bit."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from support.tolerances import allowed, assert_close

import jbn
from jbn.convert import join, split


def assert_same_prediction(actual, expected):
    """Within 1e-5 of the largest output, in float32."""
    expected = np.asarray(expected)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.max(np.abs(expected)))


def assert_bit_equal(actual, expected):
    """Trees of the same keys, whose arrays have the same bits."""
    actual, expected = (dict(tree) for tree in (actual, expected))
    assert sorted(actual) == sorted(expected)
    for name, e in expected.items():
        a, e = np.asarray(actual[name]), np.asarray(e)
        assert a.dtype == e.dtype, name
        np.testing.assert_array_equal(a, e, err_msg=name)


def forward(convolutions, norms, dense, x, train, *, layout, **options):
    """Two convolutions, each with norm and relu; the mean over places; a dense layer. New states beside the output."""
    channels = layout[0].index("C")
    states = []
    for (kernel, bias), (params, state) in zip(convolutions, norms, strict=True):
        x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=(*layout, layout[0]))
        if bias is not None:
            x += jnp.expand_dims(bias, [axis for axis in range(4) if axis != channels])
        x, state = jbn.batch_norm(params, state, x, train, feature_axis=channels, activation=jax.nn.relu, **options)
        states.append(state)
    kernel, bias = dense
    return x.mean([axis for axis in (1, 2, 3) if axis != channels]) @ kernel + bias[None], states


def images(rng, *shape):
    return (rng.normal(size=shape) * 3 + 1).astype(np.float32)


@pytest.fixture
def torch_model(rng):
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install -e '.[peers]'")
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3),
        torch.nn.BatchNorm2d(8),
        torch.nn.ReLU(),
        torch.nn.Conv2d(8, 6, 3, bias=False),
        torch.nn.BatchNorm2d(6),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(6, 4),
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(5):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(torch.tensor(images(rng, 8, 3, 8, 8))), torch.arange(8) % 4)
        loss.backward()
        optimizer.step()
    return torch, model


@pytest.mark.standard_promotion
def test_a_trained_torch_model(rng, torch_model):
    torch, model = torch_model
    norms, rest = split(model.state_dict(), "torch")
    assert list(norms) == ["1", "4"]
    assert sorted(rest) == ["0.bias", "0.weight", "3.weight", "8.bias", "8.weight"]
    assert [int(state.count) for _, state in norms.values()] == [5, 5]
    weights = {name: jnp.asarray(tensor.numpy()) for name, tensor in rest.items()}
    run = functools.partial(
        forward,
        [(weights["0.weight"], weights["0.bias"]), (weights["3.weight"], None)],
        norms.values(),
        (weights["8.weight"].T, weights["8.bias"]),
        layout=("NCHW", "OIHW"),
        momentum=jbn.momentum.from_torch(0.1),
        running_var="unbiased",
    )
    x = images(rng, 8, 3, 8, 8)
    assert_same_prediction(run(x, False)[0], model.eval()(torch.tensor(x)).detach())
    model.train()(torch.tensor(x))
    after, _ = split(model.state_dict(), "torch")
    for state, (_, expected) in zip(run(x, True)[1], after.values(), strict=True):
        assert int(state.count) == int(expected.count) == 6
        assert_close(state.mean, expected.mean, condition=10)
        assert_close(state.var, expected.var, condition=10)


@pytest.mark.standard_promotion
def test_a_torch_norm_in_a_flax_model(rng, torch_model):
    torch, model = torch_model
    norms, _ = split(model.state_dict(), "torch")
    variables = join({"BatchNorm_0": norms["1"]}, {}, "linen")

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=True)(x)

    x = images(rng, 2, 4, 4, 8)
    expected = model[1].eval()(torch.tensor(x.transpose(0, 3, 1, 2))).detach().numpy().transpose(0, 2, 3, 1)
    assert_same_prediction(Network().apply(variables, x), expected)


@pytest.mark.standard_promotion
def test_torch_there_and_back(torch_model):
    torch, model = torch_model
    state_dict = model.state_dict()
    back = join(*split(state_dict, "torch"), "torch")
    assert_bit_equal(back, state_dict)
    model.load_state_dict({name: torch.as_tensor(array) for name, array in back.items()})


@pytest.mark.standard_promotion
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_torch_goes_on_writing_to_its_own_memory(torch_model, dtype):
    torch, model = torch_model
    model = model.to(getattr(torch, dtype))
    norms, _ = split(model.state_dict(), "torch")
    before = np.array(norms["1"][0].scale)
    with torch.no_grad():
        model[1].weight.fill_(7)
    np.testing.assert_array_equal(norms["1"][0].scale, before)


@pytest.mark.standard_promotion
def test_torch_tensors_without_data(torch_model):
    torch, _ = torch_model
    with pytest.raises(ValueError, match="`running_mean` is a Tensor, which makes no array"):
        jbn.convert.from_torch(torch.nn.BatchNorm1d(3, device="meta").state_dict())
    with pytest.raises(ValueError, match="`weight` Attempted to use an uninitialized parameter"):
        jbn.convert.from_torch(torch.nn.LazyBatchNorm1d().state_dict())


@pytest.mark.standard_promotion
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_torch_in_half_precision(torch_model, dtype):
    torch, model = torch_model
    norms, _ = split(model.to(getattr(torch, dtype)).state_dict(), "torch")
    params, state = norms["1"]
    assert params.scale.dtype == dtype
    assert state.mean.dtype == jnp.float32
    np.testing.assert_array_equal(state.mean, model[1].running_mean.float().numpy())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    back = join(*split(before, "torch"), "torch")
    model.load_state_dict({name: torch.as_tensor(array) for name, array in back.items()})
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    strided = torch.arange(8.0).to(getattr(torch, dtype))[::2]
    entries = {"weight": strided, "running_mean": strided, "running_var": strided}
    np.testing.assert_array_equal(jbn.convert.from_torch(entries)[1].mean, [0, 2, 4, 6])


@pytest.fixture
def keras_model(rng):
    keras = pytest.importorskip("keras", reason="keras is not installed: pip install -e '.[peers]'")
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            keras.layers.Conv2D(8, 3),
            keras.layers.BatchNormalization(momentum=0.9, name="first"),
            keras.layers.ReLU(),
            keras.layers.Conv2D(6, 3, use_bias=False),
            keras.layers.BatchNormalization(momentum=0.9, name="second"),
            keras.layers.ReLU(),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(4),
        ],
        name="net",
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1), loss)
    for _ in range(5):
        model.train_on_batch(images(rng, 8, 8, 8, 3), np.arange(8) % 4)
    return keras, model


def keras_variables(model):
    return {variable.path: variable for variable in model.variables}


@pytest.mark.standard_promotion
def test_a_trained_keras_model(rng, keras_model):
    _, model = keras_model
    norms, rest = split(keras_variables(model), "keras", count=5)
    assert list(norms) == ["net/first", "net/second"]
    weights = [jnp.asarray(np.asarray(variable)) for variable in rest.values()]
    run = functools.partial(
        forward,
        [(weights[0], weights[1]), (weights[2], None)],
        norms.values(),
        (weights[3], weights[4]),
        layout=("NHWC", "HWIO"),
        epsilon=1e-3,
        momentum=0.9,
    )
    x = images(rng, 8, 8, 8, 3)
    assert_same_prediction(run(x, False)[0], model(x, training=False))
    model(x, training=True)
    after, _ = split(keras_variables(model), "keras")
    for state, (_, expected) in zip(run(x, True)[1], after.values(), strict=True):
        assert int(state.count) == 6
        assert_close(state.mean, expected.mean, condition=10)
        assert_close(state.var, expected.var, condition=10)


@pytest.mark.standard_promotion
def test_keras_there_and_back(keras_model):
    _, model = keras_model
    variables = keras_variables(model)
    before = {path: np.asarray(variable) for path, variable in variables.items()}
    back = join(*split(variables, "keras"), "keras")
    assert_bit_equal(back, before)
    for path, variable in variables.items():
        variable.assign(back[path])


@pytest.mark.standard_promotion
def test_a_trained_haiku_model(rng):
    hk = pytest.importorskip("haiku", reason="haiku is not installed: pip install -e '.[peers]'")

    def network(x, train):
        x = hk.Conv2D(8, 3, padding="VALID", name="conv1")(x)
        x = jax.nn.relu(hk.BatchNorm(True, True, 0.9, name="norm1")(x, train))
        x = hk.Conv2D(6, 3, padding="VALID", with_bias=False, name="conv2")(x)
        x = jax.nn.relu(hk.BatchNorm(True, True, 0.9, name="norm2")(x, train))
        return hk.Linear(4, name="dense")(x.mean((1, 2)))

    model = hk.transform_with_state(network)
    params, state = model.init(jax.random.key(0), images(rng, 8, 8, 8, 3), True)
    for _ in range(5):
        x = images(rng, 8, 8, 8, 3)
        gradient = jax.grad(lambda p, x=x, s=state: jnp.mean(model.apply(p, s, None, x, True)[0] ** 2))(params)
        _, state = model.apply(params, state, None, x, True)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)
    norms, (rest, others) = split((params, state), "haiku")
    assert others == {}
    assert sorted(rest) == ["conv1", "conv2", "dense"]
    run = functools.partial(
        forward,
        [(rest["conv1"]["w"], rest["conv1"]["b"]), (rest["conv2"]["w"], None)],
        norms.values(),
        (rest["dense"]["w"], rest["dense"]["b"]),
        layout=("NHWC", "HWIO"),
        momentum=jbn.momentum.debiased(0.9),
    )
    x = images(rng, 8, 8, 8, 3)
    assert_same_prediction(run(x, False)[0], model.apply(params, state, None, x, False)[0])
    _, state = model.apply(params, state, None, x, True)
    for ours, (_, expected) in zip(run(x, True)[1], split((params, state), "haiku")[0].values(), strict=True):
        assert int(ours.count) == int(expected.count) == 6
        # Haiku's variance is E[x^2] - E[x]^2, which amplifies rounding by its second term over the variance.
        condition = 1 + float(jnp.max(jnp.square(expected.mean) / expected.var))
        assert_close(ours.mean, expected.mean, condition=10)
        assert_close(ours.var, expected.var, condition=10 * condition)


@pytest.mark.standard_promotion
def test_a_haiku_model_that_was_only_initialized(rng):
    """Haiku's averages are then those of the batch that it was initialized with, and its inference uses them."""
    hk = pytest.importorskip("haiku", reason="haiku is not installed: pip install -e '.[peers]'")
    model = hk.transform_with_state(lambda x, train: hk.BatchNorm(True, True, 0.9)(x, train))
    x = images(rng, 8, 5)
    params, state = model.init(jax.random.key(0), x, True)
    norms, _ = split((params, state), "haiku")
    expected, _ = model.apply(params, state, None, x, False)
    assert_same_prediction(jbn.normalize(*norms["batch_norm"], x), expected)
    assert int(norms["batch_norm"][1].count) == 0


@pytest.mark.standard_promotion
@pytest.mark.parametrize("mode", ["ema", "batch"])
def test_a_trained_equinox_model(rng, mode):
    eqx = pytest.importorskip("equinox", reason="equinox is not installed: pip install -e '.[peers]'")

    class Network(eqx.Module):
        layers: list

        def __init__(self, key):
            first, second, third = jax.random.split(key, 3)
            # So small a momentum that after 30 steps nothing is left of the start, which Equinox's inference misreads.
            norm = functools.partial(eqx.nn.BatchNorm, axis_name="batch", momentum=0.4, mode=mode)
            self.layers = [eqx.nn.Conv2d(3, 8, 3, key=first), norm(8)]
            self.layers += [eqx.nn.Conv2d(8, 6, 3, use_bias=False, key=second), norm(6), eqx.nn.Linear(6, 4, key=third)]

        def __call__(self, x, state):
            for convolution, norm in (self.layers[:2], self.layers[2:4]):
                x, state = norm(convolution(x), state)
                x = jax.nn.relu(x)
            return self.layers[4](x.mean((1, 2))), state

    model, state = eqx.nn.make_with_state(Network)(jax.random.key(0))
    apply = functools.partial(jax.vmap, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(30):
            _, state = apply(model)(images(rng, 8, 3, 8, 8), state)
        x = images(rng, 8, 3, 8, 8)
        expected, _ = apply(eqx.nn.inference_mode(model))(x, state)
    norms, (rest, _) = split((model, state), "equinox")
    assert list(norms) == ["layers/1", "layers/3"]
    assert rest.layers[1] is rest.layers[3] is None
    convolutions = [(rest.layers[0].weight, rest.layers[0].bias[:, 0, 0]), (rest.layers[2].weight, None)]
    dense = rest.layers[4].weight.T, rest.layers[4].bias
    out, _ = forward(convolutions, norms.values(), dense, x, False, layout=("NCHW", "OIHW"))
    assert_same_prediction(out, expected)


@pytest.mark.standard_promotion
def test_equinox_batch_mode_is_converted_to_what_it_means(rng):
    eqx = pytest.importorskip("equinox", reason="equinox is not installed: pip install -e '.[peers]'")
    layer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(3, "batch", momentum=0.99, mode="batch")
    _, start = jbn.convert.from_equinox(layer, state)
    np.testing.assert_array_equal(start.var, np.ones(3))
    batches = rng.normal(size=(10, 64, 3)).astype(np.float32)
    for x in batches:
        _, state = jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)
    _, converted = jbn.convert.from_equinox(layer, state)
    weights = 0.99 ** np.arange(9, -1, -1)
    assert int(converted.count) == 10
    # What is left of the start is 0.99**10, and is taken out of a hidden value that was rounded beside it.
    condition = 1 / (1 - 0.99**10)
    batches = batches.astype(np.float64)
    assert_close(converted.mean, np.average(batches.mean(1), axis=0, weights=weights), condition=condition, scale=1)
    assert_close(converted.var, np.average(batches.var(1), axis=0, weights=weights), condition=condition)


@pytest.mark.standard_promotion
@pytest.mark.parametrize("mode", ["ema", "batch"])
def test_equinox_inside_jit_and_in_stacks(rng, mode):
    eqx = pytest.importorskip("equinox", reason="equinox is not installed: pip install -e '.[peers]'")
    layer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(3, "batch", momentum=0.9, mode=mode)
    x = images(rng, 8, 3)
    _, state = jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)
    traced = eqx.filter_jit(jbn.convert.from_equinox)(layer, state)
    for a, e in zip(jax.tree.leaves(traced), jax.tree.leaves(jbn.convert.from_equinox(layer, state)), strict=True):
        assert_close(a, e, condition=10)
    stack, states = eqx.filter_vmap(lambda _: eqx.nn.make_with_state(eqx.nn.BatchNorm)(3, "batch", mode=mode))(
        jnp.arange(2)
    )
    with pytest.raises(ValueError, match=r"`layer` is a stack of \(2,\) norms"):
        jbn.convert.from_equinox(stack, states)


def test_equinox_without_memory():
    layer = SimpleNamespace(mode="batch", momentum=0.0, weight=None, bias=None, batch_counter=0, batch_state_index=1)
    _, state = jbn.convert.from_equinox(layer, {0: np.int32(2), 1: (np.float32([3]), np.float32([4]))})
    np.testing.assert_array_equal([state.mean, state.var], [[3], [4]])


def test_equinox_variance_is_not_negative():
    """The hidden variance of a constant channel may be rounded to less than what is left of the start."""
    layer = SimpleNamespace(mode="batch", momentum=0.9, weight=None, bias=None, batch_counter=0, batch_state_index=1)
    left = np.float32([0.9**10]) * np.float32(1 - 1e-6)
    _, state = jbn.convert.from_equinox(layer, {0: np.int32(10), 1: (np.zeros(1, np.float32), left)})
    np.testing.assert_array_equal(state.var, np.zeros(1))


@pytest.mark.standard_promotion
def test_equinox_before_its_first_batch_is_unset():
    eqx = pytest.importorskip("equinox", reason="equinox is not installed: pip install -e '.[peers]'")
    layer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(3, "batch", channelwise_affine=False, mode="ema")
    params, converted = jbn.convert.from_equinox(layer, state)
    assert params == jbn.Params(None, None)
    np.testing.assert_array_equal(converted.var, np.full(3, -np.inf))


class LinenNet(nn.Module):
    norm: type = nn.BatchNorm

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.Dense(5)(x)
            x = self.norm(use_running_average=False, momentum=0.9)(x)
        return nn.LayerNorm()(x)


def test_linen_trees(rng):
    x = images(rng, 6, 4)
    model = LinenNet()
    variables = model.init(jax.random.key(0), x)
    _, updated = model.apply(variables, x, mutable=["batch_stats"])
    variables = {**variables, **updated, "cache": {"step": 3}}
    norms, rest = split(variables, "linen", count=7)
    assert list(norms) == ["BatchNorm_0", "BatchNorm_1"]
    kept = {
        jax.tree_util.keystr(path[:2], simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(rest)
    }
    assert kept == {"params/Dense_0", "params/Dense_1", "params/LayerNorm_0", "cache/step"}
    back = join(norms, rest, "linen")
    assert jax.tree.structure(back) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, back, variables)
    counted = join(norms, rest, "linen", with_count=True)["batch_stats"]["BatchNorm_0"]
    assert int(counted["count"]) == 7
    assert_close(
        jbn.normalize(*norms["BatchNorm_0"], x @ jnp.ones((4, 5))),
        nn.BatchNorm(use_running_average=True).apply(
            {kind: tree["BatchNorm_0"] for kind, tree in variables.items() if kind != "cache"}, x @ jnp.ones((4, 5))
        ),
    )


def test_linen_norms_that_are_scanned_over(rng):
    stack = nn.scan(
        lambda norm, x: (norm(x), None),
        variable_axes={"params": 0, "batch_stats": 0},
        split_rngs={"params": True},
        length=3,
    )

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            norm = jbn.linen.BatchNorm(use_running_average=False, momentum=jbn.momentum.cumulative(), name="norm")
            return stack(norm, x)[0]

    variables = Net().init(jax.random.key(0), images(rng, 6, 4))
    norms, rest = split(variables, "linen")
    _, state = norms["norm"]
    assert state.mean.shape == (3, 4)
    assert state.count.shape == (3,)
    jax.tree.map(np.testing.assert_array_equal, join(norms, rest, "linen"), variables)
    counted, _ = split(variables, "linen", count=9)
    np.testing.assert_array_equal(counted["norm"][1].count, np.full(3, 9))


class NNXNet(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List([nnx.Linear(4, 4, rngs=rngs), nnx.BatchNorm(4, use_bias=False, rngs=rngs)])
        self.last = jbn.nnx.BatchNorm(4, momentum=jbn.momentum.cumulative(), rngs=rngs)

    def __call__(self, x):
        for layer in (*self.blocks, self.last):
            x = layer(x)
        return x


@pytest.mark.parametrize("pure", [False, True])
def test_nnx_trees(rng, pure):
    model, other = NNXNet(nnx.Rngs(0)), NNXNet(nnx.Rngs(1))
    x = images(rng, 6, 4)
    model(x)
    state = nnx.state(model)
    norms, rest = split(nnx.to_pure_dict(state) if pure else state, "nnx")
    assert sorted(norms) == ["blocks/1", "last"]
    assert norms["blocks/1"][0].bias is None
    assert int(norms["last"][1].count) == 1
    assert len(jax.tree.leaves(rest)) == 3  # kernel, bias, and the count that one norm has
    nnx.update(other, join(norms, rest, "nnx"))
    for a, e in zip(jax.tree.leaves(nnx.state(other)), jax.tree.leaves(nnx.state(model)), strict=True):
        np.testing.assert_array_equal(a, e)
    model.eval(), other.eval()
    np.testing.assert_array_equal(other(x), model(x))


NORM = {"scale": np.ones(2, np.float32), "mean": np.zeros(2, np.float32), "var": np.full(2, 3, np.float32)}
NESTED = {
    "places turned to strings": ("nnx", {"blocks": {"0": NORM, "1": {"kernel": np.ones(2)}}}),
    "nothing but norms": ("nnx", {"blocks": {"0": NORM, "1": NORM}}),
    "places": ("nnx", {"blocks": {0: NORM, 1: NORM}}),
    "separators in keys": ("nnx", {"a/b": {"c": NORM}, "a": {"d/e": {"f": NORM}}}),
    "the norm alone": ("nnx", NORM),
    "a checkpoint around it": ("torch", {"epoch": 3, "model": {"a.bn.running_mean": 0, "a.bn.running_var": 0, "b": 0}}),
    "what is None": ("torch", {"bn.weight": None, "bn.bias": None, "bn.running_mean": 0, "bn.running_var": 0}),
    "mappings all the way": ("torch", {"a": {"bn": {"running_mean": 0, "running_var": 0}}, "b": {}}),
}


@pytest.mark.parametrize(("library", "tree"), NESTED.values(), ids=NESTED)
def test_mappings_come_back_nested_as_they_were(library, tree):
    tree = jax.tree.map(lambda leaf: np.ones(2, np.float32) if isinstance(leaf, int) else leaf, tree)
    back = join(*split(tree, library), library)
    names = "num_batches_tracked"
    for node in (back, back.get("model", {}), back.get("a", {}).get("bn", {}) if library == "torch" else {}):
        for name in [name for name in node if name.endswith(names)]:
            del node[name]
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, back, tree)


def test_nnx_dictionaries_of_norms():
    model, other = (nnx.Dict({"0": nnx.BatchNorm(2, rngs=nnx.Rngs(0))}) for _ in range(2))
    model["0"](np.float32([[1, 2], [3, 5]]))
    nnx.update(other, join(*split(nnx.state(model), "nnx"), "nnx"))
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(other)), nnx.to_pure_dict(nnx.state(model)))


def test_what_only_has_a_mean_is_left_alone():
    observed = {"batch_stats": {"observer": {"mean": TWO}, "norm": {"mean": TWO, "var": TWO}}}
    norms, rest = split(observed, "linen")
    assert list(norms) == ["norm"]
    assert rest["batch_stats"]["observer"] == {"mean": TWO}


def test_boxes_of_flax_are_named():
    variables = nn.BatchNorm(scale_init=nn.with_partitioning(nn.initializers.ones, ("model",))).init(
        jax.random.key(0), jnp.ones((2, 3)), use_running_average=True
    )
    with pytest.raises(ValueError, match=r"`scale` is a Partitioned, which makes no array: take it out by flax"):
        jbn.convert.from_linen(variables)
    assert jbn.convert.from_linen(nn.meta.unbox(variables))[0].scale.shape == (3,)


def test_haiku_entries_that_are_no_norm():
    average = {"average": np.ones((1, 2), np.float32), "counter": 3}
    wrong = {"mean_ema": average, "var_ema": {"hidden": TWO}, "scale": "heavy"}
    with pytest.raises(ValueError, match="not those of batch norm in Haiku") as caught:
        jbn.convert.from_haiku(wrong)
    for message in ("`var_ema.average` is missing", "`scale` is a str, which makes no array"):
        assert message in str(caught.value)
    other = {"net/~/counter": {"count": 3}, "net/norm/~/mean_ema": average, "net/norm/~/var_ema": average}
    norms, (params, state) = split(({"net/norm": {"scale": TWO}}, other), "haiku")
    assert list(norms) == ["net/norm"]
    assert (params, list(state)) == ({}, ["net/~/counter"])


def test_float64_is_not_cut_in_silence():
    with pytest.raises(ValueError, match="`running_mean` is float64, which jax cuts to float32"):
        jbn.convert.from_torch({"running_mean": np.ones(2), "running_var": TWO})


def test_float64_there_and_back(x64, rng):
    entries = {"running_mean": rng.normal(size=3), "running_var": rng.random(3), "num_batches_tracked": np.int64(4)}
    assert_bit_equal(jbn.convert.to_torch(*jbn.convert.from_torch(entries)), entries)


@pytest.mark.parametrize("count", [2**31, -3, 3.5, np.nan])
def test_stored_counts_that_are_none(count):
    with pytest.raises(ValueError, match=f"`num_batches_tracked` is {count}, not a whole number from 0 to 2147483647"):
        jbn.convert.from_torch({**GOOD, "num_batches_tracked": np.array(count)})


def test_conversion_inside_jit():
    variables = jbn.convert.to_linen(*jbn.init(2), with_count=True)
    params, state = jax.jit(jbn.convert.from_linen)(variables)
    jax.tree.map(np.testing.assert_array_equal, (params, state), jbn.init(2))


@pytest.mark.parametrize("library", ["torch", "keras", "linen", "nnx"])
@pytest.mark.parametrize(
    "affine", [jbn.Params(None, None), jbn.Params(jnp.full(2, 3.0), None), jbn.Params(None, jnp.full(2, 3.0))]
)
def test_one_norm_there_and_back(library, affine):
    state = jbn.State(jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0]), jnp.int32(5))
    options = {"with_count": True} if library in ("linen", "nnx") else {}
    arrays = getattr(jbn.convert, f"to_{library}")(affine, state, **options)
    params, back = getattr(jbn.convert, f"from_{library}")(arrays, **({"count": 5} if library == "keras" else {}))
    jax.tree.map(np.testing.assert_array_equal, back, state)
    if library == "torch" and affine != jbn.Params(None, None):
        affine = jbn.Params(
            jnp.ones(2) if affine.scale is None else affine.scale,
            jnp.zeros(2) if affine.bias is None else affine.bias,
        )
    assert jax.tree.structure(params) == jax.tree.structure(affine)
    jax.tree.map(np.testing.assert_array_equal, params, affine)


ONE, TWO = np.ones(1, np.float32), np.ones(2, np.float32)
GOOD = {"running_mean": TWO, "running_var": TWO}
WRONG = {
    "missing": ({"bn.running_mean": TWO}, ["bn: `running_var` is missing"]),
    "extra": ({"bn.running_mean": TWO, "bn.running_var": TWO, "bn.gamma": TWO}, ["bn: `gamma` is extra"]),
    "misshaped": (
        {"a.running_mean": TWO, "a.running_var": ONE, "b.running_mean": TWO, "b.running_var": TWO, "b.weight": ONE},
        ["a: `running_var` has shape (1,), not (2,) as `running_mean`", "b: `weight` has shape (1,), not (2,)"],
    ),
    "count": ({**GOOD, "num_batches_tracked": TWO}, ["`num_batches_tracked` has shape (2,), not ()"]),
    "whole numbers": ({**GOOD, "weight": np.ones(2, int)}, ["`weight` has dtype int32, not a float one"]),
    "no array": ({**GOOD, "weight": "heavy"}, ["`weight` is a str, which makes no array"]),
}


@pytest.mark.parametrize(("tree", "messages"), WRONG.values(), ids=WRONG)
def test_one_error_lists_all_that_is_wrong(tree, messages):
    with pytest.raises(ValueError, match="not those of batch norm in PyTorch") as caught:
        split(tree, "torch")
    for message in messages:
        assert message in str(caught.value)
    if not any("." in name for name in tree):
        with pytest.raises(ValueError, match="not those of batch norm"):
            jbn.convert.from_torch(tree)


REFUSED = {
    "library": (lambda: split({}, "mxnet"), ValueError, "`library` is 'mxnet': expected one of 'torch', 'keras'"),
    "only into jbn": (lambda: join({}, {}, "haiku"), ValueError, "`library` is 'haiku'"),
    "no norm": (
        lambda: split({"conv.weight": TWO}, "torch"),
        ValueError,
        "holds no batch norm of PyTorch.*`running_mean`",
    ),
    "no mapping": (lambda: split([TWO], "torch"), TypeError, "`tree` is a list: for 'torch' expected.*state_dict"),
    "no pair": (
        lambda: split({}, "haiku"),
        TypeError,
        "`tree` is a dict: for 'haiku' expected the pair \\(params, state\\)",
    ),
    "count": (lambda: jbn.convert.from_torch(GOOD, count=1.5), TypeError, "`count` is 1.5: expected an int"),
    "negative count": (lambda: jbn.convert.from_torch(GOOD, count=-1), ValueError, "`count` is -1"),
    "place taken": (
        lambda: join({"bn": jbn.init(2)}, {"bn.weight": TWO}, "torch"),
        ValueError,
        "`rest` has something at bn.weight already",
    ),
    "place taken above": (
        lambda: join({"bn": jbn.init(2)}, {"params": {"bn": TWO}}, "linen"),
        ValueError,
        "`rest` has something at params/bn/scale already",
    ),
    "count in keras": (lambda: join({}, {}, "keras", with_count=True), ValueError, "`with_count` is for linen and nnx"),
    "no Params": (lambda: jbn.convert.to_torch(GOOD, jbn.init(2)[1]), TypeError, "`params` is a dict"),
    "a layer for its entries": (
        lambda: jbn.convert.from_nnx(nnx.BatchNorm(2, rngs=nnx.Rngs(0))),
        TypeError,
        "`entries` is a BatchNorm: expected a mapping, the arrays of one norm by the names scale, bias",
    ),
    "no Haiku averages": (
        lambda: jbn.convert.from_haiku({"mean_ema": TWO}),
        TypeError,
        "`entries\\['mean_ema'\\]` is a ndarray",
    ),
    "no Haiku entries": (lambda: jbn.convert.from_haiku(None), TypeError, "`entries` is a NoneType"),
    "no Linen variables": (lambda: jbn.convert.from_linen(None), TypeError, "`variables` is a NoneType"),
    "no Linen collection": (
        lambda: jbn.convert.from_linen({"params": 3}),
        TypeError,
        "`variables\\['params'\\]` is a int",
    ),
    "no collection in a tree": (lambda: split({"params": None}, "linen"), TypeError, "`tree` has a NoneType at params"),
    "no norms": (lambda: join([], {}, "torch"), TypeError, "`norms` is a list"),
    "no pair in norms": (lambda: join({"bn": None}, {}, "torch"), TypeError, "`norms` has None at bn"),
    "numbers in norms": (lambda: join({"bn": (1, 2)}, {}, "torch"), TypeError, "`norms` has \\(1, 2\\) at bn"),
    "a number for a path": (lambda: join({0: jbn.init(2)}, {}, "torch"), TypeError, "`norms` has the key 0"),
    "no mappings of Haiku": (lambda: split((None, None), "haiku"), TypeError, "`params` is a NoneType"),
    "no rest": (lambda: join({}, None, "torch"), TypeError, "`rest` is a NoneType"),
    "no Equinox state": (
        lambda: jbn.convert.from_equinox(SimpleNamespace(batch_state_index=0, momentum=0.9, mode="ema"), None),
        TypeError,
        "`state` is a NoneType: expected the equinox.nn.State",
    ),
    "large count": (
        lambda: jbn.convert.from_torch(GOOD, count=2**31),
        ValueError,
        "`count` is 2147483648: expected 0 to",
    ),
    "no Equinox layer": (lambda: jbn.convert.from_equinox({}, {}), TypeError, "`layer` is a dict"),
    "other collections": (
        lambda: jbn.convert.from_linen({"params": {}, "cache": {}}),
        ValueError,
        "`cache` is extra",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_inputs_are_left_as_they_were():
    tree = {
        "params": {"norm": {"scale": TWO}, "dense": {"kernel": TWO}},
        "batch_stats": {"norm": {"mean": TWO, "var": TWO}},
    }
    copy = jax.tree.map(np.copy, tree)
    norms, rest = split(tree, "linen")
    kept = jax.tree.map(np.copy, rest)
    join(norms, rest, "linen")["params"]["dense"]["kernel"] = None
    for given, expected in ((tree, copy), (rest, kept)):
        assert jax.tree.structure(given) == jax.tree.structure(expected)
        jax.tree.map(np.testing.assert_array_equal, given, expected)


def test_a_count_keeps_a_schedule_from_overwriting_what_was_loaded(rng):
    params, state = jbn.convert.from_keras({"moving_mean": TWO * 5, "moving_variance": TWO}, count=99)
    x = images(rng, 16, 2)
    _, new = jbn.batch_norm(params, state, x, True, momentum=jbn.momentum.cumulative())
    np.testing.assert_allclose(new.mean, 0.99 * 5 + 0.01 * x.mean(0), rtol=allowed("float32"))
