"""Checkpoints that a disk has damaged, or a stranger has made."""

import io
import os
import pickle
import shutil
import time
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.configs import TINY, call, compose_config, train
from support.damage import damaged, damages, nothing_outside, repack, rewrite
from support.runs import differences, load

from dcdit import evaluate
from dcdit.checkpoints.export import Card, write_exported
from dcdit.checkpoints.load import load_model, read_trained, read_weights
from dcdit.checkpoints.read import read_checkpoint
from dcdit.checkpoints.resolve import resolve_checkpoint
from dcdit.errors import UserError
from dcdit.runs.state import RunState


@pytest.fixture
def last(trained_run) -> Path:
    return trained_run / "checkpoints" / "last.ckpt"


def content(folder: Path) -> dict[str, bytes]:
    """All files below a folder, but for locks."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".lock"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def go_on(run: Path, digits: Path, *overrides: str) -> None:
    given = (f"ckpt_path={run}/checkpoints/last.ckpt", "trainer.max_steps=5", *overrides)
    train(compose_config(*TINY, f"data.directory={digits}", *given), run)


def test_paths_in_a_checkpoint_are_not_used(last, digits, tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "precious").write_text("thesis")
    state = {"dirpath": None, "last_model_path": f"local://{victim}", "best_model_path": str(victim)}
    names = ("Checkpoint", "ModelCheckpoint{'monitor': None}", "Checkpoint{'every_n_train_steps': 1}")
    rewrite(last, lambda values: values.update(callbacks=dict.fromkeys(names, state)))
    run = last.parents[1]
    with nothing_outside(run, digits):
        go_on(run, digits)
    assert load(run)["global_step"] == 5
    assert (victim / "precious").read_text() == "thesis"


def test_text_where_a_number_belongs_becomes_no_path(last, digits, tmp_path):
    rewrite(last, lambda values: values.update(global_step="/../../X/x"))
    with nothing_outside(tmp_path), pytest.raises(UserError, match=r"global_step='/\.\./\.\./X/x' is not a whole"):
        call(
            evaluate,
            compose_config(
                f"checkpoint={last}", f"reference={digits}/val", "features=digits", "count=4", name="evaluate"
            ),
        )
    assert not (tmp_path / "X").exists()


def poison(values: dict) -> None:
    values["state_dict"]["network.embed.weight"].view(-1)[3] = float("nan")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (poison, r"state_dict\.network\.embed\.weight is not finite"),
        (lambda v: v.pop("state_dict"), "lacks 'state_dict'"),
        (lambda v: v.update(global_step=-1), r"global_step=-1 is negative"),
        (lambda v: v.update(global_step=10**12), r"global_step=1000000000000 is outside"),
        (lambda v: v["hyper_parameters"]["model"].update(depth=10**6), r"depth=1000000 is outside"),
        (lambda v: v["hyper_parameters"]["model"].update(width=2**16), r"has shape \[.*\], the network that is"),
        (lambda v: v["hyper_parameters"]["model"].update(name="os.system"), r"model\.name='os\.system' is not one of"),
        (lambda v: v["hyper_parameters"]["latents"].update(scale=float("nan")), "scale=nan is not a finite number"),
        (lambda v: v["hyper_parameters"]["latents"].update(shape=[1, 10**9, 8]), "shape=1000000000 is outside"),
        (lambda v: v.update(state_dict={"network.x": "text"}), "is no Tensor"),
        (lambda v: v.update(state_dict={"network.x": torch.zeros(1).expand(10**12)}), "elements, which are not there"),
    ],
)
def test_values_that_cannot_be(last, change, message):
    rewrite(last, change)
    begin = time.monotonic()
    with pytest.raises(UserError, match=message):
        load_model(str(last))
    assert time.monotonic() - begin < 5


def test_archives_that_are_larger_than_they_are(last, tmp_path):
    big = tmp_path / "big.ckpt"
    torch.save({"state_dict": {"network.x": torch.zeros(50_000_000)}}, big)
    repack(big, lambda members: None, zipfile.ZIP_DEFLATED)
    assert big.stat().st_size < 1_000_000
    with pytest.raises(UserError, match=r"it is compressed, which torch\.save never does"):
        read_checkpoint(big)

    def more_elements(members: dict) -> None:
        name = next(name for name in members if name.endswith("data.pkl"))
        # the number of elements of the only tensor, in the pickle: 12 becomes 4 million
        assert members[name].count(b"K\x0ct") == 1
        members[name] = members[name].replace(b"K\x0ct", b"J\x00\x09\x3d\x00t")

    small = tmp_path / "small.ckpt"
    torch.save({"x": torch.arange(12.0)}, small)
    repack(small, more_elements)
    with pytest.raises(UserError, match="a tensor asks for 4000000 elements that the file does not hold"):
        read_checkpoint(small)


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


@pytest.mark.parametrize("zipped", [True, False])
def test_no_pickle_runs(tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "evil.ckpt"
    if zipped:
        torch.save({"state_dict": Evil()}, file)
        with pytest.raises(UserError):
            load_model(str(file))
    else:
        file.write_bytes(pickle.dumps({"state_dict": Evil()}))
        for legacy in (False, True):
            with pytest.raises(UserError):
                read_checkpoint(file, legacy)
    assert not (tmp_path / "evil").exists()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damages)
def test_any_damage_is_an_error_or_no_difference(three_steps, tmp_path, damage):
    whole = three_steps / "checkpoints" / "last.ckpt"
    file = tmp_path / "x.ckpt"
    file.write_bytes(damaged(whole.read_bytes(), damage))
    with nothing_outside(tmp_path):
        try:
            found = read_trained(file).values
        except UserError as error:
            assert str(file) in str(error)  # noqa: PT017 - whether it raises depends on the place
        else:
            assert differences(dict(found), load(three_steps)) == []


@pytest.fixture(scope="module")
def exported(three_steps, tmp_path_factory):
    """The folder that ``dcdit export`` writes of a small network."""
    out = tmp_path_factory.mktemp("exported") / "network"
    found = read_weights(resolve_checkpoint(str(three_steps), "runs"))
    write_exported(out, found, "ema", "fp32", Card(None, None, "", []))
    return out


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damages, st.sampled_from(["config.json", "model.safetensors"]))
def test_any_damage_of_an_exported_folder_is_an_error_or_no_difference(exported, tmp_path, damage, name):
    whole = read_weights(resolve_checkpoint(str(exported), "runs"))
    folder = tmp_path / "network"
    shutil.copytree(exported, folder, dirs_exist_ok=True)
    (folder / name).write_bytes(damaged((exported / name).read_bytes(), damage))
    with nothing_outside(tmp_path):
        try:
            found = read_weights(resolve_checkpoint(str(folder), "runs"))
        except UserError as error:
            assert str(folder) in str(error)  # noqa: PT017 - whether it raises depends on the place
        else:
            assert (found.model, found.latents, found.step, found.training) == (
                *(whole.model, whole.latents, whole.step, whole.training),
            )
            assert differences(dict(found.ema), dict(whole.ema)) == []


SPOILED = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-2000]),
    "flipped": lambda path: path.write_bytes(damaged(path.read_bytes(), ("flip", 0.5, 3))),
    "gone": lambda path: None,
}


@pytest.mark.parametrize("way", SPOILED)
@pytest.mark.parametrize("ckpt_path", ["auto", "last"])
def test_the_newest_whole_checkpoint_is_gone_on_from(tiny, tmp_path, caplog, way, ckpt_path):
    often = ("callbacks.checkpoint.every_n_steps=2", "callbacks.checkpoint.keep=null")
    whole, run = tiny("whole", *often, "trainer.max_steps=5"), tmp_path / "run"
    shutil.copytree(whole, run)
    newest = [run / "checkpoints" / name for name in ("last.ckpt", "step_00000005.ckpt")]
    for path in newest:
        path.unlink()
        if way != "gone":
            shutil.copy(whole / "checkpoints" / path.name, path)
            SPOILED[way](path)
    RunState.read(run)
    caplog.clear()
    tiny("run", *often, "trainer.max_steps=7", f"ckpt_path={ckpt_path}")
    words = caplog.text
    assert "on from step 4" in words
    assert ("step_00000004.ckpt, step 4" in words) == (way != "gone")
    other = tiny("other", *often, "trainer.max_steps=7")
    assert differences(load(run)["state_dict"], load(other)["state_dict"]) == []


def test_if_none_is_whole_nothing_is_begun_anew(tiny, tmp_path):
    run = tiny("run", "trainer.max_steps=2")
    for path in (run / "checkpoints").iterdir():
        path.unlink()
        path.write_bytes(b"")
    before = content(run)
    for ckpt_path in ("auto", "last"):
        with pytest.raises(UserError, match=r"none of the 2 checkpoints in .* is whole"):
            tiny("run", "trainer.max_steps=4", f"ckpt_path={ckpt_path}")
    named = run / "checkpoints" / "step_00000002.ckpt"
    with pytest.raises(UserError, match=r"checkpoint .*step_00000002\.ckpt cannot be read safely"):
        tiny("run", "trainer.max_steps=4", f"ckpt_path={named}")
    with pytest.raises(UserError, match="already holds a run"):
        tiny("run", "trainer.max_steps=4")
    assert content(run) == before


def test_a_checkpoint_that_contradicts_itself_is_refused(tiny, tmp_path):
    run = tiny("run", "trainer.max_steps=2")
    last = run / "checkpoints" / "last.ckpt"
    whole = last.read_bytes()
    for change, message in (
        (lambda v: v["LatentDataModule"].update(step=1), "stands at step 1"),
        (lambda v: v["LatentDataModule"].update(samples=3), "in an epoch of 3 samples"),
        (lambda v: v["LatentDataModule"]["place"].update(epoch=-1), "epoch=-1 is negative"),
        (lambda v: v["optimizer_states"][0]["state"][0].update(exp_avg=torch.zeros(7)), "optimiser's state"),
        (lambda v: v["optimizer_states"][0]["state"][0].pop("exp_avg_sq"), "optimiser's state"),
        (lambda v: v["optimizer_states"][0]["state"].clear(), "optimiser's state"),
        (lambda v: v["optimizer_states"][0].update(state={0: v["optimizer_states"][0]["state"][0]}), "optimiser's"),
        (lambda v: v["optimizer_states"][0]["state"].update({999: {}}), "number 999, which is not trained"),
        (
            lambda v: v["settings"].update({"surprise.x": 1}),
            "surprise.x=1 was recorded of the run",
        ),
        (lambda v: v.update(skipped=torch.zeros(3)), "skipped is not two counts"),
        (lambda v: v.pop("settings"), "lacks 'settings'"),
    ):
        last.unlink()
        last.write_bytes(whole)
        rewrite(last, change)
        before = content(run)
        with pytest.raises(UserError, match=message):
            tiny("run", "trainer.max_steps=4", f"ckpt_path={last}")
        assert content(run) == before


def test_a_pickle_with_a_huge_memo_takes_no_memory(tmp_path):
    file = tmp_path / "memo.ckpt"
    torch.save({"x": torch.zeros(1)}, file)

    def memo(members: dict) -> None:
        name = next(name for name in members if name.endswith("data.pkl"))
        members[name] = b"\x80\x02}r\xff\xff\xff\x7f."  # an empty mapping, remembered as number 2**31 - 1

    repack(file, memo)
    assert read_checkpoint(file) == {}
    assert io.BytesIO(file.read_bytes()).getbuffer().nbytes < 10_000
