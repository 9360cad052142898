"""CartPole as a task to be learnt in context: several trials under one random projection."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gymnax.environments import spaces

from popgym_jax import cartpole, environment, prng
from popgym_jax.random_projection import ProjectionState, RandomProjection

PROJECTED = 4  # features of a projected observation, as in the paper's code
MAX_STEPS_IN_TRIAL = 200


@struct.dataclass
class EnvState(environment.EnvState):
    """time: steps taken in this meta-episode, int32 ()
    trial: trials that have ended, int32 ()
    play: the running trial and the projections of the meta-episode
    first: the state in which the first trial began, or None if each begins in its
        own
    """

    trial: jax.Array
    play: ProjectionState
    first: Any


@struct.dataclass
class EnvParams(environment.EnvParams):
    """max_steps_in_episode: the longest possible meta-episode, num_trials x steps of
        a trial; the environment itself does not read it
    num_trials: trials of a meta-episode
    trial: parameters of CartPole
    """

    num_trials: int = 16
    trial: Any = cartpole.EnvParams()


class MetaStatelessCartPole(environment.Environment[EnvState, EnvParams]):
    """Find out, over several trials, how to balance a pole seen and pushed through random maps.

    The randomly-projected CartPole of Lu et al. 2023, section 4.3: a meta-episode
    draws one RandomProjection of PositionOnlyCartPole ("Stateless" in the paper)
    and plays `num_trials` trials under it. An agent that remembers what it found
    out in the first ones does better in the later ones. It sees neither velocities
    nor which of the two actions pushes to the right.

    Observation: [M_o (x, theta) (4) | trial-end flag | previous reward], float32
        (6,); the last two are those of the step just taken, 0 at the start of a
        meta-episode. The paper shows the previous action and a start flag too:
        PreviousActionAndStart adds them, with a start flag of 1 where a
        META-episode begins.
    Action: 0 or 1, integer (); by a fair coin in each meta-episode 1 pushes to the
        right or to the left.
    Reward: +1/200 on every step, float32 (), so that a perfect trial is worth 1.
    Return: between 0 and num_trials; random about 0.112 num_trials.
    Trial: ends when |x| > 2.4 or |theta| > 12 degrees, or after 200 steps. The next
        one begins within the same step: the observation of a step that ends a trial
        is the first of the next one, with flag 1 and the last reward of the old
        one. Its state is drawn afresh.
    End: terminated with the last trial, never truncated. The agent is told
        beforehand how many trials there are, in the sense that they are always as
        many, and nothing comes after them, so the value there is 0; a trial's own
        time limit cuts nothing off, as more trials follow.
        info["final_observation"] is then the first of a trial that is not played.

    num_trials: trials of a meta-episode
    max_trial_length: steps of a trial, whose inverse is the reward
    fresh: each trial begins in its own state; if not, in that of the first, as in
        the paper's code, which an agent could learn by heart

    Unlike the paper's code, actions are projected too, as the paper says.
    """

    costly_reset = True
    obs_requires_prev_action = True
    trial_features = 2  # the last ones of an observation: flag and reward

    def __init__(
        self,
        num_trials: int = 16,
        max_trial_length: int = MAX_STEPS_IN_TRIAL,
        fresh: bool = True,
        name: str | None = None,
    ):
        if num_trials < 1:
            raise ValueError(f"num_trials must be at least 1, got {num_trials}")
        if max_trial_length < 1:
            raise ValueError(f"max_trial_length must be at least 1, got {max_trial_length}")
        self.num_trials = num_trials
        self.max_trial_length = max_trial_length
        self.fresh = fresh
        self.env = RandomProjection(self.make_task(), PROJECTED)
        super().__init__(name)

    def make_task(self) -> environment.Environment:
        """What is played in a trial, without projection."""
        return cartpole.PositionOnlyCartPole(self.max_trial_length)

    @property
    def default_params(self) -> EnvParams:
        return EnvParams(
            max_steps_in_episode=self.num_trials * self.max_trial_length,
            num_trials=self.num_trials,
            trial=self.env.default_params,
        )

    def reset_env(self, key: jax.Array, params: EnvParams) -> tuple[jax.Array, EnvState]:
        """New projections and the first trial: observation float32 (6,) and state."""
        obs, play = self.env.reset_env(key, params.trial)
        zero = jnp.zeros((), jnp.int32)
        state = EnvState(
            time=zero,
            trial=zero,
            play=play,
            first=None if self.fresh else play.env_state,
        )
        flag_and_reward = jnp.zeros(2, jnp.float32)
        return jnp.concatenate([obs, flag_and_reward]), state

    def step_env(
        self, key: jax.Array, state: EnvState, action: jax.Array, params: EnvParams
    ) -> tuple[jax.Array, EnvState, jax.Array, jax.Array, dict[Any, Any]]:
        """A step of the trial, and the next trial where it ends.

        Returns observation (6,), state, reward, terminated and info with

        trial_ended: the next trial has begun, bool ()
        trial_failed: by a fall, before the old one had its full length, bool ()
        """
        key_step, key_start = prng.split(key, 2)
        played = self.env.step_env(key_step, state.play, action, params.trial)
        obs, play, reward, fallen, _ = played
        full_length = self.env.is_truncated(play, params.trial)
        ended = fallen | full_length
        info = {
            "trial_ended": ended,
            "trial_failed": fallen & ~full_length,
        }

        def next_where_ended(new, old):
            return jnp.where(ended, new, old)

        begun = self._next_trial(key_start, state, params)
        obs, play = jax.tree.map(next_where_ended, begun, (obs, play))
        state = state.replace(
            time=state.time + 1,
            trial=state.trial + ended,
            play=play,
        )
        flag_and_reward = jnp.stack([ended.astype(jnp.float32), reward])
        obs = jnp.concatenate([obs, flag_and_reward])
        return obs, state, reward, self.is_terminated(state, params), info

    def identifiable(self, state: EnvState) -> jax.Array:
        """What an agent can find out of the projections: sign(M_a) M_o, float32 (8,).

        CartPole looks the same in a mirror, (x, theta, push) -> -(x, theta, push),
        and -M_o is as likely as M_o. So (M_o, swapped actions, s) and
        (-M_o, unswapped actions, -s) cannot be told apart: neither M_o nor whether
        the actions are swapped can be known, but their product can. For the same
        reason swapping the two actions makes the task no harder.

        Privileged: for a learner in training, never for the agent that acts.
        """
        swapped = state.play.M_a[0].astype(jnp.float32)  # 1 or 0
        sign = 2.0 * swapped - 1.0
        return sign * state.play.M_o.ravel()

    def _next_trial(
        self, key: jax.Array, state: EnvState, params: EnvParams
    ) -> tuple[jax.Array, ProjectionState]:
        """Projected observation (4,) and the state of a trial that begins."""
        if self.fresh:
            return self.env.restart(key, state.play, params.trial)
        play = state.play.replace(time=jnp.zeros((), jnp.int32), env_state=state.first)
        return self.env.observe(key, play, None, params.trial), play

    def is_terminated(self, state: EnvState, params: EnvParams) -> jax.Array:
        """All trials have been played, bool ()."""
        return state.trial >= params.num_trials

    def is_truncated(self, state: EnvState, params: EnvParams) -> jax.Array:
        """Never, bool ()."""
        return jnp.zeros((), bool)

    def action_space(self, params: EnvParams) -> spaces.Discrete:
        return self.env.action_space(params.trial)

    def observation_space(self, params: EnvParams) -> spaces.Box:
        projected = self.env.observation_space(params.trial)
        high = np.append(np.full(PROJECTED, projected.high), [1.0, 1.0]).astype(np.float32)
        low = np.append(-high[:PROJECTED], [0.0, 0.0]).astype(np.float32)
        return spaces.Box(low, high, (PROJECTED + 2,))


class MetaNoisyStatelessCartPole(MetaStatelessCartPole):
    """MetaStatelessCartPole seen through Gaussian noise.

    As MetaStatelessCartPole, but its task is NoisyPositionOnlyCartPole: x and theta
    each get their own draw from N(0, noise_sigma^2) and are clipped before they are
    projected.

    noise_sigma: standard deviation of the noise, 0.1 by default as in the Easy task
    """

    def __init__(
        self,
        num_trials: int = 16,
        max_trial_length: int = MAX_STEPS_IN_TRIAL,
        fresh: bool = True,
        noise_sigma: float = 0.1,
        name: str | None = None,
    ):
        self.noise_sigma = noise_sigma
        super().__init__(num_trials, max_trial_length, fresh, name)

    def make_task(self) -> environment.Environment:
        return cartpole.NoisyPositionOnlyCartPole(self.noise_sigma, self.max_trial_length)
