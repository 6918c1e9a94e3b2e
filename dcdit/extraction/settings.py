"""What the bytes of extracted shards depend on. No torch here, so that mistakes show at once."""

from dataclasses import dataclass
from typing import Literal

from dcdit.checks import Count, Seed, checked


@checked
@dataclass(frozen=True)
class ExtractionSettings:
    """What the bytes of the shards depend on, beside the images and the autoencoder.

    Attributes:
        image_size: side of the cropped images in pixels.
        representation: mean and log-variance, or one sample of the posterior.
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
    representation: Literal["moments", "sample"]
    hflip: bool
    dtype: Literal["float16", "float32"]
    precision: Literal["auto", "fp32", "bf16", "fp16"]
    batch_size: Count
    samples_per_shard: Count
    seed: Seed
    min_side: Count
    threads: Count | None
