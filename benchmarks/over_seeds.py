"""What several seeds reach together: mean, interquartile mean and its bootstrap interval.

    python benchmarks/over_seeds.py results/popgym_runs.csv --same env arch --figures best_return
    python benchmarks/over_seeds.py results/metarl.csv --same tasks arch --where split=train --figures return_mean

A table in Markdown from a CSV with a row a run, computed by rliable (Agarwal et al. 2021): the mean
of the middle half of the runs, and the 95 % interval of it over samples of runs drawn anew, for each
task by itself (stratified). Of fewer than four values the interquartile mean is the mean. The interval
of three or five seeds is a rough one: it holds nothing but these seeds. It needs requirements-dev.txt.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import tyro
from rliable import library, metrics

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.collect import markdown, read_rows  # noqa: E402

RESAMPLES = 2000  # of the bootstrap


@dataclass(frozen=True)
class Args:
    """Put the seeds of a CSV together."""

    table: Annotated[str, tyro.conf.Positional]
    """CSV with a row a run"""

    same: tuple[str, ...]
    """columns that runs of one kind have in common"""

    figures: tuple[str, ...]
    """columns of results"""

    task: str = ""
    """column of tasks, if results are put together over them too; each seed then has each task"""

    where: tuple[str, ...] = ()
    """COLUMN=VALUE: rows to take"""


class OverSeeds(NamedTuple):
    """What the runs of one kind reach."""

    seeds: int
    mean: float
    standard_error: float  # of the seeds' means over tasks
    iqm: float
    low: float  # of the 95 % interval of the interquartile mean
    high: float


def over_seeds(scores: np.ndarray) -> OverSeeds:
    """scores: float (seeds, tasks), at least two seeds."""
    of_seeds = scores.mean(axis=1)

    def iqm(resampled):
        return np.array([metrics.aggregate_iqm(resampled)])

    np.random.seed(0)  # rliable draws from numpy's global generator, whatever random_state it is given
    found, interval = library.get_interval_estimates({"runs": scores}, iqm, reps=RESAMPLES)
    low, high = interval["runs"][:, 0]
    return OverSeeds(
        seeds=len(scores),
        mean=float(of_seeds.mean()),
        standard_error=float(of_seeds.std(ddof=1) / np.sqrt(len(scores))),
        iqm=float(found["runs"][0]),
        low=float(low),
        high=float(high),
    )


def matrix(rows: Sequence[dict[str, Any]], figure: str, task: str) -> np.ndarray:
    """A figure of some rows as (seeds, tasks). Raises ValueError if a seed lacks a task."""
    tasks: dict[str, dict[str, float]] = {}
    for row in rows:
        tasks.setdefault(str(row[task]) if task else "", {})[str(row["seed"])] = float(row[figure])
    seeds = sorted(set.union(*(set(own) for own in tasks.values())))
    for name, own in tasks.items():
        if set(own) != set(seeds):
            raise ValueError(f"{task} {name} has seeds {sorted(own)}, others {seeds}")
    return np.array([[own[seed] for own in tasks.values()] for seed in seeds])


def table(rows: Sequence[dict[str, Any]], same: Sequence[str], figures: Sequence[str], task: str = "") -> str:
    """A line in Markdown for each kind of run of which there are two seeds or more."""
    kinds: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        kinds.setdefault(tuple(str(row[name]) for name in same), []).append(row)
    head = [*same, "figure", "seeds", "mean ± standard error", "interquartile mean", "95 % interval"]
    lines = []
    for kind, own in kinds.items():
        for figure in figures:
            scores = matrix(own, figure, task)
            if len(scores) > 1:
                found = over_seeds(scores)
                cells = [
                    *kind,
                    figure,
                    str(found.seeds),
                    f"{found.mean:.4g} ± {found.standard_error:.2g}",
                    f"{found.iqm:.4g}",
                    f"{found.low:.4g} to {found.high:.4g}",
                ]
                lines.append(cells)
    return markdown(head, lines)


def main() -> None:
    args = tyro.cli(Args)
    rows: list[dict[str, Any]] = list(read_rows(Path(args.table)))
    for condition in args.where:
        column, _, value = condition.partition("=")
        rows = [row for row in rows if row[column] == value]
    print(table(rows, args.same, args.figures, args.task))


if __name__ == "__main__":
    main()
