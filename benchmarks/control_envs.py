"""Steps per second of DeepMind Control's tasks: control_jax, MuJoCo Playground and dm_control, in one run.

    python benchmarks/control_envs.py                                  # all eleven, about 10 minutes on 2 CPU cores
    python benchmarks/control_envs.py --tasks BallInCup --quick        # a look, in a minute

control_jax and Playground (on MJX, as it comes) step B environments in a compiled scan; dm_control steps one in Python,
then one in each of as many processes as there are cores. Actions are drawn beforehand. The contenders take turns, and
the table gives medians. Playground's versions of these tasks are not the same tasks: see results/control.md.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import control_jax
import s5_common as common
from benchmarks.timing import machine, print_table, save_json, time_in_turn, timed_compile
from tests.reference.control import load

TRAIN = ("BallInCup", "CartpoleSwingup", "FingerSpin", "FingerTurnHard", "PointMass", "ReacherEasy")
HEADER = (
    "task",
    "engine",
    "control_jax",
    "compile s",
    "Playground",
    "compile s",
    "dm_control",
    "on all cores",
    "ratio",
)


@dataclass(frozen=True)
class Args:
    """Speed of the DeepMind Control tasks."""

    tasks: tuple[str, ...] = control_jax.registered_envs
    """tasks to measure"""

    batch: int = 256
    """environments side by side, B"""

    length: int = 200
    """control steps of a scan"""

    reference_steps: int = 2000
    """steps of dm_control in a round and process"""

    repeats: int = 3
    """rounds, in each of which every contender is timed once"""

    playground: bool = True
    """measure MuJoCo Playground too, which takes up to a minute a task to compile"""

    quick: bool = False
    """tiny sizes: only shows that it works"""

    json: str = ""
    """file for all numbers"""


def scan_of(reset: Callable, step: Callable, size: int, batch: int, length: int) -> tuple[Callable, float]:
    """A function that takes length x batch steps, and the seconds that it took to compile.

    reset: key -> state; step: state, action -> state, reward
    """
    keys = jax.random.split(jax.random.PRNGKey(0), batch)
    state = jax.jit(jax.vmap(reset))(keys)
    actions = jax.random.uniform(keys[0], (length, batch, size), jnp.float32, -1.0, 1.0)

    def scan(state: Any, actions: jax.Array) -> Any:
        return jax.lax.scan(jax.vmap(step), state, actions)

    compiled, seconds = timed_compile(scan, state, actions)
    return partial(compiled, state, actions), seconds


def ours(name: str, args: Args) -> tuple[Callable, float, str]:
    """As scan_of, and the engine's name."""
    env, params = control_jax.make(name)

    def step(state: Any, action: jax.Array) -> tuple[Any, jax.Array]:
        obs, state, reward, *_ = env.step_env(None, state, action, params)
        return state, reward + 0.0 * obs.sum()

    call, seconds = scan_of(lambda key: env.reset_env(key, params)[1], step, env.num_actions, args.batch, args.length)
    return call, seconds, env.engine


def playground(name: str, args: Args) -> tuple[Callable, float]:
    """As scan_of. PointMassHard is not one of Playground's; its PointMass costs the same."""
    from mujoco_playground import dm_control_suite

    env = dm_control_suite.load(name.replace("PointMassHard", "PointMass"), config_overrides={"impl": "jax"})

    def step(state: Any, action: jax.Array) -> tuple[Any, jax.Array]:
        state = env.step(state, action)
        return state, state.reward + 0.0 * state.obs.sum()

    return scan_of(env.reset, step, env.action_size, args.batch, args.length)


def play_reference(name: str, steps: int) -> float:
    """Seconds of so many steps of dm_control."""
    env = load(name, seed=0)
    actions = np.random.default_rng(0).uniform(-1, 1, (steps, *env.action_spec().shape))
    env.reset()
    began = time.perf_counter()
    for action in actions:
        if env.step(action).last():
            env.reset()
    return time.perf_counter() - began


def measure(name: str, args: Args, pool: Any) -> dict[str, Any]:
    """All figures of one task; rates in control steps a second."""
    call, compile_seconds, engine = ours(name, args)
    calls = {"control_jax": call}
    row: dict[str, Any] = {"task": name, "engine": engine, "compile": compile_seconds}
    if args.playground:
        calls["playground"], row["playground_compile"] = playground(name, args)
    seconds = time_in_turn(calls, args.repeats)
    for contender, timing in seconds.items():
        row[contender] = args.batch * args.length / timing.median
    row["dm_control"] = args.reference_steps / play_reference(name, args.reference_steps)
    cores = os.cpu_count() or 1
    taken = pool.starmap(play_reference, [(name, args.reference_steps)] * cores, chunksize=1)
    row["dm_control_all_cores"] = cores * args.reference_steps / max(taken)
    return row


def cells(row: dict[str, Any]) -> list[str]:
    """A line of the table."""
    theirs = ["-", "-"]
    if "playground" in row:
        theirs = [f"{row['playground']:,.0f}", f"{row['playground_compile']:.1f}"]
    ratio = row["control_jax"] / row["dm_control_all_cores"]
    return [
        row["task"],
        row["engine"],
        f"{row['control_jax']:,.0f}",
        f"{row['compile']:.1f}",
        *theirs,
        f"{row['dm_control']:,.0f}",
        f"{row['dm_control_all_cores']:,.0f}",
        f"{ratio:.0f}x",
    ]


def main() -> int:
    args = tyro.cli(Args)
    if args.quick:
        args = Args(args.tasks, 4, 3, 20, 1, playground=False, quick=True, json=args.json)
    unknown = [name for name in args.tasks if name not in control_jax.registered_envs]
    if unknown:
        raise common.UsageError(f"--tasks {unknown[0]}: must be of {', '.join(control_jax.registered_envs)}")
    rows = []
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        for name in args.tasks:
            print(f"measuring {name}", file=sys.stderr)
            rows.append(measure(name, args, pool))
    print(f"{machine()['device']}; control steps a second, B = {args.batch}, medians of {args.repeats} rounds\n")
    print_table(HEADER, [cells(row) for row in rows], labels=2)
    for contender in ("control_jax", "playground"):
        rates = [row[contender] for row in rows if row["task"] in TRAIN and contender in row]
        if len(rates) == len(TRAIN):
            together = len(rates) / sum(1 / rate for rate in rates)
            print(f"the six training tasks in turn, {contender}: {together:,.0f}")
    if args.json:
        save_json(args.json, {"args": vars(args), "rows": rows, "machine": machine()})
    return 0


if __name__ == "__main__":
    sys.exit(common.run_main(main))
