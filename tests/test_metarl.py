"""muesli_s5_metarl.py: tasks, projections and meta-episodes; runs, what they leave and what they refuse."""

import csv
import json
import math
import shutil
import signal
import time
from contextlib import nullcontext
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, TWO_DEVICES, as_flags, assert_refused, fast_jit, finish, quickly, run_here, start_script
from test_muesli import SMALL, first_runner, small_args, toy_setup, walk_step, walk_task

import control_jax
import muesli_s5_metarl as muesli
import s5_common as common

SCRIPT = ROOT / "muesli_s5_metarl.py"
TINY = SMALL | {"eval_episodes": 2, "total_timesteps": 160}  # two updates
FAST = {"s5_fast_weights": 2, "obs_change": 1.0, "scale_obs": True, "state_std": True, "action_repeat": 2}
PENDULUM = {"suite": "gymnax", "tasks": "Pendulum-v1", "projection": False}


def run_script(*flags, cwd, **variables):
    return start_script(*flags, cwd=cwd, program=(str(SCRIPT),), **variables)


# ---- meta-episodes ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[0.0, 2.0], ids=["plain", "obs-change"])
def story(request):
    """Two tasks, four slots each, seen over five rollouts of ten steps: worlds after each step, actions, rewards."""
    walk = walk_task("walk", low=np.float32([-2, -1]), high=np.float32([1, 1.5]))
    tasks = {"walk": walk, "other": walk_task("other", ends=False, low=-1.0, high=1.0)}
    with pytest.MonkeyPatch.context() as monkeypatch:
        setup = toy_setup(monkeypatch, tasks=tasks, action_size=3, obs_size=5, obs_change=request.param)
    world = first_runner(setup).world
    opened = fast_jit(lambda key, world: muesli.open_meta_episodes(setup, key, world))
    step = fast_jit(lambda key, world, action: muesli.step_world(setup, key, world, action))
    worlds, events = [world], [None]
    for t in range(50):
        key = jax.random.PRNGKey(t)
        if t % 10 == 0:
            worlds.append(opened(key, world))
            events.append("open")
        action = jax.random.normal(jax.random.PRNGKey(1000 + t), (8, 3))
        world, *result = step(key, worlds[-1], action)
        worlds.append(world)
        events.append((np.asarray(action), *map(np.asarray, result)))
    return setup, [jax.tree.map(np.asarray, world) for world in worlds], events


def test_meta_episodes_are_those_of_a_plain_loop(story):
    """Projection, clipping, reward, end of a trial and the agent's input, slot by slot, outside of jax."""
    setup, worlds, events = story
    ends = 0
    for before, after, event in zip(worlds, worlds[1:], events[1:], strict=False):
        if event == "open":
            continue
        action, reward, terminated = event
        for slot in range(8):
            task, i = divmod(slot, 4)
            low, high = setup.tasks[task].low, setup.tasks[task].high
            M_o, M_a = (matrix[i] for matrix in before.matrices[task])
            place, steps = (x[i] for x in before.env_state[task])
            native = np.clip((low + high) / 2 + (high - low) / 2 * (M_a @ action[slot]), low, high)
            _, (place, steps), pay, over = walk_step(None, (place, steps), native)
            over = bool(over) and task == 0
            assert reward[slot] == pytest.approx(float(pay), abs=1e-5) and terminated[slot] == over
            now = [x[i] for x in after.env_state[task]]
            if over:  # the next trial: fresh state, same projection, and the agent sees that one ended
                ends += 1
                assert now[1] == 0 and not np.allclose(now[0], place)
                place, steps = now
            np.testing.assert_allclose(now[0], place, atol=1e-5)
            obs = M_o @ [*place, float(steps)]
            change = [] if setup.args.obs_change == 0 else 2.0 * (obs - before.obs[slot, :5]) * (not over)
            seen = np.concatenate([obs, change, [pay, over], action[slot], [0.0]])
            np.testing.assert_allclose(after.obs[slot], seen, atol=1e-5)
            np.testing.assert_array_equal(after.matrices[task][0][i], M_o)
            np.testing.assert_array_equal(after.matrices[task][1][i], M_a)
            assert after.start[slot] == 0 and after.time[slot] == before.time[slot] + 1
    assert ends > 20


def test_projections_are_new_in_each_meta_episode_and_only_there(story):
    """A meta-episode has 20 steps; every second slot began in the middle of its first one."""
    setup, worlds, events = story
    opened = np.zeros(8, int)
    for before, after, event in zip(worlds, worlds[1:], events[1:], strict=False):
        if event != "open":
            continue
        over = before.time >= 20
        opened += over
        for slot in range(8):
            task, i = divmod(slot, 4)
            for old, new in zip(before.matrices[task], after.matrices[task], strict=True):
                assert np.array_equal(old[i], new[i]) != over[slot]
            if over[slot]:
                assert after.time[slot] == 0 and after.start[slot] == 1 and after.so_far[slot] == 0
                assert not after.obs[slot, 5:-1].any() and after.obs[slot, -1] == 1
            else:
                np.testing.assert_array_equal(after.obs[slot], before.obs[slot])
    assert opened.tolist() == [2, 2, 2, 2, 2, 2, 2, 2] or sorted(set(opened.tolist())) == [1, 2]


def test_returns_are_counted_over_whole_meta_episodes_only(story):
    setup, worlds, events = story
    total, whole = np.zeros(8), worlds[0].time == 0
    np.testing.assert_array_equal(worlds[0].whole, whole)
    for before, after, event in zip(worlds, worlds[1:], events[1:], strict=False):
        if event == "open":
            over = before.time >= 20
            total, whole = np.where(over, 0.0, total), whole | over
        else:
            total = total + event[1]
        np.testing.assert_array_equal(after.whole, whole)
        np.testing.assert_allclose(after.so_far[whole], total[whole], atol=1e-4)


@pytest.mark.parametrize("repeat", [2, 3])
def test_an_action_that_is_held_is_the_action_taken_again_until_the_trial_ends(repeat):
    """walk_task ends trials after a few steps, inside and at the end of what is held."""
    task = walk_task()
    keys = jax.random.split(jax.random.PRNGKey(0), 6)
    _, state = jax.vmap(task.reset)(keys)
    hold = fast_jit(lambda keys, state, action: muesli.hold_action(task, repeat, keys, state, action))
    once = fast_jit(jax.vmap(task.step))
    lengths = set()
    for t in range(8):
        action = 0.5 * jax.random.normal(jax.random.PRNGKey(10 + t), (6, 2))
        obs, later, reward, terminated = hold(keys, state, action)
        for slot in range(6):
            now, total, length, over = jax.tree.map(lambda x, slot=slot: x[slot : slot + 1], state), 0.0, 0, False
            while length < repeat and not over:
                seen, now, pay, over = once(keys[slot : slot + 1], now, action[slot : slot + 1])
                total, length, over = total + float(pay[0]), length + 1, bool(over[0])
            lengths.add((length, over))
            assert terminated[slot] == over and reward[slot] == pytest.approx(total, abs=1e-5)
            np.testing.assert_allclose(obs[slot], seen[0], atol=1e-5)
            for found, expected in zip(later, now, strict=True):
                np.testing.assert_allclose(found[slot], expected[0], atol=1e-5)
        _, fresh = jax.vmap(task.reset)(keys)
        state = muesli.select(terminated, fresh, later)
    assert (repeat, False) in lengths and any(over for _, over in lengths)


def test_steps_and_returns_count_every_step_of_a_held_action():
    """A task that pays 1 a step, in meta-episodes of 20 steps: ten actions of two steps each."""
    see = jnp.zeros(3)
    step = lambda key, state, action: (see, state, 1.0, jnp.zeros((), bool))  # noqa: E731
    task = muesli.Task("one", 3, 2, -1.0, 1.0, False, lambda key: (see, jnp.zeros(())), step)
    with pytest.MonkeyPatch.context() as monkeypatch:
        setup = toy_setup(monkeypatch, tasks={"one": task}, arch="mlp", action_repeat=2, num_steps=5)
    assert setup.args.batch_size == setup.args.num_envs * 10 and setup.args.decisions == 10

    @fast_jit
    def roll(runner, key):
        runner = runner._replace(world=muesli.open_meta_episodes(setup, key, runner.world))
        runner, rollout = muesli.collect_rollout(setup, runner)
        return runner, rollout.reward, muesli.return_metrics(setup, runner.world)

    runner = first_runner(setup)
    episodes = 0
    for t in range(4):
        runner, reward, metrics = roll(runner, jax.random.PRNGKey(t))
        assert reward.shape == (5, setup.args.num_envs) and (reward == 1.0).all()  # of a step, in the mean
        assert float(metrics["return_mean"].total) == 20 * int(metrics["episodes"])
        episodes += int(metrics["episodes"])
    assert episodes > 0


@pytest.mark.parametrize(
    ("num_envs", "tasks", "shares"),
    [
        (1024, 6, (176, 176, 168, 168, 168, 168)),
        (96, 6, (16,) * 6),
        (60, 6, (10,) * 6),
        (16, 6, (4, 4, 2, 2, 2, 2)),
        (20, 3, (8, 8, 4)),
        (7, 6, (2, 1, 1, 1, 1, 1)),
        (5, 1, (5,)),
    ],
)
def test_slots_are_shared_out_in_whole_units(num_envs, tasks, shares):
    assert muesli.task_shares(num_envs, tasks) == shares


def test_shares_hold_all_slots_and_differ_by_one_unit_at_most():
    for tasks in range(1, 12):
        for num_envs in range(tasks, 200):
            shares = muesli.task_shares(num_envs, tasks)
            assert sum(shares) == num_envs and len(shares) == tasks and min(shares) > 0
            assert list(shares) == sorted(shares, reverse=True) and shares[0] - shares[-1] in (0, 1, 2, 4, 8)


@pytest.mark.slow
@pytest.mark.parametrize("pays", [(1.0, 0.0), (1.0, 0.0, 2.0)])
def test_no_task_leaks_into_another_ones_slots(pays):
    """Tasks that pay x and show x side by side: each slot keeps its own, always. Three have 4, 2, 2 of 8 slots."""

    def constant(x):
        see = jnp.full(3, x)
        step = lambda key, state, action: (see, state, x, jnp.zeros((), bool))  # noqa: E731
        return muesli.Task(str(x), 3, 2, -1.0, 1.0, False, lambda key: (see, jnp.zeros(())), step)

    with pytest.MonkeyPatch.context() as monkeypatch:
        setup = toy_setup(monkeypatch, tasks={str(x): constant(x) for x in pays}, arch="mlp", action_size=1)
    expected = np.repeat(pays, muesli.task_shares(8, len(pays)))  # of each slot
    runner, update = first_runner(setup), fast_jit(muesli.update, setup)
    for _ in range(5):
        runner, metrics = update(runner)
        obs = np.asarray(runner.world.obs)
        np.testing.assert_array_equal(obs[:, 12], expected)  # the reward
        lengths = np.linalg.norm(obs[:, :12], axis=1)  # of (x, x, x), scaled by sqrt(12 / 3)
        np.testing.assert_allclose(lengths, expected * np.sqrt(12), atol=1e-4)
        ended = (np.asarray(runner.world.time) == 20) & np.asarray(runner.world.whole)
        assert metrics["episodes"] == metrics["return_mean"].number == ended.sum()
        assert float(metrics["return_mean"].total) == 20 * expected[ended].sum()
        for x in pays:
            found = metrics[f"return_{x}"]
            assert found.number == (ended & (expected == x)).sum() and float(found.total) == 20 * x * found.number
    assert ended.any()


@pytest.mark.parametrize("features, actions", [(7, 3), (7, 2), (17, 1)])
def test_projections_have_unit_scale_in_and_full_range_out(features, actions):
    task = walk_task()._replace(obs_size=features, action_size=actions)
    with pytest.MonkeyPatch.context() as monkeypatch:
        setup = toy_setup(monkeypatch)
    keys = jax.random.split(jax.random.PRNGKey(0), 4000)
    M_o, M_a = map(np.asarray, fast_jit(jax.vmap(lambda key: muesli.sample_projection(setup, task, key)))(keys))
    assert M_o.shape == (4000, 12, features) and M_a.shape == (4000, actions, 2)
    x = np.random.default_rng(1).normal(size=(4000, features))
    assert np.mean(np.einsum("bnm,bm->bn", M_o, x) ** 2) == pytest.approx(1.0, abs=0.05)
    # nothing is squeezed: lengths and angles are kept, if there is room for them
    gram = M_o.swapaxes(1, 2) @ M_o / (12 / features) if features <= 12 else M_o @ M_o.swapaxes(1, 2)
    np.testing.assert_allclose(gram, np.broadcast_to(np.eye(gram.shape[1]), gram.shape), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(M_a, axis=2), 1.0, rtol=1e-5)
    if actions == 2:
        np.testing.assert_allclose(np.abs(np.linalg.det(M_a)), 1.0, rtol=1e-5)
    assert np.abs(M_a.mean(axis=0)).max() < 0.06 and np.abs(M_o.mean(axis=0)).max() < 0.06  # no direction is preferred


def test_tasks_that_end_by_themselves_see_done_and_the_memory_goes_on(story):
    setup, worlds, events = story
    place = 11 if setup.args.obs_change else 6
    shown = [
        (after.obs[:, place], event[2]) for after, event in zip(worlds[1:], events[1:], strict=True) if event != "open"
    ]
    for done, terminated in shown:
        np.testing.assert_array_equal(done, terminated)
    assert all(not after.start.any() for after, event in zip(worlds[1:], events[1:], strict=True) if event != "open")


# ---- DeepMind Control, Brax, gymnax ----------------------------------------------------------------------------------


def test_point_mass_hard_pushes_into_directions_that_are_not_parallel():
    task = muesli.make_task(small_args(), "PointMassHard", "tasks")
    reset, step = fast_jit(jax.vmap(task.reset)), fast_jit(jax.vmap(task.step, (None, 0, 0)))
    _, state = reset(jax.random.split(jax.random.PRNGKey(0), 500))
    directions = np.asarray(state.hidden).reshape(500, 2, 2)  # actuator, axis
    np.testing.assert_allclose(np.linalg.norm(directions, axis=2), 1.0, rtol=1e-5)
    cosine = np.einsum("bi,bi->b", directions[:, 0], directions[:, 1])
    assert np.abs(cosine).max() <= 0.9 + 1e-5 and np.abs(cosine).max() > 0.85 and abs(cosine.mean()) < 0.1
    assert np.abs(directions.mean(axis=0)).max() < 0.15
    inside = np.abs(state.physics.position).max(axis=1) < 0.28  # no wall pushes back
    moved = np.asarray(step(None, state, jnp.ones((500, 2)))[1].physics.velocity)[inside]
    # gear 0.1, mass 0.3, damping 1, 0.02 s, damping implicit: the push is along the sum of both directions
    push = directions.sum(axis=1)[inside]
    np.testing.assert_allclose(moved, push * 0.02 * 0.1 / (0.3 + 0.02), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["FingerSpin", "PendulumSwingup"])
def test_the_papers_tasks_are_those_of_control_jax(name):
    """Observation, reward and range of the task are those of the package's own environment, step by step."""
    task = muesli.make_task(small_args(), name, "tasks")
    env, params = control_jax.make(name)
    obs, state = fast_jit(task.reset)(jax.random.PRNGKey(3))
    _, own = fast_jit(env.reset_env)(jax.random.PRNGKey(3), params)
    ours, theirs = fast_jit(task.step), fast_jit(env.step_env)
    for t in range(5):
        action = jnp.full(env.num_actions, 0.7 - 0.3 * t)
        obs, state, reward, terminated = ours(None, state, action)
        own_obs, own, own_reward, *_ = theirs(None, own, action, params)
        np.testing.assert_allclose(obs, own_obs, atol=1e-6)
        assert float(reward) == pytest.approx(float(own_reward)) and not terminated
    assert (task.obs_size, task.action_size) == (len(obs), env.num_actions)
    assert np.all(task.low == -1) and np.all(task.high == 1)


@pytest.mark.slow
@pytest.mark.parametrize(("suite", "name"), [("gymnax", "Pendulum-v1"), ("dmc", "PointMass")])
def test_scaled_features_have_unit_mean_square_under_random_actions(suite, name):
    """In other episodes than those that they were measured in; all else is the task's own."""
    plain = muesli.make_task(small_args(suite=suite), name, "tasks")
    scaled = muesli.make_task(small_args(suite=suite, scale_obs=True), name, "tasks")
    keys = jax.random.split(jax.random.PRNGKey(5), 128)
    rng = np.random.default_rng(6)
    (own, own_state), (obs, state) = (fast_jit(jax.vmap(task.reset))(keys) for task in (plain, scaled))
    step, scaled_step = (fast_jit(jax.vmap(task.step, (0, 0, 0))) for task in (plain, scaled))
    ratios, squares = [], []
    for t in range(200):
        if t % 10 == 0:
            action = rng.uniform(plain.low, plain.high, (128, plain.action_size)).astype(np.float32)
        own, own_state, own_reward, _ = step(keys, own_state, action)
        obs, state, reward, _ = scaled_step(keys, state, action)
        np.testing.assert_array_equal(reward, own_reward)
        ratios.append(np.median(obs / np.where(np.abs(own) > 1e-3, own, np.nan), axis=0))
        squares.append(np.mean(obs**2, axis=0))
    np.testing.assert_allclose(np.mean(squares, axis=0), 1.0, atol=0.35)
    assert np.nanstd(ratios, axis=0).max() < 1e-3  # the same factor at all times


def test_features_are_scaled_by_what_they_are_in_trials_not_by_what_comes_after_an_end():
    """A counter that ends at 5 and would go on: 1, 2, 3, 4, then the next trial's 0."""

    def step(key, count, action):
        return count[None] + 1.0, count + 1.0, jnp.float32(0.0), count + 1.0 >= 5.0

    task = muesli.Task(
        name="Counter",
        obs_size=1,
        action_size=1,
        low=-1.0,
        high=1.0,
        ends=True,
        reset=lambda key: (jnp.zeros(1, jnp.float32), jnp.float32(0.0)),
        step=step,
    )
    obs, *_ = muesli.scaled_task(task).step(None, jnp.float32(0.0), None)
    np.testing.assert_allclose(obs, 1 / np.sqrt((1 + 4 + 9 + 16 + 0) / 5), rtol=1e-4)


@pytest.mark.slow
def test_other_control_tasks_are_playgrounds():
    """As above for a task that only MuJoCo Playground has."""
    from mujoco_playground import dm_control_suite

    task = muesli.make_task(small_args(), "CartpoleSwingupSparse", "tasks")
    env = dm_control_suite.load("CartpoleSwingupSparse", config_overrides={"impl": "jax"})
    obs, state = fast_jit(task.reset)(jax.random.PRNGKey(3))
    own = fast_jit(env.reset)(jax.random.PRNGKey(3))
    ours, theirs = fast_jit(task.step), fast_jit(env.step)
    for t in range(5):
        action = jnp.array([0.7 - 0.3 * t])
        obs, state, reward, terminated = ours(None, state, action)
        own = theirs(own, action)
        np.testing.assert_allclose(obs, own.obs, atol=1e-6)
        assert float(reward) == pytest.approx(float(own.reward)) and not terminated
    assert (task.obs_size, task.action_size) == (5, 1)
    assert np.all(task.low == -1) and np.all(task.high == 1)


# ---- presets ---------------------------------------------------------------------------------------------------------

CUT = {"encoder_layers": (16,), "s5_width": 16, "s5_state": 8, "rnn_width": 16, "num_envs": 5, "num_steps": 10}
CUT |= {"meta_steps": 40, "num_minibatches": 5, "muesli_samples": 2, "muesli_support": 10}


def one_update(args):
    with quickly():
        setup = muesli.make_setup(args)
        runners = muesli.init_runners(setup)
        return muesli.compile_update(setup, runners)(runners)


def presets_with_memories():
    for preset in muesli.PRESETS:
        for arch in ("s5",) if preset == "plain" else ("s5", "lru", "mingru", "lstm", "gru", "attention", "mlp"):
            yield preset, arch


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "arch"), list(presets_with_memories()))
def test_every_preset_goes_through_an_update_with_every_memory(preset, arch, monkeypatch):
    """Two tasks with 3 and 2 slots."""
    tasks = {"one": walk_task("one"), "two": walk_task("two", ends=False)}
    monkeypatch.setattr(muesli, "make_task", lambda args, name, flag: tasks[name])
    flags = as_flags(**CUT, preset=preset, arch=arch, s5_layers=2, tasks="one,two")
    runners, metrics = one_update(common.parse_args(muesli.Args, muesli.PRESETS, flags))
    assert [len(M_o[0]) for M_o, _ in runners.world.matrices] == [3, 2]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((runners.params, metrics)))
    assert float(metrics["first_ratio_error"][0]) < 1e-5 and float(metrics["grad_norm"][0]) > 0


@pytest.mark.slow
def test_the_paper_preset_goes_through_an_update_on_its_six_tasks():
    """With 20 slots instead of 1024; few layers and steps."""
    flags = as_flags(preset="paper", s5_layers=2, **CUT | {"num_envs": 20, "num_steps": 2, "meta_steps": 10})
    runners, metrics = one_update(common.parse_args(muesli.Args, muesli.PRESETS, flags))
    assert [len(M_o[0]) for M_o, _ in runners.world.matrices] == [4, 4, 4, 4, 2, 2]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((runners.params, metrics)))


def test_a_run_of_more_gradient_steps_than_an_integer_holds_begins_with_its_step_size(monkeypatch):
    setup = toy_setup(monkeypatch, arch="mlp", total_timesteps=10**12)
    assert setup.args.num_updates * setup.args.num_minibatches > 2**31
    params = {"x": jnp.zeros(1)}
    change, _ = setup.optimizer.update({"x": jnp.ones(1)}, setup.optimizer.init(params), params)
    assert float(change["x"][0]) == pytest.approx(-setup.args.learning_rate, rel=1e-4)


# ---- held-out tasks that are larger than those trained on ------------------------------------------------------------


def test_without_projections_larger_tasks_of_the_suites_own_are_left_out(monkeypatch, capsys):
    sizes = {"small": (3, 1), "shows more": (12, 1), "takes more": (3, 2), "fits": (2, 1)}
    tasks = {n: walk_task(n)._replace(obs_size=o, action_size=a) for n, (o, a) in sizes.items()}
    monkeypatch.setitem(muesli.SUITES, "dmc", muesli.Suite(("small",), ("shows more", "takes more", "fits")))
    monkeypatch.setattr(muesli, "make_task", lambda args, name, flag: tasks[name])
    for projection, names in ((False, ["small", "fits"]), (True, list(sizes))):
        found = muesli.make_evaluation(muesli.make_setup(small_args(projection=projection)))
        assert [name for name, *_ in found] == names
    _, err = capsys.readouterr()
    what = "shows more has 12 features and 1 actions, takes more has 3 features and 2 actions, more than the 3 and 1"
    assert len(err.splitlines()) == 1 and what in err


@pytest.mark.slow
def test_without_projections_a_larger_task_that_is_named_is_refused(tmp_path, monkeypatch, capsys):
    flags = ["--tasks", "CartpoleSwingup", "--eval-tasks", "FingerTurnEasy", "--no-projection"]
    words = "--eval-tasks FingerTurnEasy: FingerTurnEasy has 12 features and 2 actions, more than the 5 and 1"
    assert_refused(muesli.main, flags, words, tmp_path, monkeypatch, capsys)


def test_an_unknown_task_is_refused_before_the_first_one_is_made(monkeypatch):
    def make_task(*arguments):
        raise AssertionError("made")

    monkeypatch.setattr(muesli, "make_task", make_task)
    for flags, words in (
        ({"eval_tasks": "Nothing"}, "--eval-tasks Nothing: unknown"),
        ({"tasks": ",".join(["Pendulum-v1"] + [f"Task{i}" for i in range(25)])}, "--tasks Task0: unknown"),
    ):
        with pytest.raises(common.UsageError, match=words):
            muesli.train(small_args(**{"suite": "gymnax", "num_envs": 52} | flags))


# ---- runs ------------------------------------------------------------------------------------------------------------


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("suite", "tasks", "held_out"),
    [
        pytest.param("gymnax", "Pendulum-v1", "MountainCarContinuous-v0", marks=pytest.mark.slow),
        pytest.param("dmc", "PendulumSwingup", "PointMassHard", marks=pytest.mark.slow),
        pytest.param("brax", "inverted_pendulum", "fast", marks=pytest.mark.slow),
    ],
)
def test_a_tiny_run_of_each_suite(suite, tasks, held_out, tmp_path, capsys):
    flags = TINY | {"arch": "mlp", "scale_obs": True, "suite": suite, "tasks": tasks, "eval_tasks": held_out}
    flags = as_flags(**flags, run_dir="run")
    run_here(muesli.main, *flags, cwd=tmp_path)
    out = capsys.readouterr().out
    run, names = tmp_path / "run", [*tasks.split(","), held_out]
    rows, columns = read(run / "evaluation.csv"), read(run / "metrics.csv")[-1]
    assert [row["task"] for row in rows] == names and rows[-1]["split"] == "held out"
    assert all(np.isfinite(float(row["return_mean"])) for row in rows)
    assert f"return_{names[0]}" in columns and f"return_{held_out}" not in columns  # never trained on
    assert all(name in out for name in names)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["script"] == "muesli_s5_metarl" and summary["env_steps"] == 160
    assert {path.name for path in run.iterdir()} >= {"evaluation.png", "learning_curve.png", "args.json"}


OWN_TASKS = """
import gymnax, jax.numpy as jnp
from gymnax.environments import spaces
from gymnax.environments.classic_control.pendulum import Pendulum

class Two(Pendulum):  # shows the two actions that it gets
    name = "Two"
    actions = spaces.Box(jnp.array([[-1.0, 0.0]]), jnp.array([[3.0, 10.0]]), (1, 2))

    def step_env(self, key, state, action, params):
        _, state, *others = super().step_env(key, state, action[0, 0], params)
        return action[0], state, *others

    def reset_env(self, key, params):
        return jnp.zeros(2), super().reset_env(key, params)[1]

    def action_space(self, params):
        return self.actions

class Unbounded(Two):
    actions = spaces.Box(-jnp.inf, jnp.inf, (2,))

class Unsteppable:
    reset_env = step = action_space = name = None

def pendulum(): return gymnax.make("Pendulum-v1")
def same(): return gymnax.make("Pendulum-v1")
def cartpole(): return gymnax.make("CartPole-v1")
def two(): return Two(), Two().default_params
def unbounded(): return Unbounded(), Two().default_params
def unsteppable(): return Unsteppable(), None
"""


@pytest.fixture
def own_tasks(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("modules")
    (folder / "own_tasks.py").write_text(OWN_TASKS)
    monkeypatch.syspath_prepend(folder)


@pytest.mark.slow
def test_tasks_of_ones_own_are_trained_evaluated_and_called_by_their_names(own_tasks, tmp_path, capsys):
    flags = TINY | {"arch": "mlp", "suite": "own", "tasks": "own_tasks:pendulum", "eval_tasks": "own_tasks:two"}
    run_here(muesli.main, *as_flags(**flags, run_dir="run"), cwd=tmp_path)
    assert capsys.readouterr().err == ""
    rows = read(tmp_path / "run" / "evaluation.csv")
    assert [(row["task"], row["split"]) for row in rows] == [("Pendulum-v1", "train"), ("Two", "held out")]
    assert all(np.isfinite(float(row["return_mean"])) for row in rows)
    assert "return_Pendulum-v1" in read(tmp_path / "run" / "metrics.csv")[-1]


def test_an_own_task_gets_actions_of_its_own_shape_and_bounds(own_tasks):
    task = muesli.make_task(small_args(suite="own", tasks="own_tasks:two"), "own_tasks:two", "tasks")
    assert (task.name, task.obs_size, task.action_size, task.ends) == ("Two", 2, 2, True)
    np.testing.assert_array_equal([task.low, task.high], [[-1, 0], [3, 10]])
    _, state = task.reset(jax.random.PRNGKey(0))
    obs, _, reward, terminated = task.step(jax.random.PRNGKey(1), state, jnp.array([0.5, 7.0]))
    assert obs.tolist() == [0.5, 7.0] and reward.shape == terminated.shape == ()


@pytest.mark.parametrize(
    ("tasks", "held_out", "words"),
    [
        ("", "", "--suite own: needs --tasks PACKAGE.MODULE:FACTORY"),
        ("Pendulum-v1", "", "--tasks Pendulum-v1: must be PACKAGE.MODULE:FACTORY with --suite own"),
        ("nowhere:make", "", "--tasks nowhere:make: No module named 'nowhere'"),
        ("own_tasks:pendulum", "own_tasks:none", "--eval-tasks own_tasks:none: module 'own_tasks' has no attribute"),
        ("own_tasks:unsteppable", "", "--tasks own_tasks:unsteppable: the environment has no step_env"),
        ("own_tasks:cartpole", "", "--tasks own_tasks:cartpole: actions must be continuous, not Discrete"),
        ("own_tasks:unbounded", "", "--tasks own_tasks:unbounded: actions must have bounds, not Box"),
        ("own_tasks:pendulum", "own_tasks:same", "--suite own: two tasks have the name Pendulum-v1"),
    ],
)
def test_own_tasks_that_do_not_fit_are_refused(tasks, held_out, words, own_tasks, tmp_path, monkeypatch, capsys):
    flags = as_flags(**SMALL, suite="own", tasks=tasks, eval_tasks=held_out)
    assert_refused(muesli.main, flags, words, tmp_path, monkeypatch, capsys)


def test_own_tasks_have_no_list(tmp_path, monkeypatch, capsys):
    flags = ["--suite", "own", "--tasks", "own_tasks:pendulum", "--list-envs"]
    assert_refused(muesli.main, flags, "--suite own: has no list", tmp_path, monkeypatch, capsys)


@pytest.mark.slow
def test_the_benchmark_of_single_tasks_trains_each_once_and_leaves_table_and_picture(tmp_path):
    flags = as_flags(**TINY | {"total_timesteps": 640, "action_repeat": 1})
    own = ("--tasks", "PointMass", "PendulumSwingup", "--out", "out")
    benchmark = str(ROOT / "benchmarks" / "control_ceiling.py")
    tables = []
    for _ in range(2):
        out, _ = finish(start_script(*own, "--", *flags, cwd=tmp_path, program=(benchmark,)))
        tables.append(read(tmp_path / "out" / "ceiling.csv"))
    assert "update 8 of 8" not in out  # the second time nothing is trained
    assert tables[0] == tables[1] and [row["task"] for row in tables[0]] == ["PointMass", "PendulumSwingup"]
    for row in tables[0]:
        assert int(row["frames"]) == 640 and 0 < int(row["frames_to_95_percent"]) <= 640
        summary = json.loads((tmp_path / "out" / row["task"] / "summary.json").read_text())
        assert float(row["return_mean"]) == pytest.approx(summary["return_train"], abs=0.06)
    assert (tmp_path / "out" / "ceiling.png").exists()


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_and_can_be_evaluated(tmp_path):
    """Evaluations in between included, although their table is damaged. Several seeds; a task whose state has parts
    without elements is stored too."""
    own = {"total_timesteps": 160 * 30, "eval_interval": 7, "num_seeds": 2, "checkpoint_interval": 4}
    flags = as_flags(**TINY | PENDULUM | FAST | own)
    finish(run_script(*flags, "--run-dir", "whole", cwd=tmp_path))
    cut = run_script(*flags, "--run-dir", "cut", cwd=tmp_path)  # what it needs is compiled already
    while not (tmp_path / "cut" / "metrics.csv").exists() or len(read(tmp_path / "cut" / "metrics.csv")) < 20:
        assert cut.poll() is None, "ended before it could be stopped"
        time.sleep(0.01)
    cut.send_signal(signal.SIGTERM)
    cut.communicate(timeout=120)
    assert cut.returncode == 143
    with (tmp_path / "cut" / "evaluation.csv").open("ab") as table:
        table.write(b"1,80,0,Pend" + bytes(40))
    _, err = finish(run_script("--resume", "cut", cwd=tmp_path))
    assert "warning" not in err  # nothing is missing
    for name in ("metrics.csv", "evaluation.csv"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()
    out, _ = finish(run_script("--eval", "whole", "--eval-episodes", "3", cwd=tmp_path))
    assert out.count("Pendulum-v1") == 2 and len(read(tmp_path / "whole" / "eval.csv")) == 4


def same_tables(ours, theirs):
    for name in ("metrics.csv", "evaluation.csv"):
        for row, other in zip(read(ours / name), read(theirs / name), strict=True):
            for column in row.keys() - {"task", "split"}:
                if row[column] or other[column]:
                    assert float(row[column]) == pytest.approx(float(other[column]), rel=1e-3, abs=1e-4), column


@pytest.mark.slow
def test_two_devices_give_the_metrics_and_the_evaluation_of_one_and_each_goes_on_with_the_others_run(tmp_path):
    """A run is cut by taking its newest checkpoint away."""
    own = {"total_timesteps": 160 * 6, "num_seeds": 2, "checkpoint_interval": 3}
    flags = as_flags(**TINY | PENDULUM | FAST | own)
    one = run_script(*flags, "--run-dir", "one", cwd=tmp_path)
    two = run_script(*flags, "--run-dir", "two", "--num-devices", 2, cwd=tmp_path, XLA_FLAGS=TWO_DEVICES)
    for process in (one, two):
        finish(process)
    same_tables(tmp_path / "two", tmp_path / "one")
    for name in ("one", "two"):
        shutil.copytree(tmp_path / name, tmp_path / f"{name} again")
        shutil.rmtree(tmp_path / f"{name} again" / "checkpoints" / "6")
    more = run_script("--resume", "one again", "--num-devices", 2, cwd=tmp_path, XLA_FLAGS=TWO_DEVICES)
    less = run_script("--resume", "two again", "--num-devices", 1, cwd=tmp_path)
    for process in (more, less):
        finish(process)
    for name in ("one", "two"):
        same_tables(tmp_path / f"{name} again", tmp_path / name)
    out, _ = finish(run_script("--eval", "two", cwd=tmp_path))  # a machine with one device
    assert out.count("Pendulum-v1") == 2
    ours, theirs = read(tmp_path / "two" / "eval.csv"), read(tmp_path / "one" / "evaluation.csv")
    returns = [[float(row["return_mean"]) for row in rows] for rows in (ours, theirs)]
    assert returns[0] == pytest.approx(returns[1], rel=1e-3)


# ---- the table of evaluations ----------------------------------------------------------------------------------------


def evaluated_run(path, done=6):
    """A run's directory after 6 of 8 updates, evaluated at each second one: two tasks, two seeds."""
    args = small_args(total_timesteps=640, eval_interval=2, num_seeds=2, tasks="a", eval_tasks="b")
    path.mkdir()
    (path / "args.json").write_text(json.dumps({"args": vars(args)}))
    run = SimpleNamespace(path=path, done=0, writes=True, seeds=range(2), flags=args)
    evaluation = [("a", "train", None), ("b", "held out", None)]
    table = muesli.EvaluationTable(run, evaluation)
    for update in (2, 4, 6):
        table.add(evaluation_of(update))
    run.done = done
    return run, evaluation


def evaluation_of(update):
    rows = []
    for name, split in (("a", "train"), ("b", "held out")):
        for seed in range(2):
            row = {"update": update, "env_steps": 80 * update, "seed": seed, "task": name, "split": split}
            row |= {"return_mean": 10.0 * update + seed, "return_se": 0.5} | {f"reward_{n}": 0.1 * n for n in range(10)}
            rows.append(row)
    return rows


def test_evaluations_are_appended_and_the_newest_is_drawn(tmp_path, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(common, "draw", lambda plot, runs, picture: drawn.append((*runs.values(), picture.name)))
    run, evaluation = evaluated_run(tmp_path / "run")
    table = tmp_path / "run" / "evaluation.csv"
    text = table.read_bytes()
    file = table.stat().st_ino
    again = muesli.EvaluationTable(run, evaluation)
    assert table.read_bytes() == text and table.stat().st_ino != file  # written anew, once
    file = table.stat().st_ino
    again.add(evaluation_of(8))
    assert table.read_bytes().startswith(text) and table.stat().st_ino == file
    assert len(read(table)) == 16 and b"\r" not in table.read_bytes()
    assert [({row["update"] for row in rows}, name) for rows, name in drawn] == [
        ({update}, "evaluation.png") for update in (2, 4, 6, 8)
    ]
    assert again.mean_return("train") == 80.5 and again.mean_return("held out") == 80.5
    assert capsys.readouterr().err == ""


DAMAGE = {  # what is done to the table, rows that are left up to update 6 and up to update 4, of 12 and 8
    "a cut last line": (lambda text: text[:-7], 11, 8),
    "40 NUL bytes in the place of its end": (lambda text: text[:-40] + bytes(40), 11, 8),
    "a cut line in the middle": (lambda text: text.replace(b"\n4,320,1,a", b"\n4,3", 1), 11, 7),
    "an empty file": (lambda text: b"", 0, 0),
    "no header": (lambda text: text.split(b"\n", 1)[1], 11, 7),
    "no file": (None, 0, 0),
    "what no text holds": (lambda text: text + b"\xff\xfe\x00" * 9, 12, 8),
}


@pytest.mark.parametrize("done", [6, 4])
@pytest.mark.parametrize("kind", list(DAMAGE))
def test_a_damaged_table_keeps_what_is_whole_and_says_what_is_missing(kind, done, tmp_path, monkeypatch, capsys):
    damage, *left = DAMAGE[kind]
    monkeypatch.setattr(common, "draw", lambda *_: None)
    run, evaluation = evaluated_run(tmp_path / "run", done)
    table = tmp_path / "run" / "evaluation.csv"
    before = read(table)
    if damage:
        table.write_bytes(damage(table.read_bytes()))
    else:
        table.unlink()
    capsys.readouterr()
    again = muesli.EvaluationTable(run, evaluation)
    again.add(evaluation_of(8))
    due, kept = (12, left[0]) if done == 6 else (8, left[1])
    err = capsys.readouterr().err
    if kept == due:
        assert err == ""
    else:
        assert len(err.splitlines()) == 1 and f"{due - kept} of {due} rows" in err
    rows = read(table)
    assert len(rows) == kept + 4 and all(row in before for row in rows[:kept]) and rows[-1]["update"] == "8"
    assert b"\0" not in table.read_bytes()


def test_a_run_without_evaluations_says_nothing_and_has_no_mean(tmp_path, capsys):
    args = small_args(tasks="a", eval_tasks="b")
    (tmp_path / "args.json").write_text(json.dumps({"args": vars(args)}))
    run = SimpleNamespace(path=tmp_path, done=3, writes=True, seeds=range(1), flags=args)
    table = muesli.EvaluationTable(run, [("a", "train", None)])
    assert table.mean_return("train") is None and table.mean_return("held out") is None
    assert capsys.readouterr().err == "" and not (tmp_path / "evaluation.csv").exists()


def test_a_simulation_that_diverged_leaves_empty_fields(tmp_path, capsys):
    rewards = np.ones((1, 20, 3))
    rewards[0, 12, 1] = np.nan
    rows = muesli.evaluation_rows(small_args(), [("a", "train", lambda params: rewards)], 1, None)
    assert (rows[0]["return_mean"], rows[0]["reward_6"], rows[0]["reward_0"]) == ("", "", 1.0)
    muesli.print_evaluation(rows)
    muesli.plot_evaluations({"run": rows}, tmp_path / "picture.png")
    assert "nan" not in capsys.readouterr().out.lower() and (tmp_path / "picture.png").exists()


# ---- what jax can be told --------------------------------------------------------------------------------------------

CAR = {"suite": "gymnax", "tasks": "MountainCarContinuous-v0", "meta_steps": 10}  # the suite holds none out beside it


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["s5", pytest.param("lstm", marks=pytest.mark.exhaustive)])
def test_64_bit_types_and_the_search_for_nan_change_nothing(arch, tmp_path):
    own = {"arch": arch, "total_timesteps": 480, "meta_steps": 20, "eval_interval": 1}
    flags = as_flags(**TINY | CAR | FAST | own)
    for name, switch in (("plain", nullcontext()), ("nan", jax.debug_nans(True)), ("wide", jax.enable_x64(True))):
        with switch:
            run_here(muesli.main, *flags, "--run-dir", name, cwd=tmp_path)
    for table in ("metrics.csv", "evaluation.csv"):
        text = (tmp_path / "plain" / table).read_text()
        assert "nan" not in text and text == (tmp_path / "nan" / table).read_text()
        for ours, theirs in zip(read(tmp_path / "wide" / table), read(tmp_path / "plain" / table), strict=True):
            for column in ours.keys() - {"task", "split"}:
                assert bool(ours[column]) == bool(theirs[column])
                if ours[column]:
                    assert float(ours[column]) == pytest.approx(float(theirs[column]), rel=1e-5, abs=1e-5), column


@pytest.mark.slow
def test_it_runs_without_compilation(tmp_path):
    own = {"arch": "mlp", "num_envs": 2, "num_steps": 2, "num_minibatches": 1, "muesli_samples": 1}
    flags = as_flags(**TINY | CAR | own | {"total_timesteps": 4})
    with jax.disable_jit():
        run_here(muesli.main, *flags, "--run-dir", "run", cwd=tmp_path)
    assert [row["update"] for row in read(tmp_path / "run" / "metrics.csv")] == ["1"]


@pytest.mark.slow
def test_without_noise_an_evaluation_acts_with_the_means_of_the_policy(monkeypatch):
    setup = toy_setup(monkeypatch, eval_noise=0.0, eval_episodes=3)
    runner = first_runner(setup)
    play = fast_jit(lambda params, noise: muesli.collect_rollout(setup, runner._replace(params=params), noise)[1])
    loud = jax.tree_util.tree_map_with_path(lambda path, x: x + 1 if "log_std" in str(path) else x, runner.params)
    assert jnp.array_equal(play(runner.params, 0.0).action, play(loud, 0.0).action)
    assert not jnp.array_equal(play(runner.params, 1.0).action, play(loud, 1.0).action)
    evaluate = fast_jit(lambda params: muesli.evaluate(setup, setup.tasks[0], params, jax.random.PRNGKey(1)))
    assert jnp.array_equal(evaluate(runner.params), evaluate(loud))


def test_empty_arrays_are_left_out_of_a_checkpoint_and_come_back(tmp_path):
    state = {"a": jnp.zeros((3, 0)), "b": (jnp.ones(2), None)}
    assert list(common.stored(state)) == ["b.0"]
    (tmp_path / "checkpoints").mkdir()
    run = common.RunDirectory(small_args(eval=str(tmp_path)), "", "")
    run.began = 0.0
    run.save(state)
    back = run.restore(jax.tree.map(jnp.zeros_like, state))
    assert jax.tree.structure(back) == jax.tree.structure(state)
    assert back["a"].shape == (3, 0) and back["b"][0].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--suite", "gymnax", "--tasks", "CartPole-v1"], "--tasks CartPole-v1: unknown; must be of Pendulum-v1"),
        (["--suite", "brax", "--tasks", "swimmer"], "--tasks swimmer: fails under this version of jax"),
        (["--suite", "atari"], "atari"),
        (["--tasks", "PointMass,PointMass"], "names a task twice"),
        (["--tasks", "PointMass", "--eval-tasks", "PointMass"], "--eval-tasks PointMass: PointMass is trained on"),
        (["--num-envs", "95"], "--num-envs 95: must be a multiple of"),
        (["--num-envs", "5", "--num-minibatches", "1"], "--num-envs 5: must be at least 1 for each of 6 tasks"),
        (
            ["--num-minibatches", "1", "--num-devices", "3"],
            "--num-devices 3: must divide 16, the slots of a task with --num-envs 96",
        ),
        (["--meta-steps", "9", "--num-steps", "9"], "--meta-steps 9: must be at least 10"),
        (["--eval-tasks", "PointMass2"], "--eval-tasks PointMass2: unknown; must be of"),
        (["--num-steps", "300"], "--num-steps 300: must divide --meta-steps 1000"),
        (["--muesli-unroll", "125"], "--muesli-unroll 125: must be below --num-steps 125"),
        (["--gamma", "1.5"], "--gamma 1.5: must be at least 0 and at most 1"),
        (["--s5-dt-min", "1"], "--s5-dt-min 1.0: must be at most --s5-dt-max"),
        (["--s5-fast-weights", "3"], "--s5-fast-weights 3: must be even"),
        (["--obs-change", "-1"], "--obs-change -1.0: must be at least 0"),
        (["--arch", "transformer"], "transformer"),
        (["--resume", "nowhere"], "nowhere: not a run directory"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(flags, words, tmp_path, monkeypatch, capsys):
    assert_refused(muesli.main, flags, words, tmp_path, monkeypatch, capsys)


def test_the_paper_preset_is_the_papers_table():
    args = muesli.Args(**muesli.PRESETS["paper"])
    args.check()
    assert (args.learning_rate, args.vf_coef, args.muesli_model_coef, args.muesli_unroll) == (3e-4, 1.0, 3.0, 1)
    assert (args.encoder_layers, args.num_envs, args.gamma, args.num_steps) == ((512, 512), 1024, 0.995, 1000)
    assert (args.total_timesteps, args.rnn_width, args.obs_size, args.action_size) == (2 * 10**9, 512, 12, 2)
    assert (args.s5_layers, args.s5_width, args.s5_dt_min, args.s5_dt_max) == (10, 256, 0.001, 0.1)
    assert (args.num_minibatches, args.update_epochs, args.meta_steps) == (64, 1, 1000)
    rollouts = math.ceil(50e6 / args.batch_size)
    assert rollouts * args.num_minibatches * args.update_epochs == 3136  # gradient steps in 50e6 frames


@pytest.mark.parametrize("suite", ["dmc", "brax"])
def test_the_suites_lists_are_disjoint_and_known(suite):
    train, held_out = muesli.task_names(small_args(suite=suite))
    known = muesli.environments(small_args(suite=suite))
    assert not set(train) & set(held_out) and set(train + held_out) <= set(known)
