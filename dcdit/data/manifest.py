"""The manifest of a directory of latent shards: everything needed to read them and to refuse a mismatch."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from dcdit.checks import Count, Digest, Matches, Name, NotEmpty, Size, call_checked, shown
from dcdit.data.latents import (
    Fingerprint,
    LatentScale,
    LatentShift,
    LatentSpec,
    LatentStatistics,
    Normalise,
    format_numbers,
)
from dcdit.errors import UserError
from dcdit.runtime.files import content_digest, read_json, write_json

SCHEMA_VERSION = 5
MANIFEST_NAME = "manifest.json"
MAX_SIDE = 8192
"""Pixels that a side of an image has at most."""

SAMPLE: Final = "sample"
MOMENTS: Final = "moments"
"""Representations: one latent (C, H, W) per image, or mean and log-variance of its posterior (2C, H, W)."""

Dtype = Literal["float16", "float32"]
Representation = Literal["sample", "moments"]
CompanionKind = Literal["pixels", "features"]


@dataclass(frozen=True)
class Shard:
    """One tar file: its name, number of samples, size in bytes and SHA-256.

    The name becomes part of paths, URLs and commands; the digest of paths.
    """

    name: Annotated[str, Matches("[A-Za-z0-9_][A-Za-z0-9._-]*", "a name of letters, digits and . _ - only")]
    samples: Count
    bytes: Count
    sha256: Digest


@dataclass(frozen=True)
class EncoderIdentity:
    """What tells the features of one pretrained encoder from those of another.

    Attributes:
        name: timm's name of the model.
        weights: digest of its weights.
        origin: where these came from: timm, a local file, or nowhere.
    """

    name: Name
    weights: Fingerprint
    origin: Literal["auto", "file", "random"]


@dataclass(frozen=True)
class Companion:
    """Shards that lie beside those of the latents, and hold what alignment needs of the same samples.

    Attributes:
        kind: ``pixels``: the image as the autoencoder saw it, as a JPEG; ``features``: those of an encoder, float16.
        shape: (3, height, width) of the pixels, or (F, h, w) of the features.
        shards: one for each shard of latents, with the same samples.
        encoder: of the features.
    """

    kind: CompanionKind
    shape: tuple[Size, Size, Size]
    shards: tuple[Shard, ...]
    encoder: EncoderIdentity | None


@dataclass(frozen=True)
class Skipped:
    """An image that is not in the shards, and the reason."""

    file: str
    reason: str


@dataclass(frozen=True)
class Manifest:
    """The content of ``manifest.json``: what a directory of shards holds.

    Attributes:
        latent_shape, autoencoder, scale, shift, classes, fingerprint: see :class:`LatentSpec`.
        dtype: numpy name of the stored type.
        hflip: each sample also holds the latent of the image flipped left to right.
        statistics: of the latents before scale and shift.
        normalise: where scale and shift come from; ``train``: of another split, they are those of the train split.
        skipped: images of the source that could not be encoded.
        extraction: settings of ``dcdit.extract``; empty for shards written otherwise.
        companion: what lies beside the latents; None for nothing.
    """

    latent_shape: tuple[Size, Size, Size]
    dtype: Dtype
    representation: Representation
    hflip: bool
    autoencoder: Name
    scale: LatentScale
    shift: LatentShift
    classes: Annotated[tuple[Name, ...], NotEmpty("name the classes")]
    shards: Annotated[tuple[Shard, ...], NotEmpty("name the shards")]
    statistics: LatentStatistics
    normalise: Normalise | Literal["train"] = "autoencoder"
    fingerprint: Fingerprint | None = None
    skipped: tuple[Skipped, ...] = ()
    extraction: Mapping[str, Any] = field(default_factory=dict)
    companion: Companion | None = None

    @property
    def samples(self) -> int:
        """Number of samples in all shards."""
        return sum(shard.samples for shard in self.shards)

    @property
    def stored_shape(self) -> tuple[int, int, int]:
        """Shape of a stored array: (C, H, W), or (2C, H, W) for moments."""
        channels, height, width = self.latent_shape
        return channels * (2 if self.representation == MOMENTS else 1), height, width

    @cached_property
    def spec(self) -> LatentSpec:
        """The description of the latents that checkpoints hold too."""
        return LatentSpec(self.latent_shape, self.autoencoder, self.scale, self.shift, self.classes, self.fingerprint)

    @cached_property
    def order(self) -> str:
        """Digest of the shards in their order: a position in the data has a meaning for these shards only."""
        return content_digest({"shards": [(shard.sha256, shard.samples) for shard in self.shards]})

    def describe_unusual(self) -> str:
        """A warning if the latents, as the network sees them, are far from mean 0 and deviation 1; else empty."""
        statistics = self.spec.normalised_statistics(self.statistics)
        return statistics.describe_unusual() if statistics else ""

    def write(self, directory: Path) -> None:
        """Write ``manifest.json`` into ``directory``, replacing it at once or not at all."""
        content = {"schema_version": SCHEMA_VERSION, **asdict(self)}
        if self.companion is None:  # as manifests were before there were companions
            del content["companion"]
        write_json(directory / MANIFEST_NAME, {**content, "digest": content_digest(content)})

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """Read and check the manifest file ``path``.

        Raises:
            UserError: if it is missing, a value in it is not what it must be, or it was changed since it was written.
        """
        try:
            content = read_json(path, dict[str, Any], "write the shards again")
        except FileNotFoundError:
            raise UserError(f"{path} does not exist: {_why_missing(path)}") from None
        try:
            return cls._parse(content)
        except UserError as error:
            raise UserError(f"{path}: {error}: restore it, or write the shards again") from error

    @classmethod
    def _parse(cls, content: Mapping[str, Any]) -> "Manifest":
        """Build a manifest from plain JSON values; :class:`UserError` if they are not what :meth:`write` wrote."""
        signed = {key: value for key, value in content.items() if key != "digest"}
        if signed.get("schema_version") != SCHEMA_VERSION:
            version = shown(signed.get("schema_version"))
            raise UserError(f"schema_version={version}, this release reads {SCHEMA_VERSION}")
        if content.get("digest") != content_digest(signed):
            raise UserError("it was changed after it was written (its digest differs)")
        manifest = call_checked(cls, {key: value for key, value in signed.items() if key != "schema_version"}, "")
        manifest._check_normalisation()
        for shard in manifest.shards:
            # each of a sample's members has a header and is padded: the array must fit, however large it says it is
            least = shard.samples * (math.prod(manifest.stored_shape) * (2 if manifest.dtype == "float16" else 4))
            if shard.bytes < least:
                raise UserError(f"{shard.name} has {shard.bytes} bytes, too few for its {shard.samples} samples")
        if manifest.companion:
            manifest._check_companion(manifest.companion)
        return manifest

    def _check_companion(self, companion: Companion) -> None:
        """Raise :class:`UserError` unless companion shards have the samples of the latents, and their size is real."""
        if [shard.samples for shard in companion.shards] != [shard.samples for shard in self.shards]:
            raise UserError("companion: its shards do not have the samples of the latents")
        channels, height, width = companion.shape
        if companion.kind == "pixels":
            if channels != 3 or height != width or height > MAX_SIDE:
                raise UserError(f"companion.shape={list(companion.shape)} are no square RGB images")
        elif companion.encoder is None or height != width:
            raise UserError("companion: its encoder or its grid is missing")
        least = 1 if companion.kind == "pixels" else math.prod(companion.shape) * 2 * (1 + self.hflip)
        for shard in companion.shards:
            if shard.bytes < shard.samples * least:
                raise UserError(f"{shard.name} has {shard.bytes} bytes, too few for its {shard.samples} samples")

    def _check_normalisation(self) -> None:
        """Raise :class:`UserError` unless scale, shift and statistics fit the latents and one another."""
        spec, channels = self.spec, self.latent_shape[0]
        for name, values in asdict(self.statistics).items():
            if len(values) != channels:
                raise UserError(f"statistics.{name} has {len(values)} numbers, the latents {channels} channels")
        for name, values in (("scale", self.scale), ("shift", self.shift)):
            depth = 2 if isinstance(values, tuple) and isinstance(values[0], tuple) else int(isinstance(values, tuple))
            if depth != {"channel": 1, "element": 2}.get(self.normalise, depth):
                raise UserError(f"normalise={self.normalise}, but {name} is {format_numbers(values)}: it has been lost")
        statistics = spec.normalised_statistics(self.statistics)
        if self.normalise == "channel" and statistics and not statistics.is_normal:
            raise UserError(
                "normalise=channel, but with this scale and shift the latents do not have mean 0 and deviation 1: they"
                " have been lost"
            )


def _why_missing(path: Path) -> str:
    """Why there is no manifest at ``path``, and what to do about it."""
    split = path.parent
    for link in (path, split):
        if link.is_symlink() and not link.exists():
            return f"{link} is a link to what does not exist, restore that or remove the link"
    if (split / ".extraction").is_dir():
        return "the extraction there is not finished, the same command goes on with it"
    if (split.parent / MANIFEST_NAME).is_file():
        return f"{split.parent} is the folder of a split, give the one above it"
    return (
        "no shards have been written there. The directory to name is the one that holds train/manifest.json;"
        " python -m dcdit.extract writes it"
    )
