"""What each choice of the transformer blocks costs: the time of forward and backward over that of the published ones.

    OMP_NUM_THREADS=1 python benchmarks/blocks.py --batch 2                DC-DiT-B, 256px, float32, one thread
    python benchmarks/blocks.py --scale xl --batch 64 --precision bf16 --device cuda --compile

Needs torch alone. Takes the options of ``step.py``. All networks take turns, each on its own input of which its router
keeps the same share. A ratio is the median over the rounds of the ratio within a round. On a CPU the time is that of
the processor, which other jobs disturb least with one thread.
"""

import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from step import Bench, heading, read_options

CHOICES: dict[str, Mapping[str, Any]] = {
    "as published": {},
    "norm=rms": {"norm": "rms"},
    "mlp=swiglu": {"mlp": "swiglu"},
    "position=rope": {"position": "rope"},
    "qk_norm=true": {"qk_norm": True},
    "all four": {"norm": "rms", "mlp": "swiglu", "position": "rope", "qk_norm": True},
}


def now(bench: Bench) -> float:
    """Seconds: of the processor, or of the clock when a GPU has done its work."""
    return time.process_time() if bench.device.type == "cpu" else bench.clock.now()


def main() -> None:
    """Measure and print."""
    options = read_options(__doc__)
    benches: dict[str, Bench] = {}
    for name, blocks in CHOICES.items():
        benches[name] = Bench(options, **blocks)
        del benches[name].plain  # its memory
    optimizers = {name: torch.optim.SGD(bench.network.parameters(), lr=0.0) for name, bench in benches.items()}
    seconds: dict[str, list[float]] = {name: [] for name in benches}
    for turn in range(options.warmup + options.rounds):
        for name, bench in benches.items():
            begin = now(bench)
            bench.train(bench.network, optimizers[name])
            if turn >= options.warmup:
                seconds[name].append(now(bench) - begin)
    how = [name for name in ("compile", "checkpointing", "tf32") if getattr(options, name)]
    print(heading(options, f"batches of {options.batch}", *how))
    print("| blocks | forward and backward, ms/image | ratio | least and greatest ratio |")
    print("| --- | ---: | ---: | ---: |")
    published = seconds["as published"]
    for name, times in seconds.items():
        ratios = [one / other for one, other in zip(times, published, strict=True)]
        ms = 1e3 * statistics.median(times) / options.batch
        print(f"| {name} | {ms:.1f} | {statistics.median(ratios):.3f} | {min(ratios):.3f} to {max(ratios):.3f} |")


if __name__ == "__main__":
    main()
