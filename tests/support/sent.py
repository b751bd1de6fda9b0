"""What a compiled program sends between devices, read from the text of a program for CPUs."""

import functools
import re
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jbn
from support.compilation import compiled
from support.transforms import devices_of

LAYERS, FEATURES = 2, 8
CUTS = {
    "rows": ((64, FEATURES), P("devices")),
    "examples": ((16, 8, FEATURES), P("devices")),
    "sequences": ((16, 8, FEATURES), P(None, "devices")),
}
"""Shape and sharding of x."""
SENT = re.compile(
    r"= (\(.*?\)|\S+) (all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all|collective-broadcast)"
    r"(?:-start)?\(.*op_name=\"(.*?)\""
)


class Sent(NamedTuple):
    """Shapes of what a program sends, as one string for each all-reduce."""

    forward: list[str]
    backward: list[str]


def sent(function, *args):
    """What a compiled program sends by all-reduces, the only collectives allowed."""
    text = compiled(function).lower(*args).compile().as_text()
    text = re.sub(r"\{[\d,]*\}|/\*.*?\*/", "", text)
    found = SENT.findall(text)
    assert {kind for _, kind, _ in found} <= {"all-reduce"}, found
    backward = ["transpose(" in scope for _, _, scope in found]
    shapes = [shape for shape, _, _ in found]
    return Sent(*(sorted(s for s, back in zip(shapes, backward, strict=True) if back == one) for one in (False, True)))


def jbn_layer(axis_name, params, state, x, mask, **options):
    return jbn.batch_norm(params, state, x, True, mask=mask, axis_name=axis_name, activation=jax.nn.relu, **options)


def flax_layer(axis_name, params, state, x, mask):
    norm = nn.BatchNorm(use_running_average=False, axis_name=axis_name)
    variables = {"params": params._asdict(), "batch_stats": {"mean": state.mean, "var": state.var}}
    mask = None if mask is None else mask[..., None]
    out, updated = norm.apply(variables, x, mask=mask, mutable=["batch_stats"])
    return jax.nn.relu(out), state._replace(**updated["batch_stats"])


def network(layer, weights, params, state, x, mask):
    """Layers of matmul, norm and relu, of which only the norm sends anything."""
    new_states = []
    for _ in range(LAYERS):
        x, new_state = layer(params, state, x @ weights, mask)
        new_states.append(new_state)
    return x, new_states


def forward_and_backward(layer, weights, params, state, x, mask):
    out, pull, new_states = jax.vjp(lambda x: network(layer, weights, params, state, x, mask), x, has_aux=True)
    return pull(out)[0], new_states


@functools.cache
def sent_by_network(layer, axis_name, cut, masked, check_vma=True, times=1):
    """What a network of such layers sends, forward and backward, for a batch that is `times` times as large."""
    shape, split = CUTS[cut]
    shape = (*(times * size for size in shape[:-1]), FEATURES)
    mesh = devices_of({"devices": 8})
    x = jax.device_put(jnp.ones(shape), NamedSharding(mesh, split))
    mask = jax.device_put(jnp.ones(shape[:-1], bool), NamedSharding(mesh, split)) if masked else None
    program = functools.partial(forward_and_backward, functools.partial(layer, axis_name))
    if axis_name is not None:
        specs = (P(), P(), P(), split, split)
        program = jax.shard_map(program, mesh=mesh, in_specs=specs, out_specs=(split, P()), check_vma=check_vma)
    return sent(program, jnp.ones((FEATURES, FEATURES)), *jbn.init(FEATURES), x, mask)
