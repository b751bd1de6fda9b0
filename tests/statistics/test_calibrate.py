"""Population statistics: exact however the data is cut, in every kind of tree, and clear about what cannot be had."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from support import reference
from support.tolerances import UNIT, assert_close

import jbn
from jbn.demo import data, loop, model
from jbn.demo.options import Options
from jbn.demo.step import batch_statistics, evaluate

CUTS = {"whole": [512], "even": [64] * 8, "uneven": [2, 2, 4, 8, 16, 32, 64, 128, 256]}
IMAGES = 512


@pytest.fixture(autouse=True)
def standard_promotion():
    """Flax and optax promote implicitly."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def trained():
    """The lesson of the README: trained well, with running statistics that are still the start."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        digits = data.load()
        return digits, loop.train(Options(momentum="0.999", steps=60, devices=1), digits, lambda look: None)


def cut(array, sizes):
    return np.split(array, np.cumsum(sizes)[:-1])


def assert_within(state, mean, var):
    """As the promise says: 1e-6 and two units of rounding of the mean, in standard deviations."""
    sd = np.sqrt(var)
    allowed = 1e-6 + 2 * UNIT["float32"] * np.abs(mean) / sd
    assert np.all(np.abs(np.asarray(state.mean, np.float64) - mean) / sd <= allowed)
    assert np.all(np.abs(np.asarray(state.var, np.float64) / var - 1) <= allowed)


@pytest.mark.parametrize("sizes", CUTS.values(), ids=CUTS)
def test_a_trained_network_however_the_data_is_cut(trained, sizes):
    digits, result = trained
    images = digits.train.images[:IMAGES]
    before = jax.tree.map(np.asarray, result.run.state)
    step = functools.partial(batch_statistics, result.run.params)
    population = jbn.calibrate(step, result.run.state, cut(images, sizes))
    seen = jax.lax.conv_general_dilated(
        np.asarray(images, np.float64).astype(np.float32),
        result.run.params["stem"]["kernel"],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    expected = reference.batch_norm(seen)
    # What XLA's convolution gives depends on the size of the batch, by a few units of rounding of its largest terms.
    assert_close(population["stem"].mean, expected.mean, scale=1)
    assert_close(population["stem"].var, expected.var)
    whole = jbn.calibrate(step, result.run.state, [images])
    assert_within(population["stem"], np.asarray(whole["stem"].mean, float), np.asarray(whole["stem"].var, float))
    jax.tree.map(np.testing.assert_array_equal, before, result.run.state)
    assert jax.tree.structure(population) == jax.tree.structure(before)
    assert int(population["stem"].count) == 60


@pytest.mark.parametrize("sizes", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("ratio", [0.0, 1.0, 1e2, 1e4])
def test_one_norm_against_float64(rng, sizes, ratio):
    x = (rng.normal(size=(IMAGES, 8, 8, 4)) + ratio).astype(np.float32)
    params, state = jbn.init(4)
    step = jax.jit(lambda state, x: jbn.batch_norm(params, state, x, True)[1])
    found = jbn.calibrate(step, state, cut(x, sizes))
    expected = reference.batch_norm(x)
    assert_within(found, expected.mean, expected.var)


@pytest.mark.parametrize("running_var", ["biased", "unbiased", "total"])
@pytest.mark.parametrize("momentum", [0.0, 0.99, jbn.momentum.warmup(0.9)], ids=["0", "0.99", "warmup"])
def test_how_a_norm_averages_does_not_matter(rng, running_var, momentum):
    x = rng.normal(size=(32, 3)).astype(np.float32) + 2
    params, state = jbn.init(3)
    options = {"running_var": running_var, "momentum": momentum}
    step = jax.jit(lambda state, x: jbn.batch_norm(params, state, x, True, **options)[1])
    moved = step(state, x)
    found = jbn.calibrate(step, moved, cut(x, [2, 30]))
    assert_within(found, *reference.batch_norm(x)[1:3])
    assert int(found.count) == 1


def test_masks_are_exact_by_weights(rng):
    x = rng.normal(size=(64, 5, 3)).astype(np.float32) + 2
    mask = rng.random((64, 5)) < 0.3
    x[~mask] = np.nan
    batches = [{"x": x, "mask": mask} for x, mask in zip(cut(x, [4, 20, 40]), cut(mask, [4, 20, 40]), strict=True)]
    params, state = jbn.init(3)
    step = jax.jit(lambda state, batch: jbn.batch_norm(params, state, batch["x"], True, mask=batch["mask"])[1])
    found = jbn.calibrate(step, state, batches, lambda batch: batch["mask"].sum())
    expected = reference.batch_norm(x, mask=mask)
    assert_within(found, expected.mean, expected.var)
    by_examples = jbn.calibrate(step, state, batches)
    assert np.max(np.abs(by_examples.mean - expected.mean)) > 1e-3


def test_a_batch_of_weight_zero_is_passed_over(rng):
    x = rng.normal(size=(8, 3)).astype(np.float32)
    params, state = jbn.init(3)
    step = jax.jit(lambda state, x: jbn.batch_norm(params, state, x, True)[1])
    bad = np.full((4, 3), np.nan, np.float32)
    found = jbn.calibrate(step, state, [bad, x, x[:0]], lambda x: 0 if np.isnan(x).any() else len(x))
    assert_within(found, *reference.batch_norm(x)[1:3])


def test_calibration_restores_the_accuracy(trained):
    """Held out, after momentum 0.999 and 60 steps, against the held-out set's own statistics."""
    digits, result = trained
    step = functools.partial(batch_statistics, result.run.params)
    state = jbn.calibrate(step, result.run.state, cut(digits.train.images, [128] * 11 + [29]))
    calibrated = float(evaluate(result.run.params, state, digits.held_out, train=False).accuracy)
    look = result.record.looks[-1]
    assert look.held_out_running < 0.5
    assert calibrated >= look.held_out_batch - 0.02


def linen_model(norms, **options):
    """Norms of the given classes one after the other, with something between them."""

    class Model(linen.Module):
        @linen.compact
        def __call__(self, x):
            for number, norm in enumerate(norms):
                x = linen.Dense(3, name=f"dense{number}")(x)
                x = norm(use_running_average=False, name=f"norm{number}", **options)(x)
                x = linen.relu(x)
            return x

    return Model()


def linen_step(model, variables):
    def step(stats, x):
        return model.apply({**variables, "batch_stats": stats}, x, mutable=["batch_stats"])[1]["batch_stats"]

    return jax.jit(step)


def test_linen(rng):
    x = rng.normal(size=(16, 3)).astype(np.float32)
    model = linen_model([jbn.linen.BatchNorm] * 2)
    variables = model.init(jax.random.key(0), x)
    stats = jbn.calibrate(linen_step(model, variables), variables["batch_stats"], [x])
    dense = variables["params"]["dense0"]
    expected = reference.batch_norm(x @ np.asarray(dense["kernel"], np.float64) + np.asarray(dense["bias"]))
    assert_close(stats["norm0"]["mean"], expected.mean, scale=1)
    assert_close(stats["norm0"]["var"], expected.var)
    assert set(stats["norm1"]) == {"mean", "var"}


class Network(nnx.Module):
    def __init__(self, rngs, norm=jbn.nnx.BatchNorm, **options):
        self.dense = nnx.Linear(3, 4, rngs=rngs)
        self.norm = norm(4, rngs=rngs, **options)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.last = jbn.nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(self.norm(self.dense(x))))


@pytest.mark.parametrize("norm", [jbn.nnx.BatchNorm, jbn.nnx.BatchRenorm])
def test_nnx_as_a_module_and_as_a_state(rng, norm):
    x = rng.normal(size=(64, 3)).astype(np.float32)
    network = Network(nnx.Rngs(0), norm)
    expected = reference.batch_norm(
        x.astype(np.float64) @ np.asarray(network.dense.kernel[...]) + np.asarray(network.dense.bias[...])
    )
    graphdef, state = nnx.split(network)
    by_state = jbn.calibrate(jax.jit(lambda state, x: nnx.call((graphdef, state))(x)[1][1]), state, cut(x, [24, 40]))
    network.last(x @ np.ones((3, 4), np.float32))
    before = np.asarray(network.last.mean[...])
    by_module = jbn.calibrate(jax.jit(lambda network, x: (network(x), network)[1]), network, cut(x, [24, 40]))
    for mean, var in (
        (by_state["norm"]["mean"][...], by_state["norm"]["var"][...]),
        (by_module.norm.mean[...], by_module.norm.var[...]),
    ):
        assert_close(mean, expected.mean, scale=1)
        assert_close(var, expected.var)
    assert isinstance(by_module, Network)
    np.testing.assert_array_equal(network.last.mean[...], before)
    nnx.update(network, by_state)
    np.testing.assert_array_equal(network.norm.mean[...], by_state["norm"]["mean"][...])


class Frozen(linen.Module):
    """A frozen norm between two that train."""

    @linen.compact
    def __call__(self, x):
        x = jbn.linen.BatchNorm(use_running_average=False, name="first")(linen.Dense(3)(x))
        x = jbn.linen.BatchNorm(use_running_average=True, name="frozen")(x)
        return jbn.linen.BatchNorm(use_running_average=False, name="last")(linen.Dense(3)(x))


def test_a_frozen_norm_is_named_and_can_be_left_out(rng):
    x = rng.normal(size=(16, 3)).astype(np.float32)
    model = Frozen()
    variables = model.init(jax.random.key(0), x)
    stats = {**variables["batch_stats"], "frozen": {"mean": jnp.full(3, 0.5), "var": jnp.full(3, 2.0)}}
    step = linen_step(model, variables)
    with pytest.raises(ValueError, match="batch 0 gave no statistics for 2 of 3 norms") as error:
        jbn.calibrate(step, stats, [x])
    lines = str(error.value).splitlines()[1:]
    assert lines[0].startswith("  frozen is left as it was: it is frozen or in eval mode")
    assert "`select`" in lines[0]
    assert lines[1].startswith("  last saw no finite values: a norm named here")
    found = jbn.calibrate(step, stats, [x], select=lambda path: path != "frozen")
    np.testing.assert_array_equal(found["frozen"]["mean"], stats["frozen"]["mean"])
    assert_close(found["last"]["var"], step(jbn.unset(found) | {"frozen": stats["frozen"]}, x)["last"]["var"])


@pytest.mark.parametrize("momentum", [0.99, jbn.momentum.warmup(0.99)], ids=["without count", "with count"])
def test_a_layer_called_twice_is_named(rng, momentum):
    x = rng.normal(size=(16, 3)).astype(np.float32)

    class Siamese(linen.Module):
        @linen.compact
        def __call__(self, x):
            norm = jbn.linen.BatchNorm(use_running_average=False, momentum=momentum, name="shared")
            once = jbn.linen.BatchNorm(use_running_average=False, name="once")
            return once(norm(x[:8]) - norm(x[8:]))

    model = Siamese()
    variables = model.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"shared ran (2 times|more than once) in a step") as error:
        jbn.calibrate(linen_step(model, variables), variables["batch_stats"], [x])
    assert "once ran" not in str(error.value)
    assert "give each call a norm of its own" in str(error.value)


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_a_stock_flax_norm_is_named(rng, momentum):
    x = rng.normal(size=(16, 3)).astype(np.float32)
    model = linen_model([jbn.linen.BatchNorm, linen.BatchNorm, jbn.linen.BatchNorm], momentum=momentum)
    variables = model.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"for 1 of 3 norms:\n  norm1 (averages|has statistics)"):
        jbn.calibrate(linen_step(model, variables), variables["batch_stats"], [x])
    found = jbn.calibrate(
        linen_step(model, variables), variables["batch_stats"], [x], select=lambda path: path != "norm1"
    )
    assert np.isfinite(found["norm2"]["var"]).all()


def test_a_layer_that_saw_nothing_is_named(rng):
    states = {"used": jbn.init(3)[1], "nested": {"idle": jbn.init(3)[1]}}
    params, _ = jbn.init(3)

    def step(states, x):
        return {**states, "used": jbn.batch_norm(params, states["used"], x, True)[1]}

    x = rng.normal(size=(4, 3)).astype(np.float32)
    with pytest.raises(ValueError, match="for 1 of 2 norms:\n  nested/idle is left as it was"):
        jbn.calibrate(step, states, [x])
    with pytest.raises(ValueError, match="batch 1 gave no statistics for 1 of 1 norms:\n  used is left as it was"):
        jbn.calibrate(step, states, [x, x * np.nan], select=lambda path: path == "used")


def test_dropout_that_draws_anew_is_no_second_call(rng):
    """Without a count, a second call is told by running the step again, which must not mistake chance for it."""
    x = rng.normal(size=(16, 3)).astype(np.float32)
    model = linen_model([jbn.linen.BatchNorm])
    variables = model.init(jax.random.key(0), x)
    keys = itertools.count()
    inner = linen_step(model, variables)

    def step(stats, x):
        return inner(stats, x * jax.random.bernoulli(jax.random.key(next(keys)), 0.5, x.shape))

    jbn.calibrate(step, variables["batch_stats"], [x])
    assert next(keys) == 3


def test_scanned_layers_have_statistics_each(rng):
    x = rng.normal(size=(16, 3)).astype(np.float32)

    class Layer(linen.Module):
        @linen.compact
        def __call__(self, x, _):
            return jbn.linen.BatchNorm(use_running_average=False, momentum=jbn.momentum.warmup(0.9))(x) * 2, None

    scanned = linen.scan(Layer, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}, length=3)

    class Model(linen.Module):
        @linen.compact
        def __call__(self, x):
            return scanned()(x, None)[0]

    model = Model()
    variables = model.init(jax.random.key(0), x)
    stats = jbn.calibrate(linen_step(model, variables), variables["batch_stats"], [x])
    (node,) = next(iter(stats.values())).values()
    for before, after in itertools.pairwise(node["var"]):
        assert_close(after, 4 * before / (before + 1e-5))
    np.testing.assert_array_equal(node["count"], [0, 0, 0])


def many(norms):
    params, state = jbn.init(2)
    states = {f"norm{number}": state for number in range(norms)}

    def step(states, x):
        found = {}
        for name, state in states.items():
            x, found[name] = jbn.batch_norm(params, state, x, True, activation=jnp.tanh)
        return found

    return jax.jit(step), states


@pytest.mark.parametrize("norms", [3, 200])
def test_progress(rng, capfd, norms):
    step, states = many(norms)
    x = rng.normal(size=(24, 2)).astype(np.float32)
    jbn.calibrate(step, states, cut(x, [8, 8, 8]), progress=True)
    shown = capfd.readouterr()
    assert "calibrate" in shown.err
    assert "3/3" in shown.err
    assert shown.out == ""
    jbn.calibrate(step, states, iter(cut(x, [8, 8, 8])))
    assert capfd.readouterr() == ("", "")


def test_a_step_that_takes_over_its_state(rng):
    """With donated buffers, neither the state of the caller nor that of a norm left out is lost."""
    params, state = jbn.init(3)
    states = {"norm": state, "frozen": jbn.init(3)[1], "other": jnp.ones(3)}

    @functools.partial(jax.jit, donate_argnums=0)
    def step(states, x):
        return {**states, "norm": jbn.batch_norm(params, states["norm"], x, True)[1]}

    x = rng.normal(size=(8, 3)).astype(np.float32)
    found = jbn.calibrate(step, {key: states[key] for key in ("norm", "frozen")}, [x, x], select="norm".__eq__)
    jax.tree.map(np.asarray, (states, found))


def test_results_are_where_the_state_was(rng):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    x = jax.device_put(
        rng.normal(size=(16, 3)).astype(np.float32), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    )
    params, state = jbn.init(3)
    step = jax.jit(lambda state, x: jbn.batch_norm(params, state, x, True)[1])
    found = jbn.calibrate(step, jax.device_put(state, everywhere), [x])
    assert found.mean.sharding == everywhere
    assert_within(found, *reference.batch_norm(np.asarray(x))[1:3])
    assert not jbn.calibrate(step, state, [np.asarray(x)]).mean.committed


def test_float64_is_kept(x64, rng):
    x = rng.normal(size=(16, 3)) + 1e6
    params, state = jbn.init(3, "float64")
    step = jax.jit(lambda state, x: jbn.batch_norm(params, state, x, True)[1])
    found = jbn.calibrate(step, state, cut(x, [3, 13]))
    expected = reference.batch_norm(x)
    assert found.var.dtype == jnp.float64
    assert_close(found.mean, expected.mean, "float64")
    assert_close(found.var, expected.var, "float64", condition=1e6)


def identity(state, x):
    return state


X = np.ones((4, 3), np.float32)
STATE = jbn.init(3)[1]
REFUSED = {
    "no statistics": ((identity, {"a": X}, [X]), {}, ValueError, "`state` holds no statistics"),
    "no batches": ((identity, STATE, []), {}, ValueError, "`batches` gave no batch of a weight above 0"),
    "batches": ((identity, STATE, 3), {}, TypeError, "`batches` is a int: expected an iterable"),
    "step": ((None, STATE, [X]), {}, TypeError, "`step` is None: expected a function of (state, batch)"),
    "weights": ((identity, STATE, [X], 3), {}, TypeError, "`weights` is 3: expected a function of batch"),
    "select": ((identity, STATE, [X]), {"select": "a"}, TypeError, "`select` is 'a': expected a function of path"),
    "nothing selected": (
        (identity, {"a": STATE}, [X]),
        {"select": lambda path: False},
        ValueError,
        "`select` selects none of the 1 nodes with statistics: a",
    ),
    "negative weight": ((identity, STATE, [X], lambda x: -1), {}, ValueError, "`weights` gives -1 for batch 0"),
    "weight of a kind": ((identity, STATE, [X], lambda x: "a"), {}, ValueError, "`weights` gives 'a' for batch 0"),
    "two sizes": ((identity, STATE, [(X, X[:2])]), {}, ValueError, "leading axes of sizes [2, 4]"),
    "no arrays": ((identity, STATE, [[3, 4]]), {}, ValueError, "number 0, without an array that has a leading axis"),
    "half precision": (
        (identity, {"a": STATE._replace(mean=STATE.mean.astype("bfloat16"))}, [X]),
        {},
        TypeError,
        "`state` has `mean` in bfloat16 at a: expected float32 or float64",
    ),
    "other tree": ((lambda s, x: {"b": s}, {"a": STATE}, [X]), {}, ValueError, "no statistics at a, but at b"),
    "no tree": ((lambda s, x: x, STATE, [X]), {}, ValueError, "the result of `step` holds no statistics"),
    "other shape": (
        (lambda s, x: jbn.init(2)[1], STATE, [X]),
        {},
        ValueError,
        "`step` gives `mean` of shape (2,) at (the tree itself): expected (3,)",
    ),
}


@pytest.mark.parametrize(("arguments", "options", "kind", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals(arguments, options, kind, message):
    with pytest.raises(kind) as error:
        jbn.calibrate(*arguments, **options)
    assert message in str(error.value)


def test_not_inside_jit():
    with pytest.raises(TypeError, match="`state` is traced"):
        jax.jit(lambda state: jbn.calibrate(identity, state, [X]))(STATE)
    with pytest.raises(TypeError, match="`batches` are traced"):
        jax.jit(
            lambda x: jbn.calibrate(lambda s, x: jbn.batch_norm(jbn.Params(None, None), s, x, True)[1], STATE, [x])
        )(X)


def test_hundreds_of_consequences_are_counted():
    params, state = jbn.init(3)
    states = {f"norm{number:03}": state for number in range(200)}

    def step(states, x):
        x = jbn.normalize(params, states["norm000"], x)
        found = {name: jbn.batch_norm(params, state, x, True)[1] for name, state in states.items()}
        return {**found, "norm000": states["norm000"]}

    with pytest.raises(ValueError, match="for 200 of 200 norms:\n  norm000 is left as it was") as error:
        jbn.calibrate(step, states, [X])
    assert "and 190 more" in str(error.value)
    assert len(str(error.value).splitlines()) == 12


def test_population_too_large_for_its_dtype():
    huge = np.array([[1e25], [1e25]], np.float32)
    params, state = jbn.init(1)
    step = jax.jit(lambda state, x: jbn.batch_norm(params, state, x, True)[1])
    with pytest.raises(ValueError, match=r"`var` of the population at .* is too large for float32"):
        jbn.calibrate(step, state, [huge, -huge])


def test_tqdm_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tqdm", None)
    with pytest.raises(ModuleNotFoundError, match="pip install tqdm"):
        jbn.calibrate(identity, STATE, [X], progress=True)


def test_the_demo_network_is_one_tree():
    _, state = model.init(jax.random.key(0))
    assert len(jbn.unset(state)) == 3
