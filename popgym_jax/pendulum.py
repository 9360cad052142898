"""Pendulum without velocity, exact (PositionOnlyPendulum) or noisy (NoisyPositionOnlyPendulum).

theta (rad, 0 is upright, not wrapped) and theta_dot (rad/s); the action is a torque (N m).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gymnax.environments import spaces

from popgym_jax import environment, prng

GRAVITY = 10.0
TIME_STEP = 0.05
MAX_SPEED = 8.0
MAX_TORQUE = 2.0
DIAL = 48  # characters, where the angle is shown as text
MEAN_COST = 16.2736044 / 2  # half the highest cost: hanging down at full speed and torque


@struct.dataclass
class EnvState(environment.EnvState):
    """time: steps taken, int32 ()
    physics: theta, theta_dot, float32 (2,)
    """

    physics: jax.Array


@struct.dataclass
class EnvParams(environment.EnvParams):
    """max_steps_in_episode: truncation, and the divisor of the reward."""

    max_steps_in_episode: int = 200


@struct.dataclass
class NoisyEnvParams(EnvParams):
    """noise_sigma: standard deviation of the noise on cos(theta) and on sin(theta)."""

    noise_sigma: float = 0.1


class PositionOnlyPendulum(environment.Environment[EnvState, EnvParams]):
    """Swing up a pendulum without seeing its speed (Morad et al. 2023, POPGym; popgym 1.0.7).

    The paper calls it Stateless Pendulum. Gymnasium's Pendulum-v1 physics: 1 kg on 1 m, gravity
    10 m/s^2, semi-implicit Euler steps of 0.05 s, speed limited to 8 rad/s. A reset draws theta
    uniformly from [-pi, pi] and theta_dot from [-1, 1].

    Observation: cos(theta) and sin(theta), float32 (2,).
    Action: torque, float32 (1,), clipped to [-2, 2] inside.
    Reward: (8.1368 - cost) / 8.1368 / max_steps_in_episode, float32 (), in [-1, 1] /
        max_steps_in_episode; cost = angle^2 + 0.1 theta_dot^2 + 0.001 torque^2 of the state
        BEFORE the step, with the angle wrapped to [-pi, pi).
    Return: in [-1, 1]; upright and still 1, random about 0.24.
    Episode: 200, 150, 100 steps for Easy, Medium, Hard.
    End: truncated at max_steps_in_episode; never terminated.

    Reference quirks kept: the harder the shorter.
    The reference computes in float64, this environment in float32: from the same state one step
    agrees to 1e-5, and from the same start a whole episode's return to 1e-3.
    """

    has_picture = True

    def __init__(self, max_episode_length: int = 200, name: str | None = None):
        self.max_episode_length = max_episode_length
        super().__init__(name)

    @property
    def default_params(self) -> EnvParams:
        return EnvParams(max_steps_in_episode=self.max_episode_length)

    def reset_env(self, key: jax.Array, params: EnvParams) -> tuple[jax.Array, EnvState]:
        """Any angle, a low speed: observation float32 (2,) and state."""
        key_state, key_observe = self.reset_keys(key)
        unit = prng.uniform(prng.bits(key_state, 2), -1.0, 1.0)
        physics = unit * jnp.array([jnp.pi, 1.0], jnp.float32)
        state = EnvState(time=jnp.zeros((), jnp.int32), physics=physics)
        return self.observe(key_observe, state, None, params), state

    def reset_keys(self, key: jax.Array) -> jax.Array:
        """Keys of a fresh state and of the noise on its observation, (2,)."""
        return prng.split(key, 2)

    def step_env(
        self, key: jax.Array, state: EnvState, action: jax.Array, params: EnvParams
    ) -> tuple[jax.Array, EnvState, jax.Array, jax.Array, dict[Any, Any]]:
        """Apply the torque for one time step: observation (2,), state, reward, terminated, {}."""
        torque = jnp.asarray(action, jnp.float32).reshape(())
        torque = jnp.clip(torque, -MAX_TORQUE, MAX_TORQUE)
        reward = (MEAN_COST - cost(state.physics, torque)) / MEAN_COST
        reward = reward / jnp.asarray(params.max_steps_in_episode, jnp.float32)
        state = EnvState(time=state.time + 1, physics=euler_step(state.physics, torque))
        observation = self.observe(key, state, action, params)
        return observation, state, reward, self.is_terminated(state, params), {}

    def observe(
        self, key: jax.Array, state: EnvState, action: jax.Array | None, params: EnvParams
    ) -> jax.Array:
        """cos and sin of the angle, float32 (2,); the key is for the noisy subclass."""
        theta = state.physics[0]
        return jnp.stack([jnp.cos(theta), jnp.sin(theta)])

    def is_terminated(self, state: EnvState, params: EnvParams) -> jax.Array:
        """Never, bool ()."""
        return jnp.zeros((), bool)

    def render(self, state: EnvState, params: EnvParams) -> str:
        """Its angle on a dial from -180 to 180 degrees, upright in the middle, and its speed."""
        theta, theta_dot = np.asarray(state.physics)
        angle = float(np.degrees(wrap_angle(theta)))
        place = round(DIAL * (angle + 180) / 360)
        dial = list("-" * (DIAL + 1))
        dial[DIAL // 2] = "^"
        dial[place] = "o"
        return f"[{''.join(dial)}] angle {angle:+.1f} degrees, speed {theta_dot:+.2f} rad/s"

    def render_action(self, state: EnvState, action: Any, params: Any) -> str:
        torque = np.clip(np.asarray(action).item(), -MAX_TORQUE, MAX_TORQUE)
        return f"torque {torque:+.2f} N m"

    def draw(self, axes: Any, state: EnvState) -> None:
        """The pendulum on matplotlib's axes, in metres; counterclockwise is positive."""
        theta, _ = np.asarray(state.physics)
        tip = (-np.sin(theta), np.cos(theta))
        axes.plot([0, tip[0]], [0, tip[1]], color="tab:orange", linewidth=6)
        axes.plot([0], [0], "o", color="black", markersize=6)
        axes.set(xlim=(-1.2, 1.2), ylim=(-1.2, 1.2), xticks=[], yticks=[], aspect="equal")

    def action_space(self, params: EnvParams) -> spaces.Box:
        return spaces.Box(-MAX_TORQUE, MAX_TORQUE, (1,))

    def observation_space(self, params: EnvParams) -> spaces.Box:
        return spaces.Box(-1.0, 1.0, (2,))


class NoisyPositionOnlyPendulum(PositionOnlyPendulum):
    """PositionOnlyPendulum seen through Gaussian noise (Morad et al. 2023; popgym 1.0.7).

    The paper calls it Noisy Stateless Pendulum. As PositionOnlyPendulum, but:

    Observation: cos(theta) and sin(theta), each plus its own draw from N(0, noise_sigma^2), then
        clipped to [-1, 1], float32 (2,); at the reset and at the last step too.
    Episode: 200 steps in all three; noise_sigma 0.1, 0.2, 0.3 for Easy, Medium, Hard.

    The noise touches neither the physics nor the reward.
    """

    def __init__(
        self,
        noise_sigma: float = 0.1,
        max_episode_length: int = 200,
        name: str | None = None,
    ):
        super().__init__(max_episode_length, name)
        self.noise_sigma = noise_sigma

    @property
    def default_params(self) -> NoisyEnvParams:
        return NoisyEnvParams(
            max_steps_in_episode=self.max_episode_length, noise_sigma=self.noise_sigma
        )

    def sample_noise(self, key: jax.Array, params: NoisyEnvParams) -> jax.Array:
        """Noise on cos(theta) and sin(theta), float32 (2,)."""
        sigma = jnp.asarray(params.noise_sigma, jnp.float32)
        return sigma * prng.normal(prng.bits(key, 2))

    def observe(
        self, key: jax.Array, state: EnvState, action: jax.Array | None, params: NoisyEnvParams
    ) -> jax.Array:
        """cos and sin of the angle plus noise, clipped, float32 (2,)."""
        exact = super().observe(key, state, action, params)
        return jnp.clip(exact + self.sample_noise(key, params), -1.0, 1.0)


def wrap_angle(theta: jax.Array) -> jax.Array:
    """The same angle in [-pi, pi), float32 ()."""
    return (theta + jnp.pi) % (2 * jnp.pi) - jnp.pi


def cost(physics: jax.Array, torque: jax.Array) -> jax.Array:
    """angle^2 + 0.1 theta_dot^2 + 0.001 torque^2, float32 (), for physics (2,), torque ()."""
    theta, theta_dot = physics
    return wrap_angle(theta) ** 2 + 0.1 * theta_dot**2 + 0.001 * torque**2


def euler_step(physics: jax.Array, torque: jax.Array) -> jax.Array:
    """One semi-implicit Euler step (the new speed moves the angle).

        theta_dot' = clip(theta_dot + (3/2 g sin(theta) + 3 torque) dt, -8, 8)
        theta'     = theta + theta_dot' dt

    physics: theta, theta_dot, float32 (2,); torque: float32 ()
    Returns the state TIME_STEP later, float32 (2,).
    """
    theta, theta_dot = physics
    theta_ddot = 1.5 * GRAVITY * jnp.sin(theta) + 3.0 * torque
    theta_dot = jnp.clip(theta_dot + theta_ddot * TIME_STEP, -MAX_SPEED, MAX_SPEED)
    return jnp.stack([theta + theta_dot * TIME_STEP, theta_dot])
