"""Any value for an argument is accepted, or jbn itself raises an error that names an argument."""

import functools
import traceback
from pathlib import Path

import flax
import jax
import jax.numpy as jnp
import numpy as np

import jbn

PACKAGE = Path(jbn.__file__).parent
X = np.ones((8, 16, 3), np.float32)
MATRIX = np.ones((8, 3), np.float32)
KEY = jax.random.key(0)
PARAMS, STATE = jbn.init(3)
KINDS = {
    "None": None,
    "a text": "abc",
    "a list": [1.0, 2.0],
    "a ragged list": [[1.0], [2.0, 3.0]],
    "a dict": {"a": 1},
    "a set": {1, 2},
    "texts": np.array(["a", "b", "c"]),
    "a complex": 1j,
    "a type": list,
    "objects": np.array([1.0, None, 2.0]),
    "an int": 3,
    "a negative int": -5,
    "a bool": True,
    "a float": 1.5,
    "int8": np.ones(3, np.int8),
    "a key": KEY,
    "a shape": jax.ShapeDtypeStruct((3,), jnp.float32),
    "a function": lambda *_: None,
    "a state": STATE,
    "params": PARAMS,
    "nothing": (),
}


def with_field(argument, of):
    """batch_norm with one field of a NamedTuple replaced."""

    def call(**given):
        return jbn.batch_norm(**{"params": PARAMS, "state": STATE, argument: of._replace(**given)}, x=X, train=True)

    return call


def linen(**given):
    return jbn.linen.BatchNorm(use_running_average=False).init(KEY, **{"x": MATRIX, **given})


def nnx(**given):
    return jbn.nnx.BatchNorm(3, rngs=flax.nnx.Rngs(0))(**{"x": MATRIX, **given})


NORM = {"params": PARAMS, "state": STATE, "x": X}
TRAINING = {**NORM, "train": True}
SHARED = "params state x epsilon feature_axis mask activation shortcut"
SHARING = "axis_name axis_index_groups"
MOMENTS = jbn.Moments(STATE.mean, STATE.var, np.full(3, 8, np.float32))
KERNEL = np.ones((4, 3), np.float32)
CALLS = [
    # A function, its usual arguments, and the names of the arguments to replace by each of KINDS.
    (jbn.batch_norm, TRAINING, f"{SHARED} {SHARING} train momentum ghost_batch_size"),
    (jbn.batch_renorm, TRAINING, "r_max d_max running_var"),
    (jbn.normalize, NORM, SHARED),
    (jbn.moments, {"x": X}, f"x feature_axis mask {SHARING}"),
    (jbn.update, {"state": STATE, "moments": MOMENTS}, "state moments momentum running_var"),
    (jbn.fold, {"params": PARAMS, "state": STATE, "kernel": KERNEL}, "params state kernel bias epsilon output_axis"),
    (jbn.init, {}, "features"),
    (jbn.renorm.r_max, {}, "limit begin end"),
    (jbn.momentum.warmup, {}, "momentum"),
    (jbn.momentum.debiased, {}, "momentum"),
    (jbn.momentum.from_torch, {}, "momentum"),
    (jbn.momentum.per_microbatch, {"momentum": 0.9}, "microbatches"),
    (linen, {}, "x mask shortcut"),
    (nnx, {}, "x mask shortcut use_running_average"),
    (with_field("params", PARAMS), {}, " ".join(PARAMS._fields)),
    (with_field("state", STATE), {}, " ".join(STATE._fields)),
]


def foreign_error(call):
    """The error of a call, or None if there is none, or if jbn's own code raises it and it names an argument."""

    def without_result():
        call()

    try:
        # The checks need only shapes, dtypes and Python values, so nothing has to be compiled.
        jax.eval_shape(without_result)
    except Exception as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        if not raised_in.is_relative_to(PACKAGE) or "`" not in str(error):
            return error
    return None


def test_no_error_of_another_library_reaches_the_user():
    found = []
    for function, usual, arguments in CALLS:
        for argument in arguments.split():
            for kind, value in KINDS.items():
                error = foreign_error(functools.partial(function, **{**usual, argument: value}))
                if error is not None:
                    found.append(f"{function.__name__}({argument}={kind}): {error!r}")
    assert not found, "\n".join(found)
