"""Descriptions of measurements for people, and whether their figures may stand beside published ones."""

from dcdit.diffusion.settings import GuidanceSettings, SamplerOptions
from dcdit.evaluation.plans import Comparison, SampledPlan
from dcdit.evaluation.results import Result
from dcdit.evaluation.scores import Score

PUBLISHED_COUNT, PUBLISHED_REFERENCE, PUBLISHED_FEATURES = 50_000, 10_000, "inception-v3-compat"


def describe_step(step: int | None) -> str:
    """Describe the optimiser steps trained."""
    return "at an unknown step" if step is None else f"step {step}"


def describe_rounding(plan: SampledPlan) -> str:
    """Describe how pixels were brought to 0..255."""
    return {"round": "pixels rounded", "truncate": "pixels truncated"}.get(plan.rounding, plan.rounding)


def describe_reference(result: Result | Score) -> str:
    """Describe what the images were compared with."""
    reference = result.plan.reference
    images = f"{reference.count:,} images of {result.reference}"
    if not reference.published:
        return f"against {images}"
    names = {"features": "FID", "spatial": "sFID"}
    metrics = " and ".join(names[statistics] for statistics in reference.published)
    alone = f"{metrics} against the statistics of the whole set in {result.reference}"
    return f"{alone}, the rest against {images}" if reference.count else alone


def describe_guiding_branch(guidance: GuidanceSettings, with_drop: bool = True) -> str:
    """Describe the guiding branch, ``with_drop`` or without its drop fraction; empty if none runs."""
    if guidance.scale == 1:
        return ""
    text = "same class" if guidance.weak == "budget" else "no class"
    if guidance.weak_checkpoint is not None:
        text += f" of {guidance.weak_checkpoint.rpartition(' ')[0]}"
    drop = guidance.uncond_drop_fraction if with_drop else None
    if drop is not None:
        text += ", no backbone" if drop == 1 else f" at ρ {drop:g}"
    return text if guidance.every == 1 else f"{text}, at 1 of {guidance.every} evaluations"


def describe_clipping(sampler: SamplerOptions) -> str:
    """Describe whether predicted images were clipped; empty if not."""
    return ", x_0 clipped" if sampler.clip else ""


def describe_capacity(plan: SampledPlan) -> str:
    """Describe the room of forward passes, which there is."""
    return "capacity auto" if isinstance(plan.capacity, str) else f"capacity {plan.capacity:g}"


def describe_budget(plan: SampledPlan) -> str:
    """Describe a measured point without its guidance scale."""
    guidance, cache = plan.guidance, plan.sampler.cache
    text = "ρ by timestep" if guidance.drop_schedule is not None else f"ρ {guidance.drop_fraction:g}"
    text += f", cache {cache:g}" if cache else ""
    text += "" if plan.capacity is None else f", {describe_capacity(plan)}"
    branch = describe_guiding_branch(guidance)
    return f"{plan.weights} weights, {text}" + (f", guiding branch: {branch}" if branch else "")


def describe_point(plan: SampledPlan) -> str:
    """Describe a point of a grid."""
    return f"{describe_budget(plan)}, guidance {plan.guidance.scale:g}"


def describe_weights(plan: SampledPlan, decay: float | None) -> str:
    """Describe the weights that sampled, with the ``decay`` of their EMA if that is known."""
    return f"{plan.weights} weights" + ("" if decay is None else f" of decay {decay:g}")


def describe_sampling(score: Score) -> str:
    """Describe how scored images were sampled: all that their figures depend on, if that is known."""
    if score.sampled is None:
        return "sampled in an unknown way"
    plan, decay = score.sampled.plan, score.sampled.ema_decay
    return (
        f"sampled by checkpoint {plan.checkpoint[:12]}, {describe_step(plan.step)}, {plan.precision},"
        f" {plan.labels} labels, {describe_rounding(plan)},"
        f" {plan.sampler.name} {plan.sampler.steps} steps{describe_clipping(plan.sampler)},"
        f" {describe_point(plan).replace(f'{plan.weights} weights', describe_weights(plan, decay), 1)}"
    )


def differences_from_published(plan: Comparison, sampled: SampledPlan | None = None) -> list[str]:
    """Return why figures are not FID-50K, sFID, IS, precision and recall as the ADM suite defines them, or nothing.

    Args:
        plan: how the images were compared.
        sampled: how they were sampled, if ``plan`` does not say it; None if nobody knows, and nothing is said of it.
    """
    reference, differences = plan.reference, []
    sampled = plan if isinstance(plan, SampledPlan) else sampled
    if plan.count != PUBLISHED_COUNT:
        differences.append(f"{plan.count:,} images instead of {PUBLISHED_COUNT:,}")
    if sampled is not None and sampled.labels != "random":
        differences.append(f"{sampled.labels} labels instead of random ones")
    if plan.features.name != PUBLISHED_FEATURES:
        differences.append(f"features of {plan.features.name} instead of {PUBLISHED_FEATURES}")
    if "features" not in reference.published and "fid" in plan.metrics:
        differences.append("FID against images instead of the statistics of a whole training set")
    if "spatial" not in reference.published and "sfid" in plan.metrics:
        differences.append("sFID against images instead of the statistics of a whole training set")
    if reference.count != PUBLISHED_REFERENCE and "prc" in plan.metrics:
        differences.append(
            f"precision and recall against {reference.count:,} images instead of {PUBLISHED_REFERENCE:,}"
        )
    if sampled is not None and sampled.precision != "fp32":
        differences.append(f"sampled in {sampled.precision} instead of fp32")
    if sampled is not None and sampled.undecoded:
        differences.append(f"no pictures, but {sampled.undecoded}")
    return differences


def describe_comparability(plan: Comparison, sampled: SampledPlan | None = None) -> str:
    """Describe whether figures may stand beside published ones; see :func:`differences_from_published`."""
    if differences := differences_from_published(plan, sampled):
        return f"Not comparable with published figures: {'; '.join(differences)}"
    return "Measured as published figures are: FID-50K against the statistics that come with the reference"
