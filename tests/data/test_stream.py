from itertools import chain, islice

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from dcdit.data.manifest import Manifest
from dcdit.data.shards import write_shards
from dcdit.data.stream import LatentStream, StreamConfig
from dcdit.errors import UserError

SAMPLES = 50


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """50 samples in uneven shards; the latent holds the sample's number."""
    directory = tmp_path_factory.mktemp("shards")
    numbers = np.arange(SAMPLES, dtype=np.float32).reshape(-1, 1, 1, 1)
    write_shards(
        directory,
        numbers,
        np.arange(SAMPLES) % 5,
        classes=tuple("abcde"),
        autoencoder="identity",
        scale=1.0,
        shift=0.0,
        samples_per_shard=7,
    )
    return directory


def stream(directory, start=0, epochs=None, rank=0, world_size=1, batch_size=3, seed=0, buffer=10):
    config = StreamConfig(batch_size, seed, buffer, rank, world_size)
    return LatentStream(directory, Manifest.read(directory), config, start, epochs)


def numbers(batches):
    return [latents.flatten().long().tolist() for latents, _ in batches]


def flat(lists):
    return list(chain.from_iterable(lists))


def loader(dataset, workers):
    return DataLoader(dataset, batch_size=None, num_workers=workers)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_resuming_at_any_batch_continues_the_uninterrupted_order(shards, workers):
    whole = numbers(islice(loader(stream(shards), workers), 30))
    assert whole == numbers(islice(loader(stream(shards), workers), 30))
    for start in (1, 4, 16, 23):  # within and across epochs
        assert numbers(islice(loader(stream(shards, start), workers), 30 - start)) == whole[start:]


def test_an_epoch_visits_no_sample_twice_and_drops_less_than_a_batch(shards):
    seen = flat(numbers(stream(shards, epochs=1)))
    assert len(seen) == len(set(seen)) == SAMPLES // 3 * 3


def test_epochs_and_seeds_shuffle_differently(shards):
    two = numbers(stream(shards, epochs=2))
    first, second = two[:16], two[16:]
    assert first != second
    assert first != numbers(stream(shards, epochs=1, seed=1))
    assert sorted(flat(first)) != flat(first)


def test_ranks_share_an_epoch_without_overlap_and_equally(shards):
    parts = [numbers(stream(shards, epochs=1, rank=r, world_size=3, batch_size=2)) for r in range(3)]
    assert len({len(part) for part in parts}) == 1
    seen = flat(flat(part) for part in parts)
    assert len(seen) == len(set(seen))


def test_ranks_exchange_shards_between_epochs(shards):
    own = stream(shards, rank=0, world_size=2)
    dealt = [{shard.name for shard in own.deal(epoch, 2)[0][0]} for epoch in range(4)]
    assert len({frozenset(names) for names in dealt}) > 1


def test_labels_stay_with_their_latents_and_scale_applies(shards):
    manifest = Manifest.read(shards)
    scaled = Manifest(**{**manifest.__dict__, "scale": 0.5, "shift": 2.0})
    for latents, labels in LatentStream(shards, scaled, StreamConfig(4, 0, 10), epochs=1):
        number = (latents.flatten() / 0.5 + 2.0).long()
        assert torch.equal(labels, number % 5)
        assert latents.dtype == torch.float32


def test_too_few_shards_for_the_readers(shards):
    with pytest.raises(UserError, match=r"9 ranks x 1 workers one batch of 3"):
        next(iter(stream(shards, world_size=9)))
