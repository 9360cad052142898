"""All memories side by side: a card to recall, a bit to keep, and projections to learn in context.

    python benchmarks/memories.py --tasks RepeatHard MemoryChain
    python benchmarks/memories.py --tasks Meta --archs s5 lru mingru --jobs 2

RepeatHard is POPGym's task with the default preset of PPO, MemoryChain bsuite's with 512 steps and
that of A2C, Meta MetaStatelessCartPole with PPO's ``--preset meta``. A finished run is not repeated
and one that was stopped is resumed. Flags after ``--`` go to the script. In the folder --out:

    memories.csv    a row a run: final return, steps a second, parameters, floats of the memory
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import a2c_s5_bsuite as a2c  # noqa: E402
import ppo_s5_popgym as ppo  # noqa: E402
import s5_common as common  # noqa: E402
from benchmarks.collect import (  # noqa: E402
    finished_run,
    in_lanes,
    keep_rows,
    parse_args,
    print_row,
    read_rows,
)

ARCHS = ("s5", "lru", "mingru", "lstm", "gru", "attention", "mlp")


class Task(NamedTuple):
    """What a memory is tried on."""

    script: ModuleType
    flags: tuple[str, ...]


TASKS = {
    "RepeatHard": Task(ppo, ("--env", "RepeatHard")),
    "MemoryChain": Task(a2c, ("--memory-length", "512")),
    "Meta": Task(ppo, ("--env", "MetaStatelessCartPole", "--preset", "meta")),
}


@dataclass(frozen=True)
class Args:
    """Tasks x memories x seeds."""

    tasks: tuple[Literal[tuple(TASKS)], ...] = tuple(TASKS)  # type: ignore
    """what to remember"""

    archs: tuple[str, ...] = ARCHS
    """memories"""

    seeds: tuple[int, ...] = (0,)
    """seeds, each a run of its own"""

    jobs: int = 1
    """runs at a time; if more than one, each is held to a CPU core of its own"""

    out: str = "runs/memories"
    """where runs and table go"""


def run_dir_of(args: Args, task: str, arch: str, seed: int) -> Path:
    return Path(args.out) / f"{task}__{arch}__s{seed}"


def run(args: Args, flags: list[str], task: str, arch: str, seed: int, core: int | None) -> None:
    """Train if need be."""
    own = [*TASKS[task].flags, "--arch", arch, "--seed", seed]
    script = f"{TASKS[task].script.__name__}.py"
    finished_run(script, run_dir_of(args, task, arch, seed), [*own, *flags], core)


def sizes(script: ModuleType, run_dir: Path) -> tuple[int, int]:
    """Parameters of the network, and floats that its memory holds of one environment."""
    setup = script.make_setup(common.read_args(script.Args, str(run_dir)))
    runners = jax.eval_shape(partial(script.init_runners, setup))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(runners.params)) // setup.args.num_seeds
    floats = [leaf.size for leaf in jax.tree.leaves(runners.carry) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return parameters, sum(floats) // (setup.args.num_envs * setup.args.num_seeds)


def row_of(args: Args, task: str, arch: str, seed: int) -> dict[str, Any]:
    """A row of the table, of a finished run."""
    script = TASKS[task].script
    run_dir = run_dir_of(args, task, arch, seed)
    summary = json.loads((run_dir / "summary.json").read_text())
    returns = [float(row["return_mean"]) for row in read_rows(run_dir / "metrics.csv") if row["return_mean"]]
    last = returns[-max(1, len(returns) // 10) :]
    parameters, floats = sizes(script, run_dir)
    return {
        "task": task,
        "arch": arch,
        "seed": seed,
        "env_steps": summary["env_steps"],
        "return_last_tenth": round(sum(last) / len(last), 4),
        "best_return": round(summary["best_return"], 4),
        "parameters": parameters,
        "memory_floats": floats,
        "steps_per_second": round(summary["steps_per_second"]),
        "compile_seconds": round(summary["compile_seconds"], 1),
        "minutes": round(summary["run_seconds"] / 60, 2),
        "git_commit": summary["git_commit"],
    }


def main() -> None:
    args, flags = parse_args(Args)
    runs = [(task, arch, seed) for task in args.tasks for arch in args.archs for seed in args.seeds]
    in_lanes(args.jobs, partial(run, args, flags), runs)
    for each in runs:
        row = row_of(args, *each)
        print_row(row)
        keep_rows(Path(args.out) / "memories.csv", [row], ("task", "arch", "seed"))


if __name__ == "__main__":
    main()
