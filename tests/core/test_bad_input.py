"""Bad input of batch_norm, normalize and moments: the error names the argument, what it got, and how to fix it.

Masks, ghost batches, momentum, bounds of batch renormalization and sharing are tested in files of their own. Each call
fails in the same way in training, at inference (if it takes the argument), and on traced arrays.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from support.refusals import Refused, assert_refused, jitted, partly

import jbn

X = np.ones((8, 16, 3), np.float32)
MATRIX = np.ones((8, 3), np.float32)
PARAMS, STATE = jbn.init(3)
HALF = jbn.State(jnp.zeros(3, jnp.bfloat16), jnp.ones(3, jnp.bfloat16), jnp.zeros(3))
STACKED = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), STATE)
KEY = jax.random.key(0)
STRUCT = jax.ShapeDtypeStruct((3,), jnp.float32)
OBJECTS = np.array([1.0, None, 2.0])
norm = partly(jbn.batch_norm, params=PARAMS, state=STATE, x=X, train=True)
normalize = partly(jbn.normalize, params=PARAMS, state=STATE, x=X)
moments = partly(jbn.moments, x=X)

INPUT = {
    "integers": Refused(norm(x=np.ones((8, 3), np.int32)), TypeError, "x", "int32", "x.astype(jnp.float32)"),
    "bool": Refused(norm(x=np.ones((8, 3), bool)), TypeError, "x", "has dtype bool", "x.astype(jnp.float32)"),
    "float8": Refused(norm(x=np.ones((8, 3), jnp.float8_e5m2)), TypeError, "x", "float8_e5m2", "x.astype(jnp.float32)"),
    "keys": Refused(norm(x=jax.random.split(KEY, (8, 3))), TypeError, "x", "key<fry>", "expected one of float32"),
    "a dict": Refused(
        moments(x={"a": X}), TypeError, "x", "a dict, which cannot be converted", "expected one of float32"
    ),
    "objects": Refused(norm(x=OBJECTS), TypeError, "x", "a ndarray, of dtype object", "expected one of float32"),
    "ragged": Refused(
        norm(x=[[1.0], [1.0, 2.0]]), TypeError, "x", "a list, which cannot be converted", "expected one of float32"
    ),
    "a shape": Refused(
        moments(x=STRUCT), TypeError, "x", "a ShapeDtypeStruct, which cannot", "expected one of float32"
    ),
    "a state": Refused(norm(x=STATE), TypeError, "x", "a State", "expected one of float32"),
    "a scalar": Refused(
        norm(x=np.float32(1)),
        ValueError,
        "feature_axis",
        "-1 is out of range for x of 0 dimensions",
        "at least one axis",
    ),
    "nothing to reduce": Refused(norm(x=np.ones(3, np.float32)), ValueError, "x", "shape (3,)", "Add a batch axis"),
    "no features either": Refused(
        norm(params=jbn.init(0)[0], state=jbn.init(0)[1], x=jnp.zeros(0)),
        ValueError,
        "x",
        "shape (0,)",
        "Add a batch axis",
    ),
    "moments of a row": Refused(moments(x=MATRIX[0]), ValueError, "x", "shape (3,)", "a mapped axis with `axis_name`"),
    "axis out of range": Refused(
        norm(feature_axis=3), ValueError, "feature_axis", "3 is out of range", "expected -3 to 2"
    ),
    "axis far out": Refused(
        norm(feature_axis=-(10**30)), ValueError, "feature_axis", "out of range", "expected -3 to 2"
    ),
    "axis twice": Refused(norm(feature_axis=(2, -1)), ValueError, "feature_axis", "(2, -1) names an", "name it once"),
    "axis a float": Refused(norm(feature_axis=1.0), TypeError, "feature_axis", "is 1.0", "an int or a sequence"),
    "axis a flag": Refused(norm(feature_axis=True), TypeError, "feature_axis", "is True", "an int or a sequence"),
    "axis an array without axes": Refused(
        moments(feature_axis=np.array(1)), TypeError, "feature_axis", "is array(1)", "an int or a sequence"
    ),
}

PARAMS_AND_STATE = {
    "swapped": Refused(norm(params=STATE, state=PARAMS), TypeError, "params", "is a State", "jbn.Params(scale, bias)"),
    "x and state swapped": Refused(
        norm(x=STATE, state=MATRIX), TypeError, "state", "is a ndarray", "jbn.State(mean, var, count)"
    ),
    "x first": Refused(norm(params=X, state=PARAMS, x=MATRIX), TypeError, "params", "is a ndarray", "jbn.Params"),
    "state a pair": Refused(norm(state=(PARAMS, STATE)), TypeError, "state", "a tuple", "jbn.State(mean, var, count)"),
    "features of x": Refused(
        norm(x=np.ones((8, 4), np.float32)), ValueError, "params.scale", "shape (3,)", "Create it with jbn.init((4,))"
    ),
    "features of bias": Refused(
        norm(params=jbn.Params(None, np.zeros(2, np.float32))), ValueError, "params.bias", "shape (2,)", "expected (3,)"
    ),
    "features of the mean": Refused(
        normalize(state=STATE._replace(mean=jnp.zeros(4))), ValueError, "state.mean", "shape (4,)", "expected (3,)"
    ),
    "features of the variance": Refused(
        norm(state=STATE._replace(var=jnp.zeros((1, 3)))), ValueError, "state.var", "shape (1, 3)", "expected (3,)"
    ),
    "a stacked state": Refused(
        norm(state=STACKED), ValueError, "state.mean", "has shape (2, 3)", "expected (3,), the features of x"
    ),
    "scale a list": Refused(
        norm(params=jbn.Params([1.0], None)),
        TypeError,
        "params.scale",
        "is [1.0]",
        "numeric array of NumPy or JAX, of shape (3,)",
    ),
    "scale of objects": Refused(
        norm(params=jbn.Params(OBJECTS, None)),
        TypeError,
        "params.scale",
        "is a numpy.ndarray of shape (3,)",
        "a numeric array",
    ),
    "scale of keys": Refused(
        norm(params=jbn.Params(jax.random.split(KEY, 3), None)),
        TypeError,
        "params.scale",
        "is a jax.PRNGKeyArray",
        "numeric array",
    ),
    "scale of integers": Refused(
        norm(params=jbn.Params(np.ones(3, np.int32), None)), TypeError, "params.scale", "int32", "a float dtype"
    ),
    "mean None": Refused(norm(state=STATE._replace(mean=None)), TypeError, "state.mean", "is None", "a numeric array"),
    "count a list": Refused(
        norm(state=STATE._replace(count=[0.0] * 3)),
        TypeError,
        "state.count",
        "is [0.0, 0.0, 0.0]",
        "array of NumPy or JAX, of shape (3,)",
    ),
    "count of 0.1": Refused(
        norm(state=STATE._replace(count=jnp.int32(7))),
        ValueError,
        "state.count",
        "shape (): expected (3,)",
        "jbn.upgrade(tree)",
    ),
    "count of integers": Refused(
        norm(state=STATE._replace(count=jnp.zeros(3, jnp.int32))), TypeError, "state.count", "int32", "a float dtype"
    ),
}

HALF_PRECISION = {
    "mean": Refused(norm(state=HALF), TypeError, "state.mean.dtype", "is bfloat16", "Convert it with `.astype`"),
    "var": Refused(
        norm(state=HALF._replace(mean=STATE.mean)), TypeError, "state.var.dtype", "is bfloat16", "expected float32"
    ),
    "count": Refused(
        norm(state=STATE._replace(count=jnp.zeros(3, jnp.float16))),
        TypeError,
        "state.count.dtype",
        "is float16",
        "expected float32",
    ),
}

SHORTCUT = {
    "another shape": Refused(
        norm(shortcut=MATRIX), ValueError, "shortcut", "has shape (8, 3), but x has (8, 16, 3)", "Project it first"
    ),
    "a shape that broadcasts": Refused(
        norm(shortcut=X[:1]), ValueError, "shortcut", "has shape (1, 16, 3)", "expected the same shape"
    ),
    "integers": Refused(
        norm(shortcut=np.ones(X.shape, np.int32)), TypeError, "shortcut", "has dtype int32", "expected one of float32"
    ),
    "a list": Refused(norm(shortcut=[1.0]), TypeError, "shortcut", "is [1.0]", "with the shape of x, (8, 16, 3)"),
    "complex": Refused(norm(shortcut=X.astype(np.complex64)), TypeError, "shortcut", "has dtype complex64", "float32,"),
    "a state": Refused(norm(shortcut=STATE), TypeError, "shortcut", "is a jbn.State", "with the shape of x"),
}


class Unhashable:
    """An activation with __eq__ but no __hash__, like a dataclass that is not frozen."""

    def __call__(self, y):
        return y

    def __eq__(self, other):
        return isinstance(other, Unhashable)


class Leaky:
    """Its method compares and hashes equal, even after `slope` has changed."""

    def activation(self, y):
        return jnp.where(y > 0, y, y * self.slope)

    @classmethod
    def called(cls, call, *slopes):
        """The output for the last of these slopes, after calls with the others."""
        leaky = cls()
        for leaky.slope in slopes:
            out = call(activation=leaky.activation)()
        return out[0]


def prelu(call, slope):
    """The call with an activation that captures a slope."""
    return call(activation=lambda y: jnp.where(y > 0, y, y * slope))()


OPTIONS = {
    "train a number": Refused(norm(train=1), TypeError, "train", "is 1", "True (batch statistics) or False (running"),
    "train x": Refused(norm(train=X), TypeError, "train", "is array([[[1., ", "expected True (batch statistics)"),
    "train traced": Refused(
        jitted(norm(), train=True), TypeError, "train", "is traced", "jax.jit(..., static_argnames='train')"
    ),
    "epsilon 0": Refused(norm(epsilon=0.0), ValueError, "epsilon", "is 0.0", "a positive number that float32 can hold"),
    "epsilon negative": Refused(norm(epsilon=-1e-5), ValueError, "epsilon", "is -1e-05", "a positive number"),
    "epsilon too large": Refused(norm(epsilon=1e39), ValueError, "epsilon", "is 1e+39", "that float32 can hold"),
    "epsilon nan": Refused(normalize(epsilon=float("nan")), ValueError, "epsilon", "is nan", "a positive number"),
    "epsilon infinite": Refused(norm(epsilon=float("inf")), ValueError, "epsilon", "is inf", "that float32 can hold"),
    "epsilon too small": Refused(norm(epsilon=1e-50), ValueError, "epsilon", "is 1e-50", "that float32 can hold"),
    "epsilon a text": Refused(norm(epsilon="small"), TypeError, "epsilon", "is 'small'", "expected a number such as"),
    "epsilon of channels": Refused(
        norm(epsilon=np.full(3, 1e-5)), TypeError, "epsilon", "is array([1.e-05", "a number"
    ),
    "epsilon a key": Refused(norm(epsilon=KEY), TypeError, "epsilon", "key<fry>", "expected a number such as 1e-5"),
    "epsilon traced": Refused(
        jitted(norm(), epsilon=1e-5), TypeError, "epsilon", "is traced", "a Python number such as 1e-5, bound before"
    ),
    "running_var": Refused(
        norm(running_var="unbias"), ValueError, "running_var", "is 'unbias'", "one of 'biased', 'unbiased', 'total'"
    ),
    "running_var the variance": Refused(
        norm(running_var=np.ones(3, np.float32)), ValueError, "running_var", "is array([1., 1., 1.]", "'biased'"
    ),
    "dtype": Refused(norm(dtype=jnp.int8), TypeError, "dtype", "is int8", "expected one of float32, float64, bfloat16"),
    "dtype a text": Refused(normalize(dtype="foo"), TypeError, "dtype", "is 'foo'", "expected one of float32"),
    "activation a text": Refused(norm(activation="relu"), TypeError, "activation", "is 'relu'", "jax.nn.relu"),
    "activation of NumPy": Refused(
        norm(activation=np.tanh), TypeError, "activation", "<ufunc 'tanh'>", "elementwise JAX function"
    ),
    "activation of Python": Refused(
        normalize(activation=lambda y: max(y, 0)),
        TypeError,
        "activation",
        "is <function",
        "an elementwise JAX function",
    ),
    "activation of nothing": Refused(norm(activation=lambda: 0), TypeError, "activation", "takes 0", "elementwise"),
    "activation that reduces": Refused(
        norm(activation=jnp.sum), ValueError, "activation", "turns float32[8, 16, 3] into", "array of the same shape"
    ),
    "activation to booleans": Refused(
        norm(activation=jnp.isfinite), ValueError, "activation", "dtype=bool", "returns a float array"
    ),
    "activation that captures what is traced": Refused(
        lambda: jax.grad(lambda slope: prelu(norm, slope)[0].sum())(0.1),
        ValueError,
        "activation",
        "captures a traced float32[]",
        "Pass an array to be added as `shortcut`, or apply the activation to the result",
    ),
    "activation without a hash": Refused(
        norm(activation=Unhashable()),
        TypeError,
        "activation",
        "which is not hashable",
        "apply it to the result instead",
    ),
    "activation of an object that has changed": Refused(
        lambda: jax.grad(lambda slope: Leaky.called(norm, 0.1, slope).sum())(0.1),
        ValueError,
        "activation",
        "captures a traced float32[]",
        "apply the activation to the result",
    ),
    "activation to a pair": Refused(
        norm(activation=lambda y: (y, y)), ValueError, "activation", "(Shape", "jax.nn.relu"
    ),
}


def test_what_is_no_input_or_feature_axis_is_refused():
    assert_refused(INPUT, also_traced=True)


def test_params_and_state_of_another_kind_shape_or_dtype_are_refused():
    assert_refused(PARAMS_AND_STATE, also_traced=True)


def test_statistics_in_half_precision_are_refused_in_training():
    assert_refused(HALF_PRECISION, also_traced=True)


def test_shortcuts_of_another_kind_shape_or_dtype_are_refused():
    assert_refused(SHORTCUT, also_traced=True)


def test_bad_train_epsilon_running_var_dtype_and_activation_are_refused():
    assert_refused(OPTIONS, also_traced=True)


OF_TRAINING = ("nothing to reduce", "no features either", "train", "running_var")


def test_an_object_that_has_changed_computes_anew():
    """As an activation and as a schedule. By its hash, jit would find the program from before the change."""

    class Constant:
        def __call__(self, count):
            return self.momentum

    expected = norm(activation=lambda y: jnp.where(y > 0, y, y * 0.5))()[0]
    np.testing.assert_array_equal(Leaky.called(norm, 0.1, 0.5), expected)
    by_parts = functools.partial(Leaky.called, lambda activation: norm(activation=functools.partial(activation)))
    np.testing.assert_array_equal(by_parts(0.1, 0.5), expected)
    held = Leaky()
    bound = functools.partial(lambda leaky, y: Leaky.activation(leaky, y), held)
    for held.slope in (0.1, 0.5):
        out = norm(activation=bound)()[0]
    np.testing.assert_array_equal(out, expected)
    schedule = Constant()
    for schedule.momentum in (1.0, 0.0):
        _, state = norm(momentum=schedule)()
    assert np.all(state.mean == norm(momentum=0.0)()[1].mean)


def test_inference_refuses_what_training_does():
    rows = INPUT | PARAMS_AND_STATE | SHORTCUT | OPTIONS
    of_batch_norm = {
        name: row._replace(call=functools.partial(row.call, train=False))
        for name, row in rows.items()
        if isinstance(row.call, functools.partial) and row.call.func is jbn.batch_norm
        if not name.startswith(OF_TRAINING)
    }
    assert len(of_batch_norm) > 30
    assert_refused(of_batch_norm)
