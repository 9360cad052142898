"""CartPole as a task to be learnt in context: several trials under one random projection."""

import jax
import jax.numpy as jnp

from popgym_jax import cartpole, environment
from popgym_jax.random_projection import RandomProjection
from popgym_jax.trials import Trials, TrialsState

OBSERVATION_SIZE = 4  # of a projected observation, as in the paper's code
MAX_STEPS_IN_TRIAL = 200


class MetaStatelessCartPole(Trials):
    """Find out, over several trials, how to balance a pole seen and pushed through random maps.

    The randomly-projected CartPole of Lu et al. 2023, section 4.3: a meta-episode
    draws one RandomProjection of PositionOnlyCartPole ("Stateless" in the paper)
    and plays `num_trials` trials under it. An agent that remembers what it found
    out in the first ones does better in the later ones. It sees neither velocities
    nor which of the two actions pushes to the right.

    Observation: [M_o (x, theta) (O') | trial-end flag | previous reward], float32
        (O' + 2,), with O' = 4 as in the paper's code; the last two are those of the
        step just taken, 0 at the start of a meta-episode. The paper shows the previous
        action and a start flag too: PreviousActionAndStart adds them, with a start
        flag of 1 where a META-episode begins.
    Action: 0 or 1, integer (); by a fair coin in each meta-episode 1 pushes to the
        right or to the left.
    Reward: +1/200 on every step, float32 (), so that a perfect trial is worth 1.
    Return: between 0 and num_trials; random about 0.112 num_trials.
    Trial: ends when |x| > 2.4 or |theta| > 12 degrees, or after 200 steps. The state of
        the next one is drawn afresh.
    How one trial follows another, and how the last one ends: see Trials.

    num_trials: trials of a meta-episode
    max_trial_length: steps of a trial, whose inverse is the reward
    fresh: each trial begins in its own state; if not, in that of the first, as in
        the paper's code, which an agent could learn by heart

    Unlike the paper's code, actions are projected too, as the paper says.
    """

    reward_range = (0.0, 1.0)

    def __init__(
        self,
        num_trials: int = 16,
        max_trial_length: int = MAX_STEPS_IN_TRIAL,
        fresh: bool = True,
        observation_size: int = OBSERVATION_SIZE,
        project_actions: bool = True,
        name: str | None = None,
    ):
        if max_trial_length < 1:
            raise ValueError(f"max_trial_length must be at least 1, got {max_trial_length}")
        self.max_trial_length = max_trial_length
        projected = RandomProjection(self.make_task(), observation_size, project_actions)
        super().__init__(projected, num_trials, fresh=fresh)
        self.costly_reset = True  # it draws an orthogonal matrix
        self.obs_requires_prev_action = True
        self._name = name or type(self).__name__

    def make_task(self) -> environment.Environment:
        """What is played in a trial, without projection."""
        return cartpole.PositionOnlyCartPole(self.max_trial_length)

    def identifiable(self, state: TrialsState) -> jax.Array:
        """What an agent can find out of the projections: sign(M_a) M_o, float32 (O' x 2,).

        CartPole looks the same in a mirror, (x, theta, push) -> -(x, theta, push),
        and -M_o is as likely as M_o. So (M_o, swapped actions, s) and
        (-M_o, unswapped actions, -s) cannot be told apart: neither M_o nor whether
        the actions are swapped can be known, but their product can. For the same
        reason swapping the two actions makes the task no harder.

        Privileged: for a learner in training, never for the agent that acts.
        """
        swapped = state.play.M_a[0].astype(jnp.float32)  # 1 or 0
        sign = 2.0 * swapped - 1.0
        return sign * state.play.M_o.ravel()


class MetaNoisyStatelessCartPole(MetaStatelessCartPole):
    """MetaStatelessCartPole seen through Gaussian noise.

    As MetaStatelessCartPole, but its task is NoisyPositionOnlyCartPole: x and theta
    each get their own draw from N(0, noise_sigma^2) and are clipped before they are
    projected.

    noise_sigma: standard deviation of the noise, 0.1 by default as in the Easy task
    """

    def __init__(
        self,
        num_trials: int = 16,
        max_trial_length: int = MAX_STEPS_IN_TRIAL,
        fresh: bool = True,
        noise_sigma: float = 0.1,
        observation_size: int = OBSERVATION_SIZE,
        project_actions: bool = True,
        name: str | None = None,
    ):
        self.noise_sigma = noise_sigma
        trials = (num_trials, max_trial_length, fresh)
        super().__init__(*trials, observation_size, project_actions, name)

    def make_task(self) -> environment.Environment:
        return cartpole.NoisyPositionOnlyCartPole(self.noise_sigma, self.max_trial_length)
