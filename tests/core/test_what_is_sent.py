"""How often and how much a norm sends between devices, read from programs that are compiled for CPU devices."""

import functools
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from studies import shared_cost
from support.sent import FEATURES, LAYERS, flax_layer, jbn_layer, sent, sent_by_network
from support.tolerances import assert_close
from support.transforms import devices_of

import jbn

pytestmark = [pytest.mark.cpu, pytest.mark.devices(8)]


def counts(*args, **options):
    """The number of collectives in the forward and in the backward pass."""
    return tuple(map(len, sent_by_network(*args, **options)))


@pytest.mark.parametrize(
    ("cut", "masked", "check_vma"), [("rows", True, True), ("sequences", True, True), ("examples", False, False)]
)
def test_shard_map_sends_as_often_as_flax(cut, masked, check_vma):
    options = {"cut": cut, "masked": masked, "check_vma": check_vma}
    assert counts(jbn_layer, "devices", **options) == (LAYERS, LAYERS)
    assert counts(flax_layer, "devices", **options) == (LAYERS, LAYERS)


AUTOMATIC = [("rows", True), ("sequences", True), ("examples", False)]


@pytest.mark.parametrize(("cut", "masked"), AUTOMATIC)
def test_automatic_sharding_sends_a_center_as_well(cut, masked):
    """The center is a row of the data, or the mean of the valid values. All layers share one sum that counts these."""
    assert sum(counts(jbn_layer, None, cut, masked)) == 3 * LAYERS + (1 if masked else 0)


@pytest.mark.parametrize(
    ("axis_name", "cut", "masked"),
    [("devices", "rows", True), (None, "sequences", True), (None, "examples", False)],
)
def test_what_is_sent_does_not_grow_with_the_batch(axis_name, cut, masked):
    small, large = (sent_by_network(jbn_layer, axis_name, cut, masked, times=times) for times in (1, 4))
    assert small == large


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_ghost_batches_send_running_statistics_alone(masked):
    """Vectors of the feature shape are sent, for any number of ghost batches. The backward pass sends nothing."""
    found = sent_by_network(functools.partial(jbn_layer, ghost_batch_size=2), None, "examples", masked)
    sizes = [
        math.prod(map(int, shape.split(","))) for sums in found.forward for shape in re.findall(r"\[([\d,]+)\]", sums)
    ]
    assert 0 < max(sizes) <= FEATURES
    assert not found.backward


def test_features_that_are_split_have_local_statistics():
    """Nothing is sent, since each feature is updated on its own."""
    mesh = devices_of({"devices": 8})
    x = jax.device_put(jnp.ones((16, 4, 32)), NamedSharding(mesh, P(None, None, "devices")))
    args = jax.device_put(jbn.init(32)[0], NamedSharding(mesh, P("devices")))
    found = sent(lambda params, x: jbn_layer(None, params, jbn.init(32)[1], x, None), args, x)
    assert found == ([], [])


@pytest.mark.parametrize(
    ("groups", "rows"), [(None, 8), ([[0, 1], [2, 3], [4, 5], [6, 7]], 2), ([[0, 1, 2], [3, 4, 5, 6, 7]], 8)]
)
def test_a_group_sends_a_row_for_each_member(groups, rows):
    """A row has shift, offset, variance and count. Groups of different sizes send a row for each place on the axis."""
    one_device = functools.partial(jbn.moments, axis_name="devices", axis_index_groups=groups)
    mapped = jax.shard_map(
        one_device, mesh=devices_of({"devices": 8}), in_specs=P("devices"), out_specs=P(), check_vma=False
    )
    assert sent(mapped, np.ones((16, 5), np.float32)).forward == [f"f32[{rows},16]"]


@pytest.mark.slow
def test_the_script_that_counts_for_a_whole_network_finds_what_each_part_sends(monkeypatch, capsys):
    """With one block instead of sixteen: five norms, of which the shortcut's is sent together with another one."""
    monkeypatch.setattr(shared_cost, "GROUP", 2)
    groups_and_flax = shared_cost.cases(4)[1::2]
    monkeypatch.setattr(shared_cost, "cases", lambda devices: groups_and_flax)
    monkeypatch.setattr(shared_cost, "start_devices", lambda count: None)
    shared_cost.main(["--devices", "4", "--blocks", "1"])
    head, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines())
    table = [dict(zip(head, row, strict=True)) for row in rows]
    counts = [[int(row[part]) for part in (*shared_cost.PARTS, "all")] for row in table]
    assert [row["statistics"] for row in table] == ["jbn, groups of 2", "Flax, all share"]
    # In groups, the sums of jbn's backward pass cannot also serve as the gradients of scale and bias.
    assert counts == [[4, 4, 2, 10], [4, 3, 2, 9]]


def test_the_network_of_the_script_is_resnet_50():
    model = shared_cost.ResNet(functools.partial(nn.BatchNorm, use_running_average=False), shared_cost.RESNET_50)
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    shared_cost.check_network(jax.eval_shape(model.init, jax.random.key(0), image))


def test_inference_sends_nothing_and_needs_no_one_else(rng):
    params, state = jbn.init(3)

    def inference(x):
        return jbn.batch_norm(params, state, x, False, axis_name="d")[0]

    x = rng.normal(size=(16, 3)).astype(np.float32)
    mapped = jax.jit(jax.shard_map(inference, mesh=devices_of({"d": 8}), in_specs=P("d"), out_specs=P("d")))
    program = mapped.lower(x).compile()
    assert re.findall(r"all-\w+|reduce-scatter|collective-\w+", program.as_text()) == []
    assert_close(program(x), inference(x))
