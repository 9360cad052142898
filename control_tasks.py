"""The suites of muesli_s5_metarl.py: tasks of MuJoCo Playground, Brax and gymnax as functions of one environment.

None of the packages' own wrappers is around them: no time limit, and no auto-reset, which in Playground and Brax
returns to one cached state. A package is imported when its first task is made, as that takes seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial, wraps
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import s5_common as common

SUITES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # tasks to train on, tasks held out
    "dmc": (
        ("BallInCup", "CartpoleSwingup", "FingerSpin", "FingerTurnHard", "PointMass", "ReacherEasy"),
        ("CartpoleBalance", "FingerTurnEasy", "PendulumSwingup", "PointMassHard", "ReacherHard"),
    ),
    "brax": (("inverted_pendulum", "reacher", "hopper"), ("inverted_double_pendulum",)),
    "gymnax": (("Pendulum-v1",), ("MountainCarContinuous-v0",)),
}


class Task(NamedTuple):
    """A control task as two functions of one environment; actions lie between low and high."""

    name: str
    obs_size: int
    action_size: int
    low: float
    high: float
    ends: bool  # may terminate before the meta-episode is over
    reset: Callable  # key -> obs, state
    step: Callable  # key, state, action -> obs, state, reward, terminated


def point_mass_hard() -> Any:
    """PointMass whose two actuators push into random directions, drawn anew in each episode, as dm_control defines it:
    uniform on the circle, the second one drawn again while the cosine between them is above 0.9 in size.
    """
    import mujoco
    from mujoco import mjx
    from mujoco_playground._src.dm_control_suite.point_mass import PointMass

    class PointMassHard(PointMass):
        def __init__(self):
            super().__init__(config_overrides={"impl": "jax"})
            # the action is clipped already; a mixture of its parts may exceed the range of Playground's actuators
            self.mj_model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_CLAMPCTRL
            self._mjx_model = mjx.put_model(self.mj_model, impl="jax")

        def reset(self, rng):
            own_key, turn_key = jax.random.split(rng)  # PointMass.reset splits its key too, so it gets one of its own
            state = super().reset(own_key)
            turn = jax.random.uniform(turn_key, (3,), jnp.float32)
            # rejecting near-parallel pairs leaves the angle between them uniform over the two arcs that remain
            between = math.acos(0.9) + (math.pi - 2 * math.acos(0.9)) * turn[1] + math.pi * (turn[2] < 0.5)
            angle = 2 * math.pi * turn[0] + jnp.array([0.0, 1.0], jnp.float32) * between
            state.info["directions"] = jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=1)  # a row for each actuator
            return state

        def step(self, state, action):
            after = super().step(state, action @ state.info["directions"])
            return after.replace(reward=self._get_reward(after.data, action, after.info, after.metrics))

    return PointMassHard()


def environments(args: Any) -> dict[str, Callable]:
    """What makes each environment of --suite, by name."""
    if args.suite == "gymnax":
        import gymnax

        return {name: partial(gymnax.make, name) for name in ("Pendulum-v1", "MountainCarContinuous-v0")}
    if args.suite == "brax":
        from brax import envs

        names = [name for name in envs._envs if name != "swimmer"]  # swimmer fails under this version of jax
        return {name: partial(envs.get_environment, name, backend=args.brax_backend) for name in names}
    from mujoco_playground import dm_control_suite

    load = partial(dm_control_suite.load, config_overrides={"impl": "jax"})  # by default it is Warp, which needs a GPU
    found = {name: partial(load, name) for name in dm_control_suite.ALL_ENVS}
    return found | {"PointMassHard": point_mass_hard}


def task_maker(args: Any, name: str, flag: str) -> Callable:
    """What makes the task of --suite that --FLAG names. Raises UsageError."""
    makers = environments(args)
    if name not in makers:
        why = "fails under this version of jax" if (args.suite, name) == ("brax", "swimmer") else "unknown"
        raise common.UsageError(f"--{flag} {name}: {why}; must be of {', '.join(makers)}")
    return makers[name]


def in_32_bits(function: Callable) -> Callable:
    """A reset or step whose numbers are 32 bits wide. The simulators do not declare their types: JAX_ENABLE_X64 would
    make some of them 64 bits wide, and the states that a loop carries would change their types within it."""

    @wraps(function)
    def call(*arguments):
        with jax.enable_x64(False):
            return jax.tree.map(jnp.asarray, function(*arguments))

    return call


def make_task(args: Any, name: str, flag: str) -> Task:
    """The task of --suite that --FLAG names, without the wrappers of its package. Raises UsageError."""
    maker = task_maker(args, name, flag)
    with jax.enable_x64(False):  # as in in_32_bits
        made = maker()
    if args.suite == "gymnax":
        env, params = made
        actions, features = env.action_space(params), env.observation_space(params).shape[0]

        def reset_gymnax(key):
            return env.reset_env(key, params)

        def step_gymnax(key, state, action):
            obs, state, reward, terminated, _ = env.step_env(key, state, action, params)
            return obs, state, jnp.squeeze(reward).astype(jnp.float32), jnp.squeeze(terminated)

        return Task(
            name=name,
            obs_size=features,
            action_size=math.prod(actions.shape),
            low=float(np.min(actions.low)),
            high=float(np.max(actions.high)),
            ends=name != "Pendulum-v1",
            reset=in_32_bits(reset_gymnax),
            step=in_32_bits(step_gymnax),
        )

    def reset(key):
        state = made.reset(key)
        return state.obs, state

    def step(key, state, action):
        after = made.step(state, action)
        if args.suite == "brax":
            return after.obs, after, after.reward, after.done > 0
        failed = after.done > 0  # DeepMind Control tasks never end; done says that the simulation is not finite
        after = jax.tree.map(partial(jnp.where, failed), state, after)  # such a step is not taken
        return after.obs, after, jnp.where(failed, 0.0, after.reward), jnp.zeros((), bool)

    return Task(
        name=name,
        obs_size=made.observation_size,
        action_size=made.action_size,
        low=-1.0,
        high=1.0,
        ends=args.suite == "brax",
        reset=in_32_bits(reset),
        step=in_32_bits(step),
    )
