"""Upcycling: a DC-DiT takes over the blocks and embedders of a plain DiT (paper, section 4.4)."""

from collections.abc import Mapping

from torch import Tensor

from dcdit.checkpoints.load import Model
from dcdit.checks import shown
from dcdit.errors import UserError
from dcdit.network import DiT, Network, build_network
from dcdit.runtime.tensors import load_state_strict
from dcdit.training.distillation import Distillation
from dcdit.training.initial_weights import InitialWeights, Start, freeze, read_named, take_over
from dcdit.training.settings import FromTeacher
from dcdit.training.transfer import BLOCKS, check_latents, match_parameters


def start_from_teacher(settings: FromTeacher, model: Model, runs: str) -> Start:
    """Start from the blocks and embedders of a plain DiT, see :meth:`InitSettings.start`."""
    freeze(model.network, settings.freeze)
    if (model.step or 0) >= max(1, settings.distil_steps):
        return Start()
    key, weights = read_named(settings.teacher, "init.teacher", runs, settings.assume)
    if weights.model["name"] != "dit":
        raise UserError(
            f"{key} holds no plain DiT, which upcycling starts from ({weights.source}): to train one further there is"
            " init=weights"
        )
    check_latents(key, weights, model.latents, settings.adapt, adaptable=not settings.distil_steps)
    state = dict(weights.of_kind(settings.weights))
    teacher = build_network(weights.model)
    assert isinstance(teacher, DiT)
    _check_teacher(key, teacher, model.network, settings.distil_steps)
    load_state_strict(teacher, state)
    transfer = match_parameters(key, model.network, _blocks_and_embedders(state), settings.adapt, partly=True)
    transfer.left.extend(name for name in state if not name.startswith(("blocks.", "condition.")))
    teacher.eval().requires_grad_(False)
    distillation = None
    if settings.distil_steps and settings.distil_weight:
        distillation = Distillation(teacher, settings.distil_steps, settings.distil_weight, settings.distil_decay)
    return take_over(InitialWeights(key, weights, teacher, transfer, distillation), settings, model)


def _blocks_and_embedders(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The blocks and embedders of a plain DiT, by the names that they have in a DC-DiT."""
    embedders = {name: tensor for name, tensor in state.items() if name.startswith("condition.")}
    return embedders | {f"backbone.{name}": tensor for name, tensor in state.items() if name.startswith("blocks.")}


def _check_teacher(key: str, teacher: DiT, network: Network, distil_steps: int) -> None:
    """Raise :class:`UserError` with both values if a teacher does not fit, more strictly while it is matched."""
    own, theirs = network.spec, teacher.spec
    for name in ("width", "depth", "heads", "mlp_ratio", "freq_shift", "time_input", *BLOCKS):
        if own.get(name) != theirs[name]:
            raise UserError(
                f"model.{name}={shown(own.get(name))} does not fit {key}, whose {name} is {shown(theirs[name])}: set"
                f" model.{name}={shown(theirs[name])}, or take another teacher"
            )
    if own["position_patch"] != teacher.patch:
        raise UserError(
            f"model.position_patch={own['position_patch']}: {key} has patches of {teacher.patch}, set"
            f" model.position_patch={teacher.patch}"
        )
    if not distil_steps:
        return
    if network.label_dropout and not teacher.label_dropout:
        raise UserError(
            f"model.label_dropout={shown(network.label_dropout)}: {key} was trained without a null class, so its hidden"
            " states for none mean nothing; take model.label_dropout=0 or init.distil_steps=0"
        )
    for name in ("grid", "channels", "num_classes"):
        if own[name] != theirs[name]:
            raise UserError(
                f"init.distil_steps={distil_steps}: {key} has {name} {theirs[name]} and the data {own[name]},"
                " so it cannot see the same batches; take init.distil_steps=0 and init.adapt, or other data"
            )
