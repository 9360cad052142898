"""Autoencode: a stack of cards goes by, then the answers are its suits in reverse order."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gymnax.environments import spaces

from popgym_jax import cards, environment

PLAY = 0
WATCH = 1
SUITS_PER_WORD = 16  # two bits each


@struct.dataclass
class EnvState(environment.EnvState):
    """time: steps taken, int32 ()
    remaining: undealt cards of each suit, int32 (4,)
    seen: suits in the order in which they were dealt, 16 to a word, first card in
        the lowest two bits of the first word, uint32 (ceil(N / 16),)
    """

    remaining: jax.Array
    seen: jax.Array


class Autoencode(cards.DeckEnvironment[EnvState]):
    """Watch a stack of cards, then recite it backwards (Morad et al. 2023, POPGym; popgym 1.0.7).

    N = 52 num_decks cards are dealt from a shuffled stack: in mode WATCH (1), one
    at the reset and one per step. The step that deals the last card switches to
    mode PLAY (0), in which N answers are due: the suit of the last card first, that
    of the first card last.

    Observation: mode one-hot, suit one-hot, float32 (6,): (WATCH, suit of the card
        just dealt), for the last card (PLAY, its suit), after every answer (PLAY,
        suit 0).
    Action: a suit 0..3, integer (); of no effect in WATCH.
    Reward: 0 in WATCH; in PLAY +1/N if the action is the suit asked for, else -1/N,
        float32 ().
    Return: in [-1, 1]; perfect 1, random -0.5.
    Episode: 2 N - 1 steps, N of them graded: 103, 207, 311 for Easy, Medium, Hard
        with 1, 2, 3 decks.
    End: terminated with the answer for the first card; never truncated.

    Reference quirks kept: the last card is shown together with PLAY, and the first
    answer is that very card; in PLAY the suit part shows spades, which is not to be
    told from a real spade.
    """

    def __init__(self, num_decks: int = 1, name: str | None = None):
        self.num_cards = cards.num_cards(num_decks)
        super().__init__(num_decks, 2 * self.num_cards - 1, name)

    def deal(self, key: jax.Array, remaining: jax.Array) -> jax.Array:
        """Suit of the next card, int32 (): the only randomness; in PLAY it is not looked at."""
        return cards.deal(key, remaining)

    def reset_env(
        self, key: jax.Array, params: environment.EnvParams
    ) -> tuple[jax.Array, EnvState]:
        """Deal the first card: observation float32 (6,) and state."""
        full = cards.full_counts(self.num_decks, cards.NUM_SUITS)
        suit = self.deal(key, full)
        words = -(-self.num_cards // SUITS_PER_WORD)
        state = EnvState(
            time=jnp.zeros((), jnp.int32),
            remaining=cards.without(full, suit),
            seen=suit_at(jnp.int32(0), suit, words),
        )
        return mode_and_suit(jnp.int32(WATCH), suit), state

    def step_env(
        self, key: jax.Array, state: EnvState, action: jax.Array, params: environment.EnvParams
    ) -> tuple[jax.Array, EnvState, jax.Array, jax.Array, dict[Any, Any]]:
        """Deal, or grade the action: observation (6,), state, reward, terminated, {}."""
        dealt = state.time + 1  # cards on the table, while watching
        watching = dealt < self.num_cards

        scale = jnp.float32(1 / self.num_cards)
        asked = suit_from(state.seen, 2 * self.num_cards - 1 - dealt)
        graded = jnp.where(action == asked, scale, -scale)
        reward = jnp.where(watching, 0.0, graded)

        suit = jnp.where(watching, self.deal(key, state.remaining), 0)
        new = suit_at(dealt, suit, len(state.seen))  # nothing in PLAY, as suit 0 is no bit
        gone = jnp.where(watching, suit, -1)  # no card in PLAY
        state = EnvState(
            time=state.time + 1,
            remaining=cards.without(state.remaining, gone),
            seen=state.seen | new,
        )
        watches_on = dealt + 1 < self.num_cards
        mode = jnp.where(watches_on, jnp.int32(WATCH), jnp.int32(PLAY))
        observation = mode_and_suit(mode, suit)
        return observation, state, reward, self.is_terminated(state, params), {}

    def render(self, state: EnvState, params: environment.EnvParams) -> str:
        """The card in view or the suit asked for, and the cards that are to be recited yet."""
        time = int(state.time)
        if time >= self.episode_length:
            return "all suits have been recited"
        places = np.arange(min(time + 1, 2 * self.num_cards - 1 - time))
        words = np.asarray(state.seen)[places // SUITS_PER_WORD]
        suits = (words >> (2 * (places % SUITS_PER_WORD)).astype(np.uint32)) & 3
        newest = cards.SUITS[suits[-1]]
        if time + 1 < self.num_cards:
            now = f"watch: card {time + 1} of {self.num_cards} is of {newest}"
        else:
            now = f"play: asked for suit {time + 2 - self.num_cards} of {self.num_cards}: {newest}"
        return f"{now}\nto be recited from the end: {cards.letters(suits)}"

    def render_action(self, state: EnvState, action: Any, params: Any) -> str:
        watching = int(state.time) + 1 < self.num_cards
        return "nothing" if watching else cards.SUITS[int(action)]

    def action_space(self, params: environment.EnvParams) -> spaces.Discrete:
        return spaces.Discrete(cards.NUM_SUITS)

    def observation_space(self, params: environment.EnvParams) -> spaces.Box:
        return spaces.Box(0.0, 1.0, (2 + cards.NUM_SUITS,))


def mode_and_suit(mode: jax.Array, suit: jax.Array) -> jax.Array:
    """Both one-hot, float32 (6,)."""
    one_hot_mode = cards.one_hot(mode, 2)
    one_hot_suit = cards.one_hot(suit, cards.NUM_SUITS)
    return jnp.concatenate([one_hot_mode, one_hot_suit])


def suit_at(place: jax.Array, suit: jax.Array, words: int) -> jax.Array:
    """That suit at a place 0, 1, .. of packed suits, zeros elsewhere, uint32 (words,)."""
    shift = 2 * (place % SUITS_PER_WORD).astype(jnp.uint32)
    here = jnp.arange(words, dtype=jnp.int32) == place // SUITS_PER_WORD
    return jnp.where(here, suit.astype(jnp.uint32) << shift, np.uint32(0))


def suit_from(packed: jax.Array, place: jax.Array) -> jax.Array:
    """The suit at a place of packed suits, int32 ()."""
    shift = 2 * (place % SUITS_PER_WORD).astype(jnp.uint32)
    here = jnp.arange(len(packed), dtype=jnp.int32) == place // SUITS_PER_WORD
    word = jnp.sum(jnp.where(here, packed, np.uint32(0)), dtype=jnp.uint32)
    return ((word >> shift) & np.uint32(3)).astype(jnp.int32)
