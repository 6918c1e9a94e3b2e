"""The count of ``benchmarks/memory.py``: what autograd saves, without the weights."""

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import memory

from dcdit.network import DCDiT


class Toy(nn.Module):
    """Saves its input for the gradient of the weight, and the product for that of the sine."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(24, 40)

    def forward(self, x, t, y):
        return self.linear(x).sin()


def test_what_is_saved_is_counted_once_and_without_weights():
    network, (t, y) = Toy(), torch.zeros(2, 7)
    x = torch.randn(7, 24, requires_grad=True)
    assert memory.saved_bytes(network, (x, t, y), half=False) == 7 * (24 + 40) * 4
    half = memory.saved_bytes(network, (x, t, y), half=True)
    assert half == (7 * (24 + 40) + 24 * 40) * 2, "the bf16 copy of the weight is saved beside"


def test_checkpointing_saves_less_of_each_sample_and_more_tokens_take_more():
    torch.manual_seed(0)
    network = DCDiT(grid=16, channels=4, num_classes=1000, width=64, depth=4, heads=2, groups=8)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    (whole, less, _), (more, _, _) = (memory.activations(network, kept, half=False) for kept in (0.25, 0.5))
    assert 0 < less < whole < more
