"""FID during training: at validations, with the EMA weights, at several budgets, on all processes."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from torch import Tensor

from dcdit.checkpoints.load import Model
from dcdit.checks import Capacity, Columns, Count, Images, Named, Seed, Shown, TimeFraction, checked, visible
from dcdit.data.decoder import LatentDecoder, load_decoder
from dcdit.data.latents import LatentSpec
from dcdit.diffusion.guidance import Guidance
from dcdit.diffusion.samplers import Sampler
from dcdit.diffusion.settings import SAMPLERS, GuidanceSettings, SamplerOptions
from dcdit.errors import UserError
from dcdit.evaluation.features import FeatureNetwork
from dcdit.evaluation.images import check_images, open_images
from dcdit.evaluation.measure import measure_samples
from dcdit.evaluation.metrics import compare_with, frechet
from dcdit.evaluation.points import build_features
from dcdit.evaluation.reference_images import ReferenceStatistics
from dcdit.evaluation.settings import DropFractions
from dcdit.evaluation.statistics import Statistics
from dcdit.runtime.display import Display
from dcdit.runtime.processes import say
from dcdit.sampling.capacity import room_of
from dcdit.sampling.figures import Recorder, save_boundaries, save_grid
from dcdit.sampling.generate import generate
from dcdit.sampling.guiding import check_guidance

_REFERENCE = "callbacks.fid.reference"


@dataclass(frozen=True)
class _Loaded:
    """What is loaded once, when fitting begins."""

    sampler: Sampler
    decode: LatentDecoder
    reference: Statistics


@checked
@dataclass(kw_only=True, eq=False, repr=False)
class FID(Callback):
    """Logs ``val/fid@<drop fraction>``, ``val/keep_ratio@...`` and ``val/tflops@...`` per image, and pictures.

    It samples between Lightning's swap of the EMA weights into the network and back, whatever the order of the
    callbacks; without EMA, the raw weights are measured. Images depend on ``seed`` alone, so that the pictures show the
    same samples getting better. ``configs/callbacks/fid.yaml`` explains the keys.

    Attributes:
        features: network whose features are compared, or a section that describes it. That is built after the
            reference was found, for it may download.
        reference: images to compare with, see :func:`dcdit.evaluation.images.open_images`.
        guidance: its drop fraction is that of the budget.

    Raises:
        UserError: if a value is out of its range, or nothing is at ``reference``; when fitting begins, if anything else
            that is needed is missing.
    """

    features: FeatureNetwork | dict[str, Any]
    reference: str
    folder: str
    sampler: Annotated[SamplerOptions, Named(SAMPLERS)]
    guidance: GuidanceSettings
    drop_fractions: DropFractions
    count: Images
    batch_size: Images
    capacity: Capacity | None
    every: Count
    max_time_fraction: TimeFraction
    shown: Shown
    frames: Columns
    seed: Seed
    autoencoder: str | None
    cache: str | None

    def __post_init__(self) -> None:
        if self.guidance.weak_checkpoint is not None:
            raise UserError("guidance.weak_checkpoint: during training the network itself is the guiding branch")
        try:
            check_images(self.reference, _REFERENCE)
        except UserError as error:
            if os.path.exists(self.reference):
                raise
            raise UserError(
                f"{error}. By default it is the split `val` beside `train`: extract one, or leave the callback out"
            ) from error
        given = self.features
        self._features = given if isinstance(given, FeatureNetwork) else build_features(given, torch.device("cpu"))
        self._loaded: _Loaded | None = None
        self._began = self._spent = self._last = 0.0
        self._validations = 0

    @property
    def validation_metrics(self) -> list[str]:
        """The names under which its metrics are logged."""
        names = ("fid", "tflops", "keep_ratio", "dropped_by_capacity")
        return [f"val/{name}@{drop:g}" for drop in self.drop_fractions for name in names]

    # ---- before training ---------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check and load everything; the processes share the work on the reference."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]  # set by fit
        if data.validation() is None:
            raise UserError(
                f"callbacks.fid: FID is measured at validations, and {data.location.root} has no split `val`: extract"
                " one beside `train`, or leave the callback out"
            )
        model = self._model(pl_module, trainer)
        sampler = Sampler(self.sampler.for_process(model.process.settings))
        model.network.check_capacity("callbacks.fid.capacity", self.capacity)
        for drop in self.drop_fractions:
            check_guidance(model, self._guidance(drop))
        device = pl_module.device
        decode = load_decoder(model.latents, device, self.autoencoder)
        self._features.to(device)
        size = decode.size(device)
        images = open_images(self.reference, size, device, self.autoencoder, network=model.latents, key=_REFERENCE)
        reference, *_ = compare_with(
            images, self._features, ["fid"], self.count, cache=self.cache, batch_size=self.batch_size
        )
        self._loaded = _Loaded(sampler, decode, self._statistics(reference, trainer))
        self._began = time.monotonic()

    def _statistics(self, reference: ReferenceStatistics, trainer: pl.Trainer) -> Statistics:
        """Return those of the reference; every process does its share, and what another disk still lacks."""
        with Display(trainer.global_rank, "reading the reference", "chunk") as display:
            reference.work(trainer.global_rank, trainer.world_size, display)
            trainer.strategy.barrier()
            statistics = reference.finalize()
            if statistics is None:
                reference.work(0, 1, display)
                statistics = reference.finalize()
        assert statistics is not None
        return statistics

    # ---- at validations ----------------------------------------------------------------------------------------

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Measure at the first batch, where the EMA weights have been swapped in, if it is time."""
        loaded = self._loaded
        if batch_idx or loaded is None or trainer.sanity_checking:
            return
        self._validations += 1
        if (self._validations - 1) % self.every or not self._affordable(trainer):
            return
        begin = time.monotonic()
        model = self._model(pl_module, trainer)
        rows, first, figures = [], None, []
        for drop in self.drop_fractions:
            frames = self.frames if first is None and trainer.is_global_zero else 0
            recorder = Recorder([0, 1, 2], frames, len(loaded.sampler.timesteps), model.process.clean)
            values, images = self._measure(trainer, model, loaded, drop, recorder)
            for name, value in values.items():
                pl_module.log(f"val/{name}@{drop:g}", value, on_step=False, on_epoch=True, batch_size=1)
            rows.append(images)
            figures.append(f"{values['fid']:.4g} at drop fraction {drop:g}")
            first = first or recorder
        if trainer.is_global_zero and first is not None:
            self._save_pictures(trainer, torch.cat(rows), first, loaded, model.latents.classes)
        say(f"Step {trainer.global_step}: FID {', '.join(figures)}")
        self._last = time.monotonic() - begin
        self._spent += self._last

    def _affordable(self, trainer: pl.Trainer) -> bool:
        """Return whether one more measurement stays within the share of time; the first process decides for all."""
        limit = self.max_time_fraction
        elapsed = time.monotonic() - self._began
        fits = self._spent + self._last <= limit * (elapsed + self._last)
        ends = not self._spent or trainer.global_step >= trainer.max_steps
        fits = bool(trainer.strategy.broadcast(fits or ends))
        if not fits:
            share = f"max_time_fraction={limit:g} of the time"
            times = f"{self._spent:.0f} s so far, {self._last:.0f} s each"
            say(f"Step {trainer.global_step}: FID left out, it would take more than {share} ({times})")
        return fits

    def _model(self, pl_module: Any, trainer: pl.Trainer) -> Model:
        latents = LatentSpec.from_plain(pl_module.hparams["latents"], "latents")
        return Model(pl_module.network, latents, trainer.global_step, pl_module.process, pl_module.hparams)

    def _guidance(self, drop: float) -> GuidanceSettings:
        return replace(self.guidance, drop_fraction=drop)

    def _measure(
        self, trainer: pl.Trainer, model: Model, loaded: _Loaded, drop: float, recorder: Recorder
    ) -> tuple[dict[str, float], Tensor]:
        """Sample this process's share at one budget.

        Returns:
            The figures of all processes, and this process's first images (n, 1 or 3, height, width) uint8.
        """
        rank, world_size = trainer.global_rank, trainer.world_size
        network, count = model.network, self.count
        capacity = None if self.capacity is None else room_of(self.capacity, [network, network])
        batches = generate(
            model,
            Guidance(network, network.null_class, self._guidance(drop), capacity=capacity),
            loaded.sampler,
            torch.arange(count) % network.num_classes,
            range(rank * count // world_size, (rank + 1) * count // world_size),
            seed=self.seed,
            batch_size=self.batch_size,
            precision="bf16" if "bf16" in str(trainer.precision) else "fp32",
            on_step=recorder.take,
        )
        measured = measure_samples(batches, loaded.decode, self._features, ["fid"], self.shown)
        # the double precision of FID is not to be had on every accelerator
        root = trainer.strategy.root_device
        device = root if root.type == "cuda" else torch.device("cpu")
        fid = frechet(loaded.reference.moments, real=rank == 0).to(device)
        for features in measured.features:
            fid.update(features.features.to(device), real=False)
        cost = measured.sampled.cost
        ratio = cost.mean_keep_ratio(model.latents.positions) or 0.0
        kept = sum(tokens or 0 for tokens in (*cost.main, *cost.guiding))
        sums = [cost.flops, ratio * cost.images, kept, sum(cost.beyond)]
        own = torch.tensor(sums, dtype=torch.float64, device=device)
        flops, ratios, kept, beyond = trainer.strategy.reduce(own, reduce_op="sum").tolist()
        figures = {"fid": float(fid.compute()), "tflops": flops / count / 1e12}
        if network.routes:
            figures["keep_ratio"] = ratios / count
        if self.capacity is not None:
            figures["dropped_by_capacity"] = beyond / max(1, kept + beyond)
        return figures, measured.first

    def _save_pictures(
        self, trainer: pl.Trainer, images: Tensor, recorder: Recorder, loaded: _Loaded, classes: Sequence[str]
    ) -> None:
        """Save the pictures, and hand them to the loggers that take pictures."""
        folder, drops = Path(self.folder), self.drop_fractions
        folder.mkdir(parents=True, exist_ok=True)
        step = trainer.global_step
        pictures = {"samples": folder / f"step_{step:08d}_samples.png"}
        per_row = len(images) // len(drops)
        save_grid(images, per_row, pictures["samples"])
        rows = {number: row for number, row in recorder.rows.items() if row and row[0].boundaries is not None}
        if rows:
            pictures["boundaries"] = folder / f"step_{step:08d}_boundaries.png"
            title = f"step {step:,}, ρ {drops[0]:g}, {loaded.sampler.settings.description}"
            names = [visible(classes[number % len(classes)]) for number in rows]  # the classes take turns
            save_boundaries(list(rows.values()), names, loaded.decode, pictures["boundaries"], title)
        columns = ", ".join(visible(classes[number % len(classes)]) for number in range(per_row))
        caption = f"{columns}; drop fractions {', '.join(f'{drop:g}' for drop in drops)}"
        for logger in trainer.loggers:
            for name, path in pictures.items():
                if isinstance(logger, WandbLogger):
                    logger.log_image(f"val/{name}", [str(path)], step=step, caption=[caption])
                elif isinstance(logger, TensorBoardLogger):
                    from torchvision.io import read_image

                    logger.experiment.add_image(f"val/{name}", read_image(str(path)), step)
