"""gymnax's own environments: CartPole-v1 as it is, and without its velocities.

python ppo_s5_popgym.py --env examples.gymnax_cartpole:cartpole
python ppo_s5_popgym.py --env examples.gymnax_cartpole:without_velocities
"""

from __future__ import annotations

from typing import Any

import gymnax
import jax.numpy as jnp
from gymnax.environments import spaces
from gymnax.environments.classic_control.cartpole import CartPole
from jax import Array

POSITIONS = (0, 2)  # of cart and pole; 1 and 3 are their velocities


def cartpole() -> tuple[Any, Any]:
    return gymnax.make("CartPole-v1")


class CartPoleWithoutVelocities(CartPole):
    """The observation is cart position and pole angle, (2,)."""

    @property
    def name(self) -> str:
        return "CartPoleWithoutVelocities"

    def observation_space(self, params: Any) -> spaces.Box:
        seen = super().observation_space(params)
        low = jnp.asarray(seen.low)[jnp.array(POSITIONS)]
        high = jnp.asarray(seen.high)[jnp.array(POSITIONS)]
        return spaces.Box(low, high, (2,), jnp.float32)

    def get_obs(self, state: Any, params: Any = None, key: Any = None) -> Array:
        return super().get_obs(state, params, key)[jnp.array(POSITIONS)]


def without_velocities() -> tuple[Any, Any]:
    env = CartPoleWithoutVelocities()
    return env, env.default_params
