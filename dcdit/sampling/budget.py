"""From a budget in TFLOPs, or as a fraction of the full cost, to the drop fraction that meets it."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from dcdit.checkpoints.load import Model
from dcdit.checks import DropFraction, Positive
from dcdit.compute.flops import Cost
from dcdit.diffusion.guidance import Guidance
from dcdit.diffusion.samplers import Sampler, Step
from dcdit.diffusion.settings import BudgetSettings
from dcdit.errors import UserError
from dcdit.network import Network
from dcdit.runtime.files import read_json, write_json
from dcdit.sampling.generate import generate

TOLERANCE = 0.01  # of the cost measured on the calibration's own images; half of what is promised for others
_IMAGES, _ROUNDS, _LARGEST = 16, 4, 0.99


@dataclass(frozen=True)
class Calibration:
    """What was found.

    Attributes:
        drop_fraction: meets the budget.
        tflops: measured with it, per image.
        full_tflops: measured without any drop.
    """

    drop_fraction: DropFraction
    tflops: Positive
    full_tflops: Positive


@dataclass(frozen=True)
class _Answer:
    """What was found, and for which question."""

    settings: dict[str, Any]
    found: Calibration


class _Meter:
    """Samples the same few images at any drop fraction, and counts what their tokens cost.

    Args:
        As of :func:`calibrate`.
    """

    def __init__(self, model: Model, guidance: Guidance, sampler: Sampler, batch_size: int, precision: str) -> None:
        self.model, self.guidance, self.sampler = model, guidance, sampler
        self.batch_size, self.precision = batch_size, precision
        weak = guidance.weak if isinstance(guidance.weak, Network) else model.network
        self.costs = [Cost.of_network(network) for network in (model.network, weak)]
        self.natural: list[tuple[Tensor, ...]] = []
        """For each step and half that ran what the router kept by itself, (n,); of the last images."""

    def measure(self, drop: float) -> float:
        """TFLOPs per image at ``drop``."""
        self.natural = []

        def note(numbers: list[int], step: Step) -> None:
            none = torch.zeros(len(numbers))  # of a weak network without router
            halves = [
                none if half is None else half.natural_mask.sum(dim=1) * half.mask.any(dim=1)  # 0 of what is reused
                for half in step.output.halves
            ]
            self.natural.append(tuple(halves))

        settings = replace(self.guidance.settings, drop_fraction=drop)
        batches = generate(
            self.model,
            replace(self.guidance, settings=settings),
            self.sampler,
            torch.arange(_IMAGES) * self.model.network.num_classes // _IMAGES,
            range(_IMAGES),
            seed=0,
            batch_size=self.batch_size,
            precision=self.precision,
            on_step=note,
        )
        spent = torch.cat([batch.flops for batch in batches]).mean().item() / 1e12
        self.natural = [tuple(half.cpu() for half in halves) for halves in self.natural]
        return spent

    def predict(self, drop: float, uncond_drop: float | None) -> float:
        """TFLOPs per image if the last images had had these drop fractions, None the same for both."""
        fractions = (drop, drop if uncond_drop is None else uncond_drop)
        total = 0.0
        for halves in self.natural:
            for cost, lengths, fraction in zip(self.costs, halves, fractions, strict=False):
                kept = (lengths - (lengths * fraction).floor()).clamp(min=1) * (lengths > 0)
                total += cost.of(kept).sum().item()
        return total / _IMAGES / 1e12


def calibrate(
    model: Model, guidance: Guidance, sampler: Sampler, budget: BudgetSettings, batch_size: int, precision: str
) -> Calibration:
    """Find the drop fraction by sampling a few images and counting what their tokens cost.

    Args:
        model, sampler, batch_size, precision: as images will be sampled.
        guidance: the same; its ``drop_fraction`` is what is looked for, an ``uncond_drop_fraction`` stays as it is.
        budget: what to meet.

    Raises:
        UserError: if the network drops nothing, or no drop fraction meets the budget.
    """
    if not model.network.routes:
        raise UserError(f"budget: {model.network.title} has one fixed cost, leave the budget out")
    fixed = guidance.settings.uncond_drop_fraction
    meter = _Meter(model, guidance, sampler, batch_size, precision)
    drop, spent = 0.0, meter.measure(0.0)
    full = meter.predict(0.0, 0.0)  # no drop in either half
    wanted = budget.tflops if budget.tflops is not None else full * (budget.fraction or 1.0)
    least = meter.predict(_LARGEST, fixed)
    if not least <= wanted <= spent * (1 + TOLERANCE):
        asked = f"fraction={budget.fraction:g}" if budget.fraction is not None else f"tflops={budget.tflops:.4g}"
        unit, scale = ("of the full cost", 1 / full) if budget.fraction is not None else ("TFLOPs per image", 1.0)
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


def remembered(store: Path, settings: Mapping[str, Any], find: Callable[[], Calibration]) -> Calibration:
    """What ``find()`` returns, kept for the next time the same is asked.

    Args:
        store: file that keeps it.
        settings: plain values that identify the question.
        find: called without arguments if the answer is not known.
    """
    with suppress(OSError):
        store.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(store.with_name(f".{store.name}.lock"))
    # One of several processes calibrates, the others wait and read. There may be no lock: the checkpoint is somebody
    # else's, or the file system has none.
    with suppress(OSError, NotImplementedError):
        lock.acquire()
    try:
        known: list[_Answer] = []
        with suppress(FileNotFoundError):
            known = read_json(store, list[_Answer], "delete it, it is found again")
        for entry in known:
            if entry.settings == settings:
                return entry.found
        found = find()
        try:
            write_json(store, [asdict(entry) for entry in (*known, _Answer(dict(settings), found))])
        except UserError as error:
            print(f"The drop fraction is not kept for the next time: {error}")
        return found
    finally:
        lock.release()
