"""What is kept of the features of a set of images, and the metrics between two sets, computed by torchmetrics."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from dcdit.errors import UserError
from dcdit.evaluation.features import FeatureNetwork, Features

METRICS = ("fid", "kid", "is")
KEYS = {"fid": "fid_torch", "kid": "kid", "is": "inception_score"}
"""Where :func:`compare` puts the metric itself."""
HEADINGS = {"fid": "FID", "kid": "KID", "is": "IS"}
_KEPT = 10_000  # features kept of a reference, from which KID draws its subsets
_SUBSET, _SPLITS = 1000, 10  # of KID and of the Inception Score, torchmetrics' and the field's defaults


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
    def of(cls, parts: Iterable[Tensor], count: int) -> "Statistics":
        """Statistics of ``parts``, each (n, F) float32, ``count`` rows in all."""
        kept = torch.from_numpy(np.linspace(0, count - 1, min(count, _KEPT)).round().astype(np.int64))
        total, outer, chosen, seen = torch.zeros(1), torch.zeros(1, 1), [], 0
        for part in parts:
            wide = part.double()
            total, outer = total + wide.sum(dim=0), outer + wide.T @ wide
            chosen.append(part[kept[(kept >= seen) & (kept < seen + len(part))] - seen])
            seen += len(part)
        assert seen == count
        return cls(count, total, outer, torch.cat(chosen))

    def save(self, path: Path) -> None:
        """Write ``path``, whole or not at all."""
        draft = path.with_name(f"{path.name}.part")
        with draft.open("wb") as file:
            arrays = {key: getattr(self, key).numpy() for key in ("total", "outer", "features")}
            np.savez(file, count=self.count, **arrays)
        draft.replace(path)

    @classmethod
    def load(cls, path: Path) -> "Statistics":
        """Read what :meth:`save` wrote; UserError if it is damaged."""
        try:
            with np.load(path, allow_pickle=False) as stored:
                total, outer, features = (torch.from_numpy(stored[key]) for key in ("total", "outer", "features"))
                return cls(int(stored["count"]), total, outer, features)
        except Exception as error:  # numpy and zipfile raise whatever a damaged file provokes
            raise UserError(f"{path} cannot be read ({error}): delete it, it is computed again") from error


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


def check_metrics(wanted: Sequence[str], network: FeatureNetwork, count: int, reference: int) -> None:
    """Raise :class:`UserError` unless these metrics can be had from so many images and this network."""
    if not wanted:
        raise UserError(f"metrics=[] asks for nothing: take some of {', '.join(METRICS)}")
    for name in wanted:
        if name not in METRICS:
            raise UserError(f"metrics: {name!r} is not one of {', '.join(METRICS)}")
    for key, number in (("count", count), ("reference", reference)):
        if "fid" in wanted and number <= network.num_features:
            raise UserError(
                f"{key}: {number} images are too few for FID, a covariance of the {network.num_features} features of"
                f" {network.name} needs more than {network.num_features}: take more, fewer features, or metrics=[kid]"
            )
        if number < 2:
            raise UserError(f"{key}: {number} image is too few for any metric")
    if "is" in wanted and not network.num_logits:
        raise UserError(
            f"metrics: the Inception Score needs class logits, which {network.name} has not: take metrics=[fid,kid]"
        )


def compare(
    reference: Statistics, parts: Callable[[], Iterator[Features]], wanted: Sequence[str], seed: int = 0
) -> dict[str, float]:
    """Metrics of generated images against a reference.

    Args:
        reference: of the real images.
        parts: yields the features of the generated ones, in pieces; called once for each metric.
        wanted: some of :data:`METRICS`.
        seed: of the subsets of KID and the splits of the Inception Score.

    Returns:
        ``fid_torch``; ``kid`` and, unless every subset is the whole, ``kid_std`` over 100 subsets of ``kid_subset``
        images; ``inception_score`` and ``inception_score_std`` over 10 splits.
    """
    found: dict[str, float] = {}
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", message=".*will save all extracted features in buffer")
        if "fid" in wanted:
            fid = frechet(reference)
            for part in parts():
                fid.update(part.features, real=False)
            found["fid_torch"] = float(fid.compute())
        if "kid" in wanted:
            generated = torch.cat([part.features for part in parts()])
            subset = min(_SUBSET, len(generated), len(reference.features))
            kid = KernelInceptionDistance(_Given(len(reference.total)), subset_size=subset)
            torch.manual_seed(seed)
            kid.update(reference.features, real=True)
            kid.update(generated, real=False)
            mean, deviation = kid.compute()
            found |= {"kid": float(mean), "kid_subset": subset}
            if subset < max(len(generated), len(reference.features)):  # else all subsets are the same
                found["kid_std"] = float(deviation)
        if "is" in wanted:
            score = InceptionScore(_Given(len(reference.total)), splits=_SPLITS)
            torch.manual_seed(seed)
            for part in parts():
                assert part.logits is not None
                score.update(part.logits)
            mean, deviation = score.compute()
            found |= {"inception_score": float(mean), "inception_score_std": float(deviation)}
    return found
