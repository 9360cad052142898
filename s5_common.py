"""What the three scripts share and a reader may trust unread: state-space numerics, the memories that S5 is compared
with, run plumbing. Shapes: T time, B environments, H model width, P complex states; time comes first, (T, B, ...)."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
import tyro
from jax import Array, lax
from jax.experimental import multihost_utils
from matplotlib.figure import Figure
from tensorboardX import SummaryWriter
from tqdm import tqdm


# ---- 1. State-space numerics ----------------------------------------------------------------------------------------
def dplr_hippo(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues and eigenvectors of the normal part of HiPPO-LegS. Gu et al. 2020, 2022; Smith et al. 2023, B.1.

    With p_i = sqrt(i + 1/2), HiPPO-LegS is A_ij = -2 p_i p_j for i > j, -(i + 1) for i = j, else 0. A = S - p p^T, and
    S + I/2 is skew-symmetric, so S = V diag(Lambda) V^H with Re(Lambda) = -1/2 and unitary V. Eigenvalues come in
    conjugate pairs; the half with positive imaginary part is returned, since 2 Re(.) restores the other.
    n: real states, even. Returns Lambda complex128 (n/2,), V complex128 (n, n/2).
    """
    p = np.sqrt(np.arange(n) + 0.5)
    skew = np.triu(np.outer(p, p), 1) - np.tril(np.outer(p, p), -1)
    frequency, vectors = np.linalg.eigh(-1j * skew)
    return -0.5 + 1j * frequency[n // 2 :], vectors[:, n // 2 :]


def discretize_zoh(Lambda: Array, B_tilde: Array, step: Array) -> tuple[Array, Array]:
    """Zero-order hold: Lambda_bar = exp(Lambda step), B_bar = Lambda^-1 (Lambda_bar - I) B_tilde. Smith et al. 2023, 2.

    Lambda: complex (P,); B_tilde: complex (P, H); step: float (P,). Returns Lambda_bar (P,), B_bar (P, H).
    """
    Lambda_bar = jnp.exp(Lambda * step)
    return Lambda_bar, ((Lambda_bar - 1) / Lambda)[:, None] * B_tilde


def reset_operator(a: tuple[Array, Array, Array], b: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    """The resettable operator a ⊕ b, a earlier than b. Lu et al. 2023, section 3.1 and appendix A.

        a ⊕ b = (b_A a_A, b_A a_u + b_u, a_d)   if b_d = 0
        a ⊕ b = b                               if b_d = 1

    An element (A, u, d) is what a stretch of steps does to the state, x -> A x + u, and whether it holds a reset; for
    one step it is e_k = (A_bar, B_bar u_k, d_k), complex (..., P) twice and bool (..., 1). A reset forgets what came
    before, so b alone is the answer where b holds one. Associative, as (a ⊕ b) ⊕ c and a ⊕ (b ⊕ c) agree: if c_d = 1
    both are c; else if b_d = 1 both are b ⊕ c, which keeps b's flag; else both compose three maps and keep a's flag.

    Five steps with A = 1/2 from state 0:   drive   8   4   2   6   1
                                            reset   0   0   0   1   0
                                            state   8   8   6   6   4    (8/2 + 4, 8/2 + 2, 6 alone, 6/2 + 1)
    """
    (a_A, a_u, a_d), (b_A, b_u, b_d) = a, b
    return jnp.where(b_d, b_A, b_A * a_A), jnp.where(b_d, b_u, b_A * a_u + b_u), a_d | b_d


# The fast path. A reset only multiplies the transition by zero, so no third element is carried:
#     x_t = keep_t Lambda_bar x_{t-1} + B_bar u_t,      keep_t = 1 - start_t
# A complex vector of P states travels packed, as 2P floats, the real parts and then the imaginary parts, so that
# B_bar u and Re(C x) are single real matrix products.
def complex_to_packed(z: Array) -> Array:
    """complex (..., P) -> float (..., 2P)."""
    return jnp.concatenate([z.real, z.imag], axis=-1)


def packed_to_complex(x: Array) -> Array:
    """float (..., 2P) -> complex (..., P)."""
    return lax.complex(*jnp.split(x, 2, axis=-1))


def recurrence_step(Lambda_bar: Array, x: Array, drive: Array, keep: Array) -> Array:
    """keep Lambda_bar x + drive. Lambda_bar (2P,), x and drive (B, 2P), keep (B,). Returns (B, 2P).
    The drive is added within each half because XLA's CPU back end then fuses the step into one loop."""
    P = Lambda_bar.shape[-1] // 2
    a_re, a_im = Lambda_bar[:P], Lambda_bar[P:]
    x_re, x_im = keep[:, None] * x[:, :P], keep[:, None] * x[:, P:]
    real, imag = a_re * x_re - a_im * x_im + drive[:, :P], a_re * x_im + a_im * x_re + drive[:, P:]
    return jnp.concatenate([real, imag], axis=-1)


def _scan_sequential(reverse, Lambda_bar, drive, keep, carry):
    step = partial(recurrence_step, Lambda_bar)
    return lax.scan(lambda x, inputs: (step(x, *inputs),) * 2, carry, (drive, keep), reverse=reverse)[1]


def _scan_parallel(reverse, Lambda_bar, drive, keep, carry):
    def compose(a, b):
        return b[0] * a[0], b[0] * a[1] + b[1]

    transition, drive = keep[..., None] * packed_to_complex(Lambda_bar), packed_to_complex(drive)  # (T, B, P)
    drive = drive.at[-reverse].add(transition[-reverse] * packed_to_complex(carry))  # into the first step
    return complex_to_packed(lax.associative_scan(compose, (transition, drive), reverse=reverse)[1])


def _scan(*operands, reverse=False):
    """The recurrence in the form that suits the platform it is lowered for.
    A loop over time costs a CPU about 2 microseconds a step, less than one pass of a parallel scan; on an accelerator
    every iteration is a kernel launch, so there it is log2(T) parallel passes."""
    sequential, parallel = partial(_scan_sequential, reverse), partial(_scan_parallel, reverse)
    return lax.platform_dependent(*operands, cpu=sequential, default=parallel)


@jax.custom_vjp
def linear_recurrence(Lambda_bar: Array, drive: Array, keep: Array, carry: Array) -> Array:
    """All states of x_t = keep_t Lambda_bar x_{t-1} + drive_t, equal to a scan with ``reset_operator``.

    Lambda_bar: float (2P,); drive: float (T, B, 2P); keep: float (T, B), 0 where an episode opens, else
    1, not differentiated; carry: the state before step 0, float (B, 2P). Returns float (T, B, 2P).
    """
    return _scan(Lambda_bar, drive, keep, carry)


def _recurrence_backward(residuals, cotangent):
    """The adjoint is the same recurrence, backwards in time, with the conjugate transition:

    l_t = g_t + keep_{t+1} conj(Lambda_bar) l_{t+1}
    d drive_t = l_t,   d carry = keep_0 conj(Lambda_bar) l_0,   d Lambda_bar = sum_t keep_t conj(x_{t-1}) l_t
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


linear_recurrence.defvjp(lambda *operands: (states := _scan(*operands), (operands, states)), _recurrence_backward)


# ---- 2. The memories that S5 is compared with -----------------------------------------------------------------------
# All memories, S5 included, are called in the same way. Where start is 1 the memory is zeroed before it reads.
#   initial_carry(batch)           -> carry       the environments B lead every leaf
#   kernels()                      -> kernels     what step can reuse for as long as the parameters stay as they are
#   scan(carry, x, start)          -> carry, y    learning: x and y (T, B, H), start float (T, B)
#   step(kernels, carry, x, start) -> carry, y    acting:   x and y (B, H),    start float (B,)
class Memory(nn.Module):
    """Base of the memories that prepare nothing for ``step``, which here is a sequence of one."""

    width: int  # H

    def kernels(self) -> tuple:
        return ()

    def step(self, kernels: tuple, carry: Any, x: Array, start: Array) -> tuple[Any, Array]:
        carry, y = self.scan(carry, x[None], start[None])
        return carry, y[0]


class Memoryless(Memory):
    """One dense layer in the place of the memory: the paper's MLP ("FC") baseline. It has no carry."""

    def initial_carry(self, batch: int) -> tuple:
        return ()

    @nn.compact
    def scan(self, carry: tuple, x: Array, start: Array) -> tuple[tuple, Array]:
        return carry, nn.leaky_relu(nn.Dense(self.width, name="dense")(x))


class Recurrent(Memory):
    """A recurrent cell of flax, GRU or LSTM. The carry is the cell's: float (B, H), for the LSTM two of them."""

    cell_class: type[nn.RNNCellBase]

    def setup(self):
        self.cell = self.cell_class(self.width)

    def initial_carry(self, batch: int) -> Any:
        return self.cell_class(self.width, parent=None).initialize_carry(jax.random.key(0), (batch, self.width))

    def scan(self, carry: Any, x: Array, start: Array) -> tuple[Any, Array]:
        options = {"variable_broadcast": "params", "split_rngs": {"params": False}}
        return nn.scan(lambda memory, c, xs: memory.step((), c, *xs), **options)(self, carry, (x, start))

    def step(self, kernels: tuple, carry: Any, x: Array, start: Array) -> tuple[Any, Array]:
        return self.cell(jax.tree.map(lambda c: c * (1.0 - start)[:, None], carry), x)


class Attention(Memory):
    """Pre-norm transformer, rotary positions (Su et al. 2021). A step attends to the last W of its episode, itself too.

    Carry (cache, length): for each layer keys and values of the last W steps, float (B, W, H), oldest first; how many,
    the newest, belong to the running episode, int32 (B,).
    """

    layers: int
    window: int
    heads: int = 4

    def setup(self):
        dense = ([nn.Dense(size * self.width) for _ in range(self.layers)] for size in (3, 1, 2, 1))
        self.qkv, self.mix, self.up, self.down = dense
        self.norms = [nn.LayerNorm() for _ in range(2 * self.layers)]

    def initial_carry(self, batch: int) -> tuple:
        empty = jnp.zeros((batch, self.window, self.width))
        return ((empty, empty),) * self.layers, jnp.zeros(batch, jnp.int32)

    def rotate(self, x: Array, position: Array) -> Array:
        """x (B, L, H) split in heads (B, L, heads, .), its feature pairs turned in proportion to position (L,)."""
        a, b = jnp.split(x.reshape(*x.shape[:2], self.heads, -1), 2, axis=-1)
        pairs = a.shape[-1]
        cos, sin = (f(position[:, None, None] * 10_000.0 ** (-jnp.arange(pairs) / pairs)) for f in (jnp.cos, jnp.sin))
        return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)

    def scan(self, carry: tuple, x: Array, start: Array) -> tuple[tuple, Array]:
        x, start = jnp.swapaxes(x, 0, 1), jnp.swapaxes(start, 0, 1)  # (B, T, H), (B, T)
        (old_cache, length), B, T, W = carry, *start.shape, self.window
        line, time, cache = jnp.arange(W + T), jnp.arange(W, W + T), []  # the time line: the cache, then the sequence
        opened = lax.cummax(jnp.where(start > 0, time, W - length[:, None]), axis=1)  # where its episode began
        age = time[:, None] - line
        mask = (age >= 0) & (age < W) & (line >= opened[..., None])  # (B, T, W + T)
        for i, (old_keys, old_values) in enumerate(old_cache):
            q, k, v = jnp.split(self.qkv[i](self.norms[2 * i](x)), 3, axis=-1)
            k, v = jnp.concatenate([old_keys, k], axis=1), jnp.concatenate([old_values, v], axis=1)
            cache.append((k[:, T:], v[:, T:]))
            q, k, v = self.rotate(q, time), self.rotate(k, line), v.reshape(B, W + T, self.heads, -1)
            y = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])
            x = x + self.mix[i](y.reshape(x.shape))
            x = x + self.down[i](nn.gelu(self.up[i](self.norms[2 * i + 1](x))))
        return (tuple(cache), jnp.minimum(W + T - opened[:, -1], W)), jnp.swapaxes(x, 0, 1)


# ---- 3. Run plumbing ------------------------------------------------------------------------------------------------
class UsageError(ValueError):
    """Bad input. The message names the flag, its value and what is allowed."""


def run_main(main: Callable[[], int]) -> int:
    """Exit code of a script's ``main``; bad input is one line on stderr and 2."""
    try:
        return main()
    except (UsageError, OSError, FloatingPointError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError) else 2


def parse_args(args_class: type, presets: dict[str, dict[str, Any]], argv: Sequence[str] | None = None) -> Any:
    """The command line as an ``args_class``: a preset's values, then the explicit flags, which win.
    With --resume or --eval that run's flags come first; UsageError where a flag, eval_ ones excepted, contradicts."""

    def parse(default):
        output = io.StringIO()
        try:
            with contextlib.redirect_stderr(output):
                return tyro.cli(args_class, args=argv, default=default)
        except SystemExit as stop:
            if not stop.code:  # --help
                raise
            lines = [line.strip("│╰╯─ ") for line in output.getvalue().splitlines() if not line.startswith("╭")]
            raise UsageError(" ".join(lines).split("For full helptext")[0]) from None

    first = parse(args_class())
    if not (run_dir := first.resume or first.eval):
        args = parse(args_class(**presets[first.preset]))
    else:
        try:
            stored = json.loads((Path(run_dir) / "args.json").read_text())["args"]
            default = args_class(**{name: tuple(v) if isinstance(v, list) else v for name, v in stored.items()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{run_dir}: not a run directory of this script ({error})") from None
        args = parse(default)
        for name, then in vars(default).items():
            if (now := getattr(args, name)) != then and name != "resume" and not name.startswith("eval"):
                raise UsageError(f"--{name.replace('_', '-')} {now}: the run in {run_dir} was made with {then}")
    args.check()
    return args


def check_args(args: Any, zero: Collection[str], at_most: dict[str, float]) -> None:
    """UsageError for a number that is not above 0 (or is not 0, where ``zero`` has it) or is above its ``at_most``."""
    for name, value in vars(args).items():
        low, high = 0 if name in zero else 1e-12, at_most.get(name, 2**31 - 1 if name == "seed" else 1e12)
        for number in value if isinstance(value, tuple) else [value]:
            if type(number) in (int, float) and not low <= number <= high:
                bound = f"{'above' if low else 'at least'} 0 and at most {high:g}"
                raise UsageError(f"--{name.replace('_', '-')} {number}: must be {bound}")
    if args.s5_dt_min > args.s5_dt_max:
        raise UsageError(f"--s5-dt-min {args.s5_dt_min}: must be at most --s5-dt-max {args.s5_dt_max}")
    if args.arch == "attention" and args.s5_width % 8:
        raise UsageError(f"--s5-width {args.s5_width}: must be a multiple of 8 with --arch attention")
    if args.distributed and not (args.run_dir or args.resume or args.eval):
        raise UsageError("--distributed True: needs a --run-dir that all processes share")


def join_cluster() -> None:
    """jax.distributed from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or as the cluster says."""
    jax.extend.backend.clear_backends()  # importing gymnax has started one
    count, index = (int(os.environ[n]) if n in os.environ else None for n in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
    jax.distributed.initialize(num_processes=count, process_id=index)


def provenance() -> dict[str, Any]:
    """What a run is made with: git commit, device, package versions."""
    git, packages = "", ("jax", "jaxlib", "flax", "optax", "gymnax", "numpy", "orbax-checkpoint")
    with contextlib.suppress(OSError):
        command = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty", "--abbrev=12"]
        git = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    versions = {"python": sys.version.split()[0]} | {name: version(name) for name in packages}
    return {"git_commit": git, "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}", "versions": versions}


def stored(state: Any) -> dict[str, Array]:
    """What a checkpoint holds: the arrays by name. orbax refuses those without elements, which simulators have."""
    named = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in named if x.size}


class RunDirectory:
    """A run on disk: args.json, metrics.csv, TensorBoard events, checkpoints, picture, summary; and its progress line.

    A resumed run's metrics.csv equals that of a run that never stopped. Of a distributed run the first process logs.
    ``with run:`` collects SIGINT and SIGTERM in ``stop`` for the training loop to read; the second stops at once."""

    def __init__(self, args: Any, env: str, script: str):
        stamp = f"{env}__{script}__{args.arch}__s{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
        self.path = path = Path(args.resume or args.eval or args.run_dir or f"runs/{stamp}")
        self.about = {"script": script, "env": env, "arch": args.arch, "preset": args.preset}
        self.rows: list[dict[str, Any]] = []
        self.stop: list[int] = []
        self.done, self.seconds, self.steps_per_second, self.writes = 0, 0.0, math.nan, jax.process_index() == 0
        self.args = {k: v for k, v in json.loads(json.dumps(vars(args))).items() if k not in ("resume", "eval")}
        self.seeds, self.evaluates = range(args.seed, args.seed + args.num_seeds), bool(args.eval)
        if args.track and not find_spec("wandb"):
            raise UsageError("--track True: needs Weights & Biases (pip install wandb)")
        creates = self.writes and not (args.resume or args.eval)
        if creates and (path.exists() or any(parent.is_file() for parent in path.parents)):
            raise UsageError(f"--run-dir {path}: exists or is in a file; go on with --resume {path} or choose another")
        if creates:
            draft = path.with_name(path.name + ".tmp")  # becomes the run directory when its files are in it
            (draft / "checkpoints").mkdir(parents=True, exist_ok=True)
            (draft / "args.json").write_text(json.dumps({"args": self.args} | provenance(), indent=2))
            draft.rename(path)
        if self.writes and args.track:
            options = {"name": path.name, "config": self.args, "dir": path, "sync_tensorboard": True}
            import_module("wandb").init(project="s5-in-context-rl", **options)
        multihost_utils.sync_global_devices("run directory")
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False, create=False)
        self.checkpoints = ocp.CheckpointManager((path / "checkpoints").resolve(), options=options)

    def __enter__(self) -> RunDirectory:
        def receive(number, frame):
            self.stop.append(number)
            if len(self.stop) > 1:
                raise SystemExit(128 + number)

        self.handlers = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def save(self, state: Any) -> None:
        """Write a checkpoint. It counts only once it is whole, and the one before it stays."""
        about = {"args": self.args, "seconds": self.seconds + time.perf_counter() - self.began}
        items = {"state": ocp.args.StandardSave(stored(state)), "about": ocp.args.JsonSave(about)}
        self.checkpoints.save(self.done, args=ocp.args.Composite(**items))

    def restore(self, like: Any) -> Any:
        """The newest checkpoint's state; in a new run ``like``, of its shapes. Starts the clock. Raises UsageError."""
        update, self.began = self.checkpoints.latest_step(), time.perf_counter()
        if update is None:
            if (self.path / "metrics.csv").exists() or not (self.path / "checkpoints").exists():
                raise UsageError(f"{self.path}: its checkpoints are missing")
            if not self.evaluates:
                self.save(like)
            return like
        target = {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for k, x in stored(like).items()}
        state = (self.path / f"checkpoints/{update}/state").resolve()
        try:  # orbax reads all at once, and where several fail litters stderr with tracebacks; so one by one first
            _ = [json.loads(file.read_text()) for file in state.glob("array_metadatas/*")]
            files = ts.KvStore.open({"driver": "ocdbt", "base": {"driver": "file", "path": f"{state}/"}}).result()
            for name in files.list().result():
                files.read(name).result()
            items = ocp.args.Composite(state=ocp.args.StandardRestore(target), about=ocp.args.JsonRestore())
            found = self.checkpoints.restore(update, args=items)
        except Exception as error:  # orbax raises many kinds
            raise UsageError(f"{self.path}: checkpoint {update} is damaged or misplaced ({error!s:.200})") from None
        for name, value in self.args.items():
            if (then := found.about["args"].get(name, value)) != value and not name.startswith("eval"):
                raise UsageError(f"{self.path}: its checkpoint was made with {name} {then}, its args.json says {value}")
        with contextlib.suppress(FileNotFoundError), (self.path / "metrics.csv").open(newline="") as file:
            self.rows = [row for row in csv.DictReader(file) if int(row["update"]) <= update]
        self.done, self.seconds = update, found.about["seconds"]
        arrays = iter([found.state[name] for name in stored(like)])
        return jax.tree.map(lambda x: next(arrays) if x.size else x, like)

    def compiled(self, updates: int, steps: int) -> None:
        """The updates begin: how many in all, and environment steps of one agent in each."""
        self.updates, self.steps, self.first = updates, steps, self.done + 1
        self.compile_seconds, self.printed, self.counted_from = time.perf_counter() - self.began, 0.0, 0.0
        self.bar = tqdm(initial=self.done, total=updates, unit=" updates", disable=not sys.stderr.isatty())

    def update(self, state: Any, metrics: dict[str, Any]) -> None:
        """An update is done: log its metrics, arrays (S,), show progress, and save when due, at the end and on a stop.
        Raises FloatingPointError if a loss or the gradient is not finite; the newest checkpoint is from before it."""
        metrics, self.done, now = jax.tree.map(np.asarray, metrics), self.done + 1, time.perf_counter()
        steps, last = self.steps * len(self.seeds), self.done == self.updates
        self.counted_from = now if self.done == self.first else self.counted_from  # without compilation, first update
        self.steps_per_second = (self.done - self.first) * steps / (now - self.counted_from or math.nan)
        for s, seed in enumerate(self.seeds):
            row = {"update": self.done, "env_steps": self.done * self.steps, "seed": seed}
            self.log(row | {name: value[s].item() for name, value in metrics.items()})
        text, returns = f"{self.done * steps:,} steps, {self.steps_per_second:,.0f}/s, ", self.returns(self.seeds[0])
        text += f"return {returns[-1]:.3f}, best {max(returns):.3f}" if returns else "no episode has ended yet"
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update()
        if self.bar.disable and (now - self.printed > 5 and self.done > self.first or last):
            eta, self.printed = (self.updates - self.done) * steps / self.steps_per_second, now
            print(f"update {self.done} of {self.updates}: {text}, ETA {eta:.0f} s", flush=True)
        if last or self.stop or self.done % self.args["checkpoint_interval"] == 0:
            self.save(state)

    def log(self, row: dict[str, Any]) -> None:
        """Append a row to metrics.csv, where a NaN (a mean over no episode) is an empty field, and to TensorBoard."""
        for name in row:
            if not math.isfinite(row[name]) and (name.endswith("_loss") or name == "grad_norm"):
                where = f"update {row['update']}, seed {row['seed']}; the last good checkpoint is in {self.path}"
                raise FloatingPointError(f"{name} is not finite at {where}")
        self.rows.append({name: None if math.isnan(value) else value for name, value in row.items()})
        if not self.writes:
            return
        if not hasattr(self, "csv"):  # begin with the rows from before the restored checkpoint
            self.file = (self.path / "metrics.tmp").open("w", newline="")
            self.csv = csv.DictWriter(self.file, list(row))
            self.csv.writeheader()
            self.csv.writerows(self.rows[:-1])
            Path(self.file.name).replace(self.path / "metrics.csv")
            self.tensorboard = SummaryWriter(str(self.path), purge_step=row["update"] if self.rows[1:] else None)
        self.csv.writerow(self.rows[-1])
        self.file.flush()
        for name, value in (row | {"steps_per_second": self.steps_per_second}).items():
            if math.isfinite(value):
                self.tensorboard.add_scalar(f"seed{row['seed']}/{name}", value, row["update"])

    def returns(self, seed: int) -> list[float]:
        """The mean returns logged so far for a seed."""
        own = [row["return_mean"] for row in self.rows if int(row["seed"]) == seed]
        return [float(value) for value in own if value not in (None, "")]

    def finish(self, **measured: Any) -> dict[str, Any]:
        """Write learning_curve.png and summary.json, and return the latter. After a stop raises SystemExit instead."""
        if self.stop:
            print(f"stopped; go on with: python {self.about['script']}.py --resume {self.path}")
            raise SystemExit(128 + self.stop[0])
        returns = [own for own in map(self.returns, self.seeds) if own]  # without seeds of no episode yet
        summary = self.about | {"seeds": list(self.seeds), "env_steps": self.done * self.steps, "updates": self.done}
        summary |= {"compile_seconds": self.compile_seconds, "steps_per_second": self.steps_per_second}
        summary |= {"run_seconds": self.seconds + time.perf_counter() - self.began} | measured
        for name, values in {"final": [own[-1] for own in returns], "best": [max(own) for own in returns]}.items():
            summary |= {f"{name}_return": float(np.mean(values or math.nan)), f"{name}_returns": values}
        summary = {k: None if v != v else v for k, v in (summary | provenance()).items()}  # JSON has no NaN
        if self.writes:
            plot_learning_curves({self.path.name: self.rows}, self.path / "learning_curve.png")
            (self.path / "summary.json").write_text(json.dumps(summary, indent=2, allow_nan=False))
        print(f"best return {summary['best_return']!s:.6}, final {summary['final_return']!s:.6}: {self.path}")
        return summary


def plot_learning_curves(runs: dict[str, list[dict[str, Any]]], picture: Path) -> None:
    """Mean episodic return against environment steps, a line for each seed of each run (its rows of metrics.csv)."""
    axes = (figure := Figure(figsize=(7, 4), layout="constrained")).subplots()
    for label, rows in runs.items():
        for seed in sorted({int(row["seed"]) for row in rows}):
            own = [row for row in rows if int(row["seed"]) == seed and row["return_mean"] not in (None, "")]
            x, y = ([float(row[name]) for row in own] for name in ("env_steps", "return_mean"))
            axes.plot(x, y, linewidth=1, label=f"{label}, seed {seed}")
    axes.set(xlabel="environment steps", ylabel="mean episodic return")
    axes.legend(fontsize="small")
    figure.savefig(picture, dpi=150)
