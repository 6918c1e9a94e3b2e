"""Another normalisation of what is extracted already: manifests alone change, as if it had been extracted so."""

import json
from pathlib import Path

import pytest
from support.configs import TINY, call, compose_config, train
from support.sources import SMALL, as_folders

from dcdit import extract, inspect_latents
from dcdit.data.manifest import Manifest
from dcdit.errors import UserError


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return as_folders(tmp_path_factory.mktemp("images"))


def run(*words: str) -> None:
    call(extract, compose_config(*SMALL, "representation=sample", *words, name="extract"))


def again(out: Path, normalise: str, *words: str) -> None:
    call(extract, compose_config("source=null", f"out={out}", f"normalise={normalise}", *words, name="extract"))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("[!.]*"))}


def test_manifests_are_those_of_extractions_by_the_other_normalisation(images, tmp_path):
    direct = {}
    for by in ("autoencoder", "channel", "element"):
        run(*images, f"out={tmp_path}/{by}", f"normalise={by}")
        direct[by] = content(tmp_path / by / "train")
    out = tmp_path / "autoencoder"
    for by in ("channel", "element", "autoencoder", "element"):
        again(out, by)
        assert content(out / "train") == direct[by], by
        run(*images, f"out={out}", f"normalise={by}")  # which finds that everything is there
    assert len({values["manifest.json"] for values in direct.values()}) == 3
    with pytest.raises(UserError, match=r"finished with element\. .* source=null normalise=channel changes scale and"):
        run(*images, f"out={out}", "normalise=channel")


def test_other_splits_follow_and_runs_of_before_are_refused(images, tmp_path, capsys):
    for split in ("train", "val"):
        run(*images, f"out={tmp_path}/data", f"split={split}")
    arguments = [*TINY, "model.channels=3", "model.num_classes=3", "model.grid=8", "data.source=null"]
    arguments += [f"data.directory={tmp_path}/data", "data.num_workers=0"]
    (tmp_path / "trained").mkdir()
    train(compose_config(*arguments, "trainer.max_steps=1"), tmp_path / "trained")
    again(tmp_path / "data", "channel")
    own, other = (Manifest.read(tmp_path / "data" / split / "manifest.json") for split in ("train", "val"))
    assert len(own.scale) == 3
    assert (other.scale, other.shift, other.normalise) == (own.scale, own.shift, "train")
    run(*images, f"out={tmp_path}/data", "split=val")
    assert "Everything is there already" in capsys.readouterr().out
    call(inspect_latents, compose_config(f"directory={tmp_path}/data", "images=0", name="inspect_latents"))
    with pytest.raises(UserError, match=r"scale is 1 there and [\d.]+ to [\d.]+ \(3 channels\) here"):
        train(compose_config(*arguments, "trainer.max_steps=2", "ckpt_path=last"), tmp_path / "trained")
    with pytest.raises(UserError, match=r"split=val has scale and shift of .*train: renormalise that"):
        again(tmp_path / "data", "element", "split=val")


def test_what_cannot_be_renormalised_stays_as_it_is(images, tmp_path, monkeypatch):
    monkeypatch.setattr(extract, "processes", lambda: (0, 2))
    run(*images, f"out={tmp_path}/half")
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"the extraction there is not finished, the same command goes on"):
        again(tmp_path / "half", "channel")
    with pytest.raises(UserError, match=r"manifest.json does not exist: no shards have been written there"):
        again(tmp_path / "nothing", "channel")
    run(*images, f"out={tmp_path}/out")
    folder = tmp_path / "out" / "train"
    shard = folder / json.loads((folder / "manifest.json").read_text())["shards"][2]["name"]
    damaged = bytearray(shard.read_bytes())
    damaged[2000] ^= 1
    shard.write_bytes(damaged)
    before = content(folder)
    with pytest.raises(UserError, match=r"sample \d: .*: delete shard-000002.tar; the command that wrote it"):
        again(tmp_path / "out", "element")
    shard.unlink()
    with pytest.raises(UserError, match=r"shard-000002.tar is missing: the command that wrote it"):
        again(tmp_path / "out", "element")
    assert content(folder)["manifest.json"] == before["manifest.json"]
