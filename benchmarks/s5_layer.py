"""How fast is the S5 stack? This project's path, the paper's form and a GRU, timed in turn in one run.

    python benchmarks/s5_layer.py                          # some minutes on 2 idle CPU cores
    python benchmarks/s5_layer.py --lengths 1024 --json s5_layer.json

Three contenders read the same input (T, B, H):

    ours    the memory of ppo_s5_popgym.py: a reset multiplies the transition by zero, complex products are real
            matrix products, the loop over time has a hand-written gradient, acting discretises once
    paper   S5 as Lu et al. 2023, section 3.1, write it: for each sequence a complex associative scan of three-part
            elements under the operator ⊕, the stored state put before them as one more element, complex B and C,
            discretised in every call; to act is to scan a sequence of one step
    gru     a GRU of the same width. ONE layer, as in the paper, beside a stack of several S5 layers

ours and paper share their parameters; before anything is timed, their outputs and gradients have to agree.
Shapes: T time, B environments, H model width, P complex states.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import tyro
from jax import Array, lax

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ppo_s5_popgym as ppo
import s5_common as common
from benchmarks.timing import machine, print_table, save_json, time_in_turn, timed_compile


@dataclass(frozen=True)
class Args:
    """Time the S5 stack of the paper preset against the paper's form and a GRU."""

    lengths: tuple[int, ...] = (128, 256, 512, 1024, 2048)
    """sequence lengths T of forward and backward"""
    batch: int = 8
    """sequences B, the paper's minibatch"""
    acting_steps: int = 1024
    """steps of acting"""
    repeats: int = 15
    """timed rounds; each runs every contender once"""
    resets: float = 0.01
    """share of the steps that open an episode"""
    tolerance: float = 1e-4
    """largest difference between ours and paper, relative to the largest value"""
    json: str = ""
    """file for all numbers"""
    quick: bool = False
    """tiny sizes: only shows that the script works"""


# ---- The paper's form ------------------------------------------------------------------------------------------------


def paper_parameters(params: list) -> list[dict[str, Any]]:
    """Our parameters, or gradients with respect to them, with B as (P, H, 2) and C as (H, P, 2): entries only move."""
    layers = []
    for layer in map(dict, params):
        B, C, P = layer.pop("B_tilde"), layer.pop("C_tilde"), layer["log_step"].shape[0]
        layer["B"] = jnp.stack([B[:, :P].T, B[:, P:].T], axis=-1)
        layer["C"] = jnp.stack([C[:P].T, C[P:].T], axis=-1)
        layers.append(layer)
    return layers


def oplus(a: tuple[Array, Array, Array], b: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    """a ⊕ b, a earlier than b; elements (transition, drive, reset). Lu et al. 2023, section 3.1."""
    transition = jnp.where(b[2], b[0], b[0] * a[0])
    return transition, jnp.where(b[2], b[1], b[0] * a[1] + b[1]), a[2] | b[2]


def paper_ssm(Lambda_bar: Array, B_bar: Array, C: Array, state: Array, u: Array, start: Array) -> tuple[Array, Array]:
    """One sequence through x_k = Lambda_bar x_{k-1} + B_bar u_k with resets, y_k = 2 Re(C x_k).

    Lambda_bar (P,), B_bar (P, H), C (H, P), the state before the sequence (P,), all complex; u float (T, H);
    start bool (T,). Returns the last state (P,) and y (T, H).
    """
    drive = jax.vmap(lambda u: B_bar @ u)(u)  # (T, P)
    elements = (
        jnp.concatenate([jnp.ones_like(state)[None], jnp.broadcast_to(Lambda_bar, drive.shape)]),
        jnp.concatenate([state[None], drive]),
        jnp.concatenate([jnp.zeros((1, 1), bool), start[:, None]]),
    )
    x = lax.associative_scan(oplus, elements)[1][1:]
    return x[-1], jax.vmap(lambda x: 2 * (C @ x).real)(x)


def paper_scan(params: list, carry: list, x: Array, start: Array) -> tuple[list, Array]:
    """The stack: x float (T, B, H), start float (T, B), carry complex (B, P) for each layer."""
    states = []
    for layer, state in zip(params, carry, strict=True):
        Lambda = lax.complex(layer["Lambda_re"], layer["Lambda_im"])
        B, C = (lax.complex(layer[name][..., 0], layer[name][..., 1]) for name in "BC")
        ssm = partial(paper_ssm, *common.discretize_zoh(Lambda, B, jnp.exp(layer["log_step"])), C)
        state, y = jax.vmap(ssm, in_axes=(0, 1, 1), out_axes=(0, 1))(state, x, start > 0)
        y = nn.gelu(y + layer["D"] * x)
        value, gate = (y @ layer[name]["kernel"] + layer[name]["bias"] for name in ("value", "gate"))
        x = x + value * nn.sigmoid(gate)
        states.append(state)
    return states, x


def paper_act(params: list, carry: list, x: Array, start: Array) -> tuple[list, Array]:
    """Step by step: each step is a scan of length 1, discretisation included."""

    def step(carry, inputs):
        carry, y = paper_scan(params, carry, inputs[0][None], inputs[1][None])
        return carry, y[0]

    return lax.scan(step, carry, (x, start))


# ---- This project's memories, as lists of layers ---------------------------------------------------------------------


def layers_scan(layers: list[nn.Module], params: list, carry: list, x: Array, start: Array) -> tuple[list, Array]:
    carry = list(carry)
    for i, layer in enumerate(layers):
        carry[i], x = layer.apply({"params": params[i]}, carry[i], x, start, method="scan")
    return carry, x


def layers_act(layers: list[nn.Module], params: list, carry: list, x: Array, start: Array) -> tuple[list, Array]:
    """Step by step, with what does not change between steps computed once, as ppo_s5_popgym.collect_rollout does."""
    layers = [layer.bind({"params": p}) for layer, p in zip(layers, params, strict=True)]
    kernels = [layer.kernels() for layer in layers]

    def step(carry, inputs):
        (x, start), carry = inputs, list(carry)
        for i, layer in enumerate(layers):
            carry[i], x = layer.step(kernels[i], carry[i], x, start)
        return carry, x

    return lax.scan(step, carry, (x, start))


# ---- What is timed ---------------------------------------------------------------------------------------------------


class Contender(NamedTuple):
    """A way to read a sequence: scan and act are called with (params, carry, x, start) and return carry, y."""

    scan: Callable
    act: Callable
    params: list
    carry: list


def forward(contender: Contender, params: list, carry: list, x: Array, start: Array) -> Array:
    return contender.scan(params, carry, x, start)[1]


def gradient(contender: Contender, params: list, carry: list, x: Array, start: Array) -> tuple[list, Array]:
    """Of a scalar loss with respect to parameters and input."""
    return jax.grad(lambda p, x: jnp.mean(forward(contender, p, carry, x, start) ** 2), argnums=(0, 1))(params, x)


def acting(contender: Contender, params: list, carry: list, x: Array, start: Array) -> Array:
    return contender.act(params, carry, x, start)[1]


KINDS = {"forward": forward, "forward+backward": gradient, "acting": acting}


def make_contenders(model: ppo.Args, batch: int) -> dict[str, Contender]:
    """ours and paper have the same parameters and the same carry, which is not zero."""

    def make(layers):
        scan, act = partial(layers_scan, layers), partial(layers_act, layers)
        keys, x = jax.random.split(jax.random.key(0), len(layers)), jnp.zeros((1, batch, model.s5_width))
        carry = [layer.initial_carry(batch) for layer in layers]
        carry = [jax.random.normal(key, c.shape) for key, c in zip(keys, carry, strict=True)]
        init = [partial(layer.init, method="scan") for layer in layers]
        params = [jax.jit(f)(k, c, x, x[..., 0])["params"] for f, k, c in zip(init, keys, carry, strict=True)]
        return Contender(scan, act, params, carry)

    ours = make([ppo.S5Layer(model) for _ in range(model.s5_layers)])
    paper_carry = [common.packed_to_complex(state) for state in ours.carry]
    paper = Contender(paper_scan, paper_act, paper_parameters(ours.params), paper_carry)
    return {"ours": ours, "paper": paper, "gru": make([common.Recurrent(model.s5_width, nn.GRUCell)])}


def stack_flops(model: ppo.Args, tokens: int) -> int:
    """Floating point operations of the matrix products of one forward pass, 2 M N K each, over M = T B tokens.

    A layer has four: B_bar (K = H, N = 2P), C (2P, H), W1 and W2 (H, H). The backward pass has two for each of them,
    for the gradient of the input and of the weight: twice the forward pass. What is no matrix product (the
    recurrence, GELU, the gate) counts nothing.
    """
    H, P = model.s5_width, model.s5_state
    return model.s5_layers * (2 * tokens * H * 2 * P + 2 * tokens * 2 * P * H + 2 * (2 * tokens * H * H))


def largest_difference(ours: Any, paper: Any) -> float:
    """Of any array, relative to the largest value in it."""
    differences = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)), ours, paper)
    return max(d.item() for d in jax.tree.leaves(differences))


def measure(args: Args, model: ppo.Args, contenders: dict[str, Contender], kind: str, T: int) -> dict[str, Any]:
    """One row: compile all contenders, compare ours with paper, time them and a big matrix product in turn. Seconds."""
    x = jax.random.normal(jax.random.key(1), (T, args.batch, model.s5_width))
    start = jax.random.bernoulli(jax.random.key(2), args.resets, (T, args.batch)).astype(jnp.float32)
    square = jax.random.normal(jax.random.key(3), (256, 256) if args.quick else (2048, 2048))
    calls: dict[str, Callable] = {"matmul": partial(timed_compile(jnp.matmul, square, square)[0], square, square)}
    compile_seconds = {}
    for name, contender in contenders.items():
        operands = (contender.params, contender.carry, x, start)
        compiled, compile_seconds[name] = timed_compile(partial(KINDS[kind], contender), *operands)
        calls[name] = partial(compiled, *operands)
    ours, paper = calls["ours"](), calls["paper"]()
    if kind == "forward+backward":
        ours = paper_parameters(ours[0]), ours[1]
    difference = largest_difference(ours, paper)
    if not difference <= args.tolerance:
        raise SystemExit(f"{kind}, T={T}: ours and the paper's form differ by {difference:.1e}")
    timings = {name: timing._asdict() for name, timing in time_in_turn(calls, args.repeats).items()}
    passes = {"forward": 1, "forward+backward": 3}.get(kind)
    flops = stack_flops(model, T * args.batch) * passes if passes else None
    peak = 2 * square.size * len(square) / timings.pop("matmul")["minimum"]  # FLOP/s
    row = {"kind": kind, "T": T, "difference": difference, "flops": flops, "peak": peak, "run": timings}
    return row | {"compile": {name: {"median": s, "minimum": s} for name, s in compile_seconds.items()}}


def add_shares(rows: list[dict[str, Any]]) -> None:
    """The shares of the machine's peak, which is the fastest of all the big products of the run."""
    peak = max(row["peak"] for row in rows)
    for row in rows:
        for phase in ("run", "compile"):
            times = {name: timing["median"] for name, timing in row[phase].items()}
            row[f"{phase}_over_ours"] = {name: times[name] / times["ours"] for name in ("paper", "gru")}
        if row["flops"]:
            row["share_of_peak"] = {k: row["flops"] / seconds / peak for k, seconds in row["run"]["ours"].items()}


def cells(row: dict[str, Any], phase: str, unit: str, scale: float) -> list[str]:
    """A line of the table: times as median (minimum)."""
    digits = 2 if phase == "compile" else 1
    times = [[f"{seconds * scale:.{digits}f}" for seconds in timing.values()] for timing in row[phase].values()]
    ratios = [f"{ratio:.2f}x" for ratio in row[f"{phase}_over_ours"].values()]
    share = [f"{s:.0%}" for s in row.get("share_of_peak", {}).values()] if phase == "run" else []
    shown = [t[0] if phase == "compile" else "{} ({})".format(*t) for t in times]
    label = f"{'compile ' * (phase == 'compile')}{row['kind']}, {unit}"
    return [label, str(row["T"]), *shown, *ratios, "{} ({})".format(*share) if share else ""]


def main() -> None:
    args, model = tyro.cli(Args), ppo.Args(**ppo.PRESETS["paper"])
    if args.quick:
        args = replace(args, lengths=(16,), batch=2, acting_steps=8, repeats=2)
        model = replace(model, s5_layers=2, s5_width=32, s5_state=16)
    contenders = make_contenders(model, args.batch)
    plan = [(kind, T) for kind in ("forward", "forward+backward") for T in args.lengths]
    with jax.default_matmul_precision("float32"):  # no TF32 on GPUs, whose rounding would hide a difference
        rows = [measure(args, model, contenders, *what) for what in [*plan, ("acting", args.acting_steps)]]
    add_shares(rows)
    shape = {"layers": model.s5_layers, "H": model.s5_width, "P": model.s5_state, "B": args.batch}
    about, peak = machine(), max(row["peak"] for row in rows)
    print("S5 stack,", ", ".join(f"{k} {v}" for k, v in shape.items()), f"float32; gru: 1 layer; {about['device']}")
    print(
        f"median (minimum) of {args.repeats} rounds; a {'tiny' if args.quick else 'big'} float32 matrix product",
        end=" ",
    )
    print(f"reaches {peak / 1e9:.0f} GFLOP/s; ours and paper agree to {max(r['difference'] for r in rows):.0e}\n")
    table = [cells(row, "run", "ms", 1e3) for row in rows]
    table += [cells(rows[-1], "run", "µs a step", 1e6 / args.acting_steps)]
    table += [cells(row, "compile", "s", 1.0) for row in rows]
    print_table(("", "T", "ours", "paper", "gru", "paper/ours", "gru/ours", "share of peak"), table)
    if args.json:
        result = {"shape": shape, "gru_layers": 1, "args": vars(args), "peak_flops": peak, "rows": rows}
        save_json(args.json, result | about)


if __name__ == "__main__":
    main()
