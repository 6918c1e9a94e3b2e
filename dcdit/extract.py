"""Images to latent shards: ``python -m dcdit.extract source=/data/imagenet/train out=data/imagenet256``.

Goes on where it was after any kill, and runs on any number of processes (``torchrun --nproc-per-node 8 -m ...``).
With ``source=null`` it changes scale and shift of shards that are there already.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from dcdit.extraction.settings import ExtractConfig
from dcdit.runtime.display import resumable
from dcdit.runtime.processes import cores, launched, processes
from dcdit.settings.command import command

if TYPE_CHECKING:
    from dcdit.data.manifest import Manifest


@command("extract")
def extract(config: ExtractConfig) -> "Manifest | None":
    """Extract what ``config`` asks for; returns the manifest if this process finished the whole."""
    from dcdit.extraction.renormalise import renormalise
    from dcdit.extraction.setup import extraction_summary, set_up_extraction

    rank, world_size = processes()
    if config.source is None:
        return renormalise(config, Path(config.out) / config.split) if rank == 0 else None
    workers = config.num_workers
    if workers is None:
        workers = max(1, cores() // max(1, launched().local_size))
    directory = Path(config.out) / config.split
    extraction = set_up_extraction(config, directory, rank, world_size, workers)
    with resumable(rank, "encoding", "shard", directory) as display:
        manifest = extraction.run(display)
    if manifest is not None and (extraction.job.finalized or (not display.started and rank == 0)):
        print("Done." if display.started else "Everything is there already.")
        print(extraction_summary(manifest, directory, extraction.empty_classes()))
    elif display.started:
        print(f"Process {rank} is done; what is left is written by other processes, or by the same command again.")
    return manifest


if __name__ == "__main__":
    extract.main()
