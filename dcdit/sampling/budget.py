"""From a budget in TFLOPs, or as a share of the full cost, to the drop fraction that meets it."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from dcdit.checkpoints.load import Model
from dcdit.compute.flops import Cost
from dcdit.diffusion.guidance import Guidance
from dcdit.diffusion.samplers import Sampler, Step
from dcdit.errors import UserError
from dcdit.network import DCDiT
from dcdit.runtime.jobs import write_json
from dcdit.sampling.generate import generate

TOLERANCE = 0.01  # of the cost measured on the calibration's own images; half of what is promised for others
_IMAGES, _ROUNDS, _LARGEST = 16, 4, 0.99


@dataclass(frozen=True)
class Target:
    """A budget as a person thinks of it; at most one of the two.

    Attributes:
        tflops: TFLOPs per image, all steps and halves, r's Linear included.
        share: share of what an image costs without any drop.
    """

    tflops: float | None = None
    share: float | None = None

    def __post_init__(self) -> None:
        if self.tflops is not None and self.share is not None:
            raise UserError(f"tflops={self.tflops} and share={self.share} are two budgets: give one of them")
        if self.tflops is not None and not self.tflops > 0:
            raise UserError(f"tflops={self.tflops} is not positive")
        if self.share is not None and not 0 < self.share <= 1:
            raise UserError(f"share={self.share} is outside (0, 1]: 0.6 asks for 60% of the full cost")

    @property
    def given(self) -> bool:
        """Whether there is a budget to meet."""
        return self.tflops is not None or self.share is not None


@dataclass(frozen=True)
class Calibration:
    """What was found.

    Attributes:
        drop_fraction: meets the budget.
        tflops: measured with it, per image.
        full_tflops: measured without any drop.
    """

    drop_fraction: float
    tflops: float
    full_tflops: float


class _Meter:
    """Draws the same few images at any drop fraction, and counts what their tokens cost.

    Args:
        As of :func:`calibrate`.
    """

    def __init__(self, model: Model, guidance: Guidance, sampler: Sampler, batch_size: int, precision: str) -> None:
        self.model, self.guidance, self.sampler = model, guidance, sampler
        self.batch_size, self.precision = batch_size, precision
        self.cost = Cost.of_network(model.network)
        self.natural: list[tuple[Tensor, int]] = []
        """For each step what the router kept by itself, (n,) or (2n,), and how many halves ran; of the last images."""

    def measure(self, drop: float) -> float:
        """TFLOPs per image at ``drop``."""
        self.natural = []

        def note(numbers: list[int], step: Step) -> None:
            assert step.output.routing is not None
            lengths = step.output.routing.natural_mask.sum(dim=1)
            self.natural.append((lengths, len(lengths) // len(numbers)))

        drawn = generate(
            self.model,
            replace(self.guidance, drop_fraction=drop),
            self.sampler,
            torch.arange(_IMAGES) * len(self.model.classes) // _IMAGES,
            range(_IMAGES),
            seed=0,
            batch_size=self.batch_size,
            precision=self.precision,
            on_step=note,
        )
        spent = torch.cat([batch.flops(self.cost) for batch in drawn]).mean().item() / 1e12
        self.natural = [(lengths.cpu(), halves) for lengths, halves in self.natural]
        return spent

    def predict(self, drop: float, uncond_drop: float | None) -> float:
        """TFLOPs per image if the last images had been drawn with these drop fractions, None the same for both."""
        fractions = (drop, drop if uncond_drop is None else uncond_drop)
        total = 0.0
        for lengths, halves in self.natural:
            for part, fraction in zip(lengths.chunk(halves), fractions, strict=False):
                kept = (part - (part * fraction).floor()).clamp(min=1)
                total += self.cost.of(kept).sum().item()
        return total / _IMAGES / 1e12


def calibrate(
    model: Model, guidance: Guidance, sampler: Sampler, target: Target, batch_size: int, precision: str
) -> Calibration:
    """Find the drop fraction by drawing a few images and counting what their tokens cost.

    Args:
        model, sampler, batch_size, precision: as images will be drawn.
        guidance: the same; its ``drop_fraction`` is what is looked for, an ``uncond_drop_fraction`` stays as it is.
        target: the budget.

    Raises:
        UserError: if the network drops nothing, or no drop fraction meets the budget.
    """
    if not isinstance(model.network, DCDiT):
        raise UserError("budget: a plain DiT has one fixed cost, leave the budget out")
    if guidance.drop_schedule is not None or guidance.drop_fraction:
        raise UserError("budget: guidance.drop_fraction and drop_schedule are what it replaces, leave them out")
    meter, fixed = _Meter(model, guidance, sampler, batch_size, precision), guidance.uncond_drop_fraction
    drop, spent = 0.0, meter.measure(0.0)
    full = meter.predict(0.0, 0.0)  # no drop in either half
    wanted = target.tflops if target.tflops is not None else full * (target.share or 1.0)
    least = meter.predict(_LARGEST, fixed)
    if not least <= wanted <= spent * (1 + TOLERANCE):
        asked = f"share={target.share:g}" if target.share is not None else f"tflops={target.tflops:.4g}"
        unit, scale = ("of the full cost", 1 / full) if target.share is not None else ("TFLOPs per image", 1.0)
        raise UserError(
            f"budget.{asked} cannot be met: from {least * scale:.4g} (drop fraction {_LARGEST}) to {spent * scale:.4g}"
            f" (none) {unit} is possible with this sampler and guidance, ask for something in between"
        )
    for _ in range(_ROUNDS):
        if abs(spent / wanted - 1) <= TOLERANCE:
            break
        # Other drops lead to other images, whose routing differs a little: measure, and solve again from there.
        drop = _solve(lambda value: meter.predict(value, fixed), wanted)
        spent = meter.measure(drop)
    if abs(spent / wanted - 1) > 2 * TOLERANCE:
        raise UserError(
            f"budget: {wanted:.4g} TFLOPs per image was missed, drop fraction {drop:.4f} costs {spent:.4g}: give"
            " guidance.drop_fraction instead"
        )
    return Calibration(round(drop, 4), spent, full)


def _solve(function: Callable[[float], float], wanted: float) -> float:
    """Where the falling ``function`` reaches ``wanted``, by bisection."""
    low, high = 0.0, _LARGEST
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) > wanted else (low, middle)
    return (low + high) / 2


def remembered(checkpoint: Path, settings: Mapping[str, Any], find: Callable[[], Calibration]) -> Calibration:
    """What ``find()`` returns, kept beside the checkpoint for the next time the same is asked.

    Args:
        checkpoint: file whose ``.budgets.json`` is the store.
        settings: plain values that identify the question.
        find: called without arguments if the answer is not known.
    """
    store = checkpoint.with_suffix(".budgets.json")
    # One of several processes calibrates, the others wait and read.
    with FileLock(store.with_name(f".{store.name}.lock")):
        known = json.loads(store.read_text()) if store.is_file() else []
        for entry in known:
            if entry["settings"] == settings:
                return Calibration(**entry["found"])
        found = find()
        write_json(store, [*known, {"settings": dict(settings), "found": asdict(found)}])
        return found
