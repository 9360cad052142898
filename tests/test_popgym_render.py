"""popgym_jax: what `render` says is what was seen, done and hidden in episodes of random actions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import fast_jit
from matplotlib.figure import Figure

import popgym_jax
from popgym_jax import EpisodeStatistics, PreviousActionAndStart, RandomProjection, cards
from popgym_jax.registration import family_and_level

STEPS = 9
SUITS = ["spades", "diamonds", "clubs", "hearts"]
RANKS = ["ace", "2", "3", "4", "5", "6", "7", "8", "9", "10", "jack", "queen", "king"]


@functools.cache
def programs(name):
    env, params = popgym_jax.make(name)
    return env, params, fast_jit(env.reset_env), fast_jit(env.step_env)


def episode(name, seed=0, actions=None):
    """Environment, parameters, and for each step the observation, the state and the action taken then."""
    env, params, reset, step = programs(name)
    space = env.action_space(params)
    obs, state = reset(jax.random.PRNGKey(seed), params)
    moments = []
    for t in range(STEPS if actions is None else len(actions)):
        action = space.sample(jax.random.PRNGKey(100 * seed + t)) if actions is None else np.int32(actions[t])
        moments.append((np.asarray(obs), jax.device_get(state), np.asarray(action)))
        obs, state, _, terminated, _ = step(jax.random.PRNGKey(t), state, action, params)
        if terminated:
            break
    return env, params, moments


def board(text, size):
    """The last `size` lines, letter by letter."""
    return np.array([line.split() for line in text.splitlines()[-size:]])


# ---------------------------------------------------------------- what each family's text has to hold


def check_repeat_previous(env, params, moments):
    seen = [SUITS[obs.argmax()] for obs, _, _ in moments]
    for t, (_, state, action) in enumerate(moments):
        shown, asked, kept = env.render(state, params).splitlines()
        assert shown == f"card {t + 1} of {env.episode_length + 1} is of {seen[t]}"
        back = t + 1 - env.k
        assert asked.endswith(f"card {back + 1}: {seen[back]}" if back >= 0 else f"nothing before card {env.k}")
        assert kept.split()[-1] == "".join(suit[0].upper() for suit in seen[max(0, back) : t + 1])
        assert env.render_action(state, action, params) == SUITS[action]


def check_repeat_first(env, params, moments):
    first = SUITS[moments[0][0].argmax()]
    for t, (_, state, action) in enumerate(moments):
        text = env.render(state, params)
        assert f"card {t + 1} of {env.episode_length + 1}" in text and text.endswith(f"first card: {first}")
        assert env.render_action(state, action, params) == SUITS[action]


def check_autoencode(env, params, moments):
    """Watched to the end, then two answers."""
    cards_seen = [SUITS[obs[2:].argmax()] for obs, _, _ in moments[: env.num_cards]]
    letters = "".join(suit[0].upper() for suit in cards_seen)
    for t, (_, state, action) in enumerate(moments):
        now, kept = env.render(state, params).splitlines()
        if t + 1 < env.num_cards:
            assert now == f"watch: card {t + 1} of {env.num_cards} is of {cards_seen[t]}"
            assert env.render_action(state, action, params) == "nothing"
            assert kept.split()[-1] == letters[: t + 1]
        else:
            answers = t + 1 - env.num_cards
            asked = cards_seen[env.num_cards - 1 - answers]
            assert now == f"play: asked for suit {answers + 1} of {env.num_cards}: {asked}"
            assert kept.split()[-1] == letters[: env.num_cards - answers]
            assert env.render_action(state, action, params) == SUITS[action]
    over = state.replace(time=np.int32(env.episode_length))
    assert env.render(over, params) == "all suits have been recited"


def check_count_recall(env, params, moments):
    names = {2: ["black", "red"], 4: SUITS, 13: RANKS}[env.num_kinds]
    values = [names[obs[: env.num_kinds].argmax()] for obs, _, _ in moments]
    for t, (obs, state, action) in enumerate(moments):
        asked = names[obs[env.num_kinds :].argmax()]
        first, dealt = env.render(state, params).splitlines()
        assert first == f"asked: how many cards of kind {asked} so far: {values[: t + 1].count(asked)}"
        counts = [f"{name} {values[: t + 1].count(name)}" for name in names]
        assert dealt == f"dealt: {', '.join(counts)}"
        assert env.render_action(state, action, params) == str(action)


def check_higher_lower(env, params, moments):
    decks = env.num_cards // 52
    seen = [int(obs.argmax()) for obs, _, _ in moments]
    for t, (_, state, action) in enumerate(moments):
        left = np.full(13, 4 * decks) - np.bincount(seen[: t + 1], minlength=13)
        counts = f"{left[seen[t] + 1 :].sum()} higher, {left[seen[t]]} alike, {left[: seen[t]].sum()} lower"
        expected = f"card in view: {RANKS[seen[t]]}\nleft in the stack: {counts}"
        assert env.render(state, params) == expected
        assert env.render_action(state, action, params) == ("higher", "lower")[action]


def check_battleship(env, params, moments):
    guessed = set()
    hits = 0
    for t, (obs, state, action) in enumerate(moments):
        hits += int(obs[1])
        text = env.render(state, params)
        ships = board(text, env.board_size) == "S"
        assert (
            text.startswith(f"{env.needed_hits - hits} of {env.needed_hits}") and ships.sum() == env.needed_hits - hits
        )
        assert not any(ships.ravel()[list(guessed)])
        if t + 1 < len(moments):  # the text knows what the next observation will say
            assert ships.ravel()[action] == moments[t + 1][0][1]
        guessed.add(int(action))
        row, column = divmod(int(action), env.board_size)
        assert env.render_action(state, action, params) == f"row {row + 1}, column {column + 1}"


def check_minesweeper(env, params, moments):
    for t, (_, state, action) in enumerate(moments):
        text = env.render(state, params)
        squares = board(text, env.board_size)
        assert (squares == "*").sum() == env.num_mines
        assert text.startswith(f"{(squares == '.').sum()} of {env.num_clear}")
        assert (squares == ".").sum() == env.num_clear - len({int(a) for _, _, a in moments[:t]})
        for before in range(t):  # a clicked square shows what was seen then
            clicked = int(moments[before][2])
            assert squares.ravel()[clicked] == str(moments[before + 1][0].argmax())
        row, column = divmod(int(action), env.board_size)
        assert env.render_action(state, action, params) == f"row {row + 1}, column {column + 1}"


def check_concentration(env, params, moments):
    """Whatever lies face up in the next observation is what the text says of that card now."""
    letters = "BR" if env.num_kinds == 2 else "A23456789TJQK"
    for (_, state, action), (obs, later, _) in zip(moments, moments[1:], strict=False):
        table = "".join(env.render(later, params).splitlines()[1:])
        kinds = obs.reshape(env.num_cards, -1).argmax(axis=1)
        up = [i for i in range(env.num_cards) if table[3 * i] == "["]
        waits = [i for i in range(env.num_cards) if table[3 * i] == "("]
        assert waits == ([int(later.first)] if later.first >= 0 else [])
        assert env.render(later, params).startswith(f"{len(up)} of {env.num_cards} cards")
        for i in np.flatnonzero(kinds < env.num_kinds):
            assert table[3 * i + 1] == letters[kinds[i]]
        assert set(up) <= set(np.flatnonzero(kinds < env.num_kinds))
        row, column = divmod(int(action), 13)
        letter = letters[kinds[action]]
        assert env.render_action(state, action, params) == f"row {row + 1}, column {column + 1}: {letter}"


def check_bandit(env, params, moments):
    for _, state, action in moments:
        first, best = env.render(state, params).splitlines()
        shown = [float(word) for word in first.split()[4:]]
        np.testing.assert_allclose(shown, state.probabilities, atol=0.0051)
        assert best == f"best arm: {np.argmax(state.probabilities)}"
        assert env.render_action(state, action, params) == f"arm {action}"


def check_labyrinth(env, params, moments):
    """The squares around the agent are those that it sees."""
    side = 2 * env.size + 1
    been = []
    for obs, state, action in moments:
        lines = env.render(state, params).splitlines()
        assert [len(line) for line in lines] == [side] * side
        grid = np.array([list(line) for line in lines])
        (place,) = np.argwhere(grid == "A").tolist()
        assert place == state.position.tolist()
        been.append(place)
        codes = obs.reshape(10, 5)[:9].argmax(axis=1).reshape(3, 3)
        row, column = place
        if 0 < row < side - 1 and 0 < column < side - 1:  # where the view is centred
            around = grid[row - 1 : row + 2, column - 1 : column + 2]
            expected = np.select([around == "#", around == "S", around == "G"], [1, 2, 3], 0)
            expected[1, 1] = codes[1, 1]  # the agent covers its square
            np.testing.assert_array_equal(codes, expected)
        if hasattr(state, "goal"):
            assert place == state.goal.tolist() or grid[tuple(state.goal)] == "G"
        else:
            assert (grid == ".").sum() == 2 * env.size**2 - len({tuple(p) for p in [*been, state.start]})
        assert env.render_action(state, action, params) == ("left", "right", "up", "down")[action]


def check_cartpole(env, params, moments):
    for _, state, action in moments:
        x, _, theta, _ = state.physics
        text = env.render(state, params)
        track, _, words = text.partition("] ")
        assert words == f"cart {x:+.2f} m, pole {np.degrees(theta):+.1f} degrees"
        assert abs((track.index("o") - 1) / 48 - (x + 2.4) / 4.8) <= 0.5 / 48 + 1e-6 and len(track) == 50
        assert env.render_action(state, action, params) == ("push left", "push right")[action]


def check_pendulum(env, params, moments):
    for _, state, action in moments:
        angle = np.degrees(np.angle(np.exp(1j * state.physics[0])))
        dial, _, words = env.render(state, params).partition("] ")
        number = float(words.split()[1])
        assert abs(np.sin(np.radians(number - angle) / 2)) < 1e-3
        assert abs((dial.index("o") - 1) / 48 - (number + 180) / 360) <= 0.5 / 48 + 1e-3
        torque = float(np.clip(action, -2, 2)[0])
        assert env.render_action(state, action, params) == f"torque {torque:+.2f} N m"


CHECKS = {
    "Autoencode": check_autoencode,
    "Battleship": check_battleship,
    "Concentration": check_concentration,
    "CountRecall": check_count_recall,
    "HigherLower": check_higher_lower,
    "LabyrinthEscape": check_labyrinth,
    "LabyrinthExplore": check_labyrinth,
    "MineSweeper": check_minesweeper,
    "MultiarmedBandit": check_bandit,
    "NoisyPositionOnlyCartPole": check_cartpole,
    "NoisyPositionOnlyPendulum": check_pendulum,
    "PositionOnlyCartPole": check_cartpole,
    "PositionOnlyPendulum": check_pendulum,
    "RepeatFirst": check_repeat_first,
    "RepeatPrevious": check_repeat_previous,
    "VelocityOnlyCartPole": check_cartpole,
}


@pytest.mark.parametrize("name", popgym_jax.registered_envs)
def test_the_text_holds_what_was_seen_is_asked_and_is_hidden(name):
    family, _ = family_and_level(name)
    actions = [0] * (programs(name)[0].num_cards + 1) if family == "Autoencode" else None
    for seed in range(1 if actions else 3):
        env, params, moments = episode(name, seed, actions)
        texts = [env.render(state, params) for _, state, _ in moments]
        assert texts == [env.render(jax.tree.map(jnp.asarray, state), params) for _, state, _ in moments]
        assert all(text.isascii() and text == text.strip("\n") for text in texts)
        CHECKS[family](env, params, moments)


def test_every_pair_of_concentration_found_lies_face_up():
    env, params, _ = episode("ConcentrationEasy")
    _, state = programs("ConcentrationEasy")[2](jax.random.PRNGKey(3), params)
    reds = np.flatnonzero(np.asarray(state.kinds) == 1)[:2]
    _, _, moments = episode("ConcentrationEasy", 3, [*reds, 0])
    table = "".join(env.render(moments[2][1], params).splitlines()[1:])
    assert [i for i in range(52) if table[3 * i : 3 * i + 3] == "[R]"] == reds.tolist()


# ---------------------------------------------------------------- around and beside them


def test_wrappers_say_what_the_environment_inside_says():
    env, params, reset, _ = programs("PositionOnlyCartPoleEasy")
    _, state = reset(jax.random.PRNGKey(0), params)
    text = env.render(state, params)
    seen = PreviousActionAndStart(env)
    assert seen.render(state, params) == text and seen.render_action(state, 1, params) == "push right"
    counted = EpisodeStatistics(seen)
    _, outer = fast_jit(counted.reset)(jax.random.PRNGKey(0), params)
    assert counted.render(outer, params) == env.render(outer.env_state, params)
    assert counted.has_picture and not EpisodeStatistics(popgym_jax.make("RepeatFirstEasy")[0]).has_picture


def test_a_projected_action_is_said_as_what_it_does():
    env, params = popgym_jax.make("PositionOnlyCartPoleEasy")
    projected = RandomProjection(env, 4)
    reset = fast_jit(projected.reset_env)
    words = set()
    for seed in range(8):
        _, state = reset(jax.random.PRNGKey(seed), params)
        push = ("push left", "push right")[int(state.M_a[1])]
        assert projected.render_action(state, np.int32(1), params) == push
        assert projected.render(state, params) == env.render(state.env_state, params)
        words.add(push)
    assert len(words) == 2


@pytest.mark.parametrize("name", popgym_jax.meta_envs)
def test_a_meta_episode_says_which_trial_runs(name):
    env, params = popgym_jax.make(name, num_trials=3)
    _, state = fast_jit(env.reset_env)(jax.random.PRNGKey(0), params)
    state = state.replace(trial=jnp.int32(1))
    trial, cart = env.render(state, params).splitlines()
    assert trial == "trial 2 of 3" and cart == env.env.env.render(state.play.env_state, params.trial)
    assert env.render_action(state, 0, params) == ("push left", "push right")[int(state.play.M_a[0])]


def test_an_environment_without_a_text_of_its_own_shows_the_fields_of_its_state():
    env, params, reset, _ = programs("RepeatFirstEasy")
    _, state = reset(jax.random.PRNGKey(0), params)
    text = popgym_jax.environment.Environment.render(env, state, params)
    assert "time: 0" in text.splitlines() and f"target: {state.target}" in text.splitlines()
    assert popgym_jax.environment.Environment.render_action(env, state, 3, params) == "action 3"


def drawn_lines(env, state):
    axes = Figure().subplots()
    env.draw(axes, state)
    return [line.get_xydata() for line in axes.lines]


@pytest.mark.parametrize(("x", "theta"), [(0.0, 0.0), (-1.2, 0.2)])
def test_cart_and_pole_are_drawn_where_they_are(x, theta):
    env, params, reset, _ = programs("MetaStatelessCartPole")
    _, state = reset(jax.random.PRNGKey(0), params)
    inner = state.play.env_state.replace(physics=jnp.array([x, 0.0, theta, 0.0], jnp.float32))
    state = state.replace(play=state.play.replace(env_state=inner))
    _, cart, pole = drawn_lines(env, state)
    np.testing.assert_allclose(cart.mean(axis=0), [x, 0], atol=1e-6)
    np.testing.assert_allclose(pole, [[x, 0], [x + np.sin(theta), np.cos(theta)]], atol=1e-6)


def test_the_pendulum_is_drawn_upright_at_angle_0_and_to_the_left_at_90_degrees():
    env, params, reset, _ = programs("PositionOnlyPendulumEasy")
    _, state = reset(jax.random.PRNGKey(0), params)
    for angle, tip in ((0.0, [0, 1]), (np.pi / 2, [-1, 0])):
        rod, _ = drawn_lines(env, state.replace(physics=jnp.array([angle, 0.0], jnp.float32)))
        np.testing.assert_allclose(rod[1], tip, atol=1e-6)


def test_names_of_cards_are_those_of_their_ids():
    assert [cards.SUITS[cards.suit(card)] for card in range(4)] == SUITS and list(cards.RANKS) == RANKS
