"""Save and restore the state of a run with orbax's CheckpointManager. A resumed run starts from the last checkpoint."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

import jbn
from jbn.demo import history
from jbn.demo.options import OptionError, Options
from jbn.demo.step import Run

KEPT = 2
DECISIVE = ("momentum", "running_var", "batch_size", "steps", "learning_rate", "seed")
"""Options that a resumed run cannot change, because the earlier steps depend on them."""


class Progress(NamedTuple):
    """A run after a number of steps."""

    step: int
    run: Run
    record: history.Record


def folder_in(out: Path) -> Path:
    """The folder with the checkpoints of a run; it has one folder per saved step."""
    return out.resolve() / "checkpoints"


def open_manager(options: Options) -> ocp.CheckpointManager:
    """The manager of the run's checkpoints. It belongs to one process, because every process holds all saved arrays.

    Raises OptionError for a folder that `jbn train` did not write, for an unfinished run without --resume, and for
    --resume with other options.
    """
    folder = folder_in(Path(options.out))
    if folder.exists() and not _is_ours(folder):
        raise OptionError(
            f"--out is {options.out}, but {folder} holds files that are not checkpoints. Choose another folder."
        )
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
    """Write a checkpoint in the background; it has a temporary name until it is complete."""
    # Copies, because NumPy arrays would share buffers that the next step overwrites.
    run = jax.tree.map(lambda array: np.array(array), progress.run._asdict())
    record = {"options": options._asdict(), "record": progress.record}
    items = ocp.args.Composite(run=ocp.args.StandardSave(run), record=ocp.args.JsonSave(record))
    manager.save(progress.step, args=items, force=True)


def restore(manager: ocp.CheckpointManager, fresh: Progress) -> Progress:
    """The last complete checkpoint, or the fresh run if there is none."""
    step = manager.latest_step()
    if step is None:
        return fresh
    target = ocp.args.StandardRestore(fresh.run._asdict())
    found = _read(manager, step, run=target, record=ocp.args.JsonRestore())
    # A run that jbn 0.1 saved has one count for each norm.
    run = Run(**{**found.run, "state": jax.tree.map(np.asarray, jbn.upgrade(found.run["state"]))})
    return Progress(step, run, history.from_lists(found.record["record"]))


def _is_ours(folder: Path) -> bool:
    """Whether the folder holds only folders of steps, complete or still being written."""
    return folder.is_dir() and all(path.name.split(".")[0].isdigit() for path in folder.iterdir())


def _read(manager: ocp.CheckpointManager, step: int, **items: Any) -> Any:
    """Read items of a checkpoint. Orbax raises many kinds of errors for damaged files; they become one OptionError."""
    try:
        return manager.restore(step, args=ocp.args.Composite(**items))
    except (KeyError, ValueError, OSError) as error:
        raise OptionError(
            f"--out has a damaged checkpoint, {manager.directory / str(step)} ({type(error).__name__}). Delete this "
            "folder; --resume then continues from the checkpoint before it."
        ) from None


def _check_earlier_run(options: Options, step: int, earlier: dict[str, Any]) -> None:
    """Require --resume for an unfinished run, and the same options for --resume. A finished run is replaced."""
    if not options.resume:
        if step < earlier["steps"]:
            raise OptionError(
                f"--out is {options.out}, which holds a run of {earlier['steps']} steps that ended after step {step}. "
                "Continue it with --resume, or choose another folder."
            )
        return
    for name in DECISIVE:
        if getattr(options, name) != earlier[name]:
            raise OptionError(
                f"--{name.replace('_', '-')} is {getattr(options, name)}, but the run in {options.out} started with "
                f"{earlier[name]}: --resume needs the same value."
            )
