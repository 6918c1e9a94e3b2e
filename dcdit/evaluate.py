"""Quality against compute: ``python -m dcdit.evaluate checkpoint=... reference=... drop_fractions=[0,0.2]``.

Samples images at every budget and guidance that lists name, and compares them with a reference by FID, sFID, KID,
Inception Score, precision and recall. Each measurement is kept as one file; finished ones are not taken again, and a
killed evaluation goes on where it was. Any number of processes shares the work. ``search=true`` looks for the best
guidance scale at each budget.
"""

import os
import sys
from typing import TYPE_CHECKING

from dcdit.evaluation.grid import grid_of
from dcdit.evaluation.settings import EvaluateConfig
from dcdit.runtime.display import resumable
from dcdit.runtime.processes import processes
from dcdit.settings.command import command

if TYPE_CHECKING:
    from dcdit.evaluation.results import Result


@command("evaluate")
def evaluate(config: EvaluateConfig) -> "list[Result]":
    """Measure what ``config`` asks for; returns the finished measurements, each with the path of its file."""
    grid = grid_of(config)
    from dcdit.checkpoints.resolve import resolve_checkpoint
    from dcdit.evaluation.images import check_images

    check_images(config.reference)
    source = resolve_checkpoint(config.checkpoint, config.paths.runs)  # perhaps a download
    from dcdit.evaluation.measure import Deadline, OutOfTimeError
    from dcdit.evaluation.points import Evaluation, take_times
    from dcdit.evaluation.search import Search, write_log
    from dcdit.reporting.tables import notes_on, table_of
    from dcdit.runtime.display import Console
    from dcdit.sampling.setup import set_up_all

    deadline, (rank, world_size) = Deadline.in_hours(config.max_hours), processes()
    for combination in grid.left_out if rank == 0 else ():
        print(f"Left out: {combination}")
    samplings = set_up_all(grid.points, source)
    evaluation = Evaluation(samplings[0], config)
    with resumable(rank, "evaluating", "chunk", evaluation.out):
        if config.search:
            search = Search(evaluation, rank, world_size, deadline)
            complete = search.run(samplings)
            finished = search.last
            if rank == 0:
                print(f"The search in words: {os.path.relpath(write_log(evaluation, search.log))}")
        else:
            points = [evaluation.of(sampling) for sampling in samplings]
            finished = evaluation.measure(points, rank, world_size, deadline)
            complete = len(finished) == len(points)
        if complete and config.time_rounds:
            try:
                take_times(finished, config.time_rounds, config.time_again and rank == 0, deadline)
            except OutOfTimeError:
                print("max_hours is over while timing: the same command again takes the times.")
    results = [measurement.result for measurement in finished]
    if finished and (rank == 0 or any(measurement.job.finalized for measurement in finished)):
        Console(width=None if sys.stdout.isatty() else 160).print(table_of(results))
        print("\n".join([*notes_on(results), f"Results: {os.path.relpath(evaluation.out)}"]))
    if not complete and not config.search:  # whose log says where it stopped
        why = "max_hours is over" if deadline.over else f"process {rank} is done"
        print(f"Not all is measured, {why}: what is left is measured by other processes, or by the same command again.")
    if grid.beyond:
        print(f"max_images={config.max_images} leaves {grid.beyond} of the points out: raise it to measure them too.")
    return results


if __name__ == "__main__":
    evaluate.main()
