"""The public call: running statistics, what the output depends on, and the ways to call it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import reference
from support.programs import batch_norm, forward_and_backward
from support.tolerances import assert_close, assert_same

import jbn


def test_running_statistics_move_by_the_update_rule_for_every_momentum_and_variance(rng):
    """One program for all cases; the momenta are concrete numbers in it."""
    cases = [(m, rule) for m in (0.0, 0.3, 0.5, 0.9, 1.0) for rule in ("biased", "unbiased", "total")]
    params, state = jbn.init(3)

    @jax.jit
    def step(states, x):
        return {
            (m, rule): jbn.batch_norm(params, states[m, rule], x, True, momentum=m, running_var=rule)[1]
            for m, rule in cases
        }

    states, expected = dict.fromkeys(cases, state), dict.fromkeys(cases, (np.zeros(3), np.ones(3)))
    for _ in range(3):
        x = (rng.normal(size=(7, 3)) * 3 + 10).astype(np.float32)
        states = step(states, x)
        batch = reference.batch_norm(x)
        for m, rule in cases:
            mean, var = expected[m, rule] = reference.update(*expected[m, rule], batch, m, rule)
            assert_close(states[m, rule].mean, mean, scale=20)
            assert_close(states[m, rule].var, var, scale=100)
    for found in states.values():
        np.testing.assert_array_equal(found.count, np.full(3, 3))


def test_training_output_does_not_depend_on_the_running_statistics(rng):
    x = rng.normal(size=(32, 3)).astype(np.float32)
    params, state = jbn.init(3)
    other = jbn.State(state.mean + 7, state.var * 5, state.count + 9)
    for options in ({}, {"activation": jax.nn.relu}, {"ghost_batch_size": 8}):

        def outputs(state, options=options):
            return [jbn.batch_norm(params, state, x, True, momentum=m, **options)[0] for m in (0.999, MOMENTUM)]

        assert_same(jax.jit(outputs)(other), jax.jit(outputs)(state))


MOMENTUM = jbn.momentum.warmup(0.9)


def test_the_program_of_the_training_output_does_not_take_the_state():
    params, state = jbn.init(3)
    for options in ({}, {"activation": jax.nn.relu}, {"mask": np.arange(8) > 1}, {"ghost_batch_size": 4}):

        def out(mean, var, count, x, options=options):
            return jbn.batch_norm(params, jbn.State(mean, var, count), x, True, **options)[0]

        program = jax.jit(out).lower(*state, jnp.ones((8, 3))).as_text()
        arguments = program.split("@main(")[1].split("->")[0]
        assert arguments.count("%arg") == 1, options
        assert "%arg0: tensor<8x3xf32>" in arguments, options


@pytest.mark.parametrize(
    "options",
    [{}, {"ghost_batch_size": 4}, {"running_var": "total"}, {"mask": np.arange(8) > 0}],
    ids=["plain", "ghost", "total", "masked"],
)
def test_a_feature_that_is_not_finite_keeps_its_state_and_shows_in_the_output(rng, options):
    """The other features are updated, from a set and from an unset state."""
    params, state = jbn.init(3)
    state = state._replace(mean=rng.normal(size=3).astype(np.float32), count=np.float32([1, 2, 3]))
    clean, others = rng.normal(size=(8, 3)).astype(np.float32), np.array([True, False, True])
    batch = reference.batch_norm(clean, mask=options.get("mask"))
    for start in (state, jbn.unset(state)):
        moved = reference.update(*map(np.float64, start[:2]), batch, 0.99, options.get("running_var", "biased"))
        expected = moved if start is state else (batch.mean, batch.var)
        for poison in (np.nan, np.inf):
            x = clean.copy()
            x[5, 1] = poison
            out, new_state = batch_norm(params, start, x, True, **options)
            for new, old, value in zip(new_state, start, (*expected, start.count + 1), strict=True):
                np.testing.assert_array_equal(new[1], old[1])
                assert_close(new[others], value[others], scale=1)
            assert not np.isfinite(out[4:, 1]).any()
            assert np.isfinite(out[:, others]).all()


@pytest.mark.parametrize("momentum", [0.9, 0.9999])
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
    spread = np.arange(-32, 33) / 64  # multiples of the spacing of bfloat16 between 2 and 4, so the mean is 3
    x = jnp.asarray(3 + spread[:, None]).astype(jnp.bfloat16)

    def step(state, _):
        return jbn.batch_norm(params, state, x, True)[1], None

    state, _ = jax.jit(lambda state: jax.lax.scan(step, state, length=2000))(state)
    np.testing.assert_allclose(state.mean, 3, atol=1e-3)
    np.testing.assert_allclose(state.var, np.mean(spread**2), rtol=1e-3)


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("start", ["init", "unset"])
def test_total_variance_of_a_cumulative_average_is_that_of_all_values(rng, size, start):
    params, state = jbn.init(3)
    state = jbn.unset(state) if start == "unset" else state

    def step(state, x):
        return jbn.batch_norm(params, state, x, True, momentum=jbn.momentum.cumulative(), running_var="total")[1], None

    average = jax.jit(lambda state, batches: jax.lax.scan(step, state, batches)[0])
    for sd in (1e-3, 1.0, 1e3):
        batches = ((rng.normal(size=(32, size, 3)) + rng.normal(size=(32, 1, 1))) * sd).astype(np.float32)
        found, population = average(state, batches), reference.batch_norm(batches.reshape(-1, 3))
        np.testing.assert_allclose(found.mean, population.mean, rtol=1e-5, atol=1e-5 * sd)
        np.testing.assert_allclose(found.var, population.var, rtol=1e-5)


@pytest.mark.parametrize("make", [jbn.init, jax.jit(jbn.init, static_argnums=0)], ids=["eager", "jitted"])
@pytest.mark.parametrize("start", [lambda state: state, jbn.unset], ids=["init", "unset"])
def test_state_and_params_can_be_donated(rng, make, start):
    x = rng.normal(size=(8, 3)).astype(np.float32)
    params, state = make(3)
    state = start(state)
    leaves = jax.tree.leaves((params, state))
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)
    step = jax.jit(lambda p, s, x: (p, jbn.batch_norm(p, s, x, True)[1]), donate_argnums=(0, 1))
    for _ in range(3):
        params, state = step(params, state, x)
    np.testing.assert_array_equal(state.count, np.full(3, 3))


def test_state_and_result_keep_their_dtypes(x64):
    for dtype in ("float32", "float64"):
        params, state = jbn.init(3, dtype)
        for x_dtype in ("float32", "float64", "bfloat16", "float16"):
            x = jax.ShapeDtypeStruct((8, 3), x_dtype)
            for train in (True, False):
                for result in (None, "bfloat16"):
                    norm = functools.partial(jbn.batch_norm, params, state, train=train, dtype=result)
                    out, new_state = jax.eval_shape(lambda x, norm=norm: norm(x=x), x)
                    assert out.dtype == (result or x_dtype)
                    assert [leaf.dtype for leaf in new_state] == [leaf.dtype for leaf in state]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_no_scale_and_no_bias_are_ones_and_zeros(rng, dtype):
    x, cotangent = (jnp.asarray(rng.normal(size=(5, 4, 3))).astype(dtype) for _ in range(2))
    ones, state = jbn.init(3)
    for train in (True, False):

        @jax.jit
        def passes(params, x, train=train):
            out, backward = jax.vjp(lambda x: jbn.batch_norm(params, state, x, train)[0], x)
            return out, *backward(cotangent)

        assert passes(ones, x)[0].dtype == dtype
        assert_same(passes(jbn.Params(None, None), x), passes(ones, x))


def test_a_shortcut_is_added_in_float32_before_the_activation_in_training_and_at_inference(rng):
    """For any dtype of the shortcut. The result has the dtype of x, or the given `dtype`."""
    params, state = jbn.Params(*rng.normal(size=(2, 3)).astype(np.float32)), jbn.init(3)[1]
    x, shortcut = rng.normal(size=(2, 8, 3)).astype(np.float32)
    for x_dtype, dtype, result in (("float32", "bfloat16", None), ("bfloat16", "float32", "float32")):
        given = jnp.asarray(x, x_dtype), jnp.asarray(shortcut, dtype)
        exact_x, exact = (np.asarray(array.astype(jnp.float32), np.float64) for array in given)
        before = reference.batch_norm(exact_x, *params).out, reference.inference(exact_x, 0, 1, *params)
        for train, normalized in zip((True, False), before, strict=True):
            options = {"shortcut": given[1], "activation": jnp.tanh, "dtype": result}
            out, _ = batch_norm(params, state, given[0], train, **options)
            assert out.dtype == (result or x_dtype)
            assert_close(out, np.tanh(normalized + exact), scale=5)


@pytest.mark.parametrize(("dtype", "of_shortcut"), [("float32", "float64"), ("float64", "float32")])
def test_a_shortcut_of_another_width_is_added_in_the_arithmetic_of_x(x64, rng, dtype, of_shortcut):
    x, shortcut = rng.normal(size=(2, 8, 3))
    x, shortcut = jnp.asarray(x, dtype), jnp.asarray(shortcut, of_shortcut)

    def widths(y):
        assert y.dtype == dtype
        return y

    out, _ = jbn.batch_norm(*jbn.init(3), x, True, shortcut=shortcut, activation=widths)
    assert out.dtype == dtype
    assert_close(out, jbn.batch_norm(*jbn.init(3), x, True)[0] + shortcut.astype(dtype))


def test_under_vmap_each_lane_has_statistics_of_its_own(rng):
    x = rng.normal(size=(3, 8, 2)).astype(np.float32)
    params, state = jbn.init(2)
    states = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), state)
    out, new = jax.jit(jax.vmap(lambda s, x: jbn.batch_norm(params, s, x, True, momentum=0.0)))(states, x)
    for lane in range(3):
        expected = reference.batch_norm(x[lane])
        assert_close(out[lane], expected.out, scale=5)
        assert_close(new.var[lane], expected.var)


def test_eager_and_jitted_calls_agree_to_rounding(rng):
    x = rng.normal(size=(64, 3)).astype(np.float32)
    params, state = jbn.init(3)
    for options in ({}, {"mask": np.arange(64) % 3 > 0}):
        eager, jitted = (f(params, state, x, True, **options) for f in (jbn.batch_norm, batch_norm))
        for e, j in zip(jax.tree.leaves(eager), jax.tree.leaves(jitted), strict=True):
            assert_close(j, e, scale=5)


@pytest.mark.parametrize("train", [True, False])
def test_arguments_may_be_named_and_arrays_be_of_numpy_or_of_jax(rng, train):
    params, state = jbn.init(3)
    x, mask = rng.normal(size=(6, 3)).astype(np.float32), rng.random(6) < 0.7
    arrays = (params, state, x, mask)
    results = [
        jbn.batch_norm(params=params, state=state, x=x, train=train, mask=mask)
        for params, state, x, mask in (jax.tree.map(kind, arrays) for kind in (np.asarray, jnp.asarray))
    ]
    assert_same(*results)
    assert_same(jbn.batch_norm(params, state, x, train, mask=mask), results[0])


@pytest.mark.parametrize("train", [True, np.True_, False, np.False_])
def test_flags_and_numbers_of_numpy_and_of_jax_are_taken(train):
    x, norm = np.ones((8, 3), np.float32), jbn.init(3)
    for epsilon in (1, np.float32(1e-5), np.array(1e-5), jnp.float32(1e-5)):
        assert jax.eval_shape(lambda e=epsilon: jbn.batch_norm(*norm, x, train, epsilon=e))[0].shape == x.shape
    for momentum in (0, 1, np.float64(0.5), jnp.float32(0.5), True):
        assert jax.eval_shape(lambda m=momentum: jbn.batch_norm(*norm, x, train, momentum=m))[0].shape == x.shape


def test_a_norm_without_features(rng):
    out, state = jbn.batch_norm(*jbn.init(0), jnp.ones((4, 0)), True)
    assert out.shape == (4, 0)
    assert state.count.shape == (0,)


def test_one_example_gives_the_bias_and_no_gradient_but_of_it(rng):
    x, cotangent = rng.normal(size=(2, 1, 5)).astype(np.float32)
    found = forward_and_backward(*jbn.init(5), x, cotangent)
    np.testing.assert_array_equal(found.out, np.zeros((1, 5)))
    np.testing.assert_array_equal(found.gradients.bias, cotangent[0])
    for gradient in (found.gradients.scale, found.dx):
        np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


def test_no_tracer_leaks(rng):
    (params, state), x = jbn.init(3), rng.normal(size=(8, 3)).astype(np.float32)
    options = {"activation": jax.nn.relu, "mask": np.arange(8) > 2}

    def loss(params, x):
        out, new_state = jbn.batch_norm(params, state, x, True, **options)
        return jnp.sum(out**2 + jbn.batch_norm(params, state, x, False, **options)[0]), new_state

    with jax.checking_leaks():
        jax.eval_shape(lambda: jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, x))
