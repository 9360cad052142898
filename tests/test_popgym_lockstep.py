"""Every environment of popgym_jax against the reference package popgym, step for step, in both directions.

`pytest -m "" tests/test_popgym_lockstep.py --episodes 2000 --lockstep-report FILE` is the longer run that
results/popgym_lockstep.md records.
"""

import csv

import pytest

import popgym_jax
from popgym_jax.registration import FAMILIES, family_and_level
from tests.reference import (
    Bridge,
    assert_same,
    backward,
    bandit,
    boards,
    cards,
    forward,
    make_reference,
    mazes,
    physics,
)

BRIDGES: dict[str, Bridge] = cards.BRIDGES | physics.BRIDGES | boards.BRIDGES | bandit.BRIDGES | mazes.BRIDGES


def test_every_family_is_compared():
    assert set(BRIDGES) == set(FAMILIES)


def each_way():
    """The reference takes long for the thousand steps of a labyrinth."""
    for name in popgym_jax.registered_envs:
        slow = name.startswith("Labyrinth")
        for replay in (forward, backward):
            yield pytest.param(name, replay, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize(("name", "replay"), list(each_way()))
def test_lock_step_with_the_reference(name, replay, request):
    episodes = request.config.getoption("--episodes")
    bridge = BRIDGES[family_and_level(name)[0]]
    env, params = popgym_jax.make(name)
    theirs, ours = replay(bridge, env, params, make_reference(name), episodes, seed=1)
    assert_same(bridge, theirs, ours)
    if report := request.config.getoption("--lockstep-report"):
        row = {"env": name, "replay": replay.__name__, "episodes": episodes, "steps": ours.length.sum()}
        row |= {"terminated": theirs.terminated.sum(), "truncated": theirs.truncated.sum()}
        with open(report, "a", newline="") as file:
            writer = csv.DictWriter(file, list(row), lineterminator="\n")
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)
