"""`jbn train`: runs that are interrupted, resumed, repeated, replaced, or that diverge."""

import json
import shutil
from typing import NamedTuple

import jax
import numpy as np
import pytest
from support import small_network
from support.tolerances import assert_same_trees

import jbn
from jbn.demo import checkpoints, history, loop, picture
from jbn.demo.options import Options
from jbn.demo.step import Run

pytestmark = [pytest.mark.standard_promotion, pytest.mark.usefixtures("small")]

RUN = ("train", "--steps", 4, "--batch-size", 16, "--devices", 1, "--checkpoint-every", 1, "--out")


class Story(NamedTuple):
    """The folder of a run of 4 steps that was interrupted after step 2 and then resumed, and both results."""

    folder: object
    interrupted: object
    resumed: object


@pytest.fixture(scope="module")
def story(small, command, tmp_path_factory):
    folder, save = tmp_path_factory.mktemp("story"), checkpoints.save

    def save_and_stop(manager, progress, options):
        save(manager, progress, options)
        if progress.step == 2:
            manager.wait_until_finished()
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(checkpoints, "save", save_and_stop)
        interrupted = command(*RUN, folder, "--resume")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(picture, "draw", small_network.blank_picture)
        return Story(folder, interrupted, command(*RUN, folder, "--resume"))


def test_counts_of_jbn_0_1_become_those_of_each_feature(tmp_path):
    """A run that jbn 0.1 saved has one int32 count for each norm."""
    options = Options(out=str(tmp_path), steps=2)
    state = jbn.init(3)[1]._replace(count=np.full(3, 2, np.float32))
    fresh = checkpoints.Progress(0, Run({}, {"norm": jax.tree.map(np.asarray, state)}, {}), history.Record([], [], []))
    old = fresh.run._replace(state={"norm": state._replace(count=np.int32(2))})
    with checkpoints.open_manager(options) as manager:
        checkpoints.save(manager, fresh._replace(step=1, run=old), options)
        manager.wait_until_finished()
        assert_same_trees(checkpoints.restore(manager, fresh).run.state, {"norm": state})


def test_resuming_what_was_not_begun_starts_from_the_first_step(story):
    assert f"nothing to resume in {story.folder}" in story.interrupted.out
    assert "step 1/4" in story.interrupted.out


def test_an_interrupted_run_ends_quietly_and_says_how_to_go_on(story):
    assert story.interrupted.status == 130
    assert "jbn train: interrupted; --resume continues from the last checkpoint" in story.interrupted.err
    assert "Traceback" not in story.interrupted.err


def test_a_resumed_run_goes_on_after_the_last_checkpoint(story):
    assert story.resumed.status == 0
    assert "resumed after step 2" in story.resumed.out
    assert "step 3/4" in story.resumed.out
    assert "step 1/4" not in story.resumed.out
    assert len(json.loads((story.folder / "history.json").read_text())["loss"]) == 4


def test_a_finished_run_is_told_again(story, command, monkeypatch):
    monkeypatch.setattr(picture, "draw", small_network.blank_picture)
    again = command(*RUN, story.folder, "--resume")
    assert again.status == 0
    assert "resumed after step 4" in again.out
    assert "step 4/4" not in again.out
    assert again.out[again.out.index("held-out") :] == story.resumed.out[story.resumed.out.index("held-out") :]


@pytest.fixture(scope="module")
def diverged(story, command, tmp_path_factory):
    """The folder of a diverged run that replaced a finished one, and the results of the run and of its resumption."""
    folder = tmp_path_factory.mktemp("diverged") / "run"
    shutil.copytree(story.folder, folder)
    run = ("train", "--steps", 3, "--batch-size", 16, "--learning-rate", 1e30, "--devices", 1, "--out", folder)
    return folder, [command(*run), command(*run, "--resume")]


def test_a_finished_run_is_replaced_by_a_new_one(diverged):
    folder, _ = diverged
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["3"]


def test_a_run_that_diverges_says_so_and_again_when_resumed(diverged):
    folder, endings = diverged
    for ended in endings:
        assert ended.status == 1
        printed = " ".join(ended.out.split())
        assert "lower --learning-rate" in printed
        assert "1 update in 3 steps" in printed
    history = json.loads((folder / "history.json").read_text(), parse_constant=pytest.fail)
    assert history["loss"][-1] is None
    assert history["looks"][-1]["batch"]["mean"] == [None] * loop.CHANNELS
