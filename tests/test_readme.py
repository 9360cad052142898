"""Every command of README.md and of docs/ runs, with a small budget."""

import os
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, SCRIPT, as_flags, finish, start_script, tiny_flags

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
SMALL = {"total_timesteps": 128, "num_envs": 8, "num_steps": 16, "num_minibatches": 2, "update_epochs": 1}
SMALL |= {"encoder_layers": (16,), "decoder_layers": (16,), "s5_layers": 1, "s5_width": 16, "s5_state": 8}
SMALL |= {"num_seeds": 1, "num_devices": 1, "checkpoint_interval": 1}


def commands(text):
    """The command lines in ```bash fences: continued lines joined, split at &&, comments and prompts dropped."""
    found = []
    for block in re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.split("&&"):
                words = shlex.split(part.strip().removeprefix("$ "), comments=True)
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    words = words[1:]  # JAX_PLATFORMS=cpu python ...
                if words[:1] == ["python"] and (words[1] == SCRIPT.name or words[1].startswith("benchmarks/")):
                    found.append(" ".join(map(shlex.quote, words[1:])))
    return list(dict.fromkeys(found))


EXAMPLE = """
Text, `python ppo_s5_popgym.py --not a-command`.
```bash
pip install -r requirements.txt && python ppo_s5_popgym.py --env RepeatHard   # minutes
python -m pytest
JAX_PLATFORMS=cpu python ppo_s5_popgym.py --preset paper \\
    --seed 1
```
```python
python ppo_s5_popgym.py --env Nothing
```
"""


def test_commands_are_found_in_bash_fences_only():
    assert commands(EXAMPLE) == ["ppo_s5_popgym.py --env RepeatHard", "ppo_s5_popgym.py --preset paper --seed 1"]


found = commands("\n".join(page.read_text() for page in PAGES))


def test_the_readme_begins_with_installing_and_training():
    first = re.search(r"^```bash\n(.*?)$", README.read_text(), re.MULTILINE)
    assert first and first[1].startswith("pip install -r requirements.txt && python ppo_s5_popgym.py --env RepeatHard")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A directory with a run that commands can resume and evaluate."""
    folder = tmp_path_factory.mktemp("readme")
    finish(start_script(*tiny_flags(run_dir="run", total_timesteps=256), cwd=folder))
    return folder


@pytest.mark.parametrize("command", found)
def test_command_of_the_readme_runs(command, trained, tmp_path):
    """A later flag wins, so the small ones are appended; a run that is named is replaced by one that exists."""
    script, *flags = shlex.split(command)
    flags = [flag for flag in flags if flag not in ("--distributed", "--track")]
    small = as_flags(**SMALL, run_dir=tmp_path / "run")
    if script != SCRIPT.name:
        (tmp_path / "results").mkdir()
        flags += {"popgym_runs.py": ["--seeds", "0", "--out", "out", "--", *small[:-2]]}.get(
            script.split("/")[1], ["--quick"]
        )
        words = [sys.executable, str(ROOT / script), *flags]
        quick = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
        done = subprocess.run(words, cwd=tmp_path, env=quick, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return
    for name in ("--resume", "--eval"):
        if name in flags:
            flags[flags.index(name) + 1] = str(trained / "run")
    if not {"--resume", "--eval", "--list-envs", "--help"} & set(flags):
        flags += small
    out, err = finish(start_script(*flags, cwd=tmp_path))
    assert out and err == ""


def test_the_python_examples_of_popgym_jax_run_one_after_the_other(capsys):
    blocks = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "popgym_jax" / "README.md").read_text(), re.MULTILINE | re.DOTALL
    )
    names = {}
    for block in blocks:
        exec(block, names)
    assert float(capsys.readouterr().out) == pytest.approx(-0.5, abs=0.05)  # what its comment promises
    assert names["envs"].num_envs == 64
