"""What a run survives: kills, damaged checkpoints, full disks, NaN, bad flags; and its memory.

Counted for each script.

    python benchmarks/faults.py                                           # all of it, on 2 CPU cores
    python benchmarks/faults.py --scripts ppo_s5_popgym --parts damage commands nan  # a minute
    python benchmarks/faults.py --parts kills --kills 5

kills     a run is killed with SIGKILL at random moments, half of them while a checkpoint is being
          written, and resumed after each; when it is done, its tables are byte for byte and its
          newest checkpoint is bit for bit those of a run that nothing has stopped
damage    every file of the newest checkpoint is cut in half, has one bit flipped, is removed: the
          answer is an exact restore, or exit code 2 and one line, which offers the older checkpoint
          where that one is whole
disk      the disk is full from the start, fills during the run, or cannot be written to: one line,
          no traceback, an exit code that is not 0, and with enough space the resumed run ends like
          one that nothing has stopped
nan       NaN in reward, observation or gradient of one update: the run stops there, says so in one
          line, exits with 1, and goes on from the checkpoint before as if there had been none
commands  generated command lines that are all bad: exit code 2, one line on stderr that names the
          flag or the value, nothing on stdout, nothing written
memory    resident memory of the process does not grow over the updates of a run

The counts go to the table at the head of OUT/reliability.md, a row for each script and part; rows
of what was not measured this time and the text below the table stay. Every failure is printed. The
exit code is 1 if there is one.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import s5_common as common  # noqa: E402
from benchmarks.collect import parse_args  # noqa: E402
from benchmarks.timing import print_table  # noqa: E402

QUICK = "--xla_backend_optimization_level=0"  # LLVM's optimiser off: most of a tiny run is compilation
PARTS = ("kills", "damage", "disk", "nan", "commands", "memory")
NETWORK = {"encoder_layers": (8,), "s5_layers": 1, "s5_width": 8, "s5_state": 4}
TINY: dict[str, dict[str, Any]] = {
    "ppo_s5_popgym": {
        **NETWORK,
        "env": "RepeatPreviousEasy",
        "num_envs": 4,
        "num_steps": 8,
        "num_minibatches": 2,
        "update_epochs": 1,
        "decoder_layers": (8,),
        "eval_episodes": 4,
    },
    "a2c_s5_bsuite": {
        **NETWORK,
        "env": "MemoryChain",
        "memory_length": 4,
        "num_envs": 2,
        "eval_episodes": 4,
    },
    "muesli_s5_metarl": {
        **NETWORK,
        "suite": "gymnax",
        "tasks": "Pendulum-v1",
        "num_envs": 2,
        "num_steps": 10,
        "meta_steps": 20,
        "action_repeat": 1,
        "num_minibatches": 2,
        "muesli_samples": 2,
        "muesli_support": 5,
        "obs_size": 4,
        "eval_episodes": 2,
    },
}
SCRIPTS = tuple(TINY)
KILLED_UPDATES = 60  # of a run that is killed, some seconds
MOMENTS = {"in a checkpoint": 0.5, "between updates": 0.3, "anywhere": 0.2}  # share of the kills aimed there
GROWTH = 5.0  # MB that a run's memory may grow by between update 500 and the last


@dataclass(frozen=True)
class Args:
    """Scripts x parts."""

    scripts: tuple[str, ...] = SCRIPTS
    """scripts to try"""

    parts: tuple[str, ...] = PARTS
    """what to try: kills, damage, disk, nan, commands, memory"""

    kills: int = 50
    """kills of each script"""

    command_lines: int = 200
    """bad command lines of all scripts together"""

    updates: int = 2000
    """updates over which memory is watched"""

    jobs: int = 2
    """killed runs side by side"""

    seed: int = 0
    """of the moments, bits and command lines"""

    out: str = "results"
    """where reliability.md is"""


class Count(NamedTuple):
    """A row of the table."""

    script: str
    part: str
    cases: int
    failures: list[str]
    what: str  # what happened in the cases


class Ended(NamedTuple):
    """How a process, or a script's main in this process, has ended."""

    code: Any
    out: str
    err: str


# ---- 1. Runs -------------------------------------------------------------------------------------
def tiny(script: str, updates: int, **own: Any) -> dict[str, Any]:
    """Flags of a tiny run of so many updates."""
    flags = TINY[script] | own
    if script == "a2c_s5_bsuite":
        return flags | {"num_rows": updates, "num_episodes": updates * flags["num_envs"]}
    return flags | {"total_timesteps": updates * flags["num_envs"] * flags["num_steps"]}


def as_words(flags: dict[str, Any]) -> list[str]:
    """{"num_envs": 8, "anneal_lr": False} -> --num-envs 8 --no-anneal-lr."""
    return [word for group in as_groups(flags) for word in group]


def as_groups(flags: dict[str, Any]) -> list[list[str]]:
    """The words of each flag."""
    groups = []
    for name, value in flags.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            groups.append([f"--{flag}" if value else f"--no-{flag}"])
        elif isinstance(value, tuple):
            groups.append([f"--{flag}", *map(str, value)])
        else:
            groups.append([f"--{flag}", str(value)])
    return groups


def start(script: str, words: Sequence[Any]) -> subprocess.Popen:
    """The script as a process."""
    command = [sys.executable, str(ROOT / f"{script}.py"), *map(str, words)]
    environment = os.environ | {"XLA_FLAGS": QUICK, "JAX_PLATFORMS": "cpu"}
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, **options)


def ended(process: subprocess.Popen, seconds: float = 300) -> Ended:
    """Wait for its end."""
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return Ended(process.returncode, out, err)


def finished_run(script: str, run: Path, flags: dict[str, Any]) -> Path:
    """A run that nothing has stopped. RuntimeError where that fails, as nothing can be compared then."""
    end = ended(start(script, as_words(flags | {"run_dir": str(run)})))
    if end.code:
        raise RuntimeError(f"{script} exits with {end.code} undisturbed: {end.err.strip()}")
    return run


def wait_until(process: subprocess.Popen, condition: Callable[[], bool], seconds: float = 300) -> bool:
    """Whether the condition came true before the process ended."""
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.001)
    return False


def in_process(main: Callable[[], Any], words: Sequence[Any] = (), collect: bool = False) -> Ended:
    """A script's main in this process, with all that it and its libraries, C++ ones too, print.

    collect: also what tasks that orbax leaves behind print when they are collected, which takes a moment.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        with redirected(1, out), redirected(2, err), mock.patch.object(sys, "argv", ["script", *map(str, words)]):
            try:
                code = common.run_main(main)
            except SystemExit as stop:
                code = stop.code
            except Exception:
                code = "a traceback"
                traceback.print_exc()
            if collect:
                gc.collect()
        printed = []
        for file in (out, err):
            file.seek(0)
            printed.append(file.read().decode(errors="replace"))
    return Ended(code, *printed)


@contextlib.contextmanager
def redirected(number: int, file: Any) -> Iterator[None]:
    """Standard output (1) or error (2), of Python and of everything else in this process, into a file."""
    redirect = contextlib.redirect_stdout if number == 1 else contextlib.redirect_stderr
    before = os.dup(number)
    os.dup2(file.fileno(), number)
    text = io.TextIOWrapper(os.fdopen(os.dup(number), "wb", buffering=0), write_through=True)
    try:
        with redirect(text):
            yield
    finally:
        os.dup2(before, number)
        os.close(before)
        text.close()


# ---- 2. What is compared -------------------------------------------------------------------------
def contents(folder: Path) -> dict[str, bytes]:
    """Every file under a folder and what is in it; folders end with a slash."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir():
            found[f"{name}/"] = b""
        else:
            found[name] = path.read_bytes()
    return found


def saved_updates(run: Path) -> list[int]:
    """Updates of the checkpoints."""
    return sorted(int(path.name) for path in (run / "checkpoints").glob("*") if path.name.isdigit())


def bits(arrays: dict[str, Any]) -> dict[str, tuple]:
    """Type, shape and bytes of each array."""
    found = {}
    for name, x in arrays.items():
        x = np.asarray(x)
        found[name] = (str(x.dtype), x.shape, x.tobytes())
    return found


def newest_arrays(run: Path) -> dict[str, Any]:
    """Arrays of the newest checkpoint, read by orbax without this project's code."""
    newest = run / "checkpoints" / str(saved_updates(run)[-1])
    return ocp.StandardCheckpointer().restore(newest.resolve() / "state")


def differences(run: Path, whole: Path) -> list[str]:
    """In what a finished run is not equal to one that nothing has stopped."""
    found = []
    for table in sorted({path.name for folder in (run, whole) for path in folder.glob("*.csv")}):
        paths = [folder / table for folder in (run, whole)]
        texts = [path.read_bytes() if path.exists() else b"" for path in paths]
        if texts[0] != texts[1]:
            found.append(f"{table} differs")
    if saved_updates(run)[-1:] != saved_updates(whole)[-1:]:
        return [*found, f"checkpoints {saved_updates(run)} instead of {saved_updates(whole)}"]
    ours = bits(newest_arrays(run))
    theirs = bits(newest_arrays(whole))
    for name in sorted(ours.keys() | theirs.keys()):
        if not same(name, ours, theirs):
            found.append(f"array {name} differs")
    ours, theirs = (json.loads((folder / "summary.json").read_text()) for folder in (run, whole))
    for name in ("updates", "env_steps", "final_returns", "best_returns"):
        if ours[name] != theirs[name]:
            found.append(f"{name} of summary.json differs")
    litter = names_of(run) ^ names_of(whole)
    return [*found, *(f"{name} is in one of the directories only" for name in sorted(litter))]


def same(name: str, ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    return name in ours and name in theirs and ours[name] == theirs[name]


def names_of(run: Path) -> set[str]:
    """What is in a run's directory, but for the event files: each process has its own."""
    return {path.name for path in run.iterdir() if "tfevents" not in path.name}


def one_line(end: Ended, codes: Sequence[int]) -> list[str]:
    """What is wrong with a refusal: another exit code, or another thing than one line on stderr."""
    found = []
    if end.code not in codes:
        found.append(f"exit code {end.code}")
    lines = end.err.splitlines()
    if len(lines) != 1 or not lines[0].startswith("error: "):
        found.append(f"{len(lines)} lines on stderr: {' | '.join(lines)[-600:]}")
    return found


# ---- 3. Kills ------------------------------------------------------------------------------------
class Usual(NamedTuple):
    """How long an undisturbed run takes."""

    seconds: float  # of the process
    updating: float  # of its updates and checkpoints


def try_kills(script: str, folder: Path, kills: int, jobs: int, seed: int) -> Count:
    """Kill and resume, again and again; a run that gets to its end is compared, and another one is begun."""
    flags = tiny(script, KILLED_UPDATES, checkpoint_interval=3)
    if script == "muesli_s5_metarl":
        flags["eval_interval"] = 7
    began = time.monotonic()
    whole = finished_run(script, folder / "whole", flags)
    summary = json.loads((whole / "summary.json").read_text())
    usual = Usual(time.monotonic() - began, summary["run_seconds"] - summary["compile_seconds"])
    shares = [kills // jobs + (lane < kills % jobs) for lane in range(jobs)]
    with ThreadPoolExecutor(jobs) as pool:
        lanes = []
        for lane, share in enumerate(shares):
            own = folder / f"lane{lane}"
            own.mkdir()
            rng = random.Random(f"{seed} {lane} {script}")
            lanes.append(pool.submit(kill_and_resume, script, own, flags, whole, usual, share, rng))
        tallies = [lane.result() for lane in lanes]
    tally: Counter = sum((counted for counted, _ in tallies), Counter())
    failures = [failure for _, failed in tallies for failure in failed]
    what = (
        f"{tally['in a checkpoint']} while a checkpoint was written, {tally['before an update']} before the process "
        f"had made an update; {tally['runs']} runs ended, {tally['equal']} of them equal to the undisturbed one"
    )
    return Count(
        script=script,
        part="kills",
        cases=tally["kills"],
        failures=failures,
        what=what,
    )


def kill_and_resume(
    script: str, folder: Path, flags: dict[str, Any], whole: Path, usual: Usual, kills: int, rng: random.Random
) -> tuple[Counter, list[str]]:
    """Counts of kills and of ended runs, and failures."""
    tally: Counter = Counter()
    failures: list[str] = []
    run = folder / "run0"
    history: list[str] = []  # the run's kills
    while len(failures) < 10 and (tally["kills"] < kills or run.exists()):
        resumed = run.exists()
        process = start(script, ["--resume", run] if resumed else as_words(flags | {"run_dir": str(run)}))
        moment = kill_at_random(process, run, usual, rng) if tally["kills"] < kills else []
        end = ended(process)
        if end.code == -signal.SIGKILL:
            tally.update(["kills", *moment])
            history.append(", ".join(moment) or "between updates")
            continue
        tally["runs"] += 1
        wrong = differences(run, whole) if end.code == 0 else one_line(end, [0])
        if wrong:
            failures.append(f"killed {history}, then: {'; '.join(wrong)}")
        else:
            tally["equal"] += 1
        shutil.rmtree(run, ignore_errors=True)
        run = folder / f"run{tally['runs']}"
        history = []
    return tally, failures


def kill_at_random(process: subprocess.Popen, run: Path, usual: Usual, rng: random.Random) -> list[str]:
    """SIGKILL at a random moment, unless the process ends before it. Returns what the kill fell into."""
    began = time.time()
    table = identity(run / "metrics.csv")
    aim = rng.choices(list(MOMENTS), list(MOMENTS.values()))[0]
    if aim == "anywhere":
        moment = time.monotonic() + rng.uniform(0, usual.seconds)
        wait_until(process, lambda: time.monotonic() > moment)
    elif aim == "between updates":
        wait_until(process, lambda: identity(run / "metrics.csv") != table)  # made anew at the first update
        time.sleep(rng.uniform(0, usual.updating / 3))
    else:
        for _ in range(rng.randint(1, 4)):
            wait_until(process, lambda: not unfinished_checkpoints(run, began))
            wait_until(process, lambda: bool(unfinished_checkpoints(run, began)))
        time.sleep(rng.uniform(0, 0.05))
    process.kill()
    process.wait()
    fell = []
    if unfinished_checkpoints(run, began):
        fell.append("in a checkpoint")
    if identity(run / "metrics.csv") == table:
        fell.append("before an update")
    return fell


def identity(path: Path) -> int | None:
    """Another one for a file that has taken the place of this one."""
    with contextlib.suppress(OSError):
        return path.stat().st_ino
    return None


def unfinished_checkpoints(run: Path, since: float) -> list[str]:
    """Those that were begun since then: they are written into a draft, which gets its name when all is in it."""
    found = []
    with contextlib.suppress(OSError):
        for entry in os.scandir(run / "checkpoints"):
            with contextlib.suppress(OSError):
                if entry.name.endswith(".draft") and entry.stat().st_mtime > since:
                    found.append(entry.name)
    return found


# ---- 4. Damage -----------------------------------------------------------------------------------
def try_damage(script: str, folder: Path, seed: int, step: int = 4096) -> Count:
    """Every file of the newest checkpoint in turn, restored as --resume and --eval do.

    step: a bit is flipped in each piece of this many bytes, and in two pieces at least.
    """
    module = import_module(script)
    run = folder / "run"
    flags = tiny(script, 4, checkpoint_interval=2, run_dir=str(run))
    end = in_process(module.main, as_words(flags))
    if end.code:
        raise RuntimeError(f"{script} exits with {end.code} undisturbed: {end.err.strip()}")
    args = replace(module.Args(**flags), resume=str(run))
    like = module.init_runners(module.make_setup(args))
    right = restored(script, args, like)
    newest, older = (run / "checkpoints" / str(update) for update in (4, 2))
    rng = random.Random(f"{seed} damage {script}")
    tally: Counter = Counter()
    failures = []
    for file in sorted(path for path in newest.rglob("*") if path.is_file()):
        content = file.read_bytes()
        for how, damaged in damages(content, step, rng):
            if damaged is None:
                file.unlink()
            else:
                file.write_bytes(damaged)
            answer, wrong = judge_restore(script, args, like, right)
            tally[answer] += 1
            file.write_bytes(content)
            failures += [f"{file.relative_to(newest)} {how}: {problem}" for problem in wrong]
    for problem in follow_the_offer(script, args, like, newest, older):
        failures.append(f"after a refusal: {problem}")
    what = (
        f"{tally['refused']} refused with exit code 2, one line and the offer of the older checkpoint, which then "
        f"restores; {tally['exact']} restored bit for bit"
    )
    return Count(
        script=script,
        part="damage",
        cases=sum(tally.values()),
        failures=failures,
        what=what,
    )


def damages(content: bytes, step: int, rng: random.Random) -> list[tuple[str, bytes | None]]:
    """The file cut in half, removed (None), and with one bit flipped, in each of several places."""
    found: list[tuple[str, bytes | None]] = [("cut in half", content[: len(content) // 2]), ("removed", None)]
    places = 2 + len(content) // step
    for part in range(places if content else 0):
        low = len(content) * part // places
        high = len(content) * (part + 1) // places
        place = rng.randrange(low, max(high, low + 1))
        bit = rng.randrange(8)
        flipped = bytearray(content)
        flipped[place] ^= 1 << bit
        found.append((f"with bit {bit} of byte {place} of {len(content)} flipped", bytes(flipped)))
    return found


class Restored(NamedTuple):
    """What a resumed run takes over."""

    update: int
    arrays: dict[str, tuple]
    log: tuple  # seconds so far, columns and rows of metrics.csv


def restored(script: str, args: Any, like: Any) -> Restored:
    run = common.RunDirectory(args, getattr(args, "env", ""), script)
    state = run.restore(like)
    return Restored(run.done, bits(common.stored(state)), (run.seconds, run.log.columns, run.log.kept))


def judge_restore(script: str, args: Any, like: Any, right: Restored) -> tuple[str, list[str]]:
    """Whether a restore was "refused" or "exact", and what is wrong with it."""
    got: list[Restored] = []

    def restore() -> int:
        got.append(restored(script, args, like))
        return 0

    before = contents(Path(args.resume))
    end = in_process(restore, collect=True)
    wrong = []
    if contents(Path(args.resume)) != before:
        wrong.append("something was written")
    if end.code == 0:
        for name, ours, theirs in zip(Restored._fields, got[0], right, strict=True):
            if ours != theirs:
                wrong.append(f"silently restored another {name}")
        if "Traceback" in end.err:
            wrong.append(f"restored, with a traceback: {end.err.strip()[-300:]}")
        return "failed" if wrong else "exact", wrong
    wrong += one_line(end, [2])
    if "to go on from checkpoint 2" not in end.err:
        wrong.append(f"the older checkpoint is not offered: {end.err.strip()[:300]}")
    return "failed" if wrong else "refused", wrong


def follow_the_offer(script: str, args: Any, like: Any, newest: Path, older: Path) -> list[str]:
    """With both checkpoints damaged none is offered; with the newest one removed the older one is restored exactly."""
    right = bits(ocp.StandardCheckpointer().restore(older.resolve() / "state"))
    wrong = []
    for checkpoint in (newest, older):
        shutil.copytree(checkpoint, checkpoint.with_name("kept") / checkpoint.name)
        shutil.rmtree(checkpoint / "state")
    kept = newest.with_name("kept")
    moved = kept.rename(newest.parent.parent / "kept")  # out of the way of orbax
    end = in_process(lambda: restored(script, args, like).update)
    wrong += one_line(end, [2])
    if "to go on from" in end.err:
        wrong.append(f"a damaged checkpoint is offered: {end.err.strip()[:300]}")
    shutil.rmtree(newest)
    shutil.rmtree(older)
    shutil.copytree(moved / older.name, older)
    got = restored(script, args, like)
    if (got.update, got.arrays) != (2, right):
        wrong.append("the older checkpoint is not restored exactly")
    return wrong


# ---- 5. Disk -------------------------------------------------------------------------------------
def try_disk(script: str, folder: Path, small: bool = False) -> Count:
    """Limits on the size of a file, file systems too small, directories that cannot be written to."""
    flags = tiny(script, 24, checkpoint_interval=3)
    whole = finished_run(script, folder / "whole", flags)
    cases: dict[str, Callable[[Path], list[str]]] = {}
    for size in () if small else (200, 3_000, 16_000):
        cases[f"files of at most {size} bytes"] = lambda own, size=size: limited(script, own, flags, whole, size)
    for rows in (5,) if small else (1, 10):
        cases[f"full from row {rows} on"] = lambda own, rows=rows: filled(script, own, flags, whole, rows)
    for size in (320,) if small else (4, 160, 320, 400):
        cases[f"a file system of {size} kB"] = lambda own, size=size: too_small(script, own, flags, whole, size)
    cases["a new run in a directory that is read-only"] = lambda own: read_only_new(script, own, flags)
    cases["a run resumed in a directory that is read-only"] = lambda own: read_only_resumed(script, own, flags)
    failures = []
    skipped = []
    for number, (name, case) in enumerate(cases.items()):
        own = folder / f"case{number}"
        own.mkdir()
        try:
            failures += [f"{name}: {problem}" for problem in case(own)]
        except Skipped as reason:
            skipped.append(f"{name} ({reason})")
    what = "each one line and an exit code that is not 0; resumed with enough space, equal to the undisturbed run"
    if skipped:
        what += f"; skipped: {', '.join(skipped)}"
    return Count(
        script=script,
        part="disk",
        cases=len(cases) - len(skipped),
        failures=failures,
        what=what,
    )


class Skipped(Exception):
    """This machine does not let us try it."""


def limited(script: str, folder: Path, flags: dict[str, Any], whole: Path, size: int) -> list[str]:
    """No file can grow beyond this size, from the start."""
    run = folder / "run"
    process = start(script, as_words(flags | {"run_dir": str(run)}))
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, size))
    return [*judge_stop(ended(process), run), *judge_resumed(script, run, flags, whole)]


def filled(script: str, folder: Path, flags: dict[str, Any], whole: Path, rows: int) -> list[str]:
    """From a row of metrics.csv on nothing more can be written."""
    run = folder / "run"
    process = start(script, as_words(flags | {"run_dir": str(run)}))
    if not wait_until(process, lambda: row_count(run) >= rows):
        return [f"ended before row {rows}: {ended(process).err.strip()}"]
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, 0))
    return [*judge_stop(ended(process), run), *judge_resumed(script, run, flags, whole)]


def too_small(script: str, folder: Path, flags: dict[str, Any], whole: Path, size: int) -> list[str]:
    """The file system is full at this number of kB; later it has more room."""
    with mounted(folder / "disk", f"size={size}k"):
        run = folder / "disk" / "run"
        wrong = judge_stop(ended(start(script, as_words(flags | {"run_dir": str(run)}))), run)
        remount(folder / "disk", "size=64m")
        return [*wrong, *judge_resumed(script, run, flags, whole)]


def read_only_new(script: str, folder: Path, flags: dict[str, Any]) -> list[str]:
    """The run's directory cannot be made."""
    with read_only(folder / "disk"):
        run = folder / "disk" / "run"
        return judge_stop(ended(start(script, as_words(flags | {"run_dir": str(run)}))), run)


def read_only_resumed(script: str, folder: Path, flags: dict[str, Any]) -> list[str]:
    """A stopped run cannot go on; what is there stays as it is."""
    disk = folder / "disk"
    run = disk / "run"

    def stopped_run() -> None:
        process = start(script, as_words(flags | {"run_dir": str(run)}))
        wait_until(process, lambda: row_count(run) >= 5)
        process.kill()
        ended(process)

    with read_only(disk, stopped_run):
        before = contents(run)
        wrong = judge_stop(ended(start(script, ["--resume", run])), run)
        if contents(run) != before:
            wrong.append("something was changed")
        return wrong


def judge_stop(end: Ended, run: Path) -> list[str]:
    """One line that names the place, and exit code 1 or 2."""
    wrong = one_line(end, [1, 2])
    if str(run) not in end.err:
        wrong.append("the line does not name the run's directory")
    return wrong


def judge_resumed(script: str, run: Path, flags: dict[str, Any], whole: Path) -> list[str]:
    """Resumed, or begun anew where there is no directory yet, the run ends like one that nothing has stopped."""
    words = ["--resume", run] if run.exists() else as_words(flags | {"run_dir": str(run)})
    end = ended(start(script, words))
    if end.code or "Traceback" in end.err:
        return [f"with enough space: exit code {end.code}, {end.err.strip()[-600:]}"]
    return [f"with enough space: {problem}" for problem in differences(run, whole)]


def row_count(run: Path) -> int:
    """Rows of metrics.csv."""
    with contextlib.suppress(OSError):
        return (run / "metrics.csv").read_bytes().count(b"\n") - 1
    return 0


@contextlib.contextmanager
def mounted(place: Path, options: str) -> Iterator[None]:
    """A file system in memory at this place. Raises Skipped where this process may not mount one."""
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        raise Skipped("no right to mount")
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True, capture_output=True)


def remount(place: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True, capture_output=True)


@contextlib.contextmanager
def read_only(place: Path, prepare: Callable[[], None] = lambda: None) -> Iterator[None]:
    """A directory that cannot be written to, once it is prepared. Permissions do not hold root back, a mount does."""
    if os.geteuid() == 0:
        with mounted(place, "size=64m"):
            prepare()
            remount(place, "ro")
            yield
        return
    place.mkdir()
    prepare()
    folders = [place, *(path for path in place.rglob("*") if path.is_dir())]
    files = [path for path in place.rglob("*") if path.is_file()]
    try:
        for path in folders:
            path.chmod(0o555)
        for path in files:
            path.chmod(0o444)
        yield
    finally:
        for path in folders:
            path.chmod(0o755)


# ---- 6. NaN --------------------------------------------------------------------------------------
def try_nan(script: str, folder: Path) -> Count:
    """NaN planted in one update of three kinds; the state before it, and the run that goes on without it."""
    module = import_module(script)
    flags = tiny(script, 6, checkpoint_interval=2)
    if script == "muesli_s5_metarl":
        flags |= {"meta_steps": flags["num_steps"], "eval_interval": 1}
    setup = module.make_setup(module.Args(**flags))
    runners = module.init_runners(setup)
    good = module.compile_update(setup, runners)
    parts: dict[str, Any] = {"init_runners": lambda _: jax.tree.map(jnp.copy, runners)}  # none is made twice
    if script == "muesli_s5_metarl":
        evaluation = module.make_evaluation(setup)
        parts["make_evaluation"] = lambda _: evaluation

    def train(update: Callable, words: Sequence[Any]) -> Ended:
        with mock.patch.multiple(module, compile_update=lambda *_: update, **parts):
            return in_process(module.main, words)

    whole = folder / "whole"
    end = train(good, as_words(flags | {"run_dir": str(whole)}))
    if end.code:
        raise RuntimeError(f"{script} exits with {end.code} undisturbed: {end.err.strip()}")
    failures = []
    named = []
    for quantity in ("reward", "observation", "gradient"):
        run = folder / quantity
        with planted(module, quantity):
            bad = module.compile_update(setup, runners)
        end = train(in_turn([good, good, good, bad, good, good]), as_words(flags | {"run_dir": str(run)}))
        wrong = one_line(end, [1])
        said = re.search(r"([\w, ]+) (?:is|are) not finite at update (\d+)", end.err)
        if not said or said[2] != "4":
            wrong.append(f"the line does not say what is not finite at update 4: {end.err.strip()[:300]}")
        else:
            named.append(f"{quantity}: {said[1].strip()}")
        wrong += judge_what_is_kept(run)
        end = train(good, ["--resume", run])
        if end.code or end.err:
            wrong.append(f"resumed without NaN: exit code {end.code}, {end.err.strip()[:300]}")
        else:
            wrong += [f"resumed without NaN: {problem}" for problem in differences(run, whole)]
        failures += [f"{quantity}: {problem}" for problem in wrong]
    what = f"stopped at that update with exit code 1 and one line that names it ({', '.join(named)})"
    return Count(
        script=script,
        part="nan",
        cases=3,
        failures=failures,
        what=f"{what}; the checkpoint from before goes on to the undisturbed end",
    )


def judge_what_is_kept(run: Path) -> list[str]:
    """After NaN in update 4: three rows, no NaN in a table, checkpoint 2 with finite arrays."""
    wrong = []
    if row_count(run) != 3:
        wrong.append(f"metrics.csv has {row_count(run)} rows")
    for table in sorted(run.glob("*.csv")):
        if b"nan" in table.read_bytes().lower():
            wrong.append(f"{table.name} holds NaN")
    if saved_updates(run)[-1:] != [2]:
        return [*wrong, f"checkpoints {saved_updates(run)}, the last good one is 2"]
    arrays = newest_arrays(run)
    return [*wrong, *(f"array {name} is not finite" for name in arrays if not is_finite(arrays[name]))]


def in_turn(programs: Sequence[Callable]) -> Callable:
    """A function that is each of these for one call."""
    left = iter(programs)
    return lambda runners: next(left)(runners)


def planted(module: Any, quantity: str) -> Any:
    """A patch of the script: NaN in the first environment's reward or observation, or in the gradient."""
    places = PLACES[module.__name__]
    if quantity == "gradient":
        return mock.patch.object(module, places.loss, with_nan_gradient(getattr(module, places.loss)))
    place = getattr(places, quantity)
    return mock.patch.object(module, places.step, with_nan(getattr(module, places.step), place))


class Places(NamedTuple):
    """Where NaN goes in a script."""

    step: str  # the function that steps its environments
    observation: int  # the place of what is seen in the function's result: an array, or a record that has obs
    reward: int
    loss: str


PLACES = {
    "ppo_s5_popgym": Places(step="step_envs", observation=0, reward=3, loss="ppo_loss"),
    "a2c_s5_bsuite": Places(step="step_envs", observation=0, reward=2, loss="a2c_loss"),
    "muesli_s5_metarl": Places(step="step_world", observation=0, reward=1, loss="muesli_loss"),
}


def with_nan(step: Callable, place: int) -> Callable:
    """An environments' step in whose result, at this place, the first environment's numbers are NaN."""

    def spoil(x: Any) -> Any:
        if hasattr(x, "obs"):
            return x._replace(obs=spoil(x.obs))
        return x.at[0].set(jnp.nan)

    def spoiled(*operands: Any) -> Any:
        result = step(*operands)
        parts = list(result)
        parts[place] = spoil(parts[place])
        return result._make(parts) if hasattr(result, "_make") else tuple(parts)

    return spoiled


def with_nan_gradient(loss: Callable) -> Callable:
    """The loss as it is, with a gradient that is NaN."""

    @jax.custom_vjp
    def spoil(x: jax.Array) -> jax.Array:
        return x

    spoil.defvjp(lambda x: (x, None), lambda _, gradient: (gradient * jnp.nan,))

    def spoiled(*operands: Any) -> tuple:
        value, metrics = loss(*operands)
        return spoil(value), metrics

    return spoiled


def is_finite(x: Any) -> bool:
    x = np.asarray(x)
    return not np.issubdtype(x.dtype, np.floating) or bool(np.isfinite(x).all())


# ---- 7. Command lines ----------------------------------------------------------------------------
class BadLine(NamedTuple):
    """A command line that cannot be meant."""

    words: list[str]
    named: tuple[str, ...]  # one of these has to stand in the answer
    why: str


# flags for which 0 has a meaning, and the largest number of those that have one
ZERO = {
    "seed mapping_seed num_distractors ent_coef vf_coef gamma gae_lambda td_lambda retrace_lambda eval_trials",
    "muesli_pg_coef muesli_cmpo_coef muesli_model_coef muesli_advantage_decay eval_interval eval_noise",
    "aux_coef obs_change trial_discount s5_fast_weights",
}
MAY_BE_ZERO = {name for names in ZERO for name in names.split()}
LARGEST = {
    "gamma": 1,
    "gae_lambda": 1,
    "td_lambda": 1,
    "retrace_lambda": 1,
    "trial_discount": 1,
    "muesli_target_rate": 1,
    "muesli_advantage_decay": 1,
    "seed": 2**32,
}
WRONG: dict[Any, tuple[str, ...]] = {
    int: ("many", "2.5", "0x10", "1e3", "", "None", "True", "3 4", "--"),
    float: ("fast", "0,5", "", "None", "1e", "1/2", "[1]"),
    bool: ("maybe", "1", "False"),
    tuple[int, ...]: ("wide", "0.5", "16,16", "(16)", "None"),
}


def try_commands(script: str, folder: Path, count: int, seed: int) -> Count:
    """Bad command lines, none of which may train, print or write anything."""
    module = import_module(script)
    rng = random.Random(f"{seed} commands {script}")
    stub = folder / "stub"  # what parse_args reads of a run
    for run in (stub, folder / "other"):
        run.mkdir()
        flags = vars(module.Args(**tiny(script, 4, run_dir=str(run))))
        flags = {name: value for name, value in flags.items() if name not in common.OF_A_RUN}
        (run / "args.json").write_text(json.dumps({"args": flags}))
    place = folder / "place"
    lines = bad_lines(module, stub, count, rng)
    failures = []
    kinds: Counter = Counter()
    for line in lines:
        shutil.rmtree(place, ignore_errors=True)
        (place / "taken").mkdir(parents=True)
        (place / "taken" / "file").write_text("mine")
        before = contents(folder)
        with contextlib.chdir(place), mock.patch.object(module, "init_runners", accepted):
            end = in_process(module.main, line.words)
        wrong = one_line(end, [2])
        if end.out:
            wrong.append(f"stdout: {end.out.strip()[:200]}")
        if contents(folder) != before:
            wrong.append("something was written")
        if not any(name in end.err for name in line.named):
            wrong.append(f"the line names none of {line.named}: {end.err.strip()[:300]}")
        kinds[line.why.split(":")[0]] += 1
        if wrong:
            failures.append(f"{line.why}: {script}.py {' '.join(map(repr, line.words))}: {'; '.join(wrong)}")
    what = f"{', '.join(f'{number} {kind}' for kind, number in kinds.items())}: each exit code 2 and one line"
    return Count(
        script=script,
        part="commands",
        cases=len(lines),
        failures=failures,
        what=what,
    )


def accepted(*_: Any) -> None:
    """In the place of what comes once the flags are good."""
    raise SystemExit("accepted")


def bad_lines(module: Any, stub: Path, count: int, rng: random.Random) -> list[BadLine]:
    """Half of them numbers out of range, of every numeric flag if count allows it; then the other kinds in turn."""
    numeric = [name for name, kind in kinds_of(module).items() if kind in (int, float, tuple[int, ...])]
    rng.shuffle(numeric)
    lines = [out_of_range(module, name, rng) for name in numeric[: (count + 1) // 2]]
    combinations = impossible(module, stub)
    rng.shuffle(combinations)
    makers = [wrong_type, unknown_choice, unknown_flag, missing_value]
    while len(lines) < count:
        turn = len(lines) % (len(makers) + 1)
        if turn < len(makers):
            lines.append(makers[turn](module, rng))
        else:
            lines.append(combinations[len(lines) // (len(makers) + 1) % len(combinations)])
    return [among_good_flags(module, line, rng) for line in lines]


def kinds_of(module: Any) -> dict[str, Any]:
    """Type of every flag."""
    hints = get_type_hints(module.Args)
    return {field.name: hints[field.name] for field in fields(module.Args)}


def among_good_flags(module: Any, line: BadLine, rng: random.Random) -> BadLine:
    """The bad words before, between or after flags that are good, those of a tiny run or hardly any."""
    taken = {word for word in line.words if word.startswith("--")}
    if {"--resume", "--eval"} & taken:  # the flags of that run are meant
        return line
    needed = ("--suite", "--tasks")  # the suites of physics take seconds to import
    of_a_tiny_run = rng.random() < 0.5
    good = []
    for group in as_groups(tiny(module.__name__, 4)):
        if group[0] not in taken and (of_a_tiny_run or group[0] in needed):
            good.append(group)
    good.append(line.words)
    rng.shuffle(good)
    return line._replace(words=[word for group in good for word in group])


def flag_of(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def out_of_range(module: Any, name: str, rng: random.Random) -> BadLine:
    """A number that the flag cannot have."""
    kind = kinds_of(module)[name]
    numbers = ["-1", "-7"]
    if name not in MAY_BE_ZERO:
        numbers.append("0")
    if name in LARGEST:
        numbers.append(str(LARGEST[name] + 1))
    if kind is float:
        numbers += ["nan", "inf", "-inf", "-0.5", "1e999"]
    if kind is int:
        numbers.append(str(10**30))
    number = rng.choice(numbers)
    words = [flag_of(name), number]
    if kind == tuple[int, ...]:
        words.insert(rng.randint(1, 2), "16")
    return BadLine(words, (flag_of(name),), "out of range")


def wrong_type(module: Any, rng: random.Random) -> BadLine:
    """A word where a number is due, or a value after a flag that takes none."""
    name, kind = rng.choice([(name, kind) for name, kind in kinds_of(module).items() if kind in WRONG])
    word = rng.choice(WRONG[kind])
    return BadLine([flag_of(name), word], (flag_of(name), word or flag_of(name)), "of a wrong type")


def unknown_choice(module: Any, rng: random.Random) -> BadLine:
    """A word that is none of those allowed, often nearly one."""
    choices: dict[str, tuple[str, ...]] = {}
    for name, kind in kinds_of(module).items():
        if get_origin(kind) is Literal:
            choices[name] = get_args(kind)
    open_ended = {
        "env": "MemoryChain",
        "sweep": "memory_len",
        "tasks": "Pendulum-v1",
        "eval_tasks": "Pendulum-v1",
    }
    for name, example in open_ended.items():
        if name in kinds_of(module):
            choices[name] = (example,)
    name = rng.choice(list(choices))
    word = misspelt(rng.choice(choices[name]), rng)
    flags = [flag_of(name), word]
    return BadLine(flags, (flag_of(name), word), "an unknown choice")


def misspelt(word: str, rng: random.Random) -> str:
    """Never a word that is right."""
    place = rng.randrange(1, len(word))
    misspelt = f"{word[:place]}q{word[place:]}"
    return rng.choice([f"{word}x", misspelt, f"un{word}", "nonsense", f"{word} {word}"])


def unknown_flag(module: Any, rng: random.Random) -> BadLine:
    """A flag that there is not, often nearly one, or a word that belongs to none."""
    name = rng.choice(list(kinds_of(module)))
    value = rng.choice([[], ["3"], ["word"]])
    of_a_number = rng.choice([name for name, kind in kinds_of(module).items() if kind in (int, float)])
    negated = f"--no-{flag_of(of_a_number)[2:]}"
    flag = rng.choice([f"{flag_of(name)}x", f"--x{name}", negated, "--verbose", "stray"])
    return BadLine([flag, *value], (flag,), "an unknown flag")


def missing_value(module: Any, rng: random.Random) -> BadLine:
    """A flag without the value that it needs, at the end or before another flag."""
    kinds = kinds_of(module).items()
    names = [name for name, kind in kinds if kind in (int, float, str) or get_origin(kind) is Literal]
    name = rng.choice(names)
    return BadLine([flag_of(name)], (flag_of(name),), "a missing value")


def impossible(module: Any, stub: Path) -> list[BadLine]:
    """Flags each of which may be good, but not together, or not on this machine or in this directory."""
    combinations: list[dict[str, Any]] = [
        {"s5_dt_min": 0.5, "s5_dt_max": 0.1},
        {"seed": 2**31 - 3, "num_seeds": 5},
        {"num_devices": 4096, "num_envs": 8192, "num_minibatches": 1},
        {"num_devices": 3, "num_envs": 4},
        {"distributed": True},
        {"run_dir": "taken"},
        {"run_dir": "taken/file"},
        {"run_dir": "taken/file/run"},
        {"run_dir": "long" * 100},
        {"resume": "nowhere"},
        {"eval": "nowhere"},
        {"resume": "taken"},
        {"eval": "taken/file"},
        {"watch": "nowhere"},
        {"resume": stub, "learning_rate": 0.5},
        {"resume": stub, "seed": 3},
        {"eval": stub, "s5_width": 32},
        {"eval": stub, "eval_episodes": 0},
        {"resume": stub, "run_dir": "another"},
        {"resume": stub, "eval": stub.with_name("other")},
        {"eval": stub, "watch": stub.with_name("other")},
    ]
    own: dict[str, list[dict[str, Any]]] = {
        "ppo_s5_popgym": [
            {"num_envs": 9, "num_minibatches": 2},
            {"num_envs": 2, "num_minibatches": 4},
            {"num_envs": 8, "num_minibatches": 8, "num_steps": 1},
            {"arch": "attention", "s5_width": 12},
            {"env": "RepeatPreviousEasy", "eval_trials": 3},
            {"eval": stub, "eval_beside": ("nowhere",)},
        ],
        "a2c_s5_bsuite": [
            {"arch": "attention", "s5_width": 12},
            {"env": "MNISTBandit"},
            {"resume": stub, "sweep": "memory_len"},
            {"sweep": "memory_len", "run_dir": "taken"},
        ],
        "muesli_s5_metarl": [
            {"meta_steps": 25, "num_steps": 10},
            {"meta_steps": 5, "num_steps": 10},
            {"meta_steps": 20, "action_repeat": 3},
            {"meta_steps": 20, "action_repeat": 4},
            {"meta_steps": 60, "action_repeat": 3, "num_steps": 6},
            {"muesli_unroll": 10, "num_steps": 10},
            {"num_envs": 9, "num_minibatches": 2},
            {"num_envs": 1, "num_minibatches": 1, "tasks": "Pendulum-v1,MountainCarContinuous-v0"},
            {"tasks": "Pendulum-v1,Pendulum-v1"},
            {"tasks": "Pendulum-v1", "eval_tasks": "Pendulum-v1"},
            {"suite": "gymnax", "tasks": "PointMass"},
        ],
    }
    known = kinds_of(module)
    lines = []
    for flags in [*combinations, *own[module.__name__]]:
        flags = {name: value for name, value in flags.items() if name in known}
        named = tuple(flag_of(name) for name in flags) + tuple(map(str, flags.values()))
        lines.append(BadLine(as_words(flags), named, f"impossible together: {', '.join(flags)}"))
    return lines


# ---- 8. Memory -----------------------------------------------------------------------------------
def try_memory(script: str, folder: Path, updates: int, first: int = 500) -> Count:
    """Resident memory beside the rows of metrics.csv, from outside: medians around the first update and near the end.

    Not at the very end, where Muesli compiles an evaluation.
    """
    run = folder / "run"
    process = start(script, as_words(tiny(script, updates, checkpoint_interval=100, run_dir=str(run))))
    samples = watch_memory(process, run)
    end = ended(process)
    failures = [] if end.code == 0 else [f"exit code {end.code}: {end.err.strip()[-300:]}"]
    span = updates // 20
    last = updates - span
    early = [size for row, size in samples if abs(row - first) <= span // 2]
    late = [size for row, size in samples if abs(row - last) <= span // 2]
    if not early or not late:
        return Count(
            script=script,
            part="memory",
            cases=1,
            failures=[*failures, "too few samples"],
            what="",
        )
    growth = statistics.median(late) - statistics.median(early)
    if growth > GROWTH:
        failures.append(f"memory has grown by {growth:.1f} MB between updates {first} and {last}")
    at_first = f"{statistics.median(early):.0f} MB at update {first}"
    at_last = f"{statistics.median(late):.0f} MB at update {last}"
    at = f"{at_first}, {at_last}"
    what = f"{at}: {growth:+.1f} MB, at most +{GROWTH:.0f} allowed ({len(samples)} samples)"
    return Count(
        script=script,
        part="memory",
        cases=1,
        failures=failures,
        what=what,
    )


def watch_memory(process: subprocess.Popen, run: Path) -> list[tuple[int, float]]:
    """Pairs of row and MB until the process ends."""
    samples = []
    rows = 0
    table = None
    while process.poll() is None:
        with contextlib.suppress(OSError, ValueError, IndexError):
            if table is None:
                table = (run / "metrics.csv").open("rb")
            rows += table.read().count(b"\n")
            pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
            samples.append((rows - 1, pages * resource.getpagesize() / 1e6))
        time.sleep(0.02)
    if table:
        table.close()
    return samples


# ---- 9. Table and command line -------------------------------------------------------------------
HEADER = ("script", "part", "cases", "failures", "what happened")


def keep_table(path: Path, counts: Sequence[Count]) -> None:
    """Put rows into a page's first table, in the place of those of the same script and part."""
    lines = path.read_text().splitlines() if path.exists() else ["# Reliability", ""]
    first = next((n for n, line in enumerate(lines) if line.startswith("|")), len(lines))
    after = next((n for n, line in enumerate(lines) if n > first and not line.startswith("|")), len(lines))
    rows = {}
    for line in lines[first + 2 : after]:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        rows[cells[0], cells[1]] = cells
    for count in counts:
        cells = [count.script, count.part, str(count.cases), str(len(count.failures)), count.what]
        rows[count.script, count.part] = [cell.replace("|", "/") for cell in cells]
    order = sorted(rows, key=lambda row: (PARTS.index(row[1]), SCRIPTS.index(row[0])))
    table = [HEADER, ("---", "---", "---:", "---:", "---"), *(rows[row] for row in order)]
    path.parent.mkdir(parents=True, exist_ok=True)
    text = [*lines[:first], *(f"| {' | '.join(cells)} |" for cells in table), *lines[after:]]
    path.write_text("\n".join(text) + "\n")


def measure(args: Args, script: str, part: str, folder: Path) -> Count:
    """One row."""
    if part == "kills":
        return try_kills(script, folder, args.kills, args.jobs, args.seed)
    if part == "damage":
        return try_damage(script, folder, args.seed)
    if part == "disk":
        return try_disk(script, folder)
    if part == "nan":
        return try_nan(script, folder)
    if part == "commands":
        place = args.scripts.index(script)
        share = math.ceil((args.command_lines - place) / len(args.scripts))
        return try_commands(script, folder, share, args.seed)
    return try_memory(script, folder, args.updates)


def main() -> int:
    args, _ = parse_args(Args)
    os.environ["XLA_FLAGS"] = QUICK
    os.environ["JAX_PLATFORMS"] = "cpu"
    counts = []
    for script in args.scripts:
        for part in args.parts:
            began = time.monotonic()
            with tempfile.TemporaryDirectory() as folder:
                count = measure(args, script, part, Path(folder).resolve())
            counts.append(count)
            print(f"{script}, {part}: {count.cases} cases, {len(count.failures)} failures", end=", ")
            print(f"{time.monotonic() - began:.0f} s; {count.what}", flush=True)
            for failure in count.failures:
                print(f"    FAILED {failure}", flush=True)
            keep_table(Path(args.out) / "reliability.md", [count])
    rows = [(count.script, count.part, str(count.cases), str(len(count.failures))) for count in counts]
    print_table(HEADER[:4], rows, labels=2)
    return int(any(count.failures for count in counts))


if __name__ == "__main__":
    sys.exit(main())
