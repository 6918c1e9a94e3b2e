"""Where the time of a step goes, and how near it is to what the machine's matrix units can do.

    python benchmarks/step.py                                              DC-DiT-B, 256px, float32
    python benchmarks/step.py --scale xl --batch 64 --precision bf16 --device cuda --compile
    python benchmarks/step.py --capacity 0.3                               beside it, a packed sequence of fixed length
    python benchmarks/step.py --check                                      fails where an optimisation is lost

Needs torch alone. An untrained network, its router set so that it keeps a given share of the very input that
is measured. All variants take turns, and times are medians over the rounds: compare ratios within a run, never across.
On a GPU float32 is float32: TF32 is off, for convolutions too, unless ``--tf32`` asks for it.
"""

import argparse
import math
import platform
import statistics
import sys
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dcdit.compute.flops import count
from dcdit.network import DCDiT, DiT, dcdit
from dcdit.network.dechunk import dechunk
from dcdit.network.execution import set_execution
from dcdit.network.interface import Output
from dcdit.network.packing import make_packing, static_size
from dcdit.network.routing import PredictabilityRouter
from dcdit.runtime.memory import configure_memory
from dcdit.settings.published import published_scales

DROPS = (0.2, 0.5, 0.8)
LEAST = 0.01
"""Seconds between two readings of the clock around products: a product of a few microseconds is repeated."""
MIB = 2.0**20

TINY = {"tiny": {"width": 256, "depth": 2, "heads": 4}}
"""A scale at which a command takes seconds on any machine: whether it runs, not how fast."""

Function = Callable[..., Any]


def scales() -> dict[str, dict[str, int]]:
    """Width, depth and heads of the published scales, and of a tiny one."""
    return {**published_scales(), **TINY}


class Clock:
    """Times parts of a forward pass, device time included."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    def now(self) -> float:
        """Seconds, all work that was handed to the device done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def timed(self, name: str, function: Function) -> Function:
        """``function``, its time added to the part called ``name``."""

        def call(*arguments: Any) -> Any:
            begin = self.now()
            result = function(*arguments)
            self.seconds[name] = self.seconds.get(name, 0.0) + self.now() - begin
            return result

        return call


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made within it held at one time, on any device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live, self.peak = 0, 0
        self._known: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func`` and count the storages that are new."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage() not in self._known:
                storage = leaf.untyped_storage()
                self._known[storage] = storage.nbytes()
                self.live += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
                self.peak = max(self.peak, self.live)
        return result

    def _freed(self, size: int) -> None:
        self.live -= size


@contextmanager
def instrumented(network: DCDiT, clock: Clock) -> Iterator[None]:
    """Let ``clock`` time the parts of ``network``."""
    parts: list[tuple[Any, str, str]] = [
        (network.condition, "forward", "conditioning"),
        (network.embed, "forward", "encoder and decoder"),
        (network.encoder, "forward", "encoder and decoder"),
        (network, "route", "router"),
        (dcdit, "make_packing", "chunk"),
        (dcdit, "make_static_packing", "chunk"),
        (dcdit, "pack", "chunk"),
        (network.backbone, "forward", "backbone"),
        (dcdit, "dechunk", "de-chunk"),
        (network.residual, "forward", "residual projection"),
        (network.decoder, "forward", "encoder and decoder"),
        (network.output, "forward", "output"),
    ]
    before = [getattr(owner, attribute) for owner, attribute, _ in parts]
    for (owner, attribute, name), function in zip(parts, before, strict=True):
        setattr(owner, attribute, clock.timed(name, function))
    try:
        yield
    finally:
        for (owner, attribute, _), function in zip(parts, before, strict=True):
            if isinstance(owner, nn.Module):
                delattr(owner, attribute)  # the class's own shows again
            else:
                setattr(owner, attribute, function)


def keep_share(network: DCDiT, inputs: tuple[Tensor, Tensor, Tensor], share: float) -> tuple[int, ...]:
    """Set the router so that it keeps ``share`` of ``inputs`` (x, t, y); returns the tokens kept of each sample."""
    assert isinstance(network.router, PredictabilityRouter)
    bias = network.router.scorer[-1].bias
    assert isinstance(bias, Tensor)
    with torch.no_grad():
        prob = network(*inputs).routing.prob
        bias.sub_(prob[prob < 1].logit().quantile(1 - share))  # those always kept have probability 1
        return tuple(network(*inputs).routing.mask.sum(1).tolist())


class Bench:
    """The networks, their input, and what is measured on them."""

    def __init__(self, options: argparse.Namespace, **blocks: Any) -> None:
        self.options = options
        self.device = torch.device(options.device)
        self.clock = Clock(self.device)
        torch.manual_seed(0)
        sigma = 2.0 if options.grid > 32 else 1.0
        size: dict[str, Any] = {"grid": options.grid, "channels": 4, "num_classes": 1000}
        size |= {**scales()[options.scale], **blocks}
        with self.device:
            self.network, self.plain = DCDiT(**size, smoothing_sigma=sigma), DiT(**size)
            batch = options.batch
            self.x = torch.randn(batch, 4, options.grid, options.grid)
            self.t, self.y = torch.randint(1000, (batch,)), torch.randint(1000, (batch,))
        self.network.eval()
        self.plain.eval()
        self.network.to(memory_format=torch.channels_last)
        self.network.router_tf32 = options.tf32
        self.memory: dict[str, float] = {}
        with torch.no_grad():
            for parameter in (*self.network.parameters(), *self.plain.parameters()):
                parameter.add_(0.02 * torch.randn_like(parameter))  # zero-initialised parts make all positions alike
        self.lengths = self.keep(options.kept)
        for network in (self.network, self.plain):
            set_execution(network, options.compile, options.checkpointing)

    def keep(self, share: float) -> tuple[int, ...]:
        """Set the router so that it keeps ``share`` of the input; returns the tokens kept of each sample."""
        with self.precision():
            return keep_share(self.network, (self.x, self.t, self.y), share)

    def precision(self) -> torch.autocast:
        """Autocast to bf16 where asked for."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.precision == "bf16")

    def seconds(self, function: Function) -> float:
        """Time of one call."""
        begin = self.clock.now()
        function()
        return self.clock.now() - begin

    def most_memory(self, network: nn.Module, optimizer: torch.optim.Optimizer | None, function: Function) -> float:
        """The most bytes on a GPU in one call, with those of ``network`` and ``optimizer``, without all others."""
        own = [*network.parameters(), *network.buffers()]
        own += [leaf for leaf in tree_leaves(dict(optimizer.state) if optimizer else {}) if isinstance(leaf, Tensor)]
        held = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        function()
        more = torch.cuda.max_memory_allocated(self.device) - held
        return more + float(sum(tensor.nbytes for tensor in own if tensor.is_cuda))

    def forward(self, network: nn.Module, drop: float = 0.0, capacity: float | None = None) -> None:
        """A forward pass without gradients."""
        with torch.no_grad(), self.precision():
            network(self.x, self.t, self.y, drop, capacity=capacity)

    def train(
        self, network: nn.Module, optimizer: torch.optim.Optimizer, drop: float = 0.0, capacity: float | None = None
    ) -> None:
        """A training step: forward, backward, AdamW."""
        with self.precision():
            output: Output = network(self.x, self.t, self.y, drop, capacity=capacity)
        loss = output.prediction.float().square().mean()
        if output.routing is not None:
            loss = loss + 0.03 * output.routing.prob.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def peak_matmul(self) -> Function:
        """A product as large as the widest of the backbone: the time that its FLOPs take at best."""
        width = self.network.residual.in_features
        dtype = torch.bfloat16 if self.options.precision == "bf16" else torch.float32
        a = torch.randn(sum(self.lengths), width, dtype=dtype, device=self.device)
        b = torch.randn(4 * width, width, dtype=dtype, device=self.device)
        self.matmul_flops = 2.0 * a.numel() * 4 * width
        return lambda: nn.functional.linear(a, b)

    def dechunk_bytes(self) -> tuple[float, float]:
        """Most bytes that live at once in de-chunking, forward and with backward."""
        features = torch.randn(sum(self.lengths), self.network.residual.in_features, device=self.device)
        with torch.no_grad(), self.precision():
            routing = self.network(self.x, self.t, self.y).routing
        packing = make_packing(routing.mask)
        arguments = (routing, packing, self.network.grid, self.network.smoothing_sigma)
        found = []
        for backward in (False, True):
            tokens = features.clone().requires_grad_(backward)
            with LiveBytes() as mode:
                spread = dechunk(tokens, *arguments)
                if backward:
                    spread.sum().backward()
            found.append(float(mode.peak))
            del spread
        return found[0], found[1]

    def measure(self) -> tuple[dict[str, float], dict[str, float]]:
        """Medians in seconds: of whole steps, and of the parts of a forward pass."""
        matmul = self.peak_matmul()
        optimizers = [
            torch.optim.AdamW(network.parameters(), lr=0.0, fused=True) for network in (self.network, self.plain)
        ]
        matmul()
        products = max(8, math.ceil(LEAST / self.seconds(matmul)))
        whole: dict[str, Function] = {
            "matmul": lambda: [matmul() for _ in range(products)],
            "forward": lambda: self.forward(self.network),
            **{f"drop {drop}": lambda drop=drop: self.forward(self.network, drop) for drop in DROPS},
            "plain forward": lambda: self.forward(self.plain),
            "train": lambda: self.train(self.network, optimizers[0]),
            "plain train": lambda: self.train(self.plain, optimizers[1]),
        }
        if self.options.capacity:
            fixed = {"capacity": self.options.capacity}
            whole["forward, fixed length"] = lambda: self.forward(self.network, **fixed)
            whole["train, fixed length"] = lambda: self.train(self.network, optimizers[0], **fixed)
        times: dict[str, list[float]] = {}
        parts: dict[str, list[float]] = {}
        for turn in range(self.options.rounds + self.options.warmup):
            counted = turn >= self.options.warmup
            for name, function in whole.items():
                spent = self.seconds(function)
                if counted:
                    times.setdefault(name, []).append(spent)
            self.clock.seconds = {}
            with instrumented(self.network, self.clock):
                self.forward(self.network)
            for name, spent in self.clock.seconds.items():
                if counted:
                    parts.setdefault(name, []).append(spent)
        if self.device.type == "cuda":
            for name, function in whole.items():
                plain, trains = name.startswith("plain"), "train" in name
                network = self.plain if plain else self.network
                self.memory[name] = self.most_memory(network, optimizers[plain] if trains else None, function)
        median = {name: statistics.median(found) for name, found in times.items()}
        median["matmul"] /= products
        return median, {name: statistics.median(found) for name, found in parts.items()}

    def measure_graphs(self, training: bool) -> tuple[float, float]:
        """Medians in seconds of a step of fixed length: as it is, and whole in one graph, on a GPU one CUDA graph."""
        compiled = torch.compile(self.network, fullgraph=True, mode="reduce-overhead")
        optimizer = torch.optim.AdamW(self.network.parameters(), lr=0.0, fused=True)

        def step(network: Any) -> None:
            torch.compiler.cudagraph_mark_step_begin()
            # compiled as a whole, the blocks are not compiled a second time
            set_execution(self.network, self.options.compile and network is not compiled, self.options.checkpointing)
            capacity = self.options.capacity
            if training:
                self.train(network, optimizer, capacity=capacity)
            else:
                self.forward(network, capacity=capacity)

        times: tuple[list[float], list[float]] = [], []
        for turn in range(self.options.rounds + max(3, self.options.warmup)):  # compiled, recorded, replayed
            for network, kept in zip((self.network, compiled), times, strict=True):
                spent = self.seconds(lambda network=network: step(network))
                if turn >= max(3, self.options.warmup):
                    kept.append(spent)
        return statistics.median(times[0]), statistics.median(times[1])


def dropped(lengths: tuple[int, ...], drop: float) -> list[int]:
    """Tokens left of each sample."""
    return [length - int(torch.tensor(length * drop, dtype=torch.float32)) for length in lengths]


def grouped(components: dict[str, float]) -> dict[str, float]:
    """Counted FLOPs under the names that times have."""
    names = dict.fromkeys(("embedding", "encoder", "decoder"), "encoder and decoder")
    found: dict[str, float] = {}
    for name, value in components.items():
        found[names.get(name, name)] = found.get(names.get(name, name), 0.0) + value
    return found


def report(bench: Bench) -> dict[str, float]:
    """Measure, print as Markdown, and return the ratios."""
    options, network, batch = bench.options, bench.network, bench.options.batch
    times, parts = bench.measure()
    flops = count(network, bench.lengths)
    per_component = grouped(dict(flops.components))
    assert per_component.keys() <= parts.keys(), f"no times for {per_component.keys() - parts.keys()}"
    rate = bench.matmul_flops / times["matmul"]
    memory = bench.dechunk_bytes()
    how = [name for name in ("compile", "checkpointing", "tf32") if getattr(options, name)]
    print(heading(options, f"batches of {batch}", *how))
    print(f"Kept {sum(bench.lengths) / batch / options.grid**2:.1%}; a product of {sum(bench.lengths)} tokens with the")
    print(f"MLP's first matrix runs at {rate / 1e9:,.0f} GFLOP/s, the peak matmul throughput here.\n")

    def line(*cells: str) -> None:
        print(f"| {' | '.join(cells)} |")

    total = sum(parts.values())
    line("part of a forward pass", "ms/image", "of the time", "GFLOP/image", "of peak matmul")
    line("---", "---:", "---:", "---:", "---:")
    for name, spent in parts.items():
        work = per_component.get(name, 0.0)
        near = f"{work * batch / spent / rate:.0%}" if work else "-"
        line(name, f"{1e3 * spent / batch:.2f}", f"{spent / total:.1%}", f"{work / 1e9:.2f}", near)
    work, whole = flops.total, times["forward"]
    line(
        "whole, not taken apart", f"{1e3 * whole / batch:.2f}", "", f"{work / 1e9:.2f}", share(work, batch, whole, rate)
    )
    print()
    line("step", "ms/image", "against forward", "its FLOPs", "of peak matmul", "most memory, MiB")
    line("---", "---:", "---:", "---:", "---:", "---:")
    plain = count(bench.plain).total
    rows = {"forward": work, **{f"drop {d}": count(network, dropped(bench.lengths, d)).total for d in DROPS}}
    rows |= {"train": 3 * work, "plain forward": plain, "plain train": 3 * plain}
    rows |= {name: rows[name.partition(",")[0]] for name in times if name.endswith("fixed length")}
    for name, counted in rows.items():
        spent = times[name]
        cells = (f"{1e3 * spent / batch:.2f}", f"{spent / whole:.2f}", f"{counted / work:.2f}")
        held = f"{bench.memory[name] / MIB:,.0f}" if name in bench.memory else "-"
        line(name.replace("plain", "DiT/2"), *cells, share(counted, batch, spent, rate), held)
    print(f"\nDe-chunk holds {memory[0] / MIB:.0f} MiB at once, {memory[1] / MIB:.0f} MiB with its backward pass.")
    if options.capacity:
        size = static_size(options.capacity, batch, options.grid**2)
        kept = sum(bench.lengths)
        print(f"The fixed length has room for {size} tokens; {max(0, kept - size)} of {kept} were dropped.")
    sys.stdout.flush()
    return {
        "peak matmul": work * batch / whole / rate,
        "drop": times["drop 0.5"] / whole / (rows["drop 0.5"] / work),
        "train": times["train"] / whole,
        "de-chunk": parts["de-chunk"] / total,
        "memory": memory[1] / (batch * options.grid**2 * network.residual.in_features * 4),
    }


def report_graphs(bench: Bench) -> None:
    """Measure and print what compiling the whole network saves; where it fails, say how, and go on."""
    print("\n| whole network compiled, fixed length | ms/image | of the time without | compiled in all, s |")
    print("| --- | ---: | ---: | ---: |")
    for training in (False, True):
        name, begin = "training step" if training else "forward pass", time.perf_counter()
        try:
            without, graph = bench.measure_graphs(training)
        except Exception:  # of the compiler, which has many
            print(f"| {name} | failed | | |\n\n```\n{traceback.format_exc()[-1500:]}```", flush=True)
            return
        spent = time.perf_counter() - begin
        ms = 1e3 * graph / bench.options.batch
        print(f"| {name} | {ms:.2f} | {graph / without:.2f} | {spent:.0f} |", flush=True)


def share(flops: float, batch: int, seconds: float, rate: float) -> str:
    """Of the peak matmul throughput."""
    return f"{flops * batch / seconds / rate:.0%}"


def heading(options: argparse.Namespace, *words: str) -> str:
    """What is measured, on what, with what, when."""
    device = torch.device(options.device)
    measured = (f"DC-DiT-{options.scale.upper()}", f"{8 * options.grid}px", options.precision, *words)
    return f"{', '.join(measured)}; {machine(device)}; torch {torch.__version__}; {time.strftime('%Y-%m-%d')}\n"


def machine(device: torch.device) -> str:
    """Name of the GPU, or of the CPU and how many threads it runs."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo") as file:
            name = next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


# Ratio, the most (or least) that it may be, and what is lost beyond. Wide, for machines on which other things run.
CHECKS = [
    ("drop", "<", 1.5, "dropped tokens are paid for"),
    ("train", "<", 5.0, "the backward pass is slow"),
    ("de-chunk", "<", 0.12, "de-chunk is slow"),
    ("memory", "<", 6.0, "de-chunk holds more than a few copies of the grid's features"),
    ("peak matmul", ">", 0.3, "the forward pass is far from the peak matmul throughput"),
]


def check(ratios: dict[str, float]) -> int:
    """Print what is lost; the exit status."""
    lost = 0
    for name, sense, bound, words in CHECKS:
        wrong = ratios[name] > bound if sense == "<" else ratios[name] < bound
        print(f"{name}: {ratios[name]:.2f} (bound {bound}){' LOST: ' + words if wrong else ''}")
        lost += wrong
    return int(lost > 0)


def read_options(description: str | None) -> argparse.Namespace:
    """Read the command line, and set torch as it says."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", default="b", choices=list(scales()))
    parser.add_argument("--grid", type=int, default=32, help="side of the latent grid: 32 for 256px, 64 for 512px")
    parser.add_argument("--kept", type=float, default=0.25, help="share of the positions that the router keeps")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="fuse the blocks' element-wise operations")
    parser.add_argument("--checkpointing", action="store_true", help="activation checkpointing of the blocks")
    parser.add_argument("--capacity", type=float, help="measure, beside, a packed sequence with room for this share")
    parser.add_argument(
        "--graphs",
        action=argparse.BooleanOptionalAction,
        help="with --capacity: measure the whole network compiled, on a GPU as CUDA graphs (there the default)",
    )
    parser.add_argument("--tf32", action="store_true", help="let float32 products and convolutions run in TF32")
    parser.add_argument("--check", action="store_true", help="a small network; exit status 1 if a ratio is far off")
    options = parser.parse_args()
    if not 0 < options.kept <= 1:
        parser.error(f"--kept {options.kept:g} is not a share: take one above 0 and up to 1")
    if options.capacity is not None and not 0 < options.capacity <= 1:
        parser.error(f"--capacity {options.capacity:g} is not a share: take one above 0 and up to 1")
    if options.grid < 2 or options.grid % 2:
        parser.error(f"--grid {options.grid} does not suit the patches of DiT/2: take an even number")
    if min(options.batch, options.rounds) < 1:
        parser.error(f"--batch {options.batch}, --rounds {options.rounds}: take at least 1 of each")
    if options.check:
        options.scale, options.batch, options.rounds, options.warmup = "s", 4, 5, 1
    configure_memory()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = options.tf32
    return options


def main() -> int:
    """Measure and print."""
    options = read_options(__doc__)
    bench = Bench(options)
    ratios = report(bench)
    if options.capacity and (bench.device.type == "cuda" if options.graphs is None else options.graphs):
        report_graphs(bench)
    if options.check:
        print()
        return check(ratios)
    return 0


if __name__ == "__main__":
    sys.exit(main())
