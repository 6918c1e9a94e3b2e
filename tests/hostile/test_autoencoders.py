"""Weights and configurations of others: each weight is found, used and finite, each key makes sense, or is refused."""

import inspect
import json
import math
import time
from importlib.util import find_spec
from pathlib import Path

import diffusers
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.foreign import AUTOENCODERS, save_kl, save_rae, small_dit
from support.hub import hub_of

from dcdit.checkpoints.foreign import reference_state
from dcdit.checkpoints.load import load_model
from dcdit.checkpoints.settings import AssumeSettings
from dcdit.data.autoencoder import load_autoencoder
from dcdit.data.autoencoder_kinds import AUTOENCODER_KINDS
from dcdit.data.decoder import load_decoder
from dcdit.data.latents import LatentSpec, numbers_of
from dcdit.errors import UserError
from dcdit.evaluation.features import OwnFeatures, TimmFeatures
from dcdit.runtime.devices import pick_device

CPU = torch.device("cpu")


class Net(torch.nn.Sequential):
    def __init__(self) -> None:
        super().__init__(torch.nn.Flatten(), torch.nn.Linear(12, 3))

    def forward(self, images):
        return super().forward(images[:, :, :2, :2].float())


def autoencoder(folder: Path):
    name = save_kl(folder / "vae")
    return folder / "vae" / "diffusion_pytorch_model.safetensors", lambda: load_autoencoder(name, CPU)


def timm_features(folder: Path):
    import timm

    path = folder / "weights.safetensors"
    save_file(timm.create_model("test_resnet").state_dict(), path)
    return path, lambda: TimmFeatures("test_resnet", str(path))


def own_features(folder: Path):
    path = folder / "weights.safetensors"
    save_file(Net().state_dict(), path)
    return path, lambda: OwnFeatures(Net(), weights=str(path))


def teacher(folder: Path):
    path = folder / "weights.safetensors"
    save_file(reference_state(small_dit()), path)
    return path, lambda: load_model(path, assume=AssumeSettings(heads=4))


def infinite(state, name):
    state[name].view(-1)[0] = math.inf


def too_large(state, name):
    state[name] = state[name].double()
    state[name].view(-1)[0] = 1e300


def complex_numbers(state, name):
    state[name] = state[name].to(torch.complex64)


def whole_numbers(state, name):
    state[name] = state[name].int()


def renamed(state, name):
    state["encoder.surprise.weight"] = state.pop(name)


@pytest.mark.parametrize("kind", [autoencoder, timm_features, own_features, teacher], ids=lambda kind: kind.__name__)
def test_every_weight_is_found_used_and_finite_or_the_first_is_named(tmp_path, kind):
    path, load = kind(tmp_path)
    load()
    whole = load_file(path)
    name = next(name for name in whole if whole[name].is_floating_point() and name != "pos_embed")
    for damage in (dict.pop, infinite, too_large, complex_numbers, whole_numbers, renamed):
        state = {key: tensor.clone() for key, tensor in whole.items()}
        damage(state, name)
        save_file(state, path)
        with pytest.raises(UserError) as caught:
            load()
        text = str(caught.value)
        assert name.rpartition(".")[0] in text or "encoder.surprise.weight" in text, damage
        assert len(text) < 1500
    save_file({**whole, "surprise.weight": torch.zeros(1)}, path)
    with pytest.raises(UserError, match=r"surprise\.weight"):
        load()


def test_features_of_a_network_that_is_not_finite_as_it_was_built():
    network = Net()
    with torch.no_grad():
        network[1].weight[0, 0] = math.nan
    with pytest.raises(UserError, match=r"Net is no trained network: network\.1\.weight is not finite"):
        OwnFeatures(network)


def test_names_from_before_2023_are_understood(tmp_path):
    path, load = autoencoder(tmp_path)
    before = load()
    state = load_file(path)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, name in old.items():
        for key in [key for key in state if f".{new}." in key]:
            state[key.replace(f".{new}.", f".{name}.")] = state.pop(key)
    assert sum(".query." in key for key in state) == 4
    save_file(state, path, metadata={"format": "pt"})
    assert load().fingerprint == before.fingerprint
    theirs = diffusers.AutoencoderKL.from_pretrained(path.parent).state_dict()
    torch.testing.assert_close(dict(load().vae.state_dict()), dict(theirs), rtol=0, atol=0)


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 70_000),
    st.integers(),
    st.floats(),  # NaN and infinities, which Python's json writes
    st.text(max_size=8),
    st.lists(st.one_of(st.none(), st.integers(-1, 10**6), st.floats(), st.text(max_size=3)), max_size=5),
    st.sampled_from([{}, {"load_in_8bit": True}, [[[[1.0]] * 4]], [[1.0, 2.0]], [5e-324] * 4, [1e308] * 4]),
    st.sampled_from([10**400, "0.5", [8] * 1000, ["ResBlock"] * 500]),
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    saved = [save(tmp_path_factory.mktemp("vae")) for name, save in AUTOENCODERS.items() if name != "AutoencoderRAE"]
    if find_spec("transformers"):
        saved.append(save_rae(tmp_path_factory.mktemp("vae")))
    return [(Path(folder), (Path(folder) / "config.json").read_text()) for folder in saved]


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(which=st.integers(0, 6), data=st.data(), value=JUNK)
def test_a_configuration_of_an_autoencoder_is_understood_or_refused(folders, which, data, value):
    folder, text = folders[which % len(folders)]
    config = json.loads(text)
    keys = [*config, "latents_mean", "latents_std", "shift_factor", "quantization_config", "surprise"]
    config[data.draw(st.sampled_from(keys))] = value
    (folder / "config.json").write_text(json.dumps(config))
    begin = time.monotonic()
    try:
        found = load_autoencoder(str(folder), CPU)
        assert all(map(math.isfinite, (*numbers_of(found.scale), *numbers_of(found.shift))))
        assert min(numbers_of(found.scale)) > 0
    except UserError as error:
        # Whether it raises depends on the value.
        assert str(folder) in str(error)  # noqa: PT017
        assert len(str(error)) < 2000  # noqa: PT017
    finally:
        (folder / "config.json").write_text(text)
    assert time.monotonic() - begin < 5


def test_every_key_of_the_classes_that_are_understood_is_known():
    for name, kind in AUTOENCODER_KINDS.items():
        assert set(inspect.signature(getattr(diffusers, name)).parameters) <= set(kind.keys)


@pytest.mark.parametrize("text", ["", "[]", "null", "[" * 50_000, '{"a":' * 50_000, "\x00", '{"_class_name": ["x"]}'])
def test_a_configuration_that_is_none(folders, text):
    folder, whole = folders[0]
    (folder / "config.json").write_text(text)
    try:
        with pytest.raises(UserError, match=r"config\.json"):
            load_autoencoder(str(folder), CPU)
    finally:
        (folder / "config.json").write_text(whole)


def test_local_folders_stay_local(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()
    Path("models/vae").symlink_to(folders[0][0])
    found = load_autoencoder("models/vae", CPU)
    assert found.name == "./models/vae"  # what manifests and checkpoints say
    spec = LatentSpec((4, 8, 8), found.name, found.scale, found.shift, ("a",), found.fingerprint)
    assert load_decoder(spec, CPU).autoencoder.fingerprint == found.fingerprint
    with hub_of({"models/vae": folders[0][0], "owner/vae": folders[0][0]}, tmp_path / "cache") as hub:
        Path("models/vae").unlink()
        for name in (found.name, f"{tmp_path}/vae", "data/models/vae", "vae", "../vae", "~/vae", ""):
            with pytest.raises(UserError, match="there is no such folder"):
                load_autoencoder(name, CPU)
        assert hub.asked == []
        assert load_autoencoder("owner/vae", CPU).fingerprint == found.fingerprint
        assert load_autoencoder("owner/vae", CPU).name == "owner/vae"
        with pytest.raises(UserError, match="cannot be had from the hub"):
            load_autoencoder("owner/other", CPU)


@pytest.mark.parametrize("name", ["meta", "meta:0", "hpu", "cuda:99", "nope", "0", "", "cpu\x1b[31m"])
def test_a_device_computes_or_is_refused(name):
    with pytest.raises(UserError, match="computes nothing here") as caught:
        pick_device(name)
    assert "\x1b" not in str(caught.value)
    assert pick_device("cpu") == CPU


@pytest.mark.parametrize(("channels", "shown"), [(1, 1), (2, 1), (3, 3), (4, 3), (16, 3)])
def test_latents_of_any_number_of_channels_are_shown(channels, shown):
    latents = torch.randn(2, channels, 4, 4)
    decode = load_decoder(LatentSpec((channels, 4, 4), "owner/vae", 1.0, 0.0, ("a",)), CPU, "identity")
    assert decode(latents).shape == (2, shown, 4, 4)
    assert decode.size(CPU) == (4, 4)
