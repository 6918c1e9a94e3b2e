"""Checkpoints in the forms of other programs, with random or with the reference's numbers."""

import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.configs import perturb
from torch import Tensor

from dcdit.network import DiT

MINI = Path(__file__).parents[1] / "golden" / "mini"


def mini_state() -> dict[str, Tensor]:
    """The reference's parameters of the ``mini`` network: 8 x 8, 4 channels, 4 classes, 4 heads."""
    return {name: tensor.float() for name, tensor in load_file(MINI / "state.safetensors").items()}


def write_reference(path: Path, state: dict[str, Tensor] | None = None) -> Path:
    """A checkpoint in the reference's form: a pickled configuration of a foreign class, and all that it holds."""
    module = types.ModuleType("their_package")
    exec("class Config:\n    def __init__(self): self.depth = 3", module.__dict__)
    module.Config.__module__ = "their_package"
    state = mini_state() if state is None else state
    raw = {name: tensor + 1 if name != "pos_embed" else tensor for name, tensor in state.items()}
    moments = {0: {"step": torch.tensor(700.0), "exp_avg": torch.zeros(2)}}
    values = {"model": raw, "ema": state, "opt": {"state": moments}, "config": {"arch": module.Config()}}
    path.parent.mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "their_package", module)
        torch.save(values, path)
    return path


def small_dit(**changes) -> DiT:
    """A plain DiT, none of whose parameters is zero."""
    torch.manual_seed(0)
    sizes = {"grid": 8, "channels": 4, "num_classes": 10, "width": 64, "depth": 3, "heads": 4, "patch": 2}
    network = DiT(**{**sizes, **changes}).eval()
    perturb(network)
    return network


def diffusers_dit(**changes):
    """diffusers' DiT with random weights, and one embedder for all blocks, as published ones have."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    sizes = {"num_attention_heads": 4, "attention_head_dim": 16, "in_channels": 4, "out_channels": 8, "num_layers": 3}
    model = DiTTransformer2DModel(**{**sizes, "sample_size": 8, "num_embeds_ada_norm": 10, **changes}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    state = model.state_dict()
    for name in state:
        if ".norm1.emb." in name:
            state[name] = state["transformer_blocks.0." + name.split(".", 2)[2]]
    model.load_state_dict(state)
    return model


def save_kl(path, **values):
    """A small AutoencoderKL with random weights."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return save_autoencoder(path, "AutoencoderKL", block_out_channels=(8, 8), norm_num_groups=4, **blocks, **values)


def save_dc(path):
    """A small AutoencoderDC with random weights."""
    stages = {}
    for half in ("encoder", "decoder"):
        stages |= {f"{half}_block_types": ("ResBlock",) * 3, f"{half}_block_out_channels": (8, 8, 16)}
        stages |= {f"{half}_layers_per_block": (1, 1, 1), f"{half}_qkv_multiscales": ((), (), ())}
    values = {"latent_channels": 4, "attention_head_dim": 4, "scaling_factor": 0.41}
    return save_autoencoder(path, "AutoencoderDC", **values, **stages)


def save_autoencoder(path, name: str, **values):
    """An autoencoder of diffusers with random weights, and random statistics where it has a batch norm."""
    import diffusers

    torch.manual_seed(0)
    model = getattr(diffusers, name)(**values)
    if hasattr(model, "bn"):
        model.bn.running_mean.normal_()
        model.bn.running_var.uniform_(0.5, 2)
    model.save_pretrained(path)
    return str(path)


def save_tiny(path, **values):
    """A small AutoencoderTiny with random weights."""
    halves = ("encoder", "decoder")
    stages = {f"{half}_block_out_channels": (8, 8) for half in halves} | {
        f"num_{half}_blocks": (1, 1) for half in halves
    }
    return save_autoencoder(path, "AutoencoderTiny", **stages, **values)


def save_flux2(path, **values):
    """A small AutoencoderKLFlux2 with random weights."""
    values = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2, **values}
    sizes = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 2}
    return save_autoencoder(path, "AutoencoderKLFlux2", **{**sizes, **values})


def save_video(path, name: str = "AutoencoderKLQwenImage"):
    """A small autoencoder of videos with random weights."""
    statistics = {"latents_mean": [0.1, -0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 0.5, 4.0]}
    sizes = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2], "num_res_blocks": 1, "temperal_downsample": [True]}
    return save_autoencoder(path, name, **sizes, **statistics)


def save_wan(path):
    """A small AutoencoderKLWan with random weights."""
    return save_video(path, "AutoencoderKLWan")


def save_rae(path, encoder_type: str = "dinov2", **values):
    """A small AutoencoderRAE of images of 32 pixels with random weights."""
    pytest.importorskip("transformers")
    encoder = {"encoder_hidden_size": 64, "encoder_patch_size": 4, "encoder_num_hidden_layers": 1}
    decoder = {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    sizes = {"encoder_input_size": 16, "patch_size": 8, "decoder_intermediate_size": 32, **encoder, **decoder}
    statistics = {"latents_mean": torch.randn(64, 4, 4), "latents_std": torch.rand(64, 4, 4) + 0.5}
    return save_autoencoder(path, "AutoencoderRAE", encoder_type=encoder_type, **{**sizes, **statistics, **values})


AUTOENCODERS = {
    "AutoencoderKL": save_kl,
    "AutoencoderKLFlux2": save_flux2,
    "AutoencoderDC": save_dc,
    "AutoencoderTiny": save_tiny,
    "AutoencoderRAE": save_rae,
    "AutoencoderKLQwenImage": save_video,
    "AutoencoderKLWan": save_wan,
}
"""Functions that save a small autoencoder of each class that is understood."""
