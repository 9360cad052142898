"""A finger of two links that turns a body on a hinge."""

import jax
import jax.numpy as jnp

from control_jax.engine import Physics, Solver, at_rest
from control_jax.environment import Environment, first_accepted, nothing_hidden, uniform_positions
from control_jax.geometry import segment_to_segment

# x and z, m
KNUCKLE = (-0.2, 0.4)
HINGE = (0.2, 0.4)
UPPER_LINK = 0.18  # knuckle to the second joint
UPPER_CAPSULE = 0.17  # length of its capsule
FINGERTIP = (0.13, 0.161)  # ends of the fingertip's capsule, from the second joint
FINGER_RADIUS = 0.03
SPINNER_HALF = 0.09  # half the length of the spinner's two capsules
SPINNER_OFFSETS = (-0.02, 0.02)  # to the sides of its axis
SPINNER_RADIUS = 0.04
TIP = 0.13  # hinge to the spinner's tip, and to the target
UPPER_ZERO = -jnp.pi / 2  # position at which the upper link hangs down
SPIN_VELOCITY = 15.0  # rad/s

MODEL = """
    <mujoco>
      <option timestep="0.01" cone="elliptic" iterations="200"><flag gravity="disable"/></option>
      <default>
        <geom solimp="0 0.9 0.01" solref=".02 1"/>
        <joint type="hinge" axis="0 -1 0"/>
        <motor ctrllimited="true" ctrlrange="-1 1"/>
        <default class="finger">
          <joint damping="2.5" limited="true" range="-110 110"/>
          <geom type="capsule" size=".03"/>
          <site type="ellipsoid" size=".025 .03 .025"/>
        </default>
        <default class="untouched"><geom type="cylinder" contype="0" conaffinity="0"/></default>
      </default>
      <worldbody>
        <geom type="plane" size=".6 .2 10"/>
        <body name="proximal" pos="-.2 0 .4" childclass="finger">
          <joint name="proximal" ref="-90"/>
          <geom class="untouched" fromto="0 -.033 0 0 .033 0" size=".034"/>
          <geom fromto="0 0 0 0 0 -.17"/>
          <body name="distal" pos="0 0 -.18">
            <joint name="distal"/>
            <geom fromto="0 0 0 0 0 -.16" size=".028" contype="0" conaffinity="0"/>
            <geom fromto="0 0 -.13 0 0 -.161"/>
            <site name="top" pos=".01 0 -.17"/>
            <site name="bottom" pos="-.01 0 -.17"/>
          </body>
        </body>
        <body name="spinner" pos=".2 0 .4">
          <joint name="hinge" frictionloss=".1" damping="{damping}"/>
          <geom type="capsule" size=".04 .09" pos=".02 0 0"/>
          <geom type="capsule" size=".04 .09" pos="-.02 0 0"/>
          <geom class="untouched" fromto="0 -.045 0 0 .045 0" size=".02"/>
        </body>
      </worldbody>
      <actuator><motor joint="proximal" gear="30"/><motor joint="distal" gear="15"/></actuator>
      <sensor><touch site="top"/><touch site="bottom"/></sensor>
    </mujoco>"""


class Finger(Environment):
    """What the three tasks share.

    The two cylinders of DeepMind's model that only show the joints can touch nothing that does not
    touch before, so they weigh and do not collide here.
    """

    model_xml = MODEL.format(damping=0.5)
    substeps = 2
    solver = Solver(iterations=8, line_search=8)

    def start_physics(self, key: jax.Array) -> Physics:
        """All three joints anywhere, at rest, the finger off the spinner."""

        def draw(key):
            return uniform_positions(self.model, key)

        position = first_accepted(draw, lambda position: ~touches_spinner(position), key)
        return at_rest(self.model, position)

    def see_spinner(self, physics: Physics) -> jax.Array:
        """Joints (2,), the spinner's tip from its hinge (2,), velocities (3,), touch (2,)."""
        joints = physics.position[:2]
        tip = tip_position(physics.position[2])
        return jnp.concatenate([joints, tip, physics.velocity, jnp.log1p(physics.sensors)])


class FingerSpin(Finger):
    """Keep the spinner turning (dm_control's finger, spin).

    Observation: angles of the two joints, the spinner's tip from its hinge, x and z, velocities of
        the three joints, log(1 + force) on either side of the fingertip, float32 (9,).
    Action: torques of the two joints, (2,), full scales 30 and 15 N m.
    Reward: 1 while the spinner turns faster than 15 rad/s one way, else 0.
    Control step: 20 ms, two Euler steps.
    """

    model_xml = MODEL.format(damping=0.03)
    observation_size = 9

    def start(self, key: jax.Array) -> tuple[Physics, jax.Array]:
        return self.start_physics(key), nothing_hidden()

    def see(self, physics: Physics, hidden: jax.Array) -> jax.Array:
        return self.see_spinner(physics)

    def reward(self, physics: Physics, hidden: jax.Array, action: jax.Array) -> jax.Array:
        return (physics.velocity[2] <= -SPIN_VELOCITY).astype(jnp.float32)


class FingerTurnHard(Finger):
    """Turn the spinner's tip into a target of 3 cm radius (dm_control's finger, turn_hard).

    Hidden: the target from the hinge, x and z, m.
    Observation: as FingerSpin, then the target from the hinge (2,) and the tip's distance to the
        target's edge, negative inside, float32 (12,).
    Action: as FingerSpin.
    Reward: 1 while the tip is in the target, else 0.
    Control step: 20 ms, two Euler steps.
    """

    observation_size = 12
    target_radius = 0.03

    def start(self, key: jax.Array) -> tuple[Physics, jax.Array]:
        """As FingerSpin, and a target anywhere on the tip's circle."""
        physics_key, target_key = jax.random.split(key)
        angle = jax.random.uniform(target_key, (), jnp.float32, -jnp.pi, jnp.pi)
        return self.start_physics(physics_key), TIP * jnp.stack([jnp.sin(angle), jnp.cos(angle)])

    def distance(self, physics: Physics, target: jax.Array) -> jax.Array:
        """From the tip to the target's edge, (), m."""
        return jnp.linalg.norm(target - tip_position(physics.position[2])) - self.target_radius

    def see(self, physics: Physics, hidden: jax.Array) -> jax.Array:
        distance = self.distance(physics, hidden)
        return jnp.concatenate([self.see_spinner(physics), hidden, distance[None]])

    def reward(self, physics: Physics, hidden: jax.Array, action: jax.Array) -> jax.Array:
        return (self.distance(physics, hidden) <= 0.0).astype(jnp.float32)


class FingerTurnEasy(FingerTurnHard):
    """As FingerTurnHard with a target of 7 cm radius (dm_control's finger, turn_easy)."""

    target_radius = 0.07


def tip_position(hinge: jax.Array) -> jax.Array:
    """The spinner's tip from its hinge, x and z, (2,), m."""
    return TIP * jnp.stack([-jnp.sin(hinge), jnp.cos(hinge)])


def touches_spinner(position: jax.Array) -> jax.Array:
    """Whether the finger touches the spinner at positions (3,), bool ()."""
    proximal, distal, hinge = position
    upper = downwards(proximal - UPPER_ZERO)
    lower = downwards(proximal - UPPER_ZERO + distal)
    knuckle = jnp.array(KNUCKLE, jnp.float32)
    joint = knuckle + UPPER_LINK * upper
    links = [
        (knuckle, knuckle + UPPER_CAPSULE * upper),
        (joint + FINGERTIP[0] * lower, joint + FINGERTIP[1] * lower),
    ]
    axis = -downwards(hinge)
    across = jnp.stack([axis[1], -axis[0]])
    distances = []
    for offset in SPINNER_OFFSETS:
        middle = jnp.array(HINGE, jnp.float32) + offset * across
        for a, b in links:
            ends = middle - SPINNER_HALF * axis, middle + SPINNER_HALF * axis
            distances.append(segment_to_segment(a, b, *ends))
    return jnp.stack(distances).min() <= FINGER_RADIUS + SPINNER_RADIUS


def downwards(angle: jax.Array) -> jax.Array:
    """Straight down, turned by an angle about the hinges' axis, x and z, (2,)."""
    return jnp.stack([jnp.sin(angle), -jnp.cos(angle)])
