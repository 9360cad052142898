"""Eleven tasks of the DeepMind Control Suite in JAX, equal to dm_control: `make(name)`."""

import difflib

from control_jax.ball_in_cup import BallInCup
from control_jax.cartpole import CartpoleBalance, CartpoleSwingup
from control_jax.engine import ENGINES
from control_jax.environment import Environment, EnvParams, EnvState
from control_jax.finger import FingerSpin, FingerTurnEasy, FingerTurnHard
from control_jax.pendulum import PendulumSwingup
from control_jax.point_mass import PointMass, PointMassHard
from control_jax.reacher import ReacherEasy, ReacherHard

TASKS: dict[str, type[Environment]] = {
    "BallInCup": BallInCup,
    "CartpoleBalance": CartpoleBalance,
    "CartpoleSwingup": CartpoleSwingup,
    "FingerSpin": FingerSpin,
    "FingerTurnEasy": FingerTurnEasy,
    "FingerTurnHard": FingerTurnHard,
    "PendulumSwingup": PendulumSwingup,
    "PointMass": PointMass,
    "PointMassHard": PointMassHard,
    "ReacherEasy": ReacherEasy,
    "ReacherHard": ReacherHard,
}
registered_envs: tuple[str, ...] = tuple(TASKS)


def make(name: str, engine: str = "auto") -> tuple[Environment, EnvParams]:
    """Environment and default parameters by name, like gymnax.make.

    name: one of registered_envs
    engine: one of ENGINES, or "auto": see Environment

    Raises ValueError for an unknown name or engine.
    """
    if name not in TASKS:
        nearest = difflib.get_close_matches(name, TASKS, n=3, cutoff=0.0)
        raise ValueError(f"unknown task {name!r}; nearest: {', '.join(nearest)}")
    env = TASKS[name](engine)
    return env, env.default_params


__all__ = ["ENGINES", "EnvParams", "EnvState", "Environment", "make", "registered_envs"]
