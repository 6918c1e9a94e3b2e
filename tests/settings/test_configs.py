import re
from importlib import import_module
from pathlib import Path

import pytest
import torch
from support.commands import typed
from support.configs import NEEDED, TINY, check, compose_config, config_of, module_of
from support.processes import run

from dcdit.diffusion.settings import DDPM, NoiseDiffusion
from dcdit.errors import UserError
from dcdit.evaluation.grid import grid_of
from dcdit.evaluation.settings import EvaluateConfig
from dcdit.settings import compose
from dcdit.settings.compose import configuration_of, cpu_precision
from dcdit.settings.overrides import quoted
from dcdit.settings.published import AUTOENCODER, CONFIG_DIR
from dcdit.training.build import match_compute
from dcdit.training.settings import TrainConfig

EXPERIMENTS = sorted(path.stem for path in Path(CONFIG_DIR, "experiment").glob("*.yaml"))
GROUPS = (
    "model",
    "trainer",
    "multi_budget",
    "logger",
    "data",
    "debug",
    "resolution",
    "cluster",
    "callbacks",
    "diffusion",
    "alignment",
)
NAMED = {"digits", "s_n4", "b_n4", "l_n4", "xl_n4", "b_n16", "b_n4_512", "xl_n4_512", "dit_s_2", "dit_b_2", "dit_xl_2"}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_and_builds(experiment):
    choice = f"experiment={experiment}"
    config = compose_config(choice, *NEEDED.get(choice, ()))
    with torch.device("meta"):
        module = module_of(configuration_of(TrainConfig, config))
    assert next(module.network.parameters()).device.type == "meta"
    assert config.run_name == experiment
    opening = Path(CONFIG_DIR, "experiment", f"{experiment}.yaml").read_text().splitlines()
    assert opening[0] == "# @package _global_"
    assert any(f"python -m dcdit.train experiment={experiment}" in line for line in opening[:4])


def commands_of(experiment, command):
    """The overrides of a command that stands in the head of an experiment's file."""
    text = Path(CONFIG_DIR, "experiment", f"{experiment}.yaml").read_text().replace(" \\\n#", "")
    return [line.split()[4:] for line in text.splitlines() if line.startswith(f"#   python -m dcdit.{command} ")]


@pytest.mark.parametrize(
    "experiment", sorted({*NAMED, "dit_l_2", "dit_b_4", "dit_b_2_512", "dit_xl_2_512"} - {"digits"})
)
def test_experiments_say_how_their_published_figures_are_measured(experiment):
    text = Path(CONFIG_DIR, "experiment", f"{experiment}.yaml").read_text()
    found = commands_of(experiment, "evaluate")
    assert len(found) == (2 if "guidance 1.25" in text else 1)
    for words in found:
        assert words[0] == f"checkpoint=runs/{experiment}"
        config = configuration_of(EvaluateConfig, compose_config(*words, name="evaluate"))
        grid = grid_of(config)
        assert (config.count, config.labels, grid.points[0].rounding) == (50_000, "random", "round")
        assert grid.points[0].precision == "fp32"
        assert grid.points[0].sampler.for_process(NoiseDiffusion()) == DDPM(250)
        drops = re.findall(r" at drop fraction (\d(?:\.\d)?)", text.split("guidance 1.25")[0])
        if "guidance.scale=1.25" in words:
            drops = ["0"]
        assert [point.guidance.drop_fraction for point in grid.points] == [float(drop) for drop in drops or ["0"]]
    assert AUTOENCODER in text
    for fact in ("50,000 images", "250 DDPM steps", "labels=random", "rounding=round", "fp32"):
        assert fact in " ".join(text.replace("#", "").split())


def test_the_named_experiments_are_there():
    assert set(EXPERIMENTS) >= NAMED


@pytest.mark.parametrize(
    "group",
    ["model", "trainer", "multi_budget", "logger", "data", "debug", "resolution", "cluster", "callbacks", "alignment"],
)
def test_every_choice_of_every_group_composes(group):
    for path in Path(CONFIG_DIR, group).glob("*.yaml"):
        assert compose_config(f"{group}={path.stem}") is not None


def test_matched_lengths_and_resolutions():
    assert compose_config("experiment=b_n4").trainer.max_steps == 408_071
    big = compose_config("experiment=xl_n4_512")
    assert (big.model.grid, big.model.smoothing_sigma) == (64, 2.0)


def test_a_run_as_long_as_its_baseline_costs(tmp_path):
    matched = match_compute(config_of("experiment=b_n4", "match_compute.baseline=dit_b_2"))
    assert matched.trainer.max_steps == pytest.approx(408_071, rel=0.01)
    always = ("match_compute.steps=2", "multi_budget.full_budget_steps=0")
    small = match_compute(config_of(*TINY, "match_compute.baseline=dit_s_2", *always))
    assert small.trainer.max_steps > 100  # a far larger network, on the same small grid
    late = config_of("experiment=b_n4", "match_compute.baseline=dit_b_2", "multi_budget.full_budget_steps=90000000")
    with pytest.raises(UserError, match=r"multi_budget.full_budget_steps=90000000 .* take fewer than"):
        match_compute(late)


def test_cpu_precision_follows_the_processor(tmp_path, monkeypatch):
    native = any((torch.cpu.get_capabilities() or {}).get(name) for name in ("amx_bf16", "avx512_bf16"))
    assert compose_config("trainer=cpu").trainer.precision == ("bf16-mixed" if native else "32-true")
    cpu = tmp_path / "cpuinfo"
    monkeypatch.setattr(compose, "_CPU", cpu)
    for flags, precision in (
        ("sse avx512f avx512_bf16 fma", "bf16-mixed"),
        ("amx_bf16", "bf16-mixed"),
        ("sse", "32-true"),
    ):
        cpu.write_text(f"processor : 0\nflags : {flags}\n")
        assert cpu_precision() == precision
    cpu.unlink()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    assert cpu_precision() == "bf16-mixed"


@pytest.mark.parametrize(
    "value", ["a=b/last.ckpt", "a#b", "a b", "grün/日本.ckpt", "it's", "a(1).ckpt", "back\\slash", "a{b"]
)
def test_any_path_can_be_given_without_quotes_of_its_own(tmp_path, capsys, value):
    assert compose_config(*quoted([f"ckpt_path={value}"], TrainConfig)).ckpt_path == value
    result = typed(capsys, tmp_path, "sample", f"checkpoint={value}")
    assert result.status == 2
    assert "mismatched" not in result.words
    assert value.split()[0] in result.words


@pytest.mark.parametrize(("words", "named"), [(("classes=[circle,", "square]"), "square]"), (("foo",), "foo")])
def test_a_word_that_is_no_override_is_told(tmp_path, capsys, words, named):
    result = typed(capsys, tmp_path, "sample", "checkpoint=digits", *words)
    assert result.status == 2
    assert f"'{named}' is no key=value that can be read" in result.words
    assert "Lexer" not in result.words


def test_what_hydra_takes_stays_as_it_is():
    words = [
        "-m",
        "seed=0,1",
        "drop_fractions=[0,0.5]",
        "++x.y={a:1}",
        "~model.init",
        "experiment=b_n4",
        "--cfg",
        "job",
    ]
    assert quoted(words) == words


def test_the_config_of_a_job_is_readable(tmp_path, capsys):
    result = typed(capsys, tmp_path, "train", "experiment=b_n4", "--cfg", "job")
    assert result.status == 0
    for line in ("compression: 4.0", "  width: 768", "  max_steps: 408071", "  - 0.6"):
        assert line in result.out
    resolved = typed(capsys, tmp_path, "train", "trainer=cpu", "--cfg", "job", "--resolve").out
    assert f"precision: {cpu_precision()}" in resolved
    assert "${" not in resolved


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.widht=3", ["model.widht=3", "did you mean width?"]),
        ("experiment=b_n5", ["b_n5", "b_n4"]),
        ("compression=0.5", ["compression=0.5", "greater than 1"]),
        ("compression=four", ["compression", "four"]),
        ("multi_budget.fractions=[0.0,1.5]", ["1.5", "[0, 1)"]),
        ("trainer.precision=fp12", ["trainer.precision", "fp12"]),
        ("trainer.precision=fp32", ["did you mean 32-true?"]),
        ("precision=bf16", ["precision=bf16: there is no such key, did you mean trainer.precision?"]),
        ("capacity=auto", ["did you mean execution.capacity?"]),
        ("optimizer.momentum=0.9", ["optimizer.momentum=0.9: there is no such key, it belongs to optimizer=muon"]),
        ("alignment.encoder=x", ["it belongs to alignment=irepa, alignment=repa"]),
        ("trainer.compile=true", ["did you mean execution.compile?"]),
        ("ema.decay=0.9", ["ema.decay=0.9: there is no such key, did you mean callbacks.ema.decay?"]),
        ("execution.nonsense=1", ["known keys: activation_checkpointing"]),
        ("callbacks.ema.decay=2", ["decay=2", "[0, 1)"]),
    ],
)
def test_mistakes_end_in_one_screen(tmp_path, capsys, override, words):
    places = (f"run_dir={tmp_path}/run", f"data.directory={tmp_path}/data")
    result = typed(capsys, tmp_path, "train", "experiment=digits", *places, override)
    assert result.status == 2, result.words
    for word in words:
        assert word in result.words
    assert "Traceback" not in result.words
    assert len(result.err.splitlines()) < 20
    assert not (tmp_path / "run").exists()


def test_a_debug_run_needs_no_shards(tmp_path, capsys):
    result = typed(capsys, tmp_path, "train", "experiment=images", "debug=tiny", "run_dir=run", "model.depth=1")
    assert result.status == 0, result.words
    assert "Finished at step 2" in result.words


@pytest.mark.slow
def test_a_debug_run_of_a_full_size_experiment(tmp_path):
    """In a process of its own, which gives its gigabytes back."""
    process = run(tmp_path, "train", "experiment=b_n4", "debug=tiny", f"run_dir={tmp_path}/run")
    assert process.poll() == 0, process.said
    assert "Finished at step 2" in process.err


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("sample", ("per_class=1e99",)),
        ("sample", ("per_class=100000000000",)),
        ("generate", ("out=x", "count=1e99")),
        ("evaluate", ("reference=x", "features=digits", "count=1e99")),
    ],
)
def test_numbers_of_images_that_no_memory_holds_are_refused(command, words):
    module = import_module(f"dcdit.{command}")
    with pytest.raises(UserError, match=words[-1].split("=")[0]):
        check(module, compose_config("checkpoint=x", *words, name=command))


@pytest.mark.parametrize(("value", "folder"), [(None, "runs"), ("", "runs"), ("elsewhere", "elsewhere")])
def test_a_variable_that_is_set_to_nothing_is_not_set(monkeypatch, value, folder):
    if value is None:
        monkeypatch.delenv("DCDIT_RUNS", raising=False)
    else:
        monkeypatch.setenv("DCDIT_RUNS", value)
    assert config_of("experiment=digits").paths.runs == folder
