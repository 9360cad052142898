"""An environment of your own: a T-maze, learnt by S5 and not by a network without memory.

    python ppo_s5_popgym.py --env examples.own_environment:t_maze --total-timesteps 500000

The first observation shows on which side the prize lies, left or right. Then comes a corridor,
and at its end the agent turns. Whoever has forgotten is right half of the time.

An environment for the script is what gymnax 1.x calls one: `reset_env`, `step_env`, the spaces. The
base class adds the time limit and the auto-reset. The factory returns it with its parameters.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from gymnax.environments import environment, spaces
from jax import Array


@struct.dataclass
class EnvState(environment.EnvState):
    time: Array  # steps taken, which is how far the agent has walked, int32 ()
    side: Array  # of the prize: 0 left, 1 right, int32 ()


@struct.dataclass
class EnvParams(environment.EnvParams):
    corridor: int = 28  # steps before the turn
    max_steps_in_episode: int = 1000  # gymnax's time limit, which no episode reaches


class TMaze(environment.Environment[EnvState, EnvParams]):
    """Observation (3,): 1 for a sign that the prize is left, that it is right, and for the corridor's end."""

    def reset_env(self, key: Array, params: EnvParams) -> tuple[Array, EnvState]:
        side = jax.random.bernoulli(key).astype(jnp.int32)
        sign = jax.nn.one_hot(side, 3, dtype=jnp.float32)
        return sign, EnvState(time=jnp.zeros((), jnp.int32), side=side)

    def step_env(
        self, key: Array, state: EnvState, action: Any, params: EnvParams
    ) -> tuple[Array, EnvState, Array, Array, dict]:
        turned = state.time == params.corridor
        reward = jnp.where(turned, jnp.where(action == state.side, 1.0, -1.0), 0.0)
        state = state.replace(time=state.time + 1)
        at_the_end = state.time == params.corridor
        obs = jnp.array([0.0, 0.0, 1.0], jnp.float32) * at_the_end
        return obs, state, reward, turned, {}

    def action_space(self, params: EnvParams) -> spaces.Discrete:
        """0: turn left, 1: turn right; without effect in the corridor."""
        return spaces.Discrete(2)

    def observation_space(self, params: EnvParams) -> spaces.Box:
        return spaces.Box(0.0, 1.0, (3,), jnp.float32)


def t_maze() -> tuple[TMaze, EnvParams]:
    return TMaze(), EnvParams()
