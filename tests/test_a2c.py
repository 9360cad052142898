"""a2c_s5_bsuite.py: environments against bsuite itself, the learner against plain loops, logs in bsuite's analysis."""

import csv
import dataclasses
import json
import shutil
import sys
import time
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bsuite.environments import bandit, catch, deep_sea, discounting_chain, memory_chain, umbrella_chain
from bsuite.experiments import summary_analysis
from bsuite.logging import csv_load
from conftest import ROOT, TWO_DEVICES, as_flags, assert_refused, fast_jit, finish, others_slow, run_here, start_script

import a2c_s5_bsuite as a2c
import s5_common as common
from benchmarks import bsuite_memory
from benchmarks.collect import keep_rows

SCRIPT = ROOT / "a2c_s5_bsuite.py"
SMALL = {"encoder_layers": (16,), "s5_width": 16, "s5_state": 8, "num_envs": 4, "memory_length": 6, "num_episodes": 400}
SMALL |= {"num_rows": 20, "checkpoint_interval": 5, "eval_episodes": 8}


def small_args(**flags):
    args = a2c.Args(**SMALL | flags)
    args.check()
    return args


def run_script(*flags, cwd, **variables):
    return start_script(*flags, cwd=cwd, program=(str(SCRIPT),), **variables)


# ---------------------------------------------------------------- environments


def same_state(name, reference, state):
    """Put the hidden state of our environment into bsuite's."""
    if name == "MemoryChain":
        reference._context, reference._query = np.asarray(state.context), int(state.query)
    elif name == "UmbrellaChain":
        reference._need_umbrella, reference._has_umbrella = int(state.need_umbrella), int(state.has_umbrella)
    elif name == "Catch":
        reference._ball_x = int(state.ball_x)


REFERENCES = {
    "MemoryChain": (
        {"memory_length": 7, "num_bits": 3},
        lambda args: memory_chain.MemoryChain(args.memory_length, args.num_bits),
    ),
    "UmbrellaChain": (
        {"chain_length": 9, "num_distractors": 4},
        lambda args: umbrella_chain.UmbrellaChain(args.chain_length, args.num_distractors),
    ),
    "DiscountingChain": ({"mapping_seed": 13}, lambda args: discounting_chain.DiscountingChain(args.mapping_seed)),
    "Catch": ({}, lambda args: catch.Catch()),
    "DeepSea": (
        {"size": 7, "mapping_seed": 42},
        lambda args: deep_sea.DeepSea(args.size, mapping_seed=args.mapping_seed),
    ),
    "SimpleBandit": ({"mapping_seed": 3}, lambda args: bandit.SimpleBandit(args.mapping_seed)),
}


@pytest.mark.parametrize("name", others_slow(a2c.TASKS, "MemoryChain", "UmbrellaChain"))
def test_environment_is_bsuites_step_for_step(name):
    """Equal hidden state at the start, equal actions: equal observations, rewards and ends. Random rewards and
    distractors of UmbrellaChain have to be possible ones; all else in it has to be equal."""
    flags, make = REFERENCES[name]
    args = small_args(env=name, **flags)
    task, reference = a2c.make_task(args), make(args)
    rng = np.random.default_rng(0)
    reset = fast_jit(lambda key: a2c.reset_envs(task, key, 1))
    step = fast_jit(lambda key, state, action: a2c.step_envs(task, key, state, action))
    for episode in range(60):
        obs, state = reset(jax.random.key(episode))
        now = reference.reset()
        same_state(name, reference, jax.tree.map(lambda x: x[0], state))
        expected = reference._observation() if name == "Catch" else reference._get_observation()
        fixed = slice(0, 3) if name == "UmbrellaChain" else slice(None)
        np.testing.assert_allclose(obs[0][fixed], expected.ravel()[fixed], atol=1e-6)
        for t in range(task.length):
            action = int(rng.integers(task.env.num_actions))
            obs, state, reward = step(jax.random.key(1000 * episode + t), state, jnp.array([action]))
            now = reference.step(action)
            np.testing.assert_allclose(obs[0][fixed], now.observation.ravel()[fixed], atol=1e-6)
            if name == "UmbrellaChain" and t + 1 < task.length:
                assert float(reward[0]) in (-1.0, 1.0)
            else:
                np.testing.assert_allclose(reward[0], now.reward, atol=1e-6)
            assert now.last() == (t + 1 == task.length)  # every episode has the same length
        assert now.discount == 0  # and ends with a termination


def test_umbrella_rewards_and_distractors_are_fair_coins():
    args = small_args(env="UmbrellaChain", chain_length=50, num_distractors=5)
    task = a2c.make_task(args)

    def episode(key):
        reset_key, key = jax.random.split(key)
        _, state = a2c.reset_envs(task, reset_key, 1)

        def step(state, key):
            obs, state, reward = a2c.step_envs(task, key, state, jnp.zeros(1, int))
            return state, (obs[0, 3:], reward[0])

        return jax.lax.scan(step, state, jax.random.split(key, 49))[1]

    bits, rewards = fast_jit(jax.vmap(episode))(jax.random.split(jax.random.key(0), 200))
    assert abs(float(bits.mean()) - 0.5) < 4 * 0.5 / np.sqrt(bits.size)
    assert abs(float(rewards.mean())) < 4 / np.sqrt(rewards.size)


@pytest.mark.parametrize("memory_length", [1, 999, 1000, 1500])
def test_memory_chains_of_any_length_end_after_one_step_more(memory_length):
    args = small_args(memory_length=memory_length)
    task = a2c.make_task(args)
    _, state = a2c.reset_envs(task, jax.random.key(0), 2)

    def step(state, key):
        _, state, reward = a2c.step_envs(task, key, state, jnp.zeros(2, int))
        return state, reward

    keys = jax.random.split(jax.random.key(1), task.length)
    rewards = fast_jit(lambda state: jax.lax.scan(step, state, keys)[1])(state)
    assert task.length == memory_length + 1
    assert (rewards[:-1] == 0).all() and (jnp.abs(rewards[-1]) == 1).all()


# ---------------------------------------------------------------- learner


def plain_td_lambda(args, reward, value, bootstrap):
    """The definition, step by step from the end, for one environment."""
    returns, G, following = np.zeros(len(reward)), bootstrap, bootstrap
    for t in reversed(range(len(reward))):
        G = reward[t] + args.gamma * ((1 - args.td_lambda) * following + args.td_lambda * G)
        returns[t], following = G, value[t]
    return returns


@pytest.mark.parametrize("steps", [1, 4, 9])
@pytest.mark.parametrize("td_lambda", [0.0, 0.9, 1.0])
def test_td_lambda_returns_are_those_of_a_plain_loop(steps, td_lambda):
    args = small_args(td_lambda=td_lambda, gamma=0.9)
    rng = np.random.default_rng(steps)
    reward, value, bootstrap = rng.normal(size=(steps, 3)), rng.normal(size=(steps, 3)), rng.normal(size=3)
    found = a2c.td_lambda_returns(args, *map(jnp.asarray, (reward, value, bootstrap)))
    for b in range(3):
        expected = plain_td_lambda(args, reward[:, b], value[:, b], bootstrap[b])
        np.testing.assert_allclose(found[:, b], expected, atol=1e-5)


def test_td_lambda_returns_by_hand():
    """gamma 0.5, lambda 0.5, rewards 0, 0, 4, values 8, 4, 2, then a termination.

    G_2 = 4;  G_1 = 0.5 (0.5 * 2 + 0.5 * 4) = 1.5;  G_0 = 0.5 (0.5 * 4 + 0.5 * 1.5) = 1.375
    """
    args = small_args(gamma=0.5, td_lambda=0.5)
    column = lambda *x: jnp.array(x, jnp.float32)[:, None]  # noqa: E731
    found = a2c.td_lambda_returns(args, column(0, 0, 4), column(8, 4, 2), jnp.zeros(1))
    np.testing.assert_allclose(found[:, 0], [1.375, 1.5, 4.0], rtol=1e-6)


@cache
def play_two_segments(arch="s5", T=4):
    """A setup and the first two segments of an episode with fresh parameters: the runner before, the segment, the value
    after."""
    setup = a2c.make_setup(small_args(arch=arch, memory_length=10))
    runner = fast_jit(lambda seed: a2c.init_runner(setup, seed))(0)
    collect = fast_jit(lambda runner: a2c.collect_segment(setup, runner, T))
    middle, first, value = collect(runner)
    return setup, [(runner, first, value), (middle, *collect(middle)[1:])]


@pytest.mark.parametrize("arch", others_slow(["s5", "lru", "mingru", "lstm", "gru", "attention", "mlp"], "s5"))
def test_acting_and_learning_see_the_same_network(arch):
    """The learner's scan from the carry stored at a segment's start gives what step by step acting gives."""
    setup, played = play_two_segments(arch)
    params = played[0][0].params
    scan, step = (fast_jit(partial(setup.network.apply, method=method)) for method in ("scan", "step"))
    kernels = fast_jit(partial(setup.network.apply, method="kernels"))(params)
    for runner, segment, following in played:
        carry, start = runner.carry, segment.start
        end, logits, values = scan(params, carry, segment.obs, start)
        for t in range(4):
            carry, now, value = step(params, kernels, carry, segment.obs[t], start[t])
            np.testing.assert_allclose(now, logits[t], atol=1e-5)
            np.testing.assert_allclose(value, values[t], atol=1e-5)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), carry, end)
        assert following.shape == (4,)
    # the value that the first segment is bootstrapped from is that of the second's first observation
    runner, segment, _ = played[1]
    np.testing.assert_array_equal(runner.obs, segment.obs[0])
    first_value = scan(params, runner.carry, segment.obs, segment.start)[2][0]
    np.testing.assert_allclose(played[0][2], first_value, atol=1e-5)


def test_gain_makes_slow_states_hear_as_loudly_as_fast_ones():
    """Against zero-order hold by its formula; with --s5-gain |B_bar| no longer grows with the time step."""
    args = small_args(s5_state=16, s5_dt_min=1e-4, s5_dt_max=1e-2)
    size = {}
    for gain in (True, False):
        layer = a2c.S5Layer(dataclasses.replace(args, s5_gain=gain))
        init = fast_jit(partial(layer.init, method="scan"))
        params = init(jax.random.key(0), layer.initial_carry(1), jnp.ones((1, 1, 16)), jnp.ones((1, 1)))
        _, B_bar, _ = fast_jit(partial(layer.apply, method="kernels"))(params)
        p = jax.tree.map(lambda x: np.asarray(x, np.float64), params["params"])
        Lambda, step = p["Lambda_re"] + 1j * p["Lambda_im"], np.exp(p["log_step"])
        B = (p["B_tilde"][:, :16] + 1j * p["B_tilde"][:, 16:]) * (args.s5_dt_max / step if gain else 1.0)
        expected = B * (np.exp(Lambda * step) - 1) / Lambda
        np.testing.assert_allclose(B_bar[:, :16] + 1j * B_bar[:, 16:], expected, rtol=2e-2, atol=1e-7)
        size[gain] = np.abs(expected).mean(axis=0)[np.argsort(step)]
    assert size[False][-1] > 20 * size[False][0] and size[True].max() < 4 * size[True].min()


@pytest.mark.slow
def test_segments_never_mix_episodes_at_the_paper_preset(monkeypatch):
    """What the learner gets, in order: 32 steps from the start of an episode, then the 9 that are left of it."""
    args = dataclasses.replace(a2c.Args(**a2c.PRESETS["paper"]), memory_length=40, num_episodes=3, num_rows=1)
    setup = a2c.make_setup(dataclasses.replace(args, encoder_layers=(8,), s5_width=8, s5_state=4))
    assert args.num_steps == 32 and args.num_envs == 1
    seen, collect = [], a2c.collect_segment

    def recorded(*arguments):
        runner, segment, value = collect(*arguments)
        jax.debug.callback(lambda *x: seen.append(x), segment, ordered=True)
        return runner, segment, value

    monkeypatch.setattr(a2c, "collect_segment", recorded)
    runner = fast_jit(lambda seed: a2c.init_runner(setup, seed))(0)
    episode = fast_jit(lambda runner: a2c.update_episode(setup, runner))
    for _ in range(3):
        runner, _ = episode(runner)
    jax.effects_barrier()
    segments = [segment for (segment,) in seen]
    assert [len(segment.reward) for segment in segments] == [32, 9] * 3
    for i, segment in enumerate(segments):
        assert segment.start.ravel().tolist() == [float(i % 2 == 0), *[0.0] * (len(segment.start) - 1)]
        left = np.asarray(segment.obs[:, 0, 0])  # 1 - time / length; the first observation is shown twice
        assert (np.diff(left) <= 0).all() and (np.diff(left[1:]) < 0).all()
        assert not segment.reward[:-1].any() and abs(segment.reward[-1, 0]) == i % 2
    assert int(runner.finished) == 3 and (abs(np.asarray(runner.history)) == 1).all()


@pytest.mark.parametrize("last", others_slow([True, False], True))
def test_what_follows_a_segment_is_worth_its_value_and_nothing_after_the_end(monkeypatch, last):
    setup, ((runner, _, value), _) = play_two_segments()
    given = []
    loss = a2c.a2c_loss

    def recorded(*arguments):
        jax.debug.callback(given.append, arguments[-1])
        return loss(*arguments)

    monkeypatch.setattr(a2c, "a2c_loss", recorded)
    fast_jit(lambda runner: a2c.update(setup, runner, 4, last))(runner)
    jax.effects_barrier()
    np.testing.assert_allclose(given[0], jnp.zeros(4) if last else value, atol=1e-6)
    assert value.all()


@pytest.mark.slow
def test_memory_of_16_steps_is_learned_perfectly(tmp_path):
    summary = a2c.train(a2c.Args(memory_length=16, num_episodes=6000, run_dir=str(tmp_path / "run")))
    assert summary["final_return"] == 1.0


# ---------------------------------------------------------------- runs


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_leaves_metrics_a_bsuite_log_a_checkpoint_and_a_summary_and_can_be_evaluated(tmp_path, capsys):
    run_here(a2c.main, *as_flags(**SMALL, arch="mlp", num_seeds=2, run_dir="run"), cwd=tmp_path)
    run = tmp_path / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["script"] == "a2c_s5_bsuite" and summary["env_steps"] == 400 * 7 and summary["seeds"] == [0, 1]
    rows = read(run / "metrics.csv")
    assert len(rows) == 40 and {row["seed"] for row in rows} == {"0", "1"}
    assert int(rows[-1]["episodes"]) == 400
    for seed in (0, 1):
        own = [row for row in rows if row["seed"] == str(seed)]
        log = read(run / f"bsuite_seed{seed}.csv")
        assert [int(row["episode"]) for row in log][-5:] == [170, 200, 250, 300, 400]
        assert int(log[-1]["steps"]) == 2800
        total = sum(20 * float(row["return_mean"]) for row in own)  # 20 episodes to a row
        assert float(log[-1]["total_return"]) == pytest.approx(total, abs=1e-3)
        assert int(log[-1]["total_perfect"]) == (400 + round(total)) // 2
        assert int(log[-1]["total_regret"]) == 2 * (400 - int(log[-1]["total_perfect"]))
    capsys.readouterr()
    run_here(a2c.main, "--eval", "run", cwd=tmp_path)
    assert capsys.readouterr().out.count("8 episodes: mean") == 2
    evaluated = [(row["update"], row["seed"], row["episodes"]) for row in read(run / "eval.csv")]
    assert evaluated == [("20", "0", "8"), ("20", "1", "8")]


def assert_close(run, other):
    for ours, theirs in zip(read(run / "metrics.csv"), read(other / "metrics.csv"), strict=True):
        for name, value in ours.items():
            assert float(value) == pytest.approx(float(theirs[name]), rel=1e-3, abs=1e-5), name


@pytest.mark.slow
def test_two_devices_give_the_metrics_of_one_and_a_run_can_move_between_them(tmp_path):
    """Whole runs on one and on two; then one that begins on two and goes on with one, and one the other way round."""
    flags = as_flags(**SMALL | {"num_episodes": 80, "memory_length": 12, "num_steps": 5})
    on_two = {"XLA_FLAGS": TWO_DEVICES}
    finish(run_script(*flags, "--run-dir", "one", cwd=tmp_path))
    finish(run_script(*flags, "--run-dir", "two", "--num-devices", 2, cwd=tmp_path, **on_two))
    assert_close(tmp_path / "two", tmp_path / "one")
    for name in ("one", "two"):  # back to the checkpoint after row 15 of 20
        shutil.rmtree(tmp_path / name / "checkpoints" / "20")
        shutil.copytree(tmp_path / name, tmp_path / f"{name}_moved")
    finish(run_script("--resume", "two_moved", cwd=tmp_path))
    finish(run_script("--resume", "one_moved", "--num-devices", 2, cwd=tmp_path, **on_two))
    assert_close(tmp_path / "two_moved", tmp_path / "one")
    assert_close(tmp_path / "one_moved", tmp_path / "one")
    out, err = finish(run_script("--eval", "one_moved", cwd=tmp_path))
    assert "update 20, 8 episodes" in out and err == ""


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_as_if_it_had_not(tmp_path):
    flags = as_flags(**SMALL | {"num_episodes": 2000, "num_rows": 60, "checkpoint_interval": 2})
    whole = run_script(*flags, "--run-dir", "whole", cwd=tmp_path)
    shorter = run_script(*flags, "--run-dir", "cut", cwd=tmp_path)
    while not (tmp_path / "cut" / "metrics.csv").exists() or len(read(tmp_path / "cut" / "metrics.csv")) < 3:
        assert shorter.poll() is None, "ended before it could be stopped"
        time.sleep(0.01)
    shorter.kill()
    shorter.communicate(timeout=120)
    finish(run_script("--resume", "cut", cwd=tmp_path))
    finish(whole)
    for name in ("metrics.csv", "bsuite_seed0.csv"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--env", "MNISTBandit"], "--env MNISTBandit: its images would have to be downloaded"),
        (["--env", "Cartpole"], "--env Cartpole: unknown; must be one of MemoryChain"),
        (["--memory-length", "0"], "--memory-length 0: must be above 0"),
        (["--gamma", "1.5"], "--gamma 1.5: must be at least 0 and at most 1"),
        (["--sweep", "mnist"], "--sweep mnist: must be one of memory_len"),
        (["--arch", "transformer"], "transformer"),
        (["--s5-dt-min", "1"], "--s5-dt-min 1.0: must be at most --s5-dt-max"),
        (["--num-devices", "3"], "--num-envs 16: must be a multiple of --num-devices 3"),
        (["--num-devices", "16"], "--num-devices 16: this machine has"),
        (["--distributed"], "--distributed True: needs a --run-dir"),
        (["--arch", "attention", "--s5-width", "12"], "--s5-width 12: must be a multiple of 8"),
        (["--resume", "nowhere"], "nowhere: not a run directory"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(flags, words, tmp_path, monkeypatch, capsys):
    assert_refused(a2c.main, flags, words, tmp_path, monkeypatch, capsys)


# ---------------------------------------------------------------- bsuite's analysis


@pytest.mark.parametrize(("sweep", "settings"), [(name, len(own)) for name, (_, own) in a2c.SWEEPS.items()])
def test_sweeps_have_the_settings_of_bsuite(sweep, settings):
    from bsuite import sweep as suite

    env, own = a2c.SWEEPS[sweep]
    renamed = {"num_distractors": "n_distractor"}
    assert settings == len([bsuite_id for bsuite_id in suite.SWEEP if bsuite_id.split("/")[0] == sweep])
    for i, setting in enumerate(own):
        for name, value in suite.SETTINGS[f"{sweep}/{i}"].items():
            ours = {renamed.get(key, key): x for key, x in setting.items()}
            assert value is None or ours[name] == value
        episodes = setting.get("num_episodes", a2c.EPISODES)
        assert episodes == suite.EPISODES[f"{sweep}/{i}"]


@pytest.mark.parametrize(
    ("sweep", "history", "score"),
    [
        ("memory_len", np.ones((10_000, 2)), 1.0),
        ("memory_len", np.tile([[1.0, 1.0], [-1.0, -1.0]], (5000, 1)), 0.0),
        ("umbrella_length", np.ones((10_000, 2)), 1.0),
        ("catch", np.ones((10_000, 2)), 1.0),
        ("bandit", np.ones((10_000, 2)), 1.0),
        ("discounting_chain", np.full((1000, 2), 1.1), 1.0),
        # its analysis calls a method that pandas 2 has no more
        pytest.param("deep_sea", np.ones((10_000, 2)), None, marks=pytest.mark.slow),
    ],
)
def test_bsuites_own_analysis_reads_and_scores_a_log(sweep, history, score, tmp_path):
    env, settings = a2c.SWEEPS[sweep]
    for i, setting in enumerate(settings):
        length = a2c.make_task(a2c.Args(env=env, **setting)).length
        a2c.write_bsuite_log(tmp_path / f"bsuite_id_-_{sweep}-{i}.csv", env, length, history.astype(np.float32))
    frame = csv_load.load_one_result_set(str(tmp_path))
    if score is None:
        assert frame.groupby("bsuite_id").denoised_return.max().tolist() == [10_000] * len(settings)
        return
    scores = summary_analysis.bsuite_score(frame)
    assert scores.bsuite_env.tolist() == [sweep] and scores.finished.all()
    assert scores.score.item() == pytest.approx(score, abs=1e-5)


@pytest.mark.slow
def test_a_sweep_writes_what_csv_load_reads_and_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    small = SMALL | {"num_episodes": 40, "arch": "mlp"}
    del small["memory_length"]  # the sweep sets it
    flags = as_flags(**small, sweep="memory_size", run_dir="sweep")
    monkeypatch.setitem(a2c.SWEEPS, "memory_size", (a2c.SWEEPS["memory_size"][0], a2c.SWEEPS["memory_size"][1][:2]))
    for _ in range(2):  # the second time there is nothing left to do
        run_here(a2c.main, *flags, cwd=tmp_path)
        stamps = [path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("summary.json"))]
        assert len(stamps) == 2
    frame = csv_load.load_one_result_set(str(tmp_path / "sweep" / "logs"))
    assert sorted(frame.num_bits.unique()) == [1, 2] and frame.episode.max() == 40


@pytest.fixture
def quick_sweeps(tmp_path, monkeypatch):
    """Sweeps of two settings whose training only notes its step size; the function sweeps with these flags."""

    def note(args):
        run = Path(args.run_dir)
        run.mkdir(parents=True)
        (run / f"bsuite_seed{args.seed}.csv").write_text(str(args.learning_rate))
        (run / "summary.json").write_text("{}")

    def sweep(*flags):
        monkeypatch.setattr(sys, "argv", ["a2c_s5_bsuite.py", *flags])
        return common.run_main(a2c.main)

    monkeypatch.setattr(a2c, "SWEEPS", {name: (env, own[:2]) for name, (env, own) in a2c.SWEEPS.items()})
    monkeypatch.setattr(a2c, "train", note)
    monkeypatch.chdir(tmp_path)
    return sweep


@pytest.mark.parametrize("name", a2c.SWEEPS)
def test_a_sweep_with_other_flags_than_its_directory_was_made_with_is_refused(name, quick_sweeps, tmp_path, capsys):
    assert quick_sweeps("--sweep", name, "--num-episodes", "32") == 0
    (root,) = (tmp_path / "runs").iterdir()
    logs = {path: path.read_text() for path in (root / "logs").iterdir()}
    assert len(logs) == 2 and set(logs.values()) == {"0.001"}
    capsys.readouterr()
    assert quick_sweeps("--sweep", name, "--learning-rate", "0.1", "--num-episodes", "64") == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and str(root.relative_to(tmp_path)) in err
    assert ("--num-episodes 64" in err and "made with 32" in err) or "--learning-rate 0.1" in err
    assert {path: path.read_text() for path in (root / "logs").iterdir()} == logs
    assert quick_sweeps("--sweep", name, "--num-episodes", "32") == 0  # its own flags go on
    own = ("--sweep", name, "--learning-rate", "0.1", "--run-dir", "another")
    assert quick_sweeps(*own) == quick_sweeps(*own) == 0
    assert {path.read_text() for path in (tmp_path / "another" / "logs").iterdir()} == {"0.1"}


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--sweep memory_len --env Catch", "--env Catch: --sweep memory_len sets it"),
        ("--sweep memory_len --memory-length 7", "--memory-length 7: --sweep memory_len sets it"),
        ("--sweep catch --seed 3", "--seed 3: --sweep catch sets it"),
        ("--sweep catch --num-seeds 2", "--num-seeds 2: must be 1 with --sweep catch"),
    ],
)
def test_flags_that_a_sweep_sets_are_refused(flags, words, quick_sweeps, tmp_path, capsys):
    assert quick_sweeps(*flags.split()) == 2
    assert capsys.readouterr().err == f"error: {words}\n"
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_has_at_most_as_many_episodes_as_bsuite(quick_sweeps, monkeypatch):
    found = {}
    train = a2c.train

    def note(args):
        found[args.num_episodes] = None
        train(args)

    monkeypatch.setattr(a2c, "train", note)
    for name in ("bandit", "discounting_chain"):
        for episodes in ("32", "20000"):
            assert quick_sweeps("--sweep", name, "--num-episodes", episodes, "--run-dir", name + episodes) == 0
    assert list(found) == [32, 10_000, 1000]


def test_a_directory_that_is_no_sweep_is_left_alone(quick_sweeps, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    assert quick_sweeps("--sweep", "bandit", "--run-dir", "mine") == 2
    assert "--run-dir mine: exists and is no sweep" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["file"]


# ---------------------------------------------------------------- benchmark


def test_memory_benchmark_takes_flags_for_the_script_only_where_it_trains(tmp_path, capsys):
    run_here(bsuite_memory.main, "--speed", "--", "--adam-eps", 1e-8, cwd=tmp_path, code=2)
    assert capsys.readouterr().err == "error: --speed: not together with flags for the script, -- --adam-eps 1e-08\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_memory_benchmark_measures_resumes_and_draws(tmp_path):
    args = bsuite_memory.Args(out=str(tmp_path), seconds=0.0)
    row = bsuite_memory.measure(args, "paper", "mlp", 2)
    assert row["episodes"] == 10_000 and row["memory_mib"] > 0
    expected = row["compile_seconds"] + 10_000 * 3 / row["steps_per_second"]
    assert bsuite_memory.wall_seconds(row) == pytest.approx(expected)
    keep_rows(tmp_path / "speed.csv", [row], ("preset", "arch", "length"))
    # a run that is finished is read, not repeated
    a2c.train(small_args(run_dir=str(tmp_path / "default__s5__6__s0"), num_episodes=40))
    for _ in range(2):
        row = bsuite_memory.train(args, "default", "s5", 6, 0)
        keep_rows(tmp_path / "runs.csv", [row], ("preset", "arch", "length", "seed"))
    assert [(row["episodes"], row["env_steps"]) for row in read(tmp_path / "runs.csv")] == [("40", "280")]
    bsuite_memory.draw(tmp_path)
    assert (tmp_path / "memory.png").stat().st_size > 10_000
