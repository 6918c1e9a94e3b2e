"""Images to compare with, from shards, folders and archives."""

import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from support.features import Corners, archive_arrays

from dcdit.data.arrays import write_shards
from dcdit.data.builtin import Digits
from dcdit.errors import UserError
from dcdit.evaluation.features import OwnFeatures
from dcdit.evaluation.images import open_images
from dcdit.evaluation.reference_images import ReferenceStatistics
from dcdit.runtime.display import Display

CPU = torch.device("cpu")


class Pixels(torch.nn.Module):
    def forward(self, images):
        return images[:, 0, :2, :2].flatten(1).float()


def opened(place, size=8, autoencoder=None):
    return open_images(str(place), (size, size), CPU, autoencoder)


def test_shards_are_decoded(digits):
    images = opened(digits / "val")
    expected, _ = Digits(grid=8).images()
    order = np.random.default_rng(0).permutation(len(expected))[:180]
    stored = ((expected[order].half().float() + 1) * 127.5 + 0.5).clamp(0, 255).to(torch.uint8)
    numbers = [0, 44, 45, 46, 179, 3]  # across shards of 45
    assert torch.equal(images.read(numbers), stored[numbers])
    assert images.count == 180


def test_latents_of_an_autoencoder(tmp_path, tiny_vae):
    latents = np.random.default_rng(0).standard_normal((5, 8, 4, 4)).astype(np.float16)
    settings = {"classes": ("a",), "autoencoder": str(tiny_vae), "scale": 0.5, "shift": 0.25, "samples_per_shard": 5}
    write_shards(tmp_path / "train", latents, np.zeros(5, int), representation="moments", **settings)
    images = opened(tmp_path / "train", 16)
    assert images.read([0, 4]).shape == (2, 3, 16, 16)
    assert torch.equal(images.read([4]), images.read([0, 4])[1:])  # the mean: nothing random
    with pytest.raises(UserError, match=r"cannot be loaded"):
        opened(tmp_path / "train", 16, "nowhere/at/all")


def test_another_autoencoder_in_the_same_place_makes_other_images(tmp_path, tiny_vae):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(tiny_vae)
    latents = np.zeros((2, 4, 4, 4), np.float16)
    settings = {"classes": ("a",), "autoencoder": "x", "scale": 0.5, "shift": 0.25, "samples_per_shard": 5}
    write_shards(tmp_path / "train", latents, np.zeros(2, int), **settings)
    found = []
    for _ in range(2):
        vae.save_pretrained(tmp_path / "vae")
        found.append(opened(tmp_path / "train", 16, str(tmp_path / "vae")).described())
        with torch.no_grad():
            vae.decoder.conv_out.bias += 1
    assert found[0] != found[1]
    vae.save_pretrained(tmp_path / "moved")
    vae.save_pretrained(tmp_path / "vae")
    moved, there = (opened(tmp_path / "train", 16, str(tmp_path / name)).described() for name in ("moved", "vae"))
    assert moved == there


def test_archives_stored_and_compressed(tmp_path):
    content = np.random.default_rng(0).integers(256, size=(9, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "stored.npz", arr_0=content)
    np.savez_compressed(tmp_path / "packed.npz", arr_0=content)
    for name in ("stored.npz", "packed.npz"):
        found = opened(tmp_path / name).read([8, 2, 3])
        assert torch.equal(found, torch.from_numpy(content[[8, 2, 3]]).permute(0, 3, 1, 2))
    np.savez(tmp_path / "half.npz", mu=np.zeros(3))
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(UserError, match=r"holds neither images as arr_0.* nor statistics"):
        opened(tmp_path / "half.npz")
    with pytest.raises(UserError, match=r"text.npz is damaged, or no .npz"):
        opened(tmp_path / "text.npz")


def test_a_packed_archive_is_unpacked_once(tmp_path, monkeypatch):
    content = np.random.default_rng(0).integers(256, size=(30, 8, 8, 3), dtype=np.uint8)
    np.savez_compressed(tmp_path / "packed.npz", arr_0=content)
    images = opened(tmp_path / "packed.npz")
    unpacked = []
    read = zipfile.ZipExtFile._read1
    monkeypatch.setattr(
        zipfile.ZipExtFile, "_read1", lambda self, size: unpacked.append(len(data := read(self, size))) or data
    )
    for start in range(0, 30, 3):
        found = images.read(range(start, start + 3))
        assert torch.equal(found, torch.from_numpy(content[start : start + 3]).permute(0, 3, 1, 2))
    assert content.nbytes <= sum(unpacked) < 1.2 * content.nbytes
    assert torch.equal(images.read([2]), torch.from_numpy(content[2:3]).permute(0, 3, 1, 2))  # backwards works too


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_statistics_that_come_with_an_archive_are_used_as_they_are(tmp_path, save, dtype):
    content = np.random.default_rng(0).integers(256, size=(60, 8, 8, 3), dtype=np.uint8)
    arrays = {key: value.astype(dtype) for key, value in archive_arrays().items()}
    save(tmp_path / "adm.npz", arr_0=content, **arrays)
    images, network = opened(tmp_path / "adm.npz"), OwnFeatures(Corners(), size=8, archive_statistics=True)
    reference = ReferenceStatistics(images, network, tmp_path, None, 50, 16)
    assert reference.published == ["features", "spatial"]
    reference.work(0, 1, Display(0, "reading", "part"))
    found = reference.finalize()
    seen = network(images.read(range(60)))
    assert torch.equal(found.features, seen.features)  # the images serve precision, recall and KID
    for moments, suffix in ((found.moments, ""), (found.spatial, "_s")):
        mean = moments.total / moments.count
        covariance = (moments.outer - moments.count * torch.outer(mean, mean)) / (moments.count - 1)
        assert torch.allclose(mean, torch.from_numpy(arrays[f"mu{suffix}"]).double())
        assert torch.allclose(covariance, torch.from_numpy(arrays[f"sigma{suffix}"]).double())
    # another network's features are other numbers: the images count
    other = ReferenceStatistics(images, OwnFeatures(Corners(), size=8), tmp_path, None, 50, 16)
    assert other.published == []
    other.work(0, 1, Display(0, "reading", "part"))
    assert torch.allclose(other.finalize().moments.total, seen.features.double().sum(0))


def test_images_are_left_alone_where_statistics_are_enough(tmp_path):
    np.savez(tmp_path / "moments.npz", **archive_arrays())
    images, network = opened(tmp_path / "moments.npz", 16), OwnFeatures(Corners(), size=8, archive_statistics=True)
    assert images.count == 0
    reference = ReferenceStatistics(images, network, tmp_path / "none", None, 50, 16, ["features", "spatial"])
    reference.work(0, 1, Display(0, "reading", "part"))
    assert len(reference.finalize().moments.total) == 4
    assert not (tmp_path / "none").exists()


def test_statistics_that_cannot_be_used(tmp_path):
    network = OwnFeatures(Corners(), size=8, archive_statistics=True)
    good = archive_arrays()
    for name, arrays, message in (
        ("wide.npz", archive_arrays(5), r"mu cannot be used: it has shape \(5,\), the features ask for \(4,\)"),
        ("whole.npz", {**good, "sigma": np.eye(4, dtype=int)}, "sigma cannot be used: sigma is int64"),
        ("askew.npz", {**good, "sigma": np.eye(4) + np.tri(4)}, "sigma cannot be used: a covariance is symmetric"),
        ("below.npz", {**good, "sigma_s": -np.eye(3)}, "sigma_s cannot be used: .* no negative variances"),
        ("nan.npz", {**good, "mu_s": np.full(3, np.nan)}, "mu_s cannot be used: not all of it is finite"),
        ("pickled.npz", {**good, "mu": np.array([None] * 4)}, "mu cannot be used: mu is object"),
    ):
        np.savez(tmp_path / name, **arrays)
        with pytest.raises(UserError, match=message):
            opened(tmp_path / name).moments(network)
    path = tmp_path / "cut.npz"
    np.savez(path, **good)
    content = bytearray(path.read_bytes())
    at = content.index(good["sigma"].tobytes())
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="sigma cannot be used: Bad CRC"):
        opened(path).moments(network)


def test_folders(tmp_path):
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    for number, colour in enumerate(colours):
        (tmp_path / f"class{number}").mkdir()
        Image.new("RGB", (20, 30), colour).save(tmp_path / f"class{number}" / "image.png")
    (tmp_path / "notes.txt").write_text("not an image")
    images = opened(tmp_path)
    assert images.count == 3
    assert images.read([0, 1, 2])[:, :, 4, 4].tolist() == [list(colour) for colour in colours]
    before = images.described()
    Image.new("RGB", (20, 31)).save(tmp_path / "class0" / "image.png")
    assert opened(tmp_path).described() != before
    (tmp_path / "class1" / "image.png").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"class1/image.png: not an image \(JPEG, .*\); remove it"):
        opened(tmp_path).read([1])


def test_what_is_refused(tmp_path, digits):
    for place, message in (
        (tmp_path / "nowhere", "does not exist"),
        (tmp_path, "no image lies in or below"),
        (digits, r"holds several splits: take reference=.*train"),
    ):
        with pytest.raises(UserError, match=message):
            opened(place)
    with pytest.raises(UserError, match=r"has images of 8 x 8 pixels, those to compare have 16 x 16"):
        opened(digits / "val", 16)


def test_statistics_of_a_reference_are_computed_once_by_all(digits, tmp_path, monkeypatch):
    images, network = opened(digits / "val"), OwnFeatures(Pixels(), size=8)

    def references(limit=None):
        return ReferenceStatistics(images, network, tmp_path, limit, 50, 16)

    for rank in (0, 1):
        references().work(rank, 2, Display(rank, "reading", "part"))
    found = references().finalize()
    features = network(images.read(range(180))).features
    assert found.moments.count == 180
    assert torch.allclose(found.moments.total, features.double().sum(0))
    assert torch.allclose(found.moments.outer, features.double().T @ features.double())
    monkeypatch.setattr(images, "read", lambda numbers: pytest.fail("read again"))
    references().work(0, 1, Display(0, "reading", "part"))
    monkeypatch.undo()
    assert references(10).path != references().path
    few = references(10)
    few.work(0, 1, Display(0, "reading", "part"))
    assert few.finalize().moments.count == 10
