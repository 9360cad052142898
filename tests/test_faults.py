"""What a run survives, in small: kills, damaged checkpoints, a full disk, NaN, bad flags. Counted at length, for every
script, by benchmarks/faults.py, whose functions these are; its counts are in results/reliability.md."""

import pytest

from benchmarks import faults

A2C = "a2c_s5_bsuite"


def assert_no_failure(count, cases):
    assert count.failures == [] and count.cases >= cases, count


@pytest.mark.exhaustive
def test_any_damage_to_a_file_of_a_checkpoint_is_refused_or_does_no_harm(tmp_path):
    assert_no_failure(faults.try_damage(A2C, tmp_path, seed=1, step=10**6), cases=40)


@pytest.mark.parametrize("script", faults.SCRIPTS)
def test_bad_command_lines_are_one_line_and_exit_code_2_and_leave_nothing(script, tmp_path):
    assert_no_failure(faults.try_commands(script, tmp_path, 10, seed=1), cases=10)


@pytest.mark.exhaustive
def test_nan_stops_a_run_at_that_update_and_the_checkpoint_before_it_goes_on(tmp_path):
    assert_no_failure(faults.try_nan(A2C, tmp_path), cases=3)


@pytest.mark.exhaustive
def test_a_run_that_is_killed_again_and_again_ends_like_one_that_is_not(tmp_path):
    assert_no_failure(faults.try_kills(A2C, tmp_path, 5, jobs=1, seed=1), cases=5)


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path):
    """Where the process may not mount a file system, that of them which needs one is left out."""
    assert_no_failure(faults.try_disk(A2C, tmp_path, small=True), cases=2)
