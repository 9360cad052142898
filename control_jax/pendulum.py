"""A pendulum with a motor too weak to lift it at once."""

import math

import jax
import jax.numpy as jnp

from control_jax.closed_form import pendulum_equations
from control_jax.engine import Physics, at_rest
from control_jax.environment import Environment, nothing_hidden

NEAR_TOP = math.cos(math.radians(8.0))


class PendulumSwingup(Environment):
    """Swing a pendulum up and keep it up (dm_control's pendulum, swingup).

    Observation: cosine and sine of its angle, velocity, float32 (3,).
    Action: torque, (1,), full scale 1 N m.
    Reward: 1 within 8 degrees of the top, else 0.
    Control step: 20 ms, one Euler step.
    """

    model_xml = """
    <mujoco>
      <option timestep="0.02"><flag contact="disable"/></option>
      <worldbody>
        <body name="pole" pos="0 0 .6">
          <joint name="hinge" type="hinge" axis="0 1 0" damping="0.1"/>
          <geom type="sphere" pos="0 0 0.5" size="0.05" mass="1"/>
        </body>
      </worldbody>
      <actuator><motor joint="hinge" ctrllimited="true" ctrlrange="-1 1"/></actuator>
    </mujoco>"""
    equations = staticmethod(pendulum_equations)
    observation_size = 3

    def start(self, key: jax.Array) -> tuple[Physics, jax.Array]:
        """At rest at any angle of the circle."""
        angle = jax.random.uniform(key, (1,), jnp.float32, -jnp.pi, jnp.pi)
        return at_rest(self.model, angle), nothing_hidden()

    def see(self, physics: Physics, hidden: jax.Array) -> jax.Array:
        angle = physics.position
        return jnp.concatenate([jnp.cos(angle), jnp.sin(angle), physics.velocity])

    def reward(self, physics: Physics, hidden: jax.Array, action: jax.Array) -> jax.Array:
        return (jnp.cos(physics.position[0]) >= NEAR_TOP).astype(jnp.float32)
