"""The figures of images that exist, computed from features that are kept in chunks."""

import re
from pathlib import Path

from dcdit.checks import call_checked
from dcdit.errors import UserError
from dcdit.evaluation.archives import NpzArchive
from dcdit.evaluation.image_set import ImageSet
from dcdit.evaluation.images import open_images
from dcdit.evaluation.metrics import compare, compare_with
from dcdit.evaluation.points import build_features
from dcdit.evaluation.reference_images import FeatureJob, Nothing, evenly_spaced, see_images
from dcdit.evaluation.scores import SCHEMA, SamplingRecord, Score, ScorePlan, read_score
from dcdit.evaluation.settings import ScoreConfig, figures_of_metrics
from dcdit.evaluation.statistics import Statistics
from dcdit.runtime.devices import describe_device, pick_device
from dcdit.runtime.display import Display
from dcdit.runtime.files import content_digest
from dcdit.runtime.processes import print_once

TOLERANCE = 0.01
"""Relative difference from an expected figure that is allowed: other programs round and resize otherwise."""


class Scoring:
    """Scores a set of images by any number of processes; the result is one file.

    Images, reference, and the number of both are checked before the feature network is built, which may download.

    Args:
        config: what to score.

    Raises:
        UserError: naming key, value and remedy, if something cannot be had.
    """

    def __init__(self, config: ScoreConfig) -> None:
        self.config, self.device = config, pick_device(config.device)
        decoding = (self.device, config.autoencoder, config.rounding)
        size = None if config.image_size is None else (config.image_size, config.image_size)
        self.images = open_images(config.images, size, *decoding, key="images")
        count = self._check_number(config.count)
        reference = open_images(config.reference, self.images.size, *decoding)
        self.network = build_features(config.features, self.device)  # perhaps a download: after the checks
        self.reference, self.metrics, _ = compare_with(
            reference,
            self.network,
            config.metrics,
            count,
            cache=config.cache,
            batch_size=config.batch_size,
            limit=config.reference_count,
            chunk_size=config.chunk_size,
            key="images" if config.count is None else "count",
        )
        self._check_expected()
        plan = {
            "images": self.images.described(),
            "count": count,
            "features": self.reference.features,
            "reference": self.reference.description,
            "metrics": self.metrics,
        }
        self.out, name = _place_of(config)
        path = self.out / f"{name}_{content_digest({'score_schema': SCHEMA, **plan})[:12]}.json"
        self.plan = plan
        self.job = FeatureJob(
            Nothing, path, "score", {**plan, "chunk_size": config.chunk_size}, count, config.chunk_size
        )
        self._numbers = evenly_spaced(count, self.images.count)

    def _check_number(self, count: int | None) -> int:
        """Return how many images are scored; raise UserError if there are none, or fewer than asked for."""
        images = self.images
        if not images.count:
            raise UserError(f"images={images.source} holds statistics alone: give images")
        if count is not None and count > images.count:
            raise UserError(f"count={count}: images={images.source} has {images.count}, give count=null for all")
        return count or images.count

    def _check_expected(self) -> None:
        """Raise :class:`UserError` if a figure is expected that is not computed."""
        computed = [figure.key for figure in figures_of_metrics(self.metrics)]
        for key in self.config.expected or ():
            if key not in computed:
                raise UserError(f"expected.{key}: it cannot be computed here, only {', '.join(computed)} can")

    def run(self, rank: int, world_size: int) -> Score | None:
        """Do this process's share; return the score, or None while other processes work on theirs.

        Raises:
            UserError: naming the image, if one cannot be read or its features are not finite.
        """
        with Display(rank, "reading the reference", "chunk") as display:
            self.reference.work(rank, world_size, display)
        with Display(rank, "scoring", "chunk") as display:
            self.job.share(rank, world_size, lambda task: self._see(task, display), display)
        reference = self.reference.finalize()
        if reference is not None and not self.job.result.is_file():
            self.job.finalize(self.job.result, lambda records: self._write(reference))
        return read_score(self.job.result) if self.job.result.is_file() else None

    def _see(self, task: int, display: Display) -> None:
        numbers = [self._numbers[number] for number in self.job.numbers(task)]
        seen = see_images(self.images, numbers, self.network, self.config.batch_size, display.advance)
        spatial = "sfid" in self.metrics
        features = [features if spatial else features._replace(spatial=None) for features in seen]
        self.job.keep(task, features, Nothing())

    def _write(self, reference: Statistics) -> None:
        Score(
            source=self.images.source,
            plan=call_checked(ScorePlan, self.plan, "plan"),
            metrics=compare(reference, self.job.features, self.metrics),
            reference=self.reference.images.source,
            device=describe_device(self.device),
            sampled=_sampled(self.images),
            path=self.job.result,
        ).write()


def _sampled(images: ImageSet) -> SamplingRecord | None:
    """Return how the images were sampled, if a file beside them says it."""
    if not isinstance(images, NpzArchive):
        return None
    try:
        return SamplingRecord.beside(images.path, str(images.described()["content"]))
    except UserError as error:
        print_once(f"How the images were sampled is not recorded: {error}")
        return None


def _place_of(config: ScoreConfig) -> tuple[Path, str]:
    """Return the folder of the result, and what its name begins with."""
    path = Path(config.images)
    here = path.exists()
    name = (path.resolve().stem if path.is_file() else path.resolve().name) if here else path.stem
    beside = path.resolve().parent / "scores" if here else Path("scores")
    return Path(config.out) if config.out else beside, re.sub(r"[^\w.-]", "_", name) or "images"


def check_expected(score: Score, expected: dict[str, float]) -> list[str]:
    """Return a line for each expected figure, with what was measured.

    Raises:
        UserError: if one differs by more than :data:`TOLERANCE`.
    """
    lines, wrong = [], []
    for key, value in expected.items():
        measured = score.figure(key)
        difference = abs(measured - value) / max(abs(value), 1e-12)
        lines.append(f"{key}: {measured:.6g}, expected {value:.6g}, {difference:.2%} apart")
        if difference > TOLERANCE:
            wrong.append(lines[-1])
    if wrong:
        raise UserError(
            f"not as expected (more than {TOLERANCE:.0%} apart): {'; '.join(wrong)}: are images, reference, features"
            " and number of images those that the figures are of?"
        )
    return lines
