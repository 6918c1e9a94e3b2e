"""What scoring asks of a set of images, whatever form it has."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dcdit.evaluation.features import FeatureNetwork
from dcdit.evaluation.statistics import Moments


class ImageSet(ABC):
    """A set of images, numbered from 0.

    Attributes:
        key: that a user named them with, ``reference`` or ``images``, for messages.
        source: path or URL, for messages.
        count: number of images; 0 of an archive that holds statistics alone.
        size: height and width.
    """

    key: str
    source: str
    count: int
    size: tuple[int, int]

    @abstractmethod
    def read(self, numbers: Sequence[int]) -> Tensor:
        """Read the images of these numbers, (n, 1 or 3, height, width) uint8; raise UserError if one cannot be read."""

    @abstractmethod
    def described(self) -> dict[str, Any]:
        """Return plain values that identify the images: other images have other values."""

    def moments(self, network: FeatureNetwork) -> dict[str, Moments]:
        """Return statistics that come with the images and stand for a larger set: of ``features``, ``spatial`` ones."""
        return {}
