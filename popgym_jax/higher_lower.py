"""HigherLower: guess whether the next card is higher or lower than the one in view."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gymnax.environments import spaces

from popgym_jax import cards, environment

HIGHER = 0


@struct.dataclass
class EnvState(environment.EnvState):
    """time: steps taken, int32 ()
    remaining: undealt cards of each rank, int32 (13,)
    rank: of the card in view, int32 ()
    """

    remaining: jax.Array
    rank: jax.Array


class HigherLower(cards.DeckEnvironment[EnvState]):
    """Guess how the next card compares (Morad et al. 2023, POPGym; popgym 1.0.7).

    N = 52 num_decks cards are dealt from a shuffled stack, one at the reset and one per step.
    Counting the cards that are gone improves the guess.

    Observation: rank of the card just dealt, ace 0 to king 12, one-hot, float32 (13,).
    Action: 0 for higher, 1 for lower, integer ().
    Reward: +1/N if the next card is as guessed, -1/N if it is the other way, 0 if the ranks are
        equal, float32 ().
    Return: in [-(N-1)/N, (N-1)/N]; random 0.
    Episode: N-1 steps: 51, 103, 155 for Easy, Medium, Hard with 1, 2, 3 decks.
    End: terminated with the step that deals the last card; never truncated.

    Reference quirks kept: the ace is low; the reward is scaled by N although there are N-1 guesses.
    """

    def __init__(self, num_decks: int = 1, name: str | None = None):
        self.num_cards = cards.num_cards(num_decks)
        super().__init__(num_decks, self.num_cards - 1, name)

    def deal(self, key: jax.Array, remaining: jax.Array) -> jax.Array:
        """Rank of the next card, int32 (): the only randomness of this environment."""
        return cards.deal(key, remaining)

    def reset_env(
        self, key: jax.Array, params: environment.EnvParams
    ) -> tuple[jax.Array, EnvState]:
        """Deal the first card: observation float32 (13,) and state."""
        full = cards.full_counts(self.num_decks, cards.NUM_RANKS)
        rank = self.deal(key, full)
        state = EnvState(
            time=jnp.zeros((), jnp.int32),
            remaining=cards.without(full, rank),
            rank=rank,
        )
        return cards.one_hot(rank, cards.NUM_RANKS), state

    def step_env(
        self, key: jax.Array, state: EnvState, action: jax.Array, params: environment.EnvParams
    ) -> tuple[jax.Array, EnvState, jax.Array, jax.Array, dict[Any, Any]]:
        """Deal and grade the guess: observation (13,), state, reward, terminated, {}."""
        rank = self.deal(key, state.remaining)
        scale = jnp.float32(1 / self.num_cards)
        correct = (rank > state.rank) == (action == HIGHER)
        grade = jnp.where(correct, scale, -scale)
        reward = jnp.where(rank == state.rank, 0.0, grade)
        state = EnvState(
            time=state.time + 1,
            remaining=cards.without(state.remaining, rank),
            rank=rank,
        )
        observation = cards.one_hot(rank, cards.NUM_RANKS)
        return observation, state, reward, self.is_terminated(state, params), {}

    def render(self, state: EnvState, params: environment.EnvParams) -> str:
        """The card in view, and how many of those left in the stack are higher or lower."""
        rank = int(state.rank)
        remaining = np.asarray(state.remaining)
        higher = remaining[rank + 1 :].sum()
        lower = remaining[:rank].sum()
        counts = f"{higher} higher, {remaining[rank]} alike, {lower} lower"
        return f"card in view: {cards.RANKS[rank]}\nleft in the stack: {counts}"

    def render_action(self, state: EnvState, action: Any, params: Any) -> str:
        return "higher" if action == HIGHER else "lower"

    def action_space(self, params: environment.EnvParams) -> spaces.Discrete:
        return spaces.Discrete(2)

    def observation_space(self, params: environment.EnvParams) -> spaces.Box:
        return spaces.Box(0.0, 1.0, (cards.NUM_RANKS,))
