"""popgym_jax: names, spaces, the laws of what is random, and edge cases that episodes seldom reach.

Step for step against the reference package popgym: test_popgym_lockstep.py; what holds for all environments:
test_popgym_properties.py; scores: test_popgym_policies.py.
"""

import functools
import subprocess
import sys

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnax.environments.spaces import gymnax_space_to_gym_space
from popgym.envs.repeat_first import RepeatFirst as ReferenceRepeatFirst
from popgym.envs.repeat_previous import RepeatPrevious as ReferenceRepeatPrevious
from scipy import stats

import popgym_jax
from popgym_jax import cards
from popgym_jax.registration import canonical_name
from popgym_jax.repeat_first import RepeatFirst
from popgym_jax.repeat_previous import RepeatPrevious
from tests.reference import assert_same, forward, make_reference, physics, reference_id
from tests.reference.cards import Deck

NOISY_NAMES = [name for name in popgym_jax.registered_envs if name.startswith("Noisy")]
CARTPOLE_NAMES = [name for name in popgym_jax.registered_envs if "CartPole" in name]


# ---------------------------------------------------------------- lock step beyond the registered environments


@pytest.mark.parametrize(
    ("env", "reference"),
    [
        (RepeatPrevious(1, k=1), ReferenceRepeatPrevious(1, k=1)),
        (RepeatPrevious(1, k=51), ReferenceRepeatPrevious(1, k=51)),
        (RepeatPrevious(2, k=7), ReferenceRepeatPrevious(2, k=7)),
        (RepeatFirst(3), ReferenceRepeatFirst(3)),
    ],
    ids=["k=1", "k=51", "k=7 of 2 decks", "3 decks"],
)
def test_cards_lock_step_with_reference_for_other_arguments(env, reference):
    bridge = Deck()
    assert_same(bridge, *forward(bridge, env, env.default_params, reference, episodes=30, seed=2))


def test_pendulum_replayed_from_the_initial_state_alone_keeps_its_return():
    class OpenLoop(physics.Pendulum):
        closed_loop = False

    name = "PositionOnlyPendulumEasy"
    theirs, ours = forward(OpenLoop(), *popgym_jax.make(name), make_reference(name), episodes=50, seed=4)
    # a pendulum that passes the top slowly amplifies the rounding, so not every one stays close
    assert np.median(np.abs(ours.obs - theirs.obs).max(axis=(0, 2))) < 1e-4
    np.testing.assert_allclose(ours.reward.sum(0), theirs.reward.sum(0), rtol=0, atol=2e-3)


@pytest.mark.parametrize("name", CARTPOLE_NAMES)
@pytest.mark.parametrize("angle", [0.0, 0.2090])
def test_cartpole_last_step_can_be_terminated_and_truncated_as_in_reference(name, angle):
    reference = make_reference(name)
    noisy = name in NOISY_NAMES
    bridge = physics.NoisyCartPole() if noisy else physics.CartPole()
    bridge.prepare(reference, np.random.default_rng(5))
    reference.reset()
    reference.state = np.array([0.0, 0.0, angle, 1.0])
    env, params = popgym_jax.make(name)
    _, state = env.reset_env(jax.random.key(0), params)
    reference.num_steps = params.max_steps_in_episode - 1
    state = state.replace(
        physics=jnp.asarray(reference.state, jnp.float32), time=jnp.int32(params.max_steps_in_episode - 1)
    )
    expected_obs, expected_reward, terminated, truncated, _ = reference.step(1)
    noise = jnp.asarray(bridge.draw(reference, 1))
    obs, state, reward, ours, _ = bridge.inject(env).step_env(noise, state, 1, params)
    np.testing.assert_allclose(obs, expected_obs, atol=1e-6)
    np.testing.assert_allclose(reward, expected_reward, rtol=1e-6)
    assert truncated and bool(env.is_truncated(state, params))
    assert bool(ours) == terminated == (angle > 0)


# ---------------------------------------------------------------- spaces


@pytest.mark.parametrize("name", popgym_jax.registered_envs)
def test_spaces_are_those_of_the_reference_flattened(name):
    env, params = popgym_jax.make(name)
    reference = make_reference(name)
    flat = gymnasium.spaces.utils.flatten_space(reference.observation_space)
    ours = gymnax_space_to_gym_space(env.observation_space(params))
    assert ours.shape == flat.shape and ours.dtype == np.float32
    np.testing.assert_array_equal(ours.low, flat.low)
    np.testing.assert_array_equal(ours.high, flat.high)
    actions = reference.action_space
    if isinstance(actions, gymnasium.spaces.MultiDiscrete):  # a board: rows times columns
        actions = gymnasium.spaces.Discrete(np.prod(actions.nvec))
    assert gymnax_space_to_gym_space(env.action_space(params)) == actions
    assert env.num_actions == gymnasium.spaces.utils.flatdim(actions)
    assert env.name == name
    assert env.obs_requires_prev_action == getattr(reference, "obs_requires_prev_action", False)


def test_reset_and_step_work_without_params():
    env, params = popgym_jax.make("PositionOnlyCartPoleEasy")
    key = jax.random.key(9)
    obs, state = env.reset(key)
    np.testing.assert_array_equal(obs, env.reset(key, params)[0])
    without = env.step(key, state, 1)
    with_params = env.step(key, state, 1, params)
    assert len(without) == 6
    jax.tree.map(np.testing.assert_array_equal, without, with_params)


# ---------------------------------------------------------------- the laws of what is random


def dealt_suits(deal, num_decks: int, k: int) -> np.ndarray:
    """Suits of 4000 whole episodes of RepeatPrevious, dealt by `deal` if given, (4000, N)."""
    env = RepeatPrevious(num_decks, k)
    if deal is not None:
        env.deal = deal
    params = env.default_params

    def episode(key):
        key_reset, key_steps = jax.random.split(key)
        first, state = env.reset_env(key_reset, params)

        def step(state, key):
            obs, state, *_ = env.step_env(key, state, 0, params)
            return state, obs

        later = jax.lax.scan(step, state, jax.random.split(key_steps, env.episode_length))[1]
        return jnp.argmax(jnp.concatenate([first[None], later]), axis=-1)

    keys = jax.random.split(jax.random.key(10), 4000)
    return np.asarray(jax.jit(jax.vmap(episode))(keys))


def position_p_value(suits: np.ndarray) -> float:
    """Every position of a deck holds each suit equally often: Bonferroni over positions."""
    counts = np.stack([(suits == suit).sum(axis=0) for suit in range(4)], axis=1)  # (N, 4)
    return min(1.0, len(counts) * stats.chisquare(counts, axis=1).pvalue.min())


def pair_p_value(suits: np.ndarray) -> float:
    """Two positions share their suit with probability (N/4 - 1) / (N - 1): neighbours and ends."""
    num_cards = suits.shape[1]
    expected = (num_cards / 4 - 1) / (num_cards - 1)
    pairs = [(i, i + 1) for i in range(num_cards - 1)] + [(0, num_cards - 1)]
    same = np.array([(suits[:, i] == suits[:, j]).sum() for i, j in pairs])
    pooled = stats.binomtest(int(same[:-1].sum()), len(suits) * (num_cards - 1), expected)
    each = [stats.binomtest(int(s), len(suits), expected).pvalue for s in same]
    return min(1.0, 2 * pooled.pvalue, 2 * len(each) * min(each))


@pytest.mark.parametrize(("num_decks", "k"), [(1, 4), (3, 64)])
def test_dealt_suits_follow_the_law_of_a_uniform_shuffle(num_decks, k):
    suits = dealt_suits(None, num_decks, k)
    assert all(((suits == suit).sum(axis=1) == 13 * num_decks).all() for suit in range(4))
    assert position_p_value(suits) > 1e-3
    assert pair_p_value(suits) > 1e-3


def test_position_statistic_sees_a_suit_that_comes_up_a_tenth_too_early():
    def biased(key, remaining):
        weights = remaining * jnp.array([1.1, 1.0, 1.0, 1.0])
        return jax.random.categorical(key, jnp.log(weights))

    assert position_p_value(dealt_suits(biased, 1, 4)) < 1e-3


def test_pair_statistic_sees_cards_drawn_with_replacement():
    suits = dealt_suits(lambda key, left: jax.random.randint(key, (), 0, 4), 1, 4)
    assert position_p_value(suits) > 1e-3  # this bias is invisible position by position
    assert pair_p_value(suits) < 1e-3


def shuffle_p_value(decks: np.ndarray) -> float:
    """Chi-square of card against position for permutations, (n - 1)^2 degrees of freedom."""
    size = decks.shape[1]
    counts = np.stack([np.bincount(decks[:, i], minlength=size) for i in range(size)])
    expected = len(decks) / size
    statistic = ((counts - expected) ** 2 / expected).sum() * (size - 1) / size
    return stats.chi2.sf(statistic, (size - 1) ** 2)


def test_shuffled_deck_is_a_uniform_permutation():
    keys = jax.random.split(jax.random.key(11), 5000)
    decks = np.asarray(jax.jit(jax.vmap(lambda key: cards.shuffled_deck(key, 1)))(keys))
    assert (np.sort(decks, axis=1) == np.arange(52)).all()
    assert 1e-3 < shuffle_p_value(decks) < 1 - 1e-3


def test_shuffle_statistic_sees_the_classic_wrong_shuffle():
    rng = np.random.default_rng(12)
    decks = np.tile(np.arange(52), (5000, 1))
    rows = np.arange(5000)
    for i in range(52):  # swaps with any place instead of the places not yet filled
        j = rng.integers(52, size=5000)
        decks[rows, i], decks[rows, j] = decks[rows, j], decks[rows, i].copy()
    assert shuffle_p_value(decks) < 1e-3


def test_card_ids_mean_the_same_suit_rank_and_colour_as_in_the_reference():
    deck = ReferenceRepeatFirst(3).deck
    ids = np.arange(3 * cards.DECK_SIZE)
    np.testing.assert_array_equal(cards.suit(ids), deck.suits_idx)
    np.testing.assert_array_equal(cards.rank(ids), deck.ranks_idx)
    np.testing.assert_array_equal(cards.colour(ids), deck.colors_idx)
    for kinds, kind_of in ((4, deck.suits_idx), (13, deck.ranks_idx), (2, deck.colors_idx)):
        np.testing.assert_array_equal(cards.full_counts(3, kinds), np.bincount(kind_of))


@functools.cache
def resets(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Observations and physics states of 8000 resets."""
    env, params = popgym_jax.make(name)
    keys = jax.random.split(jax.random.key(13), 8000)
    obs, state = jax.jit(jax.vmap(env.reset_env, in_axes=(0, None)))(keys, params)
    return np.asarray(obs), np.asarray(state.physics)


def uniform_p_value(sample: np.ndarray, bound: float) -> float:
    return stats.kstest(sample, stats.uniform(-bound, 2 * bound).cdf).pvalue


@pytest.mark.parametrize(
    ("name", "bounds"),
    [
        ("PositionOnlyCartPoleEasy", [0.05] * 4),
        ("NoisyPositionOnlyCartPoleHard", [0.05] * 4),
        ("PositionOnlyPendulumEasy", [np.pi, 1.0]),
        ("NoisyPositionOnlyPendulumHard", [np.pi, 1.0]),
    ],
)
def test_physics_start_uniform_and_independent(name, bounds):
    _, physics = resets(name)
    for component, bound in zip(physics.T, bounds, strict=True):
        assert uniform_p_value(component, bound) > 1e-3
    off_diagonal = np.corrcoef(physics.T) - np.eye(len(bounds))
    assert np.abs(off_diagonal).max() < 4 / np.sqrt(len(physics))


def test_uniform_statistic_sees_a_range_that_is_five_percent_off():
    _, physics = resets("PositionOnlyCartPoleEasy")
    assert uniform_p_value(0.95 * physics[:, 0], 0.05) < 1e-3


def declared_sigma(name: str) -> float:
    return next(0.1 * i for i, level in enumerate(("Easy", "Medium", "Hard"), 1) if level in name)


def noises(name: str) -> np.ndarray:
    """8000 draws of the observation noise, (8000, 2)."""
    env, params = popgym_jax.make(name)
    keys = jax.random.split(jax.random.key(14), 8000)
    return np.asarray(jax.vmap(env.sample_noise, in_axes=(0, None))(keys, params))


@pytest.mark.parametrize("name", NOISY_NAMES)
def test_noise_is_gaussian_with_the_declared_sigma(name):
    noise = noises(name)
    for component in noise.T:
        assert stats.kstest(component, stats.norm(0, declared_sigma(name)).cdf).pvalue > 1e-3
    assert abs(np.corrcoef(noise.T)[0, 1]) < 4 / np.sqrt(len(noise))


def test_noise_statistic_sees_a_sigma_that_is_a_tenth_off():
    noise = 1.1 * noises("NoisyPositionOnlyCartPoleEasy")[:, 0]
    assert stats.kstest(noise, stats.norm(0, 0.1).cdf).pvalue < 1e-3


@pytest.mark.parametrize("name", ["NoisyPositionOnlyCartPoleHard", "NoisyPositionOnlyPendulumHard"])
def test_reset_observation_carries_noise_that_is_independent_of_the_state(name):
    obs, physics = resets(name)
    if "CartPole" in name:
        clean, bound = physics[:, ::2], np.array([4.8, np.radians(24)])
    else:
        clean, bound = np.stack([np.cos(physics[:, 0]), np.sin(physics[:, 0])], axis=1), np.ones(2)
    for i in range(2):  # where neither bound clips, a noise draw is obs - clean
        tail = stats.norm(clean[:, i], 0.3)
        clipped = np.abs(obs[:, i]) >= np.float32(bound[i])
        expected = tail.sf(bound[i]) + tail.cdf(-bound[i])
        error = np.sqrt((expected * (1 - expected)).sum() + 1)
        assert abs(clipped.sum() - expected.sum()) < 4 * error
        # the law of an unclipped draw, given that it was not clipped, is uniform in its own cdf
        low, high = tail.cdf(-bound[i]), tail.cdf(bound[i])
        quantile = ((tail.cdf(obs[:, i]) - low) / (high - low))[~clipped]
        assert stats.kstest(quantile, "uniform").pvalue > 1e-3
        for component in physics[~clipped].T:
            correlation = np.corrcoef(quantile, component)[0, 1]
            assert abs(correlation) < 4 / np.sqrt(len(quantile))


# ---------------------------------------------------------------- names


@pytest.mark.parametrize("name", popgym_jax.registered_envs)
def test_every_spelling_of_a_name_is_accepted(name):
    spellings = {name, name.lower(), name.upper(), reference_id(name)}
    spellings.add(f"popgym-{name}-v0")
    spellings.add(name.replace("PositionOnly", "Stateless"))
    spellings.add(reference_id(name.replace("PositionOnly", "Stateless")).upper())
    if name.startswith("RepeatPrevious"):
        spellings.add(name.replace("Previous", ""))
    assert {canonical_name(spelling) for spelling in spellings} == {name}


def test_papers_names_mean_the_reference_environments():
    assert canonical_name("RepeatHard") == "RepeatPreviousHard"
    assert canonical_name("StatelessCartPoleHard") == "PositionOnlyCartPoleHard"
    assert canonical_name("NoisyStatelessPendulumMedium") == "NoisyPositionOnlyPendulumMedium"


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("RepeatHrad", "RepeatPreviousHard"),
        ("StatlessCartPoleEasy", "PositionOnlyCartPoleEasy"),
        ("popgym-RepeatFirst-v0", "RepeatFirstEasy"),
        ("Re\npeatFirstHard", "RepeatFirstHard"),
        ("Pendulum", "PositionOnlyPendulum"),
        ("", "nearest: "),
        ("zzz", "nearest: "),
    ],
)
def test_unknown_name_is_answered_in_one_line_with_the_nearest(wrong, nearest):
    with pytest.raises(popgym_jax.UnknownEnvironmentError) as error:
        popgym_jax.make(wrong)
    message = str(error.value)
    assert isinstance(error.value, ValueError)
    assert nearest in message and repr(wrong) in message and len(message.splitlines()) == 1


def test_registered_names_are_exactly_those_of_the_reference():
    assert len(popgym_jax.registered_envs) == 48
    theirs = sorted(spec.lower() for spec in gymnasium.registry if spec.startswith("popgym-"))
    assert sorted(f"popgym-{name}-v0".lower() for name in popgym_jax.registered_envs) == theirs


@pytest.mark.parametrize("k", [0, 52])
def test_impossible_k_is_refused(k):
    with pytest.raises(ValueError, match=f"k must be 1 to 51 with 52 cards, got {k}"):
        RepeatPrevious(1, k=k)


def test_no_decks_is_refused():
    with pytest.raises(ValueError, match="num_decks must be at least 1, got 0"):
        RepeatFirst(0)


def test_import_and_make_create_no_jax_array():
    code = (
        "import gymnax, jax; before = len(jax.live_arrays())\n"
        "import popgym_jax; popgym_jax.make('RepeatHard')\n"
        "print(len(jax.live_arrays()) - before)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "0"
