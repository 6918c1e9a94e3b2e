"""Mean and deviation of latents, summed up while they are written, and the scale and shift that follow from them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from dcdit.checks import Bounds, Natural
from dcdit.data.latents import LatentScale, LatentShift, LatentStatistics
from dcdit.data.manifest import MOMENTS, Representation
from dcdit.errors import UserError

_Sum = Annotated[float, Bounds(-1e100, 1e100)]  # of squares of any number that float32 holds
StoredArray = NDArray[np.float16] | NDArray[np.float32]
"""Latents (C, H, W), or moments (2C, H, W), in the stored type; in extraction, batches of them."""

_CONSTANT = 1e-6
"""Deviation, relative to the mean, below which values are all the same but for rounding."""


@dataclass(frozen=True)
class Sums:
    """Sums over the latents of a shard; those of shards are added in their order, so that the result has the same bits.

    Attributes:
        count: summands of each sum.
        values, squares: expected values and squares, for each channel or for each element in the order (C, H, W).
    """

    count: Natural
    values: tuple[_Sum, ...]
    squares: tuple[_Sum, ...]

    @classmethod
    def total(cls, parts: Sequence["Sums"]) -> "Sums":
        """The sums over several shards; :class:`UserError` if there is no latent in them."""
        count = sum(part.count for part in parts)
        if count == 0:
            raise UserError("not one latent is finite: try precision=fp32, dtype=float32 or another autoencoder")
        values, squares = (
            tuple(np.sum([getattr(part, name) for part in parts], axis=0).tolist()) for name in ("values", "squares")
        )
        return cls(count, values, squares)

    @property
    def mean_and_deviation(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean and deviation of each channel or element, as arrays."""
        mean = np.array(self.values) / self.count
        return mean, np.sqrt(np.maximum(np.array(self.squares) / self.count - mean**2, 0))

    def by_channel(self, channels: int) -> "Sums":
        """These sums with the elements of each channel added up."""
        if len(self.values) == channels:
            return self
        values, squares = (
            tuple(np.reshape(sums, (channels, -1)).sum(axis=1).tolist()) for sums in (self.values, self.squares)
        )
        return Sums(self.count * (len(self.values) // channels), values, squares)

    def statistics(self, channels: int) -> LatentStatistics:
        """Mean and deviation of each channel, for the manifest."""
        mean, deviation = self.by_channel(channels).mean_and_deviation
        return LatentStatistics(tuple(mean.tolist()), tuple(deviation.tolist()))

    def normalisation(self, shape: tuple[int, int, int]) -> tuple[LatentScale, LatentShift]:
        """Scale and shift, for latents (C, H, W), that give each channel or element mean 0 and deviation 1.

        The scale of a constant one is 1.
        """
        shift, deviation = self.mean_and_deviation
        return _as_tuples(_scale_of(shift, deviation), shape), _as_tuples(shift, shape)


def normalisation_of(statistics: LatentStatistics) -> tuple[LatentScale, LatentShift]:
    """Scale and shift for each channel, as :meth:`Sums.normalisation` computes them."""
    return tuple(_scale_of(np.array(statistics.mean), np.array(statistics.deviation)).tolist()), statistics.mean


def _scale_of(mean: NDArray[np.float64], deviation: NDArray[np.float64]) -> NDArray[np.float64]:
    scale: NDArray[np.float64] = 1 / np.where(deviation > _CONSTANT * np.maximum(np.abs(mean), 1), deviation, 1)
    return scale


def _as_tuples(values: NDArray[np.float64], shape: tuple[int, int, int]) -> LatentScale:
    """Numbers of channels as one tuple, numbers of elements as nested tuples (C, H, W)."""
    if len(values) == shape[0]:
        return tuple(values.tolist())
    return tuple(tuple(tuple(row) for row in plane) for plane in values.reshape(shape).tolist())


class Tally:
    """Sums up stored arrays one by one; those that are not finite, which no reader accepts, are left out.

    Args:
        shape: (C, H, W) of a latent.
        representation: of the stored arrays. Of moments, the expectations over the posterior are summed: the mean,
            and its square plus the variance.
        by_element: sum up each element of its own instead of each channel.
    """

    def __init__(self, shape: tuple[int, int, int], representation: Representation, by_element: bool = False) -> None:
        self.shape, self.moments, self.by_element = shape, representation == MOMENTS, by_element
        self._count, self._sums = 0, np.zeros((2, *shape))

    def add(self, stored: StoredArray) -> None:
        """Add a stored array (C, H, W), or (2C, H, W) of moments."""
        if not np.isfinite(stored).all():
            return
        values = stored.astype(np.float64)
        variance: NDArray[np.float64] | float = 0.0
        if self.moments:
            values, log_variance = np.split(values, 2)
            variance = np.exp(np.minimum(log_variance, 50))
        self._count += 1
        self._sums[0] += values
        self._sums[1] += values**2 + variance

    @property
    def sums(self) -> Sums:
        """The sums over all arrays added so far."""
        values, squares = (tuple(array.ravel().tolist()) for array in self._sums)
        sums = Sums(self._count, values, squares)
        return sums if self.by_element else sums.by_channel(self.shape[0])
