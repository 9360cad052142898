"""A point mass in the plane that is to come to rest in the middle."""

import math

import jax
import jax.numpy as jnp

from control_jax.closed_form import plane_equations
from control_jax.engine import Physics, at_rest
from control_jax.environment import Environment, uniform_positions
from control_jax.rewards import small_control, tolerance

TARGET_RADIUS = 0.015


class PointMass(Environment):
    """Drive a mass to the middle (dm_control's point_mass, easy).

    Hidden: the directions of the two actuators, a row each, float32 (4,).
    Observation: x, y, both velocities, float32 (4,).
    Action: forces along the two directions, (2,), full scale 0.1 N.
    Reward: near the target * small control; 1 within 1.5 cm at rest, 0.1 times that at 3 cm.
    Control step: 20 ms, one Euler step.
    """

    # no ctrlrange: the clipped action times the directions may exceed it
    model_xml = """
    <mujoco>
      <option timestep="0.02"><flag contact="disable"/></option>
      <default>
        <joint type="slide" limited="true" range="-.29 .29" damping="1"/>
        <motor gear=".1"/>
      </default>
      <worldbody>
        <body pos="0 0 .01">
          <joint name="x" axis="1 0 0"/>
          <joint name="y" axis="0 1 0"/>
          <geom type="sphere" size=".01" mass=".3"/>
        </body>
      </worldbody>
      <actuator><motor joint="x"/><motor joint="y"/></actuator>
    </mujoco>"""
    equations = staticmethod(plane_equations)
    observation_size = 4

    def directions(self, key: jax.Array) -> jax.Array:
        """Where the actuators push, a row each, float32 (2, 2)."""
        return jnp.eye(2, dtype=jnp.float32)

    def start(self, key: jax.Array) -> tuple[Physics, jax.Array]:
        """Anywhere in the square, at rest."""
        position_key, direction_key = jax.random.split(key)
        physics = at_rest(self.model, uniform_positions(self.model, position_key))
        return physics, self.directions(direction_key).reshape(4)

    def control(self, hidden: jax.Array, action: jax.Array) -> jax.Array:
        return action @ hidden.reshape(2, 2)

    def see(self, physics: Physics, hidden: jax.Array) -> jax.Array:
        return jnp.concatenate([physics.position, physics.velocity])

    def reward(self, physics: Physics, hidden: jax.Array, action: jax.Array) -> jax.Array:
        distance = jnp.linalg.norm(physics.position)
        near = tolerance(distance, TARGET_RADIUS, margin=TARGET_RADIUS)
        return near * small_control(action)


class PointMassHard(PointMass):
    """PointMass whose actuators push into random directions (dm_control's point_mass, hard).

    They are drawn anew in each episode, uniform on the circle; the second one is drawn again while
    the cosine between them is above 0.9 in size.
    """

    def directions(self, key: jax.Array) -> jax.Array:
        # Rejecting near-parallel pairs leaves the angle between them uniform over the two arcs that
        # remain.
        turn, between, side = jax.random.uniform(key, (3,), jnp.float32)
        least = math.acos(0.9)
        between = least + (math.pi - 2.0 * least) * between + math.pi * (side < 0.5)
        angle = 2.0 * math.pi * turn + jnp.array([0.0, 1.0], jnp.float32) * between
        return jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=1)
