"""DeepMind's shape of a reward: 1 where a number is within bounds, less outside."""

import math

import jax
import jax.numpy as jnp


def tolerance(x: jax.Array, high: float, margin: float) -> jax.Array:
    """1 where 0 <= x <= high; outside a bell that is 0.1 at a distance of `margin`.

    x: any shape, float32
    """
    outside = jnp.maximum(x - high, 0.0) + jnp.maximum(-x, 0.0)
    scale = math.sqrt(-2.0 * math.log(0.1)) / margin
    return jnp.exp(-0.5 * (outside * scale) ** 2)


def small_control(action: jax.Array) -> jax.Array:
    """1 without control, 4/5 at full control: (4 + mean(1 - action^2)) / 5 for actions (A,)."""
    return (4.0 + (1.0 - action**2).mean()) / 5.0
