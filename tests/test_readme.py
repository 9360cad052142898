"""Every command of README.md and of docs/ runs, with a small budget.

The scripts in this process: as processes of their own they are in test_run.py, test_a2c.py and test_metarl.py.
"""

import os
import re
import shlex
import subprocess
import sys

import pytest
from conftest import QUICK, ROOT, as_flags, run_here

import a2c_s5_bsuite
import muesli_s5_metarl
import ppo_s5_popgym
from benchmarks import s5_states

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
NETWORK = {"num_envs": 8, "num_steps": 16, "encoder_layers": (16,), "s5_layers": 1, "s5_width": 16, "s5_state": 8}
NETWORK |= {"num_seeds": 1, "num_devices": 1}
PPO = {"total_timesteps": 128, "num_minibatches": 2, "update_epochs": 1, "decoder_layers": (16,)}
MUESLI = {"total_timesteps": 128, "num_minibatches": 2, "meta_steps": 64, "eval_episodes": 2}
MUESLI |= {"eval_tasks": "CartpoleBalance"}  # each task takes long to compile
SMALL = {
    "ppo_s5_popgym.py": NETWORK | PPO,
    "a2c_s5_bsuite.py": NETWORK | {"num_episodes": 16, "memory_length": 4},
    "muesli_s5_metarl.py": NETWORK | MUESLI,
}
MAIN = {f"{module.__name__}.py": module.main for module in (ppo_s5_popgym, a2c_s5_bsuite, muesli_s5_metarl)}
BENCHMARKS = {"popgym_runs.py": ["--seeds", "0", "--out", "out", "--", *as_flags(**SMALL["ppo_s5_popgym.py"])]}


def commands(text):
    """The command lines in ```bash fences: continued lines joined, split at &&, comments and prompts dropped."""
    found = []
    for block in re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.split("&&"):
                words = shlex.split(part.strip().removeprefix("$ "), comments=True)
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    words = words[1:]  # JAX_PLATFORMS=cpu python ...
                if words[:1] == ["python"] and (words[1] in SMALL or words[1].startswith("benchmarks/")):
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


def test_every_file_of_results_has_a_row_and_every_link_leads_to_a_file():
    results = ROOT / "results"
    page = (results / "README.md").read_text()
    first_cells = " ".join(line.split("|")[1] for line in page.splitlines() if line.startswith("| "))
    names = set(re.findall(r"[\w]+\.(?:md|png|gif|csv|json)", first_cells))
    assert names == {path.name for path in results.iterdir()} - {"README.md"}
    for page in [*PAGES, *results.glob("*.md")]:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_readme_begins_with_installing_and_training():
    first = re.search(r"^```bash\n(.*?)$", README.read_text(), re.MULTILINE)
    assert first and first[1].startswith("pip install -r requirements.txt && python ppo_s5_popgym.py --env RepeatHard")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A directory with small runs that commands can resume and evaluate."""
    folder = tmp_path_factory.mktemp("readme")
    for script, env in (("ppo_s5_popgym.py", "RepeatEasy"), ("a2c_s5_bsuite.py", "MemoryChain")):
        flags = as_flags(env=env, arch="mlp", run_dir=script.removesuffix(".py"), **SMALL[script])
        run_here(MAIN[script], *flags, cwd=folder)
    flags = as_flags(env="MetaStatelessCartPole", arch="mlp", run_dir="meta", **SMALL["ppo_s5_popgym.py"])
    run_here(MAIN["ppo_s5_popgym.py"], *flags, cwd=folder)
    return folder


def as_parameter(command):
    """Slow are all that train something, but for a newcomer's first command."""
    quick = command == "ppo_s5_popgym.py --env RepeatHard" or "--help" in command or "--list-envs" in command
    return pytest.param(command, marks=[] if quick else [pytest.mark.slow])


@pytest.mark.parametrize("command", [as_parameter(command) for command in found if "--sweep" not in command])
def test_command_of_the_readme_runs(command, request, tmp_path, capsys):
    """A later flag wins, so the small ones are appended; a run that is named is replaced by one that exists.

    Sweeps are dozens of runs: test_a2c.py has a short one.
    """
    script, *flags = shlex.split(command)
    flags = [flag for flag in flags if flag not in ("--distributed", "--track")]
    if script not in SMALL:
        (tmp_path / "results").mkdir()
        words = [sys.executable, str(ROOT / script), *flags, *BENCHMARKS.get(script.split("/")[1], ["--quick"])]
        done = subprocess.run(
            words, cwd=tmp_path, env=os.environ | {"XLA_FLAGS": QUICK}, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return
    for name in ("--resume", "--eval", "--watch"):
        if name in flags:
            run = "meta" if "--eval-trials" in flags else script.removesuffix(".py")
            flags[flags.index(name) + 1] = str(request.getfixturevalue("trained") / run)
    if "--eval" in flags:
        flags += ["--eval-episodes", "4"]
    if not {"--resume", "--eval", "--watch", "--list-envs", "--help"} & set(flags):
        flags += as_flags(**SMALL[script], run_dir=tmp_path / "run")
        if "own" in flags:  # of its own are all tasks of this suite
            flags += ["--eval-tasks", ""]
        if "--arch" not in flags:
            flags += ["--arch", "mlp"]  # the quickest to compile
    run_here(MAIN[script], *flags, cwd=tmp_path)
    out, err = capsys.readouterr()
    assert out and err == ""


def run_python_of(page):
    """Its examples, one after the other, and the names that they leave."""
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    names = {}
    for block in blocks:
        exec(block, names)
    return names


def test_the_page_on_s5_proves_what_it_says():
    """By asserts in its examples, each of which has one."""
    names = run_python_of(ROOT / "docs" / "s5.md")
    assert names["states"].shape == (5, 1, 2)


def test_the_picture_of_states_shows_the_half_lives_of_the_page(tmp_path):
    table = re.search(r"half is left after \| (.*?) \|$", (ROOT / "docs" / "s5.md").read_text(), re.MULTILINE)[1]
    steps = [float(cell.removesuffix(" steps").replace(",", "")) for cell in table.split(" | ")]
    half_lives = [s5_states.half_life(time_step) for time_step in (0.1, 0.01, 0.001, 0.0001)]
    assert half_lives == pytest.approx(steps, rel=0.01)
    assert s5_states.answer(0.01, 140)[139] == pytest.approx(s5_states.answer(0.01, 1)[0] / 2, rel=0.01)
    run_here(s5_states.main, "--out", tmp_path / "states.png", cwd=tmp_path)
    assert (tmp_path / "states.png").exists()


def test_the_python_examples_of_popgym_jax_run_one_after_the_other(capsys):
    names = run_python_of(ROOT / "popgym_jax" / "README.md")
    assert float(capsys.readouterr().out) == pytest.approx(-0.5, abs=0.05)  # what its comment promises
    assert names["envs"].num_envs == 64
