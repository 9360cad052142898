"""Labyrinths: a random maze to escape from or to explore, seen three squares by three."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gymnax.environments import spaces

from popgym_jax import environment, maze, prng

# what a square can be
FREE = 0
OBSTACLE = 1
START = 2
GOAL = 3
NUM_CODES = 5  # the reference has a fifth for squares that it hides, and never shows it
CODE_BITS = 3
VIEW = 3  # squares along a side of the view
NUM_ACTIONS = 4
NO_ACTION = 4


@struct.dataclass
class EnvState(environment.EnvState):
    """time: steps taken, int32 ()
    walls: the board of obstacles, uint32 (2w + 2,), see maze.py
    start: row and column where the agent began, int32 (2,)
    position: row and column where the agent is, int32 (2,)
    """

    walls: jax.Array
    start: jax.Array
    position: jax.Array


@struct.dataclass
class EscapeState(EnvState):
    """goal: row and column of the exit, int32 (2,)."""

    goal: jax.Array


@struct.dataclass
class ExploreState(EnvState):
    """unexplored: the board of open squares where the agent has not been, uint32 (2w + 2,)."""

    unexplored: jax.Array


@struct.dataclass
class EnvParams(environment.EnvParams):
    """max_steps_in_episode: truncation; a step costs 1/(max_steps_in_episode + 1)."""

    max_steps_in_episode: int = 1023


TState = TypeVar("TState", bound=EnvState)


class Labyrinth(environment.Environment[TState, EnvParams]):
    """What both labyrinths share: the maze, the moves and the view; see LabyrinthEscape."""

    costly_reset = True
    obs_requires_prev_action = True

    def __init__(
        self,
        maze_dims: tuple[int, int] = (10, 10),
        episode_length: int = 1024,
        name: str | None = None,
    ):
        height, width = maze_dims
        if height != width or height % 2 or not 6 <= height <= 2 * maze.MAX_SIZE:
            allowed = f"(n, n) with an even n from 6 to {2 * maze.MAX_SIZE}"
            raise ValueError(f"maze_dims must be {allowed}, got {maze_dims}")
        if episode_length < 2:
            raise ValueError(f"episode_length must be at least 2, got {episode_length}")
        self.size = height // 2  # w in the docstrings: cells along a side
        self.episode_length = episode_length
        super().__init__(name)

    @property
    def default_params(self) -> EnvParams:
        return EnvParams(max_steps_in_episode=self.episode_length - 1)

    def draw_maze(self, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """A random maze: walls without entrances, uint32 (2w + 2,), start and end, int32 (2,)."""
        words = prng.bits(key, 2 * self.size**2 + 2)
        start, end = maze.entrances(words[:3], self.size)
        return maze.generate(words[3:], self.size), start, end

    def move(self, state: TState, action: jax.Array) -> jax.Array:
        """Where the action leads, or where the agent is if that is no open square, int32 (2,)."""
        step = jnp.where(action % 2 == 0, jnp.int32(-1), jnp.int32(1))
        row = state.position[0] + jnp.where(action >= 2, step, 0)
        column = state.position[1] + jnp.where(action < 2, step, 0)
        # beyond the grid: in the north and west back to its edge, in the south and east a wall
        ahead = jnp.maximum(jnp.stack([row, column]), 0)
        return jnp.where(maze.contains(state.walls, ahead), state.position, ahead)

    def view(self, state: TState) -> jax.Array:
        """Codes of the nine squares in view, row by row, each in CODE_BITS bits, uint32 ()."""
        outside = 2 * self.size + 1
        codes = self.landmark(state, state.start, START)
        columns = [x.astype(jnp.uint32) for x in seen(state.position[1], outside)]
        for i, row in enumerate(seen(state.position[0], outside)):
            walls = maze.row(state.walls, row)
            for j, column in enumerate(columns):
                code = (walls >> column) & OBSTACLE
                codes |= code << (CODE_BITS * (VIEW * i + j))
        return codes

    def landmark(self, state: TState, position: jax.Array, code: int) -> jax.Array:
        """A view with this code on the square at `position`, if it is in view, and else zeros."""
        rows_away = position[0] - state.position[0]
        columns_away = position[1] - state.position[1]
        visible = (jnp.abs(rows_away) <= 1) & (jnp.abs(columns_away) <= 1)
        first_row, _, _ = seen(state.position[0], 0)
        row = position[0] - first_row
        first_column, _, _ = seen(state.position[1], 0)
        column = position[1] - first_column
        shift = CODE_BITS * (VIEW * row + column)
        placed = jnp.uint32(code) << shift.astype(jnp.uint32)
        return jnp.where(visible, placed, jnp.uint32(0))

    def observe(
        self, key: jax.Array, state: TState, action: jax.Array | None, params: EnvParams
    ) -> jax.Array:
        """View and previous action, float32 (50,); no randomness."""
        previous = jnp.asarray(NO_ACTION if action is None else action).astype(jnp.uint32)
        codes = self.view(state) | (previous << (CODE_BITS * VIEW**2))
        feature = np.arange((VIEW**2 + 1) * NUM_CODES, dtype=np.uint32)
        part, code = np.divmod(feature, NUM_CODES)
        mask = (1 << CODE_BITS) - 1
        code_of_part = (codes >> (CODE_BITS * part)) & mask
        return (code_of_part == code).astype(jnp.float32)

    def penalty(self, params: EnvParams) -> jax.Array:
        """Reward of a step that gains nothing, float32 ()."""
        return -1.0 / jnp.asarray(params.max_steps_in_episode + 1, jnp.float32)

    def render(self, state: TState, params: EnvParams) -> str:
        """The maze: # a wall, A the agent, S the start, and see `squares`."""
        squares = self.squares(state)
        squares[tuple(np.asarray(state.start))] = "S"
        squares[tuple(np.asarray(state.position))] = "A"
        return "\n".join("".join(row) for row in squares)

    def squares(self, state: TState) -> np.ndarray:
        """A letter for each square of the grid, (2w + 1, 2w + 1)."""
        return np.where(self.on_board(state.walls), "#", " ")

    def on_board(self, board: jax.Array) -> np.ndarray:
        """Which squares of the grid are on a board, bool (2w + 1, 2w + 1)."""
        side = 2 * self.size + 1
        column = np.arange(side, dtype=np.uint32)
        return ((np.asarray(board)[:side, None] >> column) & 1) == 1

    def render_action(self, state: TState, action: Any, params: Any) -> str:
        return ("left", "right", "up", "down")[int(action)]

    def action_space(self, params: EnvParams) -> spaces.Discrete:
        return spaces.Discrete(NUM_ACTIONS)

    def observation_space(self, params: EnvParams) -> spaces.Box:
        return spaces.Box(0.0, 1.0, ((VIEW**2 + 1) * NUM_CODES,))


class LabyrinthEscape(Labyrinth[EscapeState]):
    """Find the way out of a maze (Morad et al. 2023, POPGym; popgym 1.0.7).

    A random perfect maze of w x w cells, w = maze_dims / 2, on (2w + 1) x (2w + 1)
    squares, drawn at each reset as in maze.py. The agent starts in an entrance in one
    outer wall, the exit is in the opposite one.

    Observation: one-hot codes in groups of five, float32 (50,): nine squares around the
        agent, row by row (0 free, 1 wall or outside, 2 start, 3 exit; 4 never), then
        the previous action (4 at the reset).
    Action: 0 left, 1 right, 2 up, 3 down, integer (). Against a wall or out of the grid
        the agent stays where it is.
    Reward: -1/1024, and +1 for reaching the exit, float32 ().
    Return: at most 1 - d/1024 with d >= 2w the length of the way, at least -1023/1024;
        random about -0.45, -0.85, -0.95.
    Episode: at most 1023 steps; w = 5, 7, 9 for Easy, Medium, Hard.
    End: terminated at the exit; truncated at step 1023; both where the exit is reached
        with it.

    Reference quirks kept: in the north wall the view begins with the agent's row, goes
    on with the next one and ends with a row of walls, whatever is there; likewise in
    the west wall. Truncation comes one step before the 1024 steps that the penalty is
    made for. The reference leaves a cell walled in about once in 10^4 mazes; these
    mazes are complete.
    """

    def reset_env(self, key: jax.Array, params: EnvParams) -> tuple[jax.Array, EscapeState]:
        """A new maze, the agent in its entrance: observation float32 (50,) and state."""
        walls, start, goal = self.draw_maze(key)
        openings = maze.square(start, len(walls)) | maze.square(goal, len(walls))
        state = EscapeState(
            time=jnp.zeros((), jnp.int32),
            walls=walls & ~openings,
            start=start,
            position=start,
            goal=goal,
        )
        return self.observe(key, state, None, params), state

    def step_env(
        self, key: jax.Array, state: EscapeState, action: jax.Array, params: EnvParams
    ) -> tuple[jax.Array, EscapeState, jax.Array, jax.Array, dict[Any, Any]]:
        """Move: observation (50,), state, reward, terminated, {}."""
        state = state.replace(time=state.time + 1, position=self.move(state, action))
        terminated = self.is_terminated(state, params)
        reward = self.penalty(params) + terminated.astype(jnp.float32)
        return self.observe(key, state, action, params), state, reward, terminated, {}

    def view(self, state: EscapeState) -> jax.Array:
        """Codes of the nine squares in view, with the exit: see Labyrinth."""
        return super().view(state) | self.landmark(state, state.goal, GOAL)

    def squares(self, state: EscapeState) -> np.ndarray:
        """G is the exit: see Labyrinth."""
        squares = super().squares(state)
        squares[tuple(np.asarray(state.goal))] = "G"
        return squares

    def is_terminated(self, state: EscapeState, params: EnvParams) -> jax.Array:
        """The agent is at the exit, bool ()."""
        same_row = state.position[0] == state.goal[0]
        same_column = state.position[1] == state.goal[1]
        return same_row & same_column


class LabyrinthExplore(Labyrinth[ExploreState]):
    """Visit every square of a maze (Morad et al. 2023, POPGym; popgym 1.0.7).

    Maze, view and moves as in LabyrinthEscape, but there is no exit, and the place
    opposite the entrance is a wall like any other.

    Observation: nine squares and the previous action, float32 (50,), as in
        LabyrinthEscape; code 3 does not occur, and nothing shows where the agent has
        been.
    Action: 0 left, 1 right, 2 up, 3 down, integer ().
    Reward: +1/(2w^2 - 1) on a square where the agent has not been (the maze has so
        many, not counting the start), and instead of it -1/1024 on any other, float32
        ().
    Return: at most 1, reached where no step is wasted, at least -1023/1024; random
        about -0.34, -0.61, -0.75.
    Episode: at most 1023 steps; w = 5, 7, 9 for Easy, Medium, Hard.
    End: terminated when all squares have been visited; truncated at step 1023; both
        where the last square is reached with it.

    Reference quirks kept: those of LabyrinthEscape.
    """

    def reset_env(self, key: jax.Array, params: EnvParams) -> tuple[jax.Array, ExploreState]:
        """A new maze, the agent in its entrance: observation float32 (50,) and state."""
        walls, start, _ = self.draw_maze(key)
        state = ExploreState(
            time=jnp.zeros((), jnp.int32),
            walls=walls & ~maze.square(start, len(walls)),
            start=start,
            position=start,
            unexplored=~walls,
        )
        return self.observe(key, state, None, params), state

    def step_env(
        self, key: jax.Array, state: ExploreState, action: jax.Array, params: EnvParams
    ) -> tuple[jax.Array, ExploreState, jax.Array, jax.Array, dict[Any, Any]]:
        """Move: observation (50,), state, reward, terminated, {}."""
        position = self.move(state, action)
        new = maze.contains(state.unexplored, position)
        found = jnp.float32(1 / maze.num_open(self.size))
        reward = jnp.where(new, found, self.penalty(params))
        here = maze.square(position, len(state.unexplored))
        state = state.replace(
            time=state.time + 1,
            position=position,
            unexplored=state.unexplored & ~here,
        )
        observation = self.observe(key, state, action, params)
        return observation, state, reward, self.is_terminated(state, params), {}

    def squares(self, state: ExploreState) -> np.ndarray:
        """. where the agent has not been: see Labyrinth."""
        return np.where(self.on_board(state.unexplored), ".", super().squares(state))

    def is_terminated(self, state: ExploreState, params: EnvParams) -> jax.Array:
        """No square is left, bool ()."""
        return ~state.unexplored.any()


def seen(index: jax.Array, outside: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The three rows in view from row `index`, or columns from a column, int32 () each.

    Those from index - 1 to index + 1; but from row 0 they are 0, 1 and `outside`.
    """
    first = jnp.maximum(index - 1, 0)
    return first, first + 1, jnp.where(index == 0, outside, index + 1)
