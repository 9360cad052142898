"""Pictures of the DeepMind Control tasks of control_jax, drawn from their states: an episode of each, to look at.

    python benchmarks/control_pictures.py --out results/control.png

The actions are those that the tests use to bring dm_control to where the reward is.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Polygon

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import control_jax
from tests.reference.control import load, put
from tests.test_control_equality import FAMILY, guided_actions

FROM_ABOVE = ("reacher", "point_mass")
RADIUS = {"BallInCup": 0.45, "Cartpole": 2.2, "Finger": 0.45, "Pendulum": 0.7, "PointMass": 0.32, "Reacher": 0.3}
TARGETS = {
    "FingerTurnEasy": 0.07,
    "FingerTurnHard": 0.03,
    "ReacherEasy": 0.05,
    "ReacherHard": 0.015,
    "PointMass": 0.015,
}


@dataclass(frozen=True)
class Args:
    """Episodes as rows of pictures."""

    out: str = "control.png"
    """file of the picture"""

    steps: int = 500
    """control steps of an episode"""

    frames: int = 8
    """pictures of an episode"""


def episode(name: str, steps: int) -> tuple[Any, list[Any], np.ndarray]:
    """Environment, states and rewards of a guided episode."""
    env, params = control_jax.make(name)
    _, state = env.reset_env(jax.random.PRNGKey(3), params)
    theirs = load(name, seed=0)
    theirs.reset()
    put(name, theirs, state)
    actions = jnp.asarray(guided_actions(name, theirs, steps), jnp.float32)

    def step(state: Any, action: jax.Array) -> tuple[Any, Any]:
        _, state, reward, *_ = env.step_env(None, state, action, params)
        return state, (state, reward)

    states, rewards = jax.jit(lambda state, actions: jax.lax.scan(step, state, actions)[1])(state, actions)
    unstacked = [jax.tree.map(lambda x, t=t: np.asarray(x[t]), states) for t in range(steps)]
    return env, unstacked, np.asarray(rewards)


def draw(axes: Axes, env: Any, name: str, state: Any) -> None:
    """All bodies, seen from the side or, if they move in a horizontal plane, from above."""
    across, up = (0, 1) if FAMILY[name] in FROM_ABOVE else (0, 2)
    data = mujoco.MjData(env.model)
    data.qpos[:] = state.physics.position
    mujoco.mj_kinematics(env.model, data)
    for geom in range(env.model.ngeom):
        place = data.geom_xpos[geom]
        axis = data.geom_xmat[geom].reshape(3, 3)[:, 2]
        radius, half = env.model.geom_size[geom, :2]
        kind = env.model.geom_type[geom]
        if kind == mujoco.mjtGeom.mjGEOM_CAPSULE:
            for offset in np.linspace(-half, half, 40):
                axes.add_patch(Circle((place + offset * axis)[[across, up]], radius, color="tab:blue"))
        elif kind == mujoco.mjtGeom.mjGEOM_BOX:
            width, _, height = env.model.geom_size[geom]
            corners = np.array([[-width, -height], [width, -height], [width, height], [-width, height]])
            axes.add_patch(Polygon(place[[across, up]] + corners, color="tab:grey"))
        elif kind == mujoco.mjtGeom.mjGEOM_SPHERE:
            axes.add_patch(Circle(place[[across, up]], radius, color="tab:orange"))
    target = np.asarray(state.hidden)
    if name in TARGETS:
        middle = np.zeros(2) if FAMILY[name] == "point_mass" else target
        if FAMILY[name] == "finger":
            middle = target + np.array([0.2, 0.4])
            tip = 0.13 * np.array([-np.sin(state.physics.position[2]), np.cos(state.physics.position[2])])
            axes.add_patch(Circle(tip + np.array([0.2, 0.4]), 0.01, color="black", zorder=3))
        axes.add_patch(Circle(middle, TARGETS[name], fill=False, color="tab:green", zorder=3))


def main() -> None:
    args = tyro.cli(Args)
    names = control_jax.registered_envs
    figure = Figure(figsize=(1.4 * args.frames, 1.5 * len(names)), layout="constrained")
    grid = figure.subplots(len(names), args.frames)
    for row, name in zip(grid, names, strict=True):
        env, states, rewards = episode(name, args.steps)
        middle = (0.0, 0.0) if FAMILY[name] in FROM_ABOVE else (0.0, 1.0 if "Cartpole" in name else 0.5)
        radius = next(size for family, size in RADIUS.items() if name.startswith(family))
        for axes, t in zip(row, np.linspace(0, args.steps - 1, args.frames).astype(int), strict=True):
            draw(axes, env, name, states[t])
            axes.set_xlim(middle[0] - radius, middle[0] + radius)
            axes.set_ylim(middle[1] - radius, middle[1] + radius)
            axes.set_aspect("equal")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_title(f"step {t + 1}, reward {rewards[t]:.2f}", fontsize=6)
        row[0].set_ylabel(name, fontsize=7)
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main()
