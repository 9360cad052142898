"""Bridges of the labyrinths: the maze crosses, an episode draws nothing more."""

from __future__ import annotations

import random
from collections import deque
from typing import Any

import numpy as np
from popgym.core.maze import Actions, Cell, Explored

from tests.reference import Bridge

MOVES = ((0, -1), (0, 1), (-1, 0), (1, 0))  # rows and columns: left, right, up, down


def purposeful(reference: Any) -> int:
    """The first step towards the nearest square that is wanted: the exit, or one not yet explored."""
    grid = reference.maze.grid
    wanted = grid == Cell.GOAL
    if not wanted.any():
        wanted = (grid != Cell.OBSTACLE) & (reference.explored == Explored.NO)
    queue, first_action = deque([reference.position]), {reference.position: -1}
    while not wanted[queue[0]]:
        here = queue.popleft()
        for action, (down, right) in enumerate(MOVES):
            there = (here[0] + down, here[1] + right)
            inside = min(there) >= 0 and max(there) < len(grid)
            if inside and there not in first_action and grid[there] != Cell.OBSTACLE:
                first_action[there] = action if first_action[here] < 0 else first_action[here]
                queue.append(there)
    return first_action[queue[0]]


def distracted(reference: Any) -> int:
    """As `purposeful`, but two steps in five go anywhere."""
    time = reference.curr_step
    return purposeful(reference) if time % 5 < 3 else (time * time // 5) % 4


class Mazes(Bridge):
    """``walls``, ``start`` and ``position``, and what the subclasses add, are the whole state."""

    policies = (None, purposeful, distracted)

    def prepare(self, reference: Any, rng: np.random.Generator) -> None:
        """Seed the global generators that the labyrinths draw from, for a maze without walled-in cells.

        The few others (1 in 10^4) are left out because the reward of exploring is the number of squares of ours. The
        reference is left in the maze that its next reset makes once more.
        """
        while True:
            seed = int(rng.integers(2**32))
            seed_globals(seed)
            reference.reset()
            if is_complete(reference.maze.grid):
                return seed_globals(seed)

    def hidden(self, reference: Any) -> dict[str, np.ndarray]:
        position, start = (np.array(x, np.int32) for x in (reference.position, reference.maze.start))
        return {"walls": pack(reference.maze.grid == Cell.OBSTACLE, True), "start": start, "position": position}

    def insert(self, reference: Any, state: Any, draws: np.ndarray) -> Any:
        reference.reset()
        grid = np.where(unpack(state.walls), Cell.OBSTACLE, Cell.FREE).astype(np.int8)
        start = tuple(int(x) for x in state.start)
        grid[start] = Cell.START
        reference.maze.grid, reference.maze.start = grid, start
        reference.explored = np.full_like(grid, Explored.NO)
        reference.explored[start] = Explored.YES
        reference.position = tuple(int(x) for x in state.position)
        self.insert_task(reference, state)
        return reference.get_obs(Actions.NONE)

    def insert_task(self, reference: Any, state: Any) -> None:
        raise NotImplementedError


class Escape(Mazes):
    def hidden(self, reference: Any) -> dict[str, np.ndarray]:
        return super().hidden(reference) | {"goal": np.array(reference.maze.end, np.int32)}

    def insert_task(self, reference: Any, state: Any) -> None:
        reference.maze.end = tuple(int(x) for x in state.goal)
        reference.maze.grid[reference.maze.end] = Cell.GOAL


class Explore(Mazes):
    def hidden(self, reference: Any) -> dict[str, np.ndarray]:
        unexplored = (reference.maze.grid != Cell.OBSTACLE) & (reference.explored == Explored.NO)
        return super().hidden(reference) | {"unexplored": pack(unexplored, False)}

    def insert_task(self, reference: Any, state: Any) -> None:
        open_squares = reference.maze.grid != Cell.OBSTACLE
        reference.explored = np.where(open_squares & ~unpack(state.unexplored), Explored.YES, Explored.NO)
        reference.pos_reward_scale = 1 / (reference.maze.grid == Cell.FREE).sum()


BRIDGES = {"LabyrinthEscape": Escape(), "LabyrinthExplore": Explore()}


def seed_globals(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  (mazelib has no other)


def is_complete(grid: np.ndarray) -> bool:
    """Every cell has been visited."""
    return not (grid[1::2, 1::2] == Cell.OBSTACLE).any()


def pack(squares: np.ndarray, outside: bool) -> np.ndarray:
    """Our board of these squares, bool (n, n) to uint32 (n + 1,); all bits beyond the grid are `outside`."""
    bits = np.full((len(squares) + 1, 32), outside)
    bits[:-1, : len(squares)] = squares
    return (bits.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(axis=1).astype(np.uint32)


def unpack(board: np.ndarray) -> np.ndarray:
    """The squares of our boards, uint32 (..., n + 1) to bool (..., n, n)."""
    size = board.shape[-1] - 1
    return (np.asarray(board)[..., :-1, None] >> np.arange(size, dtype=np.uint32)) & 1 == 1
