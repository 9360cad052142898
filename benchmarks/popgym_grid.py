"""All 48 tasks of POPGym with one preset and one budget, between chance and a perfect memory.

    python benchmarks/popgym_grid.py --jobs 2
    python benchmarks/popgym_grid.py --archs gru attention mlp --seeds 0 --jobs 2
    python benchmarks/popgym_grid.py --envs RepeatHard --seeds 0 -- --total-timesteps 500000

A run that is finished is not repeated and one that was stopped is resumed, so the same command goes
on where it was interrupted. Flags after ``--`` go to ppo_s5_popgym.py. In the folder --out:

    grid.csv    a row a run, added as it ends: MMER, mean return of the last checkpoint, both
                normalised: 0 for random actions, 1 for the limit of results/popgym_limits.csv
    grid.png    a bar for each memory and task, the mean over seeds of the last checkpoint
    grid.md     the same as a table
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.collect import (  # noqa: E402
    execute,
    finished_run,
    in_lanes,
    keep_rows,
    markdown,
    parse_args,
    print_row,
    read_rows,
)
from benchmarks.popgym_limits import limits, normalised  # noqa: E402
from popgym_jax import registered_envs  # noqa: E402

SCRIPT = "ppo_s5_popgym.py"


@dataclass(frozen=True)
class Args:
    """Tasks x memories x seeds."""

    envs: tuple[str, ...] = registered_envs
    """tasks, by any name that the script knows"""

    archs: tuple[str, ...] = ("s5",)
    """memories"""

    seeds: tuple[int, ...] = (0, 1, 2)
    """seeds, each a run of its own"""

    total_timesteps: int = 1_500_000
    """environment steps of a run"""

    eval_episodes: int = 512
    """episodes that evaluate the last checkpoint"""

    jobs: int = 1
    """runs at a time; if more than one, each is held to a CPU core of its own"""

    out: str = "runs/popgym_grid"
    """where runs, tables and picture go"""


def run(args: Args, flags: list[str], env: str, arch: str, seed: int, core: int | None) -> None:
    """Train and evaluate, each if need be, and add the run's row."""
    run_dir = Path(args.out) / f"{env}__{arch}__s{seed}"
    own = ["--env", env, "--arch", arch, "--seed", seed, "--total-timesteps", args.total_timesteps]
    summary = finished_run(SCRIPT, run_dir, [*own, *flags], core)
    if not (run_dir / "eval.csv").exists():
        execute(SCRIPT, ["--eval", run_dir, "--eval-episodes", args.eval_episodes], core)
    [evaluation] = read_rows(run_dir / "eval.csv")
    best = summary["best_return"]
    final = float(evaluation["return_mean"])
    row = {
        "env": summary["env"],
        "arch": arch,
        "seed": seed,
        "env_steps": summary["env_steps"],
        "best_return": round(best, 4),
        "eval_return": round(final, 4),
        "eval_error": round(float(evaluation["return_se"]), 4),
        "best_normalised": round(normalised(env, best), 4),
        "eval_normalised": round(normalised(env, final), 4),
        "steps_per_second": round(summary["steps_per_second"]),
        "minutes": round(summary["run_seconds"] / 60, 2),
        "git_commit": summary["git_commit"],
    }
    print_row(row)
    keep_rows(Path(args.out) / "grid.csv", [row], ("env", "arch", "seed"))


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean over seeds and its standard error; the error of one is nan."""
    error = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(np.mean(values)), float(error)


class Grid:
    """The rows of a table, by task and memory."""

    def __init__(self, rows: Sequence[dict[str, str]]):
        self.rows = rows
        self.archs = list(dict.fromkeys(row["arch"] for row in rows))
        done = {row["env"] for row in rows}
        self.envs = [env for env in registered_envs if env in done]

    def of_seeds(self, env: str, arch: str, column: str) -> list[float]:
        return [float(row[column]) for row in self.rows if (row["env"], row["arch"]) == (env, arch)]

    def mean(self, arch: str) -> str:
        """Normalised score over tasks, each the mean of its seeds, +- its standard error over tasks."""
        found = [self.of_seeds(env, arch, "eval_normalised") for env in self.envs]
        scores = [float(np.mean(values)) for values in found if values]
        mean, error = mean_and_error(scores)
        return f"{mean:.3f} ± {error:.3f} ({len(scores)} tasks)"


def in_words(values: Sequence[float], digits: int = 3) -> str:
    """0.982 ± 0.004, without an error if there is one value, empty if there is none."""
    if not values:
        return ""
    mean, error = mean_and_error(values)
    return f"{mean:.{digits}f}" if math.isnan(error) else f"{mean:.{digits}f} ± {error:.{digits}f}"


def table(grid: Grid) -> str:
    """Markdown: what chance, each memory and the limit return; the normalised score of each memory."""
    columns = ["task", "random", *grid.archs, "limit"]
    columns += [f"{arch}, normalised" for arch in grid.archs]
    columns += [f"{arch}, MMER normalised" for arch in grid.archs]
    lines = []
    for env in grid.envs:
        random_mean, limit = limits()[env]
        line = [env, f"{random_mean:.3f}"]
        line += [in_words(grid.of_seeds(env, arch, "eval_return")) for arch in grid.archs]
        line += [f"{limit:.3f}"]
        line += [in_words(grid.of_seeds(env, arch, "eval_normalised"), 2) for arch in grid.archs]
        line += [in_words(grid.of_seeds(env, arch, "best_normalised"), 2) for arch in grid.archs]
        lines.append(line)
    scores = [f"{arch}: {grid.mean(arch)}" for arch in grid.archs]
    return f"{markdown(columns, lines)}\n\nMean normalised score: {'; '.join(scores)}\n"


def draw(grid: Grid, picture: Path) -> None:
    """A group of bars for each task, one for each memory."""
    figure = Figure(figsize=(13, 5), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(grid.envs))
    width = 0.8 / len(grid.archs)
    for number, arch in enumerate(grid.archs):
        found = [grid.of_seeds(env, arch, "eval_normalised") or [math.nan] for env in grid.envs]
        means, errors = np.array([mean_and_error(values) for values in found]).T
        shift = (number - (len(grid.archs) - 1) / 2) * width
        axes.bar(places + shift, means, width, yerr=errors, label=arch)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.axhline(1, color="grey", linestyle=":")
    axes.set(ylabel="normalised score", xlim=(-0.6, len(grid.envs) - 0.4))
    axes.set_xticks(places, grid.envs, rotation=90, fontsize="small")
    axes.legend(fontsize="small", loc="upper left")
    figure.savefig(picture, dpi=150)


def main() -> None:
    args, flags = parse_args(Args)
    out = Path(args.out)
    runs = [(env, arch, seed) for seed in args.seeds for arch in args.archs for env in args.envs]
    in_lanes(args.jobs, partial(run, args, flags), runs)
    grid = Grid(read_rows(out / "grid.csv"))
    (out / "grid.md").write_text(table(grid))
    draw(grid, out / "grid.png")


if __name__ == "__main__":
    main()
