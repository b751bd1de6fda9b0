"""The public call: inference, masks, ghost batches, guarded and unset statistics, and what it compiles to."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from support import reference
from support.inputs import LAYOUTS, ill_conditioned
from support.tolerances import assert_close

import jbn

POISONS = [np.nan, np.inf, -np.inf, 1e30]


@functools.partial(jax.jit, static_argnames=("train", "activation", "ghost_batch_size", "running_var", "momentum"))
def batch_norm(params, state, x, train, **options):
    return jbn.batch_norm(params, state, x, train, **options)


def assert_identical(actual, expected):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == e.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(e))


def some_params(rng, features):
    return jbn.Params(*(rng.normal(size=features).astype(np.float32) for _ in range(2)))


@pytest.mark.parametrize(("shape", "feature_axis"), LAYOUTS)
def test_inference_of_every_layout(rng, shape, feature_axis):
    x = rng.normal(size=shape).astype(np.float32) * 2 + 1
    features = tuple(shape[axis] for axis in reference.feature_axes(feature_axis, x.ndim))
    params = some_params(rng, features)
    state = jbn.State(rng.normal(size=features).astype(np.float32), rng.uniform(0.5, 2, features).astype(np.float32), 3)
    expected = reference.inference(x, state.mean, state.var, *params, feature_axis=feature_axis)
    out, same = jbn.batch_norm(params, state, x, False, feature_axis=feature_axis)
    assert_close(out, expected)
    assert same is state
    np.testing.assert_array_equal(jbn.normalize(params, state, x, feature_axis=feature_axis), out)


def test_inference_gradients(x64, rng):
    x = rng.normal(size=(6, 3))
    params = jbn.Params(rng.normal(size=3), rng.normal(size=3))
    state = jbn.State(rng.normal(size=3), rng.uniform(0.5, 2, 3), jnp.int32(0))

    def ours(params, x):
        return jnp.sum(jnp.sin(jbn.normalize(params, state, x, activation=jnp.tanh)))

    def plain(params, x):
        rows = (1, 3)
        out = (x - state.mean.reshape(rows)) / jnp.sqrt(state.var + 1e-5).reshape(rows)
        return jnp.sum(jnp.sin(jnp.tanh(out * params.scale.reshape(rows) + params.bias.reshape(rows))))

    for derivative in (jax.grad, jax.hessian):
        actual, expected = (derivative(f, argnums=(0, 1))(params, x) for f in (ours, plain))
        for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, e, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("running_var", ["biased", "unbiased", "total"])
@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_running_statistics_over_steps(rng, running_var, momentum):
    params, state = jbn.init(3)
    mean, var = np.zeros(3), np.ones(3)
    for size in (2, 7, 64):
        x = (rng.normal(size=(size, 3)) * 3 + 10).astype(np.float32)
        _, state = batch_norm(params, state, x, True, momentum=momentum, running_var=running_var)
        mean, var = reference.update(mean, var, reference.batch_norm(x), momentum, running_var)
        assert_close(state.mean, mean, scale=20)
        assert_close(state.var, var, scale=100)
    assert int(state.count) == 3


def test_training_output_does_not_depend_on_the_state(rng):
    x = rng.normal(size=(32, 3)).astype(np.float32)
    params, state = jbn.init(3)
    other = jbn.State(state.mean + 7, state.var * 5, state.count + 9)
    for options in ({}, {"activation": jax.nn.relu}, {"ghost_batch_size": 8}):
        out, _ = batch_norm(params, state, x, True, **options)
        for momentum in (0.999, jbn.momentum.warmup(0.9)):
            assert_identical(batch_norm(params, other, x, True, momentum=momentum, **options)[0], out)


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("options", [{}, {"activation": jnp.exp}, {"ghost_batch_size": 4}])
def test_masked_values_reach_nothing(debug_nans, rng, poison, options):
    params = some_params(rng, 3)
    _, state = jbn.init(3)
    mask = np.array([True, False, True, True, False, True, True, True])
    clean = rng.normal(size=(8, 5, 3)).astype(np.float32) + 10
    clean[~mask] = 0
    dirty = np.where(mask[:, None, None], clean, np.float32(poison))
    cotangent = rng.normal(size=clean.shape).astype(np.float32)
    dirty_cotangent = np.where(mask[:, None, None], cotangent, np.float32(poison))

    @jax.jit
    def everything(x, cotangent):
        def forward(params, x):
            return jbn.batch_norm(params, state, x, True, mask=mask[:, None], **options)

        out, backward, new_state = jax.vjp(forward, params, x, has_aux=True)
        return out, new_state, backward(cotangent), jbn.normalize(params, new_state, x, mask=mask[:, None])

    expected = everything(clean, cotangent)
    actual = everything(dirty, dirty_cotangent)
    assert_identical(actual, expected)
    out, _, (_, dx), inferred = actual
    for array in (out, dx, inferred):
        np.testing.assert_array_equal(array[~mask], np.zeros_like(array[~mask]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_masked_nan_stays_out_of_eager_gradients(dtype):
    params, state = jbn.init(3)
    mask = jnp.array([True, True, True, False, True, False])
    x = np.arange(18, dtype=np.float32).reshape(6, 3)
    x[3] = np.nan
    x = jnp.asarray(x.astype(jnp.dtype(dtype)))
    with jax.debug_nans(True):
        gradient = jax.grad(lambda x: jnp.sum(jbn.batch_norm(params, state, x, True, mask=mask)[0] ** 3))(x)
    np.testing.assert_array_equal(gradient[3], jnp.zeros(3, dtype))


@pytest.mark.parametrize(
    "options", [{}, {"ghost_batch_size": 2}, {"running_var": "unbiased"}, {"running_var": "total"}]
)
@pytest.mark.parametrize("rows", [0, 4])
def test_nothing_valid_changes_nothing(debug_nans, rng, rows, options):
    params = some_params(rng, 3)
    state = jbn.State(rng.normal(size=3).astype(np.float32), np.ones(3, np.float32), np.int32(5))
    x = np.full((rows, 2, 3), np.nan, np.float32)
    mask = np.zeros((rows, 2), bool) if rows else None

    def forward(params, x):
        return jbn.batch_norm(params, state, x, True, mask=mask, activation=jnp.exp, **options)

    @jax.jit
    def everything(params, x):
        out, backward, new_state = jax.vjp(forward, params, x, has_aux=True)
        return out, new_state, backward(jnp.ones_like(out))

    out, new_state, gradients = everything(params, x)
    np.testing.assert_array_equal(out, np.zeros((rows, 2, 3)))
    assert_identical(new_state, state)
    for gradient in jax.tree.leaves(gradients):
        np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


def test_no_features():
    out, state = jbn.batch_norm(*jbn.init(0), jnp.ones((4, 0)), True)
    assert out.shape == (4, 0)
    assert int(state.count) == 0


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", [1, 2, 6, 12])
def test_ghost_batches_are_normalized_on_their_own(rng, size, masked):
    x = (rng.normal(size=(12, 4, 3)) + np.arange(12)[:, None, None]).astype(np.float32)
    mask = rng.random((12, 4)) < 0.7 if masked else None
    params = some_params(rng, 3)
    out, state = batch_norm(params, jbn.init(3)[1], x, True, momentum=0.0, ghost_batch_size=size, mask=mask)
    for start in range(0, 12, size):
        group = slice(start, start + size)
        part = reference.batch_norm(x[group], *params, mask=mask if mask is None else mask[group])
        assert_close(out[group], part.out, scale=20)
    whole = reference.batch_norm(x, mask=mask)
    assert_close(state.mean, whole.mean)
    assert_close(state.var, whole.var)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("options", [{}, {"ghost_batch_size": 4}, {"running_var": "total"}, {"mask": np.arange(8) > 0}])
def test_a_batch_that_is_not_finite_leaves_the_state(rng, poison, options):
    params, state = jbn.init(3)
    _, state = batch_norm(params, state, rng.normal(size=(8, 3)).astype(np.float32), True)
    x = rng.normal(size=(8, 3)).astype(np.float32)
    x[5, 1] = poison
    out, new_state = batch_norm(params, state, x, True, **options)
    assert_identical(new_state, state)
    assert not bool(jnp.all(jnp.isfinite(out[:, 1])))
    _, marked = batch_norm(params, jbn.unset(state), x, True, **options)
    assert_identical(marked, jbn.unset(state))


def test_ghost_batch_of_one_feature_keeps_other_groups_clean(rng):
    x = rng.normal(size=(8, 3)).astype(np.float32)
    x[0, 0] = np.nan
    out, _ = batch_norm(*jbn.init(3), x, True, ghost_batch_size=4)
    assert bool(jnp.all(jnp.isfinite(out[4:])))


@pytest.mark.parametrize("momentum", [0.9, 0.99, 0.999, 0.9999])
def test_running_mean_of_a_constant_comes_as_near_as_float32_can(momentum):
    params, state = jbn.init(1)
    x = jnp.ones((4, 1))

    def step(state, _):
        return jbn.batch_norm(params, state, x, True, momentum=momentum)[1], None

    updates = int(25 / (1 - momentum))
    state = jax.jit(lambda state: jax.lax.scan(step, state, length=updates)[0])(state)
    assert abs(float(state.mean[0]) - 1) <= 6e-8 / (1 - momentum)


def test_bfloat16_input_does_not_bias_the_running_mean():
    params, state = jbn.init(1)
    spread = np.arange(-32, 33) / 64  # the spacing of bfloat16 between 2 and 4 is 1/64, so that the mean is 3
    x = jnp.asarray(3 + spread[:, None]).astype(jnp.bfloat16)

    def step(state, _):
        return jbn.batch_norm(params, state, x, True)[1], None

    state, _ = jax.jit(lambda state: jax.lax.scan(step, state, length=2000))(state)
    np.testing.assert_allclose(state.mean, 3, atol=1e-3)
    np.testing.assert_allclose(state.var, np.mean(spread**2), rtol=1e-3)


@pytest.mark.parametrize("sd", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("start", ["init", "unset"])
def test_total_variance_of_a_cumulative_average_is_the_population_s(rng, sd, size, start):
    batches = ((rng.normal(size=(32, size, 3)) + rng.normal(size=(32, 1, 1))) * sd).astype(np.float32)
    params, state = jbn.init(3)
    state = jbn.unset(state) if start == "unset" else state

    def step(state, x):
        return jbn.batch_norm(params, state, x, True, momentum=jbn.momentum.cumulative(), running_var="total")[1], None

    state, _ = jax.jit(lambda state: jax.lax.scan(step, state, batches))(state)
    population = reference.batch_norm(batches.reshape(-1, 3))
    np.testing.assert_allclose(state.mean, population.mean, rtol=1e-5, atol=1e-5 * sd)
    np.testing.assert_allclose(state.var, population.var, rtol=1e-5)


def test_under_vmap_each_lane_has_statistics_of_its_own(rng):
    x = rng.normal(size=(3, 8, 2)).astype(np.float32)
    params, state = jbn.init(2)
    states = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), state)
    out, new = jax.vmap(lambda s, x: jbn.batch_norm(params, s, x, True, momentum=0.0))(states, x)
    for lane in range(3):
        expected = reference.batch_norm(x[lane])
        assert_close(out[lane], expected.out, scale=5)
        assert_close(new.var[lane], expected.var)


def jitted_init():
    return jax.jit(lambda: jbn.init(3))()


def unset_init():
    params, state = jbn.init(3)
    return params, jbn.unset(state)


@pytest.mark.parametrize("make", [lambda: jbn.init(3), jitted_init, unset_init])
def test_state_and_params_can_be_donated(rng, make):
    x = rng.normal(size=(8, 3)).astype(np.float32)
    params, state = make()
    leaves = jax.tree.leaves((params, state))
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)
    step = jax.jit(lambda p, s, x: (p, jbn.batch_norm(p, s, x, True)[1]), donate_argnums=(0, 1))
    for _ in range(3):
        params, state = step(params, state, x)
    assert int(state.count) == 3


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("train", [True, False])
def test_export_with_a_symbolic_batch(rng, train, masked):
    params, state = some_params(rng, 3), jbn.init(3)[1]
    (rows,) = export.symbolic_shape("b")
    for shape in ((rows, 3), (rows, 4, 3)):
        norm = jax.jit(
            lambda p, s, x, mask: jbn.batch_norm(p, s, x, train, mask=mask if masked else None, activation=jax.nn.relu)
        )
        spec = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (params, state))
        arrays = (jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape[:-1], jnp.bool))
        exported = export.export(norm)(*spec, *arrays)
        for size in (1, 2, 3, 64):
            x = rng.normal(size=(size, *shape[1:])).astype(np.float32) + 1e3
            mask = rng.random(x.shape[:-1]) < 0.7
            actual, expected = exported.call(params, state, x, mask), norm(params, state, x, mask)
            for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
                np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5)


def test_eager_and_jitted_agree_to_rounding(rng):
    x = rng.normal(size=(64, 3)).astype(np.float32)
    params, state = jbn.init(3)
    for options in ({}, {"mask": np.arange(64) % 3 > 0}):
        eager, jitted = (f(params, state, x, True, **options) for f in (jbn.batch_norm, batch_norm))
        for e, j in zip(jax.tree.leaves(eager), jax.tree.leaves(jitted), strict=True):
            assert_close(j, e, scale=5)


def test_epsilon_bounds_the_gain():
    x = jnp.array([[0.0], [1e-4]])
    out, _ = jbn.batch_norm(*jbn.init(1), x, True, epsilon=1e-2)
    np.testing.assert_allclose(out, [[-5e-5 / np.sqrt(1e-2 + 2.5e-9)], [5e-5 / np.sqrt(1e-2 + 2.5e-9)]], rtol=1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"activation": jax.nn.relu}, {"mask": np.arange(8) > 1}, {"ghost_batch_size": 4}]
)
def test_the_program_of_the_output_does_not_take_the_state(options):
    params, state = jbn.init(3)

    def out(mean, var, count, x):
        return jbn.batch_norm(params, jbn.State(mean, var, count), x, True, **options)[0]

    program = jax.jit(out).lower(*state, jnp.ones((8, 3))).as_text()
    arguments = program.split("@main(")[1].split("->")[0]
    assert arguments.count("%arg") == 1
    assert "%arg0: tensor<8x3xf32>" in arguments


def test_a_symbolic_batch_is_as_exact(rng):
    params, state = jbn.init(4)
    norm = jax.jit(lambda x: jbn.batch_norm(params, state, x, True, momentum=0.0)[1].var)
    exported = export.export(norm)(jax.ShapeDtypeStruct((*export.symbolic_shape("b"), 4), jnp.float32))
    for case in ("first row far", "second row far"):
        x, _ = ill_conditioned(rng, 2**16, 1e4, case)
        np.testing.assert_allclose(exported.call(x), reference.batch_norm(x).var, rtol=1e-5)


@pytest.mark.parametrize("norm", [jbn.batch_norm, jbn.batch_renorm])
def test_a_variance_beyond_the_range_is_loud(norm):
    """The reciprocal of its root is 0, which would give the bias for everything."""
    x = jnp.array([[1e20, 1.0], [-1e20, 2.0], [0.0, 6.0]])
    params, state = jbn.init(2)
    out, new_state = norm(params, state, x, True)
    assert np.isnan(out[:, 0]).all()
    assert np.isfinite(out[:, 1]).all()
    jax.tree.map(np.testing.assert_array_equal, new_state, state)
    faulty = state._replace(var=jnp.array([jnp.inf, 1.0]))
    assert np.isnan(norm(params, faulty, x, False)[0][:, 0]).all()
    kernel, bias = jbn.fold(params, faulty, jnp.ones((3, 2)))
    assert np.isnan(kernel[:, 0]).all() and np.isnan(bias[0])
    assert np.isfinite(kernel[:, 1]).all() and np.isfinite(bias[1])
