"""control_jax against dm_control: models, steps, whole episodes, starts.

A step is compared from dm_control's own state: every step of its episodes is taken again here, all of them side by
side, and must lead to the same state, observation and reward. The tolerances are what float32 allows: dm_control
computes in float64, and here a state is rounded to 24 bits before and after each control step.
"""

import csv
import re
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest
from conftest import others_slow
from reference.control import TASKS, Played, flat, hidden_of, load, play
from scipy.stats import ks_2samp

import control_jax
from control_jax.ball_in_cup import touches_cup
from control_jax.engine import Physics
from control_jax.finger import touches_spinner

NAMES = tuple(TASKS)
FAMILY = {name: TASKS[name][0] for name in NAMES}
# largest difference after one control step: an angle that has turned through a hundred radians is rounded to 8e-6,
# and stiff contacts make velocities of it
TOLERANCE = {"closed_form": 2e-4, "c": 2e-4, "mjx": 2e-2}


def engines(name: str) -> tuple[str, ...]:
    """Those that a test compares: the two that a CPU uses by default."""
    return ("c",) if FAMILY[name] in ("ball_in_cup", "finger") else ("closed_form", "c")


# ---- actions that reach what matters ---------------------------------------------------------------------------------


def wild_actions(rng: np.random.Generator, steps: int, size: int) -> np.ndarray:
    """Held for ten steps each, often at their limits and beyond: joints reach theirs, bodies touch."""
    held = rng.uniform(-1.5, 1.5, (-(-steps // 10), size))
    return np.repeat(held, 10, axis=0)[:steps].clip(-1, 1)


def guided_actions(name: str, env: Any, steps: int, search: bool = True) -> np.ndarray:
    """Actions (steps, A) that were found by a controller on dm_control itself, from its present start.

    It knows the state: energy for what swings, a spring and damper for what reaches; of the fingers and the cup the
    best of many rhythms, or without a search any.
    """
    if FAMILY[name] in ("ball_in_cup", "finger"):
        return best_rhythm(name, env, steps, candidates=256 if search else 1)
    actions = []
    state = env.physics.get_state().copy()
    for _ in range(steps):
        action = np.clip(controller(name, env), -1.0, 1.0)
        actions.append(action)
        env.step(action)
    env.physics.set_state(state)
    return np.array(actions)


def controller(name: str, env: Any) -> np.ndarray:
    """The action of the present state (A,)."""
    position, velocity = np.array(env.physics.data.qpos), np.array(env.physics.data.qvel)
    if FAMILY[name] == "pendulum":
        angle = (position[0] + np.pi) % (2 * np.pi) - np.pi
        if abs(angle) < 0.3:
            return np.array([-12.0 * angle - 3.0 * velocity[0]])
        energy = 0.5 * 0.25 * velocity[0] ** 2 + 9.81 * 0.5 * (np.cos(angle) - 1.0)
        return np.sign(velocity + 1e-9) * (1.0 if energy < 0.1 else -1.0)
    if FAMILY[name] == "cartpole":
        angle = (position[1] + np.pi) % (2 * np.pi) - np.pi
        if abs(angle) < 0.4:
            push = 30.0 * angle + 6.0 * velocity[1] + 1.0 * position[0] + 2.0 * velocity[0]
            return np.array([push / 10.0])
        energy = 0.5 * velocity[1] ** 2 / 3.0 + 9.81 * 0.5 * (np.cos(angle) - 1.0)
        return np.array([3.0 * energy * velocity[1] * np.cos(angle) - 0.2 * position[0]])
    if FAMILY[name] == "reacher":
        to_target = env.physics.finger_to_target()
        shoulder, wrist = position
        forearm = shoulder + wrist
        elbow = 0.12 * np.array([-np.sin(shoulder), np.cos(shoulder)])
        hand = 0.12 * np.array([-np.sin(forearm), np.cos(forearm)])
        jacobian = np.stack([elbow + hand, hand], axis=1)
        return jacobian.T @ to_target * 60.0 - 0.15 * velocity
    directions = env.physics.model.wrap_prm[:4].reshape(2, 2)
    return np.linalg.solve(directions.T, -8.0 * position - 4.0 * velocity)


def best_rhythm(name: str, env: Any, steps: int, candidates: int) -> np.ndarray:
    """Of many sine waves of random amplitude, rhythm and phase, the one with the highest return from this start."""
    ours, params = control_jax.make(name, "c")
    data = env.physics.data
    rng = np.random.default_rng(np.frombuffer(data.qpos.tobytes(), np.uint32))
    size = ours.num_actions
    amplitude, phase = rng.uniform(0.3, 1.5, (candidates, 1, size)), rng.uniform(0, 2 * np.pi, (candidates, 1, size))
    rhythm = rng.uniform(0.02, 0.6, (candidates, 1, 1))
    middle = rng.uniform(-0.5, 0.5, (candidates, 1, size))
    time = np.arange(steps)[None, :, None]
    actions = (middle + amplitude * np.sin(rhythm * time + phase)).clip(-1, 1)
    if candidates == 1:
        return actions[0]
    state = as_ours(ours, data.qpos, data.qvel, data.qacc_warmstart, hidden_of(name, env))
    returns = jax.jit(partial(returns_from, ours, params))(state, jnp.asarray(actions, jnp.float32))
    return actions[int(np.argmax(returns))]


def returns_from(env: Any, params: Any, state: Any, actions: jax.Array) -> jax.Array:
    """Returns of action sequences (N, T, A) from one state, (N,)."""
    states = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(actions), *x.shape)), state)

    def step(states, action):
        _, states, reward, *_ = jax.vmap(env.step_env, (None, 0, 0, None))(None, states, action, params)
        return states, reward

    return jax.lax.scan(step, states, jnp.swapaxes(actions, 0, 1))[1].sum(axis=0)


# ---- the same step ---------------------------------------------------------------------------------------------------


def as_ours(env: Any, position: Any, velocity: Any, warmstart: Any, hidden: Any) -> control_jax.EnvState:
    """A state of ours from dm_control's numbers, with any leading axes. What was touched before does not matter."""
    leading = np.shape(position)[:-1]
    physics = Physics(
        position=jnp.asarray(position, jnp.float32),
        velocity=jnp.asarray(velocity, jnp.float32),
        warmstart=jnp.asarray(warmstart, jnp.float32),
        sensors=jnp.zeros((*leading, env.model.nsensordata), jnp.float32),
    )
    return control_jax.EnvState(
        time=jnp.zeros(leading, jnp.int32), physics=physics, hidden=jnp.asarray(hidden, jnp.float32)
    )


def largest_differences(name: str, engine: str, played: Played) -> dict[str, float]:
    """Every step taken here once more: largest differences of state, observation and reward."""
    env, params = control_jax.make(name, engine)
    state = as_ours(env, played.position, played.velocity, played.warmstart, played.hidden)
    step = jax.jit(jax.vmap(env.step_env, (None, 0, 0, None)))
    obs, after, reward, terminated, _ = step(None, state, jnp.asarray(played.action, jnp.float32), params)
    assert not terminated.any() and obs.shape == played.observation.shape
    return {
        "position": float(np.abs(after.physics.position - played.position_after).max()),
        "velocity": float(np.abs(after.physics.velocity - played.velocity_after).max()),
        "observation": float(np.abs(obs - played.observation).max()),
        # at an edge a rounded number may fall on the other side, and a reward of 1 is a reward of 0
        "reward": float(np.quantile(np.abs(reward - played.reward), 1 - 1e-4, method="lower")),
        "rewards on the other side": float((np.abs(reward - played.reward) > 0.5).sum()),
    }


def episodes_of(name: str, episodes: int, steps: int) -> Played:
    """Episodes of dm_control, every second one guided."""
    ours, _ = control_jax.make(name, "c")
    env = load(name, seed=1)
    rng = np.random.default_rng(2)
    played = []
    for episode in range(episodes):
        env.reset()
        start = as_ours(ours, *start_of(name, env))
        if episode % 2:
            actions = wild_actions(rng, steps, env.action_spec().shape[0])
        else:
            actions = guided_actions(name, env, steps, search=episode < 8)
        played.append(play(name, env, actions, start))
    return Played(*(np.concatenate(parts) for parts in zip(*played, strict=True)))


def start_of(name: str, env: Any) -> tuple[np.ndarray, ...]:
    data = env.physics.data
    return np.array(data.qpos), np.array(data.qvel), np.array(data.qacc_warmstart), hidden_of(name, env)


# with contacts, which are MuJoCo's, and without, in closed form
QUICK = ("BallInCup", "CartpoleSwingup")


@pytest.mark.parametrize("name", others_slow(NAMES, *QUICK))
def test_a_step_is_dm_controls(name, request):
    episodes = request.config.getoption("--control-episodes")
    played = episodes_of(name, episodes, steps=1000 if episodes > 4 else 500)
    assert played.reward.max() > 0.5  # it has been where the reward is
    if FAMILY[name] in ("ball_in_cup", "finger"):
        assert (played.contacts > 0).mean() > 0.01
    for engine in engines(name):
        found = largest_differences(name, engine, played)
        report = request.config.getoption("--control-report")
        if report:
            append_row(Path(report), {"task": name, "engine": engine, "steps": len(played.reward)} | found)
        for part in ("position", "velocity", "observation", "reward"):
            assert found[part] < TOLERANCE[engine], (engine, found)
        assert found["rewards on the other side"] <= max(1, 1e-4 * len(played.reward)), (engine, found)


def append_row(path: Path, row: dict[str, Any]) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row.keys(), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["BallInCup", "FingerSpin", "FingerTurnHard", "CartpoleSwingup"])
def test_a_step_on_an_accelerators_engine_is_dm_controls(name):
    """MJX stops its solver after a few iterations; no mean difference may be larger than a hundredth of the largest."""
    found = largest_differences(name, "mjx", episodes_of(name, 2, 500))
    assert max(found[part] for part in ("position", "velocity", "observation")) < TOLERANCE["mjx"], found


@pytest.mark.parametrize(
    "name", others_slow(["BallInCup", "CartpoleSwingup", "FingerSpin", "PointMassHard", "ReacherEasy"], "BallInCup")
)
def test_a_whole_episode_is_dm_controls(name):
    """From the same start, with the same actions, on our own numbers all the way, until rounding has grown."""
    env, params = control_jax.make(name)
    theirs = load(name, seed=3)
    _, state = env.reset_env(jax.random.PRNGKey(1), params)
    actions = wild_actions(np.random.default_rng(4), 1000, env.num_actions)
    played = play(name, theirs, actions, state)

    @jax.jit
    def roll(state, actions):
        def step(state, action):
            obs, state, reward, *_ = env.step_env(None, state, action, params)
            return state, (obs, reward)

        return jax.lax.scan(step, state, actions)[1]

    obs, reward = roll(state, jnp.asarray(actions, jnp.float32))
    np.testing.assert_allclose(obs[:50], played.observation[:50], atol=2e-3)
    np.testing.assert_allclose(reward[:50], played.reward[:50], atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_control_step_episode_length_and_actions_are_dm_controls(name):
    env, params = control_jax.make(name)
    theirs = load(name, seed=0)
    spec = theirs.action_spec()
    theirs.reset()
    steps = 0
    while True:
        steps += 1
        if theirs.step(np.zeros(spec.shape)).last():
            break
    assert steps == params.max_steps_in_episode
    assert env.substeps * env.model.opt.timestep == pytest.approx(theirs.control_timestep())
    assert spec.shape == env.action_space(params).shape and spec.minimum[0] == -1.0 and spec.maximum[0] == 1.0
    assert flat(theirs.reset().observation).shape == env.observation_space(params).shape


# ---- the same model --------------------------------------------------------------------------------------------------

OPTIONS = ("timestep", "integrator", "cone", "jacobian", "solver", "iterations", "ls_iterations", "noslip_iterations")
OPTIONS += ("tolerance", "ls_tolerance", "gravity", "impratio", "density", "viscosity", "o_solref", "o_solimp")
JOINTS = ("type", "range", "limited", "solref", "solimp", "stiffness", "margin", "axis", "pos")
DEGREES = ("damping", "armature", "frictionloss", "solref", "solimp", "invweight0", "M0")
COLLIDING = ("type", "size", "friction", "solref", "solimp", "solmix", "margin", "gap", "condim", "priority")


def colliding_geoms(model: Any) -> list[int]:
    """All that can collide but the two cylinders that mark the finger's joints."""
    geoms = np.flatnonzero(model.geom_contype | model.geom_conaffinity)
    return [geom for geom in geoms if "decoration" not in model.geom(geom).name]


@pytest.mark.parametrize("name", NAMES)
def test_a_compiled_model_is_dm_controls(name):
    ours = control_jax.make(name, "c")[0].model
    theirs = load(name, seed=0)
    theirs.reset()
    theirs = theirs.physics.model.ptr
    for field in OPTIONS:
        np.testing.assert_array_equal(getattr(ours.opt, field), getattr(theirs.opt, field), field)
    no_reset = int(mujoco.mjtDisableBit.mjDSBL_AUTORESET)
    assert int(ours.opt.disableflags) == int(theirs.opt.disableflags) | no_reset
    for prefix, fields in {"jnt": JOINTS, "dof": DEGREES}.items():
        for field in fields:
            a, b = getattr(ours, f"{prefix}_{field}"), getattr(theirs, f"{prefix}_{field}")
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-15, err_msg=field)
    np.testing.assert_allclose(ours.qpos0, theirs.qpos0)
    for field in ("mass", "inertia", "ipos", "pos"):
        a, b = getattr(ours, f"body_{field}"), getattr(theirs, f"body_{field}")
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-15, err_msg=field)
    np.testing.assert_array_equal(ours.actuator_gear, theirs.actuator_gear)
    if FAMILY[name] in ("ball_in_cup", "finger"):
        for field in COLLIDING:
            a = getattr(ours, f"geom_{field}")[colliding_geoms(ours)]
            b = getattr(theirs, f"geom_{field}")[colliding_geoms(theirs)]
            np.testing.assert_array_equal(a, b, field)
        np.testing.assert_array_equal(ours.tendon_range, theirs.tendon_range)


@pytest.mark.parametrize("name", ["BallInCup", "FingerSpin"])
def test_what_touches_at_a_start_is_what_dm_control_rejects(name):
    """The distances written out here against the simulator's contacts, over all starts that are drawn."""
    env, _ = control_jax.make(name, "c")
    theirs = load(name, seed=0)
    theirs.reset()
    model = theirs.physics.model.ptr
    data = mujoco.MjData(model)
    rng = np.random.default_rng(0)
    positions = rng.uniform(model.jnt_range[:, 0], model.jnt_range[:, 1], (5_000, model.nq))
    if name == "BallInCup":
        positions = np.concatenate([np.zeros((5_000, 2)), rng.uniform([-0.2, 0.2], [0.2, 0.5], (5_000, 2))], axis=1)
    else:
        positions[:, 2] = rng.uniform(-np.pi, np.pi, 5_000)
    theirs_touch = []
    for position in positions:
        data.qpos[:] = position
        mujoco.mj_forward(model, data)
        theirs_touch.append(data.ncon > 0)
    touches = (lambda q: touches_cup(q[2:])) if name == "BallInCup" else touches_spinner
    ours_touch = jax.vmap(touches)(jnp.asarray(positions, jnp.float32))
    assert 0.02 < np.mean(theirs_touch) < 0.98
    assert (np.asarray(ours_touch) != np.array(theirs_touch)).sum() <= 1  # at the edge itself


# ---- the same starts -------------------------------------------------------------------------------------------------


def columns_of(position: Any, velocity: Any, hidden: Any) -> dict[str, np.ndarray]:
    """Every quantity of a start that varies, by name, (N,) each."""
    columns = {}
    for label, values in {"position": position, "velocity": velocity, "hidden": hidden}.items():
        for i, column in enumerate(np.asarray(values, np.float64).T):
            if np.ptp(column) > 1e-9:
                columns[f"{label} {i}"] = column
    return columns


def least_probable(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> tuple[str, float]:
    """Of all quantities, and of all pairs' sums and products, the one whose two samples differ most.

    Its name, and its p-value by Kolmogorov and Smirnov times the number of comparisons (Bonferroni).
    """
    assert ours.keys() == theirs.keys()
    p = {}
    scaled: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name, reference in theirs.items():
        middle, size = reference.mean(), reference.std()
        scaled[name] = (ours[name] - middle) / size, (reference - middle) / size
        p[name] = float(ks_2samp(*scaled[name]).pvalue)
    for (first, (a, b)), (second, (c, d)) in combinations(scaled.items(), 2):
        p[f"{first} + {second}"] = float(ks_2samp(a + c, b + d).pvalue)
        p[f"{first} * {second}"] = float(ks_2samp(a * c, b * d).pvalue)
    name = min(p, key=p.get)
    return name, min(1.0, p[name] * len(p))


def their_starts(name: str, draws: int) -> dict[str, np.ndarray]:
    env = load(name, seed=5)
    rows = []
    for _ in range(draws):
        env.reset()
        position, velocity, _, hidden = start_of(name, env)
        rows.append((position, velocity, hidden))
    return columns_of(*(np.stack(part) for part in zip(*rows, strict=True)))


def our_states(name: str, draws: int) -> control_jax.EnvState:
    env, params = control_jax.make(name)
    return jax.jit(jax.vmap(env.reset_env, (0, None)))(jax.random.split(jax.random.PRNGKey(6), draws), params)[1]


@pytest.mark.parametrize("name", others_slow(NAMES, *QUICK))
def test_starts_are_distributed_as_dm_controls(name, request):
    draws = 100 * request.config.getoption("--control-episodes")
    draws = max(draws, 1_000)
    state = our_states(name, draws)
    ours = columns_of(state.physics.position, state.physics.velocity, state.hidden)
    worst, p = least_probable(ours, their_starts(name, draws))
    report = request.config.getoption("--control-report")
    if report:
        row = {"task": name, "draws": draws, "quantities": len(ours), "least probable": worst, "p": p}
        append_row(Path(report).with_suffix(".starts.csv"), row)
    assert p > 0.01, worst


@pytest.mark.parametrize("bias", ["narrower", "shared", "half circle"])
def test_a_biased_start_is_found(bias):
    """Faults of resets that were seen in the wild."""
    rng = np.random.default_rng(7)
    fair = rng.uniform(-np.pi, np.pi, (2, 2_000, 3))
    biased = fair[1].copy()
    if bias == "narrower":
        biased[:, 0] *= 0.7
    if bias == "shared":
        biased[:, 2] = 2.0 * biased[:, 0] % np.pi - np.pi / 2
        biased[:, 2] *= 2.0
    if bias == "half circle":
        biased[:, 1] = np.abs(biased[:, 1])
    nothing = np.zeros((2_000, 0))
    theirs = columns_of(fair[0], nothing, nothing)
    assert least_probable(columns_of(biased, nothing, nothing), theirs)[1] < 1e-6
    assert least_probable(columns_of(fair[1], nothing, nothing), theirs)[1] > 0.01


# ---- as an environment -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", others_slow(NAMES, *QUICK))
def test_an_episode_ends_after_1000_steps_and_another_begins(name):
    env, params = control_jax.make(name)
    _, state = env.reset(jax.random.PRNGKey(0), params)
    state = state.replace(time=state.time + 998)
    for expected in (False, True):
        key = jax.random.PRNGKey(int(expected))
        obs, state, reward, terminated, truncated, info = env.step(key, state, jnp.zeros(env.num_actions), params)
        assert bool(truncated) == expected and not terminated
        assert obs.dtype == reward.dtype == jnp.float32 and obs.shape == (env.observation_size,)
    assert state.time == 0 and not np.array_equal(obs, info["final_observation"])


def test_actions_are_clipped_and_a_simulation_that_diverges_stays():
    env, params = control_jax.make("BallInCup")
    _, state = env.reset(jax.random.PRNGKey(0), params)
    step = jax.jit(env.step_env)
    far, near = (step(None, state, jnp.full(2, size), params)[1] for size in (7.0, 1.0))
    np.testing.assert_array_equal(far.physics.position, near.physics.position)
    broken = state.replace(physics=state.physics._replace(velocity=jnp.full(4, jnp.nan)))
    obs, after, reward, *_ = step(None, broken, jnp.zeros(2), params)
    np.testing.assert_array_equal(after.physics.position, state.physics.position)
    assert reward == 0.0


def test_the_readmes_example_runs(capsys):
    page = (Path(control_jax.__file__).parent / "README.md").read_text()
    (block,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    exec(block, {})
    assert 0.0 <= float(capsys.readouterr().out) < 50.0  # of 1000: next to nothing, as its comment promises


def test_engines_and_names_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="nearest: BallInCup"):
        control_jax.make("BallInACup")
    with pytest.raises(ValueError, match="unknown engine 'warp'; must be of"):
        control_jax.make("BallInCup", "warp")
    with pytest.raises(ValueError, match="no closed form"):
        control_jax.make("BallInCup", "closed_form")


@pytest.mark.slow
def test_many_steps_of_the_c_engine_in_one_program_do_not_block():
    """Two simulators at once in a scan, under vmap over seeds: thousands of calls out of the program."""
    (cup, params), (finger, _) = control_jax.make("BallInCup", "c"), control_jax.make("FingerSpin", "c")

    @jax.jit
    @jax.vmap
    def run(key):
        keys = jax.random.split(key, 3)
        states = tuple(jax.vmap(env.reset_env, (0, None))(keys, params)[1] for env in (cup, finger))

        def step(states, key):
            action = jax.random.uniform(key, (3, 2), minval=-1.0)
            later = [
                jax.vmap(env.step_env, (None, 0, 0, None))(key, state, action, params)
                for env, state in zip((cup, finger), states, strict=True)
            ]
            return tuple(found[1] for found in later), sum(found[0].sum() for found in later)

        return jax.lax.scan(step, states, jax.random.split(key, 1_500))[1]

    seen = run(jax.random.split(jax.random.PRNGKey(0), 2))
    assert seen.shape == (2, 1_500) and jnp.isfinite(seen).all()
