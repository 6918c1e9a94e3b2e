"""Sample from a checkpoint: ``python -m dcdit.sample checkpoint=runs/digits``.

Writes the samples as one picture, their way from noise with the router's boundaries as another, and the latents.
"""

from pathlib import Path
from typing import Annotated, Literal

from dcdit.checks import Bounds, Columns, config
from dcdit.sampling.settings import Classes, SamplingConfig
from dcdit.settings.command import command


@config
class SampleConfig(SamplingConfig):
    """The configuration of ``dcdit.sample``; ``configs/sample.yaml`` describes each key."""

    out: str | None
    classes: Classes | None
    per_class: Annotated[int, Bounds(1, 10**4, hint="for more images take dcdit.generate")]
    frames: Columns
    animation: Literal["gif", "webp"] | None


@command("sample")
def sample(config: SampleConfig) -> Path:
    """Sample what ``config`` asks for, write latents and pictures, and return their folder."""
    from dcdit.checkpoints.resolve import resolve_checkpoint

    source = resolve_checkpoint(config.checkpoint, config.paths.runs)
    from dcdit.sampling.pictures import sample_to_folder
    from dcdit.sampling.setup import set_up_sampling

    sampling = set_up_sampling(config, source)
    out = Path(config.out) if config.out else sampling.source.home / "samples"
    print(sample_to_folder(sampling, config.classes, config.per_class, config.frames, config.animation, out))
    return out


if __name__ == "__main__":
    sample.main()
