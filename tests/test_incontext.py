"""What PPO adds for learning in context: the discount of a failed trial, an observation's change, the multiplicative
readout, and the identification loss."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import Net, fast_jit, others_slow, random_sequence, tiny_args

import popgym_jax
import ppo_s5_popgym as ppo
from popgym_jax.meta_cartpole import MetaStatelessCartPole

ADDED = {"obs_change": 10.0, "readout": "multiplicative", "aux_coef": 1.0, "trial_discount": 0.5}


def meta_setup(**flags):
    """Trials of at most 12 steps, of which some fail and some do not."""
    flags = {"env": "MetaStatelessCartPole", "num_envs": 16, "num_steps": 60} | ADDED | flags
    setup = ppo.make_setup(tiny_args(**flags))
    env = MetaStatelessCartPole(num_trials=3, max_trial_length=12)
    return setup._replace(env=env, env_params=env.default_params)


@pytest.fixture(scope="module")
def meta():
    setup = meta_setup()
    runner = fast_jit(ppo.init_runner, setup)(jax.random.PRNGKey(0))
    later, rollout, last_value = fast_jit(ppo.collect_rollout, setup)(runner)
    return SimpleNamespace(setup=setup, runner=runner, later=later, rollout=rollout, last_value=last_value)


# ---- trials ----------------------------------------------------------------------------------------------------------


def test_a_trial_fails_by_a_fall_and_not_by_its_full_length(meta):
    """The lengths of trials, counted from the flag that the agent sees."""
    rollout = jax.tree.map(np.asarray, meta.rollout)
    flag = rollout.obs[1:, :, 4] > 0  # the trial of step t has ended
    flag |= rollout.start[1:] > 0
    failed = rollout.trial_failed[:-1]
    length = np.zeros(failed.shape[1], int)
    ends = {True: 0, False: 0}
    for t in range(len(failed)):
        length += 1
        for b in np.flatnonzero(flag[t]):
            assert failed[t, b] == (length[b] < 12)
            ends[bool(failed[t, b])] += 1
        assert not failed[t][~flag[t]].any()
        length[flag[t]] = 0
    assert min(ends.values()) > 5


@pytest.mark.parametrize("trial_discount", [0.0, 0.5, 1.0])
def test_advantages_with_discounted_trials_are_those_of_a_plain_loop(meta, trial_discount):
    args = meta_setup(trial_discount=trial_discount, gamma=0.95, gae_lambda=0.8).args
    rollout = jax.tree.map(np.asarray, meta.rollout)
    advantages, returns = ppo.compute_gae(args, rollout, rollout.reward, meta.last_value)
    T, B = rollout.reward.shape
    expected = np.zeros((T, B))
    for b in range(B):
        advantage, next_value = 0.0, float(meta.last_value[b])
        for t in reversed(range(T)):
            c = trial_discount if rollout.trial_failed[t, b] else 1.0
            ended = rollout.terminated[t, b]
            following = 0.0 if ended else c * next_value
            delta = rollout.reward[t, b] + 0.95 * following - rollout.value[t, b]
            advantage = delta if ended else delta + 0.95 * 0.8 * c * advantage
            expected[t, b] = advantage
            next_value = rollout.value[t, b]
    np.testing.assert_allclose(advantages, expected, atol=1e-5)
    np.testing.assert_allclose(returns, expected + rollout.value, atol=1e-5)


# ---- what the agent sees ---------------------------------------------------------------------------------------------


def test_the_change_is_that_since_the_step_before_and_zero_where_a_trial_begins(meta):
    rollout = jax.tree.map(np.asarray, meta.rollout)
    seen, change = rollout.obs[..., :6], rollout.obs[..., 6:10]
    begins = (rollout.start > 0) | (seen[..., 4] > 0)
    assert begins[1:].sum() > 10 and not change[begins].any()
    within = ~begins[1:]
    difference = 10.0 * (seen[1:] - seen[:-1])[..., :4]  # not of the flag and the reward
    np.testing.assert_allclose(change[1:][within], difference[within], atol=1e-5)
    assert np.abs(change[1:][within]).max(axis=0).min() > 0.01


def test_the_end_of_an_episode_cut_off_by_time_is_valued_with_its_own_change():
    """The observation after the last step beside its change since the last one, not since the next episode's first."""
    flags = {"env": "PositionOnlyCartPoleEasy", "obs_change": 10.0, "num_envs": 8, "num_steps": 8}
    setup = ppo.make_setup(tiny_args(**flags))
    setup = setup._replace(env_params=setup.env_params.replace(max_steps_in_episode=5))
    obs, state = fast_jit(lambda key: ppo.reset_envs(setup, key, 8))(jax.random.PRNGKey(0))
    step = fast_jit(ppo.step_envs, setup)
    for t in range(5):
        after = step(jax.random.PRNGKey(t), state, obs, jnp.zeros(8, jnp.int32))
        np.testing.assert_allclose(after.final_obs[:, 2:], 10 * (after.final_obs[:, :2] - obs[:, :2]), atol=1e-5)
        obs, state = after.next_obs, after.state
    assert after.truncated.all() and not np.asarray(obs[:, 2:]).any()


# ---- readout ---------------------------------------------------------------------------------------------------------

MEMORIES = ("s5", "s5-noreset", "gru", "attention", "mlp")


@pytest.mark.parametrize("arch", others_slow(MEMORIES, "s5"))
def test_scan_and_step_are_equal_with_the_multiplicative_readout(arch):
    net = Net(arch, readout="multiplicative", readout_size=3)
    obs, start = random_sequence(1, 12, 2, net.features)
    carry, kernels = net.initial_carry(2), net._kernels(net.params)
    _, policy, value = net.scan(net.params, carry, obs, start)
    for t in range(12):
        carry, one, one_value = net._step(net.params, kernels, carry, obs[t], start[t])
        np.testing.assert_allclose(one.mean, policy.mean[t], atol=1e-5)
        np.testing.assert_allclose(one_value, value[t], atol=1e-5)


def test_the_readout_is_a_product_of_what_is_remembered_with_what_is_seen():
    net = Net("s5", readout="multiplicative", readout_size=3)
    h = jax.random.normal(jax.random.PRNGKey(0), (7, net.args.s5_width), jnp.float32)
    f = jax.random.normal(jax.random.PRNGKey(1), (7, net.features), jnp.float32)
    found = fast_jit(partial(net.module.apply, method="multiply"))(net.params, h, f)
    layer = net.params["params"]["products"]
    W = (h @ layer["kernel"] + layer["bias"]).reshape(7, 3, net.features)
    np.testing.assert_allclose(found[:, : h.shape[1]], h)
    np.testing.assert_allclose(found[:, h.shape[1] :], np.einsum("nmf,nf->nm", W, f), atol=1e-5)


# ---- identification --------------------------------------------------------------------------------------------------


def test_what_is_to_be_identified_is_the_same_for_worlds_that_look_the_same():
    """Mirrored projection, swapped actions, mirrored state: the same observations for ever, the same target."""
    env, params = popgym_jax.make("MetaStatelessCartPole")
    _, state = env.reset_env(jax.random.PRNGKey(3), params)
    play = state.play
    physics = jax.tree.map(lambda x: -x if x.dtype == jnp.float32 else x, play.env_state)
    mirrored = state.replace(play=play.replace(M_o=-play.M_o, M_a=play.M_a[::-1], env_state=physics))
    np.testing.assert_allclose(env.identifiable(mirrored), env.identifiable(state))
    other = state.replace(play=play.replace(M_a=play.M_a[::-1]))
    np.testing.assert_allclose(env.identifiable(other), -env.identifiable(state))
    step = fast_jit(env.step_env)
    for t in range(8):
        key, action = jax.random.PRNGKey(t), t % 3 // 2
        obs, state, *_ = step(key, state, action, params)
        seen, mirrored, *_ = step(key, mirrored, action, params)
        np.testing.assert_allclose(seen, obs, atol=1e-5)


def test_the_target_is_that_of_the_running_meta_episode(meta):
    """It changes where a meta-episode begins and only there."""
    hidden, start = np.asarray(meta.rollout.hidden), np.asarray(meta.rollout.start)
    changes = (hidden[1:] != hidden[:-1]).any(axis=-1)
    np.testing.assert_array_equal(changes, start[1:] > 0)
    assert changes.sum() > 5
    np.testing.assert_array_equal(hidden[0], jax.vmap(meta.setup.env.identifiable)(meta.runner.env_state))


def test_the_hidden_target_does_not_reach_what_acts(meta, monkeypatch):
    """With another target the rollout is the same, and the acting path has no part of the head that reads it."""
    monkeypatch.setattr(MetaStatelessCartPole, "identifiable", lambda self, state: jnp.full(8, 7.0, jnp.float32))
    _, rollout, last_value = fast_jit(ppo.collect_rollout, meta_setup())(meta.runner)
    assert np.all(np.asarray(rollout.hidden) == 7.0)
    jax.tree.map(np.testing.assert_array_equal, rollout._replace(hidden=None), meta.rollout._replace(hidden=None))
    np.testing.assert_array_equal(last_value, meta.last_value)

    def acted(params):
        network, runner = meta.setup.network, meta.runner
        kernels = network.apply(params, method="kernels")
        _, policy, value = network.apply(params, kernels, runner.carry, runner.obs, runner.start, method="step")
        return policy.mean.sum() + value.sum()

    slopes = fast_jit(jax.grad(acted))(meta.runner.params)["params"]
    assert not np.any(slopes["identify"]["kernel"]) and np.any(slopes["products"]["kernel"])


@pytest.mark.slow
def test_the_identification_loss_is_added_with_its_weight_and_teaches_the_memory_alone(meta):
    advantages, returns = ppo.compute_gae(meta.setup.args, meta.rollout, meta.rollout.reward, meta.last_value)
    data = (meta.rollout, advantages, returns)

    def value_and_slopes(aux_coef):
        setup = meta.setup._replace(args=meta_setup(aux_coef=aux_coef).args)
        function = fast_jit(
            lambda params: jax.value_and_grad(ppo.ppo_loss, has_aux=True)(params, setup, meta.runner.carry, *data)
        )
        return function(meta.runner.params)

    (one, metrics), slopes = value_and_slopes(1.0)
    (three, _), steeper = value_and_slopes(3.0)
    identify = fast_jit(partial(meta.setup.network.apply, method="scan_and_identify"))
    _, _, identified = identify(meta.runner.params, meta.runner.carry, meta.rollout.obs, meta.rollout.start)
    assert float(metrics["aux_loss"]) == pytest.approx(
        float(np.mean((identified - meta.rollout.hidden) ** 2)), rel=1e-4
    )
    assert float(three - one) == pytest.approx(2 * float(metrics["aux_loss"]), rel=1e-3)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), slopes["params"], steeper["params"])
    for name in ("actor", "critic", "products"):
        assert max(jax.tree.leaves(moved[name])) < 1e-6
    assert max(jax.tree.leaves(moved["memory_0"])) > 1e-5 and max(jax.tree.leaves(moved["encoder"])) > 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("arch", MEMORIES)
def test_an_update_with_every_memory(arch):
    setup = meta_setup(arch=arch, num_envs=8, num_steps=30, num_minibatches=2)
    runner = fast_jit(ppo.init_runner, setup)(jax.random.PRNGKey(0))
    later, metrics = fast_jit(ppo.update, setup)(runner)
    assert metrics["first_ratio_error"] < 1e-5 and metrics["aux_loss"] > 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(later.params))
