"""Where does the time of an update of ppo_s5_popgym.py go, and what bounds it?

    python benchmarks/profile_update.py                    # some minutes on 2 idle CPU cores
    python benchmarks/profile_update.py --preset paper --json profile.json

The whole rollout and the whole update are timed as the script has them, of one seed. Then parts of them are
timed alone, each jitted and repeated as often as in an update: acting's for T steps in B
environments, learning's, gradients included, for all minibatches of all epochs. All take turns, so
that a noisy moment hits all alike. What is left between the sum of the parts and the whole is
called "the rest"; it can be negative, as XLA may do parts together in less than it does them apart.

Beside the seconds stand the floating point operations of the matrix products, counted from the
sizes, and the share that they reach of the machine's peak: a big square product in the same run.
Two small products, of the shapes that acting and learning have, say how much of that peak products
of such sizes can reach at all.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import tyro
from jax import Array, lax

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ppo_s5_popgym as ppo
import s5_common as common
from benchmarks.ppo_throughput import TINY
from benchmarks.s5_layer import stack_flops
from benchmarks.timing import Timing, machine, print_table, save_json, time_in_turn, timed_compile


@dataclass(frozen=True)
class Args:
    """Profile an update of PPO with S5."""

    env: str = "RepeatPreviousHard"
    """environment"""

    preset: Literal["default", "paper"] = "default"
    """flag values"""

    epochs: int = 0
    """passes over a rollout, for a preset with many; 0: the preset's"""

    repeats: int = 7
    """timed rounds; each runs everything once"""

    json: str = ""
    """file for all numbers"""

    quick: bool = False
    """tiny sizes: only shows that the script works"""


# ---- Floating point operations -------------------------------------------------------------------
def dense_flops(tokens: int, widths: tuple[int, ...]) -> int:
    """Of the matrix products of dense layers, inputs and outputs in ``widths``: 2 M N K each."""
    return sum(2 * tokens * inputs * outputs for inputs, outputs in zip(widths, widths[1:], strict=False))


def forward_flops(network: ppo.ActorCritic, tokens: int) -> dict[str, int]:
    """Of the matrix products of one forward pass over M = T B tokens, by part of the network."""
    args = network.args
    H = args.s5_width
    actor = (H, *args.decoder_layers, network.num_actions)
    critic = (H, *args.decoder_layers, 1)
    return {
        "encoder": dense_flops(tokens, (network.num_inputs, *args.encoder_layers, H)),
        "memory": stack_flops(args, tokens),
        "decoders": dense_flops(tokens, actor) + dense_flops(tokens, critic),
    }


def gradient_flops(network: ppo.ActorCritic, tokens: int) -> dict[str, int]:
    """Of a forward and a backward pass.

    Backward there are two products for each forward one, for the gradient of the input and of the
    weight; of the agent's input there is no gradient.
    """
    flops = {name: 3 * count for name, count in forward_flops(network, tokens).items()}
    first_width = (*network.args.encoder_layers, network.args.s5_width)[0]
    flops["encoder"] -= dense_flops(tokens, (network.num_inputs, first_width))
    return flops


# ---- Parts of acting -----------------------------------------------------------------------------
class Part(NamedTuple):
    """Something that is timed alone."""

    name: str
    function: Callable
    operands: tuple
    flops: int = 0


def over_time(step: Callable) -> Callable:
    """``step(params, inputs)`` for every step of a rollout, in turn."""

    def run(params, inputs):
        _, outputs = lax.scan(lambda _, inputs: ((), step(params, inputs)), (), inputs)
        return outputs

    return run


def acting_parts(setup: ppo.Setup, runner: ppo.Runner, rollout: ppo.Rollout, h: Array) -> list[Part]:
    """Of one rollout; h (T, B, H): what the encoder, and the memory, might give."""
    network = setup.network
    flops = forward_flops(network, setup.args.batch_size)
    keys = jax.random.split(jax.random.key(0), setup.args.num_steps)

    def encode(params, obs):
        return network.apply(params, obs, method=lambda network, x: network.encoder(x))

    def decode(params, inputs):
        h, obs = inputs
        return network.apply(params, h, obs, method="decode")

    def remember(params, inputs):
        kernels = network.apply(params, method="kernels")

        def layers_step(network, carry, x, start):
            new_carry = []
            for layer, layer_kernels, layer_carry in zip(network.memory, kernels, carry, strict=True):
                layer_carry, x = layer.step(layer_kernels, layer_carry, x, start)
                new_carry.append(layer_carry)
            return new_carry, x

        def step(carry, inputs):
            return network.apply(params, carry, *inputs, method=layers_step)

        return lax.scan(step, runner.carry, inputs)

    def sample(params, inputs):
        policy, key = inputs
        action = policy.sample(key)
        return action, policy.log_prob(action)

    def environment(runner, inputs):
        """With the actions of the rollout; the input of the network is put together, too."""

        def step(runner, inputs):
            action, key = inputs
            env = ppo.step_envs(setup, key, runner.env_state, runner.obs, action)
            runner, _ = ppo.advance(setup, runner, action, env)
            return runner, (runner.obs, env.reward, runner.start)

        return lax.scan(step, runner, inputs)

    policy, _ = jax.jit(over_time(decode))(runner.params, (h, rollout.obs))
    return [
        Part("encoder", over_time(encode), (runner.params, rollout.obs), flops["encoder"]),
        Part("memory", remember, (runner.params, (h, rollout.start)), flops["memory"]),
        Part("decoders", over_time(decode), (runner.params, (h, rollout.obs)), flops["decoders"]),
        Part("sampling", over_time(sample), (runner.params, (policy, keys))),
        Part("environment", environment, (runner, (rollout.action, keys))),
    ]


# ---- Parts of learning ---------------------------------------------------------------------------
def over_minibatches(setup: ppo.Setup, function: Callable, differentiated: int) -> Callable:
    """Gradients of the mean square of ``function(params, *inputs)``, for all minibatches of all epochs.

    With respect to the parameters and the first ``differentiated`` inputs. A gradient step of no
    size keeps XLA from taking out of the loop what depends on the parameters alone.
    """

    def loss(params, inputs, others):
        return jnp.mean(function(params, *inputs, *others) ** 2)

    def minibatch(params, inputs):
        wanted = inputs[:differentiated]
        of_params, of_inputs = jax.grad(loss, argnums=(0, 1))(params, wanted, inputs[differentiated:])
        params = jax.tree.map(lambda p, g: p - 1e-12 * g, params, of_params)
        return params, of_inputs

    def run(params, inputs):
        def epoch(params, _):
            params, of_inputs = lax.scan(minibatch, params, inputs)
            return params, jax.tree.map(lambda g: g[-1], of_inputs)

        return lax.scan(epoch, params, length=setup.args.update_epochs)

    return run


def learning_parts(setup: ppo.Setup, runner: ppo.Runner, rollout: ppo.Rollout, h: Array) -> list[Part]:
    """Of all epochs; h (T, B, H): what the encoder, and the memory, might give."""
    args = setup.args
    network = setup.network
    flops = gradient_flops(network, args.batch_size * args.update_epochs)
    params = runner.params["params"]
    of_encoder = {"params": {"encoder": params["encoder"]}}
    of_decoders = {"params": {"actor": params["actor"], "critic": params["critic"]}}
    layer = ppo.S5Layer(args)
    layers = [params[f"memory_{i}"] for i in range(args.s5_layers)]

    def split(x):  # (T, B, ...) -> (minibatches, T, B / minibatches, ...)
        return jnp.stack(jnp.split(x, args.num_minibatches, axis=1))

    h = split(h)
    obs = split(rollout.obs)
    start = split(rollout.start)
    carry = jax.tree.map(lambda x: jnp.stack(jnp.split(x, args.num_minibatches)), runner.carry)

    def encode(params, obs):
        return network.apply(params, obs.reshape(-1, obs.shape[-1]), method=lambda network, x: network.encoder(x))

    def remember(layers, x, start, carry):
        for params, state in zip(layers, carry, strict=True):
            _, x = layer.apply({"params": params}, state, x, start, method="scan")
        return x

    def recur(Lambda_bars, drive, start, carry):
        total = 0.0
        for Lambda_bar, state in zip(Lambda_bars, carry, strict=True):
            total += common.linear_recurrence(Lambda_bar, drive, 1.0 - start, state)
        return total

    def gated(layer, x):
        y = nn.gelu(x.reshape(-1, args.s5_width))
        return x.reshape(-1, args.s5_width) + layer.value(y) * nn.sigmoid(layer.gate(y))

    def glu(layers, x):
        for params in layers:
            x = layer.apply({"params": params}, x, method=gated)
        return x

    def decode(params, h, obs):
        policy, value = network.apply(params, h, obs, method="decode_all")
        return jnp.concatenate([policy.mean, value[..., None]], axis=-1)

    def optimise(params, opt_state):
        def minibatch(learner, _):
            params, opt_state = learner
            norm = optax.tree.norm(params)
            updates, opt_state = setup.optimizer.update(params, opt_state, params)  # as large as gradients are
            return (optax.apply_updates(params, updates), opt_state), norm

        return lax.scan(minibatch, (params, opt_state), length=args.update_epochs * args.num_minibatches)

    def gather(rollout, key):
        def minibatch(total, environments):
            batch = jax.tree.map(lambda x: x[:, environments], rollout)
            return jax.tree.map(lambda total, x: total + x, total, batch), None

        order = [jax.random.permutation(k, args.num_envs) for k in jax.random.split(key, args.update_epochs)]
        parts = jnp.concatenate(order).reshape(args.update_epochs * args.num_minibatches, -1)
        zeros = jax.tree.map(lambda x: jnp.zeros_like(x[:, : parts.shape[1]]), rollout)
        return lax.scan(minibatch, zeros, parts)

    def gae(rollout, last_value):
        return ppo.compute_gae(args, rollout, rollout.reward, last_value)

    kernels = [layer.apply({"params": params}, method="kernels") for params in layers]
    Lambda_bars = [Lambda_bar for Lambda_bar, _, _ in kernels]
    drive = jnp.concatenate([h] * -(-2 * args.s5_state // args.s5_width), axis=-1)[..., : 2 * args.s5_state]
    gradients = partial(over_minibatches, setup)
    glu_flops = 3 * args.s5_layers * dense_flops(args.batch_size * args.update_epochs, (args.s5_width,) * 3)
    return [
        Part("encoder", gradients(encode, 0), (of_encoder, (obs,)), flops["encoder"]),
        Part("memory", gradients(remember, 1), (layers, (h, start, carry)), flops["memory"]),
        Part("of it recurrence", gradients(recur, 1), (Lambda_bars, (drive, start, carry))),
        Part("of it GELU and gate", gradients(glu, 1), (layers, (h,)), glu_flops),
        Part("decoders", gradients(decode, 1), (of_decoders, (h, obs)), flops["decoders"]),
        Part("optimiser", optimise, (runner.params, runner.opt_state)),
        Part("minibatches", gather, (rollout._replace(terminated=rollout.start, truncated=rollout.start), runner.key)),
        Part("advantages", gae, (rollout, rollout.value[-1])),
    ]


# ---- The machine ---------------------------------------------------------------------------------
def product_parts(setup: ppo.Setup, side: int) -> list[Part]:
    """A big square product, and products (M, H) @ (H, H) of M rows, as acting and learning have them.

    The small ones are repeated so often that the call itself does not count.
    """
    args = setup.args
    H = args.s5_width
    square = jax.random.normal(jax.random.key(0), (side, side))
    parts = [Part("big square product", jnp.matmul, (square, square), 2 * side**3)]
    weight = jnp.linalg.qr(jax.random.normal(jax.random.key(1), (H, H)))[0]  # keeps the size
    shapes = {
        "product as in acting": args.num_envs,
        "product as in learning": args.batch_size // args.num_minibatches,
    }
    for name, rows in shapes.items():
        times = max(1, 2**16 // rows)

        def repeat(x, weight, times=times):
            return lax.fori_loop(0, times, lambda _, x: x @ weight, x)

        x = jax.random.normal(jax.random.key(2), (rows, H))
        parts.append(Part(name, repeat, (x, weight), times * dense_flops(rows, (H, H))))
    return parts


# ---- Measuring -----------------------------------------------------------------------------------
def make_parts(setup: ppo.Setup, side: int) -> dict[str, list[Part]]:
    """All that is timed, by section; in acting and learning the whole comes first."""
    runners = ppo.init_runners(setup)
    runner = jax.tree.map(lambda leaf: leaf[0], runners)
    collect = partial(ppo.collect_rollout, setup)
    _, rollout, _ = jax.jit(collect)(runner)
    args = setup.args
    h = jax.random.normal(jax.random.key(3), (args.num_steps, args.num_envs, args.s5_width))
    acting_flops = sum(forward_flops(setup.network, args.batch_size).values())
    learning_flops = sum(gradient_flops(setup.network, args.batch_size * args.update_epochs).values())
    update = partial(ppo.update, setup)
    return {
        "machine": product_parts(setup, side),
        "acting": [
            Part("rollout", collect, (runner,), acting_flops),
            *acting_parts(setup, runner, rollout, h),
        ],
        "learning": [
            Part("update", update, (runner,), acting_flops + learning_flops),
            *learning_parts(setup, runner, rollout, h),
        ],
    }


def measure(sections: dict[str, list[Part]], repeats: int) -> dict[tuple[str, str], Timing]:
    """Seconds by section and name."""
    calls = {}
    for section, parts in sections.items():
        for part in parts:
            compiled, _ = timed_compile(part.function, *part.operands)
            calls[section, part.name] = partial(compiled, *part.operands)
    return time_in_turn(calls, repeats)


def rows_of(sections: dict[str, list[Part]], timings: dict[tuple[str, str], Timing]) -> list[dict[str, Any]]:
    """A row a part: seconds, share of its section's whole, FLOP/s and share of the peak.

    Learning is what an update takes beyond the rollout. The rest of a section is what its parts,
    those within the memory apart, leave of the whole.
    """
    big = sections["machine"][0]
    peak = big.flops / timings["machine", big.name].minimum
    rollout = timings["acting", "rollout"].median
    learning = timings["learning", "update"].median - rollout
    learning_flops = sections["learning"][0].flops - sections["acting"][0].flops

    def row(section, name, seconds, whole, flops):
        return {
            "section": section,
            "part": name,
            "seconds": seconds,
            "share": seconds / whole if whole else None,
            "flops": flops,
            "flops_per_second": flops / seconds if flops else None,
            "share_of_peak": flops / seconds / peak if flops else None,
        }

    rows = []
    for part in sections["machine"]:
        rows.append(row("machine", part.name, timings["machine", part.name].minimum, None, part.flops))
    wholes = {"acting": (rollout, sections["acting"][0].flops), "learning": (learning, learning_flops)}
    for section, (whole, flops) in wholes.items():
        rows.append(row(section, "all of it", whole, whole, flops))
        left = whole
        for part in sections[section][1:]:
            seconds = timings[section, part.name].median
            rows.append(row(section, part.name, seconds, whole, part.flops))
            if not part.name.startswith("of it"):
                left -= seconds
        rows.append(row(section, "the rest", left, whole, 0))
    return rows


HEADER = ("", "part", "ms", "share", "GFLOP", "GFLOP/s", "of peak")


def cells(row: dict[str, Any]) -> list[str]:
    """A line of the table."""
    counted = bool(row["flops"])
    return [
        row["section"],
        row["part"],
        f"{1e3 * row['seconds']:.4g}",
        "" if row["share"] is None else f"{row['share']:.0%}",
        f"{row['flops'] / 1e9:.3g}" if counted else "",
        f"{row['flops_per_second'] / 1e9:.3g}" if counted else "",
        f"{row['share_of_peak']:.0%}" if counted else "",
    ]


def make_setup(args: Args) -> ppo.Setup:
    flags = ppo.PRESETS[args.preset] | (TINY if args.quick else {}) | {"env": args.env}
    if args.epochs:
        flags["update_epochs"] = args.epochs
    return ppo.make_setup(ppo.Args(**flags))


def main() -> int:
    args = tyro.cli(Args)
    setup = make_setup(args)
    sections = make_parts(setup, side=256 if args.quick else 2048)
    rows = rows_of(sections, measure(sections, args.repeats))
    about = machine()
    sizes = {name: getattr(setup.args, name) for name in TINY if hasattr(setup.args, name)}
    print(f"an update of PPO on {args.env}, {args.preset} preset, {about['device']};", end=" ")
    print(f"medians of {args.repeats} rounds, of the products the fastest")
    print(f"  {', '.join(f'{name} {value}' for name, value in sizes.items())}\n")
    print_table(HEADER, [cells(row) for row in rows], labels=2)
    if args.json:
        save_json(args.json, {"args": vars(args), "sizes": sizes, "rows": rows, **about})
    return 0


if __name__ == "__main__":
    sys.exit(common.run_main(main))
