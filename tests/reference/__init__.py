"""Lock step with popgym: play an episode on one side, put what was hidden and drawn into the other, play it again.

A ``Bridge`` says for one family how its hidden state crosses. ``forward`` takes episodes of the reference and replays
them in popgym_jax; ``backward`` takes episodes of popgym_jax and replays them in the reference. Both return the
``Episodes`` of both sides for ``assert_same``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import popgym.envs  # noqa: F401  (registers the reference's ids with gymnasium)
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from gymnasium.spaces.utils import flatten

run_once = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # most of its time is compilation


class Episodes(NamedTuple):
    """What an agent sees of B episodes, time first, zeros after the end of the shorter ones."""

    obs: np.ndarray  # (T + 1, B, O)
    reward: np.ndarray  # (T, B)
    terminated: np.ndarray  # (T, B)
    truncated: np.ndarray  # (T, B)
    length: np.ndarray  # (B,)


class Bridge:
    """How the hidden state of one family of environments crosses; the defaults are those without random draws.

    draw_like: an array of the shape and type of what is drawn at random for the reset's observation and at each step
    closed_loop: the state crosses before each step, not only at the reset (physics, where rounding grows)
    """

    draw_like: np.ndarray = np.zeros(0, np.float32)
    closed_loop = False
    obs_atol = 0.0
    reward_atol = 1e-7
    policies: tuple[Callable | None, ...] = (None,)  # None: random actions; else raw action = policy(reference)

    # reference -> popgym_jax

    def prepare(self, reference: Any, rng: np.random.Generator) -> None:
        """Before each episode is recorded: for example give the reference a generator that remembers its draws."""
        reference.np_random = rng

    def draw(self, reference: Any, time: int) -> np.ndarray:
        """What the reference drew for its latest observation; time 0 is the reset."""
        return self.draw_like

    def hidden(self, reference: Any) -> dict[str, np.ndarray]:
        """Fields of our EnvState as the reference has them now; fields left out keep a fresh state's values."""
        return {}

    def inject(self, env: Any) -> Any:
        """A copy of our environment whose ``key`` argument is not a key but the draw itself."""
        return env

    def start(self, env: Any, params: Any, draw: Any, hidden: dict[str, Any]) -> tuple[Any, Any]:
        """Our first observation and state from the draw and hidden state of the reference's reset."""
        _, state = env.reset_env(jax.random.key(0), params)
        state = state.replace(**hidden)
        return self.inject(env).observe(draw, state, None, params), state

    # popgym_jax -> reference

    def our_draw(self, env: Any, key: Any, state: Any, params: Any) -> Any:
        """What our environment draws with this key, at the reset (state None) or in a step from this state."""
        return jnp.asarray(self.draw_like)

    def insert(self, reference: Any, state: Any, draws: np.ndarray) -> Any:
        """Reset the reference into our first state, with our draws (T + 1, ...) to come: its raw observation."""
        raise NotImplementedError

    def insert_step(self, reference: Any, state: Any, draw: np.ndarray) -> None:
        """Before each step: our state and the draw that comes, where ``insert`` alone is not enough."""


# ---------------------------------------------------------------- spaces


def make_reference(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mazes warn that memory does not help there
        return gymnasium.make(reference_id(name), disable_env_checker=True).unwrapped


def reference_id(name: str) -> str:
    """The reference spells VelocityOnlyCartpole with a small p."""
    return f"popgym-{name.replace('VelocityOnlyCartPole', 'VelocityOnlyCartpole')}-v0"


def flat_observations(space: Any, raw: list) -> np.ndarray:
    """gymnasium's flatten of many raw observations at once, float32 (n, O); each tenth is checked against it."""
    if isinstance(space, Box):
        flat = np.asarray(raw, np.float64).reshape(len(raw), -1)
    else:
        sizes = [space.n] if isinstance(space, Discrete) else _sizes(space)
        values = np.asarray([np.ravel(x) for x in raw]).astype(int).reshape(len(raw), -1)
        flat = np.zeros((len(raw), sum(sizes)))
        flat[np.arange(len(raw))[:, None], np.cumsum([0, *sizes[:-1]]) + values] = 1
    for i in range(0, len(raw), 10):
        np.testing.assert_array_equal(flat[i], flatten(space, raw[i]))
    return flat


def _sizes(space: Any) -> list[int]:
    return [int(n) for n in space.nvec] if isinstance(space, MultiDiscrete) else [int(part.n) for part in space]


def raw_action(space: Any, action: Any) -> Any:
    """Our action as the reference takes it: a pair (row, column) for boards."""
    if isinstance(space, MultiDiscrete):
        return np.array(np.unravel_index(int(action), space.nvec))
    return int(action) if isinstance(space, Discrete) else np.asarray(action)


def random_action(space: Any, rng: np.random.Generator) -> Any:
    """One of ours: an index, or a torque, beyond its bounds of +-2 as well because the reference clips."""
    if isinstance(space, Box):
        return rng.uniform(-3, 3, 1).astype(np.float32)
    return int(rng.integers(np.prod(space.nvec) if isinstance(space, MultiDiscrete) else space.n))


# ---------------------------------------------------------------- both directions


def forward(bridge: Bridge, env: Any, params: Any, reference: Any, episodes: int, seed: int):
    """Episodes of the reference, and ours from its hidden state and with its draws."""
    rng = np.random.default_rng(seed)
    played = [_play(bridge, reference, rng, bridge.policies[i % len(bridge.policies)]) for i in range(episodes)]
    steps = max(len(rows["action"]) for rows in played)

    def padded(column: str, length: int) -> Any:
        def pad(*values):
            out = np.zeros((length, *np.shape(values[0])), np.asarray(values[0]).dtype)
            out[: len(values)] = values
            return out

        columns = [jax.tree.map(pad, *rows[column]) for rows in played]
        return jax.tree.map(lambda *x: np.stack(x, axis=1), *columns)

    theirs = Episodes(
        *(padded(column, steps + (column == "obs")) for column in ("obs", "reward", "terminated", "truncated")),
        np.array([len(rows["action"]) for rows in played]),
    )
    draws, actions = padded("draw", steps + 1), padded("action", steps)
    hidden = padded("hidden", steps + 1 if bridge.closed_loop else 1)
    injected = bridge.inject(env)

    def step(state, inputs):
        draw, action, hidden = inputs
        if bridge.closed_loop:
            state = state.replace(**hidden)
        obs, state, reward, terminated, info = injected.step_env(draw, state, action, params)
        assert info == {}
        return state, (obs, reward, terminated, env.is_truncated(state, params))

    def replay(draws, actions, hidden):
        obs, state = bridge.start(env, params, draws[0], {name: x[0] for name, x in hidden.items()})
        before = {name: x[:-1] for name, x in hidden.items()} if bridge.closed_loop else {}
        _, (later, *rest) = jax.lax.scan(step, state, (draws[1:], actions, before))
        return jnp.concatenate([obs[None], later]), *rest

    ours = run_once(jax.vmap(replay, in_axes=1, out_axes=1))(draws, actions, hidden)
    return theirs, _with_length(*map(np.asarray, ours))


def _play(bridge: Bridge, reference: Any, rng: np.random.Generator, policy: Callable | None) -> dict[str, list]:
    """One episode of the reference, column by column."""
    bridge.prepare(reference, rng)
    raws = [reference.reset()[0]]
    draws, hidden = [bridge.draw(reference, 0)], [bridge.hidden(reference)]
    actions, rewards, terminations, truncations = [], [], [], []
    while not (terminations and (terminations[-1] or truncations[-1])):
        space = reference.action_space
        action = policy(reference) if policy else random_action(space, rng)
        raw, reward, terminated, truncated, _ = reference.step(raw_action(space, action))
        raws.append(raw)
        actions.append(action)
        rewards.append(float(reward))
        terminations.append(bool(terminated))
        truncations.append(bool(truncated))
        draws.append(bridge.draw(reference, len(actions)))
        if bridge.closed_loop:
            hidden.append(bridge.hidden(reference))
    obs = list(flat_observations(reference.observation_space, raws))
    columns = {"obs": obs, "reward": rewards, "terminated": terminations, "truncated": truncations}
    return columns | {"draw": draws, "action": actions, "hidden": hidden}


def backward(bridge: Bridge, env: Any, params: Any, reference: Any, episodes: int, seed: int):
    """Episodes of popgym_jax with random actions, and the reference's from our hidden state and with our draws."""
    space = env.action_space(params)

    def play(key):
        reset_key, steps_key = jax.random.split(key)
        obs, first = env.reset_env(reset_key, params)

        def step(state, key):
            key_action, key_step = jax.random.split(key)
            action, draw = space.sample(key_action), bridge.our_draw(env, key_step, state, params)
            obs, after, reward, terminated, _ = env.step_env(key_step, state, action, params)
            outputs = (obs, reward, terminated, env.is_truncated(after, params))
            return after, (outputs, action, draw, state if bridge.closed_loop else None)

        keys = jax.random.split(steps_key, params.max_steps_in_episode)
        _, (outputs, actions, draws, states) = jax.lax.scan(step, first, keys)
        first_draw = bridge.our_draw(env, reset_key, None, params)
        draws = jnp.concatenate([first_draw[None], draws])
        return (jnp.concatenate([obs[None], outputs[0]]), *outputs[1:]), first, actions, draws, states

    keys = jax.random.split(jax.random.key(seed), episodes)
    played = jax.tree.map(np.asarray, run_once(jax.vmap(play, out_axes=(1, 0, 1, 1, 1)))(keys))
    outputs, first, actions, draws, states = played
    ours = _with_length(*outputs)
    obs, reward, *flags = (np.zeros_like(x, float if x.dtype != bool else bool) for x in ours[:4])
    theirs = Episodes(obs, reward, *flags, ours.length)
    for i in range(episodes):
        raws = [bridge.insert(reference, jax.tree.map(lambda x, i=i: x[i], first), draws[:, i])]
        for t in range(ours.length[i]):
            state = jax.tree.map(lambda x, t=t, i=i: x[t, i], states)
            bridge.insert_step(reference, state, draws[t + 1, i])
            raw, reward, terminated, truncated, _ = reference.step(raw_action(reference.action_space, actions[t, i]))
            raws.append(raw)
            theirs.reward[t, i], theirs.terminated[t, i], theirs.truncated[t, i] = reward, terminated, truncated
        theirs.obs[: len(raws), i] = flat_observations(reference.observation_space, raws)
    return theirs, ours


def _with_length(obs: np.ndarray, reward: np.ndarray, terminated: np.ndarray, truncated: np.ndarray) -> Episodes:
    done = terminated | truncated
    assert done.any(axis=0).all(), "an episode did not end"
    return Episodes(obs, reward, terminated, truncated, 1 + np.argmax(done, axis=0))


def assert_same(bridge: Bridge, theirs: Episodes, ours: Episodes) -> None:
    """Every observation, reward, termination, truncation and length, as far as the episodes go."""
    assert ours.obs.dtype == ours.reward.dtype == np.float32
    assert ours.terminated.dtype == ours.truncated.dtype == bool
    assert ours.obs.shape[1:] == theirs.obs.shape[1:]
    np.testing.assert_array_equal(ours.length, theirs.length)
    steps = min(len(theirs.reward), len(ours.reward))
    alive = np.arange(steps)[:, None] < theirs.length
    np.testing.assert_allclose(ours.obs[0], theirs.obs[0], rtol=0, atol=bridge.obs_atol)
    mine, other = ours.obs[1 : steps + 1][alive], theirs.obs[1 : steps + 1][alive]
    np.testing.assert_allclose(mine, other, rtol=0, atol=bridge.obs_atol)
    mine, other = ours.reward[:steps][alive], theirs.reward[:steps][alive]
    np.testing.assert_allclose(mine, other, rtol=1e-6, atol=bridge.reward_atol)
    np.testing.assert_array_equal(ours.terminated[:steps][alive], theirs.terminated[:steps][alive])
    np.testing.assert_array_equal(ours.truncated[:steps][alive], theirs.truncated[:steps][alive])


class Scripted:
    """A numpy generator of which some methods return what was written down for them; any other use is an error."""

    def __init__(self, **answers: Callable):
        self.__dict__.update(answers)
