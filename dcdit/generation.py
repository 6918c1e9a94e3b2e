"""The one way from a trained network to latents, for one process or many; commands and callbacks all take it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dcdit.diffusion.guidance import Guidance
from dcdit.diffusion.sampling import Sampler, Step, sample_generator
from dcdit.errors import UserError
from dcdit.evaluation.flops import Cost
from dcdit.interop import read_checkpoint
from dcdit.registry import build_network
from dcdit.runtime import autocast

_PREFIX = "network."


@dataclass(frozen=True)
class Model:
    """A trained network and what its latents are.

    Attributes:
        network: in evaluation mode.
        latents: summary of the manifest: shape, autoencoder, scale, shift and class names.
        step: optimiser steps trained.
        training: how it was trained: the other hyper-parameters of its checkpoint.
    """

    network: nn.Module
    latents: dict[str, Any]
    step: int
    training: Mapping[str, Any] = field(default_factory=dict)

    @property
    def classes(self) -> list[str]:
        """Class names."""
        return [str(name) for name in self.latents["classes"]]

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
        # Without averaging, state_dict holds the raw weights and there is no second set.
        state = checkpoint.get("current_model_state") if weights == "raw" else None
        state = state or checkpoint["state_dict"]
        network = build_network(settings["model"])
        latents, step = settings["latents"], checkpoint["global_step"]
    except (KeyError, TypeError) as error:
        raise UserError(f"checkpoint={path} was not written by dcdit.train: it lacks {error}") from None
    network.load_state_dict({k.removeprefix(_PREFIX): v for k, v in state.items() if k.startswith(_PREFIX)})
    training = {key: value for key, value in settings.items() if key != "latents"}
    network.to(device).eval()
    network.to(memory_format=torch.channels_last)  # which convolutions on processors and on tensor cores prefer
    return Model(network, latents, step, training)


@dataclass(frozen=True)
class Drawn:
    """Finished samples.

    Attributes:
        indices: their numbers.
        latents: (n, C, H, W) float32 on the CPU, network-side scale.
        lengths: for each step the tokens that the conditional half, then, where it ran, the unconditional half kept of
            each sample: (n,) or (2n,) int64 on the CPU. Zeros without a router.
    """

    indices: list[int]
    latents: Tensor
    lengths: list[Tensor]

    def flops(self, cost: Cost) -> Tensor:
        """Operations of each sample over all steps and halves, (n,) float64."""
        halves = [cost.of(lengths).view(-1, len(self.indices)).sum(dim=0) for lengths in self.lengths]
        return torch.stack(halves).sum(dim=0)


OnStep = Callable[[list[int], Step], None]
"""Told the samples' numbers and the step, after every step."""


@torch.no_grad()
def generate(
    model: Model,
    guidance: Guidance,
    sampler: Sampler,
    labels: Tensor,
    indices: Sequence[int],
    *,
    seed: int,
    batch_size: int,
    precision: str = "fp32",
    on_step: OnStep | None = None,
) -> Iterator[Drawn]:
    """Draw samples in batches; sample i depends on (seed, i) and its label only, up to rounding.

    Args:
        model, guidance, sampler: what computes.
        labels: (N,) labels of all samples; sample i takes ``labels[i]``.
        indices: the samples to draw, such as the share of one process.
        seed: of all noise.
        batch_size: samples per forward pass.
        precision: ``fp32`` or ``bf16``.
        on_step: told of every step.
    """
    channels, height, width = model.latents["shape"]
    for start in range(0, len(indices), batch_size):
        numbers = [int(number) for number in indices[start : start + batch_size]]
        streams = [sample_generator(seed, number) for number in numbers]
        wanted = labels[numbers].to(model.device)
        lengths: list[Tensor] = []
        x = torch.empty(0)
        with autocast(precision, model.device):
            for step in sampler.trajectory(guidance, (channels, height, width), wanted, streams):
                x = step.next
                lengths.append(_lengths(guidance, step))
                if on_step:
                    on_step(numbers, step)
        yield Drawn(numbers, x.float().cpu(), [each.cpu() for each in lengths])


def _lengths(guidance: Guidance, step: Step) -> Tensor:
    if step.output.routing is not None:
        return step.output.routing.mask.sum(dim=1)
    halves = 2 if guidance.is_guided(step.timestep) else 1
    return torch.zeros(halves * len(step.x), dtype=torch.long)
