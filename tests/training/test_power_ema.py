"""Averages whose length is chosen after training: exact against averages that are tracked, and resumed bit for bit."""

import os
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.configs import call, check, compose_config
from support.damage import damaged

from dcdit import ema, sample
from dcdit.checkpoints.load import load_model, read_trained
from dcdit.checkpoints.power_ema import coefficients, decay, exponent, snapshots_in, write_snapshot
from dcdit.errors import UserError
from dcdit.training.callbacks import PowerEMA

KEPT = ("callbacks.power_ema.lengths=[0.05,0.1]", "callbacks.power_ema.every_n_steps=2", "callbacks.power_ema.keep=4")


@given(length=st.floats(0.005, 0.28))
def test_the_exponent_gives_the_length(length):
    gamma = exponent(length)
    assert gamma > 0
    assert (gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)) == pytest.approx(length**2, rel=1e-9)


@given(length=st.floats(0.01, 0.28), steps=st.integers(1, 300))
@settings(max_examples=30, deadline=None)
def test_the_average_that_is_tracked_is_the_power_function(length, steps):
    """Weight of step i in the average after t steps: the integral of the profile from i - 1 to i."""
    gamma, weights = exponent(length), np.zeros(steps)
    for step in range(1, steps + 1):
        kept = decay(step, gamma)
        weights *= kept
        weights[step - 1] += 1 - kept
    edges = (np.arange(steps + 1) / steps) ** (gamma + 1)
    assert weights == pytest.approx(np.diff(edges), abs=1e-12)
    middle = (np.arange(steps) + 0.5) / steps
    if steps > 100 and length > 0.05:
        spread = np.sqrt(weights @ middle**2 - (weights @ middle) ** 2)
        assert spread == pytest.approx(length, rel=0.05)


def tracked(path, length):
    """An average of a walk, step by step."""
    gamma, average = exponent(length), np.zeros(path.shape[1])
    for step, weights in enumerate(path, 1):
        average += (1 - decay(step, gamma)) * (weights - average)
    return average


@pytest.mark.parametrize(("length", "bound"), [(0.03, 0.05), (0.05, 1e-9), (0.07, 0.002), (0.1, 1e-9), (0.2, 0.01)])
def test_any_length_is_put_together_from_two(length, bound):
    """Against the average of that length tracked directly, on a random walk of 20 weights."""
    path = np.cumsum(np.random.default_rng(0).standard_normal((2400, 20)), axis=0)
    at = list(range(200, 2401, 200))
    known = [(step, each) for step in at for each in (0.05, 0.1)]
    found, error = coefficients(known, 2400, length)
    averages = np.stack([tracked(path[:step], each) for step, each in known])
    direct, last = tracked(path, length), path[-1]
    assert np.linalg.norm(found @ averages - direct) <= bound * np.linalg.norm(last - direct) + 1e-9
    assert found.sum() == pytest.approx(1, abs=1e-9)
    assert error <= max(bound * 5, 1e-6)
    if length in (0.05, 0.1):
        assert found[known.index((2400, length))] == pytest.approx(1)


@given(every=st.integers(1, 50), keep=st.integers(2, 20), steps=st.integers(1, 600))
@settings(max_examples=40, deadline=None)
def test_snapshots_are_bounded_and_evenly_spaced(every, keep, steps):
    callback, there = PowerEMA([0.05], "unused", every, keep), set()
    for step in range(1, steps + 1):
        distance = callback.distance(step)
        if step % distance == 0:
            there = {each for each in (*there, step) if each % distance == 0}
        assert len(there) <= keep
    if steps >= every:
        assert there == set(range(distance, steps + 1, distance)) or len(there) >= keep // 2
        assert sorted(there) == list(range(min(there), max(there) + 1, min(there)))


def states(run, length):
    averages = read_trained(run / "checkpoints" / "last.ckpt").averages
    return averages.tracked[length]


def test_training_keeps_them_and_any_command_takes_them(tiny, tmp_path, capsys):
    run = tiny("run", "trainer.max_steps=14", *KEPT)
    other = tiny("direct", "trainer.max_steps=14", "callbacks.power_ema.lengths=[0.08]")
    assert sorted(snapshots_in(run / "averages")) == [4, 8, 12]
    direct = states(other, 0.08)
    raw = load_model(run, "raw").network
    found = load_model(run, "ema@0.08").network
    distance = gap = 0.0
    for name, parameter in found.named_parameters():
        distance += float((parameter.detach() - direct[name]).square().sum())
        gap += float((raw.get_parameter(name).detach() - direct[name]).square().sum())
    assert distance**0.5 < 0.02 * gap**0.5  # of a walk of 14 steps
    kept = states(run, 0.05)
    for name, parameter in load_model(run, "ema@0.05").network.named_parameters():
        torch.testing.assert_close(parameter, kept[name], atol=1e-6, rtol=1e-5)
    # as folders, and where weights are chosen
    folders = call(ema, compose_config(f"checkpoint={run}", "length=[0.05,0.08]", name="ema"))
    assert [folder.relative_to(run).as_posix() for folder in folders] == ["ema/0.05", "ema/0.08"]
    shown = capsys.readouterr().out
    assert "EMA weights of length 0.08 (of 8 averages, " in shown
    written = load_model(folders[1]).network
    for name, parameter in found.named_parameters():
        assert torch.equal(parameter, written.get_parameter(name))
    call(
        sample,
        compose_config(f"checkpoint={run}", "weights=ema@0.08", "sampler.steps=2", f"out={tmp_path}/x", name="sample"),
    )
    with pytest.raises(UserError, match=r"weights=ema@<length>, <length>=0.9 is outside \[0.005, 0.28\]"):
        load_model_with("ema@0.9")
    with pytest.raises(UserError, match=r"keeps no averages .* callbacks.power_ema.lengths"):
        load_model("digits", "ema@0.08")


def load_model_with(weights):
    config = compose_config("checkpoint=x", f"weights={weights}", name="sample")
    check(sample, config)


def test_the_ordinary_average_and_the_weights_do_not_notice(tiny):
    with_them, without = tiny("with", "trainer.max_steps=4", *KEPT), tiny("without", "trainer.max_steps=4")
    one, other = (read_trained(run / "checkpoints" / "last.ckpt") for run in (with_them, without))
    for kind in ("ema", "raw"):
        for name, tensor in one.of_kind(kind).items():
            assert torch.equal(tensor, other.of_kind(kind)[name])
    assert other.averages is None
    assert not (without / "averages").exists()


def test_a_run_that_goes_on_keeps_the_same_averages(tiny):
    constant = "optimizer.schedule=constant"  # or the lengths of the two parts would show
    whole = tiny("whole", "trainer.max_steps=10", constant, *KEPT)
    parts = tiny("parts", "trainer.max_steps=5", constant, *KEPT)
    write_snapshot(parts / "averages" / "step_00000008.safetensors", {0.05: {"x": torch.zeros(1)}})  # of a lost future
    tiny("parts", "trainer.max_steps=10", "ckpt_path=last", constant, *KEPT)
    for length in (0.05, 0.1):
        one, other = states(whole, length), states(parts, length)
        for name, tensor in one.items():
            assert torch.equal(tensor, other[name])
    names = [sorted(path.name for path in (run / "averages").iterdir()) for run in (whole, parts)]
    assert names[0] == names[1]
    for name in names[0]:
        assert (whole / "averages" / name).read_bytes() == (parts / "averages" / name).read_bytes()
    with pytest.raises(UserError, match=r"callbacks.power_ema.lengths=\[0.1\]: the run was trained with \[0.05, 0.1\]"):
        tiny("parts", "trainer.max_steps=12", "ckpt_path=last", constant, "callbacks.power_ema.lengths=[0.1]")


def test_snapshots_that_are_not_as_they_were_written(tiny):
    """Damaged, of another step, of another network, or no file; one that this run did not write is not used."""
    run = tiny("run", "trainer.max_steps=6", *KEPT)
    path = run / "averages" / "step_00000004.safetensors"
    content = path.read_bytes()
    other = path.with_name("step_00000002.safetensors")
    whole = load_model(run, "ema@0.07").digest
    for changed in (content[:200], damaged(content, ("flip", 0.99, 3)), content + b"0", other.read_bytes()):
        path.write_bytes(changed)
        with pytest.raises(UserError, match=r"step_00000004.safetensors is damaged, or not .* at step 4.* remove it"):
            load_model(run, "ema@0.07")
    write_snapshot(path, {0.05: {"x": torch.zeros(1)}, 0.1: {"x": torch.zeros(1)}})
    with pytest.raises(UserError, match=r"not the snapshot that this run wrote at step 4"):
        load_model(run, "ema@0.07")
    path.write_bytes(content)
    shutil.copy(path, path.with_name("step_00000005.safetensors"))
    assert load_model(run, "ema@0.07").digest == whole
    path.unlink()
    os.mkfifo(path)
    assert load_model(run, "ema@0.07").digest != whole  # of fewer averages


def test_averages_that_lack_a_parameter_are_refused(tiny):
    """Else another average would stand in for it."""
    run = tiny("run", "trainer.max_steps=2", *KEPT)
    path = run / "checkpoints" / "last.ckpt"
    values = torch.load(path, weights_only=True)
    del values["callbacks"]["PowerEMA"]["averages"]["0.05"]["residual.weight"]
    torch.save(values, path)
    with pytest.raises(UserError, match=r"parameter residual.weight has shape none"):
        load_model(run, "ema@0.07")
