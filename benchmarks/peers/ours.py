"""Ours, beside a peer: an update of ppo_s5_popgym.py, or a layer alone. Started by run.py."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import ppo_s5_popgym as ppo
import s5_common as common
from benchmarks import s5_layer
from benchmarks.peers.worker import Worker
from benchmarks.timing import timed_call, timed_compile

PACKAGES = ("jax", "flax")


# ---- A whole update of PPO -----------------------------------------------------------------------
class PaperS5(ppo.S5Layer):
    """S5 as Lu et al. 2023, section 3.1, write it: see s5_layer.py. Same parameters, same values.

    An associative scan of three-part elements under ⊕ for each sequence, discretised in every call;
    to act is to scan a sequence of one step.
    """

    def kernels(self) -> tuple:
        return ()

    def scan(self, carry: Array, u: Array, start: Array) -> tuple[Array, Array]:
        """u (T, B, H), start (T, B), carry (B, 2P)."""
        Lambda_bar, B_bar, _ = super().kernels()
        ssm = partial(
            s5_layer.paper_ssm,
            common.packed_to_complex(Lambda_bar),
            common.packed_to_complex(B_bar).T,
            common.packed_to_complex(self.C_tilde.T),
        )
        v = self.norm(u)
        state = common.packed_to_complex(carry)
        state, y = jax.vmap(ssm, in_axes=(0, 1, 1), out_axes=(0, 1))(state, v, start > 0)
        y = nn.gelu(y + self.D * v)
        return common.complex_to_packed(state), u + self.value(y) * nn.sigmoid(self.gate(y))

    def step(self, kernels: tuple, carry: Array, u: Array, start: Array) -> tuple[Array, Array]:
        carry, y = self.scan(carry, u[None], start[None])
        return carry, y[0]


def ppo_args(settings: dict[str, Any]) -> ppo.Args:
    """The flags that the settings name; all others as they are by default."""
    fields = ppo.Args.__dataclass_fields__
    flags = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
    return ppo.Args(**{name: value for name, value in flags.items() if name in fields})


def serve_ppo(worker: Worker) -> None:
    args = ppo_args(worker.settings)
    if worker.settings["form"] == "paper":
        ppo.make_memory = lambda args: [PaperS5(args) for _ in range(args.s5_layers)]
    setup = ppo.make_setup(args)
    runners = ppo.init_runners(setup)
    train_step, compile_seconds = timed_call(ppo.compile_update, setup, runners)

    def update():
        nonlocal runners
        runners, _ = jax.block_until_ready(train_step(runners))

    worker.serve({"update": update}, {"update": compile_seconds}, PACKAGES)


# ---- A layer alone -------------------------------------------------------------------------------
class BareS5(ppo.S5Layer):
    """What memax calls a layer: the recurrence between B and C, without GELU, gate and residual."""

    def output(self, u: Array, v: Array, x: Array, C: Array) -> Array:
        return x @ C + self.D * v


class BareLRU(common.LRU):
    """The same of our LRU; its normalisation is left out as well."""

    def setup(self):
        super().setup()
        self.norm = lambda u: u

    def output(self, u: Array, v: Array, x: Array) -> Array:
        return x @ self.C + self.D * v


def make_layer(args: ppo.Args, layer: str) -> Any:
    if layer == "s5":
        return BareS5(args)
    if layer == "lru":
        return BareLRU(args.s5_width, args.s5_state, args.s5_dt_min, args.s5_dt_max)
    return common.Recurrent(args.s5_width, {"gru": nn.GRUCell, "lstm": nn.OptimizedLSTMCell}[layer])


def serve_layer(worker: Worker) -> None:
    settings = worker.settings
    args = ppo_args(settings | {"s5_norm": False})
    layer = make_layer(args, settings["layer"])
    batch = settings["batch"]
    carry = layer.initial_carry(batch)
    x = jnp.zeros((1, batch, args.s5_width))
    params = layer.init(jax.random.key(0), carry, x, x[..., 0], method="scan")["params"]
    contender = s5_layer.Contender(
        scan=partial(s5_layer.layers_scan, [layer]),
        act=partial(s5_layer.layers_act, [layer]),
        params=[params],
        carry=[carry],
    )
    calls: dict[str, Callable[[], Any]] = {}
    compile_seconds = {}
    for name, kind, T in settings["plan"]:
        x = jax.random.normal(jax.random.key(1), (T, batch, args.s5_width))
        start = jax.random.bernoulli(jax.random.key(2), settings["resets"], (T, batch)).astype(jnp.float32)
        operands = (contender.params, contender.carry, x, start)
        compiled, compile_seconds[name] = timed_compile(partial(s5_layer.KINDS[kind], contender), *operands)
        calls[name] = partial(timed_call, compiled, *operands)
    worker.serve(calls, compile_seconds, PACKAGES)


def main() -> None:
    worker = Worker()
    if "layer" in worker.settings:
        serve_layer(worker)
    else:
        serve_ppo(worker)


if __name__ == "__main__":
    main()
