"""The one way from a trained network to latents, for one process or many; commands and callbacks all take it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dcdit.checkpoints.load import Model
from dcdit.compute.flops import Cost
from dcdit.diffusion.guidance import Guidance
from dcdit.diffusion.samplers import Sampler, Step, sample_generator
from dcdit.errors import UserError
from dcdit.network import Network
from dcdit.network.caching import TrajectoryCache
from dcdit.network.gates import Gating
from dcdit.runtime.devices import autocast
from dcdit.sampling.settings import Labels


@dataclass(frozen=True)
class SampleBatch:
    """Finished samples.

    Attributes:
        indices: their numbers.
        latents: (n, C, H, W) float32 on the CPU, network-side scale.
        lengths: for each step the tokens that were kept of each sample by the main branch and, where it ran, by the
            guiding branch: (n,) int64 each, on the CPU; 0 where earlier features of the backbone were reused; None
            where there is no router. :class:`dcdit.sampling.cost.SamplingCost` sums them up.
        step_flops: of each sample at each step, both branches, (steps, n) float64.
        beyond: for each step the tokens, of all samples and branches, that a capacity had no room for; () without one.
    """

    indices: list[int]
    latents: Tensor
    lengths: list[tuple[Tensor | None, ...]]
    step_flops: Tensor
    beyond: tuple[int, ...] = ()

    @property
    def flops(self) -> Tensor:
        """FLOPs of each sample over all steps and branches, (n,) float64."""
        return self.step_flops.sum(dim=0)


def labels_of(kind: Labels, count: int, classes: int, seed: int) -> Tensor:
    """Return the labels (count,) int64 of images of so many classes; that of image i depends on (seed, i) alone."""
    if kind == "balanced":
        return torch.arange(count) % classes
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, _LABELS])))
    return torch.from_numpy((generator.random(count) * classes).astype(np.int64))


_LABELS = 2**32 - 2
"""Keeps labels apart from whatever else the seed stands for."""

OnStep = Callable[[list[int], Step], None]
"""Called with the samples' numbers and the step, after every step."""


def branch_networks(model: Model, guidance: Guidance) -> tuple[Network, Network]:
    """Return the networks of the main and of the guiding branch."""
    return model.network, guidance.guiding if isinstance(guidance.guiding, Network) else model.network


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
        model, guidance, sampler: what computes; the sampler takes the process of ``model``.
        labels: (N,) labels of all samples; sample i takes ``labels[i]``.
        indices: the samples wanted, such as the share of one process.
        seed: of all noise.
        batch_size: samples per forward pass.
        precision: ``fp32`` or ``bf16``.
        on_step: called after every step.

    Raises:
        UserError: naming sample and step, if a latent is not finite; if the sampler is one for another process.
    """
    sampler = replace(sampler, process=model.process)
    costs = [BranchCost(network) for network in branch_networks(model, guidance)]
    for start in range(0, len(indices), batch_size):
        numbers = [int(number) for number in indices[start : start + batch_size]]
        streams = [sample_generator(seed, number) for number in numbers]
        classes = labels[numbers].to(model.device)
        kept: list[tuple[Tensor | None, ...]] = []
        beyond: list[list[Tensor]] = []
        spent: list[list[Cost]] = []
        first_bad = torch.full_like(classes, _NEVER)  # step after which a sample was not finite; read once, at the end
        x = torch.empty(0)
        threshold = sampler.settings.cache
        cache = TrajectoryCache(threshold, sampler.timesteps[-1]) if threshold else None
        with autocast(precision, model.device):
            for step in sampler.trajectory(guidance.for_trajectory(cache), model.latents.shape, classes, streams):
                x = step.next
                first_bad = torch.where(x.flatten(1).isfinite().all(dim=1), first_bad, first_bad.clamp(max=step.index))
                masks = [None if routing is None else routing.mask for routing in step.output.routings]
                kept.append(tuple(None if mask is None else mask.sum(dim=1) for mask in masks))
                dropped = [None if routing is None else routing.beyond for routing in step.output.routings]
                spent.append([cost.at(gating) for cost, gating in zip(costs, step.output.gatings, strict=False)])
                beyond.append([tokens.sum() for tokens in dropped if tokens is not None])
                if on_step:
                    on_step(numbers, step)
        _check_finite(numbers, first_bad.tolist(), sampler, f"guidance.scale={guidance.settings.scale:g}, {precision}")
        lengths = [tuple(None if branch is None else branch.cpu() for branch in branches) for branches in kept]
        flops = _step_flops(spent, lengths, len(numbers))
        yield SampleBatch(numbers, x.float().cpu(), lengths, flops, _sums(beyond))


class BranchCost:
    """The cost of a network, step by step where gates make it vary."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self._known: dict[Any, Cost] = {}

    def at(self, gating: Gating | None) -> Cost:
        """Return the cost of a step at which ``gating`` said what runs."""
        counts = None if gating is None else gating.counts
        assert (gating is None) == (counts is None)  # all samples of a step have one timestep
        if counts not in self._known:
            self._known[counts] = Cost.of_network(self.network, gating)
        return self._known[counts]


def _step_flops(costs: Sequence[Sequence[Cost]], lengths: Sequence[tuple[Tensor | None, ...]], samples: int) -> Tensor:
    """Return the FLOPs of each sample at each step, both branches, (steps, n) float64.

    Args:
        costs: of the branches that ran at each step.
        lengths, samples: see :class:`SampleBatch`.
    """
    none = torch.zeros(samples)  # of a network without router, whose cost is what it is
    flops = []
    for branches, ran in zip(lengths, costs, strict=True):
        kept = [none if branch is None else branch for branch in branches]
        flops.append(torch.stack([cost.of(tokens) for cost, tokens in zip(ran, kept, strict=True)]).sum(dim=0))
    return torch.stack(flops)


def _sums(steps: Sequence[Sequence[Tensor]]) -> tuple[int, ...]:
    """Return the sums of the numbers of each step, in one read from the device; () if no step has any."""
    counts = iter(torch.stack([count for step in steps for count in step]).tolist() if any(steps) else ())
    return tuple(sum(next(counts) for _ in step) for step in steps) if any(steps) else ()


_NEVER = 10**9


def _check_finite(numbers: list[int], first_bad: list[int], sampler: Sampler, how: str) -> None:
    """Raise :class:`UserError`, naming sample and step, if a sample was not finite after a step."""
    index = min(first_bad)
    if index < _NEVER:
        sample, timesteps = numbers[first_bad.index(index)], sampler.timesteps
        raise UserError(
            f"sample {sample} is not finite after step {index + 1} of {len(timesteps)} (timestep {timesteps[index]};"
            f" {how}): take a lower scale, precision=fp32, or another checkpoint"
        )
