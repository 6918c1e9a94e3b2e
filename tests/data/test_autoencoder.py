import pytest
import torch
from diffusers import AutoencoderKL

from dcdit.data.autoencoder import load_decoder, to_uint8
from dcdit.errors import UserError


def test_uint8_maps_the_range_and_clips():
    images = torch.tensor([-2.0, -1.0, -1 + 1 / 127.5, 0.0, 1.0, 3.0])
    assert to_uint8(images).tolist() == [0, 0, 1, 128, 255, 255]


def test_identity_undoes_scale_and_shift():
    images = torch.rand(2, 1, 4, 4) * 2 - 1
    decode = load_decoder("identity", scale=0.5, shift=0.3, device=torch.device("cpu"))
    assert torch.equal(decode((images - 0.3) * 0.5), to_uint8(images))


def test_a_diffusers_autoencoder_is_loaded_by_path(tmp_path):
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()
    vae.save_pretrained(tmp_path)
    latents = torch.randn(5, 4, 4, 4)
    decode = load_decoder(str(tmp_path), scale=0.18215, shift=0.1, device=torch.device("cpu"), chunk=2)
    with torch.no_grad():
        expected = to_uint8(vae.decode(latents / 0.18215 + 0.1).sample)
    images = decode(latents)
    assert images.shape == (5, 3, 8, 8)
    assert (images.int() - expected.int()).abs().max() <= 1
    with pytest.raises(UserError, match=r"autoencoder=.*nowhere.*cannot be loaded"):
        load_decoder(str(tmp_path / "nowhere"), 1.0, 0.0, torch.device("cpu"))
