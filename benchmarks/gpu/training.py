"""Train on synthetic latents for a few steps, and tell speed and memory.

    python benchmarks/gpu/training.py experiment=xl_n4 data.directory=/tmp/latents run_dir=/tmp/run trainer.max_steps=30

The overrides are those of ``python -m dcdit.train``. With ``--steady`` the router keeps a quarter of the positions from
the first step on: a fresh one keeps next to nothing, then half, then a tenth, and images/s of such steps mean nothing.
"""

import csv
import runpy
import sys
import time
from pathlib import Path

import lightning.pytorch as pl
import torch

from dcdit.compute.flops import count
from dcdit.network import DCDiT
from dcdit.network.routing import PredictabilityRouter

SHARE = 0.25
OVERRIDES = (
    "data.source={name:synthetic,channels:${model.channels},grid:${model.grid},num_classes:${model.num_classes},"
    "samples:256,samples_per_shard:64}",
    "callbacks.checkpoint=null",  # a checkpoint of XL is 11 GB
    "callbacks.progress=null",
    "trainer.log_every_n_steps=5",
)
STEADY = ("+callbacks.steady._target_=training.KeepShare", "optimizer.lr=1e-12")  # nothing learns to keep less
COLUMNS = ("train/images_per_s", "train/loss", "train/keep_ratio", "train/gradient_norm")


class KeepShare(pl.Callback):
    """Before the first step sets the router so that it keeps a share of noise, which synthetic latents are."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Move the bias of the router's last layer."""
        network, device = pl_module.network, pl_module.device
        assert isinstance(network, DCDiT)
        assert isinstance(network.router, PredictabilityRouter)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(16, network.channels, *network.grid, generator=generator).to(device)
        t = torch.randint(1000, (16,), generator=generator).to(device)
        y = torch.randint(network.num_classes, (16,), generator=generator).to(device)
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            prob = network(x, t, y).routing.prob.float()
            bias = network.router.scorer[-1].bias
            assert isinstance(bias, torch.Tensor)
            bias.sub_(prob[prob < 1].logit().quantile(1 - SHARE))  # those always kept have probability 1

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tell what was computed: three forward passes an image, at the speed that was logged last."""
        network, last = pl_module.network, trainer.callback_metrics
        assert isinstance(network, DCDiT)
        if {"train/images_per_s", "train/keep_ratio_after_drop"} <= last.keys():
            kept, rate = float(last["train/keep_ratio_after_drop"]), float(last["train/images_per_s"])
            work = 3 * count(network, [kept * network.positions]).total
            print(f"\n{kept:.1%} kept, {rate:.1f} images/s, {work / 1e9:.1f} GFLOPs an image:")
            print(f"{work * rate / 1e12:.2f} TFLOP/s.")


def curve(path: Path) -> None:
    """Print the logged steps of a run as a table."""
    rows: dict[int, dict[str, str]] = {}
    with path.open() as file:
        for row in csv.DictReader(file):
            rows.setdefault(int(row["step"]), {}).update({key: value for key, value in row.items() if value})
    names = [name for name in COLUMNS if any(name in row for row in rows.values())]
    print("\n| step | " + " | ".join(name.partition("/")[2] for name in names) + " |\n|" + " ---: |" * (1 + len(names)))
    for step, row in sorted(rows.items()):
        print(
            f"| {step + 1} | " + " | ".join(f"{float(row[name]):.4g}" if name in row else "" for name in names) + " |"
        )


def main() -> None:
    """Train and tell."""
    words = sys.argv[1:]
    steady = "--steady" in words
    overrides = [*OVERRIDES, *(STEADY if steady else ()), *(word for word in words if word != "--steady")]
    run = next(override.partition("=")[2] for override in overrides if override.startswith("run_dir="))
    sys.argv = ["dcdit.train", *overrides]
    begin = time.perf_counter()
    try:
        runpy.run_module("dcdit.train", run_name="__main__", alter_sys=True)
    finally:
        found = sorted(Path(run).glob("logs/version_*/metrics.csv"))
        if found:
            curve(found[-1])
        if torch.cuda.is_initialized():
            most, kept = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
            print(f"\nMost memory: {most / 2**30:.1f} GiB in tensors, {kept / 2**30:.1f} GiB with what torch keeps.")
        print(f"\n{time.perf_counter() - begin:.1f} s in all.")


if __name__ == "__main__":
    main()
