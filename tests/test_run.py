"""The command line and the run directory: what a run leaves, how it stops and goes on, and what it refuses."""

import csv
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import QUICK, ROOT, SCRIPT, TWO_DEVICES, as_flags, finish, run_here, start_script, tiny_args, tiny_flags

import ppo_s5_popgym as ppo
import s5_common as common

UPDATES = 60  # of a tiny run
SHORT = {"env": "RepeatEasy", "arch": "mlp", "seed": 5, "total_timesteps": 128}  # of one update

pytestmark = pytest.mark.usefixtures("quick")


def in_process(monkeypatch, capsys, *flags):
    """Exit code, stdout and stderr of the script's main, without a process of its own."""
    monkeypatch.setattr(sys, "argv", ["ppo_s5_popgym.py", *map(str, flags)])
    code = common.run_main(ppo.main)
    return code, *capsys.readouterr()


_compiled = {}  # fresh runners and updates by their flags


def of_flags(args, **irrelevant):
    return str(replace(args, run_dir="", resume="", eval="", eval_episodes=2, checkpoint_interval=1, **irrelevant))


@contextmanager
def compiling_once():
    """Whatever runs in this process compiles what the same flags need once."""
    init_runners, compile_update = ppo.init_runners, ppo.compile_update

    def fresh(setup):
        name = "init", of_flags(setup.args, learning_rate=0.0)
        if name not in _compiled:
            _compiled[name] = jax.tree.map(np.array, init_runners(setup))
        return jax.tree.map(lambda x: jnp.array(x.copy()), _compiled[name])  # copies, as an update takes them

    def update(setup, runners):
        name = "update", of_flags(setup.args, seed=0)
        if name not in _compiled:
            _compiled[name] = compile_update(setup, runners)
        return _compiled[name]

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(ppo, "init_runners", fresh)
        monkeypatch.setattr(ppo, "compile_update", update)
        yield


@pytest.fixture
def compiled_once():
    with compiling_once():
        yield


def rows(run):
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def files(folder):
    """Every file under a folder and what is in it."""
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two runs with the same flags, one of them in this process, and what the other one printed."""
    folder = tmp_path_factory.mktemp("finished")
    process = start_script(*tiny_flags(run_dir="first"), cwd=folder)
    with compiling_once():
        run_here(ppo.main, *tiny_flags(run_dir="second"), cwd=folder)
    return folder, *finish(process)


# ---- a whole run -----------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_metrics(finished):
    folder, _, _ = finished
    assert (folder / "first" / "metrics.csv").read_bytes() == (folder / "second" / "metrics.csv").read_bytes()


def test_a_run_leaves_its_flags_metrics_events_checkpoints_picture_and_summary(finished):
    run = finished[0] / "first"
    assert list(finished[0].glob("*.tmp")) == [] and list(run.glob("*.tmp")) == []
    assert (run / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert list(run.glob("events.out.tfevents.*")) and list((run / "checkpoints").glob("60"))
    about = json.loads((run / "args.json").read_text())
    assert about["args"]["num_envs"] == 8 and about["args"]["encoder_layers"] == [16]
    assert {"git_commit", "device", "versions"} <= set(about)


def test_the_summary_says_what_the_metrics_say(finished):
    run = finished[0] / "first"
    summary, table = json.loads((run / "summary.json").read_text()), rows(run)
    keys = "script env arch preset seeds env_steps updates compile_seconds run_seconds steps_per_second final_return"
    assert set(f"{keys} best_return final_returns best_returns git_commit device versions".split()) <= set(summary)
    returns = [float(row["return_mean"]) for row in table if row["return_mean"]]
    assert summary["final_return"] == returns[-1] and summary["best_return"] == max(returns)
    assert summary["final_returns"] == [returns[-1]] and summary["best_returns"] == [max(returns)]
    assert summary["updates"] == len(table) == UPDATES == int(table[-1]["update"])
    assert summary["env_steps"] == int(table[-1]["env_steps"]) == UPDATES * 8 * 16
    assert (summary["env"], summary["arch"], summary["seeds"]) == ("RepeatPreviousEasy", "s5", [0])
    assert 0 < summary["compile_seconds"] < summary["run_seconds"] and summary["steps_per_second"] > 0


def test_metrics_hold_no_nan_and_returns_only_where_an_episode_ended(finished):
    table = rows(finished[0] / "first")
    for row in table:
        assert (int(row["episodes"]) == 0) == (row["return_mean"] == "") == (row["length_mean"] == "")
        assert all(abs(float(value)) < 1e9 for name, value in row.items() if not name.endswith("_mean"))
        assert float(row["first_ratio_error"]) < 1e-5
    lengths = {float(row["length_mean"]) for row in table if row["length_mean"]}
    assert lengths == {51.0}  # of every RepeatPreviousEasy episode; some rollouts of 16 steps end none
    assert any(row["return_mean"] == "" for row in table)


def test_progress_is_one_plain_line_at_a_time_when_not_on_a_terminal(finished):
    _, out, err = finished
    assert err == "" and "\r" not in out and "\x1b" not in out
    assert out.splitlines()[-1].endswith(": first") and "7,680" in out


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """A run of one update, in which no episode ends, in the directory that it has made for itself."""
    folder = tmp_path_factory.mktemp("short")
    with compiling_once():
        run_here(ppo.main, *tiny_flags(**SHORT), cwd=folder)
    (run,) = (folder / "runs").iterdir()
    return run


@pytest.mark.slow
def test_a_summary_of_a_run_in_which_no_episode_ended_is_still_json(short_run):
    """The mean over no episode has no value: null, not NaN, which strict JSON readers refuse."""
    (row,) = rows(short_run)
    assert row["episodes"] == "0"
    refuse = pytest.fail
    json.loads((short_run / "summary.json").read_text(), parse_constant=lambda name: refuse(f"{name} in JSON"))


def test_default_run_directory_names_environment_script_arch_seed_and_time(short_run):
    assert re.fullmatch(r"RepeatPreviousEasy__ppo_s5_popgym__mlp__s5__\d{8}-\d{6}-[0-9a-f]{6}", short_run.name)


@pytest.mark.slow
def test_seeds_in_one_program_equal_separate_runs(finished, compiled_once, tmp_path, monkeypatch, capsys):
    for flags in ({"run_dir": tmp_path / "both", "num_seeds": 2}, {"run_dir": tmp_path / "one", "seed": 1}):
        code, _, err = in_process(monkeypatch, capsys, *tiny_flags(**flags))
        assert (code, err) == (0, "")
    for seed, single in enumerate((finished[0] / "first", tmp_path / "one")):
        together = [row for row in rows(tmp_path / "both") if row["seed"] == str(seed)]
        assert len(together) == UPDATES
        for got, expected in zip(together[:10], rows(single)[:10], strict=True):
            for name in got:
                assert got[name] == expected[name] or float(got[name]) == pytest.approx(float(expected[name]), abs=1e-5)
    summary = json.loads((tmp_path / "both" / "summary.json").read_text())
    assert summary["seeds"] == [0, 1] and summary["env_steps"] == 7680
    assert summary["final_return"] == pytest.approx(sum(summary["final_returns"]) / 2)


# ---- stopping and going on -------------------------------------------------------------------------------------------


def run_until(condition, *flags, cwd):
    """Start the script, wait until the condition holds, and hand over the process that is still running."""
    process, deadline = start_script(*flags, cwd=cwd), time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return process


def row_count(run):
    try:
        return len((run / "metrics.csv").read_text().splitlines()) - 1
    except FileNotFoundError:
        return -1


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed_equals_never_stopped(finished, tmp_path):
    """kill -9 as soon as the directory is there, at the first checkpoint, and twice between or in checkpoints."""
    run = tmp_path / "run"
    moments = [
        run.exists,
        lambda: any((run / "checkpoints").glob("0*")),
        lambda: row_count(run) >= 3,
        lambda: row_count(run) >= 20,
    ]
    flags = tiny_flags(run_dir=run, checkpoint_interval=1)
    for moment in moments:
        process = run_until(moment, *flags, cwd=tmp_path)
        process.kill()
        finish(process, -signal.SIGKILL)
        assert row_count(run) < UPDATES
        flags = ["--resume", run]
    finish(start_script("--resume", run, cwd=tmp_path))
    reference = finished[0] / "first"
    assert (run / "metrics.csv").read_bytes() == (reference / "metrics.csv").read_bytes()
    resumed, whole = (json.loads((path / "summary.json").read_text()) for path in (run, reference))
    for name in ("updates", "env_steps", "final_return", "best_return", "seeds"):
        assert resumed[name] == whole[name]


@pytest.mark.slow
def test_interrupted_runs_exit_130_and_143_and_the_printed_command_resumes_them_from_anywhere(
    finished, compiled_once, tmp_path, monkeypatch, capsys
):
    """As it is printed, pasted into a shell in another directory; the run's name has a space and a $ in it. The second
    of its three parts is in this process."""
    run, elsewhere = tmp_path / "my $RUN", tmp_path / "elsewhere"
    elsewhere.mkdir()
    process = run_until(
        lambda: row_count(run) >= 3, *tiny_flags(run_dir=run.name, checkpoint_interval=50), cwd=tmp_path
    )
    process.send_signal(signal.SIGINT)
    out, err = finish(process, 130)
    command = out.splitlines()[-1].removeprefix("stopped; go on with: ")
    assert shlex.split(command)[1:] == [str(SCRIPT), "--resume", str(run)] and err == ""
    at = row_count(run)
    assert 3 <= at < UPDATES and (run / "checkpoints" / str(at)).exists()

    monkeypatch.chdir(elsewhere)
    update = common.RunDirectory.update

    def terminated(run, *arguments):
        update(run, *arguments)
        if run.done == at + 3:  # where its checkpoint would have been saved already
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(common.RunDirectory, "update", terminated)
        in_process(monkeypatch, capsys, *shlex.split(command)[2:])
    out, err = capsys.readouterr()
    assert stop.value.code == 143 and out.splitlines()[-1].endswith(shlex.quote(str(run))) and err == ""
    assert row_count(run) == at + 4 and (run / "checkpoints" / str(at + 4)).exists()
    environment = os.environ | {"XLA_FLAGS": QUICK}
    pasted = subprocess.run(command, shell=True, cwd=elsewhere, env=environment, capture_output=True, text=True)
    assert (pasted.returncode, pasted.stderr) == (0, "")
    assert (run / "metrics.csv").read_bytes() == (finished[0] / "first" / "metrics.csv").read_bytes()


@pytest.mark.slow
def test_interrupted_while_compiling_exits_130_without_a_traceback(tmp_path):
    run = tmp_path / "run"
    process = run_until((run / "checkpoints" / "0").exists, *tiny_flags(run_dir="run"), cwd=tmp_path)
    process.send_signal(signal.SIGINT)
    out, err = finish(process, 130)
    assert "Traceback" not in err and f"--resume {run}" in out


def test_a_finished_run_resumed_changes_no_metric(finished, compiled_once, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished[0] / "first", run)
    monkeypatch.chdir(tmp_path)
    code, _, err = in_process(monkeypatch, capsys, "--resume", run)
    assert (code, err) == (0, "")
    assert (run / "metrics.csv").read_bytes() == (finished[0] / "first" / "metrics.csv").read_bytes()
    for name in ("final_return", "best_return", "updates", "env_steps", "steps_per_second"):
        then, now = (json.loads((path / "summary.json").read_text()) for path in (finished[0] / "first", run))
        assert now[name] == then[name]


def truncate_newest_checkpoint(run):
    for path in (run / "checkpoints" / "60" / "state").rglob("*"):  # the arrays' files: orbax may keep some twice
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def remove_checkpoints(run):
    shutil.rmtree(run / "checkpoints")


def empty_checkpoints(run):
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()


def remove_the_state(run):
    shutil.rmtree(run / "checkpoints" / "60" / "state")


def edit_args(run, change):
    about = json.loads((run / "args.json").read_text())
    change(about["args"])
    (run / "args.json").write_text(json.dumps(about))


def edit_the_flags(run):
    edit_args(run, lambda args: args.update(learning_rate=0.5))


def edit_the_width(run):
    edit_args(run, lambda args: args.update(s5_width=32))


def drop_a_flag(run):
    """As a version without it would have left the run."""
    edit_args(run, lambda args: args.pop("s5_gain"))


def break_args_json(run):
    (run / "args.json").write_text('{"args": {')


def remove_args_json(run):
    (run / "args.json").unlink()


@pytest.mark.parametrize("how", ["--resume", "--eval"])
@pytest.mark.parametrize(
    "damage, named",
    [
        (truncate_newest_checkpoint, "checkpoint 60"),
        (remove_the_state, "checkpoint 60"),
        (remove_checkpoints, "checkpoint"),
        (empty_checkpoints, "checkpoint"),
        (edit_the_flags, "learning_rate 0.001"),  # a checkpoint of other flags: the shapes fit, the run does not
        (edit_the_width, "checkpoint 60"),
        (drop_a_flag, "without s5_gain in its args.json"),
        (break_args_json, "not a run directory"),
        (remove_args_json, "not a run directory"),
    ],
)
def test_a_damaged_or_foreign_checkpoint_is_refused_and_nothing_is_changed(
    damage, named, how, finished, compiled_once, tmp_path, monkeypatch, capsys
):
    run = tmp_path / "run"
    shutil.copytree(finished[0] / "first", run)
    damage(run)
    before = files(tmp_path)
    code, out, err = in_process(monkeypatch, capsys, how, run)
    assert code == 2 and err.count("\n") == 1 and named in err and str(run) in err
    assert files(tmp_path) == before and out == ""


def test_any_single_truncated_file_of_a_checkpoint_is_refused(finished, compiled_once, tmp_path, capfd):
    """With nothing of orbax's or tensorstore's on stderr, where the one line of run_main is to stand alone."""
    setup = ppo.make_setup(args := ppo.Args(**json_args(finished[0] / "first")))
    template = ppo.init_runners(setup)
    shutil.copytree(finished[0] / "first", run := tmp_path / "run")

    def restore():
        return common.RunDirectory(replace(args, eval=str(run)), args.env, "ppo_s5_popgym").restore(template)

    right = list(map(np.asarray, jax.tree.leaves(restore())))
    files_of_it = [path for path in (run / "checkpoints" / "60").rglob("*") if path.is_file()]
    assert {"SHA256SUMS", "about.json", "manifest.ocdbt"} <= {path.name for path in files_of_it}
    for path in files_of_it:
        whole = path.read_bytes()
        if whole:
            path.write_bytes(whole[: len(whole) // 2])
            with pytest.raises(common.UsageError, match="checkpoint 60 is damaged"):
                restore()
            path.write_bytes(whole)
    np.testing.assert_equal(list(map(np.asarray, jax.tree.leaves(restore()))), right)
    assert capfd.readouterr().err == ""


def test_sha256sum_finds_a_checkpoint_whole(finished):
    folder = finished[0] / "first" / "checkpoints" / "60"
    subprocess.run(["sha256sum", "--check", "--quiet", "--strict", "SHA256SUMS"], cwd=folder, check=True)


@pytest.mark.parametrize(
    "flag, value", [("learning_rate", 0.5), ("env", "RepeatFirstEasy"), ("seed", 1), ("arch", "mlp")]
)
def test_a_flag_that_contradicts_the_resumed_run_is_refused(flag, value, finished, monkeypatch, capsys):
    run = finished[0] / "first"
    before = files(run)
    code, _, err = in_process(monkeypatch, capsys, "--resume", run, *as_flags(**{flag: value}))
    assert code == 2 and err.count("\n") == 1
    assert f"--{flag.replace('_', '-')} {value}" in err and str(getattr(ppo.Args(**json_args(run)), flag)) in err
    assert files(run) == before


def json_args(run):
    stored = json.loads((run / "args.json").read_text())["args"]
    return {name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()}


def test_a_loss_that_is_not_finite_stops_with_1_and_keeps_the_last_good_checkpoint(
    compiled_once, tmp_path, monkeypatch, capsys
):
    """Far too large a step; nothing that is not finite reaches the metrics or a checkpoint."""
    run = tmp_path / "run"
    flags = tiny_flags(run_dir=run, learning_rate=1e12, arch="mlp", anneal_lr=False, checkpoint_interval=1)
    code, _, err = in_process(monkeypatch, capsys, *flags)
    assert code == 1 and err.count("\n") == 1
    stopped_at = int(re.search(r"not finite at update (\d+), seed 0", err)[1])
    assert str(run) in err and not (run / "summary.json").exists()
    assert max(row_count(run), 0) == stopped_at - 1
    assert max(int(path.name) for path in (run / "checkpoints").iterdir()) == stopped_at - 1
    code, out, err = in_process(monkeypatch, capsys, "--eval", run)
    assert (code, err) == (0, "") and "nan" not in out and f"update {stopped_at - 1}," in out


def test_signals_are_handled_as_before_once_a_loop_is_left_by_an_error(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        with pytest.raises(FloatingPointError), common.RunDirectory(tiny_args(run_dir=str(tmp_path / "run")), "", ""):
            assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] != before
            raise FloatingPointError
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(number, handler)


def test_what_seeds_return_is_said_whatever_its_size_and_without_those_of_no_episode():
    assert common.mean_of([1.0, None, 4.0]) == 2.5 and common.mean_of([None]) is None
    words = [common.in_words(value) for value in (None, 8.7654e-05, -0.49876, 791.26)]
    assert words == ["none", "8.765e-05", "-0.4988", "791.3"]


def test_a_number_of_processes_that_is_none_is_a_usage_error(monkeypatch):
    monkeypatch.setattr(jax.extend.backend, "clear_backends", lambda: None)
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(common.UsageError, match="--distributed True: JAX_COORDINATOR_ADDRESS.* must name a cluster"):
        common.join_cluster()


@pytest.mark.slow
def test_a_cluster_without_a_coordinator_is_one_line_and_exit_code_2(tmp_path):
    process = start_script("--distributed", "--run-dir", "run", cwd=tmp_path)
    out, err = process.communicate()
    assert (process.returncode, out, err.count("\n")) == (2, "", 1)
    assert "--distributed True" in err and "coordinator_address" in err and list(tmp_path.iterdir()) == []


def test_a_mesh_has_devices_of_every_process(monkeypatch):
    assert common.device_mesh(1).shape == {"env": 1}
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(common.UsageError, match="--num-devices 1: must be .*, all devices of the 2 processes"):
        common.device_mesh(1)


# ---- evaluation and listings -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_evaluation_prints_mean_error_and_quantiles_the_same_each_time_and_writes_nothing_but_its_table(
    finished, compiled_once, monkeypatch, capsys
):
    folder, run = finished[0], finished[0] / "first"
    before = files(folder)
    out, err = finish(start_script("--eval", run, cwd=folder))
    assert err == "" and in_process(monkeypatch, capsys, "--eval", run) == (0, out, "")
    numbers = [float(number) for number in re.findall(r"-?\d\.\d{4}", out)]
    mean, error, *quantiles = numbers
    assert "update 60, 8 episodes" in out and len(quantiles) == 5
    assert quantiles == sorted(quantiles) and quantiles[0] <= mean <= quantiles[-1] and error > 0
    table = run / "eval.csv"
    [row] = csv.DictReader(table.open())
    written = [float(value) for value in row.values()]
    np.testing.assert_allclose(written, [60, 0, 8, *numbers], atol=1e-4)
    table.unlink()
    assert files(folder) == before


def test_evaluation_takes_its_own_number_of_episodes(finished, compiled_once, monkeypatch, capsys):
    code, out, err = in_process(monkeypatch, capsys, "--eval", finished[0] / "first", "--eval-episodes", 3)
    assert (code, err) == (0, "") and "3 episodes" in out


def test_list_envs_prints_every_environment(monkeypatch, capsys):
    code, out, err = in_process(monkeypatch, capsys, "--list-envs")
    assert (code, err) == (0, "")
    assert {"RepeatPreviousHard", "PositionOnlyCartPoleEasy", "NoisyPositionOnlyPendulumMedium"} <= set(out.split())


def test_help_names_and_explains_every_flag(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ppo_s5_popgym.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        common.run_main(ppo.main)
    assert not stop.value.code
    out = capsys.readouterr().out
    words = " ".join(line.strip("│╭╰╮╯─ ") for line in re.sub(r"\x1b\[[0-9;]*m", "", out).splitlines())
    for name in ppo.Args.__dataclass_fields__:
        explained = re.search(rf"--{name.replace('_', '-')}[ ,][^(]*?[a-z]{{3}}[^(]* [^(]*\(", words)
        assert explained, name


def test_importing_the_script_does_nothing(tmp_path):
    """Beyond what importing its libraries does: no output, no file, no array, no thread, the signals as they were."""
    code = (
        "import signal, threading, flax, gymnax, jax, optax, orbax.checkpoint, tensorboardX, tqdm, tyro\n"
        "def state():\n"
        "    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]\n"
        "    return len(jax.live_arrays()), threading.active_count(), handlers\n"
        "before = state()\n"
        "import ppo_s5_popgym\n"
        "assert state() == before, (state(), before)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


# ---- bad input -------------------------------------------------------------------------------------------------------


BAD = {
    "--env RepeatPreviosHard": ("RepeatPreviosHard", "RepeatPreviousHard"),
    "--env ''": ("--env", "nearest"),
    "--no-such-flag 3": ("--no-such-flag",),
    "stray": ("stray",),
    "--num-envs": ("--num-envs",),
    "--num-envs many": ("--num-envs", "many"),
    "--num-envs 2.5": ("--num-envs", "2.5"),
    "--num-envs 0": ("--num-envs 0", "above 0"),
    "--num-envs -8": ("--num-envs -8", "above 0"),
    "--num-envs 9": ("--num-envs 9", "--num-minibatches 2"),
    "--num-minibatches 16": ("--num-envs 8", "--num-minibatches 16"),
    "--num-steps 0": ("--num-steps 0",),
    "--total-timesteps 0": ("--total-timesteps 0",),
    "--update-epochs -1": ("--update-epochs -1",),
    "--learning-rate nan": ("--learning-rate nan",),
    "--learning-rate inf": ("--learning-rate inf",),
    "--learning-rate -0.001": ("--learning-rate -0.001",),
    "--gamma 2": ("--gamma 2", "at most 1"),
    "--gamma -0.1": ("--gamma -0.1", "at least 0"),
    "--gae-lambda 1.01": ("--gae-lambda 1.01", "at most 1"),
    "--clip-coef 0": ("--clip-coef 0",),
    "--max-grad-norm 0": ("--max-grad-norm 0",),
    "--ent-coef -1": ("--ent-coef -1",),
    "--seed -1": ("--seed -1",),
    "--seed 99999999999": ("--seed 99999999999",),
    "--num-seeds 0": ("--num-seeds 0",),
    "--s5-layers 0": ("--s5-layers 0",),
    "--s5-state 0": ("--s5-state 0",),
    "--s5-dt-min 0.5": ("--s5-dt-min 0.5", "--s5-dt-max 0.1"),
    "--encoder-layers 16 0": ("--encoder-layers", "0"),
    "--attention-window 0": ("--attention-window 0",),
    "--arch attention --s5-width 12": ("--s5-width 12", "multiple of 8"),
    "--arch mingru --s5-dt-max 1.5": ("--s5-dt-max 1.5", "below 1"),
    "--arch rnn": ("--arch", "rnn", "s5-noreset"),
    "--preset fast": ("--preset", "fast", "paper"),
    "--anneal-lr maybe": ("maybe",),
    "--checkpoint-interval 0": ("--checkpoint-interval 0",),
    "--eval-episodes 0": ("--eval-episodes 0",),
    "--eval-episodes 1": ("--eval-episodes 1", "at least 2"),  # one return has no standard error
    "--s5-width 1": ("--s5-width 1", "at least 2"),  # one feature, normalised, is 0
    "--num-steps 1 --num-minibatches 8": ("--num-minibatches 8", "at least 2 of 8 x 1 steps"),
    f"--run-dir {'long' * 65}": ("--run-dir longlong", "too long"),
    "--seed 2147483647 --num-seeds 2": ("--num-seeds 2", "--seed 2147483647"),
    "--trial-discount 1.5": ("--trial-discount 1.5", "at most 1"),
    "--env RepeatEasy --trial-discount 0.5": ("--trial-discount 0.5", "no trials"),
    "--env RepeatEasy --preset meta": ("--trial-discount 0.5 of --preset meta", "no trials"),
    "--eval-beside other": ("--eval-beside other", "needs --eval"),
    "--num-envs 102400000000": ("--num-envs 102400000000", "at most"),
    "--env RepeatEasy --aux-coef 1": ("--aux-coef 1", "nothing hidden"),
    "--readout product": ("--readout", "product", "multiplicative"),
    "--obs-change -1": ("--obs-change -1", "at least 0"),
    "--num-devices 0": ("--num-devices 0",),
    "--num-devices 4": ("--num-devices 4",),
    "--run-dir taken": ("--run-dir taken", "--resume taken"),
    "--run-dir taken/file/run": ("--run-dir taken/file/run",),
    "--resume nowhere": ("nowhere", "not a run directory"),
    "--resume taken --eval nowhere": ("--eval nowhere", "--resume taken"),
    "--eval nowhere": ("nowhere", "not a run directory"),
    "--resume taken": ("taken", "not a run directory"),
    "--track": ("--track", "wandb"),
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_one_line_and_exit_code_2_and_leaves_nothing(words, tmp_path, monkeypatch, capsys):
    """The line names the flag, its value and what is allowed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    if words == "--track":
        monkeypatch.setitem(sys.modules, "wandb", None)
        monkeypatch.setattr(common, "find_spec", lambda name: None)
    flags = ["" if word == "''" else word for word in words.split()]
    flags = flags if flags[0] in ("--resume", "--eval") else [*tiny_flags(num_devices=1), *flags]
    code, out, err = in_process(monkeypatch, capsys, *flags)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    for part in BAD[words]:
        assert part in err
    assert set(tmp_path.rglob("*")) == {tmp_path / "taken", tmp_path / "taken" / "file"}


def test_bad_number_of_episodes_is_refused_for_an_existing_run_too(finished, monkeypatch, capsys):
    code, _, err = in_process(monkeypatch, capsys, "--eval", finished[0] / "first", "--eval-episodes", 0)
    assert code == 2 and err.count("\n") == 1 and "--eval-episodes 0" in err


def test_bad_input_in_a_process_of_its_own(tmp_path):
    out, err = finish(start_script("--resume", "nowhere", cwd=tmp_path), 2)
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_run_killed_before_its_directory_was_complete_can_be_started_again(
    compiled_once, tmp_path, monkeypatch, capsys
):
    """What the first attempt left behind does not stand in the way."""

    def die(*_):
        raise KeyboardInterrupt

    flags = tiny_flags(run_dir=tmp_path / "run", **SHORT)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(common, "provenance", die)
        in_process(monkeypatch, capsys, *flags)
    code, _, err = in_process(monkeypatch, capsys, *flags)
    assert (code, err) == (0, "") and row_count(tmp_path / "run") == 1


def test_help_into_a_closed_pipe_is_no_error():
    command = f"{sys.executable} {SCRIPT} --help | true"  # which ends before the first line is there
    ended = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (128 + signal.SIGPIPE, "")


def test_learning_curves_of_several_seeds_are_their_mean_in_a_band(tmp_path, monkeypatch):
    """Seed 1 has seen no episode end in the first update; a run of one seed is a line alone."""
    drawn = []
    monkeypatch.setattr(common.Figure, "savefig", lambda figure, *_, **__: drawn.append(figure.axes[0]))
    several = {(10, 0): 1.0, (10, 1): "", (20, 0): 2.0, (20, 1): 4.0, (20, 2): 9.0}
    rows = [{"env_steps": step, "seed": seed, "return_mean": x} for (step, seed), x in several.items()]
    alone = [{"env_steps": 10, "seed": 3, "return_mean": -1.0}, {"env_steps": 20, "seed": 3, "return_mean": -2.0}]
    common.plot_learning_curves({"many": rows, "_one": alone}, tmp_path / "picture.png")
    (axes,) = drawn
    assert [line.get_xydata().tolist() for line in axes.lines] == [[[10, 1], [20, 5]], [[10, -1], [20, -2]]]
    assert [line.get_label() for line in axes.lines] == ["many, mean and range of 3 seeds", "one, seed 3"]
    (band,) = axes.collections
    corners = {tuple(corner) for corner in band.get_paths()[0].vertices.tolist()}
    assert corners == {(10.0, 1.0), (20.0, 2.0), (20.0, 9.0)}


def test_names_are_drawn_as_they_are_and_a_picture_that_fails_costs_a_warning(
    compiled_once, tmp_path, monkeypatch, capsys
):
    """A run directory whose name is no valid mathematics; then a disk that takes no pictures."""
    monkeypatch.chdir(tmp_path)
    flags = tiny_flags(run_dir="$SLURM_JOB_ID_$SEED", **SHORT)
    assert in_process(monkeypatch, capsys, *flags)[::2] == (0, "")
    assert (tmp_path / "$SLURM_JOB_ID_$SEED" / "learning_curve.png").exists()

    def fail(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(common.Figure, "savefig", fail)
    code, _, err = in_process(monkeypatch, capsys, "--resume", "$SLURM_JOB_ID_$SEED")
    assert code == 0 and err.count("\n") == 1 and "warning:" in err and "learning_curve.png" in err
    assert json.loads((tmp_path / "$SLURM_JOB_ID_$SEED" / "summary.json").read_text())["updates"] == 1


def test_default_directories_of_runs_that_start_together_differ_and_are_not_too_long():
    names = {common.default_directory(tiny_args(), "BallInCup," * 25, "muesli_s5_metarl") for _ in range(100)}
    assert len(names) == 100 and max(map(len, names)) < 200


def test_training_outside_of_the_main_thread(compiled_once, tmp_path):
    """Where Python lets nobody handle signals."""
    with ThreadPoolExecutor(1) as pool:
        args = tiny_args(**SHORT, run_dir=str(tmp_path / "run"))
        assert pool.submit(ppo.train, args).result()["updates"] == 1


# ---- damaged tables --------------------------------------------------------------------------------------------------


def cut_the_last_line(text):
    return text[:-20], 1


def append_zeros(text):
    return text + "\0" * 40, 0  # what a crash of the machine may leave behind whole rows


def zeros_for_the_last_rows(text):
    lines = text.splitlines(keepends=True)
    return "".join(lines[:-2]) + "\0" * 40, 2


def nothing(text):
    return "", UPDATES


def no_header(text):
    return text.split("\n", 1)[1], 1  # the first row has taken its place


def without_some_rows(text):
    lines = text.splitlines(keepends=True)
    return "".join(lines[:10] + lines[13:]), 3


def words_for_numbers(text):
    lines = text.splitlines(keepends=True)
    lines[5] = lines[5].replace("0.", "o.")
    return "".join(lines), 1


@pytest.mark.parametrize(
    "damage",
    [
        cut_the_last_line,
        append_zeros,
        zeros_for_the_last_rows,
        nothing,
        no_header,
        without_some_rows,
        words_for_numbers,
    ],
)
def test_of_a_damaged_table_what_is_whole_is_kept_and_what_is_missing_is_said(damage, finished, tmp_path, capsys):
    whole = (finished[0] / "first" / "metrics.csv").read_text()
    damaged, missing = damage(whole)
    (tmp_path / "metrics.csv").write_text(damaged)
    columns = whole.split("\n", 1)[0].split(",")
    log = common.MetricsLog(tmp_path, writes=True)
    log.resume(columns, UPDATES, [0])
    err = capsys.readouterr().err
    assert len(log.kept) == UPDATES - missing
    assert all(",".join(row.values()) in whole for row in log.kept)
    assert err.count("\n") == bool(missing)
    if missing:
        assert f"{missing} of {UPDATES} rows" in err and "damaged or missing" in err


def test_a_run_with_a_damaged_table_is_resumed(finished, compiled_once, tmp_path, monkeypatch, capsys):
    """From checkpoint 50 of 60, with three whole rows and a part of the fourth."""
    run = tmp_path / "run"
    shutil.copytree(finished[0] / "first", run)
    shutil.rmtree(run / "checkpoints" / "60")
    lines = (run / "metrics.csv").read_text().splitlines(keepends=True)
    (run / "metrics.csv").write_text("".join(lines[:4]) + lines[4][:30])
    code, _, err = in_process(monkeypatch, capsys, "--resume", run)
    assert code == 0 and err.count("\n") == 1 and "47 of 50 rows, of updates 4 to 50" in err
    whole = (finished[0] / "first" / "metrics.csv").read_text().splitlines()
    assert (run / "metrics.csv").read_text().splitlines()[:4] == whole[:4]
    assert [int(row["update"]) for row in rows(run)] == [1, 2, 3, *range(51, UPDATES + 1)]


def test_tables_have_unix_line_ends(finished):
    assert b"\r" not in (finished[0] / "first" / "metrics.csv").read_bytes()


@pytest.mark.slow
def test_an_update_costs_no_more_after_10_000_rows_than_after_100(tmp_path):
    """Counted in calls of Python functions."""

    def calls_of_an_update(rows):
        run = common.RunDirectory(tiny_args(run_dir=str(tmp_path / str(rows)), checkpoint_interval=10**9), "", "")
        run.restore({"x": jnp.zeros(1)})
        run.compiled(10**9, steps=1)
        metrics = {"policy_loss": np.zeros(1), "return_mean": common.Mean(np.ones(1), np.ones(1, int))}
        calls = 0

        def count(frame, event, _):
            nonlocal calls
            calls += event in ("call", "c_call")

        for _ in range(rows):
            run.update(None, metrics)
        run.progress.printed = run.progress.now + 1e9  # no progress line among what is counted
        sys.setprofile(count)
        try:
            run.update(None, metrics)
        finally:
            sys.setprofile(None)
        return calls

    few, many = calls_of_an_update(100), calls_of_an_update(10_000)
    assert few > 10 and abs(many - few) <= 5


def test_where_the_newer_checkpoint_is_damaged_the_older_one_is_offered(
    finished, compiled_once, tmp_path, monkeypatch, capsys
):
    """A single bit in the middle of each file with arrays; what the line tells one to do then works."""
    run = tmp_path / "run"
    shutil.copytree(finished[0] / "first", run)
    for path in (run / "checkpoints" / "60" / "state").rglob("d/*"):  # orbax keeps some arrays twice
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
    code, out, err = in_process(monkeypatch, capsys, "--eval", run)
    assert (code, out, err.count("\n")) == (2, "", 1)
    remove = f"remove {run}/checkpoints/60 to go on from checkpoint 50, which is whole"
    assert "checkpoint 60 is damaged" in err and remove in err
    shutil.rmtree(run / "checkpoints" / "60")
    code, out, err = in_process(monkeypatch, capsys, "--eval", run)
    assert (code, err) == (0, "") and "update 50," in out


# ---- several devices, several processes ------------------------------------------------------------------------------


def assert_same_metrics(run, reference):
    """In the first updates: sums in another order part two runs in the end."""
    assert row_count(run) == UPDATES
    for ours, theirs in zip(rows(run)[:10], rows(reference)[:10], strict=True):
        assert ours["episodes"] == theirs["episodes"]
        for name in ("return_mean", "entropy", "policy_loss", "value_loss", "grad_norm"):
            if ours[name] or theirs[name]:
                assert float(ours[name]) == pytest.approx(float(theirs[name]), rel=1e-2, abs=1e-3), name


STOPS = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import ppo_s5_popgym, s5_common
last = int(sys.argv.pop())
update = s5_common.RunDirectory.update
def stopping(run, *arguments):
    if run.done + 1 == last:
        run.signals.append(15)
    update(run, *arguments)
s5_common.RunDirectory.update = stopping
sys.exit(s5_common.run_main(ppo_s5_popgym.main))
"""


def stopped_at(update, cwd, devices=1, **flags):
    """A tiny run that gets a signal in this update."""
    variables = {"XLA_FLAGS": TWO_DEVICES} if devices == 2 else {}
    words = tiny_flags(**flags, num_devices=devices)
    finish(start_script(*words, update, cwd=cwd, program=("-c", STOPS), **variables), 143)


@pytest.mark.parametrize("before, after", [(2, 1), (1, 2)])
@pytest.mark.slow
def test_a_run_goes_on_and_is_evaluated_on_another_number_of_devices(before, after, finished, tmp_path, capsys):
    """Begun on two, gone on with on a machine that has one, and the other way round; close to a run on one."""
    stopped_at(5, tmp_path, run_dir="run", devices=before)
    more, variables = (["--num-devices", 2], {"XLA_FLAGS": TWO_DEVICES}) if after == 2 else ([], {})
    finish(start_script("--resume", "run", *more, cwd=tmp_path, **variables))
    assert_same_metrics(tmp_path / "run", finished[0] / "first")
    capsys.readouterr()
    run_here(ppo.main, "--eval", "run", cwd=tmp_path)  # with one
    out, err = capsys.readouterr()
    assert "update 60, 8 episodes" in out and err == ""


@pytest.mark.slow
def test_two_devices_give_the_metrics_of_one(finished, tmp_path):
    finish(start_script(*tiny_flags(run_dir="two", num_devices=2), cwd=tmp_path, XLA_FLAGS=TWO_DEVICES))
    assert_same_metrics(tmp_path / "two", finished[0] / "first")
    finish(start_script("--eval", "two", cwd=tmp_path, XLA_FLAGS=TWO_DEVICES))


LATE = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
import ppo_s5_popgym, s5_common
init = s5_common.RunDirectory.__init__
def late(*arguments):
    time.sleep(2)
    init(*arguments)
s5_common.RunDirectory.__init__ = late
sys.exit(s5_common.run_main(ppo_s5_popgym.main))
"""


@pytest.mark.slow
def test_two_processes_give_the_metrics_of_one_and_one_of_them_writes(finished, tmp_path):
    """Also where the second comes late to a run directory that the first has made meanwhile."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    processes = []
    for index in range(2):
        cluster = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2"}
        program = {"program": ("-c", LATE)} if index == 1 else {}
        flags = tiny_flags(run_dir="two", num_devices=2, distributed=True)
        processes.append(start_script(*flags, cwd=tmp_path, JAX_PROCESS_ID=str(index), **program, **cluster))
    try:
        for process in processes:
            finish(process)
    finally:
        for process in processes:
            process.kill()
    assert_same_metrics(tmp_path / "two", finished[0] / "first")
    assert len(list((tmp_path / "two").glob("events.out.tfevents.*"))) == 1
