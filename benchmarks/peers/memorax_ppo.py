"""memorax's PPO on our environment, at our sizes. Runs in memorax's environment, started by run.py."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from memorax.algorithms.ppo import PPO, PPOConfig
from memorax.networks import MLP, RNN, GatedResidual, Memoroid, Network, PreNorm, S5Cell, Stack, heads

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import popgym_jax
from benchmarks.peers.worker import Worker


class FiveValues:
    """Our environment as memorax steps one: a single done, and no final observation."""

    def __init__(self, env: Any):
        self.env = env

    def __getattr__(self, name: str) -> Any:
        return getattr(self.env, name)

    def step(self, key: jax.Array, state: Any, action: jax.Array, params: Any) -> tuple:
        obs, state, reward, terminated, truncated, _ = self.env.step(key, state, action, params)
        return obs, state, reward, terminated | truncated, {}


class Encoder(nn.Module):
    """Reads what our agent reads: observation, previous action (one-hot, none at a start), start flag."""

    num_actions: int
    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, observation, action, reward, done):
        start = done.astype(jnp.float32)[..., None]
        previous = jax.nn.one_hot(action, self.num_actions) * (1.0 - start)
        x = jnp.concatenate([observation, previous, start], axis=-1)
        return MLP(self.widths, activation=nn.leaky_relu)(x)


class Decoder(nn.Module):
    """Our decoder's hidden layers before memorax's head."""

    widths: tuple[int, ...]
    head: nn.Module

    @nn.compact
    def __call__(self, x, **kwargs):
        return self.head(MLP(self.widths, activation=nn.leaky_relu)(x), **kwargs)


def make_torso(settings: dict[str, Any]) -> nn.Module:
    """The memory: S5 layers in blocks, or a GRU alone.

    memorax's state_size counts complex numbers, as our P does: its B is (P, H), its C (H, P), so
    products are as large as ours; it only takes P of them as they are where ours stand for
    conjugate pairs. Its GatedResidual has one dense layer where our block has two.
    """
    width = settings["s5_width"]
    if settings["arch"] == "gru":
        return RNN(nn.GRUCell(width))
    blocks = []
    for _ in range(settings["s5_layers"]):
        memory = Memoroid(S5Cell(features=width, state_size=settings["s5_state"]))
        blocks.append(GatedResidual(PreNorm(memory)))
    return Stack(tuple(blocks))


def make_network(settings: dict[str, Any], num_actions: int, head: nn.Module) -> Network:
    """Encoder, memory, decoder; PPO holds two of them, one for the policy and one for the value."""
    widths = (*settings["encoder_layers"], settings["s5_width"])
    return Network(
        feature_extractor=Encoder(num_actions, widths),
        torso=make_torso(settings),
        head=Decoder(tuple(settings["decoder_layers"]), head),
    )


def make_agent(settings: dict[str, Any]) -> PPO:
    """PPO with our default flags, as far as it has them."""
    env, env_params = popgym_jax.make(settings["env"])
    num_actions = env.action_space(env_params).n
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(1e-3, eps=1e-5))
    return PPO(
        cfg=PPOConfig(
            name="PPO",
            num_envs=settings["num_envs"],
            num_eval_envs=1,
            num_steps=settings["num_steps"],
            gamma=0.99,
            gae_lambda=0.85,
            num_minibatches=settings["num_minibatches"],
            update_epochs=settings["update_epochs"],
            normalize_advantage=True,
            clip_coef=0.2,
            clip_vloss=True,
            ent_coef=0.0,
            vf_coef=1.0,
        ),
        env=FiveValues(env),
        env_params=env_params,
        actor_network=make_network(settings, num_actions, heads.Categorical(num_actions)),
        critic_network=make_network(settings, num_actions, heads.VNetwork()),
        actor_optimizer=optimizer,
        critic_optimizer=optimizer,
    )


def main() -> None:
    worker = Worker()
    agent = make_agent(worker.settings)
    learner = PPO.init.__wrapped__(agent, jax.random.key(0))  # as one program it takes minutes to compile

    steps = agent.cfg.batch_size  # one update in a call, like ours
    began = time.perf_counter()
    train = PPO.train.lower(agent, *learner, steps).compile()
    compile_seconds = time.perf_counter() - began

    def update():
        nonlocal learner
        key, state, _ = jax.block_until_ready(train(*learner))
        learner = (key, state)

    worker.serve(
        calls={"update": update},
        compile_seconds={"update": compile_seconds},
        packages=("memorax", "jax", "flax", "distrax"),
    )


if __name__ == "__main__":
    main()
