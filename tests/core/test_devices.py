"""Statistics shared over devices and vmap lanes equal the statistics of the whole batch on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from support import reference
from support.refusals import Refused, assert_refused, partly
from support.tolerances import assert_close
from support.transforms import TRANSFORMS, devices_of
from support.whole_batch import EIGHT, EVEN, assert_each_batch_is_whole, built, each, make_batch, members

import jbn

AUTOMATIC = "jit, automatic sharding"
GROUPED = [f"{name}, even groups" for name in ("shard_map", "shard_map, unchecked", "vmap")]


@each(*TRANSFORMS, "shard_map, two axes, relu", "vmap, many lanes, relu", *GROUPED, "shard_map, uneven groups")
def test_shared_statistics_with_a_mask_equal_those_of_the_whole_batch(rng, case):
    """Uneven parts, two of them empty, far from 0; uneven parts near 0; and no valid value on any device."""
    assert_each_batch_is_whole(rng, case, "float32", [("an empty part", 1e4), ("uneven", 3), ("nothing", 3)])


@each("shard_map", "shard_map, uneven groups", "vmap", "pmap, two axes", "jit, explicit sharding, relu")
def test_shared_statistics_without_a_mask_equal_those_of_the_whole_batch(rng, case):
    assert_each_batch_is_whole(rng, case, "float32", [("all", 1e4), ("all", 3)])


@each("shard_map", "vmap, even groups", "pmap, two axes", AUTOMATIC, "jit, explicit sharding")
def test_a_mask_by_feature_over_devices_is_that_of_the_whole_batch(rng, case):
    """One feature has no valid value on some devices, and one has none on any device."""
    assert_each_batch_is_whole(rng, case, "float32", [("by feature", 1e4)])


@each("shard_map", "pmap, uneven groups", AUTOMATIC)
def test_shared_statistics_of_bfloat16_equal_those_of_the_whole_batch(rng, case):
    assert_each_batch_is_whole(rng, case, "bfloat16", [("an empty part", 1e4), ("uneven", 3), ("nothing", 3)])


@each("shard_map", AUTOMATIC)
def test_ghost_batches_share_the_running_statistics_alone(rng, case):
    x = rng.normal(size=(32, 3)).astype(np.float32) + 2
    cotangent = rng.normal(size=x.shape).astype(np.float32)
    result = TRANSFORMS[case](EIGHT, ghost_batch_size=2)(*jbn.init(3), x, None, cotangent)
    cuts = zip(np.split(x, 16), np.split(cotangent, 16), strict=True)
    ghosts = [reference.batch_norm(part, cotangent=own) for part, own in cuts]
    out, dx = (np.concatenate([getattr(ghost, field) for ghost in ghosts]) for field in ("out", "dx"))
    assert_close(result.out, out, scale=5)
    assert_close(result.dx, dx, scale=np.abs(dx).max())
    for gradient, field in zip(result.gradients, ("dscale", "dbias"), strict=True):
        assert_close(gradient, sum(getattr(ghost, field) for ghost in ghosts), scale=np.abs(cotangent).sum())
    mean, var = reference.update(0, 1, reference.batch_norm(x), 0.5)
    assert_close(result.new_state.mean[0], mean)
    assert_close(result.new_state.var[0], var)


def join(params, x, shortcut, cotangent, *, activation, axis_name):
    """Output, and gradients in params, x and the shortcut."""

    def norm(params, x, shortcut):
        options = {"activation": activation, "shortcut": shortcut, "axis_name": axis_name}
        return jbn.batch_norm(params, jbn.init(3)[1], x, True, **options)[0]

    out, backward = jax.vjp(norm, params, x, shortcut)
    return out, backward(cotangent)


@pytest.mark.devices(8)
@pytest.mark.parametrize("activation", [jax.nn.relu, jnp.tanh])
def test_the_join_of_a_residual_block_over_devices_is_that_of_the_whole_batch(rng, activation):
    params = jbn.Params(*rng.normal(size=(2, 3)).astype(np.float32))
    x, shortcut, cotangent = rng.normal(size=(3, 16, 3)).astype(np.float32)
    mesh, split = devices_of({"d": 8}), P("d")
    mapped = jax.shard_map(
        functools.partial(join, activation=activation, axis_name="d"),
        mesh=mesh,
        in_specs=(P(), split, split, split),
        out_specs=(split, (P(), split, split)),
    )
    out, ((dscale, dbias), dx, dshortcut) = jax.jit(mapped)(params, x, shortcut, cotangent)
    before = reference.batch_norm(x, *params).out + shortcut
    passed = cotangent * ((before > 0) if activation is jax.nn.relu else 1 - np.tanh(before) ** 2)
    expected = reference.batch_norm(x, *params, passed)
    assert_close(out, np.maximum(before, 0) if activation is jax.nn.relu else np.tanh(before), scale=5)
    assert_close(dshortcut, passed, scale=5)
    assert_close(dx, expected.dx, scale=5)
    for gradient, value in ((dscale, expected.dscale), (dbias, expected.dbias)):
        assert_close(gradient, value, scale=np.abs(cotangent).sum())


def batch_with_a_nan(rng, place):
    """A batch with a NaN, and a mask of True values so that the program with a mask is used."""
    x, _, cotangent = make_batch(rng, "float32", "all", 3)
    return x.at[place].set(jnp.nan), np.ones((32, 5), bool), cotangent


@each(*TRANSFORMS)
def test_a_nan_on_one_device_keeps_the_state_of_its_feature_on_all(rng, case):
    params, state = jbn.init(3)
    x, everything, cotangent = batch_with_a_nan(rng, np.s_[20, :, 1])
    result = built(case)(params, state, x, everything, cotangent)
    others, out = [0, 2], np.asarray(result.out)
    mean, var = reference.update(0, 1, reference.batch_norm(x[..., others]), 0.5)
    for leaf, old, expected in zip(result.new_state, state, (mean, var, np.ones(2)), strict=True):
        np.testing.assert_array_equal(leaf[:, 1], np.broadcast_to(old[1], len(leaf)))
        assert_close(leaf[:, others], np.broadcast_to(expected, (len(leaf), 2)))
    assert np.isnan(out[..., 1]).all()
    assert np.isfinite(out[..., others]).all()


@each(*GROUPED)
def test_a_nan_in_one_group_stays_there(rng, case):
    x, everything, cotangent = batch_with_a_nan(rng, np.s_[20])
    result = built(case)(*jbn.init(3), x, everything, cotangent)
    bad, good = EVEN
    assert np.isnan(members(bad, result.out, 8)).all()
    assert_close(members(good, result.out, 8), reference.batch_norm(members(good, x, 8)).out, scale=5)
    np.testing.assert_array_equal(result.new_state.count, np.broadcast_to(np.isin(range(8), good)[:, None], (8, 3)))


def in_lanes(call):
    return lambda: jax.eval_shape(jax.vmap(call, axis_name="lanes", axis_size=2))


PARAMS, STATE = jbn.init(3)
X = np.ones((8, 3), np.float32)
norm = partly(jbn.batch_norm, params=PARAMS, state=STATE, x=X, train=True)
renorm = partly(jbn.batch_renorm, params=PARAMS, state=STATE, x=X, train=True)
moments = partly(jbn.moments, x=X)
SHARING = {
    "unbound": Refused(
        moments(axis_name="devices"), NameError, "axis_name", "is 'devices'", "call inside jax.shard_map, jax.vmap(..."
    ),
    "one of two unbound": Refused(
        in_lanes(norm(axis_name=("lanes", "d"))), NameError, "axis_name", "binds 'd'", "or leave it out"
    ),
    "a number": Refused(norm(axis_name=0), TypeError, "axis_name", "is 0", "the name of a mapped axis, or a tuple of"),
    "a dict": Refused(moments(axis_name={}), TypeError, "axis_name", "is {}", "the name of a mapped axis"),
    "twice": Refused(renorm(axis_name=("a", "a")), ValueError, "axis_name", "('a', 'a')", "name it once"),
    "groups without an axis": Refused(
        norm(axis_index_groups=[[0]]), ValueError, "axis_index_groups", "`axis_name` is None", "name the mapped axis"
    ),
    "groups on two axes": Refused(
        norm(axis_name=("a", "b"), axis_index_groups=[[0]]), ValueError, "axis_index_groups", "('a', 'b')", "one axis"
    ),
    "groups that overlap": Refused(
        norm(axis_name="a", axis_index_groups=[[0, 0]]), ValueError, "axis_index_groups", "is [[0, 0]]", "each index"
    ),
    "groups of none": Refused(
        moments(axis_name="a", axis_index_groups=[]), ValueError, "axis_index_groups", "is []", "each index once"
    ),
    "groups in one list": Refused(
        norm(axis_name="a", axis_index_groups=[0, 1]),
        TypeError,
        "axis_index_groups",
        "is [0, 1]",
        "[[0, 1], [2, 3]]",
    ),
    "groups of too few": Refused(
        in_lanes(norm(axis_name="lanes", axis_index_groups=[[0]])),
        ValueError,
        "axis_index_groups",
        "is [[0]], which has 1 indices, but the axis 'lanes' has size 2",
        "expected each index from 0 to 1 once",
    ),
}


def test_wrong_axis_names_and_groups_are_refused():
    assert_refused(SHARING, also_traced=True)
