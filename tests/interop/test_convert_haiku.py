"""Conversion from Haiku, of params and state written by hand and of a trained model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import reference
from support.compilation import compiled
from support.conversion import assert_same_prediction, drawn, network, positive
from support.refusals import Refused, assert_refused
from support.tolerances import assert_close

import jbn
from jbn.convert import from_haiku, split

TWO = np.ones(2, np.float32)
AVERAGE = {"average": TWO[None], "counter": 3}
DECAY = 0.9


def average(values):
    """The state of `hk.ExponentialMovingAverage` after these values: an average from 0, divided by its weights."""
    hidden = 0.0
    for value in values:
        hidden = DECAY * hidden + (1 - DECAY) * np.asarray(value, np.float64)
    weight = 1 - DECAY ** len(values)
    arrays = {"hidden": np.float32(hidden), "average": np.float32(hidden / weight)}
    return {"counter": np.int32(len(values)), **{name: array[None, None, None] for name, array in arrays.items()}}


def test_a_norm_predicts_and_goes_on_training_by_the_formulas_of_haiku(rng):
    """Vectors have the rank of the input, with size 1 for each reduced axis."""
    batches = [reference.batch_norm(drawn(rng, 5, 4, 3, 8)) for _ in range(3)]
    x = drawn(rng, 5, 4, 3, 8)
    scale, offset = positive(rng, 1, 1, 1, 8), drawn(rng, 1, 1, 1, 8)
    params = {"net/norm": {"scale": scale, "offset": offset}, "net/conv": {"w": drawn(rng, 3, 3)}}
    averages = {"mean": [batch.mean for batch in batches], "var": [batch.var for batch in batches]}
    state = {f"net/norm/~/{name}_ema": average(values) for name, values in averages.items()}
    norms, (rest, others) = split((params, state), "haiku")
    assert list(norms) == ["net/norm"]
    assert (list(rest), others) == (["net/conv"], {})
    assert norms["net/norm"][0].scale.shape == (8,)
    assert (norms["net/norm"][1].count == 3).all()

    @compiled
    def predict_and_train(norm, x):
        return jbn.normalize(*norm, x), jbn.batch_norm(*norm, x, True, momentum=jbn.momentum.debiased(DECAY))[1]

    out, after = predict_and_train(norms["net/norm"], x)
    mean, var = (np.squeeze(state[f"net/norm/~/{name}_ema"]["average"]) for name in ("mean", "var"))
    assert_same_prediction(out, reference.inference(x, mean, var, np.squeeze(scale), np.squeeze(offset)))
    batch = reference.batch_norm(x)
    for name in ("mean", "var"):
        expected = average([*averages[name], getattr(batch, name)])["average"]
        assert_close(getattr(after, name), np.squeeze(expected), condition=10)


def test_a_norm_of_one_feature_keeps_its_axis():
    one = {"average": np.ones((1, 1), np.float32), "counter": 1}
    _, state = from_haiku({"mean_ema": one, "var_ema": one})
    assert state.mean.shape == (1,)


def test_entries_of_other_haiku_modules_are_left_alone():
    state = {"net/~/counter": {"count": 3}, "net/norm/~/mean_ema": AVERAGE, "net/norm/~/var_ema": AVERAGE}
    norms, (params, others) = split(({"net/norm": {"scale": TWO}}, state), "haiku")
    assert list(norms) == ["net/norm"]
    assert (params, list(others)) == ({}, ["net/~/counter"])


def test_one_error_lists_the_haiku_entries_that_are_wrong():
    wrong = {"mean_ema": AVERAGE, "var_ema": {"hidden": TWO}, "scale": "heavy"}
    with pytest.raises(ValueError, match="not those of a batch norm in Haiku") as caught:
        from_haiku(wrong)
    for message in ("`var_ema.average` is missing", "`scale` is a str, which cannot be converted to an array"):
        assert message in str(caught.value)


REFUSED = {
    "no entries": Refused(
        lambda: from_haiku(None), TypeError, "entries", "is a NoneType", "with mean_ema and var_ema, as in"
    ),
    "no averages": Refused(
        lambda: from_haiku({"mean_ema": TWO}), TypeError, "entries['mean_ema']", "a ndarray", "hidden, average"
    ),
    "no pair": Refused(lambda: split({}, "haiku"), TypeError, "tree", "is a dict", "the pair (params, state)"),
    "no params": Refused(lambda: split((None, {}), "haiku"), TypeError, "params", "is a NoneType", "a mapping, in the"),
    "no state": Refused(lambda: split(({}, None), "haiku"), TypeError, "state", "is a NoneType", "a mapping, in the"),
}


def test_what_is_no_haiku_norm_is_refused():
    assert_refused(REFUSED)


@pytest.mark.needs("haiku")
def test_a_model_trained_in_haiku_predicts_and_trains_the_same(rng):
    import haiku as hk

    def forward(x, train):
        x = hk.Conv2D(8, 3, padding="VALID", name="conv1")(x)
        x = jax.nn.relu(hk.BatchNorm(True, True, DECAY, name="norm1")(x, train))
        x = hk.Conv2D(6, 3, padding="VALID", with_bias=False, name="conv2")(x)
        x = jax.nn.relu(hk.BatchNorm(True, True, DECAY, name="norm2")(x, train))
        return hk.Linear(4, name="dense")(x.mean((1, 2)))

    model = hk.without_apply_rng(hk.transform_with_state(forward))
    apply = compiled(model.apply, static_argnums=3)

    @compiled
    def step(params, state, x):
        def loss(params):
            out, new_state = model.apply(params, state, x, True)
            return jnp.mean(out**2), new_state

        gradient, state = jax.grad(loss, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient), state

    params, state = compiled(model.init, static_argnums=2)(jax.random.key(0), drawn(rng, 8, 8, 8, 3), True)
    for _ in range(5):
        params, state = step(params, state, drawn(rng, 8, 8, 8, 3))
    norms, (rest, others) = split((params, state), "haiku")
    assert others == {}
    assert sorted(rest) == ["conv1", "conv2", "dense"]
    run = network(
        [(rest["conv1"]["w"], rest["conv1"]["b"]), (rest["conv2"]["w"], None)],
        (rest["dense"]["w"], rest["dense"]["b"]),
        layout=("NHWC", "HWIO"),
        momentum=jbn.momentum.debiased(DECAY),
    )
    x = drawn(rng, 8, 8, 8, 3)
    assert_same_prediction(run(norms.values(), x, False)[0], apply(params, state, x, False)[0])
    _, state = apply(params, state, x, True)
    after = split((params, state), "haiku")[0].values()
    for ours, (_, expected) in zip(run(norms.values(), x, True)[1], after, strict=True):
        assert (ours.count == 6).all() and (expected.count == 6).all()
        # Haiku computes E[x^2] - E[x]^2, which amplifies rounding by the ratio of its second term to the variance.
        condition = 1 + float(jnp.max(jnp.square(expected.mean) / expected.var))
        assert_close(ours.mean, expected.mean, condition=10)
        assert_close(ours.var, expected.var, condition=10 * condition)


@pytest.mark.needs("haiku")
def test_a_haiku_model_that_was_only_initialized_predicts_the_same(rng):
    """Haiku's averages are then the moments of the first batch, and inference uses them."""
    import haiku as hk

    model = hk.without_apply_rng(hk.transform_with_state(lambda x, train: hk.BatchNorm(True, True, DECAY)(x, train)))
    x = drawn(rng, 8, 5)

    @compiled
    def initialize_and_predict(x):
        variables = model.init(jax.random.key(0), x, True)
        return variables, model.apply(*variables, x, False)[0]

    variables, expected = initialize_and_predict(x)
    norms, _ = split(variables, "haiku")
    assert_same_prediction(jbn.normalize(*norms["batch_norm"], x), expected)
    assert (norms["batch_norm"][1].count == 0).all()
