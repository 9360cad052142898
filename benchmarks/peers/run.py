"""Ours beside its peers: PPO and layers, in one command and one run.

    python benchmarks/peers/run.py                         # up to an hour on 2 idle CPU cores
    python benchmarks/peers/run.py --quick --peers memax   # tiny sizes: only shows that it works

Every peer gets a virtual environment of its own in --out, with the versions of PEER.txt beside this
file; ours runs in the environment that runs this. The processes of a comparison take turns, call by
call, so that a noisy moment of the machine hits all alike: ratios are of calls of the same turn.

    memorax  its PPO, with its S5 and with its GRU, on our RepeatPreviousHard, against ours
    sb3      sb3-contrib's RecurrentPPO on popgym's RepeatPreviousHard against ours with LSTM and S5
    memax    its LRU, GRU and LSTM layers against ours: forward, backward, acting
    paper    our PPO with S5 in the paper's form against ours; then s5_layer.py, layers in that form
    profile  profile_update.py: where the time of our update goes

In the folder --out: speed.csv, a row a quantity; speed.json, all samples and versions; speed.md,
the table; s5_layer.json and profile.json.
"""

from __future__ import annotations

import csv
import json
import statistics
import subprocess
import sys
import venv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import ppo_s5_popgym as ppo
from benchmarks.collect import ROOT, markdown
from benchmarks.ppo_throughput import TINY
from benchmarks.timing import machine, print_table, save_json

HERE = Path(__file__).resolve().parent
PPO_SIZES = (
    "num_envs",
    "num_steps",
    "num_minibatches",
    "update_epochs",
    "encoder_layers",
    "decoder_layers",
    "s5_layers",
    "s5_width",
    "s5_state",
)


@dataclass(frozen=True)
class Args:
    """Measure ours beside its peers."""

    peers: tuple[Literal["memorax", "sb3", "memax", "paper", "profile"], ...] = (
        "memorax",
        "sb3",
        "memax",
        "paper",
        "profile",
    )
    """what to measure"""

    rounds: int = 3
    """times that a comparison's processes are started, each of which compiles anew"""

    repeats: int = 5
    """timed calls in a round; one before them is not counted"""

    lengths: tuple[int, ...] = (256, 1024)
    """sequence lengths T of memax's layers; acting takes as many steps as the first"""

    batch: int = 64
    """sequences B of memax's layers"""

    resets: float = 0.01
    """share of the steps of memax's layers that open an episode"""

    out: str = "runs/peers"
    """folder for environments and results"""

    quick: bool = False
    """tiny sizes: only shows that the script works"""


# ---- Environments and processes ------------------------------------------------------------------
def environment(out: Path, peer: str) -> str:
    """The Python of a peer's environment, made and filled if need be."""
    wanted = (HERE / f"{peer}.txt").read_text()
    folder = out / f"venv-{peer}"
    installed = folder / "installed.txt"  # written last
    python = folder / "bin" / "python"
    if not installed.exists() or installed.read_text() != wanted:
        print(f"installing {peer} into {folder}", file=sys.stderr, flush=True)
        venv.create(folder, clear=True, with_pip=True)
        command = [str(python), "-m", "pip", "install", "-q", "-r", str(HERE / f"{peer}.txt")]
        subprocess.run(command, check=True)
        installed.write_text(wanted)
    return str(python)


class Process:
    """A worker (see worker.py) that has compiled its calls and waits for orders."""

    def __init__(self, python: str, script: Path, settings: dict[str, Any]):
        self.script = script
        command = [python, str(script), json.dumps(settings)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.about = self.read()

    def read(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.script.name} ended with exit code {self.process.wait()}")
        return json.loads(line)

    def seconds(self, call: str) -> float:
        assert self.process.stdin
        print(call, file=self.process.stdin, flush=True)
        return self.read()["seconds"]

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


# ---- What is compared ----------------------------------------------------------------------------
class Side(NamedTuple):
    """One of those that are compared: ours if peer is empty."""

    label: str
    peer: str
    script: str
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.peer or 'ours'}: {self.label}"


class Comparison(NamedTuple):
    """A peer and what of ours stands beside it; they have the same calls."""

    theirs: Side
    ours: tuple[Side, ...]
    steps: int  # environment steps of a call, 0 for layers


def ppo_sizes(quick: bool) -> dict[str, Any]:
    args = ppo.Args(**(TINY if quick else {}))
    sizes = {name: getattr(args, name) for name in PPO_SIZES}
    return {"env": "RepeatPreviousHard", "popgym_env": "RepeatPreviousHard", **sizes}


def comparisons(args: Args, peer: str) -> list[Comparison]:
    """All of a peer's. Of ours, PPO is that of the default preset."""
    sizes = ppo_sizes(args.quick)
    steps = sizes["num_envs"] * sizes["num_steps"]

    def our_ppo(arch, form="ours"):
        label = f"PPO, {arch}"
        return Side(label, "", "ours.py", {**sizes, "arch": arch, "form": form})

    if peer == "memorax":
        found = []
        for arch in ("s5", "gru"):
            theirs = Side(f"PPO, {arch}", peer, "memorax_ppo.py", {**sizes, "arch": arch})
            found.append(Comparison(theirs, (our_ppo(arch),), steps))
        return found
    if peer == "sb3":
        theirs = Side("RecurrentPPO, lstm", peer, "sb3_popgym.py", sizes)
        return [Comparison(theirs, (our_ppo("lstm"), our_ppo("s5")), steps)]
    if peer == "paper":
        paper = our_ppo("s5", form="paper")._replace(label="PPO, s5 in the paper's form")
        return [Comparison(paper, (our_ppo("s5"),), steps)]

    plan = [(f"{kind}, T={T}", kind, T) for T in args.lengths for kind in ("forward", "forward+backward")]
    plan.append((f"acting, {args.lengths[0]} steps", "acting", args.lengths[0]))
    of_layers = {**sizes, "plan": plan, "batch": args.batch, "resets": args.resets}

    def layer_of(peer, script, layer):
        return Side(f"{layer} layer", peer, script, {**of_layers, "layer": layer})

    found = []
    for layer, beside in (("lru", ("lru", "s5")), ("gru", ("gru",)), ("lstm", ("lstm",))):
        ours = tuple(layer_of("", "ours.py", name) for name in beside)
        found.append(Comparison(layer_of(peer, "memax_layers.py", layer), ours, steps=0))
    return found


# ---- Measuring -----------------------------------------------------------------------------------
class Quantity(NamedTuple):
    """A call's time, or that of compiling it."""

    call: str
    compiling: bool


Samples = dict[Quantity, dict[str, list[float]]]  # seconds by the name of the side, in the order of the turns


def measure(args: Args, comparison: Comparison, pythons: dict[str, str]) -> tuple[Samples, dict[str, Any]]:
    """All samples, and the versions on each side.

    The processes of a round start one after the other; those that are ready wait for the rest.
    """
    sides = (*comparison.ours, comparison.theirs)
    samples: Samples = {}
    versions = {}

    def keep(call, compiling, side, seconds):
        samples.setdefault(Quantity(call, compiling), {}).setdefault(side, []).append(seconds)

    for _ in range(args.rounds):
        processes: dict[str, Process] = {}
        try:
            for side in sides:
                python = pythons.get(side.peer, sys.executable)
                process = Process(python, HERE / side.script, side.settings)
                processes[side.name] = process
                versions[side.name] = process.about["versions"]
                for call, seconds in process.about["compile_seconds"].items():
                    keep(call, True, side.name, seconds)
            calls = process.about["calls"]
            for repeat in range(args.repeats + 1):
                for call in calls:
                    for name, process in processes.items():
                        seconds = process.seconds(call)
                        if repeat:
                            keep(call, False, name, seconds)
        finally:
            for process in processes.values():
                process.close()
    return samples, versions


# ---- Results -------------------------------------------------------------------------------------
def rows_of(comparison: Comparison, samples: Samples) -> list[dict[str, Any]]:
    """A row for each quantity and each of ours; ratio: how many times as fast ours is, turn by turn."""
    rows = []
    for side in comparison.ours:
        for (call, compiling), by_side in samples.items():
            if comparison.theirs.name not in by_side:
                continue  # what is not compiled there
            ours = by_side[side.name]
            theirs = by_side[comparison.theirs.name]
            ratios = [slow / fast for fast, slow in zip(ours, theirs, strict=True)]
            quantity = f"compile {call}" if compiling else call
            if comparison.steps and not compiling:
                unit = "steps/s"
                values = [comparison.steps / statistics.median(seconds) for seconds in (ours, theirs)]
            elif compiling:
                unit = "s"
                values = [statistics.median(seconds) for seconds in (ours, theirs)]
            else:
                unit = "ms"
                values = [1e3 * statistics.median(seconds) for seconds in (ours, theirs)]
            rows.append(
                {
                    "theirs": comparison.theirs.name,
                    "ours": side.name,
                    "quantity": quantity,
                    "unit": unit,
                    "ours_median": f"{values[0]:.5g}",
                    "theirs_median": f"{values[1]:.5g}",
                    "ratio_median": f"{statistics.median(ratios):.4g}",
                    "ratio_min": f"{min(ratios):.4g}",
                    "ratio_max": f"{max(ratios):.4g}",
                    "samples": len(ratios),
                }
            )
    return rows


def paper_layer_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of what s5_layer.py has measured; it keeps no single ratios."""
    rows = []
    for row in result["rows"]:
        for phase, unit, scale in (("run", "ms", 1e3), ("compile", "s", 1.0)):
            times = row[phase]
            kind = f"{row['kind']}, T={row['T']}"
            rows.append(
                {
                    "theirs": f"paper: {result['shape']['layers']} s5 layers in the paper's form",
                    "ours": f"ours: {result['shape']['layers']} s5 layers",
                    "quantity": f"compile {kind}" if phase == "compile" else kind,
                    "unit": unit,
                    "ours_median": f"{scale * times['ours']['median']:.5g}",
                    "theirs_median": f"{scale * times['paper']['median']:.5g}",
                    "ratio_median": f"{times['paper']['median'] / times['ours']['median']:.4g}",
                    "ratio_min": "",
                    "ratio_max": "",
                    "samples": result["args"]["repeats"] if phase == "run" else 1,
                }
            )
    return rows


HEADER = ("theirs", "ours", "quantity", "ours", "theirs", "times as fast", "lowest to highest")


def number(text: str, unit: str) -> str:
    """To three digits, with its unit."""
    value = float(text)
    digits = f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
    return f"{digits} {unit}"


def cells(row: dict[str, Any]) -> list[str]:
    """A line of the table."""
    spread = f"{row['ratio_min']} to {row['ratio_max']}" if row["ratio_min"] else ""
    return [
        row["theirs"],
        row["ours"],
        row["quantity"],
        number(row["ours_median"], row["unit"]),
        number(row["theirs_median"], row["unit"]),
        f"{float(row['ratio_median']):.2f}x",
        spread,
    ]


def save(out: Path, rows: list[dict[str, Any]], record: dict[str, Any]) -> None:
    """After every comparison, so that a run that is stopped leaves what it has."""
    with (out / "speed.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    (out / "speed.md").write_text(markdown(HEADER, [cells(row) for row in rows]) + "\n")
    save_json(str(out / "speed.json"), record)


def run_script(script: str, flags: Sequence[str]) -> None:
    """One of the benchmarks of ours alone."""
    subprocess.run([sys.executable, str(ROOT / "benchmarks" / script), *flags], check=True)


def main() -> None:
    args = tyro.cli(Args)
    if args.quick:
        args = replace(args, rounds=1, repeats=2, lengths=(16,), batch=2)
    out = Path(args.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    tiny = ["--quick"] if args.quick else []
    environments = [peer for peer in args.peers if (HERE / f"{peer}.txt").exists()]
    pythons = {peer: environment(out, peer) for peer in environments}

    rows: list[dict[str, Any]] = []
    record: dict[str, Any] = {"args": vars(args), **machine(), "comparisons": []}
    for peer in args.peers:
        if peer == "profile":
            run_script("profile_update.py", ["--json", str(out / "profile.json"), *tiny])
            continue
        for comparison in comparisons(args, peer):
            print(f"measuring {comparison.theirs.name}", file=sys.stderr, flush=True)
            samples, versions = measure(args, comparison, pythons)
            rows += rows_of(comparison, samples)
            seconds = [{**quantity._asdict(), "seconds": of_sides} for quantity, of_sides in samples.items()]
            record["comparisons"].append({"versions": versions, "samples": seconds})
            save(out, rows, record)
        if peer == "paper":
            result = out / "s5_layer.json"
            run_script("s5_layer.py", ["--json", str(result), *tiny])
            rows += paper_layer_rows(json.loads(result.read_text()))
            save(out, rows, record)
    if rows:
        print_table(HEADER, [cells(row) for row in rows], labels=3)


if __name__ == "__main__":
    main()
