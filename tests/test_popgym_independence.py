"""No hidden quantity of popgym_jax can be read off another one: whatever a reset or a step draws is independent of all
that was drawn before and with it, in every environment, as the views for gymnasium hand on their random bits."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import fast_jit, nearly_over
from flax import struct
from gymnax.environments import spaces
from independence import correlated_pairs

import popgym_jax
from popgym_jax import RandomProjection, boards, environment, gymnasium_view, prng
from popgym_jax.registration import FAMILIES, family_and_level

DRAWS = 10_000  # 0.05 is five standard errors then: of a million independent pairs, not one exceeds it by chance
SIGMA = 1e-3  # of the noise: so small that clipping hardly ever ties it to what it is added to
ENDS = 1  # the step that ends the episode; those before and after it do not

Columns = dict[str, np.ndarray]


class Moment(NamedTuple):
    """One step of all games: the state before it, its action, the last observation and the state after it."""

    before: Any
    action: np.ndarray
    step: gymnasium_view.Step
    after: gymnasium_view.Play


def games(env: Any, reset: bool) -> tuple[Any, list[Moment]]:
    """How DRAWS games open, and three steps, the second of which ends the episode and opens the next one.

    reset: whether they open with a reset; if not, with an automatic one after a step from a state of zeros, which saves
        the time to compile another program (both are the environment's `reset_env`)
    """
    rng, params = np.random.default_rng(0), env.default_params
    space = env.action_space(params)
    start = jax.vmap(functools.partial(gymnasium_view._start, env))
    step = fast_jit(jax.vmap(functools.partial(gymnasium_view._step, env)))
    words = rng.integers(2**32, size=(DRAWS, 2), dtype=np.uint32)
    if reset:
        play = opening = jax.device_get(fast_jit(start)(words))
    else:
        zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(start, words))
        zeros = zeros._replace(key=words, state=nearly_over(zeros.state, params))
        action = np.zeros((DRAWS, *space.shape), space.dtype)
        play = opening = jax.device_get(step(zeros, action)[0])
    moments = []
    for t in range(3):
        if isinstance(space, spaces.Box):
            action = rng.uniform(-1, 1, (DRAWS, *space.shape)).astype(np.float32)
        else:
            action = rng.integers(space.n, size=DRAWS, dtype=np.int32)
        if t == ENDS:
            play = play._replace(state=nearly_over(play.state, params))
        after, result = jax.device_get(step(play, action))
        moments.append(Moment(play.state, action, result, after))
        play = after
    ended = [moment.step.terminated | moment.step.truncated for moment in moments]
    assert ended[ENDS].all() and not np.mean(ended[0] | ended[2]) > 0.4  # a mine ends a game sooner
    return opening, moments


def all_draws(env: Any, fresh: Callable[..., Columns], stepped: Callable[..., Columns], reset: bool = True) -> Columns:
    """What the opening, each of the steps and the automatic reset drew, each under a name of its own."""
    opening, moments = games(env, reset)
    draws = {f"opening: {name}": values for name, values in fresh(env, opening.obs, opening.state).items()}
    for t, moment in enumerate(moments):
        draws |= {f"step {t}: {name}": values for name, values in stepped(env, moment).items()}
    opened = fresh(env, moments[ENDS].after.obs, moments[ENDS].after.state)
    return draws | {f"automatic reset: {name}": values for name, values in opened.items()}


def nothing(env: Any, moment: Moment) -> Columns:
    """Steps without any randomness."""
    return {}


# ---------------------------------------------------------------- cards
# Two cards of one deck are dependent by the rules, but only by -1/51, far below the bound.


def cards_in(env: Any, obs: np.ndarray) -> Columns:
    """Kinds of the cards in view, from their one-hot parts."""
    family = type(env).__name__
    if family == "CountRecall":
        value, query = np.split(obs, 2, axis=1)
        return {"value": value.argmax(1), "query": query.argmax(1)}
    return {"card": obs[:, 2 if family == "Autoencode" else 0 :].argmax(1)}


def dealt(env: Any, moment: Moment) -> Columns:
    return cards_in(env, moment.step.obs)


def first_card(env: Any, obs: np.ndarray, state: Any) -> Columns:
    return cards_in(env, obs)


def whole_deck(env: Any, obs: np.ndarray, state: Any) -> Columns:
    """All positions together: within a deck, the law of a shuffle is tested in test_popgym_jax.py."""
    return {"deck": state.kinds}


# ---------------------------------------------------------------- boards: the squares of one depend on each other


def squares(words: np.ndarray, num_squares: int) -> np.ndarray:
    """Bits (B, num_squares) of packed boards, uint32 (B, words)."""
    place = np.arange(num_squares)
    return (words[:, place // boards.WORD] >> (place % boards.WORD).astype(np.uint32)) & 1


def ships(env: Any, obs: np.ndarray, state: Any) -> Columns:
    return {"ships": squares(state.afloat, env.num_squares)}


def mines(env: Any, obs: np.ndarray, state: Any) -> Columns:
    return {"mines": squares(state.mines, env.num_squares)}


def maze_and_entrances(env: Any, obs: np.ndarray, state: Any) -> Columns:
    """Passages between cells, the wall of the entrance, and how far along it the start and the exit are.

    The exit is in the wall opposite to the start; the openings in the outer walls are left out, as they are these two.
    """
    inner = np.arange(1, 2 * env.size)
    walls = (state.walls[:, inner, None] >> inner.astype(np.uint32)) & 1
    passages = walls[:, np.add.outer(inner, inner) % 2 == 1]
    in_outer_wall = np.isin(state.start, (0, 2 * env.size))
    across = np.where(in_outer_wall[:, 0], 0, 1)  # which coordinate tells the wall; the other one is along it
    columns = {
        "passages": passages,
        "direction of the wall": across,
        "which of the two walls": coordinate(state.start, across) > 0,
        "start": coordinate(state.start, 1 - across),
    }
    if hasattr(state, "goal"):
        columns["exit"] = coordinate(state.goal, 1 - across)
    return columns


def coordinate(position: np.ndarray, which: np.ndarray) -> np.ndarray:
    """Row or column, (B,), of positions (B, 2)."""
    return np.take_along_axis(position, which[:, None], 1)[:, 0]


# ---------------------------------------------------------------- arms


def arms(env: Any, obs: np.ndarray, state: Any) -> Columns:
    return {f"arm {i}": probability for i, probability in enumerate(state.probabilities.T)}


def payout(env: Any, moment: Moment) -> Columns:
    """What is left of it when its probability is taken off, on which it depends by the rules."""
    probability = np.take_along_axis(moment.before.probabilities, moment.action[:, None], 1)[:, 0]
    return {"payout": moment.step.obs[:, 1] - probability}


# ---------------------------------------------------------------- physics


def separate(name: str, values: np.ndarray) -> Columns:
    return {f"{name} {i}": column for i, column in enumerate(values.T)}


def exact_view(env: Any, physics: np.ndarray) -> np.ndarray:
    """The observation without noise."""
    if "Pendulum" in type(env).__name__:
        return np.stack([np.cos(physics[:, 0]), np.sin(physics[:, 0])], axis=1)
    return physics[:, ::2]


def noise_in(env: Any, obs: np.ndarray, physics: np.ndarray) -> Columns:
    return separate("noise", obs - exact_view(env, physics)) if hasattr(env, "noise_sigma") else {}


def start_and_noise(env: Any, obs: np.ndarray, state: Any) -> Columns:
    return separate("physics", state.physics) | noise_in(env, obs, state.physics)


def physics_after(env: Any, state: Any, action: np.ndarray) -> np.ndarray:
    """Where the step led to, whatever came after it; no key has a say in this."""
    params, key = env.default_params, jax.random.key(0)
    step = jax.vmap(lambda state, action: env.step_env(key, state, action, params)[1].physics)
    return np.asarray(fast_jit(step)(state, action))


def noise_of_step(env: Any, moment: Moment) -> Columns:
    """Of its last observation; the physics follow from the state before."""
    if not hasattr(env, "noise_sigma"):
        return {}
    return noise_in(env, moment.step.obs, physics_after(env, moment.before, moment.action))


# ---------------------------------------------------------------- projections


def seen_through(M_o: np.ndarray, obs: np.ndarray) -> np.ndarray:
    """What was projected, (B, O), as M_o^T M_o is g^2 times the identity."""
    gain = (M_o[:, :, 0] ** 2).sum(1)
    return np.einsum("bij,bi->bj", M_o, obs) / gain[:, None]


def projection(state: Any) -> Columns:
    """Of the permutation of two actions, the first; a torque's sign. The entries of M_o are dependent, but not
    correlated, as each is as likely to be positive as negative whatever the others' sizes are."""
    M_o = state.M_o.reshape(len(state.M_o), -1)
    return separate("M_o", M_o) | {"M_a": state.M_a.reshape(len(M_o), -1)[:, 0]}


def projected_start(env: Any, obs: np.ndarray, state: Any) -> Columns:
    inside = start_and_noise(env.env, seen_through(state.M_o, obs), state.env_state)
    return projection(state) | inside


def projected_noise(env: Any, moment: Moment) -> Columns:
    if not hasattr(env.env, "noise_sigma"):
        return {}
    task_action = jax.vmap(lambda state, action: env.task_action(state, action, env.default_params))
    meant = np.asarray(fast_jit(task_action)(moment.before, moment.action))
    physics = physics_after(env.env, moment.before.env_state, meant)
    return noise_in(env.env, seen_through(moment.before.M_o, moment.step.obs), physics)


def meta_start(env: Any, obs: np.ndarray, state: Any) -> Columns:
    return projected_start(env.env, obs[:, :4], state.play)


def meta_step(env: Any, moment: Moment) -> Columns:
    """The noise of a step within a trial; of the last step, the first position in the trial that is not played."""
    M_o = moment.before.play.M_o
    seen = seen_through(M_o, moment.step.obs[:, :4])
    if moment.step.terminated.all():
        return separate("position", seen)
    inner = Moment(moment.before.play, moment.action, moment.step._replace(obs=moment.step.obs[:, :4]), moment.after)
    return projected_noise(env.env, inner)


# ---------------------------------------------------------------- every environment

PHYSICS = (start_and_noise, noise_of_step)
DECK = (first_card, dealt)
MAZE = (maze_and_entrances, nothing)
SOURCES: dict[str, tuple[Callable[..., Columns], Callable[..., Columns]]] = {  # of a fresh episode, and of a step
    "Autoencode": DECK,
    "Battleship": (ships, nothing),
    "Concentration": (whole_deck, nothing),
    "CountRecall": DECK,
    "HigherLower": DECK,
    "LabyrinthEscape": MAZE,
    "LabyrinthExplore": MAZE,
    "MineSweeper": (mines, nothing),
    "MultiarmedBandit": (arms, payout),
    "NoisyPositionOnlyCartPole": PHYSICS,
    "NoisyPositionOnlyPendulum": PHYSICS,
    "PositionOnlyCartPole": PHYSICS,
    "PositionOnlyPendulum": PHYSICS,
    "RepeatFirst": DECK,
    "RepeatPrevious": DECK,
    "VelocityOnlyCartPole": PHYSICS,
}


def test_every_family_is_looked_at():
    assert set(SOURCES) == set(FAMILIES)


@pytest.mark.parametrize("name", [name for name in popgym_jax.registered_envs if not name.endswith("Medium")])
def test_draws_of_resets_and_of_steps_are_independent(name):
    family, _ = family_and_level(name)
    arguments = {"noise_sigma": SIGMA} if name.startswith("Noisy") else {}
    draws = all_draws(popgym_jax.make(name, **arguments)[0], *SOURCES[family], reset=False)
    assert sum(np.std(values) > 0 for values in draws.values()) >= 2
    assert correlated_pairs(draws) == []


@pytest.mark.parametrize("name", popgym_jax.meta_envs)
def test_draws_of_trials_and_projections_are_independent(name):
    arguments = {"noise_sigma": SIGMA} if "Noisy" in name else {}
    draws = all_draws(popgym_jax.make(name, **arguments)[0], meta_start, meta_step)
    assert len(draws) >= 2 * (8 + 1 + 4) + 2
    assert correlated_pairs(draws) == []


def test_draws_under_a_projection_of_observations_and_torques_are_independent():
    env = RandomProjection(popgym_jax.make("NoisyPositionOnlyPendulumHard", noise_sigma=SIGMA)[0], 3)
    draws = all_draws(env, projected_start, projected_noise)
    assert len(draws) == 2 * (6 + 1 + 2 + 2) + 3 * 2
    assert correlated_pairs(draws) == []


# ---------------------------------------------------------------- what the check sees


@struct.dataclass
class PlainState(environment.EnvState):
    hidden: Any


class Leaky(environment.Environment):
    """Hides a number that its observation's noise, or that of the step's observation, gives away."""

    def __init__(self, leak: str):
        super().__init__()
        self.leak = leak

    def reset_env(self, key, params):
        key_hidden, key_noise = prng.split(key, 2)
        hidden = prng.uniform(prng.bits(key_hidden, 1)[0])
        if self.leak == "fold_in":  # which IS the second key that was split off
            hidden = prng.uniform(prng.bits(jax.random.fold_in(key, 1), 1)[0])
        state = PlainState(time=jnp.zeros((), jnp.int32), hidden=hidden)
        return prng.uniform(prng.bits(key_noise, 1)), state

    def step_env(self, key, state, action, params):
        noise = prng.uniform(prng.bits(prng.split(key, 2)[0], 1))
        return noise, state.replace(time=state.time + 1), jnp.float32(0), jnp.zeros((), bool), {}

    def _fresh(self, key, params):
        if self.leak == "no key of its own":
            return self.reset_env(key, params)
        return super()._fresh(key, params)

    @property
    def default_params(self):
        return environment.EnvParams(max_steps_in_episode=9)

    def action_space(self, params):
        return spaces.Discrete(2)


LEAKS = {
    "none": [],
    "fold_in": [
        ("opening: hidden", "opening: obs[0]"),
        ("automatic reset: hidden", "automatic reset: obs[0]"),
    ],
    "no key of its own": [("step 1: obs[0]", "automatic reset: hidden")],
}


@pytest.mark.parametrize("leak", LEAKS)
def test_a_key_that_is_used_twice_is_found(leak):
    draws = all_draws(
        Leaky(leak),
        lambda env, obs, state: {"hidden": state.hidden, "obs": obs},
        lambda env, moment: {"obs": moment.step.obs},
    )
    found = correlated_pairs(draws)
    assert sorted(pair[:2] for pair in found) == sorted(LEAKS[leak])
    assert all(correlation > 0.99 for *_, correlation in found)
