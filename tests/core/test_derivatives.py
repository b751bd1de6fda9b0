"""Every derivative, under every transformation, equals plain automatic differentiation of the formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import reference
from support.compilation import compiled

import jbn

OPTIONS = {
    "plain": {},
    "relu, masked": {
        "activation": jax.nn.relu,
        "mask": np.array([True, False, True, True, True, False, True, True]),
    },
    "ghost, tanh, masked": {
        "ghost_batch_size": 4,
        "activation": jnp.tanh,
        "mask": np.array([True, False, True, True, True, True, True, False]),
    },
}


@pytest.fixture
def small(x64, rng):
    params = jbn.Params(scale=jnp.asarray(rng.normal(size=3)), bias=jnp.asarray(rng.normal(size=3)))
    return params, jbn.init(3, jnp.float64)[1], jnp.asarray(rng.normal(size=(8, 3)) * 2 + 1)


def pair(state, options):
    """Ours and the plain formula, as functions of params and x to something curved."""
    plain_options = {key: value for key, value in options.items() if key != "ghost_batch_size"}
    groups = 2 if "ghost_batch_size" in options else 1

    def ours(params, x):
        return jnp.sin(2 * jbn.batch_norm(params, state, x, True, **options)[0])

    def plain(params, x):
        return jnp.sin(2 * reference.plain(params, x, groups=groups, **plain_options))

    return ours, plain


def scalar(function):
    return lambda params, x: jnp.sum(function(params, x) * jnp.cos(jnp.arange(24.0).reshape(8, 3)))


def repeated(function):
    """Three layers, one after the other."""

    def loss(params, x):
        return jnp.sum(jax.lax.scan(lambda h, _: (function(params, h) + h, None), x, length=3)[0] ** 2)

    return loss


FIRST = {
    "value": lambda f: f,
    "grad": lambda f: jax.grad(scalar(f), argnums=(0, 1)),
    "jvp": lambda f: lambda p, x: jax.jvp(f, (p, x), (jax.tree.map(jnp.cos, p), jnp.sin(x))),
    "jvp of params": lambda f: lambda p, x: jax.jvp(lambda p: f(p, x), (p,), (jax.tree.map(jnp.cos, p),)),
    "vmap of grad": lambda f: (
        lambda p, x: jax.vmap(jax.grad(scalar(f), argnums=(0, 1)), in_axes=(None, 0))(p, jnp.stack([x, 2 * x - 1]))
    ),
    "remat": lambda f: jax.grad(jax.checkpoint(scalar(f)), argnums=(0, 1)),
    "scan": lambda f: jax.grad(repeated(f), argnums=(0, 1)),
    "scan of remat": lambda f: jax.grad(repeated(jax.checkpoint(f)), argnums=(0, 1)),
}
SECOND = {
    "hessian": lambda f: jax.hessian(scalar(f), argnums=(0, 1)),
    "jacrev of jacrev": lambda f: jax.jacrev(jax.jacrev(scalar(f), argnums=(0, 1)), argnums=(0, 1)),
    "jvp of grad": lambda f: (
        lambda p, x: jax.jvp(lambda x: jax.grad(scalar(f), argnums=(0, 1))(p, x), (x,), (jnp.sin(x),))
    ),
}


def assert_same_derivatives(modes, functions, *arguments):
    """Ours and the plain function give the same in every mode, all of which are one program."""
    actual, expected = (
        compiled(lambda *arguments, f=f: {name: mode(f)(*arguments) for name, mode in modes.items()})(*arguments)
        for f in functions
    )
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for name in modes:
        for a, e in zip(jax.tree.leaves(actual[name]), jax.tree.leaves(expected[name]), strict=True):
            np.testing.assert_allclose(a, e, rtol=1e-10, atol=1e-10, err_msg=name)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_first_derivatives_under_every_transformation(small, options):
    params, state, x = small
    assert_same_derivatives(FIRST, pair(state, options), params, x)


@pytest.mark.slow
@pytest.mark.parametrize("options", ["plain", "ghost, tanh, masked"])
def test_hessians_and_other_second_derivatives(small, options):
    params, state, x = small
    assert_same_derivatives(SECOND, pair(state, OPTIONS[options]), params, x)


def test_derivatives_of_a_norm_without_scale_or_bias(small):
    params, state, x = small
    ours, plain = pair(state, {})
    for given in (jbn.Params(None, None), params._replace(bias=None), params._replace(scale=None)):
        modes = {"grad": FIRST["grad"], "jvp of grad": SECOND["jvp of grad"]}
        assert_same_derivatives(modes, (ours, plain), given, x)


def test_inference_is_differentiable_in_everything_but_the_count(x64, rng):
    """In the running statistics too, as any other values; PyTorch refuses this."""
    x = rng.normal(size=(6, 3))
    params = jbn.Params(rng.normal(size=3), rng.normal(size=3))
    mean_and_var = (rng.normal(size=3), rng.uniform(0.5, 2, 3))

    def ours(given, x):
        params, (mean, var) = given
        return jbn.normalize(params, jbn.State(mean, var, jnp.int32(0)), x, activation=jnp.tanh)

    def plain(given, x):
        params, (mean, var) = given
        out = (x - mean[None]) / jnp.sqrt(var + 1e-5)[None]
        return jnp.tanh(out * params.scale[None] + params.bias[None])

    def loss(f):
        return lambda given, x: jnp.sum(jnp.sin(f(given, x)))

    modes = {
        "grad": lambda f: jax.grad(loss(f), argnums=(0, 1)),
        "hessian": lambda f: jax.hessian(loss(f), argnums=(0, 1)),
    }
    assert_same_derivatives(modes, (ours, plain), (params, mean_and_var), x)


def test_running_statistics_are_not_differentiated(small):
    params, state, x = small

    def remembered(params, x, mean, var):
        new_state = jbn.batch_norm(params, state._replace(mean=mean, var=var), x, True, momentum=0.5)[1]
        return jnp.sum(new_state.mean) + jnp.sum(new_state.var)

    gradients = compiled(jax.grad(remembered, argnums=(0, 1, 2, 3)))(params, x, state.mean, state.var)
    for gradient in jax.tree.leaves(gradients):
        np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


@pytest.mark.parametrize("mask", [None, np.array([True, True, False, True, False, True])], ids=["whole", "masked"])
def test_moments_are_differentiable(x64, rng, mask):
    x = jnp.asarray(rng.normal(size=(6, 2)) + 3)

    def ours(x):
        batch = jbn.moments(x, mask=mask)
        return jnp.sum(jnp.sin(batch.mean) * jnp.exp(batch.var))

    def plain(x):
        w = jnp.ones((6, 1)) if mask is None else jnp.asarray(mask)[:, None].astype(jnp.float64)
        mean = jnp.sum(w * x, 0, keepdims=True) / jnp.sum(w)
        return jnp.sum(jnp.sin(mean) * jnp.exp(jnp.sum(w * jnp.square(x - mean), 0, keepdims=True) / jnp.sum(w)))

    assert_same_derivatives({"grad": jax.grad, "hessian": jax.hessian}, (ours, plain), x)


def test_arrays_that_an_activation_captures_are_differentiated(small):
    params, state, x = small
    slope = jnp.array([0.1, 0.2, 0.3])

    def through(norm):
        def loss(slope, params, x):
            def prelu(y):
                return jnp.where(y > 0, y, y * jnp.expand_dims(slope, range(y.ndim - 1)))

            return jnp.sum(jnp.sin(norm(params, x, prelu)))

        return loss

    modes = {
        "grad": lambda f: jax.grad(f, argnums=(0, 1, 2)),
        "jacfwd": lambda f: jax.jacfwd(f, argnums=(0, 1, 2)),
        "jvp of grad": lambda f: lambda *args: jax.jvp(jax.grad(f, argnums=(0, 1, 2)), args, args),
        "vmap of grad": lambda f: (
            lambda slope, *args: jax.vmap(jax.grad(f), in_axes=(0, None, None))(jnp.stack([slope, 2 * slope]), *args)
        ),
    }
    ours = through(lambda p, x, act: jbn.batch_norm(p, state, x, True, activation=act)[0])
    plain = through(lambda p, x, act: reference.plain(p, x, activation=act))
    assert_same_derivatives(modes, (ours, plain), slope, params, x)


OUTSIDE = {
    "jit": lambda layer: jax.jit(layer),
    "scan": lambda layer: lambda x, kept: jax.lax.scan(lambda h, k: (layer(h, k), None), x, kept[None])[0],
    "vmap": lambda layer: lambda x, kept: jax.vmap(layer, in_axes=(None, 0))(x, kept[None])[0],
    "cond": lambda layer: lambda x, kept: jax.lax.cond(x[0, 0] < 1e9, layer, lambda x, kept: x, x, kept),
    "jit of remat": lambda layer: jax.jit(jax.checkpoint(layer)),
}


def test_an_activation_may_capture_what_is_not_differentiated(small):
    """Booleans and integers, which are traced by a transformation outside."""
    params, state, x = small
    captured = {"kept": jnp.arange(24).reshape(8, 3) % 3 > 0, "threshold": jnp.int32(0)}

    def through(norm):
        def layer(x, kept):
            def activation(y):
                return jnp.where(kept, y, 0.0) * jnp.cos(jnp.maximum(y, captured["threshold"].astype(y.dtype)))

            return norm(params, x, activation)

        return layer

    ours = through(lambda p, x, act: jbn.batch_norm(p, state, x, True, activation=act)[0])
    plain = through(lambda p, x, act: reference.plain(p, x, activation=act))
    modes = {
        name: lambda f, o=outside: jax.grad(lambda x: jnp.sum(o(f)(x, captured["kept"]) ** 3))
        for name, outside in OUTSIDE.items()
    }
    assert_same_derivatives(modes, (ours, plain), x)


def test_an_activation_may_capture_a_random_key(small):
    params, state, x = small

    def dropout(norm):
        def loss(key, x):
            def activation(y):
                return jnp.where(jax.random.bernoulli(key, 0.5, y.shape), y, 0.0)

            return jnp.sum(norm(params, x, activation) ** 3)

        return loss

    ours = dropout(lambda p, x, act: jbn.batch_norm(p, state, x, True, activation=act)[0])
    plain = dropout(lambda p, x, act: reference.plain(p, x, activation=act))
    assert_same_derivatives({"grad": lambda f: jax.grad(f, argnums=1)}, (ours, plain), jax.random.key(0), x)
