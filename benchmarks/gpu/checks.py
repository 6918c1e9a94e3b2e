"""Whether a GPU computes what the CPU does: in float32, TF32 and bf16, compiled, checkpointed, in a fixed length.

    python benchmarks/gpu/checks.py                                    on a GPU, DC-DiT-B
    python benchmarks/gpu/checks.py --device cpu --scale tiny          whether it runs

Prints Markdown. The exit status is the number of lines that are not as expected.
"""

import argparse
import copy
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))

from step import Bench
from support.configs import golden_folders, golden_network
from support.gpu import reads_of

from dcdit.checkpoints.load import load_model
from dcdit.diffusion.guidance import Guidance
from dcdit.diffusion.samplers import Sampler
from dcdit.diffusion.settings import DDIM, DPMSolver, GuidanceSettings
from dcdit.network import DCDiT
from dcdit.network.attention import resolve_backend
from dcdit.network.blocks import Attention
from dcdit.network.execution import set_execution
from dcdit.runtime.tensors import read_tensors
from dcdit.sampling.generate import generate


class Judge:
    """Counts what is not as expected.

    Attributes:
        unexpected: so many lines.
    """

    def __init__(self) -> None:
        self.unexpected = 0

    def __call__(self, fine: bool | None) -> str:
        """The last cell of a line; None where nothing is expected."""
        self.unexpected += fine is False
        return {None: "-", True: "yes", False: "**no**"}[fine]


def line(*cells: object) -> None:
    """A line of a table."""
    print(f"| {' | '.join(f'{cell:.1e}' if isinstance(cell, float) else str(cell) for cell in cells)} |", flush=True)


def head(*cells: str) -> None:
    """The first lines of a table."""
    line(*cells)
    line(*("---" for _ in cells))


@contextmanager
def tf32(convolutions: bool, products: bool) -> Iterator[None]:
    """Whether float32 may be rounded to TF32; torch's defaults are yes for convolutions and no for products."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32, matmul.allow_tf32 = convolutions, products
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before


def apart(found: Tensor, wanted: Tensor) -> float:
    """The norm of the difference over that of what is wanted."""
    wanted = wanted.to(found.device).double()
    return float((found.double() - wanted).norm() / wanted.norm())


def published_numbers(judge: Judge, options: argparse.Namespace) -> None:
    """The numbers in ``tests/golden``, which came from the reference."""
    folder, device = golden_folders()["mini"], torch.device(options.device)
    network = golden_network(read_tensors(folder / "state.safetensors"), heads=4).to(device)
    with np.load(folder / "io_in8.npz") as stored:
        data = {key: torch.from_numpy(stored[key]).to(device) for key in stored.files}
    inputs = data["in/x"], data["in/t"].long(), data["in/y"].long()
    head("arithmetic", "drop", "positions decided otherwise", "greatest difference", "as expected")
    for name, convolutions, bf16 in (
        ("float32", False, False),
        ("TF32 convolutions", True, False),
        ("bf16", True, True),
    ):
        for case, drop in (("a_drop0", 0.0), ("b_drop0.3", 0.3)):
            with torch.no_grad(), tf32(convolutions, False), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                output = network(*inputs, drop)
            wrong = int((output.routing.mask != data[f"{case}/boundary_mask"].bool()).sum())
            off = float((output.prediction.float() - data[f"{case}/out"]).abs().max())
            exact = not bf16 and not convolutions
            line(name, drop, wrong, off, judge(not wrong and off <= 1e-4 if exact else None))


@dataclass(frozen=True)
class Variant:
    """A way to run a training step, and what it is held against.

    Attributes:
        name: of it.
        beside: the name of another one, or ``CPU``.
        most: the difference that is allowed; None where it is only told.
        bf16, convolutions, products: arithmetic, see :func:`tf32`.
        backend: of the attention.
        compiled, checkpointed: see :func:`dcdit.network.execution.set_execution`.
        capacity: of a fixed length.
    """

    name: str
    beside: str
    most: float | None
    bf16: bool = True
    convolutions: bool = True
    products: bool = False
    backend: str = "auto"
    compiled: bool = False
    checkpointed: bool = False
    capacity: float | None = None


VARIANTS = [
    Variant("float32", "CPU", 1e-3, bf16=False, convolutions=False),
    Variant("float32 again", "float32", 1e-5, bf16=False, convolutions=False),
    Variant("float32, fixed length", "float32", 1e-4, bf16=False, convolutions=False, capacity=0.4),
    Variant("TF32 convolutions", "float32", None, bf16=False),
    Variant("TF32 everywhere", "float32", None, bf16=False, products=True),
    Variant("bf16, SDPA", "float32", None, backend="sdpa"),
    Variant("bf16", "bf16, SDPA", 3e-2),
    Variant("bf16 again", "bf16", 1e-2),
    Variant("bf16, checkpointed", "bf16", 1e-2, checkpointed=True),
    Variant("bf16, fixed length", "bf16", 3e-2, capacity=0.4),
    Variant("bf16, compiled", "bf16", 3e-2, compiled=True),
]

Outcome = tuple[Tensor, Tensor, Tensor]
"""Mask, prediction, and all gradients in one."""


def outcome(network: DCDiT, inputs: list[Tensor], variant: Variant) -> Outcome:
    """What a training step computes."""
    device = inputs[0].device
    set_execution(network, variant.compiled, variant.checkpointed)
    for module in network.modules():
        if isinstance(module, Attention):
            module.backend = variant.backend
    with tf32(variant.convolutions, variant.products):
        with torch.autocast(device.type, torch.bfloat16, enabled=variant.bf16):
            output = network(*inputs, capacity=variant.capacity)
        (output.prediction.float().square().mean() + 0.03 * output.routing.prob.mean()).backward()
    gradients = torch.cat(
        [parameter.grad.flatten() for parameter in network.parameters() if parameter.grad is not None]
    )
    network.zero_grad()
    return output.routing.mask, output.prediction.detach().float(), gradients


def bench_of(options: argparse.Namespace) -> tuple[DCDiT, list[Tensor]]:
    """A network that keeps a quarter of its input, and that input, on the CPU."""
    names: dict[str, Any] = {
        "device": "cpu",
        "grid": 16 if options.scale == "tiny" else 32,
        "precision": "fp32",
        "kept": 0.25,
    }
    names |= {"compile": False, "checkpointing": False, "tf32": False, "capacity": None}
    bench = Bench(argparse.Namespace(scale=options.scale, batch=options.batch, **names))
    return bench.network, [bench.x, bench.t, bench.y]


def variants(judge: Judge, options: argparse.Namespace) -> None:
    """A training step in many ways."""
    network, inputs = bench_of(options)
    found = {"CPU": outcome(network, inputs, Variant("", "", None, bf16=False))}
    device, gpu = torch.device(options.device), options.device != "cpu"
    there, inputs = copy.deepcopy(network).to(device), [tensor.to(device) for tensor in inputs]
    head("this", "beside", "positions decided otherwise", "prediction", "gradients", "seconds at first", "as expected")
    for variant in VARIANTS:
        if variant.compiled and not gpu:
            continue
        begin = time.perf_counter()
        found[variant.name] = mask, *values = outcome(there, inputs, variant)
        others = found[variant.beside]
        wrong = int((mask != others[0].to(device)).sum())
        off = [apart(value, other) for value, other in zip(values, others[1:], strict=True)]
        spent = f"{time.perf_counter() - begin:.1f}"
        fine = None if variant.most is None else max(off) <= variant.most and (not wrong or variant.beside == "CPU")
        line(variant.name, variant.beside, f"{wrong} of {mask.numel()}", *off, spent, judge(fine))


def host_reads(judge: Judge, options: argparse.Namespace) -> None:
    """What the host waits for in a training step: the lengths, and in a fixed length nothing."""
    network, inputs = bench_of(options)
    there, inputs = network.to(options.device), [tensor.to(options.device) for tensor in inputs]
    loss = torch.zeros(())

    def forward(capacity: float | None) -> None:
        nonlocal loss
        with torch.autocast("cuda", torch.bfloat16):
            loss = there(*inputs, capacity=capacity).prediction.float().square().mean()

    head("length", "part", "reads", "expected", "as expected")
    for name, capacity, wanted in (("exact", None, 1), ("fixed", 0.4, 0)):
        for _ in range(2):  # the first time, libraries start
            found = {
                "forward": reads_of(partial(forward, capacity)),
                "backward": reads_of(lambda: loss.backward()),
            }
        for part, reads in found.items():
            expected = wanted if part == "forward" else 0
            line(
                name,
                part,
                f"{len(reads)} {' '.join(reads[expected:])}".strip(),
                expected,
                judge(len(reads) == expected),
            )


def graphs(judge: Judge, options: argparse.Namespace) -> None:
    """How many graphs the compiler makes for many lengths."""
    network, inputs = bench_of(options)
    there, inputs = network.to(options.device), [tensor.to(options.device) for tensor in inputs]
    set_execution(there, compiled=True)
    torch._dynamo.reset()
    counter = torch._dynamo.utils.counters["stats"]
    head("five lengths of", "graphs", "expected", "seconds", "as expected")
    for name, training in (("inference", False), ("training, in addition", True)):
        before, begin = counter["unique_graphs"], time.perf_counter()
        for drop in (0.0, 0.1, 0.3, 0.5, 0.7):
            with torch.set_grad_enabled(training), torch.autocast("cuda", torch.bfloat16):
                prediction = there(*inputs, drop).prediction
            if training:
                prediction.float().square().mean().backward()
        made = counter["unique_graphs"] - before
        line(name, made, 2, f"{time.perf_counter() - begin:.1f}", judge(made == 2))


def samples(judge: Judge, options: argparse.Namespace) -> None:
    """The digits that come along, sampled on the device and on the CPU."""
    models = [load_model("digits"), load_model("digits", device=torch.device(options.device))]
    lite = GuidanceSettings(scale=2.0, uncond_drop_fraction=0.5)
    ways: list[tuple[str, Any, GuidanceSettings]] = [
        ("DDIM 10", DDIM(10), GuidanceSettings()),
        ("DPM++ 10, Lite-CFG", DPMSolver(10), lite),
        ("DDIM 10, cache 0.2", DDIM(10, cache=0.2), GuidanceSettings()),
    ]
    labels, numbers = torch.arange(options.count) % 10, range(options.count)
    head(
        "sampler",
        "arithmetic",
        "greatest difference of a pixel",
        "mean",
        "CPU, s",
        f"{options.device}, s",
        "as expected",
    )
    for name, settings, guided in ways:
        for precision in ("fp32", "bf16"):
            found, seconds = [], []
            for model, arithmetic in zip(models, ("fp32", precision), strict=True):
                guidance, begin = Guidance(model.network, model.network.null_class, guided), time.perf_counter()
                with tf32(False, False):
                    batches = generate(
                        model, guidance, Sampler(settings), labels, numbers, seed=0, batch_size=options.count,
                        precision=arithmetic,
                    )  # fmt: skip
                    found.append(torch.cat([batch.latents for batch in batches]))
                seconds.append(f"{time.perf_counter() - begin:.2f}")
            off = (found[0] - found[1]).abs()
            # a position decided otherwise moves a few pixels: the mean is judged
            fine = float(off.mean()) <= 0.02 if precision == "fp32" else None
            line(name, precision, float(off.max()), float(off.mean()), *seconds, judge(fine))


PARTS: list[tuple[str, Callable[[Judge, argparse.Namespace], None], bool]] = [
    ("The reference's numbers", published_numbers, False),
    ("A training step", variants, False),
    ("What the host waits for", host_reads, True),
    ("Graphs of the compiler", graphs, True),
    ("Samples", samples, False),
]


def main() -> int:
    """Check and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--scale", default="b")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--count", type=int, default=20, help="samples")
    options = parser.parse_args()
    judge = Judge()
    gpu = torch.device(options.device).type == "cuda"
    if gpu:
        print(f"Attention: {resolve_backend('auto', torch.ones(1, dtype=torch.bfloat16, device=options.device))}.")
    for title, part, needs_gpu in PARTS:
        if needs_gpu and not gpu:
            continue
        print(f"\n#### {title}\n", flush=True)
        begin = time.perf_counter()
        try:
            part(judge, options)
        except Exception:  # the other parts have something to say
            judge.unexpected += 1
            print(f"\n**failed**\n\n```\n{traceback.format_exc()[-3000:]}```", flush=True)
        print(f"\n({time.perf_counter() - begin:.1f} s)", flush=True)
    print(f"\n{judge.unexpected} not as expected.")
    return min(judge.unexpected, 100)


if __name__ == "__main__":
    sys.exit(main())
