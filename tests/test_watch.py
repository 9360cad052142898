"""--watch of the three scripts: one episode of what was trained, as text and as an animation."""

import re
import sys

import jax
import matplotlib
import numpy as np
import pytest
from conftest import as_flags, fast_jit, run_here, tiny_flags
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from PIL import Image

import a2c_s5_bsuite as a2c
import control_jax
import muesli_s5_metarl as muesli
import ppo_s5_popgym as ppo
import s5_common as common
from control_jax.drawing import draw

A2C = {"encoder_layers": (16,), "s5_width": 16, "s5_state": 8, "num_envs": 4, "num_episodes": 8, "num_rows": 1}
MUESLI = {"num_envs": 4, "num_steps": 5, "num_minibatches": 2, "meta_steps": 20, "action_repeat": 2, "s5_layers": 1}
MUESLI |= {"encoder_layers": (16,), "s5_width": 16, "s5_state": 8, "eval_episodes": 2, "total_timesteps": 40}
MUESLI |= {"s5_fast_weights": 2, "muesli_samples": 2}


def trained_and_watched(main, flags, folder, capsys):
    """What --watch prints of a run of one update, and the files that it adds to the run."""
    run_here(main, *flags, "--run-dir", "run", cwd=folder)
    capsys.readouterr()
    before = {path: path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file()}
    run_here(main, "--watch", "run", cwd=folder)
    out, err = capsys.readouterr()
    assert err == ""
    after = {path: path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file()}
    assert all(after[path] == content for path, content in before.items())
    return out, {path.name for path in after.keys() - before.keys()}


# ---------------------------------------------------------------- PPO


def test_an_episode_of_cards_is_printed_with_its_rewards(tmp_path, capsys):
    """What is asked for is what was seen, and the reward says whether the answer was that."""
    flags = tiny_flags(env="RepeatEasy", arch="mlp", total_timesteps=128, num_seeds=2)
    out, new = trained_and_watched(ppo.main, flags, tmp_path, capsys)
    assert new == set() and out.startswith("RepeatEasy, seed 0, update 1\n")
    shown = re.findall(r"^card \d+ of 52 is of (\w+)$", out, re.MULTILINE)
    asked = re.findall(r"^asked: suit of card \d+: (\w+)$", out, re.MULTILINE)
    answers = re.findall(r"^the agent's answer: (\w+); reward (.*)$", out, re.MULTILINE)
    assert len(shown) == len(answers) == 51 and asked == shown[:48]
    for question, (answer, reward) in zip(asked, answers[3:], strict=True):
        assert float(reward) == pytest.approx(1 / 48 if answer == question else -1 / 48, abs=1e-4)
    total = sum(float(reward) for _, reward in answers)
    assert float(re.search(r"^return (.*) after 51 steps$", out, re.MULTILINE)[1]) == pytest.approx(total, abs=0.01)
    run_here(ppo.main, "--watch", "run", cwd=tmp_path)
    assert capsys.readouterr().out == out  # the same episode each time


@pytest.mark.slow
def test_an_episode_of_projected_cartpole_is_also_drawn(tmp_path, capsys):
    flags = tiny_flags(env="MetaStatelessCartPole", arch="mlp", total_timesteps=128, obs_change=1.0)
    run_here(ppo.main, *flags, "--run-dir", "run", cwd=tmp_path)
    capsys.readouterr()
    run_here(ppo.main, "--watch", "run", "--eval-trials", 2, cwd=tmp_path)
    out, err = capsys.readouterr()
    steps = len(re.findall(r"^step \d+$", out, re.MULTILINE))
    assert err == "" and "trial 2 of 2" in out and "trial 3" not in out
    with Image.open(tmp_path / "run" / "episode.gif") as picture:
        assert picture.n_frames == steps > 10  # as the pole moves, no two frames are the same
    sizes = {line.count(".") for line in re.findall(r"the agent sees \[(.*)\]", out)}
    assert sizes == {10}  # 4 projected features with their changes, trial-end flag, reward


@pytest.mark.slow
def test_an_environment_of_ones_own_is_watched_by_what_the_agent_sees(tmp_path, capsys):
    flags = tiny_flags(env="examples.own_environment:t_maze", arch="mlp", total_timesteps=128)
    out, new = trained_and_watched(ppo.main, flags, tmp_path, capsys)
    assert new == set() and re.search(r"^the agent sees \[", out, re.MULTILINE) and "return" in out


# ---------------------------------------------------------------- A2C


@pytest.mark.slow
def test_memory_chain_says_what_was_shown_asked_and_answered(tmp_path, capsys):
    flags = as_flags(arch="mlp", memory_length=6, num_bits=3, **A2C)
    out, new = trained_and_watched(a2c.main, flags, tmp_path, capsys)
    title, first, middle, last, result = out.splitlines()
    assert new == set()
    assert title == "MemoryChain, seed 0, update 1"
    bits = re.fullmatch(r"step 1: shown: ([01]) ([01]) ([01]); reward \+0", first).groups()
    assert middle == f"steps 2 to 6: nothing is asked; to be remembered: {' '.join(bits)}; reward +0"
    pattern = r"step 7: asked for bit (\d) of 3, which was (\d); the agent's answer: (\d), (\w+); reward (.*)"
    bit, was, answer, verdict, reward = re.fullmatch(pattern, last).groups()
    assert was == bits[int(bit) - 1] and (answer == was) == (verdict == "right") == (reward == "+1")
    assert result == f"return {int(reward)} after 7 steps"
    run_here(a2c.main, "--watch", "run", "--memory-length", 4, cwd=tmp_path, code=2)
    assert "--memory-length 4: the run in run was made with 6" in capsys.readouterr().err


def states_of(env, actions, **flags):
    """The states of an episode with these actions, on the host, and its task."""
    args = a2c.Args(env=env, **flags)
    task = a2c.make_task(args)
    _, state = a2c.reset_envs(task, jax.random.PRNGKey(0), 1)
    found = []
    for t, action in enumerate(actions):
        before = jax.tree.map(lambda x: np.asarray(x)[0], state)
        _, state, reward = a2c.step_envs(task, jax.random.PRNGKey(t), state, np.array([action], np.int32))
        found.append((task, before, action, reward.item()))
    return found


@pytest.mark.parametrize("carried", [0, 1])
def test_umbrella_chain_says_what_is_carried_and_whether_that_was_right(carried):
    moments = states_of("UmbrellaChain", [carried, 1, 0, 1, 0], chain_length=5)
    first, *way, last = [a2c.IN_WORDS["UmbrellaChain"](*moment) for moment in moments]
    weather = ("it will stay dry", "it will rain")[int(moments[0][1].need_umbrella)]
    words = ("without an umbrella", "with an umbrella")[carried]
    assert first == f"forecast: {weather}; the agent goes {words}"
    assert way == [f"on the way, {words}"] * 3
    verdict = "right" if moments[-1][3] == 1 else "wrong"
    assert last == f"arrived {words}, {weather}: {verdict}"
    assert (verdict == "right") == (("rain" in weather) == (carried == 1))


def test_boards_show_ball_and_paddle_and_the_diver():
    for t, (task, state, action, reward) in enumerate(states_of("Catch", [0, 2, 1, 1, 1])):
        *rows, move = a2c.IN_WORDS["Catch"](task, state, action, reward).splitlines()[1:]
        assert [row.find("o") for row in rows] == [int(state.ball_x) if y == t else -1 for y in range(10)]
        assert rows[9].index("=") == [2, 1, 2, 2, 2][t] and move.endswith(("left", "stay", "right")[action])
    column = 0
    for t, (task, state, action, reward) in enumerate(states_of("DeepSea", [0, 1, 0, 1], size=4, mapping_seed=3)):
        *rows, move = a2c.IN_WORDS["DeepSea"](task, state, action, reward).splitlines()[1:]
        assert [row.find("A") for row in rows] == [column if y == t else -1 for y in range(4)]
        column = min(column + 1, 3) if move.endswith("right") else max(column - 1, 0)


def test_what_chains_and_arms_pay_is_said():
    chain = states_of("DiscountingChain", [1, 0, 0, 0], mapping_seed=1)
    texts = [a2c.IN_WORDS["DiscountingChain"](*moment) for moment in chain]
    assert texts[0].startswith("chains pay 0: 1.0 at step 1, 1: 1.1 at step 3,") and texts[0].endswith("takes 1")
    assert texts[1:] == ["on chain 1: waiting", "on chain 1: paid", "on chain 1: waiting"]
    (moment,) = states_of("SimpleBandit", [4], mapping_seed=3)
    words = a2c.IN_WORDS["SimpleBandit"](*moment).split(";")
    arms = [float(word) for word in words[0].split()[2:]]
    assert sorted(arms) == pytest.approx(np.linspace(0, 1, 11)) and arms[4] == pytest.approx(moment[3], abs=0.05)
    assert words[1] == " the agent pulls arm 4" and set(a2c.IN_WORDS) == set(a2c.TASKS)


# ---------------------------------------------------------------- Muesli


@pytest.mark.slow
@pytest.mark.parametrize(
    ("suite", "tasks", "held_out"),
    [("dmc", "CartpoleSwingup", "CartpoleBalance"), ("gymnax", "Pendulum-v1", "MountainCarContinuous-v0")],
)
def test_a_meta_episode_is_drawn(suite, tasks, held_out, tmp_path, capsys):
    """One frame for each action; the world beside the bars where it is one of control_jax."""
    flags = as_flags(suite=suite, tasks=tasks, eval_tasks=held_out, arch="mlp", **MUESLI)
    out, new = trained_and_watched(muesli.main, flags, tmp_path, capsys)
    assert new == {"episode.gif"} and out.startswith(f"{tasks}, seed 0, update 1: return ") and "20 steps" in out
    with Image.open(tmp_path / "run" / "episode.gif") as picture:
        assert 1 < picture.n_frames <= 10
    assert (muesli.world_drawing(muesli.Args(suite=suite), tasks) is None) == (suite == "gymnax")


# ---------------------------------------------------------------- the worlds of control_jax


@pytest.mark.slow
@pytest.mark.parametrize("name", control_jax.registered_envs)
def test_every_body_that_moves_is_drawn_within_the_picture(name):
    env, params = control_jax.make(name, engine="c")
    _, state = fast_jit(env.reset_env)(jax.random.PRNGKey(0), params)
    axes = Figure().subplots()
    draw(axes, env, state)
    circles = [patch for patch in axes.patches if isinstance(patch, Circle)]
    assert circles and axes.get_aspect() == 1
    for circle in circles:
        (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
        assert left < circle.center[0] < right and low < circle.center[1] < high
    rings = [patch for patch in circles if not patch.get_fill()]
    assert len(rings) == (
        name not in ("BallInCup", "CartpoleBalance", "CartpoleSwingup", "FingerSpin", "PendulumSwingup")
    )


def test_the_swung_up_pole_stands_above_its_cart_and_the_reacher_in_its_target():
    env, params = control_jax.make("CartpoleBalance", engine="c")
    _, state = fast_jit(env.reset_env)(jax.random.PRNGKey(0), params)
    axes = Figure().subplots()
    draw(axes, env, state.replace(physics=state.physics._replace(position=np.array([0.5, 0.0]))))
    centres = np.array([patch.center for patch in axes.patches if isinstance(patch, Circle)])
    np.testing.assert_allclose(centres[:, 0], 0.5, atol=1e-6)
    np.testing.assert_allclose([centres[:, 1].min(), centres[:, 1].max()], [1.0, 2.0], atol=1e-6)

    env, params = control_jax.make("ReacherEasy", engine="c")
    _, state = fast_jit(env.reset_env)(jax.random.PRNGKey(0), params)
    target = np.array([0.12, 0.12], np.float32)  # where the finger is with the wrist at a right angle
    axes = Figure().subplots()
    physics = state.physics._replace(position=np.array([0.0, np.pi / 2]))
    draw(axes, env, state.replace(physics=physics, hidden=target))
    *_, finger, ring = axes.patches
    np.testing.assert_allclose(finger.center, ring.center, atol=1e-6)
    assert ring.radius == 0.05


# ---------------------------------------------------------------- animations


def frames(n):
    def world(axes, value):
        axes.plot([0, value])

    return [common.Frame(lambda axes, t=t: world(axes, t), np.array([t, -1.0]), f"frame {t}") for t in range(n)]


def test_an_animation_has_every_frame_or_every_nth(tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(common, "draw_frame", lambda figure, frame, limit: titles.append(frame.title))
    common.save_animation(frames(300), tmp_path / "all.gif")
    assert titles == [f"frame {t}" for t in range(300)]
    titles.clear()
    common.save_animation(frames(700), tmp_path / "thinned.gif")
    assert titles == [f"frame {t}" for t in range(0, 700, 3)]
    assert {path.name for path in tmp_path.iterdir()} == {"all.gif", "thinned.gif"}


def test_a_frame_has_the_world_and_beside_it_bars_of_what_is_seen():
    figure = Figure()
    common.draw_frame(figure, common.Frame(lambda axes: axes.plot([1, 2]), np.array([0.5, -2.0]), "$both_"), 3.0)
    world, bars = figure.axes
    assert len(world.lines) == 1 and [bar.get_height() for bar in bars.patches] == [0.5, -2.0]
    assert bars.get_ylim() == (-3.0, 3.0) and world.get_position().x1 < bars.get_position().x0
    common.draw_frame(figure, common.Frame(None, np.array([1.0]), "bars alone"), 1.0)
    (bars,) = figure.axes
    assert len(bars.patches) == 1


def test_an_animation_that_cannot_be_written_is_one_error_and_leaves_no_part(tmp_path, monkeypatch):
    def full(self):
        self.outfile.write_bytes(b"GIF89a")
        raise OSError("No space left on device")

    monkeypatch.setattr(matplotlib.animation.PillowWriter, "finish", full)
    with pytest.raises(common.RunError, match="episode.gif could not be written .No space left on device"):
        common.save_animation(frames(2), tmp_path / "episode.gif")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- bad input


BAD = {
    "--watch nowhere": ("nowhere", "not a run directory"),
    "--watch nowhere --eval other": ("--watch nowhere: not together with --eval other",),
    "--watch nowhere --resume other": ("--watch nowhere: not together with --resume other",),
    "--watch nowhere --distributed": ("--watch nowhere: not together with --distributed",),
}


@pytest.mark.parametrize("main", [ppo.main, a2c.main, muesli.main])
@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_one_line_and_exit_code_2(words, main, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["script.py", *words.split()])
    assert common.run_main(main) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and all(part in err for part in BAD[words])
    assert list(tmp_path.iterdir()) == []
