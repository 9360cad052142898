"""A two-link arm in the plane that reaches for a target."""

import jax
import jax.numpy as jnp

from control_jax.closed_form import arm_equations
from control_jax.engine import Physics, at_rest
from control_jax.environment import Environment, uniform_positions

UPPER_ARM = 0.12  # m, shoulder to wrist
FOREARM = 0.12  # m, wrist to the finger's centre
FINGER_RADIUS = 0.01


class ReacherEasy(Environment):
    """Bring the finger into a target of 5 cm radius (dm_control's reacher, easy).

    Hidden: the target's place, x and y, m.
    Observation: angles of shoulder and wrist, vector from finger to target (2,), both velocities,
        float32 (6,).
    Action: torques of shoulder and wrist, (2,), full scale 0.05 N m.
    Reward: 1 while finger and target touch, else 0.
    Control step: 20 ms, one Euler step.
    """

    model_xml = """
    <mujoco>
      <option timestep="0.02"><flag contact="disable"/></option>
      <default>
        <joint type="hinge" axis="0 0 1" damping="0.01"/>
        <motor gear=".05" ctrllimited="true" ctrlrange="-1 1"/>
      </default>
      <worldbody>
        <body name="arm" pos="0 0 .01">
          <joint name="shoulder"/>
          <geom type="capsule" fromto="0 0 0 0.12 0 0" size=".01"/>
          <body name="hand" pos=".12 0 0">
            <joint name="wrist" limited="true" range="-160 160"/>
            <geom type="capsule" fromto="0 0 0 0.1 0 0" size=".01"/>
            <body name="finger" pos=".12 0 0"><geom type="sphere" size=".01"/></body>
          </body>
        </body>
      </worldbody>
      <actuator><motor joint="shoulder"/><motor joint="wrist"/></actuator>
    </mujoco>"""
    equations = staticmethod(arm_equations)
    observation_size = 6
    target_radius = 0.05

    def start(self, key: jax.Array) -> tuple[Physics, jax.Array]:
        """Any posture at rest; a target 5 to 20 cm from the shoulder."""
        position_key, angle_key, radius_key = jax.random.split(key, 3)
        angle = jax.random.uniform(angle_key, (), jnp.float32, 0.0, 2.0 * jnp.pi)
        radius = jax.random.uniform(radius_key, (), jnp.float32, 0.05, 0.20)
        target = radius * jnp.stack([jnp.sin(angle), jnp.cos(angle)])
        return at_rest(self.model, uniform_positions(self.model, position_key)), target

    def to_target(self, physics: Physics, target: jax.Array) -> jax.Array:
        """Vector from the finger to the target, (2,), m."""
        shoulder, wrist = physics.position
        forearm = shoulder + wrist
        finger_x = UPPER_ARM * jnp.cos(shoulder) + FOREARM * jnp.cos(forearm)
        finger_y = UPPER_ARM * jnp.sin(shoulder) + FOREARM * jnp.sin(forearm)
        return target - jnp.stack([finger_x, finger_y])

    def see(self, physics: Physics, hidden: jax.Array) -> jax.Array:
        to_target = self.to_target(physics, hidden)
        return jnp.concatenate([physics.position, to_target, physics.velocity])

    def reward(self, physics: Physics, hidden: jax.Array, action: jax.Array) -> jax.Array:
        distance = jnp.linalg.norm(self.to_target(physics, hidden))
        return (distance <= self.target_radius + FINGER_RADIUS).astype(jnp.float32)


class ReacherHard(ReacherEasy):
    """As ReacherEasy with a target of 1.5 cm radius (dm_control's reacher, hard)."""

    target_radius = 0.015
