"""Companion shards: pixels and features beside the latents, and their agreement with them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.numbered import damage, write_numbers

from dcdit.data.arrays import write_shards
from dcdit.data.companions import (
    CompanionReader,
    encode_features,
    encode_pixels,
    verify_companions,
    write_with_companion,
)
from dcdit.data.manifest import Companion, EncoderIdentity, Manifest
from dcdit.data.order import Position, Readers
from dcdit.data.shards import CorruptSampleError, Layout, Sample
from dcdit.data.statistics import Tally
from dcdit.data.storage import Location
from dcdit.data.stream import LatentStream
from dcdit.errors import UserError

IDENTITY = EncoderIdentity("test_vit", "0" * 16, "random")


def gradient(number: int, side: int = 8) -> np.ndarray:
    """An image (side, side, 3) that gets brighter to the right; its red is the sample's number times ten."""
    image = np.zeros((side, side, 3), np.uint8)
    image[..., 0], image[..., 1] = 10 * number, np.linspace(0, 200, side).astype(np.uint8)
    return image


def write(directory, kind: str, sizes=(3, 2), hflip: bool = True) -> Location:
    """Shards whose latents, labels and companions are the number of the sample; flipped latents are negative."""
    layout, shards, companions, number = Layout((1, 2, 2), "float32", hflip), [], [], 0
    tally, shape = Tally((1, 2, 2), "sample"), {"pixels": (3, 8, 8), "features": (4, 2, 2)}[kind]
    for index, size in enumerate(sizes):
        samples = []
        for row in range(number, number + size):
            views = [np.full((1, 2, 2), sign * (row + 1), np.float32) for sign in (1, -1)][: 1 + hflip]
            seen = [np.full(shape, sign * (row + 1), np.float16) for sign in (1, -1)][: 1 + hflip]
            held = encode_pixels(gradient(row), 95) if kind == "pixels" else encode_features(seen)
            samples.append(Sample(f"{row:06d}", row % 5, views[0], views[1] if hflip else None, "", held))
        path = directory / f"shard-{index:06d}.tar"
        shard, companion = write_with_companion(path, samples, layout, tally, kind)
        shards.append(shard)
        companions.append(companion)
        number += size
    manifest = Manifest(
        *((1, 2, 2), "float32", "sample", hflip, "identity", 1.0, 0.0, tuple("abcde"), tuple(shards)),
        statistics=tally.sums.statistics(1),
        companion=Companion(kind, shape, tuple(companions), IDENTITY if kind == "features" else None),
    )
    manifest.write(directory)
    return Location(str(directory))


def batches(location, workers=None):
    manifest = location.manifest()
    stream = LatentStream(location, manifest, Readers(1, 5, 10), epochs=4, companion=manifest.companion)
    return list(
        stream if workers is None else torch.utils.data.DataLoader(stream, batch_size=None, num_workers=workers)
    )


@pytest.mark.parametrize("hflip", [False, True])
@pytest.mark.parametrize("kind", ["pixels", "features"])
def test_companions_go_with_their_latents_and_with_their_flips(tmp_path, kind, hflip):
    location, flipped = write(tmp_path, kind, hflip=hflip), set()
    for batch in batches(location):
        assert sorted(batch.stored.flatten(1)[:, 0].abs().tolist()) == [1, 2, 3, 4, 5]
        for latent, companion in zip(batch.stored, batch.companion, strict=True):
            number, flip = int(latent.abs().flatten()[0]) - 1, bool(latent.flatten()[0] < 0)
            flipped.add(flip)
            if kind == "features":
                assert companion.dtype == torch.float16
                assert torch.equal(companion.float(), torch.full((4, 2, 2), (number + 1) * (-1.0 if flip else 1.0)))
            else:
                expected = gradient(number)[:, ::-1] if flip else gradient(number)
                assert np.abs(companion.permute(1, 2, 0).numpy().astype(int) - expected).mean() < 8
                assert (companion[1, 0, 0] > companion[1, 0, -1]) == flip
    assert flipped == ({False, True} if hflip else {False})


def test_latents_are_the_same_with_and_without_companions_and_for_any_number_of_workers(tmp_path):
    location = write(tmp_path, "features")
    plain = list(LatentStream(location, location.manifest(), Readers(1, 5, 10), position=Position(), epochs=4))
    for one, two, three in zip(plain, batches(location), batches(location, 2), strict=True):
        assert one.companion is None
        assert torch.equal(one.stored, two.stored)
        assert torch.equal(two.stored, three.stored)
        assert torch.equal(two.companion, three.companion)


def test_training_without_alignment_opens_no_companion(tmp_path):
    location = write(tmp_path, "pixels")
    for path in tmp_path.glob("*.pixels.tar"):
        path.unlink()
    assert len(list(LatentStream(location, location.manifest(), Readers(1, 5, 10), epochs=1))) == 1
    with pytest.raises(UserError, match=r"shard-000000.pixels.tar is missing"):
        location.check_shards(location.manifest().companion.shards)


@settings(max_examples=15, deadline=None)
@given(
    kind=st.sampled_from(["pixels", "features"]),
    hflip=st.booleans(),
    place=st.floats(0, 0.999),
    content=st.binary(min_size=1, max_size=64),
)
def test_damage_is_a_corrupt_sample_or_nothing(tmp_path_factory, kind, hflip, place, content):
    directory = tmp_path_factory.mktemp("damaged")
    location = write(directory, kind, (4,), hflip)
    path = directory / f"shard-000000.{kind}.tar"
    whole = {latent: companion for batch in batches_of(location) for latent, companion in pairs(batch)}
    damage(path, int(place * (path.stat().st_size - len(content))), content)
    found, corrupt = [], 0
    for batch in batches_of(location):
        found += pairs(batch)
        corrupt += len(batch.corrupt)
    assert all(whole[latent] == companion for latent, companion in found)
    assert len(found) + corrupt >= 4


def batches_of(location):
    manifest = location.manifest()
    return list(LatentStream(location, manifest, Readers(1, 4, 0), epochs=1, companion=manifest.companion))


def pairs(batch):
    held = zip(batch.stored.flatten(1)[:, 0].tolist(), batch.companion, strict=True)
    return [(latent, companion.numpy().tobytes()) for latent, companion in held]


def test_an_image_of_another_size_is_not_decoded(tmp_path):
    layout, tally = Layout((1, 2, 2), "float32", False), Tally((1, 2, 2), "sample")
    sample = Sample("0", 0, np.ones((1, 2, 2), np.float32), None, "", encode_pixels(gradient(0, 16), 95))
    _, shard = write_with_companion(tmp_path / "shard-000000.tar", [sample], layout, tally, "pixels")
    reader = CompanionReader(Location(str(tmp_path)), Companion("pixels", (3, 8, 8), (shard,), None), False)
    with pytest.raises(CorruptSampleError, match="no RGB image of 8 x 8 pixels"):
        reader.read(0, 0, False, 0, np.empty((3, 8, 8), np.uint8))
    with pytest.raises(CorruptSampleError, match="the label or the checksum"):
        reader.read(0, 0, False, 1, np.empty((3, 8, 8), np.uint8))


def test_manifests_without_companions_are_as_before(tmp_path):
    from dcdit.runtime.files import content_digest, read_json, write_json

    write(tmp_path, "features")
    path = tmp_path / "manifest.json"
    content = read_json(path, dict, "")

    def refuses(words, **changes):
        changed = {key: value for key, value in {**content, **changes}.items() if key != "digest"}
        write_json(path, {**changed, "digest": content_digest(changed)})
        with pytest.raises(UserError, match=words):
            Manifest.read(path)

    companion = content["companion"]
    refuses("do not have the samples", companion={**companion, "shards": companion["shards"][:1]})
    refuses("too few for its 3 samples", companion={**companion, "shape": [60000, 30, 30]})
    refuses("are no square RGB images", companion={**companion, "kind": "pixels"})
    refuses("its encoder or its grid", companion={**companion, "encoder": None})
    (tmp_path / "plain").mkdir()
    write_numbers(tmp_path / "plain", [2])
    assert "companion" not in read_json(tmp_path / "plain" / "manifest.json", dict, "")


def test_arrays_are_written_with_their_images(tmp_path):
    images, numbers = np.stack([gradient(row) for row in range(5)]), np.arange(5)
    latents = np.broadcast_to((1 + numbers)[:, None, None, None], (5, 1, 2, 2)).astype(np.float32)
    write_shards(tmp_path, latents, numbers, classes=tuple("abcde"), samples_per_shard=2, pixels=images)
    location = Location(str(tmp_path))
    assert verify_companions(location, location.manifest(), location.manifest().companion) == []
    (batch,) = batches(location)[:1]
    for latent, companion in zip(batch.stored, batch.companion, strict=True):
        expected = images[int(latent.flatten()[0]) - 1].transpose(2, 0, 1)
        assert np.abs(companion.numpy().astype(int) - expected).max() < 30  # a JPEG
