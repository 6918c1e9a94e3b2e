"""Sample from a checkpoint: ``python -m dcdit.sample checkpoint=runs/digits``.

Writes the samples as one picture, their way from noise with the router's boundaries as another, and the latents.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import hydra
from omegaconf import DictConfig

from dcdit.checks import Bounds, Columns, Natural, NotEmpty, call_checked, checked
from dcdit.sampling.settings import SamplingPlan
from dcdit.settings.entry import entry_point, hold, plain
from dcdit.settings.published import CONFIG_DIR


@checked
@dataclass(frozen=True)
class SampleSettings:
    """What to sample: the keys of ``configs/sample.yaml`` that are its own.

    Attributes:
        out: folder for the results; None takes ``samples`` in the run's directory.
        classes: labels or class names; None takes the first ten.
        per_class: samples of each class.
        frames: columns of ``boundaries.png``; 0 leaves the picture out.
        animation: the way of the first sample from noise to image as a ``gif`` or ``webp``; None for none.
    """

    out: str | None
    classes: Annotated[list[Natural | str], NotEmpty("name at least one class")] | None
    per_class: Annotated[int, Bounds(1, 10**4, hint="for more images take dcdit.generate")]
    frames: Columns
    animation: Literal["gif", "webp"] | None


def check(config: DictConfig) -> tuple[SamplingPlan, SampleSettings]:
    """What ``config`` asks for; UserError if a value is wrong, before anything is loaded."""
    plan, own = SamplingPlan.of(plain(config))
    return plan, call_checked(SampleSettings, own, "")


def run(config: DictConfig) -> Path:
    """Sample what ``config`` asks for, write latents and pictures, and return their folder."""
    plan, settings = check(config)
    from dcdit.checkpoints.resolve import resolve_checkpoint

    place = resolve_checkpoint(plan.settings.checkpoint, plan.runs)
    from dcdit.sampling.pictures import sample_to_folder
    from dcdit.sampling.setup import set_up_sampling

    sampling = set_up_sampling(plan, place)
    out = Path(settings.out) if settings.out else sampling.place.home / "samples"
    print(sample_to_folder(sampling, settings.classes, settings.per_class, settings.frames, settings.animation, out))
    return out


@hydra.main(version_base="1.3", config_path=CONFIG_DIR, config_name="sample")
def main(config: DictConfig) -> None:
    """Hydra entry point."""
    hold(run, config)


if __name__ == "__main__":
    entry_point(main)
