"""The scripts start with `uv run` alone: their inline metadata (PEP 723) say what requirements.txt says."""

import re
import tomllib

import pytest
from conftest import ROOT

# as PEP 723 has it
BLOCK = r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$"
MUESLI_ONLY = ("playground", "mujoco", "mujoco-mjx", "brax")


def requirements():
    """The lines of requirements.txt without comments, in their order."""
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    return [line for line in lines if line]


def inline_metadata(script):
    (block,) = re.finditer(BLOCK, (ROOT / script).read_text())
    assert block["type"] == "script" and block.start() == 0
    lines = block["content"].splitlines()
    return tomllib.loads("\n".join(line.removeprefix("#").removeprefix(" ") for line in lines))


@pytest.mark.parametrize("script", ["ppo_s5_popgym.py", "a2c_s5_bsuite.py", "muesli_s5_metarl.py"])
def test_a_script_says_what_requirements_txt_says(script):
    expected = requirements()
    if script != "muesli_s5_metarl.py":
        expected = [line for line in expected if line.split("==")[0] not in MUESLI_ONLY]
        assert len(expected) == len(requirements()) - len(MUESLI_ONLY)
    found = inline_metadata(script)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert found == {"requires-python": project["requires-python"], "dependencies": expected}


def test_only_muesli_imports_what_only_it_lists():
    importing = re.compile(r"^\s*(?:import|from) (?:mujoco|mujoco_playground|brax|control_jax)\b", re.MULTILINE)
    sources = [*ROOT.glob("*.py"), *(ROOT / "popgym_jax").glob("*.py")]
    found = [path.name for path in sources if importing.search(path.read_text())]
    assert found == ["muesli_s5_metarl.py"]
