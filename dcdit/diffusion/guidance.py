"""Guidance: a denoiser that wraps the denoisers of a main branch and of a weaker, guiding branch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from dcdit.diffusion.settings import GuidanceSettings


class RoutingLike(Protocol):
    """A router's decision for a batch: probabilities, and what was kept before and after the tail drop, each (B, L);
    with a capacity, how many tokens of each sample had no room, (B,)."""

    @property
    def prob(self) -> Tensor: ...  # noqa: D102
    @property
    def natural_mask(self) -> Tensor: ...  # noqa: D102
    @property
    def mask(self) -> Tensor: ...  # noqa: D102
    @property
    def beyond(self) -> Tensor | None: ...  # noqa: D102
    def of(self, samples: slice) -> "RoutingLike": ...  # noqa: D102


class Prediction(Protocol):
    """What a denoiser returns: noise, velocity or image, perhaps variance, (B, C or 2C, H, W); the routing if any;
    with a cache, the change of its input, (B,); with gates, what they let run."""

    @property
    def prediction(self) -> Tensor: ...  # noqa: D102
    @property
    def routing(self) -> RoutingLike | None: ...  # noqa: D102
    @property
    def change(self) -> Tensor | None: ...  # noqa: D102
    @property
    def gating(self) -> Any: ...  # noqa: D102


class StepCache(Protocol):
    """Feature caching of one trajectory, such as :class:`dcdit.network.caching.TrajectoryCache`."""

    def step(self, timestep: float, branches: tuple[int, ...]) -> Any:
        """The cache argument of a network for a batch of these branches: 0 is the main one, 1 the guiding one."""


Denoiser = Callable[..., Prediction]
"""``denoiser(x, t, y, drop_fraction)``: a network; with feature caching ``denoiser(x, t, y, drop_fraction, cache)``.
With a capacity ``capacity=`` as well."""

PositionShares = Sequence[float | None]
"""Shares of the grid positions, of the main and of the guiding branch; None of a network that does not route."""

Capacity = Callable[[float], PositionShares]
"""``capacity(timestep)``: the shares of the positions that a packed sequence has room for; one sequence of both
branches has room for the mean of both."""


def guide(main: Tensor, guiding: Tensor, scale: float, channels: int) -> Tensor:
    """eps = eps_g + s (eps_m - eps_g) on the leading channels of the main prediction; of velocities and images alike.

    A velocity is a difference to the image over t, so that guided images have the guided velocity.

    Classifier-free guidance where the guiding branch knows no class (arXiv 2207.12598), autoguidance where it knows the
    class and is weaker otherwise (arXiv 2406.02507).

    Args:
        main, guiding: predictions of the branches, (B, C or 2C, H, W).
        scale: guidance scale s; 1 is the main prediction.
        channels: how many channels to guide, at most C. The published numbers guided 3 of 4.

    Returns:
        (B, C or 2C, H, W): the remaining channels and the variance are those of the main prediction.
    """
    noise = guiding[:, :channels] + scale * (main[:, :channels] - guiding[:, :channels])
    return torch.cat([noise, main[:, channels:]], dim=1)


@dataclass(frozen=True)
class GuidedOutput:
    """A guided prediction.

    Attributes:
        prediction: (B, C or 2C, H, W).
        routings: of the main branch and, if it ran, of the guiding one; None of a network without router.
        changes: with feature caching, how much the input of each branch changed since its step before, (B,) each.
        gatings: of the same branches as ``routings``, such as :class:`dcdit.network.gates.Gating`; None without gates.
    """

    prediction: Tensor
    routings: tuple[RoutingLike | None, ...]
    changes: tuple[Tensor, ...] = ()
    gatings: tuple[Any, ...] = (None, None)


class GuidingReuse:
    """Predictions of the guiding branch in one trajectory, each of which serves several evaluations of the network.

    Args:
        every: how many.

    Attributes:
        prediction: the last one, (B, C or 2C, H, W); empty before the first.
    """

    def __init__(self, every: int) -> None:
        self.every, self.prediction = every, torch.empty(0)
        self._evaluations = 0

    def next(self) -> Tensor | None:
        """Count an evaluation; return what it reuses, None where the guiding branch has to run."""
        self._evaluations += 1
        return self.prediction if (self._evaluations - 1) % self.every else None


@dataclass(frozen=True)
class Guidance:
    """A denoiser that is guided away from a weaker one, each with its own budget (Lite-CFG).

    Attributes:
        denoiser: the network.
        null_class: label that stands for no class.
        settings: scale, interval, drop fractions, and what makes the guiding branch weaker.
        guiding: the network of the guiding branch; None for the same.
        cache: what the samples of one trajectory reuse; None where all is computed.
        capacity: the room of the packed sequences; None packs exactly.
        reuse: what reuses predictions of the guiding branch in one trajectory; None where it always runs.
    """

    denoiser: Denoiser
    null_class: int
    settings: GuidanceSettings
    guiding: Denoiser | None = None
    cache: StepCache | None = None
    capacity: Capacity | None = None
    reuse: GuidingReuse | None = None

    def for_trajectory(self, cache: StepCache | None) -> "Guidance":
        """Return the same for one trajectory of a batch, which begins with nothing to reuse but a new ``cache``."""
        every = self.settings.every
        return replace(self, cache=cache, reuse=GuidingReuse(every) if every > 1 else None)

    def _cached(self, timestep: float, *branches: int) -> tuple[Any, ...]:
        """The cache argument of a network for a batch of these branches; empty where all is computed."""
        return () if self.cache is None else (self.cache.step(timestep, branches),)

    def _room(self, timestep: float, *branches: int) -> dict[str, float]:
        """The capacity argument of a network for a batch of these branches; empty where it packs exactly."""
        if self.capacity is None:
            return {}
        shares = [share for branch in branches if (share := self.capacity(timestep)[branch]) is not None]
        return {"capacity": sum(shares) / len(shares)} if shares else {}

    def _changes(self, output: Prediction) -> tuple[Tensor, ...]:
        return () if self.cache is None or output.change is None else (output.change,)

    def __call__(self, x: Tensor, timestep: float, y: Tensor) -> GuidedOutput:
        """Guided prediction for ``x`` (B, C, H, W), ``y`` (B,) at ``timestep``.

        Both branches of one network run in one batch of 2B.
        """
        drop, guiding_drop = self.settings.drop_at(timestep)
        t = torch.full(y.shape, timestep, device=y.device)  # whole numbers or not, as the process has it
        channels, guided = self.settings.guided_channels(x.shape[1]), self.settings.is_guided(timestep)
        reused = self.reuse.next() if guided and self.reuse is not None else None
        if not guided or reused is not None:
            output = self.denoiser(x, t, y, drop, *self._cached(timestep, 0), **self._room(timestep, 0))
            prediction = output.prediction
            if reused is not None:
                prediction = guide(prediction, reused, self.settings.scale, channels)
            return GuidedOutput(prediction, (output.routing,), self._changes(output), (output.gating,))
        guiding_y = y if self.settings.guiding_keeps_class else torch.full_like(y, self.null_class)
        if self.guiding is not None:
            outputs = (
                self.denoiser(x, t, y, drop, *self._cached(timestep, 0), **self._room(timestep, 0)),
                self.guiding(x, t, guiding_y, guiding_drop, *self._cached(timestep, 1), **self._room(timestep, 1)),
            )
            main, guiding = (output.prediction for output in outputs)
            routings = tuple(output.routing for output in outputs)
            changes = tuple(change for output in outputs for change in self._changes(output))
            gatings = tuple(output.gating for output in outputs)
        else:
            fractions: float | Tensor = drop
            if guiding_drop != drop:
                both = torch.tensor([drop, guiding_drop], device=x.device)
                fractions = both.repeat_interleave(len(y), output_size=2 * len(y))
            both_y, cached = torch.cat([y, guiding_y]), self._cached(timestep, 0, 1)
            room = self._room(timestep, 0, 1)
            output = self.denoiser(x.repeat(2, 1, 1, 1), t.repeat(2), both_y, fractions, *cached, **room)
            main, guiding = output.prediction.chunk(2)
            parts = slice(len(y)), slice(len(y), None)
            routings = tuple(None if output.routing is None else output.routing.of(part) for part in parts)
            changes = tuple(part for change in self._changes(output) for part in change.chunk(2))
            gatings = (output.gating, output.gating)
        if self.reuse is not None:
            self.reuse.prediction = guiding
        return GuidedOutput(guide(main, guiding, self.settings.scale, channels), routings, changes, gatings)
