"""What the compiler makes of the compiled parts for a GPU, without one: torch's own code generator, told of an H100.

It uses private parts of torch: where a release moves them, the tests are skipped and say so.
"""

import re
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from support.configs import MODERN

from dcdit.network import build_network
from dcdit.network.blocks import DiTBlock
from dcdit.network.layers import PUBLISHED, BlockStyle

PROPERTIES = {"multi_processor_count": 132, "warp_size": 32, "total_memory": 80 << 30, "L2_cache_size": 50 << 20}
WIDTH, HEADS, TOKENS, SAMPLES = 64, 2, 100, 4

try:
    from torch._inductor.debug import DebugContext
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.graph import GraphLowering
    from torch._inductor.runtime.hints import DeviceProperties
    from torch._inductor.virtualized import V
    from torch._subclasses import fake_tensor
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    H100 = DeviceProperties("cuda", 0, 132, 90, 9, 65_536, 2048, 1024, 32)
except (ImportError, TypeError) as error:
    pytest.skip(f"this torch generates code in another way: {error}", allow_module_level=True)
pytest.importorskip("triton")


def forget():
    """What torch found out about Triton: without a GPU, and with one that is not there."""
    for function in vars(torch.utils._triton).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()


@contextmanager
def pretended_h100():
    """Tensors without values, on a GPU that is not there."""
    with ExitStack() as stack:
        stack.callback(forget)
        forget()
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))  # before it is told that there is a GPU
        for name, value in (
            ("torch.cuda.is_available", lambda: True),
            ("torch.cuda.is_initialized", lambda: True),
            (
                "torch.cuda.get_device_properties",
                lambda *_: SimpleNamespace(name="H100", major=9, minor=0, **PROPERTIES),
            ),
            ("torch.cuda.current_device", lambda: 0),
            ("torch.cuda.device_count", lambda: 1),
            ("torch.cuda.get_device_capability", lambda *_: (9, 0)),
            ("torch.cuda.is_bf16_supported", lambda *_, **__: True),
            ("torch.cuda.get_rng_state", lambda *_: torch.empty(0)),
            ("torch.cuda.set_rng_state", lambda *_: None),
            ("torch.cuda.is_current_stream_capturing", lambda: False),
            ("torch._C._cuda_getDevice", lambda: 0),
            ("torch.utils._triton.triton_hash_with_backend", lambda: "none"),
        ):
            stack.enter_context(patch(name, value, create=name.startswith("torch._C")))
        stack.enter_context(patch.object(DeviceProperties, "create", lambda _: H100))
        if hasattr(fake_tensor, "init_gpu_context"):  # torch 2.11 starts the driver for the first pretended tensor
            stack.enter_context(patch.object(fake_tensor, "init_gpu_context", lambda _: None))
        yield


def generated(part, shapes, precision, style=PUBLISHED):
    """The traced operations and the code for the GPU of one part of a block.

    Args:
        part: ``_before`` or ``_after``.
        shapes: of its tensors; ints become int64.
        precision: None, or what autocast takes.
        style: of the block.
    """
    with pretended_h100(), patch("torch.compiler.is_compiling", lambda: True):
        with torch.device("cuda"):
            block = DiTBlock(WIDTH, HEADS, 4.0, "released", "sdpa", style)
            tensors = [torch.zeros(shape, dtype=kind) for shape, kind in shapes]

        def run(*arguments):
            with torch.no_grad(), torch.autocast("cuda", precision, enabled=precision is not None):
                return getattr(block, part)(*arguments)

        traced = make_fx(run, decomposition_table=select_decomp_table(), tracing_mode="fake")(*tensors)
        lowered = GraphLowering(traced)
        with V.set_graph_handler(lowered), V.set_debug_handler(DebugContext()):
            lowered.run(*tensors)
            code = lowered.codegen()[0].value
    return traced, code


def parts(activations):
    tokens, modulation = ((TOKENS, WIDTH), torch.float32), ((SAMPLES, 6 * WIDTH), activations)
    sample = ((TOKENS,), torch.int64)
    return {
        "_before": [tokens, modulation, sample],
        "_after": [tokens, ((TOKENS, WIDTH), activations), modulation, sample],
    }


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
@pytest.mark.parametrize(("part", "most", "linears"), [("_before", 1, 1), ("_after", 4, 3)])
def test_element_wise_operations_become_few_kernels(part, most, linears, precision):
    """Norm, modulation and the gather of a sample's vectors are one kernel, not the dozen that they are uncompiled."""
    traced, code = generated(part, parts(precision or torch.float32)[part], precision)
    kernels = set(re.findall(r"def (triton_\w+)\(", code))
    casts = 2 * linears if precision else 0  # of weights and biases, at most one each
    assert 1 <= len(kernels) <= most + casts
    assert len(re.findall(r"extern_kernels\.\w*mm\(", code)) == linears
    on_host = [node for node in traced.graph.nodes if "_local_scalar" in str(node.target) or "cpu" in str(node.args)]
    assert on_host == []


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_norm_and_rotation_of_queries_and_keys_are_fused(precision):
    """One kernel before the product, and at most one each for queries and keys after it."""
    rotation = ((TOKENS, WIDTH // HEADS // 2, 2), torch.float32)
    shapes, casts = [*parts(precision or torch.float32)["_before"], rotation], 2 if precision else 0
    _, code = generated("_before", shapes, precision, BlockStyle("rms", "swiglu", True))
    assert 2 <= len(set(re.findall(r"def (triton_\w+)\(", code))) <= 3 + casts


def test_products_run_in_bf16_and_norms_in_float32():
    for part, shapes in parts(torch.bfloat16).items():
        traced, _ = generated(part, shapes, torch.bfloat16)
        kinds = {}
        for node in traced.graph.nodes:
            value = node.meta.get("val")
            if node.op == "call_function" and isinstance(value, torch.Tensor):
                kinds.setdefault(str(node.target).removeprefix("aten."), set()).add(value.dtype)
        products = {kind for name, found in kinds.items() if name.startswith(("addmm", "mm", "bmm")) for kind in found}
        assert products == {torch.bfloat16}
        assert kinds["rsqrt.default"] == {torch.float32}


@pytest.mark.parametrize("attention", ["auto", "sdpa"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("blocks", [{}, MODERN], ids=["published", "modern"])
def test_the_whole_network_of_fixed_length_is_one_graph(attention, training, blocks):
    """Attention included, whose fast form is what ``auto`` takes in bf16; nothing is read by the host."""
    sizes = {"grid": 16, "channels": 4, "num_classes": 10, "width": 128, "depth": 2, "heads": 2, "groups": 4}
    network, graphs = build_network({"name": "dcdit", "attention": attention, **sizes, **blocks}), []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    with pretended_h100():
        for module in network.modules():
            for values in (module._parameters, module._buffers):
                for name, value in values.items():
                    there = torch.empty(value.shape, dtype=value.dtype, device="cuda") if value is not None else None
                    is_parameter = isinstance(value, torch.nn.Parameter)
                    values[name] = torch.nn.Parameter(there) if is_parameter else there
        inputs = [torch.empty(shape, device="cuda") for shape in ((4, 4, 16, 16), (4,), (4,))]
        inputs[2] = inputs[2].long()
        with torch.set_grad_enabled(training), torch.autocast("cuda", torch.bfloat16):
            output = torch.compile(network, fullgraph=True, backend=keep)(*inputs, capacity=0.5)
    torch._dynamo.reset()
    assert output.prediction.shape == (4, 8, 16, 16)
    assert len(graphs) == 1
    operations = [str(node.target) for node in graphs[0].graph.nodes]
    assert sum("varlen_attn" in each for each in operations) == (2 if attention == "auto" else 0)
    assert not [each for each in operations if each in ("item", "tolist") or "aten.item" in each or "scalar" in each]
