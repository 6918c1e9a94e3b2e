"""One page of quality against compute, and of how training went: ``python -m dcdit.report runs/b_n4 runs/dit_b_2``.

Reads what ``dcdit.evaluate``, ``dcdit.score`` and training left in and below the given folders, and writes
``report.html``, which needs no other file, the plots, and the measurements as CSV and JSON.
"""

from pathlib import Path
from typing import Annotated

from dcdit.checks import NotEmpty, config
from dcdit.settings.command import command


@config
class ReportConfig:
    """The configuration of ``dcdit.report``; ``configs/report.yaml`` describes each key."""

    runs: Annotated[list[str], NotEmpty("name folders with results, such as runs/b_n4")]
    out: str
    title: str


@command("report", paths=True, plugins=False)
def report(config: ReportConfig) -> Path:
    """Write the report; returns the page."""
    from dcdit.reporting.collect import find_results, find_scores, read_results
    from dcdit.reporting.histories import histories_below, runs_without_anything
    from dcdit.reporting.page import write_report

    histories = histories_below(config.runs)
    scores, damaged = find_scores(config.runs)
    results, left_out = find_results(config.runs) if histories or scores else read_results(config.runs)
    left_out += damaged
    left_out += [f"{name} has neither curves nor results" for name in runs_without_anything(config.runs, histories)]
    page = write_report(results, histories, Path(config.out), config.title, left_out, scores)
    runs = len({result.run for result in results})
    for reason in left_out:
        print(f"Left out: {reason}")
    measured = f"{len(results)} measurement{'s'[: len(results) != 1]} of {runs} run{'s'[: runs != 1]}"
    measured += f", {len(scores)} score{'s'[: len(scores) != 1]} of images" if scores else ""
    print(f"{measured}, the course of {len(histories)} run{'s'[: len(histories) != 1]}: {page}")
    return page


if __name__ == "__main__":
    report.main()
