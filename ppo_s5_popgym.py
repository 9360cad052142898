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
"""Recurrent PPO with resettable S5 layers on POPGym, in one file.

Our implementation of Lu et al. 2023, "Structured State Space Models for In-Context Reinforcement
Learning", 4.2.

    python ppo_s5_popgym.py --env RepeatHard                 # three to five minutes on 2 CPU cores
    python ppo_s5_popgym.py --env RepeatHard --preset paper  # the paper's table, for a GPU

Shapes: T time, B environments, O observation features, A actions (or action dimensions), H model
width, P complex states of an S5 layer, S seeds; time comes first, (T, B, ...). start is 1 where an
observation opens an episode. Departures from the paper are listed in README.md, those of a line of
code marked "Deviation" beside it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.linen.initializers import lecun_normal, normal, orthogonal
from gymnax.environments import spaces
from jax import Array, lax
from jax.scipy.stats import norm
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from matplotlib.figure import Figure

import popgym_jax
import s5_common as common


# ---- 1. Arguments --------------------------------------------------------------------------------
@dataclass(frozen=True)
class RunFlags:
    """The run: what is trained, where it is kept."""

    preset: Literal["default", "meta", "paper"] = "default"
    """flag values to begin from: for a laptop, the same for MetaStatelessCartPole, or the
    paper's; explicit flags win"""

    seed: int = 0
    """seed of the first agent"""

    num_seeds: int = 1
    """independent agents trained in one program, with seeds seed, seed + 1, ..."""

    total_timesteps: int = 4_000_000
    """environment steps for each agent, rounded up to whole rollouts"""

    run_dir: str = ""
    """directory of the run; if empty, runs/ENV__SCRIPT__ARCH__sSEED__TIME-RANDOM"""

    resume: str = ""
    """go on with the run in this directory, exactly as if it had never stopped"""

    checkpoint_interval: int = 20
    """updates between checkpoints"""

    track: bool = False
    """also log to Weights & Biases"""

    list_envs: bool = False
    """print the names of all environments and stop"""


@dataclass(frozen=True)
class EnvironmentFlags:
    """The environment and what the agent gets of it."""

    env: str = "RepeatPreviousHard"
    """a POPGym task, also by the paper's names (RepeatHard, ...), see --list-envs; or one of your own,
    PACKAGE.MODULE:FACTORY, see examples/"""

    num_envs: int = 64
    """parallel environments B"""

    obs_scale: float = 1.0
    """observations are multiplied by this before the network reads them"""

    obs_change: float = 0.0
    """the network also reads an observation's change since the last step, times this; 0: not"""

    normalize_rewards: bool = True
    """divide rewards by the running root mean square of the discounted return"""

    bootstrap_truncated: bool = False
    """value a time limit by its final observation, as if the task went on; off: it ends the task"""

    stagger_steps: int = 1024
    """before training act at random for fewer steps than this, each environment for a number of its own"""


@dataclass(frozen=True)
class LearnerFlags:
    """The learner: PPO."""

    num_steps: int = 256
    """steps of a rollout T; gradients do not reach further back, the memory does"""

    num_minibatches: int = 32
    """minibatches of an epoch; each takes whole sequences of some environments"""

    update_epochs: int = 2
    """passes over each rollout"""

    learning_rate: float = 1e-3
    """Adam step size"""

    anneal_lr: bool = True
    """bring the step size to zero linearly over the run"""

    gamma: float = 0.99
    """discount"""

    gae_lambda: float = 0.85
    """lambda of generalised advantage estimation"""

    advantage_norm: Literal["rollout", "minibatch"] = "rollout"
    """advantages are divided by a deviation that knows earlier rollouts, or by their minibatch's"""

    trial_discount: float = 1.0
    """discount of what follows a failed trial, of an environment that has trials"""

    clip_coef: float = 0.2
    """PPO's clipping range, of the probability ratio and of the value's change"""

    ent_coef: float = 0.0
    """weight of the entropy bonus"""

    vf_coef: float = 1.0
    """weight of the value loss"""

    aux_coef: float = 0.0
    """weight of the identification loss; privileged: in training it tells what is hidden"""

    max_grad_norm: float = 0.5
    """gradients are scaled down to this global norm"""


@dataclass(frozen=True)
class MemoryFlags:
    """The network and its memory."""

    arch: Literal["s5", "s5-noreset", "lru", "mingru", "lstm", "gru", "attention", "mlp"] = "s5"
    """the memory; s5-noreset leaks its state from one episode into the next: the paper's S5 with
    a dot"""

    encoder_layers: tuple[int, ...] = (128,)
    """hidden widths of the encoder, which ends in one more layer of s5-width"""

    decoder_layers: tuple[int, ...] = (128,)
    """hidden widths of the policy's and of the value's decoder"""

    readout: Literal["plain", "multiplicative"] = "plain"
    """what the decoders read: the memory's output, or also its products with the input"""

    readout_size: int = 16
    """products of the multiplicative readout"""

    s5_layers: int = 2
    """layers of S5, or of lru, mingru or attention"""

    s5_width: int = 128
    """model width H, also that of the memory which takes S5's place"""

    s5_state: int = 64
    """complex states P of a layer, each standing for a conjugate pair"""

    s5_dt_min: float = 0.001
    """smallest initial time step"""

    s5_dt_max: float = 0.1
    """largest initial time step"""

    s5_gain: bool = True
    """B times s5-dt-max / time step, so that a slow state hears an input as loudly as a fast one, and C
    at first divided by it"""

    s5_norm: bool = True
    """layer normalisation before each S5 layer"""

    attention_window: int = 128
    """steps back that --arch attention sees"""


@dataclass(frozen=True)
class EvaluationFlags:
    """Evaluation of a run."""

    eval: str = ""
    """evaluate the newest checkpoint of this run directory and stop"""

    watch: str = ""
    """play one episode with the newest checkpoint of this run directory, as text and, of CartPole
    and the pendulum, as RUN_DIR/episode.gif; then stop"""

    eval_episodes: int = 256
    """episodes to evaluate"""

    eval_trials: int = 0
    """trials of an episode in evaluation, of an environment that has trials; 0: as in training"""

    eval_beside: tuple[str, ...] = ()
    """evaluated run directories whose returns per trial join the picture"""


@dataclass(frozen=True)
class DeviceFlags:
    """Devices and processes."""

    num_devices: int = 1
    """devices to spread the environments over"""

    distributed: bool = False
    """join the processes of a cluster first (jax.distributed); num-devices counts all theirs"""


@dataclass(frozen=True)
class Args(RunFlags, EnvironmentFlags, LearnerFlags, MemoryFlags, EvaluationFlags, DeviceFlags):
    """PPO with S5 on POPGym."""

    @property
    def batch_size(self) -> int:
        """Steps of a rollout, in all environments together."""
        return self.num_envs * self.num_steps

    @property
    def num_updates(self) -> int:
        return math.ceil(self.total_timesteps / self.batch_size)

    def check(self) -> None:
        """Raise UsageError for values that cannot work."""
        zero = (
            "seed",
            "obs_change",
            "ent_coef",
            "vf_coef",
            "aux_coef",
            "gamma",
            "gae_lambda",
            "trial_discount",
            "eval_trials",
            "stagger_steps",
        )
        common.check_args(self, zero, at_most={"gamma": 1, "gae_lambda": 1, "trial_discount": 1})
        if self.num_envs % (self.num_minibatches * self.num_devices):
            parts = f"--num-minibatches {self.num_minibatches} x --num-devices {self.num_devices}"
            raise common.UsageError(f"--num-envs {self.num_envs}: must be a multiple of {parts}")
        if self.batch_size < 2 * self.num_minibatches:  # the normalised advantage of a single step is 0
            batch = f"{self.num_envs} x {self.num_steps} steps"
            raise common.UsageError(f"--num-minibatches {self.num_minibatches}: must leave each at least 2 of {batch}")


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "meta": {
        "preset": "meta",
        "total_timesteps": 20_000_000,
        "num_steps": 1024,
        "advantage_norm": "minibatch",
        "gae_lambda": 0.9,
        "trial_discount": 0.5,
        "ent_coef": 0.01,
        "stagger_steps": 0,
        "obs_scale": 8.0,
        "obs_change": 10.0,
        "readout": "multiplicative",
        "s5_dt_min": 0.01,
        "s5_gain": False,
    },
    "paper": {
        "preset": "paper",
        "total_timesteps": 15_000_000,
        "num_steps": 1024,
        "num_minibatches": 8,
        "update_epochs": 30,
        "learning_rate": 5e-5,
        "anneal_lr": False,
        "advantage_norm": "minibatch",
        "gae_lambda": 1.0,
        "normalize_rewards": False,
        "stagger_steps": 0,
        "decoder_layers": (128, 128),
        "s5_layers": 4,
        "s5_width": 256,
        "s5_state": 128,
        "s5_gain": False,
        "s5_norm": False,
        "checkpoint_interval": 5,
    },
}


# ---- 2. Environment and what the agent sees of it ------------------------------------------------
def sensed(env: Any, obs: Array) -> Array:
    """Of observations (..., O) what is sensed (..., O'): all but the last features, which tell of trials."""
    return obs[..., : obs.shape[-1] - getattr(env, "trial_features", 0)]


def with_change(setup: Setup, obs: Array, before: Array, opens: Array) -> Array:
    """Observations (B, O), beside them how what is sensed has changed (B, O'), 0 where one opens.

    before (B, O): those of the step before; opens: bool (B,), an episode or a trial begins with
    obs. The change of a trial-end flag would be the largest number of all, a step after the end.

    Deviation: with --obs-change only. Velocities then need no memory.
    """
    scale = setup.args.obs_change
    if not scale:
        return obs
    change = sensed(setup.env, obs - before)
    change = jnp.where(opens[:, None], 0.0, change)
    return jnp.concatenate([obs, scale * change], axis=-1)


def agent_input(obs: Array, previous_action: Array, start: Array, num_actions: int) -> Array:
    """What the network reads, float (B, O + A + 1).

    Of the observation (B, O), the previous action int (B,) or float (B, A), the start flag (B,).

    The action is one-hot if discrete. Where start is 1 there was none and its place is zero.
    """
    if jnp.issubdtype(previous_action.dtype, jnp.integer):
        previous_action = jax.nn.one_hot(previous_action, num_actions, dtype=jnp.float32)
    return jnp.concatenate([obs, previous_action * (1.0 - start)[:, None], start[:, None]], axis=-1)


def reset_envs(setup: Setup, key: Array, batch: int) -> tuple[Array, Any]:
    """Fresh episodes: what is seen, float (B, O), and environment states."""
    args = setup.args
    keys = jax.random.split(key, batch)
    obs, state = jax.vmap(setup.env.reset_env, (0, None))(keys, setup.env_params)
    obs *= args.obs_scale
    return with_change(setup, obs, obs, jnp.ones(batch, bool)), state


class EnvStep(NamedTuple):
    """What a step of all environments gives; every leaf is (B, ...)."""

    next_obs: Array  # opens a new episode where one ended
    final_obs: Array  # closes the old one there
    state: Any
    reward: Array
    terminated: Array
    truncated: Array
    trial_failed: Array | None  # None where the environment has no trials


def step_envs(setup: Setup, key: Array, state: Any, obs: Array, action: Array) -> EnvStep:
    """Step all environments; where an episode ends, the next one begins.

    obs (B, ...): what was seen before the step, at its beginning the observation itself.
    """
    args = setup.args
    keys = jax.random.split(key, len(action))
    step = jax.vmap(setup.env.step, (0, 0, 0, None))
    next_obs, state, reward, terminated, truncated, info = step(keys, state, action, setup.env_params)
    next_obs *= args.obs_scale
    final_obs = args.obs_scale * info["final_observation"]
    before = obs[:, : next_obs.shape[-1]]
    trial_ended = info.get("trial_ended", jnp.zeros_like(terminated))
    return EnvStep(
        next_obs=with_change(setup, next_obs, before, terminated | truncated | trial_ended),
        final_obs=with_change(setup, final_obs, before, trial_ended),
        state=state,
        reward=reward,
        terminated=terminated,
        truncated=truncated,
        trial_failed=info.get("trial_failed"),
    )


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
            C = common.complex_to_packed(lax.complex(C[..., 0], C[..., 1]) @ V.astype(jnp.complex64)).T
            return C / jnp.tile(self.loudness(), 2)[:, None]

        def init_log_step(key):  # time steps log-uniform
            low = math.log(self.args.s5_dt_min)
            high = math.log(self.args.s5_dt_max)
            return jax.random.uniform(key, (P,), jnp.float32, low, high)

        self.log_step = self.param("log_step", init_log_step)
        self.Lambda_re = self.param("Lambda_re", lambda _: jnp.asarray(Lambda.real, jnp.float32))
        self.Lambda_im = self.param("Lambda_im", lambda _: jnp.asarray(Lambda.imag, jnp.float32))
        self.B_tilde = self.param("B_tilde", init_B)
        self.C_tilde = self.param("C_tilde", init_C)
        self.D = self.param("D", normal(1.0), (H,), jnp.float32)
        self.value = nn.Dense(H)
        self.gate = nn.Dense(H)
        self.norm = nn.LayerNorm() if self.args.s5_norm else lambda u: u

    def initial_carry(self, batch: int) -> Array:
        return jnp.zeros((batch, 2 * self.args.s5_state), jnp.float32)

    def loudness(self) -> Array:
        """What B is multiplied by, float (P,).

        Deviation: zero-order hold makes B_bar as small as the time step, and so what a slow state keeps
        of an input. As C begins divided by this, the layer begins as the same function, but a step of
        the optimiser on C then reaches as far for a slow state as for a fast one.
        """
        step = jnp.exp(self.log_step)
        return self.args.s5_dt_max / step if self.args.s5_gain else jnp.ones_like(step)

    def kernels(self) -> tuple[Array, Array, Array]:
        """The discretised layer, packed and real: Lambda_bar (2P,), B_bar (H, 2P), C (2P, H)."""
        P = self.args.s5_state
        # Deviation: the real part stays negative; the released code lets training push modes into
        # growth.
        Lambda = lax.complex(common.bounded(self.Lambda_re, -math.inf, -1e-4), self.Lambda_im)
        B_tilde = common.packed_to_complex(self.B_tilde).T
        B_tilde *= self.loudness()[:, None]
        Lambda_bar, B_bar = common.discretize_zoh(Lambda, B_tilde, jnp.exp(self.log_step))
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


class Policy(NamedTuple):
    """Categorical over A actions if log_std is None, else A independent Gaussians."""

    mean: Array  # logits or means, (..., A)
    log_std: Array | None  # (..., A)

    def sample(self, key: Array) -> Array:
        """An action, int32 (...,) or float (..., A)."""
        if self.log_std is None:
            return jax.random.categorical(key, self.mean).astype(jnp.int32)
        return self.mean + jnp.exp(self.log_std) * jax.random.normal(key, self.mean.shape, jnp.float32)

    def log_prob(self, action: Array) -> Array:
        """float (...,), of actions such as ``sample`` gives."""
        if self.log_std is None:
            return jnp.take_along_axis(nn.log_softmax(self.mean), action[..., None], axis=-1)[..., 0]
        return norm.logpdf(action, self.mean, jnp.exp(self.log_std)).sum(axis=-1)

    def entropy(self) -> Array:
        """float (...,), in nats."""
        if self.log_std is None:
            return -jnp.sum(nn.softmax(self.mean) * nn.log_softmax(self.mean), axis=-1)
        return jnp.sum(self.log_std + 0.5 * math.log(2 * math.pi * math.e), axis=-1)


def make_memory(args: Args) -> list[nn.Module]:
    """The layers between encoder and decoders, all called alike: see Memory in s5_common.py."""
    if args.arch in ("s5", "s5-noreset"):
        return [S5Layer(args) for _ in range(args.s5_layers)]
    if args.arch == "lru":
        return [common.LRU(args.s5_width, args.s5_state, args.s5_dt_min, args.s5_dt_max) for _ in range(args.s5_layers)]
    if args.arch == "mingru":
        return [common.MinGRU(args.s5_width, args.s5_dt_min, args.s5_dt_max) for _ in range(args.s5_layers)]
    if args.arch == "attention":
        return [common.Attention(args.s5_width, args.s5_layers, args.attention_window)]
    if args.arch == "mlp":
        return [common.Memoryless(args.s5_width)]
    return [common.Recurrent(args.s5_width, {"gru": nn.GRUCell, "lstm": nn.OptimizedLSTMCell}[args.arch])]


def dense_layers(widths: Sequence[int], gain: float) -> list:
    """Layers of these widths, each followed by a leaky ReLU."""
    layers: list = []
    for width in widths:
        layers += [nn.Dense(width, kernel_init=orthogonal(gain)), nn.leaky_relu]
    return layers


class ActorCritic(nn.Module):
    """Encoder, memory, policy and value decoders. Lu et al. 2023, appendix B.

    ``scan`` reads a sequence (T, B, .) to learn, ``step`` one time step (B, .) to act; both do the
    same to the same.
    """

    args: Args
    num_actions: int
    discrete: bool
    num_inputs: int  # features F of the agent's input
    num_hidden: int = 0  # K of what --aux-coef lets the learner see

    def setup(self):
        args = self.args
        head = partial(nn.Dense, kernel_init=orthogonal(0.01))
        if args.readout == "multiplicative":
            self.products = nn.Dense(args.readout_size * self.num_inputs)
        if args.aux_coef:
            self.identify = nn.Dense(self.num_hidden)
        self.encoder = nn.Sequential(dense_layers((*args.encoder_layers, args.s5_width), math.sqrt(2)))
        self.memory = make_memory(args)
        self.actor = nn.Sequential([*dense_layers(args.decoder_layers, 2.0), head(self.num_actions)])
        value_head = nn.Dense(1, kernel_init=orthogonal(1.0))
        self.critic = nn.Sequential([*dense_layers(args.decoder_layers, 2.0), value_head])
        if not self.discrete:
            zeros = nn.initializers.zeros
            self.log_std = self.param("log_std", zeros, (self.num_actions,), jnp.float32)

    def kernels(self) -> list:
        """What ``step`` can reuse for as long as the parameters stay as they are."""
        return [layer.kernels() for layer in self.memory]

    def resets(self, start: Array) -> Array:
        """Where the memory is zeroed before it reads, like start."""
        return jnp.zeros_like(start) if self.args.arch == "s5-noreset" else start

    def scan(self, carry: list, obs: Array, start: Array) -> tuple[list, Policy, Array]:
        """obs (T, B, .), start (T, B).

        Returns the carry, the policy and the value of every step.
        """
        new_carry, h = self.remember(carry, obs, start)
        policy, value = self.decode_all(h, obs)
        return new_carry, policy, value

    def remember(self, carry: list, obs: Array, start: Array) -> tuple[list, Array]:
        """The carry and the memory's output (T, B, H)."""
        T, B = start.shape
        x = self.encoder(obs.reshape(T * B, -1)).reshape(T, B, -1)
        new_carry = []
        for layer, layer_carry in zip(self.memory, carry, strict=True):
            layer_carry, x = layer.scan(layer_carry, x, self.resets(start))
            new_carry.append(layer_carry)
        return new_carry, x

    def scan_and_identify(self, carry: list, obs: Array, start: Array) -> tuple[Policy, Array, Array]:
        """To learn with --aux-coef: policy, value, and what the memory says is hidden, (T, B, K).

        A linear reading of the memory's output. ``step``, which acts, has no part in it.
        """
        _, h = self.remember(carry, obs, start)
        policy, value = self.decode_all(h, obs)
        return policy, value, self.identify(h)

    def step(self, kernels: list, carry: list, obs: Array, start: Array) -> tuple[list, Policy, Array]:
        """obs (B, .), start (B,)."""
        x = self.encoder(obs)
        new_carry = []
        for layer, layer_kernels, layer_carry in zip(self.memory, kernels, carry, strict=True):
            layer_carry, x = layer.step(layer_kernels, layer_carry, x, self.resets(start))
            new_carry.append(layer_carry)
        policy, value = self.decode(x, obs)
        return new_carry, policy, value

    def decode_all(self, h: Array, obs: Array) -> tuple[Policy, Array]:
        """Policy and value (T, B) of the memory's output (T, B, H) and the input (T, B, F)."""
        T, B, H = h.shape
        outputs = self.decode(h.reshape(T * B, H), obs.reshape(T * B, -1))
        return jax.tree.map(lambda y: y.reshape(T, B, *y.shape[1:]), outputs)

    def multiply(self, h: Array, obs: Array) -> Array:
        """The multiplicative readout: h, and W(h) f with W (M, F) linear in h, f the input, (N, H + M).

        Under a random projection the right action depends on the product of what the memory knows
        of the projection with what is seen now; a network that only adds the two has to build it.
        Compare Beck et al. 2023, "Hypernetworks in Meta-Reinforcement Learning".
        Deviation: with --readout multiplicative only.
        """
        W = self.products(h).reshape(len(h), self.args.readout_size, self.num_inputs)
        z = jnp.sum(W * obs[:, None, :], axis=-1)  # a batched product of matrices is slow on a CPU
        return jnp.concatenate([h, z], axis=-1)

    def decode(self, x: Array, obs: Array) -> tuple[Policy, Array]:
        """Policy and value (N,) of what the memory gives, (N, H), and the input, (N, F)."""
        if self.args.readout == "multiplicative":
            x = self.multiply(x, obs)
        mean = self.actor(x)
        log_std = None if self.discrete else jnp.broadcast_to(self.log_std, mean.shape)
        return Policy(mean=mean, log_std=log_std), self.critic(x)[..., 0]


# ---- 4. Pytrees ----------------------------------------------------------------------------------
class Setup(NamedTuple):
    """What stays the same during a run."""

    args: Args
    env: Any
    env_params: Any
    network: ActorCritic
    optimizer: optax.GradientTransformation
    mesh: Mesh


class RewardScale(NamedTuple):
    """What rewards are divided by."""

    mean_square: Array  # running mean square of the discounted return, float ()
    rollouts: Array  # how many are in it, float ()


class AdvantageScale(NamedTuple):
    """What advantages are at least divided by."""

    mean_variance: Array  # running mean of their variance, float ()
    rollouts: Array  # how many are in it, float ()


class Runner(NamedTuple):
    """All that changes during a run and is in a checkpoint.

    Outside of ``update`` with a leading seed axis S.
    """

    params: Any
    opt_state: Any
    key: Array  # raw PRNG key: orbax cannot store typed ones
    reward_scale: RewardScale
    advantage_scale: AdvantageScale
    env_state: Any
    obs: Array  # (B, O + A + 1), what the agent reads next
    start: Array  # (B,), 1 where obs opens an episode
    carry: Any  # memory before it reads obs
    so_far: dict[str, Array]  # return, length and discounted return since the episode began, (B,)


class Rollout(NamedTuple):
    """T steps of B environments; every leaf is (T, B, ...)."""

    obs: Array
    start: Array
    action: Array
    log_prob: Array
    value: Array
    reward: Array
    terminated: Array
    truncated: Array
    final_value: Array  # with --bootstrap-truncated V(final observation) where truncated, else 0
    so_far: dict[str, Array]  # as in Runner, this step included
    trial_failed: Array | None = None  # None where the environment has no trials
    hidden: Array | None = None  # (T, B, K), what --aux-coef lets the learner see, else None


# ---- 5. Advantages and loss ----------------------------------------------------------------------
def compute_gae(args: Args, rollout: Rollout, reward: Array, last_value: Array) -> tuple[Array, Array]:
    """Generalised advantage estimation (Schulman et al. 2016) with time limits (Pardo et al. 2018).

    V'_t    = 0 if the episode ended, else V_{t+1};
              with --bootstrap-truncated V(final observation) if it was truncated
    delta_t = r_t + gamma c_t V'_t - V_t
    A_t     = delta_t + gamma lambda c_t (1 - done_t) A_{t+1},    done = terminated or truncated

    reward (T, B), scaled; last_value (B,). Returns advantages A and returns A + V, float (T, B).

    Deviation: c_t is --trial-discount where step t failed a trial, else 1, as it always is in the
    paper. Without it a failure costs only one trial at the far end of the meta-episode, of which
    gamma leaves nothing, so that there is no reason to avoid one.
    """
    done = rollout.terminated | rollout.truncated
    terminated = rollout.terminated if args.bootstrap_truncated else done
    trial_discount = jnp.ones_like(reward)
    if rollout.trial_failed is not None:
        trial_discount = jnp.where(rollout.trial_failed, args.trial_discount, trial_discount)

    def backward(later, step):
        advantage, next_value = later
        reward, c, value, terminated, done, final_value = step
        next_value = jnp.where(terminated, 0.0, jnp.where(done, final_value, next_value))
        delta = reward + args.gamma * c * next_value - value
        advantage = delta + args.gamma * args.gae_lambda * c * (1.0 - done) * advantage
        return (advantage, value), advantage

    steps = (reward, trial_discount, rollout.value, terminated, done, rollout.final_value)
    nothing_later = (jnp.zeros_like(last_value), last_value)
    _, advantages = lax.scan(backward, nothing_later, steps, reverse=True)
    return advantages, advantages + rollout.value


def ppo_loss(params: Any, setup: Setup, carry: Any, batch: Rollout, advantages: Array, returns: Array) -> tuple:
    """PPO's clipped loss (Schulman et al. 2017) on whole sequences.

    They are replayed from the carry stored at their start.

    carry: of E environments; batch: leaves (T, E, ...); advantages, returns: float (T, E). Returns
    the loss, float (), and metrics, each float ().

    rho = pi(a|s) / pi_old(a|s)
    L   = -mean min(rho A, clip(rho, 1 - eps, 1 + eps) A) + c_v L_v - c_e entropy + c_a L_a
    L_v = mean max((V - R)^2, (V_old + clip(V - V_old, -eps, eps) - R)^2) / 2
    L_a = mean (K h - hidden)^2

    Deviation: L_a, with --aux-coef only, teaches the memory's output h to hold what is hidden
    (Humplik et al. 2019, "Meta reinforcement learning as task inference"). Privileged: it uses what
    a simulator alone knows, in training alone.
    """
    args = setup.args
    eps = args.clip_coef
    apply = partial(setup.network.apply, params, carry, batch.obs, batch.start)
    if args.aux_coef:
        policy, value, identified = apply(method="scan_and_identify")
    else:
        _, policy, value = apply(method="scan")
    log_ratio = policy.log_prob(batch.action) - batch.log_prob
    ratio = jnp.exp(log_ratio)

    # policy
    if args.advantage_norm == "minibatch":
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    clipped_ratio = jnp.clip(ratio, 1 - eps, 1 + eps)
    policy_loss = -jnp.minimum(ratio * advantages, clipped_ratio * advantages).mean()

    # value
    clipped_value = batch.value + jnp.clip(value - batch.value, -eps, eps)
    value_loss = 0.5 * jnp.maximum((value - returns) ** 2, (clipped_value - returns) ** 2).mean()

    # entropy
    entropy = policy.entropy().mean()

    loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy
    metrics = {
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "entropy": entropy,
        "approx_kl": jnp.mean(ratio - 1 - log_ratio),
        "clip_frac": jnp.mean(jnp.abs(ratio - 1) > eps),
        "explained_variance": 1 - jnp.var(returns - batch.value) / (jnp.var(returns) + 1e-8),
        "ratio_error": jnp.max(jnp.abs(ratio - 1)),
    }

    # identification
    if args.aux_coef:
        aux_loss = jnp.mean((identified - batch.hidden) ** 2)
        loss += args.aux_coef * aux_loss
        metrics["aux_loss"] = aux_loss
    return loss, metrics


# ---- 6. Rollout and update -----------------------------------------------------------------------
def make_setup(args: Args) -> Setup:
    """Environment, network, optimiser and devices for these flags. Raises UsageError."""
    try:
        if ":" in args.env:
            env, env_params = common.own_environment("env", args.env, uses="step")
        else:
            env, env_params = popgym_jax.make(args.env)
    except popgym_jax.UnknownEnvironmentError as error:
        raise common.UsageError(f"--env {args.env}: {error}") from None
    has_trials = hasattr(env_params, "num_trials")
    if args.eval_trials and not has_trials:
        raise common.UsageError(f"--eval-trials {args.eval_trials}: must be 0, as {env.name} has no trials")
    if (args.eval or args.watch) and args.eval_trials:
        try:
            env_params = replace(env_params, num_trials=args.eval_trials)
        except (TypeError, ValueError) as error:
            what = f"the parameters of {env.name} cannot be replaced ({error})"
            raise common.UsageError(f"--eval-trials {args.eval_trials}: {what}") from None
    if args.trial_discount < 1 and not has_trials:
        flag = f"--trial-discount {args.trial_discount}"
        if args.trial_discount == PRESETS[args.preset].get("trial_discount"):
            flag += f" of --preset {args.preset}"
        raise common.UsageError(f"{flag}: must be 1, as {env.name} has no trials")
    if args.eval_beside and not args.eval:
        raise common.UsageError(f"--eval-beside {' '.join(args.eval_beside)}: needs --eval")
    if args.aux_coef and not hasattr(env, "identifiable"):
        flag = f"--aux-coef {args.aux_coef}"
        raise common.UsageError(f"{flag}: must be 0, as {env.name} has nothing hidden to identify")
    mesh = common.device_mesh(args.num_devices)
    space = env.action_space(env_params)
    discrete = isinstance(space, spaces.Discrete)
    num_actions = space.n if discrete else math.prod(space.shape)
    obs, state = jax.eval_shape(env.reset_env, jax.random.PRNGKey(0), env_params)
    if has_trials and not hasattr(state, "trial"):
        raise common.UsageError(f"--env {args.env}: its parameters have num_trials, but its state has no trial")
    change = jax.eval_shape(partial(sensed, env), obs)
    seen = obs.size + change.size if args.obs_change else obs.size
    network = ActorCritic(
        args=args,
        num_actions=num_actions,
        discrete=discrete,
        num_inputs=seen + num_actions + 1,
        num_hidden=jax.eval_shape(env.identifiable, state).size if args.aux_coef else 0,
    )
    steps = args.num_updates * args.update_epochs * args.num_minibatches
    learning_rate = common.linear_decay(args.learning_rate, steps) if args.anneal_lr else args.learning_rate
    optimizer = optax.chain(optax.clip_by_global_norm(args.max_grad_norm), optax.adam(learning_rate, eps=1e-5))
    return Setup(
        args=args,
        env=env,
        env_params=env_params,
        network=network,
        optimizer=optimizer,
        mesh=mesh,
    )


def init_runner(setup: Setup, key: Array) -> Runner:
    """Fresh parameters and environments for one agent."""
    batch = setup.args.num_envs
    network = setup.network
    params_key, env_key, key = jax.random.split(key, 3)
    zeros = jnp.zeros(batch, jnp.float32)
    start = jnp.ones(batch, jnp.float32)
    no_action = jnp.zeros((batch, network.num_actions), jnp.float32)
    first_obs, env_state = reset_envs(setup, env_key, batch)
    obs = agent_input(first_obs, no_action, start, network.num_actions)
    carry = [layer.initial_carry(batch) for layer in make_memory(setup.args)]
    method = "scan_and_identify" if setup.args.aux_coef else "scan"
    params = network.init(params_key, carry, obs[None], start[None], method=method)
    return Runner(
        params=params,
        opt_state=setup.optimizer.init(params),
        key=key,
        reward_scale=RewardScale(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32)),
        advantage_scale=AdvantageScale(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32)),
        env_state=env_state,
        obs=obs,
        start=start,
        carry=carry,
        so_far={"return": zeros, "length": zeros, "discounted": zeros},
    )


def stagger(setup: Setup, runner: Runner) -> Runner:
    """Act at random, each environment for a number of steps of its own, below --stagger-steps.

    The memory reads nothing of it.
    Deviation: episodes of one length otherwise begin and end in all environments at once, and most
    rollouts hold no beginning.
    """
    args = setup.args
    space = setup.env.action_space(setup.env_params)
    key, steps_key, actions_key = jax.random.split(runner.key, 3)
    steps = jax.random.randint(steps_key, (args.num_envs,), 0, args.stagger_steps)

    def act_at_random(runner, step):
        number, key = step
        action_key, env_key = jax.random.split(key)
        action = jax.vmap(space.sample)(jax.random.split(action_key, args.num_envs))
        env = step_envs(setup, env_key, runner.env_state, runner.obs, action)
        moved, _ = advance(setup, runner, action, env)

        def chosen(new, old):
            moves = (number < steps).reshape(-1, *[1] * (new.ndim - 1))
            return jnp.where(moves, new, old)

        in_envs = ("env_state", "obs", "start", "so_far")
        leaves = {name: jax.tree.map(chosen, getattr(moved, name), getattr(runner, name)) for name in in_envs}
        return runner._replace(**leaves), None

    numbers = jnp.arange(args.stagger_steps, dtype=jnp.int32)
    keys = jax.random.split(actions_key, args.stagger_steps)
    runner, _ = lax.scan(act_at_random, runner, (numbers, keys))
    return runner._replace(key=key)


def advance(setup: Setup, runner: Runner, action: Array, env: EnvStep) -> tuple[Runner, dict[str, Array]]:
    """The runner after a step of the environments, its memory as it was.

    Also what its episodes have come to, this step included.
    """
    start = (env.terminated | env.truncated).astype(jnp.float32)
    so_far = {
        "return": runner.so_far["return"] + env.reward,
        "length": runner.so_far["length"] + 1.0,
        "discounted": setup.args.gamma * runner.so_far["discounted"] + env.reward,
    }
    moved = runner._replace(
        env_state=env.state,
        obs=agent_input(env.next_obs, action, start, setup.network.num_actions),
        start=start,
        so_far=jax.tree.map(lambda x: x * (1.0 - start), so_far),
    )
    return moved, so_far


def collect_rollout(setup: Setup, runner: Runner) -> tuple[Runner, Rollout, Array]:
    """Act for T steps.

    Returns the runner moved on, the rollout and the value of what comes next, (B,).
    """
    args = setup.args
    network = setup.network
    kernels = network.apply(runner.params, method="kernels")
    act = partial(network.apply, runner.params, kernels, method="step")
    zeros = jnp.zeros(args.num_envs, jnp.float32)

    def act_and_step(runner, key):
        action_key, env_key = jax.random.split(key)
        carry, policy, value = act(runner.carry, runner.obs, runner.start)
        action = policy.sample(action_key)
        hidden = jax.vmap(setup.env.identifiable)(runner.env_state) if args.aux_coef else None
        env = step_envs(setup, env_key, runner.env_state, runner.obs, action)

        def value_of_final():  # read with the carry from before the reset; the carry stays as it is
            final_input = agent_input(env.final_obs, action, zeros, network.num_actions)
            _, _, final_value = act(carry, final_input, zeros)
            return jnp.where(env.truncated, final_value, 0.0)

        cut_off = jnp.any(env.truncated) & args.bootstrap_truncated
        moved, so_far = advance(setup, runner, action, env)
        step = Rollout(
            obs=runner.obs,
            start=runner.start,
            action=action,
            log_prob=policy.log_prob(action),
            value=value,
            reward=env.reward,
            terminated=env.terminated,
            truncated=env.truncated,
            final_value=lax.cond(cut_off, value_of_final, lambda: zeros),
            so_far=so_far,
            trial_failed=env.trial_failed,
            hidden=hidden,
        )
        return moved._replace(carry=carry), step

    key, steps_key = jax.random.split(runner.key)
    runner, rollout = lax.scan(act_and_step, runner, jax.random.split(steps_key, args.num_steps))
    _, _, last_value = act(runner.carry, runner.obs, runner.start)
    return runner._replace(key=key), rollout, last_value


def scale_rewards(args: Args, scale: RewardScale, rollout: Rollout) -> tuple[Array, RewardScale]:
    """Rewards (T, B) divided by the root mean square of the discounted return, and the next scale.

    The scale is that of the rollouts before, so it is frozen while one is collected and learnt
    from; until one has paid, which begins the mean, it is the rollout's own.
    Deviation: the paper does not scale; rewards reach from 1/1024 to 1 between the tasks.
    """
    if not args.normalize_rewards:
        return rollout.reward, scale
    now = jnp.mean(rollout.so_far["discounted"] ** 2)
    mean_square = jnp.where(scale.rollouts == 0, now, scale.mean_square)
    weight = jnp.maximum(1.0 / (scale.rollouts + 1.0), 0.05)
    later = mean_square + weight * (now - mean_square)
    rollouts = jnp.where(later > 0, scale.rollouts + 1.0, 0.0)
    return rollout.reward / jnp.sqrt(mean_square + 1e-8), RewardScale(later, rollouts)


def scale_advantages(args: Args, scale: AdvantageScale, advantages: Array) -> tuple[Array, AdvantageScale]:
    """Advantages of a rollout (T, B) for the loss, and the next scale.

    They are centred, then divided by their deviation or by that of all rollouts so far, whichever
    is larger. The mean begins to forget after 100 rollouts.
    Deviation: the paper's code divides by the deviation of the minibatch alone. Where nothing is at
    stake, in a solved task or in environments that all miss the goal, the errors of the value are
    then made as large as a real difference, and what was learnt is lost.
    """
    if args.advantage_norm == "minibatch":
        return advantages, scale
    now = jnp.var(advantages)
    weight = jnp.maximum(1.0 / (scale.rollouts + 1.0), 0.01)
    mean_variance = scale.mean_variance + weight * (now - scale.mean_variance)
    deviation = jnp.sqrt(jnp.maximum(now, mean_variance))
    later = AdvantageScale(mean_variance, scale.rollouts + 1.0)
    return (advantages - advantages.mean()) / (deviation + 1e-8), later


def update(setup: Setup, runner: Runner) -> tuple[Runner, dict[str, Any]]:
    """One rollout, then epochs of minibatches that permute environments, never time."""
    args = setup.args
    first_carry = runner.carry
    runner, rollout, last_value = collect_rollout(setup, runner)
    reward, reward_scale = scale_rewards(args, runner.reward_scale, rollout)
    advantages, returns = compute_gae(args, rollout, reward, last_value)
    advantages, advantage_scale = scale_advantages(args, runner.advantage_scale, advantages)
    data = (rollout, advantages, returns)

    def minibatch_update(learner, environments):
        params, opt_state = learner
        batch = jax.tree.map(lambda x: x[:, environments], data)
        if args.num_devices > 1:
            over_envs = NamedSharding(setup.mesh, PartitionSpec(None, "env"))
            batch = lax.with_sharding_constraint(batch, over_envs)
        carry = jax.tree.map(lambda x: x[environments], first_carry)
        (_, metrics), grads = jax.value_and_grad(ppo_loss, has_aux=True)(params, setup, carry, *batch)
        metrics["grad_norm"] = optax.tree.norm(grads)
        updates, opt_state = setup.optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return (params, opt_state), metrics

    def epoch(learner, key):
        environments = jnp.arange(args.num_envs, dtype=jnp.int32)
        order = jax.random.permutation(key, environments)
        return lax.scan(minibatch_update, learner, order.reshape(args.num_minibatches, -1))

    key, epochs_key = jax.random.split(runner.key)
    epoch_keys = jax.random.split(epochs_key, args.update_epochs)
    learner = (runner.params, runner.opt_state)
    (params, opt_state), metrics = lax.scan(epoch, learner, epoch_keys)
    runner = runner._replace(
        params=params,
        opt_state=opt_state,
        key=key,
        reward_scale=reward_scale,
        advantage_scale=advantage_scale,
    )

    ratio_error = metrics.pop("ratio_error")  # (epochs, minibatches)
    ended = rollout.terminated | rollout.truncated
    episodes = ended.sum(dtype=jnp.int32)
    metrics = {
        **jax.tree.map(jnp.mean, metrics),
        "first_ratio_error": ratio_error[0, 0],
        "episodes": episodes,
        "return_mean": common.Mean(jnp.sum(rollout.so_far["return"] * ended), episodes),
        "length_mean": common.Mean(jnp.sum(rollout.so_far["length"] * ended), episodes),
    }
    return runner, metrics


def for_each_seed(args: Args, function: Any, seeds: Any) -> Any:
    """``function`` of every seed: one after the other on a CPU, side by side on an accelerator."""
    in_turn = args.num_seeds == 1 or jax.default_backend() == "cpu"
    return lax.map(function, seeds) if in_turn else jax.vmap(function)(seeds)


def placement(setup: Setup) -> Runner:
    """Where a Runner's leaves lie: what learns on every device, the environments spread over them."""
    everywhere: Any = NamedSharding(setup.mesh, PartitionSpec())
    over_envs: Any = NamedSharding(setup.mesh, PartitionSpec(None, "env"))  # after the seeds
    return Runner(
        params=everywhere,
        opt_state=everywhere,
        key=everywhere,
        reward_scale=everywhere,
        advantage_scale=everywhere,
        env_state=over_envs,
        obs=over_envs,
        start=over_envs,
        carry=over_envs,
        so_far=over_envs,
    )


def init_runners(setup: Setup) -> Runner:
    """Runners of all seeds, not staggered where a checkpoint takes their place."""
    args = setup.args
    seeds = args.seed + jnp.arange(args.num_seeds, dtype=jnp.int32)
    keys = jax.vmap(jax.random.PRNGKey)(seeds)
    from_checkpoint = args.resume or args.eval or args.watch

    def init_staggered(key):
        runner = init_runner(setup, key)
        return stagger(setup, runner) if args.stagger_steps and not from_checkpoint else runner

    init = partial(for_each_seed, args, init_staggered)
    return jax.jit(init, out_shardings=placement(setup))(keys)


def compile_update(setup: Setup, runners: Runner) -> Any:
    """``update`` of every seed as one compiled call.

    Each metric comes back as (S,), or as a Mean of two such.
    """
    function = partial(for_each_seed, setup.args, partial(update, setup))
    out = (placement(setup), NamedSharding(setup.mesh, PartitionSpec()))
    return common.compile_ahead(function, runners, donate_argnums=0, out_shardings=out)


# ---- 7. Evaluation -------------------------------------------------------------------------------
def evaluate(setup: Setup, params: Any, key: Array) -> Array:
    """Return of the first episode in each of ``eval_episodes`` environments, float (E,).

    With --eval-trials of its K trials, (E, K).
    """
    envs = jnp.arange(setup.args.eval_episodes, dtype=jnp.int32)
    trials = getattr(setup.env_params, "num_trials", 0)
    setup = setup._replace(args=replace(setup.args, num_envs=len(envs), num_steps=1))

    def step(loop):
        runner, returns, playing = loop
        trial = runner.env_state.trial if trials else 0
        runner, rollout, _ = collect_rollout(setup, runner)
        returns = returns.at[envs, trial].add(rollout.reward[0] * playing)
        return runner, returns, playing * (1.0 - runner.start)

    runner = init_runner(setup, key)._replace(params=params)
    returns = jnp.zeros((len(envs), trials or 1), jnp.float32)
    playing = jnp.ones(len(envs), jnp.float32)
    _, returns, _ = lax.while_loop(lambda loop: loop[2].any(), step, (runner, returns, playing))
    return returns if trials else returns[:, 0]


def print_evaluation(args: Args) -> None:
    """Evaluate the newest checkpoint of --eval with a fixed key.

    Prints mean, standard error and quantiles for each seed, and keeps them as RUN_DIR/eval.csv.
    """
    setup = make_setup(args)
    beside = read_trials(args, getattr(setup.env_params, "num_trials", 0))
    run = common.RunDirectory(args, setup.env.name, "ppo_s5_popgym")
    runners = run.restore(init_runners(setup))
    play = partial(evaluate, setup, key=jax.random.PRNGKey(2303_03982))
    results = np.asarray(jax.jit(partial(lax.map, play))(runners.params))  # (S, E) or (S, E, K)
    of_episodes = results.reshape(*results.shape[:2], -1).sum(axis=-1)
    common.report_evaluation(run, args.env, of_episodes)
    if results.ndim == 3:
        print(f"return of each trial: {save_trials(args, results, beside)}")


def trials_table(run_dir: str, trials: int) -> Path:
    return Path(run_dir) / f"trials_{trials}.csv"


def read_trials(args: Args, trials: int) -> dict[str, np.ndarray]:
    """The tables of trials of the runs of --eval-beside, by run, float (rows, 4).

    Raises UsageError.
    """
    found = {}
    for run_dir in args.eval_beside:
        table = trials_table(run_dir, trials)
        try:
            found[run_dir] = np.loadtxt(table, delimiter=",", skiprows=1, ndmin=2)
            shaped = found[run_dir].shape[1] == 4
        except (OSError, ValueError):
            shaped = False
        if not shaped:
            what = f"{table} is no table of trials; evaluate that run first, with as many trials"
            raise common.UsageError(f"--eval-beside {run_dir}: {what}")
    return found


def save_trials(args: Args, returns: np.ndarray, beside: dict[str, np.ndarray]) -> Path:
    """Write trials_K.csv and, with the runs beside it, trials_K.png into the run directory.

    Returns the table's path.

    returns: of each trial, float (S, E, K).
    """
    S, E, K = returns.shape
    table = trials_table(args.eval, K)
    seeds, trials = np.indices((S, K))
    error = returns.std(axis=1) / math.sqrt(E - 1)
    rows = np.stack([args.seed + seeds, 1 + trials, returns.mean(axis=1), error], axis=-1).reshape(-1, 4)
    np.savetxt(table, rows, "%.8g", ",", header="seed,trial,mean_return,standard_error", comments="")
    common.draw(plot_trials, {args.eval: rows, **beside}, table.with_suffix(".png"))
    return table


def plot_trials(runs: dict[str, np.ndarray], picture: Path) -> None:
    """Mean return of each trial with its standard error, a line for each seed.

    runs: the table of trials of each run.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for run, table in runs.items():
        for seed in np.unique(table[:, 0]):
            _, trial, mean, error = table[table[:, 0] == seed].T
            axes.plot(trial, mean, label=f"{Path(run).resolve().name.lstrip('_')}, seed {seed:.0f}")
            axes.fill_between(trial, mean - error, mean + error, alpha=0.25)
    axes.set(xlabel="trial", ylabel="mean return of a trial")
    axes.legend(fontsize="small")
    figure.savefig(picture, dpi=150)


def play_episode(setup: Setup, params: Any, key: Array) -> Iterator[tuple[Any, Rollout]]:
    """One episode with these parameters, as they are trained.

    Yields the environment's state before each step, and the step, both without axes for time and
    environments, the latter on the host.
    """
    setup = setup._replace(args=replace(setup.args, num_envs=1, num_steps=1))
    step = jax.jit(partial(collect_rollout, setup))
    runner = jax.jit(partial(init_runner, setup))(key)._replace(params=params)
    playing = True
    while playing:
        state = jax.tree.map(lambda x: x[0], runner.env_state)
        runner, rollout, _ = step(runner)
        yield state, jax.tree.map(lambda x: x[0, 0], jax.device_get(rollout))
        playing = not runner.start[0]


def watch(args: Args) -> None:
    """Play an episode with the newest checkpoint of --watch, from a fixed key.

    Prints the state in words, what the agent sees, its action and reward, step by step, and writes
    RUN_DIR/episode.gif if the environment can be drawn.
    """
    setup = make_setup(args)
    run = common.RunDirectory(args, setup.env.name, "ppo_s5_popgym")
    runners = run.restore(init_runners(setup))
    params = jax.tree.map(lambda x: x[0], runners.params)  # of the first seed
    print(f"{args.env}, seed {args.seed}, update {run.done}")
    in_words = hasattr(setup.env, "render_action")  # those of popgym_jax
    drawable = getattr(setup.env, "has_picture", False)
    frames = []
    total = 0.0
    for number, (state, step) in enumerate(play_episode(setup, params, jax.random.PRNGKey(2303_03982)), start=1):
        seen = np.asarray(step.obs[: setup.network.num_inputs - setup.network.num_actions - 1])
        if drawable:
            title = f"step {number}, return so far {total:.2f}"
            frames.append(common.Frame(partial(setup.env.draw, state=state), seen, title))
        total += float(step.reward)
        action = str(step.action)
        print(f"\nstep {number}")
        if in_words:
            action = setup.env.render_action(state, step.action, setup.env_params)
            print(setup.env.render(state, setup.env_params))
        print("the agent sees", np.array2string(seen, precision=2, suppress_small=True, threshold=16))
        print(f"the agent's answer: {action}; reward {step.reward:+.4f}")
    print(f"\nreturn {total:.4f} after {number} steps")
    if drawable:
        picture = run.path / "episode.gif"
        common.save_animation(frames, picture)
        print(f"drawn: {picture}")


# ---- 8. Training and command line ----------------------------------------------------------------
def train(args: Args) -> dict[str, Any]:
    """Train as the flags say, keep the run directory and return its summary.

    SystemExit after a signal, once saved.
    """
    setup = make_setup(args)
    with common.RunDirectory(args, setup.env.name, "ppo_s5_popgym") as run:
        runners = run.restore(init_runners(setup))
        step = compile_update(setup, runners)
        run.compiled(args.num_updates, steps=args.batch_size)
        while run.done < args.num_updates and not run.stopped:
            runners, metrics = step(runners)
            run.update(runners, metrics)
    return run.finish()


def main() -> int:
    args = common.parse_args(Args, PRESETS)
    if args.distributed:
        common.join_cluster()
    if args.list_envs:
        print("\n".join(popgym_jax.registered_envs + popgym_jax.meta_envs))
    elif args.eval:
        print_evaluation(args)
    elif args.watch:
        watch(args)
    else:
        train(args)
    return 0


if __name__ == "__main__":
    sys.exit(common.run_main(main))
