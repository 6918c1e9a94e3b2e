"""What comparisons on handwritten digits share: a finished run for given words, and its samples beside real digits."""

import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
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


def train(run: Path, *words: str) -> None:
    """One run on one core, unless it is finished; what it prints is shown if it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "dcdit.train", *words, f"run_dir={run}", "ckpt_path=auto"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
    print(f"{run.name}: trained", flush=True)


def write_digits(directory: Path, source: HandwrittenDigits) -> str:
    """Digits as shards, unless they are there; returns the override that names them."""
    if not (directory / "train").exists():
        source.write(directory)
    return f"data.directory={directory}"


def training_tflops(model: Model, batch: int, teacher: DiT, matched_steps: int) -> float:
    """TFLOPs of a run of N = 4: three forward passes a step, one more of the teacher while it is matched."""
    network, budgets = model.network, model.training.get("multi_budget") or {}
    kept, steps = network.positions / 4, model.step or 0
    first = min(steps, budgets.get("full_budget_steps", 0))
    drops = budgets.get("fractions") or [0.0]
    at_full, others = (
        sum(count(network, [kept * (1 - drop)] if network.routes else []).total for drop in some) / len(some)
        for some in ([0.0], drops)
    )
    passes = 3 * (first * at_full + (steps - first) * others) + count(teacher).total * matched_steps
    return passes * batch / 1e12


class Judge:
    """A classifier of real digits, which reads generated ones.

    Args:
        source: of the real ones.

    Attributes:
        on_unseen: the share of real digits that it reads right, of 400 that it has not seen.
    """

    def __init__(self, source: HandwrittenDigits) -> None:
        images, labels = source.images()
        features, truth = images.flatten(1).numpy(), labels.numpy()
        order = np.random.default_rng(0).permutation(len(features))
        unseen, seen = order[:400], order[400:]
        self._reads = SVC(gamma="scale").fit(features[seen], truth[seen])
        self.on_unseen = float((self._reads.predict(features[unseen]) == truth[unseen]).mean())

    def share(self, latents: Tensor, labels: Tensor) -> float:
        """The share of ``latents`` (N, 1, H, W) that it reads as their ``labels`` (N,)."""
        pixels = latents.clamp(-1, 1).flatten(1).numpy()
        return float((self._reads.predict(pixels) == labels.numpy()).mean())


def real_digits(directory: Path, side: int) -> Statistics:
    """Features of the training digits."""
    images = open_images(str(directory / "train"), (side, side), CPU, None)
    return Statistics.of([DigitsClassifier()(images.read(range(images.count)))], images.count)


class Figures(NamedTuple):
    """FID of samples, the share read as the class asked for, that of positions kept, seconds, and the samples."""

    fid: float
    read: float
    kept: float
    seconds: float
    batches: list[SampleBatch]


class Trained:
    """A finished run that samples.

    Args:
        run: its directory.
        device: where it samples.
    """

    def __init__(self, run: Path, device: torch.device = CPU) -> None:
        self.model: Model = load_model(run, device=device)
        self._decode = load_decoder(self.model.latents, CPU)
        self._features = DigitsClassifier()

    def figures(self, real: Statistics, sampler: Sampler, guidance: GuidanceSettings, count: int) -> Figures:
        """Figures of ``count`` samples, as many of each class, beside the ``real`` digits."""
        network = self.model.network
        labels: Tensor = torch.arange(count) % 10
        asked = Guidance(network, network.null_class, guidance)
        begin = time.perf_counter()
        batches = list(generate(self.model, asked, sampler, labels, range(count), seed=0, batch_size=100))
        seconds = time.perf_counter() - begin
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
