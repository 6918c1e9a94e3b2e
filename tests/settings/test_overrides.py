"""What is typed: texts stay as they are, groups take names of choices, and what cannot work is refused beforehand."""

import re
import shlex
import shutil
import sys
from importlib import import_module, reload
from itertools import product
from typing import get_args

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.fabric.connector import _PRECISION_INPUT
from support.commands import typed
from support.configs import TINY, compose_config, config_of

from dcdit.__main__ import COMMANDS
from dcdit.checks import annotations, conform
from dcdit.errors import UserError
from dcdit.runtime.imports import is_installed
from dcdit.settings.compose import configuration_of
from dcdit.settings.help import group_names
from dcdit.settings.overrides import TEXT_KEYS, is_text, options_last, quoted
from dcdit.training.batching import check_devices, with_accelerator
from dcdit.training.build import build_trainer
from dcdit.training.callbacks.interrupt import StopOnInterrupt
from dcdit.training.settings import TrainConfig

NUMBERS = st.one_of(
    st.sampled_from(["true", "FALSE", "off", "no", "nan", "inf", "-Inf", "0x10", "1_000", "1e5", ".5", "5.", "007"]),
    st.sampled_from(["+5", "-0", "1.10", "2026-11-26", "2026_11_26"]),
    st.from_regex(r"[+-]?[0-9]{1,3}(_[0-9]{1,4}){0,2}", fullmatch=True),
    st.from_regex(r"[+-]?[0-9]{0,3}\.[0-9]{1,3}([eE][+-]?[0-9]{1,2})?", fullmatch=True),
    st.integers(10**4000, 10**5000).map(lambda number: f"{number:x}".translate(str.maketrans("abcdef", "123456"))),
)


CONFIGS = [getattr(import_module(f"dcdit.{name}"), name).config for name in COMMANDS]
OF_TEXT = [(None, key) for key in sorted(TEXT_KEYS)]
"""Keys of text with the class of their configuration: of sections that no class describes, and all others."""
OF_TEXT += [(config, key) for config in CONFIGS for key in annotations(config) if is_text(key, config)]
OF_TEXT += [
    (CONFIGS[0], "init.teacher"),
    (CONFIGS[0], "match_compute.baseline"),
    (CONFIGS[1], "guidance.weak_checkpoint"),
]


def value_of(word, config=None):
    """What Hydra makes of a word."""
    return OverridesParser.create().parse_override(quoted([word], config)[0]).value()


@pytest.mark.parametrize("value", ["x,y", "1,2"])
def test_a_comma_outside_of_a_sweep_is_told_with_its_remedies(capsys, tmp_path, value):
    result = typed(capsys, tmp_path, "train", "experiment=digits", f"run_name={value}")
    assert result.status == 2
    assert f"run_name={value}: values with commas between them are a sweep, which needs -m" in result.words
    assert f"""needs quotes, "run_name='{value}'"; a list needs brackets, run_name=[{value}]""" in result.words
    result = typed(capsys, tmp_path, "train", "experiment=digits", f"run_name='{value}'", "--cfg", "job")
    assert f"run_name: {value}" in result.out.replace("'", "")


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(OF_TEXT), NUMBERS, NUMBERS)
def test_words_that_look_like_numbers_stay_as_they_are_typed(where, word, other):
    config, key = where
    assert value_of(f"{key}={word}", config) == word
    assert config or value_of(f"+a.{key}={word}") == word
    if max(len(word), len(other)) < 100:
        assert value_of(f"{key}=[{word}, {other},'x y']", config) == [word, other, "x y"]
        for sweep in (f"{word},{other}", f"choice({word},{other})"):
            parsed = OverridesParser.create().parse_override(quoted([f"{key}={sweep}"], config)[0])
            assert [value_of(f"{key}={each}", config) for each in parsed.sweep_string_iterator()] == [word, other]


@pytest.mark.parametrize("key", ["optimizer.lr", "seed", "guidance.scale", "sampler.cache", "ratio.group", "x.y"])
def test_numbers_stay_numbers(key):
    words = [f"{key}={value}" for value in ("1e-4", "1_000", "5", "1,2e0", "[1e0,2]", "null", "true", "range(1,5)")]
    assert quoted(words) == words
    assert value_of("out=null") is None
    assert conform("classes", value_of("classes=[007,1_2,3,cat]"), list[int | str]) == ["007", "1_2", 3, "cat"]


def test_a_run_and_its_sweep_lie_where_they_were_asked_for(tmp_path, capsys):
    result = typed(capsys, tmp_path, "train", "experiment=digits", "run_name=1_2", "--cfg", "job", "--resolve")
    assert "run_dir: runs/1_2\n" in result.out
    result = typed(capsys, tmp_path, "train", "-m", "experiment=digits", "run_name=1e5,1_2", "seed=5", "compression=0")
    assert "runs/1e5_sweep: compression=0" in result.words
    assert {path.name for path in (tmp_path / "runs").iterdir()} >= {"1e5_sweep", "1_2_sweep"}
    typed(capsys, tmp_path, "train", "-m", "experiment=digits", "data.directory=1_0,true", "compression=0")
    assert (tmp_path / "runs/digits_sweep/data.directory_1_0").is_dir()


@pytest.mark.parametrize("group", sorted(group_names()))
def test_a_group_takes_names_alone(group):
    """Hydra takes a text, a list of texts, or a section; of anything else it makes a traceback."""
    for value in ("5", "''", "[]", "1_2", "true", "{}", "[1,2]"):
        found = value_of(f"{group}={value}")
        assert isinstance(found, str | dict) or all(isinstance(name, str) for name in found)
    for value in ("null", "[null]", "a,null", "[[a]]"):
        with pytest.raises(UserError, match=f"{re.escape(value)}: {group} is a group, choose from"):
            quoted([f"{group}={value}"])


@pytest.mark.parametrize(
    ("command", "word"),
    [("train", "logger=null"), ("train", "callbacks=5"), ("extract", "resolution=16"), ("sample", "optimizer=null")],
)
def test_a_group_that_is_no_name_ends_in_one_message(tmp_path, capsys, command, word):
    result = typed(capsys, tmp_path, command, word)
    assert result.status == 2
    assert word.partition("=")[0] in result.words
    assert not list(tmp_path.iterdir())


def test_precisions_and_accelerators_train_or_are_refused(capsys):
    """Each that Lightning knows: a trainer whose weights are float32, or one message before anything is made."""
    config, refused = compose_config(*TINY), []
    precisions = [name for alias in get_args(_PRECISION_INPUT) for name in get_args(alias) or [alias]]
    for precision, accelerator in product([*precisions, None, "fp12"], ["auto", "cpu", "gpu", "cuda", "mps", "tpu"]):
        config.trainer.precision, config.trainer.accelerator = precision, accelerator
        try:
            plan = with_accelerator(configuration_of(TrainConfig, config))
            check_devices(plan)
            trainer = build_trainer(plan, StopOnInterrupt())
        except UserError as error:
            refused.append(str(error))
        else:
            with trainer.init_module():
                assert torch.nn.Linear(1, 1).weight.dtype == torch.float32
    assert len(refused) > 30
    assert all(re.match(r"trainer\.(precision|accelerator)=", message) for message in refused), refused


@pytest.mark.parametrize(("accelerator", "device"), [("cpu", "cpu"), ("auto", "cuda")])
def test_compiling_without_a_compiler_is_refused_before_a_run_is_made(
    tmp_path, capsys, monkeypatch, accelerator, device
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cuda")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    words = (*TINY, "execution.compile=true", f"trainer.accelerator={accelerator}")
    result = typed(capsys, tmp_path, "train", *words)
    assert (result.status, "execution.compile=true needs" in result.words) == (2, True)
    assert not (tmp_path / "runs" / "digits").exists()


def test_slurm_without_its_extra_says_what_to_install(tmp_path, capsys, monkeypatch):
    plugin = import_module("hydra_plugins.dcdit_slurm_launcher")
    launcher, name = plugin.SlurmLauncher, f"{plugin.__name__}.SlurmLauncher"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "hydra_plugins.hydra_submitit_launcher.submitit_launcher", None)
        patch.setitem(Plugins.instance().class_name_to_class, name, reload(plugin).SlurmLauncher)
        result = typed(capsys, tmp_path, "train", "experiment=b_n4", "cluster=slurm", "cluster.dry_run=true")
    reload(plugin)
    plugin.SlurmLauncher = launcher  # the one that Hydra knows
    assert (result.status, "pip install 'dcdit[slurm]'" in result.words) == (2, True)
    assert "Unknown plugin" not in result.words
    assert not list(tmp_path.iterdir())


def test_a_resume_that_lacks_the_settings_prints_a_command_that_works(tmp_path, digits, capsys):
    name = "run_name='it\\'s, 1_2'"
    words = (*TINY, f"data.directory={digits}", "trainer.max_steps=2")
    assert typed(capsys, tmp_path, "train", *words, name).status == 0
    for forgotten in ((), ("trainer=cpu", "logger=wandb")):
        result = typed(capsys, tmp_path, "train", *forgotten, name, "ckpt_path=last")
        assert result.status == 2
        command = next(line for line in (result.out + result.err).splitlines() if line.startswith("python -m dcdit"))
        again = typed(capsys, tmp_path, "train", *shlex.split(command)[3:], "trainer.max_steps=3")
        assert (again.status, "step 3" in again.words) == (0, True), again.words


def test_keys_of_wandb_need_no_plus(monkeypatch):
    words = ("logger=wandb", "logger.wandb.mode=offline", "logger.wandb.tags=[a,1_2]", "logger.wandb.group=2026_1")
    wandb = compose_config(*TINY, *quoted(words)).logger.wandb
    assert (wandb.mode, list(wandb.tags), wandb.group) == ("offline", ["a", "1_2"], "2026_1")
    for word in (
        "logger.wandb.mode=maybe",
        "logger.wandb.tags=5",
        "logger.wandb.group=[a]",
        "logger.csv.save_dir=null",
    ):
        with pytest.raises(UserError, match=word.partition("=")[0]):
            config_of(*TINY, "logger=wandb", word)


OPTIONS = [["-m"], ["--multirun"], ["--resolve"], ["--cfg", "job"], ["-c", "job"], ["--config-dir", "x"], ["-cn", "y"]]


@given(st.lists(st.sampled_from(["a=1", "+b=2", "~c", "d/e=f", "g='-m'"]), max_size=4), st.data())
def test_options_may_stand_anywhere_among_overrides(overrides, data):
    from hydra._internal.utils import get_args_parser

    words = [[word] for word in overrides]
    for option in data.draw(st.lists(st.sampled_from(OPTIONS), max_size=3, unique_by=lambda option: option[0])):
        words.insert(data.draw(st.integers(0, len(words))), option)
    found = get_args_parser().parse_args(options_last([word for part in words for word in part]))
    assert found.overrides == overrides
    options = [part for part in words if part in OPTIONS]
    assert found.multirun == any(part[0] in ("-m", "--multirun") for part in options)
    for key, names in (("cfg", ("--cfg", "-c")), ("config_dir", ("--config-dir",)), ("config_name", ("-cn",))):
        assert getattr(found, key) == next((part[1] for part in options[::-1] if part[0] in names), None)


def test_a_command_takes_its_options_between_keys(capsys, tmp_path):
    result = typed(capsys, tmp_path, "train", "experiment=digits", "--cfg", "job", "seed=1", "--resolve", "run_name=x")
    assert (result.status, result.err) == (0, "")
    last = typed(capsys, tmp_path, "train", "experiment=digits", "seed=1", "run_name=x", "--cfg", "job", "--resolve")
    assert last.out == result.out


@pytest.mark.parametrize("words", [["-m", "--cfg", "job"], ["--resolve"]])
def test_options_that_do_not_go_together_are_told(capsys, tmp_path, words):
    result = typed(capsys, tmp_path, "train", "experiment=digits", *words, "seed=1")
    assert result.status == 2
    assert words[0] in result.words
    assert "can " in result.words


def test_a_launcher_that_hydra_does_not_find_is_no_traceback(tmp_path, capsys, monkeypatch):
    name = "hydra_plugins.dcdit_slurm_launcher.SlurmLauncher"
    monkeypatch.delitem(Plugins.instance().class_name_to_class, name)
    result = typed(capsys, tmp_path, "train", "experiment=b_n4", "cluster=slurm", "cluster.dry_run=true")
    assert (result.status, "pip install 'dcdit[slurm]'" in result.words) == (2, True)


@pytest.mark.skipif(is_installed("hydra_plugins.hydra_optuna_sweeper"), reason="the extra `optuna` is installed")
def test_a_search_without_its_extra_says_what_to_install(tmp_path, capsys):
    result = typed(capsys, tmp_path, "train", *TINY, "hparams_search=optuna")
    assert (result.status, "hydra-optuna-sweeper: pip install 'dcdit[optuna]'" in result.words) == (2, True)
