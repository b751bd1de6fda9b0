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
    """jbn and the plain formula, as functions of params and x with nonzero second derivatives."""
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
    "grad of vmap of grad": lambda f: (
        lambda p, x: jax.grad(lambda x: jnp.sum(jnp.sin(FIRST["vmap of grad"](f)(p, x)[1])))(x)
    ),
    "jvp of grad": lambda f: (
        lambda p, x: jax.jvp(lambda x: jax.grad(scalar(f), argnums=(0, 1))(p, x), (x,), (jnp.sin(x),))
    ),
}


def assert_same_derivatives(modes, functions, *arguments):
    """jbn and the plain formula agree in every mode; all modes are compiled as one program."""
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


def of_both_signs(y):
    """A custom activation, which JAX differentiates."""
    return y * jnp.exp(-jnp.square(y)) + 0.1 * y


MASK = np.array([[True, True], [False, True], [True, True], [True, False]])
JOINS = {
    "none": {},
    "relu, masked": {"activation": jax.nn.relu, "mask": MASK},
    "silu, masked": {"activation": jax.nn.silu, "mask": MASK},
    "tanh, ghost": {"activation": jnp.tanh, "ghost_batch_size": 2},
    "a user's own": {"activation": of_both_signs},
}
"""Options of calls with a shortcut; the masks differ between features."""
SLOW = ("tanh, ghost", "a user's own")


@pytest.mark.parametrize(
    "options",
    [pytest.param(options, id=name, marks=pytest.mark.slow if name in SLOW else ()) for name, options in JOINS.items()],
)
def test_derivatives_in_x_and_in_the_shortcut(small, options):
    """First and second derivatives with a shortcut, in forward and reverse mode."""
    params, state, x = small
    arrays = jax.tree.map(lambda vector: vector[:2], params), x[:4, :2], jnp.cos(x[4:, :2])
    groups = 2 if "ghost_batch_size" in options else 1
    plain_options = {key: value for key, value in options.items() if key != "ghost_batch_size"}
    state = jbn.init(2, jnp.float64)[1]

    def ours(params, x, shortcut):
        return jnp.sin(2 * jbn.batch_norm(params, state, x, True, shortcut=shortcut, **options)[0])

    def plain(params, x, shortcut):
        return jnp.sin(2 * reference.plain(params, x, shortcut=shortcut, groups=groups, **plain_options))

    everything = (0, 1, 2)
    modes = {
        "value": lambda f: f,
        "grad": lambda f: jax.grad(weighed(f), everything),
        "remat": lambda f: jax.grad(jax.checkpoint(weighed(f)), everything),
        "jvp": lambda f: lambda *args: jax.jvp(f, args, jax.tree.map(jnp.cos, args)),
        "jvp of the shortcut": lambda f: lambda p, x, s: jax.jvp(lambda s: f(p, x, s), (s,), (jnp.sin(s),)),
        "vmap of grad": lambda f: (
            lambda p, x, s: jax.vmap(jax.grad(weighed(f), everything), (None, 0, None))(p, jnp.stack([x, 2 * x]), s)
        ),
        "hessian": lambda f: jax.hessian(weighed(f), everything),
    }
    assert_same_derivatives(modes, (ours, plain), *arrays)


def weighed(function):
    return lambda params, x, shortcut: jnp.sum(function(params, x, shortcut) * jnp.arange(1.0, 9).reshape(4, 2))


def test_inference_is_differentiable_in_everything_but_the_count(x64, rng):
    """Including the running statistics, in which PyTorch refuses to differentiate."""
    x, shortcut = rng.normal(size=(2, 6, 3))
    params = jbn.Params(rng.normal(size=3), rng.normal(size=3))
    mean_and_var = (rng.normal(size=3), rng.uniform(0.5, 2, 3))

    def ours(given, x):
        params, (mean, var), shortcut = given
        return jbn.normalize(params, jbn.State(mean, var, None), x, activation=jnp.tanh, shortcut=shortcut)

    def plain(given, x):
        params, (mean, var), shortcut = given
        out = (x - mean[None]) / jnp.sqrt(var + 1e-5)[None]
        return jnp.tanh(out * params.scale[None] + params.bias[None] + shortcut)

    def loss(f):
        return lambda given, x: jnp.sum(jnp.sin(f(given, x)))

    modes = {
        "grad": lambda f: jax.grad(loss(f), argnums=(0, 1)),
        "hessian": lambda f: jax.hessian(loss(f), argnums=(0, 1)),
    }
    assert_same_derivatives(modes, (ours, plain), (params, mean_and_var, shortcut), x)


def test_running_statistics_are_not_differentiated(small):
    params, state, x = small

    def remembered(params, x, mean, var):
        new_state = jbn.batch_norm(params, state._replace(mean=mean, var=var), x, True, momentum=0.5)[1]
        return jnp.sum(new_state.mean) + jnp.sum(new_state.var)

    gradients = compiled(jax.grad(remembered, argnums=(0, 1, 2, 3)))(params, x, state.mean, state.var)
    for gradient in jax.tree.leaves(gradients):
        np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_moments_are_differentiable(x64, rng, masked):
    x = jnp.asarray(rng.normal(size=(6, 3)) + 3)
    mask = np.array([[1, 1, 0], [1, 0, 1], [0, 0, 0], [1, 1, 0], [0, 1, 0], [1, 1, 0]], bool) if masked else None

    def ours(x):
        batch = jbn.moments(x, mask=mask)
        return jnp.sum(jnp.sin(batch.mean) * jnp.exp(batch.var))

    def plain(x):
        w = jnp.ones((6, 3)) if mask is None else jnp.asarray(mask, jnp.float64)
        mean = jnp.sum(w * x, 0) / jnp.sum(w, 0)
        return jnp.sum(jnp.sin(mean) * jnp.exp(jnp.sum(w * jnp.square(x - mean[None]), 0) / jnp.sum(w, 0)))

    lanes = {"grad of vmap": lambda f: jax.grad(lambda x: jnp.sum(jax.vmap(f)(jnp.stack([x, 2 * x]))))}
    # Where a feature is constant, its variance is 0, the smallest one, and rounding must not decide on the derivative.
    for given in (x, x.at[:, 0].set(3.0)):
        assert_same_derivatives({"grad": jax.grad, "hessian": jax.hessian, **lanes}, (ours, plain), given)


def test_the_merge_of_constant_features_is_differentiable(x64):
    left, right = (jbn.Moments(jnp.full(2, 3.0), jnp.array([0.0, 1.0]), jnp.full(2, count)) for count in (3.0, 1.0))
    slopes = compiled(jax.grad(lambda var: jnp.sum(jbn.merge(left._replace(var=var), right).var)))(left.var)
    np.testing.assert_allclose(slopes, [0.75, 0.75], rtol=1e-12)
