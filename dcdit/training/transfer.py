"""Which weights of a checkpoint fit a network: what must be equal, what may be adapted, and what starts anew."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dcdit.checkpoints.load import Weights
from dcdit.checks import shown
from dcdit.data.latents import LatentSpec
from dcdit.errors import UserError
from dcdit.network import Network, build_network
from dcdit.runtime.devices import without_memory

_ADAPTED_BY_PREFIX = {
    "condition.label.table.": "classes",
    "router.": "router",
    "embed.": "latents",
    "output.": "latents",
}
"""What has to be adapted if parameters whose names begin so do not fit; they start anew then."""

BLOCKS = ("norm", "mlp", "position", "qk_norm")
"""What transformer blocks consist of: weights of other ones cannot be taken over."""

_EQUAL_UNLESS_ADAPTED = {"router": "router", "smoothing_sigma": "grid"} | dict.fromkeys(
    ("heads", "groups", "position_patch", "freq_shift", "time_input", "patch", *BLOCKS), ""
)
"""What no shape tells of a network, or names better, and must be equal unless the named thing is adapted."""

_SIZES = ("width", "depth", "encoder_width", "mlp_ratio", "condition_norm", "gates")
"""What shapes depend on."""


@dataclass(frozen=True)
class Transfer:
    """The parameters that a network takes over, the names of those that start anew, and of those that are not taken."""

    loaded: dict[str, Tensor] = field(default_factory=dict)
    new: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


def check_latents(
    key: str, weights: Weights, latents: LatentSpec, adapt: Sequence[str], adaptable: bool = True
) -> None:
    """Compare the latents that weights were trained on with those of the shards.

    Args:
        key: names the weights, for messages.
        latents: of the shards.
        adapt: what may differ.
        adaptable: whether messages may advise to adapt classes or grid.

    Raises:
        UserError: with both values, if something differs that is not adapted.
    """
    if weights.latents is None:
        raise UserError(f"{key} does not say what its latents are: give init.assume.autoencoder and .scale")
    own, theirs = latents, weights.latents
    same_number = len(theirs.classes) == len(own.classes)
    classes = theirs.classes != own.classes if weights.has_class_names else not same_number
    for name, differs, there, here in (
        ("classes", classes, f"{len(theirs.classes)} classes there", f"{len(own.classes)} here"),
        ("grid", theirs.shape[1:] != own.shape[1:], f"a grid of {theirs.shape[1]} there", f"{own.shape[1]} here"),
    ):
        if differs and name not in adapt:
            what = f"{there} and {here}" if there.split()[0] != here.split()[0] else "classes of other names"
            remedy = f"To adapt it, add init.adapt=[{name}]" if adaptable else "Take data that the teacher knows"
            raise UserError(f"{key} does not fit the data: {what}. {remedy}")
    difference: str | None
    if theirs.shape[0] != own.shape[0]:
        difference = f"{theirs.shape[0]} channels there and {own.shape[0]} here"
    else:
        difference = replace(theirs, shape=own.shape, classes=own.classes).difference(own)
    if difference and "latents" not in adapt:
        assume = ", say what they are with init.assume.autoencoder=... and init.assume.scale=..."
        raise UserError(
            f"{key} was trained on other latents than the shards hold: {difference}. Point data.directory at such"
            f" latents{'' if weights.has_class_names else assume}, or start from it all the same with"
            " init.adapt=[latents]"
        )


def check_architecture(key: str, weights: Weights, network: Network, adapt: Sequence[str]) -> str:
    """Raise :class:`UserError` where two networks differ in what no shape tells; says where their shapes differ."""
    own = network.spec
    if own["name"] != weights.model["name"]:
        upcycled = (own["name"], weights.model["name"]) == ("dcdit", "dit")
        hint = ": init=upcycle makes a DC-DiT of a DiT" if upcycled else ""
        raise UserError(f"{key} holds model.name={weights.model['name']}, model.name={own['name']} is trained{hint}")
    with without_memory():
        theirs = build_network(weights.model).spec
    for name, adapted in _EQUAL_UNLESS_ADAPTED.items():
        if own.get(name) != theirs.get(name) and adapted not in adapt:
            remedy = f", or add init.adapt=[{adapted}]" if adapted else ""
            raise UserError(
                f"model.{name}={shown(own.get(name))}: {key} was trained with {shown(theirs.get(name))}, set"
                f" model.{name}={shown(theirs.get(name))}{remedy}"
            )
    differing = [name for name in _SIZES if name in own and own[name] != theirs[name]]
    return ", ".join(f"model.{name} is {shown(theirs[name])} there" for name in differing)


def match_parameters(
    key: str,
    network: Network,
    state: Mapping[str, Tensor],
    adapt: Sequence[str],
    sizes: str = "",
    partly: bool = False,
) -> Transfer:
    """Decide which of the parameters in ``state`` the network takes over.

    Args:
        key: names the weights, for messages.
        state: by the network's names.
        adapt: what may differ.
        sizes: where the networks differ, for messages.
        partly: whether parameters that ``state`` lacks start anew.

    Raises:
        UserError: with both shapes, if a parameter does not fit and is not adapted.
    """
    transfer = Transfer()
    own = network.state_dict()
    for name in {**own, **state}:
        cause = next((cause for prefix, cause in _ADAPTED_BY_PREFIX.items() if name.startswith(prefix)), None)
        mine, theirs = own.get(name), state.get(name)
        if cause == "classes" and cause in adapt and mine is not None and theirs is not None:
            transfer.loaded[name] = torch.cat([mine[:-1], theirs[-1:]])  # the last row is the null class's
            transfer.new.append(f"{name} but for the null class")
        elif mine is not None and theirs is not None and mine.shape == theirs.shape:
            transfer.loaded[name] = theirs
        elif cause in adapt or (theirs is None and (partly or name.startswith("gates."))):  # gates begin with all on
            if mine is not None:
                transfer.new.append(name)
            if theirs is not None:
                transfer.left.append(name)
        else:
            there, here = (list(tensor.shape) if tensor is not None else "none" for tensor in (theirs, mine))
            remedy = (f" ({sizes})" if sizes else "") + (f", or adapt it with init.adapt=[{cause}]" if cause else "")
            raise UserError(
                f"{key} does not fit model: parameter {name} has shape {there} there and {here} here. Choose the model"
                f" that it was trained with{remedy}"
            )
    return transfer
