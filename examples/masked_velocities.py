"""Brax's inverted pendulum without its velocities, for PPO and for Muesli.

    python ppo_s5_popgym.py --env examples.masked_velocities:make
    python muesli_s5_metarl.py --suite own --tasks examples.masked_velocities:make

The agent sees where cart and pole are, not how fast they move, so it has to remember where they
were. The class gives a Brax environment gymnax's interface, and shows the first features only: in
Brax's observations positions come before velocities.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from brax import envs
from flax import struct
from gymnax.environments import environment, spaces
from jax import Array


@struct.dataclass
class EnvState(environment.EnvState):
    time: Array  # steps taken, int32 ()
    brax: Any  # Brax's own state


@struct.dataclass
class EnvParams(environment.EnvParams):
    max_steps_in_episode: int = 1000


class MaskedVelocities(environment.Environment[EnvState, EnvParams]):
    """The first `positions` features of a Brax environment. Actions are clipped to its range, [-1, 1]."""

    def __init__(self, env: Any, name: str, positions: int):
        self.env = env
        self.env_name = name
        self.positions = positions

    @property
    def name(self) -> str:
        return self.env_name

    def reset_env(self, key: Array, params: EnvParams) -> tuple[Array, EnvState]:
        state = EnvState(time=jnp.zeros((), jnp.int32), brax=self.env.reset(key))
        return self.get_obs(state), state

    def step_env(
        self, key: Array, state: EnvState, action: Array, params: EnvParams
    ) -> tuple[Array, EnvState, Array, Array, dict]:
        after = self.env.step(state.brax, jnp.clip(action, -1.0, 1.0))
        reward = jnp.asarray(after.reward, jnp.float32)  # here a Python number
        state = EnvState(time=state.time + 1, brax=after.replace(reward=reward))
        return self.get_obs(state), state, reward, after.done > 0, {}

    def get_obs(self, state: EnvState, params: Any = None, key: Any = None) -> Array:
        return state.brax.obs[: self.positions]

    def action_space(self, params: EnvParams) -> spaces.Box:
        return spaces.Box(-1.0, 1.0, (self.env.action_size,))

    def observation_space(self, params: EnvParams) -> spaces.Box:
        return spaces.Box(-jnp.inf, jnp.inf, (self.positions,))


def make() -> tuple[MaskedVelocities, EnvParams]:
    pendulum = envs.get_environment("inverted_pendulum", backend="spring")
    return MaskedVelocities(pendulum, "MaskedInvertedPendulum", positions=2), EnvParams()
