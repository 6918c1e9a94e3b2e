"""How a network runs, which changes nothing in what it computes: compiled, checkpointed, in which precision.

docs/performance.md has the table of what is float32, and why.
"""

from typing import Literal

import torch
from torch import nn

from dcdit.network.attention import runs_in_float32
from dcdit.network.blocks import blocks_of
from dcdit.network.interface import Network
from dcdit.runtime.devices import has_amx, has_compiler


def set_execution(network: nn.Module, compiled: bool = False, checkpointed: bool = False) -> None:
    """Say how the transformer blocks of ``network`` run; what they compute stays the same.

    Args:
        network: with :class:`dcdit.network.blocks.DiTBlock` inside.
        compiled, checkpointed: see there.
    """
    for block in blocks_of(network):
        block.compiled, block.checkpointed = compiled, checkpointed


def describe_execution(network: nn.Module, device: str, precision: object) -> str:
    """Say how a network runs, such as ``cpu bf16 (attention in float32), compiled blocks``.

    Args:
        network: after :func:`set_execution`.
        device: kind of device.
        precision: as the user knows it, such as ``bf16-mixed`` or ``fp32``.
    """
    blocks = blocks_of(network)
    apart = bool(blocks) and "bf16" in str(precision) and runs_in_float32(device, torch.bfloat16)
    compiled = ", compiled blocks (a minute at the first steps)" if any(block.compiled for block in blocks) else ""
    return f"{device} {precision}" + (" (attention in float32)" if apart else "") + compiled


_LARGE = 30_000_000
"""Parameters from which on a network gains more by compiling than that takes: those of S at the least."""


def is_compiled(network: Network, device: str, half: bool, choice: Literal["auto"] | bool) -> bool:
    """Whether the blocks of a network are to be compiled.

    ``auto`` compiles large networks on a CPU with matrix units for bfloat16 and a compiler: compiled blocks run 1.4
    times as fast on a Xeon with AMX, 1.04 times on an EPYC without. It leaves networks with width gates uncompiled.

    Args:
        network: that will run.
        device: kind of device, such as ``cpu``.
        half: whether products run in bfloat16.
        choice: what the user asks for, see :meth:`Network.check_compiled`.
    """
    if choice != "auto":
        return choice
    large = sum(parameter.numel() for parameter in network.parameters()) >= _LARGE
    return network.gates is None and large and half and device == "cpu" and has_amx() and has_compiler(device)


def hold_products_in(network: Network, dtype: torch.dtype) -> None:
    """Convert the weights that autocast would convert at every call, for a network that is not trained any more.

    What the network computes under autocast to ``dtype`` stays the same, bit for bit, and these weights take half the
    memory. Without autocast the network cannot run any more.

    Args:
        network: changed in place. Its :attr:`Network.float32_parts` and its gates stay as they are; where the parts are
            not known, all do.
        dtype: ``torch.bfloat16`` or ``torch.float16``.
    """
    if network.float32_parts is None:
        return
    float32 = {module for name in network.float32_parts for module in getattr(network, name).modules()}
    float32 |= set(() if network.gates is None else network.gates.modules())
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and module not in float32:
            module.to(dtype)
