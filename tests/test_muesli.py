"""muesli_s5_metarl.py: the learner's formulas against plain loops and closed forms, and probes with known answers."""

import dataclasses
import math
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import fast_jit, others_slow

import muesli_s5_metarl as muesli

SMALL = {"encoder_layers": (16,), "s5_width": 16, "s5_state": 8, "rnn_width": 16, "s5_layers": 1, "num_envs": 8}
SMALL |= {"num_steps": 10, "meta_steps": 20, "num_minibatches": 2, "muesli_samples": 4, "muesli_support": 10}
SMALL |= muesli.PLAIN | {"learning_rate": 1e-3}


def small_args(**flags):
    args = muesli.Args(**SMALL | flags)
    args.check()
    return args


# ---- a toy task, written twice: for jax and as a plain loop ----------------------------------------------------------


def walk_reset(key):
    """A point at a random place; it is known how many steps a trial lasts from there."""
    place = jax.random.uniform(key, (2,), minval=-1.0, maxval=1.0)
    return walk_obs(place, 0), (place, jnp.zeros((), jnp.int32))


def walk_obs(place, time):
    return jnp.concatenate([place, jnp.asarray(time, jnp.float32)[None]])


def walk_step(key, state, action):
    place, time = state
    place, time = place + 0.1 * action, time + 1
    return walk_obs(place, time), (place, time), place.sum(), time >= 3 + (place[0] > 0)


def walk_task(name="walk", ends=True, low=-2.0, high=1.0):
    step = walk_step if ends else lambda *x: (*walk_step(*x)[:3], jnp.zeros((), bool))
    return muesli.Task(name, 3, 2, low, high, ends, walk_reset, step)


def toy_setup(monkeypatch, names=("walk",), tasks=None, **flags):
    made = tasks or {name: walk_task(name) for name in names}
    monkeypatch.setattr(muesli, "make_task", lambda args, name, flag: made[name])
    return muesli.make_setup(small_args(tasks=",".join(made), **flags))


@pytest.fixture
def toy(monkeypatch):
    return partial(toy_setup, monkeypatch)


def first_runner(setup, seed=0):
    return fast_jit(muesli.init_runner, setup)(jax.random.PRNGKey(seed))


# ---- transform and categorical values --------------------------------------------------------------------------------

SCALARS = np.array([-1600.0, -37.5, -1.0, -0.3, 0.0, 1e-3, 0.25, 1.0, 2.0, 99.0, 1000.0], np.float32)


def test_the_transform_and_its_inverse_are_each_others():
    np.testing.assert_allclose(muesli.unsquash(muesli.squash(SCALARS)), SCALARS, rtol=1e-5, atol=1e-6)
    assert float(muesli.squash(3.0)) == pytest.approx(1.003)  # sqrt(4) - 1 + 0.003


def test_two_hot_is_a_distribution_over_two_neighbours_whose_mean_is_the_transformed_scalar():
    p = np.asarray(muesli.two_hot(SCALARS, 60))
    assert p.shape == (len(SCALARS), 121) and (p >= 0).all()
    np.testing.assert_allclose(p.sum(axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(p @ np.arange(-60, 61), muesli.squash(SCALARS), atol=1e-4)
    for row in p:
        (nonzero,) = np.nonzero(row > 1e-5)
        assert len(nonzero) <= 2 and np.ptp(nonzero) <= 1
    np.testing.assert_allclose(muesli.expected(jnp.log(p + 1e-20)), SCALARS, rtol=1e-4, atol=1e-4)


def test_scalars_beyond_the_support_are_at_its_end():
    assert np.asarray(muesli.two_hot(jnp.array([1e6, -1e6]), 5)).argmax(axis=1).tolist() == [10, 0]


def test_cross_entropy_is_least_where_the_expected_scalar_is_the_target():
    target = jnp.array(7.3)
    logits = jnp.zeros(21)
    slope = jax.jit(jax.grad(lambda logits: muesli.cross_entropy(logits, target)))
    for _ in range(2000):
        logits = logits - 2.0 * slope(logits)
    assert float(muesli.expected(logits)) == pytest.approx(7.3, abs=0.02)


# ---- Retrace ---------------------------------------------------------------------------------------------------------


def random_rollout(T=9, B=4, seed=0):
    rng = np.random.default_rng(seed)
    reward, q, value = rng.normal(size=(T, B)), rng.normal(size=(T, B)), rng.normal(size=(T + 1, B))
    terminated, ratio = rng.random((T, B)) < 0.2, np.exp(rng.normal(size=(T, B)))
    none = np.zeros((T, B))
    rollout = muesli.Rollout(none, none, none, none, jnp.asarray(reward), jnp.asarray(terminated))
    return rollout, value, q, ratio


def test_retrace_is_that_of_a_plain_loop():
    """As a sum: G_t = q_t + sum_k gamma^k (c_{t+1} ... c_{t+k}) delta_{t+k}, delta_t = r + gamma v_{t+1} - q_t."""
    args = small_args(gamma=0.9, retrace_lambda=0.8)
    rollout, value, q, ratio = random_rollout()
    found = muesli.retrace(args, rollout, *map(jnp.asarray, (value, q, ratio)))
    T, B = q.shape
    for t, b in np.ndindex(T, B):
        G, weight = q[t, b], 1.0
        for k in range(t, T):
            if k > t:
                weight *= 0.9 * 0.8 * min(1.0, ratio[k, b])
            alive = 1 - rollout.terminated[k, b]
            G += weight * (rollout.reward[k, b] + 0.9 * alive * value[k + 1, b] - q[k, b])
            if not alive:
                break
        assert float(found[t, b]) == pytest.approx(float(G), abs=1e-5)


def test_retrace_on_policy_with_values_for_action_values_is_the_lambda_return():
    """G_t = r_t + gamma ((1 - lambda) v_{t+1} + lambda G_{t+1}), G_T = v_T, and 0 after a termination."""
    args = small_args(gamma=0.9, retrace_lambda=0.8)
    rollout, value, _, ratio = random_rollout(seed=1)
    found = muesli.retrace(args, rollout, jnp.asarray(value), jnp.asarray(value[:-1]), jnp.ones_like(ratio))
    G = value[-1]
    for t in reversed(range(len(ratio))):
        alive = 1 - np.asarray(rollout.terminated[t])
        G = np.asarray(rollout.reward[t]) + 0.9 * alive * (0.2 * value[t + 1] + 0.8 * G)
        np.testing.assert_allclose(found[t], G, atol=1e-5)


def test_retrace_by_hand():
    """gamma 0.5, lambda 1, rewards 0, 4, values 2, 8, then 6; q 2, 1; the second action is half as likely under pi.

    G_1 = 4 + 0.5 * 6 = 7;  G_0 = 0 + 0.5 (8 + 0.5 (7 - 1)) = 5.5
    """
    args = small_args(gamma=0.5, retrace_lambda=1.0)
    column = lambda *x: jnp.array(x, jnp.float32)[:, None]  # noqa: E731
    none = column(0, 0)
    rollout = muesli.Rollout(none, none, none, none, column(0, 4), none > 0)
    found = muesli.retrace(args, rollout, column(2, 8, 6), column(2, 1), column(3, 0.5))
    np.testing.assert_allclose(found[:, 0], [5.5, 7.0])


# ---- CMPO ------------------------------------------------------------------------------------------------------------


def test_cmpo_weights_by_hand():
    """Two samples of advantage 5, clipped to 1, and 0: z_0 = (1 + 1) / 2, z_1 = (1 + e) / 2."""
    w = muesli.cmpo_weights(small_args(), jnp.array([5.0, 0.0]))
    np.testing.assert_allclose(w, [np.e / 1.0, 1.0 / ((1 + np.e) / 2)], rtol=1e-6)


def test_cmpo_with_many_samples_is_the_exact_cmpo_policy():
    """On discretised actions: the weights that fall on an action add up to
    pi_CMPO(a) = pi_prior(a) exp(clip(adv(a), -1, 1)) / sum_b pi_prior(b) exp(clip(adv(b), -1, 1))."""
    rng = np.random.default_rng(0)
    prior, advantages = rng.dirichlet(np.ones(6)), np.array([-3.0, -0.5, 0.0, 0.4, 0.9, 4.0])
    N = 200_000
    actions = rng.choice(6, N, p=prior)
    w = np.asarray(muesli.cmpo_weights(small_args(), jnp.asarray(advantages[actions])))
    found = np.array([w[actions == a].sum() for a in range(6)]) / N
    exact = prior * np.exp(np.clip(advantages, -1, 1))
    np.testing.assert_allclose(found, exact / exact.sum(), atol=0.005)


def test_the_cmpo_loss_pulls_a_gaussian_towards_the_better_samples():
    """Its gradient is that of the weighted log likelihood, sample by sample."""
    actions = jnp.array([[-1.0], [1.0]])
    targets = muesli.Targets(None, None, actions, muesli.cmpo_weights(small_args(), jnp.array([-1.0, 1.0])))

    def loss(mean):
        return muesli.cmpo_loss(muesli.Policy(mean[None], jnp.zeros(1)), targets)

    w = np.asarray(targets.weights)
    assert float(jax.grad(loss)(jnp.array(0.0))) == pytest.approx((w[0] * 1 - w[1] * 1) / 2, rel=1e-5)


# ---- network ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arch, fast_weights",
    [("s5", 2), *(pytest.param(arch, 0, marks=pytest.mark.slow) for arch in ("s5", "lstm", "gru", "mlp"))],
)
def test_scan_and_step_give_the_same_latents_with_any_resets(arch, fast_weights):
    args = small_args(arch=arch, s5_layers=2, s5_fast_weights=fast_weights)
    network = muesli.Agent(args, 2, 4)
    rng = np.random.default_rng(0)
    obs = jnp.asarray(rng.normal(size=(12, 3, 7)), jnp.float32)
    start = jnp.asarray(rng.random((12, 3)) < 0.2, jnp.float32)
    carry = [layer.initial_carry(3) for layer in muesli.make_memory(args, 4)]
    params = fast_jit(partial(network.init, method="everything"))(jax.random.PRNGKey(0), carry, obs, start)
    params = jax.tree.map(lambda x: x + 0.1 * jnp.asarray(rng.normal(size=x.shape), jnp.float32), params)
    middle, _ = fast_jit(partial(network.apply, method="scan"))(params, carry, obs[::-1], start)  # not all zero
    _, whole = fast_jit(partial(network.apply, method="scan"))(params, middle, obs, start)
    kernels = fast_jit(partial(network.apply, method="kernels"))(params)
    step = fast_jit(partial(network.apply, method="step"))
    for t in range(12):
        middle, h = step(params, kernels, middle, obs[t], start[t])
        np.testing.assert_allclose(h, whole[t], atol=1e-5)


@pytest.mark.parametrize("obs_change", [0.0, 1.0])
def test_fast_weights_are_those_of_a_plain_loop(obs_change):
    """Three decays, two values; a key's sums are kept apart, those of every key are read by every key."""
    layer = muesli.FastWeights(small_args(s5_fast_weights=2, obs_change=obs_change), 5)
    T, B, H, O = 9, 3, 16, 5  # noqa: E741
    rng = np.random.default_rng(0)
    u = jnp.asarray(rng.normal(size=(T, B, H)), jnp.float32)
    inputs = jnp.asarray(rng.normal(size=(T, B, 14)), jnp.float32)
    start = jnp.asarray(rng.random((T, B)) < 0.2, jnp.float32)
    carry = layer.initial_carry(B)
    params = fast_jit(partial(layer.init, method="scan"))(jax.random.PRNGKey(0), carry, u, start, inputs)
    _, got = fast_jit(partial(layer.apply, method="scan"))(params, carry, u, start, inputs)

    p = jax.tree.map(np.asarray, params["params"])
    decays = np.exp(-np.exp(p["log_rate"]))
    np.testing.assert_allclose(-np.log(decays), [0.5, np.sqrt(0.5 * 0.01), 0.01], rtol=1e-5)

    def dense(name, x):
        return x @ p[name]["kernel"] + p[name]["bias"]

    for b in range(B):
        R = np.zeros((2 if obs_change else 1, 3, 2, O))
        for t in range(T):
            v = (u[t, b] - u[t, b].mean()) / np.sqrt(u[t, b].var() + 1e-6)
            w = dense("values", v)
            keys = [inputs[t, b, :5], inputs[t, b, 5:10]][: len(R)]
            found = []
            for i, key in enumerate(keys):
                for k, decay in enumerate(decays):
                    for m in range(2):
                        R[i, k, m] = (1 - start[t, b]) * decay * R[i, k, m] + np.sqrt(1 - decay**2) * w[m] * key
            for key in keys:  # values outermost, as they are the two halves of the carry
                found += [R[i, k, m] @ key for m in range(2) for i in range(len(R)) for k in range(3)]
            found = np.sign(found) * np.log1p(np.abs(found))
            y = u[t, b] + dense("out", jax.nn.gelu(dense("mix", np.concatenate([v, found]))))
            np.testing.assert_allclose(got[t, b], y, atol=1e-5)


def test_what_fast_weights_find_does_not_depend_on_the_projection():
    """Observations turned by an orthogonal matrix give the same, if what else is remembered is the same."""
    layer = muesli.FastWeights(small_args(s5_fast_weights=4, obs_change=1.0), 5)
    rng = np.random.default_rng(0)
    u = jnp.asarray(rng.normal(size=(9, 3, 16)), jnp.float32)
    obs, change = jnp.asarray(rng.normal(size=(2, 9, 3, 5)), jnp.float32)
    Q, _ = np.linalg.qr(rng.normal(size=(5, 5)))
    start = jnp.zeros((9, 3))
    carry = layer.initial_carry(3)
    params = fast_jit(partial(layer.init, method="scan"))(
        jax.random.PRNGKey(0), carry, u, start, jnp.concatenate([obs, change], axis=-1)
    )
    scan = fast_jit(partial(layer.apply, method="scan"))
    _, plain = scan(params, carry, u, start, jnp.concatenate([obs, change], axis=-1))
    _, turned = scan(params, carry, u, start, jnp.concatenate([obs @ Q.T, change @ Q.T], axis=-1))
    np.testing.assert_allclose(turned, plain, atol=1e-5)
    _, other = scan(params, carry, u, start, jnp.concatenate([obs @ Q.T, change], axis=-1))
    assert np.abs(other - plain).max() > 0.01


@pytest.mark.parametrize("arch", ["s5", "lru", "mingru", "lstm", "mlp"])
def test_all_parameters_are_real(arch):
    network = muesli.Agent(small_args(arch=arch), 2, 5)
    carry = [layer.initial_carry(1) for layer in muesli.make_memory(network.args, 5)]
    shapes = jax.eval_shape(
        partial(network.init, method="everything"),
        jax.random.PRNGKey(0),
        carry,
        jnp.zeros((1, 1, 5)),
        jnp.zeros((1, 1)),
    )
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize("state_std", others_slow([False, True], True))
def test_the_standard_deviation_begins_at_0_7_and_depends_on_the_state_if_it_is_to(state_std, monkeypatch):
    setup = toy_setup(monkeypatch, arch="mlp", state_std=state_std)
    params, h = first_runner(setup).params, jax.random.normal(jax.random.PRNGKey(1), (7, 16))

    policy = fast_jit(partial(setup.network.apply, method="policy"))

    def std(params):
        return np.exp(policy(params, h).log_std)

    np.testing.assert_allclose(std(params), np.full((7, 2), 0.7), rtol=0.02)
    steep = std(jax.tree.map(lambda x: x * 500 if x.ndim == 2 else x, params))  # matrices, not the parameter log_std
    assert (np.ptp(steep, axis=0) > 0.1).all() == state_std
    assert steep.min() > 0.0999 and steep.max() < 1.0001
    assert std(jax.tree.map(lambda x: x - 5, params)).min() == pytest.approx(0.1)
    assert std(jax.tree.map(lambda x: x + 5, params)).max() == pytest.approx(1.0)


def test_a_standard_deviation_outside_of_its_bounds_can_come_back(monkeypatch):
    """0.1 and 1 are log deviations of -2.303 and 0. The gradient is there if descent leads inside, further out 0."""
    setup = toy_setup(monkeypatch, arch="mlp")
    params, h = first_runner(setup).params, jnp.zeros((1, 16))

    @fast_jit
    def found_and_gradients(value):
        own = jax.tree_util.tree_map_with_path(
            lambda path, x: jnp.full_like(x, value) if "log_std" in str(path) else x, params
        )
        found, slope = jax.vjp(lambda own: setup.network.apply(own, h, method="policy").log_std[0], own)
        return found, [slope(jnp.full(2, g))[0]["params"]["log_std"] for g in (1.0, -1.0)]

    def log_std(value):
        found, gradients = found_and_gradients(value)
        return found.tolist(), [x.tolist() for x in gradients]  # where descent leads down, then where it leads up

    assert log_std(-2.35) == ([pytest.approx(math.log(0.1))] * 2, [[0.0, 0.0], [-1.0, -1.0]])
    assert log_std(0.02) == ([0.0, 0.0], [[1.0, 1.0], [0.0, 0.0]])
    assert log_std(-0.5) == ([-0.5, -0.5], [[1.0, 1.0], [-1.0, -1.0]])


@pytest.mark.parametrize("state_std", [False, True])
def test_descent_brings_a_standard_deviation_back_from_outside(state_std, monkeypatch):
    """All parameters are free to move, with --state-std those of its head too."""
    setup = toy_setup(monkeypatch, arch="mlp", state_std=state_std)
    params, h = first_runner(setup).params, jax.random.normal(jax.random.PRNGKey(1), (7, 16))
    params = jax.tree_util.tree_map_with_path(lambda p, x: x - 3.0 if "log_std" in str(p) else x, params)

    @fast_jit
    def descend(params):  # towards a deviation of 1/2
        loss = lambda p: jnp.mean((setup.network.apply(p, h, method="policy").log_std + math.log(2)) ** 2)  # noqa: E731
        return jax.tree.map(lambda x, g: x - 0.1 * g, params, jax.grad(loss)(params))

    for _ in range(300):
        params = descend(params)
    np.testing.assert_allclose(setup.network.apply(params, h, method="policy").log_std, -math.log(2), atol=0.05)


def test_the_real_part_of_lambda_stays_negative_and_can_come_back():
    layer = muesli.S5Layer(small_args())
    u, start = jnp.ones((3, 2, 16)), jnp.zeros((3, 2))
    init = fast_jit(partial(layer.init, method="scan"))
    params = init(jax.random.PRNGKey(0), layer.initial_carry(2), u, start)

    @fast_jit
    def growth(value, direction):
        """|Lambda_bar|, and the gradient of Lambda_re for a loss that falls with it (1) or rises (-1)."""
        own = {"params": params["params"] | {"Lambda_re": jnp.full(8, value)}}

        def size(own):
            Lambda_bar = layer.apply(own, method="kernels")[0]
            return jnp.hypot(Lambda_bar[:8], Lambda_bar[8:])

        slope = jax.grad(lambda own: direction * size(own).sum())(own)["params"]["Lambda_re"]
        return size(own), slope

    assert (growth(0.3, 1.0)[0] < 1).all()
    assert (growth(0.3, 1.0)[1] > 0).all() and (growth(0.3, -1.0)[1] == 0).all()  # descent leads back, or further out
    assert (growth(-0.5, 1.0)[1] > 0).all() and (growth(-0.5, -1.0)[1] < 0).all()
    np.testing.assert_array_equal(growth(0.3, 1.0)[0], growth(-1e-4, 1.0)[0])


# ---- number types ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", others_slow(["s5", "lru", "mingru", "lstm", "gru", "attention", "mlp"], "s5"))
def test_all_types_are_declared(arch):
    """With 64-bit types allowed, set-up and update have those of 32 bits all the same, and nothing in between is wider
    than what optax computes from its count of gradient steps."""
    tasks = "Pendulum-v1,MountainCarContinuous-v0"
    setup = muesli.make_setup(small_args(arch=arch, suite="gymnax", tasks=tasks, eval_tasks="none"))
    key = jax.random.PRNGKey(0)
    init, update = partial(muesli.init_runner, setup), partial(muesli.update, setup)
    narrow = jax.eval_shape(init, key)
    with jax.enable_x64(True):
        wide = jax.eval_shape(init, key)
        later, metrics = jax.eval_shape(update, wide)
        text = str(jax.make_jaxpr(update)(wide))
    types = [[(x.shape, x.dtype) for x in jax.tree.leaves(runner)] for runner in (narrow, wide, later)]
    assert types[0] == types[1] == types[2]
    assert {str(x.dtype) for x in jax.tree.leaves(metrics)} == {"float32", "int32"}
    assert "f64[]" in text and "f64[" not in text.replace("f64[]", "")


# ---- losses on a rollout ---------------------------------------------------------------------------------------------


@cache
def one_step(setup):
    """An update of one gradient step, which the target network follows fast."""
    return fast_jit(muesli.update, setup._replace(args=dataclasses.replace(setup.args, **ONE_STEP)))


ONE_STEP = {"num_minibatches": 1, "muesli_target_rate": 0.25}


@pytest.fixture(scope="module")
def learnt():
    """A setup, the runner before its third rollout, that rollout, its targets, and the observations after it; trials
    end within it."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        setup = toy_setup(monkeypatch)
    runner = first_runner(setup)
    update = one_step(setup)
    for _ in range(2):
        runner, _ = update(runner)

    @fast_jit
    def targets(runner):
        runner = runner._replace(world=muesli.open_meta_episodes(setup, jax.random.PRNGKey(5), runner.world))
        later, rollout = muesli.collect_rollout(setup, runner)
        found = muesli.muesli_targets(setup, runner, rollout, later.world.obs, jax.random.PRNGKey(6))
        return runner, rollout, found[0], later.world.obs

    return setup, *targets(runner)


@pytest.mark.parametrize("retrace_q", others_slow([False, True], False))
def test_the_targets_are_those_of_a_plain_loop(learnt, retrace_q):
    """All are the target network's, which steps through the rollout from a carry of its own and sees what follows."""
    setup, runner, rollout, _, last_obs = learnt
    args = dataclasses.replace(setup.args, muesli_retrace_q=retrace_q)
    targets = fast_jit(muesli.muesli_targets, setup._replace(args=args))
    found, after, (square, count), _ = targets(runner, rollout, last_obs, jax.random.PRNGKey(7))

    def call(method):
        return fast_jit(partial(setup.network.apply, runner.target_params, method=method))

    step, head, model, kernels = call("step"), call("value"), call("model"), call("kernels")()
    carry, latents = runner.target_carry, []
    for obs, start in zip(rollout.obs, rollout.start, strict=True):
        carry, h = step(kernels, carry, obs, start)
        latents.append(h)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), after, carry)
    h = jnp.stack(latents)
    _, last = step(kernels, carry, last_obs, jnp.zeros(len(last_obs)))
    value = muesli.expected(head(jnp.concatenate([h, last[None]])))

    def q(h, action):
        h, reward = model(h, action)
        return muesli.expected(reward) + args.gamma * muesli.expected(head(h))

    prior, state_value = call("policy")(h), value[:-1]
    ratio = jnp.exp(prior.log_prob(rollout.action) - rollout.log_prob)
    assert np.ptp(ratio) > 1e-3  # the prior is not the policy that acted
    G = muesli.retrace(args, rollout, value, q(h, rollout.action) if retrace_q else state_value, ratio)
    np.testing.assert_allclose(found.returns, G, atol=1e-4)

    earlier, count_before = runner.advantage_scale
    assert count_before == 2 and count == 3
    expected_square = 0.99 * earlier + 0.01 * np.mean((G - state_value) ** 2)
    assert float(square) == pytest.approx(float(expected_square), rel=1e-4)
    sigma = np.sqrt(expected_square / (1 - 0.99**3))
    np.testing.assert_allclose(found.advantages, (G - state_value) / sigma, atol=1e-3)

    noise = (found.actions - prior.mean[:, :, None]) / np.exp(prior.log_std)[:, :, None]
    assert abs(noise.mean()) < 0.15 and abs(noise.std() - 1) < 0.1  # 640 of them
    advantages = (q(h[:, :, None], found.actions) - state_value[..., None]) / sigma
    np.testing.assert_allclose(found.weights, muesli.cmpo_weights(args, advantages), atol=1e-3)


def test_replay_of_a_rollout_gives_the_log_probs_that_were_acted_with(learnt):
    setup, runner, rollout, _, _ = learnt
    assert rollout.terminated.any() and float(jnp.abs(runner.carry[0]).max()) > 0

    @fast_jit
    def log_prob():
        _, h = setup.network.apply(runner.params, runner.carry, rollout.obs, rollout.start, method="scan")
        return setup.network.apply(runner.params, h, method="policy").log_prob(rollout.action)

    np.testing.assert_allclose(log_prob(), rollout.log_prob, atol=1e-5)


def test_gradients_do_not_reach_the_target_network_which_is_a_moving_average_of_the_parameters(learnt):
    setup, runner, *_ = learnt
    after, _ = one_step(setup)(runner)
    expected = jax.tree.map(lambda new, old: 0.25 * new + 0.75 * old, after.params, runner.target_params)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), after.target_params, expected)


def test_the_model_loss_is_that_of_a_plain_loop(learnt, K=3):
    """State by state and step by step, with a termination inside: value 0 after it, then nothing more is asked."""
    setup, runner, *rest = learnt
    rollout, targets = jax.tree.map(lambda x: x[:, :3], tuple(rest[:2]))
    assert rollout.terminated[:, 1:].any()
    args = dataclasses.replace(setup.args, muesli_unroll=K)
    apply = partial(setup.network.apply, runner.params)
    rollout = rollout._replace(start=rollout.start.at[4, 0].set(1.0))  # a meta-episode that ends within the rollout
    h = jax.random.normal(jax.random.PRNGKey(0), (*rollout.reward.shape, 16))
    found = fast_jit(partial(muesli.model_loss, apply, args))(h, rollout, targets)
    T, B = rollout.reward.shape
    sums = {name: np.zeros(K) for name in found}
    model, value, policy = (fast_jit(partial(apply, method=name)) for name in ("model", "value", "policy"))
    cross_entropy, cmpo_loss = fast_jit(muesli.cross_entropy), fast_jit(muesli.cmpo_loss)
    rollout, targets = jax.tree.map(np.asarray, (rollout, targets))
    for t, b in np.ndindex(T, B):
        z = h[t, b]
        for k in range(1, K + 1):
            if t + k - 1 >= T or (k > 1 and (rollout.start[t + k - 1, b] or rollout.terminated[t + k - 2, b])):
                break
            z, reward = model(z, rollout.action[t + k - 1, b])
            sums["model_reward_loss"][k - 1] += cross_entropy(reward, rollout.reward[t + k - 1, b])
            if t + k >= T or rollout.start[t + k, b]:
                break
            ended = rollout.terminated[t + k - 1, b]
            G = 0.0 if ended else targets.returns[t + k, b]
            sums["model_value_loss"][k - 1] += cross_entropy(value(z), G)
            if not ended:
                own = jax.tree.map(lambda x, t=t + k, b=b: x[t, b], targets)
                sums["model_policy_loss"][k - 1] += cmpo_loss(policy(z), own)
    rewards = sum(total / ((T - k) * B) for k, total in enumerate(sums["model_reward_loss"])) / K
    assert float(found["model_reward_loss"]) == pytest.approx(float(rewards), rel=1e-4)
    for name in ("model_value_loss", "model_policy_loss"):
        total = sum(total / ((T - k - 1) * B) for k, total in enumerate(sums[name])) / K
        assert float(found[name]) == pytest.approx(float(total), rel=1e-4)


def test_the_gradient_is_halved_through_the_models_input(learnt):
    setup, runner, rollout, targets, _ = learnt
    apply, whole = partial(setup.network.apply, runner.params), setup.args
    h = jax.random.normal(jax.random.PRNGKey(0), (*rollout.reward.shape, 16))

    def plain(h):
        z, reward = apply(h, rollout.action, method="model")
        return jnp.mean(muesli.cross_entropy(reward, rollout.reward))

    def halved(h):
        return muesli.model_loss(apply, whole, h, rollout, targets)["model_reward_loss"]

    np.testing.assert_allclose(fast_jit(jax.grad(halved))(h), 0.5 * fast_jit(jax.grad(plain))(h), atol=1e-7)


def test_the_loss_is_the_weighted_sum_of_its_terms_each_of_which_can_be_switched_off(learnt):
    setup, runner, rollout, targets, _ = learnt

    def loss(**coefficients):
        own = setup._replace(args=dataclasses.replace(setup.args, **coefficients))
        return fast_jit(lambda params: muesli.muesli_loss(params, own, runner.carry, rollout, targets))(runner.params)

    total, parts = loss(muesli_pg_coef=0.3, muesli_cmpo_coef=0.7, vf_coef=0.2, muesli_model_coef=2.0, ent_coef=0.1)
    model = sum(value for name, value in parts.items() if name.startswith("model_"))
    terms = (
        0.3 * parts["policy_loss"]
        + 0.7 * parts["cmpo_loss"]
        + 0.2 * parts["value_loss"]
        + 2.0 * model
        - 0.1 * parts["entropy"]
    )
    assert float(total) == pytest.approx(float(terms), abs=1e-4)
    assert float(loss(muesli_pg_coef=0.0, muesli_cmpo_coef=0.0, vf_coef=0.0, muesli_model_coef=0.0)[0]) == 0.0


def test_a_step_that_is_less_likely_now_weighs_less_in_the_policy_gradient(learnt):
    """The weight min(1, pi / pi_b) is a constant: the loss's slope in log pi is -min(1, pi / pi_b) A."""
    setup, runner, rollout, targets, _ = learnt
    only = {"muesli_cmpo_coef": 0.0, "muesli_model_coef": 0.0, "vf_coef": 0.0}
    setup = setup._replace(args=dataclasses.replace(setup.args, **only))
    slope = fast_jit(jax.grad(lambda p, r: muesli.muesli_loss(p, setup, runner.carry, r, targets)[0]))
    once = slope(runner.params, rollout)
    rarer = slope(runner.params, rollout._replace(log_prob=rollout.log_prob + jnp.log(2.0)))  # ratio 1/2
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a / 2, atol=1e-5, rtol=1e-3), once, rarer)
    likelier = slope(runner.params, rollout._replace(log_prob=rollout.log_prob - jnp.log(2.0)))  # ratio 2, weight 1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, atol=1e-5, rtol=1e-3), once, likelier)


# ---- probes with known answers ---------------------------------------------------------------------------------------


def bandit(best):
    """Two arms: a wide one around -0.5 that pays 0.5, a narrower one around ``best`` that pays 1. Nothing else."""

    def step(key, state, action):
        pay = 0.5 * jnp.exp(-8 * (action[0] + 0.5) ** 2) + jnp.exp(-8 * (action[0] - best) ** 2)
        return jnp.ones(1), state, pay, jnp.ones((), bool)

    return muesli.Task("bandit", 1, 1, -1.0, 1.0, True, lambda key: (jnp.ones(1), jnp.zeros(())), step)


@pytest.mark.slow
@pytest.mark.parametrize("off", [{}, {"muesli_pg_coef": 0.0}])
def test_the_better_arm_of_a_continuous_bandit_is_found(toy, off):
    """Every step is a trial of its own; the best mean pays almost 1. With CMPO alone too."""
    flags = {"arch": "mlp", "projection": False, "num_envs": 32, "learning_rate": 3e-3}
    flags |= {"total_timesteps": 300 * 320}
    setup = toy(tasks={"bandit": bandit(0.5)}, **flags | off)
    runner, update = first_runner(setup), jax.jit(partial(muesli.update, setup))
    for _ in range(300):
        runner, metrics = update(runner)
    h = setup.network.apply(runner.params, runner.carry, runner.world.obs[None], jnp.zeros((1, 32)), method="scan")[1]
    mean = setup.network.apply(runner.params, h, method="policy").mean
    assert np.abs(mean - 0.5).max() < 0.2 and metrics["reward_mean"] > 0.6
    assert float(muesli.expected(setup.network.apply(runner.params, h, method="value")).mean()) == pytest.approx(
        float(metrics["reward_mean"]), abs=0.15
    )
