"""Autoencode, CountRecall, HigherLower and Concentration: the laws of their decks, rules that random play rarely meets,
and constructor arguments other than those of Easy, Medium and Hard. Lock step: test_popgym_lockstep.py."""

import jax
import jax.numpy as jnp
import numpy as np
import popgym.envs.autoencode
import popgym.envs.concentration
import popgym.envs.count_recall
import popgym.envs.higher_lower
import pytest
from conftest import fast_jit
from scipy import stats

from popgym_jax.autoencode import Autoencode
from popgym_jax.concentration import Concentration
from popgym_jax.count_recall import CountRecall
from popgym_jax.higher_lower import HigherLower
from tests.reference import assert_same, backward, forward
from tests.reference.cards import BRIDGES

REFERENCE = {
    Autoencode: popgym.envs.autoencode.Autoencode,
    CountRecall: popgym.envs.count_recall.CountRecall,
    HigherLower: popgym.envs.higher_lower.HigherLower,
    Concentration: popgym.envs.concentration.Concentration,
}
EPISODES = 4000


# ---------------------------------------------------------------- constructor arguments


@pytest.mark.slow
@pytest.mark.parametrize("replay", [forward, backward])
@pytest.mark.parametrize(
    ("env_class", "arguments"),
    [
        (Autoencode, {}),
        (Autoencode, {"num_decks": 4}),
        (CountRecall, {}),
        (CountRecall, {"num_decks": 2, "deck_type": "ranks"}),
        (CountRecall, {"num_decks": 3, "deck_type": "suits"}),
        (HigherLower, {}),
        (HigherLower, {"num_decks": 5}),
        (Concentration, {}),
        (Concentration, {"num_decks": 2, "deck_type": "ranks"}),
        (Concentration, {"num_decks": 3, "deck_type": "colors"}),
    ],
)
def test_lock_step_with_other_constructor_arguments(env_class, arguments, replay):
    env, reference = env_class(**arguments), REFERENCE[env_class](**arguments)
    bridge = BRIDGES[env_class.__name__]
    theirs, ours = replay(bridge, env, env.default_params, reference, 8, seed=2)
    assert_same(bridge, theirs, ours)
    assert env.num_actions == reference.action_space.n
    assert env.name == env_class.__name__


@pytest.mark.parametrize("env_class", REFERENCE)
def test_no_decks_are_refused(env_class):
    with pytest.raises(ValueError, match="^num_decks must be at least 1, got 0$"):
        env_class(0)


def test_unknown_deck_types_are_refused_as_in_the_reference():
    with pytest.raises(ValueError, match="^deck_type must be colors or suits or ranks, got jokers$"):
        CountRecall(1, "jokers")
    for deck_type in ("suits", "jokers"):
        with pytest.raises(NotImplementedError):
            REFERENCE[Concentration](1, deck_type)
        with pytest.raises(ValueError, match=f"^deck_type must be colors or ranks, got {deck_type}$"):
            Concentration(1, deck_type)


# ---------------------------------------------------------------- perfect play


def play(env, actions: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Observations (B, T + 1, O) and rewards (B, T) of one episode for each row of actions (B, T)."""
    params = env.default_params

    def episode(key, actions):
        key_reset, key_steps = jax.random.split(key)
        first, state = env.reset_env(key_reset, params)

        def step(state, inputs):
            obs, state, reward, *_ = env.step_env(inputs[0], state, inputs[1], params)
            return state, (obs, reward)

        keys = jax.random.split(key_steps, params.max_steps_in_episode)
        later, rewards = jax.lax.scan(step, state, (keys, actions))[1]
        return jnp.concatenate([first[None], later]), rewards

    keys = jax.random.split(jax.random.key(seed), len(actions))
    return jax.tree.map(np.asarray, fast_jit(jax.vmap(episode))(keys, actions))


def idle(env, episodes: int, seed: int = 0) -> np.ndarray:
    """Observations of episodes with action 0, (episodes, T + 1, O)."""
    return play(env, np.zeros((episodes, env.default_params.max_steps_in_episode), int), seed)[0]


@pytest.mark.parametrize("num_decks", [1, 2, 3])
def test_reciting_what_was_seen_backwards_returns_one(num_decks):
    env = Autoencode(num_decks)
    num_cards = 52 * num_decks
    obs = idle(env, 20)  # the actions have no effect on what is dealt
    mode, suit = obs[:, :, :2].argmax(-1), obs[:, :, 2:].argmax(-1)
    assert (mode[:, : num_cards - 1] == 1).all() and (mode[:, num_cards - 1 :] == 0).all()
    answers = suit[:, :num_cards][:, ::-1]
    actions = np.concatenate([np.zeros((20, num_cards - 1), int), answers], axis=1)
    rewards = play(env, actions)[1]
    assert (rewards[:, : num_cards - 1] == 0).all()
    np.testing.assert_allclose(rewards.sum(1), 1, rtol=1e-5)


@pytest.mark.parametrize(("num_decks", "deck_type"), [(1, "colors"), (2, "suits"), (4, "ranks")])
def test_counting_the_values_in_view_and_before_returns_one(num_decks, deck_type):
    env = CountRecall(num_decks, deck_type)
    value, query = np.split(idle(env, 20), 2, axis=2)
    counts = value.cumsum(axis=1)
    actions = (counts * query).sum(-1)[:, :-1].astype(int)
    rewards = play(env, actions)[1]
    np.testing.assert_allclose(rewards.sum(1), 1, rtol=1e-5)


# ---------------------------------------------------------------- the rules of Concentration


def both(env: Concentration, reference, choose, steps: int, seed: int = 3):
    """Observation, reward, terminated, truncated of each step on both sides; raw position = choose(kinds, step)."""
    reference.np_random = np.random.default_rng(seed)
    reference.reset()
    kinds = reference.deck_idx_type[reference.deck.idx]
    params = env.default_params
    obs, state = BRIDGES["Concentration"].start(env, params, kinds.astype(np.int8), {})
    step = fast_jit(env.step_env)
    theirs, ours = [], []
    for t in range(steps):
        action = int(choose(kinds, t))
        raw, *rest, _ = reference.step(action)
        theirs.append((raw, *rest))
        obs, state, reward, terminated, _ = step(jax.random.key(0), state, action, params)
        shown = np.asarray(obs).reshape(len(kinds), -1)
        assert (shown.sum(1) == 1).all()
        ours.append((shown.argmax(1), float(reward), bool(terminated), bool(env.is_truncated(state, params))))
    for their, our in zip(theirs, ours, strict=True):
        np.testing.assert_array_equal(our[0], their[0])
        assert our[1] == pytest.approx(their[1], rel=1e-6)
        assert our[2:] == their[2:]
    return ours


def partner(kinds: np.ndarray, position: int, nth: int = 0) -> int:
    """The nth other position with a card of the same kind."""
    return [i for i in np.flatnonzero(kinds == kinds[position]) if i != position][nth]


def stranger(kinds: np.ndarray, position: int) -> int:
    """A position with a card of another kind."""
    return int(np.flatnonzero(kinds != kinds[position])[-1])


@pytest.mark.parametrize(("num_decks", "deck_type"), [(1, "colors"), (2, "colors"), (1, "ranks")])
@pytest.mark.parametrize(
    ("choose", "rewards", "in_view"),
    [
        pytest.param(lambda k: [7, 7, 7], [0, -2, 0], [1, 1, 1], id="the same position twice"),
        pytest.param(lambda k: [7, stranger(k, 7), 7], [0, -2, 0], [1, 2, 1], id="no pair"),
        pytest.param(lambda k: [7, partner(k, 7), 7], [0, "pair", -1], [1, 2, 2], id="face-up card first"),
        pytest.param(
            lambda k: [7, partner(k, 7), stranger(k, 7), 7, stranger(k, 7)],
            [0, "pair", 0, -2, 0],
            [1, 2, 3, 3, 3],
            id="face-up card second takes the first away",
        ),
        pytest.param(
            lambda k: [7, partner(k, 7), partner(k, 7, 1), 7, 7, 7],
            [0, "pair", 0, -2, -1, -1],
            [1, 2, 3, 3, 2, 2],
            id="face-up card of the same kind is no pair",
        ),
    ],
)
def test_turns_of_concentration(num_decks, deck_type, choose, rewards, in_view):
    env, reference = Concentration(num_decks, deck_type), REFERENCE[Concentration](num_decks, deck_type)
    steps = both(env, reference, lambda kinds, t: choose(kinds)[t], len(rewards))
    length = env.default_params.max_steps_in_episode
    expected = [2 / env.num_cards if r == "pair" else r / length for r in rewards]
    assert [step[1] for step in steps] == pytest.approx(expected)
    assert [int((step[0] != env.num_kinds).sum()) for step in steps] == in_view


@pytest.mark.parametrize(("num_decks", "deck_type"), [(1, "colors"), (2, "colors"), (1, "ranks")])
@pytest.mark.parametrize("wasted", ["none", "some", "all that can be"])
def test_last_pair_terminates_and_on_the_last_step_truncates_too(num_decks, deck_type, wasted):
    env, reference = Concentration(num_decks, deck_type), REFERENCE[Concentration](num_decks, deck_type)
    length, cards = env.default_params.max_steps_in_episode, env.num_cards
    idle_steps = {"none": 0, "some": 2, "all that can be": length - cards}[wasted]

    def choose(kinds, t):
        return 0 if t < idle_steps else np.argsort(kinds, kind="stable")[t - idle_steps]

    steps = both(env, reference, choose, idle_steps + cards)
    assert not any(terminated or truncated for *_, terminated, truncated in steps[:-1])
    assert steps[-1][2:] == (True, wasted == "all that can be")
    assert sum(step[1] for step in steps) == pytest.approx(1 - idle_steps / length)


# ---------------------------------------------------------------- the laws of the decks


def position_p_value(kinds: np.ndarray, num_kinds: int) -> float:
    """Every position of a deck holds each kind equally often, kinds (episodes, N): Bonferroni over positions."""
    counts = np.stack([(kinds == kind).sum(axis=0) for kind in range(num_kinds)], axis=1)
    return min(1.0, len(counts) * stats.chisquare(counts, axis=1).pvalue.min())


def pair_p_value(kinds: np.ndarray, num_kinds: int) -> float:
    """Two positions share their kind with probability (N/K - 1) / (N - 1): neighbours, second neighbours, ends, halves.

    Bonferroni over each pair of positions, and over the number of equal neighbours of an episode on average.
    """
    episodes, n = kinds.shape
    expected = (n / num_kinds - 1) / (n - 1)
    neighbours = (kinds[:, 1:] == kinds[:, :-1]).sum(axis=1)
    average = stats.ttest_1samp(neighbours, (n - 1) * expected).pvalue
    p_values = []
    for distance in (1, 2, n // 2, n - 1):
        same = (kinds[:, distance:] == kinds[:, :-distance]).sum(axis=0)
        p_values += [stats.binomtest(int(s), episodes, expected).pvalue for s in same]
    return min(1.0, 2 * average, 2 * len(p_values) * min(p_values))


def agreement_p_value(values: np.ndarray, queries: np.ndarray, num_kinds: int) -> float:
    """Cards of two independent decks are of one kind with probability 1/K, at the same place and at the next ones."""
    p_values = []
    for distance in (0, 1):
        same = (values[:, : values.shape[1] - distance] == queries[:, distance:]).sum(axis=0)
        p_values += [stats.binomtest(int(s), len(values), 1 / num_kinds).pvalue for s in same]
    return min(1.0, len(p_values) * min(p_values))


def dealt(env, deal=None, seed: int = 4) -> list[np.ndarray]:
    """Kinds in the order in which they come, (EPISODES, N): one array for each deck."""
    if deal is not None:
        env.deal = deal
    obs = idle(env, EPISODES, seed)
    if isinstance(env, CountRecall):
        return [part.argmax(-1) for part in np.split(obs, 2, axis=2)]
    return [obs[:, : env.num_cards, 2:].argmax(-1)] if isinstance(env, Autoencode) else [obs.argmax(-1)]


CASES = [
    (Autoencode, {}, 4),
    (Autoencode, {"num_decks": 3}, 4),
    (HigherLower, {}, 13),
    (HigherLower, {"num_decks": 3}, 13),
    (CountRecall, {}, 2),
    (CountRecall, {"num_decks": 2, "deck_type": "suits"}, 4),
    (CountRecall, {"num_decks": 4, "deck_type": "ranks"}, 13),
]


@pytest.mark.parametrize(("env_class", "arguments", "num_kinds"), CASES)
def test_dealt_kinds_follow_the_law_of_a_uniform_shuffle(env_class, arguments, num_kinds):
    decks = dealt(env_class(**arguments))
    for kinds in decks:
        full = kinds.shape[1] // num_kinds
        assert all(((kinds == kind).sum(axis=1) == full).all() for kind in range(num_kinds))
        assert position_p_value(kinds, num_kinds) > 1e-3
        assert pair_p_value(kinds, num_kinds) > 1e-3
    if len(decks) == 2:
        assert agreement_p_value(*decks, num_kinds) > 1e-3


def test_position_statistic_sees_a_rank_that_comes_up_a_fifth_too_early():
    def biased(key, remaining):
        weights = remaining * jnp.ones(13).at[0].set(1.2)
        return jax.random.categorical(key, jnp.log(weights))

    assert position_p_value(dealt(HigherLower(), biased)[0], 13) < 1e-3


@pytest.mark.parametrize(("env_class", "num_kinds"), [(Autoencode, 4), (HigherLower, 13)])
def test_pair_statistic_sees_cards_drawn_with_replacement(env_class, num_kinds):
    kinds = dealt(env_class(), lambda key, left: jax.random.randint(key, (), 0, num_kinds))[0]
    assert position_p_value(kinds, num_kinds) > 1e-3  # this bias is invisible position by position
    assert pair_p_value(kinds, num_kinds) < 1e-3


@pytest.mark.parametrize("agree", [0.05, 1.0])
def test_agreement_statistic_sees_two_decks_that_are_dealt_alike(agree):
    honest = CountRecall(1, "suits")

    def tied(key, values, queries):
        """The query copies the value, sometimes or always, where such a card is left."""
        value, query = CountRecall.deal(honest, jax.random.fold_in(key, 0), values, queries)
        copies = (jax.random.uniform(jax.random.fold_in(key, 1)) < agree) & (queries[value] > 0)
        return jnp.stack([value, jnp.where(copies, value, query)])

    values, queries = dealt(CountRecall(1, "suits"), tied)
    assert position_p_value(values, 4) > 1e-3 and pair_p_value(values, 4) > 1e-3  # each deck looks right
    assert agreement_p_value(values, queries, 4) < 1e-3


def tables(env: Concentration, seed: int = 5) -> np.ndarray:
    """Kinds by position of EPISODES resets, (EPISODES, N)."""
    keys = jax.random.split(jax.random.key(seed), EPISODES)
    state = fast_jit(jax.vmap(env.reset_env, in_axes=(0, None)))(keys, env.default_params)[1]
    faces = np.asarray(state.faces).reshape(EPISODES, env.num_cards, -1)
    np.testing.assert_array_equal(faces.argmax(-1), state.kinds)
    assert (faces.sum(-1) == 1).all()
    return np.asarray(state.kinds)


@pytest.mark.parametrize(("num_decks", "deck_type"), [(1, "colors"), (2, "colors"), (1, "ranks")])
def test_cards_of_concentration_lie_in_uniformly_random_order(num_decks, deck_type):
    env = Concentration(num_decks, deck_type)
    kinds = tables(env)
    full = env.num_cards // env.num_kinds
    assert all(((kinds == kind).sum(axis=1) == full).all() for kind in range(env.num_kinds))
    assert position_p_value(kinds, env.num_kinds) > 1e-3
    assert pair_p_value(kinds, env.num_kinds) > 1e-3


def test_pair_statistic_sees_a_deck_that_is_only_cut():
    env = Concentration(1, "ranks")
    env.shuffle = lambda key: jnp.roll(jnp.arange(52) // 4, jax.random.randint(key, (), 0, 52)).astype(jnp.int8)
    kinds = tables(env)
    assert position_p_value(kinds, 13) > 1e-3
    assert pair_p_value(kinds, 13) < 1e-3


def test_position_statistic_sees_a_deck_with_cards_that_stay_in_place():
    env = Concentration(1, "colors")
    honest = Concentration(1, "colors").shuffle

    def lazy(key):  # one shuffle in ten leaves the deck as it was
        skip = jax.random.uniform(jax.random.fold_in(key, 1)) < 0.1
        return jnp.where(skip, jnp.arange(52) % 2, honest(key)).astype(jnp.int8)

    env.shuffle = lazy
    assert position_p_value(tables(env), 2) < 1e-3


def test_every_game_of_concentration_begins_with_other_cards_face_down():
    env = Concentration(1, "ranks")
    params = env.default_params
    batch = 200  # more than are reset together

    def step(carry, key):
        key_action, key_step = jax.random.split(key)
        actions = jax.random.randint(key_action, (batch,), 0, 52)
        keys = jax.random.split(key_step, batch)
        obs, state, _, terminated, truncated, _ = jax.vmap(env.step, (0, 0, 0, None))(keys, carry, actions, params)
        return state, (obs, state, terminated | truncated)

    @fast_jit
    def play(reset_keys, step_keys):
        _, state = jax.vmap(env.reset, (0, None))(reset_keys, params)
        return state, jax.lax.scan(step, state, step_keys)[1]

    keys = jax.random.split(jax.random.key(6), batch), jax.random.split(jax.random.key(7), 2 * 104)
    state, (obs, states, done) = jax.tree.map(np.asarray, play(*keys))
    assert done[[103, 207]].all() and done.sum() == 2 * batch  # random play does not finish
    for t in (103, 207):
        assert (obs[t].reshape(batch, 52, 14).argmax(-1) == 13).all()
        assert not states.face_up[t].any() and (states.first[t] == -1).all() and not states.time[t].any()
        assert (np.sort(states.kinds[t], axis=1) == np.arange(52) // 4).all()
    games = np.concatenate([state.kinds, states.kinds[103], states.kinds[207]])
    assert len(np.unique(games, axis=0)) == 3 * batch
