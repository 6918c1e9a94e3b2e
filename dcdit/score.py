"""Figures of images that exist: ``python -m dcdit.score images=samples.npz reference=...``.

Compares images of any program with a reference by FID, sFID, KID, Inception Score, precision and recall, as
``dcdit.evaluate`` compares those that it samples. The score is kept as one file; a killed command goes on where it was,
and any number of processes shares the work.
"""

import os
import sys
from typing import TYPE_CHECKING

from dcdit.evaluation.settings import ScoreConfig
from dcdit.runtime.display import resumable
from dcdit.runtime.processes import processes
from dcdit.settings.command import command

if TYPE_CHECKING:
    from dcdit.evaluation.scores import Score


@command("score")
def score(config: ScoreConfig) -> "Score | None":
    """Score what ``config`` asks for; returns the score, or None if other processes still work on it."""
    from dcdit.evaluation.images import check_images
    from dcdit.evaluation.scoring import Scoring, check_expected
    from dcdit.reporting.tables import notes_on_score, table_of_score
    from dcdit.runtime.display import Console

    rank, world_size = processes()
    check_images(config.images, "images")
    check_images(config.reference)
    scoring = Scoring(config)
    with resumable(rank, "scoring", "chunk", scoring.out):
        result = scoring.run(rank, world_size)
    if result is None:
        print(f"Process {rank} is done; what is left is scored by other processes, or by the same command again.")
    elif rank == 0 or scoring.job.finalized:
        Console(width=None if sys.stdout.isatty() else 160).print(table_of_score(result))
        print("\n".join([*notes_on_score(result), f"Score: {os.path.relpath(result.path)}"]))
        if config.expected:
            print("\n".join(check_expected(result, config.expected)))
    return result


if __name__ == "__main__":
    score.main()
