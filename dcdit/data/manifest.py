"""The manifest of a directory of latent shards: everything needed to read them and to refuse a mismatch."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from dcdit.data.latents import LatentSpec
from dcdit.errors import UserError
from dcdit.runtime.files import write_json

SCHEMA_VERSION = 3
MANIFEST_NAME = "manifest.json"
SAMPLE, MOMENTS = "sample", "moments"
"""Representations: one latent (C, H, W) per image, or mean and log-variance of its posterior (2C, H, W)."""
DTYPES = ("float16", "float32")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")  # a shard's name becomes part of paths, URLs and commands


@dataclass(frozen=True)
class Shard:
    """One tar file: its name, number of samples, size in bytes and SHA-256."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Skipped:
    """An image that is not in the shards, and why."""

    file: str
    reason: str


@dataclass(frozen=True)
class Manifest:
    """What a directory of shards holds.

    Attributes:
        latent_shape: (C, H, W) of one latent as the network sees it.
        dtype: numpy name of the stored type, ``float16`` or ``float32``.
        representation: ``sample`` or ``moments``.
        hflip: each sample also holds the latent of the image flipped left to right.
        autoencoder: ``identity``, or what ``AutoencoderKL.from_pretrained`` takes.
        scale, shift: the network sees (latent - shift) * scale.
        classes: class names; a label is an index into them.
        shards: the files.
        fingerprint: digest of the autoencoder's weights; None if unknown.
        skipped: images of the source that could not be encoded.
        extraction: settings of ``dcdit.extract``; empty for shards written otherwise.
    """

    latent_shape: tuple[int, int, int]
    dtype: str
    representation: str
    hflip: bool
    autoencoder: str
    scale: float
    shift: float
    classes: tuple[str, ...]
    shards: tuple[Shard, ...]
    fingerprint: str | None = None
    skipped: tuple[Skipped, ...] = ()
    extraction: Mapping[str, Any] = field(default_factory=dict)

    @property
    def samples(self) -> int:
        """Number of samples in all shards."""
        return sum(shard.samples for shard in self.shards)

    @property
    def stored_shape(self) -> tuple[int, int, int]:
        """Shape of a stored array: (C, H, W), or (2C, H, W) for moments."""
        channels, height, width = self.latent_shape
        return channels * (2 if self.representation == MOMENTS else 1), height, width

    @property
    def spec(self) -> LatentSpec:
        """What the latents are."""
        return LatentSpec(self.latent_shape, self.autoencoder, self.scale, self.shift, self.classes, self.fingerprint)

    def write(self, directory: Path) -> None:
        """Write ``manifest.json`` into ``directory``, replacing it at once or not at all."""
        content = {"schema_version": SCHEMA_VERSION, **asdict(self)}
        write_json(directory / MANIFEST_NAME, content)

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """Read and check the manifest file ``path``; :class:`UserError` if it is missing or invalid."""
        try:
            return cls.parse(json.loads(path.read_text()))
        except FileNotFoundError:
            raise UserError(f"{path} does not exist: {_why_missing(path.parent)}") from None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path} is no valid manifest ({error}): write the shards again") from error

    @classmethod
    def parse(cls, content: dict[str, Any]) -> "Manifest":
        """Build a manifest from plain JSON values; ValueError if they are not those of this schema version."""
        values = dict(content)
        version = values.pop("schema_version", None)
        if version != SCHEMA_VERSION:
            raise ValueError(f"schema_version is {version}, this release reads {SCHEMA_VERSION}")
        expected = {column.name for column in fields(cls)}
        if expected != set(values):
            raise ValueError(f"keys differ: {sorted(expected ^ set(values))}")
        shape = tuple(int(size) for size in values.pop("latent_shape"))
        if len(shape) != 3 or min(shape) < 1:
            raise ValueError(f"latent_shape is {shape}, not (C, H, W)")
        for key, choices in (("representation", (SAMPLE, MOMENTS)), ("dtype", DTYPES)):
            if values[key] not in choices:
                raise ValueError(f"{key} is {values[key]!r}, this release reads {' and '.join(choices)}")
        if not all(isinstance(values[key], int | float) for key in ("scale", "shift")) or not values["scale"]:
            raise ValueError(f"scale is {values['scale']!r} and shift {values['shift']!r}")
        shards = tuple(Shard(**shard) for shard in values.pop("shards"))
        if not shards or not values["classes"]:
            raise ValueError("it lists no shards or no classes")
        for shard in shards:
            if not _PLAIN_NAME.fullmatch(shard.name):
                raise ValueError(f"{shard.name!r} is no name of a shard: letters, digits and . _ - only")
            if shard.samples < 1 or shard.bytes < 1:
                raise ValueError(f"{shard.name} has {shard.samples} samples in {shard.bytes} bytes")
        skipped = tuple(Skipped(**image) for image in values.pop("skipped"))
        classes = tuple(str(name) for name in values.pop("classes"))
        return cls(latent_shape=shape, shards=shards, skipped=skipped, classes=classes, **values)


def _why_missing(split: Path) -> str:
    """What to do about a directory without a manifest."""
    if (split / ".extraction").is_dir():
        return "the extraction there is not finished, the same command goes on with it"
    if (split.parent / MANIFEST_NAME).is_file():
        return f"{split.parent} is the folder of a split, give the one above it"
    return (
        "no shards have been written there. The directory to name is the one that holds train/manifest.json;"
        " python -m dcdit.extract writes it"
    )
