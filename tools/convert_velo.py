"""Convert VeLO's published weights (Metz et al. 2022) to a theta file for all scripts:

    python tools/convert_velo.py PATH_OF_PUBLISHED_WEIGHTS velo.npz

Download the weights first; they are in no package registry.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import command_line
import optimizers
import runs
from baselines.velo import INPUTS, make_velo
from optim4rl import brief

PUBLISHED = {"lstm_size": 512, "num_bases": 256, "step_size": 1e-3}


def load_published(path: str) -> dict:
    """The theta of make_velo(**PUBLISHED) from the published file (Haiku's parameters in flax's
    msgpack).

    Raises a one-line ValueError for anything else.
    """
    import flax.serialization

    try:
        with open(path, "rb") as file:
            stored = flax.serialization.msgpack_restore(file.read())
        stored = stored.get("params", stored)
        return convert(stored)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except Exception as error:  # whatever a foreign file makes the parser raise
        reason = f"{type(error).__name__}: {brief(error)}"
        raise ValueError(f"{path}: not VeLO's published weights ({reason})") from None


def convert(stored: dict) -> dict:
    """Haiku's parameters as theta. Haiku's weights are [inputs, outputs], and its LSTM adds 1 to
    the input of the forget gate.

    The published network does not use the output of its first layer ("linear"): theta omits it.
    """
    rnn = stored["rnn_params"]

    def dense(layer):
        return {"0": {"w": jnp.asarray(layer["w"]).T, "b": jnp.asarray(layer["b"])}}

    gates = dense(rnn["rnn/linear"])["0"]
    size = len(gates["b"]) // 4
    # Haiku's order of the gates; here it is i, f, u, o.
    i, u, f, o = (slice(k * size, (k + 1) * size) for k in range(4))
    w, b = (
        jnp.concatenate([x[i], x[f], x[u], x[o]]) for x in (gates["w"], gates["b"].at[f].add(1))
    )
    bases = stored["ff_mod_stack"]["~"]
    first = jnp.concatenate([jnp.asarray(bases[f"w0__{k}"]) for k in range(len(INPUTS))], axis=1)
    weights = (first, bases["w1"], bases["w2"])
    start = stored["lstm_init_state"]
    return {
        "mix": dense(rnn["linear_1"]),
        "input": dense(rnn["linear_2"]),
        "lstm": {"w_x": w[:, :-size], "w_h": w[:, -size:], "b": b},
        "start": {
            name: jnp.asarray(start[long]).reshape(-1)
            for name, long in (("h", "hidden"), ("c", "cell"))
        },
        "mixture": dense(rnn["rnn_to_controls"]),
        "multiplier": dense(rnn["step_size"]),
        "bases": {
            str(k): {"w": jnp.swapaxes(jnp.asarray(w), 1, 2), "b": jnp.asarray(bases[f"b{k}"])}
            for k, w in enumerate(weights)
        },
    }


@dataclass(frozen=True)
class Args:
    published: tyro.conf.Positional[str]
    """the published weights, as downloaded"""
    out: tyro.conf.Positional[str] = "velo.npz"
    """the file to write"""


def main() -> None:
    args = command_line.parse(Args, __doc__)
    with runs.bad_input():
        theta = load_published(args.published)
        optimizers.check_theta(args.published, make_velo(**PUBLISHED), theta)
        optimizers.save_theta(args.out, theta, "velo", PUBLISHED, {"published": args.published})
    print(
        f"written: {args.out}; "
        f"next: python evaluate.py --env-name catch --optimizers {args.out} adam"
    )


if __name__ == "__main__":
    main()
