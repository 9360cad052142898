"""What the benchmarks share.

Compile apart from run, all contenders in turn, and the result as table and file.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

import s5_common as common


class Timing(NamedTuple):
    """Seconds of one thing over the repeats of a run."""

    median: float
    minimum: float


def timed_compile(function: Callable, *operands: Any) -> tuple[Any, float]:
    """The function compiled for these operands, and the seconds that it took.

    These include tracing and lowering.
    """
    began = time.perf_counter()
    compiled = jax.jit(function).lower(*operands).compile()
    return compiled, time.perf_counter() - began


def timed_call(function: Callable, *operands: Any) -> tuple[Any, float]:
    """The result of a call and the seconds until it was there; jax returns before its work is done."""
    began = time.perf_counter()
    result = jax.block_until_ready(function(*operands))
    return result, time.perf_counter() - began


def time_in_turn(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, Timing]:
    """Time every call once in each of ``repeats`` rounds.

    So a noisy moment of the machine hits all alike. One round before them warms up and is not
    counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            _, taken = timed_call(call)
            if repeat:
                seconds[name].append(taken)
    timings = {}
    for name, taken_by_call in seconds.items():
        timings[name] = Timing(median=statistics.median(taken_by_call), minimum=min(taken_by_call))
    return timings


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], labels: int = 1) -> None:
    """Columns as wide as their widest cell.

    The first ``labels`` of them are flush left, numbers flush right.
    """
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = ["-" * width for width in widths]
    for cells in (header, rule, *rows):
        aligned = []
        for i, (cell, width) in enumerate(zip(cells, widths, strict=True)):
            aligned.append(cell.ljust(width) if i < labels else cell.rjust(width))
        print("  ".join(aligned).rstrip(), flush=True)


def machine() -> dict[str, Any]:
    """The device, the commit and the versions that a figure belongs to."""
    about = common.provenance()
    device = f"{about['device']}, {os.cpu_count()} CPU cores, {platform.machine()}"
    return {**about, "device": device}


def save_json(path: str, content: dict[str, Any]) -> None:
    Path(path).write_text(json.dumps(content, indent=2) + "\n")
