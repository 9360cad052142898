"""MultiarmedBandit: every arm pays with its own probability, new in each episode."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gymnax.environments import spaces

from popgym_jax import cards, environment, prng


@struct.dataclass
class EnvState(environment.EnvState):
    """time: steps taken, int32 ()
    probabilities: of each arm to pay, float32 (num_bandits,)
    """

    probabilities: jax.Array


@struct.dataclass
class EnvParams(environment.EnvParams):
    """max_steps_in_episode: truncation, and the divisor of the reward."""

    max_steps_in_episode: int = 200


class MultiarmedBandit(environment.Environment[EnvState, EnvParams]):
    """Find the arm that pays best and pull it (Morad et al. 2023, POPGym; popgym 1.0.7).

    A reset draws the probability of each arm to pay, uniformly from [0, 1).

    Observation: whether the arm paid, one-hot (no, yes), float32 (2,); no at the reset.
    Action: an arm, integer ().
    Reward: +1/max_steps_in_episode if the arm pays, else -1/max_steps_in_episode, float32 ().
    Return: in [-1, 1]; random 0, always the best of n arms (n-1)/(n+1) on average.
    Episode: 200, 400, 600 steps for Easy, Medium, Hard with 10, 20, 30 arms.
    End: truncated at max_steps_in_episode; never terminated.

    Reference quirks kept: an arm that does not pay costs something, although the description
    promises a reward of zero. The observation does not say which arm was pulled.
    """

    obs_requires_prev_action = True

    def __init__(self, num_bandits: int = 10, episode_length: int = 200, name: str | None = None):
        if num_bandits < 1:
            raise ValueError(f"num_bandits must be at least 1, got {num_bandits}")
        if episode_length < 1:
            raise ValueError(f"episode_length must be at least 1, got {episode_length}")
        self.num_bandits = num_bandits
        self.episode_length = episode_length
        super().__init__(name)

    @property
    def default_params(self) -> EnvParams:
        return EnvParams(max_steps_in_episode=self.episode_length)

    def sample_probabilities(self, key: jax.Array) -> jax.Array:
        """How likely each arm is to pay, float32 (num_bandits,)."""
        return prng.uniform(prng.bits(key, self.num_bandits))

    def sample_payout(self, key: jax.Array) -> jax.Array:
        """Uniform in [0, 1), float32 (): an arm pays if its probability is greater."""
        return prng.uniform(prng.bits(key, 1)[0])

    def reset_env(self, key: jax.Array, params: EnvParams) -> tuple[jax.Array, EnvState]:
        """New arms: observation float32 (2,) and state."""
        state = EnvState(
            time=jnp.zeros((), jnp.int32),
            probabilities=self.sample_probabilities(key),
        )
        return cards.one_hot(jnp.int32(0), 2), state

    def step_env(
        self, key: jax.Array, state: EnvState, action: jax.Array, params: EnvParams
    ) -> tuple[jax.Array, EnvState, jax.Array, jax.Array, dict[Any, Any]]:
        """Pull an arm: observation (2,), state, reward, terminated, {}."""
        pays = self.sample_payout(key) < state.probabilities[action]
        scale = 1.0 / jnp.asarray(params.max_steps_in_episode, jnp.float32)
        reward = jnp.where(pays, scale, -scale)
        state = EnvState(time=state.time + 1, probabilities=state.probabilities)
        observation = cards.one_hot(pays, 2)
        return observation, state, reward, self.is_terminated(state, params), {}

    def is_terminated(self, state: EnvState, params: EnvParams) -> jax.Array:
        """Never, bool ()."""
        return jnp.zeros((), bool)

    def render(self, state: EnvState, params: EnvParams) -> str:
        """How likely each arm is to pay, and the best one."""
        probabilities = np.asarray(state.probabilities)
        shown = " ".join(f"{probability:.2f}" for probability in probabilities)
        return f"arms pay with probability {shown}\nbest arm: {probabilities.argmax()}"

    def render_action(self, state: EnvState, action: Any, params: Any) -> str:
        return f"arm {action}"

    def action_space(self, params: EnvParams) -> spaces.Discrete:
        return spaces.Discrete(self.num_bandits)

    def observation_space(self, params: EnvParams) -> spaces.Box:
        return spaces.Box(0.0, 1.0, (2,))
