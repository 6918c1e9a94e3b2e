"""The settings of optimisers, and the table of them."""

from collections.abc import Mapping
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from dcdit.checks import Bounds, NamedSettings, Natural, NonNegative, Positive, Table, config
from dcdit.errors import UserError

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from dcdit.network import Network

Decay = Annotated[float, Bounds(0, 1, open_high=True, hint="it is the share of an average that a step keeps: 0.9")]


@config
class OptimizerSettings(NamedSettings):
    """An optimiser and its learning-rate schedule: the keys that every choice of ``configs/optimizer`` has.

    Attributes:
        name: its name in :data:`OPTIMIZERS`.
        implementation: what :meth:`build` calls.
    """

    lr: Positive
    weight_decay: NonNegative
    betas: tuple[Decay, Decay]
    eps: Positive
    schedule: Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
    lr_warmup_steps: Natural
    lr_scale: dict[str, Positive] | None

    def build(self, parts: "Mapping[str, nn.Module]") -> "Optimizer":
        """One optimiser of all parameters of ``parts``, in their order, with a group of parameters for each part."""
        optimizer: Optimizer = self.call_implementation(parts)
        return optimizer

    def matrices(self, network: "nn.Module") -> "dict[nn.Parameter, int]":
        """The weights that are trained by Muon, each with the number of matrices stacked in it; empty for AdamW."""
        return {}

    def check(self, network: "Network") -> None:
        """Raise :class:`UserError` unless this can train ``network``."""


@config
class AdamW(OptimizerSettings):
    """AdamW for all parameters (arXiv 1711.05101)."""

    name: ClassVar[str] = "adamw"
    implementation: ClassVar[str] = "dcdit.training.optimizers:build_adamw"


@config
class Muon(OptimizerSettings):
    """Muon for the weight matrices of the transformer blocks, AdamW for all other parameters."""

    name: ClassVar[str] = "muon"
    implementation: ClassVar[str] = "dcdit.training.optimizers:build_muon"
    momentum: Decay
    nesterov: bool
    ns_steps: Annotated[int, Bounds(1, 99, hint="5 as published")]

    def matrices(self, network: "nn.Module") -> "dict[nn.Parameter, int]":
        """See :func:`dcdit.network.matrices.block_matrices`."""
        found: dict[nn.Parameter, int] = resolve_name("dcdit.network.matrices:block_matrices")(network)
        return found

    def check(self, network: "Network") -> None:
        """Raise :class:`UserError` unless there is a matrix to train."""
        if not self.matrices(network):
            raise UserError(
                f"optimizer=muon finds no weight matrix that is trained in a transformer block of {network.title}: take"
                " optimizer=adamw, or leave the blocks out of init.freeze"
            )


OPTIMIZERS: Table[type[OptimizerSettings]] = Table("optimizer.name", {kind.name: kind for kind in (AdamW, Muon)})
"""The optimisers by ``optimizer.name``."""
