"""Whether this checkout computes what another revision did.

    python benchmarks/same_numbers.py HEAD~3

Short runs of all scripts in both, whose metrics.csv are compared: for a change that should alter
how the code reads and nothing else. Every memory, two presets, two seeds and several tasks of each
script; the tables have to be equal bit for bit. Ends with exit code 1 if one is not, and prints the
largest relative difference. Networks and rollouts are small, the number of layers is the preset's
own.
"""

from __future__ import annotations

import contextlib
import csv
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

ROOT = Path(__file__).resolve().parent.parent
PPO = "ppo_s5_popgym"
A2C = "a2c_s5_bsuite"
MUESLI = "muesli_s5_metarl"
# flags that make runs small
NETWORK = {
    "encoder_layers": 16,
    "s5_width": 16,
    "s5_state": 8,
    "num_seeds": 2,
}
SMALL = {
    PPO: {
        **NETWORK,
        "num_envs": 8,
        "num_steps": 64,
        "num_minibatches": 2,
        "update_epochs": 2,
        "total_timesteps": 1536,
        "decoder_layers": 16,
    },
    A2C: {
        **NETWORK,
        "num_episodes": 64,
        "num_rows": 4,
    },
    MUESLI: {
        **NETWORK,
        "rnn_width": 16,
        "num_envs": 12,
        "num_steps": 50,
        "meta_steps": 100,
        "num_minibatches": 2,
        "muesli_samples": 4,
        "total_timesteps": 1800,
        "eval_episodes": 2,
    },
}


@dataclass(frozen=True)
class Args:
    """Compare with another revision."""

    base: Annotated[str, tyro.conf.Positional]
    """the revision to compare with, as git names it"""

    scripts: tuple[str, ...] = (PPO, A2C, MUESLI)
    """which of them"""


def cases() -> list[tuple[str, list[str]]]:
    """Script and flags of every run."""
    found = []

    def add(script, *own):
        flags = list(own)
        for name, value in SMALL[script].items():
            flags += [f"--{name.replace('_', '-')}", str(value)]
        found.append((script, flags))

    for preset in ("default", "paper"):
        for arch in ("s5", "s5-noreset", "gru", "attention", "mlp"):
            add(PPO, "--preset", preset, "--arch", arch, "--env", "RepeatPreviousEasy")
        for arch in ("s5", "lstm", "gru", "attention", "mlp"):
            add(A2C, "--preset", preset, "--arch", arch, "--memory-length", "40")
        for arch in ("s5", "lstm", "gru", "mlp"):
            tasks = ["--suite", "gymnax", "--tasks", "Pendulum-v1"]
            held_out = ["--eval-tasks", "MountainCarContinuous-v0"]
            add(MUESLI, "--preset", preset, "--arch", arch, *tasks, *held_out)
    for env in ("PositionOnlyPendulumHard", "LabyrinthEscapeEasy"):
        add(PPO, "--env", env)
    add(PPO, "--preset", "meta", "--env", "MetaStatelessCartPole")
    for env in ("UmbrellaChain", "Catch", "DeepSea", "DiscountingChain", "SimpleBandit"):
        add(A2C, "--env", env)
    tasks = ["--tasks", "CartpoleSwingup,PendulumSwingup"]
    held_out = ["--eval-tasks", "CartpoleBalance"]
    add(MUESLI, *tasks, *held_out, "--state-std", "--muesli-unroll", "2")
    return found


@contextlib.contextmanager
def checked_out(revision: str) -> Iterator[Path]:
    """A folder with the files of this revision, while it is needed."""
    git = ["git", "-C", str(ROOT), "worktree"]
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "base"
        subprocess.run([*git, "add", "--detach", str(tree), revision], check=True)
        try:
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def tables(tree: Path, script: str, flags: list[str]) -> dict[str, bytes]:
    """The tables that a run of the script in this tree leaves."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        words = [sys.executable, str(tree / f"{script}.py"), *flags, "--run-dir", str(run)]
        subprocess.run(words, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        return {path.name: path.read_bytes() for path in sorted(run.glob("*.csv"))}


def largest_difference(ours: bytes, theirs: bytes) -> float:
    """Of two tables' numbers, relative to the larger one.

    Infinite where the tables differ in shape or words.
    """
    rows = list(csv.reader(ours.decode().splitlines()))
    others = list(csv.reader(theirs.decode().splitlines()))
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
    with checked_out(args.base) as base:
        for script, flags in cases():
            if script not in args.scripts:
                continue
            ours = tables(ROOT, script, flags)
            theirs = tables(base, script, flags)
            verdict = "equal"
            if ours != theirs:
                differing += 1
                both = ours.keys() & theirs.keys()
                largest = max(largest_difference(ours[name], theirs[name]) for name in both)
                verdict = f"DIFFERS by {largest:.1e}"
            print(f"{verdict}: {script} {' '.join(flags[:6])}", flush=True)
    print(f"{differing} of the runs differ from {args.base}")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
