"""Alignment of hidden states: its losses against plain computations, and runs with it as users have them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.configs import PLAIN_DIT, TINY, compose_config, config_of, train
from support.runs import assert_same_end, differences, load
from torch import nn

from dcdit.checkpoints import encoder as encoders
from dcdit.checkpoints.encoder import EncoderKeys, encoder_cost, load_encoder
from dcdit.checkpoints.load import load_model
from dcdit.compute.flops import count
from dcdit.data.latents import LatentSpec
from dcdit.data.manifest import EncoderIdentity
from dcdit.errors import UserError
from dcdit.network import DiT, build_network
from dcdit.network.packing import full_packing, make_packing, make_static_packing
from dcdit.network.routing import Routing
from dcdit.training.alignment.build import cost_of_alignment
from dcdit.training.alignment.features import Features
from dcdit.training.alignment.losses import DispersiveLoss, GridAlignment, TokenAlignment, mlp
from dcdit.training.auxiliary import HiddenStates, Noisy, record_hidden_states
from dcdit.training.build import match_compute
from dcdit.training.fitting import trial_peak

KEYS = EncoderKeys("alignment.encoder", "alignment.weights", "alignment.grid")
ENCODER = ("alignment.encoder=test_vit", "alignment.weights=random", "alignment.grid=4")
CHANNELS, WIDTH = 6, 16


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file with the weights of a tiny encoder, which has a classifier too."""
    import timm

    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    save_file(timm.create_model("test_vit", num_classes=10).state_dict(), path)
    return path


def features_of_companion() -> Features:
    """Features that lie beside the latents."""
    spec = LatentSpec((1, 8, 8), "identity", 1.0, 0.0, ("a",))
    return Features(None, spec, CHANNELS, EncoderIdentity("test_vit", "0" * 16, "random"))


def noisy_with(companion=None, latents=None) -> Noisy:
    empty = torch.zeros(1)
    return Noisy(empty, empty, empty, empty if latents is None else latents, empty, companion)


def routing_of(mask, prob=None) -> Routing:
    return Routing(mask.float() if prob is None else prob, mask, mask)


def cosine(one, two) -> float:
    one, two = one.detach().double(), two.detach().double()
    return float(one @ two) / math.sqrt(float(one @ one) * float(two @ two))


masks = st.lists(st.lists(st.booleans(), min_size=64, max_size=64).filter(any), min_size=1, max_size=3)


# ---- losses --------------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(masks, st.sampled_from([2, 4, 8]), st.booleans())
def test_each_kept_token_meets_the_patch_that_covers_it(rows, grid, padded):
    mask = torch.tensor(rows)
    size = -(-int(mask.sum()) // 128) * 128
    packing = make_static_packing(mask, size) if padded else make_packing(mask)
    torch.manual_seed(0)
    features = torch.randn(len(mask), CHANNELS, grid, grid)
    tokens, projector = torch.randn(len(packing.index), WIDTH), mlp(WIDTH, 8, CHANNELS)
    loss = TokenAlignment(projector, features_of_companion(), (8, 8), 1, 0.5)
    found = loss.loss(HiddenStates({1: tokens}, packing), noisy_with(features), None).item()

    expected, row = [], 0
    for sample, kept in enumerate(mask.tolist()):
        for position, is_kept in enumerate(kept):
            if is_kept:
                patch = position // 8 * grid // 8, position % 8 * grid // 8
                expected.append(-cosine(projector(tokens[row]), features[sample, :, patch[0], patch[1]]))
                row += 1
    assert found == pytest.approx(sum(expected) / len(expected), abs=1e-5)


def plain_irepa(grid, features, convolution) -> float:
    """iREPA's loss of tokens on the grid (B, D, H, W), image by image and patch by patch."""
    total, (batch, _, height, width) = [], features.shape
    patch = grid.shape[2] // height
    for sample in range(batch):
        image = features[sample].double().flatten(1)
        target = (image - image.mean(1, keepdim=True)) / image.var(1, correction=0, keepdim=True).sqrt()
        pooled = torch.empty(grid.shape[1], height, width)
        for row in range(height):
            for column in range(width):
                rows, columns = (slice(each * patch, (each + 1) * patch) for each in (row, column))
                pooled[:, row, column] = grid[sample, :, rows, columns].mean((1, 2))
        projected = convolution(pooled[None])[0].flatten(1)
        total += [-cosine(projected[:, each], target[:, each]) for each in range(height * width)]
    return sum(total) / len(total)


@pytest.mark.parametrize("grid", [2, 4, 8])
def test_the_grid_of_a_plain_dit_is_pooled_and_features_are_normalised(grid):
    torch.manual_seed(0)
    features = 3 + 2 * torch.randn(2, CHANNELS, grid, grid)
    tokens, convolution = torch.randn(2, 8, 8, WIDTH), nn.Conv2d(WIDTH, CHANNELS, 3, padding=1)
    loss = GridAlignment(convolution, features_of_companion(), (8, 8), None, 1, 1.0)
    packing = full_packing(2, 64, torch.device("cpu"))
    found = loss.loss(HiddenStates({1: tokens.flatten(0, 2)}, packing), noisy_with(features), None).item()
    assert found == pytest.approx(plain_irepa(tokens.permute(0, 3, 1, 2), features, convolution), abs=1e-5)
    scaled = loss.loss(HiddenStates({1: tokens.flatten(0, 2)}, packing), noisy_with(7 - 5 * features), None).item()
    assert scaled == pytest.approx(-found, abs=1e-4)  # neither mean nor deviation of a channel matters, but its sign


def test_tokens_on_the_grid_are_those_of_the_nearest_kept_position():
    torch.manual_seed(0)
    mask = torch.rand(2, 64) > 0.6
    packing, features = make_packing(mask), torch.randn(2, CHANNELS, 4, 4)
    tokens, convolution = torch.randn(len(packing.index), WIDTH), nn.Conv2d(WIDTH, CHANNELS, 3, padding=1)
    loss = GridAlignment(convolution, features_of_companion(), (8, 8), None, 1, 1.0)
    found = loss.loss(HiddenStates({1: tokens}, packing), noisy_with(features), routing_of(mask)).item()
    grid, row = torch.empty(2, WIDTH, 8, 8), 0
    for sample in range(2):
        kept = mask[sample].nonzero().flatten().tolist()
        for position in range(64):
            distance = [(other // 8 - position // 8) ** 2 + (other % 8 - position % 8) ** 2 for other in kept]
            grid[sample, :, position // 8, position % 8] = tokens[row + distance.index(min(distance))]
        row += len(kept)
    assert found == pytest.approx(plain_irepa(grid, features, convolution), abs=1e-5)


def test_a_router_that_keeps_everything_is_a_plain_dit():
    torch.manual_seed(0)
    everything = torch.ones(2, 64, dtype=torch.bool)
    packing, full = make_packing(everything), full_packing(2, 64, torch.device("cpu"))
    tokens, features = torch.randn(128, WIDTH), torch.randn(2, CHANNELS, 4, 4)
    for loss in (
        TokenAlignment(mlp(WIDTH, 8, CHANNELS), features_of_companion(), (8, 8), 1, 0.5),
        GridAlignment(nn.Conv2d(WIDTH, CHANNELS, 3, padding=1), features_of_companion(), (8, 8), 1.0, 1, 1.0),
    ):
        packed = loss.loss(HiddenStates({1: tokens}, packing), noisy_with(features), routing_of(everything))
        dense = loss.loss(HiddenStates({1: tokens}, full), noisy_with(features), None)
        torch.testing.assert_close(packed, dense, rtol=0, atol=1e-4)  # de-chunk smooths by 1e-4 at a probability of 1


def test_alignment_on_the_grid_leaves_the_router_alone():
    mask = torch.rand(1, 64, generator=torch.Generator().manual_seed(0)) > 0.5
    prob = (mask * 0.4 + 0.3).requires_grad_()
    packing = make_packing(mask)
    tokens = torch.randn(len(packing.index), WIDTH, requires_grad=True)
    loss = GridAlignment(nn.Conv2d(WIDTH, CHANNELS, 3, padding=1), features_of_companion(), (8, 8), 1.0, 1, 1.0)
    features = torch.randn(1, CHANNELS, 4, 4)
    loss.loss(HiddenStates({1: tokens}, packing), noisy_with(features), routing_of(mask, prob)).backward()
    assert prob.grad is None
    assert tokens.grad.abs().max() > 0


@settings(max_examples=20, deadline=None)
@given(masks, st.booleans(), st.floats(0.1, 3))
def test_dispersion_is_that_of_a_double_loop(rows, padded, temperature):
    mask = torch.tensor(rows)
    packing = make_static_packing(mask, -(-int(mask.sum()) // 128) * 128) if padded else make_packing(mask)
    torch.manual_seed(0)
    tokens = torch.randn(len(packing.index), WIDTH)
    loss = DispersiveLoss(temperature, 1, 0.5)
    found = loss.loss(HiddenStates({1: tokens}, packing), noisy_with(), None).item()
    pooled, row = [], 0
    for kept in mask.sum(1).tolist():
        pooled.append(tokens[row : row + kept].double().mean(0) / math.sqrt(WIDTH))
        row += kept
    total = sum(math.exp(-float((one - two).square().sum()) / temperature) for one in pooled for two in pooled)
    assert found == pytest.approx(math.log(total / len(pooled) ** 2), abs=1e-5)


def test_equal_samples_have_a_finite_gradient():
    tokens = torch.ones(8, WIDTH, requires_grad=True)
    packing = full_packing(2, 4, torch.device("cpu"))
    DispersiveLoss(0.5, 1, 0.5).loss(HiddenStates({1: tokens}, packing), noisy_with(), None).backward()
    assert tokens.grad.isfinite().all()


def test_only_the_wanted_states_are_recorded():
    network = DiT(8, 1, 3, width=32, depth=3, heads=2)
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([3, 900]), torch.tensor([0, 2])
    with torch.no_grad():
        with record_hidden_states(network) as everything:
            network(x, t, y)
        with record_hidden_states(network, {2}) as some:
            network(x, t, y)
        with record_hidden_states(network, ()) as nothing:
            network(x, t, y)
    assert list(everything.tokens) == [0, 1, 2, 3]
    assert list(some.tokens) == [2]
    assert torch.equal(some.tokens[2], everything.tokens[2])
    assert (nothing.tokens, nothing.packing) == ({}, None)


# ---- the encoder ---------------------------------------------------------------------------------------------------


def test_an_encoder_sees_patches_of_the_image(weights):
    encoder = load_encoder("test_vit", str(weights), 4, KEYS)
    images = torch.rand(2, 1, 12, 12)
    features = encoder(images)
    assert features.shape == (2, encoder.channels, 4, 4)
    other = images.clone()
    other[:, :, :3, 9:] = 0  # the upper right patch
    change = (encoder(other) - features).square().mean((0, 1))
    assert change.argmax().item() == 3
    again = load_encoder("test_vit", str(weights), 4, KEYS)
    assert again.identity == encoder.identity
    assert torch.equal(again(images), features)
    assert load_encoder("test_vit", "random", 4, KEYS).identity.weights != encoder.identity.weights
    # without class token and in raster order, as timm's own
    import timm

    network = timm.create_model("test_vit", num_classes=10)
    from safetensors.torch import load_file

    network.load_state_dict(load_file(weights))
    network.eval().set_input_size(img_size=(64, 64))
    pixels = nn.functional.interpolate(images.expand(-1, 3, -1, -1), (64, 64), mode="bicubic", antialias=True)
    tokens = network.forward_features((pixels.clamp(0, 1) - encoder._mean) / encoder._std)
    torch.testing.assert_close(features.flatten(2).transpose(1, 2), tokens[:, network.num_prefix_tokens :])


@pytest.mark.parametrize("model", ["test_resnet", "test_convnext"])
def test_an_encoder_of_convolutions_gives_its_last_feature_map(model, tmp_path):
    import timm

    torch.manual_seed(0)
    network = timm.create_model(model, num_classes=10).eval()
    save_file(network.state_dict(), tmp_path / "x.safetensors")
    encoder = load_encoder(model, str(tmp_path / "x.safetensors"), 4, KEYS)
    images = torch.rand(2, 3, encoder.side, encoder.side)
    features = encoder(images)
    assert features.shape == (2, encoder.channels, 4, 4)
    normalised = (images - encoder._mean) / encoder._std
    plain = network.forward_intermediates(normalised, intermediates_only=True)[-1]
    torch.testing.assert_close(features, plain)
    other = images.clone()
    other[:, :, -encoder.side // 4 :, : encoder.side // 4] = 0  # the lower left patch
    change = (encoder(other) - features).square().mean((0, 1))
    assert change.argmax().item() == 12
    assert encoder_cost(model, 4, KEYS)[1] == encoder.channels


def test_weights_of_the_very_size_are_loaded(tmp_path):
    import timm

    network = timm.create_model("test_vit", num_classes=0)
    network.set_input_size(img_size=(96, 96))
    save_file(network.state_dict(), tmp_path / "own.safetensors")
    encoder = load_encoder("test_vit", str(tmp_path / "own.safetensors"), 6, KEYS)
    torch.testing.assert_close(dict(encoder.network.state_dict()), dict(network.state_dict()))
    with pytest.raises(UserError, match=r"alignment.weights=.*own.safetensors do not fit test_vit: .*pos_embed"):
        load_encoder("test_vit", str(tmp_path / "own.safetensors"), 5, KEYS)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module.", "model."])
@pytest.mark.parametrize("below", [(), ("state_dict",), ("ema",), ("model", "state_dict")])
def test_an_encoder_as_other_programs_store_it(weights, tmp_path, prefix, below):
    state = load_file(weights)
    values = {f"{prefix}{name}": tensor.half() for name, tensor in state.items()}
    for key in reversed(below):
        values = {key: values}
    torch.save(values, tmp_path / "x.pt")
    encoder = load_encoder("test_vit", str(tmp_path / "x.pt"), 4, KEYS)
    torch.testing.assert_close(
        encoder.network.blocks[0].mlp.fc1.weight, state["blocks.0.mlp.fc1.weight"].half().float()
    )


def test_encoders_that_cannot_be_had(tmp_path, monkeypatch):
    def refuses(words, *arguments):
        with pytest.raises(UserError, match=words):
            load_encoder(*arguments, KEYS)

    refuses(r"alignment.encoder='test_vitt' is no model of timm, did you mean test_vit", "test_vitt", "random", 4)
    refuses(
        r"alignment.weights=.*gone.safetensors: there is no such file",
        "test_vit",
        str(tmp_path / "gone.safetensors"),
        4,
    )
    refuses(
        rf"`python scripts/train_digits_encoder.py {tmp_path}/gone.safetensors` trains one",
        "test_vit",
        str(tmp_path / "gone.safetensors"),
        4,
    )
    refuses("there is no such file; give one that holds", "test_resnet", str(tmp_path / "gone.safetensors"), 4)
    torch.save({"state_dict": print}, tmp_path / "x.pt")
    refuses("holds more than parameters", "test_vit", str(tmp_path / "x.pt"), 4)

    def fail(*args, **options):
        raise OSError("no network")

    monkeypatch.setattr("timm.create_model", fail)
    refuses(r"cannot be downloaded \(no network\): give a local file as alignment.weights=", "test_vit", "auto", 4)


def test_the_cost_of_an_encoder_is_that_of_its_products():
    flops, channels = encoder_cost("test_vit", 4, KEYS)
    network = encoders.create_timm_model("test_vit", "", "", pretrained=False, num_classes=0)
    tokens = 16 + network.num_prefix_tokens
    blocks = sum(each.weight.numel() for each in network.blocks.modules() if isinstance(each, nn.Linear))
    attention = len(network.blocks) * 2 * tokens * tokens * channels
    assert flops == 2 * (tokens * blocks + attention + 16 * network.patch_embed.proj.weight.numel())


# ---- runs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["repa", "irepa", "dispersive"])
@pytest.mark.parametrize(
    "network",
    [(), ("execution.capacity=0.4",), PLAIN_DIT, ("optimizer=muon",)],
    ids=["dcdit", "capacity", "dit", "muon"],
)
def test_a_run_resumes_bit_for_bit_and_leaves_the_projector_behind(kind, network, tiny):
    words = (f"alignment={kind}", *(ENCODER if kind != "dispersive" else ()), *network, "optimizer.schedule=constant")
    words = (*words, *(("alignment.width=32",) if kind == "repa" else ()))
    whole = tiny("whole", *words, "trainer.max_steps=4")
    tiny("parts", *words, "trainer.max_steps=2")
    parts = tiny("parts", *words, "trainer.max_steps=4", "ckpt_path=last")
    assert_same_end(whole, parts)
    stored = load(whole)
    assert differences(stored["current_model_state"], load(parts)["current_model_state"]) == []
    trained = {name for name in stored["state_dict"] if name.startswith("alignment.")}
    assert bool(trained) == (kind != "dispersive")
    # an average is of what is sampled with
    assert all(torch.equal(stored["state_dict"][name], stored["current_model_state"][name]) for name in trained)
    model = load_model(whole)
    assert not any("alignment" in name or "projector" in name for name in model.network.state_dict())
    assert stored["hyper_parameters"]["alignment"]["name"] == kind


def test_alignment_trains_projector_and_network(tiny):
    words = ("trainer.max_steps=3", "optimizer.lr=0.01", "optimizer.lr_warmup_steps=0")
    plain = load(tiny("plain", *words))["current_model_state"]
    aligned = load(tiny("aligned", *words, "alignment=repa", *ENCODER, "alignment.width=32"))["current_model_state"]
    start = load(
        tiny("start", "alignment=repa", *ENCODER, "alignment.width=32", "trainer.max_steps=1", "optimizer.lr=1e-12")
    )
    for name, tensor in start["current_model_state"].items():
        assert not torch.equal(aligned[name], tensor), name
    assert differences(plain, {name: tensor for name, tensor in aligned.items() if name in plain})


def test_the_loss_falls(tiny, weights):
    run = tiny(
        *("long", "alignment=irepa", *ENCODER, f"alignment.weights={weights}", "alignment.weight=4"),
        *("trainer.max_steps=40", "optimizer.lr=5e-3"),
    )
    rows = (run / "logs" / "version_0" / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("train/alignment_loss")
    losses = [float(row.split(",")[column]) for row in rows[1:] if row.split(",")[column]]
    assert sum(losses[-5:]) / 5 < sum(losses[:5]) / 5 - 0.1


def test_an_exported_network_has_no_projector(tiny, tmp_path):
    from support.configs import call

    from dcdit import export

    run = tiny("run", "alignment=repa", *ENCODER, "alignment.width=32", "trainer.max_steps=1")
    call(export, compose_config(f"checkpoint={run}", f"out={tmp_path / 'exported'}", name="export"))
    from safetensors.torch import load_file

    state = load_file(tmp_path / "exported" / "model.safetensors")
    assert set(state) == set(build_network(config_of(*TINY).model).state_dict())


def test_what_a_run_began_with_is_told_and_stays(tiny, weights, tmp_path, caplog):
    words = ("alignment=repa", *ENCODER, "alignment.width=32", f"alignment.weights={weights}")
    tiny("run", *words, "trainer.max_steps=1")
    assert "alignment=repa: a loss on the tokens after block 1, with features of test_vit (weights " in caplog.text
    with pytest.raises(UserError, match=r"alignment: the run was trained with weights='.*', now it is"):
        tiny("run", *words, "alignment.weights=random", "trainer.max_steps=2", "ckpt_path=last")
    with pytest.raises(UserError, match=r"alignment.name='none': the run was trained with 'repa'"):
        tiny("run", "trainer.max_steps=2", "ckpt_path=last")
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(weights.read_bytes())
    assert tiny("run", *words, f"alignment.weights={moved}", "trainer.max_steps=2", "ckpt_path=last")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("alignment=repa", *ENCODER, "alignment.block=2"), r"alignment.block=2: the network has 1 blocks"),
        (("alignment=repa", *ENCODER, "alignment.grid=3"), r"alignment.grid=3: .* 8 x 8 tokens .* one of 1, 2, 4, 8"),
        (("alignment=irepa", *ENCODER, "alignment.grid=1"), r"alignment.grid=1: .* of one patch nothing is left"),
        (("alignment=irepa", *ENCODER, *PLAIN_DIT, "alignment.grid=8"), r"alignment.grid=8: .* 4 x 4 tokens"),
        (("alignment=repa", *ENCODER, "alignment.features=stored"), r"needs features .*holds none: extract them"),
        (("alignment=repa", "alignment.grid=4", "alignment.encoder=vitt"), "alignment.encoder='vitt' is no model"),
        (("alignment=dispersive", "alignment.temperature=0"), "alignment.temperature=0 is not positive"),
        (("alignment=repa", *ENCODER, "alignment.width=many"), "alignment.width='many' is not a whole number"),
    ],
)
def test_mistakes_are_told_before_the_first_step(words, message, tiny, tmp_path):
    with pytest.raises(UserError, match=message):
        tiny("refused", *words)
    assert not list((tmp_path / "refused").glob("checkpoints/*"))


def test_latents_without_pixels_are_refused(tmp_path):
    words = (*TINY, "alignment=repa", *ENCODER, "model.channels=4", "data.source.name=synthetic", "~data.source.grid")
    run = (f"data.directory={tmp_path / 'noise'}", "+data.source.grid=8", "+data.source.num_classes=10")
    with pytest.raises(UserError, match="latents of 4 channels are no pictures"):
        train(compose_config(*words, *run), tmp_path / "run")


def test_matching_compute_counts_encoder_and_projector():
    baseline = ("match_compute.baseline=dit_s_2", "match_compute.steps=1000", "multi_budget=none")
    plain = match_compute(config_of("experiment=s_n4", *baseline)).trainer.max_steps
    vit = ("alignment.encoder=vit_tiny_patch16_224",)
    config = config_of("experiment=s_n4", *baseline, "alignment=repa", *vit)
    aligned = match_compute(config).trainer.max_steps
    stored = match_compute(config_of("experiment=s_n4", *baseline, "alignment=repa", *vit, "alignment.features=stored"))
    assert aligned < stored.trainer.max_steps < plain
    with torch.device("meta"):
        network = build_network(config.model)
    step = count(network, [256.0]).published
    projector = 256 * 2 * (384 * 2048 + 2048 * 2048 + 2048 * 192)
    assert stored.trainer.max_steps == pytest.approx(plain * step / (step + projector), abs=1)
    encoder = encoder_cost("vit_tiny_patch16_224", 16, KEYS)[0]
    assert aligned == pytest.approx(plain * step / (step + projector + encoder / 3), abs=1)
    with torch.device("meta"):
        dense = build_network(config_of("experiment=dit_s_2").model)
    assert cost_of_alignment(config.alignment, dense).linear == 0


@pytest.mark.parametrize("kind", ["repa", "irepa", "dispersive"])
def test_the_trial_of_a_micro_batch_aligns_too(kind):
    words = ENCODER if kind != "dispersive" else ()
    assert trial_peak(config_of(*TINY, f"alignment={kind}", *words), 3, torch.device("cpu")) == 0
    if words:
        stored = config_of(*TINY, f"alignment={kind}", *words, "alignment.features=stored")
        assert trial_peak(stored, 3, torch.device("cpu")) == 0
