"""What a user may say to ``dcdit.extract``. No torch here, so that mistakes show at once."""

from dataclasses import dataclass
from typing import Annotated, Literal

from dcdit.checks import Bounds, Matches, Natural, Seed, Workers, checked
from dcdit.data.latents import Normalise


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
        max_pixels: images with more pixels are skipped, before they are decoded.
        threads: of a CPU that encodes, where their number changes the last bits; None on a GPU.
    """

    image_size: Annotated[int, Bounds(1, 8192)]
    representation: Literal["auto", "moments", "sample"]
    normalise: Normalise
    hflip: bool
    dtype: Literal["float16", "float32"]
    precision: Literal["auto", "fp32", "bf16", "fp16"]
    batch_size: Annotated[int, Bounds(1, 4096)]
    samples_per_shard: Annotated[int, Bounds(1, 1_000_000)]
    seed: Seed
    min_side: Annotated[int, Bounds(1, 8192)]
    max_pixels: Annotated[int, Bounds(1, 178_956_970, hint="Pillow decodes no larger images")]
    threads: Annotated[int, Bounds(1, 1024)] | None


@checked
@dataclass(frozen=True)
class ExtractSettings:
    """What to extract, and where; what shapes the bytes is in :class:`ExtractionSettings`.

    Attributes:
        source: folder with a subfolder per class; or webdataset shards, as a folder or a path with braces.
        out: the shards go to ``<out>/<split>``.
        split: name of the split.
        classes: of webdataset shards: their number, or a text file with one name per line; None takes those of the
            train split in ``out``.
        autoencoder: see :func:`dcdit.data.autoencoder.load_autoencoder`.
        strict: stop at the first image that cannot be used.
        corrupt_limit: images that each process skips before it stops.
        device: ``auto`` or a torch device.
        num_workers: processes that decode images; None takes this process's share of the cores.
    """

    source: str
    out: str
    split: Annotated[str, Matches("[A-Za-z0-9_][A-Za-z0-9._-]*", "a name of letters, digits and . _ - only")]
    classes: Annotated[int, Bounds(1, 1_000_000)] | str | None
    autoencoder: str
    strict: bool
    corrupt_limit: Natural
    device: str
    num_workers: Workers | None
