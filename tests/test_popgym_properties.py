"""What holds for every environment of popgym_jax, whatever the key and the actions: long vmapped runs, the auto-reset
and its rule for vmap, and the random bits."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import fast_jit, others_slow
from gymnax.environments import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import popgym_jax
from popgym_jax import environment, prng
from popgym_jax.registration import FAMILIES, family_and_level
from tests.reference import make_reference

NAMES = popgym_jax.registered_envs
EASY_OR_HARD = [name for name in NAMES if not name.endswith("Medium")]  # Medium: other sizes of the same program
NUM_ENVS = 1000
NUM_STEPS = 1040  # a little more than the longest episode
TRACED = 4  # environments of a long run of which everything is kept
WORDS = st.integers(0, 2**32 - 1)


# ---------------------------------------------------------------- what the documentation promises


class Promise(NamedTuple):
    """rewards: all values that a step may pay, or None: anything up to 1 / length; returns: lowest and highest;
    length: of the longest episode; ends: which of terminated and truncated happen; fixed: no episode is shorter."""

    rewards: tuple[float, ...] | None
    returns: tuple[float, float]
    length: int
    ends: str
    fixed: bool = True


def cards(num_cards: int, steps: int, graded: int, highest: float = 1.0) -> Promise:
    rewards = (1 / graded, -1 / graded, 0.0)
    return Promise(rewards, (-highest, highest), steps, "terminated")


def battleship(size: int) -> Promise:
    water = size**2 - 12
    return Promise((1 / 12, -1 / water), (-(size**2) / water, 1), size**2, "both", False)


def concentration(num_cards: int, length: int) -> Promise:
    rewards = (0.0, 2 / num_cards, -1 / length, -2 / length)
    return Promise(rewards, (-1, 1), length, "both", False)


def minesweeper(clear: int) -> Promise:
    rewards = (1 / clear, -0.5 - 1 / clear, -0.5 / (clear - 2))
    return Promise(rewards, (-1, 1), clear, "either", False)


def cartpole(length: int) -> Promise:
    return Promise((1 / length,), (1 / length, 1), length, "both", False)


PROMISES: dict[str, tuple[Promise, ...]] = {
    "Autoencode": tuple(cards(n, 2 * n - 1, n) for n in (52, 104, 156)),
    "Battleship": tuple(map(battleship, (8, 10, 12))),
    "Concentration": (concentration(52, 104), concentration(104, 208), concentration(52, 104)),
    "CountRecall": tuple(cards(n, n - 1, n - 1) for n in (52, 104, 208)),
    "HigherLower": tuple(cards(n, n - 1, n, (n - 1) / n) for n in (52, 104, 156)),
    "LabyrinthEscape": tuple(
        Promise((-1 / 1024, 1 - 1 / 1024), (-1023 / 1024, 1 - shortest / 1024), 1023, "both", False)
        for shortest in (10, 14, 18)
    ),
    "LabyrinthExplore": tuple(
        Promise((-1 / 1024, 1 / squares), (-1023 / 1024, 1), 1023, "both", False) for squares in (49, 97, 161)
    ),
    "MineSweeper": tuple(map(minesweeper, (14, 30, 54))),
    "MultiarmedBandit": tuple(
        Promise((1 / length, -1 / length), (-1, 1), length, "truncated") for length in (200, 400, 600)
    ),
    "PositionOnlyCartPole": tuple(map(cartpole, (200, 400, 600))),
    "NoisyPositionOnlyCartPole": (cartpole(200),) * 3,
    "VelocityOnlyCartPole": tuple(map(cartpole, (200, 400, 600))),
    "PositionOnlyPendulum": tuple(Promise(None, (-1, 1), length, "truncated") for length in (200, 150, 100)),
    "NoisyPositionOnlyPendulum": (Promise(None, (-1, 1), 200, "truncated"),) * 3,
    "RepeatFirst": tuple(cards(n, n - 1, n - 1) for n in (52, 416, 832)),
    "RepeatPrevious": tuple(cards(n, n - 1, n - k) for n, k in ((52, 4), (104, 32), (156, 64))),
}


def promise(name: str) -> Promise:
    family, level = family_and_level(name)
    return PROMISES[family][level]


@functools.cache
def observation_parts(name: str) -> tuple[int, ...]:
    """Sizes of the one-hot parts of an observation; none for physics."""
    space = make_reference(name).observation_space
    if isinstance(space, gymnasium.spaces.Tuple):
        return tuple(int(part.n) for part in space)
    if isinstance(space, gymnasium.spaces.MultiDiscrete):
        return tuple(map(int, space.nvec))
    return (int(space.n),) if isinstance(space, gymnasium.spaces.Discrete) else ()


def in_space(name: str, space: spaces.Box, obs: Any) -> Any:
    """Inside the bounds, which NaN is not, or one-hot in each of its discrete parts; bool () for obs (O,)."""
    parts = observation_parts(name)
    if not parts:
        return jnp.all((obs >= space.low) & (obs <= space.high))
    if len(set(parts)) == 1:  # one reshape instead of up to 104 slices
        sums = obs.reshape(len(parts), -1).sum(1)
    else:
        sums = jnp.stack([part.sum() for part in jnp.split(obs, np.cumsum(parts[:-1]))])
    return jnp.all((obs == 0) | (obs == 1)) & jnp.all(sums == 1)


def is_paid(expected: Promise, reward: Any) -> Any:
    """The reward is one of those that are promised, bool ()."""
    if expected.rewards is None:
        return jnp.abs(reward) <= 1 / expected.length + 1e-6
    return jnp.any(jnp.abs(reward - jnp.array(expected.rewards)) < 1e-6)


# ---------------------------------------------------------------- 1000 steps of 1000 environments


class Transition(NamedTuple):
    """One step of `env.step`, time first and then the TRACED environments."""

    key: Any  # raw words
    action: Any
    before: Any  # state
    obs: Any
    state: Any
    reward: Any
    terminated: Any
    truncated: Any
    info: Any


class LongRun(NamedTuple):
    """checks: whether each held in all environments, bool (NUM_STEPS,); episodes: how many ended, int32 (NUM_ENVS,);
    first_obs (TRACED, O); trace: leaves (NUM_STEPS, TRACED, ...)."""

    checks: dict[str, np.ndarray]
    episodes: np.ndarray
    first_obs: np.ndarray
    trace: Transition


def random_actions(space: Any, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Torques beyond their bounds of +-2 as well."""
    if isinstance(space, spaces.Box):
        return rng.uniform(-3, 3, (*shape, 1)).astype(np.float32)
    return rng.integers(space.n, size=shape, dtype=np.int32)


@functools.cache
def long_run(name: str) -> LongRun:
    """Random play with auto-reset: one program, reduced inside to what can be kept."""
    env, params = popgym_jax.make(name)
    expected, space = promise(name), env.observation_space(params)
    lowest, highest = expected.returns

    def step(state, key, action):
        obs, after, reward, terminated, truncated, info = env.step(jax.random.wrap_key_data(key), state, action, params)
        done, length, last = terminated | truncated, state.time + 1, info["final_observation"]
        checks = {
            "last observation in space": in_space(name, space, last),
            "reward as promised": is_paid(expected, reward),
            "time counts, and starts again when done": after.time == jnp.where(done, 0, length),
            "ends in time": (length <= expected.length) & (done | (length < expected.length)),
            "ends as promised": ~(done & expected.fixed) | (length == expected.length),
            "not terminated": (expected.ends != "truncated") | ~terminated,
            "not truncated": (expected.ends != "terminated") | ~truncated,
            "not both": (expected.ends != "either") | ~(terminated & truncated),
            "info repeats": (info["terminated"] == terminated) & (info["truncated"] == truncated),
            "observation is the last one unless done": done | (jnp.abs(obs - last).max() < 1e-5),
        }
        return checks, Transition(key, action, state, obs, after, reward, terminated, truncated, info)

    def scan_step(carry, inputs):
        state, returns, episodes = carry
        checks, transition = jax.vmap(step)(state, *inputs)
        done = transition.terminated | transition.truncated
        returns = returns + transition.reward
        checks["first observation in space"] = ~done | jax.lax.cond(
            done.any(), jax.vmap(lambda obs: in_space(name, space, obs)), lambda obs: done, transition.obs
        )
        checks["return in range"] = ~done | ((returns > lowest - 1e-4) & (returns < highest + 1e-4))
        carry = (transition.state, jnp.where(done, 0.0, returns), episodes + done)
        return carry, (jax.tree.map(jnp.all, checks), jax.tree.map(lambda x: x[:TRACED], transition))

    def run(keys, actions):
        obs, state = jax.vmap(env.reset, (0, None))(jax.random.wrap_key_data(keys[0]), params)
        carry = (state, jnp.zeros(NUM_ENVS), jnp.zeros(NUM_ENVS, jnp.int32))
        (_, _, episodes), (checks, trace) = jax.lax.scan(scan_step, carry, (keys[1:], actions))
        return LongRun(checks, episodes, obs[:TRACED], trace)

    run = jax.jit(run) if space.shape[0] > 100 else fast_jit(run)  # whichever takes longer: to run, or to compile
    rng = np.random.default_rng(1)
    keys = rng.integers(2**32, size=(NUM_STEPS + 1, NUM_ENVS, 2), dtype=np.uint32)
    actions = random_actions(env.action_space(params), (NUM_STEPS, NUM_ENVS), rng)
    return jax.tree.map(np.asarray, run(keys, actions))


def test_every_family_has_a_promise():
    assert set(PROMISES) == set(FAMILIES)


@pytest.mark.parametrize("name", NAMES)
def test_thousand_environments_keep_their_promises_for_thousand_steps(name):
    run = long_run(name)
    broken = {check: np.flatnonzero(~held) for check, held in run.checks.items() if not held.all()}
    assert not broken
    assert not any(np.isnan(x).any() for x in jax.tree.leaves(run.trace))
    longest = promise(name).length
    assert popgym_jax.make(name)[1].max_steps_in_episode == longest
    assert (run.episodes >= NUM_STEPS // longest).all()


@pytest.mark.parametrize("name", NAMES)
def test_types_of_a_step_are_those_of_the_reset(name):
    env, params = popgym_jax.make(name)
    key, action = jax.random.key(0), env.action_space(params).sample(jax.random.key(1))
    obs, state = jax.eval_shape(env.reset, key, params)
    assert obs.dtype == jnp.float32 and obs.shape == env.observation_space(params).shape
    stepped = jax.eval_shape(env.step, key, state, action, params)
    kind = lambda x: (x.shape, x.dtype, x.weak_type)  # noqa: E731
    assert jax.tree.map(kind, (obs, state)) == jax.tree.map(kind, stepped[:2])
    assert not any(x.weak_type for x in jax.tree.leaves((obs, state)))
    assert [kind(x)[:2] for x in stepped[2:5]] == [((), jnp.float32), ((), jnp.bool_), ((), jnp.bool_)]
    assert set(stepped[5]) == {"terminated", "truncated", "final_observation"}


DECKS = ("Autoencode", "CountRecall", "HigherLower", "RepeatFirst", "RepeatPrevious")


@pytest.mark.parametrize("name", [name for name in NAMES if family_and_level(name)[0] in DECKS])
def test_every_episode_deals_exactly_the_cards_of_its_decks(name):
    run, steps = long_run(name), promise(name).length
    family = family_and_level(name)[0]
    last = run.trace.info["final_observation"]
    for episode in range(NUM_STEPS // steps):  # all of them have the same length
        first = run.trace.obs[episode * steps - 1] if episode else run.first_obs
        shown = np.concatenate([first[None], last[episode * steps : (episode + 1) * steps]])
        if family == "Autoencode":
            shown = shown[: (steps + 1) // 2, :, 2:]
        counts = shown.sum(axis=0)  # (TRACED, kinds), of CountRecall's two decks side by side
        decks = 2 if family == "CountRecall" else 1
        assert (counts == decks * len(shown) / counts.shape[1]).all()


# ---------------------------------------------------------------- single steps


class Single(NamedTuple):
    """One step without vmap, next to what it is made of."""

    step: Any  # obs, state, reward, terminated, truncated, info
    step_env: Any  # obs, state, reward, terminated, info
    truncated: Any
    fresh: Any  # obs, state of the episode that opens if this one ends


@functools.cache
def single(name: str) -> tuple[Callable[..., Single], Any]:
    """A jitted step from (raw key, state, action), and a state to begin with."""
    env, params = popgym_jax.make(name)

    @fast_jit
    def one(key, state, action):
        key = jax.random.wrap_key_data(key)
        parts = env.step_env(key, state, action, params)
        fresh = env.reset_env(prng.reset_key(key), params)
        return Single(env.step(key, state, action, params), parts, env.is_truncated(parts[1], params), fresh)

    return one, jax.tree.map(lambda x: x[0, 0], long_run(name).trace.before)


def assert_close(actual: Any, expected: Any, exact: bool) -> None:
    """Same leaves; physics may differ by the rounding of another compilation."""

    def compare(a, b):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype
        if exact or a.dtype != np.float32:
            np.testing.assert_array_equal(a, b)
        else:
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)

    jax.tree.map(compare, actual, expected)


def is_exact(name: str) -> bool:
    return bool(observation_parts(name))


def consistent(one: Single, exact: bool) -> None:
    """`step` is `step_env`, followed by a reset with the key's own reset key where the episode ended."""
    obs, state, reward, terminated, truncated, info = one.step
    last_obs, last_state, step_reward, step_terminated, step_info = one.step_env
    assert step_info == {}
    assert terminated == step_terminated == info["terminated"]
    assert truncated == one.truncated == info["truncated"]
    assert_close((reward, info["final_observation"]), (step_reward, last_obs), exact)
    done = bool(terminated) or bool(truncated)
    assert_close((obs, state), one.fresh if done else (last_obs, last_state), exact)


def moments(trace: Transition, each: int) -> list[tuple[int, int]]:
    """(time, environment) of some steps that end an episode and of some that do not."""
    done = trace.terminated | trace.truncated
    chosen = [np.argwhere(mask) for mask in (done, ~done)]
    return [tuple(rows[i]) for rows in chosen for i in np.linspace(0, len(rows) - 1, min(each, len(rows)), dtype=int)]


@pytest.mark.parametrize("name", EASY_OR_HARD)
def test_vmapped_step_is_the_single_step_which_resets_itself_with_its_own_key(name):
    one, _ = single(name)
    trace = long_run(name).trace
    for t, i in moments(trace, 10):
        now = jax.tree.map(lambda x, t=t, i=i: x[t, i], trace)
        result = jax.tree.map(np.asarray, one(now.key, now.before, now.action))
        consistent(result, is_exact(name))
        assert_close(result.step, tuple(now[3:]), is_exact(name))


def actions_of(name: str) -> st.SearchStrategy[Any]:
    env, params = popgym_jax.make(name)
    space = env.action_space(params)
    if isinstance(space, spaces.Box):
        torque = st.floats(-3, 3, width=32).map(lambda x: np.array([x], np.float32))
        return st.lists(torque, min_size=1, max_size=20)
    return st.lists(st.integers(0, space.n - 1).map(np.int32), min_size=1, max_size=20)


@pytest.mark.parametrize("name", EASY_OR_HARD)
def test_same_key_and_actions_are_the_same_episode(name):
    one, some_state = single(name)
    env, params = popgym_jax.make(name)
    expected, space = promise(name), env.observation_space(params)
    low, high = np.asarray(space.low), np.asarray(space.high)

    def play(seed: int, actions: list) -> list[Single]:
        keys = np.random.default_rng(seed).integers(2**32, size=(len(actions) + 1, 2), dtype=np.uint32)
        state = one(keys[0], some_state, actions[0]).fresh[1]
        episode = []
        for key, action in zip(keys[1:], actions, strict=True):
            episode.append(jax.tree.map(np.asarray, one(key, state, action)))
            state = episode[-1].step[1]
        return episode

    @settings(max_examples=5, deadline=None, derandomize=True, database=None)
    @given(WORDS, actions_of(name))
    def check(seed, actions):
        episode = play(seed, actions)
        assert_close(play(seed, actions), episode, exact=True)
        for result in episode:
            consistent(result, is_exact(name))
            obs, _, reward, *_ = result.step
            assert ((low <= obs) & (obs <= high)).all()
            assert is_paid(expected, reward)

    check()


def mazes_are_slow(family: str) -> Any:
    """Without jit, drawing a maze takes thousands of operations."""
    return pytest.param(f"{family}Easy", marks=[pytest.mark.slow] if family.startswith("Labyrinth") else [])


@pytest.mark.parametrize("name", list(map(mazes_are_slow, FAMILIES)))
def test_step_without_jit_is_the_step_with_jit(name):
    env, params = popgym_jax.make(name)
    trace = long_run(name).trace
    for t, i in moments(trace, 1):
        now = jax.tree.map(lambda x, t=t, i=i: jnp.asarray(x[t, i]), trace)
        with jax.disable_jit(), jax.debug_nans(True):
            result = env.step(jax.random.wrap_key_data(now.key), now.before, now.action, params)
        assert_close(result, tuple(now[3:]), is_exact(name))


@pytest.mark.parametrize("name", EASY_OR_HARD)
def test_step_and_reset_are_the_same_in_64_bit_mode(name):
    """Types of everything else: test_popgym_flags.py."""
    trace = long_run(name).trace
    times, copies = np.transpose(moments(trace, 4))
    now = jax.tree.map(lambda x: x[times, copies], trace)
    assert (now.terminated | now.truncated).any() and not (now.terminated | now.truncated).all()
    actions = now.action.astype(np.float64 if now.action.dtype == np.float32 else np.int64)
    with jax.enable_x64(True):
        env, params = popgym_jax.make(name)
        step = fast_jit(jax.vmap(env.step, (0, 0, 0, None)))
        result = jax.device_get(step(jax.random.wrap_key_data(now.key), now.before, actions, params))
    assert_close(result, tuple(now[3:]), is_exact(name))


# ---------------------------------------------------------------- the rule for vmap


class Toy(environment.Environment):
    """Ends on action 1, and after max_steps_in_episode; shows from which key and parameters it began."""

    def __init__(self, costly_reset: bool):
        super().__init__()
        self.costly_reset = costly_reset

    def reset_env(self, key, params):
        drawn = prng.bits(key, 2).astype(jnp.float32)
        return drawn + params.max_steps_in_episode, environment.EnvState(time=jnp.zeros((), jnp.int32))

    def step_env(self, key, state, action, params):
        obs = -prng.bits(key, 2).astype(jnp.float32)
        return obs, state.replace(time=state.time + 1), jnp.float32(1), action == 1, {}

    @property
    def default_params(self):
        return environment.EnvParams(max_steps_in_episode=9)


def batch_of_keys(shape: tuple[int, ...], rng: np.random.Generator) -> jax.Array:
    return jax.random.wrap_key_data(rng.integers(2**32, size=(*shape, 2), dtype=np.uint32))


def step_of(env: Any) -> Callable[..., Any]:
    return lambda key, time, action, cap: env.step(
        key, environment.EnvState(time=time), action, environment.EnvParams(max_steps_in_episode=cap)
    )


@functools.cache
def vmapped_and_looped(costly: bool, shape: tuple[int, ...], axes: tuple[int | None, ...]) -> tuple[Callable, Callable]:
    """The same steps under vmap (nested as deep as the shape) and one by one; axes: None for inputs that all share."""
    step = step_of(Toy(costly))
    vmapped = step
    for _ in shape:
        vmapped = jax.vmap(vmapped, axes)

    def looped(*inputs):
        size = int(np.prod(shape))
        rows = [x if axis is None else x.reshape(size) for x, axis in zip(inputs, axes, strict=True)]
        pick = lambda i: step(*(x if axis is None else x[i] for x, axis in zip(rows, axes, strict=True)))  # noqa: E731
        return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), jax.lax.map(pick, jnp.arange(size)))

    return fast_jit(vmapped), fast_jit(looped)


ALL = (0, 0, 0, 0)
MORE_THAN_A_CHUNK = 2 * environment.CHUNK + 44
CASES = {
    "few": ((5,), ALL),
    "one chunk": ((environment.CHUNK,), ALL),
    "more than a chunk": ((MORE_THAN_A_CHUNK,), ALL),
    "shared params": ((MORE_THAN_A_CHUNK,), (0, 0, 0, None)),
    "shared key and state": ((MORE_THAN_A_CHUNK,), (None, None, 0, None)),
    "only params differ": ((MORE_THAN_A_CHUNK,), (None, None, None, 0)),
    "seeds x environments": ((3, environment.CHUNK + 22), (0, 0, 0, None)),
    "seeds x environments with params": ((3, environment.CHUNK + 22), ALL),
}


def ending(pattern: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Which of a batch end."""
    size = int(np.prod(shape))
    ends = np.zeros(size, bool)
    if pattern == "exactly one":
        ends[rng.integers(size)] = True
    elif pattern == "some":
        ends = rng.random(size) < rng.random()
    return ends.reshape(shape) | (pattern == "all")


@pytest.mark.parametrize("costly", [False, True], ids=["cheap", "costly"])
@pytest.mark.parametrize("case", others_slow(CASES, "few", "more than a chunk", "seeds x environments"))
def test_auto_reset_under_vmap_is_a_loop_over_environments(case, costly):
    shape, axes = CASES[case]
    vmapped, looped = vmapped_and_looped(costly, shape, axes)

    @settings(max_examples=12, deadline=None, derandomize=True, database=None)
    @given(WORDS, st.sampled_from(["all", "none", "exactly one", "some"]))
    def check(seed, pattern):
        rng = np.random.default_rng(seed)
        ends = ending(pattern, shape, rng)
        by_time = ends & (rng.random(shape) < 0.5)
        cap = rng.integers(3, 9, shape)
        if axes[3] is None:
            cap = np.full(shape, cap.flat[0])
        time = np.where(by_time, cap - 1, rng.integers(0, cap - 1, shape)).astype(np.int32)
        action = np.where(ends & ~by_time, 1, 0)
        rows = [batch_of_keys(shape, rng), time, action, cap]
        inputs = [x if axis == 0 else x[(0,) * len(shape)] for x, axis in zip(rows, axes, strict=True)]
        results = [jax.tree.map(np.asarray, run(*inputs)) for run in (vmapped, looped)]
        assert_close(*results, exact=True)
        if axes == ALL:
            obs, state, _, terminated, truncated, info = results[0]
            np.testing.assert_array_equal(terminated | truncated, ends)
            np.testing.assert_array_equal(state.time, np.where(ends, 0, time + 1))
            np.testing.assert_array_equal((obs != info["final_observation"]).any(-1), ends)

    check()


def test_params_may_be_batched_in_part():
    env, params = popgym_jax.make("NoisyPositionOnlyCartPoleEasy")
    keys, states = batch_of_keys((6,), np.random.default_rng(2)), params.replace(max_steps_in_episode=1)
    sigmas = jnp.linspace(0, 0.5, 6)
    in_part = states.replace(noise_sigma=sigmas)
    axes = type(params)(max_steps_in_episode=None, force=None, half_length=None, noise_sigma=0)
    _, state = env.reset(jax.random.key(0), params)
    obs, _, _, _, truncated, _ = jax.vmap(env.step, (0, None, None, axes))(keys, state, 1, in_part)
    assert truncated.all()  # so these are observations of a reset
    for i in range(6):
        expected = env.step(keys[i], state, 1, in_part.replace(noise_sigma=sigmas[i]))[0]
        np.testing.assert_allclose(obs[i], expected, atol=1e-6)


@pytest.mark.parametrize("name", ["RepeatPreviousEasy", "BattleshipEasy"])
def test_seeds_times_environments(name):
    env, params = popgym_jax.make(name)
    trace = long_run(name).trace
    ends = np.flatnonzero((trace.terminated | trace.truncated).any(axis=1))[:1]
    times = np.concatenate([ends, np.arange(140)])  # (141,) steps, one of which ends an episode in some environments
    rows = jax.tree.map(lambda x: x[times].swapaxes(0, 1), trace)  # TRACED seeds x 141 environments
    step = jax.vmap(jax.vmap(env.step, (0, 0, 0, None)), (0, 0, 0, None))
    result = fast_jit(step)(jax.random.wrap_key_data(rows.key), rows.before, rows.action, params)
    assert_close(jax.tree.map(np.asarray, result), tuple(rows[3:]), exact=True)


# ---------------------------------------------------------------- random bits


def key_of(kind: str, words: tuple[int, int]) -> jax.Array:
    """A key with these words: typed, raw, or of the generator rbg, whose keys hold them twice."""
    data = np.array(words, np.uint32)
    if kind == "raw":
        return jnp.asarray(data)
    return jax.random.wrap_key_data(np.tile(data, 2) if kind == "rbg" else data, impl=kind)


@pytest.mark.parametrize("kind", ["threefry2x32", "raw", "rbg"])
def test_blocks_are_the_keys_that_jax_splits_off(kind):
    words = lambda key: np.asarray(jax.random.key_data(key))  # noqa: E731
    ours, theirs = fast_jit(lambda key: prng.split(key, 9)), fast_jit(lambda key: jax.random.split(key, 9))
    fold_in = fast_jit(jax.vmap(jax.random.fold_in, (None, 0)))
    blocks = fast_jit(lambda key: jnp.stack(prng.blocks(key, 9), axis=1))

    @settings(max_examples=25, deadline=None, derandomize=True, database=None)
    @given(st.tuples(WORDS, WORDS))
    def check(pair):
        key = key_of(kind, pair)
        split = ours(key)
        assert split.dtype == theirs(key).dtype
        np.testing.assert_array_equal(words(split), words(theirs(key)))
        np.testing.assert_array_equal(words(split), words(fold_in(key, jnp.arange(9))))
        np.testing.assert_array_equal(blocks(key), words(split)[:, :2])

    check()


def test_bits_are_the_words_of_the_blocks():
    key = jax.random.key(3)
    x, y = prng.blocks(key, 4)
    np.testing.assert_array_equal(prng.bits(key, 8), np.concatenate([x, y]))
    np.testing.assert_array_equal(prng.bits(key, 7), np.concatenate([x, y])[:7])
    assert len(np.unique(prng.bits(key, 10_000))) > 9990


def test_reset_key_is_no_key_or_word_that_a_step_draws():
    def pairs(data):
        return set(map(tuple, np.asarray(data).tolist()))

    keys = jax.random.split(jax.random.key(4), 500)
    resets = fast_jit(jax.vmap(prng.reset_key))(keys)
    drawn = fast_jit(jax.vmap(lambda key: jnp.stack(prng.blocks(key, 300), axis=-1)))(keys)
    assert resets.dtype == keys.dtype
    fresh = pairs(jax.random.key_data(resets))
    assert len(fresh) == 500
    assert not fresh & pairs(drawn.reshape(-1, 2)) and not fresh & pairs(jax.random.key_data(keys))


@pytest.mark.parametrize("kind", ["raw", "rbg"])
def test_environments_take_keys_of_other_kinds(kind):
    env, params = popgym_jax.make("RepeatPreviousEasy")
    env_step = fast_jit(lambda key: env.step(key, env.reset(key, params)[1], 0, params))
    usual = env_step(key_of("threefry2x32", (5, 6)))
    jax.tree.map(np.testing.assert_array_equal, env_step(key_of(kind, (5, 6))), usual)


@functools.cache
def random_words() -> np.ndarray:
    return np.asarray(prng.bits(jax.random.key(7), 200_000))


def chi_square(values: np.ndarray, kinds: int) -> float:
    return stats.chisquare(np.bincount(values, minlength=kinds)).pvalue


@pytest.mark.parametrize("bound", [2, 3, 13, 52, 144, 1000])
def test_integers_are_uniform(bound):
    assert chi_square(np.asarray(prng.integer(random_words(), bound)), bound) > 1e-3


def test_uniform_and_normal_follow_their_laws():
    uniform, normal = prng.uniform(random_words(), -2.0, 3.0), prng.normal(random_words())
    assert uniform.dtype == normal.dtype == jnp.float32
    assert stats.kstest(uniform, stats.uniform(-2, 5).cdf).pvalue > 1e-3
    assert stats.kstest(normal, stats.norm.cdf).pvalue > 1e-3


def test_the_laws_see_a_bias_of_two_percent():
    words = random_words()
    rng = np.random.default_rng(8)
    integers = np.asarray(prng.integer(words, 13))
    biased = np.where((rng.random(len(words)) < 0.02) & (integers == 12), 0, integers)
    assert chi_square(np.where(rng.random(len(words)) < 0.01, 0, integers), 13) < 1e-3
    assert chi_square(np.where(rng.random(len(words)) < 0.2, biased, integers), 13) > 1e-3  # 0.03 % is not seen
    assert stats.kstest(prng.uniform(words, 0.0, 0.98), stats.uniform.cdf).pvalue < 1e-3
    assert stats.kstest(1.02 * prng.normal(words), stats.norm.cdf).pvalue < 1e-3


def test_neighbouring_keys_and_neighbouring_words_are_independent():
    words = np.asarray(fast_jit(jax.vmap(lambda key: prng.bits(key, 8)))(jax.random.split(jax.random.key(9), 20_000)))
    unit = np.asarray(prng.uniform(words))
    correlation = np.corrcoef(np.concatenate([unit, np.roll(unit, 1, axis=0)], axis=1).T) - np.eye(16)
    assert np.abs(correlation).max() < 5 / np.sqrt(len(words))


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.one_of(WORDS, st.integers(2**32 - 9, 2**32 - 1), st.integers(0, 9)), st.integers(1, 65536))
def test_integer_is_the_floor_of_the_exact_product(word, bound):
    assert int(prng.integer(np.uint32(word), bound)) == word * bound >> 32


def test_integer_never_reaches_its_bound():
    bounds = np.arange(1, 65537)
    np.testing.assert_array_equal(prng.integer(np.uint32(2**32 - 1), bounds), bounds - 1)
    np.testing.assert_array_equal(prng.integer(np.uint32(0), bounds), 0)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(
    st.one_of(WORDS, st.just(2**32 - 1), st.just(0)),
    st.floats(-1e3, 1e3, width=32),
    st.floats(2**-10, 1e3, width=32),
)
def test_uniform_and_normal_never_leave_their_range(word, low, width):
    high = np.float32(low) + np.float32(width)
    assert low <= float(prng.uniform(np.uint32(word), low, high)) <= high
    assert 0 <= float(prng.uniform(np.uint32(word))) < 1
    assert abs(float(prng.normal(np.uint32(word)))) < 5.5
