"""Agents on randomly-projected CartPole with a push or a pole that they have never met.

    python benchmarks/metacart_physics.py runs/metacart/MetaStatelessCartPole__s5__s0 \\
        runs/metacart/MetaStatelessCartPole__gru__s0

Plays meta-episodes of the newest checkpoint of each run in worlds that differ from that of training
in the force of a push, or in the length of the pole. In the folder --out:

    physics.csv    a row a world and run: mean return of the first trials and of later ones
    physics.png    mean return of later trials, a line for each run
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from jax import Array
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ppo_s5_popgym as ppo
import s5_common as common
from benchmarks.collect import keep_rows, print_row
from benchmarks.metacart_swap import newest_checkpoint

FACTORS = (0.25, 0.5, 0.71, 1.0, 1.41, 2.0, 4.0)
CHANGED = {"force": "force of a push", "half_length": "length of the pole"}
# first and last of the trials that are averaged
GROUPS = ((1, 1), (2, 4), (5, 16))


@dataclass(frozen=True)
class Args:
    """Change the world, not the agent."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """directories of runs on MetaStatelessCartPole or its noisy form"""

    factors: tuple[float, ...] = FACTORS
    """how many times as strong or as long"""

    episodes: int = 512
    """meta-episodes"""

    out: str = "."
    """where table and picture go"""


def returns_in(setup: ppo.Setup, params: Any, changed: str, value: Array) -> Array:
    """Return of each trial of each meta-episode, (E, K), where ``changed`` has another value."""
    trial = setup.env_params.trial.replace(**{changed: value})
    setup = setup._replace(env_params=setup.env_params.replace(trial=trial))
    return ppo.evaluate(setup, params, jax.random.PRNGKey(0))


def rows_of(args: Args, run: str) -> list[dict[str, Any]]:
    """A row for every world, of one run."""
    setup, params = newest_checkpoint(run)
    if not hasattr(getattr(setup.env_params, "trial", None), "half_length"):
        raise common.UsageError(f"{run}: {setup.env.name} is no CartPole of several trials")
    setup = setup._replace(args=replace(setup.args, eval_episodes=args.episodes))
    rows = []
    for changed in CHANGED:
        usual = getattr(setup.env_params.trial, changed)
        play = jax.jit(partial(returns_in, setup, params, changed))
        for factor in args.factors:
            returns = np.asarray(play(factor * usual))
            row: dict[str, Any] = {"run": Path(run).name, "changed": changed, "factor": factor}
            for first, last in GROUPS:
                own = returns[:, first - 1 : last].mean(axis=1)
                row[f"trials_{first}_{last}"] = round(float(own.mean()), 4)
                row[f"error_{first}_{last}"] = round(float(own.std() / math.sqrt(len(own) - 1)), 4)
            rows.append(row)
    return rows


def draw(rows: list[dict[str, Any]], picture: Path) -> None:
    """Mean return of the last group of trials against the factor, a line for each run."""
    first, last = GROUPS[-1]
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    for axes, (changed, label) in zip(figure.subplots(1, 2, sharey=True), CHANGED.items(), strict=True):
        for run in dict.fromkeys(row["run"] for row in rows):
            own = sorted(
                (row["factor"], row[f"trials_{first}_{last}"], row[f"error_{first}_{last}"])
                for row in rows
                if (row["run"], row["changed"]) == (run, changed)
            )
            factors, means, errors = np.array(own).T
            axes.errorbar(factors, means, errors, marker="o", label=run)
        axes.axvline(1, color="grey", linestyle=":")
        axes.set(xscale="log", xlabel=f"{label}, times that of training", ylim=(0, 1.02))
        axes.set_xticks(factors, [f"{factor:g}" for factor in factors])
        axes.minorticks_off()
    figure.axes[0].set_ylabel(f"mean return, trials {first} to {last}")
    figure.axes[0].legend(fontsize="small")
    figure.savefig(picture, dpi=150)


def main() -> int:
    args = tyro.cli(Args)
    out = Path(args.out)
    rows = [row for run in args.runs for row in rows_of(args, run)]
    for row in rows:
        print_row(row)
    keep_rows(out / "physics.csv", rows, ("run", "changed", "factor"))
    draw(rows, out / "physics.png")
    return 0


if __name__ == "__main__":
    sys.exit(common.run_main(main))
