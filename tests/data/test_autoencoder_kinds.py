"""Every class of autoencoders that is understood: from images to shards to images, as diffusers' own networks do it."""

import json
import os
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from support.configs import call, compose_config
from support.foreign import AUTOENCODERS, save_flux2, save_kl, save_rae, save_tiny

from dcdit import extract
from dcdit.data.autoencoder import load_autoencoder, to_uint8
from dcdit.data.autoencoder_kinds import AUTOENCODER_KINDS
from dcdit.data.decoder import load_decoder, network_latents
from dcdit.data.latents import LatentSpec
from dcdit.data.manifest import Manifest
from dcdit.data.shards import Layout
from dcdit.errors import UserError

CPU = torch.device("cpu")


def model_of(folder: str):
    """What diffusers itself loads from a folder."""
    config = json.loads((Path(folder) / "config.json").read_text())
    return getattr(diffusers, config["_class_name"]).from_pretrained(folder, low_cpu_mem_usage=False).eval()


def by_channel(values) -> torch.Tensor:
    return torch.tensor(values)[:, None, None]


def seen_by_networks(model, pixels: torch.Tensor) -> torch.Tensor:
    """Latents as the pipelines of diffusers give them to a network, of pixels in [-1, 1]; means of posteriors."""
    config = model.config
    match type(model).__name__:
        case "AutoencoderKL":
            return (model.encode(pixels).latent_dist.mean - (config.shift_factor or 0)) * config.scaling_factor
        case "AutoencoderDC":
            return model.encode(pixels).latent * config.scaling_factor
        case "AutoencoderTiny":
            return model.encode(pixels).latents * config.scaling_factor
        case "AutoencoderRAE":
            return model.encode((pixels + 1) / 2).latent
        case "AutoencoderKLFlux2":
            mean = model.encode(pixels).latent_dist.mean
            batch, channels, height, width = mean.shape
            tiles = mean.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 1, 3, 5, 2, 4)
            tiles = tiles.reshape(batch, 4 * channels, height // 2, width // 2)
            variance = model.bn.running_var + config.batch_norm_eps
            return (tiles - model.bn.running_mean[:, None, None]) / variance.sqrt()[:, None, None]
    mean = model.encode(pixels[:, :, None]).latent_dist.mean[:, :, 0]
    return (mean - by_channel(config.latents_mean)) / by_channel(config.latents_std)


def images_of(model, seen: torch.Tensor) -> torch.Tensor:
    """The images in [-1, 1] that the pipelines of diffusers make of latents as a network sees them."""
    config = model.config
    match type(model).__name__:
        case "AutoencoderKL":
            return model.decode(seen / config.scaling_factor + (config.shift_factor or 0)).sample
        case "AutoencoderDC" | "AutoencoderTiny":
            return model.decode(seen / config.scaling_factor).sample
        case "AutoencoderRAE":
            return model.decode(seen).sample * 2 - 1
        case "AutoencoderKLFlux2":
            deviation = (model.bn.running_var + config.batch_norm_eps).sqrt()
            tiles = seen * deviation[:, None, None] + model.bn.running_mean[:, None, None]
            batch, channels, height, width = tiles.shape
            latents = tiles.view(batch, channels // 4, 2, 2, height, width).permute(0, 1, 4, 2, 5, 3)
            return model.decode(latents.reshape(batch, channels // 4, 2 * height, 2 * width)).sample
    latents = seen * by_channel(config.latents_std) + by_channel(config.latents_mean)
    return model.decode(latents[:, :, None]).sample[:, :, 0]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Six images of 32 pixels, in two classes."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(6):
        path = folder / f"class_{number % 2}" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(256, size=(32, 32, 3), dtype=np.uint8)).save(path)
    return folder


def pixels_of(source: Path) -> torch.Tensor:
    files = sorted(source.rglob("*.png"))
    images = [torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) for file in files]
    return torch.stack(images).float() / 127.5 - 1


def stored_arrays(shard: Path, layout: Layout, count: int) -> np.ndarray:
    rows = np.empty((count, layout.array_bytes), np.uint8)
    descriptor = os.open(shard, os.O_RDONLY)
    for index in range(count):
        layout.read(descriptor, index, False, rows[index])
    os.close(descriptor)
    return rows.view(np.float32).reshape(count, *layout.stored_shape)


def test_every_class_is_tried_here():
    assert AUTOENCODERS.keys() == AUTOENCODER_KINDS.keys()


@torch.no_grad()
@pytest.mark.parametrize("name", AUTOENCODERS)
def test_images_to_shards_to_images(tmp_path, source, name):
    folder = AUTOENCODERS[name](tmp_path / "autoencoder")
    words = (f"source={source}", f"out={tmp_path}/shards", f"autoencoder={folder}", "image_size=32", "num_workers=0")
    call(extract, compose_config(*words, "dtype=float32", name="extract"))
    directory, model = tmp_path / "shards" / "train", model_of(folder)
    manifest = Manifest.read(directory / "manifest.json")
    stored = torch.from_numpy(stored_arrays(directory / manifest.shards[0].name, Layout.of(manifest), 6))
    expected = seen_by_networks(model, pixels_of(source))
    assert manifest.latent_shape == tuple(expected.shape[1:])
    assert (manifest.representation == "moments") == AUTOENCODER_KINDS[name].random
    found = network_latents(stored, manifest, None)
    distance = (found[:, None] - expected[None]).flatten(2).abs().amax(-1)  # shards mix the images
    assert distance.argmin(1).sort().values.tolist() == list(range(6))
    assert distance.amin(1).max() < 1e-3 * expected.std()
    decoded = load_decoder(manifest.spec, CPU)(expected).int()
    assert (decoded - to_uint8(images_of(model, expected)).int()).abs().max() <= 1
    assert decoded.float().std() > 0


def test_published_factors_and_channels_are_read_from_the_configuration(tmp_path):
    """Networks of SD3 and Flux see 16 channels that are shifted and scaled."""
    found = load_autoencoder(save_kl(tmp_path / "sd3", latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609,
                                     use_quant_conv=False, use_post_quant_conv=False), CPU)  # fmt: skip
    assert (found.channels, found.factor, found.scale, found.shift) == (16, 2, 1.5305, 0.0609)
    deep = {"block_out_channels": (8,) * 6, "down_block_types": ("DownEncoderBlock2D",) * 6}
    f32 = load_autoencoder(save_flux2(tmp_path / "f32", **deep, up_block_types=("UpDecoderBlock2D",) * 6), CPU)
    assert (f32.channels, f32.factor) == (8, 64)
    flux2 = load_autoencoder(save_flux2(tmp_path / "flux2", patch_size=(1, 1)), CPU)
    assert (flux2.channels, flux2.factor) == (2, 2)
    assert load_autoencoder(save_flux2(tmp_path / "usual"), CPU).factor == 4


def refuses(words: str, folder: str, **changes) -> None:
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | changes))
    with pytest.raises(UserError, match=words):
        load_autoencoder(folder, CPU)
    path.write_text(json.dumps(config))


def test_what_is_not_understood_is_refused(tmp_path, monkeypatch):
    tiny = save_tiny(tmp_path / "tiny")
    refuses(r"of class 'VQModel': AutoencoderKL, AutoencoderKLFlux2, .* are understood", tiny, _class_name="VQModel")
    refuses(r"upsampling_scaling_factor=4 is not one of 2", tiny, upsampling_scaling_factor=4)
    with pytest.raises(UserError, match=r"patch_size=\[2, 1\]: only square tiles"):
        load_autoencoder(save_flux2(tmp_path / "oblong", patch_size=(2, 1)), CPU)
    monkeypatch.setitem(AUTOENCODER_KINDS, "AutoencoderOfTomorrow", AUTOENCODER_KINDS["AutoencoderKL"])
    words = r"diffusers \S+ has no AutoencoderOfTomorrow: install a newer one"
    refuses(words, tiny, _class_name="AutoencoderOfTomorrow")


def test_an_autoencoder_without_its_package_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderRAE"}')
    refuses(r"AutoencoderRAE needs transformers: pip install 'dcdit\[rae\]'", str(tmp_path))


def test_an_autoencoder_of_one_size_refuses_others(tmp_path, source):
    folder = save_rae(tmp_path / "rae")
    words = (f"source={source}", f"out={tmp_path}/x", f"autoencoder={folder}", "image_size=64", "num_workers=0")
    with pytest.raises(UserError, match=r"image_size=64: autoencoder=.* takes images of one size, set image_size=32"):
        call(extract, compose_config(*words, name="extract"))
    with pytest.raises(UserError, match=r"gives images of side 32 alone, the latents are those of side 64"):
        load_decoder(LatentSpec((64, 8, 8), folder, 1.0, 0.0, ("a",)), CPU)
    for number, (key, shape, words) in enumerate(
        [
            ("latents_mean", (64,), "latents_mean has 1 axes"),
            ("latents_std", (64, 2, 2), "latents_std has 64 x 2 x 2"),
        ]
    ):
        with pytest.raises(UserError, match=words):
            load_autoencoder(save_rae(tmp_path / f"{number}", **{key: torch.ones(shape)}), CPU)
    refuses("reshape_to_2d=false", folder, reshape_to_2d=False)
    load_autoencoder(save_rae(tmp_path / "mae", "mae", latents_mean=None, latents_std=None), CPU)


@torch.no_grad()
def test_a_distilled_decoder_takes_latents_as_networks_see_them(tmp_path):
    tiny, kl = save_tiny(tmp_path / "tiny"), save_kl(tmp_path / "kl", scaling_factor=0.18)
    seen = torch.randn(2, 4, 4, 4)
    expected = to_uint8(model_of(tiny).decode(seen).sample)
    latents = LatentSpec((4, 4, 4), kl, 0.18, 0.5, ("a",), load_autoencoder(kl, CPU).fingerprint)
    assert (load_decoder(latents, CPU, instead=tiny)(seen).int() - expected.int()).abs().max() <= 1
    own = LatentSpec((4, 4, 4), tiny, 2.0, 0.5, ("a",), load_autoencoder(tiny, CPU).fingerprint)
    scaled = to_uint8(model_of(tiny).decode(seen / 2 + 0.5).sample)
    assert (load_decoder(own, CPU, instead=tiny)(seen).int() - scaled.int()).abs().max() <= 1
    channels = LatentSpec((4, 4, 4), kl, (1.0, 2.0, 3.0, 4.0), 0.5, ("a",))
    with pytest.raises(UserError, match=r"these have scale 1 to 4 \(4 channels\): leave autoencoder out"):
        load_decoder(channels, CPU, instead=tiny)
