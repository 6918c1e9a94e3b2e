"""What all commands that draw images from a checkpoint share: settings, checks, and the budget."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from dcdit.checkpoints.load import Model, load_model
from dcdit.data.autoencoder import LatentDecoder, load_decoder
from dcdit.diffusion.guidance import Guidance
from dcdit.diffusion.samplers import Sampler
from dcdit.diffusion.schedule import TRAIN_STEPS
from dcdit.errors import UserError
from dcdit.network import DCDiT
from dcdit.network.blocks import execute
from dcdit.runtime.devices import fingerprint, pick_device
from dcdit.runtime.memory import keep_freed_memory
from dcdit.sampling.budget import Calibration, Target, calibrate, remembered
from dcdit.sampling.generate import Drawn, OnStep, generate
from dcdit.settings.schema import call_checked


@dataclass(frozen=True)
class Common:
    """Settings of every such command.

    Attributes:
        checkpoint: a checkpoint that ``dcdit.train`` wrote.
        weights: ``ema`` or ``raw``.
        seed: with a sample's number, the only source of randomness.
        batch_size: samples per forward pass; changes the speed, and the images by no more than rounding.
        device: ``auto`` or a torch device.
        precision: ``fp32``, ``bf16``, or ``auto``: bf16 on a GPU, fp32 elsewhere.
        autoencoder: decode with this one; None takes the one that the checkpoint names.
        compile: fuse the element-wise operations of the blocks.
    """

    checkpoint: str
    weights: str = "ema"
    seed: int = 0
    batch_size: int = 64
    device: str = "auto"
    precision: str = "auto"
    autoencoder: str | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        for name, choices in (("weights", ("ema", "raw")), ("precision", ("auto", "fp32", "bf16"))):
            if getattr(self, name) not in choices:
                raise UserError(f"{name}={getattr(self, name)!r} is not one of {', '.join(choices)}")
        if self.batch_size < 1:
            raise UserError(f"batch_size={self.batch_size} is below 1")
        if self.seed < 0:
            raise UserError(f"seed={self.seed} is negative")


@dataclass(frozen=True)
class Drawing:
    """Everything that is needed to draw images.

    Attributes:
        common: settings.
        model, guidance, sampler: what computes.
        decode: latents to images.
        precision: ``fp32`` or ``bf16``.
        calibration: how the drop fraction was found; None if it was given.
    """

    common: Common
    model: Model
    guidance: Guidance
    sampler: Sampler
    decode: LatentDecoder
    precision: str
    calibration: Calibration | None

    def generate(self, labels: Tensor, indices: Sequence[int], on_step: OnStep | None = None) -> Iterator[Drawn]:
        """Draw the samples ``indices`` of those that ``labels`` (N,) lists."""
        return generate(
            self.model,
            self.guidance,
            self.sampler,
            labels,
            indices,
            seed=self.common.seed,
            batch_size=self.common.batch_size,
            precision=self.precision,
            on_step=on_step,
        )

    def described(self) -> dict[str, Any]:
        """What figures must stand beside, as plain values."""
        guidance = {key: value for key, value in asdict_of(self.guidance).items() if key != "null_class"}
        return {
            "step": self.model.step,
            "weights": self.common.weights,
            "seed": self.common.seed,
            "precision": self.precision,
            "sampler": asdict(self.sampler),
            "guidance": guidance,
            "autoencoder": self.decode.identity,
        }


def asdict_of(guidance: Guidance) -> dict[str, Any]:
    """The plain values of a guidance, without the network that it wraps."""
    return {column.name: getattr(guidance, column.name) for column in fields(guidance) if column.name != "denoiser"}


def own_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """What in a composed configuration is not about drawing, but the command's own."""
    shared = {"sampler", "guidance", "budget", *(column.name for column in fields(Common))}
    return {key: value for key, value in values.items() if key not in shared}


def prepare(values: Mapping[str, Any]) -> Drawing:
    """Check and load what a composed configuration says about drawing.

    Raises:
        UserError: naming key, value and remedy.
    """
    sampler = call_checked(Sampler, values["sampler"], "sampler")
    target = call_checked(Target, values["budget"], "budget")
    own = own_values(values)
    settings = {key: values[key] for key in values if key not in {"sampler", "guidance", "budget", *own}}
    common = call_checked(Common, settings, "")
    keep_freed_memory()
    model = load_model(common.checkpoint, common.weights, pick_device(common.device))
    execute(model.network, compiled=common.compile)
    built = {"denoiser": model.network, "null_class": len(model.classes)}
    guidance = call_checked(Guidance, values["guidance"], "guidance", built)
    check_guidance(model, guidance)
    precision = common.precision
    if precision == "auto":
        precision = "bf16" if model.device.type == "cuda" else "fp32"
    decode = load_decoder(model.latents, model.device, common.autoencoder)
    calibration = None
    if target.given:
        question = {**asdict(target), **asdict(sampler), **asdict_of(guidance)}
        question |= {"network": fingerprint(model.network), "precision": precision}
        calibration = remembered(
            Path(common.checkpoint),
            question,
            lambda: calibrate(model, guidance, sampler, target, common.batch_size, precision),
        )
        guidance = replace(guidance, drop_fraction=calibration.drop_fraction)
        print(
            f"Budget: drop fraction {calibration.drop_fraction} costs {calibration.tflops:.4g} TFLOPs per image,"
            f" {calibration.tflops / calibration.full_tflops:.1%} of {calibration.full_tflops:.4g}"
        )
    return Drawing(common, model, guidance, sampler, decode, precision, calibration)


def check_guidance(model: Model, guidance: Guidance) -> None:
    """Raise :class:`UserError` where the network cannot do what ``guidance`` asks of it."""
    if guidance.scale != 1 and model.network.condition.label.dropout == 0:  # type: ignore[union-attr]
        raise UserError(
            f"guidance.scale={guidance.scale}: this network was trained with model.label_dropout=0, so its null class"
            " means nothing; take scale 1, or train with 0.1"
        )
    drops = [drop for timestep in (0, TRAIN_STEPS - 1) for drop in guidance.drop_at(timestep)]
    if not isinstance(model.network, DCDiT) and any(drops):
        raise UserError(f"drop fraction {max(drops):g}: a plain DiT drops no tokens, take 0, or a dcdit model")
