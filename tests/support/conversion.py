"""For the tests of conversion: comparisons, and a small network for the weights of other libraries."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import jbn
from support import reference
from support.compilation import compiled
from support.tolerances import assert_close


def drawn(rng, *shape):
    return (rng.normal(size=shape) * 3 + 1).astype(np.float32)


def positive(rng, *shape):
    return rng.uniform(0.5, 2, size=shape).astype(np.float32)


def assert_same_prediction(actual, expected, case=""):
    """Within 1e-5 of the largest output, in float32."""
    expected = np.asarray(expected)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.max(np.abs(expected)), err_msg=case)


def assert_bit_equal(actual, expected):
    """The mappings have the same keys, and their arrays are bit-equal."""
    actual, expected = (dict(tree) for tree in (actual, expected))
    assert sorted(actual) == sorted(expected)
    for name, e in expected.items():
        a, e = np.asarray(actual[name]), np.asarray(e)
        assert a.dtype == e.dtype, name
        np.testing.assert_array_equal(a, e, err_msg=name)


def assert_predicts_and_trains(norm, stored, x, *, rule, **options):
    """A converted norm agrees with the formulas for the stored arrays: scale, bias, mean, var.

    `rule` is the momentum and the running_var for `reference.update`.
    """
    scale, bias, mean, var = stored
    axis, epsilon = options["feature_axis"], options["epsilon"]

    @compiled
    def predict_and_train(norm, x):
        out = jbn.normalize(*norm, x, feature_axis=axis, epsilon=epsilon)
        return out, jbn.batch_norm(*norm, x, True, **options)[1]

    out, state = predict_and_train(norm, x)
    expected = reference.inference(x, mean, var, scale, bias, feature_axis=axis, epsilon=epsilon)
    assert_same_prediction(out, expected)
    batch = reference.batch_norm(x, feature_axis=axis)
    expected_mean, expected_var = reference.update(mean.astype(float), var.astype(float), batch, *rule)
    assert_close(state.mean, expected_mean, condition=10)
    assert_close(state.var, expected_var, condition=10)
    np.testing.assert_array_equal(state.count, norm[1].count + 1)


def network(convolutions, dense, *, layout, **options):
    """Two convolutions, each with norm and relu; the mean over positions; a dense layer.

    A function of norms, images and train, which returns the output and the new states.
    """
    channels = layout[0].index("C")

    @functools.partial(compiled, static_argnums=2)
    def forward(norms, x, train):
        states = []
        for (kernel, bias), (params, state) in zip(convolutions, norms, strict=True):
            x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=(*layout, layout[0]))
            if bias is not None:
                x += jnp.expand_dims(bias, [axis for axis in range(4) if axis != channels])
            x, state = jbn.batch_norm(params, state, x, train, feature_axis=channels, activation=jax.nn.relu, **options)
            states.append(state)
        kernel, bias = dense
        return x.mean([axis for axis in (1, 2, 3) if axis != channels]) @ kernel + bias[None], states

    return lambda norms, x, train: forward(list(norms), x, train)
