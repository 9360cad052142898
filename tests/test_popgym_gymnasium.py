"""popgym_jax as gymnasium sees it: its own checker, its SyncVectorEnv as the model of the vector, an installation."""

import copy
import functools
import os
import pickle
import re
import shutil
import subprocess
import sys
import warnings

import gymnasium
import jax
import numpy as np
import pytest
from conftest import QUICK, ROOT, others_slow
from gymnasium.error import ResetNeeded
from gymnasium.spaces import Discrete, MultiDiscrete
from gymnasium.spaces.utils import flatten_space
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.vector import RecordEpisodeStatistics

import popgym_jax
from popgym_jax import EpisodeStatistics, PreviousActionAndStart, gymnasium_view, to_gymnasium, to_gymnasium_vector
from popgym_jax.cartpole import PositionOnlyCartPole
from popgym_jax.pendulum import PositionOnlyPendulum
from tests.reference import make_reference

HARMLESS = ("normalized space", "value is infinity", "value is -infinity")  # bounds that are the reference's
MODES = list(AutoresetMode)


# ---------------------------------------------------------------- one environment


@pytest.mark.parametrize("name", [name for name in popgym_jax.registered_envs if name.endswith("Easy")])
def test_gymnasiums_checker_is_content(name):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_env(to_gymnasium(name))
    messages = [str(warning.message) for warning in caught]
    assert [message for message in messages if not any(text in message for text in HARMLESS)] == []


@pytest.mark.parametrize("name", popgym_jax.registered_envs)
def test_spaces_are_the_flattened_ones_of_the_reference(name):
    env, reference = to_gymnasium(name), make_reference(name)
    flat, actions = flatten_space(reference.observation_space), reference.action_space
    assert env.observation_space == gymnasium.spaces.Box(
        flat.low.astype(np.float32), flat.high.astype(np.float32), dtype=np.float32
    )
    assert env.action_space == (Discrete(np.prod(actions.nvec)) if isinstance(actions, MultiDiscrete) else actions)


def random_episode(env, seed=None, rng=None, reset_seed=None):
    """One episode: a list of (obs, reward, terminated, truncated), and the observation of the reset in front."""
    rng = rng or np.random.default_rng(seed)
    rows, done = [env.reset(seed=reset_seed)[0]], False
    while not done:
        action = rng.integers(env.action_space.n) if isinstance(env.action_space, Discrete) else rng.uniform(-3, 3, 1)
        *row, info = env.step(action)
        assert info == {}
        done = row[2] or row[3]
        rows.append(row)
    return rows


@pytest.mark.parametrize("name", ["RepeatFirstEasy", "NoisyPositionOnlyCartPoleEasy", "PositionOnlyPendulumHard"])
def test_seed_of_the_reset_decides_everything(name):
    def games(env, seed):
        return [random_episode(env, 1, reset_seed=seed), random_episode(env, 2), random_episode(env, 3)]

    env = to_gymnasium(name)
    first = games(env, 5)
    other = to_gymnasium(name)
    random_episode(other, 0)
    assert str(games(other, 5)) == str(first) == str(games(env, 5))
    assert str(games(env, 6)) != str(first)
    assert str(games(env, 5 + 2**32)) != str(first)
    starts = [str(env.reset()[0]) + str(env.step(env.action_space.sample())[0]) for _ in range(20)]
    assert len(set(starts)) > 1
    assert str(random_episode(to_gymnasium(name), 1)) != str(random_episode(to_gymnasium(name), 1))


@pytest.mark.parametrize("seed", [-1, 2**64, 2**64 + 5, 2**70, 1.5, "1", np.float32(3)])
def test_seed_that_another_one_would_equal_or_that_is_none_is_refused_and_changes_nothing(seed):
    env = to_gymnasium("RepeatFirstEasy")
    env.reset(seed=3)
    with pytest.raises(ValueError, match=rf"^seed must be an integer 0 to 2\*\*64 - 1, got {re.escape(str(seed))}$"):
        env.reset(seed=seed)
    other = to_gymnasium("RepeatFirstEasy")
    other.reset(seed=3)
    assert str(env.step(1)) == str(other.step(1))


def test_every_bit_of_a_seed_counts_and_both_views_agree():
    seeds = [0, *(2**i for i in range(64)), 2**64 - 4]
    first_words = {tuple(gymnasium_view._words(seed).tolist()) for seed in seeds}
    assert len(first_words) == len(seeds)
    for seed in (np.uint64(2**64 - 4), np.int32(7)):
        vector = to_gymnasium_vector("MultiarmedBanditEasy", 4)
        vector.reset(seed=seed)
        singles = [to_gymnasium("MultiarmedBanditEasy") for _ in range(4)]
        for i, single in enumerate(singles):
            single.reset(seed=int(seed) + i)
            np.testing.assert_array_equal(
                single._play.state.probabilities, np.asarray(vector._play.state.probabilities)[i]
            )


def test_values_are_numpy_arrays_of_their_own_and_python_scalars():
    env = to_gymnasium("RepeatFirstEasy")
    obs, info = env.reset(seed=0)
    kept = obs.copy()
    obs[:] = 7  # the caller may write into what it got
    stepped = env.step(np.int64(1))
    assert type(stepped[0]) is np.ndarray and stepped[0].dtype == np.float32 and stepped[0].flags.writeable
    assert [type(value) for value in stepped[1:]] == [float, bool, bool, dict]
    np.testing.assert_array_equal(env.reset(seed=0)[0], kept)


def test_right_answers_are_rewarded_in_the_first_episode_and_in_those_after_it():
    env = to_gymnasium("RepeatFirstEasy")
    for _ in range(3):
        suit, done, rewards = int(env.reset()[0].argmax()), False, []
        while not done:
            _, reward, terminated, truncated, _ = env.step(suit)
            done = terminated or truncated
            rewards.append(reward)
        assert len(rewards) == 51 and sum(rewards) == pytest.approx(1)
        assert terminated and not truncated


def test_no_step_without_an_episode():
    env = to_gymnasium(PositionOnlyCartPole(3))
    for _ in range(2):
        with pytest.raises(ResetNeeded, match=r"^call reset\(\) before step\(\): no episode is running$"):
            env.step(0)
        assert len(random_episode(env)) == 4


@pytest.mark.parametrize(
    ("name", "action", "message"),
    [
        ("RepeatFirstEasy", 4, "action must be an integer 0 to 3, got 4"),
        ("RepeatFirstEasy", -1, "action must be an integer 0 to 3, got -1"),
        ("RepeatFirstEasy", 0.5, "action must be an integer 0 to 3, got 0.5"),
        ("RepeatFirstEasy", [1], r"action must have shape \(\), got \(1,\)"),
        ("PositionOnlyPendulumEasy", 0.5, r"action must have shape \(1,\), got \(\)"),
    ],
)
def test_impossible_action_is_refused(name, action, message):
    env = to_gymnasium(name)
    env.reset()
    with pytest.raises(ValueError, match=f"^{message}$"):
        env.step(action)


def test_reference_clips_torques_and_so_does_the_view():
    env = to_gymnasium("PositionOnlyPendulumEasy")
    played = [(env.reset(seed=1), env.step(torque), env.step(torque))[1:] for torque in ([2.0], np.array([50.0]))]
    assert str(played[0]) == str(played[1])


def test_any_spelling_or_an_environment():
    names = ("repeathard", "popgym-RepeatPreviousHard-v0", "RepeatPreviousHard")
    for env in map(to_gymnasium, names):
        assert env.jax_env.name == "RepeatPreviousHard"
    assert to_gymnasium_vector("StatelessCartPoleEasy", 2).jax_env.name == "PositionOnlyCartPoleEasy"
    for view in (to_gymnasium, lambda name: to_gymnasium_vector(name, 2)):
        with pytest.raises(popgym_jax.UnknownEnvironmentError, match="nearest: RepeatPreviousHard"):
            view("RepeatHrad")
    env = to_gymnasium(PreviousActionAndStart(popgym_jax.make("RepeatHard")[0]))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not having a spec")
        check_env(env)
    assert env.reset()[0][4:].tolist() == [0, 0, 0, 0, 1]
    assert env.step(2)[0][4:].tolist() == [0, 0, 1, 0, 0]


def test_programs_are_compiled_once_for_a_name():
    def use(name, seed):
        env, vector = to_gymnasium(name), to_gymnasium_vector(name, 3)
        for _ in range(2):
            env.reset(seed=seed)
            env.step(1)
            copy.deepcopy(env).step(2)
            vector.reset(seed=seed)
            vector.step([1, 2, 3])
        programs = [getattr(gymnasium_view, f"_{name}") for name in ("start_one", "step_one", "start_some", "step_all")]
        return [program._cache_size() for program in programs]

    assert use("RepeatFirstMedium", 1) == use("popgym-RepeatFirstMedium-v0", 2**40)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))])
@pytest.mark.parametrize("build", [lambda: to_gymnasium("NoisyStatelessCartPoleHard"), lambda: vector("SameStep")])
def test_copy_plays_on_from_the_same_position(build, again):
    env = build()
    env.reset(seed=3)
    env.step(env.action_space.sample())
    other = again(env)
    actions = [env.action_space.sample() for _ in range(5)]
    assert str([env.step(action) for action in actions]) == str([other.step(action) for action in actions])


def test_gymnasium_makes_another_one_from_the_spec():
    env = to_gymnasium("repeathard")
    assert env.spec.id == "popgym_jax/RepeatPreviousHard-v0"
    made = gymnasium.make(env.spec)
    made.reset(seed=1), env.reset(seed=1)
    np.testing.assert_array_equal(made.step(0)[0], env.step(0)[0])
    assert type(made.unwrapped) is type(env)
    vector = gymnasium.make_vec(env.spec, num_envs=3, autoreset_mode="SameStep")
    assert type(vector) is gymnasium_view.GymnasiumVectorView and vector.num_envs == 3
    assert vector.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP


def test_every_environment_is_registered_with_gymnasium():
    ours = {spec for spec in gymnasium.registry if spec.startswith("popgym_jax/")}
    assert ours == {f"popgym_jax/{name}-v0" for name in popgym_jax.registered_envs + popgym_jax.meta_envs}
    for spec in ours:  # nothing is compiled before the first reset
        env = gymnasium.make(spec)
        assert type(env.unwrapped) is gymnasium_view.GymnasiumView
        assert env.spec.id == env.unwrapped.spec.id == to_gymnasium(env.unwrapped.jax_env.name).spec.id == spec


def test_registered_environment_is_the_view_and_content_with_gymnasiums_checker():
    env = gymnasium.make("popgym_jax/RepeatPreviousHard-v0")
    plain = to_gymnasium("RepeatPreviousHard")
    assert str(env.reset(seed=4)) == str(plain.reset(seed=4))
    assert str(env.step(2)) == str(plain.step(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gymnasium.make("popgym_jax/RepeatFirstEasy-v0").unwrapped)
    vector = gymnasium.make_vec("popgym_jax/RepeatPreviousHard-v0", num_envs=3)
    assert type(vector) is gymnasium_view.GymnasiumVectorView and vector.num_envs == 3
    assert vector.reset(seed=4)[0][0].tolist() == plain.reset(seed=4)[0].tolist()


# ---------------------------------------------------------------- many environments


def same(ours, theirs, atol=0.0):
    """The same structure, types and values; object arrays row by row."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for name in theirs:
            same(ours[name], theirs[name], atol)
    elif theirs is None or theirs.dtype != object:
        assert type(ours) is type(theirs)
        if theirs is not None:
            assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol)
    else:
        assert ours.dtype == object and len(ours) == len(theirs)
        for row, other in zip(ours, theirs, strict=True):
            same(row, other, atol)


def vector(mode, build=lambda: "RepeatFirstEasy", num_envs=4):
    return to_gymnasium_vector(build(), num_envs, mode)


@functools.cache
def built(build):
    """An environment, one object for all modes, and the rounding between a program of one and of many."""
    cartpole = popgym_jax.make("StatelessCartPoleEasy")[0]
    return {
        "cards": (popgym_jax.make("RepeatPreviousEasy")[0], 0),
        "torque": (PositionOnlyPendulum(20), 1e-4),
        "one step": (PositionOnlyCartPole(1), 1e-6),
        "statistics": (EpisodeStatistics(PreviousActionAndStart(cartpole)), 1e-5),
    }[build]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("build", others_slow(["cards", "torque", "one step", "statistics"], "one step"))
def test_vector_does_what_gymnasiums_own_vector_does(build, mode):
    env, atol = built(build)
    ours = to_gymnasium_vector(env, 4, mode.value)
    theirs = SyncVectorEnv([lambda: to_gymnasium(env)] * 4, autoreset_mode=mode)
    for attribute in ("observation_space", "action_space", "single_observation_space", "single_action_space"):
        assert getattr(ours, attribute) == getattr(theirs, attribute)
    assert ours.metadata == theirs.metadata and ours.num_envs == 4
    theirs.action_space.seed(0)
    episodes = 0
    for seed in (11, None, [5, None, 5, 2**50]):  # from the start, in the middle of episodes, mixed
        for a, b in zip(ours.reset(seed=seed), theirs.reset(seed=seed), strict=True):
            same(a, b, atol)
        for _ in range(60):
            actions = theirs.action_space.sample()
            results = ours.step(actions), theirs.step(actions)
            for a, b in zip(*results, strict=True):
                same(a, b, atol)
            ended = results[0][2] | results[0][3]
            episodes += ended.sum()
            if mode == AutoresetMode.DISABLED and ended.any():
                with pytest.raises(ResetNeeded, match="no episode is running in"):
                    ours.step(actions)
                more = ended | (np.arange(4) == 2)  # another one is reset in the middle of its episode
                reset_seed = [None, 9, None, None] if episodes % 2 else None
                for a, b in zip(
                    ours.reset(seed=reset_seed, options={"reset_mask": more}),
                    theirs.reset(seed=reset_seed, options={"reset_mask": more.copy()}),
                    strict=True,
                ):
                    same(a, b, atol)
    assert episodes >= 4


def test_next_step_mode_resets_with_the_step_after_the_last():
    env = vector(AutoresetMode.NEXT_STEP, lambda: PreviousActionAndStart(PositionOnlyCartPole(3)), 2)
    obs, _ = env.reset(seed=0)
    assert obs[:, -1].tolist() == [1, 1]
    flags, rewards, starts = [], [], []
    for _ in range(8):
        obs, reward, terminated, truncated, info = env.step(np.array([1, 0]))
        flags.append(truncated[0]), rewards.append(reward[0]), starts.append(obs[0, -1])
        assert not terminated.any() and info == {}
    assert flags == [False, False, True, False] * 2
    assert rewards == [np.float32(1 / 3)] * 3 + [0.0] + [np.float32(1 / 3)] * 3 + [0.0]
    assert starts == [0, 0, 0, 1] * 2


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED])
@pytest.mark.parametrize("name", ["RepeatFirstEasy", "PositionOnlyCartPoleEasy"])
def test_gymnasiums_statistics_are_right_on_top(name, mode):
    env = RecordEpisodeStatistics(to_gymnasium_vector(name, 5, mode), buffer_length=1000)
    env.action_space.seed(4)
    env.reset(seed=4)
    returns, lengths, expected = np.zeros(5), np.zeros(5, int), []
    waiting = np.zeros(5, bool)
    for _ in range(120):
        _, reward, terminated, truncated, info = env.step(env.action_space.sample())
        returns, lengths = np.where(waiting, 0, returns + reward), np.where(waiting, 0, lengths + 1)
        ended = terminated | truncated
        assert ("episode" in info) == ended.any()
        for i in np.flatnonzero(ended):
            assert (
                info["_episode"][i] and info["episode"]["r"][i] == returns[i] and info["episode"]["l"][i] == lengths[i]
            )
            expected.append((returns[i], lengths[i]))
        if mode == AutoresetMode.NEXT_STEP:
            waiting = ended
        else:
            returns[ended], lengths[ended] = 0, 0
            if mode == AutoresetMode.DISABLED and ended.any():
                env.reset(options={"reset_mask": ended})
    assert list(zip(env.return_queue, env.length_queue, strict=True)) == expected and len(expected) >= 10


def test_gymnasiums_statistics_skip_a_reward_in_same_step_mode_with_its_own_vector_too():
    """The docstring says so; once this fails, gymnasium has mended it."""
    vectors = (
        to_gymnasium_vector("RepeatFirstEasy", 2, "SameStep"),
        SyncVectorEnv([lambda: to_gymnasium("RepeatFirstEasy")] * 2, autoreset_mode="SameStep"),
    )
    lengths = []
    for env in map(RecordEpisodeStatistics, vectors):
        env.reset(seed=0)
        for _ in range(102):
            env.step([0, 1])
        lengths.append(list(env.length_queue))
    assert lengths == [[51, 51, 50, 50]] * 2


def test_results_of_a_vector_are_not_overwritten_by_the_next_step():
    env = vector("NextStep")
    first, _ = env.reset(seed=0)
    steps = [env.step([0, 1, 2, 3]) for _ in range(2)]
    kept = copy.deepcopy([first, *steps])
    first[:], steps[0][0][:], steps[0][2][:] = 9, 9, True
    env.step([0, 1, 2, 3])
    same(steps[1][0], kept[2][0])
    assert str(env.step([0] * 4)) == str(replayed(4)[-1])


def replayed(steps):
    env = vector("NextStep")
    env.reset(seed=0)
    return [env.step([0, 1, 2, 3]) for _ in range(steps - 1)] + [env.step([0] * 4)]


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda env: to_gymnasium_vector("RepeatHard", 0), "num_envs must be at least 1, got 0"),
        (lambda env: to_gymnasium_vector("RepeatHard", 2, "Never"), "'Never' is not a valid AutoresetMode"),
        (lambda env: env.step([0, 1, 2]), r"action must have shape \(4,\), got \(3,\)"),
        (lambda env: env.step([0, 1, 2, 4]), r"action must be an integer 0 to 3, got \[0 1 2 4\]"),
        (lambda env: env.reset(seed=[1, 2]), "seed must be one or 4, got 2"),
        (lambda env: env.reset(seed=[1, 2, 3, -4]), r"seed must be an integer 0 to 2\*\*64 - 1, got -4"),
        (lambda env: env.reset(seed=[1, 2, 3, 2**64]), rf"seed must be an integer 0 to 2\*\*64 - 1, got {2**64}"),
        (lambda env: env.reset(seed=-1), r"seed must be an integer 0 to 2\*\*64 - 1, got -1"),
        (
            lambda env: env.reset(seed=2**64 - 3),
            rf"seed of 4 environments must be at most 2\*\*64 - 4, got {2**64 - 3}",
        ),
        (
            lambda env: env.reset(options={"reset_mask": np.zeros(4, bool)}),
            r"reset_mask must be bool \(4,\) with at least one True, got bool \(4,\)",
        ),
        (
            lambda env: env.reset(options={"reset_mask": np.ones(3, bool)}),
            r"reset_mask must be bool \(4,\) with at least one True, got bool \(3,\)",
        ),
    ],
)
def test_impossible_use_is_refused_in_one_line(use, message):
    env = vector("NextStep")
    env.reset()
    with pytest.raises(ValueError, match=f"^{message}$"):
        use(env)


def test_vector_needs_a_reset_first():
    env = vector("NextStep")
    with pytest.raises(ResetNeeded):
        env.step([0] * 4)
    with pytest.raises(ResetNeeded, match="the first reset"):
        env.reset(options={"reset_mask": np.arange(4) < 2})


# ---------------------------------------------------------------- import and installation


def python(code, cwd=ROOT, timeout=None, **variables):
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_gymnasium_imports_the_module_that_an_id_names_and_importing_it_twice_warns_of_nothing():
    code = (
        "import warnings; warnings.simplefilter('error', UserWarning)\n"
        "import gymnasium, importlib\n"
        "env = gymnasium.make('popgym_jax.gymnasium_view:popgym_jax/RepeatPreviousHard-v0')\n"
        "import popgym_jax.gymnasium_view as view\n"
        "number = len(gymnasium.registry)\n"
        "importlib.reload(view)\n"
        "print(env.spec.id, len(gymnasium.registry) - number)"
    )
    assert python(code) == "popgym_jax/RepeatPreviousHard-v0 0"


@pytest.mark.slow
def test_process_that_is_spawned_plays_what_the_vector_plays(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", QUICK)
    envs = AsyncVectorEnv([functools.partial(to_gymnasium, "RepeatPreviousEasy")], context="spawn")
    try:
        ours = to_gymnasium_vector("RepeatPreviousEasy", 1)
        np.testing.assert_array_equal(envs.reset(seed=5)[0], ours.reset(seed=5)[0])
        for found, expected in zip(envs.step([1])[:4], ours.step([1])[:4], strict=True):
            np.testing.assert_array_equal(found, expected)
    finally:
        envs.close()


FORKED = """
import functools, multiprocessing, popgym_jax
from gymnasium.vector import AsyncVectorEnv
multiprocessing.set_start_method("fork")
make = functools.partial(popgym_jax.to_gymnasium, "RepeatPreviousEasy")
envs = AsyncVectorEnv([make, make])
try:
    envs.reset(seed=0)
except RuntimeError as error:
    print(error)
envs.close(terminate=True)


def use_vector(queue):
    vector = popgym_jax.to_gymnasium_vector("RepeatPreviousEasy", 2)
    for call in (vector.reset, lambda: vector.step([0, 0]), lambda: make().step(0)):
        try:
            call()
        except RuntimeError as error:
            queue.put(str(error))


queue = multiprocessing.Queue()
process = multiprocessing.Process(target=use_vector, args=(queue,))
process.start()
for _ in range(3):
    print(queue.get(timeout=30))
process.join()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_forked_processes_are_told_what_to_do_instead_of_waiting_forever():
    said = python(FORKED, timeout=90).splitlines()
    assert len(said) == 4 and len(set(said)) == 1
    assert 'context="spawn"' in said[0] and "popgym_jax.to_gymnasium_vector" in said[0]


def kinds(x):
    if isinstance(x, dict):
        return {name: kinds(value) for name, value in x.items()}
    return type(x).__name__, str(getattr(x, "dtype", "")), np.round(np.asarray(x, float), 4).tolist()


def shown_by_views():
    """Types and numbers of a reset and two steps."""
    pendulum = popgym_jax.make("PositionOnlyPendulumEasy")[0]
    found = []
    for env in ("RepeatFirstEasy", EpisodeStatistics(PreviousActionAndStart(pendulum))):
        for view in (to_gymnasium(env), to_gymnasium_vector(env, 2)):
            found.append(kinds(view.reset(seed=1)[0]))
            action = np.ones(view.action_space.shape, view.action_space.dtype)
            found += [[kinds(x) for x in view.step(action)] for _ in range(2)]
    return found


@pytest.mark.slow
def test_views_give_the_same_types_and_numbers_in_64_bit_mode():
    usual = shown_by_views()
    with jax.enable_x64(True):
        assert shown_by_views() == usual


def test_views_are_imported_when_they_are_used():
    code = (
        "import sys, popgym_jax\n"
        "print('popgym_jax.gymnasium_view' in sys.modules)\n"
        "sys.modules['gymnasium'] = None\n"
        "try:\n    popgym_jax.to_gymnasium('RepeatHard')\n"
        "except ImportError as error:\n    print(error)"
    )
    imported, message = python(code).splitlines()
    assert imported == "False"
    assert message.startswith("to_gymnasium needs gymnasium 1.1 or newer: pip install 'popgym-jax[gymnasium]'")


def test_view_plays_the_same_with_another_generator_of_jax():
    def played():
        env = vector("NextStep", num_envs=2)
        env.reset(seed=1)
        return env.step([0, 1])[0].tolist()

    usual = played()
    with jax.default_prng_impl("rbg"):
        assert played() == usual


PACKAGES = {  # name: an environment, an action, the shape that is seen
    "popgym_jax": ("RepeatHard", "0", "(4,)"),
    "control_jax": ("ReacherEasy", "jax.numpy.zeros(2)", "(6,)"),
}


@pytest.mark.slow
@pytest.mark.parametrize("package", PACKAGES)
def test_package_installs_whole_and_works_from_anywhere(package, tmp_path):
    env, action, expected = PACKAGES[package]
    pytest.importorskip("hatchling", reason="the package is built with hatchling (requirements-dev.txt)")
    source, target, elsewhere = (tmp_path / name for name in ("source", "target", "elsewhere"))
    elsewhere.mkdir()
    shutil.copytree(ROOT / package, source, ignore=shutil.ignore_patterns(".*", "__pycache__"))
    before = sorted(source.rglob("*"))
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-index",
        "--no-deps",
        "--no-build-isolation",
        "--no-compile",
    ]
    run = subprocess.run([*pip, "--target", target, source], cwd=elsewhere, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert sorted(source.rglob("*")) == before
    assert {path.name for path in target.iterdir() if not path.name.endswith(".dist-info")} == {package}
    installed = {path.name: path.read_bytes() for path in (target / package).iterdir()}
    assert installed == {path.name: path.read_bytes() for path in source.glob("*.py")}
    code = (
        f"import jax, {package}; print({package}.__file__)\n"
        f"env, params = {package}.make({env!r})\n"
        "obs, state = env.reset(jax.random.key(0), params)\n"
        f"print(env.step(jax.random.key(1), state, {action}, params)[0].shape)"
    )
    where, shape = python(code, elsewhere, PYTHONPATH=str(target)).splitlines()
    assert where == str(target / package / "__init__.py") and shape == expected
