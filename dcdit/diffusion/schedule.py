"""The diffusion process of DiT and ADM: linear betas, noise prediction, learned range variance."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dcdit.diffusion.settings import TRAIN_STEPS

BETA_START, BETA_END = 1e-4, 2e-2


def linear_betas() -> Tensor:
    """The 1000 linear betas from 1e-4 to 0.02, float64."""
    return torch.linspace(BETA_START, BETA_END, TRAIN_STEPS, dtype=torch.float64)


@dataclass(frozen=True)
class Posterior:
    """Per-timestep tables of q(x_t | x_0) and q(x_{t-1} | x_t, x_0) (DDPM, equations 4 and 7), each (1000,) float32.

    Computed in float64, then rounded once.

    Attributes:
        sqrt_alpha_bar, sqrt_one_minus_alpha_bar: x_t = a x_0 + b noise.
        mean_x0, mean_xt: the posterior mean is ``mean_x0 * x_0 + mean_xt * x_t``.
        log_variance: log of the posterior variance, its first entry (log 0) replaced by the second.
        log_beta: log beta_t, the upper end of the learned range.
    """

    sqrt_alpha_bar: Tensor
    sqrt_one_minus_alpha_bar: Tensor
    mean_x0: Tensor
    mean_xt: Tensor
    log_variance: Tensor
    log_beta: Tensor

    @classmethod
    def linear(cls) -> "Posterior":
        """The tables of the linear schedule, on the CPU."""
        # On the CPU in float64 also where the surrounding code builds on another device (meta, CUDA).
        with torch.device("cpu"):
            beta = linear_betas()
            alpha_bar = (1 - beta).cumprod(0)
            previous = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
            variance = beta * (1 - previous) / (1 - alpha_bar)
            tables = (
                alpha_bar.sqrt(),
                (1 - alpha_bar).sqrt(),
                beta * previous.sqrt() / (1 - alpha_bar),
                (1 - previous) * (1 - beta).sqrt() / (1 - alpha_bar),
                torch.cat([variance[1:2], variance[1:]]).log(),
                beta.log(),
            )
            return cls(*(table.float() for table in tables))

    def to(self, device: torch.device) -> "Posterior":
        """The same tables on ``device``."""
        return Posterior(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


def shift_times(t: Tensor, shift: float) -> Tensor:
    """s t / (1 + (s - 1) t) of times ``t`` in [0, 1]: above 1 the shift s moves them towards noise (arXiv 2403.03206).

    The inverse is the shift by 1 / s.
    """
    if shift == 1:
        return t
    return shift * t / ((1 - t) + shift * t)  # so that 1 stays 1 in float32 too


def per_sample(table: Tensor, t: Tensor) -> Tensor:
    """Entries of ``table`` (1000,) at ``t`` (B,), shaped (B, 1, 1, 1) to broadcast over latents."""
    return table[t][:, None, None, None]


def add_noise(tables: Posterior, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Diffuse ``x0`` (B, C, H, W) to timestep ``t`` (B,) with ``noise``: sqrt(abar) x_0 + sqrt(1 - abar) noise."""
    return per_sample(tables.sqrt_alpha_bar, t) * x0 + per_sample(tables.sqrt_one_minus_alpha_bar, t) * noise
