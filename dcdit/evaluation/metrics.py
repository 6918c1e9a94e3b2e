"""Metrics between two sets of images, computed by torchmetrics from features that are known already."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from dcdit.errors import UserError
from dcdit.evaluation.features import FeatureNetwork, Features
from dcdit.evaluation.settings import METRICS
from dcdit.evaluation.statistics import Statistics

_SUBSET, _SPLITS = 1000, 10  # of KID and of the Inception Score, torchmetrics' and the field's defaults


class _Given(nn.Module):
    """Where torchmetrics asks a network: the features are known already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        """Nothing to compute."""
        return features


def frechet(reference: Statistics, real: bool = True) -> FrechetInceptionDistance:
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
    fid = frechet(reference)
    for chunk in chunks():
        fid.update(chunk.features, real=False)
    return {METRICS["fid"].key: float(fid.compute())}


def _kid(reference: Statistics, chunks: Chunks) -> dict[str, float]:
    generated = torch.cat([chunk.features for chunk in chunks()])
    subset = min(_SUBSET, len(generated), len(reference.features))
    kid = KernelInceptionDistance(_Given(len(reference.total)), subset_size=subset)
    kid.update(reference.features, real=True)
    kid.update(generated, real=False)
    mean, deviation = kid.compute()
    found = {METRICS["kid"].key: float(mean), "kid_subset": subset}
    if subset < max(len(generated), len(reference.features)):  # else all subsets are the same
        found["kid_std"] = float(deviation)
    return found


def _inception_score(reference: Statistics, chunks: Chunks) -> dict[str, float]:
    score = InceptionScore(_Given(len(reference.total)), splits=_SPLITS)
    for chunk in chunks():
        assert chunk.logits is not None
        score.update(chunk.logits)
    mean, deviation = score.compute()
    key = METRICS["is"].key
    return {key: float(mean), f"{key}_std": float(deviation)}


class Metric(NamedTuple):
    """What computes a metric.

    Attributes:
        compute: from the statistics of the real images and the features of the generated ones to figures by key.
        logits: whether the feature network must give class logits.
        covariance: whether there must be more images than features.
    """

    compute: Callable[[Statistics, Chunks], dict[str, float]]
    logits: bool = False
    covariance: bool = False


COMPUTE = {"fid": Metric(_fid, covariance=True), "kid": Metric(_kid), "is": Metric(_inception_score, logits=True)}
"""What computes each of :data:`dcdit.evaluation.settings.METRICS`."""


def check_metrics(wanted: Sequence[str], network: FeatureNetwork, count: int, reference: int) -> None:
    """Raise :class:`UserError` unless these metrics can be had from so many images and this network."""
    for key, number in (("count", count), ("reference", reference)):
        if number < 2:
            raise UserError(f"{key}: {number} image is too few for any metric")
    for name in wanted:
        metric, heading = COMPUTE[name], METRICS[name].heading
        for key, number in (("count", count), ("reference", reference)):
            if metric.covariance and number <= network.num_features:
                raise UserError(
                    f"{key}: {number} images are too few for {heading}, a covariance of the {network.num_features}"
                    f" features of {network.name} needs more than {network.num_features}: take more, fewer features,"
                    " or metrics=[kid]"
                )
        if metric.logits and not network.num_logits:
            raise UserError(
                f"metrics: {heading} needs class logits, which {network.name} has not: take metrics=[fid,kid]"
            )


def compare(reference: Statistics, chunks: Chunks, wanted: Sequence[str], seed: int = 0) -> dict[str, float]:
    """Metrics of generated images against a reference.

    Args:
        reference: of the real images.
        chunks: the features of the generated ones.
        wanted: some of :data:`COMPUTE`.
        seed: of the subsets of KID and the splits of the Inception Score.

    Returns:
        ``fid_torch``; ``kid`` and, unless every subset is the whole, ``kid_std`` over 100 subsets of ``kid_subset``
        images; ``inception_score`` and ``inception_score_std`` over 10 splits.
    """
    found: dict[str, float] = {}
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", message=".*will save all extracted features in buffer")
        for name in COMPUTE:
            if name in wanted:
                torch.manual_seed(seed)
                found |= COMPUTE[name].compute(reference, chunks)
    return found
