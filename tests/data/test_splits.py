"""A validation split is read as the training split is, or refused before the first step."""

import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.damage import nothing_outside, sign

from dcdit.data.arrays import write_shards
from dcdit.data.datamodule import LatentDataModule
from dcdit.data.latents import LatentSpec
from dcdit.data.splits import check_reference, labels_within
from dcdit.errors import UserError

ANIMALS = ("cat", "dog", "emu")


def write(directory, split, classes=ANIMALS, count=12, side=2, **changes):
    """Latents of the value 8, each labelled by its place among the classes."""
    write_shards(
        directory / split, np.full((count, 1, side, side), 8, np.float32), np.arange(count) % len(classes),
        classes=classes, autoencoder="identity", scale=1.0, shift=0.0, samples_per_shard=6,
    )  # fmt: skip
    if changes:
        sign(directory / split / "manifest.json", **changes)


def module(directory, source=None, workers=0, seed=0):
    data = LatentDataModule(str(directory), 4, workers, 0, seed, source, None, None, 0, None, 1.0, False, None)
    data.trainer = SimpleNamespace(
        world_size=1, accumulate_grad_batches=1, global_rank=0, training=False, strategy=None, global_step=0
    )
    return data


def validated(data):
    """Latents and labels of the whole validation split, as a network gets them."""
    batches = [data.on_after_batch_transfer(batch, 0) for batch in data.val_dataloader()[0]]
    return torch.cat([batch.latents for batch in batches]), torch.cat([batch.labels for batch in batches])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"classes": ("emu", "cat", "dog")},
            r"its classes .* are not those of .* in the same order",
        ),
        ({"classes": ("emu", "cat")}, "in the same order"),
        ({"classes": ("cat", "cow")}, "its class 1, 'cow', is none of the training split"),
        ({"classes": ("cat", "dog", "emu", "fox")}, "its class 3, 'fox', is none"),
        ({"side": 4}, r"shape is \(1, 4, 4\) there and \(1, 2, 2\) here"),
        ({"autoencoder": "other"}, "autoencoder is other there and identity here"),
        ({"scale": 0.5}, "scaled otherwise than the training split: scale is 0.5 there and 1 here"),
        ({"shift": 0.5}, "shift is 0.5 there and 0 here"),
    ],
)
def test_another_validation_split_is_refused(tmp_path, changes, message):
    write(tmp_path, "train")
    write(tmp_path, "val", **changes)
    with pytest.raises(UserError, match=message) as caught:
        module(tmp_path).validation()
    assert f"validation split in {tmp_path}/val" in str(caught.value)


def test_other_weights_of_the_autoencoder_are_refused_and_another_place_is_not(tmp_path):
    write(tmp_path, "train", autoencoder="/a", fingerprint="a" * 16)
    write(tmp_path, "val", autoencoder="/b", fingerprint="a" * 16)
    assert module(tmp_path).validation() is not None
    write(tmp_path, "val", autoencoder="/a", fingerprint="b" * 16)
    with pytest.raises(UserError, match=r"fingerprint is b{16} there and a{16} here"):
        module(tmp_path).validation()


def test_labels_are_those_of_the_training_split_by_name(tmp_path, caplog):
    write(tmp_path, "train")
    write(tmp_path, "val", classes=("cat", "emu"))
    assert validated(module(tmp_path))[1].tolist() == [0, 2] * 6
    assert "no samples of 1 of 3 classes" in caplog.text


@pytest.mark.parametrize("own", ["autoencoder", "channel"])
def test_validation_is_normalised_by_the_training_split(tmp_path, caplog, own):
    write(tmp_path, "train", normalise="channel", scale=[1.0], shift=[8.0])
    changes = {"normalise": "channel", "scale": [1.0], "shift": [7.9999]} if own == "channel" else {}
    write(tmp_path, "val", **changes)
    assert (validated(module(tmp_path))[0] == 0).all()
    assert "normalised by scale and shift of the training split" in caplog.text


@given(st.lists(st.text("ab01", min_size=1, max_size=3), min_size=1, max_size=6), st.data())
def test_labels_within(classes, data):
    """Either the names agree, or nothing is said to be what it is not."""
    own = data.draw(st.lists(st.sampled_from(classes), min_size=1, max_size=6))
    try:
        labels = labels_within(classes, own)
    except UserError:
        assert own != classes
        return
    assert [classes[label] for label in labels] == own
    assert list(labels) == sorted(set(labels))


def test_numbers_do_not_say_which_classes_are_missing():
    digits = [str(number) for number in range(10)]
    assert labels_within(digits, digits) == tuple(range(10))
    assert labels_within(digits, ["0", "3", "7"]) == (0, 3, 7)
    with pytest.raises(UserError, match="its 2 classes have numbers for names, which do not say which of the 10"):
        labels_within(digits, ["0", "1"])


def test_a_reference_of_another_autoencoder_is_refused_and_images_never_are():
    network = LatentSpec((4, 8, 8), "a", 1.0, 0.0, ("cat", "dog"), "a" * 16)
    with pytest.raises(UserError, match=r"fingerprint is b{16} there and a{16} here"):
        check_reference(network, replace(network, fingerprint="b" * 16))
    images = LatentSpec((3, 64, 64), "identity", 1.0, 0.0, ("cat",))
    assert check_reference(network, replace(network, scale=0.5)) == ""
    assert check_reference(network, replace(network, autoencoder="elsewhere", fingerprint=None)) == ""
    assert "holds 1 classes, the network samples 2" in check_reference(network, images)


def unfinished(val):
    (val / ".extraction").mkdir(parents=True)


def manifest_of(make):
    def within(val):
        val.mkdir()
        make(val / "manifest.json")

    return within


def to_nowhere(path):
    path.symlink_to(path.parent / "nowhere")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (unfinished, "the extraction there is not finished"),
        (os.mkdir, "no shards have been written there"),
        (os.mkfifo, r"cannot be read|does not exist"),
        (to_nowhere, "is a link to what does not exist"),
        (lambda val: val.write_text(""), "cannot be read"),
        (manifest_of(os.mkfifo), "is no regular file"),
        (manifest_of(to_nowhere), "is a link to what does not exist"),
        (manifest_of(os.mkdir), "is no regular file"),
    ],
)
def test_a_validation_split_that_cannot_be_used_is_no_missing_one(tmp_path, make, message):
    write(tmp_path, "train")
    assert module(tmp_path).validation() is None
    make(tmp_path / "val")
    with pytest.raises(UserError, match=message) as caught:
        module(tmp_path).validation()
    assert "To train without validation, move it away" in str(caught.value)


def test_shards_that_are_no_files_are_told(tmp_path):
    write(tmp_path, "train")
    shard = tmp_path / "train" / "shard-000001.tar"
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(UserError, match=r"shard-000001.tar is no regular file: restore it"):
        module(tmp_path).manifest()


def test_complete_data_are_only_read(tmp_path):
    """A data folder that is whole may be one that nobody can write to."""
    write(tmp_path, "train")
    write(tmp_path, "val")
    with nothing_outside():
        data = module(tmp_path, source={"name": "synthetic"})
        data.prepare_data()
        assert len(validated(data)[1]) == 12


def test_more_reading_processes_than_is_sensible(tmp_path):
    with pytest.raises(UserError, match=r"num_workers=1000 is outside \[0, 128\]: .*as many as there are cores"):
        module(tmp_path, workers=1000)


def test_the_largest_seed_works_and_a_larger_one_is_refused(tmp_path):
    import lightning.pytorch as pl

    write(tmp_path, "train")
    data = module(tmp_path, seed=2**32 - 1)
    pl.seed_everything(data.seed, verbose=False)
    data.trainer.strategy = SimpleNamespace(root_device=torch.device("cpu"))
    assert len(next(iter(data.train_dataloader())).labels) == 4
    with pytest.raises(UserError, match="seed=4294967296 is outside"):
        module(tmp_path, seed=2**32)
