"""Battleship: find the ships of a hidden board, being told only hit or miss."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gymnax.environments import spaces

from popgym_jax import boards, cards, environment, prng

MAX_BOARD_SIZE = 128  # of so many places a draw of 32 bits chooses one


@struct.dataclass
class EnvState(environment.EnvState):
    """time: steps taken, int32 ()
    afloat: ship squares that were not hit yet, as bits (see `popgym_jax.boards`),
        uint32 (words,)
    """

    afloat: jax.Array


@struct.dataclass
class EnvParams(environment.EnvParams):
    """max_steps_in_episode: truncation; the reward is scaled by the board and not by this."""

    max_steps_in_episode: int = 100


class Battleship(environment.Environment[EnvState, EnvParams]):
    """Sink all ships of a hidden board (Morad et al. 2023, POPGym; popgym 1.0.7).

    Straight ships of n = sum(ship_sizes) squares lie on a board of N = board_size^2 squares. They
    may touch but do not overlap. They are placed in the order of ship_sizes, each uniformly among
    the places that the earlier ones leave.

    Observation: miss or hit, one-hot, float32 (2,); miss at the reset.
    Action: a square, row * board_size + column, integer ().
    Reward: +1/n for a hit; -1/(N-n) for water and for any square guessed before, float32 ().
    Return: in [-N/(N-n), 1]; 1 without a miss, random -0.44, -0.41, -0.40 for Easy, Medium, Hard.
    Episode: n = 12 to 64, 100, 144 steps for Easy, Medium, Hard with board_size 8, 10, 12.
    End: terminated with the last hit; truncated after N steps; a last hit on step N is both.

    Reference quirks kept: a ship square that was hit before counts as a miss, so the worst return
    is below -1 (-1.23, -1.14, -1.09). The observation does not say which square was guessed.
    Arguments with which the reference may search for a free place forever are refused.
    """

    costly_reset = True
    obs_requires_prev_action = True

    def __init__(
        self,
        board_size: int = 10,
        ship_sizes: Sequence[int] = (2, 3, 3, 4),
        name: str | None = None,
    ):
        if not 2 <= board_size <= MAX_BOARD_SIZE:
            raise ValueError(f"board_size must be 2 to {MAX_BOARD_SIZE}, got {board_size}")
        self.board_size = board_size
        self.ship_sizes = tuple(ship_sizes)
        self.num_squares = board_size**2
        self.needed_hits = sum(self.ship_sizes)
        all_fit = all(self._fits(i) for i in range(len(self.ship_sizes)))
        if not self.ship_sizes or not all_fit:
            raise ValueError(
                f"ship_sizes must be ships that always fit on {board_size} x {board_size} squares,"
                f" got {ship_sizes}"
            )
        super().__init__(name)

    def _fits(self, i: int) -> bool:
        """Ship i finds a place wherever the earlier ones lie, and water is left beside it.

        Each row is cut into places for it; an occupied square spoils one of them at most.
        """
        ship = self.ship_sizes[i]
        occupied = sum(self.ship_sizes[:i])
        return (
            1 <= ship <= self.board_size
            and occupied < self.board_size * (self.board_size // ship)
            and occupied + ship < self.num_squares
        )

    @property
    def default_params(self) -> EnvParams:
        return EnvParams(max_steps_in_episode=self.num_squares)

    def place_ships(self, key: jax.Array) -> jax.Array:
        """The squares of all ships, uint32 (words,): the only randomness here."""
        everywhere = jnp.asarray(boards.pack(np.ones(self.num_squares, bool)))
        free = everywhere
        draws = prng.bits(key, len(self.ship_sizes))
        for draw, size in zip(draws, self.ship_sizes, strict=True):
            free &= ~place_ship(draw, free, self.board_size, size)
        return everywhere & ~free

    def reset_env(self, key: jax.Array, params: EnvParams) -> tuple[jax.Array, EnvState]:
        """Place the ships: observation float32 (2,) and state."""
        state = EnvState(time=jnp.zeros((), jnp.int32), afloat=self.place_ships(key))
        return cards.one_hot(jnp.int32(0), 2), state

    def step_env(
        self, key: jax.Array, state: EnvState, action: jax.Array, params: EnvParams
    ) -> tuple[jax.Array, EnvState, jax.Array, jax.Array, dict[Any, Any]]:
        """Guess a square: observation (2,), state, reward, terminated, {}."""
        guess = boards.square(action, len(state.afloat))
        hit = boards.overlap(state.afloat, guess)
        gain = jnp.float32(1 / self.needed_hits)
        loss = jnp.float32(-1 / (self.num_squares - self.needed_hits))
        reward = jnp.where(hit, gain, loss)
        state = EnvState(time=state.time + 1, afloat=state.afloat & ~guess)
        observation = cards.one_hot(hit, 2)
        return observation, state, reward, self.is_terminated(state, params), {}

    def is_terminated(self, state: EnvState, params: EnvParams) -> jax.Array:
        """Every ship is sunk, bool ()."""
        return jnp.all(state.afloat == 0)

    def render(self, state: EnvState, params: EnvParams) -> str:
        """The board: S a square of a ship that was not hit yet."""
        afloat = boards.unpack(np.asarray(state.afloat), self.num_squares)
        rows = boards.draw(np.where(afloat, "S", "."), self.board_size)
        return f"{afloat.sum()} of {self.needed_hits} ship squares are left\n{rows}"

    def render_action(self, state: EnvState, action: Any, params: Any) -> str:
        return boards.name(int(action), self.board_size)

    def action_space(self, params: EnvParams) -> spaces.Discrete:
        return spaces.Discrete(self.num_squares)

    def observation_space(self, params: EnvParams) -> spaces.Box:
        return spaces.Box(0.0, 1.0, (2,))


def place_ship(draw: jax.Array, free: jax.Array, board_size: int, ship_size: int) -> jax.Array:
    """The squares of a ship, uniform over the places where it fits, uint32 (words,).

    The reference proposes a first square and a direction until the ship fits. Each place is
    proposed equally often (a ship has two ends), so what it accepts is uniform, too.

    draw: random, uint32 (); free: squares without a ship, uint32 (words,)
    """
    # where its first square may lie
    column = np.arange(board_size**2) % board_size
    across = free & boards.pack(column <= board_size - ship_size)
    down = free
    for i in range(1, ship_size):
        across &= boards.earlier(free, i)
        down &= boards.earlier(free, i * board_size)

    # one of these places, and the squares from there on
    num_words = len(free)
    start = boards.choose(draw, jnp.concatenate([across, down]))
    goes_down = start >= num_words * boards.WORD
    start = jnp.where(goes_down, start - num_words * boards.WORD, start)
    step = jnp.where(goes_down, board_size, 1)
    ship = boards.square(start, num_words)
    for i in range(1, ship_size):
        ship |= boards.square(start + i * step, num_words)
    return ship
