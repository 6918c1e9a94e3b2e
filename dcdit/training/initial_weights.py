"""The weights that training starts from: fresh ones, or those of a checkpoint."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dcdit.checkpoints.load import Model, Weights, describe_weights, read_weights, was_trained_without_backbone
from dcdit.checkpoints.resolve import resolve_checkpoint
from dcdit.checkpoints.settings import AssumeSettings
from dcdit.checks import shown
from dcdit.diffusion.process import Process
from dcdit.errors import UserError
from dcdit.network import Network, build_network
from dcdit.runtime.devices import fingerprint
from dcdit.runtime.processes import say
from dcdit.runtime.tensors import load_state_strict
from dcdit.training.distillation import Distillation
from dcdit.training.settings import FromScratch, FromTeacher, FromWeights
from dcdit.training.transfer import Transfer, check_architecture, check_latents, match_parameters

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

    def record_after(self, before: Mapping[str, str] | None) -> dict[str, str]:
        """The record of a run that was started from what ``before`` says; UserError if that was something else."""
        if before and self.checkpoint and before.get("fingerprint") != self.fingerprint:
            raise UserError(
                f"init: the run was started from {before.get('source')}, weights {before.get('fingerprint')}; now it is"
                f" {self.source}, weights {self.fingerprint}. Name the same, or start another run with run_name=..."
            )
        return dict(before or self.record)

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


def start_fresh(settings: FromScratch, model: Model, runs: str) -> Start:
    """Leave the network as it is."""
    return Start()


def start_from_weights(settings: FromWeights, model: Model, runs: str) -> Start:
    """Start from the weights of a network of the same kind, see :meth:`InitSettings.start`."""
    freeze(model.network, settings.freeze)
    if model.step:
        return Start()
    key, weights = read_named(settings.checkpoint, "init.checkpoint", runs, settings.assume)
    check_latents(key, weights, model.latents, settings.adapt)
    sizes = check_architecture(key, weights, model.network, settings.adapt)
    network = build_network(weights.model)
    state = dict(weights.of_kind(settings.weights))
    load_state_strict(network, state)
    transfer = match_parameters(key, model.network, state, settings.adapt, sizes)
    return take_over(InitialWeights(key, weights, network, transfer), settings, model)


def read_named(name: str, key: str, runs: str, assume: AssumeSettings) -> tuple[str, Weights]:
    """Read the weights that ``key`` names.

    Returns:
        The key with its value, for messages, and the weights.

    Raises:
        UserError: if they cannot be read; with the keys of ``init.assume`` as training has them.
    """
    checkpoint = resolve_checkpoint(name, runs, key)
    try:
        return checkpoint.argument, read_weights(checkpoint, assume)
    except UserError as error:
        raise type(error)(re.sub(r"(?<![\w.])assume\.", "init.assume.", str(error))) from error


@dataclass(frozen=True)
class InitialWeights:
    """A checkpoint whose weights are taken over.

    Attributes:
        key: names it, for messages.
        network: the network whose weights it holds.
        distillation: matches the hidden states of ``network``; None if nothing does.
    """

    key: str
    weights: Weights
    network: Network
    transfer: Transfer
    distillation: Distillation | None = None


def take_over(source: InitialWeights, settings: FromWeights | FromTeacher, model: Model) -> Start:
    """Copy what is taken over into the network of ``model``, unless that has done steps already."""
    _check_process(source.key, source.weights, model.process, matched=source.distillation is not None)
    _note_path_drop(source.key, source.weights, model)
    transfer = source.transfer
    if not model.step:
        model.network.load_state_dict(transfer.loaded, strict=False)
    return Start(
        checkpoint=source.key,
        source=describe_weights(source.weights, source.network, settings.weights),
        fingerprint=fingerprint(source.network),
        loaded=tuple(transfer.loaded),
        new=tuple(transfer.new),
        left=tuple(transfer.left),
        frozen=tuple(settings.freeze),
        note="" if source.weights.has_class_names or "classes" in settings.adapt else _NO_CLASS_NAMES,
        distillation=source.distillation,
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
            f" diffusion={now}: take diffusion={before}, or init.distil_steps=0{_assume_hint(weights)}"
        )
    say(f"{key} was trained with diffusion={before}; with diffusion={now} the network has to learn another prediction")


def _note_path_drop(key: str, weights: Weights, model: Model) -> None:
    """Say what training will no longer train: weights are taken over, settings are not."""
    if was_trained_without_backbone(weights) and not (model.training.get("multi_budget") or {}).get("path_drop"):
        share = weights.training["multi_budget"]["path_drop"]
        say(
            f"{key} was trained with multi_budget.path_drop={share:g}, and this run is not: guidance.weak=path will be"
            f" refused. To keep it, give multi_budget.path_drop={share:g}"
        )


def _assume_hint(weights: Weights) -> str:
    """How to say by which process weights were trained, where that was only assumed."""
    assumed = not weights.has_class_names and "diffusion" not in weights.training
    return ". If it was trained by another process, init.assume.diffusion=... says so" if assumed else ""


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
