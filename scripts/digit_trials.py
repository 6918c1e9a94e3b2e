"""Shared by the comparisons on handwritten digits: training of runs, and measurements of their samples."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import numpy as np
import torch
from omegaconf import OmegaConf
from sklearn.svm import SVC
from torch import Tensor

from dcdit.checkpoints.load import Model, load_model
from dcdit.compute.flops import count
from dcdit.data.builtin import HandwrittenDigits
from dcdit.data.decoder import load_decoder
from dcdit.diffusion.guidance import Guidance
from dcdit.diffusion.samplers import Sampler
from dcdit.diffusion.settings import GuidanceSettings
from dcdit.evaluation.features import DigitsClassifier
from dcdit.evaluation.images import open_images
from dcdit.evaluation.metrics import compare
from dcdit.evaluation.statistics import Statistics
from dcdit.network import DiT
from dcdit.sampling.cost import SamplingCost
from dcdit.sampling.generate import SampleBatch, generate

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


def train(run: Path, *overrides: str) -> None:
    """Train a run on one core, unless it is finished; if it fails, show what it printed and exit."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "dcdit.train", *overrides, f"run_dir={run}", "ckpt_path=auto"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
    print(f"{run.name}: trained", file=sys.stderr, flush=True)


def train_all(runs: Mapping[Path, Sequence[str]], parallel: int) -> None:
    """Train runs with their overrides, ``parallel`` of them at a time."""
    for _ in trained(runs, parallel):
        pass


def trained(runs: Mapping[Path, Sequence[str]], parallel: int) -> Iterator[Path]:
    """Train runs with their overrides, ``parallel`` of them at a time; gives each as soon as it is trained."""
    with ThreadPoolExecutor(parallel) as workers:
        jobs = {workers.submit(train, run, *overrides): run for run, overrides in runs.items()}
        try:
            for job in as_completed(jobs):
                job.result()
                yield jobs[job]
        finally:  # after a mistake, those that run are waited for, and the others do not begin
            for job in jobs:
                job.cancel()


def load_or_measure(path: Path, measure: Callable[[], list[dict[str, float]]]) -> list[dict[str, float]]:
    """The figures in a JSON file; if it is not there, they are measured and written to it."""
    if not path.is_file():
        path.write_text(json.dumps(measure(), indent=1) + "\n")
    figures: list[dict[str, float]] = json.loads(path.read_text())
    return figures


def spread(values: Sequence[float], form: str) -> str:
    """The mean of values, with the least and the greatest in brackets, each formatted by ``form``."""
    return f"{sum(values) / len(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def error_bars(seeds: Sequence[Sequence[float]]) -> list[list[float]]:
    """How far the least of each point's seeds lies below the mean, and how far the greatest above it: (2, points)."""
    return [[mean(values) - min(values) for values in seeds], [max(values) - mean(values) for values in seeds]]


def write_digits(directory: Path, source: HandwrittenDigits) -> str:
    """Write digits as shards, unless they are there; returns the override that names them."""
    if not (directory / "train").exists():
        source.write(directory)
    return f"data.directory={directory}"


def training_tflops(model: Model, batch: int, teacher: DiT, matched_steps: int) -> float:
    """TFLOPs of training with N = 4: three forward passes a step, one more of the teacher while it is matched."""
    network, budgets = model.network, model.training.get("multi_budget") or {}
    tokens, steps = network.positions / 4, model.step or 0
    full_steps = min(steps, budgets.get("full_budget_steps", 0))

    def mean_flops(drops: Sequence[float]) -> float:
        costs = [count(network, [tokens * (1 - drop)] if network.routes else []).total for drop in drops]
        return sum(costs) / len(costs)

    sampled, path_drop = mean_flops(budgets.get("fractions") or [0.0]), budgets.get("path_drop", 0.0)
    if path_drop:
        sampled = (1 - path_drop) * sampled + path_drop * mean_flops([1.0])
    passes = 3 * (full_steps * mean_flops([0.0]) + (steps - full_steps) * sampled)
    return (passes + count(teacher).total * matched_steps) * batch / 1e12


class Judge:
    """A classifier that is trained on real digits, and reads generated ones.

    Args:
        source: of the real digits.

    Attributes:
        on_unseen: its accuracy on 400 real digits that it has not seen.
    """

    def __init__(self, source: HandwrittenDigits) -> None:
        images, labels = source.images()
        features, truth = images.flatten(1).numpy(), labels.numpy()
        order = np.random.default_rng(0).permutation(len(features))
        unseen, seen = order[:400], order[400:]
        self._classifier = SVC(gamma="scale").fit(features[seen], truth[seen])
        self.on_unseen = float((self._classifier.predict(features[unseen]) == truth[unseen]).mean())

    def share(self, latents: Tensor, labels: Tensor) -> float:
        """The share of ``latents`` (N, 1, H, W) that it reads as their ``labels`` (N,)."""
        pixels = latents.clamp(-1, 1).flatten(1).numpy()
        return float((self._classifier.predict(pixels) == labels.numpy()).mean())


def real_digits(directory: Path, side: int) -> Statistics:
    """The statistics of the features of the training digits."""
    images = open_images(str(directory / "train"), (side, side), CPU, None)
    return Statistics.of([DigitsClassifier()(images.read(range(images.count)))], images.count)


def _precision_of_training(run: Path, device: torch.device) -> str:
    """``fp32`` or ``bf16``; an exported folder does not tell it."""
    config = run / "config.yaml"
    half = device.type == "cuda"
    if config.is_file():
        half = str(OmegaConf.load(config).trainer.precision).startswith("bf16")
    return "bf16" if half else "fp32"


class Figures(NamedTuple):
    """FID of samples, the share read as the requested class, the share of positions kept, seconds, and the samples."""

    fid: float
    read: float
    kept: float
    seconds: float
    batches: list[SampleBatch]


class Trained:
    """A finished run to sample from.

    Args:
        run: its directory.
        device: where it samples.
        precision: ``fp32`` or ``bf16``; None takes that of the training; where no file tells it, bf16 on a
            GPU, else fp32.
    """

    def __init__(self, run: Path, device: torch.device = CPU, precision: str | None = None) -> None:
        self.model: Model = load_model(run, device=device)
        self.precision = precision or _precision_of_training(run, device)
        self._device = device
        self._decode = load_decoder(self.model.latents, CPU)
        self._features = DigitsClassifier()

    def figures(self, real: Statistics, sampler: Sampler, guidance: GuidanceSettings, count: int) -> Figures:
        """Compare ``count`` samples, as many of each class, with the ``real`` digits."""
        network = self.model.network
        labels: Tensor = torch.arange(count) % 10
        guided, how = Guidance(network, network.null_class, guidance), self.precision
        batch = 100 if labels.device == self._device else count  # a GPU samples them all in hardly more time
        start = time.perf_counter()
        batches = list(
            generate(self.model, guided, sampler, labels, range(count), seed=0, batch_size=batch, precision=how)
        )
        seconds = time.perf_counter() - start
        seen = self._features(self._decode(torch.cat([batch.latents for batch in batches])))
        assert seen.logits is not None
        cost = SamplingCost.total(map(SamplingCost.of, batches))
        return Figures(
            compare(real, partial(iter, [seen]), ["fid"])["fid"],
            float((seen.logits.argmax(1) == labels).double().mean()),
            cost.mean_keep_ratio(self.model.latents.positions) or 0.0,
            seconds,
            batches,
        )
