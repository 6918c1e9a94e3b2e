"""Path-drop guidance: the guiding branch without backbone, what it costs, and for which networks it is refused."""

from dataclasses import replace

import pytest
import torch
from support.configs import perturb

from dcdit.checkpoints.load import Model
from dcdit.compute.flops import count
from dcdit.data.latents import IDENTITY, LatentSpec
from dcdit.diffusion.guidance import guide
from dcdit.diffusion.process import build_process
from dcdit.diffusion.samplers import Sampler
from dcdit.diffusion.settings import BudgetSettings, GuidanceSettings, Heun
from dcdit.errors import UserError
from dcdit.network import DCDiT, DiT
from dcdit.sampling.budget import calibrate
from dcdit.sampling.cost import SamplingCost
from dcdit.sampling.generate import generate
from dcdit.sampling.guiding import guidance_of

LATENTS = LatentSpec((1, 8, 8), IDENTITY, 1.0, 0.0, tuple("abcde"))
SIZES = {"grid": 8, "channels": 1, "num_classes": 5, "width": 32, "depth": 2, "heads": 2}
SAMPLER = Sampler(Heun(3, clip=True))
TRAINED = {"multi_budget": {"path_drop": 0.1, "path_drop_class": "keep"}}


def model(kind=DCDiT, seed=0, training=TRAINED, step=10, **options):
    torch.manual_seed(seed)
    net = kind(**SIZES, **({"groups": 4} if kind is DCDiT else {}), **options)
    perturb(net)
    if kind is DCDiT:
        with torch.no_grad():
            net.router.scorer[-1].bias.fill_(0.0)  # keeps about half
    return Model(net.eval(), LATENTS, step, build_process({"name": "flow"}), training)


def sample(model, settings, guiding=None, sampler=SAMPLER, batch_size=8, count=8):
    guidance = guidance_of(model, settings, guiding)
    labels = torch.arange(64) % 5
    return list(generate(model, guidance, sampler, labels, range(count), seed=0, batch_size=batch_size))


@torch.no_grad()
@pytest.mark.parametrize("weak", ["path", "path_class"])
def test_the_guiding_branch_is_the_network_without_backbone(weak):
    trained = model()
    settings = GuidanceSettings(scale=2.0, weak=weak, drop_fraction=0.3)
    x, y = torch.randn(4, 1, 8, 8), torch.arange(4)
    t = torch.full((4,), 400.0)
    main = trained.network(x, t, y, 0.3).prediction
    guiding = trained.network(x, t, y if weak == "path_class" else torch.full_like(y, 5), 1.0).prediction
    found = guidance_of(trained, settings, None)(x, 400.0, y)
    torch.testing.assert_close(found.prediction, guide(main, guiding, 2.0, 1), rtol=1e-5, atol=1e-5)
    assert [routing.mask.any().item() for routing in found.routings] == [True, False]


def test_flops_are_those_of_one_branch_and_the_rest_of_the_other():
    trained = model()
    cost = SamplingCost.total(map(SamplingCost.of, sample(trained, GuidanceSettings(scale=2.0, weak="path"))))
    parts = count(trained.network, [1.0]).components
    rest = sum(flops for name, flops in parts.items() if name not in ("backbone", "de-chunk"))
    alone = SamplingCost.total(map(SamplingCost.of, sample(trained, GuidanceSettings())))
    per_token = count(trained.network, [2.0]).total - count(trained.network, [1.0]).total
    assert cost.guiding == [0] * len(cost.guiding)
    tokens = sum(cost.main) - sum(alone.main)  # guided images are others, and keep other tokens
    assert cost.flops - alone.flops == pytest.approx(8 * 5 * rest + tokens * per_token, rel=0.05)


@pytest.mark.parametrize("sampler", [SAMPLER, Sampler(Heun(3, clip=True, cache=0.5))], ids=["computed", "cached"])
@pytest.mark.parametrize("weak", ["path", "path_class"])
def test_an_image_does_not_depend_on_its_batch(weak, sampler):
    settings = GuidanceSettings(scale=2.0, weak=weak, interval=[100, 900])
    whole = torch.cat([batch.latents for batch in sample(model(), settings, sampler=sampler)])
    alone = torch.cat([batch.latents for batch in sample(model(), settings, sampler=sampler, batch_size=1)])
    torch.testing.assert_close(whole, alone, rtol=1e-3, atol=1e-4)


def test_another_checkpoint_may_guide_without_backbone():
    settings = GuidanceSettings(scale=2.0, weak="path", weak_checkpoint="other")
    two = sample(model(), settings, guiding=model(seed=1))[0].latents
    one = sample(model(), replace(settings, weak_checkpoint=None))[0].latents
    assert not torch.allclose(one, two, atol=1e-3)
    with pytest.raises(UserError, match=r"multi_budget\.path_drop=0\.1"):
        sample(model(), settings, guiding=model(seed=1, training={}))


@pytest.mark.parametrize("by", ["drop", "cache", "both"])
def test_a_budget_is_met_beside_a_guiding_branch_without_backbone(by):
    trained, settings = model(), GuidanceSettings(scale=2.0, weak="path")
    guidance, sampler = guidance_of(trained, settings, None), Sampler(Heun(8, clip=True))
    usual = SamplingCost.total(map(SamplingCost.of, sample(trained, settings, sampler=sampler, count=16)))
    wanted = BudgetSettings(tflops=0.93 * usual.tflops_per_image, by=by)
    found = calibrate(trained, guidance, sampler, wanted, 16, "fp32")
    assert found.tflops == pytest.approx(wanted.tflops, rel=0.02)
    full = SamplingCost.total(map(SamplingCost.of, sample(trained, GuidanceSettings(scale=2.0), sampler=sampler)))
    assert found.full_tflops == pytest.approx(full.tflops_per_image, rel=0.05)  # a fraction is one of both branches


@pytest.mark.parametrize(
    ("training", "changes", "budget", "weak"),
    [
        (TRAINED, {}, {"fraction": 0.6}, "path"),
        (TRAINED, {}, {"fraction": 0.98}, None),  # without backbone it costs less than asked for
        (TRAINED, {}, {"fraction": 0.8, "by": "both"}, None),
        (TRAINED, {"weak": "uncond"}, {"fraction": 0.8}, None),
        (TRAINED, {"uncond_drop_fraction": 0.5}, {"fraction": 0.8}, None),
        (TRAINED, {"every": 2}, {"fraction": 0.7}, None),
        (TRAINED, {"scale": 1.0}, {"fraction": 0.8}, None),
        ({}, {}, {"fraction": 0.8}, None),
    ],
)
def test_a_budget_leaves_the_backbone_of_the_guiding_branch_out_first(training, changes, budget, weak):
    trained, sampler = model(training=training), Sampler(Heun(8, clip=True))
    guidance = guidance_of(trained, GuidanceSettings(**{"scale": 2.0, **changes}), None)
    found = calibrate(trained, guidance, sampler, BudgetSettings(**budget), 16, "fp32")
    assert found.weak == weak
    assert found.tflops == pytest.approx(budget["fraction"] * found.full_tflops, rel=0.02)
    settings = replace(guidance.settings, weak=weak or guidance.settings.weak, drop_fraction=found.drop_fraction)
    met = sample(trained, settings, sampler=Sampler(Heun(8, clip=True, cache=found.cache)), count=16, batch_size=16)
    assert SamplingCost.total(map(SamplingCost.of, met)).tflops_per_image == pytest.approx(found.tflops, rel=0.02)


@pytest.mark.parametrize(
    ("options", "settings", "message"),
    [
        ({"training": {}}, {"weak": "path"}, "train with multi_budget.path_drop=0.1"),
        ({"training": {"multi_budget": {"path_drop": 0.1, "full_budget_steps": 9}}, "step": 9}, {"weak": "path"}, "=9"),
        ({"training": {"multi_budget": {"fractions": [0.3]}}}, {"weak": "path_class"}, "was not trained"),
        ({"training": {}}, {"drop_fraction": 1.0, "scale": 1.0}, "such as 0.9"),
        ({"training": {}}, {"drop_schedule": [[0, 0], [1000, 1]], "scale": 1.0}, "such as 0.9"),
        ({"kind": DiT}, {"weak": "path"}, "DiT/2 drops no tokens, take guidance.weak=uncond"),
        (
            {"training": {"multi_budget": {"path_drop": 0.1, "path_drop_class": "drop"}}},
            {"weak": "path_class"},
            "guidance.weak=path",
        ),
        ({"label_dropout": 0.0}, {"weak": "path"}, "guidance.weak=budget or path_class"),
        ({}, {"weak": "path", "uncond_drop_fraction": 0.9}, "leave one of the two out"),
        ({}, {"weak": "path_class", "drop_fraction": 1.0}, "lead nowhere"),
    ],
)
def test_what_cannot_be_is_told(options, settings, message):
    with pytest.raises(UserError, match=message):
        sample(model(**options), GuidanceSettings(**{"scale": 2.0, **settings}))


def test_without_backbone_is_one_setting_however_it_is_said():
    path, lite = GuidanceSettings(scale=2.0, weak="path"), GuidanceSettings(scale=2.0, uncond_drop_fraction=1.0)
    assert replace(lite.canonical, weak="uncond") == path.canonical
    assert (
        GuidanceSettings(scale=2.0, weak="budget", uncond_drop_fraction=1.0)
        == replace(path, weak="path_class").canonical
    )
    assert GuidanceSettings(scale=1.0, weak="path").canonical == GuidanceSettings()
