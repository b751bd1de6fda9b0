"""A folded layer does the work of layer and norm, for every layout of kernels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from support.tolerances import UNIT, allowed

import jbn

KEY = jax.random.key(0)
LAYERS = {
    "dense": (functools.partial(nn.Dense, 6), (5, 4)),
    "dense over heads": (functools.partial(nn.DenseGeneral, (3, 2)), (5, 4)),
    "conv 1-D": (functools.partial(nn.Conv, 6, (3,)), (2, 9, 4)),
    "conv 2-D": (functools.partial(nn.Conv, 6, (3, 3), strides=2), (2, 9, 8, 4)),
    "grouped conv": (functools.partial(nn.Conv, 6, (3, 3), feature_group_count=2), (2, 9, 8, 4)),
    "depthwise conv": (functools.partial(nn.Conv, 8, (3, 3), feature_group_count=4, padding="CIRCULAR"), (2, 9, 8, 4)),
    "transposed conv": (functools.partial(nn.ConvTranspose, 6, (3, 3), strides=(2, 2)), (2, 5, 4, 4)),
    "conv 3-D": (functools.partial(nn.Conv, 6, (2, 3, 3)), (2, 4, 5, 4, 4)),
}


def drawn(rng, features, scale=True, bias=True):
    """A norm that is far from its start."""
    params, state = jbn.init(features)
    params = jbn.Params(*(rng.normal(size=features).astype(np.float32) if wanted else None for wanted in (scale, bias)))
    var = rng.uniform(0.1, 5, size=features).astype(np.float32)
    return params, state._replace(mean=rng.normal(size=features).astype(np.float32), var=var)


def assert_folded(actual, expected):
    """Within 1e-5 of the largest output."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.max(np.abs(expected)))


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize(("layer", "shape"), LAYERS.values(), ids=LAYERS)
def test_folded_network_agrees(rng, layer, shape, use_bias):
    x = rng.normal(size=shape).astype(np.float32)
    plain, folded = layer(use_bias=use_bias), layer(use_bias=True)
    weights = plain.init(KEY, x)["params"]
    features = weights["bias"].shape if use_bias else folded.init(KEY, x)["params"]["bias"].shape
    axes = tuple(range(-len(features), 0))
    norm = drawn(rng, features)
    if use_bias:
        weights["bias"] = rng.normal(size=features).astype(np.float32)
    kernel, bias = jbn.fold(*norm, weights["kernel"], weights.get("bias"), epsilon=1e-3, output_axis=axes)
    assert kernel.dtype == bias.dtype == jnp.float32

    expected = jbn.normalize(*norm, plain.apply({"params": weights}, x), epsilon=1e-3, feature_axis=axes)
    inference = jax.jit(lambda x: folded.apply({"params": {"kernel": kernel, "bias": bias}}, x))
    assert_folded(inference(x), expected)


@pytest.mark.parametrize(("scale", "bias"), [(False, True), (True, False), (False, False)])
def test_norms_without_scale_or_bias(rng, scale, bias):
    x, kernel = rng.normal(size=(5, 4)).astype(np.float32), rng.normal(size=(4, 3)).astype(np.float32)
    norm = drawn(rng, 3, scale, bias)
    folded, shift = jbn.fold(*norm, kernel)
    assert_folded(x @ folded + shift[None], jbn.normalize(*norm, x @ kernel))


@pytest.mark.parametrize(("layout", "output_axis"), [("OIHW", 0), ("HWIO", -1), ("HWIO", 3), ("IOHW", 1), ("OHWI", -4)])
def test_kernels_of_any_layout(rng, layout, output_axis):
    x = rng.normal(size=(2, 4, 6, 7)).astype(np.float32)
    sizes = {"O": 5, "I": 4, "H": 3, "W": 2}
    kernel = rng.normal(size=[sizes[letter] for letter in layout]).astype(np.float32)
    norm = drawn(rng, 5)

    def convolved(kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NCHW", layout, "NCHW"))

    folded, shift = jbn.fold(*norm, kernel, output_axis=output_axis)
    assert_folded(
        convolved(folded) + shift.reshape(1, -1, 1, 1), jbn.normalize(*norm, convolved(kernel), feature_axis=1)
    )


def keras_layer(name, **options):
    keras = pytest.importorskip("keras", reason="keras is not installed: pip install -e '.[peers]'")
    layer = getattr(keras.layers, name)(**options, kernel_size=3)
    layer.build((2, 5, 5, 6))

    def run(x, kernel, bias):
        layer.set_weights([np.asarray(kernel), np.asarray(bias).reshape(-1)])
        return layer(x)

    return [np.asarray(variable) for variable in layer.variables], run


def torch_layer(**options):
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install -e '.[peers]'")
    layer = torch.nn.ConvTranspose2d(6, 6, 3, **options)

    def run(x, kernel, bias):
        weights = {"weight": torch.tensor(np.asarray(kernel)), "bias": torch.tensor(np.asarray(bias).reshape(-1))}
        layer.load_state_dict(weights)
        return layer(torch.tensor(x.transpose(0, 3, 1, 2))).detach().numpy().transpose(0, 2, 3, 1)

    return [array.detach().numpy() for array in (layer.weight, layer.bias)], run


def haiku_layer():
    hk = pytest.importorskip("haiku", reason="haiku is not installed: pip install -e '.[peers]'")
    model = hk.without_apply_rng(hk.transform(lambda x: hk.Conv2DTranspose(6, 3, name="layer")(x)))
    params = model.init(KEY, np.ones((2, 5, 5, 6), np.float32))["layer"]
    return [params["w"], params["b"]], lambda x, w, b: model.apply({"layer": {"w": w, "b": b}}, x)


def flax_layer():
    layer = nn.ConvTranspose(6, (3, 3), transpose_kernel=True)
    params = layer.init(KEY, np.ones((2, 5, 5, 6), np.float32))["params"]

    def run(x, kernel, bias):
        return layer.apply({"params": {"kernel": kernel, "bias": bias}}, x)

    return [params["kernel"], params["bias"]], run


def equinox_layer():
    eqx = pytest.importorskip("equinox", reason="equinox is not installed: pip install -e '.[peers]'")
    layer = eqx.nn.ConvTranspose2d(6, 6, 3, key=KEY)

    def run(x, kernel, bias):
        loaded = eqx.tree_at(lambda layer: (layer.weight, layer.bias), layer, (kernel, bias[:, None, None]))
        return jax.vmap(loaded)(x.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)

    return [layer.weight, layer.bias[:, 0, 0]], run


OF_OTHER_LIBRARIES = {
    "keras, transposed": (lambda: keras_layer("Conv2DTranspose", filters=6), -2, None),
    "keras, depthwise": (lambda: keras_layer("DepthwiseConv2D", depth_multiplier=2), (-2, -1), (6, 2)),
    "haiku, transposed": (haiku_layer, -2, None),
    "flax, transposed like the gradient": (flax_layer, -2, None),
    "equinox, transposed": (equinox_layer, 0, None),
    "torch, transposed": (torch_layer, 1, None),
}


@pytest.mark.standard_promotion
@pytest.mark.parametrize(("make", "axis", "features"), OF_OTHER_LIBRARIES.values(), ids=OF_OTHER_LIBRARIES)
def test_output_axis_of_other_libraries(rng, make, axis, features):
    """As many inputs as outputs, where a wrong axis would go unseen."""
    x = rng.normal(size=(2, 5, 5, 6)).astype(np.float32)
    (kernel, bias), run = make()
    params, state = drawn(rng, np.size(bias))
    expected = jbn.normalize(params, state, np.asarray(run(x, kernel, bias)))
    if features is not None:
        params, state, bias = jax.tree.map(
            lambda leaf: leaf.reshape(features) if np.ndim(leaf) else leaf, (params, state, bias)
        )
    assert_folded(run(x, *jbn.fold(params, state, kernel, bias, output_axis=axis)), expected)


@pytest.mark.standard_promotion
def test_grouped_and_transposed_kernels_of_torch(rng):
    x = rng.normal(size=(2, 5, 5, 6)).astype(np.float32)
    (kernel, bias), run = torch_layer(groups=2)
    params, state = drawn(rng, 6)
    expected = jbn.normalize(params, state, run(x, kernel, bias))
    vectors = jax.tree.map(lambda leaf: leaf.reshape(2, 3) if np.ndim(leaf) else leaf, (params, state, bias))
    folded, shift = jbn.fold(*vectors[:2], kernel.reshape(2, 3, 3, 3, 3), vectors[2], output_axis=(0, 2))
    assert_folded(run(x, folded.reshape(kernel.shape), shift), expected)


def test_folded_program_has_no_trace_of_the_norm(rng):
    x = rng.normal(size=(2, 9, 8, 4)).astype(np.float32)
    conv = nn.Conv(6, (3, 3))
    weights = conv.init(KEY, x)["params"]
    norm = drawn(rng, 6)
    kernel, bias = jbn.fold(*norm, **weights)

    def operations(weights, norm):
        def inference(weights, norm, x):
            out = conv.apply({"params": weights}, x)
            return out if norm is None else jbn.normalize(*norm, out)

        return jax.jit(inference).lower(weights, norm, x).compile().as_text()

    folded, plain = operations({"kernel": kernel, "bias": bias}, None), operations(weights, None)
    unfolded = operations(weights, norm)
    for name in ("rsqrt", "subtract", "multiply"):
        assert folded.count(f" {name}(") == plain.count(f" {name}(")
    assert "rsqrt(" in unfolded
    assert "rsqrt(" not in folded


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_kernels_are_folded_in_float32(rng, dtype):
    kernel = jnp.asarray(rng.normal(size=(4, 3)), dtype)
    norm = drawn(rng, 3)
    folded, bias = jbn.fold(*norm, kernel)
    exact, exact_bias = jbn.fold(*norm, kernel.astype(jnp.float32))
    assert folded.dtype == bias.dtype == dtype
    for a, e in ((folded, exact), (bias, exact_bias)):
        np.testing.assert_allclose(np.asarray(a, np.float32), e, rtol=UNIT[dtype] + allowed("float32"))


def test_fold_is_differentiable_and_traceable(rng):
    norm = drawn(rng, 3)
    gradient = jax.jit(jax.grad(lambda kernel: jnp.sum(jbn.fold(*norm, kernel)[0])))(jnp.ones((4, 3)))
    slope = norm[0].scale / np.sqrt(norm[1].var + 1e-5)
    np.testing.assert_allclose(gradient, np.broadcast_to(slope, (4, 3)), rtol=allowed("float32"))


def test_unset_statistics_stay_loud():
    params, state = jbn.init(3)
    kernel, bias = jbn.fold(params, jbn.unset(state), jnp.ones((2, 3)))
    assert np.isnan(kernel).all()
    assert np.isnan(bias).all()


KERNEL = np.ones((4, 3), np.float32)
REFUSED = {
    "features": (
        dict(output_axis=0),
        ValueError,
        "`params.scale` has shape \\(3,\\): expected \\(4,\\).*`output_axis`",
    ),
    "axis": (dict(output_axis=2), ValueError, "`output_axis` 2 is out of range"),
    "bias": (dict(bias=np.ones(4, np.float32)), ValueError, "`bias` has shape \\(4,\\): expected \\(3,\\)"),
    "whole kernel": (dict(kernel=np.ones((4, 3), int)), TypeError, "`kernel` is int64: expected a float array"),
    "no kernel": (dict(kernel=None), TypeError, "`kernel` is NoneType"),
    "epsilon": (dict(epsilon=0.0), ValueError, "`epsilon` is 0.0"),
    "state": (dict(state=None), TypeError, "`state` is a NoneType"),
    "half state": (dict(state=jbn.State(*(jnp.ones(3, jnp.bfloat16),) * 2, 0)), TypeError, "state.mean.dtype"),
}


@pytest.mark.parametrize(("given", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals(given, error, message):
    params, state = jbn.init(3)
    with pytest.raises(error, match=message):
        jbn.fold(**{"params": params, "state": state, "kernel": KERNEL, **given})
