"""Random perfect mazes, packed into bits.

A maze of size x size cells lies on a grid of (2 size + 1) x (2 size + 1) squares:
cell (i, j) is the square in row 2i + 1 and column 2j + 1; the squares between cells
are passages or walls.

A board is a set of squares, uint32 (2 size + 2,): one word per row, bit x for
column x. Row and column 2 size + 1 lie outside the grid and close boards of walls
in the south and the east.

A cell set is what the generator works on, uint32 (ceil(size (size + 1) / 32),): one
long bit string, low bits first, with bit i (size + 1) + j for cell (i, j). The last
bit of each row stays empty, so that a shift by 1 or by size + 1 is a step to a
neighbour.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from popgym_jax import prng

MAX_SIZE = 15  # a word has room for 2 size + 2 columns


def row(board: jax.Array, index: jax.Array) -> jax.Array:
    """One row of a board, uint32 ()."""
    return board.at[index].get(mode="promise_in_bounds")


def contains(board: jax.Array, position: jax.Array) -> jax.Array:
    """Whether the square at this row and column, int32 (2,), is on the board, bool ()."""
    columns = row(board, position[0])
    return ((columns >> position[1].astype(jnp.uint32)) & 1) == 1


def square(position: jax.Array, num_rows: int) -> jax.Array:
    """The board of one square, uint32 (num_rows,), at this row and column, int32 (2,)."""
    bit = jnp.uint32(1) << position[1].astype(jnp.uint32)
    here = jnp.arange(num_rows, dtype=jnp.int32) == position[0]
    return jnp.where(here, bit, jnp.uint32(0))


def num_open(size: int) -> int:
    """Open squares of a maze: a tree with the cells as nodes and the passages as edges."""
    return 2 * size**2 - 1


class Carved(NamedTuple):
    """A maze that is being carved; four cell sets."""

    visited: jax.Array
    east: jax.Array  # cells with a passage to the next one in the east
    south: jax.Array  # cells with a passage to the next one in the south
    current: jax.Array  # the one cell where the walk is


def generate(words: jax.Array, size: int) -> jax.Array:
    """The walls of a random maze, a board without entrances, from words (2 size^2 - 1,).

    Hunt and kill with the law of the reference, mazelib's HuntAndKill with random
    hunts. There a walk carves from cell to cell, each time into a uniform unvisited
    neighbour, until it has none. Then uniform cells are tried until one is visited
    and has an unvisited neighbour, and the next walk starts there. A try that fails
    changes nothing, so the start of a walk is uniform among such cells. Here it is
    drawn from them directly, and size^2 - 1 trips of one passage each complete the
    maze. The reference stops after (2 size + 1)^2 tries, complete or not: about one
    of its mazes in 10^4 has a cell walled in. On the others, thousands of mazes of
    either side agree in passages, dead ends, junctions and ways
    (tests/test_popgym_mazes.py).
    """
    cells = jnp.asarray(all_cells(size))

    def carve(trip, maze):
        unvisited = cells & ~maze.visited
        ready = maze.visited & neighbours(unvisited, size)
        stuck = ~(maze.current & ready).any()
        hunted = pick(words[2 * trip + 1], ready)
        current = jnp.where(stuck, hunted, maze.current)
        target = pick(words[2 * trip + 2], unvisited & neighbours(current, size))
        pair = current | target
        return Carved(
            east=maze.east | (pair & shift_down(pair, 1)),
            south=maze.south | (pair & shift_down(pair, size + 1)),
            visited=maze.visited | target,
            current=target,
        )

    first = pick(words[0], cells)
    none = jnp.zeros_like(cells)
    begun = Carved(visited=first, east=none, south=none, current=first)
    maze = jax.lax.fori_loop(0, size**2 - 1, carve, begun)
    return walls(maze.east, maze.south, size)


def walls(east: jax.Array, south: jax.Array, size: int) -> jax.Array:
    """The board of all squares but the cells and their passages to the east and south."""
    word, bit = cell_places(size)
    column = 2 * np.arange(size, dtype=np.uint32) + 1
    opens_east = (east[word] >> bit) & 1  # (size, size)
    opens_south = (south[word] >> bit) & 1  # (size, size)
    cell_and_east = (jnp.uint32(1) << column) | (opens_east << (column + 1))
    row_of_cells = cell_and_east.sum(axis=1, dtype=jnp.uint32)  # (size,)
    row_below = (opens_south << column).sum(axis=1, dtype=jnp.uint32)  # (size,)
    rows = jnp.stack([row_of_cells, row_below], axis=1).reshape(-1)
    return ~jnp.pad(rows, 1)


def entrances(words: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Start and end, rows and columns int32 (2,), from random words (3,).

    The start is in the north, south, west or east outer wall next to a uniform
    cell, the end in the opposite wall next to an independent one.
    """
    side = prng.integer(words[0], 4)
    across = jnp.where(side % 2 == 0, jnp.int32(0), jnp.int32(2 * size))
    along = 2 * prng.integer(words[1:], size) + 1
    start = jnp.stack([across, along[0]])
    end = jnp.stack([2 * size - across, along[1]])
    is_north_or_south = side < 2  # else row and column change places
    start = jnp.where(is_north_or_south, start, start[::-1])
    end = jnp.where(is_north_or_south, end, end[::-1])
    return start, end


# ---------------------------------------------------------------- cell sets


def cell_places(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Word and bit of each cell in a cell set, (size, size), the bits in uint32."""
    place = np.arange(size)[:, None] * (size + 1) + np.arange(size)
    return place // 32, (place % 32).astype(np.uint32)


def all_cells(size: int) -> np.ndarray:
    """The set of all cells."""
    word, bit = cell_places(size)
    cells = np.zeros(word.max() + 1, np.uint32)
    np.bitwise_or.at(cells, word, np.uint32(1) << bit)
    return cells


def shift_down(cells: jax.Array, places: int) -> jax.Array:
    """The bit string moved towards bit 0 by fewer than 32 places."""
    next_words = jnp.pad(cells, (0, 1))[1:]
    return (cells >> places) | (next_words << (32 - places))


def shift_up(cells: jax.Array, places: int) -> jax.Array:
    """The bit string moved away from bit 0 by fewer than 32 places."""
    previous_words = jnp.pad(cells, (1, 0))[:-1]
    return (cells << places) | (previous_words >> (32 - places))


def neighbours(cells: jax.Array, size: int) -> jax.Array:
    """What is next to any of these cells: cells, and places that are no cells."""
    beside = shift_down(cells, 1) | shift_up(cells, 1)
    return beside | shift_down(cells, size + 1) | shift_up(cells, size + 1)


def pick(word: jax.Array, cells: jax.Array) -> jax.Array:
    """The set of one of these cells, uniformly random, from one random word."""
    # the rank of the cell among all, counted in each word from the word's own first cell
    counts = jax.lax.population_count(cells).astype(jnp.int32)
    before = jnp.tri(len(cells), k=-1, dtype=bool)
    counts_before = jnp.where(before, counts, 0).sum(axis=1, dtype=jnp.int32)
    rank = prng.integer(word, counts.sum(dtype=jnp.int32)) - counts_before
    chosen = (rank >= 0) & (rank < counts)  # in this word; others compute nonsense below

    # bisect for the bit with `rank` set bits below it
    bit = jnp.zeros(len(cells), jnp.uint32)
    for half in (16, 8, 4, 2, 1):
        below = (cells >> bit) & np.uint32((1 << half) - 1)
        count = jax.lax.population_count(below).astype(jnp.int32)
        above = rank >= count
        bit = jnp.where(above, bit + half, bit)
        rank = jnp.where(above, rank - count, rank)
    return jnp.where(chosen, jnp.uint32(1) << bit, jnp.uint32(0))
