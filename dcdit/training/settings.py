"""What a user may say about training. No torch here, so that mistakes show at once."""

import re
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from dcdit.checkpoints.settings import AssumeSettings, Paths, WeightsKind
from dcdit.checks import (
    Bounds,
    Capacity,
    Compression,
    Count,
    Matches,
    Meant,
    Named,
    NamedSettings,
    Natural,
    NonNegative,
    Seed,
    Table,
    TailDrop,
    WithOthers,
    config,
    conform,
    shown,
)
from dcdit.diffusion.settings import PROCESSES, ProcessSettings
from dcdit.errors import UserError
from dcdit.runs.changes import leaves
from dcdit.runs.state import RunId
from dcdit.settings.compose import RUN_ID
from dcdit.training.alignment.settings import ALIGNMENTS, AlignmentSettings
from dcdit.training.optimizer_settings import OPTIMIZERS, OptimizerSettings

if TYPE_CHECKING:
    from dcdit.checkpoints.load import Model
    from dcdit.training.initial_weights import Start


@config
class RatioSettings:
    """The loss that pulls the share of kept tokens to 1 / N, and the curriculum of N."""

    weight: NonNegative
    group: Annotated[int, Bounds(1, 10**7, hint="take 16, or null for the whole batch")] | None
    curriculum_start: Compression | None
    curriculum_steps: Natural

    def __post_init__(self) -> None:
        if (self.curriculum_start is None) != (self.curriculum_steps == 0):
            raise UserError(
                f"curriculum_steps={self.curriculum_steps}: a curriculum needs curriculum_start, a compression such as"
                " 2, and curriculum_steps; set both, or neither"
            )


@config
class MultiBudgetSettings:
    """The budgets that training samples, step by step and sample by sample: the keys of ``configs/multi_budget``."""

    fractions: list[TailDrop]
    full_budget_steps: Natural
    path_drop: Annotated[float, Bounds(0, 1, open_high=True, hint="it is a probability, such as 0.1")]
    path_drop_class: Literal["keep", "drop"]


@config
class GatesSettings:
    """The loss that pulls the share of the FLOPs of the blocks that width gates let run to a target."""

    share: Annotated[float, Bounds(0, 1, open_low=True, hint="0.7 asks for 70% of the FLOPs of the blocks")] | None
    weight: NonNegative


@config
class MatchComputeSettings:
    """Training as long as a baseline costs."""

    baseline: str | None
    steps: Count


AUTO_CAPACITY = 1.5
"""Room of ``execution.capacity=auto`` over what the ratio loss asks the router to keep."""


@config
class ExecutionSettings:
    """How the same mathematics is run."""

    compile: Literal["auto"] | bool
    activation_checkpointing: bool
    max_micro_batch: Literal["auto"] | Count | None
    capacity: Literal["auto"] | Capacity | None


Differing = Literal["classes", "grid", "router", "latents"]


class InitSettings(NamedSettings):
    """What training starts from.

    Attributes:
        name: its name in :data:`INITS`.
        implementation: what :meth:`start` calls.
    """

    def start(self, model: "Model", runs: str) -> "Start":
        """Put the weights that training starts from into a network, and freeze what is not trained.

        Args:
            model: the fresh network, what it is trained for and on, and the optimiser steps done; after some of them
                nothing is loaded but the teacher, while it is needed.
            runs: folder of all runs.

        Raises:
            UserError: naming tensor and both shapes, or key and both values, where something does not fit.
        """
        start: Start = self.call_implementation(model, runs)
        return start

    def check_model(self, name: object) -> None:
        """Raise :class:`UserError` if no model of this ``model.name`` can start so."""


@config
class FromScratch(InitSettings):
    """No weights but fresh ones."""

    name: ClassVar[str] = "none"
    implementation: ClassVar[str] = "dcdit.training.initial_weights:start_fresh"


@config
class FromWeights(InitSettings):
    """Training that starts from weights that exist: step 0, a new optimiser, a new average."""

    name: ClassVar[str] = "weights"
    implementation: ClassVar[str] = "dcdit.training.initial_weights:start_from_weights"
    checkpoint: str
    weights: WeightsKind
    adapt: list[Differing]
    freeze: list[str]
    assume: AssumeSettings


@config
class FromTeacher(InitSettings):
    """A DC-DiT that takes the blocks and embedders of a plain DiT over, and matches its hidden states for a while."""

    name: ClassVar[str] = "upcycle"
    implementation: ClassVar[str] = "dcdit.training.upcycling:start_from_teacher"
    teacher: str
    weights: WeightsKind
    adapt: list[Differing]
    freeze: list[str]
    assume: AssumeSettings
    distil_steps: Natural
    distil_weight: NonNegative
    distil_decay: bool

    def check_model(self, name: object) -> None:
        """Raise :class:`UserError` for a plain DiT, which is no DC-DiT."""
        if name == "dit":
            raise UserError("init=upcycle makes a DC-DiT of a plain DiT: choose a dcdit model, such as model=dcdit_xl")


INITS: Table[type[InitSettings]] = Table(
    "init.name", {kind.name: kind for kind in (FromScratch, FromWeights, FromTeacher)}
)
"""What training may start from, by ``init.name``."""

Precision = Literal["bf16-mixed", "16-mixed", "32-true", "bf16", 16, 32]
"""The precisions of Lightning in which weights and optimiser stay float32, as sampling and resuming expect."""

_OTHER_NAMES = {
    "fp32": "32-true",
    "float32": "32-true",
    "fp16": "16-mixed",
    "float16": "16-mixed",
    "bfloat16": "bf16-mixed",
}
_Devices = Annotated[int, Bounds(-1, 10**7)]
Endless = Annotated[int, Bounds(-1, 10**12, hint="-1 stands for all")]


@config
class TrainerSettings:
    """Arguments of Lightning's Trainer that have a range; ``others`` are the rest, which it checks itself."""

    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"]
    devices: _Devices | list[_Devices] | str
    num_nodes: Count
    strategy: Literal["auto", "ddp", "ddp_find_unused_parameters_true", "ddp_find_unused_parameters_false"]
    precision: Annotated[Precision, Meant(_OTHER_NAMES)]
    max_steps: Count
    gradient_clip_val: NonNegative | None
    accumulate_grad_batches: Count
    log_every_n_steps: Count
    val_check_interval: Count
    max_epochs: Endless
    check_val_every_n_epoch: Count | None
    num_sanity_val_steps: Endless
    enable_model_summary: bool
    use_distributed_sampler: bool
    others: dict[str, Any]

    def __post_init__(self) -> None:
        if self.max_epochs == 0:
            raise UserError("max_epochs=0 trains nothing: take -1, for trainer.max_steps says how long a run is")
        if isinstance(self.devices, int) and self.devices < 1 and self.devices != -1:
            raise UserError(f"devices={self.devices} is no number of devices: take 1 or more, or -1 for all")
        if self.devices == [] or (isinstance(self.devices, list) and min(self.devices) < 0):
            raise UserError(f"devices={self.devices} names no devices: take a number, or their indices, such as [0,1]")

    @property
    def on_gpu(self) -> bool:
        """Whether CUDA devices are asked for by name."""
        return self.accelerator in ("gpu", "cuda")

    @property
    def device_count(self) -> int | None:
        """Devices of each node; None for as many as there are."""
        if isinstance(self.devices, list):
            return len(self.devices)
        if isinstance(self.devices, str):
            if self.devices == "auto":
                return None
            indices = [index for index in self.devices.split(",") if index.strip()]
            if not all(re.fullmatch(r" *-?[0-9]{1,8} *", index) for index in indices) or not indices:
                raise UserError(f"trainer.devices={shown(self.devices)} is no number, list of indices or auto")
            alone = "," not in self.devices
            return (None if indices == ["-1"] else int(indices[0])) if alone else len(indices)
        return None if self.devices == -1 else self.devices


LOGGER_KEYS: dict[str, Any] = {
    "save_dir": str,
    "name": str | None,
    "flush_logs_every_n_steps": Count,
    "project": str,
    "group": str | None,
    "tags": list[str] | None,
    "mode": Literal["online", "offline", "disabled"] | None,
    "entity": str | None,
    "notes": str | None,
    "id": RunId | None,
    "resume": Literal["allow", "must", "never", "auto"] | bool | None,
}
"""Keys of ``configs/logger`` by their last part. Lightning's loggers check them late, or not at all."""


@config
class TrainConfig:
    """The configuration of ``dcdit.train``; ``configs/train.yaml`` and its groups describe each key.

    Raises:
        UserError: naming key, value and remedy.
    """

    compression: Compression
    seed: Seed
    run_name: Annotated[str, Matches(r"(?!(.*/)?\.\.?(/|$)).*\S.*", "a name (for another place there is run_dir)")]
    run_dir: str
    resume: str | None
    ckpt_path: str | None
    run_id: RunId | None
    nonfinite_limit: Count
    balance_timesteps: bool
    init: Annotated[InitSettings, Named(INITS)]
    alignment: Annotated[AlignmentSettings, Named(ALIGNMENTS)]
    diffusion: Annotated[ProcessSettings, Named(PROCESSES)]
    ratio: RatioSettings
    multi_budget: MultiBudgetSettings
    gates: GatesSettings
    optimizer: Annotated[OptimizerSettings, Named(OPTIMIZERS)]
    match_compute: MatchComputeSettings
    execution: ExecutionSettings
    trainer: Annotated[TrainerSettings, WithOthers(TrainerSettings)]
    model: dict[str, Any]
    data: dict[str, Any]
    callbacks: dict[str, Any] | None
    logger: dict[str, Any] | None
    cluster: dict[str, Any]
    paths: Paths
    resolution: dict[str, Any]

    def __post_init__(self) -> None:
        for key, value in leaves({"logger": self.logger or {}}):
            last = key.rpartition(".")[2]
            if key.count(".") == 2 and last in LOGGER_KEYS and value != RUN_ID:
                conform(key, value, LOGGER_KEYS[last])
        self.init.check_model(self.model.get("name"))

    @property
    def capacity(self) -> float | None:
        """Share of all positions that the packed sequence of a training step has room for; None for all."""
        capacity = self.execution.capacity
        if capacity != "auto":
            return capacity
        return min(1.0, AUTO_CAPACITY / min(self.compression, self.ratio.curriculum_start or self.compression))

    @property
    def batch_size(self) -> int:
        """Samples of an optimiser step over all processes and micro-batches."""
        return int(conform("data.batch_size", self.data.get("batch_size"), Count))
