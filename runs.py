"""The parts that all scripts share: errors, files, run folder, log."""

import contextlib
import csv
import dataclasses
import importlib.metadata
import io
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from tensorboardX import SummaryWriter
from tqdm import tqdm

PACKAGES = ("jax", "jaxlib", "optax", "numpy", "chex", "brax")


def fail(message: str, code: int = 2) -> None:
    """Print one line on stderr and exit."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(code)


@contextlib.contextmanager
def bad_input():
    """Around all checks of the user's input, before any long work: their errors end the program in
    one line."""
    try:
        yield
    except (ValueError, OSError) as error:
        fail(error)


def explain(kind: type, error: BaseException, traceback) -> None:
    """In place of the traceback of an error that is not a defect: Ctrl-C outside of
    interruptible(), a disk that is full or fails."""
    if issubclass(kind, KeyboardInterrupt):
        print("\ninterrupted", file=sys.stderr)
    elif issubclass(kind, OSError):
        print(f"error: {error}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


def cache_programs() -> None:
    """Keep compiled programs in ~/.cache, unless the user chose another folder."""
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser("~/.cache/optim4rl-jax"))


@contextlib.contextmanager
def interruptible():
    """`with interruptible() as interrupted:` around the work and the saving of its results.

    Ctrl-C and SIGTERM then only ask to stop: interrupted() is 0, or the exit code to end with. Call
    it where the state is whole, not inside an iteration that reuses the buffers of the previous
    one. A second Ctrl-C ends the program at once. A file that cannot be written ends it in one
    line.
    """
    asked: list[int] = []

    def ask(number, _):
        if not asked:
            os.write(
                sys.stderr.fileno(),
                b"\ninterrupted: stopping after this iteration, what was done so far is kept; "
                b"Ctrl-C again stops at once\n",
            )
        elif number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        asked.append(number)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: 128 + asked[0] if asked else 0
    except OSError as error:
        # TensorBoard's thread, and its function at exit, would print the same of a full disk.
        sys.unraisablehook = threading.excepthook = lambda _: None
        fail(error, code=1)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def write_whole(path: str | os.PathLike, write: Callable) -> None:
    """Call write(buffer), and put the buffer into `path` by way of a temporary file: a reader never
    finds half a file."""
    buffer, temporary = io.BytesIO(), f"{os.fspath(path)}.{os.getpid()}.tmp"
    write(buffer)
    try:
        with open(temporary, "wb") as file:
            file.write(buffer.getbuffer())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def write_text(path: str | os.PathLike, text: str) -> None:
    write_whole(path, lambda file: file.write(f"{text}\n".encode()))


def write_csv(path: str | os.PathLike, columns: tuple, rows: list) -> None:
    text = io.StringIO()
    csv.writer(text).writerows([columns, *rows])
    write_whole(path, lambda file: file.write(text.getvalue().encode()))


def version(package: str) -> str | None:
    """None if it is not installed, as Brax may not be."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)


def make_folder(runs_dir: str, env_name: str, script: str, seed: int, args: Any) -> Path:
    """Make <runs_dir>/<env>__<script>__<seed>__<time> with config.json: script, arguments,
    packages' versions, machine."""
    versions = {package: version(package) for package in PACKAGES}
    machine = {
        "backend": jax.default_backend(),
        "devices": jax.device_count(),
        "cores": os.cpu_count(),
    }
    config = {"script": script, "args": dataclasses.asdict(args)}
    config |= {"versions": versions, "machine": machine}
    first, *others = env_name.split("+")
    if len(env_name) > 100:  # a file system has a limit
        env_name = f"{first}+{len(others)}_others"
    name = f"{env_name}__{script}__{seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    for count in range(1, 100):
        folder = Path(runs_dir) / (name if count == 1 else f"{name}-{count}")
        with contextlib.suppress(FileExistsError):  # of another run in the same second
            folder.mkdir(parents=True)
            break
    try:
        write_config(folder, config)
    except OSError:
        folder.rmdir()
        raise
    return folder


def without_infinity(args: dict) -> dict:
    """Arguments for JSON, which has no infinity: a grad_clip can be, and becomes "inf"."""
    return {name: "inf" if x == float("inf") else x for name, x in args.items()}


def write_config(folder: Path, config: dict) -> None:
    """config["args"]: the arguments"""
    args = without_infinity(config["args"])
    write_text(folder / "config.json", json.dumps(config | {"args": args}, indent=2))


def run_folder(args: Any, env_name: str, script: str) -> Path:
    """The folder of the resumed run, or a new one."""
    return (
        Path(args.resume)
        if args.resume
        else make_folder(args.runs_dir, env_name, script, args.seed, args)
    )


def progress(total: int, title: str = "", initial: int = 0) -> tqdm:
    """A progress bar with the remaining time. initial: how many are done before the time starts."""
    return tqdm(total=total, desc=title, initial=initial, dynamic_ncols=True)


def warn_if_long(seconds: float, advice: str) -> None:
    """Print a line if a job will take over ten minutes without an accelerator."""
    if jax.default_backend() == "cpu" and seconds > 600:
        tqdm.write(
            f"there is no accelerator: this will take about {seconds / 60:.0f} minutes; {advice}"
        )


def rows_before(path: Path, number: int) -> str:
    """The rows of metrics.csv before `number`, with its header; "" if there are none. Drops later
    rows, which are made again, and an unfinished one."""
    text = path.read_bytes().decode(errors="replace") if path.exists() else ""
    lines = text.splitlines(keepends=True)
    kept = [line for line in lines[1:] if line.endswith("\n") and line.split(",")[0].isdigit()]
    kept = [line for line in kept if int(line.split(",")[0]) < number]
    return "".join(lines[:1] + kept) if kept else ""


class Log:
    """metrics.csv, TensorBoard events and a progress bar, all from write(). They start with the
    first row, so what fails before it changes nothing. With several processes, process 0's.

    Numbers are fetched from the device at intervals, not at every call, so the device never waits.
    """

    def __init__(self, folder: Path, total: int, seconds: float = 0.5):
        self.folder, self.total = folder, total
        self.waiting: list[tuple[int, dict]] = []
        self.seconds, self.last_flush = seconds, time.monotonic()
        self.rows: csv.DictWriter | None = None
        self.opened = contextlib.ExitStack()

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_) -> None:
        with self.opened:  # closes all, also if a disk is full
            self.flush()

    def write(self, number: int, metrics: dict) -> None:
        """Log a row. number: updates or iterations done; metrics: scalars, on the device or not."""
        if jax.process_index() != 0:
            return
        self.waiting.append((number, metrics))
        if time.monotonic() - self.last_flush > self.seconds:
            self.flush()

    def say(self, message: str) -> None:
        if jax.process_index() == 0:
            tqdm.write(message)

    def open(self, number: int, names: list[str]) -> None:
        """Start all; in a resumed run metrics.csv continues after the rows before this number."""
        path = self.folder / "metrics.csv"
        before = rows_before(path, number)
        write_whole(path, lambda file: file.write(before.encode()))
        self.file = self.opened.enter_context(open(path, "a", newline=""))  # noqa: SIM115
        # Events from this number on, of before a kill, are made again and no longer shown.
        self.events = SummaryWriter(str(self.folder), purge_step=number if before else None)
        self.opened.callback(self.events.close)
        # The remaining time follows from what is done from here on: not before a resumption.
        self.bar = self.opened.enter_context(progress(self.total, initial=number))
        self.rows = csv.DictWriter(self.file, names)
        if not before:
            self.rows.writeheader()

    def flush(self) -> None:
        if not self.waiting:
            return
        for number, metrics in jax.device_get(self.waiting):
            row = {
                name: value if isinstance(value, int) else float(value)
                for name, value in metrics.items()
            }
            if self.rows is None:
                self.open(number, ["number", *row])
            texts = {k: str(x) if isinstance(x, int) else f"{x:.6g}" for k, x in row.items()}
            self.rows.writerow({"number": number, **texts})
            for name, value in row.items():
                self.events.add_scalar(name, value, number)
        self.bar.update(number - self.bar.n)
        self.bar.set_postfix(
            {name: f"{value:.3g}" for name, value in row.items() if "seed" not in name}
        )
        self.file.flush()
        self.waiting, self.last_flush = [], time.monotonic()
