"""The configuration of ``dcdit.extract``. No torch here, so that mistakes show at once."""

from dataclasses import fields
from typing import Annotated, Literal

from dcdit.checks import FLOAT_NAMES, Bounds, Grid, Matches, Named, Natural, Seed, Workers, config
from dcdit.data.latents import Normalise
from dcdit.data.manifest import MAX_SIDE, CompanionKind
from dcdit.extraction.readers import READERS, ReaderSettings


@config
class ExtractionSettings:
    """The keys of ``configs/extract.yaml`` on which the bytes of the shards depend, beside images and autoencoder."""

    image_size: Annotated[int, Bounds(1, MAX_SIDE)]
    representation: Literal["auto", "moments", "sample"]
    normalise: Normalise
    hflip: bool
    dtype: Literal["float16", "float32"]
    precision: Annotated[Literal["auto", "fp32", "bf16", "fp16"], FLOAT_NAMES]
    batch_size: Annotated[int, Bounds(1, 4096)]
    samples_per_shard: Annotated[int, Bounds(1, 1_000_000)]
    seed: Seed
    min_side: Annotated[int, Bounds(1, 8192)]
    max_pixels: Annotated[int, Bounds(1, 178_956_970, hint="Pillow decodes no larger images")]
    threads: Annotated[int, Bounds(1, 1024)] | None
    companion: CompanionKind | None
    encoder: str
    encoder_grid: Grid | None
    jpeg_quality: Annotated[int, Bounds(1, 100)]


@config
class ExtractConfig(ExtractionSettings):
    """The configuration of ``dcdit.extract``; ``configs/extract.yaml`` describes each key."""

    source: str | None
    reader: Annotated[ReaderSettings, Named(READERS)]
    out: str
    split: Annotated[str, Matches("[A-Za-z0-9_][A-Za-z0-9._-]*", "a name of letters, digits and . _ - only")]
    classes: Annotated[int, Bounds(1, 1_000_000)] | str | None
    autoencoder: str
    encoder_weights: str
    strict: bool
    corrupt_limit: Natural
    device: str
    num_workers: Workers | None

    @property
    def shaping(self) -> ExtractionSettings:
        """What shapes the bytes alone."""
        return ExtractionSettings(**{field.name: getattr(self, field.name) for field in fields(ExtractionSettings)})
