"""docs/copy.md: its diffs apply to the script and leave one that trains; its example plays an episode."""

import re
import shutil
import subprocess

import pytest
from conftest import ROOT, finish, run_here, start_script, tiny_flags

import ppo_s5_popgym as ppo

PAGE = (ROOT / "docs" / "copy.md").read_text()
DIFFS = re.findall(r"^## (.*?)\n.*?^```diff\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
FLAGS = {"Another memory": {"arch": "rnn"}}


def changed(diff, folder):
    """A copy of the script in a project of its own, changed by the diff."""
    for name in ("ppo_s5_popgym.py", "s5_common.py"):
        shutil.copy(ROOT / name, folder)
    (folder / "change.diff").write_text(diff)
    applied = subprocess.run(["git", "apply", "-C1", "change.diff"], cwd=folder, capture_output=True, text=True)
    assert applied.returncode == 0, applied.stderr
    return folder / "ppo_s5_popgym.py"


def test_the_page_has_four_changes():
    assert len(DIFFS) == 4 and {*FLAGS} < {title for title, _ in DIFFS}


@pytest.mark.parametrize("title, diff", DIFFS)
def test_a_diff_applies_and_leaves_a_script_that_compiles(title, diff, tmp_path):
    source = changed(diff, tmp_path).read_text()
    compile(source, "ppo_s5_popgym.py", "exec")
    assert source != (ROOT / "ppo_s5_popgym.py").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("title, diff", DIFFS)
def test_a_changed_script_trains(title, diff, tmp_path):
    script = changed(diff, tmp_path)
    own = (ROOT / "examples" / "own_environment.py").read_text()
    (tmp_path / "my_environment.py").write_text(own.replace("def t_maze(", "def make("))
    shutil.copytree(ROOT / "popgym_jax", tmp_path / "popgym_jax")
    if "my_environment" in diff:
        shutil.rmtree(tmp_path / "popgym_jax")  # which it needs no longer
    flags = tiny_flags(total_timesteps=256, run_dir="run", **FLAGS.get(title, {"arch": "mlp"}))
    finish(start_script(*flags, cwd=tmp_path, program=(str(script),)))
    metrics = (tmp_path / "run" / "metrics.csv").read_text()
    assert len(metrics.splitlines()) == 3 and ("weight_norm" in metrics) == ("weight_norm" in diff)


@pytest.mark.slow
def test_the_example_plays_an_episode_of_a_trained_agent(tmp_path, capsys):
    run_here(ppo.main, *tiny_flags(total_timesteps=128, run_dir="run"), cwd=tmp_path)
    capsys.readouterr()
    (example,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    exec(example, {"RUN": str(tmp_path / "run")})
    assert -1 <= float(capsys.readouterr().out) <= 1
