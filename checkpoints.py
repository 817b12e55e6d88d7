"""Checkpoints of a run's whole state, to resume it: the last two, in <run folder>/checkpoint, by
orbax."""

import dataclasses
import json
import logging
import time
from pathlib import Path
from typing import Any, get_type_hints

import jax
import orbax.checkpoint as ocp

import runs
from optim4rl import brief

logging.getLogger("absl").setLevel(logging.ERROR)  # orbax logs every step


class Checkpoints:
    """Written at most every `minutes`; orbax writes under a temporary name and renames."""

    def __init__(self, run_folder: Path, minutes: float):
        # Not in the background: the next iteration reuses the state's buffers.
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        self.manager = ocp.CheckpointManager(run_folder.resolve() / "checkpoint", options=options)
        self.seconds, self.last = 60 * minutes, time.monotonic()

    def save_if_due(self, number: int, state: Any, log: runs.Log, now: bool = False) -> None:
        """Write a checkpoint if it is due, or `now`, and log its size and time. number: iterations
        or updates done."""
        began = time.monotonic()
        if not now and began - self.last < self.seconds:
            return
        log.flush()  # a resumed run writes only the rows after its checkpoint
        self.manager.save(number, args=ocp.args.StandardSave(state))
        self.last = time.monotonic()
        megabytes = sum(x.nbytes for x in jax.tree.leaves(state) if hasattr(x, "nbytes")) / 1e6
        log.say(f"checkpoint at {number}: {megabytes:.1f} MB in {self.last - began:.2f} s")

    def restore(self, like: Any) -> Any:
        """The newest intact state. Prints a line for each newer, damaged one; exits if there is
        none.

        like: a state of the same shapes, on the target devices.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        for number in sorted(self.manager.all_steps(), reverse=True):
            try:
                state = self.manager.restore(number, args=ocp.args.StandardRestore(abstract))
            except Exception as error:  # whatever a damaged file makes the reader raise
                print(
                    f"the checkpoint at {number} is damaged ({type(error).__name__}); "
                    "trying the one before"
                )
                self.manager.delete(number)
                continue
            print(f"resumed at {number}")
            return state
        runs.fail(f"{self.manager.directory} has no intact checkpoint")


def resumed_args(run_folder: str, given: Any, script: str) -> Any:
    """The arguments of the run in this folder.

    Raises a one-line ValueError if there is no such run of this script, or if a value in `given` is
    neither the run's nor the default.
    """
    path, args_class = Path(run_folder) / "config.json", type(given)
    try:
        config = json.loads(path.read_text())
        stored, other = config["args"], config.get("script", script)
        if other != script:
            raise ValueError(f"a run of {brief(other, 40)}.py, not of {script}.py")
        hints = get_type_hints(args_class)
        known = {name: value for name, value in stored.items() if name in hints}
        for name, value in known.items():
            if not runs.fits(value, hints[name]):
                raise ValueError(f"the {name} in its config.json is {brief(repr(value), 40)}")
        run = args_class(
            **{name: tuple(v) if isinstance(v, list) else v for name, v in known.items()}
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = brief(error)
        raise ValueError(f"--resume {run_folder}: not a run's folder ({reason})") from None
    # A checkpoint that was not written to its end has a temporary name, not a number.
    if not any(path.name.isdigit() for path in (Path(run_folder) / "checkpoint").glob("*")):
        raise ValueError(
            f"--resume {run_folder}: this run has no checkpoint yet; "
            "start it again without --resume"
        )
    for field in dataclasses.fields(args_class):
        new, old = getattr(given, field.name), getattr(run, field.name)
        if field.name != "resume" and new not in (field.default, old):
            flag = field.name.replace("_", "-")
            raise ValueError(f"--{flag} is {new} here, and {old} in the run to resume")
    return dataclasses.replace(run, resume=run_folder)
