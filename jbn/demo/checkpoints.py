"""Checkpoints of a run on its way, by orbax's CheckpointManager: the last whole one is where a run goes on."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from jbn.demo import history
from jbn.demo.options import OptionError, Options
from jbn.demo.step import Run

KEPT = 2
DECISIVE = ("momentum", "running_var", "batch_size", "steps", "learning_rate", "seed")
"""Options that a resumed run cannot change, since the steps that were made depend on them."""


class Progress(NamedTuple):
    """A run after so many steps."""

    step: int
    run: Run
    record: history.Record


def folder_in(out: Path) -> Path:
    """Where the checkpoints of a run are, a folder a step."""
    return out.resolve() / "checkpoints"


def open_manager(options: Options) -> ocp.CheckpointManager:
    """The manager of the run's checkpoints, for one process alone, since each holds all that is saved.

    Refuses what jbn train did not write, an unfinished run unless it is resumed, and to resume with other options.
    """
    folder = folder_in(Path(options.out))
    if folder.exists() and not _is_ours(folder):
        raise OptionError(f"--out is {options.out}, and {folder} holds what is no checkpoint: name another folder.")
    folder.mkdir(exist_ok=True)
    alone = ocp.options.MultiprocessingOptions(primary_host=jax.process_index(), active_processes={jax.process_index()})
    manager = ocp.CheckpointManager(
        folder,
        options=ocp.CheckpointManagerOptions(max_to_keep=KEPT, create=False, multiprocessing_options=alone),
        item_handlers={
            "run": ocp.StandardCheckpointHandler(multiprocessing_options=alone),
            "record": ocp.JsonCheckpointHandler(multiprocessing_options=alone),
        },
    )
    step = manager.latest_step()
    if step is not None:
        _check_earlier_run(options, step, _read(manager, step, record=ocp.args.JsonRestore()).record["options"])
        if not options.resume:
            for each in manager.all_steps():
                manager.delete(each)
    return manager


def save(manager: ocp.CheckpointManager, progress: Progress, options: Options) -> None:
    """Write in the background; a checkpoint has another name until it is whole."""
    # Copies, since NumPy would look into buffers that the next step takes over.
    run = jax.tree.map(lambda array: np.array(array), progress.run._asdict())
    record = {"options": options._asdict(), "record": progress.record}
    items = ocp.args.Composite(run=ocp.args.StandardSave(run), record=ocp.args.JsonSave(record))
    manager.save(progress.step, args=items, force=True)


def restore(manager: ocp.CheckpointManager, fresh: Progress) -> Progress:
    """The last whole checkpoint; the fresh run where there is none."""
    step = manager.latest_step()
    if step is None:
        return fresh
    target = ocp.args.StandardRestore(fresh.run._asdict())
    found = _read(manager, step, run=target, record=ocp.args.JsonRestore())
    return Progress(step, Run(**found.run), history.from_lists(found.record["record"]))


def _is_ours(folder: Path) -> bool:
    """Whether there are only folders of steps, whole or in the making."""
    return folder.is_dir() and all(path.name.split(".")[0].isdigit() for path in folder.iterdir())


def _read(manager: ocp.CheckpointManager, step: int, **items: Any) -> Any:
    """Items of a checkpoint; a damaged one is named, for orbax and its stores raise many kinds of errors."""
    try:
        return manager.restore(step, args=ocp.args.Composite(**items))
    except (KeyError, ValueError, OSError) as error:
        raise OptionError(
            f"--out has a damaged checkpoint, {manager.directory / str(step)} ({type(error).__name__}): delete that "
            "folder, and --resume goes on from the one before it."
        ) from None


def _check_earlier_run(options: Options, step: int, earlier: dict[str, Any]) -> None:
    """An unfinished run is resumed as it was begun; only a finished one is replaced."""
    if not options.resume:
        if step < earlier["steps"]:
            raise OptionError(
                f"--out is {options.out}, which holds a run of {earlier['steps']} steps that ended after step {step}: "
                "give --resume to go on with it, or another folder."
            )
        return
    for name in DECISIVE:
        if getattr(options, name) != earlier[name]:
            raise OptionError(
                f"--{name.replace('_', '-')} is {getattr(options, name)}, but the run in {options.out} was begun with "
                f"{earlier[name]}: --resume needs the same."
            )
