"""Two processes with half of a batch each compute what one does with the whole."""

import os
import socket

import torch
import torch.distributed as dist
from support.configs import perturb
from torch.nn.parallel import DistributedDataParallel

from dcdit.diffusion.loss import diffusion_loss
from dcdit.diffusion.schedule import Posterior, add_noise
from dcdit.network import DCDiT
from dcdit.training.objective import ratio_loss

BATCH, DROP = 16, 0.3


def network():
    torch.manual_seed(0)
    net = DCDiT(grid=8, channels=1, num_classes=5, width=32, depth=2, heads=2, encoder_width=16, groups=4)
    perturb(net)
    with torch.no_grad():
        net.router.scorer[-1].bias.fill_(0.0)
    return net.eval()  # without dropped labels: equal data and noise


def loss(net, rows):
    """The training loss of some rows of one fixed batch."""
    generator = torch.Generator().manual_seed(1)
    latents, noise = (torch.randn(BATCH, 1, 8, 8, generator=generator)[rows] for _ in range(2))
    t = torch.randint(1000, (BATCH,), generator=generator)[rows]
    y = (torch.arange(BATCH) % 5)[rows]
    tables = Posterior.linear()
    noisy = add_noise(tables, latents, noise, t)
    output = net(noisy, t, y, DROP)
    total = diffusion_loss(tables, output.prediction, latents, noisy, noise, t).total.mean()
    return total + 0.03 * ratio_loss(output.routing.prob, output.routing.natural_mask, 4.0, 4)


def work(rank, port, path):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    wrapped = DistributedDataParallel(network())
    loss(wrapped, slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)).backward()
    if rank == 0:
        torch.save({name: p.grad for name, p in wrapped.module.named_parameters()}, path)
    dist.destroy_process_group()


def test_gradients_of_two_processes_equal_those_of_one(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(work, (port, tmp_path / "gradients.pt"), nprocs=2)
    found = torch.load(tmp_path / "gradients.pt", weights_only=True)
    whole = network()
    loss(whole, slice(None)).backward()
    total = torch.stack([parameter.grad.norm() for parameter in whole.parameters()]).norm()
    assert total > 1e-2
    for name, parameter in whole.named_parameters():
        # a bias before a norm has a gradient of nothing but rounding
        error = (found[name] - parameter.grad).norm()
        assert error <= 1e-5 * parameter.grad.norm() + 1e-6 * total, name
