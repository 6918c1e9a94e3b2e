"""A DC-DiT, or a DiT, as a pipeline of diffusers: sampling at a budget, without dcdit.

Written by ``dcdit export``. The network's code is the one file in the folder ``transformer``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils.outputs import BaseOutput
from PIL import Image


@dataclass
class DCDiTPipelineOutput(BaseOutput):
    """Sampled images.

    Attributes:
        images: a list of PIL images, or an array (N, height, width, 1 or 3) or tensor (N, 1 or 3, height, width) of
            numbers in [0, 1], or latents (N, C, H, W).
        tflops: what each image took, over all steps and both branches of guidance.
    """

    images: Any
    tflops: list[float]


class DCDiTPipeline(DiffusionPipeline):
    """Class-conditional sampling at any budget that the network was trained for.

    Args:
        transformer: the network, with its latents and its diffusion process.
        vae: the autoencoder of its latents; None loads the one that ``config.json`` names when images are decoded.
    """

    transformer: Any
    vae: Any
    _optional_components = ["vae"]  # noqa: RUF012 - as diffusers has it

    def __init__(self, transformer: Any, vae: Any = None) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae)  # type: ignore[no-untyped-call]

    @property
    def classes(self) -> list[str]:
        """Names of the classes; a label is an index into them."""
        names: list[str] = self.transformer.config.classes
        return names

    @torch.no_grad()
    def __call__(
        self,
        classes: Sequence[int | str],
        num_images_per_class: int = 1,
        num_inference_steps: int = 250,
        guidance_scale: float = 1.0,
        drop_fraction: float = 0.0,
        uncond_drop_fraction: float | None = None,
        budget: float | None = None,
        sampler: str = "auto",
        seed: int = 0,
        generator: torch.Generator | None = None,
        batch_size: int = 64,
        sampler_options: dict[str, Any] | None = None,
        guidance_options: dict[str, Any] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Sample ``num_images_per_class`` images of each class, those of ``dcdit sample`` with the same values.

        Args:
            classes: labels or names of classes.
            num_images_per_class: images of each.
            num_inference_steps: steps of the sampler.
            guidance_scale: 1 is no guidance.
            drop_fraction: share of the kept tokens that is dropped.
            uncond_drop_fraction: the same for the guiding branch (Lite-CFG); None for the same.
            budget: instead of ``drop_fraction``, the share of the full cost that an image may take, such as 0.6; what
                meets it is found by sampling 16 images first.
            sampler: auto (ddpm or sde), or ddpm, ddim, dpm++ of DDPM, euler, heun, sde of flow matching.
            seed: of all noise; image i depends on it and on i alone, up to rounding.
            generator: draws the seed, if it is given.
            batch_size: images of a forward pass.
            sampler_options: more keys of ``sampler`` in dcdit, such as ``{"clip": True}``.
            guidance_options: more keys of ``guidance`` in dcdit, such as ``{"interval": [100, 700]}``.
            output_type: ``pil``, ``np``, ``pt`` or ``latent``.
            return_dict: return a :class:`DCDiTPipelineOutput`; False returns (images, tflops).

        Raises:
            ValueError: naming the value and the remedy.
        """
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type={output_type!r} is not one of pil, np, pt, latent")
        if generator is not None:
            seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
        labels = self.transformer.labels(classes, num_images_per_class)
        chosen = self.transformer.sampler(sampler, num_inference_steps, sampler_options or {})
        guidance = {
            "scale": guidance_scale,
            "drop_fraction": drop_fraction,
            "uncond_drop_fraction": uncond_drop_fraction,
            **(guidance_options or {}),
        }
        if output_type != "latent" and self.vae is None:
            vae = self.transformer.load_autoencoder()  # before the work of sampling
            self.register_modules(vae=vae)  # type: ignore[no-untyped-call]
        batches = -(-len(labels) // batch_size) if batch_size > 0 else 0
        with self.progress_bar(total=batches * len(chosen.timesteps)) as progress:
            batch = self.transformer.sample(labels, chosen, guidance, budget, seed, batch_size, progress.update)
        images = batch.latents
        if output_type != "latent":
            images = self.transformer.decode(images, self.vae)
            if output_type == "pil":
                images = [Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy()) for image in images]
            else:
                images = images.float() / 255
                images = images.permute(0, 2, 3, 1).numpy() if output_type == "np" else images
        tflops = (batch.flops / 1e12).tolist()
        return DCDiTPipelineOutput(images=images, tflops=tflops) if return_dict else (images, tflops)
