"""Commands as functions of a configuration, without a command line."""

from dataclasses import replace

import pytest
from support.configs import TINY

from dcdit.checks import checking
from dcdit.errors import UserError
from dcdit.runs.state import State
from dcdit.sample import SampleConfig, sample
from dcdit.train import train


def test_commands_are_called_from_python_and_check_each_section_once(digits, tmp_path, monkeypatch):
    made = []
    call = checking.call_checked
    monkeypatch.setattr(
        checking, "call_checked", lambda target, values, *more: made.append(target) or call(target, values, *more)
    )
    words = (*TINY, "trainer.max_steps=1", f"data.directory={digits}", f"run_dir={tmp_path}/run")
    asked = train.compose(*words)
    sections = [target for target in made if target.__name__.endswith("Settings")]
    assert sections
    outcome = train(asked)
    assert (outcome.state, outcome.step) == (State.FINISHED, 1)
    assert [target for target in made if target in sections] == sections
    assert len(set(sections)) == len(sections)

    config = sample.compose(f"checkpoint={tmp_path}/run", "sampler.steps=2", "per_class=1", "frames=0")
    assert isinstance(config, SampleConfig)
    folder = sample(replace(config, classes=[3], out=f"{tmp_path}/samples"))
    assert (folder / "samples.png").is_file()
    with pytest.raises(UserError, match="per_class=0 is outside"):
        replace(config, per_class=0)
    with pytest.raises(UserError, match=r"sampler\.steps=0"):
        sample.compose("checkpoint=x", "sampler.steps=0")


def test_mistakes_from_python_are_told_as_on_the_command_line():
    with pytest.raises(
        UserError, match=r"guidance\.drop_fractoin=0\.5: there is no such key, did you mean drop_fraction"
    ):
        sample.compose("checkpoint=digits", "guidance.drop_fractoin=0.5")
    with pytest.raises(UserError, match=r"sampler/dpm'[\s\S]*available: auto, ddim"):
        sample.compose("checkpoint=digits", "sampler=dpm")
    with pytest.raises(UserError, match=r"sample takes a SampleConfig, not a str: call sample\(sample\.compose"):
        sample("checkpoint=digits")
    with pytest.raises(UserError, match="train takes a TrainConfig, not a SampleConfig"):
        train(sample.compose("checkpoint=digits"))
