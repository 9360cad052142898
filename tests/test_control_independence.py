"""No two random quantities of a control task, or of a run on it, that ought to be independent are correlated.

A key that is drawn from and split as well, or split here and folded into there, makes one quantity a function of
another.
"""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import fast_jit
from independence import correlated_pairs
from test_muesli import first_runner, small_args, toy_setup

import muesli_s5_metarl as muesli

TASKS = [(suite, name) for suite, lists in muesli.SUITES.items() for names in lists for name in names]


# ---- resets of the tasks ---------------------------------------------------------------------------------------------


def drawn_by_reset(suite, name, state):
    """What a reset draws, by name; the parts of one draw have one name."""
    if suite == "gymnax":
        return {part: getattr(state, part) for part in ("theta", "theta_dot", "position") if hasattr(state, part)}
    if suite == "dmc":
        position, velocity = state.physics.position, state.physics.velocity
        drawn = {"hidden": state.hidden}
    else:
        position, velocity = state.pipeline_state.q, state.pipeline_state.qd
        drawn = {}
        if name == "reacher":  # its target is a pair of joints
            drawn["target"] = position[2:]
            position = position[:2]
    if name in DRAWN_TOGETHER:
        return drawn | {"position": position}
    drawn |= {f"position {i}": position[i] for i in range(len(position))}
    drawn |= {f"velocity {i}": velocity[i] for i in range(len(velocity))}
    return drawn


def correlated_starts(suite, name, task, draws=4_000):
    """Pairs of what a task's resets draw that are correlated, as they are or squared, as an angle with its cosine."""
    drawn = fast_jit(jax.vmap(lambda key: drawn_by_reset(suite, name, task.reset(key)[1])))
    columns = {}
    for part, values in drawn(jax.random.split(jax.random.PRNGKey(0), draws)).items():
        values = np.asarray(values, np.float64)
        columns[part] = np.stack([values, (values - values.mean(axis=0)) ** 2], axis=-1)
    return correlated_pairs({part: values for part, values in columns.items() if values.size})


# drawn again until nothing touches: they depend on each other, as in dm_control (test_control_equality.py)
DRAWN_TOGETHER = ("BallInCup", "FingerSpin", "FingerTurnHard", "FingerTurnEasy")
LONG_TO_COMPILE = ("reacher", "hopper", "inverted_pendulum", "inverted_double_pendulum")


def as_parameter(suite, name):
    marks = [pytest.mark.slow] if name in LONG_TO_COMPILE else []
    return pytest.param(suite, name, marks=marks, id=name)


@pytest.mark.parametrize(("suite", "name"), [as_parameter(*task) for task in TASKS])
def test_positions_velocities_and_hidden_draws_of_a_reset_are_independent(suite, name):
    task = muesli.make_task(small_args(suite=suite, tasks=name, eval_tasks="none"), name, "tasks")
    assert correlated_starts(suite, name, task) == []


@pytest.mark.parametrize("draw", ["directions", "target"])
def test_a_key_that_is_split_and_folded_into_is_found(draw):
    """As PointMassHard once did it here, and an angle whose cosine alone is kept."""

    def reset(key):
        place = jax.random.uniform(jax.random.split(key)[1], (2,), minval=-1.0, maxval=1.0)
        turn = jax.random.uniform(jax.random.fold_in(key, 1), (3,))
        target = jnp.cos(2 * jnp.pi * turn[:1]) if draw == "target" else jnp.zeros(0)
        physics = SimpleNamespace(position=place, velocity=jnp.zeros(2))
        return place, SimpleNamespace(physics=physics, hidden=turn if draw == "directions" else target)

    task = muesli.Task("planted", 2, 2, -1.0, 1.0, False, reset, None)
    pairs = correlated_starts("dmc", "planted", task)
    assert {part.split("[")[0] for part in pairs[0][:2]} <= {"hidden", "position 0", "position 1"}
    assert "hidden" in f"{pairs[0][0]} {pairs[0][1]}" and abs(pairs[0][2]) > 0.9


# ---- the keys of a run -----------------------------------------------------------------------------------------------


def noisy_task(name):
    """Start, reward of each step and, as every trial ends after two steps, the next start: all drawn from the keys."""

    def reset(key):
        place = jax.random.uniform(key, (3,))
        return place, (place, jnp.zeros((), jnp.int32))

    def step(key, state, action):
        place, time = state
        return place, (place, time + 1), jax.random.uniform(key), time + 1 >= 2

    return muesli.Task(name, 3, 2, -1.0, 1.0, True, reset, step)


def drawn_by_a_run(monkeypatch):
    """What two seeds draw for 10,000 slots of each of two tasks at their beginning, and one of them in an update.
    With as many slots, projections drawn at once for both tasks would also block each other: see once_computed."""
    names = ("one", "two")
    flags = {"arch": "mlp", "num_envs": 20_000, "num_steps": 2, "meta_steps": 10, "muesli_samples": 2}
    setup = toy_setup(monkeypatch, tasks={name: noisy_task(name) for name in names}, **flags)
    inner = []
    plain = muesli.muesli_targets

    def watched(setup, first, rollout, *rest):
        found = plain(setup, first, rollout, *rest)
        inner.append((first.world, rollout, found[0]))
        return found

    monkeypatch.setattr(muesli, "muesli_targets", watched)

    @fast_jit
    def whole(runner):
        over = runner._replace(world=runner.world._replace(time=jnp.full(20_000, 10, jnp.int32)))
        later, _ = muesli.update(setup, over)
        return later.world, *inner[-1]

    runner, other = first_runner(setup, seed=0), first_runner(setup, seed=1)
    later, opened, rollout, targets = whole(runner)
    drawn = {}
    for place, name in enumerate(names):
        of_task = slice(10_000 * place, 10_000 * (place + 1))
        worlds = {"at first": runner.world, "of another seed": other.world, "opened": opened}
        for when, world in worlds.items():
            M_o, M_a = world.matrices[place]
            drawn[f"{name}, M_o {when}"] = np.asarray(M_o)[:, :2]  # two rows are enough
            drawn[f"{name}, M_a {when}"] = np.asarray(M_a)
            drawn[f"{name}, start {when}"] = np.asarray(world.env_state[place][0])
        drawn[f"{name}, start of the next trial"] = np.asarray(later.env_state[place][0])
        for t in range(2):
            drawn[f"{name}, reward {t}"] = np.asarray(rollout.reward[t, of_task])
            drawn[f"{name}, action {t}"] = np.asarray(rollout.action[t, of_task])
            for k in range(2):
                drawn[f"{name}, sample {k} of the prior {t}"] = np.asarray(targets.actions[t, of_task, k])
    assert rollout.terminated[1].all() and opened.start.all()
    return drawn


@pytest.mark.slow
def test_starts_projections_actions_rewards_and_samples_of_a_run_are_independent(monkeypatch):
    drawn = drawn_by_a_run(monkeypatch)
    assert correlated_pairs(drawn) == []
    for name, values in drawn.items():  # nor do two slots share a key
        assert len(np.unique(values.reshape(10_000, -1), axis=0)) > 9_950, name


@pytest.mark.slow
def test_a_key_that_two_draws_of_a_run_share_is_found(monkeypatch):
    """A step and the reset that follows it get the same key."""
    split = jax.random.split

    def shared(key, num=2):
        keys = split(key, num)
        return keys.at[1].set(keys[0]) if isinstance(num, tuple) else keys

    monkeypatch.setattr(jax.random, "split", shared)
    pairs = correlated_pairs(drawn_by_a_run(monkeypatch))
    assert {pair[:2] for pair in pairs if pair[2] > 0.99} == {
        ("one, start of the next trial[0]", "one, reward 1"),
        ("two, start of the next trial[0]", "two, reward 1"),
    }


def test_the_projections_of_a_task_do_not_depend_on_its_start(suite="gymnax", name="Pendulum-v1", draws=20_000):
    args = small_args(suite=suite, tasks=name, num_envs=draws, eval_tasks="none")
    setup = muesli.make_setup(args)

    @fast_jit
    def opened(key):
        world = muesli.reset_world(setup, key)
        return jax.vmap(partial(drawn_by_reset, suite, name))(world.env_state[0]), world.matrices[0]

    drawn, (M_o, M_a) = opened(jax.random.PRNGKey(0))
    varying = {part: values for part, values in drawn.items() if values.size}
    assert correlated_pairs({"M_o": M_o, "M_a": M_a, **varying}) == []
