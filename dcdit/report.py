"""One page of quality against compute, and of how training went: ``python -m dcdit.report runs/b_n4 runs/dit_b_2``.

Reads what ``dcdit.evaluate`` and training left in and below the given folders, and writes ``report.html``, which needs
no other file, the plots, and the measurements as CSV and JSON.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import hydra
from omegaconf import DictConfig

from dcdit.checks import NotEmpty, call_checked, checked
from dcdit.settings.entry import entry_point, hold, plain
from dcdit.settings.published import CONFIG_DIR


@checked
@dataclass(frozen=True)
class ReportSettings:
    """What to report on: the keys of ``configs/report.yaml``.

    Attributes:
        runs: folders with runs or results in or below them, or single results.
        out: folder for the report.
        title: of the page.
    """

    runs: Annotated[list[str], NotEmpty("name folders with results, such as runs/b_n4")]
    out: str
    title: str


def check(config: DictConfig) -> ReportSettings:
    """What ``config`` asks for; UserError if a value is wrong, before anything is read."""
    return call_checked(ReportSettings, plain(config), "")


def run(config: DictConfig) -> Path:
    """Write the report; returns the page."""
    settings = check(config)
    from dcdit.reporting.collect import find_results, read_results
    from dcdit.reporting.histories import histories_below
    from dcdit.reporting.page import write_report

    histories = histories_below(settings.runs)
    results, left_out = find_results(settings.runs) if histories else read_results(settings.runs)
    page = write_report(results, histories, Path(settings.out), settings.title, left_out)
    runs = len({result.run for result in results})
    for reason in left_out:
        print(f"Left out: {reason}")
    measured = f"{len(results)} measurement{'s'[: len(results) != 1]} of {runs} run{'s'[: runs != 1]}"
    print(f"{measured}, the course of {len(histories)} run{'s'[: len(histories) != 1]}: {page}")
    return page


@hydra.main(version_base="1.3", config_path=CONFIG_DIR, config_name="report")
def main(config: DictConfig) -> None:
    """Hydra entry point."""
    hold(run, config)


if __name__ == "__main__":
    entry_point(main, paths=True)
