"""One page of quality against compute: ``python -m dcdit.report runs/b_n4 runs/dit_b_2``.

Reads what ``dcdit.evaluate`` left in and below the given folders, and writes ``report.html``, which needs no other
file, the plots, and the measurements as CSV and JSON.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import hydra
from omegaconf import DictConfig

from dcdit.checks import NotEmpty, call_checked, checked
from dcdit.settings.entry import CONFIG_DIR, entry_point, hold, plain


@checked
@dataclass(frozen=True)
class ReportSettings:
    """What to report on: the keys of ``configs/report.yaml``.

    Attributes:
        runs: folders with results in or below them, or single results.
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
    from dcdit.evaluation.page import write_report
    from dcdit.evaluation.results import read_results

    results, left_out = read_results(settings.runs)
    page = write_report(results, Path(settings.out), settings.title, left_out)
    runs = len({result.values["run"] for result in results})
    for reason in left_out:
        print(f"Left out: {reason}")
    print(f"{len(results)} measurement{'s'[: len(results) > 1]} of {runs} run{'s'[: runs > 1]}: {page}")
    return page


@hydra.main(version_base="1.3", config_path=CONFIG_DIR, config_name="report")
def main(config: DictConfig) -> None:
    """Hydra entry point."""
    hold(run, config)


if __name__ == "__main__":
    entry_point(main, paths=True)
