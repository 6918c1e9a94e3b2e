"""The Euclidean distance of the mean features of real and generated images."""

from collections.abc import Callable, Iterable
from typing import Any

from dcdit.evaluation.settings import METRICS, Figure, Metric


def compute_mean(reference: Any, chunks: Callable[[], Iterable[Any]]) -> dict[str, float]:
    """The figure ``mean_distance``.

    Args:
        reference: the statistics of the real images, a ``dcdit.evaluation.statistics.Statistics``.
        chunks: returns the generated images piece by piece, with ``features`` (N, F) each.
    """
    sums = sum(chunk.features.double().sum(dim=0) for chunk in chunks())
    count = sum(len(chunk.features) for chunk in chunks())
    return {"mean_distance": float((sums / count - reference.moments.mean).norm())}


METRICS["mean"] = Metric((Figure("mean_distance", "mean"),), compute_mean, "features")
