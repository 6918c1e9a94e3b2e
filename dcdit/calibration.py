"""From a budget in TFLOPs, or as a share of the full cost, to the drop fraction that meets it."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dcdit.diffusion.guidance import Guidance
from dcdit.diffusion.sampling import Sampler, Step
from dcdit.errors import UserError
from dcdit.evaluation.flops import Cost
from dcdit.generation import Model, generate
from dcdit.network import DCDiT

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
    cost = Cost.of_network(model.network)
    labels = torch.arange(_IMAGES) * len(model.classes) // _IMAGES

    def measure(drop: float) -> tuple[float, list[tuple[Tensor, int]]]:
        """TFLOPs per image at ``drop``, and for each step the natural lengths and how many halves ran."""
        natural: list[tuple[Tensor, int]] = []

        def note(numbers: list[int], step: Step) -> None:
            assert step.output.routing is not None
            lengths = step.output.routing.natural_mask.sum(dim=1).cpu()
            natural.append((lengths, len(lengths) // len(numbers)))

        drawn = generate(
            model,
            replace(guidance, drop_fraction=drop),
            sampler,
            labels,
            range(_IMAGES),
            seed=0,
            batch_size=batch_size,
            precision=precision,
            on_step=note,
        )
        spent = torch.cat([batch.flops(cost) for batch in drawn])
        return spent.mean().item() / 1e12, natural

    def predicted(natural: list[tuple[Tensor, int]], drop: float) -> float:
        other = drop if guidance.uncond_drop_fraction is None else guidance.uncond_drop_fraction
        total = 0.0
        for lengths, halves in natural:
            for part, fraction in zip(lengths.chunk(halves), (drop, other), strict=False):
                kept = (part - (part * fraction).floor()).clamp(min=1)
                total += cost.of(kept).sum().item()
        return total / _IMAGES / 1e12

    # The full cost has no drop in either half; what remains fixed of the unconditional one is part of the search.
    full, natural = measure(0.0)
    if guidance.uncond_drop_fraction is not None:
        full = predicted_full(natural, cost)
    wanted = target.tflops if target.tflops is not None else full * (target.share or 1.0)
    most, least = predicted(natural, 0.0), predicted(natural, _LARGEST)
    if not least <= wanted <= most * (1 + TOLERANCE):
        raise UserError(
            f"budget: {wanted:.4g} TFLOPs per image cannot be met, from {least:.4g} (drop fraction {_LARGEST}) to"
            f" {most:.4g} (none) is possible with this sampler and guidance"
        )
    drop, spent = 0.0, most
    for _ in range(_ROUNDS):
        if abs(spent / wanted - 1) <= TOLERANCE:
            break
        drop = _solve(lambda value, natural=natural: predicted(natural, value), wanted)
        spent, natural = measure(drop)
    if abs(spent / wanted - 1) > 2 * TOLERANCE:
        raise UserError(f"budget: {wanted:.4g} TFLOPs per image was missed: drop fraction {drop:.4f} costs {spent:.4g}")
    return Calibration(round(drop, 4), spent, full)


def predicted_full(natural: list[tuple[Tensor, int]], cost: Cost) -> float:
    """TFLOPs per image if neither half dropped anything."""
    return sum(cost.of(lengths).sum().item() for lengths, _ in natural) / _IMAGES / 1e12


def _solve(function: Any, wanted: float) -> float:
    """Where the falling ``function`` reaches ``wanted``, by bisection."""
    low, high = 0.0, _LARGEST
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) > wanted else (low, middle)
    return (low + high) / 2


def remembered(checkpoint: Path, settings: Mapping[str, Any], find: Any) -> Calibration:
    """What ``find()`` returns, kept beside the checkpoint for the next time the same is asked.

    Args:
        checkpoint: file whose ``.budgets.json`` is the store.
        settings: plain values that identify the question.
        find: called without arguments if the answer is not known.
    """
    store = checkpoint.with_suffix(".budgets.json")
    known = json.loads(store.read_text()) if store.is_file() else []
    for entry in known:
        if entry["settings"] == settings:
            return Calibration(**entry["found"])
    found = find()
    known.append({"settings": dict(settings), "found": asdict(found)})
    draft = store.with_name(store.name + ".part")
    draft.write_text(json.dumps(known, indent=1) + "\n")
    draft.replace(store)
    return found
