"""A folded layer gives the same result as layer and norm, for kernels of every layout."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from support.compilation import compiled
from support.conversion import assert_same_prediction
from support.folded import far_from_its_start, normal
from support.refusals import Refused, assert_refused, partly
from support.tolerances import UNIT, allowed

import jbn

LAYERS = {
    "dense": (functools.partial(nn.Dense, 6), (5, 4), (4, 6)),
    "dense over heads": (functools.partial(nn.DenseGeneral, (3, 2)), (5, 4), (4, 3, 2)),
    "conv 1-D": (functools.partial(nn.Conv, 6, (3,)), (2, 9, 4), (3, 4, 6)),
    "conv 2-D": (functools.partial(nn.Conv, 6, (3, 3), strides=2), (2, 9, 8, 4), (3, 3, 4, 6)),
    "grouped conv": (functools.partial(nn.Conv, 6, (3, 3), feature_group_count=2), (2, 9, 8, 4), (3, 3, 2, 6)),
    "depthwise conv": (
        functools.partial(nn.Conv, 8, (3, 3), feature_group_count=4, padding="CIRCULAR"),
        (2, 9, 8, 4),
        (3, 3, 1, 8),
    ),
    "transposed conv": (functools.partial(nn.ConvTranspose, 6, (3, 3), strides=(2, 2)), (2, 5, 4, 4), (3, 3, 4, 6)),
    "conv 3-D": (functools.partial(nn.Conv, 6, (2, 3, 3)), (2, 4, 5, 4, 4), (2, 3, 3, 4, 6)),
}


@pytest.mark.standard_promotion
@pytest.mark.parametrize("use_bias", [True, False])
def test_a_folded_layer_predicts_what_layer_and_norm_do(rng, use_bias):
    cases = {}
    for name, (_, shape, kernel_shape) in LAYERS.items():
        features = (3, 2) if name == "dense over heads" else kernel_shape[-1:]
        bias = normal(rng, *features) if use_bias else None
        cases[name] = normal(rng, *shape), normal(rng, *kernel_shape), bias, far_from_its_start(rng, features)

    @compiled
    def both(cases):
        results = {}
        for name, (x, kernel, bias, norm) in cases.items():
            layer = LAYERS[name][0]
            axes = tuple(range(-norm[0].scale.ndim, 0))
            weights = {"kernel": kernel} if bias is None else {"kernel": kernel, "bias": bias}
            plain = layer(use_bias=use_bias).apply({"params": weights}, x)
            folded = jbn.fold(*norm, kernel, bias, epsilon=1e-3, output_axis=axes)
            out = layer(use_bias=True).apply({"params": dict(zip(("kernel", "bias"), folded, strict=True))}, x)
            results[name] = out, jbn.normalize(*norm, plain, epsilon=1e-3, feature_axis=axes)
            assert [leaf.dtype for leaf in folded] == [jnp.float32, jnp.float32]
        return results

    for name, results in both(cases).items():
        assert_same_prediction(*results, name)


def test_norms_without_scale_or_bias_are_folded(rng):
    x, kernel = normal(rng, 5, 4), normal(rng, 4, 3)
    cases = {case: far_from_its_start(rng, (3,), *case) for case in ((False, True), (True, False), (False, False))}

    @compiled
    def both(norms):
        results = []
        for norm in norms:
            folded, shift = jbn.fold(*norm, kernel)
            results.append((x @ folded + shift[None], jbn.normalize(*norm, x @ kernel)))
        return results

    for case, results in zip(cases, both(list(cases.values())), strict=True):
        assert_same_prediction(*results, f"scale, bias: {case}")


def test_the_output_features_may_lie_on_any_axis_of_the_kernel(rng):
    sizes = {"O": 5, "I": 4, "H": 3, "W": 2}
    x, norm = normal(rng, 2, 4, 6, 7), far_from_its_start(rng, (5,))
    axes = {"OIHW": (0,), "HWIO": (-1, 3), "IOHW": (1,), "OHWI": (-4,)}
    kernels = {layout: normal(rng, *(sizes[letter] for letter in layout)) for layout in axes}

    @compiled
    def both(norm, x, kernels):
        def convolved(kernel, layout):
            return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NCHW", layout, "NCHW"))

        results = {}
        for layout, kernel in kernels.items():
            expected = jbn.normalize(*norm, convolved(kernel, layout), feature_axis=1)
            for axis in axes[layout]:
                folded, shift = jbn.fold(*norm, kernel, output_axis=axis)
                results[f"{layout}, {axis}"] = convolved(folded, layout) + shift.reshape(1, -1, 1, 1), expected
        return results

    for case, results in both(norm, x, kernels).items():
        assert_same_prediction(*results, case)


def folded_and_not(layer, norm, x, kernel, bias, *, output_axis):
    """Outputs of a layer with two feature axes: folded, and followed by the norm."""

    @compiled
    def both(norm, x, kernel, bias):
        out = jbn.normalize(*norm, layer(x, kernel) + bias[None], feature_axis=(1, 2))
        folded, shift = jbn.fold(*norm, kernel, bias, output_axis=output_axis)
        return layer(x, folded) + shift[None], out

    return both(norm, x, kernel, bias)


def test_a_depthwise_kernel_has_its_features_on_two_axes(rng):
    """A kernel of Keras, (height, width, channels, multiplier), of size 1 x 1."""

    def layer(x, kernel):
        return jnp.einsum("nc,cm->ncm", x, kernel[0, 0])

    arrays = normal(rng, 7, 6), normal(rng, 1, 1, 6, 2), normal(rng, 6, 2)
    assert_same_prediction(*folded_and_not(layer, far_from_its_start(rng, (6, 2)), *arrays, output_axis=(-2, -1)))


def test_a_grouped_transposed_kernel_has_its_features_on_two_axes(rng):
    """A kernel of PyTorch, (groups, in, out, height, width), of size 1 x 1."""

    def layer(x, kernel):
        return jnp.einsum("ngi,gio->ngo", x, kernel[..., 0, 0])

    arrays = normal(rng, 7, 2, 4), normal(rng, 2, 4, 3, 1, 1), normal(rng, 2, 3)
    assert_same_prediction(*folded_and_not(layer, far_from_its_start(rng, (2, 3)), *arrays, output_axis=(0, 2)))


@pytest.mark.cpu
@pytest.mark.standard_promotion
def test_a_folded_program_has_no_trace_of_the_norm(rng):
    x, norm = normal(rng, 2, 9, 8, 4), far_from_its_start(rng, (6,))
    conv = nn.Conv(6, (3, 3))
    weights = {"kernel": normal(rng, 3, 3, 4, 6), "bias": normal(rng, 6)}
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
    kernel = jnp.asarray(normal(rng, 4, 3), dtype)
    norm = far_from_its_start(rng, (3,))
    folded, bias = jbn.fold(*norm, kernel)
    exact, exact_bias = jbn.fold(*norm, kernel.astype(jnp.float32))
    assert folded.dtype == bias.dtype == dtype
    for a, e in ((folded, exact), (bias, exact_bias)):
        np.testing.assert_allclose(np.asarray(a, np.float32), e, rtol=UNIT[dtype] + allowed("float32"))


def test_half_precision_statistics_are_folded_in_float32(rng):
    params, state = far_from_its_start(rng, (3,))
    half = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), state)
    kernel = normal(rng, 4, 3)
    folded, bias = jbn.fold(params, half, kernel)
    mean, var = (np.asarray(leaf, np.float64) for leaf in half[:2])
    slope = params.scale / np.sqrt(var + 1e-5)
    np.testing.assert_allclose(folded, kernel * slope, rtol=allowed("float32"))
    np.testing.assert_allclose(bias, params.bias - mean * slope, rtol=allowed("float32"), atol=allowed("float32"))


def test_fold_is_differentiable_inside_jit(rng):
    norm = far_from_its_start(rng, (3,))
    gradient = jax.jit(jax.grad(lambda kernel: jnp.sum(jbn.fold(*norm, kernel)[0])))(jnp.ones((4, 3)))
    slope = norm[0].scale / np.sqrt(norm[1].var + 1e-5)
    np.testing.assert_allclose(gradient, np.broadcast_to(slope, (4, 3)), rtol=allowed("float32"))


def test_unset_statistics_fold_to_nan():
    params, state = jbn.init(3)
    kernel, bias = jbn.fold(params, jbn.unset(state), jnp.ones((2, 3)))
    assert np.isnan(kernel).all()
    assert np.isnan(bias).all()


PARAMS, STATE = jbn.init(3)
fold = partly(jbn.fold, params=PARAMS, state=STATE, kernel=np.ones((4, 3), np.float32))
REFUSED = {
    "axis": Refused(fold(output_axis=2), ValueError, "output_axis", "2 is out of range for kernel", "expected -2 to 1"),
    "axis a flag": Refused(fold(output_axis=True), TypeError, "output_axis", "is True", "an int or a sequence of ints"),
    "features": Refused(
        fold(output_axis=0),
        ValueError,
        "params.scale",
        "shape (3,)",
        "expected (4,), the features of kernel of shape (4, 3)",
    ),
    "bias": Refused(fold(bias=np.ones(4, np.float32)), ValueError, "bias", "has shape (4,)", "expected (3,)"),
    "whole kernel": Refused(
        fold(kernel=np.ones((4, 3), np.int32)), TypeError, "kernel", "has dtype int32", "expected a float array"
    ),
    "no kernel": Refused(fold(kernel=None), TypeError, "kernel", "is None", "expected a float array"),
    "bias of objects": Refused(
        fold(bias=np.array([1.0, None, 2.0])),
        TypeError,
        "bias",
        "is a numpy.ndarray of shape (3,)",
        "expected a float array",
    ),
    "epsilon": Refused(fold(epsilon=0), ValueError, "epsilon", "is 0.0", "a positive number"),
    "state": Refused(fold(state=None), TypeError, "state", "is a NoneType", "jbn.State(mean, var, count)"),
}


def test_what_cannot_be_folded_is_refused_traced_or_not():
    assert_refused(REFUSED, also_traced=True)
