"""What a user may say to ``dcdit.extract``. No torch here, so that mistakes show at once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dcdit.checks import Count, Natural, Seed, checked
from dcdit.data.latents import Normalise
from dcdit.errors import UserError


@checked
@dataclass(frozen=True)
class ExtractionSettings:
    """What the bytes of the shards depend on, beside the images and the autoencoder.

    Attributes:
        image_size: side of the cropped images in pixels.
        representation: mean and log-variance, or one sample of the posterior; ``auto`` takes the former where there is
            a posterior.
        normalise: what the network is to see of them has scale and shift of the autoencoder's configuration, or mean
            0 and deviation 1 in each channel or each element. The shards are the same; the manifest says which.
        hflip: encode every image flipped left to right too.
        dtype: stored type.
        precision: of the autoencoder; ``auto`` takes fp16 on a GPU, fp32 elsewhere.
        batch_size: images encoded at once.
        samples_per_shard: images of a shard.
        seed: shuffles the images, and samples the posterior if that is stored.
        min_side: images with fewer pixels along a side are skipped.
        threads: of a CPU that encodes, where their number changes the last bits; None on a GPU.
    """

    image_size: Count
    representation: Literal["auto", "moments", "sample"]
    normalise: Normalise
    hflip: bool
    dtype: Literal["float16", "float32"]
    precision: Literal["auto", "fp32", "bf16", "fp16"]
    batch_size: Count
    samples_per_shard: Count
    seed: Seed
    min_side: Count
    threads: Count | None


@checked
@dataclass(frozen=True)
class ExtractSettings:
    """What to extract, and where; what shapes the bytes is in :class:`ExtractionSettings`.

    Attributes:
        source: folder with a subfolder per class; or webdataset shards, as a folder or a path with braces.
        out: the shards go to ``<out>/<split>``.
        split: name of the split.
        classes: of webdataset shards: their number, or a text file with one name per line.
        autoencoder: see :func:`dcdit.data.autoencoder.load_autoencoder`.
        strict: stop at the first image that cannot be used.
        corrupt_limit: images that each process skips before it stops.
        device: ``auto`` or a torch device.
        num_workers: processes that decode images; None takes this process's share of the cores.
    """

    source: str
    out: str
    split: str
    classes: Count | str | None
    autoencoder: str
    strict: bool
    corrupt_limit: Natural
    device: str
    num_workers: Natural | None

    def __post_init__(self) -> None:
        if Path(self.split).name != self.split:
            raise UserError(f"split={self.split!r} is not the plain name of a folder")
