"""The paper's first figure: a2c_s5_bsuite.py against the length of MemoryChain.

    python benchmarks/bsuite_memory.py --presets default --archs s5 --seeds 0 1 2 3 4
    python benchmarks/bsuite_memory.py --presets paper --archs s5 lstm attention --lengths 4 8 16 32 64 128
    python benchmarks/bsuite_memory.py --speed --presets default paper --archs s5 lstm attention

Its return, wall time and memory. Without --speed it trains lengths x presets x memories x seeds,
one after the other, and keeps a row a run in runs.csv. A finished run is not repeated and a stopped
one is resumed, so the same command goes on where it was interrupted. Flags after ``--`` go to
a2c_s5_bsuite.py: ``-- --adam-eps 1e-8``.
With --speed it measures nothing but steps a second and memory, in turn and for some seconds each,
into speed.csv: run it on an idle machine. Both draw memory.png from all that the two files hold.
Its wall time is that of all episodes of the preset at the measured speed, compilation included; a
hollow mark is an extrapolation, where no run of that length was made. Memory is what the compiled
program allocates.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from matplotlib.axes import Axes
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import a2c_s5_bsuite as a2c  # noqa: E402
import s5_common as common  # noqa: E402
from benchmarks.collect import (  # noqa: E402
    finished_run,
    keep_rows,
    parse_args,
    print_row,
    read_rows,
)
from benchmarks.timing import timed_call  # noqa: E402

LENGTHS = (4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
Row = dict[str, Any]


@dataclass(frozen=True)
class Args:
    """Lengths x presets x memories x seeds."""

    lengths: tuple[int, ...] = LENGTHS
    """steps to remember"""

    presets: tuple[str, ...] = ("default",)
    """default, paper"""

    archs: tuple[str, ...] = ("s5",)
    """s5, lru, mingru, lstm, gru, attention, mlp"""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """seeds, each a run of its own"""

    speed: bool = False
    """measure speed and memory instead of training"""

    seconds: float = 5.0
    """how long a speed is measured"""

    out: str = "runs/bsuite_memory"
    """where runs, CSVs and picture go"""


def train(args: Args, preset: str, arch: str, length: int, seed: int, flags: Sequence[str] = ()) -> Row:
    """Train if need be; the row of the finished run."""
    run_dir = Path(args.out) / f"{preset}__{arch}__{length}__s{seed}"
    own = ["--preset", preset, "--arch", arch, "--memory-length", length, "--seed", seed]
    summary = finished_run("a2c_s5_bsuite.py", run_dir, [*own, *flags])
    rows = read_rows(run_dir / "metrics.csv")
    late = [float(row["return_mean"]) for row in rows[-len(rows) // 10 :]]
    first_perfect = {"episodes_to_1": "", "steps_to_1": "", "minutes_to_1": ""}
    for row in rows:
        if float(row["return_mean"]) == 1.0:
            first_perfect = to_perfect(summary, row)
            break
    return {
        "preset": preset,
        "arch": arch,
        "length": length,
        "seed": seed,
        "episodes": int(rows[-1]["episodes"]),
        "env_steps": summary["env_steps"],
        "final_return": round(sum(late) / len(late), 4),  # of the last tenth of the episodes
        "best_return": round(summary["best_return"], 4),  # of a row of metrics.csv
        **first_perfect,
        "steps_per_second": round(summary["steps_per_second"]),
        "minutes": round(summary["run_seconds"] / 60, 2),
        "git_commit": summary["git_commit"],
    }


def to_perfect(summary: dict[str, Any], perfect: dict[str, str]) -> Row:
    """What it took up to the first row of metrics.csv without a failure."""
    acting_and_learning = int(perfect["env_steps"]) / summary["steps_per_second"]
    seconds = summary["compile_seconds"] + acting_and_learning
    return {
        "episodes_to_1": perfect["episodes"],
        "steps_to_1": perfect["env_steps"],
        "minutes_to_1": round(seconds / 60, 2),
    }


def measure(args: Args, preset: str, arch: str, length: int) -> Row:
    """Speed and memory of the program that trains, without training to the end."""
    flags = a2c.Args(**a2c.PRESETS[preset] | {"arch": arch, "memory_length": length})
    whole = a2c.make_setup(flags)
    steps = whole.task.length * whole.args.num_envs  # of a round of episodes
    rounds = max(1, round(2e4 / steps))
    few = replace(flags, num_episodes=rounds * whole.args.num_envs, num_rows=1)
    setup = a2c.make_setup(few)
    runners = a2c.init_runners(setup)
    program, compile_seconds = timed_call(a2c.compile_update, setup, runners)

    taken: list[float] = []
    runners, _ = jax.block_until_ready(program(runners))
    began = time.perf_counter()
    while len(taken) < 3 or time.perf_counter() - began < args.seconds:
        # the history has room for one call
        runners = runners._replace(finished=jnp.zeros(1, jnp.int32))
        (runners, _), seconds = timed_call(program, runners)
        taken.append(seconds)

    memory = program.memory_analysis()
    allocated = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    return {
        "preset": preset,
        "arch": arch,
        "length": length,
        "steps_per_second": round(len(taken) * rounds * steps / sum(taken)),
        "compile_seconds": round(compile_seconds, 2),
        "memory_mib": round(allocated / 2**20, 2),
        "episodes": whole.rows * whole.rounds * whole.args.num_envs,
    }


def draw(out: Path) -> None:
    """The three panels, from what there is of runs.csv and speed.csv."""
    runs = read_rows(out / "runs.csv") if (out / "runs.csv").exists() else []
    speeds = read_rows(out / "speed.csv") if (out / "speed.csv").exists() else []
    figure = Figure(figsize=(13, 4), layout="constrained")
    returns, walls, memories = figure.subplots(1, 3)
    for preset, arch in sorted({(row["preset"], row["arch"]) for row in runs + speeds}):
        label = f"{arch}, {preset} preset"
        by_length = returns_by_length(of_kind(runs, preset, arch))
        color = draw_returns(returns, by_length, label)

        measured = of_kind(speeds, preset, arch)
        measured.sort(key=lambda row: int(row["length"]))
        lengths = [int(row["length"]) for row in measured]
        seconds = [wall_seconds(row) for row in measured]
        walls.plot(lengths, seconds, color=color, label=label)
        for x, y in zip(lengths, seconds, strict=True):
            filled = "full" if x in by_length else "none"
            walls.plot(x, y, "o", color=color, fillstyle=filled)
        allocated = [float(row["memory_mib"]) for row in measured]
        memories.plot(lengths, allocated, "o-", color=color, label=label)

    returns.set_title("mean return")
    walls.set_title("wall time (s)")
    memories.set_title("memory (MiB)")
    for axes in (returns, walls, memories):
        axes.set(xscale="log", xlabel="memory length")
        axes.set_xticks(LENGTHS, [str(n) for n in LENGTHS], minor=False, rotation=45)
        axes.set_xticks([], minor=True)
    if speeds:
        walls.set_yscale("log")
        memories.set_yscale("log")
    returns.legend(fontsize="small")
    figure.savefig(out / "memory.png", dpi=150)


def of_kind(rows: list[Row], preset: str, arch: str) -> list[Row]:
    return [row for row in rows if row["preset"] == preset and row["arch"] == arch]


def returns_by_length(runs: list[Row]) -> dict[int, list[float]]:
    """The final returns of all seeds, from the shortest memory to the longest."""
    found: dict[int, list[float]] = {}
    for row in sorted(runs, key=lambda row: int(row["length"])):
        found.setdefault(int(row["length"]), []).append(float(row["final_return"]))
    return found


def draw_returns(axes: Axes, by_length: dict[int, list[float]], label: str) -> Any:
    """Mean over seeds in a band from the lowest to the highest; returns the colour."""
    lengths = list(by_length)
    means = [sum(returns) / len(returns) for returns in by_length.values()]
    (line,) = axes.plot(lengths, means, "o-", label=label)
    low = [min(returns) for returns in by_length.values()]
    high = [max(returns) for returns in by_length.values()]
    axes.fill_between(lengths, low, high, color=line.get_color(), alpha=0.15)
    return line.get_color()


def wall_seconds(row: Row) -> float:
    """All episodes of the preset at the measured speed, compilation included."""
    steps = int(row["episodes"]) * (int(row["length"]) + 1)
    return float(row["compile_seconds"]) + steps / float(row["steps_per_second"])


def main() -> int:
    args, flags = parse_args(Args)
    if args.speed and flags:
        raise common.UsageError(f"--speed: not together with flags for the script, -- {shlex.join(flags)}")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    for length in args.lengths:
        for preset in args.presets:
            for arch in args.archs:
                if args.speed:
                    row = measure(args, preset, arch, length)
                    print_row(row | {"seconds_of_all_episodes": round(wall_seconds(row))})
                    keep_rows(out / "speed.csv", [row], ("preset", "arch", "length"))
                else:
                    for seed in args.seeds:
                        row = train(args, preset, arch, length, seed, flags)
                        print_row(row)
                        keep_rows(out / "runs.csv", [row], ("preset", "arch", "length", "seed"))
    draw(out)
    return 0


if __name__ == "__main__":
    sys.exit(common.run_main(main))
