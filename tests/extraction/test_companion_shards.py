"""What extraction writes beside the latents: pixels, or the features of an encoder."""

import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from support.configs import TINY, call, compose_config, train
from support.runs import assert_same_end, load

from dcdit import extract, inspect_latents
from dcdit.checkpoints.encoder import EncoderKeys, load_encoder
from dcdit.data.companions import CompanionReader
from dcdit.data.manifest import Manifest
from dcdit.data.order import Readers
from dcdit.data.storage import Location
from dcdit.data.stream import LatentStream
from dcdit.errors import UserError
from dcdit.extraction.decode import decode_image

FEATURES = ("companion=features", "encoder=test_vit", "encoder_weights=random", "encoder_grid=2")
ALIGNED = ("alignment=repa", "alignment.encoder=test_vit", "alignment.weights=random", "alignment.grid=2")
KINDS = {"pixels": ("companion=pixels",), "features": FEATURES}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Smooth images of two classes, brighter on one side."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(22):
        folder = root / f"class_{number % 2}"
        folder.mkdir(exist_ok=True)
        coarse = Image.fromarray(rng.integers(256, size=(3, 3, 3), dtype=np.uint8))
        coarse.resize((40, 32), Image.Resampling.BICUBIC).save(folder / f"{number:03d}.png")
    return root


@pytest.fixture
def run(images, tiny_vae, tmp_path):
    """Extract with a tiny autoencoder, flipped images too; returns the folder of the split."""

    def extract_to(out: str, *overrides: str):
        arguments = (
            *(f"source={images}", f"out={tmp_path / out}", f"autoencoder={tiny_vae}", "image_size=32", "hflip=true"),
            *("samples_per_shard=8", "batch_size=5", "num_workers=0"),
        )
        call(extract, compose_config(*arguments, *overrides, name="extract"))
        return tmp_path / out / "train"

    return extract_to


def content(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("[!.]*"))}


@pytest.mark.parametrize("kind", KINDS)
def test_after_any_loss_the_bytes_are_the_same(kind, run, monkeypatch):
    whole = content(run("whole", *KINDS[kind]))
    assert {name for name in whole if kind in name} == {f"shard-{number:06d}.{kind}.tar" for number in range(3)}
    for rank in (1, 0):
        monkeypatch.setattr(extract, "processes", lambda rank=rank: (rank, 2))
        folder = run("two", *KINDS[kind])
    monkeypatch.undo()
    assert content(folder) == whole
    (folder / f"shard-000000.{kind}.tar").unlink()
    (folder / f"shard-000001.{kind}.tar").write_bytes(whole[f"shard-000001.{kind}.tar"][:-2000])
    (folder / "shard-000002.tar").unlink()
    run("two", *KINDS[kind])
    assert content(folder) == whole
    plain = content(run("plain"))
    assert all(whole[name] == plain[name] for name in plain if name.endswith(".tar"))  # the latents know nothing of it
    with pytest.raises(UserError, match=r"companion=None, but the extraction there was begun with"):
        run("two")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_stored_is_what_the_autoencoder_saw_flips_too(kind, run, images):
    folder = run("out", *KINDS[kind])
    manifest, location = Manifest.read(folder / "manifest.json"), Location(str(folder))
    encoder = load_encoder("test_vit", "random", 2, EncoderKeys("encoder", "encoder_weights", "encoder_grid"))
    if kind == "features":
        assert manifest.companion.encoder == encoder.identity
        assert manifest.companion.shape == (encoder.channels, 2, 2)
    by_source = {str(path.relative_to(images)): decode_image(path.read_bytes(), 32) for path in images.glob("*/*.png")}
    reader = CompanionReader(location, manifest.companion, hflip=True)
    for number, shard in enumerate(manifest.shards):
        with tarfile.open(folder / shard.name) as tar:
            notes = [json.load(tar.extractfile(member)) for member in tar if member.name.endswith(".json")]
        for index, note in enumerate(notes):
            pixels = torch.from_numpy(by_source[note["source"]].copy()).permute(2, 0, 1)[None]
            for hflip, view in ((False, pixels), (True, pixels.flip(-1))):
                out = np.empty(manifest.companion.shape, reader.dtype)
                reader.read(number, index, hflip, note["label"], out)
                expected = view if kind == "pixels" else encoder(view / 255)
                found = torch.from_numpy(out).float()
                tolerance = 8 if kind == "pixels" else 2e-2
                assert (found - expected[0].float()).abs().mean() < tolerance


def test_a_run_reads_pixels_or_features_alike(run, tmp_path):
    """Pixels lose a little in the JPEG; features are those of the original."""
    network = ("model.channels=4", "model.num_classes=2", "data.source=null", "trainer.max_steps=2", *ALIGNED)
    runs = {}
    for kind, words in KINDS.items():
        folder = run(kind, *words).parent
        runs[kind] = tmp_path / f"run_{kind}"
        source = "computed" if kind == "pixels" else "stored"
        train(compose_config(*TINY, f"data.directory={folder}", *network, f"alignment.features={source}"), runs[kind])
    rows = {kind: (path / "logs" / "version_0" / "metrics.csv").read_text().splitlines() for kind, path in runs.items()}
    column = {kind: lines[0].split(",").index("train/alignment_loss") for kind, lines in rows.items()}
    pixels, features = (float(rows[kind][1].split(",")[column[kind]]) for kind in KINDS)
    assert pixels == pytest.approx(features, abs=0.05)
    assert pixels != features
    # the first step's latents and noise are the same
    column = {kind: lines[0].split(",").index("train/mse") for kind, lines in rows.items()}
    assert rows["pixels"][1].split(",")[column["pixels"]] == rows["features"][1].split(",")[column["features"]]

    resumed = tmp_path / "resumed"
    words = (*TINY, f"data.directory={tmp_path / 'features'}", *network, "alignment.features=stored")
    constant = "optimizer.schedule=constant"
    train(compose_config(*words, constant, "trainer.max_steps=1"), resumed)
    train(compose_config(*words, constant, "ckpt_path=last"), resumed)
    train(compose_config(*words, constant), tmp_path / "whole")
    assert_same_end(resumed, tmp_path / "whole")
    assert load(resumed)["global_step"] == 2


def test_shards_that_do_not_hold_what_is_needed(run, tmp_path):
    folder = run("features", *FEATURES).parent
    words = (*TINY, f"data.directory={folder}", "model.channels=4", "model.num_classes=2", "data.source=null", *ALIGNED)

    def refuses(message, *overrides):
        with pytest.raises(UserError, match=message):
            train(compose_config(*words, *overrides), tmp_path / "run")

    refuses(r"alignment.features=computed needs pixels .* holds features: set alignment.features=stored")
    stored = "alignment.features=stored"
    refuses(r"alignment.grid=4, but the shards hold features of 2 x 2", stored, "alignment.grid=4")
    refuses("but the shards hold features of 'test_vit'", stored, "alignment.encoder=vit_tiny_patch16_224")
    refuses(r"weights='auto' are those of timm, .* weights [0-9a-f]+ \(random\)", stored, "alignment.weights=auto")
    (folder / "train" / "shard-000001.features.tar").unlink()
    refuses("shard-000001.features.tar is missing", stored)


@pytest.mark.parametrize("kind", KINDS)
def test_inspection_reads_companions_too(kind, run, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = run("out", *KINDS[kind])
    call(inspect_latents, compose_config(f"directory={folder.parent}", name="inspect_latents"))
    assert ("pixels, 32 x 32" if kind == "pixels" else "features, 64 x 2 x 2, of test_vit") in capsys.readouterr().out
    path = folder / f"shard-000001.{kind}.tar"
    broken = bytearray(path.read_bytes())
    broken[512 + 300] ^= 255
    path.write_bytes(broken)
    with pytest.raises((UserError, SystemExit)):
        call(inspect_latents, compose_config(f"directory={folder.parent}", name="inspect_latents"))
    location = Location(str(folder))
    manifest = location.manifest()
    found = list(LatentStream(location, manifest, Readers(1, 22, 0), epochs=8, companion=manifest.companion))
    assert {(each.shard, each.number) for batch in found for each in batch.corrupt} == {("shard-000001.tar", 0)}
    assert all(len(batch.companion) == len(batch.stored) == 22 - len(batch.corrupt) for batch in found)
