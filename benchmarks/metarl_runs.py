"""Run muesli_s5_metarl.py on task lists x memories x seeds: a CSV, and pictures for each list.

    python benchmarks/metarl_runs.py --tasks CartpoleSwingup --archs s5 mlp --seeds 0 1 2
    python benchmarks/metarl_runs.py --tasks all --archs s5 lstm mlp -- --eval-interval 200
    python benchmarks/metarl_runs.py --tasks CartpoleSwingup --name cmpo-only -- --muesli-pg-coef 0

A run that is finished is not repeated and one that was stopped is resumed, so the same command
goes on where it was interrupted. Flags after ``--`` go to the script; give such runs a --name of
their own. With ``-- --num-seeds 3`` a run is three agents in one program, which compiles once.
results.csv has a row for each agent and task with its final evaluation. The in-context curves of
all finished runs of a list with these memories are drawn into one picture, those of other --seeds too.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.collect import (  # noqa: E402
    finished_run,
    in_lanes,
    keep_rows,
    parse_args,
    print_row,
    read_rows,
)
from muesli_s5_metarl import plot_evaluations  # noqa: E402
from s5_common import plot_learning_curves  # noqa: E402

SCRIPT = "muesli_s5_metarl.py"
REWARDS = tuple(f"reward_{tenth}" for tenth in range(10))  # of a meta-episode's tenths


@dataclass(frozen=True)
class Args:
    """Task lists x memories x seeds."""

    tasks: tuple[str, ...] = ("CartpoleSwingup",)
    """task lists, each separated by commas; all: the suite's own"""

    suite: str = "dmc"
    """where the tasks are from"""

    archs: tuple[str, ...] = ("s5", "mlp")
    """memories"""

    seeds: tuple[int, ...] = (0, 1, 2)
    """seeds, each a run of its own"""

    jobs: int = 1
    """runs at a time; if more than one, each is held to a CPU core of its own"""

    name: str = ""
    """a label for runs with other flags, part of their directories' names"""

    out: str = "runs/metarl"
    """where runs, CSV and pictures go"""


def label(args: Args, tasks: str) -> str:
    """How names of directories and pictures begin."""
    parts = (args.suite, tasks.replace(",", "+"), args.name)
    return "__".join(part for part in parts if part)


def directory(args: Args, tasks: str, arch: str, seed: int) -> Path:
    return Path(args.out) / f"{label(args, tasks)}__{arch}__s{seed}"


def run(args: Args, flags: list[str], tasks: str, arch: str, seed: int, core: int | None) -> None:
    """Train if need be, and keep a row of the final evaluation for each agent and task."""
    run_dir = directory(args, tasks, arch, seed)
    own: list[Any] = ["--suite", args.suite, "--arch", arch, "--seed", seed]
    if tasks != "all":
        own += ["--tasks", tasks]
    summary = finished_run(SCRIPT, run_dir, [*own, *flags], core)

    evaluations = read_rows(run_dir / "evaluation.csv")
    newest = max(int(evaluation["update"]) for evaluation in evaluations)
    rows = []
    for evaluation in evaluations:
        if int(evaluation["update"]) == newest:
            row: dict[str, Any] = {
                "suite": args.suite,
                "tasks": tasks,
                "name": args.name,
                "arch": arch,
                "seed": evaluation["seed"],
                "task": evaluation["task"],
                "split": evaluation["split"],
            }
            for figure in ("return_mean", "return_se", *REWARDS):
                row[figure] = round(float(evaluation[figure]), 4)
            row["env_steps"] = summary["env_steps"]
            row["steps_per_second"] = round(summary["steps_per_second"])
            row["minutes"] = round(summary["run_seconds"] / 60, 2)
            row["git_commit"] = summary["git_commit"]
            rows.append(row)

    shown = ("suite", "tasks", "name", "arch", "seed", "task", "split", "return_mean", "return_se")
    for row in rows:
        print_row({name: row[name] for name in shown})
    same = ("suite", "tasks", "name", "arch", "seed", "task")
    keep_rows(Path(args.out) / "results.csv", rows, same)


def draw(args: Args, tasks: str) -> None:
    """The in-context curves and the learning curves of all finished runs of a task list."""
    in_context: dict[str, list] = {}
    learning: dict[str, list] = {}
    for arch in args.archs:
        in_context[arch] = []
        learning[arch] = []
        runs = sorted(Path(args.out).glob(f"{label(args, tasks)}__{arch}__s*/summary.json"))
        for run_dir in [summary.parent for summary in runs]:
            in_context[arch] += read_rows(run_dir / "evaluation.csv")
            learning[arch] += read_rows(run_dir / "metrics.csv")
    out = Path(args.out)
    plot_evaluations(in_context, out / f"{label(args, tasks)}__in_context.png")
    plot_learning_curves(learning, out / f"{label(args, tasks)}__learning.png")


def main() -> None:
    args, flags = parse_args(Args)
    runs = []
    for tasks in args.tasks:
        for seed in args.seeds:
            for arch in args.archs:
                runs.append((tasks, arch, seed))
    in_lanes(args.jobs, partial(run, args, flags), runs)
    for tasks in args.tasks:
        draw(args, tasks)


if __name__ == "__main__":
    main()
