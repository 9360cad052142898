"""popgym_jax under JAX's own switches: the same numbers of the same types in 64-bit mode, no NaN anywhere on the way,
and the same play without jit."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import fast_jit, nearly_over
from gymnax.environments import spaces

import popgym_jax
from popgym_jax import EpisodeStatistics, PreviousActionAndStart, RandomProjection

EASY = tuple(name for name in popgym_jax.registered_envs if name.endswith("Easy")) + popgym_jax.meta_envs
COPIES = 3
ENDS = np.array([[False, True, False], [False, True, True], [True, False, False]])  # by time and copy
STEPS = len(ENDS)


def make(name: str) -> Any:
    """An object of its own, so that no program that was compiled under other switches is found."""
    return popgym_jax.make(name)[0]


def projected(name: str) -> Any:
    """All three wrappers; to 4 features, as a whole projection of 728 would take long.

    A meta-environment has its projection already, inside of its trials.
    """
    env = make(name)
    if name not in popgym_jax.meta_envs:
        env = RandomProjection(env, 4)
    return EpisodeStatistics(PreviousActionAndStart(env))


def play_some(env: Any, reset: Any, step: Any, words: Any, actions: Any, ends: Any) -> Any:
    """A reset, and steps of which some end their episode: everything that comes back, time first.

    words: uint32 (T + 1, ..., 2), of the keys; actions: (T, ...); ends: bool (T, ...)
    """
    params = env.default_params
    keys = jax.random.wrap_key_data(words)

    def scan_step(state: Any, inputs: Any) -> Any:
        key, action, ends = inputs
        rows = lambda x: ends.reshape(*ends.shape, *[1] * (x.ndim - ends.ndim))  # noqa: E731
        state = jax.tree.map(lambda x, y: jnp.where(rows(x), y, x), state, nearly_over(state, params))
        result = step(key, state, action, params)
        return result[1], result

    opening = reset(keys[0], params)
    return opening, jax.lax.scan(scan_step, opening[1], (keys[1:], actions, ends))[1]


def play_many(env: Any, words: Any, actions: Any) -> Any:
    """COPIES environments under vmap."""
    step = jax.vmap(env.step, (0, 0, 0, None))
    return play_some(env, jax.vmap(env.reset, (0, None)), step, words, actions, ENDS)


@functools.cache
def inputs(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Words of the keys, uint32 (STEPS + 1, COPIES, 2), and actions (STEPS, COPIES, ...), int32 or float32."""
    env = make(name)
    space, rng = env.action_space(env.default_params), np.random.default_rng(0)
    words = rng.integers(2**32, size=(STEPS + 1, COPIES, 2), dtype=np.uint32)
    if isinstance(space, spaces.Box):
        return words, rng.uniform(-3, 3, (STEPS, COPIES, *space.shape)).astype(np.float32)
    return words, rng.integers(space.n, size=(STEPS, COPIES), dtype=np.int32)


def wide(actions: np.ndarray) -> np.ndarray:
    """As somebody gives them in 64-bit mode."""
    return actions.astype(np.float64 if actions.dtype == np.float32 else np.int64)


def assert_same(found: Any, expected: Any) -> None:
    """Same types, and same numbers but for the rounding of another compilation."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6)


# ---------------------------------------------------------------- 64-bit mode


@pytest.mark.parametrize("batched", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("name", EASY)
def test_no_wrapper_returns_wide_types_in_64_bit_mode(name, batched):
    """Every environment without wrappers, its numbers too: test_popgym_properties.py."""
    words, actions = inputs(name)
    with jax.enable_x64(True):
        env = projected(name)
        params, reset, step = env.default_params, env.reset, env.step
        if batched:
            reset, step = jax.vmap(reset, (0, None)), jax.vmap(step, (0, 0, 0, None))

        def both(words: Any, actions: Any) -> Any:
            keys = jax.random.wrap_key_data(words)
            opening = reset(keys[0], params)
            return opening, step(keys[1], opening[1], actions[0], params)

        rows = slice(None) if batched else 0
        found = jax.eval_shape(both, words[:, rows], wide(actions)[:, rows])
    types = {leaf.dtype.name for leaf in jax.tree.leaves(found)}
    assert {"float32", "int32", "bool"} <= types <= {"float32", "int32", "bool", "uint32", "int8"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["MetaNoisyStatelessCartPole", "PositionOnlyPendulumEasy"])
def test_numbers_are_the_same_in_64_bit_mode_through_all_wrappers(name):
    words, actions = inputs(name)
    usual = jax.device_get(fast_jit(play_many, projected(name))(words, actions))
    _, (*_, terminated, truncated, info) = usual
    np.testing.assert_array_equal(terminated | truncated, ENDS)
    np.testing.assert_array_equal(info["episodes"], ENDS.cumsum(0))
    with jax.enable_x64(True):
        found = jax.device_get(fast_jit(play_many, projected(name))(words, wide(actions)))
    assert_same(found, usual)


# ---------------------------------------------------------------- no NaN, and no jit


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["MetaNoisyStatelessCartPole", "NoisyPositionOnlyPendulumEasy", "RepeatPreviousEasy", "BattleshipEasy"]
)
def test_no_wrapper_makes_a_nan_on_the_way_and_none_needs_jit(name):
    """Without jit, every intermediate result is looked at. The other environments: test_popgym_properties.py."""
    with jax.debug_nans(True), jax.disable_jit():
        _, (obs, _, reward, terminated, truncated, info) = play_many(projected(name), *inputs(name))
    np.testing.assert_array_equal(terminated | truncated, ENDS | terminated)
    np.testing.assert_array_equal(info["episodes"], (terminated | truncated).cumsum(0))
    assert info["episodes"][-1].sum() >= ENDS.sum()
    assert obs.dtype == reward.dtype == jnp.float32


def test_the_switch_finds_a_nan_that_no_result_shows():
    with jax.disable_jit(), jax.debug_nans(True), pytest.raises(FloatingPointError):
        jax.vmap(lambda x: jnp.where(x > 0, jnp.log(x), 0.0))(np.float32([-1, 1]))
