"""A random linear projection of what an agent sees and does, new in every episode."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gymnax.environments import spaces
from gymnax.environments.environment import Environment as GymnaxEnvironment

from popgym_jax import environment, prng
from popgym_jax.trials import Trials
from popgym_jax.wrappers import Wrapper, restart


@struct.dataclass
class ProjectionState(environment.EnvState):
    """time: steps taken in this episode, int32 ()
    env_state: of the environment inside
    M_o: projection of observations, float32 (O', O)
    M_a: projection of actions: float32 (A, A), or, if they are discrete, the task's
        action for each of the agent's, int32 (A,)
    """

    env_state: Any
    M_o: jax.Array
    M_a: jax.Array


class RandomProjection(Wrapper):
    """`env` seen and acted on through random linear maps (Lu et al. 2023, algorithm 1).

    Every episode draws its own M_o and M_a and keeps them to its end; reward, ends
    and length are those of `env`, whose observation must be a vector (O,). A reset
    draws them at random like the rest of the episode; `restart` begins an episode
    under the projections of the one before.

    Observation: M_o o, float32 (O',) with O' = `observation_size`, by default O.
        M_o = g Q, where Q has orthonormal columns, or orthonormal rows if O' < O,
        uniformly distributed, and g^2 = max(1, O' / O), so that the entries of M_o
        have mean 0 and variance 1 / O: a projected feature has the mean square of
        the original ones, and if O' >= O nothing of the original is lost or
        squeezed, whatever is drawn. For CartPole, 2 -> 4, it is what the paper's
        code draws (orthogonal, gain sqrt(2)); a Gaussian M_o would at times be
        nearly singular.
    Action, discrete: index a stands for action M_a[a] of `env`, M_a a uniform
        permutation. These are the linear maps from one-hot vectors onto one-hot
        vectors, so every action of `env` stays reachable. Of two actions, a fair
        coin decides whether they are swapped: the law of sign(m (2 a - 1)) with a
        Gaussian m, which is a random projection of the push itself.
    Action, continuous: M_a a within the bounds of `env`, with the bounds scaled to
        +-1: M_a = sqrt(A) Q with a uniform orthogonal Q (A, A), and what is beyond
        the bounds is clipped. By the factor sqrt(A) every action of `env` stays
        reachable from inside of the bounds; for A = 1 the action keeps or changes
        its sign, by a fair coin.

    observation_size: features O' of an observation; None: O
    project_actions: False leaves actions as they are, as the paper's code does
    """

    def __init__(
        self,
        env: GymnaxEnvironment,
        observation_size: int | None = None,
        project_actions: bool = True,
    ):
        super().__init__(env)
        if isinstance(env, Trials):
            raise ValueError("RandomProjection goes inside of Trials, whose flag it would mix in")
        params = env.default_params
        seen = env.observation_space(params)
        if not isinstance(seen, spaces.Box) or len(seen.shape) != 1:
            raise ValueError(f"RandomProjection needs vector observations, {env.name} has {seen}")
        if observation_size is None:
            observation_size = seen.shape[0]
        if observation_size < 1:
            raise ValueError(f"observation_size must be at least 1, got {observation_size}")
        self.observation_size = observation_size
        self.project_actions = project_actions

        actions = env.action_space(params)
        if isinstance(actions, spaces.Box):
            bounded = np.isfinite(actions.low).all() and np.isfinite(actions.high).all()
            if not bounded:
                raise ValueError(f"RandomProjection needs bounded actions, {env.name} has none")
        elif not isinstance(actions, spaces.Discrete):
            raise ValueError(f"RandomProjection cannot project the actions of {env.name}")

    def reset_env(self, key: jax.Array, params: Any) -> tuple[jax.Array, ProjectionState]:
        """New projections and a fresh episode: observation float32 (O',) and state."""
        key_env, key_observations, key_actions = prng.split(key, 3)
        (size,) = self.env.observation_space(params).shape  # O
        orthogonal = random_orthogonal(key_observations, self.observation_size, size)
        M_o = self._gain(size) * orthogonal
        A = self.num_actions
        discrete = isinstance(self.env.action_space(params), spaces.Discrete)
        if not self.project_actions:
            M_a = jnp.arange(A, dtype=jnp.int32) if discrete else jnp.eye(A, dtype=jnp.float32)
        elif discrete:
            M_a = jnp.argsort(prng.bits(key_actions, A)).astype(jnp.int32)
        else:
            M_a = math.sqrt(A) * random_orthogonal(key_actions, A, A)
        obs, env_state = self.env.reset_env(key_env, params)
        return self._begin(obs, env_state, M_o, M_a)

    def _gain(self, size: int) -> float:
        """g, for `size` = O features of `env`."""
        return math.sqrt(max(1.0, self.observation_size / size))

    def restart(
        self, key: jax.Array, state: ProjectionState, params: Any
    ) -> tuple[jax.Array, ProjectionState]:
        """A fresh episode under the projections of `state`: observation (O',) and state."""
        obs, env_state = restart(self.env, key, state.env_state, params)
        return self._begin(obs, env_state, state.M_o, state.M_a)

    def _begin(
        self, obs: jax.Array, env_state: Any, M_o: jax.Array, M_a: jax.Array
    ) -> tuple[jax.Array, ProjectionState]:
        """A fresh episode under these projections: observation (O',) and state."""
        state = ProjectionState(
            time=jnp.zeros((), jnp.int32),
            env_state=env_state,
            M_o=M_o,
            M_a=M_a,
        )
        return project(M_o, obs), state

    def step_env(
        self, key: jax.Array, state: ProjectionState, action: Any, params: Any
    ) -> tuple[jax.Array, ProjectionState, jax.Array, jax.Array, dict[Any, Any]]:
        """A step of `env`: observation (O',), state, reward, terminated, info."""
        task_action = self.task_action(state, action, params)
        stepped = self.env.step_env(key, state.env_state, task_action, params)
        obs, env_state, reward, terminated, info = stepped
        state = state.replace(time=state.time + 1, env_state=env_state)
        return project(state.M_o, obs), state, reward, terminated, info

    def task_action(self, state: ProjectionState, action: Any, params: Any) -> jax.Array:
        """The action of `env` that the agent's `action` stands for."""
        space = self.env.action_space(params)
        if isinstance(space, spaces.Discrete):
            return state.M_a[action]
        low = jnp.broadcast_to(jnp.asarray(space.low, jnp.float32), space.shape)
        high = jnp.broadcast_to(jnp.asarray(space.high, jnp.float32), space.shape)
        centre = (low + high) / 2
        half = (high - low) / 2
        agent_action = jnp.asarray(action, jnp.float32).reshape(space.shape)
        scaled = (agent_action - centre) / half
        projected = jnp.clip(project(state.M_a, scaled.ravel()), -1.0, 1.0)
        return centre + half * projected.reshape(space.shape)

    def observe(
        self, key: jax.Array, state: ProjectionState, action: Any | None, params: Any
    ) -> jax.Array:
        """Observation float32 (O',) where `env` can tell its own from a state."""
        obs = self.env.observe(key, state.env_state, action, params)
        return project(state.M_o, obs)

    def inner_state(self, state: ProjectionState) -> Any:
        return state.env_state

    def render_action(self, state: ProjectionState, action: Any, params: Any) -> str:
        """The action of `env` that this one stands for, in words."""
        task_action = self.task_action(state, action, params)
        return super().render_action(state, np.asarray(task_action), params)

    def is_terminated(self, state: ProjectionState, params: Any) -> jax.Array:
        return self.env.is_terminated(state.env_state, params)

    def is_truncated(self, state: ProjectionState, params: Any) -> jax.Array:
        return self.env.is_truncated(state.env_state, params)

    def observation_space(self, params: Any) -> spaces.Box:
        """No feature exceeds g times the longest observation, as no row of M_o is longer than g."""
        seen = self.env.observation_space(params)
        largest = np.maximum(np.abs(seen.low), np.abs(seen.high)) * np.ones(seen.shape)
        longest = np.sqrt(np.sum(largest**2))
        with np.errstate(over="ignore"):  # gymnax writes the largest float32 for "no bound"
            bound = np.float32(self._gain(seen.shape[0]) * longest)
        return spaces.Box(-bound, bound, (self.observation_size,))


def project(M: jax.Array, x: jax.Array) -> jax.Array:
    """M x for M (N, O) and x (O,), as a sum, which XLA fuses with what is around it."""
    return jnp.sum(M * x, axis=-1)


def random_orthogonal(key: jax.Array, rows: int, columns: int) -> jax.Array:
    """A uniform matrix with orthonormal columns, or rows if they are fewer, float32 (N, O).

    QR of a Gaussian matrix; the signs make R's diagonal positive, without which Q
    is not uniformly distributed.
    """
    long = max(rows, columns)
    short = min(rows, columns)
    gaussian = prng.normal(prng.bits(key, rows * columns)).reshape(long, short)
    q, r = jnp.linalg.qr(gaussian)
    sign = jnp.where(jnp.diagonal(r) < 0, jnp.float32(-1.0), jnp.float32(1.0))
    q = q * sign
    return q if rows >= columns else q.T
