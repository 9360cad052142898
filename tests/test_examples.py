"""Environments of one's own: those of examples/, and what is said of one that does not fit."""

import json
import sys

import jax
import numpy as np
import pytest
from conftest import assert_refused, fast_jit, run_here, tiny_flags

import ppo_s5_popgym as ppo
from examples import own_environment

EXAMPLES = [
    "examples.own_environment:t_maze",
    "examples.gymnax_cartpole:cartpole",
    "examples.gymnax_cartpole:without_velocities",
]


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


@pytest.mark.parametrize("env", [EXAMPLES[0], *(pytest.param(env, marks=pytest.mark.slow) for env in EXAMPLES[1:])])
def test_an_example_is_trained_and_its_run_resumed(env, tmp_path, capsys):
    flags = tiny_flags(env=env, arch="mlp", total_timesteps=256, run_dir="run")
    run_here(ppo.main, *flags, cwd=tmp_path)
    run_here(ppo.main, "--resume", "run", cwd=tmp_path)
    run_here(ppo.main, "--eval", "run", "--eval-episodes", 2, cwd=tmp_path)
    assert capsys.readouterr().err == ""
    assert json.loads((tmp_path / "run" / "args.json").read_text())["args"]["env"] == env


def test_cartpole_without_velocities_shows_two_features():
    setup = ppo.make_setup(ppo.Args(env=EXAMPLES[2], num_envs=8, num_minibatches=2))
    obs, state = setup.env.reset_env(jax.random.PRNGKey(0), setup.env_params)
    np.testing.assert_allclose(obs, [state.x, state.theta])


MODULE = """
import jax.numpy as jnp
from examples.own_environment import EnvParams, TMaze

class Image(TMaze):
    def reset_env(self, key, params):
        return jnp.zeros((3, 4)), super().reset_env(key, params)[1]

def image():
    return Image(), EnvParams()

def alone():
    return TMaze()

def nothing():
    return object(), None

number = 3
"""


@pytest.mark.parametrize(
    "env, words",
    [
        ("nowhere:factory", "No module named 'nowhere'"),
        ("own_module:factory", "no attribute 'factory'"),
        ("own_module:alone", "must be a function that returns an environment and its parameters"),
        ("own_module:number", "must be a function that returns an environment and its parameters"),
        ("own_module:nothing", "the environment has no reset_env, step, action_space, name"),
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
