"""The commands of results/README.md, and benchmarks/reproduce.py, which runs them. Nothing is trained."""

import functools
import importlib
import itertools
import json
import shutil
import sys
import time
from collections import Counter

import pytest
from conftest import ROOT, run_here

import a2c_s5_bsuite
import muesli_s5_metarl
import ppo_s5_popgym
import s5_common as common
from benchmarks import collect, metarl_runs, reproduce
from benchmarks.collect import read_rows
from popgym_jax.registration import canonical_name

SCRIPTS = {f"{module.__name__}.py": module for module in (ppo_s5_popgym, a2c_s5_bsuite, muesli_s5_metarl)}
ROWS = reproduce.read_table(reproduce.TABLE)
COMMANDS = {" ".join(command): command for row in ROWS for command in row.commands}
RUNS = {  # what a benchmark's runs are the product of
    "popgym_runs": ("envs", "archs", "seeds"),
    "popgym_grid": ("envs", "archs", "seeds"),
    "metacart": ("variants", "seeds"),
    "bsuite_memory": ("presets", "archs", "lengths", "seeds"),
    "control_ceiling": ("tasks",),
    "metarl_runs": ("tasks", "archs", "seeds"),
}


class Begun(Exception):
    """A benchmark would begin a run of this script with these flags."""


def begin(script, run_dir, flags, core=None):
    raise Begun(script, [str(flag) for flag in flags])


@functools.cache
def parsed(script, *words):
    """As the script parses them, which takes long."""
    return common.parse_args(SCRIPTS[script].Args, SCRIPTS[script].PRESETS, words)


def runs_of(command, monkeypatch):
    """What a command that collects runs would train: the script's flags, by what the runs are the product of."""
    name = command[1].removeprefix("benchmarks/").removesuffix(".py")
    module = importlib.import_module(f"benchmarks.{name}")
    monkeypatch.setattr(sys, "argv", command[1:])
    monkeypatch.setattr(module, "finished_run", begin)
    args, flags = collect.parse_args(module.Args)
    found = {}
    for key in itertools.product(*[getattr(args, field) for field in RUNS[name]]):
        with pytest.raises(Begun) as begun:
            if name == "popgym_runs":
                module.run(args, *key, flags)
            elif name == "bsuite_memory":
                module.train(args, *key, flags)
            else:
                module.run(args, flags, *key, None)
        script, words = begun.value.args
        for flag in {"--seed", "--memory-length", "--tasks"} & set(words):  # parsed once for all of them
            place = words.index(flag)
            assert words[place + 1] in [*map(str, key), "0"]  # the benchmark of single tasks has one seed, 0
            del words[place : place + 2]
        found[key] = parsed(script, *words)
    return found


def trained(file, monkeypatch):
    """The runs of all commands for a file. The first command that has a run trains it."""
    found = {}
    for row in ROWS:
        for command in row.commands if file in row.files else ():
            if "--speed" not in command and command[1].split("/")[-1].removesuffix(".py") in RUNS:
                found = runs_of(command, monkeypatch) | found
    return found


def steps(args):
    return args.num_updates * args.batch_size


def test_every_figure_and_table_of_results_has_a_command_or_is_a_record():
    made = {file for row in ROWS for file in row.files}
    pages = {path.name for path in (ROOT / "results").glob("*.md")}
    assert {path.name for path in (ROOT / "results").iterdir()} - pages <= made
    records = {file for row in ROWS if not row.commands for file in row.files}
    assert all(file.startswith("metarl_playground") for file in records)


@pytest.mark.parametrize("command", COMMANDS.values(), ids=range(len(COMMANDS)))
def test_a_command_of_the_table_is_understood_and_writes_below_runs(command, request, monkeypatch, tmp_path):
    python, program, *words = command
    assert python == "python"
    assert not [word for word in words if word.startswith("results")]
    if program == "-m":
        assert words[0] == "pytest" and (ROOT / words[1]).exists()
        for word in words[2:]:
            if word.startswith("--"):
                request.config.getoption(word)
    elif program in SCRIPTS:
        module = SCRIPTS[program]
        args = common.parse_command_line(module.Args, module.Args(), words)
        assert (args.eval or args.watch).startswith(reproduce.OUT)
    else:
        assert (ROOT / program).exists()
        module = importlib.import_module(program.removesuffix(".py").replace("/", "."))
        monkeypatch.setattr(sys, "argv", command[1:])
        args, flags = collect.parse_args(module.Args)
        assert (args.json if hasattr(args, "json") else args.out).startswith(reproduce.OUT)
        assert module.__name__.split(".")[1] in RUNS or not flags


def test_the_commands_train_the_runs_of_the_tables_as_long_as_they_were(monkeypatch):
    runs = trained("popgym_runs.csv", monkeypatch)
    runs = {(canonical_name(env), arch, str(seed)): steps(args) for (env, arch, seed), args in runs.items()}
    rows = read_rows(ROOT / "results" / "popgym_runs.csv")
    assert runs == {(row["env"], row["arch"], row["seed"]): int(row["env_steps"]) for row in rows}

    runs = trained("popgym_grid.csv", monkeypatch)
    runs = {(env, arch, str(seed)): steps(args) for (env, arch, seed), args in runs.items()}
    rows = read_rows(ROOT / "results" / "popgym_grid.csv")
    assert runs == {(row["env"], row["arch"], row["seed"]): int(row["env_steps"]) for row in rows}

    for file in ("metacart.csv", "metacart_tried.csv"):
        runs = trained(file, monkeypatch)
        runs = {(variant, str(seed)): steps(args) for (variant, seed), args in runs.items()}
        rows = read_rows(ROOT / "results" / file)
        assert runs == {(row.get("variant") or row["arch"], row["seed"]): int(row["env_steps"]) for row in rows}

    runs = trained("metarl.csv", monkeypatch)
    runs = {(tasks, arch, str(seed)): steps(args) for (tasks, arch, seed), args in runs.items()}
    rows = read_rows(ROOT / "results" / "metarl.csv")
    assert runs == {(row["tasks"], row["arch"], row["seed"]): int(row["env_steps"]) for row in rows}

    runs = {task: steps(args) for (task,), args in trained("control_ceiling.csv", monkeypatch).items()}
    rows = read_rows(ROOT / "results" / "control_ceiling.csv")
    assert runs == {row["task"]: int(row["frames"]) for row in rows}


def test_the_commands_train_the_earlier_runs_on_projected_cartpole(monkeypatch):
    """Their table has names of its own for them."""
    runs = []
    for row in ROWS:
        for command in row.commands if "metacart_context.csv" in row.files else ():
            runs += [(args, seed) for (_, seed), args in runs_of(command, monkeypatch).items()]
    rows = read_rows(ROOT / "results" / "metacart_context.csv")
    expected = Counter((row["arch"], int(row["seed"]), int(row["env_steps"])) for row in rows)
    assert Counter((args.arch, seed, steps(args)) for args, seed in runs) == expected
    assert [args.env for args, _ in runs if "Noisy" in args.env] == ["MetaNoisyStatelessCartPole"]
    assert [seed for args, seed in runs if args.s5_dt_min == 0.01] == [2]
    assert [args.total_timesteps for args, _ in runs if args.aux_coef] == [14_000_000]


def test_the_commands_for_bsuite_train_and_measure_what_is_in_the_tables(monkeypatch):
    runs = trained("bsuite_runs.csv", monkeypatch)
    rows = read_rows(ROOT / "results" / "bsuite_runs.csv")
    assert {(row["preset"], row["arch"], int(row["length"]), int(row["seed"])) for row in rows} <= set(runs)
    assert {args.adam_eps for (preset, arch, *_), args in runs.items() if (preset, arch) == ("paper", "lstm")} == {1e-8}
    measured = []
    for command in COMMANDS.values():
        if "--speed" in command:
            monkeypatch.setattr(sys, "argv", command[1:])
            args, _ = collect.parse_args(importlib.import_module("benchmarks.bsuite_memory").Args)
            measured += itertools.product(args.presets, args.archs, map(str, args.lengths))
    rows = read_rows(ROOT / "results" / "bsuite_speed.csv")
    assert sorted(measured) == sorted((row["preset"], row["arch"], row["length"]) for row in rows)


def test_lanes_begin_nothing_after_a_failure():
    begun = []

    def work(number, core):
        begun.append((number, core))
        time.sleep(0.2)
        if number == 1:
            raise SystemExit(3)

    with pytest.raises(SystemExit, match="3"):
        collect.in_lanes(2, work, [(number,) for number in range(20)])
    assert len(begun) <= 6 and {core for _, core in begun} == {0, 1}


def test_list_prints_names_minutes_and_commands(tmp_path, capsys):
    run_here(reproduce.main, "--list", cwd=tmp_path)
    printed = capsys.readouterr().out
    for line in (
        "s5_states.png: 0.1 minutes\n    python benchmarks/s5_states.py --out runs/reproduce/s5_states/s5_states.png\n",
        "control.png: not measured",
        "metarl_playground_cartpole.png, metarl_playground_six.png, metarl_playground.csv: record",
    ):
        assert line in printed
    run_here(reproduce.main, "--list", "--only", "metarl_six.png", "control", cwd=tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line[0] != " "] == [
        "control.png: not measured",
        "metarl_six.png, metarl.csv: 32.6 minutes",
    ]


@pytest.mark.parametrize(
    "names, message",
    [
        (["nothing"], "error: --only nothing: unknown; --list has the names"),
        (["control", "bsuite.md"], "error: --only bsuite.md: unknown; --list has the names"),
        (["metarl_playground"], "error: --only metarl_playground: is kept as a record, today's code cannot make it"),
        ([], "error: --only: needs a name"),
    ],
)
def test_a_name_without_a_command_is_one_line_and_runs_nothing(names, message, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    run_here(reproduce.main, "--only", *names, cwd=tmp_path, code=2)
    out, err = capfd.readouterr()
    assert out == "" and err == message + "\n"
    assert not list(tmp_path.iterdir())


TINY_TABLE = """
| file | what it shows | command | minutes |
|---|---|---|---|
| [page.md](page.md) | a page | | |
| two.csv, both.png | runs | `python add.py results/log.txt b 0 && python add.py results/log.txt c 0` | 2 |
| old.csv | of before | record | |
| one.csv, both.png | fails | `python add.py results/log.txt d 7 && python add.py results/log.txt e 0` | |
"""
ADD = """
import sys
from pathlib import Path
_, file, text, code = sys.argv
with Path(file).open("a") as log:
    log.write(text)
sys.exit(int(code))
"""


@pytest.mark.parametrize(
    "words, code, logs",
    [
        (["--only", "two.csv"], 0, {"two": "bc"}),
        (["--only", "one", "two"], 7, {"two": "bc", "one": "d"}),
        (["--only", "both"], 7, {"two": "bc", "one": "d"}),
        ([], 7, {"two": "bc", "one": "d"}),
        (["--list"], 0, {}),
    ],
)
def test_rows_run_in_the_order_of_the_table_up_to_the_command_that_fails(words, code, logs, tmp_path, monkeypatch):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "README.md").write_text(TINY_TABLE)
    (tmp_path / "add.py").write_text(ADD)
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    monkeypatch.setattr(reproduce, "TABLE", tmp_path / "results" / "README.md")
    run_here(reproduce.main, *words, cwd=tmp_path, code=code)
    written = {path.parent.name: path.read_text() for path in tmp_path.glob("runs/reproduce/*/log.txt")}
    assert written == logs
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["README.md"]


def test_the_pictures_of_a_task_list_have_every_finished_run(tmp_path, monkeypatch):
    """Also those of seeds that an earlier command trained, and none of another name or memory."""
    for run in ("dmc__A__s5__s0", "dmc__A__s5__s1", "dmc__A__mlp__s0", "dmc__A__gru__s0", "dmc__A__other__s5__s0"):
        (tmp_path / run).mkdir()
        (tmp_path / run / "summary.json").write_text(json.dumps({}))
        for table in ("evaluation.csv", "metrics.csv"):
            (tmp_path / run / table).write_text(f"run\n{run}\n")
    shutil.copytree(tmp_path / "dmc__A__s5__s0", tmp_path / "dmc__A__s5__s2")
    (tmp_path / "dmc__A__s5__s2" / "summary.json").unlink()  # still running
    drawn = []
    monkeypatch.setattr(metarl_runs, "plot_evaluations", lambda curves, picture: drawn.append(curves))
    monkeypatch.setattr(metarl_runs, "plot_learning_curves", lambda curves, picture: drawn.append(curves))
    metarl_runs.draw(metarl_runs.Args(archs=("s5", "mlp"), seeds=(0,), out=str(tmp_path)), "A")
    expected = {"s5": [{"run": "dmc__A__s5__s0"}, {"run": "dmc__A__s5__s1"}], "mlp": [{"run": "dmc__A__mlp__s0"}]}
    assert drawn == [expected, expected]
