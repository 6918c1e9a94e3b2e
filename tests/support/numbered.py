"""Shards whose latents are the samples' numbers: the order in which they are seen can be read off."""

from itertools import chain

import numpy as np
from torch.utils.data import DataLoader

from dcdit.data.manifest import Manifest
from dcdit.data.order import Position
from dcdit.data.shards import Layout, Sample, write_shard
from dcdit.data.statistics import Tally
from dcdit.data.storage import Location
from dcdit.data.stream import LatentStream


def write_numbers(directory, sizes, hflip=False):
    """Shards of the given sizes; the latent holds the sample's number, its label is the number modulo five."""
    layout = Layout((1, 1, 1), "float32", hflip)
    shards, number, tally = [], 0, Tally((1, 1, 1), "sample")
    for index, size in enumerate(sizes):
        rows = [
            Sample(
                f"{n:06d}",
                n % 5,
                np.full((1, 1, 1), n, np.float32),
                np.full((1, 1, 1), -n, np.float32) if hflip else None,
            )
            for n in range(number, number + size)
        ]
        shards.append(write_shard(directory / f"shard-{index:03d}.tar", rows, layout, tally))
        number += size
    manifest = Manifest(
        latent_shape=(1, 1, 1),
        dtype="float32",
        representation="sample",
        hflip=hflip,
        autoencoder="identity",
        scale=1.0,
        shift=0.0,
        classes=tuple("abcde"),
        shards=tuple(shards),
        statistics=tally.sums.statistics(1),
    )
    manifest.write(directory)
    return Location(str(directory))


def stream(location, readers, rank=0, start=0, epochs=None, seed=0):
    manifest = location.manifest()
    position = Position().advance(readers, start, manifest.samples)
    return LatentStream(location, manifest, readers, rank, seed, position, epochs)


def numbers(batches):
    return [batch.stored.flatten().long().tolist() for batch in batches]


def flat(lists):
    return list(chain.from_iterable(lists))


def loader(dataset, workers):
    return DataLoader(dataset, batch_size=None, num_workers=workers)


def damage(path, offset, content):
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)
