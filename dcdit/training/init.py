"""Where training starts from: fresh weights, weights that exist, or the blocks of a plain DiT."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dcdit.checkpoints.load import Weights, describe_weights, read_weights
from dcdit.checkpoints.resolve import resolve_checkpoint
from dcdit.checks import shown
from dcdit.data.latents import LatentSpec
from dcdit.diffusion.process import Process
from dcdit.errors import UserError
from dcdit.network import DiT, Network, build_network
from dcdit.runtime.devices import fingerprint, without_memory
from dcdit.runtime.processes import say
from dcdit.runtime.tensors import load_state_strict
from dcdit.training.distillation import Distillation
from dcdit.training.settings import FromScratch, FromTeacher, FromWeights, InitSettings

TOUCHES = {
    "classes": ("condition.label.table.",),
    "router": ("router.",),
    "latents": ("embed.", "output."),
    "grid": (),
}
"""Parameters that start anew, if they do not fit, where something is adapted, by the beginning of their names."""

_UNNAMED = "the file does not name its classes: label i here is taken for label i there"
_SAME = {"router": "router", "smoothing_sigma": "grid"} | dict.fromkeys(
    ("heads", "groups", "position_patch", "freq_shift", "patch"), ""
)
"""What no shape tells of a network, and must be equal unless the named thing is adapted."""


@dataclass(frozen=True)
class Start:
    """What training starts from.

    Attributes:
        place: as the user gave it, such as ``init.teacher=runs/dit``; empty from scratch.
        source: what is there, in words.
        fingerprint: digest of the network that they are of.
        loaded, new, left: names of parameters that were taken over, that start anew, and that were not taken.
        frozen: parts that are not trained.
        remark: what nobody could check.
        distillation: matches the hidden states of a teacher; None if nothing does.
    """

    place: str = ""
    source: str = ""
    fingerprint: str = ""
    loaded: tuple[str, ...] = ()
    new: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    remark: str = ""
    distillation: Distillation | None = None

    @property
    def record(self) -> dict[str, str]:
        """For checkpoints; empty from scratch. No path of this machine."""
        return {"source": self.source, "fingerprint": self.fingerprint} if self.place else {}

    @property
    def words(self) -> str:
        """What became of the parameters, part by part; name by name where it is not all of a part."""
        lines = [f"Starting from {self.place}, {self.source}: {len(self.loaded)} parameters taken over"]
        others = (*self.loaded, *self.new, *self.left)
        for title, names in (("new", self.new), ("left behind", self.left)):
            if names:
                lines.append(f"  {title}: {', '.join(_by_part(names, [n for n in others if n not in names]))}")
        lines += [f"  not trained: {', '.join(self.frozen)}"] if self.frozen else []
        lines += [f"  {self.remark}"] if self.remark else []
        return "\n".join(lines)


def _by_part(names: Sequence[str], others: Sequence[str]) -> list[str]:
    """Names, those of a part that has no others in one."""
    found: dict[str, None] = {}
    for name in names:
        part = name.split(".")[0]
        whole = not any(other.split(".")[0] == part for other in others)
        found[f"{part} ({sum(each.split('.')[0] == part for each in names)})" if whole else name] = None
    return list(found)


@dataclass(frozen=True)
class _Fit:
    """How weights fit a network."""

    take: dict[str, Tensor] = field(default_factory=dict)
    new: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


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
    if isinstance(settings, FromWeights):
        if step:
            return Start()
        place = resolve_checkpoint(settings.checkpoint, runs, "init.checkpoint")
        found = read_weights(place, settings.assume)
        start, fit = _from_weights(settings, found, place.argument, network, latents)
    else:
        if step >= max(1, settings.distil_steps):
            return Start()
        place = resolve_checkpoint(settings.teacher, runs, "init.teacher")
        found = read_weights(place, settings.assume)
        start, fit = _from_teacher(settings, found, place.argument, network, latents)
    _check_process(place.argument, found, process, start)
    if not step:
        _load(network, fit.take)
    return replace(
        start,
        place=place.argument,
        loaded=tuple(fit.take),
        new=tuple(fit.new),
        left=tuple(fit.left),
        frozen=tuple(settings.freeze),
    )


def _from_weights(
    settings: FromWeights, found: Weights, key: str, network: Network, latents: LatentSpec
) -> tuple[Start, _Fit]:
    """What a network takes over from one of its kind; ``key`` begins messages."""
    _check_latents(key, found, latents, settings.adapt)
    sizes = _check_network(key, found, network, settings.adapt)
    other = build_network(found.model)
    state = dict(found.of_kind(settings.weights))
    load_state_strict(other, state)
    fit = _fit(key, network, state, settings.adapt, sizes)
    remark = "" if found.has_class_names or "classes" in settings.adapt else _UNNAMED
    return Start(
        source=describe_weights(found, other, settings.weights), fingerprint=fingerprint(other), remark=remark
    ), fit


def _from_teacher(
    settings: FromTeacher, found: Weights, key: str, network: Network, latents: LatentSpec
) -> tuple[Start, _Fit]:
    """What a DC-DiT takes over from a plain DiT, and what has it match the hidden states; ``key`` begins messages."""
    if found.model["name"] != "dit":
        raise UserError(
            f"{key} holds no plain DiT, which upcycling starts from ({found.source}): to train one further there is"
            " init=weights"
        )
    _check_latents(key, found, latents, settings.adapt, adaptable=not settings.distil_steps)
    state = dict(found.of_kind(settings.weights))
    teacher = _teacher(key, found, network, state, settings)
    fit = _fit(key, network, _blocks_and_embedders(state), settings.adapt, partly=True)
    fit.left.extend(name for name in state if not name.startswith(("blocks.", "condition.")))
    steps, weight = settings.distil_steps, settings.distil_weight
    start = Start(
        source=describe_weights(found, teacher, settings.weights),
        fingerprint=fingerprint(teacher),
        remark="" if found.has_class_names or "classes" in settings.adapt else _UNNAMED,
        distillation=Distillation(teacher, steps, weight, settings.distil_decay) if steps and weight else None,
    )
    return start, fit


def _check_process(key: str, found: Weights, process: Process, start: Start) -> None:
    """Raise where a teacher's hidden states would be of other noise; say it where weights are of another process."""
    before, now = found.process.settings.name, process.settings.name
    if before == now:
        there, here = found.process.spec, process.spec
        others = [f"diffusion.{name}={shown(there[name])}" for name in here if there[name] != here[name]]
        if others:
            say(f"{key} was trained with {', '.join(others)}")
        return
    if start.distillation is not None:
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


def _check_latents(key: str, found: Weights, latents: LatentSpec, adapt: Sequence[str], adaptable: bool = True) -> None:
    """Raise unless the latents are those of the weights, but for what is adapted."""
    if found.latents is None:
        raise UserError(f"{key} does not say what its latents are: give init.assume.autoencoder and .scale")
    own, theirs = latents, found.latents
    same_number = len(theirs.classes) == len(own.classes)
    classes = theirs.classes != own.classes if found.has_class_names else not same_number
    differing = [
        ("classes", classes, f"{len(theirs.classes)} classes there", f"{len(own.classes)} here"),
        ("grid", theirs.shape[1:] != own.shape[1:], f"a grid of {theirs.shape[1]} there", f"{own.shape[1]} here"),
    ]
    for name, differs, there, here in differing:
        if differs and name not in adapt:
            what = f"{there} and {here}" if there.split()[0] != here.split()[0] else "classes of other names"
            remedy = f"To adapt it, add init.adapt=[{name}]" if adaptable else "Take data that the teacher knows"
            raise UserError(f"{key} does not fit the data: {what}. {remedy}")
    if theirs.shape[0] != own.shape[0]:
        difference: str | None = f"{theirs.shape[0]} channels there and {own.shape[0]} here"
    else:
        difference = replace(theirs, shape=own.shape, classes=own.classes).difference(own)
    if difference and "latents" not in adapt:
        told = (
            ""
            if found.has_class_names
            else ", say what they are with init.assume.autoencoder=... and init.assume.scale=..."
        )
        raise UserError(
            f"{key} was trained on other latents than the shards hold: {difference}. Point data.directory at such"
            f" latents{told}, or start from it nevertheless with init.adapt=[latents]"
        )


def _check_network(key: str, found: Weights, network: Network, adapt: Sequence[str]) -> str:
    """Raise where the networks differ in what no shape tells; returns in words where their shapes differ."""
    own = network.spec
    if own["name"] != found.model["name"]:
        hint = (
            ": init=upcycle makes a DC-DiT of a DiT" if (own["name"], found.model["name"]) == ("dcdit", "dit") else ""
        )
        raise UserError(f"{key} holds model.name={found.model['name']}, model.name={own['name']} is trained{hint}")
    with without_memory():
        theirs = build_network(found.model).spec
    for name, adapted in _SAME.items():
        if own.get(name) != theirs.get(name) and adapted not in adapt:
            remedy = f", or add init.adapt=[{adapted}]" if adapted else ""
            raise UserError(
                f"model.{name}={shown(own.get(name))}: {key} was trained with {shown(theirs.get(name))}, set"
                f" model.{name}={shown(theirs.get(name))}{remedy}"
            )
    keys = [key for key in ("width", "depth", "encoder_width", "mlp_ratio", "condition_norm") if key in own]
    return ", ".join(f"model.{each} is {shown(theirs[each])} there" for each in keys if own[each] != theirs[each])


def _fit(
    key: str,
    network: Network,
    state: Mapping[str, Tensor],
    adapt: Sequence[str],
    sizes: str = "",
    partly: bool = False,
) -> _Fit:
    """Which of the parameters in ``state`` the network takes over.

    Args:
        key: names the weights, for messages.
        network: that takes them.
        state: by the network's names.
        adapt: what may differ.
        sizes: where the networks differ, for messages.
        partly: whether parameters that ``state`` lacks start anew.
    """
    fit = _Fit()
    touched = {start: name for name, starts in TOUCHES.items() for start in starts}
    own = network.state_dict()
    for name in {**own, **state}:
        reason = next((each for start, each in touched.items() if name.startswith(start)), None)
        mine, theirs = own.get(name), state.get(name)
        if mine is not None and theirs is not None and mine.shape == theirs.shape:
            if reason == "classes" and reason in adapt:
                fit.take[name] = _with_null_class(mine, theirs)
                fit.new.append(f"{name} but for the null class")
            else:
                fit.take[name] = theirs
        elif mine is not None and theirs is None and partly:
            fit.new.append(name)
        elif reason in adapt:
            if reason == "classes" and mine is not None and theirs is not None:
                fit.take[name] = _with_null_class(mine, theirs)
                fit.new.append(f"{name} but for the null class")
                continue
            if mine is not None:
                fit.new.append(name)
            if theirs is not None:
                fit.left.append(name)
        else:
            has, needs = (list(each.shape) if each is not None else "none" for each in (theirs, mine))
            remedy = (f" ({sizes})" if sizes else "") + (f", or adapt it with init.adapt=[{reason}]" if reason else "")
            raise UserError(
                f"{key} does not fit model: parameter {name} has shape {has} there and {needs} here. Choose the model"
                f" that it was trained with{remedy}"
            )
    return fit


def _with_null_class(mine: Tensor, theirs: Tensor) -> Tensor:
    """A label table of fresh rows, whose last is that of the null class there."""
    return torch.cat([mine[:-1], theirs[-1:]])


def _load(network: Network, take: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in network.state_dict().items():
            if name in take:
                parameter.copy_(take[name])


def _blocks_and_embedders(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a DC-DiT takes over from a plain DiT, by the names that it has there."""
    found = {name: tensor for name, tensor in state.items() if name.startswith("condition.")}
    return found | {f"backbone.{name}": tensor for name, tensor in state.items() if name.startswith("blocks.")}


def _teacher(key: str, found: Weights, network: Network, state: Mapping[str, Tensor], settings: FromTeacher) -> DiT:
    """The plain DiT that a DC-DiT is made of; UserError with both values if it does not fit."""
    teacher = build_network(found.model)
    assert isinstance(teacher, DiT)
    own, theirs = network.spec, teacher.spec
    for name in ("width", "depth", "heads", "mlp_ratio", "freq_shift"):
        if own.get(name) != theirs[name]:
            raise UserError(
                f"model.{name}={shown(own.get(name))} does not fit {key}, whose {name} is {shown(theirs[name])}: set"
                f" model.{name}={shown(theirs[name])}, or choose the scale of the teacher"
            )
    if own["position_patch"] != teacher.patch:
        raise UserError(
            f"model.position_patch={own['position_patch']}: {key} has patches of {teacher.patch}, set"
            f" model.position_patch={teacher.patch}"
        )
    if settings.distil_steps and network.label_dropout and not teacher.label_dropout:
        raise UserError(
            f"model.label_dropout={shown(network.label_dropout)}: {key} was trained without a null class, so its hidden"
            " states for none mean nothing; take model.label_dropout=0 or init.distil_steps=0"
        )
    for name in ("grid", "channels", "num_classes"):
        if settings.distil_steps and own[name] != theirs[name]:
            raise UserError(
                f"init.distil_steps={settings.distil_steps}: {key} has {name} {theirs[name]} and the data {own[name]},"
                " so it cannot see the same batches; take init.distil_steps=0 and init.adapt, or other data"
            )
    load_state_strict(teacher, state)
    return teacher.eval().requires_grad_(False)
