from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL

from dcdit.data.autoencoder import load_autoencoder, load_decoder, to_uint8
from dcdit.data.latents import LatentSpec
from dcdit.errors import UserError


def test_uint8_maps_the_range_and_clips():
    images = torch.tensor([-2.0, -1.0, -1 + 1 / 127.5, 0.0, 1.0, 3.0])
    assert to_uint8(images).tolist() == [0, 0, 1, 128, 255, 255]
    between = torch.tensor([-1 + 1.6 / 127.5, 0.0, 0.999])  # 1.6, 127.5 and 254.9
    assert to_uint8(between).tolist() == [2, 128, 255]
    assert to_uint8(between, "truncate").tolist() == [1, 127, 254]


CPU = torch.device("cpu")
LATENTS = LatentSpec((3, 4, 4), "identity", 0.5, 0.3, ("a",))


def test_identity_undoes_scale_and_shift():
    images = torch.rand(2, 3, 4, 4) * 2 - 1
    decode = load_decoder(LATENTS, CPU)
    assert torch.equal(decode((images - 0.3) * 0.5), to_uint8(images))


def test_identity_encodes_pixels_as_they_are():
    images = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8)
    identity = load_autoencoder("identity", CPU)
    mean, log_variance = identity.encode(images, "fp32").chunk(2, dim=1)
    assert torch.equal(identity.decode(mean), images)
    assert log_variance.max() < -20


def test_a_diffusers_autoencoder_is_loaded_by_path(tiny_vae, tmp_path, caplog):
    vae = AutoencoderKL.from_pretrained(tiny_vae, low_cpu_mem_usage=False).eval()
    latents = torch.randn(5, 4, 4, 4)
    spec = LatentSpec((4, 4, 4), str(tiny_vae), 0.18215, 0.1, ("a",))
    decode = load_decoder(spec, CPU)
    with torch.no_grad():
        expected = to_uint8(vae.decode(latents / 0.18215 + 0.1).sample)
    images = decode(latents)
    assert images.shape == (5, 3, 16, 16)
    assert (images.int() - expected.int()).abs().max() <= 1
    autoencoder = load_autoencoder(str(tiny_vae), CPU)
    assert (autoencoder.scale, autoencoder.shift) == (0.5, 0.25)
    assert (autoencoder.channels, autoencoder.factor) == (4, 4)

    with pytest.raises(UserError, match=r"autoencoder=.*nowhere.*cannot be loaded"):
        load_decoder(replace(spec, autoencoder=str(tmp_path / "nowhere")), CPU)
    with pytest.raises(UserError, match=r"has weights [0-9a-f]{16}, the latents were made with 0{16}"):
        load_decoder(replace(spec, fingerprint="0" * 16), CPU)
    caplog.clear()
    assert load_decoder(replace(spec, fingerprint="0" * 16), CPU, instead=str(tiny_vae)) is not None
    assert f"the latents were made with {spec.autoencoder!r}, weights {'0' * 16}" in caplog.text
    caplog.clear()
    assert load_decoder(spec, CPU, instead=str(tiny_vae)) is not None
    assert "another autoencoder" not in caplog.text
    with pytest.raises(UserError, match=r"has 4 channels, the latents 3"):
        load_decoder(replace(spec, shape=(3, 4, 4)), CPU)


def test_encoding_gives_the_posterior(tiny_vae):
    vae = AutoencoderKL.from_pretrained(tiny_vae, low_cpu_mem_usage=False).eval()
    images = torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8)
    autoencoder = load_autoencoder(str(tiny_vae), CPU)
    with torch.no_grad():
        posterior = vae.encode(images / 127.5 - 1).latent_dist
    expected = torch.cat([posterior.mean, posterior.logvar], dim=1)
    torch.testing.assert_close(autoencoder.encode(images, "fp32"), expected, rtol=1e-4, atol=1e-4)
    rough = autoencoder.encode(images, "bf16")
    assert rough.dtype == torch.float32
    assert 0 < (rough - expected).abs().max() < 0.2


def test_the_weights_make_the_fingerprint(tiny_vae, tmp_path):
    one = load_autoencoder(str(tiny_vae), CPU).fingerprint
    vae = AutoencoderKL.from_pretrained(tiny_vae, low_cpu_mem_usage=False)
    vae.save_pretrained(tmp_path / "moved")
    assert load_autoencoder(str(tmp_path / "moved"), CPU).fingerprint == one
    with torch.no_grad():
        next(vae.parameters())[0] += 1
    vae.save_pretrained(tmp_path / "other")
    assert load_autoencoder(str(tmp_path / "other"), CPU).fingerprint != one
