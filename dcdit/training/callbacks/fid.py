"""FID during training: at validations, with the averaged weights, at several budgets, on all processes."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torchvision.io import read_image

from dcdit.checkpoints.load import Model
from dcdit.checks import check_drop_fraction
from dcdit.compute.flops import Cost
from dcdit.data.autoencoder import Decoder, load_decoder
from dcdit.diffusion.guidance import Guidance
from dcdit.diffusion.samplers import Sampler
from dcdit.errors import UserError
from dcdit.evaluation.features import FeatureNetwork
from dcdit.evaluation.images import open_images
from dcdit.evaluation.metrics import Statistics, check_metrics, frechet
from dcdit.evaluation.reference import Reference, default_cache
from dcdit.network import DCDiT
from dcdit.runtime.progress import Display
from dcdit.sampling.figures import Snapshots, save_boundaries, save_grid
from dcdit.sampling.generate import generate
from dcdit.sampling.setup import check_guidance
from dcdit.settings.schema import call_checked

_PART = 500  # images of a unit of work on the reference


@dataclass(frozen=True)
class _Prepared:
    """What is loaded once, when fitting begins."""

    decode: Decoder
    reference: Statistics
    sampler: Sampler


@dataclass(frozen=True)
class _Measured:
    """Figures at one budget, of all processes, and this process's first images (n, 1 or 3, height, width) uint8."""

    figures: dict[str, float]
    images: Tensor


class Quality(Callback):
    """Logs ``val/fid@<drop fraction>``, ``val/kept@...`` and ``val/tflops@...`` per image, and pictures.

    It draws between Lightning's swap of the averaged weights into the network and back, whatever the order of the
    callbacks; without averaging, the raw weights are measured. Images depend on ``seed`` alone, so that the pictures
    show the same samples getting better.

    Args:
        reference: images to compare with, see :func:`dcdit.evaluation.images.open_images`.
        features: network whose features are compared.
        folder: for the pictures.
        sampler, guidance: plain mappings for :class:`Sampler` and :class:`Guidance`.
        drop_fractions: budgets.
        count: images at each budget, over all processes.
        batch_size: samples per forward pass.
        every: validations between two measurements.
        max_share: a measurement is left out where all of them together would take more of the time since training
            began; the first, and one at the last step, always take place.
        shown: images of each budget in the picture of samples.
        snapshots: columns of the picture of boundaries; 0 leaves it out.
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
        sampler: Mapping[str, Any],
        guidance: Mapping[str, Any],
        drop_fractions: Sequence[float] = (0.0,),
        count: int = 5000,
        batch_size: int = 64,
        every: int = 1,
        max_share: float = 0.1,
        shown: int = 10,
        snapshots: int = 6,
        seed: int = 0,
        autoencoder: str | None = None,
        cache: str | None = None,
    ) -> None:
        for name, value, least in (("every", every, 1), ("batch_size", batch_size, 1), ("shown", shown, 1)):
            if value < least:
                raise UserError(f"callbacks.fid.{name}={value} is below {least}")
        if not 0 < max_share <= 1:
            raise UserError(f"callbacks.fid.max_share={max_share} is outside (0, 1]: 0.1 is a tenth of the time")
        if not drop_fractions:
            raise UserError("callbacks.fid.drop_fractions=[] asks for nothing: name at least one, such as 0")
        for fraction in drop_fractions:
            check_drop_fraction(fraction, "callbacks.fid.drop_fractions")
        self.reference, self.features, self.folder = reference, features, Path(folder)
        self.sampler, self.guidance = dict(sampler), dict(guidance)
        self.drop_fractions = list(drop_fractions)
        self.count, self.batch_size, self.every, self.max_share = count, batch_size, every, max_share
        self.shown, self.snapshots, self.seed = shown, snapshots, seed
        self.autoencoder, self.cache = autoencoder, cache
        self._prepared: _Prepared | None = None
        self._began = self._spent = self._last = 0.0
        self._validations = 0

    # ---- before training ---------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check and load everything; the processes share the work on the reference."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]  # set by fit
        if not data.location.below("val").exists():
            raise UserError(
                f"callbacks.fid: FID is measured at validations, and {data.location.place} has no split `val`: extract"
                " one beside `train`, or leave the callback out"
            )
        model = self._model(pl_module, trainer)
        sampler = call_checked(Sampler, self.sampler, "callbacks.fid.sampler")
        for drop in self.drop_fractions:
            check_guidance(model, self._guidance(model, drop))
        decode = load_decoder(model.latents, pl_module.device, self.autoencoder)
        height, width = decode(torch.zeros(1, *model.latents["shape"], device=pl_module.device)).shape[2:]
        self.features.to(pl_module.device)
        images = open_images(self.reference, (height, width), pl_module.device, self.autoencoder)
        cache = Path(self.cache) if self.cache else default_cache()
        reference = Reference(images, self.features, cache, None, _PART, self.batch_size)
        check_metrics(["fid"], self.features, self.count, reference.count)
        self._prepared = _Prepared(decode, self._statistics(reference, trainer), sampler)
        self._began = time.monotonic()

    def _statistics(self, reference: Reference, trainer: pl.Trainer) -> Statistics:
        """Of the reference; every process does its share, and what is still missing then, such as on another disk."""
        with Display(trainer.global_rank, "reading the reference", "part") as display:
            reference.work(trainer.global_rank, trainer.world_size, display)
            trainer.strategy.barrier()
            found = reference.conclude()
            if found is None:
                reference.work(0, 1, display)
                found = reference.conclude()
        assert found is not None
        return found

    # ---- at validations ----------------------------------------------------------------------------------------

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Measure at the first batch, where the averaged weights have been swapped in, if it is time."""
        if batch_idx or self._prepared is None or trainer.sanity_checking:
            return
        self._validations += 1
        if (self._validations - 1) % self.every or not self._affordable(trainer):
            return
        begin = time.monotonic()
        rows, boundaries, words = [], None, []
        for drop in self.drop_fractions:
            wanted = self.snapshots if boundaries is None and trainer.is_global_zero else 0
            snapshots = Snapshots([0, 1, 2], wanted, self._prepared.sampler.steps, self._prepared.decode)
            measured = self._measure(trainer, pl_module, self._prepared, drop, snapshots)
            for name, value in measured.figures.items():
                pl_module.log(f"val/{name}@{drop:g}", value, on_step=False, on_epoch=True)
            rows.append(measured.images)
            words.append(f"{measured.figures['fid']:.4g} at drop fraction {drop:g}")
            boundaries = boundaries or snapshots
        if trainer.is_global_zero and boundaries is not None:
            self._draw(trainer, torch.cat(rows), boundaries)
        rank_zero_info(f"Step {trainer.global_step}: FID {', '.join(words)}")
        self._last = time.monotonic() - begin
        self._spent += self._last

    def _affordable(self, trainer: pl.Trainer) -> bool:
        """Whether one more measurement stays within the share of time; the first process decides for all."""
        elapsed = time.monotonic() - self._began
        fits = self._spent + self._last <= self.max_share * (elapsed + self._last)
        ends = not self._spent or trainer.global_step >= trainer.max_steps
        fits = bool(trainer.strategy.broadcast(fits or ends))
        if not fits:
            rank_zero_info(
                f"Step {trainer.global_step}: FID left out, it would take more than max_share={self.max_share:g} of the"
                f" time ({self._spent:.0f} s so far, {self._last:.0f} s each)"
            )
        return fits

    def _model(self, pl_module: Any, trainer: pl.Trainer) -> Model:
        return Model(pl_module.network, pl_module.hparams["latents"], trainer.global_step)

    def _guidance(self, model: Model, drop: float) -> Guidance:
        built = {"denoiser": model.network, "null_class": len(model.classes)}
        return call_checked(Guidance, {**self.guidance, "drop_fraction": drop}, "callbacks.fid.guidance", built)

    def _measure(
        self, trainer: pl.Trainer, pl_module: Any, prepared: _Prepared, drop: float, snapshots: Snapshots
    ) -> _Measured:
        """Draw this process's share at one budget; figures of all processes."""
        model, rank, world_size = self._model(pl_module, trainer), trainer.global_rank, trainer.world_size
        cost, positions = Cost.of_network(model.network), model.latents["shape"][1] * model.latents["shape"][2]
        # the double precision of FID is not to be had on every accelerator
        place = pl_module.device if pl_module.device.type == "cuda" else torch.device("cpu")
        fid = frechet(prepared.reference, real=rank == 0).to(place)
        sums = torch.zeros(3, dtype=torch.float64)  # operations, kept tokens, forward passes
        first: list[Tensor] = []
        drawn = generate(
            model,
            self._guidance(model, drop),
            prepared.sampler,
            torch.arange(self.count) % len(model.classes),
            range(rank * self.count // world_size, (rank + 1) * self.count // world_size),
            seed=self.seed,
            batch_size=self.batch_size,
            precision="bf16" if "bf16" in str(trainer.precision) else "fp32",
            on_step=snapshots.take,
        )
        for batch in drawn:
            images = prepared.decode(batch.latents.to(pl_module.device))
            if sum(len(each) for each in first) < self.shown:
                first.append(images)
            fid.update(self.features(images).features.to(place), real=False)
            lengths = torch.cat(batch.lengths)
            sums += torch.tensor([batch.flops(cost).sum(), lengths.sum(), len(lengths)], dtype=torch.float64)
        operations, kept, passes = trainer.strategy.reduce(sums.to(place), reduce_op="sum").tolist()
        figures = {"fid": float(fid.compute()), "tflops": operations / self.count / 1e12}
        if isinstance(model.network, DCDiT):
            figures["kept"] = kept / passes / positions
        return _Measured(figures, torch.cat(first)[: self.shown])

    def _draw(self, trainer: pl.Trainer, images: Tensor, boundaries: Snapshots) -> None:
        """Save the pictures, and hand them to the loggers that take pictures."""
        self.folder.mkdir(parents=True, exist_ok=True)
        step = trainer.global_step
        pictures = {"samples": self.folder / f"step_{step:08d}_samples.png"}
        save_grid(images, len(images) // len(self.drop_fractions), pictures["samples"])
        rows = [row for row in boundaries.rows.values() if row]
        if rows:
            pictures["boundaries"] = self.folder / f"step_{step:08d}_boundaries.png"
            save_boundaries(rows, [f"sample {number}" for number in range(len(rows))], pictures["boundaries"])
        for logger in trainer.loggers:
            for name, path in pictures.items():
                if isinstance(logger, WandbLogger):
                    logger.log_image(f"val/{name}", [str(path)], step=step)
                elif isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_image(f"val/{name}", read_image(str(path)), step)
