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
#     "playground==0.2.0",
#     "mujoco==4.0.0",
#     "mujoco-mjx==3.17.0",
#     "brax==0.14.2",
# ]
# ///
"""Muesli with resettable S5 layers: meta-RL over randomly projected control tasks, in one file.

Our implementation of Lu et al. 2023, "Structured State Space Models for In-Context Reinforcement
Learning", 4.4, with the learner of Hessel et al. 2021, "Muesli: Combining Improvements in Policy
Optimization", for continuous actions.

    # six DeepMind Control tasks at once
    python muesli_s5_metarl.py
    # one task, minutes on 2 CPU cores
    python muesli_s5_metarl.py --tasks CartpoleSwingup
    # without what is added to the agent's inputs and memory: S5 alone
    python muesli_s5_metarl.py --preset plain
    # the paper's table, for accelerators
    python muesli_s5_metarl.py --preset paper

Shapes: T time, B environments ("slots"), O observation features, A action dimensions, F features
of the agent's input, H model width, P complex states of an S5 layer, K model unroll, N sampled
actions, S seeds; time comes first, (T, B, ...). start is 1 where an observation opens a
meta-episode. Departures from the paper are marked "Deviation".
"""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial, wraps
from pathlib import Path
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.linen.initializers import lecun_normal, normal
from jax import Array, lax
from jax.scipy.stats import norm
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from matplotlib.figure import Figure

import s5_common as common


# ---- 1. Arguments --------------------------------------------------------------------------------
@dataclass(frozen=True)
class RunFlags:
    """The run: what is trained, where it is kept."""

    preset: Literal["default", "plain", "paper"] = "default"
    """values to begin from: for a laptop, the same without additions, or the paper's; flags win"""

    seed: int = 0
    """seed of the first agent"""

    num_seeds: int = 1
    """independent agents trained in one program, with seeds seed, seed + 1, ..."""

    total_timesteps: int = 60_000_000
    """environment steps for each agent, rounded up to whole rollouts"""

    run_dir: str = ""
    """directory of the run; if empty, runs/TASKS__SCRIPT__ARCH__sSEED__TIME-RANDOM"""

    resume: str = ""
    """go on with the run in this directory, exactly as if it had never stopped"""

    checkpoint_interval: int = 20
    """updates between checkpoints"""

    track: bool = False
    """also log to Weights & Biases"""

    list_envs: bool = False
    """print the names of all tasks and stop"""


@dataclass(frozen=True)
class EnvironmentFlags:
    """The environments: tasks and their projections."""

    suite: Literal["dmc", "brax", "gymnax", "own"] = "dmc"
    """where the tasks are from, see --list-envs; own: from functions of yours"""

    tasks: str = ""
    """tasks to train on, separated by commas; if empty, the suite's own. With --suite own each is
    PACKAGE.MODULE:FACTORY, see examples/"""

    eval_tasks: str = ""
    """held-out tasks, evaluated but never trained on; if empty, the suite's own"""

    num_envs: int = 96
    """parallel slots B, shared out between the tasks as evenly as can be"""

    meta_steps: int = 1000
    """steps of a meta-episode, over which memory and projections last"""

    action_repeat: int = 4
    """steps for which an action is held; the agent sees the last observation and the reward of a step"""

    scale_obs: bool = True
    """divide each feature of a task by its root mean square under random actions"""

    obs_change: float = 1.0
    """above 0, the agent also sees the change of its observation since the last action, times this"""

    projection: bool = True
    """new random projections in each meta-episode; off: the agent sees the tasks as they are"""

    obs_size: int = 12
    """features O of the projected observation"""

    action_size: int = 2
    """dimensions A of the action before projection"""

    brax_backend: Literal["spring", "positional", "generalized"] = "spring"
    """Brax's physics"""


@dataclass(frozen=True)
class LearnerFlags:
    """The learner: Muesli."""

    num_steps: int = 125
    """actions of a rollout T, a divisor of those in a meta-episode; gradients reach no further back"""

    num_minibatches: int = 8
    """minibatches of an epoch; each takes whole sequences of some slots"""

    update_epochs: int = 1
    """passes over each rollout"""

    learning_rate: float = 4e-3
    """Adam step size"""

    anneal_lr: bool = True
    """bring the step size to zero linearly over the run"""

    gamma: float = 0.99
    """discount"""

    retrace_lambda: float = 0.95
    """lambda of Retrace"""

    vf_coef: float = 0.25
    """weight of the value loss"""

    ent_coef: float = 0.0
    """weight of a bonus on the policy's entropy"""

    max_grad_norm: float = 1.0
    """gradients are scaled down to this global norm"""

    muesli_pg_coef: float = 1.0
    """weight of the policy gradient"""

    muesli_cmpo_coef: float = 1.0
    """weight of the CMPO regulariser"""

    muesli_model_coef: float = 0.5
    """weight of the model loss; 0 also keeps q_prior untrained"""

    muesli_retrace_q: bool = False
    """Retrace's correction is G - q_prior(s, a); off: G - v_prior(s)"""

    muesli_unroll: int = 1
    """steps K that the model is unrolled for its loss"""

    muesli_samples: int = 16
    """actions N sampled from the prior for each CMPO target"""

    muesli_clip: float = 1.0
    """CMPO clips normalised advantages to this"""

    muesli_target_rate: float = 0.1
    """the target network moves by this share to the parameters at each gradient step"""

    muesli_advantage_decay: float = 0.99
    """beta of the moving average of the squared advantage, per rollout"""

    muesli_support: int = 15
    """values and rewards, after the transform, are categorical over -n, ..., n"""


@dataclass(frozen=True)
class MemoryFlags:
    """The network and its memory."""

    arch: Literal["s5", "lru", "mingru", "lstm", "gru", "attention", "mlp"] = "s5"
    """the memory"""

    state_std: bool = True
    """the policy's standard deviation depends on the state; off: a parameter"""

    encoder_layers: tuple[int, ...] = (128,)
    """hidden widths of the encoder, which ends in one more layer of s5-width"""

    s5_layers: int = 2
    """layers of S5, or of lru, mingru or attention"""

    s5_width: int = 128
    """model width H"""

    s5_state: int = 64
    """complex states P of a layer, each standing for a conjugate pair"""

    s5_dt_min: float = 0.001
    """smallest initial time step"""

    s5_dt_max: float = 0.1
    """largest initial time step"""

    s5_fast_weights: int = 4
    """values, an even number, of a layer of fast weights before each S5 layer; 0: no such layers"""

    s5_fast_decays: int = 3
    """time scales of the fast weights"""

    s5_norm: bool = True
    """layer normalisation before each S5 layer"""

    rnn_width: int = 128
    """width of the LSTM or GRU that takes S5's place"""


@dataclass(frozen=True)
class EvaluationFlags:
    """Evaluation of a run."""

    eval: str = ""
    """evaluate the newest checkpoint of this run directory and stop"""

    watch: str = ""
    """play one meta-episode of the first of --tasks with the newest checkpoint of this run directory,
    drawn as RUN_DIR/episode.gif, and stop"""

    eval_interval: int = 0
    """updates between evaluations of all tasks; 0: only at the end of the run"""

    eval_episodes: int = 32
    """meta-episodes of each task in an evaluation"""

    eval_noise: float = 1.0
    """standard deviation of evaluated actions, in those of the policy; 0: the mean acts"""


@dataclass(frozen=True)
class DeviceFlags:
    """Devices and processes."""

    num_devices: int = 1
    """devices to spread the environments over"""

    distributed: bool = False
    """join the processes of a cluster first (jax.distributed); num-devices counts all theirs"""


@dataclass(frozen=True)
class Args(RunFlags, EnvironmentFlags, LearnerFlags, MemoryFlags, EvaluationFlags, DeviceFlags):
    """Muesli with S5 on randomly projected control tasks."""

    @property
    def batch_size(self) -> int:
        """Steps of a rollout in all slots together."""
        return self.num_envs * self.num_steps * self.action_repeat

    @property
    def decisions(self) -> int:
        """Actions of a meta-episode."""
        return self.meta_steps // self.action_repeat

    @property
    def num_updates(self) -> int:
        return math.ceil(self.total_timesteps / self.batch_size)

    def check(self) -> None:
        """Raise UsageError for values that cannot work."""
        zero = (
            "seed",
            "vf_coef",
            "ent_coef",
            "gamma",
            "retrace_lambda",
            "muesli_pg_coef",
            "muesli_cmpo_coef",
            "muesli_model_coef",
            "muesli_advantage_decay",
            "eval_interval",
            "eval_noise",
            "obs_change",
            "s5_fast_weights",
        )
        at_least = {"meta_steps": 10}  # an evaluation shows tenths of a meta-episode
        at_most = {
            "gamma": 1,
            "retrace_lambda": 1,
            "muesli_target_rate": 1,
            "muesli_advantage_decay": 0.9999,
        }
        common.check_args(self, zero, at_least, at_most)
        train, _ = task_names(self)
        steps = f"--num-steps {self.num_steps}"
        envs = f"--num-envs {self.num_envs}"
        devices = f"--num-devices {self.num_devices}"
        parts = f"--num-minibatches {self.num_minibatches} x {devices}"
        repeat = f"--action-repeat {self.action_repeat}"
        if self.meta_steps % self.action_repeat:
            raise common.UsageError(f"{repeat}: must divide --meta-steps {self.meta_steps}")
        if self.decisions < 10:
            raise common.UsageError(f"{repeat}: --meta-steps {self.meta_steps} must hold 10 actions")
        if self.decisions % self.num_steps:
            of_meta_episode = f"--meta-steps {self.meta_steps}"
            if self.action_repeat > 1:
                of_meta_episode += f" / {repeat}"
            raise common.UsageError(f"{steps}: must divide {of_meta_episode}")
        if self.muesli_unroll >= self.num_steps:
            unroll = f"--muesli-unroll {self.muesli_unroll}"
            raise common.UsageError(f"{unroll}: must be below {steps}")
        if self.num_envs % (self.num_minibatches * self.num_devices):
            raise common.UsageError(f"{envs}: must be a multiple of {parts}")
        if self.s5_fast_weights % 2:
            raise common.UsageError(f"--s5-fast-weights {self.s5_fast_weights}: must be even")
        if self.num_envs < len(train):
            raise common.UsageError(f"{envs}: must be at least 1 for each of {len(train)} tasks")
        for share in sorted(set(task_shares(self.num_envs, len(train)))):
            if share % self.num_devices:
                slots = f"{share}, the slots of a task with {envs}"
                raise common.UsageError(f"{devices}: must divide {slots}")


PLAIN = {
    "action_repeat": 1,
    "scale_obs": False,
    "obs_change": 0.0,
    "state_std": False,
    "s5_fast_weights": 0,
}
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "plain": {
        **PLAIN,
        "preset": "plain",
        "total_timesteps": 16_000_000,
        "learning_rate": 1e-3,
    },
    "paper": {
        **PLAIN,
        "preset": "paper",
        "total_timesteps": 2_000_000_000,
        "num_envs": 1024,
        "num_steps": 1000,
        # Our reading. As one minibatch, 1024 x 1000 frames would be 49 gradient steps in 50e6
        # frames, by which the paper's reacher_easy has passed 800. So they are what is collected
        # between two updates, and the learner goes through them 16 sequences at a time, what one
        # of the paper's 64 TPUs holds: 3,136 gradient steps.
        "num_minibatches": 64,
        "learning_rate": 3e-4,
        "anneal_lr": False,
        "gamma": 0.995,
        "encoder_layers": (512, 512),
        "s5_layers": 10,
        "s5_width": 256,
        "s5_state": 128,
        "s5_norm": False,
        "rnn_width": 512,
        "vf_coef": 1.0,
        "muesli_model_coef": 3.0,
        "muesli_retrace_q": True,
    },
}


# ---- 2. Tasks ------------------------------------------------------------------------------------
class Suite(NamedTuple):
    """Tasks of one package."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]


SUITES: dict[str, Suite] = {
    "dmc": Suite(
        train=(
            "BallInCup",
            "CartpoleSwingup",
            "FingerSpin",
            "FingerTurnHard",
            "PointMass",
            "ReacherEasy",
        ),
        held_out=(
            "CartpoleBalance",
            "FingerTurnEasy",
            "PendulumSwingup",
            "PointMassHard",
            "ReacherHard",
        ),
    ),
    "brax": Suite(
        train=("inverted_pendulum", "reacher", "hopper"),
        held_out=("inverted_double_pendulum",),
    ),
    "gymnax": Suite(
        train=("Pendulum-v1",),
        held_out=("MountainCarContinuous-v0",),
    ),
    "own": Suite(train=(), held_out=()),
}


class Task(NamedTuple):
    """A control task as two functions of one environment; actions lie between low and high.

    None of the packages' own wrappers is around it: no time limit, and no auto-reset, which in
    Playground and Brax returns to one cached state.
    """

    name: str
    obs_size: int
    action_size: int
    low: float | np.ndarray  # or of each dimension
    high: float | np.ndarray
    ends: bool  # may terminate before the meta-episode is over
    reset: Callable  # key -> obs, state
    step: Callable  # key, state, action -> obs, state, reward, terminated


def environments(args: Args) -> dict[str, Callable]:
    """What makes each environment of --suite, by name.

    A package is imported when it is first asked for, as that takes seconds. Raises UsageError.
    """
    if args.suite == "own":
        raise common.UsageError("--suite own: has no list; --tasks PACKAGE.MODULE:FACTORY")
    if args.suite == "gymnax":
        import gymnax

        names = ("Pendulum-v1", "MountainCarContinuous-v0")
        return {name: partial(gymnax.make, name) for name in names}
    if args.suite == "brax":
        from brax import envs

        make = partial(envs.get_environment, backend=args.brax_backend)
        # swimmer fails under this version of jax
        return {name: partial(make, name) for name in envs._envs if name != "swimmer"}
    from mujoco_playground import dm_control_suite

    import control_jax

    # by default the physics are Warp's, which needs a GPU
    load = partial(dm_control_suite.load, config_overrides={"impl": "jax"})
    makers: dict[str, Callable] = {name: partial(load, name) for name in dm_control_suite.ALL_ENVS}
    # the paper's eleven are those that equal DeepMind's own
    for name in control_jax.registered_envs:
        makers[name] = partial(control_jax.make, name)
    return makers


def task_maker(args: Args, name: str, flag: str) -> Callable:
    """What makes the task of --suite that --FLAG names. Raises UsageError."""
    if args.suite == "own":
        if ":" not in name:
            raise common.UsageError(f"--{flag} {name}: must be PACKAGE.MODULE:FACTORY with --suite own")
        return partial(common.own_environment, flag, name, uses="step_env")
    if args.suite == "dmc":
        import control_jax

        if name in control_jax.registered_envs:  # without Playground, which takes seconds to import
            return partial(control_jax.make, name)
    makers = environments(args)
    if name not in makers:
        fails = (args.suite, name) == ("brax", "swimmer")
        why = "fails under this version of jax" if fails else "unknown"
        raise common.UsageError(f"--{flag} {name}: {why}; must be of {', '.join(makers)}")
    return makers[name]


def in_32_bits(function: Callable) -> Callable:
    """A reset or step whose numbers are 32 bits wide.

    The simulators do not declare their types: JAX_ENABLE_X64 would make some of them 64 bits wide,
    and the states that a loop carries would change their types within it.
    """

    @wraps(function)
    def call(*arguments):
        with jax.enable_x64(False):
            return jax.tree.map(jnp.asarray, function(*arguments))

    return call


def gymnax_task(name: str, env: Any, params: Any, ends: bool) -> Task:
    """A task of an environment with gymnax's interface, with continuous actions.

    ends: whether it may terminate. Its time limit is that of the meta-episode.
    """
    actions = env.action_space(params)

    def reset(key):
        return env.reset_env(key, params)

    def step(key, state, action):
        action = action.reshape(actions.shape)
        obs, state, reward, terminated, _ = env.step_env(key, state, action, params)
        return obs, state, jnp.squeeze(reward).astype(jnp.float32), jnp.squeeze(terminated)

    obs, _ = jax.eval_shape(in_32_bits(reset), jax.random.PRNGKey(0))
    return Task(
        name=name,
        obs_size=obs.size,
        action_size=math.prod(actions.shape),
        low=np.broadcast_to(np.float32(actions.low), actions.shape).ravel(),
        high=np.broadcast_to(np.float32(actions.high), actions.shape).ravel(),
        ends=ends,
        reset=in_32_bits(reset),
        step=in_32_bits(step),
    )


def mujoco_task(name: str, env: Any, ends: bool) -> Task:
    """A task of Playground's or Brax's environment, whose states hold their observations.

    ends: whether done is a termination. Playground's tasks never end: there done says that the
    simulation is not finite, and such a step is not taken.
    """

    def reset(key):
        state = env.reset(key)
        return state.obs, state

    def step(key, state, action):
        after = env.step(state, action)
        if ends:
            return after.obs, after, after.reward, after.done > 0
        failed = after.done > 0
        after = jax.tree.map(partial(jnp.where, failed), state, after)
        reward = jnp.where(failed, 0.0, after.reward)
        return after.obs, after, reward, jnp.zeros((), bool)

    return Task(
        name=name,
        obs_size=env.observation_size,
        action_size=env.action_size,
        low=-1.0,
        high=1.0,
        ends=ends,
        reset=in_32_bits(reset),
        step=in_32_bits(step),
    )


def scaled_task(task: Task) -> Task:
    """The task with each feature divided by its root mean square under random actions.

    A finger's target is a tenth of a metre away and its joints turn at ten radians a second: as
    they are, and still more in a random mixture, velocities drown what the reward depends on.
    Measured here, from fixed keys, in 64 slots and 200 steps, with actions held for ten steps. Where
    the task terminates the next trial opens, as in training.
    Deviation: with --scale-obs only.
    """
    slots = 64
    held = 10
    draws = 20
    reset_key, action_key, step_key = jax.random.split(jax.random.PRNGKey(0), 3)
    shape = (draws, slots, task.action_size)
    actions = jax.random.uniform(action_key, shape, jnp.float32, task.low, task.high)
    step_keys = jax.random.split(step_key, (draws * held, slots))

    def step(state, inputs):
        keys, action = inputs
        obs, state, _, terminated = jax.vmap(task.step)(keys, state, action)
        obs, state = open_trials(task, keys, terminated, obs, state)
        return state, obs

    @jax.jit
    def mean_square():
        _, state = jax.vmap(task.reset)(jax.random.split(reset_key, slots))
        _, obs = lax.scan(step, state, (step_keys, jnp.repeat(actions, held, axis=0)))
        return jnp.mean(obs**2, axis=(0, 1))

    scale = 1.0 / np.sqrt(np.asarray(mean_square()) + 1e-4)  # at most 100

    def scaled_reset(key):
        obs, state = task.reset(key)
        return scale * obs, state

    def scaled_step(key, state, action):
        obs, *others = task.step(key, state, action)
        return scale * obs, *others

    return task._replace(reset=scaled_reset, step=scaled_step)


def check_actions(flag: str, name: str, actions: Any) -> None:
    """UsageError unless actions are real numbers within bounds."""
    if not hasattr(actions, "low"):
        raise common.UsageError(f"--{flag} {name}: actions must be continuous, not {actions}")
    if not (np.isfinite(actions.low).all() and np.isfinite(actions.high).all()):
        raise common.UsageError(f"--{flag} {name}: actions must have bounds, not {actions}")


def make_task(args: Args, name: str, flag: str) -> Task:
    """The task of --suite that --FLAG names, without the wrappers of its package.

    Raises UsageError.
    """
    make = task_maker(args, name, flag)
    with jax.enable_x64(False):  # as in in_32_bits
        made = make()
    if isinstance(made, tuple):
        env, params = made
        own = args.suite == "own"
        check_actions(flag, name, env.action_space(params))
        ends = own or name == "MountainCarContinuous-v0"
        task = gymnax_task(env.name if own else name, env, params, ends)
    else:
        task = mujoco_task(name, made, ends=args.suite == "brax")
    return scaled_task(task) if args.scale_obs else task


def names_in(flag: str) -> tuple[str, ...]:
    """What a flag lists, separated by commas."""
    return tuple(name.strip() for name in flag.split(",") if name.strip())


def task_names(args: Args) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the tasks to train on and of those held out. Raises UsageError."""
    suite = SUITES[args.suite]
    train = names_in(args.tasks) or suite.train
    if not train:
        raise common.UsageError("--suite own: needs --tasks PACKAGE.MODULE:FACTORY")
    others = tuple(name for name in suite.held_out if name not in train)
    held_out = names_in(args.eval_tasks) or others
    both = sorted(set(train) & set(held_out))
    if len(set(train)) < len(train):
        raise common.UsageError(f"--tasks {args.tasks}: names a task twice")
    if len(set(held_out)) < len(held_out):
        raise common.UsageError(f"--eval-tasks {args.eval_tasks}: names a task twice")
    if both:
        raise common.UsageError(f"--eval-tasks {args.eval_tasks}: {both[0]} is trained on")
    return train, held_out


def check_task_names(args: Args) -> None:
    """Raise UsageError for an unknown task, before the first one is made, which takes seconds."""
    train, held_out = task_names(args)
    for name in train:
        task_maker(args, name, "tasks")
    for name in held_out:
        task_maker(args, name, "eval-tasks")


# Projections and what the agent sees


def sample_projection(setup: Setup, task: Task, key: Array) -> tuple[Array, Array]:
    """M_o (O, E_o) and M_a (E_a, A) of one meta-episode of a task with E_o features, E_a actions.

    The agent sees M_o o, the task gets M_a a, clipped.
    M_o = g Q, g^2 = max(1, O / E_o), Q uniform with orthonormal columns (rows, if O < E_o):
    projected features have the mean square of the task's own: unit scale in. Rows of M_a have
    length 1 and, if E_a <= A, are orthogonal: an action of length 1 can drive any actuator through
    its full range: full range out. Without --projection: identities.
    """
    O = setup.obs_size  # noqa: E741
    A = setup.action_size
    E_o = task.obs_size
    E_a = task.action_size
    if not setup.args.projection:
        return jnp.eye(O, E_o, dtype=jnp.float32), jnp.eye(E_a, A, dtype=jnp.float32)
    obs_key, action_key = jax.random.split(key)
    Q = jax.random.orthogonal(obs_key, max(O, E_o), dtype=jnp.float32)[:O, :E_o]
    action_key = once_computed(Q, action_key)
    M_a = jax.random.orthogonal(action_key, max(A, E_a), dtype=jnp.float32)[:E_a, :A]
    M_o = math.sqrt(max(1, O / E_o)) * Q
    return M_o, M_a / jnp.linalg.norm(M_a, axis=1, keepdims=True)


def once_computed(x: Array, keys: Array) -> Array:
    """The keys as they are, but not before x is computed.

    jax.random.orthogonal decomposes matrices, and several large batches of decompositions at once,
    as those of six tasks with 176 slots each, can block each other for ever on a CPU (jax 0.10).
    So they wait for one another.
    """
    return jnp.where(jnp.isfinite(x).all(), keys, 0)


def project(matrices: Array, vectors: Array) -> Array:
    """Matrices (b, N, M) times vectors (b, M): (b, N)."""
    return jnp.einsum("bnm,bm->bn", matrices, vectors)


def with_change(args: Args, obs: Array, before: Array, opens: Array) -> Array:
    """Observations (B, O), beside them how they have changed (B, O), 0 where a trial opens.

    before (B, O): those of the action before; opens: bool (B,).

    Deviation: with --obs-change only.
    """
    if not args.obs_change:
        return obs
    change = jnp.where(opens[:, None], 0.0, obs - before)
    return jnp.concatenate([obs, args.obs_change * change], axis=-1)


def agent_input(obs: Array, reward: Array, done: Array, previous_action: Array, start: Array) -> Array:
    """Algorithm 1's observation, float (B, O + A + 3), never the task.

    What came before, reward, done and action, is 0 where start is 1.
    """
    done = done.astype(jnp.float32)
    before = jnp.concatenate([reward[:, None], done[:, None], previous_action], axis=-1)
    before *= (1.0 - start)[:, None]
    return jnp.concatenate([obs, before, start[:, None]], axis=-1)


# All slots side by side


def task_shares(num_envs: int, tasks: int) -> tuple[int, ...]:
    """Slots of each task: equal shares, or shares in whole units, the first tasks with one more.

    A unit is the largest power of two up to 8 that divides the slots and leaves a unit for each
    task, so that the shares still spread over up to 8 devices. 1024 slots of 6 tasks: 128 units of
    8, 176, 176, 168, 168, 168, 168. The number of devices has no say: a run may be resumed on
    another one. All slots keep their simulators, as to draw the task anew in each meta-episode, as
    Algorithm 1 does, every slot would have to step the simulators of all tasks.

    num_envs: at least one for each task.
    """
    if num_envs % tasks == 0:
        return (num_envs // tasks,) * tasks
    units = [unit for unit in (8, 4, 2, 1) if num_envs % unit == 0 and num_envs // unit >= tasks]
    unit = units[0]
    least, more = divmod(num_envs // unit, tasks)
    return tuple(unit * (least + (place < more)) for place in range(tasks))


def by_task(setup: Setup, x: Array) -> list[Array]:
    """An array (B, ...) in parts, the slots of each task."""
    shares = task_shares(len(x), len(setup.tasks))
    return jnp.split(x, np.cumsum(shares)[:-1].tolist())


def select(condition: Array, new: Any, old: Any) -> Any:
    """``new`` where the condition bool (b,) holds, else ``old``; leaves begin with b."""
    where = jax.vmap(lambda c, x, y: jnp.where(c, x, y).astype(y.dtype))
    return jax.tree.map(partial(where, condition), new, old)


class World(NamedTuple):
    """All B slots, those of one task side by side.

    A slot keeps its task; every meta-episode has a new projection.
    """

    env_state: tuple[Any, ...]  # of each task
    matrices: tuple[Any, ...]  # of each task, M_o and M_a for each of its b slots
    obs: Array  # (B, F), what the agent reads next
    start: Array  # (B,), 1 where obs opens a meta-episode
    time: Array  # actions taken in the meta-episode, int32 (B,)
    so_far: Array  # return since it began, or since the run did, (B,)
    whole: Array  # bool (B,), false in a first meta-episode that did not begin at its first step


def reset_world(setup: Setup, key: Array) -> World:
    """New meta-episodes in all slots."""
    batch = setup.args.num_envs
    shares = task_shares(batch, len(setup.tasks))
    task_keys = jax.random.split(key, len(setup.tasks))
    matrices: list[tuple[Array, Array]] = []
    states = []
    obs = []
    for task, share, task_key in zip(setup.tasks, shares, task_keys, strict=True):
        projection_keys, reset_keys = jax.random.split(task_key, (2, share))
        if matrices:
            projection_keys = once_computed(matrices[-1][1], projection_keys)
        M_o, M_a = jax.vmap(partial(sample_projection, setup, task))(projection_keys)
        native_obs, state = jax.vmap(task.reset)(reset_keys)
        matrices.append((M_o, M_a))
        states.append(state)
        obs.append(project(M_o, native_obs))
    seen = jnp.concatenate(obs)
    seen = with_change(setup.args, seen, seen, jnp.ones(batch, bool))
    zeros = jnp.zeros(batch, jnp.float32)
    start = jnp.ones(batch, jnp.float32)
    no_action = jnp.zeros((batch, setup.action_size), jnp.float32)
    return World(
        env_state=tuple(states),
        matrices=tuple(matrices),
        obs=agent_input(seen, zeros, zeros, no_action, start),
        start=start,
        time=jnp.zeros(batch, jnp.int32),
        so_far=zeros,
        whole=jnp.ones(batch, bool),
    )


class TaskStep(NamedTuple):
    """What a step of b slots of one task gives."""

    obs: Array  # projected, (b, O); the first of the new trial where one opened
    state: Any
    reward: Array  # the sum over the steps for which the action was held, by their usual number, (b,)
    terminated: Array  # bool (b,)


def hold_action(task: Task, repeat: int, keys: Array, state: Any, action: Array) -> tuple[Any, Any, Array, Array]:
    """b slots of one task for ``repeat`` steps, fewer where it terminates, with one action (b, E_a).

    keys (b,). Returns observation, state, sum of the rewards (b,), terminated (b,).
    """
    step = jax.vmap(task.step)
    if repeat == 1:
        return step(keys, state, action)
    first_keys, *later_keys = jnp.moveaxis(jax.vmap(lambda key: jax.random.split(key, repeat))(keys), 1, 0)
    held = step(first_keys, state, action)

    def once_more(held, keys):
        obs, state, reward, terminated = held
        later_obs, later_state, more, ended = step(keys, state, action)
        obs, state = select(terminated, (obs, state), (later_obs, later_state))
        reward += jnp.where(terminated, 0.0, more)
        return (obs, state, reward, terminated | ended), None

    held, _ = lax.scan(once_more, held, jnp.stack(later_keys))
    return held


def open_trials(task: Task, keys: Array, terminated: Array, obs: Array, state: Any) -> tuple[Array, Any]:
    """Observations (b, E_o) and states, of a new trial where the last one has terminated, bool (b,).

    keys (b,).
    """
    if not task.ends:
        return obs, state

    def with_new_ones():
        fresh = jax.vmap(task.reset)(keys)
        return select(terminated, fresh, (obs, state))

    return lax.cond(terminated.any(), with_new_ones, lambda: (obs, state))


def step_task(task: Task, repeat: int, key: Array, state: Any, matrices: Any, action: Array) -> TaskStep:
    """Step the b slots of one task with actions (b, A), each held for ``repeat`` steps.

    Where it terminates, a new trial opens, of the same projection.
    """
    M_o, M_a = matrices
    step_keys, reset_keys = jax.random.split(key, (2, len(action)))

    # the action in the task's own units
    middle = (task.high + task.low) / 2
    half = (task.high - task.low) / 2
    native_action = jnp.clip(middle + half * project(M_a, action), task.low, task.high)

    obs, state, reward, terminated = hold_action(task, repeat, step_keys, state, native_action)
    obs, state = open_trials(task, reset_keys, terminated, obs, state)
    return TaskStep(obs=project(M_o, obs), state=state, reward=reward / repeat, terminated=terminated)


def step_world(setup: Setup, key: Array, world: World, action: Array) -> tuple[World, Array, Array]:
    """Step all slots with actions (B, A): the world moved on, rewards (B,), terminated (B,)."""
    repeat = setup.args.action_repeat
    keys = jax.random.split(key, len(setup.tasks))
    actions = by_task(setup, action)
    steps = []
    for i, task in enumerate(setup.tasks):
        steps.append(step_task(task, repeat, keys[i], world.env_state[i], world.matrices[i], actions[i]))
    obs = jnp.concatenate([step.obs for step in steps])
    reward = jnp.concatenate([step.reward for step in steps])
    terminated = jnp.concatenate([step.terminated for step in steps])
    before = world.obs[:, : setup.obs_size]
    seen = with_change(setup.args, obs, before, terminated)
    start = jnp.zeros_like(world.start)
    later = world._replace(
        env_state=tuple(step.state for step in steps),
        obs=agent_input(seen, reward, terminated, action, start),
        start=start,
        time=world.time + 1,
        so_far=world.so_far + repeat * reward,
    )
    return later, reward, terminated


def open_meta_episodes(setup: Setup, key: Array, world: World) -> World:
    """New meta-episodes, with new projections, in the slots whose last one is over."""
    over = world.time >= setup.args.decisions
    over_in_task = by_task(setup, over)

    def open_those():
        fresh = reset_world(setup, key)
        env_state = []
        matrices = []
        for i, own in enumerate(over_in_task):
            env_state.append(select(own, fresh.env_state[i], world.env_state[i]))
            matrices.append(select(own, fresh.matrices[i], world.matrices[i]))
        return World(
            env_state=tuple(env_state),
            matrices=tuple(matrices),
            obs=select(over, fresh.obs, world.obs),
            start=select(over, fresh.start, world.start),
            time=select(over, fresh.time, world.time),
            so_far=select(over, fresh.so_far, world.so_far),
            whole=select(over, fresh.whole, world.whole),
        )

    return lax.cond(over.any(), open_those, lambda: world)


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


class FastWeights(nn.Module):
    """Sums of products of what is seen with values, read by what is seen now.

    v = norm(u),    w_t = W1 v
    R_t = (1 - start_t) lambda R_{t-1} + sqrt(1 - lambda^2) w_t q_t^T
    out = u + W3 gelu(W2 [v, f(R_t q_t)]),    f(x) = sign(x) log(1 + abs(x))

    q: the observation as it is seen, and with --obs-change its change. Each of these Q keys is
    remembered times each of M values w, for each of K decays lambda, and what is remembered is read
    by each of the keys. Such a product is the same under every projection,
    (M_o a)^T (M_o b) = g^2 a^T b, where a network that only adds has to learn it for all of them.
    Schmidhuber 1992, "Learning to Control Fast-Weight Memories"; without decays it is the linear
    attention of Katharopoulos et al. 2020.

    Parameters besides W: log_rate (K,), lambda = exp(-exp(log_rate)). The carry R is float
    (B, Q K M O), in two halves, as the recurrence takes real and imaginary parts; these decays
    are real.
    Deviation: with --s5-fast-weights only.
    """

    args: Args
    obs_size: int

    def setup(self):
        slowest = math.log(0.01)
        fastest = math.log(0.5)
        rates = jnp.linspace(fastest, slowest, self.args.s5_fast_decays, dtype=jnp.float32)
        self.log_rate = self.param("log_rate", lambda _: rates)
        self.values = nn.Dense(self.args.s5_fast_weights)
        self.norm = nn.LayerNorm()
        self.mix = nn.Dense(self.args.s5_width)
        self.out = nn.Dense(self.args.s5_width)

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """(2, Q, K, M / 2, O), of a slot's carry."""
        args = self.args
        num_keys = 2 if args.obs_change else 1
        return 2, num_keys, args.s5_fast_decays, args.s5_fast_weights // 2, self.obs_size

    def initial_carry(self, batch: int) -> Array:
        return jnp.zeros((batch, math.prod(self.shape)), jnp.float32)

    def kernels(self) -> tuple[Array, Array]:
        """The decays of the carry's numbers, as complex ones, and what is written weighs, (K,)."""
        decay = jnp.exp(-jnp.exp(self.log_rate))
        half = jnp.broadcast_to(decay[:, None, None], self.shape[1:]).reshape(-1)
        return jnp.concatenate([half, jnp.zeros_like(half)]), jnp.sqrt(1 - decay**2)

    def keys(self, inputs: Array) -> Array:
        """Of the agent's input (N, F), float (N, Q, O)."""
        num_keys = self.shape[1]
        return inputs[:, : num_keys * self.obs_size].reshape(len(inputs), num_keys, self.obs_size)

    def write(self, gain: Array, v: Array, q: Array) -> Array:
        """What is added to the carry, (N, Q K M O)."""
        w = self.values(v).reshape(len(v), 2, 1, 1, -1, 1)
        return (w * gain[:, None, None] * q[:, None, :, None, None, :]).reshape(len(v), -1)

    def read(self, u: Array, v: Array, q: Array, R: Array) -> Array:
        """The layer's output (N, H) of its carry (N, Q K M O)."""
        R = R.reshape(len(u), -1, self.obs_size)
        read_by_each = [jnp.sum(R * key[:, None], axis=-1) for key in jnp.moveaxis(q, 1, 0)]
        found = jnp.concatenate(read_by_each, axis=-1)  # (N, Q Q K M)
        found = jnp.sign(found) * jnp.log1p(jnp.abs(found))
        return u + self.out(nn.gelu(self.mix(jnp.concatenate([v, found], axis=-1))))

    def scan(self, carry: Array, u: Array, start: Array, inputs: Array) -> tuple[Array, Array]:
        """u (T, B, H), start (T, B), the agent's inputs (T, B, F)."""
        decay, gain = self.kernels()
        T, B, H = u.shape
        u = u.reshape(T * B, H)
        v = self.norm(u)
        q = self.keys(inputs.reshape(T * B, -1))
        R = common.linear_recurrence(decay, self.write(gain, v, q).reshape(T, B, -1), 1.0 - start, carry)
        return R[-1], self.read(u, v, q, R.reshape(T * B, -1)).reshape(T, B, H)

    def step(self, kernels: tuple, carry: Array, u: Array, start: Array, inputs: Array) -> tuple[Array, Array]:
        """u (B, H), start (B,), inputs (B, F)."""
        decay, gain = kernels
        v = self.norm(u)
        q = self.keys(inputs)
        R = common.recurrence_step(decay, carry, self.write(gain, v, q), 1.0 - start)
        return R, self.read(u, v, q, R)


class Policy(NamedTuple):
    """A independent Gaussians."""

    mean: Array  # (..., A)
    log_std: Array  # (..., A)

    def sample(self, key: Array, noise: float = 1.0) -> Array:
        """An action, float (..., A), with the deviation times ``noise``."""
        normal_draw = jax.random.normal(key, self.mean.shape, jnp.float32)
        return self.mean + noise * jnp.exp(self.log_std) * normal_draw

    def log_prob(self, action: Array) -> Array:
        """float (...,), of actions such as ``sample`` gives."""
        return norm.logpdf(action, self.mean, jnp.exp(self.log_std)).sum(axis=-1)

    def entropy(self) -> Array:
        """float (...,), in nats."""
        return jnp.sum(self.log_std + 0.5 * math.log(2 * math.pi * math.e), axis=-1)


def make_memory(args: Args, obs_size: int) -> list[nn.Module]:
    """The layers between encoder and heads, all called alike: see Memory in s5_common.py.

    Fast weights are also given the agent's input.
    """
    if args.arch == "s5":
        layers: list[nn.Module] = []
        for _ in range(args.s5_layers):
            if args.s5_fast_weights:
                layers.append(FastWeights(args, obs_size))
            layers.append(S5Layer(args))
        return layers
    if args.arch == "lru":
        return [common.LRU(args.s5_width, args.s5_state, args.s5_dt_min, args.s5_dt_max) for _ in range(args.s5_layers)]
    if args.arch == "mingru":
        return [common.MinGRU(args.s5_width, args.s5_dt_min, args.s5_dt_max) for _ in range(args.s5_layers)]
    if args.arch == "attention":
        return [common.Attention(args.s5_width, args.s5_layers, window=args.decisions)]
    if args.arch == "mlp":
        return [common.Memoryless(args.s5_width)]
    cell = {"gru": nn.GRUCell, "lstm": nn.OptimizedLSTMCell}[args.arch]
    return [common.Recurrent(args.rnn_width, cell)]


class Agent(nn.Module):
    """Encoder -> memory -> latent h; on h: policy, value, and the model g.

    The model g(h, a) gives the next latent and the reward.

    ``scan`` reads a sequence (T, B, F) to learn, ``step`` one time step (B, F) to act; both do the
    same to the same. Latents are normalised, those of the memory and those of the model alike, as
    the same heads read both.
    """

    args: Args
    action_size: int
    obs_size: int  # features O of the observation

    def setup(self):
        args = self.args
        bins = 2 * args.muesli_support + 1
        latent_width = args.rnn_width if args.arch in ("lstm", "gru") else args.s5_width
        head = partial(nn.Dense, kernel_init=normal(0.001))

        # encoder and memory
        layers: list = []
        for width in (*args.encoder_layers, args.s5_width):
            layers += [nn.Dense(width), nn.relu]
        self.encoder = nn.Sequential(layers)
        self.memory = make_memory(args, self.obs_size)
        self.latent_norm = nn.LayerNorm()  # Deviation: between memory and heads, in every preset

        # policy and value
        self.policy_head = head(self.action_size)
        self.value_head = head(bins)
        initial = nn.initializers.constant(math.log(0.7))
        self.log_std = self.param("log_std", initial, (self.action_size,), jnp.float32)
        self.std_head = head(self.action_size) if args.state_std else lambda h: 0.0

        # model
        self.model_h = nn.Dense(latent_width)
        self.model_a = nn.Dense(latent_width, use_bias=False)
        self.model_out = nn.Dense(latent_width)
        self.model_norm = nn.LayerNorm()
        self.reward_head = head(bins)

    def kernels(self) -> list:
        """What ``step`` can reuse for as long as the parameters stay as they are."""
        return [layer.kernels() for layer in self.memory]

    def scan(self, carry: list, obs: Array, start: Array) -> tuple[list, Array]:
        """Latents (T, B, H)."""
        T, B = start.shape
        x = self.encoder(obs.reshape(T * B, -1)).reshape(T, B, -1)
        new_carry = []
        for layer, layer_carry in zip(self.memory, carry, strict=True):
            also = (obs,) if isinstance(layer, FastWeights) else ()
            layer_carry, x = layer.scan(layer_carry, x, start, *also)
            new_carry.append(layer_carry)
        return new_carry, self.latent_norm(x)

    def step(self, kernels: list, carry: list, obs: Array, start: Array) -> tuple[list, Array]:
        """Latents (B, H)."""
        x = self.encoder(obs)
        new_carry = []
        for layer, layer_kernels, layer_carry in zip(self.memory, kernels, carry, strict=True):
            also = (obs,) if isinstance(layer, FastWeights) else ()
            layer_carry, x = layer.step(layer_kernels, layer_carry, x, start, *also)
            new_carry.append(layer_carry)
        return new_carry, self.latent_norm(x)

    def policy(self, h: Array) -> Policy:
        """Means within +-1, where no side of the Gaussian is clipped away.

        Standard deviations in [0.1, 1].
        """
        mean = jnp.tanh(self.policy_head(h))
        log_std = common.bounded(self.log_std + self.std_head(h), math.log(0.1), 0.0)
        return Policy(mean=mean, log_std=jnp.broadcast_to(log_std, mean.shape))

    def value(self, h: Array) -> Array:
        """Logits of the categorical value, (..., bins)."""
        return self.value_head(h)

    def model(self, h: Array, action: Array) -> tuple[Array, Array]:
        """g(h, a): the next latent (..., H) and logits of the reward (..., bins).

        h and action broadcast.
        """
        x = nn.relu(self.model_h(h) + self.model_a(action))
        return self.model_norm(h + self.model_out(x)), self.reward_head(x)

    def everything(self, carry: list, obs: Array, start: Array) -> tuple:
        """Calls every part once, to initialise all parameters."""
        _, h = self.scan(carry, obs, start)
        policy = self.policy(h)
        return policy, self.value(h), self.model(h, policy.mean)


# ---- 4. Pytrees ----------------------------------------------------------------------------------
class Setup(NamedTuple):
    """What stays the same during a run."""

    args: Args
    tasks: tuple[Task, ...]
    obs_size: int  # O
    action_size: int  # A
    network: Agent
    optimizer: optax.GradientTransformation
    mesh: Mesh


class AdvantageScale(NamedTuple):
    """What advantages are divided by, squared: a moving average, its bias not yet corrected."""

    square: Array  # float ()
    rollouts: Array  # how many are in it, float ()


class Runner(NamedTuple):
    """All that changes during a run and is in a checkpoint.

    Outside of ``update`` with a leading seed axis S.
    """

    params: Any
    target_params: Any  # moving average of the parameters: the prior
    opt_state: Any
    key: Array  # raw PRNG key: orbax cannot store typed ones
    advantage_scale: AdvantageScale
    world: World
    carry: Any  # memory before it reads the world's obs
    target_carry: Any  # the same of the target network


class Rollout(NamedTuple):
    """T steps of B slots; every leaf is (T, B, ...)."""

    obs: Array  # what the agent read, float
    start: Array  # float
    action: Array  # float (T, B, A)
    log_prob: Array  # float
    reward: Array  # float
    terminated: Array  # bool


class Targets(NamedTuple):
    """What the losses aim at, all from the target network; every leaf is (T, B, ...)."""

    returns: Array  # G
    advantages: Array  # (G - v_prior) / sigma
    actions: Array  # a_k ~ pi_prior, (T, B, N, A)
    weights: Array  # w_k of CMPO, (T, B, N)


# ---- 5. Targets and loss -------------------------------------------------------------------------
def squash(x: Array) -> Array:
    """MuZero's transform (Pohlen et al. 2018).

    h(x) = sign(x) (sqrt(abs(x) + 1) - 1) + eps x,    eps = 0.001
    """
    return jnp.sign(x) * (jnp.sqrt(jnp.abs(x) + 1) - 1) + 1e-3 * x


def unsquash(y: Array) -> Array:
    """The inverse: sign(y) (((sqrt(1 + 4 eps (abs(y) + 1 + eps)) - 1) / (2 eps))^2 - 1).

    Written without its cancellation.
    """
    inner = jnp.abs(y) + 1 + 1e-3
    return jnp.sign(y) * ((2 * inner / (jnp.sqrt(1 + 4e-3 * inner) + 1)) ** 2 - 1)


def two_hot(x: Array, support: int) -> Array:
    """x (...) -> probabilities (..., 2 support + 1).

    The two integers around h(x) share it so that its mean is h(x).
    """
    y = jnp.clip(squash(x), -support, support)
    bins = jnp.arange(-support, support + 1, dtype=jnp.float32)
    return jnp.maximum(0.0, 1 - jnp.abs(y[..., None] - bins))


def expected(logits: Array) -> Array:
    """The scalar (...) that logits (..., 2 support + 1) stand for: h^-1 of the mean."""
    support = logits.shape[-1] // 2
    bins = jnp.arange(-support, support + 1, dtype=jnp.float32)
    return unsquash(nn.softmax(logits) @ bins)


def cross_entropy(logits: Array, x: Array) -> Array:
    """-sum_i two_hot(x)_i log p_i, (...)."""
    support = logits.shape[-1] // 2
    return -jnp.sum(two_hot(x, support) * nn.log_softmax(logits), axis=-1)


def retrace(args: Args, rollout: Rollout, value: Array, q: Array, ratio: Array) -> Array:
    """Retrace (Munos et al. 2016) with the prior's model as its action values, float (T, B).

    G_t = r_t + gamma (1 - terminated_t) (v_{t+1} + c_{t+1} (G_{t+1} - q_{t+1})),    c_T = 0
    c_t = lambda min(1, pi_prior(a_t|s_t) / pi_b(a_t|s_t))

    value (T + 1, B): v_prior, also of what follows the rollout, so that its end, and that of a
    meta-episode, is a bootstrap
    q (T, B): q_prior(s_t, a_t)
    ratio (T, B): pi_prior / pi_b
    """
    c = args.retrace_lambda * jnp.minimum(1.0, ratio)

    def backward(correction, step):
        reward, ended, next_value, q, c = step
        G = reward + args.gamma * (1.0 - ended) * (next_value + correction)
        return c * (G - q), G

    ended = rollout.terminated.astype(jnp.float32)
    steps = (rollout.reward, ended, value[1:], q, c)
    _, returns = lax.scan(backward, jnp.zeros_like(value[0]), steps, reverse=True)
    return returns


def cmpo_weights(args: Args, advantages: Array) -> Array:
    """Clipped MPO's target for N actions sampled from the prior, float (..., N).

    Hessel et al. 2021, section 4:

    pi_CMPO(a|s) = pi_prior(a|s) exp(clip(adv(s, a), -c, c)) / z(s)
    w_k = exp(clip(adv_k, -c, c)) / z_k,    z_k = (1 + sum_{i != k} exp(clip(adv_i, -c, c))) / N

    advantages (..., N): (q_prior(s, a_k) - v_prior(s)) / sigma. The 1 stands for an action of
    average value, and leaving k out of its own z_k keeps the estimate of the gradient from being
    biased by a_k itself.
    """
    w = jnp.exp(jnp.clip(advantages, -args.muesli_clip, args.muesli_clip))
    z = (1.0 + w.sum(axis=-1, keepdims=True) - w) / w.shape[-1]
    return w / z


class ReplayedTargets(NamedTuple):
    """What ``muesli_targets`` finds."""

    targets: Targets
    target_carry: Any  # the target network's after the rollout
    advantage_scale: AdvantageScale
    metrics: dict[str, Array]


def muesli_targets(setup: Setup, runner: Runner, rollout: Rollout, last_obs: Array, key: Array) -> ReplayedTargets:
    """What the losses aim at: the target network reads the rollout once.

    runner: as it was at the start of the rollout; last_obs (B, F): what follows the rollout.
    """
    args = setup.args
    apply = partial(setup.network.apply, runner.target_params)
    goes_on = jnp.zeros((1, args.num_envs), jnp.float32)
    carry, h = apply(runner.target_carry, rollout.obs, rollout.start, method="scan")
    _, last_h = apply(carry, last_obs[None], goes_on, method="scan")
    value = expected(apply(jnp.concatenate([h, last_h]), method="value"))  # (T + 1, B)
    prior = apply(h, method="policy")

    # q_prior(s, a) = r(h, a) + gamma v(g(h, a))
    def q_prior(h, action):
        h, reward = apply(h, action, method="model")
        return expected(reward) + args.gamma * expected(apply(h, method="value"))

    # returns
    q = q_prior(h, rollout.action)
    ratio = jnp.exp(prior.log_prob(rollout.action) - rollout.log_prob)
    baseline = q if args.muesli_retrace_q else value[:-1]
    returns = retrace(args, rollout, value, baseline, ratio)
    advantages = returns - value[:-1]

    # sigma^2 = E[(G - v_prior)^2], a moving average with its bias corrected
    decay = args.muesli_advantage_decay
    scale = AdvantageScale(
        square=decay * runner.advantage_scale.square + (1 - decay) * jnp.mean(advantages**2),
        rollouts=runner.advantage_scale.rollouts + 1,
    )
    sigma = jnp.sqrt(scale.square / (1 - decay**scale.rollouts) + 1e-12)

    # CMPO, one time step after the other: N times a rollout would leave the caches
    def sample(step):
        key, h, prior, value = step
        keys = jax.random.split(key, args.muesli_samples)
        action = jax.vmap(prior.sample, out_axes=1)(keys)  # (B, N, A)
        advantage = (q_prior(h[:, None], action) - value[:, None]) / sigma
        return action, cmpo_weights(args, advantage)

    keys = jax.random.split(key, args.num_steps)
    actions, weights = lax.map(sample, (keys, h, prior, value[:-1]))

    targets = Targets(
        returns=returns,
        advantages=advantages / sigma,
        actions=actions,
        weights=weights,
    )
    metrics = {
        "sigma": sigma,
        "value_mean": value.mean(),
        "prior_ratio": ratio.mean(),
        "explained_variance": 1 - jnp.var(advantages) / (jnp.var(returns) + 1e-8),
    }
    return ReplayedTargets(
        targets=targets,
        target_carry=carry,
        advantage_scale=scale,
        metrics=metrics,
    )


def cmpo_loss(policy: Policy, targets: Targets) -> Array:
    """-(1 / N) sum_k w_k log pi(a_k|s), float (T, B).

    The cross entropy with CMPO's policy: up to a constant the KL divergence from it.
    """
    for_each_sample = jax.tree.map(lambda x: x[..., None, :], policy)
    return -jnp.mean(targets.weights * for_each_sample.log_prob(targets.actions), axis=-1)


def model_loss(apply: Any, args: Args, h: Array, rollout: Rollout, targets: Targets) -> dict[str, Array]:
    """The model unrolled from every state with the actions that were taken.

    Hessel et al. 2021, section 4:

    z_t,0 = h_t,    z_t,k, r_t,k = g(z_t,k-1, a_{t+k-1})
    L = mean over t and k of
        CE(r_t,k, reward_{t+k-1}) + CE(v(z_t,k), G_{t+k}) + CMPO loss of pi(z_t,k) at t + k

    Where the task terminated at t + k - 1 the value of z_t,k is 0, and nothing is asked of the
    model from there on; neither is it beyond the end of the rollout or of the meta-episode.
    The gradient is halved through the input.

    h (T, B, H): the memory's output; apply: the network's, bound to its parameters. Losses, each
    float ().
    """
    losses = {
        "model_reward_loss": jnp.zeros((), jnp.float32),
        "model_value_loss": jnp.zeros((), jnp.float32),
        "model_policy_loss": jnp.zeros((), jnp.float32),
    }
    z = h
    alive = jnp.ones_like(rollout.reward)
    for k in range(1, args.muesli_unroll + 1):
        z = 0.5 * z + lax.stop_gradient(0.5 * z)
        z, reward = apply(z, rollout.action[k - 1 :], method="model")  # (T - k + 1, B, .)

        # reward of the step just modelled
        reward_loss = cross_entropy(reward, rollout.reward[k - 1 :])
        losses["model_reward_loss"] += jnp.mean(alive * reward_loss)

        # what follows it within the rollout and the meta-episode, (T - k, B, .)
        z = z[:-1]
        alive = alive[:-1] * (1 - rollout.start[k:])
        terminated = rollout.terminated[k - 1 : -1]

        # value
        value_target = jnp.where(terminated, 0.0, targets.returns[k:])
        value_loss = cross_entropy(apply(z, method="value"), value_target)
        losses["model_value_loss"] += jnp.mean(alive * value_loss)

        # policy, unless the trial is over
        alive = alive * (1.0 - terminated.astype(jnp.float32))
        later_targets = jax.tree.map(lambda x, k=k: x[k:], targets)
        policy_loss = cmpo_loss(apply(z, method="policy"), later_targets)
        losses["model_policy_loss"] += jnp.mean(alive * policy_loss)
    return {name: loss / args.muesli_unroll for name, loss in losses.items()}


def muesli_loss(
    params: Any, setup: Setup, carry: Any, rollout: Rollout, targets: Targets
) -> tuple[Array, dict[str, Array]]:
    """Muesli's loss on whole sequences, replayed from the carry stored at their start.

    L = L_PG + lambda L_CMPO + c_v CE(v(h_t), G_t) + c_m L_model - c_e H(pi)
    L_PG = -mean min(1, pi / pi_b) (G - v_prior) / sigma log pi(a|s)

    The weight min(1, pi / pi_b) is a constant.

    carry: of E slots; rollout, targets: leaves (T, E, ...). Returns the loss, float (), and metrics,
    each float ().
    """
    args = setup.args
    apply = partial(setup.network.apply, params)
    _, h = apply(carry, rollout.obs, rollout.start, method="scan")
    policy = apply(h, method="policy")
    log_prob = policy.log_prob(rollout.action)
    ratio = lax.stop_gradient(jnp.exp(log_prob - rollout.log_prob))

    # policy gradient
    policy_loss = -jnp.mean(jnp.minimum(1.0, ratio) * targets.advantages * log_prob)

    # regulariser
    regulariser = cmpo_loss(policy, targets).mean()

    # value
    value_loss = cross_entropy(apply(h, method="value"), targets.returns).mean()

    # model
    model_losses = model_loss(apply, args, h, rollout, targets)

    # entropy
    entropy = policy.entropy().mean()

    loss = args.muesli_pg_coef * policy_loss + args.muesli_cmpo_coef * regulariser
    loss += args.vf_coef * value_loss + args.muesli_model_coef * sum(model_losses.values())
    loss -= args.ent_coef * entropy
    metrics = {
        "policy_loss": policy_loss,
        "cmpo_loss": regulariser,
        "value_loss": value_loss,
        **model_losses,
        "entropy": entropy,
        "approx_kl": jnp.mean(ratio - 1 - log_prob + rollout.log_prob),
        "ratio_error": jnp.max(jnp.abs(ratio - 1)),
    }
    return loss, metrics


# ---- 6. Rollout and update -----------------------------------------------------------------------
def make_setup(args: Args) -> Setup:
    """Tasks, network, optimiser and devices for these flags. Raises UsageError."""
    train, _ = task_names(args)
    mesh = common.device_mesh(args.num_devices)
    tasks = tuple(make_task(args, name, "tasks") for name in train)
    largest_obs = max(task.obs_size for task in tasks)
    largest_action = max(task.action_size for task in tasks)
    obs_size = args.obs_size if args.projection else largest_obs
    action_size = args.action_size if args.projection else largest_action
    steps = args.num_updates * args.update_epochs * args.num_minibatches
    learning_rate = common.linear_decay(args.learning_rate, steps) if args.anneal_lr else args.learning_rate
    optimizer = optax.chain(
        optax.clip_by_global_norm(args.max_grad_norm),
        optax.adam(learning_rate),
    )
    return Setup(
        args=args,
        tasks=tasks,
        obs_size=obs_size,
        action_size=action_size,
        network=Agent(args, action_size, obs_size),
        optimizer=optimizer,
        mesh=mesh,
    )


def init_runner(setup: Setup, key: Array) -> Runner:
    """Fresh parameters and meta-episodes for one agent.

    The slots begin 0, T, 2T, ... steps into their first meta-episode, so that every rollout holds
    all parts of one.
    """
    args = setup.args
    params_key, env_key, key = jax.random.split(key, 3)
    world = reset_world(setup, env_key)
    shares = task_shares(args.num_envs, len(setup.tasks))
    slot_of_task = jnp.concatenate([jnp.arange(share, dtype=jnp.int32) for share in shares])
    rollouts_in_meta_episode = args.decisions // args.num_steps
    time = args.num_steps * (slot_of_task % rollouts_in_meta_episode)
    world = world._replace(time=time, whole=time == 0)
    carry = [layer.initial_carry(args.num_envs) for layer in make_memory(args, setup.obs_size)]
    example = (carry, world.obs[None], world.start[None])
    params = setup.network.init(params_key, *example, method="everything")
    zero = jnp.zeros((), jnp.float32)
    return Runner(
        params=params,
        target_params=jax.tree.map(jnp.copy, params),
        opt_state=setup.optimizer.init(params),
        key=key,
        advantage_scale=AdvantageScale(square=zero, rollouts=zero),
        world=world,
        carry=carry,
        target_carry=carry,
    )


def collect_rollout(setup: Setup, runner: Runner, noise: float = 1.0) -> tuple[Runner, Rollout]:
    """Act for T steps, in which no meta-episode ends. Returns the runner moved on and the rollout.

    noise: standard deviation of the actions, in those of the policy.
    """
    apply = partial(setup.network.apply, runner.params)
    kernels = apply(method="kernels")

    def act_and_step(state, key):
        world, carry = state
        action_key, env_key = jax.random.split(key)
        carry, h = apply(kernels, carry, world.obs, world.start, method="step")
        policy = apply(h, method="policy")
        action = policy.sample(action_key, noise)
        later, reward, terminated = step_world(setup, env_key, world, action)
        step = Rollout(
            obs=world.obs,
            start=world.start,
            action=action,
            log_prob=policy.log_prob(action),
            reward=reward,
            terminated=terminated,
        )
        return (later, carry), step

    key, steps_key = jax.random.split(runner.key)
    keys = jax.random.split(steps_key, setup.args.num_steps)
    (world, carry), rollout = lax.scan(act_and_step, (runner.world, runner.carry), keys)
    return runner._replace(key=key, world=world, carry=carry), rollout


def return_metrics(setup: Setup, world: World) -> dict[str, Any]:
    """Returns of the meta-episodes that have just ended, of all tasks and of each."""
    ended = (world.time >= setup.args.decisions) & world.whole
    returns = jnp.where(ended, world.so_far, 0.0)
    episodes = ended.sum(dtype=jnp.int32)
    metrics = {
        "episodes": episodes,
        "return_mean": common.Mean(returns.sum(), episodes),
    }
    returns_of_task = by_task(setup, returns)
    ended_of_task = by_task(setup, ended)
    for i, task in enumerate(setup.tasks):
        number = ended_of_task[i].sum(dtype=jnp.int32)
        metrics[f"return_{task.name}"] = common.Mean(returns_of_task[i].sum(), number)
    return metrics


def update(setup: Setup, runner: Runner) -> tuple[Runner, dict[str, Any]]:
    """One rollout, its targets, then epochs of minibatches that permute slots, never time.

    Deviation: all gradient steps on a rollout, 8 in the default preset and 64 in the paper's, aim
    at the same targets.
    """
    args = setup.args
    key, open_key, targets_key, epochs_key = jax.random.split(runner.key, 4)
    world = open_meta_episodes(setup, open_key, runner.world)
    first = runner._replace(key=key, world=world)
    runner, rollout = collect_rollout(setup, first)
    replayed = muesli_targets(setup, first, rollout, runner.world.obs, targets_key)
    data = (rollout, replayed.targets)

    def minibatch_update(learner, slots):
        params, target_params, opt_state = learner
        batch = jax.tree.map(lambda x: x[:, slots], data)
        if args.num_devices > 1:
            over_envs = NamedSharding(setup.mesh, PartitionSpec(None, "env"))
            batch = lax.with_sharding_constraint(batch, over_envs)
        carry = jax.tree.map(lambda x: x[slots], first.carry)
        gradient = jax.value_and_grad(muesli_loss, has_aux=True)
        (_, metrics), grads = gradient(params, setup, carry, *batch)
        metrics["grad_norm"] = optax.tree.norm(grads)
        updates, opt_state = setup.optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        rate = args.muesli_target_rate
        target_params = optax.incremental_update(params, target_params, rate)
        return (params, target_params, opt_state), metrics

    def epoch(learner, key):
        slots = jnp.arange(args.num_envs, dtype=jnp.int32)
        order = jax.random.permutation(key, slots)
        return lax.scan(minibatch_update, learner, order.reshape(args.num_minibatches, -1))

    epoch_keys = jax.random.split(epochs_key, args.update_epochs)
    learner = (runner.params, runner.target_params, runner.opt_state)
    learner, losses = lax.scan(epoch, learner, epoch_keys)
    params, target_params, opt_state = learner

    ratio_error = losses.pop("ratio_error")  # (epochs, minibatches)
    metrics = {
        **replayed.metrics,
        **jax.tree.map(jnp.mean, losses),
        "first_ratio_error": ratio_error[0, 0],
        "reward_mean": rollout.reward.mean(),
        "terminations": rollout.terminated.sum(dtype=jnp.int32),
        **return_metrics(setup, runner.world),
    }
    runner = runner._replace(
        params=params,
        target_params=target_params,
        opt_state=opt_state,
        advantage_scale=replayed.advantage_scale,
        target_carry=replayed.target_carry,
    )
    return runner, metrics


def for_each_seed(args: Args, function: Any, seeds: Any) -> Any:
    """``function`` of every seed: one after the other on a CPU, side by side on an accelerator."""
    in_turn = args.num_seeds == 1 or jax.default_backend() == "cpu"
    return lax.map(function, seeds) if in_turn else jax.vmap(function)(seeds)


def placement(setup: Setup) -> Runner:
    """Where a Runner's leaves lie.

    Parameters and keys on every device, the slots spread over the devices.
    """
    everywhere: Any = NamedSharding(setup.mesh, PartitionSpec())
    over_envs: Any = NamedSharding(setup.mesh, PartitionSpec(None, "env"))
    return Runner(
        params=everywhere,
        target_params=everywhere,
        opt_state=everywhere,
        key=everywhere,
        advantage_scale=everywhere,
        world=over_envs,
        carry=over_envs,
        target_carry=over_envs,
    )


def init_runners(setup: Setup) -> Runner:
    """Runners of all seeds."""
    seeds = setup.args.seed + jnp.arange(setup.args.num_seeds, dtype=jnp.int32)
    keys = jax.vmap(jax.random.PRNGKey)(seeds)
    init = partial(for_each_seed, setup.args, partial(init_runner, setup))
    return jax.jit(init, out_shardings=placement(setup))(keys)


def compile_update(setup: Setup, runners: Runner) -> Any:
    """``update`` of every seed as one compiled call.

    Each metric comes back as (S,), or as a Mean of two such.
    """
    function = partial(for_each_seed, setup.args, partial(update, setup))
    out = (placement(setup), NamedSharding(setup.mesh, PartitionSpec()))
    return common.compile_ahead(function, runners, donate_argnums=0, out_shardings=out)


# ---- 7. Evaluation -------------------------------------------------------------------------------
def evaluate(setup: Setup, task: Task, params: Any, key: Array) -> Array:
    """Rewards of whole meta-episodes of a task, fresh projections, float (decisions, E)."""
    args = setup.args
    own_args = replace(args, num_envs=args.eval_episodes, num_steps=args.decisions)
    setup = setup._replace(args=own_args, tasks=(task,))
    runner = init_runner(setup, key)._replace(params=params)
    _, rollout = collect_rollout(setup, runner, args.eval_noise)
    return rollout.reward


class TaskEvaluation(NamedTuple):
    """How one task is evaluated."""

    name: str
    split: str  # train or held out
    play: Callable  # parameters of all seeds -> rewards, float (S, decisions, E)


def make_evaluation(setup: Setup) -> list[TaskEvaluation]:
    """Evaluations of all tasks, train and held out.

    Without projections a task that shows or takes more than those trained on would be cut:
    UsageError if it is named by --eval-tasks, and if it is of the suite's own it is left out.
    """
    args = setup.args
    tasks = [(task, "train") for task in setup.tasks]
    too_large = []
    for name in task_names(args)[1]:
        task = make_task(args, name, "eval-tasks")
        fits = task.obs_size <= setup.obs_size and task.action_size <= setup.action_size
        if args.projection or fits:
            tasks.append((task, "held out"))
        else:
            has = f"{task.obs_size} features and {task.action_size} actions"
            too_large.append(f"{name} has {has}")
    most = f"more than the {setup.obs_size} and {setup.action_size} trained with"
    if too_large and args.eval_tasks:
        named = f"--eval-tasks {args.eval_tasks}"
        raise common.UsageError(f"{named}: {too_large[0]}, {most}, without --projection")
    if too_large and jax.process_index() == 0:
        names = ", ".join(too_large)
        common.warn(f"left out of the held-out tasks without --projection: {names}, {most}")

    called = [task.name for task, _ in tasks]
    for name in called:
        if called.count(name) > 1:  # tables tell tasks apart by it
            raise common.UsageError(f"--suite {args.suite}: two tasks have the name {name}")

    key = jax.random.PRNGKey(2303_03982)  # the same meta-episodes at all times
    found = []
    for task, split in tasks:
        play = partial(evaluate, setup, task, key=key)
        found.append(TaskEvaluation(task.name, split, jax.jit(partial(lax.map, play))))
    return found


EVALUATION_COLUMNS = (
    "update",
    "env_steps",
    "seed",
    "task",
    "split",
    "return_mean",
    "return_se",
    *(f"reward_{n}" for n in range(10)),
)


def evaluation_rows(args: Args, evaluation: list[TaskEvaluation], update: int, params: Any) -> list[dict[str, Any]]:
    """A row for each task and seed.

    Return with its standard error, mean reward in tenths of the meta-episode.
    """
    rows = []
    for name, split, play in evaluation:
        for i, rewards in enumerate(np.asarray(play(params), np.float64)):  # (decisions, E)
            returns = args.action_repeat * rewards.sum(axis=0)
            values = {
                "return_mean": returns.mean(),
                "return_se": returns.std() / math.sqrt(len(returns) - 1),
            }
            for n, part in enumerate(np.array_split(rewards, 10)):
                values[f"reward_{n}"] = part.mean()
            row = {
                "update": update,
                "env_steps": update * args.batch_size,
                "seed": args.seed + i,
                "task": name,
                "split": split,
            }
            for column, value in values.items():
                row[column] = value if math.isfinite(value) else ""  # a simulation has diverged
            rows.append(row)
    return rows


def print_evaluation(rows: list[dict[str, Any]]) -> None:
    """A line for each task and seed."""

    def shown(field: Any, width: int, digits: int) -> str:
        return f"{'-':>{width}}" if field == "" else f"{field:{width}.{digits}f}"

    names = f"{'task':26} {'split':9} {'seed':>4} {'return':>9} {'+-':>7}"
    print(f"{names}   reward in each tenth of the meta-episode")
    for row in rows:
        whose = f"{row['task']:26} {row['split']:9} {row['seed']:>4}"
        result = f"{shown(row['return_mean'], 9, 2)} {shown(row['return_se'], 7, 2)}"
        tenths = " ".join(shown(row[f"reward_{n}"], 6, 3) for n in range(10))
        print(f"{whose} {result}   {tenths}", flush=True)


def write_rows(path: Path, mode: Literal["w", "a"], rows: list[dict[str, Any]]) -> None:
    """A table of evaluations, written anew or appended to."""
    with path.open(mode, newline="") as file:
        writer = csv.DictWriter(file, EVALUATION_COLUMNS, lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows(rows)


class EvaluationTable:
    """RUN/evaluation.csv, a row for each evaluation, task and seed, and evaluation.png, its newest.

    Rows are appended. A resumed run keeps those up to its checkpoint, but for damaged ones, and
    says it where one is missing then. Only a run's first process writes.
    """

    def __init__(self, run: common.RunDirectory, evaluation: list):
        self.run = run
        self.path = run.path / "evaluation.csv"
        rows, _ = common.read_rows(self.path, EVALUATION_COLUMNS, run.done, text=("task", "split"))
        self.newest: list[dict[str, Any]] = [row for row in rows if int(row["update"]) == run.done]
        if not run.writes:
            return
        found = {(int(row["update"]), int(row["seed"]), row["task"]) for row in rows}
        due = evaluations_due(run, evaluation)
        missing = [place for place in due if place not in found]
        if missing:
            count = f"{len(missing)} of {len(due)} rows, the first of update {missing[0][0]}"
            common.warn(f"{self.path}: {count}, are damaged or missing; the run goes on without them")
        if self.path.exists():
            draft = self.path.with_suffix(".tmp")
            self.write(draft, "w", rows)
            draft.replace(self.path)

    def write(self, path: Path, mode: Literal["w", "a"], rows: list[dict[str, Any]]) -> None:
        """Raises RunError."""
        with common.writing(self.path, kept=f"the newest checkpoint in {self.run.path} is kept"):
            write_rows(path, mode, rows)

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Print, write and draw a new evaluation. Raises RunError."""
        self.newest = rows
        if self.run.writes:
            print_evaluation(rows)
            self.write(self.path, "a", rows)
            common.draw(plot_evaluations, {self.run.path.name: rows}, self.path.with_suffix(".png"))

    def mean_return(self, split: str) -> float | None:
        """Mean over tasks and seeds of the newest evaluation; None if it has none."""
        own = [row["return_mean"] for row in self.newest if row["split"] == split]
        returns = [float(value) for value in own if value != ""]
        return float(np.mean(returns)) if returns else None


def evaluation_is_due(args: Args, update: int) -> bool:
    """Whether all tasks are evaluated after this update."""
    at_interval = args.eval_interval > 0 and update % args.eval_interval == 0
    return at_interval or update == args.num_updates


def evaluations_due(run: common.RunDirectory, evaluation: list) -> list[tuple[int, int, str]]:
    """Update, seed and task of all rows that a run's evaluations should have left so far.

    By the flags it began with; held-out tasks only if they are still the same.
    """
    begun = common.read_args(Args, str(run.path))
    same = begun.eval_tasks == run.flags.eval_tasks
    names = [name for name, split, _ in evaluation if split == "train" or same]
    updates = [update for update in range(1, run.done + 1) if evaluation_is_due(begun, update)]
    return [(update, seed, name) for update in updates for seed in run.seeds for name in names]


def plot_evaluations(runs: dict[str, list[dict[str, Any]]], picture: Path) -> None:
    """In-context curves of the newest evaluation in the runs' rows.

    A panel for each task, a line for each seed.
    """
    tasks = list(dict.fromkeys(row["task"] for rows in runs.values() for row in rows))
    columns = min(4, len(tasks))
    lines = math.ceil(len(tasks) / 4)
    middles = np.arange(0.05, 1, 0.1)  # of the tenths
    figure = Figure(figsize=(3 * columns, 2.4 * lines), layout="constrained")
    for place, task in enumerate(tasks, start=1):
        axes = figure.add_subplot(lines, columns, place)
        axes.set(title=task, xlabel="part of the meta-episode", ylabel="reward")
        for color, (label, rows) in enumerate(runs.items()):
            newest = int(rows[-1]["update"])
            own = [row for row in rows if row["task"] == task and int(row["update"]) == newest]
            for place_of_seed, row in enumerate(own):
                tenths = [row[f"reward_{n}"] for n in range(10)]
                curve = [float(x) if x != "" else math.nan for x in tenths]
                name = "_" if place_of_seed else label.lstrip("_")  # one entry in the legend for all seeds
                axes.plot(middles, curve, f"C{color}", linewidth=1, label=name)
    figure.axes[0].legend(fontsize="small")
    figure.savefig(picture, dpi=150)


def evaluate_checkpoint(args: Args) -> None:
    """Evaluate the newest checkpoint of --eval: table, eval.csv and eval.png in its directory."""
    check_task_names(args)
    setup = make_setup(args)
    evaluation = make_evaluation(setup)
    run = common.RunDirectory(args, args.tasks or args.suite, "muesli_s5_metarl")
    runners = run.restore(init_runners(setup))
    rows = evaluation_rows(args, evaluation, run.done, runners.params)
    if not run.writes:
        return
    print_evaluation(rows)
    table = run.path / "eval.csv"
    with common.writing(table, kept="the run is as it was"):
        write_rows(table, "w", rows)
    common.draw(plot_evaluations, {run.path.name: rows}, table.with_suffix(".png"))


def watch(args: Args) -> None:
    """Play a meta-episode of the first of --tasks with the newest checkpoint of --watch.

    From a fixed key. Writes RUN_DIR/episode.gif: the world, where it is one of control_jax, and
    what the agent sees of it, with how that changes.
    """
    check_task_names(args)
    setup = make_setup(args)
    run = common.RunDirectory(args, args.tasks or args.suite, "muesli_s5_metarl")
    runners = run.restore(init_runners(setup))
    task = setup.tasks[0]
    draw_world = world_drawing(args, task.name)
    setup = setup._replace(args=replace(args, num_envs=1, num_steps=1), tasks=(task,))
    params = jax.tree.map(lambda x: x[0], runners.params)  # of the first seed
    runner = jax.jit(partial(init_runner, setup))(jax.random.PRNGKey(2303_03982))._replace(params=params)
    step = jax.jit(partial(collect_rollout, setup, noise=args.eval_noise))
    features = setup.obs_size * (2 if args.obs_change else 1)
    frames = []
    for decision in range(args.decisions):
        world = runner.world
        (state,) = jax.tree.map(lambda x: x[0], world.env_state)
        title = f"{task.name}, step {decision * args.action_repeat}, return so far {world.so_far[0]:.1f}"
        drawing = partial(draw_world, state=state) if draw_world else None
        frames.append(common.Frame(drawing, np.asarray(world.obs[0, :features]), title))
        runner, _ = step(runner)
    picture = run.path / "episode.gif"
    common.save_animation(frames, picture)
    about = f"{task.name}, seed {args.seed}, update {run.done}"
    print(f"{about}: return {runner.world.so_far[0]:.2f} after {args.meta_steps} steps, drawn: {picture}")


def world_drawing(args: Args, name: str) -> Callable | None:
    """What draws a state of the task on axes; None for a task that is not of control_jax."""
    if args.suite != "dmc":
        return None
    import control_jax
    from control_jax.drawing import draw

    if name not in control_jax.registered_envs:
        return None
    env, _ = control_jax.make(name)
    return partial(draw, env=env)


# ---- 8. Training and command line ----------------------------------------------------------------
def train(args: Args) -> dict[str, Any]:
    """Train as the flags say, keep the run directory and return its summary.

    SystemExit after a signal, once saved.
    """
    check_task_names(args)
    setup = make_setup(args)
    evaluation = make_evaluation(setup)
    with common.RunDirectory(args, args.tasks or args.suite, "muesli_s5_metarl") as run:
        runners = run.restore(init_runners(setup))
        table = EvaluationTable(run, evaluation)
        step = compile_update(setup, runners)
        run.compiled(args.num_updates, steps=args.batch_size)
        while run.done < args.num_updates and not run.stopped:
            runners, metrics = step(runners)
            now = run.done + 1
            if evaluation_is_due(args, now):
                table.add(evaluation_rows(args, evaluation, now, runners.params))
            run.update(runners, metrics)
    return run.finish(
        return_train=table.mean_return("train"),
        return_held_out=table.mean_return("held out"),
    )


def main() -> int:
    args = common.parse_args(Args, PRESETS)
    if args.distributed:
        common.join_cluster()
    if args.list_envs:
        print("\n".join(environments(args)))
    elif args.eval:
        evaluate_checkpoint(args)
    elif args.watch:
        watch(args)
    else:
        train(args)
    return 0


if __name__ == "__main__":
    sys.exit(common.run_main(main))
