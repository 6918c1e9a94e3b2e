"""Which form of attention is the fastest here, over samples of different lengths: what ``attention=auto`` should take.

    python benchmarks/attention.py                                         DC-DiT-B, 256px, float32
    python benchmarks/attention.py --scale xl --batch 64 --precision bf16

Needs torch and timm alone. All forms take turns, times are medians: compare within a run, never across. The clock is
read around as many calls as fill some milliseconds. GFLOP/s count the products of the forward pass, and 3.5 times as
many with the backward pass, as is customary.
"""

import argparse
import math
import statistics
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from step import Clock, heading, scales
from torch import Tensor

from dcdit.errors import UserError
from dcdit.network.attention import check_installed, packed_attention, resolve_backend
from dcdit.network.packing import Packing, make_packing
from dcdit.runtime.memory import configure_memory

Form = Callable[[Tensor, Tensor, Tensor, Packing], Tensor]


LEAST, MOST_CALLS = 0.01, 1000
"""Seconds between two readings of the clock, and the calls that may be made for that."""


def lengths_of(packing: Packing) -> tuple[int, ...]:
    """Tokens of each sample."""
    assert packing.lengths is not None
    return packing.lengths


def padded(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    """Every sample padded to the longest: what a form without packing pays."""
    lengths = lengths_of(packing)

    def pad(x: Tensor) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(list(x.split(lengths)), batch_first=True).transpose(1, 2)

    at = torch.arange(max(lengths), device=q.device)
    mask = at < packing.cu_seqlens.diff()[:, None]
    out = F.scaled_dot_product_attention(pad(q), pad(k), pad(v), attn_mask=mask[:, None, None])
    return out.transpose(1, 2)[mask]


def each(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    """One call for each sample, in the precision of its input."""
    with torch.autocast(q.device.type, enabled=False):
        parts = zip(*(x.split(lengths_of(packing)) for x in (q, k, v)), strict=True)
        outs = [F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in part)) for part in parts]
    return torch.cat([out[0].transpose(0, 1) for out in outs])


def candidates(sample: Tensor) -> dict[str, str]:
    """Names, and why they cannot run for tensors like ``sample``; the reason is empty for those that can."""
    found = {}
    for name in ("sdpa", "varlen", "flash_attn"):
        found[name] = ""
        try:
            check_installed(name)
            resolve_backend(name, sample)
        except UserError as error:
            found[name] = str(error).partition(":")[0]
    return found


def time_calls(clock: Clock, function: Callable[[], object], calls: int) -> float:
    """Seconds of one of so many calls."""
    begin = clock.now()
    for _ in range(calls):
        function()
    return (clock.now() - begin) / calls


def calls_for(seconds: float) -> int:
    """How many calls of so many seconds are timed together."""
    return min(MOST_CALLS, math.ceil(LEAST / max(seconds, 1e-9)))


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", default="b", choices=list(scales()))
    parser.add_argument("--grid", type=int, default=32, help="side of the latent grid: 32 for 256px, 64 for 512px")
    parser.add_argument("--kept", type=float, default=0.25, help="mean share of the positions that is kept")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=2)
    return parser.parse_args()


def main() -> None:
    """Measure and print as Markdown."""
    options = parse_options()
    configure_memory()
    torch.manual_seed(0)
    scale = scales()[options.scale]
    width, heads = scale["width"], scale["heads"]
    device, positions = torch.device(options.device), options.grid**2
    # Shares between half and one and a half times the mean, as the samples of a batch differ.
    shares = options.kept * (0.5 + torch.rand(options.batch, 1, device=device))
    packing = make_packing(torch.rand(options.batch, positions, device=device) < shares)
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    qkv = torch.randn(len(packing.index), 3 * width, dtype=dtype, device=device, requires_grad=True)
    upstream = torch.randn(len(packing.index), heads, width // heads, dtype=dtype, device=device)
    kept = lengths_of(packing)
    work = 4.0 * width * sum(length**2 for length in kept)

    found = candidates(qkv)
    chosen = resolve_backend("auto", qkv)
    forms: dict[str, Form] = {
        name: partial(packed_attention, backend=name) for name, reason in found.items() if not reason
    }
    forms |= {"a call for each sample": each, "padded": padded}
    clock = Clock(device)

    def forward_of(form: Form) -> Tensor:
        q, k, v = qkv.unflatten(1, (3, heads, -1)).unbind(1)
        return form(q, k, v, packing)

    def both_of(form: Form) -> object:
        return torch.autograd.grad(forward_of(form), qkv, upstream)

    timed = {(name, part): partial(part, form) for name, form in forms.items() for part in (forward_of, both_of)}
    times: dict[object, list[float]] = {key: [] for key in timed}
    calls = dict.fromkeys(timed, 1)
    for turn in range(options.rounds + options.warmup):
        for key, function in timed.items():
            spent = time_calls(clock, function, calls[key])
            if turn >= options.warmup:
                times[key].append(spent)
            else:  # the last of these counts, which nothing makes slow that happens once
                calls[key] = calls_for(spent)

    lengths = f"{options.batch} samples of {min(kept)} to {max(kept)} tokens"
    print(heading(options, lengths, f"{heads} heads"))
    print("| form | forward, ms | GFLOP/s | with backward, ms | GFLOP/s |\n| --- | ---: | ---: | ---: | ---: |")
    for name in forms:
        one, two = (statistics.median(times[name, part]) for part in (forward_of, both_of))
        label = f"{name} (auto)" if name == chosen else name
        rates = (work / one / 1e9, 3.5 * work / two / 1e9)
        print(f"| {label} | {1e3 * one:.2f} | {rates[0]:,.0f} | {1e3 * two:.2f} | {rates[1]:,.0f} |")
    for name, reason in found.items():
        if reason:
            print(f"\n{name} does not run: {reason}.")


if __name__ == "__main__":
    main()
