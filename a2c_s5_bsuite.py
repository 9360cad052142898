# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "jax==0.10.2",
#     "flax==0.12.8",
#     "optax==0.2.8",
#     "gymnax==1.0.1",
#     "absl-py==2.5.1",
#     "six==1.17.0",
#     "tyro==1.0.17",
#     "orbax-checkpoint==0.12.8",
#     "tensorstore==0.1.86",
#     "tensorboardX==2.6.5",
#     "matplotlib==3.11.2",
#     "numpy==2.4.6",
#     "tqdm==4.70.1",
# ]
# ///
"""Recurrent A2C with S5 on bsuite's memory, credit and exploration tasks, in one file.

Our implementation of Lu et al. 2023, "Structured State Space Models for In-Context Reinforcement
Learning", 4.1: the recurrent actor-critic of bsuite (Osband et al. 2020) with its LSTM exchanged
for S5 or for self-attention.

    python a2c_s5_bsuite.py --memory-length 512                  # a minute on 2 CPU cores
    python a2c_s5_bsuite.py --memory-length 512 --preset paper   # the paper's table: one environment, unroll 32

Shapes: T time, B environments, O observation features, A actions, H model width, P complex states
of an S5 layer, S seeds; time comes first. start is 1 where an observation opens an episode. All
episodes of a task have L steps, so the B environments begin and end theirs together. Departures
from the paper are marked "Deviation" and listed in README.md.
"""

from __future__ import annotations

import csv
import json
import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.linen.initializers import lecun_normal, normal
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import s5_common as common


# ---- 1. Arguments --------------------------------------------------------------------------------
@dataclass(frozen=True)
class RunFlags:
    """The run: what is trained, where it is kept."""

    preset: Literal["default", "paper"] = "default"
    """values to begin from: for a laptop, or the paper's; flags win"""

    seed: int = 0
    """seed of the first agent"""

    num_seeds: int = 1
    """independent agents trained in one program, with seeds seed, seed + 1, ..."""

    num_episodes: int = 15_000
    """episodes for each agent, in all environments together"""

    sweep: str = ""
    """run all settings of this bsuite experiment (memory_len, ...), with logs for bsuite's
    analysis, and at most as many episodes as it has"""

    run_dir: str = ""
    """directory of the run; if empty, runs/ENV__SCRIPT__ARCH__sSEED__TIME-RANDOM"""

    resume: str = ""
    """go on with the run in this directory, exactly as if it had never stopped"""

    num_rows: int = 200
    """rows of metrics.csv at most, each the mean over as many episodes, of their last segments"""

    checkpoint_interval: int = 20
    """rows between checkpoints"""

    track: bool = False
    """also log to Weights & Biases"""

    list_envs: bool = False
    """print the names of all environments and stop"""


@dataclass(frozen=True)
class EnvironmentFlags:
    """The environment."""

    env: str = "MemoryChain"
    """a bsuite task, see --list-envs"""

    num_envs: int = 16
    """parallel environments B"""

    memory_length: int = 64
    """MemoryChain: steps between what is shown and what is asked"""

    num_bits: int = 1
    """MemoryChain: bits shown, one of which is asked for"""

    chain_length: int = 20
    """UmbrellaChain: steps of an episode"""

    num_distractors: int = 20
    """UmbrellaChain: random bits beside the observation"""

    mapping_seed: int = 0
    """DiscountingChain, DeepSea, SimpleBandit: which action does what"""

    size: int = 10
    """DeepSea: rows and columns"""


@dataclass(frozen=True)
class LearnerFlags:
    """The learner: A2C."""

    num_steps: int = 4096
    """longest segment T to learn from; gradients reach no further back, the memory does"""

    learning_rate: float = 1e-3
    """Adam step size"""

    anneal_lr: bool = True
    """bring the step size to zero linearly over the run"""

    adam_eps: float = 1e-8
    """added to the root of Adam's second moment, which decays where rewards are rare"""

    gamma: float = 0.99
    """discount"""

    td_lambda: float = 0.9
    """lambda of the TD(lambda) return"""

    ent_coef: float = 0.0
    """weight of the entropy bonus"""

    vf_coef: float = 1.0
    """weight of the value loss"""

    max_grad_norm: float = 1e6
    """gradients are scaled down to this global norm"""


@dataclass(frozen=True)
class MemoryFlags:
    """The network and its memory."""

    arch: Literal["s5", "lru", "mingru", "lstm", "gru", "attention", "mlp"] = "s5"
    """the memory"""

    encoder_layers: tuple[int, ...] = (128,)
    """hidden widths of the encoder, which ends in one more layer of s5-width"""

    s5_layers: int = 1
    """layers of S5, or of lru, mingru or attention"""

    s5_width: int = 128
    """model width H, also that of the memory which takes S5's place"""

    s5_state: int = 64
    """complex states P of a layer, each standing for a conjugate pair"""

    s5_dt_min: float = 1e-4
    """smallest initial time step; the memory of a state lasts about 2 / dt steps"""

    s5_dt_max: float = 1e-2
    """largest initial time step"""

    s5_gain: bool = True
    """B times s5-dt-max / time step: a slow state hears an input as loudly as a fast one"""

    s5_norm: bool = True
    """layer normalisation before each S5 layer"""


@dataclass(frozen=True)
class EvaluationFlags:
    """Evaluation of a run."""

    eval: str = ""
    """evaluate the newest checkpoint of this run directory and stop"""

    watch: str = ""
    """play one episode with the newest checkpoint of this run directory, as text, and stop"""

    eval_episodes: int = 256
    """episodes to evaluate"""


@dataclass(frozen=True)
class DeviceFlags:
    """Devices and processes."""

    num_devices: int = 1
    """devices to spread the environments over"""

    distributed: bool = False
    """join the processes of a cluster first (jax.distributed); num-devices counts all theirs"""


@dataclass(frozen=True)
class Args(RunFlags, EnvironmentFlags, LearnerFlags, MemoryFlags, EvaluationFlags, DeviceFlags):
    """A2C with S5 on bsuite."""

    def check(self) -> None:
        """Raise UsageError for values that cannot work."""
        zero = ("seed", "mapping_seed", "num_distractors", "ent_coef", "vf_coef", "gamma", "td_lambda")
        common.check_args(self, zero, at_most={"gamma": 1, "td_lambda": 1})
        if self.num_envs % self.num_devices:
            devices = f"--num-devices {self.num_devices}"
            raise common.UsageError(f"--num-envs {self.num_envs}: must be a multiple of {devices}")
        if self.sweep and self.sweep not in SWEEPS:
            raise common.UsageError(f"--sweep {self.sweep}: must be one of {', '.join(SWEEPS)}")


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {
        "preset": "paper",
        "num_episodes": 10_000,
        "num_envs": 1,
        "num_steps": 32,
        "learning_rate": 3e-4,
        "anneal_lr": False,
        "adam_eps": 3e-3,  # the table leaves it open; with 1e-8 the answer is found and lost
        "encoder_layers": (256,),
        "s5_width": 256,
        "s5_state": 128,
        "s5_dt_min": 1e-3,
        "s5_dt_max": 1e-1,
        "s5_gain": False,
        "s5_norm": False,
    },
}


# ---- 2. Environments, as bsuite defines them -----------------------------------------------------
class Task(NamedTuple):
    """A bsuite task: gymnax's environment, and what gymnax leaves out or does differently."""

    env: Any
    env_params: Any
    length: int  # L, steps of every episode; the last one terminates, and nothing truncates
    fixed: dict[str, Array]  # parts of the state that are the same in all episodes


class Recipe(NamedTuple):
    """How to make a task from the flags."""

    arguments: dict[str, Any]  # of gymnax's environment
    length: int  # steps of an episode
    parameters: dict[str, Any]  # of gymnax's environment, which say so


TASKS: dict[str, Callable[[Args], Recipe]] = {
    "MemoryChain": lambda args: Recipe(
        {"num_bits": args.num_bits}, args.memory_length + 1, {"memory_length": args.memory_length}
    ),
    "UmbrellaChain": lambda args: Recipe(
        {"n_distractor": args.num_distractors}, args.chain_length, {"chain_length": args.chain_length}
    ),
    "DiscountingChain": lambda args: Recipe({"mapping_seed": args.mapping_seed % 5}, 100, {}),
    "Catch": lambda args: Recipe({}, 9, {}),
    "DeepSea": lambda args: Recipe({"size": args.size}, args.size, {}),
    "SimpleBandit": lambda args: Recipe({}, 1, {}),
}


def make_task(args: Args) -> Task:
    """The task with these flags. Raises UsageError for an unknown one.

    gymnax's ends of episodes are not used: it truncates the longer chains, which bsuite never does.
    Nor does it declare the types of its numbers: it always runs without JAX_ENABLE_X64, so that
    they are 32 bits wide.
    """
    if args.env not in TASKS:
        why = "its images would have to be downloaded" if args.env == "MNISTBandit" else "unknown"
        raise common.UsageError(f"--env {args.env}: {why}; must be one of {', '.join(TASKS)}")
    recipe = TASKS[args.env](args)
    with jax.enable_x64(False):
        env, params = gymnax.make(f"{args.env}-bsuite", **recipe.arguments)
    random = np.random.RandomState(args.mapping_seed)
    fixed = {}
    if args.env == "DeepSea":  # bsuite maps the actions with numpy's random numbers, gymnax with its own
        env.action_mapping = jnp.asarray(random.binomial(1, 0.5, [args.size, args.size]), jnp.int32)
    if args.env == "SimpleBandit":  # bsuite draws the arms once, from the mapping seed, gymnax in every episode
        order = random.choice(range(env.num_actions), env.num_actions, replace=False)
        fixed["rewards"] = jnp.linspace(0, 1, env.num_actions, dtype=jnp.float32)[order]
    params = params.replace(**recipe.parameters)
    return Task(env=env, env_params=params, length=recipe.length, fixed=fixed)


def reset_envs(task: Task, key: Array, batch: int) -> tuple[Array, Any]:
    """Fresh episodes: observations float (B, O) and environment states."""
    keys = jax.random.split(key, batch)
    with jax.enable_x64(False):
        obs, state = jax.vmap(task.env.reset_env, (0, None))(keys, task.env_params)
    fixed = {name: jnp.broadcast_to(x, (batch, *x.shape)) for name, x in task.fixed.items()}
    return obs.reshape(batch, -1).astype(jnp.float32), state.replace(**fixed)


def step_envs(task: Task, key: Array, state: Any, action: Array) -> tuple[Array, Any, Array]:
    """Observations float (B, O), states, rewards float (B,)."""
    batch = len(action)
    keys = jax.random.split(key, batch)
    step = jax.vmap(task.env.step_env, (0, 0, 0, None))
    with jax.enable_x64(False):
        obs, new_state, reward, _, _ = step(keys, state, action, task.env_params)
        new_state = jax.tree.map(lambda new, old: new.astype(old.dtype), new_state, state)
    return obs.reshape(batch, -1).astype(jnp.float32), new_state, reward.astype(jnp.float32)


# ---- 3. Network ----------------------------------------------------------------------------------
class S5Layer(nn.Module):
    """One S5 layer (Smith et al. 2023) with resets (Lu et al. 2023, section 3.1).

    x_t = (1 - start_t) Lambda_bar x_{t-1} + B_bar u_t
    y_t = gelu(2 Re(C_tilde x_t) + D u_t)
    out = u + (W1 y) * sigmoid(W2 y)

    The parameters are real; complex ones hold their real parts, then their imaginary parts:
    B_tilde (H, 2P), C_tilde (2P, H); Lambda_re, Lambda_im, log_step (P,); D (H,).
    The carry x is float (B, 2P).
    """

    args: Args

    def setup(self):
        H = self.args.s5_width
        P = self.args.s5_state
        Lambda, V = common.dplr_hippo(2 * P)

        def init_B(key):  # V^H B with B ~ lecun_normal
            B = lecun_normal()(key, (2 * P, H), jnp.float32)
            return common.complex_to_packed((V.conj().T.astype(jnp.complex64) @ B).T)

        def init_C(key):  # C V with the real and the imaginary part of C ~ lecun_normal
            C = lecun_normal()(key, (H, 2 * P, 2), jnp.float32)
            return common.complex_to_packed(lax.complex(C[..., 0], C[..., 1]) @ V.astype(jnp.complex64)).T

        def init_log_step(key):  # time steps log-uniform
            low = math.log(self.args.s5_dt_min)
            high = math.log(self.args.s5_dt_max)
            return jax.random.uniform(key, (P,), jnp.float32, low, high)

        self.Lambda_re = self.param("Lambda_re", lambda _: jnp.asarray(Lambda.real, jnp.float32))
        self.Lambda_im = self.param("Lambda_im", lambda _: jnp.asarray(Lambda.imag, jnp.float32))
        self.B_tilde = self.param("B_tilde", init_B)
        self.C_tilde = self.param("C_tilde", init_C)
        self.D = self.param("D", normal(1.0), (H,), jnp.float32)
        self.log_step = self.param("log_step", init_log_step)
        self.value = nn.Dense(H)
        self.gate = nn.Dense(H)
        self.norm = nn.LayerNorm() if self.args.s5_norm else lambda u: u

    def initial_carry(self, batch: int) -> Array:
        return jnp.zeros((batch, 2 * self.args.s5_state), jnp.float32)

    def kernels(self) -> tuple[Array, Array, Array]:
        """The discretised layer, packed and real: Lambda_bar (2P,), B_bar (H, 2P), C (2P, H)."""
        P = self.args.s5_state
        # Deviation: the real part stays negative; the released code lets training push modes into
        # growth.
        Lambda = lax.complex(common.bounded(self.Lambda_re, -math.inf, -1e-4), self.Lambda_im)
        step = jnp.exp(self.log_step)
        B_tilde = common.packed_to_complex(self.B_tilde).T
        # Deviation: zero-order hold makes B_bar as small as the time step, and so what a slow state
        # keeps of a bit.
        B_tilde *= (self.args.s5_dt_max / step)[:, None] if self.args.s5_gain else 1.0
        Lambda_bar, B_bar = common.discretize_zoh(Lambda, B_tilde, step)
        # 2 Re(C x) = 2 (C_re x_re - C_im x_im)
        C = jnp.concatenate([2 * self.C_tilde[:P], -2 * self.C_tilde[P:]])
        return common.complex_to_packed(Lambda_bar), common.complex_to_packed(B_bar.T), C

    def output(self, u: Array, v: Array, x: Array, C: Array) -> Array:
        """(N, H) from the input u, the same normalised v, both (N, H), and the states x (N, 2P)."""
        y = nn.gelu(x @ C + self.D * v)
        return u + self.value(y) * nn.sigmoid(self.gate(y))

    def scan(self, carry: Array, u: Array, start: Array) -> tuple[Array, Array]:
        """u (T, B, H), start (T, B). XLA multiplies matrices faster than stacks of them."""
        Lambda_bar, B_bar, C = self.kernels()
        T, B, H = u.shape
        u = u.reshape(T * B, H)
        v = self.norm(u)
        drive = (v @ B_bar).reshape(T, B, -1)  # (T, B, 2P)
        x = common.linear_recurrence(Lambda_bar, drive, 1.0 - start, carry)  # (T, B, 2P)
        y = self.output(u, v, x.reshape(T * B, -1), C)
        return x[-1], y.reshape(T, B, H)

    def step(self, kernels: tuple, carry: Array, u: Array, start: Array) -> tuple[Array, Array]:
        """u (B, H), start (B,)."""
        Lambda_bar, B_bar, C = kernels
        v = self.norm(u)
        x = common.recurrence_step(Lambda_bar, carry, v @ B_bar, 1.0 - start)
        return x, self.output(u, v, x, C)


def make_memory(args: Args, length: int) -> list[nn.Module]:
    """The layers between encoder and heads, all called alike: see Memory in s5_common.py."""
    if args.arch == "s5":
        return [S5Layer(args) for _ in range(args.s5_layers)]
    if args.arch == "lru":
        return [common.LRU(args.s5_width, args.s5_state, args.s5_dt_min, args.s5_dt_max) for _ in range(args.s5_layers)]
    if args.arch == "mingru":
        return [common.MinGRU(args.s5_width, args.s5_dt_min, args.s5_dt_max) for _ in range(args.s5_layers)]
    if args.arch == "attention":
        return [common.Attention(args.s5_width, args.s5_layers, window=length)]
    if args.arch == "mlp":
        return [common.Memoryless(args.s5_width)]
    return [common.Recurrent(args.s5_width, {"gru": nn.GRUCell, "lstm": nn.OptimizedLSTMCell}[args.arch])]


class ActorCritic(nn.Module):
    """Encoder, memory, policy and value heads: bsuite's recurrent actor-critic with another memory."""

    args: Args
    num_actions: int
    length: int

    def setup(self):
        layers: list = []
        for width in (*self.args.encoder_layers, self.args.s5_width):
            layers += [nn.Dense(width), nn.relu]
        self.encoder = nn.Sequential(layers)
        self.memory = make_memory(self.args, self.length)
        self.actor = nn.Dense(self.num_actions)
        self.critic = nn.Dense(1)

    def kernels(self) -> list:
        """What ``step`` can reuse for as long as the parameters stay as they are."""
        return [layer.kernels() for layer in self.memory]

    def scan(self, carry: list, obs: Array, start: Array) -> tuple[list, Array, Array]:
        """To learn: obs (T, B, O), start (T, B).

        Returns the carry, logits (T, B, A), values (T, B).
        """
        T, B = start.shape
        x = self.encoder(obs.reshape(T * B, -1))
        new_carry = []
        for layer, layer_carry in zip(self.memory, carry, strict=True):
            layer_carry, x = layer.scan(layer_carry, x.reshape(T, B, -1), start)
            new_carry.append(layer_carry)
        x = x.reshape(T * B, -1)
        return new_carry, self.actor(x).reshape(T, B, -1), self.critic(x).reshape(T, B)

    def step(self, kernels: list, carry: list, obs: Array, start: Array) -> tuple[list, Array, Array]:
        """To act: obs (B, O), start (B,). Returns the carry, logits (B, A), values (B,)."""
        x = self.encoder(obs)
        new_carry = []
        for layer, layer_kernels, layer_carry in zip(self.memory, kernels, carry, strict=True):
            layer_carry, x = layer.step(layer_kernels, layer_carry, x, start)
            new_carry.append(layer_carry)
        return new_carry, self.actor(x), self.critic(x)[..., 0]


# ---- 4. Pytrees ----------------------------------------------------------------------------------
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
    """All that changes during a run and is in a checkpoint.

    Outside of updates with a leading seed axis S.
    """

    params: Any
    opt_state: Any
    key: Array  # raw PRNG key: orbax cannot store typed ones
    finished: Array  # number of finished episodes, int32 ()
    history: Array  # their returns and last rewards in order, then zeros, float (E, 2)
    env_state: Any
    obs: Array  # (B, O), what the agent reads next
    start: Array  # (B,), 1 if obs opens the episodes
    carry: Any  # memory before it reads obs
    so_far: Array  # return since the episodes began, (B,)


class Segment(NamedTuple):
    """T steps of B environments within one episode each; every leaf is (T, B, ...)."""

    obs: Array  # float (T, B, O)
    start: Array  # float
    action: Array  # int32
    reward: Array  # float


# ---- 5. Returns and loss -------------------------------------------------------------------------
def td_lambda_returns(args: Args, reward: Array, value: Array, bootstrap: Array) -> Array:
    """The TD(lambda) return (Sutton and Barto 2018, section 12.1), float (T, B).

    G_t = r_t + gamma ((1 - lambda) V_{t+1} + lambda G_{t+1}),    G_T = V_T = bootstrap

    reward and value (T, B); bootstrap (B,): the value of what follows, 0 after a termination.
    """

    def backward(later, step):
        G, next_value = later
        reward, value = step
        G = reward + args.gamma * ((1 - args.td_lambda) * next_value + args.td_lambda * G)
        return (G, value), G

    return lax.scan(backward, (bootstrap, bootstrap), (reward, value), reverse=True)[1]


def a2c_loss(params: Any, setup: Setup, carry: Any, segment: Segment, bootstrap: Array) -> tuple[Array, dict]:
    """Advantage actor-critic (Mnih et al. 2016) with TD(lambda) errors, as in bsuite's baseline.

    delta_t = G_t - V_t
    L       = -mean log pi(a_t) delta_t + c_v mean delta_t^2 - c_e entropy

    delta_t is constant in the first term.

    carry: the memory before the segment; bootstrap (B,): the value of what follows it. Returns the
    loss, float (), and metrics, each float ().
    """
    args = setup.args
    _, logits, value = setup.network.apply(params, carry, segment.obs, segment.start, method="scan")
    constant_value = lax.stop_gradient(value)
    returns = td_lambda_returns(args, segment.reward, constant_value, bootstrap)
    error = returns - value

    # policy
    log_pi = nn.log_softmax(logits)
    log_prob = jnp.take_along_axis(log_pi, segment.action[..., None], axis=-1)[..., 0]
    policy_loss = -jnp.mean(log_prob * lax.stop_gradient(error))

    # value
    value_loss = jnp.mean(error**2)

    # entropy
    entropy = -jnp.mean(jnp.sum(jnp.exp(log_pi) * log_pi, axis=-1))

    loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy
    metrics = {
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "entropy": entropy,
    }
    return loss, metrics


# ---- 6. Segment, update, episode -----------------------------------------------------------------
def make_setup(args: Args) -> Setup:
    """Task, network, optimiser and devices for these flags. Raises UsageError."""
    task = make_task(args)
    mesh = common.device_mesh(args.num_devices)
    network = ActorCritic(args, task.env.num_actions, task.length)
    rounds = math.ceil(args.num_episodes / (args.num_envs * args.num_rows))
    rows = math.ceil(args.num_episodes / (args.num_envs * rounds))
    steps = rows * rounds * math.ceil(task.length / args.num_steps)
    learning_rate = common.linear_decay(args.learning_rate, steps) if args.anneal_lr else args.learning_rate
    adam = optax.adam(learning_rate, eps=args.adam_eps)
    optimizer = optax.chain(optax.clip_by_global_norm(args.max_grad_norm), adam)
    return Setup(
        args=args,
        task=task,
        network=network,
        optimizer=optimizer,
        mesh=mesh,
        rounds=rounds,
        rows=rows,
    )


def begin_episodes(setup: Setup, runner: Runner, batch: int) -> Runner:
    """The runner at the start of new episodes, environments and memories spread over the devices."""
    reset_key, key = jax.random.split(runner.key)
    obs, env_state = reset_envs(setup.task, reset_key, batch)
    episodes = {
        "env_state": env_state,
        "obs": obs,
        "start": jnp.ones(batch, jnp.float32),
        "carry": [layer.initial_carry(batch) for layer in make_memory(setup.args, setup.task.length)],
        "so_far": jnp.zeros(batch, jnp.float32),
    }
    over_envs = NamedSharding(setup.mesh, PartitionSpec("env"))
    return runner._replace(key=key, **lax.with_sharding_constraint(episodes, over_envs))


def init_runner(setup: Setup, seed: Array) -> Runner:
    """Fresh parameters and episodes for one agent."""
    params_key, key = jax.random.split(jax.random.PRNGKey(seed))
    episodes = setup.rows * setup.rounds * setup.args.num_envs
    nothing_yet: dict[str, Any] = dict.fromkeys(Runner._fields)
    runner = Runner(**nothing_yet)._replace(
        key=key,
        finished=jnp.zeros((), jnp.int32),
        history=jnp.zeros((episodes, 2), jnp.float32),
    )
    runner = begin_episodes(setup, runner, setup.args.num_envs)
    network = setup.network
    params = network.init(params_key, runner.carry, runner.obs[None], runner.start[None], method="scan")
    return runner._replace(params=params, opt_state=setup.optimizer.init(params))


def collect_segment(setup: Setup, runner: Runner, T: int) -> tuple[Runner, Segment, Array]:
    """Act for T steps.

    Returns the runner moved on, the segment, and the value of what follows, (B,).
    """
    network = setup.network
    kernels = network.apply(runner.params, method="kernels")
    act = partial(network.apply, runner.params, kernels, method="step")

    def act_and_step(runner, key):
        action_key, env_key = jax.random.split(key)
        carry, logits, _ = act(runner.carry, runner.obs, runner.start)
        action = jax.random.categorical(action_key, logits).astype(jnp.int32)
        next_obs, env_state, reward = step_envs(setup.task, env_key, runner.env_state, action)
        step = Segment(obs=runner.obs, start=runner.start, action=action, reward=reward)
        runner = runner._replace(
            env_state=env_state,
            obs=next_obs,
            start=jnp.zeros_like(runner.start),
            carry=carry,
            so_far=runner.so_far + reward,
        )
        return runner, step

    key, steps_key = jax.random.split(runner.key)
    runner, segment = lax.scan(act_and_step, runner, jax.random.split(steps_key, T))
    _, _, following_value = act(runner.carry, runner.obs, runner.start)
    return runner._replace(key=key), segment, following_value


def update(setup: Setup, runner: Runner, T: int, last: bool) -> tuple[Runner, tuple[dict[str, Array], Array]]:
    """T steps and one gradient step on them.

    Returns also metrics and the rewards of the last step, (B,).
    """
    first_carry = runner.carry
    runner, segment, value = collect_segment(setup, runner, T)
    bootstrap = jnp.zeros_like(value) if last else value  # an episode's last step terminates it
    gradient = jax.grad(a2c_loss, has_aux=True)
    grads, metrics = gradient(runner.params, setup, first_carry, segment, bootstrap)
    metrics["grad_norm"] = optax.tree.norm(grads)
    updates, opt_state = setup.optimizer.update(grads, runner.opt_state, runner.params)
    params = optax.apply_updates(runner.params, updates)
    return runner._replace(params=params, opt_state=opt_state), (metrics, segment.reward[-1])


def update_episode(setup: Setup, runner: Runner) -> tuple[Runner, dict[str, Array]]:
    """One episode in each environment: segments of T steps, a last one of what is left.

    Metrics are the last one's.
    """
    T = setup.args.num_steps
    L = setup.task.length
    full = math.ceil(L / T) - 1  # segments before the last one
    runner = begin_episodes(setup, runner, setup.args.num_envs)
    if full:
        runner, _ = lax.scan(lambda runner, _: update(setup, runner, T, last=False), runner, length=full)
    runner, (metrics, last_reward) = update(setup, runner, L - full * T, last=True)
    metrics["return_mean"] = runner.so_far.mean()
    ended = jnp.stack([runner.so_far, last_reward], axis=1)  # (B, 2)
    history = lax.dynamic_update_slice_in_dim(runner.history, ended, runner.finished, axis=0)
    return runner._replace(finished=runner.finished + setup.args.num_envs, history=history), metrics


def for_each_seed(setup: Setup, function: Any) -> Any:
    """``function`` of every seed: one after the other on a CPU, side by side on an accelerator."""
    in_turn = setup.args.num_seeds == 1 or jax.default_backend() == "cpu"
    return partial(lax.map, function) if in_turn else jax.vmap(function)


def init_runners(setup: Setup) -> Runner:
    """Runners of all seeds."""
    seeds = setup.args.seed + jnp.arange(setup.args.num_seeds, dtype=jnp.int32)
    init = for_each_seed(setup, partial(init_runner, setup))
    return jax.jit(init, out_shardings=NamedSharding(setup.mesh, PartitionSpec()))(seeds)


def compile_update(setup: Setup, runners: Runner) -> Any:
    """A row of metrics.csv as one compiled call.

    Returns the runners moved on, and each metric as float (S, rounds).
    """

    def update_row(runner):
        return lax.scan(lambda runner, _: update_episode(setup, runner), runner, length=setup.rounds)

    everywhere = NamedSharding(setup.mesh, PartitionSpec())
    function = for_each_seed(setup, update_row)
    return common.compile_ahead(function, runners, donate_argnums=0, out_shardings=everywhere)


# ---- 7. Evaluation and bsuite's way of reporting -------------------------------------------------
def print_evaluation(args: Args) -> None:
    """Play with the newest checkpoint of --eval, from a fixed key.

    Prints mean, standard error and quantiles for each seed, and keeps them as RUN_DIR/eval.csv.
    """
    setup = make_setup(args)
    run = common.RunDirectory(args, args.env, "a2c_s5_bsuite")
    runners = run.restore(init_runners(setup))

    def play(runner):  # one episode in each of eval_episodes environments, actions sampled
        runner = runner._replace(key=jax.random.PRNGKey(2303_03982))
        runner = begin_episodes(setup, runner, args.eval_episodes)
        runner, _, _ = collect_segment(setup, runner, setup.task.length)
        return runner.so_far

    everywhere = NamedSharding(setup.mesh, PartitionSpec())
    results = np.asarray(jax.jit(for_each_seed(setup, play), out_shardings=everywhere)(runners))  # (S, E)
    common.report_evaluation(run, args.env, results)


def bits(values: np.ndarray) -> str:
    """int (n,) -> 0 1 1."""
    return " ".join(map(str, values))


def umbrella(flag: Any) -> str:
    return "with an umbrella" if flag else "without an umbrella"


def memory_chain_in_words(task: Task, state: Any, action: int, reward: float) -> str:
    if state.time + 1 < task.length:
        what = "shown" if state.time == 0 else "nothing is asked; to be remembered"
        return f"{what}: {bits(state.context)}"
    verdict = "right" if reward > 0 else "wrong"
    asked = f"asked for bit {state.query + 1} of {len(state.context)}, which was {state.context[state.query]}"
    return f"{asked}; the agent's answer: {action}, {verdict}"


def umbrella_chain_in_words(task: Task, state: Any, action: int, reward: float) -> str:
    weather = "it will rain" if state.need_umbrella else "it will stay dry"
    if state.time == 0:
        return f"forecast: {weather}; the agent goes {umbrella(action)}"
    if state.time + 1 < task.length:
        return f"on the way, {umbrella(state.has_umbrella)}"
    verdict = "right" if reward > 0 else "wrong"
    return f"arrived {umbrella(state.has_umbrella)}, {weather}: {verdict}"


def discounting_chain_in_words(task: Task, state: Any, action: int, reward: float) -> str:
    when = np.asarray(task.env_params.reward_timestep)
    if state.time == 0:
        pays = [f"{n}: {state.rewards[n]:.1f} at step {when[n]}" for n in range(len(when))]
        return f"chains pay {', '.join(pays)}; the agent takes {action}"
    waits = "waiting" if reward == 0 else "paid"
    return f"on chain {state.context}: {waits}"


def catch_in_words(task: Task, state: Any, action: int, reward: float) -> str:
    board = np.full((task.env.rows, task.env.columns), ".")
    board[state.paddle_y, state.paddle_x] = "="
    board[state.ball_y, state.ball_x] = "o"
    move = ("left", "stay", "right")[action]
    return "\n".join(["", *map("".join, board), f"the agent's move: {move}"])


def deep_sea_in_words(task: Task, state: Any, action: int, reward: float) -> str:
    board = np.full((task.env.size, task.env.size), ".")
    board[state.row, state.column] = "A"
    move = "right" if action == state.action_mapping[state.row, state.column] else "left"
    return "\n".join(["", *map("".join, board), f"the agent's move: {move}"])


def simple_bandit_in_words(task: Task, state: Any, action: int, reward: float) -> str:
    arms = " ".join(f"{x:.1f}" for x in state.rewards)
    return f"arms pay {arms}; the agent pulls arm {action}"


IN_WORDS: dict[str, Callable[[Task, Any, int, float], str]] = {
    "MemoryChain": memory_chain_in_words,
    "UmbrellaChain": umbrella_chain_in_words,
    "DiscountingChain": discounting_chain_in_words,
    "Catch": catch_in_words,
    "DeepSea": deep_sea_in_words,
    "SimpleBandit": simple_bandit_in_words,
}


def watch(args: Args) -> None:
    """Play an episode with the newest checkpoint of --watch, from a fixed key.

    Prints it step by step in words. Steps in a row of which there is the same to say share a line.
    """
    setup = make_setup(args)
    run = common.RunDirectory(args, args.env, "a2c_s5_bsuite")
    runners = run.restore(init_runners(setup))
    runner = jax.tree.map(lambda x: x[0], runners)  # of the first seed
    runner = runner._replace(key=jax.random.PRNGKey(2303_03982))
    runner = jax.jit(partial(begin_episodes, setup, batch=1))(runner)
    step = jax.jit(partial(collect_segment, setup, T=1))
    print(f"{args.env}, seed {args.seed}, update {run.done}")
    said = []
    for _ in range(setup.task.length):
        state = jax.tree.map(lambda x: x[0], jax.device_get(runner.env_state))
        runner, segment, _ = step(runner)
        reward = segment.reward.item()
        text = IN_WORDS[args.env](setup.task, state, segment.action.item(), reward)
        said.append(f"{text}; reward {reward:+.3g}")
    begin = 0
    for text, same in groupby(said):
        end = begin + len(list(same))
        steps = f"step {end}" if end == begin + 1 else f"steps {begin + 1} to {end}"
        print(f"{steps}: {text}")
        begin = end
    print(f"return {runner.so_far.item():.4g} after {setup.task.length} steps")


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

    history: return and last reward of all episodes, (episodes, 2); a positive last reward is a
    success
    """
    steps = (10, 12, 14, 17, 20, 25, *range(30, 100, 10))
    due = [10**k * step // 10 for k in range(8) for step in steps if 10**k * step % 10 == 0]
    rows = []
    for n in due:
        if n > len(history):
            break
        total = float(history[:n, 0].sum())
        successes = int((history[:n, 1] > 0).sum())
        row = {
            "steps": n * length,
            "episode": n,
            "total_return": total,
            "episode_len": length,
            "episode_return": float(history[n - 1, 0]),
        }
        # what bsuite's own environments count besides, and its analysis scores
        if env == "MemoryChain":
            row["total_perfect"] = successes
        if env in ("MemoryChain", "UmbrellaChain", "Catch"):
            row["total_regret"] = 2 * (n - successes)
        if env == "SimpleBandit":
            row["total_regret"] = n - total
        if env == "DeepSea":
            row["total_bad_episodes"] = n - successes
            row["denoised_return"] = successes
        rows.append(row)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


# ---- 8. Training and command line ----------------------------------------------------------------
def train(args: Args) -> dict[str, Any]:
    """Train as the flags say, keep the run directory and return its summary.

    SystemExit after a signal, once saved.
    """
    setup = make_setup(args)
    with common.RunDirectory(args, args.env, "a2c_s5_bsuite") as run:
        runners = run.restore(init_runners(setup))
        step = compile_update(setup, runners)
        run.compiled(setup.rows, steps=setup.rounds * args.num_envs * setup.task.length)
        while run.done < setup.rows and not run.stopped:
            runners, metrics = step(runners)
            means = jax.tree.map(lambda x: x.mean(axis=1), metrics)
            run.update(runners, {"episodes": runners.finished} | means)
    for seed, history in zip(run.seeds, np.asarray(runners.history), strict=True):
        if run.writes and not run.stopped:
            write_bsuite_log(run.path / f"bsuite_seed{seed}.csv", args.env, setup.task.length, history)
    return run.finish(episodes=len(history))


def run_sweep(args: Args) -> None:
    """All settings of a bsuite experiment, one after the other.

    The same command goes on where it was stopped.

    Runs lie in RUN_DIR/ID-N; RUN_DIR/logs is what bsuite's csv_load reads; RUN_DIR/sweep.json holds
    the flags. Raises UsageError if they are others, as the runs and logs of two sets of flags must
    not be mixed.
    """
    env, settings = SWEEPS[args.sweep]
    check_sweep(args)
    root = Path(args.run_dir or f"runs/{args.sweep}__a2c_s5_bsuite__{args.arch}__s{args.seed}")
    claim_sweep(args, root)
    for i, setting in enumerate(settings):
        run_dir = root / f"{args.sweep}-{i}"
        num_episodes = min(args.num_episodes, setting.get("num_episodes", EPISODES))
        own = replace(args, env=env, sweep="", run_dir=str(run_dir), **setting | {"num_episodes": num_episodes})
        if not (run_dir / "summary.json").exists():
            print(f"{args.sweep}/{i}: {setting}", flush=True)
            try:
                train(replace(own, resume=str(run_dir)) if run_dir.exists() else own)
            except SystemExit:  # after a signal
                print("or go on with the whole sweep by the command that began it")
                raise
        shutil.copy(run_dir / f"bsuite_seed{own.seed}.csv", root / "logs" / f"bsuite_id_-_{args.sweep}-{i}.csv")


def check_sweep(args: Args) -> None:
    """UsageError for a flag that the sweep itself sets, and for several seeds, as its logs are of one."""
    env, settings = SWEEPS[args.sweep]
    if args.num_seeds > 1:
        raise common.UsageError(f"--num-seeds {args.num_seeds}: must be 1 with --sweep {args.sweep}")
    usual = Args(**PRESETS[args.preset])
    for name in ("env", *settings[0]):
        value = getattr(args, name)
        if value != getattr(usual, name) and name != "num_episodes":
            flag = f"--{name.replace('_', '-')} {value}"
            raise common.UsageError(f"{flag}: --sweep {args.sweep} sets it")


def claim_sweep(args: Args, root: Path) -> None:
    """Make a sweep's directory, or go on in it if it was made with these flags.

    Raises UsageError.
    """
    named = ("run_dir", *common.WHERE_IT_RUNS)
    flags = {name: x for name, x in json.loads(json.dumps(vars(args))).items() if name not in named}
    record = root / "sweep.json"
    if not root.exists():
        common.check_new_directory(root)
        draft = root.with_name(root.name + ".tmp")
        (draft / "logs").mkdir(parents=True, exist_ok=True)
        (draft / record.name).write_text(json.dumps(flags, indent=2))
        draft.rename(root)
    try:
        made_with = json.loads(record.read_text())
        differing = [name for name in flags if made_with[name] != flags[name]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise common.UsageError(f"--run-dir {root}: exists and is no sweep of this script ({error})") from None
    for name in differing:
        flag = f"--{name.replace('_', '-')} {flags[name]}"
        then = f"the sweep in {root} was made with {made_with[name]}"
        raise common.UsageError(f"{flag}: {then}; choose another --run-dir")


def main() -> int:
    args = common.parse_args(Args, PRESETS)
    if args.distributed:
        common.join_cluster()
    if args.list_envs:
        print("\n".join(TASKS))
    elif args.eval:
        print_evaluation(args)
    elif args.watch:
        watch(args)
    elif args.sweep:
        run_sweep(args)
    else:
        train(args)
    return 0


if __name__ == "__main__":
    sys.exit(common.run_main(main))
