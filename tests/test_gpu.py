"""On a GPU: what a CPU, or the stand-in of ``support.pretend_cuda``, cannot tell."""

import copy

import pytest
import torch
from support.configs import TINY, compose_config, perturb, train
from support.gpu import reads_of
from support.runs import load

from dcdit.network import build_network
from dcdit.network.blocks import Attention
from dcdit.network.execution import set_execution

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SIZES = {
    "name": "dcdit",
    "groups": 4,
    "grid": 16,
    "channels": 4,
    "num_classes": 10,
    "width": 128,
    "depth": 2,
    "heads": 2,
}
BF16 = {"device_type": "cuda", "dtype": torch.bfloat16}


@pytest.fixture
def network():
    torch.manual_seed(0)
    net = build_network(SIZES)
    perturb(net)
    return net.eval()


def inputs(device="cuda", batch=4):
    torch.manual_seed(1)
    values = torch.randn(batch, 4, 16, 16), torch.linspace(3, 900, batch), torch.arange(batch)
    return [each.to(device) for each in values]


def gradients(net, values, **options):
    net.zero_grad()
    net(*values, **options).prediction.float().square().mean().backward()
    return torch.cat([each.grad.flatten() for each in net.parameters() if each.grad is not None])


def test_float32_equals_the_cpus(network):
    there = copy.deepcopy(network).to("cuda")
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        here, found = network(*inputs("cpu")), there(*inputs())
        assert torch.equal(here.routing.mask, found.routing.mask.cpu())
        torch.testing.assert_close(found.prediction.cpu(), here.prediction, rtol=1e-3, atol=1e-3)
    finally:
        torch.backends.cudnn.allow_tf32 = before


def test_the_router_is_exact_where_other_convolutions_are_not(network, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    there, features = copy.deepcopy(network).to("cuda"), torch.randn(4, 16, 16, 128)
    here, found = network.route(features, 0.0).prob, there.route(features.to("cuda"), 0.0).prob
    torch.testing.assert_close(found.cpu(), here, rtol=1e-5, atol=1e-5)
    assert torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("backend", ["sdpa", "auto"])
def test_compiled_blocks_equal_the_others(network, backend):
    net, values = network.to("cuda"), inputs()
    for module in net.modules():
        if isinstance(module, Attention):
            module.backend = backend
    found = []
    for compiled in (False, True):
        set_execution(net, compiled)
        with torch.autocast(**BF16):
            found.append((net(*values).prediction.detach(), gradients(net, values)))
    for plain, compiled in zip(*found, strict=True):
        assert (compiled - plain).float().norm() <= 3e-2 * plain.float().norm()


@pytest.mark.parametrize(("capacity", "reads"), [(None, 1), (0.9, 0)])
def test_the_host_reads_the_lengths_alone_and_of_a_fixed_length_nothing(network, capacity, reads):
    net, values = network.to("cuda"), inputs()
    loss = None

    def forward():
        nonlocal loss
        with torch.autocast(**BF16):
            loss = net(*values, capacity=capacity).prediction.float().square().mean()

    for _ in range(2):  # the first time, libraries start
        found = reads_of(forward), reads_of(lambda: loss.backward())
    assert [len(each) for each in found] == [reads, 0], found


def test_gates_leave_out_what_they_multiply_by_zero_and_are_read_once():
    torch.manual_seed(0)
    net = build_network({**SIZES, "gates": True})
    perturb(net)
    torch.nn.init.constant_(net.gates.router.bias, 0.0)
    net, (x, t, y) = net.eval().to("cuda"), inputs()
    values = x, t[:1].expand(len(x)), y
    with torch.autocast(**BF16):
        multiplied = net(*values)
        with torch.no_grad():
            left_out = net(*values)
            for _ in range(2):  # the first time, libraries start
                found = reads_of(lambda: net(*values, capacity=0.9))
    assert (multiplied.gating.counts, len(left_out.gating.counts)) == (None, 2)
    difference = left_out.prediction - multiplied.prediction
    assert difference.float().norm() <= 3e-2 * multiplied.prediction.float().norm()
    assert len(found) == 1, found


def test_a_fixed_length_equals_the_exact_one(network):
    net, values = network.to("cuda"), inputs()
    found = []
    for capacity in (None, 1.0):
        with torch.autocast(**BF16):
            found.append(gradients(net, values, capacity=capacity))
    assert (found[0] - found[1]).norm() <= 3e-2 * found[0].norm()


@pytest.mark.slow
def test_a_fixed_length_runs_as_one_cuda_graph(network):
    net, values = network.to("cuda"), inputs()
    compiled = torch.compile(net, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad(), torch.autocast(**BF16):
        expected = net(*values, capacity=0.9).prediction.clone()
        for _ in range(3):  # compiled, recorded, replayed
            torch.compiler.cudagraph_mark_step_begin()
            found = compiled(*values, capacity=0.9).prediction.clone()
    assert (found - expected).float().norm() <= 3e-2 * expected.float().norm()


def test_a_resumed_run_goes_on_as_the_whole_one(tmp_path, digits):
    """To rounding: sums on a GPU may be added in another order."""

    def run(name, *overrides):
        words = (*TINY, "trainer=gpu", "trainer.precision=bf16-mixed", f"data.directory={digits}")
        (tmp_path / name).mkdir(exist_ok=True)
        train(compose_config(*words, *overrides), tmp_path / name)
        return load(tmp_path / name)["state_dict"]

    whole = run("whole", "trainer.max_steps=6")
    run("parts", "trainer.max_steps=3")
    parts = run("parts", "trainer.max_steps=6", "ckpt_path=last")
    assert whole.keys() == parts.keys()
    for name, values in whole.items():
        torch.testing.assert_close(parts[name], values, rtol=1e-2, atol=1e-3, msg=name)
