"""Ancestral and implicit sampling with the schedulers of diffusers, one random stream per sample."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from torch import Tensor

from dcdit.diffusion.guidance import GuidedOutput
from dcdit.diffusion.schedule import BETA_END, BETA_START, linear_betas
from dcdit.diffusion.settings import DDIM, DDPM, DPMSolver, SamplerSettings

GuidedDenoiser = Callable[[Tensor, int, Tensor], GuidedOutput]
"""``denoiser(x, timestep, y)`` for x (B, C, H, W), y (B,)."""


@dataclass(frozen=True)
class Step:
    """One sampling step.

    Attributes:
        index: 0 for the first (noisiest) step.
        timestep: its training timestep, 999..0.
        x: (B, C, H, W) latents before the step.
        output: what the denoiser returned.
        next: (B, C, H, W) latents after it.
    """

    index: int
    timestep: int
    x: Tensor
    output: GuidedOutput
    next: Tensor


class Stepper(ABC):
    """What one sampler does in a step; made anew for every trajectory.

    Attributes:
        timesteps: training timesteps of the steps, from noise to image.
    """

    timesteps: list[int]

    @abstractmethod
    def step(self, prediction: Tensor, timestep: int, x: Tensor, generators: list[torch.Generator]) -> Tensor:
        """The latents (B, C, H, W) after a step.

        Args:
            prediction: (B, 2C, H, W) float32 noise and variance.
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


class _AncestralStepper(_Scheduled):
    def __init__(self, settings: DDPM) -> None:
        scheduler = DDPMScheduler(
            **_BETAS, clip_sample=settings.clip, variance_type="learned_range", timestep_spacing="linspace"
        )
        super().__init__(scheduler, settings.steps)

    def step(self, prediction: Tensor, timestep: int, x: Tensor, generators: list[torch.Generator]) -> Tensor:
        return self.scheduler.step(prediction, timestep, x, generator=generators).prev_sample


class _ImplicitStepper(_Scheduled):
    """The learned variance has no part in it. Where x_0 is clipped, the noise is recomputed from it."""

    def __init__(self, settings: DDIM) -> None:
        super().__init__(DDIMScheduler(**_BETAS, clip_sample=settings.clip, timestep_spacing="leading"), settings.steps)
        self.options = {"eta": settings.eta, "use_clipped_model_output": settings.clip}

    def step(self, prediction: Tensor, timestep: int, x: Tensor, generators: list[torch.Generator]) -> Tensor:
        noise = prediction[:, : x.shape[1]]
        return self.scheduler.step(noise, timestep, x, **self.options, generator=generators).prev_sample


class _MultistepStepper(_Scheduled):
    """The learned variance has no part in it. Its scheduler knows no clipping: the noise is recomputed before it."""

    def __init__(self, settings: DPMSolver) -> None:
        super().__init__(DPMSolverMultistepScheduler(**_BETAS, timestep_spacing="linspace"), settings.steps)
        self.clip = settings.clip

    def step(self, prediction: Tensor, timestep: int, x: Tensor, generators: list[torch.Generator]) -> Tensor:
        noise = prediction[:, : x.shape[1]]
        if self.clip:
            signal = self.scheduler.alphas_cumprod[timestep].sqrt().item()
            deviation = (1 - signal**2) ** 0.5
            noise = (x - signal * ((x - deviation * noise) / signal).clamp(-1, 1)) / deviation
        return self.scheduler.step(noise, timestep, x).prev_sample


STEPPERS: dict[type, Callable[[Any], Stepper]] = {
    DDPM: _AncestralStepper,
    DDIM: _ImplicitStepper,
    DPMSolver: _MultistepStepper,
}
"""What runs for the settings of each sampler in :data:`dcdit.diffusion.settings.SAMPLERS`."""


@dataclass(frozen=True)
class Sampler:
    """Steps a denoiser from noise to latents.

    Attributes:
        settings: which sampler, and how many steps.
    """

    settings: SamplerSettings

    def stepper(self) -> Stepper:
        """What does the steps of one trajectory."""
        return STEPPERS[type(self.settings)](self.settings)

    @property
    def timesteps(self) -> list[int]:
        """Training timesteps of the steps, from noise to image."""
        return self.stepper().timesteps

    def trajectory(
        self,
        denoiser: GuidedDenoiser,
        shape: tuple[int, int, int],
        labels: Tensor,
        generators: Sequence[torch.Generator],
    ) -> Iterator[Step]:
        """Sample, yielding every step.

        Args:
            denoiser: returns noise and variance (B, 2C, H, W), guidance applied.
            shape: (C, H, W).
            labels: (B,) class labels; their device is where sampling runs.
            generators: one CPU generator per sample, the only source of randomness of that sample.
        """
        stepper, streams = self.stepper(), list(generators)
        x = torch.cat([torch.randn(1, *shape, generator=stream) for stream in streams]).to(labels.device)
        for index, timestep in enumerate(stepper.timesteps):
            output = denoiser(x, timestep, labels)
            following = stepper.step(output.prediction.float(), timestep, x, streams)
            yield Step(index, timestep, x, output, following)
            x = following


def sample_generator(seed: int, index: int) -> torch.Generator:
    """The random stream of sample ``index`` under ``seed``: whatever its batch or process, it sees the same numbers."""
    state = np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))
