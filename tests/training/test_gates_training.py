"""Width gates in training: the loss on their share, where they start from, and that a run with them goes on."""

import csv
import json

import pytest
import torch
from support.configs import PLAIN_DIT, TINY, compose_config, config_of, module_of, train
from support.runs import assert_same_end

from dcdit.checkpoints.load import load_model
from dcdit.errors import UserError
from dcdit.network.matrices import block_matrices
from dcdit.training.build import match_compute

GATES = ("model.gates=true", "gates.share=0.5")
STILL = ("optimizer.lr=1e-12", "optimizer.lr_warmup_steps=0", "trainer.max_steps=1")


def shares(run):
    files = sorted(run.glob("logs/version_*/metrics.csv"))
    rows = [row for file in files for row in csv.DictReader(file.open())]
    return [float(row["train/gates_share"]) for row in rows if row.get("train/gates_share")]


@pytest.mark.parametrize("kind", [(), PLAIN_DIT], ids=["dcdit", "dit"])
def test_training_brings_the_share_to_its_target(kind, tiny):
    words = ("gates.weight=20", "optimizer.lr=0.05", "optimizer.lr_warmup_steps=0", "trainer.max_steps=60")
    run = tiny("run", *kind, *GATES, *words, "multi_budget=none")
    found = shares(run)
    assert found[0] > 0.9
    assert sum(found[-10:]) / 10 == pytest.approx(0.5, abs=0.12)


@pytest.mark.parametrize(
    "words",
    [(), ("multi_budget.path_drop=0.5",), ("optimizer=muon", "execution.capacity=0.9"), PLAIN_DIT],
    ids=["plain", "path drop", "muon and capacity", "dit"],
)
def test_a_run_resumes_bit_for_bit(words, tiny):
    words = (*GATES, *words, "optimizer.schedule=constant")
    whole = tiny("whole", *words, "trainer.max_steps=4")
    tiny("parts", *words, "trainer.max_steps=2")
    parts = tiny("parts", *words, "trainer.max_steps=4", "ckpt_path=last")
    assert_same_end(whole, parts)
    assert len(shares(parts)) == 4


def test_a_network_without_gates_gets_them_all_on(trained_run, tiny, caplog):
    run = tiny("gated", "init=weights", f"init.checkpoint={trained_run}", *GATES, *STILL)
    assert "new: gates (2)" in caplog.text
    assert set(json.loads((run / "init.json").read_text())["new"]) == {"gates.router.weight", "gates.router.bias"}
    before, gated = load_model(trained_run).network, load_model(run, "raw").network
    torch.manual_seed(0)
    inputs = torch.randn(2, 1, 8, 8), torch.full((2,), 300.0), torch.arange(2)
    with torch.no_grad():
        torch.testing.assert_close(gated(*inputs).prediction, before(*inputs).prediction, rtol=1e-5, atol=1e-6)
    again = tiny("again", "init=weights", f"init.checkpoint={run}", *GATES, *STILL)
    assert json.loads((again / "init.json").read_text())["new"] == []
    with pytest.raises(UserError, match=r"gates\.router\.weight .* none here\. .* \(model\.gates is true there\)"):
        tiny("refused", "init=weights", f"init.checkpoint={run}", *STILL)


def test_only_the_gates_may_be_trained(trained_run, tiny):
    parts = [name for name in module_of(config_of(*TINY, *GATES)).network.parts() if name != "gates"]
    words = ("init=weights", f"init.checkpoint={trained_run}", f"init.freeze=[{','.join(parts)}]")
    run = tiny("run", *words, *GATES, "optimizer.lr=0.1", "optimizer.lr_warmup_steps=0", "trainer.max_steps=2")
    before, after = load_model(trained_run).network.state_dict(), load_model(run, "raw").network.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not torch.equal(after["gates.router.bias"], torch.full_like(after["gates.router.bias"], 4.0))


def test_an_upcycled_network_may_have_gates(tiny):
    teacher = tiny("teacher", *PLAIN_DIT, "trainer.max_steps=1")
    run = tiny("up", "init=upcycle", f"init.teacher={teacher}", "init.distil_steps=2", "trainer.max_steps=2", *GATES)
    assert load_model(run).network.gates is not None


def test_muon_leaves_the_gates_to_adamw():
    network = module_of(config_of(*TINY, *GATES)).network
    assert not set(network.gates.parameters()) & set(block_matrices(network))
    assert "gates" in network.parts()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("model.gates=true",), "gates.share=null: DC-DiT has width gates, give a target such as 0.7"),
        (("gates.share=0.7",), "gates.share=0.7: DC-DiT has no width gates, set model.gates=true"),
        (("model.gates=true", "gates.share=0"), "gates.share=0"),
        (("model.gates=true", "gates.share=1.1"), "gates.share=1.1"),
        ((*GATES, "gates.weight=-1"), "gates.weight=-1"),
        ((*GATES, "execution.compile=true"), "execution.compile=true: width gates change the shapes"),
        (("model.gates=maybe",), "model.gates='maybe'"),
    ],
)
def test_mistakes_are_told_before_the_first_step(words, message, tmp_path):
    with pytest.raises(UserError, match=message):
        train(compose_config(*TINY, *words), tmp_path)


def test_matched_training_counts_what_training_computes():
    """Gates multiply by zero in training: nothing is spared there but in the count of the gates themselves."""

    def steps(*words):
        config = config_of(
            "experiment=digits", "match_compute.baseline=dit_digits_2", "match_compute.steps=1000", *words
        )
        return match_compute(config).trainer.max_steps

    assert steps(*GATES) == pytest.approx(steps(), rel=0.005)
