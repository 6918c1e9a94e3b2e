"""The order of samples, without any files."""

from dataclasses import asdict
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dcdit.checks import conform
from dcdit.data.order import EpochOrder, Position, Readers

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=12)
READERS = st.builds(Readers, st.integers(1, 5), st.integers(1, 6), st.integers(0, 30))
SEEDS = st.integers(0, 5)


def places(order: EpochOrder, readers: Readers, rank: int, number: int) -> list[tuple[int, int]]:
    shards, indices = order.batch(rank, number)
    assert len(shards) == readers.batch_size
    return list(zip(shards.tolist(), indices.tolist(), strict=True))


def epoch(sizes, seed, position, readers, batches=None):
    """Everything that all ranks see from ``position`` on, in this epoch."""
    order = EpochOrder(sizes, seed, position.join(readers))
    last = order.batches if batches is None else order.first + batches
    return [
        place
        for rank in range(readers.world_size)
        for number in range(order.first, last)
        for place in places(order, readers, rank, number)
    ]


@given(SIZES, READERS, SEEDS, st.integers(0, 3))
def test_an_epoch_visits_each_sample_once_and_drops_less_than_a_global_batch(sizes, readers, seed, number):
    assume(readers.batches(sum(sizes)))
    seen = epoch(sizes, seed, Position(number), readers)
    assert len(seen) == len(set(seen))
    assert all(0 <= index < sizes[shard] for shard, index in seen)
    assert 0 <= sum(sizes) - len(seen) < readers.world_size * readers.batch_size


@given(SIZES, READERS, SEEDS, st.integers(0, 40), st.integers(0, 12))
def test_entering_at_any_batch_continues_the_order(sizes, readers, seed, start, more):
    """What a rank sees from batch ``start`` on is the same whether it was read up to there or begun there."""
    assume(readers.batches(sum(sizes)))

    def from_the_start():
        position = Position().join(readers)
        while True:
            order = EpochOrder(sizes, seed, position)
            for number in range(order.batches):
                yield [places(order, readers, rank, number) for rank in range(readers.world_size)]
            position = Position(position.epoch + 1).join(readers)

    uninterrupted = from_the_start()
    whole = [next(uninterrupted) for _ in range(start + more)]
    position = conform("place", asdict(Position().advance(readers, start, sum(sizes))), Position)
    for expected in whole[start:]:
        order = EpochOrder(sizes, seed, position.join(readers))
        if order.first == order.batches:
            position = Position(position.epoch + 1)
            order = EpochOrder(sizes, seed, position.join(readers))
        assert [places(order, readers, rank, order.first) for rank in range(readers.world_size)] == expected
        position = position.advance(readers, 1, sum(sizes))


@settings(max_examples=200)
@given(SIZES, SEEDS, st.lists(st.tuples(READERS, st.integers(0, 8)), min_size=1, max_size=4))
def test_changing_readers_see_no_sample_twice(sizes, seed, parts):
    position, seen = Position(), []
    for readers, wanted in parts:
        joined = position.join(readers)
        taken = min(wanted, EpochOrder(sizes, seed, joined).batches - joined.done[-1][1])
        seen += epoch(sizes, seed, position, readers, taken)
        position = Position(0, (*joined.done[:-1], (readers, joined.done[-1][1] + taken)))
        assert position.samples == len(seen)
    seen += epoch(sizes, seed, position, parts[-1][0])
    assert len(seen) == len(set(seen))
    assert sum(sizes) - len(seen) < parts[-1][0].world_size * parts[-1][0].batch_size


@given(SIZES, READERS, st.lists(st.integers(0, 50), min_size=2, max_size=4))
def test_advancing_in_steps_or_at_once(sizes, readers, steps):
    assume(readers.batches(sum(sizes)))
    position = Position()
    for step in steps:
        position = position.advance(readers, step, sum(sizes))
    assert position == Position().advance(readers, sum(steps), sum(sizes))


def test_epochs_and_seeds_shuffle_and_ranks_exchange_shards():
    sizes, readers = [10] * 8, Readers(2, 5, 20)
    orders = [EpochOrder(sizes, seed, Position(number).join(readers)) for seed, number in ((0, 0), (0, 1), (1, 0))]
    firsts = [[places(order, readers, 0, number) for number in range(order.batches)] for order in orders]
    assert all(one != other for one, other in pairwise([*firsts, firsts[0]]))
    assert len({frozenset(shard for batch in first for shard, _ in batch) for first in firsts}) == 3
    within = [index for batch in firsts[0] for shard, index in batch if shard == firsts[0][0][0][0]]
    assert within != sorted(within)


def test_a_buffer_of_nothing_keeps_the_order_within_shards():
    order = EpochOrder([7, 5, 6], 0, Position().join(Readers(1, 3, 0)))
    seen = [place for number in range(order.batches) for place in places(order, order.readers, 0, number)]
    for shard in range(3):
        indices = [index for number, index in seen if number == shard]
        assert indices == sorted(indices)


@pytest.mark.parametrize("window", [0, 100, 10_000])
def test_the_neighbourhood_names_the_shards_that_are_needed(window):
    readers = Readers(3, 16, window)
    order = EpochOrder([50] * 40, 0, Position().join(readers))
    for rank in range(3):
        for number in range(order.batches):
            needed = {shard for shard, _ in places(order, readers, rank, number)}
            wanted, soon = order.neighbourhood(rank, number)
            assert needed <= set(wanted)
            _, end = readers.window_of(number, order.batches)
            if end < order.batches:
                assert {shard for shard, _ in places(order, readers, rank, end)} <= set(soon)


def test_half_of_imagenet_is_skipped_without_reading():
    """1,281,167 samples in 257 shards, 8 ranks: entering in the middle needs no file, and few operations."""
    sizes, readers = [5000] * 256 + [1167], Readers(8, 32, 10_000)
    position = Position().advance(readers, 5004 * 10 + 2502, sum(sizes))
    assert (position.epoch, position.done[-1][1]) == (10, 2502)
    order = EpochOrder(sizes, 0, position)
    assert len(np.unique(order.batch(7, order.first)[0])) <= 4
