"""CartPole in part: positions, exact (PositionOnlyCartPole) or noisy (NoisyPositionOnlyCartPole),
or velocities (VelocityOnlyCartPole).

All quantities in SI units: x (m), x_dot (m/s), theta (rad, 0 is upright), theta_dot (rad/s).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gymnax.environments import spaces

from popgym_jax import environment, prng

GRAVITY = 9.8
MASS_POLE = 0.1
MASS_TOTAL = 1.0 + MASS_POLE
HALF_LENGTH = 0.5
FORCE = 10.0
TIME_STEP = 0.02
X_LIMIT = 2.4
THETA_LIMIT = math.radians(12)
RESET_RANGE = 0.05
TRACK = 48  # characters, where the track is shown as text
OBSERVATION_BOUND = np.array([2 * X_LIMIT, 2 * THETA_LIMIT], np.float32)


@struct.dataclass
class EnvState(environment.EnvState):
    """time: steps taken, int32 ()
    physics: x, x_dot, theta, theta_dot, float32 (4,)
    """

    physics: jax.Array


@struct.dataclass
class EnvParams(environment.EnvParams):
    """max_steps_in_episode: truncation, and the divisor of the reward
    force: of a push (N)
    half_length: of the pole (m), whose mass stays as it is
    """

    max_steps_in_episode: int = 200
    force: float = FORCE
    half_length: float = HALF_LENGTH


@struct.dataclass
class NoisyEnvParams(EnvParams):
    """noise_sigma: standard deviation of the noise on x (m) and on theta (rad)."""

    noise_sigma: float = 0.1


class PositionOnlyCartPole(environment.Environment[EnvState, EnvParams]):
    """Balance the pole without seeing any velocity (Morad et al. 2023, POPGym; popgym 1.0.7).

    The paper calls it Stateless CartPole. Gymnasium's CartPole-v1 physics: a cart of 1 kg, a pole
    of 0.1 kg and half-length 0.5 m, a push of 10 N, explicit Euler steps of 0.02 s. A reset draws
    the four state variables uniformly from [-0.05, 0.05].

    Observation: x and theta, float32 (2,), not clipped; bounds 4.8 m and 0.4189 rad.
    Action: 0 pushes left, 1 pushes right, integer ().
    Reward: +1/max_steps_in_episode on every step, float32 ().
    Return: episode length / max_steps_in_episode, in (0, 1]; random about 22.3 steps.
    Episode: at most 200, 400, 600 steps for Easy, Medium, Hard.
    End: terminated when |x| > 2.4 or |theta| > 12 degrees; truncated at max_steps_in_episode; a
        fall on the last step is both.

    Reference quirks kept: the step that ends in a fall is rewarded like any other.
    The reference computes in float64, this environment in float32: from the same state one step
    agrees to 1e-6, a long balanced episode drifts apart as CartPole is unstable.
    """

    has_picture = True

    def __init__(self, max_episode_length: int = 200, name: str | None = None):
        self.max_episode_length = max_episode_length
        super().__init__(name)

    @property
    def default_params(self) -> EnvParams:
        return EnvParams(max_steps_in_episode=self.max_episode_length)

    def reset_env(self, key: jax.Array, params: EnvParams) -> tuple[jax.Array, EnvState]:
        """Nearly upright and nearly at rest: observation float32 (2,) and state."""
        key_state, key_observe = self.reset_keys(key)
        physics = prng.uniform(prng.bits(key_state, 4), -RESET_RANGE, RESET_RANGE)
        state = EnvState(time=jnp.zeros((), jnp.int32), physics=physics)
        return self.observe(key_observe, state, None, params), state

    def reset_keys(self, key: jax.Array) -> jax.Array:
        """Keys of a fresh state and of the noise on its observation, (2,)."""
        return prng.split(key, 2)

    def step_env(
        self, key: jax.Array, state: EnvState, action: jax.Array, params: EnvParams
    ) -> tuple[jax.Array, EnvState, jax.Array, jax.Array, dict[Any, Any]]:
        """Push for one time step: observation (2,), state, reward, terminated, {}."""
        physics = euler_step(state.physics, action, params.force, params.half_length)
        state = EnvState(time=state.time + 1, physics=physics)
        reward = 1.0 / jnp.asarray(params.max_steps_in_episode, jnp.float32)
        observation = self.observe(key, state, action, params)
        return observation, state, reward, self.is_terminated(state, params), {}

    def observe(
        self, key: jax.Array, state: EnvState, action: jax.Array | None, params: EnvParams
    ) -> jax.Array:
        """x and theta, float32 (2,); the key is for the noisy subclass."""
        return state.physics[::2]

    def is_terminated(self, state: EnvState, params: EnvParams) -> jax.Array:
        """The cart has left the track or the pole has fallen, bool ()."""
        x, _, theta, _ = state.physics
        return (jnp.abs(x) > X_LIMIT) | (jnp.abs(theta) > THETA_LIMIT)

    def render(self, state: EnvState, params: EnvParams) -> str:
        """The track with the cart on it, its place, and the pole's angle, to the right positive."""
        x, _, theta, _ = np.asarray(state.physics)
        place = round(TRACK / 2 * (1 + np.clip(x / X_LIMIT, -1, 1)))
        track = "-" * place + "o" + "-" * (TRACK - place)
        return f"[{track}] cart {x:+.2f} m, pole {np.degrees(theta):+.1f} degrees"

    def render_action(self, state: EnvState, action: Any, params: Any) -> str:
        return "push right" if action == 1 else "push left"

    def draw(self, axes: Any, state: EnvState) -> None:
        """Cart and pole on matplotlib's axes, in metres."""
        x, _, theta, _ = np.asarray(state.physics)
        tip = (x + 2 * HALF_LENGTH * np.sin(theta), 2 * HALF_LENGTH * np.cos(theta))
        axes.plot([-X_LIMIT, X_LIMIT], [0, 0], color="black", linewidth=1)
        axes.plot([x - 0.25, x + 0.25], [0, 0], color="tab:grey", linewidth=12)
        axes.plot([x, tip[0]], [0, tip[1]], color="tab:orange", linewidth=5)
        axes.set(xlim=(-X_LIMIT, X_LIMIT), ylim=(-0.5, 1.5), xticks=[], yticks=[], aspect="equal")

    def action_space(self, params: EnvParams) -> spaces.Discrete:
        return spaces.Discrete(2)

    def observation_space(self, params: EnvParams) -> spaces.Box:
        return spaces.Box(-OBSERVATION_BOUND, OBSERVATION_BOUND, (2,))


class VelocityOnlyCartPole(PositionOnlyCartPole):
    """Balance the pole seeing only velocities (Morad et al. 2023, POPGym; popgym 1.0.7).

    As PositionOnlyCartPole, but:

    Observation: x_dot and theta_dot, float32 (2,), without bounds; at the reset x and theta.

    Reference quirks kept: as the reset shows the positions, all later ones can be integrated.
    """

    def observe(
        self, key: jax.Array, state: EnvState, action: jax.Array | None, params: EnvParams
    ) -> jax.Array:
        """x_dot and theta_dot, or x and theta at the reset, float32 (2,)."""
        return state.physics[::2] if action is None else state.physics[1::2]

    def observation_space(self, params: EnvParams) -> spaces.Box:
        return spaces.Box(-np.inf, np.inf, (2,))


class NoisyPositionOnlyCartPole(PositionOnlyCartPole):
    """PositionOnlyCartPole seen through Gaussian noise (Morad et al. 2023; popgym 1.0.7).

    The paper calls it Noisy Stateless CartPole. As PositionOnlyCartPole, but:

    Observation: x and theta, each plus its own draw from N(0, noise_sigma^2), then clipped to
        4.8 m and 0.4189 rad, float32 (2,); at the reset and at the last step too.
    Episode: at most 200 steps in all three; noise_sigma 0.1, 0.2, 0.3 for Easy, Medium, Hard.

    The noise touches neither the physics nor the reward.
    Reference quirks kept: metres and radians get the same sigma, so at 0.3 about one angle in six
    is clipped.
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
        """Noise on x and theta, float32 (2,)."""
        sigma = jnp.asarray(params.noise_sigma, jnp.float32)
        return sigma * prng.normal(prng.bits(key, 2))

    def observe(
        self, key: jax.Array, state: EnvState, action: jax.Array | None, params: NoisyEnvParams
    ) -> jax.Array:
        """x and theta plus noise, clipped, float32 (2,)."""
        noisy = state.physics[::2] + self.sample_noise(key, params)
        return jnp.clip(noisy, -OBSERVATION_BOUND, OBSERVATION_BOUND)


def euler_step(
    physics: jax.Array,
    action: jax.Array,
    force: float = FORCE,
    half_length: float = HALF_LENGTH,
) -> jax.Array:
    """One explicit Euler step of cart and pole under a push of +-`force` (N).

    With M the total mass, m the pole's, l its half-length and s, c = sin, cos(theta):

        f          = (F + m l theta_dot^2 s) / M
        theta_ddot = (g s - c f) / (l (4/3 - m c^2 / M))
        x_ddot     = f - m l theta_ddot c / M

    physics: x, x_dot, theta, theta_dot, float32 (4,); action: 0 or 1, integer ()
    Returns the state TIME_STEP later, float32 (4,).
    """
    x, x_dot, theta, theta_dot = physics
    mass_times_length = MASS_POLE * half_length
    push = jnp.where(action == 1, jnp.float32(force), jnp.float32(-force))
    sin = jnp.sin(theta)
    cos = jnp.cos(theta)
    f = (push + mass_times_length * theta_dot**2 * sin) / MASS_TOTAL
    pull = GRAVITY * sin - cos * f
    lever = half_length * (4 / 3 - MASS_POLE * cos**2 / MASS_TOTAL)
    theta_ddot = pull / lever
    x_ddot = f - mass_times_length * theta_ddot * cos / MASS_TOTAL
    velocity = jnp.stack([x_dot, x_ddot, theta_dot, theta_ddot])
    return physics + TIME_STEP * velocity
