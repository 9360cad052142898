"""Sets of squares of a board as bits: square i is bit i % 32 of word i // 32.

Squares are counted row by row, as actions are. A question about one square then
costs a few operations on as many words as it takes, ceil(number of squares / 32),
and neither a gather nor a scatter. All functions take one environment and are meant
for `jax.vmap`.
"""

import jax
import jax.numpy as jnp
import numpy as np

from popgym_jax import prng

WORD = 32  # bits
TWICE_BIT = (np.uint64(2) << np.arange(WORD, dtype=np.uint64)).astype(np.uint32)
UP_TO_BIT = TWICE_BIT - np.uint32(1)  # bits 0 .. i of a word, for each i


def num_words(num_squares: int) -> int:
    return -(-num_squares // WORD)


def pack(squares: np.ndarray) -> np.ndarray:
    """Boards of bool (..., num_squares) as bits: uint32 (..., words)."""
    *rows, num_squares = squares.shape
    missing = -num_squares % WORD
    padded = np.pad(squares, [(0, 0)] * len(rows) + [(0, missing)])
    in_words = padded.reshape(*rows, -1, WORD).astype(np.uint64)
    bits = in_words << np.arange(WORD, dtype=np.uint64)
    return bits.sum(-1).astype(np.uint32)


def unpack(board: np.ndarray, num_squares: int) -> np.ndarray:
    """The inverse: bits uint32 (words,) as bool (num_squares,)."""
    square = np.arange(num_squares)
    bit = (square % WORD).astype(np.uint32)
    return ((board[square // WORD] >> bit) & 1) == 1


def draw(letters: np.ndarray, board_size: int) -> str:
    """A letter for each square, (board_size^2,), as lines of text."""
    return "\n".join(" ".join(row) for row in letters.reshape(board_size, board_size))


def name(index: int, board_size: int) -> str:
    """A square in words, counted from 1."""
    row, column = divmod(index, board_size)
    return f"row {row + 1}, column {column + 1}"


def square(index: jax.Array, words: int) -> jax.Array:
    """The set of this one square, integer (): uint32 (words,)."""
    bit = np.uint32(1) << jnp.uint32(index % WORD)
    here = jnp.arange(words, dtype=jnp.int32) == index // WORD
    return jnp.where(here, bit, np.uint32(0))


def overlap(board: jax.Array, other: jax.Array) -> jax.Array:
    """Whether two sets share a square, bool ()."""
    return jnp.any((board & other) != 0)


def count(board: jax.Array) -> jax.Array:
    """Number of squares, int32 ()."""
    counts = jax.lax.population_count(board).astype(jnp.int32)
    return jnp.sum(counts, dtype=jnp.int32)


def earlier(board: jax.Array, distance: int) -> jax.Array:
    """The squares from which a square of the board is `distance` further on, uint32 (words,)."""
    skipped, shift = divmod(distance, WORD)
    padded = jnp.concatenate([board, jnp.zeros(skipped + 1, jnp.uint32)])
    low = padded[skipped : skipped + len(board)]
    high = padded[skipped + 1 : skipped + 1 + len(board)]
    if shift == 0:
        return low
    return (low >> shift) | (high << (WORD - shift))


def choose(word: jax.Array, board: jax.Array) -> jax.Array:
    """Index of one of the squares of a set that is not empty, uniformly, int32 ().

    word: random, uint32 ()
    """
    counts = jax.lax.population_count(board).astype(jnp.int32)
    place = jnp.arange(len(board), dtype=jnp.int32)

    # the word: squares up to and including each, as a sum because XLA's cumsum does not fuse
    counts_up_to = jnp.where(place <= place[:, None], counts, 0)  # (words, words)
    up_to_word = jnp.sum(counts_up_to, axis=1, dtype=jnp.int32)
    rank = prng.integer(word, up_to_word[-1])  # of the square, from 0
    chosen = jnp.sum(rank >= up_to_word, dtype=jnp.int32)

    # the bit of that word
    before = jnp.sum(jnp.where(place < chosen, counts, 0), dtype=jnp.int32)
    rank_in_word = rank - before
    bits = jnp.sum(jnp.where(place == chosen, board, 0), dtype=jnp.uint32)
    up_to_bit = jax.lax.population_count(bits & UP_TO_BIT).astype(jnp.int32)  # (32,)
    bit = jnp.sum(rank_in_word >= up_to_bit, dtype=jnp.int32)
    return chosen * WORD + bit
