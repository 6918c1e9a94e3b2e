"""What the router costs, whose convolutions are float32 as published: in each memory format, and rounded to TF32.

    python benchmarks/router.py --device cuda --batch 128

Prints Markdown: the router of DC-DiT-B at 256px, without gradients; medians over rounds in which all forms take turns.
"""

import argparse
import copy
import time
from contextlib import nullcontext
from statistics import median

import torch

from dcdit.network.routing import PredictabilityRouter, exact_float32
from dcdit.runtime.devices import describe_device

WIDTH, SIDE = 768, 32
FORMS = {
    f"{name}, {arithmetic}": (layout, arithmetic == "float32")
    for name, layout in (("channels last", torch.channels_last), ("channels first", torch.contiguous_format))
    for arithmetic in ("float32", "TF32")
}
"""Memory format and whether the arithmetic is exact; the first is what a network does."""


@torch.no_grad()
def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.manual_seed(0)
    router = PredictabilityRouter(WIDTH).to(device)
    features = torch.randn(options.batch, SIDE, SIDE, WIDTH, device=device).permute(0, 3, 1, 2)
    routers = {layout: copy.deepcopy(router).to(memory_format=layout) for layout, _ in FORMS.values()}

    def milliseconds(layout: torch.memory_format, exact: bool) -> float:
        _wait(device)
        begin = time.perf_counter()
        with exact_float32(device) if exact else nullcontext():
            routers[layout](features.contiguous(memory_format=layout))
        _wait(device)
        return (time.perf_counter() - begin) * 1e3

    for form in FORMS.values():  # the first time, kernels are chosen
        milliseconds(*form)
    rounds = [[milliseconds(*form) for form in FORMS.values()] for _ in range(options.rounds)]
    print(f"Router of DC-DiT-B, {options.batch} samples; {describe_device(device)}; torch {torch.__version__}\n")
    print("| form | ms |\n| --- | ---: |")
    for name, values in zip(FORMS, zip(*rounds, strict=True), strict=True):
        print(f"| {name} | {median(values):.2f} |")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
