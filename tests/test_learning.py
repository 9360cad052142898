"""The default preset learns."""

import json

import pytest
from conftest import finish, start_script


@pytest.mark.slow
def test_repeat_previous_easy_is_learned_to_nine_tenths_in_half_a_million_steps(tmp_path):
    """The default flags, the whole program; a memoryless agent stays below -0.4."""
    flags = ["--env", "RepeatPreviousEasy", "--total-timesteps", "500000", "--run-dir", "run"]
    finish(start_script(*flags, cwd=tmp_path, XLA_FLAGS=""))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["preset"] == "default" and summary["best_return"] >= 0.9
