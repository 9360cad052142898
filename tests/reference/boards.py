"""Bridges of Battleship and MineSweeper: nothing is random after the reset, so the board is all that crosses.

Random play never wins, so policies that look at the hidden board play for the rarer endings.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from popgym.envs.minesweeper import HiddenSquare

from popgym_jax import boards
from tests.reference import Bridge, Scripted


def unpack(words: np.ndarray, num_squares: int) -> np.ndarray:
    """Boards as bits, uint32 (..., words), as bool (..., num_squares)."""
    square = np.arange(num_squares)
    return (np.asarray(words)[..., square // 32] >> (square % 32) & 1).astype(bool)


class Board(Bridge):
    def start(self, env: Any, params: Any, draw: Any, hidden: dict[str, Any]) -> tuple[Any, Any]:
        obs, state = env.reset_env(jax.random.key(0), params)
        return obs, state.replace(**hidden)


def pick(reference: Any, squares: np.ndarray) -> int:
    return int(reference.np_random.choice(squares))


def afloat(reference: Any) -> np.ndarray:
    """Squares of ships that were not hit yet."""
    return np.flatnonzero((reference.board == 1) & (reference.guesses == 0))


def wasted(reference: Any) -> int:
    """A guess that misses: water, new or not, or a ship's square once more."""
    return pick(reference, np.flatnonzero((reference.board == 0) | (reference.guesses == 1)))


def hunt(reference: Any) -> int:
    """A hit with every guess."""
    return pick(reference, afloat(reference))


def hunt_clumsily(reference: Any) -> int:
    """Half of the guesses are hits; every kind of miss in between."""
    return hunt(reference) if reference.np_random.random() < 0.5 else wasted(reference)


def sink_with_the_last_guess(reference: Any) -> int:
    """Misses until only hits will do: terminated and truncated at once."""
    left = reference.max_episode_length - reference.num_steps
    return wasted(reference) if left > len(afloat(reference)) else hunt(reference)


def waste_the_last_guess(reference: Any) -> int:
    """All but one square sunk early, and that one never."""
    return hunt(reference) if len(afloat(reference)) > 1 else wasted(reference)


class Battleship(Board):
    policies = (None, hunt, hunt_clumsily, sink_with_the_last_guess, waste_the_last_guess)

    def hidden(self, reference: Any) -> dict[str, np.ndarray]:
        return {"afloat": boards.pack(reference.board.ravel() == 1)}

    def insert(self, reference: Any, state: Any, draws: np.ndarray) -> Any:
        ships = unpack(state.afloat, reference.board_size**2).reshape(reference.board_size, -1)
        assert ships.sum() == sum(reference.ship_sizes)
        reference.place_ship = lambda board, ship_size: ships.astype(np.int8)
        return reference.reset()[0]


def of_kind(reference: Any, *kinds: HiddenSquare) -> np.ndarray:
    return np.flatnonzero(np.isin(reference.hidden_grid, kinds))


def clear_all(reference: Any) -> int:
    """A new clear square with every click: won with the last one, which must not count as truncated."""
    return pick(reference, of_kind(reference, HiddenSquare.CLEAR))


def clear_all_but_one(reference: Any) -> int:
    """The last click goes to a square clicked before."""
    last = reference.timestep == reference.max_episode_length - 1
    return pick(reference, of_kind(reference, HiddenSquare.VIEWED if last else HiddenSquare.CLEAR))


def click_safely(reference: Any) -> int:
    """Any square without a mine, clicked before or not."""
    return pick(reference, of_kind(reference, HiddenSquare.CLEAR, HiddenSquare.VIEWED))


def explode_with_the_last_click(reference: Any) -> int:
    """One clear square again and again, then a mine: the worst return."""
    if reference.timestep == reference.max_episode_length - 1:
        return pick(reference, of_kind(reference, HiddenSquare.MINE))
    viewed = of_kind(reference, HiddenSquare.VIEWED)
    return pick(reference, viewed if len(viewed) else of_kind(reference, HiddenSquare.CLEAR))


class MineSweeper(Board):
    policies = (None, clear_all, clear_all_but_one, click_safely, explode_with_the_last_click)

    def hidden(self, reference: Any) -> dict[str, np.ndarray]:
        mines = reference.hidden_grid.ravel() == HiddenSquare.MINE
        return {"mines": boards.pack(mines), "clear": boards.pack(~mines)}

    def insert(self, reference: Any, state: Any, draws: np.ndarray) -> Any:
        mines = np.flatnonzero(unpack(state.mines, int(np.prod(reference.dims))))
        reference.np_random = Scripted(choice=lambda squares, size, replace: mines)
        return reference.reset()[0]


BRIDGES = {"Battleship": Battleship(), "MineSweeper": MineSweeper()}
