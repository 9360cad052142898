"""What all tasks of this package share: gymnax's interface around a MuJoCo model."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
from flax import struct
from gymnax.environments import environment, spaces

from control_jax.closed_form import Equations, closed_form_engine
from control_jax.engine import ENGINES, Physics, Solver, c_engine, mjx_engine


@struct.dataclass
class EnvState(environment.EnvState):
    """The state of every task.

    time: control steps taken in this episode, int32 ()
    physics: see Physics
    hidden: what the episode drew besides positions and velocities (a target's place, the
        actuators' directions), float32 (n,), n = 0 where it drew nothing
    """

    time: jax.Array
    physics: Physics
    hidden: jax.Array


@struct.dataclass
class EnvParams(environment.EnvParams):
    """max_steps_in_episode: truncation; DeepMind's time limits are 1000 control steps each."""

    max_steps_in_episode: int = 1000


class Environment(environment.Environment[EnvState, EnvParams]):
    """A task of the DeepMind Control Suite (Tassa et al. 2018) as a gymnax environment.

    A task says what its model is, how an episode starts, what is seen and what is rewarded.
    Actions are float32 (A,) in [-1, 1] and are clipped; rewards are in [0, 1]; no task terminates.

    model_xml: MJCF of what the physics depend on; nothing that is only seen
    substeps: simulation steps in a control step
    equations: the model -> its equations of motion, where they are written out
    solver: effort of MJX
    """

    model_xml: str
    substeps: int = 1
    equations: Callable[..., Equations] | None = None
    solver: Solver = Solver(iterations=4, line_search=8)
    observation_size: int

    def __init__(self, engine: str = "auto"):
        """engine: one of ENGINES, or "auto": the closed form where there is one, else C on a CPU
        and MJX on accelerators.

        Raises ValueError for an unknown engine, or one that the task lacks.
        """
        self.model = mujoco.MjModel.from_xml_string(self.model_xml)
        # a simulation that diverges is to be seen by step_env
        self.model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_AUTORESET
        if engine == "auto":
            simulator = "c" if jax.default_backend() == "cpu" else "mjx"
            engine = simulator if self.equations is None else "closed_form"
        self.engine = engine
        self.simulate = self.make_engine(engine)

    def make_engine(self, engine: str) -> Callable[[Physics, jax.Array], Physics]:
        """A function (physics, control (A,)) -> physics, one control step later."""
        if engine == "c":
            return c_engine(self.model, self.substeps)
        if engine == "mjx":
            return mjx_engine(self.model, self.substeps, self.solver)
        if engine == "closed_form":
            if self.equations is None:
                raise ValueError(f"{type(self).__name__} has no closed form: its bodies touch")
            return closed_form_engine(self.model, self.substeps, self.equations(self.model))
        raise ValueError(f"unknown engine {engine!r}; must be of {', '.join(ENGINES)}")

    @property
    def default_params(self) -> EnvParams:
        return EnvParams()

    @property
    def num_actions(self) -> int:
        """Number of actuators, A."""
        return self.model.nu

    def start(self, key: jax.Array) -> tuple[Physics, jax.Array]:
        """Physics and hidden of a fresh episode."""
        raise NotImplementedError

    def see(self, physics: Physics, hidden: jax.Array) -> jax.Array:
        """Observation, float32 (observation_size,), in the order of DeepMind's dictionary."""
        raise NotImplementedError

    def reward(self, physics: Physics, hidden: jax.Array, action: jax.Array) -> jax.Array:
        """Reward after a control step with a clipped action (A,), float32 ()."""
        raise NotImplementedError

    def control(self, hidden: jax.Array, action: jax.Array) -> jax.Array:
        """What the actuators get for a clipped action (A,), (A,)."""
        return action

    def reset_env(self, key: jax.Array, params: EnvParams) -> tuple[jax.Array, EnvState]:
        """A fresh episode: observation and state."""
        physics, hidden = self.start(key)
        state = EnvState(time=jnp.zeros((), jnp.int32), physics=physics, hidden=hidden)
        return self.see(physics, hidden), state

    def step_env(
        self, key: jax.Array, state: EnvState, action: jax.Array, params: EnvParams
    ) -> tuple[jax.Array, EnvState, jax.Array, jax.Array, dict[Any, Any]]:
        """One control step: observation, state, reward, terminated, {}.

        Should the simulation ever diverge, the step is not taken and its reward is 0.
        """
        action = jnp.clip(jnp.asarray(action, jnp.float32), -1.0, 1.0)
        after = self.simulate(state.physics, self.control(state.hidden, action))
        finite = jnp.isfinite(after.position).all() & jnp.isfinite(after.velocity).all()
        physics = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, state.physics)
        reward = jnp.where(finite, self.reward(physics, state.hidden, action), 0.0)
        state = state.replace(time=state.time + 1, physics=physics)
        return self.see(physics, state.hidden), state, reward, self.is_terminated(state, params), {}

    def is_terminated(self, state: EnvState, params: EnvParams) -> jax.Array:
        """Never, bool ()."""
        return jnp.zeros((), bool)

    def action_space(self, params: EnvParams) -> spaces.Box:
        return spaces.Box(-1.0, 1.0, (self.num_actions,))

    def observation_space(self, params: EnvParams) -> spaces.Box:
        return spaces.Box(-np.inf, np.inf, (self.observation_size,))


def nothing_hidden() -> jax.Array:
    """The hidden of a task whose episodes draw positions and velocities only, (0,)."""
    return jnp.zeros(0, jnp.float32)


def uniform_positions(model: mujoco.MjModel, key: jax.Array) -> jax.Array:
    """Every joint anywhere in its limits; a hinge without limits anywhere on the circle, (nq,)."""
    limited = model.jnt_limited.astype(bool)
    low = np.where(limited, model.jnt_range[:, 0], -np.pi)
    high = np.where(limited, model.jnt_range[:, 1], np.pi)
    unit = jax.random.uniform(key, (model.nq,), jnp.float32)
    return jnp.float32(low) + jnp.float32(high - low) * unit


def first_accepted(draw: Callable, accepted: Callable, key: jax.Array) -> Any:
    """What `draw(key)` gives, drawn again with another key until `accepted` says so."""

    def again(loop):
        key, _ = loop
        key, own = jax.random.split(key)
        return key, draw(own)

    return jax.lax.while_loop(lambda loop: ~accepted(loop[1]), again, again((key, None)))[1]
