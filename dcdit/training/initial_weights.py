"""The weights that training starts from: fresh ones, those of a checkpoint, or the blocks of a plain DiT."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dcdit.checkpoints.load import Weights, describe_weights, read_weights
from dcdit.checkpoints.resolve import resolve_checkpoint
from dcdit.checks import shown
from dcdit.data.latents import LatentSpec
from dcdit.diffusion.process import Process
from dcdit.errors import UserError
from dcdit.network import Network, build_network
from dcdit.runtime.devices import fingerprint
from dcdit.runtime.processes import say
from dcdit.runtime.tensors import load_state_strict
from dcdit.training.distillation import Distillation
from dcdit.training.settings import FromScratch, FromWeights, InitSettings
from dcdit.training.transfer import check_architecture, check_latents, match_parameters
from dcdit.training.upcycling import weights_of_teacher

_NO_CLASS_NAMES = "the file does not name its classes: label i here is taken for label i there"


@dataclass(frozen=True)
class Start:
    """What training starts from.

    Attributes:
        checkpoint: as the user gave it, such as ``init.teacher=runs/dit``; empty from scratch.
        source: a description of what the checkpoint holds.
        fingerprint: digest of the network whose weights it holds.
        loaded, new, left: names of parameters that were taken over, that start anew, and that were not taken.
        frozen: parts that are not trained.
        note: what nobody could check.
        distillation: matches the hidden states of a teacher; None if nothing does.
    """

    checkpoint: str = ""
    source: str = ""
    fingerprint: str = ""
    loaded: tuple[str, ...] = ()
    new: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    note: str = ""
    distillation: Distillation | None = None

    @property
    def record(self) -> dict[str, str]:
        """What checkpoints say of it, without any path of this machine; empty from scratch."""
        return {"source": self.source, "fingerprint": self.fingerprint} if self.checkpoint else {}

    def describe(self) -> str:
        """Say what became of the parameters, part by part; name by name where it is not all of a part."""
        lines = [f"Starting from {self.checkpoint}, {self.source}: {len(self.loaded)} parameters taken over"]
        names = (*self.loaded, *self.new, *self.left)
        for title, chosen in (("new", self.new), ("left behind", self.left)):
            if chosen:
                others = [name for name in names if name not in chosen]
                lines.append(f"  {title}: {', '.join(_by_part(chosen, others))}")
        lines += [f"  not trained: {', '.join(self.frozen)}"] if self.frozen else []
        lines += [f"  {self.note}"] if self.note else []
        return "\n".join(lines)


def _by_part(names: Sequence[str], others: Sequence[str]) -> list[str]:
    """Shorten a list of parameters: those of a part that has no ``others`` become one entry with their number."""
    parts = [name.split(".")[0] for name in names]
    divided = {other.split(".")[0] for other in others}
    entries = [
        name if part in divided else f"{part} ({parts.count(part)})" for name, part in zip(names, parts, strict=True)
    ]
    return list(dict.fromkeys(entries))


def start_from(
    settings: InitSettings, network: Network, process: Process, latents: LatentSpec, runs: str, step: int
) -> Start:
    """Put the weights that training starts from into ``network``, and freeze what is not trained.

    Args:
        settings: where from.
        network: fresh, or about to be loaded from a checkpoint of this very run.
        process: that it is trained for.
        latents: what it is trained on.
        runs: folder of all runs.
        step: optimiser steps done; above 0 nothing is loaded but the teacher, while it is needed.

    Raises:
        UserError: naming tensor and both shapes, or key and both values, where something does not fit.
    """
    if isinstance(settings, FromScratch):
        return Start()
    freeze(network, settings.freeze)
    distillation = None
    if isinstance(settings, FromWeights):
        if step:
            return Start()
        checkpoint = resolve_checkpoint(settings.checkpoint, runs, "init.checkpoint")
        key, weights = checkpoint.argument, read_weights(checkpoint, settings.assume)
        check_latents(key, weights, latents, settings.adapt)
        sizes = check_architecture(key, weights, network, settings.adapt)
        source: Network = build_network(weights.model)
        state = dict(weights.of_kind(settings.weights))
        load_state_strict(source, state)
        transfer = match_parameters(key, network, state, settings.adapt, sizes)
    else:
        if step >= max(1, settings.distil_steps):
            return Start()
        checkpoint = resolve_checkpoint(settings.teacher, runs, "init.teacher")
        key, weights = checkpoint.argument, read_weights(checkpoint, settings.assume)
        source, transfer = teacher, _ = weights_of_teacher(settings, weights, key, network, latents)
        if settings.distil_steps and settings.distil_weight:
            distillation = Distillation(teacher, settings.distil_steps, settings.distil_weight, settings.distil_decay)
    _check_process(key, weights, process, matched=distillation is not None)
    if not step:
        with torch.no_grad():
            for name, parameter in network.state_dict().items():
                if name in transfer.loaded:
                    parameter.copy_(transfer.loaded[name])
    return Start(
        checkpoint=key,
        source=describe_weights(weights, source, settings.weights),
        fingerprint=fingerprint(source),
        loaded=tuple(transfer.loaded),
        new=tuple(transfer.new),
        left=tuple(transfer.left),
        frozen=tuple(settings.freeze),
        note="" if weights.has_class_names or "classes" in settings.adapt else _NO_CLASS_NAMES,
        distillation=distillation,
    )


def _check_process(key: str, weights: Weights, process: Process, matched: bool) -> None:
    """Compare the processes: say where they differ; raise if a teacher's hidden states would be of other noise."""
    before, now = weights.process.settings.name, process.settings.name
    if before == now:
        there, here = weights.process.spec, process.spec
        others = [f"diffusion.{name}={shown(there[name])}" for name in here if there[name] != here[name]]
        if others:
            say(f"{key} was trained with {', '.join(others)}")
        return
    if matched:
        raise UserError(
            f"{key} was trained with diffusion={before}, whose hidden states are of other noise than those of"
            f" diffusion={now}: take diffusion={before}, or init.distil_steps=0"
        )
    say(f"{key} was trained with diffusion={before}; with diffusion={now} the network has to learn another prediction")


def freeze(network: Network, parts: Sequence[str]) -> None:
    """Have the named parts of ``network`` keep their weights.

    Raises:
        UserError: if there is no such part, or nothing would be left to train.
    """
    known = network.parts()
    for name in parts:
        if name not in known:
            raise UserError(f"init.freeze={list(parts)}: {network.title} has no part {name}, but {', '.join(known)}")
        known[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise UserError(f"init.freeze={list(parts)} leaves nothing to train: leave a part out")
