"""Other tasks to be learnt in context: how far CartPole's preset carries.

    python ppo_s5_popgym.py --preset meta --env examples.learning_in_context:papers_cartpole
    python ppo_s5_popgym.py --preset meta --env examples.learning_in_context:two_trials
    python ppo_s5_popgym.py --preset meta --env examples.learning_in_context:eight_trials
    python ppo_s5_popgym.py --preset meta --env examples.learning_in_context:wide_cartpole
    python ppo_s5_popgym.py --preset meta --env examples.learning_in_context:pendulum --obs-scale 1

A task to be learnt in context is several trials of an environment under one random projection of
what is seen and done, which is new in every meta-episode: Trials(RandomProjection(env)).
"""

from __future__ import annotations

from typing import Any

from popgym_jax import RandomProjection, Trials, make
from popgym_jax.meta_cartpole import MetaStatelessCartPole


def papers_cartpole() -> tuple[Any, Any]:
    """As in the paper's code: actions are not projected, all trials begin in the first one's state."""
    env = MetaStatelessCartPole(fresh=False, project_actions=False, name="PapersMetaCartPole")
    return env, env.default_params


def two_trials() -> tuple[Any, Any]:
    env = MetaStatelessCartPole(num_trials=2, name="MetaCartPoleTwoTrials")
    return env, env.default_params


def eight_trials() -> tuple[Any, Any]:
    env = MetaStatelessCartPole(num_trials=8, name="MetaCartPoleEightTrials")
    return env, env.default_params


def wide_cartpole() -> tuple[Any, Any]:
    """Position and angle projected to 16 features."""
    env = MetaStatelessCartPole(observation_size=16, name="MetaCartPoleWide")
    return env, env.default_params


class MetaPendulum(Trials):
    name = "MetaPendulum"


def pendulum() -> tuple[Any, Any]:
    """A pendulum to be swung up by a torque, 16 trials, cosine and sine projected to 4 features."""
    plain, _ = make("PositionOnlyPendulumEasy")
    env = MetaPendulum(RandomProjection(plain, observation_size=4), num_trials=16)
    return env, env.default_params
