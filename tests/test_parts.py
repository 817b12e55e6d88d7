"""What each part of adam4rl's theta is worth."""

import contextlib
import csv

import jax
import numpy as np
import pytest

import optimizers
import parts
from adam4rl import make_adam4rl


def test_candidates_have_adams_numbers_in_the_parts_that_they_lack(tmp_path):
    start = make_adam4rl(2).init_theta(jax.random.key(0))
    start = jax.tree.map(lambda x: x + 1, start)
    path = str(tmp_path / "theta.npz")
    optimizers.save_theta(path, start, "adam4rl", {"network_size": 2}, {})
    optimizers.save_theta(
        other := str(tmp_path / "other.npz"), start, "adam4rl", {"network_size": 2}, {}
    )
    args = parts.Args(path, without=("squares+rate", "network"), others=(other,))
    found, size = parts.candidates(args)
    jax.tree.map(np.testing.assert_array_equal, found.pop(other), start)
    assert [*found] == ["theta", "without squares+rate", "without network", "Adam"] and size == 2
    assert all(x.sum() == 0 for name, x in found["Adam"].items() if name != "network")
    with pytest.raises(ValueError, match="adam4rl: 0 hidden units, .* has 2"):
        parts.candidates(parts.Args(path, without=(), others=("pretrained/adam4rl",)))
    for name, theta in found.items():
        lacks = {"theta": (), "Adam": start}.get(name, name.removeprefix("without ").split("+"))
        for part, value in theta.items():
            expected = (found["Adam"] if part in lacks else start)[part]
            jax.tree.map(np.testing.assert_array_equal, value, expected)


def test_a_candidate_is_compared_by_the_lifetimes_in_which_theta_does_better():
    # Lifetimes of theta, a candidate, and a second: better by 1; by -1; equal; by 1.
    scores = np.array([[2.0, 1.0, 2.0], [2.0, 3.0, 2.0], [2.0, 2.0, 2.0], [2.0, 1.0, 2.0]])
    scores = np.stack([scores, -scores], axis=-1)
    same, other, equal = parts.compare(scores)
    assert other[1:3] == pytest.approx((2.5 / 4, 1.5 / 4))
    assert same[1:] == equal[1:] == (0.5, 0.5, 1.0)
    assert same[0] == equal[0] == pytest.approx(0) and other[0] == pytest.approx(0)
    six = np.random.default_rng(0).normal(size=(6, 2, 2))
    six[:, 0] += 9  # better in all six: p of Wilcoxon's test is 2 / 2^6
    assert parts.compare(six)[1] == pytest.approx((-0.25, 1, 1, 1 / 32))


def test_it_writes_every_score_and_a_table(tmp_path, monkeypatch, capsys):
    def train(thetas, drawn, submit):
        return np.tile(np.sum(np.abs(thetas), axis=1)[:, None], (len(drawn), 1, 2))

    monkeypatch.setattr(parts, "start_workers", contextlib.nullcontext)
    monkeypatch.setattr(parts, "train", train)
    out = str(tmp_path / "out")
    flags = ["--without", "rate", "--tasks", "cartpole", "pendulum", "--out", out]
    monkeypatch.setattr("sys.argv", ["parts.py", *flags])
    parts.main()
    rows = [*csv.DictReader((tmp_path / "out.csv").open())]
    assert [row["candidate"] for row in rows] == ["theta", "without rate", "Adam"] * 4
    assert {row["task"] for row in rows} == {"cartpole", "pendulum"}
    assert len({row["seed"] for row in rows}) == 4 and float(rows[2]["mean"]) == 0
    assert "| without rate | 0.000 | 100% | 100% | 0.12 |" in (tmp_path / "out.md").read_text()


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--without", "rate+nothing"], "'nothing' is none of momenta, rate"),
        (["--tasks"], "--tasks must name at least one"),
        (["--tasks", "ant"], "'ant' is none of small_dense_short"),
        (["--theta", "pretrained/optim4rl_catch.npz"], "of optim4rl, not of adam4rl"),
        (["--others", "pretrained/optim4rl_catch"], "of optim4rl, not of adam4rl"),
        (["--repeats", "0"], "--repeats"),
    ],
)
def test_bad_input_is_one_line(flags, said, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["parts.py", *flags])
    with pytest.raises(SystemExit) as end:
        parts.main()
    err = capsys.readouterr().err
    assert end.value.code == 2 and said in err and err.count("\n") == 1
