"""Bridges of the environments that deal cards."""

from __future__ import annotations

import copy
from typing import Any

import jax.numpy as jnp
import numpy as np

from popgym_jax import cards
from tests.reference import Bridge, Scripted


class Deck(Bridge):
    """One deck, of which only the kind of each card counts: a draw is the kind of the card that is dealt."""

    draw_like = np.zeros((), np.int32)

    def __init__(self, kind: str = "suits_idx", num_kinds: int = cards.NUM_SUITS):
        self.kind, self.num_kinds = kind, num_kinds

    def draw(self, reference: Any, time: int) -> np.ndarray:
        deck = reference.deck
        return np.int32(getattr(deck, self.kind)[deck.idx[deck.num_cards - 1 - time]])

    def inject(self, env: Any) -> Any:
        env = copy.copy(env)
        env.deal = lambda key, remaining: key
        return env

    def start(self, env: Any, params: Any, draw: Any, hidden: dict[str, Any]) -> tuple[Any, Any]:
        return self.inject(env).reset_env(draw, params)

    def our_draw(self, env: Any, key: Any, state: Any, params: Any) -> Any:
        full = cards.full_counts(env.num_decks, self.num_kinds)
        return env.deal(key, full if state is None else state.remaining)

    def insert(self, reference: Any, state: Any, draws: np.ndarray) -> Any:
        kinds = getattr(reference.deck, self.kind)
        reference.np_random = Scripted(shuffle=lambda idx: stack(idx, kinds, draws))
        return reference.reset()[0]


def stack(idx: np.ndarray, kinds: np.ndarray, dealt: np.ndarray) -> None:
    """Order a deck in place so that cards of these kinds come from its end, one by one: kinds[idx[::-1]] == dealt."""
    idx[np.argsort(dealt[::-1], kind="stable")] = np.argsort(kinds, kind="stable")
    np.testing.assert_array_equal(kinds[idx[::-1]], dealt)


class Autoencode(Deck):
    """As many draws as cards; while it is played they are not looked at."""

    def draw(self, reference: Any, time: int) -> np.ndarray:
        return super().draw(reference, min(time, reference.deck.num_cards - 1))

    def insert(self, reference: Any, state: Any, draws: np.ndarray) -> Any:
        return super().insert(reference, state, draws[: reference.deck.num_cards])


class TwoDecks(Bridge):
    """CountRecall: a draw is the kinds of the value and of the query."""

    draw_like = np.zeros(2, np.int32)

    def draw(self, reference: Any, time: int) -> np.ndarray:
        decks = reference.value_deck, reference.query_deck
        return np.array([reference.deck_idx_type[deck.idx[deck.num_cards - 1 - time]] for deck in decks], np.int32)

    def inject(self, env: Any) -> Any:
        env = copy.copy(env)
        env.deal = lambda key, values, queries: key
        return env

    def start(self, env: Any, params: Any, draw: Any, hidden: dict[str, Any]) -> tuple[Any, Any]:
        return self.inject(env).reset_env(draw, params)

    def our_draw(self, env: Any, key: Any, state: Any, params: Any) -> Any:
        full = cards.full_counts(env.num_decks, env.num_kinds)
        left = (full, full) if state is None else (state.remaining_values, state.remaining_queries)
        return env.deal(key, *left)

    def insert(self, reference: Any, state: Any, draws: np.ndarray) -> Any:
        columns = iter(draws.T)  # the reference shuffles the values, then the queries
        reference.np_random = Scripted(shuffle=lambda idx: stack(idx, reference.deck_idx_type, next(columns)))
        return reference.reset()[0]


class Concentration(Bridge):
    """The only draw is the kinds by position; it is repeated at every step, where nothing looks at it."""

    def __init__(self):
        self.policies = (None, pairs, careless, slow)

    def draw(self, reference: Any, time: int) -> np.ndarray:
        return reference.deck_idx_type[reference.deck.idx].astype(np.int8)

    def inject(self, env: Any) -> Any:
        env = copy.copy(env)
        env.shuffle = lambda key: key
        return env

    def start(self, env: Any, params: Any, draw: Any, hidden: dict[str, Any]) -> tuple[Any, Any]:
        return self.inject(env).reset_env(jnp.asarray(draw), params)

    def our_draw(self, env: Any, key: Any, state: Any, params: Any) -> Any:
        return env.shuffle(key) if state is None else state.kinds

    def insert(self, reference: Any, state: Any, draws: np.ndarray) -> Any:
        kinds = reference.deck_idx_type  # position p shows the p-th card of the deck, from its front
        reference.np_random = Scripted(shuffle=lambda idx: stack(idx, kinds, draws[0][::-1]))
        return reference.reset()[0]


def pairs(reference: Any) -> int:
    """Peeks at the cards, and completes the game without a mistake."""
    deck = reference.deck
    kinds = reference.deck_idx_type[deck.idx]
    hidden = [int(i) for i in range(len(kinds)) if i not in deck["face_up_idx"] + deck["in_play_idx"]]
    if deck["in_play_idx"]:
        return next(i for i in hidden if kinds[i] == kinds[deck["in_play_idx"][0]])
    return hidden[-1]


def careless(reference: Any) -> int:
    """As `pairs`, but every fifth step it turns over a card that is in view, if there is one."""
    in_view = reference.deck["in_play_idx"] + reference.deck["face_up_idx"]
    if reference.curr_step % 5 != 3 or not in_view:
        return pairs(reference)
    return int(in_view[reference.curr_step % len(in_view)])


def slow(reference: Any) -> int:
    """Turns over one card again and again until just enough steps are left: the last pair comes on the last step."""
    return 0 if reference.curr_step < reference.episode_length - len(reference.deck) else pairs(reference)


BRIDGES = {
    "RepeatFirst": Deck(),
    "RepeatPrevious": Deck(),
    "Autoencode": Autoencode(),
    "CountRecall": TwoDecks(),
    "HigherLower": Deck("ranks_idx", cards.NUM_RANKS),
    "Concentration": Concentration(),
}
