"""In-context learning on randomly-projected CartPole: train memories x seeds, evaluate on more trials, draw both.

    python benchmarks/metacart.py                                     # 4 memories, 3 seeds, 16 trials, tested on 32
    python benchmarks/metacart.py --jobs 2                            # two runs at a time, each on a core of its own
    python benchmarks/metacart.py --archs s5 mlp --seeds 0 -- --total-timesteps 1000000

A run that is finished is not repeated and one that was stopped is resumed, so the same command goes on where it was
interrupted. Flags after ``--`` go to ppo_s5_popgym.py, behind --preset meta. In the folder --out:

    metacart.csv    one row a run: MMER, return per trial in groups of trials, steps, minutes
    curves.png      mean return of a meta-episode during training
    trials_32.png   mean return of each trial in evaluation, with actions sampled as in training

Both pictures show the mean over seeds and +- its standard error.
"""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.collect import execute, finished_run, in_lanes, keep_rows, parse_args, print_row  # noqa: E402

SCRIPT = "ppo_s5_popgym.py"
Curve = tuple[np.ndarray, np.ndarray, np.ndarray]  # x, mean and its standard error


@dataclass(frozen=True)
class Args:
    """Memories x seeds on MetaStatelessCartPole."""

    env: str = "MetaStatelessCartPole"  # or MetaNoisyStatelessCartPole
    archs: tuple[str, ...] = ("s5", "s5-noreset", "gru", "mlp")  # memories
    seeds: tuple[int, ...] = (0, 1, 2)  # seeds, each a run of its own
    eval_trials: int = 32  # trials of a meta-episode in evaluation
    eval_episodes: int = 512  # meta-episodes in evaluation
    jobs: int = 1  # runs at a time; if more than one, each is held to a CPU core of its own
    out: str = "runs/metacart"  # where runs, table and pictures go


def run(args: Args, flags: list[str], arch: str, seed: int, core: int | None) -> None:
    """Train and evaluate one run, each if need be."""
    run_dir = Path(args.out) / f"{args.env}__{arch}__s{seed}"
    own = ["--env", args.env, "--preset", "meta", "--arch", arch, "--seed", seed]
    finished_run(SCRIPT, run_dir, [*own, *flags], core)
    if not (run_dir / f"trials_{args.eval_trials}.csv").exists():
        evaluate = ["--eval", run_dir, "--eval-trials", args.eval_trials, "--eval-episodes", args.eval_episodes]
        execute(SCRIPT, evaluate, core)


def read(args: Args, arch: str, seed: int) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """Of a finished run: its row of the table, (steps, return) while training (U, 2), return of each trial (K,)."""
    run_dir = Path(args.out) / f"{args.env}__{arch}__s{seed}"
    summary = json.loads((run_dir / "summary.json").read_text())
    metrics = csv.DictReader((run_dir / "metrics.csv").open())
    curve = np.array([(float(row["env_steps"]), float(row["return_mean"] or "nan")) for row in metrics])
    trials = np.loadtxt(run_dir / f"trials_{args.eval_trials}.csv", delimiter=",", skiprows=1)[:, 2]
    row = {"env": summary["env"], "arch": arch, "seed": seed, "env_steps": summary["env_steps"]}
    row |= {"best_return": round(summary["best_return"], 4), "final_return": round(summary["final_return"], 4)}
    for first, last in ((1, 1), (2, 4), (5, 8), (9, 12), (13, 16), (17, 24), (25, 32), (33, 64)):
        if last <= len(trials):
            row[f"trials_{first}_{last}"] = round(float(trials[first - 1 : last].mean()), 4)
    row |= {"steps_per_second": round(summary["steps_per_second"]), "minutes": round(summary["run_seconds"] / 60, 2)}
    return row | {"git_commit": summary["git_commit"]}, curve, trials


def over_seeds(x: np.ndarray, values: list[np.ndarray]) -> Curve:
    """Mean and standard error of the curves of several seeds; the error is 0 if there is one."""
    stacked = np.stack(values)
    spread = stacked.std(axis=0, ddof=1) if len(values) > 1 else np.zeros_like(stacked[0])
    return x, stacked.mean(axis=0), spread / np.sqrt(len(values))


def draw(curves: dict[str, Curve], picture: Path, xlabel: str, ylabel: str, trained: int = 0) -> None:
    """A line with a band of +- its error for each label; ``trained`` marks the last trial that training had."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for label, (x, mean, error) in curves.items():
        axes.plot(x, mean, label=label)
        axes.fill_between(x, mean - error, mean + error, alpha=0.25)
    if trained:
        axes.axvline(trained + 0.5, color="grey", linestyle=":", label=f"trained on {trained} trials")
    axes.set(xlabel=xlabel, ylabel=ylabel)
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(picture, dpi=150)


def main() -> None:
    args, flags = parse_args(Args)
    out, runs = Path(args.out), [(arch, seed) for seed in args.seeds for arch in args.archs]
    in_lanes(args.jobs, partial(run, args, flags), runs)
    found = {about: read(args, *about) for about in runs}
    keep_rows(out / "metacart.csv", [row for row, _, _ in found.values()], ("env", "arch", "seed"))
    curves, trials = {}, {}
    for arch in args.archs:
        own = [found[arch, seed] for seed in args.seeds]
        updates = min(len(curve) for _, curve, _ in own)
        curves[arch] = over_seeds(own[0][1][:updates, 0], [curve[:updates, 1] for _, curve, _ in own])
        trials[arch] = over_seeds(1 + np.arange(args.eval_trials), [values for _, _, values in own])
    draw(curves, out / "curves.png", "environment steps", "mean return of a meta-episode")
    draw(trials, out / f"trials_{args.eval_trials}.png", "trial", "mean return of a trial", trained=16)
    for row, _, _ in found.values():
        print_row(row)


if __name__ == "__main__":
    main()
