"""README.md: its commands are accepted by the scripts that they start, and its links and files are
there."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

import command_line
import train_agents

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


def commands():
    """The arguments of every `python SCRIPT.py ...` in the bash blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    parts = [part for line in lines for part in shlex.split(line, comments=True) + ["&&"]]
    found, words = [], []
    for part in parts:
        if part != "&&":
            words.append(part)
            continue
        scripts = [i for i, word in enumerate(words) if word.endswith(".py")]
        found += [tuple(words[i:]) for i in scripts]
        words = []
    return found


def test_the_readme_has_commands_of_every_script():
    scripts = {command[0] for command in commands()}
    assert {"pipeline_train.py", "a2c.py", "ppo.py", "evaluate.py", "figures/report.py"} <= scripts
    assert len(commands()) > 12


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_a_command_of_the_readme_is_parsed(command, monkeypatch):
    script, *flags = command
    monkeypatch.setattr("sys.argv", [script, *flags])
    monkeypatch.syspath_prepend(str((ROOT / script).parent))
    module = importlib.import_module(Path(script).stem)
    args_class = train_agents.ARGS.get(module, getattr(module, "Args", None))
    command_line.parse(args_class, "")


def test_a_wrong_flag_is_not_parsed(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--optimizer", "adam"])
    with pytest.raises(SystemExit):
        command_line.parse(importlib.import_module("evaluate").Args, "")
    assert "--optimizer" in capsys.readouterr().err


def test_links_and_files_of_the_readme_are_there():
    links = [link for link in re.findall(r"\]\(([^)#]+)", TEXT) if not link.startswith("http")]
    files = re.findall(r"`([\w/]+\.py)`", TEXT) + re.findall(r"`(\w+/)`", TEXT)
    there = {*links, *files} - {"runs/"}
    assert len(there) > 20
    for path in there:
        assert (ROOT / path).exists(), path


def test_the_table_of_adam4rl_is_that_of_the_comparison():
    compared = (ROOT / "results" / "compare" / "table.md").read_text().split("\n\n")[1]
    assert compared.startswith("| task |") and compared.count("\n") > 10
    assert compared in (ROOT / "results" / "ADAM4RL.md").read_text()
