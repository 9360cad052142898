"""popgym_jax's wrappers against a plain environment that plays the same episodes, kept account of in Python."""

import jax
import numpy as np
import pytest
from conftest import fast_jit, others_slow
from gymnasium.spaces.utils import flatten_space
from popgym.wrappers import Antialias, PreviousAction

import popgym_jax
from popgym_jax import EpisodeStatistics, PreviousActionAndStart
from popgym_jax.cartpole import PositionOnlyCartPole
from tests.reference import make_reference


class CostlyCartPole(PositionOnlyCartPole):
    """Resets in chunks of 128."""

    costly_reset = True


def make(name):
    return popgym_jax.make(name)[0]


ENVIRONMENTS = {  # environment, number of copies, steps: several episodes each
    "cards": (lambda: make("RepeatPreviousEasy"), 3, 160),
    "cartpole": (lambda: make("NoisyPositionOnlyCartPoleEasy"), 8, 120),
    "torque": (lambda: make("PositionOnlyPendulumHard"), 3, 210),
    "three steps": (lambda: PositionOnlyCartPole(3), 3, 12),
    "one step": (lambda: PositionOnlyCartPole(1), 2, 5),
    "chunks": (lambda: CostlyCartPole(4), 130, 10),
}


def random_actions(env, *shape):
    """Torques reach beyond their bounds of +-2."""
    rng = np.random.default_rng(0)
    if env.action_space(env.default_params).shape:
        return rng.uniform(-3, 3, (*shape, 1)).astype(np.float32)
    return rng.integers(env.num_actions, size=shape)


def play(env, actions):
    """obs (T + 1, B, O) and by column reward, terminated, truncated, info (T, B, ...), for actions (T, B, ...)."""
    steps, copies = actions.shape[:2]

    def step(state, inputs):
        key, action = inputs
        obs, state, *rest = jax.vmap(env.step)(jax.random.split(key, copies), state, action)
        return state, (obs, *rest)

    def run(key):
        obs, state = jax.vmap(env.reset)(jax.random.split(key, copies))
        _, (later, *rest) = jax.lax.scan(step, state, (jax.random.split(key, steps), actions))
        return jax.numpy.concatenate([obs[None], later]), *rest

    exact = bool(actions.shape[2:])  # the optimiser may round a sum differently, where rewards are products
    return jax.device_get((jax.jit if exact else fast_jit)(run)(jax.random.key(1)))


@pytest.fixture(scope="module", params=others_slow(ENVIRONMENTS, "cards", "one step"))
def games(request):
    """An environment, actions, and what it answers to them without and with PreviousActionAndStart."""
    build, copies, steps = ENVIRONMENTS[request.param]
    env = build()
    actions = random_actions(env, steps, copies)
    plain, wrapped = play(env, actions), play(PreviousActionAndStart(env), actions)
    assert ((plain[2] | plain[3]).sum(axis=0) >= 2).all()
    return env, actions, plain, wrapped


def shown(env, action):
    """An action as the agent sees it afterwards."""
    return np.eye(env.num_actions)[action] if np.ndim(action) == 0 else action


def test_agent_sees_its_previous_action_and_the_start_of_every_episode(games):
    env, actions, (obs, *outcome, info), (wrapped, *same_outcome, wrapped_info) = games
    np.testing.assert_array_equal(same_outcome, outcome)
    blank = np.zeros(env.num_actions)
    assert wrapped.dtype == np.float32
    for i in range(actions.shape[1]):
        np.testing.assert_array_equal(wrapped[0, i], [*obs[0, i], *blank, 1])
        for t, action in enumerate(actions[:, i]):
            last = [*info["final_observation"][t, i], *shown(env, action), 0]
            first = [*obs[t + 1, i], *blank, 1]
            ended = outcome[1][t, i] or outcome[2][t, i]
            np.testing.assert_array_equal(wrapped_info["final_observation"][t, i], last)
            np.testing.assert_array_equal(wrapped[t + 1, i], first if ended else last)


@pytest.mark.parametrize("wrapped", [False, True], ids=["alone", "on PreviousActionAndStart"])
def test_statistics_are_the_float32_sums_over_each_episode(games, wrapped):
    env, actions, *played = games
    *inside, inside_info = played[wrapped]
    *outside, info = play(EpisodeStatistics(PreviousActionAndStart(env) if wrapped else env), actions)
    for ours, theirs in zip(outside, inside, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    counted = {"episode_ended", "episode_return", "episode_length", "episodes"}
    assert set(info) == set(inside_info) | counted
    for name, value in inside_info.items():
        np.testing.assert_array_equal(info[name], value)
    assert info["episode_return"].dtype == np.float32
    assert info["episode_length"].dtype == info["episodes"].dtype == np.int32
    _, reward, terminated, truncated = inside
    for i in range(actions.shape[1]):
        total, length, finished = np.float32(0), 0, (np.float32(0), 0, 0)
        for t in range(len(actions)):
            total, length = np.float32(total + reward[t, i]), length + 1
            ended = bool(terminated[t, i] or truncated[t, i])
            if ended:
                finished = total, length, finished[2] + 1
                total, length = np.float32(0), 0
            found = tuple(info[name][t, i] for name in ("episode_return", "episode_length", "episodes"))
            np.testing.assert_array_equal(found, finished)
            assert info["episode_ended"][t, i] == ended


@pytest.mark.parametrize(
    "name", ["RepeatFirstEasy", "RepeatPreviousHard", "PositionOnlyCartPoleHard", "NoisyPositionOnlyPendulumEasy"]
)
def test_spaces_are_those_of_the_reference_but_for_one_number_as_flag(name):
    env = PreviousActionAndStart(make(name))
    ours = env.observation_space(env.default_params)
    theirs = flatten_space(Antialias(PreviousAction(make_reference(name))).observation_space)
    np.testing.assert_array_equal(ours.low, theirs.low[:-1].astype(np.float32))
    np.testing.assert_array_equal(ours.high, theirs.high[:-1].astype(np.float32))
    assert ours.shape == ours.low.shape


@pytest.mark.parametrize("name", popgym_jax.registered_envs)
def test_wrappers_keep_name_parameters_actions_and_cost_of_a_reset(name):
    env = make(name)
    for wrapped in (
        PreviousActionAndStart(env),
        EpisodeStatistics(env),
        EpisodeStatistics(PreviousActionAndStart(env)),
    ):
        assert isinstance(wrapped, popgym_jax.environment.Environment)
        assert wrapped.name == name and wrapped.default_params == env.default_params
        assert wrapped.num_actions == env.num_actions
        assert wrapped.costly_reset == env.costly_reset
        assert wrapped.obs_requires_prev_action == env.obs_requires_prev_action
        size = env.observation_space(env.default_params).shape[0]
        extra = env.num_actions + 1 if wrapped.env is not env or isinstance(wrapped, PreviousActionAndStart) else 0
        assert wrapped.observation_space(wrapped.default_params).shape == (size + extra,)


def test_other_parameters_reach_the_environment_inside():
    env = EpisodeStatistics(PreviousActionAndStart(make("PositionOnlyPendulumEasy")))
    params = env.default_params.replace(max_steps_in_episode=7)
    obs, state = env.reset(jax.random.key(0), params)
    for t in range(1, 15):
        *_, truncated, info = step = env.step(jax.random.key(t), state, np.zeros(1, np.float32), params)
        state = step[1]
        assert bool(truncated) == bool(info["episode_ended"]) == (t % 7 == 0)
    assert int(info["episode_length"]) == 7 and int(info["episodes"]) == 2


@pytest.mark.parametrize("outer", [PreviousActionAndStart, EpisodeStatistics])
def test_nothing_goes_around_the_statistics(outer):
    with pytest.raises(ValueError, match="^EpisodeStatistics must be the outermost wrapper$"):
        outer(EpisodeStatistics(make("RepeatFirstEasy")))
