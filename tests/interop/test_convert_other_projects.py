"""Weights of other projects: other names and shapes, leaves to ignore, and scales stored as gamma - 1."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.refusals import Refused, assert_refused
from support.tolerances import assert_same_trees

import jbn
from jbn.convert import split

C = 3
GAMMA, BETA, MEAN, VAR = np.random.default_rng(0).uniform(0.5, 2, (4, C)).astype(np.float32)
PLAIN = {"bn.weight": GAMMA, "bn.bias": BETA, "bn.running_mean": MEAN, "bn.running_var": VAR}
EXPECTED = split(PLAIN, "torch")[0]["bn"]


def linen(shape=(C,), **names):
    """Variables of a block with one norm, under the names of the project."""
    arrays = {"scale": GAMMA, "bias": BETA, "mean": MEAN, "var": VAR}
    named = {names.get(field, field): jnp.asarray(array).reshape(shape) for field, array in arrays.items()}
    params, statistics = (dict(list(named.items())[part]) for part in (slice(2), slice(2, 4)))
    return {"params": {"block": {"bn": params}}, "batch_stats": {"block": {"bn": statistics}}}


@pytest.mark.parametrize("shape", [(1, 1, 1, C), (C, 1, 1), (1, C)])
def test_axes_of_size_1_are_dropped_where_asked_for(shape):
    norms, _ = split(linen(shape), "linen", squeeze=True)
    assert_same_trees(norms["block/bn"], EXPECTED)


def test_squeezed_one_feature_keeps_its_axis_and_a_stack_its_layers():
    one = {f"bn.{name}": np.ones((1, 1, 1), np.float32) for name in ("running_mean", "running_var")}
    assert split(one, "torch", squeeze=True)[0]["bn"][1].mean.shape == (1,)
    counted = {**one, "bn.num_batches_tracked": np.int64(7)}
    np.testing.assert_array_equal(split(counted, "torch", squeeze=True)[0]["bn"][1].count, [7])
    stack = {f"bn.{name}": np.ones((2, 1, 1, C), np.float32) for name in ("running_mean", "running_var")}
    assert split(stack, "torch", squeeze=True)[0]["bn"][1].mean.shape == (2, C)


def test_other_names_are_renamed_by_parts_or_by_a_function():
    tree = linen(scale="gamma", bias="beta", mean="mean_ema", var="var_ema")
    parts = {"gamma": "scale", "beta": "bias", "mean_ema": "mean", "var_ema": "var"}
    by_parts, rest = split(tree, "linen", rename=parts)
    assert_same_trees(by_parts["block/bn"], EXPECTED)
    assert rest == {"params": {"block": {"bn": {}}}, "batch_stats": {"block": {"bn": {}}}}

    def whole(path):
        *above, name = path.split("/")
        return "/".join([*above, parts.get(name, name)])

    by_function, _ = split(tree, "linen", rename=whole)
    assert_same_trees(by_function["block/bn"], EXPECTED)
    flat = {f"module.{name.replace('running_', 'moving_')}": leaf for name, leaf in PLAIN.items()}
    renamed, _ = split(flat, "torch", rename=lambda path: path.removeprefix("module.").replace("moving_", "running_"))
    assert_same_trees(renamed["bn"], EXPECTED)
    prefixed = {f"module.{name}": leaf for name, leaf in PLAIN.items()}
    assert_same_trees(split(prefixed, "torch", rename={"module": ""})[0]["bn"], EXPECTED)


def test_what_is_not_used_is_listed_or_ignored():
    tree = {**PLAIN, "bn.steps": np.int64(7), "head.bn.running_mean": MEAN}
    with pytest.raises(ValueError, match=r"(?s)`steps` is extra.*head\.bn: `running_var` is missing"):
        split(tree, "torch")
    norms, rest = split(tree, "torch", ignore=["*.steps", "head.*"])
    assert_same_trees(norms, {"bn": EXPECTED})
    assert rest == {}
    assert_same_trees(split({**PLAIN, "bn.steps": 7}, "torch", ignore="bn.steps")[0], {"bn": EXPECTED})


def test_scales_that_are_stored_without_their_1_come_back_whole():
    stored = {**PLAIN, "bn.weight": GAMMA - 1}
    norms, _ = split(stored, "torch", scale_offset=1.0)
    np.testing.assert_allclose(norms["bn"][0].scale, GAMMA, rtol=1e-6)
    unscaled = {name: leaf for name, leaf in PLAIN.items() if "running" in name}
    assert split(unscaled, "torch", scale_offset=1.0)[0]["bn"][0].scale is None


def test_an_offset_is_added_in_float32():
    stored = {name: jnp.asarray(leaf, jnp.bfloat16) for name, leaf in PLAIN.items()}
    stored["bn.weight"] = jnp.full(C, 0.003, jnp.bfloat16)
    scale = split(stored, "torch", scale_offset=1.0)[0]["bn"][0].scale
    np.testing.assert_allclose(scale, 1.003, rtol=1e-5)


def test_complex_statistics_are_taken_out_and_put_back():
    norm = jbn.linen.BatchNorm(use_running_average=False, param_dtype=jnp.complex64)
    variables = norm.init(jax.random.key(0), jnp.ones((4, C), jnp.complex64))
    norms, rest = split(variables, "linen")
    assert norms[""][1].mean.dtype == jnp.complex64
    assert_same_trees(jbn.convert.join(norms, rest, "linen"), dict(variables))


def test_renamed_places_of_a_sequence_stay_places():
    model = nnx.Sequential(nnx.Linear(3, C, rngs=nnx.Rngs(0)), jbn.nnx.BatchNorm(C, rngs=nnx.Rngs(0)))
    theirs = {"blocks": nnx.to_pure_dict(nnx.state(model))["layers"]}
    nnx.update(model, jbn.convert.join(*split(theirs, "nnx", rename={"blocks": "layers"}), "nnx"))
    assert_same_trees(nnx.to_pure_dict(nnx.state(model))["layers"], theirs["blocks"])


def test_scales_that_all_lie_around_0_are_warned_of():
    def scaled(*scales):
        return {
            f"{number}.{name}": scale if name == "weight" else np.ones_like(scale)
            for number, scale in enumerate(scales)
            for name in ("weight", "bias", "running_mean", "running_var")
        }

    around, zero, positive = np.float32([0.1, -0.2] * 8), np.zeros(16, np.float32), np.full(16, 0.2, np.float32)
    for tree in (scaled(around, around), scaled(zero)):
        with pytest.warns(UserWarning, match=r"scale_offset=1\.0"):
            split(tree, "torch")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # The last norm of a residual branch often starts from 0.
        split(scaled(zero, positive), "torch")
        split(scaled(around), "torch", scale_offset=1.0)
        split(scaled(around[:3]), "torch")
        split({name: leaf for name, leaf in PLAIN.items() if "running" in name}, "torch")


def splitting(tree, library="torch", **options):
    return lambda: split(tree, library, **options)


REFUSED = {
    "rename to nothing": Refused(
        splitting(PLAIN, rename=lambda path: None), TypeError, "rename", "gives None for bn.weight", "expected a path"
    ),
    "rename a list": Refused(splitting(PLAIN, rename=["a"]), TypeError, "rename", "is ['a']", "a mapping from parts"),
    "two of one name": Refused(
        splitting(PLAIN, rename=lambda path: "a"), ValueError, "rename", "maps both bn.weight", "a path for each"
    ),
    "below a leaf": Refused(
        splitting({"a": {"b": 1}, "c": 2}, "linen", rename={"c": "a/b/c"}), ValueError, "rename", "puts c", "of its own"
    ),
    "in place of others": Refused(
        splitting({"a": {"b": 1}, "c": 2}, "linen", rename={"c": "a"}),
        ValueError,
        "rename",
        "puts c where other",
        "own",
    ),
    "rename a pair": Refused(
        splitting(({}, {}), "haiku", rename={"a": "b"}), ValueError, "rename", "is 'haiku'", "change its paths first"
    ),
    "ignore": Refused(splitting(PLAIN, ignore=3), TypeError, "ignore", "is 3", "patterns of paths"),
    "squeeze": Refused(splitting(PLAIN, squeeze="no"), TypeError, "squeeze", "is 'no'", "True (drop axes"),
    "rename to a number": Refused(
        splitting(PLAIN, rename={"bn": 3}), TypeError, "rename", "is {'bn': 3}", "a str for each part"
    ),
    "ignore a number": Refused(splitting(PLAIN, ignore=[3]), TypeError, "ignore", "is [3]", "patterns of paths"),
    "offset": Refused(splitting(PLAIN, scale_offset="1"), TypeError, "scale_offset", "is '1'", "a number, 1.0"),
    "no such part": Refused(
        splitting(PLAIN, rename={"bn.weight": "scale"}),
        ValueError,
        "rename",
        "has 'bn.weight'",
        "complete parts such as",
    ),
    "several axes": Refused(
        splitting({name: leaf[None, :, None, None] for name, leaf in PLAIN.items()}),
        ValueError,
        "running_mean",
        "has shape (1, 3, 1, 1)",
        "squeeze=True",
    ),
    "shape": Refused(
        splitting({**PLAIN, "bn.weight": GAMMA[None]}), ValueError, "weight", "has shape (1, 3)", "squeeze=True drops"
    ),
}


def test_options_of_another_kind_are_refused():
    assert_refused(REFUSED)
