"""What is kept of the features of a set of images."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dcdit.errors import UserError
from dcdit.runtime.files import read_arrays, replacing

_KEPT = 10_000  # features kept of a reference, from which KID draws its subsets


@dataclass(frozen=True)
class Statistics:
    """Features of a set of images, summed up.

    Attributes:
        count: number of images N.
        total: (F,) float64, sum of the features.
        outer: (F, F) float64, sum of their outer products.
        features: (n, F) float32, those of up to 10,000 of the images, evenly spaced.
    """

    count: int
    total: Tensor
    outer: Tensor
    features: Tensor

    @classmethod
    def of(cls, chunks: Iterable[Tensor], count: int) -> "Statistics":
        """Statistics of ``chunks``, each (n, F) float32, ``count`` rows in all."""
        kept = torch.from_numpy(np.linspace(0, count - 1, min(count, _KEPT)).round().astype(np.int64))
        total, outer, chosen, seen = torch.zeros(1), torch.zeros(1, 1), [], 0
        for chunk in chunks:
            wide = chunk.double()
            total, outer = total + wide.sum(dim=0), outer + wide.T @ wide
            chosen.append(chunk[kept[(kept >= seen) & (kept < seen + len(chunk))] - seen])
            seen += len(chunk)
        assert seen == count
        return cls(count, total, outer, torch.cat(chosen))

    def save(self, path: Path) -> None:
        """Write ``path``, whole or not at all."""
        arrays = {key: getattr(self, key).numpy() for key in ("total", "outer", "features")}
        with replacing(path) as file:
            np.savez(file, count=self.count, **arrays)

    @classmethod
    def load(cls, path: Path) -> "Statistics":
        """Read what :meth:`save` wrote; UserError if it is corrupt."""
        stored = read_arrays(path, ("count", "total", "outer", "features"), "delete it, it is computed again")
        count, total, outer, features = stored.values()
        width = total.shape[-1] if total.ndim == 1 else 0
        fits = count.ndim == 0 and outer.shape == (width, width) and features.shape[1:] == (width,)
        if not (fits and 0 < len(features) <= int(count)):
            raise UserError(f"{path} does not hold the statistics of features: delete it, it is computed again")
        return cls(int(count), *(torch.from_numpy(each) for each in (total, outer, features)))
