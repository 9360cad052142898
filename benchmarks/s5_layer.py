"""How fast is the S5 stack? This project's path, the paper's form and a GRU, timed in turn in one run.

    python benchmarks/s5_layer.py                          # some minutes on 2 idle CPU cores
    python benchmarks/s5_layer.py --lengths 1024 --json s5_layer.json

Three contenders read the same input (T, B, H):

    ours    the memory of ppo_s5_popgym.py: a reset multiplies the transition by zero, complex
            products are real matrix products, the loop over time has a hand-written gradient,
            acting discretises once
    paper   S5 as Lu et al. 2023, section 3.1, write it: for each sequence a complex associative
            scan of three-part elements under the operator ⊕, the stored state put before them as
            one more element, complex B and C, discretised in every call; to act is to scan a
            sequence of one step
    gru     a GRU of the same width. ONE layer, as in the paper, beside a stack of several S5 layers

ours and paper share their parameters; before anything is timed, their outputs and gradients have
to agree.
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


# ---- The paper's form ----------------------------------------------------------------------------


def paper_parameters(params: list) -> list[dict[str, Any]]:
    """Our parameters, or gradients with respect to them, in the paper's form: entries only move.

    B_tilde becomes B (P, H, 2), C_tilde becomes C (H, P, 2), real and imaginary parts last.
    """
    layers = []
    for ours in params:
        layer = dict(ours)
        P = layer["log_step"].shape[0]
        B = layer.pop("B_tilde")
        C = layer.pop("C_tilde")
        layer["B"] = jnp.stack([B[:, :P].T, B[:, P:].T], axis=-1)
        layer["C"] = jnp.stack([C[:P].T, C[P:].T], axis=-1)
        layers.append(layer)
    return layers


Element = tuple[Array, Array, Array]  # transition, drive, reset


def oplus(a: Element, b: Element) -> Element:
    """a ⊕ b, a earlier than b. Lu et al. 2023, section 3.1."""
    a_transition, a_drive, a_reset = a
    b_transition, b_drive, b_reset = b
    transition = jnp.where(b_reset, b_transition, b_transition * a_transition)
    drive = jnp.where(b_reset, b_drive, b_transition * a_drive + b_drive)
    return transition, drive, a_reset | b_reset


def paper_ssm(Lambda_bar: Array, B_bar: Array, C: Array, state: Array, u: Array, start: Array) -> tuple[Array, Array]:
    """One sequence through x_k = Lambda_bar x_{k-1} + B_bar u_k with resets, y_k = 2 Re(C x_k).

    Lambda_bar (P,), B_bar (P, H), C (H, P), the state before the sequence (P,), all complex;
    u float (T, H); start bool (T,). Returns the last state (P,) and y (T, H).
    """
    drive = jax.vmap(lambda u_k: B_bar @ u_k)(u)  # (T, P)
    transition = jnp.broadcast_to(Lambda_bar, drive.shape)
    # the state goes first, as one more element
    elements = (
        jnp.concatenate([jnp.ones_like(state)[None], transition]),
        jnp.concatenate([state[None], drive]),
        jnp.concatenate([jnp.zeros((1, 1), bool), start[:, None]]),
    )
    _, states, _ = lax.associative_scan(oplus, elements)  # (1 + T, P)
    x = states[1:]
    y = jax.vmap(lambda x_k: 2 * (C @ x_k).real)(x)
    return x[-1], y


def paper_scan(params: list, carry: list, x: Array, start: Array) -> tuple[list, Array]:
    """The stack: x float (T, B, H), start float (T, B), carry complex (B, P) for each layer."""
    states = []
    for layer, state in zip(params, carry, strict=True):
        Lambda = lax.complex(layer["Lambda_re"], layer["Lambda_im"])
        B = lax.complex(layer["B"][..., 0], layer["B"][..., 1])
        C = lax.complex(layer["C"][..., 0], layer["C"][..., 1])
        Lambda_bar, B_bar = common.discretize_zoh(Lambda, B, jnp.exp(layer["log_step"]))
        ssm = partial(paper_ssm, Lambda_bar, B_bar, C)
        state, y = jax.vmap(ssm, in_axes=(0, 1, 1), out_axes=(0, 1))(state, x, start > 0)
        states.append(state)
        y = nn.gelu(y + layer["D"] * x)
        value = y @ layer["value"]["kernel"] + layer["value"]["bias"]
        gate = y @ layer["gate"]["kernel"] + layer["gate"]["bias"]
        x = x + value * nn.sigmoid(gate)
    return states, x


def paper_act(params: list, carry: list, x: Array, start: Array) -> tuple[list, Array]:
    """Step by step: each step is a scan of length 1, discretisation included."""

    def step(carry, inputs):
        x, start = inputs
        carry, y = paper_scan(params, carry, x[None], start[None])
        return carry, y[0]

    return lax.scan(step, carry, (x, start))


# ---- This project's memories, as lists of layers -------------------------------------------------


def layers_scan(layers: list[nn.Module], params: list, carry: list, x: Array, start: Array) -> tuple[list, Array]:
    """The stack: x float (T, B, H), start float (T, B)."""
    carry = list(carry)
    for i, layer in enumerate(layers):
        carry[i], x = layer.apply({"params": params[i]}, carry[i], x, start, method="scan")
    return carry, x


def layers_act(layers: list[nn.Module], params: list, carry: list, x: Array, start: Array) -> tuple[list, Array]:
    """Step by step, as ppo_s5_popgym.collect_rollout: what does not change is computed once."""
    bound = [layer.bind({"params": p}) for layer, p in zip(layers, params, strict=True)]
    kernels = [layer.kernels() for layer in bound]

    def step(carry, inputs):
        x, start = inputs
        carry = list(carry)
        for i, layer in enumerate(bound):
            carry[i], x = layer.step(kernels[i], carry[i], x, start)
        return carry, x

    return lax.scan(step, carry, (x, start))


# ---- What is timed -------------------------------------------------------------------------------


class Contender(NamedTuple):
    """A way to read a sequence.

    scan and act are called with (params, carry, x, start) and return carry, y.
    """

    scan: Callable
    act: Callable
    params: list
    carry: list


def forward(contender: Contender, params: list, carry: list, x: Array, start: Array) -> Array:
    _, y = contender.scan(params, carry, x, start)
    return y


def gradient(contender: Contender, params: list, carry: list, x: Array, start: Array) -> tuple[list, Array]:
    """Of a scalar loss with respect to parameters and input."""

    def loss(params, x):
        return jnp.mean(forward(contender, params, carry, x, start) ** 2)

    return jax.grad(loss, argnums=(0, 1))(params, x)


def acting(contender: Contender, params: list, carry: list, x: Array, start: Array) -> Array:
    _, y = contender.act(params, carry, x, start)
    return y


KINDS = {"forward": forward, "forward+backward": gradient, "acting": acting}


def make_contenders(model: ppo.Args, batch: int) -> dict[str, Contender]:
    """ours and paper have the same parameters and the same carry, which is not zero."""

    def make(layers):
        keys = jax.random.split(jax.random.key(0), len(layers))
        x = jnp.zeros((1, batch, model.s5_width))
        start = x[..., 0]
        carry = []
        params = []
        for layer, key in zip(layers, keys, strict=True):
            state = jax.random.normal(key, layer.initial_carry(batch).shape)
            init = jax.jit(partial(layer.init, method="scan"))
            carry.append(state)
            params.append(init(key, state, x, start)["params"])
        return Contender(
            scan=partial(layers_scan, layers),
            act=partial(layers_act, layers),
            params=params,
            carry=carry,
        )

    ours = make([ppo.S5Layer(model) for _ in range(model.s5_layers)])
    paper = Contender(
        scan=paper_scan,
        act=paper_act,
        params=paper_parameters(ours.params),
        carry=[common.packed_to_complex(state) for state in ours.carry],
    )
    gru = make([common.Recurrent(model.s5_width, nn.GRUCell)])
    return {"ours": ours, "paper": paper, "gru": gru}


def stack_flops(model: ppo.Args, tokens: int) -> int:
    """Floating point operations of the matrix products of one forward pass over M = T B tokens.

    A layer has four, of 2 M N K each: B_bar (K = H, N = 2P), C (2P, H), W1 and W2 (H, H). The
    backward pass has two for each of them, for the gradient of the input and of the weight: twice
    the forward pass. What is no matrix product (the recurrence, GELU, the gate) counts nothing.
    """
    H = model.s5_width
    P = model.s5_state
    B_bar = 2 * tokens * H * 2 * P
    C = 2 * tokens * 2 * P * H
    W1_and_W2 = 2 * (2 * tokens * H * H)
    return model.s5_layers * (B_bar + C + W1_and_W2)


def largest_difference(ours: Any, paper: Any) -> float:
    """Of any array, relative to the largest value in it."""

    def relative(a, b):
        return jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b))

    differences = jax.tree.map(relative, ours, paper)
    return max(difference.item() for difference in jax.tree.leaves(differences))


def measure(args: Args, model: ppo.Args, contenders: dict[str, Contender], kind: str, T: int) -> dict[str, Any]:
    """One row, in seconds: all contenders compiled, compared, timed in turn with a matrix product."""
    x = jax.random.normal(jax.random.key(1), (T, args.batch, model.s5_width))
    start = jax.random.bernoulli(jax.random.key(2), args.resets, (T, args.batch))
    start = start.astype(jnp.float32)
    side = 256 if args.quick else 2048
    square = jax.random.normal(jax.random.key(3), (side, side))

    matmul, _ = timed_compile(jnp.matmul, square, square)
    calls: dict[str, Callable] = {"matmul": partial(matmul, square, square)}
    compiling = {}
    for name, contender in contenders.items():
        operands = (contender.params, contender.carry, x, start)
        compiled, seconds = timed_compile(partial(KINDS[kind], contender), *operands)
        calls[name] = partial(compiled, *operands)
        compiling[name] = {"median": seconds, "minimum": seconds}

    ours = calls["ours"]()
    paper = calls["paper"]()
    if kind == "forward+backward":
        of_params, of_input = ours
        ours = (paper_parameters(of_params), of_input)
    difference = largest_difference(ours, paper)
    if not difference <= args.tolerance:
        raise SystemExit(f"{kind}, T={T}: ours and the paper's form differ by {difference:.1e}")

    taken = time_in_turn(calls, args.repeats)
    timings = {name: timing._asdict() for name, timing in taken.items()}
    passes = {"forward": 1, "forward+backward": 3}.get(kind)
    matmul_flops = 2 * square.size * side
    return {
        "kind": kind,
        "T": T,
        "difference": difference,
        "flops": stack_flops(model, T * args.batch) * passes if passes else None,
        "peak": matmul_flops / timings.pop("matmul")["minimum"],  # FLOP/s
        "run": timings,
        "compile": compiling,
    }


def add_shares(rows: list[dict[str, Any]]) -> None:
    """The shares of the machine's peak, which is the fastest of all the big products of the run."""
    peak = max(row["peak"] for row in rows)
    for row in rows:
        for phase in ("run", "compile"):
            times = {name: timing["median"] for name, timing in row[phase].items()}
            row[f"{phase}_over_ours"] = {
                "paper": times["paper"] / times["ours"],
                "gru": times["gru"] / times["ours"],
            }
        if row["flops"]:
            row["share_of_peak"] = {
                which: row["flops"] / seconds / peak for which, seconds in row["run"]["ours"].items()
            }


HEADER = ("", "T", "ours", "paper", "gru", "paper/ours", "gru/ours", "share of peak")


def run_cells(row: dict[str, Any], unit: str, scale: float) -> list[str]:
    """A line of the table for the time of a run: times and shares as median (minimum)."""
    times = []
    for timing in row["run"].values():
        median = timing["median"] * scale
        minimum = timing["minimum"] * scale
        times.append(f"{median:.1f} ({minimum:.1f})")
    ratios = [f"{ratio:.2f}x" for ratio in row["run_over_ours"].values()]
    share = ""
    if "share_of_peak" in row:
        median = row["share_of_peak"]["median"]
        minimum = row["share_of_peak"]["minimum"]
        share = f"{median:.0%} ({minimum:.0%})"
    return [f"{row['kind']}, {unit}", str(row["T"]), *times, *ratios, share]


def compile_cells(row: dict[str, Any]) -> list[str]:
    """A line of the table for the time of compiling, which happens once."""
    times = [f"{timing['median']:.2f}" for timing in row["compile"].values()]
    ratios = [f"{ratio:.2f}x" for ratio in row["compile_over_ours"].values()]
    return [f"compile {row['kind']}, s", str(row["T"]), *times, *ratios, ""]


def main() -> None:
    args = tyro.cli(Args)
    model = ppo.Args(**ppo.PRESETS["paper"])
    if args.quick:
        args = replace(args, lengths=(16,), batch=2, acting_steps=8, repeats=2)
        model = replace(model, s5_layers=2, s5_width=32, s5_state=16)
    contenders = make_contenders(model, args.batch)
    plan = [(kind, T) for kind in ("forward", "forward+backward") for T in args.lengths]
    plan.append(("acting", args.acting_steps))
    # no TF32 on GPUs, whose rounding would hide a difference
    with jax.default_matmul_precision("float32"):
        rows = [measure(args, model, contenders, kind, T) for kind, T in plan]
    add_shares(rows)

    shape = {
        "layers": model.s5_layers,
        "H": model.s5_width,
        "P": model.s5_state,
        "B": args.batch,
    }
    sizes = ", ".join(f"{name} {size}" for name, size in shape.items())
    about = machine()
    product = "tiny" if args.quick else "big"
    peak = max(row["peak"] for row in rows)
    difference = max(row["difference"] for row in rows)
    print(f"S5 stack, {sizes} float32; gru: 1 layer; {about['device']}")
    print(f"median (minimum) of {args.repeats} rounds;", end=" ")
    print(f"a {product} float32 matrix product reaches {peak / 1e9:.0f} GFLOP/s;", end=" ")
    print(f"ours and paper agree to {difference:.0e}\n")
    table = [run_cells(row, "ms", 1e3) for row in rows]
    table.append(run_cells(rows[-1], "µs a step", 1e6 / args.acting_steps))
    table += [compile_cells(row) for row in rows]
    print_table(HEADER, table)

    if args.json:
        result = {
            "shape": shape,
            "gru_layers": 1,
            "args": vars(args),
            "peak_flops": peak,
            "rows": rows,
            **about,
        }
        save_json(args.json, result)


if __name__ == "__main__":
    main()
