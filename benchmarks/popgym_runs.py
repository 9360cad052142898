"""Run ppo_s5_popgym.py on tasks x memories x seeds, and collect one row a run in a CSV.

    python benchmarks/popgym_runs.py --envs RepeatHard --seeds 0 1 2 3 4 --target 0.91

One run after the other. A run that is finished is not repeated and one that was stopped is resumed,
so the same command goes on where it was interrupted. Flags after ``--`` go to the script:
``-- --total-timesteps 6000000``. The learning curves of all runs of a task are drawn into one
picture beside the CSV.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.collect import (  # noqa: E402
    finished_run,
    keep_rows,
    parse_args,
    print_row,
    read_rows,
)
from s5_common import plot_learning_curves  # noqa: E402


@dataclass(frozen=True)
class Args:
    """Tasks x memories x seeds."""

    envs: tuple[str, ...] = ("RepeatHard",)
    """tasks, by any name that the script knows"""

    archs: tuple[str, ...] = ("s5",)
    """memories"""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """seeds, each a run of its own"""

    target: float = 0.91
    """the return whose first crossing is reported"""

    out: str = "runs/results"
    """where runs, CSV and pictures go"""


def directory(args: Args, env: str, arch: str, seed: int) -> Path:
    return Path(args.out) / f"{env}__{arch}__s{seed}"


def run(args: Args, env: str, arch: str, seed: int, flags: list[str]) -> dict[str, Any]:
    """Train if need be; the row of the finished run."""
    run_dir = directory(args, env, arch, seed)
    own = ["--env", env, "--arch", arch, "--seed", seed]
    summary = finished_run("ppo_s5_popgym.py", run_dir, [*own, *flags])
    steps_to_target: int | str = ""
    seconds_to_target: float | str = ""
    for update in read_rows(run_dir / "metrics.csv"):
        if update["return_mean"] and float(update["return_mean"]) >= args.target:
            steps_to_target = int(update["env_steps"])
            # compilation included; the rate leaves the first update out, so this is an estimate
            # for its part
            running = steps_to_target / summary["steps_per_second"]
            seconds_to_target = round(summary["compile_seconds"] + running, 1)
            break
    return {
        "env": summary["env"],
        "arch": arch,
        "seed": seed,
        "env_steps": summary["env_steps"],
        "best_return": round(summary["best_return"], 4),
        "final_return": round(summary["final_return"], 4),
        "target": args.target,
        "steps_to_target": steps_to_target,
        "seconds_to_target": seconds_to_target,
        "steps_per_second": round(summary["steps_per_second"]),
        "compile_seconds": round(summary["compile_seconds"], 1),
        "minutes": round(summary["run_seconds"] / 60, 2),
        "git_commit": summary["git_commit"],
    }


def main() -> None:
    args, flags = parse_args(Args)
    out = Path(args.out)
    for env in args.envs:
        curves: dict[str, list] = {arch: [] for arch in args.archs}
        for arch in args.archs:
            for seed in args.seeds:
                row = run(args, env, arch, seed, flags)
                print_row(row)
                keep_rows(out / "results.csv", [row], ("env", "arch", "seed"))
                curves[arch] += read_rows(directory(args, env, arch, seed) / "metrics.csv")
        plot_learning_curves(curves, out / f"{env}.png")


if __name__ == "__main__":
    main()
