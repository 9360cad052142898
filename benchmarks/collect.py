"""What the collections of training runs share.

Flags for the script, resumption, a core for each run, rows in a CSV.
"""

from __future__ import annotations

import csv
import json
import os
import queue
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from threading import Lock
from typing import Any

import tyro

ROOT = Path(__file__).resolve().parent.parent
TABLE_LOCK = Lock()  # a table is written by one lane at a time


def parse_args(args_class: type) -> tuple[Any, list[str]]:
    """The benchmark's own flags, and those after ``--``, which are for the script."""
    words = sys.argv[1:]
    split = words.index("--") if "--" in words else len(words)
    return tyro.cli(args_class, args=words[:split]), words[split + 1 :]


def execute(script: str, flags: Iterable[Any], core: int | None = None) -> None:
    """Run a script of this project, on one CPU core only if one is given.

    Ends with its exit code if it fails.
    """
    process = subprocess.Popen([sys.executable, str(ROOT / script), *map(str, flags)])
    if core is not None:
        os.sched_setaffinity(process.pid, {core})  # before it has threads, which inherit it
    if process.wait():
        raise SystemExit(process.returncode)


def finished_run(
    script: str,
    run_dir: Path,
    flags: Iterable[Any],
    core: int | None = None,
) -> dict[str, Any]:
    """Summary of the run in ``run_dir``: begun with these flags, or resumed if it had been stopped."""
    summary = run_dir / "summary.json"
    if not summary.exists():
        if run_dir.exists():
            execute(script, ["--resume", run_dir], core)
        else:
            execute(script, [*flags, "--run-dir", run_dir], core)
    return json.loads(summary.read_text())


def in_lanes(jobs: int, function: Callable, items: Iterable[Any]) -> None:
    """``function(*item, core)`` for every item, ``jobs`` at a time; none is begun after one failed.

    Each has a CPU core of its own; core is None if there is one at a time.
    """
    cores: queue.Queue = queue.Queue()
    for core in range(jobs):
        cores.put(core if jobs > 1 else None)

    def held(item):
        core = cores.get()
        try:
            function(*item, core)
        finally:
            cores.put(core)

    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(held, item) for item in items]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)  # those that run go on to their end
            raise


def read_rows(table: Path) -> list[dict[str, str]]:
    """The rows of a CSV with a header."""
    with table.open() as file:
        return list(csv.DictReader(file))


def keep_rows(table: Path, rows: Sequence[dict[str, Any]], same: Sequence[str]) -> None:
    """Put rows into a CSV in the place of those that are the ``same`` in these columns."""

    def place(row):
        return tuple(str(row[name]) for name in same)

    replaced = {place(row) for row in rows}
    table.parent.mkdir(parents=True, exist_ok=True)
    with TABLE_LOCK:
        old = read_rows(table) if table.exists() else []
        kept = [row for row in old if place(row) not in replaced]
        with table.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows([*kept, *rows])


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, without a last line break."""
    lines = [f"| {' | '.join(cells)} |" for cells in (header, *rows)]
    lines.insert(1, "|---" * len(header) + "|")
    return "\n".join(lines)


def print_row(row: dict[str, Any]) -> None:
    words = [f"{name} {value}" for name, value in row.items()]
    print(", ".join(words), flush=True)
