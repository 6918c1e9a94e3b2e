"""Sampling from Python: ``dcdit.load("digits").sample(classes=[3, 5])``."""

from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor

from dcdit.checkpoints.load import Model
from dcdit.checkpoints.resolve import CheckpointSource, resolve_checkpoint
from dcdit.checkpoints.settings import AS_PUBLISHED, AssumeSettings, WeightsKind
from dcdit.checks import Count, Seed, conform
from dcdit.diffusion.samplers import Step
from dcdit.diffusion.settings import BudgetSettings, GuidanceSettings, SamplerSettings
from dcdit.sampling import setup
from dcdit.sampling.generate import SampleBatch
from dcdit.sampling.labels import resolve_labels
from dcdit.sampling.settings import Classes, SamplingConfig
from dcdit.sampling.setup import Loaded, build_sampling, meet_budget, with_guiding_model
from dcdit.settings.compose import compose_values, plain


@dataclass(frozen=True)
class Samples:
    """Sampled images, and what the network did for them.

    Attributes:
        images: (N, 1 or 3, height, width) uint8.
        latents: (N, C, H, W) float32.
        labels: (N,) the class of each image.
        kept: (steps, N, H, W) bool: the positions on which the main branch ran its backbone; None of a network without
            router.
        timesteps: of the steps, from noise to image.
        flops: (N,) of each image, over all steps and both branches.
    """

    images: Tensor
    latents: Tensor
    labels: Tensor
    kept: Tensor | None
    timesteps: tuple[float, ...]
    flops: Tensor

    def __repr__(self) -> str:
        kept = "" if self.kept is None else f", {self.kept.float().mean():.1%} of the positions kept"
        cost = f"{self.flops.mean() / 1e9:.3g} GFLOPs an image"
        return f"Samples({list(self.images.shape)} {self.images.dtype}, {len(self.timesteps)} steps, {cost}{kept})"

    def to_pil(self) -> list[Image.Image]:
        """Return the images for Pillow: greyscale where they have one channel, else RGB."""
        return [Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy()) for image in self.images]


class Pipeline:
    """A trained network with all that sampling needs; :func:`load` makes it.

    Attributes:
        model: the network, its latents and its diffusion process.
        classes: names of its classes; a label is an index into them.
    """

    def __init__(self, config: SamplingConfig, source: CheckpointSource, loaded: Loaded) -> None:
        self._config, self._source, self._loaded = config, source, loaded
        self.model: Model = loaded.model
        self.classes: tuple[str, ...] = tuple(loaded.model.latents.classes)

    def __repr__(self) -> str:
        network = self.model.network
        shape = " x ".join(map(str, self.model.latents.shape))
        return f"Pipeline({self._source.name}: {network.title}, latents of {shape}, {len(self.classes)} classes)"

    def sample(
        self,
        classes: Classes,
        per_class: int = 1,
        seed: int = 0,
        *,
        guidance: GuidanceSettings | None = None,
        sampler: SamplerSettings | None = None,
        budget: BudgetSettings | None = None,
        batch_size: int = 64,
    ) -> Samples:
        """Sample ``per_class`` images of each class, with the numbers that ``dcdit sample`` takes.

        Args:
            classes: labels or class names.
            seed: of all noise; image i depends on it and on i alone, up to rounding.
            guidance: guidance and drop fraction; None samples without guidance and without drops.
            sampler: such as ``Heun(steps=15)`` from :mod:`dcdit.diffusion.settings`; None takes that of the command.
            budget: such as ``BudgetSettings(fraction=0.6)``; it is met by a short calibration, which is kept.
            batch_size: images of a forward pass.

        Raises:
            UserError: for an unknown class, or settings that do not fit the network or each other.
        """
        config = replace(
            self._config,
            seed=conform("seed", seed, Seed),
            batch_size=conform("batch_size", batch_size, Count),
            guidance=guidance or self._config.guidance,
            sampler=sampler or self._config.sampler,
            budget=budget or self._config.budget,
        )
        classes = conform("classes", classes, Classes)
        labels = resolve_labels(classes, self.classes, conform("per_class", per_class, Count))
        sampling = build_sampling(config, self._source, with_guiding_model(self._loaded, config))
        if config.budget.given:
            sampling = meet_budget(sampling)
        kept: dict[int, list[Tensor]] = {step: [] for step in range(len(sampling.sampler.timesteps))}

        def record(_: list[int], step: Step) -> None:
            routing = step.output.routings[0]
            if routing is not None:
                kept[step.index].append(routing.mask.unflatten(1, step.x.shape[2:]).cpu())

        batches: list[SampleBatch] = list(sampling.generate(labels, range(len(labels)), record))
        return Samples(
            images=torch.cat([sampling.images(batch) for batch in batches]).cpu(),
            latents=torch.cat([batch.latents for batch in batches]),
            labels=labels,
            kept=torch.stack([torch.cat(masks) for masks in kept.values()]) if kept[0] else None,
            timesteps=tuple(sampling.sampler.timesteps),
            flops=torch.cat([batch.flops for batch in batches]),
        )


def load(
    checkpoint: str, *, weights: WeightsKind = "ema", device: str = "auto", assume: AssumeSettings = AS_PUBLISHED
) -> Pipeline:
    """Load a trained network, to sample from it.

    Args:
        checkpoint: a run's directory, an exported folder, a file, ``hf://owner/repository/folder``, or ``digits``,
            which comes with the package.
        weights: ``ema``, ``raw``, or an average of a length such as ``ema@0.05``.
        device: ``auto`` takes a GPU where there is one; or a device of torch, such as ``cuda:1``.
        assume: what files of other programs do not say.

    Raises:
        UserError: if there is no such checkpoint, or it cannot be read.
    """
    asked = {"checkpoint": checkpoint, "weights": weights, "device": device, "assume": assume}
    config = SamplingConfig.of(plain(compose_values("sample")) | asked)
    source = resolve_checkpoint(config.checkpoint, config.paths.runs)
    return Pipeline(config, source, setup.load(config, source))
