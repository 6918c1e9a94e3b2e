"""Reading shards in order: real files, loader workers, damage, and moments."""

import io
import os
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.numbered import damage, flat, loader, numbers, stream, write_numbers

from dcdit.data.decoder import network_latents
from dcdit.data.latents import LatentStatistics
from dcdit.data.manifest import Manifest
from dcdit.data.order import Position, Readers
from dcdit.data.shards import Layout
from dcdit.data.stream import LatentStream
from dcdit.errors import UserError


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    return write_numbers(tmp_path_factory.mktemp("uneven"), [7, 13, 1, 9, 20])


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    readers=st.builds(Readers, st.integers(1, 3), st.integers(1, 4), st.integers(0, 20)),
    killed_at=st.integers(0, 25),
    seed=st.integers(0, 3),
)
def test_what_is_read_after_a_kill(tmp_path_factory, sizes, readers, killed_at, seed):
    if not readers.batches(sum(sizes)):
        return
    location = write_numbers(tmp_path_factory.mktemp("shards"), sizes)
    per_epoch = readers.batches(sum(sizes))
    seen = []
    for rank in range(readers.world_size):
        whole = numbers(islice(stream(location, readers, rank, seed=seed), killed_at + 4))
        resumed = numbers(islice(stream(location, readers, rank, killed_at, seed=seed), 4))
        assert resumed == whole[killed_at:]
        seen += numbers(islice(stream(location, readers, rank, seed=seed), per_epoch))
    assert len(flat(seen)) == len(set(flat(seen)))
    assert sum(sizes) - len(flat(seen)) < readers.world_size * readers.batch_size


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_the_number_of_workers_changes_nothing(uneven, workers):
    readers = Readers(1, 3, 10)
    whole = numbers(islice(stream(uneven, readers), 40))  # 16 batches an epoch
    seeds = [batch.seed for batch in islice(stream(uneven, readers), 40)]
    assert len(set(seeds)) == 40
    for start in (0, 1, 15, 16, 23):
        got = list(islice(loader(stream(uneven, readers, start=start), workers), 40 - start))
        assert numbers(got) == whole[start:]
        assert [batch.seed for batch in got] == seeds[start:]


def test_labels_stay_with_their_latents(uneven):
    for batch in stream(uneven, Readers(1, 4, 30), epochs=1):
        assert torch.equal(batch.labels, batch.stored.flatten().long() % 5)
        assert batch.labels.dtype == torch.int64


def test_mirrored_latents_are_taken_half_of_the_time_and_again_after_a_kill(tmp_path):
    location = write_numbers(tmp_path, [200, 200], hflip=True)
    readers = Readers(1, 4, 100)
    whole = flat(numbers(stream(location, readers, epochs=1)))
    assert sorted(map(abs, whole)) == list(range(400))
    assert 0.4 < np.mean([number < 0 for number in whole]) < 0.6
    assert flat(numbers(islice(stream(location, readers, start=50), 50))) == whole[200:]
    again = {abs(number): number for number in flat(numbers(islice(stream(location, readers, start=100), 100)))}
    assert any(again[abs(number)] != number for number in whole)  # another choice in the next epoch


STATISTICS = LatentStatistics((3.0,), (2.0,))


def test_moments_give_fresh_samples_of_the_posterior():
    manifest = Manifest((1, 2, 2), "float16", "moments", False, "identity", 0.5, 1.0, ("a",), (), STATISTICS)
    mean, log_variance = torch.full((5000, 1, 2, 2), 3.0), torch.full((5000, 1, 2, 2), np.log(4.0))
    stored = torch.cat([mean, log_variance], dim=1).half()
    one, other = (network_latents(stored, manifest, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert one.dtype == torch.float32
    assert one.shape == (5000, 1, 2, 2)
    assert not torch.equal(one, other)
    assert abs(one.mean() - (3 - 1) * 0.5) < 0.03
    assert abs(one.std() - 2 * 0.5) < 0.03
    assert torch.equal(one, network_latents(stored, manifest, torch.Generator().manual_seed(0)))
    assert torch.equal(network_latents(stored, manifest, None), torch.full((5000, 1, 2, 2), 1.0))


def pickled():
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("offset", "content", "reason"),
    [
        (1024 + 512 + 128, b"\x07", "checksum of its latent differs"),
        (1024 + 512, pickled(), "no float32 array"),
        (512, b"{{{{", "label and checksum are unreadable"),
        (512 + len('{"label": '), b"9", "label 9 is none of 5"),
        (124, b"zzzz", "label and checksum are unreadable"),
        (512, b'{"label": 3.9,       ', "label and checksum are unreadable"),
        (512, b'{"label": Infinity,  ', "label and checksum are unreadable"),
        (512, b'{"label": true,      ', "label and checksum are unreadable"),
        (512, b'{"label": 1e400,     ', "label and checksum are unreadable"),
        (512, b'{"label": "3",       ', "label and checksum are unreadable"),
    ],
)
def test_a_damaged_sample_is_left_out_and_named(tmp_path, offset, content, reason):
    location = write_numbers(tmp_path, [8, 8])
    damage(tmp_path / "shard-001.tar", 3 * Layout((1, 1, 1), "float32", False).sample_bytes + offset, content)
    batches = list(stream(location, Readers(1, 4, 100), epochs=1))
    assert sorted(flat(numbers(batches))) == [n for n in range(16) if n != 11]
    complaints = flat(batch.corrupt for batch in batches)
    assert len(complaints) == 1
    assert complaints[0][:2] == ("shard-001.tar", 3)
    assert reason in complaints[0].reason
    assert sum(len(batch.labels) for batch in batches if batch.corrupt) == 3


def test_a_shard_cut_short_or_gone_in_the_middle_of_training(tmp_path):
    location, readers = write_numbers(tmp_path, [8, 8, 8]), Readers(1, 4, 0)
    size = Layout((1, 1, 1), "float32", False).sample_bytes
    manifest = location.manifest()
    os.truncate(tmp_path / "shard-001.tar", int(2.5 * size))
    (tmp_path / "shard-002.tar").unlink()
    for epoch in range(4):
        position = Position(epoch)
        batches = list(LatentStream(location, manifest, readers, position=position, epochs=1))
        assert len(batches) == 6  # no rank may yield fewer than the others
        assert set(flat(numbers(batches))) == set(range(10))
        complaints = set(flat(batch.corrupt for batch in batches))
        assert len([c for c in complaints if c.shard == "shard-001.tar"]) == 6
        assert len([c for c in complaints if c.shard == "shard-002.tar" and "No such file" in c.reason]) == 8
        assert all(len(batch.labels) for batch in batches[:-1])


def test_too_few_samples_for_one_batch(uneven):
    with pytest.raises(UserError, match=r"batch_size=60 exceeds the 50 samples"):
        stream(uneven, Readers(3, 20, 10))
