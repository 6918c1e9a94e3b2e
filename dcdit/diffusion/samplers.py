"""Samplers: DDPM's with the schedulers of diffusers, flow matching's in a few lines; one random stream per sample."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from dcdit.diffusion.guidance import GuidedOutput
from dcdit.diffusion.process import Process, build_process
from dcdit.diffusion.schedule import BETA_END, BETA_START, linear_betas, shift_times
from dcdit.diffusion.settings import (
    DDIM,
    DDPM,
    TRAIN_STEPS,
    DPMSolver,
    Euler,
    EulerMaruyama,
    Heun,
    SamplerSettings,
)
from dcdit.runtime.imports import without

with without("torch._dynamo"):  # a compiler, more than a second, for a decorator of networks that nobody builds here
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

GuidedDenoiser = Callable[[Tensor, float, Tensor], GuidedOutput]
"""``denoiser(x, timestep, y)`` for x (B, C, H, W), y (B,)."""


@dataclass(frozen=True)
class Step:
    """One sampling step.

    Attributes:
        index: 0 for the first (noisiest) evaluation.
        timestep: the time that the network was told, 999..0 of DDPM, 1000 t of flow matching.
        x: (B, C, H, W) latents before the step.
        output: what the denoiser returned.
        next: (B, C, H, W) latents after it.
    """

    index: int
    timestep: float
    x: Tensor
    output: GuidedOutput
    next: Tensor


class Stepper(ABC):
    """What one sampler does in a step; made anew for every trajectory.

    Attributes:
        timesteps: the times at which the network is asked, from noise to image; twice for a step of second order.
    """

    timesteps: Sequence[float]

    @abstractmethod
    def step(self, prediction: Tensor, timestep: float, x: Tensor, generators: list[torch.Generator]) -> Tensor:
        """The latents (B, C, H, W) after a step.

        Args:
            prediction: (B, C or 2C, H, W) float32 noise and variance, or velocity.
            timestep: where ``x`` stands.
            x: (B, C, H, W) latents before it.
            generators: one for each sample, for whatever noise is added.
        """


class _Scheduled(Stepper):
    """A stepper with a scheduler of diffusers.

    Its tables are replaced by float64 ones: with float32 tables, clipped trajectories lose a factor of a thousand in
    precision at the last steps.
    """

    def __init__(self, scheduler: Any, steps: int) -> None:
        scheduler.betas = linear_betas()
        scheduler.alphas = 1 - scheduler.betas
        scheduler.alphas_cumprod = scheduler.alphas.cumprod(0)
        scheduler.one = scheduler.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
        scheduler.set_timesteps(steps)
        self.scheduler = scheduler  # diffusers' annotations know neither lists of generators nor each other's options
        self.timesteps = scheduler.timesteps.tolist()


_BETAS = {"beta_start": BETA_START, "beta_end": BETA_END}


class AncestralStepper(_Scheduled):
    """DDPM's ancestral sampling with the learned range variance."""

    def __init__(self, settings: DDPM) -> None:
        scheduler = DDPMScheduler(
            **_BETAS, clip_sample=settings.clip, variance_type="learned_range", timestep_spacing="linspace"
        )
        super().__init__(scheduler, settings.steps)

    @override
    def step(self, prediction: Tensor, timestep: float, x: Tensor, generators: list[torch.Generator]) -> Tensor:
        return self.scheduler.step(prediction, timestep, x, generator=generators).prev_sample


class ImplicitStepper(_Scheduled):
    """DDIM; it does not use the learned variance. Where x_0 is clipped, the noise is recomputed from it."""

    def __init__(self, settings: DDIM) -> None:
        super().__init__(DDIMScheduler(**_BETAS, clip_sample=settings.clip, timestep_spacing="leading"), settings.steps)
        self.options = {"eta": settings.eta, "use_clipped_model_output": settings.clip}

    @override
    def step(self, prediction: Tensor, timestep: float, x: Tensor, generators: list[torch.Generator]) -> Tensor:
        noise = prediction[:, : x.shape[1]]
        return self.scheduler.step(noise, timestep, x, **self.options, generator=generators).prev_sample


class MultistepStepper(_Scheduled):
    """DPM-Solver++; it does not use the learned variance. Its scheduler cannot clip: the noise is recomputed before."""

    def __init__(self, settings: DPMSolver) -> None:
        # brings SciPy's statistics along, half a second
        from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

        super().__init__(DPMSolverMultistepScheduler(**_BETAS, timestep_spacing="linspace"), settings.steps)
        self.clip = settings.clip

    @override
    def step(self, prediction: Tensor, timestep: float, x: Tensor, generators: list[torch.Generator]) -> Tensor:
        noise = prediction[:, : x.shape[1]]
        if self.clip:
            signal = self.scheduler.alphas_cumprod[int(timestep)].sqrt().item()
            deviation = (1 - signal**2) ** 0.5
            noise = (x - signal * ((x - deviation * noise) / signal).clamp(-1, 1)) / deviation
        return self.scheduler.step(noise, timestep, x).prev_sample


_FLOW = build_process({"name": "flow"})


class _FlowStepper(Stepper):
    """From t = 1 to 0 along velocities; what is particular is :meth:`advance`.

    Args:
        times: t from 1 to 0, before they are shifted.
    """

    def __init__(self, settings: Euler | Heun | EulerMaruyama, times: Tensor) -> None:
        self.clip = settings.clip
        self.times = shift_times(times, settings.shift or 1.0).tolist()  # and 0 at the end
        self.timesteps = [TRAIN_STEPS * t for t in self.times[:-1]]
        self.evaluations = 0

    @override
    def step(self, prediction: Tensor, timestep: float, x: Tensor, generators: list[torch.Generator]) -> Tensor:
        t = timestep / TRAIN_STEPS
        velocity = prediction[:, : x.shape[1]]
        if self.clip:
            velocity = (x - _FLOW.clean(prediction, x, timestep).clamp(-1, 1)) / t
        self.evaluations += 1
        return self.advance(velocity, t, x, generators)

    @abstractmethod
    def advance(self, velocity: Tensor, t: float, x: Tensor, generators: list[torch.Generator]) -> Tensor:
        """The latents after a step from ``t`` with this velocity (B, C, H, W)."""


class EulerStepper(_FlowStepper):
    """Euler's method: one evaluation of the network a step."""

    def __init__(self, settings: Euler) -> None:
        super().__init__(settings, torch.linspace(1, 0, settings.steps + 1, dtype=torch.float64))

    @override
    def advance(self, velocity: Tensor, t: float, x: Tensor, generators: list[torch.Generator]) -> Tensor:
        return x + (self.times[self.evaluations] - t) * velocity


class HeunStepper(_FlowStepper):
    """Heun's method: goes to the end of a step along the velocity at its start, then from the start along the mean of
    the velocities at both ends."""

    def __init__(self, settings: Heun) -> None:
        super().__init__(settings, torch.linspace(1, 0, settings.steps + 1, dtype=torch.float64))
        # At the end of the last step, t = 0, nothing is asked.
        self.timesteps = [TRAIN_STEPS * t for t in self.times[:-1] for _ in range(2)][1:]
        self.half_step: tuple[Tensor, Tensor, float] | None = None

    @override
    def advance(self, velocity: Tensor, t: float, x: Tensor, generators: list[torch.Generator]) -> Tensor:
        if self.half_step is None:
            following = self.times[(self.evaluations + 1) // 2]
            self.half_step = (x, velocity, t) if following else None
            return x + (following - t) * velocity
        (start, first, before), self.half_step = self.half_step, None
        return start + (t - before) * (first + velocity) / 2


class EulerMaruyamaStepper(_FlowStepper):
    """x - h (v - w s / 2) + sqrt(w h) noise, with w = t and the score s = -(x + (1 - t) v) / t."""

    def __init__(self, settings: EulerMaruyama) -> None:
        last = shift_times(torch.tensor(settings.last, dtype=torch.float64), 1 / (settings.shift or 1.0))
        even = torch.linspace(1, last.item(), settings.steps, dtype=torch.float64)
        super().__init__(settings, torch.cat([even, even.new_zeros(1)]))

    @override
    def advance(self, velocity: Tensor, t: float, x: Tensor, generators: list[torch.Generator]) -> Tensor:
        following = self.times[self.evaluations]
        step = t - following
        mean = x - step * (velocity + (x + (1 - t) * velocity) / 2)  # w s = -(x + (1 - t) v)
        if not following:
            return mean
        noise = torch.cat([torch.randn(1, *x.shape[1:], generator=generator) for generator in generators]).to(x.device)
        return mean + (t * step) ** 0.5 * noise


@dataclass(frozen=True)
class Sampler:
    """Steps a denoiser from noise to latents.

    Attributes:
        settings: which sampler, and how many steps.
        process: that the network was trained by; None for the one that the sampler is for, with its default settings.
    """

    settings: SamplerSettings
    process: Process | None = None

    def _process(self) -> Process:
        return self.process or build_process({"name": self.settings.process})

    @property
    def timesteps(self) -> list[float]:
        """The times at which the network is asked, from noise to image."""
        return list(self._stepper().timesteps)

    def _stepper(self) -> Stepper:
        return self.settings.for_process(self._process().settings).stepper()

    def trajectory(
        self,
        denoiser: GuidedDenoiser,
        shape: tuple[int, int, int],
        labels: Tensor,
        generators: Sequence[torch.Generator],
    ) -> Iterator[Step]:
        """Sample, yielding every step.

        Args:
            denoiser: returns what the network predicts, (B, C or 2C, H, W), guidance applied.
            shape: (C, H, W).
            labels: (B,) class labels; their device is where sampling runs.
            generators: one CPU generator per sample, the only source of randomness of that sample.
        """
        stepper, process, streams = self._stepper(), self._process(), list(generators)
        x = torch.cat([torch.randn(1, *shape, generator=stream) for stream in streams]).to(labels.device)
        for index, timestep in enumerate(stepper.timesteps):
            output = denoiser(x, timestep, labels)
            prediction = process.for_sampler(output.prediction.float(), x, timestep)
            following = stepper.step(prediction, timestep, x, streams)
            yield Step(index, timestep, x, output, following)
            x = following


def sample_generator(seed: int, index: int) -> torch.Generator:
    """The random stream of sample ``index`` under ``seed``: whatever its batch or process, it sees the same numbers."""
    state = np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))
