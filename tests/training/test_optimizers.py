"""Muon beside AdamW: what each of them trains, how, and that a run with both goes on, skips steps and is checked."""

import copy
import json

import pytest
import torch
from support.configs import PLAIN_DIT, TINY, compose_config, config_of, module_of, perturb
from support.runs import assert_same_end, load
from torch import nn

from dcdit.checkpoints.load import load_model
from dcdit.errors import UserError
from dcdit.network.blocks import DiTBlock
from dcdit.network.matrices import block_matrices
from dcdit.training.optimizers import MuonWithAdamW
from dcdit.training.settings import OPTIMIZERS

MUON = (*TINY, "optimizer=muon", "optimizer.lr_warmup_steps=0")
OPTIONS = {"momentum": 0.9, "nesterov": True, "ns_steps": 4, "adjust_lr_fn": "match_rms_adamw"}


def optimizer_of(*overrides):
    module = module_of(config_of(*MUON, *overrides))
    perturb(module.network)
    return module.network, module.configure_optimizers()["optimizer"]


def random_gradients(parameters, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize(
    ("words", "frozen"),
    [((), ()), (PLAIN_DIT, ()), ((), ("condition", "router")), (("model.gates=true", "gates.share=0.5"), ())],
    ids=["dcdit", "dit", "frozen", "gates"],
)
def test_every_trained_parameter_has_one_optimiser(words, frozen):
    network, optimizer = optimizer_of(*words)
    for part in frozen:
        network.get_submodule(part).requires_grad_(False)
    listed = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert [id(each) for each in listed] == [id(each) for each in network.parameters()]
    random_gradients(each for each in network.parameters() if each.requires_grad)
    optimizer.step()
    kinds = {name: set(optimizer.state.get(each, ())) for name, each in network.named_parameters()}
    muon = {name for name, kind in kinds.items() if kind == {"momentum_buffer"}}
    assert {name for name in kinds if name not in muon and kinds[name] != {"step", "exp_avg", "exp_avg_sq"}} == {
        name for name, each in network.named_parameters() if not each.requires_grad
    }
    # The rule, told another way: the weights with two dimensions whose names lead through a block.
    blocks = [name for name, module in network.named_modules() if isinstance(module, DiTBlock)]
    inside = {name for name in kinds if any(name.startswith(f"{block}.") for block in blocks)}
    assert muon == {name for name in inside if network.get_parameter(name).dim() == 2}
    assert len(muon) == 5 * len(blocks)


def test_stacked_matrices_are_declared_where_they_are_split_in_the_forward_pass():
    block = DiTBlock(32, 4, 4.0, "paper", "auto")
    by_name = {name: block_matrices(block)[each] for name, each in block.named_parameters() if each.dim() == 2}
    assert by_name == {
        "attention.qkv.weight": 3, "attention.out.weight": 1, "mlp.fc1.weight": 1, "mlp.fc2.weight": 1,
        "modulation.weight": 6,
    }  # fmt: skip
    for weight, count in block_matrices(block).items():
        assert len(weight) % count == 0


@pytest.mark.parametrize("stacked", [1, 3])
def test_a_step_is_that_of_torch_on_each_matrix(stacked):
    torch.manual_seed(0)
    whole, bias = nn.Parameter(torch.randn(24, 12)), nn.Parameter(torch.randn(24))
    matrices = [nn.Parameter(part.clone()) for part in whole.detach().chunk(stacked)]
    alone = nn.Parameter(bias.detach().clone())
    adamw = {"lr": 0.01, "weight_decay": 0.1, "fused": True}
    ours = MuonWithAdamW({whole: stacked}, OPTIONS, {"params": [whole, bias], **adamw})
    theirs = torch.optim.Muon(matrices, lr=0.01, weight_decay=0.1, **OPTIONS), torch.optim.AdamW([alone], **adamw)
    for seed in range(3):
        random_gradients([whole, bias], seed)
        for matrix, gradient in zip(matrices, whole.grad.chunk(stacked), strict=True):
            matrix.grad = gradient.clone()
        alone.grad = bias.grad.clone()
        for optimizer in (ours, *theirs):
            optimizer.step()
    assert torch.equal(whole, torch.cat(matrices))
    assert torch.equal(bias, alone)
    assert torch.equal(ours.state[whole]["momentum_buffer"], torch.cat([theirs[0].state[each]["momentum_buffer"]
                                                                       for each in matrices]))  # fmt: skip


def test_a_step_with_the_flag_of_non_finite_gradients_changes_nothing():
    network, optimizer = optimizer_of()
    for bad in (True, False, True):  # also the first step, which makes the state
        random_gradients(network.parameters())
        before = copy.deepcopy((network.state_dict(), optimizer.state_dict()["state"]))
        if bad:
            next(iter(optimizer.matrices)).grad.fill_(torch.nan)
        optimizer.found_inf = torch.tensor(float(bad))
        optimizer.step()
        if bad and before[1]:
            torch.testing.assert_close((network.state_dict(), optimizer.state_dict()["state"]), before, rtol=0, atol=0)
        same = [torch.equal(tensor, before[0][name]) for name, tensor in network.state_dict().items()]
        assert all(same) if bad else not any(same)
        assert all(each.isfinite().all() for state in optimizer.state.values() for each in state.values())


def test_a_gradient_scaler_changes_no_momentum():
    network, optimizer = optimizer_of()
    twin, scaled = optimizer_of()
    random_gradients(network.parameters())
    random_gradients(twin.parameters())
    for parameter in twin.parameters():
        parameter.grad *= 1024
    scaled.grad_scale = torch.tensor(1024.0)
    optimizer.step()
    scaled.step()
    torch.testing.assert_close(scaled.state_dict()["state"], optimizer.state_dict()["state"])


def test_one_learning_rate_a_schedule_and_rates_by_part():
    network, optimizer = optimizer_of("optimizer.lr_scale={backbone: 1e-4}", "optimizer.lr=0.01")
    before = copy.deepcopy(network.state_dict())
    random_gradients(network.parameters())
    optimizer.step()
    change = {name: (each - before[name]).square().mean().sqrt().item() for name, each in network.state_dict().items()}
    weight = "backbone.blocks.0.mlp.fc1.weight"
    # Orthogonal updates are scaled to 0.2 of AdamW's largest root mean square.
    assert change[weight] == pytest.approx(0.2 * 1e-6, rel=0.3)
    assert change["backbone.blocks.0.mlp.fc1.bias"] == pytest.approx(1e-6, rel=0.1)
    assert change["embed.weight"] == pytest.approx(0.01, rel=0.1)
    for group in optimizer.param_groups:  # as a schedule does
        group["lr"] = 0.0
    before = copy.deepcopy(network.state_dict())
    optimizer.step()
    assert all(torch.equal(each, before[name]) for name, each in network.state_dict().items())


@pytest.mark.parametrize("words", [(), ("trainer.accumulate_grad_batches=2", "trainer.gradient_clip_val=0.1")])
def test_a_run_that_goes_on_has_the_bits_of_one_that_was_not_interrupted(tiny, words):
    fixed = ("optimizer=muon", "optimizer.schedule=constant", *words)
    whole = tiny("whole", "trainer.max_steps=4", *fixed)
    tiny("parts", "trainer.max_steps=2", *fixed)
    parts = tiny("parts", "trainer.max_steps=4", "ckpt_path=last", *fixed)
    assert_same_end(parts, whole)
    names = json.loads((whole / "optimizer.json").read_text())
    (state,) = load(whole)["optimizer_states"]
    order = [name for name, _ in load_model(whole).network.named_parameters()]
    assert {order[number] for number, each in state["state"].items() if "exp_avg" in each} == set(names["adamw"])
    assert {order[number] for number, each in state["state"].items() if "momentum_buffer" in each} == set(names["muon"])
    assert len(names["muon"]) == 5


def test_what_is_told_and_what_is_refused(tiny, trained_run, caplog):
    run = tiny("run", "trainer.max_steps=1", "optimizer=muon")
    assert "Muon trains 12 matrices in 5 weights of the transformer blocks" in caplog.text
    with pytest.raises(UserError, match=r"optimizer\.name='adamw': the run was trained with 'muon' up to step 1"):
        tiny("run", "trainer.max_steps=2", "ckpt_path=last")
    assert not (trained_run / "optimizer.json").exists()
    frozen = ("init=weights", f"init.checkpoint={trained_run}", "init.freeze=[backbone]", "optimizer=muon")
    with pytest.raises(UserError, match=r"optimizer=muon finds no weight matrix .*take optimizer=adamw"):
        tiny("frozen", *frozen)
    assert not (run.parent / "frozen" / "config.yaml").exists()


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("optimizer.momentum=1", "momentum=1"),
        ("optimizer.ns_steps=0", "ns_steps=0"),
        ("optimizer.betas=[0.9]", "betas=.* has 1 elements, 2 are needed"),
        ("optimizer.name=sgd", "is not one of adamw, muon"),
    ],
)
def test_mistakes(word, message):
    with pytest.raises(UserError, match=message):
        config_of(*MUON, word)


def test_the_choices_are_those_of_the_table():
    assert {compose_config(f"optimizer={name}").optimizer.name for name in OPTIMIZERS} == set(OPTIMIZERS)
