"""Environments of one's own: those of examples/, and what is said of one that does not fit."""

import json
import sys

import jax
import numpy as np
import pytest
from conftest import assert_refused, fast_jit, others_exhaustive, others_slow, run_here, tiny_args, tiny_flags

import popgym_jax
import ppo_s5_popgym as ppo
import s5_common as common
from examples import learning_in_context, masked_velocities, own_environment

EXAMPLES = [
    "examples.own_environment:t_maze",
    "examples.gymnax_cartpole:cartpole",
    "examples.gymnax_cartpole:without_velocities",
    "examples.masked_velocities:make",
]
IN_CONTEXT = ["papers_cartpole", "two_trials", "eight_trials", "wide_cartpole", "pendulum"]


@pytest.mark.parametrize("action", [0, 1])
def test_the_t_maze_pays_who_turns_to_the_side_that_was_shown(action):
    env, params = own_environment.t_maze()
    step = fast_jit(env.step)
    sides = set()
    for seed in range(8):
        obs, state = env.reset(jax.random.PRNGKey(seed), params)
        side = int(obs[1])
        sides.add(side)
        assert obs.tolist() == [1 - side, side, 0]
        for t in range(1, 30):
            final, state, reward, terminated, truncated, info = step(jax.random.PRNGKey(t), state, action, params)
            seen = info["final_observation"].tolist()
            assert seen == ([0, 0, 1] if t == 28 else [0, 0, 0])
            assert float(reward) == ((1 if action == side else -1) if t == 29 else 0)
            assert bool(terminated) == (t == 29) and not truncated
    assert sides == {0, 1}


@pytest.mark.parametrize("env", others_slow(EXAMPLES))
def test_an_example_is_trained_and_its_run_resumed(env, tmp_path, capsys):
    flags = tiny_flags(env=env, arch="mlp", total_timesteps=256, run_dir="run")
    run_here(ppo.main, *flags, cwd=tmp_path)
    run_here(ppo.main, "--resume", "run", cwd=tmp_path)
    run_here(ppo.main, "--eval", "run", "--eval-episodes", 2, cwd=tmp_path)
    assert capsys.readouterr().err == ""
    assert json.loads((tmp_path / "run" / "args.json").read_text())["args"]["env"] == env


@pytest.mark.parametrize("task", others_exhaustive(IN_CONTEXT, "pendulum", "papers_cartpole"))
def test_a_task_to_be_learnt_in_context_is_trained_with_cartpoles_preset(task, tmp_path, capsys):
    env = f"examples.learning_in_context:{task}"
    flags = tiny_flags(env=env, arch="mlp", total_timesteps=256, eval_episodes=2, run_dir="run")
    run_here(ppo.main, "--preset", "meta", *flags, cwd=tmp_path)
    run_here(ppo.main, "--eval", "run", "--eval-trials", 3, cwd=tmp_path)
    assert capsys.readouterr().err == ""
    assert len((tmp_path / "run" / "trials_3.csv").read_text().splitlines()) == 1 + 3


@pytest.mark.parametrize("task", IN_CONTEXT)
def test_tasks_to_be_learnt_in_context_are_what_their_names_say(task):
    env, params = getattr(learning_in_context, task)()
    plain, _ = popgym_jax.make("PositionOnlyPendulumEasy" if task == "pendulum" else "PositionOnlyCartPoleEasy")
    assert type(env.env.env) is type(plain) and params.trial == plain.default_params
    assert params.num_trials == {"two_trials": 2, "eight_trials": 8}.get(task, 16)
    size = 16 if task == "wide_cartpole" else 4
    obs, state = env.reset(jax.random.PRNGKey(0), params)
    assert obs.shape == (size + 2,)
    assert (state.first is not None) == (task == "papers_cartpole")
    keys = jax.random.split(jax.random.PRNGKey(1), 64)
    M_a = np.asarray(jax.vmap(env.reset, (0, None))(keys, params)[1].play.M_a)
    assert len(np.unique(M_a, axis=0)) == (1 if task == "papers_cartpole" else 2)


def test_cartpole_without_velocities_shows_two_features_and_has_its_own_name():
    setup = ppo.make_setup(ppo.Args(env=EXAMPLES[2], num_envs=8, num_minibatches=2))
    assert setup.env.name == "CartPoleWithoutVelocities"
    assert setup.env.observation_space(setup.env_params).shape == (2,)
    obs, state = setup.env.reset_env(jax.random.PRNGKey(0), setup.env_params)
    np.testing.assert_allclose(obs, [state.x, state.theta])


@pytest.mark.slow
def test_what_the_masked_pendulum_hides_are_the_velocities_and_actions_are_clipped():
    env, params = masked_velocities.make()
    step = fast_jit(env.step_env)
    _, first = fast_jit(env.reset_env)(jax.random.PRNGKey(0), params)
    found = [step(jax.random.PRNGKey(1), first, np.float32([action]), params) for action in (3.0, 1.0)]
    jax.tree.map(np.testing.assert_array_equal, *found)
    obs, state, reward, terminated, _ = found[0]
    physics = state.brax.pipeline_state
    np.testing.assert_array_equal(obs, physics.q)
    np.testing.assert_array_equal(state.brax.obs, [*obs, *physics.qd])  # what Brax shows
    assert np.abs(physics.qd).max() > 0.01  # it moves
    assert reward == 1 and not terminated and state.time == 1


def own_trials(num_trials=3):
    """Three T-mazes in a row."""
    env, params = own_environment.t_maze()
    trials = popgym_jax.Trials(env, num_trials)
    return trials, trials.default_params.replace(trial=params.replace(corridor=2))


@pytest.mark.parametrize("env", ["test_examples:own_trials", "MetaStatelessCartPole"])
def test_more_trials_are_evaluated_than_trained_also_of_ones_own(env):
    setup = ppo.make_setup(tiny_args(env=env, arch="mlp", eval="run", eval_trials=5))
    trained = ppo.make_setup(tiny_args(env=env))
    assert setup.env_params == trained.env_params.replace(num_trials=5)
    if ":" in env:
        runner = fast_jit(ppo.init_runner, setup)(jax.random.PRNGKey(0))
        returns = np.asarray(fast_jit(ppo.evaluate, setup)(runner.params, jax.random.PRNGKey(1)))
        assert returns.shape == (8, 5) and set(np.abs(returns).ravel()) == {1.0}


class FixedParams:
    num_trials = 3


def fixed_trials():
    return own_trials()[0], FixedParams()


def test_trials_of_parameters_that_cannot_be_replaced_are_refused(monkeypatch):
    monkeypatch.setattr(common, "own_environment", lambda *flag, uses: fixed_trials())
    with pytest.raises(common.UsageError, match="--eval-trials 5: the parameters of TMaze cannot be replaced"):
        ppo.make_setup(tiny_args(env="own:trials", eval="run", eval_trials=5))


MODULE = """
import jax.numpy as jnp
from flax import struct
from examples.own_environment import EnvParams, TMaze

@struct.dataclass
class TrialParams(EnvParams):
    num_trials: int = 2

def without_trial():
    return TMaze(), TrialParams()

class Image(TMaze):
    def reset_env(self, key, params):
        return jnp.zeros((3, 4)), super().reset_env(key, params)[1]

def image():
    return Image(), EnvParams()

def alone():
    return TMaze()

def nothing():
    return object(), None

def needy(size):
    return TMaze(), EnvParams()

number = 3
"""


@pytest.mark.parametrize(
    "env, words",
    [
        ("nowhere:factory", "No module named 'nowhere'"),
        ("own_module:factory", "no attribute 'factory'"),
        ("own_module:alone", "must be a function without arguments that returns an environment and its parameters"),
        ("own_module:number", "must be a function without arguments that returns an environment and its parameters"),
        ("own_module:needy", "must be a function without arguments that returns an environment and its parameters"),
        ("./examples/own_environment.py:t_maze", "must be PACKAGE.MODULE:FACTORY, not a path"),
        (".own_module:alone", "must be PACKAGE.MODULE:FACTORY, not a path"),
        ("own_module:nothing", "the environment has no reset_env, step, action_space, name"),
        ("own_module:without_trial", "its parameters have num_trials, but its state has no trial"),
        ("own_module:image", "must be float32 vectors, not ShapeDtypeStruct(shape=(3, 4), dtype=float32)"),
        (":factory", "--env :factory: Empty module name"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(env, words, tmp_path, tmp_path_factory, monkeypatch, capsys):
    folder = tmp_path_factory.mktemp("modules")
    (folder / "own_module.py").write_text(MODULE)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "own_module", raising=False)
    assert_refused(ppo.main, tiny_flags(env=env), words, tmp_path, monkeypatch, capsys)


@pytest.mark.slow
def test_a_module_in_the_working_directory_is_found(tmp_path, monkeypatch):
    (tmp_path / "mine_alone.py").write_text("from examples.own_environment import t_maze\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    run_here(ppo.main, *tiny_flags(env="mine_alone:t_maze", arch="mlp", total_timesteps=128), cwd=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("arch, low, high", [("s5", 0.95, 1.0), ("mlp", -0.4, 0.4)])
def test_the_t_maze_is_learnt_with_memory_and_not_without(arch, low, high, tmp_path):
    """The best of some updates, each of several hundred episodes."""
    flags = {"env": EXAMPLES[0], "arch": arch, "total_timesteps": 250_000, "run_dir": str(tmp_path / "run")}
    assert low <= ppo.train(ppo.Args(**flags))["best_return"] <= high
