"""Results of evaluations: what the file of one holds, and how it is written and read."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dcdit.checks import (
    Count,
    Natural,
    NonNegative,
    Number,
    call_checked,
    conform,
    shown,
)
from dcdit.errors import UserError
from dcdit.evaluation.plans import MeasuredPlan, Text, ema_decay
from dcdit.evaluation.settings import figures_of_metrics
from dcdit.runtime.files import read_json, write_json
from dcdit.sampling.dropped import Dropped
from dcdit.settings.plugins import check_plugins, plugins_of

SCHEMA = 6
"""Version of the files of results."""

_REMEDY = "evaluate again, or remove it"


@dataclass(frozen=True)
class NetworkDescription:
    """The network that was measured: its name for people, and whether it has a router."""

    title: Text
    routes: bool


@dataclass(frozen=True)
class Timing:
    """Milliseconds per image in each round against the clock, and the images of a round; no rounds before that."""

    rounds: list[NonNegative]
    batch_size: Count


@dataclass(frozen=True)
class KeepRatio:
    """Kept tokens as a share of the positions.

    Attributes:
        mean: of all steps and branches with a router.
        timesteps: of the steps.
        main: at each step, of the main branch.
        guiding: at each step, of the guiding branch; None where it did not run, or has no router.
    """

    mean: NonNegative
    timesteps: list[Number]
    main: list[NonNegative]
    guiding: list[NonNegative | None]


class Figures:
    """Numbers by key in ``metrics``: the figures of the metrics that were computed, and others that belong to them."""

    metrics: dict[str, Any]

    def figure(self, key: str) -> float:
        """Return a figure of a metric, such as ``fid``; raise UserError if it was not measured."""
        if key not in self.metrics:
            raise UserError(f"{key} was not measured: there are {', '.join(self.metrics)}")
        return float(self.metrics[key])

    def _check_figures(self, computed: Sequence[str]) -> None:
        """Raise :class:`UserError` unless the figures of the metrics that were ``computed`` are there, as numbers."""
        for key in [*(figure.key for figure in figures_of_metrics(computed)), *self.metrics]:
            conform(f"metrics.{key}", self.metrics.get(key), Number)  # whole numbers stay whole


@dataclass(frozen=True)
class Result(Figures):
    """One measurement.

    Attributes:
        parameters: number of the network's parameters.
        training: how the network was trained, as far as that is known.
        metrics: see :class:`Figures`.
        tflops_per_image: all steps and branches.
        milliseconds_per_image: of sampling, decoding apart.
        reference: where the reference was.
        device: that sampled.
        keep_ratio: None for a network without router.
        dropped_by_capacity: what a capacity had no room for; None where all had.
        path: path of the result's file, which does not store it.
    """

    run: Text
    checkpoint: Text
    network: NetworkDescription
    parameters: Natural
    training: dict[str, Any]
    plan: MeasuredPlan
    metrics: dict[str, Any]
    tflops_per_image: NonNegative
    milliseconds_per_image: NonNegative
    timing: Timing
    reference: Text
    device: Text
    keep_ratio: KeepRatio | None = None
    dropped_by_capacity: Dropped | None = None
    path: Path = Path()

    def __post_init__(self) -> None:
        kept = self.keep_ratio
        if kept is not None and not len(kept.timesteps) == len(kept.main) == len(kept.guiding):
            raise UserError("keep_ratio has not as many ratios as timesteps")
        self._check_figures(self.plan.metrics)

    @property
    def drop(self) -> float:
        """Drop fraction of the main branch."""
        return self.plan.guidance.drop_fraction

    @property
    def scale(self) -> float:
        """Return the guidance scale; 1 means that no guiding branch ran."""
        return self.plan.guidance.scale

    @property
    def ema_decay(self) -> float | None:
        """Decay of the EMA whose weights were measured; None for other weights, or where nobody says it."""
        return ema_decay(self.training, self.plan.weights)

    def as_plain(self) -> dict[str, Any]:
        """Return the plain values that the file holds."""
        absent = {"path", *(key for key in ("keep_ratio", "dropped_by_capacity") if getattr(self, key) is None)}
        values = {key: value for key, value in asdict(self).items() if key not in absent}
        plan = self.plan.as_plain()
        plugins = plugins_of(plan)
        return {"schema": SCHEMA, **values, "plan": plan, **({"plugins": plugins} if plugins else {})}

    def write(self) -> None:
        """Write the file, whole or not at all."""
        write_json(self.path, self.as_plain())


def read_result(file: Path) -> Result:
    """Read one result.

    Raises:
        UserError: if the file holds none, or one of another release.
    """
    try:
        values = read_json(file, dict[str, Any], _REMEDY)
    except FileNotFoundError:
        raise UserError(f"{file} is a link to nowhere: remove it") from None
    schema = values.pop("schema", None)
    if schema is None:
        raise UserError(f"{file} is no result of dcdit.evaluate: remove it")
    if schema != SCHEMA:
        raise UserError(
            f"{file} was written by another release (schema {shown(schema)}, this one reads {SCHEMA}): evaluate again"
        )
    plugins, plan_values = values.pop("plugins", None), values.get("plan")
    try:
        check_plugins({**(plan_values if isinstance(plan_values, Mapping) else {}), "plugins": plugins})
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    try:
        plan = MeasuredPlan.of(values.pop("plan", None))
        return call_checked(Result, values, "", {"plan": plan, "path": file})
    except UserError as error:
        raise UserError(f"{file} is a corrupt result of dcdit.evaluate ({error}): {_REMEDY}") from error
