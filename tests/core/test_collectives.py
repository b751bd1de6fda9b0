"""Statistics shared over devices and lanes equal those of the whole batch on one device."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from support import reference
from support.tolerances import assert_close, assert_rounded
from support.transforms import MAPPED, TRANSFORMS, devices_of, step

import jbn
from jbn import _collectives

DEVICES = {"devices": 8}
GRID = {"rows": 4, "columns": 2}
LANES = {"devices": 8, "lanes": 4}
"""Places by axis; in the last they are too many to send their parts whole."""


@pytest.fixture(scope="module")
def mesh():
    return devices_of(DEVICES)


def make_batch(rng, dtype, valid, center):
    """32 examples in order of their means, so that shards differ; what is not valid is NaN."""
    x = rng.normal(size=(32, 5, 3)) + center + np.arange(32)[:, None, None]
    mask = None if valid == "all" else rng.random((32, 5)) < 0.3
    if valid == "an empty shard":
        mask[:4] = mask[-4:] = False
    if valid == "nothing":
        mask[:] = False
    if mask is not None:
        x[~mask] = np.nan
    cotangent = rng.normal(size=x.shape)
    return jnp.asarray(x, dtype), mask, jnp.asarray(cotangent, dtype)


def members(group, array, places):
    """The part of an array that the places of a group hold."""
    return None if array is None else np.concatenate([np.split(np.asarray(array), places)[place] for place in group])


def assert_whole(result, params, x, mask, cotangent, groups, places):
    """Each group equals its own batch on one device, in float64: output, state on all its places, gradients."""
    dtype = x.dtype.name
    x, cotangent = np.asarray(x, np.float64), np.asarray(cotangent, np.float64)
    total = jbn.Params(0, 0)
    for group in groups:
        own = [members(group, array, places) for array in (x, mask, cotangent)]
        expected = reference.batch_norm(own[0], *params, own[2], mask=own[1])
        total = jbn.Params(total.scale + expected.dscale, total.bias + expected.dbias)
        for actual, value in ((result.out, expected.out), (result.dx, expected.dx)):
            assert actual.dtype == dtype
            if dtype == "float32":
                assert_close(members(group, actual, places), value, scale=5)
            else:
                assert_rounded(members(group, actual, places), value, dtype)
        good = expected.count > 0
        mean, var = reference.update(0, 1, expected, 0.5) if good else (np.zeros(3), np.ones(3))
        held = [place % len(result.new_state.count) for place in group]
        for place in held:
            assert int(result.new_state.count[place]) == good
            assert_close(result.new_state.mean[place], mean)
            assert_close(result.new_state.var[place], var)
            for leaf in result.new_state[:2]:
                np.testing.assert_array_equal(leaf[place], leaf[held[0]])
    for actual, value in zip(result.gradients, total, strict=True):
        assert_close(actual, value, scale=np.abs(cotangent).sum())


CASES = {
    **{f"{name}, one axis": (run, DEVICES, None) for name, run in TRANSFORMS.items()},
    **{f"{name}, two axes": (run, GRID, None) for name, run in TRANSFORMS.items()},
    **{f"{name}, many lanes": (MAPPED[name], LANES, None) for name in ("pmap", "vmap")},
    **{f"{name}, even groups": (run, DEVICES, [[0, 3, 5, 6], [7, 1, 2, 4]]) for name, run in MAPPED.items()},
    **{f"{name}, uneven groups": (run, DEVICES, [[0, 3, 5], [7, 1, 2, 4, 6]]) for name, run in MAPPED.items()},
}


@functools.cache
def built(case):
    """A case's step, and its groups of places."""
    transform, axes, groups = CASES[case]
    places = math.prod(axes.values())
    if groups is None:
        return transform(axes), [list(range(places))], places
    return transform(axes, axis_index_groups=groups), groups, places


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("valid", ["all", "uneven", "an empty shard", "nothing"])
@pytest.mark.parametrize(("dtype", "center"), [("float32", 3), ("float32", 1e4), ("bfloat16", 3), ("bfloat16", 1e4)])
def test_sharded_equals_whole(rng, case, valid, dtype, center):
    run, groups, places = built(case)
    x, mask, cotangent = make_batch(rng, dtype, valid, center)
    params = jbn.Params(*(rng.normal(size=3).astype(np.float32) for _ in range(2)))
    result = run(params, jbn.init(3)[1], x, mask, cotangent)
    assert_whole(result, params, x, mask, cotangent, groups, places)


@pytest.fixture
def two_sums(monkeypatch):
    """As if more places shared than send their parts whole."""
    monkeypatch.setattr(_collectives, "FEW", 0)
    for cache in (built.cache_clear, jax.clear_caches):
        cache()
    yield
    for cache in (built.cache_clear, jax.clear_caches):
        cache()


@pytest.mark.parametrize("case", [case for case in CASES if "jit" not in case and "many" not in case])
@pytest.mark.parametrize("valid", ["all", "an empty shard"])
def test_sharded_equals_whole_by_two_sums(rng, two_sums, case, valid):
    test_sharded_equals_whole(rng, case, valid, "float32", 1e4)


@pytest.mark.parametrize("run", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("options", [{"activation": jax.nn.relu}, {"ghost_batch_size": 2}], ids=["relu", "ghost"])
def test_activation_and_ghost_batches_when_sharded(rng, run, options):
    x = rng.normal(size=(32, 3)).astype(np.float32) + 2
    cotangent = rng.normal(size=x.shape).astype(np.float32)
    params, state = jbn.init(3)
    one_device = jax.jit(functools.partial(step, **options))(params, state, x, None, cotangent)
    many = run(DEVICES, **options)(params, state, x, None, cotangent)
    many = many._replace(new_state=jax.tree.map(lambda leaf: leaf[:1], many.new_state))
    for actual, expected in zip(jax.tree.leaves(many), jax.tree.leaves(one_device), strict=True):
        assert_close(actual, expected, scale=np.abs(cotangent).sum())


@pytest.mark.parametrize("run", TRANSFORMS.values(), ids=TRANSFORMS)
def test_a_nan_on_one_device_keeps_the_state_of_all(rng, run):
    x = rng.normal(size=(32, 3)).astype(np.float32)
    x[5, 1] = np.nan
    _, state = jbn.init(3)
    result = run(DEVICES)(*jbn.init(3), x, None, np.ones_like(x))
    for leaf, expected in zip(result.new_state, state, strict=True):
        np.testing.assert_array_equal(leaf, np.broadcast_to(expected, leaf.shape))
    assert np.isnan(np.asarray(result.out)[:, 1]).all()
    assert np.isfinite(np.asarray(result.out)[:, [0, 2]]).all()


@pytest.mark.parametrize("run", MAPPED.values(), ids=MAPPED)
def test_a_nan_in_one_group_stays_there(rng, run):
    x = rng.normal(size=(32, 3)).astype(np.float32)
    x[5] = np.nan
    result = run(DEVICES, axis_index_groups=[[0, 1, 2, 3], [4, 5, 6, 7]])(*jbn.init(3), x, None, np.ones_like(x))
    assert np.isnan(np.asarray(result.out)[:16]).all()
    assert_close(np.asarray(result.out)[16:], reference.batch_norm(x[16:]).out)
    np.testing.assert_array_equal(result.new_state.count, [0] * 4 + [1] * 4)


def test_batch_spread_over_lanes_alone(rng):
    x = rng.normal(size=(16, 3)).astype(np.float32) + 100
    params, state = jbn.init(3)
    norm = jax.vmap(
        lambda x: jbn.batch_norm(params, state, x, True, momentum=0.0, axis_name="batch"),
        axis_name="batch",
        out_axes=(0, None),
    )
    out, new_state = norm(x)
    expected = reference.batch_norm(x)
    assert_close(out, expected.out)
    assert_close(new_state.var, expected.var)
    batch = jax.vmap(lambda x: jbn.moments(x, axis_name="batch"), axis_name="batch", out_axes=None)(x)
    assert_close(batch.mean, expected.mean)
    assert float(batch.count) == 16


def test_lanes_may_be_masked(rng):
    x = rng.normal(size=(16, 3)).astype(np.float32) + 100
    mask = rng.random(16) < 0.5
    params, state = jbn.init(3)
    norm = jax.vmap(lambda x, m: jbn.batch_norm(params, state, x, True, mask=m, axis_name="batch"), axis_name="batch")
    out, _ = norm(np.where(mask[:, None], x, np.float32(np.nan)), mask)
    assert_close(out, reference.batch_norm(x, mask=mask).out)


def test_groups_of_another_size_than_the_axis():
    norm = functools.partial(jbn.batch_norm, *jbn.init(3), train=True, axis_name="lanes", axis_index_groups=[[0, 1]])
    with pytest.raises(ValueError, match=r"`axis_index_groups` is \[\[0, 1\]\], which has 2 places.*'lanes' has 4"):
        jax.vmap(lambda x: norm(x=x), axis_name="lanes")(jnp.ones((4, 2, 3)))


def pmean_variance(x, mask, mesh):
    """The variance as common examples share it: E[x^2] - E[x]^2, where each device weighs the same in either mean."""

    def one_device(x, mask):
        w = mask[:, None].astype(jnp.float32)
        n = jnp.maximum(w.sum(0, keepdims=True), 1.0)
        x = jnp.where(mask[:, None], x, 0.0)
        mean = jax.lax.pmean(x.sum(0, keepdims=True) / n, "devices")
        return (jax.lax.pmean((x * x).sum(0, keepdims=True) / n, "devices") - mean * mean)[0]

    return jax.jit(jax.shard_map(one_device, mesh=mesh, in_specs=(P("devices"), P("devices")), out_specs=P()))(x, mask)


def our_variance(x, mask, mesh):
    moments = jax.shard_map(
        lambda x, mask: jbn.moments(x, mask=mask, axis_name="devices"),
        mesh=mesh,
        in_specs=(P("devices"), P("devices")),
        out_specs=P(),
    )
    return jax.jit(moments)(x, mask).var


def test_pmean_of_means_agrees_where_shards_are_even_and_near_zero(mesh, rng):
    x, mask = rng.normal(size=(64, 3)).astype(np.float32), np.ones(64, bool)
    assert_close(pmean_variance(x, mask, mesh), our_variance(x, mask, mesh))


@pytest.mark.parametrize("case", ["uneven", "empty", "far from zero"])
def test_pmean_of_means_is_wrong_elsewhere(mesh, rng, case):
    x, mask = rng.normal(size=(64, 3)).astype(np.float32), np.ones(64, bool)
    x += np.arange(64, dtype=np.float32)[:, None] // 8
    if case == "uneven":
        mask[:15] = np.arange(15) % 8 == 0
    if case == "empty":
        mask[:8] = False
    if case == "far from zero":
        x += 1e4
    expected = reference.batch_norm(x, mask=mask).var
    assert_close(our_variance(x, mask, mesh), expected)
    assert np.max(np.abs(pmean_variance(x, mask, mesh) / expected - 1)) > 0.02


ACTIVATIONS = {"none": None, "relu": jax.nn.relu, "gelu": jax.nn.gelu}


@pytest.mark.parametrize("axis_name", [None, "devices"])
@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
@pytest.mark.parametrize("varying", ["params", "mask", "x", "captured"])
def test_what_varies_without_being_differentiated(mesh, rng, varying, activation, axis_name):
    """Under checked shard_map, values that differ over devices meet others that do not."""
    x = rng.normal(size=(16, 3)).astype(np.float32)
    own = np.arange(1, 9, dtype=np.float32)
    valid = np.arange(16) % 5 > 0

    def loss(x, own, valid):
        bias = jnp.broadcast_to(own if varying == "params" else jnp.float32(1), 3)
        slope = own if varying == "captured" else jnp.float32(2)
        out, _ = jbn.batch_norm(
            jbn.Params(None, bias),
            jbn.init(3)[1],
            x,
            True,
            mask=valid if varying == "mask" else None,
            axis_name=axis_name if varying in ("x", "mask") else None,
            activation=None if activation is None else lambda y: activation(y) * slope,
        )
        return jax.lax.psum(jnp.sum(out**3), "devices")

    def one_device(x, own, valid):
        if varying == "params":
            return jax.grad(loss)(x, own[0], valid)
        if varying == "x":
            return jax.grad(lambda scale: loss(x * scale, own[0], valid))(jnp.ones((1, 3)))
        return jax.grad(loss)(x, own[0], valid)

    split = {"params": (P(), P("devices"), P()), "mask": (P(), P(), P("devices"))}
    specs = split.get(varying, (P("devices"), P("devices"), P()))
    if varying == "mask":
        x = x[:2]
    out_spec = P("devices") if varying == "captured" else P()
    gradient = jax.jit(jax.shard_map(one_device, mesh=mesh, in_specs=specs, out_specs=out_spec))(x, own, valid)
    assert bool(jnp.all(jnp.isfinite(gradient)))


@pytest.mark.parametrize(
    ("places", "center", "spread"),
    [(4, 1e20, 1e-6), (32, 1e20, 1e-6), (4, -1e5, 1e-5), (32, -1e5, 1e-5), (4, 1e37, 0), (32, 1e24, 0)],
)
def test_parts_far_from_zero_and_an_empty_one(rng, places, center, spread):
    """The distance from where nothing is may be beyond the range once it is squared."""
    x = (center * (1 + spread * rng.normal(size=(places, 10, 3)))).astype(np.float32)
    mask = np.broadcast_to(np.arange(places)[:, None] > 0, (places, 10))
    shared = jax.vmap(functools.partial(jbn.moments, axis_name="lanes"), axis_name="lanes")
    found = jax.tree.map(lambda leaf: leaf[-1], jax.jit(lambda x, mask: shared(x, mask=mask))(x, mask))
    expected = reference.batch_norm(x[1:])
    assert_close(found.mean, expected.mean)
    assert_close(found.var, expected.var, scale=(2.0**-24 * center) ** 2)
