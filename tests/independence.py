"""Are random quantities that ought to be independent correlated? One check for all environments.

A key that is used twice (drawn from and split as well, or split here and folded into there: `fold_in(key, 1)` IS
`split(key, 2)[1]`) makes two quantities functions of the same bits, often one and the same number.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np


def correlated_pairs(
    draws: Mapping[str, Any], bound: float = 0.05, within: bool = False
) -> list[tuple[str, str, float]]:
    """Pairs of quantities whose correlation exceeds the bound in absolute value, the most correlated first.

    draws: name -> n draws of a scalar (n,), of a vector (n, k) or of any array (n, ...), numbers or bool; the parts of
        an array are called name[0], name[1], ... in row-major order
    bound: between independent quantities a correlation has a standard error of 1 / sqrt(n); 0.05 is more than three of
        them for 4,000 draws and seven for 20,000, which thousands of pairs need
    within: also compare the parts of one name, which are otherwise taken to depend on each other

    Returns (name, other name, correlation) for each. A quantity that does not vary correlates with nothing.
    """
    names: list[str] = []
    owners: list[int] = []
    columns: list[np.ndarray] = []
    for owner, (name, values) in enumerate(draws.items()):
        array = np.asarray(values, np.float64)
        if not np.isfinite(array).all():
            raise ValueError(f"{name} is not finite everywhere")
        parts = array.reshape(len(array), -1).T
        for i, column in enumerate(parts):
            centred = column - column.mean()
            size = np.linalg.norm(centred)
            if np.ptp(column) > 0:
                names.append(f"{name}[{i}]" if array.ndim > 1 else name)
                owners.append(owner)
                columns.append(centred / size)
    if not columns:
        raise ValueError("nothing varies")
    correlation = np.stack(columns) @ np.stack(columns).T
    compared = np.triu(np.ones_like(correlation, bool), k=1)
    if not within:
        compared &= np.not_equal.outer(owners, owners)
    rows = np.argwhere(compared & (np.abs(correlation) > bound))
    pairs = [(names[i], names[j], float(correlation[i, j])) for i, j in rows]
    return sorted(pairs, key=lambda pair: -abs(pair[2]))
