"""The reference policies of benchmarks/popgym_policies.py and the table of what they score."""

import functools
import itertools
import sys
from collections import Counter

import numpy as np
import pytest
from conftest import ROOT, fast_jit, run_here, tiny_flags

import popgym_jax
import ppo_s5_popgym as ppo
from benchmarks import collect, popgym_grid, popgym_limits, popgym_policies
from benchmarks.collect import read_rows
from popgym_jax.registration import FAMILIES, family_and_level

EASY = [
    pytest.param(family + "Easy", marks=[pytest.mark.slow] if family.endswith("Pendulum") else [])  # it plans long
    for family in FAMILIES
]
TABLE = {row["env"]: row for row in read_rows(popgym_limits.LIMITS)}
EPISODES = 48

# the highest return that any episode can have, where it is not 1
HIGHEST = {f"HigherLower{level}": (n - 1) / n for level, n in (("Easy", 52), ("Medium", 104), ("Hard", 156))}
HIGHEST |= {f"LabyrinthEscape{level}": 1 - d / 1024 for level, d in (("Easy", 10), ("Medium", 14), ("Hard", 18))}


@functools.cache
def plays(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns of the random and of the reference policy in the same episodes, (EPISODES,) each."""
    games = popgym_limits.Games(name, EPISODES, fast_jit)
    by_chance = popgym_limits.play(games, popgym_policies.Random(games.action_space), seed=5)
    reference = popgym_limits.play(games, popgym_policies.reference_policy(name), seed=5)
    return by_chance.returns, reference.returns


@pytest.mark.parametrize("name", EASY)
def test_the_reference_policy_is_far_better_than_chance_and_within_what_is_possible(name):
    by_chance, reference = plays(name)
    error = np.sqrt((by_chance.var() + reference.var()) / EPISODES)
    assert reference.mean() - by_chance.mean() > 6 * error
    assert reference.max() <= HIGHEST.get(name, 1) + 1e-5


@pytest.mark.parametrize("name", EASY)
def test_the_table_says_what_the_policies_score(name):
    row = TABLE[name]
    for returns, policy in zip(plays(name), ("random", "limit"), strict=True):
        error = returns.std() / np.sqrt(EPISODES) + float(row[f"{policy}_se"])
        assert abs(returns.mean() - float(row[f"{policy}_mean"])) < 4 * error + 1e-4


def test_the_table_has_every_environment_once():
    assert sorted(row["env"] for row in read_rows(popgym_limits.LIMITS)) == sorted(popgym_jax.registered_envs)


@pytest.mark.parametrize("name", TABLE)
def test_the_table_has_a_limit_above_chance(name):
    row = TABLE[name]
    assert float(row["random_mean"]) + 10 * float(row["random_se"]) < float(row["limit_mean"])
    assert float(row["limit_mean"]) <= HIGHEST.get(name, 1)
    assert row["exact"] == ("yes" if popgym_policies.is_exact(name) else "no")
    if family_and_level(name)[0] in ("Autoencode", "CountRecall", "RepeatFirst", "RepeatPrevious"):
        assert float(row["limit_mean"]) == 1


def test_every_family_has_a_reference_policy():
    assert set(popgym_policies.REFERENCES) == set(FAMILIES)


def test_a_normalised_return_is_0_by_chance_and_1_at_the_limit_by_any_name():
    row = TABLE["RepeatPreviousHard"]
    assert popgym_limits.normalised("RepeatHard", float(row["random_mean"])) == 0
    assert popgym_limits.normalised("popgym-RepeatPreviousHard-v0", float(row["limit_mean"])) == 1


def test_a_run_writes_a_row_an_environment_and_refuses_odd_flags(tmp_path, capsys):
    table = tmp_path / "limits.csv"
    run_here(popgym_limits.main, "--envs", "RepeatEasy", "--episodes", 4, "--out", table, cwd=tmp_path)
    (row,) = read_rows(table)
    assert row["env"] == "RepeatPreviousEasy" and row["episodes"] == "4" and float(row["limit_mean"]) == 1
    capsys.readouterr()
    for flags in (["--envs", "Nothing"], ["--episodes", "1"]):
        run_here(popgym_limits.main, *flags, "--out", tmp_path / "none.csv", cwd=tmp_path, code=2)
        assert flags[0] in capsys.readouterr().err
    assert not (tmp_path / "none.csv").exists()


# ---------------------------------------------------------------- best play where it can be calculated


def test_memory_game_is_played_as_well_as_it_can_be():
    """By hand for two cards of each of two colours; the mean of many games for a whole deck."""
    # the first two cards match with probability 1/3 and then nothing fails; else both partners are known: a failure
    assert popgym_policies.expected_misses(0, 2, 0, 2) == pytest.approx(2 / 3)
    _, returns = plays("ConcentrationEasy")
    best = 1 - popgym_policies.expected_misses(0, 26, 0, 26) * 2 / 104
    assert abs(returns.mean() - best) < 4 * returns.std() / np.sqrt(EPISODES)


def fewest_misses(kinds: int, copies: int) -> float:
    """Failed pairs on average, of all ways to play. A state has (known, hidden) cards for each kind, sorted."""

    @functools.cache
    def misses(state):
        hidden_cards = sum(hidden for _, hidden in state)
        if hidden_cards == 0:
            return 0.0
        pairs = [misses(changed(state, (kind, (-2, 0)))) for kind in set(state) if kind[0] >= 2]
        unknown_first = 0.0
        for kind, number in Counter(state).items():
            choices = []
            if kind[0] and kind[1]:
                choices.append(misses(changed(state, (kind, (-1, -1)))))
            if kind[1] and hidden_cards > 1:
                choices.append(unknown_second(state, kind, hidden_cards - 1))
            if choices:
                unknown_first += number * kind[1] / hidden_cards * min(choices)
        return min([unknown_first, *pairs])

    def unknown_second(state, first, hidden_cards):
        total = 0.0
        if first[1] > 1:
            total += (first[1] - 1) * misses(changed(state, (first, (0, -2))))
        for other, number in (Counter(state) - Counter([first])).items():
            if other[1]:
                total += number * other[1] * (1 + misses(changed(state, (first, (1, -1)), (other, (1, -1)))))
        return total / hidden_cards

    def changed(state, *changes):
        cards = list(state)
        for (known, hidden), (more_known, more_hidden) in changes:
            cards.remove((known, hidden))
            cards.append((known + more_known, hidden + more_hidden))
        return tuple(sorted(kind for kind in cards if kind != (0, 0)))

    return misses(((0, copies),) * kinds)


def test_waiting_with_known_pairs_is_the_best_play_among_all():
    assert popgym_policies.expected_misses(0, 8, 0, 8) == pytest.approx(fewest_misses(2, 8))


@pytest.mark.exhaustive
def test_thirteen_ranks_are_paired_as_well_as_they_can_be():
    row = TABLE["ConcentrationHard"]
    best = 1 - fewest_misses(13, 4) * 2 / 104
    assert abs(float(row["limit_mean"]) - best) < 4 * float(row["limit_se"]) + 1e-4


def test_gittins_index_of_an_arm_with_one_and_with_two_pulls_left():
    """With two pulls of a new arm: p - c + p max(p' - c, 0) = 0 with p = 1/2 and p' = 2/3 has the zero 5/9."""
    horizons, indices = popgym_policies.bandit_indices(8)
    assert list(horizons[:2]) == [1, 2]
    assert indices[0, 0, 0] == pytest.approx(1 / 2, abs=1e-4)
    assert indices[0, 3, 1] == pytest.approx(2 / 5, abs=1e-4)
    assert indices[1, 0, 0] == pytest.approx(5 / 9, abs=1e-4)


def test_mine_odds_are_the_shares_of_all_boards():
    """Two mines on 4 x 4 squares are 120 boards, of which those that show the same numbers are possible."""
    size = 4
    rng = np.random.default_rng(0)
    boards = [1 << a | 1 << b for a in range(16) for b in range(a)]
    for _ in range(20):
        truth = boards[rng.integers(120)]
        clear = [i for i in range(16) if not truth >> i & 1]
        number = np.full(16, popgym_policies.UNSEEN)
        for square in rng.choice(clear, 3, replace=False):
            number[square] = (truth & popgym_policies.blocks(size)[square]).bit_count()
        seen = np.flatnonzero(number != popgym_policies.UNSEEN)
        possible = [
            board
            for board in boards
            if all(not board >> i & 1 for i in seen)
            and all((board & popgym_policies.blocks(size)[i]).bit_count() == number[i] for i in seen)
        ]
        odds, listed = popgym_policies.mine_odds(number, size, 2, few=120)
        share = [np.mean([board >> i & 1 for board in possible]) for i in range(16)]
        np.testing.assert_allclose(odds, share, atol=1e-9)
        assert listed == tuple(sorted(possible))


def test_a_last_risk_is_refused_where_clicking_again_is_cheaper():
    """One clear square and one mine are left on 4 x 4: a risk costs 1/4 on average, giving up 1/24."""
    seen = (1 << 14) - 1
    value, square = popgym_policies.best_click((1 << 14 | 1, 1 << 15 | 1), seen & ~1, 1, 4, 2)
    assert value == pytest.approx(-1 / 24)
    assert seen >> square & 1


def test_ship_scores_count_the_fleets_that_cover_each_hit_once_and_no_miss():
    """All fleets of four ships on 3 x 3 squares, overlaps allowed where there is no hit."""
    board = np.array([1, 0, 0, 0, 1, 0, -1, 0, 0], np.int8)
    sizes = (2, 2, 1, 1)
    counted = np.zeros(9)
    for fleet in itertools.product(*[popgym_policies.ship_places(3, size) for size in sizes]):
        squares = np.concatenate(fleet)
        times_hit = [np.sum(squares == hit) for hit in (0, 4)]
        if times_hit == [1, 1] and 6 not in squares:
            np.add.at(counted, squares, 1)
    np.testing.assert_allclose(popgym_policies.ship_scores(board, 3, sizes), counted)


# ---- the grid of all tasks -------------------------------------------------------------------------------------------


def grid_row(env, arch, seed, final):
    best = final + 0.1
    scores = {f"{name}_normalised": popgym_limits.normalised(env, x) for name, x in (("best", best), ("eval", final))}
    row = {"env": env, "arch": arch, "seed": seed, "eval_return": final, "best_return": best}
    return {name: str(value) for name, value in (row | scores).items()}


def test_the_grids_table_has_means_over_seeds_and_leaves_out_what_was_not_run():
    rows = [grid_row("RepeatPreviousHard", "s5", seed, final) for seed, final in enumerate((0.5, 0.9))]
    rows += [grid_row("CountRecallEasy", "s5", 0, 1.0), grid_row("CountRecallEasy", "gru", 0, -0.9251)]
    grid = popgym_grid.Grid(rows)
    heading, _, *lines, _, scores = [line.strip("|").split("|") for line in popgym_grid.table(grid).splitlines()]
    names = [name.strip() for name in heading]
    recall, repeat = [dict(zip(names, map(str.strip, line), strict=True)) for line in lines]
    assert (recall["task"], repeat["task"]) == ("CountRecallEasy", "RepeatPreviousHard")  # POPGym's order
    assert (recall["random"], recall["s5"], recall["gru"], recall["limit"]) == ("-0.925", "1.000", "-0.925", "1.000")
    assert (recall["s5, normalised"], recall["gru, normalised"]) == ("1.00", "0.00")
    assert repeat["s5"] == "0.700 ± 0.200" and repeat["gru"] == ""
    normalised = [popgym_limits.normalised("RepeatPreviousHard", x) for x in (0.5, 0.9)]
    assert repeat["s5, normalised"] == f"{np.mean(normalised):.2f} ± {np.ptp(normalised) / 2:.2f}"
    over_tasks = [1.0, np.mean(normalised)]
    assert f"s5: {np.mean(over_tasks):.3f} ± {np.ptp(over_tasks) / 2:.3f} (2 tasks); gru: 0.000" in scores[0]


def test_the_table_of_the_page_is_that_of_the_runs():
    rows = read_rows(ROOT / "results" / "popgym_grid.csv")
    assert popgym_grid.table(popgym_grid.Grid(rows)) in (ROOT / "results" / "popgym.md").read_text()


@pytest.mark.slow
def test_the_grid_trains_evaluates_and_repeats_nothing_that_is_finished(tmp_path, monkeypatch):
    begun = []

    def execute(script, flags, core=None):
        begun.append(flags)
        run_here(ppo.main, *flags, cwd=tmp_path)

    monkeypatch.setattr(collect, "execute", execute)
    monkeypatch.setattr(popgym_grid, "execute", execute)
    own = ["--envs", "RepeatEasy", "--archs", "mlp", "--seeds", "3", "--eval-episodes", "5", "--out", str(tmp_path)]
    script = tiny_flags(total_timesteps=2048)
    for name in ("--env", "--seed", "--eval-episodes"):
        if name in script:
            del script[script.index(name) : script.index(name) + 2]
    monkeypatch.setattr(sys, "argv", ["popgym_grid", *own, "--", *script])
    popgym_grid.main()
    popgym_grid.main()
    assert len(begun) == 2  # a training and an evaluation
    [row] = read_rows(tmp_path / "grid.csv")
    [evaluation] = read_rows(tmp_path / "RepeatEasy__mlp__s3" / "eval.csv")
    assert (row["env"], row["arch"], row["seed"], evaluation["episodes"]) == ("RepeatPreviousEasy", "mlp", "3", "5")
    mean = float(evaluation["return_mean"])
    limit = TABLE["RepeatPreviousEasy"]
    by_chance = float(limit["random_mean"])
    expected = (mean - by_chance) / (float(limit["limit_mean"]) - by_chance)
    assert float(row["eval_normalised"]) == pytest.approx(expected, abs=1e-4)
    assert "| RepeatPreviousEasy |" in (tmp_path / "grid.md").read_text()
    assert (tmp_path / "grid.png").read_bytes()[1:4] == b"PNG"
