"""From arrays in memory to shards."""

from itertools import islice
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from dcdit.data.companions import encode_pixels, write_with_companion
from dcdit.data.latents import IDENTITY, LatentScale, LatentShift
from dcdit.data.manifest import SAMPLE, Companion, Dtype, Manifest, Representation
from dcdit.data.shards import Layout, Sample
from dcdit.data.statistics import StoredArray, Sums, Tally

_JPEG_QUALITY = 95


def write_shards(
    directory: Path,
    latents: StoredArray,
    labels: NDArray[np.integer],
    *,
    classes: tuple[str, ...],
    samples_per_shard: int,
    autoencoder: str = IDENTITY,
    scale: LatentScale = 1.0,
    shift: LatentShift = 0.0,
    representation: Representation = SAMPLE,
    pixels: NDArray[np.uint8] | None = None,
) -> Manifest:
    """Write arrays that fit in memory as shards with a manifest.

    Args:
        directory: is made if need be.
        latents: (N, C, H, W), or (N, 2C, H, W) for moments; float16 or float32.
        labels: (N,) integers below ``len(classes)``.
        classes: their names.
        samples_per_shard: the last shard may hold fewer.
        autoencoder, scale, shift, representation: see :class:`Manifest`; by default the latents are images themselves.
        pixels: (N, side, side, 3), the images that the latents were made of; they are written as JPEGs beside the
            latents, for training with alignment. None writes none.
    """
    directory.mkdir(parents=True, exist_ok=True)
    stored, height, width = (int(size) for size in latents.shape[1:])
    layout = Layout((stored, height, width), str(latents.dtype), hflip=False)
    shape = (stored if representation == SAMPLE else stored // 2, height, width)

    def companion(row: int) -> dict[str, bytes]:
        return {} if pixels is None else encode_pixels(pixels[row], _JPEG_QUALITY)

    samples = (
        Sample(f"{row:08d}", int(label), latents[row], companion=companion(row)) for row, label in enumerate(labels)
    )
    kind = None if pixels is None else "pixels"
    shards, companions, sums = [], [], []
    for number in range(-(-len(latents) // samples_per_shard)):
        tally, path = Tally(shape, representation), directory / f"shard-{number:06d}.tar"
        shard, beside = write_with_companion(path, islice(samples, samples_per_shard), layout, tally, kind)
        assert shard is not None
        shards.append(shard)
        companions += [beside] if beside is not None else []
        sums.append(tally.sums)
    manifest = Manifest(
        latent_shape=shape,
        dtype=cast("Dtype", layout.dtype),
        representation=representation,
        hflip=False,
        autoencoder=autoencoder,
        scale=scale,
        shift=shift,
        classes=classes,
        shards=tuple(shards),
        statistics=Sums.total(sums).statistics(shape[0]),
        companion=None if pixels is None else Companion("pixels", (3, *pixels.shape[1:3]), tuple(companions), None),
    )
    manifest.write(directory)
    return manifest
