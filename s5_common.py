"""What the three scripts share and a reader may trust unread.

State-space numerics, the memories that S5 is compared with, run plumbing. Shapes: T time, B
environments, H model width, P complex states; time comes first, (T, B, ...).
"""

from __future__ import annotations

import asyncio
import contextlib
import csv
import hashlib
import inspect
import io
import json
import logging
import math
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import field as field_with
from dataclasses import fields, make_dataclass, replace
from functools import partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tyro
from flax.linen.initializers import normal
from jax import Array, lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from matplotlib import rc_context
from matplotlib.animation import PillowWriter
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar
from tqdm import tqdm


# ---- 1. State-space numerics ---------------------------------------------------------------------
def dplr_hippo(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues and eigenvectors of the normal part of HiPPO-LegS.

    Gu et al. 2020, 2022; Smith et al. 2023, B.1.

    With p_i = sqrt(i + 1/2), HiPPO-LegS is A_ij = -2 p_i p_j for i > j, -(i + 1) for i = j, else 0.
    A = S - p p^T, and S + I/2 is skew-symmetric, so S = V diag(Lambda) V^H with Re(Lambda) = -1/2
    and unitary V. Eigenvalues come in conjugate pairs; the half with positive imaginary part is
    returned, since 2 Re(.) restores the other.

    n: real states, even. Returns Lambda complex128 (n/2,), V complex128 (n, n/2).
    """
    p = np.sqrt(np.arange(n) + 0.5)
    skew = np.triu(np.outer(p, p), 1) - np.tril(np.outer(p, p), -1)
    frequency, vectors = np.linalg.eigh(-1j * skew)
    return -0.5 + 1j * frequency[n // 2 :], vectors[:, n // 2 :]


def discretize_zoh(Lambda: Array, B_tilde: Array, step: Array) -> tuple[Array, Array]:
    """Zero-order hold: Lambda_bar = exp(Lambda step), B_bar = Lambda^-1 (Lambda_bar - I) B_tilde.

    Smith et al. 2023, 2.

    Lambda: complex (P,); B_tilde: complex (P, H); step: float (P,). Returns Lambda_bar (P,), B_bar
    (P, H).
    """
    Lambda_bar = jnp.exp(Lambda * step)
    return Lambda_bar, ((Lambda_bar - 1) / Lambda)[:, None] * B_tilde


def reset_operator(a: tuple[Array, Array, Array], b: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    """The resettable operator a ⊕ b, a earlier than b. Lu et al. 2023, section 3.1 and appendix A.

        a ⊕ b = (b_A a_A, b_A a_u + b_u, a_d)   if b_d = 0
        a ⊕ b = b                               if b_d = 1

    An element (A, u, d) is what a stretch of steps does to the state, x -> A x + u, and whether it
    holds a reset; for one step it is e_k = (A_bar, B_bar u_k, d_k), complex (..., P) twice and bool
    (..., 1). A reset forgets what came before, so b alone is the answer where b holds one.
    Associative, as (a ⊕ b) ⊕ c and a ⊕ (b ⊕ c) agree: if c_d = 1 both are c; else if b_d = 1 both
    are b ⊕ c, which keeps b's flag; else both compose three maps and keep a's flag.

    Five steps with A = 1/2 from state 0:   drive   8   4   2   6   1
                                            reset   0   0   0   1   0
                                            state   8   8   6   6   4    (8/2 + 4, 8/2 + 2, 6 alone, 6/2 + 1)
    """
    a_A, a_u, a_d = a
    b_A, b_u, b_d = b
    A = jnp.where(b_d, b_A, b_A * a_A)
    u = jnp.where(b_d, b_u, b_A * a_u + b_u)
    return A, u, a_d | b_d


# The fast path. A reset only multiplies the transition by zero, so no third element is carried:
#     x_t = keep_t Lambda_bar x_{t-1} + B_bar u_t,      keep_t = 1 - start_t
# A complex vector of P states travels packed, as 2P floats, the real parts and then the imaginary
# parts, so that B_bar u and Re(C x) are single real matrix products.
def complex_to_packed(z: Array) -> Array:
    """complex (..., P) -> float (..., 2P)."""
    return jnp.concatenate([z.real, z.imag], axis=-1)


def packed_to_complex(x: Array) -> Array:
    """float (..., 2P) -> complex (..., P)."""
    return lax.complex(*jnp.split(x, 2, axis=-1))


def recurrence_step(Lambda_bar: Array, x: Array, drive: Array, keep: Array) -> Array:
    """keep Lambda_bar x + drive.

    Lambda_bar (2P,), x and drive (B, 2P), keep (B,). Returns (B, 2P). The drive is added within
    each half because XLA's CPU back end then fuses the step into one loop.
    """
    P = Lambda_bar.shape[-1] // 2
    a_re = Lambda_bar[:P]
    a_im = Lambda_bar[P:]
    x_re = keep[:, None] * x[:, :P]
    x_im = keep[:, None] * x[:, P:]
    real = a_re * x_re - a_im * x_im + drive[:, :P]
    imag = a_re * x_im + a_im * x_re + drive[:, P:]
    return jnp.concatenate([real, imag], axis=-1)


def _scan_sequential(reverse, Lambda_bar, drive, keep, carry):
    def step(x, inputs):
        x = recurrence_step(Lambda_bar, x, *inputs)
        return x, x

    _, states = lax.scan(step, carry, (drive, keep), reverse=reverse)
    return states


def _scan_parallel(reverse, Lambda_bar, drive, keep, carry):
    transition = keep[..., None] * packed_to_complex(Lambda_bar)  # (T, B, P)
    states = _gated_parallel(reverse, transition, packed_to_complex(drive), packed_to_complex(carry))
    return complex_to_packed(states)


def _by_platform(sequential, parallel, reverse, operands):
    """A recurrence in the form that suits the platform it is lowered for.

    A loop over time costs a CPU about 2 microseconds a step, less than one pass of a parallel scan;
    on an accelerator every iteration is a kernel launch, so there it is log2(T) parallel passes.
    """
    in_turn = partial(sequential, reverse)
    at_once = partial(parallel, reverse)
    return lax.platform_dependent(*operands, cpu=in_turn, default=at_once)


def _scan(*operands, reverse=False):
    return _by_platform(_scan_sequential, _scan_parallel, reverse, operands)


@jax.custom_vjp
def linear_recurrence(Lambda_bar: Array, drive: Array, keep: Array, carry: Array) -> Array:
    """All states of x_t = keep_t Lambda_bar x_{t-1} + drive_t.

    Equal to a scan with ``reset_operator``.

    Lambda_bar: float (2P,)
    drive: float (T, B, 2P)
    keep: 0 where an episode opens, else 1, float (T, B), not differentiated
    carry: the state before step 0, float (B, 2P)
    Returns float (T, B, 2P).
    """
    return _scan(Lambda_bar, drive, keep, carry)


def _recurrence_backward(residuals, cotangent):
    """The adjoint is the same recurrence, backwards in time, with the conjugate transition:

    l_t = g_t + keep_{t+1} conj(Lambda_bar) l_{t+1}
    d drive_t = l_t,   d carry = keep_0 conj(Lambda_bar) l_0,   d Lambda_bar = sum_t keep_t conj(x_{t-1}) l_t
    """
    Lambda_bar, keep, carry, states = residuals
    P = Lambda_bar.shape[0] // 2
    conjugate = jnp.concatenate([Lambda_bar[:P], -Lambda_bar[P:]])
    next_keep = jnp.concatenate([keep[1:], jnp.zeros_like(keep[:1])])
    adjoint = _scan(conjugate, cotangent, next_keep, jnp.zeros_like(carry), reverse=True)
    previous = keep[..., None] * jnp.concatenate([carry[None], states[:-1]])

    # conj(x) l = (x_re l_re + x_im l_im) + i (x_re l_im - x_im l_re)
    x_re = previous[..., :P]
    x_im = previous[..., P:]
    l_re = adjoint[..., :P]
    l_im = adjoint[..., P:]
    d_real = jnp.sum(x_re * l_re + x_im * l_im, axis=(0, 1))
    d_imag = jnp.sum(x_re * l_im - x_im * l_re, axis=(0, 1))
    d_carry = recurrence_step(conjugate, adjoint[0], jnp.zeros_like(carry), keep[0])
    return jnp.concatenate([d_real, d_imag]), adjoint, jnp.zeros_like(keep), d_carry


def _recurrence_forward(Lambda_bar, drive, keep, carry):
    states = _scan(Lambda_bar, drive, keep, carry)
    return states, (Lambda_bar, keep, carry, states)


linear_recurrence.defvjp(_recurrence_forward, _recurrence_backward)


# The same for real states whose transition depends on the input.
def _gated_sequential(reverse, gate, drive, carry):
    def step(x, inputs):
        gate, drive = inputs
        x = gate * x + drive
        return x, x

    _, states = lax.scan(step, carry, (gate, drive), reverse=reverse)
    return states


def _gated_parallel(reverse, gate, drive, carry):
    def compose(a, b):
        a_gate, a_drive = a
        b_gate, b_drive = b
        return b_gate * a_gate, b_gate * a_drive + b_drive

    first = -1 if reverse else 0
    drive = drive.at[first].add(gate[first] * carry)
    _, states = lax.associative_scan(compose, (gate, drive), reverse=reverse)
    return states


def _gated_scan(*operands, reverse=False):
    return _by_platform(_gated_sequential, _gated_parallel, reverse, operands)


@jax.custom_vjp
def gated_recurrence(gate: Array, drive: Array, carry: Array) -> Array:
    """All states of x_t = gate_t x_{t-1} + drive_t, float (T, B, H).

    gate, drive: float (T, B, H); carry: the state before step 0, float (B, H).
    """
    return _gated_scan(gate, drive, carry)


def _gated_backward(residuals, cotangent):
    """l_t = g_t + gate_{t+1} l_{t+1},   d drive_t = l_t,   d gate_t = x_{t-1} l_t,   d carry = gate_0 l_0"""
    gate, carry, states = residuals
    next_gate = jnp.concatenate([gate[1:], jnp.zeros_like(gate[:1])])
    adjoint = _gated_scan(next_gate, cotangent, jnp.zeros_like(carry), reverse=True)
    previous = jnp.concatenate([carry[None], states[:-1]])
    return previous * adjoint, adjoint, gate[0] * adjoint[0]


def _gated_forward(gate, drive, carry):
    states = _gated_scan(gate, drive, carry)
    return states, (gate, carry, states)


gated_recurrence.defvjp(_gated_forward, _gated_backward)


# ---- 2. The memories that S5 is compared with ----------------------------------------------------
class Memory(nn.Module):
    """Base of the memories that prepare nothing for ``step``, which here is a sequence of one.

    All memories, S5 included, are called in the same way. Where start is 1 the memory is zeroed
    before it reads.

    initial_carry(batch)           -> carry      float, the environments B lead every leaf
    kernels()                      -> kernels    what step can reuse while the parameters stay
    scan(carry, x, start)          -> carry, y   learning: x and y float (T, B, H), start float (T, B)
    step(kernels, carry, x, start) -> carry, y   acting: x and y float (B, H), start float (B,)
    """

    width: int  # H

    def kernels(self) -> tuple:
        return ()

    def step(self, kernels: tuple, carry: Any, x: Array, start: Array) -> tuple[Any, Array]:
        carry, y = self.scan(carry, x[None], start[None])
        return carry, y[0]


class Memoryless(Memory):
    """One dense layer in the place of the memory: the paper's MLP ("FC") baseline.

    It has no carry.
    """

    def initial_carry(self, batch: int) -> tuple:
        return ()

    @nn.compact
    def scan(self, carry: tuple, x: Array, start: Array) -> tuple[tuple, Array]:
        return carry, nn.leaky_relu(nn.Dense(self.width, name="dense")(x))


class Recurrent(Memory):
    """A recurrent cell of flax, GRU or LSTM.

    The carry is the cell's: float (B, H), for the LSTM two of them.
    """

    cell_class: type[nn.RNNCellBase]

    def setup(self):
        self.cell = self.cell_class(self.width)

    def initial_carry(self, batch: int) -> Any:
        return self.cell_class(self.width, parent=None).initialize_carry(jax.random.key(0), (batch, self.width))

    def scan(self, carry: Any, x: Array, start: Array) -> tuple[Any, Array]:
        def step(memory, carry, inputs):
            return memory.step((), carry, *inputs)

        over_time = nn.scan(step, variable_broadcast="params", split_rngs={"params": False})
        return over_time(self, carry, (x, start))

    def step(self, kernels: tuple, carry: Any, x: Array, start: Array) -> tuple[Any, Array]:
        keep = (1.0 - start)[:, None]
        return self.cell(jax.tree.map(lambda c: c * keep, carry), x)


class GatedOutput(nn.Module):
    """What follows S5's recurrence, for others: u + (W1 gelu(y)) * sigmoid(W2 gelu(y)).

    u and y (..., H).
    """

    @nn.compact
    def __call__(self, u: Array, y: Array) -> Array:
        width = u.shape[-1]
        y = nn.gelu(y)
        return u + nn.Dense(width, name="value")(y) * nn.sigmoid(nn.Dense(width, name="gate")(y))


class LRU(nn.Module):
    """One layer of linear recurrent units (Orvieto et al. 2023), in S5's block.

    lambda = exp(-exp(nu) + i exp(theta)),    gamma = sqrt(1 - |lambda|^2)
    x_t = (1 - start_t) lambda x_{t-1} + gamma B v_t,    v = norm(u)
    y_t = Re(C x_t) + D v_t

    |lambda| lies between exp(-dt_max / 2) and exp(-dt_min / 2) at first, uniformly on the ring,
    as the states of S5 do; the phase within pi / 10, as is advised for long sequences.
    Parameters as in S5: nu, theta (P,), B (H, 2P), C (2P, H), D (H,). The carry is float (B, 2P).
    """

    width: int  # H
    states: int  # P, complex
    dt_min: float
    dt_max: float

    def setup(self):
        H = self.width
        P = self.states

        def init_nu(key):
            squared = jax.random.uniform(key, (P,), jnp.float32, math.exp(-self.dt_max), math.exp(-self.dt_min))
            return jnp.log(-0.5 * jnp.log(squared))

        def init_theta(key):
            return jnp.log(jax.random.uniform(key, (P,), jnp.float32, 1e-4, math.pi / 10))

        self.nu = self.param("nu", init_nu)
        self.theta = self.param("theta", init_theta)
        self.B = self.param("B", normal(math.sqrt(0.5 / H)), (H, 2 * P), jnp.float32)
        self.C = self.param("C", normal(math.sqrt(1.0 / P)), (2 * P, H), jnp.float32)
        self.D = self.param("D", normal(1.0), (H,), jnp.float32)
        self.norm = nn.LayerNorm()
        self.out = GatedOutput()

    def initial_carry(self, batch: int) -> Array:
        return jnp.zeros((batch, 2 * self.states), jnp.float32)

    def kernels(self) -> tuple[Array, Array]:
        """lambda, packed, (2P,), and gamma B (H, 2P)."""
        size = jnp.exp(-jnp.exp(self.nu))
        phase = jnp.exp(self.theta)
        gamma = jnp.sqrt(1 - size**2)
        Lambda = jnp.concatenate([size * jnp.cos(phase), size * jnp.sin(phase)])
        return Lambda, self.B * jnp.concatenate([gamma, gamma])

    def output(self, u: Array, v: Array, x: Array) -> Array:
        """(..., H) from the input u, the same normalised v, both (..., H), and the states x (..., 2P)."""
        return self.out(u, x @ self.C + self.D * v)

    def scan(self, carry: Array, u: Array, start: Array) -> tuple[Array, Array]:
        Lambda, B = self.kernels()
        v = self.norm(u)
        x = linear_recurrence(Lambda, v @ B, 1.0 - start, carry)
        return x[-1], self.output(u, v, x)

    def step(self, kernels: tuple, carry: Array, u: Array, start: Array) -> tuple[Array, Array]:
        Lambda, B = kernels
        v = self.norm(u)
        x = recurrence_step(Lambda, carry, v @ B, 1.0 - start)
        return x, self.output(u, v, x)


class MinGRU(nn.Module):
    """One layer of the minimal GRU (Feng et al. 2024, "Were RNNs All We Needed?"), in S5's block.

    z_t = sigmoid(W_z v_t),    v = norm(u)
    x_t = (1 - start_t) (1 - z_t) x_{t-1} + z_t W_h v_t

    z does not depend on the state, so that the recurrence is linear. At first z is, but for its
    input, between dt_min and dt_max, log-uniformly, as are the time steps of S5 (compare Tallec
    and Ollivier 2018, "Can recurrent neural networks warp time?"). The carry is float (B, H).
    """

    width: int  # H
    dt_min: float
    dt_max: float

    def setup(self):
        def init_bias(key, shape, dtype):
            low = math.log(self.dt_min)
            high = math.log(self.dt_max)
            z = jnp.exp(jax.random.uniform(key, shape, dtype, low, high))
            return jnp.log(z / (1 - z))

        self.update = nn.Dense(self.width, bias_init=init_bias)
        self.candidate = nn.Dense(self.width)
        self.norm = nn.LayerNorm()
        self.out = GatedOutput()

    def initial_carry(self, batch: int) -> Array:
        return jnp.zeros((batch, self.width), jnp.float32)

    def kernels(self) -> tuple:
        return ()

    def transition(self, u: Array, start: Array) -> tuple[Array, Array]:
        """What multiplies the state, and what is added to it, like u (..., H)."""
        v = self.norm(u)
        z = nn.sigmoid(self.update(v))
        return (1.0 - start)[..., None] * (1.0 - z), z * self.candidate(v)

    def scan(self, carry: Array, u: Array, start: Array) -> tuple[Array, Array]:
        x = gated_recurrence(*self.transition(u, start), carry)
        return x[-1], self.out(u, x)

    def step(self, kernels: tuple, carry: Array, u: Array, start: Array) -> tuple[Array, Array]:
        gate, drive = self.transition(u, start)
        x = gate * carry + drive
        return x, self.out(u, x)


class Attention(Memory):
    """Pre-norm transformer, rotary positions (Su et al. 2021).

    A step attends to the last W of its episode, itself too.

    Carry (cache, length): for each layer keys and values of the last W steps, float (B, W, H),
    oldest first; how many, the newest, belong to the running episode, int32 (B,).
    """

    layers: int
    window: int
    heads: int = 4

    def setup(self):
        self.qkv = [nn.Dense(3 * self.width) for _ in range(self.layers)]
        self.mix = [nn.Dense(self.width) for _ in range(self.layers)]
        self.up = [nn.Dense(2 * self.width) for _ in range(self.layers)]
        self.down = [nn.Dense(self.width) for _ in range(self.layers)]
        self.norms = [nn.LayerNorm() for _ in range(2 * self.layers)]

    def initial_carry(self, batch: int) -> tuple:
        empty = jnp.zeros((batch, self.window, self.width), jnp.float32)
        return ((empty, empty),) * self.layers, jnp.zeros(batch, jnp.int32)

    def rotate(self, x: Array, position: Array) -> Array:
        """x (B, L, H) split in heads (B, L, heads, .), turned by rotary positions.

        Pairs of features turn in proportion to position (L,).
        """
        a, b = jnp.split(x.reshape(*x.shape[:2], self.heads, -1), 2, axis=-1)
        pairs = a.shape[-1]
        frequency = 10_000.0 ** (-jnp.arange(pairs, dtype=jnp.float32) / pairs)
        angle = position[:, None, None] * frequency
        cos = jnp.cos(angle)
        sin = jnp.sin(angle)
        return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)

    def scan(self, carry: tuple, x: Array, start: Array) -> tuple[tuple, Array]:
        old_cache, length = carry
        x = jnp.swapaxes(x, 0, 1)  # (B, T, H)
        start = jnp.swapaxes(start, 0, 1)  # (B, T)
        B, T = start.shape
        W = self.window
        line = jnp.arange(W + T, dtype=jnp.int32)  # the time line: the cache, then the sequence
        time = line[W:]
        own_start = jnp.where(start > 0, time, W - length[:, None])
        opened = lax.cummax(own_start, axis=1)  # (B, T), where on the line the step's episode began

        # M blocks of L steps; all that a block sees are the W + L on the line up to its last step
        L = max(size for size in range(1, min(T, W) + 1) if T % size == 0)
        M = T // L
        near = L * jnp.arange(M, dtype=jnp.int32)[:, None] + line[: W + L]  # (M, W + L)
        age = time.reshape(M, L, 1) - near[:, None]
        mask = (age >= 0) & (age < W) & (near[:, None] >= opened.reshape(B, M, L, 1))  # (B, M, L, W + L)

        def blocks(of_line):  # (B, W + T, heads, .) -> (B M, W + L, heads, .)
            return of_line[:, near].reshape(B * M, W + L, self.heads, -1)

        cache = []
        for i, (old_keys, old_values) in enumerate(old_cache):
            q, k, v = jnp.split(self.qkv[i](self.norms[2 * i](x)), 3, axis=-1)
            k = jnp.concatenate([old_keys, k], axis=1)  # (B, W + T, H)
            v = jnp.concatenate([old_values, v], axis=1)
            cache.append((k[:, T:], v[:, T:]))
            y = jax.nn.dot_product_attention(
                self.rotate(q, time).reshape(B * M, L, self.heads, -1),
                blocks(self.rotate(k, line)),
                blocks(v),
                mask=mask.reshape(B * M, 1, L, W + L),
            )
            x = x + self.mix[i](y.reshape(x.shape))
            x = x + self.down[i](nn.gelu(self.up[i](self.norms[2 * i + 1](x))))
        new_length = jnp.minimum(W + T - opened[:, -1], W)
        return (tuple(cache), new_length), jnp.swapaxes(x, 0, 1)


# ---- 3. Arguments and errors ---------------------------------------------------------------------
class UsageError(ValueError):
    """Bad input. The message names the flag, its value and what is allowed."""


class RunError(RuntimeError):
    """A run that cannot go on, as on a full disk. What it saved before stays."""


def run_main(main: Callable[[], int]) -> int:
    """Exit code of a script's ``main``.

    Bad input is one line on stderr and 2, a run that cannot go on 1.
    """
    try:
        try:
            return main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output has gone, as head does: not an error of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (UsageError, RunError, FloatingPointError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1 if isinstance(error, (RunError, FloatingPointError)) else 2


def warn(text: str) -> None:
    """One line on stderr."""
    print(f"warning: {' '.join(text.split())}", file=sys.stderr, flush=True)


def parse_command_line(args_class: type, default: Any, argv: Sequence[str] | None) -> Any:
    """The command line over these default values, by tyro; its boxed complaints as one UsageError.

    args_class: a dataclass whose bases are groups of flags; --help shows each under a heading of
    its own.
    """
    groups = []
    for group in args_class.__mro__:
        if "__annotations__" not in vars(group):  # it has no flags of its own
            continue
        values = {field.name: getattr(default, field.name) for field in fields(group)}
        heading = group.__name__.removesuffix("Flags").lower()
        groups.append((heading, group, field_with(default=group(**values))))
    grouped = make_dataclass(args_class.__name__, groups, namespace={"__doc__": args_class.__doc__})
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output):
            found: Any = tyro.cli(grouped, args=argv, config=(tyro.conf.OmitArgPrefixes,))
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        lines = [line.strip("│╰╯─ ") for line in output.getvalue().splitlines() if not line.startswith("╭")]
        raise UsageError(" ".join(lines).split("For full helptext")[0]) from None
    flags = [vars(group) for group in vars(found).values()]
    return args_class(**{name: value for group in flags for name, value in group.items()})


def parse_args(args_class: type, presets: dict[str, dict[str, Any]], argv: Sequence[str] | None = None) -> Any:
    """The command line as an ``args_class``: a preset's values, then the explicit flags, which win.

    With --resume, --eval or --watch that run's flags come first; UsageError where a flag
    contradicts them, but for those of evaluation and those that say where it runs: the number of
    devices and processes is not part of what a run is.
    """
    first = parse_command_line(args_class, args_class(), argv)
    given = [name for name in OF_A_RUN if getattr(first, name)]
    if len(given) > 1:
        *_, other, last = [f"--{name} {getattr(first, name)}" for name in given]
        raise UsageError(f"{last}: not together with {other}")
    if first.watch and first.distributed:
        raise UsageError(f"--watch {first.watch}: not together with --distributed True")
    if not given:
        args = parse_command_line(args_class, args_class(**presets[first.preset]), argv)
        args.check()
        if args.run_dir and not args.distributed and not getattr(args, "sweep", ""):
            check_new_directory(Path(args.run_dir))
        return args

    run_dir = getattr(first, given[0])
    stored = read_args(args_class, run_dir, flag=f"--{given[0]} ")
    not_given = 0
    args = parse_command_line(args_class, replace(stored, num_devices=not_given, distributed=False), argv)
    if first.num_devices < 1:
        raise UsageError(f"--num-devices {first.num_devices}: must be above 0 and at most 1e+12")
    if args.num_devices == not_given:
        args = replace(args, num_devices=stored.num_devices)
        while not args.distributed and args.num_devices > 1 and not runs_here(args):
            args = replace(args, num_devices=args.num_devices - 1)
    if args.watch:  # one episode needs one device
        args = replace(args, num_devices=1)
    for name, then in vars(stored).items():
        now = getattr(args, name)
        may_differ = name in WHERE_IT_RUNS or name in OF_A_RUN or name.startswith("eval")
        if now != then and not may_differ:
            raise UsageError(f"--{name.replace('_', '-')} {now}: the run in {run_dir} was made with {then}")
    args.check()
    return args


WHERE_IT_RUNS = ("num_devices", "distributed")
OF_A_RUN = ("resume", "eval", "watch")  # flags that name the directory of a run that exists


def runs_here(args: Any) -> bool:
    """Whether this machine has that many devices, and the environments can be spread over them."""
    if args.num_devices > jax.device_count():
        return False
    try:
        args.check()
    except UsageError:
        return False
    return True


def read_args(args_class: type, run_dir: str, flag: str = "") -> Any:
    """The flags that a run was begun with. Raises UsageError."""
    try:
        stored = json.loads((Path(run_dir) / "args.json").read_text())["args"]
        missing = [field.name for field in fields(args_class) if field.name not in {*stored, *OF_A_RUN}]
        if missing:  # what another version did in their place is not known
            raise ValueError(f"without {', '.join(missing)} in its args.json")
        return args_class(**{name: tuple(x) if isinstance(x, list) else x for name, x in stored.items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{flag}{run_dir}: not a run directory of this script ({error})") from None


def check_args(
    args: Any,
    zero: Collection[str] = (),
    at_least: Mapping[str, float] = MappingProxyType({}),
    at_most: Mapping[str, float] = MappingProxyType({}),
) -> None:
    """UsageError for a number that is not above 0, or is outside of the bounds that it has instead.

    zero: names of those that may be 0; at_least and at_most: other bounds, by name.
    """
    # one feature, normalised by itself, is always 0; one episode has no standard error
    at_least = {"s5_width": 2, "rnn_width": 2, "eval_episodes": 2} | dict(at_least)
    for name, value in vars(args).items():
        low = at_least.get(name, 0 if name in zero else 1e-12)
        for number in value if isinstance(value, tuple) else [value]:
            if type(number) not in (int, float):
                continue
            whole = type(number) is int and name != "total_timesteps"
            high = at_most.get(name, 2**31 - 1 if whole else 1e12)
            if not low <= number <= high:
                bound = "above 0" if low == 1e-12 else f"at least {low:g}"
                raise UsageError(f"--{name.replace('_', '-')} {number}: must be {bound} and at most {high:g}")
    if args.seed + args.num_seeds > 2**31:
        raise UsageError(f"--num-seeds {args.num_seeds}: --seed {args.seed} and those after it must be below 2^31")
    if args.s5_dt_min > args.s5_dt_max:
        raise UsageError(f"--s5-dt-min {args.s5_dt_min}: must be at most --s5-dt-max {args.s5_dt_max}")
    if args.arch == "mingru" and args.s5_dt_max >= 1:  # a share of the state that is replaced
        raise UsageError(f"--s5-dt-max {args.s5_dt_max}: must be below 1 with --arch mingru")
    if args.arch == "attention" and args.s5_width % 8:
        raise UsageError(f"--s5-width {args.s5_width}: must be a multiple of 8 with --arch attention")
    if args.distributed and not (args.run_dir or args.resume or args.eval):
        raise UsageError("--distributed True: needs a --run-dir that all processes share")
    if args.track and not (args.eval or args.watch) and not find_spec("wandb"):
        raise UsageError("--track True: needs Weights & Biases (pip install wandb)")


def check_new_directory(path: Path) -> None:
    """UsageError if a run cannot make this directory.

    A name too long, one that exists, a place not to be written.
    """
    if any(len(os.fsencode(part)) > 240 for part in path.parts) or len(os.fsencode(path.absolute())) > 3000:
        raise UsageError(f"--run-dir {path}: is too long a name; choose a shorter one")
    if path.exists():
        raise UsageError(f"--run-dir {path}: exists; go on with --resume {path} or choose another")
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    if not parent.is_dir():
        raise UsageError(f"--run-dir {path}: is in a file, {parent}; choose another")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(f"--run-dir {path}: {parent} is not writable; choose another")


def own_environment(flag: str, name: str, uses: str) -> tuple[Any, Any]:
    """What PACKAGE.MODULE:FACTORY returns: an environment with gymnax's 1.x interface, its parameters.

    The module is looked for in the working directory, too. Raises UsageError.

    flag: which names it; uses: the method that steps it, step or step_env
    """
    flag = f"--{flag} {name}"
    module_name, factory_name = name.split(":", 1)
    if module_name.startswith(".") or "/" in module_name:
        raise UsageError(f"{flag}: must be PACKAGE.MODULE:FACTORY, not a path")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        factory = getattr(import_module(module_name), factory_name)
    except (ImportError, AttributeError, ValueError, SyntaxError) as error:
        raise UsageError(f"{flag}: {error}") from None
    wanted = "must be a function without arguments that returns an environment and its parameters"
    try:
        inspect.signature(factory).bind()
    except (TypeError, ValueError):
        raise UsageError(f"{flag}: {wanted}") from None
    made = factory()
    if not isinstance(made, tuple) or len(made) != 2:
        raise UsageError(f"{flag}: {wanted}")
    env, env_params = made
    missing = [method for method in ("reset_env", uses, "action_space", "name") if not hasattr(env, method)]
    if missing:
        raise UsageError(f"{flag}: the environment has no {', '.join(missing)}")
    obs, _ = jax.eval_shape(env.reset_env, jax.random.PRNGKey(0), env_params)
    if getattr(obs, "ndim", 0) != 1 or obs.dtype != jnp.float32:
        raise UsageError(f"{flag}: observations must be float32 vectors, not {obs}")
    return env, env_params


# ---- 4. Compilation and placement ----------------------------------------------------------------
def compile_ahead(function: Callable, *arguments: Any, **options: Any) -> Callable:
    """``jax.jit(function, **options)``, compiled for these arguments.

    The function as it is where JAX_DISABLE_JIT asks for that.
    """
    jitted = jax.jit(function, **options)
    jit_is_off = jax.config.jax_disable_jit  # type: ignore[attr-defined]
    return jitted if jit_is_off else jitted.lower(*arguments).compile()


def device_mesh(num_devices: int) -> Mesh:
    """The first devices of all processes, axis "env", over which environments are spread.

    Raises UsageError.
    """
    flag = f"--num-devices {num_devices}"
    if num_devices > jax.device_count():
        raise UsageError(f"{flag}: this machine has {jax.device_count()}")
    devices = jax.devices()[:num_devices]
    if len({device.process_index for device in devices}) < jax.process_count():
        processes = f"all devices of the {jax.process_count()} processes"
        raise UsageError(f"{flag}: must be {jax.device_count()}, {processes}")
    return Mesh(np.array(devices), ("env",))


def linear_decay(start: float, steps: int) -> Callable[[Array], Array]:
    """A schedule for optax that falls from start to 0 over this many gradient steps.

    optax.linear_schedule compares the count, int32, with the number of steps, which may be too
    large for that.
    """
    return lambda count: start * jnp.maximum(0.0, 1.0 - count.astype(jnp.float32) / float(steps))


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def bounded(x: Array, low: float, high: float) -> Array:
    """x within [low, high], for parameters and outputs that learn.

    The gradient can lead back from outside.

    A clip has no gradient out there, so that a value which momentum carries over the edge stays
    where it is for the rest of the run. Here dL/dx = dL/dy, but 0 at and beyond a bound if descent
    would lead further out.
    """
    return jnp.clip(x, low, high)


def _bounded_backward(low, high, x, gradient):
    further_out = ((x <= low) & (gradient > 0)) | ((x >= high) & (gradient < 0))
    return (jnp.where(further_out, 0.0, gradient),)


bounded.defvjp(lambda x, low, high: (bounded(x, low, high), x), _bounded_backward)


def join_cluster() -> None:
    """jax.distributed, as JAX's environment variables or the cluster say.

    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. Raises UsageError.
    """
    jax.extend.backend.clear_backends()  # importing gymnax has started one
    numbers = ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    try:
        count, index = [int(os.environ[name]) if name in os.environ else None for name in numbers]
        jax.distributed.initialize(num_processes=count, process_id=index)
    except ValueError as error:
        names = f"JAX_COORDINATOR_ADDRESS, {' and '.join(numbers)}"
        raise UsageError(f"--distributed True: {names} must name a cluster ({shortened(error)})") from None


def provenance() -> dict[str, Any]:
    """What a run is made with: git commit, device, package versions."""
    git = ""
    with contextlib.suppress(OSError):
        command = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty", "--abbrev=12"]
        git = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    packages = ("jax", "jaxlib", "flax", "optax", "gymnax", "numpy", "orbax-checkpoint")
    return {
        "git_commit": git,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "versions": {"python": sys.version.split()[0]} | {name: version(name) for name in packages},
    }


# ---- 5. A run on disk ----------------------------------------------------------------------------
class Mean(NamedTuple):
    """A metric that is total / number, and an empty field of metrics.csv where number is 0."""

    total: Array
    number: Array


@contextlib.contextmanager
def writing(path: Path, kept: str) -> Iterator[None]:
    """Whatever stops the writing of a file, such as a full disk, as one RunError.

    kept: what is not lost, in words.
    """
    try:
        yield
    except Exception as error:  # orbax and tensorstore raise many kinds
        raise RunError(f"{path} could not be written ({shortened(error)}); {kept}") from None


def shortened(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def read_rows(
    table: Path, columns: Sequence[str], update: int, text: Collection[str] = ()
) -> tuple[list[dict[str, str]], int]:
    """The whole rows of a CSV table up to an update, and how many lines before its end are damaged.

    A row is whole if its line ends, and if it has a field for each of the columns: a number or
    nothing, or anything in those that are ``text``. The header's place is the first line; a damaged
    header counts as a damaged line.
    """
    if not table.exists():
        return [], 0
    header, *lines = table.read_bytes().decode(errors="replace").split("\n")
    unfinished = lines.pop() if lines else ""  # what follows the last line end
    damaged = (header.rstrip("\r") != ",".join(columns)) + bool(unfinished)
    rows = []
    for line in lines:
        fields = line.removesuffix("\r").split(",")
        row = dict(zip(columns, fields, strict=False))
        if len(fields) != len(columns) or not is_whole(row, text):
            damaged += 1
        elif int(row["update"]) <= update:
            rows.append(row)
    return rows, damaged


def is_whole(row: dict[str, str], text: Collection[str]) -> bool:
    """Whether all fields of a row can be read."""
    try:
        int(row["update"])
        _ = [float(field) for name, field in row.items() if field and name not in text]
    except ValueError:
        return False
    return all(field.isprintable() and "\ufffd" not in field for field in row.values())


class Checkpoints:
    """RUN/checkpoints/UPDATE: the newest two, the older one in case the newer is damaged.

    state/       the arrays of the state by name, by orbax
    about.json   the flags, what the run has measured so far, types and shapes of the arrays
    SHA256SUMS   of all these files, for `sha256sum -c`: neither JSON nor orbax notice every
                 flipped bit

    A checkpoint gets its name when all is in it, so that one is whole or not there.
    """

    def __init__(self, path: Path, writes: bool):
        self.path = path
        self.writes = writes
        self.orbax = ocp.Checkpointer(ocp.StandardCheckpointHandler())

    def updates(self) -> list[int]:
        return sorted(int(path.name) for path in self.path.glob("*") if path.name.isdigit())

    def save(self, update: int, state: Any, about: dict[str, Any]) -> None:
        """Raises RunError; the checkpoints from before are kept."""
        draft = self.path / f"{update}.draft"
        with writing(self.path / str(update), kept=f"checkpoints {self.updates()} are kept"):
            try:
                self.write(draft, stored(state), about)
            except Exception:
                shutil.rmtree(draft, ignore_errors=True)
                raise
            if self.writes:
                draft.rename(self.path / str(update))
                for old in self.updates()[:-2]:
                    shutil.rmtree(self.path / str(old))
            multihost_utils.sync_global_devices("checkpoint done")

    def write(self, draft: Path, arrays: dict[str, Array], about: dict[str, Any]) -> None:
        """All that a checkpoint holds.

        The processes of a distributed run write their parts of the arrays together.
        """
        if self.writes:
            for left_behind in self.path.glob("*.draft"):
                shutil.rmtree(left_behind)
            draft.mkdir()
        multihost_utils.sync_global_devices("checkpoint begun")
        with without_litter():
            self.orbax.save((draft / "state").resolve(), args=ocp.args.StandardSave(arrays))
        if self.writes:
            about = about | {"arrays": {name: describe(x) for name, x in arrays.items()}}
            (draft / "about.json").write_text(json.dumps(about, indent=2))
            (draft / "SHA256SUMS").write_text(checksums(draft))

    def read_newest(self, like: Any) -> tuple[int, dict[str, Array], dict[str, Any]]:
        """Update, arrays spread over devices like those of ``like``, and ``about``.

        Raises UsageError if it is damaged, and then offers the older one if that is whole; or if it
        has other arrays.
        """
        *older, newest = self.updates()
        folder = self.path / str(newest)
        where = f"{self.path.parent}: checkpoint {newest}"
        damage = find_damage(folder)
        if damage:
            offer = ""
            if older and not find_damage(self.path / str(older[-1])):
                offer = f"; remove {folder} to go on from checkpoint {older[-1]}, which is whole"
            raise UsageError(f"{where} is damaged ({damage}){offer}")

        about = json.loads((folder / "about.json").read_text())
        expected = stored(like)
        for name in sorted(about["arrays"].keys() | expected.keys()):
            has = about["arrays"].get(name, "nothing")
            needed = describe(expected[name]) if name in expected else "nothing"
            if has != needed:
                raise UsageError(f"{where} is of other flags: it has {has} as {name}, these have {needed}")
        target = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in expected.items()}
        arrays = self.orbax.restore((folder / "state").resolve(), args=ocp.args.StandardRestore(target))
        return newest, arrays, about


def stored(state: Any) -> dict[str, Array]:
    """What a checkpoint holds: the arrays by name.

    orbax refuses those without elements, which simulators have.
    """
    named = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in named if x.size}


def describe(x: Array) -> str:
    """float32 (8, 16)"""
    return f"{x.dtype} {x.shape}"


def checksums(folder: Path) -> str:
    """A line for each file under a folder, as sha256sum writes them."""
    lines = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "SHA256SUMS":
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            lines.append(f"{digest}  {path.relative_to(folder)}\n")
    return "".join(lines)


def find_damage(checkpoint: Path) -> str:
    """Which files of a checkpoint are not as they were written; empty if it is whole."""
    try:
        written = (checkpoint / "SHA256SUMS").read_text()
        found = checksums(checkpoint)
    except (OSError, ValueError) as error:
        return shortened(error)
    if found == written:
        return ""
    names = sorted({line[66:] for line in set(found.splitlines()) ^ set(written.splitlines())})
    return f"{', '.join(names[:3])} {'is' if len(names) == 1 else 'are'} not as written" if names else "SHA256SUMS"


@contextlib.contextmanager
def without_litter() -> Iterator[None]:
    """One RunError says all where saving fails, as on a full disk.

    orbax then leaves threads and tasks behind that fill stderr with tracebacks and warnings until
    the process has ended: what they log, that their event loop is closed, that nobody awaits them.
    """
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels = [logger.level for logger in loggers]
    call_soon = asyncio.BaseEventLoop.call_soon_threadsafe

    def call_soon_unless_closed(loop, *arguments, **options):
        if not loop.is_closed():
            return call_soon(loop, *arguments, **options)

    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    asyncio.BaseEventLoop.call_soon_threadsafe = call_soon_unless_closed  # type: ignore
    try:
        yield
    except Exception as error:  # and it stays like this
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        raise RunError(shortened(error)) from None
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
    asyncio.BaseEventLoop.call_soon_threadsafe = call_soon  # type: ignore


class EventFile:
    """TensorBoard events, by tensorboardX; each is written as it comes.

    tensorboardX's SummaryWriter writes in a thread instead, whose errors reach nobody.
    """

    def __init__(self, path: Path, purge_step: int | None):
        self.writer = EventsWriter(str(path / "events"))
        if purge_step is not None:  # what a killed process wrote from this step on does not count
            self.add(purge_step, session_log=SessionLog(status=SessionLog.START))

    def add(self, step: int, **content: Any) -> None:
        self.writer.write_event(Event(wall_time=time.time(), step=step, **content))

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.add(step, summary=scalar(name, value))

    def flush(self) -> None:
        self.writer.flush()


class MetricsLog:
    """RUN/metrics.csv, a row for each update and seed, and the same as TensorBoard events.

    A resumed run's table equals that of a run which never stopped. Only a run's first process
    writes. best and last: the largest and the newest mean return so far, by seed.
    """

    def __init__(self, path: Path, writes: bool, tracker: Any = None):
        self.path = path
        self.table = path / "metrics.csv"
        self.writes = writes
        self.tracker = tracker  # a run of Weights & Biases
        self.columns: list[str] = []
        self.kept: list[dict[str, str]] = []  # rows from before the restored checkpoint, until they are written
        self.best: dict[int, float] = {}
        self.last: dict[int, float] = {}

    def resume(self, columns: Sequence[str], update: int, seeds: Sequence[int]) -> None:
        """Take over the rows up to an update, and say it where some of them are missing."""
        self.columns = list(columns)
        rows, _ = read_rows(self.table, columns, update)
        found = {(int(row["update"]), int(row["seed"])): row for row in rows}
        due = [(number, seed) for number in range(1, update + 1) for seed in seeds]
        self.kept = [found[place] for place in due if place in found]
        missing = [place[0] for place in due if place not in found]
        if missing and self.writes:
            span = f"updates {missing[0]} to {missing[-1]}"
            count = f"{len(missing)} of {len(due)} rows, of {span}, are damaged or missing"
            warn(f"{self.table}: {count}; the run goes on without them")
        for row in self.kept:
            self.remember(int(row["seed"]), row.get("return_mean"))

    def remember(self, seed: int, mean_return: Any) -> None:
        if mean_return not in (None, ""):
            self.last[seed] = float(mean_return)
            self.best[seed] = max(float(mean_return), self.best.get(seed, -math.inf))

    def add(self, row: dict[str, Any], steps_per_second: float | None) -> None:
        """Append a row.

        Raises FloatingPointError if a loss or the gradient in it is not finite, and RunError.
        """
        watched = [name for name in row if name.endswith("_loss") or name == "grad_norm"]
        wrong = [name for name in watched if not math.isfinite(row[name])]
        if wrong:
            where = f"update {row['update']}, seed {row['seed']}; the last good checkpoint is in {self.path}"
            verb = "is" if len(wrong) == 1 else "are"
            raise FloatingPointError(f"{', '.join(wrong)} {verb} not finite at {where}")
        self.remember(row["seed"], row.get("return_mean"))
        if not self.writes:
            return
        with writing(self.table, kept=f"the newest checkpoint in {self.path} is kept"):
            if not hasattr(self, "file"):
                self.open(row)
            self.rows.writerow(row)
            self.file.flush()
            shown = row | {"steps_per_second": steps_per_second}
            shown = {f"seed{row['seed']}/{name}": x for name, x in shown.items() if x is not None and math.isfinite(x)}
            for name, value in shown.items():
                self.events.add_scalar(name, value, row["update"])
            self.events.flush()
            if self.tracker:
                self.tracker.log(shown, step=row["update"])

    def open(self, row: dict[str, Any]) -> None:
        """A new table takes the place of the old one.

        It begins with the rows from before the restored checkpoint.
        """
        self.columns = list(row)
        self.file = (self.path / "metrics.tmp").open("w", newline="")
        self.rows = csv.DictWriter(self.file, self.columns, lineterminator="\n")
        self.rows.writeheader()
        self.rows.writerows(self.kept)
        Path(self.file.name).replace(self.table)
        self.events = EventFile(self.path, purge_step=row["update"] if self.kept else None)
        self.kept = []


class Progress:
    """A bar on a terminal, and elsewhere a plain line every few seconds.

    Counts the steps of all seeds.
    """

    def __init__(self, done: int, updates: int, steps: int):
        self.first = done + 1
        self.updates = updates
        self.steps = steps  # of an update
        self.steps_per_second: float | None = None  # without compilation and the first update
        self.printed = 0.0
        self.bar = tqdm(initial=done, total=updates, unit=" updates", disable=not sys.stderr.isatty())

    def count(self, done: int) -> None:
        """An update is done."""
        self.now = time.perf_counter()
        if done == self.first:
            self.counted_from = self.now
        else:
            self.steps_per_second = (done - self.first) * self.steps / (self.now - self.counted_from)

    def show(self, done: int, last_return: float | None, best_return: float | None) -> None:
        rate = f"{self.steps_per_second:,.0f}/s" if self.steps_per_second else "-/s"
        returns = "no episode has ended yet"
        if last_return is not None:
            returns = f"return {last_return:.3f}, best {best_return:.3f}"
        text = f"{done * self.steps:,} steps, {rate}, {returns}"
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update()
        due = self.now - self.printed > 5 and done > self.first
        if self.bar.disable and (due or done == self.updates):
            left = (self.updates - done) * self.steps
            eta = f"{left / self.steps_per_second:.0f} s" if self.steps_per_second else "-"
            print(f"update {done} of {self.updates}: {text}, ETA {eta}", flush=True)
            self.printed = self.now


class RunDirectory:
    """A run on disk, and its progress.

    args.json, metrics.csv, TensorBoard events, checkpoints, picture, summary.

    ``with run:`` collects SIGINT and SIGTERM in ``signals``. At the end of an update, ``stopped``
    says for the training loop whether one has come, and a checkpoint has been saved if so. A
    second signal stops at once.
    """

    def __init__(self, args: Any, env: str, script: str):
        existing = args.resume or args.eval or args.watch
        self.path = Path(existing or args.run_dir or default_directory(args, env, script))
        self.about = {"script": script, "env": env, "arch": args.arch, "preset": args.preset}
        self.flags = args
        self.args = json.loads(json.dumps(vars(args)))  # tuples as lists, as they will be read
        for name in OF_A_RUN:
            del self.args[name]
        self.only_read = bool(args.eval or args.watch)
        self.seeds = range(args.seed, args.seed + args.num_seeds)
        self.writes = jax.process_index() == 0
        self.signals: list[int] = []
        self.stopped = False
        self.done = 0
        self.seconds = 0.0  # of earlier processes
        self.began = time.perf_counter()
        if self.writes and not existing:
            self.create()
        tracker = None
        if self.writes and args.track and not self.only_read:
            options = {"name": self.path.name, "config": self.args, "dir": str(self.path)}
            tracker = import_module("wandb").init(project="s5-in-context-rl", **options)
        multihost_utils.sync_global_devices("run directory")
        self.checkpoints = Checkpoints(self.path / "checkpoints", self.writes)
        self.log = MetricsLog(self.path, self.writes, tracker)

    def create(self) -> None:
        """The directory with what is known before training; it gets its name when all is in it."""
        check_new_directory(self.path)
        draft = self.path.with_name(self.path.name + ".tmp")
        try:
            with writing(self.path, kept="nothing was begun"):
                (draft / "checkpoints").mkdir(parents=True, exist_ok=True)
                (draft / "args.json").write_text(json.dumps({"args": self.args} | provenance(), indent=2))
                draft.rename(self.path)
        except RunError:
            shutil.rmtree(draft, ignore_errors=True)
            raise

    def __enter__(self) -> RunDirectory:
        def receive(number, frame):
            self.signals.append(number)
            if len(self.signals) > 1:
                raise SystemExit(128 + number)

        self.handlers = {}
        if threading.current_thread() is threading.main_thread():  # only there Python lets one set them
            for number in (signal.SIGINT, signal.SIGTERM):
                self.handlers[number] = signal.signal(number, receive)
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if hasattr(self, "progress"):
            self.progress.bar.close()

    def elapsed(self) -> float:
        """Seconds that the run has taken, those before it was resumed included."""
        return self.seconds + time.perf_counter() - self.began

    def save(self, state: Any) -> None:
        """Write a checkpoint; the one before it stays. Raises RunError."""
        self.checkpoints.save(
            self.done, state, {"args": self.args, "seconds": self.elapsed(), "columns": self.log.columns}
        )

    def restore(self, like: Any) -> Any:
        """The newest checkpoint's state; in a new run ``like``, of its shapes.

        Starts the clock. Raises UsageError.
        """
        self.began = time.perf_counter()
        if not self.checkpoints.updates():
            if (self.path / "metrics.csv").exists() or not (self.path / "checkpoints").exists():
                raise UsageError(f"{self.path}: its checkpoints are missing")
            if not self.only_read:
                self.save(like)
            return like
        self.done, arrays, about = self.checkpoints.read_newest(like)
        for name, value in self.args.items():
            then = about["args"].get(name, value)
            may_differ = name in WHERE_IT_RUNS or name.startswith("eval")
            if then != value and not may_differ:
                raise UsageError(f"{self.path}: its checkpoint was made with {name} {then}, its args.json says {value}")
        self.seconds = about["seconds"]
        if not self.only_read:
            self.log.resume(about["columns"], self.done, self.seeds)
        names = iter(stored(like))
        return jax.tree.map(lambda x: arrays[next(names)] if x.size else x, like)

    def compiled(self, updates: int, steps: int) -> None:
        """The updates begin: how many in all, and environment steps of one agent in each."""
        self.updates = updates
        self.steps = steps
        self.stopped = bool(self.signals)
        self.compile_seconds = time.perf_counter() - self.began
        self.progress = Progress(self.done, updates, steps * len(self.seeds))

    def update(self, state: Any, metrics: dict[str, Any]) -> None:
        """An update is done: log its metrics, show progress, and save when due.

        metrics: arrays (S,) or a Mean of two. Saving is due at the end and on a stop, too.

        Raises FloatingPointError if a loss or the gradient is not finite; the newest checkpoint is
        from before it.
        """
        metrics = jax.tree.map(np.asarray, metrics)
        self.done += 1
        self.progress.count(self.done)
        for s, seed in enumerate(self.seeds):
            row: dict[str, Any] = {"update": self.done, "env_steps": self.done * self.steps, "seed": seed}
            row |= {name: value_of(metric, s) for name, metric in metrics.items()}
            self.log.add(row, self.progress.steps_per_second)
        seed = self.seeds[0]
        self.progress.show(self.done, self.log.last.get(seed), self.log.best.get(seed))
        self.stopped = bool(self.signals)  # one that comes while this is saved ends the next update
        due = self.done % self.flags.checkpoint_interval == 0
        if due or self.stopped or self.done == self.updates:
            self.save(state)

    def finish(self, **measured: Any) -> dict[str, Any]:
        """Write summary.json and learning_curve.png, and return the former.

        After a stop raises SystemExit instead.
        """
        if self.stopped:
            print(f"stopped; go on with: {self.resume_command()}")
            raise SystemExit(128 + self.signals[0])
        final = [self.log.last.get(seed) for seed in self.seeds]  # None for a seed of no episode
        best = [self.log.best.get(seed) for seed in self.seeds]
        summary: dict[str, Any] = {
            **self.about,
            "seeds": list(self.seeds),
            "env_steps": self.done * self.steps,
            "updates": self.done,
            "compile_seconds": self.compile_seconds,
            "run_seconds": self.elapsed(),
            "steps_per_second": self.progress.steps_per_second or self.measured_before(),
            "final_return": mean_of(final),
            "best_return": mean_of(best),
            "final_returns": final,
            "best_returns": best,
            **measured,
            **provenance(),
        }
        if self.writes:
            with writing(self.path / "summary.json", kept="checkpoints and metrics.csv are whole"):
                (self.path / "summary.json").write_text(json.dumps(summary, indent=2, allow_nan=False))
            rows, _ = read_rows(self.log.table, self.log.columns, self.done)
            draw(plot_learning_curves, {self.path.name: rows}, self.path / "learning_curve.png")
        best_return, final_return = (in_words(summary[name]) for name in ("best_return", "final_return"))
        print(f"best return {best_return}, final {final_return}: {self.path}")
        return summary

    def measured_before(self) -> float | None:
        """Steps a second of the process that ended this run, if it is resumed after its end."""
        with contextlib.suppress(OSError, ValueError):
            return json.loads((self.path / "summary.json").read_text()).get("steps_per_second")
        return None

    def resume_command(self) -> str:
        """What goes on with the run, to be pasted into a shell in whatever directory."""
        script = Path(__file__).resolve().with_name(self.about["script"] + ".py")
        words = [sys.executable, str(script), "--resume", str(self.path.resolve())]
        if self.flags.distributed:
            words += ["--distributed", "--num-devices", str(self.flags.num_devices)]
        return shlex.join(words)


def default_directory(args: Any, env: str, script: str) -> str:
    """runs/ENV__SCRIPT__ARCH__sSEED__TIME-RANDOM; the random part for runs that start together."""
    stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    return f"runs/{env[:100]}__{script}__{args.arch}__s{args.seed}__{stamp}"


def mean_of(values: Sequence[float | None]) -> float | None:
    """Mean of those that there are, None if there are none."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def in_words(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"


def value_of(metric: Any, seed: int) -> float | None:
    """A metric's value for a seed, by its place; None for a mean over nothing."""
    if not isinstance(metric, Mean):
        return metric[seed].item()
    if not metric.number[seed]:
        return None
    return (np.float32(metric.total[seed]) / np.float32(metric.number[seed])).item()


QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)


def report_evaluation(run: RunDirectory, env: str, returns: np.ndarray) -> None:
    """Print what was evaluated, and keep it as RUN_DIR/eval.csv; a row for each seed.

    Mean, standard error and quantiles. Raises RunError.

    returns: of every episode, float (S, E)
    """
    rows = []
    for seed, own in zip(run.seeds, returns, strict=True):
        mean = own.mean()
        error = own.std() / math.sqrt(len(own) - 1)
        quantiles = {f"{q:.0%}": np.quantile(own, q) for q in QUANTILES}
        spread = ", ".join(f"{name} {value:.4f}" for name, value in quantiles.items())
        about = f"{env}, seed {seed}, update {run.done}, {len(own)} episodes: mean {mean:.4f}"
        print(f"{about}, standard error {error:.4f}, quantiles {spread}")
        row: dict[str, Any] = {
            "update": run.done,
            "seed": seed,
            "episodes": len(own),
            "return_mean": f"{mean:.6g}",
            "return_se": f"{error:.6g}",
        }
        row |= {f"quantile_{name}": f"{value:.6g}" for name, value in quantiles.items()}
        rows.append(row)
    if not run.writes:
        return
    table = run.path / "eval.csv"
    with writing(table, kept="the run is as it was"), table.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def draw(plot: Callable, runs: dict[str, Any], picture: Path) -> None:
    """``plot(runs, picture)``, names drawn as they are: a $ is no mathematics.

    A failure is a warning, not an error.
    """
    try:
        with rc_context({"text.parse_math": False}):
            plot(runs, picture)
    except Exception as error:  # whatever a font, a name or the disk may bring
        warn(f"{picture} could not be drawn ({shortened(error)})")


def plot_learning_curves(runs: dict[str, list[dict[str, Any]]], picture: Path) -> None:
    """Mean episodic return against environment steps, a line for each run.

    Of a run with several seeds it is their mean at each step, in a band from the lowest to the
    highest; seeds in which no episode had ended there are left out.

    runs: the rows of each run's metrics.csv.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for label, rows in runs.items():
        returns: dict[float, list[float]] = {}  # of the seeds, by environment steps
        for row in rows:
            if row["return_mean"] not in (None, ""):
                returns.setdefault(float(row["env_steps"]), []).append(float(row["return_mean"]))
        x = sorted(returns)
        seeds = sorted({int(row["seed"]) for row in rows})
        name = label.lstrip("_")  # _ would hide it
        if len(seeds) == 1:
            name += f", seed {seeds[0]}"
        else:
            name += f", mean and range of {len(seeds)} seeds"
        (line,) = axes.plot(x, [np.mean(returns[step]) for step in x], linewidth=1, label=name)
        if len(seeds) > 1:
            low = [min(returns[step]) for step in x]
            high = [max(returns[step]) for step in x]
            axes.fill_between(x, low, high, color=line.get_color(), alpha=0.2)
    axes.set(xlabel="environment steps", ylabel="mean episodic return")
    axes.legend(fontsize="small")
    figure.savefig(picture, dpi=150)


class Frame(NamedTuple):
    """A picture of an animation: the world and, beside it, what the agent sees."""

    draw_world: Callable[[Axes], None] | None  # None where there is no picture of the world
    seen: np.ndarray  # float (n,)
    title: str


def save_animation(frames: Sequence[Frame], picture: Path) -> None:
    """A GIF of the frames, or of every n-th one, so that there are at most 300. Raises RunError."""
    seen = np.concatenate([frame.seen for frame in frames])
    limit = np.quantile(np.abs(seen), 0.95) + 1e-6  # a flag or a fast turn would make all else tiny
    figure = Figure(figsize=(5, 2.5))
    draft = picture.with_suffix(".draft.gif")
    with writing(picture, kept="the run is as it was"):
        try:
            writer = PillowWriter(fps=20)
            writer.setup(figure, draft, dpi=60)
            for frame in frames[:: math.ceil(len(frames) / 300)]:
                draw_frame(figure, frame, limit)
                writer.grab_frame()
            writer.finish()
            draft.replace(picture)
        finally:
            draft.unlink(missing_ok=True)


def draw_frame(figure: Figure, frame: Frame, limit: float) -> None:
    """limit: the longest bar that is shown whole."""
    figure.clear()
    figure.suptitle(frame.title, fontsize="small")
    columns = 2 if frame.draw_world else 1
    if frame.draw_world:
        frame.draw_world(figure.add_subplot(1, columns, 1))
    axes = figure.add_subplot(1, columns, columns)
    axes.bar(np.arange(len(frame.seen)), frame.seen, color="tab:green")
    axes.set(ylim=(-limit, limit), xticks=[])
    axes.set_xlabel("what the agent sees", fontsize="small")
    axes.tick_params(labelsize="small")
