"""The environments for programs without JAX code, in gymnasium's terms: numpy in, numpy out.

All randomness comes from the seed of `reset`, 0 to 2^64 - 1, each of which begins other episodes:
environment i of a vector that is reset with `seed` plays what a single environment reset with
`seed + i` plays. The next episode is drawn together with the last step of one, as in
`Environment.step`; a `reset` without a seed then shows it.

Importing this module registers every environment with gymnasium, as "popgym_jax/<name>-v0".

Programs are compiled once for each environment and each number of copies in a process, however many
objects share them. They run on JAX's default device; in a program whose networks run in another
framework, JAX_PLATFORMS=cpu keeps JAX from reserving the memory of the accelerator.

JAX does not survive a fork. gymnasium.vector.AsyncVectorEnv needs context="spawn" (and functions
that can be pickled, as functools.partial(to_gymnasium, name)); `to_gymnasium_vector` needs no
processes at all.
"""

import copy
import functools
import os
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from gymnax.environments.spaces import gymnax_space_to_gym_space

from popgym_jax import prng, registration
from popgym_jax.environment import IMPORTED_IN, Environment

NUM_SEEDS = 2**64  # as many as a key has values


class Play(NamedTuple):
    """Where a game stands between two calls.

    key: random bits left, uint32 (2,)
    obs: observation of `state`, (O,)
    state: of the JAX environment, after the end of an episode that of the next one
    """

    key: jax.Array
    obs: jax.Array
    state: Any


class Step(NamedTuple):
    """What one step gave; obs (O,) is the last one of the old episode where one ended."""

    obs: jax.Array
    reward: jax.Array
    terminated: jax.Array
    truncated: jax.Array
    info: dict[str, jax.Array]


def to_gymnasium(env: str | Environment) -> gymnasium.Env:
    """A gymnasium.Env without auto-reset, of a name that `make` accepts or of an environment.

    >>> to_gymnasium(PreviousActionAndStart(make("RepeatHard")[0]))

    In a forked process, as those of AsyncVectorEnv without context="spawn", its `reset` and `step`
    raise RuntimeError.
    """
    return GymnasiumView(env)


def to_gymnasium_vector(
    env: str | Environment,
    num_envs: int,
    autoreset_mode: str | AutoresetMode = AutoresetMode.NEXT_STEP,
) -> gymnasium.vector.VectorEnv:
    """A gymnasium.vector.VectorEnv of `num_envs` copies, in one JAX program.

    env: a name that `make` accepts, or an environment
    autoreset_mode: as in gymnasium.vector.SyncVectorEnv; "NextStep", "SameStep" or "Disabled"

    gymnasium's vector.RecordEpisodeStatistics (1.3) leaves out the first reward of later episodes
    in "SameStep" mode, whatever the environment; take EpisodeStatistics there.
    """
    return GymnasiumVectorView(env, num_envs, autoreset_mode)


class GymnasiumView(gymnasium.Env[np.ndarray, Any]):
    """One environment; observation float32 (O,), reward float.

    An action is an index, or an array for a continuous one. After the end of an episode `step`
    raises gymnasium.error.ResetNeeded until the next `reset`.
    """

    def __init__(self, env: str | Environment):
        self.jax_env = _environment(env)
        self.observation_space, self.action_space = _spaces(self.jax_env)
        self.metadata = {"render_modes": []}  # its own: SyncVectorEnv writes into it
        if isinstance(env, str):
            self.spec = _spec(self.jax_env.name)
        self._play: Any = None  # a Play, once there was a reset
        self._ended = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """First observation (O,) and an empty info; `options` are ignored."""
        _refuse_in_a_fork()
        if seed is not None:
            seed = _checked_seed(seed)
        super().reset(seed=seed)
        if self._play is None and seed is None:
            seed = int(self.np_random.integers(2**63))
        if seed is not None:
            self._play = _start_one(self.jax_env, _words(seed))
        elif not self._ended:
            self._play = _start_one(self.jax_env, self._play.key)
        self._ended = False
        return np.array(self._play.obs), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Observation (O,), reward, terminated, truncated and what wrappers add to info."""
        _refuse_in_a_fork()
        if self._play is None or self._ended:
            raise ResetNeeded("call reset() before step(): no episode is running")
        action = _checked(action, self.action_space, ())
        self._play, step = _step_one(self.jax_env, self._play, action)
        step = jax.device_get(step)
        terminated = bool(step.terminated)
        truncated = bool(step.truncated)
        self._ended = terminated or truncated
        info = {name: _plain(value) for name, value in step.info.items()}
        return np.array(step.obs), float(step.reward), terminated, truncated, info

    def __deepcopy__(self, memo: dict[int, Any]) -> "GymnasiumView":
        return _deepcopy(self, memo)


class GymnasiumVectorView(gymnasium.vector.VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """B environments; observation float32 (B, O), reward float64 (B,), flags bool (B,).

    Does what gymnasium.vector.SyncVectorEnv does with the single views, in all three auto-reset
    modes, `options={"reset_mask": mask}` and `final_obs` and `final_info` included.
    """

    def __init__(
        self,
        env: str | Environment,
        num_envs: int,
        autoreset_mode: str | AutoresetMode = AutoresetMode.NEXT_STEP,
    ):
        if num_envs < 1:
            raise ValueError(f"num_envs must be at least 1, got {num_envs}")
        self.jax_env = _environment(env)
        self.num_envs = num_envs
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.metadata = {"render_modes": [], "autoreset_mode": self.autoreset_mode}
        self.single_observation_space, self.single_action_space = _spaces(self.jax_env)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._play: Any = None  # a Play of B rows, once there was a reset
        self._ended = np.zeros(num_envs, bool)
        self._obs = np.zeros(self.observation_space.shape or (), np.float32)

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Observations (B, O) and an empty info.

        seed: of the first environment, seed + i of the i-th; or a list, one for each
        options: {"reset_mask": bool (B,)} resets some only; the others show what they last showed
        """
        _refuse_in_a_fork()
        seeds = self._seeds(seed)
        mask = self._mask(options)
        is_one = isinstance(seed, (int, np.integer))
        super().reset(seed=seeds[0] if is_one else None)
        if self._play is None:
            drawn = self.np_random.integers(2**63, size=self.num_envs).tolist()
            pairs = zip(seeds, drawn, strict=True)
            seeds = [new if own is None else own for own, new in pairs]
        seeded = mask & np.array([one is not None for one in seeds])
        words = np.array([_words(one or 0) for one in seeds])
        restarted = seeded | (mask & ~self._ended)
        if restarted.any():
            self._play = _start_some(self.jax_env, self._play, words, seeded, restarted)
        self._ended = self._ended & ~mask
        self._obs = np.where(mask[:, None], self._play.obs, self._obs)
        return self._obs.copy(), {}

    def step(
        self, actions: Any
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Observations (B, O), rewards, terminated, truncated (B,) and infos.

        actions: int (B,) or float32 (B, A). In NEXT_STEP mode an environment whose episode has
        ended ignores its action and begins the next one: reward 0, both flags False.
        """
        _refuse_in_a_fork()
        if self._play is None:
            raise ResetNeeded("call reset() before step(): no episode is running")
        if self.autoreset_mode == AutoresetMode.DISABLED and self._ended.any():
            ended = np.flatnonzero(self._ended).tolist()
            raise ResetNeeded(f"call reset() before step(): no episode is running in {ended}")
        actions = _checked(actions, self.single_action_space, (self.num_envs,))
        waiting = self._ended if self.autoreset_mode == AutoresetMode.NEXT_STEP else None
        self._play, step = _step_all(self.jax_env, self._play, actions, waiting)
        step = jax.device_get(step)
        ended = step.terminated | step.truncated

        infos: dict[str, Any] = {}
        if self.autoreset_mode == AutoresetMode.SAME_STEP:
            if ended.any():
                infos = _final_infos(step.obs, step.info, ended)
            infos |= _batch_info(step.info, ~ended)
            self._obs = np.asarray(self._play.obs)
        else:
            stepped = np.ones(self.num_envs, bool) if waiting is None else ~waiting
            infos = _batch_info(step.info, stepped)
            self._obs = step.obs
            self._ended = ended

        reward = step.reward.astype(np.float64)
        terminated = step.terminated.copy()
        truncated = step.truncated.copy()
        return self._obs.copy(), reward, terminated, truncated, infos

    def _seeds(self, seed: Any) -> list[int | None]:
        """The seed of each environment; None where it goes on with the random bits that it has."""
        if seed is None:
            return [None] * self.num_envs
        if not hasattr(seed, "__len__"):
            first = _checked_seed(seed)
            if first + self.num_envs > NUM_SEEDS:
                count = self.num_envs
                raise ValueError(
                    f"seed of {count} environments must be at most 2**64 - {count}, got {seed}"
                )
            return [first + i for i in range(self.num_envs)]
        if len(seed) != self.num_envs:
            raise ValueError(f"seed must be one or {self.num_envs}, got {len(seed)}")
        return [None if one is None else _checked_seed(one) for one in seed]

    def _mask(self, options: dict[str, Any] | None) -> np.ndarray:
        """Which environments to reset, bool (B,)."""
        everywhere = np.ones(self.num_envs, bool)
        mask = np.asarray((options or {}).get("reset_mask", everywhere))
        if mask.dtype != bool or mask.shape != (self.num_envs,) or not mask.any():
            raise ValueError(
                f"reset_mask must be bool ({self.num_envs},) with at least one True, "
                f"got {mask.dtype} {mask.shape}"
            )
        if self._play is None and not mask.all():
            raise ResetNeeded("the first reset() must be one of all environments")
        return mask

    def __deepcopy__(self, memo: dict[int, Any]) -> "GymnasiumVectorView":
        return _deepcopy(self, memo)


# ---------------------------------------------------------------- programs


def _start(env: Environment, words: jax.Array) -> Play:
    """A fresh episode from random bits, uint32 (2,)."""
    key, key_reset = _split(words)
    obs, state = env.reset(key_reset)
    return Play(key=jax.random.key_data(key), obs=obs, state=state)


def _step(env: Environment, play: Play, action: jax.Array) -> tuple[Play, Step]:
    """One step; a finished episode is followed by the next one in the Play, not in the Step."""
    key, key_step = _split(play.key)
    obs, state, reward, terminated, truncated, info = env.step(key_step, play.state, action)
    fields = ("terminated", "truncated", "final_observation")
    step = Step(
        obs=info["final_observation"],
        reward=reward,
        terminated=terminated,
        truncated=truncated,
        info={name: value for name, value in info.items() if name not in fields},
    )
    play = Play(key=jax.random.key_data(key), obs=obs, state=state)
    return play, step


def _split(words: jax.Array) -> jax.Array:
    """Two typed keys, whichever generator JAX is configured for."""
    return prng.split(jax.random.wrap_key_data(words, impl="threefry2x32"), 2)


_start_one = jax.jit(_start, static_argnames="env")
_step_one = jax.jit(_step, static_argnames="env")


@partial(jax.jit, static_argnames="env")
def _start_some(
    env: Environment, play: Play | None, words: Any, seeded: Any, restarted: Any
) -> Play:
    """Fresh episodes where `restarted`, from `words` where `seeded`; bool (B,), uint32 (B, 2)."""
    if play is None:
        return jax.vmap(partial(_start, env))(words)
    keys = jnp.where(seeded[:, None], words, play.key)
    return _where(restarted, jax.vmap(partial(_start, env))(keys), play)


@partial(jax.jit, static_argnames="env")
def _step_all(env: Environment, play: Play, actions: Any, waiting: Any) -> tuple[Play, Step]:
    """One step of B environments; those `waiting`, bool (B,), only show how they begin."""
    after, step = jax.vmap(partial(_step, env))(play, actions)
    if waiting is None:
        return after, step
    begins = jax.tree.map(jnp.zeros_like, step)._replace(obs=play.obs)
    return _where(waiting, play, after), _where(waiting, begins, step)


def _where(mask: Any, yes: Any, no: Any) -> Any:
    """Row by row; mask (B,), leaves (B, ...)."""

    def choose(x, y):
        rows = mask.reshape(-1, *[1] * (x.ndim - 1))  # (B, 1, ..)
        return jnp.where(rows, x, y)

    return jax.tree.map(choose, yes, no)


# ---------------------------------------------------------------- between the two worlds


def _environment(env: str | Environment) -> Environment:
    """The environment, if need be by its name."""
    if isinstance(env, str):
        return _named_environment(registration.canonical_name(env))
    return env


@functools.cache
def _named_environment(name: str) -> Environment:
    """One object for each name, because programs are compiled for each object."""
    return registration.make(name)[0]


def _spaces(env: Environment) -> tuple[Any, Any]:
    """gymnasium's observation and action space."""
    params = env.default_params
    observation_space = gymnax_space_to_gym_space(env.observation_space(params))
    action_space = gymnax_space_to_gym_space(env.action_space(params))
    return observation_space, action_space


def _spec(name: str) -> gymnasium.envs.registration.EnvSpec:
    """Lets gymnasium.make and make_vec build another one."""
    return gymnasium.envs.registration.EnvSpec(
        id=f"popgym_jax/{name}-v0",
        entry_point=f"{__name__}:to_gymnasium",
        vector_entry_point=f"{__name__}:to_gymnasium_vector",
        kwargs={"env": name},
    )


def _register() -> None:
    """Tell gymnasium of all environments, unless it knows of them already."""
    for name in registration.registered_envs + registration.meta_envs:
        spec = _spec(name)
        if spec.id not in gymnasium.registry:
            gymnasium.register(
                id=spec.id,
                entry_point=spec.entry_point,
                vector_entry_point=spec.vector_entry_point,
                kwargs=spec.kwargs,
            )


def _refuse_in_a_fork() -> None:
    """RuntimeError in a forked process, where a call of JAX would wait forever."""
    if os.getpid() != IMPORTED_IN:
        raise RuntimeError(
            "JAX cannot be used in a forked process: start processes with "
            'AsyncVectorEnv(..., context="spawn"), or use popgym_jax.to_gymnasium_vector, '
            "which needs none"
        )


def _checked_seed(seed: Any) -> int:
    """The seed; ValueError if it is no integer or has more than the 64 bits that a key holds."""
    if not isinstance(seed, (int, np.integer)) or not 0 <= seed < NUM_SEEDS:
        raise ValueError(f"seed must be an integer 0 to 2**64 - 1, got {seed}")
    return int(seed)


def _words(seed: int) -> np.ndarray:
    """The random bits that a seed stands for, all of them, uint32 (2,)."""
    return np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32)


def _checked(action: Any, space: Any, batch: tuple[int, ...]) -> np.ndarray:
    """A copy of the action or actions in the environment's type; ValueError if it is none of its.

    A torque beyond its bounds is allowed: the environments clip it.
    """
    shape = (*batch, *space.shape)
    action = np.array(action)
    if action.shape != shape:
        raise ValueError(f"action must have shape {shape}, got {action.shape}")
    if isinstance(space, gymnasium.spaces.Box):
        return action.astype(space.dtype)
    is_integer = np.issubdtype(action.dtype, np.integer)
    if not is_integer or (action < 0).any() or (action >= space.n).any():
        raise ValueError(f"action must be an integer 0 to {space.n - 1}, got {action}")
    return action.astype(np.int32)


def _plain(value: np.ndarray) -> Any:
    """A Python number or bool of an array (), another array as it is."""
    return value.item() if value.ndim == 0 else value.copy()


def _batch_info(info: dict[str, np.ndarray], mask: np.ndarray) -> dict[str, Any]:
    """The infos of the environments in `mask` as gymnasium batches them: `name` and `_name`."""
    batched: dict[str, Any] = {}
    if not mask.any():
        return batched
    for name, value in info.items():
        if value.ndim == 1:  # numbers, which single environments give as Python's
            value = value.astype(type(value[0].item()))
        rows = mask.reshape(-1, *[1] * (value.ndim - 1))  # (B, 1, ..)
        batched[name] = np.where(rows, value, np.zeros_like(value))
        batched[f"_{name}"] = mask.copy()
    return batched


def _final_infos(obs: np.ndarray, info: dict[str, np.ndarray], ended: np.ndarray) -> dict[str, Any]:
    """The last observations (B, O) and infos of the episodes that have `ended`, bool (B,)."""
    final_obs = np.full(len(ended), None, object)
    for i in np.flatnonzero(ended):
        final_obs[i] = obs[i].copy()
    return {
        "final_obs": final_obs,
        "final_info": _batch_info(info, ended),
        "_final_obs": ended.copy(),
        "_final_info": ended.copy(),
    }


def _deepcopy(view: Any, memo: dict[int, Any]) -> Any:
    """A copy in the same position; the JAX environment is shared, with its programs."""
    memo[id(view.jax_env)] = view.jax_env
    other = object.__new__(type(view))
    memo[id(view)] = other
    other.__dict__ = copy.deepcopy(view.__dict__, memo)
    return other


_register()
