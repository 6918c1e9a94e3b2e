"""Images to latent shards: ``python -m dcdit.extract source=/data/imagenet/train out=data/imagenet256``.

Goes on where it was after any kill, and runs on any number of processes (``torchrun --nproc-per-node 8 -m ...``).
"""

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from omegaconf import DictConfig

from dcdit.checks import call_checked
from dcdit.extraction.settings import ExtractionSettings, ExtractSettings
from dcdit.runtime.display import resumable
from dcdit.runtime.processes import cores, local_processes, processes
from dcdit.settings.entry import entry_point, hold, plain
from dcdit.settings.published import CONFIG_DIR

if TYPE_CHECKING:
    from dcdit.data.manifest import Manifest


def check(config: DictConfig) -> tuple[ExtractSettings, ExtractionSettings]:
    """What ``config`` asks for; UserError if a value is wrong, before anything is loaded."""
    values = plain(config)
    names = {column.name for column in fields(ExtractionSettings)}
    shaping = call_checked(ExtractionSettings, {key: values[key] for key in values if key in names}, "")
    return call_checked(ExtractSettings, {key: values[key] for key in values if key not in names}, ""), shaping


def run(config: DictConfig) -> "Manifest | None":
    """Extract what ``config`` asks for; returns the manifest if this process finished the whole."""
    settings, shaping = check(config)
    from dcdit.extraction.setup import extraction_summary, set_up_extraction

    rank, world_size = processes()
    workers = settings.num_workers
    if workers is None:
        workers = max(1, cores() // local_processes())
    directory = Path(settings.out) / settings.split
    extraction = set_up_extraction(settings, shaping, directory, rank, world_size, workers)
    with resumable(rank, "encoding", "shard", directory) as display:
        manifest = extraction.run(display)
    if manifest is not None and (extraction.job.finalized or (not display.started and rank == 0)):
        print("Done." if display.started else "Everything is there already.")
        print(extraction_summary(manifest, directory, extraction.empty_classes()))
    elif display.started:
        print(f"Process {rank} is done; what is left is written by other processes, or by the same command again.")
    return manifest


@hydra.main(version_base="1.3", config_path=CONFIG_DIR, config_name="extract")
def main(config: DictConfig) -> None:
    """Hydra entry point."""
    hold(run, config)


if __name__ == "__main__":
    entry_point(main)
