"""FID during training: at validations, with the EMA weights, at several budgets, on all processes."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from torch import Tensor

from dcdit.checkpoints.load import Model
from dcdit.checks import (
    Columns,
    Count,
    DropFraction,
    Images,
    NotEmpty,
    Number,
    Seed,
    Shown,
    TimeFraction,
    build_named,
    call_checked,
    checked,
)
from dcdit.data.decoder import LatentDecoder, load_decoder
from dcdit.data.latents import LatentSpec
from dcdit.diffusion.guidance import Guidance
from dcdit.diffusion.samplers import Sampler
from dcdit.diffusion.settings import SAMPLERS, GuidanceSettings
from dcdit.errors import UserError, naming
from dcdit.evaluation.features import FeatureNetwork
from dcdit.evaluation.images import open_images
from dcdit.evaluation.metrics import check_counts, choose_metrics, frechet
from dcdit.evaluation.reference_images import ReferenceStatistics, default_cache
from dcdit.evaluation.statistics import Statistics
from dcdit.runtime.display import Display
from dcdit.runtime.processes import say
from dcdit.sampling.figures import Recorder, save_boundaries, save_grid
from dcdit.sampling.generate import generate
from dcdit.sampling.setup import check_guidance

_CHUNK = 500  # images of a task on the reference


@dataclass(frozen=True)
class _Prepared:
    """What is loaded once, when fitting begins."""

    decode: LatentDecoder
    reference: Statistics


@dataclass(frozen=True)
class _Measured:
    """Figures at one budget, of all processes, and this process's first images (n, 1 or 3, height, width) uint8."""

    figures: dict[str, Number]
    images: Tensor


@checked
class FID(Callback):
    """Logs ``val/fid@<drop fraction>``, ``val/keep_ratio@...`` and ``val/tflops@...`` per image, and pictures.

    It samples between Lightning's swap of the EMA weights into the network and back, whatever the order of the
    callbacks; without EMA, the raw weights are measured. Images depend on ``seed`` alone, so that the pictures show the
    same samples getting better.

    Args:
        reference: images to compare with, see :func:`dcdit.evaluation.images.open_images`.
        features: network whose features are compared.
        folder: for the pictures.
        sampler: plain mapping for one of :data:`dcdit.diffusion.settings.SAMPLERS`.
        guidance: plain mapping for :class:`GuidanceSettings`.
        drop_fractions: budgets.
        count: images at each budget, over all processes.
        batch_size: samples per forward pass.
        every: validations between two measurements.
        max_time_fraction: a measurement is left out where all of them together would take more of the time since
            training began; the first, and one at the last step, always take place.
        shown: images of each budget in the picture of samples.
        frames: columns of the picture of boundaries; 0 leaves it out.
        seed: of the images.
        autoencoder: decode with this one; None takes the one of the latents.
        cache: for the statistics of the reference; None takes one in the user's cache.

    Raises:
        UserError: if a value is out of its range; when fitting begins, if anything that is needed is missing.
    """

    def __init__(
        self,
        reference: str,
        features: FeatureNetwork,
        folder: str,
        sampler: Any,
        guidance: Any,
        drop_fractions: Annotated[list[DropFraction], NotEmpty("name at least one, such as 0")],
        count: Images,
        batch_size: Images,
        every: Count,
        max_time_fraction: TimeFraction,
        shown: Shown,
        frames: Columns,
        seed: Seed,
        autoencoder: str | None,
        cache: str | None,
    ) -> None:
        self.reference, self.features, self.folder = reference, features, Path(folder)
        self.asked = build_named(SAMPLERS, sampler, "sampler")
        self.guidance = call_checked(GuidanceSettings, guidance, "guidance")
        if self.guidance.weak_checkpoint is not None:
            raise UserError("guidance.weak_checkpoint: during training the network itself is the guiding branch")
        self.drop_fractions = drop_fractions
        self.count, self.batch_size, self.every, self.max_time_fraction = count, batch_size, every, max_time_fraction
        self.shown, self.frames, self.seed = shown, frames, seed
        self.autoencoder, self.cache = autoencoder, cache
        self._prepared: _Prepared | None = None
        self._began = self._spent = self._last = 0.0
        self._validations = 0

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
        self.sampler = Sampler(self.asked.for_process(model.process.settings))
        for drop in self.drop_fractions:
            check_guidance(model.network, self._guidance(drop))
        decode = load_decoder(model.latents, pl_module.device, self.autoencoder)
        self.features.to(pl_module.device)
        size = decode.size(pl_module.device)
        images = open_images(self.reference, size, pl_module.device, self.autoencoder, network=model.latents)
        choose_metrics(["fid"], self.features, bool(images.count), list(images.moments(self.features)))
        cache = Path(self.cache) if self.cache else default_cache()
        reference = ReferenceStatistics(images, self.features, cache, None, _CHUNK, self.batch_size, ["features"])
        check_counts(["fid"], self.features, self.count, reference)
        self._prepared = _Prepared(decode, self._statistics(reference, trainer))
        self._began = time.monotonic()

    def _statistics(self, reference: ReferenceStatistics, trainer: pl.Trainer) -> Statistics:
        """Of the reference; every process does its share, and what is still missing then, such as on another disk."""
        with Display(trainer.global_rank, "reading the reference", "chunk") as display:
            reference.work(trainer.global_rank, trainer.world_size, display)
            trainer.strategy.barrier()
            found = reference.finalize()
            if found is None:
                reference.work(0, 1, display)
                found = reference.finalize()
        assert found is not None
        return found

    # ---- at validations ----------------------------------------------------------------------------------------

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Measure at the first batch, where the EMA weights have been swapped in, if it is time."""
        if batch_idx or self._prepared is None or trainer.sanity_checking:
            return
        self._validations += 1
        if (self._validations - 1) % self.every or not self._affordable(trainer):
            return
        begin = time.monotonic()
        model = self._model(pl_module, trainer)
        rows, first, words = [], None, []
        for drop in self.drop_fractions:
            wanted = self.frames if first is None and trainer.is_global_zero else 0
            recorder = Recorder([0, 1, 2], wanted, len(self.sampler.timesteps), model.process.clean)
            measured = self._measure(trainer, pl_module, self._prepared, drop, recorder)
            for name, value in measured.figures.items():
                pl_module.log(f"val/{name}@{drop:g}", value, on_step=False, on_epoch=True)
            rows.append(measured.images)
            words.append(f"{measured.figures['fid']:.4g} at drop fraction {drop:g}")
            first = first or recorder
        if trainer.is_global_zero and first is not None:
            self._save_pictures(trainer, torch.cat(rows), first, self._prepared.decode)
        say(f"Step {trainer.global_step}: FID {', '.join(words)}")
        self._last = time.monotonic() - begin
        self._spent += self._last

    def _affordable(self, trainer: pl.Trainer) -> bool:
        """Whether one more measurement stays within the share of time; the first process decides for all."""
        elapsed = time.monotonic() - self._began
        fits = self._spent + self._last <= self.max_time_fraction * (elapsed + self._last)
        ends = not self._spent or trainer.global_step >= trainer.max_steps
        fits = bool(trainer.strategy.broadcast(fits or ends))
        if not fits:
            share = f"max_time_fraction={self.max_time_fraction:g} of the time"
            times = f"{self._spent:.0f} s so far, {self._last:.0f} s each"
            say(f"Step {trainer.global_step}: FID left out, it would take more than {share} ({times})")
        return fits

    def _model(self, pl_module: Any, trainer: pl.Trainer) -> Model:
        latents = LatentSpec.from_plain(pl_module.hparams["latents"], "latents")
        return Model(pl_module.network, latents, trainer.global_step, pl_module.process)

    def _guidance(self, drop: float) -> GuidanceSettings:
        return replace(self.guidance, drop_fraction=drop)

    def _measure(
        self, trainer: pl.Trainer, pl_module: Any, prepared: _Prepared, drop: float, recorder: Recorder
    ) -> _Measured:
        """Sample this process's share at one budget; figures of all processes."""
        model, rank, world_size = self._model(pl_module, trainer), trainer.global_rank, trainer.world_size
        # the double precision of FID is not to be had on every accelerator
        place = pl_module.device if pl_module.device.type == "cuda" else torch.device("cpu")
        fid = frechet(prepared.reference.moments, real=rank == 0).to(place)
        sums = torch.zeros(2, dtype=torch.float64)  # FLOPs, kept tokens
        first: list[Tensor] = []
        batches = generate(
            model,
            Guidance(model.network, model.network.null_class, self._guidance(drop)),
            self.sampler,
            torch.arange(self.count) % model.network.num_classes,
            range(rank * self.count // world_size, (rank + 1) * self.count // world_size),
            seed=self.seed,
            batch_size=self.batch_size,
            precision="bf16" if "bf16" in str(trainer.precision) else "fp32",
            on_step=recorder.take,
        )
        for batch in batches:
            with naming("sample", batch.indices):
                images = prepared.decode(batch.latents.to(pl_module.device))
                seen = self.features(images).features
            if sum(len(each) for each in first) < self.shown:
                first.append(images)
            fid.update(seen.to(place), real=False)
            sums += torch.stack([batch.flops.sum(), batch.kept.sum()])
        flops, kept = trainer.strategy.reduce(sums.to(place), reduce_op="sum").tolist()
        figures = {"fid": float(fid.compute()), "tflops": flops / self.count / 1e12}
        if model.network.routes:
            figures["keep_ratio"] = kept / self.count / model.latents.positions
        return _Measured(figures, torch.cat(first)[: self.shown])

    def _save_pictures(self, trainer: pl.Trainer, images: Tensor, recorder: Recorder, decode: LatentDecoder) -> None:
        """Save the pictures, and hand them to the loggers that take pictures."""
        self.folder.mkdir(parents=True, exist_ok=True)
        step = trainer.global_step
        pictures = {"samples": self.folder / f"step_{step:08d}_samples.png"}
        save_grid(images, len(images) // len(self.drop_fractions), pictures["samples"])
        rows = [row for row in recorder.rows.values() if row and row[0].boundaries is not None]
        if rows:
            pictures["boundaries"] = self.folder / f"step_{step:08d}_boundaries.png"
            words = [f"sample {number}" for number in range(len(rows))]
            title = f"step {step:,}, ρ {self.drop_fractions[0]:g}, {self.sampler.settings.description}"
            save_boundaries(rows, words, decode, pictures["boundaries"], title)
        for logger in trainer.loggers:
            for name, path in pictures.items():
                if isinstance(logger, WandbLogger):
                    logger.log_image(f"val/{name}", [str(path)], step=step)
                elif isinstance(logger, TensorBoardLogger):
                    from torchvision.io import read_image

                    logger.experiment.add_image(f"val/{name}", read_image(str(path)), step)
