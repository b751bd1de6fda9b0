"""Conversion from and to Keras, of variables written by hand and of a trained model."""

import jax.numpy as jnp
import numpy as np
import pytest
from support.compilation import compiled
from support.conversion import (
    assert_bit_equal,
    assert_predicts_and_trains,
    assert_same_prediction,
    drawn,
    network,
    positive,
)
from support.tolerances import allowed, assert_close

import jbn
from jbn.convert import from_keras, join, split

VECTORS = ("gamma", "beta", "moving_mean", "moving_variance")


@pytest.fixture
def variables(rng):
    """A network with the layout of `{v.path: v for v in model.variables}`; its second norm has no gamma."""
    return {
        "net/conv/kernel": drawn(rng, 3, 3, 3, 8),
        **{f"net/first/{name}": positive(rng, 8) for name in VECTORS},
        **{f"net/second/{name}": positive(rng, 6) for name in VECTORS[1:]},
        "net/dense/bias": drawn(rng, 4),
    }


def test_norms_of_variables_are_found_by_their_path(variables):
    norms, rest = split(variables, "keras", count=5)
    assert list(norms) == ["net/first", "net/second"]
    assert sorted(rest) == ["net/conv/kernel", "net/dense/bias"]
    assert norms["net/second"][0].scale is None
    assert all((state.count == 5).all() for _, state in norms.values())


def test_variables_come_back_bit_for_bit(variables):
    assert_bit_equal(join(*split(variables, "keras"), "keras"), variables)


def test_a_norm_predicts_and_trains_by_the_formulas_of_keras(rng, variables):
    norms, _ = split(variables, "keras")
    stored = [variables[f"net/first/{name}"] for name in VECTORS]
    options = {"momentum": 0.99, "feature_axis": -1, "epsilon": 1e-3}
    assert_predicts_and_trains(norms["net/first"], stored, drawn(rng, 5, 4, 3, 8), rule=(0.99, "biased"), **options)


def test_a_count_keeps_a_schedule_from_overwriting_what_was_loaded(rng):
    two = np.ones(2, np.float32)
    params, state = from_keras({"moving_mean": two * 5, "moving_variance": two}, count=99)
    x = drawn(rng, 16, 2)
    train = compiled(lambda state, x: jbn.batch_norm(params, state, x, True, momentum=jbn.momentum.cumulative())[1])
    new = train(state, x)
    np.testing.assert_allclose(new.mean, 0.99 * 5 + 0.01 * x.mean(0), rtol=allowed("float32"))


@pytest.fixture(scope="module")
def trained():
    """A Keras model after five steps of training, for tests that restore its variables."""
    import keras

    rng = np.random.default_rng(0)
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            keras.layers.Conv2D(8, 3),
            keras.layers.BatchNormalization(momentum=0.9, name="first"),
            keras.layers.ReLU(),
            keras.layers.Conv2D(6, 3, use_bias=False),
            keras.layers.BatchNormalization(momentum=0.9, name="second"),
            keras.layers.ReLU(),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(4),
        ],
        name="net",
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1), loss)
    for _ in range(5):
        model.train_on_batch(drawn(rng, 8, 8, 8, 3), np.arange(8) % 4)
    return model


def variables_of(model):
    return {variable.path: variable for variable in model.variables}


@pytest.mark.slow
@pytest.mark.needs("keras")
def test_keras_takes_what_comes_back(trained):
    variables = variables_of(trained)
    before = {path: np.asarray(variable) for path, variable in variables.items()}
    back = join(*split(variables, "keras"), "keras")
    assert_bit_equal(back, before)
    for path, variable in variables.items():
        variable.assign(back[path])


@pytest.mark.slow
@pytest.mark.needs("keras")
def test_a_model_trained_in_keras_predicts_and_trains_the_same(rng, trained):
    norms, rest = split(variables_of(trained), "keras", count=5)
    assert list(norms) == ["net/first", "net/second"]
    weights = [jnp.asarray(np.asarray(variable)) for variable in rest.values()]
    run = network(
        [(weights[0], weights[1]), (weights[2], None)],
        (weights[3], weights[4]),
        layout=("NHWC", "HWIO"),
        epsilon=1e-3,
        momentum=0.9,
    )
    x = drawn(rng, 8, 8, 8, 3)
    assert_same_prediction(run(norms.values(), x, False)[0], trained(x, training=False))
    trained(x, training=True)
    after, _ = split(variables_of(trained), "keras")
    for state, (_, expected) in zip(run(norms.values(), x, True)[1], after.values(), strict=True):
        assert (state.count == 6).all()
        assert_close(state.mean, expected.mean, condition=10)
        assert_close(state.var, expected.var, condition=10)
