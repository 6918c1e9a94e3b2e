"""Quality against compute: ``python -m dcdit.evaluate checkpoint=... reference=... drop_fractions=[0,0.2]``.

Samples images at every budget and guidance that lists name, and compares them with a reference by FID, sFID, KID,
Inception Score, precision and recall. Each measurement is kept as one file; finished ones are not taken again, and a
killed evaluation goes on where it was. Any number of processes shares the work. ``search=true`` looks for the best
guidance scale at each budget.
"""

import os
import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from dcdit.evaluation.grid import Grid, grid_of
from dcdit.runtime.display import resumable
from dcdit.runtime.processes import print_once, processes
from dcdit.settings.entry import CONFIG_DIR, entry_point, hold, plain


def check(config: DictConfig) -> Grid:
    """What ``config`` asks for; UserError if a value is wrong, before anything is loaded."""
    return grid_of(plain(config))


def run(config: DictConfig) -> list[Path]:
    """Measure what ``config`` asks for; returns the files of the finished measurements."""
    grid = check(config)
    plan, settings = grid.points[0], grid.settings
    from dcdit.checkpoints.locate import locate

    place = locate(plan.settings.checkpoint, plan.runs)
    from dcdit.evaluation.images import check_place
    from dcdit.evaluation.measure import Deadline, OutOfTimeError
    from dcdit.evaluation.points import Evaluation, remarks, table, take_times
    from dcdit.evaluation.search import search, write_log
    from dcdit.runtime.display import Console
    from dcdit.sampling.setup import set_up_all

    deadline, (rank, world_size) = Deadline.in_hours(settings.max_hours), processes()
    for words in grid.left_out if rank == 0 else ():
        print(f"Left out: {words}")
    check_place(settings.reference)
    samplings = set_up_all(grid.points, place)
    evaluation = Evaluation(samplings[0], settings, config.features)
    with resumable(rank, "evaluating", "chunk", evaluation.out):
        if settings.search:
            searched = search(evaluation, samplings, rank, world_size, deadline)
            finished, complete = searched.last, searched.complete
            print_once(f"The search in words: {os.path.relpath(write_log(evaluation, searched.log))}")
        else:
            points = [evaluation.of(sampling) for sampling in samplings]
            finished = evaluation.measure(points, rank, world_size, deadline)
            complete = len(finished) == len(points)
        if complete and settings.time_rounds:
            try:
                take_times(finished, settings.time_rounds, settings.time_again and rank == 0, deadline)
            except OutOfTimeError:
                print("max_hours is over while timing: the same command again takes the times.")
    if finished and (rank == 0 or any(each.finalized for each in finished)):
        results = [each.result for each in finished]
        Console(width=None if sys.stdout.isatty() else 160).print(table(results))
        print("\n".join([*remarks(results), f"Results: {os.path.relpath(evaluation.out)}"]))
    if not complete and not settings.search:  # whose log says where it stopped
        why = "max_hours is over" if deadline.over else f"process {rank} is done"
        print(f"Not all is measured, {why}: what is left is measured by other processes, or by the same command again.")
    if grid.beyond:
        print(f"max_images={settings.max_images} leaves {grid.beyond} of the points out: raise it to measure them too.")
    return [each.path for each in finished]


@hydra.main(version_base="1.3", config_path=CONFIG_DIR, config_name="evaluate")
def main(config: DictConfig) -> None:
    """Hydra entry point."""
    hold(run, config)


if __name__ == "__main__":
    entry_point(main)
