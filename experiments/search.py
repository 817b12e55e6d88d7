r"""Search theta of adam4rl.py by CMA-ES (Hansen 2016, arXiv 1604.00772), on whole lifetimes:

    pip install cma
    python experiments/search.py                                            # on two cores: hours
    python experiments/search.py --population 64 --tasks-per-generation 17  # on an accelerator

A generation trains agents with every candidate on a few tasks, drawn in turn from
search_tasks.py, each with a random number of updates. A candidate's fitness is its mean rank
(lifetimes.py). Two more are ranked and not used: theta as it is written, and Adam (untrained).

The network on top is searched from what was found without it, or alone:

    python experiments/search.py --theta runs/adam4rl.npz --network-size 4 --out runs/both
    python experiments/search.py --only-network --network-size 4 --out runs/network

Writes OUT.npz (theta: the mean of the distribution, averaged over the last third of all
generations, as one generation is mostly chance), OUT.jsonl (a line a generation) and OUT.pkl, from
which the same command continues.
"""

import json
import math
import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checks
import command_line
import optimizers
import runs
from adam4rl import make_adam4rl, network_size
from lifetimes import fitness, start_workers, train
from search_tasks import TASKS, draw


@dataclass(frozen=True)
class Args:
    out: str = "runs/adam4rl"
    """files are written with this name and the endings .npz, .jsonl, .pkl"""
    generations: int = 30
    """in total; the same command with more of them continues"""
    population: int = 16
    """candidates in a generation"""
    tasks: tuple[str, ...] = tuple(TASKS)
    """tasks of search_tasks.py to draw from"""
    tasks_per_generation: int = 5
    """tasks that each candidate is trained on"""
    theta: str | None = None
    """theta file (.npz) of adam4rl to start from; by default Adam"""
    network_size: int = 0
    """hidden units of the network; 0 is none. With one, CMA-ES keeps variances only, not
    covariances"""
    only_network: bool = False
    """leave the other numbers of theta as they are"""
    spread: float = 0.4
    """standard deviation of the first candidates, relative to SCALES"""
    seed: int = 1
    """seed of CMA-ES and of the choice of tasks"""


# The scale of each number of theta in the first distribution; of the network's see search_space.
SCALES = {
    "rate": (0.5, 0.25),
    "schedule": (0.5,) * 6,
    "momenta": (0.6,) * 4,
    "squares": (0.6, 0.6),
    "whitening": (0.6,),
    "shape": (0.5, 1.0),
}
# What reading another file as OUT.pkl, or one of another version, may raise
NOT_OURS = (
    pickle.UnpicklingError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    TypeError,
    ValueError,
)
CHUNKS = 3  # jobs of a task on a CPU, so that all cores are busy to the end of a generation


class Space(NamedTuple):
    """Where thetas are searched, as vectors of D numbers."""

    adam: np.ndarray  # [D], untrained
    start: np.ndarray  # [D]
    scale: np.ndarray  # [D]; 0: not searched
    unflatten: Callable  # [D] -> theta

    def thetas(self, x: np.ndarray) -> np.ndarray:
        """Theta of the points of CMA-ES. x: [P, numbers that are searched] -> [P, D]"""
        thetas = np.tile(self.start, (len(x), 1))
        thetas[:, self.scale > 0] += self.scale[self.scale > 0] * x
        return thetas


def load(path: str) -> tuple[dict, int, dict]:
    """-> theta, hidden units of its network, how it was trained. Raises a one-line ValueError for a
    file that is not adam4rl's."""
    _, theta, header = optimizers.load_learned(path)
    if header["optimizer"] != "adam4rl":
        raise ValueError(f"{path}: of {header['optimizer']}, not of adam4rl")
    return theta, network_size(theta), optimizers.trained_with(header)


def search_space(args: Args) -> Space:
    """Raises a one-line ValueError for a network size that does not fit, or for a theta file that
    is not adam4rl's or has a network of another size."""
    optimizers.check_config("adam4rl", {"network_size": args.network_size})
    untrained = make_adam4rl(args.network_size).init_theta(jax.random.key(args.seed))
    start = dict(untrained)
    if args.theta:
        theta, size, _ = load(args.theta)
        if size not in (0, args.network_size):
            raise ValueError(f"{args.theta} has a network: give --network-size {size}")
        start |= theta
    scale = {name: jnp.array(x) * (not args.only_network) for name, x in SCALES.items()}
    if args.network_size:
        scale["network"] = jax.tree.map(lambda x: jnp.full(x.shape, 0.3), untrained["network"])
    vectors = [np.asarray(ravel_pytree(tree)[0], float) for tree in (untrained, start, scale)]
    return Space(*vectors, ravel_pytree(untrained)[1])


def late_mean(means: list) -> np.ndarray:
    """The average of the last third. means: of the distribution before each generation, and now"""
    return np.mean(means[-math.ceil(len(means) / 3) :], axis=0)


def generation(strategy, drawn: list[tuple], written, space: Space, submit) -> dict:
    """Sample, train, rank and update the distribution. written: the point that is also ranked
    -> the row to log"""
    candidates = strategy.ask()
    thetas = np.array([*space.thetas(np.array([*candidates, written])), space.adam])
    chunks = CHUNKS if jax.default_backend() == "cpu" else 1
    scores = train(thetas, drawn, submit, chunks)
    ranked = fitness(scores)
    strategy.tell(candidates, list(-ranked[: len(candidates)]))
    row = {"rank of theta": ranked[-2], "rank of adam": ranked[-1]}
    for (name, _, num_updates), found in zip(drawn, scores, strict=True):
        median = np.median(found[:-2], axis=0)
        row[f"{name}, {num_updates} updates"] = {
            "theta": found[-2].tolist(),
            "adam": found[-1].tolist(),
            "median": median.tolist(),
        }
    return row


def check_out(args) -> None:
    """Raises a one-line ValueError if OUT.npz is the theta to start from."""
    written = Path(f"{args.out}.npz").resolve()
    if args.theta and Path(optimizers.theta_path(args.theta)).resolve() == written:
        raise ValueError(f"--theta {args.theta} would be overwritten: give another --out")


def begin(args: Args, space: Space) -> tuple:
    """-> the strategy, the generator and the deck of tasks, the means and the rows so far. Raises a
    one-line ValueError if cma is missing, or as `resume` does."""
    try:
        import cma
    except ImportError:
        raise ValueError("the search needs the package cma: pip install cma") from None
    if Path(f"{args.out}.pkl").exists():
        return resume(args, space)
    numbers = np.count_nonzero(space.scale)
    options = {"popsize": args.population, "seed": args.seed, "verbose": -9}
    options["CMA_diagonal"] = args.network_size > 0
    strategy = cma.CMAEvolutionStrategy(np.zeros(numbers), args.spread, options)
    return strategy, np.random.default_rng(args.seed), [], [np.zeros(numbers)], []


def resume(args: Args, space: Space) -> tuple:
    """What `save` wrote into OUT.pkl. Raises a one-line ValueError for a file that is not this
    script's, or of a search with other arguments or from another theta."""
    path = f"{args.out}.pkl"
    try:
        begun_with, start, *found = pickle.loads(Path(path).read_bytes())
        changed = [name for name, x in begun_with.items() if x != getattr(args, name)]
    except NOT_OURS as error:
        raise ValueError(f"{path}: not of search.py ({error}); give another --out") from None
    for name in changed:
        if name not in ("out", "generations"):
            given = f"--{name.replace('_', '-')} {begun_with[name]}"
            raise ValueError(f"{path} was begun with {given}; give that, or another --out")
    if not np.array_equal(start, space.start):
        raise ValueError(f"{args.theta} has changed since {path} was begun; give another --out")
    return tuple(found)


def save(args: Args, space: Space, strategy, rng, deck: list, means: list, rows: list) -> None:
    """Write OUT.npz, OUT.pkl and OUT.jsonl."""
    theta = space.unflatten(jnp.float32(space.thetas(late_mean(means)[None])[0]))
    trained = {"env_name": list(args.tasks), "seed": args.seed, "generations": len(rows)}
    trained |= {"population": args.population, "start": args.theta}
    config = {"network_size": args.network_size}
    optimizers.save_theta(f"{args.out}.npz", theta, "adam4rl", config, trained)
    found = pickle.dumps((vars(args), space.start, strategy, rng, deck, means, rows))
    runs.write_whole(f"{args.out}.pkl", lambda file: file.write(found))
    runs.write_text(f"{args.out}.jsonl", "\n".join(map(json.dumps, rows)))


def main() -> None:
    args = command_line.parse(Args, __doc__)
    with runs.bad_input():
        checks.positive(args, "generations", "population", "tasks_per_generation", "spread", "seed")
        checks.seed(args)
        checks.not_empty(args, "tasks")
        checks.known("tasks", args.tasks, TASKS)
        if args.only_network and not args.network_size:
            raise ValueError("--only-network needs a --network-size")
        check_out(args)
        space = search_space(args)
        strategy, rng, deck, means, rows = begin(args, space)
        Path(f"{args.out}.npz").parent.mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=args.generations, initial=strategy.countiter, unit="generation")
    with start_workers(args.network_size) as submit:
        while strategy.countiter < args.generations:
            while len(deck) < args.tasks_per_generation:
                deck = [*deck, *map(str, rng.permutation(args.tasks))]
            names, deck = deck[: args.tasks_per_generation], deck[args.tasks_per_generation :]
            drawn = [draw(rng, name) for name in names]
            row = generation(strategy, drawn, late_mean(means), space, submit)
            means.append(np.array(strategy.mean))
            rows.append({"generation": strategy.countiter, "sigma": strategy.sigma, **row})
            bar.set_postfix({name: round(row[name], 2) for name in row if name.startswith("rank")})
            bar.update()
            save(args, space, strategy, rng, deck, means, rows)
    bar.close()
    print(f"written: {args.out}.npz, {args.out}.jsonl; more --generations continue it")
    print(f"next: python experiments/parts.py --theta {args.out}.npz")


if __name__ == "__main__":
    main()
