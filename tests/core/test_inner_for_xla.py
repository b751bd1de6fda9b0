"""jbn._core.for_xla: the forms of each platform and the plain forms agree with the formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import reference
from support.compilation import compiled
from support.tolerances import assert_close, assert_rounded

import jbn
from jbn._core import for_xla


def sigmoid(y):
    return 1 / (1 + np.exp(-y))


ACTIVATIONS = {
    # The activation in JAX, in NumPy, and its slope in NumPy.
    "none": (None, lambda y: y, np.ones_like),
    "relu": (jax.nn.relu, lambda y: np.maximum(y, 0), lambda y: y > 0),
    "silu": (jax.nn.silu, lambda y: y * sigmoid(y), lambda y: sigmoid(y) * (1 + y * (1 - sigmoid(y)))),
}
CASES = [(name, joined) for name in ACTIVATIONS for joined in (False, True)]


def everything(params, state, x, shortcut, cotangent, mask):
    """Output, new state, and gradients in params, x and the shortcut, per case; cases without a shortcut are masked."""

    def of_case(name, joined):
        def norm(params, x, shortcut):
            options = {"mask": None if joined else mask, "shortcut": shortcut if joined else None}
            options["activation"] = ACTIVATIONS[name][0]
            return jbn.batch_norm(params, state, x, True, momentum=0.0, **options)

        out, backward, new_state = jax.vjp(norm, params, x, shortcut, has_aux=True)
        return out, new_state, backward(cotangent)

    return {case: of_case(*case) for case in CASES}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("platform", ["plain", "cuda", "tpu"])
def test_every_form_gives_what_the_formula_gives(rng, platform, dtype):
    arrays = [jnp.asarray(rng.normal(size=(16, 4, 3)) + mean, dtype) for mean in (3, 0, 0)]
    params, mask = jbn.Params(*rng.normal(size=(2, 3)).astype(np.float32)), rng.random((16, 4)) < 0.7
    given = params, jbn.init(3)[1], *arrays, mask
    with for_xla.forms(platform):
        program = compiled(everything).lower(*given)
    assert ("optimization_barrier" in program.as_text()) == (platform != "plain")
    found = program.compile()(*given)
    x, shortcut, cotangent = (np.asarray(array.astype(jnp.float32), np.float64) for array in arrays)

    def close(actual, expected):
        assert actual.dtype == dtype
        if dtype == "float32":
            assert_close(actual, expected, scale=5)
        else:
            assert_rounded(actual, expected, dtype)

    for (name, joined), (out, new_state, ((dscale, dbias), dx, dshortcut)) in found.items():
        _, activation, slope = ACTIVATIONS[name]
        valid = np.ones_like(mask) if joined else mask
        before = reference.batch_norm(x, *params, mask=valid).out + shortcut * joined
        passed = cotangent * slope(before) * valid[..., None]
        expected = reference.batch_norm(x, *params, passed, mask=valid)
        close(out, activation(before) * valid[..., None])
        close(dx, expected.dx)
        close(dshortcut, passed * joined)
        for gradient, value in ((dscale, expected.dscale), (dbias, expected.dbias)):
            assert_close(gradient, value, scale=np.abs(cotangent).sum())
        assert_close(new_state.mean, expected.mean)
        assert_close(new_state.var, expected.var)
