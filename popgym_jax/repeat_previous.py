"""RepeatPrevious: cards go by, and the answer is the suit of the card k - 1 cards ago."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gymnax.environments import spaces

from popgym_jax import cards, environment


@struct.dataclass
class EnvState(environment.EnvState):
    """time: steps taken, int32 ()
    remaining: undealt cards of each suit, int32 (4,)
    history: suits of the last k cards, oldest first, zeros before the first card, int8 (k,)
    """

    remaining: jax.Array
    history: jax.Array


class RepeatPrevious(cards.DeckEnvironment[EnvState]):
    """Name the suit seen k - 1 cards before this one (Morad et al. 2023, POPGym; popgym 1.0.7).

    N = 52 num_decks cards are dealt from a shuffled stack, one at the reset and one per step.

    Observation: suit of the card just dealt, one-hot, float32 (4,).
    Action: a suit 0..3, integer ().
    Reward: 0 until k cards have been dealt; from then on +1/(N-k) if the action is the suit of
        the k-th last card (the card just dealt is the first last), else -1/(N-k), float32 ().
    Return: in [-1, 1]; perfect 1, random -0.5.
    Episode: N-1 steps, N-k of them graded: 51 (48), 103 (72), 155 (92) for Easy, Medium, Hard
        with num_decks, k = 1, 4 and 2, 32 and 3, 64.
    End: terminated with the step that deals the last card; never truncated.

    Reference quirks kept: with k = 1 the answer is the card in view, so memory has to reach back
    k - 1 observations and not k; the last card is shown but there is no answer to it.
    """

    def __init__(self, num_decks: int = 1, k: int = 4, name: str | None = None):
        num_cards = num_decks * cards.DECK_SIZE
        if not 1 <= k < num_cards:
            raise ValueError(f"k must be 1 to {num_cards - 1} with {num_cards} cards, got {k}")
        self.k = k
        self.num_graded = num_cards - k
        super().__init__(num_decks, num_cards - 1, name)

    def deal(self, key: jax.Array, remaining: jax.Array) -> jax.Array:
        """Suit of the next card, int32 (): the only randomness of this environment."""
        return cards.deal(key, remaining)

    def reset_env(
        self, key: jax.Array, params: environment.EnvParams
    ) -> tuple[jax.Array, EnvState]:
        """Deal the first card: observation float32 (4,) and state."""
        full = cards.full_counts(self.num_decks, cards.NUM_SUITS)
        suit = self.deal(key, full)
        state = EnvState(
            time=jnp.zeros((), jnp.int32),
            remaining=cards.without(full, suit),
            history=remember(jnp.zeros(self.k, jnp.int8), suit),
        )
        return cards.one_hot(suit, cards.NUM_SUITS), state

    def step_env(
        self, key: jax.Array, state: EnvState, action: jax.Array, params: environment.EnvParams
    ) -> tuple[jax.Array, EnvState, jax.Array, jax.Array, dict[Any, Any]]:
        """Grade the action, then deal: observation (4,), state, reward, terminated, {}."""
        scale = jnp.float32(1 / self.num_graded)
        graded = state.time + 1 >= self.k  # time + 1 cards have been dealt
        correct = action == state.history[0]
        grade = jnp.where(correct, scale, -scale)
        reward = jnp.where(graded, grade, 0.0)
        suit = self.deal(key, state.remaining)
        state = EnvState(
            time=state.time + 1,
            remaining=cards.without(state.remaining, suit),
            history=remember(state.history, suit),
        )
        observation = cards.one_hot(suit, cards.NUM_SUITS)
        return observation, state, reward, self.is_terminated(state, params), {}

    def render(self, state: EnvState, params: environment.EnvParams) -> str:
        """The card in view, the suit asked for, and the cards that will be asked for."""
        dealt = int(state.time) + 1
        history = np.asarray(state.history)
        shown = f"card {dealt} of {self.episode_length + 1} is of {cards.SUITS[history[-1]]}"
        asked = f"asked: suit of card {dealt + 1 - self.k}: {cards.SUITS[history[0]]}"
        if dealt < self.k:
            asked = f"asked: nothing before card {self.k}"
        kept = history[max(0, self.k - dealt) :]
        return f"{shown}\n{asked}\nto be remembered, oldest first: {cards.letters(kept)}"

    def render_action(self, state: EnvState, action: Any, params: Any) -> str:
        return cards.SUITS[int(action)]

    def action_space(self, params: environment.EnvParams) -> spaces.Discrete:
        return spaces.Discrete(cards.NUM_SUITS)

    def observation_space(self, params: environment.EnvParams) -> spaces.Box:
        return spaces.Box(0.0, 1.0, (cards.NUM_SUITS,))


def remember(history: jax.Array, suit: jax.Array) -> jax.Array:
    """Shift register: forget the oldest suit and append this one, int8 (k,).

    Moving k bytes beats a ring buffer here: under vmap a ring buffer needs a gather and a scatter.
    """
    return jnp.concatenate([history[1:], suit[None].astype(jnp.int8)])
