"""Sample from a checkpoint: ``python -m dcdit.sample checkpoint=runs/digits/checkpoints/last.ckpt``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from dcdit.cli import CONFIG_DIR, entry_point
from dcdit.config import call_checked
from dcdit.data.autoencoder import Decoder, load_decoder
from dcdit.diffusion.guidance import Guidance, RoutingLike
from dcdit.diffusion.sampling import Sampler, Step, sample_generator
from dcdit.errors import UserError
from dcdit.interop import read_checkpoint
from dcdit.pictures import Snapshot, save_boundaries, save_grid
from dcdit.registry import build_network
from dcdit.runtime import autocast, keep_freed_memory, pick_device

_PREFIX = "network."


@dataclass(frozen=True)
class Model:
    """A trained network and what its latents are.

    Attributes:
        network: in evaluation mode.
        latents: shape, autoencoder, scale, shift and class names.
        step: optimiser steps trained.
    """

    network: nn.Module
    latents: dict[str, Any]
    step: int


@dataclass(frozen=True)
class Request:
    """What to sample.

    Attributes:
        checkpoint: a checkpoint that ``dcdit.train`` wrote.
        out: folder for the results; None takes ``samples`` beside the checkpoint's folder.
        classes: labels or class names; None takes the first ten.
        per_class: samples of each class.
        seed: with a sample's number, the only source of randomness.
        batch_size: samples per forward pass; changes the speed, and the images by no more than rounding.
        weights: ``ema`` or ``raw``.
        device: ``auto`` or a torch device.
        precision: ``fp32``, ``bf16``, or ``auto``: bf16 on a GPU, fp32 elsewhere.
        autoencoder: decode with this one; None takes the one that the checkpoint names.
        snapshots: columns of ``boundaries.png``; 0 leaves the picture out.
    """

    checkpoint: str
    out: str | None = None
    classes: list[Any] | None = None
    per_class: int = 4
    seed: int = 0
    batch_size: int = 64
    weights: str = "ema"
    device: str = "auto"
    precision: str = "auto"
    autoencoder: str | None = None
    snapshots: int = 8

    def __post_init__(self) -> None:
        for name, choices in (("weights", ("ema", "raw")), ("precision", ("auto", "fp32", "bf16"))):
            if getattr(self, name) not in choices:
                raise UserError(f"{name}={getattr(self, name)!r} is not one of {', '.join(choices)}")
        for name, least in (("per_class", 1), ("batch_size", 1), ("snapshots", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)} is below {least}")


@dataclass(frozen=True)
class Result:
    """What sampling returned.

    Attributes:
        latents: (N, C, H, W) float32 on the CPU, network-side scale.
        labels: (N,) int64.
        kept: mean kept share over all steps and samples, drop included; None without a router.
        snapshots: pictures over the timesteps, for each sample that was asked for.
    """

    latents: Tensor
    labels: Tensor
    kept: float | None
    snapshots: list[list[Snapshot]]


def load_model(path: str, weights: str = "ema", device: torch.device | str = "cpu") -> Model:
    """Rebuild a trained network from its checkpoint alone; nothing in the file is executed.

    Raises:
        UserError: if the file is missing or is no checkpoint of ``dcdit.train``.
    """
    checkpoint = read_checkpoint(path)
    try:
        settings = checkpoint["hyper_parameters"]
        # Without averaging, state_dict holds the raw weights and there is no second set.
        state = checkpoint.get("current_model_state") if weights == "raw" else None
        state = state or checkpoint["state_dict"]
        network = build_network(settings["model"])
        latents, step = settings["latents"], checkpoint["global_step"]
    except (KeyError, TypeError) as error:
        raise UserError(f"checkpoint={path} was not written by dcdit.train: it lacks {error}") from None
    network.load_state_dict({k.removeprefix(_PREFIX): v for k, v in state.items() if k.startswith(_PREFIX)})
    return Model(network.to(device).eval(), latents, step)


def resolve_labels(request: Request, names: list[str]) -> Tensor:
    """Labels (N,) of all requested samples, class by class; UserError for a class the checkpoint does not know."""
    labels = []
    for wanted in request.classes if request.classes is not None else range(min(10, len(names))):
        if str(wanted) in names:
            labels.append(names.index(str(wanted)))
        elif isinstance(wanted, int) and 0 <= wanted < len(names):
            labels.append(wanted)
        else:
            raise UserError(f"classes: {wanted!r} is neither a class name nor a label in 0..{len(names) - 1}")
    if not labels:
        raise UserError("classes=[] asks for nothing: name at least one class")
    return torch.tensor(labels).repeat_interleave(request.per_class)


def sample(
    model: Model,
    guidance: Guidance,
    sampler: Sampler,
    labels: Tensor,
    request: Request,
    decode: Decoder,
    shown: list[int],
) -> Result:
    """Sample ``labels`` in batches; sample i depends on (seed, i) only.

    Args:
        model, guidance, sampler: what computes.
        labels: (N,) labels.
        request: seed, batch size, precision.
        decode: for the snapshots.
        shown: numbers of the samples to take snapshots of.
    """
    device = next(model.network.parameters()).device
    precision = request.precision
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    channels, height, width = model.latents["shape"]
    wanted = set(np.linspace(0, sampler.steps - 1, request.snapshots).round().astype(int).tolist())
    latents: list[Tensor] = []
    shares: list[Tensor] = []
    snapshots: dict[int, list[Snapshot]] = {number: [] for number in shown}
    batches = torch.arange(len(labels)).split(request.batch_size)
    with Progress(console=Console(stderr=True)) as progress, torch.no_grad(), autocast(precision, device):
        task = progress.add_task("sampling", total=len(batches) * sampler.steps)
        for rows in batches:
            streams = [sample_generator(request.seed, int(row)) for row in rows]
            x = torch.empty(0)
            for step in sampler.trajectory(guidance, (channels, height, width), labels[rows].to(device), streams):
                x, routing = step.next, step.output.routing
                if routing is not None:
                    shares.append(routing.mask.float().mean())
                    if step.index in wanted:
                        for place, number in enumerate(rows.tolist()):
                            if number in snapshots:
                                snapshots[number].append(take_snapshot(step, place, routing, decode))
                progress.advance(task)
            latents.append(x.float().cpu())
    kept = float(torch.stack(shares).mean()) if shares else None
    return Result(torch.cat(latents), labels, kept, list(snapshots.values()) if shares else [])


def take_snapshot(step: Step, place: int, routing: RoutingLike, decode: Decoder) -> Snapshot:
    """Picture of the sample at ``place`` in the batch before ``step``."""
    image = decode(step.x[place : place + 1])[0]
    prob, mask = (x[place].view(step.x.shape[2:]).cpu() for x in (routing.prob, routing.mask))
    return Snapshot(step.timestep, image.permute(1, 2, 0).cpu(), prob, mask)


def run(config: DictConfig) -> Path:
    """Sample what ``config`` asks for, write latents and pictures, and return their folder."""
    values: Any = OmegaConf.to_container(config, resolve=True)
    sampler = call_checked(Sampler, values.pop("sampler"), "sampler")
    guided = values.pop("guidance")
    request = call_checked(Request, values, "")
    keep_freed_memory()
    model = load_model(request.checkpoint, request.weights, pick_device(request.device))
    names = [str(name) for name in model.latents["classes"]]
    labels = resolve_labels(request, names)
    guidance = call_checked(Guidance, guided, "guidance", {"denoiser": model.network, "null_class": len(names)})
    device = next(model.network.parameters()).device
    decode = load_decoder(model.latents, device, request.autoencoder)
    shown = list(range(0, len(labels), request.per_class))[:4]  # the first of each class
    result = sample(model, guidance, sampler, labels, request, decode, shown)

    out = Path(request.out) if request.out else Path(request.checkpoint).resolve().parent.parent / "samples"
    out.mkdir(parents=True, exist_ok=True)
    np.savez(out / "latents.npz", latents=result.latents.numpy(), labels=labels.numpy())
    save_grid(decode(result.latents), request.per_class, out / "samples.png")
    if request.snapshots and result.snapshots:
        titles = [names[int(labels[number])] for number in shown]
        save_boundaries(result.snapshots, titles, out / "boundaries.png")
    kept = "" if result.kept is None else f", {result.kept:.1%} of the tokens kept"
    print(f"{len(labels)} samples of step {model.step}{kept}: {out}")
    return out


@hydra.main(version_base="1.3", config_path=CONFIG_DIR, config_name="sample")
def main(config: DictConfig) -> None:
    """Hydra entry point."""
    run(config)


if __name__ == "__main__":
    entry_point(main)
