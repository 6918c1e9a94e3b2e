"""From what a user says about sampling to what samples: network, guidance, sampler, decoder, and the budget."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dcdit.checkpoints.load import Model, Weights, build_model, describe_weights, read_weights
from dcdit.checkpoints.resolve import CheckpointSource, resolve_checkpoint
from dcdit.compute.table import format_flops
from dcdit.data.decoder import LatentDecoder, load_decoder
from dcdit.diffusion.guidance import Capacity, Guidance
from dcdit.diffusion.samplers import Sampler
from dcdit.diffusion.settings import GuidanceSettings
from dcdit.errors import UserError, naming
from dcdit.network.execution import describe_execution, hold_products_in, is_compiled, set_execution
from dcdit.runtime.devices import check_compiler, pick_device
from dcdit.runtime.memory import configure_memory
from dcdit.runtime.processes import print_once
from dcdit.sampling.budget import Calibration, calibrate, remembered
from dcdit.sampling.capacity import KeptShares, measure_kept, room_of
from dcdit.sampling.cost import SamplingCost
from dcdit.sampling.generate import OnStep, SampleBatch, branch_networks, generate
from dcdit.sampling.guiding import guidance_of, load_guiding
from dcdit.sampling.settings import SamplingConfig


@dataclass(frozen=True)
class Sampling:
    """Everything that is needed to sample images.

    Attributes:
        config: what was asked for.
        source: where the checkpoint is, and where what is made of it goes.
        model, guidance, sampler: what computes.
        decode: latents to images.
        precision: ``fp32`` or ``bf16``.
        calibration: how the drop fraction was found; None if it was given.
        guiding: model of the guiding branch, if ``guidance.weak_checkpoint`` names one.
    """

    config: SamplingConfig
    source: CheckpointSource
    model: Model
    guidance: Guidance
    sampler: Sampler
    decode: LatentDecoder
    precision: str
    calibration: Calibration | None
    guiding: Model | None

    @property
    def description(self) -> str:
        """Model, sampler and budget, for people."""
        model, guidance = self.model, self.guidance.settings
        parts = [f"{model.network.title} {self.source.run}"] + ([f"step {model.step:,}"] if model.step else [])
        parts.append(self.sampler.settings.description)
        if model.network.routes and guidance.drop_schedule is None:
            parts.append(f"ρ {guidance.drop_fraction:.3g}")
        elif guidance.drop_schedule is not None:
            parts.append("ρ by timestep")
        if guidance.scale != 1:
            parts.append(f"guidance {guidance.scale:g}")
            if guidance.guiding_drop_fraction == 1:
                parts.append("guiding branch without backbone")
            elif guidance.guiding_drop_fraction is not None:
                parts.append(f"guiding branch ρ {guidance.guiding_drop_fraction:g}")
            if guidance.every > 1:
                parts.append(f"guiding branch at 1 of {guidance.every} evaluations")
        parts += [self.decode.undecoded] if self.decode.undecoded else []
        return ", ".join(parts)

    def generate(self, labels: Tensor, indices: Sequence[int], on_step: OnStep | None = None) -> Iterator[SampleBatch]:
        """Sample ``indices`` of those that ``labels`` (N,) lists; see :func:`dcdit.sampling.generate.generate`."""
        return generate(
            self.model,
            replace(self.guidance, capacity=self.capacity),
            self.sampler,
            labels,
            indices,
            seed=self.config.seed,
            batch_size=self.config.batch_size,
            precision=self.precision,
            on_step=on_step,
        )

    @cached_property
    def kept_shares(self) -> KeptShares | None:
        """What images keep at each step, measured unless that is known; None unless ``capacity=auto`` asks for it."""
        networks = branch_networks(self.model, self.guidance)
        if self.config.capacity != "auto" or not any(network.routes for network in networks):
            return None
        how = (self.model, self.guidance, self.sampler, self.config.batch_size, self.precision)
        store = self.source.home / "capacities.json"
        question = {**_question(self), "batch_size": self.config.batch_size}
        found = remembered(KeptShares, store, question, lambda: measure_kept(*how))
        if len(found.steps) != len(self.sampler.timesteps):
            raise UserError(f"{store}: it has shares of another number of steps: delete it, they are measured again")
        return found

    @property
    def capacity(self) -> Capacity | None:
        """The room of forward passes that the configuration asks for; None for sequences of exactly what is kept."""
        if isinstance(self.config.capacity, float):
            return room_of(self.config.capacity, branch_networks(self.model, self.guidance))
        return None if self.kept_shares is None else self.kept_shares.room(self.sampler.timesteps)

    def images(self, batch: SampleBatch) -> Tensor:
        """Decode samples to images (n, 1 or 3, height, width) uint8; raise UserError naming one that is not finite."""
        with naming("sample", batch.indices):
            return self.decode(batch.latents)

    def dropped(self, cost: SamplingCost) -> str:
        """Return what to tell the user if images of this ``cost`` lost tokens for lack of room, or nothing."""
        lost = cost.dropped(self.model.latents.positions)
        return lost.described(self.config.capacity) if lost else ""

    def guided(self, settings: GuidanceSettings) -> "Sampling":
        """Return the same with other guidance by the same networks; raise UserError if they cannot do that."""
        guiding = self.guiding if settings.weak_checkpoint is not None else None
        guidance = guidance_of(self.model, settings, guiding)
        return replace(self, guidance=guidance, guiding=guiding)

    def described(self) -> dict[str, Any]:
        """Return the plain values that figures depend on."""
        settings = self.guidance.settings.canonical
        guidance = asdict(settings)
        guidance["weak"] = "budget" if settings.guiding_keeps_class else "uncond"
        guidance["channels"] = settings.guided_channels(self.model.network.channels)
        if self.guiding is not None:
            guidance["weak_checkpoint"] = f"{settings.weak_checkpoint} {self.guiding.digest}"
        capacity = self.config.capacity if self.kept_shares is None else f"auto {self.kept_shares.digest}"
        return {
            "step": self.model.step,
            "weights": self.config.weights,
            "seed": self.config.seed,
            "precision": self.precision,
            "sampler": self.sampler.settings.spec,
            "guidance": guidance,
            "autoencoder": self.decode.identity,
            "rounding": self.decode.rounding,
            # with it an image depends on its batch; what was made without it keeps its description
            **({} if self.capacity is None else {"capacity": capacity, "batch_size": self.config.batch_size}),
        }


def set_up_sampling(config: SamplingConfig, source: CheckpointSource) -> Sampling:
    """Load the checkpoint at ``source``, which ``config`` names, and meet its budget; see :func:`set_up_all`."""
    return set_up_all([config], source)[0]


def set_up_all(configs: Sequence[SamplingConfig], source: CheckpointSource) -> list[Sampling]:
    """Set up the sampling of each configuration; they may differ in guidance and weights, the rest is loaded once.

    Raises:
        UserError: naming key, value and remedy.
    """
    configure_memory()
    device = pick_device(configs[0].device)
    weights = read_weights(source, configs[0].assume)
    loaded: dict[str, Loaded] = {}
    for config in sorted(configs, key=lambda config: config.guidance.scale == 1):  # first those with a guiding branch
        if config.weights not in loaded:
            loaded[config.weights] = _load(weights, config, source, device)
    for config in configs:
        _note_unused(config.guidance)
    samplings = [build_sampling(config, source, loaded[config.weights]) for config in configs]
    return [meet_budget(sampling) if sampling.config.budget.given else sampling for sampling in samplings]


def _note_unused(guidance: GuidanceSettings) -> None:
    """Say what is set of a guiding branch that does not run."""
    if guidance.scale != 1:
        return
    used = asdict(guidance.canonical)
    unused = [f"guidance.{key}={value}" for key, value in asdict(guidance).items() if value != used[key]]
    if unused:
        print_once(f"{', '.join(unused)}: without effect at guidance.scale=1, give a scale above 1 such as 1.5")


@dataclass(frozen=True)
class Loaded:
    """The networks and the decoder that samplings with one kind of weights share."""

    model: Model
    decode: LatentDecoder
    guiding: Model | None


def load(config: SamplingConfig, source: CheckpointSource) -> Loaded:
    """Load what samplings share that differ from ``config`` in sampler, guidance, budget and seed alone."""
    return _load(read_weights(source, config.assume), config, source, pick_device(config.device))


def _load(weights: Weights, config: SamplingConfig, source: CheckpointSource, device: torch.device) -> Loaded:
    if config.compile is True:
        check_compiler("compile", device.type)
    model = build_model(weights, config.weights, device)
    configure_execution(model, config)
    how = describe_execution(model.network, model.device.type, precision_on(model.device, config))
    print_once(f"{source.name}: {describe_weights(weights, model.network, config.weights)}, {how}")
    if config.capacity == "auto" and not model.network.routes:
        print_once(f"capacity=auto changes nothing: {model.network.title} drops no tokens")
    loaded = Loaded(model, load_decoder(model.latents, device, config.autoencoder, config.rounding), None)
    return with_guiding_model(loaded, config)


def with_guiding_model(loaded: Loaded, config: SamplingConfig) -> Loaded:
    """Return ``loaded`` with the guiding model that ``config`` names, which is loaded; without one if it names none."""
    guiding, checkpoint = None, config.guidance.weak_checkpoint
    if checkpoint is not None and config.guidance.scale != 1:
        source = resolve_checkpoint(checkpoint, config.paths.runs, "guidance.weak_checkpoint")
        guiding = load_guiding(source, config, loaded.model)
        configure_execution(guiding, config)
    return replace(loaded, guiding=guiding)


def precision_on(device: torch.device, config: SamplingConfig) -> str:
    """Return the precision of sampling on ``device``, ``fp32`` or ``bf16``."""
    if config.precision == "auto":
        return "bf16" if device.type == "cuda" else "fp32"
    return config.precision


def configure_execution(model: Model, config: SamplingConfig) -> None:
    """Set how a model runs, and hold its weights in the precision of its products."""
    model.network.check_compiled("compile", config.compile)
    half = precision_on(model.device, config) == "bf16"
    set_execution(model.network, compiled=is_compiled(model.network, model.device.type, half, config.compile))
    if half:
        _ = model.digest  # of the weights as they are in the checkpoint
        hold_products_in(model.network, torch.bfloat16)


def build_sampling(config: SamplingConfig, source: CheckpointSource, loaded: Loaded) -> Sampling:
    """Return the sampling of ``config``, its budget not met yet; raise UserError if the networks cannot do it."""
    model = loaded.model
    guiding = loaded.guiding if config.guidance.weak_checkpoint is not None and config.guidance.scale != 1 else None
    guidance = guidance_of(model, config.guidance, guiding)
    canonical = config.guidance.canonical
    same_budget = canonical.guiding_keeps_class and canonical.uncond_drop_fraction == canonical.drop_fraction
    if guiding is not None and same_budget and guiding.digest == model.digest:
        raise UserError(
            f"guidance.weak_checkpoint={canonical.weak_checkpoint} holds the weights that it should guide, at the same"
            " budget: it would guide nowhere; name another checkpoint, or give guidance.uncond_drop_fraction"
        )
    sampler = Sampler(config.sampler.for_process(model.process.settings))
    for network in (model.network, *([guiding.network] if guiding else [])):
        if network is model.network or network.routes:
            network.check_capacity("capacity", config.capacity)
        if sampler.settings.cache and not network.caches:
            raise UserError(
                f"sampler.cache={sampler.settings.cache:g}: {network.title} computes every step: leave the key out"
            )
    precision = precision_on(model.device, config)
    return Sampling(config, source, model, guidance, sampler, loaded.decode, precision, None, guiding)


def meet_budget(sampling: Sampling) -> Sampling:
    """Return ``sampling`` at the drop fraction and threshold that meet its budget, calibrated unless they are known."""
    config, model = sampling.config, sampling.model
    question = {"budget": asdict(config.budget), **_question(sampling)}
    store = sampling.source.home / "budgets.json"
    calibration = remembered(Calibration, store, question, lambda: calibrate_budget(sampling))
    print_once(
        f"Budget: {calibration.described} cost {format_flops(1e12 * calibration.tflops)} per image,"
        f" {calibration.tflops / calibration.full_tflops:.1%} of {format_flops(1e12 * calibration.full_tflops)}"
    )
    trained = max((model.training.get("multi_budget") or {}).get("fractions") or [0.0])
    if calibration.drop_fraction > trained:
        less = "fewer sampler.steps cost less, too"
        if not calibration.cache:
            less = "without budget.by=drop and sampler.cache reuse meets a part of the budget, and less is dropped"
        print_once(f"It was trained at drop fractions up to {trained:g}, quality falls fast beyond; {less}")
    return with_budget_met(sampling, calibration)


def _question(sampling: Sampling) -> dict[str, Any]:
    """Return the plain values that what a few images cost and keep depends on."""
    return {
        "sampler": sampling.sampler.settings.spec,
        "guidance": asdict(sampling.guidance.settings),
        "network": sampling.model.digest,
        "weak": sampling.guiding.digest if sampling.guiding else None,
        "precision": sampling.precision,
    }


def calibrate_budget(sampling: Sampling) -> Calibration:
    """Find what meets the budget of ``sampling``; see :func:`dcdit.sampling.budget.calibrate`."""
    config = sampling.config
    settings = (config.budget, config.batch_size, sampling.precision)
    return calibrate(sampling.model, sampling.guidance, sampling.sampler, *settings)


def with_budget_met(sampling: Sampling, calibration: Calibration) -> Sampling:
    """Return ``sampling`` with what a calibration found."""
    guided = sampling.guided(calibration.guidance(sampling.guidance.settings))
    return replace(guided, sampler=calibration.sampler(sampling.sampler.settings), calibration=calibration)
