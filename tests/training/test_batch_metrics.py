"""Metrics of micro-batches, combined to those of the batch."""

import pytest
import torch

from dcdit.network import Routing
from dcdit.training.metrics import BatchMetrics, routing_metrics


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_the_metrics_of_micro_batches_are_those_of_their_batch(micro_batches):
    prob = torch.rand(8, 16, generator=torch.Generator().manual_seed(0))
    whole = Routing(prob, prob > 0.5, prob > 0.7)
    batch = BatchMetrics()
    for samples in torch.arange(8).chunk(micro_batches):
        batch.add(routing_metrics(whole.of(samples), world_size=2))
    torch.testing.assert_close(batch.take(), routing_metrics(whole, world_size=2))
