"""Several trials of an environment as one episode: a task to be learnt in context."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gymnax.environments import spaces
from gymnax.environments.environment import Environment as GymnaxEnvironment

from popgym_jax import environment, prng
from popgym_jax.wrappers import Wrapper, restart


@struct.dataclass
class TrialsState(environment.EnvState):
    """time: steps taken in this meta-episode, int32 ()
    trial: trials that have ended, int32 ()
    play: state of the environment inside, in the running trial
    first: its state in which the first trial began, or None if each begins in its own
    """

    trial: jax.Array
    play: Any
    first: Any


@struct.dataclass
class TrialsParams(environment.EnvParams):
    """max_steps_in_episode: the longest possible meta-episode, num_trials x steps of
        a trial; the environment itself does not read it
    num_trials: trials of a meta-episode
    trial: parameters of the environment inside
    """

    num_trials: int = 16
    trial: Any = None


class Trials(Wrapper):
    """`num_trials` episodes of `env` as one meta-episode, over which an agent can learn.

    What a RandomProjection inside draws stays for the whole meta-episode:
    `Trials(RandomProjection(env), 16)` asks to find out, in the first trials, what is
    seen and done, and pays in the later ones. `env` is of this package or any other
    with gymnax's 1.x interface; its observation must be a vector (O,).

    Observation: [observation of `env` (O) | trial-end flag | previous reward], float32
        (O + 2,); the last two are those of the step just taken, 0 at the start of a
        meta-episode. PreviousActionAndStart around it adds the previous action and a
        start flag of 1 where a META-episode begins.
    Action, reward: those of `env`.
    Trial: ends where `env` terminates or truncates. The next one begins within the same
        step: the observation of a step that ends a trial is the first of the next one,
        with flag 1 and the last reward of the old one.
    End: terminated with the last trial, never truncated. The agent is told
        beforehand how many trials there are, in the sense that they are always as
        many, and nothing comes after them, so the value there is 0; a trial's own
        time limit cuts nothing off, as more trials follow.
        info["final_observation"] is then the first of a trial that is not played.

    num_trials: trials of a meta-episode
    termination_fails: a trial that terminates before its time limit has failed; False
        where that is how one is won (at a maze's exit) or how each one ends (with the
        last card)
    fresh: each trial begins in its own state; if not, in that of the first, which asks
        for an `env` that can tell an observation from a state (`observe`)
    """

    trial_features = 2  # the last ones of an observation: flag and reward
    reward_range = (-np.inf, np.inf)  # bounds of the last one

    def __init__(
        self,
        env: GymnaxEnvironment,
        num_trials: int = 16,
        termination_fails: bool = True,
        fresh: bool = True,
    ):
        super().__init__(env)
        if num_trials < 1:
            raise ValueError(f"num_trials must be at least 1, got {num_trials}")
        seen = env.observation_space(env.default_params)
        if not isinstance(seen, spaces.Box) or len(seen.shape) != 1:
            raise ValueError(f"Trials needs vector observations, {env.name} has {seen}")
        self.num_trials = num_trials
        self.termination_fails = termination_fails
        self.fresh = fresh

    @property
    def default_params(self) -> TrialsParams:
        trial = self.env.default_params
        return TrialsParams(
            max_steps_in_episode=self.num_trials * trial.max_steps_in_episode,
            num_trials=self.num_trials,
            trial=trial,
        )

    def reset_env(self, key: jax.Array, params: TrialsParams) -> tuple[jax.Array, TrialsState]:
        """A new meta-episode and its first trial: observation float32 (O + 2,) and state."""
        obs, play = self.env.reset_env(key, params.trial)
        zero = jnp.zeros((), jnp.int32)
        state = TrialsState(
            time=zero,
            trial=zero,
            play=play,
            first=None if self.fresh else play,
        )
        flag_and_reward = jnp.zeros(2, jnp.float32)
        return jnp.concatenate([obs, flag_and_reward]), state

    def step_env(
        self, key: jax.Array, state: TrialsState, action: Any, params: TrialsParams
    ) -> tuple[jax.Array, TrialsState, jax.Array, jax.Array, dict[Any, Any]]:
        """A step of the trial, and the next trial where it ends.

        Returns observation (O + 2,), state, reward, terminated and info with

        trial_ended: the next trial has begun, bool ()
        trial_failed: by a termination, before the old one had its full length, bool ()
        """
        key_step, key_start = prng.split(key, 2)
        played = self.env.step_env(key_step, state.play, action, params.trial)
        obs, play, reward, terminated, info = played
        full_length = self.env.is_truncated(play, params.trial)
        ended = terminated | full_length
        info = {
            **info,
            "trial_ended": ended,
            "trial_failed": terminated & ~full_length & self.termination_fails,
        }

        obs, play = self._next_where(ended, key_start, (state, params), (obs, play))
        state = state.replace(
            time=state.time + 1,
            trial=state.trial + ended,
            play=play,
        )
        reward = jnp.asarray(reward, jnp.float32)
        flag_and_reward = jnp.stack([ended.astype(jnp.float32), reward])
        obs = jnp.concatenate([obs, flag_and_reward])
        return obs, state, reward, self.is_terminated(state, params), info

    def _next_where(self, ended: jax.Array, key: jax.Array, before: Any, current: Any) -> Any:
        """Observation and state of the trial, replaced by those of the next one where it ended.

        before: state and parameters of the meta-episode
        """
        if getattr(self.env, "costly_reset", False):
            return self._reset_where(self._next_trial, ended, key, before, current)
        begun = self._next_trial(key, before)
        return jax.tree.map(lambda new, old: jnp.where(ended, new, old), begun, current)

    def _next_trial(self, key: jax.Array, before: Any) -> tuple[jax.Array, Any]:
        """Observation (O,) and state of a trial that begins."""
        state, params = before
        if self.fresh:
            return restart(self.env, key, state.play, params.trial)
        return self.env.observe(key, state.first, None, params.trial), state.first

    def inner_state(self, state: TrialsState) -> Any:
        return state.play

    def render(self, state: TrialsState, params: TrialsParams) -> str:
        """Which trial runs, and the environment inside."""
        trial = f"trial {int(state.trial) + 1} of {params.num_trials}"
        return f"{trial}\n{super().render(state, params.trial)}"

    def render_action(self, state: TrialsState, action: Any, params: TrialsParams) -> str:
        return super().render_action(state, action, params.trial)

    def is_terminated(self, state: TrialsState, params: TrialsParams) -> jax.Array:
        """All trials have been played, bool ()."""
        return state.trial >= params.num_trials

    def is_truncated(self, state: TrialsState, params: TrialsParams) -> jax.Array:
        """Never, bool ()."""
        return jnp.zeros((), bool)

    def action_space(self, params: TrialsParams) -> Any:
        return self.env.action_space(params.trial)

    def observation_space(self, params: TrialsParams) -> spaces.Box:
        seen = self.env.observation_space(params.trial)
        least, most = self.reward_range
        low = np.append(np.broadcast_to(seen.low, seen.shape), [0.0, least])
        high = np.append(np.broadcast_to(seen.high, seen.shape), [1.0, most])
        return spaces.Box(low.astype(np.float32), high.astype(np.float32), low.shape)
