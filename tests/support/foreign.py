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
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, **blocks, **values).save_pretrained(path)
    return str(path)


def save_dc(path):
    """A small AutoencoderDC with random weights."""
    from diffusers import AutoencoderDC

    torch.manual_seed(0)
    stages = {}
    for half in ("encoder", "decoder"):
        stages |= {f"{half}_block_types": ("ResBlock",) * 3, f"{half}_block_out_channels": (8, 8, 16)}
        stages |= {f"{half}_layers_per_block": (1, 1, 1), f"{half}_qkv_multiscales": ((), (), ())}
    AutoencoderDC(latent_channels=4, attention_head_dim=4, scaling_factor=0.41, **stages).save_pretrained(path)
    return str(path)
