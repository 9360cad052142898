"""Wrappers that are environments themselves: what an agent sees besides, and what a run reports."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gymnax.environments import spaces
from gymnax.environments.environment import Environment as GymnaxEnvironment

from popgym_jax import environment


class Wrapper(environment.Environment[Any, Any]):
    """An environment around another one, `env`, whose name, parameters and rules it keeps.

    env: of this package, or any other with gymnax's 1.x interface
    """

    def __init__(self, env: GymnaxEnvironment):
        if isinstance(env, EpisodeStatistics):
            raise ValueError("EpisodeStatistics must be the outermost wrapper")
        self.env = env
        self.costly_reset = getattr(env, "costly_reset", False)
        self.obs_requires_prev_action = getattr(env, "obs_requires_prev_action", False)
        self.has_picture = getattr(env, "has_picture", False)
        super().__init__(env.name)

    @property
    def default_params(self) -> Any:
        return self.env.default_params

    def is_terminated(self, state: Any, params: Any) -> jax.Array:
        return self.env.is_terminated(state, params)

    def is_truncated(self, state: Any, params: Any) -> jax.Array:
        return self.env.is_truncated(state, params)

    def inner_state(self, state: Any) -> Any:
        """The state of `env` in one of this environment."""
        return state

    def render(self, state: Any, params: Any) -> str:
        inner = self.inner_state(state)
        if isinstance(self.env, environment.Environment):
            return self.env.render(inner, params)
        return super().render(inner, params)

    def render_action(self, state: Any, action: Any, params: Any) -> str:
        inner = self.inner_state(state)
        if isinstance(self.env, environment.Environment):
            return self.env.render_action(inner, action, params)
        return super().render_action(inner, action, params)

    def draw(self, axes: Any, state: Any) -> None:
        self.env.draw(axes, self.inner_state(state))

    def action_space(self, params: Any) -> Any:
        return self.env.action_space(params)

    def observation_space(self, params: Any) -> Any:
        return self.env.observation_space(params)


def restart(
    env: GymnaxEnvironment, key: jax.Array, state: Any, params: Any
) -> tuple[jax.Array, Any]:
    """A fresh episode of `env`, in which what a RandomProjection had drawn stays as in `state`."""
    if isinstance(env, Wrapper) and hasattr(env, "restart"):
        return env.restart(key, state, params)
    return env.reset_env(key, params)


class PreviousActionAndStart(Wrapper):
    """Shows the agent its previous action and whether an episode begins.

    Observation: [observation of `env` | previous action | start flag], float32 (O + A + 1,); a
        discrete action as a one-hot vector, a torque as the agent gave it, not clipped (the bounds
        of the observation space are those of the action space all the same).

    The first observation of every episode, also after an automatic reset, has zeros for the action
    and 1 for the flag; `info["final_observation"]` has the last action and 0. The state is that of
    `env`.

    Unlike the reference's PreviousAction and Antialias, whose action before the first one is a
    one-hot 0 (as if action 0 had been taken) and whose flag is a pair of numbers.
    """

    def reset_env(self, key: jax.Array, params: Any) -> tuple[jax.Array, Any]:
        """Observation float32 (O + A + 1,) and the state of `env`."""
        obs, state = self.env.reset_env(key, params)
        return self._extended(obs, None, params), state

    def restart(self, key: jax.Array, state: Any, params: Any) -> tuple[jax.Array, Any]:
        """As `reset_env`, under the projections of `state`."""
        obs, state = restart(self.env, key, state, params)
        return self._extended(obs, None, params), state

    def step_env(
        self, key: jax.Array, state: Any, action: Any, params: Any
    ) -> tuple[jax.Array, Any, jax.Array, jax.Array, dict[Any, Any]]:
        """A step of `env`: observation (O + A + 1,), state, reward, terminated, info."""
        obs, state, reward, terminated, info = self.env.step_env(key, state, action, params)
        return self._extended(obs, action, params), state, reward, terminated, info

    def observe(self, key: jax.Array, state: Any, action: Any | None, params: Any) -> jax.Array:
        """Observation float32 (O + A + 1,) where `env` can tell its own from a state."""
        return self._extended(self.env.observe(key, state, action, params), action, params)

    def _extended(self, obs: jax.Array, action: Any | None, params: Any) -> jax.Array:
        space = self.env.action_space(params)
        if action is None:
            previous = jnp.zeros(self.num_actions, jnp.float32)
        elif isinstance(space, spaces.Discrete):
            previous = jax.nn.one_hot(action, space.n, dtype=jnp.float32)
        else:
            previous = jnp.asarray(action, jnp.float32).reshape(self.num_actions)
        start = jnp.full(1, action is None, jnp.float32)
        return jnp.concatenate([obs, previous, start])

    def observation_space(self, params: Any) -> spaces.Box:
        seen = self.env.observation_space(params)
        action = self.env.action_space(params)
        if isinstance(action, spaces.Discrete):  # shown one-hot
            action = spaces.Box(0.0, 1.0, (self.num_actions,))
        flag = spaces.Box(0.0, 1.0, (1,))
        parts = [seen, action, flag]
        low = np.concatenate([np.broadcast_to(part.low, part.shape) for part in parts])
        high = np.concatenate([np.broadcast_to(part.high, part.shape) for part in parts])
        size = math.prod(seen.shape) + self.num_actions + 1
        return spaces.Box(low.astype(np.float32), high.astype(np.float32), (size,))


@struct.dataclass
class StatisticsState(environment.EnvState):
    """time: steps taken in the running episode, int32 ()
    env_state: of the environment inside
    running_return: of the running episode, float32 ()
    last_return: of the last finished episode, float32 ()
    last_length: of the last finished episode, int32 (); this and last_return are 0 before
        there is one, which `episodes` tells
    episodes: number of finished episodes, int32 ()
    """

    env_state: Any
    running_return: jax.Array
    last_return: jax.Array
    last_length: jax.Array
    episodes: jax.Array


class EpisodeStatistics(Wrapper):
    """Reports return and length of every episode, across automatic resets.

    `step` adds to info, beside what is there: "episode_ended", whether this step is the last of an
    episode, bool (); "episode_return", float32 (), and "episode_length", int32 (), of the last
    finished episode, this step's included; "episodes", how many have finished since `reset`, int32
    (). Return and length are 0 as long as "episodes" is: only that tells such a 0 from a return.
    A return is the sum of rewards, added up in float32.

    It must be the outermost wrapper, and has `reset` and `step` only, not `reset_env` and
    `step_env`: what it counts outlives an episode.
    """

    @partial(jax.jit, static_argnames=("self",))
    def reset(self, key: jax.Array, params: Any = None) -> tuple[Any, StatisticsState]:
        """Observation and state of `env`, and nothing counted yet."""
        obs, env_state = self.env.reset(key, params)
        no_return = jnp.zeros((), jnp.float32)
        none = jnp.zeros((), jnp.int32)
        state = StatisticsState(
            time=none,
            env_state=env_state,
            running_return=no_return,
            last_return=no_return,
            last_length=none,
            episodes=none,
        )
        return obs, state

    @partial(jax.jit, static_argnames=("self",))
    def step(
        self, key: jax.Array, state: StatisticsState, action: Any, params: Any = None
    ) -> tuple[Any, StatisticsState, jax.Array, jax.Array, jax.Array, dict[Any, Any]]:
        """A step of `env`, counted."""
        stepped = self.env.step(key, state.env_state, action, params)
        obs, env_state, reward, terminated, truncated, info = stepped
        ended = terminated | truncated
        # a maximum without effect: LLVM must not contract this sum with a product in the reward
        term = jnp.maximum(reward, np.finfo(np.float32).min)
        running_return = state.running_return + term
        time = state.time + 1
        state = StatisticsState(
            time=jnp.where(ended, 0, time),
            env_state=env_state,
            running_return=jnp.where(ended, 0.0, running_return),
            last_return=jnp.where(ended, running_return, state.last_return),
            last_length=jnp.where(ended, time, state.last_length),
            episodes=state.episodes + ended,
        )
        info = {
            **info,
            "episode_ended": ended,
            "episode_return": state.last_return,
            "episode_length": state.last_length,
            "episodes": state.episodes,
        }
        return obs, state, reward, terminated, truncated, info

    def is_terminated(self, state: StatisticsState, params: Any) -> jax.Array:
        return self.env.is_terminated(state.env_state, params)

    def is_truncated(self, state: StatisticsState, params: Any) -> jax.Array:
        return self.env.is_truncated(state.env_state, params)

    def inner_state(self, state: StatisticsState) -> Any:
        return state.env_state
