"""Run muesli_s5_metarl.py on task lists x memories x seeds, one after the other; collect a CSV and one picture a list.

    python benchmarks/metarl_runs.py --tasks CartpoleSwingup --archs s5 mlp --seeds 0 1 2
    python benchmarks/metarl_runs.py --tasks all --archs s5 lstm mlp -- --eval-interval 200
    python benchmarks/metarl_runs.py --tasks CartpoleSwingup --name cmpo-only -- --muesli-pg-coef 0

A run that is finished is not repeated and one that was stopped is resumed, so the same command goes on where it was
interrupted. Flags after ``--`` go to the script; give such runs a --name of their own. results.csv has a row for each
run and task with its final evaluation. The in-context curves of all runs of a list are drawn into one picture.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from muesli_s5_metarl import plot_evaluations  # noqa: E402
from s5_common import plot_learning_curves  # noqa: E402


@dataclass(frozen=True)
class Args:
    """Task lists x memories x seeds."""

    tasks: tuple[str, ...] = ("CartpoleSwingup",)  # task lists, each separated by commas; all: the suite's own
    suite: str = "dmc"  # where the tasks are from
    archs: tuple[str, ...] = ("s5", "mlp")  # memories
    seeds: tuple[int, ...] = (0, 1, 2)  # seeds, each a run of its own
    name: str = ""  # a label for runs with other flags, part of their directories' names
    out: str = "runs/metarl"  # where runs, CSV and pictures go


def run(args: Args, tasks: str, arch: str, seed: int, flags: list[str]) -> tuple[Path, list[dict]]:
    """Train if need be; directory and rows of the finished run, one for each task."""
    label = "all" if tasks == "all" else tasks.replace(",", "+")
    run_dir = Path(args.out) / "__".join(filter(None, (args.suite, label, args.name, arch, f"s{seed}")))
    command = [sys.executable, str(ROOT / "muesli_s5_metarl.py")]
    fresh = ["--suite", args.suite, "--arch", arch, "--seed", str(seed), "--run-dir", str(run_dir), *flags]
    fresh += [] if tasks == "all" else ["--tasks", tasks]
    if not (run_dir / "summary.json").exists():
        subprocess.run(command + (["--resume", str(run_dir)] if run_dir.exists() else fresh), check=True)
    summary = json.loads((run_dir / "summary.json").read_text())
    evaluations = list(csv.DictReader((run_dir / "evaluation.csv").open()))
    about = {"suite": args.suite, "tasks": tasks, "name": args.name, "arch": arch, "seed": seed}
    measured = {"env_steps": summary["env_steps"], "steps_per_second": round(summary["steps_per_second"])}
    measured |= {"minutes": round(summary["run_seconds"] / 60, 2), "git_commit": summary["git_commit"]}
    newest = max(int(row["update"]) for row in evaluations)
    kept = [row for row in evaluations if int(row["update"]) == newest]
    names = ("task", "split", "return_mean", "return_se", *[f"reward_{n}" for n in range(10)])
    rounded = [{k: row[k] if k in ("task", "split") else round(float(row[k]), 4) for k in names} for row in kept]
    return run_dir, [about | row | measured for row in rounded]


def main() -> None:
    words = sys.argv[1:]
    split = words.index("--") if "--" in words else len(words)
    args, flags = tyro.cli(Args, args=words[:split]), words[split + 1 :]
    table = Path(args.out) / "results.csv"
    table.parent.mkdir(parents=True, exist_ok=True)
    done = list(csv.DictReader(table.open())) if table.exists() else []
    same = ("suite", "tasks", "name", "arch", "seed", "task")
    for tasks in args.tasks:
        curves: dict[str, list] = {}
        learning: dict[str, list] = {}
        for arch in args.archs:
            for seed in args.seeds:
                run_dir, rows = run(args, tasks, arch, seed, flags)
                for row in rows:
                    print(", ".join(f"{name} {row[name]}" for name in (*same, "split", "return_mean")), flush=True)
                fresh = {tuple(str(row[k]) for k in same) for row in rows}
                done = [old for old in done if tuple(str(old[k]) for k in same) not in fresh] + rows
                with table.open("w", newline="") as file:
                    writer = csv.DictWriter(file, list(rows[0]))
                    writer.writeheader()
                    writer.writerows(done)
                curves.setdefault(arch, []).extend(csv.DictReader((run_dir / "evaluation.csv").open()))
                learning.setdefault(arch, []).extend(csv.DictReader((run_dir / "metrics.csv").open()))
        picture = "__".join(filter(None, (args.suite, tasks.replace(",", "+"), args.name)))
        plot_evaluations(curves, Path(args.out) / f"{picture}__in_context.png")
        plot_learning_curves(learning, Path(args.out) / f"{picture}__learning.png")


if __name__ == "__main__":
    main()
