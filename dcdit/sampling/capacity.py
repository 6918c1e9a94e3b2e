"""The room of the packed sequences of sampling: a share that is given, or what a few images kept at each step."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated

import torch

from dcdit.checkpoints.load import Model
from dcdit.checks import Bounds
from dcdit.diffusion.guidance import Capacity, Guidance
from dcdit.diffusion.samplers import Sampler
from dcdit.network import Network
from dcdit.runtime.files import content_digest
from dcdit.sampling.cost import SamplingCost
from dcdit.sampling.dropped import MARGIN
from dcdit.sampling.generate import generate

_IMAGES, _SEED = 32, 2**32 - 3
"""Of the images that are measured; no seed that anyone is likely to give."""

_Share = Annotated[float, Bounds(0, 1)] | None


@dataclass(frozen=True)
class KeptShares:
    """Shares of the positions that batches of images kept, at most.

    Attributes:
        steps: at each step, of the main and of the guiding branch; None where it did not run, or has no router.
    """

    steps: list[tuple[_Share, _Share]]

    @property
    def digest(self) -> str:
        """A short digest that tells these shares from others."""
        return content_digest(asdict(self))[:8]

    def room(self, timesteps: Sequence[float]) -> Capacity:
        """Return the capacity with room for these and :data:`MARGIN`.

        A sampler that asks twice at one timestep has room for the more of both.
        """
        shares: dict[float, list[float | None]] = {}
        for timestep, step in zip(timesteps, self.steps, strict=True):
            room = [None if share is None else min(1.0, MARGIN * share) for share in step]
            shares[timestep] = list(map(_most, zip(room, shares.get(timestep, room), strict=True)))
        return shares.__getitem__


def room_of(share: float, networks: Sequence[Network]) -> Capacity:
    """Return the capacity of one share at all steps of those that route."""
    shares = [share if network.routes else None for network in networks]
    return lambda timestep: shares


def measure_kept(model: Model, guidance: Guidance, sampler: Sampler, batch_size: int, precision: str) -> KeptShares:
    """Sample a few images, packed exactly; the arguments are those of the images to come.

    Returns:
        At each step the most that a batch kept: small ones differ, above all where some samples reuse features.
    """
    labels = torch.arange(_IMAGES) * model.network.num_classes // _IMAGES
    batches = generate(
        model, guidance, sampler, labels, range(_IMAGES), seed=_SEED, batch_size=batch_size, precision=precision
    )
    ratios = [SamplingCost.of(batch).keep_ratios(model.network.positions) for batch in batches]
    main, guiding = ([_most(step) for step in zip(*branch, strict=True)] for branch in zip(*ratios, strict=True))
    return KeptShares(list(zip(main, guiding, strict=True)))


def _most(shares: Sequence[float | None]) -> float | None:
    """Return the greatest share; None where the branch did not run, or has no router."""
    return max((share for share in shares if share is not None), default=None)
