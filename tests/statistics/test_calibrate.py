"""Population statistics: exact for any split of the data, any averaging rule, and any placement of the state."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from support import reference
from support.compilation import UNOPTIMIZED, compiled
from support.tolerances import UNIT, assert_close

import jbn
from jbn.demo import data, model
from jbn.demo.step import AXIS, Run, batch_statistics, evaluate, make_step

pytestmark = pytest.mark.standard_promotion

MOMENTUM, STEPS, BATCH_SIZE = 0.999, 40, 64


@pytest.fixture(scope="module")
def digits():
    return data.load()


@pytest.fixture(scope="module")
def trained(digits):
    """A network that trained well, but with running statistics close to their initial values."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        optimizer = optax.adamw(optax.cosine_decay_schedule(3e-3, STEPS))
        mesh = Mesh(np.array(jax.devices()[:1]), (AXIS,))
        everywhere = NamedSharding(mesh, PartitionSpec())
        params, state = compiled(model.init)(jax.random.key(0, impl="unsafe_rbg"))
        run = jax.device_put(Run(params, state, jax.jit(optimizer.init)(params)), everywhere)
        batches = [
            jax.device_put(batch, everywhere)
            for batch in itertools.islice(data.batches(digits.train, BATCH_SIZE, seed=0), STEPS)
        ]
        step = (
            make_step(mesh, optimizer, momentum=MOMENTUM).lower(run, batches[0]).compile(compiler_options=UNOPTIMIZED)
        )
        for batch in batches:
            run, _ = step(run, batch)
        return jax.tree.map(np.asarray, run)


@functools.partial(jax.jit, static_argnames=("momentum", "running_var"))
def step(state, x, **options):
    return jbn.batch_norm(jbn.init(state.mean.shape)[0], state, x, True, **options)[1]


@jax.jit
def masked_step(state, batch):
    return jbn.batch_norm(jbn.init(3)[0], state, batch["x"], True, mask=batch["mask"])[1]


def cut(array, sizes):
    return np.split(array, np.cumsum(sizes)[:-1])


def assert_within(state, mean, var):
    """The guaranteed bound: 1e-6 plus two units of rounding of the mean, in standard deviations."""
    sd = np.sqrt(var)
    allowed = 1e-6 + 2 * UNIT["float32"] * np.abs(mean) / sd
    assert np.all(np.abs(np.asarray(state.mean, np.float64) - mean) / sd <= allowed)
    assert np.all(np.abs(np.asarray(state.var, np.float64) / var - 1) <= allowed)


@pytest.mark.slow
def test_a_trained_network_however_the_data_is_cut(digits, trained):
    sizes = [128, 29, 128]
    images = digits.train.images[: sum(sizes)]
    before = jax.tree.map(np.asarray, trained.state)
    step = functools.partial(batch_statistics, trained.params)
    seen = jax.lax.conv_general_dilated(
        images, trained.params["stem"]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    expected = reference.batch_norm(seen)
    whole, population = (jbn.calibrate(step, trained.state, cut(images, each)) for each in ([len(images)], sizes))
    for found in (whole, population):
        # The result of XLA's convolution depends on the batch size, by a few units of its largest terms.
        assert_close(found["stem"].mean, expected.mean, scale=1)
        assert_close(found["stem"].var, expected.var)
    assert_within(population["stem"], np.asarray(whole["stem"].mean, float), np.asarray(whole["stem"].var, float))
    jax.tree.map(np.testing.assert_array_equal, before, trained.state)
    assert jax.tree.structure(population) == jax.tree.structure(before)
    np.testing.assert_array_equal(population["stem"].count, np.full(expected.mean.shape, len(sizes)))


@pytest.mark.slow
def test_calibration_restores_the_accuracy(digits, trained):
    """Held-out accuracy: with the initial values low, with calibration close to that with the set's own statistics."""
    step = functools.partial(batch_statistics, trained.params)
    state = jbn.calibrate(step, trained.state, cut(digits.train.images, [128] * 11 + [29]))
    running, calibrated, batch = (
        float(evaluate(trained.params, statistics, digits.held_out, train=train).accuracy)
        for statistics, train in ((trained.state, False), (state, False), (trained.state, True))
    )
    assert running < 0.5 < 0.85 < batch
    assert calibrated >= batch - 0.02


@pytest.mark.parametrize("sizes", [[256], [64] * 4, [2, 64, 2, 188]], ids=["whole", "even", "uneven"])
def test_one_norm_against_float64(rng, sizes):
    _, state = jbn.init(4)
    for ratio in (0.0, 1.0, 1e2, 1e4):
        x = (rng.normal(size=(256, 8, 8, 4)) + ratio).astype(np.float32)
        found = jbn.calibrate(step, state, cut(x, sizes))
        expected = reference.batch_norm(x)
        assert_within(found, expected.mean, expected.var)


@pytest.mark.parametrize(
    ("running_var", "momentum"),
    [("biased", 0.0), ("unbiased", jbn.momentum.warmup(0.9)), ("unbiased", 0.99), ("total", 0.99)],
    ids=["biased, 0", "unbiased, warmup", "unbiased, 0.99", "total, 0.99"],
)
def test_how_a_norm_averages_does_not_matter(rng, running_var, momentum):
    x = rng.normal(size=(16, 3)).astype(np.float32) + 2
    _, state = jbn.init(3)
    averaging = functools.partial(step, running_var=running_var, momentum=momentum)
    moved = averaging(state, x[:8])
    found = jbn.calibrate(averaging, moved, cut(x, [8, 8]))
    assert_within(found, *reference.batch_norm(x)[1:3])
    np.testing.assert_array_equal(found.count, [2, 2, 2])


def test_masks_are_exact_by_weights(rng):
    x = rng.normal(size=(64, 5, 3)).astype(np.float32) + 2
    mask = rng.random((64, 5)) < np.repeat([0.1, 0.9], 32)[:, None]
    x[~mask] = np.nan
    batches = [{"x": x, "mask": mask} for x, mask in zip(cut(x, [32, 32]), cut(mask, [32, 32]), strict=True)]
    _, state = jbn.init(3)
    found = jbn.calibrate(masked_step, state, batches, lambda batch: batch["mask"].sum())
    expected = reference.batch_norm(x, mask=mask)
    assert_within(found, expected.mean, expected.var)
    by_examples = jbn.calibrate(masked_step, state, batches)
    assert np.max(np.abs(by_examples.mean - expected.mean)) > 1e-3


def test_masks_by_feature_are_exact_by_weights_by_feature(rng):
    """In each batch one feature has no valid values, so that the batch does not affect it."""
    x = rng.normal(size=(64, 3)).astype(np.float32) + 2
    mask = rng.random((64, 3)) < 0.5
    mask[:32, 0] = mask[32:, 1] = False
    batches = [{"x": x, "mask": mask} for x, mask in zip(cut(x, [32, 32]), cut(mask, [32, 32]), strict=True)]
    found = jbn.calibrate(masked_step, jbn.init(3)[1], batches, lambda batch: batch["mask"].sum(0))
    expected = [reference.batch_norm(x[mask[:, i], i : i + 1]) for i in range(3)]
    assert_within(found, *(np.concatenate([one[field] for one in expected]) for field in (1, 2)))
    np.testing.assert_array_equal(found.count, [1, 1, 2])


def test_weights_by_feature_are_given_to_each_norm_of_a_tree(rng):
    x = rng.normal(size=(8, 3)).astype(np.float32)

    def steps(states, x):
        return {name: step(state, x) for name, state in states.items()}

    weights = {"a": np.float32([1, 1, 1]), "b": np.float32([4, 0, 1])}
    states = {name: jbn.init(3)[1] for name in weights}
    found = jbn.calibrate(steps, states, cut(x, [4, 4]), lambda batch: weights if batch[0, 0] == x[0, 0] else 1)
    means = [part.mean(0, dtype=np.float64) for part in cut(x, [4, 4])]
    assert_close(found["a"].mean, (means[0] + means[1]) / 2, scale=1)
    assert_close(found["b"].mean, (weights["b"] * means[0] + means[1]) / (weights["b"] + 1), scale=1)
    np.testing.assert_array_equal(found["b"].count, [2, 1, 2])


def test_a_feature_that_is_not_finite_in_a_batch_has_no_weight_there(rng):
    x = rng.normal(size=(16, 3)).astype(np.float32)
    x[3, 1] = np.nan
    found = jbn.calibrate(step, jbn.init(3)[1], cut(x, [8, 8]))
    assert_close(found.mean, [x[:, 0].mean(), x[8:, 1].mean(), x[:, 2].mean()], scale=1)
    np.testing.assert_array_equal(found.count, [2, 1, 2])


def test_a_feature_that_is_always_0_has_mean_and_variance_0(rng):
    x = rng.normal(size=(2, 8, 3)).astype(np.float32) * np.float32([1, 0, 1])
    params, state = jbn.init(3)

    def step(statistics, x):
        _, new = jbn.batch_norm(params, state._replace(**statistics), x, True)
        return {"mean": new.mean, "var": new.var}

    found = jbn.calibrate(step, {"mean": state.mean, "var": state.var}, x)
    assert (found["mean"][1], found["var"][1]) == (0, 0)


def test_a_batch_of_weight_zero_is_passed_over(rng):
    x = rng.normal(size=(8, 3)).astype(np.float32)
    _, state = jbn.init(3)
    found = jbn.calibrate(step, state, [x * np.nan, x, x[:0]], lambda x: 0 if np.isnan(x).any() else len(x))
    assert_within(found, *reference.batch_norm(x)[1:3])


def test_float64_is_kept(x64, rng):
    x = rng.normal(size=(16, 3)) + 1e6
    _, state = jbn.init(3, "float64")
    found = jbn.calibrate(step, state, cut(x, [8, 8]))
    expected = reference.batch_norm(x)
    assert found.var.dtype == jnp.float64
    assert_close(found.mean, expected.mean, "float64")
    assert_close(found.var, expected.var, "float64", condition=1e6)


def test_a_step_that_takes_over_its_state(rng):
    """With donated buffers, the state of the caller and that of an excluded norm remain valid."""
    params, state = jbn.init(3)
    states = {"norm": state, "frozen": jbn.init(3)[1], "other": jnp.ones(3)}

    @functools.partial(jax.jit, donate_argnums=0)
    def step(states, x):
        return {**states, "norm": jbn.batch_norm(params, states["norm"], x, True)[1]}

    x = rng.normal(size=(8, 3)).astype(np.float32)
    found = jbn.calibrate(step, {key: states[key] for key in ("norm", "frozen")}, [x, x], select="norm".__eq__)
    jax.tree.map(np.asarray, (states, found))


@pytest.mark.devices(8)
def test_results_are_where_the_state_was(rng):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    everywhere, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("d"))
    x = rng.normal(size=(8, 3)).astype(np.float32)
    _, state = jbn.init(3)
    found = jbn.calibrate(step, jax.device_put(state, everywhere), [jax.device_put(x, split)])
    assert found.mean.sharding == everywhere
    assert_within(found, *reference.batch_norm(x)[1:3])
    assert not jbn.calibrate(step, state, [x]).mean.committed


def test_a_bar_is_shown_on_standard_error_where_asked_for(rng, capfd):
    x = rng.normal(size=(24, 3)).astype(np.float32)
    jbn.calibrate(step, jbn.init(3)[1], cut(x, [8, 8, 8]), progress=True)
    shown = capfd.readouterr()
    assert "calibrate" in shown.err
    assert "3/3" in shown.err
    assert shown.out == ""
    jbn.calibrate(step, jbn.init(3)[1], iter(cut(x, [8, 8, 8])))
    assert capfd.readouterr() == ("", "")
