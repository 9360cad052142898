"""Bridges of the environments that deal cards."""

from __future__ import annotations

import copy
from typing import Any

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


BRIDGES = {"RepeatFirst": Deck(), "RepeatPrevious": Deck()}
