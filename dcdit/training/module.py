"""The LightningModule: network, diffusion loss, ratio loss and the sampled drop fraction."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from dcdit.checks import shown, to_plain
from dcdit.compute.flops import gated_share
from dcdit.data.latents import LatentSpec
from dcdit.data.stream import Batch
from dcdit.diffusion.loss import DiffusionLoss
from dcdit.diffusion.process import Process
from dcdit.errors import TrainingError, UserError
from dcdit.network import Network, Output
from dcdit.settings.plugins import plugins_of
from dcdit.training.alignment.losses import Alignment
from dcdit.training.auxiliary import AuxiliaryLoss, Noisy, record_hidden_states
from dcdit.training.batching import recorded_settings
from dcdit.training.callbacks.monitoring import logging_interval
from dcdit.training.distillation import Distillation
from dcdit.training.metrics import BatchMetrics, over_ranks, routing_metrics, step_metrics
from dcdit.training.objective import (
    balanced_timesteps,
    drop_fraction_at,
    drop_path,
    ratio_loss,
    target_compression,
)
from dcdit.training.resume import check_same_step, restore_lightning_state, strip_lightning_state
from dcdit.training.settings import TrainConfig

_ALL_RANKS = 2**32 - 1
"""Stands for a rank in the seed of what all ranks sample alike."""


_REPAIR = (
    "The newest checkpoint is from before. Look at the latents (python -m dcdit.inspect_latents), lower optimizer.lr,"
    " or use trainer.precision=32-true, and resume with ckpt_path=last; without a checkpoint, leave ckpt_path out"
)


def check_fit(network: Network, process: Process, config: TrainConfig) -> None:
    """Raise :class:`UserError` unless a network can be trained by this process as this configuration says."""
    process.check_variance(network.variance)
    if config.multi_budget.fractions and not network.routes:
        raise UserError(
            f"multi_budget.fractions={config.multi_budget.fractions}: {network.title} drops no tokens, set"
            " multi_budget=none"
        )
    if config.multi_budget.path_drop and not network.drops_path:
        raise UserError(
            f"multi_budget.path_drop={config.multi_budget.path_drop:g}: {network.title} cannot leave its backbone out,"
            " set 0"
        )
    share = config.gates.share
    if (network.gates is None) != (share is None):
        has, remedy = ("width", "give a target such as 0.7, or set model.gates=false")
        if share is not None:
            has = "no width"
            remedy = "set model.gates=true in a new run, which init=weights gives these weights, or gates.share=null"
        raise UserError(f"gates.share={shown(share)}: {network.title} has {has} gates, {remedy}")
    network.check_capacity("execution.capacity", config.execution.capacity)
    network.check_compiled("execution.compile", config.execution.compile)
    for part in config.optimizer.lr_scale or ():
        if part not in network.parts():
            known = ", ".join(network.parts())
            raise UserError(f"optimizer.lr_scale: {network.title} has no part {part}, but {known}")
    config.optimizer.check(network)
    config.alignment.check_network(network)


class DCDiTModule(pl.LightningModule):
    """Trains a DC-DiT, or a plain DiT, on scaled latents.

    Every random number of a step (timesteps, noise, dropped labels) comes from a stream seeded by (seed, step, rank):
    no random state needs saving for a resumed run to repeat the uninterrupted one.

    Args:
        config: all that is asked for; what names network, process and training is saved with the checkpoint.
        latents: what it is trained on, saved with the checkpoint.
        distillation: matches the hidden states of a teacher, and is no part of this module or its checkpoints.
        alignment: the loss that ``config.alignment`` asks for. What it trains beside the network is part of this module
            and its checkpoints, and of nothing else.
        init: what the weights came from, saved with the checkpoint.

    Raises:
        UserError: if network, process and training do not fit together.
    """

    def __init__(
        self,
        network: Network,
        process: Process,
        config: TrainConfig,
        latents: LatentSpec,
        distillation: Distillation | None = None,
        alignment: Alignment | None = None,
        init: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        check_fit(network, process, config)
        self.network, self.process = network, process
        self.compression, self.ratio, self.multi_budget = config.compression, config.ratio, config.multi_budget
        self.gates = config.gates
        self.optimizer, self.max_steps, self.seed = config.optimizer, config.trainer.max_steps, config.seed
        self.nonfinite_limit, self.balance_timesteps = config.nonfinite_limit, config.balance_timesteps
        self.room = {"capacity": config.capacity} if network.routes and config.capacity is not None else {}
        names = ("model", "diffusion", "compression", "ratio", "multi_budget", "gates", "optimizer", "seed")
        saved = {name: to_plain(getattr(config, name)) for name in (*names, "nonfinite_limit", "balance_timesteps")}
        if alignment is not None:
            saved["alignment"] = alignment.record
        if plugins := plugins_of(saved):
            saved["plugins"] = plugins
        self.save_hyperparameters(
            {**saved, "latents": latents.to_plain(), "max_steps": self.max_steps, "init": dict(init)}, logger=False
        )
        self.alignment = alignment
        self.auxiliary: list[AuxiliaryLoss] = [loss for loss in (distillation, alignment) if loss is not None]
        self.settings = recorded_settings(config)
        """What the course of the run depends on; saved with the checkpoint."""
        self.skipped = torch.zeros(2)  # steps skipped: in all, and in a row
        self._batch = BatchMetrics()

    # ---- steps -------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Move what is no parameter or buffer to the device."""
        self.process.to(self.device)
        for auxiliary in self.auxiliary:
            auxiliary.move(self.device)
        self.skipped = self.skipped.to(self.device)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of one micro-batch."""
        step, world = self.trainer.global_step, self.trainer.world_size
        micro = batch_idx % self.trainer.accumulate_grad_batches
        torch.manual_seed(self._stream(step, self.global_rank, micro))
        budgets = self.multi_budget
        drop = drop_fraction_at(step, self.seed, budgets.fractions, budgets.full_budget_steps)
        t = None
        if world > 1 and self.balance_timesteps:
            seed = self._stream(step, _ALL_RANKS, micro)
            t = balanced_timesteps(self._draw_times, seed, world, self.global_rank, len(batch[0])).to(self.device)
        self._end_auxiliary(step)
        noisy, drops = self._drop_path(self._diffuse(batch, t), drop, step)
        wanted = {number for auxiliary in self.auxiliary for number in auxiliary.states}
        with record_hidden_states(self.network, wanted) as hidden:
            output = self.network(noisy.x, noisy.t, noisy.labels, drops, **self.room)
        diffusion = self._loss(noisy, output)
        loss, metrics = diffusion.total.mean(), step_metrics(diffusion, drop)
        if output.routing is not None:
            curriculum = self.ratio.curriculum_start, self.ratio.curriculum_steps
            target = target_compression(step, self.compression, *curriculum)
            ratio = ratio_loss(output.routing.prob, output.routing.natural_mask, target, self.ratio.group)
            loss = loss + self.ratio.weight * ratio
            metrics |= {"train/ratio_loss": ratio, **routing_metrics(output.routing, world)}
        if output.gating is not None and self.gates.share is not None:
            lengths = noisy.t.new_full(noisy.t.shape, math.prod(self.network.token_grid))
            tokens = lengths if output.routing is None else output.routing.mask.sum(dim=1)
            share = gated_share(self.network, output.gating, tokens)
            loss = loss + self.gates.weight * (share - self.gates.share) ** 2
            metrics["train/gates_share"] = share
        for auxiliary in self.auxiliary:
            metrics[auxiliary.metric] = auxiliary.loss(hidden, noisy, output.routing)
            loss = loss + auxiliary.weight_at(step) * metrics[auxiliary.metric]
        self._batch.add({**metrics, "train/loss": loss})
        if micro + 1 == self.trainer.accumulate_grad_batches:
            self._log(self._batch.take())
        # A non-finite loss poisons the gradients of every rank, whose norm then makes all of them skip the step.
        return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)

    def _end_auxiliary(self, step: int) -> None:
        """Let go of losses whose weight is 0 from now on, and of their metrics: Lightning would log the last value."""
        for auxiliary in [loss for loss in self.auxiliary if not loss.weight_at(step)]:
            self.auxiliary.remove(auxiliary)
            results: Any = self.trainer._results  # private: an AttributeError here, and in test_init.py, if renamed
            for key in [key for key in results or () if key.endswith(auxiliary.metric)]:
                del results[key]

    def _log(self, metrics: dict[str, Tensor]) -> None:
        """Log what all ranks found, at the steps that are logged."""
        trainer = self.trainer
        if trainer.world_size > 1 and not (trainer.global_step + 1) % logging_interval(trainer):
            metrics = over_ranks(metrics, trainer.world_size)
        self.log_dict(metrics)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Diffusion loss at the full budget; the same timesteps and noise at every validation."""
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(self._stream(0, self.global_rank, batch_idx))
            noisy = self._diffuse(batch)
        output = self.network(noisy.x, noisy.t, noisy.labels)
        diffusion = self._loss(noisy, output)
        size = len(batch[0])
        self.log("val/diffusion_loss", diffusion.total.mean(), sync_dist=True, batch_size=size)
        if output.routing is not None:
            keep_ratio = output.routing.natural_mask.float().mean()
            self.log("val/keep_ratio", keep_ratio, sync_dist=True, batch_size=size)

    def _stream(self, *position: int) -> int:
        """Seed of the random stream at ``position`` (step, rank, micro-batch) of this run."""
        return int(np.random.SeedSequence([self.seed, *position]).generate_state(1, np.uint64)[0])

    def _draw_times(self, count: int, generator: torch.Generator) -> Tensor:
        """Times of training, on the CPU."""
        return self.process.draw_times(count, generator, torch.device("cpu"))

    def _diffuse(self, batch: Batch, t: Tensor | None = None) -> Noisy:
        """Noise a batch, at random timesteps unless they are given; in training drop labels as well."""
        latents, labels, companion = batch
        if t is None:
            t = self.process.draw_times(len(latents), None, self.device)
        noise = torch.randn_like(latents)
        if self.training:
            labels = self.network.drop_labels(labels)
        return Noisy(self.process.add_noise(latents, noise, t), t, labels, latents, noise, companion)

    def _drop_path(self, noisy: Noisy, drop: float, step: int) -> tuple[Noisy, float | Tensor]:
        """The batch, and the drop fraction of all its samples, or of each where some leave the backbone out."""
        budgets = self.multi_budget
        if not budgets.path_drop or step < budgets.full_budget_steps:
            return noisy, drop
        drops = drop_path(drop, budgets.path_drop, len(noisy.x), self.device)
        if budgets.path_drop_class == "drop":
            noisy = replace(noisy, labels=noisy.labels.masked_fill(drops == 1, self.network.null_class))
        return noisy, drops

    def _loss(self, noisy: Noisy, output: Output) -> DiffusionLoss:
        with torch.autocast(self.device.type, enabled=False):
            return self.process.loss(output.prediction, noisy.latents, noisy.x, noisy.noise, noisy.t)

    # ---- optimisation ------------------------------------------------------------------------------------------

    def trained_parts(self) -> dict[str, nn.Module]:
        """The parts of the network and what is trained beside it, by name; together all parameters, in their order."""
        parts = self.network.parts()
        if self.alignment is not None and next(self.alignment.parameters(), None) is not None:
            parts["alignment"] = self.alignment
        return parts

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimiser, and the learning-rate schedule by optimiser step."""
        from diffusers.optimization import get_scheduler

        config = self.optimizer
        optimizer = config.build(self.trained_parts())
        schedule = get_scheduler(
            config.schedule, optimizer, num_warmup_steps=config.lr_warmup_steps, num_training_steps=self.max_steps
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by global norm; where the norm is not finite, have the optimiser skip the step, without a host sync."""
        parameters: Sequence[Tensor] = [p for p in self.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        # Under 16-mixed, gradients are larger by this factor, which fused optimisers divide by only in their step.
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        scale = 1.0 if scaler is None else scaler.get_scale()
        if gradient_clip_val:
            torch.nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val * scale, norm)
        bad = (~norm.isfinite()).float()
        # Optimisers take this flag, as if of a gradient scaler, and leave weights and moments alone where it is 1.
        optimizer.found_inf = bad  # type: ignore[attr-defined]
        self.skipped = torch.stack([self.skipped[0] + bad, (self.skipped[1] + bad) * bad])
        self.log("train/gradient_norm", norm / scale)
        self.log("train/skipped_steps", self.skipped[0])

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Stop with a clear error after too many skipped steps in a row; looked at only when metrics are logged."""
        due = max(1, min(logging_interval(self.trainer), self.nonfinite_limit))
        if self.trainer.global_step % due == 0 and self.skipped[1] >= self.nonfinite_limit:
            limit = f" (limit nonfinite_limit={self.nonfinite_limit})"
            raise TrainingError(f"{self.ailment}{limit}, at step {self.trainer.global_step}: {_REPAIR}")

    def on_train_epoch_end(self) -> None:
        """Raise :class:`TrainingError` if the last step left nothing to go on from: such a run is not finished."""
        if self.ailment:
            raise TrainingError(
                f"{self.ailment}, at step {self.trainer.global_step}: the run is not finished. {_REPAIR}"
            )

    # ---- checkpoints -------------------------------------------------------------------------------------------

    @property
    def ailment(self) -> str:
        """Why a checkpoint of this moment could not be gone on from; empty if it could. Reads from the device."""
        callbacks: list[pl.Callback] = self.trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
        states = [state for optimizer in self.trainer.optimizers for state in optimizer.state.values()]
        saved: dict[str, list[Tensor]] = {
            "weights": list(self.parameters()),
            "averages of the weights": [
                t for callback in callbacks for t in getattr(callback, "average_tensors", list)()
            ],
            "moments of the optimizer": [tensor for state in states for tensor in state.values()],
        }
        for name, tensors in saved.items():
            # The norm of the largest element alone: sums of squares overflow where no element does.
            largest = [torch.linalg.vector_norm(tensor.detach().float(), torch.inf) for tensor in tensors]
            if largest and not bool(torch.stack([norm.to(self.device) for norm in largest]).isfinite().all()):
                return f"The {name} are not finite"
        in_a_row = int(self.skipped[1])
        return f"None of the last {in_a_row} steps had finite gradients" if in_a_row else ""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the count of skipped steps, and what is trained with."""
        checkpoint["skipped"] = self.skipped.cpu()
        strip_lightning_state(checkpoint, self.settings)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the count of skipped steps; learning rate, weight decay and schedule are the configuration's."""
        self.skipped = checkpoint["skipped"].to(self.device)
        fresh: Any = self.configure_optimizers()
        restore_lightning_state(checkpoint, self.trainer, fresh["optimizer"], fresh["lr_scheduler"]["scheduler"])

    def on_train_start(self) -> None:
        """All processes must go on from the same step."""
        check_same_step(self.trainer, self.trainer.global_step)
