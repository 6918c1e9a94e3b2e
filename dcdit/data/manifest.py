"""The manifest of a directory of latent shards: everything needed to read them and to refuse a mismatch."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from dcdit.errors import UserError

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
IDENTITY = "identity"
"""Autoencoder id of shards whose latents are the images themselves, in [-1, 1]."""


@dataclass(frozen=True)
class Shard:
    """One tar file: its name, number of samples, size in bytes and SHA-256."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a directory of shards holds.

    Attributes:
        latent_shape: (C, H, W) of one latent.
        dtype: numpy name of the stored type.
        representation: ``sample``, one latent per image.
        autoencoder: ``identity``, or what ``AutoencoderKL.from_pretrained`` takes.
        scale, shift: the network sees (stored - shift) * scale.
        classes: class names; a label is an index into them.
        shards: the files.
    """

    latent_shape: tuple[int, int, int]
    dtype: str
    representation: str
    autoencoder: str
    scale: float
    shift: float
    classes: tuple[str, ...]
    shards: tuple[Shard, ...]

    @property
    def samples(self) -> int:
        """Number of samples in all shards."""
        return sum(shard.samples for shard in self.shards)

    def summary(self) -> dict[str, Any]:
        """What a sampler must know of the latents, as plain values for a checkpoint."""
        return {
            "shape": list(self.latent_shape),
            "autoencoder": self.autoencoder,
            "scale": self.scale,
            "shift": self.shift,
            "classes": list(self.classes),
        }

    def write(self, directory: Path) -> None:
        """Write ``manifest.json`` into ``directory``, replacing it at once or not at all."""
        content = {"schema_version": SCHEMA_VERSION, **asdict(self)}
        draft = directory / f"{MANIFEST_NAME}.part"
        draft.write_text(json.dumps(content, indent=1) + "\n")
        draft.replace(directory / MANIFEST_NAME)

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        """Read and check the manifest of ``directory``, and that its shards lie beside it in their full size.

        Raises:
            UserError: if the directory holds no usable manifest, or a shard is missing or cut short.
        """
        path = directory / MANIFEST_NAME
        if not path.is_file():
            raise UserError(
                f"data.directory={directory.parent}: {path} does not exist, no shards have been written there;"
                " set data.directory to a folder with train/manifest.json"
            )
        try:
            manifest = cls.parse(json.loads(path.read_text()))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path} is no valid manifest ({error}): write the shards again") from error
        for shard in manifest.shards:
            size = (directory / shard.name).stat().st_size if (directory / shard.name).is_file() else None
            if size != shard.bytes:
                found = "is missing" if size is None else f"has {size} bytes, the manifest says {shard.bytes}"
                raise UserError(f"shard {directory / shard.name} {found}: restore it or write the shards again")
        return manifest

    @classmethod
    def parse(cls, content: dict[str, Any]) -> "Manifest":
        """Build a manifest from plain JSON values; ValueError if they are not those of this schema version."""
        values = dict(content)
        version = values.pop("schema_version", None)
        if version != SCHEMA_VERSION:
            raise ValueError(f"schema_version is {version}, this release reads {SCHEMA_VERSION}")
        expected = {field.name for field in fields(cls)}
        if expected != set(values):
            raise ValueError(f"keys differ: {sorted(expected ^ set(values))}")
        shape = tuple(int(size) for size in values.pop("latent_shape"))
        if len(shape) != 3 or min(shape) < 1:
            raise ValueError(f"latent_shape is {shape}, not (C, H, W)")
        if values["representation"] != "sample":
            raise ValueError(f"representation is {values['representation']!r}, this release reads 'sample'")
        shards = tuple(Shard(**shard) for shard in values.pop("shards"))
        if not shards or not values["classes"]:
            raise ValueError("it lists no shards or no classes")
        if any(Path(shard.name).name != shard.name for shard in shards):
            raise ValueError("a shard name leads out of the directory")
        classes = tuple(str(name) for name in values.pop("classes"))
        return cls(latent_shape=shape, shards=shards, classes=classes, **values)
