"""Weights of any origin, as users take them: into every command, and out again."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.commands import Result, typed
from support.configs import MODERN
from support.damage import sign
from support.foreign import write_reference
from support.hub import Hub, hub_of

from dcdit import DCDiT, DiT
from dcdit.checkpoints.load import load_model
from dcdit.checkpoints.resolve import resolve_checkpoint
from dcdit.checkpoints.settings import AssumeSettings
from dcdit.checks import shown
from dcdit.data.arrays import write_shards
from dcdit.network.interface import Network

HEADS = "assume.heads=4"
QUICK = ("sampler.steps=2", "seed=1")


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    """A repository with a checkpoint in the reference's form."""
    folder = tmp_path_factory.mktemp("repository")
    write_reference(folder / "S-256" / "0700000.pt")
    return folder


def ended(result: Result) -> Result:
    assert result.status == 0, result.words
    return result


@pytest.mark.parametrize("named_by", ["file", "folder", "hub"])
def test_weights_of_the_reference_in_every_command(reference, tiny_vae, tmp_path, capsys, named_by):
    name = {"file": f"{reference}/S-256/0700000.pt", "folder": f"{reference}/S-256", "hub": "hf://amd/small/S-256"}
    about = (f"checkpoint={name[named_by]}", HEADS, f"autoencoder={tiny_vae}")
    own = resolve_checkpoint(name["file"], "runs").run
    home = tmp_path / "runs" / {"file": own, "folder": own, "hub": "amd_small_S_256"}[named_by]

    def run(command: str, *words: str) -> Result:
        return ended(typed(capsys, tmp_path, command, *words))

    with hub_of({"amd/small": reference}, tmp_path / "cache"):
        said = run("sample", *about, *QUICK, "classes=[0,3]", "per_class=2").words
        assert "reference DC-DiT checkpoint, DC-DiT with 0.8M parameters, step 700, EMA weights, cpu fp32" in said
        assert {path.name for path in (home / "samples").iterdir()} == {"samples.png", "boundaries.png", "latents.npz"}
        run("generate", *about, *QUICK, "out=images", "count=4", "budget.fraction=0.9")
        with np.load(tmp_path / "images" / "samples.npz") as images:
            assert images["arr_0"].shape == (4, 32, 32, 3)
        assert (home / "budgets.json").exists()
        np.savez(tmp_path / "real.npz", arr_0=np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), np.uint8))
        features = ("features=digits", "count=4", "metrics=[kid]", "time_rounds=1", "cache=statistics")
        run("evaluate", *about, *QUICK, "reference=real.npz", "drop_fractions=[0,0.5]", *features)
        assert len(list((home / "evaluation").glob("*.json"))) == 2
        run("report", str(home))
        assert "amd_small_S_256" in (tmp_path / "report" / "report.html").read_text() or named_by != "hub"
        assert "residual projection" in run("flops", about[0], HEADS, "compression=4").out
        write_shards(
            tmp_path / "latents" / "train",
            np.random.default_rng(0).standard_normal((16, 4, 8, 8)).astype(np.float16),
            np.arange(16) % 4,
            classes=("a", "b", "c", "d"),
            autoencoder="stabilityai/sd-vae-ft-ema",
            scale=0.18215,
            shift=0.0,
            samples_per_shard=8,
        )
        sizes = {"grid": 8, "num_classes": 4, "width": 128, "depth": 1, "heads": 4, "encoder_width": 64}
        said = run(
            "train",
            *(f"model.{key}={value}" for key, value in sizes.items()),
            *(
                "data.directory=latents",
                "data.batch_size=8",
                "data.num_workers=0",
                "trainer=cpu",
                "trainer.max_steps=2",
            ),
            *("init=weights", about[0].replace("checkpoint", "init.checkpoint"), "init.assume.heads=4"),
            *("run_name=tuned", "optimizer.lr=1e-9", "callbacks.progress=null"),
        ).words
        assert "parameters taken over" in said
        assert "new:" not in said
        tuned, before = load_model(tmp_path / "runs" / "tuned"), load_file_of(reference)
        assert (tuned.network.residual.weight - before["hnet.residual_proj.weight"]).abs().max() < 1e-6


def test_without_an_autoencoder_latents_of_four_channels_are_shown(reference, tmp_path, capsys):
    about = (f"checkpoint={reference}/S-256", HEADS, *QUICK, "autoencoder=identity")
    said = ended(typed(capsys, tmp_path, "sample", *about, "classes=[0]", "per_class=1", "out=pictures"))
    assert "latents of stabilityai/sd-vae-ft-ema are no pictures" in said.words
    assert "diffusion=ddpm is taken" in said.words
    assert (tmp_path / "pictures" / "samples.png").exists()
    ended(typed(capsys, tmp_path, "generate", *about, "out=images", "count=2"))
    with np.load(tmp_path / "images" / "samples.npz") as images:
        assert images["arr_0"].shape == (2, 8, 8, 3)
    for wrong, message in (
        ("device=meta", "device='meta' computes nothing here"),
        ("assume.num_classes=5 guidance.scale=2", "trained without a null class"),
    ):
        refused = typed(capsys, tmp_path, "sample", *about, *wrong.split(), "out=none")
        assert (refused.status, message in refused.words) == (2, True), refused.words
        assert not (tmp_path / "none").exists()


def load_file_of(reference: Path) -> dict[str, torch.Tensor]:
    return load_file(Path(__file__).parents[1] / "golden" / "mini" / "state.safetensors")


@torch.no_grad()
def test_what_is_exported_is_loaded_bit_for_bit(trained_run, tmp_path, capsys):
    said = ended(typed(capsys, tmp_path, "export", f"checkpoint={trained_run}", "out=handed on", "license=mit"))
    folder = tmp_path / "handed on"
    assert {path.name for path in folder.iterdir()} == {
        *("model.safetensors", "config.json", "README.md", "model_index.json", "pipeline.py", "transformer")
    }
    assert "checkpoint of dcdit.train, DC-DiT with 0.1M parameters, step 3, EMA weights" in said.words
    before = load_model(trained_run)
    networks = [load_model(folder).network, DCDiT.from_pretrained(folder), Network.from_pretrained(str(folder))]
    for network in networks:
        torch.testing.assert_close(network.state_dict(), before.network.state_dict(), rtol=0, atol=0)
        assert not network.training
    after = load_model(folder)
    assert (after.latents, after.step, after.training) == (before.latents, before.step, before.training)
    folders = []
    for name, checkpoint in (("one", trained_run), ("two", folder)):
        folders.append(tmp_path / name)
        ended(typed(capsys, tmp_path, "sample", f"checkpoint={checkpoint}", *QUICK, f"out={name}", "per_class=1"))
    one, two = (np.load(each / "latents.npz")["latents"] for each in folders)
    assert np.array_equal(one, two)
    card = (folder / "README.md").read_text()
    for word in ("license: mit", "library_name: dcdit", "DCDiT.from_pretrained", "images themselves", "after 3 steps"):
        assert word in card
    config = json.loads((folder / "config.json").read_text())
    assert config["network"]["name"] == "dcdit"
    assert config["diffusion"]["prediction"] == "noise"
    assert str(tmp_path) not in card + json.dumps(config)


def test_figures_that_were_measured_go_along(trained_run, digits, tmp_path, capsys):
    place = f"checkpoint={trained_run}"
    options = (
        "features=digits",
        "count=40",
        "metrics=[fid]",
        "time_rounds=0",
        "cache=cache",
        f"reference={digits}/val",
    )
    ended(typed(capsys, tmp_path, "evaluate", place, *QUICK, *options, "drop_fractions=[0,0.5]"))
    ended(typed(capsys, tmp_path, "export", place, "out=x", "note=Made for a test."))
    figures = json.loads((tmp_path / "x" / "config.json").read_text())["figures"]
    assert [each["drop_fraction"] for each in figures] == [0.0, 0.5]
    card = (tmp_path / "x" / "README.md").read_text()
    assert "| drop_fraction | " in card
    assert "Made for a test." in card
    ended(typed(capsys, tmp_path, "export", place, "out=raw", "weights=raw"))
    assert json.loads((tmp_path / "raw" / "config.json").read_text())["figures"] == []


def test_half_precision_and_a_library_user_who_saves(trained_run, tmp_path, capsys):
    ended(typed(capsys, tmp_path, "export", f"checkpoint={trained_run}", "out=half", "dtype=fp16"))
    ended(typed(capsys, tmp_path, "export", f"checkpoint={trained_run}", "out=whole"))
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("half", "whole")]
    assert sizes[0] < 0.6 * sizes[1]
    halved = load_model(tmp_path / "half").network
    assert all(parameter.dtype == torch.float32 for parameter in halved.parameters())
    network = DCDiT(8, 1, 3, width=32, depth=1, heads=2, encoder_width=16, groups=8, smoothing_sigma=None)
    network.save_pretrained(tmp_path / "own")
    again = DCDiT.from_pretrained(tmp_path / "own")
    assert again.spec == network.spec
    torch.testing.assert_close(again.state_dict(), network.state_dict(), rtol=0, atol=0)
    with pytest.raises(ValueError, match="from_pretrained: width: the folder says"):
        DCDiT.from_pretrained(tmp_path / "own", width=64)
    with pytest.raises(ValueError, match="holds a DC-DiT: load it with DCDiT"):
        DiT.from_pretrained(tmp_path / "own")
    with pytest.raises(ValueError, match=r"does not say what its latents are, .* give assume.autoencoder"):
        load_model(tmp_path / "own")
    said = ended(typed(capsys, tmp_path, "sample", "checkpoint=own", "assume.autoencoder=identity", *QUICK))
    assert "diffusion=ddpm is taken, as published" in said.words
    for process in ("ddpm", "flow"):
        assume = AssumeSettings(autoencoder="identity", diffusion=process)
        assert load_model(tmp_path / "own", assume=assume).process.settings.name == process
    with pytest.raises(ValueError, match=r"assume.diffusion=flow_sit: .* take one of ddpm, flow"):
        load_model(tmp_path / "own", assume=AssumeSettings(autoencoder="identity", diffusion="flow_sit"))


def test_a_file_for_the_reference_implementation_and_back(reference, trained_run, tmp_path, capsys):
    ended(typed(capsys, tmp_path, "export", f"checkpoint={reference}/S-256", HEADS, "out=back.pt", "format=reference"))
    state = torch.load(tmp_path / "back.pt", weights_only=True)["ema"]
    golden = load_file_of(reference)
    assert state.keys() == golden.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, golden[name].float(), rtol=0, atol=1e-6 if name == "pos_embed" else 0)
    refused = typed(capsys, tmp_path, "export", f"checkpoint={trained_run}", "out=own.pt", "format=reference")
    assert "model.groups=8, the reference implementation has 32" in refused.words
    refused = typed(capsys, tmp_path, "export", f"checkpoint={trained_run}", "out=x", "format=reference", "dtype=fp16")
    assert "dtype=fp16 is for format=dcdit" in refused.words
    odd = DCDiT(8, 1, 3, width=64, depth=1, heads=2, encoder_width=64, condition_norm=True)
    odd.save_pretrained(tmp_path / "odd")
    refused = typed(capsys, tmp_path, "export", "checkpoint=odd", "out=odd.pt", "format=reference")
    assert (refused.status, "no counterpart of condition_norm.weight" in refused.words) == (2, True)
    for key, value in {**MODERN, "gates": True}.items():
        odd = DCDiT(8, 1, 3, width=64, depth=1, heads=2, encoder_width=64, **{key: value})
        odd.save_pretrained(tmp_path / key)
        assert DCDiT.from_pretrained(tmp_path / key).spec == odd.spec
        refused = typed(capsys, tmp_path, "export", f"checkpoint={key}", f"out={key}.pt", "format=reference")
        message = f"model.{key}={shown(value)}, the reference implementation has"
        assert (refused.status, message in refused.words) == (2, True), refused.words


def test_folders_that_are_not_whole_are_refused(trained_run, tmp_path, capsys):
    ended(typed(capsys, tmp_path, "export", f"checkpoint={trained_run}", "out=whole"))

    def refused(change, words: str) -> None:
        folder = tmp_path / "changed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "whole", folder)
        change(folder)
        result = typed(capsys, tmp_path, "sample", "checkpoint=changed", *QUICK)
        assert (result.status, words in result.words) == (2, True), result.words

    def edit(**changes):
        def change(folder: Path) -> None:
            sign(folder / "config.json", **changes)

        return change

    def unsigned(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(file.read_text().replace('"smoothing_sigma": 1.0', '"smoothing_sigma": 3.0'))

    def cut(folder: Path) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-10])

    refused(cut, "its digest is not the one in config.json")
    refused(unsigned, "is not as it was written, its digest differs")
    refused(lambda folder: (folder / "model.safetensors").unlink(), "there are no weights")
    refused(edit(sha256="../../x"), "sha256='../../x' is not a digest")
    refused(lambda folder: (folder / "config.json").write_text("{"), "it is no JSON")
    refused(edit(network={"name": "os.system"}), "name='os.system' is not one of")
    refused(edit(network=None), "network=null is no section")
    refused(edit(step=-1), "step=-1")
    refused(edit(weights="best"), "weights='best' is not one of")
    refused(edit(latents={"shape": [1, 8, 8]}), "latents.autoencoder is not set")
    spec = json.loads((tmp_path / "whole" / "config.json").read_text())["network"]
    refused(edit(network={**spec, "width": 64}), "has shape")
    refused(edit(network={**spec, "grid": 60_000}), "grid=60000 is outside [1, 512]")
    refused(edit(network={**spec, "grid": 512, "width": 65_536, "heads": 1}), "has shape")


def folder_contents(folder: Path) -> dict[str, bytes]:
    """The files in and below a folder, by their names there."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_from_a_run_to_the_hub_and_back(trained_run, tmp_path, capsys):
    with hub_of({}, tmp_path / "cache") as hub:
        hub.new = tmp_path / "hub"
        words = (f"checkpoint={trained_run}", "out=x", "push=me/mine")
        assert "me/mine: " in ended(typed(capsys, tmp_path, "export", *words)).out
        sent, kept = (folder_contents(folder) for folder in (tmp_path / "hub" / "me" / "mine", tmp_path / "x"))
        assert sent == kept
        assert {"model.safetensors", "config.json", "README.md", "pipeline.py"} < set(sent)
        found = load_model("hf://me/mine")
        assert found.step == 3
        again = DCDiT.from_pretrained(str(tmp_path / "x"))
        torch.testing.assert_close(found.network.state_dict(), again.state_dict(), rtol=0, atol=0)
        again.push_to_hub("me/alone")
        assert (tmp_path / "hub" / "me" / "alone" / "model.safetensors").exists()


def test_an_upload_that_broke_off_goes_on_with_the_same_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub._upload_pipeline.REGULAR_CONTENT_BYTES_BUDGET", 1)  # a file a commit
    command = ("export", "checkpoint=digits", "out=x", "push=me/mine")
    with hub_of({}, tmp_path / "cache") as hub:
        hub.new, hub.commits = tmp_path / "hub", 3
        broken = typed(capsys, tmp_path, *command)
        assert (broken.status, "or the same command again, which sends" in broken.words) == (2, True), broken.words
        first, hub.commits, hub.received = hub.received, -1, []
        assert ended(typed(capsys, tmp_path, *command)).status == 0
        names = folder_contents(tmp_path / "x")
        assert len(first) == 3
        assert sorted(first + hub.received) == sorted(names)  # each file was sent once
        assert folder_contents(tmp_path / "hub" / "me" / "mine") == names


@pytest.mark.parametrize("answer", [(401, b""), (200, b"<html>"), (200, b"{}"), (200, b"[]")])
def test_a_hub_that_refuses_leaves_the_folder(tmp_path, capsys, monkeypatch, answer):
    def accept(hub, request) -> None:
        request.rfile.read(int(request.headers["Content-Length"]))
        hub.send(request, *answer, {"Content-Type": "application/json"}, True)

    monkeypatch.setattr(Hub, "accept", accept)
    with hub_of({}, tmp_path / "cache"):
        result = typed(capsys, tmp_path, "export", "checkpoint=digits", "out=my folder", "push=me/mine")
    assert (result.status, "The folder my folder is complete" in result.words) == (2, True), result.words
    assert "`hf upload me/mine 'my folder'`" in result.words
    assert (tmp_path / "my folder" / "model.safetensors").exists()
