"""Made-up gradients whose updates are known."""

import numpy as np
import pytest

import inspection
from inspection import MAGNITUDES, SHOWN, sequences, steps_made


def test_steps_of_adam_and_sign_descent_are_those_of_their_equations():
    """The same gradient: one learning rate. Alternating: Adam's momentum settles at (1 - .9) / (1 +
    .9) of it."""
    made = sequences()
    large = MAGNITUDES > 1e-5  # where 1e-8 in the root does not count
    np.testing.assert_allclose(steps_made("adam", made["always the same"])[:, large], 1, rtol=2e-3)
    np.testing.assert_array_equal(steps_made("sign_sgd", made["always the same"]), 1)
    settled = np.abs(steps_made("adam", made["alternating"])[-10:, large])
    np.testing.assert_allclose(settled, 0.1 / 1.9, rtol=2e-2)
    assert MAGNITUDES[SHOWN] == pytest.approx(1e-3)


def test_untrained_adam4rl_is_shown_as_adam():
    grads = sequences()["always the same"]
    ours, adam = steps_made("untrained:adam4rl", grads), steps_made("adam", grads)
    np.testing.assert_allclose(ours * inspection.STEP_SIZE, adam * inspection.STEP_SIZE, rtol=1e-3)


def test_inspect_to_its_files(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["inspection.py", "pretrained/adam4rl"])
    with pytest.raises(SystemExit, match="^0$"):
        inspection.main()
    (folder,) = (tmp_path / "runs").iterdir()
    assert (folder / "inspection.png").read_bytes()[1:4] == b"PNG" and str(
        folder.name
    ) in capsys.readouterr().out
    assert (folder / "inspection.csv").read_text().count("\n") == 1 + 5 * 3 * len(MAGNITUDES)
