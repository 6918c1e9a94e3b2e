"""From a budget in TFLOPs, or as a fraction of the full cost, to the drop fraction or the caching that meets it."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from filelock import FileLock
from torch import Tensor

from dcdit.checkpoints.load import Model, was_trained_without_backbone
from dcdit.checks import DropFraction, NonNegative, Positive, call_checked
from dcdit.compute.flops import Cost
from dcdit.diffusion.guidance import Guidance
from dcdit.diffusion.samplers import Sampler, Step
from dcdit.diffusion.settings import BudgetSettings, GuidanceSettings, SamplerSettings
from dcdit.errors import UserError
from dcdit.network.caching import reuse
from dcdit.runtime.files import read_json, write_json
from dcdit.runtime.processes import print_once
from dcdit.sampling.cost import SamplingCost
from dcdit.sampling.generate import BranchCost, branch_networks, generate

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_MEANS = {"drop": "drops alone", "cache": "reuse alone", "both": "drops and reuse together"}
TOLERANCE = 0.01  # of the cost measured on the calibration's own images; half of what is promised for others
_IMAGES, _ROUNDS, _LARGEST = 16, 4, 0.99
_LARGEST_CHANGE = {"drop": 0.0, "cache": 10.0, "both": 0.4}
"""The largest threshold that is tried: where both meet a budget, drops do the rest before quality suffers."""
_CACHE_SHARE = 0.9
"""Where both meet a budget: caching alone costs the fraction asked for to this power of the full cost. On digits it
does so for less than drops (docs/performance.md)."""


@dataclass(frozen=True)
class Calibration:
    """Drop fraction, threshold of caching, and kind of guiding branch that meet a budget.

    Attributes:
        weak: ``path`` where the guiding branch is to leave its backbone out; None for what was asked for.
        drop_fraction: meets the budget, together with the others.
        cache: threshold of feature caching, 0 for none.
        tflops: measured with both, per image.
        full_tflops: measured without any drop or reuse.
    """

    weak: Literal["path"] | None
    drop_fraction: DropFraction
    cache: NonNegative
    tflops: Positive
    full_tflops: Positive

    @property
    def described(self) -> str:
        """What meets the budget, as settings."""
        weak = f"guidance.weak={self.weak}, " if self.weak else ""
        cache = f" and sampler.cache={self.cache:g}" if self.cache else ""
        return f"{weak}drop fraction {self.drop_fraction}{cache}"

    def guidance(self, settings: GuidanceSettings) -> GuidanceSettings:
        """The ``settings`` of guidance with what meets the budget."""
        return replace(settings, weak=self.weak or settings.weak, drop_fraction=self.drop_fraction)

    def sampler(self, settings: SamplerSettings) -> Sampler:
        """A sampler of these ``settings`` with what meets the budget."""
        return Sampler(replace(settings, cache=self.cache))


@dataclass(frozen=True)
class _Answer:
    """The fields of what was found, in the file that keeps it, and what it was for."""

    settings: dict[str, Any]
    found: dict[str, Any]


Found = TypeVar("Found", bound="DataclassInstance")


class _Meter:
    """Samples the same few images at any drop fraction and threshold, and counts what they cost.

    Args:
        cached: whether features are cached, and the changes that caching goes by are recorded.
        others: as of :func:`calibrate`.
    """

    def __init__(
        self, model: Model, guidance: Guidance, sampler: Sampler, batch_size: int, precision: str, cached: bool
    ) -> None:
        self.model, self.guidance, self.sampler = model, guidance, sampler
        self.batch_size, self.precision = batch_size, precision
        networks = branch_networks(model, guidance)
        self.costs = [BranchCost(network) for network in networks]
        self.cached = cached
        if cached and not all(network.caches for network in networks):
            raise UserError("budget.by: one of the networks computes every step, take budget.by=drop")
        self.steps: list[list[_BranchStep]] = []
        """Of the last images: for each batch and step what ran."""

    def measure(self, drop: float, threshold: float) -> float:
        """Return the TFLOPs per image at ``drop`` and ``threshold``."""
        self.steps = []
        last = self.sampler.timesteps[-1]

        def note(numbers: list[int], step: Step) -> None:
            branches = []
            for branch, routing in enumerate(step.output.routings):
                # a network without router has one cost, whatever the count of tokens
                natural = torch.zeros(len(numbers)) if routing is None else routing.natural_mask.sum(dim=1)
                changes = step.output.changes[branch] if step.output.changes else None
                cost = self.costs[branch].at(step.output.gatings[branch])
                branches.append(_BranchStep(natural, changes, step.timestep == last, cost))
            self.steps.append(branches)

        settings = replace(self.guidance.settings, drop_fraction=drop)
        options = replace(self.sampler.settings, cache=max(threshold, _COMPUTE_ALL) if self.cached else 0.0)
        batches = generate(
            self.model,
            replace(self.guidance, settings=settings),
            Sampler(options),
            torch.arange(_IMAGES) * self.model.network.num_classes // _IMAGES,
            range(_IMAGES),
            seed=0,
            batch_size=self.batch_size,
            precision=self.precision,
            on_step=note,
        )
        spent = SamplingCost.total(map(SamplingCost.of, batches)).tflops_per_image
        self.steps = [[branch.on_host() for branch in branches] for branches in self.steps]
        return spent

    def predict(self, drop: float, uncond_drop: float | None, threshold: float) -> float:
        """Return the TFLOPs per image, had the last images had these drop fractions and this threshold.

        ``uncond_drop`` None is that of the main branch.
        """
        fractions = (drop, drop if uncond_drop is None else uncond_drop)
        total = 0.0
        added_up = [torch.zeros(()), torch.zeros(())]
        for branches in self.steps:
            for number, (branch, fraction) in enumerate(zip(branches, fractions, strict=False)):
                kept = (branch.natural - (branch.natural * fraction).floor()).clamp(min=int(fraction < 1))
                if branch.changes is not None:
                    if branch.changes.isinf().all():  # the first step of a batch
                        added_up[number] = torch.zeros(())
                    reused, added_up[number] = reuse(added_up[number], branch.changes, threshold, branch.last)
                    kept = kept * ~reused
                total += branch.cost.of(kept).sum().item()
        return total / _IMAGES / 1e12


@dataclass(frozen=True)
class _BranchStep:
    """One branch at a step: how many tokens the router kept by itself, (n,), and how much its input changed, (n,)."""

    natural: Tensor
    changes: Tensor | None
    last: bool
    cost: Cost

    def on_host(self) -> "_BranchStep":
        return replace(self, natural=self.natural.cpu(), changes=None if self.changes is None else self.changes.cpu())


_COMPUTE_ALL = 1e-30
"""A threshold that no change is below: everything is computed, and the changes are recorded."""


def calibrate(
    model: Model, guidance: Guidance, sampler: Sampler, budget: BudgetSettings, batch_size: int, precision: str
) -> Calibration:
    """Find drop fraction, threshold of feature caching, or both, by sampling a few images and counting what they cost.

    Where ``budget.by`` leaves the choice, the network was trained for it and nothing else weakens the guiding branch,
    that branch leaves its backbone out first: on digits this cost no quality (docs/digits.md).

    Args:
        model, sampler, batch_size, precision: as images will be sampled.
        guidance: the same; a drop fraction of the guiding branch alone stays as it is, and so do the drop fraction or
            the sampler's threshold where the budget is met by the other alone.
        budget: what to meet, and by what.

    Raises:
        UserError: if the network drops nothing, or nothing meets the budget.
    """
    if not model.network.routes:
        raise UserError(f"budget: {model.network.title} has one fixed cost, leave the budget out")
    fixed = guidance.settings.guiding_drop_fraction
    caching = all(network.caches for network in branch_networks(model, guidance)) and not sampler.settings.cache
    by = budget.by or ("both" if caching else "drop")
    meter = _Meter(model, guidance, sampler, batch_size, precision, by != "drop" or sampler.settings.cache > 0)
    drop = guidance.settings.drop_fraction if by == "cache" else 0.0
    threshold = sampler.settings.cache if by == "drop" else 0.0
    spent = dearest = meter.measure(drop, threshold)
    full = meter.predict(0.0, 0.0, 0.0)  # neither drop nor reuse, in either branch
    wanted = budget.tflops if budget.tflops is not None else full * (budget.fraction or 1.0)
    weak: Literal["path"] | None = None
    # with a margin, for images that are guided otherwise keep other tokens
    without_backbone = 0.97 * meter.predict(drop, 1.0, threshold)
    if budget.by is None and guides_without_backbone(model, guidance) and wanted <= without_backbone:
        weak, fixed = "path", 1.0
        meter.guidance = replace(guidance, settings=replace(guidance.settings, weak=weak))
        spent = meter.measure(drop, threshold)
    change = _LARGEST_CHANGE[by]
    most = (_LARGEST if by != "cache" else drop, change if by != "drop" else threshold)
    least = meter.predict(most[0], fixed, most[1])
    if not least <= wanted <= spent * (1 + TOLERANCE):
        means = _MEANS[by] + (", with guidance.weak=path" if weak else "")
        raise UserError(_out_of_range(budget, means, least, dearest, full))
    for _ in range(_ROUNDS):
        if abs(spent / wanted - 1) <= TOLERANCE:
            break
        # Other budgets lead to other images, whose routing differs a little: measure, and solve again from there.
        if by != "drop":
            target, at = (wanted, drop) if by == "cache" else (full * (wanted / full) ** _CACHE_SHARE, 0.0)
            threshold = _solve(partial(meter.predict, at, fixed), target, change)
        if by != "cache":
            drop = _solve(partial(meter.predict, uncond_drop=fixed, threshold=threshold), wanted, _LARGEST)
        spent = meter.measure(drop, threshold)
    if abs(spent / wanted - 1) > 2 * TOLERANCE:
        raise UserError(
            f"budget: {wanted:.4g} TFLOPs per image was missed, drop fraction {drop:.4f} and threshold {threshold:.4g}"
            f" cost {spent:.4g}: give guidance.drop_fraction or sampler.cache instead"
        )
    return Calibration(weak, round(drop, 4), round(threshold, 5), spent, full)


def guides_without_backbone(model: Model, guidance: Guidance) -> bool:
    """Whether a budget may let the guiding branch leave its backbone out: trained for it, not weakened otherwise."""
    settings = guidance.settings
    usual = settings.scale != 1 and settings.weak is None and settings.weak_checkpoint is None
    own = settings.uncond_drop_fraction is not None or settings.every != 1
    return usual and not own and was_trained_without_backbone(model)


def _out_of_range(budget: BudgetSettings, means: str, least: float, most: float, full: float) -> str:
    """Say which budgets can be met; costs in TFLOPs per image."""
    given = f"fraction={budget.fraction:g}" if budget.fraction is not None else f"tflops={budget.tflops:.4g}"
    unit, scale = ("of the full cost", 1 / full) if budget.fraction is not None else ("TFLOPs per image", 1.0)
    return (
        f"budget.{given} cannot be met by {means}: from {least * scale:.4g} to {most * scale:.4g} {unit} is"
        " possible with this sampler and guidance, ask for something in between; fewer sampler.steps cost less, too"
    )


def _solve(function: Callable[[float], float], wanted: float, high: float) -> float:
    """Return where the falling ``function`` reaches ``wanted``, between 0 and ``high``, by bisection."""
    low = 0.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) > wanted else (low, middle)
    return (low + high) / 2


def remembered(kind: type[Found], store: Path, settings: Mapping[str, Any], find: Callable[[], Found]) -> Found:
    """Return what ``find()`` returns, and keep it for the next call with the same settings.

    Args:
        kind: the dataclass of what is found.
        store: file that keeps it.
        settings: plain values that it depends on.
        find: called if nothing was found for these settings.
    """
    remedy = "delete it, it is found again"
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
            known = read_json(store, list[_Answer], remedy)
        for entry in known:
            if entry.settings == settings:
                try:
                    return call_checked(kind, entry.found, "found")
                except UserError as error:
                    raise UserError(f"{store}: {error}: {remedy}") from error
        found = find()
        try:
            write_json(store, [asdict(entry) for entry in (*known, _Answer(dict(settings), asdict(found)))])
        except UserError as error:
            print_once(f"What was calibrated is not kept for the next time: {error}")
        return found
    finally:
        lock.release()
