"""The diffusion loss: mean squared error of the noise plus the variational bound that trains the variance."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dcdit.diffusion.schedule import Posterior, per_sample


@dataclass(frozen=True)
class DiffusionLoss:
    """Per-sample loss terms, each (B,) float32.

    Attributes:
        mse: mean squared error of what is predicted, noise or velocity.
        vlb: one term of the variational lower bound, bits per dimension; None where no variance is trained.
        weight: of ``mse``; None for 1.
        cosine: 1 - cosine of predicted and true velocity; None where it is not trained.
        cosine_weight: of ``cosine``.
    """

    mse: Tensor
    vlb: Tensor | None
    weight: Tensor | None = None
    cosine: Tensor | None = None
    cosine_weight: float = 0.0

    @property
    def total(self) -> Tensor:
        """(B,) the sum of the terms."""
        error = self.mse if self.weight is None else self.weight * self.mse
        if self.cosine is not None:
            error = error + self.cosine_weight * self.cosine
        return error if self.vlb is None else error + self.vlb


def min_snr_weight(snr: Tensor, gain: Tensor, gamma: float) -> Tensor:
    """Min-SNR weight (B,) of a squared error (arXiv 2303.09556): min(SNR, gamma) on the error of x_0.

    Args:
        snr: (B,) signal-to-noise ratio.
        gain: (B,) squared error of x_0 that a squared error of 1 in noise or velocity stands for.
        gamma: the ratio from which on samples weigh less.
    """
    return snr.clamp(max=gamma) * gain


def cosine_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """1 - cos over the channels at each position, the mean over positions (LightningDiT, arXiv 2501.01423): (B,).

    Args:
        prediction, target: velocities (B, C, H, W).
    """
    return 1 - F.cosine_similarity(prediction, target, dim=1).flatten(1).mean(dim=1)


def diffusion_loss(
    tables: Posterior, prediction: Tensor, x0: Tensor, xt: Tensor, noise: Tensor, t: Tensor
) -> DiffusionLoss:
    """Loss of a prediction of noise and variance (DDPM, section 3; Improved DDPM, section 3.1).

    The bound sees the noise prediction detached: it trains the variance alone.

    Args:
        tables: coefficients of the diffusion process by timestep.
        prediction: (B, 2C, H, W), noise and variance value in [-1, 1].
        x0, xt, noise: (B, C, H, W) clean latents, noisy latents and the noise between them.
        t: (B,) timesteps.
    """
    predicted_noise, variance_value = prediction.float().chunk(2, dim=1)
    mse = (noise - predicted_noise).square().flatten(1).mean(dim=1)

    a, b = per_sample(tables.sqrt_alpha_bar, t), per_sample(tables.sqrt_one_minus_alpha_bar, t)
    predicted_x0 = (xt - b * predicted_noise.detach()) / a
    mean = _posterior_mean(tables, predicted_x0, xt, t)
    low, high = per_sample(tables.log_variance, t), per_sample(tables.log_beta, t)
    log_variance = low + (variance_value + 1) / 2 * (high - low)

    divergence = _gaussian_kl(_posterior_mean(tables, x0, xt, t), low, mean, log_variance)
    decoder = _discretised_nll(x0, mean, log_variance / 2)
    first = (t == 0)[:, None, None, None]
    vlb = torch.where(first, decoder, divergence).flatten(1).mean(dim=1) / math.log(2)
    return DiffusionLoss(mse, vlb)


def _posterior_mean(tables: Posterior, x0: Tensor, xt: Tensor, t: Tensor) -> Tensor:
    return per_sample(tables.mean_x0, t) * x0 + per_sample(tables.mean_xt, t) * xt


def _gaussian_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N1 || N2) per element, nats."""
    spread = (log_variance1 - log_variance2).exp() + (mean1 - mean2).square() * (-log_variance2).exp()
    return 0.5 * (log_variance2 - log_variance1 + spread - 1)


def _discretised_nll(x0: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Negative log-likelihood per element, nats, of a Gaussian integrated over bins of +-1/255 (DDPM, equation 13)."""
    inverse_scale = (-log_scale).exp()
    upper = _normal_cdf((x0 - mean + 1 / 255) * inverse_scale)
    lower = _normal_cdf((x0 - mean - 1 / 255) * inverse_scale)
    upper = torch.where(x0 > 0.999, 1.0, upper)  # the edge bins are open
    lower = torch.where(x0 < -0.999, 0.0, lower)
    return -(upper - lower).clamp(min=1e-12).log()


def _normal_cdf(z: Tensor) -> Tensor:
    """The tanh approximation of the standard normal distribution function that the published loss uses."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
