"""The network of an exported folder as a component of a pipeline of diffusers, with all that sampling takes.

:mod:`dcdit.sampling.exported` writes this class and what it needs into one file of the folder: there it runs without
dcdit. It is tested to give the pixels of ``dcdit sample``.
"""

import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.auto_model import AutoModel
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from dcdit.checkpoints.load import Model
from dcdit.checks import HUB_ID, Count, Seed, build_named, call_checked, conform
from dcdit.data.autoencoder import autoencoder_of, identity_autoencoder
from dcdit.data.autoencoder_kinds import AUTOENCODER_KINDS
from dcdit.data.decoder import LatentDecoder
from dcdit.data.latents import IDENTITY, LatentSpec
from dcdit.diffusion.guidance import Guidance
from dcdit.diffusion.process import build_process
from dcdit.diffusion.samplers import Sampler, Step
from dcdit.diffusion.settings import PUBLISHED_PROCESS, SAMPLERS, BudgetSettings, GuidanceSettings
from dcdit.errors import UserError
from dcdit.network.dcdit import DCDiT
from dcdit.network.dit import DiT
from dcdit.network.execution import hold_products_in
from dcdit.network.pretrained import changed_code
from dcdit.runtime.files import content_digest
from dcdit.runtime.tensors import load_state_strict, read_tensors
from dcdit.sampling.budget import Calibration, calibrate
from dcdit.sampling.generate import SampleBatch, generate
from dcdit.sampling.guiding import check_guidance
from dcdit.sampling.labels import resolve_labels
from dcdit.sampling.settings import Classes


class ExportedModel(ModelMixin, ConfigMixin):
    """A network in evaluation mode, what its latents are, and the process that it was trained by.

    Args:
        model: network, latents and process.
        precision: ``fp32``, or ``bf16`` for products in bfloat16, as ``dcdit sample precision=bf16``.
    """

    config_name = "config.json"  # type: ignore[assignment]

    def __init__(self, model: Model, precision: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.network, self.latents, self.precision = model.network, model.latents, precision
        self._process, self._training = model.process, model.training
        self._calibrations: dict[str, Calibration] = {}
        self._decoder: tuple[Any, LatentDecoder] | None = None
        self.register_to_config(classes=list(model.latents.classes))  # type: ignore[no-untyped-call]

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str, torch_dtype: torch.dtype | None = None, **ignored: Any
    ) -> "ExportedModel":
        """Read ``config.json`` and ``model.safetensors`` beside the folder of this component; nothing in them is run.

        Args:
            pretrained_model_name_or_path: the component's folder.
            torch_dtype: float32 or bfloat16; None for float32. In bfloat16 the parts that training keeps in float32,
                such as the router, stay so.
            **ignored: what diffusers tells every component of a pipeline.

        Raises:
            UserError: if a file is damaged or changed, or the type is another one.
        """
        home = Path(pretrained_model_name_or_path).absolute().parent
        if torch_dtype not in (None, torch.float32, torch.bfloat16):
            raise UserError(f"dtype={torch_dtype}: this network runs in torch.float32 or torch.bfloat16")
        config = json.loads((home / "config.json").read_text(encoding="utf-8"))
        if config.pop("digest", None) != content_digest(config):
            raise UserError(f"{home / 'config.json'} is not as it was written: download or export it again")
        for name in changed_code(home, config):
            warnings.warn(f"{home / name} is not as dcdit exported it, and it is run: read it", stacklevel=2)
        network = build_named({"dcdit": DCDiT, "dit": DiT}, config["network"], "network").eval()
        load_state_strict(network, read_tensors(home / "model.safetensors", config["sha256"]))
        network.to(memory_format=torch.channels_last)  # as dcdit has it: the same kernels, the same bits
        if torch_dtype == torch.bfloat16:
            hold_products_in(network, torch.bfloat16)
        latents = LatentSpec.from_plain(config["latents"], "latents")
        training = config["training"]
        model = Model(
            network, latents, config["step"], build_process(training.get("diffusion", PUBLISHED_PROCESS)), training
        )
        return cls(model, "bf16" if torch_dtype == torch.bfloat16 else "fp32")

    def save_pretrained(self, save_directory: str, **ignored: Any) -> None:  # type: ignore[override]
        """Refuse: the code that loads the network would be missing there."""
        raise UserError(f"{save_directory}: copy the folder that the pipeline came from, it holds the code as well")

    def to(self, *arguments: Any, **options: Any) -> "ExportedModel":  # type: ignore[override]
        """Move to a device; :class:`UserError` for another type of numbers, which loading chooses."""
        for value in (*arguments, *options.values()):
            if isinstance(value, torch.dtype):
                raise UserError(f"dtype={value}: choose it in from_pretrained, which keeps the router in float32")
        super().to(*arguments, **options)
        return self

    def labels(self, classes: Sequence[int | str], per_class: int) -> Tensor:
        """The labels (N,) of ``per_class`` images of each class, given as labels or names; UserError if unknown."""
        classes = conform("classes", classes if isinstance(classes, str) else list(classes), Classes)
        return resolve_labels(classes, self.latents.classes, conform("num_images_per_class", per_class, Count))

    def sampler(self, name: str, steps: int, options: Mapping[str, Any]) -> Sampler:
        """The sampler ``name`` of this network's process; :class:`UserError` if it does not fit."""
        settings = build_named(SAMPLERS, {"name": name, "steps": steps, **options}, "sampler")
        sampler = settings.for_process(self._process.settings)
        if sampler.cache and not self.network.caches:
            raise UserError(f"sampler.cache={sampler.cache:g}: {self.network.title} computes every step: leave it out")
        return Sampler(sampler)

    def sample(
        self,
        labels: Tensor,
        sampler: Sampler,
        guidance: Mapping[str, Any],
        budget: float | None,
        seed: int,
        batch_size: int,
        on_step: Callable[[], object],
    ) -> SampleBatch:
        """Sample latents (N, C, H, W) of the ``labels`` (N,); image i depends on the seed and on i, up to rounding.

        Args:
            labels: classes of the images.
            sampler: of :meth:`sampler`.
            guidance: values of :class:`GuidanceSettings`.
            budget: the share of the full cost that an image may take; None for what ``guidance`` says.
            seed: of all noise.
            batch_size: images of a forward pass.
            on_step: called after every step of a batch.
        """
        seed, batch_size = conform("seed", seed, Seed), conform("batch_size", batch_size, Count)
        model = Model(self.network, self.latents, None, self._process.to(self.device), self._training)
        settings = call_checked(GuidanceSettings, guidance, "guidance")
        if settings.weak_checkpoint is not None:
            raise UserError("weak_checkpoint: a second network needs dcdit: dcdit sample guidance.weak_checkpoint=...")
        check_guidance(model, settings)
        guided = Guidance(self.network, self.network.null_class, settings)
        if budget is not None:
            if settings.drop_fraction or settings.drop_schedule is not None:
                raise UserError("budget: drop_fraction and drop_schedule are what it replaces, leave them out")
            met = self._calibrated(model, guided, sampler, budget, batch_size)
            sampler, guided = met.sampler(sampler.settings), replace(guided, settings=met.guidance(settings))

        def note(numbers: list[int], step: Step) -> None:
            on_step()

        what, how = (model, guided, sampler, labels, range(len(labels))), self.precision
        batches = list(generate(*what, seed=seed, batch_size=batch_size, precision=how, on_step=note))
        return SampleBatch(
            [number for batch in batches for number in batch.indices],
            torch.cat([batch.latents for batch in batches]),
            [],
            torch.cat([batch.step_flops for batch in batches], dim=1),
        )

    def _calibrated(
        self, model: Model, guidance: Guidance, sampler: Sampler, fraction: float, batch_size: int
    ) -> Calibration:
        """The drop fraction and the threshold that meet a share of the full cost, found once by sampling 16 images."""
        budget = call_checked(BudgetSettings, {"fraction": fraction}, "budget")
        key = repr((budget, guidance.settings, sampler.settings, self.precision))
        if key not in self._calibrations:
            self._calibrations[key] = calibrate(model, guidance, sampler, budget, batch_size, self.precision)
        return self._calibrations[key]

    def load_autoencoder(self) -> Any:
        """The autoencoder that the latents were made by, as the configuration names it; None for images themselves.

        Raises:
            UserError: if it was a folder of the machine that trained the network.
        """
        name = self.latents.autoencoder
        if name == IDENTITY:
            return None
        if not Path(name).is_dir() and not re.fullmatch(HUB_ID, name):
            raise UserError(
                f"the latents are those of the autoencoder in {name}, which is not here: pass it as vae=..."
            )
        return AutoModel.from_pretrained(name, use_safetensors=True).to(self.device).eval()

    def decode(self, latents: Tensor, vae: Any) -> Tensor:
        """Images (N, 1 or 3, height, width) uint8 of latents (N, C, H, W).

        Args:
            latents: as the network sees them.
            vae: the autoencoder, in float32; None for latents that are images.

        Raises:
            UserError: if it is of a kind that dcdit does not know, cannot decode these latents, or gives no finite
                images.
        """
        if self._decoder is None or self._decoder[0] is not vae:
            self._decoder = vae, self._decoder_of(vae)
        return self._decoder[1](latents)

    def _decoder_of(self, vae: Any) -> LatentDecoder:
        if vae is None:
            return LatentDecoder(identity_autoencoder(), self.latents, "round")
        kind = AUTOENCODER_KINDS.get(type(vae).__name__)
        if kind is None or vae.dtype != torch.float32:
            known = ", ".join(AUTOENCODER_KINDS)
            raise UserError(f"vae={type(vae).__name__} in {vae.dtype}: take one of {known}, in torch.float32")
        if not kind.frames:
            vae.to(memory_format=torch.channels_last)  # as dcdit has it
        autoencoder = autoencoder_of(self.latents.autoencoder, kind, vae.config, vae)
        given, made = autoencoder.fingerprint, self.latents.fingerprint
        if autoencoder.channels != self.latents.shape[0] or (autoencoder.distilled and given != made):
            raise UserError(
                f"vae={type(vae).__name__}: take the autoencoder of the latents, {self.latents.autoencoder}"
            )
        if made not in (None, given):
            warnings.warn(f"the latents are those of an autoencoder with weights {made}, not {given}", stacklevel=2)
        return LatentDecoder(autoencoder, self.latents, "round")
