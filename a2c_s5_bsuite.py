"""Recurrent A2C with a resettable S5 layer on bsuite's memory, credit and exploration tasks, in one file.

Our implementation of Lu et al. 2023, "Structured State Space Models for In-Context Reinforcement Learning", 4.1: the
recurrent actor-critic of bsuite (Osband et al. 2020) with its LSTM exchanged for S5 or for self-attention.

    python a2c_s5_bsuite.py --memory-length 512                  # 42 seconds on 2 CPU cores
    python a2c_s5_bsuite.py --memory-length 512 --preset paper   # the paper's table: one environment, unroll 32

Shapes: T time, B environments, O observation features, A actions, H model width, P complex states of an S5 layer,
S seeds; time comes first, (T, B, ...). start is 1 where an observation opens an episode. All episodes of a bsuite task
have the same length, L steps, so the B environments begin and end theirs together, and no segment holds two episodes.
Departures from the paper are marked "Deviation" and listed in README.md.
"""

from __future__ import annotations

import csv
import math
import shutil
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.linen.initializers import lecun_normal, normal
from gymnax.environments.bsuite import bandit, catch, deep_sea, discounting_chain, memory_chain, umbrella_chain
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import s5_common as common

# ---- 2. Arguments ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Args:
    """A2C with S5 on bsuite."""

    env: str = "MemoryChain"  # a bsuite task, see --list-envs
    # flag values to begin from: tuned for a laptop, or the paper's table; explicit flags win
    preset: Literal["default", "paper"] = "default"
    arch: Literal["s5", "lstm", "gru", "attention", "mlp"] = "s5"  # the memory
    seed: int = 0  # seed of the first agent
    num_seeds: int = 1  # independent agents trained in one program, with seeds seed, seed + 1, ...
    num_episodes: int = 20_000  # episodes for each agent, in all environments together
    num_envs: int = 16  # parallel environments B
    num_steps: int = 4096  # longest segment T to learn from; gradients reach no further back, the memory does
    learning_rate: float = 1e-3  # Adam step size
    anneal_lr: bool = True  # bring the step size to zero linearly over the run
    gamma: float = 0.99  # discount
    td_lambda: float = 0.9  # lambda of the TD(lambda) return
    ent_coef: float = 0.0  # weight of the entropy bonus
    vf_coef: float = 1.0  # weight of the value loss
    max_grad_norm: float = 1e6  # gradients are scaled down to this global norm
    encoder_layers: tuple[int, ...] = (128,)  # hidden widths of the encoder, which ends in one more layer of s5-width
    s5_layers: int = 1  # layers of S5, or of attention
    s5_width: int = 128  # model width H, also that of the memory which takes S5's place
    s5_state: int = 64  # complex states P of a layer, each standing for a conjugate pair
    s5_dt_min: float = 1e-4  # smallest initial time step; the memory of a state lasts about 2 / dt steps
    s5_dt_max: float = 1e-2  # largest initial time step
    s5_norm: bool = True  # layer normalisation before each S5 layer
    memory_length: int = 64  # MemoryChain: steps between what is shown and what is asked
    num_bits: int = 1  # MemoryChain: bits shown, one of which is asked for
    chain_length: int = 20  # UmbrellaChain: steps of an episode
    num_distractors: int = 20  # UmbrellaChain: random bits beside the observation
    mapping_seed: int = 0  # DiscountingChain, DeepSea, SimpleBandit: which action does what
    size: int = 10  # DeepSea: rows and columns
    sweep: str = ""  # run all settings of this bsuite experiment (memory_len, ...), with logs for bsuite's analysis
    run_dir: str = ""  # directory of the run; if empty, runs/ENV__SCRIPT__ARCH__sSEED__TIME
    resume: str = ""  # go on with the run in this directory, exactly as if it had never stopped
    num_rows: int = 200  # rows of metrics.csv, each the mean of an equal number of gradient steps
    checkpoint_interval: int = 20  # rows between checkpoints
    track: bool = False  # also log to Weights & Biases
    num_devices: int = 1  # devices to spread the environments over
    distributed: bool = False  # join the processes of a cluster first (jax.distributed); num-devices counts all theirs
    eval: str = ""  # evaluate the newest checkpoint of this run directory and stop
    eval_episodes: int = 256  # episodes to evaluate
    list_envs: bool = False  # print the names of all environments and stop

    def check(self) -> None:
        """Raise UsageError for values that cannot work."""
        zero = ("seed", "mapping_seed", "num_distractors", "ent_coef", "vf_coef", "gamma", "td_lambda")
        for name, value in vars(self).items():
            low = 0 if name in zero else 1e-12
            high = {"gamma": 1, "td_lambda": 1, "seed": 2**31 - 1}.get(name, 1e12)
            for number in value if isinstance(value, tuple) else [value]:
                if type(number) in (int, float) and not low <= number <= high:
                    flag, bound = f"--{name.replace('_', '-')} {number}", "at least" if low == 0 else "above"
                    raise common.UsageError(f"{flag}: must be {bound} 0 and at most {high:g}")
        if self.s5_dt_min > self.s5_dt_max:
            raise common.UsageError(f"--s5-dt-min {self.s5_dt_min}: must be at most --s5-dt-max {self.s5_dt_max}")
        if self.arch == "attention" and self.s5_width % 8:
            raise common.UsageError(f"--s5-width {self.s5_width}: must be a multiple of 8 with --arch attention")
        if self.distributed and not (self.run_dir or self.resume or self.eval):
            raise common.UsageError("--distributed True: needs a --run-dir that all processes share")
        if self.num_envs % self.num_devices:
            raise common.UsageError(
                f"--num-envs {self.num_envs}: must be a multiple of --num-devices {self.num_devices}"
            )
        if self.sweep and self.sweep not in SWEEPS:
            raise common.UsageError(f"--sweep {self.sweep}: must be one of {', '.join(SWEEPS)}")


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {"preset": "paper", "num_episodes": 10_000, "num_envs": 1, "num_steps": 32, "learning_rate": 3e-4}
    | {"anneal_lr": False, "encoder_layers": (256,), "s5_width": 256, "s5_state": 128}
    | {"s5_dt_min": 1e-3, "s5_dt_max": 1e-1, "s5_norm": False},
}

# ---- 3. Environments, as bsuite defines them -------------------------------------------------------------------------


class Task(NamedTuple):
    """A bsuite task: gymnax's environment, and what gymnax leaves out or does differently."""

    env: Any
    env_params: Any
    length: int  # L, steps of every episode; the last one terminates, and nothing truncates
    fixed: dict[str, Array]  # parts of the state that are the same in all episodes


ENVS = ("MemoryChain", "UmbrellaChain", "DiscountingChain", "Catch", "DeepSea", "SimpleBandit")


def make_task(args: Args) -> Task:
    """The task with these flags. Raises UsageError for an unknown one.

    gymnax's ends of episodes are not used: it truncates the longer chains, which bsuite never does.
    """
    fixed, random = {}, np.random.RandomState(args.mapping_seed)
    if args.env == "MemoryChain":
        env, length = memory_chain.MemoryChain(args.num_bits), args.memory_length + 1
        params = env.default_params.replace(memory_length=args.memory_length)
    elif args.env == "UmbrellaChain":
        env, length = umbrella_chain.UmbrellaChain(args.num_distractors), args.chain_length
        params = env.default_params.replace(chain_length=length)
    elif args.env == "DiscountingChain":
        env, length = discounting_chain.DiscountingChain(mapping_seed=args.mapping_seed % 5), 100
    elif args.env == "Catch":
        env, length = catch.Catch(), 9
    elif args.env == "DeepSea":  # bsuite maps the actions with numpy's random numbers, gymnax with its own
        env, length = deep_sea.DeepSea(args.size), args.size
        env.action_mapping = jnp.asarray(random.binomial(1, 0.5, [length, length]), jnp.int32)
    elif args.env == "SimpleBandit":  # bsuite draws the arms once, from the mapping seed, gymnax in every episode
        env, length = bandit.SimpleBandit(), 1
        order = random.choice(range(env.num_actions), env.num_actions, replace=False)
        fixed = {"rewards": jnp.linspace(0, 1, env.num_actions)[order]}
    else:
        why = "its images would have to be downloaded" if args.env == "MNISTBandit" else "unknown"
        raise common.UsageError(f"--env {args.env}: {why}; must be one of {', '.join(ENVS)}")
    return Task(env, params if args.env in ENVS[:2] else env.default_params, length, fixed)


def reset_envs(task: Task, key: Array, batch: int) -> tuple[Array, Any]:
    """Fresh episodes: observations float (B, O) and environment states."""

    def reset(key):
        obs, state = task.env.reset_env(key, task.env_params)
        return obs.reshape(-1), state.replace(**task.fixed)

    return jax.vmap(reset)(jax.random.split(key, batch))


def step_envs(task: Task, key: Array, state: Any, action: Array) -> tuple[Array, Any, Array]:
    """Observations float (B, O), states, rewards float (B,)."""
    keys, step = jax.random.split(key, len(action)), jax.vmap(task.env.step_env, (0, 0, 0, None))
    obs, new_state, reward, _, _ = step(keys, state, action, task.env_params)
    new_state = jax.tree.map(lambda new, old: new.astype(old.dtype), new_state, state)
    return obs.reshape(len(action), -1), new_state, reward.astype(jnp.float32)


# ---- 4. Network ------------------------------------------------------------------------------------------------------


class S5Layer(nn.Module):
    """One S5 layer (Smith et al. 2023) with resets (Lu et al. 2023, section 3.1).

    x_t = (1 - start_t) Lambda_bar x_{t-1} + B_bar u_t
    y_t = gelu(2 Re(C_tilde x_t) + D u_t)
    out = u + (W1 y) * sigmoid(W2 y)

    The parameters are real; complex ones hold their real parts, then their imaginary parts: B_tilde (H, 2P),
    C_tilde (2P, H); Lambda_re, Lambda_im, log_step (P,); D (H,). The carry x is float (B, 2P).
    """

    args: Args

    def setup(self):
        H, P = self.args.s5_width, self.args.s5_state
        Lambda, V = common.dplr_hippo(2 * P)

        def init_B(key):  # V^H B with B ~ lecun_normal
            return common.complex_to_packed((V.conj().T @ lecun_normal()(key, (2 * P, H))).T)

        def init_C(key):  # C V with the real and the imaginary part of C ~ lecun_normal
            C = lecun_normal()(key, (H, 2 * P, 2))
            return common.complex_to_packed((C[..., 0] + 1j * C[..., 1]) @ V).T

        def init_log_step(key):  # time steps log-uniform
            low, high = math.log(self.args.s5_dt_min), math.log(self.args.s5_dt_max)
            return jax.random.uniform(key, (P,), minval=low, maxval=high)

        self.Lambda_re = self.param("Lambda_re", lambda _: jnp.asarray(Lambda.real, jnp.float32))
        self.Lambda_im = self.param("Lambda_im", lambda _: jnp.asarray(Lambda.imag, jnp.float32))
        self.B_tilde = self.param("B_tilde", init_B)
        self.C_tilde = self.param("C_tilde", init_C)
        self.D = self.param("D", normal(1.0), (H,))
        self.log_step = self.param("log_step", init_log_step)
        self.value, self.gate = nn.Dense(H), nn.Dense(H)
        self.norm = nn.LayerNorm() if self.args.s5_norm else lambda u: u

    def initial_carry(self, batch: int) -> Array:
        return jnp.zeros((batch, 2 * self.args.s5_state))

    def kernels(self) -> tuple[Array, Array, Array]:
        """The discretised layer, packed and real: Lambda_bar (2P,), B_bar (H, 2P), C (2P, H)."""
        P = self.args.s5_state
        # Deviation: the real part stays negative; the released code lets training push modes into growth.
        Lambda = lax.complex(jnp.minimum(self.Lambda_re, -1e-4), self.Lambda_im)
        B_tilde = common.packed_to_complex(self.B_tilde).T
        Lambda_bar, B_bar = common.discretize_zoh(Lambda, B_tilde, jnp.exp(self.log_step))
        C = jnp.concatenate([2 * self.C_tilde[:P], -2 * self.C_tilde[P:]])  # 2 Re(C x) = 2 (C_re x_re - C_im x_im)
        return common.complex_to_packed(Lambda_bar), common.complex_to_packed(B_bar.T), C

    def output(self, u: Array, v: Array, x: Array, C: Array) -> Array:
        """From the input u, the same normalised v, and the states x."""
        y = nn.gelu(x @ C + self.D * v)
        return u + self.value(y) * nn.sigmoid(self.gate(y))

    def scan(self, carry: Array, u: Array, start: Array) -> tuple[Array, Array]:
        """u (T, B, H), start (T, B). Flattened to (T*B, H), as XLA multiplies matrices faster than stacks of them."""
        (Lambda_bar, B_bar, C), shape, u = self.kernels(), u.shape, u.reshape(-1, u.shape[-1])
        v = self.norm(u)
        drive = (v @ B_bar).reshape(*start.shape, -1)  # (T, B, 2P)
        x = common.linear_recurrence(Lambda_bar, drive, 1.0 - start, carry)
        return x[-1], self.output(u, v, x.reshape(len(u), -1), C).reshape(shape)

    def step(self, kernels: tuple[Array, Array, Array], carry: Array, u: Array, start: Array) -> tuple[Array, Array]:
        """u (B, H), start (B,)."""
        (Lambda_bar, B_bar, C), v = kernels, self.norm(u)
        x = common.recurrence_step(Lambda_bar, carry, v @ B_bar, 1.0 - start)
        return x, self.output(u, v, x, C)


def make_memory(args: Args, length: int) -> list[nn.Module]:
    """The layers between encoder and heads, all called alike: see part 2 of s5_common.py."""
    if args.arch == "s5":
        return [S5Layer(args) for _ in range(args.s5_layers)]
    if args.arch == "attention":
        return [common.Attention(args.s5_width, args.s5_layers, window=length)]
    if args.arch == "mlp":
        return [common.Memoryless(args.s5_width)]
    return [common.Recurrent(args.s5_width, {"gru": nn.GRUCell, "lstm": nn.OptimizedLSTMCell}[args.arch])]


class ActorCritic(nn.Module):
    """Encoder, memory, policy and value heads: bsuite's recurrent actor-critic with another memory.

    ``scan`` reads a sequence (T, B, O) to learn, ``step`` one time step (B, O) to act; both do the same to the same.
    """

    args: Args
    num_actions: int
    length: int

    def setup(self):
        widths = (*self.args.encoder_layers, self.args.s5_width)
        self.encoder = nn.Sequential([module for width in widths for module in (nn.Dense(width), nn.relu)])
        self.memory = make_memory(self.args, self.length)
        self.actor, self.critic = nn.Dense(self.num_actions), nn.Dense(1)

    def kernels(self) -> list:
        """What ``step`` can reuse for as long as the parameters stay as they are."""
        return [layer.kernels() for layer in self.memory]

    def scan(self, carry: list, obs: Array, start: Array) -> tuple[list, Array, Array]:
        """Logits (T, B, A) and values (T, B)."""
        x, carry = self.encoder(obs.reshape(-1, obs.shape[-1])).reshape(*start.shape, -1), list(carry)
        for i, layer in enumerate(self.memory):
            carry[i], x = layer.scan(carry[i], x, start)
        x = x.reshape(-1, x.shape[-1])
        return carry, self.actor(x).reshape(*start.shape, -1), self.critic(x).reshape(start.shape)

    def step(self, kernels: list, carry: list, obs: Array, start: Array) -> tuple[list, Array, Array]:
        """Logits (B, A) and values (B,)."""
        x, carry = self.encoder(obs), list(carry)
        for i, layer in enumerate(self.memory):
            carry[i], x = layer.step(kernels[i], carry[i], x, start)
        return carry, self.actor(x), self.critic(x)[..., 0]


# ---- 5. Pytrees ------------------------------------------------------------------------------------------------------


class Setup(NamedTuple):
    """What stays the same during a run."""

    args: Args
    task: Task
    network: ActorCritic
    optimizer: optax.GradientTransformation
    mesh: Mesh
    rounds: int  # episodes of each environment to a row of metrics.csv
    rows: int


class Runner(NamedTuple):
    """All that changes during a run and is in a checkpoint; with a leading seed axis S outside of ``update``."""

    params: Any
    opt_state: Any
    key: Array  # raw PRNG key: orbax cannot store typed ones
    finished: Array  # number of finished episodes, int32 ()
    history: Array  # their returns and last rewards in order, then zeros, float (E, 2)


class Position(NamedTuple):
    """Where the B environments stand in their episodes."""

    env_state: Any
    obs: Array  # (B, O), what the agent reads next
    start: Array  # (B,), 1 if obs opens the episodes
    carry: Any  # memory before it reads obs


class Segment(NamedTuple):
    """T steps of B environments within one episode each; every leaf is (T, B, ...)."""

    obs: Array
    start: Array
    action: Array
    reward: Array


# ---- 6. Returns and loss ---------------------------------------------------------------------------------------------


def td_lambda_returns(args: Args, reward: Array, value: Array, bootstrap: Array) -> Array:
    """The TD(lambda) return (Sutton and Barto 2018, section 12.1), float (T, B).

    G_t = r_t + gamma ((1 - lambda) V_{t+1} + lambda G_{t+1}),    G_T = V_T = bootstrap

    reward and value (T, B); bootstrap (B,), the value of what follows, 0 after a termination.
    """

    def backward(later, step):
        (G, next_value), (reward, value) = later, step
        G = reward + args.gamma * ((1 - args.td_lambda) * next_value + args.td_lambda * G)
        return (G, value), G

    return lax.scan(backward, (bootstrap, bootstrap), (reward, value), reverse=True)[1]


def a2c_loss(params: Any, setup: Setup, carry: Any, segment: Segment, bootstrap: Array) -> tuple[Array, dict]:
    """Advantage actor-critic (Mnih et al. 2016) with TD(lambda) errors, as in bsuite's baseline.

    delta_t = G_t - V_t
    L       = -mean log pi(a_t) delta_t + c_v mean delta_t^2 - c_e entropy,    delta_t constant in the first term

    carry: the memory before the segment.
    """
    args = setup.args
    _, logits, value = setup.network.apply(params, carry, segment.obs, segment.start, method="scan")
    error = td_lambda_returns(args, segment.reward, lax.stop_gradient(value), bootstrap) - value
    log_pi = nn.log_softmax(logits)
    log_prob = jnp.take_along_axis(log_pi, segment.action[..., None], axis=-1)[..., 0]
    policy_loss, value_loss = -jnp.mean(log_prob * lax.stop_gradient(error)), jnp.mean(error**2)
    entropy = -jnp.mean(jnp.sum(jnp.exp(log_pi) * log_pi, axis=-1))
    metrics = {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy}
    return policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy, metrics


# ---- 7. Segment, update, episode -------------------------------------------------------------------------------------


def make_setup(args: Args) -> Setup:
    """Task, network, optimiser and devices for these flags. Raises UsageError."""
    task = make_task(args)
    if args.num_devices > jax.device_count():
        raise common.UsageError(f"--num-devices {args.num_devices}: this machine has {jax.device_count()}")
    network = ActorCritic(args, task.env.num_actions, task.length)
    rounds = math.ceil(args.num_episodes / args.num_envs)
    rounds_per_row = math.ceil(rounds / args.num_rows)
    rows = math.ceil(rounds / rounds_per_row)
    steps = rows * rounds_per_row * math.ceil(task.length / args.num_steps)
    learning_rate = optax.linear_schedule(args.learning_rate, 0.0, steps) if args.anneal_lr else args.learning_rate
    optimizer = optax.chain(optax.clip_by_global_norm(args.max_grad_norm), optax.adam(learning_rate))
    mesh = Mesh(np.array(jax.devices()[: args.num_devices]), ("env",))
    return Setup(args, task, network, optimizer, mesh, rounds_per_row, rows)


def reset_position(setup: Setup, key: Array) -> Position:
    """The beginning of new episodes, the environments spread over the devices."""
    batch = setup.args.num_envs
    obs, env_state = reset_envs(setup.task, key, batch)
    carry = [layer.initial_carry(batch) for layer in make_memory(setup.args, setup.task.length)]
    position = Position(env_state, obs, jnp.ones(batch), carry)
    return lax.with_sharding_constraint(position, NamedSharding(setup.mesh, PartitionSpec("env")))


def init_runner(setup: Setup, key: Array) -> Runner:
    """Fresh parameters for one agent."""
    params_key, env_key, key = jax.random.split(key, 3)
    _, obs, start, carry = reset_position(setup, env_key)
    params = setup.network.init(params_key, carry, obs[None], start[None], method="scan")
    history = jnp.zeros((setup.rows * setup.rounds * setup.args.num_envs, 2))
    return Runner(params, setup.optimizer.init(params), key, jnp.zeros((), jnp.int32), history)


def collect_segment(
    setup: Setup, params: Any, key: Array, position: Position, T: int
) -> tuple[Position, Segment, Array]:
    """Act for T steps. Returns where they lead, the segment, and the value of what follows, (B,)."""
    network = setup.network
    act = partial(network.apply, params, network.apply(params, method="kernels"), method="step")

    def step(position, key):
        action_key, env_key = jax.random.split(key)
        env_state, obs, start, carry = position
        carry, logits, _ = act(carry, obs, start)
        action = jax.random.categorical(action_key, logits)
        next_obs, env_state, reward = step_envs(setup.task, env_key, env_state, action)
        return Position(env_state, next_obs, jnp.zeros_like(start), carry), Segment(obs, start, action, reward)

    position, segment = lax.scan(step, position, jax.random.split(key, T))
    return position, segment, act(position.carry, position.obs, position.start)[2]


def update(setup: Setup, learner: tuple, key: Array, T: int, last: bool) -> tuple[tuple, tuple[dict, Array]]:
    """T steps and one gradient step on them. learner: params, opt_state, Position, returns so far (B,)."""
    params, opt_state, before, returns = learner
    position, segment, value = collect_segment(setup, params, key, before, T)
    bootstrap = jnp.zeros_like(value) if last else value  # the episode's last step terminates it
    grads, metrics = jax.grad(a2c_loss, has_aux=True)(params, setup, before.carry, segment, bootstrap)
    updates, opt_state = setup.optimizer.update(grads, opt_state, params)
    metrics["grad_norm"] = optax.tree.norm(grads)
    returns = returns + segment.reward.sum(axis=0)
    return (optax.apply_updates(params, updates), opt_state, position, returns), (metrics, segment.reward[-1])


def update_episode(setup: Setup, runner: Runner) -> tuple[Runner, dict[str, Array]]:
    """One episode in every environment: segments of ``num_steps``, the last of what is left, an update after each."""
    T = min(setup.args.num_steps, setup.task.length)
    full = math.ceil(setup.task.length / T) - 1
    key, reset_key, last_key, *keys = jax.random.split(runner.key, 3 + full)
    learner = (runner.params, runner.opt_state, reset_position(setup, reset_key), jnp.zeros(setup.args.num_envs))
    collected = []
    if full:
        step = partial(update, setup, T=T, last=False)
        learner, (metrics, _) = lax.scan(step, learner, jnp.stack(keys))
        collected.append(metrics)
    learner, (metrics, last_reward) = update(setup, learner, last_key, setup.task.length - full * T, last=True)
    collected.append(jax.tree.map(lambda x: x[None], metrics))
    params, opt_state, _, returns = learner
    history = lax.dynamic_update_slice(runner.history, jnp.stack([returns, last_reward], 1), (runner.finished, 0))
    metrics = jax.tree.map(lambda *x: jnp.mean(jnp.concatenate(x)), *collected)
    return Runner(params, opt_state, key, runner.finished + len(returns), history), metrics


def update_row(setup: Setup, runner: Runner) -> tuple[Runner, dict[str, Array]]:
    """The episodes of one row of metrics.csv, and the means of what they report."""
    runner, metrics = lax.scan(lambda runner, _: update_episode(setup, runner), runner, length=setup.rounds)
    return runner, jax.tree.map(jnp.mean, metrics)


def for_each_seed(args: Args, function: Any, seeds: Any) -> Any:
    """``function`` of every seed: one after the other on a CPU, side by side on an accelerator."""
    in_turn = args.num_seeds == 1 or jax.default_backend() == "cpu"
    return lax.map(function, seeds) if in_turn else jax.vmap(function)(seeds)


def init_runners(setup: Setup) -> Runner:
    """Runners of all seeds, the same on every device."""
    keys = jax.vmap(jax.random.PRNGKey)(setup.args.seed + jnp.arange(setup.args.num_seeds))
    init = partial(for_each_seed, setup.args, partial(init_runner, setup))
    return jax.jit(init, out_shardings=NamedSharding(setup.mesh, PartitionSpec()))(keys)


def compile_update(setup: Setup, runners: Runner) -> Any:
    """``update_row`` of every seed as one compiled call; each metric comes back as float (S,)."""
    function = partial(for_each_seed, setup.args, partial(update_row, setup))
    everywhere = NamedSharding(setup.mesh, PartitionSpec())
    return jax.jit(function, donate_argnums=0, out_shardings=everywhere).lower(runners).compile()


# ---- 8. Evaluation and bsuite's way of reporting ---------------------------------------------------------------------


def evaluate(setup: Setup, params: Any, key: Array) -> Array:
    """Return of one episode in each of ``eval_episodes`` environments, float (E,), actions sampled."""
    setup = setup._replace(args=replace(setup.args, num_envs=setup.args.eval_episodes))
    reset_key, key = jax.random.split(key)
    return collect_segment(setup, params, key, reset_position(setup, reset_key), setup.task.length)[1].reward.sum(0)


def print_evaluation(args: Args) -> None:
    """Evaluate the newest checkpoint of --eval with a fixed key: mean, standard error and quantiles for each seed."""
    setup = make_setup(args)
    update, runners, _ = common.RunDirectory(Path(args.eval), args).restore(init_runners(setup))
    play = partial(evaluate, setup, key=jax.random.PRNGKey(2303_03982))
    for i, returns in enumerate(np.asarray(jax.jit(partial(lax.map, play))(runners.params))):
        error = returns.std() / math.sqrt(max(len(returns) - 1, 1))
        quantiles = ", ".join(f"{q:.0%} {np.quantile(returns, q):.4f}" for q in (0.0, 0.25, 0.5, 0.75, 1.0))
        about = f"{args.env}, seed {args.seed + i}, update {update}, {len(returns)} episodes"
        print(f"{about}: mean {returns.mean():.4f}, standard error {error:.4f}, quantiles {quantiles}")


EPISODES = 10_000  # of a run in bsuite
LENGTHS = (*range(1, 11), 12, 14, 17, 20, 25, *range(30, 101, 10))
SWEEPS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "memory_len": ("MemoryChain", [{"memory_length": n, "num_bits": 1} for n in LENGTHS]),
    "memory_size": ("MemoryChain", [{"memory_length": 2, "num_bits": n} for n in LENGTHS if n <= 40]),
    "umbrella_length": ("UmbrellaChain", [{"chain_length": n, "num_distractors": 20} for n in LENGTHS]),
    "umbrella_distract": ("UmbrellaChain", [{"chain_length": 20, "num_distractors": n} for n in LENGTHS]),
    "discounting_chain": ("DiscountingChain", [{"mapping_seed": n, "num_episodes": 1000} for n in range(20)]),
    "catch": ("Catch", [{"seed": n} for n in range(20)]),
    "deep_sea": ("DeepSea", [{"size": n, "mapping_seed": 42} for n in range(10, 51, 2)]),
    "bandit": ("SimpleBandit", [{"mapping_seed": n} for n in range(20)]),
}


def write_bsuite_log(path: Path, env: str, length: int, history: np.ndarray) -> None:
    """bsuite's CSV log: a row after 1, 1.2, 1.4, 1.7, 2, 2.5, 3, 4, ..., 9 times 10^k episodes.

    history: return and last reward of the finished episodes, (episodes, 2); a positive last reward is a success
    """
    steps, rows = (10, 12, 14, 17, 20, 25, *range(30, 100, 10)), []
    for n in (10**k * step // 10 for k in range(8) for step in steps if 10**k * step % 10 == 0):
        if n <= len(history):
            total_return, successes = float(history[:n, 0].sum()), int((history[:n, 1] > 0).sum())
            row = {"steps": n * length, "episode": n, "total_return": total_return, "episode_len": length}
            row["episode_return"] = float(history[n - 1, 0])
            # what bsuite's own environments count besides, and its analysis scores
            row |= {"total_perfect": successes} if env == "MemoryChain" else {}
            row |= {"total_regret": 2 * (n - successes)} if env in ("MemoryChain", "UmbrellaChain", "Catch") else {}
            row |= {"total_regret": n - total_return} if env == "SimpleBandit" else {}
            row |= {"total_bad_episodes": n - successes, "denoised_return": successes} if env == "DeepSea" else {}
            rows.append(row)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)


# ---- 9. Training and command line ------------------------------------------------------------------------------------


def train(args: Args) -> dict[str, Any]:
    """Train as the flags say, keep the run directory and return its summary. SystemExit after a signal, once saved."""
    setup = make_setup(args)
    stamp = f"{args.env}__a2c_s5_bsuite__{args.arch}__s{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    run = common.RunDirectory(Path(args.resume or args.run_dir or f"runs/{stamp}"), args)
    done, runners, seconds = run.restore(init_runners(setup))
    episodes_per_row, began = setup.rounds * args.num_envs, time.perf_counter()
    with common.stop_requests() as stop:
        if done == 0:
            run.save(0, runners, 0.0)
        step = compile_update(setup, runners)
        compile_seconds, memory = time.perf_counter() - began, step.memory_analysis()
        steps_per_row = episodes_per_row * setup.task.length
        progress = common.ProgressLine(setup.rows, done, steps_per_update=steps_per_row * args.num_seeds)
        while done < setup.rows and not stop:
            (runners, metrics), done = step(runners), done + 1
            for s in range(args.num_seeds):
                row = {"update": done, "env_steps": done * steps_per_row, "seed": args.seed + s}
                row["episodes"] = done * episodes_per_row
                returns = np.asarray(runners.history)[s, row["episodes"] - episodes_per_row : row["episodes"], 0]
                row |= {"return_mean": returns.mean().item()} | {name: x[s].item() for name, x in metrics.items()}
                run.log(row, progress.steps_per_second)
            progress.update(run.returns(args.seed))
            if done % args.checkpoint_interval == 0 or done == setup.rows or stop:
                run.save(done, runners, seconds + time.perf_counter() - began)
    if stop:
        print(f"stopped; go on with: python a2c_s5_bsuite.py --resume {run.path}")
        raise SystemExit(128 + stop[0])
    measured = {"script": "a2c_s5_bsuite", "env": args.env, "updates": done, "env_steps": done * steps_per_row}
    measured |= {"compile_seconds": compile_seconds, "run_seconds": seconds + time.perf_counter() - began}
    measured |= {"steps_per_second": progress.steps_per_second, "episodes": done * episodes_per_row}
    measured["program_bytes"] = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    for s, history in enumerate(np.asarray(runners.history)):
        if run.writes:
            write_bsuite_log(run.path / f"bsuite_seed{args.seed + s}.csv", args.env, setup.task.length, history)
    summary = run.finish(measured)
    print(f"best return {summary['best_return']!s:.6}, final {summary['final_return']!s:.6}: {run.path}")
    return summary


def run_sweep(args: Args) -> None:
    """All settings of a bsuite experiment, one after the other; the same command goes on where it was stopped.

    Runs lie in RUN_DIR/ID-N; RUN_DIR/logs is what bsuite's csv_load reads.
    """
    (env, settings), episodes = SWEEPS[args.sweep], min(args.num_episodes, EPISODES)
    root = Path(args.run_dir or f"runs/{args.sweep}__a2c_s5_bsuite__{args.arch}__s{args.seed}")
    (root / "logs").mkdir(parents=True, exist_ok=True)
    for i, setting in enumerate(settings):
        run_dir = root / f"{args.sweep}-{i}"
        own = replace(args, env=env, sweep="", run_dir=str(run_dir), **{"num_episodes": episodes} | setting)
        if not (run_dir / "summary.json").exists():
            print(f"{args.sweep}/{i}: {setting}")
            train(replace(own, resume=str(run_dir)) if run_dir.exists() else own)
        log = root / "logs" / f"bsuite_id_-_{args.sweep}-{i}.csv"
        shutil.copy(run_dir / f"bsuite_seed{own.seed}.csv", log)


def main() -> int:
    args = common.parse_args(Args, PRESETS)
    if args.distributed:
        common.join_cluster()
    if args.list_envs:
        print("\n".join(ENVS))
    elif args.eval:
        print_evaluation(args)
    elif args.sweep:
        run_sweep(args)
    else:
        train(args)
    return 0


if __name__ == "__main__":
    sys.exit(common.run_main(main))
