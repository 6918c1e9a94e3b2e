"""What the host waits for, and that nothing mixes devices: on a stand-in for a GPU."""

from dataclasses import replace
from functools import wraps

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.plugins import MixedPrecision, Precision
from lightning.pytorch.strategies import SingleDeviceStrategy
from support.configs import MODERN, PLAIN_DIT, TINY, compose_config, perturb, train
from support.pretend_cuda import CUDA, MixedDevicesError, PretendCuda

from dcdit.checkpoints.load import Model
from dcdit.data.latents import IDENTITY, LatentSpec
from dcdit.diffusion.guidance import Guidance
from dcdit.diffusion.process import build_process
from dcdit.diffusion.samplers import Sampler
from dcdit.diffusion.settings import DDIM, DDPM, DPMSolver, Euler, EulerMaruyama, GuidanceSettings, Heun
from dcdit.network import build_network
from dcdit.network.routing import Routing
from dcdit.sampling.capacity import room_of
from dcdit.sampling.generate import generate

ENCODER = ("alignment.encoder=test_vit", "alignment.weights=random", "alignment.grid=4")
REPA, IREPA = ("alignment=repa", "alignment.width=32", *ENCODER), ("alignment=irepa", *ENCODER)
SIZES = {"grid": 8, "channels": 1, "num_classes": 5, "width": 32, "depth": 2, "heads": 2}
NETWORKS = {"dcdit": {"name": "dcdit", "groups": 4, **SIZES}, "dit": {"name": "dit", **SIZES}}
NETWORKS |= {f"{name}, modern": {**spec, **MODERN} for name, spec in NETWORKS.items()}
NETWORKS |= {f"{name}, gates": {**NETWORKS[name], "gates": True} for name in ("dcdit", "dit")}


@pytest.fixture
def pretend():
    with PretendCuda() as found:
        yield found


def network_there(name: str):
    torch.manual_seed(0)
    net = build_network(NETWORKS[name])
    perturb(net)
    return net.to("cuda").eval()


def inputs(batch=4):
    x = torch.randn(batch, 1, 8, 8).to("cuda")
    return x, torch.tensor([900, 500, 100, 3], device="cuda"), torch.arange(batch, device="cuda")


class TestTheStandIn:
    def test_it_computes_what_a_cpu_computes(self, pretend):
        net, (x, t, y) = network_there("dcdit"), inputs()
        assert {each.device for each in (*net.parameters(), *net.buffers(), x, t, y)} == {CUDA}
        output = net(x, t, y, 0.3)
        assert output.prediction.device == output.routing.mask.device == CUDA
        here = net.to("cpu")(x.cpu(), t.cpu(), y.cpu(), 0.3)
        assert torch.equal(here.prediction, output.prediction.cpu())

    def test_what_fails_on_a_gpu_fails(self, pretend):
        x = torch.ones(3, device="cuda")
        with pytest.raises(MixedDevicesError, match="on the CPU"):
            x + torch.ones(3)
        with pytest.raises(MixedDevicesError):
            torch.ones(3)[x.long()]
        with pytest.raises(TypeError, match="copy it to the CPU"):
            x.numpy()
        assert (x * torch.tensor(2.0)).is_cuda  # a number may come from anywhere
        assert x[torch.tensor([0])].is_cuda

    def test_what_the_host_reads_is_counted(self, pretend):
        x = torch.ones(3, device="cuda")
        reads = [
            lambda: x.sum().item(), lambda: x.tolist(), lambda: x.cpu(), lambda: bool(x[0] > 0), lambda: x.nonzero(),
            lambda: x[x > 0], lambda: torch.equal(x, x), lambda: torch.zeros(3).copy_(x), lambda: f"{x[0]:.2f}",
            lambda: x.repeat_interleave(x.long()),
        ]  # fmt: skip
        for number, read in enumerate(reads):
            pretend.reads.clear()
            read()
            assert pretend.reads.total() == 1, (number, pretend.reads)
        pretend.reads.clear()
        x.repeat_interleave(x.long(), output_size=3)
        torch.nonzero_static(x, size=3)
        (x.detach().requires_grad_() * 2).sum().backward()
        assert not pretend.reads
        pretend.copies.clear()
        torch.tensor([1.0], device="cuda")
        torch.ones(3).to("cuda")
        x[0] = 2.0
        x[:1] = 2.0
        assert pretend.copies.total() == 3

    @pytest.mark.parametrize("fault", ["mixed", "read"])
    def test_a_planted_fault_in_the_network_is_found(self, pretend, monkeypatch, fault):
        net, batch = network_there("dcdit"), inputs()
        plain = Routing.confidence.fget

        def spoiled(routing):
            return plain(routing) * (torch.ones(64) if fault == "mixed" else routing.prob.mean().item())

        monkeypatch.setattr(Routing, "confidence", property(spoiled))
        if fault == "mixed":
            with pytest.raises(MixedDevicesError):
                net(*batch)
        else:
            pretend.reads.clear()
            net(*batch)
            assert pretend.reads.total() == 2


@pytest.mark.parametrize(
    ("name", "reads"), [(name, int(spec["name"] == "dcdit")) for name, spec in NETWORKS.items()], ids=list(NETWORKS)
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_forward_pass_reads_the_lengths_and_a_backward_pass_nothing(pretend, name, reads, precision):
    net, batch = network_there(name), inputs()
    pretend.reads.clear()
    pretend.copies.clear()
    with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
        output = net(*batch, 0.3 if net.routes else 0.0)
    assert pretend.reads.total() == reads, pretend.reads
    output.prediction.float().square().mean().backward()
    assert pretend.reads.total() == reads, pretend.reads
    assert not pretend.copies
    assert all(parameter.grad is None or parameter.grad.is_cuda for parameter in net.parameters())


@torch.no_grad()
@pytest.mark.parametrize(("share", "reads"), [(None, 2), (0.9, 1)], ids=["exact", "capacity"])
def test_gates_are_read_once_a_forward_pass(pretend, share, reads):
    net, (x, t, y) = network_there("dcdit, gates"), inputs()
    torch.nn.init.constant_(net.gates.router.bias, -1.0)
    for times, left_out in ((t[:1].expand(4), True), (t, False)):
        pretend.reads.clear()
        pretend.copies.clear()
        output = net(x, times, y, 0.3, capacity=share)
        assert (output.gating.counts is not None) == left_out
        assert pretend.reads.total() == reads, pretend.reads
        assert not pretend.copies


SAMPLERS = {
    "ddpm": (DDPM(4), DDIM(4, eta=0.5), DPMSolver(4), DDIM(6, clip=True, cache=0.5)),
    "flow": (Euler(4), Heun(3), EulerMaruyama(4, clip=True), Euler(6, cache=0.5)),
    "image": (Heun(2), EulerMaruyama(3)),
}
PROCESSES = {"ddpm": {"name": "ddpm"}, "flow": {"name": "flow"}, "image": {"name": "flow", "prediction": "x"}}
GUIDED = ({}, {"scale": 2.0, "drop_fraction": 0.2, "uncond_drop_fraction": 0.7}, {"scale": 2.0, "interval": [200, 800]})


@pytest.mark.parametrize(("share", "expected"), [(None, 1), (0.3, 0)], ids=["exact", "capacity"])
@pytest.mark.parametrize("guided", GUIDED, ids=["plain", "lite", "interval"])
@pytest.mark.parametrize(
    ("process", "settings"),
    [(process, each) for process, some in SAMPLERS.items() for each in some],
    ids=lambda value: value if isinstance(value, str) else f"{value.name} {value.steps}",
)
def test_every_sampler_reads_once_a_step_and_with_a_capacity_never(pretend, process, settings, guided, share, expected):
    net = network_there("dcdit")
    latents = LatentSpec((1, 8, 8), IDENTITY, 1.0, 0.0, tuple("abcde"))
    model = replace(Model(net, latents, 0), process=build_process(PROCESSES[process]))
    reads = []

    def note(numbers, step):
        reads.append(pretend.reads.total())
        pretend.reads.clear()

    capacity = share and room_of(share, [net, net])
    guidance = Guidance(net, net.null_class, GuidanceSettings(**guided), capacity=capacity)
    sampler = Sampler(settings)
    pretend.reads.clear()
    (batch,) = generate(
        model, guidance, sampler, torch.arange(3), range(3), seed=0, batch_size=3, precision="bf16", on_step=note
    )
    assert reads == [expected] * len(sampler.timesteps), pretend.reads
    assert not batch.latents.is_cuda
    # At the end, when all is done: whether all is finite, the latents, the lengths of each step and half, and what was
    # dropped.
    assert pretend.reads.total() == 2 + sum(len(halves) for halves in batch.lengths) + bool(share)


class _There(CPUAccelerator):
    """The stand-in, for Lightning."""

    name = "pretend"

    def setup_device(self, device):
        pass


class _Watch(pl.Callback):
    """Reads and copies from the beginning of each step to that of the next."""

    def __init__(self, device):
        self.device, self.steps = device, []

    def on_train_batch_start(self, *arguments):
        self.steps.append((self.device.reads.copy(), self.device.copies.copy()))
        self.device.reads.clear()
        self.device.copies.clear()


@pytest.fixture
def train_there(pretend, monkeypatch, digits, tmp_path):
    """Train a tiny network on the stand-in by Lightning's own loop; returns what each step read and copied."""
    plain = pl.Trainer.__init__

    def run(precision, *overrides):
        watch = _Watch(pretend)

        @wraps(plain)
        def on_pretend(trainer, *arguments, **named):
            plugin = MixedPrecision("bf16-mixed", "cuda") if precision == "bf16" else Precision()
            for key in ("accelerator", "devices", "precision"):
                named.pop(key, None)
            named["strategy"] = SingleDeviceStrategy(CUDA, _There(), precision_plugin=plugin)
            named["callbacks"] = [watch, *named["callbacks"]]
            plain(trainer, *arguments, **named)

        monkeypatch.setattr(pl.Trainer, "__init__", on_pretend)
        run_dir = tmp_path / "run"
        run_dir.mkdir()
        train(compose_config(*TINY, f"data.directory={digits}", *overrides), run_dir)
        return watch.steps

    return run


IMAGE = ("diffusion=flow", "diffusion.prediction=x", "diffusion.velocity_cosine=1", "diffusion.shift=2")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "words",
    [
        *((), ("diffusion=flow",), IMAGE, ("optimizer=muon",), ("execution.capacity=0.5",), PLAIN_DIT),
        *(REPA, IREPA, ("alignment=dispersive",)),
    ],
    ids=["dcdit", "flow", "image", "muon", "fixed length", "dit", "repa", "irepa", "dispersive"],
)
def test_a_training_step_reads_the_lengths_alone_unless_it_is_logged(train_there, precision, words):
    """Loss, clipping, optimiser, EMA, metrics and progress included; steps 3 and 6 are logged and shown."""
    bar = "callbacks.progress={_target_:dcdit.training.callbacks.ProgressBar,refresh_rate:3}"
    steps = train_there(precision, *words, bar, "trainer.max_steps=7", "trainer.log_every_n_steps=3")
    routed = 0 if words in (PLAIN_DIT, ("execution.capacity=0.5",)) else 1
    reads = [reads.total() for reads, _ in steps[1:]]
    assert [reads[number] for number in (0, 1, 3, 4)] == [routed] * 4, steps
    assert reads[2] == reads[5] > routed
    copies = [copies.total() for _, copies in steps[2:]]
    assert [copies[number] for number in (0, 2, 3)] == [3] * 3, "latents, labels, and the drop fraction"


def test_fid_while_training_mixes_nothing(train_there):
    words = ("callbacks=fid", "features@callbacks.fid.features=digits", "callbacks.fid.count=40", "logger=csv")
    few = ("callbacks.fid.sampler.steps=2", "trainer.val_check_interval=2", "trainer.max_steps=2")
    train_there("bf16", *words, *few, "callbacks.power_ema.lengths=[0.05,0.1]")
