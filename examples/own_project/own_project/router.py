"""A router that keeps positions where the features change most."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcdit.network.routing import ROUTERS


class GradientRouter(nn.Module):
    """A position is a boundary if the features to its right and below differ from its own.

    Args:
        channels: of the features; no parameter depends on it.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale, self.offset = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(()))

    def forward(self, features: Tensor) -> Tensor:
        """Boundary probabilities (B, L) of ``features`` (B, D, H, W), float32."""
        padded = F.pad(features, (0, 1, 0, 1), mode="replicate")
        right = padded.diff(dim=3)[:, :, :-1].square().mean(dim=1)
        below = padded.diff(dim=2)[:, :, :, :-1].square().mean(dim=1)
        return torch.sigmoid(self.scale * (right + below) + self.offset).flatten(1).float()


ROUTERS["gradient"] = GradientRouter
