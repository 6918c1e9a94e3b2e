"""How fast latents are read and images encoded, each beside the plain way in the same run.

    python benchmarks/data.py                 reading: ImageNet-shaped latents, one worker, against one .npy per sample
    python benchmarks/data.py --extract       encoding: the extractor against the bare autoencoder forward

Prints a table; rates are medians over rounds in which all ways take turns.
"""

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Dataset

from dcdit.data.arrays import write_shards
from dcdit.data.autoencoder import load_autoencoder
from dcdit.data.manifest import MOMENTS
from dcdit.data.order import EpochOrder, Position, Readers
from dcdit.data.storage import Location
from dcdit.data.stream import LatentStream
from dcdit.extraction.extraction import Extraction
from dcdit.extraction.folders import FolderSource
from dcdit.extraction.settings import ExtractionSettings
from dcdit.runtime.devices import autocast, pick_device
from dcdit.runtime.display import Display

STORED = (8, 32, 32)  # moments of a 4 x 32 x 32 latent
IMAGENET = [5000] * 256 + [1167]  # samples of its shards


class NpyFolder(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """One file for the latent and one for the label of every sample."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        latent = np.load(self.folder / "latents" / f"{number}.npy")
        label = np.load(self.folder / "labels" / f"{number}.npy")
        return torch.from_numpy(latent), torch.from_numpy(label)


def write_both(folder: Path, count: int, per_shard: int) -> None:
    """The same random latents as shards and as files."""
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((count, *STORED), np.float32).astype(np.float16)
    labels = rng.integers(1000, size=count)
    classes = tuple(map(str, range(1000)))
    write_shards(
        folder / "shards",
        latents,
        labels,
        classes=classes,
        autoencoder="identity",
        scale=1.0,
        shift=0.0,
        samples_per_shard=per_shard,
        representation=MOMENTS,
    )
    for part, arrays in (("latents", latents), ("labels", labels.reshape(-1, 1))):
        (folder / part).mkdir()
        for number, array in enumerate(arrays):
            np.save(folder / part / f"{number}.npy", array)


def forget(folder: Path) -> None:
    """Have the kernel drop the files' pages: the next reader finds them on the disk."""
    import os

    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def private_megabytes(pid: int) -> float:
    """Memory that belongs to one process alone."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private")) / 1024


def read_rate(loader: DataLoader[Any], batches: int, size: int) -> tuple[float, float, float]:
    """Samples per second after the first batch, seconds to that batch, and the worker's private memory in MB."""
    begin = time.perf_counter()
    iterator: Any = iter(loader)
    next(iterator)
    first = time.perf_counter()
    for _ in islice(iterator, batches - 1):
        pass
    rate = (batches - 1) * size / (time.perf_counter() - first)
    return rate, first - begin, private_megabytes(iterator._workers[0].pid)


def reading(arguments: argparse.Namespace) -> Table:
    """Shards against files, warm and cold."""
    count, size = arguments.samples, arguments.batch
    batches = count // size - 2
    table = Table("one worker", "page cache", "samples/s", "against .npy", "first batch, s", "worker's memory, MB")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        folder = Path(scratch)
        write_both(folder, count, arguments.per_shard)
        location = Location(str(folder / "shards"))
        manifest, readers = location.manifest(), Readers(1, size, arguments.buffer)
        urls = [str(folder / "shards" / shard.name) for shard in manifest.shards]

        def shards() -> DataLoader[Any]:
            return DataLoader(LatentStream(location, manifest, readers), batch_size=None, num_workers=1)

        def files() -> DataLoader[Any]:
            return DataLoader(NpyFolder(folder, count), size, shuffle=True, num_workers=1, drop_last=True)

        def library() -> DataLoader[Any]:
            pipe = wds.WebDataset(urls, shardshuffle=len(urls), seed=0).shuffle(arguments.buffer).decode()
            return DataLoader(pipe.to_tuple("latent.npy", "json").map(_tensors).batched(size), None, num_workers=1)

        ways: dict[str, Callable[[], DataLoader[Any]]] = {
            "dcdit: shards": shards,
            "webdataset's own pipeline, the same shards": library,
            "one .npy per latent and label": files,
        }
        for cache in ("warm", "cold"):
            rounds: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ways}
            for number in range(arguments.rounds + (cache == "warm")):
                for name, build in ways.items():
                    if cache == "cold":
                        forget(folder)
                    found = read_rate(build(), batches, size)
                    if cache == "cold" or number:  # the first warm round fills the cache
                        rounds[name].append(found)
            medians = {
                name: [statistics.median(column) for column in zip(*found, strict=True)]
                for name, found in rounds.items()
            }
            baseline = medians["one .npy per latent and label"][0]
            for name, (rate, first, memory) in medians.items():
                table.add_row(name, cache, f"{rate:,.0f}", f"{rate / baseline:.1f} x", f"{first:.2f}", f"{memory:.0f}")
    return table


def _tensors(sample: tuple[Any, Any]) -> tuple[torch.Tensor, int]:
    return torch.from_numpy(sample[0]), sample[1]["label"]


def entering() -> Table:
    """Time to compute where a resumed run stands in the middle of an epoch of ImageNet."""
    table = Table("entering an epoch of 1,281,167 samples, rank 7 of 8", "ms")
    readers = Readers(8, 32, 10_000)
    for name, batch in (("at its beginning", 0), ("after half of it", 2502)):
        begin = time.perf_counter()
        order = EpochOrder(IMAGENET, 0, Position(3, ((readers, batch),)))
        order.batch(7, batch)
        table.add_row(name, f"{(time.perf_counter() - begin) * 1e3:.1f}")
    begin = time.perf_counter()
    order = EpochOrder(IMAGENET, 0, Position(3, ((Readers(16, 16, 10_000), 2502), (readers, 0))))
    order.batch(7, 0)
    table.add_row("after half of it, by 16 ranks before", f"{(time.perf_counter() - begin) * 1e3:.1f}")
    return table


def random_vae(folder: Path) -> str:
    """The SD-VAE's architecture with random weights; the time does not depend on them."""
    from diffusers import AutoencoderKL

    vae: Any = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
    )
    vae.save_pretrained(folder / "vae")
    return str(folder / "vae")


def photographs(folder: Path, count: int) -> Path:
    """JPEG files of ImageNet's usual size, 500 x 375, with detail at all scales."""
    rng = np.random.default_rng(0)
    (folder / "images" / "class").mkdir(parents=True)
    for number in range(count):
        picture = sum(
            np.asarray(
                Image.fromarray(rng.integers(256, size=(side * 3 // 4, side, 3), dtype=np.uint8)).resize((500, 375)),
                np.float32,
            )
            / 4
            for side in (8, 40, 160, 480)
        )
        Image.fromarray(np.asarray(picture, np.uint8)).save(folder / "images" / "class" / f"{number}.jpg", quality=90)
    return folder / "images"


def encoding(arguments: argparse.Namespace) -> Table:
    """The extractor, from JPEG files to shards, against the forward pass of its autoencoder alone."""
    device = pick_device(arguments.device)
    precision: Any = "fp16" if device.type == "cuda" else "fp32"
    count, size = arguments.images, arguments.encode_batch
    rates: dict[str, list[float]] = {"bare forward": [], "extractor": []}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        folder = Path(scratch)
        source = photographs(folder, count)
        autoencoder: Any = load_autoencoder(arguments.autoencoder or random_vae(folder), device)
        pixels = torch.randn(size, 3, 256, 256, device=device).contiguous(memory_format=torch.channels_last)
        for number in range(arguments.rounds + 1):
            begin = time.perf_counter()
            with torch.no_grad(), autocast(precision, device):
                for _ in range(count // size):
                    autoencoder.vae.encode(pixels)
            if device.type == "cuda":
                torch.cuda.synchronize()
            bare = count / (time.perf_counter() - begin)
            settings = ExtractionSettings(
                image_size=256,
                representation="moments",
                normalise="autoencoder",
                hflip=False,
                dtype="float16",
                precision=precision,
                batch_size=size,
                samples_per_shard=max(size, count // 4),
                seed=0,
                min_side=1,
                max_pixels=10**8,
                threads=None,
                companion=None,
                encoder="",
                encoder_grid=None,
                jpeg_quality=95,
            )
            begin = time.perf_counter()
            images = FolderSource(source, settings.samples_per_shard, 0)
            out = folder / f"out-{number}"
            extraction = Extraction(out, images, autoencoder, settings, 0, 1, arguments.workers, True, 0, None, None)
            extraction.run(Display(1, "encoding", "shard"))
            if number:  # the first round warms up
                rates["bare forward"].append(bare)
                rates["extractor"].append(count / (time.perf_counter() - begin))
    table = Table(f"SD-VAE encoder at 256px, {precision}, batch {size}, {count} images", "images/s", "overhead")
    bare = statistics.median(rates["bare forward"])
    for name, found in rates.items():
        rate = statistics.median(found)
        table.add_row(name, f"{rate:.2f}", f"{bare / rate - 1:.1%}")
    return table


def tables(arguments: argparse.Namespace) -> Iterator[Table]:
    """The tables that were asked for."""
    if arguments.extract:
        yield encoding(arguments)
    else:
        yield reading(arguments)
        yield entering()


def main() -> None:
    """Parse the command line and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extract", action="store_true", help="measure encoding instead of reading")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where the temporary files go")
    parser.add_argument("--samples", type=int, default=24_000)
    parser.add_argument("--per-shard", type=int, default=2_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--buffer", type=int, default=10_000)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--encode-batch", type=int, default=8)
    parser.add_argument("--workers", type=int, default=1, help="decoding processes of the extractor")
    parser.add_argument("--autoencoder", help="a local folder or hub id; default: random weights")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    console = Console(width=140)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} threads"
    console.print(f"{platform.processor() or platform.machine()}, {device}, torch {torch.__version__}")
    for table in tables(arguments):
        console.print(table)


if __name__ == "__main__":
    main()
