"""Samples what is chosen on the explorer's page, one image at a time, with all that is to be shown of it."""

import statistics
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from dcdit.checkpoints.load import was_trained_without_backbone
from dcdit.checkpoints.resolve import CheckpointSource
from dcdit.checks import to_plain
from dcdit.compute.flops import count
from dcdit.compute.table import format_flops
from dcdit.diffusion.samplers import Step
from dcdit.diffusion.settings import samplers_of
from dcdit.errors import UserError
from dcdit.explorer.choice import Choice
from dcdit.runtime.memory import configure_memory
from dcdit.sampling.budget import Calibration
from dcdit.sampling.cost import SamplingCost
from dcdit.sampling.figures import Moment, Recorder, decoded, panels
from dcdit.sampling.overlays import Pixels, fitted
from dcdit.sampling.pictures import animation_frames
from dcdit.sampling.settings import SamplingConfig
from dcdit.sampling.setup import Sampling, build_sampling, calibrate_budget, load, with_budget_met

STRIP = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
"""Drop fractions of the strip of seven budgets."""
_TIMED, _KEPT = 9, 64

OnProgress = Callable[[int, int, str], None]
"""Called after every evaluation of the network with its number, their count, and what is sampled."""


class StoppedError(Exception):
    """The sampling was stopped; raised by an :data:`OnProgress`."""


@dataclass(frozen=True)
class GeneratedImage:
    """A generated image, with the settings, the steps and the cost that made it.

    Attributes:
        choice: what was chosen.
        sampling: what made it.
        title: model, sampler, budget and cost in words.
        image: (height, width, 1 or 3) uint8.
        moments: at every evaluation of the network.
        tokens: share of the positions that ran at each of them, of the main branch; empty without router.
        drops: drop fraction of the main branch at each.
        step_flops: FLOPs of each, both branches of guidance.
        flops: of all.
        kept: mean share of the positions that were kept in all evaluations of both branches; reused ones keep none.
        times: milliseconds of sampling in the last runs with these settings on this machine; it grows with them.
        full: the same image at the full budget; None if this is it.
    """

    choice: Choice
    sampling: Sampling
    title: str
    image: NDArray[Any]
    moments: Sequence[Moment]
    tokens: Sequence[float]
    drops: Sequence[float]
    step_flops: Sequence[float]
    flops: float
    kept: float
    times: Sequence[float]
    full: "GeneratedImage | None"

    @property
    def milliseconds(self) -> float:
        """Median time of the last runs."""
        return statistics.median(self.times)

    @property
    def lost(self) -> float:
        """Mean absolute difference from the image at the full budget, as a share of the range of a pixel."""
        return 0.0 if self.full is None else difference(self.image, self.full.image).mean() / 255

    def at(self, index: int) -> list[tuple[str, Pixels]]:
        """Pictures of one evaluation: x_t, the x_0 that is predicted of it, what ran, and the probability."""
        moment = self.moments[min(index, len(self.moments) - 1)]
        noisy, clean = decoded([moment.x, moment.clean], self.sampling.decode)
        return panels(moment, noisy, clean)

    def animation(self) -> list[Pixels]:
        """Pictures of its way from noise, fifty at most, and of itself at the end."""
        chosen = np.linspace(0, len(self.moments) - 1, min(50, len(self.moments))).round().astype(int)
        return animation_frames([self.moments[index] for index in chosen], self.image, self.sampling, self.title)


def difference(one: NDArray[Any], two: NDArray[Any]) -> NDArray[Any]:
    """Absolute difference of two images (height, width, channels) uint8, pixel by pixel; UserError if sizes differ."""
    if one.shape[:2] != two.shape[:2]:  # grey and colours compare
        raise UserError(f"an image of {_size(one)} pixels cannot be compared with one of {_size(two)}")
    return np.abs(one.astype(np.int16) - two.astype(np.int16)).astype(np.uint8)


def _size(image: NDArray[Any]) -> str:
    return f"{image.shape[0]} x {image.shape[1]}"


T = TypeVar("T")


class _RecentlyUsed(Generic[T]):
    """A cache of the values that were used last."""

    def __init__(self, size: int) -> None:
        self._known: OrderedDict[Hashable, T] = OrderedDict()
        self._size = size

    def get(self, key: Hashable, compute: Callable[[], T]) -> T:
        """The value of ``key``, computed if it is not there."""
        value = self._known.pop(key) if key in self._known else compute()
        self._known[key] = value
        while len(self._known) > self._size:
            self._known.popitem(last=False)
        return value


class Session:
    """One or two loaded checkpoints, and the images, times and budgets that were sampled with them last.

    Args:
        config: the configuration of sampling, of which each :class:`Choice` changes a part.
        sources: the checkpoints.
        most_steps: the most steps that anyone may ask for.
        overrides: words of the command line for the commands that the page shows.
    """

    def __init__(
        self, config: SamplingConfig, sources: Sequence[CheckpointSource], most_steps: int, overrides: str = ""
    ) -> None:
        configure_memory()
        self.config, self.sources, self.most_steps, self.overrides = config, sources, most_steps, overrides
        self.base = to_plain(config)
        self.loaded = [load(config, source) for source in sources]
        self._times: _RecentlyUsed[deque[float]] = _RecentlyUsed(_KEPT)
        self._full: _RecentlyUsed[GeneratedImage] = _RecentlyUsed(8)
        self._budgets: _RecentlyUsed[Calibration] = _RecentlyUsed(_KEPT)
        for side in range(len(sources)):  # the first run is a slow one, and no measure of anything
            self._sample(side, Choice(0, 0, self.sampler(side), 2, 1.0), lambda *_: None, "")
        self._times = _RecentlyUsed(_KEPT)

    def classes(self, side: int) -> Sequence[str]:
        """Names of the classes that a checkpoint knows."""
        return self.loaded[side].model.latents.classes

    def samplers(self, side: int) -> list[str]:
        """Names of the samplers that fit a checkpoint."""
        return samplers_of(self.loaded[side].model.process.settings.name)

    def sampler(self, side: int) -> str:
        """Name of the sampler that the command asked for."""
        return self.config.sampler.for_process(self.loaded[side].model.process.settings).name

    def routes(self, side: int) -> bool:
        """Whether the network of a checkpoint drops tokens, and so has budgets."""
        return self.loaded[side].model.network.routes

    @property
    def drops_path(self) -> bool:
        """Whether a checkpoint was trained to leave its backbone out."""
        return any(was_trained_without_backbone(loaded.model) for loaded in self.loaded)

    def command(self, side: int, choice: Choice, out: str) -> str:
        """The words for a terminal that make the same image in the folder ``out``."""
        name = self.sources[side].name
        name = str(Path(name).resolve()) if Path(name).exists() else name
        return " ".join(filter(None, [choice.command(self.base, name, out), self.overrides]))

    def generate(self, side: int, choice: Choice, on_progress: OnProgress) -> GeneratedImage:
        """Sample what was chosen, and first, unless that is known, the same at the full budget.

        Raises:
            UserError: naming what cannot be, and the remedy.
        """
        sampling = self._sampling(side, choice)
        full = None
        if choice != choice.at_full_budget:
            key = (side, choice.at_full_budget)
            full = self._full.get(key, lambda: self._sample(side, choice.at_full_budget, on_progress, "full budget"))
        generated = self._sample(side, choice, on_progress, "image", sampling)
        if full is None:
            self._full.get((side, choice), lambda: generated)
            return generated
        return replace(generated, full=full)

    def usual_tflops(self, side: int) -> float:
        """What an image costs about, at seven tenths of the full budget and with what the command said of sampling."""
        model, network = self.loaded[side].model, self.loaded[side].model.network
        compression = float(model.training.get("compression") or 4)
        evaluation = count(network, [network.positions / compression] if network.routes else []).total
        branches = 1 if self.config.guidance.scale == 1 else 2
        return float(f"{0.7 * evaluation * self.config.sampler.steps * branches / 1e12:.2g}")

    def strip(self, side: int, choice: Choice, on_progress: OnProgress) -> list[tuple[str, Pixels]]:
        """The same seed at seven budgets, with words for each."""
        if not self.routes(side):
            raise UserError(f"{self.sources[side].run} has one budget: its network drops no tokens")
        pictures = []
        for drop in STRIP:
            generated = self._sample(side, replace(choice, meet="drop", drop=drop), on_progress, f"ρ {drop:g}")
            pictures.append((f"ρ {drop:g}, {format_flops(generated.flops)}", fitted(generated.image, 256)))
        return pictures

    def _times_of(self, side: int, choice: Choice) -> "deque[float]":
        """Milliseconds of the last runs with these settings, whatever the image."""
        return self._times.get((side, replace(choice, label=0, seed=0)), lambda: deque(maxlen=_TIMED))

    def _sampling(self, side: int, choice: Choice) -> Sampling:
        """The networks and settings that sample a choice."""
        if choice.steps > self.most_steps:
            raise UserError(f"steps={choice.steps}: the page takes at most {self.most_steps}, or start it with more")
        last = len(self.classes(side)) - 1
        if choice.label > last:
            raise UserError(f"class {choice.label}: {self.sources[side].run} knows the classes 0 to {last}")
        config = choice.config(self.base)
        sampling = build_sampling(config, self.sources[side], self.loaded[side])
        if not config.budget.given:
            return sampling
        key = (side, replace(choice, label=0, seed=0))
        return with_budget_met(sampling, self._budgets.get(key, lambda: calibrate_budget(sampling)))

    def _sample(
        self, side: int, choice: Choice, on_progress: OnProgress, what: str, sampling: Sampling | None = None
    ) -> GeneratedImage:
        """Sample one image, without looking at what is known."""
        sampling = sampling or self._sampling(side, choice)
        model, timesteps = sampling.model, sampling.sampler.timesteps
        recorder = Recorder([0], None, len(timesteps), model.process.clean)

        def note(numbers: list[int], step: Step) -> None:
            recorder.take(numbers, step)
            on_progress(step.index + 1, len(timesteps), what)

        begin = time.perf_counter()
        (batch,) = sampling.generate(torch.tensor([choice.label]), [0], note)
        times = self._times_of(side, choice)
        times.append(1000 * (time.perf_counter() - begin))
        cost = SamplingCost.of(batch)
        moments = recorder.rows[0]
        return GeneratedImage(
            choice,
            sampling,
            f"{sampling.description}, {format_flops(cost.flops)}",
            sampling.images(batch)[0].permute(1, 2, 0).cpu().numpy(),
            moments,
            [float(moment.boundaries.mask.mean()) for moment in moments if moment.boundaries is not None],
            [sampling.guidance.settings.drop_at(timestep)[0] for timestep in timesteps],
            batch.step_flops[:, 0].tolist(),
            cost.flops,
            cost.mean_keep_ratio(model.latents.positions) or 0.0,
            times,
            None,
        )
