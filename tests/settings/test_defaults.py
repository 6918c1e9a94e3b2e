"""A default stands in one place: in ``configs/`` for whatever a command reads."""

import inspect

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from support.configs import compose_config

from dcdit import ema, flops, generate, inspect_latents, report, sample, status
from dcdit.cluster.settings import ClusterSettings
from dcdit.data.datamodule import LatentDataModule
from dcdit.data.storage import Location
from dcdit.diffusion.settings import (
    DDIM,
    DDPM,
    BudgetSettings,
    DPMSolver,
    Euler,
    EulerMaruyama,
    FlowMatching,
    GuidanceSettings,
    Heun,
    NoiseDiffusion,
)
from dcdit.evaluation.settings import EvaluateConfig, ScoreConfig
from dcdit.extraction.readers import READERS
from dcdit.extraction.settings import ExtractConfig, ExtractionSettings
from dcdit.network import DCDiT, DiT
from dcdit.sampling.settings import SamplingConfig
from dcdit.settings.compose import encoder_grid
from dcdit.training import settings
from dcdit.training.alignment import settings as alignment
from dcdit.training.callbacks import EMA, Checkpoint, PowerEMA, ProgressBar
from dcdit.training.callbacks.fid import FID

ONE_HOME = (
    *(
        sample.SampleConfig,
        generate.GenerateConfig,
        EvaluateConfig,
        ScoreConfig,
        report.ReportConfig,
        status.StatusConfig,
    ),
    *(flops.FlopsConfig, ExtractConfig, ExtractionSettings, inspect_latents.InspectConfig),
    *(
        SamplingConfig,
        ClusterSettings,
        LatentDataModule,
        EMA,
        PowerEMA,
        Checkpoint,
        ProgressBar,
        FID,
        ema.EMAConfig,
    ),
    *(settings.TrainConfig, settings.TrainerSettings, settings.RatioSettings, settings.MultiBudgetSettings),
    *(alignment.NoAlignment, alignment.REPA, alignment.IREPA, alignment.Dispersive),
    *READERS.values(),
    *(*settings.OPTIMIZERS.values(), settings.MatchComputeSettings, settings.ExecutionSettings),
)
"""What only configurations build: no defaults beside those of the files."""

LIBRARY = {
    DCDiT: ("train", (), "model"),
    DiT: ("train", ("model=dit_b_2",), "model"),
    GuidanceSettings: ("sample", (), "guidance"),
    BudgetSettings: ("sample", (), "budget"),
    DDPM: ("sample", (), "sampler"),
    DDIM: ("sample", ("sampler=ddim",), "sampler"),
    DPMSolver: ("sample", ("sampler=dpm++",), "sampler"),
    Euler: ("sample", ("sampler=euler",), "sampler"),
    Heun: ("sample", ("sampler=heun",), "sampler"),
    EulerMaruyama: ("sample", ("sampler=sde",), "sampler"),
    NoiseDiffusion: ("train", (), "diffusion"),
    FlowMatching: ("train", ("diffusion=flow",), "diffusion"),
    Location: ("train", (), "data"),
}
"""What people call from code as well: its defaults are those of the files."""


def defaults(target) -> dict[str, object]:
    parameters = inspect.signature(target).parameters.values()
    return {each.name: each.default for each in parameters if each.default is not inspect.Parameter.empty}


@pytest.mark.parametrize("target", ONE_HOME, ids=lambda target: target.__name__)
def test_constructors_repeat_no_default(target):
    assert defaults(target) == {}


@pytest.mark.parametrize("target", LIBRARY, ids=lambda target: target.__name__)
def test_defaults_of_the_library_are_those_of_the_files(target):
    name, overrides, section = LIBRARY[target]
    config = compose_config(*overrides, name=name)
    values = OmegaConf.to_container(config, resolve=True, throw_on_missing=False)[section]
    found = defaults(target)
    assert found
    differing = {key: (value, values[key]) for key, value in found.items() if values[key] != value}
    if target is DiT:
        differing.pop("patch", None)  # part of a scale's name
    assert differing == {}


def test_shards_are_inspected_with_the_cache_that_training_has():
    config = compose_config(name="inspect_latents")
    assert {key: config[key] for key in defaults(Location)} == defaults(Location)


def test_fid_during_training_is_measured_as_an_evaluation_measures_it():
    """Except that it has fewer images, budgets of its own, and the few steps that training can afford."""
    evaluation = compose_config(name="evaluate")
    fid = compose_config("callbacks=fid", name="train").callbacks.fid
    shared = set(fid) & set(evaluation) - {"reference", "features", "drop_fractions", "count", "sampler", "guidance"}
    assert shared == {"autoencoder", "batch_size", "cache", "capacity", "seed", "shown"}
    assert {key: fid[key] for key in shared} == {key: evaluation[key] for key in shared}
    assert fid.guidance.items() <= evaluation.guidance.items()


def test_the_two_resolutions_differ_in_one_file():
    small, large = (compose_config("experiment=b_n4_512", f"resolution={name}") for name in ("256px", "512px"))
    assert (small.model.grid, small.model.smoothing_sigma) == (32, 1.0)
    assert (large.model.grid, large.model.smoothing_sigma) == (64, 2.0)
    assert compose_config("resolution=512px", "model=dit_b_2").model.grid == 64


@pytest.mark.parametrize(
    ("words", "grid"),
    [
        (("experiment=xl_n4",), 16),
        (("experiment=xl_n4", "resolution=512px"), 32),
        (("experiment=xl_n4_512",), 32),
        (("experiment=dit_xl_2",), 16),
        (("experiment=dit_b_4",), 8),  # of 8 x 8 tokens
        (("experiment=digits",), 6),
        (("experiment=digits", "model.grid=8"), 4),
        (("experiment=digits", "alignment.grid=3"), 3),
    ],
)
def test_the_encoder_has_half_the_grid_of_the_latents(words, grid):
    assert compose_config("alignment=repa", *words).alignment.grid == grid


@given(st.integers(1, 130), st.integers(1, 8))
def test_patches_of_the_encoder_cover_whole_tokens(patches, patch):
    grid = patches * patch
    found = encoder_grid(_root_=OmegaConf.create({"model": {"grid": grid, "patch": patch}}))
    fitting = {number for number in range(1, patches + 1) if patches % number == 0 and 2 * number <= grid}
    assert found == max(fitting, default=1)


@pytest.mark.parametrize("model", [None, {}, {"grid": "many"}, {"grid": 0}, {"grid": -4}, {"grid": 8, "patch": 0}])
def test_the_grid_of_the_encoder_leaves_mistakes_of_the_model_to_the_model(model):
    assert encoder_grid(_root_=OmegaConf.create({"model": model})) == 1
