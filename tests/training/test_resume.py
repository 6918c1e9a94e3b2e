"""A run goes on as if nothing had happened, takes up what was changed, and is refused without being touched."""

import csv
import json
import os
import shutil
import signal
from contextlib import nullcontext
from functools import wraps
from pathlib import Path
from typing import get_args

import lightning.pytorch as pl
import pytest
import torch
from support.configs import NEEDED, TINY, compose_config, config_of, train
from support.damage import rewrite
from support.processes import Command
from support.runs import assert_same_end, differences, load, logged, start, wait_for

from dcdit.checkpoints.load import load_model
from dcdit.checks import shown
from dcdit.errors import TrainingError, UserError
from dcdit.network import DCDiT
from dcdit.runs.changes import KINDS, Kind, kind_of, leaves
from dcdit.runs.progress import progress_of
from dcdit.runs.state import RunState, State
from dcdit.runtime.signals import STOP_SIGNALS, interrupt, shielded
from dcdit.settings.compose import plain
from dcdit.settings.help import choices
from dcdit.training.batching import check_devices, check_precision, with_accelerator
from dcdit.training.callbacks import EMA, Checkpoint, LossWatch, StopOnInterrupt
from dcdit.training.module import DCDiTModule
from dcdit.training.settings import Precision


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".lock"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_every_key_has_a_kind():
    groups = (
        *("model", "data", "trainer", "optimizer", "diffusion", "multi_budget", "callbacks", "logger", "cluster"),
        *("experiment", "alignment"),
    )
    for group in groups:
        for choice in choices(group):
            word = f"{group}={choice}"
            for key, _ in leaves(plain(compose_config(word, *NEEDED.get(word, ())))):
                kind_of(key)
    with pytest.raises(UserError, match=r"recorded with 'surprise\.x', which no configuration has"):
        kind_of("surprise.x")


def test_the_documents_have_the_table():
    page = (Path(__file__).parents[2] / "docs" / "reliability.md").read_text()
    for key, kind in KINDS.items():
        assert f"| `{key}` | {kind.value.split(':')[0]}" in page, key


def test_changed_values_take_effect_and_are_recorded(tiny, caplog):
    run = tiny("run", "trainer.max_steps=3", "optimizer.lr=0.002", "optimizer.schedule=constant")
    caplog.clear()
    tiny("run", "trainer.max_steps=6", "optimizer.lr=0.0005", "optimizer.weight_decay=0.1", "ckpt_path=last")
    assert "optimizer.lr=0.0005 from step 3 on, 0.002 before" in caplog.text
    recorded = {change.key: (change.step, change.before, change.now) for change in RunState.read(run).changes}
    assert recorded["optimizer.lr"] == (3, "0.002", "0.0005")
    assert recorded["trainer.max_steps"] == (3, "3", "6")
    assert load(run)["hyper_parameters"]["optimizer"]["lr"] == 0.0005
    # the same steps by hand: the next three, from the state after three, with the new values
    other = tiny("other", "trainer.max_steps=3", "optimizer.lr=0.002", "optimizer.schedule=constant")
    seen = []
    original = torch.optim.AdamW.step

    def step(self, *arguments, **named):
        seen.append((self.param_groups[0]["lr"], self.param_groups[0]["weight_decay"]))
        return original(self, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        tiny("other", "trainer.max_steps=6", "optimizer.lr=0.0005", "optimizer.weight_decay=0.1",
             "optimizer.schedule=constant", "ckpt_path=last")  # fmt: skip
    assert seen == [(0.0005, 0.1)] * 3
    assert other


def test_a_changed_schedule_is_that_of_the_whole_run(tiny):
    """Resumed with another length, the learning rate is what a run of that length has at these steps."""
    seen: dict[str, list[float]] = {}

    def watch(name: str):
        original = torch.optim.AdamW.step

        def step(self, *arguments, **named):
            seen.setdefault(name, []).append(self.param_groups[0]["lr"])
            return original(self, *arguments, **named)

        return step

    for name, parts in (("whole", [8]), ("parts", [3, 8])):
        for number, steps in enumerate(parts):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch.optim.AdamW, "step", watch(name))
                tiny(name, "optimizer.schedule=cosine", f"trainer.max_steps={steps}", *(["ckpt_path=last"] * number))
    assert seen["parts"][3:] == seen["whole"][3:]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("seed=1", "seed=1: the run was trained with 0 up to step 2"),
        ("data.seed=3", "data.seed=3: the run was trained with 0"),
        ("model.depth=2", "model.depth=2: the run was trained with 1"),
        ("callbacks.ema.decay=0.5", "callbacks.ema.decay=0.5: the run was trained with"),
        ("~callbacks.ema", "callbacks.ema.decay=null: the run was trained with"),
    ],
)
def test_what_may_not_change_is_refused_and_nothing_is_touched(tiny, change, words):
    run = tiny("run", "trainer.max_steps=2")
    before = content(run)
    with pytest.raises(UserError) as caught:
        tiny("run", "trainer.max_steps=4", "ckpt_path=last", change)
    assert words in str(caught.value)
    assert content(run) == before
    tiny("run", "trainer.max_steps=3", "ckpt_path=last")  # and the right command is not
    assert load(run)["global_step"] == 3


def test_a_mixture_is_told(tiny, caplog):
    tiny("run", "trainer.max_steps=2")
    tiny("run", "trainer.max_steps=3", "compression=8", "ckpt_path=last")
    assert "From here on this is another experiment (compression)" in caplog.text


def test_other_latents_are_refused_and_nothing_is_touched(tiny, tmp_path, digits):
    from support.damage import sign

    run = tiny("run", "trainer.max_steps=2")
    other = Path(shutil.copytree(digits, tmp_path / "other"))
    sign(other / "train" / "manifest.json", scale=0.5)
    before = content(run)
    with pytest.raises(UserError, match=r"scale is 1 there and 0\.5 here"):
        tiny("run", "trainer.max_steps=4", "ckpt_path=last", f"data.directory={other}")
    assert content(run) == before


def test_shards_in_another_order_are_refused_and_nothing_is_touched(tiny, tmp_path, digits):
    from support.damage import sign

    run = tiny("run", "trainer.max_steps=2")
    other = Path(shutil.copytree(digits, tmp_path / "other"))
    path = other / "train" / "manifest.json"
    shards = json.loads(path.read_text())["shards"]
    sign(path, shards=[shards[1], shards[0], *shards[2:]])
    before = content(run)
    with pytest.raises(UserError, match=r"the shards are others than those .* or stand in another order"):
        tiny("run", "trainer.max_steps=4", "ckpt_path=last", f"data.directory={other}")
    assert content(run) == before


@pytest.mark.parametrize(("first", "then"), [("null", "2"), ("2", "null"), ("4", "2")])
def test_another_split_of_the_batch_goes_on_at_the_next_sample(tiny, first, then):
    """The samples of every step are those of an undisturbed run, whatever its micro-batches."""
    steps: dict[str, dict[int, list[int]]] = {}

    def watched(name: str, *overrides: str) -> None:
        original = DCDiTModule.training_step

        def step(self, batch, number):
            steps.setdefault(name, {}).setdefault(self.trainer.global_step, []).extend(
                latent.sum().item() for latent in batch[0].double()
            )
            return original(self, batch, number)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DCDiTModule, "training_step", step)
            tiny(name, "trainer.val_check_interval=3", *overrides)

    watched("whole", "trainer.max_steps=7")
    watched("parts", "trainer.max_steps=4", f"execution.max_micro_batch={first}")
    watched("parts", "trainer.max_steps=7", f"execution.max_micro_batch={then}", "ckpt_path=last")
    assert steps["parts"] == steps["whole"]
    whole, parts = (tiny.folder / name for name in ("whole", "parts"))
    assert load(whole)["LatentDataModule"] == load(parts)["LatentDataModule"]
    assert validated(whole) == validated(parts) == [2, 5]


def validated(run: Path) -> list[int]:
    """Steps, counted from 0, that were validated."""
    found = []
    for file in sorted(run.glob("logs/version_*/metrics.csv")):
        with file.open() as stream:
            found += [int(row["step"]) for row in csv.DictReader(stream) if row.get("val/diffusion_loss")]
    return found


def test_what_is_logged_is_that_of_the_whole_batch(tiny):
    settings = ("trainer.max_steps=1", "multi_budget=none", "ratio.group=null", "model.label_dropout=0")
    losses: list[float] = []
    original = DCDiTModule.training_step

    def step(self, batch, number):
        losses.append(original(self, batch, number))
        return losses[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DCDiTModule, "training_step", step)
        run = tiny("run", *settings, "execution.max_micro_batch=2")
    assert len(losses) == 4
    assert float(logged(run)[0, "train/loss"]) == pytest.approx(float(torch.stack(losses).mean()), rel=1e-6)


# ---- stopping ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_every_stop_signal_saves_at_once_and_validates_nothing(tiny, number):
    run, seen = [], []

    def send(self, trainer, *ignored):
        if trainer.global_step == 3 and not seen:
            seen.append(1)
            os.kill(os.getpid(), number)

    before = signal.signal(number, signal.SIG_DFL)  # whoever started the tests may have it ignored
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Checkpoint, "on_train_batch_start", send)
            run = tiny("run", "trainer.max_steps=50", "trainer.val_check_interval=40")
    finally:
        signal.signal(number, before)
    state = RunState.read(run)
    assert (state.state, state.step) == (State.INTERRUPTED, 4)
    assert load(run)["global_step"] == 4
    assert validated(run) == []


def test_a_signal_within_a_due_validation_finds_the_step_saved(tiny):
    found = []

    def look(self, *ignored):
        found.append((self.trainer.global_step, sorted(path.name for path in tiny.folder.rglob("*.ckpt"))))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DCDiTModule, "on_validation_epoch_start", look, raising=False)
        tiny("run", "trainer.max_steps=4", "trainer.val_check_interval=2")
    assert [step for step, _ in found] == [2, 4]
    assert "step_00000002.ckpt" in found[0][1]


def test_a_second_interrupt_does_not_tear_a_save():
    done = []
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012 - when it is raised is the point
        with shielded():
            interrupt()
            with shielded():
                done.append("inner")
            done.append("outer")
        done.append("never")
    assert done == ["inner", "outer"]
    with pytest.raises(KeyboardInterrupt):
        interrupt()
    with shielded():
        pass


def test_who_ignores_hangups_is_not_stopped_by_them():
    before = {signum: signal.getsignal(signum) for signum in STOP_SIGNALS}
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        callback = StopOnInterrupt()
        callback.on_train_start(None, None)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGUSR1) == callback._handle
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@pytest.mark.parametrize("error", [None, TrainingError("stopped"), KeyboardInterrupt()], ids=repr)
def test_training_leaves_no_handler_of_signals_behind(tiny, monkeypatch, error):
    """Else a notebook, a sweep or a worker that is forked later would not end when it is told to."""
    before = {signum: signal.getsignal(signum) for signum in STOP_SIGNALS}
    during = []

    def step(self, *args):
        during.append(signal.getsignal(signal.SIGTERM))
        if error:
            raise error
        return original(self, *args)

    original = DCDiTModule.training_step
    monkeypatch.setattr(DCDiTModule, "training_step", step)
    with nullcontext() if error is None else pytest.raises((type(error), SystemExit)):
        tiny("run", "trainer.max_steps=1")
    assert isinstance(during[0].__self__, StopOnInterrupt)
    assert {signum: signal.getsignal(signum) for signum in STOP_SIGNALS} == before


def test_a_second_ctrl_c_in_a_real_process(digits, tmp_path):
    run = tmp_path / "run"
    process = start(run, digits, "trainer.max_steps=100000", "callbacks.checkpoint.every_n_steps=1")
    wait_for(lambda: progress_of(run, "").step > 3 or process.poll() is not None)
    for _ in range(2):
        os.kill(process.pid, signal.SIGINT)
    assert process.wait(60) in (0, 130)
    last = load(run)
    assert last["global_step"] > 3
    assert not list((run / "checkpoints").glob(".*"))
    assert isinstance(process, Command)


# ---- health ------------------------------------------------------------------------------------------------------


def spoil(steps: range):
    """Training whose gradients are not finite at ``steps``."""
    original = DCDiTModule.training_step

    def step(self, batch, number):
        loss = original(self, batch, number)
        return loss * float("nan") if self.trainer.global_step in steps else loss

    return step


def test_no_checkpoint_is_written_within_a_streak_of_skipped_steps(tiny):
    settings = ("callbacks.checkpoint.every_n_steps=2", "callbacks.checkpoint.keep=1", "nonfinite_limit=4")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DCDiTModule, "training_step", spoil(range(5, 100)))
        with pytest.raises(TrainingError, match="resume with ckpt_path=last"):
            tiny("run", *settings, "trainer.max_steps=30")
    run = tiny.folder / "run"
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"last.ckpt", "step_00000004.ckpt"}
    tiny("run", *settings, "trainer.max_steps=8", "ckpt_path=last")
    tiny("undisturbed", *settings, "trainer.max_steps=8")
    for key in ("state_dict", "current_model_state", "optimizer_states"):
        assert differences(load(run)[key], load(tiny.folder / "undisturbed")[key]) == []


def test_a_loss_that_explodes_keeps_a_checkpoint_from_before(tiny, caplog):
    settings = ("callbacks.checkpoint.every_n_steps=2", "callbacks.checkpoint.keep=1", "callbacks.loss_watch.window=4")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DCDiTModule, "_log", _louder(DCDiTModule._log))
        run = tiny("run", *settings, "trainer.max_steps=12")
    assert caplog.text.count("the loss is") == 1
    assert {path.name for path in (run / "checkpoints").iterdir()} == {
        "last.ckpt", "step_00000012.ckpt", "before_step_00000008.ckpt"
    }  # fmt: skip
    assert load(run, "before_step_00000008.ckpt")["global_step"] == 6
    with pytest.raises(UserError, match="factor=1 must be greater than 1"):
        LossWatch(factor=1.0, window=4)


def _louder(log):
    def louder(self, metrics):
        if self.trainer.global_step >= 7:
            metrics["train/loss"] = metrics["train/loss"] * 100
        log(self, metrics)

    return louder


# ---- what a run says of itself -------------------------------------------------------------------------------------


def test_a_failure_through_instantiate_is_told_as_a_person_would_see_it(tmp_path, digits):
    from dcdit.runs.failure import describe_failure

    (tmp_path / "run").mkdir()
    config = compose_config(*TINY, f"data.directory={digits}", "+callbacks.x._target_=nowhere.Thing")
    try:
        train(config, tmp_path / "run")
    except Exception as error:
        words = describe_failure(error)
    assert "InstantiationException" not in words
    assert "callbacks.x" in words


def test_attempts_are_counted_when_the_state_was_lost(tmp_path, monkeypatch):
    from dcdit.runs.resume import state_at_start

    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    assert state_at_start(None, tmp_path, 10).starts == 4
    with pytest.raises(UserError, match="the run died 3 times in a row"):
        state_at_start(None, tmp_path, 10, max_restarts=2)
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    assert state_at_start(None, tmp_path, 10).starts == 1


def test_keys_of_each_kind():
    keys = {"optimizer.lr": Kind.EFFECT, "model.width": Kind.NEVER, "compression": Kind.REMARK, "run_name": Kind.UNSEEN}
    keys |= {"execution.capacity": Kind.REMARK, "execution.compile": Kind.EFFECT}
    assert {key: kind_of(key) for key in keys} == keys


def test_a_run_whose_checkpoints_are_gone_is_not_begun_anew_over_its_record(tiny, capsys):
    run = tiny("run", "trainer.max_steps=2")
    before = (run / "state.json").read_bytes()
    shutil.rmtree(run / "checkpoints")
    for words in (("ckpt_path=auto",), ()):
        with pytest.raises(UserError, match="2 steps of this run were done and saved, but its checkpoints are gone"):
            tiny("run", "trainer.max_steps=4", *words)
    assert (run / "state.json").read_bytes() == before


@pytest.mark.parametrize("name", ["../x", "a/../../x", ".."])
def test_a_name_of_a_run_is_no_way_out_of_the_runs(name):
    with pytest.raises(UserError, match="run_name="):
        config_of("experiment=digits", f"run_name='{name}'")


# ---- what is wrong in silence --------------------------------------------------------------------------------------


EVERY_OTHER = ("callbacks.checkpoint.every_n_steps=2", "callbacks.checkpoint.keep=null")


def names_in(run: Path) -> set[str]:
    return {path.name for path in (run / "checkpoints").iterdir()}


@pytest.mark.parametrize("spoilt", ["weights", "average"])
@pytest.mark.parametrize("first", [0, 3])
def test_a_run_whose_last_step_ruins_it_is_not_finished_and_can_be_repaired(tiny, monkeypatch, spoilt, first):
    """Weights after a step of infinite length; or the average alone."""
    run = tiny.folder / "run"
    if first:
        tiny("run", f"trainer.max_steps={first}")
    go_on = ("ckpt_path=last",) * bool(first)
    ruin = ("optimizer.lr=1e38", "optimizer.weight_decay=100", "optimizer.lr_warmup_steps=0")
    with monkeypatch.context() as patch:
        if spoilt == "average":
            ruin = ()
            patch.setattr(EMA, "average_tensors", lambda self: [torch.tensor([1.0, torch.inf])])
        with pytest.raises(TrainingError, match=r"The (weights|averages of the weights) are not finite, at step"):
            tiny("run", *go_on, *ruin, f"trainer.max_steps={first + 1}")
    assert names_in(run) == {"last.ckpt", "step_00000003.ckpt"} if first else not (run / "checkpoints").exists()
    assert RunState.read(run).state is not State.FINISHED
    tiny("run", *go_on, f"trainer.max_steps={first + 1}")
    assert RunState.read(run).state is State.FINISHED


def other_than(key: str, value):
    """A checkpoint whose network or process is another than its recorded settings say, of the same shapes."""

    def change(values: dict) -> None:
        section, name = key.split(".")
        values["hyper_parameters"][section][name] = value

    return change


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.heads", 4),
        ("model.smoothing_sigma", 2.0),
        ("model.smoothing_sigma", None),
        ("model.freq_shift", 1),
        ("model.groups", 2),
        ("model.grid", 12),
        ("model.label_dropout", 0.5),
        ("diffusion.weighting", "min_snr"),
        ("diffusion.name", "flow"),
    ],
)
def test_what_a_checkpoint_says_of_network_and_process_is_compared(trained_run, digits, key, value):
    rewrite(trained_run / "checkpoints" / "last.ckpt", other_than(key, value))
    before = content(trained_run)
    words = (f"ckpt_path={trained_run}/checkpoints/last.ckpt", "trainer.max_steps=5")
    with pytest.raises(UserError, match=rf"{key}=\S+ ckpt_path=\S+ was trained with {shown(value)}"):
        train(compose_config(*TINY, f"data.directory={digits}", *words), trained_run)
    assert content(trained_run) == before


@pytest.mark.parametrize("key", ["surprise", "surprise.x", "model.surprise", ""])
def test_recorded_settings_that_no_configuration_has_are_told(trained_run, digits, key):
    rewrite(trained_run / "checkpoints" / "last.ckpt", lambda values: values["settings"].update({key: 1}))
    words = (f"ckpt_path={trained_run}/checkpoints/last.ckpt", "trainer.max_steps=5")
    with pytest.raises(UserError, match=f"{key}.*, "):
        train(compose_config(*TINY, f"data.directory={digits}", *words), trained_run)


def test_what_a_checkpoint_says_counts_more_than_its_name(tiny):
    run = tiny("run", "trainer.max_steps=4", *EVERY_OTHER)
    folder = run / "checkpoints"
    forged = shutil.copy(folder / "step_00000002.ckpt", folder / "step_00000099.ckpt")
    with pytest.raises(UserError, match=r"step_00000099.ckpt holds step 2"):
        tiny("run", "trainer.max_steps=5", f"ckpt_path={forged}")
    with pytest.raises(UserError, match=r"step_00000099.ckpt holds step 2"):
        load_model(forged)
    (folder / "step_00000098.ckpt").mkdir()  # no file, and not pruned
    tiny("run", "trainer.max_steps=5", "ckpt_path=last", "callbacks.checkpoint.keep=1")
    assert load(run)["global_step"] == 5
    assert names_in(run) == {"last.ckpt", "step_00000005.ckpt", "step_00000098.ckpt", "abandoned_step_00000099.ckpt"}


@pytest.fixture
def idle(monkeypatch):
    """Give networks trainable parameters that no forward pass uses."""
    construct = DCDiT.__init__

    @wraps(construct)
    def with_idle(self, *arguments, **named):
        construct(self, *arguments, **named)
        self.idle = torch.nn.Linear(3, 3)

    monkeypatch.setattr(DCDiT, "__init__", with_idle)


@pytest.mark.usefixtures("idle")
def test_parameters_without_a_gradient_have_no_state_and_no_other_may_lack_it(tiny):
    whole = tiny("whole", "trainer.max_steps=4", "optimizer.schedule=constant")
    parts = tiny("parts", "trainer.max_steps=2", "optimizer.schedule=constant")
    last = parts / "checkpoints" / "last.ckpt"
    (optimizer,) = load(parts)["optimizer_states"]
    names = [name for name, _ in load_model(parts).network.named_parameters()]
    assert [names[number] for number in optimizer["untouched"]] == ["idle.weight", "idle.bias"]
    content = last.read_bytes()
    idle, used = optimizer["untouched"][0], optimizer["state"][0]
    for damage in (
        lambda optimizer: optimizer["state"].pop(0),
        lambda optimizer: optimizer.pop("untouched"),
        lambda optimizer: optimizer["state"].clear(),
        lambda optimizer: optimizer["state"].update({idle: used}),
        lambda optimizer: optimizer.update(untouched=[0, *optimizer["untouched"]]),
    ):
        last.unlink()
        last.write_bytes(content)
        rewrite(last, lambda values, damage=damage: damage(values["optimizer_states"][0]))
        with pytest.raises(UserError, match="the optimiser's state of parameter"):
            tiny("parts", "trainer.max_steps=4", "optimizer.schedule=constant", f"ckpt_path={last}")
    last.write_bytes(content)
    tiny("parts", "trainer.max_steps=4", "optimizer.schedule=constant", "ckpt_path=last")
    assert_same_end(parts, whole)


def test_going_back_leaves_the_later_steps_aside(tiny):
    """Else the next resume would take the newest of them: the branch that was left."""
    run = tiny("run", "trainer.max_steps=6", *EVERY_OTHER)
    folder = run / "checkpoints"
    left = load(run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DCDiTModule, "on_train_batch_start", lambda *ignored: interrupt_at_once(), raising=False)
        with pytest.raises(RuntimeError, match="killed"):
            tiny("run", "trainer.max_steps=6", "optimizer.lr=0.1", f"ckpt_path={folder}/step_00000002.ckpt")
    assert names_in(run) == {"last.ckpt", "step_00000002.ckpt", *(f"abandoned_step_{n:08d}.ckpt" for n in (4, 6))}
    assert load(run)["global_step"] == 2
    tiny("run", "trainer.max_steps=6", "optimizer.lr=0.1", "ckpt_path=last")
    assert differences(load(run)["state_dict"], left["state_dict"])
    assert differences(load(run, "abandoned_step_00000006.ckpt"), left) == []


def interrupt_at_once() -> None:
    raise RuntimeError("killed")


@pytest.mark.parametrize("gone", ["logs", "logs is a file", "checkpoints"])
def test_what_is_deleted_meanwhile_costs_no_weights(tiny, caplog, gone):
    run = tiny.folder / "run"

    def delete(self, trainer, *ignored):
        if trainer.global_step == 2:
            shutil.rmtree(run / gone.split()[0])
            if gone == "logs is a file":
                (run / "logs").touch()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LossWatch, "on_train_batch_start", delete)
        words = ("trainer.max_steps=5", "callbacks.checkpoint.every_n_steps=1")
        tiny("run", *words)
        patch.undo()
    assert load(run)["global_step"] == 5
    assert RunState.read(run).state is State.FINISHED
    if gone == "logs":
        assert "logs/version_0 was deleted, and is made again" in caplog.text
        assert {step for step, _ in logged(run)} == {2, 3, 4}
    elif gone == "logs is a file":
        assert caplog.text.count("CSVLogger cannot log (") == 1


@pytest.mark.parametrize("precision", get_args(Precision))
@pytest.mark.parametrize("accelerator", ["cpu", "auto"])
def test_what_is_recorded_is_what_computes(precision, accelerator, monkeypatch):
    """Lightning takes another precision without a word where it knows better: such a choice is refused."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    try:
        plan = with_accelerator(
            config_of("experiment=digits", f"trainer.precision={precision}", f"trainer.accelerator={accelerator}")
        )
        check_devices(plan)
    except UserError as error:
        assert f"trainer.precision={precision}" in str(error)  # noqa: PT017 - some are refused
        return
    assert plan.trainer.accelerator == "cpu"
    if precision == "transformer-engine":
        pytest.skip("not installed")
    trainer = pl.Trainer(accelerator="cpu", precision=precision, logger=False)
    recorded = {"bf16": "bf16-mixed", 32: "32-true", 64: "64-true"}.get(precision, precision)
    assert trainer.precision == recorded


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_autocast_that_turns_itself_off_is_refused(precision, monkeypatch):
    """As on an old macOS, which does not know bf16."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    plan = config_of("experiment=digits", f"trainer.precision={precision}", "trainer.accelerator=mps")
    with pytest.raises(UserError, match=f"trainer.precision={precision}: trainer.accelerator=mps would compute"):
        check_precision(plan)
