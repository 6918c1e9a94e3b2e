import numpy as np
import pytest
import torch
from support.configs import golden_folders

from dcdit.checks import build_named
from dcdit.diffusion.guidance import Guidance, GuidedOutput
from dcdit.diffusion.samplers import Sampler, sample_generator
from dcdit.diffusion.schedule import linear_betas
from dcdit.diffusion.settings import DDIM, DDPM, SAMPLERS, DPMSolver, GuidanceSettings
from dcdit.errors import UserError
from dcdit.network import Output

ALPHA_BAR = (1 - linear_betas()).cumprod(0)


def gaussian_denoiser(mean: float, std: float):
    """The exact noise prediction for data N(mean, std^2), with the posterior variance (v = -1)."""

    def denoise(x, timestep, y):
        bar = ALPHA_BAR[timestep].float()
        score = (bar.sqrt() * mean - x) / (bar * std**2 + 1 - bar)
        noise = -(1 - bar).sqrt() * score
        return GuidedOutput(torch.cat([noise, -torch.ones_like(noise)], dim=1), (None,))

    return denoise


def run(sampler: Sampler, denoise, count: int, seed: int = 0, start: int = 0):
    streams = [sample_generator(seed, start + i) for i in range(count)]
    *_, last = sampler.trajectory(denoise, (1, 4, 4), torch.zeros(count, dtype=torch.long), streams)
    return last.next


@pytest.mark.parametrize(
    "sampler", [Sampler(DDIM(200)), Sampler(DDPM(250)), Sampler(DDIM(200, eta=1.0)), Sampler(DPMSolver(20))]
)
def test_an_exact_denoiser_yields_the_data_distribution(sampler):
    x = run(sampler, gaussian_denoiser(0.7, 0.5), 500)
    assert x.mean().item() == pytest.approx(0.7, abs=0.03)
    assert x.std().item() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(("sampler", "tolerance"), [(Sampler(DDIM(1000)), 0.02), (Sampler(DPMSolver(50)), 0.02)])
def test_deterministic_samplers_follow_the_analytic_flow(sampler, tolerance):
    # For Gaussian data the probability flow keeps (x - mean_t) / std_t constant.
    streams = [sample_generator(0, i) for i in range(8)]
    steps = list(sampler.trajectory(gaussian_denoiser(0.7, 0.5), (1, 4, 4), torch.zeros(8, dtype=torch.long), streams))
    bar = ALPHA_BAR[999]
    z = (steps[0].x - bar.sqrt() * 0.7) / (bar * 0.25 + 1 - bar).sqrt()
    torch.testing.assert_close(steps[-1].next, (0.7 + 0.5 * z).float(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("steps", [1, 2, 999, 1000])
@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "auto"])
def test_any_number_of_steps_that_is_taken_gives_finite_latents(name, steps):
    try:
        sampler = Sampler(build_named(SAMPLERS, {"name": name, "steps": steps}, "sampler"))
    except UserError as refused:
        assert f"sampler.steps={steps} is outside" in str(refused)  # noqa: PT017 - whether it raises depends on both
        assert (name, steps) in {("dpm++", 1000), ("sde", 1)}
        return
    flow = sampler.settings.process == "flow"
    velocity = lambda x, timestep, y: GuidedOutput(x - 0.5, (None,))  # noqa: E731
    x = run(sampler, velocity if flow else gaussian_denoiser(0.7, 0.5), 2)
    assert x.isfinite().all()


def test_dpm_solver_needs_fewer_steps_than_ddim():
    def error(sampler: Sampler) -> float:
        exact = run(Sampler(DDIM(1000)), gaussian_denoiser(0.7, 0.5), 8)
        return (run(sampler, gaussian_denoiser(0.7, 0.5), 8) - exact).abs().max().item()

    assert error(Sampler(DPMSolver(40))) < 0.2 * error(Sampler(DDIM(40)))


def test_clipping_bounds_the_result():
    sampler = Sampler(DPMSolver(10, clip=True))
    assert run(sampler, gaussian_denoiser(3.0, 0.1), 4).abs().max() <= 1.01
    assert run(Sampler(DPMSolver(10)), gaussian_denoiser(3.0, 0.1), 4).min() > 2


def test_a_sample_depends_on_its_seed_and_number_only():
    sampler, denoise = Sampler(DDPM(20)), gaussian_denoiser(0.0, 0.3)
    together = run(sampler, denoise, 6)
    apart = torch.cat([run(sampler, denoise, 1), run(sampler, denoise, 3, start=1), run(sampler, denoise, 2, start=4)])
    assert torch.equal(together, apart)
    assert not torch.equal(together, run(sampler, denoise, 6, seed=1))
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "ddmp", "steps": 2}, "sampler.name='ddmp' is not one of auto, ddpm, ddim, dpm"),
        ({"name": "ddpm", "steps": 0}, "sampler.steps=0 is outside"),
        ({"name": "dpm++", "steps": 1001}, "sampler.steps=1001 is outside"),
        ({"name": "ddim", "steps": 2, "eta": 2.0}, "sampler.eta=2 is outside"),
        ({"name": "ddpm", "steps": 2, "eta": 1.0}, "sampler.eta=1: there is no such key"),
    ],
)
def test_wrong_settings(values, message):
    with pytest.raises(UserError, match=message):
        build_named(SAMPLERS, values, "sampler")


class TestGuidance:
    def net(self, x, t, y, drop):
        base = torch.cat([x, x], dim=1) * 0.5
        return Output(base + y.float()[:, None, None, None] * torch.arange(1, 9)[None, :, None, None], None)

    def inputs(self):
        return torch.randn(2, 4, 3, 3), 5, torch.tensor([1, 2])

    def test_scale_one_is_the_conditional_prediction(self):
        x, t, y = self.inputs()
        guided = Guidance(self.net, 0, GuidanceSettings(scale=1.0))(x, t, y)
        assert torch.equal(guided.prediction, self.net(x, t, y, 0.0).prediction)

    @pytest.mark.parametrize(("channels", "guided"), [(3, 3), (None, 3), (4, 4), (99, 4)])
    def test_formula_and_channels(self, channels, guided):
        x, t, y = self.inputs()
        out = Guidance(self.net, 0, GuidanceSettings(scale=3.0, channels=channels))(x, t, y).prediction
        cond = self.net(x, t, y, 0.0).prediction
        uncond = self.net(x, t, torch.zeros_like(y), 0.0).prediction
        torch.testing.assert_close(out[:, :guided], (uncond + 3 * (cond - uncond))[:, :guided])
        assert torch.equal(out[:, guided:], cond[:, guided:])

    def test_lite_cfg_gives_each_half_its_own_fraction(self):
        seen = []
        x, t, y = self.inputs()

        def net(*args):
            seen.append(args[3])
            return self.net(*args)

        Guidance(net, 0, GuidanceSettings(scale=2.0, drop_fraction=0.1, uncond_drop_fraction=0.9))(x, t, y)
        torch.testing.assert_close(seen[0], torch.tensor([0.1, 0.1, 0.9, 0.9]))

    def test_outside_the_interval_the_conditional_half_runs_alone(self):
        sizes = []

        def net(x, t, y, drop):
            sizes.append(len(x))
            return self.net(x, t, y, drop)

        x, _, y = self.inputs()
        guidance = Guidance(net, 0, GuidanceSettings(scale=3.0, interval=[100, 700]))
        for timestep in (99, 100, 700, 701):
            guidance(x, timestep, y)
        assert sizes == [2, 4, 4, 2]
        assert torch.equal(guidance(x, 50, y).prediction, self.net(x, None, y, 0.0).prediction)

    def test_an_interval_may_begin_with_the_first_step_of_either_process(self):
        for first in (999, 1000.0):  # of DDPM, of flow matching
            assert GuidanceSettings(scale=3.0, interval=[500, 1000]).is_guided(first)
        with pytest.raises(UserError, match="interval=1001 is outside"):
            GuidanceSettings(scale=3.0, interval=[500, 1001])

    def test_a_drop_fraction_over_the_timesteps(self):
        guidance = Guidance(self.net, 0, GuidanceSettings(scale=3.0, drop_schedule=[[900, 0.8], [100, 0.2]]))
        drops = [guidance.settings.drop_at(timestep)[0] for timestep in (0, 100, 500, 900, 999)]
        assert drops == pytest.approx([0.2, 0.2, 0.5, 0.8, 0.8])
        assert guidance.settings.drop_at(500)[1] == pytest.approx(0.5)
        assert Guidance(self.net, 0, GuidanceSettings(3.0, None, 0.1, 0.9)).settings.drop_at(500) == (0.1, 0.9)

    @pytest.mark.parametrize("kind", ["uncond", "budget", "checkpoint"])
    @pytest.mark.parametrize("settings", [DDIM(20), DPMSolver(20)])
    def test_between_gaussians_guidance_is_the_denoiser_of_another_gaussian(self, kind, settings):
        """Data N(m, s^2), with means m_m and m_g of main and guiding branch: the guided mean is m_g + g (m_m - m_g).

        eps(x) = b (x - a m) / (a^2 s^2 + b^2) is linear in m, whose guided value is that of the closed form.
        """
        spread, scale = 0.4, 2.5
        alpha_bar = (1 - linear_betas()).cumprod(0)

        def exact(mean, x, t):
            a, b = alpha_bar[t].sqrt().view(-1, 1, 1, 1), (1 - alpha_bar[t]).sqrt().view(-1, 1, 1, 1)
            noise = (b * (x - a * mean.view(-1, 1, 1, 1)) / (a**2 * spread**2 + b**2)).float()
            return torch.cat([noise, torch.zeros_like(noise)], dim=1)

        def main(x, t, y, drop):  # the mean tells class and drop fraction
            drops = torch.as_tensor(drop).expand(len(y))
            return Output(exact(0.1 * y + 0.5 * drops, x, t), None)

        def other(x, t, y, drop):
            return Output(exact(0.1 * y + 0.5 * drop - 1.0, x, t), None)

        values = {"scale": scale, "channels": None, "drop_fraction": 0.2, "uncond_drop_fraction": 0.8}
        y = torch.tensor([1, 4, 7])
        mean = 0.1 * y + 0.1
        if kind == "uncond":
            guidance, guiding_mean = Guidance(main, 10, GuidanceSettings(**values)), torch.full((3,), 1.0 + 0.4)
        elif kind == "budget":
            guidance, guiding_mean = Guidance(main, 10, GuidanceSettings(**values, weak="budget")), 0.1 * y + 0.4
        else:
            values["weak_checkpoint"] = "other"
            guidance, guiding_mean = Guidance(main, 10, GuidanceSettings(**values), other), 0.1 * y + 0.4 - 1.0
        target = guiding_mean + scale * (mean - guiding_mean)

        def closed(x, timestep, y):
            return GuidedOutput(exact(target, x, torch.full_like(y, timestep)), (None,))

        found, expected = (
            list(Sampler(settings).trajectory(each, (1, 4, 4), y, [sample_generator(0, i) for i in range(3)]))[-1].next
            for each in (guidance, closed)
        )
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        # and the samples gather where they should: 20 steps leave them within a few deviations
        assert ((found.mean(dim=(1, 2, 3)) - target).abs() < 4 * spread / 4).all()

    def test_wrong_settings(self):
        for values, message in (
            ({"scale": 2.0, "weak": "budget"}, r"weak=budget: the guiding branch would drop 0 of the tokens"),
            ({"scale": 2.0, "weak": "budget", "drop_fraction": 0.5, "uncond_drop_fraction": 0.5}, "would drop 0.5"),
            ({"weak": "smaller"}, "weak='smaller' is not one of uncond, budget"),
            ({"interval": [700, 100]}, r"interval=\[700, 100\] is no pair"),
            ({"drop_schedule": []}, "asks for nothing"),
            ({"drop_schedule": [[0, 1.1]]}, r"drop_schedule=1.1 is outside"),
            ({"drop_schedule": [[0]]}, "is no pair of timestep"),
        ):
            with pytest.raises(UserError, match=message):
                GuidanceSettings(**values)
        with pytest.raises(UserError, match="scale=-1"):
            GuidanceSettings(scale=-1)
        with pytest.raises(UserError, match=r"scale=10000 is outside \[0, 100\]: 1 is no guidance, 4 is strong"):
            GuidanceSettings(scale=1e4)
        with pytest.raises(UserError, match="channels=0"):
            GuidanceSettings(channels=0)


@pytest.mark.parametrize("folder", list(golden_folders()))
@pytest.mark.parametrize("size", [8, 16])
@pytest.mark.parametrize(
    ("case", "sampler"),
    [
        ("h_ddpm", Sampler(DDPM(10))),
        ("hc_ddpm_clip", Sampler(DDPM(10, clip=True))),
        ("h2_ddpm_cfg1.5_drop0.2", Sampler(DDPM(10))),
        ("h3_ddpm_lite_0.0_0.9_cfg1.25", Sampler(DDPM(10))),
        ("i_ddim_eta0", Sampler(DDIM(10))),
        ("i2_ddim_eta0.5_clip", Sampler(DDIM(10, eta=0.5, clip=True))),
    ],
)
def test_golden_steps(folder, size, case, sampler, monkeypatch):
    """Each step of the reference's trajectories from its own state, model output and noise."""
    path = golden_folders()[folder] / f"sampling_in{size}.npz"
    with np.load(path) if path.exists() else pytest.MonkeyPatch.context() as stored:
        if not path.exists() or f"{case}/model_out" not in stored.files:
            pytest.skip(f"not among the reference's numbers for {folder}, input {size}")
        states, outputs = torch.from_numpy(stored[f"{case}/x"]), torch.from_numpy(stored[f"{case}/model_out"])
        noises = torch.from_numpy(stored["in/noises"])[:, : states.shape[1]]
        steps_map = stored["ddpm_timestep_map" if sampler.settings.name == "ddpm" else "ddim_timestep_map"]
    stepper = sampler.settings.stepper()
    assert stepper.timesteps == steps_map[::-1].tolist()
    for k, timestep in enumerate(stepper.timesteps):
        for module in ("ddpm", "ddim"):
            draw = f"diffusers.schedulers.scheduling_{module}.randn_tensor"
            monkeypatch.setattr(draw, lambda *_, k=k, **__: noises[k])
        stepped = stepper.step(outputs[k], timestep, states[k], generators=[])
        relative = (stepped - states[k + 1]).abs().max() / states[k + 1].abs().max()
        assert relative < 1e-5, (k, relative)
