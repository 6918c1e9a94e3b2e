"""Ancestral and implicit sampling with the schedulers of diffusers, one random stream per sample."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from torch import Tensor

from dcdit.diffusion.guidance import GuidedOutput
from dcdit.diffusion.schedule import BETA_END, BETA_START, TRAIN_STEPS, linear_betas
from dcdit.errors import UserError

SamplerName = Literal["ddpm", "ddim", "dpm++"]
GuidedDenoiser = Callable[[Tensor, int, Tensor], GuidedOutput]
"""``denoiser(x, timestep, y)`` for x (B, C, H, W), y (B,)."""
Scheduler = Any
"""A diffusers scheduler; their annotations know neither lists of generators nor each other's options."""


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


@dataclass(frozen=True)
class Sampler:
    """Steps a denoiser from noise to latents.

    Attributes:
        name: ``ddpm`` (learned range variance; steps evenly spaced over 0..999, both ends included), ``ddim`` (steps
            spaced as the reference does, from 0 upwards) or ``dpm++`` (second-order multistep DPM-Solver++, arXiv
            2211.01095; evenly spaced, deterministic).
        steps: number of steps, at most 1000.
        eta: DDIM only, 0 is deterministic, 1 adds as much noise as DDPM.
        clip: clip the predicted x_0 to [-1, 1]; for images as latents, never for a VAE's.

    Raises:
        UserError: if a value is out of its range.
    """

    name: str = "ddpm"
    steps: int = 250
    eta: float = 0.0
    clip: bool = False

    def __post_init__(self) -> None:
        if self.name not in get_args(SamplerName):
            raise UserError(f"name={self.name!r} is not one of {', '.join(get_args(SamplerName))}")
        if not 1 <= self.steps <= TRAIN_STEPS:
            raise UserError(f"steps={self.steps} is outside 1..{TRAIN_STEPS}, the steps of the trained process")
        if not 0 <= self.eta <= 1:
            raise UserError(f"eta={self.eta} is outside [0, 1]: 0 is deterministic DDIM, 1 is as noisy as DDPM")

    def scheduler(self) -> Scheduler:
        """The diffusers scheduler, its timesteps set.

        Its tables are replaced by float64 ones: with float32 tables, clipped trajectories lose a factor of a thousand
        in precision at the last steps.
        """
        common = {"beta_start": BETA_START, "beta_end": BETA_END, "clip_sample": self.clip}
        scheduler: Scheduler
        if self.name == "ddpm":
            scheduler = DDPMScheduler(**common, variance_type="learned_range", timestep_spacing="linspace")
        elif self.name == "ddim":
            scheduler = DDIMScheduler(**common, timestep_spacing="leading")
        else:
            del common["clip_sample"]  # it knows none: see `advance`
            scheduler = DPMSolverMultistepScheduler(**common, timestep_spacing="linspace")
        scheduler.betas = linear_betas()
        scheduler.alphas = 1 - scheduler.betas
        scheduler.alphas_cumprod = scheduler.alphas.cumprod(0)
        scheduler.one = scheduler.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
        scheduler.set_timesteps(self.steps)
        return scheduler

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
        scheduler, streams = self.scheduler(), list(generators)
        x = torch.cat([torch.randn(1, *shape, generator=stream) for stream in streams]).to(labels.device)
        for index, timestep in enumerate(scheduler.timesteps.tolist()):
            output = denoiser(x, timestep, labels)
            following = self.advance(scheduler, output.prediction.float(), timestep, x, streams)
            yield Step(index, timestep, x, output, following)
            x = following

    def advance(
        self, scheduler: Scheduler, prediction: Tensor, timestep: int, x: Tensor, generators: list[torch.Generator]
    ) -> Tensor:
        """One step of ``scheduler`` from ``x`` (B, C, H, W) at ``timestep``, given noise and variance (B, 2C, H, W)."""
        if self.name == "ddpm":
            return scheduler.step(prediction, timestep, x, generator=generators).prev_sample
        # The learned variance has no part in these two. Where x_0 is clipped, the noise is recomputed from it.
        noise = prediction[:, : x.shape[1]]
        if self.name == "dpm++":
            if self.clip:
                signal = scheduler.alphas_cumprod[timestep].sqrt().item()
                deviation = (1 - signal**2) ** 0.5
                noise = (x - signal * ((x - deviation * noise) / signal).clamp(-1, 1)) / deviation
            return scheduler.step(noise, timestep, x).prev_sample
        return scheduler.step(
            noise, timestep, x, eta=self.eta, use_clipped_model_output=self.clip, generator=generators
        ).prev_sample


def sample_generator(seed: int, index: int) -> torch.Generator:
    """The random stream of sample ``index`` under ``seed``: whatever its batch or process, it sees the same numbers."""
    state = np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))
