"""Pictures of samples and of the router's boundary maps."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from torch import Tensor
from torchvision.utils import save_image

from dcdit.data.autoencoder import Decoder
from dcdit.diffusion.samplers import Step
from dcdit.runtime.files import replacing

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection


@dataclass(frozen=True)
class Frame:
    """One sample at one timestep.

    Attributes:
        timestep: that the network was told.
        image: (height, width, 1 or 3) uint8, the decoded x_t.
        prob: (H, W) boundary probability.
        mask: (H, W) bool, the kept positions.
    """

    timestep: float
    image: Tensor
    prob: Tensor
    mask: Tensor


class Frames:
    """Pictures of some samples on their way, taken while they are sampled.

    Args:
        shown: numbers of these samples.
        wanted: how many pictures of each, evenly spaced over ``steps``.
        steps: of the sampler.
        decode: latents to images.
    """

    def __init__(self, shown: list[int], wanted: int, steps: int, decode: Decoder) -> None:
        self.rows: dict[int, list[Frame]] = {number: [] for number in shown}
        self._at = set(np.linspace(0, steps - 1, wanted).round().astype(int).tolist())
        self._decode = decode

    def take(self, numbers: list[int], step: Step) -> None:
        """Look at a step of the samples ``numbers``."""
        routing = step.output.halves[0]
        if routing is None or step.index not in self._at:
            return
        for place, number in enumerate(numbers):
            if number in self.rows:
                image = self._decode(step.x[place : place + 1])[0].permute(1, 2, 0).cpu()
                prob, mask = (x[place].view(step.x.shape[2:]).cpu() for x in (routing.prob, routing.mask))
                self.rows[number].append(Frame(step.timestep, image, prob, mask))


def save_grid(images: Tensor, columns: int, path: Path, least_side: int = 64) -> None:
    """Save ``images`` (N, 1 or 3, height, width) uint8 as one PNG; small images are enlarged, pixels kept sharp."""
    factor = max(1, -(-least_side // images.shape[-1]))
    enlarged = images.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    with replacing(path) as file:
        save_image(enlarged.float() / 255, file, format="png", nrow=columns, padding=2, pad_value=0.5)


def _outline(axes: Axes, mask: Tensor) -> None:
    """Draw the borders of the pixels where ``mask`` (H, W) holds, corners included."""
    around = np.pad(mask.numpy(), 1)
    vertical = np.argwhere(around[1:-1, 1:] != around[1:-1, :-1])  # (row, column) of a border left of a pixel
    horizontal = np.argwhere(around[1:, 1:-1] != around[:-1, 1:-1])  # above a pixel
    lines = [[(x - 0.5, y - 0.5), (x - 0.5, y + 0.5)] for y, x in vertical]
    lines += [[(x - 0.5, y - 0.5), (x + 0.5, y - 0.5)] for y, x in horizontal]
    axes.add_collection(LineCollection(lines, colors="white", linewidths=0.6))


def save_boundaries(rows: Sequence[Sequence[Frame]], titles: Sequence[str], path: Path) -> None:
    """Save x_t above its boundary probability, one column per timestep, the keep ratio under each (paper, figure 3).

    Args:
        rows: for each sample its frames, all at the same timesteps.
        titles: one per sample.
        path: PNG to write.
    """
    height, width = 2 * len(rows), len(rows[0])
    figure, axes = plt.subplots(
        height, width, figsize=(1.15 * width + 1, 1.22 * height), squeeze=False, layout="constrained"
    )
    for number, (row, title) in enumerate(zip(rows, titles, strict=True)):
        for column, frame in enumerate(row):
            top, bottom = axes[2 * number][column], axes[2 * number + 1][column]
            image = frame.image.numpy()
            top.imshow(image if image.shape[-1] == 3 else image[..., 0], cmap="gray", vmin=0, vmax=255)
            shades = bottom.imshow(frame.prob.numpy(), cmap="magma", vmin=0, vmax=1)
            _outline(bottom, frame.mask)
            kept = f"kept {frame.mask.float().mean():.0%}" if frame.mask.any() else "reused"
            bottom.set_xlabel(kept, fontsize=8)
            if number == 0:
                top.set_title(f"t = {frame.timestep:.0f}", fontsize=9)
        axes[2 * number][0].set_ylabel(title, fontsize=9, parse_math=False)
        axes[2 * number + 1][0].set_ylabel("boundary p", fontsize=8)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    figure.colorbar(shades, ax=axes, fraction=0.03, aspect=40, label="boundary probability")
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=130)
    plt.close(figure)
