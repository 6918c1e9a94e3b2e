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
from dcdit.sampling.figures import Moment, Recorder, decoded, panels, save_boundaries, save_grid
from dcdit.sampling.overlays import Pixels, enlarged, save_animation, side_by_side
from dcdit.sampling.setup import Sampling

_MOST_FRAMES = 50
"""Of an animation."""
_FILES = ("samples.png", "boundaries.png", "latents.npz", "trajectory.gif", "trajectory.webp")
"""What a call writes."""
_MOST_PIXELS = 1 << 27
"""Of a picture of samples: 2,048 images at 256px; 2 GB of memory."""
_SHOWN = 4
"""Samples in the picture of boundaries, the first of each class."""


def resolve_labels(classes: Sequence[int | str] | None, names: Sequence[str], per_class: int) -> Tensor:
    """Labels (N,) of all samples asked for, class by class.

    Args:
        classes: labels or class names; None takes the first ten.
        names: of the classes that the checkpoint knows.
        per_class: samples of each class.

    Raises:
        UserError: for a class that the checkpoint does not know.
    """
    labels = []
    for wanted in classes if classes is not None else range(min(10, len(names))):
        if str(wanted) in names:
            labels.append(names.index(str(wanted)))
        elif isinstance(wanted, int) and 0 <= wanted < len(names):
            labels.append(wanted)
        else:
            raise UserError(f"classes: {wanted!r} is neither a class name nor a label in 0..{len(names) - 1}")
    return torch.tensor(labels).repeat_interleave(per_class)


def _put_aside(out: Path) -> None:
    """Move what an earlier call wrote into ``out`` to ``out/earlier/<number>``, where nothing is written over."""
    there = [out / name for name in _FILES if (out / name).exists()]
    if there:
        aside = next(path for number in count(1) if not (path := out / "earlier" / f"{number:04d}").exists())
        aside.mkdir(parents=True)
        for path in there:
            path.rename(aside / path.name)


def animation_frames(moments: Sequence[Moment], image: NDArray[Any], sampling: Sampling, title: str) -> list[Pixels]:
    """One picture for each moment of a sample, and the finished ``image`` (height, width, 1 or 3) at the end."""
    noisy, clean = ([getattr(each, name) for each in moments] for name in ("x", "clean"))
    images = zip(moments, decoded(noisy, sampling.decode), decoded(clean, sampling.decode), strict=True)
    found = [panels(*each) for each in images]
    last = [("image", enlarged(image, 256)), *found[-1][1:]]
    return [side_by_side(each, title) for each in (*found, last)]


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
        classes, per_class: see :func:`resolve_labels`.
        frames: columns of ``boundaries.png``; 0 leaves the picture out.
        animation: ``gif`` or ``webp``: the way of the first sample from noise to image, as ``trajectory`` beside.
        out: folder, made if needed.

    Returns:
        What there is now, in words.
    """
    model, steps = sampling.model, len(sampling.sampler.timesteps)
    labels = resolve_labels(classes, model.latents.classes, per_class)
    shown = list(range(0, len(labels), per_class))[:_SHOWN]
    height, width = sampling.decode.size(model.device)
    if len(labels) * max(height, 64) * max(width, 64) > _MOST_PIXELS:
        raise UserError(
            f"per_class={per_class}: {len(labels)} images of {width} x {height} pixels are too many for one picture:"
            " take fewer, or dcdit.generate"
        )
    make_writable_folder(out, f"out={out}")
    recorder = Recorder(shown, frames, steps, model.process.clean)
    moving = Recorder(shown[:1] if animation else [], _MOST_FRAMES, steps, model.process.clean)
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("sampling", total=-(-len(labels) // sampling.batch_size) * steps)

        def on_step(numbers: list[int], step: Step) -> None:
            recorder.take(numbers, step)
            moving.take(numbers, step)
            progress.advance(task)

        batches = list(sampling.generate(labels, range(len(labels)), on_step))

    latents = torch.cat([batch.latents for batch in batches])
    images = torch.cat([sampling.images(batch) for batch in batches])
    _put_aside(out)
    with replacing(out / "latents.npz") as file:
        np.savez(file, latents=latents.numpy(), labels=labels.numpy())
    save_grid(images, per_class, out / "samples.png")
    cost = SamplingCost.total(map(SamplingCost.of, batches))
    flops = cost.flops / cost.images
    title = visible(f"{sampling.words}, {format_flops(flops)}")
    for moments in moving.rows.values():
        first = images[0].permute(1, 2, 0).cpu().numpy()
        save_animation(animation_frames(moments, first, sampling, title), out / f"trajectory.{animation}")
    if frames and model.network.routes:
        titles = [visible(model.latents.classes[int(labels[number])]) for number in shown]
        rows = list(recorder.rows.values())
        save_boundaries(rows, titles, sampling.decode, out / "boundaries.png", title)
    words = f", {format_flops(flops)} per image"
    if model.network.routes:
        words += f", {cost.mean_keep_ratio(model.latents.positions):.1%} of the tokens kept"
        if sampling.sampler.settings.cache:
            words += f", {cost.computed_share:.0%} of the steps computed and the others reused, which keep none"
        drops = sampling.guidance.settings.main_drop_fractions
        words += f", ρ {' to '.join(f'{drop:.3g}' for drop in sorted({min(drops), max(drops)}))}"
    words += f", {sampling.sampler.settings.description}"
    return f"{len(labels)} samples{words}: {out}"
