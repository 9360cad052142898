"""Bridges of CartPole and Pendulum: float64 there, float32 here, so the state crosses before each step."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from tests.reference import Bridge, Scripted


class Physics(Bridge):
    """``physics`` is the whole state."""

    closed_loop = True

    def hidden(self, reference: Any) -> dict[str, np.ndarray]:
        return {"physics": np.asarray(reference.state, np.float32)}

    def insert(self, reference: Any, state: Any, draws: np.ndarray) -> Any:
        physics = np.asarray(state.physics, np.float64)
        noise = self.noise_answers(draws[0])
        reference.np_random = Scripted(uniform=lambda low, high, size=None: physics.copy(), **noise)
        return reference.reset()[0]

    def insert_step(self, reference: Any, state: Any, draw: np.ndarray) -> None:
        reference.state = np.asarray(state.physics, np.float64)
        reference.np_random = Scripted(**self.noise_answers(draw))

    def noise_answers(self, draw: np.ndarray) -> dict[str, Any]:
        return {}


class Noisy(Physics):
    """A draw is the noise on the two observed numbers."""

    draw_like = np.zeros(2, np.float32)

    def prepare(self, reference: Any, rng: np.random.Generator) -> None:
        reference.np_random = Remembering(rng)

    def draw(self, reference: Any, time: int) -> np.ndarray:
        return np.asarray(reference.np_random.noise, np.float32)

    def inject(self, env: Any) -> Any:
        env = copy.copy(env)
        env.sample_noise = lambda key, params: key
        return env

    def our_draw(self, env: Any, key: Any, state: Any, params: Any) -> Any:
        return env.sample_noise(env.reset_keys(key)[1] if state is None else key, params)

    def noise_answers(self, draw: np.ndarray) -> dict[str, Any]:
        return {"normal": lambda loc, scale, size=None: np.asarray(draw, np.float64)}


class Remembering:
    """A numpy generator that keeps the last noise that it drew."""

    def __init__(self, generator: np.random.Generator):
        self.generator, self.noise = generator, np.zeros(2)

    def normal(self, loc, scale, size=None):
        self.noise = self.generator.normal(loc, scale, size)
        return self.noise

    def __getattr__(self, name: str):
        return getattr(self.generator, name)


def balance(reference: Any) -> int:
    """A hand-made controller that keeps the pole up; it sees the full state."""
    x, x_dot, theta, theta_dot = reference.state
    return int(0.5 * x + x_dot + 10 * theta + 2 * theta_dot > 0)


class CartPole(Physics):
    obs_atol = 2e-6
    policies = (*[None] * 13, balance)  # few random episodes reach the time limit


class Pendulum(Physics):
    obs_atol = 1e-5  # the angle grows to 50 rad


class NoisyCartPole(Noisy):
    obs_atol = CartPole.obs_atol
    policies = CartPole.policies


class NoisyPendulum(Noisy):
    obs_atol = Pendulum.obs_atol


BRIDGES = {
    "PositionOnlyCartPole": CartPole(),
    "NoisyPositionOnlyCartPole": NoisyCartPole(),
    "VelocityOnlyCartPole": CartPole(),
    "PositionOnlyPendulum": Pendulum(),
    "NoisyPositionOnlyPendulum": NoisyPendulum(),
}
