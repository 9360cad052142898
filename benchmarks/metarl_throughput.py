"""How many environment steps a second does muesli_s5_metarl.py do?

    # all train tasks of dmc, minutes
    python benchmarks/metarl_throughput.py
    # S5 against the LSTM at equal width
    python benchmarks/metarl_throughput.py --suite brax --archs s5 lstm
    python benchmarks/metarl_throughput.py --tasks CartpoleSwingup --quick

Environment, acting and learning apart, per task. Measured on the training program itself, one seed,
every task on its own:

    compile   seconds to trace and compile the whole train step
    physics   the meta-episode wrapper alone, with actions of zero, steps a second
    rollout   collect_rollout: acting in all slots for T steps
    update    the whole train step; learning is what it takes beyond the rollout
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import tyro
from jax import lax

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import muesli_s5_metarl as muesli
from benchmarks.timing import machine, print_table, save_json, time_in_turn, timed_compile


@dataclass(frozen=True)
class Args:
    """Throughput of Muesli on randomly projected control tasks."""

    suite: Literal["dmc", "brax", "gymnax"] = "dmc"
    """where the tasks are from"""

    tasks: str = ""
    """tasks, separated by commas; if empty, the suite's own to train on"""

    archs: tuple[Literal["s5", "lru", "mingru", "lstm", "gru", "attention", "mlp"], ...] = ("s5", "lstm")
    """memories, of equal width"""

    preset: Literal["default", "plain", "paper"] = "default"
    """flag values to measure"""

    repeats: int = 3
    """timed calls of each; one before them is not counted"""

    json: str = ""
    """file for all numbers"""

    quick: bool = False
    """tiny sizes: only shows that the script works"""


TINY: dict[str, Any] = {
    "num_envs": 8,
    "num_steps": 10,
    "num_minibatches": 2,
    "encoder_layers": (16,),
    "s5_layers": 1,
    "s5_width": 16,
    "s5_state": 8,
    "rnn_width": 16,
    "muesli_samples": 2,
}


def physics(setup: muesli.Setup, world: muesli.World, key: jax.Array) -> muesli.World:
    """T steps with actions of zero."""
    action = jnp.zeros((setup.args.num_envs, setup.action_size))

    def step(world, key):
        world, *_ = muesli.step_world(setup, key, world, action)
        return world, None

    keys = jax.random.split(key, setup.args.num_steps)
    world, _ = lax.scan(step, world, keys)
    return world


def script_args(args: Args, task: str, arch: str) -> muesli.Args:
    """The flags of the script that is measured."""
    flags = muesli.PRESETS[args.preset] | {"suite": args.suite, "tasks": task, "arch": arch}
    script = muesli.Args(**flags)
    script = replace(script, rnn_width=script.s5_width)
    if args.quick:
        script = replace(script, **TINY)
    script.check()
    return script


def measure(args: Args, task: str, arch: str) -> dict[str, Any]:
    """Steps a second, one task and memory."""
    script = script_args(args, task, arch)
    setup = muesli.make_setup(script)
    key = jax.random.PRNGKey(0)
    runner = jax.jit(partial(muesli.init_runner, setup))(key)
    world_steps, _ = timed_compile(partial(physics, setup), runner.world, key)
    rollout, _ = timed_compile(partial(muesli.collect_rollout, setup), runner)
    update, compile_seconds = timed_compile(partial(muesli.update, setup), runner)
    calls: dict[str, Callable] = {
        "physics": partial(world_steps, runner.world, key),
        "rollout": partial(rollout, runner),
        "update": partial(update, runner),
    }
    seconds = time_in_turn(calls, args.repeats)
    acting_share = seconds["rollout"].median / seconds["update"].median
    return {
        "task": task,
        "arch": arch,
        "compile": compile_seconds,
        "learning_share": max(1 - acting_share, 0.0),
        "physics": script.batch_size / seconds["physics"].median,
        "rollout": script.batch_size / seconds["rollout"].median,
        "update": script.batch_size / seconds["update"].median,
    }


HEADER = (
    "task",
    "arch",
    "compile s",
    "physics /s",
    "rollout /s",
    "update /s",
    "learning",
)


def cells(result: dict[str, Any]) -> list[str]:
    """A line of the table."""
    return [
        result["task"],
        result["arch"],
        f"{result['compile']:.1f}",
        f"{result['physics']:,.0f}",
        f"{result['rollout']:,.0f}",
        f"{result['update']:,.0f}",
        f"{result['learning_share']:.0%}",
    ]


def main() -> None:
    args = tyro.cli(Args)
    tasks = args.tasks.split(",") if args.tasks else muesli.SUITES[args.suite].train
    results = [measure(args, task, arch) for task in tasks for arch in args.archs]
    print_table(HEADER, [cells(result) for result in results], labels=2)
    if args.json:
        content = {"machine": machine(), "preset": args.preset, "results": results}
        save_json(args.json, content)


if __name__ == "__main__":
    main()
