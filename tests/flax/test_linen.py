"""The Linen module: Flax's variables and calls, jbn's numbers, each update made once under every transformation."""

import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from support import reference
from support.tolerances import assert_close

import jbn

KEY = jax.random.key(0)
OPTIONS = {
    "defaults": {},
    "first axis": {"axis": 1},
    "two axes": {"axis": (1, -1)},
    "no scale": {"use_scale": False},
    "no bias": {"use_bias": False},
    "neither": {"use_scale": False, "use_bias": False},
    "half-precision parameters": {"param_dtype": jnp.bfloat16},
    "drawn parameters": {"scale_init": nn.initializers.normal(), "bias_init": nn.initializers.normal()},
}


def images(rng, batch=6, dtype=np.float32):
    return (rng.normal(size=(batch, 4, 3)) * 2 + 1).astype(dtype)


def trained(norm, variables, x, **call):
    out, updated = norm.apply(variables, x, use_running_average=False, mutable=["batch_stats"], **call)
    return out, {**variables, **updated}


@pytest.mark.standard_promotion
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_variables_are_those_of_flax(rng, options):
    x = images(rng)
    ours, flaxs = (
        module(use_running_average=False, **options).init(KEY, x) for module in (jbn.linen.BatchNorm, nn.BatchNorm)
    )
    assert jax.tree.structure(ours) == jax.tree.structure(flaxs)
    for a, e in zip(jax.tree.leaves(ours), jax.tree.leaves(flaxs), strict=True):
        assert a.dtype == e.dtype
        np.testing.assert_array_equal(a, e)


@pytest.mark.standard_promotion
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("masked", [False, True])
def test_steps_are_those_of_flax(rng, options, masked):
    ours, flaxs = (
        jbn.linen.BatchNorm(momentum=0.8, **options),
        nn.BatchNorm(momentum=0.8, use_fast_variance=False, **options),
    )
    variables = flaxs.init(KEY, images(rng), use_running_average=False)
    for _ in range(4):
        x, mask = images(rng), None
        if masked:
            mask = rng.random((6, 1, 1) if "axis" in options else (6, 4, 1)) < 0.6
        (out, ours_next), (expected, variables) = (trained(norm, variables, x, mask=mask) for norm in (ours, flaxs))
        valid = np.broadcast_to(True if mask is None else mask, x.shape)
        assert out.dtype == expected.dtype
        assert_close(np.where(valid, out, 0), np.where(valid, expected, 0))
        assert np.all(np.asarray(out)[~valid] == 0)
        for a, e in zip(jax.tree.leaves(ours_next), jax.tree.leaves(variables), strict=True):
            assert_close(a, e)
        a, e = (norm.apply(variables, x, use_running_average=True) for norm in (ours, flaxs))
        assert_close(a, e)


@pytest.mark.standard_promotion
@pytest.mark.parametrize("x_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_dtype_of_the_result_is_that_of_flax(rng, x_dtype, param_dtype, dtype):
    x = images(rng).astype(x_dtype)
    for affine in (True, False):
        options = dict(dtype=dtype, param_dtype=param_dtype, use_scale=affine, use_bias=affine)
        for average in (True, False):
            ours, flaxs = (
                module(use_running_average=average, **options).init_with_output(KEY, x)[0]
                for module in (jbn.linen.BatchNorm, nn.BatchNorm)
            )
            assert ours.dtype == flaxs.dtype


def test_options_reach_the_function(rng):
    x, mask = images(rng), rng.random((6, 4)) < 0.7
    options = dict(momentum=jbn.momentum.warmup(0.9), epsilon=1e-2, running_var="total", ghost_batch_size=3)
    norm = jbn.linen.BatchNorm(activation=jax.nn.relu, dtype=jnp.float16, **options)
    variables = norm.init(KEY, x, use_running_average=False)
    out, variables = trained(norm, variables, x, mask=mask)
    expected, state = jbn.batch_norm(
        *jbn.init(3), x, True, mask=mask, activation=jax.nn.relu, dtype=jnp.float16, **options
    )
    np.testing.assert_array_equal(out, expected)
    jax.tree.map(np.testing.assert_array_equal, variables["batch_stats"], state._asdict())


@pytest.mark.parametrize("options", [{}, {"momentum": jbn.momentum.cumulative()}, {"axis_name": "devices"}])
def test_initialization_does_not_update(rng, options):
    norm = jbn.linen.BatchNorm(use_running_average=False, ghost_batch_size=4, **options)
    _, state = jbn.init(3)
    stored = norm.init(KEY, images(rng, batch=1))["batch_stats"]
    assert set(stored) == ({"mean", "var", "count"} if "momentum" in options else {"mean", "var"})
    for name, value in stored.items():
        np.testing.assert_array_equal(value, getattr(state, name))


def test_initialization_on_one_example_without_a_batch_axis():
    norm = jbn.linen.BatchNorm(use_running_average=False, axis_name="batch")
    assert norm.init(KEY, jnp.ones(3))["batch_stats"]["mean"].shape == (3,)


def test_a_schedule_goes_on_from_its_count(rng):
    norm = jbn.linen.BatchNorm(momentum=jbn.momentum.cumulative())
    variables = norm.init(KEY, images(rng), use_running_average=False)
    batches = [images(rng) for _ in range(3)]
    for x in batches:
        _, variables = trained(norm, variables, x)
    assert int(variables["batch_stats"]["count"]) == 3
    assert_close(variables["batch_stats"]["mean"], np.mean(batches, axis=(0, 1, 2), dtype=np.float64))


def test_a_schedule_refuses_statistics_without_a_count(rng):
    x, norm = images(rng), jbn.linen.BatchNorm(momentum=jbn.momentum.cumulative())
    variables = nn.BatchNorm().init(KEY, x, use_running_average=False)
    with pytest.raises(ValueError, match="no `count`, which a schedule reads"):
        trained(norm, variables, x)
    norm.apply(variables, x, use_running_average=True)
    norms, rest = jbn.convert.split(variables, "linen", count=10)
    _, variables = trained(norm, jbn.convert.join(norms, rest, "linen", with_count=True), x)
    assert_close(variables["batch_stats"]["mean"], x.mean((0, 1), dtype=np.float64) / 11)


REFUSED = {
    "fast variance": (dict(use_fast_variance=True), TypeError, "`use_fast_variance` is True.*not needed"),
    "reductions": (dict(force_float32_reductions=False), TypeError, "`force_float32_reductions` is False.*not needed"),
    "axis": (dict(axis=3), ValueError, "`axis` 3 is out of range"),
    "momentum": (dict(momentum=2.0), ValueError, "`momentum` is 2.0"),
    "running_var": (dict(running_var="mine"), ValueError, "`running_var` is 'mine'"),
    "dtype": (dict(dtype=jnp.int32), TypeError, "`dtype` is int32: expected one of float32"),
    "dtype of parameters": (dict(param_dtype="foo"), TypeError, "`param_dtype` is 'foo'"),
    "flag": (dict(use_running_average=1), TypeError, "`use_running_average` is 1.*True \\(running statistics\\)"),
}


@pytest.mark.parametrize(("options", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals(options, error, message):
    with pytest.raises(error, match=message):
        jbn.linen.BatchNorm(**{"use_running_average": False, **options}).init(KEY, jnp.ones((4, 3)))


def test_a_traced_flag_is_refused():
    norm = jbn.linen.BatchNorm()
    variables = norm.init(KEY, jnp.ones((4, 3)), use_running_average=True)
    with pytest.raises(TypeError, match="`use_running_average` is traced"):
        jax.jit(norm.apply)(variables, jnp.ones((4, 3)), True)


def test_statistics_that_may_not_change_are_refused_as_in_flax(rng):
    norm = jbn.linen.BatchNorm(use_running_average=False)
    variables = norm.init(KEY, images(rng))
    with pytest.raises(flax.errors.ModifyScopeVariableError):
        norm.apply(variables, images(rng))


class Block(nn.Module):
    """Dense, norm and relu, with the input added so that blocks can be stacked."""

    norm: type[nn.Module] = jbn.linen.BatchNorm

    @nn.compact
    def __call__(self, x):
        y = nn.Dense(x.shape[-1], use_bias=False, kernel_init=nn.initializers.normal(1.0))(x)
        return x + nn.relu(self.norm(use_running_average=False, momentum=0.5)(y))


class Repeated(nn.Module):
    """A block scanned four times: weights and statistics stacked by layer, or one block carried through."""

    shared: bool = False

    @nn.compact
    def __call__(self, x):
        stacked = {} if self.shared else {"params": 0, "batch_stats": 0}
        scan = nn.scan(
            lambda block, x: (block(x), None),
            variable_axes=stacked,
            variable_broadcast="params" if self.shared else False,
            variable_carry="batch_stats" if self.shared else False,
            split_rngs={"params": not self.shared},
            length=4,
        )
        return scan(Block(name="one"), x)[0]


class Unrolled(nn.Module):
    """The same four blocks in a Python loop."""

    shared: bool = False

    @nn.compact
    def __call__(self, x):
        one = Block(name="one") if self.shared else None
        for layer in range(4):
            x = (one or Block(name=f"layer{layer}"))(x)
        return x


def gradients_and_statistics(module, variables, x):
    def loss(params):
        out, updated = module.apply({**variables, "params": params}, x, mutable=["batch_stats"])
        return jnp.sum(out**2) / 100, updated["batch_stats"]

    return jax.jit(jax.grad(loss, has_aux=True))(variables["params"])


@pytest.mark.parametrize("transform", [nn.jit, nn.remat, nn.checkpoint, lambda block: nn.remat(nn.jit(block))])
def test_jit_and_remat_update_once(rng, transform):
    x = images(rng)
    variables = Block().init(KEY, x)
    plain = gradients_and_statistics(Block(), variables, x)
    transformed = gradients_and_statistics(transform(Block)(), variables, x)
    for a, e in zip(jax.tree.leaves(transformed), jax.tree.leaves(plain), strict=True):
        assert_close(a, e, condition=10)


@pytest.mark.parametrize("shared", [False, True])
def test_scan_updates_each_layer_once(rng, shared):
    x = images(rng)
    scanned, unrolled = Repeated(shared), Unrolled(shared)
    variables = parts = (unrolled if shared else scanned).init(KEY, x)
    if not shared:
        parts = {
            kind: {f"layer{i}": jax.tree.map(lambda leaf, i=i: leaf[i], tree["one"]) for i in range(4)}
            for kind, tree in variables.items()
        }
    many, one_by_one = (
        gradients_and_statistics(module, given, x) for module, given in ((scanned, variables), (unrolled, parts))
    )
    for a, e in zip(many, one_by_one, strict=True):
        expected = (
            e["one"] if shared else jax.tree.map(lambda *leaves: jnp.stack(leaves), *(e[f"layer{i}"] for i in range(4)))
        )
        jax.tree.map(functools.partial(assert_close, condition=100), a["one"], expected)


def test_vmap_over_models_of_their_own(rng):
    x = np.stack([images(rng), images(rng) + 5])
    axes = {"params": 0, "batch_stats": 0}
    mapped = nn.vmap(Block, variable_axes=axes, split_rngs={"params": True})()
    variables = mapped.init(KEY, x)
    _, statistics = gradients_and_statistics(mapped, variables, x)
    for i in range(2):
        _, expected = gradients_and_statistics(Block(), jax.tree.map(lambda leaf, i=i: leaf[i], variables), x[i])
        jax.tree.map(lambda a, e, i=i: assert_close(a[i], e), statistics, expected)


def test_vmap_over_the_batch_shares_statistics(rng):
    x = images(rng)
    shared = {"params": None, "batch_stats": None}
    lanes = nn.vmap(
        functools.partial(jbn.linen.BatchNorm, axis_name="batch"),
        variable_axes=shared,
        split_rngs={"params": False},
        axis_name="batch",
    )(momentum=0.0, use_running_average=False)
    out, updated = lanes.apply(lanes.init(KEY, x), x, mutable=["batch_stats"])
    expected = reference.batch_norm(x)
    assert_close(out, expected.out)
    assert_close(updated["batch_stats"]["var"], expected.var)


@pytest.mark.parametrize("groups", [None, [[0, 1], [2, 3]]])
def test_shard_map_shares_statistics(rng, groups):
    mesh = Mesh(np.array(jax.devices()[:4]), ("devices",))
    norm = jbn.linen.BatchNorm(momentum=0.0, use_running_average=False, axis_name="devices", axis_index_groups=groups)
    x = images(rng, batch=8)
    variables = norm.init(KEY, x[:1])
    spec = P("devices")
    shared = jax.shard_map(
        lambda x: norm.apply(variables, x, mutable=["batch_stats"])[0], mesh=mesh, in_specs=spec, out_specs=spec
    )
    out = jax.jit(shared)(x)
    for part in np.split(np.arange(8), 1 if groups is None else 2):
        assert_close(out[part], reference.batch_norm(x[part]).out)


def test_gradient_accumulation_updates_once_a_microbatch(rng):
    """A scan over microbatches, the statistics in its carry: k updates that together keep `momentum` of the start."""
    x = np.stack([images(rng) for _ in range(4)])
    norm = jbn.linen.BatchNorm(use_running_average=False, momentum=jbn.momentum.per_microbatch(0.5, 4))
    variables = norm.init(KEY, x[0])

    def microbatch(carry, x):
        gradient, statistics = carry

        def loss(params):
            out, updated = norm.apply({"params": params, "batch_stats": statistics}, x, mutable=["batch_stats"])
            return jnp.sum(out**3), updated["batch_stats"]

        more, statistics = jax.grad(loss, has_aux=True)(variables["params"])
        return (jax.tree.map(jnp.add, gradient, more), statistics), None

    start = (jax.tree.map(jnp.zeros_like, variables["params"]), variables["batch_stats"])
    (gradient, statistics), _ = jax.jit(lambda: jax.lax.scan(microbatch, start, x))()
    mean, var = 0.0, 1.0
    for batch in x:
        mean, var = reference.update(mean, var, reference.batch_norm(batch), 0.5**0.25)
    assert_close(statistics["mean"], mean)
    assert_close(statistics["var"], var)
    expected = sum(np.sum(reference.batch_norm(batch).out ** 2 * 3, axis=(0, 1)) for batch in x)
    assert_close(gradient["bias"], expected)


@pytest.mark.parametrize("bounds", [{}, {"r_max": 1.5, "d_max": 0.2}])
def test_renorm_is_the_core_s(rng, bounds):
    x = (rng.normal(size=(8, 3)) * 2 + 3).astype(np.float32)
    norm = jbn.linen.BatchRenorm(use_running_average=False, **bounds)
    variables = norm.init(jax.random.key(0), x)
    assert set(variables["batch_stats"]) == ({"mean", "var"} if bounds else {"mean", "var", "count"})
    start = {"mean": jnp.full(3, 2.0), "var": jnp.full(3, 2.0)}
    start = {**variables["batch_stats"], **start}
    out, updated = norm.apply({**variables, "batch_stats": start}, x, mutable=["batch_stats"])
    state = jbn.State(start["mean"], start["var"], start.get("count", jnp.int32(0)))
    expected, new_state = jbn.batch_renorm(jbn.Params(**variables["params"]), state, x, True, **bounds)
    np.testing.assert_array_equal(out, expected)
    for name, value in updated["batch_stats"].items():
        np.testing.assert_array_equal(value, getattr(new_state, name))


def test_renorm_without_its_count_is_refused():
    x = jnp.ones((4, 3))
    stats = jbn.linen.BatchNorm(use_running_average=False).init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="no `count`, which a schedule reads"):
        jbn.linen.BatchRenorm(use_running_average=False).apply(stats, x, mutable=["batch_stats"])
