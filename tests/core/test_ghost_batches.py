"""Ghost batches: each group of examples is normalized on its own; the running statistics take the whole batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import reference
from support.programs import batch_norm
from support.refusals import Refused, assert_refused, jitted, partly
from support.tolerances import assert_close

import jbn

PARAMS, STATE = jbn.init(3)
norm = partly(jbn.batch_norm, params=PARAMS, state=STATE, x=np.ones((8, 3), np.float32), train=True)


def exported(call):
    """Export a call for a symbolic number of examples."""
    (size,) = jax.export.symbolic_shape("b")
    return lambda: jax.export.export(jax.jit(lambda x: call(x=x)))(jax.ShapeDtypeStruct((size, 3), jnp.float32))


SIZE = "ghost_batch_size"
REFUSED = {
    "no divisor": Refused(norm(ghost_batch_size=3), ValueError, SIZE, "is 3", "expected a divisor of 8"),
    "0": Refused(norm(ghost_batch_size=0), ValueError, SIZE, "is 0", "expected a divisor of 8"),
    "a float": Refused(norm(ghost_batch_size=2.0), TypeError, SIZE, "is 2.0", "an int or None"),
    "a flag": Refused(norm(ghost_batch_size=True), TypeError, SIZE, "is True", "an int or None"),
    "traced": Refused(jitted(norm(), ghost_batch_size=2), TypeError, SIZE, "Trace", "expected an int or None"),
    "of features": Refused(
        norm(x=np.ones((3, 8), np.float32), feature_axis=0, ghost_batch_size=1), ValueError, SIZE, "(0,)", "move the"
    ),
    "of any number of examples": Refused(
        exported(norm(ghost_batch_size=2)), ValueError, SIZE, "x has shape (b, 3)", "a batch of known"
    ),
}


def test_sizes_that_do_not_divide_the_batch_are_refused():
    assert_refused(REFUSED, also_traced=True)


@pytest.mark.parametrize(
    ("size", "masked"),
    [(1, "not"), (6, "not"), (2, "by row"), (12, "by row"), (1, "by feature"), (6, "by feature")],
)
def test_ghost_batches_are_normalized_on_their_own(rng, size, masked):
    x = (rng.normal(size=(12, 4, 3)) + np.arange(12)[:, None, None]).astype(np.float32)
    mask = rng.random((12, 4) if masked == "by row" else x.shape) < 0.7 if masked != "not" else None
    params = jbn.Params(*rng.normal(size=(2, 3)).astype(np.float32))
    out, state = batch_norm(params, jbn.init(3)[1], x, True, momentum=0.0, ghost_batch_size=size, mask=mask)
    for start in range(0, 12, size):
        group = slice(start, start + size)
        part = reference.batch_norm(x[group], *params, mask=mask if mask is None else mask[group])
        assert_close(out[group], part.out, scale=20)
    whole = reference.batch_norm(x, mask=mask)
    assert_close(state.mean, whole.mean)
    assert_close(state.var, whole.var)


def test_a_nan_in_one_ghost_batch_leaves_the_others_clean_and_the_state_of_its_feature(rng):
    x = rng.normal(size=(8, 3)).astype(np.float32)
    expected = reference.batch_norm(x)
    x[0, 0] = np.nan
    out, state = batch_norm(*jbn.init(3), x, True, momentum=0.0, ghost_batch_size=4)
    assert np.isnan(out[:4, 0]).all()
    assert np.isfinite(out[4:]).all() and np.isfinite(out[:, 1:]).all()
    np.testing.assert_array_equal(jnp.stack(state)[:, 0], [0, 1, 0])
    assert_close(jnp.stack(state)[:2, 1:], np.stack(expected[1:3])[:, 1:])
    np.testing.assert_array_equal(state.count, [0, 1, 1])
