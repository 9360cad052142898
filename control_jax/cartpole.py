"""Cart and pole: swing it up, or keep it up."""

import jax
import jax.numpy as jnp

from control_jax.closed_form import cart_equations
from control_jax.engine import Physics, at_rest
from control_jax.environment import Environment, nothing_hidden
from control_jax.rewards import small_control, tolerance


class CartpoleSwingup(Environment):
    """Swing a pole up from below and keep it up (dm_control's cartpole, swingup).

    Observation: slider's position, cosine and sine of the pole's angle, both velocities,
        float32 (5,).
    Action: force on the cart, (1,), full scale 10 N.
    Reward: upright * small control * small velocity * centred, each in [0, 1] with a floor.
    Control step: 10 ms, one Runge-Kutta step.
    """

    model_xml = """
    <mujoco>
      <option timestep="0.01" integrator="RK4"><flag contact="disable"/></option>
      <worldbody>
        <body name="cart" pos="0 0 1">
          <joint name="slider" type="slide" axis="1 0 0" limited="true" range="-1.8 1.8"
                 solreflimit=".08 1" damping="5e-4"/>
          <geom type="box" size="0.2 0.15 0.1" mass="1"/>
          <body name="pole">
            <joint name="hinge" type="hinge" axis="0 1 0" damping="2e-6"/>
            <geom type="capsule" fromto="0 0 0 0 0 1" size="0.045" mass=".1"/>
          </body>
        </body>
      </worldbody>
      <actuator><motor joint="slider" gear="10" ctrllimited="true" ctrlrange="-1 1"/></actuator>
    </mujoco>"""
    equations = staticmethod(cart_equations)
    observation_size = 5

    def start(self, key: jax.Array) -> tuple[Physics, jax.Array]:
        """Cart in the middle, pole hanging, both and their velocities with noise of 0.01."""
        noise = 0.01 * jax.random.normal(key, (4,), jnp.float32)
        position = jnp.array([0.0, jnp.pi], jnp.float32) + noise[:2]
        return at_rest(self.model, position, noise[2:]), nothing_hidden()

    def see(self, physics: Physics, hidden: jax.Array) -> jax.Array:
        slider, angle = physics.position
        pole = jnp.stack([slider, jnp.cos(angle), jnp.sin(angle)])
        return jnp.concatenate([pole, physics.velocity])

    def reward(self, physics: Physics, hidden: jax.Array, action: jax.Array) -> jax.Array:
        slider, angle = physics.position
        upright = (jnp.cos(angle) + 1.0) / 2.0
        centred = (1.0 + tolerance(slider, 0.0, margin=2.0)) / 2.0
        slow = (1.0 + tolerance(physics.velocity[1], 0.0, margin=5.0)) / 2.0
        return upright * small_control(action) * slow * centred


class CartpoleBalance(CartpoleSwingup):
    """Keep a pole up that starts upright (dm_control's cartpole, balance).

    All else as in CartpoleSwingup.
    """

    def start(self, key: jax.Array) -> tuple[Physics, jax.Array]:
        """Slider within 0.1 m, pole within 0.034 rad, velocities with noise of 0.01."""
        position_key, velocity_key = jax.random.split(key)
        unit = jax.random.uniform(position_key, (2,), jnp.float32, -1.0, 1.0)
        velocity = 0.01 * jax.random.normal(velocity_key, (2,), jnp.float32)
        position = unit * jnp.array([0.1, 0.034], jnp.float32)
        return at_rest(self.model, position, velocity), nothing_hidden()
