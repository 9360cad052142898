"""MineSweeper on a board that stays hidden: only the clicked square's number is shown."""

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gymnax.environments import spaces

from popgym_jax import boards, cards, environment, prng

LEVELS = {"easy": (4, 2), "medium": (6, 6), "hard": (8, 10)}  # board size, number of mines


@struct.dataclass
class EnvState(environment.EnvState):
    """Squares are bits, uint32 (words,): see `popgym_jax.boards`.

    time: steps taken, int32 ()
    mines: squares with a mine
    clear: squares without a mine that were not clicked yet
    exploded: a mine was clicked, bool ()
    """

    mines: jax.Array
    clear: jax.Array
    exploded: jax.Array


@struct.dataclass
class EnvParams(environment.EnvParams):
    """max_steps_in_episode: truncation; the reward is scaled by the board and not by this."""

    max_steps_in_episode: int = 14


class MineSweeper(environment.Environment[EnvState, EnvParams]):
    """Click every square but the mines (Morad et al. 2023, POPGym; popgym 1.0.7).

    m mines lie on distinct squares, uniformly; the other L squares are clear.

    Observation: number of mines on the clicked square and the up to eight around it, one-hot,
        float32 (min(m+1, 10),); 0 at the reset.
    Action: a square, row * board_size + column, integer ().
    Reward: +1/L for a clear square, -0.5/(L-2) for one clicked before, -0.5-1/L for a mine,
        float32 ().
    Return: in [-1, 1]; a win is 1, random -0.23, -0.40, -0.43 for Easy, Medium, Hard.
    Episode: at most L = 14, 30, 54 steps for Easy, Medium, Hard with 2 mines on 4 x 4, 6 on 6 x 6
        and 10 on 8 x 8 squares.
    End: terminated by a mine or when no clear square is left; truncated after L steps, but never
        both.

    Reference quirks kept: the number includes the clicked square itself, so a mine shows at least
    1. One click wasted makes winning impossible, as L clicks are all there are. The first click
    may hit a mine. The observation does not say which square was clicked.
    """

    obs_requires_prev_action = True

    def __init__(self, difficulty: str = "easy", name: str | None = None):
        if difficulty not in LEVELS:
            raise ValueError(f"difficulty must be easy, medium or hard, got {difficulty!r}")
        self.board_size, self.num_mines = LEVELS[difficulty]
        self.num_squares = self.board_size**2
        self.num_clear = self.num_squares - self.num_mines
        self.num_numbers = min(self.num_mines + 1, 10)
        super().__init__(name)

    @property
    def default_params(self) -> EnvParams:
        return EnvParams(max_steps_in_episode=self.num_clear)

    def place_mines(self, key: jax.Array) -> jax.Array:
        """A uniform set of num_mines squares, uint32 (words,): the only randomness here.

        Floyd's sampling without replacement (Bentley and Floyd 1987, "Programming pearls: a sample
        of brilliance"): each mine is drawn from the squares up to `last`, and if that square has a
        mine already, it goes to `last` itself. One draw per mine is always enough.
        """
        draws = prng.bits(key, self.num_mines)
        lasts = range(self.num_clear, self.num_squares)
        mines: list[jax.Array] = []
        for draw, last in zip(draws, lasts, strict=True):
            mine = prng.integer(draw, last + 1)
            taken = jnp.zeros((), bool)
            for other in mines:
                taken |= mine == other
            mines.append(jnp.where(taken, last, mine))
        # the barrier keeps XLA from drawing a mine again in each operation that uses it
        mines = jax.lax.optimization_barrier(mines)
        num_words = boards.num_words(self.num_squares)
        squares = [boards.square(mine, num_words) for mine in mines]
        return functools.reduce(operator.or_, squares)

    def reset_env(self, key: jax.Array, params: EnvParams) -> tuple[jax.Array, EnvState]:
        """Lay the mines: observation float32 (num_numbers,) and state."""
        mines = self.place_mines(key)
        everywhere = boards.pack(np.ones(self.num_squares, bool))
        state = EnvState(
            time=jnp.zeros((), jnp.int32),
            mines=mines,
            clear=everywhere & ~mines,
            exploded=jnp.zeros((), bool),
        )
        return self.observe(key, state, None, params), state

    def step_env(
        self, key: jax.Array, state: EnvState, action: jax.Array, params: EnvParams
    ) -> tuple[jax.Array, EnvState, jax.Array, jax.Array, dict[Any, Any]]:
        """Click a square: observation (num_numbers,), state, reward, terminated, {}."""
        click = boards.square(action, len(state.clear))
        is_mine = boards.overlap(state.mines, click)
        is_clear = boards.overlap(state.clear, click)
        found = jnp.float32(1 / self.num_clear)
        wasted = jnp.float32(-0.5 / (self.num_clear - 2))
        lost = jnp.float32(-0.5 - 1 / self.num_clear)
        survived = jnp.where(is_clear, found, wasted)
        reward = jnp.where(is_mine, lost, survived)
        state = EnvState(
            time=state.time + 1,
            mines=state.mines,
            clear=state.clear & ~click,
            exploded=state.exploded | is_mine,
        )
        observation = self.observe(key, state, action, params)
        return observation, state, reward, self.is_terminated(state, params), {}

    def observe(
        self, key: jax.Array, state: EnvState, action: jax.Array | None, params: EnvParams
    ) -> jax.Array:
        """Mines on and around the clicked square, one-hot, float32 (num_numbers,)."""
        number = jnp.int32(0)
        if action is not None:
            block = jnp.asarray(blocks(self.board_size))[action]
            number = boards.count(state.mines & block)
        return cards.one_hot(number, self.num_numbers)

    def is_terminated(self, state: EnvState, params: EnvParams) -> jax.Array:
        """A mine went off or every clear square was clicked, bool ()."""
        return state.exploded | jnp.all(state.clear == 0)

    def is_truncated(self, state: EnvState, params: EnvParams) -> jax.Array:
        """Out of clicks, neither won nor lost, bool ()."""
        return (state.time >= params.max_steps_in_episode) & ~self.is_terminated(state, params)

    def render(self, state: EnvState, params: EnvParams) -> str:
        """The board: * a mine, . not clicked yet, else the number shown for a clicked square."""
        mines = boards.unpack(np.asarray(state.mines), self.num_squares)
        clear = boards.unpack(np.asarray(state.clear), self.num_squares)
        numbers = np.bitwise_count(blocks(self.board_size) & np.asarray(state.mines)).sum(axis=1)
        squares = np.where(mines, "*", np.where(clear, ".", numbers.astype(str)))
        rows = boards.draw(squares, self.board_size)
        return f"{clear.sum()} of {self.num_clear} squares are left\n{rows}"

    def render_action(self, state: EnvState, action: Any, params: Any) -> str:
        return boards.name(int(action), self.board_size)

    def action_space(self, params: EnvParams) -> spaces.Discrete:
        return spaces.Discrete(self.num_squares)

    def observation_space(self, params: EnvParams) -> spaces.Box:
        return spaces.Box(0.0, 1.0, (self.num_numbers,))


@functools.cache
def blocks(board_size: int) -> np.ndarray:
    """Each square together with its neighbours, as bits, uint32 (squares, words)."""
    row, column = np.divmod(np.arange(board_size**2), board_size)
    near_row = abs(row - row[:, None]) <= 1
    near_column = abs(column - column[:, None]) <= 1
    return boards.pack(near_row & near_column)
