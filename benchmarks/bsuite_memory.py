"""The paper's first figure: return, wall time and memory of a2c_s5_bsuite.py against the length of MemoryChain.

    python benchmarks/bsuite_memory.py --presets default --archs s5 --seeds 0 1 2 3 4
    python benchmarks/bsuite_memory.py --presets paper --archs s5 lstm attention --lengths 4 8 16 32 64 128
    python benchmarks/bsuite_memory.py --speed --presets default paper --archs s5 lstm attention

Without --speed it trains lengths x presets x memories x seeds, one after the other, and keeps a row a run in runs.csv.
A finished run is not repeated and a stopped one is resumed, so the same command goes on where it was interrupted. With
--speed it measures nothing but steps a second and memory, in turn and for some seconds each, into speed.csv: run it on
an idle machine. Both draw memory.png from all that the two files hold. Its wall time is that of all episodes of the
preset at the measured speed, compilation included; a hollow mark is an extrapolation, where no run of that length was
made. Memory is what the compiled program allocates.
"""

from __future__ import annotations

import csv
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import a2c_s5_bsuite as a2c  # noqa: E402
from benchmarks.collect import finished_run, keep_rows, parse_args, print_row  # noqa: E402
from benchmarks.timing import timed_call  # noqa: E402

LENGTHS = (4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)


@dataclass(frozen=True)
class Args:
    """Lengths x presets x memories x seeds."""

    lengths: tuple[int, ...] = LENGTHS  # steps to remember
    presets: tuple[str, ...] = ("default",)  # default, paper
    archs: tuple[str, ...] = ("s5",)  # s5, lstm, gru, attention, mlp
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)  # seeds, each a run of its own
    speed: bool = False  # measure speed and memory instead of training
    seconds: float = 5.0  # how long a speed is measured
    out: str = "runs/bsuite_memory"  # where runs, CSVs and picture go


def train(args: Args, preset: str, arch: str, length: int, seed: int) -> dict[str, Any]:
    """Train if need be; the row of the finished run."""
    run_dir = Path(args.out) / f"{preset}__{arch}__{length}__s{seed}"
    flags = ["--preset", preset, "--arch", arch, "--memory-length", length, "--seed", seed]
    summary = finished_run("a2c_s5_bsuite.py", run_dir, flags)
    rows = list(csv.DictReader((run_dir / "metrics.csv").open()))
    perfect = next((row for row in rows if float(row["return_mean"]) == 1.0), None)
    seconds = perfect and summary["compile_seconds"] + int(perfect["env_steps"]) / summary["steps_per_second"]
    late = [float(row["return_mean"]) for row in rows[-len(rows) // 10 :]]
    return {
        "preset": preset,
        "arch": arch,
        "length": length,
        "seed": seed,
        "episodes": int(rows[-1]["episodes"]),
        "env_steps": summary["env_steps"],
        "final_return": round(sum(late) / len(late), 4),  # of the last tenth of the episodes
        "best_return": round(summary["best_return"], 4),  # of a row of metrics.csv
        "episodes_to_1": perfect["episodes"] if perfect else "",  # the first row of metrics.csv without a failure
        "steps_to_1": perfect["env_steps"] if perfect else "",
        "minutes_to_1": round(seconds / 60, 2) if perfect else "",
        "steps_per_second": round(summary["steps_per_second"]),
        "minutes": round(summary["run_seconds"] / 60, 2),
        "git_commit": summary["git_commit"],
    }


def measure(args: Args, preset: str, arch: str, length: int) -> dict[str, Any]:
    """Speed and memory of the program that trains, without training to the end."""
    flags = a2c.PRESETS[preset] | {"arch": arch, "memory_length": length}
    whole = a2c.make_setup(a2c.Args(**flags))
    steps = whole.task.length * whole.args.num_envs  # of a round of episodes
    rounds = max(1, round(2e4 / steps))
    setup = a2c.make_setup(a2c.Args(**flags | {"num_episodes": rounds * whole.args.num_envs, "num_rows": 1}))
    runners = a2c.init_runners(setup)
    program, compile_seconds = timed_call(a2c.compile_update, setup, runners)
    taken: list[float] = []
    runners, _ = jax.block_until_ready(program(runners))
    began = time.perf_counter()
    while len(taken) < 3 or time.perf_counter() - began < args.seconds:
        runners = runners._replace(finished=jnp.zeros(1, jnp.int32))  # the history has room for one call
        (runners, _), seconds = timed_call(program, runners)
        taken.append(seconds)
    memory = program.memory_analysis()
    return {
        "preset": preset,
        "arch": arch,
        "length": length,
        "steps_per_second": round(len(taken) * rounds * steps / sum(taken)),
        "compile_seconds": round(compile_seconds, 2),
        "memory_mib": round((memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**20, 2),
        "episodes": whole.rows * whole.rounds * whole.args.num_envs,
    }


def draw(out: Path) -> None:
    """The three panels, from what there is of runs.csv and speed.csv."""
    read = {name: list(csv.DictReader((out / name).open())) for name in FILES if (out / name).exists()}
    runs, speeds = (read.get(name, []) for name in FILES)
    figure = Figure(figsize=(13, 4), layout="constrained")
    returns, walls, memories = figure.subplots(1, 3)
    for preset, arch in sorted({(row["preset"], row["arch"]) for row in runs + speeds}):
        own, fast = ([row for row in rows if (row["preset"], row["arch"]) == (preset, arch)] for rows in (runs, speeds))
        label = f"{arch}, {preset} preset"
        by_length: dict[int, list[float]] = {}
        for row in own:
            by_length.setdefault(int(row["length"]), []).append(float(row["final_return"]))
        lengths = sorted(by_length)
        (line,) = returns.plot(lengths, [sum(by_length[n]) / len(by_length[n]) for n in lengths], "o-", label=label)
        low, high = ([pick(by_length[n]) for n in lengths] for pick in (min, max))
        returns.fill_between(lengths, low, high, color=line.get_color(), alpha=0.15)
        fast = sorted(fast, key=lambda row: int(row["length"]))
        x = [int(row["length"]) for row in fast]
        y = [wall_seconds(row) for row in fast]
        style = {"color": line.get_color(), "label": label}
        walls.plot(x, y, **style)
        for n, seconds in zip(x, y, strict=True):
            walls.plot(n, seconds, "o", color=line.get_color(), fillstyle="full" if n in by_length else "none")
        memories.plot(x, [float(row["memory_mib"]) for row in fast], "o-", **style)
    for axes, title in zip((returns, walls, memories), ("mean return", "wall time (s)", "memory (MiB)"), strict=True):
        axes.set(xscale="log", xlabel="memory length", title=title)
        axes.set_xticks(LENGTHS, [str(n) for n in LENGTHS], minor=False, rotation=45)
        axes.set_xticks([], minor=True)
    for axes in (walls, memories) if speeds else ():
        axes.set_yscale("log")
    returns.legend(fontsize="small")
    figure.savefig(out / "memory.png", dpi=150)


def wall_seconds(row: dict[str, Any]) -> float:
    """All episodes of the preset at the measured speed, compilation included."""
    steps = int(row["episodes"]) * (int(row["length"]) + 1)
    return float(row["compile_seconds"]) + steps / float(row["steps_per_second"])


FILES = ("runs.csv", "speed.csv")


def main() -> None:
    args, _ = parse_args(Args)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    for length in args.lengths:
        for preset in args.presets:
            for arch in args.archs:
                if args.speed:
                    row = measure(args, preset, arch, length)
                    print_row(row | {"seconds_of_all_episodes": round(wall_seconds(row))})
                    keep_rows(out / "speed.csv", [row], ("preset", "arch", "length"))
                for seed in () if args.speed else args.seeds:
                    row = train(args, preset, arch, length, seed)
                    print_row(row)
                    keep_rows(out / "runs.csv", [row], ("preset", "arch", "length", "seed"))
    draw(out)


if __name__ == "__main__":
    main()
