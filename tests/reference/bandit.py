"""Bridge of MultiarmedBandit: the arms cross at the reset; a draw is the number that decides whether an arm pays."""

from __future__ import annotations

import copy
from typing import Any

import jax
import numpy as np

from tests.reference import Bridge, Scripted


class Remembering:
    """A numpy generator that keeps the number that decided about the last payout.

    It is drawn in float64 and compared with a float32 probability, for which numpy rounds it to float32.
    """

    def __init__(self, generator: np.random.Generator):
        self.generator, self.payout = generator, 0.0

    def random(self, size=None, dtype=np.float64):
        drawn = self.generator.random(size, dtype)
        if size is None:
            self.payout = drawn
        return drawn

    def __getattr__(self, name: str):
        return getattr(self.generator, name)


def best_arm(reference: Any) -> int:
    return int(np.argmax(reference.bandits))


class MultiarmedBandit(Bridge):
    policies = (None, None, best_arm)
    draw_like = np.zeros((), np.float32)

    def prepare(self, reference: Any, rng: np.random.Generator) -> None:
        reference.np_random = Remembering(rng)

    def draw(self, reference: Any, time: int) -> np.ndarray:
        return self.draw_like if time == 0 else np.float32(reference.np_random.payout)

    def hidden(self, reference: Any) -> dict[str, np.ndarray]:
        return {"probabilities": reference.bandits}

    def inject(self, env: Any) -> Any:
        env = copy.copy(env)
        env.sample_payout = lambda key: key
        return env

    def start(self, env: Any, params: Any, draw: Any, hidden: dict[str, Any]) -> tuple[Any, Any]:
        obs, state = env.reset_env(jax.random.key(0), params)
        return obs, state.replace(**hidden)

    def our_draw(self, env: Any, key: Any, state: Any, params: Any) -> Any:
        return env.sample_payout(key)  # not used for the reset

    def insert(self, reference: Any, state: Any, draws: np.ndarray) -> Any:
        payouts = iter(draws[1:].tolist())

        def random(size=None, dtype=None):
            return next(payouts) if size is None else np.asarray(state.probabilities)

        reference.np_random = Scripted(random=random)
        return reference.reset()[0]


BRIDGES = {"MultiarmedBandit": MultiarmedBandit()}
