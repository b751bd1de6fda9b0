"""The values of `output_axis` in the docstring of `jbn.fold` are right for kernels of other libraries."""

import jax
import numpy as np
import pytest
from flax import linen
from support.compilation import compiled
from support.conversion import assert_same_prediction
from support.folded import far_from_its_start, normal

import jbn

pytestmark = pytest.mark.standard_promotion
KEY = jax.random.key(0)


def keras_layer(name, **options):
    import keras

    layer = getattr(keras.layers, name)(**options, kernel_size=3)
    layer.build((2, 5, 5, 6))

    def run(x, kernel, bias):
        layer.set_weights([np.asarray(kernel), np.asarray(bias).reshape(-1)])
        return layer(x)

    return [variable.shape for variable in layer.variables], run


def torch_layer(**options):
    import torch

    layer = torch.nn.ConvTranspose2d(6, 6, 3, **options)

    def run(x, kernel, bias):
        weights = {"weight": torch.tensor(np.asarray(kernel)), "bias": torch.tensor(np.asarray(bias).reshape(-1))}
        layer.load_state_dict(weights)
        return layer(torch.tensor(x.transpose(0, 3, 1, 2))).detach().numpy().transpose(0, 2, 3, 1)

    return [tuple(layer.weight.shape), (6,)], run


def haiku_layer():
    import haiku as hk

    model = hk.without_apply_rng(hk.transform(lambda x: hk.Conv2DTranspose(6, 3, name="layer")(x)))
    params = jax.eval_shape(model.init, KEY, np.ones((2, 5, 5, 6), np.float32))["layer"]
    run = compiled(lambda x, w, b: model.apply({"layer": {"w": w, "b": b}}, x))
    return [params["w"].shape, params["b"].shape], run


def flax_layer():
    layer = linen.ConvTranspose(6, (3, 3), transpose_kernel=True)
    params = jax.eval_shape(layer.init, KEY, np.ones((2, 5, 5, 6), np.float32))["params"]
    run = compiled(lambda x, kernel, bias: layer.apply({"params": {"kernel": kernel, "bias": bias}}, x))
    return [params["kernel"].shape, params["bias"].shape], run


def equinox_layer():
    import equinox as eqx

    layer = eqx.nn.ConvTranspose2d(6, 6, 3, key=KEY)

    @compiled
    def run(x, kernel, bias):
        loaded = eqx.tree_at(lambda layer: (layer.weight, layer.bias), layer, (kernel, bias[:, None, None]))
        return jax.vmap(loaded)(x.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)

    return [layer.weight.shape, (6,)], run


LAYERS = {
    "keras, transposed": (lambda: keras_layer("Conv2DTranspose", filters=6), -2, None),
    "keras, depthwise": (lambda: keras_layer("DepthwiseConv2D", depth_multiplier=2), (-2, -1), (6, 2)),
    "haiku, transposed": (haiku_layer, -2, None),
    "flax, transposed like the gradient": (flax_layer, -2, None),
    "equinox, transposed": (equinox_layer, 0, None),
    "torch, transposed": (torch_layer, 1, None),
}


def reshaped(vectors, shape):
    return jax.tree.map(lambda leaf: leaf.reshape(shape) if np.ndim(leaf) else leaf, vectors)


def needed(name):
    library = name.partition(",")[0]
    return pytest.param(name, marks=() if library == "flax" else pytest.mark.needs(library))


@pytest.mark.parametrize("name", [needed(name) for name in LAYERS])
def test_a_folded_layer_predicts_what_layer_and_norm_do(rng, name):
    """Layers have as many inputs as outputs, so that a wrong axis would raise no error."""
    make, axis, features = LAYERS[name]
    shapes, run = make()
    x = normal(rng, 2, 5, 5, 6)
    kernel, bias = (normal(rng, *shape) for shape in shapes)
    norm = far_from_its_start(rng, bias.size)
    expected = jbn.normalize(*norm, np.asarray(run(x, kernel, bias)))
    vectors = (*norm, bias) if features is None else reshaped((*norm, bias), features)
    folded = jbn.fold(*vectors[:2], kernel, vectors[2], output_axis=axis)
    assert_same_prediction(run(x, *folded), expected)


@pytest.mark.needs("torch")
def test_a_folded_grouped_and_transposed_layer_of_torch_predicts_what_layer_and_norm_do(rng):
    shapes, run = torch_layer(groups=2)
    x = normal(rng, 2, 5, 5, 6)
    kernel, bias = (normal(rng, *shape) for shape in shapes)
    norm = far_from_its_start(rng, 6)
    expected = jbn.normalize(*norm, run(x, kernel, bias))
    params, state, split_bias = reshaped((*norm, bias), (2, 3))
    folded, shift = jbn.fold(params, state, kernel.reshape(2, 3, 3, 3, 3), split_bias, output_axis=(0, 2))
    assert_same_prediction(run(x, folded.reshape(kernel.shape), shift), expected)
