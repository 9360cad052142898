"""Concentration: find the pairs among cards that lie face down."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gymnax.environments import spaces

from popgym_jax import cards, environment

NO_CARD = -1
POSITIONS_PER_WORD = 26  # half a deck, so that words are full
ROW = 13  # cards of a row, where the table is shown as text
COLOUR_LETTERS = "BR"
RANK_LETTERS = "A23456789TJQK"


@struct.dataclass
class EnvState(environment.EnvState):
    """time: steps taken, int32 ()
    kinds: of the cards by position, int8 (N,)
    faces: the same as the observation of an open table, int8 (N (K+1),)
    face_up: positions of the pairs found, bits in the order of `position_bits`,
        uint32 (N / 26,)
    first: position of the card that waits for its partner, or -1, int32 ()
    """

    kinds: jax.Array
    faces: jax.Array
    face_up: jax.Array
    first: jax.Array


@struct.dataclass
class EnvParams(environment.EnvParams):
    """max_steps_in_episode: truncation, and the divisor of the penalty."""

    max_steps_in_episode: int = 104


class Concentration(environment.Environment[EnvState, EnvParams]):
    """Turn over cards two by two to find pairs (Morad et al. 2023, POPGym; popgym 1.0.7).

    N = 52 num_decks shuffled cards lie face down. Two cards make a pair if they are
    of the same kind: K = 2 colours or 13 ranks. A step turns over one card; the
    second of two in play either completes a pair, and both stay face up, or both
    are turned back after they have been seen.

    Observation: for each position the kind in view, or K for face down, one-hot,
        float32 (N (K+1),). In view are the pairs found and the one or two cards in
        play.
    Action: a position 0..N-1, integer ().
    Reward: +2/N for a pair; -2/L for two cards that are no pair or the same card
        twice, with L = max_steps_in_episode; 0 for the first card; -1/L for each
        card in play if one of them was face up before, float32 ().
    Return: in [-1, 1]; random -0.19, -0.19, -0.83 for Easy, Medium, Hard.
    Episode: at most L = ceil(2 N - N/(2 N - 1)) steps: 104, 208, 104 for Easy,
        Medium, Hard with num_decks, deck_type = 1, colors and 2, colors and 1,
        ranks.
    End: terminated with the last pair; truncated at L; the last pair on the last
        step is both.

    Reference quirks kept: a card that was face up before ends the turn, even as the
    first card, and takes the other card in play with it; cards pair by kind alone,
    so any two reds do.
    """

    costly_reset = True
    obs_requires_prev_action = True

    def __init__(self, num_decks: int = 1, deck_type: str = "ranks", name: str | None = None):
        self.num_cards = cards.num_cards(num_decks)
        self.num_decks = num_decks
        self.deck_type = deck_type
        # 13 cards of a suit cannot all be paired
        self.num_kinds = cards.num_kinds(deck_type, ("colors", "ranks"))
        n = self.num_cards
        self.episode_length = math.ceil(2 * n - n / (2 * n - 1))
        super().__init__(name)

    @property
    def default_params(self) -> EnvParams:
        return EnvParams(max_steps_in_episode=self.episode_length)

    def shuffle(self, key: jax.Array) -> jax.Array:
        """Kinds by position, int8 (N,): the only randomness of this environment."""
        card = cards.shuffled_deck(key, self.num_decks)
        kinds = cards.colour(card) if self.deck_type == "colors" else cards.rank(card)
        return kinds.astype(jnp.int8)

    def reset_env(self, key: jax.Array, params: EnvParams) -> tuple[jax.Array, EnvState]:
        """Shuffle, all cards face down: observation float32 (N (K+1),) and state."""
        kinds = self.shuffle(key)
        one_hot = kinds[:, None] == jnp.arange(self.num_kinds + 1, dtype=jnp.int8)
        state = EnvState(
            time=jnp.zeros((), jnp.int32),
            kinds=kinds,
            faces=one_hot.astype(jnp.int8).ravel(),
            face_up=jnp.zeros(self.num_cards // POSITIONS_PER_WORD, jnp.uint32),
            first=jnp.full((), NO_CARD, jnp.int32),
        )
        return self.in_view(state.faces, state.face_up), state

    def step_env(
        self, key: jax.Array, state: EnvState, action: jax.Array, params: EnvParams
    ) -> tuple[jax.Array, EnvState, jax.Array, jax.Array, dict[Any, Any]]:
        """Turn over a card: observation (N (K+1),), state, reward, terminated, {}."""
        action = jnp.asarray(action).astype(jnp.int32)
        turned = position_bits(action, self.num_cards)
        in_play = turned | position_bits(state.first, self.num_cards)
        observation = self.in_view(state.faces, state.face_up | in_play)

        two = state.first != NO_CARD
        was_up = jnp.any((state.face_up & turned) != 0)  # the first card is never up before
        same_kind = state.kinds[state.first] == state.kinds[action]
        pair = two & ~was_up & same_kind & (action != state.first)

        cards_in_play = 1.0 + two.astype(jnp.float32)
        penalty = -cards_in_play / jnp.asarray(params.max_steps_in_episode, jnp.float32)
        found = jnp.float32(2 / self.num_cards)
        no_pair = jnp.where(two | was_up, penalty, 0.0)
        reward = jnp.where(pair, found, no_pair)

        new_pair = jnp.where(pair, in_play, np.uint32(0))
        state = state.replace(
            time=state.time + 1,
            face_up=state.face_up | new_pair,
            first=jnp.where(two | was_up, NO_CARD, action),
        )
        return observation, state, reward, self.is_terminated(state, params), {}

    def in_view(self, faces: jax.Array, visible: jax.Array) -> jax.Array:
        """The faces of the cards at the visible positions, K for the others, float32 (N (K+1),).

        A cheap loop over the numbers of the observation, each with the word and the
        bit of its position; with the positions as an axis of their own it takes
        three times as long.
        """
        position, kind = np.divmod(np.arange(len(faces)), self.num_kinds + 1)
        word, bit = np.divmod(position, POSITIONS_PER_WORD)
        seen = jnp.zeros(len(faces), jnp.uint32)
        for i in range(len(visible)):
            bit_of_word = np.where(word == i, 1 << bit, 0).astype(np.uint32)
            seen |= visible[i] & bit_of_word
        face_down = (kind == self.num_kinds).astype(np.int8)
        return jnp.where(seen != 0, faces, face_down).astype(jnp.float32)

    def is_terminated(self, state: EnvState, params: EnvParams) -> jax.Array:
        """All pairs have been found, bool ()."""
        return jnp.all(state.face_up == np.uint32(2**POSITIONS_PER_WORD - 1))

    def render(self, state: EnvState, params: EnvParams) -> str:
        """The table: [ ] around cards that lie face up, ( ) around the one that waits."""
        position = np.arange(self.num_cards)
        word, bit = np.divmod(position, POSITIONS_PER_WORD)
        face_up = (np.asarray(state.face_up)[word] >> bit.astype(np.uint32)) & 1
        kinds = np.asarray(state.kinds)
        left = np.where(face_up, "[", np.where(position == state.first, "(", " "))
        right = np.where(face_up, "]", np.where(position == state.first, ")", " "))
        places = [f"{left[i]}{self.letter(kinds[i])}{right[i]}" for i in position]
        rows = ["".join(places[i : i + ROW]) for i in range(0, self.num_cards, ROW)]
        return "\n".join([f"{face_up.sum()} of {self.num_cards} cards lie face up", *rows])

    def letter(self, kind: int) -> str:
        return (COLOUR_LETTERS if self.deck_type == "colors" else RANK_LETTERS)[kind]

    def render_action(self, state: EnvState, action: Any, params: Any) -> str:
        row, column = divmod(int(action), ROW)
        card = self.letter(int(state.kinds[int(action)]))
        return f"row {row + 1}, column {column + 1}: {card}"

    def action_space(self, params: EnvParams) -> spaces.Discrete:
        return spaces.Discrete(self.num_cards)

    def observation_space(self, params: EnvParams) -> spaces.Box:
        return spaces.Box(0.0, 1.0, (self.num_cards * (self.num_kinds + 1),))


def position_bits(position: jax.Array, num_cards: int) -> jax.Array:
    """The bit of one position, none for -1, uint32 (num_cards / 26,); 0 is the lowest."""
    word = jnp.arange(num_cards // POSITIONS_PER_WORD, dtype=jnp.int32)
    bit = np.uint32(1) << (position % POSITIONS_PER_WORD).astype(jnp.uint32)
    return jnp.where(word == position // POSITIONS_PER_WORD, bit, np.uint32(0))
