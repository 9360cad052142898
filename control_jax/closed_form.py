"""MuJoCo's physics written out, for models of one or two joints whose bodies do not touch.

What a general simulator does besides (trees of bodies, contacts, an iterative solver) is left out,
so a step is a few dozen multiplications on any device. The equations are MuJoCo's, as its
documentation states them ("Computation"), and the numbers come from the compiled model.

    M(q) a = f(q, v, control) + limit forces
    f = gear * control - damping * v + bias(q, v)

q positions, v velocities, a accelerations, (n,); M mass matrix, (n, n); n = 1 or 2.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import mujoco
import numpy as np

from control_jax.engine import Physics


class Equations(NamedTuple):
    """What differs between the models."""

    mass: Callable  # q -> M (n, n)
    bias: Callable  # q, v -> forces of gravity and of rotation, (n,)


def closed_form_engine(model: mujoco.MjModel, substeps: int, equations: Equations) -> Callable:
    """A function (physics, control (nu,)) -> physics, `substeps` simulation steps later.

    model: n joints, each with one motor at most; Euler or Runge-Kutta steps
    """
    h = float(model.opt.timestep)
    damping = jnp.asarray(model.dof_damping, jnp.float32)
    gear = np.zeros((model.nv, model.nu), np.float32)
    for motor in range(model.nu):
        gear[model.actuator_trnid[motor, 0], motor] = model.actuator_gear[motor, 0]
    limit_force = joint_limits(model)

    def forces(q: jax.Array, v: jax.Array, control: jax.Array) -> tuple[jax.Array, jax.Array]:
        """M and all forces, those of the limits included."""
        M = equations.mass(q)
        smooth = gear @ control - damping * v + equations.bias(q, v)
        inverse = inverse_of(M)
        return M, smooth + limit_force(q, v, inverse @ smooth, jnp.diagonal(inverse))

    def euler(q: jax.Array, v: jax.Array, control: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Semi-implicit, and implicit in the damping.

        v' = v + h (M + h damping)^-1 forces,    q' = q + h v'
        """
        M, force = forces(q, v, control)
        v = v + h * (inverse_of(M + h * jnp.diag(damping)) @ force)
        return q + h * v, v

    def runge_kutta(q: jax.Array, v: jax.Array, control: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The classical method of fourth order."""

        def slope(q, v):
            M, force = forces(q, v, control)
            return v, inverse_of(M) @ force

        v1, a1 = slope(q, v)
        v2, a2 = slope(q + h / 2 * v1, v + h / 2 * a1)
        v3, a3 = slope(q + h / 2 * v2, v + h / 2 * a2)
        v4, a4 = slope(q + h * v3, v + h * a3)
        q = q + h / 6 * (v1 + 2 * v2 + 2 * v3 + v4)
        return q, v + h / 6 * (a1 + 2 * a2 + 2 * a3 + a4)

    integrate = runge_kutta if model.opt.integrator == mujoco.mjtIntegrator.mjINT_RK4 else euler

    def step(physics: Physics, control: jax.Array) -> Physics:
        q = physics.position
        v = physics.velocity
        for _ in range(substeps):
            q, v = integrate(q, v, control)
        return physics._replace(position=q, velocity=v)

    return step


def joint_limits(model: mujoco.MjModel) -> Callable:
    """MuJoCo's soft limits: a function (q, v, a, diagonal of M^-1), each (n,), -> forces (n,).

    a: acceleration without the limits' forces

    Beyond a limit by -r > 0 with speed w = dr/dt, a spring and damper ask for the acceleration

        a* = -b w - k d(r) r,    d = d(r), the impedance, from 0.9 to 0.95 by default
        force = max(0, (a* - a) / (A + R)),    A = diagonal of M^-1,    R = (1 - d) / d * A at q = 0

    This is the solver's exact answer where at most one joint is at its limit, or M is diagonal.
    """
    limited = jnp.asarray(model.jnt_limited, bool)
    low = jnp.asarray(model.jnt_range[:, 0], jnp.float32)
    high = jnp.asarray(model.jnt_range[:, 1], jnp.float32)
    least, most, width, middle, power = jnp.asarray(model.jnt_solimp.T, jnp.float32)
    time_constant, damping_ratio = jnp.asarray(model.jnt_solref.T, jnp.float32)
    time_constant = jnp.maximum(time_constant, 2 * model.opt.timestep)
    stiffness = 1.0 / (most * time_constant * damping_ratio) ** 2
    damping = 2.0 / (most * time_constant)
    inverse_weight = jnp.asarray(model.dof_invweight0, jnp.float32)

    def impedance(r: jax.Array) -> jax.Array:
        """From `least` at the limit to `most` at `width` beyond it, along two powers that meet."""
        x = jnp.clip(jnp.abs(r) / width, 0.0, 1.0)
        rising = x**power / middle ** (power - 1)
        settling = 1.0 - (1.0 - x) ** power / (1.0 - middle) ** (power - 1)
        return least + jnp.where(x <= middle, rising, settling) * (most - least)

    def force(q: jax.Array, v: jax.Array, a: jax.Array, inverse_mass: jax.Array) -> jax.Array:
        above = q > (low + high) / 2
        side = jnp.where(above, -1.0, 1.0)  # the direction in which the limit pushes
        r = jnp.where(above, high - q, q - low)
        d = impedance(r)
        wanted = -damping * side * v - stiffness * d * r
        push = (wanted - side * a) / (inverse_mass + (1.0 - d) / d * inverse_weight)
        return jnp.where(limited & (r < 0.0), side * jnp.maximum(push, 0.0), 0.0)

    return force


def inverse_of(M: jax.Array) -> jax.Array:
    """Inverse of a matrix (1, 1) or (2, 2), written out."""
    if M.shape == (1, 1):
        return 1.0 / M
    (a, b), (c, d) = M
    return jnp.array([[d, -b], [-c, a]]) / (a * d - b * c)


def arm_equations(model: mujoco.MjModel) -> Equations:
    """Two links in a horizontal plane: the second one turns about a point of the first.

        M_22 = J_2,    M_12 = J_2 + h cos(q_2),    M_11 = J_1 + J_2 + m_2 l^2 + 2 h cos(q_2)

    J: moments of inertia about a link's own joint; l: distance of the joints; h = m_2 c_2 l with
    the second link's mass m_2 and its centre of mass at c_2.
    """
    first = model.jnt_bodyid[0]
    second = model.jnt_bodyid[1]
    length = float(model.body_pos[second, 0])
    of_second = range(second, model.nbody)  # those after it are fixed to it
    places = {}  # of their centres of mass, from the second joint
    for body in of_second:
        offset = 0.0 if body == second else model.body_pos[body, 0]
        places[body] = offset + model.body_ipos[body, 0]
    J_1 = vertical_inertia(model, first, model.body_ipos[first, 0])
    J_2 = sum(vertical_inertia(model, body, places[body]) for body in of_second)
    m_2 = sum(model.body_mass[body] for body in of_second)
    h = length * sum(model.body_mass[body] * places[body] for body in of_second)

    def mass(q: jax.Array) -> jax.Array:
        coupling = J_2 + h * jnp.cos(q[1])
        whole = J_1 + J_2 + m_2 * length**2 + 2.0 * h * jnp.cos(q[1])
        return jnp.array([[whole, coupling], [coupling, J_2]], jnp.float32)

    def bias(q: jax.Array, v: jax.Array) -> jax.Array:
        bent = h * jnp.sin(q[1])
        return jnp.array([bent * (2.0 * v[0] + v[1]) * v[1], -bent * v[0] ** 2], jnp.float32)

    return Equations(mass, bias)


def vertical_inertia(model: mujoco.MjModel, body: int, place: float) -> float:
    """Moment of inertia about a vertical axis `place` away from a body's centre of mass, kg m^2."""
    turn = np.zeros(9)
    mujoco.mju_quat2Mat(turn, model.body_iquat[body])
    axes = turn.reshape(3, 3)
    vertical = (axes @ np.diag(model.body_inertia[body]) @ axes.T)[2, 2]
    return float(vertical + model.body_mass[body] * place**2)


def cart_equations(model: mujoco.MjModel) -> Equations:
    """A pole (mass m, centre of mass at c, moment J about the hinge) on a cart (mass m_0).

    M = [[m_0 + m, m c cos(q_2)], [m c cos(q_2), J]],    bias = [m c sin(q_2) v_2^2, m c g sin(q_2)]
    """
    cart, pole = model.jnt_bodyid
    m = float(model.body_mass[pole])
    mc = m * float(model.body_ipos[pole, 2])
    whole = float(model.body_mass[cart]) + m
    J = swinging_inertia(model, pole)
    g = -float(model.opt.gravity[2])

    def mass(q: jax.Array) -> jax.Array:
        coupling = mc * jnp.cos(q[1])
        return jnp.array([[whole, coupling], [coupling, J]], jnp.float32)

    def bias(q: jax.Array, v: jax.Array) -> jax.Array:
        return mc * jnp.sin(q[1]) * jnp.array([v[1] ** 2, g], jnp.float32)

    return Equations(mass, bias)


def pendulum_equations(model: mujoco.MjModel) -> Equations:
    """One body on a hinge: M = J, bias = m c g sin(q)."""
    body = model.jnt_bodyid[0]
    torque = float(model.body_mass[body] * model.body_ipos[body, 2] * -model.opt.gravity[2])
    J = jnp.full((1, 1), swinging_inertia(model, body), jnp.float32)
    return Equations(lambda q: J, lambda q, v: torque * jnp.sin(q))


def swinging_inertia(model: mujoco.MjModel, body: int) -> float:
    """Moment of inertia of a body that lies along its own z about its hinge's y axis, kg m^2."""
    across = float(model.body_inertia[body, 1])  # as about x: it is round
    return across + float(model.body_mass[body] * model.body_ipos[body, 2] ** 2)


def plane_equations(model: mujoco.MjModel) -> Equations:
    """A point mass on two sliders in a horizontal plane."""
    M = float(model.body_mass[model.jnt_bodyid[0]]) * jnp.eye(2, dtype=jnp.float32)
    return Equations(lambda q: M, lambda q, v: jnp.zeros(2, jnp.float32))
