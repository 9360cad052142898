"""Run muesli_s5_metarl.py on task lists x memories x seeds, and collect a CSV and pictures for each list.

    python benchmarks/metarl_runs.py --tasks CartpoleSwingup --archs s5 mlp --seeds 0 1 2
    python benchmarks/metarl_runs.py --tasks all --archs s5 lstm mlp -- --eval-interval 200
    python benchmarks/metarl_runs.py --tasks CartpoleSwingup --name cmpo-only -- --muesli-pg-coef 0

A run that is finished is not repeated and one that was stopped is resumed, so the same command goes on where it was
interrupted. Flags after ``--`` go to the script; give such runs a --name of their own. With ``-- --num-seeds 3`` a run
is three agents in one program, which compiles once. results.csv has a row for each agent and task with its final
evaluation. The in-context curves of all runs of a list are drawn into one picture.
"""

from __future__ import annotations

import csv
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.collect import finished_run, in_lanes, keep_rows, parse_args, print_row  # noqa: E402
from muesli_s5_metarl import plot_evaluations  # noqa: E402
from s5_common import plot_learning_curves  # noqa: E402

lock = Lock()  # results.csv is written by one run at a time


@dataclass(frozen=True)
class Args:
    """Task lists x memories x seeds."""

    tasks: tuple[str, ...] = ("CartpoleSwingup",)  # task lists, each separated by commas; all: the suite's own
    suite: str = "dmc"  # where the tasks are from
    archs: tuple[str, ...] = ("s5", "mlp")  # memories
    seeds: tuple[int, ...] = (0, 1, 2)  # seeds, each a run of its own
    jobs: int = 1  # runs at a time; if more than one, each is held to a CPU core of its own
    name: str = ""  # a label for runs with other flags, part of their directories' names
    out: str = "runs/metarl"  # where runs, CSV and pictures go


def directory(args: Args, tasks: str, arch: str, seed: int) -> Path:
    return Path(args.out) / "__".join(filter(None, (args.suite, tasks.replace(",", "+"), args.name, arch, f"s{seed}")))


def run(args: Args, flags: list[str], tasks: str, arch: str, seed: int, core: int | None) -> None:
    """Train if need be, and keep a row of the final evaluation for each task."""
    run_dir = directory(args, tasks, arch, seed)
    own = ["--suite", args.suite, "--arch", arch, "--seed", seed, *([] if tasks == "all" else ["--tasks", tasks])]
    summary = finished_run("muesli_s5_metarl.py", run_dir, [*own, *flags], core)
    evaluations = list(csv.DictReader((run_dir / "evaluation.csv").open()))
    about = {"suite": args.suite, "tasks": tasks, "name": args.name, "arch": arch}
    measured = {"env_steps": summary["env_steps"], "steps_per_second": round(summary["steps_per_second"])}
    measured |= {"minutes": round(summary["run_seconds"] / 60, 2), "git_commit": summary["git_commit"]}
    newest = max(int(row["update"]) for row in evaluations)
    kept = [row for row in evaluations if int(row["update"]) == newest]
    words, figures = ("seed", "task", "split"), ("return_mean", "return_se", *[f"reward_{n}" for n in range(10)])
    rounded = [{k: row[k] for k in words} | {k: round(float(row[k]), 4) for k in figures} for row in kept]
    with lock:
        for row in rounded:
            print_row(about | {name: row[name] for name in (*words, *figures[:2])})
        same = ("suite", "tasks", "name", "arch", "seed", "task")
        keep_rows(Path(args.out) / "results.csv", [about | row | measured for row in rounded], same)


def main() -> None:
    args, flags = parse_args(Args)
    runs = [(tasks, arch, seed) for tasks in args.tasks for seed in args.seeds for arch in args.archs]
    in_lanes(args.jobs, partial(run, args, flags), runs)
    for tasks in args.tasks:
        curves: dict[str, list] = {arch: [] for arch in args.archs}
        learning: dict[str, list] = {arch: [] for arch in args.archs}
        for arch in args.archs:
            for seed in args.seeds:
                run_dir = directory(args, tasks, arch, seed)
                curves[arch].extend(csv.DictReader((run_dir / "evaluation.csv").open()))
                learning[arch].extend(csv.DictReader((run_dir / "metrics.csv").open()))
        picture = "__".join(filter(None, (args.suite, tasks.replace(",", "+"), args.name)))
        plot_evaluations(curves, Path(args.out) / f"{picture}__in_context.png")
        plot_learning_curves(learning, Path(args.out) / f"{picture}__learning.png")


if __name__ == "__main__":
    main()
