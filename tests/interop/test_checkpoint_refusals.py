"""Files that are not a checkpoint, or hold another tree, give one clear error."""

import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, serialization
from support.refusals import Refused, assert_refused
from support.saving import by_format, save_by_flax, save_by_orbax

import jbn
from jbn import checkpoint

NORM = jbn.init(2)


@by_format
def test_one_error_lists_how_the_tree_differs(tmp_path, save):
    save(tmp_path / "saved", {"norm": jbn.init(3), "more": jnp.ones(2)})
    params, state = jbn.init(5, np.float32)
    target = {"norm": (params, state._replace(count=jnp.zeros(3, jnp.int32))), "other": jnp.ones(2)}
    with pytest.raises(ValueError, match="does not match `target`") as caught:
        jbn.checkpoint.restore(tmp_path / "saved", target)
    lines = {line.strip() for line in str(caught.value).splitlines()[1:]}
    misshaped = {f"norm/{leaf} has shape (3,), not (5,)" for leaf in ("0/scale", "0/bias", "1/mean", "1/var")}
    assert lines == {"other is missing", "more is extra", "norm/1/count has dtype float32, not int32", *misshaped}


def test_a_state_of_nnx_and_its_pure_dict_are_told_apart(tmp_path):
    state = nnx.state(jbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    pure = nnx.to_pure_dict(state)
    for name, saved, target, longer, given in (
        ("state", state, pure, "checkpoint", "nnx.state(model)"),
        ("pure", pure, state, "target", "nnx.to_pure_dict(nnx.state(model))"),
    ):
        save_by_orbax(tmp_path / name, {"model": saved, "step": jnp.int32(1)})
        for others in ({}, {"other": jnp.ones(2)}):
            with pytest.raises(ValueError, match="does not match `target`") as caught:
                jbn.checkpoint.restore(tmp_path / name, {"model": target, "step": jnp.int32(0), **others})
            head, *lines = str(caught.value).splitlines()
            assert f"The {longer} has one more level, `value`" in head
            assert head.endswith(f"Pass {given} as the target.")
            assert len(lines) == 8 + len(others)


def test_files_that_are_no_whole_checkpoint_are_refused(tmp_path):
    path = tmp_path / "saved"
    save_by_flax(path, NORM)
    whole = path.read_bytes()
    for content in (b"", b"hello world", b"\x80", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"saved (is not a complete checkpoint|does not match `target`)"):
            jbn.checkpoint.restore(path, NORM)


CUT_OFF = """
import glob, os, sys
import jbn

target = jbn.init(3)
for damage in ("_METADATA", "manifest.ocdbt", "d/*"):
    for file in glob.glob(f"{sys.argv[1]}/{damage.replace('*', '')}/{damage}"):
        os.truncate(file, os.path.getsize(file) // 2)
    try:
        jbn.checkpoint.restore(f"{sys.argv[1]}/{damage.replace('*', '')}", target)
    except ValueError as error:
        assert "is not a complete checkpoint" in str(error), error
    else:
        raise SystemExit(f"{damage} was cut off, and restored")
"""


def test_a_checkpoint_that_was_cut_off_is_refused(tmp_path):
    """This runs in a new process, since threads of orbax report errors for a while after the exception."""
    for damage in ("_METADATA", "manifest.ocdbt", "d/"):
        save_by_orbax(tmp_path / damage, jbn.init(3))
    subprocess.run([sys.executable, "-c", CUT_OFF, str(tmp_path)], check=True)


@by_format
def test_numbers_are_not_cast_in_silence(tmp_path, save):
    for i, (value, other) in enumerate([(jnp.float32(2.5), 0), (jnp.int32(5), True), (2**30 + 1, 0.0), (2.5, 1)]):
        save(tmp_path / str(i), {"a": value})
        with pytest.raises(ValueError, match="a has dtype"):
            jbn.checkpoint.restore(tmp_path / str(i), {"a": other})


def test_stored_random_keys_are_refused(tmp_path):
    save_by_orbax(tmp_path / "saved", {"key": jax.random.key(0)})
    with pytest.raises(ValueError, match=r"key has (shape|dtype)"):
        jbn.checkpoint.restore(tmp_path / "saved", {"key": jnp.zeros(2, jnp.uint32)})


def test_the_error_of_a_tree_of_one_leaf_names_the_tree_itself(tmp_path):
    save_by_flax(tmp_path / "saved", jnp.ones(4))
    with pytest.raises(ValueError, match=r"the tree itself has shape \(4,\), not \(5,\)"):
        jbn.checkpoint.restore(tmp_path / "saved", jnp.ones(5))


def test_a_file_that_may_not_be_read_is_a_permission_error(tmp_path, monkeypatch):
    save_by_flax(tmp_path / "saved", NORM)

    def refused(self):
        raise PermissionError(f"[Errno 13] Permission denied: {self}")

    monkeypatch.setattr(pathlib.Path, "read_bytes", refused)
    with pytest.raises(PermissionError):
        jbn.checkpoint.restore(tmp_path / "saved", NORM)


def written(content=b""):
    pathlib.Path("written").write_bytes(content)
    return "written"


def managed():
    """A folder with the layout of orbax's CheckpointManager that holds a norm."""
    step = pathlib.Path("managed", "0").absolute()
    save_by_orbax(step / "default", NORM)
    return step


def folder_of(*items):
    folder = pathlib.Path(f"folder_of_{len(items)}")
    folder.mkdir(exist_ok=True)
    for item in items:
        save_by_orbax(pathlib.Path(folder, item).absolute(), NORM)
    return folder


REFUSED = {
    "no path to restore": Refused(
        lambda: checkpoint.restore(NORM, "saved"), TypeError, "path", "is a tuple", "path of a file or"
    ),
    "no path to read": Refused(lambda: checkpoint.read(None), TypeError, "path", "is a NoneType", "path of a file or"),
    "no path to look in": Refused(
        lambda: checkpoint.latest(3), TypeError, "path", "is a int", "path of a file or directory"
    ),
    "nothing to restore": Refused(
        lambda: checkpoint.restore("absent", NORM),
        FileNotFoundError,
        "path",
        "absent, which does not exist",
        "a file or",
    ),
    "nothing to read": Refused(
        lambda: checkpoint.read("absent"), FileNotFoundError, "path", "absent, which does not exist", "a file or"
    ),
    "nothing to look in": Refused(
        lambda: checkpoint.latest("absent"), FileNotFoundError, "path", "absent, which does not exist", "a file or"
    ),
    "no checkpoint": Refused(
        lambda: checkpoint.read(written(b"mine")),
        ValueError,
        "path",
        "is not a complete checkpoint",
        "flax.serialization.to_bytes",
    ),
    "a folder that is no checkpoint": Refused(
        lambda: checkpoint.read(folder_of()),
        ValueError,
        "path",
        "is not a complete checkpoint",
        "flax.serialization.to_bytes",
    ),
    "a folder above the checkpoint": Refused(
        lambda: checkpoint.restore(managed(), NORM), ValueError, "path", "no orbax metadata", "give step/default"
    ),
    "a folder without checkpoints": Refused(
        lambda: checkpoint.latest(folder_of()), ValueError, "path", "0 checkpoints of orbax (none)", "give one"
    ),
    "a folder of several items": Refused(
        lambda: checkpoint.latest(folder_of("b", "a")), ValueError, "path", "2 checkpoints of orbax (a, b)", "give one"
    ),
    "another tree": Refused(
        lambda: checkpoint.restore(written(serialization.to_bytes(NORM)), NORM[1]),
        ValueError,
        "target",
        "0/scale is extra",
        "mean is missing",
    ),
    "target of objects": Refused(
        lambda: checkpoint.restore(written(), {"norm": [object()]}),
        TypeError,
        "target",
        "a object at norm/0",
        "expected arrays",
    ),
    "target of keys": Refused(
        lambda: checkpoint.restore(written(), {"key": jax.random.key(0)}),
        TypeError,
        "target",
        "a random key at key",
        "save and restore jax.random.key_data",
    ),
}


def test_what_is_no_checkpoint_path_or_target_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_refused(REFUSED)
