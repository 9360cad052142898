"""The labyrinths: the law of their mazes, and what random walks of the lock step rarely meet."""

import functools
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import fast_jit, others_slow
from mazelib.generate.BacktrackingGenerator import BacktrackingGenerator
from mazelib.generate.HuntAndKill import HuntAndKill
from mazelib.generate.Prims import Prims
from popgym.core.maze import Cell
from scipy import stats

import popgym_jax
from popgym_jax import maze
from popgym_jax.labyrinth import LabyrinthEscape, LabyrinthExplore
from tests.reference import assert_same, flat_observations, forward, make_reference
from tests.reference.mazes import Escape, Explore, Mazes, is_complete, purposeful, seed_globals, unpack

SIZES = {"Easy": 5, "Medium": 7, "Hard": 9}
REFERENCE_MAZES = {5: 2000, 7: 1000, 9: 1000}
OUR_MAZES = 8000
CLASSES = {"Escape": (LabyrinthEscape, Escape), "Explore": (LabyrinthExplore, Explore)}


# ---------------------------------------------------------------- the law of the mazes


class Sample(NamedTuple):
    """n mazes: open squares without the entrances, bool (n, 2w + 1, 2w + 1); start and end, (n, 2)."""

    open: np.ndarray
    start: np.ndarray
    end: np.ndarray


@functools.cache
def our_mazes(size: int, count: int = OUR_MAZES) -> Sample:
    env = LabyrinthEscape((2 * size, 2 * size))
    walls, start, end = jax.jit(jax.vmap(env.draw_maze))(jax.random.split(jax.random.key(size), count))
    return Sample(~unpack(walls), np.asarray(start), np.asarray(end))


@functools.cache
def reference_mazes(size: int) -> Sample:
    """The reference's, without the one in 10^4 where a cell is walled in."""
    reference = make_reference("LabyrinthExplore" + next(level for level, w in SIZES.items() if w == size))
    seed_globals(size)
    found = []
    while len(found) < REFERENCE_MAZES[size]:
        reference.reset()
        if is_complete(reference.maze.grid):
            found.append((reference.maze.grid == Cell.FREE, reference.maze.start, reference.maze.end))
    return Sample(*map(np.array, zip(*found, strict=True)))


def distances(sample: Sample) -> np.ndarray:
    """Steps from the start to every square, int (n, 2w + 1, 2w + 1), -1 where none lead there."""
    rows = np.arange(len(sample.open))
    is_open = sample.open.copy()
    for place in (sample.start, sample.end):
        is_open[rows, place[:, 0], place[:, 1]] = True
    steps = np.full(is_open.shape, -1, np.int16)
    wave = np.zeros_like(is_open)
    wave[rows, sample.start[:, 0], sample.start[:, 1]] = True
    time = 0
    while wave.any():
        steps[wave] = time
        padded = np.pad(wave, ((0, 0), (1, 1), (1, 1)))
        around = padded[:, 2:, 1:-1] | padded[:, :-2, 1:-1] | padded[:, 1:-1, 2:] | padded[:, 1:-1, :-2]
        wave, time = around & is_open & (steps < 0), time + 1
    return steps


def features(sample: Sample) -> dict[str, np.ndarray]:
    """Numbers of each maze, (n,), and its passages, bool (n, 2w (w - 1))."""
    is_open = sample.open
    exits = sum(np.roll(is_open, shift, axis)[:, 1::2, 1::2].astype(int) for axis in (1, 2) for shift in (1, -1))
    steps = distances(sample)
    return {
        "dead ends": (exits == 1).sum(axis=(1, 2)),
        "junctions of three": (exits == 3).sum(axis=(1, 2)),
        "junctions of four": (exits == 4).sum(axis=(1, 2)),
        "way out": steps[np.arange(len(steps)), sample.end[:, 0], sample.end[:, 1]],
        "farthest": steps.max(axis=(1, 2)),
        "side": 2 * (sample.start == 0).any(axis=1) + (sample.start[:, 0] % 2),
        "start": np.where(sample.start % 2 == 1, sample.start, 0).sum(axis=1),
        "end": np.where(sample.end % 2 == 1, sample.end, 0).sum(axis=1),
        "passages": np.concatenate(
            [is_open[:, 1::2, 2:-1:2].reshape(len(is_open), -1), is_open[:, 2:-1:2, 1::2].reshape(len(is_open), -1)], 1
        ),
    }


def two_sample_p_value(one: np.ndarray, other: np.ndarray) -> float:
    """Chi-square of two histograms, neighbouring values joined until a bin holds 25 of the smaller sample."""
    values, counts = np.unique(np.concatenate([one, other]), return_counts=True)
    needed = 25 * (len(one) + len(other)) / min(len(one), len(other))
    edges, held = [-np.inf], 0
    for value, count in zip(values, counts, strict=True):
        held += count
        if held >= needed:
            edges.append(value + 0.5)
            held = 0
    edges[-1] = np.inf
    return stats.chi2_contingency([np.histogram(x, edges)[0] for x in (one, other)]).pvalue


def same_law_p_value(one: Sample, other: Sample) -> float:
    """Bonferroni over all features; passages one by one, each open in a share of the mazes."""
    p_values = []
    ours, theirs = features(one), features(other)
    for name, x in ours.items():
        y = theirs[name]
        if name == "passages":
            share = np.concatenate([x, y]).mean(axis=0)
            error = np.sqrt(share * (1 - share) * (1 / len(x) + 1 / len(y)))
            p_values.append(len(share) * stats.norm.sf(np.abs((x.mean(0) - y.mean(0)) / error)).min() * 2)
        else:
            p_values.append(two_sample_p_value(x, y))
    return min(1.0, len(p_values) * min(p_values))


def larger_are_slow(sizes: Iterable[int]) -> list[Any]:
    """Those of Medium and Hard: the same program for more cells."""
    larger = {size for level, size in SIZES.items() if level != "Easy"}
    return others_slow(sizes, *set(sizes) - larger)


@pytest.mark.parametrize("size", larger_are_slow(SIZES.values()))
def test_mazes_follow_the_law_of_the_reference(size):
    assert same_law_p_value(our_mazes(size), reference_mazes(size)) > 1e-3


@pytest.mark.parametrize("size", larger_are_slow([3, *SIZES.values(), maze.MAX_SIZE]))
def test_every_maze_is_a_tree_that_reaches_every_cell_and_both_entrances(size):
    sample = our_mazes(size, OUR_MAZES if size in SIZES.values() else 300)
    assert sample.open[:, 1::2, 1::2].all()  # the cells
    assert not sample.open[:, ::2, ::2].any()  # the corners between four cells
    assert (sample.open.sum(axis=(1, 2)) == maze.num_open(size)).all()  # so one passage less than cells
    assert ((distances(sample) >= 0).sum(axis=(1, 2)) == maze.num_open(size) + 2).all()  # all connected


@pytest.mark.parametrize("size", larger_are_slow(SIZES.values()))
def test_entrances_are_uniform_and_opposite(size):
    _, start, end = our_mazes(size)
    edge = 2 * size
    side = np.select([start[:, 0] == 0, start[:, 0] == edge, start[:, 1] == 0, start[:, 1] == edge], range(4), -1)
    along, across = np.where(side < 2, 1, 0), np.where(side < 2, 0, 1)
    rows = np.arange(len(side))
    np.testing.assert_array_equal(start[rows, across] + end[rows, across], edge)
    places = (side * size + start[rows, along] // 2) * size + end[rows, along] // 2
    assert (start[rows, along] % 2 == 1).all() and (end[rows, along] % 2 == 1).all()
    assert 1e-3 < stats.chisquare(np.bincount(places, minlength=4 * size**2)).pvalue < 1 - 1e-3


@pytest.mark.parametrize(
    "generator",
    [lambda w: HuntAndKill(w, w, "serpentine"), lambda w: BacktrackingGenerator(w, w), lambda w: Prims(w, w)],
    ids=["hunts row by row", "hunts from the newest cell", "no walks"],
)
def test_statistics_see_other_generators(generator):
    seed_globals(1)
    sample = our_mazes(5)._replace(open=np.array([generator(5).generate() == 0 for _ in range(1000)]))
    sample = sample._replace(start=sample.start[:1000], end=sample.end[:1000])
    assert (sample.open.sum(axis=(1, 2)) == maze.num_open(5)).all()
    assert same_law_p_value(sample, reference_mazes(5)) < 1e-3


def lowest(cells: jax.Array) -> jax.Array:
    """The first of these cells in reading order (three rows fit one word)."""
    first = jnp.arange(len(cells)) == jnp.argmax(cells != 0)
    return jnp.where(first, cells & -cells, jnp.uint32(0))


@pytest.mark.parametrize("size", larger_are_slow(SIZES.values()))
def test_statistics_see_a_preference_for_the_first_choice(size, monkeypatch):
    fair = maze.pick
    monkeypatch.setattr(maze, "pick", lambda word, cells: jnp.where(word % 5 == 0, lowest(cells), fair(word, cells)))
    assert same_law_p_value(our_mazes.__wrapped__(size), reference_mazes(size)) < 1e-3


def test_picked_cell_is_uniform_in_and_across_words():
    cells = np.array([0x80000001, 0, 0x00F00100, 0xFFFFFFFF], np.uint32)
    words = jnp.asarray(np.random.default_rng(0).integers(2**32, size=39000, dtype=np.uint32))
    picked = np.asarray(jax.jit(jax.vmap(maze.pick, (0, None)))(words, cells))
    bits = (picked[:, :, None] >> np.arange(32, dtype=np.uint32)) & 1
    member = ((cells[:, None] >> np.arange(32, dtype=np.uint32)) & 1) == 1
    assert (bits.sum(axis=(1, 2)) == 1).all()
    counts = bits.sum(axis=0)
    assert not counts[~member].any()
    assert 1e-3 < stats.chisquare(counts[member]).pvalue < 1 - 1e-3


# ---------------------------------------------------------------- moves and views


def first_states(task: str, size: int, count: int = 40):
    """An environment, its parameters, and one of its first states with the start in each of the four sides."""
    env = CLASSES[task][0]((2 * size, 2 * size))
    keys = jax.random.split(jax.random.key(3), count)
    _, states = fast_jit(jax.vmap(env.reset_env, (0, None)))(keys, env.default_params)
    row, column = np.asarray(states.start).T
    sides = [row == 0, row == 2 * size, column == 0, column == 2 * size]
    firsts = [int(np.argmax(side)) for side in sides]
    return env, env.default_params, [jax.tree.map(lambda x, i=i: x[i], states) for i in firsts]


@pytest.mark.parametrize("level", others_slow(SIZES, "Easy"))
@pytest.mark.parametrize("task", CLASSES)
def test_every_move_from_every_open_square_is_that_of_the_reference(task, level):
    env, params, states = first_states(task, SIZES[level])
    reference = make_reference(f"Labyrinth{task}{level}")

    @fast_jit
    @functools.partial(jax.vmap, in_axes=(None, 0, 0))
    def step(state, position, action):
        return env.step_env(None, state.replace(position=position), action, params)[:4]

    for state in states:
        CLASSES[task][1]().insert(reference, state, np.zeros(0))
        explored = reference.explored.copy()
        squares = np.argwhere(reference.maze.grid != Cell.OBSTACLE)
        cases = [(tuple(square), action) for square in squares for action in range(4)]
        raws, rewards, ends, positions = [], [], [], []
        for square, action in cases:
            reference.position, reference.explored, reference.curr_step = square, explored.copy(), 0
            raw, reward, terminated, truncated, _ = reference.step(action)
            raws.append(raw)
            rewards.append(reward)
            ends.append(terminated)
            positions.append(reference.position)
            assert not truncated
        here = jnp.array([square for square, _ in cases], jnp.int32)
        actions = jnp.array([action for _, action in cases])
        obs, after, reward, terminated = step(state, here, actions)
        np.testing.assert_array_equal(obs, flat_observations(reference.observation_space, raws))
        np.testing.assert_array_equal(after.position, positions)
        np.testing.assert_allclose(reward, rewards, rtol=1e-6)
        np.testing.assert_array_equal(terminated, ends)


@pytest.mark.parametrize("task", CLASSES)
def test_view_from_the_north_and_west_walls_is_shifted_and_ends_in_walls(task):
    env, params, states = first_states(task, 5)
    for side, state in enumerate(states):
        codes = np.asarray(env.observe(None, state, None, params)).reshape(10, 5).argmax(axis=1)
        view = codes[:9].reshape(3, 3).T if side >= 2 else codes[:9].reshape(3, 3)  # rows: away from the wall
        ahead = 1 if side % 2 == 0 else -1  # north and west look to higher rows and columns
        grid = ~unpack(state.walls) if side < 2 else ~unpack(state.walls).T
        along = int(state.start[1 if side < 2 else 0])
        beside = slice(max(along - 1, 0), along + 2)
        near = grid[1 if ahead == 1 else -2, beside]
        if ahead == 1:  # wall with the start, next row, and nothing: the second next row is hidden
            assert view[0, 1] == 2 and (view[2] == 1).all()
            np.testing.assert_array_equal(view[1] == 0, near)
        else:  # centred
            assert view[1, 1] == 2 and (view[2] == 1).all()
            np.testing.assert_array_equal(view[0] == 0, near)
        assert codes[9] == 4
    assert (states[0].walls[2] & 0b1010101010) != 0b1010101010  # an open square was hidden in the north


# ---------------------------------------------------------------- ends of episodes


def delayed(bridge: type[Mazes], arrival: int) -> Mazes:
    """A bridge whose agent first bumps into a wall and then does its task so that it is done at step `arrival`."""

    class Delayed(bridge):
        def prepare(self, reference, rng):
            super().prepare(reference, rng)
            needed, done = 0, False
            while not done:
                _, _, done, _, _ = reference.step(purposeful(reference))
                needed += 1
            self.bumps = arrival - needed

        def play(self, reference):
            if reference.curr_step >= self.bumps:
                return purposeful(reference)
            row, column = reference.position
            return next(a for a in range(4) if reference.move(a) == (row, column))

        def __init__(self):
            self.policies = (self.play,)

    return Delayed()


@pytest.mark.parametrize("level", others_slow(SIZES, "Easy"))
@pytest.mark.parametrize("task", CLASSES)
@pytest.mark.parametrize("arrival", others_slow([1022, 1023, 1024], 1023))
def test_task_done_around_the_last_step(task, level, arrival):
    name = f"Labyrinth{task}{level}"
    env, params = popgym_jax.make(name)
    bridge = delayed(CLASSES[task][1], arrival)
    theirs, ours = forward(bridge, env, params, make_reference(name), 4, seed=2)
    assert_same(bridge, theirs, ours)
    last = ours.length - 1, np.arange(4)
    assert (ours.length == min(arrival, 1023)).all()
    assert (ours.terminated[last] == (arrival <= 1023)).all()
    assert (ours.truncated[last] == (arrival >= 1023)).all()


@pytest.mark.parametrize("level", others_slow(SIZES, "Easy"))
@pytest.mark.parametrize("task", CLASSES)
def test_return_of_a_purposeful_agent(task, level):
    name = f"Labyrinth{task}{level}"
    env, params = popgym_jax.make(name)
    bridge = CLASSES[task][1]()
    bridge.policies = (purposeful,)
    theirs, ours = forward(bridge, env, params, make_reference(name), 10, seed=4)
    assert_same(bridge, theirs, ours)
    assert ours.terminated.any(axis=0).all() and not ours.truncated[ours.length - 1, np.arange(10)].any()
    alive = np.arange(len(ours.reward))[:, None] < ours.length
    returns = np.where(alive, ours.reward, 0).sum(axis=0)
    wasted = ours.length - (maze.num_open(SIZES[level]) if task == "Explore" else 0)
    np.testing.assert_allclose(returns, 1 - wasted / 1024, atol=1e-5)
    assert (ours.length >= (maze.num_open(SIZES[level]) if task == "Explore" else 2 * SIZES[level])).all()


@pytest.mark.parametrize("task", CLASSES)
def test_all_environments_that_end_together_get_new_and_different_mazes(task):
    env, params = popgym_jax.make(f"Labyrinth{task}Easy")
    keys = jax.random.split(jax.random.key(5), 300)  # more than are reset at once
    _, state = fast_jit(jax.vmap(env.reset, (0, None)))(keys, params)
    late = state.replace(time=jnp.full(300, 1022, jnp.int32))
    step = fast_jit(jax.vmap(env.step, (0, 0, 0, None)))
    obs, after, _, _, truncated, info = step(keys, late, jnp.zeros(300, jnp.int32), params)
    assert truncated.all() and not after.time.any()
    assert (obs[:, -1] == 1).all() and (info["final_observation"][:, -5] == 1).all()  # no action, and left
    assert len(np.unique(np.concatenate([state.walls, after.walls]), axis=0)) == 600


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize("dims", [(10, 14), (11, 11), (4, 4), (32, 32)])
def test_impossible_dimensions_are_refused(dims):
    message = f"maze_dims must be (n, n) with an even n from 6 to 30, got {dims}"
    with pytest.raises(ValueError, match=re.escape(message)):
        LabyrinthEscape(dims)


def test_impossible_episode_length_is_refused():
    with pytest.raises(ValueError, match="episode_length must be at least 2, got 1"):
        LabyrinthExplore(episode_length=1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Maze environments")
@pytest.mark.parametrize("task", CLASSES)
@pytest.mark.parametrize(("dims", "length"), [((6, 6), 100), ((30, 30), 300)])
def test_lock_step_for_other_arguments(task, dims, length):
    env_class, bridge_class = CLASSES[task]
    env = env_class(dims, length)
    reference = type(make_reference(f"Labyrinth{task}Easy")).__base__(dims, length)
    theirs, ours = forward(bridge_class(), env, env.default_params, reference, 6, seed=6)
    assert_same(bridge_class(), theirs, ours)
    assert ours.length.max() == length - 1
