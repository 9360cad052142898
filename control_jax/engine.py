"""MuJoCo's physics for one model, as a function that jax can jit and vmap, in two engines.

"mjx" is MuJoCo XLA: the physics are a part of the compiled program, on any device. "c" is MuJoCo's
own engine in C, called from the program: many simulations at once on a pool of threads, on the CPU
only. Both start from the same few numbers and give back the same few, so that an environment's
state is small and does not know its engine. A third one is in closed_form.py.
"""

import os
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
from jax.experimental.buffer_callback import buffer_callback
from mujoco.batch import Batch

ENGINES = ("closed_form", "c", "mjx")


class Physics(NamedTuple):
    """What a simulation goes on from, all float32.

    position: generalized positions, (nq,), m and rad
    velocity: generalized velocities, (nv,), m/s and rad/s
    warmstart: accelerations that the constraint solver begins with, (nv,)
    sensors: forces on the touch sensors during the last substep, (n,), N
    """

    position: jax.Array
    velocity: jax.Array
    warmstart: jax.Array
    sensors: jax.Array


class Solver(NamedTuple):
    """Fixed effort of MJX's constraint solver, where it is not to iterate to convergence."""

    iterations: int
    line_search: int


def at_rest(
    model: mujoco.MjModel, position: jax.Array, velocity: jax.Array | None = None
) -> Physics:
    """The beginning of an episode, before anything is touched. position (nq,), velocity (nv,)."""
    zeros = jnp.zeros(model.nv, jnp.float32)
    return Physics(
        position=position.astype(jnp.float32),
        velocity=zeros if velocity is None else velocity.astype(jnp.float32),
        warmstart=zeros,
        sensors=jnp.zeros(model.nsensordata, jnp.float32),
    )


def mjx_engine(model: mujoco.MjModel, substeps: int, solver: Solver) -> Callable:
    """A function (physics, control (nu,)) -> physics, `substeps` simulation steps later, by MJX.

    model: its only sensors are touch sensors
    """
    from mujoco import mjx  # takes seconds to import

    effort = {"opt.iterations": solver.iterations, "opt.ls_iterations": solver.line_search}
    device_model = mjx.put_model(model, impl="jax").tree_replace(effort)
    empty = mjx.make_data(model, impl="jax")

    def step(physics: Physics, control: jax.Array) -> Physics:
        data = empty.replace(
            qpos=physics.position,
            qvel=physics.velocity,
            qacc_warmstart=physics.warmstart,
            ctrl=control.astype(jnp.float32),
        )

        def substep(data: Any, _: None) -> tuple[Any, None]:
            return mjx.step(device_model, data), None

        data, _ = jax.lax.scan(substep, data, length=substeps)
        return Physics(
            position=data.qpos,
            velocity=data.qvel,
            warmstart=data.qacc_warmstart,
            sensors=data.sensordata,
        )

    return step


def c_engine(model: mujoco.MjModel, substeps: int) -> Callable:
    """A function (physics, control (nu,)) -> physics, `substeps` simulation steps later, in C.

    Numbers are 64 bits wide inside, 32 between the control steps. The callback reads and writes
    XLA's own buffers, which takes microseconds; jax.pure_callback, which makes arrays of jax, takes
    a hundred and more.

    model: its only sensors are touch sensors
    """
    batches: dict[int, Batch] = {}  # by number of simulations
    one_at_a_time = threading.Lock()  # several devices may call at once
    threads = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )

    def batch_of(count: int) -> Batch:
        if count not in batches:
            batches[count] = Batch(model, count, min(threads, count))
            if model.nsensordata:
                batches[count].bind("sensordata")  # or it would not be kept
        return batches[count]

    def step_all(_: Any, after: Any, physics: Any, control: Any) -> None:
        """Fill the buffers of ``after``; leading axes are one batch."""
        controls = np.asarray(control)
        count = controls.size // model.nu
        with one_at_a_time:
            batch = batch_of(count)
            batch.qpos = np.asarray(physics.position).reshape(count, model.nq)
            batch.qvel = np.asarray(physics.velocity).reshape(count, model.nv)
            batch.qacc_warmstart = np.asarray(physics.warmstart).reshape(count, model.nv)
            batch.ctrl = controls.reshape(count, model.nu)
            batch.step(nstep=substeps)
            np.asarray(after.position).reshape(count, model.nq)[:] = batch.qpos
            np.asarray(after.velocity).reshape(count, model.nv)[:] = batch.qvel
            np.asarray(after.warmstart).reshape(count, model.nv)[:] = batch.qacc_warmstart
            if model.nsensordata:
                np.asarray(after.sensors).reshape(count, model.nsensordata)[:] = batch.sensordata

    def step(physics: Physics, control: jax.Array) -> Physics:
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), physics)
        return buffer_callback(step_all, shapes, vmap_method="broadcast_all")(physics, control)

    return step
