"""What width gates spare: the time and the FLOPs of a forward pass over those of the same network without gates.

    OMP_NUM_THREADS=1 python benchmarks/gates.py --batch 2                 DC-DiT-B, 256px, float32, one thread
    python benchmarks/gates.py --scale xl --batch 64 --precision bf16 --device cuda

Needs torch alone. Takes the options of ``step.py``. An untrained network whose gates leave the same number of heads and
of groups of MLP channels on in each block. All shares take turns. A ratio is the median over the rounds of the ratio
within a round. Time is that of the clock; with other jobs on the machine take many rounds. ``cutting`` is the
time that a forward pass takes to copy the weights that run: it grows with them, and not with the batch.
"""

import statistics

import torch
from step import Bench, heading, read_options

from dcdit.compute.flops import Cost
from dcdit.network.gates import Gates, narrowed

SHARES = (1.0, 0.75, 0.5, 0.25)


def set_share(gates: Gates, share: float) -> None:
    """Have ``share`` of the heads and of the groups of each block run, whatever the timestep: every other one first."""
    pattern = []
    for size in (gates.heads, gates.groups):
        order = torch.tensor([*range(0, size, 2), *range(1, size, 2)]).argsort()
        pattern.append(order < round(share * size))
    with torch.no_grad():
        gates.router.weight.zero_()
        gates.router.bias.copy_(torch.where(torch.cat(pattern).repeat(gates.depth), 1.0, -1.0))


def main() -> None:
    """Measure and print."""
    options = read_options(__doc__)
    bench = Bench(options, gates=True)
    del bench.plain  # its memory
    bench.t.fill_(500)
    network, gates = bench.network, bench.network.gates
    assert gates is not None
    costs, cut = {}, {}
    before: list[float] = []
    seconds: dict[float, list[float]] = {share: [] for share in SHARES}
    for turn in range(options.warmup + options.rounds):
        for share, times in ((None, before), *seconds.items()):
            network.gates = None if share is None else gates
            set_share(gates, share or 1.0)
            spent = bench.seconds(lambda: bench.forward(network))
            if turn >= options.warmup:
                times.append(spent)
    for share in SHARES:
        set_share(gates, share)
        with torch.no_grad(), bench.precision():
            gating = network(bench.x[:1], bench.t[:1], bench.y[:1]).gating
            found = [(block, gating.block(number)) for number, block in enumerate(network.backbone.blocks)]
            kept = [(block, *gating.kept) for block, gating in found if gating is not None and gating.kept is not None]
            cut[share] = min(
                bench.seconds(lambda kept=kept: [narrowed(*arguments) for arguments in kept]) for _ in range(3)
            )
        costs[share] = Cost.of_network(network, gating).mean(bench.lengths)
    print(heading(options, f"batches of {options.batch}"))
    print("| share of heads and groups | FLOPs | time | least and greatest | of which cutting |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for share, times in seconds.items():
        ratios = [one / other for one, other in zip(times, before, strict=True)]
        print(
            f"| {share:g} | {costs[share] / costs[1.0]:.3f} | {statistics.median(ratios):.3f}"
            f" | {min(ratios):.3f} to {max(ratios):.3f} | {cut[share] / statistics.median(before):.3f} |"
        )


if __name__ == "__main__":
    main()
