"""How long does a state of S5 remember, and how loudly does it hear?

    python benchmarks/s5_states.py

Draws, from the layer's own discretisation: half-lives against time steps, with the ranges in which
the scripts' presets begin; what single states hold after one observation. See docs/s5.md.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import a2c_s5_bsuite as a2c
import muesli_s5_metarl as muesli
import ppo_s5_popgym as ppo
import s5_common as common

TIME_STEPS = (0.1, 0.03, 0.01, 0.003, 0.001)  # of the states whose answer is drawn
RATE = -0.5  # real part of Lambda where training begins


@dataclass(frozen=True)
class Args:
    """Draw what time steps mean."""

    out: str = "results/s5_states.png"
    """the picture"""

    steps: int = 1000
    """steps after the observation"""


def single_state(time_step: float) -> tuple[complex, complex]:
    """Lambda_bar and B_bar of a state of this rate, without imaginary part, and B = 1."""
    Lambda_bar, B_bar = common.discretize_zoh(np.array([RATE + 0j]), np.ones((1, 1)), np.array([time_step]))
    return complex(Lambda_bar[0]), complex(B_bar[0, 0])


def half_life(time_step: float) -> float:
    """Steps after which half of what was written is left."""
    Lambda_bar, _ = single_state(time_step)
    return math.log(0.5) / math.log(abs(Lambda_bar))


def answer(time_step: float, steps: int) -> np.ndarray:
    """The state after one observation of 1, (steps,)."""
    Lambda_bar, B_bar = single_state(time_step)
    return np.real(B_bar * Lambda_bar ** np.arange(steps))


def main() -> int:
    args = tyro.cli(Args)
    ranges = {
        "PPO": (ppo.Args.s5_dt_min, ppo.Args.s5_dt_max),
        "Muesli": (muesli.Args.s5_dt_min, muesli.Args.s5_dt_max),
        "PPO, --preset meta": (ppo.PRESETS["meta"]["s5_dt_min"], ppo.Args.s5_dt_max),
        "A2C": (a2c.Args.s5_dt_min, a2c.Args.s5_dt_max),
    }

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    time_steps = np.geomspace(1e-4, 1, 50)
    left.loglog(time_steps, [half_life(time_step) for time_step in time_steps], color="black")
    for i, (name, (smallest, largest)) in enumerate(ranges.items()):
        height = 2.0 * 2.0**i
        left.plot([smallest, largest], [height, height], linewidth=4, label=name)
    left.set(xlabel="time step", ylabel="steps until half is left")
    left.legend(title="time steps begin in", loc="upper right", fontsize="small")
    for time_step in TIME_STEPS:
        right.semilogy(1 + np.arange(args.steps), answer(time_step, args.steps), label=f"{time_step:g}")
    right.set(xlabel="steps after the observation", ylabel="state", ylim=(1e-5, 0.2))
    right.legend(title="time step", loc="upper right", fontsize="small")
    figure.savefig(args.out, dpi=150)
    return 0


if __name__ == "__main__":
    sys.exit(common.run_main(main))
