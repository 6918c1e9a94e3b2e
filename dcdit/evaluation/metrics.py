"""Metrics between two sets of images, computed by torchmetrics and torch-fidelity from features that are known."""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch_fidelity.metric_prc import prc_features_to_metric
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from dcdit.errors import UserError
from dcdit.evaluation.features import FeatureNetwork, Features
from dcdit.evaluation.reference_images import ReferenceStatistics
from dcdit.evaluation.settings import heading_of
from dcdit.evaluation.statistics import Moments, Statistics
from dcdit.runtime.processes import processes

_SUBSET, _SPLITS = 1000, 10  # of KID and of the Inception Score, torchmetrics' and the field's defaults
_NEIGHBOURS, _ROWS = 3, 1000  # of precision and recall: k as the ADM suite has it; distances held at once are rows x N


class _Given(nn.Module):
    """Where torchmetrics asks a network: the features are known already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        """Nothing to compute."""
        return features


def frechet(reference: Moments, real: bool = True) -> FrechetInceptionDistance:
    """torchmetrics' FID that knows its real images already; ``update(features, real=False)`` takes (n, F) features.

    Args:
        reference: of the real images.
        real: whether this process brings them in; one of several must, for their sums are added up.
    """
    metric = FrechetInceptionDistance(_Given(len(reference.total)), reset_real_features=False)
    if real:
        metric.real_features_sum = reference.total.double()
        metric.real_features_cov_sum = reference.outer.double()
        metric.real_features_num_samples = torch.tensor(reference.count)
    return metric


Chunks = Callable[[], Iterator[Features]]
"""Yields the features of the generated images, in pieces, anew at every call."""


def _fid(reference: Statistics, chunks: Chunks) -> dict[str, float]:
    fid = frechet(reference.moments)
    for chunk in chunks():
        fid.update(chunk.features, real=False)
    return {"fid": float(fid.compute())}


def _sfid(reference: Statistics, chunks: Chunks) -> dict[str, float]:
    fid = frechet(reference.spatial)
    for chunk in chunks():
        assert chunk.spatial is not None
        fid.update(chunk.spatial, real=False)
    return {"sfid": float(fid.compute())}


def _kid(reference: Statistics, chunks: Chunks) -> dict[str, float]:
    generated = torch.cat([chunk.features for chunk in chunks()])
    subset = min(_SUBSET, len(generated), len(reference.features))
    kid = KernelInceptionDistance(_Given(generated.shape[1]), subset_size=subset)
    kid.update(reference.features, real=True)
    kid.update(generated, real=False)
    mean, deviation = kid.compute()
    found = {"kid": float(mean), "kid_subset": subset}
    if subset < max(len(generated), len(reference.features)):  # else all subsets are the same
        found["kid_std"] = float(deviation)
    return found


def _inception_score(reference: Statistics, chunks: Chunks) -> dict[str, float]:
    score = InceptionScore(_Given(1), splits=_SPLITS)
    for chunk in chunks():
        assert chunk.logits is not None
        score.update(chunk.logits)
    mean, deviation = score.compute()
    return {"inception_score": float(mean), "inception_score_std": float(deviation)}


def _precision_recall(reference: Statistics, chunks: Chunks) -> dict[str, float]:
    """Shares of images within the manifold of the others (arXiv 1904.06991): balls up to the third neighbour."""
    generated = torch.cat([chunk.features for chunk in chunks()])
    options = {"prc_neighborhood": _NEIGHBOURS, "prc_batch_size": _ROWS, "save_cpu_ram": True, "verbose": False}
    found = prc_features_to_metric(generated, reference.features, **options)
    return {key: found[key] for key in ("precision", "recall")}


class Metric(NamedTuple):
    """What computes a metric.

    Attributes:
        compute: from the statistics of the real images and the features of the generated ones to figures by key, those
            of :data:`dcdit.evaluation.settings.METRICS` among them.
        reference: what of the reference it needs: its ``images``, or statistics of ``features`` or ``spatial``.
        logits: whether the feature network must give class logits.
        least: images that there must be more than, beside those that a covariance needs.
    """

    compute: Callable[[Statistics, Chunks], dict[str, float]]
    reference: str | None = "images"
    logits: bool = False
    least: int = 1


COMPUTE = {
    "fid": Metric(_fid, "features"),
    "sfid": Metric(_sfid, "spatial"),
    "kid": Metric(_kid),
    "is": Metric(_inception_score, None, logits=True),
    "prc": Metric(_precision_recall, least=_NEIGHBOURS),
}
"""What computes each of :data:`dcdit.evaluation.settings.METRICS`."""


def _missing(name: str, network: FeatureNetwork, images: bool, published: Sequence[str]) -> str | None:
    """What is missing for a metric, however many images there are; None if nothing is."""
    metric = COMPUTE[name]
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
    wanted: Sequence[str] | None, network: FeatureNetwork, images: bool, there: Sequence[str]
) -> list[str]:
    """The metrics to compute.

    Args:
        wanted: some of :data:`COMPUTE`; None takes all that can be had, and says which cannot.
        network: whose features.
        images: whether the reference has images.
        there: which statistics it has.

    Raises:
        UserError: if one that is wanted cannot be had, or none can.
    """
    faults = {name: _missing(name, network, images, there) for name in wanted or COMPUTE}
    found = [name for name, fault in faults.items() if fault is None]
    refused = [f"no {heading_of(name)} without {fault}" for name, fault in faults.items() if fault is not None]
    if refused and (wanted is not None or not found):
        others = f": take metrics=[{','.join(found)}]" if found else ", and nothing else can be had either"
        raise UserError(f"metrics: {'; '.join(refused)}{others}")
    if processes()[0] == 0:
        for words in refused:
            print(f"Left out: {words}")
    return found


def check_counts(metrics: Sequence[str], network: FeatureNetwork, count: int, reference: ReferenceStatistics) -> int:
    """See that there are images enough for these metrics.

    Args:
        metrics: which.
        network: whose features.
        count: number of generated images.
        reference: what they are compared with.

    Returns:
        How many generated images are enough.

    Raises:
        UserError: if there are fewer, of these or of the reference.
    """
    enough = 2
    for name in metrics:
        metric, heading = COMPUTE[name], heading_of(name)
        width = {"features": network.num_features, "spatial": network.num_spatial}.get(str(metric.reference), 0)
        numbers = {"count": count}
        if metric.reference is not None and metric.reference not in reference.published:
            numbers["reference"] = reference.count
        enough = max(enough, metric.least + 1, width + 1)
        for key, number in numbers.items():
            if number <= metric.least:
                words = f"{number} image{'s'[: number != 1]} {'are' if number != 1 else 'is'}"
                raise UserError(f"{key}: {words} too few for {heading}, more than {metric.least} are needed")
            if number <= width:
                raise UserError(
                    f"{key}: {number} images are too few for {heading}, a covariance of the {width}"
                    f" features of {network.name} needs more than {width}: take more, fewer features,"
                    " or metrics=[kid]"
                )
    return enough


def compare(reference: Statistics, chunks: Chunks, wanted: Sequence[str], seed: int = 0) -> dict[str, float]:
    """Metrics of generated images against a reference.

    Args:
        reference: of the real images.
        chunks: the features of the generated ones.
        wanted: some of :data:`COMPUTE`.
        seed: of the subsets of KID and the splits of the Inception Score.

    Returns:
        ``fid``; ``sfid``; ``kid`` and, unless every subset is the whole, ``kid_std`` over 100 subsets of ``kid_subset``
        images; ``inception_score`` and ``inception_score_std`` over 10 splits; ``precision`` and ``recall``.

    Raises:
        UserError: naming the metric, if one is not finite.
    """
    found: dict[str, float] = {}
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", message=".*will save all extracted features in buffer")
        for name in COMPUTE:
            if name in wanted:
                torch.manual_seed(seed)
                found |= COMPUTE[name].compute(reference, chunks)
    for key, value in found.items():
        if not math.isfinite(value):
            raise UserError(f"{key} is not a finite number, although all features are: take other images or features")
    return found
