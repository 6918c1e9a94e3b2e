"""What training holds in memory, by scale: weights and what belongs to them, and activations of each sample.

    python benchmarks/memory.py                           S, B, L and XL at 256px with a quarter of the positions kept
    python benchmarks/memory.py --scales b --kept 0.54    as in the first steps of a fresh router

Needs torch alone. Weights are counted on the meta device. Activations are the tensors that autograd saves for the
backward pass of an untrained network on the CPU: those of two samples less those of one, so that the bf16 copies of the
weights, which autocast makes once for a step, are counted by themselves. In bf16 attention runs in bf16 too, as on a
GPU and on a CPU with AMX; elsewhere dcdit runs it in float32. With checkpointing the figure holds what one block
computes anew. Not counted: what single operations need for a moment, and the CUDA context.
"""

import argparse
import gc
import sys
from typing import Any
from unittest.mock import patch

import torch
from step import keep_share, scales
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from dcdit.network import DCDiT
from dcdit.network.execution import set_execution
from dcdit.runtime.devices import without_memory

COPIES = {"weights": 4, "gradients": 4, "AdamW's moments": 8, "EMA": 4}
"""Bytes of each parameter."""


def saved_bytes(network: DCDiT, inputs: tuple[Tensor, Tensor, Tensor], half: bool) -> int:
    """Bytes of the tensors that a forward pass saves for its backward pass, without weights and tables themselves."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*network.parameters(), *network.buffers())}
    found: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # holds the storage, so that no other one gets its address

    with saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=half):
        output = network(*inputs)
    del output
    return sum(found.values())


def activations(network: DCDiT, kept: float, half: bool) -> tuple[float, float, float]:
    """Bytes that autograd saves of one sample, the same with checkpointing, and bytes for all samples together."""
    torch.manual_seed(0)
    x, t, y = torch.randn(2, network.channels, *network.grid), torch.randint(1000, (2,)), torch.randint(1000, (2,))
    found: dict[bool, list[int]] = {False: [], True: []}
    for samples in (1, 2):
        inputs = x[:samples], t[:samples], y[:samples]
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            keep_share(network, inputs, kept)
        for checkpointed, sizes in found.items():
            set_execution(network, checkpointed=checkpointed)
            sizes.append(saved_bytes(network, inputs, half))
    whole, less = (sizes[1] - sizes[0] for sizes in found.values())
    block = (whole - less) / len(network.backbone.blocks)
    return whole, less + block, 2 * found[False][0] - found[False][1]


def measure(scale: str, grid: int, kept: float) -> list[str]:
    """The cells of a row of the table."""
    size: dict[str, Any] = {"grid": grid, "channels": 4, "num_classes": 1000, **scales()[scale]}
    with without_memory():
        parameters = sum(parameter.numel() for parameter in DCDiT(**size).parameters())
    network = DCDiT(**size).to(memory_format=torch.channels_last)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))  # zero-initialised parts make all positions alike
    cells, shared = [], 0.0
    for half in (False, True):
        whole, less, shared = activations(network, kept, half)
        cells += [f"{whole / 1e6:,.0f}", f"{less / 1e6:,.0f}"]
    held = sum(COPIES.values()) * parameters / 1e9
    return [scale.upper(), f"{parameters / 1e6:,.1f}M", f"{held:.2f}", f"{shared / 1e9:.2f}", *cells]


def main() -> int:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scales", nargs="+", default=["s", "b", "l", "xl"], choices=list(scales()))
    parser.add_argument("--grid", type=int, default=32, help="side of the latent grid: 32 for 256px, 64 for 512px")
    parser.add_argument("--kept", type=float, default=0.25, help="share of the positions that the router keeps")
    options = parser.parse_args()
    print(f"DC-DiT, {8 * options.grid}px, {options.kept:.0%} kept; torch {torch.__version__}\n")
    print(f"| | parameters | {', '.join(COPIES)}, GB | bf16 copies, GB | float32, MB a sample | checkpointed |", end="")
    print(" bf16, MB a sample | checkpointed |\n| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
    for scale in options.scales:
        with patch("dcdit.network.attention.has_amx", lambda: True):  # attention in the precision at hand
            print(f"| {' | '.join(measure(scale, options.grid, options.kept))} |", flush=True)
        gc.collect()
    return 0


if __name__ == "__main__":
    sys.exit(main())
