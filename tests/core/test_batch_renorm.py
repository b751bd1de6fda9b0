"""Batch renormalization: what it equals, its clipping and derivative, its schedules, and Keras' where that is right."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import reference
from support.inputs import LAYOUTS
from support.tolerances import UNIT, assert_close, assert_rounded
from support.transforms import TRANSFORMS

import jbn

FREE = {"r_max": np.inf, "d_max": np.inf}
BATCH_NORM = {"r_max": 1.0, "d_max": 0.0}
# A running mean between the batch's and that of a common start, as the state of a trained network has.
RUNNING = 0.3


def case(rng, shape, feature_axis, mean=3.0):
    x = (rng.normal(size=shape) * 2 + mean).astype(np.float32)
    features = tuple(shape[axis] for axis in reference.feature_axes(feature_axis, len(shape)))
    params = jbn.Params(*((rng.normal(size=features) + one).astype(np.float32) for one in (1, 0)))
    start = (rng.normal(size=features) * RUNNING + mean).astype(np.float32)
    state = jbn.State(start, rng.uniform(1, 9, features).astype(np.float32), np.int32(7))
    return params, state, x


def corrected(params, state, x, cotangent, r_max, d_max, *, feature_axis=-1, mask=None, epsilon=1e-5):
    """The formula in float64: batch norm with r*scale for scale and d*scale + bias for bias."""
    options = {"feature_axis": feature_axis, "mask": mask, "epsilon": epsilon}
    batch = reference.batch_norm(x, **options)
    mean, var, scale, bias = (np.asarray(a, np.float64) for a in (state.mean, state.var, *params))
    sd = np.sqrt(var + epsilon)
    r = np.clip(np.sqrt(batch.var + epsilon) / sd, 1 / r_max, r_max)
    d = np.clip((batch.mean - mean) / sd, -d_max, d_max)
    found = reference.batch_norm(x, r * scale, d * scale + bias, cotangent, **options)
    return found._replace(dscale=r * found.dscale + d * found.dbias)


@pytest.mark.parametrize(("shape", "feature_axis"), LAYOUTS)
@pytest.mark.parametrize(("bounds", "epsilon"), [((1.5, 0.2), 1e-5), ((3.0, 5.0), 0.5), ((np.inf, np.inf), 1e-5)])
def test_output_and_gradients_are_those_of_the_formula(rng, shape, feature_axis, bounds, epsilon):
    params, state, x = case(rng, shape, feature_axis)
    cotangent = rng.normal(size=shape).astype(np.float32)
    r_max, d_max = bounds

    def call(params, x):
        options = {"feature_axis": feature_axis, "r_max": r_max, "d_max": d_max, "epsilon": epsilon}
        return jbn.batch_renorm(params, state, x, True, **options)

    out, pull, new_state = jax.vjp(call, params, x, has_aux=True)
    (dscale, dbias), dx = pull(jnp.asarray(cotangent))
    expected = corrected(params, state, x, cotangent, *bounds, feature_axis=feature_axis, epsilon=epsilon)
    assert_close(out, expected.out, scale=3)
    assert_close(dx, expected.dx, scale=3)
    assert_close(dscale, expected.dscale, scale=10)
    assert_close(dbias, expected.dbias, scale=10)
    mean, var = reference.update(state.mean, state.var, expected, np.float64(np.float32(0.99)))
    assert_close(new_state.mean, mean)
    assert_close(new_state.var, var)


@pytest.mark.parametrize(("shape", "feature_axis"), LAYOUTS)
@pytest.mark.parametrize("mean", [3.0, 1e4])
def test_unclipped_is_inference_with_the_state_before(rng, shape, feature_axis, mean):
    params, state, x = case(rng, shape, feature_axis, mean)
    out, _ = jbn.batch_renorm(params, state, x, True, feature_axis=feature_axis, **FREE)
    assert_close(out, jbn.normalize(params, state, x, feature_axis=feature_axis), scale=4)


MASK = np.array([True, False, True, True, False, True, True, True])
BITWISE = {
    "plain": {},
    "masked": {"mask": MASK},
    "ghost": {"ghost_batch_size": 4},
    "relu": {"activation": jax.nn.relu},
    "total": {"running_var": "total"},
    "bfloat16": {"dtype": jnp.bfloat16},
}


@pytest.mark.parametrize("options", BITWISE.values(), ids=BITWISE)
@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("way", ["closed", "closed by schedule", "unset"])
def test_without_correction_it_is_batch_norm(rng, options, jitted, way):
    params, state, x = case(rng, (8, 3), -1, 1e4)
    start = jbn.unset(state) if way == "unset" else state
    bounds = {"closed": BATCH_NORM, "closed by schedule": {}, "unset": FREE}[way]

    def gradients_of(function, **bounds):
        def loss(params, x):
            out, new_state = function(params, start, x, True, **options, **bounds)
            return jnp.sum(jnp.sin(out.astype(jnp.float32))), (out, new_state)

        call = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        return (jax.jit(call) if jitted else call)(params, x)

    renormed, plain = gradients_of(jbn.batch_renorm, **bounds), gradients_of(jbn.batch_norm)
    if way == "closed":
        jax.tree.map(np.testing.assert_array_equal, renormed, plain)
    else:
        # The compiler may join the r = 1 and d = 0 that it does not know with what follows, and round once more.
        dtype = "bfloat16" if "dtype" in options else "float32"
        jax.tree.map(lambda a, b: assert_close(a, b, dtype, scale=3), renormed, plain)


def test_masked_values_do_nothing(rng):
    params, state, x = case(rng, (8, 3), -1)
    hostile = np.where(MASK[:, None], x, np.nan)

    def call(params, x, mask=None):
        return jbn.batch_renorm(params, state, x, True, mask=mask, **FREE)

    out, pull, new_state = jax.vjp(lambda p, x: call(p, x, MASK), params, hostile, has_aux=True)
    short, short_pull, short_state = jax.vjp(call, params, x[MASK], has_aux=True)
    cotangent = rng.normal(size=x.shape).astype(np.float32)
    (grads, dx), (short_grads, short_dx) = pull(jnp.asarray(cotangent)), short_pull(jnp.asarray(cotangent[MASK]))
    np.testing.assert_array_equal(out[~MASK], np.zeros((2, 3)))
    np.testing.assert_array_equal(dx[~MASK], np.zeros((2, 3)))
    for actual, expected in ((out[MASK], short), (dx[MASK], short_dx), (grads, short_grads), (new_state, short_state)):
        jax.tree.map(lambda a, b: assert_close(a, b, scale=4), actual, expected)


@pytest.mark.parametrize("x", [np.zeros((0, 3), np.float32), np.full((4, 3), np.nan, np.float32)])
def test_nothing_valid(x):
    params, state = jbn.init(3)
    mask = np.zeros(len(x), bool)
    out, new_state = jbn.batch_renorm(params, state, x, True, mask=mask, **FREE)
    np.testing.assert_array_equal(out, np.zeros(x.shape))
    jax.tree.map(np.testing.assert_array_equal, new_state, state)


def test_partly_unset(debug_nans, rng):
    params, state, x = case(rng, (8, 3), -1)
    partly = jbn.State(state.mean * [1, 0, 1], np.where([True, False, True], state.var, -np.inf), state.count)
    out, _ = jax.jit(lambda s: jbn.batch_renorm(params, s, x, True, **FREE))(jax.tree.map(jnp.float32, partly))
    assert_close(out[:, 1], jbn.batch_norm(params, state, x, True)[0][:, 1])
    assert_close(out[:, 0], jbn.normalize(params, state, x)[:, 0], scale=4)


def test_the_state_is_not_differentiated(rng):
    params, state, x = case(rng, (8, 3), -1)

    def loss(mean, var, r_max):
        out, _ = jbn.batch_renorm(params, jbn.State(mean, var, state.count), x, True, r_max=r_max, d_max=2.0)
        return jnp.sum(jnp.sin(out))

    for gradient in jax.grad(loss, argnums=(0, 1, 2))(state.mean, state.var, 2.0):
        np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


@pytest.mark.parametrize("derivative", ["jvp", "hessian", "vmap", "remat"])
def test_every_derivative(rng, derivative):
    """Against plain automatic differentiation of the formula with r and d stopped."""
    params, state, x = case(rng, (6, 2), -1)

    def plain(x):
        mean, var = x.mean(0, keepdims=True), x.var(0, keepdims=True)
        sd = jnp.sqrt(state.var + 1e-5)[None]
        r, d = jax.lax.stop_gradient((jnp.sqrt(var + 1e-5) / sd, (mean - state.mean[None]) / sd))
        xhat = (x - mean) * jax.lax.rsqrt(var + 1e-5)
        return jnp.sum(jnp.sin((xhat * r + d) * params.scale[None] + params.bias[None]))

    def ours(x):
        return jnp.sum(jnp.sin(jbn.batch_renorm(params, state, x, True, **FREE)[0]))

    direction = rng.normal(size=x.shape).astype(np.float32)
    take = {
        "jvp": lambda f: jax.jvp(f, (x,), (direction,))[1],
        "hessian": lambda f: jax.hessian(f)(x),
        "vmap": lambda f: jax.vmap(jax.grad(f))(jnp.stack([x, x + direction])),
        "remat": lambda f: jax.grad(jax.checkpoint(f))(x),
    }[derivative]
    assert_close(take(ours), take(plain), condition=4, scale=1)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_shared_over_places_is_one_batch(rng, transform):
    params, state, x = case(rng, (16, 3), -1)
    cotangent = rng.normal(size=x.shape).astype(np.float32)
    mask = np.arange(16) % 8 != 3
    found = transform({"d": 8}, norm=jbn.batch_renorm, r_max=1.2, d_max=0.1)(params, state, x, mask, cotangent)
    expected = corrected(params, state, x, cotangent, 1.2, 0.1, mask=mask)
    assert_close(found.out, expected.out, scale=3)
    assert_close(found.dx, expected.dx, scale=3)
    assert_close(found.gradients.scale, expected.dscale, scale=10)
    assert_close(found.gradients.bias, expected.dbias, scale=10)
    mean, var = reference.update(state.mean, state.var, expected, 0.5)
    for place in range(found.new_state.mean.shape[0]):
        assert_close(found.new_state.mean[place], mean)
        assert_close(found.new_state.var[place], var)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_input(rng, dtype):
    params, state, x = case(rng, (32, 3), -1)
    low = jnp.asarray(x).astype(dtype)
    out, new_state = jbn.batch_renorm(params, state, low, True, r_max=1.5, d_max=0.2)
    assert out.dtype == low.dtype
    expected = corrected(params, state, np.asarray(low, np.float64), None, 1.5, 0.2)
    assert_rounded(out, expected.out, dtype)
    assert new_state.mean.dtype == jnp.float32


def test_published_bounds():
    """1 and 0 for 5,000 updates, 3 at 40,000 and 5 at 25,000 (Ioffe 2017, section 4.2), as optax has them."""
    r_max, d_max = jbn.renorm.r_max(), jbn.renorm.d_max()
    expected_r = optax.linear_schedule(1.0, 3.0, 35_000, 5_000)
    expected_d = optax.linear_schedule(0.0, 5.0, 20_000, 5_000)
    with jax.numpy_dtype_promotion("standard"):
        for count in (0, 4_999, 5_000, 5_001, 17_000, 25_000, 39_999, 40_000, 2**31 - 1):
            assert_close(r_max(jnp.int32(count)), expected_r(count))
            assert_close(d_max(jnp.int32(count)), expected_d(count), scale=5)
    defaults = inspect.signature(jbn.batch_renorm).parameters
    assert float(defaults["r_max"].default(22_500)) == 2
    assert float(defaults["d_max"].default(15_000)) == 2.5


def test_bounds_follow_the_count(rng):
    params, state, x = case(rng, (8, 3), -1)
    bounds = {"r_max": jbn.renorm.r_max(2.0, begin=10, end=20), "d_max": jbn.renorm.d_max(1.0, begin=10, end=20)}
    step = jax.jit(lambda s: jbn.batch_renorm(params, s, x, True, **bounds)[0])
    for count, r_max, d_max in ((10, 1, 0), (12, 1.2, 0.2), (999, 2, 1)):
        expected = corrected(params, state, x, None, r_max, d_max)
        assert_close(step(state._replace(count=jnp.int32(count))), expected.out, scale=3)


@pytest.mark.parametrize("traced", [0.5, -3.0])
def test_scheduled_and_traced_bounds_are_clipped(rng, traced):
    params, state, x = case(rng, (8, 3), -1)
    expected, _ = jbn.batch_renorm(params, state, x, True, **BATCH_NORM)
    clipped = min(traced, 0.0)
    out, _ = jax.jit(lambda r, d: jbn.batch_renorm(params, state, x, True, r_max=r, d_max=d))(traced, clipped)
    assert_close(out, expected)


REFUSED = {
    "r_max below one": ({"r_max": 0.5}, ValueError, "`r_max` is 0.5: expected a number of at least 1"),
    "d_max negative": ({"d_max": -1}, ValueError, "`d_max` is -1.0: expected a number of at least 0"),
    "r_max nan": ({"r_max": np.nan}, ValueError, "`r_max` is nan"),
    "d_max text": ({"d_max": "5"}, TypeError, "`d_max` is '5': expected a number"),
    "r_max None": ({"r_max": None}, TypeError, "jbn.renorm.r_max()"),
    "uncalled": ({"r_max": jbn.renorm.r_max}, TypeError, "`r_max` is jbn.renorm.r_max itself: call it"),
    "vector": ({"d_max": lambda count: jnp.ones(3)}, TypeError, "`d_max` gives"),
    "train": ({"train": 1}, TypeError, "`train` is 1"),
    "momentum": ({"momentum": 2.0}, ValueError, "`momentum` is 2.0"),
}


@pytest.mark.parametrize(("options", "kind", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals(options, kind, message):
    params, state = jbn.init(3)
    with pytest.raises(kind) as error:
        jbn.batch_renorm(params, state, jnp.ones((4, 3)), **{"train": True, **options})
    assert message in str(error.value)
    if "uncalled" not in message and "itself" not in message and "gives" not in message and "train" not in options:
        with pytest.raises(kind):
            jbn.batch_renorm(params, state, jnp.ones((4, 3)), **{"train": False, **options})


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: jbn.renorm.r_max(0.5), ValueError, "`limit` is 0.5: expected a number of at least 1"),
        (lambda: jbn.renorm.r_max(np.inf), ValueError, "For no bound give r_max=inf"),
        (lambda: jbn.renorm.d_max(-1.0), ValueError, "`limit` is -1.0"),
        (lambda: jbn.renorm.d_max(begin=5, end=5), ValueError, "expected 0 <= begin < end"),
        (lambda: jbn.renorm.d_max(begin=0.5), TypeError, "expected counts of updates, ints"),
    ],
)
def test_schedules_refuse(make, kind, message):
    with pytest.raises(kind, match=message):
        make()


@pytest.mark.standard_promotion
@pytest.mark.parametrize("bounds", [(1.5, 0.2), (3.0, 5.0)])
@pytest.mark.parametrize("masked", [False, True])
def test_keras(rng, bounds, masked):
    """One step from a common state. Keras then averages standard deviations, where jbn averages variances."""
    keras = pytest.importorskip("keras", reason="keras is not installed: pip install -e '.[peers]'")
    if masked:
        pytest.importorskip("keras")
    params, state, x = case(rng, (8, 5, 3), -1)
    mask = rng.random((8, 5)) < 0.7 if masked else None
    r_max, d_max = bounds
    clipping = {"rmax": r_max, "rmin": 1 / r_max, "dmax": d_max}
    layer = keras.layers.BatchNormalization(epsilon=1e-5, renorm=True, renorm_clipping=clipping, renorm_momentum=0.9)
    layer.build(x.shape)
    values = {"gamma": params.scale, "beta": params.bias, "renorm_mean": state.mean}
    values["renorm_stddev"] = np.sqrt(state.var + 1e-5)
    start = [values.get(v.name, v.value) for v in layer.trainable_variables]
    fixed = [values.get(v.name, v.value) for v in layer.non_trainable_variables]

    def keras_loss(trainable, x):
        out, moved = layer.stateless_call(list(trainable), fixed, x, training=True, mask=mask)
        valid = jnp.ones(x.shape) if mask is None else jnp.broadcast_to(mask[..., None], x.shape)
        return jnp.sum(jnp.sin(out) * valid), (out, moved)

    def jbn_loss(params, x):
        out, new_state = jbn.batch_renorm(params, state, x, True, r_max=r_max, d_max=d_max, momentum=0.9, mask=mask)
        return jnp.sum(jnp.sin(out)), (out, new_state)

    (_, (theirs, moved)), (their_params, their_dx) = jax.value_and_grad(keras_loss, (0, 1), has_aux=True)(start, x)
    (_, (ours, new_state)), (our_params, our_dx) = jax.value_and_grad(jbn_loss, (0, 1), has_aux=True)(params, x)
    valid = np.ones((8, 5), bool) if mask is None else mask
    # Keras adds 1e-7 to the count of valid values.
    condition = 1 if mask is None else 1e-7 / UNIT["float32"]
    assert_close(ours[valid], np.asarray(theirs)[valid], condition=4 * condition, scale=3)
    assert_close(our_dx[valid], np.asarray(their_dx)[valid], condition=4 * condition, scale=3)
    for mine, theirs in zip(our_params, their_params, strict=True):
        assert_close(mine, theirs, condition=4 * condition, scale=10)
    names = [v.name for v in layer.non_trainable_variables]
    assert_close(new_state.mean, moved[names.index("renorm_mean")], condition=condition)
