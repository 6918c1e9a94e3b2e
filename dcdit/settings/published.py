"""The published scales, from the one place that states them: ``configs/model``."""

from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

_PACKAGE = Path(__file__).parents[1]
CONFIG_DIR = str(_PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs")
"""The configuration tree: inside an installed package, or at the top of the repository."""

SCALES = ("s", "b", "l", "xl")

AUTOENCODER, LATENT_SCALE = "stabilityai/sd-vae-ft-ema", 0.18215
"""Of all published weights of DC-DiT and DiT, whose files do not say it."""


@cache
def published_scales() -> dict[str, dict[str, Any]]:
    """Width, depth and heads of DC-DiT by scale."""
    folder = Path(CONFIG_DIR, "model")
    configs: dict[str, Any] = {scale: OmegaConf.load(folder / f"dcdit_{scale}.yaml") for scale in SCALES}
    return {scale: {key: values.get(key) for key in ("width", "depth", "heads")} for scale, values in configs.items()}
