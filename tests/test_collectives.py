"""Statistics shared over devices and lanes equal those of the whole batch on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tolerances import assert_close

import jbn

DEVICES = 8


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.array(jax.devices()[:DEVICES]), ("devices",))


def whole(params, state, x, mask, cotangent, axis_name=None, **options):
    """Output, new state, and the gradients of x and of params of this shard's share of the loss."""

    def forward(params, x):
        return jbn.batch_norm(params, state, x, True, momentum=0.5, mask=mask, axis_name=axis_name, **options)

    out, backward, new_state = jax.vjp(forward, params, x, has_aux=True)
    return out, new_state, *backward(cotangent)


def under_shard_map(mesh, check_vma):
    def run(params, state, x, mask, cotangent, **options):
        function = functools.partial(whole, axis_name="devices", **options)
        if not check_vma:  # each device then holds the gradient of its own share, to be summed by hand

            def summed(*args):
                out, new_state, gradients, dx = function(*args)
                return out, new_state, jax.lax.psum(gradients, "devices"), dx

            return jax.jit(jax.shard_map(summed, mesh=mesh, in_specs=SPECS, out_specs=OUT_SPECS, check_vma=False))(
                params, state, x, mask, cotangent
            )
        return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=SPECS, out_specs=OUT_SPECS))(
            params, state, x, mask, cotangent
        )

    return run


SPECS = (P(), P(), P("devices"), P("devices"), P("devices"))
OUT_SPECS = (P("devices"), P(), P(), P("devices"))


def under_map(transform):
    def run(params, state, x, mask, cotangent, **options):
        def cut(array):
            return None if array is None else array.reshape(DEVICES, -1, *array.shape[1:])

        function = functools.partial(whole, axis_name="devices", **options)
        out, new_state, gradients, dx = transform(function, axis_name="devices", in_axes=(None, None, 0, 0, 0))(
            params, state, cut(x), cut(mask), cut(cotangent)
        )
        first = jax.tree.map(lambda leaf: leaf[0], new_state)
        for leaf, expected in zip(jax.tree.leaves(new_state), jax.tree.leaves(first), strict=True):
            np.testing.assert_array_equal(leaf, np.broadcast_to(expected, leaf.shape))
        gradients = jax.tree.map(lambda leaf: leaf.sum(0), gradients)
        return out.reshape(x.shape), first, gradients, dx.reshape(x.shape)

    return run


def under_jit(mesh):
    def run(params, state, x, mask, cotangent, **options):
        split = NamedSharding(mesh, P("devices"))
        x, mask, cotangent = jax.device_put((x, mask, cotangent), split)
        return jax.jit(functools.partial(whole, **options))(params, state, x, mask, cotangent)

    return run


TRANSFORMS = {
    "shard_map": lambda mesh: under_shard_map(mesh, check_vma=True),
    "shard_map, unchecked": lambda mesh: under_shard_map(mesh, check_vma=False),
    "pmap": lambda mesh: under_map(jax.pmap),
    "vmap": lambda mesh: under_map(jax.vmap),
    "jit of a sharded batch": under_jit,
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("valid", ["all", "uneven", "an empty shard", "nothing"])
@pytest.mark.parametrize("center", [3, 1e4])
def test_sharded_equals_whole(mesh, rng, transform, valid, center):
    x = (rng.normal(size=(4 * DEVICES, 5, 3)) + center + np.arange(4 * DEVICES)[:, None, None]).astype(np.float32)
    cotangent = rng.normal(size=x.shape).astype(np.float32)
    mask = None if valid == "all" else rng.random((4 * DEVICES, 5)) < 0.3
    if valid == "an empty shard":
        mask[:4] = mask[-4:] = False
    if valid == "nothing":
        mask[:] = False
    if mask is not None:
        x[~mask] = np.nan
    params = jbn.Params(*(rng.normal(size=3).astype(np.float32) for _ in range(2)))
    _, state = jbn.init(3)
    expected = reference.batch_norm(x, *params, cotangent, mask=mask)
    out, new_state, gradients, dx = transform(mesh)(params, state, x, mask, cotangent)
    assert int(new_state.count) == (valid != "nothing")
    mean, var = (np.zeros(3), np.ones(3)) if valid == "nothing" else reference.update(0, 1, expected, 0.5)
    assert_close(new_state.mean, mean)
    assert_close(new_state.var, var)
    assert_close(out, expected.out, scale=5)
    assert_close(dx, expected.dx, scale=5)
    assert_close(gradients.scale, expected.dscale, scale=np.abs(cotangent).sum())
    assert_close(gradients.bias, expected.dbias, scale=np.abs(cotangent).sum())


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_activation_and_ghost_batches_when_sharded(mesh, rng, transform):
    x = rng.normal(size=(4 * DEVICES, 3)).astype(np.float32) + 2
    cotangent = rng.normal(size=x.shape).astype(np.float32)
    params, state = jbn.init(3)
    for options in ({"activation": jax.nn.relu}, {"ghost_batch_size": 2}):
        one_device = jax.jit(functools.partial(whole, **options))(params, state, x, None, cotangent)
        many = transform(mesh)(params, state, x, None, cotangent, **options)
        for a, e in zip(jax.tree.leaves(many), jax.tree.leaves(one_device), strict=True):
            assert_close(a, e, scale=np.abs(cotangent).sum())


def test_a_nan_on_one_device_keeps_the_state_of_all(mesh, rng):
    x = rng.normal(size=(4 * DEVICES, 3)).astype(np.float32)
    x[5, 1] = np.nan
    params, state = jbn.init(3)
    for transform in TRANSFORMS.values():
        _, new_state, _, _ = transform(mesh)(params, state, x, None, np.ones_like(x))
        for leaf, expected in zip(new_state, state, strict=True):
            np.testing.assert_array_equal(leaf, expected)


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


@pytest.mark.parametrize("names", [("a", "b"), ["b", "a"]])
def test_two_axis_names(rng, names):
    x = rng.normal(size=(2, 3, 4, 5)).astype(np.float32) + 10
    norm = functools.partial(jbn.batch_norm, *jbn.init(5), train=True, axis_name=names)
    out, _ = jax.vmap(jax.vmap(lambda x: norm(x=x), axis_name="b"), axis_name="a")(x)
    assert_close(out, reference.batch_norm(x).out)


GROUPS = [[0, 3, 5], [7, 1, 2, 4, 6]]


def members(group, x):
    """The rows that the places of a group hold."""
    return None if x is None else np.concatenate([np.split(x, DEVICES)[place] for place in group])


@pytest.mark.parametrize("transform", ["shard_map", "shard_map, unchecked", "pmap", "vmap"])
@pytest.mark.parametrize("masked", [False, True])
def test_groups_share_among_themselves(mesh, rng, transform, masked):
    x = (rng.normal(size=(4 * DEVICES, 3)) + 100 * np.arange(4 * DEVICES)[:, None]).astype(np.float32)
    cotangent = rng.normal(size=x.shape).astype(np.float32)
    mask = rng.random(4 * DEVICES) < 0.7 if masked else np.ones(4 * DEVICES, bool)
    mask[:4] = not masked

    def run(x, mask, cotangent):
        out, new_state, _, dx = whole(*jbn.init(3), x, mask, cotangent, "devices", axis_index_groups=GROUPS)
        return out, jax.tree.map(lambda leaf: leaf[None], new_state), dx

    if "shard_map" in transform:
        spec = P("devices")
        shared = jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=transform == "shard_map")
        out, new_state, dx = jax.jit(shared)(x, mask, cotangent)
    else:
        cut = [array.reshape(DEVICES, 4, *array.shape[1:]) for array in (x, mask, cotangent)]
        out, new_state, dx = getattr(jax, transform)(run, axis_name="devices")(*cut)
    for group in GROUPS:
        args = [members(group, array) for array in (x, mask, cotangent)]
        expected = reference.batch_norm(args[0], cotangent=args[2], mask=args[1])
        for actual, value in ((out, expected.out), (dx, expected.dx)):
            assert_close(members(group, np.asarray(actual).reshape(x.shape)), value, scale=5)
        mean, var = reference.update(0, 1, expected, 0.5)
        for place in group:
            assert_close(new_state.mean.reshape(DEVICES, 3)[place], mean)
            assert_close(new_state.var.reshape(DEVICES, 3)[place], var)


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
    own = np.arange(1, DEVICES + 1, dtype=np.float32)
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


def all_reduces(compiled):
    text = compiled.as_text()
    for unwanted in ("all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
        assert f" {unwanted}(" not in text, unwanted
    return text.count(" all-reduce(")


@pytest.mark.parametrize("masked", [False, True])
def test_number_of_collectives_under_shard_map(mesh, masked):
    x, mask = jnp.ones((16, 5, 3)), jnp.ones((16, 5), bool) if masked else None
    params, state = jbn.init(3)

    def forward(params, x, mask):
        return jbn.batch_norm(params, state, x, True, mask=mask, axis_name="devices", activation=jax.nn.relu)

    def backward(params, x, mask):
        _, pull, _ = jax.vjp(lambda x: forward(params, x, mask), x, has_aux=True)
        return pull(x)[0]

    specs = (P(), P("devices"), P("devices"))
    for function, out_specs, count in ((forward, (P("devices"), P()), 1), (backward, P("devices"), 2)):
        mapped = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out_specs)
        assert all_reduces(jax.jit(mapped).lower(params, x, mask).compile()) == count


@pytest.mark.parametrize("shape", [(64, 16), (64, 5, 6, 16)])
def test_automatic_sharding_moves_vectors_only(mesh, shape):
    x = jax.device_put(jnp.ones(shape), NamedSharding(mesh, P("devices")))
    compiled = jax.jit(lambda x: jbn.batch_norm(*jbn.init(16), x, True)).lower(x).compile()
    assert all_reduces(compiled) <= 3
