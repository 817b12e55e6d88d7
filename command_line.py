"""The command line of every script, from a dataclass: its fields are the flags."""

import ast
import contextlib
import dataclasses
import inspect
import io
import itertools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import tyro

import runs

SECTION = re.compile(r" *# --- (.*) ---")


def parse(args_class: type, description: str, settings: Callable | None = None) -> Any:
    """The command line as an args_class. An error becomes one line, and so do those of runs.explain
    later on. Also turns on jax's cache of compiled programs.

    settings: environment's name -> values of flags that are not set, unless a run is resumed. It
    may raise ValueError.
    """
    sys.excepthook = runs.explain
    runs.cache_programs()
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            values = environment_settings(args_class, settings)
            sections = tyro.cli(by_section(args_class, values), description=description)
    except ValueError as error:
        runs.fail(error)
    except SystemExit as end:
        if not end.code:
            raise
        # Without the box, its title, and colours; a terminal without Unicode has rows of dashes.
        box = r"\x1b\[[0-9;]*m|╭.*╮|[╰╯│─]|\A.*\n\s*-{5,}|-{5,}"
        message = re.sub(box, " ", stderr.getvalue())
        runs.fail(re.split("Argument helptext|For full helptext", message)[0])
    args = args_class(
        **{
            name: value
            for section in vars(sections).values()
            for name, value in vars(section).items()
        }
    )
    for name, value in vars(args).items():
        if value == "" or isinstance(value, tuple) and "" in value:
            runs.fail(f"--{name.replace('_', '-')} must not be empty")
    with runs.bad_input():  # OSError: a name that is too long, a folder that may not be entered
        runs_dir = Path(getattr(args, "runs_dir", "."))
        there = next(path for path in (runs_dir, *runs_dir.parents) if path.exists())
        if not there.is_dir():
            raise ValueError(f"--runs-dir {runs_dir}: {there} is not a folder")
    return args


def environment_settings(args_class: type, settings: Callable | None) -> dict:
    """The settings of the environment on the command line, for the flags of args_class. --help
    shows them too."""
    if settings is None or "resume" in flags_given():
        return {}
    fields = {field.name: field for field in dataclasses.fields(args_class)}
    name = fields["env_name"]
    only_name = dataclasses.make_dataclass("OnlyName", [(name.name, name.type, name.default)])
    known, _ = tyro.cli(only_name, args=sys.argv[1:], return_unknown_args=True, add_help=False)
    return {name: value for name, value in settings(known.env_name).items() if name in fields}


def by_section(args_class: type, values: dict) -> type:
    """A dataclass of dataclasses, one for each "# --- Section ---" in the source of args_class.
    --help shows them as groups.

    values: replace the fields' defaults.
    """
    sections: dict = {}
    hints = get_type_hints(args_class, include_extras=True)
    for name, (section, text) in documented_fields(args_class).items():
        default = values.get(name, getattr(args_class, name, dataclasses.MISSING))
        field = (
            name,
            Annotated[hints[name], tyro.conf.arg(help=text)],
            dataclasses.field(default=default),
        )
        sections.setdefault(section, []).append(field)
    groups = []
    for section, fields in sections.items():
        group = dataclasses.make_dataclass(section, fields, frozen=True)
        name = re.sub(r"\W", "_", section.lower())
        groups.append((name, tyro.conf.OmitArgPrefixes[group]))
    return dataclasses.make_dataclass(args_class.__name__, groups, frozen=True)


def documented_fields(args_class: type) -> dict:
    """name -> (section, docstring) of each field of a dataclass and its bases, from the source."""
    found = {}
    for cls in reversed(args_class.__mro__[:-1]):
        source = inspect.getsource(cls)
        titles = {0: "Task"} | {
            i: m[1] for i, line in enumerate(source.splitlines(), 1) if (m := SECTION.match(line))
        }
        body = ast.parse(source).body[0].body
        for field, text in itertools.zip_longest(body, body[1:]):
            if isinstance(field, ast.AnnAssign):
                title = titles[max(line for line in titles if line < field.lineno)]
                text = text.value.value if isinstance(text, ast.Expr) else ""
                found[field.target.id] = title, " ".join(text.split())
    return found


def is_given(args: Any, name: str) -> bool:
    """Whether an argument is on the command line or not at its default."""
    return getattr(args, name) != getattr(type(args), name) or name in flags_given()


def flags_given() -> set[str]:
    """The names of the arguments that are flags on the command line."""
    words = (word.split("=")[0] for word in sys.argv[1:] if word.startswith("--"))
    return {word.removeprefix("--").removeprefix("no-").replace("-", "_") for word in words}
