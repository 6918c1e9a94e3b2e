"""How blocks run changes nothing in what they compute."""

import copy
import shutil

import pytest
import torch
from support.configs import MODERN, perturb

from dcdit.network import DCDiT, DiT
from dcdit.network.attention import packed_attention
from dcdit.network.execution import describe_execution, hold_products_in, is_compiled, set_execution
from dcdit.network.packing import make_packing

SIZE = {"grid": 8, "channels": 4, "width": 64, "depth": 3, "heads": 2, "num_classes": 5}

DROP = {True: (0.3,), False: ()}
"""What networks that route drop."""


def networks():
    torch.manual_seed(0)
    kinds = (DCDiT(**SIZE, groups=8), DiT(**SIZE), DCDiT(**SIZE, groups=8, **MODERN), DiT(**SIZE, **MODERN))
    for network in (*kinds, DiT(**SIZE, gates=True)):
        perturb(network)
        if isinstance(network, DCDiT):
            with torch.no_grad():
                network.router.scorer[-1].bias.fill_(0.0)
        yield network.eval()


def inputs(batch=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 4, 8, 8, generator=generator)
    return x, torch.randint(1000, (batch,), generator=generator), torch.arange(batch) % 5


def run(network, *arguments):
    prediction = network(*arguments).prediction
    network.zero_grad()
    prediction.square().mean().backward()
    return prediction.detach(), [p.grad.clone() for p in network.parameters() if p.grad is not None]


def test_activation_checkpointing_gives_the_same_gradients_and_keeps_less():
    for network in networks():
        kept = []
        results = []
        for checkpointed in (False, True):
            set_execution(network, checkpointed=checkpointed)
            bytes_kept = 0

            def count(tensor):
                nonlocal bytes_kept
                bytes_kept += tensor.nbytes
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
                prediction = network(*inputs()).prediction
            kept.append(bytes_kept)
            del prediction
            results.append(run(network, *inputs()))
        assert torch.equal(results[0][0], results[1][0])
        assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))
        assert kept[1] < kept[0] / 2


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler for torch.compile")
@pytest.mark.parametrize("number", [0, 2], ids=["published", "modern"])
def test_compiled_blocks_compute_the_same_and_are_compiled_a_bounded_number_of_times(number):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs = torch._dynamo.utils.counters["stats"]
    network = list(networks())[number]
    counts = []
    for seed, drop in enumerate((0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)):
        arguments = (*inputs(seed=seed), drop)
        set_execution(network)
        expected = run(network, *arguments)
        set_execution(network, compiled=True)
        found = run(network, *arguments)
        assert torch.allclose(expected[0], found[0], atol=1e-5)
        total = torch.stack([gradient.norm() for gradient in expected[1]]).norm()
        for a, b in zip(expected[1], found[1], strict=True):
            assert (a - b).norm() <= 1e-4 * a.norm() + 1e-6 * total
        counts.append(graphs["unique_graphs"])
    # two graphs for all blocks, whatever the lengths
    assert counts == [2] * len(counts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_held_in_half_precision_give_the_same_bits_and_take_half_the_memory(dtype):
    for network in networks():
        network.to(memory_format=torch.channels_last)
        held = copy.deepcopy(network)
        hold_products_in(held, dtype)
        with torch.no_grad(), torch.autocast("cpu", dtype):
            expected, output = network(*inputs(), *DROP[network.routes]), held(*inputs(), *DROP[network.routes])
        assert torch.equal(expected.prediction, output.prediction)
        if network.routes:
            assert torch.equal(expected.routing.prob, output.routing.prob)
        sizes = [
            sum(parameter.nbytes for parameter in each.backbone.parameters())
            for each in (network, held)
            if network.routes
        ]
        assert not sizes or sizes[1] < 0.52 * sizes[0]
        for name in network.float32_parts or ():
            assert {parameter.dtype for parameter in getattr(held, name).parameters()} == {torch.float32}


def test_attention_computes_in_bf16_where_the_cpu_has_matrix_units(monkeypatch):
    q, k, v = torch.randn(3, 20, 2, 8).bfloat16()
    packing = make_packing(torch.ones(2, 10, dtype=torch.bool))
    dtypes = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def spy(query, *arguments, **options):
        dtypes.append(query.dtype)
        return plain(query, *arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    outputs = []
    for amx in (False, True):
        monkeypatch.setattr("dcdit.network.attention.has_amx", lambda amx=amx: amx)
        outputs.append(packed_attention(q, k, v, packing))
    assert dtypes == [torch.float32, torch.bfloat16]
    assert outputs[0].dtype == outputs[1].dtype == torch.bfloat16
    torch.testing.assert_close(outputs[1], outputs[0], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("choice", "half", "amx", "expected"),
    [
        (True, False, False, True),
        (False, True, True, False),
        ("auto", True, True, True),
        ("auto", True, False, False),
        ("auto", False, True, False),
    ],
)
def test_auto_compiles_large_networks_where_it_was_measured_to_pay(monkeypatch, choice, half, amx, expected):
    monkeypatch.setattr("dcdit.network.execution.has_amx", lambda: amx)
    monkeypatch.setattr("dcdit.network.execution.has_compiler", lambda device: True)
    small = next(networks())
    with torch.device("meta"):
        large = DiT(**{**SIZE, "width": 1024})
    assert is_compiled(large, "cpu", half, choice) == expected
    assert is_compiled(small, "cpu", half, choice) == (choice is True)
    assert is_compiled(large, "cuda", half, choice) == (choice is True)


def test_a_network_that_does_not_say_what_is_float32_keeps_its_weights():
    network = torch.nn.Module()
    network.float32_parts, network.linear = None, torch.nn.Linear(2, 2)
    hold_products_in(network, torch.bfloat16)
    assert network.linear.weight.dtype == torch.float32


@pytest.mark.parametrize("amx", [False, True])
def test_how_a_network_runs_is_told(monkeypatch, amx):
    monkeypatch.setattr("dcdit.network.attention.has_amx", lambda: amx)
    for network in networks():
        set_execution(network)
        assert describe_execution(network, "cpu", "32-true") == "cpu 32-true"
        apart = "" if amx else " (attention in float32)"
        assert describe_execution(network, "cpu", "bf16-mixed") == f"cpu bf16-mixed{apart}"
        assert describe_execution(network, "cuda", "bf16") == "cuda bf16"
        set_execution(network, compiled=True)
        assert describe_execution(network, "cuda", "bf16").startswith("cuda bf16, compiled blocks")
