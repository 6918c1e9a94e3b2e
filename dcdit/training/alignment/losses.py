"""The alignment losses: REPA (arXiv 2410.06940), iREPA (arXiv 2512.10794), dispersive (arXiv 2506.09027)."""

from abc import abstractmethod
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from dcdit.network import Routing
from dcdit.network.dechunk import dechunk
from dcdit.network.packing import Packing
from dcdit.training.alignment.features import Features
from dcdit.training.auxiliary import AuxiliaryLoss, HiddenStates, Noisy, covering, mean_over_tokens


class Alignment(nn.Module, AuxiliaryLoss):
    """A loss on the tokens after one block. Its parameters are trained and saved with those of the network.

    Args:
        block: number of the block.
        weight: of the loss.

    Attributes:
        name: of its settings.
    """

    metric = "train/alignment_loss"
    name: str

    def __init__(self, block: int, weight: float) -> None:
        super().__init__()
        self.states, self.block, self.weight = (block,), block, weight

    @property
    def record(self) -> dict[str, str | int]:
        """What checkpoints say of it; equal in a run that goes on."""
        return {"name": self.name, "block": self.block}

    @property
    def description(self) -> str:
        """What is aligned with what, for people."""
        return f"alignment={self.name}: a loss on the tokens after block {self.block}"

    def __deepcopy__(self, memo: object) -> "Alignment":
        return self  # an average of weights copies the trained module: what is never sampled with needs no average

    @override
    def weight_at(self, step: int) -> float:
        return self.weight

    @override
    def move(self, device: torch.device) -> None:
        """Parameters move with the module."""

    @override
    def loss(self, hidden: HiddenStates, noisy: Noisy, routing: Routing | None) -> Tensor:
        assert hidden.packing is not None
        return self.loss_of_tokens(hidden.tokens[self.block], hidden.packing, noisy, routing)

    @abstractmethod
    def loss_of_tokens(self, tokens: Tensor, packing: Packing, noisy: Noisy, routing: Routing | None) -> Tensor:
        """The loss, a float32 scalar, of ``tokens`` (T, D); see :meth:`loss`."""


class EncoderAlignment(Alignment):
    """Alignment with features of an encoder.

    Args:
        projector: from tokens to features; its parameters are trained.
        features: of the batch.
        token_grid: (h, w), of which tokens are positions; a multiple of the features' grid.
        block, weight: see :class:`Alignment`.
    """

    def __init__(
        self,
        projector: nn.Module,
        features: Features,
        token_grid: tuple[int, int],
        block: int,
        weight: float,
    ) -> None:
        super().__init__(block, weight)
        self.projector, self.features, self.token_grid = projector, features, token_grid

    @property
    def record(self) -> dict[str, str | int]:
        """What checkpoints say of it, and of its encoder."""
        identity = self.features.identity
        return {**super().record, "encoder": identity.name, "weights": identity.weights}

    @property
    @override
    def description(self) -> str:
        identity = self.features.identity
        return (
            f"{super().description}, with features of {identity.name} (weights {identity.weights}, {identity.origin})"
        )

    @override
    def move(self, device: torch.device) -> None:
        self.features.move(device)


class TokenAlignment(EncoderAlignment):
    """REPA: minus the cosine of each projected token and the features of the patch that covers it, on average."""

    name = "repa"

    @override
    def loss_of_tokens(self, tokens: Tensor, packing: Packing, noisy: Noisy, routing: Routing | None) -> Tensor:
        features = self.features(noisy)  # (B, F, h, w)
        projected = self.projector(tokens).float()  # (T, F)
        patches = covering(packing.index, self.token_grid, self.token_grid[0] // features.shape[2])
        target = features.flatten(2).transpose(1, 2).flatten(0, 1).index_select(0, patches).float()
        return -mean_over_tokens(F.cosine_similarity(projected, target, dim=1), packing)


class GridAlignment(EncoderAlignment):
    """iREPA: tokens are spread over the grid, pooled to patches and convolved; features are normalised in each image.

    Args:
        sigma: width of the smoothing that spreads tokens, in grid positions; None does not smooth.
        projector, features, token_grid, block, weight: see :class:`EncoderAlignment`.
    """

    name = "irepa"

    def __init__(
        self,
        projector: nn.Module,
        features: Features,
        token_grid: tuple[int, int],
        sigma: float | None,
        block: int,
        weight: float,
    ) -> None:
        super().__init__(projector, features, token_grid, block, weight)
        self.sigma = sigma

    @override
    def loss_of_tokens(self, tokens: Tensor, packing: Packing, noisy: Noisy, routing: Routing | None) -> Tensor:
        target = normalised(self.features(noisy).float())  # (B, F, h, w)
        with torch.autocast(tokens.device.type, enabled=False):
            spread = self._spread(tokens.float(), packing, routing)  # (B, D, H, W)
            pooled = F.avg_pool2d(spread, self.token_grid[0] // target.shape[2])
        similarity = F.cosine_similarity(self.projector(pooled).float(), target, dim=1).flatten(1)  # (B, h * w)
        present = has_tokens(packing)
        return -(similarity * present[:, None]).sum() / (present.sum() * similarity.shape[1])

    def _spread(self, tokens: Tensor, packing: Packing, routing: Routing | None) -> Tensor:
        if routing is None:  # every position has its token
            grid = tokens.unflatten(0, (packing.batch, -1))
        else:
            # The router learns from the diffusion and the ratio loss alone, as with REPA.
            fixed = replace(routing, prob=routing.prob.detach())
            grid = dechunk(tokens, fixed, packing, self.token_grid, self.sigma)
        return grid.transpose(1, 2).unflatten(2, self.token_grid)


def normalised(features: Tensor) -> Tensor:
    """Features (B, F, h, w) with mean 0 and deviation 1 over the positions of each image, channel by channel."""
    deviation, mean = torch.std_mean(features, dim=(2, 3), correction=0, keepdim=True)
    return (features - mean) / (deviation + 1e-6)


class DispersiveLoss(Alignment):
    """Samples of a batch repel one another: the log of the mean of exp(-|z_i - z_j|^2 / temperature) over all pairs.

    z_i is the mean of the tokens of a sample, divided by the square root of their width, so that one temperature serves
    all widths. A sample and itself are a pair too, which bounds the loss by -log B from below. The pairs are those of a
    micro-batch of one process.

    Args:
        temperature: of the exponentials.
        block, weight: see :class:`Alignment`.
    """

    name = "dispersive"

    def __init__(self, temperature: float, block: int, weight: float) -> None:
        super().__init__(block, weight)
        self.temperature = temperature

    @override
    def loss_of_tokens(self, tokens: Tensor, packing: Packing, noisy: Noisy, routing: Routing | None) -> Tensor:
        with torch.autocast(tokens.device.type, enabled=False):
            pooled = mean_tokens(tokens.float(), packing) / tokens.shape[1] ** 0.5  # (B, D)
            # Of differences, not of products: these would lose the digits of near pairs.
            distances = torch.cdist(pooled, pooled, compute_mode="donot_use_mm_for_euclid_dist").square()
        present = has_tokens(packing)
        distances = distances.masked_fill(~(present & present[:, None]), torch.inf)
        return torch.logsumexp(-distances.flatten() / self.temperature, dim=0) - 2 * present.sum().log()


def mean_tokens(tokens: Tensor, packing: Packing) -> Tensor:
    """The mean of the tokens (T, D) of each sample, (B, D), 0 of none; padding counts for nothing."""
    samples = torch.arange(packing.batch, device=tokens.device)
    own = packing.sample == samples[:, None]  # (B, T)
    if packing.valid is not None:
        own = own & packing.valid
    # A product: on a GPU, sums by index add up in another order, to other bits, in every run.
    return own.to(tokens.dtype) @ tokens / packing.cu_seqlens.diff()[: packing.batch, None].clamp(min=1)


def has_tokens(packing: Packing) -> Tensor:
    """Which samples have tokens, (B,) bool: losses leave out those that leave the backbone out."""
    return packing.cu_seqlens.diff()[: packing.batch] > 0


def mlp(width: int, hidden: int, channels: int) -> nn.Module:
    """REPA's projector: three linear layers with SiLU between them, (..., width) to (..., channels)."""
    return nn.Sequential(
        nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, channels)
    )
