"""The parts of the package, and that dcdit finds them by name."""

from types import SimpleNamespace

import torch
from own_project.metric import compute_mean

from dcdit.network.routing import ROUTERS
from dcdit.train import train


def test_the_router_sees_edges_and_nothing_else():
    router = ROUTERS["gradient"](3)
    image = torch.zeros(1, 3, 6, 6)
    image[..., 3:] = 2.0
    probabilities = router(image).unflatten(1, (6, 6))
    assert torch.equal(probabilities[0] > 0.5, (image.diff(dim=3, append=image[..., -1:])[0, 0] != 0))


def test_every_parameter_of_the_router_gets_a_gradient():
    router = ROUTERS["gradient"](4)
    router(torch.randn(2, 4, 5, 5)).sum().backward()
    assert all(parameter.grad is not None and parameter.grad != 0 for parameter in router.parameters())


def test_the_metric_is_the_distance_of_the_means():
    features = torch.randn(10, 4).double()
    chunks = [SimpleNamespace(features=part) for part in (features[:3], features[3:])]
    shift = torch.tensor([3.0, 0, 4.0, 0]).double()
    reference = SimpleNamespace(moments=SimpleNamespace(mean=features.mean(dim=0) + shift))
    assert abs(compute_mean(reference, lambda: chunks)["mean_distance"] - 5) < 1e-9


def test_the_experiment_is_found_by_name():
    config = train.compose("experiment=gradient_digits")
    assert config.model["router"] == "gradient"
    assert config.run_name == "gradient_digits"
