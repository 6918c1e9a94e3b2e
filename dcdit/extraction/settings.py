"""What the bytes of extracted shards depend on."""

from dataclasses import dataclass

from dcdit.data.autoencoder import Autoencoder
from dcdit.data.manifest import DTYPES, MOMENTS, SAMPLE
from dcdit.data.shards import Layout
from dcdit.errors import UserError


@dataclass(frozen=True)
class Settings:
    """What the bytes of the shards depend on, beside the images and the autoencoder.

    Attributes:
        image_size: side of the cropped images in pixels.
        representation: ``moments`` or ``sample``.
        mirrored: encode every image mirrored left to right too.
        dtype: stored type, ``float16`` or ``float32``.
        precision: of the autoencoder: ``fp32``, ``bf16`` or ``fp16``.
        batch_size: images encoded at once.
        samples_per_shard: images of a shard.
        seed: shuffles the images, and draws the samples of the posterior if those are stored.
        min_side: images with fewer pixels along a side are skipped.
        threads: of a CPU that encodes, where their number changes the last bits; None on a GPU.
    """

    image_size: int
    representation: str
    mirrored: bool
    dtype: str
    precision: str
    batch_size: int
    samples_per_shard: int
    seed: int
    min_side: int
    threads: int | None = None

    def __post_init__(self) -> None:
        for name, choices in (
            ("representation", (MOMENTS, SAMPLE)),
            ("dtype", DTYPES),
            ("precision", ("fp32", "bf16", "fp16", "auto")),
        ):
            if getattr(self, name) not in choices:
                raise UserError(f"{name}={getattr(self, name)!r} is not one of {', '.join(choices)}")
        for name in ("image_size", "batch_size", "samples_per_shard", "min_side"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} is not a positive number")
        if self.threads is not None and self.threads < 1:
            raise UserError(f"threads={self.threads} is not a positive number")
        if self.seed < 0:
            raise UserError(f"seed={self.seed} is negative")

    def layout(self, autoencoder: Autoencoder) -> Layout:
        """Layout of the shards."""
        side, rest = divmod(self.image_size, autoencoder.factor)
        if rest:
            raise UserError(
                f"image_size={self.image_size} is no multiple of {autoencoder.factor}, which"
                f" autoencoder={autoencoder.name!r} needs"
            )
        channels = autoencoder.channels * (2 if self.representation == MOMENTS else 1)
        return Layout((channels, side, side), self.dtype, self.mirrored)
