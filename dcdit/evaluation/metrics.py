"""Metrics between two sets of images, computed by torchmetrics and torch-fidelity from features that are known."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch_fidelity.metric_prc import prc_features_to_metric
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from dcdit.errors import UserError
from dcdit.evaluation.features import FeatureNetwork, Features
from dcdit.evaluation.image_set import ImageSet
from dcdit.evaluation.reference_images import ReferenceStatistics, default_cache
from dcdit.evaluation.settings import METRICS, NEIGHBOURS, heading_of
from dcdit.evaluation.statistics import Moments, Statistics
from dcdit.runtime.processes import print_once

_SUBSET, _SPLITS = 1000, 10  # of KID and of the Inception Score, torchmetrics' and the field's defaults
_ROWS = 1000  # of precision and recall: distances held at once are rows x N
_REFERENCE_CHUNK = 500  # images of a task on the reference at least: reading is quick


class _KnownFeatures(nn.Module):
    """Takes the place of torchmetrics' feature network: the features are known already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        """Return the features as they are."""
        return features


def frechet(reference: Moments, real: bool = True) -> FrechetInceptionDistance:
    """Return torchmetrics' FID that knows its real images; ``update(features, real=False)`` takes (n, F) features.

    Args:
        reference: of the real images.
        real: whether this process brings them in; one of several must, for their sums are added up.
    """
    metric = FrechetInceptionDistance(_KnownFeatures(len(reference.total)), reset_real_features=False)
    if real:
        metric.real_features_sum = reference.total.double()
        metric.real_features_cov_sum = reference.outer.double()
        metric.real_features_num_samples = torch.tensor(reference.count)
    return metric


def _frechet_distance(reference: Moments, features: Iterable[Tensor | None]) -> float:
    metric = frechet(reference)
    for chunk in features:
        assert chunk is not None
        metric.update(chunk, real=False)
    return float(metric.compute())


Chunks = Callable[[], Iterator[Features]]
"""Yields the features of the generated images, in pieces, anew at every call."""


def compute_fid(reference: Statistics, chunks: Chunks) -> dict[str, float]:
    """Compute the FID between the reference and the chunks: Fréchet distance of two Gaussians (arXiv 1706.08500)."""
    return {"fid": _frechet_distance(reference.moments, (chunk.features for chunk in chunks()))}


def compute_sfid(reference: Statistics, chunks: Chunks) -> dict[str, float]:
    """Compute the FID of spatial features."""
    return {"sfid": _frechet_distance(reference.spatial, (chunk.spatial for chunk in chunks()))}


def compute_kid(reference: Statistics, chunks: Chunks) -> dict[str, float]:
    """Compute the kernel inception distance and, where subsets differ, its standard deviation."""
    generated = torch.cat([chunk.features for chunk in chunks()])
    subset = min(_SUBSET, len(generated), len(reference.features))
    kid = KernelInceptionDistance(_KnownFeatures(generated.shape[1]), subset_size=subset)
    kid.update(reference.features, real=True)
    kid.update(generated, real=False)
    mean, deviation = kid.compute()
    figures = {"kid": float(mean), "kid_subset": subset}
    if subset < max(len(generated), len(reference.features)):  # else all subsets are the same
        figures["kid_std"] = float(deviation)
    return figures


def compute_inception_score(reference: Statistics, chunks: Chunks) -> dict[str, float]:
    """Compute the Inception Score and its standard deviation over the splits."""
    score = InceptionScore(_KnownFeatures(1), splits=_SPLITS)
    for chunk in chunks():
        assert chunk.logits is not None
        score.update(chunk.logits)
    mean, deviation = score.compute()
    return {"inception_score": float(mean), "inception_score_std": float(deviation)}


def compute_precision_recall(reference: Statistics, chunks: Chunks) -> dict[str, float]:
    """Compute the shares of images within the manifold of the others: balls up to the third neighbour (1904.06991)."""
    generated = torch.cat([chunk.features for chunk in chunks()])
    options = {"prc_neighborhood": NEIGHBOURS, "prc_batch_size": _ROWS, "save_cpu_ram": True, "verbose": False}
    figures = prc_features_to_metric(generated, reference.features, **options)
    return {key: figures[key] for key in ("precision", "recall")}


def _missing(name: str, network: FeatureNetwork, images: bool, published: Sequence[str]) -> str | None:
    """Return what is missing for a metric, however many images there are; None if nothing is."""
    metric = METRICS[name]
    if metric.logits and not network.num_logits:
        return f"class logits, which {network.name} has not"
    if metric.reference == "spatial" and not network.num_spatial:
        return f"spatial features, which {network.name} has not"
    if metric.reference is not None and metric.reference not in published and not images:
        why = {"images": "images", "features": "images, or mu and sigma", "spatial": "images, or mu_s and sigma_s"}
        return f"{why[metric.reference]}, which the reference has not" + (
            "" if network.archive_statistics else f": its mu and sigma are not known to be of {network.name}"
        )
    return None


def choose_metrics(
    wanted: Sequence[str] | None, network: FeatureNetwork, images: bool, published: Sequence[str]
) -> list[str]:
    """Return the metrics to compute.

    Args:
        wanted: some of :data:`METRICS`; None takes all that can be had, and prints which cannot.
        network: the feature network.
        images: whether the reference has images.
        published: which statistics come with it.

    Raises:
        UserError: if one that is wanted cannot be had, or none can.
    """
    faults = {name: _missing(name, network, images, published) for name in wanted or METRICS}
    possible = [name for name, fault in faults.items() if fault is None]
    refused = [f"no {heading_of(name)} without {fault}" for name, fault in faults.items() if fault is not None]
    if refused and (wanted is not None or not possible):
        others = f": take metrics=[{','.join(possible)}]" if possible else ", and nothing else can be had either"
        raise UserError(f"metrics: {'; '.join(refused)}{others}")
    for fault in refused:
        print_once(f"Left out: {fault}")
    return possible


def check_counts(
    metrics: Sequence[str], network: FeatureNetwork, count: int, reference: ReferenceStatistics, key: str = "count"
) -> int:
    """Return how many generated images are enough for these metrics; ``key`` says where ``count`` comes from.

    Raises:
        UserError: if ``count``, or the number of images of the reference, is less than they need.
    """
    enough = 2
    for name in metrics:
        metric, heading = METRICS[name], heading_of(name)
        width = {"features": network.num_features, "spatial": network.num_spatial}.get(str(metric.reference), 0)
        numbers = {key: count}
        if metric.reference is not None and metric.reference not in reference.published:
            numbers["reference"] = reference.count
        enough = max(enough, metric.least + 1, width + 1)
        for name_of_set, number in numbers.items():
            if number <= metric.least:
                images = f"{number} image{'s'[: number != 1]} {'are' if number != 1 else 'is'}"
                raise UserError(f"{name_of_set}: {images} too few for {heading}, more than {metric.least} are needed")
            if number <= width:
                raise UserError(
                    f"{name_of_set}: {number} images are too few for {heading}, a covariance of the {width}"
                    f" features of {network.name} needs more than {width}: take more, fewer features,"
                    " or metrics=[kid]"
                )
    return enough


def enough_images_for(
    metrics: Sequence[str], network: FeatureNetwork, count: int, reference: ReferenceStatistics, key: str
) -> list[str]:
    """Return those of ``metrics`` for which there are enough images, and print which are left out; see `check_counts`.

    Raises:
        UserError: if there are too few for all of them.
    """
    faults: dict[str, UserError] = {}
    for name in metrics:
        try:
            check_counts([name], network, count, reference, key)
        except UserError as error:
            faults[name] = error
    if len(faults) == len(metrics):
        raise next(iter(faults.values()))
    for name, fault in faults.items():
        print_once(f"Left out: {heading_of(name)}: {fault}")
    return [name for name in metrics if name not in faults]


def compare_with(
    images: ImageSet,
    network: FeatureNetwork,
    wanted: Sequence[str] | None,
    count: int,
    *,
    cache: str | None,
    batch_size: int,
    limit: int | None = None,
    chunk_size: int = _REFERENCE_CHUNK,
    key: str = "count",
) -> tuple[ReferenceStatistics, list[str], int]:
    """Prepare to compare generated images with real ones; their statistics are computed later.

    Args:
        images: the real images.
        network: the feature network.
        wanted: as of :func:`choose_metrics`.
        count: number of generated images.
        cache: folder for the statistics of the real images; None takes one in the user's cache.
        batch_size: images per forward pass.
        limit: number of real images to take, evenly spaced; None takes all.
        chunk_size: images of a task.
        key: that says how many generated images there are, for messages.

    Returns:
        The statistics of the real images, the metrics to compute, and how many generated images are enough for these.

    Raises:
        UserError: if a metric that is wanted cannot be had, or there are too few images.
    """
    metrics = choose_metrics(wanted, network, bool(images.count), list(images.moments(network)))
    needed = {str(METRICS[name].reference) for name in metrics if METRICS[name].reference is not None}
    folder = Path(cache) if cache else default_cache()
    size = max(chunk_size, _REFERENCE_CHUNK)
    reference = ReferenceStatistics(images, network, folder, limit, size, batch_size, needed)
    if wanted is None:
        metrics = enough_images_for(metrics, network, count, reference, key)
    return reference, metrics, check_counts(metrics, network, count, reference, key)


def compare(reference: Statistics, chunks: Chunks, wanted: Sequence[str], seed: int = 0) -> dict[str, float]:
    """Compute metrics of generated images against a reference.

    Args:
        reference: of the real images.
        chunks: the features of the generated ones.
        wanted: some of :data:`METRICS`.
        seed: of the subsets of KID and the splits of the Inception Score.

    Returns:
        ``fid``; ``sfid``; ``kid`` and, unless every subset is the whole, ``kid_std`` over 100 subsets of ``kid_subset``
        images; ``inception_score`` and ``inception_score_std`` over 10 splits; ``precision`` and ``recall``.

    Raises:
        UserError: naming the metric, if one is not finite.
    """
    figures: dict[str, float] = {}
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", message=".*will save all extracted features in buffer")
        for name in METRICS:
            if name in wanted:
                torch.manual_seed(seed)
                figures |= METRICS[name].function()(reference, chunks)
    for key, value in figures.items():
        if not math.isfinite(value):
            raise UserError(f"{key} is not a finite number, although all features are: take other images or features")
    return figures
