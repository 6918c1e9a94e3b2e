"""Latent shards in webdataset's tar layout: one ``.latent.npy`` and one ``.cls`` per sample."""

import hashlib
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import webdataset as wds
from numpy.typing import NDArray

from dcdit.data.manifest import Manifest, Shard
from dcdit.errors import UserError

LATENT_KEY, LABEL_KEY = "latent.npy", "cls"


@dataclass(frozen=True)
class Sample:
    """A stored latent (C, H, W) and its class label."""

    key: str
    latent: NDArray[Any]
    label: int


def _npy(array: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def write_shard(path: Path, samples: Iterable[Sample]) -> Shard:
    """Write one shard, whole or not at all; equal samples give equal bytes."""
    draft = path.with_name(path.name + ".part")
    count = 0
    with wds.TarWriter(str(draft), mtime=0, user="", group="") as writer:
        for sample in samples:
            label = str(sample.label).encode()
            writer.write({"__key__": sample.key, LATENT_KEY: _npy(sample.latent), LABEL_KEY: label})
            count += 1
    content = draft.read_bytes()
    draft.replace(path)
    return Shard(path.name, count, len(content), hashlib.sha256(content).hexdigest())


def write_shards(
    directory: Path,
    latents: NDArray[Any],
    labels: NDArray[Any],
    *,
    classes: tuple[str, ...],
    autoencoder: str,
    scale: float,
    shift: float,
    samples_per_shard: int,
) -> Manifest:
    """Write arrays that fit in memory as shards with a manifest.

    Args:
        directory: created if needed.
        latents: (N, C, H, W).
        labels: (N,) integers below ``len(classes)``.
        classes, autoencoder, scale, shift: see :class:`Manifest`.
        samples_per_shard: the last shard may hold fewer.
    """
    directory.mkdir(parents=True, exist_ok=True)
    shards = []
    for number, start in enumerate(range(0, len(latents), samples_per_shard)):
        rows = range(start, min(start + samples_per_shard, len(latents)))
        samples = (Sample(f"{row:08d}", latents[row], int(labels[row])) for row in rows)
        shards.append(write_shard(directory / f"shard-{number:06d}.tar", samples))
    shape = tuple(int(size) for size in latents.shape[1:])
    manifest = Manifest(
        latent_shape=(shape[0], shape[1], shape[2]),
        dtype=str(latents.dtype),
        representation="sample",
        autoencoder=autoencoder,
        scale=scale,
        shift=shift,
        classes=classes,
        shards=tuple(shards),
    )
    manifest.write(directory)
    return manifest


def read_raw(paths: Iterable[Path]) -> Iterator[dict[str, Any]]:
    """Undecoded samples of the shards, one after the other."""
    return iter(wds.DataPipeline(wds.SimpleShardList([str(path) for path in paths]), wds.tarfile_to_samples()))


def decode(raw: dict[str, Any]) -> Sample:
    """Decode one raw sample. Arrays with pickled content are refused.

    Raises:
        UserError: naming shard and key if the sample is damaged.
    """
    try:
        latent = np.load(io.BytesIO(raw[LATENT_KEY]), allow_pickle=False)
        return Sample(raw["__key__"], latent, int(raw[LABEL_KEY]))
    except (KeyError, ValueError, OSError, EOFError) as error:
        where = f"{raw.get('__url__', 'a shard')}, key {raw.get('__key__', '?')}"
        raise UserError(f"{where}: damaged sample ({error}); write the shards again") from error
