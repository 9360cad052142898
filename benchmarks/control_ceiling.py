"""How well is each of DeepMind Control's eleven tasks learnt without projections, with the memory on?

    # all of them, an hour of one core in all
    python benchmarks/control_ceiling.py --jobs 2
    python benchmarks/control_ceiling.py --tasks ReacherEasy ReacherHard

A task that is not learnt so cannot be learnt through random projections either. A run that is
finished is not repeated and one that was stopped is resumed. Flags after ``--`` go to
muesli_s5_metarl.py. In the folder --out:

    ceiling.csv    a row a task: final return, frames, minutes, frames to 95 % of the last tenth's return
    ceiling.png    mean return during training, a panel a task
"""

from __future__ import annotations

import json
import math
import shlex
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.collect import (  # noqa: E402
    finished_run,
    in_lanes,
    keep_rows,
    parse_args,
    print_row,
    read_rows,
)
from muesli_s5_metarl import SUITES  # noqa: E402

SCRIPT = "muesli_s5_metarl.py"
TASKS = SUITES["dmc"].train + SUITES["dmc"].held_out
FLAGS = shlex.split("--preset plain --no-projection --scale-obs --state-std --action-repeat 4 --learning-rate 4e-3")
FINGER_FLAGS = ("--action-repeat", 2)  # a finger moves by its own length within four steps
# the spinner turns once in ten decisions: what a stroke is worth shows soon
OWN_FLAGS = {"FingerSpin": ("--gamma", 0.95, "--learning-rate", 2e-3)}
FRAMES = 16_000_000
LONGER = {"PointMassHard": 60_000_000, "PendulumSwingup": 60_000_000}  # 84 and 172 after 16e6, and rising
LONGER |= {"FingerSpin": 40_000_000}  # 575 after 12e6


@dataclass(frozen=True)
class Args:
    """One run a task."""

    tasks: tuple[str, ...] = TASKS
    """tasks, each learnt alone"""

    seed: int = 0
    """seed of all runs"""

    jobs: int = 1
    """runs at a time; if more than one, each is held to a CPU core of its own"""

    out: str = "runs/ceiling"
    """where runs, table and picture go"""


def flags_of(task: str) -> list[Any]:
    """Those of its run."""
    frames = LONGER.get(task, FRAMES)
    flags = ["--tasks", task, *FLAGS, "--total-timesteps", frames]
    if task.startswith("Finger"):
        flags += FINGER_FLAGS
    flags += OWN_FLAGS.get(task, ())
    return flags


def run(args: Args, flags: list[str], task: str, core: int | None) -> None:
    finished_run(SCRIPT, Path(args.out) / task, [*flags_of(task), "--seed", args.seed, *flags], core)


def learning_curve(run_dir: Path, task: str, points: int = 100) -> tuple[np.ndarray, np.ndarray]:
    """Frames and mean return of the meta-episodes that ended around them, both (N,)."""
    frames = []
    returns = []
    for row in read_rows(run_dir / "metrics.csv"):
        if row[f"return_{task}"]:
            frames.append(float(row["env_steps"]))
            returns.append(float(row[f"return_{task}"]))
    parts = min(points, len(frames))
    mean_of_parts = [[part.mean() for part in np.array_split(values, parts)] for values in (frames, returns)]
    return np.array(mean_of_parts[0]), np.array(mean_of_parts[1])


def row_of(args: Args, task: str, frames: np.ndarray, returns: np.ndarray) -> dict[str, Any]:
    """A row of the table, for a task and its learning curve."""
    run_dir = Path(args.out) / task
    summary = json.loads((run_dir / "summary.json").read_text())
    (final,) = [row for row in read_rows(run_dir / "evaluation.csv") if row["task"] == task][-1:]
    plateau = returns[-max(1, len(returns) // 10) :].mean()
    nearly = int(np.argmax(returns >= 0.95 * plateau))
    minutes = summary["run_seconds"] / 60
    return {
        "task": task,
        "seed": args.seed,
        "return_mean": round(float(final["return_mean"]), 1),
        "return_se": round(float(final["return_se"]), 1),
        "frames": summary["env_steps"],
        "minutes": round(minutes, 2),
        "frames_to_95_percent": round(frames[nearly]),
        "minutes_to_95_percent": round(minutes * frames[nearly] / summary["env_steps"], 2),
        "git_commit": summary["git_commit"],
    }


def draw(curves: dict[str, tuple[np.ndarray, np.ndarray]], picture: Path) -> None:
    """A panel a task, of its frames and returns."""
    columns = min(4, len(curves))
    lines = math.ceil(len(curves) / 4)
    figure = Figure(figsize=(2.6 * columns, 2.0 * lines), layout="constrained")
    for place, (task, (frames, returns)) in enumerate(curves.items(), start=1):
        axes = figure.add_subplot(lines, columns, place)
        axes.plot(frames / 1e6, returns)
        axes.axhline(800, color="grey", linewidth=0.8, linestyle=":")
        axes.set(title=task, ylim=(0, 1000), xlabel="million frames", ylabel="return")
    figure.savefig(picture, dpi=150)


def main() -> None:
    args, flags = parse_args(Args)
    in_lanes(args.jobs, partial(run, args, flags), [(task,) for task in args.tasks])
    out = Path(args.out)
    curves = {task: learning_curve(out / task, task) for task in args.tasks}
    rows = [row_of(args, task, *curve) for task, curve in curves.items()]
    keep_rows(out / "ceiling.csv", rows, ("task", "seed"))
    draw(curves, out / "ceiling.png")
    for row in rows:
        print_row(row)


if __name__ == "__main__":
    main()
