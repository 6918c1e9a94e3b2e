"""docs/python.md, followed to the letter: its blocks are what is run here."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import dcdit
from dcdit.sample import sample

PAGE = Path(__file__).parents[1] / "docs" / "python.md"
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL))


@pytest.fixture
def run_section(tmp_path, monkeypatch):
    """Run the blocks of a section in an empty folder, some texts replaced; returns their variables."""
    monkeypatch.chdir(tmp_path)

    def run(title: str, **replaced: str) -> dict[str, object]:
        names: dict[str, object] = {}
        for block in re.findall(r"```python\n(.*?)```", SECTIONS[title], flags=re.DOTALL):
            for old, new in replaced.items():
                block = block.replace(old, new)
            exec(compile(block, str(PAGE), "exec"), names)
        return names

    return run


def test_sampling(run_section):
    names = run_section("Sample")
    samples = names["samples"]
    assert samples.images.dtype == torch.uint8
    assert samples.images.shape == (2, 1, 16, 16)
    assert samples.kept.shape == (10, 2, 16, 16)
    assert samples.labels.tolist() == [3, 5]
    assert (names["cheaper"].flops < samples.flops).all()
    assert Path("three.png").stat().st_size > 0


def test_a_training_loop(run_section):
    names = run_section("Train in a loop of your own", **{"= 1000, 4.0": "= 20, 4.0"})
    zero = (names["noise"] - names["x_0"]).square().mean()  # the loss of a network that says nothing
    assert names["diffusion"] < 0.8 * zero
    assert names["digits"].shape == (10, 1, 12, 12)
    assert names["digits"].abs().max() <= 1
    loaded = names["network"](names["x_t"], names["t"], names["y"])
    assert loaded.prediction.isfinite().all()


def test_calling_a_command(run_section):
    folder = run_section("Call a command")["folder"]
    assert (folder / "samples.png").is_file()


def test_the_pipeline_gives_the_latents_of_the_command(tmp_path):
    words = ("checkpoint=digits", "sampler=ddim", "sampler.steps=3", "guidance.scale=2", "classes=[3,5]", "per_class=2")
    folder = sample(sample.compose(*words, "seed=7", f"out={tmp_path}", "device=cpu"))
    from dcdit.diffusion.settings import DDIM, GuidanceSettings

    samples = dcdit.load("digits", device="cpu").sample(
        [3, "5"], 2, 7, sampler=DDIM(steps=3), guidance=GuidanceSettings(scale=2)
    )
    with np.load(folder / "latents.npz") as file:
        assert torch.equal(samples.latents, torch.from_numpy(file["latents"]))
        assert torch.equal(samples.labels, torch.from_numpy(file["labels"]))
    image = np.asarray(samples.to_pil()[1])
    assert np.array_equal(image, samples.images[1, 0].numpy())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pipeline: pipeline.sample([17]), "classes: 17 is neither a class name nor a label in 0..9"),
        (lambda pipeline: pipeline.sample([]), "at least one class"),
        (lambda pipeline: pipeline.sample([1], per_class=0), "per_class=0"),
        (lambda pipeline: pipeline.sample([1], seed=-1), "seed=-1"),
        (lambda pipeline: pipeline.sample([1], batch_size=0), "batch_size=0"),
    ],
)
def test_mistakes_end_in_one_message(call, message):
    with pytest.raises(dcdit.UserError, match=re.escape(message)):
        call(dcdit.load("digits", device="cpu"))


def test_a_program_that_uses_hydra_itself_can_load(tmp_path):
    from hydra import compose, initialize_config_dir

    (tmp_path / "own.yaml").write_text("answer: 42\n")
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        assert dcdit.load("digits").classes[3] == "3"
        assert compose("own").answer == 42


def test_help_shows_types_that_a_person_can_read():
    import inspect

    signature = str(inspect.signature(dcdit.DCDiT))
    assert "grid: int" in signature
    assert "router: Literal['predictability', 'cosine'] = 'predictability'" in signature
    assert "Bounds" not in signature
