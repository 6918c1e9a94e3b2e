"""Sampling images: independence of batches and processes, budgets, and what is refused."""

from dataclasses import replace

import pytest
import torch
from support.configs import perturb

from dcdit.checkpoints.load import Model
from dcdit.compute.flops import Cost, count
from dcdit.data.autoencoder import to_uint8
from dcdit.data.latents import IDENTITY, LatentSpec
from dcdit.diffusion.guidance import Guidance, GuidedOutput
from dcdit.diffusion.samplers import Sampler, sample_generator
from dcdit.diffusion.settings import DDIM, DDPM, BudgetSettings, GuidanceSettings
from dcdit.errors import NotFiniteError, UserError
from dcdit.network import DCDiT, DiT
from dcdit.sampling.budget import Calibration, calibrate, remembered
from dcdit.sampling.generate import SampleBatch, generate
from dcdit.sampling.guiding import check_guidance
from dcdit.sampling.settings import SamplingConfig
from dcdit.sampling.setup import Sampling

LATENTS = LatentSpec((1, 8, 8), IDENTITY, 1.0, 0.0, tuple("abcde"))
SAMPLER = Sampler(DDPM(6, clip=True))
CACHED = Sampler(DDIM(12, clip=True, cache=1.2))
"""Computes about half of the steps of the network of these tests."""
UNCACHED = replace(CACHED, settings=replace(CACHED.settings, cache=0.0))


@pytest.fixture(scope="module")
def model():
    """An untrained network whose router keeps about half of the positions, and whose backbone is most of the cost."""
    torch.manual_seed(0)
    net = DCDiT(grid=8, channels=1, num_classes=5, width=64, depth=6, heads=2, encoder_width=16, groups=4)
    perturb(net)
    with torch.no_grad():
        net.router.scorer[-1].bias.fill_(0.0)
    return Model(net.eval(), LATENTS, 0)


def guidance(model, **values):
    return Guidance(model.network, model.network.null_class, GuidanceSettings(**values))


def draw(model, indices, batch_size, seed=0, on_step=None, sampler=SAMPLER, **guided):
    labels = torch.arange(64) % 5
    drawn = generate(
        model, guidance(model, **guided), sampler, labels, indices, seed=seed, batch_size=batch_size, on_step=on_step
    )
    return list(drawn)


def images(drawn):
    return {i: to_uint8(x) for batch in drawn for i, x in zip(batch.indices, batch.latents, strict=True)}


LITE = {"scale": 2.0, "drop_fraction": 0.2, "uncond_drop_fraction": 0.6}
PART_OF_THE_TIME = {"sampler": CACHED, "scale": 2.0, "interval": [200, 700]}


@pytest.mark.parametrize("guided", [{}, LITE, {"sampler": CACHED}, {"sampler": CACHED, **LITE}, PART_OF_THE_TIME])
def test_the_same_images_for_any_batch_size_and_number_of_processes(model, guided):
    whole = images(draw(model, range(16), 16, **guided))
    assert len({image.numpy().tobytes() for image in whole.values()}) == 16
    for parts in ([(range(16), 1)], [(range(16), 3)], [(range(0, 16, 2), 5), (range(1, 16, 2), 5)]):
        found = {}
        for indices, batch_size in parts:
            found |= images(draw(model, indices, batch_size, **guided))
        for i in range(16):  # batches of another shape may round the last bit of a float32 otherwise
            assert (found[i].int() - whole[i].int()).abs().max() <= 1
    assert not torch.equal(images(draw(model, [3], 1, seed=1, **guided))[3], whole[3])


@pytest.mark.parametrize("guided", [{}, LITE, PART_OF_THE_TIME])
def test_caching_computes_part_of_the_steps_and_counts_what_ran(model, guided):
    tiny = replace(CACHED, settings=replace(CACHED.settings, cache=1e-30))
    guided = {key: value for key, value in guided.items() if key != "sampler"}
    (cached,), (whole,), (same,) = (
        draw(model, range(6), 6, sampler=sampler, **guided) for sampler in (CACHED, UNCACHED, tiny)
    )
    assert torch.equal(same.latents, whole.latents)
    assert torch.equal(same.flops, whole.flops)
    ran = [torch.stack([halves[0] > 0 for halves in batch.lengths]).float().mean() for batch in (cached, whole)]
    assert ran[1] == 1
    assert 0.2 < ran[0] < 0.8
    assert all((halves[0] > 0).all() for halves in (cached.lengths[0], cached.lengths[-1]))
    assert (cached.flops < 0.85 * whole.flops).all()
    closer = (cached.latents - whole.latents).abs().mean()
    assert 0 < closer < 0.5 * (whole.latents - whole.latents.roll(1, 0)).abs().mean()
    flops = Cost.of_network(model.network)
    by_hand = sum(flops.of(lengths) for halves in cached.lengths for lengths in halves)
    assert torch.equal(cached.flops, by_hand)


def test_flops_are_those_of_the_tokens_that_were_kept(model):
    lengths = []

    def note(numbers, step):
        lengths.append(torch.cat([half.mask.sum(1) for half in step.output.routings]))

    (drawn,) = draw(model, range(4), 4, on_step=note, scale=2.0, drop_fraction=0.3, uncond_drop_fraction=0.6)
    by_hand = [
        sum(count(model.network, [int(step[half * 4 + i])]).total for step in lengths for half in (0, 1))
        for i in range(4)
    ]
    assert drawn.flops.tolist() == pytest.approx(by_hand)


def test_a_plain_transformer_costs_the_same_always():
    net = DiT(grid=8, channels=1, num_classes=5, width=32, depth=1, heads=2).eval()
    model = Model(net, LATENTS, 0)
    (drawn,) = draw(model, range(3), 3, scale=2.0)
    expected = 2 * 6 * count(net).total
    assert drawn.flops.tolist() == pytest.approx([expected] * 3)
    with pytest.raises(UserError, match="DiT/2 has one fixed cost"):
        calibrate(model, guidance(model), SAMPLER, BudgetSettings(fraction=0.5), 16, "fp32")


@pytest.mark.parametrize(
    ("target", "guided"),
    [
        (BudgetSettings(fraction=0.7), {"sampler": UNCACHED}),
        (BudgetSettings(fraction=0.7, by="drop"), {}),
        (BudgetSettings(fraction=0.7, by="drop"), {"scale": 2.0}),
        (BudgetSettings(fraction=0.6, by="drop"), {"scale": 2.0, "uncond_drop_fraction": 0.9}),
        (BudgetSettings(fraction=1.0), {}),
        (BudgetSettings(fraction=0.4), {"sampler": CACHED}),
        (BudgetSettings(fraction=0.7, by="cache"), {"sampler": UNCACHED}),
        (BudgetSettings(fraction=0.7, by="cache"), {"sampler": UNCACHED, "scale": 2.0, "interval": [200, 700]}),
        (BudgetSettings(fraction=0.5, by="both"), {"sampler": UNCACHED, "scale": 2.0, "uncond_drop_fraction": 0.5}),
    ],
)
def test_a_budget_is_met_by_other_images_too(model, target, guided):
    sampler = guided.get("sampler", SAMPLER)
    guided = {key: value for key, value in guided.items() if key != "sampler"}
    asked = guidance(model, **guided)
    found = calibrate(model, asked, sampler, target, 16, "fp32")

    def spent(cache, **changes):
        sampler_of = replace(sampler, settings=replace(sampler.settings, cache=cache))
        drawn = draw(model, range(64), 32, seed=9, sampler=sampler_of, **{**guided, **changes})
        return torch.cat([batch.flops for batch in drawn]).mean().item() / 1e12

    full = spent(0.0, drop_fraction=0.0, uncond_drop_fraction=None)
    assert spent(found.cache, drop_fraction=found.drop_fraction) == pytest.approx(target.fraction * full, rel=0.02)
    assert found.full_tflops == pytest.approx(full, rel=0.02)
    assert (found.drop_fraction > 0) == (target.by != "cache" and target.fraction < 1)
    assert (found.cache > 0) == (sampler is CACHED or (target.by != "drop" and target.fraction < 1))
    in_tflops = BudgetSettings(target.fraction * found.full_tflops, by=target.by)
    again = calibrate(model, asked, sampler, in_tflops, 16, "fp32")
    assert again.drop_fraction == pytest.approx(found.drop_fraction, abs=0.02)
    assert again.cache == pytest.approx(found.cache, rel=0.05)


def test_budgets_that_cannot_be(model):
    for values, message in (
        ({"fraction": 0.0}, r"fraction=0 is outside \(0, 1\]"),
        ({"tflops": -1.0}, "tflops=-1 is not positive"),
        ({"tflops": 1.0, "fraction": 0.5}, "two budgets"),
    ):
        with pytest.raises(UserError, match=message):
            BudgetSettings(**values)
    plain = guidance(model)
    for target, message in (
        (BudgetSettings(fraction=0.01), "cannot be met by drops and reuse together: from .* to"),
        (BudgetSettings(fraction=0.01, by="drop"), "cannot be met by drops alone: from .* to"),
        (BudgetSettings(tflops=5.0), "cannot be met"),
    ):
        with pytest.raises(UserError, match=message):
            calibrate(model, plain, SAMPLER, target, 16, "fp32")
    values = {"sampler": {"name": "ddpm", "steps": 6}, "guidance": {"drop_fraction": 0.1}, "budget": {"fraction": 0.8}}
    settings = {"checkpoint": "x", "weights": "ema", "seed": 0, "batch_size": 1, "device": "cpu", "precision": "fp32"}
    others = {
        "autoencoder": None,
        "rounding": "round",
        "compile": False,
        "capacity": None,
        "assume": {},
        "paths": {"data": "data", "runs": "runs"},
    }
    with pytest.raises(UserError, match="are what it replaces"):
        SamplingConfig.of({**values, **settings, **others})


def test_what_was_calibrated_is_remembered(model, tmp_path):
    calls = []

    def find():
        calls.append(1)
        return calibrate(model, guidance(model), SAMPLER, BudgetSettings(fraction=0.8), 16, "fp32")

    path = tmp_path / "last.ckpt"
    first = remembered(Calibration, path, {"step": 1, "fraction": 0.8}, find)
    assert remembered(Calibration, path, {"step": 1, "fraction": 0.8}, find) == first
    assert len(calls) == 1
    remembered(Calibration, path, {"step": 2, "fraction": 0.8}, find)
    assert len(calls) == 2


def test_guidance_needs_a_null_class():
    net = DCDiT(
        grid=8, channels=1, num_classes=5, width=32, depth=1, heads=2, encoder_width=16, groups=4, label_dropout=0
    )
    model = Model(net, LATENTS, 0)
    check_guidance(model, GuidanceSettings())
    with pytest.raises(UserError, match=r"guidance.scale=2.0: .* model.label_dropout=0"):
        check_guidance(model, GuidanceSettings(scale=2.0))


@pytest.mark.parametrize(
    ("values", "second"),
    [
        ({"weak": "budget", "uncond_drop_fraction": 0.8}, False),
        ({}, True),
        ({"weak": "uncond"}, True),
        ({"uncond_drop_fraction": 0.5, "interval": [300, 800]}, True),
    ],
)
def test_a_weak_half_of_any_kind_is_counted_and_sees_what_it_should(model, values, second):
    torch.manual_seed(1)
    other = DiT(grid=8, channels=1, num_classes=5, width=32, depth=1, heads=2)
    if "uncond_drop_fraction" in values and second:
        other = DCDiT(grid=8, channels=1, num_classes=5, width=32, depth=2, heads=2, encoder_width=16, groups=4)
    perturb(other)
    other.eval()
    seen = []

    def note(numbers, step):
        seen.append((step.timestep, [None if half is None else half.mask.sum(1) for half in step.output.routings]))

    settings = GuidanceSettings(scale=2.0, weak_checkpoint="other" if second else None, **values)
    assert settings.guiding_keeps_class == (values.get("weak") == "budget" or (second and "weak" not in values))
    both = Guidance(model.network, 5, settings, other if second else None)
    labels = torch.arange(4)
    (found,) = generate(model, both, SAMPLER, labels, range(4), seed=0, batch_size=4, on_step=note)
    networks = (model.network, other if second else model.network)
    expected = torch.zeros(4).double()
    for timestep, halves in seen:
        assert len(halves) == (2 if settings.is_guided(timestep) else 1)
        for network, kept in zip(networks, halves, strict=False):
            assert (kept is None) == (not network.routes)
            expected += torch.tensor([count(network, [] if kept is None else [int(kept[i])]).total for i in range(4)])
    assert found.flops.tolist() == pytest.approx(expected.tolist())
    # the first step by hand
    x = torch.cat([torch.randn(1, 1, 8, 8, generator=sample_generator(0, i)) for i in range(4)])
    t = torch.full((4,), seen[0][0])
    y = labels if settings.guiding_keeps_class else torch.full((4,), 5)
    strong = networks[0](x, t, labels, 0.0).prediction
    output = both(x, int(t[0]), labels).prediction
    if settings.is_guided(int(t[0])):
        weak = networks[1](x, t, y, settings.uncond_drop_fraction or 0.0).prediction
        torch.testing.assert_close(output[:, :1], (weak + 2 * (strong - weak))[:, :1], atol=1e-5, rtol=1e-5)
    else:
        torch.testing.assert_close(output, strong, atol=1e-5, rtol=1e-5)


def test_a_sample_that_is_not_finite_is_named_with_its_step(model):
    class Breaks:
        """NaN in sample 6 from the third step on."""

        settings = GuidanceSettings()
        guiding = None

        def for_trajectory(self, cache):
            return self

        def __call__(self, x, timestep, y):
            prediction = torch.zeros(len(x), 2, 8, 8)
            if timestep <= SAMPLER.timesteps[2]:
                prediction[y == 1] = float("nan")
            return GuidedOutput(prediction, (None,))

    with pytest.raises(UserError, match=r"sample 6 is not finite after step 3 of 6 \(timestep \d+; guidance.scale=1"):
        list(generate(model, Breaks(), SAMPLER, torch.arange(64) % 5, range(2, 10), seed=0, batch_size=5))


def test_an_image_that_is_not_finite_is_named(model):
    class Breaks:
        def __call__(self, latents):
            raise NotFiniteError("a decoded image is not finite", 2)

    batch = SampleBatch([7, 9, 30], torch.zeros(3, 1, 8, 8), [], torch.zeros(1, 3))
    with pytest.raises(UserError, match=r"sample 30: a decoded image is not finite"):
        Sampling(None, None, model, None, SAMPLER, Breaks(), "fp32", None, None).images(batch)
