"""The weaker, guiding branch of guidance: the model it comes from, and what the networks can do."""

from dcdit.checkpoints.load import (
    Model,
    build_model,
    describe_weights,
    read_weights,
    was_trained_without_backbone,
)
from dcdit.checkpoints.resolve import CheckpointSource
from dcdit.data.latents import LatentSpec, format_numbers
from dcdit.diffusion.guidance import Guidance
from dcdit.diffusion.settings import GuidanceSettings
from dcdit.errors import UserError
from dcdit.runtime.files import content_digest
from dcdit.runtime.processes import print_once
from dcdit.sampling.settings import SamplingConfig


def load_guiding(source: CheckpointSource, config: SamplingConfig, model: Model) -> Model:
    """Return the model at ``source``, on the device of ``model``; raise UserError unless it can guide that."""
    weights = read_weights(source)
    guiding = build_model(weights, config.weights, model.device)
    print_once(f"Guiding branch, {source.name}: {describe_weights(weights, guiding.network, config.weights)}")
    for what, its, ours in (
        ("latents of shape", guiding.latents.shape, model.latents.shape),
        ("latents of scale and shift", *(_scale_and_shift(side.latents) for side in (guiding, model))),
        ("a number of classes of", guiding.network.num_classes, model.network.num_classes),
        ("a process of", guiding.process.settings.name, model.process.settings.name),
        ("a prediction of", *(side.process.facts()["prediction"] for side in (guiding, model))),
    ):
        if its != ours:
            raise UserError(
                f"{source.argument} has {what} {its}, the checkpoint {ours}: guidance needs two of one kind"
            )
    return guiding


def _scale_and_shift(latents: LatentSpec) -> str:
    """Describe scale and shift; with a digest where they are many numbers, so that equal ones read the same."""
    both = (latents.scale, latents.shift)
    digest = f" {content_digest({'numbers': both})[:8]}" if any(isinstance(numbers, tuple) for numbers in both) else ""
    return ", ".join(map(format_numbers, both)) + digest


def check_guidance(model: Model, guidance: GuidanceSettings, guiding: Model | None = None) -> None:
    """Raise :class:`UserError` where ``model``, or that of the guiding branch, cannot do what ``guidance`` needs."""
    second = guiding or model
    if guidance.scale != 1 and not guidance.guiding_keeps_class and second.network.label_dropout == 0:
        raise UserError(
            f"guidance.scale={guidance.scale}: this network was trained without a null class, model.label_dropout=0,"
            " so the guiding branch cannot leave the class out; take scale 1, a guiding branch that knows the class"
            " (guidance.weak=budget or path_class), or train with 0.1"
        )
    main_key = "drop_fraction=1" if guidance.drop_schedule is None else "drop_schedule"
    branches = [(model, guidance.main_drop_fractions, True, "0", main_key)]
    if guidance.scale != 1:
        own, knows_class = guidance.guiding_drop_fraction, guidance.guiding_keeps_class
        if own is None:
            branches.append((second, guidance.main_drop_fractions, knows_class, "0", main_key))
        elif guidance.leaves_path_out:
            branches.append((second, [own], knows_class, "guidance.weak=uncond", f"weak={guidance.weak}"))
        else:
            remedy = "guidance.uncond_drop_fraction=0"
            branches.append((second, [own], knows_class, remedy, "uncond_drop_fraction=1"))
    for branch, drops, knows_class, remedy, key in branches:
        if not branch.network.routes and any(drops):
            raise UserError(f"drop fraction {max(drops):g}: {branch.network.title} drops no tokens, take {remedy}")
        if 1 in drops:
            check_path_drop(branch, knows_class, f"guidance.{key}")


def check_path_drop(model: Model, knows_class: bool, key: str) -> None:
    """Raise :class:`UserError` unless ``model`` was trained to leave its backbone out, as ``key`` asks.

    With ``knows_class`` it has to know the class without backbone.
    """
    budgets = model.training.get("multi_budget") or {}
    if not was_trained_without_backbone(model):
        late = budgets.get("full_budget_steps", 0)
        why = f", which begins after multi_budget.full_budget_steps={late}" if budgets.get("path_drop") else ""
        remedy = "guidance.weak=uncond or budget" if "weak" in key else "a drop fraction below 1, such as 0.9"
        raise UserError(
            f"{key}: the backbone is left out, for which this network was not trained. Take {remedy}, or train with"
            f" multi_budget.path_drop=0.1{why}"
        )
    if knows_class and budgets.get("path_drop_class") == "drop":
        raise UserError(
            f"{key}: without backbone this network was trained without class alone, multi_budget.path_drop_class=drop."
            " Take guidance.weak=path, or train with keep"
        )


def guidance_of(model: Model, settings: GuidanceSettings, guiding: Model | None) -> Guidance:
    """Return guidance of ``model`` by itself, or by ``guiding``; raise :class:`UserError` if they cannot do that."""
    check_guidance(model, settings, guiding)
    return Guidance(model.network, model.network.null_class, settings, guiding.network if guiding else None)
