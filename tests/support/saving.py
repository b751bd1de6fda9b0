"""The two formats of checkpoints: a tree written by orbax, and by flax.serialization."""

import orbax.checkpoint as ocp
import pytest
from flax import serialization


def save_by_orbax(path, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


def save_by_flax(path, tree):
    path.write_bytes(serialization.to_bytes(tree))


SAVES = {"orbax": save_by_orbax, "flax.serialization": save_by_flax}
by_format = pytest.mark.parametrize("save", SAVES.values(), ids=SAVES)
