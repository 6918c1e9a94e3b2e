"""A trained network and what its latents are, rebuilt from its checkpoint alone."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import Annotated, Any

import torch
from torch import Tensor

from dcdit.checkpoints.read import read_checkpoint
from dcdit.checks import Bounds, conform
from dcdit.data.latents import LatentSpec
from dcdit.errors import UserError
from dcdit.network import Network, build_network
from dcdit.runtime.devices import without_memory

_PREFIX = "network."  # of the network's parameters within a checkpoint

Step = Annotated[int, Bounds(0, 99_999_999, hint="it is a number of optimiser steps")]


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


@dataclass(frozen=True)
class Trained:
    """A checkpoint of ``dcdit.train``, whole and checked.

    Attributes:
        path: the file.
        step: optimiser steps trained.
        model: plain mapping for :func:`dcdit.network.build_network`.
        latents: what was trained on.
        ema, raw: parameters by name; the same where no average was kept.
        values: everything that the file holds.
    """

    path: str
    step: int
    model: Mapping[str, Any]
    latents: LatentSpec
    ema: Mapping[str, Tensor]
    raw: Mapping[str, Tensor]
    values: Mapping[str, Any]


def read_trained(path: str | PathLike[str]) -> Trained:
    """Read a checkpoint of ``dcdit.train``, and see that its weights are those of the network it describes.

    Nothing in the file is executed, and no network is built before its size is known to be that of the weights.

    Raises:
        UserError: if the file is missing or damaged, was not written by ``dcdit.train``, or a value is out of range.
    """
    values = read_checkpoint(path)
    try:
        settings = conform("hyper_parameters", values["hyper_parameters"], dict[str, Any])
        step = conform("global_step", values["global_step"], Step)
        model = conform("model", settings["model"], dict[str, Any])
        with without_memory():
            wanted = {name: tensor.shape for name, tensor in build_network(model).state_dict().items()}
        latents = LatentSpec.from_plain(settings["latents"], "latents")
        ema = _weights("state_dict", values["state_dict"])
        raw = _weights("current_model_state", values.get("current_model_state", values["state_dict"]))
        for weights in (ema, raw):
            check_shapes({name: tensor.shape for name, tensor in weights.items()}, wanted)
    except KeyError as error:
        raise UserError(f"checkpoint={path} was not written by dcdit.train: it lacks {error}") from None
    except UserError as error:
        raise UserError(f"checkpoint={path} was not written by this release of dcdit.train: {error}") from None
    return Trained(str(path), step, model, latents, ema, raw, values)


def check_shapes(found: Mapping[str, torch.Size], wanted: Mapping[str, torch.Size]) -> None:
    """Raise :class:`UserError`, naming the first difference, unless shapes by name are those ``wanted``."""
    for name in {**wanted, **found}:
        if found.get(name) != wanted.get(name):
            has, needs = (list(each[name]) if name in each else "none" for each in (found, wanted))
            raise UserError(f"parameter {name} has shape {has}, the network that is described needs {needs}")


def _weights(key: str, state: Any) -> dict[str, Tensor]:
    """The network's parameters among those of the LightningModule."""
    found = conform(key, state, dict[str, Tensor])
    return {name.removeprefix(_PREFIX): tensor for name, tensor in found.items() if name.startswith(_PREFIX)}


def load_model(path: str, weights: str = "ema", device: torch.device | str = "cpu") -> Model:
    """Rebuild a trained network from its checkpoint alone; nothing in the file is executed.

    Args:
        path: a checkpoint that ``dcdit.train`` wrote.
        weights: ``ema`` or ``raw``.
        device: where the network goes.

    Raises:
        UserError: if the file is missing, damaged, or no checkpoint of ``dcdit.train``.
    """
    trained = read_trained(path)
    network = build_network(trained.model)
    network.load_state_dict(trained.raw if weights == "raw" else trained.ema)
    training = {key: value for key, value in trained.values["hyper_parameters"].items() if key != "latents"}
    network.to(device).eval()
    network.to(memory_format=torch.channels_last)  # which convolutions on CPUs and on tensor cores prefer
    return Model(network, trained.latents, trained.step, training)
