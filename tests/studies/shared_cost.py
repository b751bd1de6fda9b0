"""Count the collectives for shared statistics in one compiled ResNet-50 training step.

python tests/studies/shared_cost.py --devices 8 64 1024 8192

The step is compiled for the given numbers of CPU devices and does not run, so any machine can count. The bytes sent
depend on the channels and not on the images, so a device has one image of 32 x 32. The step computes loss, new running
statistics and the gradients of all parameters. The loss is not averaged over devices, which would send one more number.

An all-reduce can carry several arrays. The table counts all-reduces as XLA's CPU compiler combines them; compilers for
other devices may combine fewer or more. An all-reduce belongs to the gradients if it carries a gradient of a
convolution or of the dense layer. If all devices share, this includes the backward sums of the first norm (64
channels) and Flax's gradients of the biases. If all devices share, jbn's backward sums are also the gradients of scale
and bias, which are not sent again. The rows "none share" show the cost of the gradients alone. --blocks sets the
number of blocks per stage, for example `--blocks 1` for a quick run.
"""

import argparse
import functools
import math
import re
import socket
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jbn

GROUP = 16
PARTS = ("norm forward", "norm backward", "gradients")
RESNET_50 = (3, 4, 6, 3)
NORMS, CHANNELS, PARAMETERS = 53, 26_560, 25_557_032
ONE_PROCESS = 2048
"""The CPU backend assigns devices from this number on to another process, which needs cross-process collectives."""
OPERATION = re.compile(r" (all-reduce|all-gather|all-to-all|reduce-scatter|collective-\w+|ragged-all-to-all)[\w-]*\(")
ALL_REDUCE = re.compile(r' = (.*?) all-reduce\(.* replica_groups=(\{\{.*?\}\}|mesh.*?\}), .*op_name="(.*?)"')


class Bottleneck(linen.Module):
    """A block of three convolutions, with the stride in the second."""

    features: int
    stride: int
    norm: Callable[..., Any]

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = functools.partial(linen.Conv, use_bias=False)
        y = jax.nn.relu(self.norm()(conv(self.features, (1, 1))(x)))
        y = jax.nn.relu(self.norm()(conv(self.features, (3, 3), self.stride)(y)))
        y = self.norm()(conv(4 * self.features, (1, 1))(y))
        if x.shape != y.shape:
            x = self.norm()(conv(4 * self.features, (1, 1), self.stride)(x))
        return jax.nn.relu(x + y)


class ResNet(linen.Module):
    """ResNet-50 for the 1000 classes of ImageNet, or a network with other numbers of blocks."""

    norm: Callable[..., Any]
    blocks: tuple[int, ...]

    @linen.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = jax.nn.relu(self.norm()(linen.Conv(64, (7, 7), 2, use_bias=False)(images)))
        x = linen.max_pool(x, (3, 3), (2, 2), "SAME")
        for stage, blocks in enumerate(self.blocks):
            for block in range(blocks):
                x = Bottleneck(64 * 2**stage, 2 if stage > 0 and block == 0 else 1, self.norm)(x)
        return linen.Dense(1000)(jnp.mean(x, axis=(1, 2)))


class Case(NamedTuple):
    """A norm, the axes of the mesh, the axis to share statistics over, and the axes along which statistics differ."""

    label: str
    norm: Callable[..., Any]
    mesh: dict[str, int]
    axis_name: str | None
    differ: tuple[str, ...]


class AllReduce(NamedTuple):
    """An all-reduce of a compiled program: the part of the step it belongs to, and the bytes of its operands."""

    part: str
    size: int


def cases(devices: int) -> list[Case]:
    """The cases that the table compares."""
    members = min(GROUP, devices)
    whole, grouped = {"devices": devices}, {"groups": devices // members, "members": members}
    return [
        Case("jbn, all share", jbn.linen.BatchNorm, whole, "devices", ()),
        Case(f"jbn, groups of {members}", jbn.linen.BatchNorm, grouped, "members", ("groups",)),
        Case("jbn, none share", jbn.linen.BatchNorm, whole, None, ("devices",)),
        Case("Flax, all share", linen.BatchNorm, whole, "devices", ()),
    ]


def train(model: ResNet, params: Any, batch_stats: Any, images: jax.Array, labels: jax.Array) -> tuple[Any, ...]:
    """The loss of one device, the new running statistics, and the gradients, summed over all devices."""

    def loss(params: Any) -> tuple[jax.Array, Any]:
        variables = {"params": params, "batch_stats": batch_stats}
        logits, updated = model.apply(variables, images, mutable=["batch_stats"])
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)
        return -jnp.mean(chosen), updated["batch_stats"]

    (value, updated), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    return value[None], updated, gradients


def compiled_text(case: Case, blocks: tuple[int, ...]) -> str:
    """The text of the compiled training step."""
    shape = tuple(case.mesh.values())
    mesh = Mesh(np.array(jax.devices()[: math.prod(shape)]).reshape(shape), tuple(case.mesh))
    model = ResNet(functools.partial(case.norm, use_running_average=False, axis_name=case.axis_name), blocks)
    image, label = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    if blocks == RESNET_50:
        check_network(variables)
    values = (variables["params"], variables["batch_stats"], image, label)
    same, everywhere = (), tuple(case.mesh)
    axes = (same, case.differ, everywhere, everywhere)
    step = jax.shard_map(
        functools.partial(train, model),
        mesh=mesh,
        in_specs=tuple(map(P, axes)),
        out_specs=(P(everywhere), P(case.differ), P(same)),
        check_vma=True,
    )
    arguments = [spread(value, mesh, names) for value, names in zip(values, axes, strict=True)]
    # LLVM optimizations do not change the collectives, and they take time.
    return jax.jit(step, compiler_options={"xla_backend_optimization_level": 0}).lower(*arguments).compile().as_text()


def spread(values: Any, mesh: Mesh, names: tuple[str, ...]) -> Any:
    """The shapes of the global arrays, of which each device along the named mesh axes holds such a part."""
    copies = math.prod(mesh.shape[name] for name in names)

    def whole(part: Any) -> jax.ShapeDtypeStruct:
        shape = (copies * part.shape[0], *part.shape[1:])
        return jax.ShapeDtypeStruct(shape, part.dtype, sharding=NamedSharding(mesh, P(names)))

    return jax.tree.map(whole, values)


def check_network(variables: Any) -> None:
    """Check that the network is ResNet-50."""
    params, stats = (jax.tree.leaves(variables[name]) for name in ("params", "batch_stats"))
    found = (len(stats) // 2, sum(leaf.size for leaf in stats) // 2, sum(leaf.size for leaf in params))
    if found != (NORMS, CHANNELS, PARAMETERS):
        raise AssertionError(f"{found} norms, channels and parameters: expected {(NORMS, CHANNELS, PARAMETERS)}.")


def all_reduces(text: str, case: Case) -> list[AllReduce]:
    """The all-reduces of a compiled step; raises ValueError for any other collective."""
    found = []
    for line in filter(OPERATION.search, text.splitlines()):
        match = ALL_REDUCE.search(line)
        if match is None:
            raise ValueError(f"not an all-reduce that this script can read: {line[:400]}")
        shapes, groups, scopes = match.groups()
        axes = axes_of(groups, case)
        if axes:  # XLA keeps an all-reduce over an axis of size 1, which sends nothing
            found.append(AllReduce(part_of(scopes, axes == {case.axis_name}), bytes_of(shapes)))
    return found


def axes_of(groups: str, case: Case) -> set[str]:
    """The axes of size above 1 that an all-reduce runs over; XLA gives their names or a list of devices."""
    if groups.startswith("mesh"):
        return {name for name in re.findall(r"'(\w+)'", groups.split("{")[1]) if case.mesh[name] > 1}
    first = [int(place) for place in re.findall(r"\d+", groups.split("}")[0])]
    places = np.arange(math.prod(case.mesh.values())).reshape(tuple(case.mesh.values()))
    seats = np.argwhere(np.isin(places, first))
    return {name for name, seat in zip(case.mesh, seats.T, strict=True) if len(set(seat)) > 1}


def part_of(scopes: str, among_sharing: bool) -> str:
    """The part of the step that an all-reduce belongs to, from the scopes of its arrays and from its devices. Gradients
    of scale and bias that are summed over groups have the same scope as the backward sums."""
    backward, norm = "transpose(" in scopes, "BatchNorm_" in scopes
    if backward and (not among_sharing or re.search("(Conv|Dense)_", scopes)):
        return "gradients"
    if not norm or not among_sharing:
        raise ValueError(f"an all-reduce from {scopes}, which belongs neither to a norm nor to gradients.")
    return "norm backward" if backward else "norm forward"


def bytes_of(shapes: str) -> int:
    """Bytes of all arrays in the type of an instruction; for an all-reduce, this is the type of its operands."""
    arrays = re.findall(r"[a-z]+(\d+)\[([\d,]*)\]", shapes)
    return sum(int(bits) // 8 * math.prod(map(int, filter(None, sizes.split(",")))) for bits, sizes in arrays)


def row(devices: int, case: Case, blocks: tuple[int, ...]) -> str:
    """Compile a case and format its row of the table."""
    start = time.monotonic()
    found = all_reduces(compiled_text(case, blocks), case)
    sizes = [[each.size for each in found if each.part == part] for part in PARTS]
    sizes.append([each.size for each in found])
    print(f"{devices} devices, {case.label}: {time.monotonic() - start:.0f} s", file=sys.stderr)
    return f"| {devices} | {case.label} | " + " | ".join(f"{len(part)} | {sum(part):,}" for part in sizes) + " |"


def start_devices(count: int) -> None:
    """Create this number of CPU devices; none of them computes."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)
    if count > ONE_PROCESS:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        jax.distributed.initialize(address, num_processes=1, process_id=0)


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, nargs="+", default=[8, 64, 1024, 8192], help="numbers of devices")
    parser.add_argument("--blocks", type=int, nargs="+", default=RESNET_50, help="number of blocks of each stage")
    options = parser.parse_args(arguments)
    if any(count < 2 or (count > GROUP and count % GROUP) for count in options.devices):
        parser.error(f"--devices is {options.devices}: expected numbers from 2 to {GROUP}, or multiples of {GROUP}.")
    start_devices(max(options.devices))
    print("| devices | statistics |" + "".join(f" {part} | bytes |" for part in (*PARTS, "all")))
    print("|---:|---|" + "---:|" * 8)
    for devices in options.devices:
        for case in cases(devices):
            print(row(devices, case, tuple(options.blocks)), flush=True)


if __name__ == "__main__":
    main()
