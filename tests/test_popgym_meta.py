"""RandomProjection and the CartPole of many trials: the laws of the projections, every step against a plain Python loop
around the environment without them, and what an agent can and cannot know."""

import csv
import dataclasses
import itertools
import sys
from typing import Any

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import fast_jit, others_slow, run_here, tiny_args, tiny_flags
from gymnax.environments import spaces
from scipy import stats

import popgym_jax
import ppo_s5_popgym as ppo
import s5_common as common
from benchmarks import metacart, metacart_physics, metacart_swap
from popgym_jax import EpisodeStatistics, PreviousActionAndStart, RandomProjection, environment
from popgym_jax.cartpole import PositionOnlyCartPole
from popgym_jax.meta_cartpole import MetaNoisyStatelessCartPole, MetaStatelessCartPole
from popgym_jax.random_projection import random_orthogonal
from popgym_jax.registration import canonical_name

PROJECTED = {  # environment, observation_size, steps: several episodes
    "cards": ("RepeatPreviousEasy", None, 120),
    "cards, narrower": ("CountRecallEasy", 3, 120),
    "cartpole, wider": ("NoisyPositionOnlyCartPoleEasy", 4, 120),
    "torque, wider": ("PositionOnlyPendulumHard", 12, 210),
}


def make(name, **arguments):
    return popgym_jax.make(name, **arguments)[0]


def random_actions(env, *shape):
    """Torques reach beyond their bounds of +-2."""
    rng = np.random.default_rng(0)
    if isinstance(env.action_space(env.default_params), spaces.Box):
        return rng.uniform(-3, 3, (*shape, 1)).astype(np.float32)
    return rng.integers(env.num_actions, size=shape, dtype=np.int32)


def play(env, actions):
    """Raw keys, states before, and what `step` returned; leaves (T, B, ...) for actions (T, B, ...)."""
    steps, copies = actions.shape[:2]

    def step(current, inputs):
        keys, action = inputs
        taken = jax.vmap(env.step)(jax.random.wrap_key_data(keys), current[1], action)
        return taken[:2], (current, taken)

    def run(keys):
        opening = jax.vmap(env.reset)(jax.random.wrap_key_data(keys[0]))
        return jax.lax.scan(step, opening, (keys[1:], actions))[1]

    keys = np.random.default_rng(1).integers(2**32, size=(steps + 1, copies, 2), dtype=np.uint32)
    before, taken = jax.device_get(fast_jit(run)(keys))
    return keys[1:], before, taken


# ---- RandomProjection ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=others_slow(PROJECTED, "cards, narrower"))
def game(request):
    name, size, steps = PROJECTED[request.param]
    plain = make(name)
    env = RandomProjection(plain, size)
    actions = random_actions(plain, steps, 3)
    return plain, env, actions, *play(env, actions)


def test_every_step_is_one_of_the_plain_environment_seen_and_acted_on_through_the_projection(game):
    plain, env, actions, keys, (_, before), (_, _, *outcome, info) = game
    M_o, M_a, params = before.M_o, before.M_a, plain.default_params
    if np.issubdtype(M_a.dtype, np.integer):
        meant = np.take_along_axis(M_a, actions[..., None], -1)[..., 0]
    else:
        meant = np.clip(np.einsum("tbij,tbj->tbi", M_a, actions / 2), -1, 1) * 2
    step = jax.vmap(jax.vmap(lambda *x: plain.step_env(*x, params)))
    obs, _, reward, terminated, _ = fast_jit(step)(jax.random.wrap_key_data(keys), before.env_state, meant)
    np.testing.assert_allclose(info["final_observation"], np.einsum("tbij,tbj->tbi", M_o, obs), atol=1e-5)
    np.testing.assert_allclose(outcome[0], reward, atol=1e-6)
    np.testing.assert_array_equal(outcome[1], terminated)
    space = env.observation_space(params)
    assert space.shape == info["final_observation"].shape[2:]
    assert (np.abs(info["final_observation"]) <= space.high + 1e-6).all()


def test_projection_is_constant_within_an_episode_and_new_in_the_next(game):
    _, _, _, _, (_, before), (_, state, _, terminated, truncated, _) = game
    ended = terminated | truncated
    assert ended.sum() >= 4
    for old, new in ((before.M_o, state.M_o), (before.M_a, state.M_a)):
        same = (old == new).reshape(*ended.shape, -1).all(-1)
        assert same[~ended].all()
    assert not (before.M_o == state.M_o).all((2, 3))[ended].any()
    np.testing.assert_array_equal(state.time, np.where(ended, 0, before.time + 1))


@pytest.mark.parametrize("rows, columns", [(4, 2), (2, 2), (3, 5), (1, 1)])
def test_random_orthogonal_is_orthonormal_and_uniform(rows, columns):
    keys = jax.random.split(jax.random.key(0), 4000)
    Q = np.asarray(fast_jit(jax.vmap(lambda key: random_orthogonal(key, rows, columns)))(keys), np.float64)
    gram = np.swapaxes(Q, 1, 2) @ Q if rows >= columns else Q @ np.swapaxes(Q, 1, 2)
    np.testing.assert_allclose(gram, np.broadcast_to(np.eye(min(rows, columns)), gram.shape), atol=1e-5)
    np.testing.assert_allclose(Q.mean(0), 0, atol=5 / np.sqrt(4000))
    np.testing.assert_allclose((Q**2).mean(0), 1 / max(rows, columns), atol=5 / np.sqrt(4000))
    if (rows, columns) == (2, 2):  # an angle, and whether it is a reflection
        assert stats.kstest(np.arctan2(Q[:, 1, 0], Q[:, 0, 0]), stats.uniform(-np.pi, 2 * np.pi).cdf).pvalue > 1e-3
        assert stats.binomtest(int((np.linalg.det(Q) > 0).sum()), 4000).pvalue > 1e-3


def test_scale_of_the_observations_is_kept_and_cartpoles_is_the_papers():
    """Entries of variance 1 / O; from 2 to 4 features: orthogonal with gain sqrt(2)."""
    for size, features in ((4, 2), (2, 2), (1, 2)):
        env = RandomProjection(PositionOnlyCartPole(), size)
        keys = jax.random.split(jax.random.key(1), 4000)
        M_o = np.asarray(fast_jit(jax.vmap(lambda key, env=env: env.reset(key)[1].M_o))(keys))
        assert M_o.shape == (4000, size, features)
        np.testing.assert_allclose((M_o**2).mean(0), 1 / features, atol=0.03)
        if size == 4:
            gram = np.swapaxes(M_o, 1, 2) @ M_o
            np.testing.assert_allclose(gram, np.broadcast_to(2 * np.eye(2), gram.shape), atol=1e-5)


class ThreeWay(PositionOnlyCartPole):
    """CartPole with a third action, which pushes to the left as well."""

    def action_space(self, params):
        return spaces.Discrete(3)


def test_discrete_actions_are_permuted_uniformly_and_all_stay_reachable():
    def permutations(env):
        keys = jax.random.split(jax.random.key(2), 6000)
        return np.asarray(fast_jit(jax.vmap(lambda key: env.reset(key)[1].M_a))(keys))

    found = permutations(RandomProjection(ThreeWay()))
    np.testing.assert_array_equal(np.sort(found, axis=1), np.broadcast_to(np.arange(3), found.shape))
    counts = [int((found == p).all(1).sum()) for p in itertools.permutations(range(3))]
    assert sum(counts) == 6000 and stats.chisquare(counts).pvalue > 1e-3
    swapped = permutations(RandomProjection(PositionOnlyCartPole()))[:, 0]
    assert stats.binomtest(int(swapped.sum()), 6000).pvalue > 1e-3


class Thrusters(PositionOnlyCartPole):
    """An action of two numbers, in [-1, 3] x [0, 10]."""

    def action_space(self, params):
        return spaces.Box(np.float32([-1, 0]), np.float32([3, 10]), (2,))


def test_continuous_actions_of_the_task_are_all_reachable_from_inside_of_the_bounds_and_clipped_to_them():
    env = RandomProjection(Thrusters())
    params, (low, high) = env.default_params, np.float32([[-1, 0], [3, 10]])
    centre, half = (low + high) / 2, (high - low) / 2
    act = fast_jit(lambda state, action: env.task_action(state, action, params))
    for seed in range(10):
        state = env.reset(jax.random.key(seed))[1]
        for corner in itertools.product(*zip(low, high, strict=True)):
            scaled = np.linalg.solve(state.M_a, (np.float32(corner) - centre) / half)
            assert (np.abs(scaled) <= 1 + 1e-5).all()
            np.testing.assert_allclose(act(state, centre + half * scaled), corner, atol=1e-5)
        beyond = np.asarray(act(state, high + 100))
        assert (beyond >= low).all() and (beyond <= high).all()


def test_torque_keeps_or_changes_its_sign_and_the_whole_range_is_covered():
    env = RandomProjection(make("PositionOnlyPendulumEasy"))
    states = fast_jit(jax.vmap(lambda key: env.reset(key)[1]))(jax.random.split(jax.random.key(3), 2000))
    torques = np.linspace(-3, 3, 13, dtype=np.float32)
    act = jax.vmap(jax.vmap(env.task_action, (None, 0, None)), (0, None, None))
    meant = np.asarray(fast_jit(act)(states, torques[:, None], env.default_params))[..., 0]
    sign = np.sign(meant[:, -1])
    np.testing.assert_allclose(meant, sign[:, None] * np.clip(torques, -2, 2), atol=1e-5)
    assert stats.binomtest(int((sign > 0).sum()), 2000).pvalue > 1e-3


@pytest.mark.parametrize(("task", "kept"), [(ThreeWay(), np.arange(3)), (Thrusters(), np.eye(2))])
def test_actions_stay_as_they_are_where_asked_and_observations_are_projected_as_before(task, kept):
    key = jax.random.key(7)
    env = RandomProjection(task, 5, project_actions=False)
    state = env.reset(key)[1]
    np.testing.assert_array_equal(state.M_a, kept)
    np.testing.assert_array_equal(state.M_o, RandomProjection(task, 5).reset(key)[1].M_o)
    action = np.arange(2, dtype=np.float32) if kept.ndim == 2 else 2
    np.testing.assert_allclose(env.task_action(state, action, env.default_params), action, atol=1e-6)


@pytest.mark.parametrize(("force", "half_length"), [(10.0, 0.5), (25.0, 0.5), (10.0, 1.5)])
def test_cartpole_with_another_push_or_pole_moves_as_gymnasiums_does(force, half_length):
    reference = gymnasium.make("CartPole-v1").unwrapped
    reference.force_mag = force
    reference.length = half_length
    reference.polemass_length = reference.masspole * half_length
    env = PositionOnlyCartPole()
    params = env.default_params.replace(force=force, half_length=half_length)
    step = fast_jit(env.step_env)
    _, state = env.reset_env(jax.random.key(0), params)
    reference.reset(seed=0)
    for action in np.random.default_rng(0).integers(2, size=8):
        reference.state = np.asarray(state.physics, np.float64)
        theirs, *_ = reference.step(int(action))
        _, state, *_ = step(jax.random.key(0), state, action, params)
        np.testing.assert_allclose(state.physics, theirs, atol=1e-5)


class Picture(PositionOnlyCartPole):
    def observation_space(self, params):
        return spaces.Box(0, 1, (4, 4))


class Unbounded(PositionOnlyCartPole):
    def action_space(self, params):
        return spaces.Box(-np.inf, np.inf, (1,))


class Buttons(PositionOnlyCartPole):
    def action_space(self, params):
        return spaces.Dict({"left": spaces.Discrete(2)})


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: RandomProjection(EpisodeStatistics(PositionOnlyCartPole())), "must be the outermost wrapper"),
        (lambda: RandomProjection(PositionOnlyCartPole(), 0), "observation_size must be at least 1, got 0"),
        (lambda: RandomProjection(Picture()), "RandomProjection needs vector observations, Picture has"),
        (lambda: RandomProjection(Unbounded()), "RandomProjection needs bounded actions, Unbounded has none"),
        (lambda: RandomProjection(Buttons()), "RandomProjection cannot project the actions of Buttons"),
        (lambda: MetaStatelessCartPole(num_trials=0), "num_trials must be at least 1, got 0"),
        (lambda: MetaNoisyStatelessCartPole(max_trial_length=0), "max_trial_length must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_built_is_a_value_error(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("name", ["BattleshipEasy", "PositionOnlyPendulumEasy"])
def test_wrapper_keeps_name_parameters_actions_and_cost_of_a_reset(name):
    plain = make(name)
    env = RandomProjection(plain)
    assert isinstance(env, environment.Environment) and env.name == name
    assert env.default_params == plain.default_params and env.num_actions == plain.num_actions
    assert env.costly_reset == plain.costly_reset and env.obs_requires_prev_action == plain.obs_requires_prev_action


# ---- the CartPole of many trials -------------------------------------------------------------------------------------


def test_names():
    assert popgym_jax.meta_envs == ("MetaStatelessCartPole", "MetaNoisyStatelessCartPole")
    name = "MetaNoisyStatelessCartPole"
    assert {canonical_name(spelling) for spelling in ("NoisyMetaStatelessCartPole", name.lower(), name)} == {name}
    assert canonical_name("metastatelesscartpole") == "MetaStatelessCartPole"
    env, params = popgym_jax.make("MetaStatelessCartPole")
    assert env.name == "MetaStatelessCartPole"
    assert (params.num_trials, params.trial.max_steps_in_episode, params.max_steps_in_episode) == (16, 200, 3200)
    assert popgym_jax.make("MetaStatelessCartPole", num_trials=32)[1].max_steps_in_episode == 6400
    assert popgym_jax.make("RepeatPreviousEasy", k=7)[0].k == 7
    with pytest.raises(popgym_jax.UnknownEnvironmentError, match="nearest: MetaStatelessCartPole"):
        popgym_jax.make("MetaStatlessCartPole")


def balancing(state):
    """An action that mostly keeps the pole up, from what no agent sees."""
    x, x_dot, theta, theta_dot = np.moveaxis(np.asarray(state.play.env_state.physics), -1, 0)
    right = theta + 0.3 * theta_dot + 0.05 * x + 0.1 * x_dot > 0
    return np.take_along_axis(np.asarray(state.play.M_a), right.astype(int)[..., None], -1)[..., 0]


@pytest.mark.parametrize("fresh", [True, False])
def test_trials_and_meta_episodes_against_a_plain_python_loop(fresh):
    """Three trials of at most 40 steps; the plain CartPole's own step plays them, and Python counts them. Both ends of
    a trial happen: balanced to its last step, and fallen before."""
    env = MetaStatelessCartPole(num_trials=3, max_trial_length=40, fresh=fresh)
    plain, copies = PositionOnlyCartPole(40), 4
    step, reset = fast_jit(jax.vmap(env.step)), fast_jit(jax.vmap(env.reset))
    plain_step = fast_jit(jax.vmap(lambda *x: plain.step_env(*x, plain.default_params)))
    rng = np.random.default_rng(0)
    obs, state = jax.device_get(reset(jax.random.split(jax.random.key(4), copies)))
    physics, M_o, M_a = state.play.env_state.physics.copy(), state.play.M_o.copy(), state.play.M_a.copy()
    np.testing.assert_allclose(obs[:, :4], np.einsum("bij,bj->bi", M_o, physics[:, ::2]), atol=1e-6)
    np.testing.assert_array_equal(obs[:, 4:], 0)
    first, time, trial = physics.copy(), np.zeros(copies, int), np.zeros(copies, int)
    fallen = balanced = episodes = 0
    for t in range(260):
        good = (trial[:, None] + np.arange(copies)[:, None])[:, 0] % 3 > 0  # balance in some trials, not in others
        action = np.where(good, balancing(state), rng.integers(2, size=copies)).astype(np.int32)
        keys = jax.random.split(jax.random.key(100 + t), copies)
        own = state.play.env_state.replace(physics=physics, time=time.astype(np.int32))
        meant = M_a[np.arange(copies), action]
        seen, after, reward, fell, _ = jax.device_get(plain_step(keys, own, meant))
        obs, state, paid, terminated, truncated, info = jax.device_get(step(keys, state, action))
        final = info["final_observation"]
        time += 1
        np.testing.assert_array_equal(paid, np.float32(1 / 40))
        assert not truncated.any()
        for i in range(copies):
            ended = bool(fell[i]) or time[i] == 40
            trial[i] += ended
            fallen, balanced = fallen + int(fell[i]), balanced + int(ended and not fell[i])
            np.testing.assert_allclose(final[i, 4:], [ended, 1 / 40])
            assert terminated[i] == (trial[i] == 3)
            if not ended:
                physics[i] = after.physics[i]
                np.testing.assert_allclose(final[i, :4], M_o[i] @ seen[i], atol=1e-5)
                np.testing.assert_allclose(state.play.env_state.physics[i], physics[i], atol=1e-5)
            else:
                old, time[i], physics[i] = physics[i].copy(), 0, state.play.env_state.physics[i]
                assert (np.abs(physics[i]) <= 0.05).all()
                if terminated[i]:  # a new meta-episode
                    episodes, trial[i] = episodes + 1, 0
                    assert not (state.play.M_o[i] == M_o[i]).any()
                    M_o[i], M_a[i], first[i] = state.play.M_o[i], state.play.M_a[i], physics[i]
                    np.testing.assert_array_equal(obs[i, 4:], 0)
                else:
                    np.testing.assert_array_equal(obs[i], final[i])
                    assert (physics[i] == first[i]).all() == (not fresh)
                np.testing.assert_allclose(obs[i, :4], M_o[i] @ physics[i, ::2], atol=1e-6)
                assert not np.array_equal(old, physics[i])
            physics[i] = state.play.env_state.physics[i]  # rounding must not add up
            np.testing.assert_array_equal(state.play.M_o[i], M_o[i])
            np.testing.assert_array_equal(state.play.M_a[i], M_a[i])
        np.testing.assert_array_equal(state.trial, trial)
        np.testing.assert_array_equal(state.play.env_state.time, time)
    assert fallen > 5 and balanced > 5 and episodes > 5


def test_first_observations_from_one_start_state_differ_by_the_projection_only():
    """Nothing else of a meta-episode can be read off them, the meaning of the actions least of all."""
    env = MetaStatelessCartPole()
    params = env.default_params
    states = fast_jit(jax.vmap(lambda key: env.reset(key)[1]))(jax.random.split(jax.random.key(5), 4000))
    same = jax.tree.map(lambda x: jnp.broadcast_to(x[0], x.shape), states.play.env_state)
    observe = jax.vmap(lambda key, play: env.env.observe(key, play, None, params.trial))
    obs = observe(jax.random.split(jax.random.key(6), 4000), states.play.replace(env_state=same))
    x_theta = np.asarray(same.physics)[:, ::2]
    np.testing.assert_allclose(obs, np.einsum("bij,bj->bi", states.play.M_o, x_theta), atol=1e-6)
    lengths = np.linalg.norm(obs, axis=1)  # a rotation hides everything but the length
    np.testing.assert_allclose(lengths, np.sqrt(2) * np.linalg.norm(x_theta, axis=1), rtol=1e-4)
    swapped = np.asarray(states.play.M_a)[:, 0] == 1
    for feature in np.asarray(obs).T:
        assert stats.ks_2samp(feature[swapped], feature[~swapped]).pvalue > 1e-3


@pytest.mark.parametrize(
    ("name", "fresh"),
    [
        ("MetaStatelessCartPole", False),
        ("MetaNoisyStatelessCartPole", True),
        pytest.param("MetaStatelessCartPole", True, marks=pytest.mark.slow),
        pytest.param("MetaNoisyStatelessCartPole", False, marks=pytest.mark.slow),
    ],
)
def test_types_spaces_and_vmap(name, fresh):
    env, params = popgym_jax.make(name, num_trials=2, max_trial_length=25, fresh=fresh)
    actions = random_actions(env, 60, 5)
    keys, before, taken = play(env, actions)
    kind = lambda x: (x.shape, x.dtype, x.weak_type)  # noqa: E731
    opening = jax.eval_shape(env.reset, jax.random.key(0), params)
    stepped = jax.eval_shape(env.step, jax.random.key(0), opening[1], actions[0, 0], params)
    assert jax.tree.map(kind, opening) == jax.tree.map(kind, stepped[:2])
    assert not any(x.weak_type for x in jax.tree.leaves(opening))
    assert [kind(x)[:2] for x in stepped[2:5]] == [((), jnp.float32), ((), jnp.bool_), ((), jnp.bool_)]
    space = env.observation_space(params)
    assert space.shape == opening[0].shape == (6,) and taken[0].dtype == np.float32
    assert (taken[0] >= space.low).all() and (taken[0] <= space.high).all()
    assert taken[3].sum() >= 5
    single = fast_jit(env.step)
    for t in range(60):
        for i in (0, 4):
            state = jax.tree.map(lambda x, t=t, i=i: x[t, i], before[1])
            alone = single(jax.random.wrap_key_data(keys[t, i]), state, actions[t, i], params)
            for ours, theirs in zip(jax.tree.leaves(alone), jax.tree.leaves(taken), strict=True):
                np.testing.assert_allclose(ours, theirs[t, i], atol=1e-5)


def test_noise_is_added_before_the_projection():
    keys = jax.random.split(jax.random.key(7), 4000)
    envs = [make("MetaNoisyStatelessCartPole", noise_sigma=sigma) for sigma in (0.0, 0.1)]
    (sharp, _), (blurred, state) = [jax.device_get(fast_jit(jax.vmap(env.reset))(keys)) for env in envs]
    M_o, difference = state.play.M_o, (blurred - sharp)[:, :4]
    noise = np.einsum("bij,bi->bj", M_o, difference) / 2  # M_o^T M_o = 2
    np.testing.assert_allclose(noise.std(0), 0.1, rtol=0.05)
    np.testing.assert_allclose(np.einsum("bij,bj->bi", M_o, noise), difference, atol=1e-5)


def test_start_flag_is_one_where_a_meta_episode_begins_and_not_at_a_trial():
    env = PreviousActionAndStart(MetaStatelessCartPole(num_trials=2, max_trial_length=5))
    _, (obs, _), (_, _, _, terminated, _, _) = play(env, random_actions(env, 30, 2))
    time = np.arange(30)
    np.testing.assert_array_equal(obs[:, :, -1], np.broadcast_to((time % 10 == 0)[:, None], (30, 2)))
    np.testing.assert_array_equal(obs[:, :, 4], np.broadcast_to((time % 10 == 5)[:, None], (30, 2)))
    np.testing.assert_array_equal(terminated, np.broadcast_to((time % 10 == 9)[:, None], (30, 2)))


def test_views_and_statistics():
    env = popgym_jax.to_gymnasium(EpisodeStatistics(MetaStatelessCartPole(num_trials=2, max_trial_length=5)))
    obs, _ = env.reset(seed=0)
    assert env.observation_space.contains(obs) and env.action_space.n == 2
    for _ in range(10):
        obs, reward, terminated, truncated, info = env.step(1)
        assert env.observation_space.contains(obs) and reward == pytest.approx(0.2)
    assert terminated and not truncated
    assert info["episode_return"] == pytest.approx(2) and info["episode_length"] == 10
    envs = popgym_jax.to_gymnasium_vector("MetaStatelessCartPole", 3)
    assert envs.reset(seed=0)[0].shape == (3, 6)
    assert envs.step(np.zeros(3, int))[0].shape == (3, 6)


def returns_by_trial(wiped: bool, trials: int = 5, episodes: int = 256) -> np.ndarray:
    """(episodes, trials) of an agent that balances the pole as if action 1 pushed to the right, and after a trial of
    less than half of the steps believes the contrary; ``wiped`` of its memory, it begins each trial in the same belief.
    It is told how to read its observation (M_o), but nothing of the actions."""
    env = MetaStatelessCartPole(num_trials=trials)

    def step(carry, key):
        obs, state, belief, position, steps, returns = carry
        first = steps == 0
        now = jnp.einsum("bij,bi->bj", state.play.M_o, obs[:, :4]) / 2  # x, theta
        speed = jnp.where(first[:, None], 0.0, (now - position) / 0.02)
        right = now[:, 1] + 0.3 * speed[:, 1] + 0.05 * now[:, 0] + 0.1 * speed[:, 0] > 0
        action = jnp.where(belief, right, ~right).astype(jnp.int32)
        trial, playing = state.trial, ~jnp.isnan(returns[:, -1])
        keys = jax.random.split(key, episodes)
        obs, state, reward, terminated, _, info = jax.vmap(env.step)(keys, state, action)
        returns = returns.at[jnp.arange(episodes), trial].add(jnp.where(playing, reward, 0.0))
        ended, steps = info["final_observation"][:, 4] > 0, steps + 1
        belief = jnp.where(ended & (steps < 100), ~belief, belief) | (ended & wiped)
        # after the first meta-episode its returns are put aside, by a NaN in one more column
        returns = returns.at[:, -1].set(jnp.where(terminated, jnp.nan, returns[:, -1]))
        return (obs, state, belief, now, jnp.where(ended, 0, steps), returns), None

    def run(key):
        obs, state = jax.vmap(env.reset)(jax.random.split(key, episodes))
        start = jnp.ones(episodes, bool), jnp.zeros((episodes, 2)), jnp.zeros(episodes, jnp.int32)
        carry = obs, state, *start, jnp.zeros((episodes, trials + 1))
        return jax.lax.scan(step, carry, jax.random.split(key, 200 * trials))[0][-1]

    returns = np.asarray(fast_jit(run)(jax.random.key(8)))
    assert np.isnan(returns[:, -1]).all()
    return returns[:, :-1]


@pytest.mark.slow
def test_an_agent_wiped_between_trials_does_not_improve_across_them_and_one_that_remembers_does():
    for wiped in (True, False):
        returns = returns_by_trial(wiped)
        gain = returns[:, 1:].mean(1) - returns[:, 0]
        slope = ((np.arange(5) - 2) * returns).sum(1)  # of a line through each meta-episode, in some unit
        scores = [x.mean() / (x.std() / np.sqrt(len(x))) for x in (gain, slope)]
        if wiped:
            assert max(map(abs, scores)) < 4 and 0.4 < returns.mean() < 0.75
        else:
            assert min(scores) > 8 and gain.mean() > 0.3 and returns[:, 2:].mean() > 0.9


# ---- in the script ---------------------------------------------------------------------------------------------------


def small_setup(trials: int, length: int, **flags: Any) -> Any:
    setup = ppo.make_setup(tiny_args(env="MetaStatelessCartPole", eval_episodes=6, **flags))
    env = MetaStatelessCartPole(num_trials=trials, max_trial_length=length)
    return setup._replace(env=env, env_params=env.default_params)


@pytest.mark.slow
def test_evaluation_gives_each_trial_its_own_return():
    """Rebuilt from the steps themselves: the trial-end flag that the agent sees tells where the next trial begins."""
    setup, key = small_setup(4, 60, arch="gru"), jax.random.PRNGKey(3)
    params = fast_jit(ppo.init_runner, setup)(jax.random.PRNGKey(0)).params
    found = np.asarray(fast_jit(ppo.evaluate, setup)(params, key))
    assert found.shape == (6, 4)
    single = setup._replace(args=tiny_args(env="MetaStatelessCartPole", arch="gru", num_envs=6, num_steps=1))
    collect = fast_jit(ppo.collect_rollout, single)
    runner = fast_jit(ppo.init_runner, single)(key)._replace(params=params)
    expected, trial, playing = np.zeros((6, 4)), np.zeros(6, int), np.ones(6, bool)
    while playing.any():
        runner, rollout, _ = collect(runner)
        reward, terminated, obs = jax.device_get((rollout.reward[0], rollout.terminated[0], runner.obs))
        for i in np.flatnonzero(playing):
            expected[i, trial[i]] += reward[i]
            playing[i] = not terminated[i]
            trial[i] += obs[i, 4] > 0
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert len(np.unique(found.round(4))) > 5


def test_a_trial_that_nobody_can_fail_is_worth_one():
    setup = small_setup(3, 5, arch="mlp")
    params = fast_jit(ppo.init_runner, setup)(jax.random.PRNGKey(0)).params
    np.testing.assert_allclose(fast_jit(ppo.evaluate, setup)(params, jax.random.PRNGKey(1)), np.ones((6, 3)), rtol=1e-5)


@pytest.mark.slow
def test_projections_are_changed_where_the_named_trial_begins_and_the_memory_is_kept_or_emptied():
    setup = small_setup(4, 30, arch="gru")
    params = fast_jit(ppo.init_runner, setup)(jax.random.PRNGKey(0)).params
    # an untrained readout hears its memory too little to act otherwise without it
    params = jax.tree.map(lambda x: 3.0 * x, params)

    def played(at, empty):
        return jax.device_get(fast_jit(metacart_swap.play, setup, at, empty)(params, jax.random.PRNGKey(3)))

    unchanged, kept, emptied = played(5, False), played(3, False), played(3, True)
    before = np.cumprod(unchanged.trial < 2, axis=0, dtype=bool)  # not those of the next meta-episode
    for other in (kept, emptied):
        for name in ("angle", "reward", "step"):
            np.testing.assert_array_equal(getattr(other, name)[before], getattr(unchanged, name)[before])
    assert (kept.angle[~before] != unchanged.angle[~before]).any()
    assert (kept.reward != emptied.reward).any()
    returns = metacart_swap.returns_of_trials(kept, 4)
    np.testing.assert_allclose(returns.sum(axis=1), kept.reward.sum(axis=0), rtol=1e-5)
    angles = metacart_swap.angles_of_steps(kept, 1, 3)
    np.testing.assert_allclose(angles[0], np.sqrt(np.mean(kept.angle[0] ** 2)), rtol=1e-5)


@pytest.mark.slow
def test_the_script_trains_evaluates_more_trials_and_draws_several_runs(tmp_path, capsys):
    (tmp_path / "old").mkdir()
    ppo.save_trials(tiny_args(eval=str(tmp_path / "old")), np.ones((1, 4, 18)), beside={})
    flags = {"env": "MetaStatelessCartPole", "total_timesteps": 128, "arch": "mlp", "num_seeds": 2, "run_dir": "a"}
    run_here(ppo.main, *tiny_flags(**flags), cwd=tmp_path)
    run_here(ppo.main, *["--eval", "a", "--eval-trials", "18", "--eval-beside", "old"], cwd=tmp_path)
    for number in (3, -1):
        run_here(ppo.main, *tiny_flags(eval_trials=number, run_dir="none"), cwd=tmp_path, code=2)
    out, err = capsys.readouterr()
    rows = list(csv.DictReader((tmp_path / "a" / "trials_18.csv").open()))
    numbers = [(row["seed"], row["trial"]) for row in rows]
    assert numbers == [(str(seed), str(trial)) for seed in range(2) for trial in range(1, 19)]
    for row in rows:
        assert 0 < float(row["mean_return"]) <= 1 and 0 <= float(row["standard_error"]) < 1
    assert (tmp_path / "a" / "trials_18.png").read_bytes()[1:4] == b"PNG"
    said = next(line for line in out.splitlines() if "seed 1, update 1, 8 episodes" in line)
    total = sum(float(row["mean_return"]) for row in rows[18:])
    assert float(said.split("mean ")[1].split(",")[0]) == pytest.approx(total, abs=1e-3)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert errors[0] == "error: --eval-trials 3: must be 0, as RepeatPreviousEasy has no trials"
    assert "--eval-trials -1" in errors[1] and not (tmp_path / "none").exists()

    run_here(metacart_swap.main, "a", "--episodes", 4, "--out", "swap", cwd=tmp_path)
    rows = list(csv.DictReader((tmp_path / "swap" / "swap.csv").open()))
    assert [(row["memory"], int(row["trial"])) for row in rows[::16]] == [("kept", 1), ("emptied", 1)]
    assert len(rows) == 32 and (tmp_path / "swap" / "swap.png").exists()
    run_here(metacart_swap.main, "a", "--at", 17, cwd=tmp_path, code=2)

    worlds = ["--factors", 1, 4, "--episodes", 4, "--out", "physics"]
    run_here(metacart_physics.main, "a", *worlds, cwd=tmp_path)
    rows = list(csv.DictReader((tmp_path / "physics" / "physics.csv").open()))
    worlds = [(row["run"], row["changed"], row["factor"]) for row in rows]
    assert worlds == [("a", changed, factor) for changed in ("force", "half_length") for factor in ("1.0", "4.0")]
    usual = [row["trials_5_16"] for row in rows if row["factor"] == "1.0"]
    assert usual[0] == usual[1]  # nothing is changed
    assert len({row["trials_5_16"] for row in rows}) == 3
    assert (tmp_path / "physics" / "physics.png").exists()


@pytest.mark.parametrize("variant", metacart.VARIANTS)
def test_variants_of_the_benchmark_change_what_they_are_named_after(variant):
    """A part is left out, or is the only one of the three that is kept."""
    preset = ["--env", "MetaStatelessCartPole", "--preset", "meta"]

    def flags_of(variant):
        return vars(common.parse_args(ppo.Args, ppo.PRESETS, [*preset, *metacart.VARIANTS[variant]]))

    whole, own = flags_of("s5"), flags_of(variant)
    changed = {name for name in whole if own[name] != whole[name]}
    parts = {"discount": "trial_discount", "readout": "readout", "change": "obs_change"}
    what, _, part = variant.partition("-")
    expected = {"no": {parts.get(part)}, "only": set(parts.values()) - {parts.get(part)}}
    expected |= {"none": set(parts.values()), "told": {"aux_coef"}}
    assert changed == expected.get(what, {"arch"} if variant != "s5" else set())


def test_table_of_trials_against_plain_sums_and_missing_tables_before_anything_is_written(tmp_path):
    returns = np.random.default_rng(0).random((2, 5, 3))
    args = tiny_args(eval=str(tmp_path), seed=7)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "trials_3.csv").write_text("no table")
    for other in ("missing", "other"):
        beside = dataclasses.replace(args, eval_beside=(str(tmp_path / other),))
        with pytest.raises(common.UsageError, match="trials_3.csv is no table of trials"):
            ppo.read_trials(beside, 3)
    table = ppo.save_trials(args, returns, beside={})
    beside = ppo.read_trials(dataclasses.replace(args, eval_beside=(str(tmp_path),)), 3)
    rows = beside[str(tmp_path)].reshape(2, 3, 4)
    assert table.with_suffix(".png").exists()
    for s, k in itertools.product(range(2), range(3)):
        own = returns[s, :, k]
        np.testing.assert_allclose(rows[s, k], [7 + s, 1 + k, own.mean(), stats.sem(own)], rtol=1e-6)


def test_list_of_environments_names_these_too(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ppo_s5_popgym.py", "--list-envs"])
    assert ppo.main() == 0
    assert capsys.readouterr().out.split() == [*popgym_jax.registered_envs, *popgym_jax.meta_envs]
