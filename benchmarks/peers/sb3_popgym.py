"""RecurrentPPO of sb3-contrib on popgym itself. Runs in its own environment, started by run.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import popgym
from sb3_contrib import RecurrentPPO
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.peers.worker import Worker


class Encoder(BaseFeaturesExtractor):
    """Our encoder's layers before the LSTM."""

    def __init__(self, observation_space: Any, widths: list[int]):
        super().__init__(observation_space, widths[-1])
        flatten = FlattenExtractor(observation_space)
        layers: list[nn.Module] = [flatten]
        inputs = flatten.features_dim
        for width in widths:
            layers += [nn.Linear(inputs, width), nn.LeakyReLU()]
            inputs = width
        self.layers = nn.Sequential(*layers)

    def forward(self, observations):
        return self.layers(observations)


def make_model(settings: dict[str, Any]) -> RecurrentPPO:
    """Our default flags and sizes; one LSTM for policy and value, as ours.

    Of its own default two, one for each, this is the faster choice.
    """
    make_env = getattr(popgym.envs, settings["popgym_env"])
    num_envs = settings["num_envs"]
    batch = num_envs * settings["num_steps"]
    return RecurrentPPO(
        "MlpLstmPolicy",
        DummyVecEnv([make_env for _ in range(num_envs)]),
        learning_rate=1e-3,
        n_steps=settings["num_steps"],
        batch_size=batch // settings["num_minibatches"],
        n_epochs=settings["update_epochs"],
        gamma=0.99,
        gae_lambda=0.85,
        clip_range=0.2,
        clip_range_vf=0.2,
        vf_coef=1.0,
        max_grad_norm=0.5,
        policy_kwargs={
            "features_extractor_class": Encoder,
            "features_extractor_kwargs": {"widths": [*settings["encoder_layers"], settings["s5_width"]]},
            "lstm_hidden_size": settings["s5_width"],
            "shared_lstm": True,
            "enable_critic_lstm": False,
            "net_arch": list(settings["decoder_layers"]),
            "activation_fn": nn.LeakyReLU,
        },
        device="cpu",
        seed=0,
    )


def main() -> None:
    worker = Worker()
    model = make_model(worker.settings)
    steps = model.n_envs * model.n_steps

    def update():
        model.learn(steps, reset_num_timesteps=False)

    worker.serve(
        calls={"update": update},
        compile_seconds={},
        packages=("sb3-contrib", "torch", "popgym", "gymnasium"),
    )


if __name__ == "__main__":
    main()
