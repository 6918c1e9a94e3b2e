"""Many images in one file: ``python -m dcdit.generate checkpoint=runs/b_n4 out=samples/b_n4``.

Writes what the ADM evaluation suite reads: ``samples.npz`` with ``arr_0``, (N, height, width, 3) uint8, and the labels
as ``arr_1``. Images are sampled in chunks that are kept as files: a killed run goes on where it was, any number of
processes shares the work, and the result is the same file.
"""

from dataclasses import dataclass
from pathlib import Path

import hydra
from omegaconf import DictConfig

from dcdit.checks import Images, call_checked, checked
from dcdit.runtime.display import resumable
from dcdit.runtime.processes import processes
from dcdit.sampling.settings import Labels, SamplingPlan
from dcdit.settings.entry import entry_point, hold, plain
from dcdit.settings.published import CONFIG_DIR


@checked
@dataclass(frozen=True)
class GenerateSettings:
    """What to generate: the keys of ``configs/generate.yaml`` that are its own.

    Attributes:
        out: folder for the results.
        count: number of images.
        chunk_size: images of a task; what a kill loses at most, on each process.
        labels: which classes they are of.
        png: write each image as a PNG too.
    """

    out: str
    count: Images
    labels: Labels
    chunk_size: Images
    png: bool


def check(config: DictConfig) -> tuple[SamplingPlan, GenerateSettings]:
    """What ``config`` asks for; UserError if a value is wrong, before anything is loaded."""
    plan, own = SamplingPlan.of(plain(config))
    return plan, call_checked(GenerateSettings, own, "")


def run(config: DictConfig) -> Path:
    """Generate what ``config`` asks for; returns the folder."""
    plan, settings = check(config)
    from dcdit.checkpoints.resolve import resolve_checkpoint

    place = resolve_checkpoint(plan.settings.checkpoint, plan.runs)
    from dcdit.sampling.archive import ImageArchive
    from dcdit.sampling.setup import set_up_sampling

    out, (rank, world_size) = Path(settings.out), processes()
    sampling = set_up_sampling(plan, place)
    archive = ImageArchive(sampling, out, settings.count, settings.chunk_size, settings.png, settings.labels)
    with resumable(rank, "sampling", "chunk", out) as display:
        complete = archive.run(rank, world_size, display)
    if complete and (archive.job.finalized or rank == 0):
        print(f"{settings.count} images: {archive.npz}, what they are: {archive.summary}")
    elif not complete:
        print(f"Process {rank} is done; what is left is sampled by other processes, or by the same command again.")
    return out


@hydra.main(version_base="1.3", config_path=CONFIG_DIR, config_name="generate")
def main(config: DictConfig) -> None:
    """Hydra entry point."""
    hold(run, config)


if __name__ == "__main__":
    entry_point(main)
