"""Pictures of samples and of the router's boundary maps."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dcdit.checks import visible
from dcdit.data.decoder import Decoder
from dcdit.diffusion.samplers import Step
from dcdit.runtime.files import replacing
from dcdit.sampling.overlays import DROPPED, KEPT, PROBABILITY, Pixels, fitted, overlay, probabilities


@dataclass(frozen=True)
class Boundaries:
    """What the router said of one sample.

    Attributes:
        prob: (H, W) boundary probability.
        natural: (H, W) bool, the positions that the router kept by itself.
        mask: (H, W) bool, those that ran; none where features were reused.
    """

    prob: NDArray[Any]
    natural: NDArray[np.bool_]
    mask: NDArray[np.bool_]

    @property
    def caption(self) -> str:
        """How much ran, for people."""
        return f"kept {self.mask.mean():.0%}" if self.mask.any() else "features reused"


@dataclass(frozen=True)
class Moment:
    """One sample at one evaluation of the network, all on the CPU.

    Attributes:
        timestep: that the network was told.
        x: (C, H, W) noisy latents.
        clean: (C, H, W) the image that the prediction amounts to, x_0.
        boundaries: None of a network without router.
    """

    timestep: float
    x: Tensor
    clean: Tensor
    boundaries: Boundaries | None


class Recorder:
    """Records moments of a few samples on their way from noise, while they are sampled.

    Args:
        shown: numbers of these samples.
        moments: how many of each, evenly spaced over ``steps``; None for all.
        steps: of the sampler.
        clean: what :meth:`dcdit.diffusion.process.Process.clean` is.

    Attributes:
        rows: the moments of each sample.
    """

    def __init__(
        self, shown: Sequence[int], moments: int | None, steps: int, clean: Callable[[Tensor, Tensor, float], Tensor]
    ) -> None:
        self.rows: dict[int, list[Moment]] = {number: [] for number in shown}
        at = np.linspace(0, steps - 1, steps if moments is None else min(moments, steps))
        self._at = set(at.round().astype(int).tolist())
        self._clean = clean

    def take(self, numbers: Sequence[int], step: Step) -> None:
        """Record a step of the samples ``numbers``, if it is one of those wanted."""
        if step.index not in self._at or not self.rows.keys() & set(numbers):
            return
        clean = self._clean(step.output.prediction.float(), step.x, step.timestep)
        routing = step.output.routings[0]
        for row, number in enumerate(numbers):
            if number in self.rows:
                boundaries = None
                if routing is not None:
                    maps = (routing.prob, routing.natural_mask, routing.mask)
                    boundaries = Boundaries(*(tensor[row].view(step.x.shape[2:]).cpu().numpy() for tensor in maps))
                x, x_0 = (latents[row].float().cpu() for latents in (step.x, clean))
                self.rows[number].append(Moment(step.timestep, x, x_0, boundaries))


def save_grid(images: Tensor, columns: int, path: Path, least_side: int = 64) -> None:
    """Save ``images`` (N, 1 or 3, height, width) uint8 as one PNG; small images are enlarged, pixels kept sharp."""
    with replacing(path) as file:
        write_grid(images, columns, file, least_side)


def write_grid(images: Tensor, columns: int, file: BinaryIO, least_side: int = 64) -> None:
    """Write what :func:`save_grid` saves into an open ``file``."""
    from torchvision.utils import save_image

    factor = max(1, -(-least_side // images.shape[-1]))
    images = images.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    save_image(images.float() / 255, file, format="png", nrow=columns, padding=2, pad_value=0.5)


def decoded(latents: Sequence[Tensor], decode: Decoder) -> list[NDArray[Any]]:
    """Return the images (height, width, 1 or 3) uint8 of latents (C, H, W) each."""
    return [image.permute(1, 2, 0).cpu().numpy() for image in decode(torch.stack(list(latents)))]


def panels(moment: Moment, noisy: NDArray[Any], clean: NDArray[Any], least: int = 256) -> list[tuple[str, Pixels]]:
    """Return pictures of one moment with their captions, for :func:`dcdit.sampling.overlays.side_by_side`.

    Args:
        moment: what is shown.
        noisy, clean: its decoded latents (height, width, 1 or 3).
        least: side that small images are enlarged to; large ones are reduced, to bound the memory of many panels.
    """
    large = fitted(clean, least)
    pictures = [(f"x_t, t = {moment.timestep:.0f}", fitted(noisy, least)), ("x_0 predicted", large)]
    if moment.boundaries is not None:
        prob, natural, mask = moment.boundaries.prob, moment.boundaries.natural, moment.boundaries.mask
        pictures.append((moment.boundaries.caption, overlay(large, mask, natural)))
        pictures.append(("boundary p, kept in white", probabilities(prob, mask, *large.shape[:2])))
    return pictures


def panels_of(moments: Sequence[Moment], decode: Decoder, least: int = 256) -> list[list[tuple[str, Pixels]]]:
    """Return the :func:`panels` of each moment."""
    noisy, clean = (decoded([getattr(moment, name) for moment in moments], decode) for name in ("x", "clean"))
    return [panels(*images, least) for images in zip(moments, noisy, clean, strict=True)]


def save_boundaries(
    rows: Sequence[Sequence[Moment]], titles: Sequence[str], decode: Decoder, path: Path, title: str, least: int = 128
) -> None:
    """Save x_t, the x_0 predicted of it and the boundary probability, one column per timestep (paper, figure 3).

    Over x_0 the positions that did not run are shaded; those that the router kept and the tail drop left out have an
    outline of their own. The keep ratio stands under each.

    Args:
        rows: for each sample its moments, all at the same timesteps.
        titles: one per sample.
        decode: latents to images.
        path: PNG to write.
        title: of the picture: model, step, budget, cost.
        least: side that small images are enlarged to.
    """
    import matplotlib  # a second that those who save no such picture need not wait

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.patches import Patch

    height, width = 3 * len(rows), len(rows[0])
    figure, axes = plt.subplots(
        height, width, figsize=(1.25 * width + 1, 1.3 * height + 0.8), squeeze=False, layout="constrained"
    )
    for number, (row, name) in enumerate(zip(rows, titles, strict=True)):
        sample_axes = axes[3 * number : 3 * number + 3]
        for column, (moment, pictures) in enumerate(zip(row, panels_of(row, decode, least), strict=True)):
            noisy, _, (kept, overlaid), (_, prob) = pictures
            for axis, picture in zip(sample_axes[:, column], (noisy[1], overlaid, prob), strict=True):
                axis.imshow(picture)
            sample_axes[2][column].set_xlabel(kept, fontsize=8)
            if number == 0:
                sample_axes[0][column].set_title(f"t = {moment.timestep:.0f}", fontsize=9)
        sample_axes[0][0].set_ylabel(f"{visible(name)}: x_t", fontsize=9, parse_math=False)
        sample_axes[1][0].set_ylabel("x_0 predicted", fontsize=8)
        sample_axes[2][0].set_ylabel("boundary p", fontsize=8)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    marks = [
        Patch(facecolor="none", edgecolor="#" + bytes(colour).hex(), label=label)
        for colour, label in ((KEPT, "kept"), (DROPPED, "kept by the router, dropped by the tail drop"))
    ]
    figure.legend(handles=marks, loc="outside lower left", ncols=2, fontsize=8, frameon=False)
    figure.suptitle(visible(title), fontsize=9, parse_math=False)
    shades = ScalarMappable(Normalize(0, 1), PROBABILITY)
    figure.colorbar(shades, ax=axes, fraction=0.03, aspect=40, label="boundary probability")
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=130)
    plt.close(figure)
