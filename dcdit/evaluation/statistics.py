"""Statistics of the features of a set of images, and the file that holds them."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dcdit.errors import UserError
from dcdit.evaluation.features import Features
from dcdit.runtime.files import read_arrays, replacing

_KEPT = 10_000  # features kept of a reference, for precision, recall and KID; as many as the ADM suite's archives hold


@dataclass(frozen=True)
class Moments:
    """Mean and covariance of features, as sums that can be added up.

    Attributes:
        count: number of images N.
        total: (F,) float64, sum of the features.
        outer: (F, F) float64, sum of their outer products.
    """

    count: int
    total: Tensor
    outer: Tensor

    @property
    def mean(self) -> Tensor:
        """The mean of the features, (F,) float64."""
        return self.total / self.count

    @classmethod
    def none(cls) -> "Moments":
        """Return the sums of no images."""
        return cls(0, torch.zeros(1).double(), torch.zeros(1, 1).double())

    @classmethod
    def of_gaussian(cls, mean: Tensor, covariance: Tensor) -> "Moments":
        """Return sums with exactly this mean (F,) and covariance (F, F), as if of two images."""
        mean, covariance = mean.double(), covariance.double()
        return cls(2, 2 * mean, covariance + 2 * torch.outer(mean, mean))

    def add(self, features: Tensor) -> "Moments":
        """Return the sums with ``features`` (n, F) added."""
        wide = features.double()
        return Moments(self.count + len(wide), self.total + wide.sum(dim=0), self.outer + wide.T @ wide)


@dataclass(frozen=True)
class Statistics:
    """Features of a set of images, summed up.

    Attributes:
        moments: of the features; those of a published archive are of more images than it holds.
        spatial: of the spatial features; of no images where there are none.
        features: (n, F) float32, those of up to 10,000 of the images, evenly spaced.
    """

    moments: Moments
    spatial: Moments
    features: Tensor

    @classmethod
    def of(cls, chunks: Iterable[Features], count: int) -> "Statistics":
        """Sum up the features of ``count`` images, which come in chunks."""
        kept = torch.from_numpy(np.linspace(0, count - 1, min(count, _KEPT)).round().astype(np.int64))
        moments, spatial, chosen = Moments.none(), Moments.none(), [torch.zeros(0, 0)]
        for chunk in chunks:
            seen, size = moments.count, len(chunk.features)
            moments = moments.add(chunk.features)
            if chunk.spatial is not None:
                spatial = spatial.add(chunk.spatial)
            chosen.append(chunk.features[kept[(kept >= seen) & (kept < seen + size)] - seen])
        assert moments.count == count
        return cls(moments, spatial, torch.cat(chosen[1:] or chosen))

    def save(self, path: Path) -> None:
        """Write the statistics to ``path``, whole or not at all."""
        arrays: dict[str, Any] = {"features": self.features.numpy()}
        for name, moments in (("", self.moments), ("spatial_", self.spatial)):
            arrays |= {f"{name}count": moments.count}
            arrays |= {f"{name}total": moments.total.numpy(), f"{name}outer": moments.outer.numpy()}
        with replacing(path) as file:
            np.savez(file, **arrays)

    @classmethod
    def load(cls, path: Path) -> "Statistics":
        """Read what :meth:`save` wrote; UserError if it is corrupt."""
        names = [f"{prefix}{name}" for prefix in ("", "spatial_") for name in ("count", "total", "outer")]
        stored = read_arrays(path, (*names, "features"), "delete it, it is computed again")
        both = []
        for prefix in ("", "spatial_"):
            count, total, outer = (stored[f"{prefix}{name}"] for name in ("count", "total", "outer"))
            if not (count.ndim == 0 and total.ndim == 1 and outer.shape == (*total.shape, *total.shape)):
                raise _corrupt(path)
            both.append(Moments(int(count), torch.from_numpy(total), torch.from_numpy(outer)))
        features = torch.from_numpy(stored["features"])
        if features.ndim != 2 or not 0 < len(features) <= both[0].count or features.shape[1:] != both[0].total.shape:
            raise _corrupt(path)
        return cls(both[0], both[1], features)


def _corrupt(path: Path) -> UserError:
    return UserError(f"{path} does not hold the statistics of features: delete it, it is computed again")
