"""Play on both sides: a policy scores and lasts in popgym_jax as it does in the reference package popgym.

The random policy is compared with numbers measured in the reference. The scripted policies see what an agent sees (flat
observations, and their own actions) and need memory to score; the same object plays many environments of either side.
"""

import functools
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
from conftest import fast_jit

import popgym_jax
from benchmarks.popgym_limits import Games, Play, play
from benchmarks.popgym_policies import (
    UNSEEN,
    Count,
    CountCards,
    FilterCartPole,
    FlipPairs,
    IntegrateCartPole,
    Random,
    RecallFirst,
    RecallPrevious,
    Recite,
)
from popgym_jax.registration import FAMILIES, family_and_level
from tests.reference import flat_observations, make_reference, raw_action

NAMES = popgym_jax.registered_envs
OURS = 512  # environments of ours that are played at once
THEIRS = 150  # environments of the reference
LIMIT = 4  # standard errors


# ---------------------------------------------------------------- policies


class CountLate(Count):
    """CountRecall: without the current value."""

    def act(self, obs: np.ndarray) -> np.ndarray:
        value, query = np.split(obs.astype(int), 2, axis=1)
        before, self.counts = self.counts, self.counts + value
        return np.sum(before * query, axis=1)


def around(board: np.ndarray, corners: bool) -> np.ndarray:
    """Sum over the neighbours of each square, 4 or 8 of them; board (B, rows, columns)."""
    rows, columns = board.shape[1:]
    padded = np.pad(board, ((0, 0), (1, 1), (1, 1)))
    shifts = [(i, j) for i in range(3) for j in range(3) if (i, j) != (1, 1) and (corners or 1 in (i, j))]
    return sum(padded[:, i : i + rows, j : j + columns] for i, j in shifts)


class HuntShips:
    """Battleship: next to a hit if there is one, else along a chessboard's black squares, row by row."""

    def __init__(self, size: int):
        self.size = size

    def reset(self, batch: int) -> None:
        self.hits, self.guessed = np.zeros((2, batch, self.size, self.size))
        self.last = None
        row, column = np.indices((self.size, self.size))
        self.hunt = 0.5 * ((row + column) % 2 == 0) - 1e-3 * (row * self.size + column)

    def act(self, obs: np.ndarray) -> np.ndarray:
        everyone = np.arange(len(obs))
        if self.last is not None:
            self.hits[everyone, *self.last] += obs[:, 1]
        score = around(self.hits, corners=False) + self.hunt - 1e3 * self.guessed
        action = score.reshape(len(obs), -1).argmax(1)
        self.last = divmod(action, self.size)
        self.guessed[everyone, *self.last] = 1
        return action


class FlipForgotten(FlipPairs):
    """Concentration: as if nothing had been seen but what is in view."""

    def remember(self, obs: np.ndarray) -> None:
        self.kind[:] = UNSEEN
        super().remember(obs)


class SweepMines:
    """MineSweeper: the square with the lowest risk that its viewed neighbours' numbers suggest."""

    def __init__(self, size: int, mines: int):
        self.size, self.density = size, mines / size**2

    def reset(self, batch: int) -> None:
        self.viewed = np.zeros((batch, self.size, self.size))
        self.number = np.zeros((batch, self.size, self.size))
        self.last = None

    def act(self, obs: np.ndarray) -> np.ndarray:
        everyone = np.arange(len(obs))
        if self.last is not None:
            self.viewed[everyone, *self.last] = 1
            self.number[everyone, *self.last] = obs.argmax(1)
        hidden = around(1 - self.viewed, corners=True)
        rate = self.number / np.maximum(hidden, 1)  # mines per hidden neighbour of a viewed square
        neighbours = around(self.viewed, corners=True)
        risk = np.where(
            neighbours > 0, around(self.viewed * rate, corners=True) / np.maximum(neighbours, 1), self.density
        )
        clear = around(self.viewed * (self.number == 0), corners=True) > 0
        risk = np.where(clear, 0, risk) + 10 * self.viewed
        action = risk.reshape(len(obs), -1).argmin(1)
        self.last = divmod(action, self.size)
        return action


class ExploreThenCommit:
    """MultiarmedBandit: each arm `pulls` times, then the best of them to the end."""

    def __init__(self, arms: int, pulls: int):
        self.arms, self.pulls = arms, pulls

    def reset(self, batch: int) -> None:
        self.paid = np.zeros((batch, self.arms))
        self.time = 0

    def act(self, obs: np.ndarray) -> np.ndarray:
        arm, self.time = self.time // self.pulls, self.time + 1
        if 0 < self.time - 1 <= self.arms * self.pulls:  # the observation answers the previous pull
            self.paid[:, (self.time - 2) // self.pulls] += obs[:, 1]
        return np.full(len(obs), arm) if arm < self.arms else self.paid.argmax(1)


class IntegrateNothing(IntegrateCartPole):
    """VelocityOnlyCartPole: as if the position stayed in the middle."""

    def locate(self, obs: np.ndarray) -> None:
        super().locate(obs)
        self.position = np.zeros_like(self.position)


class SwingUp:
    """(Noisy)PositionOnlyPendulum: follows the angle with a model corrected by what is seen, pumps energy, balances."""

    def __init__(self, angle_gain: float, speed_gain: float):
        self.gains = angle_gain, speed_gain

    def reset(self, batch: int) -> None:
        self.theta: Any = None

    def act(self, obs: np.ndarray) -> np.ndarray:
        seen = np.arctan2(obs[:, 1], obs[:, 0])
        if self.theta is None:
            self.theta, self.speed = seen, np.zeros(len(obs))
        surprise = self.wrap(seen - self.theta)
        theta = self.wrap(self.theta + self.gains[0] * surprise)
        speed = self.speed + self.gains[1] * surprise
        missing = 5 - (speed**2 / 6 + 5 * np.cos(theta))  # energy that it takes to stand upright, J
        swing = 2 * np.sign(missing * speed)
        balance = -(12 * theta + 3 * speed)
        torque = np.clip(np.where((np.abs(theta) < 0.5) & (np.abs(missing) < 2), balance, swing), -2, 2)
        self.speed = np.clip(speed + 0.05 * (15 * np.sin(theta) + 3 * torque), -8, 8)
        self.theta = theta + 0.05 * self.speed
        return torque.astype(np.float32)[:, None]

    @staticmethod
    def wrap(angle: np.ndarray) -> np.ndarray:
        return (angle + np.pi) % (2 * np.pi) - np.pi


class DepthFirst:
    """Labyrinths: depth-first search by dead reckoning, into the goal where it is in view.

    On the north and west wall the view is not centred on the agent (`centred` ignores that); the start, the only square
    on a wall that the search returns to, shows where the agent stands in it.
    """

    SPAN = 21  # squares in each direction from the start
    OBSTACLE, START, GOAL = 1, 2, 3
    MOVES = np.array([[0, -1], [0, 1], [-1, 0], [1, 0]])  # left, right, up, down in (y, x)

    def __init__(self, centred: bool = False):
        self.centred = centred

    def reset(self, batch: int) -> None:
        self.place = np.full((batch, 2), self.SPAN)
        self.back = np.full((batch, 2 * self.SPAN + 1, 2 * self.SPAN + 1), -1)  # the move that undoes the arrival
        self.visited = np.zeros(self.back.shape, bool)
        self.at_start: Any = None

    def act(self, obs: np.ndarray) -> np.ndarray:
        everyone = np.arange(len(obs))
        view = obs[:, :45].reshape(-1, 3, 3, 5).argmax(3)
        if self.at_start is None:
            self.at_start = np.stack(divmod((view == self.START).reshape(-1, 9).argmax(1), 3), axis=1)
        home = (self.place == self.SPAN).all(1, keepdims=True)
        here = np.where(home & (not self.centred), self.at_start, 1)
        self.visited[everyone, *self.place.T] = True
        score = np.zeros((len(obs), 4))
        for action, move in enumerate(self.MOVES):
            y, x = (here + move).T
            inside = (y >= 0) & (x >= 0)
            square = np.where(inside, view[everyone, np.maximum(y, 0), np.maximum(x, 0)], self.OBSTACLE)
            new = (square != self.OBSTACLE) & ~self.visited[everyone, *self.inside(self.place + move).T]
            returns = self.back[everyone, *self.place.T] == action
            score[:, action] = 3 * (square == self.GOAL) + 2 * new + returns
        action = score.argmax(1)
        after = self.inside(self.place + self.MOVES[action])
        first = ~self.visited[everyone, *after.T]
        self.back[everyone[first], *after[first].T] = action[first] ^ 1
        self.place = after
        return action

    def inside(self, place: np.ndarray) -> np.ndarray:
        return np.clip(place, 0, 2 * self.SPAN)  # only episodes that are over run out of the map


# family: its policy for Easy, Medium and Hard
POLICIES: dict[str, tuple[Callable[[], Any], ...]] = {
    "Autoencode": (Recite,) * 3,
    "Battleship": tuple(functools.partial(HuntShips, size) for size in (8, 10, 12)),
    "Concentration": tuple(functools.partial(FlipPairs, *cards) for cards in ((52, 2), (104, 2), (52, 13))),
    "CountRecall": (Count,) * 3,
    "HigherLower": tuple(functools.partial(CountCards, num_decks) for num_decks in (1, 2, 3)),
    "LabyrinthEscape": (DepthFirst,) * 3,
    "LabyrinthExplore": (DepthFirst,) * 3,
    "MineSweeper": tuple(functools.partial(SweepMines, *board) for board in ((4, 2), (6, 6), (8, 10))),
    "MultiarmedBandit": tuple(functools.partial(ExploreThenCommit, *arms) for arms in ((10, 5), (20, 6), (30, 7))),
    "PositionOnlyCartPole": (functools.partial(FilterCartPole, 1e-3),) * 3,
    "NoisyPositionOnlyCartPole": tuple(functools.partial(FilterCartPole, sigma) for sigma in (0.1, 0.2, 0.3)),
    "VelocityOnlyCartPole": (IntegrateCartPole,) * 3,
    "PositionOnlyPendulum": (functools.partial(SwingUp, 1, 20),) * 3,
    "NoisyPositionOnlyPendulum": tuple(
        functools.partial(SwingUp, *gains) for gains in ((0.4, 2), (0.3, 1), (0.2, 0.7))
    ),
    "RepeatFirst": (RecallFirst,) * 3,
    "RepeatPrevious": tuple(functools.partial(RecallPrevious, k - 1) for k in (4, 32, 64)),
}
PERFECT = ("Autoencode", "CountRecall", "RepeatFirst", "RepeatPrevious")  # return 1 with a perfect memory


# ---------------------------------------------------------------- both sides


def Ours(name: str) -> Games:
    return Games(name, OURS, fast_jit)


class Theirs:
    """THEIRS environments of the reference."""

    def __init__(self, name: str):
        self.size = THEIRS
        self.envs = [make_reference(name) for _ in range(THEIRS)]
        self.space, self.actions = self.envs[0].observation_space, self.envs[0].action_space

    def reset(self, seed: int) -> np.ndarray:
        self.raws = [env.reset(seed=THEIRS * seed + i)[0] for i, env in enumerate(self.envs)]
        return flat_observations(self.space, self.raws)

    def step(self, action: np.ndarray, alive: np.ndarray) -> tuple[np.ndarray, ...]:
        reward, done = np.zeros(THEIRS), np.ones(THEIRS, bool)
        for i in np.flatnonzero(alive):
            self.raws[i], reward[i], terminated, truncated, _ = self.envs[i].step(raw_action(self.actions, action[i]))
            done[i] = terminated or truncated
        return flat_observations(self.space, self.raws), reward, done


side = functools.cache(lambda kind, name: kind(name))


def scripted(name: str) -> Any:
    family, level = family_and_level(name)
    return POLICIES[family][level]()


@functools.cache
def reference_play(name: str) -> Play:
    return play(Theirs(name), scripted(name), seed=2)


# ---------------------------------------------------------------- comparison


def moments(sample: np.ndarray) -> tuple[float, float, float]:
    """Mean, variance, and the variance of the squared deviation from the mean."""
    squares = (sample - sample.mean()) ** 2
    return sample.mean(), squares.mean(), squares.var()


def distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Standard errors between the means or between the variances of two samples, whichever is more."""
    (mean, variance, fourth), (other_mean, other_variance, other_fourth) = moments(ours), moments(theirs)
    error = np.sqrt(variance / len(ours) + other_variance / len(theirs))
    spread_error = np.sqrt(fourth / len(ours) + other_fourth / len(theirs))
    return max(abs(mean - other_mean) / (error + 1e-6), abs(variance - other_variance) / (spread_error + 1e-6))


def table_distance(sample: np.ndarray, mean: float, deviation: float, episodes: int) -> float:
    """`distance` to a sample of which only these numbers are known."""
    our_mean, variance, fourth = moments(sample)
    pooled = 1 / len(sample) + 1 / episodes
    of_mean = abs(our_mean - mean) / np.sqrt(deviation**2 * pooled)
    return max(of_mean, abs(variance - deviation**2) / np.sqrt(fourth * pooled))


def test_every_family_has_a_scripted_policy():
    assert set(POLICIES) == set(FAMILIES)


@pytest.mark.parametrize("name", NAMES)
def test_scripted_memory_policy_scores_as_in_the_reference(name):
    ours, theirs = play(side(Ours, name), scripted(name), seed=1), reference_play(name)
    assert distance(ours.returns, theirs.returns) < LIMIT
    assert distance(ours.lengths, theirs.lengths) < LIMIT
    if family_and_level(name)[0] in PERFECT:
        np.testing.assert_allclose(ours.returns, 1, atol=1e-5)
        np.testing.assert_allclose(theirs.returns, 1, atol=1e-5)


# Uniformly random policy in the reference: mean return, standard deviation of a return, mean length, episodes.
REFERENCE_RANDOM = {
    "AutoencodeEasy": (-0.5019, 0.1203, 103.0, 3000),
    "AutoencodeMedium": (-0.4989, 0.0868, 207.0, 2899),
    "AutoencodeHard": (-0.4996, 0.0674, 311.0, 1930),
    "BattleshipEasy": (-0.4422, 0.1580, 64.0, 3000),
    "BattleshipMedium": (-0.4099, 0.1540, 100.0, 3000),
    "BattleshipHard": (-0.3975, 0.1487, 143.9, 3000),
    "ConcentrationEasy": (-0.1889, 0.1050, 104.0, 3000),
    "ConcentrationMedium": (-0.1853, 0.0720, 208.0, 2885),
    "ConcentrationHard": (-0.8338, 0.0865, 104.0, 3000),
    "CountRecallEasy": (-0.9247, 0.0538, 51.0, 3000),
    "CountRecallMedium": (-0.9265, 0.0372, 103.0, 3000),
    "CountRecallHard": (-0.8837, 0.0329, 207.0, 2899),
    "HigherLowerEasy": (0.0046, 0.1314, 51.0, 3000),
    "HigherLowerMedium": (0.0009, 0.0950, 103.0, 3000),
    "HigherLowerHard": (-0.0010, 0.0777, 155.0, 3000),
    "LabyrinthEscapeEasy": (-0.4512, 0.7343, 840.1, 715),
    "LabyrinthEscapeMedium": (-0.8535, 0.4328, 981.1, 612),
    "LabyrinthEscapeHard": (-0.9522, 0.2420, 1013.0, 593),
    "LabyrinthExploreEasy": (-0.3402, 0.1859, 1021.4, 588),
    "LabyrinthExploreMedium": (-0.6094, 0.1360, 1023.0, 587),
    "LabyrinthExploreHard": (-0.7452, 0.0890, 1023.0, 587),
    "MineSweeperEasy": (-0.2329, 0.3216, 6.8, 3000),
    "MineSweeperMedium": (-0.4030, 0.1254, 5.9, 3000),
    "MineSweeperHard": (-0.4331, 0.0832, 6.4, 3000),
    "MultiarmedBanditEasy": (-0.0037, 0.1960, 200.0, 3000),
    "MultiarmedBanditMedium": (-0.0045, 0.1373, 400.0, 1500),
    "MultiarmedBanditHard": (-0.0038, 0.1135, 600.0, 1000),
    "PositionOnlyCartPoleEasy": (0.1113, 0.0594, 22.3, 3000),
    "PositionOnlyCartPoleMedium": (0.0557, 0.0297, 22.3, 3000),
    "PositionOnlyCartPoleHard": (0.0371, 0.0198, 22.3, 3000),
    "NoisyPositionOnlyCartPoleEasy": (0.1113, 0.0594, 22.3, 3000),
    "NoisyPositionOnlyCartPoleMedium": (0.1113, 0.0594, 22.3, 3000),
    "NoisyPositionOnlyCartPoleHard": (0.1113, 0.0594, 22.3, 3000),
    "VelocityOnlyCartPoleEasy": (0.1113, 0.0594, 22.3, 3000),
    "VelocityOnlyCartPoleMedium": (0.0557, 0.0297, 22.3, 3000),
    "VelocityOnlyCartPoleHard": (0.0371, 0.0198, 22.3, 3000),
    "PositionOnlyPendulumEasy": (0.2438, 0.1786, 200.0, 3000),
    "PositionOnlyPendulumMedium": (0.2418, 0.1836, 150.0, 3000),
    "PositionOnlyPendulumHard": (0.2400, 0.1906, 100.0, 3000),
    "NoisyPositionOnlyPendulumEasy": (0.2438, 0.1786, 200.0, 3000),
    "NoisyPositionOnlyPendulumMedium": (0.2438, 0.1786, 200.0, 3000),
    "NoisyPositionOnlyPendulumHard": (0.2438, 0.1786, 200.0, 3000),
    "RepeatFirstEasy": (-0.4999, 0.1235, 51.0, 3000),
    "RepeatFirstMedium": (-0.5006, 0.0430, 415.0, 1446),
    "RepeatFirstHard": (-0.4988, 0.0306, 831.0, 723),
    "RepeatPreviousEasy": (-0.5051, 0.1221, 51.0, 3000),
    "RepeatPreviousMedium": (-0.4989, 0.1011, 103.0, 3000),
    "RepeatPreviousHard": (-0.4997, 0.0893, 155.0, 3000),
}


def random_policy(name: str) -> Random:
    actions = make_reference(name).action_space
    if isinstance(actions, gymnasium.spaces.MultiDiscrete):
        actions = gymnasium.spaces.Discrete(np.prod(actions.nvec))
    return Random(actions)


@pytest.mark.parametrize("name", NAMES)
def test_random_policy_scores_what_it_scores_in_the_reference(name):
    mean, deviation, mean_length, episodes = REFERENCE_RANDOM[name]
    ours = play(side(Ours, name), random_policy(name), seed=3)
    assert table_distance(ours.returns, mean, deviation, episodes) < LIMIT
    error = ours.lengths.std() * np.sqrt(1 / OURS + 1 / episodes)
    assert abs(ours.lengths.mean() - mean_length) < LIMIT * error + 0.05  # the table rounds


# ---------------------------------------------------------------- the comparison can fail


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("RepeatPreviousEasy", RecallPrevious(4)),
        ("RepeatPreviousHard", RecallPrevious(62)),
        ("CountRecallEasy", CountLate()),
        ("CountRecallHard", CountLate()),
        ("ConcentrationEasy", FlipForgotten(52, 2)),
        ("LabyrinthEscapeEasy", DepthFirst(centred=True)),
        ("VelocityOnlyCartPoleHard", IntegrateNothing()),
        ("NoisyPositionOnlyPendulumHard", SwingUp(1, 20)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_comparison_sees_a_policy_that_is_slightly_wrong(name, policy):
    ours = play(side(Ours, name), policy, seed=1)
    assert distance(ours.returns, reference_play(name).returns) > 3 * LIMIT
