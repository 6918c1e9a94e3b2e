"""Which tensors of a network are float32, whatever autocast says, and weights held in the precision of their products.

======================================= ========== ================================================================
tensor                                  precision  reason
======================================= ========== ================================================================
weights in training                     float32    the optimiser's small steps would be lost
products and convolutions               half       what matrix units are fast at
tokens between blocks, norms            float32    sums over many blocks; norms square their input
attention                               half       float32 on a CPU whose kernel is slower in half (no AMX)
router, its probabilities, tail drop    float32    published; a decision at 0.5 would flip by rounding
residual projection and gate            float32    published
de-chunk                                float32    published; weights differ by many orders of magnitude
loss and everything of the sampler      float32    differences of nearly equal numbers
======================================= ========== ================================================================
"""

import torch
from torch import nn

from dcdit.network.interface import Network


def hold_products_in(network: Network, dtype: torch.dtype) -> None:
    """Convert the weights that autocast would convert at every call, for a network that is not trained any more.

    What the network computes under autocast to ``dtype`` stays the same, bit for bit, and these weights take half the
    memory. Without autocast the network cannot run any more.

    Args:
        network: changed in place. Its :attr:`Network.float32_parts` stay as they are.
        dtype: ``torch.bfloat16`` or ``torch.float16``.
    """
    float32 = {module for name in network.float32_parts for module in getattr(network, name).modules()}
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and module not in float32:
            module.to(dtype)
