"""A packed sequence of fixed length in sampling: the same images while it has room, and else what is said."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.configs import perturb

from dcdit.checkpoints.load import Model
from dcdit.data.latents import IDENTITY, LatentSpec
from dcdit.diffusion.guidance import Guidance
from dcdit.diffusion.process import build_process
from dcdit.diffusion.samplers import Sampler
from dcdit.diffusion.settings import DDIM, GuidanceSettings, Heun
from dcdit.errors import UserError
from dcdit.network import DCDiT, DiT
from dcdit.network.packing import static_size
from dcdit.sampling.capacity import KeptShares, measure_kept, room_of
from dcdit.sampling.cost import SamplingCost
from dcdit.sampling.dropped import MARGIN
from dcdit.sampling.generate import SampleBatch, generate

LATENTS = LatentSpec((1, 8, 8), IDENTITY, 1.0, 0.0, tuple("abcde"))
SIZES = {"grid": 8, "channels": 1, "num_classes": 5, "width": 32, "depth": 2, "heads": 2}
STEPS = 5
SAMPLER = Sampler(DDIM(STEPS, clip=True))
CACHED = Sampler(DDIM(STEPS, clip=True, cache=0.8))
LITE = {"scale": 2.0, "drop_fraction": 0.2, "uncond_drop_fraction": 0.6}


def network(seed):
    torch.manual_seed(seed)
    net = DCDiT(**SIZES, groups=4)
    perturb(net)
    with torch.no_grad():
        net.router.scorer[-1].bias.fill_(0.0)  # keeps about half
    return net.eval()


MODEL, WEAK = Model(network(0), LATENTS, 0), network(1)
PLAIN = DiT(**SIZES).eval()


def draw(capacity, indices=range(8), sampler=SAMPLER, guiding=None, batch_size=8, seed=0, **guided):
    """The batches, and the masks of each step."""
    masks = []
    names = {} if guiding is None else {"weak_checkpoint": "weak"}
    networks = (MODEL.network, guiding or MODEL.network)
    room = room_of(capacity, networks) if isinstance(capacity, float) else capacity
    guidance = Guidance(MODEL.network, 5, GuidanceSettings(**guided, **names), guiding, capacity=room)
    batches = generate(
        MODEL, guidance, sampler, torch.arange(64) % 5, indices, seed=seed, batch_size=batch_size,
        on_step=lambda _, step: masks.append([None if each is None else each.mask for each in step.output.routings]),
    )  # fmt: skip
    return list(batches), masks


VARIANTS = {
    "unguided": {},
    "schedule": {"drop_schedule": [[900, 0.6], [100, 0.0]]},
    "lite": LITE,
    "interval": {"scale": 2.0, "interval": [300, 700]},
    "weak": {"scale": 2.0, "guiding": WEAK},
    "weak without router": {"scale": 2.0, "guiding": PLAIN},
    "cached": {"sampler": CACHED},
    "cached lite": {"sampler": CACHED, **LITE},
    "cached weak": {"sampler": CACHED, "scale": 2.0, "guiding": WEAK},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("share", [1.0, 0.75])
def test_images_with_room_for_all_are_those_of_the_exact_form(variant, share):
    (exact,), masks = draw(None, **VARIANTS[variant])
    (roomy,), same = draw(share, **VARIANTS[variant])
    torch.testing.assert_close(roomy.latents, exact.latents, atol=1e-5, rtol=0)
    for step, other in zip(masks, same, strict=True):
        for one, two in zip(step, other, strict=True):
            assert (one is None) == (two is None)
            assert one is None or torch.equal(one, two)
    assert exact.beyond == ()
    assert roomy.beyond == (0,) * STEPS
    assert torch.equal(exact.flops, roomy.flops)
    assert SamplingCost.of(roomy).dropped(64) is None
    if "cached" in variant:
        assert any(int(one.sum()) == 0 for step in masks for each in step for one in each)


@settings(max_examples=15, deadline=None)
@given(share=st.floats(0.05, 0.4), variant=st.sampled_from(["unguided", "lite", "weak", "weak without router"]))
def test_without_room_the_least_certain_tokens_of_the_sequence_go_and_each_is_counted_once(share, variant):
    _, masks = draw(None, **VARIANTS[variant])
    (batch,), bounded = draw(share, **VARIANTS[variant])
    # at the first step the networks see the same
    together = variant == "lite"
    pairs = [(one, two) for one, two in zip(masks[0], bounded[0], strict=True) if one is not None]
    wanted, kept = ([int(mask.sum()) for mask in side] for side in zip(*pairs, strict=True))
    if together:
        assert sum(kept) == min(sum(wanted), static_size(share, 16, 64))
    else:
        assert kept == [min(tokens, static_size(share, 8, 64)) for tokens in wanted]
    assert batch.beyond[0] == sum(wanted) - sum(kept)
    for one, two in pairs:
        assert not (two & ~one).any()
        assert two[:, 0].all()
        assert two[:, -1].all()


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_what_is_told_is_of_all_images_and_of_the_worst_step(data):
    kept = data.draw(st.lists(st.lists(st.integers(1, 64), min_size=3, max_size=3), min_size=1, max_size=4))
    lost = [data.draw(st.lists(st.integers(0, 64), min_size=3, max_size=3)) for _ in kept]
    batches = [
        SampleBatch([number], torch.zeros(1, 1, 8, 8), [(torch.tensor([each]),) for each in tokens],
                    torch.zeros(3, 1).double(), tuple(gone))
        for number, (tokens, gone) in enumerate(zip(kept, lost, strict=True))
    ]  # fmt: skip
    dropped = SamplingCost.total(map(SamplingCost.of, batches)).dropped(64)
    if not sum(map(sum, lost)):
        assert dropped is None
        return
    everything = [sum(step) for step in zip(*kept, strict=True)], [sum(step) for step in zip(*lost, strict=True)]
    shares = [gone / (tokens + gone) for tokens, gone in zip(*everything, strict=True)]
    assert dropped.share == pytest.approx(sum(everything[1]) / (sum(everything[0]) + sum(everything[1])))
    assert (dropped.most, dropped.steps) == (max(shares), 3)
    assert shares[dropped.step - 1] == max(shares)
    needed = max(tokens + gone for tokens, gone in zip(*everything, strict=True)) / (64 * len(kept))
    assert dropped.needed == pytest.approx(needed)
    for capacity in (0.3, "auto"):
        told = dropped.described(capacity)
        assert told.startswith(f"capacity={capacity}: {dropped.share:.2%} of the kept tokens")
        assert f"at step {dropped.step} of 3 " in told
        suggested = float(told.partition("such as capacity=")[2].partition(",")[0])
        assert suggested == 1 or suggested >= 1.25 * max(needed, 0.3 if capacity == 0.3 else needed)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_a_few_images_keep_gives_room_to_others(variant):
    given = dict(VARIANTS[variant])
    sampler, guiding = given.pop("sampler", SAMPLER), given.pop("guiding", None)
    names = {} if guiding is None else {"weak_checkpoint": "weak"}
    guidance = Guidance(MODEL.network, 5, GuidanceSettings(**given, **names), guiding)
    kept = measure_kept(MODEL, guidance, sampler, 16, "fp32")
    assert kept == measure_kept(MODEL, guidance, sampler, 16, "fp32")
    room = kept.room(sampler.timesteps)
    batches, masks = draw(room, range(64), batch_size=32, seed=7, **VARIANTS[variant])
    assert sum(map(sum, (batch.beyond for batch in batches))) == 0
    for index, timestep in enumerate(sampler.timesteps):
        for branch, mask in enumerate(masks[index]):
            assert (room(timestep)[branch] is None) == (mask is None)
            if mask is not None and "cached" not in variant:
                assert float(mask.float().mean()) * 1.05 < room(timestep)[branch] < float(mask.float().mean()) * 1.5


def test_a_sampler_that_asks_twice_at_a_timestep_has_room_for_both():
    timesteps = Sampler(Heun(3)).timesteps
    assert len(set(timesteps)) < len(timesteps) == 5
    steps = [(share, None) for share in (0.1, 0.4, 0.2, 0.3, 0.5)]
    room = KeptShares(steps).room(timesteps)
    for timestep in timesteps:
        most = max(share for at, (share, _) in zip(timesteps, steps, strict=True) if at == timestep)
        assert room(timestep) == [pytest.approx(MARGIN * most), None]
    assert KeptShares([(0.9, 0.95)] * 5).room(timesteps)(timesteps[0]) == [1.0, 1.0]


def test_heun_samples_with_what_it_measured():
    model = replace(MODEL, process=build_process({"name": "flow"}))
    guidance, sampler = Guidance(model.network, 5, GuidanceSettings(scale=2.0)), Sampler(Heun(3))
    kept = measure_kept(model, guidance, sampler, 32, "fp32")
    guidance = replace(guidance, capacity=kept.room(sampler.timesteps))
    (batch,) = generate(model, guidance, sampler, torch.arange(8) % 5, range(8), seed=3, batch_size=8)
    assert batch.beyond == (0,) * 5


def test_who_can_have_a_capacity():
    class Own(DCDiT):
        def forward(self, x, t, y, drop_fraction=0.0, cache=None):
            return super().forward(x, t, y, drop_fraction, cache)

    PLAIN.check_capacity("capacity", "auto")
    PLAIN.check_capacity("capacity", None)
    with pytest.raises(UserError, match=r"capacity=0\.4: DiT/2 drops no tokens, set capacity=null"):
        PLAIN.check_capacity("capacity", 0.4)
    own = Own(**SIZES, groups=4)
    own.check_capacity("capacity", None)
    for value in ("auto", 0.4):
        with pytest.raises(UserError, match=rf"capacity={value}: Own\.forward takes no capacity.*set capacity=null"):
            own.check_capacity("capacity", value)
