"""From a name to an environment: `make`, `registered_envs` and the spellings that are accepted."""

import difflib
from typing import Any

from gymnax.environments.environment import Environment

from popgym_jax.autoencode import Autoencode
from popgym_jax.battleship import Battleship
from popgym_jax.cartpole import (
    NoisyPositionOnlyCartPole,
    PositionOnlyCartPole,
    VelocityOnlyCartPole,
)
from popgym_jax.concentration import Concentration
from popgym_jax.count_recall import CountRecall
from popgym_jax.higher_lower import HigherLower
from popgym_jax.labyrinth import LabyrinthEscape, LabyrinthExplore
from popgym_jax.minesweeper import MineSweeper
from popgym_jax.multiarmed_bandit import MultiarmedBandit
from popgym_jax.pendulum import NoisyPositionOnlyPendulum, PositionOnlyPendulum
from popgym_jax.repeat_first import RepeatFirst
from popgym_jax.repeat_previous import RepeatPrevious

# family: its class, and the constructor arguments of Easy, Medium and Hard
FAMILIES: dict[str, tuple[type[Environment], tuple[dict[str, Any], ...]]] = {
    "RepeatFirst": (RepeatFirst, ({"num_decks": 1}, {"num_decks": 8}, {"num_decks": 16})),
    "RepeatPrevious": (
        RepeatPrevious,
        ({"num_decks": 1, "k": 4}, {"num_decks": 2, "k": 32}, {"num_decks": 3, "k": 64}),
    ),
    "PositionOnlyCartPole": (
        PositionOnlyCartPole,
        ({"max_episode_length": 200}, {"max_episode_length": 400}, {"max_episode_length": 600}),
    ),
    "NoisyPositionOnlyCartPole": (
        NoisyPositionOnlyCartPole,
        ({"noise_sigma": 0.1}, {"noise_sigma": 0.2}, {"noise_sigma": 0.3}),
    ),
    "PositionOnlyPendulum": (
        PositionOnlyPendulum,
        ({"max_episode_length": 200}, {"max_episode_length": 150}, {"max_episode_length": 100}),
    ),
    "NoisyPositionOnlyPendulum": (
        NoisyPositionOnlyPendulum,
        ({"noise_sigma": 0.1}, {"noise_sigma": 0.2}, {"noise_sigma": 0.3}),
    ),
    "VelocityOnlyCartPole": (
        VelocityOnlyCartPole,
        ({"max_episode_length": 200}, {"max_episode_length": 400}, {"max_episode_length": 600}),
    ),
    "Battleship": (Battleship, ({"board_size": 8}, {"board_size": 10}, {"board_size": 12})),
    "MineSweeper": (
        MineSweeper,
        ({"difficulty": "easy"}, {"difficulty": "medium"}, {"difficulty": "hard"}),
    ),
    "MultiarmedBandit": (
        MultiarmedBandit,
        (
            {"num_bandits": 10, "episode_length": 200},
            {"num_bandits": 20, "episode_length": 400},
            {"num_bandits": 30, "episode_length": 600},
        ),
    ),
    "Autoencode": (Autoencode, ({"num_decks": 1}, {"num_decks": 2}, {"num_decks": 3})),
    "CountRecall": (
        CountRecall,
        (
            {"num_decks": 1, "deck_type": "colors"},
            {"num_decks": 2, "deck_type": "suits"},
            {"num_decks": 4, "deck_type": "ranks"},
        ),
    ),
    "HigherLower": (HigherLower, ({"num_decks": 1}, {"num_decks": 2}, {"num_decks": 3})),
    "Concentration": (
        Concentration,
        (
            {"num_decks": 1, "deck_type": "colors"},
            {"num_decks": 2, "deck_type": "colors"},
            {"num_decks": 1, "deck_type": "ranks"},
        ),
    ),
    "LabyrinthEscape": (
        LabyrinthEscape,
        ({"maze_dims": (10, 10)}, {"maze_dims": (14, 14)}, {"maze_dims": (18, 18)}),
    ),
    "LabyrinthExplore": (
        LabyrinthExplore,
        ({"maze_dims": (10, 10)}, {"maze_dims": (14, 14)}, {"maze_dims": (18, 18)}),
    ),
}
DIFFICULTIES = ("Easy", "Medium", "Hard")

registered_envs: tuple[str, ...] = tuple(
    family + difficulty for family in FAMILIES for difficulty in DIFFICULTIES
)


class UnknownEnvironmentError(ValueError):
    """No environment has this name; the message is one line and lists the nearest names."""


def _spellings() -> dict[str, str]:
    """Every accepted spelling in lower case, without a gym id's prefix, to its canonical name."""
    spellings = {}
    for name in registered_envs:
        spellings[name.lower()] = name
        spellings[name.replace("PositionOnly", "Stateless").lower()] = name
        if name.startswith("RepeatPrevious"):  # the paper's figures write RepeatHard
            spellings[name.replace("Previous", "").lower()] = name
    return spellings


def canonical_name(name: str) -> str:
    """The registered spelling of an environment's name.

    Case does not matter. Accepted are the registered name (RepeatPreviousHard), the reference's
    gym id (popgym-RepeatPreviousHard-v0), and the paper's names: Stateless.. for PositionOnly..
    (NoisyStateless.. for NoisyPositionOnly..) and RepeatEasy, RepeatMedium, RepeatHard for
    RepeatPrevious... Raises UnknownEnvironmentError.
    """
    spellings = _spellings()
    bare = name.strip().lower().removeprefix("popgym-").removesuffix("-v0")
    if bare in spellings:
        return spellings[bare]
    near = difflib.get_close_matches(bare, spellings, n=6, cutoff=0.0)
    nearest = list(dict.fromkeys(spellings[spelling] for spelling in near))[:3]
    raise UnknownEnvironmentError(f"unknown environment {name!r}; nearest: {', '.join(nearest)}")


def make(name: str) -> tuple[Environment, Any]:
    """Environment and default parameters by name, like gymnax.make.

    name: any spelling that `canonical_name` accepts; raises UnknownEnvironmentError otherwise
    """
    name = canonical_name(name)
    family, difficulty = next(
        (name.removesuffix(level), level) for level in DIFFICULTIES if name.endswith(level)
    )
    env_class, arguments = FAMILIES[family]
    env = env_class(**arguments[DIFFICULTIES.index(difficulty)], name=name)
    return env, env.default_params
