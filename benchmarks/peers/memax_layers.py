"""memax's layers: forward, backward, acting. Runs in memax's environment, started by run.py.

memax has no S5 under that name; its LRU is the nearest. Its layers are of one sequence each and
are put over the batch with vmap, as its documentation does. Its checks of shapes are off: those of its
LRU demand as many states as the layer is wide.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ["JAXTYPING_DISABLE"] = "1"  # before memax is imported

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from memax.equinox.semigroups.lru import LRU
from memax.equinox.set_actions.gru import GRU
from memax.equinox.set_actions.lstm import LSTM
from memax.equinox.train_utils import add_batch_dim

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.peers.worker import Worker


def make_layer(settings: dict[str, Any]) -> eqx.Module:
    """recurrent_size of the LRU: complex states, our P."""
    key = jax.random.key(0)
    width = settings["s5_width"]
    if settings["layer"] == "lru":
        return LRU(recurrent_size=settings["s5_state"], hidden_size=width, key=key)
    return {"gru": GRU, "lstm": LSTM}[settings["layer"]](recurrent_size=width, key=key)


def forward(layer: Any, carry: Any, x: jax.Array, start: jax.Array) -> tuple[Any, jax.Array]:
    """x float (B, T, H), start bool (B, T), carry with a leading B; the last state and y (B, T, H)."""
    states, y = jax.vmap(layer)(carry, (x, start))
    return jax.vmap(layer.latest_recurrent_state)(states), y


def output(layer: Any, carry: Any, x: jax.Array, start: jax.Array) -> jax.Array:
    _, y = forward(layer, carry, x, start)
    return y


def gradient(layer: Any, carry: Any, x: jax.Array, start: jax.Array) -> Any:
    """Of a scalar loss with respect to parameters and input."""

    def loss(differentiated):
        layer, x = differentiated
        return jnp.mean(output(layer, carry, x, start) ** 2)

    return eqx.filter_grad(loss)((layer, x))


def acting(layer: Any, carry: Any, x: jax.Array, start: jax.Array) -> jax.Array:
    """Step by step, each a sequence of one."""

    def step(carry, inputs):
        x, start = inputs  # (B, H), (B,)
        carry, y = forward(layer, carry, x[:, None], start[:, None])
        return carry, y[:, 0]

    steps = (x.swapaxes(0, 1), start.swapaxes(0, 1))
    _, y = lax.scan(step, carry, steps)
    return y


KINDS: dict[str, Callable] = {"forward": output, "forward+backward": gradient, "acting": acting}


def main() -> None:
    worker = Worker()
    settings = worker.settings
    layer = make_layer(settings)
    params, static = eqx.partition(layer, eqx.is_array)
    carry = add_batch_dim(layer.initialize_carry(), settings["batch"])
    calls: dict[str, Callable[[], Any]] = {}
    compile_seconds = {}
    for name, kind, T in settings["plan"]:
        shape = (settings["batch"], T)
        x = jax.random.normal(jax.random.key(1), (*shape, settings["s5_width"]))
        start = jax.random.bernoulli(jax.random.key(2), settings["resets"], shape)

        def function(kind, params, *operands):
            return KINDS[kind](eqx.combine(params, static), *operands)

        operands = (params, carry, x, start)
        began = time.perf_counter()
        compiled = jax.jit(partial(function, kind)).lower(*operands).compile()
        compile_seconds[name] = time.perf_counter() - began
        calls[name] = lambda compiled=compiled, operands=operands: jax.block_until_ready(compiled(*operands))
    worker.serve(calls, compile_seconds, packages=("memax", "equinox", "jax"))


if __name__ == "__main__":
    main()
