"""A trained network and what its latents are, rebuilt from its checkpoint alone."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from dcdit.checkpoints.read import read_checkpoint
from dcdit.data.latents import LatentSpec
from dcdit.errors import UserError
from dcdit.network import Network, build_network

_PREFIX = "network."


@dataclass(frozen=True)
class Model:
    """A trained network and what its latents are.

    Attributes:
        network: in evaluation mode.
        latents: what it was trained on.
        step: optimiser steps trained.
        training: how it was trained: the other hyper-parameters of its checkpoint.
    """

    network: Network
    latents: LatentSpec
    step: int
    training: Mapping[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where the network lies."""
        return next(self.network.parameters()).device


def load_model(path: str, weights: str = "ema", device: torch.device | str = "cpu") -> Model:
    """Rebuild a trained network from its checkpoint alone; nothing in the file is executed.

    Args:
        path: a checkpoint that ``dcdit.train`` wrote.
        weights: ``ema`` or ``raw``.
        device: where the network goes.

    Raises:
        UserError: if the file is missing or is no checkpoint of ``dcdit.train``.
    """
    checkpoint = read_checkpoint(path)
    try:
        settings = checkpoint["hyper_parameters"]
        # Without EMA, state_dict holds the raw weights and there is no second set.
        state = checkpoint.get("current_model_state") if weights == "raw" else None
        state = state or checkpoint["state_dict"]
        spec, latents, step = settings["model"], settings["latents"], checkpoint["global_step"]
    except (KeyError, TypeError) as error:
        raise UserError(f"checkpoint={path} was not written by dcdit.train: it lacks {error}") from None
    network = build_network(spec)
    network.load_state_dict({k.removeprefix(_PREFIX): v for k, v in state.items() if k.startswith(_PREFIX)})
    training = {key: value for key, value in settings.items() if key != "latents"}
    network.to(device).eval()
    network.to(memory_format=torch.channels_last)  # which convolutions on CPUs and on tensor cores prefer
    return Model(network, LatentSpec.from_plain(latents, f"checkpoint={path}: latents"), step, training)
