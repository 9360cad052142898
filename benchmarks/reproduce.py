"""Make the files of results/ again, by the commands in the table of results/README.md.

    python benchmarks/reproduce.py --list
    python benchmarks/reproduce.py --only repeat_hard metarl_six.png
    # everything, in the order of the table: many hours
    python benchmarks/reproduce.py

A name is that of a file, with or without its ending, and stands for all rows of the table that have it.
Nothing is written into results/: what is made lies under runs/reproduce/, to be compared, or copied by hand.
Trainings are told so by their commands; where a command names results/, runs/reproduce/NAME/ takes its place.

A training that is finished is not repeated and one that was stopped is resumed, so the same command goes on
where it was interrupted. A command that fails ends it with its exit code. Rows that are kept as a record,
because today's code cannot make them, are left out.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import s5_common as common  # noqa: E402
from benchmarks.collect import ROOT  # noqa: E402

TABLE = ROOT / "results" / "README.md"
OUT = "runs/reproduce"  # from the project's root


@dataclass(frozen=True)
class Args:
    """Run the commands of results/README.md."""

    list: bool = False
    """print names, minutes and commands, and run nothing"""

    only: tuple[str, ...] = ("all",)
    """files to make"""


class Row(NamedTuple):
    """A row of the table that has a command or is a record."""

    files: tuple[str, ...]
    commands: list[list[str]]  # the words of each; a record has none
    minutes: str  # empty if not measured

    def is_called(self, name: str) -> bool:
        return name in self.files or name in [Path(file).stem for file in self.files]


def read_table(page: Path) -> list[Row]:
    """The rows of a page whose tables have the columns file, what it shows, command, minutes."""
    rows = []
    for line in page.read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) != 4:
            continue
        file_cell, _, command_cell, minutes = cells
        files = tuple(dict.fromkeys(re.findall(r"\w+\.\w+", file_cell)))  # a link names its file twice
        commands = []
        if command_cell.startswith("`"):
            out = f"{OUT}/{Path(files[0]).stem}/"
            for command in command_cell.strip("`").split(" && "):
                commands.append([re.sub("^results/", out, word) for word in shlex.split(command)])
        if commands or command_cell == "record":
            rows.append(Row(files, commands, minutes))
    return rows


def choose(rows: list[Row], names: tuple[str, ...]) -> list[Row]:
    """The rows of these names, each once, in the order of the table. Raises UsageError for an unknown name."""
    if not names:
        raise common.UsageError("--only: needs a name")
    if "all" in names:
        return rows
    for name in names:
        if not any(row.is_called(name) for row in rows):
            raise common.UsageError(f"--only {name}: unknown; --list has the names")
    return [row for row in rows if any(row.is_called(name) for name in names)]


def check_no_record(rows: list[Row], names: tuple[str, ...]) -> None:
    """Raise UsageError for a name of which there is nothing to run."""
    for name in names:
        called = [row for row in rows if row.is_called(name)]
        if called and not any(row.commands for row in called):
            raise common.UsageError(f"--only {name}: is kept as a record, today's code cannot make it")


def print_rows(rows: list[Row]) -> None:
    for row in rows:
        minutes = f"{row.minutes} minutes" if row.minutes else "not measured"
        print(f"{', '.join(row.files)}: {minutes if row.commands else 'record'}")
        for command in row.commands:
            print(f"    {shlex.join(command)}")


def run(row: Row) -> int:
    """Its commands, one after the other, in the project's root. Exit code of the one that fails, or 0."""
    for command in row.commands:
        print(f"$ {shlex.join(command)}", flush=True)
        for word in command:
            if word.startswith(OUT):
                (ROOT / word).parent.mkdir(parents=True, exist_ok=True)
        ended = subprocess.run([sys.executable, *command[1:]], cwd=ROOT)
        if ended.returncode:
            return ended.returncode
    return 0


def main() -> int:
    args = tyro.cli(Args)
    chosen = choose(read_table(TABLE), args.only)
    if args.list:
        print_rows(chosen)
        return 0
    check_no_record(chosen, args.only)
    for row in chosen:
        code = run(row)
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(common.run_main(main))
