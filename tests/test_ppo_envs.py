"""ppo_s5_popgym.py on every environment of popgym_jax."""

import csv
import functools
import json
import math
import re

import jax
import numpy as np
import pytest
from conftest import ROOT, fast_jit, finish, others_slow, start_script, tiny_args, tiny_flags
from gymnax.environments import spaces

import popgym_jax
import ppo_s5_popgym as ppo

# Many command lines in one process: starting Python for each would take longer than training.
PROGRAM = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import ppo_s5_popgym as ppo, s5_common as common
envs, flags = sys.argv[1].split(","), sys.argv[2:]
for env in envs:
    sys.argv = ["ppo_s5_popgym.py", *flags, "--env", env, "--run-dir", env]
    if code := common.run_main(ppo.main):
        sys.exit(code)
"""
STEPS = 256
WITH_S5 = ("RepeatPreviousEasy", "BattleshipEasy", "PositionOnlyCartPoleEasy", "PositionOnlyPendulumEasy")


@pytest.fixture(scope="module")
def runs_of(tmp_path_factory):
    """A run directory for every environment of a level, with S5 for each kind of observations and actions."""

    @functools.cache
    def make(level):
        folder = tmp_path_factory.mktemp(level)
        envs = [env for env in popgym_jax.registered_envs if env.endswith(level)]
        for arch, names in (("s5", WITH_S5), ("mlp", set(envs) - set(WITH_S5))):
            if chosen := [env for env in envs if env in names]:
                flags = tiny_flags(total_timesteps=STEPS, arch=arch, stagger_steps=20)
                finish(start_script(",".join(chosen), *flags, cwd=folder, program=("-c", PROGRAM)), timeout=900)
        return folder

    return make


def each_level():
    """The levels differ in sizes only."""
    for env in popgym_jax.registered_envs:
        yield pytest.param(env, marks=pytest.mark.slow if env.endswith("Easy") else pytest.mark.exhaustive)


@pytest.mark.parametrize("env", list(each_level()))
def test_a_short_budget_trains_on_every_environment(runs_of, env):
    run = runs_of(re.search("Easy|Medium|Hard", env)[0]) / env
    summary = json.loads((run / "summary.json").read_text())
    assert summary["env"] == env and summary["env_steps"] == STEPS
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    losses = [float(row[name]) for row in rows for name in ("policy_loss", "value_loss", "entropy", "grad_norm")]
    assert rows and all(map(math.isfinite, losses))
    assert all(float(row["grad_norm"]) > 0 for row in rows)


# the wrapper does the same for all; one of each kind of observations and actions
EASY = [env for env in popgym_jax.registered_envs if env.endswith("Easy")]


@pytest.mark.parametrize("env", others_slow(EASY, "PositionOnlyPendulumEasy"))
def test_the_agent_sees_its_previous_action_and_the_start_of_every_episode(env):
    setup = ppo.make_setup(tiny_args(env=env, num_steps=64, arch="mlp"))
    runner = fast_jit(ppo.init_runner, setup)(jax.random.PRNGKey(0))
    _, rollout, _ = fast_jit(ppo.collect_rollout, setup)(runner)
    space, action = setup.env.action_space(setup.env_params), np.asarray(rollout.action)
    shown = action if isinstance(space, spaces.Box) else np.eye(space.n, dtype=np.float32)[action]
    start, obs = np.asarray(rollout.start), np.asarray(rollout.obs)
    seen, flag = obs[..., -shown.shape[-1] - 1 : -1], obs[..., -1]
    np.testing.assert_array_equal(flag, start)
    np.testing.assert_array_equal(flag[0], 1)
    np.testing.assert_array_equal(seen[1:], shown[:-1] * (1 - start[1:, :, None]))
    np.testing.assert_array_equal(start[1:], (rollout.terminated | rollout.truncated)[:-1])
