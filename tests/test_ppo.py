"""The learner: rollout, truncation, advantages, loss, reward scale, evaluation, and probes with known answers."""

import ast
import dataclasses
import math
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from conftest import ARCHS, ROOT, fast_jit, others_slow, tiny_args
from flax import struct
from gymnax.environments import environment, spaces

import ppo_s5_popgym as ppo
import s5_common as common


def short_cartpole(time_limit=12, **flags):
    """CartPole that ends by the time limit and, less often, by a fall."""
    flags = {"env": "PositionOnlyCartPoleEasy", "num_envs": 32, "num_steps": 50} | flags
    setup = ppo.make_setup(tiny_args(**flags))
    return setup._replace(env_params=setup.env_params.replace(max_steps_in_episode=time_limit))


@pytest.fixture(scope="module")
def cartpole():
    """A setup, its second runner and the rollout that follows: episodes are under way at its first step."""
    setup = short_cartpole(bootstrap_truncated=True)
    collect = fast_jit(ppo.collect_rollout, setup)
    runner, _, _ = collect(fast_jit(ppo.init_runner, setup)(jax.random.PRNGKey(0)))
    later, rollout, last_value = collect(runner)
    return SimpleNamespace(setup=setup, runner=runner, later=later, rollout=rollout, last_value=last_value)


# ---- rollout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", others_slow(ARCHS, "s5"))
def test_ratio_is_one_at_the_first_minibatch_with_resets_inside_the_rollout(arch):
    """In the second update too, where the rollout starts from a stored carry; later minibatches do move."""
    setup = short_cartpole(arch=arch, num_envs=8, num_steps=32, num_minibatches=2, learning_rate=0.01)
    update, runner = fast_jit(ppo.update, setup), fast_jit(ppo.init_runner, setup)(jax.random.PRNGKey(3))
    for _ in range(3):
        runner, metrics = update(runner)
        assert metrics["episodes"] >= 8
        assert metrics["first_ratio_error"] < 1e-5
        assert metrics["approx_kl"] > 1e-7


def test_replay_of_a_rollout_gives_the_log_probs_and_values_that_were_acted_on(cartpole):
    setup, runner, rollout = cartpole.setup, cartpole.runner, cartpole.rollout
    assert np.abs(jax.tree.leaves(runner.carry)[0]).max() > 0 and rollout.start[1:].sum() > 32
    scan = fast_jit(lambda carry: setup.network.apply(runner.params, carry, rollout.obs, rollout.start, method="scan"))
    carry, policy, value = scan(runner.carry)
    np.testing.assert_allclose(policy.log_prob(rollout.action), rollout.log_prob, atol=1e-5)
    np.testing.assert_allclose(value, rollout.value, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), carry, cartpole.later.carry)
    _, _, wrong = scan(jax.tree.map(jnp.zeros_like, runner.carry))  # the stored carry matters
    assert np.abs(wrong - rollout.value).max() > 1e-4


@pytest.mark.parametrize("env, actions", [("PositionOnlyCartPoleEasy", 2), ("PositionOnlyPendulumEasy", 1)])
def test_previous_action_and_start_flag_at_every_step(env, actions, cartpole):
    """Zeros and 1 where an episode opens, auto-resets included; elsewhere the action just taken and 0."""
    if env == cartpole.setup.args.env:
        first, rollout, last = cartpole.runner, cartpole.rollout, cartpole.later
    else:
        setup = short_cartpole(env=env, time_limit=7, num_envs=4, num_steps=30, arch="mlp")
        first = fast_jit(ppo.init_runner, setup)(jax.random.PRNGKey(0))
        assert np.all(np.asarray(first.start) == 1) and np.all(np.asarray(first.obs)[:, -actions - 1 : -1] == 0)
        last, rollout, _ = fast_jit(ppo.collect_rollout, setup)(first)
    obs = np.concatenate([rollout.obs, np.asarray(last.obs)[None]])
    starts = np.concatenate([rollout.start, np.asarray(last.start)[None]])
    np.testing.assert_array_equal(obs[0], first.obs)
    np.testing.assert_array_equal(starts[0], first.start)
    ended = np.asarray(rollout.terminated | rollout.truncated)
    assert ended.sum() > 10
    for t, b in np.ndindex(*ended.shape):
        previous, flag = obs[t + 1, b, -actions - 1 : -1], obs[t + 1, b, -1]
        action = np.atleast_1d(rollout.action[t, b])
        taken = np.eye(2)[action[0]] if actions == 2 else action
        assert flag == starts[t + 1, b] == ended[t, b]
        np.testing.assert_array_equal(previous, np.zeros(actions) if ended[t, b] else taken)


def test_return_length_and_discounted_return_are_counted_within_the_episode(cartpole):
    rollout, gamma = cartpole.rollout, cartpole.setup.args.gamma
    so_far = jax.tree.map(np.asarray, cartpole.runner.so_far)
    ended = np.asarray(rollout.terminated | rollout.truncated)
    for b in range(4):
        total, length, discounted = (so_far[name][b] for name in ("return", "length", "discounted"))
        for t in range(len(ended)):
            reward = float(rollout.reward[t, b])
            total, length, discounted = total + reward, length + 1, gamma * discounted + reward
            for name, value in (("return", total), ("length", length), ("discounted", discounted)):
                assert rollout.so_far[name][t, b] == pytest.approx(value, abs=1e-5)
            if ended[t, b]:
                assert total == pytest.approx(length / 12)  # CartPole pays 1 / time limit a step
                total = length = discounted = 0.0


def test_staggered_environments_begin_at_times_of_their_own():
    """Each has been acted in for a number of steps of its own; what is kept of its episode fits where it stands."""
    setup = short_cartpole(env="RepeatFirstEasy", num_envs=16, num_steps=51, arch="mlp", stagger_steps=120)
    staggered, together = (
        jax.tree.map(lambda x: np.asarray(x)[0], ppo.init_runners(setup._replace(args=args)))
        for args in (setup.args, dataclasses.replace(setup.args, stagger_steps=0))
    )
    assert np.all(together.start == 1) and not together.so_far["length"].any()
    lengths = staggered.so_far["length"]
    assert len(set(lengths.tolist())) > 8 and 40 < lengths.max() < 51  # an episode has 51 steps
    np.testing.assert_array_equal(staggered.env_state.time, lengths)
    np.testing.assert_array_equal(staggered.start, lengths == 0)
    before = staggered.obs[:, -5:-1]
    np.testing.assert_array_equal(before.sum(axis=-1), lengths > 0)  # one-hot, zeros where there was no action
    for runner, at_once in ((staggered, 4), (together, 16)):
        _, rollout, _ = fast_jit(ppo.collect_rollout, setup)(runner)
        ends = np.asarray(rollout.terminated).sum(axis=1)
        assert ends.sum() == 16 and 0 < ends.max() <= at_once
        assert ends.max() == at_once or runner is staggered


@pytest.mark.parametrize("flag", ["resume", "eval", "watch"])
def test_nothing_is_staggered_that_a_checkpoint_replaces(flag, monkeypatch):
    setup = short_cartpole(arch="mlp", stagger_steps=5, **{flag: "somewhere"})
    monkeypatch.setattr(ppo, "stagger", None)
    shapes = jax.eval_shape(lambda: ppo.init_runners(setup))
    assert shapes.obs.shape[:2] == (1, setup.args.num_envs)


def test_gain_scales_states_and_leaves_what_the_layer_does_at_first():
    """B_bar against zero-order hold by its formula; the same outputs with gain and without, of larger states."""
    states, outputs = {}, {}
    u = jnp.asarray(np.random.default_rng(0).normal(size=(40, 2, 16)), jnp.float32)
    for gain in (True, False):
        args = ppo.Args(s5_width=16, s5_state=16, s5_gain=gain)
        layer = ppo.S5Layer(args)
        carry, start = layer.initial_carry(2), jnp.zeros((40, 2))
        params = fast_jit(partial(layer.init, method="scan"))(jax.random.key(0), carry, u, start)
        _, B_bar, _ = fast_jit(partial(layer.apply, method="kernels"))(params)
        p = jax.tree.map(lambda x: np.asarray(x, np.float64), params["params"])
        Lambda, step = p["Lambda_re"] + 1j * p["Lambda_im"], np.exp(p["log_step"])
        B = (p["B_tilde"][:, :16] + 1j * p["B_tilde"][:, 16:]) * (0.1 / step if gain else 1.0)
        expected = B * (np.exp(Lambda * step) - 1) / Lambda
        np.testing.assert_allclose(B_bar[:, :16] + 1j * B_bar[:, 16:], expected, rtol=2e-2, atol=1e-5)
        states[gain], outputs[gain] = fast_jit(partial(layer.apply, method="scan"))(params, carry, u, start)
    np.testing.assert_allclose(states[True], states[False] * np.tile(0.1 / step, 2), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(outputs[True], outputs[False], rtol=1e-3, atol=1e-4)
    assert np.abs(outputs[True] - u).max() > 0.1


def test_truncated_steps_store_the_value_of_the_final_observation(cartpole):
    """Recomputed by hand for one environment at a time: replay the episode up to its last step, go on from that carry
    with the observation that the physics gives, the action just taken and no start flag."""
    setup, runner, rollout = cartpole.setup, cartpole.runner, cartpole.rollout
    network, params = setup.network, runner.params
    truncated, terminated = np.asarray(rollout.truncated), np.asarray(rollout.terminated)
    assert truncated.sum() > 20 and terminated.sum() > 5
    assert np.all(np.asarray(rollout.final_value)[~truncated] == 0)
    kernels = fast_jit(lambda: network.apply(params, method="kernels"))()
    act = fast_jit(lambda *inputs: network.apply(params, kernels, *inputs, method="step"))
    # without an auto-reset: the state before every step, rebuilt from the runner's
    step_env = fast_jit(
        jax.vmap(lambda state, action: setup.env.step_env(jax.random.key(0), state, action, setup.env_params)[:2])
    )
    carry, env_state, known = runner.carry, runner.env_state, np.ones(setup.args.num_envs, bool)
    checked = 0
    for t in range(len(truncated)):
        carry, _, value = act(carry, rollout.obs[t], rollout.start[t])
        np.testing.assert_allclose(value, rollout.value[t], atol=1e-5)  # the stored carry was not advanced
        final_obs, env_state = step_env(env_state, rollout.action[t])
        previous = jax.nn.one_hot(rollout.action[t], 2)
        closing = jnp.concatenate([final_obs, previous, jnp.zeros((len(final_obs), 1))], axis=1)
        final_value = np.asarray(act(carry, closing, jnp.zeros(len(final_obs)))[2])
        here = known & truncated[t]
        np.testing.assert_allclose(np.asarray(rollout.final_value)[t][here], final_value[here], atol=1e-5)
        checked += here.sum()
        known &= ~(truncated[t] | terminated[t])  # where an episode has opened the physics is not known any more
    assert checked >= 5


def test_time_limits_are_not_valued_by_default():
    setup = short_cartpole(num_envs=8, num_steps=30, arch="mlp")
    _, rollout, _ = fast_jit(ppo.collect_rollout, setup)(fast_jit(ppo.init_runner, setup)(jax.random.PRNGKey(0)))
    assert rollout.truncated.sum() > 5 and np.all(np.asarray(rollout.final_value) == 0)


# ---- advantages and loss ---------------------------------------------------------------------------------------------


def gae_by_loops(args, reward, value, terminated, truncated, final_value, last_value):
    """As a sum over the rest of the episode: A_t = sum_k (gamma lambda)^k delta_{t+k}."""
    T, B = reward.shape
    advantages = np.zeros((T, B))
    for t, b in np.ndindex(T, B):
        weight = 1.0
        for k in range(t, T):
            after = value[k + 1, b] if k + 1 < T else last_value[b]
            if truncated[k, b]:
                after = final_value[k, b] if args.bootstrap_truncated else 0.0
            if terminated[k, b]:
                after = 0.0
            advantages[t, b] += weight * (reward[k, b] + args.gamma * after - value[k, b])
            if terminated[k, b] or truncated[k, b]:
                break
            weight *= args.gamma * args.gae_lambda
    return advantages


@pytest.mark.parametrize("bootstrap", [True, False])
@pytest.mark.parametrize("gamma, gae_lambda", [(0.99, 0.8), (0.9, 1.0), (1.0, 0.0)])
def test_gae_equals_a_plain_sum_with_terminations_and_truncations_mixed(bootstrap, gamma, gae_lambda):
    rng, shape = np.random.default_rng(0), (40, 6)
    args = tiny_args(gamma=gamma, gae_lambda=gae_lambda, bootstrap_truncated=bootstrap)
    reward, value, final_value = rng.normal(size=(3, *shape))
    terminated, truncated = rng.random((2, *shape)) < 0.12
    assert (terminated & truncated).any() and (truncated & ~terminated)[-1].any()
    last_value = rng.normal(size=shape[1])
    rollout = ppo.Rollout(*[None] * len(ppo.Rollout._fields))._replace(
        value=jnp.asarray(value, jnp.float32),
        terminated=jnp.asarray(terminated),
        truncated=jnp.asarray(truncated),
        final_value=jnp.asarray(final_value, jnp.float32),
    )
    got, returns = ppo.compute_gae(
        args, rollout, jnp.asarray(reward, jnp.float32), jnp.asarray(last_value, jnp.float32)
    )
    expected = gae_by_loops(args, reward, value, terminated, truncated, final_value, last_value)
    np.testing.assert_allclose(got, expected, atol=2e-5)
    np.testing.assert_allclose(returns, expected + value, atol=2e-5)


@pytest.fixture(scope="module")
def loss(cartpole):
    """The loss of the fixture's rollout for some environments in some order, with parameters a little further on."""
    setup, runner, rollout = cartpole.setup, cartpole.runner, cartpole.rollout
    advantages, returns = ppo.compute_gae(setup.args, rollout, rollout.reward, cartpole.last_value)
    advantages, _ = ppo.scale_advantages(setup.args, runner.advantage_scale, advantages)
    keys = iter(jax.random.split(jax.random.PRNGKey(5), 100))
    params = jax.tree.map(lambda p: p + 0.2 * jax.random.normal(next(keys), p.shape), runner.params)
    gradient = fast_jit(jax.value_and_grad(lambda p, *data: ppo.ppo_loss(p, setup, *data), has_aux=True))

    def of(environments, carry_of=None):
        batch = jax.tree.map(lambda x: x[:, environments], (rollout, advantages, returns))
        carry = jax.tree.map(lambda x: x[environments if carry_of is None else carry_of], runner.carry)
        return gradient(params, carry, *batch)

    return SimpleNamespace(of=of, params=params, advantages=advantages, returns=returns)


def test_loss_equals_the_published_formula(cartpole, loss):
    setup, rollout, everyone = cartpole.setup, cartpole.rollout, np.arange(32)
    (total, metrics), _ = loss.of(everyone)
    scan = fast_jit(partial(setup.network.apply, method="scan"))
    _, policy, value = scan(loss.params, cartpole.runner.carry, rollout.obs, rollout.start)
    logits, value = np.asarray(policy.mean, np.float64), np.asarray(value, np.float64)
    log_probs = logits - scipy.special.logsumexp(logits, axis=-1, keepdims=True)
    actions, eps = np.asarray(rollout.action), setup.args.clip_coef
    T, B = actions.shape
    policy_terms, value_terms, clipped = [], [], 0
    A = np.asarray(loss.advantages, np.float64)
    A = (A - A.mean()) / A.std()
    for t, b in np.ndindex(T, B):
        ratio = math.exp(log_probs[t, b, actions[t, b]] - rollout.log_prob[t, b])
        clipped += abs(ratio - 1) > eps
        policy_terms.append(-min(ratio * A[t, b], min(max(ratio, 1 - eps), 1 + eps) * A[t, b]))
        old, target = float(rollout.value[t, b]), float(loss.returns[t, b])
        near = old + min(max(value[t, b] - old, -eps), eps)
        value_terms.append(max((value[t, b] - target) ** 2, (near - target) ** 2) / 2)
    entropy = -np.sum(np.exp(log_probs) * log_probs, axis=-1).mean()
    assert clipped > 0
    assert metrics["policy_loss"] == pytest.approx(np.mean(policy_terms), abs=1e-4)
    assert metrics["value_loss"] == pytest.approx(np.mean(value_terms), rel=1e-4)
    assert metrics["entropy"] == pytest.approx(entropy, rel=1e-4)
    assert metrics["clip_frac"] == pytest.approx(clipped / (T * B), abs=2 / (T * B))
    args = setup.args
    expected = np.mean(policy_terms) + args.vf_coef * np.mean(value_terms) - args.ent_coef * entropy
    assert total == pytest.approx(expected, abs=1e-4)


def test_loss_and_gradient_do_not_depend_on_the_order_of_the_environments(loss):
    """Environments are exchangeable, each with its own carry; with another's carry the gradient is another."""
    order = np.random.default_rng(0).permutation(32)
    (plain, _), gradient = loss.of(np.arange(32))
    (permuted, _), permuted_gradient = loss.of(order)
    _, wrong_gradient = loss.of(order, carry_of=np.arange(32))

    def distance(other):
        flat, expected = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(g)]) for g in (other, gradient))
        return np.linalg.norm(flat - expected) / np.linalg.norm(expected)

    assert float(permuted) == pytest.approx(float(plain), rel=1e-5)
    assert distance(permuted_gradient) < 1e-5 and distance(wrong_gradient) > 1e-3


def test_entropy_bonus_and_value_weight_reach_the_loss(cartpole):
    setup, runner, rollout = cartpole.setup, cartpole.runner, cartpole.rollout
    data = runner.carry, rollout, rollout.value, rollout.so_far["return"]

    @fast_jit
    def losses(params):
        others = [setup._replace(args=tiny_args(**flags)) for flags in ({}, {"ent_coef": 0.5}, {"vf_coef": 3.0})]
        return [ppo.ppo_loss(params, other, *data) for other in others]

    (plain, metrics), (entropy, _), (value, _) = jax.tree.map(float, losses(runner.params))
    assert metrics["entropy"] > 0.1 and metrics["value_loss"] > 0.01
    assert entropy == pytest.approx(plain - 0.5 * metrics["entropy"], rel=1e-4)
    assert value == pytest.approx(plain + 2 * metrics["value_loss"], rel=1e-4)


def test_reward_scale_is_frozen_for_a_rollout_and_is_the_mean_of_those_before():
    """Rollout k is divided by the root of the mean of the earlier rollouts' mean squares; the first by its own."""
    args, rng = tiny_args(), np.random.default_rng(0)
    scale, squares = ppo.RewardScale(jnp.zeros(()), jnp.zeros(())), []
    for k in range(8):
        size = 10.0 ** rng.uniform(-3, 1)
        reward, discounted = rng.normal(size=(16, 4)) * size, rng.normal(size=(16, 4)) * size
        rollout = ppo.Rollout(*[None] * len(ppo.Rollout._fields))._replace(
            reward=jnp.asarray(reward, jnp.float32), so_far={"discounted": jnp.asarray(discounted, jnp.float32)}
        )
        scaled, scale = ppo.scale_rewards(args, scale, rollout)
        squares.append(np.mean(discounted**2))
        divisor = math.sqrt(np.mean(squares[:k] or squares) + 1e-8)
        np.testing.assert_allclose(scaled, reward / divisor, rtol=1e-4)
    for _ in range(30):  # after 20 rollouts the mean forgets, at 5 % a rollout
        _, scale = ppo.scale_rewards(args, scale, rollout)
    old, (new, _) = (
        float(scale[0]),
        ppo.scale_rewards(args, scale, rollout._replace(so_far={"discounted": jnp.ones(1)}))[1],
    )
    assert new == pytest.approx(0.95 * old + 0.05, rel=1e-4)
    raw, same = ppo.scale_rewards(tiny_args(normalize_rewards=False), scale, rollout)
    assert raw is rollout.reward and same is scale


def test_advantages_are_divided_by_no_less_than_what_earlier_rollouts_had():
    """A rollout as before comes out with deviation 1; one a hundred times smaller stays nearly that small."""
    rng = np.random.default_rng(0)
    scale = ppo.AdvantageScale(jnp.zeros(()), jnp.zeros(()))
    variances = []
    for size in (1.0, 3.0, 0.01):
        advantages = 5.0 + size * rng.normal(size=(16, 4))
        variances.append(advantages.var())
        scaled, scale = ppo.scale_advantages(tiny_args(), scale, jnp.asarray(advantages, jnp.float32))
        divisor = math.sqrt(max(variances[-1], np.mean(variances)))
        np.testing.assert_allclose(scaled, (advantages - advantages.mean()) / divisor, rtol=1e-3, atol=1e-4)
    same, unchanged = ppo.scale_advantages(tiny_args(advantage_norm="minibatch"), scale, scaled)
    assert same is scaled and unchanged is scale


@pytest.mark.parametrize(("norm", "factor"), [("minibatch", 1.0), ("rollout", 10.0)])
def test_the_loss_takes_advantages_as_they_are_unless_a_minibatch_is_the_norm(cartpole, loss, norm, factor):
    """Ten times larger, they weigh as much as before in a minibatch's own deviation, and else ten times as much."""
    setup, runner, rollout = cartpole.setup, cartpole.runner, cartpole.rollout
    setup = setup._replace(args=tiny_args(advantage_norm=norm))

    @fast_jit
    def policy_loss(advantages):
        _, metrics = ppo.ppo_loss(loss.params, setup, runner.carry, rollout, advantages, loss.returns)
        return metrics["policy_loss"]

    small = float(policy_loss(loss.advantages))
    large = float(policy_loss(10 * loss.advantages))
    assert abs(small) > 1e-3
    assert large == pytest.approx(factor * small, rel=1e-3)


# ---- policies --------------------------------------------------------------------------------------------------------


def test_categorical_log_prob_entropy_and_samples_against_scipy():
    logits = np.random.default_rng(0).normal(size=(5, 4)) * 3
    policy, probabilities = ppo.Policy(jnp.asarray(logits, jnp.float32), None), scipy.special.softmax(logits, axis=-1)
    for a in range(4):
        expected = [math.log(p[a]) for p in probabilities]
        np.testing.assert_allclose(policy.log_prob(jnp.full(5, a)), expected, rtol=1e-4)
    np.testing.assert_allclose(policy.entropy(), [scipy.stats.entropy(p) for p in probabilities], rtol=1e-4)
    samples = np.asarray(jax.vmap(policy.sample)(jax.random.split(jax.random.PRNGKey(0), 20_000)))
    for b in range(5):
        np.testing.assert_allclose(np.bincount(samples[:, b], minlength=4) / 20_000, probabilities[b], atol=0.02)


def test_gaussian_log_prob_entropy_and_samples_against_scipy():
    rng = np.random.default_rng(0)
    mean, log_std, action = rng.normal(size=(3, 5, 2))
    policy = ppo.Policy(jnp.asarray(mean, jnp.float32), jnp.asarray(log_std, jnp.float32))
    laws = [scipy.stats.multivariate_normal(m, np.diag(np.exp(2 * s))) for m, s in zip(mean, log_std, strict=True)]
    log_probs = [law.logpdf(a) for law, a in zip(laws, action, strict=True)]
    np.testing.assert_allclose(policy.log_prob(jnp.asarray(action, jnp.float32)), log_probs, rtol=1e-4)
    np.testing.assert_allclose(policy.entropy(), [law.entropy() for law in laws], rtol=1e-4)
    samples = np.asarray(jax.vmap(policy.sample)(jax.random.split(jax.random.PRNGKey(0), 20_000)))
    standard = (samples - mean) / np.exp(log_std)
    np.testing.assert_allclose(standard.mean(0), 0, atol=0.04)
    np.testing.assert_allclose(standard.std(0), 1, atol=0.04)


# ---- probe environments with known answers ---------------------------------------------------------------------------


@struct.dataclass
class ProbeState(environment.EnvState):
    time: jax.Array
    secret: jax.Array  # cue +-1, or the length of the episode


@struct.dataclass
class ProbeParams(environment.EnvParams):
    max_steps_in_episode: int = 1_000_000


class Probe(environment.Environment):
    """Two actions, two observations; ``observe``, ``reward`` and ``secret`` make it a task."""

    name = "Probe"
    length = 1

    def secret(self, key):
        return jnp.zeros(())

    def reward(self, state, action):
        return jnp.ones(())

    def observe(self, state):
        return jnp.ones(2)

    def reset_env(self, key, params):
        state = ProbeState(time=jnp.zeros((), jnp.int32), secret=self.secret(key))
        return self.observe(state), state

    def step_env(self, key, state, action, params):
        reward, state = self.reward(state, action), state.replace(time=state.time + 1)
        return self.observe(state), state, reward, self.is_terminated(state, params), {}

    def is_terminated(self, state, params):
        return state.time >= self.length

    def is_truncated(self, state, params):
        return state.time >= params.max_steps_in_episode

    def action_space(self, params):
        return spaces.Discrete(2)


class Recall(Probe):
    """A cue at the first step, asked for at the second, where nothing is seen. Action 1 at the first step costs 3, so
    that it does not pay to note the cue down in the previous action, which the agent is shown."""

    length = 2

    def secret(self, key):
        return jnp.where(jax.random.bernoulli(key), 1.0, -1.0)

    def observe(self, state):
        return jnp.where(state.time == 0, state.secret, 0.0) * jnp.ones(2)

    def reward(self, state, action):
        return jnp.where(state.time == 1, (2.0 * action - 1) * state.secret, -3.0 * action)


class Lottery(Probe):
    """Episodes of 1 or of 41 steps, at evens; every step pays 1."""

    def secret(self, key):
        return jnp.where(jax.random.bernoulli(key), 1.0, 41.0)

    def is_terminated(self, state, params):
        return state.time >= state.secret


class PaysLate(Probe):
    """40 steps, of which the last one pays 1: with rollouts of 16 steps the first two pay nothing."""

    length = 40

    def reward(self, state, action):
        return jnp.where(state.time == self.length - 1, 1.0, 0.0)


def probe_setup(probe, time_limit=1_000_000, **flags):
    """The learner on a probe; CartPole lends its two actions."""
    flags = {"env": "PositionOnlyCartPoleEasy", "anneal_lr": False, "normalize_rewards": False} | flags
    setup = ppo.make_setup(tiny_args(**flags))
    return setup._replace(env=probe, env_params=ProbeParams(max_steps_in_episode=time_limit))


def train_on(setup, updates):
    update, runner = fast_jit(ppo.update, setup), fast_jit(ppo.init_runner, setup)(jax.random.PRNGKey(0))
    for _ in range(updates):
        runner, metrics = update(runner)
    return runner, metrics


@pytest.mark.slow
def test_rollouts_that_pay_nothing_do_not_make_the_first_reward_huge():
    """Scaled by the rollout that it came in, a reward of 1 among 16 x 8 steps is at most their root, 11.3."""
    setup = probe_setup(PaysLate(), normalize_rewards=True, arch="mlp")
    runner, collect = fast_jit(ppo.init_runner, setup)(jax.random.PRNGKey(0)), fast_jit(ppo.collect_rollout, setup)
    scale, largest = runner.reward_scale, []
    for _ in range(8):
        runner, rollout, _ = collect(runner)
        reward, scale = ppo.scale_rewards(setup.args, scale, rollout)
        largest.append(float(jnp.abs(reward).max()))
    assert largest[:2] == [0.0, 0.0] and 1 < max(largest) < math.sqrt(16 * 8)
    _, metrics = train_on(setup, 3)
    assert float(metrics["value_loss"]) < 16 * 8


class Endless(Probe):
    length = 2_000_000


@pytest.mark.parametrize(
    "probe, time_limit, bootstrap, answer",
    [
        pytest.param(Probe(), 1_000_000, True, 1.0, id="terminated", marks=pytest.mark.slow),
        pytest.param(Endless(), 1, True, 2.0, id="truncated"),
        pytest.param(Endless(), 1, False, 1.0, id="truncated, bootstrap off", marks=pytest.mark.slow),
    ],
)
def test_value_of_an_episode_of_one_step_that_pays_one(probe, time_limit, bootstrap, answer):
    """gamma = 1/2: terminated V = 1; cut by the time limit V = 1 + V/2 = 2 (the final observation looks the same but
    for the start flag and the previous action, so both are learnt); without bootstrap V = 1 again."""
    flags = {"gamma": 0.5, "bootstrap_truncated": bootstrap, "learning_rate": 5e-3, "arch": "mlp"}
    setup = probe_setup(probe, time_limit, **flags)
    if answer == 2.0:  # the final observation must be visited to be learnt: two steps to the time limit
        setup = setup._replace(env_params=ProbeParams(max_steps_in_episode=2))
        runner, _ = train_on(setup, 150)
    else:
        runner, _ = train_on(setup, 80)
    _, rollout, _ = fast_jit(ppo.collect_rollout, setup)(runner)
    np.testing.assert_allclose(rollout.value, answer, atol=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("arch, low, high", [("s5", 0.8, 1.0), ("mlp", -0.5, 0.3)])
def test_a_cue_of_one_step_before_is_recalled_with_memory_and_not_without(arch, low, high):
    """Mean return 1 if always recalled, 0 if guessed."""
    setup = probe_setup(Recall(), arch=arch, learning_rate=3e-3, num_envs=32, gamma=0.9, eval_episodes=400)
    runner, _ = train_on(setup, 80)
    returns = fast_jit(ppo.evaluate, setup)(runner.params, jax.random.PRNGKey(0))
    assert low <= returns.mean() <= high


@pytest.fixture(scope="module")
def lottery():
    """Evaluation with a key, of any policy: the returns of 1000 episodes."""
    setup = probe_setup(Lottery(), arch="mlp", eval_episodes=1000)
    params, evaluate = fast_jit(ppo.init_runner, setup)(jax.random.PRNGKey(0)).params, fast_jit(ppo.evaluate, setup)
    return lambda seed: np.asarray(evaluate(params, jax.random.PRNGKey(seed)))


def test_evaluation_counts_first_episodes_only_and_to_their_end(lottery):
    """Episodes of 1 or 41 steps at evens: mean 21. Counting every episode that ends would favour the short ones, and
    counting one rollout would lose the long ones (a rollout has 16 steps)."""
    returns = lottery(1)
    assert returns.shape == (1000,) and set(returns) == {1.0, 41.0}
    assert returns.mean() == pytest.approx(21, abs=4 * 20 / math.sqrt(1000))


def test_evaluation_key_decides_which_episodes_are_played(lottery):
    np.testing.assert_array_equal(lottery(1), lottery(1))
    assert np.any(lottery(1) != lottery(2))


# ---- flags -----------------------------------------------------------------------------------------------------------


def test_every_flag_is_read_somewhere():
    """As an attribute of something called args, setup.args, self, first or the like; defining it does not count."""
    read = set()
    for file in ("ppo_s5_popgym.py", "s5_common.py"):
        for node in ast.walk(ast.parse((ROOT / file).read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                base = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
                if base in ("args", "self", "first", "flags"):
                    read.add(node.attr)
            elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
                read.add(node.slice.value)  # metrics["entropy"]
    assert not set(ppo.Args.__dataclass_fields__) - read


def test_the_paper_preset_is_the_papers_table():
    """Lu et al. 2023, appendix B, and what the released code adds."""
    args = common.parse_args(ppo.Args, ppo.PRESETS, ["--preset", "paper"])
    table = {
        "preset": "paper",
        "arch": "s5",
        "num_envs": 64,
        "num_steps": 1024,
        "total_timesteps": 15_000_000,
        "update_epochs": 30,
        "num_minibatches": 8,
        "learning_rate": 5e-5,
        "anneal_lr": False,
        "gamma": 0.99,
        "gae_lambda": 1.0,
        "clip_coef": 0.2,
        "ent_coef": 0.0,
        "vf_coef": 1.0,
        "max_grad_norm": 0.5,
        "encoder_layers": (128,),  # and one more of the model's width: [128, 256]
        "decoder_layers": (128, 128),
        "s5_layers": 4,
        "s5_width": 256,
        "s5_state": 128,
        "s5_dt_min": 0.001,
        "s5_dt_max": 0.1,
        "s5_gain": False,
        "s5_norm": False,
        "stagger_steps": 0,
        "normalize_rewards": False,
        "bootstrap_truncated": False,
    }
    assert {name: getattr(args, name) for name in table} == table


def test_the_papers_network_has_the_papers_layers():
    """Encoder [128, 256], four layers of S5 with both matrices of the gate, decoders [128, 128]."""
    setup = ppo.make_setup(ppo.Args(**ppo.PRESETS["paper"]))
    params = jax.eval_shape(lambda: ppo.init_runner(setup, jax.random.PRNGKey(0))).params["params"]

    def matrices(part):
        return [leaf.shape for leaf in jax.tree.leaves(params[part]) if leaf.ndim == 2]

    features = 4 + 4 + 1  # one-hot suit, one-hot previous action, start flag
    assert matrices("encoder") == [(features, 128), (128, 256)]
    assert matrices("actor") == [(256, 128), (128, 128), (128, 4)]
    assert matrices("critic") == [(256, 128), (128, 128), (128, 1)]
    memory = [part for name, part in params.items() if name not in ("encoder", "actor", "critic")]
    assert len(memory) == 4
    for layer in memory:  # B_tilde and C_tilde hold real and imaginary parts of 128 states
        assert sorted(leaf.shape for leaf in jax.tree.leaves(layer) if leaf.ndim == 2) == [(256, 256)] * 4
        assert "norm" not in layer


def test_an_explicit_flag_beats_the_preset_wherever_it_stands():
    for argv in (["--preset", "paper", "--gamma", "0.5"], ["--gamma", "0.5", "--preset", "paper"]):
        args = common.parse_args(ppo.Args, ppo.PRESETS, argv)
        assert (args.gamma, args.gae_lambda, args.num_steps) == (0.5, 1.0, 1024)
    assert common.parse_args(ppo.Args, ppo.PRESETS, ["--preset", "paper", "--gae-lambda", "0.8"]).gae_lambda == 0.8


def test_steps_are_rounded_up_to_whole_rollouts():
    assert tiny_args(total_timesteps=129).num_updates == 2
    assert tiny_args(total_timesteps=128).num_updates == 1
