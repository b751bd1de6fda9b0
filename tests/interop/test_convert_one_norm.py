"""Round trips of one norm are equal bit for bit, in every library and dtype; other arrays give one error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.conversion import assert_bit_equal
from support.refusals import Refused, assert_refused

import jbn
from jbn import convert
from jbn.convert import from_nnx, from_torch, to_keras, to_linen, to_torch

TWO = np.ones(2, np.float32)
NORM = jbn.init(2)
TORCH = {"running_mean": TWO, "running_var": TWO}


@pytest.mark.parametrize("library", ["torch", "keras", "linen", "nnx"])
def test_a_norm_comes_back_with_or_without_scale_and_bias(library):
    three = jnp.full(2, 3.0)
    state = jbn.State(jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0]), jnp.full(2, 5.0))
    options = {"with_count": True} if library in ("linen", "nnx") else {}
    given = {"count": 5} if library == "keras" else {}
    for params in (jbn.Params(None, None), jbn.Params(three, None), jbn.Params(None, three), jbn.Params(three, three)):
        arrays = getattr(convert, f"to_{library}")(params, state, **options)
        back = getattr(convert, f"from_{library}")(arrays, **given)
        expected = params
        if library == "torch" and params != jbn.Params(None, None):
            # PyTorch has both scale and bias, or neither.
            ones_and_zeros = jnp.ones(2), jnp.zeros(2)
            expected = jbn.Params(*(d if v is None else v for v, d in zip(params, ones_and_zeros, strict=True)))
        assert jax.tree.structure(back) == jax.tree.structure((expected, state)), params
        jax.tree.map(np.testing.assert_array_equal, back, (expected, state))


def test_half_precision_keeps_its_params_and_has_float32_statistics():
    for dtype in (jnp.bfloat16, np.float16):
        stored = {name: np.array([0.1, 0.2], dtype) for name in ("weight", "bias", *TORCH)}
        params, state = from_torch(stored)
        assert (params.scale.dtype, state.mean.dtype, state.var.dtype) == (dtype, jnp.float32, jnp.float32)
        back = to_torch(params, state)
        # NumPy has no bfloat16.
        assert back["weight"].dtype == (np.float16 if dtype == np.float16 else np.float32)
        for name, array in stored.items():
            np.testing.assert_array_equal(back[name], array.astype(np.float32))


def test_float64_comes_back_where_jax_has_it(x64, rng):
    entries = {"running_mean": rng.normal(size=3), "running_var": rng.random(3), "num_batches_tracked": np.int64(4)}
    assert_bit_equal(to_torch(*from_torch(entries)), entries)


def test_what_is_written_to_an_array_later_does_not_reach_jbn():
    mean = TWO.copy()
    _, state = from_torch({**TORCH, "running_mean": mean})
    mean[:] = 7
    np.testing.assert_array_equal(state.mean, TWO)


def test_what_is_written_for_torch_and_keras_may_be_written_to():
    for write in (to_torch, to_keras):
        assert all(array.flags.writeable for array in write(*NORM).values())


def test_a_count_by_feature_is_kept_by_flax_and_is_the_largest_in_pytorch():
    params, state = NORM[0], NORM[1]._replace(count=jnp.array([2.0, 6.5]))
    for library in ("linen", "nnx"):
        arrays = getattr(convert, f"to_{library}")(params, state, with_count=True)
        np.testing.assert_array_equal(getattr(convert, f"from_{library}")(arrays)[1].count, [2, 6.5])
    assert to_torch(params, state)["num_batches_tracked"] == 7
    np.testing.assert_array_equal(from_torch(to_torch(params, state))[1].count, [7, 7])


def test_a_state_without_a_count_is_written_without_one():
    params, state = NORM[0], NORM[1]._replace(count=None)
    assert to_torch(params, state)["num_batches_tracked"] == 0
    assert "count" not in to_linen(params, state, with_count=True)["batch_stats"]


NO_UPDATES = "which is not a number of updates"
REFUSED = {
    "no mapping": Refused(lambda: from_torch(TWO), TypeError, "entries", "a ndarray", "with the names weight, bias"),
    "missing": Refused(
        lambda: from_torch({"running_mean": TWO}), ValueError, "running_var", "is missing", "batch norm in PyTorch"
    ),
    "extra": Refused(
        lambda: from_torch({**TORCH, "gamma": TWO}), ValueError, "gamma", "is extra", "a norm has weight, bias"
    ),
    "misshaped": Refused(
        lambda: from_nnx({"mean": TWO, "var": TWO[:1]}), ValueError, "var", "has shape (1,)", "not (2,) as `mean`"
    ),
    "integers": Refused(
        lambda: from_nnx({"mean": TWO, "var": np.ones(2, int)}), ValueError, "var", "has dtype int32", "not a float one"
    ),
    "no array": Refused(
        lambda: from_nnx({"mean": TWO, "var": "a"}), ValueError, "var", "is a str", "those of a batch norm in Flax"
    ),
    "float64": Refused(
        lambda: from_torch({**TORCH, "weight": np.ones(2)}),
        ValueError,
        "weight",
        "is float64, which jax truncates to float32",
        "convert it first, or",
    ),
    "a stored count below 0": Refused(
        lambda: from_nnx({"mean": TWO, "var": TWO, "count": -3}), ValueError, "count", "is -3", NO_UPDATES
    ),
    "a stored count of nan": Refused(
        lambda: from_torch({**TORCH, "num_batches_tracked": np.array(np.nan)}),
        ValueError,
        "num_batches_tracked",
        "is nan",
        NO_UPDATES,
    ),
    "a stored count of other features": Refused(
        lambda: from_nnx({"mean": TWO, "var": TWO, "count": np.ones(3)}),
        ValueError,
        "count",
        "has shape (3,)",
        "not (2,) or ()",
    ),
    "count a float": Refused(lambda: from_torch(TORCH, count=1.5), TypeError, "count", "is 1.5", "expected an int"),
    "count below 0": Refused(
        lambda: from_torch(TORCH, count=-1), ValueError, "count", "is -1", "expected 0 to 2147483647"
    ),
    "count above int32": Refused(
        lambda: from_torch(TORCH, count=2**31), ValueError, "count", "is 2147483648", "expected 0 to 2147483647"
    ),
    "to PyTorch from a dict": Refused(
        lambda: to_torch(TORCH, NORM[1]), TypeError, "params", "is a dict", "jbn.Params(scale, bias)"
    ),
    "to Linen, swapped": Refused(
        lambda: to_linen(*NORM[::-1]), TypeError, "params", "is a State", "jbn.Params(scale, bias)"
    ),
    "to Keras without a state": Refused(
        lambda: to_keras(NORM[0], None), TypeError, "state", "is a NoneType", "jbn.State(mean, var, count)"
    ),
}


def test_arrays_and_counts_that_are_no_norm_are_refused():
    assert_refused(REFUSED)
