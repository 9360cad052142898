"""A player with a perfect memory for every environment of POPGym, as strong as we could make it.

A policy plays B episodes of one environment side by side and sees what an agent sees, flat observations, and
remembers its own actions:

    reset(batch)              B new episodes
    act(obs (B, O)) -> (B,)   actions, or (B, 1) continuous ones

It is not told which episodes are over, and what it does in those does not matter. `reference_policy(name)` is the
one for an environment, `REFERENCES` says what each does and whether nothing can be better.
benchmarks/popgym_limits.py lets them play.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np

from popgym_jax import cartpole, labyrinth, minesweeper, pendulum
from popgym_jax.registration import family_and_level

# ---------------------------------------------------------------- nothing to remember


class Random:
    """Uniform over the action space."""

    def __init__(self, space: gymnasium.Space, seed: int = 1):
        self.space = space
        self.rng = np.random.default_rng(seed)

    def reset(self, batch: int) -> None:
        pass

    def act(self, obs: np.ndarray) -> np.ndarray:
        if isinstance(self.space, gymnasium.spaces.Box):
            return self.rng.uniform(self.space.low, self.space.high, (len(obs), 1)).astype(np.float32)
        return self.rng.integers(self.space.n, size=len(obs))


# ---------------------------------------------------------------- cards


class RecallFirst:
    """RepeatFirst: what was seen first."""

    def reset(self, batch: int) -> None:
        self.first: Any = None

    def act(self, obs: np.ndarray) -> np.ndarray:
        if self.first is None:
            self.first = obs.argmax(1)
        return self.first


class RecallPrevious:
    """RepeatPrevious: what was seen `lag` observations ago."""

    def __init__(self, lag: int):
        self.lag = lag

    def reset(self, batch: int) -> None:
        self.seen: list[np.ndarray] = []

    def act(self, obs: np.ndarray) -> np.ndarray:
        self.seen.append(obs.argmax(1))
        return self.seen[max(0, len(self.seen) - 1 - self.lag)]


class Recite:
    """Autoencode: a stack of suits, filled up to and including the first observation that says PLAY, then emptied."""

    def reset(self, batch: int) -> None:
        self.stack: list[np.ndarray] = []
        self.playing = False

    def act(self, obs: np.ndarray) -> np.ndarray:
        if not self.playing:
            self.stack.append(obs[:, 2:].argmax(1))
        self.playing |= bool(obs[0, 0])  # all decks have one size, so all turn to PLAY together
        return self.stack.pop() if self.playing and self.stack else np.zeros(len(obs), int)


class Count:
    """CountRecall: counts the values, the current one included."""

    def reset(self, batch: int) -> None:
        self.counts: Any = 0

    def act(self, obs: np.ndarray) -> np.ndarray:
        value, query = np.split(obs.astype(int), 2, axis=1)
        self.counts = self.counts + value
        return np.sum(self.counts * query, axis=1)


class CountCards:
    """HigherLower: the side on which more cards are left.

    A guess changes nothing but its own reward, so the best guess at every step is the best policy.
    """

    def __init__(self, num_decks: int):
        self.num_decks = num_decks

    def reset(self, batch: int) -> None:
        self.left = np.full((batch, 13), 4 * self.num_decks)

    def act(self, obs: np.ndarray) -> np.ndarray:
        rank = obs.argmax(1)[:, None]
        self.left -= obs.astype(int)
        higher = np.sum(self.left * (np.arange(13) > rank), axis=1)
        lower = np.sum(self.left * (np.arange(13) < rank), axis=1)
        return np.where(higher >= lower, 0, 1)


UNSEEN = -1


class FlipPairs:
    """Concentration: an unknown card first, then its partner if one is known, else another unknown card.

    Pairs of which both cards are known wait until no card is unknown: each of them is the partner of a card that is
    still to come. With two kinds it can be better to turn another unknown card although a partner is known
    (`expected_misses` decides); with 13 it never is.
    """

    def __init__(self, positions: int, kinds: int):
        self.positions = positions
        self.kinds = kinds

    def reset(self, batch: int) -> None:
        self.kind = np.full((batch, self.positions), UNSEEN)
        self.matched = np.zeros((batch, self.positions), bool)
        self.flips: list[np.ndarray] = []  # of the current pair

    def remember(self, obs: np.ndarray) -> None:
        """Kinds of the cards in view; the last value is a card's back."""
        shown = obs.reshape(len(obs), self.positions, self.kinds + 1).argmax(2)
        self.kind = np.where(shown < self.kinds, shown, self.kind)

    def act(self, obs: np.ndarray) -> np.ndarray:
        everyone = np.arange(len(obs))
        self.remember(obs)
        if len(self.flips) == 2:
            first, second = self.flips
            kind = self.kind[everyone, first]
            pair = (kind != UNSEEN) & (kind == self.kind[everyone, second])
            self.matched[everyone, first] |= pair
            self.matched[everyone, second] |= pair
            self.flips = []
        unknown = self.kind == UNSEEN
        waiting = ~unknown & ~self.matched
        if self.flips:
            first = self.flips[0]
            partner = waiting & (self.kind == self.kind[everyone, first][:, None])
            partner[everyone, first] = False
            unknown[everyone, first] = False
            match = partner.any(1)
            if self.kinds == 2:
                match &= ~self.rather_unknown(partner, waiting, unknown, first)
            action = np.where(match, partner.argmax(1), unknown.argmax(1))
        else:
            action = np.where(unknown.any(1), unknown.argmax(1), waiting.argmax(1))
        self.flips.append(action)
        return action

    def rather_unknown(
        self, partner: np.ndarray, waiting: np.ndarray, unknown: np.ndarray, first: np.ndarray
    ) -> np.ndarray:
        """Whether another unknown card is better than the partner, bool (B,); the masks are (B, positions)."""
        everyone = np.arange(len(first))
        same = self.kind == self.kind[everyone, first][:, None]
        known = partner.sum(1)
        hidden = self.positions // 2 - (same & ~unknown).sum(1)  # of the first card's kind
        other_known = waiting.sum(1) - known - 1
        other_hidden = unknown.sum(1) - hidden
        better = np.zeros(len(first), bool)
        for i in np.flatnonzero(partner.any(1) & unknown.any(1)):
            counts = (int(known[i]), int(hidden[i]), int(other_known[i]), int(other_hidden[i]))
            with_partner, with_unknown = misses_after_first(*counts)
            better[i] = with_unknown < with_partner
        return better


@functools.cache
def expected_misses(known: int, hidden: int, other_known: int, other_hidden: int) -> float:
    """Failed pairs until the end of a game with two kinds, on average and if played as well as possible.

    known, hidden: cards of one kind that are still to be paired, with known places and with unknown ones; and of the
        other kind
    """
    unknown = hidden + other_hidden
    if unknown == 0:
        return 0.0
    total = 0.0
    if hidden:
        total += hidden * min(misses_after_first(known, hidden - 1, other_known, other_hidden))
    if other_hidden:
        total += other_hidden * min(misses_after_first(other_known, other_hidden - 1, known, hidden))
    return total / unknown


def misses_after_first(known: int, hidden: int, other_known: int, other_hidden: int) -> tuple[float, float]:
    """`expected_misses` once a card of the first kind lies open: with its partner, and with an unknown card.

    The open card is in none of the four counts.
    """
    with_partner = math.inf
    if known:
        with_partner = expected_misses(known - 1, hidden, other_known, other_hidden)
    with_unknown = math.inf
    unknown = hidden + other_hidden
    if unknown:
        with_unknown = 0.0
        if hidden:
            with_unknown += hidden * expected_misses(known, hidden - 1, other_known, other_hidden)
        if other_hidden:
            after = expected_misses(known + 1, hidden, other_known + 1, other_hidden - 1)
            with_unknown += other_hidden * (1 + after)
        with_unknown /= unknown
    return with_partner, with_unknown


# ---------------------------------------------------------------- bandit


class IndexBandit:
    """MultiarmedBandit: the arm with the highest finite-horizon Gittins index, see `bandit_indices`."""

    def __init__(self, arms: int, length: int):
        self.arms = arms
        self.length = length

    def reset(self, batch: int) -> None:
        self.pulls = np.zeros((batch, self.arms), int)
        self.paid = np.zeros((batch, self.arms), int)
        self.arm: Any = None
        self.left = self.length

    def act(self, obs: np.ndarray) -> np.ndarray:
        everyone = np.arange(len(obs))
        if self.arm is not None:  # the observation answers the previous pull
            self.pulls[everyone, self.arm] += 1
            self.paid[everyone, self.arm] += obs[:, 1].astype(int)
        horizons, indices = bandit_indices(self.length)
        row = np.searchsorted(horizons, max(self.left, 1), side="right") - 1
        self.arm = indices[row, self.pulls, self.paid].argmax(1)
        self.left -= 1
        return self.arm


@functools.cache
def bandit_indices(length: int, grid: int = 101) -> tuple[np.ndarray, np.ndarray]:
    """Horizons (S,) and the index of an arm at each of them, float32 (S, pulls, times it paid).

    The index (Kaufmann 2018, "On Bayesian index policies for sequential resource allocation", FH-Gittins) of an arm
    with uniform prior and `s` pulls left is the pay `c` per pull of a sure arm that is worth as much: the zero of

        gain_s(c) = p - c + p max(gain_{s-1}(c), 0 | paid) + (1 - p) max(gain_{s-1}(c), 0 | not paid)

    with p = (paid + 1) / (pulls + 2). Solved for `grid` values of c, with the zero interpolated between two of them.
    """
    horizons = np.unique(np.geomspace(1, length, 48).astype(int))
    sure = np.linspace(0, 1, grid)
    indices = np.zeros((len(horizons), length + 1, length + 1), np.float32)
    before = np.zeros_like(indices)  # gains at the previous value of c
    pulls = np.arange(length + 1, dtype=np.float32)[:, None]
    paid = np.arange(length + 1, dtype=np.float32)
    probability = (np.minimum(paid, pulls) + 1) / (pulls + 2)
    for c in sure:
        gain = np.zeros((length + 2, length + 2), np.float32)
        for left in range(1, length + 1):
            size = length - left + 1  # so many pulls are possible by then
            p = probability[:size, :size]
            after = np.maximum(gain[1 : size + 1, : size + 1], 0)
            gain = p - np.float32(c) + after[:, :-1] + p * (after[:, 1:] - after[:, :-1])
            row = np.searchsorted(horizons, left)
            if horizons[row] == left:
                old = before[row, :size, :size]
                crossed = (old > 0) & (gain <= 0)
                zero = c - (sure[1] - sure[0]) * gain / np.where(crossed, gain - old, 1)
                indices[row, :size, :size] = np.where(crossed, zero, indices[row, :size, :size])
                before[row, :size, :size] = gain
    return horizons, indices


# ---------------------------------------------------------------- cart and pole


@functools.cache
def linear_cart() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The upright cart and pole for small deviations, state' = A state + push B, and a gain that balances it.

    The push is -1 or 1; sign(-gain state) pushes; A (4, 4), B (4,), gain (4,). The gain is that of the linear-quadratic
    regulator whose cost is mostly the angle's.
    """
    upright = jnp.zeros(4)
    A = np.asarray(jax.jacfwd(lambda state: cartpole.euler_step(state, 1))(upright), float)
    B = np.asarray(cartpole.euler_step(upright, 1), float)
    cost = np.diag([1.0, 0.1, 10.0, 0.1])
    value = cost
    for _ in range(2000):
        gain = B @ value @ A / (1 + B @ value @ B)
        value = cost + A.T @ value @ (A - np.outer(B, gain))
    return A, B, gain


def balance(state: np.ndarray) -> np.ndarray:
    """Push of a cart whose state is known, (B, 4): action (B,)."""
    _, _, gain = linear_cart()
    return (state @ gain < 0).astype(int)


class IntegrateCartPole:
    """VelocityOnlyCartPole: the first observation is the position, later ones are sums of velocities."""

    def reset(self, batch: int) -> None:
        self.position: Any = None

    def locate(self, obs: np.ndarray) -> None:
        if self.position is None:
            self.position = obs.astype(float)
            self.velocity = np.zeros_like(self.position)
        else:
            self.position = self.position + cartpole.TIME_STEP * self.velocity
            self.velocity = obs

    def act(self, obs: np.ndarray) -> np.ndarray:
        self.locate(obs)
        state = np.stack([self.position, self.velocity], axis=2)  # (B, x and theta, it and its velocity)
        return balance(state.reshape(-1, 4))


class FilterCartPole:
    """PositionOnlyCartPole: a Kalman filter for the linearised cart and pole, and a linear-quadratic regulator."""

    def __init__(self, sigma: float):
        self.variance = sigma**2
        self.C = np.eye(4)[::2]

    def reset(self, batch: int) -> None:
        self.mean = np.zeros((batch, 4))
        self.covariance = cartpole.RESET_RANGE**2 / 3 * np.eye(4)

    def act(self, obs: np.ndarray) -> np.ndarray:
        A, B, _ = linear_cart()
        P = self.covariance
        gain = P @ self.C.T @ np.linalg.inv(self.C @ P @ self.C.T + self.variance * np.eye(2))
        mean = self.mean + (obs - self.mean @ self.C.T) @ gain.T
        action = balance(mean)
        self.mean = mean @ A.T + np.where(action == 1, 1, -1)[:, None] * B
        self.covariance = A @ (P - gain @ self.C @ P) @ A.T + 1e-6 * np.eye(4)
        return action


class Particles(NamedTuple):
    """A belief: equally likely states, float32 (B, n, d); the key of the next step."""

    states: jax.Array
    key: jax.Array


class ParticleFilter:
    """A belief about a state that is seen through noise, and nothing else disturbs.

    Weighed with the exact likelihood of clipped observations, then resampled. A kernel that keeps mean and covariance
    tells equal particles apart (Liu and West 2001, "Combined parameter and state estimation in simulation-based
    filtering"). Noise of a fixed size besides keeps a belief that has become too sure of itself from losing the state
    for good (Gordon et al. 1993, "Novel approach to nonlinear/non-Gaussian Bayesian state estimation": roughening).
    A subclass says how an episode begins, what is seen, and what is done.
    """

    PARTICLES = 512
    KERNEL = 0.2  # standard deviation of the kernel, in those of the particles
    ROUGHNESS: np.ndarray  # standard deviation of the noise besides, (d,)

    def __init__(self, sigma: float):
        self.sigma = sigma
        self.begin = jax.jit(self.first_states)
        self.update = jax.jit(self.see_and_act)

    def reset(self, batch: int) -> None:
        self.belief: Any = None

    def act(self, obs: np.ndarray) -> np.ndarray:
        if self.belief is None:
            key, key_now = jax.random.split(jax.random.key(0))
            self.belief = Particles(states=self.begin(key_now, obs), key=key)
        self.belief, action = self.update(self.belief, obs, *self.context())
        return np.asarray(action)

    def context(self) -> tuple[Any, ...]:
        """What `decide` needs besides the belief."""
        return ()

    def see_and_act(self, belief: Particles, obs: jax.Array, *context: Any) -> tuple[Particles, jax.Array]:
        """The belief before the next observation, after this one (B, O), and the action."""
        key, key_resample, key_spread = jax.random.split(belief.key, 3)
        weight = jax.nn.softmax(self.log_likelihood(belief.states, obs), axis=1)
        states = jax.vmap(resampled)(jax.random.split(key_resample, len(obs)), belief.states, weight)
        keys = jax.random.split(key_spread, len(obs))
        states = jax.vmap(functools.partial(spread, kernel=self.KERNEL, roughness=self.ROUGHNESS))(keys, states)
        action, states = self.decide(states, *context)
        return Particles(states=states, key=key), action

    def log_clipped_normal(self, exact: jax.Array, seen: jax.Array, bound: float) -> jax.Array:
        """Log-likelihood of a number that is seen with noise and clipped to +-bound; exact (B, n), seen (B,)."""
        seen = seen[:, None]
        inside = -0.5 * ((seen - exact) / self.sigma) ** 2
        above = jax.scipy.stats.norm.logcdf((exact - bound) / self.sigma)
        below = jax.scipy.stats.norm.logcdf((-bound - exact) / self.sigma)
        return jnp.where(seen >= bound, above, jnp.where(seen <= -bound, below, inside))


def resampled(key: jax.Array, states: jax.Array, weight: jax.Array) -> jax.Array:
    """Systematic resampling: as many states (n, d), each about n weight times."""
    n = len(weight)
    places = (jnp.arange(n) + jax.random.uniform(key)) / n
    chosen = jnp.searchsorted(jnp.cumsum(weight), places)
    return states[jnp.minimum(chosen, n - 1)]


def spread(key: jax.Array, states: jax.Array, kernel: float, roughness: np.ndarray) -> jax.Array:
    """States (n, d) drawn towards their mean and then disturbed: other states of the same mean and covariance, and
    `roughness` (d,) on top."""
    mean = states.mean(0)
    away = states - mean
    covariance = kernel**2 * away.T @ away / len(states) + jnp.diag(roughness**2)
    noise = jax.random.normal(key, states.shape) @ jnp.linalg.cholesky(covariance).T
    return mean + jnp.sqrt(1 - kernel**2) * away + noise


class GuessCartPole(ParticleFilter):
    """NoisyPositionOnlyCartPole: particles that know that the pole has not fallen, and a push for their mean."""

    ROUGHNESS = np.array([0.001, 0.005, 0.001, 0.005])
    LEAN = np.array([0.2, 0.5, 10.0, 1.0])  # about where the pole will be in 0.1 s: an angle must not grow

    def first_states(self, key: jax.Array, obs: jax.Array) -> jax.Array:
        shape = (len(obs), self.PARTICLES, 4)
        return jax.random.uniform(key, shape, minval=-cartpole.RESET_RANGE, maxval=cartpole.RESET_RANGE)

    def log_likelihood(self, states: jax.Array, obs: jax.Array) -> jax.Array:
        x = states[..., 0]
        theta = states[..., 2]
        fallen = (jnp.abs(x) > cartpole.X_LIMIT) | (jnp.abs(theta) > cartpole.THETA_LIMIT)
        x_bound, theta_bound = cartpole.OBSERVATION_BOUND
        seen = self.log_clipped_normal(x, obs[:, 0], x_bound) + self.log_clipped_normal(theta, obs[:, 1], theta_bound)
        return seen - 1e6 * fallen

    def decide(self, states: jax.Array) -> tuple[jax.Array, jax.Array]:
        action = (states.mean(1) @ self.LEAN > 0).astype(int)
        steps = jax.vmap(jax.vmap(cartpole.euler_step, (0, None)))
        return action, steps(states, action)


# ---------------------------------------------------------------- pendulum

ANGLES = 256
SPEEDS = 161
SPEED_STEP = 2 * pendulum.MAX_SPEED / (SPEEDS - 1)


def interpolated(values: jax.Array, theta: jax.Array, speed: jax.Array) -> jax.Array:
    """Between the points of a grid (ANGLES, SPEEDS), bilinear; theta and speed of one shape."""
    row = (theta / (2 * jnp.pi) * ANGLES) % ANGLES
    column = jnp.clip((speed + pendulum.MAX_SPEED) / SPEED_STEP, 0, SPEEDS - 1)
    top = jnp.minimum(row.astype(jnp.int32), ANGLES - 1)
    left = jnp.minimum(column.astype(jnp.int32), SPEEDS - 2)
    down = row - top
    right = column - left
    flat = values.reshape(-1)
    corner = top * SPEEDS + left
    below = (top + 1) % ANGLES * SPEEDS + left
    upper = (1 - right) * flat[corner] + right * flat[corner + 1]
    lower = (1 - right) * flat[below] + right * flat[below + 1]
    return (1 - down) * upper + down * lower


def cost_to_go(values: jax.Array, theta: jax.Array, speed: jax.Array, num_torques: int) -> jax.Array:
    """Cost of each torque now and of `values` afterwards, (..., num_torques); theta and speed (...)."""
    torque = jnp.linspace(-pendulum.MAX_TORQUE, pendulum.MAX_TORQUE, num_torques)
    now = jnp.stack([theta, speed])[..., None]
    return pendulum.cost(now, torque) + interpolated(values, *pendulum_step(now, torque))


def pendulum_step(physics: jax.Array, torque: jax.Array) -> jax.Array:
    """pendulum.euler_step, for every torque: physics (2, ..., 1), torque (U,), result (2, ..., U)."""
    theta, speed = jnp.broadcast_arrays(*physics, torque)[:2]
    return pendulum.euler_step((theta, speed), torque)


@functools.cache
def pendulum_costs(length: int = 200, num_torques: int = 33) -> jax.Array:
    """Least cost of the last 0 to `length` steps, by dynamic programming, float32 (length + 1, ANGLES, SPEEDS)."""
    theta = jnp.arange(ANGLES) * (2 * jnp.pi / ANGLES)
    speed = -pendulum.MAX_SPEED + SPEED_STEP * jnp.arange(SPEEDS)
    theta, speed = jnp.meshgrid(theta, speed, indexing="ij")

    def one_more_step(values, _):
        values = cost_to_go(values, theta, speed, num_torques).min(-1)
        return values, values

    nothing = jnp.zeros((ANGLES, SPEEDS))
    _, values = jax.jit(lambda: jax.lax.scan(one_more_step, nothing, length=length))()
    return jnp.concatenate([nothing[None], values])


class PlanPendulum:
    """PositionOnlyPendulum: the speed is the difference of two angles, then the torque with the least cost to go."""

    TORQUES = 65

    def __init__(self, length: int):
        self.length = length
        self.costs = jax.jit(functools.partial(cost_to_go, num_torques=self.TORQUES))

    def reset(self, batch: int) -> None:
        self.theta: Any = None
        self.left = self.length

    def act(self, obs: np.ndarray) -> np.ndarray:
        theta = np.arctan2(obs[:, 1], obs[:, 0])
        if self.theta is None:
            speed = np.zeros_like(theta)
        else:
            speed = pendulum.wrap_angle(theta - self.theta) / pendulum.TIME_STEP
        self.theta = theta
        self.left = max(self.left - 1, 0)
        costs = self.costs(pendulum_costs()[self.left], theta, speed)
        torque = np.linspace(-pendulum.MAX_TORQUE, pendulum.MAX_TORQUE, self.TORQUES)
        return torque[np.asarray(costs).argmin(1)].astype(np.float32)[:, None]


class GuessPendulum(ParticleFilter):
    """NoisyPositionOnlyPendulum: a particle filter, and the torque with the least cost to go, averaged over it."""

    ROUGHNESS = np.array([0.005, 0.02])
    THINNING = 8  # of so many particles one is asked for the best torque
    TORQUES = 17

    def __init__(self, sigma: float, length: int):
        super().__init__(sigma)
        self.length = length

    def reset(self, batch: int) -> None:
        super().reset(batch)
        self.left = self.length

    def context(self) -> tuple[Any, ...]:
        self.left = max(self.left - 1, 0)
        return (pendulum_costs()[self.left],)

    def first_states(self, key: jax.Array, obs: jax.Array) -> jax.Array:
        """Any angle, counted from the one that seems to be seen, since its mean means nothing across pi."""
        key_theta, key_speed = jax.random.split(key)
        shape = (len(obs), self.PARTICLES)
        around = jax.random.uniform(key_theta, shape, minval=-jnp.pi, maxval=jnp.pi)
        theta = jnp.arctan2(obs[:, 1], obs[:, 0])[:, None] + around
        speed = jax.random.uniform(key_speed, shape, minval=-1, maxval=1)
        return jnp.stack([theta, speed], axis=-1)

    def log_likelihood(self, states: jax.Array, obs: jax.Array) -> jax.Array:
        theta = states[..., 0]
        cosine = self.log_clipped_normal(jnp.cos(theta), obs[:, 0], 1.0)
        return cosine + self.log_clipped_normal(jnp.sin(theta), obs[:, 1], 1.0)

    def decide(self, states: jax.Array, costs_later: jax.Array) -> tuple[jax.Array, jax.Array]:
        some = states[:, :: self.THINNING]
        costs = cost_to_go(costs_later, some[..., 0], some[..., 1], self.TORQUES).mean(1)
        torque = jnp.linspace(-pendulum.MAX_TORQUE, pendulum.MAX_TORQUE, self.TORQUES)[costs.argmin(1)]
        after = pendulum.euler_step((states[..., 0], states[..., 1]), torque[:, None])
        return torque[:, None], jnp.moveaxis(after, 0, -1)


# ---------------------------------------------------------------- boards


class HuntShips:
    """Battleship: the square that most of the possible fleets would have hit, see `ship_scores`."""

    def __init__(self, size: int, ship_sizes: tuple[int, ...] = (2, 3, 3, 4)):
        self.size = size
        self.ship_sizes = ship_sizes
        self.needed_hits = sum(ship_sizes)
        self.known: dict[bytes, int] = {}  # what to do, by what is known

    def reset(self, batch: int) -> None:
        self.board = np.zeros((batch, self.size**2), np.int8)  # 1 for a hit, -1 for a miss
        self.last: Any = None

    def act(self, obs: np.ndarray) -> np.ndarray:
        everyone = np.arange(len(obs))
        if self.last is not None:
            new = self.board[everyone, self.last] == 0
            answer = np.where(obs[:, 1] == 1, 1, -1)
            self.board[everyone, self.last] = np.where(new, answer, self.board[everyone, self.last])
        self.last = np.array([self.best_square(board) for board in self.board])
        return self.last

    def best_square(self, board: np.ndarray) -> int:
        key = board.tobytes()
        if key not in self.known:
            over = (board == 1).sum() >= self.needed_hits
            scores = np.zeros(self.size**2) if over else ship_scores(board, self.size, self.ship_sizes)
            self.known[key] = int(np.where(board == 0, scores, -1).argmax())
        return self.known[key]


@functools.cache
def ship_places(size: int, ship: int) -> np.ndarray:
    """The squares of every place of a ship on an empty board, (places, ship)."""
    square = np.arange(size**2).reshape(size, size)
    across = np.stack([square[:, i : size - ship + 1 + i] for i in range(ship)], axis=-1)
    down = np.stack([square[i : size - ship + 1 + i] for i in range(ship)], axis=-1)
    return np.concatenate([across.reshape(-1, ship), down.reshape(-1, ship)])


def ship_scores(board: np.ndarray, size: int, ship_sizes: tuple[int, ...]) -> np.ndarray:
    """In how many of the possible fleets of four a ship lies on each square, float64 (squares,).

    Possible is a fleet that covers every hit once and no miss. Whether ships overlap elsewhere is left out, so a place
    of a ship matters only by which hits it covers (a mask) and the count is exact up to that: for every mask, as many
    fleets as the places of this ship with it times the ways in which the other ships cover all the other hits.
    """
    hits = np.flatnonzero(board == 1)
    num_masks = 2 ** len(hits)
    bit = np.zeros(size**2, int)
    bit[hits] = 2 ** np.arange(len(hits))
    places = [ship_places(size, ship)[(board[ship_places(size, ship)] >= 0).all(1)] for ship in ship_sizes]
    masks = [bit[squares].sum(1) for squares in places]
    ways = [np.bincount(mask, minlength=num_masks) for mask in masks]

    scores = np.zeros(size**2)
    everything = num_masks - 1
    for i, squares in enumerate(places):
        others = [ways[j] for j in range(len(ways)) if j != i]
        two = join_masks(others[0], others[1])
        (single,) = np.nonzero(others[2])
        rest = everything ^ masks[i][:, None]  # the hits that the others have to cover, (places, 1)
        fits = (single & ~rest) == 0
        completions = np.where(fits, two[rest & ~single] * others[2][single], 0).sum(1)  # (places,)
        scores += np.bincount(squares.ravel(), np.repeat(completions, squares.shape[1]), size**2)
    return scores


def join_masks(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Ways in which two ships cover each set of hits, from the ways of each; all (masks,)."""
    a = np.flatnonzero(first)[:, None]
    b = np.flatnonzero(second)
    together = np.where((a & b) == 0, first[a] * second[b], 0)
    return np.bincount((a | b).ravel(), together.ravel().astype(float), len(first))


class SweepMines:
    """MineSweeper: squares that must be clear, else the one with the least risk (`mine_odds`).

    Once few boards are possible it plays them out in thought (`best_click`), which also finds when it is better to
    click a square again than to risk a mine.
    """

    def __init__(self, size: int, mines: int, few: int):
        self.size = size
        self.mines = mines
        self.few = few  # boards
        self.known: dict[bytes, np.ndarray] = {}  # what to click, by what is known

    def reset(self, batch: int) -> None:
        self.number = np.full((batch, self.size**2), UNSEEN, np.int8)
        self.click = np.zeros((batch, self.size**2), bool)  # what to click next, in any order
        self.last: Any = None

    def act(self, obs: np.ndarray) -> np.ndarray:
        everyone = np.arange(len(obs))
        if self.last is not None:
            self.number[everyone, self.last] = obs.argmax(1)
            self.click[everyone, self.last] = False
        for i in np.flatnonzero(~self.click.any(1)):
            self.click[i] = self.next_clicks(self.number[i])
        self.last = self.click.argmax(1)
        return self.last

    def next_clicks(self, number: np.ndarray) -> np.ndarray:
        """All squares that must be clear, or if there are none the best one, bool (squares,)."""
        key = number.tobytes()
        if key not in self.known:
            self.known[key] = self.think(number)
        return self.known[key]

    def think(self, number: np.ndarray) -> np.ndarray:
        unseen = number == UNSEEN
        odds, boards = mine_odds(number, self.size, self.mines, self.few)
        safe = unseen & (odds == 0)
        if safe.any():
            return safe
        if boards:
            left = int(unseen.sum()) - self.mines
            _, square = best_click(boards, as_bits(~unseen), left, self.size, self.mines)
        else:
            unseen_neighbours = np.array([(as_bits(unseen) & block).bit_count() for block in blocks(self.size)])
            square = int(np.where(unseen, odds + 1e-6 * unseen_neighbours, 2).argmin())
        return np.arange(len(number)) == square


@functools.cache
def blocks(size: int) -> list[int]:
    """Each square together with its neighbours, as bits of an int."""
    words = minesweeper.blocks(size)
    return [sum(int(word) << (32 * i) for i, word in enumerate(block)) for block in words]


def as_bits(squares: np.ndarray) -> int:
    """A set of squares, bool (squares,), as bits of an int."""
    return sum(1 << int(i) for i in np.flatnonzero(squares))


@functools.cache
def subsets(squares: int, count: int) -> np.ndarray:
    """All sets of so many of these squares, uint64 (sets,)."""
    bits = [1 << i for i in range(squares.bit_length()) if squares >> i & 1]
    return np.array([sum(chosen) for chosen in itertools.combinations(bits, count)], np.uint64)


class Constraint(NamedTuple):
    """`mines` of these squares, bits of an int, are mines."""

    squares: int
    mines: int


def mine_odds(number: np.ndarray, size: int, mines: int, few: int) -> tuple[np.ndarray, tuple[int, ...]]:
    """The probability of a mine on each square (squares,), and all possible boards, as bits, if they are few.

    number: of mines around each clicked square, or UNSEEN
    """
    constraints = []
    seen = as_bits(number != UNSEEN)
    everywhere = (1 << size**2) - 1
    for square in np.flatnonzero(number != UNSEEN):
        constraints.append(Constraint(blocks(size)[square] & ~seen, int(number[square])))
    groups = independent(constraints)
    solutions = [mine_sets(group, mines) for group in groups]
    constrained = functools.reduce(int.__or__, (constraint.squares for constraint in constraints), 0)
    rest = everywhere & ~seen & ~constrained

    # polynomials: ways of a group, of all, or of all others, by how many mines they take
    counts = [np.bitwise_count(sets) for sets in solutions]
    ways = [np.bincount(count, minlength=mines + 1).astype(float) for count in counts]
    free = rest.bit_count()
    ways_of_rest = np.array([math.comb(free, count) for count in range(mines + 1)], float)
    total = product([*ways, ways_of_rest], mines)[mines]
    if total == 0:
        return np.ones(size**2), ()  # the episode is over

    odds = np.zeros(size**2)
    for i, (sets, count) in enumerate(zip(solutions, counts, strict=True)):
        ways_of_others = product([*ways[:i], *ways[i + 1 :], ways_of_rest], mines)
        weight = ways_of_others[mines - count] / total  # of each set
        bits = sets[:, None] >> np.arange(size**2, dtype=np.uint64) & np.uint64(1)
        odds += weight @ bits.astype(float)
    if free:
        taken = product(ways, mines)
        mean_free_mines = np.sum(taken * ways_of_rest[::-1] * np.arange(mines, -1, -1)) / total
        odds += [mean_free_mines / free if rest >> i & 1 else 0 for i in range(size**2)]
    boards = all_boards(solutions, rest, mines) if total <= few else ()
    return odds, boards


def product(polynomials: list[np.ndarray], degree: int) -> np.ndarray:
    """Their product up to this degree, (degree + 1,)."""
    result = np.ones(1)
    for polynomial in polynomials:
        result = np.convolve(result, polynomial)[: degree + 1]
    return np.pad(result, (0, degree + 1 - len(result)))


def independent(constraints: list[Constraint]) -> list[list[Constraint]]:
    """Groups of constraints that have no square in common with another group."""
    groups: list[tuple[int, list[Constraint]]] = []
    for constraint in constraints:
        squares = constraint.squares
        members = [constraint]
        apart = []
        for other_squares, others in groups:
            if other_squares & squares:
                squares |= other_squares
                members = others + members
            else:
                apart.append((other_squares, others))
        groups = [*apart, (squares, members)]
    return [members for _, members in groups]


def mine_sets(constraints: list[Constraint], mines: int) -> np.ndarray:
    """Every set of at most so many mines on these constraints' squares that fulfils them, uint64 (sets,)."""
    sets = np.zeros(1, np.uint64)
    decided = 0
    pending = list(constraints)
    while pending:
        constraint = min(pending, key=lambda pending: (pending.squares & ~decided).bit_count())
        pending.remove(constraint)
        new = constraint.squares & ~decided
        missing = constraint.mines - np.bitwise_count(sets & np.uint64(constraint.squares)).astype(int)
        extended = []
        for count in range(min(new.bit_count(), mines) + 1):
            extended.append((sets[missing == count, None] | subsets(new, count)).ravel())
        sets = np.concatenate(extended)
        sets = sets[np.bitwise_count(sets) <= mines]
        decided |= new
    return sets


def all_boards(solutions: list[np.ndarray], rest: int, mines: int) -> tuple[int, ...]:
    """Every board with a set of each group and the other mines on the rest of the squares, sorted."""
    sets = np.zeros(1, np.uint64)
    for solution in solutions:
        sets = (sets[:, None] | solution).ravel()
        sets = sets[np.bitwise_count(sets) <= mines]
    boards: list[int] = []
    for found in sets:
        missing = mines - int(np.bitwise_count(found))
        if missing <= rest.bit_count():
            boards += (found | subsets(rest, missing)).tolist()
    return tuple(sorted(boards))


@functools.cache
def best_click(boards: tuple[int, ...], seen: int, left: int, size: int, mines: int) -> tuple[float, int]:
    """Return from here on and the square to click, if these boards are equally likely.

    seen: clicked squares, as bits; left: clear squares that were not clicked, and as many clicks are left
    """
    if left == 0:
        return 0.0, 0
    clear = size**2 - mines
    some_mine = functools.reduce(int.__or__, boards)
    unseen = [i for i in range(size**2) if not seen >> i & 1]
    safe = [i for i in unseen if not some_mine >> i & 1]
    # to give up is to click what is seen until the clicks are used up
    best = (-0.5 * left / (clear - 2), seen.bit_length() - 1)
    for square in safe[:1] or unseen:
        outcomes: dict[int, list[int]] = {}
        for board in boards:
            if not board >> square & 1:
                outcomes.setdefault((board & blocks(size)[square]).bit_count(), []).append(board)
        survivors = sum(map(len, outcomes.values()))
        value = (len(boards) - survivors) * (-0.5 - 1 / clear)
        for same_number in outcomes.values():
            later, _ = best_click(tuple(same_number), seen | 1 << square, left - 1, size, mines)
            value += len(same_number) * (1 / clear + later)
        best = max(best, (value / len(boards), square))
    return best


# ---------------------------------------------------------------- labyrinths

MOVES = {0: (0, -1), 1: (0, 1), 2: (-1, 0), 3: (1, 0)}  # left, right, up, down in (row, column)
Cell = tuple[int, int]
ESCAPE_PULL = 2  # steps on the way that one step nearer to the wall of the exit is worth


class Explorer:
    """A map of one labyrinth, drawn by dead reckoning: cells, in steps of two squares, from the one beside the start.

    `targets` are passages from a visited cell to one that was not visited, the only ways to anything new, since these
    mazes have no circles.
    """

    def __init__(self, size: int, escape: bool):
        self.size = size  # cells along a side
        self.escape = escape
        self.cell: Any = None
        self.over = False
        self.plan: list[int] = []
        self.passages: dict[Cell, list[tuple[int, Cell]]] = {}  # of visited cells: action and neighbour

    def act(self, view: np.ndarray) -> int:
        """The next action; view (3, 3)."""
        if not self.plan:
            if self.over:
                return 0
            self.plan = self.enter(view) if self.cell is None else self.think(view)
        return self.plan.pop(0)

    def enter(self, view: np.ndarray) -> list[int]:
        """From the start into the first cell.

        On the north and west wall the view is not centred on the agent: the start's own place in it shows where the
        agent stands.
        """
        row, column = np.argwhere(view == labyrinth.START)[0]
        for action, (down, right) in MOVES.items():
            y, x = row + down, column + right
            if 0 <= y < 3 and 0 <= x < 3 and view[y, x] == labyrinth.FREE:
                self.forward = action  # the exit is in the opposite wall
        self.cell = (0, 0)
        return [self.forward]

    def depth(self, cell: Cell) -> int:
        """Cells between this one and the wall where the start is."""
        down, right = MOVES[self.forward]
        return cell[0] * down + cell[1] * right

    def side(self, cell: Cell) -> int:
        """Cells to the right or below of the first one, along the wall where the start is."""
        down, _ = MOVES[self.forward]
        return cell[1] if down else cell[0]

    def think(self, view: np.ndarray) -> list[int]:
        """Actions until the next cell that was not visited, from the middle of a cell."""
        here = self.cell
        if here not in self.passages:
            self.passages[here] = []
            for action, (down, right) in MOVES.items():
                square = view[1 + down, 1 + right]
                if square == labyrinth.GOAL:
                    self.over = True
                    return [action]
                if square == labyrinth.FREE:
                    self.passages[here].append((action, (here[0] + down, here[1] + right)))
        targets = self.ways_to_targets()
        if not targets:
            self.over = True
            return [0]
        way, self.cell = self.choose(targets)
        return [action for action in way for _ in range(2)]

    def ways_to_targets(self) -> list[tuple[list[int], Cell]]:
        """Actions to the neighbours of visited cells that are not visited: to escape all, to explore the nearest."""
        found: list[tuple[list[int], Cell]] = []
        ways: dict[Cell, list[int]] = {self.cell: []}
        queue = [self.cell]
        for cell in queue:
            if found and not self.escape and len(ways[cell]) == len(found[0][0]):
                break
            for action, neighbour in self.passages[cell]:
                if neighbour in ways:
                    continue
                ways[neighbour] = [*ways[cell], action]
                if neighbour in self.passages:
                    queue.append(neighbour)
                else:
                    found.append((ways[neighbour], neighbour))
        return found

    def choose(self, targets: list[tuple[list[int], Cell]]) -> tuple[list[int], Cell]:
        """To escape, a near target that is near to the exit's wall too; to explore, the smallest region.

        What does not reach the exit's wall need not be searched for the exit.
        """
        if len(targets) == 1:
            return targets[0]
        regions = self.regions()
        if not self.escape:
            return min(targets, key=lambda target: (len(regions[target[1]]), self.room(target[1])))
        last = self.size - 1

        def score(target):
            way, cell = target
            useless = all(self.depth(other) < last for other in regions[cell])
            return useless, len(way) + ESCAPE_PULL * (last - self.depth(cell))

        return min(targets, key=score)

    def room(self, cell: Cell) -> int:
        """Neighbours that may be beyond it."""
        return sum(self.possible((cell[0] + down, cell[1] + right)) for down, right in MOVES.values())

    def possible(self, cell: Cell) -> bool:
        """Whether it is not visited and may be in the maze, of which `size` cells along each side are known."""
        if cell in self.passages or not 0 <= self.depth(cell) < self.size:
            return False
        return self.highest - self.size < self.side(cell) < self.lowest + self.size

    def regions(self) -> dict[Cell, set[Cell]]:
        """Of every cell that may be in the maze and was not visited: those connected to it without a visited one."""
        sides = [self.side(cell) for cell in self.passages]
        self.lowest = min(sides)
        self.highest = max(sides)
        regions: dict[Cell, set[Cell]] = {}
        for neighbours in self.passages.values():
            for _, cell in neighbours:
                if cell in self.passages or cell in regions:
                    continue
                region = {cell}
                queue = [cell]
                for row, column in queue:
                    for down, right in MOVES.values():
                        next_cell = (row + down, column + right)
                        if next_cell not in region and self.possible(next_cell):
                            region.add(next_cell)
                            queue.append(next_cell)
                regions |= dict.fromkeys(region, region)
        return regions


class ExploreMaze:
    """Labyrinths: an `Explorer` for each."""

    def __init__(self, size: int, escape: bool):
        self.size = size
        self.escape = escape

    def reset(self, batch: int) -> None:
        self.explorers = [Explorer(self.size, self.escape) for _ in range(batch)]

    def act(self, obs: np.ndarray) -> np.ndarray:
        views = obs[:, :45].reshape(-1, 3, 3, 5).argmax(3)
        return np.array([explorer.act(view) for explorer, view in zip(self.explorers, views, strict=True)])


# ---------------------------------------------------------------- who plays what


class Reference(NamedTuple):
    """Policies for Easy, Medium and Hard; what they do in a word or two; whether none can be better, of each."""

    policies: tuple[Callable[[], Any], ...]
    words: str
    exact: tuple[bool, bool, bool] = (False, False, False)


EXACT = (True, True, True)


def levels(policy: Callable, *arguments: tuple) -> tuple[Callable[[], Any], ...]:
    """The policy with the arguments of Easy, Medium and Hard."""
    return tuple(functools.partial(policy, *of_level) for of_level in arguments)


REFERENCES: dict[str, Reference] = {
    "Autoencode": Reference((Recite,) * 3, "recall", EXACT),
    "Battleship": Reference(levels(HuntShips, (8,), (10,), (12,)), "likeliest square"),
    "Concentration": Reference(levels(FlipPairs, (52, 2), (104, 2), (52, 13)), "best pairing", EXACT),
    "CountRecall": Reference((Count,) * 3, "recall", EXACT),
    "HigherLower": Reference(levels(CountCards, (1,), (2,), (3,)), "card counting", EXACT),
    "LabyrinthEscape": Reference(levels(ExploreMaze, (5, True), (7, True), (9, True)), "search with a map"),
    "LabyrinthExplore": Reference(levels(ExploreMaze, (5, False), (7, False), (9, False)), "search with a map"),
    "MineSweeper": Reference(
        levels(SweepMines, (4, 2, 120), (6, 6, 24), (8, 10, 24)), "exact odds", (True, False, False)
    ),
    "MultiarmedBandit": Reference(levels(IndexBandit, (10, 200), (20, 400), (30, 600)), "Gittins index"),
    "PositionOnlyCartPole": Reference((functools.partial(FilterCartPole, 1e-3),) * 3, "filter and regulator", EXACT),
    "NoisyPositionOnlyCartPole": Reference(levels(GuessCartPole, (0.1,), (0.2,), (0.3,)), "particles and regulator"),
    "VelocityOnlyCartPole": Reference((IntegrateCartPole,) * 3, "integration and regulator", EXACT),
    "PositionOnlyPendulum": Reference(levels(PlanPendulum, (200,), (150,), (100,)), "dynamic programming"),
    "NoisyPositionOnlyPendulum": Reference(
        levels(GuessPendulum, (0.1, 200), (0.2, 200), (0.3, 200)), "particles and dynamic programming"
    ),
    "RepeatFirst": Reference((RecallFirst,) * 3, "recall", EXACT),
    "RepeatPrevious": Reference(levels(RecallPrevious, (3,), (31,), (63,)), "recall", EXACT),
}


def reference_policy(name: str) -> Any:
    """The policy of an environment, a name of popgym_jax.registered_envs."""
    family, level = family_and_level(name)
    return REFERENCES[family].policies[level]()


def is_exact(name: str) -> bool:
    """Whether no policy can be better on average."""
    family, level = family_and_level(name)
    return REFERENCES[family].exact[level]
