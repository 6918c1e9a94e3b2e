"""``execution.max_micro_batch=auto``; that a real GPU runs out of memory is for ``tests/test_gpu.py``."""

from dataclasses import replace

import pytest
import torch
from support.configs import PLAIN_DIT, TINY, config_of
from support.runs import assert_same_end

from dcdit.errors import TrainingError, UserError
from dcdit.runs.state import RunState
from dcdit.settings.errors import explain
from dcdit.training import fitting
from dcdit.training.fitting import largest_micro_batch, trial_peak, with_micro_batch

AUTO = "execution.max_micro_batch=auto"


@pytest.mark.parametrize(("room", "expected"), [(100, 48), (48, 48), (47, 24), (13, 12), (5, 4), (1, 1)])
def test_the_largest_divisor_of_the_batch_that_fits_is_taken(room, expected):
    tried = []

    def fits(size):
        tried.append(size)
        if size > 2 * room:
            raise torch.OutOfMemoryError("too much")
        return size <= room

    assert largest_micro_batch(fits, config_of(*TINY, "data.batch_size=48")) == expected
    assert tried == sorted(tried, reverse=True)


def test_not_even_one_sample():
    with pytest.raises(UserError, match="not even one sample fits"):
        largest_micro_batch(lambda size: False, config_of(*TINY))


@pytest.fixture
def gpu(monkeypatch):
    """A GPU with room for four samples; returns the sizes that were tried."""
    tried = []

    def peak(config, size, device):
        tried.append(size)
        return 10 * size

    monkeypatch.setattr(fitting, "trial_peak", peak)
    properties = type("Properties", (), {"total_memory": 50})
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: properties)
    return tried


def on_gpu(*overrides):
    config = config_of(*TINY, AUTO, *overrides)
    return replace(config, trainer=replace(config.trainer, accelerator="cuda"))


def test_it_is_found_once_and_a_run_that_goes_on_takes_the_same(gpu, tiny):
    assert with_micro_batch(on_gpu(), None).execution.max_micro_batch == 4
    assert gpu == [8, 4]
    before = RunState.read(tiny("run", "trainer.max_steps=1", "execution.max_micro_batch=2"))
    assert with_micro_batch(on_gpu(), before).execution.max_micro_batch == 2
    assert gpu == [8, 4]
    with pytest.raises(UserError, match=r"find it with trainer\.devices=1"):
        with_micro_batch(on_gpu("trainer.devices=2"), None)


def test_on_a_cpu_the_batch_is_not_split_and_that_is_told(tiny, caplog):
    run = tiny("auto", "trainer.max_steps=2", AUTO)
    assert "execution.max_micro_batch=auto splits no batch on cpu" in caplog.text
    assert "steps of 8 samples, cpu 32-true, in " in caplog.text
    assert RunState.read(run).settings["execution.max_micro_batch"] is None
    assert_same_end(run, tiny("whole", "trainer.max_steps=2"))


@pytest.mark.parametrize(
    "overrides", [(), ("execution.capacity=0.3",), ("diffusion=flow",), ("optimizer=muon",), PLAIN_DIT]
)
def test_the_trial_is_a_step_that_runs(overrides):
    assert trial_peak(config_of(*TINY, *overrides), 3, torch.device("cpu")) == 0


OUT = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 142.00 MiB. GPU 0 has a total capacity of 79.18 GiB"
)


def test_a_run_that_outgrows_the_memory_says_what_to_try(tiny, monkeypatch):
    def training_step(self, batch, batch_idx):
        raise OUT

    monkeypatch.setattr("dcdit.training.module.DCDiTModule.training_step", training_step)
    with pytest.raises(TrainingError) as told:
        tiny("run", "trainer.max_steps=1")
    assert str(told.value).startswith("step 0, data.batch_size=8: CUDA out of memory. Take execution.capacity=auto")
    with pytest.raises(TrainingError, match=r"or an execution\.max_micro_batch below 4; or"):
        tiny("third", "trainer.max_steps=1", "execution.max_micro_batch=4")
    everything = ["execution.capacity=0.5", "execution.max_micro_batch=1", "execution.activation_checkpointing=true"]
    with pytest.raises(TrainingError, match=r"memory\. Take a smaller data\.batch_size\. The same command"):
        tiny("other", "trainer.max_steps=1", *everything)


def test_other_commands_say_so_too():
    assert explain(OUT) == "CUDA out of memory: take a smaller batch_size, or precision=bf16"
