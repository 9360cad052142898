"""CountRecall: how often has a card of this kind been dealt so far?"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gymnax.environments import spaces

from popgym_jax import cards, environment, prng


@struct.dataclass
class EnvState(environment.EnvState):
    """time: steps taken, int32 ()
    remaining_values: undealt cards of each kind in the stack of values, int32 (K,)
    remaining_queries: the same in the stack of queries, int32 (K,)
    query: kind that is being asked for, int32 ()
    """

    remaining_values: jax.Array
    remaining_queries: jax.Array
    query: jax.Array


class CountRecall(cards.DeckEnvironment[EnvState]):
    """Say how often a kind of card has been seen (Morad et al. 2023, POPGym; popgym 1.0.7).

    Two stacks of N = 52 num_decks cards are shuffled independently. A value card
    and a query card are dealt at the reset and at every step, and only their kinds
    count: K = 2 colours, 4 suits or 13 ranks, N/K cards of each.

    Observation: kind of the value, kind of the query, both one-hot, float32 (2 K,).
    Action: a count 0..N/K, integer ().
    Reward: +1/(N-1) if the action is the number of value cards of the queried kind
        dealt so far, the one in view included, else -1/(N-1), float32 ().
    Return: in [-1, 1]; perfect 1, random 2/(N/K + 1) - 1.
    Episode: N-1 steps: 51, 103, 207 for Easy, Medium, Hard with num_decks,
        deck_type = 1, colors and 2, suits and 4, ranks; 27, 27, 17 actions.
    End: terminated with the step that deals the last cards; never truncated.

    Reference quirks kept: only the exact count pays, although its description
    promises a reward that falls off linearly (error_clamp, which has no effect
    there, is left out); the last query is shown but there is no answer to it.
    """

    def __init__(self, num_decks: int = 1, deck_type: str = "colors", name: str | None = None):
        self.num_cards = cards.num_cards(num_decks)
        self.deck_type = deck_type
        self.num_kinds = cards.num_kinds(deck_type)
        self.max_count = self.num_cards // self.num_kinds
        super().__init__(num_decks, self.num_cards - 1, name)

    def deal(
        self, key: jax.Array, remaining_values: jax.Array, remaining_queries: jax.Array
    ) -> jax.Array:
        """Kinds of the next value and query, int32 (2,): the only randomness."""
        value_word, query_word = prng.blocks(key, 1)
        value = cards.pick(value_word[0], remaining_values)
        query = cards.pick(query_word[0], remaining_queries)
        # without the barrier XLA draws both again in each operation that uses one of them
        return jax.lax.optimization_barrier(jnp.stack([value, query]))

    def reset_env(
        self, key: jax.Array, params: environment.EnvParams
    ) -> tuple[jax.Array, EnvState]:
        """Deal the first two cards: observation float32 (2 K,) and state."""
        full = cards.full_counts(self.num_decks, self.num_kinds)
        value, query = self.deal(key, full, full)
        state = EnvState(
            time=jnp.zeros((), jnp.int32),
            remaining_values=cards.without(full, value),
            remaining_queries=cards.without(full, query),
            query=query,
        )
        return self.value_and_query(value, query), state

    def step_env(
        self, key: jax.Array, state: EnvState, action: jax.Array, params: environment.EnvParams
    ) -> tuple[jax.Array, EnvState, jax.Array, jax.Array, dict[Any, Any]]:
        """Grade the action, then deal: observation (2 K,), state, reward, terminated, {}."""
        scale = jnp.float32(1 / (self.num_cards - 1))
        queried = jnp.arange(self.num_kinds, dtype=jnp.int32) == state.query
        left = jnp.sum(jnp.where(queried, state.remaining_values, 0), dtype=jnp.int32)
        dealt = self.max_count - left
        reward = jnp.where(action == dealt, scale, -scale)

        value, query = self.deal(key, state.remaining_values, state.remaining_queries)
        state = EnvState(
            time=state.time + 1,
            remaining_values=cards.without(state.remaining_values, value),
            remaining_queries=cards.without(state.remaining_queries, query),
            query=query,
        )
        observation = self.value_and_query(value, query)
        return observation, state, reward, self.is_terminated(state, params), {}

    def value_and_query(self, value: jax.Array, query: jax.Array) -> jax.Array:
        """Both one-hot, float32 (2 K,)."""
        one_hot_value = cards.one_hot(value, self.num_kinds)
        one_hot_query = cards.one_hot(query, self.num_kinds)
        return jnp.concatenate([one_hot_value, one_hot_query])

    def render(self, state: EnvState, params: environment.EnvParams) -> str:
        """What is asked for, and how many cards of each kind have been dealt."""
        names = cards.NAMES[self.deck_type]
        dealt = self.max_count - np.asarray(state.remaining_values)
        query = int(state.query)
        asked = f"asked: how many cards of kind {names[query]} so far: {dealt[query]}"
        counts = ", ".join(f"{name} {count}" for name, count in zip(names, dealt, strict=True))
        return f"{asked}\ndealt: {counts}"

    def render_action(self, state: EnvState, action: Any, params: Any) -> str:
        return str(action)

    def action_space(self, params: environment.EnvParams) -> spaces.Discrete:
        return spaces.Discrete(self.max_count + 1)

    def observation_space(self, params: environment.EnvParams) -> spaces.Box:
        return spaces.Box(0.0, 1.0, (2 * self.num_kinds,))
