"""Comparisons seed by seed."""

import sys

import numpy as np
import pytest

import compare
import paired
from figures import report

STEPS = np.array([1.0, 2.0, 3.0])


def write(folder, label, finals, first_seed=0):
    """Curves from 0 to each of the finals; the two last evaluations of PPO are the same."""
    folder.mkdir()
    returns = np.outer(finals, [0.0, 1.0, 1.0])
    seeds = first_seed + np.arange(len(finals))
    result = report.Result("pendulum", label, 1e-3, STEPS, returns, seeds)
    report.write_results(folder / "results.csv", [result])
    return str(folder)


def test_the_difference_is_of_the_seeds_that_both_have(tmp_path, monkeypatch, capsys):
    ours = write(tmp_path / "ours", "mine (trained)", [np.nan, 2.0, 3.0, 4.0, 5.0, 6.0])
    other = write(tmp_path / "other", "untrained", [7.0, 1.0, 2.0, 1.0, 1.5, 3.5, 99.0])
    write(tmp_path / "far", "adam", [1.0, 2.0], first_seed=100)
    flags = [ours, other, str(tmp_path / "far"), "--of", "mine (trained)"]
    monkeypatch.setattr(sys, "argv", ["paired.py", *flags])
    paired.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and "| pendulum | 0.001 | untrained, 0.001 | 5 |" in lines[2]
    # 2 - 1, 3 - 2, 4 - 1, 5 - 1.5, 6 - 3.5, all above 0: of 32 signs two are as extreme
    assert "| 2.2 (" in lines[2] and lines[2].endswith("| 0.062 |")


def test_the_interval_is_students():
    ours, theirs = {0: 3.0, 1: 5.0, 2: 9.0, 3: 1.0}, {0: 1.0, 1: 1.0, 2: 3.0, 4: 7.0}
    # differences 2, 4, 6: mean 4, standard error 2 / sqrt(3); t of 2 degrees at 95 % is 2.92
    assert paired.row(ours, theirs) == ("3", "4 (0.6283 to 7.372)", "0.25")


def test_equal_seeds_differ_by_nothing():
    same = {0: 1.0, 1: 2.0}
    assert paired.row(same, same) == ("2", "0 (0 to 0)", "1")


def test_a_file_of_scores_stands_for_its_evaluations(tmp_path):
    ours = write(tmp_path / "ours", "mine", [np.nan, 2.0, 3.0, 4.0])
    other = write(tmp_path / "other", "adam", [7.0, 1.0, 2.0, 1.0])
    found = paired.final_returns((ours, other))
    compare.write_scores(tmp_path / "some.csv", compare.read_all((ours, other)))
    assert paired.final_returns((str(tmp_path / "some.csv"),)) == found


def test_a_name_that_is_not_there_is_one_line(tmp_path, monkeypatch, capsys):
    ours = write(tmp_path / "ours", "mine", [1.0, 2.0])
    monkeypatch.setattr(sys, "argv", ["paired.py", ours, "--of", "yours"])
    with pytest.raises(SystemExit) as end:
        paired.main()
    assert end.value.code == 2
    assert "no seeds in common with another; there are mine" in capsys.readouterr().err
