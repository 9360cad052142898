"""What an agent learns in context on randomly-projected CartPole, seen from step to step.

    python benchmarks/metacart_swap.py runs/metacart/MetaStatelessCartPole__s5__s0

Plays meta-episodes of the newest checkpoint, in which the projections of observations and actions
change at the beginning of trial --at: once the memory is kept, so that what it holds is wrong from
there on, and once it is emptied. What is lost at the change is what was learnt in context. In the
folder --out:

    swap.csv    a row a trial: mean return, angle of the pole in its first 20 steps
    swap.png    angle of the pole after each step of some trials; return of each trial
"""

from __future__ import annotations

import csv
import math
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import Array, lax
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ppo_s5_popgym as ppo
import s5_common as common

FIRST_STEPS = 20
SHOWN_STEPS = 60
MEMORIES = ("kept", "emptied")


@dataclass(frozen=True)
class Args:
    """Change the projections in the middle of a meta-episode."""

    run: Annotated[str, tyro.conf.Positional]
    """directory of a run on MetaStatelessCartPole or its noisy form"""

    at: int = 9
    """first trial under the new projections"""

    episodes: int = 512
    """meta-episodes"""

    out: str = "."
    """where table and picture go"""


class Played(NamedTuple):
    """Every step of E meta-episodes; all (T, E)."""

    trial: np.ndarray  # counted from 0
    step: np.ndarray  # of the trial, counted from 0
    angle: np.ndarray  # of the pole before the step, degrees
    reward: np.ndarray  # 0 once the meta-episode is over


def play(setup: ppo.Setup, at: int, empty: bool, params: Any, key: Array) -> Played:
    """Meta-episodes whose projections change with the first step of trial ``at``.

    That step's observation was still made by the old ones.

    empty: the memory begins anew there; the agent is not told so by its start flag
    """
    batch = setup.args.num_envs
    runner = ppo.init_runner(setup, key)._replace(params=params)
    no_memory = runner.carry

    def step(loop, _):
        runner, playing = loop
        state = runner.env_state
        changes = (state.trial == at - 1) & (state.play.time == 0)

        def where_it_changes(new, old):
            return jnp.where(changes.reshape(batch, *[1] * (old.ndim - 1)), new, old)

        def of_another(x):
            return where_it_changes(jnp.roll(x, 1, axis=0), x)

        projections = {"M_o": of_another(state.play.M_o), "M_a": of_another(state.play.M_a)}
        runner = runner._replace(env_state=state.replace(play=state.play.replace(**projections)))
        if empty:
            runner = runner._replace(carry=jax.tree.map(where_it_changes, no_memory, runner.carry))

        later, rollout, _ = ppo.collect_rollout(setup, runner)
        seen = Played(
            trial=state.trial,
            step=state.play.time,
            angle=jnp.rad2deg(state.play.env_state.physics[:, 2]),
            reward=rollout.reward[0] * playing,
        )
        return (later, playing * (1.0 - later.start)), seen

    steps = setup.env_params.max_steps_in_episode
    _, played = lax.scan(step, (runner, jnp.ones(batch, jnp.float32)), length=steps)
    return played


def returns_of_trials(played: Played, trials: int) -> np.ndarray:
    """Return of each trial of each meta-episode, (E, K)."""
    returns = np.zeros((played.trial.shape[1], trials))
    for trial in range(trials):
        own = played.trial == trial
        returns[:, trial] = (played.reward * own).sum(axis=0)
    return returns


def angles_of_steps(played: Played, trial: int, steps: int) -> np.ndarray:
    """Root mean square over meta-episodes of the angle before each step of a trial, degrees, (steps,).

    Over those that stand; nan where none does.
    """
    angles = np.full(steps, np.nan)
    for step in range(steps):
        own = (played.trial == trial - 1) & (played.step == step) & (played.reward > 0)
        if own.any():
            angles[step] = np.sqrt(np.mean(played.angle[own] ** 2))
    return angles


def draw(args: Args, played: dict[str, Played], returns: dict[str, np.ndarray], picture: Path) -> None:
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    by_step, by_trial = figure.subplots(1, 2)

    kept = played["kept"]
    for label, trial in {"1": 1, "2": 2, f"{args.at - 1}": args.at - 1, f"{args.at}, changed": args.at}.items():
        by_step.plot(angles_of_steps(kept, trial, SHOWN_STEPS), label=f"trial {label}")
    emptied = angles_of_steps(played["emptied"], args.at, SHOWN_STEPS)
    by_step.plot(emptied, "--", label=f"trial {args.at}, changed, memory emptied")
    by_step.set(xlabel="step of the trial", ylabel="angle of the pole, degrees (rms)")
    by_step.legend(fontsize="small")

    for memory, of_trials in returns.items():
        trial = 1 + np.arange(of_trials.shape[1])
        error = of_trials.std(axis=0) / math.sqrt(len(of_trials) - 1)
        by_trial.errorbar(trial, of_trials.mean(axis=0), error, label=f"memory {memory}")
    by_trial.axvline(args.at - 0.5, color="grey", linestyle=":", label="projections change")
    by_trial.set(xlabel="trial", ylabel="mean return of a trial")
    by_trial.legend(fontsize="small")
    figure.savefig(picture, dpi=150)


def newest_checkpoint(run_dir: str) -> tuple[ppo.Setup, Any]:
    """A finished or stopped run: its set-up, and its first seed's parameters."""
    args = replace(common.read_args(ppo.Args, run_dir), eval=run_dir)
    setup = ppo.make_setup(args)
    run = common.RunDirectory(args, setup.env.name, "ppo_s5_popgym")
    runners = run.restore(ppo.init_runners(setup))
    return setup, jax.tree.map(lambda x: x[0], runners.params)


def main() -> int:
    args = tyro.cli(Args)
    setup, params = newest_checkpoint(args.run)
    trials = getattr(setup.env_params, "num_trials", 0)
    if not 2 <= args.at <= trials:
        raise common.UsageError(f"--at {args.at}: must be between 2 and the {trials} trials of {setup.env.name}")
    setup = setup._replace(args=replace(setup.args, num_envs=args.episodes, num_steps=1))

    played = {}
    returns = {}
    for memory in MEMORIES:
        meta_episodes = jax.jit(partial(play, setup, args.at, memory == "emptied"))
        played[memory] = jax.device_get(meta_episodes(params, jax.random.PRNGKey(0)))
        returns[memory] = returns_of_trials(played[memory], trials)

    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    with (out / "swap.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["memory", "trial", "return_mean", "return_se", "first_angle"])
        for memory, of_trials in returns.items():
            for trial in range(trials):
                own = of_trials[:, trial]
                angle = np.nanmean(angles_of_steps(played[memory], trial + 1, FIRST_STEPS))
                error = own.std() / math.sqrt(len(own) - 1)
                row = [memory, trial + 1, f"{own.mean():.4f}", f"{error:.4f}", f"{angle:.3f}"]
                writer.writerow(row)
                print(*row)
    draw(args, played, returns, out / "swap.png")
    return 0


if __name__ == "__main__":
    sys.exit(common.run_main(main))
