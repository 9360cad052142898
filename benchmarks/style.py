"""How the lines of Python files read, in the figures that this project holds itself to.

    python benchmarks/style.py                      # the three scripts and s5_common.py
    python benchmarks/style.py FILE [FILE ...]      # any others, to stand beside them

Mean length of a non-blank line, share of lines over 110 columns, tuple assignments that bind
several things at once (of which none comes from one call or value), walruses outside of conditions,
and records of more than three fields that are built by position.
"""

from __future__ import annotations

import ast
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

ROOT = Path(__file__).resolve().parent.parent
OURS = ("ppo_s5_popgym.py", "a2c_s5_bsuite.py", "muesli_s5_metarl.py", "s5_common.py")


@dataclass(frozen=True)
class Args:
    """Measure how Python files read."""

    files: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """which; if none, this project's own"""


def binds_several(node: ast.AST) -> bool:
    """a, b = x, y: a tuple of values is taken apart where it is written."""
    return (
        isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Tuple)
        and isinstance(node.value, ast.Tuple)
        and not all(isinstance(part, ast.Constant) for part in node.value.elts)
    )


def records(tree: ast.AST) -> dict[str, int]:
    """NamedTuples and dataclasses by name, with the number of their fields."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            fields = sum(isinstance(line, ast.AnnAssign) for line in node.body)
            bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
            if "NamedTuple" in bases:
                found[node.name] = fields
    return found


def measure(path: Path) -> dict[str, float]:
    text = path.read_text()
    lines = [line for line in text.splitlines() if line.strip()]
    tree = ast.parse(text)
    nodes = list(ast.walk(tree))

    in_conditions = set()
    for node in nodes:
        if isinstance(node, (ast.If, ast.While, ast.IfExp)):
            in_conditions |= {id(part) for part in ast.walk(node.test)}
    walruses = 0
    for node in nodes:
        if isinstance(node, ast.NamedExpr) and id(node) not in in_conditions:
            walruses += 1

    fields = records(tree)
    by_position = 0
    for node in nodes:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            is_long_record = fields.get(node.func.id, 0) > 3
            if is_long_record and node.args:
                by_position += 1

    return {
        "lines": len(lines),
        "mean length": sum(map(len, lines)) / len(lines),
        "over 110, %": 100 * sum(len(line) > 110 for line in lines) / len(lines),
        "tuples": sum(binds_several(node) for node in nodes),
        "walruses": walruses,
        "by position": by_position,
    }


def main() -> int:
    args = tyro.cli(Args)
    paths = [Path(name) for name in args.files] or [ROOT / name for name in OURS]
    rows = {path.name: measure(path) for path in paths}
    columns = list(next(iter(rows.values())))
    print(f"| file | {' | '.join(columns)} |")
    print("|---" * (1 + len(columns)) + "|")
    for name, row in rows.items():
        figures = [f"{value:.3g}" for value in row.values()]
        print(f"| {name} | {' | '.join(figures)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
