"""From a name to an environment: `make`, `registered_envs`, `meta_envs`, accepted spellings."""

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
from popgym_jax.meta_cartpole import MetaNoisyStatelessCartPole, MetaStatelessCartPole
from popgym_jax.minesweeper import MineSweeper
from popgym_jax.multiarmed_bandit import MultiarmedBandit
from popgym_jax.pendulum import NoisyPositionOnlyPendulum, PositionOnlyPendulum
from popgym_jax.repeat_first import RepeatFirst
from popgym_jax.repeat_previous import RepeatPrevious

# family: its class, and its constructor's arguments in Easy, Medium and Hard
FAMILIES: dict[str, tuple[type[Environment], dict[str, tuple[Any, Any, Any]]]] = {
    "Autoencode": (Autoencode, {"num_decks": (1, 2, 3)}),
    "Battleship": (Battleship, {"board_size": (8, 10, 12)}),
    "Concentration": (
        Concentration,
        {"num_decks": (1, 2, 1), "deck_type": ("colors", "colors", "ranks")},
    ),
    "CountRecall": (
        CountRecall,
        {"num_decks": (1, 2, 4), "deck_type": ("colors", "suits", "ranks")},
    ),
    "HigherLower": (HigherLower, {"num_decks": (1, 2, 3)}),
    "LabyrinthEscape": (LabyrinthEscape, {"maze_dims": ((10, 10), (14, 14), (18, 18))}),
    "LabyrinthExplore": (LabyrinthExplore, {"maze_dims": ((10, 10), (14, 14), (18, 18))}),
    "MineSweeper": (MineSweeper, {"difficulty": ("easy", "medium", "hard")}),
    "MultiarmedBandit": (
        MultiarmedBandit,
        {"num_bandits": (10, 20, 30), "episode_length": (200, 400, 600)},
    ),
    "NoisyPositionOnlyCartPole": (NoisyPositionOnlyCartPole, {"noise_sigma": (0.1, 0.2, 0.3)}),
    "NoisyPositionOnlyPendulum": (NoisyPositionOnlyPendulum, {"noise_sigma": (0.1, 0.2, 0.3)}),
    "PositionOnlyCartPole": (PositionOnlyCartPole, {"max_episode_length": (200, 400, 600)}),
    "PositionOnlyPendulum": (PositionOnlyPendulum, {"max_episode_length": (200, 150, 100)}),
    "RepeatFirst": (RepeatFirst, {"num_decks": (1, 8, 16)}),
    "RepeatPrevious": (RepeatPrevious, {"num_decks": (1, 2, 3), "k": (4, 32, 64)}),
    "VelocityOnlyCartPole": (VelocityOnlyCartPole, {"max_episode_length": (200, 400, 600)}),
}
DIFFICULTIES = ("Easy", "Medium", "Hard")

registered_envs: tuple[str, ...] = tuple(
    family + difficulty for family in FAMILIES for difficulty in DIFFICULTIES
)

# environments that POPGym does not have, each in one difficulty
META: dict[str, type[Environment]] = {
    "MetaStatelessCartPole": MetaStatelessCartPole,
    "MetaNoisyStatelessCartPole": MetaNoisyStatelessCartPole,
}
meta_envs: tuple[str, ...] = tuple(META)


class UnknownEnvironmentError(ValueError):
    """No environment has this name; the message is one line and lists the nearest names."""


def _spellings() -> dict[str, str]:
    """Every accepted spelling in lower case, without a gym id's prefix, to its canonical name."""
    spellings = {"noisymetastatelesscartpole": "MetaNoisyStatelessCartPole"}
    for name in registered_envs + meta_envs:
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
    RepeatPrevious..., NoisyMeta.. for MetaNoisy... Raises UnknownEnvironmentError.
    """
    spellings = _spellings()
    bare = name.strip().lower().removeprefix("popgym-").removesuffix("-v0")
    if bare in spellings:
        return spellings[bare]
    near = difflib.get_close_matches(bare, spellings, n=6, cutoff=0.0)
    names = [spellings[spelling] for spelling in near]
    nearest = ", ".join(list(dict.fromkeys(names))[:3])  # each name once
    raise UnknownEnvironmentError(f"unknown environment {name!r}; nearest: {nearest}")


def family_and_level(name: str) -> tuple[str, int]:
    """A name of registered_envs: its key in FAMILIES, and 0, 1, 2 for Easy, Medium, Hard."""
    difficulty = next(word for word in DIFFICULTIES if name.endswith(word))
    return name.removesuffix(difficulty), DIFFICULTIES.index(difficulty)


def make(name: str, **arguments: Any) -> tuple[Environment, Any]:
    """Environment and default parameters by name, like gymnax.make.

    name: any spelling that `canonical_name` accepts; raises UnknownEnvironmentError otherwise
    arguments: of the environment's constructor, in place of those that the name stands for
    """
    name = canonical_name(name)
    if name in META:
        env = META[name](**arguments, name=name)
    else:
        family, level = family_and_level(name)
        env_class, levels = FAMILIES[family]
        of_level = {argument: values[level] for argument, values in levels.items()}
        env = env_class(**of_level | arguments, name=name)
    return env, env.default_params
