import math

import numpy as np
import pytest
import torch
from support.configs import golden_folders

from dcdit.diffusion.loss import diffusion_loss
from dcdit.diffusion.schedule import Posterior, add_noise

TABLES = Posterior.linear()


def batch(t: int, size: int = 4):
    torch.manual_seed(0)
    x0 = torch.rand(size, 3, 6, 6) * 1.6 - 0.8
    noise = torch.randn_like(x0)
    steps = torch.full((size,), t)
    return x0, noise, steps, add_noise(TABLES, x0, noise, steps)


@pytest.mark.parametrize("t", [1, 10, 500, 999])
def test_a_perfect_prediction_with_the_posterior_variance_costs_nothing(t):
    x0, noise, steps, xt = batch(t)
    prediction = torch.cat([noise, -torch.ones_like(noise)], dim=1)  # v = -1: the posterior variance
    loss = diffusion_loss(TABLES, prediction, x0, xt, noise, steps)
    assert (loss.mse == 0).all()
    assert loss.vlb.abs().max() < 1e-4


def test_the_bound_is_the_gaussian_divergence():
    x0, noise, steps, xt = batch(300)
    prediction = torch.cat([noise + 0.1, torch.full_like(noise, 0.3)], dim=1)
    loss = diffusion_loss(TABLES, prediction, x0, xt, noise, steps)
    beta = np.linspace(1e-4, 0.02, 1000)
    bar = np.cumprod(1 - beta)
    variance = beta[300] * (1 - bar[299]) / (1 - bar[300])
    model = math.exp(0.35 * math.log(variance) + 0.65 * math.log(beta[300]))
    shift = beta[300] / math.sqrt((1 - bar[300]) * (1 - beta[300])) * 0.1  # of the mean, DDPM equation 11
    expected = 0.5 * (math.log(model / variance) + (variance + shift**2) / model - 1) / math.log(2)
    assert loss.vlb.numpy() == pytest.approx(expected, rel=1e-3)
    assert loss.mse.numpy() == pytest.approx(0.01, rel=1e-4)


def test_decoder_likelihoods_sum_to_one_over_the_256_levels():
    levels = (torch.arange(256) / 127.5 - 1).view(256, 1, 1, 1)
    noise = torch.zeros_like(levels)
    t = torch.zeros(256, dtype=torch.long)
    # every level sees the same x_t, hence the same predicted distribution
    xt = torch.full_like(levels, 0.123)
    prediction = torch.cat([noise, torch.zeros_like(noise)], dim=1)
    bits = diffusion_loss(TABLES, prediction, levels, xt, noise, t).vlb
    assert (2.0 ** -bits.double()).sum().item() == pytest.approx(1.0, abs=1e-3)


def test_the_bound_trains_the_variance_alone():
    x0, noise, steps, xt = batch(200)
    prediction = torch.randn(4, 6, 6, 6, requires_grad=True)
    loss = diffusion_loss(TABLES, prediction, x0, xt, noise, steps)
    gradient = torch.autograd.grad(loss.vlb.sum(), prediction)[0]
    assert (gradient[:, :3] == 0).all()
    assert (gradient[:, 3:] != 0).all()


@pytest.mark.skipif("dev" not in golden_folders(), reason="DCDIT_GOLDEN does not point at the reference's numbers")
def test_golden_tables():
    with np.load(golden_folders()["dev"] / "schedule.npz") as stored:
        gold = {k.removeprefix("1000/"): stored[k] for k in stored.files if k.startswith("1000/")}
    for ours, theirs in (
        (TABLES.sqrt_alpha_bar.double().square(), gold["alphas_cumprod"]),
        (TABLES.mean_x0, gold["posterior_mean_coef1"]),
        (TABLES.mean_xt, gold["posterior_mean_coef2"]),
        (TABLES.log_variance, gold["posterior_log_variance_clipped"]),
        (TABLES.log_beta, np.log(gold["betas"])),
    ):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=5e-7, atol=1e-9)
