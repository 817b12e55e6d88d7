"""Convert OPEN's published weights (Goldie et al. 2024) to a theta file for all scripts:

    python tools/convert_open.py multi_OPEN.npy open.npz

They are in rl_optimizer/pretrained/ of github.com/AlexGoldie/rl-learned-optimization.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import command_line
import optimizers
import runs
from baselines.open import make_open, theta_shapes

SIZES = {1211: {"hidden_size": 8, "width": 16}, 3571: {"hidden_size": 16, "width": 32}}
# The order of the arrays in the file, and where they are in theta.
ORDER = [
    *((f"gru/{name}/{x}") for name in ("hn", "hr", "hz", "in", "ir", "iz") for x in "bw"),
    *("dense/0/b", "dense/0/w", "norm/1/bias", "norm/1/scale", "dense/3/b", "dense/3/w"),
    *("norm/4/bias", "norm/4/scale", "dense/6/b", "dense/6/w"),
]


def load_published(path: str) -> tuple[dict, dict]:
    """The theta and the config of make_open. Raises a one-line ValueError for another file."""
    try:
        flat = np.load(path, allow_pickle=False)
        config = SIZES[flat.size]
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except Exception:  # whatever a foreign file makes the reader raise
        raise ValueError(
            f"{path}: not OPEN's published weights, an .npy of {' or '.join(map(str, SIZES))} "
            "numbers"
        ) from None
    theta, start = theta_shapes(config["hidden_size"], config["width"]), 0
    for name in ORDER:
        part, layer, array = name.split("/")
        if array in theta[part][layer]:
            shape = theta[part][layer][array]
            end = start + int(np.prod(shape))
            theta[part][layer][array] = np.float32(flat.ravel()[start:end]).reshape(shape)
            start = end
    return theta, config


@dataclass(frozen=True)
class Args:
    published: tyro.conf.Positional[str]
    """the published weights, as downloaded (.npy)"""
    out: tyro.conf.Positional[str] = "open.npz"
    """the file to write"""


def main() -> None:
    args = command_line.parse(Args, __doc__)
    with runs.bad_input():
        theta, config = load_published(args.published)
        optimizers.check_theta(args.published, make_open(**config), theta)
        optimizers.save_theta(args.out, theta, "open", config, {"published": args.published})
    print(
        f"written: {args.out}; "
        f"next: python evaluate.py --env-name pendulum --optimizers {args.out} adam"
    )


if __name__ == "__main__":
    main()
