"""RepeatFirst: cards go by, and the answer is always the suit of the very first one."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from gymnax.environments import spaces

from popgym_jax import cards, environment


@struct.dataclass
class EnvState(environment.EnvState):
    """time: steps taken, int32 ()
    remaining: undealt cards of each suit, int32 (4,)
    target: suit of the first card, int32 ()
    """

    remaining: jax.Array
    target: jax.Array


class RepeatFirst(cards.DeckEnvironment[EnvState]):
    """Name the suit of the first card at every step (Morad et al. 2023, POPGym; popgym 1.0.7).

    N = 52 num_decks cards are dealt from a shuffled stack, one at the reset and one per step.

    Observation: suit of the card just dealt, one-hot, float32 (4,).
    Action: a suit 0..3, integer (). The answer to the reset observation already counts.
    Reward: +1/(N-1) if the action is the suit of the first card, else -1/(N-1), float32 ().
    Return: in [-1, 1]; perfect 1, random -0.5.
    Episode: N-1 steps (51, 415, 831 for Easy, Medium, Hard with 1, 8, 16 decks).
    End: terminated with the step that deals the last card; never truncated.

    Reference quirks kept: nothing marks the first card, although its description promises a mark;
    the last card is shown but there is no answer to it.
    """

    def __init__(self, num_decks: int = 1, name: str | None = None):
        super().__init__(num_decks, cards.num_cards(num_decks) - 1, name)

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
            target=suit,
        )
        return cards.one_hot(suit, cards.NUM_SUITS), state

    def step_env(
        self, key: jax.Array, state: EnvState, action: jax.Array, params: environment.EnvParams
    ) -> tuple[jax.Array, EnvState, jax.Array, jax.Array, dict[Any, Any]]:
        """Grade the action, then deal: observation (4,), state, reward, terminated, {}."""
        scale = jnp.float32(1 / self.episode_length)
        reward = jnp.where(action == state.target, scale, -scale)
        suit = self.deal(key, state.remaining)
        state = EnvState(
            time=state.time + 1,
            remaining=cards.without(state.remaining, suit),
            target=state.target,
        )
        observation = cards.one_hot(suit, cards.NUM_SUITS)
        return observation, state, reward, self.is_terminated(state, params), {}

    def render(self, state: EnvState, params: environment.EnvParams) -> str:
        """The suit asked for; the card in view is not part of the state."""
        card = f"card {int(state.time) + 1} of {self.episode_length + 1} is in view"
        return f"{card}\nasked: suit of the first card: {cards.SUITS[int(state.target)]}"

    def render_action(self, state: EnvState, action: Any, params: Any) -> str:
        return cards.SUITS[int(action)]

    def action_space(self, params: environment.EnvParams) -> spaces.Discrete:
        return spaces.Discrete(cards.NUM_SUITS)

    def observation_space(self, params: environment.EnvParams) -> spaces.Box:
        return spaces.Box(0.0, 1.0, (cards.NUM_SUITS,))
