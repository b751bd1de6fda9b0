"""Every refusal of the library, a row each: the argument in backticks, what it got, and how to mend it.

To add one, write a call that makes the mistake, and what the error says, into the table of its part of the library. A
`raise` of jbn that no row reaches fails `test_every_raise_has_a_row`. Calls of the core, which are partials, are made
again inside of transformations, on traced arrays.
"""

import functools
import importlib
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import flax.linen
import flax.nnx
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import orbax.checkpoint
import pytest
from flax.serialization import to_bytes
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from support import raises

import jbn
from jbn import checkpoint, diagnostics
from jbn.convert import (
    from_equinox,
    from_haiku,
    from_linen,
    from_nnx,
    from_torch,
    join,
    split,
    to_keras,
    to_linen,
    to_torch,
)

matplotlib.use("agg")

X = np.ones((8, 16, 3), np.float32)
MATRIX = np.ones((8, 3), np.float32)
WIDE = np.ones((8, 4), np.float32)
HUGE = np.full((2, 3), 3e38, np.float32)
TWO = np.ones(2, np.float32)
PARAMS, STATE = jbn.init(3)
MOMENTS = jbn.Moments(np.zeros(3, np.float32), np.ones(3, np.float32), np.float32(8))
HALF = jbn.State(jnp.zeros(3, jnp.bfloat16), jnp.ones(3, jnp.bfloat16), jnp.int32(0))
STACKED = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), STATE)
KEY = jax.random.key(0)
STRUCT = jax.ShapeDtypeStruct((3,), jnp.float32)
OBJECTS = np.array([1.0, None, 2.0])
NAN = float("nan")
SCHEDULE = jbn.momentum.cumulative()


class Row(NamedTuple):
    """A mistake, and what its error says."""

    call: Callable[[], Any]
    error: type[Exception]
    argument: str
    given: str
    advice: str


def partly(function, **usual):
    """The function, to be called with some of these arguments replaced."""
    return lambda **given: functools.partial(function, **{**usual, **given})


def jitted(call, **traced):
    return lambda: jax.jit(lambda traced: call(**traced))(traced)


def in_lanes(call):
    return lambda: jax.vmap(call, axis_name="lanes", axis_size=2)()


def on_devices(call):
    """A call on 16 examples that are spread over 8 devices, under explicit sharding."""

    def spread():
        mesh = Mesh(np.array(jax.devices()), ("data",), axis_types=(AxisType.Explicit,))
        with jax.set_mesh(mesh):
            x = jax.device_put(np.ones((16, 3), np.float32), NamedSharding(mesh, P("data")))
            return jax.jit(lambda x: call(x=x))(x)

    return spread


def exported(call):
    """A call on any number of examples."""
    (size,) = jax.export.symbolic_shape("b")
    return lambda: jax.export.export(jax.jit(lambda x: call(x=x)))(jax.ShapeDtypeStruct((size, 3), jnp.float32))


def without(package, call):
    """A call where a package is not installed."""

    def lacking():
        with mock.patch.dict(sys.modules, {package: None}):
            return call()

    return lacking


norm = partly(jbn.batch_norm, params=PARAMS, state=STATE, x=X, train=True)
renorm = partly(jbn.batch_renorm, params=PARAMS, state=STATE, x=X, train=True)
normalize = partly(jbn.normalize, params=PARAMS, state=STATE, x=X)
moments = partly(jbn.moments, x=X)
update = partly(jbn.update, state=STATE, moments=MOMENTS)
fold = partly(jbn.fold, params=PARAMS, state=STATE, kernel=np.ones((4, 3), np.float32))


def by_a_condition(count):
    return 2 if count < 9 else 3


INPUT = {
    "integers": Row(norm(x=np.ones((8, 3), np.int32)), TypeError, "x", "int32", "x.astype(jnp.float32)"),
    "int8": Row(norm(x=np.ones((8, 3), np.int8)), TypeError, "x", "int8", "expected one of float32, float64, bfloat16"),
    "bool": Row(norm(x=np.ones((8, 3), bool)), TypeError, "x", "has dtype bool", "x.astype(jnp.float32)"),
    "complex": Row(norm(x=np.ones((8, 3), np.complex64)), TypeError, "x", "complex64", "x.real and x.imag apart"),
    "float8": Row(norm(x=np.ones((8, 3), jnp.float8_e5m2)), TypeError, "x", "float8_e5m2", "x.astype(jnp.float32)"),
    "keys": Row(norm(x=jax.random.split(KEY, (8, 3))), TypeError, "x", "key<fry>", "expected one of float32"),
    "None": Row(norm(x=None), TypeError, "x", "NoneType", "expected one of float32, float64, bfloat16, float16"),
    "a text": Row(normalize(x="abc"), TypeError, "x", "a str that makes no array", "expected one of float32"),
    "a dict": Row(moments(x={"a": X}), TypeError, "x", "a dict that makes no array", "expected one of float32"),
    "ragged": Row(norm(x=[[1.0], [1.0, 2.0]]), TypeError, "x", "a list that makes no array", "expected one of float32"),
    "objects": Row(norm(x=OBJECTS), TypeError, "x", "a ndarray that makes no array", "expected one of float32"),
    "a shape": Row(moments(x=STRUCT), TypeError, "x", "a ShapeDtypeStruct that makes", "expected one of float32"),
    "a state": Row(norm(x=STATE, state=MATRIX), TypeError, "x", "a State", "expected one of float32"),
    "a scalar": Row(
        norm(x=np.float32(1)), ValueError, "feature_axis", "-1 is out of range for x of 0 dimensions", "give it axes"
    ),
    "nothing to reduce": Row(norm(x=np.ones(3, np.float32)), ValueError, "x", "shape (3,)", "Add a batch axis"),
    "moments of a row": Row(moments(x=MATRIX[0]), ValueError, "x", "shape (3,)", "a mapped axis with `axis_name`"),
    "axis out of range": Row(norm(feature_axis=3), ValueError, "feature_axis", "3 is out of range", "expected -3 to 2"),
    "axis far out": Row(norm(feature_axis=-(10**30)), ValueError, "feature_axis", "out of range", "expected -3 to 2"),
    "axis twice": Row(norm(feature_axis=(2, -1)), ValueError, "feature_axis", "(2, -1) names an", "name it once"),
    "axis a float": Row(norm(feature_axis=1.0), TypeError, "feature_axis", "is 1.0", "an int or a sequence of ints"),
    "axis a flag": Row(norm(feature_axis=True), TypeError, "feature_axis", "is True", "an int or a sequence of ints"),
    "axis a name": Row(
        moments(feature_axis="channels"), TypeError, "feature_axis", "is 'channels'", "an int or a sequence of ints"
    ),
    "axis an array without axes": Row(
        moments(feature_axis=np.array(1)), TypeError, "feature_axis", "is array(1)", "an int or a sequence of ints"
    ),
    "mask a text": Row(norm(mask="abc"), TypeError, "mask", "a str that makes no array", "expected a boolean one"),
    "mask of floats": Row(
        norm(mask=np.ones((8, 16), np.float32)), TypeError, "mask", "has dtype float32", "use mask.astype(bool)"
    ),
    "mask of another shape": Row(
        norm(mask=np.ones((8, 3), bool)), ValueError, "mask", "has shape (8, 3)", "expected (8, 16) or (8, 16, 1)"
    ),
    "mask of examples": Row(normalize(mask=np.ones(8, bool)), ValueError, "mask", "shape (8,)", "an axis may also be"),
    "mask of x": Row(moments(mask=np.ones(X.shape, bool)), ValueError, "mask", "shape (8, 16, 3)", "expected (8, 16)"),
}

PARAMS_AND_STATE = {
    "swapped": Row(norm(params=STATE, state=PARAMS), TypeError, "params", "is a State", "jbn.Params(scale, bias)"),
    "x first": Row(norm(params=X, state=PARAMS, x=MATRIX), TypeError, "params", "is a ndarray", "jbn.Params"),
    "params a dict": Row(norm(params=PARAMS._asdict()), TypeError, "params", "is a dict", "jbn.Params(scale, bias)"),
    "state a pair": Row(norm(state=(PARAMS, STATE)), TypeError, "state", "a tuple", "jbn.State(mean, var, count)"),
    "features of x": Row(
        norm(x=np.ones((8, 4), np.float32)), ValueError, "params.scale", "shape (3,)", "jbn.init((4,)) makes it"
    ),
    "features of bias": Row(
        norm(params=jbn.Params(None, np.zeros(2, np.float32))), ValueError, "params.bias", "shape (2,)", "expected (3,)"
    ),
    "features of the mean": Row(
        normalize(state=STATE._replace(mean=jnp.zeros(4))), ValueError, "state.mean", "shape (4,)", "expected (3,)"
    ),
    "a stacked state": Row(
        norm(state=STACKED), ValueError, "state.mean", "has shape (2, 3)", "expected (3,), as x of shape"
    ),
    "scale a list": Row(
        norm(params=jbn.Params([1.0], None)), TypeError, "params.scale", "is [1.0]", "numeric array of shape (3,)"
    ),
    "scale of objects": Row(
        norm(params=jbn.Params(OBJECTS, None)), TypeError, "params.scale", "array([1.0, None, 2.0]", "a numeric array"
    ),
    "scale of keys": Row(
        norm(params=jbn.Params(jax.random.split(KEY, 3), None)), TypeError, "params.scale", "key<fry>", "numeric array"
    ),
    "scale of integers": Row(
        norm(params=jbn.Params(np.ones(3, np.int32), None)), TypeError, "params.scale", "int32", "a float dtype"
    ),
    "mean None": Row(norm(state=STATE._replace(mean=None)), TypeError, "state.mean", "is None", "a numeric array"),
    "var a shape": Row(norm(state=STATE._replace(var=STRUCT)), TypeError, "state.var", "ShapeDtypeStruct", "a numeric"),
    "count of channels": Row(
        norm(state=STATE._replace(count=jnp.zeros(3, jnp.int32))), ValueError, "state.count", "(3,)", "expected ()"
    ),
    "half-precision mean": Row(
        norm(state=HALF), TypeError, "state.mean.dtype", "is bfloat16", "give x in that dtype instead"
    ),
    "half-precision var": Row(
        normalize(state=HALF._replace(mean=STATE.mean)), TypeError, "state.var.dtype", "is bfloat16", "expected float32"
    ),
    "init of a float": Row(lambda: jbn.init(2.0), TypeError, "features", "is 2.0", "an int or a sequence of ints"),
    "init of a flag": Row(lambda: jbn.init(True), TypeError, "features", "is True", "an int or a sequence of ints"),
    "init of less than 0": Row(lambda: jbn.init((3, -1)), ValueError, "features", "is (3, -1)", "sizes of at least 0"),
    "init in half precision": Row(
        lambda: jbn.init(3, jnp.bfloat16), TypeError, "dtype", "is bfloat16", "expected float32 or float64"
    ),
    "no statistics to unset": Row(
        lambda: jbn.unset({"mean": "imagenet", "var": [1.0]}), ValueError, "tree", "no statistics", "float `mean` and"
    ),
    "update of moments": Row(update(state=MOMENTS), TypeError, "state", "is a Moments", "jbn.State(mean, var, count)"),
    "update by a state": Row(update(moments=STATE), TypeError, "moments", "is a State", "jbn.Moments(mean, var, count"),
    "update by other features": Row(
        update(state=jbn.init(2)[1]), ValueError, "moments.mean", "has shape (3,)", "expected (2,), the shape of"
    ),
    "update of a list": Row(
        update(state=STATE._replace(mean=[0.0] * 3)), TypeError, "state.mean", "[0.0, 0.0, 0.0]", "a numeric array"
    ),
    "update in half precision": Row(
        update(state=HALF), TypeError, "state.mean.dtype", "is bfloat16", "expected float32 or float64"
    ),
    "update by many momenta": Row(
        update(momentum=np.ones(3)), TypeError, "momentum", "is array([1., 1., 1.])", "expected a number in [0, 1]"
    ),
}

OPTIONS = {
    "train a number": Row(norm(train=1), TypeError, "train", "is 1", "True (batch statistics) or False (running"),
    "train x": Row(norm(train=X), TypeError, "train", "is array([[[1., ", "expected True (batch statistics)"),
    "train traced": Row(
        jitted(norm(), train=True), TypeError, "train", "is traced", "jax.jit(..., static_argnames='train')"
    ),
    "epsilon 0": Row(norm(epsilon=0.0), ValueError, "epsilon", "is 0.0", "a positive number that float32 can hold"),
    "epsilon negative": Row(norm(epsilon=-1e-5), ValueError, "epsilon", "is -1e-05", "such as 1e-5"),
    "epsilon nan": Row(normalize(epsilon=NAN), ValueError, "epsilon", "is nan", "a positive number"),
    "epsilon too small": Row(norm(epsilon=1e-50), ValueError, "epsilon", "is 1e-50", "that float32 can hold"),
    "epsilon a text": Row(norm(epsilon="small"), TypeError, "epsilon", "is 'small'", "expected a number such as 1e-5"),
    "epsilon of channels": Row(norm(epsilon=np.full(3, 1e-5)), TypeError, "epsilon", "is array([1.e-05", "a number"),
    "epsilon a key": Row(norm(epsilon=KEY), TypeError, "epsilon", "key<fry>", "expected a number such as 1e-5"),
    "epsilon traced": Row(
        jitted(norm(), epsilon=1e-5), TypeError, "epsilon", "is traced", "a Python number such as 1e-5, bound before"
    ),
    "running_var": Row(
        norm(running_var="unbias"), ValueError, "running_var", "is 'unbias'", "one of 'biased', 'unbiased', 'total'"
    ),
    "running_var the variance": Row(
        norm(running_var=np.ones(3, np.float32)), ValueError, "running_var", "is array([1., 1., 1.]", "'biased'"
    ),
    "dtype": Row(norm(dtype=jnp.int8), TypeError, "dtype", "is int8", "expected one of float32, float64, bfloat16"),
    "dtype a text": Row(normalize(dtype="foo"), TypeError, "dtype", "is 'foo'", "expected one of float32"),
    "ghost size": Row(norm(ghost_batch_size=3), ValueError, "ghost_batch_size", "is 3", "expected a divisor of 8"),
    "ghost size 0": Row(norm(ghost_batch_size=0), ValueError, "ghost_batch_size", "is 0", "expected a divisor of 8"),
    "ghost size a float": Row(norm(ghost_batch_size=2.0), TypeError, "ghost_batch_size", "is 2.0", "an int or None"),
    "ghost size a flag": Row(norm(ghost_batch_size=True), TypeError, "ghost_batch_size", "is True", "an int or None"),
    "ghost size traced": Row(
        jitted(norm(), ghost_batch_size=2), TypeError, "ghost_batch_size", "Trace", "expected an int or None"
    ),
    "ghost batches of features": Row(
        norm(x=MATRIX.T, feature_axis=0, ghost_batch_size=1), ValueError, "ghost_batch_size", "(0,)", "move the batch"
    ),
    "ghost batches of any size": Row(
        exported(norm(ghost_batch_size=2)), ValueError, "ghost_batch_size", "x has shape (b, 3)", "a batch of known"
    ),
    "ghost batches over borders": Row(
        on_devices(norm(ghost_batch_size=4)), ValueError, "ghost_batch_size", "is 4, but each of 8", "a divisor of 2"
    ),
    "activation a text": Row(norm(activation="relu"), TypeError, "activation", "is 'relu'", "jax.nn.relu"),
    "activation of NumPy": Row(norm(activation=np.tanh), TypeError, "activation", "<ufunc 'tanh'>", "function of jax"),
    "activation of Python": Row(
        normalize(activation=lambda y: max(y, 0)), TypeError, "activation", "is <function", "an elementwise function"
    ),
    "activation of nothing": Row(norm(activation=lambda: 0), TypeError, "activation", "takes 0", "elementwise"),
    "activation that reduces": Row(
        norm(activation=jnp.sum), ValueError, "activation", "turns float32[8, 16, 3] into", "array of the same shape"
    ),
    "activation to booleans": Row(
        norm(activation=jnp.isfinite), ValueError, "activation", "dtype=bool", "whose result is a float array"
    ),
    "activation to a pair": Row(norm(activation=lambda y: (y, y)), ValueError, "activation", "(Shape", "jax.nn.relu"),
    "activation to None": Row(norm(activation=lambda y: None), ValueError, "activation", "into None", "jax.nn.relu"),
}

MOMENTUM = {
    "above 1": Row(norm(momentum=1.01), ValueError, "momentum", "is 1.01", "see jbn.momentum.from_torch"),
    "negative": Row(update(momentum=-0.1), ValueError, "momentum", "is -0.1", "expected a number in [0, 1]"),
    "None": Row(norm(momentum=None), TypeError, "momentum", "is None", "such as jbn.momentum.warmup(0.99)"),
    "a text": Row(norm(momentum="0.9"), TypeError, "momentum", "is '0.9'", "a function count -> momentum"),
    "a key": Row(norm(momentum=KEY), TypeError, "momentum", "key<fry>", "expected a number in [0, 1]"),
    "uncalled": Row(norm(momentum=jbn.momentum.warmup), TypeError, "momentum", "momentum.warmup itself", "call it"),
    "uncalled, without arguments": Row(
        norm(momentum=jbn.momentum.cumulative), TypeError, "momentum", "jbn.momentum.cumulative itself", "call it"
    ),
    "gives channels": Row(
        norm(momentum=lambda count: np.ones(3)), TypeError, "momentum", "gives array([1., 1., 1.])", "to a scalar"
    ),
    "gives None": Row(norm(momentum=lambda count: None), TypeError, "momentum", "gives None", "count of updates to a"),
    "gives a text": Row(norm(momentum=lambda count: "0.9"), TypeError, "momentum", "gives '0.9'", "expected a number"),
    "without a count": Row(norm(momentum=lambda: 0.9), TypeError, "momentum", "takes 0 positional", "count of updates"),
    "by a Python condition": Row(
        jitted(norm(momentum=by_a_condition)), TypeError, "momentum", "boolean conversion", "jnp.where for `if`"
    ),
    "traced warmup": Row(
        jitted(jbn.momentum.warmup, momentum=0.9), TypeError, "momentum", "is traced", "bound before jit"
    ),
    "warmup to 2": Row(lambda: jbn.momentum.warmup(2), ValueError, "momentum", "is 2.0", "expected a number in [0, 1]"),
    "debiased text": Row(lambda: jbn.momentum.debiased("a"), TypeError, "momentum", "is 'a'", "a number in [0, 1]"),
    "from PyTorch's -1": Row(lambda: jbn.momentum.from_torch(-1), ValueError, "momentum", "is -1.0", "in [0, 1]"),
    "no microbatch": Row(
        lambda: jbn.momentum.per_microbatch(0.9, 0), ValueError, "microbatches", "is 0", "an int of at least 1"
    ),
    "half a microbatch": Row(
        lambda: jbn.momentum.per_microbatch(0.9, 0.5), ValueError, "microbatches", "is 0.5", "an int of at least 1"
    ),
}

RENORM = {
    "r_max below 1": Row(renorm(r_max=0.5), ValueError, "r_max", "is 0.5", "a number of at least 1; inf is no bound"),
    "d_max negative": Row(renorm(d_max=-1), ValueError, "d_max", "is -1.0", "expected a number of at least 0"),
    "r_max nan": Row(renorm(r_max=NAN), ValueError, "r_max", "is nan", "inf is no bound"),
    "d_max a text": Row(renorm(d_max="5"), TypeError, "d_max", "is '5'", "such as jbn.renorm.d_max()"),
    "r_max None": Row(renorm(r_max=None), TypeError, "r_max", "is None", "such as jbn.renorm.r_max()"),
    "uncalled": Row(renorm(r_max=jbn.renorm.r_max), TypeError, "r_max", "jbn.renorm.r_max itself", "call it, as in"),
    "the other's": Row(renorm(r_max=jbn.renorm.d_max), TypeError, "r_max", "renorm.d_max itself", "jbn.renorm.r_max()"),
    "gives channels": Row(renorm(d_max=lambda count: np.ones(3)), TypeError, "d_max", "gives array(", "to a scalar"),
    "by a Python condition": Row(
        jitted(renorm(r_max=by_a_condition)), TypeError, "r_max", "boolean conversion", "write jnp.where for `if`"
    ),
    "limit below 1": Row(lambda: jbn.renorm.r_max(0.5), ValueError, "limit", "is 0.5", "a number of at least 1"),
    "limit a text": Row(lambda: jbn.renorm.d_max("a"), TypeError, "limit", "is 'a'", "a number of at least 0"),
    "limit infinite": Row(lambda: jbn.renorm.d_max(np.inf), ValueError, "limit", "is inf", "For no bound give d_max="),
    "limit traced": Row(
        jitted(jbn.renorm.r_max, limit=3.0), TypeError, "limit", "is traced", "a Python number such as 3.0"
    ),
    "begin a float": Row(lambda: jbn.renorm.r_max(begin=0.5), TypeError, "begin", "is 0.5", "counts of updates, ints"),
    "end before begin": Row(
        lambda: jbn.renorm.d_max(begin=3, end=3), ValueError, "begin", "is 3 and `end` 3", "0 <= begin < end"
    ),
}

SHARING = {
    "unbound": Row(
        norm(axis_name="devices"), NameError, "axis_name", "is 'devices'", "call inside jax.shard_map, jax.vmap(..."
    ),
    "unbound moments": Row(moments(axis_name="d"), NameError, "axis_name", "is 'd'", "jax.pmap(..., axis_name='d')"),
    "one of two unbound": Row(
        in_lanes(norm(axis_name=("lanes", "d"))), NameError, "axis_name", "('lanes', 'd')", "or leave `axis_name` out"
    ),
    "a number": Row(norm(axis_name=0), TypeError, "axis_name", "is 0", "the name of a mapped axis, or a tuple of"),
    "a dict": Row(moments(axis_name={}), TypeError, "axis_name", "is {}", "the name of a mapped axis"),
    "twice": Row(renorm(axis_name=("a", "a")), ValueError, "axis_name", "('a', 'a')", "name it once"),
    "groups without an axis": Row(
        norm(axis_index_groups=[[0]]), ValueError, "axis_index_groups", "`axis_name` is None", "name the mapped axis"
    ),
    "groups on two axes": Row(
        norm(axis_name=("a", "b"), axis_index_groups=[[0]]), ValueError, "axis_index_groups", "('a', 'b')", "one axis"
    ),
    "groups that overlap": Row(
        norm(axis_name="a", axis_index_groups=[[0, 0]]), ValueError, "axis_index_groups", "is [[0, 0]]", "each place"
    ),
    "groups of none": Row(
        moments(axis_name="a", axis_index_groups=[]), ValueError, "axis_index_groups", "is []", "each place once"
    ),
    "groups in one list": Row(
        norm(axis_name="a", axis_index_groups=[0, 1]), TypeError, "axis_index_groups", "is [0, 1]", "[[0, 1], [2, 3]]"
    ),
    "groups of too few": Row(
        in_lanes(norm(axis_name="lanes", axis_index_groups=[[0]])),
        ValueError,
        "axis_index_groups",
        "1 place",
        "0 to 1",
    ),
}

MERGE = {
    "no moments": Row(lambda: jbn.merge(), ValueError, "merge", "got no moments", "at least one jbn.Moments"),
    "a list of moments": Row(lambda: jbn.merge([MOMENTS]), TypeError, "moments", "is a list", "jbn.Moments(mean, var"),
    "moments of other features": Row(
        lambda: jbn.merge(MOMENTS, MOMENTS._replace(mean=TWO)), ValueError, "moments", "[(3,), (2,)]", "one shape for"
    ),
    "moments without a count": Row(
        lambda: jbn.merge(MOMENTS, MOMENTS._replace(count=None)), TypeError, "moments.count", "is None", "of shape ()"
    ),
    "variances of other features": Row(
        lambda: jbn.merge(MOMENTS._replace(var=TWO)), ValueError, "moments.var", "has shape (2,)", "expected (3,)"
    ),
    "no states": Row(lambda: jbn.merge_states(), ValueError, "merge_states", "got no states", "at least one jbn.State"),
    "a list of states": Row(lambda: jbn.merge_states([STATE]), TypeError, "states[0]", "is a list", "jbn.State(mean,"),
    "states of other features": Row(
        lambda: jbn.merge_states(STATE, jbn.init(2)[1]), ValueError, "states[1].mean", "shape (2,)", "expected (3,)"
    ),
    "a state of lists": Row(
        lambda: jbn.merge_states(STATE, STATE._replace(var=[1.0])), TypeError, "states[1].var", "[1.0]", "numeric array"
    ),
    "a state in half precision": Row(
        lambda: jbn.merge_states(STATE, HALF), TypeError, "states[1].mean.dtype", "is bfloat16", "expected float32 or"
    ),
    "too few weights": Row(
        lambda: jbn.merge_states(STATE, STATE, weights=[1]), ValueError, "weights", "is [1]", "2 numbers of at least 0"
    ),
    "weights of less than 0": Row(
        lambda: jbn.merge_states(STATE, STATE, weights=[1, -1]), ValueError, "weights", "[1, -1]", "of at least 0"
    ),
    "weights of 0": Row(lambda: jbn.merge_states(STATE, weights=[0]), ValueError, "weights", "is [0]", "not all 0"),
    "weights a number": Row(
        lambda: jbn.merge_states(STATE, weights=3), TypeError, "weights", "is 3", "one for each state"
    ),
    "weights a mapping": Row(
        lambda: jbn.merge_states(STATE, weights={0: 1}), ValueError, "weights", "is {0: 1}", "one for each state"
    ),
}

FOLD = {
    "axis": Row(fold(output_axis=2), ValueError, "output_axis", "2 is out of range for kernel", "expected -2 to 1"),
    "axis a flag": Row(fold(output_axis=True), TypeError, "output_axis", "is True", "an int or a sequence of ints"),
    "features": Row(fold(output_axis=0), ValueError, "params.scale", "shape (3,)", "expected (4,), as kernel of shape"),
    "bias": Row(fold(bias=np.ones(4, np.float32)), ValueError, "bias", "has shape (4,)", "expected (3,)"),
    "whole kernel": Row(fold(kernel=np.ones((4, 3), np.int32)), TypeError, "kernel", "int32", "expected a float array"),
    "no kernel": Row(fold(kernel=None), TypeError, "kernel", "is NoneType", "expected a float array"),
    "bias of objects": Row(fold(bias=OBJECTS), TypeError, "bias", "is object", "expected a float array"),
    "epsilon": Row(fold(epsilon=0), ValueError, "epsilon", "is 0.0", "a positive number"),
    "state": Row(fold(state=None), TypeError, "state", "is a NoneType", "jbn.State(mean, var, count)"),
    "half-precision state": Row(
        fold(state=HALF), TypeError, "state.mean.dtype", "is bfloat16", "expected float32 or float64"
    ),
}


def step(state, batch):
    return jbn.batch_norm(PARAMS, state, batch, True)[1]


def run_twice(tree, batch):
    """A step of a norm without a count, in which the second call moves what the first one found."""
    return {"mean": (tree["mean"] + 1) / 2, "var": jnp.where(jnp.isinf(tree["var"]), 1.0, tree["var"])}


NO_COUNT = {"mean": TWO, "var": TWO}
calibrate = partly(jbn.calibrate, step=step, state=STATE, batches=[MATRIX])

CALIBRATE = {
    "step": Row(calibrate(step=None), TypeError, "step", "is None", "expected a function of (state, batch)"),
    "weights": Row(calibrate(weights=[1]), TypeError, "weights", "is [1]", "expected a function of batch"),
    "select": Row(calibrate(select="stem"), TypeError, "select", "is 'stem'", "expected a function of path"),
    "batches": Row(calibrate(batches=3), TypeError, "batches", "is a int", "an iterable of what `step` takes"),
    "no batches": Row(calibrate(batches=[]), ValueError, "batches", "gave no batch of a weight above", "at least one"),
    "no statistics": Row(calibrate(state={"a": X}), ValueError, "state", "holds no statistics", "`mean` and `var`"),
    "half precision": Row(
        calibrate(state={"stem": HALF}), TypeError, "state", "`mean` in bfloat16 at stem", "Convert it by `.astype`"
    ),
    "state traced": Row(
        jitted(calibrate(), state=STATE), TypeError, "state", "is traced", "call it outside of jit, and jit `step`"
    ),
    "batches traced": Row(
        jitted(calibrate(), batches=[MATRIX]), TypeError, "batches", "are traced", "outside of jit, and jit `step`"
    ),
    "nothing selected": Row(
        calibrate(state={"stem": STATE}, select=lambda path: False), ValueError, "select", "none of the 1", "stem"
    ),
    "negative weight": Row(
        calibrate(weights=lambda x: -1), ValueError, "weights", "gives -1 for batch 0", "of at least"
    ),
    "weight a text": Row(calibrate(weights=lambda x: "a"), ValueError, "weights", "gives 'a'", "a number of at least"),
    "sizes that differ": Row(
        calibrate(batches=[(X, X[:2])]), ValueError, "batches", "leading axes of sizes [2, 8]", "Give `weights`"
    ),
    "batches of numbers": Row(
        calibrate(batches=[3.0]), ValueError, "batches", "without an array that has a leading axis", "Give `weights`"
    ),
    "step that gives no state": Row(
        calibrate(step=lambda state, x: x), ValueError, "step", "holds no statistics", "float `mean` and `var`"
    ),
    "step that gives another tree": Row(
        calibrate(step=lambda state, x: {"other": state}), ValueError, "step", "at other", "a tree like `state`"
    ),
    "step that gives another shape": Row(
        calibrate(step=lambda state, x: jbn.init(2)[1]), ValueError, "step", "`mean` of shape (2,)", "expected (3,)"
    ),
    "step that leaves a norm alone": Row(
        calibrate(step=lambda state, x: state), ValueError, "step", "no statistics for 1 of 1", "Leave it out by"
    ),
    "step that runs a norm twice": Row(
        calibrate(step=run_twice, state=NO_COUNT), ValueError, "step", "ran more than once", "give each call a norm of"
    ),
    "values that are too large": Row(
        calibrate(batches=[HUGE, -HUGE]), ValueError, "var", "is too large for float32", "or a state in float64"
    ),
    "no tqdm": Row(
        without("tqdm", calibrate(progress=True)), ModuleNotFoundError, "progress", "tqdm, which is", "pip install tqdm"
    ),
}


def call_linen(x=MATRIX, mask=None, **options):
    return jbn.linen.BatchNorm(**{"use_running_average": False, **options}).init(KEY, x, mask=mask)


def call_nnx(x=MATRIX, mask=None, flag=None, **options):
    return jbn.nnx.BatchNorm(**{"num_features": 3, "rngs": flax.nnx.Rngs(0), **options})(x, flag, mask=mask)


linen, nnx = partly(call_linen), partly(call_nnx)


def applied(x=MATRIX, **options):
    """A norm of Linen on variables that are there already."""
    variables = {"params": {"scale": np.ones(3), "bias": np.zeros(3)}, "batch_stats": STATE._asdict()}
    del variables["batch_stats"]["count"]
    return jbn.linen.BatchNorm(use_running_average=False, **options).apply(variables, x, mutable=["batch_stats"])


def applied_in_half_precision():
    variables = {"batch_stats": {"mean": HALF.mean, "var": HALF.var}}
    return jbn.linen.BatchNorm(use_running_average=True, use_scale=False, use_bias=False).apply(variables, MATRIX)


def with_a_schedule_set_later():
    norm = jbn.nnx.BatchNorm(3, rngs=flax.nnx.Rngs(0))
    norm.momentum = SCHEDULE
    return norm(MATRIX)


def vector_of_2(key, shape, dtype):
    return jnp.ones(2, dtype)


FLAX = {
    "fast variance": Row(
        linen(use_fast_variance=True), TypeError, "use_fast_variance", "is True", "not needed: jbn's variance is exact"
    ),
    "reductions": Row(
        linen(force_float32_reductions=1), TypeError, "force_float32_reductions", "is 1", "not needed: jbn reduces in"
    ),
    "promotion": Row(
        nnx(promote_dtype=print), TypeError, "promote_dtype", "is <built-in function print>", "Leave it out"
    ),
    "flag a number": Row(
        linen(use_running_average=1), TypeError, "use_running_average", "is 1", "True (running statistics) or False"
    ),
    "no flag": Row(
        nnx(use_running_average=None), ValueError, "use_running_average", "given neither at", "give True or False"
    ),
    "traced flag": Row(
        jitted(call_nnx, flag=True), TypeError, "use_running_average", "is traced", "static_argnames='use_running"
    ),
    "axis": Row(linen(axis=3), ValueError, "axis", "3 is out of range for x of 2 dimensions", "expected -2 to 1"),
    "integers": Row(linen(x=MATRIX.astype(np.int32)), TypeError, "x", "has dtype int32", "x.astype(jnp.float32)"),
    "mask": Row(nnx(mask=np.ones(3, bool)), ValueError, "mask", "has shape (3,)", "expected (8,) or (8, 1)"),
    "momentum": Row(nnx(momentum=2), ValueError, "momentum", "is 2.0", "expected a number in [0, 1]"),
    "dtype": Row(linen(dtype=jnp.int32), TypeError, "dtype", "is int32", "expected one of float32, float64"),
    "dtype of parameters": Row(
        nnx(param_dtype="foo"), TypeError, "param_dtype", "is 'foo'", "expected one of float32, float64"
    ),
    "unbound axis": Row(nnx(axis_name="d"), NameError, "axis_name", "is 'd'", "call inside jax.shard_map, jax.vmap"),
    "features of a Linen norm": Row(
        functools.partial(applied, x=WIDE), ValueError, "mean", "has shape (3,)", "expected (4,), as x of shape (8, 4)"
    ),
    "features of an NNX norm": Row(
        nnx(x=WIDE), ValueError, "x", "has features (4,)", "make the module with num_features=(4,)"
    ),
    "initializer": Row(
        nnx(bias_init=vector_of_2), ValueError, "bias", "has shape (2,)", "expected (3,), as x of shape (8, 3)"
    ),
    "number of features": Row(
        nnx(num_features=5.0), TypeError, "num_features", "is 5.0", "an int or a sequence of ints"
    ),
    "a key for rngs": Row(
        nnx(rngs=KEY), TypeError, "rngs", "is a PRNGKeyArray without a stream `params`", "expected nnx.Rngs(0)"
    ),
    "rngs of dropout": Row(
        nnx(rngs=flax.nnx.Rngs(dropout=0)), TypeError, "rngs", "a Rngs without a stream `params`", "nnx.Rngs(0)"
    ),
    "a schedule without a count": Row(
        functools.partial(applied, momentum=SCHEDULE), ValueError, "batch_stats", "no `count`", "jbn.convert.split"
    ),
    "a schedule set later": Row(
        with_a_schedule_set_later, ValueError, "momentum", "has no `count`", "give the schedule at construction"
    ),
    "half-precision statistics": Row(
        applied_in_half_precision, TypeError, "mean.dtype", "is bfloat16", "expected float32 or float64"
    ),
}

NORM = jbn.init(2)
TORCH = {"running_mean": TWO, "running_var": TWO}
BOXED = flax.linen.Partitioned(TWO, ("model",))
LAYER = SimpleNamespace(mode="batch", momentum=0.5, weight=None, bias=None, batch_counter=0, batch_state_index=1)
EMPTY = SimpleNamespace(get={}.__getitem__)

CONVERT = {
    "a layer": Row(
        lambda: from_nnx(LAYER), TypeError, "entries", "a SimpleNamespace", "by the names scale, bias, mean"
    ),
    "no Haiku averages": Row(
        lambda: from_haiku({"mean_ema": TWO}), TypeError, "entries['mean_ema']", "a ndarray", "hidden, average"
    ),
    "no Linen variables": Row(
        lambda: from_linen(None), TypeError, "variables", "is a NoneType", "with params and batch_stats"
    ),
    "no Linen collection": Row(
        lambda: from_linen({"params": 3}), TypeError, "variables['params']", "is a int", "arrays of one norm"
    ),
    "other collections": Row(
        lambda: from_linen({"cache": {}}), ValueError, "variables", "`cache` is extra", "params and batch_stats"
    ),
    "missing": Row(
        lambda: from_torch({"running_mean": TWO}), ValueError, "running_var", "is missing", "batch norm in PyTorch"
    ),
    "extra": Row(
        lambda: from_torch({**TORCH, "gamma": TWO}), ValueError, "gamma", "is extra", "a norm has weight, bias"
    ),
    "misshaped": Row(
        lambda: from_nnx({"mean": TWO, "var": TWO[:1]}), ValueError, "var", "has shape (1,)", "not (2,) as `mean`"
    ),
    "integers": Row(
        lambda: from_nnx({"mean": TWO, "var": np.ones(2, int)}), ValueError, "var", "has dtype int32", "not a float one"
    ),
    "no array": Row(
        lambda: from_nnx({"mean": TWO, "var": "a"}), ValueError, "var", "is a str", "those of batch norm in Flax"
    ),
    "a box of Flax": Row(
        lambda: from_nnx({"mean": BOXED, "var": BOXED}), ValueError, "mean", "is a Partitioned", "flax.linen.meta.unbox"
    ),
    "float64": Row(
        lambda: from_torch({**TORCH, "weight": np.ones(2)}), ValueError, "weight", "is float64", "convert it first, or"
    ),
    "stored count": Row(
        lambda: from_nnx({"mean": TWO, "var": TWO, "count": -3}), ValueError, "count", "is -3", "a whole number from 0"
    ),
    "count a float": Row(lambda: from_torch(TORCH, count=1.5), TypeError, "count", "is 1.5", "expected an int"),
    "count of less than 0": Row(
        lambda: from_torch(TORCH, count=-1), ValueError, "count", "is -1", "expected 0 to 2147483647"
    ),
    "to PyTorch from a dict": Row(
        lambda: to_torch(TORCH, NORM[1]), TypeError, "params", "is a dict", "jbn.Params(scale, bias)"
    ),
    "to Linen, swapped": Row(
        lambda: to_linen(*NORM[::-1]), TypeError, "params", "is a State", "jbn.Params(scale, bias)"
    ),
    "to Keras without a state": Row(
        lambda: to_keras(NORM[0], None), TypeError, "state", "is a NoneType", "jbn.State(mean, var, count)"
    ),
    "no Equinox layer": Row(lambda: from_equinox({}, {}), TypeError, "layer", "is a dict", "mode ema or batch"),
    "no Equinox state": Row(
        lambda: from_equinox(LAYER, None), TypeError, "state", "is a NoneType", "the equinox.nn.State of the"
    ),
    "another layer's state": Row(
        lambda: from_equinox(LAYER, {}), ValueError, "state", "has nothing of `layer`", "that was made with it"
    ),
    "another model's state": Row(
        lambda: from_equinox(LAYER, EMPTY), ValueError, "state", "has nothing of `layer`", "that was made with it"
    ),
    "a stack of Equinox layers": Row(
        lambda: from_equinox(LAYER, {0: np.zeros(4)}), ValueError, "layer", "is a stack of (4,)", "by jax.vmap or"
    ),
    "library": Row(lambda: split({}, "mxnet"), ValueError, "library", "is 'mxnet'", "one of 'torch', 'keras'"),
    "only from": Row(lambda: join({}, {}, "haiku"), ValueError, "library", "is 'haiku'", "'linen', 'nnx'"),
    "no tree": Row(lambda: split([TWO], "torch"), TypeError, "tree", "is a list", "the mapping model.state_dict()"),
    "no pair": Row(lambda: split({}, "haiku"), TypeError, "tree", "is a dict", "the pair (params, state)"),
    "no collection in a tree": Row(
        lambda: split({"params": None}, "linen"), TypeError, "tree", "NoneType at params", "expected a mapping"
    ),
    "no norm in a tree": Row(
        lambda: split({"weight": TWO}, "torch"), ValueError, "tree", "no batch norm of PyTorch", "`running_mean` and"
    ),
    "no norms": Row(lambda: join([], {}, "torch"), TypeError, "norms", "is a list", "the norms that split gave"),
    "no rest": Row(lambda: join({}, None, "nnx"), TypeError, "rest", "is a NoneType", "the tree without its norms"),
    "no path": Row(lambda: join({0: NORM}, {}, "torch"), TypeError, "norms", "the key 0", "paths such as split"),
    "no norm at a path": Row(
        lambda: join({"bn": (1, 2)}, {}, "torch"), TypeError, "norms", "(1, 2) at bn", "(Params, State)"
    ),
    "place taken": Row(
        lambda: join({"bn": NORM}, {"bn.weight": 1}, "torch"), ValueError, "rest", "at bn.weight", "the tree without"
    ),
    "count for Keras": Row(
        lambda: join({}, {}, "keras", with_count=True), ValueError, "with_count", "'keras'", "leave it out"
    ),
}

DIAGNOSTICS = {
    "momentum": Row(lambda: diagnostics.initial_weight(1.5, 3), ValueError, "momentum", "is 1.5", "a number in [0, 1]"),
    "momentum traced": Row(
        jitted(diagnostics.half_life, momentum=0.9), TypeError, "momentum", "is traced", "such as 0.99, bound before"
    ),
    "steps": Row(lambda: diagnostics.initial_weight(0.5, -1), ValueError, "steps", "is -1", "an int of at least 0"),
    "steps a float": Row(lambda: diagnostics.average_weights(0.5, 1.5), TypeError, "steps", "is 1.5", "an int of at"),
    "steps of a schedule": Row(
        lambda: diagnostics.effective_batches(SCHEDULE), TypeError, "steps", "is None", "give the updates to count to"
    ),
    "batch size": Row(lambda: diagnostics.expected_error(0.5, 1, 0), ValueError, "batch_size", "is 0", "of at least 1"),
    "distance": Row(lambda: diagnostics.best_momentum(1, 1, NAN), ValueError, "distance", "is nan", "a finite number"),
    "distance a text": Row(
        lambda: diagnostics.best_momentum(1, 1, "far"), TypeError, "distance", "is 'far'", "a number of at least 0"
    ),
    "rule": Row(
        lambda: diagnostics.expected_variance(1, 1, 2, running_var=3), ValueError, "running_var", "is 3", "'biased'"
    ),
    "no statistics": Row(
        lambda: diagnostics.health({"a": 1}), ValueError, "tree", "holds no statistics", "nodes that have float"
    ),
    "traced tree": Row(
        jitted(diagnostics.health, tree=STATE), TypeError, "tree", "is traced", "call them outside of jit"
    ),
    "traced state": Row(
        jitted(diagnostics.compare, state=STATE, population=STATE), TypeError, "state", "is traced", "outside of jit"
    ),
    "other norms": Row(
        lambda: diagnostics.compare({"a": STATE}, {"b": STATE}), ValueError, "state", "only one of them has", "the same"
    ),
    "other norms than the tree": Row(
        lambda: diagnostics.health({"a": STATE}, {"b": STATE}), ValueError, "tree", "other norms", "the same"
    ),
    "other shapes": Row(
        lambda: diagnostics.compare(STATE, NORM[1]), ValueError, "population", "[(3,), (3,), (2,), (2,)]", "one shape"
    ),
}


def jbn_plot():
    sys.modules.pop("jbn.plot", None)
    return importlib.import_module("jbn.plot")


def pictured(**options):
    return jbn.plot.running_against_population(STATE, STATE, **options)


PLOT = {
    "no matplotlib": Row(
        without("matplotlib", jbn_plot), ModuleNotFoundError, "jbn.plot", "needs matplotlib", "pip install 'jbn[plot]'"
    ),
    "batches": Row(
        lambda: jbn.plot.moving_average([1, 2], [0], [0, 1]), ValueError, "batches", "has shape (1,)", "one shape (n,)"
    ),
    "momenta": Row(lambda: jbn.plot.initial_weight(9, [0.9]), TypeError, "momenta", "is [0.9]", "{'0.9': 0.9}"),
    "no momenta": Row(lambda: jbn.plot.initial_weight(9, {}), ValueError, "momenta", "is empty", "at least one"),
    "steps": Row(lambda: jbn.plot.error_against_momentum(0, 32), ValueError, "steps", "is 0", "an int of at least 1"),
    "distances": Row(
        lambda: jbn.plot.error_against_momentum(9, 32, distances=[]), ValueError, "distances", "is []", "at least one"
    ),
    "epsilon": Row(functools.partial(pictured, epsilon=None), TypeError, "epsilon", "is None", "a number such as 1e-5"),
    "axes": Row(
        functools.partial(pictured, ax=("figure", "axes")), TypeError, "ax", "is a tuple", "_, ax = pyplot.subplots()"
    ),
}


def written(content=b""):
    Path("written").write_bytes(content)
    return "written"


def saved():
    """A norm that orbax wrote, as its CheckpointManager lays it out."""
    path = Path("saved", "0", "default").absolute()
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, NORM)
    return path


CHECKPOINT = {
    "no path": Row(lambda: checkpoint.restore(NORM, "saved"), TypeError, "path", "is a tuple", "path of a file or"),
    "no path to read": Row(lambda: checkpoint.read(None), TypeError, "path", "is a NoneType", "path of a file or"),
    "no path to look in": Row(
        lambda: checkpoint.latest(3), TypeError, "path", "is a int", "path of a file or directory"
    ),
    "absent": Row(lambda: checkpoint.read("absent"), FileNotFoundError, "path", "absent, where there is", "a file or"),
    "no checkpoint": Row(
        lambda: checkpoint.read(written(b"mine")), ValueError, "path", "holds no whole", "flax.serialization.to_bytes"
    ),
    "no checkpoint of orbax": Row(
        lambda: checkpoint.restore(saved().parent, NORM), ValueError, "path", "no metadata of", "give step/default"
    ),
    "folder without checkpoints": Row(
        lambda: checkpoint.latest("."), ValueError, "path", "0 checkpoints of orbax (none)", "name one"
    ),
    "another tree": Row(
        lambda: checkpoint.restore(written(to_bytes(NORM)), MOMENTS), ValueError, "target", "0/scale is", "mean is"
    ),
    "target of objects": Row(
        lambda: checkpoint.restore(written(), [object()]), TypeError, "target", "a object at 0", "expected arrays"
    ),
    "target of keys": Row(
        lambda: checkpoint.restore(written(), [KEY]), TypeError, "target", "a random key at 0", "jax.random.key_data"
    ),
}


TABLES = {
    "input": INPUT,
    "params and state": PARAMS_AND_STATE,
    "options": OPTIONS,
    "momentum": MOMENTUM,
    "renorm": RENORM,
    "sharing": SHARING,
    "merge": MERGE,
    "fold": FOLD,
    "calibrate": CALIBRATE,
    "flax": FLAX,
    "convert": CONVERT,
    "diagnostics": DIAGNOSTICS,
    "plot": PLOT,
    "checkpoint": CHECKPOINT,
}
ROWS = {f"{table}: {name}": row for table, rows in TABLES.items() for name, row in rows.items()}


class Refusal(NamedTuple):
    """What came of a mistake, and the lines at which functions of jbn were left."""

    error: type[BaseException]
    message: str
    left: frozenset[tuple[str, int]]


@functools.cache
def refusal(name):
    error, left = raises.watched(ROWS[name].call)
    return Refusal(type(error), str(error), left)


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    """Where the rows of checkpoints write."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("empty_folder")
@pytest.mark.parametrize("name", ROWS)
def test_the_error_names_the_argument_and_says_what_it_got_and_how_to_mend_it(name):
    row, found = ROWS[name], refusal(name)
    assert found.error is row.error
    for part in (f"`{row.argument}`", row.given, row.advice):
        assert part in found.message


@pytest.mark.usefixtures("empty_folder")
def test_every_raise_has_a_row():
    reached = set().union(*(refusal(name).left for name in ROWS))
    assert sorted(raises.statements() - reached) == []


TRACED = ("params", "state", "x", "mask", "moments", "kernel", "bias")
MESH = Mesh(np.array(jax.devices()[:2]), ("data",))
TRANSFORMATIONS = {
    "jit": lambda function, arrays: jax.jit(function)(arrays),
    "eval_shape": jax.eval_shape,
    "vmap": lambda function, arrays: jax.vmap(function, axis_size=2)(
        jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), arrays)
    ),
    "shard_map": lambda function, arrays: jax.shard_map(function, mesh=MESH, in_specs=P(), out_specs=P())(arrays),
}
PARTIALS = [
    f"{table}: {name}"
    for table in ("input", "params and state", "options", "momentum", "renorm", "sharing", "fold")
    for name, row in TABLES[table].items()
    if isinstance(row.call, functools.partial)
]


def can_be_traced(value):
    leaves = jax.tree.leaves(value)
    return all(isinstance(leaf, jax.Array | np.ndarray | np.generic) and leaf.dtype != object for leaf in leaves)


@pytest.mark.parametrize("transformation", TRANSFORMATIONS)
@pytest.mark.parametrize("name", PARTIALS)
def test_the_error_is_the_same_inside_a_transformation(name, transformation):
    row = ROWS[name]
    arrays = {key: value for key, value in row.call.keywords.items() if key in TRACED and can_be_traced(value)}
    # What was given may be written as a tracer.
    with pytest.raises(row.error) as caught:
        TRANSFORMATIONS[transformation](lambda arrays: row.call(**arrays), arrays)
    for part in (f"`{row.argument}`", row.advice):
        assert part in str(caught.value)


KINDS = {
    "None": None,
    "a text": "abc",
    "a list": [1.0, 2.0],
    "a ragged list": [[1.0], [2.0, 3.0]],
    "a dict": {"a": 1},
    "a set": {1, 2},
    "objects": OBJECTS,
    "texts": np.array(["a", "b", "c"]),
    "an int": 3,
    "a negative int": -5,
    "a bool": True,
    "a float": 1.5,
    "a complex": 1j,
    "int8": np.ones(3, np.int8),
    "float8": np.ones(3, jnp.float8_e5m2),
    "a key": KEY,
    "a shape": STRUCT,
    "a function": lambda *_: None,
    "a type": list,
    "a state": STATE,
    "params": PARAMS,
    "nothing": (),
}


def grid(functions):
    """Calls with one argument of a wrong kind, by the name of function and argument."""
    return {
        f"{name}({argument})": lambda value, call=call, argument=argument: call(**{argument: value})()
        for name, (call, arguments) in functions.items()
        for argument in arguments
    }


def fields(argument, call, of):
    """Calls with one field of a NamedTuple of a wrong kind."""
    return {
        f"{argument}.{field}": lambda value, field=field: call(**{argument: of._replace(**{field: value})})()
        for field in of._fields
    }


SHARED = ("params", "state", "x", "epsilon", "feature_axis", "mask", "activation")
CALLS = {
    **grid(
        {
            "batch_norm": (norm, (*SHARED, "train", "momentum", "axis_name", "axis_index_groups", "ghost_batch_size")),
            "batch_renorm": (renorm, ("r_max", "d_max", "running_var")),
            "normalize": (normalize, SHARED),
            "moments": (moments, ("x", "feature_axis", "mask", "axis_name", "axis_index_groups")),
            "update": (update, ("state", "moments", "momentum", "running_var")),
            "fold": (fold, ("params", "state", "kernel", "bias", "epsilon", "output_axis")),
            "init": (partly(jbn.init, features=3), ("features",)),
            "r_max": (partly(jbn.renorm.r_max), ("limit", "begin", "end")),
            "warmup": (partly(jbn.momentum.warmup), ("momentum",)),
            "debiased": (partly(jbn.momentum.debiased), ("momentum",)),
            "from_torch": (partly(jbn.momentum.from_torch), ("momentum",)),
            "per_microbatch": (partly(jbn.momentum.per_microbatch, momentum=0.9), ("microbatches",)),
            "linen": (linen, ("x", "mask")),
            "nnx": (nnx, ("x", "mask", "flag")),
        }
    ),
    **fields("params", norm, PARAMS),
    **fields("state", norm, STATE),
}


@pytest.mark.parametrize("call", CALLS)
def test_no_error_of_another_library_reaches_the_user(call):
    ours = raises.statements()

    def discarded(value):
        CALLS[call](value)

    for kind, value in KINDS.items():
        try:
            # Every check is of shapes, dtypes and Python values, so that nothing has to be compiled.
            jax.eval_shape(functools.partial(discarded, value))
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            assert (last.filename, last.lineno) in ours, kind
            assert "`" in str(error)
