"""What the compiler makes of a norm over many devices: results however an array is split, and what is sent for them."""

import functools
import re
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support import reference
from support.tolerances import assert_close
from support.transforms import devices_of, step

import jbn
from jbn import _collectives

SPLITS = {
    "examples": P(("rows", "columns")),
    "height": P(None, ("rows", "columns")),
    "examples and height": P("rows", "columns"),
    "height and width": P(None, "rows", "columns"),
    "features": P(None, None, None, ("rows", "columns")),
    "examples and features": P("rows", None, None, "columns"),
    "width and features": P(None, None, "rows", "columns"),
}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["automatic", "explicit"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_any_split_equals_one_device(rng, split, masked, kind):
    x = (rng.normal(size=(8, 8, 4, 16)) + 1e4 + np.arange(8)[:, None, None]).astype(np.float32)
    mask = rng.random((8, 8, 4)) < 0.3 if masked else None
    if masked:
        x[~mask] = np.nan
    cotangent = rng.normal(size=x.shape).astype(np.float32)
    params = jbn.Params(*(rng.normal(size=16).astype(np.float32) for _ in range(2)))
    expected = reference.batch_norm(x, *params, cotangent, mask=mask)
    mesh = devices_of({"rows": 4, "columns": 2}, axis_types=(kind, kind))
    features = P(*split[3:])
    with jax.set_mesh(mesh):
        x, cotangent = jax.device_put((x, cotangent), NamedSharding(mesh, split))
        mask = jax.device_put(mask, NamedSharding(mesh, P(*split[:3])))
        params, mean_var = jax.device_put((params, jbn.init(16)[1][:2]), NamedSharding(mesh, features))
        result = jax.jit(step)(params, jbn.State(*mean_var, jnp.int32(0)), x, mask, cotangent)
    for array in (result.out, result.dx):
        assert array.sharding.is_equivalent_to(x.sharding, x.ndim)
    for vector in (*result.gradients, *(leaf[0] for leaf in result.new_state[:2])):
        assert vector.sharding.is_equivalent_to(NamedSharding(mesh, features), 1)
    mean, var = reference.update(0, 1, expected, 0.5)
    assert_close(result.out, expected.out, scale=5)
    assert_close(result.dx, expected.dx, scale=5)
    assert_close(result.new_state.mean[0], mean)
    assert_close(result.new_state.var[0], var)
    for gradient, value in zip(result.gradients, (expected.dscale, expected.dbias), strict=True):
        assert_close(gradient, value, scale=np.abs(np.asarray(cotangent)).sum())


@pytest.mark.parametrize("options", [{"ghost_batch_size": 4}, {"feature_axis": (1, 3)}], ids=["ghost", "two axes"])
def test_replicated_state_under_explicit_sharding(rng, options):
    """It stays replicated where features are split, or it could not be carried through a loop."""
    x = rng.normal(size=(8, 8, 4, 16)).astype(np.float32) + 3
    params, state = jbn.init((8, 16) if "feature_axis" in options else 16)
    expected = step(params, state, x, None, x, **options)
    mesh = devices_of({"rows": 2, "columns": 4}, axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        split = jax.device_put(x, NamedSharding(mesh, P("rows", "columns")))
        result = jax.jit(functools.partial(step, **options))(params, state, split, None, split)
    assert jax.typeof(result.out) == jax.typeof(result.dx) == jax.typeof(split)
    assert not any(any(jax.typeof(leaf).sharding.spec) for leaf in (*result.new_state, *result.gradients))
    for actual, value in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        assert_close(actual, value, scale=np.abs(x).sum())


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_explicit_sharding_needs_no_mesh_around_it(rng, split, masked):
    x = rng.normal(size=(8, 8, 4, 16)).astype(np.float32) + 3
    mask = rng.random((8, 8, 4)) < 0.3 if masked else None
    expected = step(*jbn.init(16), x, mask, x)
    mesh = devices_of({"rows": 4, "columns": 2}, axis_types=(AxisType.Explicit,) * 2)
    x = jax.device_put(x, NamedSharding(mesh, split))
    result = jax.jit(step)(*jbn.init(16), x, mask, x)
    assert jax.typeof(result.out) == jax.typeof(result.dx) == jax.typeof(x)
    for actual, value in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        assert_close(actual, value, scale=np.abs(np.asarray(x)).sum())


def test_ghost_batches_over_borders_of_devices():
    mesh = devices_of({"devices": 8}, axis_types=(AxisType.Explicit,))
    x = jax.device_put(jnp.ones((16, 3)), NamedSharding(mesh, P("devices")))
    message = "`ghost_batch_size` is 4, but each of 8 devices has 2 of the 16 examples: expected a divisor of 2"
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=message):
        jbn.batch_norm(*jbn.init(3), x, True, ghost_batch_size=4)
    with jax.set_mesh(mesh):
        out, _ = jbn.batch_norm(*jbn.init(3), x, True, ghost_batch_size=2)
    assert jax.typeof(out) == jax.typeof(x)


LAYERS, FEATURES = 4, 8
SENT = re.compile(
    r"= (\(.*?\)|\S+) (all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all|collective-broadcast)"
    r"(?:-start)?\("
)


def sent(function, *args):
    """Shapes of what a compiled program sends, one string for each of its all-reduces, the only collectives allowed."""
    text = re.sub(r"\{[\d,]*\}|/\*.*?\*/", "", jax.jit(function).lower(*args).compile().as_text())
    found = SENT.findall(text)
    assert {name for _, name in found} <= {"all-reduce"}, found
    return [shape for shape, _ in found]


def jbn_layer(axis_name, params, state, x, mask):
    return jbn.batch_norm(params, state, x, True, mask=mask, axis_name=axis_name, activation=jax.nn.relu)


def flax_layer(axis_name, params, state, x, mask):
    norm = nn.BatchNorm(use_running_average=False, axis_name=axis_name)
    variables = {"params": params._asdict(), "batch_stats": {"mean": state.mean, "var": state.var}}
    mask = None if mask is None else mask[..., None]
    out, updated = norm.apply(variables, x, mask=mask, mutable=["batch_stats"])
    return jax.nn.relu(out), state._replace(**updated["batch_stats"])


def network(layer, weights, params, state, x, mask):
    """Layers of matmul, norm and relu, which alone send nothing but the norm's statistics."""
    new_states = []
    for _ in range(LAYERS):
        x, new_state = layer(params, state, x @ weights, mask)
        new_states.append(new_state)
    return x, new_states


def forward_and_backward(layer, weights, params, state, x, mask):
    out, pull, new_states = jax.vjp(lambda x: network(layer, weights, params, state, x, mask), x, has_aux=True)
    return pull(out)[0], new_states


def counted(layer, axis_name, shape, split, masked, check_vma=True):
    """How often a network sends in the forward pass and in the backward pass, and the shapes of all that is sent."""
    mesh = devices_of({"devices": 8})
    x = jax.device_put(jnp.ones(shape), NamedSharding(mesh, split))
    mask = jax.device_put(jnp.ones(shape[:-1], bool), NamedSharding(mesh, split)) if masked else None
    args = (jnp.ones((FEATURES, FEATURES)), *jbn.init(FEATURES), x, mask)
    shapes = []
    for function in (network, forward_and_backward):
        program = functools.partial(function, functools.partial(layer, axis_name))
        if axis_name is not None:
            specs = (P(), P(), P(), split, split)
            program = jax.shard_map(program, mesh=mesh, in_specs=specs, out_specs=(split, P()), check_vma=check_vma)
        shapes.append(sent(program, *args))
    forward, both = map(len, shapes)
    return forward, both - forward, sorted(shapes[1])


CUTS = {"rows": ((64, FEATURES), P("devices")), "examples": ((16, 8, FEATURES), P("devices"))}
CUTS["sequences"] = ((16, 8, FEATURES), P(None, "devices"))


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("check_vma", [True, False], ids=["checked", "unchecked"])
@pytest.mark.parametrize(("shape", "split"), CUTS.values(), ids=CUTS)
def test_shard_map_sends_as_often_as_flax(shape, split, check_vma, masked):
    forward, backward, _ = counted(jbn_layer, "devices", shape, split, masked, check_vma)
    assert (forward, backward) == (LAYERS, LAYERS)
    assert counted(flax_layer, "devices", shape, split, masked, check_vma)[:2] == (LAYERS, LAYERS)


def test_many_devices_send_two_small_sums(monkeypatch):
    monkeypatch.setattr(_collectives, "FEW", 7)
    jax.clear_caches()
    forward, backward, shapes = counted(jbn_layer, "devices", *CUTS["rows"], masked=True)
    assert (forward, backward) == (2 * LAYERS, LAYERS)
    assert {f"f32[{FEATURES + 1}]", f"f32[{2 * FEATURES}]"} < set(shapes)
    jax.clear_caches()


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize(("shape", "split"), CUTS.values(), ids=CUTS)
def test_automatic_sharding_sends_the_shift_row_as_well(shape, split, masked):
    """With a mask, which all layers share, it also finds the valid rows and counts them, once for all layers."""
    forward, backward, _ = counted(jbn_layer, None, shape, split, masked)
    assert (forward, backward) == (2 * LAYERS + (2 if masked else 0), LAYERS)


@pytest.mark.parametrize("axis_name", [None, "devices"], ids=["jit", "shard_map"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize(("shape", "split"), CUTS.values(), ids=CUTS)
def test_what_is_sent_does_not_grow_with_the_batch(shape, split, masked, axis_name):
    larger = tuple(4 * size for size in shape[:-1]) + shape[-1:]
    small, large = (counted(jbn_layer, axis_name, each, split, masked)[2] for each in (shape, larger))
    assert small == large


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_ghost_batches_gather_nothing(masked):
    def layer(axis_name, params, state, x, mask):
        return jbn.batch_norm(params, state, x, True, mask=mask, ghost_batch_size=2)

    assert counted(layer, None, *CUTS["examples"], masked)[2]


def test_features_that_are_split_have_local_statistics():
    """What is sent are the two flags of the update's guard, since all devices keep or change the state together."""
    mesh = devices_of({"devices": 8})
    x = jax.device_put(jnp.ones((16, 4, 32)), NamedSharding(mesh, P(None, None, "devices")))
    args = jax.device_put(jbn.init(32)[0], NamedSharding(mesh, P("devices")))
    assert sent(lambda params, x: jbn_layer(None, params, jbn.init(32)[1], x, None), args, x) == ["(pred[], pred[])"]


@pytest.mark.parametrize(
    ("groups", "rows"), [(None, 8), ([[0, 1], [2, 3], [4, 5], [6, 7]], 2), ([[0, 1, 2], [3, 4, 5, 6, 7]], 8)]
)
def test_a_group_sends_a_row_for_each_member(groups, rows):
    """Of mean's shift and offset, variance and count; where the groups differ in size, for each place on the axis."""
    one_device = functools.partial(jbn.moments, axis_name="devices", axis_index_groups=groups)
    mapped = jax.shard_map(
        one_device, mesh=devices_of({"devices": 8}), in_specs=P("devices"), out_specs=P(), check_vma=False
    )
    assert sent(mapped, np.ones((16, 5), np.float32)) == [f"f32[{rows},16]"]


def test_the_script_that_counts_for_a_whole_network():
    script = Path(__file__).parents[1] / "studies" / "shared_cost.py"
    run = subprocess.run([sys.executable, script, "--devices", "2"], capture_output=True, text=True)
    head, _, shared, *others = run.stdout.splitlines()
    columns = [cell.strip() for cell in head.split("|")]
    row = dict(zip(columns, (cell.strip() for cell in shared.split("|")), strict=True))
    assert row["statistics"] == "jbn, all share"
    assert 0 < int(row["norm forward"]) <= 53
    assert len(others) == 3, run.stderr
