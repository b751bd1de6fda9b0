"""Norms inside jax.shard_map: compared with lax.pmean of means, and with arguments that differ over devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from support import reference
from support.compilation import compiled
from support.tolerances import assert_close
from support.transforms import devices_of

import jbn

pytestmark = pytest.mark.devices(8)


def pmean_variance(x, mask):
    """The variance as in common examples: E[x**2] - E[x]**2, with equal weights of the devices in both means."""
    w = mask[:, None].astype(jnp.float32)
    n = jnp.maximum(w.sum(0, keepdims=True), 1.0)
    x = jnp.where(mask[:, None], x, 0.0)
    mean = jax.lax.pmean(x.sum(0, keepdims=True) / n, "devices")
    return (jax.lax.pmean((x * x).sum(0, keepdims=True) / n, "devices") - mean * mean)[0]


def our_variance(x, mask):
    return jbn.moments(x, mask=mask, axis_name="devices").var


@functools.cache
def on_devices(variance):
    mesh, split = devices_of({"devices": 8}), P("devices")
    return jax.jit(jax.shard_map(variance, mesh=mesh, in_specs=(split, split), out_specs=P()))


def test_pmean_of_means_agrees_where_parts_are_even_and_near_zero(rng):
    x, mask = rng.normal(size=(64, 3)).astype(np.float32), np.ones(64, bool)
    assert_close(on_devices(pmean_variance)(x, mask), on_devices(our_variance)(x, mask))


@pytest.mark.parametrize("case", ["uneven", "empty", "far from zero"])
def test_pmean_of_means_is_wrong_elsewhere(rng, case):
    x, mask = rng.normal(size=(64, 3)).astype(np.float32), np.ones(64, bool)
    x += np.arange(64, dtype=np.float32)[:, None] // 8
    if case == "uneven":
        mask[:15] = np.arange(15) % 8 == 0
    if case == "empty":
        mask[:8] = False
    if case == "far from zero":
        x += 1e4
    expected = reference.batch_norm(x, mask=mask).var
    assert_close(on_devices(our_variance)(x, mask), expected)
    assert np.max(np.abs(on_devices(pmean_variance)(x, mask) / expected - 1)) > 0.02


@pytest.mark.parametrize(
    ("varying", "axis_name", "activation"),
    [
        ("params", None, jax.nn.gelu),
        ("mask", None, jax.nn.relu),
        ("mask", "devices", jax.nn.gelu),
        ("x", None, None),
        ("x", "devices", jax.nn.relu),
        ("shortcut", None, jax.nn.relu),
        ("shortcut", "devices", jax.nn.silu),
    ],
)
def test_values_that_differ_over_devices_raise_no_error_and_give_finite_gradients(rng, varying, axis_name, activation):
    """With check_vma, JAX refuses to combine values that differ over devices with others, unless they are cast."""
    x = rng.normal(size=(16, 3)).astype(np.float32)
    own = np.arange(1, 9, dtype=np.float32)
    valid = np.arange(16) % 5 > 0

    def loss(x, own, valid):
        bias = jnp.broadcast_to(own if varying == "params" else jnp.float32(1), 3)
        shortcut = jnp.broadcast_to(own, x.shape) if varying == "shortcut" else None
        out, _ = jbn.batch_norm(
            jbn.Params(None, bias),
            jbn.init(3)[1],
            x,
            True,
            mask=valid if varying == "mask" else None,
            axis_name=axis_name,
            activation=activation,
            shortcut=shortcut,
        )
        return jax.lax.psum(jnp.sum(out**3), "devices")

    def one_device(x, own, valid):
        if varying == "x":
            return jax.grad(lambda scale: loss(x * scale, own[0], valid))(jnp.ones((1, 3)))
        return jax.grad(loss)(x, own[0], valid)

    split = {"params": (P(), P("devices"), P()), "mask": (P(), P(), P("devices"))}
    specs = split.get(varying, (P("devices"), P("devices"), P()))
    if varying == "mask":
        x = x[:2]
    out_spec = P("devices") if varying == "shortcut" else P()
    mapped = jax.shard_map(one_device, mesh=devices_of({"devices": 8}), in_specs=specs, out_specs=out_spec)
    assert bool(jnp.all(jnp.isfinite(compiled(mapped)(x, own, valid))))


def test_shared_statistics_take_half_precision_params(rng):
    params, state = jbn.Params(*jnp.asarray(rng.normal(size=(2, 3)), jnp.float16)), jbn.init(3)[1]
    split, x = P("d"), jnp.asarray(rng.normal(size=(16, 3)), jnp.float32)

    def gradients(params, x):
        out, backward = jax.vjp(lambda *p: jbn.batch_norm(jbn.Params(*p), state, x, True, axis_name="d")[0], *params)
        return out, backward(jnp.ones_like(out))

    @jax.jit
    def both(params, *inputs):
        mapped = jax.shard_map(gradients, mesh=devices_of({"d": 8}), in_specs=(P(), split), out_specs=(split, P()))
        return [mapped(params, x) for x in inputs]

    for dtype, (out, (dscale, dbias)) in zip(
        ("float32", "float16"),
        both(params, x, x.astype(jnp.float16)),
        strict=True,
    ):
        assert out.dtype == dtype
        assert dscale.dtype == dbias.dtype == jnp.float16
        np.testing.assert_array_equal(dbias, [16, 16, 16])


def test_unbiased_variance_of_shards_of_different_sizes(rng):
    """The squared deviations of all values are divided by their total number minus one."""
    sizes = np.array([1, 0, 2, 30, 3, 9, 1, 100])
    means = 10.0 ** np.arange(-4, 4)
    x = (rng.normal(size=(8, 100, 3)) * means[:, None, None] + means[:, None, None]).astype(np.float32)
    mask = np.arange(100) < sizes[:, None]
    params, state = jbn.init(3)

    def norm(x, mask):
        options = {"mask": mask, "momentum": 0.0, "running_var": "unbiased", "axis_name": "d"}
        return jbn.batch_norm(params, state, x, True, **options)[1]

    split = P("d")
    mapped = jax.shard_map(norm, mesh=devices_of({"d": 8}), in_specs=(split, split), out_specs=P())
    new_state = jax.jit(mapped)(x, mask)
    valid = x[mask].astype(np.float64)
    assert_close(new_state.mean, valid.mean(0), scale=np.abs(valid).max())
    assert_close(new_state.var, valid.var(0, ddof=1))


def test_no_examples_on_any_device_change_nothing():
    params, state = jbn.init(3)

    def norm(x):
        out, backward, new_state = jax.vjp(
            lambda x: jbn.batch_norm(params, state, x, True, axis_name="d"), x, has_aux=True
        )
        return backward(out)[0], new_state

    mapped = jax.shard_map(norm, mesh=devices_of({"d": 8}), in_specs=P("d"), out_specs=(P("d"), P()))
    dx, new_state = jax.jit(mapped)(jnp.zeros((0, 2, 3)))
    assert dx.shape == (0, 2, 3)
    jax.tree.map(np.testing.assert_array_equal, new_state, state)
