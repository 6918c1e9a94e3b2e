"""Many images in one file: ``python -m dcdit.generate checkpoint=runs/b_n4 out=samples/b_n4``.

Writes what the ADM evaluation suite reads: ``samples.npz`` with ``arr_0``, (N, height, width, 3) uint8, and the labels
as ``arr_1``. Images are sampled in chunks that are kept as files: a killed run goes on where it was, any number of
processes shares the work, and the result is the same file.
"""

from pathlib import Path

from dcdit.checks import Images, config
from dcdit.runtime.display import resumable
from dcdit.runtime.processes import processes
from dcdit.sampling.settings import Labels, SamplingConfig
from dcdit.settings.command import command


@config
class GenerateConfig(SamplingConfig):
    """The configuration of ``dcdit.generate``; ``configs/generate.yaml`` describes each key."""

    out: str
    count: Images
    labels: Labels
    chunk_size: Images
    png: bool


@command("generate")
def generate(config: GenerateConfig) -> Path:
    """Generate what ``config`` asks for; returns the folder."""
    from dcdit.checkpoints.resolve import resolve_checkpoint

    source = resolve_checkpoint(config.checkpoint, config.paths.runs)
    from dcdit.sampling.archive import ImageArchive
    from dcdit.sampling.setup import set_up_sampling

    out, (rank, world_size) = Path(config.out), processes()
    sampling = set_up_sampling(config, source)
    archive = ImageArchive(sampling, out, config.count, config.chunk_size, config.png, config.labels)
    with resumable(rank, "sampling", "chunk", out) as display:
        complete = archive.run(rank, world_size, display)
    if complete and (archive.job.finalized or rank == 0):
        print(f"{config.count} images: {archive.npz}, what they are: {archive.summary}")
        if archive.dropped:
            print(archive.dropped)
    elif not complete:
        print(f"Process {rank} is done; what is left is sampled by other processes, or by the same command again.")
    return out


if __name__ == "__main__":
    generate.main()
