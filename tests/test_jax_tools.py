"""What JAX's users debug with: 64 bits, NaN checks, no jit; and every preset with every memory, at tiny size.

muesli_s5_metarl.py has the same in test_muesli.py and test_metarl.py.
"""

import csv
import dataclasses
import json
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ARCHS, fast_jit, finish, others_exhaustive, start_script, tiny_args, tiny_flags
from test_a2c import small_args

import a2c_s5_bsuite as a2c
import ppo_s5_popgym as ppo
import s5_common as common

A2C_ARCHS = ("s5", "lru", "mingru", "lstm", "gru", "attention", "mlp")
ONE_UPDATE = {"num_envs": 4, "num_steps": 6, "num_minibatches": 2, "update_epochs": 1}


def ppo_updates(updates=2, **flags):
    """Runner and metrics after some updates."""
    setup = ppo.make_setup(tiny_args(**ONE_UPDATE | flags))
    runner = fast_jit(ppo.init_runner, setup)(jax.random.PRNGKey(0))
    update = fast_jit(ppo.update, setup)
    for _ in range(updates):
        runner, metrics = update(runner)
    return runner, metrics


def a2c_updates(updates=2, **flags):
    setup = a2c.make_setup(small_args(**{"num_steps": 4, "num_envs": 2} | flags))
    runner = fast_jit(a2c.init_runner, setup)(jnp.zeros((), jnp.int32))
    update = fast_jit(a2c.update_episode, setup)
    for _ in range(updates):
        runner, metrics = update(runner)
    return runner, metrics


def assert_same_with_64_bits(function, **flags):
    narrow = function(**flags)
    with jax.enable_x64(True):
        wide = function(**flags)
    assert jax.tree.structure(narrow) == jax.tree.structure(wide)
    for x, y in zip(jax.tree.leaves(narrow), jax.tree.leaves(wide), strict=True):
        assert x.dtype == y.dtype and x.dtype.itemsize <= 4
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def assert_same_types_with_64_bits(init, update, seed):
    """Those of the runner, before and after an update, and of the metrics; nothing is compiled."""

    def types_of(tree):
        return [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]

    runner = jax.eval_shape(init, seed)
    narrow = types_of(runner), types_of(jax.eval_shape(update, runner))
    with jax.enable_x64(True):
        runner = jax.eval_shape(init, seed)
        wide = types_of(runner), types_of(jax.eval_shape(update, runner))
    assert wide == narrow
    assert all(dtype.itemsize <= 4 for part in wide for _, dtype in part)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "env"), [*((arch, "RepeatPreviousEasy") for arch in ARCHS), ("mlp", "PositionOnlyPendulumEasy")]
)
def test_ppo_has_the_same_types_with_64_bits(arch, env):
    setup = ppo.make_setup(tiny_args(**ONE_UPDATE, arch=arch, env=env))
    assert_same_types_with_64_bits(partial(ppo.init_runner, setup), partial(ppo.update, setup), jax.random.PRNGKey(0))


@pytest.mark.parametrize("arch", others_exhaustive(ARCHS, "s5", "attention"))
def test_ppo_is_the_same_with_64_bits(arch):
    assert_same_with_64_bits(ppo_updates, arch=arch)


@pytest.mark.slow
def test_ppo_with_continuous_actions_is_the_same_with_64_bits():
    assert_same_with_64_bits(ppo_updates, env="PositionOnlyPendulumEasy", arch="mlp")


@pytest.mark.slow
def test_the_evaluation_of_trials_is_the_same_with_64_bits():
    def play():
        flags = {"env": "MetaStatelessCartPole", "arch": "mlp", "eval_episodes": 3}
        setup = ppo.make_setup(tiny_args(**flags, eval="run", eval_trials=2))
        params = fast_jit(ppo.init_runner, setup)(jax.random.PRNGKey(0)).params
        return fast_jit(ppo.evaluate, setup)(params, jax.random.PRNGKey(1))

    assert_same_with_64_bits(play)


@pytest.mark.slow
@pytest.mark.parametrize("arch", A2C_ARCHS)
def test_a2c_has_the_same_types_with_64_bits(arch):
    setup = a2c.make_setup(small_args(num_steps=4, num_envs=2, arch=arch))
    init, update = partial(a2c.init_runner, setup), partial(a2c.update_episode, setup)
    assert_same_types_with_64_bits(init, update, jnp.zeros((), jnp.int32))


@pytest.mark.parametrize("arch", others_exhaustive(A2C_ARCHS, "s5", "attention"))
def test_a2c_is_the_same_with_64_bits(arch):
    assert_same_with_64_bits(a2c_updates, arch=arch)


@pytest.mark.exhaustive
@pytest.mark.parametrize("env", [name for name in a2c.TASKS if name != "MemoryChain"])
def test_a2c_is_the_same_with_64_bits_on_every_task(env):
    assert_same_with_64_bits(a2c_updates, env=env, arch="mlp", chain_length=6, size=5)


@pytest.mark.slow
def test_a_whole_run_with_64_bits_has_the_same_metrics(tmp_path):
    """Checkpoints included: one of either kind is read by the other."""
    flags = tiny_flags(total_timesteps=512, env="PositionOnlyPendulumEasy")
    processes = [
        start_script(*flags, "--run-dir", "narrow", cwd=tmp_path),
        start_script(*flags, "--run-dir", "wide", cwd=tmp_path, JAX_ENABLE_X64="1"),
    ]
    for process in processes:
        finish(process)
    narrow, wide = (list(csv.DictReader((tmp_path / name / "metrics.csv").open())) for name in ("narrow", "wide"))
    for ours, theirs in zip(wide, narrow, strict=True):
        for name in ours:  # the compiler may add in another order
            assert ours[name] == theirs[name] or float(ours[name]) == pytest.approx(float(theirs[name]), 1e-3, 1e-4)
    out, _ = finish(start_script("--eval", "narrow", cwd=tmp_path, JAX_ENABLE_X64="1"))
    assert "update 4, 8 episodes" in out


@pytest.mark.slow
def test_no_nan_is_made_where_no_episode_ends():
    with jax.debug_nans(True):
        _, metrics = ppo_updates(env="RepeatFirstHard", arch="mlp")
        a2c_updates(arch="mlp")
    assert metrics["episodes"] == metrics["return_mean"].number == 0
    assert common.value_of(jax.tree.map(lambda x: np.asarray(x)[None], metrics["return_mean"]), 0) is None


@pytest.mark.slow
@pytest.mark.parametrize("env", ["RepeatPreviousEasy", "PositionOnlyPendulumEasy"])
def test_ppo_trains_under_nan_checks_and_without_jit(env, tmp_path):
    sizes = {"num_envs": 2, "num_steps": 2, "num_minibatches": 1, "update_epochs": 1, "total_timesteps": 4}
    args = tiny_args(env=env, run_dir=str(tmp_path / "run"), **sizes)
    with jax.debug_nans(True), jax.disable_jit():
        summary = ppo.train(args)
    assert summary["updates"] == 1 and summary["final_return"] is None
    rows, damaged = common.read_rows(tmp_path / "run" / "metrics.csv", ["update", "env_steps", "seed"], 1)
    assert (rows, damaged) == ([], 2)  # other columns than these
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["updates"] == 1


@pytest.mark.slow
def test_a2c_trains_under_nan_checks_and_without_jit(tmp_path):
    sizes = {"num_envs": 2, "num_episodes": 2, "num_rows": 1, "memory_length": 2, "num_steps": 2}
    with jax.debug_nans(True), jax.disable_jit():
        summary = a2c.train(small_args(run_dir=str(tmp_path / "run"), **sizes))
    assert summary["updates"] == 1 and abs(summary["final_return"]) <= 1


# ---- more gradient steps than 32 bits count --------------------------------------------------------------------------


def test_the_step_size_falls_to_zero_over_any_number_of_steps():
    for steps in (4, 10**6, 10**12):
        schedule = common.linear_decay(0.5, steps)
        for count in (0, 1, 3, 2**31 - 1):
            expected = 0.5 * max(0.0, 1 - count / steps)
            assert float(schedule(jnp.int32(count))) == pytest.approx(expected, rel=1e-5, abs=1e-7)


@pytest.mark.slow
def test_more_gradient_steps_than_fit_into_32_bits():
    assert tiny_args(total_timesteps=10**12).num_updates * 4 > 2**31
    _, metrics = ppo_updates(total_timesteps=10**12, arch="mlp", updates=1)
    assert np.isfinite(metrics["policy_loss"])
    flags = {"num_envs": 1, "num_steps": 1, "memory_length": 2000, "num_episodes": 1_100_000}
    assert flags["num_episodes"] * (flags["memory_length"] + 1) > 2**31
    _, metrics = a2c_updates(arch="mlp", updates=1, **flags)
    assert np.isfinite(metrics["policy_loss"])


# ---- presets x memories ----------------------------------------------------------------------------------------------

PPO_SIZES = {"num_envs": 4, "num_steps": 8, "num_minibatches": 2, "update_epochs": 2, "total_timesteps": 32}
NETWORK = {"encoder_layers": (8,), "s5_width": 8, "s5_state": 4}


def trained_or_typed(presets, archs):
    """Every memory in the default preset, and every preset with S5, are trained; of the rest the types are enough."""
    for preset in presets:
        for arch in archs:
            yield preset, arch, arch == "s5" or preset == "default"


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "arch", "trained"), list(trained_or_typed(ppo.PRESETS, ARCHS)))
def test_every_preset_of_ppo_trains_with_every_memory(preset, arch, trained):
    """With the preset's own number of layers; an environment whose time limit is within the rollout."""
    args = ppo.Args(**ppo.PRESETS[preset] | PPO_SIZES | NETWORK | {"decoder_layers": (8,), "attention_window": 4})
    env = "MetaStatelessCartPole" if preset == "meta" else "RepeatPreviousEasy"
    args = dataclasses.replace(args, arch=arch, env=env)
    args.check()
    setup = ppo.make_setup(args)
    if not trained:
        runner = jax.eval_shape(partial(ppo.init_runner, setup), jax.random.PRNGKey(0))
        later, _ = jax.eval_shape(partial(ppo.update, setup), runner)
        assert args.preset == preset and later == runner
        return
    runner, metrics = fast_jit(ppo.update, setup)(fast_jit(ppo.init_runner, setup)(jax.random.PRNGKey(0)))
    assert args.preset == preset and metrics["first_ratio_error"] < 1e-5
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(runner.params))


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "arch", "trained"), list(trained_or_typed(a2c.PRESETS, A2C_ARCHS)))
def test_every_preset_of_a2c_trains_with_every_memory(preset, arch, trained):
    args = a2c.Args(**a2c.PRESETS[preset] | NETWORK | {"memory_length": 40, "num_episodes": 20})
    args = dataclasses.replace(args, arch=arch)
    args.check()
    setup = a2c.make_setup(args)
    if not trained:
        runner = jax.eval_shape(partial(a2c.init_runner, setup), jnp.zeros((), jnp.int32))
        later, _ = jax.eval_shape(partial(a2c.update_episode, setup), runner)
        assert args.preset == preset and later == runner
        return
    runner = fast_jit(a2c.init_runner, setup)(jnp.zeros((), jnp.int32))
    runner, metrics = fast_jit(a2c.update_episode, setup)(runner)
    assert args.preset == preset and int(runner.finished) == args.num_envs
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((runner.params, metrics)))


# ---- bounds on what learns -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("x", [-3.0, -1.0, -0.3, 0.0, 0.7, 1.0, 4.0])
@pytest.mark.parametrize("gradient", [-2.0, 2.0])
def test_the_gradient_of_a_bounded_value_leads_back_and_never_further_out(x, gradient):
    """Descent moves x against the gradient."""
    y, slope = jax.value_and_grad(lambda x: gradient * common.bounded(x, -1.0, 1.0))(jnp.float32(x))
    assert float(y) == pytest.approx(gradient * min(max(x, -1), 1))
    leads_out = (x <= -1 and gradient > 0) or (x >= 1 and gradient < 0)
    assert float(slope) == (0.0 if leads_out else gradient)


@pytest.mark.parametrize("script", [ppo, a2c])
def test_a_decay_that_momentum_carried_over_its_bound_comes_back(script):
    """Lambda's real part at +0.02: the layer still decays, and the loss that asks for a faster decay moves it."""
    args = tiny_args() if script is ppo else small_args()
    layer = script.S5Layer(args)
    u = jnp.ones((6, 1, args.s5_width))
    start = jnp.zeros((6, 1))
    init = fast_jit(partial(layer.init, method="scan"))
    params = init(jax.random.PRNGKey(0), layer.initial_carry(1), u, start)
    outside = jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.full_like(x, 0.02) if "Lambda_re" in str(path) else x, params
    )

    def size(params):
        Lambda_bar, _, _ = layer.apply(params, method="kernels")
        return jnp.sum(Lambda_bar**2)

    P = args.s5_state
    now, towards_decay = fast_jit(jax.value_and_grad(size))(outside)
    assert float(now) < P  # every |Lambda_bar| is below 1
    towards_decay = towards_decay["params"]["Lambda_re"]
    assert (towards_decay > 0).all() and math.isfinite(float(towards_decay.sum()))
    assert not fast_jit(jax.grad(lambda params: -size(params)))(outside)["params"]["Lambda_re"].any()
