"""The notebooks run, reveal no paths of the machine, and give the same outputs as the committed ones."""

import base64
import itertools
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
from jupyter_client import KernelManager
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SECONDS = 240
MACHINE = re.compile(r"/(?:home|root|tmp|usr|opt|work|Users|private|var)/|site-packages|[A-Z]:\\\\")


def kinds(notebook):
    """The kinds of outputs of each cell: names of streams, and formats of results."""
    found = []
    for cell in notebook.cells:
        forms = (output.get("name") or sorted(output.get("data", ())) for output in cell.get("outputs", ()))
        # The number of pieces of a stream is random.
        found.append([form for form, _ in itertools.groupby(forms)])
    return found


def texts(notebook):
    """All text in the outputs of the cells."""
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            yield output.get("text", "")
            yield from (value for form, value in output.get("data", {}).items() if form.startswith("text"))


@pytest.fixture
def plain_environment(monkeypatch):
    """The environment of a terminal, where a notebook chooses the devices. Programs run only a few times."""
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")


def test_there_are_six_in_order():
    assert [path.name[:2] for path in NOTEBOOKS] == [f"{number}-" for number in range(1, 7)]


def test_the_site_links_each_with_a_picture_of_its_own():
    page = (FOLDER.parent / "docs" / "notebooks.md").read_text()
    offenders = []
    for path in NOTEBOOKS:
        pictures = re.findall(rf"/{path.name}\).*!\[.*?\]\(\.\./notebooks/pictures/([\w-]+\.png)\)", page)
        cells = nbformat.read(path, as_version=4).cells
        shown = {output.get("data", {}).get("image/png") for cell in cells for output in cell.get("outputs", ())}
        drawn = [base64.b64decode(image) for image in shown if image]
        if [(FOLDER / "pictures" / picture).read_bytes() in drawn for picture in pictures] != [True]:
            offenders.append(path.name)
    assert offenders == []


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("default::DeprecationWarning", "default::RuntimeWarning")  # of the client alone
def test_notebook_runs_and_shows_what_it_showed(path, plain_environment):
    committed = nbformat.read(path, as_version=4)
    assert all(cell.execution_count for cell in committed.cells if cell.cell_type == "code"), "not executed"
    run = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(FOLDER)}}
    # The blocking manager, since the event loop of the other can miss a reply on a busy machine and time out.
    options = {"timeout": SECONDS, "kernel_name": "python3", "kernel_manager_class": KernelManager}
    NotebookClient(run, resources=resources, **options).execute()
    assert kinds(run) == kinds(committed)
    for notebook in (run, committed):
        assert not any("stderr" in cell for cell in kinds(notebook)), "a warning"
        for text in texts(notebook):
            assert not MACHINE.search(text), text


@pytest.mark.slow
@pytest.mark.needs("torch")
def test_the_file_from_pytorch_is_what_pytorch_computes(tmp_path, monkeypatch):
    import torch

    cells = nbformat.read(FOLDER / "3-inside-flax.ipynb", as_version=4).cells
    (code,) = (found[1] for cell in cells if (found := re.search(r"```python\n(.*?)```", cell.source, re.DOTALL)))
    monkeypatch.chdir(tmp_path)
    made = {}
    exec(compile(code, "3-inside-flax.ipynb", "exec"), made)
    with np.load(FOLDER / "digits-torch.npz") as committed, np.load("digits-torch.npz") as again:
        assert committed.files == again.files
        state = {name: torch.tensor(committed[name]) for name in committed.files if name != "logits"}
        made["network"].load_state_dict(state)
        images = torch.tensor(made["digits"].held_out.images).movedim(-1, 1)
        with torch.no_grad():
            logits = made["network"](images).numpy()
        # The tolerance allows for sums in another order on another machine.
        np.testing.assert_allclose(logits, committed["logits"], rtol=1e-4, atol=1e-4 * np.abs(logits).max())
