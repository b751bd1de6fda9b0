"""Inference leaves for another program: exported bytes run at any batch size, without jbn."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import export
from support.tolerances import assert_close

import jbn

RUN = """
import sys, jax, numpy as np
from jax import export
folder = sys.argv[1]
inference = export.deserialize(bytearray(open(f"{folder}/inference", "rb").read()))
for size in (1, 7, 64):
    np.save(f"{folder}/out{size}", inference.call(np.load(f"{folder}/x{size}.npy")))
assert "jbn" not in sys.modules and "flax" not in sys.modules
"""


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3))(x)
        return jbn.linen.BatchNorm(use_running_average=True, activation=jax.nn.relu)(x)


def function_of_norm(rng):
    params, state = jbn.init(3)
    state = state._replace(mean=rng.normal(size=3).astype(np.float32), var=np.float32([0.5, 1, 9]))
    return lambda x: jbn.normalize(params, state, x, activation=jax.nn.relu)


def function_of_network(rng):
    network = Network()
    variables = network.init(jax.random.key(0), jnp.ones((1, 5, 5, 3)))
    return lambda x: network.apply(variables, x)


@pytest.mark.parametrize("make", [function_of_norm, function_of_network])
def test_inference_runs_at_any_batch_size_from_its_bytes_alone(tmp_path, rng, make):
    inference = make(rng)
    (size,) = export.symbolic_shape("size")
    x = jax.ShapeDtypeStruct((size, 5, 5, 3), jnp.float32)
    (tmp_path / "inference").write_bytes(export.export(jax.jit(inference))(x).serialize())
    batches = {size: rng.normal(size=(size, 5, 5, 3)).astype(np.float32) for size in (1, 7, 64)}
    for size, batch in batches.items():
        np.save(tmp_path / f"x{size}", batch)
    subprocess.run([sys.executable, "-c", RUN, str(tmp_path)], check=True, cwd=tmp_path)
    for size, batch in batches.items():
        assert_close(np.load(tmp_path / f"out{size}.npy"), inference(batch))
