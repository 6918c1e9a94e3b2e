"""What measurements are called, and whether their figures may stand beside published ones. Takes plain values."""

from typing import Any

PUBLISHED_COUNT, PUBLISHED_REFERENCE, PUBLISHED_FEATURES = 50_000, 10_000, "inception-v3-compat"


def step_words(step: int | None) -> str:
    """Optimiser steps trained, for people."""
    return "at an unknown step" if step is None else f"step {step}"


def rounding_words(plan: dict[str, Any]) -> str:
    """How pixels were brought to 0..255, for people."""
    return {"round": "pixels rounded", "truncate": "pixels truncated"}.get(plan["rounding"], plan["rounding"])


def reference_words(values: dict[str, Any]) -> str:
    """What was compared with, for people."""
    reference, place = values["plan"]["reference"], values["reference"]
    images = f"{reference['count']:,} images of {place}"
    if not reference["published"]:
        return f"against {images}"
    names = {"features": "FID", "spatial": "sFID"}
    of = " and ".join(names[each] for each in reference["published"])
    alone = f"{of} against the statistics of the whole set in {place}"
    return f"{alone}, the rest against {images}" if reference["count"] else alone


def differences_from_published(values: dict[str, Any]) -> list[str]:
    """Why figures are no FID-50K, sFID, IS, precision and recall as the ADM suite defines them; none if they are."""
    plan = values["plan"]
    found = []
    if plan["count"] != PUBLISHED_COUNT:
        found.append(f"{plan['count']:,} images instead of {PUBLISHED_COUNT:,}")
    if plan["labels"] != "random":
        found.append(f"{plan['labels']} labels instead of random ones")
    if plan["features"]["name"] != PUBLISHED_FEATURES:
        found.append(f"features of {plan['features']['name']} instead of {PUBLISHED_FEATURES}")
    if "features" not in plan["reference"]["published"] and "fid" in plan["metrics"]:
        found.append("FID against images instead of the statistics of a whole training set")
    if "spatial" not in plan["reference"]["published"] and "sfid" in plan["metrics"]:
        found.append("sFID against images instead of the statistics of a whole training set")
    if plan["reference"]["count"] != PUBLISHED_REFERENCE and "prc" in plan["metrics"]:
        number = f"{plan['reference']['count']:,}"
        found.append(f"precision and recall against {number} images instead of {PUBLISHED_REFERENCE:,}")
    if plan["precision"] != "fp32":
        found.append(f"sampled in {plan['precision']} instead of fp32")
    return found


def weak_words(guidance: dict[str, Any]) -> str:
    """What the guiding branch is, for people; empty if none runs."""
    if guidance["scale"] == 1:
        return ""
    words = {"uncond": "no class", "budget": "same class"}[guidance["weak"]]
    if guidance["weak_checkpoint"] is not None:
        words += f" of {guidance['weak_checkpoint'].rpartition(' ')[0]}"
    own = guidance["uncond_drop_fraction"]
    return words if own is None else f"{words} at ρ {own:g}"


def clip_words(sampler: dict[str, Any]) -> str:
    """Whether predicted images were clipped."""
    return ", x_0 clipped" if sampler.get("clip") else ""


def budget_words(plan: dict[str, Any]) -> str:
    """A point without its guidance scale, for people."""
    guidance = plan["guidance"]
    words = "ρ by timestep" if guidance["drop_schedule"] is not None else f"ρ {guidance['drop_fraction']:g}"
    words += f", cache {plan['sampler']['cache']:g}" if plan["sampler"]["cache"] else ""
    weak = weak_words(guidance)
    return f"{plan['weights']} weights, {words}" + (f", guiding branch: {weak}" if weak else "")


def point_words(plan: dict[str, Any]) -> str:
    """A point of a grid, for people."""
    return f"{budget_words(plan)}, guidance {plan['guidance']['scale']:g}"
