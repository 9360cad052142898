"""What the three scripts share and a reader may trust unread.

Part 1  state-space numerics: HiPPO-LegS, its diagonalisation, zero-order hold, the resettable scan.
Part 2  the memories that S5 is compared with: GRU, self-attention, MLP.
Part 3  run plumbing: command line, run directory, logs, checkpoints, signals, progress.

The S5 layer itself, the learners and the environment loops stand in the scripts. This module
imports no script and no environment package.

Shapes: T time, B environments, H model width, P complex states kept (half of N conjugate ones).
Conventions: time-major (T, B, ...); ``start`` is 1 where a step opens an episode.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib.metadata
import io
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tyro
from jax import lax
from matplotlib.figure import Figure
from tensorboardX import SummaryWriter
from tqdm import tqdm

Array = jax.Array

# ----------------------------------------------------------------------------------------------
# Part 1: state-space numerics
# ----------------------------------------------------------------------------------------------


def hippo_legs(n: int) -> np.ndarray:
    """HiPPO-LegS state matrix A, float64 (n, n). Gu et al. 2020, theorem 2.

    A[i, j] = -sqrt((2i + 1)(2j + 1)) for i > j, -(i + 1) for i = j, 0 for i < j.
    """
    root = np.sqrt(2 * np.arange(n) + 1.0)
    return -(np.tril(np.outer(root, root), -1) + np.diag(np.arange(n) + 1.0))


def dplr_hippo(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues and eigenvectors of the normal part of HiPPO-LegS. Gu et al. 2022; Smith et al. 2023, B.1.

    A = S - p pᵀ with p_i = sqrt(i + 1/2); S + I/2 is skew-symmetric, so S = V diag(Lambda) V^H with
    Re(Lambda) = -1/2 and unitary V. The eigenvalues come in conjugate pairs; the half with positive
    imaginary part is returned, since 2 Re(.) restores the other.

    n: number of real states, even. Returns Lambda complex128 (n/2,), V complex128 (n, n/2).
    """
    if n % 2:
        raise ValueError(f"the number of HiPPO states must be even, got {n}")
    p = np.sqrt(np.arange(n) + 0.5)
    normal = hippo_legs(n) + np.outer(p, p)
    frequency, vectors = np.linalg.eigh(-1j * (normal + 0.5 * np.eye(n)))
    return -0.5 + 1j * frequency[n // 2 :], vectors[:, n // 2 :]


def discretize_zoh(Lambda: Array, B_tilde: Array, step: Array) -> tuple[Array, Array]:
    """Zero-order hold of a diagonal system. Smith et al. 2023, section 2.

    Lambda_bar = exp(Lambda step),  B_bar = Lambda^-1 (Lambda_bar - I) B_tilde

    Lambda: complex (P,); B_tilde: complex (P, H); step: seconds per time step, float (P,).
    Returns Lambda_bar complex (P,), B_bar complex (P, H).
    """
    Lambda_bar = jnp.exp(Lambda * step)
    return Lambda_bar, ((Lambda_bar - 1) / Lambda)[:, None] * B_tilde


class ResetElement(NamedTuple):
    """One element e_k = (A_bar, B_bar u_k, d_k) of the resettable scan. Lu et al. 2023, section 3.1.

    transition: complex (..., P); drive: complex (..., P); reset: bool (..., 1), true where step k
    opens a new episode.
    """

    transition: Array
    drive: Array
    reset: Array


def reset_operator(a: ResetElement, b: ResetElement) -> ResetElement:
    """The resettable operator a ⊕ b, a earlier than b. Lu et al. 2023, section 3.1, appendix A.

        a ⊕ b = (b_A a_A, b_A a_u + b_u, a_d)   if b_d = 0
        a ⊕ b = b                               if b_d = 1

    An element is the map x -> A x + u that a stretch of steps does to the state; ⊕ composes two
    stretches. A reset means "forget what came before", so a stretch that begins with one needs
    nothing from its left: b alone is the answer. It is associative because in (a ⊕ b) ⊕ c and in
    a ⊕ (b ⊕ c) alike: with c_d = 1 both are c; with c_d = 0, b_d = 1 both are b ⊕ c, as b ⊕ c keeps
    b's flag; and with neither set both compose three affine maps, keeping a's flag.

    Five steps with A = 1/2, drives 8 4 2 6 1 and a reset at the fourth:

        step      1     2     3     4     5
        reset     0     0     0     1     0
        state     8     8     6     6     4      (8/2 + 4 = 8, 8/2 + 2 = 6, reset: 6, 6/2 + 1 = 4)
    """
    return ResetElement(
        jnp.where(b.reset, b.transition, b.transition * a.transition),
        jnp.where(b.reset, b.drive, b.transition * a.drive + b.drive),
        a.reset | b.reset,
    )


# The fast path. A reset only multiplies the transition by zero, so no third element is carried:
#
#     x_t = keep_t Lambda_bar x_{t-1} + B_bar u_t,      keep_t = 1 - start_t
#
# A complex vector of P states travels packed, as 2P floats: the real parts, then the imaginary parts.
# So B_bar u and Re(C x) are single real matrix products.


def complex_to_packed(z: Array) -> Array:
    """complex (..., P) -> float (..., 2P)."""
    return jnp.concatenate([z.real, z.imag], axis=-1)


def packed_to_complex(x: Array) -> Array:
    """float (..., 2P) -> complex (..., P)."""
    return lax.complex(*jnp.split(x, 2, axis=-1))


def recurrence_step(Lambda_bar: Array, x: Array, drive: Array, keep: Array) -> Array:
    """keep Lambda_bar x + drive. Lambda_bar (2P,), x and drive (B, 2P), keep (B,). Returns (B, 2P).

    The drive is added within each half because XLA's CPU back end then fuses the step into one loop.
    """
    P = Lambda_bar.shape[-1] // 2
    a_re, a_im = Lambda_bar[:P], Lambda_bar[P:]
    x_re, x_im = keep[:, None] * x[:, :P], keep[:, None] * x[:, P:]
    real, imag = a_re * x_re - a_im * x_im + drive[:, :P], a_re * x_im + a_im * x_re + drive[:, P:]
    return jnp.concatenate([real, imag], axis=-1)


def _scan_sequential(reverse, Lambda_bar, drive, keep, carry):
    def body(x, drive_and_keep):
        x = recurrence_step(Lambda_bar, x, *drive_and_keep)
        return x, x

    return lax.scan(body, carry, (drive, keep), reverse=reverse)[1]


def _scan_parallel(reverse, Lambda_bar, drive, keep, carry):
    def compose(a, b):
        return b[0] * a[0], b[0] * a[1] + b[1]

    transition, drive = keep[..., None] * packed_to_complex(Lambda_bar), packed_to_complex(drive)  # (T, B, P)
    first = -1 if reverse else 0
    drive = drive.at[first].add(transition[first] * packed_to_complex(carry))
    return complex_to_packed(lax.associative_scan(compose, (transition, drive), reverse=reverse)[1])


def _scan(*operands, reverse=False):
    """The recurrence in the form that suits the platform it is lowered for.

    A loop over time costs a CPU about 2 microseconds a step, less than one pass of a parallel scan; on
    an accelerator every iteration is a kernel launch, so there it is log2(T) parallel passes.
    """
    sequential, parallel = partial(_scan_sequential, reverse), partial(_scan_parallel, reverse)
    return lax.platform_dependent(*operands, cpu=sequential, default=parallel)


@jax.custom_vjp
def linear_recurrence(Lambda_bar: Array, drive: Array, keep: Array, carry: Array) -> Array:
    """All states of x_t = keep_t Lambda_bar x_{t-1} + drive_t, equal to a scan with ``reset_operator``.

    Lambda_bar: float (2P,); drive: float (T, B, 2P); keep: float (T, B), 0 where an episode opens, else
    1, not differentiated; carry: the state before step 0, float (B, 2P). Returns float (T, B, 2P).
    """
    return _scan(Lambda_bar, drive, keep, carry)


def _recurrence_forward(*operands):
    states = _scan(*operands)
    return states, (operands, states)


def _recurrence_backward(residuals, cotangent):
    """The adjoint is the same recurrence, backwards in time, with the conjugate transition:

    l_t = g_t + keep_{t+1} conj(Lambda_bar) l_{t+1}
    d drive_t = l_t,   d carry = keep_0 conj(Lambda_bar) l_0
    d Lambda_bar = sum_t keep_t conj(x_{t-1}) l_t
    """
    (Lambda_bar, _, keep, carry), states = residuals
    P = Lambda_bar.shape[0] // 2
    conjugate = jnp.concatenate([Lambda_bar[:P], -Lambda_bar[P:]])
    next_keep = jnp.concatenate([keep[1:], jnp.zeros_like(keep[:1])])
    adjoint = _scan(conjugate, cotangent, next_keep, jnp.zeros_like(carry), reverse=True)

    previous = keep[..., None] * jnp.concatenate([carry[None], states[:-1]])
    x_re, x_im, l_re, l_im = previous[..., :P], previous[..., P:], adjoint[..., :P], adjoint[..., P:]
    d_real, d_imag = jnp.sum(x_re * l_re + x_im * l_im, (0, 1)), jnp.sum(x_re * l_im - x_im * l_re, (0, 1))
    d_carry = recurrence_step(conjugate, adjoint[0], jnp.zeros_like(carry), keep[0])
    return jnp.concatenate([d_real, d_imag]), adjoint, jnp.zeros_like(keep), d_carry


linear_recurrence.defvjp(_recurrence_forward, _recurrence_backward)


# ----------------------------------------------------------------------------------------------
# Part 2: the memories that S5 is compared with
#
# Every memory, S5 included, is called in the same way; where start is 1 it is zeroed before it reads.
#   initial_carry(batch)           -> carry       every leaf has the environments B first
#   kernels()                      -> kernels     what step can reuse while the parameters stay as they are
#   scan(carry, x, start)          -> carry, y    learning: x and y (T, B, H), start float (T, B)
#   step(kernels, carry, x, start) -> carry, y    acting:   x and y (B, H),    start float (B,)
# ----------------------------------------------------------------------------------------------


class Memory(nn.Module):
    """Base of the memories that have nothing to prepare for ``step``."""

    width: int

    def kernels(self) -> tuple:
        return ()


class Memoryless(Memory):
    """One dense layer in the place of the memory: the paper's MLP ("FC") baseline. It has no carry."""

    def setup(self):
        self.dense = nn.Dense(self.width)

    def initial_carry(self, batch: int) -> tuple:
        return ()

    def scan(self, carry: tuple, x: Array, start: Array) -> tuple[tuple, Array]:
        return carry, nn.leaky_relu(self.dense(x))

    def step(self, kernels: tuple, carry: tuple, x: Array, start: Array) -> tuple[tuple, Array]:
        return self.scan(carry, x, start)


class GRU(Memory):
    """flax's GRU cell. The carry is the hidden state, float (B, H)."""

    def setup(self):
        self.cell = nn.GRUCell(self.width)

    def initial_carry(self, batch: int) -> Array:
        return jnp.zeros((batch, self.width))

    def scan(self, carry: Array, x: Array, start: Array) -> tuple[Array, Array]:
        def body(gru, hidden, inputs):
            return gru.step((), hidden, *inputs)

        return nn.scan(body, variable_broadcast="params", split_rngs={"params": False})(self, carry, (x, start))

    def step(self, kernels: tuple, carry: Array, x: Array, start: Array) -> tuple[Array, Array]:
        return self.cell(carry * (1.0 - start)[:, None], x)


class AttentionCarry(NamedTuple):
    """The last W steps: keys and values of each layer, float (B, W, H), oldest first; ``length`` int32 (B,)
    says how many of them, the newest, belong to the running episode."""

    cache: tuple[tuple[Array, Array], ...]
    length: Array


class Attention(Memory):
    """Pre-norm transformer: causal self-attention over the last ``window`` steps of the episode, this one included.

    Positions are rotary (Su et al. 2021).
    """

    layers: int
    window: int
    heads: int = 4

    def setup(self):
        self.qkv, self.mix, self.up, self.down = (
            [nn.Dense(size * self.width) for _ in range(self.layers)] for size in (3, 1, 2, 1)
        )
        self.norms = [nn.LayerNorm() for _ in range(2 * self.layers)]

    def initial_carry(self, batch: int) -> AttentionCarry:
        empty = jnp.zeros((batch, self.window, self.width))
        return AttentionCarry(((empty, empty),) * self.layers, jnp.zeros(batch, jnp.int32))

    def rotate(self, x: Array, position: Array) -> Array:
        """x (B, L, H) split in heads (B, L, heads, .), its feature pairs turned in proportion to position (L,)."""
        a, b = jnp.split(x.reshape(*x.shape[:2], self.heads, -1), 2, axis=-1)
        pairs = a.shape[-1]
        angle = position[:, None, None] * 10_000.0 ** (-jnp.arange(pairs) / pairs)
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)

    def scan(self, carry: AttentionCarry, x: Array, start: Array) -> tuple[AttentionCarry, Array]:
        x, start = jnp.swapaxes(x, 0, 1), jnp.swapaxes(start, 0, 1)  # (B, T, H), (B, T)
        B, T, W = *start.shape, self.window
        line = jnp.arange(W + T)  # the time line: first the cache, then the sequence
        time = line[W:]
        opened = lax.cummax(jnp.where(start > 0, time, W - carry.length[:, None]), axis=1)  # where its episode began
        age = time[:, None] - line
        mask = (age >= 0) & (age < W) & (line >= opened[..., None])  # (B, T, W + T)
        cache = []
        for i, (old_keys, old_values) in enumerate(carry.cache):
            q, k, v = jnp.split(self.qkv[i](self.norms[2 * i](x)), 3, axis=-1)
            k, v = jnp.concatenate([old_keys, k], axis=1), jnp.concatenate([old_values, v], axis=1)
            cache.append((k[:, T:], v[:, T:]))
            q, k, v = self.rotate(q, time), self.rotate(k, line), v.reshape(B, W + T, self.heads, -1)
            y = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])
            x = x + self.mix[i](y.reshape(x.shape))
            x = x + self.down[i](nn.gelu(self.up[i](self.norms[2 * i + 1](x))))
        return AttentionCarry(tuple(cache), jnp.minimum(W + T - opened[:, -1], W)), jnp.swapaxes(x, 0, 1)

    def step(self, kernels: tuple, carry: AttentionCarry, x: Array, start: Array) -> tuple[AttentionCarry, Array]:
        carry, y = self.scan(carry, x[None], start[None])
        return carry, y[0]


# ----------------------------------------------------------------------------------------------
# Part 3: run plumbing
# ----------------------------------------------------------------------------------------------


class UsageError(ValueError):
    """Bad input. The message names the flag, its value and what is allowed."""


def run_main(main: Callable[[], int]) -> int:
    """Exit code of a script's ``main``; bad input is one line on stderr and 2."""
    try:
        return main()
    except (UsageError, FloatingPointError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


def parse_args(args_class: type, presets: dict[str, dict[str, Any]], argv: Sequence[str] | None = None) -> Any:
    """The command line as an ``args_class``: a preset's values, then the explicit flags, which win.

    With --resume or --eval the flags of that run come first, and a flag that contradicts them is
    refused (eval_ flags excepted). Raises UsageError.
    """
    argv = sys.argv[1:] if argv is None else argv
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--preset", "--resume", "--eval"):
        early.add_argument(flag, nargs="?")
    chosen = early.parse_known_args(argv)[0]
    run_dir = chosen.resume or chosen.eval
    default = load_args(args_class, Path(run_dir)) if run_dir else args_class(**presets.get(chosen.preset, {}))
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output):
            args = tyro.cli(args_class, args=argv, default=default)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        lines = [line.strip("│╰╯─ ") for line in output.getvalue().splitlines() if not line.startswith("╭")]
        raise UsageError(" ".join(lines).split("For full helptext")[0]) from None
    if run_dir:
        for name, stored in vars(default).items():
            if getattr(args, name) != stored and name != "resume" and not name.startswith("eval"):
                flag = f"--{name.replace('_', '-')} {getattr(args, name)}"
                raise UsageError(f"{flag}: the run in {run_dir} was made with {stored}")
    args.check()
    return args


def load_args(args_class: type, run_dir: Path) -> Any:
    """The flags that a run was made with, from its args.json. Raises UsageError."""
    try:
        stored = json.loads((run_dir / "args.json").read_text())["args"]
        return args_class(**{name: tuple(v) if isinstance(v, list) else v for name, v in stored.items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{run_dir}: not a run directory of this script ({error})") from None


def join_cluster() -> None:
    """jax.distributed from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or as the cluster says."""
    jax.extend.backend.clear_backends()  # importing gymnax has started one
    count, index = os.environ.get("JAX_NUM_PROCESSES"), os.environ.get("JAX_PROCESS_ID")
    jax.distributed.initialize(num_processes=count and int(count), process_id=index and int(index))


def provenance() -> dict[str, Any]:
    """What a run is made with: git commit, device, package versions."""
    git, packages = "", ("jax", "jaxlib", "flax", "optax", "gymnax", "numpy", "orbax-checkpoint")
    with contextlib.suppress(OSError):
        command = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty", "--abbrev=12"]
        git = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}
    return {"git_commit": git, "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}", "versions": versions}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(content, indent=2) + "\n")
    draft.replace(path)


class RunDirectory:
    """One run on disk: args.json, metrics.csv, TensorBoard events, checkpoints, picture and summary.

    metrics.csv holds nothing that depends on the clock, so a resumed run's file equals that of a run
    that never stopped. Of a distributed run only the first process writes the logs.
    """

    def __init__(self, path: Path, args: Any):
        self.path, self.rows = path, []
        self.args = {k: v for k, v in json.loads(json.dumps(vars(args))).items() if k not in ("resume", "eval")}
        self.writes, self.tracker = jax.process_index() == 0, None
        if args.track:
            try:
                import wandb
            except ImportError:
                raise UsageError("--track True: needs Weights & Biases (pip install wandb)") from None
        opened = args.resume or args.eval
        if path.exists() and not opened:
            raise UsageError(f"--run-dir {path}: exists; continue it with --resume {path} or choose another")
        if self.writes and not opened:
            draft = path.with_name(path.name + ".tmp")  # becomes the run directory once args.json is in it
            draft.mkdir(parents=True)
            write_json(draft / "args.json", {"args": self.args} | provenance())
            draft.rename(path)
        if self.writes and args.track:
            self.tracker = wandb.init(project="s5-in-context-rl", name=path.name, config=self.args, dir=path)
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        self.checkpoints = ocp.CheckpointManager((path / "checkpoints").resolve(), options=options)

    def save(self, update: int, state: Any, seconds: float) -> None:
        """Write a checkpoint. It counts only once it is whole, and the one before it stays."""
        about = ocp.args.JsonSave({"args": self.args, "seconds": seconds})
        self.checkpoints.save(update, args=ocp.args.Composite(state=ocp.args.StandardSave(state), about=about))

    def restore(self, like: Any) -> tuple[int, Any, float]:
        """The newest checkpoint: its update, its state, seconds run; (0, like, 0) if the run had not begun.

        like: a state with the shapes, dtypes and placement that are wanted. Raises UsageError.
        """
        update = self.checkpoints.latest_step()
        if update is None:
            if (self.path / "metrics.csv").exists():
                raise UsageError(f"{self.path}: its checkpoints are missing")
            return 0, like, 0.0
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        items = ocp.args.Composite(state=ocp.args.StandardRestore(target), about=ocp.args.JsonRestore())
        try:
            found = self.checkpoints.restore(update, args=items)
        except Exception as error:  # orbax raises many kinds
            raise UsageError(f"{self.path}: checkpoint {update} is damaged or misplaced ({error!s:.200})") from None
        for name, value in self.args.items():
            if (then := found.about["args"].get(name)) != value and not name.startswith("eval"):
                raise UsageError(f"{self.path}: its checkpoint was made with {name} {then}, its args.json says {value}")
        return update, found.state, found.about["seconds"]

    def open_logs(self, columns: Sequence[str], update: int) -> None:
        """Open metrics.csv and TensorBoard, dropping what was logged after ``update``."""
        path = self.path / "metrics.csv"
        if update:
            with path.open(newline="") as file:
                self.rows = [row for row in csv.DictReader(file) if int(row["update"]) <= update]
        if self.writes:
            self.file = path.with_suffix(".tmp").open("w", newline="")
            self.csv = csv.DictWriter(self.file, columns)
            self.csv.writeheader()
            self.csv.writerows(self.rows)
            self.file.flush()
            path.with_suffix(".tmp").replace(path)
            self.tensorboard = SummaryWriter(str(self.path), purge_step=update + 1 if update else None)

    def log(self, row: dict[str, Any], **clock: float) -> None:
        """Append a row to metrics.csv, a NaN (a mean over no episode) as an empty field; TensorBoard gets ``clock`` too.

        Raises FloatingPointError if a loss or the gradient is not finite; the last checkpoint is from before that.
        """
        for name in row:
            if (name.endswith("_loss") or name == "grad_norm") and not math.isfinite(row[name]):
                where = f"{name} is {row[name]} at update {row['update']}, seed {row['seed']}"
                raise FloatingPointError(f"{where}; the last good checkpoint is in {self.path}")
        row = {name: None if math.isnan(value) else value for name, value in row.items()}
        self.rows.append(row)
        if self.writes:
            self.csv.writerow(row)
            self.file.flush()
            scalars = {f"seed{row['seed']}/{k}": v for k, v in (row | clock).items() if v is not None}
            for name, value in scalars.items():
                self.tensorboard.add_scalar(name, value, row["update"])
            if self.tracker:
                self.tracker.log(scalars, step=row["update"])

    def returns(self, seed: int) -> list[float]:
        """The mean returns logged so far for a seed."""
        own = (row["return_mean"] for row in self.rows if int(row["seed"]) == seed)
        return [float(value) for value in own if value not in (None, "")]

    def finish(self, summary: dict[str, Any]) -> None:
        """Write learning_curve.png and summary.json."""
        if self.writes:
            plot_learning_curves({self.path.name: self.rows}, self.path / "learning_curve.png")
            write_json(self.path / "summary.json", summary)


def plot_learning_curves(runs: dict[str, list[dict[str, Any]]], picture: Path) -> None:
    """Mean episodic return against environment steps; rows of metrics.csv for each run, a line for each seed."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for label, rows in runs.items():
        for seed in sorted({int(row["seed"]) for row in rows}):
            points = [row for row in rows if int(row["seed"]) == seed and row["return_mean"] not in (None, "")]
            steps, returns = [int(p["env_steps"]) for p in points], [float(p["return_mean"]) for p in points]
            axes.plot(steps, returns, linewidth=1, label=f"{label}, seed {seed}")
    axes.set(xlabel="environment steps", ylabel="mean episodic return")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(picture, dpi=150)


@contextlib.contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Collects the first SIGINT or SIGTERM for the training loop to read; a second one acts as usual."""
    received: list[int] = []

    def receive(number, frame):
        received.append(number)
        signal.signal(number, previous[number])

    previous = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    yield received
    for number, handler in previous.items():
        signal.signal(number, handler)


class ProgressLine:
    """A live tqdm bar on a terminal, elsewhere one plain line every few seconds."""

    def __init__(self, total: int, done: int, every_seconds: float = 5.0):
        self.every, self.printed = every_seconds, 0.0
        self.bar = tqdm(total=total, initial=done, unit=" steps", unit_scale=True, disable=not sys.stderr.isatty())

    def show(self, steps: int, steps_per_second: float, returns: Sequence[float]) -> None:
        total = self.bar.total
        text = f"return {returns[-1]:.3f} best {max(returns):.3f}" if returns else "no episode has ended yet"
        if not self.bar.disable:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(steps - self.bar.n)
        elif time.monotonic() - self.printed > self.every or steps == total:
            self.printed = time.monotonic()
            eta = (total - steps) / max(steps_per_second, 1e-9)
            print(f"{steps:,} of {total:,} steps  {steps_per_second:,.0f}/s  {text}  ETA {eta:.0f} s", flush=True)
