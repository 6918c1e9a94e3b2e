"""Sampled images for the model card of an exported network, a row for each budget."""

import io

import torch
import torch.nn.functional as F

from dcdit.checkpoints.export import Examples
from dcdit.checkpoints.settings import AssumeSettings
from dcdit.diffusion.settings import Auto, GuidanceSettings
from dcdit.sampling.figures import write_grid
from dcdit.sampling.pipeline import load
from dcdit.sampling.settings import ExamplesSettings

_SIDE = 128
"""Most pixels of the side of an image in the picture, which a card shows small."""


def sample_examples(checkpoint: str, weights: str, assume: AssumeSettings, settings: ExamplesSettings) -> Examples:
    """Sample the same images at every drop fraction, and say what they cost.

    Args:
        checkpoint, weights, assume: the network, as of :func:`dcdit.load`.
        settings: how many images, and how they are sampled.

    Raises:
        UserError: if the autoencoder cannot be loaded, or the network cannot do what the settings ask for.
    """
    pipeline = load(checkpoint, weights=weights, assume=assume)
    network, names = pipeline.model.network, pipeline.classes
    sampler = Auto(steps=settings.steps, noise=False).for_process(pipeline.model.process.settings)
    fractions = settings.drop_fractions if network.routes else [0.0]
    labels = (torch.arange(settings.columns) * len(names) // settings.columns).tolist()
    rows, budgets = [], []
    for fraction in fractions:
        guidance = GuidanceSettings(scale=settings.guidance_scale, drop_fraction=fraction)
        samples = pipeline.sample(labels, guidance=guidance, sampler=sampler)
        size = min(_SIDE, *samples.images.shape[2:])
        rows.append(F.adaptive_avg_pool2d(samples.images.float(), size))
        tflops = samples.flops.mean().item() / 1e12
        budgets.append({"row": len(rows), "drop_fraction": fraction, "tflops_per_image": tflops})
        if samples.kept is not None:
            budgets[-1]["keep_ratio"] = samples.kept.float().mean().item()
    file = io.BytesIO()
    write_grid(torch.cat(rows).round().to(torch.uint8), settings.columns, file)
    return Examples(file.getvalue(), f"{sampler.description}, guidance {settings.guidance_scale:g}", budgets)
