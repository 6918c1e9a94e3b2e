"""The reference's numbers (see tests/golden), to float32 precision."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.configs import golden_folders, golden_network
from torch import Tensor

from dcdit import DCDiT
from dcdit.checkpoints.names import REFERENCE
from dcdit.diffusion.guidance import Guidance
from dcdit.diffusion.loss import diffusion_loss
from dcdit.diffusion.schedule import Posterior, add_noise
from dcdit.diffusion.settings import GuidanceSettings
from dcdit.training.objective import ratio_loss

HEADS = 4


class Golden(NamedTuple):
    folder: Path
    size: int

    def arrays(self, kind: str) -> dict[str, Tensor]:
        with np.load(self.folder / f"{kind}_in{self.size}.npz") as stored:
            return {
                k: torch.from_numpy(stored[k]).long() if stored[k].dtype == np.int32 else torch.from_numpy(stored[k])
                for k in stored.files
            }

    def net(self) -> DCDiT:
        state = load_file(self.folder / "state.safetensors")
        if self.size == 16:
            state |= load_file(self.folder / "state_in16_pos_embed.safetensors")
        return golden_network(state, heads=HEADS)


GOLDEN = [
    Golden(folder, size)
    for folder in golden_folders().values()
    for size in (8, 16)
    if (folder / f"io_in{size}.npz").exists()
]
pytestmark = pytest.mark.parametrize("golden", GOLDEN, ids=[f"{g.folder.name}-{g.size}" for g in GOLDEN])


def assert_matches(output, data: dict[str, Tensor], case: str, tolerance: float = 2e-5) -> None:
    assert torch.equal(output.routing.mask, data[f"{case}/boundary_mask"])
    if f"{case}/boundary_prob" in data:
        assert torch.equal(output.routing.natural_mask, data[f"{case}/boundary_mask_natural"])
        torch.testing.assert_close(output.routing.prob, data[f"{case}/boundary_prob"], rtol=0, atol=5e-6)
        torch.testing.assert_close(output.routing.confidence, data[f"{case}/selected_probs"], rtol=0, atol=5e-6)
    torch.testing.assert_close(output.prediction, data[f"{case}/out"], rtol=0, atol=tolerance)


@torch.no_grad()
def test_forward(golden: Golden) -> None:
    net, data = golden.net(), golden.arrays("io")
    x, t, y = data["in/x"], data["in/t"], data["in/y"]
    assert_matches(net(x, t, y), data, "a_drop0")
    assert_matches(net(x, t, y, 0.3), data, "b_drop0.3")
    assert_matches(net(x, t, y, data["in/frac"]), data, "c_persample")


@torch.no_grad()
@pytest.mark.parametrize(("bias", "case"), [(-1000.0, "z_min_bias-1000"), (1000.0, "z_all_bias+1000")])
def test_fewest_and_most_tokens(golden: Golden, bias: float, case: str) -> None:
    net, data = golden.net(), golden.arrays("io")
    net.router.scorer[3].bias.fill_(bias)
    assert_matches(net(data["in/x"], data["in/t"], data["in/y"]), data, case)


@torch.no_grad()
@pytest.mark.parametrize(
    ("case", "scale", "drop", "uncond_drop"),
    [
        ("d_cfg4", 4.0, 0.0, None),
        ("d2_cfg1.5_drop0.2", 1.5, 0.2, None),
        ("e_lite_0.0_0.9_cfg4", 4.0, 0.0, 0.9),
        ("e2_lite_0.2_0.6_cfg1.25", 1.25, 0.2, 0.6),
    ],
)
def test_guidance(golden: Golden, case: str, scale: float, drop: float, uncond_drop: float | None) -> None:
    net, data = golden.net(), golden.arrays("io")
    half = len(data["in/xcfg"]) // 2
    x, t, y = data["in/xcfg"][:half], data["in/tcfg"], data["in/ycfg"]
    seen = {}

    def record(*args):
        # The reference takes labels and timesteps of both halves as given.
        seen["output"] = net(args[0], t, y, args[3])
        return seen["output"]

    guided = Guidance(record, net.null_class, GuidanceSettings(scale, 3, drop, uncond_drop))(x, 0, y[:half])
    raw = seen["output"].prediction
    both = torch.cat([guided.prediction, torch.cat([guided.prediction[:, :3], raw[half:, 3:]], dim=1)])
    torch.testing.assert_close(both, data[f"{case}/out"], rtol=0, atol=5e-5)
    mask, prob = (torch.cat([getattr(half, name) for half in guided.routings]) for name in ("mask", "prob"))
    assert torch.equal(mask, data[f"{case}/boundary_mask"])
    torch.testing.assert_close(prob, data[f"{case}/boundary_prob"], rtol=0, atol=5e-6)


def train_case(golden: Golden, case: str, drop: float, group: int | None):
    net, data = golden.net().train(), golden.arrays("train")
    net.condition.label.dropout = 0.0
    tables, x0, noise = Posterior.linear(), data["in/x_start"], data["in/noise"]
    t = data.get(f"{case}/t", data["in/t"])
    xt = add_noise(tables, x0, noise, t)
    output = net(xt, t, data["in/y"], drop)
    loss = diffusion_loss(tables, output.prediction, x0, xt, noise, t)
    ratios = {g: ratio_loss(output.routing.prob, output.routing.natural_mask, 4.0, g) for g in (None, 4)}
    total = loss.total.mean() + 0.03 * ratios[group]
    assert torch.equal(output.routing.mask, data[f"{case}/boundary_mask"])
    torch.testing.assert_close(loss.mse, data[f"{case}/mse"], rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(ratios[None], data[f"{case}/ratio_N4_none"], rtol=1e-5, atol=0)
    torch.testing.assert_close(ratios[4], data[f"{case}/ratio_N4_rb4"], rtol=1e-5, atol=0)
    return net, loss, total, data


@pytest.mark.parametrize(("case", "drop", "group"), [("f_drop0", 0.0, None), ("f2_drop0.3", 0.3, 4)])
def test_loss_and_gradient(golden: Golden, case: str, drop: float, group: int | None) -> None:
    net, loss, total, data = train_case(golden, case, drop, group)
    torch.testing.assert_close(loss.vlb, data[f"{case}/vb"], rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(total, data[f"{case}/total"], rtol=1e-5, atol=0)
    total.backward()
    gradients = {name: p.grad for name, p in net.named_parameters()}
    summary = json.loads((golden.folder / "meta.json").read_text())["grad_summary"][f"in{golden.size}"]
    assert {REFERENCE.ours(name) for name in summary} == set(gradients)
    for name, expected in summary.items():
        expected = expected["drop03_rb4"] if drop else expected
        assert gradients[REFERENCE.ours(name)].norm().item() == pytest.approx(expected["norm"], rel=2e-5), name
    stored = golden.folder / f"grads_f_in{golden.size}.safetensors"
    if not drop and stored.exists():
        for name, expected in load_file(stored).items():
            assert (gradients[REFERENCE.ours(name)] - expected).norm() <= 2e-5 * expected.norm(), name


def test_decoder_likelihood(golden: Golden) -> None:
    _, loss, _, data = train_case(golden, "f3_t0", 0.0, None)
    first = data["f3_t0/t"] == 0
    assert first.any()
    assert not first.all()
    # At t = 0 a difference of two nearly equal probabilities magnifies float32's rounding; 0.05 is a hundredth of most.
    torch.testing.assert_close(loss.vlb[first], data["f3_t0/vb"][first], rtol=0, atol=0.05)
    torch.testing.assert_close(loss.vlb[~first], data["f3_t0/vb"][~first], rtol=1e-5, atol=2e-5)
