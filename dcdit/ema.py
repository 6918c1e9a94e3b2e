"""EMA weights of any length after training: ``python -m dcdit.ema checkpoint=runs/b_n4 length=[0.05,0.1]``.

A run that was trained with ``callbacks.power_ema.lengths=[0.05,0.1]`` keeps averages and snapshots, of which averages
of other lengths are put together (EDM2, arXiv 2312.02696). Each becomes a folder as ``dcdit export`` writes it;
``weights=ema@0.05`` of every command that samples does the same without one.
"""

from pathlib import Path
from typing import Annotated, Literal

from dcdit.checkpoints.settings import AS_PUBLISHED, Length, Paths
from dcdit.checks import FLOAT_NAMES, NotEmpty, config
from dcdit.settings.command import command


@config
class EMAConfig:
    """The configuration of ``dcdit.ema``; ``configs/ema.yaml`` describes each key."""

    checkpoint: str
    length: Annotated[list[Length], NotEmpty("name at least one, such as 0.05")] | Length
    out: str | None
    dtype: Annotated[Literal["fp32", "bf16", "fp16"], FLOAT_NAMES]
    paths: Paths

    @property
    def lengths(self) -> list[float]:
        """The lengths as a list, also where one number was given."""
        return self.length if isinstance(self.length, list) else [self.length]


@command("ema")
def ema(config: EMAConfig) -> list[Path]:
    """Combine averages as ``config`` says and export each; returns the folders."""
    from dcdit.checkpoints.resolve import resolve_checkpoint

    source = resolve_checkpoint(config.checkpoint, config.paths.runs)
    from dcdit.checkpoints.export import Card, write_exported
    from dcdit.checkpoints.load import read_weights
    from dcdit.reporting.collect import figures_of_checkpoint
    from dcdit.runs.state import command_of

    weights, folders = read_weights(source, AS_PUBLISHED), []
    for length in config.lengths:
        kind = f"ema@{length:g}"
        folder = (Path(config.out) if config.out else source.home / "ema") / f"{length:g}"
        card = Card(None, None, command_of(source.home), figures_of_checkpoint(source.home, weights.step, kind))
        print(write_exported(folder, weights, kind, config.dtype, card))
        folders.append(folder)
    return folders


if __name__ == "__main__":
    ema.main()
