import logging
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

# Before torch is loaded: threads that spin while they wait make tiny runs many times slower beside any other job.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Started in the background of a script, tests and what they start would be deaf to interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch
from support.configs import TINY, compose_config

from dcdit.runtime.signals import STOP_SIGNALS
from dcdit.settings.compose import register_resolvers

register_resolvers()

# As in commands: Lightning's remarks would be written to streams that a test has closed.
logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--other-rounding", action="store_true", help="round as another processor: by shape")


@pytest.fixture(autouse=True, scope="session")
def other_rounding(request: pytest.FixtureRequest) -> Iterator[None]:
    """Another processor, if asked for: see :mod:`support.rounding`."""
    from support.rounding import ShapedRounding

    with ShapedRounding() if request.config.getoption("--other-rounding") else nullcontext():
        yield


@pytest.fixture(autouse=True)
def signal_handlers() -> Iterator[None]:
    """No test leaves a handler behind: what follows would not end when it is told to."""
    before = {signum: signal.getsignal(signum) for signum in STOP_SIGNALS}
    yield
    after = {signum: signal.getsignal(signum) for signum in STOP_SIGNALS}
    for signum, handler in before.items():
        signal.signal(signum, handler)
    assert after == before


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 8 x 8 digits."""
    from dcdit.data.builtin import Digits

    directory = tmp_path_factory.mktemp("digits")
    Digits(grid=8).write(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small autoencoder of diffusers with random weights: 4 channels, factor 4, scale 0.5, shift 0.25."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        scaling_factor=0.5,
        shift_factor=0.25,
    )
    path = tmp_path_factory.mktemp("vae")
    vae.save_pretrained(path)
    return path


@pytest.fixture
def no_plugins():
    """What plug-ins of a test bring is gone after it."""
    from support.plugins import forgotten

    with forgotten():
        yield


@pytest.fixture
def tiny(digits: Path, tmp_path: Path):
    """Run a tiny digits training in a directory; returns the run directory."""
    from support.configs import train

    def run(name: str, *overrides: str) -> Path:
        run_dir = tmp_path / name
        run_dir.mkdir(exist_ok=True)
        train(compose_config(*TINY, f"data.directory={digits}", *overrides), run_dir)
        return run_dir

    run.folder = tmp_path  # type: ignore[attr-defined]
    return run


@pytest.fixture(scope="session")
def three_steps(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps that all tests share: not to be written to."""
    from support.configs import train

    run_dir = tmp_path_factory.mktemp("shared") / "trained"
    run_dir.mkdir()
    train(compose_config(*TINY, f"data.directory={digits}", "trainer.max_steps=3"), run_dir)
    return run_dir


@pytest.fixture
def trained_run(three_steps: Path, tmp_path: Path) -> Path:
    """A copy of the shared run."""
    return Path(shutil.copytree(three_steps, tmp_path / "trained"))
