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
import numpy as np
import tyro
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import control_jax
from control_jax.drawing import draw
from tests.reference.control import load, put
from tests.test_control_equality import guided_actions


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


def main() -> None:
    args = tyro.cli(Args)
    names = control_jax.registered_envs
    figure = Figure(figsize=(1.4 * args.frames, 1.5 * len(names)), layout="constrained")
    grid = figure.subplots(len(names), args.frames)
    for row, name in zip(grid, names, strict=True):
        env, states, rewards = episode(name, args.steps)
        for axes, t in zip(row, np.linspace(0, args.steps - 1, args.frames).astype(int), strict=True):
            draw(axes, env, states[t])
            axes.set_title(f"step {t + 1}, reward {rewards[t]:.2f}", fontsize=6)
        row[0].set_ylabel(name, fontsize=7)
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main()
