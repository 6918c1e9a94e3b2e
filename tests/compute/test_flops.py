"""FLOPs against those that the reference implementation and the paper report."""

import re
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from support.commands import typed
from support.configs import call, compose_config

from dcdit.compute.flops import count
from dcdit.errors import UserError
from dcdit.network import build_network

ROOT = Path(__file__).parents[2]


def build(model: str):
    with torch.device("meta"):
        return build_network(OmegaConf.to_container(compose_config(f"model={model}").model, resolve=True))


LENGTHS = {"s": (267, 266, 236, 255), "b": (266, 250, 272, 236)}


def dropped(lengths, fraction):
    return [length - int(fraction * length) for length in lengths]


@pytest.mark.parametrize(
    ("scale", "fraction", "total"),
    [("s", 0, 15.127), ("s", 0.2, 12.502), ("s", 0.5, 8.743), ("b", 0, 57.935), ("b", 0.2, 48.352), ("b", 0.5, 34.268)],
)
def test_totals_of_the_reference(scale, fraction, total):
    flops = count(build(f"dcdit_{scale}"), dropped(LENGTHS[scale], fraction))
    # the reference pads its de-chunk to the longest sample
    longest = max(dropped(LENGTHS[scale], fraction))
    width = {"s": 384, "b": 768}[scale]
    padded = flops.published - flops.components["de-chunk"] + 2 * width * longest**2
    assert padded / 1e9 == pytest.approx(total, rel=1e-3)


@pytest.mark.parametrize(
    ("scale", "backbone", "encoder", "router", "residual"),
    [("s", 12.118, 1.265, 0.415, 0.302), ("b", 46.023, 5.059, 1.661, 1.208)],
)
def test_components_of_the_reference(scale, backbone, encoder, router, residual):
    parts = count(build(f"dcdit_{scale}"), LENGTHS[scale]).components
    expected = {
        "backbone": backbone,
        "encoder": encoder,
        "decoder": encoder,
        "router": router,
        "residual projection": residual,
    }
    for name, value in expected.items():
        assert parts[name] / 1e9 == pytest.approx(value, abs=6e-4), name


def test_the_largest_scale():
    """Its lengths are not given, their mean is: a quarter of 1024; equal lengths differ a little in the squares."""
    flops = count(build("dcdit_xl"), [256])
    assert flops.published / 1e9 == pytest.approx(264.000, rel=2e-3)
    assert flops.components["residual projection"] / 1e9 == pytest.approx(2.718, abs=6e-4)


@pytest.mark.parametrize(
    ("model", "tflops"), [("dit_s_2", 3.02), ("dit_b_2", 11.46), ("dit_l_2", 40.21), ("dit_xl_2", 59.00)]
)
def test_plain_transformers_as_the_paper_counts(model, tflops):
    assert count(build(model)).total * 250 / 1e12 == pytest.approx(tflops, rel=1e-2)


def test_the_page_of_the_method_has_the_sizes_of_other_blocks():
    rows = re.findall(r"\| `(d\w+)` \| ([\d.]+)M \| ([\d.]+) \|", (ROOT / "docs" / "method.md").read_text())
    assert len(rows) == 8
    for model, parameters, gflops in rows:
        network = build(model)
        assert f"{sum(p.numel() for p in network.parameters()) / 1e6:.2f}" == parameters
        assert f"{count(network, [network.positions / 4] if network.routes else []).total / 1e9:.1f}" == gflops
        in_file = re.search(
            r"([\d.]+)M parameters at 256px", (ROOT / "configs" / "model" / f"{model}.yaml").read_text()
        )
        assert f"{float(parameters):.1f}" == in_file[1]


def test_dropping_tokens_costs_less_and_linearly_at_most():
    network = build("dcdit_b")
    totals = [count(network, [length]).total for length in (64, 128, 256)]
    assert totals[0] < totals[1] < totals[2]
    assert totals[2] - totals[1] > 2 * (totals[1] - totals[0])  # attention grows with the square


def test_what_cannot_be_counted():
    with pytest.raises(UserError, match="depends on the tokens that it keeps"):
        count(build("dcdit_s"))


def test_the_table_as_users_print_it(capsys):
    from dcdit import flops

    call(flops, compose_config("model=dcdit_s", "guided=true", "uncond_drop_fraction=0.9", name="flops"))
    printed = capsys.readouterr().out
    for words in (
        "residual projection",
        "0.302",
        "without residual projection, as published",
        "TFLOPs per image, 250 steps, guided",
    ):
        assert words in printed
    call(flops, compose_config("model=dit_xl_2", name="flops"))
    assert "59.33" in capsys.readouterr().out
    for override, message in (
        ("compression=1", "compression=1 must be greater than 1"),
        ("drop_fractions=[1.1]", r"drop_fractions=1.1 is outside"),
        ("steps=0", r"steps=0 is outside \[1, 1000\]"),
        ("drop_fractions=[]", "asks for nothing"),
    ):
        with pytest.raises(UserError, match=message):
            call(flops, compose_config(override, name="flops"))


def test_gpu_hours_of_a_training(tmp_path, capsys, monkeypatch):
    """By hand from the FLOPs in the same table, and shorter with a faster GPU, a smaller budget or batch."""
    monkeypatch.setenv("COLUMNS", "200")  # one line for each row
    words = ("model=dcdit_s", "drop_fractions=[0,0.5]", "steps=1000", "training.steps=1000", "training.batch_size=64")

    def rows(*more: str) -> dict[str, list[float]]:
        out = typed(capsys, tmp_path, "flops", *words, *more).out
        cells = [[cell.strip() for cell in line.strip("│┃").split("│")] for line in out.splitlines() if "│" in line]
        return {label: [float(cell) for cell in numbers] for label, *numbers in cells}

    ((label, hours),) = [row for row in rows("training.achieved_tflops=0.1").items() if "GPU hours" in row[0]]
    assert label == "GPU hours of 1,000 steps of 64 samples at 0.1 TFLOP/s achieved"
    totals = rows()["total"]
    assert "GPU hours" not in " ".join(rows())
    # three forward passes a step, 1e11 operations a second
    expected = [3 * total * 1e9 * 1000 * 64 / 1e11 / 3600 for total in totals]
    assert hours == pytest.approx(expected, rel=5e-3)
    assert hours[1] < hours[0]
