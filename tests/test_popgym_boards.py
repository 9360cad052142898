"""Battleship, MineSweeper, MultiarmedBandit and VelocityOnlyCartPole beyond the lock step with random play.

The laws of what a reset draws, against the reference's own draws where it has them in number, each statistic with a
planted bias that it must reject; rare endings; other constructor arguments.
"""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import fast_jit, others_slow
from popgym.envs.battleship import Battleship as ReferenceBattleship
from popgym.envs.minesweeper import HiddenSquare
from popgym.envs.multiarmed_bandit import MultiarmedBandit as ReferenceBandit
from popgym.envs.velocity_only_cartpole import VelocityOnlyCartPole as ReferenceVelocityOnly
from scipy import stats

import popgym_jax
from popgym_jax import battleship, boards, prng
from popgym_jax.battleship import Battleship
from popgym_jax.cartpole import VelocityOnlyCartPole
from popgym_jax.minesweeper import MineSweeper
from popgym_jax.multiarmed_bandit import MultiarmedBandit
from popgym_jax.registration import family_and_level
from tests.reference import assert_same, backward, bandit, forward, make_reference, physics
from tests.reference import boards as bridges

BOARD_NAMES = [name for name in popgym_jax.registered_envs if name.startswith(("Battleship", "MineSweeper"))]
MINE_NAMES = [name for name in BOARD_NAMES if name.startswith("MineSweeper")]


def two_sample_p_value(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Chi-square of whether two samples of integers have one law; values seen less than 20 times count as one."""
    values, position = np.unique(np.concatenate([ours, theirs]), return_inverse=True)
    counts = np.stack([np.bincount(x, minlength=len(values)) for x in np.split(position, [len(ours)])])
    rare = counts.sum(axis=0) < 20
    table = np.concatenate([counts[:, ~rare], counts[:, rare].sum(axis=1, keepdims=True)], axis=1)
    return stats.chi2_contingency(table[:, table.sum(axis=0) > 0]).pvalue


# ---------------------------------------------------------------- sets of squares


def test_sets_of_squares_are_what_numpy_says():
    rng = np.random.default_rng(0)
    for num_squares in (16, 32, 36, 100, 144):
        board, other = rng.random((2, num_squares)) < 0.2
        bits, words = boards.pack(board), boards.num_words(num_squares)
        assert bits.shape == (words,) and bits.dtype == np.uint32
        np.testing.assert_array_equal(bridges.unpack(bits, num_squares), board)
        assert boards.count(jnp.asarray(bits)) == board.sum()
        assert boards.overlap(bits, boards.pack(other)) == (board & other).any()
        for index in (0, 15, num_squares - 1):
            np.testing.assert_array_equal(
                boards.square(jnp.int32(index), words), boards.pack(np.eye(num_squares) > 0)[index]
            )
        for distance in (0, 1, 10, 12, 32, 36, 70):
            moved = np.zeros(num_squares, bool)
            moved[: max(num_squares - distance, 0)] = board[distance:]
            np.testing.assert_array_equal(boards.earlier(jnp.asarray(bits), distance), boards.pack(moved))


def test_choose_gives_each_square_of_a_set_the_same_share_of_all_draws():
    board = np.random.default_rng(1).random(144) < 0.3
    draws = jnp.asarray((np.arange(100 * board.sum()) + 0.5) * 2**32 / (100 * board.sum()), jnp.uint32)
    chosen = jax.vmap(boards.choose, (0, None))(draws, jnp.asarray(boards.pack(board)))
    np.testing.assert_array_equal(np.bincount(chosen, minlength=144), 100 * board)


# ---------------------------------------------------------------- where the ships lie


def our_ships(env: Battleship, num: int, seed: int = 2) -> np.ndarray:
    """Boards of each ship alone, in the order of placement, bool (num, ships, squares)."""

    def place(key):
        free = jnp.asarray(boards.pack(np.ones(env.num_squares, bool)))
        ships = []
        for draw, size in zip(prng.bits(key, len(env.ship_sizes)), env.ship_sizes, strict=True):
            ships.append(battleship.place_ship(draw, free, env.board_size, size))
            free &= ~ships[-1]
        return jnp.stack(ships), env.place_ships(key)

    ships, together = jax.jit(jax.vmap(place))(jax.random.split(jax.random.key(seed), num))
    ships = bridges.unpack(ships, env.num_squares)
    np.testing.assert_array_equal(bridges.unpack(together, env.num_squares), ships.sum(axis=1))  # no overlap
    return ships


@functools.cache
def their_ships(board_size: int, ship_sizes: tuple[int, ...], num: int) -> np.ndarray:
    """The same of the reference."""
    reference = ReferenceBattleship(board_size, list(ship_sizes))
    reference.np_random = np.random.default_rng(3)
    ships = np.zeros((num, len(ship_sizes), board_size**2), bool)
    for one in ships:
        board = np.zeros((board_size, board_size), np.int8)
        for ship, size in zip(one, ship_sizes, strict=True):
            before = board.ravel().copy()
            ship[:] = reference.place_ship(board, size).ravel() != before
    return ships


def place_id(ship: np.ndarray) -> np.ndarray:
    """A number for each set of squares of one straight ship, bool (..., squares): first and last square."""
    last = ship.shape[-1] - 1 - np.argmax(ship[..., ::-1], axis=-1)
    return np.argmax(ship, axis=-1) * ship.shape[-1] + last


def features(ships: np.ndarray) -> dict[str, np.ndarray]:
    """Integers (boards,) of which each describes how the ships lie."""
    board_size = int(np.sqrt(ships.shape[-1]))
    grids = ships.reshape(*ships.shape[:2], board_size, board_size)
    beside = np.zeros_like(grids)  # squares next to each ship
    beside[..., 1:, :] |= grids[..., :-1, :]
    beside[..., :-1, :] |= grids[..., 1:, :]
    beside[..., 1:] |= grids[..., :-1]
    beside[..., :-1] |= grids[..., 1:]
    touching = np.einsum("bsrc,btrc->bst", beside.astype(int), grids.astype(int)) > 0
    lies_across = grids.any(axis=-1).sum(axis=-1) == 1  # (boards, ships)
    pairs = np.triu_indices(ships.shape[1], 1)
    found = {f"place of ship {i}": place_id(ships[:, i]) for i in range(ships.shape[1])}
    found["orientations"] = lies_across @ 2 ** np.arange(ships.shape[1])
    found["ships that touch"] = touching[:, pairs[0], pairs[1]].sum(axis=1)
    found["squares on the edge"] = ships.any(axis=1).reshape(-1, board_size, board_size)[:, [0, -1]].sum(axis=(1, 2))
    return found


def ship_p_values(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    mine, other = features(ours), features(theirs)
    return {name: two_sample_p_value(mine[name], other[name]) for name in mine}


@pytest.mark.parametrize("board_size", others_slow([8, 12], 8))
def test_ships_lie_as_in_the_reference(board_size):
    env = Battleship(board_size)
    ours = our_ships(env, 8000)
    assert (ours.sum(axis=-1) == env.ship_sizes).all() and ours.sum(axis=1).max() == 1
    p_values = ship_p_values(ours, their_ships(board_size, env.ship_sizes, 4000))
    assert min(p_values.values()) > 1e-3, p_values


def test_ship_statistics_see_ships_that_are_pushed_back_onto_the_board():
    rng = np.random.default_rng(4)
    ships = np.zeros((4000, 4, 8, 8), bool)
    for one in ships:
        for ship, size in zip(one, (2, 3, 3, 4), strict=True):
            while not ship.any() or (one.sum(axis=0) > 1).any():
                row, column, across = *rng.integers(8, size=2), rng.integers(2)
                ship[:] = False
                if across:
                    ship[row, min(column, 8 - size) :][:size] = True
                else:
                    ship[min(row, 8 - size) :, column][:size] = True
    p_values = ship_p_values(ships.reshape(4000, 4, 64), their_ships(8, (2, 3, 3, 4), 4000))
    assert all(p_values[f"place of ship {i}"] < 1e-3 for i in range(4)), p_values


def test_ship_statistics_see_ships_that_keep_a_distance():
    ships = our_ships(Battleship(8), 16000)
    apart = ships[features(ships)["ships that touch"] == 0]
    assert len(apart) > 2000
    assert ship_p_values(apart, their_ships(8, (2, 3, 3, 4), 4000))["ships that touch"] < 1e-3


def pairs_of_places(ships: np.ndarray) -> np.ndarray:
    """A number for each pair of places, from boards with two ships."""
    return place_id(ships[:, 0]) * 1000 + place_id(ships[:, 1])


def all_pairs_of_places() -> np.ndarray:
    """Every way in which two ships of 3 lie on 4 x 4 squares, bool (pairs, 2, 16)."""
    grid = np.zeros((4, 2, 4, 4), bool)  # row and first column; and the same, turned
    for row in range(4):
        for column in range(2):
            grid[row, column, row, column : column + 3] = True
    places = np.concatenate([grid.reshape(-1, 4, 4), grid.reshape(-1, 4, 4).transpose(0, 2, 1)]).reshape(16, 16)
    pairs = np.stack(np.broadcast_arrays(places[:, None], places[None]), axis=2).reshape(-1, 2, 16)
    return pairs[pairs.sum(axis=1).max(axis=1) == 1]


def sequential_p_value(ships: np.ndarray) -> float:
    """Chi-square of pairs against: first ship uniform over 16 places, second over those that it leaves."""
    pairs = all_pairs_of_places()
    _, first, places_left = np.unique(place_id(pairs[:, 0]), return_inverse=True, return_counts=True)
    expected = len(ships) / 16 / places_left[first]
    counts = (pairs_of_places(ships)[:, None] == pairs_of_places(pairs)).sum(axis=0)
    assert counts.sum() == len(ships)
    return stats.chisquare(counts, expected).pvalue


@pytest.mark.slow
def test_every_ship_is_uniform_over_the_places_that_the_earlier_ones_leave():
    ours, theirs = our_ships(Battleship(4, (3, 3)), 20000), their_ships(4, (3, 3), 6000)
    assert sequential_p_value(theirs) > 1e-3
    assert sequential_p_value(ours) > 1e-3
    assert two_sample_p_value(pairs_of_places(ours), pairs_of_places(theirs)) > 1e-3


@pytest.mark.slow
def test_pair_statistics_see_ships_placed_jointly_uniformly_or_in_another_order():
    pairs = all_pairs_of_places()
    jointly = pairs[np.random.default_rng(5).integers(len(pairs), size=20000)]
    assert sequential_p_value(jointly) < 1e-3
    assert two_sample_p_value(pairs_of_places(jointly), pairs_of_places(their_ships(4, (3, 3), 6000))) < 1e-3
    swapped = our_ships(Battleship(4, (3, 2)), 20000)[:, ::-1]
    assert two_sample_p_value(pairs_of_places(swapped), pairs_of_places(their_ships(4, (2, 3), 6000))) < 1e-3
    ordered = our_ships(Battleship(4, (2, 3)), 20000)
    assert two_sample_p_value(pairs_of_places(ordered), pairs_of_places(their_ships(4, (2, 3), 6000))) > 1e-3


# ---------------------------------------------------------------- where the mines lie


@functools.cache
def our_mines(name: str, num: int = 20000) -> np.ndarray:
    """Boards of mines, bool (num, squares)."""
    env, _ = popgym_jax.make(name)
    mines = jax.jit(jax.vmap(env.place_mines))(jax.random.split(jax.random.key(6), num))
    mines = bridges.unpack(mines, env.num_squares)
    assert (mines.sum(axis=1) == env.num_mines).all()
    return mines


def square_p_value(mines: np.ndarray) -> float:
    """Chi-square of mines per square. Squares of one board are correlated by -1 / (squares - 1), hence the factor."""
    num, squares = mines.shape
    share = mines[0].sum() / squares
    deviation = mines.sum(axis=0) - num * share
    statistic = (deviation**2).sum() / (num * share * (1 - share)) * (squares - 1) / squares
    return stats.chi2.sf(statistic, squares - 1)


def mine_pair_p_value(mines: np.ndarray) -> float:
    """Any two squares both hold a mine with probability m (m-1) / (squares (squares-1)): Bonferroni over pairs."""
    num, squares = mines.shape
    placed = mines[0].sum()
    first, second = np.triu_indices(squares, 1)
    together = (mines.T.astype(float) @ mines)[first, second].astype(int)
    law = stats.binom(num, placed * (placed - 1) / (squares * (squares - 1)))
    p_values = 2 * np.minimum(law.cdf(together), law.sf(together - 1))
    return min(1.0, len(first) * p_values.min())


@pytest.mark.parametrize("name", MINE_NAMES)
def test_mines_are_a_uniform_set_of_squares(name):
    mines = our_mines(name)
    assert 1e-3 < square_p_value(mines) < 1 - 1e-3
    assert mine_pair_p_value(mines) > 1e-3
    if name == "MineSweeperEasy":  # of two mines every one of the 120 sets can be counted
        assert stats.chisquare(np.unique(mines @ 2 ** np.arange(16), return_counts=True)[1]).pvalue > 1e-3


def test_mine_statistics_see_a_first_row_that_is_a_tenth_too_dangerous():
    weight = np.repeat([1.1, 1, 1, 1, 1, 1], 6)
    order = np.random.default_rng(7).exponential(size=(20000, 36)) / weight  # the smallest: by weight, one by one
    assert square_p_value(order <= np.sort(order, axis=1)[:, 5:6]) < 1e-3


def test_mine_pair_statistic_sees_mines_that_come_in_rows():
    rng = np.random.default_rng(8)
    mines = np.zeros((20000, 64), bool)
    mines[np.arange(20000)[:, None], (rng.integers(64, size=(20000, 1)) + np.arange(10)) % 64] = True
    law = stats.binom(20000, 10 / 64)
    assert 64 * min(law.cdf(mines.sum(axis=0)).min(), law.sf(mines.sum(axis=0)).min()) > 1e-3  # fine square by square
    assert mine_pair_p_value(mines) < 1e-3


def test_mine_statistics_see_sampling_that_gives_the_last_squares_too_little():
    rng = np.random.default_rng(9)
    mines = np.zeros((20000, 16), bool)
    for board in mines:
        for _ in range(2):  # a square that is taken already passes its mine on to the next
            square = rng.integers(16)
            board[square if not board[square] else (square + 1) % 16] = True
    assert mine_pair_p_value(mines) < 1e-3


def their_numbers(name: str, num: int) -> np.ndarray:
    """Numbers of all squares of boards of the reference, (num, squares)."""
    reference = make_reference(name)
    reference.np_random = np.random.default_rng(10)
    numbers = []
    for _ in range(num):
        reference.reset()
        numbers.append(reference.neighbor_grid.ravel().copy())
    return np.array(numbers)


@pytest.mark.parametrize("name", MINE_NAMES)
def test_numbers_on_the_board_have_the_law_of_the_reference(name):
    env, params = popgym_jax.make(name)
    theirs, mines = their_numbers(name, 4000), our_mines(name)[:8000]
    state = env.reset_env(jax.random.key(0), params)[1]
    show = jax.vmap(lambda mines, square: env.observe(None, state.replace(mines=mines), square, params), (None, 0))
    shown = jax.jit(jax.vmap(show, (0, None)))(jnp.asarray(boards.pack(mines)), jnp.arange(env.num_squares))
    ours = np.asarray(shown.argmax(axis=-1))  # (boards, squares)
    corner, middle = 0, env.num_squares // 2 + env.board_size // 2
    statistics = {
        "corner": lambda x: x[:, corner],
        "middle": lambda x: x[:, middle],
        "largest": lambda x: x.max(axis=1),
        "zeros": lambda x: (x == 0).sum(axis=1),
        "sum": lambda x: x.sum(axis=1),
    }
    for label, statistic in statistics.items():
        assert two_sample_p_value(statistic(ours), statistic(theirs)) > 1e-3, label
    for label in ("corner", "middle", "sum"):  # without the square itself, as the game is known
        planted = ours - mines
        assert two_sample_p_value(statistics[label](planted), statistics[label](theirs)) < 1e-3, label


# ---------------------------------------------------------------- arms and payouts


@functools.cache
def arms(num: int = 8000) -> np.ndarray:
    """Probabilities of fresh episodes, (num, 10)."""
    env = MultiarmedBandit()
    reset = fast_jit(jax.vmap(env.reset_env, (0, None)))
    return np.asarray(reset(jax.random.split(jax.random.key(11), num), env.default_params)[1].probabilities)


def largest_correlation(x: np.ndarray) -> float:
    """In units of its standard error."""
    return np.abs(np.corrcoef(x.T) - np.eye(x.shape[1])).max() * np.sqrt(len(x))


def test_arms_are_uniform_and_independent():
    drawn = arms()
    assert drawn.dtype == np.float32 and drawn.min() >= 0 and drawn.max() < 1
    assert min(stats.kstest(arm, "uniform").pvalue for arm in drawn.T) > 1e-3
    assert stats.kstest(drawn.ravel(), "uniform").pvalue > 1e-3
    assert stats.kstest(drawn.max(axis=1) ** 10, "uniform").pvalue > 1e-3  # the law of the best of ten
    assert largest_correlation(drawn) < 4


def test_arm_statistics_see_a_slightly_favourable_beta_and_arms_that_share_their_luck():
    rng = np.random.default_rng(12)
    assert stats.kstest(rng.beta(1.05, 1, 80000), "uniform").pvalue < 1e-3
    luck = rng.normal(size=(8000, 1)) * 0.3 + rng.normal(size=(8000, 10))
    shared = stats.norm(0, np.sqrt(1.09)).cdf(luck)
    assert min(stats.kstest(arm, "uniform").pvalue for arm in shared.T) > 1e-3  # arm by arm nothing is wrong
    assert largest_correlation(shared) > 4
    assert stats.kstest(shared.max(axis=1) ** 10, "uniform").pvalue < 1e-3


def payouts(env: MultiarmedBandit) -> tuple[np.ndarray, np.ndarray]:
    """Probability of the arm that was pulled, and whether it paid, (4000, 20), from steps."""
    params = env.default_params

    def play(key):
        key_reset, key_steps = jax.random.split(key)
        _, state = env.reset_env(key_reset, params)

        def step(state, key):
            arm = state.time % env.num_bandits
            obs, after, reward, _, _ = env.step_env(key, state, arm, params)
            return after, (state.probabilities[arm], obs[1], reward)

        return jax.lax.scan(step, state, jax.random.split(key_steps, 20))[1]

    chance, paid, reward = jax.jit(jax.vmap(play))(jax.random.split(jax.random.key(13), 4000))
    np.testing.assert_array_equal(np.sign(reward), 2 * paid - 1)
    return np.asarray(chance), np.asarray(paid)


def payout_p_value(chance: np.ndarray, paid: np.ndarray) -> float:
    """Chi-square of payouts against their probabilities, in ten classes of probability."""
    kind = np.minimum((10 * chance).astype(int), 9).ravel()
    excess = np.bincount(kind, (paid - chance).ravel())
    return stats.chi2.sf((excess**2 / np.bincount(kind, (chance * (1 - chance)).ravel())).sum(), 10)


def payout_correlation(chance: np.ndarray, paid: np.ndarray) -> float:
    """Of successive payouts beyond what their probabilities explain, in standard errors."""
    surprise = (paid - chance) / np.sqrt(chance * (1 - chance) + 1e-9)
    product = surprise[:, 1:] * surprise[:, :-1]
    return product.mean() / product.std() * np.sqrt(product.size)


def test_arms_pay_with_their_probability_each_time_anew():
    chance, paid = payouts(MultiarmedBandit())
    assert payout_p_value(chance, paid) > 1e-3
    assert abs(payout_correlation(chance, paid)) < 4


def test_payout_statistics_see_a_bent_probability_and_a_draw_that_is_kept():
    bent = MultiarmedBandit()
    bent.sample_payout = lambda key: MultiarmedBandit().sample_payout(key) ** (1 / 1.1)  # pays with p ** 1.1
    assert payout_p_value(*payouts(bent)) < 1e-3
    chance, _ = payouts(MultiarmedBandit())
    kept = np.random.default_rng(20).random((4000, 1)) < chance
    assert payout_correlation(chance, kept) > 4


# ---------------------------------------------------------------- other arguments


@pytest.mark.slow
@pytest.mark.parametrize("replay", [forward, backward])
@pytest.mark.parametrize(
    ("bridge", "env", "reference"),
    [
        (bridges.BRIDGES["Battleship"], Battleship(6, (2, 3)), ReferenceBattleship(6, [2, 3])),
        (bridges.BRIDGES["Battleship"], Battleship(5, [1, 5]), ReferenceBattleship(5, [1, 5])),
        (bridges.BRIDGES["Battleship"], Battleship(19, (2, 19, 4)), ReferenceBattleship(19, [2, 19, 4])),
        (bandit.BRIDGES["MultiarmedBandit"], MultiarmedBandit(3, 50), ReferenceBandit(3, 50)),
        (bandit.BRIDGES["MultiarmedBandit"], MultiarmedBandit(1, 1), ReferenceBandit(1, 1)),
        (
            physics.BRIDGES["VelocityOnlyCartPole"],
            VelocityOnlyCartPole(17),
            ReferenceVelocityOnly(max_episode_length=17),
        ),
    ],
    ids=["6x6", "5x5", "19x19", "3 arms", "1 arm", "17 steps"],
)
def test_lock_step_with_other_arguments(bridge, env, reference, replay):
    assert_same(bridge, *replay(bridge, env, env.default_params, reference, episodes=20, seed=14))


@pytest.mark.parametrize("board_size", [1, 129])
def test_impossible_board_size_is_refused(board_size):
    with pytest.raises(ValueError, match=f"^board_size must be 2 to 128, got {board_size}$"):
        Battleship(board_size)


@pytest.mark.parametrize("ship_sizes", [(), (0, 2), (2, 5), (2, 2, 2, 2, 2, 2, 2, 2, 2), (4, 4, 4, 3)])
def test_ships_that_might_not_fit_are_refused(ship_sizes):
    with pytest.raises(ValueError) as error:
        Battleship(4, ship_sizes)
    expected = f"ship_sizes must be ships that always fit on 4 x 4 squares, got {ship_sizes}"
    assert str(error.value) == expected


def test_a_board_without_water_is_refused_because_a_miss_would_have_no_reward():
    with pytest.raises(ZeroDivisionError):
        reference = ReferenceBattleship(2, [1, 1, 1, 1])
        reference.reset()
        reference.step((0, 0))
    with pytest.raises(ValueError, match="ship_sizes must be"):
        Battleship(2, (1, 1, 1, 1))


def test_unknown_difficulty_is_refused():
    with pytest.raises(ValueError, match="^difficulty must be easy, medium or hard, got 'Easy'$"):
        MineSweeper("Easy")


@pytest.mark.parametrize("argument", ["num_bandits", "episode_length"])
def test_no_arms_and_no_steps_are_refused(argument):
    with pytest.raises(ValueError, match=f"^{argument} must be at least 1, got 0$"):
        MultiarmedBandit(**{argument: 0})


@pytest.mark.parametrize("family", ["Battleship", "MineSweeper", "MultiarmedBandit", "VelocityOnlyCartPole"])
def test_need_of_the_previous_action_is_that_of_the_reference(family):
    env, _ = popgym_jax.make(family + "Medium")
    assert env.obs_requires_prev_action == make_reference(family + "Medium").obs_requires_prev_action


# ---------------------------------------------------------------- endings that random play does not reach


@pytest.mark.parametrize(
    ("name", "policy", "terminated", "truncated", "length", "returns"),
    [
        ("BattleshipEasy", bridges.hunt, True, False, 12, 1.0),
        ("BattleshipMedium", bridges.sink_with_the_last_guess, True, True, 100, 0.0),
        ("BattleshipEasy", bridges.waste_the_last_guess, False, True, 64, 11 / 12 - 53 / 52),
        ("BattleshipEasy", bridges.wasted, False, True, 64, -64 / 52),
        ("MineSweeperMedium", bridges.clear_all, True, False, 30, 1.0),
        ("MineSweeperMedium", bridges.clear_all_but_one, False, True, 30, 29 / 30 - 0.5 / 28),
        ("MineSweeperHard", bridges.explode_with_the_last_click, True, False, 54, -1.0),
    ],
)
def test_ending(name, policy, terminated, truncated, length, returns):
    bridge = copy.copy(bridges.BRIDGES[family_and_level(name)[0]])
    bridge.policies = (policy,)
    theirs, ours = forward(bridge, *popgym_jax.make(name), make_reference(name), episodes=10, seed=15)
    assert_same(bridge, theirs, ours)
    assert (theirs.length == length).all()
    assert (ours.terminated[-1] == terminated).all() and (ours.truncated[-1] == truncated).all()
    np.testing.assert_allclose(ours.reward.sum(axis=0), returns, atol=1e-6)


def test_ship_hit_twice_is_a_miss_the_second_time():
    env, params = popgym_jax.make("BattleshipEasy")
    _, state = env.reset_env(jax.random.key(16), params)
    reference = make_reference("BattleshipEasy")
    bridges.BRIDGES["Battleship"].insert(reference, state, np.zeros(0))
    ship, water = int(np.argmax(reference.board)), int(np.argmin(reference.board))
    seen = []
    for square in (ship, ship, water, water, ship):
        obs, state, reward, terminated, _ = env.step_env(jax.random.key(0), state, square, params)
        raw, their_reward, their_terminated, truncated, _ = reference.step(divmod(square, 8))
        seen.append((int(obs.argmax()), raw))
        np.testing.assert_allclose(reward, their_reward, rtol=1e-6)
        assert not (terminated or their_terminated or truncated or env.is_truncated(state, params))
    assert seen == [(1, 1), (0, 0), (0, 0), (0, 0), (0, 0)]


@pytest.mark.parametrize("square", [HiddenSquare.MINE, HiddenSquare.VIEWED, HiddenSquare.CLEAR])
def test_minesweeper_is_truncated_at_its_last_click_only_where_that_neither_wins_nor_loses(square):
    env, params = popgym_jax.make("MineSweeperEasy")
    reference = make_reference("MineSweeperEasy")
    reference.reset(seed=17)
    hidden = bridges.BRIDGES["MineSweeper"].hidden(reference)
    state = env.reset_env(jax.random.key(0), params)[1].replace(**jax.tree.map(jnp.asarray, hidden))
    clear = list(bridges.of_kind(reference, HiddenSquare.CLEAR))
    mine = bridges.of_kind(reference, HiddenSquare.MINE)[0]
    last = {HiddenSquare.MINE: mine, HiddenSquare.VIEWED: clear[0], HiddenSquare.CLEAR: clear[-1]}[square]
    flags = []
    for click in [*clear[:-1], last]:
        _, state, reward, terminated, _ = env.step_env(jax.random.key(0), state, int(click), params)
        _, their_reward, *theirs, _ = reference.step(divmod(int(click), 4))
        np.testing.assert_allclose(reward, their_reward, rtol=1e-6)
        flags.append((bool(terminated), bool(env.is_truncated(state, params))))
        assert list(flags[-1]) == theirs
    assert flags[:-1] == [(False, False)] * 13
    assert flags[-1] == ((False, True) if square == HiddenSquare.VIEWED else (True, False))


# ---------------------------------------------------------------- VelocityOnlyCartPole


@pytest.mark.slow
def test_velocity_only_cartpole_shows_positions_at_every_start_and_velocities_after():
    env, params = popgym_jax.make("VelocityOnlyCartPoleEasy")
    keys = jax.random.split(jax.random.key(18), 64)
    obs, state = fast_jit(jax.vmap(env.reset, (0, None)))(keys, params)
    np.testing.assert_array_equal(obs, state.physics[:, ::2])
    step = fast_jit(jax.vmap(env.step, (0, 0, None, None)))
    starts = 0
    for _ in range(15):  # pushed one way the pole falls after 8 to 11 steps
        obs, state, _, terminated, _, info = step(keys, state, 1, params)
        fresh = np.asarray(terminated)
        starts += fresh.sum()
        np.testing.assert_array_equal(obs[fresh], state.physics[fresh, ::2])
        np.testing.assert_array_equal(obs[~fresh], state.physics[~fresh, 1::2])
        assert (np.abs(info["final_observation"])[fresh] > 0.5).all()  # fast by the time it falls
    assert starts == 64


@pytest.mark.parametrize("name", [name for name in popgym_jax.registered_envs if "Velocity" in name])
def test_reset_of_the_reference_shows_positions_too(name):
    reference = make_reference(name)
    obs, _ = reference.reset(seed=19)
    np.testing.assert_array_equal(obs, reference.state[::2].astype(np.float32))
