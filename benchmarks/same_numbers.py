"""Whether this checkout computes what another revision did: short runs of all scripts in both, metrics.csv compared.

    python benchmarks/same_numbers.py HEAD~3

For a change that should alter how the code reads and nothing else. Every memory, two presets, two seeds and several
tasks of each script; the tables have to be equal bit for bit. Ends with exit code 1 if one is not, and prints the
largest relative difference. Networks and rollouts are small, the number of layers is the preset's own.
"""

from __future__ import annotations

import csv
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

ROOT = Path(__file__).resolve().parent.parent
NETWORK = ["--encoder-layers", "16", "--s5-width", "16", "--s5-state", "8", "--num-seeds", "2"]
PPO = [*NETWORK, "--num-envs", "8", "--num-steps", "64", "--num-minibatches", "2", "--update-epochs", "2"]
PPO += ["--total-timesteps", "1536", "--decoder-layers", "16"]
A2C = [*NETWORK, "--num-episodes", "64", "--num-rows", "4"]
MUESLI = [*NETWORK, "--rnn-width", "16", "--num-envs", "12", "--num-steps", "50", "--meta-steps", "100"]
MUESLI += ["--num-minibatches", "2", "--muesli-samples", "4", "--total-timesteps", "1800", "--eval-episodes", "2"]


@dataclass(frozen=True)
class Args:
    """Compare with another revision."""

    base: Annotated[str, tyro.conf.Positional]  # the revision to compare with, as git names it
    scripts: tuple[str, ...] = ("ppo_s5_popgym", "a2c_s5_bsuite", "muesli_s5_metarl")  # which of them


def cases() -> list[tuple[str, list[str]]]:
    """Script and flags of every run."""
    found = []
    for preset in ("default", "paper"):
        for arch in ("s5", "s5-noreset", "gru", "attention", "mlp"):
            found.append(("ppo_s5_popgym", ["--preset", preset, "--arch", arch, "--env", "RepeatPreviousEasy", *PPO]))
        for arch in ("s5", "lstm", "gru", "attention", "mlp"):
            found.append(("a2c_s5_bsuite", ["--preset", preset, "--arch", arch, "--memory-length", "40", *A2C]))
        for arch in ("s5", "lstm", "gru", "mlp"):
            tasks = ["--suite", "gymnax", "--tasks", "Pendulum-v1", "--eval-tasks", "MountainCarContinuous-v0"]
            found.append(("muesli_s5_metarl", ["--preset", preset, "--arch", arch, *tasks, *MUESLI]))
    for env in ("PositionOnlyPendulumHard", "LabyrinthEscapeEasy"):
        found.append(("ppo_s5_popgym", ["--env", env, *PPO]))
    found.append(("ppo_s5_popgym", ["--preset", "meta", "--env", "MetaStatelessCartPole", *PPO]))
    for env in ("UmbrellaChain", "Catch", "DeepSea", "DiscountingChain", "SimpleBandit"):
        found.append(("a2c_s5_bsuite", ["--env", env, *A2C]))
    tasks = ["--tasks", "CartpoleSwingup,PendulumSwingup", "--eval-tasks", "CartpoleBalance"]
    found.append(("muesli_s5_metarl", [*tasks, "--state-std", "--muesli-unroll", "2", *MUESLI]))
    return found


def tables(tree: Path, script: str, flags: list[str]) -> dict[str, bytes]:
    """The tables that a run of the script in this tree leaves."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        words = [sys.executable, str(tree / f"{script}.py"), *flags, "--run-dir", str(run)]
        subprocess.run(words, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        return {path.name: path.read_bytes() for path in sorted(run.glob("*.csv"))}


def largest_difference(ours: bytes, theirs: bytes) -> float:
    """Of two tables' numbers, relative to the larger one; infinite where they differ in shape or words."""
    rows, others = (list(csv.reader(table.decode().splitlines())) for table in (ours, theirs))
    if [len(row) for row in rows] != [len(row) for row in others]:
        return float("inf")
    largest = 0.0
    for x, y in zip(sum(rows, []), sum(others, []), strict=True):
        if x != y:
            try:
                scale = max(abs(float(x)), abs(float(y)))
                largest = max(largest, abs(float(x) - float(y)) / scale)
            except ValueError:
                return float("inf")
    return largest


def main() -> int:
    args = tyro.cli(Args)
    differing = 0
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        subprocess.run(["git", "-C", str(ROOT), "worktree", "add", "--detach", str(base), args.base], check=True)
        try:
            for script, flags in cases():
                if script in args.scripts:
                    ours, theirs = tables(ROOT, script, flags), tables(base, script, flags)
                    equal = ours == theirs
                    differing += not equal
                    both = ours.keys() & theirs.keys()
                    most = max(largest_difference(ours[name], theirs[name]) for name in both)
                    print(
                        f"{'equal' if equal else f'DIFFERS by {most:.1e}'}: {script} {' '.join(flags[:6])}", flush=True
                    )
        finally:
            subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(base)], check=True)
    print(f"{differing} of the runs differ from {args.base}")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
