"""Steps per second of every environment of popgym_jax beside the reference package popgym.

    # all 48, about 10 minutes on 2 CPU cores
    python benchmarks/popgym_envs.py
    # a look, in half a minute
    python benchmarks/popgym_envs.py --envs RepeatHard --quick

All in one run on one machine. The reference steps one environment in Python, with its raw
observation; "flat" adds gymnasium's flatten, which turns it into the vector that popgym_jax gives.
popgym_jax steps B environments in a compiled scan, B = 1, 64 and 4096, which splits the keys,
resets what has ended and keeps every observation. Actions are drawn beforehand on both sides. All
contenders take turns; the table gives medians. "jax.random" is B = 4096 again with the keys split
by jax.random.split instead of popgym_jax.prng.split, which returns the same keys.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import tyro
from gymnasium.spaces.utils import flatten

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import popgym_jax
import s5_common as common
from benchmarks.timing import machine, print_table, save_json, time_in_turn, timed_compile
from popgym_jax import prng
from tests.reference import make_reference

BATCHES = (1, 64, 4096)
COLUMNS = ("popgym", "flat", *(f"B = {B}" for B in BATCHES), "jax.random")
HEADER = ("environment", *COLUMNS, "ratio", "to flat", "compile s")


@dataclass(frozen=True)
class Args:
    """Environment speed, popgym_jax beside popgym."""

    envs: tuple[str, ...] = popgym_jax.registered_envs
    """environments to measure"""

    repeats: int = 5
    """rounds, in each of which every contender is timed once"""

    reference_steps: int = 10_000
    """steps of the reference in a round"""

    length: int = 1024
    """time steps of a scan; as long as the longest episode, so that resets have their share"""

    quick: bool = False
    """fewer rounds and steps, to see that it works"""

    json: str = ""
    """also write all numbers to this file"""


def reference_play(name: str, steps: int) -> dict[str, Any]:
    """Functions that take so many steps of the reference, with its raw and its flat observation."""
    env = make_reference(name)
    env.action_space.seed(0)
    actions = [env.action_space.sample() for _ in range(steps)]
    env.reset(seed=0)

    def raw():
        for action in actions:
            _, _, terminated, truncated, _ = env.step(action)
            if terminated or truncated:
                env.reset()

    def flat():
        for action in actions:
            obs, _, terminated, truncated, _ = env.step(action)
            flatten(env.observation_space, obs)
            if terminated or truncated:
                flatten(env.observation_space, env.reset()[0])

    return {"popgym": raw, "flat": flat}


def our_play(name: str, batch: int, length: int, split: Any) -> tuple[Any, float]:
    """A function that takes length x batch steps, and the seconds that it took to compile."""
    env, params = popgym_jax.make(name)
    space = env.action_space(params)
    key = jax.random.key(0)
    action_keys = jax.random.split(key, (length, batch))
    actions = jax.jit(jax.vmap(jax.vmap(space.sample)))(action_keys)
    opening = jax.jit(jax.vmap(env.reset, (0, None)))(split(key, batch), params)
    step_all = jax.vmap(env.step, (0, 0, 0, None))

    def scan(opening, key, actions):
        def step(current, inputs):
            _, state = current
            key, action = inputs
            obs, state, reward, *_ = step_all(split(key, batch), state, action, params)
            return (obs, state), reward.mean()  # the carry keeps the observation alive

        step_keys = jax.random.split(key, length)
        return jax.lax.scan(step, opening, (step_keys, actions))

    compiled, seconds = timed_compile(scan, opening, key, actions)
    return partial(compiled, opening, key, actions), seconds


def measure(name: str, args: Args) -> dict[str, Any]:
    """All rates of one environment, in steps per second."""
    calls = reference_play(name, args.reference_steps)
    steps = dict.fromkeys(calls, args.reference_steps)
    compile_seconds = {}

    def add(label, batch, split):
        length = args.length * (16 if batch == 1 else 1)
        calls[label], compile_seconds[label] = our_play(name, batch, length, split)
        steps[label] = length * batch

    for batch in BATCHES:
        add(f"B = {batch}", batch, prng.split)
    add("jax.random", BATCHES[-1], jax.random.split)

    seconds = time_in_turn(calls, args.repeats)
    rates = {label: steps[label] / taken.median for label, taken in seconds.items()}
    largest = f"B = {BATCHES[-1]}"
    return {
        "env": name,
        "steps_per_second": rates,
        "ratio": rates[largest] / rates["popgym"],
        "to_flat": rates[largest] / rates["flat"],
        "compile_seconds": compile_seconds[largest],
    }


def cells(row: dict[str, Any]) -> list[str]:
    """A line of the table."""
    return [
        row["env"],
        *[f"{rate:,.0f}" for rate in row["steps_per_second"].values()],
        f"{row['ratio']:.0f}x",
        f"{row['to_flat']:.0f}x",
        f"{row['compile_seconds']:.2f}",
    ]


def main() -> int:
    args = tyro.cli(Args)
    if args.quick:
        args = replace(args, repeats=1, reference_steps=1000, length=64)
    try:
        names = [popgym_jax.make(name)[0].name for name in args.envs]
    except popgym_jax.UnknownEnvironmentError as error:
        raise common.UsageError(f"--envs: {error}") from None
    rows = []
    for name in names:
        print(f"measuring {name}", file=sys.stderr)
        rows.append(measure(name, args))
    about = machine()
    print(f"{about['device']}; steps per second, medians of {args.repeats} rounds;", end=" ")
    print(f"ratio = B = {BATCHES[-1]} to popgym\n")
    print_table(HEADER, [cells(row) for row in rows])
    if args.json:
        save_json(args.json, {"args": vars(args), "rows": rows, **about})
    return 0


if __name__ == "__main__":
    sys.exit(common.run_main(main))
