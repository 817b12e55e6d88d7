"""How much of the difference in return between the antithetic pairs of pes and nres is chance?
(results/NOTES.md)

    python benchmarks/chance.py --env-name small_sparse_long

Trains agents for a whole lifetime on a gridworld with untrained momentum4rl, at theta plus and
minus sigma times a fixed noise. Two agents get each noise: what their differences in return have in
common is the effect of the noise, the rest is chance. At a sigma of 1e-6 nearly all is chance. 16
noises are 64 lifetimes: 2 to 5 minutes of one core on a small gridworld.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import a2c  # noqa: E402, once the project is on the path
import checks  # noqa: E402
import gridworld  # noqa: E402
import runs  # noqa: E402
import tasks  # noqa: E402
from baselines.momentum4rl import make_momentum4rl  # noqa: E402
from optim4rl import to_optax  # noqa: E402


@dataclass(frozen=True)
class Args:
    env_name: str = "small_sparse_long"
    """a gridworld, or catch"""
    sigma: float = 0.01
    """standard deviation of the noise in theta"""
    num_noises: int = 16
    """noises, two agents for each"""
    num_updates: int = 300
    """updates of a lifetime"""
    num_envs: int = 512
    """environments of each agent"""
    learning_rate: float = 6e-2
    """learning rate"""


def make_life(args: Args):
    """-> life(key of the agent, key of the noise, signed sigma) -> mean return over a lifetime"""
    learned = make_momentum4rl()
    theta = learned.init_theta(jax.random.key(0))
    agent = a2c.make_agent(
        gridworld.make(args.env_name), tasks.agent_args(args.env_name, num_envs=args.num_envs)
    )

    def life(key_agent, key_noise, sigma):
        noise = optax.tree.random_like(key_noise, theta, jax.random.normal)
        optimizer = to_optax(learned, optax.tree.add_scale(theta, sigma, noise), args.learning_rate)
        key_init, key_updates = jax.random.split(key_agent)

        def update(state, number):
            progress = (number / args.num_updates, (number + 1) / args.num_updates)
            state, _, metrics = agent.learn(
                jax.random.fold_in(key_updates, number), state, optimizer, progress
            )
            return state, metrics["return"]

        return jnp.nanmean(
            jax.lax.scan(update, agent.init(key_init, optimizer), jnp.arange(args.num_updates))[1]
        )

    return jax.jit(life)


def main() -> None:
    args = runs.parse(Args, __doc__)
    with runs.bad_input():
        checks.positive(args, "sigma", "num_noises", "num_updates", "num_envs", "learning_rate")
        if args.num_noises < 3:
            raise ValueError(
                f"--num-noises must be at least 3 for a correlation, got {args.num_noises}"
            )
        life = make_life(args)
    returns = np.zeros((2, args.num_noises, 2))  # agents, noises, signs
    for agent, number, sign in np.ndindex(*returns.shape):
        keys = jax.random.key(agent * args.num_noises + number), jax.random.key(10_000 + number)
        returns[agent, number, sign] = life(*keys, args.sigma * (1 - 2 * sign))
    differences = returns[..., 0] - returns[..., 1]
    print(
        f"{args.env_name}, sigma {args.sigma:g}: mean return over a lifetime {returns.mean():.2f}"
    )
    print(f"standard deviation of a pair's difference {differences.std():.3f}")
    print(
        f"correlation between two agents with the same noise {np.corrcoef(differences)[0, 1]:.2f}"
    )


if __name__ == "__main__":
    main()
