"""Manifests and shards that a disk has damaged, or a stranger has made."""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from support.commands import typed
from support.configs import call, compose_config
from support.damage import damaged, damages, nothing_outside, sign
from support.numbered import flat, stream, write_numbers

from dcdit import inspect_latents
from dcdit.data.arrays import write_shards
from dcdit.data.manifest import Manifest
from dcdit.data.order import Readers
from dcdit.data.storage import Location
from dcdit.errors import TrainingError, UserError


def shard(**changes) -> dict:
    return {"name": "x.tar", "samples": 1, "bytes": 10_000, "sha256": "0" * 64, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shards": [shard(sha256="/tmp/x/evil0")]}, "sha256='/tmp/x/evil0' is not a digest of 64"),
        ({"shards": [shard(sha256="")]}, "sha256='' is not a digest"),
        ({"shards": [shard(name="../x.tar")]}, "name='../x.tar' is not a name of letters"),
        ({"shards": [shard(name="/x.tar")]}, "name='/x.tar' is not a name of letters"),
        ({"shards": [shard(samples=10**12)]}, "too few for its 1000000000000 samples"),
        ({"shards": [shard(extra=1)]}, "extra=1: there is no such key"),
        ({"shards": []}, "asks for nothing"),
        ({"latent_shape": [4]}, "has 1 elements, 3 are needed"),
        ({"latent_shape": [1, 10**9, 1]}, r"latent_shape=1000000000 is outside"),
        ({"latent_shape": [1, 60_000, 60_000]}, "too few for its"),
        ({"scale": float("nan")}, "NaN is not a finite number"),
        ({"scale": 0}, "scale=0 is not positive"),
        ({"scale": "much"}, "scale='much' is not a number"),
        ({"representation": "median"}, "representation='median' is not one of sample, moments"),
        ({"dtype": "object"}, "dtype='object' is not one of float16, float32"),
        ({"classes": []}, "asks for nothing"),
        ({"fingerprint": "../../x"}, "is not a digest of 16"),
        ({"surprise": 1}, "surprise=1: there is no such key"),
        ({"schema_version": 99}, "schema_version=99, this release reads"),
    ],
)
def test_values_that_cannot_be(tmp_path, changes, message):
    write_numbers(tmp_path, [3, 2])
    path = tmp_path / "manifest.json"
    sign(path, **changes)
    with pytest.raises(UserError, match=message) as caught:
        Manifest.read(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("changes", [{"scale": 0.5}, {"representation": "moments"}, {"autoencoder": "other"}])
def test_what_was_edited_by_hand_is_noticed(tmp_path, changes):
    write_numbers(tmp_path, [3, 2])
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match="it was changed after it was written"):
        Manifest.read(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damages)
def test_any_damage_to_a_manifest_is_an_error_or_no_difference(tmp_path_factory, damage):
    folder = tmp_path_factory.mktemp("shards")
    whole = write_numbers(folder, [3, 2]).manifest()
    path = folder / "manifest.json"
    path.write_bytes(damaged(path.read_bytes(), damage))
    with nothing_outside(folder):
        try:
            assert Manifest.read(path) == whole
        except UserError as error:
            assert str(path) in str(error)  # noqa: PT017 - whether it raises depends on the place


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damages)
def test_any_damage_to_a_shard_costs_samples_or_nothing(tmp_path_factory, damage):
    folder = tmp_path_factory.mktemp("shards")
    location = write_numbers(folder, [6])
    manifest = location.manifest()
    path = folder / "shard-000.tar"
    path.write_bytes(damaged(path.read_bytes(), damage))
    batches = list(stream(_Fixed(manifest, str(folder)), Readers(1, 2, 0), epochs=1))
    seen = sorted(flat(batch.stored.flatten().long().tolist() for batch in batches))
    left_out = {corruption.number for batch in batches for corruption in batch.corrupt}
    assert set(seen) | left_out == set(range(6)), "nothing may be missing without a word"
    assert set(seen) <= set(range(6))


class _Fixed(Location):
    """Shards that were whole when the manifest was read."""

    def __init__(self, manifest: Manifest, place: str) -> None:
        super().__init__(place)
        object.__setattr__(self, "_manifest", manifest)

    def manifest(self) -> Manifest:
        return self._manifest


def latents(folder: Path, values: np.ndarray, **changes) -> Path:
    settings = {"classes": ("a", "b"), "autoencoder": "identity", "scale": 1.0, "shift": 0.0, "samples_per_shard": 8}
    for split in ("train", "val"):
        write_shards(folder / split, values, np.arange(len(values)) % 2, **{**settings, **changes})
    return folder


TWO_CLASSES = ("model.num_classes=2", "data.source=null", "model.grid=8")


def normal(count: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, 1, 8, 8)).astype(np.float32)


def test_latents_that_are_not_finite_are_corrupt_samples(tiny, tmp_path):
    values = normal(32)
    values[[3, 17]] = np.nan
    place = latents(tmp_path / "data", values)
    with pytest.raises(UserError, match=r"(?s)2 faults.*its latent is not finite") as caught:
        call(inspect_latents, compose_config(f"directory={place}", f"picture={tmp_path}/x.png", name="inspect_latents"))
    assert "key 00000017" in str(caught.value)
    with pytest.raises(UserError, match=r"could not be read \(data\.corrupt_limit=1\).*its latent is not finite"):
        tiny("run", *TWO_CLASSES, f"data.directory={place}", "trainer.max_steps=8", "data.corrupt_limit=1")


def test_latents_far_from_deviation_one_are_told(tiny, tmp_path, caplog, capsys):
    place = latents(tmp_path / "data", 4 * normal(32))
    tiny("run", *TWO_CLASSES, f"data.directory={place}", "trainer.max_steps=1")
    assert re.search(r"have deviation [34]\.?\d* in channel 0 where", caplog.text)
    call(inspect_latents, compose_config(f"directory={place}", f"picture={tmp_path}/x.png", name="inspect_latents"))
    assert "are scale and" in " ".join(capsys.readouterr().out.split())
    usual = latents(tmp_path / "usual", normal(32))
    caplog.clear()
    tiny("other", *TWO_CLASSES, f"data.directory={usual}", "trainer.max_steps=1")
    assert "deviation" not in caplog.text


def test_a_run_without_a_finite_step_is_no_finished_run(tiny, tmp_path):
    place = latents(tmp_path / "data", np.full((32, 1, 8, 8), 3e30, np.float32))
    with pytest.raises(TrainingError, match="None of the last 4 steps had finite gradients, at step 4"):
        tiny("run", *TWO_CLASSES, f"data.directory={place}", "trainer.max_steps=4", "nonfinite_limit=100")
    assert not list((tmp_path / "run" / "checkpoints").glob("*.ckpt"))


def test_a_small_validation_split_names_the_remedy_that_works(tmp_path):
    from types import SimpleNamespace

    from dcdit.data.datamodule import LatentDataModule

    place = latents(tmp_path / "data", normal(48))
    shutil.rmtree(place / "val")
    write_shards(
        place / "val", normal(2), np.zeros(2, int), classes=("a", "b"), autoencoder="identity", scale=1.0, shift=0.0,
        samples_per_shard=2,
    )  # fmt: skip
    data = LatentDataModule(str(place), 48, 0, 0, 0, None, None, None, 0, None, 1.0, False, None)
    data.trainer = SimpleNamespace(world_size=3, accumulate_grad_batches=1, global_rank=0)
    with pytest.raises(UserError, match=r"has 2 samples for 3 processes: add some, take fewer processes"):
        data.val_dataloader()


def test_the_command_that_an_inspection_prints_trains(tmp_path, capsys):
    place = latents(tmp_path / "my data, (1)", normal(32))
    printed = typed(capsys, tmp_path, "inspect_latents", f"directory={place}", "images=0").out
    command = next(line for line in printed.splitlines() if line.startswith("To train on them: "))
    program, *words = shlex.split(command.removeprefix("To train on them: python -m ").partition("   (")[0])
    small = [
        "trainer=cpu",
        "model.width=32",
        "model.depth=1",
        "model.heads=2",
        "model.encoder_width=16",
        "model.groups=8",
    ]
    small += ["data.num_workers=0", "data.batch_size=8", "trainer.max_steps=1", "callbacks.progress=null"]
    result = typed(capsys, tmp_path, program.removeprefix("dcdit."), *words, *small)
    assert result.status == 0, result.words
    assert "Finished at step 1" in result.words


def test_the_weights_of_moments_stay_finite():
    from dcdit.data.autoencoder import to_uint8

    with pytest.raises(UserError, match="a decoded image is not finite") as caught:
        to_uint8(torch.tensor([[0.0], [float("nan")], [float("inf")]]))
    assert caught.value.row == 1
