"""A cup that is to catch the ball on its string."""

from itertools import pairwise

import jax
import jax.numpy as jnp

from control_jax.engine import Physics, Solver, at_rest
from control_jax.environment import Environment, first_accepted, nothing_hidden
from control_jax.geometry import point_to_segment

CUP = (0.0, 0.6)  # where the cup's frame is at position 0, x and z, m
BALL = (0.0, 0.2)  # where the ball is at position 0
BALL_RADIUS = 0.025
WALL_RADIUS = 0.008
WALL = (
    (-0.05, 0.0),
    (-0.05, -0.075),
    (-0.025, -0.1),
    (0.025, -0.1),
    (0.05, -0.075),
    (0.05, 0.0),
)  # in the cup's frame
INSIDE = (0.0, -0.05)  # centre of the square in which the ball is caught, in the cup's frame
INSIDE_HALF = 0.05


class BallInCup(Environment):
    """Catch a ball in a cup (dm_control's ball_in_cup, catch).

    Observation: x and z of the cup and of the ball, then their velocities, float32 (8,).
    Action: forces on the cup along x and z, (2,), full scale 5 N.
    Reward: 1 while the ball is inside the cup, else 0.
    Control step: 20 ms, ten Euler steps.
    """

    model_xml = """
    <mujoco>
      <default>
        <joint type="slide"/>
        <motor gear="5" ctrllimited="true" ctrlrange="-1 1"/>
        <default class="cup">
          <joint damping="3" stiffness="20"/>
          <geom type="capsule" size=".008"/>
        </default>
      </default>
      <worldbody>
        <geom type="plane" size=".6 .2 10"/>
        <body name="cup" pos="0 0 .6" childclass="cup">
          <joint name="cup_x" axis="1 0 0"/>
          <joint name="cup_z" axis="0 0 1"/>
          <geom fromto="-.05 0 0 -.05 0 -.075"/>
          <geom fromto="-.05 0 -.075 -.025 0 -.1"/>
          <geom fromto="-.025 0 -.1 .025 0 -.1"/>
          <geom fromto=".025 0 -.1 .05 0 -.075"/>
          <geom fromto=".05 0 -.075 .05 0 0"/>
          <site name="cup" pos="0 0 -.108"/>
        </body>
        <body name="ball" pos="0 0 .2">
          <joint name="ball_x" axis="1 0 0"/>
          <joint name="ball_z" axis="0 0 1"/>
          <geom type="sphere" size=".025"/>
          <site name="ball"/>
        </body>
      </worldbody>
      <actuator><motor joint="cup_x"/><motor joint="cup_z"/></actuator>
      <tendon>
        <spatial limited="true" range="0 0.3"><site site="ball"/><site site="cup"/></spatial>
      </tendon>
    </mujoco>"""
    substeps = 10
    solver = Solver(iterations=4, line_search=8)
    observation_size = 8

    def start(self, key: jax.Array) -> tuple[Physics, jax.Array]:
        """Cup at rest; ball at x within 0.2 of its zero and z 0.2 to 0.5 above, off the cup."""

        def draw(key):
            unit = jax.random.uniform(key, (2,), jnp.float32)
            return jnp.array([-0.2, 0.2], jnp.float32) + jnp.array([0.4, 0.3], jnp.float32) * unit

        ball = first_accepted(draw, lambda ball: ~touches_cup(ball), key)
        position = jnp.concatenate([jnp.zeros(2, jnp.float32), ball])
        return at_rest(self.model, position), nothing_hidden()

    def see(self, physics: Physics, hidden: jax.Array) -> jax.Array:
        return jnp.concatenate([physics.position, physics.velocity])

    def reward(self, physics: Physics, hidden: jax.Array, action: jax.Array) -> jax.Array:
        cup, ball = jnp.split(physics.position, 2)
        target = cup + jnp.array(CUP, jnp.float32) + jnp.array(INSIDE, jnp.float32)
        away = jnp.abs(target - ball - jnp.array(BALL, jnp.float32))
        return (away < INSIDE_HALF - BALL_RADIUS).all().astype(jnp.float32)


def touches_cup(ball: jax.Array) -> jax.Array:
    """Whether a ball at positions (2,) touches a cup at its zero, bool ()."""
    in_cup_frame = ball + jnp.array(BALL, jnp.float32) - jnp.array(CUP, jnp.float32)
    distances = [
        point_to_segment(in_cup_frame, jnp.array(a), jnp.array(b)) for a, b in pairwise(WALL)
    ]
    return jnp.stack(distances).min() <= BALL_RADIUS + WALL_RADIUS
