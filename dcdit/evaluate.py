"""Quality against compute: ``python -m dcdit.evaluate checkpoint=... reference=... drop_fractions=[0,0.2]``.

Samples images at every budget and compares them with a reference by FID, KID and Inception Score. Each measurement is
kept as one file; finished ones are not taken again, and a killed evaluation goes on where it was. Any number of
processes shares the work.
"""

import os
from pathlib import Path

import hydra
from omegaconf import DictConfig

from dcdit.checks import call_checked
from dcdit.errors import UserError
from dcdit.evaluation.settings import EvaluateSettings
from dcdit.runtime.display import resumable
from dcdit.runtime.processes import processes
from dcdit.sampling.settings import SamplingPlan
from dcdit.settings.entry import CONFIG_DIR, entry_point, hold, plain


def check(config: DictConfig) -> tuple[SamplingPlan, EvaluateSettings]:
    """What ``config`` asks for; UserError if a value is wrong, before anything is loaded."""
    plan, own = SamplingPlan.of(plain(config))
    settings = call_checked(EvaluateSettings, own, "")
    others = plan.budget.given or plan.guidance.drop_fraction or plan.guidance.drop_schedule
    if settings.drop_fractions is not None and others:
        raise UserError(
            f"drop_fractions={settings.drop_fractions}: the budget is given by budget, guidance.drop_fraction or"
            " guidance.drop_schedule too; leave one out"
        )
    return plan, settings


def run(config: DictConfig) -> list[Path]:
    """Measure what ``config`` asks for; returns the files of the finished measurements."""
    plan, settings = check(config)
    from dcdit.checkpoints.locate import locate

    place = locate(plan.settings.checkpoint, plan.runs)
    from rich.console import Console

    from dcdit.evaluation.budgets import measure, measurements_of, table, take_times
    from dcdit.sampling.setup import set_up_sampling

    measurements = measurements_of(set_up_sampling(plan, place), settings, config.features)
    out, (rank, world_size) = measurements[0].out, processes()
    with resumable(rank, "evaluating", "chunk", out):
        finished = measure(measurements, rank, world_size)
        if len(finished) == len(measurements) and settings.time_rounds:
            take_times(measurements, settings.time_rounds, settings.time_again and rank == 0)
    if finished and (rank == 0 or any(each.finalized for each in finished)):
        Console().print(table(finished))
        print(f"Results: {os.path.relpath(out)}")
    if len(finished) < len(measurements):
        print(f"Process {rank} is done; what is left is measured by other processes, or by the same command again.")
    return [each.path for each in finished]


@hydra.main(version_base="1.3", config_path=CONFIG_DIR, config_name="evaluate")
def main(config: DictConfig) -> None:
    """Hydra entry point."""
    hold(run, config)


if __name__ == "__main__":
    entry_point(main)
