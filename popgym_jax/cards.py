"""Playing cards as integers: the facts that every card environment shares.

A stack of D decks holds the card ids 0 .. 52 D - 1. Deck after deck runs through
its ranks, ace first and king last, and every rank through the suits spades,
diamonds, clubs, hearts; the colour is black, red, black, red. All functions take
one environment and are meant for `jax.vmap`.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from popgym_jax import environment, prng

DECK_SIZE = 52
NUM_SUITS = 4
NUM_RANKS = 13
NUM_COLOURS = 2

SUITS = ("spades", "diamonds", "clubs", "hearts")
RANKS = ("ace", *map(str, range(2, 11)), "jack", "queen", "king")
COLOURS = ("black", "red")
NAMES = {"colors": COLOURS, "suits": SUITS, "ranks": RANKS}  # by the deck_type

KINDS = {"colors": NUM_COLOURS, "suits": NUM_SUITS, "ranks": NUM_RANKS}  # by the deck_type


def num_kinds(deck_type: str, allowed: Iterable[str] = tuple(KINDS)) -> int:
    """Number of colours, suits or ranks; ValueError for a deck_type that is not allowed."""
    if deck_type not in allowed:
        raise ValueError(f"deck_type must be {' or '.join(allowed)}, got {deck_type}")
    return KINDS[deck_type]


def num_cards(num_decks: int) -> int:
    """Cards in a stack of that many decks; ValueError for a stack without any."""
    if num_decks < 1:
        raise ValueError(f"num_decks must be at least 1, got {num_decks}")
    return num_decks * DECK_SIZE


class DeckEnvironment(environment.Environment[environment.TEnvState, environment.EnvParams]):
    """Deals a stack of num_decks decks: its episodes terminate after a known number of steps.

    `max_steps_in_episode` is for information only: the deck is what ends an
    episode.
    """

    def __init__(self, num_decks: int, episode_length: int, name: str | None):
        self.num_decks = num_decks
        self.episode_length = episode_length
        super().__init__(name)

    @property
    def default_params(self) -> environment.EnvParams:
        return environment.EnvParams(max_steps_in_episode=self.episode_length)

    def is_terminated(self, state: environment.TEnvState, params: Any) -> jax.Array:
        """The last card has had its turn, bool ()."""
        return state.time >= self.episode_length

    def is_truncated(self, state: environment.TEnvState, params: Any) -> jax.Array:
        """Never, bool ()."""
        return jnp.zeros((), bool)


def suit(card: jax.Array) -> jax.Array:
    """Suit of a card id: spades 0, diamonds 1, clubs 2, hearts 3. Any shape, same dtype."""
    return card % NUM_SUITS


def rank(card: jax.Array) -> jax.Array:
    """Rank of a card id: ace 0, two 1, .., king 12. Any shape, same dtype."""
    return card % DECK_SIZE // NUM_SUITS


def colour(card: jax.Array) -> jax.Array:
    """Colour of a card id: black 0, red 1. Any shape, same dtype."""
    return card % NUM_COLOURS


def full_counts(num_decks: int, num_kinds: int) -> jax.Array:
    """How many cards of each suit, rank or colour fresh decks hold, int32 (num_kinds,)."""
    of_each = num_decks * DECK_SIZE // num_kinds
    return jnp.full(num_kinds, of_each, jnp.int32)


def deal(key: jax.Array, remaining: jax.Array) -> jax.Array:
    """Kind of the next card from a shuffled stack of which only the counts are known.

    Where only the kind of a card matters (its suit, say), a shuffled deck need not
    be stored: the next card is of kind i with probability remaining[i] /
    sum(remaining), whatever was dealt before, which is the law of a uniform
    shuffle. That makes a reset as cheap as a step and keeps the state small.

    remaining: cards left of each kind, int32 (kinds,), not all zero
    Returns the kind, int32 ().
    """
    return pick(prng.bits(key, 1)[0], remaining)


def pick(word: jax.Array, remaining: jax.Array) -> jax.Array:
    """`deal` from a random word, uint32 ()."""
    kinds = remaining.shape[0]
    # cards up to and including each kind, one by one: as a cumsum or a sum over a
    # triangle of ones they would not fuse into a loop over environments
    up_to_kind = [remaining[0]]
    for i in range(1, kinds):
        up_to_kind.append(up_to_kind[-1] + remaining[i])
    card = prng.integer(word, up_to_kind[-1])
    kind = jnp.int32(0)
    for count in up_to_kind:
        kind = kind + (card >= count).astype(jnp.int32)
    return jax.lax.optimization_barrier(kind)  # or XLA computes it again for each use


def without(remaining: jax.Array, kind: jax.Array) -> jax.Array:
    """The counts after one card of that kind has gone, int32 (kinds,)."""
    # not remaining - (.. == kind), where the conversion of a comparison makes it four times as slow
    kinds = jnp.arange(remaining.shape[0], dtype=jnp.int32)
    return jnp.where(kinds == kind, remaining - 1, remaining)


def shuffled_deck(key: jax.Array, num_decks: int) -> jax.Array:
    """Uniformly random order of all card ids, int32 (52 num_decks,).

    Each position draws 32 random bits and gets its place in the order of these
    draws (equal draws, once in 800 000 shuffles of two decks, keep their order).
    Counting the smaller draws takes N^2 comparisons but vectorises: on CPU it is
    two to three times as fast as sorting up to three decks; from about six decks
    on, sorting wins.
    """
    draws = prng.bits(key, num_decks * DECK_SIZE)  # (N,)
    position = jnp.arange(draws.shape[0], dtype=jnp.int32)
    tied = draws[None, :] == draws[:, None]  # (N, N)
    earlier = position[None, :] < position[:, None]
    smaller = draws[None, :] < draws[:, None]
    before = smaller | (tied & earlier)
    return jnp.sum(before, axis=1, dtype=jnp.int32)


def one_hot(kind: jax.Array, num_kinds: int) -> jax.Array:
    """1 at index `kind`, 0 elsewhere, float32 (num_kinds,)."""
    return (jnp.arange(num_kinds, dtype=jnp.int32) == kind).astype(jnp.float32)


def letters(suits: np.ndarray) -> str:
    """Suits, integer (n,), by their first letters."""
    return "".join(SUITS[suit][0].upper() for suit in suits)
