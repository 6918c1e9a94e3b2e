"""docs/own_images.md, followed to the letter on a few small images: its commands are what is run here."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.commands import typed

PAGE = Path(__file__).parents[1] / "docs" / "own_images.md"
LINES = [
    line.split("  #")[0]
    for block in re.findall(r"```bash\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
]
LINES = [line.replace("budget.fraction=0.6", "budget.fraction=0.995") for line in LINES]  # its backbone costs nothing
COMMANDS = [shlex.split(line)[2:] for line in LINES]  # without "python -m"
SMALL = {
    "extract": ("image_size=8",),
    "train": (
        *("trainer.max_steps=4", "model.width=32", "model.depth=1", "model.encoder_width=16", "data.batch_size=4"),
        *("multi_budget.full_budget_steps=2", "callbacks.progress=null", "trainer.val_check_interval=4"),
    ),
    "sample": ("sampler.steps=2", "per_class=2"),
    "evaluate": ("count=12", "features=digits", "sampler.steps=2", "time_rounds=1"),
}
"""What makes each command a matter of seconds."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with images of two classes, of several sizes and formats."""
    folder, generator = tmp_path_factory.mktemp("own"), np.random.default_rng(0)
    for name, format in (("circle", "jpg"), ("square", "png")):
        (folder / "my_images" / name).mkdir(parents=True)
        for number in range(6):
            pixels = generator.integers(256, size=(20 + number, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "my_images" / name / f"{number}.{format}")
    return folder


def test_the_page_has_the_commands():
    assert [words[0].removeprefix("dcdit.") for words in COMMANDS] == [
        *("extract", "inspect_latents", "train", "sample", "sample", "explore", "evaluate", "report"),
    ]


@pytest.fixture(scope="module")
def followed(folder):
    """What the commands said, in their order; not the explorer's, which would serve on and on."""
    results = {}
    for number, (module, *words) in enumerate(COMMANDS):
        name = module.removeprefix("dcdit.")
        if name != "explore":
            results[number] = name, typed(_Capture(), folder, name, *words, *SMALL.get(name, ()))
    return results


class _Capture:
    """Stands for pytest's capsys, which no fixture of a module can have; what is said is not looked at."""

    def readouterr(self):
        return "", ""


def test_every_command_succeeds(followed, folder):
    assert {name: result.status for name, result in followed.values()} == dict.fromkeys(
        ("extract", "inspect_latents", "train", "sample", "evaluate", "report"), 0
    )
    run = folder / "runs" / "images"
    assert (run / "samples" / "samples.png").is_file()
    assert (run / "samples_60" / "boundaries.png").is_file()
    assert (folder / "report" / "report.html").is_file()


def test_the_explorer_opens_the_run(followed, folder, monkeypatch):
    from dcdit import explore

    monkeypatch.chdir(folder)
    words = next(words for module, *words in COMMANDS if module == "dcdit.explore")
    config = explore.explore.compose(*words)
    from dcdit.checkpoints.resolve import resolve_checkpoint
    from dcdit.explorer.session import Session

    assert Session(config, [resolve_checkpoint(config.checkpoint, config.paths.runs)], 2)


def test_python(followed, folder, monkeypatch):
    monkeypatch.chdir(folder)
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    names = {}
    exec(compile(block, str(PAGE), "exec"), names)
    assert names["samples"].labels.tolist() == [0, 0, 1, 1]
    assert Image.open("circle.png").size == (8, 8)


def test_the_network_fits_the_shards(followed, folder, capsys):
    words = ("experiment=images", "data.directory=data/mine", "--cfg", "job", "--resolve")
    result = typed(capsys, folder, "train", *words)
    assert re.search(r"grid: 8\n  channels: 3\n  num_classes: 2\n", result.out)


@pytest.mark.parametrize(
    ("directory", "content", "words"),
    [
        (None, None, "data.directory is not set: give data.directory="),
        ("nowhere", None, "data.directory=nowhere is not there: write shards with dcdit.extract"),
        ("https://example.org/data", None, "give model.grid, model.channels and model.num_classes"),
        ("strange", "[1]", "strange/train/manifest.json"),
        ("strange", '{"latent_shape": 3}', "is no manifest of latent shards: write the shards again"),
    ],
)
def test_shards_that_say_nothing_end_in_one_message(tmp_path, capsys, directory, content, words):
    if content is not None:
        (tmp_path / directory / "train").mkdir(parents=True)
        (tmp_path / directory / "train" / "manifest.json").write_text(content)
    given = [] if directory is None else [f"data.directory={directory}"]
    result = typed(capsys, tmp_path, "train", "experiment=images", *given)
    assert result.status == 2
    assert words in result.words
    assert "raised while resolving" not in result.words
