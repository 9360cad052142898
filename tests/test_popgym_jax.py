"""popgym_jax against the reference package popgym, and its random parts against their laws.

Lock step: episodes of the reference are recorded together with everything that it keeps hidden or
draws at random (cards, noise, physics state), and replayed here with the same draws and actions.
"""

import copy
import functools
import subprocess
import sys
from typing import Any, NamedTuple

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import popgym.envs  # noqa: F401  (registers the reference's ids with gymnasium)
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

CARD_NAMES = [name for name in popgym_jax.registered_envs if name.startswith("Repeat")]
CARTPOLE_NAMES = [name for name in popgym_jax.registered_envs if "CartPole" in name]
PENDULUM_NAMES = [name for name in popgym_jax.registered_envs if "Pendulum" in name]
PHYSICS_NAMES = CARTPOLE_NAMES + PENDULUM_NAMES
NOISY_NAMES = [name for name in PHYSICS_NAMES if name.startswith("Noisy")]
EPISODES = 200
BALANCED_EPISODES = 15

# Uniformly random policy in the reference, measured over `episodes` episodes:
# mean return, standard deviation of a return, mean length, episodes.
REFERENCE_RANDOM = {
    "RepeatFirstEasy": (-0.4999, 0.1235, 51, 3000),
    "RepeatFirstMedium": (-0.5006, 0.0430, 415, 1446),
    "RepeatFirstHard": (-0.4988, 0.0306, 831, 723),
    "RepeatPreviousEasy": (-0.5051, 0.1221, 51, 3000),
    "RepeatPreviousMedium": (-0.4989, 0.1011, 103, 3000),
    "RepeatPreviousHard": (-0.4997, 0.0893, 155, 3000),
    "PositionOnlyCartPoleEasy": (0.1113, 0.0594, 22.3, 3000),
    "PositionOnlyCartPoleMedium": (0.0557, 0.0297, 22.3, 3000),
    "PositionOnlyCartPoleHard": (0.0371, 0.0198, 22.3, 3000),
    "NoisyPositionOnlyCartPoleEasy": (0.1113, 0.0594, 22.3, 3000),
    "NoisyPositionOnlyCartPoleMedium": (0.1113, 0.0594, 22.3, 3000),
    "NoisyPositionOnlyCartPoleHard": (0.1113, 0.0594, 22.3, 3000),
    "PositionOnlyPendulumEasy": (0.2438, 0.1786, 200, 3000),
    "PositionOnlyPendulumMedium": (0.2418, 0.1836, 150, 3000),
    "PositionOnlyPendulumHard": (0.2400, 0.1906, 100, 3000),
    "NoisyPositionOnlyPendulumEasy": (0.2438, 0.1786, 200, 3000),
    "NoisyPositionOnlyPendulumMedium": (0.2438, 0.1786, 200, 3000),
    "NoisyPositionOnlyPendulumHard": (0.2438, 0.1786, 200, 3000),
}


# ---------------------------------------------------------------- recording the reference


class Episodes(NamedTuple):
    """Recorded episodes, time first, padded with zeros after the end of the shorter ones."""

    draw: np.ndarray  # (T + 1, B) suits dealt, or (T + 1, B, 2) noise
    physics: np.ndarray  # (T + 1, B, 4 or 2) float64; (T + 1, B, 0) for cards
    action: np.ndarray  # (T, B) or (T, B, 1)
    obs: np.ndarray  # (T + 1, B, O), flattened by gymnasium
    reward: np.ndarray  # (T, B) float64
    terminated: np.ndarray  # (T, B)
    truncated: np.ndarray  # (T, B)
    length: np.ndarray  # (B,)


class RecordingGenerator:
    """A numpy generator that keeps the last noise it drew."""

    def __init__(self, seed: int):
        self.generator = np.random.default_rng(seed)
        self.noise = np.zeros(2)

    def normal(self, loc, scale):
        self.noise = self.generator.normal(loc, scale)
        return self.noise

    def __getattr__(self, name: str):
        return getattr(self.generator, name)


def reference_id(name: str) -> str:
    return f"popgym-{name}-v0"


def make_reference(name: str):
    return gymnasium.make(reference_id(name)).unwrapped


def hidden(reference, steps_taken: int) -> tuple[Any, np.ndarray]:
    """What the reference drew for the latest observation, and its physics state."""
    if hasattr(reference, "deck"):
        dealt = reference.deck.idx[reference.deck.num_cards - 1 - steps_taken]
        return reference.deck.suits_idx[dealt], np.zeros(0)
    return reference.np_random.noise, np.array(reference.state)


def balance(reference) -> int:
    """A hand-made controller that keeps the pole up; it sees the full state."""
    x, x_dot, theta, theta_dot = reference.state
    return int(0.5 * x + x_dot + 10 * theta + 2 * theta_dot > 0)


def play(reference, rng: np.random.Generator, balanced: bool) -> list[tuple]:
    """One episode; rows of (draw, physics, obs, action, reward, terminated, truncated)."""
    space = reference.observation_space
    raw, _ = reference.reset()
    rows, done = [], False
    while not done:
        before = (*hidden(reference, len(rows)), gymnasium.spaces.utils.flatten(space, raw))
        if balanced:
            action = balance(reference)
        elif isinstance(reference.action_space, gymnasium.spaces.Discrete):
            action = int(rng.integers(reference.action_space.n))
        else:  # beyond the bounds of +-2 as well: the reference clips
            action = rng.uniform(-3, 3, 1).astype(np.float32)
        raw, reward, terminated, truncated, _ = reference.step(action)
        rows.append((*before, action, float(reward), terminated, truncated))
        done = terminated or truncated
    last = (*hidden(reference, len(rows)), gymnasium.spaces.utils.flatten(space, raw))
    rows.append((*last, *rows[-1][3:]))  # only the first three of this row are used
    return rows


def record(reference, episodes: int, seed: int) -> Episodes:
    """Play `episodes` random episodes, and for CartPole some balanced ones."""
    reference.np_random = RecordingGenerator(seed)
    rng = np.random.default_rng(seed)
    balanced = BALANCED_EPISODES if hasattr(reference, "x_threshold") else 0
    played = [play(reference, rng, False) for _ in range(episodes)]
    played += [play(reference, rng, True) for _ in range(balanced)]
    longest = max(len(rows) for rows in played)

    def padded(column: int) -> np.ndarray:
        first = np.asarray(played[0][0][column])
        out = np.zeros((longest, len(played), *first.shape), first.dtype)
        for i, rows in enumerate(played):
            out[: len(rows), i] = [row[column] for row in rows]
        return out

    draw, physics, obs = padded(0), padded(1), padded(2)
    action, reward, terminated, truncated = (padded(column)[:-1] for column in (3, 4, 5, 6))
    length = np.array([len(rows) - 1 for rows in played])
    return Episodes(draw, physics, action, obs, reward, terminated, truncated, length)


# ---------------------------------------------------------------- replaying it here


def inject_draws(env):
    """A copy of the environment whose `key` argument is not a key but the draw itself."""
    env = copy.copy(env)
    env.deal = lambda key, remaining: key
    env.sample_noise = lambda key, params: key
    return env


def reset_to(env, params, draw, physics):
    """Reset with injected draws, and with the reference's physics state where there is one."""
    if not physics.size:
        return inject_draws(env).reset_env(draw, params)
    _, state = env.reset_env(jax.random.key(0), params)
    state = state.replace(physics=physics)
    return inject_draws(env).observe(draw, state, None, params), state


def replay(env, params, episodes: Episodes, open_loop: bool = False):
    """obs (T + 1, B, O), reward, terminated, truncated (T, B): our side of recorded episodes.

    The physics state is set to the reference's before every step, unless `open_loop`.
    """
    injected = inject_draws(env)
    physics = jnp.asarray(episodes.physics, jnp.float32)
    draw = jnp.asarray(episodes.draw, jnp.float32 if physics.size else jnp.int32)

    def step(state, inputs):
        draw, physics, action = inputs
        if physics.size and not open_loop:
            state = state.replace(physics=physics)
        obs, state, reward, terminated, info = injected.step_env(draw, state, action, params)
        assert info == {}
        return state, (obs, reward, terminated, env.is_truncated(state, params))

    def episode(draw, physics, action):
        obs, state = reset_to(env, params, draw[0], physics[0])
        _, (later, *rest) = jax.lax.scan(step, state, (draw[1:], physics[:-1], action))
        return jnp.concatenate([obs[None], later]), *rest

    run = jax.jit(jax.vmap(episode, in_axes=1, out_axes=1))
    return [np.asarray(x) for x in run(draw, physics, jnp.asarray(episodes.action))]


def assert_same_episodes(env, params, episodes: Episodes, obs_atol: float, reward_atol: float):
    obs, reward, terminated, truncated = replay(env, params, episodes)
    time = np.arange(len(reward))[:, None]
    alive = time < episodes.length  # (T, B) steps that were played
    assert obs.dtype == reward.dtype == np.float32
    assert obs.shape == episodes.obs.shape
    np.testing.assert_allclose(obs[0], episodes.obs[0], rtol=0, atol=obs_atol)
    np.testing.assert_allclose(obs[1:][alive], episodes.obs[1:][alive], rtol=0, atol=obs_atol)
    np.testing.assert_allclose(reward[alive], episodes.reward[alive], rtol=1e-6, atol=reward_atol)
    np.testing.assert_array_equal(terminated[alive], episodes.terminated[alive])
    np.testing.assert_array_equal(truncated[alive], episodes.truncated[alive])
    length = 1 + np.argmax(terminated | truncated, axis=0)
    np.testing.assert_array_equal(length, episodes.length)


@pytest.mark.parametrize("name", CARD_NAMES)
def test_cards_lock_step_with_reference_from_the_same_deck(name):
    env, params = popgym_jax.make(name)
    episodes = record(make_reference(name), EPISODES, seed=1)
    assert (episodes.length == params.max_steps_in_episode).all()
    assert_same_episodes(env, params, episodes, obs_atol=0, reward_atol=0)


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
    assert_same_episodes(env, env.default_params, record(reference, 30, seed=2), 0, 0)


@pytest.mark.parametrize("name", PHYSICS_NAMES)
def test_physics_lock_step_with_reference_from_the_same_state_and_noise(name):
    env, params = popgym_jax.make(name)
    episodes = record(make_reference(name), EPISODES, seed=3)
    atol = 2e-6 if "CartPole" in name else 1e-5  # the pendulum's angle grows to 50 rad in float32
    assert_same_episodes(env, params, episodes, obs_atol=atol, reward_atol=1e-7)
    assert episodes.truncated.any()  # both ways to end were compared
    assert episodes.terminated.any() == ("CartPole" in name)


def test_pendulum_replayed_from_the_initial_state_alone_keeps_its_return():
    env, params = popgym_jax.make("PositionOnlyPendulumEasy")
    episodes = record(make_reference("PositionOnlyPendulumEasy"), 50, seed=4)
    obs, reward, *_ = replay(env, params, episodes, open_loop=True)
    # a pendulum that passes the top slowly amplifies the rounding, so not every one stays close
    assert np.median(np.abs(obs - episodes.obs).max(axis=(0, 2))) < 1e-4
    np.testing.assert_allclose(reward.sum(0), episodes.reward.sum(0), rtol=0, atol=2e-3)


@pytest.mark.parametrize("name", CARTPOLE_NAMES)
@pytest.mark.parametrize("angle", [0.0, 0.2090])
def test_cartpole_last_step_can_be_terminated_and_truncated_as_in_reference(name, angle):
    reference = make_reference(name)
    reference.np_random = RecordingGenerator(5)
    reference.reset()
    reference.state = np.array([0.0, 0.0, angle, 1.0])
    env, params = popgym_jax.make(name)
    _, state = env.reset_env(jax.random.key(0), params)
    reference.num_steps = params.max_steps_in_episode - 1
    state = state.replace(
        physics=jnp.asarray(reference.state, jnp.float32),
        time=jnp.int32(params.max_steps_in_episode - 1),
    )
    expected_obs, expected_reward, terminated, truncated, _ = reference.step(1)
    noise = jnp.asarray(reference.np_random.noise, jnp.float32)
    obs, state, reward, ours, _ = inject_draws(env).step_env(noise, state, 1, params)
    np.testing.assert_allclose(obs, expected_obs, atol=1e-6)
    np.testing.assert_allclose(reward, expected_reward, rtol=1e-6)
    assert truncated and bool(env.is_truncated(state, params))
    assert bool(ours) == terminated == (angle > 0)


@pytest.mark.parametrize("name", popgym_jax.registered_envs)
def test_spaces_are_those_of_the_reference_flattened(name):
    env, params = popgym_jax.make(name)
    reference = make_reference(name)
    flat = gymnasium.spaces.utils.flatten_space(reference.observation_space)
    ours = gymnax_space_to_gym_space(env.observation_space(params))
    assert ours.shape == flat.shape and ours.dtype == np.float32
    np.testing.assert_array_equal(ours.low, flat.low)
    np.testing.assert_array_equal(ours.high, flat.high)
    assert gymnax_space_to_gym_space(env.action_space(params)) == reference.action_space
    if isinstance(reference.action_space, gymnasium.spaces.Discrete):
        assert env.num_actions == reference.action_space.n
    assert env.name == name


# ---------------------------------------------------------------- rollouts with auto-reset


class Rollout(NamedTuple):
    """gymnax `step` with random actions, time first; state_* belong to the state after a step."""

    first_obs: np.ndarray  # (B, O)
    obs: np.ndarray  # (T, B, O)
    final_obs: np.ndarray  # (T, B, O)
    state: Any  # leaves (T, B, ...)
    reward: np.ndarray  # (T, B)
    terminated: np.ndarray  # (T, B)
    truncated: np.ndarray  # (T, B)
    in_space: np.ndarray  # (T, B)


@functools.cache
def rollout(name: str) -> Rollout:
    """Long enough for every environment to be reset at least once, with 256 environments."""
    env, params = popgym_jax.make(name)
    num_envs = 256
    longest = 200 if "CartPole" in name else params.max_steps_in_episode
    space, actions = env.observation_space(params), env.action_space(params)

    def step(state, key):
        key_action, key_step = jax.random.split(key)
        action = actions.sample(key_action)
        obs, state, reward, terminated, truncated, info = env.step(key_step, state, action, params)
        same = (info["terminated"] == terminated) & (info["truncated"] == truncated)
        final_obs = info["final_observation"]
        fine = same & space.contains(obs) & space.contains(final_obs)
        return state, (obs, final_obs, state, reward, terminated, truncated, fine)

    def one_env(key):
        key_reset, key_steps = jax.random.split(key)
        obs, state = env.reset(key_reset, params)
        steps = jax.lax.scan(step, state, jax.random.split(key_steps, longest + 60))[1]
        return (obs, *steps)

    out_axes = (0, *[1] * 7)
    run = jax.jit(jax.vmap(one_env, out_axes=out_axes))
    return Rollout(*jax.tree.map(np.asarray, run(jax.random.split(jax.random.key(6), num_envs))))


@pytest.mark.parametrize("name", popgym_jax.registered_envs)
def test_step_resets_itself_and_reports_the_end_it_came_from(name):
    run = rollout(name)
    done = run.terminated | run.truncated
    np.testing.assert_array_equal(run.obs[~done], run.final_obs[~done])
    assert done.any(axis=0).all()

    time_before = np.concatenate([np.zeros_like(run.state.time[:1]), run.state.time[:-1]])
    np.testing.assert_array_equal(run.state.time, np.where(done, 0, time_before + 1))
    length = time_before[done] + 1
    params = popgym_jax.make(name)[1]
    if name in CARD_NAMES:  # always terminated by the last card
        assert (length == params.max_steps_in_episode).all() and not run.truncated.any()
    if name in PENDULUM_NAMES:  # always truncated
        assert (length == params.max_steps_in_episode).all() and not run.terminated.any()
    if name in CARTPOLE_NAMES:  # a random policy falls
        assert run.terminated.any() and (length <= params.max_steps_in_episode).all()


@pytest.mark.parametrize("name", CARD_NAMES)
def test_every_episode_deals_exactly_the_cards_of_its_decks(name):
    run = rollout(name)
    length = popgym_jax.make(name)[1].max_steps_in_episode
    dealt = run.first_obs + run.final_obs[:length].sum(axis=0)  # (B, 4)
    assert (dealt == (length + 1) / 4).all()
    assert (run.state.remaining[length - 1].sum(-1) == length).all()  # a fresh stack
    opening = run.obs[length - 1]  # first card of the second episode
    assert (opening.sum(-1) == 1).all() and (opening != run.final_obs[length - 1]).any()


@pytest.mark.parametrize("name", PHYSICS_NAMES)
def test_state_after_an_auto_reset_is_fresh(name):
    run = rollout(name)
    done = run.terminated | run.truncated
    bound = [0.05] * 4 if name in CARTPOLE_NAMES else [np.pi, 1.0]
    fresh = run.state.physics[done]
    assert (np.abs(fresh) <= np.asarray(bound, np.float32)).all()
    assert len(np.unique(fresh[:, 0])) > 0.99 * len(fresh)
    if name not in NOISY_NAMES:  # the observation is that of the fresh state
        x = fresh[:, ::2]
        theta = fresh[:, 0]
        expected = x if name in CARTPOLE_NAMES else np.stack([np.cos(theta), np.sin(theta)], 1)
        np.testing.assert_allclose(run.obs[done], expected, atol=1e-6)


@pytest.mark.parametrize("name", popgym_jax.registered_envs)
def test_observations_stay_in_their_space_and_nothing_is_nan(name):
    run = rollout(name)
    assert run.in_space.all()
    assert all(np.isfinite(leaf).all() for leaf in (run.first_obs, run.obs, run.reward))
    assert run.obs.dtype == run.reward.dtype == np.float32
    assert run.state.time.dtype == np.int32


@pytest.mark.parametrize("name", popgym_jax.registered_envs)
def test_random_policy_scores_what_it_scores_in_the_reference(name):
    run = rollout(name)
    length = 1 + np.argmax(run.terminated | run.truncated, axis=0)  # of the first episode, (B,)
    played = np.arange(len(run.reward))[:, None] < length
    returns = (run.reward * played).sum(axis=0)
    mean, deviation, mean_length, episodes = REFERENCE_RANDOM[name]
    standard_error = deviation * np.sqrt(1 / len(returns) + 1 / episodes)
    assert abs(returns.mean() - mean) < 4 * standard_error
    assert 0.8 < returns.std() / deviation < 1.25
    assert abs(length.mean() - mean_length) < 4 * 12 * np.sqrt(1 / len(length)) + 0.05


@pytest.mark.parametrize("name", ["RepeatFirstEasy", "RepeatPreviousHard"])
def test_perfect_memory_returns_one(name):
    env, params = popgym_jax.make(name)

    def step(state, key):
        answer = state.target if name.startswith("RepeatFirst") else state.history[0]
        _, state, reward, _, _ = env.step_env(key, state, answer, params)
        return state, reward

    _, state = env.reset(jax.random.key(7), params)
    keys = jax.random.split(jax.random.key(8), params.max_steps_in_episode)
    rewards = jax.lax.scan(step, state, keys)[1]
    np.testing.assert_allclose(rewards.sum(), 1.0, rtol=1e-5)


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


def test_registered_names_are_the_reference_names_in_three_difficulties():
    assert len(popgym_jax.registered_envs) == len(set(popgym_jax.registered_envs)) == 18
    reference = {spec.replace("popgym-", "") for spec in gymnasium.registry if "popgym-" in spec}
    assert {name + "-v0" for name in popgym_jax.registered_envs} <= reference


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
