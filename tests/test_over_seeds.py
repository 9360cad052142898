"""Statistics over seeds: against scipy, against the bootstrap written out, and in the pages of results/."""

import shlex
import sys
from itertools import pairwise

import numpy as np
import pytest
from conftest import ROOT
from scipy import stats

from benchmarks import over_seeds

PAGES = ("popgym.md", "metarl.md", "metacart.md", "bsuite.md")


def test_the_interquartile_mean_is_the_mean_of_the_middle_half():
    scores = np.random.default_rng(0).exponential(size=(8, 3))
    found = over_seeds.over_seeds(scores)
    assert found.iqm == pytest.approx(stats.trim_mean(scores, 0.25, axis=None))
    assert found.iqm == pytest.approx(np.sort(scores.ravel())[6:18].mean())
    assert (found.seeds, found.mean) == (8, pytest.approx(scores.mean()))
    assert found.standard_error == pytest.approx(stats.sem(scores.mean(axis=1)))


def test_the_interquartile_mean_of_three_seeds_is_their_mean():
    found = over_seeds.over_seeds(np.array([[1.0], [2.0], [9.0]]))
    assert (found.iqm, found.mean) == (4.0, 4.0)


def test_the_interval_is_of_runs_drawn_anew_in_each_task_by_itself():
    """Tasks far apart: were runs drawn over all of them, or one draw taken for both, it would be another width."""
    scores = np.array([[0.0, 100.0], [1.0, 101.0], [2.0, 102.0], [3.0, 103.0], [4.0, 104.0], [5.0, 105.0]])
    found = over_seeds.over_seeds(scores)
    rng = np.random.default_rng(1)
    drawn = []
    for _ in range(4000):
        columns = [rng.choice(scores[:, task], 6) for task in range(2)]
        drawn.append(stats.trim_mean(np.stack(columns, 1), 0.25, axis=None))
    assert (found.low, found.high) == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=0.35)


def test_a_seed_without_one_of_the_tasks_is_refused():
    rows = [
        {"seed": "0", "task": "a", "x": "1"},
        {"seed": "1", "task": "a", "x": "2"},
        {"seed": "0", "task": "b", "x": "3"},
    ]
    with pytest.raises(ValueError, match="task b has seeds"):
        over_seeds.matrix(rows, "x", "task")


@pytest.mark.parametrize("page", PAGES)
def test_the_table_of_a_page_is_what_its_command_prints(page, monkeypatch, capsys):
    lines = (ROOT / "results" / page).read_text().splitlines()
    found = 0
    for line, after in pairwise(line for line in lines if line):
        if line.startswith("`python benchmarks/over_seeds.py "):
            words = shlex.split(line.split("`")[1])[1:]
            monkeypatch.chdir(ROOT)
            monkeypatch.setattr(sys, "argv", words)
            over_seeds.main()
            printed = capsys.readouterr().out
            assert printed in "\n".join(lines) + "\n" and printed.startswith(after)
            found += 1
    assert found == 1
