"""Diffusion processes: noise, targets and losses against their definitions, samplers against closed forms."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dcdit.diffusion.guidance import Guidance, GuidedOutput
from dcdit.diffusion.process import build_process
from dcdit.diffusion.samplers import Sampler, sample_generator
from dcdit.diffusion.schedule import linear_betas, shift_times
from dcdit.diffusion.settings import (
    DDIM,
    DDPM,
    Auto,
    DPMSolver,
    Euler,
    EulerMaruyama,
    FlowMatching,
    GuidanceSettings,
    Heun,
)
from dcdit.errors import UserError
from dcdit.network import Output

CPU = torch.device("cpu")
MEAN, SPREAD = 0.7, 0.4


def velocity(x, t):
    """E[noise - x_0 | x] for data N(MEAN, SPREAD^2); t in [0, 1]."""
    variance = (1 - t) ** 2 * SPREAD**2 + t**2
    away = (x - (1 - t) * MEAN) / variance
    return t * away - (MEAN + (1 - t) * SPREAD**2 * away)


def gaussian_flow(x, timestep, y):
    found = velocity(x.double(), timestep / 1000).float()
    return GuidedOutput(torch.cat([found, torch.full_like(found, 9.0)], dim=1), (None,))


def gaussian_image(x, timestep, y):
    """The same denoiser, which predicts E[x_0 | x]."""
    found = x.double() - timestep / 1000 * velocity(x.double(), timestep / 1000)
    return GuidedOutput(torch.cat([found.float(), torch.full_like(x, 9.0)], dim=1), (None,))


def run(settings, count, denoiser=gaussian_flow, shape=(1, 4, 4), process=None):
    streams = [sample_generator(0, i) for i in range(count)]
    start = torch.cat([torch.randn(1, *shape, generator=sample_generator(0, i)) for i in range(count)])
    steps = list(Sampler(settings, process).trajectory(denoiser, shape, torch.zeros(count, dtype=torch.long), streams))
    return start, steps


@pytest.mark.parametrize("kind", [Euler, Heun])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_ode_of_a_gaussian_and_the_order_of_convergence(kind, shift):
    """The exact flow takes x_1 to MEAN + SPREAD x_1; the error falls as steps^-1 by Euler, as steps^-2 by Heun."""
    errors = []
    for steps in (32, 64, 128):
        start, trajectory = run(kind(steps, shift=shift), 8)
        errors.append(float((trajectory[-1].next - (MEAN + SPREAD * start)).abs().max()))
        assert len(trajectory) == (steps if kind is Euler else 2 * steps - 1)
    order = math.log2(errors[0] / errors[2]) / 2
    assert order == pytest.approx(1 if kind is Euler else 2, abs=0.25)
    assert errors[2] < (0.05 if kind is Euler else 0.002)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_steps_as_the_scheduler_of_diffusers(shift):
    from diffusers import FlowMatchEulerDiscreteScheduler

    start, trajectory = run(Euler(10, shift=shift), 3)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[1 - step / 10 for step in range(10)])
    x = start
    for step, timestep in zip(trajectory, scheduler.timesteps, strict=True):
        assert step.timestep == pytest.approx(float(timestep), rel=1e-5)
        torch.testing.assert_close(step.x, x, rtol=1e-4, atol=1e-5)
        x = scheduler.step(gaussian_flow(x, float(timestep), None).prediction[:, :1], timestep, x).prev_sample
    torch.testing.assert_close(trajectory[-1].next, x, rtol=1e-4, atol=1e-5)


def test_times_are_even_shifted_and_told_in_thousands():
    assert Sampler(Euler(4)).timesteps == pytest.approx([1000, 750, 500, 250])
    assert Sampler(Euler(2, shift=3.0)).timesteps == pytest.approx([1000, 750])
    assert Sampler(Heun(3)).timesteps == pytest.approx([1000, 2000 / 3, 2000 / 3, 1000 / 3, 1000 / 3])
    assert Sampler(EulerMaruyama(4)).timesteps == pytest.approx([1000, 680, 360, 40])
    shifted = Sampler(EulerMaruyama(4, shift=3.0)).timesteps
    assert shifted[-1] == pytest.approx(40), "the last step begins where the key says"
    assert all(one > other for one, other in zip(shifted[1:-1], [680, 360], strict=True))


@given(shift=st.floats(0.01, 100), times=st.lists(st.floats(0, 1), min_size=2, max_size=20))
def test_the_shift_of_times(shift, times):
    t = torch.tensor(times, dtype=torch.float64).sort().values
    shifted = shift_times(t, shift)
    assert shifted.tolist() == pytest.approx([shift * each / (1 + (shift - 1) * each) for each in t.tolist()])
    assert (shifted.diff() >= -1e-12).all()
    assert ((shifted >= t - 1e-12) if shift >= 1 else (shifted <= t + 1e-12)).all()
    assert shift_times(torch.tensor([0.0, 1.0]), shift).tolist() == [0, 1]
    assert torch.equal(shift_times(t, 1.0), t)
    torch.testing.assert_close(shift_times(shifted, 1 / shift), t)
    # in terms of the signal-to-noise ratio: noise has s times the deviation
    ratio, before = (shifted / (1 - shifted), t / (1 - t))
    inside = (t < 0.99) & (shifted < 0.999)
    torch.testing.assert_close(ratio[inside], shift * before[inside], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("time", ["uniform", "logit_normal"])
def test_training_and_sampling_are_shifted_alike(time):
    plain, shifted = (build_process({"name": "flow", "time": time, "shift": shift}) for shift in (1.0, 4.0))
    draws = [each.draw_times(500, torch.Generator().manual_seed(0), CPU) / 1000 for each in (plain, shifted)]
    torch.testing.assert_close(draws[1], shift_times(draws[0], 4.0))
    assert draws[1].mean() > draws[0].mean() + 0.15
    for kind in (Euler, Heun):
        assert Sampler(kind(6), shifted).timesteps == Sampler(kind(6, shift=4.0)).timesteps
        assert Sampler(kind(6, shift=1.0), shifted).timesteps == Sampler(kind(6), plain).timesteps
        assert Sampler(kind(6), shifted).timesteps != Sampler(kind(6)).timesteps
    assert Auto(6, noise=False).for_process(shifted.settings) == Euler(6, shift=4.0)


def test_the_shift_that_auto_stands_for():
    """As RAE has it: none for latents of 32 x 32 x 4, and more for larger ones."""
    auto = FlowMatching(shift="auto")
    assert auto.for_latents(32 * 32 * 4) == FlowMatching()
    assert auto.for_latents(16 * 16 * 768).shift == pytest.approx(48**0.5)
    assert FlowMatching(shift=3.0).for_latents(16 * 16 * 768) == FlowMatching(shift=3.0)
    with pytest.raises(UserError, match="shift=auto depends on the size of latents"):
        build_process({"name": "flow", "shift": "auto"})


IMAGE = {"name": "flow", "prediction": "x"}


def test_a_predicted_image_and_its_velocity():
    process = build_process(IMAGE)
    x0, noise = torch.randn(4, 2, 4, 4), torch.randn(4, 2, 4, 4)
    t = torch.tensor([20.0, 50.0, 400.0, 1000.0])
    xt = process.add_noise(x0, noise, t)
    exact = torch.cat([x0, torch.randn_like(x0)], dim=1)
    for i, share in enumerate((0.4, 1.0, 1.0, 1.0)):  # below 0.05 the velocity shrinks with t
        one = slice(i, i + 1)
        found = process.for_sampler(exact[one], xt[one], float(t[i]))
        torch.testing.assert_close(found, share * (noise - x0)[one], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(process.clean(exact[one], xt[one], float(t[i])), x0[one])
    assert (process.loss(exact, x0, xt, noise, t).total < 1e-9).all()
    off = process.loss(exact + 0.5, x0, xt, noise, t).total
    assert off.tolist() == pytest.approx([0.25 / 0.05**2, 0.25 / 0.05**2, 0.25 / 0.16, 0.25], rel=1e-3)


@pytest.mark.parametrize("settings", [Euler(20), Heun(20), EulerMaruyama(20, last=0.06), Euler(20, clip=True)])
def test_a_predicted_image_is_sampled_as_its_velocity(settings):
    _, by_velocity = run(settings, 3)
    _, by_image = run(settings, 3, gaussian_image, process=build_process(IMAGE))
    for one, other in zip(by_image, by_velocity, strict=True):
        torch.testing.assert_close(one.next, other.next, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(run(settings, 3, gaussian_image)[1][-1].next, by_velocity[-1].next, atol=0.1)


def test_guided_images_have_the_guided_velocity():
    values = {"scale": 2.5, "channels": 1, "drop_fraction": 0.2, "uncond_drop_fraction": 0.6, "interval": [100, 900]}

    def denoiser(image):
        def predict(x, t, y, drop):
            share = t[0].item() / 1000
            found = velocity(x.double(), share) + 0.3 * torch.as_tensor(drop).view(-1, 1, 1, 1)
            return Output((x.double() - share * found if image else found).float(), None)

        return predict

    ends = []
    for image in (False, True):
        guidance = Guidance(denoiser(image), 10, GuidanceSettings(**values))
        _, steps = run(Heun(10), 2, guidance, (2, 4, 4), build_process(IMAGE if image else {"name": "flow"}))
        ends.append(steps[-1].next)
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction", ["velocity", "x"])
def test_the_cosine_of_the_velocity_against_a_loop(prediction):
    spec = {"name": "flow", "prediction": prediction}
    plain, both = build_process(spec), build_process({**spec, "velocity_cosine": 0.7})
    x0, noise, prediction = torch.randn(3, 4, 2, 3), torch.randn(3, 4, 2, 3), torch.randn(3, 8, 2, 3)
    t = torch.tensor([200.0, 500.0, 900.0])
    xt = plain.add_noise(x0, noise, t)
    found, before = both.loss(prediction, x0, xt, noise, t), plain.loss(prediction, x0, xt, noise, t)
    for i in range(3):
        velocity = both.for_sampler(prediction[i : i + 1], xt[i : i + 1], float(t[i]))[0, :4]
        target, terms = (noise - x0)[i], []
        for row in range(2):
            for column in range(3):
                a, b = velocity[:, row, column], target[:, row, column]
                terms.append(1 - float(a @ b) / math.sqrt(float(a @ a) * float(b @ b)))
        assert float(found.cosine[i]) == pytest.approx(sum(terms) / 6, rel=1e-4)
    torch.testing.assert_close(found.total, before.total + 0.7 * found.cosine)
    assert before.cosine is None
    assert torch.equal(found.mse, before.mse)


def test_the_sde_keeps_the_distribution_of_the_data():
    _, trajectory = run(EulerMaruyama(250), 800)
    x = trajectory[-1].next
    assert x.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert x.std().item() == pytest.approx(SPREAD, abs=0.02)
    middle = next(step for step in trajectory if step.timestep < 500)
    t = middle.timestep / 1000
    assert middle.x.std().item() == pytest.approx(((1 - t) ** 2 * SPREAD**2 + t**2) ** 0.5, abs=0.02)


@pytest.mark.parametrize("settings", [Euler(3, clip=True), Heun(3, clip=True), EulerMaruyama(5, clip=True)])
def test_clipping_keeps_predicted_images_within_bounds(settings):
    def bright(x, timestep, y):
        return GuidedOutput(torch.full_like(x, -50.0), (None,))

    _, trajectory = run(settings, 2, bright)
    last = trajectory[-1].next
    assert last.abs().max() > 0.9
    if not isinstance(settings, EulerMaruyama):  # whose last step leaves half of the noise at t = 0.04
        assert (last <= 1.0001).all()
    assert (last < 2).all()


@pytest.mark.parametrize("settings", [Euler(3), Heun(3), EulerMaruyama(3)])
def test_a_sample_depends_on_its_own_stream_alone(settings):
    _, one = run(settings, 5)
    _, other = run(settings, 2)
    assert torch.equal(one[-1].next[:2], other[-1].next)


def test_the_line_and_its_velocity():
    process = build_process({"name": "flow"})
    x0, noise = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    t = torch.tensor([0.0, 250.0, 1000.0])
    xt = process.add_noise(x0, noise, t)
    torch.testing.assert_close(xt[0], x0[0])
    torch.testing.assert_close(xt[1], 0.75 * x0[1] + 0.25 * noise[1])
    torch.testing.assert_close(xt[2], noise[2])
    exact = torch.cat([noise - x0, torch.randn_like(x0)], dim=1)  # a variance beside it is left alone
    assert (process.loss(exact, x0, xt, noise, t).total < 1e-12).all()
    assert process.loss(exact[:, :2], x0, xt, noise, t).vlb is None
    off = process.loss(exact + 0.5, x0, xt, noise, t)
    assert off.total.tolist() == pytest.approx([0.25] * 3)
    torch.testing.assert_close(process.clean(exact[1:2], xt[1:2], 250.0), x0[1:2])


@pytest.mark.parametrize("t", [100.0, 500.0, 900.0])
def test_the_loss_of_the_best_denoiser_is_its_analytic_value(t):
    """Var[noise - x_0 | x_t] = s^2 / ((1 - t)^2 s^2 + t^2) for data N(m, s^2)."""
    torch.manual_seed(0)
    process, times = build_process({"name": "flow"}), torch.full((400,), t)
    x0 = MEAN + SPREAD * torch.randn(400, 1, 8, 8)
    noise = torch.randn_like(x0)
    xt = process.add_noise(x0, noise, times)
    loss = process.loss(velocity(xt, t / 1000), x0, xt, noise, times).total.mean()
    share = t / 1000
    expected = SPREAD**2 / ((1 - share) ** 2 * SPREAD**2 + share**2)
    assert float(loss) == pytest.approx(expected, rel=0.03)


def test_times_of_training():
    generator = torch.Generator().manual_seed(0)
    uniform = build_process({"name": "flow"}).draw_times(20_000, generator, CPU) / 1000
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.01)
    assert uniform.std().item() == pytest.approx(12**-0.5, abs=0.01)
    spec = {"name": "flow", "time": "logit_normal", "time_mean": -0.5, "time_std": 0.8}
    logits = (build_process(spec).draw_times(20_000, generator, CPU) / 1000).logit()
    assert logits.mean().item() == pytest.approx(-0.5, abs=0.03)
    assert logits.std().item() == pytest.approx(0.8, abs=0.03)
    steps = build_process({"name": "ddpm"}).draw_times(5000, generator, CPU)
    assert steps.dtype == torch.int64
    assert (int(steps.min()), int(steps.max())) == (0, 999)


@pytest.mark.parametrize("spec", [{"name": "ddpm"}, {"name": "flow"}, {"name": "flow", "prediction": "x"}], ids=str)
def test_min_snr_weighs_the_error_of_the_image(spec):
    """min(SNR, 5) on the squared error of x_0, whatever is predicted."""
    name = spec["name"]
    plain, weighted = build_process(spec), build_process({**spec, "weighting": "min_snr"})
    t = torch.tensor([20, 300, 700, 990])
    x0, noise = torch.zeros(4, 1, 2, 2), torch.randn(4, 1, 2, 2)
    xt = plain.add_noise(x0, noise, t)
    target = x0 if "prediction" in spec else noise if name == "ddpm" else noise - x0
    prediction = torch.cat([target + 0.1, torch.zeros_like(target)], dim=1)
    bar = (1 - linear_betas()).cumprod(0)[t] if name == "ddpm" else None
    signal = (1 - t / 1000) if bar is None else bar.sqrt()
    spread = t / 1000 if bar is None else (1 - bar).sqrt()
    snr = (signal / spread) ** 2
    found = weighted.loss(prediction, x0, xt, noise, t)
    for i in range(4):
        error = (weighted.clean(prediction[i : i + 1], xt[i : i + 1], float(t[i])) - x0[i]).square().mean()
        assert float(found.weight[i] * found.mse[i]) == pytest.approx(float(snr[i].clamp(max=5) * error), rel=1e-3)
    assert plain.loss(prediction, x0, xt, noise, t).weight is None


def test_samplers_of_another_process_are_refused():
    flow, ddpm = build_process({"name": "flow"}), build_process({"name": "ddpm"})
    for process, settings, fitting in (
        (flow, DDPM(2), "auto, euler, heun, sde"),
        (flow, DDIM(2), "auto, euler, heun, sde"),
        (ddpm, Heun(2), "auto, ddpm, ddim, dpm"),
    ):
        with pytest.raises(UserError, match=f"sampler={settings.name} does not fit .*: take sampler={fitting}"):
            settings.for_process(process.settings)
    assert EulerMaruyama(2).for_process(flow.settings) == EulerMaruyama(2, shift=1.0)
    assert DPMSolver(2).for_process(ddpm.settings) == DPMSolver(2)


def test_auto_is_the_usual_sampler_of_the_process():
    flow, ddpm = build_process({"name": "flow"}), build_process({"name": "ddpm"})
    for noise, kinds in ((True, (EulerMaruyama, DDPM)), (False, (Euler, DDIM))):
        auto = Auto(7, clip=True, noise=noise)
        for process, kind in zip((flow, ddpm), kinds, strict=True):
            assert auto.for_process(process.settings) == kind(7, clip=True).for_process(process.settings)


def test_what_cannot_be():
    for spec, message in (
        ({"name": "flows"}, "diffusion.name='flows' is not one of ddpm, flow"),
        ({"name": "flow", "time": "cosine"}, "diffusion.time='cosine' is not one of uniform, logit_normal"),
        ({"name": "flow", "time_std": 0}, "diffusion.time_std=0 is not positive"),
        ({"name": "ddpm", "time": "uniform"}, "diffusion.time='uniform': there is no such key"),
    ):
        with pytest.raises(UserError, match=message):
            build_process(spec)
    with pytest.raises(UserError, match=r"model\.variance=false: diffusion=ddpm trains a variance"):
        build_process({"name": "ddpm"}).check_variance(False)
    build_process({"name": "flow"}).check_variance(False)
