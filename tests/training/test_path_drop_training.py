"""Path drop in training: which samples leave the backbone out, what they know, and what losses make of them."""

from types import SimpleNamespace

import pytest
import torch
from support.configs import PLAIN_DIT, TINY, call, compose_config, config_of, module_of, train
from support.runs import assert_same_end, load

from dcdit import sample
from dcdit.data.stream import Batch
from dcdit.errors import UserError
from dcdit.network.packing import make_packing
from dcdit.network.routing import Routing
from dcdit.training.alignment.losses import DispersiveLoss, GridAlignment
from dcdit.training.auxiliary import HiddenStates, Noisy
from dcdit.training.build import match_compute
from dcdit.training.objective import drop_path

WORDS = (*TINY, "data.batch_size=64", "multi_budget.path_drop=0.5")


def forwards(monkeypatch, *words, step=10):
    """What the network is given in a training step: labels and drop fractions, with and without path drop."""
    module = module_of(config_of(*WORDS, *words))
    trainer = SimpleNamespace(global_step=step, world_size=1, accumulate_grad_batches=1, log_every_n_steps=1)
    monkeypatch.setattr(type(module), "trainer", trainer)
    monkeypatch.setattr(type(module), "global_rank", 0, raising=False)
    monkeypatch.setattr(module, "log_dict", lambda values, **_: None)
    given = []
    module.network.register_forward_pre_hook(lambda _, arguments: given.append(arguments[2:4]))
    module.training_step(Batch(torch.randn(64, 1, 8, 8), torch.arange(64) % 10), 0)
    (found,) = given
    return found


def test_each_sample_leaves_the_backbone_out_with_the_probability_asked_for():
    torch.manual_seed(0)
    drops = torch.stack([drop_path(0.3, 0.1, 100, torch.device("cpu")) for _ in range(100)])
    assert set(drops.unique().tolist()) == {torch.tensor(0.3).item(), 1.0}
    assert (drops == 1).float().mean().item() == pytest.approx(0.1, abs=0.01)


def test_labels_and_the_budget_of_the_others_stay(monkeypatch):
    labels, drops = forwards(monkeypatch)
    usual, drop = forwards(monkeypatch, "multi_budget.path_drop=0")
    assert isinstance(drop, float)
    assert torch.equal(labels, usual)
    assert 16 < int((drops == 1).sum()) < 48
    assert set(drops.tolist()) == {torch.tensor(drop).item(), 1.0}


def test_the_class_may_be_dropped_with_the_backbone(monkeypatch):
    usual, _ = forwards(monkeypatch, "multi_budget.path_drop=0")
    labels, drops = forwards(monkeypatch, "multi_budget.path_drop_class=drop")
    assert (labels[drops == 1] == 10).all()
    assert torch.equal(labels[drops < 1], usual[drops < 1])


def test_the_first_steps_drop_nothing(monkeypatch):
    _, drop = forwards(monkeypatch, step=1)
    assert drop == 0.0


@pytest.mark.parametrize(
    "words",
    [(), ("execution.capacity=0.4",), ("multi_budget=none", "multi_budget.path_drop_class=drop")],
    ids=["exact", "capacity", "one budget"],
)
def test_a_run_resumes_bit_for_bit(words, tiny):
    words = ("multi_budget.path_drop=0.5", *words, "optimizer.schedule=constant")
    whole = tiny("whole", *words, "trainer.max_steps=4")
    tiny("parts", *words, "trainer.max_steps=2")
    parts = tiny("parts", *words, "trainer.max_steps=4", "ckpt_path=last")
    assert_same_end(whole, parts)


def test_a_run_that_takes_over_weights_says_that_path_drop_is_lost(tiny, caplog, capsys):
    path_drop = "multi_budget.path_drop=0.5"
    run = tiny("run", path_drop, "trainer.max_steps=3")
    words = (f"init.checkpoint={run}", "init=weights", "model.gates=true", "gates.share=0.5", "trainer.max_steps=3")
    tiny("lost", *words)
    assert "guidance.weak=path will be refused. To keep it, give multi_budget.path_drop=0.5" in caplog.text
    assert "DC-DiT (path drop) with" in caplog.text  # how the line that tells the source calls it
    caplog.clear()
    kept = tiny("kept", *words, path_drop)
    assert "will be refused" not in caplog.text
    arguments = (f"checkpoint={kept}", f"out={kept / 'out'}", "sampler.steps=2", "per_class=1", "guidance.weak=path")
    call(sample, compose_config(*arguments, name="sample"))
    shown = capsys.readouterr().out
    assert "DC-DiT (width gates, path drop) with" in shown
    assert "guidance.weak=path: without effect at guidance.scale=1" in shown


def test_micro_batches_of_one_sample_train(tiny):
    """With one sample nothing at all may be left for the backbone."""
    words = ("multi_budget=none", "multi_budget.path_drop=0.9", "execution.max_micro_batch=1")
    stored = load(tiny("run", *words, "trainer.max_steps=2"))
    assert stored["global_step"] == 2
    assert all(tensor.isfinite().all() for tensor in stored["state_dict"].values())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*PLAIN_DIT, "multi_budget.path_drop=0.1"), "path_drop=0.1: DiT/2 cannot leave its backbone out, set 0"),
        (("multi_budget.path_drop=1",), "path_drop=1"),
        (("multi_budget.path_drop_class=lose",), "path_drop_class='lose' is not one of keep, drop"),
        (("multi_budget.fractions=[0,1]",), r"multi_budget.fractions=1 is outside \[0, 1\)"),
    ],
)
def test_mistakes_are_told_before_the_first_step(words, message, tmp_path):
    with pytest.raises(UserError, match=message):
        train(compose_config(*TINY, *words), tmp_path)


def test_matched_training_counts_what_is_left_out():
    def steps(*words):
        config = config_of(
            "experiment=digits", "match_compute.baseline=dit_digits_2", "match_compute.steps=1000", *words
        )
        return match_compute(config).trainer.max_steps

    none, some, most = (steps(f"multi_budget.path_drop={share}") for share in (0, 0.1, 0.9))
    assert none < some < most
    # without backbone a step costs 0.54 to 0.6 of one with it
    assert some / none == pytest.approx(1 / (1 - 0.1 * 0.43), rel=0.02)
    assert steps("multi_budget=none") < steps("multi_budget=none", "multi_budget.path_drop=0.5")


# ---- losses on hidden states -----------------------------------------------------------------------------------------


def hidden_states(mask):
    packing = make_packing(mask)
    torch.manual_seed(int(mask.sum()))
    return torch.randn(len(packing.index), 6, requires_grad=True), packing


def test_samples_without_tokens_are_left_out_of_losses():
    mask = torch.rand(4, 64, generator=torch.Generator().manual_seed(0)) > 0.5
    mask[1] = False
    present = torch.tensor([0, 2, 3])
    tokens, packing = hidden_states(mask)
    features = torch.randn(4, 6, 4, 4)
    empty = torch.zeros(1)

    def values(mask, packing, features):
        noisy = Noisy(empty, empty, empty, empty, empty)
        routing = Routing(mask.float(), mask, mask)
        grid = GridAlignment(torch.nn.Identity(), lambda _: features, (8, 8), 1.0, 1, 0.5)
        return [
            loss.loss(HiddenStates({1: tokens}, packing), noisy, routing)
            for loss in (DispersiveLoss(0.5, 1, 0.5), grid)
        ]

    all_of, some = (
        values(mask, packing, features),
        values(mask[present], make_packing(mask[present]), features[present]),
    )
    for one, other in zip(all_of, some, strict=True):
        torch.testing.assert_close(one, other)
        (gradient,) = torch.autograd.grad(one, tokens)
        assert gradient.isfinite().all()
