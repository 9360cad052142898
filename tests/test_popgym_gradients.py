"""Derivatives of `Environment.step`: those of `step_env` where no episode ends, none to the old state where one does;
the physics against finite differences and against gymnax's own pendulum."""

from typing import Any

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import fast_jit, others_slow

import popgym_jax
from popgym_jax import EpisodeStatistics, PreviousActionAndStart, RandomProjection, environment
from popgym_jax.cartpole import NoisyPositionOnlyCartPole
from popgym_jax.meta_cartpole import MetaStatelessCartPole
from popgym_jax.pendulum import EnvState, NoisyPositionOnlyPendulum, PositionOnlyPendulum

LENGTH = 10
SIZES = (3, environment.CHUNK + 22)  # resets of all that a batch holds, and in chunks where they are costly


class CostlyPendulum(NoisyPositionOnlyPendulum):
    """Resets in chunks."""

    costly_reset = True


def some_inputs(size: int) -> tuple[Any, ...]:
    """Keys, physics, torques and times of so many pendulums, of which every third ends with this step."""
    rng = np.random.default_rng(0)
    physics = rng.uniform(-1, 1, (size, 2)).astype(np.float32)
    torque = rng.uniform(-1.5, 1.5, (size, 1)).astype(np.float32)
    time = np.where(np.arange(size) % 3 == 1, LENGTH - 1, 4).astype(np.int32)
    return jax.random.split(jax.random.key(0), size), physics, torque, time


def outcomes(step: Any, key: Any, physics: Any, torque: Any, time: Any, params: Any) -> dict[str, Any]:
    """Every float that a step returns."""
    obs, state, reward, _, _, info = step(key, EnvState(time=time, physics=physics), torque, params)
    return {"obs": obs, "physics": state.physics, "reward": reward, "last": info["final_observation"]}


def expected_outcomes(env: Any) -> Any:
    """The same by hand: `step_env`, and a constant where the episode ended."""

    def step(key: Any, state: Any, torque: Any, params: Any) -> Any:
        last, after, reward, terminated, _ = env.step_env(key, state, torque, params)
        done = terminated | env.is_truncated(after, params)
        physics = jnp.where(done, jax.lax.stop_gradient(after.physics), after.physics)
        obs = jnp.where(done, jax.lax.stop_gradient(last), last)
        return obs, after.replace(physics=physics), reward, None, None, {"final_observation": last}

    return step


@pytest.mark.parametrize("differentiate", others_slow([jax.jacrev, jax.jacfwd], jax.jacrev))
@pytest.mark.parametrize("size", SIZES)
def test_derivatives_are_those_of_the_step_without_reset_and_none_to_a_fresh_episode(size, differentiate):
    env = CostlyPendulum(0.1, LENGTH)
    params, inputs = env.default_params, some_inputs(size)

    def derivatives(step: Any) -> Any:
        one = differentiate(lambda *x: outcomes(step, *x, params), argnums=(1, 2))
        return jax.device_get(fast_jit(jax.vmap(one))(*inputs))

    found, expected = derivatives(env.step), derivatives(expected_outcomes(env))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), found, expected)
    ends = inputs[3] == LENGTH - 1
    for wrt in range(2):
        assert not found["obs"][wrt][ends].any() and not found["physics"][wrt][ends].any()
        assert (np.abs(found["physics"][wrt][~ends]).max((1, 2)) > 0.01).all()
        assert (np.abs(found["last"][wrt]).max((1, 2)) > 1e-4).all()
        assert (np.abs(found["reward"][wrt]).reshape(size, -1).max(1) > 1e-7).all()


@pytest.mark.parametrize("size", SIZES)
def test_derivative_of_a_batch_is_the_batch_of_derivatives_and_values_do_not_change(size):
    """Differentiation outside of vmap, and that inside of it."""
    env = CostlyPendulum(0.1, LENGTH)
    params, (key, *floats, time) = env.default_params, some_inputs(size)

    def total(key: Any, physics: Any, torque: Any, time: Any) -> Any:
        result = outcomes(env.step, key, physics, torque, time, params)
        return sum(jnp.sum(x, dtype=jnp.float32) for x in jax.tree.leaves(result))

    inside = jax.vmap(jax.value_and_grad(total, argnums=(1, 2)))
    outside = jax.grad(lambda *x: jax.vmap(total)(*x).sum(), argnums=(1, 2))
    values, expected = fast_jit(inside)(key, *floats, time)
    found = fast_jit(outside)(key, *floats, time)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), found, expected)
    np.testing.assert_allclose(values, fast_jit(jax.vmap(total))(key, *floats, time), rtol=1e-5)


def return_of(env: Any, params: Any, physics: Any, torques: Any, keys: Any) -> Any:
    """Sum of the rewards of as many steps as there are torques, from a state at time 0."""

    def step(state: Any, inputs: Any) -> Any:
        _, state, reward, *_ = env.step(inputs[0], state, inputs[1], params)
        return state, reward

    state = EnvState(time=jnp.int32(0), physics=physics)
    return jax.lax.scan(step, state, (keys, torques))[1].sum()


def test_gradient_of_a_return_against_finite_differences():
    """Through a scan that opens a new episode after LENGTH steps, on which the first state has no influence."""
    env, steps = PositionOnlyPendulum(LENGTH), LENGTH + 5
    params, rng = env.default_params, np.random.default_rng(1)
    keys = jax.random.split(jax.random.key(2), steps)
    physics = np.float32([0.4, 0.2])
    torques = rng.uniform(-1.5, 1.5, (steps, 1)).astype(np.float32)
    value = fast_jit(lambda physics, torques: return_of(env, params, physics, torques, keys))
    gradient = fast_jit(jax.grad(lambda physics, torques: return_of(env, params, physics, torques, keys), (0, 1)))
    by_physics, by_torques = gradient(physics, torques)
    for i in range(2):
        shift = np.eye(2, dtype=np.float32)[i] * np.float32(1e-2)
        slope = (value(physics + shift, torques) - value(physics - shift, torques)) / 2e-2
        np.testing.assert_allclose(by_physics[i], slope, rtol=2e-2, atol=2e-3)
    for t in (0, LENGTH - 2, LENGTH - 1, LENGTH, steps - 2):
        shift = np.zeros_like(torques)
        shift[t] = 1e-1
        slope = (value(physics, torques + shift) - value(physics, torques - shift)) / 2e-1
        np.testing.assert_allclose(by_torques[t, 0], slope, rtol=2e-2, atol=2e-4)
    assert np.abs(by_physics).min() > 1e-2 and np.abs(by_torques[0]).min() > 1e-3
    early = jax.grad(lambda physics: return_of(env, params, physics, torques[:LENGTH], keys[:LENGTH]))(physics)
    np.testing.assert_allclose(by_physics, early, rtol=1e-4)  # the second episode adds nothing


def test_physics_have_the_gradients_of_gymnaxs_own_pendulum():
    """One step from the same state: of the next observation, and of the reward, which has another scale here."""
    theirs, their_params = gymnax.make("Pendulum-v1")
    theirs = theirs.with_transition_gradients()
    ours = PositionOnlyPendulum(200).with_transition_gradients()
    _, their_state = theirs.reset(jax.random.key(0), their_params)
    key, half = jax.random.key(1), 16.2736044 / 2

    def of_theirs(physics: Any, torque: Any) -> Any:
        state = their_state.replace(theta=physics[0], theta_dot=physics[1])
        obs, _, reward, *_ = theirs.step(key, state, torque, their_params)
        return obs[:2], reward.reshape(())

    def of_ours(physics: Any, torque: Any) -> Any:
        state = EnvState(time=jnp.int32(0), physics=physics)
        obs, _, reward, *_ = ours.step(key, state, torque, ours.default_params)
        return obs, reward * 200 * half - half

    rng = np.random.default_rng(3)
    inputs = rng.uniform(-3, 3, (50, 2)).astype(np.float32), rng.uniform(-3, 3, (50, 1)).astype(np.float32)
    both = [fast_jit(jax.vmap(jax.jacrev(one, (0, 1))))(*inputs) for one in (of_theirs, of_ours)]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-3), *both)
    assert all(np.abs(x).max() > 1e-3 for x in jax.tree.leaves(both))


def sum_of_floats(tree: Any) -> Any:
    leaves = [jnp.asarray(x) for x in jax.tree.leaves(tree)]
    return sum(x.sum() for x in leaves if x.dtype == jnp.float32)


WITH_FLOATS = {
    "cartpole": lambda: NoisyPositionOnlyCartPole(),
    "bandit": lambda: popgym_jax.make("MultiarmedBanditEasy")[0],
    "trials": lambda: MetaStatelessCartPole(num_trials=2, max_trial_length=3),
    "wrappers": lambda: EpisodeStatistics(PreviousActionAndStart(RandomProjection(PositionOnlyPendulum(5), 3))),
}


@pytest.mark.parametrize("name", WITH_FLOATS)
def test_every_state_with_floats_can_be_differentiated_in_both_modes(name):
    env = WITH_FLOATS[name]()
    params = env.default_params
    _, state = fast_jit(env.reset)(jax.random.key(0))
    leaves, tree = jax.tree.flatten(state)
    floating = [i for i, x in enumerate(leaves) if x.dtype == jnp.float32]
    action = np.full(1, 0.5, np.float32) if name == "wrappers" else np.int32(1)

    def total(floats: Any) -> Any:
        whole = list(leaves)
        for i, x in zip(floating, floats, strict=True):
            whole[i] = x
        return sum_of_floats(env.step(jax.random.key(1), jax.tree.unflatten(tree, whole), action, params))

    floats = [leaves[i] for i in floating]
    reverse, forward = (fast_jit(mode(total))(floats) for mode in (jax.jacrev, jax.jacfwd))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), reverse, forward)
    assert all(np.isfinite(x).all() for x in reverse) and any(np.abs(x).max() > 1e-3 for x in reverse)
