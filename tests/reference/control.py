"""DeepMind's own control tasks (dm_control), and the same state in theirs and in ours."""

import os
from typing import Any, NamedTuple

os.environ.setdefault("MUJOCO_GL", "disable")  # nothing is rendered, so no window system is looked for

import mujoco
import numpy as np
from dm_control.mujoco.wrapper.mjbindings import sizes

import control_jax

# name here -> domain and task there
TASKS = {
    "BallInCup": ("ball_in_cup", "catch"),
    "CartpoleBalance": ("cartpole", "balance"),
    "CartpoleSwingup": ("cartpole", "swingup"),
    "FingerSpin": ("finger", "spin"),
    "FingerTurnEasy": ("finger", "turn_easy"),
    "FingerTurnHard": ("finger", "turn_hard"),
    "PendulumSwingup": ("pendulum", "swingup"),
    "PointMass": ("point_mass", "easy"),
    "PointMassHard": ("point_mass", "hard"),
    "ReacherEasy": ("reacher", "easy"),
    "ReacherHard": ("reacher", "hard"),
}


def forget_missing_fields() -> None:
    """dm_control 1.0.50 lists nine fields of flexible bodies that mujoco 4.0.0 no longer has, and asks for all."""
    model = mujoco.MjModel.from_xml_string("<mujoco/>")
    for name, struct in {"mjmodel": model, "mjdata": mujoco.MjData(model)}.items():
        fields = sizes.array_sizes[name]
        for field in [field for field in fields if not hasattr(struct, field)]:
            del fields[field]


def load(name: str, seed: int) -> Any:
    """dm_control's environment."""
    forget_missing_fields()
    from dm_control import suite

    domain, task = TASKS[name]
    return suite.load(domain, task, task_kwargs={"random": seed})


def flat(observation: dict[str, Any]) -> np.ndarray:
    """All parts of an observation in dm_control's own order."""
    return np.concatenate([np.ravel(part) for part in observation.values()])


def hidden_of(name: str, env: Any) -> np.ndarray:
    """What control_jax calls hidden."""
    model = env.physics.named.model
    if name.startswith("Reacher"):
        return np.array(model.geom_pos["target", :2])
    if name.startswith("FingerTurn"):
        return np.array(model.site_pos["target"])[[0, 2]] - np.array(model.body_pos["spinner"])[[0, 2]]
    if name.startswith("PointMass"):
        return np.array(env.physics.model.wrap_prm[:4])
    return np.zeros(0)


class Played(NamedTuple):
    """Steps of dm_control: the state before, the action, and what came of it; (N, .) each."""

    position: np.ndarray
    velocity: np.ndarray
    warmstart: np.ndarray
    hidden: np.ndarray
    action: np.ndarray
    position_after: np.ndarray
    velocity_after: np.ndarray
    observation: np.ndarray
    reward: np.ndarray
    contacts: np.ndarray


def play(name: str, env: Any, actions: np.ndarray, start: Any = None) -> Played:
    """One episode of dm_control with these actions (T, A), from a state of control_jax or from its own start."""
    env.reset()
    if start is not None:
        put(name, env, start)
    rows = []
    data = env.physics.data
    for action in actions:
        before = [np.array(x) for x in (data.qpos, data.qvel, data.qacc_warmstart, hidden_of(name, env))]
        step = env.step(action)
        after = [np.array(data.qpos), np.array(data.qvel), flat(step.observation)]
        rows.append([*before, action, *after, step.reward, data.ncon])
    return Played(*(np.stack([row[i] for row in rows]) for i in range(len(Played._fields))))


def put(name: str, env: Any, state: control_jax.EnvState) -> None:
    """Set dm_control's simulation and what its episode drew to a state of control_jax."""
    hidden = np.asarray(state.hidden, np.float64)
    model = env.physics.named.model
    if name.startswith("Reacher"):
        model.geom_pos["target", :2] = hidden
    if name.startswith("FingerTurn"):
        x, z = np.array(model.body_pos["spinner"])[[0, 2]] + hidden
        model.site_pos["target", "x"] = x
        model.site_pos["target", "z"] = z
    if name.startswith("PointMass"):
        env.physics.model.wrap_prm[:4] = hidden
    data = env.physics.data
    with env.physics.reset_context():
        data.qpos[:] = state.physics.position
        data.qvel[:] = state.physics.velocity
    data.qacc_warmstart[:] = state.physics.warmstart
