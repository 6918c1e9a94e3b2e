"""Samples of a few classes as files: latents, a picture of all, and the way of some with the router's boundaries."""

from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import Progress
from torch import Tensor

from dcdit.checks import visible
from dcdit.compute.table import format_flops
from dcdit.diffusion.samplers import Step
from dcdit.errors import UserError
from dcdit.runtime.display import Console
from dcdit.runtime.files import make_writable_folder, replacing
from dcdit.sampling.cost import SamplingCost
from dcdit.sampling.figures import Moment, Recorder, panels_of, save_boundaries, save_grid
from dcdit.sampling.generate import SampleBatch
from dcdit.sampling.labels import resolve_labels
from dcdit.sampling.overlays import Pixels, fitted, save_animation, side_by_side
from dcdit.sampling.setup import Sampling

_MOST_FRAMES = 50
"""Most frames of an animation."""
_FILES = ("samples.png", "boundaries.png", "latents.npz", "trajectory.gif", "trajectory.webp")
"""Names of the files that a call may write."""
_MOST_PIXELS = 1 << 27
"""Most pixels of a picture of samples: 2,048 images at 256px, which take 2 GB of memory."""
_SHOWN = 4
"""Samples in the picture of boundaries, the first of each class."""


def _put_aside(out: Path) -> None:
    """Move what an earlier call wrote into ``out`` to ``out/earlier/<number>``, where nothing is written over."""
    earlier = [out / name for name in _FILES if (out / name).exists()]
    if earlier:
        folder = next(path for number in count(1) if not (path := out / "earlier" / f"{number:04d}").exists())
        folder.mkdir(parents=True)
        for path in earlier:
            path.rename(folder / path.name)


def animation_frames(moments: Sequence[Moment], image: NDArray[Any], sampling: Sampling, title: str) -> list[Pixels]:
    """Return one picture for each moment of a sample, and the finished ``image`` (height, width, 1 or 3) at the end."""
    frames = panels_of(moments, sampling.decode)
    last = [("image", fitted(image, 256)), *frames[-1][1:]]
    return [side_by_side(panels, title) for panels in (*frames, last)]


def _check_number(count: int, per_class: int, sampling: Sampling) -> None:
    """Raise :class:`UserError` if ``count`` images are too many for one picture."""
    height, width = sampling.decode.size(sampling.model.device)
    if count * max(height, 64) * max(width, 64) > _MOST_PIXELS:
        raise UserError(
            f"per_class={per_class}: {count} images of {width} x {height} pixels are too many for one picture:"
            " take fewer, or dcdit.generate"
        )


def _sample(sampling: Sampling, labels: Tensor, recorders: Sequence[Recorder]) -> list[SampleBatch]:
    """Sample one image of each label, watched by ``recorders``, beside a progress bar."""
    batches = -(-len(labels) // sampling.config.batch_size)
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("sampling", total=batches * len(sampling.sampler.timesteps))

        def on_step(numbers: list[int], step: Step) -> None:
            for recorder in recorders:
                recorder.take(numbers, step)
            progress.advance(task)

        return list(sampling.generate(labels, range(len(labels)), on_step))


def _describe_samples(count: int, cost: SamplingCost, sampling: Sampling) -> str:
    """Describe what was sampled, how, and at what cost."""
    text = f"{count} samples, {format_flops(cost.flops / cost.images)} per image"
    if sampling.model.network.routes:
        text += f", {cost.mean_keep_ratio(sampling.model.latents.positions):.1%} of the tokens kept"
        if sampling.sampler.settings.cache:
            text += f", {cost.computed_share:.0%} of the steps computed and the others reused, which keep none"
        drops = sampling.guidance.settings.main_drop_fractions
        text += f", ρ {' to '.join(f'{drop:.3g}' for drop in sorted({min(drops), max(drops)}))}"
    return f"{text}, {sampling.sampler.settings.description}"


def sample_to_folder(
    sampling: Sampling,
    classes: Sequence[int | str] | None,
    per_class: int,
    frames: int,
    animation: str | None,
    out: Path,
) -> str:
    """Write ``samples.png``, ``latents.npz`` and, of a network that routes, ``boundaries.png`` into ``out``.

    What an earlier call wrote there is kept, in ``out/earlier/<number>``.

    Args:
        sampling: what samples.
        classes, per_class: see :func:`dcdit.sampling.labels.resolve_labels`.
        frames: columns of ``boundaries.png``; 0 leaves the picture out.
        animation: ``gif`` or ``webp``: the way of the first sample from noise to image, as ``trajectory`` beside.
        out: folder, made if needed.

    Returns:
        A description of the samples, for the user.
    """
    model, steps = sampling.model, len(sampling.sampler.timesteps)
    labels = resolve_labels(classes, model.latents.classes, per_class)
    _check_number(len(labels), per_class, sampling)
    make_writable_folder(out, f"out={out}")
    shown = list(range(0, len(labels), per_class))[:_SHOWN]
    recorder = Recorder(shown, frames, steps, model.process.clean)
    moving = Recorder(shown[:1] if animation else [], _MOST_FRAMES, steps, model.process.clean)
    batches = _sample(sampling, labels, [recorder, moving])
    images = torch.cat([sampling.images(batch) for batch in batches])
    cost = SamplingCost.total(map(SamplingCost.of, batches))
    title = visible(f"{sampling.description}, {format_flops(cost.flops / cost.images)}")
    _put_aside(out)
    with replacing(out / "latents.npz") as file:
        np.savez(file, latents=torch.cat([batch.latents for batch in batches]).numpy(), labels=labels.numpy())
    save_grid(images, per_class, out / "samples.png")
    for moments in moving.rows.values():
        first = images[0].permute(1, 2, 0).cpu().numpy()
        save_animation(animation_frames(moments, first, sampling, title), out / f"trajectory.{animation}")
    if frames and model.network.routes:
        titles = [visible(model.latents.classes[int(labels[number])]) for number in shown]
        save_boundaries(list(recorder.rows.values()), titles, sampling.decode, out / "boundaries.png", title)
    return "\n".join(filter(None, [f"{_describe_samples(len(labels), cost, sampling)}: {out}", sampling.dropped(cost)]))
