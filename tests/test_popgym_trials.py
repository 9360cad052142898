"""Trials: every step against the environment inside, also with gymnax's own and with costly resets; what is kept of a
projection; and MetaStatelessCartPole's numbers, as they were before it was made of Trials and RandomProjection."""

from functools import partial

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import fast_jit, others_slow

from popgym_jax import PreviousActionAndStart, RandomProjection, Trials
from popgym_jax.cartpole import PositionOnlyCartPole
from popgym_jax.meta_cartpole import MetaStatelessCartPole


def played(env, params, steps, copies=4):
    """Keys, actions, observations and states before, and what `step` returned, leaves (T, B, ...), of random play."""

    def one_step(current, key):
        keys = jax.random.split(key, copies)
        action = jax.vmap(env.action_space(params).sample)(keys)
        taken = jax.vmap(env.step, (0, 0, 0, None))(keys, current[1], action, params)
        return taken[:2], (keys, action, current, taken)

    def run(key):
        opening = jax.vmap(env.reset, (0, None))(jax.random.split(key, copies), params)
        return jax.lax.scan(one_step, opening, jax.random.split(key, steps))[1]

    return jax.device_get(fast_jit(run)(jax.random.PRNGKey(0)))


def short(env, steps):
    """Parameters with trials of at most so many steps."""
    params = env.default_params
    return params.replace(trial=params.trial.replace(max_steps_in_episode=steps))


def projected_cartpole():
    env = Trials(RandomProjection(gymnax.make("CartPole-v1")[0], 6), 3)
    return env, short(env, 15)


class CostlyCartPole(PositionOnlyCartPole):
    costly_reset = True


def costly_cartpole():
    env = Trials(CostlyCartPole(15), 2, termination_fails=False)
    return env, env.default_params


def projected_car():  # continuous actions, and bounds that are parameters
    env = Trials(RandomProjection(gymnax.make("MountainCarContinuous-v0")[0]), 2)
    return env, short(env, 4)


@pytest.mark.parametrize("make", others_slow([projected_cartpole, costly_cartpole, projected_car], projected_cartpole))
def test_every_step_is_one_of_the_environment_inside_and_every_trial_one_of_its_episodes(make):
    env, params = make()
    inner, trial_params = env.env, params.trial
    keys, action, (_, before), (_, after, reward, terminated, truncated, info) = played(env, params, 60)

    def inside(key, play, action):
        key_step, key_start = jax.random.split(key)
        obs, play, reward, over, _ = inner.step_env(key_step, play, action, trial_params)
        full_length = inner.is_truncated(play, trial_params)
        if not isinstance(inner, RandomProjection):
            return obs, play, reward, over, full_length, *inner.reset_env(key_start, trial_params)
        seen, state = inner.env.reset_env(key_start, trial_params)  # projected as the trials before
        return obs, play.env_state, reward, over, full_length, play.M_o @ seen, state

    found = jax.device_get(fast_jit(jax.vmap(jax.vmap(inside)))(keys, before.play, action))
    obs, play, paid, over, full_length, first_obs, first_play = found
    ended = over | full_length
    seen = np.where(ended[..., None], first_obs, obs)
    expected = np.concatenate([seen, ended[..., None], paid[..., None]], axis=-1)
    np.testing.assert_allclose(info["final_observation"], expected, atol=1e-5)
    np.testing.assert_allclose(reward, paid, atol=1e-6)
    np.testing.assert_array_equal(info["trial_ended"], ended)
    np.testing.assert_array_equal(info["trial_failed"], over & ~full_length & env.termination_fails)
    assert not truncated.any()
    trial = before.trial + ended
    np.testing.assert_array_equal(terminated, trial == env.num_trials)
    np.testing.assert_array_equal(after.trial, np.where(terminated, 0, trial))

    goes_on = ~terminated
    state = after.play.env_state if isinstance(inner, RandomProjection) else after.play
    for now, old, new in zip(*map(jax.tree.leaves, (state, play, first_play)), strict=True):
        chosen = np.where(ended.reshape(ended.shape + (1,) * (old.ndim - 2)), new, old)
        np.testing.assert_allclose(now[goes_on], chosen[goes_on], atol=1e-5)
    assert (ended & goes_on).sum() > 3 and terminated.sum() > 3
    if make is projected_cartpole:  # both ends of a trial
        assert info["trial_failed"].any() and (full_length & ~over).any()


def test_a_projection_stays_for_the_meta_episode_whatever_is_around_it():
    env = Trials(PreviousActionAndStart(RandomProjection(RandomProjection(PositionOnlyCartPole(3)), 4)), 2)
    _, _, (obs, before), (_, after, *_, terminated, _, _) = played(env, env.default_params, 12)
    for outer in (lambda play: play, lambda play: play.env_state):
        same = (outer(before.play).M_o == outer(after.play).M_o).all(axis=(2, 3))
        np.testing.assert_array_equal(same, ~terminated)
    opens = np.arange(12)[:, None] % 3 == 0  # the start flag inside is that of a trial
    np.testing.assert_array_equal(obs[:, :, 6], np.broadcast_to(opens, obs.shape[:2]))
    assert terminated[5::6].all() and terminated.sum() == 8


ENDS = [8, 18, 27, 37]  # the third one ends a meta-episode
FIRSTS = [
    [0.00570265, 0.01397149, -0.02184161, -0.01583032, 0.0, 0.0],
    [-0.01101811, -0.02713205, 0.00268070, -0.01263744, 1.0, 0.005],
    [-0.00371346, -0.00930963, -0.04652895, -0.05613694, 1.0, 0.005],
    [-0.07229767, 0.01112010, 0.00615738, 0.01996689, 0.0, 0.0],
    [-0.00058626, -0.00857024, -0.02045136, 0.03076734, 1.0, 0.005],
]


def test_metacarts_numbers_are_those_of_before():
    """Pushed to one side, from seed 3: the steps at which trials end, and the first observation of each."""
    env = MetaStatelessCartPole(num_trials=3)
    step = fast_jit(env.step)
    obs, state = fast_jit(env.reset)(jax.random.PRNGKey(3))
    firsts = [obs]
    ends = []
    for t in range(45):
        obs, state, _, _, _, info = step(jax.random.PRNGKey(t), state, jnp.int32(1))
        if info["trial_ended"]:
            ends.append(t)
            firsts.append(obs)
    assert ends == ENDS
    np.testing.assert_allclose(np.stack(firsts), FIRSTS, atol=1e-6)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (partial(Trials, PositionOnlyCartPole(), 0), "num_trials must be at least 1, got 0"),
        (lambda: Trials(gymnax.make("Catch-bsuite")[0]), "Trials needs vector observations, Catch-bsuite has"),
        (lambda: RandomProjection(Trials(PositionOnlyCartPole())), "RandomProjection goes inside of Trials"),
    ],
)
def test_what_cannot_be_built_is_a_value_error(build, message):
    with pytest.raises(ValueError, match=message):
        build()
