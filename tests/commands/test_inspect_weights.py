"""`jbn inspect` of files of weights from NumPy, safetensors, PyTorch and Keras: complete, damaged and malicious."""

import pickle
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from support.command_refusals import Refused, assert_commands_refused

pytestmark = pytest.mark.standard_promotion

GOOD = {"running_mean": np.full(3, 0.5, np.float32), "running_var": np.full(3, 2.0, np.float32)}
DEAD = {**GOOD, "running_var": np.float32([2, 0, 2])}
MODEL = {f"{norm}.{name}": leaf for norm, one in (("stem.bn", GOOD), ("head.bn", DEAD)) for name, leaf in one.items()}
MODEL |= {"head.kernel": np.ones((2, 2), np.float32), "stem.bn.weight": np.ones(3, np.float32)}


def npz(path):
    np.savez(path, **MODEL)


def safetensors(path):
    from safetensors.flax import save_file

    save_file({name: jnp.asarray(leaf, jnp.bfloat16) for name, leaf in MODEL.items()}, path)


def torch(path):
    import torch

    tensors = {name: torch.tensor(leaf) for name, leaf in MODEL.items()}
    torch.save({"state_dict": {**tensors, "stem.bn.num_batches_tracked": torch.tensor(50)}, "epoch": 3}, path)


def keras(path):
    """Write a file as Keras 3 does: the variables of a layer have numbers, with the statistics last."""
    import h5py

    with h5py.File(path, "w") as file:
        for name, norm in (("bn_3", GOOD), ("batch_normalization", DEAD)):
            of_scale = [np.ones(3)] * (norm is DEAD)
            arrays = [*of_scale, np.zeros(3), norm["running_mean"], norm["running_var"]]
            for number, array in enumerate(arrays):
                file[f"layers/{name}/vars/{number}"] = array
        file["layers/layer_normalization/vars/0"] = np.ones(3)
        file["layers/layer_normalization/vars/1"] = np.ones(3)


def named_keras(path):
    """Write a file as Keras 2 does."""
    import h5py

    with h5py.File(path, "w") as file:
        for name, norm in (("stem", GOOD), ("bn", DEAD)):
            file[f"{name}/{name}/moving_mean:0"] = norm["running_mean"]
            file[f"{name}/{name}/moving_variance:0"] = norm["running_var"]


FILES = {
    "model.npz": (npz, "head.bn"),
    "model.safetensors": (safetensors, "head.bn"),
    "model.weights.h5": (keras, "layers/batch_normalization"),
    "model.hdf5": (named_keras, "bn/bn"),
}


def rows_of(out):
    return {cells[0]: cells for line in out.splitlines() if (cells := re.split(r"\s{2,}", line)) and len(cells) > 5}


def assert_dead_is_found(command, path, write, dead):
    write(path)
    ended = command("inspect", path)
    rows = rows_of(ended.out)
    assert ended.status == 1, ended.err
    assert len(rows) == 3, rows
    assert ended.out.splitlines()[-1] == f"1 of 2 norms are faulty: {dead}"


@pytest.mark.parametrize("name", FILES)
def test_the_norms_of_a_file_are_found_and_their_faults(command, tmp_path, name):
    assert_dead_is_found(command, tmp_path / name, *FILES[name])


@pytest.mark.needs("torch")
@pytest.mark.parametrize("ending", ["pt", "pth"])
def test_the_norms_of_a_file_of_pytorch_are_found(command, tmp_path, ending):
    path = tmp_path / f"model.{ending}"
    torch(path)
    ended = command("inspect", path)
    rows = rows_of(ended.out)
    assert rows["state_dict/stem.bn"][2] == "50"
    assert ended.out.splitlines()[-1].endswith("norms are faulty: state_dict/head.bn")


def test_a_picture_is_drawn_with_and_without_a_population(command, tmp_path):
    path = tmp_path / "model.npz"
    npz(path)
    for options in ((), ("--population", path)):
        picture = tmp_path / f"{len(options)}.png"
        ended = command("inspect", path, *options, "--plot", picture)
        assert f"wrote {picture}" in ended.out
        assert picture.stat().st_size > 1000


def test_a_picture_of_no_usable_variance_is_drawn(command, tmp_path):
    np.savez(tmp_path / "model.npz", **{"bn.mean": np.ones(3), "bn.var": -np.ones(3)})
    assert command("inspect", tmp_path / "model.npz", "--plot", tmp_path / "a.png").status == 1


class Hostile:
    """Writes a file when it is unpickled."""

    def __reduce__(self):
        return (Path("ran").write_text, ("code of the file ran",))


def pickled():
    np.savez("model.npz", **{"bn.mean": np.array([Hostile()], object)})


def hostile_torch():
    Path("model.pt").write_bytes(pickle.dumps({"bn.running_mean": Hostile()}))


def cut(write, name):
    def prepare():
        write(Path(name))
        Path(name).write_bytes(Path(name).read_bytes()[:-200])

    return prepare


def huge():
    """Write a header that declares an array larger than any memory."""
    import zipfile

    header = b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '<f4', 'fortran_order': False, 'shape': (4611686018427387904,), }"
    with zipfile.ZipFile("model.npz", "w") as file:
        file.writestr("bn.mean.npy", header.ljust(127) + b"\n")


def text():
    for name in ("model.npz", "model.safetensors", "model.h5"):
        Path(name).write_text("not weights")


def two_names():
    np.savez("model.npz", **{"bn.running_mean": np.ones(3), "bn/mean": np.ones(3)})


def half():
    np.savez("model.npz", **{"bn.running_mean": np.ones(3)})


def weights_alone():
    np.savez("model.npz", kernel=np.ones(3))


REFUSED = {
    "pickled": Refused(
        "inspect model.npz", "checkpoint is model.npz", "not a complete .npz file", "allow_pickle", pickled
    ),
    "cut npz": Refused("inspect model.npz", "checkpoint", "not a complete .npz file", "zip", cut(npz, "model.npz")),
    "cut safetensors": Refused(
        "inspect model.safetensors",
        "checkpoint",
        "not a complete .safetensors file",
        "Error",
        cut(safetensors, "model.safetensors"),
    ),
    "cut h5": Refused("inspect model.h5", "checkpoint", "not a complete .h5 file", "truncated", cut(keras, "model.h5")),
    "huge": Refused("inspect model.npz", "checkpoint", "not a complete .npz file", "Error", huge),
    "text npz": Refused("inspect model.npz", "checkpoint", "not a complete .npz file", "not a zip file", text),
    "text safetensors": Refused(
        "inspect model.safetensors", "checkpoint", "not a complete .safetensors file", "Error", text
    ),
    "text h5": Refused("inspect model.h5", "checkpoint", "not a complete .h5 file", "signature", text),
    "two of a path": Refused("inspect model.npz", "checkpoint", "two norms at bn", "names of two libraries", two_names),
    "no norm": Refused(
        "inspect model.npz", "checkpoint", "it has no complete norm: ", "running_mean, running_var", weights_alone
    ),
    "half a norm": Refused("inspect model.npz", "checkpoint", "only some statistics of bn", "moving_mean", half),
    "plot": Refused(
        "inspect model.npz --plot no/such.png",
        "--plot",
        "no/such.png",
        "be written",
        lambda: npz("model.npz"),
    ),
}


def test_broken_and_hostile_files_are_refused_and_nothing_in_them_runs(command, tmp_path, monkeypatch):
    assert_commands_refused(REFUSED, command, tmp_path, monkeypatch)
    assert not list(tmp_path.rglob("ran"))


@pytest.mark.needs("torch")
def test_a_hostile_file_of_pytorch_is_refused(command, tmp_path, monkeypatch):
    row = Refused("inspect model.pt", "checkpoint", "not a complete .pt file", "weights_only", hostile_torch)
    assert_commands_refused({"hostile": row}, command, tmp_path, monkeypatch)
    assert not list(tmp_path.rglob("ran"))


@pytest.mark.parametrize(("package", "name"), [("safetensors", "a.safetensors"), ("torch", "a.pt"), ("h5py", "a.h5")])
def test_a_missing_package_is_named(command, tmp_path, monkeypatch, package, name):
    import sys

    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / name).write_bytes(b"")
    ended = command("inspect", tmp_path / name)
    assert ended.status == 2
    assert f"pip install {package}" in ended.err
