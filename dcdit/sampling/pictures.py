"""Samples of a few classes as files: latents, a picture of all, and the way of some with the router's boundaries."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from dcdit.diffusion.samplers import Step
from dcdit.errors import UserError
from dcdit.runtime.files import replacing, writable_folder
from dcdit.sampling.figures import Frames, save_boundaries, save_grid
from dcdit.sampling.setup import Sampling

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


def sample_to_folder(
    sampling: Sampling, classes: Sequence[int | str] | None, per_class: int, frames: int, out: Path
) -> str:
    """Write ``samples.png``, ``latents.npz`` and, of a network that routes, ``boundaries.png`` into ``out``.

    Args:
        sampling: what samples.
        classes, per_class: see :func:`resolve_labels`.
        frames: columns of ``boundaries.png``; 0 leaves the picture out.
        out: folder, made if needed.

    Returns:
        What there is now, in words.
    """
    model, steps = sampling.model, len(sampling.sampler.timesteps)
    labels = resolve_labels(classes, model.latents.classes, per_class)
    shown = list(range(0, len(labels), per_class))[:_SHOWN]
    writable_folder(out, f"out={out}")
    taken = Frames(shown, frames, steps, sampling.decode)
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("sampling", total=-(-len(labels) // sampling.batch_size) * steps)

        def on_step(numbers: list[int], step: Step) -> None:
            taken.take(numbers, step)
            progress.advance(task)

        batches = list(sampling.generate(labels, range(len(labels)), on_step))

    latents = torch.cat([batch.latents for batch in batches])
    images = torch.cat([sampling.images(batch) for batch in batches])
    with replacing(out / "latents.npz") as file:
        np.savez(file, latents=latents.numpy(), labels=labels.numpy())
    save_grid(images, per_class, out / "samples.png")
    if frames and model.network.routes:
        titles = [model.latents.classes[int(labels[number])] for number in shown]
        save_boundaries(list(taken.rows.values()), titles, out / "boundaries.png")
    words = f", {torch.cat([batch.flops for batch in batches]).mean() / 1e12:.3g} TFLOPs per image"
    if model.network.routes:
        kept = torch.cat([batch.kept for batch in batches]).mean() / model.latents.positions
        words += f", {kept:.1%} of the tokens kept"
        if sampling.sampler.settings.cache:
            ran = torch.cat([batch.computed for batch in batches]).mean()
            words += f", {ran:.0%} of the steps computed and the others reused, which keep none"
    sampler = sampling.sampler.settings
    words += f", {sampler.name} {sampler.steps} steps"
    return f"{len(labels)} samples{words}: {out}"
