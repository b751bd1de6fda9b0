"""`jbn inspect`: the faults it finds in checkpoints of orbax and Flax, and the input it rejects.

`test_train.py` inspects a checkpoint of `jbn train`.
"""

import itertools
import re
from pathlib import Path
from typing import Any

import flax.serialization
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax.training import train_state
from support.command_refusals import Refused, assert_commands_refused

import jbn

pytestmark = pytest.mark.standard_promotion

GOOD = jbn.State(jnp.full(3, 0.5), jnp.full(3, 2.0), jnp.full(3, 50.0))
PLANTED = {
    "nan": (GOOD._replace(mean=jnp.array([0.5, jnp.nan, 0.5])), "not finite"),
    "unset": (jbn.unset(GOOD), "unset"),
    "dead": (GOOD._replace(var=jnp.array([2.0, 0.0, 2.0])), "dead"),
    "stale": (GOOD._replace(count=jnp.array([50.0, 3.0, 50.0])), "stale"),
    "stale_in_0.1": (GOOD._replace(count=jnp.int32(3)), "stale"),
    "never_updated": (jbn.init(3)[1], "stale"),
    "no_variance": ({"mean": GOOD.mean, "count": GOOD.count}, "missing"),
    "no_mean": ({"var": GOOD.var, "count": GOOD.count}, "missing"),
    "no_count": ({"mean": GOOD.mean, "var": GOOD.var}, "missing"),
}
UNCHECKED = "not checked: initial values (--momentum), distance from the population (--population)"
FAULTS = ("dead", "unset", "not finite", "far", "stale", "missing")


class Trained(train_state.TrainState):
    batch_stats: Any


def saved(path, tree, kind):
    if kind == "flax":
        path.write_bytes(flax.serialization.to_bytes(tree))
    elif kind == "orbax":
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, tree)
    else:
        with ocp.CheckpointManager(path) as manager:
            for step in (9, 10):
                manager.save(step, args=ocp.args.StandardSave(tree if step == 10 else {"other": GOOD}))
    return path


@pytest.fixture
def inspected(command):
    """A function that inspects a checkpoint and returns the exit status and the lines, without the line of the path."""

    def inspect(*arguments):
        ended = command("inspect", *arguments)
        return ended.status, [line for line in ended.out.splitlines() if not line.startswith("/")]

    return inspect


def test_each_planted_fault_is_found_in_every_kind_of_checkpoint(tmp_path, inspected):
    block = {"good": GOOD, "better": GOOD, **{name: node for name, (node, _) in PLANTED.items()}}
    tree = {"block": block, "dense": {"kernel": np.ones((2, 2), np.float32)}}
    for kind in ("orbax", "flax", "manager"):
        status, lines = inspected(saved(tmp_path / kind, tree, kind))
        rows = {cells[0]: cells for line in lines if (cells := re.split(r"\s{2,}", line))}
        for name, (_, fault) in PLANTED.items():
            found = dict(zip(rows["norm"], rows[f"block/{name}"], strict=True))
            at_fault = {column for column, value in found.items() if column in FAULTS and value not in ("0", "-")}
            assert fault in at_fault, (kind, name, at_fault)
        assert lines[-1].startswith(f"{len(PLANTED)} of {len(block)} norms are faulty: "), kind
        assert set(lines[-1].partition(": ")[2].split(", ")) == {f"block/{name}" for name in PLANTED}, kind
        assert status == 1, kind


def test_the_only_fault_is_named_in_the_last_line(tmp_path, inspected):
    path = saved(tmp_path / "flax", {"a": GOOD, "b": jbn.unset(GOOD), "c": GOOD}, "flax")
    status, lines = inspected(path)
    assert (status, lines[-1]) == (1, "1 of 3 norms are faulty: b")


def test_nothing_is_wrong_with_what_is_whole(tmp_path, inspected):
    path = saved(tmp_path / "orbax", {"a": GOOD, "b": GOOD}, "orbax")
    both = ("--momentum", 0.5, "--population", path)
    for options, last in (((), f"no fault found; {UNCHECKED}"), (both, "no fault found")):
        status, lines = inspected(path, *options)
        assert (status, lines[-1]) == (0, last), options


def test_initial_values_of_norms_without_a_count_need_the_number_of_updates(tmp_path, inspected):
    path = saved(tmp_path / "flax", {"a": {"mean": GOOD.mean, "var": GOOD.var}}, "flax")
    notes = []
    for updates in ((), ("--updates", 40), ("--updates", 500)):
        status, lines = inspected(path, "--momentum", 0.99, *updates)
        assert status == (updates == ("--updates", 40)), updates
        assert ("initial values weigh 67%" in "\n".join(lines)) == status
        notes.append(["Pass --updates N." in "\n".join(lines), "initial values (--updates)" in lines[-1]])
    assert notes == [[True, True], [False, False], [False, False]]


def test_the_copies_of_the_params_in_an_optimizer_state_are_no_norms(tmp_path, inspected):
    """A top-level norm and one in a block have the same name."""
    params = {"BatchNorm_0": {"scale": jnp.ones(3), "bias": jnp.zeros(3)}, "Dense_0": {"bias": jnp.ones(3)}}
    params |= {"Block_0": {"BatchNorm_0": params["BatchNorm_0"]}}
    stats = {"BatchNorm_0": {"mean": GOOD.mean, "var": GOOD.var}}
    optimizers = {"adam": optax.adam(0.1), "momentum": optax.sgd(0.1, momentum=0.9)}
    for (name, optimizer), kind in itertools.product(optimizers.items(), ("orbax", "flax")):
        for whole in (True, False):
            found = stats | ({"Block_0": stats} if whole else {})
            state = Trained.create(apply_fn=None, params=params, tx=optimizer, batch_stats=found)
            status, lines = inspected(saved(tmp_path / f"{kind} {name} {whole}", state, kind))
            last = f"no fault found; {UNCHECKED}" if whole else "1 of 2 norms are faulty: params/Block_0/BatchNorm_0"
            assert (status, lines[-1]) == (not whole, last), (name, kind)


def test_a_slow_average_is_still_the_start(tmp_path, inspected):
    status, lines = inspected(saved(tmp_path / "flax", {"a": GOOD, "b": GOOD}, "flax"), "--momentum", 0.99)
    assert status == 1
    assert "initial values weigh 61%" in "\n".join(lines)


def test_statistics_that_are_far_from_the_population_are_faulty(tmp_path, inspected):
    path = saved(tmp_path / "orbax", {"a": GOOD, "b": GOOD}, "orbax")
    population = saved(tmp_path / "flax", {"a": GOOD, "b": GOOD._replace(mean=GOOD.mean + 9)}, "flax")
    status, lines = inspected(path, "--population", population)
    assert (status, lines[-1]) == (1, "1 of 2 norms are faulty: b")


def notes():
    Path("notes").write_text("mine")


def empty():
    Path("empty").mkdir()


def kernel():
    saved(Path("kernel"), {"kernel": np.ones(3, np.float32)}, "flax")


def statistics():
    for name in ("one", "other"):
        saved(Path(name), {name: jbn.init(3)[1]}, "flax")


REFUSED = {
    "absent": Refused("inspect absent", "checkpoint", "which does not exist", "expected a file or directory"),
    "empty": Refused("inspect empty", "checkpoint is empty", "0 checkpoints of orbax", "give one", empty),
    "no checkpoint": Refused(
        "inspect notes", "checkpoint is notes", "not a complete checkpoint", "flax.serialization.to_bytes", notes
    ),
    "no statistics": Refused("inspect kernel", "`tree`", "holds no statistics", "float `mean` and `var`", kernel),
    "other norms": Refused("inspect one --population other", "`population`", "'one', 'other'", "same", statistics),
    "epsilon": Refused("inspect one --epsilon 0", "`epsilon`", "is 0.0", "a positive number", statistics),
    "a schedule": Refused(
        "inspect one --momentum warmup:0.99",
        "--momentum",
        "is warmup:0.99: expected a number in [0, 1]. Under warmup, debiased and cumulative",
        "so leave it out",
        statistics,
    ),
    "updates": Refused("inspect one --updates -1", "`updates`", "is -1", "an int of at least 0", statistics),
    "population": Refused("inspect one --population no", "--population", "is no", "expected a file", statistics),
}


def test_inspect_names_the_checkpoint_or_the_option_and_how_to_mend_it(command, tmp_path, monkeypatch):
    assert_commands_refused(REFUSED, command, tmp_path, monkeypatch)
