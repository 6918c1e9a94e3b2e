"""Scores of images that exist: what the file of one holds, and how it is written and read."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dcdit.checks import NonNegative, call_checked, conform, shown
from dcdit.errors import UserError
from dcdit.evaluation.plans import Comparison, SampledPlan, Text, ema_decay
from dcdit.evaluation.results import Figures
from dcdit.runtime.files import read_json, write_json
from dcdit.settings.plugins import check_plugins, plugins_of

SCHEMA = 1
"""Version of the files of scores."""

_REMEDY = "score again, or remove it"


@dataclass(frozen=True)
class SamplingRecord:
    """How ``dcdit.generate`` sampled the images of an archive, by the file beside it.

    Attributes:
        plan: everything that the images depend on.
        training: how the network was trained, as far as that is known.
        tflops_per_image: all steps and branches.
        keep_ratio: kept tokens as a share of the positions; None for a network without router.
    """

    plan: SampledPlan
    training: dict[str, Any]
    tflops_per_image: NonNegative
    keep_ratio: NonNegative | None

    @property
    def ema_decay(self) -> float | None:
        """Decay of the EMA whose weights sampled; None for other weights, or where nobody says it."""
        return ema_decay(self.training, self.plan.weights)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "SamplingRecord":
        """Return the record in plain values; raise :class:`UserError` naming the key of a wrong one."""
        plan = conform("plan", values.get("plan"), dict[str, Any])
        about_chunks = ("count", "chunk_size")
        plan = {key: value for key, value in plan.items() if key not in about_chunks}
        keys = ("training", "tflops_per_image", "keep_ratio")
        return call_checked(
            cls, {key: values[key] for key in keys if key in values}, "", {"plan": SampledPlan.of(plan)}
        )

    @classmethod
    def beside(cls, archive: Path, content: str) -> "SamplingRecord | None":
        """Return the record beside an archive of images with this checksum; None if there is none.

        Raises:
            UserError: if the file beside it is damaged, or tells of other images.
        """
        file = archive.with_suffix(".json")
        try:
            values = read_json(file, dict[str, Any], "remove it, or restore it")
        except FileNotFoundError:
            return None
        if values.get("content") != content:
            why = "does not say which images it tells of" if "content" not in values else "tells of other images"
            raise UserError(f"{file} {why}")
        try:
            plan = conform("plan", values.get("plan"), dict[str, Any])
            check_plugins({**plan, "plugins": values.get("plugins")})
            return cls.of(values)
        except UserError as error:
            raise UserError(f"{file} is no record of dcdit.generate ({error})") from error


@dataclass(frozen=True, kw_only=True)
class ScorePlan(Comparison):
    """Everything that the figures of a score depend on.

    Attributes:
        images: which images they are, see :meth:`dcdit.evaluation.image_set.ImageSet.described`.
    """

    images: dict[str, Any]


@dataclass(frozen=True)
class Score(Figures):
    """The figures of a set of images.

    Attributes:
        source: where the images were.
        metrics: see :class:`dcdit.evaluation.results.Figures`.
        reference: where the reference was.
        device: that looked at the images.
        sampled: how they were sampled; None if that is not known.
        path: path of the score's file, which does not store it.
    """

    source: Text
    plan: ScorePlan
    metrics: dict[str, Any]
    reference: Text
    device: Text
    sampled: SamplingRecord | None = None
    path: Path = Path()

    def __post_init__(self) -> None:
        self._check_figures(self.plan.metrics)

    def as_plain(self) -> dict[str, Any]:
        """Return the plain values that the file holds."""
        values = {key: value for key, value in asdict(self).items() if key != "path"}
        if self.sampled is not None:
            values["sampled"]["plan"] = self.sampled.plan.as_plain()
        plugins = plugins_of(_choices(values))
        return {"score_schema": SCHEMA, **values, **({"plugins": plugins} if plugins else {})}

    def write(self) -> None:
        """Write the file, whole or not at all."""
        write_json(self.path, self.as_plain())


def _choices(values: Mapping[str, Any]) -> dict[str, Any]:
    """What the plans of a score in plain values choose: that of its figures, and that of the sampling."""
    sampled = values.get("sampled")
    plans = (sampled.get("plan") if isinstance(sampled, Mapping) else None, values.get("plan"))
    return {key: part for plan in plans if isinstance(plan, Mapping) for key, part in plan.items()}


def read_score(file: Path) -> Score:
    """Read one score.

    Raises:
        UserError: if the file holds none, or one of another release.
    """
    try:
        values = read_json(file, dict[str, Any], _REMEDY)
    except FileNotFoundError:
        raise UserError(f"{file} is a link to nowhere: remove it") from None
    schema = values.pop("score_schema", None)
    if schema != SCHEMA:
        raise UserError(f"{file} is no score of this release (schema {shown(schema)}, not {SCHEMA}): {_REMEDY}")
    try:
        check_plugins({**_choices(values), "plugins": values.pop("plugins", None)})
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    try:
        sampled = values.pop("sampled", None)
        record = None if sampled is None else SamplingRecord.of(conform("sampled", sampled, dict[str, Any]))
        return call_checked(Score, values, "", {"sampled": record, "path": file})
    except UserError as error:
        raise UserError(f"{file} is a corrupt score of dcdit.score ({error}): {_REMEDY}") from error
