"""``resume=runs/x``: a run goes on by its own configuration, and its file neither runs code nor writes elsewhere."""

import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from support.commands import typed
from support.configs import TINY
from support.runs import STATE, differences, load, logged

from dcdit.errors import UserError
from dcdit.runs.resume import commands_of_run, task_overrides
from dcdit.runs.state import RunState, command_of
from dcdit.train import train


def started(capsys, folder: Path, digits: Path, *words: str) -> Path:
    """A run of two steps below ``folder``, started as a user types it."""
    steps = ("trainer.max_steps=2", "optimizer.schedule=constant", "run_name=x")
    result = typed(capsys, folder, "train", *TINY, f"data.directory={digits}", *steps, *words)
    assert result.status == 0, result.words
    return folder / "runs" / "x"


def test_the_commands_of_a_run_are_that_which_began_it_and_those_that_changed_something(tmp_path, digits, capsys):
    run = started(capsys, tmp_path, digits, "compression=3")
    same = (*TINY, f"data.directory={digits}", "optimizer.schedule=constant", "run_name=x", "compression=3")
    assert typed(capsys, tmp_path, "train", *same, "trainer.max_steps=3", "ckpt_path=last").status == 0
    for words in (("trainer.max_steps=4",), ("trainer.max_steps=4",), (), ("trainer.max_steps=5", "optimizer.lr=0.1")):
        assert typed(capsys, tmp_path, "train", f"resume={run}", *words).status == 0
    began, *others = command_of(run).splitlines()
    assert shlex.split(began)[:3] == ["dcdit", "train", "experiment=digits"]
    assert {"trainer.max_steps=2", "data.directory=???", "compression=3"} < set(shlex.split(began))
    assert not {"run_name=x", "ckpt_path=last"} & set(shlex.split(began))
    again, *resumed = others
    assert {"trainer.max_steps=3", "ckpt_path=last"} < set(shlex.split(again))
    assert again.endswith("  # on from step 2")
    assert resumed == [
        "dcdit train 'resume=???' trainer.max_steps=4  # on from step 3",
        "dcdit train 'resume=???' trainer.max_steps=5 optimizer.lr=0.1  # on from step 4",
    ]
    # What was done after the step that a run goes on from is no part of it any more.
    state = RunState.read(run)
    steps = {step: [start.step for start in commands_of_run(state, step)] for step in (0, 1, 2, 3, 4, 9)}
    assert steps == {0: [0], 1: [0, 1], 2: [0, 2], 3: [0, 2, 3], 4: [0, 2, 3, 4], 9: [0, 2, 3, 4, 9]}
    older = commands_of_run(replace(state, commands=()), 4)  # of a release that kept the last one alone
    assert [start.overrides for start in older] == [state.overrides, task_overrides()]


def test_the_same_bits_as_the_whole_command_with_ckpt_path(tmp_path, digits, capsys):
    """Also of a run that was moved, and whose latents were."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir(), there.mkdir()
    own = ("compression=3", "optimizer.lr=0.002", "callbacks.ema.decay=0.9", "~callbacks.loss_watch")
    run = started(capsys, here, digits, *own)
    moved, latents = there / "moved", tmp_path / "latents"
    shutil.copytree(run, moved)
    shutil.copytree(digits, latents)
    more = ("trainer.max_steps=5", "optimizer.weight_decay=0.1")
    fixed = (*TINY, f"data.directory={digits}", "optimizer.schedule=constant", "run_name=x", *own)
    assert typed(capsys, here, "train", *fixed, *more, "ckpt_path=last").status == 0
    result = typed(capsys, there, "train", "resume=moved", f"data.directory={latents}", *more)
    assert (result.status, "on from step 2" in result.words) == (0, True), result.words
    one, other = load(run), load(moved)
    assert one["global_step"] == other["global_step"] == 5
    assert [path for key in STATE for path in differences(one[key], other[key], key)] == []
    assert one["settings"] == other["settings"]
    assert logged(run) == logged(moved)
    values = [yaml.safe_load((folder / "config.yaml").read_text()) for folder in (run, moved)]
    assert "loss_watch" not in values[1]["callbacks"]
    assert values[1]["callbacks"]["checkpoint"]["dirpath"] == str(moved / "checkpoints")
    assert str(here) not in (moved / "config.yaml").read_text()
    assert RunState.read(moved).id == RunState.read(run).id
    # Its overrides still describe the whole run, and it goes on again.
    overrides = RunState.read(moved).overrides
    assert {"experiment=digits", "trainer.max_steps=5"} < set(overrides)
    assert "trainer.max_steps=2" not in overrides
    assert typed(capsys, tmp_path, "train", "resume=there/moved", "trainer.max_steps=6").status == 0
    assert load(moved)["global_step"] == 6
    # From Python it is the same configuration.
    config = train.compose(f"resume={moved}", "trainer.max_steps=7", "run_id=again")
    assert (config.trainer.max_steps, config.optimizer.weight_decay, config.run_id) == (7, 0.1, "again")
    assert config.callbacks["checkpoint"]["dirpath"] == f"{moved}/checkpoints"


def test_what_contradicts_it_and_what_may_not_change_is_refused(tmp_path, digits, capsys):
    run = started(capsys, tmp_path, digits)
    content = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for words, message in (
        (("experiment=digits",), "experiment=...: resume=runs/x goes on with the run's own configuration"),
        (("+logger=wandb",), "logger=...: resume=runs/x"),
        (("run_name=y",), "run_name=...: resume=runs/x says which run goes on"),
        (("-m",), "resume=runs/x goes on with one run: leave -m out"),
        (("-m", "resume=runs/x,runs/y"), "goes on with one run"),
        (("seed=1,2", "cluster=slurm"), "resume=runs/x goes on with one run"),
        (("model.width=64",), "model.width=64: the run was trained with 32 up to step 2"),
        (("seed=3",), "seed=3: the run was trained with 0"),
        (("model.widht=64",), "did you mean width?"),
    ):
        result = typed(capsys, tmp_path, "train", "resume=runs/x", *words)
        assert (result.status, message in result.words) == (2, True), (words, result.words)
        assert "To go on with the settings" not in result.words
    for name in ("runs/none", "runs/x/checkpoints/last.ckpt"):
        result = typed(capsys, tmp_path, "train", f"resume={name}")
        assert f"resume={name}: there is no {name}/config.yaml; name the directory of a run" in result.words
        assert result.status == 2
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == content
    shutil.rmtree(run / "checkpoints")
    result = typed(capsys, tmp_path, "train", "resume=runs/x")
    assert (result.status, "there is no checkpoint" in result.words) == (2, True)
    assert typed(capsys, tmp_path, "train", "resume=null", "--cfg", "job").status == 0


RUN = {
    "run_dir": "/old/runs/x",
    "run_name": "x",
    "run_id": "abc",
    "data": {"directory": "/old/data", "allow_pipe": False, "cache": None},
    "callbacks": {
        "checkpoint": {"_target_": "dcdit.training.callbacks.Checkpoint", "dirpath": "/old/runs/x/checkpoints"},
        "fid": {
            "_target_": "dcdit.training.callbacks.fid.FID",
            "reference": "/old/data/val",
            "sampler": {"cache": 0.0},
            "features": {"_target_": "dcdit.evaluation.features.InceptionFeatures", "weights": None},
        },
    },
    "logger": {
        "csv": {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": "/old/runs/x", "name": "logs"},
        "wandb": {"_target_": "lightning.pytorch.loggers.WandbLogger", "name": "../x", "id": "abc"},
    },
}

HOSTILE = {
    "callbacks.mine._target_": "os.system",
    "callbacks.fid.features._target_": "my_package.Net",
    "callbacks.checkpoint.dirpath": "/etc",
    "callbacks.fid.cache": "/home/me/.ssh",
    "callbacks.fid.folder": "/old/runs/x/../../elsewhere",
    "logger.csv.save_dir": "/old/runs/xy",
    "logger.csv.name": "../../elsewhere",
    "logger.csv.version": "../../elsewhere",
    "logger.wandb.settings": {"base_url": "https://example.com"},
    "data.allow_pipe": True,
    "data.cache": "/tmp/x",
    "trainer.default_root_dir": "/etc",
}


def saved(folder: Path, key: str = "", value: object = None) -> str:
    """The word ``resume=`` for a directory with :data:`RUN`, in which ``key`` is ``value``."""
    values = yaml.safe_load(yaml.safe_dump(RUN))
    section = values
    for part in key.split(".")[:-1]:
        section = section.setdefault(part, {})
    if key:
        section[key.rpartition(".")[2]] = value
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return f"resume={folder}"


def test_folders_follow_the_run_and_the_data(tmp_path):
    values = train.saved([saved(tmp_path)])
    assert train.saved([f"++{saved(tmp_path)}"]) == values
    assert (values["run_dir"], values["ckpt_path"]) == (str(tmp_path), "last")
    assert values["callbacks"]["checkpoint"]["dirpath"] == "${run_dir}/checkpoints"
    assert values["callbacks"]["fid"]["reference"] == "${data.directory}/val"
    assert values["logger"]["csv"]["save_dir"] == "${run_dir}"
    assert values["logger"]["wandb"] == {**RUN["logger"]["wandb"], "id": "${run_id}"}
    assert values["data"]["directory"] == "/old/data"
    assert train.saved(["experiment=digits", "resume=null"]) is None


@pytest.mark.parametrize(("key", "value"), HOSTILE.items(), ids=HOSTILE)
def test_a_file_from_a_stranger_runs_and_writes_nothing_that_the_user_has_not_named(tmp_path, key, value):
    word = saved(tmp_path, key, value)
    with pytest.raises(UserError, match=rf"config\.yaml: {key}=.*write this key behind resume="):
        train.saved([word, f"{key.rpartition('.')[0]}.other=1"])
    assert train.saved([word, f"{key}=null"])  # what the command line says is the user's


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hydra.callbacks.x._target_", "os.system"),
        ("defaults", ["/callbacks: fid"]),
        ("plugins", ["my_package"]),
        ("cluster.setup", ["rm -r x"]),
        ("seed", "${oc.env:HOME}"),
        ("data.directory", "${oc.env:WANDB_API_KEY}"),
    ],
)
def test_what_hydra_would_do_by_a_file_is_refused_whatever_the_user_says(tmp_path, key, value):
    with pytest.raises(UserError, match=r"config\.yaml: "):
        train.saved([saved(tmp_path, key, value), f"{key}=null"])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1, 2]",
        "run_dir: []\nrun_name: x",
        "run_dir: x",
        "a: [",
        "!!python/object/apply:os.system ['true']",
        "a: &a [x]\nb: *a\n",
        "run_dir: x\nrun_name: y\nwhen: 2026-11-27",
        "[" * 5000,
        "x" * (1 << 19),
        b"\xff\xfe",
    ],
)
def test_no_file_ends_in_a_traceback(tmp_path, text):
    (tmp_path / "config.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=r"config\.yaml"):
        train.saved([f"resume={tmp_path}"])
