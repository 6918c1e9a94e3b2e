"""The one way from a trained network to latents, for one process or many; commands and callbacks all take it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dcdit.checkpoints.load import Model
from dcdit.compute.flops import Cost
from dcdit.diffusion.guidance import Guidance
from dcdit.diffusion.samplers import Sampler, Step, sample_generator
from dcdit.errors import UserError
from dcdit.runtime.devices import autocast
from dcdit.sampling.settings import Labels


@dataclass(frozen=True)
class SampleBatch:
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
        """FLOPs of each sample over all steps and halves, (n,) float64."""
        halves = [cost.of(lengths).view(-1, len(self.indices)).sum(dim=0) for lengths in self.lengths]
        return torch.stack(halves).sum(dim=0)

    def tokens(self) -> Tensor:
        """Tokens kept by half and step, summed over the samples, (2, steps) int64; 0 where a half did not run."""
        size = len(self.indices)
        sums = [[lengths[:size].sum(), lengths[size:].sum()] for lengths in self.lengths]
        return torch.tensor(sums, dtype=torch.int64).T


def labels_of(kind: Labels, count: int, classes: int, seed: int) -> Tensor:
    """Labels (count,) int64 of images: that of image i depends on (seed, i) alone.

    Args:
        kind: ``random`` or ``balanced``.
        count: number of images.
        classes: number of classes.
        seed: of random labels.
    """
    if kind == "balanced":
        return torch.arange(count) % classes
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, _LABELS])))
    return torch.from_numpy((generator.random(count) * classes).astype(np.int64))


_LABELS = 2**32 - 2
"""Keeps labels apart from whatever else the seed stands for."""

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
) -> Iterator[SampleBatch]:
    """Sample in batches; sample i depends on (seed, i) and its label only, up to rounding.

    Args:
        model, guidance, sampler: what computes.
        labels: (N,) labels of all samples; sample i takes ``labels[i]``.
        indices: the samples wanted, such as the share of one process.
        seed: of all noise.
        batch_size: samples per forward pass.
        precision: ``fp32`` or ``bf16``.
        on_step: told of every step.
    """
    for start in range(0, len(indices), batch_size):
        numbers = [int(number) for number in indices[start : start + batch_size]]
        streams = [sample_generator(seed, number) for number in numbers]
        wanted = labels[numbers].to(model.device)
        lengths: list[Tensor] = []
        x = torch.empty(0)
        with autocast(precision, model.device):
            for step in sampler.trajectory(guidance, model.latents.shape, wanted, streams):
                x = step.next
                lengths.append(_lengths(guidance, step))
                if on_step:
                    on_step(numbers, step)
        if not x.isfinite().all():
            raise UserError(
                f"sampling gave latents that are not finite (guidance.scale={guidance.settings.scale:g}, {precision}):"
                " take a lower scale, precision=fp32, or another checkpoint"
            )
        yield SampleBatch(numbers, x.float().cpu(), [each.cpu() for each in lengths])


def _lengths(guidance: Guidance, step: Step) -> Tensor:
    if step.output.routing is not None:
        return step.output.routing.mask.sum(dim=1)
    halves = 2 if guidance.settings.is_guided(step.timestep) else 1
    return torch.zeros(halves * len(step.x), dtype=torch.long)
