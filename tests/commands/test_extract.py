"""Extraction as users run it: images to shards, broken off, continued, looked at, trained on, sampled from."""

import errno
import json
import os
import shlex
import shutil
import signal
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from support.commands import typed
from support.configs import TINY, call, compose_config, train
from support.damage import sign
from support.processes import Command, end, ranks
from support.runs import assert_same_end, load, logged, start, wait_for

from dcdit import extract, inspect_latents, sample
from dcdit.data import shards
from dcdit.data.manifest import Manifest
from dcdit.errors import UserError
from dcdit.extraction.extraction import Extraction
from dcdit.extraction.sources import Item
from dcdit.runtime.processes import cores


def write_images(root: Path, count: int, classes: int = 3) -> Path:
    rng = np.random.default_rng(0)
    for number in range(count):
        folder = root / f"class_{number % classes}"
        folder.mkdir(parents=True, exist_ok=True)
        height, width = rng.integers(20, 60, 2)
        coarse = Image.fromarray(rng.integers(256, size=(4, 4, 3), dtype=np.uint8))
        coarse.resize((int(width), int(height))).save(folder / f"{number:03d}.jpg")
    return root


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), 50)


@pytest.fixture
def run(images, tiny_vae, tmp_path):
    """Extract with a tiny autoencoder; returns the folder of the split."""

    def extract_to(out: str, *overrides: str) -> Path:
        arguments = (
            f"source={images}",
            f"out={tmp_path / out}",
            f"autoencoder={tiny_vae}",
            "image_size=32",
            "samples_per_shard=12",
            "batch_size=5",
            "num_workers=0",
        )
        call(extract, compose_config(*arguments, *overrides, name="extract"))
        return tmp_path / out / "train"

    return extract_to


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("[!.]*"))}


def manifest_of(folder: Path) -> Manifest:
    return Manifest.read(folder / "manifest.json")


def notes(folder: Path) -> list[dict]:
    found = []
    for shard in manifest_of(folder).shards:
        with tarfile.open(folder / shard.name) as tar:
            found += [json.load(tar.extractfile(m)) for m in tar if m.name.endswith(".json")]
    return found


def test_every_image_with_its_label_in_mixed_shards(run, images, capsys):
    folder = run("plain")
    manifest = manifest_of(folder)
    assert [shard.samples for shard in manifest.shards] == [12, 12, 12, 12, 2]
    assert (manifest.latent_shape, manifest.stored_shape, manifest.dtype) == ((4, 8, 8), (8, 8, 8), "float16")
    assert (manifest.scale, manifest.shift, manifest.classes) == (0.5, 0.25, ("class_0", "class_1", "class_2"))
    stored = notes(folder)
    assert {note["source"] for note in stored} == {str(p.relative_to(images)) for p in images.glob("*/*.jpg")}
    assert all(note["source"].startswith(f"class_{note['label']}/") for note in stored)
    assert len({note["label"] for note in stored[:12]}) > 1
    assert "50 images of 3 classes in 5 shards" in capsys.readouterr().out
    run("plain")  # again: nothing to do
    assert "Everything is there already" in capsys.readouterr().out


def test_the_stored_moments_are_the_autoencoders(run, images, tiny_vae):
    from dcdit.data.autoencoder import load_autoencoder
    from dcdit.extraction.decode import decode_image

    folder = run("moments", "hflip=true")
    autoencoder, layout = (
        load_autoencoder(str(tiny_vae), torch.device("cpu")),
        shards.Layout((8, 8, 8), "float16", True),
    )
    shard = manifest_of(folder).shards[0]
    descriptor = os.open(folder / shard.name, os.O_RDONLY)
    for index, note in enumerate(notes(folder)[:3]):
        pixels = torch.from_numpy(decode_image((images / note["source"]).read_bytes(), 32)).permute(2, 0, 1)[None]
        for hflip, view in ((False, pixels), (True, pixels.flip(-1))):
            row = np.empty(layout.array_bytes, np.uint8)
            layout.read(descriptor, index, hflip, row)
            expected = autoencoder.encode(view, "fp32")[0].numpy()
            np.testing.assert_allclose(row.view(np.float16).reshape(8, 8, 8), expected, rtol=2e-3, atol=2e-3)
    os.close(descriptor)


@pytest.mark.parametrize("options", [[], ["representation=sample", "hflip=true", "dtype=float32"]])
def test_any_number_of_processes_and_workers_writes_the_same_bytes(run, tmp_path, monkeypatch, options):
    alone = content(run("alone", *options))
    assert content(run("workers", *options, "num_workers=2")) == alone
    for rank in (2, 0, 1):
        monkeypatch.setattr(extract, "processes", lambda rank=rank: (rank, 3))
        folder = run("three", *options)
        assert (folder / "manifest.json").exists() == (rank == 1)  # the last one to finish writes it
    assert content(folder) == alone
    assert len(notes(folder)) == 50


@pytest.mark.parametrize("by", ["channel", "element"])
def test_statistics_are_the_same_on_any_number_of_processes_and_after_any_loss(run, monkeypatch, by):
    options = [f"normalise={by}", "hflip=true"]
    whole = content(run("whole", *options))
    for rank in (1, 0):
        monkeypatch.setattr(extract, "processes", lambda rank=rank: (rank, 2))
        folder = run("two", *options)
    assert content(folder) == whole
    monkeypatch.undo()
    (folder / "shard-000001.tar").unlink()
    (folder / "shard-000003.tar").write_bytes(whole["shard-000003.tar"][:-1000])
    run("two", *options)
    assert content(folder) == whole
    plain = content(run("plain", "hflip=true"))
    names = [name for name in whole if name.endswith(".tar")]
    assert all(plain[name] == whole[name] for name in names)  # only the manifest says how they are seen


def test_latents_normalised_by_channel_from_images_to_samples(run, tiny_vae, tmp_path, capsys):
    from dcdit.data.decoder import network_latents
    from dcdit.data.inspection import first_samples
    from dcdit.data.storage import Location

    folder = run("data", "normalise=channel")
    manifest = manifest_of(folder)
    assert len(manifest.scale) == len(manifest.shift) == 4
    stored = first_samples(Location(str(folder)), manifest, 50)
    seen = torch.cat([network_latents(stored, manifest, torch.Generator().manual_seed(k)) for k in range(4)])
    torch.testing.assert_close(seen.mean((0, 2, 3)), torch.zeros(4), atol=0.05, rtol=0)
    torch.testing.assert_close(seen.std((0, 2, 3)), torch.ones(4), atol=0.05, rtol=0)
    capsys.readouterr()
    call(
        inspect_latents,
        compose_config(f"directory={folder.parent}", f"picture={tmp_path}/x.png", name="inspect_latents"),
    )
    said = capsys.readouterr().out
    assert "of each channel of these latents" in said
    assert said.count("1.000") >= 4

    trained = tmp_path / "trained"
    trained.mkdir()
    arguments = [*TINY, *MOMENTS, f"data.directory={folder.parent}", "trainer.max_steps=2"]
    train(compose_config(*arguments), trained)
    latents = load(trained)["hyper_parameters"]["latents"]
    assert (tuple(latents["scale"]), tuple(latents["shift"])) == (manifest.scale, manifest.shift)
    asked = (f"checkpoint={trained}", f"out={tmp_path}/samples", "sampler.steps=3", "per_class=1", "guidance.scale=2")
    out = call(sample, compose_config(*asked, name="sample"))
    with Image.open(out / "samples.png") as picture:
        assert picture.size[0] >= 32

    # scale and shift, or the statistics, were lost: refused before the first step
    path = folder / "manifest.json"
    original = json.loads(path.read_text())
    other = [1.1 * each for each in original["scale"]]
    for change, message in (
        ({"scale": 1.0, "shift": 0.0}, "normalise=channel, but scale is 1: it has been lost"),
        ({"scale": original["scale"][:3]}, r"scale has 3 numbers, latents of shape \[4, 8, 8\] need one, 4"),
        ({"scale": other}, "do not have mean 0 and deviation 1: they have been lost"),
        ({"statistics": None}, "statistics"),
        ({"statistics": {"mean": [0.0], "deviation": [1.0]}}, "statistics.mean has 1 numbers, the latents 4 channels"),
    ):
        sign(path, **(original | change))
        with pytest.raises(UserError, match=message):
            train(compose_config(*arguments[:-1], "trainer.max_steps=4"), tmp_path / "refused")
    statistics = {"mean": [0.5] * 4, "deviation": [1.0] * 4}
    sign(path, **(original | {"normalise": "autoencoder", "scale": 1.0, "shift": 0.0, "statistics": statistics}))
    with pytest.raises(UserError, match=r"manifest\.json: its statistics are not those of the latents"):
        call(inspect_latents, compose_config(f"directory={folder.parent}", "images=0", name="inspect_latents"))


def test_what_does_not_fit_the_latents_is_told_before_anything_is_encoded(run, tiny_vae, tmp_path):
    """Numbers for the elements of another size; and an autoencoder without a posterior stores its latents once."""
    from diffusers import AutoencoderKL

    wrong = AutoencoderKL.from_pretrained(tiny_vae, low_cpu_mem_usage=False)
    wrong.register_to_config(latents_mean=np.zeros((4, 5, 5)).tolist(), shift_factor=None)
    wrong.save_pretrained(tmp_path / "wrong")
    with pytest.raises(UserError, match=r"its shift has 4 x 5 x 5 numbers, latents of shape \[4, 8, 8\] need one"):
        run("never", f"autoencoder={tmp_path}/wrong")
    assert not (tmp_path / "never" / "train").exists()
    folder = run("pixels", "autoencoder=identity", "image_size=16")
    assert (manifest_of(folder).representation, manifest_of(folder).latent_shape) == ("sample", (3, 16, 16))


def test_samples_differ_by_seed_and_settings_are_kept(run):
    one, other = run("one", "representation=sample"), run("other", "representation=sample", "seed=1")
    assert content(one) != content(other)
    assert manifest_of(one).stored_shape == (4, 8, 8)


def odd_files(root: Path) -> None:
    """What people have among their images."""
    folder = root / "class_0"
    good = next(folder.glob("*.jpg")).read_bytes()
    (folder / "cut.jpg").write_bytes(good[: len(good) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "notes.txt").write_text("not an image")
    (folder / "same.jpg").write_bytes(good)
    (folder / "same.png").write_bytes(good)  # one name, two files; and a JPEG that is called PNG
    (folder / "deeper").mkdir()
    (folder / "deeper" / "same.jpg").write_bytes(good)
    (folder / "ünïcode näme.jpg").write_bytes(good)
    Image.new("RGB", (1, 300)).save(folder / "thin.png")
    Image.new("CMYK", (30, 30)).save(folder / "cmyk.jpg")
    (folder / "gone.jpg").symlink_to(root / "nowhere.jpg")
    (folder / "loop").symlink_to(root, target_is_directory=True)
    (root / "stray.jpg").write_bytes(good)
    (root / "class_empty").mkdir()


UNUSABLE = ("cut.jpg", "empty.png", "thin.png", "gone.jpg")


def test_odd_files_are_encoded_or_listed(run, images, tmp_path, capsys):
    root = tmp_path / "odd"
    shutil.copytree(images, root)
    odd_files(root)
    folder = run("odd-latents", f"source={root}", "num_workers=2")
    manifest = manifest_of(folder)
    skipped = {image.file: image.reason for image in manifest.skipped}
    assert set(skipped) == {"stray.jpg", *(f"class_0/{name}" for name in UNUSABLE)}
    assert "empty" in skipped["class_0/empty.png"]
    assert "corrupt" in skipped["class_0/cut.jpg"]
    assert "min_side=2" in skipped["class_0/thin.png"]
    assert "No such file" in skipped["class_0/gone.jpg"]
    assert "no class folder" in skipped["stray.jpg"]
    assert manifest.samples == 50 + 5
    assert {note["source"] for note in notes(folder)} >= {"class_0/same.jpg", "class_0/same.png", "class_0/cmyk.jpg"}
    assert manifest.classes == ("class_0", "class_1", "class_2", "class_empty")
    printed = capsys.readouterr()
    assert "5 files skipped" in printed.out
    assert "1 of 4 classes have no images (they keep their labels): 'class_empty'" in printed.err
    assert "1 files without an image's name are left out: .txt (1)" in printed.err
    with pytest.raises(UserError, match=r"strict=true: stray.jpg: lies in no class folder"):
        run("strict", f"source={root}", "strict=true")
    (root / "stray.jpg").unlink()
    with pytest.raises(UserError, match=r"strict=true: class_0/"):
        run("strict", f"source={root}", "strict=true")


def test_changes_between_two_runs_are_refused_by_name(run, images, tmp_path, monkeypatch):
    root = tmp_path / "changing"
    shutil.copytree(images, root)
    monkeypatch.setattr(extract, "processes", lambda: (0, 2))  # half of the work
    run("changed", f"source={root}")
    monkeypatch.undo()
    (root / "class_new").mkdir()
    with pytest.raises(UserError, match=r"source: 'class_new' is new since this extraction began"):
        run("changed", f"source={root}")
    (root / "class_new").rmdir()
    (root / "class_1" / "extra.jpg").write_bytes(b"x")
    with pytest.raises(UserError, match=r"source: 'class_1' has changed .*17 files, .* 18 files, "):
        run("changed", f"source={root}")
    (root / "class_1" / "extra.jpg").unlink()
    path = next((root / "class_2").iterdir())
    original = path.read_bytes()
    path.write_bytes(original + b"x")
    with pytest.raises(UserError, match=r"source: 'class_2' has changed"):
        run("changed", f"source={root}")
    path.write_bytes(original)
    for override, before in (("image_size=16", "32"), ("threads=7", str(cores())), ("max_pixels=5000", "64000000")):
        with pytest.raises(UserError, match=rf"{override}, but the extraction there was begun with {before}"):
            run("changed", f"source={root}", override)
    finished = run("changed", f"source={root}")
    assert content(finished) == content(run("whole", f"source={root}"))
    with pytest.raises(UserError, match=r"hflip=True, but the extraction there was begun with False"):
        run("changed", f"source={root}", "hflip=true")
    (finished / "manifest.json").unlink()
    with pytest.raises(UserError, match="holds tar files without a manifest"):
        run("changed", f"source={root}")


TOO_MUCH = {"image_size": 100_000, "threads": 100_000, "num_workers": 2000, "batch_size": 10**6, "min_side": 10**5}


def test_mistakes_are_told_before_work_is_wasted(run, tmp_path, digits, monkeypatch):
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "flat" / "a.png")
    bad = tmp_path / "bad" / "class"
    bad.mkdir(parents=True)
    (bad / "a.jpg").write_bytes(b"x")
    for kind in ("zip", "tar"):
        shutil.make_archive(str(tmp_path / "images"), kind, tmp_path / "bad")
    for overrides, message in (
        ([f"source={tmp_path}/nowhere"], r"source=.*nowhere is no folder"),
        ([f"source={tmp_path}/images.zip"], r"source=.*images\.zip is no folder: unpack it, and give the folder"),
        ([f"source={tmp_path}/images.tar"], r"a tar file of class folders: unpack it"),
        ([f"source={tmp_path}/images.tar", "classes=1"], r"no image could be used.*unpack a tar file of class folders"),
        ([f"out={tmp_path}/flat", f"source={tmp_path}/flat"], r"lies in source=.*: choose a place outside"),
        ([f"out={tmp_path}", "split=flat", f"source={tmp_path}/flat"], r"lies in source="),
        ([f"out={tmp_path}/flat/a.png"], r"a.png.* cannot be written to: Not a directory"),
        ([f"source={tmp_path}/flat"], r"has no subfolders: put the images of each class into one"),
        ([f"source={tmp_path}/bad"], r"no image could be used; the first: class/a.jpg: not an image"),
        (["image_size=30"], r"image_size=30 is no multiple of 4"),
        (["image_size=0"], r"image_size=0 is outside"),
        (["representation=median"], r"representation='median' is not one of auto, moments, sample"),
        (["precision=fp8"], r"precision='fp8'"),
        (["+imagesize=3"], r"imagesize=3: there is no such key"),
        ([f"autoencoder={tmp_path}/nowhere"], r"autoencoder='.*nowhere' cannot be loaded"),
        (["classes=3"], r"classes=3 is for webdataset shards"),
        *(([f"split={name}"], r"split='.+' is not a name of letters") for name in ("a/b", "..", ".", "'a b'", "'~'")),
        *(([f"{key}={value}"], rf"{key}={value} is outside") for key, value in TOO_MUCH.items()),
        (["max_pixels=1e9"], r"max_pixels=1000000000 .*Pillow decodes no larger images"),
        ([f"out={digits}"], r"holds shards that no extraction wrote"),
        (["source=???"], r"source is not set"),
    ):
        with pytest.raises(UserError, match=message):
            run("wrong", *overrides)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 10))
    with pytest.raises(UserError, match=r"153.6 kB are needed for 50 images, 10 bytes are free"):
        run("full")


def test_an_unreadable_folder_is_named(run, images, tmp_path, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("class_1"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"class_1 cannot be read: Permission denied; nothing has been encoded"):
        run("unreadable")


def test_a_full_disk_keeps_finished_shards(run, monkeypatch):
    written = shards.os.fsync
    calls = []

    def full(descriptor):
        calls.append(1)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        written(descriptor)

    monkeypatch.setattr(shards.os, "fsync", full)
    with pytest.raises(UserError, match=r"the disk is full: .* Finished shards are kept; the same command goes on"):
        run("disk")
    monkeypatch.undo()
    folder = run("disk")
    assert content(folder) == content(run("undisturbed"))


def test_a_latent_that_overflows_is_not_stored(run, monkeypatch):
    from dcdit.data.autoencoder import Diffusers

    encode, precisions = Diffusers.encode, []

    def overflow(self, batch, precision):
        precisions.append(precision)
        moments = encode(self, batch, precision)
        moments[0, 0] = 1e6 if precision == "fp32" else torch.inf
        return moments

    monkeypatch.setattr(Diffusers, "encode", overflow)
    manifest = manifest_of(run("overflow", "precision=bf16"))
    assert precisions[:2] in (["bf16", "fp32"], ["bf16", "bf16"])  # one batch ahead
    assert precisions.count("fp32") == 13  # each batch once more, exactly
    assert len(manifest.skipped) == 13
    assert "not finite in float16" in manifest.skipped[0].reason
    with pytest.raises(UserError, match=r"strict=true: class_.*not finite in float16, try dtype=float32"):
        run("strict-overflow", "precision=bf16", "strict=true")


def test_an_encoder_that_is_never_finite_is_given_up_early(run, monkeypatch):
    from dcdit.data.autoencoder import Diffusers

    encode, seen = Diffusers.encode, []

    def nothing(self, batch, precision):
        seen.append(len(batch))
        return encode(self, batch, precision) * torch.nan

    monkeypatch.setattr(Diffusers, "encode", nothing)
    with pytest.raises(
        UserError, match=r"the first 16 images, class_\S+ among them, became latents that are not finite"
    ):
        run("nan")
    assert sum(seen) < 40  # of 50


def test_too_many_images_that_cannot_be_used_stop_an_extraction(run, images, tmp_path):
    root = tmp_path / "some"
    shutil.copytree(images, root)
    for number in range(7):
        (root / "class_1" / f"broken_{number}.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"could not be used \(corrupt_limit=5\); the last: class_1/broken_"):
        run("out", f"source={root}", "corrupt_limit=5")
    assert len(manifest_of(run("out", f"source={root}", "corrupt_limit=7")).skipped) == 7


def test_a_source_that_vanishes_stops_an_extraction(run, images, tmp_path, monkeypatch):
    """An unmounted share is no bad image: what is missing is not recorded, and the same command goes on."""
    root = tmp_path / "share"
    shutil.copytree(images, root)
    whole = content(run("whole", f"source={root}"))
    read, reads = Item.read, []

    def vanishing(item, *arguments):
        reads.append(item)
        if len(reads) == 30:
            root.rename(tmp_path / "unmounted")
        return read(item, *arguments)

    monkeypatch.setattr(Item, "read", vanishing)
    with pytest.raises(UserError, match=r"class_\d/\d+.jpg: it cannot be read \(No such.* the same command goes on"):
        run("out", f"source={root}")
    assert not (tmp_path / "out" / "train" / "manifest.json").exists()
    with pytest.raises(UserError, match="is no folder"):
        run("out", f"source={root}")
    (tmp_path / "unmounted").rename(root)
    assert content(run("out", f"source={root}")) == whole


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES, errno.ENOENT])
@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_errors_of_the_disk_are_no_bad_images(run, images, tmp_path, monkeypatch, kind, number):
    write_tars(tmp_path / "tars", images)
    options = [f"source={tmp_path}/tars", "classes=3"] if kind == "tar" else []
    opened = os.open

    def failing(path, *arguments, **named):
        if str(path).endswith((".jpg", "images-1.tar")) and started:
            raise OSError(number, os.strerror(number), str(path))
        return opened(path, *arguments, **named)

    started: list[bool] = []
    monkeypatch.setattr(Extraction, "_check_disk", lambda *_: started.append(True))
    monkeypatch.setattr(os, "open", failing)
    with pytest.raises(UserError, match=rf"{os.strerror(number)}.*the same command goes on"):
        run("out", *options)
    assert not (tmp_path / "out" / "train" / "manifest.json").exists()


def test_a_class_whose_images_are_all_unusable_is_told(run, images, tmp_path, capsys):
    root = tmp_path / "some"
    shutil.copytree(images, root)
    (root / "class_9").mkdir()
    Image.new("1", (9000, 9000)).save(root / "class_9" / "large.png")
    for number in range(20):
        (root / "class_9" / f"{number}.txt").write_text("a caption")
    folder = run("out", f"source={root}", "corrupt_limit=1")
    assert "1 of 4 classes have no images (they keep their labels): 'class_9'" in capsys.readouterr().out
    assert [(image.file, image.reason) for image in manifest_of(folder).skipped] == [
        ("class_9/large.png", "9000 x 9000 pixels, max_pixels=64000000")
    ]
    write_tars(tmp_path / "tars", images)
    run("from-tars", f"source={tmp_path}/tars", "classes=5")
    assert "2 of 5 classes have no images (they keep their labels): '3', '4'" in capsys.readouterr().out


def test_a_second_command_is_told_of_the_first(run, tmp_path):
    folder = tmp_path / "out" / "train"
    folder.mkdir(parents=True)
    with FileLock(folder / ".extraction-0.lock"), pytest.raises(UserError) as told:
        run("out")
    assert str(told.value) == f"out: another command is extracting to {folder}: wait for it, or stop it"


@pytest.mark.parametrize("name", ["plain", "two words", "a=b", "it's", "a,b", "{x}", "(1)"])
def test_the_command_that_is_printed_works(run, images, tiny_vae, tmp_path, capsys, name):
    options = [f"autoencoder={tiny_vae}", "image_size=32", "num_workers=0", f"source={images}"]
    out = f"'{tmp_path}/{name}'" if "," in name else f"{tmp_path}/{name}"
    done = typed(capsys, tmp_path, "extract", *options, f"out={out}")
    assert done.status == 0, done.err
    printed = next(line for line in done.out.splitlines() if "python -m" in line).partition("python -m dcdit.")[2]
    command, *words = shlex.split(printed)
    assert typed(capsys, tmp_path, command, *words, "images=0").status == 0


@pytest.mark.parametrize("by", ["autoencoder", "channel", "element"])
def test_other_splits_take_classes_scale_and_shift_of_train(run, images, tmp_path, capsys, by):
    few = tmp_path / "few"
    for name in ("class_0", "class_2"):
        shutil.copytree(images / name, few / name)
    train = manifest_of(run("out", f"normalise={by}"))
    capsys.readouterr()
    run("out", f"source={few}", "split=val")
    said = capsys.readouterr().err
    assert f"Classes, scale and shift are those of {tmp_path}/out/train" in said
    assert "1 of 3 classes have no images (they keep their labels): 'class_1'" in said
    val = manifest_of(tmp_path / "out" / "val")
    assert (val.classes, val.scale, val.shift, val.normalise) == (train.classes, train.scale, train.shift, "train")
    assert {note["label"] for note in notes(tmp_path / "out" / "val")} == {0, 2}
    call(inspect_latents, compose_config(f"directory={tmp_path}/out", "split=val", "images=0", name="inspect_latents"))
    assert "of the train split" in " ".join(capsys.readouterr().out.split())
    run("out", f"source={few}", "split=val")
    assert "Everything is there already" in capsys.readouterr().out


def test_splits_that_cannot_agree_are_refused_before_work(run, images, tmp_path, capsys, monkeypatch):
    run("alone", "split=val")
    assert f"There is no {tmp_path}/alone/train: val gets classes, scale and shift" in capsys.readouterr().err
    monkeypatch.setattr(extract, "processes", lambda: (0, 2))
    run("half")
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"split=val: .*train is not finished"):
        run("half", "split=val")
    write_tars(tmp_path / "tars", images)
    (tmp_path / "names.txt").write_text("a\nb\nc")
    (tmp_path / "others" / "class_7").mkdir(parents=True)
    run("out")
    tars = f"source={tmp_path}/tars"
    for overrides, message in (
        (["image_size=16"], r"split=val must agree with .*train: shape is .4, 8, 8. there and .4, 4, 4. here"),
        (["autoencoder=identity"], r"split=val must agree with .*train: .*Give image_size and autoencoder of train"),
        ([f"source={tmp_path}/others"], "the train split has no class 'class_7'"),
        ([tars, "classes=4"], r"classes=4 are not the 3 classes of .*train"),
        ([tars, f"classes={tmp_path}/names.txt"], r"are not the 3 classes of .*train"),
    ):
        with pytest.raises(UserError, match=message):
            run("out", "split=val", *overrides)
    run("out", "split=val", tars)
    assert manifest_of(tmp_path / "out" / "val").classes == ("class_0", "class_1", "class_2")


def write_tars(folder: Path, images: Path) -> None:
    folder.mkdir()
    paths = sorted(images.glob("*/*.jpg"))
    for number in range(2):
        with tarfile.open(folder / f"images-{number}.tar", "w") as tar:
            for index, path in enumerate(paths[number * 25 : number * 25 + 25]):
                label = folder / "label"
                label.write_text(path.parent.name.removeprefix("class_"))
                tar.add(path, f"{index:04d}.jpg")
                if index != 3:
                    tar.add(label, f"{index:04d}.cls")
                if index == 5:
                    tar.add(path, f"{index:04d}.jpg")
    (folder / "label").unlink()


def test_webdataset_shards_of_images(run, images, tmp_path, capsys):
    tars = tmp_path / "tars"
    write_tars(tars, images)
    folder = run("from-tars", f"source={tars}", "classes=3", "num_workers=2")
    manifest = manifest_of(folder)
    assert [shard.samples for shard in manifest.shards] == [24, 24]
    reasons = {image.file: image.reason for image in manifest.skipped}
    assert reasons["images-0.tar/0003.jpg"].startswith("no label")
    assert "second file" in reasons["images-1.tar/0005.jpg"]
    braces = run("from-braces", f"source='{tars}/images-{{0..1}}.tar'", "classes=3")
    assert content(braces)["shard-000000.tar"] == content(folder)["shard-000000.tar"]
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\nowl\n")
    assert manifest_of(run("named", f"source={tars}", f"classes={names}")).classes == ("cat", "dog", "owl")
    for overrides, message in (
        ([f"source={tars}"], "give the number of classes"),
        ([f"source={tars}", "classes=2"], r"images-[01].tar/\d+.jpg: label 2 is none of 2 classes"),
        ([f"source='{tars}/images-{{0..5}}.tar'", "classes=3"], r"there is no file .*images-2.tar"),
    ):
        with pytest.raises(UserError, match=message):
            run("bad-tars", *overrides, "num_workers=2")
    os.truncate(tars / "images-1.tar", 20_000)
    capsys.readouterr()
    cut = manifest_of(run("cut", f"source={tars}", "classes=3"))
    assert "IMAGES ARE MISSING, how many is not known: images-1.tar: " in capsys.readouterr().out
    assert cut.shards[0].samples == 24
    assert any(image.file.startswith("images-1.tar") for image in cut.skipped)


def test_lost_shards_are_written_again(run, images, tmp_path, capsys):
    root = tmp_path / "some"
    shutil.copytree(images, root)
    (root / "class_0" / "notes.txt").write_text("no image")
    folder = run("lost", f"source={root}")
    whole = content(folder)
    (folder / "shard-000001.tar").unlink()
    os.truncate(folder / "shard-000003.tar", 1000)
    capsys.readouterr()
    run("lost", f"source={root}")
    assert "Continuing: 3 of 5 shards" in capsys.readouterr().err
    assert content(folder) == whole


def test_a_killed_extraction_goes_on_with_the_same_bytes(tmp_path, tiny_vae):
    """SIGKILL in the middle, Ctrl-C after that, then to the end with two processes: as if nothing had happened."""
    images = write_images(tmp_path / "images", 160)
    folder = tmp_path / "broken" / "train"
    settings = ("image_size=32", "samples_per_shard=8", "batch_size=2", "num_workers=1", "threads=1")
    words = (f"source={images}", f"autoencoder={tiny_vae}", *settings)

    def done() -> int:
        return len(list(folder.glob("*.tar")))

    def started(until: int, number: int) -> Command:
        process = Command(tmp_path, "extract", f"out={folder.parent}", *words)
        wait_for(lambda: done() >= until or process.poll() is not None)
        os.kill(process.pid, number)
        process.wait()
        return process

    assert started(3, signal.SIGKILL).poll() == -signal.SIGKILL
    killed_at = done()
    assert 3 <= killed_at < 20
    interrupted = started(killed_at + 3, signal.SIGINT)
    assert interrupted.poll() == 130, interrupted.said
    assert "the same command goes on from there" in interrupted.words
    assert f"Continuing: {killed_at} of 20" in interrupted.words or f"{killed_at - 1} of 20" in interrupted.words
    assert "Traceback" not in interrupted.said
    assert done() < 20

    end(ranks(2, tmp_path, "extract", f"out={folder.parent}", *words))
    end([Command(tmp_path, "extract", f"out={tmp_path}/whole", *words)])
    assert content(folder) == content(tmp_path / "whole" / "train")
    assert len(content(folder)) == 21
    assert not list(folder.glob("*.part"))


def test_images_to_shards_to_training_to_images(run, tmp_path, capsys):
    folder = run("latents", "hflip=true")
    call(
        inspect_latents,
        compose_config(
            f"directory={folder.parent}", f"picture={tmp_path}/grid.png", "images=4", name="inspect_latents"
        ),
    )
    printed = capsys.readouterr().out
    assert "50, each also flipped" in printed
    assert "all right" in printed
    with Image.open(tmp_path / "grid.png") as picture:
        assert min(picture.size) > 64

    trained = tmp_path / "trained"
    trained.mkdir()
    model = ["model.channels=4", "model.num_classes=3", "data.source=null", f"data.directory={folder.parent}"]
    arguments = [*TINY, *model, "data.num_workers=2", "trainer.max_steps=2"]
    train(compose_config(*arguments), trained)
    out = call(
        sample,
        compose_config(
            f"checkpoint={trained}/checkpoints/last.ckpt",
            f"out={tmp_path}/samples",
            "sampler.steps=3",
            "per_class=1",
            name="sample",
        ),
    )
    with Image.open(out / "samples.png") as picture:
        assert picture.size[0] >= 32

    # another autoencoder, or classes in another order: refused before the first step
    path = folder / "manifest.json"
    original = json.loads(path.read_text())
    for change, message in (
        ({"fingerprint": "0" * 16}, r"fingerprint is \w+ there and 0{16} here"),
        ({"scale": 0.9}, r"scale is 0.5 there and 0.9 here"),
        ({"classes": ["class_1", "class_0", "class_2"]}, r"class 0 is 'class_0' there and 'class_1' here"),
    ):
        sign(path, **(original | change))
        with pytest.raises(UserError, match=message):
            train(compose_config(*arguments[:-1], "trainer.max_steps=4", "ckpt_path=last"), trained)
    sign(path, **(original | {"fingerprint": "0" * 16}))
    with pytest.raises(UserError, match=r"has weights \w+, the latents were made with 0{16}"):
        call(inspect_latents, compose_config(f"directory={folder.parent}", name="inspect_latents"))


MOMENTS = ["model.channels=4", "model.num_classes=3", "data.source=null", "optimizer.schedule=constant"]
"""Training overrides for the shards of this file: 50 samples, in shards of 12, 12, 12, 12 and 2."""


def test_training_on_moments_goes_on_after_a_kill(run, tmp_path):
    """SIGKILL with two reading processes, in the third epoch or so; the end equals that of an undisturbed run."""
    data = run("latents", "hflip=true").parent
    overrides = [*MOMENTS, "data.num_workers=2", "callbacks.checkpoint.every_n_steps=1", "trainer.max_steps=60"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    last = broken / "checkpoints" / "last.ckpt"
    process = start(broken, data, *overrides)
    wait_for(lambda: last.exists() or process.poll() is not None)
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 0 < load(broken)["global_step"] < 60
    # with another number of reading processes, which must not matter
    assert start(broken, data, *overrides, "data.num_workers=1").wait() == 0
    whole.mkdir()
    train(compose_config(*TINY, *overrides, f"data.directory={data}", "data.num_workers=0"), whole)
    assert_same_end(whole, broken)
    assert load(whole)["LatentDataModule"]["place"]["epoch"] == 9


def test_two_processes_with_uneven_shards_finish_epochs(run, tmp_path):
    """Twelve steps are two epochs: 48 of 50 samples each. Then one process goes on in the middle of the third."""
    data, folder = run("latents").parent, tmp_path / "ddp"
    both = ["trainer.devices=2", "trainer.strategy=ddp", "data.num_workers=1", "trainer.max_steps=14"]
    end(ranks(2, tmp_path, "train", *TINY, *MOMENTS, *both, f"data.directory={data}", f"run_dir={folder}"))
    readers = {"world_size": 2, "batch_size": 4, "window": 2000}
    assert load(folder)["LatentDataModule"]["place"] == {"epoch": 2, "done": ((readers, 2),)}
    resumed = start(folder, data, *MOMENTS, "trainer.max_steps=17")
    assert resumed.wait() == 0
    assert "Resuming with 1 x 8 samples (shuffle buffer 2000) instead of 2 x 4" in resumed.words
    assert "epoch 2 goes on after 16 of its 50 samples, none of which is seen again" in resumed.words
    alone = {"world_size": 1, "batch_size": 8, "window": 2000}
    assert load(folder)["LatentDataModule"]["place"] == {"epoch": 2, "done": ((readers, 2), (alone, 3))}


def test_damage_in_the_middle_of_training(run, tmp_path, caplog):
    data = run("latents").parent
    place = shards.Layout((8, 8, 8), "float16", False).sample_bytes * 4 + 1024 + 512 + 200
    with (data / "train" / "shard-000002.tar").open("r+b") as file:
        file.seek(place)
        file.write(b"\x00\x01\x02")
    arguments = [*TINY, *MOMENTS, f"data.directory={data}", "trainer.max_steps=12"]
    (tmp_path / "on").mkdir()
    train(compose_config(*arguments), tmp_path / "on")
    complaints = [record.message for record in caplog.records if "left out" in record.message]
    assert len(complaints) == 1  # two epochs, one complaint
    assert "shard-000002.tar, sample 4: key " in complaints[0]
    assert ("train/corrupt_samples" in {name for _, name in logged(tmp_path / "on")}) is True
    (tmp_path / "off").mkdir()
    with pytest.raises(
        UserError, match=r"1 samples in .* could not be read .*corrupt_limit=0.*shard-000002.tar, sample 4: key"
    ):
        train(compose_config(*arguments, "data.corrupt_limit=0"), tmp_path / "off")


def test_inspection_finds_damage(run, tmp_path, capsys):
    folder = run("corrupt")
    place = shards.Layout((8, 8, 8), "float16", False).sample_bytes * 4 + 1024 + 512 + 200
    with (folder / "shard-000002.tar").open("r+b") as file:
        file.seek(place)
        file.write(b"\x00\x01\x02")
    with pytest.raises(UserError, match=r"2 faults.*\n.*shard-000002.tar: the checksum of the file.*\n.*sample 4"):
        call(inspect_latents, compose_config(f"directory={folder.parent}", "images=0", name="inspect_latents"))
    assert "2 faults" in capsys.readouterr().out
