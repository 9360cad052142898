"""In-context learning on randomly-projected CartPole.

Trains variants x seeds, evaluates on more trials, draws both.

    # 5 memories, 3 seeds, 16 trials, tested on 64
    python benchmarks/metacart.py
    # two runs at a time, each on a core of its own
    python benchmarks/metacart.py --jobs 2
    # what each part of the preset is worth
    python benchmarks/metacart.py --variants s5 no-discount no-readout no-change
    python benchmarks/metacart.py --variants s5 mlp --seeds 0 -- --total-timesteps 1000000

A run that is finished is not repeated and one that was stopped is resumed, so the same command
goes on where it was interrupted. Flags after ``--`` go to ppo_s5_popgym.py, behind --preset meta.
In the folder --out:

    metacart.csv    one row a run: MMER, return per trial in groups of trials, steps, minutes
    curves.png      mean return of a meta-episode during training
    trials_64.png   mean return of each trial in evaluation, with actions sampled as in training

Both pictures show the mean over seeds and +- its standard error.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.collect import (  # noqa: E402
    execute,
    finished_run,
    in_lanes,
    keep_rows,
    parse_args,
    print_row,
    read_rows,
)

SCRIPT = "ppo_s5_popgym.py"
# first and last of the trials whose mean return is a column of the table
GROUPS = ((1, 1), (2, 4), (5, 8), (9, 12), (13, 16), (17, 24), (25, 32), (33, 64))


# flags behind --preset meta
VARIANTS: dict[str, tuple[str, ...]] = {
    "s5": (),
    "s5-noreset": ("--arch", "s5-noreset"),
    "gru": ("--arch", "gru"),
    "attention": ("--arch", "attention"),
    "mlp": ("--arch", "mlp"),
    "told": ("--aux-coef", "1"),  # in training, what the projections are
    "no-discount": ("--trial-discount", "1"),
    "no-readout": ("--readout", "plain"),
    "no-change": ("--obs-change", "0"),
    "only-discount": ("--readout", "plain", "--obs-change", "0"),
    "only-readout": ("--trial-discount", "1", "--obs-change", "0"),
    "only-change": ("--trial-discount", "1", "--readout", "plain"),
    "none": ("--trial-discount", "1", "--readout", "plain", "--obs-change", "0"),
}


@dataclass(frozen=True)
class Args:
    """Variants x seeds on MetaStatelessCartPole."""

    env: str = "MetaStatelessCartPole"
    """or MetaNoisyStatelessCartPole, or one of examples/learning_in_context.py"""

    variants: tuple[Literal[tuple(VARIANTS)], ...] = ("s5", "s5-noreset", "gru", "attention", "mlp")  # type: ignore
    """memories, and the preset with a part more or less"""

    seeds: tuple[int, ...] = (0, 1, 2)
    """seeds, each a run of its own"""

    eval_trials: int = 64
    """trials of a meta-episode in evaluation"""

    eval_episodes: int = 512
    """meta-episodes in evaluation"""

    jobs: int = 1
    """runs at a time; if more than one, each is held to a CPU core of its own"""

    out: str = "runs/metacart"
    """where runs, table and pictures go"""


class Finished(NamedTuple):
    """What a finished run has left."""

    row: dict[str, Any]  # its row of the table
    env_steps: np.ndarray  # at each of U updates, (U,)
    returns: np.ndarray  # of a meta-episode at each update, (U,)
    trial_returns: np.ndarray  # of each trial in evaluation, (K,)


class Curve(NamedTuple):
    """The mean over seeds and its standard error; all (N,)."""

    x: np.ndarray
    mean: np.ndarray
    error: np.ndarray


def directory(args: Args, variant: str, seed: int) -> Path:
    env = args.env.split(":")[-1]
    return Path(args.out) / f"{env}__{variant}__s{seed}"


def run(args: Args, flags: list[str], variant: str, seed: int, core: int | None) -> None:
    """Train and evaluate one run, each if need be."""
    run_dir = directory(args, variant, seed)
    own = ["--env", args.env, "--preset", "meta", *VARIANTS[variant], "--seed", seed]
    finished_run(SCRIPT, run_dir, [*own, *flags], core)
    if not (run_dir / f"trials_{args.eval_trials}.csv").exists():
        evaluate = ["--eval", run_dir]
        evaluate += ["--eval-trials", args.eval_trials]
        evaluate += ["--eval-episodes", args.eval_episodes]
        execute(SCRIPT, evaluate, core)


def read(args: Args, variant: str, seed: int) -> Finished:
    run_dir = directory(args, variant, seed)
    summary = json.loads((run_dir / "summary.json").read_text())
    metrics = read_rows(run_dir / "metrics.csv")
    evaluation = run_dir / f"trials_{args.eval_trials}.csv"
    trial_returns = np.loadtxt(evaluation, delimiter=",", skiprows=1)[:, 2]

    row = {
        "env": summary["env"],
        "variant": variant,
        "seed": seed,
        "env_steps": summary["env_steps"],
        "best_return": round(summary["best_return"], 4),
        "final_return": round(summary["final_return"], 4),
    }
    for first, last in GROUPS:
        if last <= len(trial_returns):
            mean = trial_returns[first - 1 : last].mean()
            row[f"trials_{first}_{last}"] = round(float(mean), 4)
    row["steps_per_second"] = round(summary["steps_per_second"])
    row["minutes"] = round(summary["run_seconds"] / 60, 2)
    row["git_commit"] = summary["git_commit"]
    return Finished(
        row=row,
        env_steps=np.array([float(update["env_steps"]) for update in metrics]),
        returns=np.array([float(update["return_mean"] or "nan") for update in metrics]),
        trial_returns=trial_returns,
    )


def over_seeds(x: np.ndarray, values: list[np.ndarray]) -> Curve:
    """Mean and standard error of the curves of several seeds; the error is 0 if there is one."""
    stacked = np.stack(values)
    spread = np.zeros_like(stacked[0])
    if len(values) > 1:
        spread = stacked.std(axis=0, ddof=1)
    return Curve(x=x, mean=stacked.mean(axis=0), error=spread / np.sqrt(len(values)))


def draw(curves: dict[str, Curve], picture: Path, xlabel: str, ylabel: str, trained: int = 0) -> None:
    """A line with a band of +- its error for each label.

    trained: the last trial that training had, which is marked
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for label, curve in curves.items():
        axes.plot(curve.x, curve.mean, label=label)
        low = curve.mean - curve.error
        high = curve.mean + curve.error
        axes.fill_between(curve.x, low, high, alpha=0.25)
    if trained:
        axes.axvline(trained + 0.5, color="grey", linestyle=":", label=f"trained on {trained} trials")
    axes.set(xlabel=xlabel, ylabel=ylabel)
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(picture, dpi=150)


def main() -> None:
    args, flags = parse_args(Args)
    out = Path(args.out)
    runs = [(variant, seed) for seed in args.seeds for variant in args.variants]
    in_lanes(args.jobs, partial(run, args, flags), runs)

    found = {(variant, seed): read(args, variant, seed) for variant, seed in runs}
    rows = [finished.row for finished in found.values()]
    keep_rows(out / "metacart.csv", rows, ("env", "variant", "seed"))

    curves = {}
    trials = {}
    for variant in args.variants:
        of_seeds = [found[variant, seed] for seed in args.seeds]
        updates = min(len(finished.returns) for finished in of_seeds)
        returns = [finished.returns[:updates] for finished in of_seeds]
        curves[variant] = over_seeds(of_seeds[0].env_steps[:updates], returns)
        trial_returns = [finished.trial_returns for finished in of_seeds]
        trials[variant] = over_seeds(1 + np.arange(args.eval_trials), trial_returns)
    draw(curves, out / "curves.png", "environment steps", "mean return of a meta-episode")
    picture = out / f"trials_{args.eval_trials}.png"
    draw(trials, picture, "trial", "mean return of a trial", trained=16)
    for row in rows:
        print_row(row)


if __name__ == "__main__":
    main()
