"""What all environments of this package share: gymnax's interface with a cheaper auto-reset."""

import math
import os
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gymnax.environments import environment, spaces

from popgym_jax import prng

TEnvState = TypeVar("TEnvState", bound="EnvState")
TEnvParams = TypeVar("TEnvParams", bound="EnvParams")

CHUNK = 128  # environments that are reset together where a reset is costly
IMPORTED_IN = os.getpid()  # the process whose threads JAX has; a fork of it has none of them


@struct.dataclass
class EnvState(environment.EnvState):
    """time: steps taken in this episode, int32 ()."""

    time: jax.Array


@struct.dataclass
class EnvParams(environment.EnvParams):
    """max_steps_in_episode: the longest possible episode."""

    max_steps_in_episode: int = 1


class Environment(environment.Environment[TEnvState, TEnvParams]):
    """A gymnax environment with a name and an auto-reset that costs what it needs to cost.

    `reset(key, params) -> obs, state` and `step(key, state, action, params) -> obs,
    state, reward, terminated, truncated, info`, as in gymnax, where `step` opens a
    new episode itself and `info["final_observation"]` is the last observation of
    the old one (of every step, in fact). gymnax computes a reset at every step;
    here `step`, vmapped or not, does so only when an episode ends, and where a
    reset is costly (`costly_reset`) only for the environments that need it.

    `step` can be differentiated, in forward and in reverse mode: with respect to
    the state, the action and the parameters it has the derivative of `step_env`
    where no episode ended. Where one did, the fresh observation and state depend on
    nothing, and their derivative is zero; that of the reward and of
    info["final_observation"] is the one of `step_env` all the same.

    obs_requires_prev_action: the reference says that an agent should see its
        previous action.
    has_picture: `draw(axes, state)` draws a state on matplotlib's axes.
    """

    # in gymnax's words; `with_transition_gradients` has nothing to switch on
    _supports_transition_gradients = True
    _transition_gradients_enabled = True

    costly_reset = False
    obs_requires_prev_action = False
    has_picture = False

    def __init__(self, name: str | None = None):
        self._name = name or type(self).__name__

    @property
    def name(self) -> str:
        return self._name

    @property
    def num_actions(self) -> int:
        """Number of discrete actions, or the size of a continuous action."""
        space = self.action_space(self.default_params)
        if isinstance(space, spaces.Discrete):
            return space.n
        return math.prod(space.shape)

    def render(self, state: Any, params: Any) -> str:
        """A concrete state as lines of text, for a reader, who is told more than an agent sees."""
        fields = jax.tree_util.tree_leaves_with_path(state)
        lines = []
        for path, value in fields:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            lines.append(f"{name}: {np.array2string(np.asarray(value), precision=3)}")
        return "\n".join(lines)

    def render_action(self, state: Any, action: Any, params: Any) -> str:
        """An action in this state, in words."""
        return f"action {action}"

    @partial(jax.jit, static_argnames=("self",))
    def step(
        self, key: jax.Array, state: Any, action: Any, params: Any = None
    ) -> tuple[Any, Any, jax.Array, jax.Array, jax.Array, dict[Any, Any]]:
        """One step, and a fresh episode after the last one: see the class."""
        if params is None:
            params = self.default_params
        obs, state, reward, terminated, info = self.step_env(key, state, action, params)
        truncated = self.is_truncated(state, params)
        info = {
            **info,
            "terminated": terminated,
            "truncated": truncated,
            "final_observation": obs,
        }
        done = terminated | truncated
        obs, state = self._reset_where(self._fresh, done, key, params, (obs, state))
        return obs, state, reward, terminated, truncated, info

    def _reset_where(
        self, fresh: Any, done: jax.Array, key: jax.Array, params: Any, current: Any
    ) -> Any:
        """Observation and state, replaced by `fresh(key, params)` where `done`.

        vmap has its own rule, which skips the reset where no episode ends, and so
        has differentiation, which cannot look into a function with a rule for vmap.
        """

        @jax.custom_batching.custom_vmap
        def choose(done, key, params, current):
            return jax.lax.cond(done, lambda: fresh(key, params), lambda: current)

        @choose.def_vmap
        def batched(size, is_batched, done, key, params, current):
            done_batched, key_batched, params_batched, current_batched = is_batched

            def stacked(x, x_batched):
                return x if x_batched else jnp.broadcast_to(x, (size, *jnp.shape(x)))

            done = stacked(done, done_batched)
            key = stacked(key, key_batched)
            current = jax.tree.map(stacked, current, current_batched)
            axes = jax.tree.map(lambda batched: 0 if batched else None, params_batched)
            reset = _reset_chunks if self.costly_reset and size > CHUNK else _reset_all
            current = reset(fresh, done, key, current, params, axes)
            return current, jax.tree.map(lambda _: True, current)

        @jax.custom_jvp
        def reset_where(done, key, params, current):
            return choose(done, key, params, current)

        @reset_where.defjvp
        def derivative(primals, tangents):
            # A fresh episode does not depend on the old one. On the parameters it may (a
            # scale of the noise, say), but that is left out: a reset is a draw and counts
            # as a constant.
            done, key, params, current = primals
            _, _, _, current_tangent = tangents

            def kept(tangent):
                if tangent.dtype == jax.dtypes.float0:  # of integers, bools and keys
                    return tangent
                return jnp.where(done, jnp.zeros_like(tangent), tangent)

            replaced = reset_where(done, key, params, current)
            return replaced, jax.tree.map(kept, current_tangent)

        return reset_where(done, key, params, current)

    def _fresh(self, key: jax.Array, params: Any) -> Any:
        """Observation and state of a fresh episode after a step with this key."""
        return self.reset_env(prng.reset_key(key), params)


def _reset_all(fresh: Any, done: Any, key: Any, current: Any, params: Any, axes: Any) -> Any:
    """If any is done, reset all and keep what is needed; done (B,), leaves (B, ...)."""

    def with_resets():
        def choose(new, old):
            mask = done.reshape(-1, *[1] * (old.ndim - 1))  # (B, 1, ..)
            return jnp.where(mask, new, old)

        everywhere = jax.vmap(fresh, (0, axes))(key, params)
        return jax.tree.map(choose, everywhere, current)

    return jax.lax.cond(done.any(), with_resets, lambda: current)


def _reset_chunks(fresh: Any, done: Any, key: Any, current: Any, params: Any, axes: Any) -> Any:
    """Reset those that are done, CHUNK at a time; done (B,), leaves (B, ...)."""
    size = len(done)

    def some_left(loop):
        left, _ = loop
        return left.any()

    def reset_some(loop):
        left, current = loop
        (chosen,) = jnp.nonzero(left, size=CHUNK, fill_value=size)  # beyond the end: none
        row = jnp.minimum(chosen, size - 1)

        def of_rows(x, axis):
            return x if axis is None else x[row]

        def put(x, new):
            return x.at[chosen].set(new, mode="drop")

        some = jax.vmap(fresh, (0, axes))(key[row], jax.tree.map(of_rows, params, axes))
        current = jax.tree.map(put, current, some)
        return left.at[chosen].set(False, mode="drop"), current

    _, current = jax.lax.while_loop(some_left, reset_some, (done, current))
    return current
