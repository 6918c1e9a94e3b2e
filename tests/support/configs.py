"""Configurations of tests, and small things that several of them need."""

import os
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from dcdit.checkpoints.foreign import infer_network
from dcdit.checkpoints.settings import AssumeSettings
from dcdit.data.latents import LatentSpec
from dcdit.evaluation.grid import grid_of
from dcdit.network import DCDiT, build_network
from dcdit.runs.state import Outcome
from dcdit.settings.compose import CONFIG_DIR, configuration_of
from dcdit.training.module import DCDiTModule
from dcdit.training.run import run_training
from dcdit.training.settings import TrainConfig

TINY = (
    "experiment=digits",
    "diffusion=ddpm",
    "model.width=32",
    "model.depth=1",
    "model.encoder_width=16",
    "model.grid=8",
    "data.batch_size=8",
    "multi_budget.full_budget_steps=2",
    "trainer.log_every_n_steps=1",
    "callbacks.progress=null",
)
"""Overrides for a digits run of a second or two."""


NEEDED = {"experiment=images": ("model.grid=32", "model.channels=3", "model.num_classes=6")}
"""What a choice must be told to be composed: where there are no shards, their shape."""

PLAIN_DIT = (
    *(f"~model.{key}" for key in ("encoder_width", "groups", "router", "smoothing_sigma", "init")),
    *("~model.position_patch", "~model.condition_norm"),
    "model.name=dit",
    "+model.patch=2",
    "multi_budget=none",
)
"""Overrides that make a plain DiT of it."""

MODERN = {"norm": "rms", "mlp": "swiglu", "position": "rope", "qk_norm": True}
"""Blocks of which nothing is as published."""

MODERN_WORDS = tuple(f"model.{key}={str(value).lower()}" for key, value in MODERN.items())
"""The same as overrides."""


def compose_config(*overrides: str, name: str = "train") -> DictConfig:
    with initialize_config_dir(CONFIG_DIR, version_base="1.3"):
        return compose(name, overrides=list(overrides))


def config_of(*overrides: str) -> TrainConfig:
    """The typed configuration of a training."""
    return configuration_of(TrainConfig, compose_config(*overrides))


def module_of(config: TrainConfig) -> DCDiTModule:
    """The LightningModule of a configuration, for latents that fit its network."""
    network = build_network(config.model)
    classes = tuple(map(str, range(network.num_classes)))
    latents = LatentSpec((network.channels, *network.grid), "identity", 1.0, 0.0, classes)
    return DCDiTModule(network, config.diffusion.build(), config, latents)


def check(module: ModuleType, values: DictConfig) -> Any:
    """The typed configuration of the command in ``module``, with all that is checked before anything is opened."""
    name = module.__name__.rpartition(".")[2]
    config = configuration_of(getattr(module, name).config, values)
    if name == "evaluate":
        grid_of(config)
    return config


def call(module: ModuleType, values: DictConfig) -> Any:
    """Call the command in ``module`` as a function."""
    command = getattr(module, module.__name__.rpartition(".")[2])
    return command(configuration_of(command.config, values))


def train(values: DictConfig, run_dir: Path) -> Outcome:
    """Train in ``run_dir``."""
    values.run_dir = str(run_dir)
    return run_training(configuration_of(TrainConfig, values))


def golden_folders() -> dict[str, Path]:
    """The reference's numbers: ``mini`` lies here, ``dev`` where DCDIT_GOLDEN points, if it does."""
    folders = {"mini": Path(__file__).parents[1] / "golden" / "mini"}
    dev = Path(os.environ.get("DCDIT_GOLDEN", "")) / "dev"
    if "DCDIT_GOLDEN" in os.environ and dev.is_dir():
        folders["dev"] = dev
    return folders


def golden_network(state: dict[str, torch.Tensor], heads: int) -> DCDiT:
    """The network of a state dict with the reference's names."""
    inferred = infer_network(state, AssumeSettings(heads=heads))
    network = build_network(inferred.spec)
    network.load_state_dict(inferred.weights)
    return network.eval()


def perturb(module: torch.nn.Module, seed: int = 0) -> None:
    """Move every parameter off its initial value, zero-initialised ones above all."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


@cache
def digit_features(count: int = 1000):
    """Features of real digits, and of other ones under noise."""
    from dcdit.data.autoencoder import to_uint8
    from dcdit.data.builtin import Digits
    from dcdit.evaluation.features import DigitsClassifier as Classifier

    images, _ = Digits(grid=8).images()
    noise = 0.3 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    network = Classifier()
    return network(to_uint8(images[:count])), network(to_uint8((images + noise)[-count:]))
