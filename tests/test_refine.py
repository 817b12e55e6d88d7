"""Refining theta one number after the other."""

import contextlib
import json

import jax
import numpy as np
import pytest

import optimizers
import refine
from adam4rl import make_adam4rl
from optim4rl import load_theta


def test_the_best_offsets_are_those_of_the_quadratic_and_none_if_they_gain_too_little():
    x = np.array(refine.OFFSETS)[:, None]
    for vertex, expected in ((0.3, 0.3), (-0.8, -0.8), (2.0, 1.0), (-5.0, -1.0)):
        found = refine.best_offsets(x, -0.2 * (x[:, 0] - vertex) ** 2, 0.01)
        assert found == pytest.approx([expected])
    assert refine.best_offsets(x, 0.2 * x[:, 0] ** 2 + 0.01 * x[:, 0], 0.05) == 1.0  # a valley
    assert refine.best_offsets(x, -0.2 * (x[:, 0] - 0.3) ** 2, 0.02) == 0.0  # gains .018
    for least in (0.05, 0.0):
        assert refine.best_offsets(x, np.zeros(5), least) == 0.0
    # A ridge, which no search along one axis finds: highest at (.6, -.7).
    pairs = np.array([(a, b) for a in refine.OFFSETS for b in refine.OFFSETS])
    a, b = pairs.T
    ridge = -0.5 * (a + b + 0.1) ** 2 - 0.02 * (a - b - 1.3) ** 2
    np.testing.assert_allclose(refine.best_offsets(pairs, ridge, 0.01), [0.6, -0.7], atol=1e-9)


def test_each_number_goes_where_its_scores_are_highest_and_is_not_tried_again(
    tmp_path, monkeypatch
):
    start = make_adam4rl().init_theta(jax.random.key(0))
    optimizers.save_theta(tmp_path / "start.npz", start, "adam4rl", {}, {"generations": 3})
    target = {name: np.zeros(np.shape(x)) for name, x in start.items()}
    target["rate"][0], target["shape"][0] = 0.3, -0.5
    tried = []

    def train(thetas, drawn, submit):
        tried.append(drawn)
        distance = np.sum((thetas - refine.flat(target)) ** 2, axis=1)
        return np.broadcast_to(-distance[:, None], (len(drawn), len(thetas), 2))

    monkeypatch.setattr(refine, "start_workers", contextlib.nullcontext)
    monkeypatch.setattr(refine, "train", train)

    def main(*numbers):
        names = ["--theta", str(tmp_path / "start.npz"), "--out", str(tmp_path / "out")]
        names += ["--least", "0.04"]
        monkeypatch.setattr("sys.argv", ["refine.py", *names, "--numbers", *numbers])
        refine.main()
        return load_theta(tmp_path / "out.npz")[0]

    found = main("rate.0", "shape.0")
    # Mean ranks -.4, -.2, .2, .4, 0 at -.75 .. .75: numpy.polyfit's parabola has this vertex. And
    # .2, .4, 0, -.2, -.4: its vertex is at -.79, beyond the end.
    assert found["rate"][0] == pytest.approx(0.2625) and found["shape"][0] == -0.75
    for name, x in found.items():
        if name not in ("rate", "shape"):
            np.testing.assert_array_equal(x, start[name])
    assert len(tried) == 2 and tried[0] != tried[1]  # other seeds for each number
    assert sorted({name for name, *_ in tried[0]}) == sorted(refine.TASKS)
    again = main("rate.0", "shape.0", "squares.0")
    assert len(tried) == 3 and again["rate"][0] == found["rate"][0] and again["squares"][0] == 0
    trained = load_theta(tmp_path / "out.npz")[1]["trained"]
    assert trained["generations"] == 3
    assert trained["refined"] == ["rate.0", "shape.0", "squares.0"]
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["numbers"] for row in rows] == ["rate.0", "shape.0", "squares.0"]
    (tmp_path / "out.npz").unlink()  # as if it had been interrupted before it was written
    for name, x in main("rate.0", "shape.0", "squares.0").items():
        np.testing.assert_array_equal(x, again[name])
    assert len(tried) == 3


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--numbers", "rate.2"], "'rate.2' is none of rate.0, rate.1, schedule.0"),
        (["--numbers"], "at least one"),
        (["--numbers", "rate.0", "squares.0+rate.0"], "each once, got rate.0 squares.0+rate.0"),
        (["--least", "-1"], "--least must be from 0 to 1, got -1"),
        (["--tasks", "ant"], "--tasks: 'ant' is none of small_dense_short"),
        (["--theta", "pretrained/optim4rl_catch.npz"], "of optim4rl, not of adam4rl"),
    ],
)
def test_bad_input_is_one_line(flags, said, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["refine.py", *flags])
    with pytest.raises(SystemExit) as end:
        refine.main()
    err = capsys.readouterr().err
    assert end.value.code == 2 and said in err and err.count("\n") == 1


GIVEN = refine.given(args := refine.Args(), refine.begin(args)[0])
ROW = {"numbers": "rate.0", "value": [0.1]}


@pytest.mark.parametrize(
    "line, said",
    [
        (json.dumps({"given": GIVEN | {"theta": [0]}, **ROW}), "another --theta"),
        (json.dumps({"given": GIVEN | {"seed": 3}, **ROW}), "another --seed"),
        ('{"numbers": "rate.0"', "not a log of refine.py"),
        (json.dumps({"given": GIVEN, "numbers": "old.0"}), "not a log of refine.py"),
        ("[]", "not a log of refine.py"),
        (json.dumps({"given": GIVEN, "numbers": "rate.0"}), "not a log of refine.py"),
        (json.dumps({"given": GIVEN, "numbers": 3, "value": [1]}), "not a log of refine.py"),
    ],
)
def test_a_log_of_something_else_is_refused_in_one_line(line, said, tmp_path, monkeypatch, capsys):
    (tmp_path / "out.jsonl").write_text(line + "\n")
    monkeypatch.setattr("sys.argv", ["refine.py", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as end:
        refine.main()
    err = capsys.readouterr().err
    assert end.value.code == 2 and said in err and err.count("\n") == 1


def test_a_number_that_changes_no_score_stays(monkeypatch):
    monkeypatch.setattr(refine, "train", lambda thetas, *_, **__: np.ones((1, 5, 2)))
    theta, _ = refine.begin(args := refine.Args(tasks=("cartpole",)))
    same, row = refine.refine(args, theta, "shape.0", None)
    assert row["value"] == row["from"] and row["ranks"] == [0.0] * 5
    assert np.array_equal(refine.flat(same), refine.flat(theta))


def test_the_best_number_is_put_into_a_copy_of_theta(monkeypatch):
    scores = np.arange(5.0)[:, None] * np.ones(2)  # the largest candidate is best
    monkeypatch.setattr(refine, "train", lambda thetas, *_, **__: scores[None])
    theta, _ = refine.begin(args := refine.Args(tasks=("cartpole",)))
    before = refine.flat(theta).copy()
    better, row = refine.refine(args, theta, "shape.0", None)
    assert np.array_equal(refine.flat(theta), before)
    assert np.allclose(better["shape"][0], row["value"]) and row["value"] > row["from"]
    assert np.count_nonzero(refine.flat(better) - before) == 1


def test_the_theta_to_start_from_is_not_overwritten(monkeypatch, capsys):
    out = str(optimizers.PRETRAINED / "adam4rl")
    monkeypatch.setattr("sys.argv", ["refine.py", "--theta", "pretrained/adam4rl", "--out", out])
    with pytest.raises(SystemExit):
        refine.main()
    assert "would be overwritten" in capsys.readouterr().err


def test_a_theta_with_a_network_is_refused(tmp_path):
    theta = make_adam4rl(2).init_theta(jax.random.key(0))
    optimizers.save_theta(
        path := str(tmp_path / "x.npz"), theta, "adam4rl", {"network_size": 2}, {}
    )
    with pytest.raises(ValueError, match="has a network; refine.py is for a theta without"):
        refine.begin(refine.Args(theta=path))
