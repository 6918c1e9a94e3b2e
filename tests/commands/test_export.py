"""Exports: whole or not at all, in the place of nothing but an export, with a card whose commands work."""

import json
import os
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.commands import typed
from support.configs import compose_config
from support.damage import sign
from support.hub import hub_of

from dcdit.checkpoints import export
from dcdit.checkpoints.export import Card, write_exported
from dcdit.checkpoints.load import Weights, load_model, read_weights
from dcdit.checkpoints.resolve import resolve_checkpoint
from dcdit.data.latents import LatentSpec
from dcdit.errors import UserError
from dcdit.network import build_network
from dcdit.runs.state import RunState, State, command_of

NETWORKS = {
    "dcdit": {"name": "dcdit", "encoder_width": 16, "groups": 8, "smoothing_sigma": None},
    "dit": {"name": "dit", "patch": 2},
}
PROCESSES = {
    "ddpm": ("betas linear", "variance learned_range"),
    "flow": ("velocity noise - x_0", "times_of_training uniform"),
}
PLAIN = Card(None, None, "", [])


def weights(
    network: str = "dcdit", process: str = "ddpm", classes: tuple[str, ...] = ("a", "b"), kind: str = "ema"
) -> Weights:
    """Of a small network that nobody trained."""
    sizes = {"grid": 8, "channels": 1, "num_classes": 2, "width": 32, "depth": 1, "heads": 2}
    state = build_network(NETWORKS[network] | sizes).state_dict()
    training = {"diffusion": {"name": process}}
    latents = LatentSpec((1, 8, 8), "identity", 1.0, 0.0, classes)
    held = {"ema": None, "raw": None, kind: state}
    return Weights("test", NETWORKS[network] | sizes, latents, 3, training=training, **held)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def whole(folder: Path) -> str:
    """The network in an export, all of whose digests are right."""
    config = json.loads((folder / "config.json").read_text())
    assert export.written_files(folder) == {"config.json", "model.safetensors", "README.md"} == set(contents(folder))
    return str(config["network"]["name"])


CHANGES = {
    "weights of one's own": lambda folder: [path.unlink() for path in folder.glob("[!m]*")],
    "other weights": lambda folder: (folder / "model.safetensors").write_bytes(b"mine"),
    "an edited card": lambda folder: (folder / "README.md").write_text("mine"),
    "an edited configuration": lambda folder: (folder / "config.json").write_text("{}"),
    "a file more": lambda folder: (folder / "thesis.txt").write_text("mine"),
    "a folder more": lambda folder: (folder / "figures").mkdir(),
    "a name that leads away": lambda folder: sign(folder / "config.json", files={"../thesis.txt": "0" * 64}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_is_replaced_but_an_export_as_it_was_written(tmp_path, capsys, monkeypatch, change):
    monkeypatch.setattr("dcdit.checkpoints.load.read_weights", lambda *ignored: pytest.fail("work before the check"))
    out = tmp_path / "out"
    write_exported(out, weights(), "ema", "fp32", PLAIN)
    CHANGES[change](out)
    before = {name: (out / name).stat().st_mtime_ns for name in os.listdir(out)}
    result = typed(capsys, tmp_path, "export", "checkpoint=digits", "out=out")
    assert (result.status, "out=out holds what dcdit export did not write" in result.words) == (2, True), result.words
    assert before == {name: (out / name).stat().st_mtime_ns for name in os.listdir(out)}
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("out", "words", "message"),
    [
        ("file", (), "is no folder"),
        ("file", ("format=reference",), "exists: name another file"),
        (".", (), "is the current folder"),
    ],
)
def test_no_file_and_no_current_folder_is_replaced(tmp_path, capsys, out, words, message):
    folder = tmp_path / "folder"
    folder.mkdir()
    if out == "file":
        (folder / "file").write_text("mine")
    result = typed(capsys, folder, "export", "checkpoint=digits", f"out={out}", *words)
    assert (result.status, message in result.words) == (2, True), result.words
    assert [path.read_text() for path in folder.iterdir()] == ["mine"] * (out == "file")


DISK = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "ctypes.dlsym"}


def die_at(moment: int, found: Weights, out: Path) -> bool:
    """Export in a process that is killed at some use of the disk; whether it came to that."""
    child = os.fork()
    if child == 0:
        left = iter(range(moment, -1, -1))
        sys.addaudithook(lambda event, arguments: event in DISK and next(left, 0) == 0 and os._exit(9))
        try:
            write_exported(out, found, "ema", "fp32", PLAIN)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.filterwarnings("ignore:.*fork")
@pytest.mark.parametrize("there", [False, True])
def test_a_kill_at_any_moment_leaves_the_old_export_or_the_new_one(tmp_path, monkeypatch, there):
    out, seen, new = tmp_path / "out", [], weights("dit")
    moment = 0
    while True:
        if there and (not out.exists() or whole(out) == "dit"):
            write_exported(out, weights("dcdit"), "ema", "fp32", PLAIN)
        killed = die_at(moment, new, out)
        seen.append(whole(out) if out.exists() else None)
        if not killed:
            break
        moment += 1 + moment // 5
    assert seen[0] == ("dcdit" if there else None)
    assert seen[-1] == "dit"
    assert len(seen) > 10
    assert None not in seen or not there
    monkeypatch.setattr("dcdit.runtime.files._swept", set())  # as in a process of its own
    write_exported(out, new, "ema", "fp32", PLAIN)  # drafts of the dead are removed
    assert os.listdir(tmp_path) == ["out"]


def test_where_folders_cannot_be_exchanged_the_old_one_steps_aside(tmp_path, monkeypatch):
    monkeypatch.setattr("dcdit.runtime.files.sys.platform", "win32")
    out = tmp_path / "out"
    for name in ("dcdit", "dit"):
        write_exported(out, weights(name), "ema", "fp32", PLAIN)
        assert whole(out) == name
    real = Path.rename

    def fails(path: Path, target: Path) -> Path:
        if target == out and "part.part" not in path.name:
            raise OSError(16, "Device or resource busy")
        return real(path, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(UserError, match=r"cannot be written .*choose a folder within it"):
        write_exported(out, weights("dcdit"), "ema", "fp32", PLAIN)
    assert whole(out) == "dit"
    assert os.listdir(tmp_path) == ["out"]


def blocks(card: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", card, flags=re.DOTALL)


@pytest.mark.parametrize(("kind", "repository"), [("raw", None), ("ema", "me/mine")])
@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("network", NETWORKS)
def test_the_card_says_what_was_trained_and_its_commands_work(
    tmp_path, capsys, monkeypatch, network, process, kind, repository
):
    name = "it's handed=on, $1" if kind == "raw" else "handed_on"
    out, found = tmp_path / name, weights(network, process, kind=kind)
    write_exported(out, found, kind, "fp32", replace(PLAIN, repository=repository))
    card = (out / "README.md").read_text()
    row = next(line for line in card.splitlines() if line.startswith("| diffusion |"))
    for each in PROCESSES:
        assert all((fact in row) == (each == process) for fact in PROCESSES[each])
    (command,), (code,) = blocks(card, "bash"), blocks(card, "python")
    with hub_of({"me/mine": out}, tmp_path / "cache"):
        program, verb, *words = shlex.split(command)
        assert (program, verb) == ("dcdit", "sample")
        result = typed(capsys, tmp_path, verb, *words, "sampler.steps=2", "per_class=1", "out=images")
        assert result.status == 0, result.words
        assert (tmp_path / "images" / "samples.png").is_file()
        monkeypatch.chdir(tmp_path)
        loaded: dict = {}
        exec(code, loaded)
    for key, tensor in loaded["network"].state_dict().items():
        assert torch.equal(tensor, found.of_kind(kind)[key])


def test_the_card_shows_images_at_several_budgets_and_how_diffusers_loads_them(tmp_path, capsys, monkeypatch):
    chosen = ("examples.columns=3", "examples.steps=4", "examples.drop_fractions=[0.0,0.5]")
    result = typed(capsys, tmp_path, "export", "checkpoint=digits", "out=x", *chosen)
    assert result.status == 0, result.words
    card = (tmp_path / "x" / "README.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in card.split("## Examples")[1].splitlines() if line[:1] == "|"]
    table = dict(zip(rows[0], zip(*rows[2:], strict=True), strict=True))
    assert table["drop_fraction"] == ("0", "0.5")
    for key in ("tflops_per_image", "keep_ratio"):
        full, half = map(float, table[key])
        assert 0 < half < full
    picture = Image.open(tmp_path / "x" / re.search(r"!\[.*\]\((.*)\)", card)[1])
    assert picture.size == (3 * 64 + 4 * 2, 2 * 64 + 3 * 2)
    assert "\n- diffusers\n" in card
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.chdir(tmp_path)
    exec(blocks(card, "python")[1].replace("steps=50", "steps=2"), {})
    assert Image.open(tmp_path / "image.png").size == (16, 16)
    assert export.written_files(tmp_path / "x") >= {"samples.png", "README.md", "pipeline.py"}
    other = typed(capsys, tmp_path, "export", "checkpoint=digits", "out=x", "format=reference", "examples.columns=3")
    assert (other.status, "examples.columns=3 is for format=dcdit" in other.words) == (2, True)


def test_two_exports_of_one_network_have_the_same_bytes(tmp_path, capsys):
    for out in ("one/x", "two/x"):
        (tmp_path / out).parent.mkdir()
        assert typed(capsys, tmp_path, "export", "checkpoint=digits", f"out={out}").status == 0
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / n).rglob("*.*")} for n in ("one", "two"))
    assert one == two
    assert len(one) == 6


def test_the_card_of_the_network_that_comes_along_is_as_it_would_be_written(tmp_path, capsys):
    from dcdit.checkpoints.resolve import SHIPPED

    card = (SHIPPED["digits"] / "README.md").read_text()
    result = typed(capsys, tmp_path, "export", "checkpoint=digits", "out=digits", "license=apache-2.0")
    assert result.status == 0
    mine = (tmp_path / "digits" / "README.md").read_text()
    for part in (r"## Use\n.*?(?=\n## )", r"\| diffusion .*?\n"):
        assert re.search(part, card, re.DOTALL)[0] == re.search(part, mine, re.DOTALL)[0]


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (("experiment=digits", "optimizer.lr_scale={backbone: 0.1}"), ("{backbone: 0.1}",)),
        (("experiment=digits", "run_name=mine", "data.directory=/home/me/secret"), ("data.directory=???",)),
        (("init=weights", "init.checkpoint=hf://amd/x/S-256", "init.adapt=[classes]"), ("hf://amd/x/S-256",)),
    ],
)
def test_the_command_that_trained_composes_and_names_no_path(tmp_path, given, shown):
    RunState(State.FINISHED, overrides=given).write(tmp_path)
    command = command_of(tmp_path)
    assert all(word in command for word in shown)
    assert not {"secret", "mine"} & set(re.split(r"\W", command))
    program, verb, *words = shlex.split(command)
    assert (program, verb) == ("dcdit", "train")
    assert compose_config(*words) is not None


def test_names_that_are_no_text_or_markup_are_escaped(tmp_path, capsys):
    classes = ("café", "a|b\n\x1b[31m")
    note = "by Ren\udce9"
    with pytest.raises(UserError, match=r"classes='caf\\udce9' is not a text"):
        weights(classes=("caf\udce9", "b"))
    write_exported(tmp_path / "x", weights(classes=classes), "ema", "fp32", replace(PLAIN, note=note))
    card = (tmp_path / "x" / "README.md").read_text()
    assert r"| classes | 2: café, a\|b\n\x1b[31m |" in card
    assert r"by Ren\udce9" in card
    assert load_model(str(tmp_path / "x")).latents.classes == classes
    result = typed(capsys, tmp_path, "sample", "checkpoint=x", "sampler.steps=2", "per_class=1", "out=pictures")
    assert result.status == 0, result.words
    assert (tmp_path / "pictures" / "boundaries.png").is_file()


@pytest.mark.parametrize("classes", [("a",), ("a", "b", "c")])
def test_as_many_class_names_as_classes(tmp_path, classes):
    write_exported(tmp_path / "x", weights(), "ema", "fp32", PLAIN)
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    sign(tmp_path / "x" / "config.json", latents={**config["latents"], "classes": list(classes)})
    with pytest.raises(UserError, match=rf"checkpoint=.*names {len(classes)} classes, its network has 2"):
        read_weights(resolve_checkpoint(str(tmp_path / "x"), "runs"))


def test_a_prediction_that_reference_files_do_not_say_is_refused(tmp_path):
    predicts_image = replace(weights("dit"), training={"diffusion": {"name": "flow", "prediction": "x"}})
    with pytest.raises(UserError, match=r"diffusion\.prediction=x, which such files do not say: format=dcdit"):
        export.write_reference(tmp_path / "x.pt", predicts_image, "ema")
    assert not list(tmp_path.iterdir())
    export.write_reference(tmp_path / "v.pt", replace(weights("dit"), training={"diffusion": {"name": "flow"}}), "ema")
