import os
import signal
from functools import cache
from pathlib import Path

# Before torch is loaded: threads that spin while they wait make tiny runs many times slower beside any other job.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Started in the background of a script, tests and what they start would be deaf to interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from dcdit.cli import CONFIG_DIR, register_resolvers

register_resolvers()

TINY = (
    "experiment=digits",
    "model.width=32",
    "model.depth=1",
    "model.encoder_width=16",
    "model.grid=8",
    "data.batch_size=8",
    "budget.warmup=2",
    "trainer.log_every_n_steps=1",
    "callbacks.progress=null",
)
"""Overrides for a digits run of a second or two."""


PLAIN_DIT = (
    *(f"~model.{key}" for key in ("encoder_width", "groups", "router", "smoothing_sigma", "init")),
    "model.name=dit",
    "+model.patch=2",
    "budget=none",
)
"""Overrides that make a plain DiT of it."""


def compose_config(*overrides: str, name: str = "train") -> DictConfig:
    with initialize_config_dir(CONFIG_DIR, version_base="1.3"):
        return compose(name, overrides=list(overrides))


def golden_folders() -> dict[str, Path]:
    """The reference's numbers: ``mini`` lies here, ``dev`` where DCDIT_GOLDEN points, if it does."""
    folders = {"mini": Path(__file__).parent / "golden" / "mini"}
    dev = Path(os.environ.get("DCDIT_GOLDEN", "")) / "dev"
    if "DCDIT_GOLDEN" in os.environ and dev.is_dir():
        folders["dev"] = dev
    return folders


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 8 x 8 digits."""
    from dcdit.data.sources import Digits

    directory = tmp_path_factory.mktemp("digits")
    Digits(grid=8).write(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small autoencoder of diffusers with random weights: 4 channels, factor 4, scale 0.5, shift 0.25."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        scaling_factor=0.5,
        shift_factor=0.25,
    )
    path = tmp_path_factory.mktemp("vae")
    vae.save_pretrained(path)
    return path


@pytest.fixture
def tiny(digits: Path, tmp_path: Path):
    """Run a tiny digits training in a directory; returns the run directory."""
    from dcdit.train import train

    def run(name: str, *overrides: str) -> Path:
        run_dir = tmp_path / name
        run_dir.mkdir(exist_ok=True)
        train(compose_config(*TINY, f"data.directory={digits}", *overrides), run_dir)
        return run_dir

    return run


def perturb(module: torch.nn.Module, seed: int = 0) -> None:
    """Move every parameter off its initial value, zero-initialised ones above all."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


@cache
def digit_features(count: int = 1000):
    """Features of real digits, and of other ones under noise."""
    from dcdit.data.autoencoder import to_uint8
    from dcdit.data.sources import Digits
    from dcdit.evaluation.features import Digits as Classifier

    images, _ = Digits(grid=8).images()
    noise = 0.3 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    network = Classifier()
    return network(to_uint8(images[:count])), network(to_uint8((images + noise)[-count:]))
