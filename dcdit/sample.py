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
from torch import Tensor

from dcdit.compute.flops import Cost
from dcdit.diffusion.samplers import Step
from dcdit.errors import UserError
from dcdit.network import DCDiT
from dcdit.sampling.figures import Snapshots, save_boundaries, save_grid
from dcdit.sampling.setup import own_values, prepare
from dcdit.settings.entry import CONFIG_DIR, entry_point
from dcdit.settings.schema import call_checked


@dataclass(frozen=True)
class Request:
    """What to sample.

    Attributes:
        out: folder for the results; None takes ``samples`` beside the checkpoint's folder.
        classes: labels or class names; None takes the first ten.
        per_class: samples of each class.
        snapshots: columns of ``boundaries.png``; 0 leaves the picture out.
    """

    out: str | None = None
    classes: list[Any] | None = None
    per_class: int = 4
    snapshots: int = 8

    def __post_init__(self) -> None:
        for name, least in (("per_class", 1), ("snapshots", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)} is below {least}")


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


def run(config: DictConfig) -> Path:
    """Sample what ``config`` asks for, write latents and pictures, and return their folder."""
    values: Any = OmegaConf.to_container(config, resolve=True)
    request = call_checked(Request, own_values(values), "")
    drawing = prepare(values)
    model, steps = drawing.model, drawing.sampler.steps
    labels = resolve_labels(request, model.classes)
    shown = list(range(0, len(labels), request.per_class))[:4]  # the first of each class
    snapshots = Snapshots(shown, request.snapshots, steps, drawing.decode)
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("sampling", total=-(-len(labels) // drawing.common.batch_size) * steps)

        def on_step(numbers: list[int], step: Step) -> None:
            snapshots.take(numbers, step)
            progress.advance(task)

        drawn = list(drawing.generate(labels, range(len(labels)), on_step))

    latents = torch.cat([batch.latents for batch in drawn])
    checkpoint = Path(drawing.common.checkpoint)
    out = Path(request.out) if request.out else checkpoint.resolve().parent.parent / "samples"
    out.mkdir(parents=True, exist_ok=True)
    np.savez(out / "latents.npz", latents=latents.numpy(), labels=labels.numpy())
    save_grid(drawing.decode(latents), request.per_class, out / "samples.png")
    routed = isinstance(model.network, DCDiT)
    if request.snapshots and routed:
        titles = [model.classes[int(labels[number])] for number in shown]
        save_boundaries(list(snapshots.rows.values()), titles, out / "boundaries.png")
    cost = Cost.of_network(model.network)
    words = f", {torch.cat([batch.flops(cost) for batch in drawn]).mean() / 1e12:.3g} TFLOPs per image"
    if routed:
        lengths = torch.cat([part for batch in drawn for part in batch.lengths]).double()
        words += f", {lengths.mean() / latents[0, 0].numel():.1%} of the tokens kept"
    print(f"{len(labels)} samples of step {model.step}{words}: {out}")
    return out


@hydra.main(version_base="1.3", config_path=CONFIG_DIR, config_name="sample")
def main(config: DictConfig) -> None:
    """Hydra entry point."""
    run(config)


if __name__ == "__main__":
    entry_point(main)
