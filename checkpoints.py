"""Checkpoints of a run's whole state, to resume it: the last two, in <run folder>/checkpoint.

checkpoint/<number>/state is orbax's, run.json describes the state and the run's arguments, and
digest is that of both. All are written in <number>.tmp, which is then renamed: a kill at any moment
leaves no <number> without a digest. A checkpoint whose files do not match its digest is damaged.
"""

import dataclasses
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any, get_type_hints

import jax
import numpy as np
import orbax.checkpoint as ocp

import checks
import command_line
import devices
import optimizers
import runs
from optim4rl import brief


def only_in_main_thread(error) -> None:
    if threading.current_thread() is threading.main_thread():
        sys.__unraisablehook__(error)


def silence_orbax() -> None:
    """It logs every step. An error that it raises comes from its threads, which print it too;
    asyncio prints those of its other files, which nobody asks for."""
    for logger in ("absl", "asyncio"):
        logging.getLogger(logger).setLevel(logging.CRITICAL + 1)
    sys.unraisablehook = only_in_main_thread


OF_A_START = ("resume", "process_id", "coordinator")  # arguments of one start, not of the run
# What a resumed run may be given anew. On other devices sums have another order, so that results
# are not the same bit for bit.
MAY_CHANGE = ("num_devices", "checkpoint_minutes", "save_theta_every")


class Checkpoints:
    """Of the run in run_folder with these arguments: every args.checkpoint_minutes, the first after
    a minute at most.

    With several processes, all of them must call save_if_due and restore, at the same number. A
    disk or memory that fails or is full is a one-line OSError.
    """

    def __init__(self, run_folder: Path, args: Any):
        silence_orbax()
        self.folder, self.args = run_folder.resolve() / "checkpoint", args
        self.seconds = 60 * args.checkpoint_minutes
        self.due = time.monotonic() + min(60, self.seconds)
        self.orbax = ocp.Checkpointer(ocp.StandardCheckpointHandler())
        self.shared = not devices.largest_of_processes(not run_folder.is_dir())
        if not self.shared:
            print(f"no checkpoints: not all processes have {run_folder}")

    def save_if_due(self, number: int, state: Any, log: runs.Log, now: bool = False) -> None:
        """Write a checkpoint if it is due, or `now`, and log its size and time. number: iterations
        or updates done."""
        began = time.monotonic()
        if not self.shared or not devices.largest_of_processes(now or began >= self.due):
            return
        log.flush()  # a resumed run writes only the rows after its checkpoint
        try:
            self.save(number, state)
        except Exception as error:  # orbax has a ValueError for a full disk
            self.remove_unfinished()
            raise one_line(f"{self.folder / str(number)} could not be written", error) from error
        ended = time.monotonic()
        self.due = ended + self.seconds
        megabytes = sum(x.nbytes for x in jax.tree.leaves(state) if hasattr(x, "nbytes")) / 1e6
        log.say(f"checkpoint at {number}: {megabytes:.1f} MB in {ended - began:.2f} s")

    def save(self, number: int, state: Any) -> None:
        new = self.folder / f"{number}.tmp"
        new.mkdir(parents=True, exist_ok=True)
        self.orbax.save(new / "state", args=ocp.args.StandardSave(state))
        if jax.process_index() == 0:
            description = {"arguments": arguments(self.args), "arrays": arrays(state)}
            (new / "run.json").write_text(json.dumps(description, indent=2))
            (new / "digest").write_text(digest(new))
            os.replace(new, self.folder / str(number))
            for old in self.numbers()[:-2]:
                # A kill in the middle leaves a name that remove_unfinished knows.
                os.replace(self.folder / str(old), self.folder / f"{old}.tmp")
                shutil.rmtree(self.folder / f"{old}.tmp")
        devices.wait_for_all(f"checkpoint {number} written")

    def restore(self, like: Any) -> Any:
        """The newest intact state. Prints a line for each newer, damaged one, and moves it aside.

        Exits, and changes nothing, if there is none, or if it is of another structure than this
        run's state. like: a state of the same shapes, on the target devices.
        """
        if not self.shared:
            runs.fail(f"--resume {self.args.resume}: not all processes have this folder")
        damaged = []
        for number in reversed(self.numbers()):
            folder = self.folder / str(number)
            try:
                reason = damage(folder)
                devices.wait_for_all(f"checkpoint {number} checked")
                if devices.largest_of_processes(reason is not None):
                    reason = reason or "for another process"
                    print(
                        f"the checkpoint at {number} is damaged ({reason}); trying the one before"
                    )
                    damaged.append(folder)
                    continue
                self.check_structure(folder, like)
                abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
                args = ocp.args.StandardRestore(abstract)
                state = jax.block_until_ready(self.orbax.restore(folder / "state", args=args))
            except Exception as error:  # the disk or memory: the files have their digest
                raise one_line(f"{folder} could not be read", error) from error
            devices.wait_for_all("restored")
            if jax.process_index() == 0:
                self.remove_unfinished()
                for path in damaged:
                    aside = path.with_suffix(".damaged")
                    shutil.rmtree(aside, ignore_errors=True)
                    os.replace(path, aside)
            print(f"resumed at {number}")
            return state
        runs.fail(f"{self.folder} has no intact checkpoint")

    def restore_if_resumed(self, state: Any) -> Any:
        """The state to begin with: `state`, or the newest checkpoint of the run to resume, whose
        config.json then gets the arguments that are new."""
        if not self.args.resume:
            return state
        state = self.restore(state)
        self.store_args()
        return state

    def store_args(self) -> None:
        """Put arguments that a resumed run was given, as a new length, into its config.json."""
        if jax.process_index() > 0:
            return
        config = json.loads((self.folder.parent / "config.json").read_text())
        given = json.loads(json.dumps(dataclasses.asdict(self.args)))
        given = {name: value for name, value in given.items() if name not in OF_A_START}
        if given != {name: config["args"].get(name) for name in given}:
            config["args"] |= given
            runs.write_config(self.folder.parent, config)

    def numbers(self) -> list[int]:
        paths = self.folder.iterdir() if self.folder.exists() else ()
        return sorted(int(path.name) for path in paths if path.name.isdigit())

    def remove_unfinished(self) -> None:
        for path in self.folder.iterdir() if self.folder.exists() else ():
            if path.suffix == ".tmp" or ".orbax-checkpoint-tmp" in path.name:
                remove(path)

    def check_structure(self, folder: Path, like: Any) -> None:
        """Exit unless the checkpoint's arrays have the names, shapes and dtypes of `like`. Print
        the arguments, and files that they name, that have changed."""
        stored, here = json.loads((folder / "run.json").read_text()), arrays(like)
        changed = "; ".join(differences(stored["arguments"], arguments(self.args)))
        if unlike := differences(stored["arrays"], here):
            cause = changed or "the arguments are the same, the code or its packages may not be"
            runs.fail(f"{folder} is not of this run's state: {cause}. In the state, {unlike[0]}")
        if changed:
            print(f"changed since the checkpoint: {changed}")


def remove(folder: Path) -> None:
    """Remove a folder, which threads of orbax may make again for a moment after an error."""
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.3)
        if not folder.exists():
            return


def arrays(state: Any) -> dict[str, str]:
    """name -> dtype and shape of each array and number."""
    return {
        jax.tree_util.keystr(path): f"{getattr(x, 'dtype', type(x).__name__)}{list(np.shape(x))}"
        for path, x in jax.tree.leaves_with_path(state)
    }


def arguments(args: Any) -> dict[str, str]:
    """flag -> value, with a digest of the theta file that it names."""
    found = {}
    for name, value in dataclasses.asdict(args).items():
        if name in OF_A_START:
            continue
        text, file = str(value), None
        if name in ("optimizer", "theta") and value:
            file = optimizers.theta_file(value)
        if file and Path(file).is_file():
            text += f" with digest {file_digest(Path(file))[:8]}"
        found[f"--{name.replace('_', '-')}"] = text
    return found


def differences(stored: dict[str, str], here: dict[str, str]) -> list[str]:
    return [
        f"{name} is {here.get(name, 'missing')}, and was {stored.get(name, 'missing')}"
        for name in stored | here
        if stored.get(name) != here.get(name)
    ]


def file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def digest(folder: Path) -> str:
    """Of the names and contents of the files of a checkpoint. Raises OSError if one cannot be
    read."""

    def refuse(error):
        raise error

    files = [
        Path(root) / name for root, _, names in os.walk(folder, onerror=refuse) for name in names
    ]
    lines = [
        f"{path.relative_to(folder)} {file_digest(path)}\n"
        for path in sorted(files)
        if path != folder / "digest"
    ]
    return hashlib.blake2b("".join(lines).encode()).hexdigest()


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, if anything. Raises OSError if it cannot be read."""
    path = folder / "digest"
    if not path.is_file():
        return "it has no digest: an older version wrote it"
    return None if path.read_bytes() == digest(folder).encode() else "its files have changed"


def one_line(what: str, error: Exception) -> OSError:
    code = re.search(r"os_error_code='(\d+)'", str(error))  # tensorstore's
    number = int(code[1]) if code else getattr(error, "errno", None)
    text = f"{type(error).__name__} {error}".split("\n")[0][:200]
    return OSError(f"{what}: {os.strerror(number) if number else text}")


def resumed_args(run_folder: str, given: Any, script: str) -> Any:
    """The arguments of the run in this folder. A flag of MAY_CHANGE that is given replaces the
    run's. given: the arguments of this start; one counts as given if it is on the command line or
    not at its default.

    Raises a one-line ValueError if there is no such run of this script, or if any other given flag
    differs from the run's.
    """
    path, args_class = Path(run_folder) / "config.json", type(given)
    try:
        config = json.loads(path.read_text())
        stored, other = config["args"], config.get("script", script)
        if other != script:
            raise ValueError(f"a run of {brief(other, 40)}.py, not of {script}.py")
        hints = get_type_hints(args_class)
        known = {name: value for name, value in stored.items() if name in hints}
        if known.get("grad_clip") == "inf":
            known["grad_clip"] = float("inf")
        for name, value in known.items():
            if not checks.fits(value, hints[name]):
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
    now = {name: getattr(given, name) for name in OF_A_START if hasattr(given, name)}
    for field in dataclasses.fields(args_class):
        new, old = getattr(given, field.name), getattr(run, field.name)
        if field.name in OF_A_START or new in (None, old):
            continue
        if not command_line.is_given(given, field.name):
            continue
        if field.name not in MAY_CHANGE:
            flag = field.name.replace("_", "-")
            raise ValueError(f"--{flag} is {new} here, and {old} in the run to resume")
        now[field.name] = new
    return dataclasses.replace(run, **now | {"resume": run_folder})
