"""Pictures of the tasks, drawn from their states: `draw(axes, env, state)`. Needs matplotlib."""

from typing import NamedTuple

import mujoco
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Circle, Polygon

from control_jax import finger, point_mass
from control_jax.ball_in_cup import BallInCup
from control_jax.cartpole import CartpoleSwingup
from control_jax.environment import Environment, EnvState
from control_jax.pendulum import PendulumSwingup
from control_jax.reacher import ReacherEasy


class View(NamedTuple):
    """What a picture shows of a task."""

    up: int  # the world's axis that points up in it: z from the side, y from above
    middle: tuple[float, float]  # m
    radius: float  # half its width, m


VIEWS: dict[type[Environment], View] = {
    BallInCup: View(up=2, middle=(0.0, 0.5), radius=0.45),
    CartpoleSwingup: View(up=2, middle=(0.0, 1.0), radius=2.2),
    finger.Finger: View(up=2, middle=(0.0, 0.5), radius=0.45),
    PendulumSwingup: View(up=2, middle=(0.0, 0.5), radius=0.7),
    point_mass.PointMass: View(up=1, middle=(0.0, 0.0), radius=0.32),
    ReacherEasy: View(up=1, middle=(0.0, 0.0), radius=0.3),
}


def draw(axes: Axes, env: Environment, state: EnvState) -> None:
    """All bodies, and in green the target; of a finger's spinner the tip in black."""
    view = next(view for task, view in VIEWS.items() if isinstance(env, task))
    draw_bodies(axes, env.model, np.asarray(state.physics.position), view.up)
    draw_target(axes, env, state)
    axes.set_xlim(view.middle[0] - view.radius, view.middle[0] + view.radius)
    axes.set_ylim(view.middle[1] - view.radius, view.middle[1] + view.radius)
    axes.set_aspect("equal")
    axes.set_xticks([])
    axes.set_yticks([])


def draw_bodies(axes: Axes, model: mujoco.MjModel, position: np.ndarray, up: int) -> None:
    """Capsules, boxes and spheres at joint positions (nq,)."""
    data = mujoco.MjData(model)
    data.qpos[:] = position
    mujoco.mj_kinematics(model, data)
    for geom in range(model.ngeom):
        place = data.geom_xpos[geom]
        axis = data.geom_xmat[geom].reshape(3, 3)[:, 2]
        radius, half = model.geom_size[geom, :2]
        kind = model.geom_type[geom]
        if kind == mujoco.mjtGeom.mjGEOM_CAPSULE:
            for offset in np.linspace(-half, half, 40):
                axes.add_patch(Circle((place + offset * axis)[[0, up]], radius, color="tab:blue"))
        elif kind == mujoco.mjtGeom.mjGEOM_BOX:
            width, _, height = model.geom_size[geom]
            signs = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])
            corners = place[[0, up]] + signs * (width, height)
            axes.add_patch(Polygon(corners, color="tab:grey"))
        elif kind == mujoco.mjtGeom.mjGEOM_SPHERE:
            axes.add_patch(Circle(place[[0, up]], radius, color="tab:orange"))


def draw_target(axes: Axes, env: Environment, state: EnvState) -> None:
    """Nothing for a task without one."""
    if isinstance(env, finger.FingerTurnHard):
        hinge = np.array(finger.HINGE)
        tip = hinge + np.asarray(finger.tip_position(state.physics.position[2]))
        axes.add_patch(Circle(tip, 0.01, color="black", zorder=3))
        ring(axes, hinge + np.asarray(state.hidden), env.target_radius)
    if isinstance(env, ReacherEasy):
        ring(axes, np.asarray(state.hidden), env.target_radius)
    if isinstance(env, point_mass.PointMass):
        ring(axes, np.zeros(2), point_mass.TARGET_RADIUS)


def ring(axes: Axes, middle: np.ndarray, radius: float) -> None:
    axes.add_patch(Circle((middle[0], middle[1]), radius, fill=False, color="tab:green", zorder=3))
