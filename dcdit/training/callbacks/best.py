"""The checkpoint that is best by a metric of the validations, by what the names of its files say."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dcdit.checks import shown
from dcdit.errors import UserError
from dcdit.evaluation.settings import METRICS

BEST = "best.ckpt"
_NAME = re.compile(r"best_(?P<metric>[^/]+)_(?P<value>[-+.\de]+)_step_(?P<step>\d{8})\.ckpt")
_LOSS = "val/diffusion_loss"


@dataclass(frozen=True)
class BestCheckpoint:
    """The best checkpoint so far, as the name of its file says it: a kill leaves no other record than that.

    Attributes:
        metric: its name in the logs, without ``val/``.
        value: of the metric, with nine digits, which tell all float32 apart.
        step: optimiser steps done.
    """

    metric: str
    value: float
    step: int

    @classmethod
    def of(cls, metric: str, value: float, step: int) -> "BestCheckpoint":
        """The record of a value as it was logged."""
        return cls(metric.removeprefix("val/"), float(f"{value:.9g}"), step)

    @property
    def name(self) -> str:
        """Return the name of its file."""
        return f"best_{self.metric}_{self.value:.9g}_step_{self.step:08d}.ckpt"

    def is_worse_than(self, value: float) -> bool:
        """Whether another value of the metric is better; NaN and infinities never are."""
        higher = _directions().get(self.metric.partition("@")[0], False)
        return math.isfinite(value) and (value > self.value if higher else value < self.value)


def _directions() -> dict[str, bool]:
    """Whether more is better, by the names of metrics without ``val/`` and drop fraction."""
    figures = {figure.key: figure.higher_is_better for metric in METRICS.values() for figure in metric.figures}
    return {**figures, _LOSS.removeprefix("val/"): False}


def best_checkpoints(folder: Path) -> dict[Path, BestCheckpoint]:
    """The best checkpoints in a folder: one, or two where a kill left the one before."""
    names = {path: _NAME.fullmatch(path.name) for path in sorted(folder.glob("best_*.ckpt"))}
    found = {}
    for path, match in names.items():
        try:
            if match:
                found[path] = BestCheckpoint(match["metric"], float(match["value"]), int(match["step"]))
        except ValueError:
            continue  # another file of such a name
    return found


def metric_to_watch(best: str, callbacks: Iterable[Any], validates: bool) -> str:
    """The name in the logs of the metric that ``callbacks.checkpoint.best`` means.

    Args:
        best: a name in the logs, or one without drop fraction, which means the first that is measured.
        callbacks: of the trainer; their attribute ``validation_metrics`` names what they log.
        validates: whether there is a validation split.

    Raises:
        UserError: if no validation will log it, or nobody knows whether more of it is better.
    """
    key = f"callbacks.checkpoint.best={shown(best)}"
    if not validates:
        raise UserError(
            f"{key}: without a split `val` beside `train` there are no validations: extract one, or set null"
        )
    logged = [_LOSS, *(name for callback in callbacks for name in getattr(callback, "validation_metrics", ()))]
    directed = [name for name in logged if name.removeprefix("val/").partition("@")[0] in _directions()]
    for name in directed:
        if best in (name, name.partition("@")[0]):
            return name
    more = "" if len(directed) > 1 else "; callbacks=fid measures FID as well"
    raise UserError(f"{key}: validations log no such metric. They log {', '.join(directed)}{more}")
