"""Return per trial of an evaluation, as a table and as a picture; needs matplotlib."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

COLUMNS = ("seed", "trial", "mean_return", "standard_error")
Curve = tuple[np.ndarray, np.ndarray, np.ndarray]  # x, mean and its standard error


def save_trials(
    folder: str | Path, returns: np.ndarray, first_seed: int = 0, beside: Sequence[str | Path] = ()
) -> Path:
    """Write `folder`/trials_K.csv and trials_K.png for K trials, and return the path of the table.

    The table has a row for each seed and trial: mean over episodes and its standard error. The
    picture has a line for each seed, in `folder` and in other folders that have such a table.

    returns: float (S, E, K) for S seeds and E episodes
    beside: folders whose tables of K trials join the picture; OSError where there is none, and
        nothing is written then
    """
    S, E, K = returns.shape
    table = Path(folder) / f"trials_{K}.csv"
    others = {other: read_trials(Path(other) / table.name) for other in beside}
    seed, trial = np.indices((S, K))
    error = returns.std(axis=1) / math.sqrt(max(E - 1, 1))
    rows = np.stack([first_seed + seed, 1 + trial, returns.mean(axis=1), error], axis=-1)
    header = ",".join(COLUMNS)
    np.savetxt(table, rows.reshape(-1, 4), "%.8g", ",", header=header, comments="")
    curves = {}
    for path, own in ({folder: read_trials(table)} | others).items():
        for seed_rows in own:
            label = f"{Path(path).resolve().name}, seed {seed_rows[0, 0]:.0f}"
            curves[label] = (seed_rows[:, 1], seed_rows[:, 2], seed_rows[:, 3])
    draw(curves, table.with_suffix(".png"), "trial", "mean return of a trial")
    return table


def read_trials(table: str | Path) -> np.ndarray:
    """The rows of a trials_K.csv, float (S, K, 4)."""
    rows = np.loadtxt(table, delimiter=",", skiprows=1, ndmin=2)
    return rows.reshape(len(np.unique(rows[:, 0])), -1, len(COLUMNS))


def draw(
    curves: dict[str, Curve], picture: str | Path, xlabel: str, ylabel: str, trained: int = 0
) -> None:
    """A line with a band of +- its error for each label.

    trained: marks the last trial that training had, if there is one to mark
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for label, (x, mean, error) in curves.items():
        axes.plot(x, mean, label=label)
        axes.fill_between(x, mean - error, mean + error, alpha=0.25)
    if trained:
        axes.axvline(
            trained + 0.5, color="grey", linestyle=":", label=f"trained on {trained} trials"
        )
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.legend(fontsize="small")
    figure.savefig(picture, dpi=150)
