"""What can be scored on each of POPGym's 48 environments: by chance, and with a perfect memory.

    # all 48
    python benchmarks/popgym_limits.py
    python benchmarks/popgym_limits.py --envs HigherLowerEasy --episodes 10000

The random policy and the reference policy of benchmarks/popgym_policies.py play --episodes episodes each. A row an
environment in --out: means and standard errors of both returns, and whether the limit is exact, which it is where no
policy can be better on average.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tyro
from gymnax.environments.spaces import gymnax_space_to_gym_space

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import popgym_jax  # noqa: E402
import s5_common as common  # noqa: E402
from benchmarks.collect import ROOT, keep_rows, print_row, read_rows  # noqa: E402
from benchmarks.popgym_policies import REFERENCES, Random, is_exact, reference_policy  # noqa: E402
from popgym_jax.registration import canonical_name, family_and_level

LIMITS = ROOT / "results" / "popgym_limits.csv"


@dataclass(frozen=True)
class Args:
    """Random and best returns of POPGym's environments."""

    envs: tuple[str, ...] = popgym_jax.registered_envs
    """environments, by any name that popgym_jax.make knows"""

    episodes: int = 2000
    """episodes of each policy"""

    seed: int = 0
    """of the episodes"""

    out: str = "runs/popgym_limits.csv"
    """the table; rows of other environments are kept"""


class Play(NamedTuple):
    """Undiscounted return and number of steps of B episodes, float64 (B,)."""

    returns: np.ndarray
    lengths: np.ndarray


class Games:
    """`size` environments of popgym_jax that play one episode each; finished ones go on, unused, with `step_env`."""

    def __init__(self, name: str, size: int, jit: Callable = jax.jit):
        self.size = size
        env, params = popgym_jax.make(name)
        self.action_space = gymnax_space_to_gym_space(env.action_space(params))

        def reset(key):
            return jax.vmap(env.reset_env, (0, None))(jax.random.split(key, size), params)

        def step_one(key, state, action):
            obs, state, reward, terminated, _ = env.step_env(key, state, action, params)
            return obs, state, reward, terminated | env.is_truncated(state, params)

        def step(key, state, action):
            key, key_now = jax.random.split(key)
            return key, *jax.vmap(step_one)(jax.random.split(key_now, size), state, action)

        self.resets = jit(reset)
        self.steps = jit(step)

    def reset(self, seed: int) -> np.ndarray:
        """First observations (B, O)."""
        self.key, key = jax.random.split(jax.random.key(seed))
        obs, self.state = self.resets(key)
        return np.asarray(obs)

    def step(self, action: np.ndarray, alive: np.ndarray) -> tuple[np.ndarray, ...]:
        """Observations (B, O), rewards (B,) and whether episodes are over (B,)."""
        self.key, obs, self.state, reward, done = self.steps(self.key, self.state, action)
        return np.asarray(obs), np.asarray(reward), np.asarray(done)


def play(games: Any, policy: Any, seed: int) -> Play:
    """One episode of each of these games."""
    policy.reset(games.size)
    obs = games.reset(seed)
    alive = np.ones(games.size, bool)
    returns = np.zeros(games.size)
    lengths = np.zeros(games.size)
    while alive.any():
        obs, reward, done = games.step(policy.act(obs), alive)
        returns += np.where(alive, reward, 0)
        lengths += alive
        alive &= ~done
    return Play(returns, lengths)


def mean_and_error(sample: np.ndarray) -> tuple[float, float]:
    return float(sample.mean()), float(sample.std(ddof=1) / np.sqrt(len(sample)))


def row_of(name: str, episodes: int, seed: int) -> dict[str, Any]:
    """A row of the table: both policies play the same episodes."""
    games = Games(name, episodes)
    random_mean, random_se = mean_and_error(play(games, Random(games.action_space), seed).returns)
    limit_mean, limit_se = mean_and_error(play(games, reference_policy(name), seed).returns)
    family, _ = family_and_level(name)
    return {
        "env": name,
        "policy": REFERENCES[family].words,
        "random_mean": round(random_mean, 4),
        "random_se": round(random_se, 4),
        "limit_mean": round(limit_mean, 4),
        "limit_se": round(limit_se, 4),
        "episodes": episodes,
        "exact": "yes" if is_exact(name) else "no",
    }


@functools.cache
def limits(table: Path = LIMITS) -> dict[str, tuple[float, float]]:
    """Of each environment in the table: the mean return of the random policy, and the limit."""
    return {row["env"]: (float(row["random_mean"]), float(row["limit_mean"])) for row in read_rows(table)}


def normalised(name: str, mean_return: float) -> float:
    """0 for the random policy, 1 for the limit of this environment, by any name that popgym_jax.make knows."""
    random_mean, limit = limits()[canonical_name(name)]
    return (mean_return - random_mean) / (limit - random_mean)


def main() -> int:
    args = tyro.cli(Args)
    if args.episodes < 2:
        raise common.UsageError(f"--episodes must be at least 2, got {args.episodes}")
    try:
        names = [canonical_name(name) for name in args.envs]
    except popgym_jax.UnknownEnvironmentError as error:
        raise common.UsageError(f"--envs: {error}") from None
    for name in names:
        row = row_of(name, args.episodes, args.seed)
        print_row(row)
        keep_rows(Path(args.out), [row], ("env",))
    return 0


if __name__ == "__main__":
    sys.exit(common.run_main(main))
