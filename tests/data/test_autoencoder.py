from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL
from support.foreign import save_dc, save_kl

from dcdit.data.autoencoder import load_autoencoder, to_uint8
from dcdit.data.decoder import load_decoder
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


@pytest.mark.parametrize("fingerprint", [None, "0" * 16])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_latents_of_an_autoencoder_are_told_where_they_are_shown_undecoded(caplog, channels, fingerprint):
    latents = LatentSpec((channels, 4, 4), "some/vae", 0.5, 0.0, ("a",), fingerprint)
    decode = load_decoder(latents, CPU, "identity")
    assert decode(torch.zeros(1, channels, 4, 4)).shape == (1, min(channels, 3), 4, 4)
    assert caplog.text.count("autoencoder=identity: latents of some/vae are no pictures") == 1
    assert "Decoding" not in caplog.text
    caplog.clear()
    load_decoder(replace(latents, autoencoder="identity", fingerprint=None), CPU, "identity")
    assert ("latents of 4 channels are no pictures" in caplog.text) == (channels == 4)
    assert bool(caplog.text) == (channels == 4)


def test_undecoded_latents_fill_the_range_of_a_picture_and_are_told_from_pictures():
    latents = LatentSpec((4, 2, 2), "some/vae", 0.18215, 0.1, ("a",))
    seen = torch.tensor([-3.0, 0, 1.5, 3]).view(1, 1, 2, 2).expand(1, 4, 2, 2)  # as a network sees them
    decode = load_decoder(latents, CPU, "identity")
    assert decode(seen)[0, 0].flatten().tolist() == [0, 128, 191, 255]
    assert decode.identity == "identity: the first 3 of 4 channels of undecoded latents"
    own = replace(latents, autoencoder="identity", scale=1.0, shift=0.0)
    identities = [load_decoder(replace(own, shape=(n, 2, 2)), CPU).identity for n in (1, 2, 3, 16)]
    first = ("identity: the first 1 of 2 channels", "identity: the first 3 of 16 channels")
    assert identities == ["identity", first[0], "identity", first[1]]
    assert decode(seen).shape == load_decoder(own, CPU)(seen).shape


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
        load_decoder(spec, CPU, str(tmp_path / "nowhere"))
    for moved in (str(tmp_path / "nowhere"), "./vae"):  # never looked for on the hub
        with pytest.raises(UserError, match=rf"in the folder {moved}, which is not there .*: give its present folder"):
            load_decoder(replace(spec, autoencoder=moved), CPU)
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


def test_mean_and_deviation_of_each_channel_are_taken_from_the_configuration(tmp_path):
    mean, deviation = [0.5, -1.0, 0.0, 2.0], [2.0, 0.5, 1.0, 4.0]
    nested = [[[[value]] for value in mean]]  # as some write it: 1 x C x 1 x 1
    for number, given in enumerate((mean, nested)):
        values = {"latents_mean": given, "latents_std": deviation, "scaling_factor": 0.5}
        found = load_autoencoder(save_kl(tmp_path / f"{number}", **values), CPU)
        assert found.shift == tuple(mean)
        assert found.scale == tuple(0.5 / each for each in deviation)
    decode = load_decoder(LatentSpec((4, 8, 8), found.name, found.scale, found.shift, ("a",)), CPU)
    z = torch.randn(2, 4, 8, 8)
    as_diffusers = (z - torch.tensor(mean)[:, None, None]) * 0.5 / torch.tensor(deviation)[:, None, None]
    torch.testing.assert_close(decode.latents.normalised(z), as_diffusers)
    assert torch.equal(decode(decode.latents.normalised(z)), found.decode(decode.latents.restored(as_diffusers)))
    with pytest.raises(UserError, match=r"both shift_factor and latents_mean"):
        load_autoencoder(save_kl(tmp_path / "both", latents_mean=mean, shift_factor=1.0), CPU)
    with pytest.raises(UserError, match=r"latents_std=0 is not positive"):
        load_autoencoder(save_kl(tmp_path / "zero", latents_mean=mean, latents_std=[0.0] * 4), CPU)
    with pytest.raises(UserError, match=r"latents_mean has 3 numbers for 4 channels"):
        load_autoencoder(save_kl(tmp_path / "short", latents_mean=mean[:3], latents_std=deviation), CPU)
    with pytest.raises(UserError, match=r"shift has 3 numbers, latents of shape \[4, 8, 8\] need one, 4"):
        LatentSpec((4, 8, 8), found.name, found.scale, found.shift[:3], ("a",))


def test_dc_ae_has_one_latent_for_an_image(tmp_path):
    name = save_dc(tmp_path / "dc")
    found = load_autoencoder(name, CPU)
    assert (found.channels, found.factor, found.scale, found.shift, found.random) == (4, 4, 0.41, 0.0, False)
    images = torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8)
    vae = AutoencoderDC.from_pretrained(name).eval()
    with torch.no_grad():
        latent = vae.encode(images / 127.5 - 1).latent
        decoded = to_uint8(vae.decode(latent).sample)
    mean, log_variance = found.encode(images, "fp32").chunk(2, dim=1)
    torch.testing.assert_close(mean, latent, rtol=1e-4, atol=1e-4)
    assert log_variance.max() < -20
    decode = load_decoder(LatentSpec((4, 4, 4), name, 0.41, 0.0, ("a",), found.fingerprint), CPU)
    assert (decode(0.41 * latent).int() - decoded.int()).abs().max() <= 1


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
