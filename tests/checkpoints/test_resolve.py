"""What names a checkpoint: files, runs, folders, and addresses of a hub that really answers."""

import shutil
from pathlib import Path

import pytest
from support.foreign import diffusers_dit, write_reference
from support.hub import COMMIT, hub_of, offline

from dcdit.checkpoints.load import load_model
from dcdit.checkpoints.resolve import choose_files, resolve_checkpoint
from dcdit.checkpoints.settings import AssumeSettings
from dcdit.errors import UserError

NAME = "hf://amd/DynamicChunkingDiT"


def test_a_run_is_named_by_its_directory_or_by_any_of_its_checkpoints(trained_run):
    last = trained_run / "checkpoints" / "last.ckpt"
    for name in (trained_run, trained_run / "checkpoints", last):
        place = resolve_checkpoint(str(name), "runs")
        assert (place.path.resolve(), place.run, place.home.resolve()) == (last, "trained", trained_run)
    step = next((trained_run / "checkpoints").glob("step_*.ckpt"))
    last.unlink()
    assert resolve_checkpoint(str(trained_run), "runs").path == step
    of_sweep = trained_run.parent / "b_n4_sweep" / "compression_2"
    shutil.copytree(trained_run, of_sweep)
    assert resolve_checkpoint(str(of_sweep), "runs").run == "b_n4/compression_2"


def test_what_is_made_of_other_weights_goes_to_a_directory_of_their_own_among_the_runs(tmp_path):
    path = write_reference(tmp_path / "Downloads" / "S-256.pt")
    home = resolve_checkpoint(str(path), "runs").home
    assert home.parent == Path("runs")
    assert home.name.startswith("S-256-")
    other = write_reference(tmp_path / "Elsewhere" / "S-256.pt")
    assert resolve_checkpoint(str(other), "runs").home != home  # of one name, not of one place
    assert resolve_checkpoint(str(path.parent), "runs").path == path
    assert resolve_checkpoint("digits", "runs").home == Path("runs/pretrained_digits")


def test_a_folder_with_no_checkpoint_or_several_is_refused(tmp_path):
    def refuses(words: str, name: str = "") -> None:
        with pytest.raises(UserError, match=words):
            resolve_checkpoint(name or str(tmp_path), "runs")

    refuses(r"holds no checkpoint \(it holds nothing\)")
    (tmp_path / "notes.txt").touch()
    refuses(r"holds no checkpoint \(it holds notes.txt\)")
    for name in ("a.pt", "b.safetensors"):
        (tmp_path / name).touch()
    refuses(r"holds several checkpoint files: a.pt, b.safetensors; name one")
    refuses("does not exist: .* or hf://amd/DynamicChunkingDiT if it is on the hub", "amd/DynamicChunkingDiT")
    refuses("is no address: write hf://", "hf://amd")
    refuses("is no address", "hf://amd/x@v1/y@v2")
    refuses("is no address", "hf://amd/x/../../etc")
    (tmp_path / "config.json").touch()
    assert choose_files(["config.json", "model.safetensors", "model.fp16.safetensors"], "x")[1][1:] == [
        "model.safetensors"
    ]
    with pytest.raises(UserError, match="there are no weights"):
        choose_files(["config.json", "notes.txt"], "x")


def test_a_hub_that_answers(tmp_path):
    repository, cache = tmp_path / "repository", tmp_path / "cache"
    write_reference(repository / "S-256" / "0700000.pt")
    (repository / "README.md").write_text("weights")
    diffusers_dit().save_pretrained(repository / "XL" / "transformer")
    heads = AssumeSettings(heads=4)
    with hub_of({"amd/DynamicChunkingDiT": repository, "amd/gated": repository}, cache) as hub:
        for address in ("/S-256", "/S-256/0700000.pt", f"/S-256@{COMMIT}", "@v1/S-256"):
            place = resolve_checkpoint(NAME + address, "runs")
            assert place.path.read_bytes() == (repository / "S-256" / "0700000.pt").read_bytes()
            assert cache in place.path.parents
            assert load_model(place, assume=heads).step == 700
        assert place.home == Path("runs/amd_DynamicChunkingDiT_v1_S_256")
        assert load_model(f"{NAME}/XL").network.title == "DiT/2"
        assert not any(name.endswith("README.md") for name in hub.asked)  # nothing but the checkpoint
        refused = {
            f"{NAME}/nothing": "holds no nothing; it holds README.md, S-256, XL",
            NAME: "holds no checkpoint",
            f"{NAME}/S-256@v9": "amd/DynamicChunkingDiT has no revision v9",
            "hf://amd/surprise": "the hub has no amd/surprise, or you may not see it: log in",
        }
        for address, words in refused.items():
            with pytest.raises(UserError, match=words):
                resolve_checkpoint(address, "runs")
        hub.gated.add("amd/gated")
        with pytest.raises(UserError, match="accept their terms"):
            resolve_checkpoint("hf://amd/gated/S-256", "runs")
    with hub_of({}, cache), offline():
        assert load_model(f"{NAME}/S-256", assume=heads).step == 700  # from the cache
        with pytest.raises(UserError, match=r"cannot be reached .*hf download amd/x 'S-256/\*' --local-dir weights`"):
            resolve_checkpoint("hf://amd/x/S-256", "runs")


def test_a_hub_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between its attempts
    with pytest.raises(UserError, match=r"the hub cannot be reached .* copy the folder and give checkpoint=weights/S"):
        resolve_checkpoint(f"{NAME}/S-256", "runs")


def test_an_exported_folder_is_no_run_whatever_it_lies_in(tmp_path):
    """Results about the network that comes along must not be written into this package."""
    from dcdit.checkpoints.resolve import SHIPPED

    assert SHIPPED["digits"].parent.name == "checkpoints"
    assert resolve_checkpoint(str(SHIPPED["digits"]), str(tmp_path)).home.parent == tmp_path
