"""The settings of each environment, as data: the paper's (Lan et al. 2024), or Brax's usual ones.

AGENT: training an agent, with the keys of a2c.Args or ppo.Args, and learning_rate. META:
meta-training an optimizer. Where the paper swept a value, one from its sweep. tasks.py reads these
tables; environments without a row have the settings OTHER and META_OTHER.
"""

from typing import Literal

Backend = Literal["spring", "generalized", "positional", "mjx"]  # physics of Brax's tasks

SMALL = dict(total_steps=3e7, num_envs=512, conv_filters=0, hidden_size=32)
BIG = SMALL | dict(conv_filters=16)
ANT = dict(
    total_steps=1e8,
    num_envs=4096,
    reward_scale=10,
    rollout_steps=5,
    num_minibatches=32,
    batch_size=2048,
    num_epochs=4,
    entropy_weight=1e-2,
    discount=0.97,
    learning_rate=3e-4,
)
PENDULUM = ANT | dict(total_steps=2e6, num_envs=2048, batch_size=1024)
OTHER = ANT | dict(
    total_steps=5e7,
    num_envs=2048,
    reward_scale=1,
    rollout_steps=20,
    batch_size=512,
    num_epochs=8,
    entropy_weight=1e-3,
)

CONTROL = dict(
    total_steps=1e6,
    num_envs=256,
    reward_scale=1,
    rollout_steps=16,
    num_minibatches=8,
    batch_size=32,
    num_epochs=4,
    entropy_weight=1e-3,
    discount=0.97,
    learning_rate=3e-3,
    episode_length=200,
    policy_layers=(32, 32),
    value_layers=(64, 64),
)
# MinAtar's games, as in OPEN's experiments (Goldie et al. 2024)
MINATAR = dict(
    total_steps=1e7,
    num_envs=64,
    reward_scale=1,
    rollout_steps=128,
    num_minibatches=8,
    batch_size=8,
    num_epochs=4,
    entropy_weight=1e-2,
    discount=0.99,
    learning_rate=3e-3,
    policy_layers=(64, 64),
    value_layers=(64, 64),
    normalise_observations=False,
)
# PPO's agent on gridworlds and Catch, whose default agent is A2C's
PPO_ON_GRIDWORLDS = CONTROL | dict(
    entropy_weight=1e-2, discount=0.995, episode_length=1000, normalise_observations=False
)

AGENT = {
    "catch": dict(
        total_steps=5e5, num_envs=64, conv_filters=0, hidden_size=256, learning_rate=1e-3
    ),
    # The small_sparse ones are not in the paper; their settings are as in its other small ones.
    "small_sparse_short": SMALL | dict(learning_rate=3e-3),
    "small_sparse_long": SMALL | dict(learning_rate=3e-3),
    "small_dense_short": SMALL | dict(learning_rate=3e-3),
    "small_dense_long": SMALL | dict(learning_rate=3e-2),
    "big_sparse_short": BIG | dict(learning_rate=3e-3),
    "big_sparse_long": BIG | dict(learning_rate=1e-3),
    "big_dense_short": BIG | dict(learning_rate=3e-3),
    "big_dense_long": BIG | dict(learning_rate=3e-3),
    "ant": ANT,
    "humanoid": ANT
    | dict(
        num_envs=2048,
        reward_scale=0.1,
        rollout_steps=10,
        batch_size=1024,
        num_epochs=8,
        entropy_weight=1e-3,
    ),
    "inverted_double_pendulum": PENDULUM | dict(total_steps=2e7),
    "walker2d": OTHER | dict(reward_scale=5, discount=0.997, learning_rate=3e-5),
    # control tasks, which are not in the paper
    "pendulum": CONTROL,
    "cartpole": CONTROL,
    "point_mass": CONTROL,
    "two_link_reacher": CONTROL,
    "acrobot": CONTROL,
    "purcell_swimmer": CONTROL,
    "minatar_asterix": MINATAR,
    "minatar_breakout": MINATAR,
    "minatar_freeway": MINATAR | dict(episode_length=2500),
    "minatar_space_invaders": MINATAR,
    # Brax's usual settings
    "inverted_pendulum": PENDULUM,
    "halfcheetah": OTHER | dict(discount=0.95),
    "humanoidstandup": OTHER
    | dict(
        total_steps=1e8,
        reward_scale=0.1,
        rollout_steps=15,
        batch_size=1024,
        entropy_weight=1e-2,
        learning_rate=6e-4,
    ),
    "pusher": OTHER
    | dict(
        reward_scale=5,
        rollout_steps=30,
        num_minibatches=16,
        entropy_weight=1e-2,
        discount=0.95,
    ),
    "reacher": OTHER | dict(reward_scale=5, rollout_steps=50, batch_size=256, discount=0.95),
}

# Environment steps of an agent in the tables of results/, where they are not the paper's 3e7.
SHORT = {name: 3e6 for name in AGENT if name.startswith("small")}
SHORT |= {name: 4e6 for name in AGENT if name.startswith("big")}

GRID = dict(
    num_units=512, total_steps=3e7, reset_interval=144, meta_learning_rate=3e-4, envs_per_unit=1
)
# multitask: the agents' learning rate and reward scale in meta-training on several environments
META = {
    "catch": GRID
    | dict(
        num_units=64,
        total_steps=5e5,
        reset_interval=32,
        meta_learning_rate=1e-2,
        grad_clip=float("inf"),
        multitask=(1e-3, 1.0),
    ),
    "small_sparse_short": GRID | dict(multitask=(3e-3, 1e2)),
    "small_sparse_long": GRID | dict(multitask=(3e-3, 1e2)),
    "small_dense_short": GRID | dict(multitask=(3e-3, 1e2)),
    "small_dense_long": GRID | dict(multitask=(1e-3, 1e3)),
    "big_sparse_short": GRID | dict(multitask=(3e-3, 1e2)),
    "big_sparse_long": GRID | dict(multitask=(1e-3, 1e1)),
    "big_dense_short": GRID | dict(multitask=(3e-3, 1e1)),
    "big_dense_long": GRID | dict(multitask=(3e-3, 1.0)),
}
# Where PPO learns: the paper's 2048 environments of Brax's tasks, split over 16 units (in the paper
# one unit per device).
META_OTHER = dict(
    num_units=16, total_steps=1e8, reset_interval=64, meta_learning_rate=3e-4, envs_per_unit=128
)
# A PPO agent in meta-training; a minibatch has half as many rollouts as the unit environments.
META_PPO = dict(rollout_steps=5, num_minibatches=8, num_epochs=4, value_layers=(64,) * 5)

# The environments of the paper's figures, and the learning rates that the classical optimizers are
# swept over.
SUITES = {
    "paper": ("catch", "small_dense_long", "big_dense_long", "ant", "humanoid"),
    "transfer": ("inverted_double_pendulum", "ant", "humanoid", "walker2d"),
}
SUITE_RATES = {
    "paper": (3e-2, 1e-2, 3e-3, 1e-3, 3e-4),
    "transfer": (),  # all at the paper's learning rate
}
WANT_ACCELERATOR = ("ant", "humanoid", "walker2d")  # days without one
