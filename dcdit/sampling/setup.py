"""From what a user says about sampling to what samples: network, guidance, sampler, decoder, and the budget."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from dcdit.checkpoints.load import Model, build_model, read_weights, words
from dcdit.checkpoints.locate import Place
from dcdit.data.autoencoder import LatentDecoder, load_decoder
from dcdit.diffusion.guidance import Guidance
from dcdit.diffusion.samplers import Sampler
from dcdit.diffusion.settings import GuidanceSettings
from dcdit.errors import UserError
from dcdit.network import Network
from dcdit.network.blocks import set_execution
from dcdit.runtime.devices import fingerprint, pick_device
from dcdit.runtime.memory import keep_freed_memory
from dcdit.sampling.budget import Calibration, calibrate, remembered
from dcdit.sampling.generate import OnStep, SampleBatch, generate
from dcdit.sampling.settings import SamplingPlan, described


@dataclass(frozen=True)
class Sampling:
    """Everything that is needed to sample images.

    Attributes:
        plan: what was asked for.
        place: where the checkpoint is, and where what is made of it goes.
        model, guidance, sampler: what computes.
        decode: latents to images.
        precision: ``fp32`` or ``bf16``.
        calibration: how the drop fraction was found; None if it was given.
    """

    plan: SamplingPlan
    place: Place
    model: Model
    guidance: Guidance
    sampler: Sampler
    decode: LatentDecoder
    precision: str
    calibration: Calibration | None

    @property
    def batch_size(self) -> int:
        """Samples per forward pass."""
        return self.plan.settings.batch_size

    def generate(self, labels: Tensor, indices: Sequence[int], on_step: OnStep | None = None) -> Iterator[SampleBatch]:
        """Sample ``indices`` of those that ``labels`` (N,) lists; see :func:`dcdit.sampling.generate.generate`."""
        return generate(
            self.model,
            self.guidance,
            self.sampler,
            labels,
            indices,
            seed=self.plan.settings.seed,
            batch_size=self.batch_size,
            precision=self.precision,
            on_step=on_step,
        )

    def at_drop(self, drop_fraction: float) -> "Sampling":
        """The same at another drop fraction of the conditional half.

        Raises:
            UserError: if the network cannot drop so much.
        """
        settings = replace(self.guidance.settings, drop_fraction=drop_fraction)
        check_guidance(self.model.network, settings)
        return replace(self, guidance=replace(self.guidance, settings=settings))

    def described(self) -> dict[str, Any]:
        """What figures must stand beside, as plain values."""
        return {
            "step": self.model.step,
            "weights": self.plan.settings.weights,
            "seed": self.plan.settings.seed,
            "precision": self.precision,
            "sampler": described(self.sampler.settings),
            "guidance": asdict(self.guidance.settings),
            "autoencoder": self.decode.identity,
        }


def set_up_sampling(plan: SamplingPlan, place: Place) -> Sampling:
    """Load the checkpoint at ``place``, which ``plan`` names, and meet its budget.

    Raises:
        UserError: naming key, value and remedy.
    """
    settings = plan.settings
    keep_freed_memory()
    device = pick_device(settings.device)
    found = read_weights(place, plan.assume)
    model = build_model(found, settings.weights, device)
    print(f"{place.name}: {words(found, model.network, settings.weights)}")
    set_execution(model.network, compiled=settings.compile)
    check_guidance(model.network, plan.guidance)
    precision = settings.precision
    if precision == "auto":
        precision = "bf16" if model.device.type == "cuda" else "fp32"
    decode = load_decoder(model.latents, model.device, settings.autoencoder)
    guidance = Guidance(model.network, model.network.null_class, plan.guidance)
    sampling = Sampling(plan, place, model, guidance, Sampler(plan.sampler), decode, precision, None)
    return meet_budget(sampling) if plan.budget.given else sampling


def meet_budget(sampling: Sampling) -> Sampling:
    """``sampling`` at the drop fraction that its budget asks for, calibrated unless that is known."""
    plan, model = sampling.plan, sampling.model
    question = {
        "budget": asdict(plan.budget),
        "sampler": described(plan.sampler),
        "guidance": asdict(plan.guidance),
        "network": fingerprint(model.network),
        "precision": sampling.precision,
    }
    found = remembered(
        sampling.place.home / "budgets.json",
        question,
        lambda: calibrate(
            model, sampling.guidance, sampling.sampler, plan.budget, sampling.batch_size, sampling.precision
        ),
    )
    print(
        f"Budget: drop fraction {found.drop_fraction} costs {found.tflops:.4g} TFLOPs per image,"
        f" {found.tflops / found.full_tflops:.1%} of {found.full_tflops:.4g}"
    )
    return replace(sampling.at_drop(found.drop_fraction), calibration=found)


def check_guidance(network: Network, guidance: GuidanceSettings) -> None:
    """Raise :class:`UserError` where ``network`` cannot do what ``guidance`` asks of it."""
    if guidance.scale != 1 and network.label_dropout == 0:
        raise UserError(
            f"guidance.scale={guidance.scale}: this network was trained with model.label_dropout=0, so its null class"
            " means nothing; take scale 1, or train with 0.1"
        )
    if not network.routes and any(guidance.drops):
        raise UserError(f"drop fraction {max(guidance.drops):g}: {network.title} drops no tokens, take 0")
