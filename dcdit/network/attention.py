"""Attention within each sample of a packed sequence, behind one interface.

All backends compute the same thing. ``sdpa`` runs anywhere, in any precision, and is the oracle; ``varlen`` and
``flash_attn`` need a CUDA device and half precision and read the sample borders from the device.
"""

import importlib.util
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dcdit.errors import UserError
from dcdit.network.packing import Packing
from dcdit.runtime.devices import has_amx
from dcdit.runtime.imports import remedy_for

Backend = Literal["auto", "sdpa", "varlen", "flash_attn"]


_SHORT = 48
"""Longest sample that the SDPA form pads."""


def runs_in_float32(device: str, dtype: torch.dtype) -> bool:
    """Whether attention on a kind of device runs in float32 where its queries have this type.

    Without AMX the fused CPU kernel is slower in bfloat16 than in float32, its backward pass several times.
    """
    return dtype == torch.float32 or (device == "cpu" and not (dtype == torch.bfloat16 and has_amx()))


def _sdpa(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    if q.dtype != torch.float32 and runs_in_float32(q.device.type, q.dtype):
        # autocast would undo the conversion
        with torch.autocast("cpu", enabled=False):
            return _sdpa(q.float(), k.float(), v.float(), packing).to(q.dtype)
    if not packing.lengths:
        return _padded_sdpa(q, k, v, packing, packing.bound)
    lengths = [length for length in packing.lengths if length]
    batch, longest = len(lengths), max(lengths)
    if longest * batch == q.shape[0]:  # equal lengths: one dense call
        dense = (x.unflatten(0, (batch, longest)).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*dense).transpose(1, 2).flatten(0, 1)
    if longest <= _SHORT:
        return _padded_sdpa(q, k, v, packing, longest)
    outputs = []
    for parts in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
        heads_first = (x.transpose(0, 1)[None] for x in parts)
        outputs.append(F.scaled_dot_product_attention(*heads_first)[0].transpose(0, 1))
    return torch.cat(outputs)


def _padded_sdpa(q: Tensor, k: Tensor, v: Tensor, packing: Packing, longest: int) -> Tensor:
    """All segments in one masked call; a call for each costs more than short padding (2 to 4 times at 16 to 36)."""
    borders, segment, token = packing.cu_seqlens.long(), packing.sample, torch.arange(len(q), device=q.device)
    if packing.valid is not None:  # padding has segments of its own
        segment = torch.searchsorted(borders, token, right=True) - 1
    segments = len(borders) - 1
    slot = segment * longest + token - borders[:-1].index_select(0, segment)

    def pad(x: Tensor) -> Tensor:  # (T, heads, d_head) -> (segments, heads, longest, d_head)
        padded = x.new_zeros(segments * longest, *x.shape[1:]).index_copy(0, slot, x)
        return padded.unflatten(0, (segments, longest)).transpose(1, 2)

    used = torch.zeros(segments * longest, dtype=torch.bool, device=q.device).index_fill(0, slot, True)
    mask = used.view(segments, 1, 1, longest)
    out = F.scaled_dot_product_attention(pad(q), pad(k), pad(v), attn_mask=mask)
    return out.transpose(1, 2).flatten(0, 1).index_select(0, slot)


def _varlen(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    borders, bound = packing.cu_seqlens, packing.bound
    out = varlen_attn(q, k, v, borders, borders, bound, bound)
    assert isinstance(out, Tensor)
    return out


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    # Not an import statement: diffusers would tell whoever loads an exported folder to install the package.
    flash_attn_varlen_func = importlib.import_module("flash_attn").flash_attn_varlen_func

    borders, bound = packing.cu_seqlens, packing.bound
    return flash_attn_varlen_func(q, k, v, borders, borders, bound, bound)


_BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, Packing], Tensor]] = {
    "sdpa": _sdpa,
    "varlen": _varlen,
    "flash_attn": _flash_attn,
}


_MODULES = {"varlen": "torch.nn.attention.varlen", "flash_attn": "flash_attn"}
_MISSING = frozenset(name for name, module in _MODULES.items() if importlib.util.find_spec(module) is None)
"""Backends that are not installed, looked for once: the compiler traces no search."""


def check_installed(backend: Backend) -> None:
    """Raise :class:`UserError` if ``backend`` is not installed."""
    if backend != "auto" and backend in _MISSING:
        remedy = remedy_for("flash_attn") if backend == "flash_attn" else "torch 2.10 or newer: install it"
        raise UserError(f"attention={backend!r} needs {remedy}, or set attention=auto")


def resolve_backend(backend: str, tensor: Tensor) -> str:
    """The backend that runs for queries like ``tensor``.

    ``auto`` takes torch's own variable-length attention on a CUDA device in half precision, then flash-attn, and the
    SDPA form everywhere else.

    Raises:
        UserError: if an explicitly chosen backend cannot run on the tensor's device or precision.
    """
    fast = tensor.is_cuda and tensor.dtype in (torch.float16, torch.bfloat16)
    if backend == "auto":
        return next((name for name in ("varlen", "flash_attn") if fast and name not in _MISSING), "sdpa")
    if backend != "sdpa" and not fast:
        raise UserError(
            f"attention={backend!r} needs a CUDA device in float16 or bfloat16, got {tensor.dtype} on {tensor.device}:"
            " train with trainer=gpu (bf16-mixed), or set attention=auto"
        )
    return backend


def head_width(width: int, heads: int, rotary: bool = False) -> int:
    """Channels of each of the attention ``heads`` of tokens of ``width`` D.

    Raises:
        UserError: if the heads do not divide the width, or, with ``rotary`` positions, have no multiple of 4 channels.
    """
    multiple = 4 if rotary and width % heads == 0 else 1
    if width % (heads * multiple) == 0:
        return width // heads
    fitting = [h for h in range(1, width + 1) if width % (h * multiple) == 0]
    remedy = f"take heads={min(fitting, key=lambda h: abs(h - heads))}, or " if fitting else "take "
    if multiple == 1:
        raise UserError(f"heads={heads} does not divide width={width}: {remedy}a width that is a multiple of {heads}")
    raise UserError(
        f"position='rope' needs heads of a multiple of 4 channels, and width={width} with heads={heads} makes heads of"
        f" {width // heads}: {remedy}a width that is a multiple of {4 * heads}, or position='table'"
    )


def packed_attention(q: Tensor, k: Tensor, v: Tensor, packing: Packing, backend: str = "auto") -> Tensor:
    """Softmax attention with scale d_head ** -0.5, each token attending to its own sample only.

    Args:
        q, k, v: (T, heads, d_head), one dtype.
        packing: sample borders.
        backend: one of :data:`Backend`.

    Returns:
        (T, heads, d_head).
    """
    return _BACKENDS[resolve_backend(backend, q)](q, k, v, packing)
