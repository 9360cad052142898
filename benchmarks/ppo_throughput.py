"""How many environment steps a second does ppo_s5_popgym.py do?

    # some minutes on 2 idle CPU cores
    python benchmarks/ppo_throughput.py
    python benchmarks/ppo_throughput.py --archs s5 gru --presets paper --json throughput.json

Acting and learning apart, for every --arch, measured on the training program itself, one seed:

    compile    seconds to trace and compile the whole train step, with every flag as the preset has it
    rollout    collect_rollout alone: acting in B environments for T steps
    update     the whole train step; learning is what it takes beyond the rollout

An update of the paper preset learns from its 65,536 steps 30 times, which takes a CPU minutes. So
presets are timed with no more than --max-epochs passes, in a train step compiled anew with that
many, and the seconds of a full update are rollout + epochs x seconds an epoch. Where a preset has
more passes the table marks that figure with "~".
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ppo_s5_popgym as ppo
import s5_common as common
from benchmarks.timing import machine, print_table, save_json, timed_call, timed_compile

Arch = Literal["s5", "s5-noreset", "lru", "mingru", "lstm", "gru", "attention", "mlp"]


@dataclass(frozen=True)
class Args:
    """Throughput of PPO on POPGym: acting, learning and compilation."""

    env: str = "RepeatPreviousHard"
    """environment"""

    archs: tuple[Arch, ...] = ("s5", "gru", "attention", "mlp")
    """memories; s5-noreset does the same work as s5. Attention at the paper's sizes is slow on a CPU"""

    presets: tuple[Literal["default", "paper"], ...] = ("default", "paper")
    """flag values to measure"""

    updates: int = 3
    """timed updates, and timed rollouts; one of each before them is not counted"""

    max_epochs: int = 2
    """passes over a rollout that are timed; a preset with more is extrapolated"""

    json: str = ""
    """file for all numbers"""

    quick: bool = False
    """tiny sizes: only shows that the script works"""


TINY = {
    "num_envs": 4,
    "num_steps": 16,
    "num_minibatches": 2,
    "update_epochs": 2,
    "encoder_layers": (16,),
    "decoder_layers": (16,),
    "s5_layers": 1,
    "s5_width": 16,
    "s5_state": 8,
    "attention_window": 8,
}


def measure(args: Args, arch: str, preset: str) -> dict[str, Any]:
    """One arch and preset: seconds of compilation, rollout, epoch and update, and steps a second."""
    tiny = TINY if args.quick else {}
    flags = ppo.Args(**ppo.PRESETS[preset] | tiny | {"env": args.env, "arch": arch})
    setup = ppo.make_setup(flags)
    runners = ppo.init_runners(setup)
    train_step, compile_seconds = timed_call(ppo.compile_update, setup, runners)

    runner = jax.tree.map(lambda leaf: leaf[0], runners)
    rollout, rollout_compile_seconds = timed_compile(partial(ppo.collect_rollout, setup), runner)
    rollout_seconds = []
    for _ in range(args.updates + 1):
        _, seconds = timed_call(rollout, runner)
        rollout_seconds.append(seconds)
    rollout_seconds = rollout_seconds[1:]

    epochs = min(flags.update_epochs, args.max_epochs)
    if epochs < flags.update_epochs:
        with_fewer = ppo.make_setup(replace(flags, update_epochs=epochs))
        train_step = ppo.compile_update(with_fewer, runners)
    update_seconds = []
    for _ in range(args.updates + 1):
        # takes the memory of its operand: no second use
        (runners, _), seconds = timed_call(train_step, runners)
        update_seconds.append(seconds)
    update_seconds = update_seconds[1:]

    act = statistics.median(rollout_seconds)
    epoch = max(statistics.median(update_seconds) - act, 1e-9) / epochs
    learn = epoch * flags.update_epochs
    return {
        "preset": preset,
        "arch": arch,
        "sizes": {name: getattr(flags, name) for name in SIZES},
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(runner.params)),
        "compile_seconds": compile_seconds,
        "rollout_compile_seconds": rollout_compile_seconds,
        "rollout_seconds": rollout_seconds,
        "update_seconds": update_seconds,
        "epochs_timed": epochs,
        "extrapolated": epochs < flags.update_epochs,
        "epoch_seconds": epoch,
        "full_update_seconds": act + learn,
        "rollout_steps_per_second": flags.batch_size / act,
        "epoch_steps_per_second": flags.batch_size / epoch,
        "learning_steps_per_second": flags.batch_size / learn,
        "steps_per_second": flags.batch_size / (act + learn),
    }


SIZES = (
    "num_envs",
    "num_steps",
    "num_minibatches",
    "update_epochs",
    "s5_layers",
    "s5_width",
    "s5_state",
)


HEADER = (
    "preset",
    "arch",
    "compile s",
    "rollout",
    "one epoch",
    "learning",
    "whole",
    "epoch s",
    "update s",
)


def cells(row: dict[str, Any]) -> list[str]:
    """A line of the table."""
    about = "~" if row["extrapolated"] else ""
    return [
        row["preset"],
        row["arch"],
        f"{row['compile_seconds']:.1f}",
        f"{row['rollout_steps_per_second']:,.0f}",
        f"{row['epoch_steps_per_second']:,.0f}",
        f"{about}{row['learning_steps_per_second']:,.0f}",
        f"{about}{row['steps_per_second']:,.0f}",
        f"{row['epoch_seconds']:.2f}",
        f"{about}{row['full_update_seconds']:.2f}",
    ]


def main() -> int:
    args = tyro.cli(Args)
    rows = []
    for preset in args.presets:
        for arch in args.archs:
            print(f"measuring {arch}, {preset} preset", file=sys.stderr)
            rows.append(measure(args, arch, preset))
    about = machine()
    tiny = ", tiny sizes" if args.quick else ""
    print(f"PPO on {args.env}, {about['device']}; medians of {args.updates} updates{tiny}")
    sizes = {row["preset"]: row["sizes"] for row in rows}
    for preset, values in sizes.items():
        words = [f"{name} {value}" for name, value in values.items()]
        print(f"  {preset}: {', '.join(words)}")
    print("rollout to whole: environment steps a second.", end=" ")
    print("One epoch passes once over a rollout, learning all epochs;")
    print("whole is rollout and learning together;", end=" ")
    print("~ extrapolated from fewer epochs than the preset has\n")
    print_table(HEADER, [cells(row) for row in rows], labels=2)
    if args.json:
        save_json(args.json, {"args": vars(args), "rows": rows, **about})
    return 0


if __name__ == "__main__":
    sys.exit(common.run_main(main))
