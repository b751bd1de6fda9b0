"""Every refusal: its type, and a message with the argument, what it got and what is allowed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbn

X = np.ones((8, 16, 3), np.float32)


def call(x=X, train=True, params=None, state=None, **options):
    made = jbn.init(3)
    params, state = made[0] if params is None else params, made[1] if state is None else state
    return jbn.batch_norm(params, state, x, train, **options)


def with_state(**fields):
    return {"state": jbn.init(3)[1]._replace(**fields)}


REFUSED = {
    "integer x": (dict(x=np.ones((8, 3), np.int32)), TypeError, ["`x` has dtype int32", "float32", "astype"]),
    "complex x": (dict(x=np.ones((8, 3), np.complex64)), TypeError, ["`x` has dtype complex64", "x.real and x.imag"]),
    "mask a text": (dict(mask="abc"), TypeError, ["`mask` is a str that makes no array"]),
    "float8 x": (dict(x=np.ones((8, 3), jnp.float8_e5m2)), TypeError, ["`x` has dtype float8_e5m2"]),
    "bool x": (dict(x=np.ones((8, 3), bool)), TypeError, ["`x` has dtype bool"]),
    "features of x": (dict(x=np.ones((8, 4), np.float32)), ValueError, ["`params.scale`", "(3,)", "(8, 4)", "(4,)"]),
    "features of the state": (with_state(mean=jnp.zeros(4)), ValueError, ["`state.mean` has shape (4,)", "(3,)"]),
    "features of var": (with_state(var=jnp.zeros((1, 3))), ValueError, ["`state.var` has shape (1, 3)", "(3,)"]),
    "features of the bias": (
        dict(params=jbn.Params(None, jnp.zeros(2))),
        ValueError,
        ["`params.bias` has shape (2,)", "jbn.init((3,))"],
    ),
    "integer params": (dict(params=jbn.Params(jnp.ones(3, int), None)), TypeError, ["`params.scale` has dtype int32"]),
    "params that are none": (dict(params={"scale": 1}), TypeError, ["`params` is a dict", "jbn.Params(scale, bias)"]),
    "swapped": (
        dict(params=jbn.init(3)[1], state=jbn.init(3)[0]),
        TypeError,
        ["`params` is a State", "expected jbn.Params"],
    ),
    "half-precision mean": (with_state(mean=jnp.zeros(3, jnp.bfloat16)), TypeError, ["`state.mean.dtype` is bfloat16"]),
    "half-precision var": (with_state(var=jnp.zeros(3, jnp.float16)), TypeError, ["`state.var.dtype` is float16"]),
    "float mask": (dict(mask=np.ones((8, 16), np.float32)), TypeError, ["`mask` has dtype float32", "astype(bool)"]),
    "mask of another shape": (
        dict(mask=np.ones((8, 3), bool)),
        ValueError,
        ["`mask` has shape (8, 3)", "(8, 16, 3)", "expected (8, 16)", "(8, 16, 1)"],
    ),
    "mask of channels": (dict(mask=np.ones(3, bool)), ValueError, ["`mask` has shape (3,)", "(8, 16)"]),
    "mask of examples": (dict(mask=np.ones(8, bool)), ValueError, ["`mask` has shape (8,)", "(8, 16)"]),
    "mask of x": (dict(mask=np.ones((8, 16, 3), bool)), ValueError, ["`mask` has shape (8, 16, 3)", "(8, 16, 1)"]),
    "mask of channels in a matrix": (
        dict(x=np.ones((8, 3), np.float32), mask=np.ones(3, bool)),
        ValueError,
        ["`mask` has shape (3,)", "(8,)", "(8, 1)"],
    ),
    "axis out of range": (dict(feature_axis=3), ValueError, ["`feature_axis` 3 is out of range", "-3 to 2"]),
    "axis twice": (dict(feature_axis=(2, -1)), ValueError, ["`feature_axis` (2, -1)", "twice"]),
    "axis no int": (dict(feature_axis=1.0), TypeError, ["`feature_axis` is 1.0", "int"]),
    "axis a name": (dict(feature_axis="channels"), TypeError, ["`feature_axis` is 'channels'"]),
    "nothing to reduce": (
        dict(x=np.ones(3, np.float32)),
        ValueError,
        ["`x` has shape (3,)", "batch axis", "`axis_name`"],
    ),
    "epsilon 0": (dict(epsilon=0.0), ValueError, ["`epsilon` is 0.0", "1e-5"]),
    "epsilon below float32": (dict(epsilon=1e-50), ValueError, ["`epsilon` is 1e-50"]),
    "epsilon negative": (dict(epsilon=-1e-5), ValueError, ["`epsilon` is -1e-05"]),
    "epsilon nan": (dict(epsilon=float("nan")), ValueError, ["`epsilon` is nan"]),
    "epsilon infinite": (dict(epsilon=float("inf")), ValueError, ["`epsilon` is inf"]),
    "epsilon text": (dict(epsilon="small"), TypeError, ["`epsilon` is 'small'"]),
    "momentum above 1": (dict(momentum=1.01), ValueError, ["`momentum` is 1.01", "[0, 1]", "from_torch"]),
    "momentum negative": (dict(momentum=-0.1), ValueError, ["`momentum` is -0.1"]),
    "momentum none": (dict(momentum=None), TypeError, ["`momentum` is None", "warmup"]),
    "momentum of channels": (dict(momentum=lambda count: jnp.ones(3)), TypeError, ["`momentum` gives Array([1"]),
    "momentum of nothing": (dict(momentum=lambda count: None), TypeError, ["`momentum` gives None", "scalar"]),
    "momentum uncalled": (dict(momentum=jbn.momentum.warmup), TypeError, ["jbn.momentum.warmup itself", "call it"]),
    "momentum uncalled, no arguments": (dict(momentum=jbn.momentum.cumulative), TypeError, ["cumulative itself"]),
    "momentum text": (dict(momentum="0.9"), TypeError, ["`momentum` is '0.9'"]),
    "ghost size": (dict(ghost_batch_size=3), ValueError, ["`ghost_batch_size` is 3", "8 examples", "divisor of 8"]),
    "ghost size 0": (dict(ghost_batch_size=0), ValueError, ["`ghost_batch_size` is 0"]),
    "ghost size a float": (dict(ghost_batch_size=2.0), TypeError, ["`ghost_batch_size` is 2.0"]),
    "ghost batches of features": (
        dict(x=np.ones((3, 8), np.float32), feature_axis=0, ghost_batch_size=1),
        ValueError,
        ["`ghost_batch_size`", "first axis"],
    ),
    "x none": (dict(x=None), TypeError, ["`x` is a NoneType", "float32"]),
    "x text": (dict(x="abc"), TypeError, ["`x` is a str"]),
    "x ragged": (dict(x=[[1.0], [1.0, 2.0]]), TypeError, ["`x` is a list", "float32"]),
    "x a scalar": (dict(x=np.float32(1)), ValueError, ["`feature_axis` -1", "a scalar has no features"]),
    "list of params": (dict(params=jbn.Params([1.0], None)), TypeError, ["`params.scale` is [1.0]", "(3,)"]),
    "mean none": (with_state(mean=None), TypeError, ["`state.mean` is None", "array of shape (3,)"]),
    "count none": (with_state(count=None), TypeError, ["`state.count` is None", "shape ()"]),
    "count of channels": (with_state(count=jnp.zeros(3, jnp.int32)), ValueError, ["`state.count` has shape (3,)"]),
    "epsilon above float32": (dict(epsilon=1e39), ValueError, ["`epsilon` is 1e+39"]),
    "epsilon none": (dict(epsilon=None), TypeError, ["`epsilon` is None", "1e-5"]),
    "epsilon of channels": (dict(epsilon=np.full(3, 1e-5)), TypeError, ["`epsilon` is array", "number"]),
    "dtype text": (dict(dtype="foo"), TypeError, ["`dtype` is 'foo'", "bfloat16"]),
    "activation text": (dict(activation="relu"), TypeError, ["`activation` is 'relu'", "jax.nn.relu"]),
    "activation of numpy": (dict(activation=np.tanh), TypeError, ["`activation` is <ufunc 'tanh'>", "jax"]),
    "axis_name a number": (dict(axis_name=0), TypeError, ["`axis_name` is 0", "name of a mapped axis"]),
    "running_var": (dict(running_var="unbias"), ValueError, ["`running_var` is 'unbias'", "'unbiased'", "'total'"]),
    "activation that reduces": (dict(activation=jnp.sum), ValueError, ["`activation` turns float32[8, 16, 3]", "relu"]),
    "activation to integers": (dict(activation=jnp.isfinite), ValueError, ["`activation`", "bool"]),
    "activation of two": (dict(activation=lambda y: (y, y)), ValueError, ["`activation`"]),
    "dtype": (dict(dtype=jnp.int8), TypeError, ["`dtype` is int8", "bfloat16"]),
    "train a number": (dict(train=1), TypeError, ["`train` is 1", "True"]),
    "axis_name a dict": (dict(axis_name={}), TypeError, ["`axis_name` is {}", "tuple of names"]),
    "groups without an axis": (
        dict(axis_index_groups=[[0]]),
        ValueError,
        ["`axis_index_groups`", "`axis_name` is None"],
    ),
    "groups on two axes": (
        dict(axis_name=("a", "b"), axis_index_groups=[[0]]),
        ValueError,
        ["`axis_index_groups` needs one axis name", "('a', 'b')"],
    ),
    "groups that overlap": (
        dict(axis_name="a", axis_index_groups=[[0, 1], [1]]),
        ValueError,
        ["`axis_index_groups` is [[0, 1], [1]]", "each place once"],
    ),
    "groups that are a list": (
        dict(axis_name="a", axis_index_groups=[0, 1]),
        TypeError,
        ["`axis_index_groups` is [0, 1]", "[[0, 1], [2, 3]]"],
    ),
    "unbound axis": (dict(axis_name="devices"), NameError, ["`axis_name` is 'devices'", "shard_map", "vmap"]),
}


@pytest.mark.parametrize(("arguments", "error", "words"), REFUSED.values(), ids=REFUSED)
def test_refusals_of_batch_norm(arguments, error, words):
    with pytest.raises(error) as caught:
        call(**arguments)
    for word in words:
        assert word in str(caught.value)


TRAINING_ONLY = (
    "nothing to reduce",
    "momentum of",
    "momentum uncalled",
    "ghost",
    "unbound axis",
    "axis_name",
    "groups",
    "train",
)


@pytest.mark.parametrize("name", [name for name in REFUSED if not name.startswith(TRAINING_ONLY)])
def test_inference_refuses_the_same(name):
    arguments, error, words = REFUSED[name]
    with pytest.raises(error) as caught:
        call(**{"train": False, **arguments})
    assert words[0] in str(caught.value)


def test_traced_train():
    with pytest.raises(TypeError, match=r"`train` is traced.*static_argnames"):
        jax.jit(lambda train: call(train=train))(True)


def test_traced_epsilon():
    with pytest.raises(TypeError, match=r"`epsilon` is traced: expected a Python number"):
        jax.jit(lambda epsilon: call(epsilon=epsilon))(1e-5)


@pytest.mark.parametrize(
    ("features", "error", "message"),
    [(2.0, TypeError, "`features` is 2.0"), ("ab", TypeError, "`features`"), ((3, -1), ValueError, "at least 0")],
)
def test_refusals_of_init(features, error, message):
    with pytest.raises(error, match=message):
        jbn.init(features)


def test_init_refuses_half_precision():
    with pytest.raises(TypeError, match="`dtype` is bfloat16: expected float32 or float64"):
        jbn.init(3, jnp.bfloat16)


def test_ghost_batches_need_a_known_batch():
    spec = jax.ShapeDtypeStruct((*jax.export.symbolic_shape("b"), 3), jnp.float32)
    with pytest.raises(ValueError, match="`ghost_batch_size` needs a batch of known size"):
        jax.export.export(jax.jit(lambda x: call(x=x, ghost_batch_size=2)))(spec)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda m, s: (m, s), "`state` is a Moments: expected jbn.State"),
        (lambda m, s: (s, None), "`moments` is a NoneType: expected jbn.Moments"),
        (lambda m, s: (s, s), "`moments` is a State: expected jbn.Moments"),
    ],
)
def test_refusals_of_update(arguments, message):
    with pytest.raises(TypeError, match=message):
        jbn.update(*arguments(jbn.moments(X), jbn.init(3)[1]))


@pytest.mark.parametrize("train", [True, np.True_, False, np.False_])
def test_allowed_values_of_train(train):
    assert call(train=train)[0].shape == X.shape


@pytest.mark.parametrize("epsilon", [1, 1e-5, np.float32(1e-5), np.array(1e-5), jnp.float32(1e-5)])
def test_allowed_values_of_epsilon(epsilon):
    assert call(epsilon=epsilon)[0].shape == X.shape


@pytest.mark.parametrize("momentum", [0, 1, 0.5, np.float64(0.5), jnp.float32(0.5), True])
def test_allowed_values_of_momentum(momentum):
    assert int(call(momentum=momentum)[1].count) == 1
