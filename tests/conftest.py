"""Helpers that several test files share: tiny flags, networks, random sequences, and the script as a process."""

import gc
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

# Set before jax is imported, and inherited by the processes that tests start. Most of the tests' time is compilation:
# what is compiled stays for other processes and for the next run. Two workers that share all cores disturb each other.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).resolve().parent.parent / ".pytest_cache/jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and hasattr(os, "sched_setaffinity"):  # gw0, gw1, ...; on Linux
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppo_s5_popgym as ppo
import s5_common as common

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "ppo_s5_popgym.py"
ARCHS = ("s5", "s5-noreset", "lru", "mingru", "lstm", "gru", "attention", "mlp")
KINDS = ("RepeatPrevious", "Concentration", "LabyrinthEscape", "NoisyPositionOnlyPendulum")  # of POPGym's families
RESETTING = ("s5", "lru", "mingru", "lstm", "gru", "attention")  # those with a memory that an episode's start empties
QUICK = "--xla_backend_optimization_level=0"  # LLVM's optimiser off: most of a tiny run is compilation
UNOPTIMISED = {"xla_backend_optimization_level": 0}  # the same for one program
TWO_DEVICES = f"{QUICK} --xla_force_host_platform_device_count=2"
TINY: dict[str, Any] = {
    "env": "RepeatPreviousEasy",
    "num_envs": 8,
    "num_steps": 16,
    "stagger_steps": 0,  # compiles every environment once more; test_ppo_envs.py staggers all
    "num_minibatches": 2,
    "encoder_layers": (16,),
    "decoder_layers": (16,),
    "s5_layers": 1,
    "s5_width": 16,
    "s5_state": 8,
    "attention_window": 8,
    "total_timesteps": 7680,  # 60 updates
    "checkpoint_interval": 10,
    "eval_episodes": 8,
}


def others_slow(values: Any, *quick: Any) -> list[Any]:
    """Parameters of a test that does the same for each: all but these are left to the slow tests."""
    return [value if value in quick else pytest.param(value, marks=pytest.mark.slow) for value in values]


def others_exhaustive(values: Any, *slow: Any) -> list[Any]:
    """Slow for these; the others do the same and are left to whoever asks for everything."""
    return [
        pytest.param(value, marks=pytest.mark.slow if value in slow else pytest.mark.exhaustive) for value in values
    ]


def tiny_args(**flags: Any) -> ppo.Args:
    args = ppo.Args(**TINY | flags)
    args.check()
    return args


def as_flags(**flags: Any) -> list[str]:
    """{"num_envs": 8, "anneal_lr": False} -> --num-envs 8 --no-anneal-lr."""
    words = []
    for name, value in flags.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return words


def tiny_flags(**flags: Any) -> list[str]:
    return as_flags(**TINY | flags)


def start_script(*flags: Any, cwd: Path, program: tuple[str, ...] = (str(SCRIPT),), **variables: str):
    """The script in a process of its own."""
    environment = os.environ | {"XLA_FLAGS": QUICK} | variables
    words = [sys.executable, *program, *map(str, flags)]
    return subprocess.Popen(words, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen, code: int = 0, timeout: int = 180) -> tuple[str, str]:
    """Its stdout and stderr, once it has ended with the exit code that is expected."""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    assert process.returncode == code, f"exit {process.returncode}\n{out}\n{err}"
    return out, err


def assert_refused(main: Any, flags: list[str], words: str, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """A script's main ends with exit code 2 and one line that holds these words, and writes nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["script.py", *flags])
    assert common.run_main(main) == 2
    out, err = capsys.readouterr()
    assert out == "" and words in err and len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def fast_jit(function: Any, *bound: Any) -> Any:
    """jax.jit with LLVM's optimiser off, for large programs that run for a moment only."""
    return jax.jit(partial(function, *bound), compiler_options=UNOPTIMISED)


@pytest.fixture
def quick() -> Iterator[None]:
    """In this test jax.jit is fast_jit."""
    with quickly():
        yield


@contextmanager
def quickly() -> Iterator[pytest.MonkeyPatch]:
    """jax.jit is fast_jit, also for what the scripts compile."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(jax, "jit", partial(jax.jit, compiler_options=UNOPTIMISED))
        yield monkeypatch


def run_here(main: Any, *flags: Any, cwd: Path, code: int = 0) -> None:
    """A script's main, with this exit code, without a process of its own: starting one takes as long as a tiny run."""
    with quickly() as monkeypatch:
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, flags)])
        assert common.run_main(main) == code


def nearly_over(state: Any, params: Any) -> Any:
    """The same popgym_jax state, but the next step is the last one of its episode."""
    if hasattr(state, "env_state"):
        return state.replace(env_state=nearly_over(state.env_state, params))
    if hasattr(state, "trial"):
        trial = jnp.full_like(state.trial, params.num_trials - 1)
        return state.replace(trial=trial, play=nearly_over(state.play, params.trial))
    return state.replace(time=jnp.full_like(state.time, params.max_steps_in_episode - 1))


class Net:
    """A small actor-critic with every parameter away from its initial value, so that no path is muted."""

    features = 5

    def __init__(self, arch: str, discrete: bool = True, num_actions: int = 3, **flags: Any):
        self.args = tiny_args(arch=arch, **{"s5_layers": 2} | flags)
        self.module = ppo.ActorCritic(self.args, num_actions, discrete, self.features)
        obs, start = random_sequence(0, 1, 2, self.features)
        init = fast_jit(partial(self.module.init, method="scan"))
        params = init(jax.random.PRNGKey(0), self.initial_carry(2), obs, start)
        leaves, tree = jax.tree.flatten(params)
        rng = np.random.default_rng(1)
        self.initial_params = params
        self.params = jax.tree.unflatten(
            tree, [leaf + np.float32(0.2 * rng.normal(size=leaf.shape)) for leaf in leaves]
        )
        self.scan = fast_jit(partial(self.module.apply, method="scan"))
        self._step = fast_jit(partial(self.module.apply, method="step"))
        self._kernels = fast_jit(partial(self.module.apply, method="kernels"))

    def initial_carry(self, batch: int) -> Any:
        return [layer.initial_carry(batch) for layer in ppo.make_memory(self.args)]

    def stored_carry(self, batch: int) -> Any:
        """The carry in the middle of an episode."""
        return self.scan(self.params, self.initial_carry(batch), *random_sequence(99, 24, batch, self.features, 0.1))[0]

    def steps(self, carry: Any, obs: Any, start: Any) -> tuple[Any, np.ndarray]:
        """Step by step; the carry afterwards and the outputs, stacked over time."""
        kernels, outputs = self._kernels(self.params), []
        for t in range(len(obs)):
            carry, *output = self._step(self.params, kernels, carry, obs[t], start[t])
            outputs.append(flat(output))
        return carry, np.stack(outputs)

    def outputs(self, carry: Any, obs: Any, start: Any) -> np.ndarray:
        """Policy and value over a whole sequence, (T, B, .)."""
        return flat(self.scan(self.params, carry, obs, start)[1:])


def flat(outputs: Any) -> np.ndarray:
    """Policy and value as one array (..., A + 1)."""
    policy, value = outputs
    return np.concatenate([*jax.tree.leaves(policy), np.asarray(value)[..., None]], axis=-1)


def random_sequence(seed: int, T: int, B: int, features: int, reset_rate: float = 0.2) -> tuple[jax.Array, jax.Array]:
    """Observations (T, B, O) and start flags (T, B); from 0 on in one half of the environments, not in the other."""
    rng = np.random.default_rng(seed)
    start = rng.random((T, B)) < reset_rate
    start[0] = np.arange(B) % 2
    return jnp.asarray(rng.normal(size=(T, B, features)), jnp.float32), jnp.asarray(start, jnp.float32)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A family of POPGym is one piece of code in three sizes. The default run plays the Easy ones: all of them in lock
    step with the reference, and of all else one of each kind. The slow tests play the other families, and the Hard
    ones as the reference has played them. The rest, in other sizes, is left to whoever asks for everything."""
    for item in items:
        if not item.path.name.startswith("test_popgym"):
            continue
        if not (found := re.search(r"\[(?:.*-)?([A-Za-z]+)(Easy|Medium|Hard)", item.name)):
            continue
        family, size = found.groups()
        lock_step = item.path.name == "test_popgym_lockstep.py"
        if size == "Medium" or (size == "Hard" and not (lock_step and "forward" in item.name)):
            item.add_marker(pytest.mark.exhaustive)
        elif size == "Hard" or not (lock_step or family in KINDS):
            item.add_marker(pytest.mark.slow)
    for item in items:  # a test is the one or the other
        if item.get_closest_marker("exhaustive"):
            item.own_markers = [mark for mark in item.own_markers if mark.name != "slow"]


def pytest_sessionfinish() -> None:
    """What is compiled need not be collected one by one: xdist interrupts a worker that takes 5 seconds to end."""
    gc.freeze()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--episodes", type=int, default=100, help="episodes an id in the lock step with popgym")
    parser.addoption(
        "--control-episodes", type=int, default=4, help="episodes a task in the comparison with dm_control"
    )
    parser.addoption("--control-report", help="append CSV rows of the comparison with dm_control to this file")
    parser.addoption("--lockstep-report", help="append a CSV row for each id and direction to this file")


@pytest.fixture(params=others_slow(ARCHS, "s5", "s5-noreset", "mingru", "attention"))
def net(request: pytest.FixtureRequest) -> Net:
    return cached_net(request.param)


def cached_net(arch: str, **flags: Any) -> Net:
    if arch != "attention":  # the others have no window
        flags.pop("attention_window", None)
    name = (arch, *sorted(flags.items()))
    if name not in _nets:
        _nets[name] = Net(arch, **flags)
    return _nets[name]


_nets: dict[Any, Net] = {}
